"""Resampling of documents: percentile intervals and paired tests.

Own work, where scipy has `stats.bootstrap`, because one draw of documents has to serve all systems,
data sets and means at once, by clusters, in bounded memory.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

_CELLS_PER_BLOCK = 4_000_000  # bounds the memory of one block of resamples (32 MB of int64)

Clusters: TypeAlias = Mapping[str, Mapping[str, str]]
"""Data set -> document id -> name of what the document is a part of."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A bootstrap interval: the middle `confidence` of the resampled values."""

    low: float
    high: float
    confidence: float


def check_resampling(n_resamples: int, confidence: float) -> None:
    """Raise `ValueError` where there is nothing to draw."""
    if n_resamples < 1 or not 0 < confidence < 1:
        raise ValueError(
            f"Found n_resamples={n_resamples} and confidence={confidence}. "
            "Pass at least one resample and a confidence between 0 and 1, e.g. 0.95."
        )


def by_cluster(
    columns: NDArray[Any], dataset: str, ids: Sequence[str], clusters: Clusters | None
) -> NDArray[Any]:
    """Sum the rows `(documents, columns)` of documents that are drawn together."""
    of_document = (clusters or {}).get(dataset, {})
    if unknown := set(of_document) - set(ids):
        raise ValueError(
            f"`clusters` has document `{sorted(unknown)[0]}` of `{dataset}`, which was not scored. "
            "Name the documents that were."
        )
    names = [(1, of_document[id_]) if id_ in of_document else (0, id_) for id_ in ids]
    places = {name: place for place, name in enumerate(dict.fromkeys(names))}
    sums = np.zeros((len(places), columns.shape[1]), dtype=columns.dtype)
    np.add.at(sums, [places[name] for name in names], columns)
    return sums


def resampled_sums(
    columns: NDArray[Any], n_resamples: int, name: str, seed: int
) -> NDArray[np.float64]:
    """Column sums over documents drawn with replacement.

    Args:
        columns: `(documents, columns)`.
        n_resamples: Number of resamples.
        name: The data set's name: each draws from a stream of its own.
        seed: The seed.

    Returns:
        `(n_resamples, columns)`.
    """
    n = len(columns)
    rng = np.random.default_rng([seed, zlib.crc32(name.encode("utf-8", "surrogatepass"))])
    block = max(1, _CELLS_PER_BLOCK // n)
    sums = []
    for start in range(0, n_resamples, block):
        size = min(block, n_resamples - start)
        drawn = rng.integers(n, size=(size, n)) + n * np.arange(size)[:, None]
        times_drawn = np.bincount(drawn.ravel(), minlength=size * n).reshape(size, n)
        sums.append(times_drawn @ columns.astype(np.float64))
    return np.concatenate(sums)


def mean_without_nan(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over the first axis of what is not nan; nan where all is (`nanmean` would warn)."""
    return np.ma.masked_invalid(values).mean(axis=0).filled(np.nan)


def percentile_interval(values: NDArray[np.float64], confidence: float) -> Interval | None:
    """The interval of resampled values, those that are nan left out; None where all are."""
    defined = values[~np.isnan(values)]
    if not len(defined):
        return None
    low, high = np.quantile(defined, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(low), float(high), confidence)


def p_value(observed: float, drawn: NDArray[np.float64]) -> float:
    """Two-sided p of "there is no difference": `drawn` is shifted to that null hypothesis."""
    drawn = drawn[~np.isnan(drawn)]
    # Rounding errors must not hide a resample that equals the observed difference.
    as_far = int((np.abs(drawn - observed) >= abs(observed) - 1e-12).sum())
    return (1 + as_far) / (1 + len(drawn))
