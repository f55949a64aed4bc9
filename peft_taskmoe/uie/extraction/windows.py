"""Texts that do not fit: cut into windows, and the records of windows put together again."""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..alignment import LongestSpans, Place, TextIndex
from ..records import (
    Argument,
    Entity,
    Event,
    Record,
    first_place,
    record_key,
    shift_record,
)


@dataclass(frozen=True, slots=True)
class Window:
    """A part of a text: `whole[start:end] == text`."""

    text: str
    start: int
    end: int


def split_windows(
    text: str, max_length: int, *, length: Callable[[str], int] = len, overlap: int = 100
) -> tuple[Window, ...]:
    """Cut a text into overlapping windows that fit.

    A window ends behind a paragraph if one ends in its second half, or else behind a line, a
    sentence, a word; never inside a CRLF or between a character and its marks. The next one begins
    `overlap` characters earlier, at a word. Every character is in a window; a mention of up to
    `overlap` characters is whole in at least one, unless words are longer than windows.

    Args:
        text: Any string; one that fits is one window.
        max_length: The most that `length` may say of a window.
        length: Length of a window's text, in the unit of `max_length` (characters by default). It
            must not shrink when the text grows.
        overlap: Characters that neighbouring windows share; at most half a window.

    Returns:
        The windows, in order.

    Raises:
        ValueError: Not even one character fits, or `overlap` is negative.
    """
    if overlap < 0:
        raise ValueError(f"`overlap` is {overlap}. Windows share 0 or more characters.")
    windows: list[Window] = []
    start = reached = 0
    while True:
        guess = windows[-1].end - windows[-1].start if windows else None
        end = _furthest(text, start, max_length, length, guess)
        if windows and end <= reached:  # what is shared fills the window: share nothing here
            start = reached
            end = _furthest(text, start, max_length, length, guess)
        if end < len(text):
            end = _cut(text, start + (end - start) // 2, end, least=max(start, reached) + 1)
        windows.append(Window(text[start:end], start, end))
        if end == len(text):
            return tuple(windows)
        reached = end
        start = _restart(text, start, end, min(overlap, (end - start) // 2))


def merge_windows(found: Iterable[tuple[Window, Sequence[Record]]]) -> tuple[Record, ...]:
    """Put the records of windows together.

    Offsets become those of the whole text. What two windows found is kept once (the first); an
    event that two windows found has the arguments of both. An entity that a window's edge cuts
    short is left out where another window has the longer mention with the same label.

    Args:
        found: The windows of one text, each with its records.

    Returns:
        The records, in the order of the text.
    """
    merged: dict[tuple[Any, ...], Record] = {}
    events: dict[tuple[Any, ...], list[Event]] = {}
    windows: dict[tuple[Any, ...], list[Window]] = {}
    for window, records in found:
        moved = [shift_record(record, window.start) for record in records]
        _add_events((one for one in moved if isinstance(one, Event)), events)
        for record in moved:
            if not isinstance(record, Event):
                key = record_key(record)
                merged.setdefault(key, record)
                windows.setdefault(key, []).append(window)
    longest: dict[str, LongestSpans] = {}
    entities = {
        key: record
        for key, record in merged.items()
        if isinstance(record, Entity) and record.span.start is not None
    }
    for key, entity in entities.items():
        longest.setdefault(entity.label, LongestSpans()).add(key[2])
    for key, entity in entities.items():
        if all(_cuts(window, key[2], longest[entity.label]) for window in windows[key]):
            del merged[key]
    kept = [*merged.values(), *itertools.chain.from_iterable(events.values())]
    return tuple(sorted(kept, key=first_place))


def _add_events(found: Iterable[Event], merged: dict[tuple[Any, ...], list[Event]]) -> None:
    """Take the events of one window: each into that of earlier windows with most in common."""
    free: dict[tuple[Any, ...], list[int]] = {}
    for event in found:
        key = record_key(replace(event, arguments=()))
        known = merged.setdefault(key, [])
        earlier = free.setdefault(key, [*range(len(known))])
        if not earlier:
            known.append(event)
            continue
        ours = {*_distinct(event.arguments)}
        best = max(earlier, key=lambda i: len(ours & {*_distinct(known[i].arguments)}))
        earlier.remove(best)
        arguments = (*known[best].arguments, *event.arguments)
        known[best] = replace(known[best], arguments=tuple(_distinct(arguments).values()))


def _cuts(window: Window, place: Place, longest: LongestSpans) -> bool:
    """Whether a window's edge cuts a longer mention down to this one."""
    return (place[0] == window.start and longest.reaches_before(place)) or (
        place[1] == window.end and longest.reaches_behind(place)
    )


def every_place(text: str, records: Sequence[Record]) -> tuple[Record, ...]:
    """For each entity an entity at every place of its words.

    Only whole words count where the words stand alone anywhere, and no place inside a longer
    mention. What is added has the confidence of the first record with these words.

    Args:
        text: The text.
        records: Its records, as `merge_windows` returns them.

    Returns:
        The records, in the order of the text.
    """
    index, longest = TextIndex(text), LongestSpans()
    entities = [one for one in records if isinstance(one, Entity) and one.span.start is not None]
    for entity in entities:
        longest.add((entity.span.start or 0, entity.span.end or 0))
    found = {record_key(record): record for record in records}
    asked: set[tuple[str, str]] = set()
    for entity in entities:
        if (entity.label, entity.span.text) in asked:
            continue
        asked.add((entity.label, entity.span.text))
        places = index.occurrences(entity.span.text)
        for place in places.places[: places.alone] or places.places:
            if not longest.covers(place):
                span = index.span(entity.span.text, place)
                added = Entity(entity.label, span, entity.confidence)
                found.setdefault(record_key(added), added)
    return tuple(sorted(found.values(), key=first_place))


def _furthest(
    text: str, start: int, max_length: int, length: Callable[[str], int], guess: int | None
) -> int:
    """The furthest end at which `text[start:end]` still fits."""
    fits, limit = start, len(text)
    step = guess or max_length
    while fits < limit:  # gallop, so that nothing much longer than a window is ever measured
        end = min(fits + step, limit)
        if length(text[start:end]) > max_length:
            limit = end - 1
            break
        fits, step = end, max(step // 2, 1) if guess else step
    while fits < limit:
        middle = (fits + limit + 1) // 2
        if length(text[start:middle]) <= max_length:
            fits = middle
        else:
            limit = middle - 1
    if fits == start and text:
        raise ValueError(
            f"Not one character fits into a window of {max_length}. Allow more, or ask for less in "
            "one prompt."
        )
    return fits


def _cut(text: str, half: int, end: int, least: int) -> int:
    """The best end from `end` back: at a break behind `half`, or else from `least` on."""
    behind = max(half, least - 1)
    for marks in (("\n\n", "\r\n\r\n"), ("\n",), (". ", "! ", "? ", "。", "！", "？")):
        found = [at + len(mark) for mark in marks if (at := text.rfind(mark, behind, end)) >= 0]
        if found:
            return max(found)
    for at in range(end, behind, -1):
        if text[at - 1].isspace() and not glued(text, at):
            return at
    return next((at for at in range(end, least - 1, -1) if not glued(text, at)), end)


def _restart(text: str, start: int, end: int, overlap: int) -> int:
    """Where the next window begins: no later than `overlap` before the end of this one."""
    latest = end - overlap
    if not overlap:
        return end
    for at in range(
        latest, max(start, latest - 64), -1
    ):  # back to the beginning of a word, if one is near
        if text[at - 1].isspace() and not text[at].isspace():
            return at
    while latest > start + 1 and glued(text, latest):
        latest -= 1
    return latest


def glued(text: str, at: int) -> bool:
    """Whether a cut at `at` would part what is one character to a reader."""
    before, after = text[at - 1 : at], text[at : at + 1]
    return (
        (before == "\r" and after == "\n")
        or before == "\u200d"
        or after == "\u200d"
        or (after != "" and unicodedata.category(after)[0] == "M")
    )


def _distinct(arguments: Iterable[Argument]) -> dict[tuple[Any, ...], Argument]:
    return {(x.role, x.span.start, x.span.end, x.span.text): x for x in arguments}
