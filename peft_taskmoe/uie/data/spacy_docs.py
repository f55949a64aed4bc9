"""Documents of spaCy, as DocBin or JSONL, and of Prodigy."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft_taskmoe.optional import needed
from peft_taskmoe.uie.data.exported import graph_of, read_export
from peft_taskmoe.uie.data.file_schema import GivenSchema
from peft_taskmoe.uie.data.graph import Graph, GraphTask, Link, add_graphs
from peft_taskmoe.uie.data.reading import OnError, Reading, ReadReport
from peft_taskmoe.uie.wording import listed

_RELATIONS = ("._.", "rel", None, None)  # where a document keeps its extension `rel`


def read_spacy(
    path: str | Path,
    *,
    task: GraphTask | None = None,
    schema: GivenSchema = None,
    on_error: OnError = "raise",
) -> ReadReport:
    """Read a `DocBin` (`.spacy`), or JSONL of spaCy or Prodigy.

    Mentions are a document's entities (Prodigy: `spans`). Relations are Prodigy's, or those of the
    extension `rel`, `{(first token of head, first token of tail): {label: score}}`, of which those
    with a score of at least 0.5 are read. A JSONL line is `Doc.to_json()`, a training example
    `[text, {"entities": [[start, end, label]]}]` or a task of Prodigy, read if it was accepted.
    Span groups (`doc.spans`) are not read; a note says where a text has some.

    Arguments and errors are those of `read_doccano`.

    Raises:
        ImportError: The file is a `DocBin` and spaCy is not installed.
    """
    if Path(path).suffix != ".spacy":
        return read_export(path, _graph, task, schema, on_error)
    reading = Reading(path, on_error)
    graphs = [_doc_graph(doc, n, reading) for n, doc in enumerate(_docs(Path(path), reading), 1)]
    add_graphs(graphs, task, schema, reading)
    return reading.report


def _graph(data: Any, line: int, reading: Reading) -> Graph | None:
    if isinstance(data, list):
        text, marked = data
        data = {"text": text, "ents": marked["entities"], "spans": marked.get("spans")}
    if data.get("answer", "accept") != "accept":
        reading.note(f"The answer is `{data['answer']}`; the text is left out.", line)
        return None
    graph = graph_of(data, data["text"], line, reading)
    spans = data.get("spans")
    _note_groups(spans if isinstance(spans, Mapping) else {}, line, reading)
    for one in spans if isinstance(spans, list) else data.get("ents", ()):
        mapped = isinstance(one, Mapping)
        start, end, label = (one.get(k) for k in ("start", "end", "label")) if mapped else one
        words = one.get("text") if mapped else None
        graph.add_mention(f"{start}:{end}" if start is not None else None, label, start, end, words)
    for link in data.get("relations") or ():
        ends = [f"{link[end]['start']}:{link[end]['end']}" for end in ("head_span", "child_span")]
        graph.add_link(link["label"], *ends)
    return graph


def _note_groups(groups: Mapping[str, Any], line: int, reading: Reading) -> None:
    if names := [name for name, spans in groups.items() if len(spans)]:
        message = f"The span groups {listed(names)} are not read; mentions are the entities."
        reading.note(message, line)


def _docs(path: Path, reading: Reading) -> Any:
    spacy, tokens = needed("spacy", "spacy"), needed("spacy.tokens", "spacy")
    try:
        return list(tokens.DocBin().from_disk(path).get_docs(spacy.blank("xx").vocab))
    except (ValueError, KeyError, TypeError, zlib.error) as error:
        reading.error("row", f"The file is no DocBin: {error}")
        return []


def _doc_graph(doc: Any, number: int, reading: Reading) -> Graph:
    graph = Graph(f"{Path(reading.source).stem}-{number}", doc.text, reading, number)
    _note_groups(doc.spans, number, reading)
    for span in doc.ents:
        place = {"text": span.text, "start": span.start_char, "end": span.end_char}
        graph.mentions[str(span.start)] = {"label": span.label_} | place
    try:
        graph.links = [
            Link(label, str(head), str(tail), number)
            for (head, tail), scores in (doc.user_data.get(_RELATIONS) or {}).items()
            for label, score in scores.items()
            if score >= 0.5
        ]
    except (AttributeError, TypeError, ValueError):
        reading.note("The extension `rel` has another form; it is not read.", number)
    return graph
