"""Extractions as rich text for a terminal; in a notebook, as HTML."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from ...optional import needed
from ..records import Entity, Relation, Span
from .html import to_html
from .layout import VISIBLE, Shown, colours_of, mentions_of, numbered, parts_of

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text


def show(items: Iterable[Shown], console: Console | None = None) -> None:
    """Print extractions: with colours in a terminal, as HTML in a notebook.

    Args:
        items: What to show.
        console: The rich console to print to; None makes one.
    """
    needed("rich", "uie")
    from rich.console import Console

    console = console or Console()
    items = list(items)
    if console.is_jupyter:
        from IPython.display import HTML, display

        display(HTML(to_html(items)))
        return
    colours = colours_of(items)
    for item in items:
        text = _rich(item, colours)
        # What the terminal's code page does not have becomes a question mark, not an error.
        text.plain = text.plain.encode(console.encoding, "replace").decode(console.encoding)
        console.print(text)


def _rich(item: Shown, colours: dict[str, str]) -> Text:
    from rich.text import Text

    text = Text(_plain(item.text))
    for mention in mentions_of(item):
        text.stylize(f"bold underline {colours[mention.label]}", mention.start, mention.end)
    text.append("\n")
    for name, record in numbered(item.records):
        text.append(f"  {name or '·'} ")
        text.append(_plain(record.label), style=f"bold {colours[record.label]}")
        first, *others = [(words, _placed(span)) for words, span in parts_of(record)]
        said = first[1]
        if isinstance(record, Relation):
            said += f" → {others[0][1]}"
        elif not isinstance(record, Entity):
            said += "".join(f"; {role}: {placed}" for role, placed in others)
        text.append(_plain(f"  {said}"))
        if record.confidence is not None:
            text.append(f"  {record.confidence:.2f}", style="dim")
        text.append("\n")
    for problem in item.problems:
        text.append(_plain(f"  {problem.kind}: {problem.message} {problem.source}\n"), style="red")
    return text


def _plain(words: str) -> str:
    return words.translate(VISIBLE)


def _placed(span: Span) -> str:
    return span.text if span.start is None else f"{span.text} [{span.start}:{span.end}]"
