"""Calibrated confidences: a rising curve for each kind of record, fitted on gold records."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ...optional import needed
from ..records import Record
from ..strict_json import parse_json
from ..tables import json_text
from .reliability import Judged, Reliability

CALIBRATION_FILE = "uie_calibration.json"
_ALL = "all"  # the curve of the kinds of record that had too few
_KINDS = frozenset({"entity", "relation", "event", _ALL})
_SHAPE = '`{"curves": {KIND: {"records": N, "confidence": [...], "precision": [...]}}}`'


@dataclass(frozen=True, slots=True)
class Curve:
    """A line through points, level beyond its ends.

    Args:
        records: The number of records it was fitted on.
        confidence: Confidences as the model gives them, rising.
        precision: What they become, not falling.
    """

    records: int
    confidence: tuple[float, ...]
    precision: tuple[float, ...]

    def __call__(self, confidence: float) -> float:
        """The calibrated confidence."""
        return float(np.interp(confidence, self.confidence, self.precision))


@dataclass(frozen=True)
class Calibration:
    """What turns a model's confidences into shares of right records: see `fit_calibration`.

    Args:
        curves: By kind of record: "entity", "relation", "event", and "all" for the others.
    """

    curves: Mapping[str, Curve]

    def apply(self, records: Iterable[Record]) -> tuple[Record, ...]:
        """The records with calibrated confidences; those without a confidence as they are."""
        return tuple(
            record
            if record.confidence is None
            else replace(record, confidence=self._curve(record)(record.confidence))
            for record in records
        )

    def _curve(self, record: Record) -> Curve:
        return self.curves.get(type(record).__name__.lower(), self.curves[_ALL])

    def save(self, folder: str | Path) -> Path:
        """Write the curves beside an adapter, as JSON."""
        curves = {kind: asdict(curve) for kind, curve in self.curves.items()}
        path = Path(folder) / CALIBRATION_FILE
        path.write_text(json_text({"curves": curves}) + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read the file that `save` wrote, or the one in a folder.

        Raises:
            ValueError: If the file holds no such curves.
        """
        path = Path(path) / CALIBRATION_FILE if Path(path).is_dir() else Path(path)
        try:
            return cls._from_dict(parse_json(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"`{path}` is no calibration ({type(error).__name__}: {error}). "
                f"Write it with `fit_calibration(...).save(folder)`: {_SHAPE}."
            ) from error

    @classmethod
    def _from_dict(cls, content: Any) -> Calibration:
        curves = {
            kind: Curve(int(c["records"]), tuple(c["confidence"]), tuple(c["precision"]))
            for kind, c in content["curves"].items()
        }
        if _ALL not in curves or not set(curves) <= _KINDS:
            raise ValueError(f"curves of {', '.join(curves)}")
        for kind, curve in curves.items():
            x, y = np.array(curve.confidence, dtype=float), np.array(curve.precision, dtype=float)
            points = np.stack([x, y])  # raises where they are not as many
            if points.ndim != 2 or not points.size or not ((points >= 0) & (points <= 1)).all():
                raise ValueError(f"the curve of {kind} is not made of points between 0 and 1")
            if (np.diff(x) < 0).any() or (np.diff(y) < 0).any():
                raise ValueError(f"the curve of {kind} falls")
        return cls(curves)


def fit_calibration(report: Reliability, min_records: int = 100) -> Calibration:
    """Fit an isotonic curve from confidence to precision for each kind of record.

    Fit it on records that the adapter was not trained on, of texts like those it will be used for.

    Args:
        report: What `reliability` returned.
        min_records: Kinds with fewer records share one curve, that of all records.

    Raises:
        ValueError: If there are fewer records than that in all.
    """
    if len(report.judged) < max(min_records, 1):
        raise ValueError(
            f"There are {len(report.judged)} records with a confidence, too few for a calibration "
            f"(min_records={min_records}). Pass the reliability of more documents."
        )
    kinds = {one.kind: [j for j in report.judged if j.kind == one.kind] for one in report.judged}
    curves = {kind: _fit(judged) for kind, judged in kinds.items() if len(judged) >= min_records}
    return Calibration({_ALL: _fit(report.judged), **curves})


def _fit(judged: Iterable[Judged]) -> Curve:
    isotonic = needed("sklearn.isotonic", "uie")
    judged = list(judged)
    fitted = isotonic.IsotonicRegression(y_min=0, y_max=1).fit(
        [one.confidence for one in judged], [float(one.right) for one in judged]
    )
    points = (np.round(fitted.X_thresholds_, 6), np.round(fitted.y_thresholds_, 6))
    return Curve(len(judged), *(tuple(axis.tolist()) for axis in points))
