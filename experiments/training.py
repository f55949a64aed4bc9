"""Trains the adapter of one run with TRL, from its last checkpoint where there is one."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from answer_head import AnswerTrainer
from configurations import Run
from datasets import Dataset
from documents import Data, count_schemas, training_examples
from files import versions, write_json
from settings import ExperimentArguments
from transformers import AutoModelForCausalLM, TrainerCallback, set_seed
from trl import SFTConfig, SFTTrainer

from peft_taskmoe import TaskCollator, TaskEncoder
from peft_taskmoe.checkpoints import newest_whole_checkpoint
from peft_taskmoe.uie import save_format


def train(
    run: Run,
    args: ExperimentArguments,
    sft: SFTConfig,
    data: Data,
    encoder: TaskEncoder | None,
    tokenizer: Any,
    folder: Path,
) -> dict[str, Any]:
    """Train the run's adapter and save it in `folder/adapter`.

    Returns:
        What the training was: sizes, times, losses, versions.

    Raises:
        ValueError: If an example is longer than `max_length`: its answer would be cut.
    """
    documents = data.training_documents(args, run.seed)
    text = "prompt" if encoder is None else encoder.config.text
    examples = training_examples(documents, args, sft, run.seed, text)
    tokens = [len(tokenizer(row["prompt"] + row["completion"]).input_ids) + 1 for row in examples]
    check_length(tokens, sft.max_length)
    clock = StepClock(folder / "steps.json")
    trainer = trainer_of(run, args, sft, examples, encoder, tokenizer, folder / "checkpoints")
    trainer.add_callback(clock)
    checkpoint, _ = newest_whole_checkpoint(folder / "checkpoints")
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    trainer.save_model(str(folder / "adapter"))
    PartialState().wait_for_everyone()  # until the main process has written it
    if PartialState().is_main_process:  # so that `Extractor.from_pretrained` asks as in training
        save_format(args.format, folder / "adapter")
    trainable, total = trainer.model.get_nb_trainable_parameters()
    seconds = sum(clock.seconds.values())
    adapter = json.loads((folder / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    for place_on_this_machine in ("base_model_name_or_path", "task_encoder"):
        adapter.pop(place_on_this_machine, None)
    history = trainer.state.log_history
    return {
        "documents": {name: len(found) for name, found in documents.items()},
        "schemas": count_schemas(documents),
        "examples": len(examples),
        "tokens": sum(tokens),
        "steps": trainer.state.global_step,
        "trainable_parameters": trainable,
        "all_parameters": total,
        "seconds": seconds,
        "tokens_per_second": sum(tokens) / seconds,
        "adapter": adapter,
        "versions": versions(),
        "loss": [[entry["step"], entry["loss"]] for entry in history if "loss" in entry],
    }


def trainer_of(
    run: Run,
    args: ExperimentArguments,
    sft: SFTConfig,
    examples: Dataset,
    encoder: TaskEncoder | None,
    tokenizer: Any,
    checkpoints: Path,
) -> SFTTrainer:
    """The trainer of a run's adapter on examples whose order is given."""
    columns = ["prompt", "completion"]
    if encoder is not None:
        examples = encoder.encode_dataset(examples)
        columns.append("task_embeds")
    config = copy.copy(sft)
    config.output_dir = str(checkpoints)
    config.learning_rate, config.seed = run.learning_rate, run.seed
    config.num_train_epochs = 1
    config.train_sampling_strategy = "sequential"
    config.remove_unused_columns = False
    set_seed(run.seed)
    trainer = (AnswerTrainer if args.answer_head else SFTTrainer)(
        model=AutoModelForCausalLM.from_pretrained(args.model_name_or_path, dtype=args.dtype),
        args=config,
        train_dataset=examples.select_columns(columns),
        processing_class=tokenizer,
        peft_config=run.configuration.peft_config(None if encoder is None else encoder.task_dim),
    )
    if run.configuration.router_init_scale != 1:
        scale_routers(trainer.model, run.configuration.router_init_scale)
    if run.configuration.router_lr_ratio != 1:
        scale_router_rate(trainer, run.configuration.router_lr_ratio)
    if encoder is not None:
        trainer.data_collator = TaskCollator(trainer.data_collator, task_dim=encoder.task_dim)
    return trainer


def check_length(tokens: Sequence[int], max_length: int | None) -> None:
    """Refuse examples whose answers would be cut, which teaches to stop early.

    Raises:
        ValueError: Saying how many are too long.
    """
    if max_length is not None and max(tokens) > max_length:
        raise ValueError(
            f"{sum(n > max_length for n in tokens)} of {len(tokens)} training examples are longer "
            f"than `max_length={max_length}` tokens (the longest has {max(tokens)}). "
            "Raise `max_length`, or take the compact `prompt_style`."
        )


class StepClock(TrainerCallback):
    """Keeps how long every step took, in a file that is written with every checkpoint."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds: dict[str, float] = (
            json.loads(path.read_text("utf-8")) if path.is_file() else {}
        )
        self.start = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self.start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the step's seconds."""
        self.seconds[str(state.global_step)] = time.perf_counter() - self.start

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the file."""
        if state.is_world_process_zero:
            write_json(self.path, self.seconds)


def scale_routers(model: torch.nn.Module, factor: float) -> None:
    """Multiply the routers' weights by a factor."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "taskmoe_lora_router" in name:
                weight.mul_(factor)


def scale_router_rate(trainer: SFTTrainer, ratio: float) -> None:
    """Train the routers at `ratio` times the learning rate of the rest, in groups of their own."""
    create = trainer.create_optimizer

    def create_optimizer(*args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer = create(*args, **kwargs)
        routers = {
            id(weight)
            for name, weight in trainer.model.named_parameters()
            if "taskmoe_lora_router" in name
        }
        for group in list(optimizer.param_groups):
            own = [weight for weight in group["params"] if id(weight) in routers]
            group["params"] = [weight for weight in group["params"] if id(weight) not in routers]
            if own:
                optimizer.add_param_group({**group, "params": own, "lr": group["lr"] * ratio})
        return optimizer

    trainer.create_optimizer = create_optimizer
