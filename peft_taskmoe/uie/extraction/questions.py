"""What is asked: the questions that a caller's texts, schemas and given events pose."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from ..records import Document, Event
from ..schema import Label, Schema

Thresholds: TypeAlias = float | Mapping[str, float] | None
"""The lowest confidence of a record that is kept: one for all, or one for each label."""


@dataclass(frozen=True, slots=True)
class Question:
    """One thing to ask: a text and what to look for.

    Attributes:
        text: The text; a blank one is not asked about, for nothing can be in it.
        schema: What to look for.
        given: The events whose arguments alone are wanted; with `()` there is nothing to ask.
            None: no events are given.
    """

    text: str
    schema: Schema
    given: tuple[Event, ...] | None = None


def question_of(document: Document) -> Question:
    """The question that a document with gold records poses."""
    given = document.given if document.task == "EAE" else None
    return Question(document.text, document.schema, given)


def schemas_of(schema: Any) -> list[Schema]:
    """One schema or several, as `Extractor` takes them.

    A list of label names, classes or `Label`s is one schema; a list of whole schemas is several.
    """
    if not isinstance(schema, (list, tuple)):
        return [schema if isinstance(schema, Schema) else Schema.of(schema)]
    labels = [isinstance(part, (str, type, Label)) for part in schema]
    if any(labels) and not all(labels):
        raise ValueError(
            "The list mixes labels with whole schemas. Pass `Schema.of(*parts)` to ask about all "
            "at once, or a list of schemas to ask about one after the other."
        )
    if not schema or all(labels):
        return [Schema.of(*schema)]
    found: list[Schema] = []
    for part in schema:
        found += [Schema.of(*part)] if isinstance(part, (list, tuple)) else schemas_of(part)
    return found


def check_thresholds(thresholds: Thresholds, schemas: Sequence[Schema] | None = None) -> None:
    """Refuse what is no probability, and labels that no schema has.

    Raises:
        ValueError: Naming the threshold.
    """
    if thresholds is None:
        return
    by_label = thresholds if isinstance(thresholds, Mapping) else {"": thresholds}
    for label, value in by_label.items():
        if not isinstance(value, (int, float)) or not 0 <= value <= 1:  # NaN is not within either
            raise ValueError(
                f"The threshold {value!r} is no probability. Write a number between 0 and 1."
            )
        names = [known.name for one in schemas or () for known in one.labels]
        if isinstance(thresholds, Mapping) and schemas is not None and label not in names:
            raise ValueError(
                f"There is a threshold for `{label}`, which is no label that is asked for. "
                f"The labels are {', '.join(f'`{name}`' for name in names)}."
            )


def questions_of(
    texts: Iterable[str], schemas: Sequence[Schema], given: Iterable[Sequence[Event]] | None
) -> Iterator[Sequence[Question]]:
    """For each text a question for each schema, with those of its given events that it has."""
    events = None if given is None else iter(given)
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(
                f"Text {number} is {text!r} ({type(text).__name__}), but records are extracted "
                "from `str`. Pass texts."
            )
        of_text = None if events is None else next(events, None)
        if events is not None and of_text is None:
            raise ValueError(
                f"There are given events for {number} texts, but more texts. Pass one list of "
                "events for each text."
            )
        for event in of_text or ():
            if not any(schema.get("event", event.label) for schema in schemas):
                raise ValueError(
                    f"The given event `{event.label}` of text {number} is in no schema. Add it to "
                    "the schema."
                )
        yield [Question(text, schema, _given_to(schema, of_text)) for schema in schemas]
    if events is not None and next(events, None) is not None:
        raise ValueError(
            "There are more lists of given events than texts. Pass one list of events for each "
            "text."
        )


def _given_to(schema: Schema, events: Sequence[Event] | None) -> tuple[Event, ...] | None:
    if events is None or "EE" not in schema.tasks:
        return None
    return tuple(event for event in events if schema.get("event", event.label))
