"""Texts as annotation tools store them, mentions and links between them, to rows of JSONL."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from peft_taskmoe.uie.data.file_schema import GivenSchema, schema_of_file
from peft_taskmoe.uie.data.reading import Reading

GraphTask = Literal["NER", "RE", "EE", "UIE"]


class Link(NamedTuple):
    """A labelled pair of mentions, by their ids, and the line that says it."""

    label: str
    head: str
    tail: str
    line: int | None = None


class Happening(NamedTuple):
    """An event: its label, its trigger's id, (role, id) of its arguments, and its line."""

    label: str
    trigger: str
    arguments: Sequence[tuple[str, str]]
    line: int | None = None


@dataclass
class Graph:
    """One annotated text.

    Attributes:
        id: Its id.
        text: The text.
        mentions: By id: `{"label", "text", "start", "end"}`.
        links: Relations between mentions.
        events: Events by id; an argument may be an event.
        extra: Other keys of the row.
        line: Where it stands.
        file: The file, if it is not the one that is read.
    """

    id: Any
    text: str
    mentions: dict[str, dict[str, Any]] = field(default_factory=dict)
    links: list[Link] = field(default_factory=list)
    events: dict[str, Happening] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    line: int | None = None
    file: Path | None = None

    def row(self, task: str, reading: Reading) -> dict[str, Any]:
        """What the task reads of it, as a row without schema; the rest becomes notes."""
        triggers = {event.trigger for event in self.events.values()}
        entities = [x for name, x in self.mentions.items() if name not in triggers]
        annotations: list[dict[str, Any]] = entities if task in ("NER", "UIE") else []
        if task in ("RE", "UIE"):
            annotations = annotations + self._relations(reading)
        else:
            for link in self.links:
                reading.note(f"The relation is not read for {task}.", link.line, self.file)
        if task in ("EE", "UIE"):
            annotations = annotations + self._events(reading)
        else:
            for event in self.events.values():
                reading.note(f"The event is not read for {task}.", event.line, self.file)
        row = {"id": self.id, "text": self.text, "task": task, "annotations": annotations}
        return self.extra | row | ({"entities": entities} if task == "RE" else {})

    def labels(self) -> dict[str, set[str]]:
        """The labels of each group, whatever the task."""
        return {
            "NER": {mention["label"] for mention in self.mentions.values()},
            "RE": {link.label for link in self.links},
            "EE": {event.label for event in self.events.values()},
        }

    def _relations(self, reading: Reading) -> list[dict[str, Any]]:
        found = []
        for link in self.links:
            head = self._span(link.head, reading, link.line, typed=True)
            tail = self._span(link.tail, reading, link.line, typed=True)
            if head is not None and tail is not None:
                found.append({"relation": link.label, "head": head, "tail": tail})
        return found

    def _events(self, reading: Reading) -> list[dict[str, Any]]:
        found = []
        for event in self.events.values():
            placed = [(r, self._span(name, reading, event.line)) for r, name in event.arguments]
            arguments = [{"role": role} | span for role, span in placed if span is not None]
            if (trigger := self._span(event.trigger, reading, event.line)) is not None:
                found.append({"type": event.label, "trigger": trigger, "arguments": arguments})
        return found

    def _span(
        self, name: str, reading: Reading, line: int | None, typed: bool = False
    ) -> dict[str, Any] | None:
        if name in self.events:
            message = f"The argument `{name}` is an event; its trigger stands for it."
            reading.note(message, line, self.file)
            name, typed = self.events[name].trigger, False
        mention = self.mentions.get(name)
        if mention is None:
            message = f"There is no usable mention `{name}`. The annotation is left out."
            reading.error("reference", message, line, self.file)
            return None
        span = {key: mention[key] for key in ("text", "start", "end")}
        return {"type": mention["label"]} | span if typed else span


def add_graphs(
    graphs: Sequence[Graph], task: GraphTask | None, schema: GivenSchema, reading: Reading
) -> None:
    """Take the documents of annotated texts.

    Args:
        graphs: The texts.
        task: What to read; `None`: NER, or UIE where there are relations or events.
        schema: As in the JSONL format; `None`: the labels and roles that occur.
        reading: Where documents and problems go.
    """
    if task is None:
        task = "UIE" if any(graph.links or graph.events for graph in graphs) else "NER"
    rows = [graph.row(task, reading) for graph in graphs]
    others = {
        label
        for graph in graphs
        for kind, labels in graph.labels().items()
        if kind != task
        for label in labels
    }
    described = schema_of_file(task, schema, rows, reading, others if task != "UIE" else ())
    if described is not None:
        for graph, row in zip(graphs, rows, strict=True):
            reading.add(row | {"schema": described}, graph.line, graph.file)
