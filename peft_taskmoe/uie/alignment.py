"""Where in a text a mention stands, and which of its occurrences a record means.

Knows strings and offsets (code points) only: neither schemas nor answers. `occurrences` is a
definition that a brute-force search can be held against; `Aligner` adds the rules by which the
records of one answer take their places.
"""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import islice
from typing import Any, TypeAlias

from peft_taskmoe.uie.records import Alignment, Span
from peft_taskmoe.uie.suffixes import SortedSuffixes, find_all

Place: TypeAlias = tuple[int, int]
"""Start and end in the text."""

MAX_OCCURRENCES = 10_000
"""Occurrences of one mention that are looked at; where a text has more, the first ones count."""

_PLACES_BUDGET = 5_000_000
_MOST_BEYOND_BUDGET = 100
_SCAN_BUDGET = 200_000_000  # characters
_SCANS = 500  # of the whole text, that are always within the budget
_PLAIN_SCANS = 200  # of a text, before its suffixes are put in order
_MOST_TIMES_TEXT = 8  # a mention that is longer than the text by more than this is not in it

_PLAIN = str.maketrans(
    dict.fromkeys("‘’‚‛′`´", "'") | dict.fromkeys("“”„‟″«»", '"') | dict.fromkeys("‐‑‒–—―−", "-")
)

# Scripts without spaces between words: any two letters of theirs may be a boundary.
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\uff66-\uff9f\U00020000-\U0003ffff]"
)

# Hangul words are followed by their particles without a space, so another word may end there.
_PARTICLES = re.compile("[\u1100-\u11ff\u3130-\u318f\uac00-\ud7a3]")


@dataclass(frozen=True, slots=True)
class Occurrences:
    """The places where a mention stands in a text, the best first.

    Attributes:
        alignment: `"exact"`, `"normalised"`, or `"not_found"` with no places.
        places: `(start, end)` of each occurrence.
        alone: How many of them, at the front, stand as words of their own.
        searched: Whether the mention was looked for; see `TextIndex.occurrences`.
    """

    alignment: Alignment
    places: tuple[Place, ...]
    alone: int = 0
    searched: bool = True


class TextIndex:
    """One text, searched for mentions. The normalised form is computed when it is first needed.

    **Order of occurrences**: those that stand as words of their own (no letter, digit or mark of a
    script written with spaces continues the mention on either side) in the order of the text, then
    those inside longer words, in the order of the text. Occurrences may overlap.

    **Exact** occurrences are those of the very string. Only where there are none, **normalised**
    ones count: places whose normal form is the mention's. The normal form (`normalise`) takes curly
    quotes and dashes for plain ones, NFKD and casefold for each character, leaves out format
    characters, variation selectors and marks that sit on a letter (not the marks that make another
    letter: kana voicing, nukta, virama), leaves out white space next to punctuation and at both
    ends, and makes one space of other white space. A place begins and ends with a character
    that is part of the form, except that marks which belong to its last character are inside; it
    never splits a character.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self._found: dict[str, Occurrences] = {}
        self._searched = _Searched(text)
        self._folded: _Folded | None = None
        self._places_left = _PLACES_BUDGET
        self._scan_left = _SCAN_BUDGET + _SCANS * len(text)
        self._numbers: dict[str, dict[Place, int]] = {}

    def occurrences(self, mention: str) -> Occurrences:
        """All places of a mention, up to `MAX_OCCURRENCES`.

        So that no text and answer can make it slow, there are budgets. Once the places found so
        far, weighed by the length of their mentions, exceed 5,000,000 characters, 100 places of
        each further mention are looked at. From the 200th mention on the text's suffixes are put in
        order, and a search reads only what begins alike. Once 200,000,000 characters and the whole
        text 500 times were read, further mentions are not looked for (`searched` is false).
        """
        if mention not in self._found:
            weight = len(mention) + 16
            most = min(MAX_OCCURRENCES, max(self._places_left // weight, _MOST_BEYOND_BUDGET))
            found = self._found[mention] = self._search(mention, most)
            self._places_left -= len(found.places) * weight
        return self._found[mention]

    def _search(self, mention: str, most: int) -> Occurrences:
        if not mention or len(mention) > _MOST_TIMES_TEXT * len(self.text) + 1000:
            return Occurrences("not_found", ())
        if self._scan_left < 0:
            return Occurrences("not_found", (), searched=False)
        if exact := self._find_all(self._searched, mention, most):
            return self._ordered("exact", [(start, start + len(mention)) for start in exact])
        if wanted := normalise(mention):
            self._folded = self._folded or _Folded(self.text)
            starts = self._find_all(self._folded.searched, wanted, most)
            if places := self._folded.places(starts, len(wanted)):
                return self._ordered("normalised", places)
        return Occurrences("not_found", ())

    def _find_all(self, searched: _Searched, words: str, most: int) -> list[int]:
        found, read = searched.find_all(words, most)
        self._scan_left -= read
        return found

    def _ordered(self, alignment: Alignment, places: list[Place]) -> Occurrences:
        alone = [place for place in places if stands_alone(self.text, *place)]
        if len(alone) < len(places):
            places = alone + [place for place in places if not stands_alone(self.text, *place)]
        return Occurrences(alignment, tuple(places), len(alone))

    def span(self, mention: str, place: Place) -> Span:
        """The span of one of a mention's occurrences."""
        return Span(self.text[place[0] : place[1]], *place, self.occurrences(mention).alignment)

    def nth(self, mention: str, number: int) -> Place | None:
        """The occurrence with this number, counted from 1 in the order above, if there is one."""
        places = self.occurrences(mention).places
        return places[number - 1] if 1 <= number <= len(places) else None

    def number(self, mention: str, place: Place) -> int | None:
        """The number of an occurrence, counted from 1; the inverse of `nth`."""
        if mention not in self._numbers:
            places = self.occurrences(mention).places
            self._numbers[mention] = {place: number for number, place in enumerate(places, start=1)}
        return self._numbers[mention].get(place)


class Aligner:
    """Which occurrence each record of one answer means, where the answer does not say.

    The rules, by which a record takes the first place of its kind that no earlier one has taken:

    - An entity's span, an event's trigger: the k-th record with the same words under the same label
      takes the k-th occurrence. Places inside a longer mention that an earlier record has taken,
      under whatever label, come behind all others of their kind.
    - A relation: the k-th with the same head and tail under the same label takes the k-th
      occurrence of both; a side with fewer occurrences stays at its last one. Where head and tail
      are the same words, the tail is the occurrence behind the head's. Where one side's occurrence
      is said, the other takes its own in order.
    - An argument: the occurrence nearest to its event's trigger, then the next nearest, for the
      same words in the same role of the same event; at equal distance the earlier one.

    Occurrences inside longer words come last under each rule. `free_...` looks, `take...` takes;
    both what the default finds and what an occurrence number says is taken.
    """

    def __init__(self, index: TextIndex) -> None:
        self.index = index
        self._taken: set[tuple[Hashable, Hashable]] = set()
        self._queues: dict[Hashable, _Queue] = {}
        self._longest = LongestSpans()

    def take(self, group: Hashable, place: Hashable) -> bool:
        """Mark a place (or a pair of places) as taken within a group; `False` if it was already."""
        size = len(self._taken)
        self._taken.add((group, place))
        return len(self._taken) > size

    def take_mention(self, group: Hashable, place: Place) -> None:
        """Mark the place of a span or trigger as taken within a group."""
        self.take(group, place)
        self._longest.add(place)

    def free_place(self, group: Hashable, mention: str) -> Place | None:
        """The place that the next span or trigger with these words takes, if one is left."""
        found = self.index.occurrences(mention)
        for first, behind in ((0, found.alone), (found.alone, len(found.places))):
            candidates = partial(islice, found.places, first, behind)
            key = (mention, first, behind)
            place: Place | None = self._first_free(group, key, candidates, self._longest.covers)
            if place is not None:
                return place
        return None

    def free_pair(
        self,
        group: Hashable,
        head: str,
        tail: str,
        head_place: Place | None = None,
        tail_place: Place | None = None,
    ) -> tuple[Place, Place] | None:
        """The places that the next relation between these words takes; given ones stay."""
        key = (head, tail, head_place, tail_place)
        return self._first_free(group, key, lambda: self._pairs(head, tail, head_place, tail_place))

    def free_argument(self, group: Hashable, mention: str, trigger: Place | None) -> Place | None:
        """The place that the next argument with these words takes in a role of an event."""
        return self._first_free(
            group, mention, lambda: _nearest(self.index.occurrences(mention), trigger)
        )

    def _pairs(
        self, head: str, tail: str, head_place: Place | None, tail_place: Place | None
    ) -> Iterator[tuple[Place, Place]]:
        heads = (head_place,) if head_place else self.index.occurrences(head).places
        tails = (tail_place,) if tail_place else self.index.occurrences(tail).places
        if not heads or not tails:
            return
        if head_place or tail_place:
            alone = len(heads) == len(tails) == 1
            yield from ((h, t) for h in heads for t in tails if alone or h != t)
        elif heads == tails:
            yield from zip(heads, heads[1:] or heads, strict=False)
        else:
            for k in range(max(len(heads), len(tails))):
                yield heads[min(k, len(heads) - 1)], tails[min(k, len(tails) - 1)]

    def _first_free(
        self,
        group: Hashable,
        key: Hashable,
        candidates: Callable[[], Iterator[Any]],
        rather_not: Callable[[Any], bool] = lambda place: False,
    ) -> Any:
        queue = self._queues.get((group, key))
        if queue is None:
            queue = self._queues[group, key] = _Queue(candidates())
        return queue.first(lambda place: (group, place) in self._taken, rather_not)


class _Queue:
    """Candidates in their order, each looked at once: what is taken, or put back, stays so."""

    def __init__(self, candidates: Iterator[Any]) -> None:
        self.candidates = candidates
        self.current = next(candidates, None)
        self.put_back: deque[Any] = deque()

    def first(self, taken: Callable[[Any], bool], rather_not: Callable[[Any], bool]) -> Any:
        while self.current is not None and (taken(self.current) or rather_not(self.current)):
            self.put_back.append(self.current)
            self.current = next(self.candidates, None)
        if self.current is not None:
            return self.current
        while self.put_back and taken(self.put_back[0]):
            self.put_back.popleft()
        return self.put_back[0] if self.put_back else None


class LongestSpans:
    """Spans of which none lies inside another, in their order."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []

    def add(self, place: Place) -> None:
        """Take a span in, and leave out those inside it."""
        start, end = place
        if self.covers(place):
            return
        first = bisect_left(self._starts, start)
        behind = bisect_right(self._ends, end)
        self._starts[first:behind] = [start]
        self._ends[first:behind] = [end]

    def covers(self, place: Place) -> bool:
        """Whether a longer span has this place inside."""
        start, end = place
        at = bisect_right(self._starts, start) - 1
        return at >= 0 and end <= self._ends[at] and place != (self._starts[at], self._ends[at])

    def reaches_before(self, place: Place) -> bool:
        """Whether a span that begins earlier has this place inside."""
        at = bisect_left(self._starts, place[0]) - 1
        return at >= 0 and place[1] <= self._ends[at]

    def reaches_behind(self, place: Place) -> bool:
        """Whether a span that ends later has this place inside."""
        at = bisect_right(self._starts, place[0]) - 1
        return at >= 0 and place[1] < self._ends[at]


def _nearest(occurrences: Occurrences, to: Place | None) -> Iterator[Place]:
    for places in (
        occurrences.places[: occurrences.alone],
        occurrences.places[occurrences.alone :],
    ):
        if to is None:
            yield from places
            continue
        right = bisect_left(places, to)
        left = right - 1
        while left >= 0 or right < len(places):
            left_gap = max(to[0] - places[left][1], 0) if left >= 0 else None
            right_gap = max(places[right][0] - to[1], 0) if right < len(places) else None
            if right_gap is None or (left_gap is not None and left_gap <= right_gap):
                yield places[left]
                left -= 1
            else:
                yield places[right]
                right += 1


def stands_alone(text: str, start: int, end: int) -> bool:
    """Whether `text[start:end]` is not a part of a longer word."""
    if _joined(text, start):
        return False
    return not _joined(text, end) or bool(_PARTICLES.match(text, end))


def normalise(words: str) -> str:
    """The normal form by which mentions are compared; see `TextIndex`."""
    return _Folded(words).form


class _Folded:
    """A text's normal form, with the place in the text of each of its characters."""

    def __init__(self, text: str) -> None:
        self.text = text
        form: list[str] = []
        sources: list[int] = []
        pending: int | None = (
            None  # index of the first white space behind the last character of the form
        )
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
        self.searched = _Searched(self.form)
        self.sources = sources

    def places(self, starts: list[int], length: int) -> list[Place]:
        """The places in the text of parts of the form."""
        sources, last = self.sources, len(self.sources)
        found: dict[tuple[int, int], None] = {}
        for begin in starts:
            behind = begin + length
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
    # Combining classes below 10 (overlays, nukta, kana voicing, virama) make another letter.
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


class _Searched:
    """A text that is read by the first searches, and whose suffixes are put in order for more."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.searches = 0
        self.suffixes: SortedSuffixes | None = None

    def find_all(self, needle: str, most: int) -> tuple[list[int], int]:
        """Starts of the first occurrences, overlapping ones included; characters that were read."""
        self.searches += 1
        if self.searches > _PLAIN_SCANS:
            self.suffixes = self.suffixes or SortedSuffixes(self.text)
            return self.suffixes.find_all(needle, most)
        return find_all(needle, self.text, most), len(self.text)
