"""JSONL exports of doccano: sequence labelling, with or without relations."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft_taskmoe.uie.data.exported import graph_of, read_export
from peft_taskmoe.uie.data.file_schema import GivenSchema
from peft_taskmoe.uie.data.graph import Graph, GraphTask
from peft_taskmoe.uie.data.reading import OnError, Reading, ReadReport
from peft_taskmoe.uie.wording import shown

_KNOWN = {"id", "text", "data", "label", "labels", "entities", "relations", "Comments"}


def read_doccano(
    path: str | Path,
    *,
    task: GraphTask | None = None,
    schema: GivenSchema = None,
    on_error: OnError = "raise",
) -> ReadReport:
    """Read a JSONL export of doccano: sequence labelling, with or without relations.

    A line is `{"id", "text", "label": [[start, end, label], ...]}` (also `data` for the text and
    `labels`), or `{"id", "text", "entities": [{"id", "label", "start_offset", "end_offset"}],
    "relations": [{"type", "from_id", "to_id"}]}`. Other keys go to `extra`. An entity without
    offsets that has a `text` is placed where the text has its words.

    Args:
        path: The file.
        task: What to read; `None`: NER, or UIE where there are relations.
        schema: As in the JSONL format; `None`: the labels of the file, without descriptions.
        on_error: "raise" at the first error, or "collect" them all.

    Raises:
        ReadError: At the first error, where asked to.
    """
    return read_export(path, _graph, task, schema, on_error)


def _graph(data: Mapping[str, Any], line: int, reading: Reading) -> Graph:
    graph = graph_of(data, data["text" if "text" in data else "data"], line, reading)
    given = [data[key] for key in ("label", "labels", "entities") if key in data]
    filled = [marked for marked in given if marked]
    marked = next(iter(filled or given), None)
    if not isinstance(marked, list) or any(isinstance(one, str) for one in marked):
        raise ValueError(f"its labels are `{shown(marked)}`, not places in the text")
    if len(filled) > 1:
        reading.note("Of `label`, `labels` and `entities` only the first is read.", line)
    for one in marked:
        if isinstance(one, Mapping):
            start, end = one.get("start_offset"), one.get("end_offset")
            graph.add_mention(one.get("id"), one["label"], start, end, one.get("text"))
        else:
            start, end, label = one
            graph.add_mention(None, label, start, end)
    for link in data.get("relations") or ():
        graph.add_link(link["type"], link["from_id"], link["to_id"])
    graph.extra = {key: value for key, value in data.items() if key not in _KNOWN}
    return graph
