"""What an extraction is made of: spans, records, problems and documents, and their JSON."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from peft_taskmoe.uie.schema import TASKS, Schema, Task
from peft_taskmoe.uie.wording import listed, shown

Alignment = Literal["exact", "normalised", "not_found"]
"""How a span's words were found: letter by letter, after normalisation, or not at all."""

ProblemKind = Literal[
    "malformed",
    "truncated",
    "extra_text",
    "unknown_label",
    "unknown_slot",
    "missing_slot",
    "bad_value",
    "bad_occurrence",
    "not_in_text",
    "not_given",
    "repeated",
    "low_confidence",
    "not_asked",
]

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
        return {
            "label": self.label,
            **_span_to_dict(self.span),
            **_confidence_to_dict(self.confidence),
        }


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
        sides = {
            side: ({} if type_ is None else {"type": type_}) | _span_to_dict(span)
            for side, type_, span in (
                ("head", self.head_type, self.head),
                ("tail", self.tail_type, self.tail),
            )
        }
        return {"relation": self.label, **sides, **_confidence_to_dict(self.confidence)}


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
            raise ValueError(
                f"`{self.kind}` is no kind of problem. The kinds are: {listed(PROBLEM_KINDS)}."
            )

    def to_dict(self) -> dict[str, str]:
        """The three fields as JSON."""
        return {"kind": self.kind, "message": self.message, "source": self.source}


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
        if missing := [key for key in ("id", "text", "task", "schema") if key not in row]:
            raise ValueError(
                f"The row has no {listed(missing)} (keys: {listed(row)}). A document is one JSON "
                'object with "id", "text", "task", "schema" and "annotations".'
            )
        task, text = row["task"], row["text"]
        if not isinstance(text, str):
            raise ValueError(f"`text` is a {type(text).__name__}. Write it as one string.")
        schema = Schema.from_dict(task, row["schema"])
        records = [record_from_dict(task, x) for x in _list(row, "annotations")]
        entities = [_entity_from_dict(entity) for entity in _list(row, "entities")]
        for span in (span for record in (*records, *entities) for span in spans_of(record)):
            _check_offsets(span, text)
        known = {"id", "text", "task", "schema", "annotations", "entities"}
        extra = {key: value for key, value in row.items() if key not in known}
        id_ = document_id(row["id"])
        return cls(id_, text, task, schema, tuple(records), tuple(entities), extra)

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
        ValueError: The task is unknown or the annotation lacks a key.
    """
    if task == "UIE":
        keys = data if isinstance(data, Mapping) else {}
        task = "RE" if "relation" in keys else "EE" if "trigger" in keys else "NER"
    if task not in _READERS:
        raise ValueError(f"`{task}` is no task. Write one of: {listed(TASKS)}.")
    return _READERS[task](data)


def spans_of(record: Record) -> tuple[Span, ...]:
    """All spans of a record, in the order of its slots."""
    if isinstance(record, Entity):
        return (record.span,)
    if isinstance(record, Relation):
        return (record.head, record.tail)
    return (record.trigger, *(argument.span for argument in record.arguments))


def shift_record(record: Record, by: int) -> Record:
    """The same record with every offset `by` characters further on."""
    if isinstance(record, Entity):
        return Entity(record.label, record.span.shift(by), record.confidence)
    if isinstance(record, Relation):
        head, tail = record.head.shift(by), record.tail.shift(by)
        return Relation(
            record.label, head, tail, record.head_type, record.tail_type, record.confidence
        )
    arguments = tuple(
        Argument(argument.role, argument.span.shift(by)) for argument in record.arguments
    )
    return Event(record.label, record.trigger.shift(by), arguments, record.confidence)


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


def _confidence_to_dict(confidence: float | None) -> dict[str, float]:
    return {} if confidence is None else {"confidence": confidence}


def document_id(value: Any) -> str:
    """The id of a document: a string, or a whole number as its digits.

    Raises:
        ValueError: It is neither, or empty.
    """
    if isinstance(value, str) and value:
        return value
    if type(value) is int:
        return str(value)
    raise ValueError(f"The id is {shown(value)}. Write a string or a whole number.")


def _list(data: Mapping[str, Any], key: str) -> Sequence[Any]:
    value = data.get(key, ())
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ValueError(f"`{key}` is {shown(value)}. Write a list.")
    return value


def _name(data: Mapping[str, Any], key: str, what: str) -> str:
    name = data[key]
    if not isinstance(name, str) or not name:
        raise ValueError(f"{what} has the {key} {shown(name)}. Write a name.")
    return name


def _confidence(data: Mapping[str, Any]) -> float | None:
    value = data.get("confidence")
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
        raise ValueError(f"The confidence is {shown(value)}. Write a number, or leave it out.")
    return value


def _span_from_dict(data: Mapping[str, Any], where: str, *beside: str) -> Span:
    known = ("text", "start", "end", "alignment", *beside)
    _check_keys(data, where, required=("text",), known=known)
    alignment = data.get("alignment", "exact")
    if not isinstance(data["text"], str) or alignment not in ("exact", "normalised", "not_found"):
        raise ValueError(f"{where} is {shown(dict(data))}. Write its words as a string.")
    return Span(data["text"], data.get("start"), data.get("end"), alignment)


def _entity_from_dict(data: Mapping[str, Any]) -> Entity:
    _check_keys(data, "An entity", required=("label", "text"))
    span = _span_from_dict(data, "An entity", "label", "confidence")
    return Entity(_name(data, "label", "An entity"), span, _confidence(data))


def _relation_from_dict(data: Mapping[str, Any]) -> Relation:
    keys = ("relation", "head", "tail")
    _check_keys(data, "A relation", required=keys, known=(*keys, "confidence"))
    head = _span_from_dict(data["head"], "A relation's head", "type")
    tail = _span_from_dict(data["tail"], "A relation's tail", "type")
    types = (data["head"].get("type"), data["tail"].get("type"))
    return Relation(_name(data, "relation", "A relation"), head, tail, *types, _confidence(data))


def _event_from_dict(data: Mapping[str, Any]) -> Event:
    known = ("type", "trigger", "arguments", "confidence")
    _check_keys(data, "An event", ("type", "trigger"), known)
    arguments = []
    for argument in _list(data, "arguments"):
        _check_keys(argument, "An argument", required=("role", "text"))
        span = _span_from_dict(argument, "An argument", "role")
        arguments.append(Argument(_name(argument, "role", "An argument"), span))
    trigger = _span_from_dict(data["trigger"], "A trigger")
    return Event(_name(data, "type", "An event"), trigger, tuple(arguments), _confidence(data))


def _check_keys(
    data: Any, what: str, required: Iterable[str], known: Sequence[str] | None = None
) -> None:
    if not isinstance(data, Mapping):
        raise ValueError(f"{what} is written as {shown(data)}. Write it as a JSON object.")
    if missing := [key for key in required if key not in data]:
        keys = listed(data)
        raise ValueError(f"{what} has no {listed(missing)} (keys: {keys}). Add what is missing.")
    unknown = [] if known is None else sorted(set(map(str, data)) - set(known))
    if unknown:
        # One text for one set of keys: Python's warning filter then shows it once.
        warnings.warn(f"{what} has the keys {listed(unknown)}, which are not kept.", stacklevel=2)


def _check_offsets(span: Span, text: str) -> None:
    if not span.text:
        raise ValueError("The mention '' has no words. Write the words that it stands for.")
    if span.start is None and span.end is None:
        return
    said = f"The mention {shown(span.text)}"
    if type(span.start) is not int or type(span.end) is not int:
        raise ValueError(
            f"{said} has start {shown(span.start)} and end {shown(span.end)}. "
            "Write both as integers, or neither."
        )
    found = text[span.start : span.end] if span.start >= 0 else ""
    if found != span.text:
        raise ValueError(
            f"{said} is said to stand at {span.start}:{span.end}, where the text has "
            f"{shown(found)}. Offsets count characters from 0, and the end is exclusive."
        )


_READERS: dict[str, Callable[[Mapping[str, Any]], Record]] = {
    "NER": _entity_from_dict,
    "RE": _relation_from_dict,
    "EE": _event_from_dict,
    "EAE": _event_from_dict,
}
