"""The check of a row of the JSONL format, with every fault that it has."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from peft_taskmoe.uie.records import document_id
from peft_taskmoe.uie.schema import TASKS, Label, Schema
from peft_taskmoe.uie.wording import listed, shown

_ADVICE = (
    'A row is {"id", "text", "task": "NER|RE|EE|EAE", "schema", "annotations"[, "entities"]}, '
    "and every mention has text[start:end] == its text."
)
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")
_REQUIRED: dict[str, tuple[type, str]] = {
    "text": (str, "a string"),
    "task": (str, "a string"),
    "schema": (Mapping, "an object"),
    "annotations": (list, "a list"),
}
_SPAN_KEYS = {"text", "start", "end", "alignment"}


def check_row(row: Any) -> tuple[list[tuple[str, str]], list[str]]:
    """The faults of a row, as (kind, message), and keys of its annotations that are not kept."""
    check = _RowCheck(row)
    check.run()
    return check.faults, list(check.unknown)


class _RowCheck:
    """Goes through a row and collects what is wrong with it."""

    def __init__(self, row: Any) -> None:
        self.row = row
        self.faults: list[tuple[str, str]] = []
        self.unknown: dict[str, None] = {}

    def fault(self, kind: str, message: str) -> None:
        self.faults.append((kind, message))

    def wrong(self, message: str) -> None:
        self.fault("row", f"{message} {_ADVICE}")

    def run(self) -> None:
        if not isinstance(self.row, Mapping):
            self.wrong(f"Found `{shown(self.row)}`, which is no JSON object.")
            return
        self.shape()
        if half := _HALF_CHARACTER.search(json.dumps(self.row, ensure_ascii=False)):
            self.fault(
                "encoding",
                f"There is half a character (a lone surrogate) in `{shown(half[0])}`, "
                "which UTF-8 cannot hold.",
            )
        if self.faults:
            return
        task = self.row["task"]
        try:
            schema = Schema.from_dict(task, self.row["schema"])
        except ValueError as error:
            self.fault("schema" if task in TASKS else "task", str(error))
            return
        if task == "EAE" and not self.row["annotations"]:
            self.wrong("An EAE document needs the event whose arguments are asked for.")
        for i, annotation in enumerate(self.row["annotations"]):
            self.annotation(annotation, f"annotations[{i}]", task, schema)
        for i, entity in enumerate(self.row.get("entities", [])):
            self.annotation(entity, f"entities[{i}]", "NER", None)

    def shape(self) -> None:
        try:
            document_id(self.row.get("id"))
        except ValueError as error:
            self.wrong(str(error))
        for key, (type_, name) in _REQUIRED.items():
            value = self.row.get(key)
            if key not in self.row:
                self.wrong(f"The key `{key}` is missing (keys: {', '.join(map(str, self.row))}).")
            elif not isinstance(value, type_):
                self.wrong(f"The value of `{key}` is `{shown(value)}`; it has to be {name}.")
        if not isinstance(entities := self.row.get("entities", []), list):
            self.wrong(f"The value of `entities` is `{shown(entities)}`; it has to be a list.")

    def annotation(self, data: Any, where: str, task: str, schema: Schema | None) -> None:
        """One annotation; without a schema any label will do."""
        if not isinstance(data, Mapping):
            self.wrong(f"`{where}` is `{shown(data)}`, not an object.")
            return
        if task == "UIE":
            task = "RE" if "relation" in data else "EE" if "trigger" in data else "NER"
        if task == "NER":
            self.label(data, where, schema, "entity", "label")
            self.span(data, where, {"label", "confidence"})
        elif task == "RE":
            self.label(data, where, schema, "relation", "relation")
            self.keys(data, {"relation", "head", "tail", "confidence"})
            for side in ("head", "tail"):
                self.span(data.get(side), f"{where}.{side}", {"type"})
        else:
            label = self.label(data, where, schema, "event", "type")
            self.keys(data, {"type", "trigger", "arguments", "confidence"})
            self.span(data.get("trigger"), f"{where}.trigger", set())
            self.arguments(data.get("arguments", []), f"{where}.arguments", label)

    def label(
        self, data: Mapping[str, Any], where: str, schema: Schema | None, kind: str, key: str
    ) -> Label | None:
        name = data.get(key)
        if not isinstance(name, str) or not name:
            self.wrong(f"`{where}` has no `{key}` (keys: {', '.join(map(str, data))}).")
            return None
        label = schema.get(kind, name) if schema is not None else None
        if schema is not None and label is None:
            own = listed(label.name for label in schema.labels if label.kind == kind)
            message = f"`{where}` has the {key} `{name}`, which the schema does not have."
            self.fault("label", f"{message} Its own: {own}.")
        return label

    def arguments(self, arguments: Any, where: str, label: Label | None) -> None:
        if not isinstance(arguments, list):
            self.wrong(f"`{where}` is `{shown(arguments)}`, not a list.")
            return
        for i, argument in enumerate(arguments):
            self.span(argument, f"{where}[{i}]", {"role"})
            role = argument.get("role") if isinstance(argument, Mapping) else ""
            roles = [] if label is None else [slot.name for slot in label.roles]
            if isinstance(argument, Mapping) and (not isinstance(role, str) or not role):
                self.wrong(f"`{where}[{i}]` has no `role` (keys: {', '.join(map(str, argument))}).")
            elif label is not None and role and role not in roles:
                self.fault(
                    "label",
                    f"`{where}[{i}]` has the role `{role}`, which `{label.name}` does not have. "
                    f"Its own: {listed(roles, 'none')}.",
                )

    def keys(self, data: Mapping[str, Any], known: set[str]) -> None:
        self.unknown.update(dict.fromkeys(key for key in data if key not in known))

    def span(self, span: Any, where: str, beside: set[str]) -> None:
        if not isinstance(span, Mapping):
            self.wrong(f"`{where}` is `{shown(span)}`, not an object with text, start and end.")
            return
        self.keys(span, _SPAN_KEYS | beside)
        text = self.row["text"]
        mention, start, end = (span.get(key) for key in ("text", "start", "end"))
        if not isinstance(mention, str) or type(start) is not int or type(end) is not int:
            self.wrong(
                f"`{where}` needs a text and two integers, start and end; found "
                f"`{shown(dict(span))}`."
            )
        elif not 0 <= start < end <= len(text):
            self.fault(
                "offsets",
                f"`{where}` is at [{start}:{end}], outside of the text of {len(text)} characters "
                "or empty.",
            )
        elif text[start:end] != mention:
            stands = text.find(mention) if mention else -1
            self.fault(
                "offsets",
                f"`{where}` says `{shown(mention)}`, but text[{start}:{end}] is "
                f"`{shown(text[start:end])}`."
                + (f" The mention stands at {stands}: count characters." if stands >= 0 else ""),
            )
        if not isinstance(span.get("type", ""), str) or span.get("alignment", "exact") not in (
            "exact",
            "normalised",
        ):
            self.wrong(f"`{where}` needs a string as type, and exact or normalised as alignment.")
