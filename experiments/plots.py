"""Plots of a report: values, gains by data set, gains against similarity of gates."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from answer_tables import nearest
from comparing import Compared, Patterns
from outcomes import Selection, clusters_of
from scipy.stats import spearmanr


def draw(
    chosen: Selection,
    baseline: str,
    compared: Mapping[tuple[str, str], Compared],
    patterns: Patterns,
    folder: Path,
    slug: str,
) -> list[str]:
    """Write the plots of a selection; returns the lines that show them."""
    others = {name: one for (name, other), one in compared.items() if other == baseline}
    figures = {
        "f1": values(chosen, patterns),
        "gain": gains(others, baseline),
        "similarity": similarity(others, baseline),
    }
    lines = []
    for kind, figure in figures.items():
        if figure is not None:
            name = f"{slug}_{kind}.png"
            figure.savefig(folder / name, dpi=110)
            plt.close(figure)
            lines.append(f"![{name}]({name})")
    return [*lines, ""]


def values(chosen: Selection, patterns: Patterns) -> Any:
    """F1 and likelihood of each configuration on the zero-shot sets."""
    figure, (of_f1, of_nll) = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
    for i, runs in enumerate(chosen.values()):
        reports = [run.scores_of("zero_shot") for run in runs]
        clusters = clusters_of(runs[0], "zero_shot", patterns)
        intervals = [
            one.with_intervals(clusters=clusters).intervals[("all",), "all"] for one in reports
        ]
        found = [100 * one.average_f1() for one in reports]
        of_f1.bar(i, fmean(found), color="tab:blue", alpha=0.6)
        low, high = (100 * fmean(getattr(one, end) for one in intervals) for end in ("low", "high"))
        of_f1.vlines(i, low, high, color="black")
        of_f1.plot([i] * len(found), found, "k.")
        of_nll.plot([i] * len(runs), [run.mean_likelihood("zero_shot") for run in runs], "ko")
    of_f1.set_title("zero-shot F1 (dots: seeds; lines: mean of their 95 % intervals)", fontsize=9)
    of_nll.set_title("zero-shot NLL per token", fontsize=9)
    for axis in (of_f1, of_nll):
        axis.set_xticks(range(len(chosen)), list(chosen), rotation=25, ha="right")
    return figure


def gains(others: Mapping[str, Compared], baseline: str) -> Any:
    """Differences from the baseline by data set, with intervals over documents."""
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.2), layout="constrained")
    for j, (name, one) in enumerate(others.items()):
        sets = one.runs[0].sets("zero_shot")
        for axis, comparison, unit in ((axes[0], one.f1, 100.0), (axes[1], one.likelihood, 1.0)):
            lines = [
                line
                for line in comparison.differences
                if line.split == "all" and line.row[0] in sets
            ]
            at = [i + 0.8 * (j + 0.5) / len(others) - 0.4 for i in range(len(lines))]
            middle = np.array([unit * line.difference for line in lines])
            ends = np.array([[unit * line.low, unit * line.high] for line in lines]).T
            axis.errorbar(at, middle, yerr=np.abs(ends - middle), fmt="o", markersize=4, label=name)
            names = [line.row[0] for line in lines]
            axis.set_xticks(range(len(lines)), names, rotation=30, ha="right")
    for axis, what in zip(axes, ("F1", "NLL per token"), strict=True):
        axis.axhline(0, color="grey", linewidth=0.8)
        axis.set_title(f"{what} less that of {baseline} (95 % over documents)", fontsize=9)
    axes[0].legend(fontsize=8)
    return figure


def similarity(others: Mapping[str, Compared], baseline: str) -> Any:
    """Gains against similarity of gates to the nearest training set; None without routers."""
    read = {
        name: one
        for name, one in others.items()
        if "gates" in one.runs[0].figures and one.runs[0].reads_task
    }
    if not read:
        return None
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    for name, one in read.items():
        near = [nearest(run) for run in one.runs]
        sets = [s for s in one.runs[0].sets("zero_shot") if s in near[0]]
        x = [fmean(of_run[s][0] for of_run in near) for s in sets]
        y = [-one.likelihood[s].difference for s in sets]
        rho = "too few sets for a correlation"
        if len(sets) > 2:
            test = spearmanr(x, y)
            rho = f"Spearman {test.statistic:+.2f}, p = {test.pvalue:.2f}, n = {len(sets)}"
        axis.plot(x, y, "o", label=f"{name} ({rho})")
        for at_x, at_y, dataset in zip(x, y, sets, strict=True):
            axis.annotate(dataset, (at_x, at_y), fontsize=7)
    axis.set_xlabel("cosine of the gates with those of the nearest training set")
    axis.set_ylabel(f"NLL per token gained over {baseline}")
    axis.legend(fontsize=8)
    return figure
