"""Extractions and tables as HTML: one file without scripts or outside resources.

Every word of a text, a label or an answer is escaped by the templates (autoescape).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from ..records import Entity
from ..tables import Table
from .layout import (
    MAX_LINES,
    MAX_MARKED,
    VISIBLE,
    Mention,
    Shown,
    colours_of,
    has_place,
    is_marked,
    lines_of,
    mentions_of,
    numbered,
    parts_of,
)

_MAX_NUMBERS = 12  # of relations and events, in one tag


def to_page(items: Sequence[Shown]) -> str:
    """A whole HTML page; see `to_html`."""
    return _extractions(items, page=True)


def to_html(items: Sequence[Shown]) -> str:
    """HTML to put into a page: a legend, and each text with its records and problems.

    Mentions may nest and overlap: each has a line of its own, and its tag behind its last
    character. Pointing at a tag shows its offsets and an entity's confidence. Relations and events
    are numbered; pointing at a number marks all that belongs to it.
    """
    return _extractions(items, page=False)


def tables_to_html(tables: Sequence[Table], notes: Sequence[str] = ()) -> str:
    """Tables below their titles, and notes."""
    return template("tables").render(tables=tables, notes=notes)


@cache
def template(name: str) -> Any:
    """A template of this folder."""
    import jinja2  # takes a while, and only pages need it

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: value.translate(VISIBLE) if isinstance(value, str) else value,
    )
    return environment.get_template(f"{name}.html.jinja")


@dataclass
class _Part:
    """A stretch of the text over which the same mentions lie, or the tags at its end."""

    words: str
    over: Sequence[tuple[int, Mention]]
    tags: Sequence[tuple[int, Mention]] = ()

    @property
    def marks(self) -> str:
        """The classes of the relations and events over it."""
        return " ".join(dict.fromkeys(mark for _, mention in self.over for mark in mention.marks))


@dataclass
class _Item:
    """A text as the template shows it."""

    mentions: list[Mention]
    parts: list[_Part]
    height: int
    linked: list[dict[str, Any]] = field(default_factory=list)
    unplaced: list[Entity] = field(default_factory=list)
    problems: Sequence[Any] = ()
    too_deep: int = 0


def _extractions(items: Sequence[Shown], page: bool) -> str:
    colours = colours_of(items)
    content = repr([(item.text, item.records) for item in items]).encode("utf-8", "replace")
    counts = Counter(record.label for item in items for record in item.records)
    shown = [_item(item) for item in items]
    return str(
        template("extractions").render(
            page=page,
            key=f"u{hashlib.blake2b(content, digest_size=6).hexdigest()}",
            items=shown,
            labels=[(label, counts[label]) for label in colours],
            number={label: i for i, label in enumerate(colours)},
            light=[(colour, ink(colour)) for colour in colours.values()],
            dark=[(light, ink(light)) for light in map(_lighter, colours.values())],
            marked=min(MAX_MARKED, max((len(item.linked) for item in shown), default=0)),
            max_lines=MAX_LINES,
            max_numbers=_MAX_NUMBERS,
        )
    )


def _item(item: Shown) -> _Item:
    mentions = mentions_of(item)
    lines = lines_of(mentions)
    height = 1 + max((line for line in lines if line is not None), default=-1)
    shown = _Item(mentions, list(_parts(item.text, mentions, lines)), height)
    shown.problems, shown.too_deep = item.problems, lines.count(None)
    place = {(m.start, m.end, name): i for i, m in enumerate(mentions) for name in m.numbers}
    for name, record in numbered(item.records):
        if isinstance(record, Entity):
            shown.unplaced += [] if has_place(record.span, item.text) else [record]
            continue
        spans = [(w, s.text, place.get((s.start, s.end, name))) for w, s in parts_of(record)]  # type: ignore[arg-type]
        mark = name if is_marked(name) else ""
        shown.linked.append({"name": name, "mark": mark, "record": record, "spans": spans})
    return shown


def _parts(text: str, mentions: Sequence[Mention], lines: Sequence[int | None]) -> Iterator[_Part]:
    """The text in parts that begin and end where mentions do, each with the lines below it."""
    opening: dict[int, list[int]] = {}
    ending: dict[int, list[int]] = {}
    for i, mention in enumerate(mentions):
        opening.setdefault(mention.start, []).append(i)
        ending.setdefault(mention.end, []).append(i)
    inside: dict[int, Mention] = {}
    for start, end in pairwise(sorted({0, len(text), *opening, *ending})):
        inside |= {
            line: mentions[i] for i in opening.get(start, ()) if (line := lines[i]) is not None
        }
        yield _Part(text[start:end], sorted(inside.items()))
        ends = ending.get(end, ())
        for i in ends:
            if (line := lines[i]) is not None:
                del inside[line]
        if ends:  # inner mentions first
            yield _Part("", sorted(inside.items()), [(i, mentions[i]) for i in ends])


def _lighter(colour: str) -> str:
    """A third of the way to white, for dark pages."""
    parts = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{part + (255 - part) // 3:02x}" for part in parts)


def ink(colour: str) -> str:
    """White or black, whichever has the greater contrast with a colour (WCAG 2.2)."""
    shares = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in shares)
    luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    return "#fff" if 1.05 / (luminance + 0.05) > (luminance + 0.05) / 0.05 else "#000"
