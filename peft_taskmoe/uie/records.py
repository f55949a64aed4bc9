"""Spans, records, problems and documents, and their JSON."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, Literal, TypeAlias, get_args

from peft_taskmoe.uie.schema import TASKS, Label, Schema, Task
from peft_taskmoe.uie.wording import listed, shown

Alignment = Literal["exact", "normalised", "not_found"]
"""How a span's words were found: letter by letter, after normalisation, or not at all."""

PROBLEM_KINDS: dict[str, str] = {
    "malformed": "a record that is not well formed; it is left out",
    "truncated": "the answer ends before its list, or inside a record; complete records are kept",
    "extra_text": "words around or between the records, such as prose or a run-on",
    "unknown_label": "a record of a class that the schema does not have; it is left out",
    "unknown_slot": "a slot that the class does not have; the slot is left out, the record kept",
    "missing_slot": "a record without its span, head, tail or trigger; it is left out",
    "bad_value": "a slot filled with no string of words; record or argument left out",
    "bad_occurrence": "an occurrence number that the text does not have; the default is taken",
    "not_in_text": "a span that the text does not contain; record or argument left out",
    "not_given": "an event other than the given ones, where events are given; it is left out",
    "repeated": "a record or argument that says again what an earlier one said; it is left out",
    "low_confidence": "a record below the threshold that the caller set; it is left out",
    "not_asked": "a question or given event that no prompt can hold; it is not asked",
}
"""Every kind of `Problem`, and what becomes of what it is about."""

ProblemKind: TypeAlias = str
"""A key of `PROBLEM_KINDS`."""


@dataclass(frozen=True, slots=True)
class Span:
    """Words of a text: `document.text[start:end] == text` unless `alignment` is `"not_found"`.

    Attributes:
        text: The words, as the text has them (as the model wrote them where they were not found).
        start: Index of the first character, or `None` where unknown.
        end: Index behind the last character, or `None` where unknown.
        alignment: How the words were found.
    """

    text: str
    start: int | None = None
    end: int | None = None
    alignment: Alignment = "exact"

    def shift(self, by: int) -> Span:
        """The same words, `by` characters further on."""
        if self.start is None or self.end is None:
            return self
        return Span(self.text, self.start + by, self.end + by, self.alignment)


@dataclass(frozen=True, slots=True)
class Entity:
    """A mention and its label. `confidence` is a probability, or `None` where none was computed."""

    label: str
    span: Span
    confidence: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The JSONL annotation: `{"label", "text", "start", "end"}`."""
        span = _span_to_dict(self.span)
        return {"label": self.label, **span, **_confidence_to_dict(self.confidence)}


@dataclass(frozen=True, slots=True)
class Relation:
    """A labelled pair of mentions, and the types of the two where they are known."""

    label: str
    head: Span
    tail: Span
    head_type: str | None = None
    tail_type: str | None = None
    confidence: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The JSONL annotation: `{"relation", "head": {"type", "text", ...}, "tail": {...}}`."""
        head, tail = _span_to_dict(self.head), _span_to_dict(self.tail)
        head = head if self.head_type is None else {"type": self.head_type} | head
        tail = tail if self.tail_type is None else {"type": self.tail_type} | tail
        sides = {"relation": self.label, "head": head, "tail": tail}
        return sides | _confidence_to_dict(self.confidence)


@dataclass(frozen=True, slots=True)
class Argument:
    """A mention and the role it has in an event."""

    role: str
    span: Span

    def to_dict(self) -> dict[str, Any]:
        """The JSONL argument: `{"role", "text", "start", "end"}`."""
        return {"role": self.role, **_span_to_dict(self.span)}


@dataclass(frozen=True, slots=True)
class Event:
    """A labelled trigger with its arguments, in the order in which they were given."""

    label: str
    trigger: Span
    arguments: tuple[Argument, ...] = ()
    confidence: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The JSONL annotation: `{"type", "trigger": {"text", ...}, "arguments": [...]}`."""
        return {
            "type": self.label,
            "trigger": _span_to_dict(self.trigger),
            "arguments": [argument.to_dict() for argument in self.arguments],
            **_confidence_to_dict(self.confidence),
        }


Record: TypeAlias = Entity | Relation | Event


@dataclass(frozen=True, slots=True)
class Problem:
    """Something in an answer that could not be taken as it stands.

    Attributes:
        kind: One of `PROBLEM_KINDS`.
        message: What was found and what was made of it, for a person.
        source: The part of the answer it is about.
    """

    kind: ProblemKind
    message: str
    source: str

    def __post_init__(self) -> None:
        if self.kind not in PROBLEM_KINDS:
            kinds = listed(PROBLEM_KINDS)
            raise ValueError(f"`{self.kind}` is no kind of problem. The kinds are: {kinds}.")

    def to_dict(self) -> dict[str, str]:
        """The three fields as JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Document:
    """A text, what is asked of it and, where known, the gold records.

    Attributes:
        id: Name of the document, unique within its data set.
        text: The text; every offset counts its characters (code points).
        task: `"NER"`, `"RE"`, `"EE"`, `"EAE"`, or `"UIE"` for a schema of several tasks.
        schema: What is asked.
        records: The gold records. For `"EAE"` their labels and triggers are the given ones.
        entities: Entities given beside the records; part of the data, not of the question.
        extra: The row's other keys, kept as they came.
    """

    id: str
    text: str
    task: Task
    schema: Schema
    records: tuple[Record, ...] = ()
    entities: tuple[Entity, ...] = ()
    extra: dict[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(
                f"Document `{self.id}` has task `{self.task}`. Write one of: {listed(TASKS)}."
            )

    @property
    def given(self) -> tuple[Event, ...]:
        """The events whose arguments are asked for: those of an `"EAE"` document, bare."""
        if self.task != "EAE":
            return ()
        return tuple(Event(r.label, r.trigger) for r in self.records if isinstance(r, Event))

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> Document:
        """Read one row of the JSONL format.

        Args:
            row: `{"id", "text", "task", "schema", "annotations"[, "entities"]}`; other keys go
                to `extra`. `annotations` may be absent in a document that is only to be read.

        Returns:
            The document; `Document.from_dict(row).to_dict()` gives the row back.

        Raises:
            ValueError: A key is missing, the task is unknown, or an offset does not fit the text.
        """
        reader = RowReader(strict=False)
        document = reader.document(row)
        reader.check()
        assert document is not None
        return document

    def to_dict(self) -> dict[str, Any]:
        """The row of the JSONL format; `Document.from_dict` reads it back."""
        row: dict[str, Any] = {
            "id": self.id,
            "text": self.text,
            "task": self.task,
            "schema": self.schema.to_dict(self.task),
            "annotations": [record.to_dict() for record in self.records],
        }
        if self.entities:
            row["entities"] = [entity.to_dict() for entity in self.entities]
        return row | self.extra


def record_from_dict(task: str, data: Mapping[str, Any]) -> Record:
    """Read one annotation of the JSONL format; the inverse of a record's `to_dict()`.

    Args:
        task: The document's task. `"UIE"` tells the kind of record by its keys.
        data: The annotation.

    Returns:
        An `Entity` for `"NER"`, a `Relation` for `"RE"`, an `Event` for `"EE"` and `"EAE"`.

    Raises:
        ValueError: The task is unknown or a key of the annotation is missing.
    """
    if task not in TASKS:
        raise ValueError(f"`{task}` is no task. Write one of: {listed(TASKS)}.")
    reader = RowReader(strict=False)
    record = reader.record(data, "annotation", task)
    reader.check()
    return record


def spans_of(record: Record) -> tuple[Span, ...]:
    """All spans of a record, in the order of its slots."""
    if isinstance(record, Entity):
        return (record.span,)
    if isinstance(record, Relation):
        return (record.head, record.tail)
    return (record.trigger, *(argument.span for argument in record.arguments))


def first_place(record: Record) -> tuple[bool, int]:
    """Where a record's first span begins, to sort by; records without offsets come last."""
    start = spans_of(record)[0].start
    return start is None, start or 0


def shift_record(record: Record, by: int) -> Record:
    """The same record with every offset `by` characters further on."""
    if isinstance(record, Entity):
        return replace(record, span=record.span.shift(by))
    if isinstance(record, Relation):
        return replace(record, head=record.head.shift(by), tail=record.tail.shift(by))
    arguments = tuple(replace(one, span=one.span.shift(by)) for one in record.arguments)
    return replace(record, trigger=record.trigger.shift(by), arguments=arguments)


def record_key(record: Record) -> tuple[Any, ...]:
    """What makes two records the same: kind, label and places.

    Spans with offsets are told apart by their offsets, others by their words. Confidence, the order
    of arguments and the types of a relation's mentions are no part of it.

    Returns:
        A hashable tuple, `("entity" | "relation" | "event", label, ...)`.
    """
    if isinstance(record, Entity):
        return ("entity", record.label, _place(record.span))
    if isinstance(record, Relation):
        return ("relation", record.label, _place(record.head), _place(record.tail))
    arguments = frozenset((argument.role, _place(argument.span)) for argument in record.arguments)
    return ("event", record.label, _place(record.trigger), arguments)


def _place(span: Span) -> tuple[Any, ...]:
    return (span.text,) if span.start is None else (span.start, span.end)


def _span_to_dict(span: Span) -> dict[str, Any]:
    data: dict[str, Any] = {"text": span.text, "start": span.start, "end": span.end}
    if span.alignment != "exact":
        data["alignment"] = span.alignment
    return data


def _confidence_to_dict(confidence: float | None) -> dict[str, Any]:
    return {} if confidence is None else {"confidence": confidence}


_HALF_CHARACTER = re.compile("[\ud800-\udfff]")
_ADVICE = (
    'A row is {"id", "text", "task": "NER|RE|EE|EAE", "schema", "annotations"[, "entities"]}, '
    "and every mention has text[start:end] == its text."
)
_TYPES: dict[str, tuple[Any, str]] = {
    "text": (str, "a string"),
    "task": (str, "a string"),
    "schema": (Mapping, "an object"),
    "annotations": (list | tuple, "a list"),
    "entities": (list | tuple, "a list"),
}


class RowReader:
    """Reads a row of the JSONL format and collects its faults; with any, what it made is void.

    Attributes:
        strict: Whether every mention needs offsets and every label has to be in the schema.
        faults: Every fault as (kind of `ReadProblem`, message).
        unknown: Keys of annotations that no record holds.
    """

    def __init__(self, strict: bool) -> None:
        self.strict = strict
        self.faults: list[tuple[str, str]] = []
        self.unknown: dict[str, None] = {}
        self._text: str | None = None

    def check(self) -> None:
        """Raise the first fault as a `ValueError`; warn of unknown keys."""
        if self.faults:
            raise ValueError(self.faults[0][1])
        if self.unknown:
            # One text for one set of keys: Python's warning filter then shows it once.
            warnings.warn(self.not_kept, stacklevel=3)

    @property
    def not_kept(self) -> str:
        """What is said of unknown keys."""
        return f"The annotations have keys that are not kept: {listed(self.unknown)}."

    def document(self, row: Any) -> Document | None:
        """Read a whole row; `None` where its keys or its schema are at fault."""
        if not isinstance(row, Mapping):
            self._wrong(f"Found `{shown(row)}`, which is no JSON object.")
            return None
        self._check_keys(row)
        if self.faults:
            return None
        text, task = row["text"], row["task"]
        try:
            schema = Schema.from_dict(task, row["schema"])
        except ValueError as error:
            self.faults.append(("schema" if task in TASKS else "task", str(error)))
            return None
        self._text, asked = text, schema if self.strict else None
        given = row.get("annotations", ())
        if self.strict and task == "EAE" and not given:
            self._wrong("An EAE document needs the event whose arguments are asked for.")
        records = [self.record(x, f"annotations[{i}]", task, asked) for i, x in enumerate(given)]
        beside = enumerate(row.get("entities", ()))
        entities: Any = [self.record(x, f"entities[{i}]", "NER") for i, x in beside]
        extra = {key: value for key, value in row.items() if key not in {"id", *_TYPES}}
        return Document(str(row["id"]), text, task, schema, tuple(records), tuple(entities), extra)

    def record(self, data: Any, where: str, task: str, schema: Schema | None = None) -> Record:
        """Read one annotation; without a schema any label will do."""
        if not isinstance(data, Mapping):
            self._wrong(f"`{where}` is `{shown(data)}`, not an object.")
            return Entity("", Span(""))
        if task == "UIE":
            task = "RE" if "relation" in data else "EE" if "trigger" in data else "NER"
        confidence = data.get("confidence")
        if confidence is not None and type(confidence) not in (int, float):
            self._wrong(f"`{where}` has the confidence `{shown(confidence)}`, which is no number.")
        if task == "NER":
            name, _ = self._label(data, where, schema, "entity", "label")
            return Entity(name, self._span(data, where, "label", "confidence"), confidence)
        if task == "RE":
            name, _ = self._label(data, where, schema, "relation", "relation")
            self._know(data, "relation", "head", "tail", "confidence")
            head, head_type = self._side(data.get("head"), f"{where}.head")
            tail, tail_type = self._side(data.get("tail"), f"{where}.tail")
            return Relation(name, head, tail, head_type, tail_type, confidence)
        name, label = self._label(data, where, schema, "event", "type")
        self._know(data, "type", "trigger", "arguments", "confidence")
        trigger = self._span(data.get("trigger"), f"{where}.trigger")
        given = data.get("arguments", ())
        if not isinstance(given, list | tuple):
            self._wrong(f"`{where}.arguments` is `{shown(given)}`, not a list.")
            given = ()
        places = [f"{where}.arguments[{i}]" for i in range(len(given))]
        arguments = tuple(map(partial(self._argument, label), given, places))
        return Event(name, trigger, arguments, confidence)

    def _wrong(self, message: str) -> None:
        self.faults.append(("row", f"{message} {_ADVICE}"))

    def _check_keys(self, row: Mapping[Any, Any]) -> None:
        id_ = row.get("id")
        if type(id_) is not int and not (isinstance(id_, str) and id_):
            self._wrong(f"The id is {shown(id_)}. Write a string or a whole number.")
        needed = ("text", "task", "schema", *(("annotations",) if self.strict else ()))
        for key, (type_, name) in _TYPES.items():
            if key not in row and key in needed:
                self._wrong(f"The key `{key}` is missing (keys: {', '.join(map(str, row))}).")
            elif key in row and not isinstance(row[key], type_):
                self._wrong(f"The value of `{key}` is `{shown(row[key])}`; it has to be {name}.")
        if self.strict and (half := _HALF_CHARACTER.search(json.dumps(row, ensure_ascii=False))):
            message = f"There is half a character (a lone surrogate) in `{shown(half[0])}`"
            self.faults.append(("encoding", f"{message}, which UTF-8 cannot hold."))

    def _know(self, data: Mapping[str, Any], *known: str) -> None:
        self.unknown.update(dict.fromkeys(str(key) for key in data if key not in known))

    def _name(self, data: Mapping[str, Any], where: str, key: str) -> str:
        name = data.get(key)
        if isinstance(name, str) and name:
            return name
        self._wrong(f"`{where}` has no `{key}` (keys: {', '.join(map(str, data))}).")
        return ""

    def _label(
        self, data: Mapping[str, Any], where: str, schema: Schema | None, kind: str, key: str
    ) -> tuple[str, Label | None]:
        """The name of a record's label, and the label of the schema."""
        name = self._name(data, where, key)
        label = schema.get(kind, name) if schema is not None else None
        if schema is not None and name and label is None:
            own = listed(label.name for label in schema.labels if label.kind == kind)
            message = f"`{where}` has the {key} `{name}`, which the schema does not have."
            self.faults.append(("label", f"{message} Its own: {own}."))
        return name, label

    def _argument(self, label: Label | None, data: Any, where: str) -> Argument:
        span = self._span(data, where, "role")
        role = self._name(data, where, "role") if isinstance(data, Mapping) else ""
        roles = [] if label is None else [slot.name for slot in label.roles]
        if label is not None and role and role not in roles:
            message = f"`{where}` has the role `{role}`, which `{label.name}` does not have."
            self.faults.append(("label", f"{message} Its own: {listed(roles, 'none')}."))
        return Argument(role, span)

    def _side(self, data: Any, where: str) -> tuple[Span, str | None]:
        """The span of a relation's head or tail, and its type."""
        type_ = data.get("type") if isinstance(data, Mapping) else None
        if type_ is not None and not isinstance(type_, str):
            self._wrong(f"`{where}` needs a string as type.")
        return self._span(data, where, "type"), type_

    def _span(self, data: Any, where: str, *beside: str) -> Span:
        if not isinstance(data, Mapping):
            self._wrong(f"`{where}` is `{shown(data)}`, not an object with text, start and end.")
            return Span("")
        self._know(data, "text", "start", "end", "alignment", *beside)
        alignments = ("exact", "normalised") if self.strict else get_args(Alignment)
        words: Any = data.get("text")
        start: Any = data.get("start")
        end: Any = data.get("end")
        span = Span(words, start, end, data.get("alignment", "exact"))
        if not isinstance(words, str) or not words:
            self._wrong(f"`{where}` needs its words as text; found `{shown(dict(data))}`.")
        elif span.alignment not in alignments:
            self._wrong(f"The alignment of `{where}` has to be one of {listed(alignments)}.")
        elif type(start) is int and type(end) is int:
            self._check_offsets(words, start, end, where)
        elif self.strict or (start, end) != (None, None):
            self._wrong(f"`{where}` needs two integers, start and end; found {start!r}, {end!r}.")
        return span

    def _check_offsets(self, words: str, start: int, end: int, where: str) -> None:
        if (text := self._text) is None:
            return
        message = f"`{where}` says `{shown(words)}`, but text[{start}:{end}] is"
        if not 0 <= start < end <= len(text):
            fault = f"{message} outside of the text of {len(text)} characters or empty."
        elif (found := text[start:end]) != words:
            stands = text.find(words)
            advice = f" The mention stands at {stands}: count characters." if stands >= 0 else ""
            fault = f"{message} `{shown(found)}`.{advice}"
        else:
            return
        self.faults.append(("offsets", fault))
