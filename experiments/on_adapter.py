"""What the experiments on trained adapters share: arguments, loading, routers, tables."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from statistics import fmean
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from comparing import compare_losses
from formats import interval
from measuring import Measure
from outcomes import Losses, per_token
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from rich.console import Console
from torch import nn

from peft_taskmoe import TaskEncoder
from peft_taskmoe.uie import Extractor
from peft_taskmoe.uie.tables import Table

ROUTER = ".taskmoe_lora_router."


def parser(description: str | None, *, limit: int) -> argparse.ArgumentParser:
    """The arguments that all of them have.

    Args:
        description: What the script's help says.
        limit: Default number of documents of each file.
    """
    found = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--adapter", required=True, help="folder or Hub id")
    found.add_argument("--base", help="base model; default: the one that the adapter names")
    found.add_argument("--files", nargs="+", required=True, help="JSONL documents or Hub data sets")
    found.add_argument("--limit", type=int, default=limit, help="documents of each file")
    found.add_argument("--batch-size", type=int, default=8)
    found.add_argument("--device", default="cpu")
    found.add_argument("--threads", type=int, default=1)
    return found


def load(args: argparse.Namespace, adapter: str | None = None) -> Measure:
    """What measures an adapter (default: `--adapter`), with the prompts it was trained with."""
    torch.set_num_threads(args.threads)
    adapter = adapter or args.adapter
    config: Any = PeftConfig.from_pretrained(adapter)
    reads_task = getattr(config, "router_inputs", "token") != "token"
    encoder = TaskEncoder.from_config(config.task_encoder) if reads_task else None
    extractor = Extractor.from_pretrained(adapter, base_model=args.base, encoder=encoder)
    extractor.model.to(args.device)
    settings: Any = SimpleNamespace(format=extractor.format, likelihood_batch_size=args.batch_size)
    return Measure(extractor.model, extractor.tokenizer, encoder, settings)


class Router(NamedTuple):
    """A layer's router.

    Attributes:
        layer: The adapted layer.
        weight: `(experts, token_features + task_dim)`.
        token_features: Number of columns that read the hidden state.
    """

    layer: nn.Module
    weight: torch.Tensor
    token_features: int


def routers(model: Any) -> dict[str, Router]:
    """The routers of an adapter, by the layer's name."""
    config = model.active_peft_config
    task_dim = 0 if config.router_inputs == "token" else config.task_dim
    return {
        (name := key.partition(ROUTER)[0]): Router(
            model.get_submodule(name), weight.data, weight.shape[1] - task_dim
        )
        for key, weight in model.named_parameters()
        if ROUTER in key
    }


def scale_layers(model: nn.Module, scale: float) -> None:
    """Multiply the update of the adapter, as it was trained, by `scale`."""
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.unscale_layer()
            layer.scale_layer(scale)


def mean(losses: Losses, without: str | None = None) -> float:
    """Loss per token, mean over data sets; one may be left out."""
    return fmean(per_token(one) for name, one in losses.items() if name != without)


def cells(losses: Losses) -> list[str]:
    """Cells of a table: loss per token of each data set, and their mean."""
    return [f"{one:.4f}" for one in (*map(per_token, losses.values()), mean(losses))]


def difference(a: Losses, b: Losses) -> str:
    """Loss per token of `a` less that of `b`, mean over data sets, with its interval."""
    return interval(compare_losses(a, b)["all"])


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table."""
    Console(width=180).print(Table(title, columns, rows, left=1).to_rich())
