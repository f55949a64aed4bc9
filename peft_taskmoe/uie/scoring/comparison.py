"""Paired bootstrap tests between two systems on the same documents."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..tables import Table, none_if_nan, percent
from ..tabular import Tabular
from .bootstrap import (
    Clusters,
    Interval,
    by_cluster,
    check_resampling,
    p_value,
    percentile_interval,
    resampled_sums,
)
from .counts import SPLITS, Split
from .report import Row, ScoreReport, resampled_f1


@dataclass(frozen=True, slots=True)
class Difference:
    """One line of a comparison: system `a` against system `b` on one data set, or on a mean.

    Args:
        row: `(dataset, task)`, `(dataset,)` or, for a mean, `(group,)`.
        split: All labels, the seen or the unseen ones.
        a: Value of system a.
        b: Value of system b.
        low: Lower end of the interval of `a - b`.
        high: Upper end of it.
        p: Two-sided p value of "there is no difference".
    """

    row: Row
    split: Split
    a: float
    b: float
    low: float
    high: float
    p: float

    @property
    def difference(self) -> float:
        """`a - b`."""
        return self.a - self.b

    def to_dict(self) -> dict[str, Any]:
        """The line as a dict."""
        out: dict[str, Any] = {"row": list(self.row), "split": self.split, "a": self.a, "b": self.b}
        interval = [none_if_nan(self.low), none_if_nan(self.high)]
        return out | {"difference": self.difference, "interval": interval, "p": self.p}


@dataclass(frozen=True)
class Comparison(Tabular):
    """Two systems on the same documents: what `compare` and `compare_values` return.

    Args:
        differences: One for each data set and mean, and each split.
        n_resamples: Number of bootstrap resamples.
        confidence: Width of the intervals.
        unit: What the values are, for the tables: "F1" (shown times 100) or "value".
    """

    differences: tuple[Difference, ...]
    n_resamples: int
    confidence: float
    unit: Literal["F1", "value"]

    def __getitem__(self, key: str | tuple[str, ...]) -> Difference:
        """The line of a row: `c["all"]`, `c["wnut17", "NER"]`, `c["all", "unseen"]`."""
        row = (key,) if isinstance(key, str) else key
        wanted: tuple[Row, str] = (row, "all")
        if row and row[-1] in SPLITS and len(row) > 1:
            wanted = (row[:-1], row[-1])
        for line in self.differences:
            if (line.row, line.split) == wanted:
                return line
        raise KeyError(key)

    def to_dict(self) -> dict[str, Any]:
        """The comparison as JSON-ready dicts."""
        out: dict[str, Any] = {"unit": self.unit, "n_resamples": self.n_resamples}
        differences = [line.to_dict() for line in self.differences]
        return out | {"confidence": self.confidence, "differences": differences}

    def tables(self) -> list[Table]:
        """One row for each difference."""
        show = percent if self.unit == "F1" else "{:.4f}".format
        rows = []
        for line in self.differences:
            interval = f"[{show(line.low)}, {show(line.high)}]"
            values = [show(line.a), show(line.b), show(line.difference), interval, f"{line.p:.4f}"]
            rows.append([" ".join(line.row), line.split, *values])
        header = ["data set", "labels", "a", "b", "a - b", f"{self.confidence:.0%} interval", "p"]
        title = f"Paired bootstrap of {self.unit}, {self.n_resamples} resamples"
        return [Table(title, header, rows)]


def compare(
    a: ScoreReport | Sequence[ScoreReport],
    b: ScoreReport | Sequence[ScoreReport],
    *,
    n_resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
    clusters: Clusters | None = None,
) -> Comparison:
    """Paired bootstrap test of F1 between two systems on the same documents.

    Both systems are scored on the same resampled documents. With d the observed difference and d*
    those of the B resamples, the interval holds the middle `confidence` of d*, and
    `p = (1 + #{|d* - d| >= |d|}) / (1 + B)`: d* shifted to the null hypothesis of no difference.
    The p values are not corrected for the number of lines.

    Source: Efron & Tibshirani (1993), ch. 16; Berg-Kirkpatrick, Burkett & Klein (EMNLP 2012).

    Args:
        a: Report of the first system, or one report for each of its seeds: F1 is then the mean over
            the seeds, and the interval speaks of other documents, not of other seeds.
        b: Report of the second system, likewise.
        n_resamples: Number of resamples.
        confidence: Width of the intervals, between 0 and 1.
        seed: Seed of the resampling.
        clusters: For each data set whose documents are not independent, what each document by its
            id is a part of, e.g. its article: whole clusters are drawn then.

    Raises:
        ValueError: If the reports are not of the same documents and gold records, or a cluster
            names no document.
    """
    check_resampling(n_resamples, confidence)
    of_a = [a] if isinstance(a, ScoreReport) else list(a)
    reports = of_a + ([b] if isinstance(b, ScoreReport) else list(b))
    if not 0 < len(of_a) < len(reports):
        raise ValueError(
            "A system without a report cannot be compared. Pass one report or more for each."
        )
    for report in reports[1:]:
        _check_same_documents(reports[0], report)
    resampled = resampled_f1(reports, n_resamples, seed, clusters)
    both = [(report.values(), drawn) for report, drawn in zip(reports, resampled, strict=True)]
    lines = []
    for row, split in both[0][0]:
        values = [(of[row, split], drawn[row, split]) for of, drawn in both]
        of_systems = _mean(values[: len(of_a)]), _mean(values[len(of_a) :])
        lines.append(_difference(row, split, *of_systems, confidence))
    return Comparison(tuple(lines), n_resamples, confidence, "F1")


def compare_values(
    a: Mapping[str, Mapping[str, float]],
    b: Mapping[str, Mapping[str, float]],
    *,
    weights: Mapping[str, Mapping[str, float]] | None = None,
    n_resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
    clusters: Clusters | None = None,
) -> Comparison:
    """Paired bootstrap test of a real number per document, e.g. the loss of its gold answer.

    The value of a data set is the weighted mean over its documents, that of the row `("all",)` the
    unweighted mean over data sets. Resampling, interval, p and their arguments are as in `compare`.

    `a` and `b` have, for each data set, the value of each document by its id; `weights` likewise
    the weight of each document, e.g. its number of answer tokens where the values are means over
    tokens. Without `weights` all documents weigh the same.

    Raises:
        ValueError: If the systems do not have the same documents, a value is not finite, a weight
            not positive, or a cluster names no document.
    """
    check_resampling(n_resamples, confidence)
    if set(a) != set(b) or not a:
        raise ValueError(
            f"The systems have different data sets: {sorted(a)} and {sorted(b)}. "
            "Compare them on the same."
        )
    found: list[tuple[_Value, _Value]] = []
    for name in a:
        weight = dict.fromkeys(a[name], 1.0) if weights is None else weights.get(name, {})
        columns = _weighted_columns(name, a[name], b[name], weight)
        drawn = by_cluster(columns, name, list(a[name]), clusters)
        drawn = resampled_sums(drawn, n_resamples, name, seed)
        sums = columns.sum(axis=0)
        of_a, of_b = ((sums[i] / sums[0], drawn[:, i] / drawn[:, 0]) for i in (1, 2))
        found.append((of_a, of_b))
    of_a, of_b = (_mean(of) for of in zip(*found, strict=True))
    lines = [
        _difference((name,), "all", *values, confidence)
        for name, values in zip([*a, "all"], [*found, (of_a, of_b)], strict=True)
    ]
    return Comparison(tuple(lines), n_resamples, confidence, "value")


_Value = tuple[Any, NDArray[np.float64]]  # a system's value and its resamples


def _mean(values: Sequence[_Value]) -> _Value:
    """The mean of several values, and of their resamples one by one."""
    return np.mean([one for one, _ in values]), np.mean([drawn for _, drawn in values], axis=0)


def _difference(row: Row, split: Split, a: _Value, b: _Value, confidence: float) -> Difference:
    drawn = a[1] - b[1]
    undefined = Interval(math.nan, math.nan, confidence)
    interval = percentile_interval(drawn, confidence) or undefined
    value_a, value_b = float(a[0]), float(b[0])
    p = p_value(value_a - value_b, drawn)
    return Difference(row, split, value_a, value_b, interval.low, interval.high, p)


def _weighted_columns(
    name: str, a: Mapping[str, float], b: Mapping[str, float], weight: Mapping[str, float]
) -> NDArray[np.float64]:
    """`(documents, 3)`: the weight of each document, and the weighted value of either system."""
    if set(a) != set(b) or not a:
        raise ValueError(
            f"The systems have different documents of `{name}`, or none. Compare them on the same."
        )
    if unweighted := [id_ for id_ in a if not weight.get(id_, 0) > 0]:
        raise ValueError(
            f"Document `{unweighted[0]}` of `{name}` has no positive weight. Give it one."
        )
    columns = np.array([[weight[i], weight[i] * a[i], weight[i] * b[i]] for i in a])
    if not np.isfinite(columns).all():
        broken = list(a)[int(np.flatnonzero(~np.isfinite(columns).all(axis=1))[0])]
        raise ValueError(
            f"Document `{broken}` of `{name}` has a value that is not finite. Leave it out."
        )
    return columns


def _check_same_documents(a: ScoreReport, b: ScoreReport) -> None:
    """Raise where two reports are not of the same documents, gold records, match and labels."""
    advice = "Score both systems on the same documents in the same way."
    if a.match != b.match:
        raise ValueError(f"One report matches by {a.match}, the other by {b.match}. {advice}")
    if a.identification != b.identification:
        raise ValueError(f"Only one report is of identification, without labels. {advice}")
    rows_a, rows_b = ({(s.dataset, s.task): s for s in report.scores} for report in (a, b))
    if different := sorted(set(rows_a) ^ set(rows_b)):
        name, task = different[0]
        raise ValueError(f"Only one report has data set `{name}` under {task}. {advice}")
    for row, score_a in rows_a.items():
        for split in SPLITS:
            counts = [score.by_document(split) for score in (score_a, rows_b[row])]
            gold = [None if c is None else (c[:, 0] + c[:, 2]).tolist() for c in counts]
            if score_a.documents != rows_b[row].documents or gold[0] != gold[1]:
                raise ValueError(
                    f"The reports have different documents or gold records of `{row[0]}`. {advice}"
                )
