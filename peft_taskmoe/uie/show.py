"""Extractions for the eye: one HTML page without scripts or outside resources, and rich text for a terminal.

It knows records, problems and HTML. It does not know where they come from: anything with `text`, `records`
and `problems` can be shown. Nothing of a text, a label or an answer reaches the page or the terminal unescaped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import TYPE_CHECKING, Protocol

from .records import Entity, Problem, Record, Relation, Span

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

# Okabe and Ito's colours, which people with colour blindness can tell apart; lighter ones follow for more labels.
COLOURS = (
    *("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#6a51a3", "#8c564b"),
    *("#1b9e77", "#a6761d", "#e7298a", "#666666"),
)
# Characters that would act rather than show, each with one visible character in its place, so that offsets stay.
_VISIBLE = (
    {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\n\t"}
    | {0x7F: 0x2421}
    | dict.fromkeys([*range(0x80, 0xA0), *range(0xD800, 0xE000)], 0xFFFD)
)
_STYLE = """
.uie{font:16px/1.5 system-ui,sans-serif;background:#fff;color:#111;margin:0 0 1.5em;padding:.6em 1em;border:1px solid #ccc;\
border-radius:6px;overflow-x:auto}
.uie .text{white-space:pre-wrap;overflow-wrap:anywhere}
.uie .part{background-repeat:no-repeat;-webkit-box-decoration-break:clone;box-decoration-break:clone}
.uie .tag{font-size:.65em;font-weight:600;border-radius:3px;padding:.1em .4em;margin:0 .2em;white-space:nowrap;\
user-select:none;unicode-bidi:isolate;text-decoration:none}
.uie .long{white-space:normal}
.uie .tag:target{outline:3px solid #000}
.uie table{border-collapse:collapse;margin:.6em 0;font-size:.9em}
.uie th,.uie td{text-align:start;vertical-align:top;padding:.15em .8em .15em 0;border-top:1px solid #eee}
.uie .legend .tag{font-size:.75em}
.uie .problems{font-size:.85em;color:#7a1f00}
.uie code{overflow-wrap:anywhere}
"""


class Shown(Protocol):
    """What can be shown."""

    @property
    def text(self) -> str:
        """The text."""

    @property
    def records(self) -> Sequence[Record]:
        """Records with offsets of the text."""

    @property
    def problems(self) -> Sequence[Problem]:
        """What could not be taken as it stands."""


@dataclass(frozen=True)
class _Mention:
    """A place in the text that some records name.

    Attributes:
        start: Its first character.
        end: Behind its last character.
        label: What it is shown as.
        colour: The colour of its label.
        classes: The numbers of the relations and events it belongs to (`R1`, `E2`), by which the page links them.
        confidence: That of the entity it is, if it has one.
    """

    start: int
    end: int
    label: str
    colour: str
    classes: tuple[str, ...] = ()
    confidence: float | None = None

    @property
    def title(self) -> str:
        """What the page says of it when it is pointed at."""
        place = f"[{self.start}:{self.end}]"
        return place if self.confidence is None else f"{place} {self.confidence:.2f}"


def to_page(items: Sequence[Shown]) -> str:
    """A whole HTML page; see `to_html`."""
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        '<!DOCTYPE html>\n<html lang="und"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width"><title>Extractions</title></head>\n'
        f"<body>\n{to_html(items)}</body></html>\n"
    )


def to_html(items: Sequence[Shown]) -> str:
    """HTML to put into a page: for each text its mentions, relations, events and problems, and a legend.

    Mentions may nest and overlap: each has its own underline, and its tag behind its last character; pointing at a tag shows
    its offsets and an entity's confidence. Relations and events are numbered; their numbers stand at their mentions, and
    pointing at one marks all that belongs to it.
    """
    return f"<style>{_STYLE}</style>\n" + "".join(
        _item(item, number) for number, item in enumerate(items)
    )


def show(items: Iterable[Shown], console: Console | None = None) -> None:
    """Print extractions: with colours in a terminal, as HTML in a notebook.

    Args:
        items: What to show.
        console: The rich console to print to; None makes one.
    """
    from rich.console import Console

    console = console or Console()
    items = list(items)
    if console.is_jupyter:
        from IPython.display import HTML, display

        display(HTML(to_html(items)))
        return
    for item in items:
        console.print(_rich(item))


# --- HTML ----------------------------------------------------------------------------------------------------------


def _item(item: Shown, number: int) -> str:
    colours = _colours(item.records)
    mentions = _mentions(item.records, colours)
    digest = hashlib.blake2b(
        repr((number, item.text, item.records)).encode("utf-8", "replace"), digest_size=6
    )
    key = f"u{digest.hexdigest()}"
    body = [_text(item.text, mentions, key)]
    linked = [
        (name, record) for name, record in _numbered(item.records) if not isinstance(record, Entity)
    ]
    if linked:
        rows = "".join(_row(name, record, colours, key, mentions) for name, record in linked)
        body.append(f"<table>{rows}</table>")
    if unplaced := [
        record
        for record in item.records
        if isinstance(record, Entity) and record.span.start is None
    ]:
        body.append(
            f"<p>Without a place: {', '.join(_words(record.span, record.label) for record in unplaced)}</p>"
        )
    if item.problems:
        rows = "".join(
            f"<li><b>{escape(problem.kind)}</b>: {_clean(problem.message)} <bdi><code>{_clean(problem.source)}</code></bdi></li>"
            for problem in item.problems
        )
        counted = f"{len(item.problems)} problem{'s' if len(item.problems) > 1 else ''}"
        body.append(
            f'<details class="problems" open><summary>{counted}</summary><ul>{rows}</ul></details>'
        )
    if colours:
        tags = "".join(_tag(label, colour) for label, colour in colours.items())
        body.append(f'<p class="legend">{tags}</p>')
    rules = "".join(
        f"#{key}:has(.{name}:hover) .{name}{{outline:2px solid #000;outline-offset:1px}}"
        for name, _ in linked
    )
    style = f"<style>{rules}</style>" if rules else ""
    return f'{style}<section class="uie" id="{key}">{"".join(body)}</section>\n'


def _text(text: str, mentions: Sequence[_Mention], key: str) -> str:
    """The text in parts that begin and end where mentions do, each underlined once for every mention that covers it."""
    levels = _levels(mentions)
    height = 4 * (max(levels, default=-1) + 1)
    cuts = sorted({0, len(text), *(m.start for m in mentions), *(m.end for m in mentions)})
    ending: dict[int, list[int]] = {}
    for i, mention in enumerate(mentions):
        ending.setdefault(mention.end, []).append(i)
    opening: dict[int, list[int]] = {}
    for i, mention in enumerate(mentions):
        opening.setdefault(mention.start, []).append(i)
    html: list[str] = []
    inside: set[int] = set()

    def underlined(words: str) -> str:
        if not inside or not words:
            return words
        over = sorted(inside, key=lambda i: levels[i])
        lines = ",".join(
            f"linear-gradient({mentions[i].colour},{mentions[i].colour})" for i in over
        )
        places = ",".join(f"0 calc(100% - {height - 4 - 4 * levels[i]}px)" for i in over)
        classes = " ".join(
            dict.fromkeys(["part", *(name for i in over for name in mentions[i].classes)])
        )
        return (
            f'<span class="{classes}" style="background-image:{lines};background-position:{places};'
            f'background-size:100% 3px;padding-bottom:{height}px">{words}</span>'
        )

    for start, end in pairwise(cuts):
        inside |= set(opening.get(start, ()))
        html.append(underlined(_clean(text[start:end])))
        inside -= set(ending.get(end, ()))
        tags = ""
        for i in ending.get(end, ()):  # inner mentions first
            mention = mentions[i]
            numbers = " ".join((mention.label, *mention.classes))
            tags += _tag(numbers, mention.colour, mention.classes, f"{key}m{i}", mention.title)
        html.append(underlined(tags))
    # Room for the underlines between the lines of the text, and below the last one.
    style = f"line-height:calc(1.7em + {height}px);padding-bottom:{height // 2}px"
    return f'<div class="text" dir="auto" style="{style}">{"".join(html)}</div>'


def _row(
    name: str, record: Record, colours: dict[str, str], key: str, mentions: Sequence[_Mention]
) -> str:
    place = {(m.start, m.end, c): i for i, m in enumerate(mentions) for c in m.classes}

    def link(span: Span) -> str:
        target = place.get((span.start, span.end, name))  # type: ignore[arg-type]
        words = f"<bdi>{_clean(span.text)}</bdi>"
        return words if target is None else f'<a href="#{key}m{target}">{words}</a>'

    if isinstance(record, Relation):
        said = f"{link(record.head)} → {link(record.tail)}"
    else:
        assert not isinstance(record, Entity)
        roles = "".join(
            f"<br>{_clean(argument.role)}: {link(argument.span)}" for argument in record.arguments
        )
        said = f"{link(record.trigger)}{roles}"
    confidence = "" if record.confidence is None else f"{record.confidence:.2f}"
    tag = _tag(record.label, colours[record.label])
    return (
        f'<tr class="{name}"><td>{name}</td><td>{tag}</td><td>{said}</td><td>{confidence}</td></tr>'
    )


def _tag(
    words: str, colour: str, classes: Sequence[str] = (), name: str = "", title: str = ""
) -> str:
    place = f' id="{name}" title="{title}"' if name else ""
    names = " ".join(("tag", *(("long",) if len(words) > 40 else ()), *classes))
    style = f"background:{colour};color:{_ink(colour)}"
    return f'<span class="{names}" style="{style}"{place}>{_clean(words)}</span>'


def _ink(colour: str) -> str:
    """White or black, whichever has the greater contrast with a colour (WCAG 2.2, relative luminance)."""
    shares = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in shares)
    luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    return "#fff" if 1.05 / (luminance + 0.05) > (luminance + 0.05) / 0.05 else "#000"


def _words(span: Span, label: str) -> str:
    return f"<bdi>{_clean(span.text)}</bdi> ({_clean(label)})"


def _clean(words: str) -> str:
    return escape(words.translate(_VISIBLE))


# --- the terminal --------------------------------------------------------------------------------------------------


def _rich(item: Shown) -> Text:
    from rich.text import Text

    def plain(words: str) -> str:
        return words.translate(_VISIBLE)

    colours = _colours(item.records)
    text = Text(plain(item.text))
    for mention in _mentions(item.records, colours):
        text.stylize(f"bold underline {mention.colour}", mention.start, mention.end)
    text.append("\n")
    for name, record in _numbered(item.records):
        text.append(f"  {name or '·'} ")
        text.append(plain(record.label), style=f"bold {colours[record.label]}")
        if isinstance(record, Entity):
            said = _placed(record.span)
        elif isinstance(record, Relation):
            said = f"{_placed(record.head)} → {_placed(record.tail)}"
        else:
            said = _placed(record.trigger) + "".join(
                f"; {a.role}: {_placed(a.span)}" for a in record.arguments
            )
        text.append(plain(f"  {said}"))
        if record.confidence is not None:
            text.append(f"  {record.confidence:.2f}", style="dim")
        text.append("\n")
    for problem in item.problems:
        text.append(plain(f"  {problem.kind}: {problem.message} {problem.source}\n"), style="red")
    return text


def _placed(span: Span) -> str:
    return span.text if span.start is None else f"{span.text} [{span.start}:{span.end}]"


# --- both ----------------------------------------------------------------------------------------------------------


def _colours(records: Sequence[Record]) -> dict[str, str]:
    labels = dict.fromkeys(record.label for record in records)
    return {label: COLOURS[i % len(COLOURS)] for i, label in enumerate(labels)}


def _numbered(records: Sequence[Record]) -> list[tuple[str, Record]]:
    """Records with their names: R1, R2, ... for relations, E1, E2, ... for events, none for entities."""
    counts = {"R": 0, "E": 0}
    named: list[tuple[str, Record]] = []
    for record in records:
        if isinstance(record, Entity):
            named.append(("", record))
            continue
        letter = "R" if isinstance(record, Relation) else "E"
        counts[letter] += 1
        named.append((f"{letter}{counts[letter]}", record))
    return named


def _mentions(records: Sequence[Record], colours: dict[str, str]) -> list[_Mention]:
    """The places that records name, once for each place and label; shorter ones that end at one place first."""
    classes: dict[tuple[int, int, str, str], dict[str, None]] = {}

    confidences: dict[tuple[int, int, str, str], float | None] = {}

    def add(span: Span, label: str, colour: str, name: str) -> None:
        if span.start is not None and span.end is not None:
            classes.setdefault((span.start, span.end, label, colour), {}).update(
                {name: None} if name else {}
            )

    for name, record in _numbered(records):
        colour = colours[record.label]
        if isinstance(record, Entity):
            add(record.span, record.label, colour, "")
            if record.span.start is not None and record.span.end is not None:
                confidences[record.span.start, record.span.end, record.label, colour] = (
                    record.confidence
                )
        elif isinstance(record, Relation):
            add(record.head, f"{record.label}: head", colour, name)
            add(record.tail, f"{record.label}: tail", colour, name)
        else:
            add(record.trigger, record.label, colour, name)
            for argument in record.arguments:
                add(argument.span, argument.role, colour, name)
    found = [
        _Mention(*place, tuple(names), confidences.get(place)) for place, names in classes.items()
    ]
    return sorted(found, key=lambda mention: (mention.end, mention.end - mention.start))


def _levels(mentions: Sequence[_Mention]) -> list[int]:
    """The line on which each mention is underlined: the first that is free; longer mentions choose later, and lie lower."""
    levels = [0] * len(mentions)
    lines: list[list[_Mention]] = []
    for i in sorted(range(len(mentions)), key=lambda i: mentions[i].end - mentions[i].start):
        mention = mentions[i]
        for level, line in enumerate(lines):
            if all(other.end <= mention.start or mention.end <= other.start for other in line):
                levels[i] = level
                line.append(mention)
                break
        else:
            levels[i] = len(lines)
            lines.append([mention])
    return levels
