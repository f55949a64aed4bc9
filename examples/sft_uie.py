"""Fine-tune a language model for information extraction with Task-Aware MoELoRA and TRL, and score it on unseen labels.

    python examples/sft_uie.py --config examples/demo.yaml

    python examples/sft_uie.py \
        --model_name_or_path codellama/CodeLlama-7b-hf --dtype bfloat16 \
        --task_encoder Salesforce/codet5-base \
        --train_data data/conll04/train.jsonl data/wnut17/train.jsonl \
        --eval_data data/crossner_ai/test.jsonl \
        --output_dir outputs/codellama-7b --num_train_epochs 3 --learning_rate 3e-4 \
        --per_device_train_batch_size 4 --gradient_accumulation_steps 8 --push_to_hub

A data set is a JSONL file of documents (one of `{"id", "text", "task", "schema", "annotations"}` a line, see docs/extraction.md)
or the id of a Hub data set with these columns. Every option can stand in a YAML file (`--config`). A run that was interrupted goes
on from its last checkpoint when the same command is given again.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import HfApi, ModelCard, ModelCardData
from rich.console import Console
from rich.table import Table
from transformers import set_seed
from transformers.trainer_utils import get_last_checkpoint
from trl import ModelConfig, SFTConfig, SFTTrainer, TrlParser, get_quantization_config

import peft_taskmoe
from peft_taskmoe import TaskEncoder, TaskMoELoraConfig, attach_task_encoder
from peft_taskmoe.uie import (
    Document,
    Extractor,
    PromptFormat,
    Regularisers,
    ScoreReport,
    mix,
    read_datasets,
    save_format,
    score,
    to_prompt_completion,
)

ADAPTER_FILES = [
    "adapter_config.json",
    "adapter_model.safetensors",
    "uie_config.json",
    "results.json",
    "README.md",
]


@dataclass
class DataArguments:
    """What is learned and what is asked afterwards."""

    train_data: list[str] = field(
        default_factory=list, metadata={"help": "JSONL files or Hub data sets to train on."}
    )
    eval_data: list[str] = field(
        default_factory=list,
        metadata={"help": "JSONL files or Hub data sets to score by generation afterwards."},
    )
    max_train_documents: int | None = field(
        default=None, metadata={"help": "At most this many per data set."}
    )
    max_eval_documents: int | None = field(
        default=None, metadata={"help": "At most this many per data set."}
    )
    prompt_style: Literal["dataclass", "compact"] = field(
        default="dataclass",
        metadata={"help": "'dataclass' is the paper's; 'compact' takes about half the tokens."},
    )
    occurrences: bool = field(
        default=True,
        metadata={"help": "Number repeated mentions in answers, so that every offset can be told."},
    )
    shuffle_labels: bool = field(
        default=True, metadata={"help": "Show the labels of a schema in random order."}
    )
    label_dropout: float = field(
        default=0.0, metadata={"help": "Leave each label out with this probability."}
    )
    mask_labels: float = field(
        default=0.0, metadata={"help": "Hide label names with this probability."}
    )
    max_new_tokens: int = field(default=256, metadata={"help": "The longest answer when scoring."})
    eval_batch_size: int = field(
        default=8, metadata={"help": "Prompts per generation when scoring."}
    )
    score_before: bool = field(default=False, metadata={"help": "Also score before training."})


@dataclass
class TaskMoEArguments:
    """The adapter and its task encoder; the fields of `TaskMoELoraConfig` and `TaskEncoder`."""

    task_encoder: str = field(
        default="Salesforce/codet5-base", metadata={"help": "Hub id or folder of the encoder."}
    )
    task_text: Literal["prompt", "schema"] = field(
        default="prompt",
        metadata={"help": "The encoder reads the whole prompt, or only its schema."},
    )
    num_experts: int = field(default=8, metadata={"help": "Experts per adapted layer."})
    expert_r: int = field(default=4, metadata={"help": "Rank of each expert."})
    expert_alpha: float = field(
        default=32.0, metadata={"help": "Experts are scaled by expert_alpha / expert_r."}
    )
    expert_dropout: float = field(default=0.05, metadata={"help": "Dropout on the experts' input."})
    router_inputs: Literal["token+task", "token", "task"] = field(
        default="token+task", metadata={"help": "What the router reads."}
    )
    task_norm: Literal["matched", "rms", "none"] = field(
        default="matched", metadata={"help": "Scale of the task vector."}
    )
    top_k: int | None = field(
        default=None, metadata={"help": "Keep only this many gates of a token."}
    )
    router_balance_coef: float = field(
        default=0.0, metadata={"help": "Weight of the load-balancing loss."}
    )


def score_by_generation(
    trainer: SFTTrainer, data: dict[str, list[Document]], format: PromptFormat, args: DataArguments
) -> ScoreReport:
    """Ask the model about every document and compare with the gold records."""
    extractor = Extractor(
        trainer.accelerator.unwrap_model(trainer.model),
        trainer.processing_class,
        format=format,
        batch_size=args.eval_batch_size,
        max_new_tokens=args.max_new_tokens,
    )
    answers = {}
    for name, documents in data.items():
        found = extractor.documents(documents)
        answers[name] = {
            i: one.answers[0].parsed if len(one.answers) == 1 else one for i, one in found.items()
        }
    return score(data, answers)


def write_card(
    folder: Path, model_name: str, encoder: TaskEncoder, results: dict[str, Any], table: str
) -> None:
    """The model card: base, encoder, how to load (with the import), data, scores."""
    config = results["adapter"]
    content = f"""---
{ModelCardData(base_model=model_name, library_name="peft", tags=["peft_taskmoe", "information-extraction", "lora"]).to_yaml()}
---

# Task-Aware MoELoRA adapter for information extraction

{config["num_experts"]} experts of rank {config["r"]} on every linear layer of `{model_name}`, routed by
`{config["router_inputs"]}`. The task embedding comes from the frozen encoder `{encoder.config.name_or_path}`
(`text="{encoder.config.text}"`).

## Load it

```python
import peft_taskmoe  # registers the method: without it, PEFT stops with KeyError: 'TASKMOE_LORA'
from peft_taskmoe.uie import Extractor

extractor = Extractor.from_pretrained("{results["repository"]}")
extractor("Ariane 5 lifted off from Kourou.", {{"Launcher": "a vehicle that carries payloads to space"}})
```

or, for the model itself:

```python
from peft import PeftModel
from peft_taskmoe import attach_task_encoder
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{model_name}"), "{results["repository"]}")
attach_task_encoder(model)
```

## Data

Trained on {", ".join(f"{name} ({count} documents)" for name, count in results["train_documents"].items())}.

## Scores

{table}

Made with peft_taskmoe {peft_taskmoe.__version__}, seed {results["seed"]}.
"""
    ModelCard(content).save(folder / "README.md")


def main(
    data_args: DataArguments,
    moe_args: TaskMoEArguments,
    training_args: SFTConfig,
    model_args: ModelConfig,
) -> None:
    """Train, score, save, and push if asked."""
    console = Console()
    if not data_args.train_data:
        raise SystemExit(
            "There is nothing to train on. Pass `--train_data file.jsonl ...`, or `--config examples/demo.yaml`."
        )
    set_seed(training_args.seed)
    start = time.perf_counter()
    output = Path(training_args.output_dir)
    format = PromptFormat(style=data_args.prompt_style, occurrences=data_args.occurrences)
    train = read_datasets(
        data_args.train_data,
        split="train",
        limit=data_args.max_train_documents,
        seed=training_args.seed,
    )
    evaluation = read_datasets(
        data_args.eval_data,
        split="test",
        limit=data_args.max_eval_documents,
        seed=training_args.seed,
    )
    regularisers = Regularisers(
        shuffle=data_args.shuffle_labels,
        dropout=data_args.label_dropout,
        mask=data_args.mask_labels,
    )
    examples = to_prompt_completion(
        mix(train, seed=training_args.seed),
        format=format,
        regularisers=regularisers,
        seed=training_args.seed,
    ).select_columns(["prompt", "completion"])

    encoder = TaskEncoder(moe_args.task_encoder, text=moe_args.task_text)
    config = TaskMoELoraConfig(
        task_type="CAUSAL_LM",
        num_experts=moe_args.num_experts,
        r=moe_args.expert_r,
        lora_alpha=moe_args.expert_alpha,
        lora_dropout=moe_args.expert_dropout,
        router_inputs=moe_args.router_inputs,
        task_norm=moe_args.task_norm,
        top_k=moe_args.top_k,
        router_aux_loss_coef=moe_args.router_balance_coef,
        task_dim=encoder.task_dim,
        task_encoder=encoder.config,
    )
    # Pushed once, below, with the card and the scores.
    push, training_args.push_to_hub = training_args.push_to_hub, False
    training_args.model_init_kwargs = {
        **(training_args.model_init_kwargs or {}),
        "revision": model_args.model_revision,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
    }
    trainer = SFTTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=examples,
        peft_config=config,
        quantization_config=get_quantization_config(model_args),
    )
    attach_task_encoder(
        trainer.model, encoder.to(trainer.accelerator.device), trainer.processing_class
    )
    trainer.model.print_trainable_parameters()

    last = get_last_checkpoint(str(output)) if output.is_dir() else None
    before = None
    if data_args.score_before and last is None:
        console.rule("Before training")
        before = score_by_generation(trainer, evaluation, format, data_args)
    if last is not None:
        console.print(f"Going on from the checkpoint {last}.")
    console.rule("Training")
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint or last)
    trainer.save_model(str(output))
    if not trainer.accelerator.is_main_process:
        return
    save_format(format, output)

    results: dict[str, Any] = {
        "repository": training_args.hub_model_id or str(output),
        "base_model": model_args.model_name_or_path,
        "adapter": {k: v for k, v in config.to_dict().items() if k != "target_modules"},
        "prompt_format": asdict(format),
        "seed": training_args.seed,
        "train_documents": {name: len(documents) for name, documents in train.items()},
        "versions": {"peft_taskmoe": peft_taskmoe.__version__, "torch": torch.__version__},
        "loss": [
            entry for entry in trainer.state.log_history if "loss" in entry or "train_loss" in entry
        ],
    }
    table = "Not scored: no `--eval_data` was given."
    if evaluation:
        console.rule("After training")
        after = score_by_generation(trainer, evaluation, format, data_args)
        results["scores"] = after.to_dict()
        results["scores_before"] = None if before is None else before.to_dict()
        console.print(
            after.table() if before is None else before_and_after(evaluation, before, after)
        )
        table = after.to_markdown()
        for line in in_plain_words(evaluation, before, after):
            console.print(line)
    results["seconds"] = round(time.perf_counter() - start, 1)
    (output / "results.json").write_text(
        json.dumps(results, indent=2, ensure_ascii=False, default=str) + "\n"
    )
    write_card(output, model_args.model_name_or_path, encoder, results, table)
    console.print(
        f"The adapter, its card and results.json are in {output} ({results['seconds']:.0f} s in all)."
    )
    if push:
        repository = training_args.hub_model_id or output.name
        api = HfApi(token=training_args.hub_token)
        repository = api.create_repo(
            repository, private=training_args.hub_private_repo, exist_ok=True
        ).repo_id
        results["repository"] = repository
        write_card(output, model_args.model_name_or_path, encoder, results, table)
        commit = api.upload_folder(
            repo_id=repository, folder_path=output, allow_patterns=ADAPTER_FILES
        )
        console.print(f"Pushed to {commit.commit_url}.")


def before_and_after(
    evaluation: dict[str, list[Document]], before: ScoreReport, after: ScoreReport
) -> Table:
    """F1 by data set and task, before and after."""
    table = Table(title="Strict micro F1")
    for column in ("data set", "task", "before", "after"):
        table.add_column(column, justify="left" if column in ("data set", "task") else "right")
    for name in evaluation:
        reports = before.select([name]), after.select([name])
        for group in reports[1].groups():
            if group == "all" or "+" not in group:
                figures = [f"{100 * report.average_f1(group):.1f}" for report in reports]
                table.add_row(name, "mean" if group == "all" else group, *figures)
    return table


def in_plain_words(
    evaluation: dict[str, list[Document]], before: ScoreReport | None, after: ScoreReport
) -> list[str]:
    """What the figures say, data set by data set."""
    lines = []
    for name, documents in evaluation.items():
        f1 = 100 * after.select([name]).average_f1()
        line = f"{name}: mean F1 {f1:.1f} on {len(documents)} documents"
        if before is not None:
            earlier = 100 * before.select([name]).average_f1()
            verdict = "it learned this" if f1 > earlier + 5 else "little or nothing was gained"
            line += f", {earlier:.1f} before training: {verdict}"
        lines.append(line + ".")
    return lines


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    if len(sys.argv) == 1:
        print(__doc__)
        raise SystemExit(2)
    parser = TrlParser((DataArguments, TaskMoEArguments, SFTConfig, ModelConfig))
    main(*parser.parse_args_and_config())
