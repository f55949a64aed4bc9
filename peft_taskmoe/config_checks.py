"""Checks of a config's fields: each raises `ValueError` naming field, value and what is allowed."""

from __future__ import annotations

import re
import reprlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

if sys.version_info >= (3, 11):
    from re import _parser  # type: ignore[attr-defined]
else:
    import sre_parse as _parser

_LARGEST = 3.4e38  # of float32
_MOST_STEPS = 32  # a name of 60 characters is then matched in less than a second
_LONGEST = 10_000


def check_count(name: str, value: object) -> None:
    """A positive integer."""
    if type(value) is not int or value < 1:
        raise ValueError(f"`{name}` must be a positive integer, got {reprlib.repr(value)}.")


def check_number(name: str, value: object) -> None:
    """A number that float32 has."""
    if type(value) not in (int, float) or not -_LARGEST < value < _LARGEST:  # type: ignore[operator]
        raise ValueError(f"`{name}` must be a finite number, got {reprlib.repr(value)}.")


def check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """One of some words."""
    if value not in allowed:
        raise ValueError(f"`{name}` must be one of {list(allowed)}, got {reprlib.repr(value)}.")


def check_pattern(name: str, values: object, check: Callable[[str, object], None]) -> None:
    """A dict from names or regexes of modules to what `check` allows, or None."""
    if not isinstance(values, dict | None):
        raise ValueError(f"`{name}` must map module names to numbers, got {reprlib.repr(values)}.")
    for key, value in (values or {}).items():
        check_regex(name, key)
        check(f"{name}[{key!r}]", value)


def check_names(name: str, value: object, one: bool = True) -> None:
    """A list of names, or None; where `one`, a single name or regex as well."""
    if value is None or (one and isinstance(value, str)):
        return
    if not isinstance(value, list | set | tuple) or not all(isinstance(v, str) for v in value):
        kinds = "a name, a regex or a list of names" if one else "a list of names"
        raise ValueError(f"`{name}` must be {kinds}, got {reprlib.repr(value)}.")


def check_indices(name: str, value: object) -> None:
    """A non-negative integer, a list of them, or None."""
    values = value if isinstance(value, list | set | tuple | range) else [value]
    if value is not None and not all(type(i) is int and i >= 0 for i in values):
        raise ValueError(
            f"`{name}` must be a non-negative integer or a list of them, got {reprlib.repr(value)}."
        )


def check_tokens(name: str, value: object) -> None:
    """A list of token ids, or a dict from names of embeddings to such lists, or None."""
    by_name = value if isinstance(value, dict) else {"": value}
    for key, ids in by_name.items():
        if not isinstance(key, str) or not isinstance(ids, list | tuple | None):
            raise ValueError(f"`{name}` must be a list of token ids, got {reprlib.repr(value)}.")
        check_indices(name, ids)


def check_regex(name: str, pattern: object) -> None:
    """A regular expression that no module's name can make slow."""
    if not isinstance(pattern, str) or len(pattern) > _LONGEST:
        raise ValueError(f"`{name}` must be a regex of at most {_LONGEST} characters.")
    try:
        steps = _steps(_parser.parse(pattern))
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"`{name}` must be a regex, got {pattern!r:.200} ({error}).") from error
    if steps > _MOST_STEPS:
        raise ValueError(
            f"`{name}` must be a regex with at most five repeats (`*`, `+`) in a row and none of "
            f"repeats or alternatives, got {pattern!r:.200}. Others can take forever."
        )


def _steps(part: Any) -> int:
    """The most steps that matching a name may take, as a power of two."""
    total = 0
    for op, value in part:
        inner = [_steps(item) for item in _parts(value)]
        if "REPEAT" in str(op):
            least, most = value[:2]
            nested = most > 1 and sum(inner) > 0
            total += sum(inner) + (least < most) * (6 if most > 1 else 1) + nested * _MOST_STEPS
        elif str(op) == "BRANCH":
            total += 1 + max(inner)
        else:
            total += sum(inner)
    return total


def _parts(value: Any) -> Iterator[Any]:
    """The parts of an operation of a parsed regex."""
    for item in value if isinstance(value, list | tuple) else ():
        if isinstance(item, _parser.SubPattern):
            yield item
        else:
            yield from _parts(item)
