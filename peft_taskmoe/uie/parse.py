"""From what a model wrote to records, and a problem for everything that is none.

Knows answers, schemas and alignment. Nothing that a model wrote is evaluated: a scanner finds the
calls of an answer and checks that they are made of names, strings, numbers and lists; `ast.parse`
reads each of them. Time is linear in the length of the answer (each new mention is a search through
the text); nothing that an answer can hold raises.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from peft_taskmoe.uie.alignment import Aligner, Place, TextIndex, normalise
from peft_taskmoe.uie.calls import MESSAGES, Scanner, expression
from peft_taskmoe.uie.records import (
    Argument,
    Entity,
    Event,
    Problem,
    ProblemKind,
    Record,
    Relation,
    Span,
    record_key,
)
from peft_taskmoe.uie.schema import Label, Names, Schema


@dataclass(frozen=True, slots=True)
class ParsedAnswer:
    """What an answer says.

    Attributes:
        records: The records, in the order of the answer, placed in the text.
        problems: What could not be taken as it stands, in the order of the answer; see
            `PROBLEM_KINDS`.
        raw: The answer as the model wrote it.
        sources: For each record, start and end in `raw` of what says it.
    """

    records: tuple[Record, ...]
    problems: tuple[Problem, ...]
    raw: str
    sources: tuple[tuple[int, int], ...] = ()

    @property
    def well_formed(self) -> bool:
        """Whether the answer is one whole list of records, whatever the records say."""
        return not any(
            problem.kind in ("malformed", "truncated", "extra_text") for problem in self.problems
        )


def parse_answer(
    answer: str,
    schema: Schema,
    text: str,
    *,
    names: Names | None = None,
    given: Sequence[Event] = (),
    keep_not_found: bool = False,
) -> ParsedAnswer:
    """Read an answer.

    The answer is what follows `result =`: a list of calls. Whatever is broken costs only the
    records it is in. A record that the end of the answer cuts off is `truncated`. After the list is
    closed, a run-on is `extra_text`.

    Args:
        answer: What the model wrote; any string.
        schema: The labels that were asked for.
        text: The text that was asked about; offsets are those of this string.
        names: The identifiers that the prompt used; `None` is `schema.names`.
        given: The events that the prompt gave (EAE); an event that is none of them is `not_given`.
        keep_not_found: Keep records with spans that the text does not have, with alignment
            `"not_found"` and no offsets. They are `not_in_text` problems in either case.

    Returns:
        Records and problems; every prefix of a well-formed answer gives the records that are
        complete in it.
    """
    reader = _Reader(schema, text, names or schema.names, given, keep_not_found)
    Scanner(answer, text, reader).run()
    return ParsedAnswer(
        tuple(reader.typed_records()),
        tuple(reader.problems),
        answer,
        tuple(source for _, source in reader.records),
    )


class _Reader:
    """Makes records of calls: finds labels, slots and places, and notes what does not fit."""

    def __init__(
        self, schema: Schema, text: str, names: Names, given: Sequence[Event], keep_not_found: bool
    ) -> None:
        self.schema, self.names = schema, names
        self.index = TextIndex(text)
        self.aligner = Aligner(self.index)
        self.keep_not_found = keep_not_found
        self.given = sorted(
            given, key=lambda event: (event.trigger.start is None, event.trigger.start or 0)
        )
        self.has_given = bool(given)
        self.records: list[tuple[Record, tuple[int, int]]] = []
        self.problems: list[Problem] = []
        self.seen: set[object] = set()
        self.events = 0
        self.source = ""

    def problem(self, kind: ProblemKind, message: str, source: str) -> None:
        self.problems.append(Problem(kind, message, source))

    def note(self, kind: ProblemKind, message: str) -> None:
        """A problem of the record that is being read."""
        self.problem(kind, message, self.source)

    def label(self, name: str) -> Label | None:
        key = self.names.label_key(name)
        return self.schema.get(*key) if key else None

    def knows(self, name: str) -> bool:
        return self.label(name) is not None

    def read(self, call: str, source: str, where: tuple[int, int]) -> None:
        """Read one well-formed call into a record or problems."""
        self.source = source
        node = expression(call)
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
            self.note("malformed", MESSAGES["malformed"])
            return
        label = self.label(node.func.id)
        if label is None:
            self.note(
                "unknown_label",
                f"The schema has no class `{node.func.id}`; the record is left out.",
            )
            return
        slots = self.slots(label, node)
        build = {"entity": self.entity, "relation": self.relation, "event": self.event}[label.kind]
        record = build(label, slots)
        if record is None:
            return
        key = record_key(record)
        if key in self.seen:
            self.note("repeated", "An earlier record says the same; this one is left out.")
            return
        self.seen.add(key)
        self.records.append((record, where))

    def typed_records(self) -> list[Record]:
        """The records; relations with the types that entities at the same places have."""
        labels: dict[tuple[int | None, int | None], dict[str, None]] = {}
        for record, _ in self.records:
            if isinstance(record, Entity):
                labels.setdefault((record.span.start, record.span.end), {})[record.label] = None
        typed: list[Record] = []
        for record, _ in self.records:
            if isinstance(record, Relation):
                label = self.schema.get("relation", record.label)
                assert label is not None  # it was read by this label
                types = []
                for slot, span in zip(label.slots, (record.head, record.tail), strict=True):
                    found = labels.get((span.start, span.end), ())
                    fitting = [type_ for type_ in found if not slot.types or type_ in slot.types]
                    types.append(fitting[0] if len(fitting) == 1 else None)
                record = replace(record, head_type=types[0], tail_type=types[1])
            typed.append(record)
        return typed

    # ... slots

    def slots(self, label: Label, node: ast.Call) -> dict[str, _Filled]:
        """What the call puts into each slot, by the slot's name."""
        identifiers = self.names.slots_of(label)
        name_of = dict(zip(identifiers, (slot.name for slot in label.slots), strict=True))
        filled: dict[str, _Filled] = {}
        items = list(zip(identifiers, node.args, strict=False)) + [
            (k.arg or "", k.value) for k in node.keywords
        ]
        if len(node.args) > len(identifiers):
            self.note(
                "unknown_slot",
                f"The class has {len(identifiers)} slots; {len(node.args)} are filled.",
            )
        for identifier, value in items:
            stem = identifier.removesuffix("_nth")
            if identifier in name_of:
                words = self.words(identifier, value)
                filled.setdefault(identifier, _Filled([], []))[0].extend(words)
            elif stem in name_of:
                filled.setdefault(stem, _Filled([], []))[1].extend(self.numbers(stem, value))
            else:
                self.note(
                    "unknown_slot", f"The class has no slot `{identifier}`; the slot is left out."
                )
        return {name_of[identifier]: value for identifier, value in filled.items()}

    def words(self, slot: str, value: ast.expr) -> list[str]:
        values = value.elts if isinstance(value, (ast.List, ast.Tuple)) else [value]
        words = []
        for part in values:
            if isinstance(part, ast.Constant) and isinstance(part.value, str) and part.value:
                words.append(part.value)
            elif not (isinstance(part, ast.Constant) and part.value is None):
                self.note(
                    "bad_value",
                    f"Slot `{slot}` is filled with `{ast.unparse(part)[:80]}`, which is no words.",
                )
        return words

    def numbers(self, slot: str, value: ast.expr) -> list[int]:
        values = value.elts if isinstance(value, (ast.List, ast.Tuple)) else [value]
        numbers = []
        for part in values:
            number = part.value if isinstance(part, ast.Constant) else None
            if type(number) is int:
                numbers.append(number)
            else:
                self.note("bad_occurrence", f"The occurrence of `{slot}` is no number from 1 on.")
                numbers.append(0)
        return numbers

    def single(self, slots: dict[str, _Filled], slot: str) -> tuple[str, Place | None] | None:
        """The words of a slot for one mention, and their place if an occurrence number says it."""
        words, numbers = slots.get(slot, _Filled([], []))
        if not words:
            self.note("missing_slot", f"`{slot}` is not filled; the record is left out.")
            return None
        if len(words) > 1:
            self.note(
                "bad_value",
                f"`{slot}` takes one mention and has {len(words)}; the record is left out.",
            )
            return None
        return words[0], self.numbered(slot, words[0], numbers[0]) if numbers else None

    # ... places

    def numbered(self, slot: str, mention: str, number: int) -> Place | None:
        place = self.index.nth(mention, number)
        if place is None and number and self.index.occurrences(mention).places:
            self.note(
                "bad_occurrence",
                f"The text has no occurrence {number} of `{slot}`; the default is taken.",
            )
        return place

    def found(self, mention: str, consequence: str = "the record is left out") -> bool:
        found = self.index.occurrences(mention)
        if not found.places:
            why = f"The text does not have {mention[:80]!r}"
            if not found.searched:
                why = f"{mention[:80]!r} was not looked for after so many others in so long a text"
            self.note("not_in_text", f"{why}; {consequence}.")
        return bool(found.places)

    def repeated(self, consequence: str = "this one is left out") -> None:
        self.note("repeated", f"The text does not have these words once more; {consequence}.")

    def span(self, mention: str, place: Place | None) -> Span:
        if place is None:
            return Span(mention, alignment="not_found")
        return self.index.span(mention, place)

    # ... records

    def mention(self, label: Label, slots: dict[str, _Filled], slot: str) -> Span | None:
        filled = self.single(slots, slot)
        if filled is None:
            return None
        words, place = filled
        if not self.found(words):
            return self.span(words, None) if self.keep_not_found else None
        place = place or self.aligner.free_place(label.key, words)
        if place is None:
            self.repeated()
            return None
        self.aligner.take_mention(label.key, place)
        return self.span(words, place)

    def entity(self, label: Label, slots: dict[str, _Filled]) -> Entity | None:
        span = self.mention(label, slots, "span")
        return Entity(label.name, span) if span else None

    def relation(self, label: Label, slots: dict[str, _Filled]) -> Relation | None:
        head, tail = self.single(slots, "head"), self.single(slots, "tail")
        if head is None or tail is None:
            return None
        known = [self.found(head[0]), self.found(tail[0])]
        if not all(known):
            if not self.keep_not_found:
                return None
            first = [
                self.index.occurrences(words).places[0] if ok else None
                for ok, (words, _) in zip(known, (head, tail), strict=True)
            ]
            return Relation(
                label.name,
                self.span(head[0], head[1] or first[0]),
                self.span(tail[0], tail[1] or first[1]),
            )
        pair = (
            (head[1], tail[1])
            if head[1] and tail[1]
            else self.aligner.free_pair(label.key, head[0], tail[0], head[1], tail[1])
        )
        if pair is None:
            self.repeated()
            return None
        self.aligner.take(label.key, pair)
        return Relation(label.name, self.span(head[0], pair[0]), self.span(tail[0], pair[1]))

    def event(self, label: Label, slots: dict[str, _Filled]) -> Event | None:
        trigger = (
            self.given_trigger(label, slots)
            if self.has_given
            else self.mention(label, slots, "trigger")
        )
        if trigger is None:
            return None
        self.events += 1
        place = (
            None if trigger.start is None or trigger.end is None else (trigger.start, trigger.end)
        )
        arguments: list[Argument] = []
        for role in label.roles:
            words, numbers = slots.get(role.name, _Filled([], []))
            if numbers and len(numbers) != len(words):
                self.note(
                    "bad_occurrence",
                    f"`{role.name}` has {len(words)} mentions, {len(numbers)} occurrences.",
                )
                numbers = []
            for mention, number in zip(words, numbers or [0] * len(words), strict=True):
                span = self.argument(role.name, mention, number, place)
                if span is not None:
                    arguments.append(Argument(role.name, span))
        return Event(label.name, trigger, tuple(arguments))

    def argument(self, role: str, mention: str, number: int, trigger: Place | None) -> Span | None:
        if not self.found(mention, "the argument is left out"):
            return self.span(mention, None) if self.keep_not_found else None
        group = (self.events, role)
        place = self.numbered(role, mention, number) if number else None
        place = place or self.aligner.free_argument(group, mention, trigger)
        if place is None or not self.aligner.take(group, place):
            self.repeated("the argument is left out")
            return None
        return self.span(mention, place)

    def given_trigger(self, label: Label, slots: dict[str, _Filled]) -> Span | None:
        filled = self.single(slots, "trigger")
        if filled is None:
            return None
        words, place = filled
        same_label = [event for event in self.given if event.label == label.name]
        fitting = [event for event in same_label if event.trigger.text == words]
        if not fitting:
            form = normalise(words)
            fitting = [event for event in same_label if normalise(event.trigger.text) == form]
        if fitting:
            exact = (e for e in fitting if place == (e.trigger.start, e.trigger.end))
            event = next(exact, fitting[0])
            self.given.remove(event)
            return event.trigger
        self.note(
            "not_given",
            f"No given event `{label.name}` with trigger {words[:80]!r} is left; it is left out.",
        )
        return None


class _Filled(NamedTuple):
    """What a slot holds: mentions, and occurrence numbers if any are written."""

    words: list[str]
    numbers: list[int]
