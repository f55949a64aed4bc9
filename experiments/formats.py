"""How figures are written in tables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any

from comparing import over_trainings
from outcomes import Selection

from peft_taskmoe.uie.scoring.comparison import Difference
from peft_taskmoe.uie.tables import markdown_table


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table, without the end of its last line."""
    return markdown_table(header, rows).removesuffix("\n")


def spread(values: Sequence[float], form: str = "{:.1f}") -> str:
    """Mean, and with several seeds their range."""
    if any(math.isnan(value) for value in values):
        return "-"
    text = form.format(fmean(values))
    low, high = form.format(min(values)), form.format(max(values))
    return text if len(values) == 1 else f"{text} ({low} .. {high})"


def interval(line: Difference) -> str:
    """A difference of losses with its interval."""
    return bounds(line.difference, line.low, line.high)


def bounds(middle: float, low: float, high: float) -> str:
    """A difference of losses with the ends of its interval."""
    return f"{middle:+.4f} [{low:+.4f}, {high:+.4f}]"


def t_interval(differences: Sequence[float]) -> str:
    """Mean of the seeds' differences with its interval over trainings."""
    found = over_trainings(differences)
    return "-" if found is None else bounds(*found)


def signed(values: Iterable[float]) -> str:
    """Differences, one after the other."""
    return ", ".join(f"{value:+.4f}" for value in values)


def heads(chosen: Selection) -> list[str]:
    """Configurations as heads of columns; with their seeds where these differ."""
    seeds = {name: ", ".join(str(run.seed) for run in runs) for name, runs in chosen.items()}
    if len(set(seeds.values())) == 1:
        return list(chosen)
    return [f"{name} (seed {seeds[name]})" for name in chosen]
