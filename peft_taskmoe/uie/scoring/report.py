"""The scores of one system: F1, means over data sets, intervals, tables, JSON.

An "average F1" is the unweighted mean over the data sets that have a gold item, or have one with a
seen or unseen label. F1 is `nan` (None in JSON) where there is neither a gold nor a predicted item.
Figures are 0..1 in objects and JSON, and times 100 in tables.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..tables import Table, none_if_nan, percent
from ..tabular import Tabular
from .bootstrap import (
    Clusters,
    Interval,
    by_cluster,
    check_resampling,
    mean_without_nan,
    percentile_interval,
    resampled_sums,
)
from .counts import SPLITS, AnswerCounts, Counts, DatasetScore, Split
from .matching import Match

Row: TypeAlias = tuple[str, ...]
"""`(dataset, task)`, or `(group,)` for a mean."""

# Means are taken over the data sets of these tasks; "EE+EAE" and "all" are the paper's.
GROUPS: dict[str, frozenset[str]] = {
    "NER": frozenset({"NER"}),
    "RE": frozenset({"RE"}),
    "EE": frozenset({"EE"}),
    "EAE": frozenset({"EAE"}),
    "EE+EAE": frozenset({"EE", "EAE"}),
    "all": frozenset({"NER", "RE", "EE", "EAE"}),
}


@dataclass(frozen=True, repr=False)
class ScoreReport(Tabular):
    """The scores of one system on some data sets: what `score` returns.

    Args:
        match: How mentions were compared, "text" or "offsets".
        scores: One entry for each data set and task.
        answers: For each data set, what became of the answers.
        intervals: By (row, split), where `with_intervals` was called.
        identification: Items were compared without their labels; all are counted under "".
        notes: What a reader has to know about the figures.
    """

    match: Match
    scores: tuple[DatasetScore, ...]
    answers: Mapping[str, AnswerCounts]
    intervals: Mapping[tuple[Row, Split], Interval] = field(default_factory=dict)
    identification: bool = False
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        means = ((split, self.average_f1("all", split)) for split in SPLITS)
        shown = ", ".join(f"{split} {percent(mean)}" for split, mean in means if mean == mean)
        documents = sum(counts.documents for counts in self.answers.values())
        return (
            f"ScoreReport({len(self.answers)} data sets, {documents:,} documents: "
            f"mean F1 {shown or 'not defined'}, match by {self.match})"
        )

    def average_f1(self, group: str = "all", split: Split = "all") -> float:
        """Unweighted mean F1 over the data sets of a group of tasks.

        Args:
            group: A key of `GROUPS`: a task, "EE+EAE" or "all".
            split: All labels, the seen ones or the unseen ones.

        Returns:
            The mean over the data sets with a gold item in the split; `nan` where none has one.
        """
        totals = [
            total
            for score in self._of_group(group)
            if (total := score.total(split)) and total.support
        ]
        return sum(total.f1 for total in totals) / len(totals) if totals else math.nan

    def _of_group(self, group: str) -> list[DatasetScore]:
        if group not in GROUPS:
            raise ValueError(
                f"There is no group `{group}` of tasks. Choose one of {', '.join(GROUPS)}."
            )
        return [score for score in self.scores if score.task in GROUPS[group]]

    def groups(self) -> dict[str, list[Row]]:
        """The rows of each group that has some, without groups that repeat one of fewer tasks."""
        found: dict[str, list[Row]] = {}
        for group in GROUPS:
            rows: list[Row] = [(score.dataset, score.task) for score in self._of_group(group)]
            if rows and (group == "all" or rows not in found.values()):
                found[group] = rows
        return found

    def select(self, datasets: Iterable[str]) -> ScoreReport:
        """The report of some of the data sets, e.g. the zero-shot ones; without intervals.

        Raises:
            ValueError: If a name is not in the report.
        """
        names = list(datasets)
        if missing := [name for name in names if name not in self.answers]:
            raise ValueError(
                f"Data set `{missing[0]}` is not in the report: {', '.join(self.answers)}."
            )
        scores = tuple(score for score in self.scores if score.dataset in names)
        answers = {name: counts for name, counts in self.answers.items() if name in names}
        return replace(self, scores=scores, answers=answers, intervals={})

    def with_intervals(
        self,
        n_resamples: int = 2000,
        confidence: float = 0.95,
        seed: int = 0,
        clusters: Clusters | None = None,
    ) -> ScoreReport:
        """The same report with percentile bootstrap intervals for every F1 and every mean of F1.

        The documents of each data set are drawn with replacement, `n_resamples` times; a mean's
        resample is the mean of its data sets' resamples. Resamples without gold are left out.

        The same seed gives the same intervals; those of a data set do not depend on the others. The
        arguments are those of `compare`.

        Source: Efron & Tibshirani, "An Introduction to the Bootstrap" (1993), ch. 13.
        """
        check_resampling(n_resamples, confidence)
        (resampled,) = resampled_f1([self], n_resamples, seed, clusters)
        found = {key: percentile_interval(drawn, confidence) for key, drawn in resampled.items()}
        return replace(self, intervals={key: one for key, one in found.items() if one is not None})

    def values(self) -> dict[tuple[Row, Split], float]:
        """Every F1 with a gold item behind it, by (row, split)."""
        out: dict[tuple[Row, Split], float] = {}
        for score in self.scores:
            for split in SPLITS:
                if (total := score.total(split)) and total.support:
                    out[(score.dataset, score.task), split] = total.f1
        for group in self.groups():
            for split in SPLITS:
                if not math.isnan(mean := self.average_f1(group, split)):
                    out[(group,), split] = mean
        return out

    def to_dict(self, documents: bool = False) -> dict[str, Any]:
        """All figures as JSON-ready dicts.

        Args:
            documents: Also the counts of every document, from which `from_dict` restores the
                report, so that two systems scored in different runs can be compared.
        """
        out: dict[str, Any] = {"match": self.match, "identification": self.identification}
        out |= {"datasets": [score.to_dict(documents) for score in self.scores]}
        out["average_f1"] = {
            group: {split: {"f1": none_if_nan(self.average_f1(group, split))} for split in SPLITS}
            for group in self.groups()
        }
        figures: dict[Row, dict[str, Any]] = {(g,): of for g, of in out["average_f1"].items()}
        figures |= {(entry["dataset"], entry["task"]): entry for entry in out["datasets"]}
        for (row, split), interval in self.intervals.items():
            figures[row][split]["f1_interval"] = [interval.low, interval.high]
            out["confidence"] = interval.confidence
        out["answers"] = {name: counts.to_dict() for name, counts in self.answers.items()}
        return out | ({"notes": list(self.notes)} if self.notes else {})

    @classmethod
    def from_dict(cls, figures: Mapping[str, Any]) -> ScoreReport:
        """The report that wrote `to_dict(documents=True)`, without its intervals.

        Raises:
            ValueError: If the counts of the documents were not written.
        """
        return cls(
            figures["match"],
            tuple(DatasetScore.from_dict(entry) for entry in figures["datasets"]),
            {name: AnswerCounts(**counts) for name, counts in figures["answers"].items()},
            identification=figures.get("identification", False),
            notes=tuple(figures.get("notes", ())),
        )

    def tables(self, labels: bool = False) -> list[Table]:
        """The scores and what became of the answers; with `labels` also those by label and role."""
        scores = self._interval_table() if self.intervals else self._score_table()
        return [scores, self._answers(), *([self._label_table()] if labels else [])]

    @property
    def _measure(self) -> str:
        return "F1 of identification" if self.identification else "Strict F1"

    def _by_row(self) -> list[tuple[list[str], Row, Counts, list[float]]]:
        """For each data set and mean: its name, its row, all its counts, F1 by split."""
        rows: list[tuple[list[str], Row, Counts, list[float]]] = []
        for score in self.scores:
            splits = [(score.total(split) or Counts()).f1 for split in SPLITS]
            row: Row = (score.dataset, score.task)
            rows.append(([score.task, score.dataset], row, score.total() or Counts(), splits))
        for group in self.groups():
            splits = [self.average_f1(group, split) for split in SPLITS]
            rows.append(([group, "mean"], (group,), Counts(), splits))
        return rows

    def _score_table(self) -> Table:
        header = ["task", "data set", "P", "R", "F1", "F1 seen", "F1 unseen"]
        rows = [
            [*name, *map(percent, (total.precision, total.recall, *splits))]
            for name, _, total, splits in self._by_row()
        ]
        return Table(f"{self._measure}, match by {self.match}", header, rows)

    def _interval_table(self) -> Table:
        confidence = next(iter(self.intervals.values())).confidence
        header = ["task", "data set", "labels", "P", "R", "F1", f"{confidence:.0%} interval"]
        rows = []
        for name, row, total, splits in self._by_row():
            for split, f1 in zip(SPLITS, splits, strict=True):
                interval = self.intervals.get((row, split))
                if interval is None and split != "all":
                    continue
                both = (total.precision, total.recall) if split == "all" else (math.nan, math.nan)
                ends = map(percent, (interval.low, interval.high) if interval else ())
                shown = f"[{', '.join(ends)}]" if interval else ""
                rows.append([*name, split, *map(percent, (*both, f1)), shown])
        return Table(f"{self._measure}, match by {self.match}", header, rows, left=3)

    def _answers(self) -> Table:
        header = ["data set", "documents", "unanswered", "parse failures", "hallucinated"]
        rows = [
            [name, *map(str, (n.documents, n.unanswered, n.parse_failures, n.hallucinated))]
            for name, n in self.answers.items()
        ]
        return Table("Answers", header, rows, left=1)

    def _label_table(self) -> Table:
        rows = []
        for score in self.scores:
            seen = ["yes" if known else "no" for known in score.seen or ()]
            names = [*score.by_label(), *(f"role {role}" for role in score.roles)]
            counted = [*score.by_label().values(), *score.roles.values()]
            seen += [""] * (len(names) - len(seen))
            for label, counts, known in zip(names, counted, seen, strict=True):
                ratios = map(percent, (counts.precision, counts.recall, counts.f1))
                rows.append([score.task, score.dataset, label, known, str(counts.support), *ratios])
        header = ["task", "data set", "label", "seen", "gold", "P", "R", "F1"]
        title = f"{self._measure} by label, match by {self.match}"
        return Table(title, header, rows, left=4)


def resampled_f1(
    reports: Sequence[ScoreReport], n_resamples: int, seed: int, clusters: Clusters | None
) -> list[dict[tuple[Row, Split], NDArray[np.float64]]]:
    """For each report, resamples of each F1 and mean, drawn with the same documents for all."""
    out: list[dict[tuple[Row, Split], NDArray[np.float64]]] = [{} for _ in reports]
    for name in reports[0].answers:
        keys: list[tuple[int, Row, Split]] = []
        columns = []
        ids: Sequence[str] = ()
        for i, report in enumerate(reports):
            for score in report.scores:
                for split in SPLITS:
                    if score.dataset == name and (counts := score.by_document(split)) is not None:
                        keys.append((i, (name, score.task), split))
                        columns.append(counts)
                        ids = score.documents
        if not columns:
            continue
        together = by_cluster(np.hstack(columns), name, ids, clusters)
        sums = resampled_sums(together, n_resamples, name, seed).reshape(n_resamples, -1, 3)
        tp, fp, fn = np.moveaxis(sums, -1, 0)
        # A resample without gold counts for no system, whatever it predicted.
        f1 = np.divide(2 * tp, 2 * tp + fp + fn, out=np.full(tp.shape, np.nan), where=tp + fn > 0)
        for k, (i, row, split) in enumerate(keys):
            out[i][row, split] = f1[:, k]
    for report, drawn in zip(reports, out, strict=True):
        scored = report.values()
        for group, rows in report.groups().items():
            for split in SPLITS:
                if members := [drawn[row, split] for row in rows if (row, split) in scored]:
                    drawn[(group,), split] = mean_without_nan(np.stack(members))
    return out
