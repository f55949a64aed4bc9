"""Places of mentions that a format gives without offsets, or in UTF-16 units."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable
from typing import Any

from peft_taskmoe.uie.alignment import TextIndex


class Placer:
    """Finds the mentions of one text: the k-th of a group takes the k-th occurrence of its words.

    Whole words come first, and the last occurrence serves all that are too many. White space around
    a mention is no part of it.

    Attributes:
        placed: How many mentions were placed.
    """

    def __init__(self, text: str) -> None:
        self._index = TextIndex(text)
        self._taken: Counter[Hashable] = Counter()
        self.placed = 0

    def span(self, mention: str, group: Hashable = None) -> dict[str, Any] | None:
        """Text, start and end, or `None`; without a group, those of the first occurrence."""
        mention = mention.strip()
        places = self._index.occurrences(mention).places
        if not places:
            return None
        start, end = places[min(self._taken[group, mention], len(places) - 1)]
        self._taken[group, mention] += group is not None
        self.placed += 1
        return {"text": self._index.text[start:end], "start": start, "end": end}


def _from_units(text: str, start: int, end: int) -> tuple[int, int]:
    """Offsets in characters of offsets in UTF-16 units, as a browser counts."""
    units = text.encode("utf-16-le", "surrogatepass")
    before = units[: 2 * start].decode("utf-16-le", "replace")
    inside = units[2 * start : 2 * end].decode("utf-16-le", "replace")
    return len(before), len(before) + len(inside)


def counts_units(text: str, mentions: Iterable[tuple[Any, Any, Any]]) -> bool:
    """Whether more of these (start, end, words) fit as UTF-16 units than as characters."""
    if max(text, default="") <= "\uffff":
        return False
    more = 0
    for start, end, words in mentions:
        if type(start) is int and type(end) is int and 0 <= start < end and words:
            first, behind = _from_units(text, start, end)
            more += (text[first:behind] == words) - (text[start:end] == words)
    return more > 0


def span_at(
    text: str, start: int, end: int, words: Any, units: bool = False
) -> dict[str, Any] | None:
    """Text, start and end of offsets in characters or UTF-16 units; `None` if they are wrong.

    Where both fit the words, `units` says which is meant.
    """
    if words is not None and (units or text[start:end] != words):
        moved = _from_units(text, start, end)
        if text[slice(*moved)] == words:
            start, end = moved
    if end > len(text) or words not in (None, text[start:end]):
        return None
    return {"text": text[start:end], "start": start, "end": end}
