"""Texts that do not fit: cut into windows, and the records of windows put together again."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..alignment import LongestSpans, TextIndex
from ..records import (
    Argument,
    Document,
    Entity,
    Event,
    Record,
    record_key,
    shift_record,
    spans_of,
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
    at_edge: set[tuple[Any, ...]] = set()
    for window, records in found:
        for record in (shift_record(record, window.start) for record in records):
            key = record_key(replace(record, arguments=()) if isinstance(record, Event) else record)
            touches = (
                {window.start, window.end} & {record.span.start, record.span.end}
                if isinstance(record, Entity)
                else ()
            )
            if key not in merged:
                merged[key] = record
                at_edge |= {key} if touches else set()
                continue
            if not touches:
                at_edge.discard(key)
            earlier = merged[key]
            if isinstance(record, Event) and isinstance(earlier, Event):
                arguments = dict.fromkeys((*earlier.arguments, *record.arguments))
                merged[key] = replace(earlier, arguments=_distinct(arguments))
    longest: dict[str, LongestSpans] = {}
    for key in merged:
        if key[0] == "entity" and len(key[2]) == 2:
            longest.setdefault(key[1], LongestSpans()).add(key[2])
    kept = [
        record
        for key, record in merged.items()
        if key not in at_edge or not longest[key[1]].covers(key[2])
    ]
    return tuple(sorted(kept, key=_first_place))


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
    return tuple(sorted(found.values(), key=_first_place))


def _first_place(record: Record) -> tuple[bool, int]:
    start = spans_of(record)[0].start
    return start is None, start or 0


def split_document(
    document: Document, max_length: int, *, length: Callable[[str], int] = len, overlap: int = 100
) -> tuple[tuple[Document, ...], tuple[Record, ...]]:
    """Cut a document with gold records into documents of a window each, for training.

    Args:
        document: The document; its records need offsets.
        max_length: As for `split_windows`.
        length: As for `split_windows`, of a window's text.
        overlap: As for `split_windows`.

    Returns:
        The documents, with ids `<id>#<start>` and the records that are whole in them (of an EAE
        document only those windows that have an event); and the records that no window has whole. A
        document that fits is itself.
    """
    windows = split_windows(document.text, max_length, length=length, overlap=overlap)
    if len(windows) == 1:
        return (document,), ()
    parts, placed = [], set()
    for window in windows:
        inside = [record for record in document.records if _inside(record, window)]
        placed.update(inside)
        if document.task == "EAE" and not inside:
            continue
        records = tuple(shift_record(record, -window.start) for record in inside)
        entities = tuple(
            Entity(entity.label, entity.span.shift(-window.start), entity.confidence)
            for entity in document.entities
            if _inside(entity, window)
        )
        name = f"{document.id}#{window.start}"
        parts.append(
            replace(document, id=name, text=window.text, records=records, entities=entities)
        )
    return tuple(parts), tuple(record for record in document.records if record not in placed)


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


def _inside(record: Record, window: Window) -> bool:
    spans = spans_of(record)
    return all(
        s.start is not None
        and s.end is not None
        and window.start <= s.start
        and s.end <= window.end
        for s in spans
    )


def _distinct(arguments: Iterable[Argument]) -> tuple[Argument, ...]:
    return tuple({(x.role, x.span.start, x.span.end, x.span.text): x for x in arguments}.values())
