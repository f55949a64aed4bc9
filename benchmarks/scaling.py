"""Shows how the cost grows with experts, rank, batch, sequence, layers and packed documents.

    python benchmarks/scaling.py --plot docs/scaling.png

One thing is varied at a time around 8 experts of rank 4, 4 x 256 tokens, 4 layers. Timed in
interleaved rounds: the frozen model, LoRA of the same rank (E r), ours. Beside the time that each
adds to the frozen model stands the share of operations, counted by hand.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from methods import LINEARS, TASK_DIM, build
from rich.console import Console
from rich.table import Table
from timing import interleaved, train_step
from torch import nn

AXES: dict[str, list[int]] = {
    "experts": [1, 2, 4, 8, 16, 32, 64],
    "rank": [1, 2, 4, 8, 16, 32],
    "batch": [1, 2, 4, 8],
    "length": [32, 64, 128, 256, 512, 1024],
    "layers": [1, 2, 4, 8],
    "documents in a row": [1, 2, 4, 8, 16],
}
SHAPES = dict(
    zip(
        LINEARS,
        [(576, 576), (576, 192), (576, 192), (576, 576), (576, 1536), (576, 1536), (1536, 576)],
        strict=True,
    )
)


def adapter_operations(num_experts: int, r: int) -> int:
    """Multiply-adds per token of a train step, all seven linears of a layer (in d, out o, R = E r).

    Forward: A d R, router d E, B R o. Backward: dy B and dB, o R each; dA and dz A, d R each; the
    router's two, d E each. The task's part of the router, a product per document, is left out.
    """
    return sum(3 * num_experts * r * (d + o) + 3 * num_experts * d for d, o in SHAPES.values())


def frozen_operations(length: int) -> int:
    """Multiply-adds per token of a frozen layer's train step, attention included.

    Attention reads half of the row on average: 2 x 576 x length / 2 forward, twice that backward.
    """
    return sum(2 * d * o for d, o in SHAPES.values()) + 3 * 576 * length


def kept_bytes(num_experts: int) -> dict[str, int]:
    """Bytes per token that a layer's adapters keep for backward in float32, at dropout 0.05.

    An input is kept once for the linears that read it; gates and mask, 8 bytes for each dropped
    feature, stand for every linear.
    """
    return {
        "inputs": 4 * (576 + 576 + 576 + 1536),
        "gates": 7 * 4 * num_experts,
        "mask": round(0.05 * 8 * sum(d for d, _ in SHAPES.values())),
    }


class Packed(nn.Module):
    """A model called with rows of several documents, each with its own positions and task."""

    def __init__(self, model: nn.Module, positions: torch.Tensor) -> None:
        super().__init__()
        self.model, self.positions = model, positions

    def forward(self, **call: torch.Tensor) -> torch.Tensor:
        """Call with the positions."""
        return self.model(position_ids=self.positions, **call)


def measure(axis: str, value: int, args: argparse.Namespace) -> dict[str, float]:
    """Time one point: median ratios to the frozen model and to LoRA of the same rank."""
    now = copy.copy(args)
    experts, r = (value if axis == "experts" else 8), (value if axis == "rank" else 4)
    for name in ("batch", "length", "layers"):
        setattr(now, name, value if axis == name else getattr(args, name))
    documents = value if axis == "documents in a row" else 1
    task = torch.randn(now.batch * documents, TASK_DIM)
    names = ["frozen base", f"LoRA-{experts * r}", f"ours {experts}x{r}"]
    methods = [build(name, now, task, args.dropout) for name in names]
    embeds = torch.randn(now.batch, now.length, 576)
    labels = torch.randint(0, now.vocab, (now.batch, now.length))
    for method in methods:
        method.model.train()
        if axis == "documents in a row":
            positions = torch.arange(now.length) % (now.length // documents)
            method.model = Packed(method.model, positions.expand(now.batch, -1))
    seconds = interleaved(
        methods, lambda method: train_step(method, embeds, labels), args.rounds, "cpu"
    )
    base, lora, ours = (seconds[name] for name in names)
    median = statistics.median
    return {
        "counted": adapter_operations(experts, r) / frozen_operations(now.length // documents),
        "added": median(o / b for o, b in zip(ours, base, strict=True)) - 1,
        "lora_added": median(x / b for x, b in zip(lora, base, strict=True)) - 1,
        "ratio": median(o / x for o, x in zip(ours, lora, strict=True)),
        "seconds": median(ours),
    }


def tabulate(axis: str, args: argparse.Namespace) -> dict[int, dict[str, float]]:
    """Measure all points of an axis and print them."""
    table = Table(title=f"train step by {axis}, float32, dropout {args.dropout}")
    counted = ("operations added (counted)", "time added", "LoRA's time added")
    for column in (axis, *counted, "ours / LoRA of rank E r", "ms"):
        table.add_column(column, justify="right")
    found = {}
    for value in AXES[axis]:
        point = found[value] = measure(axis, value, args)
        shown = [f"{100 * point[name]:.1f} %" for name in ("counted", "added", "lora_added")]
        table.add_row(str(value), *shown, f"{point['ratio']:.3f}", f"{1e3 * point['seconds']:.0f}")
    Console().print(table)
    return found


def draw(found: dict[str, dict[int, dict[str, float]]], path: Path) -> None:
    """Plot what is added to the frozen model along each axis."""
    columns = (len(found) + 1) // 2
    size = (4 * columns, 6)
    figure, plots = plt.subplots(2, columns, figsize=size, layout="constrained", squeeze=False)
    lines = (("added", "ours", "o-"), ("lora_added", "LoRA, same rank", "s-"))
    for (axis, points), plot in zip(found.items(), plots.flat, strict=False):
        for name, label, style in (*lines, ("counted", "operations, counted", "k--")):
            values = [100 * point[name] for point in points.values()]
            plot.plot(list(points), values, style, label=label)
        plot.set_xscale("log", base=2)
        plot.set_xlabel(axis)
        plot.set_ylabel("added to the frozen model, %")
    plots.flat[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measure, print and plot."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    sizes = {"batch": 4, "length": 256, "layers": 4, "rounds": 7, "threads": 2, "vocab": 1024}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--axes", nargs="+", choices=list(AXES), default=list(AXES))
    parser.add_argument("--plot", type=Path, help="write the plot here")
    parser.add_argument("--output", type=Path, help="write the figures here as JSON")
    args = parser.parse_args()
    args.device, args.dtype, args.autocast = "cpu", "float32", False
    torch.set_num_threads(args.threads)
    found = {axis: tabulate(axis, args) for axis in args.axes}
    print(f"Bytes per token and layer kept for backward, counted, 8 experts: {kept_bytes(8)}")
    if args.output is not None:
        args.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if args.plot is not None:
        draw(found, args.plot)


if __name__ == "__main__":
    main()
