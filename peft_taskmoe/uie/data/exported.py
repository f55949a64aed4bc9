"""What exports of annotation tools have in common: items of a file to annotated texts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from peft_taskmoe.uie.data.file_schema import GivenSchema
from peft_taskmoe.uie.data.graph import Graph, GraphTask, Link, add_graphs
from peft_taskmoe.uie.data.placing import Placer
from peft_taskmoe.uie.data.reading import OnError, ReadError, Reading, ReadReport
from peft_taskmoe.uie.strict_json import parse_json
from peft_taskmoe.uie.wording import shown


class Item:
    """Takes the parts of one exported text, and reports those that cannot be taken.

    Args:
        data: What the tool wrote; its `id`, if it has one, is the document's.
        text: The text, and nothing else.
        line: Line of the file, or number of the item in a list.
        reading: Where problems go.
    """

    def __init__(self, data: Any, text: Any, line: int, reading: Reading) -> None:
        if not isinstance(text, str):
            raise ValueError(f"its text is `{shown(text)}`")
        id_ = data.get("id", f"{Path(reading.source).stem}-{line}")
        self.graph = Graph(id_, text, line=line)
        self.reading = reading
        self._placer = Placer(text)

    def mention(self, name: Any, label: Any, start: Any, end: Any, words: Any = None) -> None:
        """Take a mention.

        Args:
            name: What relations call it; `None` if none do.
            label: Its label.
            start: Its offset, in characters or UTF-16 units; `None` if only its words are given.
            end: The offset behind it.
            words: Its words, if they are given.
        """
        if not isinstance(label, str) or not label:
            raise ValueError(f"a label is `{shown(label)}`, not a name")
        found = None
        if start is None and end is None and isinstance(words, str):
            found = self._placer.span(words, label)
        elif type(start) is int and type(end) is int and 0 <= start < end:
            found = _at(self.graph.text, start, end, words)
        if found is not None:
            name = str(name) if name is not None else f"#{len(self.graph.mentions)}"
            self.graph.mentions[name] = {"label": label} | found
            return
        kind = "not_in_text" if start is None else "offsets"
        said = "" if words is None else f" `{shown(words)}`"
        message = f"The text does not have the mention{said} of `{label}` at {start}:{end}."
        self.reading.error(kind, f"{message} It is left out.", self.graph.line)

    def link(self, label: Any, head: Any, tail: Any) -> None:
        """Take a relation between two mentions, by their names."""
        if not isinstance(label, str) or not label:
            raise ValueError(f"a relation is `{shown(label)}`, not a name")
        self.graph.links.append(Link(label, str(head), str(tail), self.graph.line))

    def done(self) -> Graph:
        """The text with all its parts."""
        if placed := self._placer.placed:
            message = f"{placed} mentions without offsets were placed where the text has them."
            self.reading.note(message, self.graph.line, kind="aligned")
        return self.graph


def _at(text: str, start: int, end: int, words: Any) -> dict[str, Any] | None:
    if words is not None and text[start:end] != words:
        # A browser counts UTF-16 units.
        units = text.encode("utf-16-le", "surrogatepass")
        before = units[: 2 * start].decode("utf-16-le", "replace")
        inside = units[2 * start : 2 * end].decode("utf-16-le", "replace")
        start, end = len(before), len(before) + len(inside)
    if end > len(text) or words not in (None, text[start:end]):
        return None
    return {"text": text[start:end], "start": start, "end": end}


def read_export(
    path: str | Path,
    shape: Callable[[Any, int, Reading], Graph | None],
    task: GraphTask | None,
    schema: GivenSchema,
    on_error: OnError,
) -> ReadReport:
    """Read an export: a JSON list, or lines of JSON.

    Args:
        path: The file.
        shape: From an item, its number and the reading to a text; `None` leaves it out.
        task: What to read; `None`: NER, or UIE where there are relations.
        schema: As in the JSONL format; `None`: the labels that occur.
        on_error: "raise" at the first error, or "collect" them all.
    """
    path, reading = Path(path), Reading(path, on_error)
    graphs = []
    for number, item in _items(path, reading):
        try:
            graph = shape(item, number, reading)
        except ReadError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            message = f"The item is not in the format of this export: {type(error).__name__}"
            reading.error("row", f"{message}: {error}.", number)
        else:
            graphs += [graph] if graph is not None else []
    add_graphs(graphs, task, schema, reading)
    return reading.report


def _items(path: Path, reading: Reading) -> Iterable[tuple[int, Any]]:
    with path.open("rb") as file:
        first = file.readline().removeprefix(b"\xef\xbb\xbf").strip()
    return _listed_items(path, reading) if first.startswith(b"[") else reading.values(path)


def _listed_items(path: Path, reading: Reading) -> Iterator[tuple[int, Any]]:
    text = reading.decoded(path.read_bytes().removeprefix(b"\xef\xbb\xbf"))
    if text is None:
        return
    try:
        items = parse_json(text)
    except ValueError:
        yield from reading.values(path)  # a list on every line, or lines that say what is wrong
        return
    if not items:
        reading.empty()
    # Training data of spaCy may be one line, and that a list.
    yield from enumerate([items] if items and isinstance(items[0], str) else items, 1)
