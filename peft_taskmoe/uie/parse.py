"""From what a model wrote to records: every record that is well formed, and a problem for everything else.

Knows answers, schemas and alignment. Nothing that a model wrote is evaluated: a scanner finds the calls of an answer
and checks that they are made of names, strings, numbers and lists; `ast.parse` reads each of them. Time is linear
in the length of the answer (each new mention is a search through the text); nothing that an answer can hold raises.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from peft_taskmoe.uie.alignment import Aligner, Place, TextIndex, normalise
from peft_taskmoe.uie.identifiers import IDENTIFIER
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

MAX_DEPTH = 8
"""Brackets within brackets that a record may have; a well-formed one has two."""

MAX_TOKENS = 10_000
"""Strings, names, numbers and signs that one record may have."""

MAX_NUMBER = 100
"""Characters of a number; Python cannot print the longest that it can read."""


@dataclass(frozen=True, slots=True)
class ParsedAnswer:
    """What an answer says.

    Attributes:
        records: The records, in the order of the answer, placed in the text.
        problems: What could not be taken as it stands, in the order of the answer; see `PROBLEM_KINDS`.
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

    The answer is what follows `result =`: a list of calls. Whatever is broken costs only the records it is in.
    A record that the end of the answer cuts off is `truncated`. After the list is closed, a run-on is `extra_text`.

    Args:
        answer: What the model wrote; any string.
        schema: The labels that were asked for.
        text: The text that was asked about; offsets are those of this string.
        names: The identifiers that the prompt used; `None` is `schema.names`.
        given: The events that the prompt gave (EAE); an event that is none of them is `not_given`.
        keep_not_found: Keep records with spans that the text does not have, with alignment `"not_found"` and no
            offsets. They are `not_in_text` problems in either case.

    Returns:
        Records and problems; every prefix of a well-formed answer gives the records that are complete in it.
    """
    reader = _Reader(schema, text, names or schema.names, given, keep_not_found)
    _Scanner(answer, text, reader).run()
    return ParsedAnswer(
        tuple(reader.typed_records()),
        tuple(reader.problems),
        answer,
        tuple(source for _, source in reader.records),
    )


# --- from the answer to calls --------------------------------------------------------------------------------------

_STRING = (
    r'"""(?:[^"\\]++|\\.|"(?!""))*+"""'
    r"|'''(?:[^'\\]++|\\.|'(?!''))*+'''"
    r'|"(?:[^"\\]++|\\.)*+"'
    r"|'(?:[^'\\]++|\\.)*+'"
)
_INSIDE = re.compile(
    rf"(?P<space>(?:\s++|\#[^\n]*+)++)|(?P<string>{_STRING})|(?P<name>{IDENTIFIER})|(?P<number>-?\d[\w.]*+)"
    r"|(?P<open>[\[(])|(?P<close>[\])])|(?P<sign>[=,])|(?P<quote>[\"'])|(?P<other>.)",
    re.DOTALL,
)
_OUTSIDE = re.compile(
    rf"(?P<space>\s++)|(?P<fence>```\w*+)|(?P<echo>result\s*+=(?!=))|(?P<name>{IDENTIFIER})|(?P<word>\d\w*+)"
    r"|(?P<open>\[)|(?P<close>\])|(?P<comma>,)|(?P<other>.)",
    re.DOTALL,
)
_GAP = re.compile(r"\s*+\(")
# What Python reads as an escape without complaint; any other backslash stands for itself.
_LITERAL_PART = re.compile(
    r"""\\(?:\r?\n|[\\'"abfnrtv]|[0-3]?[0-7]{1,2}|x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|N\{[^}"'\\\n]{1,80}\})"""
    "|[\\\\\0\n\r\ud800-\udfff]"
)
_CONSTANTS = ("None", "True", "False")


class _Call(NamedTuple):
    """What became of a call: where its scan ended, and its source for `ast` if it is well formed."""

    status: Literal["whole", "broken", "cut"]
    end: int
    source: str = ""


class _Scanner:
    """Finds the calls of an answer, once from left to right, and tells the reader about each and about the rest."""

    def __init__(self, answer: str, text: str, reader: _Reader) -> None:
        self.answer, self.text, self.reader = answer, text, reader
        # A broken record is looked through again for whole records inside; this much in all, so that time stays linear.
        self.budget = 8 * len(answer) + 10_000
        self.rest: int | None = None  # where words that belong to no record began
        self.rest_kind: ProblemKind = "extra_text"

    def run(self) -> None:
        answer, at, depth = self.answer, 0, 0
        list_start, calls_before, calls, closed = 0, 0, 0, False
        while at < len(answer):
            match = _OUTSIDE.match(answer, at)
            assert match is not None  # the pattern has an alternative for any character
            kind, start, at = match.lastgroup, at, match.end()
            if kind == "name":
                after = self.call(match.group(), start, at)
                if after is not None:
                    calls, at = calls + 1, after
                    continue
            if self.recovering or kind in ("space", "fence", "echo", "comma"):
                continue
            if kind == "open":
                if depth == 0:
                    list_start, calls_before = start, calls
                depth += 1
            elif kind == "close" and depth:
                depth -= 1
                if depth == 0:
                    empty = not answer[list_start + 1 : start].strip()
                    closed = closed or empty or calls > calls_before
            elif self.rest is None:
                self.rest, self.rest_kind = start, "extra_text"
                if closed and kind != "close":
                    break  # a run-on: another text and its records, not ours
        # A record that is malformed or cut off says enough about the end.
        in_record = self.rest is not None and self.rest_kind != "extra_text"
        self.flush(len(answer))
        if not in_record and not closed:
            message = (
                "The answer has no list." if not calls and not depth else "The list is not closed."
            )
            self.reader.problem(
                "truncated", message, answer[list_start:] if depth and not calls else ""
            )

    def call(self, name: str, start: int, behind: int) -> int | None:
        """Read the call that may begin here; returns where to go on, or `None` if there is none."""
        gap = _GAP.match(self.answer, behind)
        known = self.reader.knows(name)
        if gap is None:
            return None
        # Prose has words before brackets, and strings have anything: only the schema's classes count there.
        if not known and (self.recovering or gap.end() > behind + 1 or self.budget <= 0):
            return None
        call = self.scan(gap.end())
        if call.status == "whole":
            self.flush(start)
            self.reader.read(
                f"{name}({call.source}", self.answer[start : call.end], (start, call.end)
            )
            return call.end
        if call.status == "cut":
            self.flush(start)
            self.rest, self.rest_kind = start, "truncated"
            return len(self.answer)
        self.budget -= call.end - start
        if not known:
            return None
        self.flush(start)
        self.rest, self.rest_kind = start, "malformed"
        return gap.end() if self.budget > 0 else call.end

    @property
    def recovering(self) -> bool:
        """Whether we are behind the beginning of a broken record, and in it for all we know."""
        return self.rest is not None and self.rest_kind == "malformed"

    def flush(self, end: int) -> None:
        """Report the words that belong to no record, up to here."""
        if self.rest is None:
            return
        source = self.answer[self.rest : end].rstrip()
        self.reader.problem(self.rest_kind, _MESSAGES[self.rest_kind], source)
        self.rest = None

    def scan(self, at: int) -> _Call:
        """Check the call whose bracket has just been opened.

        The grammar: `call = [item {"," item} [","]] ")"`, `item = [name "="] value`, `value = strings | number |
        constant | "[" [value {"," value} [","]] "]"`, and round brackets for square ones.
        """
        answer, brackets = self.answer, ["("]
        source: list[str] = []
        expected = "item"  # or "value", "equals", "operand" (a value or the end of a list), "comma"
        for _ in range(MAX_TOKENS):
            match = _INSIDE.match(answer, at)
            if match is None:
                return _Call("cut", at)
            kind, token = match.lastgroup, match.group()
            if kind == "space":
                at = match.end()
                if source and source[-1] != " ":
                    source.append(" ")
                continue
            if kind == "quote" and expected in ("item", "value", "operand", "comma*"):
                return _Call("cut" if self.could_go_on(at) else "broken", len(answer))
            if kind == "string" and expected in ("item", "value", "operand", "comma*"):
                token, following = (
                    _literal(token),
                    "comma*",
                )  # another string may follow: they are one
            elif expected in ("item", "value", "operand") and (
                (kind == "number" and len(token) <= MAX_NUMBER) or token in _CONSTANTS
            ):
                following = "comma"
            elif kind == "name" and expected == "item" and len(brackets) == 1:
                following = "equals"
            elif token == "=" and expected == "equals":
                following = "value"
            elif token == "," and expected.startswith("comma"):
                following = "item" if len(brackets) == 1 else "operand"
            elif (
                kind == "open"
                and expected in ("item", "value", "operand")
                and len(brackets) < MAX_DEPTH
            ):
                brackets.append(token)
                following = "operand"
            elif (
                kind == "close"
                and (expected in ("item", "operand") or expected.startswith("comma"))
                and _PAIRS[brackets[-1]] == token
            ):
                brackets.pop()
                following = "comma"
            else:
                return _Call("broken", match.end())
            source.append(token)
            at, expected = match.end(), following
            if not brackets:
                return _Call("whole", at, "".join(source))
        return _Call("broken", at)

    def could_go_on(self, quote: int) -> bool:
        """Whether a string that the end of the answer cuts off may be words of the text so far."""
        begun = self.answer[quote + 1 :]
        escape = begun.rfind("\\", max(len(begun) - 10, 0))  # it may be cut off as well
        for words in (begun, begun[:escape]) if escape >= 0 else (begun,):
            value = _value(_literal(f'"{words}"'))
            if value is not None and value in self.text:
                return True
        return False


_PAIRS = {"(": ")", "[": "]"}
_MESSAGES: dict[ProblemKind, str] = {
    "malformed": "This is no well-formed record; it is left out.",
    "truncated": "The answer ends inside this record; it is left out.",
    "extra_text": "These words belong to no record.",
}


def _literal(token: str) -> str:
    """A string token as a literal that `ast.parse` takes on one line and without warnings."""
    return _LITERAL_PART.sub(_literal_part, token)


def _literal_part(match: re.Match[str]) -> str:
    part = match.group()
    if len(part) > 1:
        return part
    return "\\\\" if part == "\\" else f"\\u{ord(part):04x}"


def _value(literal: str) -> str | None:
    try:
        value = ast.literal_eval(literal)
    except (SyntaxError, ValueError, MemoryError):
        return None
    return value if isinstance(value, str) else None


# --- from calls to records -----------------------------------------------------------------------------------------


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
        try:
            node = ast.parse(call, mode="eval").body
        except (SyntaxError, ValueError, MemoryError, RecursionError):
            node = None
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
            self.note("malformed", _MESSAGES["malformed"])
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
        """The words of a slot that takes one mention, and their place if an occurrence number says it."""
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
