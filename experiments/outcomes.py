"""The runs of a results folder, and which of them are held against each other."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

from configurations import first_difference

from peft_taskmoe.uie import ScoreReport

BEST = "each at its best learning rate"
Losses = Mapping[str, Mapping[str, Sequence[float]]]
"""Data set -> document -> (loss in nats, tokens)."""


class Outcome:
    """What a run's file holds: its settings, versions and figures, as far as it was measured."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        self.settings: dict[str, Any] = content["settings"]
        self.figures: dict[str, Any] = content["figures"]
        self.versions: dict[str, str] = content["versions"]
        self.configuration: str = self.settings["configuration"]["name"]
        self.learning_rate: float = self.settings["learning_rate"]
        self.seed: int = self.settings["seed"]

    @property
    def has_answers(self) -> bool:
        """Whether answers were measured, not likelihoods alone."""
        return "scores" in self.figures

    @property
    def reads_task(self) -> bool:
        """Whether its router reads the task."""
        return self.settings["configuration"]["encoder"] is not None

    @property
    def is_token_only(self) -> bool:
        """Whether it is a mixture whose router reads tokens alone."""
        configuration = self.settings["configuration"]
        return (
            configuration["method"] == "moelora"
            and configuration["adapter"].get("router_inputs") == "token"
        )

    @cached_property
    def scores(self) -> ScoreReport:
        """Strict scores of all data sets."""
        return ScoreReport.from_dict(self.figures["scores"])

    @cached_property
    def identification(self) -> ScoreReport:
        """Scores that disregard labels and roles."""
        return ScoreReport.from_dict(self.figures["identification"])

    def scores_of(self, part: str, identification: bool = False) -> ScoreReport:
        """The scores of a part's data sets."""
        return (self.identification if identification else self.scores).select(self.sets(part))

    def sets(self, part: str) -> list[str]:
        """The data sets of "dev", "zero_shot", "supervised" or "swapped"; none if not measured."""
        return list(self.figures.get(f"nll_{part}", {}))

    def losses(self, part: str) -> Losses:
        """Loss and tokens of the gold answer of every document of a part."""
        return self.figures[f"nll_{part}"]

    def likelihood(self, part: str, dataset: str) -> float:
        """Negative log-likelihood per token of a data set's gold answers, in nats."""
        return per_token(self.losses(part)[dataset])

    def mean_likelihood(self, part: str) -> float:
        """The unweighted mean over a part's data sets."""
        return fmean(self.likelihood(part, name) for name in self.sets(part))


Selection = dict[str, list[Outcome]]
"""Configuration -> its runs, one for each seed."""


def per_token(losses: Mapping[str, Sequence[float]]) -> float:
    """A data set's loss per token, from document -> (loss, tokens)."""
    return sum(loss for loss, _ in losses.values()) / sum(tokens for _, tokens in losses.values())


def load(folder: Path) -> list[Outcome]:
    """All runs of a results folder, by name."""
    paths = sorted((folder / "runs").glob("*.json"))
    return [Outcome(json.loads(path.read_text(encoding="utf-8"))) for path in paths]


def check_comparable(runs: Sequence[Outcome]) -> None:
    """Refuse to compare runs on other data or with other training settings.

    Raises:
        ValueError: Naming the first run and setting that differ.
    """
    for run in runs[1:]:
        for part in ("benchmark", "training"):
            ours, theirs = runs[0].settings[part], run.settings[part]
            if name := first_difference(ours, theirs):
                raise ValueError(
                    f"Run {run.configuration}, seed {run.seed}, was made with `{name}` = "
                    f"{theirs.get(name)!r}, run {runs[0].configuration}, seed {runs[0].seed}, with "
                    f"{ours.get(name)!r}. Move one of them to a results folder of its own."
                )


def by_rate(runs: Sequence[Outcome], order: Sequence[str]) -> dict[str, dict[float, list[Outcome]]]:
    """Configuration -> learning rate -> its runs, one for each seed; all of them in order."""
    found: dict[str, dict[float, list[Outcome]]] = {}
    for run in sorted(
        runs, key=lambda run: (order.index(run.configuration), run.learning_rate, run.seed)
    ):
        found.setdefault(run.configuration, {}).setdefault(run.learning_rate, []).append(run)
    return found


def selections(runs: Sequence[Outcome], order: Sequence[str]) -> dict[str, Selection]:
    """The comparisons to make: at each learning rate, and at each configuration's best.

    The best learning rate of a configuration has the lowest loss on the documents kept back from
    training, over the seeds that it was tried with at every rate.
    """
    at: dict[float, Selection] = {}
    best: Selection = {}
    for name, rates in by_rate(runs, order).items():
        for rate, tried in rates.items():
            at.setdefault(rate, {})[name] = tried
        if len(rates) > 1:
            common = set.intersection(*({run.seed for run in tried} for tried in rates.values()))
            best[name] = min(rates.values(), key=lambda tried, seeds=common: _dev(tried, seeds))
    found = {
        f"learning rate {rate:g}": chosen for rate, chosen in sorted(at.items()) if len(chosen) > 1
    }
    return {**found, BEST: best} if best else found


def _dev(runs: Iterable[Outcome], seeds: set[int]) -> float:
    return fmean(run.mean_likelihood("dev") for run in runs if run.seed in seeds or not seeds)


def with_answers(selection: Selection) -> Selection:
    """The runs of a selection whose answers were measured."""
    found = {name: [run for run in runs if run.has_answers] for name, runs in selection.items()}
    return {name: runs for name, runs in found.items() if runs}


def measured(selection: Selection, part: str) -> Selection:
    """The runs of a selection whose likelihood of a part was measured."""
    found = {name: [run for run in runs if run.sets(part)] for name, runs in selection.items()}
    return {name: runs for name, runs in found.items() if runs}


def pair(a: Sequence[Outcome], b: Sequence[Outcome]) -> tuple[list[Outcome], list[Outcome]]:
    """The runs of two configurations with the seeds that both have."""
    common = {run.seed for run in a} & {run.seed for run in b}
    return [run for run in a if run.seed in common], [run for run in b if run.seed in common]


def pairs(selection: Selection, baseline: str, ablated: str | None) -> list[tuple[str, str]]:
    """The comparisons that a report makes.

    Every configuration with the baseline; those that read the task also with the mixture that reads
    tokens only, and with the one whose ablations they are.
    """
    found = [(name, baseline) for name in selection if name != baseline and baseline in selection]
    others = [name for name, runs in selection.items() if runs[0].is_token_only]
    others += [ablated] if ablated in selection and ablated != baseline else []
    reading = [name for name, runs in selection.items() if runs[0].reads_task]
    return found + [
        (name, other) for other in others for name in reading if name not in (other, baseline)
    ]


def clusters_of(run: Outcome, part: str, patterns: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """What documents of a part are drawn together, by the patterns of `clusters`."""
    return {
        name: {
            key: found.group(1)
            for key in run.losses(part)[name]
            if (found := re.search(patterns[name], key))
        }
        for name in run.sets(part)
        if name in patterns
    }
