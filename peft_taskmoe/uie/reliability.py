"""How far confidences can be trusted: the share of right records among those of like confidence.

Knows records with confidences, gold documents and numbers. What makes two mentions equal is `score`'s business; where
a confidence comes from is not asked. Imports no torch.

A record is right if everything that it says is gold: of an entity its label and mention, of a relation its label and
both mentions, of an event its label, its trigger and each of its arguments (of an EAE event its arguments alone). One
gold item makes one record right. What a record leaves out is not held against it, and records that were not written
have no part in this: it is about precision alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from peft_taskmoe.uie.records import Document, Record, record_key, spans_of
from peft_taskmoe.uie.score import (
    Answer,
    Interval,
    Match,
    _check_resampling,
    _items,
    _markdown_table,
    _none_if_nan,
    _percentiles,
    _resampled_sums,
    _rich_table,
    _tasks,
    _usable,
)

if TYPE_CHECKING:
    from rich.table import Table

Binning = Literal["width", "count"]


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
class Reliability:
    """A reliability curve: what `reliability` returns.

    Attributes:
        bins: The bins, from low to high confidence.
        without: Records that are in no bin: without a confidence, or EAE events without arguments, which say nothing.
        interval: A bootstrap interval of `ece`, if one was asked for.
    """

    bins: tuple[Bin, ...]
    without: int
    interval: Interval | None = None

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
        """The expected calibration error: `sum_b n_b / n * |precision_b - confidence_b|`; `nan` without records.

        Source: Naeini, Cooper & Hauskrecht (AAAI 2015); Guo et al. (ICML 2017).
        """
        return self._mean([abs(one.precision - one.confidence) for one in self.bins])

    def _mean(self, values: Sequence[float]) -> float:
        weighted = [
            one.count * value for one, value in zip(self.bins, values, strict=True) if one.count
        ]
        return sum(weighted) / self.count if self.count else math.nan

    def to_dict(self) -> dict[str, Any]:
        """All figures as JSON-ready dicts, with None for what is undefined."""
        figures = {
            name: _none_if_nan(getattr(self, name)) for name in ("confidence", "precision", "ece")
        }
        bins = [
            {key: _none_if_nan(value) for key, value in asdict(one).items()} for one in self.bins
        ]
        interval = {} if self.interval is None else {"ece_interval": asdict(self.interval)}
        return {"count": self.count, "without": self.without, **figures, **interval, "bins": bins}

    def to_json(self) -> str:
        """`to_dict` as a JSON text."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False)

    def table(self, title: str = "Reliability of confidences") -> Table:
        """A table for the terminal: `rich.print(found.table())`."""
        return _rich_table(title, *self._rows())

    def to_markdown(self) -> str:
        """The same table as Markdown."""
        return _markdown_table(*self._rows())

    def _rows(self) -> tuple[list[str], list[list[str]]]:
        def shown(value: float) -> str:
            return "" if math.isnan(value) else f"{value:.3f}"

        rows = [
            [
                f"{one.low:.3f} to {one.high:.3f}",
                *(str(one.count), shown(one.confidence), shown(one.precision)),
                shown(one.precision - one.confidence),
            ]
            for one in self.bins
        ]
        ece = f"ECE {shown(self.ece)}"
        if self.interval is not None:
            ece += f" [{shown(self.interval.low)}, {shown(self.interval.high)}]"
        rows.append(["all", str(self.count), shown(self.confidence), shown(self.precision), ece])
        return [
            "confidence",
            "records",
            "mean confidence",
            "precision",
            "precision - confidence",
        ], rows

    def plot(self, path: str | Path) -> None:
        """Draw the curve over the numbers of records; needs `pip install 'peft_taskmoe[plot]'`.

        Args:
            path: The file; its ending says which format (`.png`, `.svg`, `.pdf`).
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError(
                "Plots need `matplotlib`, which is not installed. Run `pip install 'peft_taskmoe[plot]'`."
            ) from error
        figure = Figure(figsize=(5, 6), layout="constrained")
        curve, counts = figure.subplots(2, sharex=True, height_ratios=(3, 1))
        full = [one for one in self.bins if one.count]
        curve.plot([0, 1], [0, 1], ":", color="gray", label="precision = confidence")
        x = [one.confidence for one in full]
        curve.plot(x, [one.precision for one in full], "o-", label=f"ECE {self.ece:.3f}")
        curve.set(ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
        curve.legend(loc="upper left")
        widths = [one.high - one.low for one in self.bins]
        counts.bar(
            [one.low for one in self.bins], [one.count for one in self.bins], widths, align="edge"
        )
        counts.set(xlabel="confidence", ylabel="records")
        figure.savefig(path)


def reliability(
    documents: Mapping[str, Sequence[Document]],
    answers: Mapping[str, Mapping[str, Answer | Sequence[Record]]],
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
        binning: Bins of equal "width", or of (about) equal "count": better where confidences crowd together.
        n_resamples: Bootstrap resamples for an interval of the ECE, over documents; 0: none. The ECE of few records is
            too high on average, that of a resample more so.
        confidence: Width of the interval, between 0 and 1.
        seed: Seed of the resampling.

    Returns:
        The curve.

    Raises:
        ValueError: If there is no such match or binning, no bin, or an answer to no document.
    """
    if match not in ("text", "offsets") or binning not in ("width", "count"):
        raise ValueError(
            f'Found match="{match}" and binning="{binning}". Choose "text" or "offsets", and "width" or "count".'
        )
    if bins < 1:
        raise ValueError(f"`bins` is {bins}, but there has to be one. Pass at least 1.")
    judged: list[tuple[int, float, bool]] = []  # document, confidence, right
    row = without = 0
    for name, answered in answers.items():
        by_id = {document.id: document for document in documents.get(name, ())}
        for id_, answer in answered.items():
            if id_ not in by_id:
                raise ValueError(
                    f"There is an answer to document `{id_}` of `{name}`, which is not among the documents. Pass its "
                    "documents."
                )
            records = answer.records if isinstance(answer, Answer) else answer
            found = _judged(records, by_id[id_], match)
            judged += [(row, value, right) for value, right in found if value is not None]
            without += sum(value is None for value, _ in found)
            row += 1
    values = np.array([value for _, value, _ in judged], dtype=np.float64)
    if len(values) and not (values.min() >= 0 and values.max() <= 1):
        raise ValueError(
            "There are confidences that are not between 0 and 1, which are no probabilities."
        )
    edges = np.linspace(0.0, 1.0, bins + 1)
    if binning == "count" and len(values):
        edges = np.unique([0.0, *np.quantile(values, edges[1:-1]), 1.0])
    columns = np.zeros((max(row, 1), len(edges) - 1, 3))  # count, sum of confidences, right ones
    for (document, value, right), of_bin in zip(
        judged, np.searchsorted(edges[1:-1], values), strict=True
    ):
        columns[document, of_bin] += (1, value, right)
    found_bins = []
    for low, high, (count, summed, right) in zip(
        edges[:-1], edges[1:], columns.sum(axis=0), strict=True
    ):
        means = (summed / count, right / count) if count else (math.nan, math.nan)
        found_bins.append(Bin(float(low), float(high), int(count), *map(float, means)))
    interval = None
    if n_resamples:
        _check_resampling(n_resamples, confidence)
        flat = columns.reshape(len(columns), -1)
        sums = _resampled_sums(flat, n_resamples, "", seed).reshape(n_resamples, -1, 3)
        interval = _percentiles(_ece(sums), confidence)
    return Reliability(tuple(found_bins), without, interval)


def _ece(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """The calibration error of each resample, from (resamples, bins, 3); `nan` where there is no record."""
    n = sums[..., 0].sum(axis=1)
    gaps = np.abs(sums[..., 2] - sums[..., 1]).sum(axis=1)
    return np.divide(gaps, n, out=np.full(n.shape, np.nan), where=n > 0)


def _judged(
    records: Sequence[Record], document: Document, match: Match
) -> list[tuple[float | None, bool]]:
    """For each record that counts: its confidence (None: in no bin) and whether it is right."""
    usable, _, _ = _usable(records, document, count_not_found=False)
    gold = {task: _items(document.records, task, match, document.id) for task in _tasks(document)}
    judged: list[tuple[float | None, bool]] = []
    seen = set()
    for record in usable:
        if all(span.start is not None for span in spans_of(record)):
            key = record_key(record)
            if key in seen:
                continue
            seen.add(key)
        said = {task: _items([record], task, match, document.id) for task in gold}
        if not any(said.values()):
            judged.append((None, False))
            continue
        right = all(items <= gold[task] for task, items in said.items())
        if right:
            for task, items in said.items():
                gold[task] -= items
        judged.append((record.confidence, right))
    return judged
