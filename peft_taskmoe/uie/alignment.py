"""Where in a text a mention stands: exact or normalised occurrences, their order, and which one a record means.

Knows strings and offsets (code points) only: neither schemas nor answers. `occurrences` is a definition that a
brute-force search can be held against; `Aligner` adds the rules by which the records of one answer take their places.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Hashable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from peft_taskmoe.uie.records import Alignment, Span

MAX_OCCURRENCES = 10_000
"""Occurrences of one mention that are looked at; a text with more of them keeps to the first ones."""

_PLAIN = str.maketrans(
    dict.fromkeys("‘’‚‛′`´", "'") | dict.fromkeys("“”„‟″«»", '"') | dict.fromkeys("‐‑‒–—―−", "-")
)

# Scripts that are written without spaces between words: any two letters of theirs may be a boundary.
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\uff66-\uff9f\U00020000-\U0003ffff]"
)


@dataclass(frozen=True, slots=True)
class Occurrences:
    """The places where a mention stands in a text, the best first.

    Attributes:
        alignment: `"exact"`, `"normalised"`, or `"not_found"` with no places.
        places: `(start, end)` of each occurrence.
    """

    alignment: Alignment
    places: tuple[tuple[int, int], ...]


class TextIndex:
    """One text, searched for mentions. The normalised form is computed when it is first needed.

    **Order of occurrences**: those that stand as words of their own (no letter, digit or mark of a script written
    with spaces continues the mention on either side) in the order of the text, then those inside longer words, in
    the order of the text. Occurrences may overlap.

    **Exact** occurrences are those of the very string. Only where there are none, **normalised** ones count: places
    whose normal form is the mention's. The normal form (`normalise`) takes curly quotes and dashes for plain ones,
    NFKD and casefold for each character, leaves out format characters, variation selectors and marks that sit on a
    letter (not the marks that make another letter: kana voicing, nukta, virama), leaves out white space next to
    punctuation and at both ends, and makes one space of other white space. A place begins and ends with a character
    that is part of the form, except that marks which belong to its last character are inside; it never splits a
    character.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self._found: dict[str, Occurrences] = {}
        self._folded: _Folded | None = None

    def occurrences(self, mention: str) -> Occurrences:
        """All places of a mention; `O(len(text) + len(mention))` but for its first `MAX_OCCURRENCES` places."""
        if mention not in self._found:
            self._found[mention] = self._search(mention)
        return self._found[mention]

    def _search(self, mention: str) -> Occurrences:
        if not mention:
            return Occurrences("not_found", ())
        if exact := _find_all(mention, self.text):
            places = [(start, start + len(mention)) for start in exact]
            return Occurrences("exact", self._in_order(places))
        if wanted := normalise(mention):
            self._folded = self._folded or _Folded(self.text)
            if places := self._folded.places(wanted):
                return Occurrences("normalised", self._in_order(places))
        return Occurrences("not_found", ())

    def _in_order(self, places: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
        return tuple(sorted(places, key=lambda place: (not stands_alone(self.text, *place), place)))


def stands_alone(text: str, start: int, end: int) -> bool:
    """Whether `text[start:end]` is not a part of a longer word."""
    return not _joined(text, start) and not _joined(text, end)


def normalise(words: str) -> str:
    """The normal form by which mentions are compared; see `TextIndex`."""
    return _Folded(words).form


class _Folded:
    """A text's normal form, with the place in the text of each of its characters."""

    def __init__(self, text: str) -> None:
        self.text = text
        form: list[str] = []
        sources: list[int] = []
        pending: int | None = None  # index of the first white space behind the last character of the form
        for index, character in enumerate(text):
            for folded in _fold(character):
                if folded.isspace():
                    if form and pending is None:
                        pending = index
                    continue
                if pending is not None and _is_word(form[-1]) and _is_word(folded):
                    form.append(" ")
                    sources.append(pending)
                pending = None
                form.append(folded)
                sources.append(index)
        self.form = "".join(form)
        self.sources = sources

    def places(self, wanted: str) -> list[tuple[int, int]]:
        sources, last = self.sources, len(self.sources)
        found: dict[tuple[int, int], None] = {}
        for begin in _find_all(wanted, self.form):
            behind = begin + len(wanted)
            splits = (begin and sources[begin - 1] == sources[begin]) or (
                behind < last and sources[behind - 1] == sources[behind]
            )
            if splits:
                continue
            end = sources[behind - 1] + 1
            while end < len(self.text) and unicodedata.category(self.text[end])[0] == "M":
                if _fold(self.text[end]):
                    break  # a mark that makes another letter of the last one
                end += 1
            else:
                found[sources[begin], end] = None
        return list(found)


@lru_cache(maxsize=1 << 16)
def _fold(character: str) -> str:
    folded = unicodedata.normalize("NFKD", character.translate(_PLAIN))
    folded = unicodedata.normalize("NFKD", folded.casefold()).translate(_PLAIN)
    return "".join(c for c in folded if not _is_left_out(c))


def _is_left_out(character: str) -> bool:
    # Combining classes below 10 are overlays, nukta, kana voicing and virama: they make another letter.
    return (
        unicodedata.combining(character) >= 10
        or unicodedata.category(character) == "Cf"
        or "\ufe00" <= character <= "\ufe0f"
        or "\U000e0100" <= character <= "\U000e01ef"
    )


def _is_word(character: str) -> bool:
    return character.isalnum() or unicodedata.category(character)[0] == "M"


def _joined(text: str, at: int) -> bool:
    """Whether one word goes on from `text[at - 1]` to `text[at]`."""
    if not 0 < at < len(text):
        return False
    before, after = text[at - 1], text[at]
    if unicodedata.category(after)[0] == "M":
        return True
    if not (_is_word(before) or before == "_") or not (after.isalnum() or after == "_"):
        return False
    return not (_UNSPACED.match(before) or _UNSPACED.match(after))


def _find_all(needle: str, text: str) -> list[int]:
    """Starts of all occurrences, overlapping ones included, at most `MAX_OCCURRENCES`, in linear time."""
    found: list[int] = []
    at = text.find(needle)
    while at >= 0 and len(found) < MAX_OCCURRENCES:
        found.append(at)
        following = text.find(needle, at + 1)
        if 0 <= following < at + len(needle) and len(needle) > 64:
            return found + _find_overlapping(needle, text, at + 1)[: MAX_OCCURRENCES - len(found)]
        at = following
    return found


def _find_overlapping(needle: str, text: str, at: int) -> list[int]:
    """Knuth-Morris-Pratt from `at` on: a long mention that overlaps itself would cost its length at each place."""
    borders = [0] * len(needle)
    matched = 0
    for i in range(1, len(needle)):
        while matched and needle[i] != needle[matched]:
            matched = borders[matched - 1]
        matched += needle[i] == needle[matched]
        borders[i] = matched
    found: list[int] = []
    matched = 0
    for i in range(at, len(text)):
        while matched and (matched == len(needle) or text[i] != needle[matched]):
            matched = borders[matched - 1]
        matched += text[i] == needle[matched]
        if matched == len(needle):
            found.append(i - len(needle) + 1)
    return found
