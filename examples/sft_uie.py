"""Fine-tune a language model for information extraction with Task-Aware MoELoRA and TRL.

    python examples/sft_uie.py --config examples/demo.yaml

    python examples/sft_uie.py \
        --model_name_or_path codellama/CodeLlama-7b-hf --dtype bfloat16 \
        --task_encoder Salesforce/codet5-base \
        --train_data data/conll04/train.jsonl data/wnut17/train.jsonl \
        --dev_data data/conll04/dev.jsonl --eval_strategy epoch \
        --eval_data data/crossner_ai/test.jsonl \
        --output_dir outputs/codellama-7b --num_train_epochs 3 --learning_rate 3e-4 \
        --per_device_train_batch_size 4 --gradient_accumulation_steps 8 --push_to_hub

A data set is a JSONL file of documents (see docs/formats.md) or the id of a Hub data set with
these columns. Every option can stand in a YAML file (`--config`), and those of TRL's `SFTConfig`
are taken as well. The same command again resumes an interrupted run.
"""

from __future__ import annotations

import io
import logging
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import datasets
import transformers
from sft_checks import (
    Documents,
    check_hub,
    check_options,
    check_output,
    describe_run,
    fail,
    find_checkpoint,
    finished,
    first_line,
    read_documents,
    start_run,
)
from sft_results import (
    LOSSES,
    PlainProgress,
    answer,
    push,
    score_answers,
    write_results,
)
from transformers import (
    AutoTokenizer,
    EarlyStoppingCallback,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    set_seed,
)
from transformers.hf_argparser import HfArg
from transformers.utils import check_min_version
from trl import ModelConfig, SFTConfig, SFTTrainer, TrlParser, get_quantization_config

from peft_taskmoe import (
    ChecksumCallback,
    TaskEncoder,
    TaskMoELoraConfig,
    attach_task_encoder,
    log_routing,
    save_task_centroids,
)
from peft_taskmoe.uie import PromptFormat, Regularisers, mix, to_prompt_completion

check_min_version("5.0.0")  # whose options these are


@dataclass
class DataArguments:
    """What is learned and what is asked afterwards."""

    train_data: list[str] = HfArg(default_factory=list, help="JSONL files or Hub data sets.")
    dev_data: list[str] = HfArg(default_factory=list, help="Likewise, for --eval_strategy.")
    eval_data: list[str] = HfArg(default_factory=list, help="Likewise, scored by generation.")
    max_train_documents: int | None = HfArg(default=None, help="At most so many a data set.")
    max_eval_documents: int | None = HfArg(default=None, help="At most so many a data set.")
    prompt_style: Literal["dataclass", "compact"] = HfArg(
        default="dataclass", help="'dataclass' is the paper's; 'compact' takes half the tokens."
    )
    occurrences: bool = HfArg(default=True, help="Number repeated mentions in answers.")
    shuffle_labels: bool = HfArg(default=True, help="Show labels in random order.")
    label_dropout: float = HfArg(default=0.0, help="Probability of leaving a label out.")
    mask_labels: float = HfArg(default=0.0, help="Probability of hiding label names.")
    max_new_tokens: int = HfArg(default=256, help="The longest answer when scoring.")
    eval_batch_size: int = HfArg(default=8, help="Prompts per generation when scoring.")
    score_before: bool = HfArg(default=False, help="Also score before training.")
    early_stopping_patience: int | None = HfArg(
        default=None, help="Stop after so many evaluations without a better one."
    )
    overwrite_output_dir: bool = HfArg(default=False, help="Start anew, whatever was trained.")


@dataclass
class TaskMoEArguments:
    """The adapter and its task encoder: fields of `TaskMoELoraConfig` and `TaskEncoder`."""

    task_encoder: str = HfArg(default="Salesforce/codet5-base", help="Hub id or folder.")
    task_text: Literal["prompt", "schema"] = HfArg(default="prompt", help="What it reads.")
    num_experts: int = HfArg(default=8, help="Experts per adapted layer.")
    expert_r: int = HfArg(default=4, help="Rank of each expert.")
    expert_alpha: float = HfArg(default=32.0, help="Scale of the experts times expert_r.")
    expert_dropout: float = HfArg(default=0.05, help="Dropout on the experts' input.")
    target_modules: list[str] | None = HfArg(
        default=None, help="Names of the layers to adapt, or one regex; all linear ones if absent."
    )
    router_inputs: Literal["token+task", "token", "task"] = HfArg(
        default="token+task", help="What the router reads."
    )
    task_norm: Literal["matched", "rms", "none"] = HfArg(
        default="matched", help="Scale of the task vector."
    )
    top_k: int | None = HfArg(default=None, help="Keep only so many gates of a token.")
    router_balance_coef: float = HfArg(default=0.0, help="Weight of the load-balancing loss.")


@dataclass
class ModelArguments(ModelConfig):
    """TRL's, but that every option of plain LoRA is noticed, also one given with its default."""

    use_peft: bool = True
    lora_r: int | None = None
    lora_alpha: int | None = None
    lora_dropout: float | None = None


def load_readers(moe: TaskMoEArguments, model: ModelConfig) -> tuple[Any, TaskEncoder]:
    """The tokenizer of the base model, and the encoder of the tasks."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            model.model_name_or_path, revision=model.model_revision
        )
        return tokenizer, TaskEncoder(moe.task_encoder, text=moe.task_text)
    except (OSError, ValueError) as error:
        fail(f"A model cannot be loaded: {error}")


def training_rows(
    documents: Documents, tokenizer: Any, limit: int | None, **options: Any
) -> datasets.Dataset:
    """Prompts and completions. Those with more than `limit` tokens are left out, and counted."""
    pairs = mix(documents, seed=options["seed"])
    rows = to_prompt_completion(pairs, **options)
    texts = [row["prompt"] + row["completion"] + tokenizer.eos_token for row in rows]
    lengths = [len(ids) for ids in tokenizer(texts)["input_ids"]]
    kept = [i for i, length in enumerate(lengths) if limit is None or length <= limit]
    if not kept:
        fail(
            f"`--max_length {limit}` cuts all {len(rows)} answers: the shortest example has "
            f"{min(lengths, default=0)} tokens. Raise it, or pass `--prompt_style compact`."
        )
    if len(kept) < len(rows):
        print(
            f"`--max_length {limit}` would cut {len(rows) - len(kept)} of {len(rows)} answers; "
            f"these examples are left out. The longest has {max(lengths)} tokens."
        )
    return rows.select(kept).select_columns(["dataset", "prompt", "completion"])


def make_trainer(
    data: DataArguments,
    moe: TaskMoEArguments,
    training: SFTConfig,
    model: ModelConfig,
    encoder: TaskEncoder,
    tokenizer: Any,
    rows: datasets.Dataset,
    dev: datasets.Dataset | None,
) -> SFTTrainer:
    """TRL's trainer of the adapter, with its encoder attached."""
    targets: Any = moe.target_modules or ["all-linear"]
    if targets == ["all-linear"] or (len(targets) == 1 and set(targets[0]) & set("*+?|([\\")):
        (targets,) = targets  # a regular expression stands alone
    config = TaskMoELoraConfig(
        task_type="CAUSAL_LM",
        num_experts=moe.num_experts,
        r=moe.expert_r,
        lora_alpha=moe.expert_alpha,
        lora_dropout=moe.expert_dropout,
        target_modules=targets,
        router_inputs=moe.router_inputs,
        task_norm=moe.task_norm,
        top_k=moe.top_k,
        router_aux_loss_coef=moe.router_balance_coef,
        task_dim=encoder.task_dim,
        task_encoder=encoder.config,
    )
    training.push_to_hub = False  # pushed once, at the end, with the card and the scores
    training.model_init_kwargs = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(training.model_init_kwargs or {}),
    }
    callbacks: list[TrainerCallback] = [PlainProgress(), ChecksumCallback()]
    if data.early_stopping_patience is not None:
        callbacks.append(EarlyStoppingCallback(data.early_stopping_patience))
    trainer = SFTTrainer(
        model=model.model_name_or_path,
        args=training,
        peft_config=config,
        quantization_config=get_quantization_config(model),
        callbacks=callbacks,
        processing_class=tokenizer,
        train_dataset=rows,
        eval_dataset=dev,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    attach_task_encoder(
        trainer.model, encoder.to(trainer.accelerator.device), trainer.processing_class
    )
    return log_routing(trainer)


def train(trainer: SFTTrainer, output: Path) -> None:
    """Train from the newest whole checkpoint on, or load what was trained to its end."""
    last = find_checkpoint(output, trainer.args.resume_from_checkpoint)
    done = finished(output, last, trainer.args)
    if done is None:
        start = "from the beginning" if last is None else f"going on from {last}"
        print(f"Training on {len(trainer.train_dataset)} examples, {start}.", flush=True)
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
    else:
        folder, trainer.state = done
        print(f"Step {trainer.state.global_step}, the last, was trained before; it is loaded.")
        trainer.model.load_adapter(str(folder), "default", is_trainable=True)
    if done is None or folder != output:
        trainer.save_model(str(output))
        trainer.save_state()


def prompts_by_task(rows: datasets.Dataset, limit: int = 16) -> dict[str, list[str]]:
    """The first prompts of each data set."""
    prompts: dict[str, list[str]] = {}
    for name, prompt in zip(rows["dataset"], rows["prompt"], strict=True):
        if len(prompts.setdefault(name, [])) < limit:
            prompts[name].append(prompt)
    return prompts


def main(
    data: DataArguments, moe: TaskMoEArguments, training: SFTConfig, model: ModelConfig
) -> None:
    """Check, train, score, save, and push if asked."""
    start, is_main = time.perf_counter(), training.process_index == 0
    if not is_main:
        sys.stdout = io.StringIO()  # one process tells it
    output, seed = Path(training.output_dir), training.seed
    check_options(data, training, model)
    set_seed(seed)
    documents, dev_documents, test = read_documents(data, seed)
    tokenizer, encoder = load_readers(moe, model)
    format = PromptFormat(style=data.prompt_style, occurrences=data.occurrences)
    regularisers = Regularisers(
        shuffle=data.shuffle_labels, dropout=data.label_dropout, mask=data.mask_labels
    )
    writing = {"limit": training.max_length, "format": format, "seed": seed}
    rows = training_rows(documents, tokenizer, regularisers=regularisers, **writing)
    dev = training_rows(dev_documents, tokenizer, **writing) if dev_documents else None
    run = describe_run((data, moe, training, model), (rows, dev))
    longer = not data.overwrite_output_dir and check_output(output, run)
    pushes, repository = training.push_to_hub, training.hub_model_id or str(output)
    if pushes and is_main:
        repository = check_hub(training)

    trainer = make_trainer(data, moe, training, model, encoder, tokenizer, rows, dev)
    trainer.accelerator.wait_for_everyone()
    if is_main:
        start_run(output, run, anew=data.overwrite_output_dir, longer=longer)
    trainer.accelerator.wait_for_everyone()
    before = None
    if test and data.score_before and not any(output.glob("checkpoint-*")):
        before = score_answers(test, answer(trainer, test, format, data, "before training"))
    train(trainer, output)
    if not is_main:
        return
    results = {
        "repository": repository,
        "base_model": model.model_name_or_path,
        "adapter": trainer.model.peft_config["default"].to_dict(),
        "seed": seed,
        "train_documents": Counter(rows["dataset"]),
        "left_out": sum(map(len, documents.values())) - len(rows),
        "loss": [entry for entry in trainer.state.log_history if LOSSES & set(entry)],
    }
    save_task_centroids(trainer.model, prompts_by_task(rows), output)
    write_results(trainer, format, data, test, before, results)
    print(f"The adapter, its card and results.json are in {output}.")
    print(f"This took {time.perf_counter() - start:.0f} seconds.")
    if pushes:
        push(output, repository, training)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        print(__doc__)
        raise SystemExit(2)
    logging.basicConfig(level=logging.WARNING)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    parser = TrlParser(
        (DataArguments, TaskMoEArguments, SFTConfig, ModelArguments), conflict_handler="resolve"
    )
    try:
        parsed = parser.parse_args_and_config()
    except ValueError as error:
        cpu = " On a CPU add `--bf16 false --dtype float32`." if "bf16" in str(error) else ""
        fail(f"{first_line(error)}{cpu}")
    main(*parsed)
