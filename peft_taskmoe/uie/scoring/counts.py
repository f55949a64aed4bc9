"""Counts of right, wrong and missed items, by document and label, and their JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from ..tables import none_if_nan

Split = Literal["all", "seen", "unseen"]
SPLITS: tuple[Split, ...] = get_args(Split)


@dataclass(frozen=True, slots=True)
class Counts:
    """True positives, false positives and false negatives, and what follows from them.

    `precision = tp / (tp + fp)`, `recall = tp / (tp + fn)`, `f1 = 2 tp / (2 tp + fp + fn)`; each is
    `nan` where its denominator is 0.
    """

    tp: int = 0
    fp: int = 0
    fn: int = 0

    @property
    def precision(self) -> float:
        """Share of the predicted items that are gold."""
        return _ratio(self.tp, self.tp + self.fp)

    @property
    def recall(self) -> float:
        """Share of the gold items that were predicted."""
        return _ratio(self.tp, self.tp + self.fn)

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall."""
        return _ratio(2 * self.tp, 2 * self.tp + self.fp + self.fn)

    @property
    def support(self) -> int:
        """Number of gold items."""
        return self.tp + self.fn

    def to_dict(self) -> dict[str, Any]:
        """Counts and ratios, with None for what is undefined."""
        ratios = {name: none_if_nan(getattr(self, name)) for name in ("precision", "recall", "f1")}
        return asdict(self) | ratios


@dataclass(frozen=True, eq=False)
class DatasetScore:
    """The counts of one data set under one task.

    Args:
        dataset: Name of the data set.
        task: "NER", "RE", "EE" or "EAE".
        labels: Its labels: of the gold records, then of the predicted ones.
        seen: For each label whether it is seen; None where no table knows the data set.
        documents: The ids of the data set's documents.
        counts: `(documents, labels, 3)` integers: true positives, false positives, false negatives.
        roles: Of EAE, the counts of each argument role over all documents and event types.
    """

    dataset: str
    task: str
    labels: tuple[str, ...]
    seen: tuple[bool, ...] | None
    documents: tuple[str, ...]
    counts: NDArray[np.int64]
    roles: Mapping[str, Counts] = field(default_factory=dict)

    def by_document(self, split: Split = "all") -> NDArray[np.int64] | None:
        """Counts of each document over the labels of a split.

        Returns:
            `(documents, 3)` integers, or None where the split has no gold item or is not known.
        """
        if split == "all":
            return np.asarray(self.counts.sum(axis=1))
        if self.seen is None:
            return None
        wanted = np.array(self.seen, dtype=bool) == (split == "seen")
        counts = np.asarray(self.counts[:, wanted].sum(axis=1))
        return counts if counts[:, [0, 2]].sum() else None

    def total(self, split: Split = "all") -> Counts | None:
        """Micro-averaged counts over the labels of a split; None where `by_document` is."""
        counts = self.by_document(split)
        return None if counts is None else Counts(*counts.sum(axis=0).tolist())

    def by_label(self) -> dict[str, Counts]:
        """Counts of each label over all documents."""
        sums = self.counts.sum(axis=0).tolist()
        return {label: Counts(*three) for label, three in zip(self.labels, sums, strict=True)}

    def to_dict(self, documents: bool = False) -> dict[str, Any]:
        """The figures as JSON-ready dicts; with `documents`, `from_dict` can read them back."""
        out: dict[str, Any] = {"dataset": self.dataset, "task": self.task}
        for split in SPLITS:
            total = self.total(split)
            out[split] = None if total is None else total.to_dict()
        seen = self.seen or [None] * len(self.labels)
        out["labels"] = {
            label: counts.to_dict() | {"seen": known}
            for (label, counts), known in zip(self.by_label().items(), seen, strict=True)
        }
        if self.roles:
            out["roles"] = {role: counts.to_dict() for role, counts in self.roles.items()}
        if documents:
            out["documents"] = [
                [name, {self.labels[i]: rows[i].tolist() for i in np.flatnonzero(rows.any(-1))}]
                for name, rows in zip(self.documents, self.counts, strict=True)
            ]
        return out

    @classmethod
    def from_dict(cls, figures: Mapping[str, Any]) -> DatasetScore:
        """The inverse of `to_dict(documents=True)`."""
        if "documents" not in figures:
            raise ValueError(
                f"The figures of `{figures['dataset']}` have no counts by document, which a "
                "comparison needs. Write them with `to_dict(documents=True)`."
            )
        column = {label: i for i, label in enumerate(figures["labels"])}
        counts = np.zeros((len(figures["documents"]), len(column), 3), dtype=np.int64)
        for row, (_, by_label) in enumerate(figures["documents"]):
            for label, three in by_label.items():
                counts[row, column[label]] = three
        seen = tuple(of_label["seen"] for of_label in figures["labels"].values())
        roles = {
            role: Counts(of_role["tp"], of_role["fp"], of_role["fn"])
            for role, of_role in figures.get("roles", {}).items()
        }
        documents = tuple(name for name, _ in figures["documents"])
        known = None if None in seen else seen
        return cls(
            figures["dataset"], figures["task"], tuple(column), known, documents, counts, roles
        )


@dataclass(frozen=True, slots=True)
class AnswerCounts:
    """What became of the answers of one data set.

    Args:
        documents: Number of documents.
        unanswered: Documents without an answer; their gold records are missed.
        parse_failures: Answers from which nothing could be read although they are no empty list.
        hallucinated: Predicted spans that are not in the text, dropped.
        problems: How often each other kind of problem was reported.
    """

    documents: int
    unanswered: int
    parse_failures: int
    hallucinated: int
    problems: Mapping[str, int]

    def to_dict(self) -> dict[str, Any]:
        """The counts as a dict."""
        return asdict(self)


def _ratio(numerator: int, denominator: int) -> float:
    return numerator / denominator if denominator else math.nan
