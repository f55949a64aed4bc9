"""A text's suffixes in order, so that thousands of searches through it do not each read it."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from itertools import islice

import numpy as np

_DEPTH = 32  # suffixes are ordered by as many characters; a power of two


class SortedSuffixes:
    """Finds substrings in logarithmic time; the memory is some 8 bytes a character.

    Args:
        text: Any string.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
        rank = np.unique(codes, return_inverse=True)[1].astype(np.int64) + 1
        order, width = np.argsort(rank, kind="stable"), 1
        while width < _DEPTH and rank.max(initial=0) < len(text):
            behind = np.concatenate((rank[width:], np.zeros(min(width, len(text)), np.int64)))
            key = rank * (len(text) + 1) + behind
            order = np.argsort(key, kind="stable")
            steps = np.diff(key[order], prepend=key[order[:1]]) != 0
            rank[order] = np.cumsum(steps) + 1
            width *= 2
        self._order = order

    def find_all(self, needle: str, most: int) -> tuple[list[int], int]:
        """Starts of a string's first occurrences, overlapping ones included; how many were read."""
        head = needle[:_DEPTH]

        def beginning(start: int) -> str:
            return self.text[start : start + len(head)]

        first = bisect_left(self._order, head, key=beginning)
        behind = bisect_right(self._order, head, lo=first, key=beginning)
        if len(needle) > _DEPTH and (behind - first) * _DEPTH > len(self.text):
            return find_all(needle, self.text, most), len(self.text)
        starts = np.sort(self._order[first:behind])
        if len(needle) > _DEPTH:
            found = (start for start in starts.tolist() if self.text.startswith(needle, start))
            return list(islice(found, most)), len(starts) * _DEPTH
        return starts[:most].tolist(), len(starts)


def find_all(needle: str, text: str, most: int) -> list[int]:
    """Starts of the first occurrences of a string, overlapping ones included, by reading on."""
    found: list[int] = []
    at = text.find(needle)
    while at >= 0 and len(found) < most:
        found.append(at)
        at = text.find(needle, at + 1)
    return found
