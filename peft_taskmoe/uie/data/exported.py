"""Exports of annotation tools: a JSON list, or lines of JSON, each an annotated text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from peft_taskmoe.uie.data.file_schema import GivenSchema
from peft_taskmoe.uie.data.graph import Graph, GraphTask, add_graphs
from peft_taskmoe.uie.data.reading import OnError, Reading, ReadReport
from peft_taskmoe.uie.strict_json import parse_json
from peft_taskmoe.uie.wording import shown


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
    graphs = [graph for _, graph in reading.shaped(_items(path, reading), shape)]
    add_graphs(graphs, task, schema, reading)
    return reading.report


def graph_of(data: Any, text: Any, line: int, reading: Reading) -> Graph:
    """The text of an item without annotations; its `id`, if it has one, is the document's."""
    if not isinstance(text, str):
        raise ValueError(f"its text is `{shown(text)}`")
    return Graph(data.get("id", f"{Path(reading.source).stem}-{line}"), text, reading, line)


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
