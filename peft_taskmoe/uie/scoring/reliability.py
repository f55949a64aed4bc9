"""Reliability curve: the precision of predicted records by their confidence.

A record is right if everything that it says is gold: of an entity its label and mention, of a
relation its label and both mentions, of an event its label, its trigger and each of its arguments
(of an EAE event its arguments alone). One gold item makes one record right. What a record leaves
out, and records that were not written, have no part in this: it is about precision alone.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...figures import new_figure
from ..records import Document, Record, record_key, spans_of
from ..tables import Table, none_if_nan
from ..tabular import Tabular
from .bootstrap import Interval, check_resampling, percentile_interval, resampled_sums
from .matching import Answers, Documents, Items, Match, items_of, parts_of, tasks_of, usable

Binning = Literal["width", "count"]


class Judged(NamedTuple):
    """A predicted record: the number of its document, its kind, its confidence, if it is right."""

    document: int
    kind: str
    confidence: float
    right: bool


@dataclass(frozen=True, slots=True)
class Bin:
    """The records of like confidence: of `(low, high]`, the lowest bin with its lower end.

    Attributes:
        low: Lower end.
        high: Upper end.
        count: Number of records.
        confidence: Their mean confidence; `nan` where there is none.
        precision: The share of right ones; `nan` where there is none.
    """

    low: float
    high: float
    count: int
    confidence: float
    precision: float


@dataclass(frozen=True)
class Reliability(Tabular):
    """A reliability curve: what `reliability` returns.

    Attributes:
        bins: The bins, from low to high confidence.
        without: Records that are in no bin: without a confidence, or EAE events without arguments.
        interval: A bootstrap interval of `ece`, if one was asked for.
        judged: The records of the bins, which `fit_calibration` needs.
    """

    bins: tuple[Bin, ...]
    without: int
    interval: Interval | None = None
    judged: tuple[Judged, ...] = field(default=(), repr=False)

    @property
    def count(self) -> int:
        """Number of records in the bins."""
        return sum(one.count for one in self.bins)

    @property
    def confidence(self) -> float:
        """Mean confidence of all records; `nan` where there is none."""
        return self._mean([one.confidence for one in self.bins])

    @property
    def precision(self) -> float:
        """Share of right records; `nan` where there is none."""
        return self._mean([one.precision for one in self.bins])

    @property
    def ece(self) -> float:
        """Expected calibration error: `sum_b n_b / n * |precision_b - confidence_b|`, or `nan`.

        Source: Naeini, Cooper & Hauskrecht (AAAI 2015); Guo et al. (ICML 2017).
        """
        return self._mean([abs(one.precision - one.confidence) for one in self.bins])

    def _mean(self, values: Sequence[float]) -> float:
        both = zip(self.bins, values, strict=True)
        weighted = [one.count * value for one, value in both if one.count]
        return sum(weighted) / self.count if self.count else math.nan

    def to_dict(self) -> dict[str, Any]:
        """All figures as JSON-ready dicts, with None for what is undefined."""
        names = ("confidence", "precision", "ece")
        out: dict[str, Any] = {"count": self.count, "without": self.without}
        out |= {name: none_if_nan(getattr(self, name)) for name in names}
        if self.interval is not None:
            out["ece_interval"] = asdict(self.interval)
        bins = [{k: none_if_nan(v) for k, v in asdict(one).items()} for one in self.bins]
        return out | {"bins": bins}

    def tables(self) -> list[Table]:
        """One row for each bin, and one for all."""

        def shown(*values: float) -> list[str]:
            return ["" if math.isnan(value) else f"{value:.3f}" for value in values]

        rows = [
            (f"{b.low:.3f} to {b.high:.3f}", str(b.count), *shown(b.confidence, b.precision, gap))
            for b in self.bins
            for gap in [b.precision - b.confidence]
        ]
        ece = f"ECE {shown(self.ece)[0]}"
        if self.interval is not None:
            ece += f" [{', '.join(shown(self.interval.low, self.interval.high))}]"
        rows.append(("all", str(self.count), *shown(self.confidence, self.precision), ece))
        header = ["confidence", "records", "mean confidence", "precision"]
        return [Table("Reliability", [*header, "precision - confidence"], rows, left=1)]

    def plot(self, path: str | Path | IO[bytes]) -> None:
        """Draw the curve over the numbers of records; needs `pip install 'peft_taskmoe[plot]'`.

        Args:
            path: The file; its ending says which format (`.png`, `.svg`, `.pdf`). An open one
                gets a PNG.
        """
        figure = new_figure(figsize=(5, 6))
        curve, counts = figure.subplots(2, sharex=True, height_ratios=(3, 1))
        full = [one for one in self.bins if one.count]
        curve.plot([0, 1], [0, 1], ":", color="gray", label="precision = confidence")
        x, y = [one.confidence for one in full], [one.precision for one in full]
        curve.plot(x, y, "o-", label=f"ECE {self.ece:.3f}")
        curve.set(ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
        curve.legend(loc="upper left")
        low, height = [one.low for one in self.bins], [one.count for one in self.bins]
        counts.bar(low, height, [one.high - one.low for one in self.bins], align="edge")
        counts.set(xlabel="confidence", ylabel="records")
        figure.savefig(path)


def reliability(
    documents: Documents,
    answers: Answers,
    *,
    match: Match = "text",
    bins: int = 10,
    binning: Binning = "width",
    n_resamples: int = 0,
    confidence: float = 0.95,
    seed: int = 0,
) -> Reliability:
    """The reliability curve of the records that were predicted for some data sets, all in one.

    Args:
        documents: For each data set, its documents with their gold records.
        answers: For each data set, the answer to each document by its id, as for `score`.
        match: Compare mentions by "text" or by "offsets", as `score` does.
        bins: Number of bins between 0 and 1.
        binning: Bins of equal "width", or of (about) equal "count": better where confidences crowd
            together.
        n_resamples: Bootstrap resamples for an interval of the ECE, over documents; 0: none. The
            ECE of few records is too high on average, that of a resample more so.
        confidence: Width of the interval, between 0 and 1.
        seed: Seed of the resampling.

    Raises:
        ValueError: If there is no such match or binning, no bin, an answer to no document, or a
            confidence that is no probability.
    """
    if match not in ("text", "offsets") or binning not in ("width", "count"):
        raise ValueError(
            f'Found match="{match}" and binning="{binning}". '
            'Choose "text" or "offsets", and "width" or "count".'
        )
    if bins < 1:
        raise ValueError(f"`bins` must be a positive integer, got {bins}.")
    if n_resamples:
        check_resampling(n_resamples, confidence)
    found = [_judged(*answered, match) for answered in _answered(documents, answers)]
    judged = tuple(
        Judged(row, type(record).__name__.lower(), record.confidence, right)
        for row, of_document in enumerate(found)
        for record, right in of_document
        if right is not None and record.confidence is not None
    )
    without = sum(map(len, found)) - len(judged)
    edges, columns = _binned(judged, max(len(found), 1), bins, binning)
    curve = []
    for low, high, (n, summed, right) in zip(edges, edges[1:], columns.sum(axis=0), strict=False):
        means = (float(summed / n), float(right / n)) if n else (math.nan, math.nan)
        curve.append(Bin(float(low), float(high), int(n), *means))
    interval = None
    if n_resamples:
        flat = columns.reshape(len(columns), -1)
        sums = resampled_sums(flat, n_resamples, "", seed).reshape(n_resamples, -1, 3)
        interval = percentile_interval(_ece(sums), confidence)
    return Reliability(tuple(curve), without, interval, judged)


def _answered(
    documents: Documents, answers: Answers
) -> Iterator[tuple[Sequence[Record], Document]]:
    """The records of each answer with their document."""
    for name, answered in answers.items():
        by_id = {document.id: document for document in documents.get(name, ())}
        for id_, answer in answered.items():
            if id_ not in by_id:
                raise ValueError(
                    f"There is an answer to document `{id_}` of `{name}`, which is not among the "
                    "documents. Pass its documents."
                )
            yield parts_of(answer, by_id[id_])[0], by_id[id_]


def _binned(
    judged: Sequence[Judged], documents: int, bins: int, binning: Binning
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The bins' edges, and (documents, bins, 3): count, sum of confidences, right ones."""
    values = np.array([one.confidence for one in judged], dtype=np.float64)
    edges = np.linspace(0.0, 1.0, bins + 1)
    if binning == "count" and len(values):
        edges = np.unique([0.0, *np.quantile(values, edges[1:-1]), 1.0])
    columns = np.zeros((documents, len(edges) - 1, 3))
    rows = np.array([one.document for one in judged], dtype=np.intp)
    three = np.array([(1.0, one.confidence, one.right) for one in judged]).reshape(-1, 3)
    np.add.at(columns, (rows, np.searchsorted(edges[1:-1], values)), three)
    return edges, columns


def _ece(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """The calibration error of each resample, from (resamples, bins, 3); `nan` without a record."""
    n = sums[..., 0].sum(axis=1)
    gaps = np.abs(sums[..., 2] - sums[..., 1]).sum(axis=1)
    return np.divide(gaps, n, out=np.full(n.shape, np.nan), where=n > 0)


def _distinct(records: Iterable[Record]) -> Iterator[Record]:
    """The records without repetitions; without offsets none is known to be one."""
    seen = set()
    for record in records:
        key = record_key(record)
        if any(span.start is None for span in spans_of(record)) or key not in seen:
            seen.add(key)
            yield record


def _judged(
    records: Sequence[Record], document: Document, match: Match
) -> list[tuple[Record, bool | None]]:
    """For each record that counts, whether it is right; None where the task has no item of it."""
    kept, _, _ = usable(records, document, count_not_found=False)
    gold: dict[str, Items] = {task: Counter() for task in tasks_of(document)}
    for record in _distinct(document.records):
        for task, items in gold.items():
            items += items_of([record], task, match, document.id)
    judged: list[tuple[Record, bool | None]] = []
    for record in _distinct(kept):
        said = {task: items_of([record], task, match, document.id) for task in gold}
        right = all(items <= gold[task] for task, items in said.items())
        if right:
            for task, items in said.items():
                gold[task] -= items
        judged.append((record, right if any(said.values()) else None))
    return judged
