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

    Arguments and errors are those of `read_jsonl`.
    """
    reading = Reading(path, on_error)
    for number, row in reading.shaped(reading.values(Path(path)), _row):
        reading.add(row, number)
    return reading.report


def _row(source: Mapping[str, Any], number: int, reading: Reading) -> dict[str, Any] | None:
    """A line as a row of the JSONL format; `None` where its errors say why there is none."""
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
    task, text = _TASKS[source["task"]], instruction["input"]
    schema, triggers = _schema(instruction["schema"], task)
    line = _Line(text, number, reading)
    for label, values in output.items():
        if task == "EAE":
            line.given_events(label, triggers.get(label, []), values)
        else:
            for value in values:
                line.take(task, label, value)
    if task == "EAE" and not line.annotations and line.lost:
        return None
    row = {"text": text, "task": task, "schema": schema, "annotations": line.annotations}
    fields = {*row, "entities"}
    if clashing := [key for key in source if key in fields - {"task"}]:
        message = f"Keys that mean something else in a document are not kept: {listed(clashing)}."
        reading.note(message, number)
    dropped = fields | {"instruction", "output"}
    return {key: value for key, value in source.items() if key not in dropped} | row


class _Line:
    """The annotations of one line, placed in its text."""

    def __init__(self, text: str, number: int, reading: Reading) -> None:
        self.number, self.reading, self.placer = number, reading, Placer(text)
        self.annotations: list[dict[str, Any]] = []
        self.lost = False

    def lose(self, kind: str, message: str) -> None:
        self.lost = True
        self.reading.error(kind, message, self.number)

    def span(self, mention: str, group: str | None = None) -> dict[str, Any] | None:
        place = self.placer.span(mention, group)
        if place is None:
            message = f"The text has no `{shown(mention.strip())}`. What it belongs to is left out."
            self.lose("not_in_text", message)
        return place

    def take(self, task: str, label: str, value: Any) -> None:
        if task == "NER":
            if (entity := self.span(value, label)) is not None:
                self.annotations.append({"label": label} | entity)
        elif task == "RE":
            head, tail = self.span(value["subject"]), self.span(value["object"])
            if head is not None and tail is not None:
                self.annotations.append({"relation": label, "head": head, "tail": tail})
        elif isinstance(value, Mapping):
            self.event(label, value.get("trigger"), value.get("arguments", {}))
        else:
            self.event(label, value, {})

    def event(self, type_: str, trigger: Any, roles: Mapping[str, Any]) -> None:
        if trigger in _NOTHING:
            self.lose("no_trigger", f"An event `{type_}` has no trigger. It is left out.")
        elif (place := self.span(trigger, type_)) is not None:
            given = [
                (role, mention)
                for role, mentions in roles.items()
                for mention in (mentions if isinstance(mentions, list) else [mentions])
                if mention not in _NOTHING
            ]
            placed = [(role, self.span(mention)) for role, mention in given]
            arguments = [{"role": role} | place for role, place in placed if place is not None]
            self.annotations.append({"type": type_, "trigger": place, "arguments": arguments})

    def given_events(self, label: str, triggers: list[str], values: list[Any]) -> None:
        if len(triggers) == 1 and len(values) <= 1:
            self.event(label, triggers[0], values[0] if values else {})
        elif triggers or values:
            message = (
                f"There are {len(triggers)} triggers and {len(values)} sets of arguments of "
                f"`{label}`, and the format does not say which belong together. They are left out."
            )
            self.lose("no_trigger", message)


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
