"""Places of mentions that a format gives without offsets, or in UTF-16 units."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
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


def span_at(text: str, start: int, end: int, words: Any) -> dict[str, Any] | None:
    """Text, start and end of offsets in characters or UTF-16 units; `None` if they are wrong."""
    if words is not None and text[start:end] != words:
        # A browser counts UTF-16 units.
        units = text.encode("utf-16-le", "surrogatepass")
        before = units[: 2 * start].decode("utf-16-le", "replace")
        inside = units[2 * start : 2 * end].decode("utf-16-le", "replace")
        start, end = len(before), len(before) + len(inside)
    if end > len(text) or words not in (None, text[start:end]):
        return None
    return {"text": text[start:end], "start": start, "end": end}
