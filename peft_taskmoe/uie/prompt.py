"""Prompts and completions: what the model reads and learns to write.

The `"dataclass"` style is that of the method's paper, after GoLLIE::

    @dataclass
    class Launcher(Entity):
        \"\"\"A vehicle designed to carry a payload to space. Such as: Ariane 5\"\"\"
        span: str  # the mention, as it stands in the text
    # This is the text to analyze
    text = "..."
    # The annotation instances that take place in the text above are listed here
    result = [Launcher(span="Ariane 5")]
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from peft_taskmoe.uie.alignment import Aligner, Place, TextIndex
from peft_taskmoe.uie.records import (
    Document,
    Entity,
    Event,
    Record,
    Relation,
    Span,
    first_place,
    record_key,
)
from peft_taskmoe.uie.regularisers import MentionPool, Regularisers, key_of, regularise
from peft_taskmoe.uie.schema import Label, Names, Schema, Slot
from peft_taskmoe.uie.wording import listed, shown


@dataclass(frozen=True, slots=True)
class PromptFormat:
    """How prompts and completions are written.

    Attributes:
        style: `"dataclass"` is the paper's: a class with docstring and commented slots for each
            label. `"compact"` has one line for each label and positional spans in the answer, for
            small models and short contexts: on CoNLL04 its prompts have 42 % of the tokens, on
            PHEE, with 15 roles to an event, 78 % (SmolLM2's tokenizer).
        occurrences: Write `span_nth=2` (`head_nth`, `tail_nth`, `trigger_nth`, `<role>_nth`) in a
            completion where the default alignment would take another occurrence than the gold one.
            Off, completions have words only, which small models learn sooner, and such records
            come back at the default occurrence.
    """

    style: Literal["dataclass", "compact"] = "dataclass"
    occurrences: bool = True

    def __post_init__(self) -> None:
        if self.style not in ("dataclass", "compact"):
            raise ValueError(f'`style` is {shown(self.style)}. Write "dataclass" or "compact".')
        if not isinstance(self.occurrences, bool):
            raise ValueError(f"`occurrences` must be true or false, got {shown(self.occurrences)}.")


@dataclass(frozen=True, slots=True)
class Example:
    """One document as the model sees it.

    Attributes:
        id: The document's id.
        prompt: Everything up to and including `result =`.
        completion: The answer, from ` [` to `]`.
        schema_text: The part of the prompt before the input text (what `text="schema"` encodes).
        schema: The labels shown, in the order shown; pass it to `parse_answer`.
        names: Their identifiers, masked or not; pass them to `parse_answer`.
        document: The document as shown: its records are those the completion has.
    """

    id: str
    prompt: str
    completion: str
    schema_text: str
    schema: Schema
    names: Names
    document: Document


def build_example(
    document: Document,
    format: PromptFormat | None = None,
    regularisers: Regularisers | None = None,
    seed: int = 0,
    mentions: MentionPool | None = None,
    negative_pool: Schema | None = None,
) -> Example:
    """Write a document's prompt and completion.

    Args:
        document: The document; its records become the completion.
        format: How to write; `None` is `PromptFormat()`.
        regularisers: What to vary; `None` is nothing.
        seed: For the regularisers; with the document's id it decides everything.
        mentions: Example mentions for `Regularisers.examples`; see `collect_mentions`.
        negative_pool: Labels for `Regularisers.added_negatives`.

    Returns:
        The example. `parse_answer(x.completion, x.schema, document.text, names=x.names,
        given=document.given)` gives the records of `x.document` back.

    Raises:
        ValueError: A record has a label or a role that the schema does not have.
    """
    format = format or PromptFormat()
    _check_askable(document)
    shown, names = regularise(
        document, regularisers or Regularisers(), seed, mentions, negative_pool
    )
    schema_text = prompt_schema_text(shown.schema, names, format)
    prompt = schema_text + _question(document.text, shown.schema, names, document.given, format)
    completion = completion_text(
        shown.records, document.text, shown.schema, names, document.given, format
    )
    return Example(document.id, prompt, completion, schema_text, shown.schema, names, shown)


def prompt_text(
    text: str,
    schema: Schema,
    names: Names | None = None,
    given: Sequence[Event] = (),
    format: PromptFormat | None = None,
) -> str:
    """The whole prompt: the schema, the text, the given events, and `result =`.

    Args:
        text: Any string.
        schema: The labels to ask for, in the order to show.
        names: Their identifiers; `None` is `schema.names`.
        given: Events (EAE) whose arguments alone are asked for; their own arguments are not shown.
        format: How to write; `None` is `PromptFormat()`.

    Returns:
        The prompt: `prompt_schema_text(schema, names, format)`, then up to `result =`.
    """
    format, names = format or PromptFormat(), names or schema.names
    return prompt_schema_text(schema, names, format) + _question(text, schema, names, given, format)


def prompt_schema_text(
    schema: Schema, names: Names | None = None, format: PromptFormat | None = None
) -> str:
    """The part of a prompt before the input text: the same for every text."""
    format, names = format or PromptFormat(), names or schema.names
    write = _class_text if format.style == "dataclass" else _line_text
    return "".join(f"{write(label, names)}\n" for label in schema.labels)


def completion_text(
    records: Iterable[Record],
    text: str,
    schema: Schema,
    names: Names | None = None,
    given: Sequence[Event] = (),
    format: PromptFormat | None = None,
) -> str:
    """The answer that holds some records, in the order of the text, each once: ` [...]`.

    Spans without offsets are written without occurrence numbers. `parse_answer` reads the answer
    back. The other arguments are those of `prompt_text`.

    Raises:
        ValueError: A record has a label or role that the schema does not have.
    """
    format, names = format or PromptFormat(), names or schema.names
    writer = _Writer(TextIndex(text), schema, names, format, numbered_triggers=not given)
    unique: dict[object, Record] = {}
    for record in records:
        unique.setdefault(record_key(record), record)
    ordered = sorted(unique.values(), key=first_place)
    return f" [{', '.join(writer.call(record) for record in ordered)}]"


def string_literal(text: str) -> str:
    r"""A Python string literal, on one line, that `ast.literal_eval` reads back as `text`.

    Only what a literal cannot hold is escaped: quotes, backslashes, control characters, line
    separators and lone surrogates. Other characters stay readable.
    """
    return f'"{_ESCAPED.sub(_escape, text)}"'


_ESCAPED = re.compile('["\\\\\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]')
_SHORT_ESCAPES = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\r": "\\r", "\t": "\\t"}


def _escape(match: re.Match[str]) -> str:
    character = match.group()
    code = ord(character)
    return _SHORT_ESCAPES.get(character) or (f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}")


_BASES = {"entity": "Entity", "relation": "Relation", "event": "Event"}
_SLOT_NOTES = {
    "span": "the mention, as it stands in the text",
    "head": "the mention that the relation starts from",
    "tail": "the mention that the relation leads to",
    "trigger": "the words that name the event",
}


def _class_text(label: Label, names: Names) -> str:
    lines = ["@dataclass", f"class {names.class_of(label)}({_BASES[label.kind]}):"]
    if guideline := _guideline(label, names):
        lines.append(f'    """{_docstring(guideline)}"""')
    for slot, identifier in zip(label.slots, names.slots_of(label), strict=True):
        type_ = "List[str]" if slot in label.roles else "str"
        note = _slot_note(slot, identifier) or (
            _SLOT_NOTES[slot.name] if slot not in label.roles else ""
        )
        lines.append(f"    {identifier}: {type_}" + (f"  # {note}" if note else ""))
    return "\n".join(lines)


def _line_text(label: Label, names: Names) -> str:
    identifiers = names.slots_of(label)
    line = f"{names.class_of(label)}({', '.join(identifiers)})"
    notes = [_guideline(label, names)]
    for slot, identifier in zip(label.slots, identifiers, strict=True):
        if note := _slot_note(slot, identifier):
            notes.append(f"{identifier}: {note}")
    text = "; ".join(note for note in notes if note)
    return f"{line}: {text}" if text else line


def _guideline(label: Label, names: Names) -> str:
    guideline = _one_line(label.description)
    if not guideline and names.class_of(label) != label.name:
        guideline = _one_line(label.name)
    return _with_examples(guideline, label.examples)


def _slot_note(slot: Slot, identifier: str) -> str:
    note = _one_line(slot.description)
    if slot.types:
        types = " or ".join(_one_line(type_) for type_ in slot.types)
        note = f"{types}: {note}" if note else types
    if not note and identifier != slot.name:
        note = _one_line(slot.name)
    return _with_examples(note, slot.examples)


def _with_examples(note: str, examples: Sequence[str]) -> str:
    if not examples:
        return note
    such_as = f"Such as: {', '.join(map(_one_line, examples))}"
    return f"{note}{'' if note.endswith(('.', '!', '?')) else '.'} {such_as}" if note else such_as


def _one_line(words: str) -> str:
    # Guidelines are for reading: white space and control characters need not come back.
    return _ESCAPED.sub(
        lambda m: m.group() if m.group() in '"\\' else _escape(m), " ".join(words.split())
    )


def _docstring(words: str) -> str:
    words = words.replace("\\", "\\\\")
    return words.replace('"', '\\"') if '"""' in words or words.endswith('"') else words


def _question(
    text: str, schema: Schema, names: Names, given: Sequence[Event], format: PromptFormat
) -> str:
    """The part of a prompt behind the schema."""
    long = format.style == "dataclass"
    lines = ["# This is the text to analyze"] if long else []
    lines.append(f"text = {string_literal(text)}")
    if given:
        lines += ["# These events are given; list each with its arguments"] if long else []
        lines.append(f"given = {_given_text(given, text, schema, names, format)}")
    if long:
        lines.append("# The annotation instances that take place in the text above are listed here")
    lines.append("result =")
    return "\n".join(lines)


class _Writer:
    """Writes records as calls, with numbers where the default alignment would go elsewhere."""

    def __init__(
        self,
        index: TextIndex,
        schema: Schema,
        names: Names,
        format: PromptFormat,
        numbered_triggers: bool,
    ) -> None:
        self.index = index
        self.aligner = Aligner(index)
        self.schema, self.names, self.format = schema, names, format
        self.numbered_triggers = numbered_triggers
        self.events = 0

    def call(self, record: Record) -> str:
        label = self.schema.get(*key_of(record))
        if label is None:
            raise ValueError(_unknown(record, self.schema))
        if isinstance(record, Entity):
            arguments = [self.fixed("span", record.span), *self.place(label, "span", record.span)]
        elif isinstance(record, Relation):
            arguments = [self.fixed("head", record.head), self.fixed("tail", record.tail)]
            arguments += self.pair(label, record)
        else:
            arguments = [self.fixed("trigger", record.trigger)]
            if self.numbered_triggers:
                arguments += self.place(label, "trigger", record.trigger)
            arguments += self.roles(label, record)
        return f"{self.names.class_of(label)}({', '.join(arguments)})"

    def fixed(self, slot: str, span: Span) -> str:
        literal = string_literal(span.text)
        return literal if self.format.style == "compact" else f"{slot}={literal}"

    def place(self, label: Label, slot: str, span: Span) -> list[str]:
        default = self.aligner.free_place(label.key, span.text)
        wanted = _place(span) or default
        if wanted is not None:
            self.aligner.take_mention(label.key, wanted)
        return self.number(slot, span) if wanted != default else []

    def pair(self, label: Label, record: Relation) -> list[str]:
        head, tail = record.head, record.tail
        default = self.aligner.free_pair(label.key, head.text, tail.text)
        places = (_place(head), _place(tail))
        if None in places or places == default:
            self.aligner.take(label.key, default)
            return []
        # As few numbers as will do: the head's, the tail's, or both.
        by_head = self.aligner.free_pair(label.key, head.text, tail.text, head_place=places[0])
        by_tail = self.aligner.free_pair(label.key, head.text, tail.text, tail_place=places[1])
        self.aligner.take(label.key, places)
        if by_head == places:
            return self.number("head", head)
        if by_tail == places:
            return self.number("tail", tail)
        return self.number("head", head) + self.number("tail", tail)

    def roles(self, label: Label, event: Event) -> list[str]:
        self.events += 1
        identifiers = dict(
            zip((slot.name for slot in label.slots), self.names.slots_of(label), strict=True)
        )
        by_role: dict[str, list[Span]] = {role.name: [] for role in label.roles}
        for argument in event.arguments:
            if argument.role not in by_role:
                raise ValueError(
                    f"The event `{label.name}` has an argument in the role `{argument.role}`, "
                    "which its schema does not have "
                    f"(roles: {listed(by_role, 'none')}). Add the role."
                )
            if argument.span not in by_role[argument.role]:
                by_role[argument.role].append(argument.span)
        written = []
        for role, spans in by_role.items():
            if not spans:
                continue
            literals = [string_literal(span.text) for span in spans]
            bare = self.format.style == "compact" and len(literals) == 1
            written.append(
                f"{identifiers[role]}={literals[0] if bare else '[' + ', '.join(literals) + ']'}"
            )
            numbers = self.role_numbers(event, role, spans)
            if numbers:
                written.append(
                    f"{identifiers[role]}_nth={numbers[0] if len(numbers) == 1 else numbers}"
                )
        return written

    def role_numbers(self, event: Event, role: str, spans: Sequence[Span]) -> list[int]:
        """The occurrence of every span of a role, if the default goes elsewhere for one of them."""
        group, trigger = (self.events, role), _place(event.trigger)
        as_default = True
        for span in spans:
            default = self.aligner.free_argument(group, span.text, trigger)
            wanted = _place(span) or default
            as_default = as_default and wanted == default
            self.aligner.take(group, wanted)
        numbers = [self.index.number(span.text, place) for span in spans if (place := _place(span))]
        if as_default or not self.format.occurrences or len(numbers) < len(spans):
            return []
        return [number for number in numbers if number] if all(numbers) else []

    def number(self, slot: str, span: Span) -> list[str]:
        place = _place(span)
        number = self.index.number(span.text, place) if place and self.format.occurrences else None
        return [f"{slot}_nth={number}"] if number else []


def _given_text(
    given: Sequence[Event], text: str, schema: Schema, names: Names, format: PromptFormat
) -> str:
    # A trigger that the text repeats needs its number here, whatever the answers may say.
    writer = _Writer(
        TextIndex(text), schema, names, replace(format, occurrences=True), numbered_triggers=True
    )
    events = [replace(event, arguments=()) for event in sorted(given, key=first_place)]
    return f"[{', '.join(map(writer.call, events))}]"


def _place(span: Span) -> Place | None:
    return None if span.start is None or span.end is None else (span.start, span.end)


def _check_askable(document: Document) -> None:
    for record in document.records:
        if document.schema.get(*key_of(record)) is None:
            raise ValueError(f"Document `{document.id}`: {_unknown(record, document.schema)}")


def _unknown(record: Record, schema: Schema) -> str:
    kind, name = key_of(record)
    labels = listed((label.name for label in schema.labels if label.kind == kind), "none")
    return (
        f"There is a record of the {kind} `{name}`, which the schema does not have "
        f"(it has {labels}). Add the label."
    )
