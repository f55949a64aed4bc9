"""Layout of an extraction: mentions, the lines that underline them, names of records."""

from __future__ import annotations

import colorsys
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from ..records import Entity, Record, Relation, Span
from ..scoring.matching import Answer

# Okabe and Ito's colours, which people with colour blindness can tell apart, and four more.
COLOURS = (
    *("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#6a51a3", "#8c564b"),
    *("#1b9e77", "#a6761d", "#e7298a", "#666666"),
)
MAX_LINES = 8
"""Lines below a word; mentions that are nested deeper are shown by their tags alone."""
MAX_MARKED = 40
"""Relations, and events, of one text that are marked as a whole when one points at a part."""

# Characters that would act rather than show, each with one visible character in its place.
VISIBLE = (
    {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"}
    | {0x7F: 0x2421}
    | dict.fromkeys([*range(0x80, 0xA0), *range(0xD800, 0xE000)], 0xFFFD)
)


class Shown(Answer, Protocol):
    """An answer with its text; offsets of its records are those of the text."""

    @property
    def text(self) -> str:
        """The text."""


@dataclass(frozen=True)
class Mention:
    """A place in the text that some records name.

    Attributes:
        start: Its first character.
        end: Behind its last character.
        words: What it is shown as: a label or a role.
        label: The label of the record, which has the colour.
        numbers: The relations and events it belongs to, as `R1` and `E2`.
        confidence: That of the entity it is, if it has one.
    """

    start: int
    end: int
    words: str
    label: str
    numbers: tuple[str, ...] = ()
    confidence: float | None = None

    @cached_property
    def marks(self) -> tuple[str, ...]:
        """The names of the relations and events that are marked when one points at a part."""
        return tuple(filter(is_marked, self.numbers))


def is_marked(name: str) -> bool:
    """Whether a relation or event is among the first of its text, which are marked as a whole."""
    return int(name[1:]) <= MAX_MARKED


def colours_of(items: Sequence[Shown]) -> dict[str, str]:
    """A colour for every label, the same wherever it stands."""
    labels = dict.fromkeys(record.label for item in items for record in item.records)
    return {label: _colour(i) for i, label in enumerate(labels)}


def _colour(i: int) -> str:
    if i < len(COLOURS):
        return COLOURS[i]
    golden = (i * 0.618034) % 1  # neighbours are far apart, and no two are the same
    rgb = colorsys.hls_to_rgb(golden, (0.26, 0.36, 0.46)[i % 3], 0.6)
    return "#" + "".join(f"{round(255 * share):02x}" for share in rgb)


def numbered(records: Sequence[Record]) -> list[tuple[str, Record]]:
    """Records with their names: R1, R2, ... for relations, E1, E2, ... for events, "" else."""
    counts = {"R": 0, "E": 0}
    named: list[tuple[str, Record]] = []
    for record in records:
        letter = "" if isinstance(record, Entity) else "R" if isinstance(record, Relation) else "E"
        if letter:
            counts[letter] += 1
            letter += str(counts[letter])
        named.append((letter, record))
    return named


def has_place(span: Span, text: str) -> bool:
    """Whether the span can be marked in the text."""
    start, end = span.start, span.end
    return start is not None and end is not None and 0 <= start < end <= len(text)


def parts_of(record: Record) -> list[tuple[str, Span]]:
    """The mentions of a record, each with what it is shown as."""
    if isinstance(record, Entity):
        return [(record.label, record.span)]
    if isinstance(record, Relation):
        return [(f"{record.label}: head", record.head), (f"{record.label}: tail", record.tail)]
    arguments = [(argument.role, argument.span) for argument in record.arguments]
    return [(record.label, record.trigger), *arguments]


def mentions_of(item: Shown) -> list[Mention]:
    """The places that records name, each once for a label; those that end first come first."""
    numbers: dict[tuple[int, int, str, str], dict[str, None]] = {}
    confidences: dict[tuple[int, int, str, str], float | None] = {}
    for name, record in numbered(item.records):
        for words, span in parts_of(record):
            if has_place(span, item.text):
                place = (span.start or 0, span.end or 0, words, record.label)
                numbers.setdefault(place, {}).update({name: None} if name else {})
                if isinstance(record, Entity):
                    confidences[place] = record.confidence
    found = [Mention(*p, tuple(names), confidences.get(p)) for p, names in numbers.items()]
    return sorted(found, key=lambda mention: (mention.end, mention.end - mention.start))


def lines_of(mentions: Sequence[Mention]) -> list[int | None]:
    """The line below each mention: the first free one, short mentions first; None where none is."""
    lines: list[int | None] = [None] * len(mentions)
    taken: list[tuple[list[int], list[int]]] = [([], []) for _ in range(MAX_LINES)]
    for i in sorted(range(len(mentions)), key=lambda i: mentions[i].end - mentions[i].start):
        start, end = mentions[i].start, mentions[i].end
        for line, (starts, ends) in enumerate(taken):
            at = bisect_left(starts, start)
            if (at == 0 or ends[at - 1] <= start) and (at == len(starts) or end <= starts[at]):
                starts.insert(at, start)
                ends.insert(at, end)
                lines[i] = line
                break
    return lines
