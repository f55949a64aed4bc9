"""JSON as every file of extraction is read: no key twice, no NaN, bounded nesting."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

MAX_NESTING = 100
"""Objects and lists within each other; a document has at most seven."""


def parse_json(text: str) -> Any:
    """Parse JSON.

    Raises:
        ValueError: It is no JSON, has a key twice in one object, `NaN` or `Infinity`, or is nested
            deeper than `MAX_NESTING`.
    """
    try:
        value = json.loads(text, object_pairs_hook=_once, parse_constant=_refuse)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    # Few texts have so many brackets at all.
    if text.count("[") + text.count("{") > MAX_NESTING and _is_deeper(value, MAX_NESTING):
        raise ValueError("it is nested too deeply")
    return value


def without_nulls(value: Any) -> Any:
    """The value without keys that are None: Arrow gives every row of a column the keys of all."""
    if isinstance(value, Mapping):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(keys := dict(pairs)) < len(pairs):
        repeated = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key `{repeated}` is given twice in one object")
    return keys


def _refuse(constant: str) -> Any:
    raise ValueError(f"`{constant}` is no value of JSON")


def _is_deeper(value: Any, levels: int) -> bool:
    inner = [value]
    for _ in range(levels + 1):
        inner = [part for outer in inner for part in _parts(outer)]
    return bool(inner)


def _parts(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []
