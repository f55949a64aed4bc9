"""What counts as one item of a task, and when a predicted item equals a gold one.

=====  =================================================================================
NER    (label, mention)
RE     (label, head mention, tail mention): the direction counts, the mentions' types do not
EE     (label, trigger mention)
EAE    (label, trigger mention, role, argument mention): an argument inside a matched event.
       Arguments of a wrong event are wrong, those of a missed event are missed.
=====  =================================================================================

`match="text"` (the paper's): a mention is its string, and items are a multiset: a name that is
annotated twice has to be found twice, and found once too often it is wrong once.
`match="offsets"`: a mention is its (start, end), and items are a set.
The same item at the same place counts once in both, in gold and predicted records alike.
The documents of an EE data set are scored as EE and as EAE, those of several tasks ("UIE") under
each of them.
`identification=True`: the items without labels and roles: what was found, whatever it was called.
Predictions with a span that is not in the text are dropped and counted as hallucinated, as in the
paper: they cost recall, not precision. A hallucinated argument drops that argument, a hallucinated
trigger the whole event.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from numbers import Real
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

from ..records import Document, Entity, Event, Problem, Record, Relation, Span, spans_of

Match = Literal["text", "offsets"]
Items: TypeAlias = Counter[tuple[Hashable, ...]]
_TASK_OF_RECORD: dict[type, str] = {Entity: "NER", Relation: "RE", Event: "EE"}


@runtime_checkable
class Answer(Protocol):
    """What a model answered to one document: records, and what was wrong with the rest."""

    @property
    def records(self) -> Sequence[Record]:
        """The records."""

    @property
    def problems(self) -> Sequence[Problem]:
        """What could not be used, each with its kind."""


Documents: TypeAlias = Mapping[str, Sequence[Document]]
"""Data set -> its documents with their gold records."""
Answers: TypeAlias = Mapping[str, Mapping[str, Answer | Sequence[Record]]]
"""Data set -> document id -> the answer, or its records alone."""


def parts_of(
    answer: Answer | Sequence[Record], document: Document
) -> tuple[Any, Sequence[Problem]]:
    """Records and problems of an answer.

    Raises:
        ValueError: If the answer is neither, or one of its records is not made as records are.
    """
    records, problems = (
        (answer.records, answer.problems) if isinstance(answer, Answer) else (answer, ())
    )
    if not isinstance(records, Sequence) or isinstance(records, str):
        raise ValueError(
            f"The answer to document `{document.id}` is a {type(records).__name__}. "
            "Pass its records as a list, or an object with `records` and `problems`."
        )
    for record in records:
        if (found := record_fault(record)) is not None:
            raise ValueError(
                f"The answer to document `{document.id}` has {found}. "
                "Read records with `record_from_dict`, or leave this one out."
            )
    return records, problems


def record_fault(record: Any) -> str | None:
    """What is wrong with a record that cannot be scored, as an object of "has"; None if nothing."""
    if type(record) not in _TASK_OF_RECORD:
        return f"a {type(record).__name__} where a record is expected"
    names = [record.label, *(a.role for a in getattr(record, "arguments", ()))]
    if strange := [name for name in names if not isinstance(name, str)]:
        return f"the label or role {strange[0]!r:.80}, which is no string"
    confidence = record.confidence
    if confidence is not None and not (
        isinstance(confidence, Real) and 0 <= float(confidence) <= 1
    ):
        return f"the confidence {confidence!r:.80}, which is no number from 0 to 1"
    for span in spans_of(record):
        places = (span.start, span.end)
        if not isinstance(span.text, str) or not (
            places == (None, None) or all(isinstance(place, int) for place in places)
        ):
            return f"the mention {span.text!r:.80} with start {places[0]!r} and end {places[1]!r}"
    return None


def tasks_of(document: Document) -> tuple[str, ...]:
    """The tasks a document is scored under: of all its records, and events also by arguments."""
    tasks = document.schema.tasks if document.task == "UIE" else (document.task,)
    return (*tasks, "EAE") if "EE" in tasks else tasks


def usable(
    records: Sequence[Record], document: Document, count_not_found: bool
) -> tuple[list[Record], int, int]:
    """The predicted records that can be scored, and what was dropped.

    Args:
        records: What was predicted.
        document: The text and the tasks.
        count_not_found: Count spans whose alignment is "not_found"; not where the parser has
            reported them already.

    Returns:
        The records of the document's tasks with spans of its text, the number of other spans, and
        that of records of other tasks.
    """
    asked = {"EE" if task == "EAE" else task for task in tasks_of(document)}
    kept: list[Record] = []
    dropped = of_other_task = 0

    def in_text(span: Span) -> bool:
        nonlocal dropped
        if span.alignment == "not_found":
            dropped += count_not_found
            return False
        found = span.start is not None or span.text in document.text
        dropped += not found
        return found

    for record in records:
        if _TASK_OF_RECORD[type(record)] not in asked:
            of_other_task += 1
        elif isinstance(record, Event):
            arguments = tuple(argument for argument in record.arguments if in_text(argument.span))
            if in_text(record.trigger):
                kept.append(replace(record, arguments=arguments))
        else:
            found = [in_text(span) for span in spans_of(record)]  # all of them are counted
            if all(found):
                kept.append(record)
    return kept, dropped, of_other_task


def items_of(
    records: Iterable[Record], task: str, match: Match, document: str, identification: bool = False
) -> Items:
    """The multiset of items of a task, each place once.

    Returns:
        Items with their counts. The label comes first in each, "" for identification; of EAE, the
        role is the third.

    Raises:
        ValueError: If a mention has no offsets to match by.
    """
    items: Items = Counter()
    places: set[tuple[Hashable, ...]] = set()
    for parts in (parts for record in records for parts in _parts(record, task)):
        if identification:
            parts = ["", *(part for part in parts if isinstance(part, Span))]
        place = tuple((p.start, p.end) if isinstance(p, Span) else p for p in parts)
        unplaced = [part for part in parts if isinstance(part, Span) and part.start is None]
        if unplaced and match == "offsets":
            raise ValueError(
                f"The mention {unplaced[0].text!r} in document `{document}` has no offsets, so it "
                "cannot be matched by them. Align the answer to its text first, or pass "
                'match="text".'
            )
        if place in places:
            continue
        if not unplaced:
            places.add(place)
        by_text = tuple(part.text if isinstance(part, Span) else part for part in parts)
        items[place if match == "offsets" else by_text] += 1
    return items


def _parts(record: Record, task: str) -> list[list[str | Span]]:
    """The items of a record: label, spans and role in their order."""
    if isinstance(record, Event):
        event: list[str | Span] = [record.label, record.trigger]
        if task == "EAE":
            return [[*event, argument.role, argument.span] for argument in record.arguments]
        return [event] if task == "EE" else []
    return [[record.label, *spans_of(record)]] if _TASK_OF_RECORD[type(record)] == task else []
