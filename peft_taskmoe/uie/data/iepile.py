"""Instruction data in the format of IEPile."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft_taskmoe.uie.data.placing import Placer
from peft_taskmoe.uie.data.reading import OnError, Reading, ReadReport
from peft_taskmoe.uie.strict_json import parse_json
from peft_taskmoe.uie.wording import listed, shown

_TASKS = {"NER": "NER", "RE": "RE", "EE": "EE", "EET": "EE", "EEA": "EAE"}
_NOTHING = ("", "NAN", None)


def read_iepile(path: str | Path, *, on_error: OnError = "raise") -> ReadReport:
    """Read instruction data in the format of IEPile, one JSON object a line.

    A line is `{"task", "source", "instruction", "output"}`. `instruction` holds
    `{"instruction", "schema", "input"}`, and it and `output` are JSON written into a string
    (objects are read as well). `source` and other keys (such as `split`) go to `extra`:

    - NER: schema: labels; output: `{label: [mention]}`
    - RE: relations; `{relation: [{"subject": mention, "object": mention}]}`
    - EE: `{"event_type", "trigger", "arguments"}`;
      `{type: [{"trigger": mention, "arguments": {role: mention or list}}]}`
    - EET: types; `{type: [trigger]}`
    - EEA: as EE, `"trigger"` a list of mentions; `{type: [{role: mention or list}]}`

    The format has no offsets: a mention given n times takes its first n occurrences in the text
    (whole words first), the last one again if there are fewer; as an argument it takes the first.
    White space around a mention is no part of it. Arguments "NAN" and "" are none. An event without
    a trigger cannot be held, and of an EEA line only those types that have one trigger can: the
    format does not say which arguments belong to which. One text stands in several lines where its
    schema was split; each line is a document.

    Source: the description of the data in the README of the repository zjunlp/IEPile.

    Args:
        path: The file.
        on_error: "raise" at the first error, or "collect" them all.

    Raises:
        ReadError: At the first error, where asked to.
    """
    reading = Reading(path, on_error)
    for number, source in reading.values(Path(path)):
        try:
            line = _Line(source)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            message = "The line is not in the format that `read_iepile` describes"
            reading.error("row", f"{message}: {type(error).__name__}: {error}.", number)
            continue
        for kind, message in line.lost:
            reading.error(kind, message, number)
        if line.task == "EAE" and not line.annotations and line.lost:
            continue  # its errors have said why there is nothing to ask
        reading.add(line.row(), number)
        if line.clashing:
            keys = listed(line.clashing)
            reading.note(
                f"Keys that mean something else in a document are not kept: {keys}.", number
            )
    return reading.report


class _Line:
    """One line: its annotations, placed, and what was lost of it, as (kind, message)."""

    def __init__(self, source: Mapping[str, Any]) -> None:
        for key in ("task", "instruction", "output"):
            if key not in source:
                raise ValueError(f"it has no `{key}` (keys: {', '.join(source)})")
        instruction, output = (
            parse_json(source[key]) if isinstance(source[key], str) else source[key]
            for key in ("instruction", "output")
        )
        if source["task"] not in _TASKS:
            message = f"there is no reading of task `{source['task']}`"
            raise ValueError(f"{message}, only of {', '.join(_TASKS)}")
        self.task, self.text = _TASKS[source["task"]], instruction["input"]
        self.placer = Placer(self.text)
        self.lost: list[tuple[str, str]] = []
        self.annotations: list[dict[str, Any]] = []
        self.schema, self.triggers = _schema(instruction["schema"], self.task)
        for label, values in output.items():
            if self.task == "EAE":
                self.given_events(label, self.triggers.get(label, []), values)
            else:
                for value in values:
                    self.take(label, value)
        own = {"task", "instruction", "output", "id"}
        self.extra = {key: value for key, value in source.items() if key not in own}
        fields = ("id", "text", "task", "schema", "annotations", "entities")
        self.clashing = [key for key in self.extra if key in fields]
        self.id = {"id": source["id"]} if "id" in source else {}

    def row(self) -> dict[str, Any]:
        row = {"text": self.text, "task": self.task, "schema": self.schema}
        kept = {key: value for key, value in self.extra.items() if key not in self.clashing}
        return kept | self.id | row | {"annotations": self.annotations}

    def span(self, mention: str, group: str | None = None) -> dict[str, Any] | None:
        place = self.placer.span(mention, group)
        if place is None:
            message = f"The text has no `{shown(mention.strip())}`. What it belongs to is left out."
            self.lost.append(("not_in_text", message))
        return place

    def take(self, label: str, value: Any) -> None:
        if self.task == "NER":
            if (entity := self.span(value, label)) is not None:
                self.annotations.append({"label": label} | entity)
        elif self.task == "RE":
            head, tail = self.span(value["subject"]), self.span(value["object"])
            if head is not None and tail is not None:
                self.annotations.append({"relation": label, "head": head, "tail": tail})
        elif isinstance(value, Mapping):
            self.event(label, value.get("trigger"), value.get("arguments", {}))
        else:
            self.event(label, value, {})

    def event(self, type_: str, trigger: Any, roles: Mapping[str, Any]) -> None:
        if trigger in _NOTHING:
            message = f"An event `{type_}` has no trigger. It is left out."
            self.lost.append(("no_trigger", message))
        elif (place := self.span(trigger, type_)) is not None:
            arguments = self.arguments(roles)
            self.annotations.append({"type": type_, "trigger": place, "arguments": arguments})

    def arguments(self, roles: Mapping[str, Any]) -> list[dict[str, Any]]:
        given = [
            (role, mention)
            for role, mentions in roles.items()
            for mention in (mentions if isinstance(mentions, list) else [mentions])
            if mention not in _NOTHING
        ]
        placed = [(role, self.span(mention)) for role, mention in given]
        return [{"role": role} | place for role, place in placed if place is not None]

    def given_events(self, label: str, triggers: list[str], values: list[Any]) -> None:
        if len(triggers) == 1 and len(values) <= 1:
            self.event(label, triggers[0], values[0] if values else {})
        elif triggers or values:
            message = (
                f"There are {len(triggers)} triggers and {len(values)} sets of arguments of "
                f"`{label}`, and the format does not say which belong together. They are left out."
            )
            self.lost.append(("no_trigger", message))


def _schema(names: Any, task: str) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """The schema dict, and the triggers that it gives by event type."""
    if not isinstance(names, list):
        raise ValueError(f"its schema is `{shown(names)}`, which is no list")
    if task in ("NER", "RE"):
        return dict.fromkeys(names, ""), {}
    entries = [x if isinstance(x, Mapping) else {"event_type": x} for x in names]
    schema = {
        entry["event_type"]: {"description": "", "roles": list(entry.get("arguments", ()))}
        for entry in entries
    }
    given = [entry for entry in entries if isinstance(entry.get("trigger"), list)]
    return schema, {entry["event_type"]: entry["trigger"] for entry in given}
