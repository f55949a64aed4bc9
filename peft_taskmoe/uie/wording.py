"""How error messages show names and values, short whatever they are."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable
from typing import Any

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 60


def listed(names: Iterable[Any], nothing: str = "nothing") -> str:
    """Names in backquotes, separated by commas."""
    return ", ".join(f"`{name}`" for name in names) or nothing


def shown(value: Any) -> str:
    """A value as Python writes it, cut where it is long or deep."""
    return _repr.repr(value)
