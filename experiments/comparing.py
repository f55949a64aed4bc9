"""Two configurations against each other, over documents and over trainings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from outcomes import Losses, Outcome, Selection, clusters_of, pair, pairs
from scipy.stats import ttest_1samp

from peft_taskmoe.uie import Comparison, compare, compare_values

Patterns = Mapping[str, str]


@dataclass(frozen=True)
class Compared:
    """Two configurations on the zero-shot data sets, over the seeds that both have.

    Attributes:
        runs: The runs of the first.
        f1: Strict F1.
        identification: F1 that disregards labels and roles.
        likelihood: Loss per token.
        supervised: The same on other documents of the training's data sets; None if not measured.
        by_seed: Seed -> difference of the zero-shot loss.
    """

    runs: list[Outcome]
    f1: Comparison
    identification: Comparison
    likelihood: Comparison
    supervised: Comparison | None
    by_seed: dict[int, float]


def compare_all(
    chosen: Selection, baseline: str, ablated: str | None, patterns: Patterns
) -> dict[tuple[str, str], Compared]:
    """The comparisons of `pairs`, of runs whose answers were measured."""
    found = {}
    for a, b in pairs(chosen, baseline, ablated):
        runs = pair(chosen[a], chosen[b])
        if runs[0]:
            supervised = runs[0][0].sets("supervised")
            found[a, b] = Compared(
                runs[0],
                compare_f1(*runs, "zero_shot", patterns),
                compare_f1(*runs, "zero_shot", patterns, identification=True),
                compare_likelihood(*runs, "zero_shot", patterns),
                compare_likelihood(*runs, "supervised", patterns) if supervised else None,
                by_seed(*runs, "zero_shot"),
            )
    return found


def compare_f1(
    a: Sequence[Outcome],
    b: Sequence[Outcome],
    part: str,
    patterns: Patterns,
    identification: bool = False,
) -> Comparison:
    """Paired bootstrap over documents of F1, the mean over seeds."""
    reports = ([run.scores_of(part, identification) for run in runs] for runs in (a, b))
    return compare(*reports, clusters=clusters_of(a[0], part, patterns))


def compare_likelihood(
    a: Sequence[Outcome],
    b: Sequence[Outcome],
    part: str,
    patterns: Patterns,
    of_a: str | None = None,
) -> Comparison:
    """Paired bootstrap over documents of the loss per token, the mean over seeds.

    Args:
        a: Runs of one configuration.
        b: Runs of the other, with the same seeds.
        part: The data sets.
        patterns: Which documents are drawn together.
        of_a: Another part of `a` with the same documents, such as "swapped".
    """
    losses = [
        {name: _mean_over_seeds([run.losses(of)[name] for run in runs]) for name in b[0].sets(part)}
        for runs, of in ((a, of_a or part), (b, part))
    ]
    return compare_losses(*losses, clusters=clusters_of(b[0], part, patterns))


def _mean_over_seeds(
    losses: Sequence[Mapping[str, Sequence[float]]],
) -> dict[str, tuple[float, float]]:
    return {
        key: (fmean(of_seed[key][0] for of_seed in losses), tokens)
        for key, (_, tokens) in losses[0].items()
    }


def compare_losses(
    a: Losses, b: Losses, clusters: Mapping[str, Mapping[str, str]] | None = None
) -> Comparison:
    """Paired bootstrap over documents of the loss per token."""
    tables = [
        {name: {key: loss / n for key, (loss, n) in one.items()} for name, one in losses.items()}
        for losses in (a, b)
    ]
    weights = {name: {key: float(n) for key, (_, n) in one.items()} for name, one in b.items()}
    return compare_values(*tables, weights=weights, clusters=clusters)


def by_seed(a: Sequence[Outcome], b: Sequence[Outcome], part: str) -> dict[int, float]:
    """Seed -> difference of the mean loss."""
    of_a, of_b = ({run.seed: run.mean_likelihood(part) for run in of} for of in (a, b))
    return {seed: of_a[seed] - of_b[seed] for seed in sorted(of_a)}


def over_trainings(differences: Sequence[float]) -> tuple[float, float, float] | None:
    """Mean and 95 % interval of the seeds' differences, paired t; None for fewer than three."""
    if len(differences) < 3:
        return None
    low, high = ttest_1samp(differences, 0.0).confidence_interval(0.95)
    return fmean(differences), float(low), float(high)
