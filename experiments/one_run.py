"""Carries one run out: trains an adapter and measures it, stage by stage.

Every stage leaves a file in the run's folder and is skipped where that file is, so a killed run
goes on from its last checkpoint or data set. Under `accelerate launch` every process trains its
share; measuring loads the finished adapter whole in every process, and each takes its share of the
documents, so it needs neither FSDP nor DeepSpeed.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from accelerate import PartialState
from configurations import Run
from documents import Data, swapped
from files import once
from measuring import Measure
from peft import PeftModel
from rich.console import Console
from settings import ExperimentArguments
from training import train
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.integrations import deepspeed
from trl import SFTConfig

from peft_taskmoe import TaskEncoder, attach_task_encoder
from peft_taskmoe.uie import Problem, record_from_dict, score


class Encoders:
    """The task encoders, loaded once for all runs, with their caches."""

    def __init__(self) -> None:
        self._found: dict[Any, TaskEncoder] = {}

    def of(self, run: Run) -> TaskEncoder | None:
        """The encoder of a run's configuration, on this process's device."""
        config = run.configuration.encoder
        if config is None:
            return None
        key = json.dumps(config.to_dict(), sort_keys=True)
        if key not in self._found:
            self._found[key] = TaskEncoder.from_config(config).to(PartialState().device)
        return self._found[key]


def carry_out(
    run: Run,
    args: ExperimentArguments,
    sft: SFTConfig,
    data: Data,
    encoders: Encoders,
    console: Console,
) -> dict[str, Any]:
    """Train and measure, as far as `args.measure` says; what was done before is not done again.

    Returns:
        The run's figures, JSON-ready; the same on every process.
    """
    folder = Path(sft.output_dir) / run.name
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
    encoder = encoders.of(run)
    training = once(
        folder / "training.json", lambda: train(run, args, sft, data, encoder, tokenizer, folder)
    )
    gc.collect()  # the model that was trained
    measure = Measure(
        finished_model(folder / "adapter", args, encoder, tokenizer), tokenizer, encoder, args
    )
    console.print(f"{run.name}: likelihood of the gold answers")
    figures = {"training": training, **likelihoods(measure, data, folder)}
    if args.measure != "all":
        return figures
    if run.configuration.method == "moelora":
        sets = {
            name: documents[: args.gate_documents]
            for name, documents in {**data.dev, **data.zero_shot}.items()
        }
        figures["gates"] = once(folder / "gates.json", lambda: measure.gates(sets))
    console.print(f"{run.name}: answers")
    return {**figures, **answers(measure, data, folder)}


def finished_model(
    adapter: Path, args: ExperimentArguments, encoder: TaskEncoder | None, tokenizer: Any
) -> PeftModel:
    """The trained adapter on its base model, in the base's dtype, as training computed with it."""
    with unsharded():
        base = AutoModelForCausalLM.from_pretrained(args.model_name_or_path, dtype=args.dtype)
    model = PeftModel.from_pretrained(base, str(adapter), autocast_adapter_dtype=False)
    model.eval().to(PartialState().device)
    if encoder is not None:
        attach_task_encoder(model, encoder, tokenizer)
    return model


def likelihoods(measure: Measure, data: Data, folder: Path) -> dict[str, Any]:
    """The likelihoods that `measure` asks for, a file for each part and data set.

    `nll_swapped` is that of the zero-shot sets with the task embeddings of other data sets.
    """
    figures: dict[str, Any] = {}
    parts = {"dev": data.dev, "zero_shot": data.zero_shot, "supervised": data.supervised}
    for part, sets in parts.items():
        figures[f"nll_{part}"] = {
            name: once(
                folder / f"nll_{part}" / f"{name}.json",
                lambda documents=documents: measure.likelihoods(documents),
            )
            for name, documents in sets.items()
        }
        if measure.args.measure == "dev":
            return figures
    swap = measure.encoder is not None and measure.args.swapped_embeddings
    if swap and len(data.zero_shot) > 1:
        other = swapped(data.zero_shot)
        figures["nll_swapped"] = {
            name: once(
                folder / "nll_swapped" / f"{name}.json",
                lambda name=name, documents=documents: measure.likelihoods(
                    documents, [other[name, one.id] for one in documents]
                ),
            )
            for name, documents in data.zero_shot.items()
        }
    return figures


def answers(measure: Measure, data: Data, folder: Path) -> dict[str, Any]:
    """What the model answers about all measured data sets, scored; a file for each data set."""
    found, seconds = {}, {}
    for name, documents in data.measured.items():
        of_set = once(
            folder / "answers" / f"{name}.json",
            lambda documents=documents: measure.answers(documents),
        )
        seconds[name] = of_set["seconds"]
        found[name] = {one.id: restored(of_set["answers"][one.id], one.task) for one in documents}
    scores = score(data.measured, found, seen=measure.args.seen_table())
    identification = score(data.measured, found, identification=True)
    return {
        "scores": scores.to_dict(documents=True),
        "identification": identification.to_dict(documents=True),
        "generation_seconds": seconds,
    }


def restored(answer: dict[str, Any], task: str) -> SimpleNamespace:
    """An extraction as scores read it, from its file."""
    return SimpleNamespace(
        records=[record_from_dict(task, one) for one in answer["records"]],
        problems=[Problem(**one) for one in answer["problems"]],
    )


@contextmanager
def unsharded() -> Iterator[None]:
    """Models loaded inside are whole in every process, also under DeepSpeed's ZeRO-3."""
    found = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = found
