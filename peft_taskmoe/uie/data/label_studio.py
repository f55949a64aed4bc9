"""JSON exports of Label Studio: text regions with labels, and relations."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft_taskmoe.uie.data.exported import graph_of, read_export
from peft_taskmoe.uie.data.file_schema import GivenSchema
from peft_taskmoe.uie.data.graph import Graph, GraphTask
from peft_taskmoe.uie.data.placing import counts_units
from peft_taskmoe.uie.data.reading import OnError, Reading, ReadReport
from peft_taskmoe.uie.wording import shown


def read_label_studio(
    path: str | Path,
    *,
    task: GraphTask | None = None,
    schema: GivenSchema = None,
    on_error: OnError = "raise",
) -> ReadReport:
    """Read a JSON or JSON-MIN export of Label Studio: text regions with labels, and relations.

    Of several annotations of a text the first that was not cancelled is read, and a text without
    one is left out, since a text where nothing is marked teaches to find nothing. A relation to the
    left is turned round. Offsets that count UTF-16 units, as a browser does, are converted
    where more of a text's regions fit so. A region without offsets is placed where the text has its
    words. JSON-MIN has no relations.

    Arguments and errors are those of `read_doccano`.
    """
    return read_export(path, _graph, task, schema, on_error)


def _graph(data: Mapping[str, Any], line: int, reading: Reading) -> Graph | None:
    fields = data.get("data", data)
    texts = [value for key, value in fields.items() if isinstance(value, str) and key != "id"]
    if "text" not in fields and len(texts) != 1:
        raise ValueError(f"it has no `text` (keys: {', '.join(fields)})")
    text = fields["text"] if "text" in fields else texts[0]
    graph = graph_of(data, text, line, reading)
    results = _results(data, line, reading)
    if results is None:
        reading.note("Nobody annotated the text, or it was skipped; it is left out.", line)
        return None
    graph.units = counts_units(text, map(_place, results))
    for result in results:
        if result.get("type") == "relation":
            head, tail = result["from_id"], result["to_id"]
            if result.get("direction") == "left":
                head, tail = tail, head
            for label in result.get("labels") or [""]:
                graph.add_link(label, head, tail)
        else:
            _take_region(result, graph)
    return graph


def _take_region(result: Mapping[str, Any], graph: Graph) -> None:
    value = result.get("value", result)
    labels = value.get("labels") or value.get("hypertextlabels")
    if not labels:
        kind = shown(result.get("type"))
        graph.reading.note(f"The result `{kind}` marks no words of the text.", graph.line)
    for n, label in enumerate(labels or ()):
        graph.add_mention(result.get("id") if n == 0 else None, label, *_place(result))


def _place(result: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """Start, end and words of a region."""
    value = result.get("value", result)
    place = value.get("globalOffsets", value)
    return place.get("start"), place.get("end"), value.get("text")


def _results(
    data: Mapping[str, Any], line: int, reading: Reading
) -> list[Mapping[str, Any]] | None:
    """What one annotator marked, None if nobody did; of JSON-MIN, the regions."""
    given = data.get("annotations", data.get("completions"))
    if given is None:
        lists = [value for value in data.values() if isinstance(value, list)]
        return [region for regions in lists for region in regions if isinstance(region, Mapping)]
    usable = [one["result"] for one in given if not one.get("was_cancelled")]
    if len(usable) > 1:
        reading.note(f"The text has {len(usable)} annotations; the first is read.", line)
    return list(usable[0]) if usable else None
