"""Figures of matplotlib that a notebook shows without pyplot."""

from __future__ import annotations

import io
from types import MethodType
from typing import TYPE_CHECKING, Any

from .optional import needed

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(**options: Any) -> Figure:
    """An empty figure; IPython knows how to show those of pyplot alone."""
    figure: Figure = needed("matplotlib.figure", "plot").Figure(layout="constrained", **options)
    figure._repr_png_ = MethodType(_png, figure)  # type: ignore[attr-defined]
    return figure


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()
