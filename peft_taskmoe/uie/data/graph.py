"""Texts as annotation tools store them, mentions and links between them, to rows of JSONL."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

from peft_taskmoe.uie.data.file_schema import GivenSchema, schema_of_file
from peft_taskmoe.uie.data.placing import Placer, span_at
from peft_taskmoe.uie.data.reading import Reading
from peft_taskmoe.uie.wording import shown

GraphTask = Literal["NER", "RE", "EE", "UIE"]


class Link(NamedTuple):
    """A labelled pair of mentions, by their ids, and the line that says it."""

    label: str
    head: str
    tail: str
    line: int | None = None


class GraphEvent(NamedTuple):
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
        reading: Where problems go.
        line: Line of the file, or number of the item, where it stands.
        file: The file, if it is not the one that is read.
        mentions: `{"label", "text", "start", "end"}` by id; by a number where no relation has it.
        links: Relations between mentions.
        events: Events by id; an argument may be an event.
        extra: Other keys of the row.
        units: Whether offsets that fit both ways count UTF-16 units, not characters.
    """

    id: Any
    text: str
    reading: Reading
    line: int | None = None
    file: Path | None = None
    mentions: dict[str | int, dict[str, Any]] = field(default_factory=dict)
    links: list[Link] = field(default_factory=list)
    events: dict[str, GraphEvent] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    units: bool = False

    @cached_property
    def _placer(self) -> Placer:
        return Placer(self.text)

    def add_mention(self, name: Any, label: Any, start: Any, end: Any, words: Any = None) -> None:
        """Take a mention of an export, or report it.

        Args:
            name: Its id; `None` if no relation has it.
            label: Its label.
            start: Its offset, in characters or UTF-16 units; `None` if only its words are given.
            end: The offset behind it.
            words: Its words, if they are given.
        """
        label, found = _named(label, "label"), None
        if start is None and end is None and isinstance(words, str):
            found = self._placer.span(words, label)
        elif type(start) is int and type(end) is int and 0 <= start < end:
            found = span_at(self.text, start, end, words, self.units)
        if found is not None:
            mention = {"label": label} | found
            # Of several mentions with one id the first has the relations.
            if name is None or self.mentions.setdefault(str(name), mention) != mention:
                self.mentions[len(self.mentions)] = mention
            return
        kind = "not_in_text" if start is None else "offsets"
        said = "" if words is None else f" `{shown(words)}`"
        message = f"The text does not have the mention{said} of `{label}` at {start}:{end}."
        self.reading.error(kind, f"{message} It is left out.", self.line)

    def add_link(self, label: Any, head: Any, tail: Any) -> None:
        """Take a relation between two mentions of an export, by their ids."""
        self.links.append(Link(_named(label, "relation"), str(head), str(tail), self.line))

    def row(self, task: str) -> dict[str, Any]:
        """The row without schema that the task reads; the rest becomes notes."""
        if placed := self._placer.placed:
            message = f"{placed} mentions without offsets were placed where the text has them."
            self.reading.note(message, self.line, kind="aligned")
        triggers = {event.trigger for event in self.events.values()}
        entities = [x for name, x in self.mentions.items() if name not in triggers]
        found: list[dict[str, Any] | None] = [*entities] if task in ("NER", "UIE") else []
        if task in ("RE", "UIE"):
            found += map(self._relation, self.links)
        else:
            self._not_read("relation", task, self.links)
        if task in ("EE", "UIE"):
            found += map(self._event, self.events.values())
        else:
            self._not_read("event", task, self.events.values())
        annotations = [annotation for annotation in found if annotation is not None]
        row = {"id": self.id, "text": self.text, "task": task, "annotations": annotations}
        return self.extra | row | ({"entities": entities} if task == "RE" else {})

    def _not_read(self, what: str, task: str, left: Iterable[Link | GraphEvent]) -> None:
        for one in left:
            self.reading.note(f"The {what} is not read for {task}.", one.line, self.file)

    def _relation(self, link: Link) -> dict[str, Any] | None:
        head = self._span(link.head, link.line, typed=True)
        tail = self._span(link.tail, link.line, typed=True)
        if head is None or tail is None:
            return None
        return {"relation": link.label, "head": head, "tail": tail}

    def _event(self, event: GraphEvent) -> dict[str, Any] | None:
        placed = [(role, self._span(name, event.line)) for role, name in event.arguments]
        arguments = [{"role": role} | span for role, span in placed if span is not None]
        if (trigger := self._span(event.trigger, event.line)) is None:
            return None
        return {"type": event.label, "trigger": trigger, "arguments": arguments}

    def _span(self, name: str, line: int | None, typed: bool = False) -> dict[str, Any] | None:
        if name in self.events:
            message = f"The argument `{name}` is an event; its trigger stands for it."
            self.reading.note(message, line, self.file)
            name, typed = self.events[name].trigger, False
        mention = self.mentions.get(name)
        if mention is None:
            message = f"There is no usable mention `{name}`. The annotation is left out."
            self.reading.error("reference", message, line, self.file)
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
    rows = [graph.row(task) for graph in graphs]
    labels = {
        "NER": {mention["label"] for graph in graphs for mention in graph.mentions.values()},
        "RE": {link.label for graph in graphs for link in graph.links},
        "EE": {event.label for graph in graphs for event in graph.events.values()},
    }
    others = {label for kind, of in labels.items() if kind != task for label in of}
    described = schema_of_file(task, schema, rows, reading, others if task != "UIE" else ())
    if described is not None:
        for graph, row in zip(graphs, rows, strict=True):
            reading.add(row | {"schema": described}, graph.line, graph.file)


def _named(label: Any, what: str) -> str:
    if not isinstance(label, str) or not label:
        raise ValueError(f"a {what} is `{shown(label)}`, not a name")
    return label
