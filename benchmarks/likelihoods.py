"""Likelihoods of gold answers under a trained adapter, as examples/benchmark measures them, and their differences."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer

from peft_taskmoe.uie import Extractor
from peft_taskmoe.uie.extraction.routing import reader_of

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "benchmark"))
from one_run import Measure
from report import Losses, compare_losses, interval, per_token


def measure_of(extractor: Extractor, batch_size: int) -> Measure:
    """What measures an adapter, with the prompts and the task encoder that it was trained with."""
    reader = reader_of(extractor.model)
    settings: Any = SimpleNamespace(format=extractor.format, likelihood_batch_size=batch_size)
    return Measure(
        extractor.model, extractor.tokenizer, None if reader is None else reader.encoder, settings
    )


def scale_layers(model: Any, scale: float) -> None:
    """Multiply the update of the adapter, as it was trained, by `scale`."""
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.unscale_layer()
            layer.scale_layer(scale)


def mean(losses: Losses, without: str | None = None) -> float:
    """Loss per token, mean over data sets; one may be left out."""
    of_sets = [per_token(one) for name, one in losses.items() if name != without]
    return sum(of_sets) / len(of_sets)


def cells(losses: Losses) -> list[str]:
    """Cells of a table: loss per token of each data set, and their mean."""
    return [f"{one:.4f}" for one in (*map(per_token, losses.values()), mean(losses))]


def difference(a: Losses, b: Losses) -> str:
    """Loss per token of `a` less that of `b`, mean over data sets, with its interval by a paired bootstrap over documents."""
    return interval(compare_losses(a, b)["all"])
