"""Pictures of the gates: by layer, by task, along a text and over training.

All are matplotlib `Figure`s, which a notebook shows by itself: `heat_map(record).savefig("a.png")`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from .figures import new_figure
from .inspection import GateRecord, Measure, gates_by_token
from .optional import needed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

# Okabe and Ito's colours, which people with colour blindness can tell apart.
_COLOURS = (
    *("#0072b2", "#d55e00", "#009e73", "#cc79a7"),
    *("#e69f00", "#56b4e9", "#6a51a3", "#000000"),
)
_SCREEN = (16.0, 9.0)  # inches
_TOKENS_PER_LINE = 48
_MAX_NUMBERED = 12  # tasks whose similarities are written into the cells
_CLIPPED_AT = 98  # percentile
_PLAIN = {"parse_math": False}  # a name may hold dollars


def heat_map(
    record: GateRecord, tasks: Sequence[str] | None = None, adapter: str | None = None
) -> Figure:
    """Draw the mean gates: a panel per task, a row per block, a group of columns per kind of layer.

    Each group has a column per expert. Colours show the difference from equal use, `1 / E`; they
    end at the 98th percentile of the differences.

    Args:
        record: What `record_gates` yielded.
        tasks: Which tasks; None for all.
        adapter: Which adapter, if several were recorded.
    """
    names = record.tasks(adapter) if tasks is None else list(tasks)
    gates = {name: record.mean_gates(name, adapter) for name in names}
    return gate_panels(record.layers(adapter), gates)


def gate_panels(layers: Sequence[str], by_task: Mapping[str, torch.Tensor]) -> Figure:
    """Draw mean gates as `heat_map` does, wherever they come from, such as `TaskCentroids`.

    Args:
        layers: Names of the layers.
        by_task: For each task its mean gates, `(layers, e)`.
    """
    names, gates = list(by_task), [gates.numpy() for gates in by_task.values()]
    blocks, kinds, cells = _grid(layers)
    experts = gates[0].shape[1]
    width, height = 1.0 + 0.14 * experts * len(kinds), 1.2 + 0.22 * len(blocks)
    columns = min(len(names), max(1, round(math.sqrt(len(names) * 1.6 * height / width))))
    rows = math.ceil(len(names) / columns)
    size = (min(_SCREEN[0], 1.5 + columns * width), min(_SCREEN[1], 0.6 + rows * height))
    figure = new_figure(figsize=(max(4.0, size[0]), max(2.5, size[1])))
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    spread = _spread(np.stack(gates) - 1 / experts)
    wide = (figure.get_figwidth() - 1.5) / columns / len(kinds) > 0.09 * max(map(len, kinds))
    turned = 0 if wide else 45
    for ax, name, values in zip(panels.flat, names, gates, strict=False):
        drawn = np.full((len(blocks), len(kinds), experts), np.nan)
        for (block, kind), of_layer in zip(cells, values, strict=True):
            drawn[block, kind] = of_layer
        image = _differences(ax, drawn.reshape(len(blocks), -1), experts, spread)
        ax.set_title(name, fontsize=10, **_PLAIN)
        for edge in range(1, len(kinds)):
            ax.axvline(edge * experts - 0.5, color="black", linewidth=0.8)
        step = 1 + (len(blocks) - 1) // 16
        ax.set_yticks(range(0, len(blocks), step), labels=blocks[::step], fontsize=8)
        middles = [(i + 0.5) * experts - 0.5 for i in range(len(kinds))]
        ax.set_xticks(middles, labels=kinds, fontsize=8, rotation=turned)
    for ax in panels.flat[len(names) :]:
        ax.set_axis_off()
    figure.supxlabel(f"kind of layer, each with its experts 0 to {experts - 1}", fontsize=9)
    for ax in panels[:, 0]:
        ax.set_ylabel("block", fontsize=9)
    _bar(figure, image, panels, f"mean gate (equal use: 1/E = {1 / experts:.3g})")
    return figure


def _grid(layers: Sequence[str]) -> tuple[list[str], list[str], list[tuple[int, int]]]:
    """Names of blocks and of kinds of layers, and the block and kind of each layer."""
    parts = [re.fullmatch(r"(.*?)\.?\b(\d+)\.(.+)", layer) for layer in layers]
    found = [((p[1], p[2]), p[3]) if p else (("", "none"), layer)
             for p, layer in zip(parts, layers, strict=True)]  # fmt: skip
    blocks, kinds = (list(dict.fromkeys(one)) for one in zip(*found, strict=True))
    several = len({stack for stack, _ in blocks if stack}) > 1
    shown = [f"{stack} {number}".strip() if several else number for stack, number in blocks]
    last = [kind.rpartition(".")[2] for kind in kinds]
    short = [one if last.count(one) == 1 else kind for one, kind in zip(last, kinds, strict=True)]
    return shown, short, [(blocks.index(block), kinds.index(kind)) for block, kind in found]


def similarity_map(
    record: GateRecord, measure: Measure = "cosine", adapter: str | None = None
) -> Figure:
    """Draw how alike the tasks use the experts, clustered by average linkage with a dendrogram.

    Args:
        record: What `record_gates` yielded.
        measure: See `GateRecord.similarity`.
        adapter: Which adapter, if several were recorded.

    Raises:
        ValueError: If fewer than two tasks were recorded.
    """
    similarity = record.similarity(measure, adapter)
    names = list(similarity)
    if len(names) < 2:
        raise ValueError(f"Only {names} was recorded. Record two tasks or more to compare them.")
    figure = new_figure(figsize=(5.5 + 0.35 * len(names), 3.0 + 0.3 * len(names)))
    hierarchy = needed("scipy.cluster.hierarchy", "plot")
    squareform = needed("scipy.spatial.distance", "plot").squareform
    values = np.array([[similarity[a][b] for b in names] for a in names])
    distances = squareform(np.clip(1 - (values + values.T) / 2, 1e-9, None), checks=False)
    tree = hierarchy.linkage(distances, "average", optimal_ordering=True)
    left, ax = figure.subplots(1, 2, width_ratios=(1, 3))
    shown = hierarchy.dendrogram(
        tree, orientation="left", ax=left, color_threshold=0, above_threshold_color="black"
    )
    order = shown["leaves"][::-1]  # a matrix has its first row on top
    furthest = max(tree[-1, 2], 1e-4)  # equal tasks have a scale as well
    left.set(xlabel="1 - similarity", yticks=[], xlim=(1.05 * furthest, 0))
    left.spines[["top", "right", "left"]].set_visible(False)
    apart = values[~np.eye(len(names), dtype=bool)]
    values = np.where(np.eye(len(names), dtype=bool), np.nan, values)[np.ix_(order, order)]
    ax.set_facecolor("0.85")  # a task and itself
    image = ax.imshow(values, cmap="cividis", vmin=apart.min(), vmax=apart.max(), aspect="auto")
    labels = [names[i] for i in order]
    ax.set_xticks(range(len(names)), labels=labels, rotation=45, ha="right", **_PLAIN)
    ax.set_yticks(range(len(names)), labels=labels, **_PLAIN)
    ax.yaxis.tick_right()
    if len(names) <= _MAX_NUMBERED:
        middle = (apart.min() + apart.max()) / 2
        for (i, j), value in np.ndenumerate(values):
            ink = "white" if value < middle else "black"
            words = "1" if i == j else f"{value:.3f}"
            ax.text(j, i, words, ha="center", va="center", fontsize=7, color=ink)
    _bar(figure, image, np.array([ax]), f"similarity of the mean gates ({measure})", "neither")
    return figure


def token_gates(
    model: nn.Module,
    prompt: str,
    tokenizer: Any = None,
    layer: str | None = None,
    adapter: str | None = None,
) -> Figure:
    """Draw the gates along a prompt, token by token, a row per expert.

    Args:
        model: A causal language model with a Task-Aware MoELoRA adapter.
        prompt: The prompt.
        tokenizer: See `gates_by_token`.
        layer: Name of a layer; None for the mean over all layers.
        adapter: Which adapter, if several are active.

    Raises:
        ValueError: If there is no such layer.
    """
    tokens, by_layer = gates_by_token(model, prompt, tokenizer, adapter)
    if layer is not None and layer not in by_layer:
        raise ValueError(f"`layer` must be one of {[*by_layer]}, got {layer!r}.")
    chosen = torch.stack([*by_layer.values()]).mean(0) if layer is None else by_layer[layer]
    values = chosen.numpy().T
    experts, lines = len(values), math.ceil(len(tokens) / _TOKENS_PER_LINE)
    longest = max(map(len, map(_visible, tokens)))
    height = 0.5 + 0.13 * experts + 0.075 * longest
    figure = new_figure(figsize=(13.0, 0.8 + lines * height))
    panels = figure.subplots(lines, 1, squeeze=False)
    spread = _spread(values - 1 / experts)
    for line, ax in enumerate(panels.flat):
        part = slice(line * _TOKENS_PER_LINE, (line + 1) * _TOKENS_PER_LINE)
        image = _differences(ax, values[:, part], experts, spread)
        words = [_visible(token) for token in tokens[part]]
        ax.set_xticks(range(len(words)), labels=words, rotation=90, fontsize=8, **_PLAIN)
        ax.set_xlim(-0.5, min(_TOKENS_PER_LINE, len(tokens)) - 0.5)
        ax.set_yticks(range(experts), labels=range(experts), fontsize=7)
    where = "mean over layers" if layer is None else layer
    figure.supylabel("expert", fontsize=9)
    figure.supxlabel(f"token of the prompt ({where})", fontsize=9)
    _bar(figure, image, panels, f"gate (equal use: 1/E = {1 / experts:.3g})")
    return figure


def load_plot(log_history: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw the load of the experts over training, and what the gates depend on.

    Args:
        log_history: `trainer.state.log_history` of a trainer with `log_routing`.

    Raises:
        ValueError: If no entry has a load.
    """
    entries = [entry for entry in log_history if "expert_load_0" in entry]
    if not entries:
        raise ValueError(
            f"None of the {len(log_history)} entries has an expert's load. Train with "
            "`log_routing(trainer)`."
        )
    steps = [entry["step"] for entry in entries]
    experts = sum(name.startswith("expert_load_") for name in entries[0])
    figure = new_figure(figsize=(8.0, 5.5))
    loads, shares = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    for i in range(experts):
        style = ("o-", "s--", "^:", "d-.")[i // len(_COLOURS) % 4]
        load = [entry.get(f"expert_load_{i}", math.nan) for entry in entries]
        loads.plot(steps, load, style, color=_colour(i), label=f"{i}", markersize=3)
    loads.axhline(1 / experts, color="gray", linestyle=":", label="1/E")
    loads.set(ylabel="load (mean gate)", ylim=(0, None))
    loads.legend(title="expert", loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
    for i, (name, words) in enumerate(
        {"gate_entropy": "entropy / ln E", "task_share": "task's share of variance"}.items()
    ):
        value = [entry.get(name, math.nan) for entry in entries]
        shares.plot(steps, value, ("o-", "s--")[i], color=_colour(i), label=words, markersize=3)
    shares.set(xlabel="optimizer step", ylabel="share of 1", ylim=(0, 1.05))
    shares.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
    return figure


def _colour(i: int) -> str:
    return _COLOURS[i % len(_COLOURS)]


def _spread(differences: NDArray[np.floating]) -> float:
    """How far from `1 / E` the colours go."""
    return max(float(np.percentile(np.abs(differences), _CLIPPED_AT)), 1e-6)


def _differences(ax: Axes, gates: NDArray[Any], experts: int, spread: float) -> AxesImage:
    ax.set_facecolor("0.85")  # where there is no layer
    return ax.imshow(
        gates,
        cmap="RdBu_r",
        vmin=1 / experts - spread,
        vmax=1 / experts + spread,
        aspect="auto",
        interpolation="nearest",
    )


def _bar(
    figure: Figure, image: AxesImage, panels: NDArray[Any], words: str, extend: str = "both"
) -> None:
    bar = figure.colorbar(image, ax=list(panels.flat), aspect=40, pad=0.02, extend=extend)
    bar.set_label(words, fontsize=9)
    bar.ax.tick_params(labelsize=8)


def _visible(token: str) -> str:
    return token.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣") or "∅"
