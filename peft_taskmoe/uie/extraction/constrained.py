"""Answers that can only be read: a grammar for each question, and the mask it puts on every token.

It knows schemas, the form of completions (`prompt`) and `llguidance`, which turns a grammar into
masks; it needs the extra `constrained` and imports it when a `Constraint` is made. It does not know
models: a mask changes logits, nothing else.

The language of a question is that of the completions a model is trained on, in both styles: classes
and slots of the schema (of given events, these events alone), occurrence numbers, and mentions that
are substrings of the text.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from transformers import LogitsProcessor

from ..prompt import string_literal
from ..records import Event
from ..schema import Label, Schema


def answer_grammar(schema: Schema, text: str, given: Sequence[Event] = ()) -> str:
    r"""The language of the answers to one question, as a Lark grammar of `llguidance`.

    A mention is any substring of the text, of one character or more, written as `string_literal`
    writes it: a chunk of the substring automaton is the escape of one character, so that no escape
    is ever cut in two.

    Args:
        schema: The labels that may be named.
        text: The text that mentions are taken from; not empty.
        given: The events that alone may be listed, if events are given.

    Returns:
        The grammar. `parse_answer` reads every sentence of it without a problem of form, of labels,
        slots or mentions; what it can still report is an occurrence number that is too high, or the
        same said twice.
    """
    records: list[str] = []
    rules: list[str] = []
    if given:
        labels = [
            (schema.get("event", event.label), string_literal(event.trigger.text))
            for event in given
        ]
        for label, trigger in dict.fromkeys(labels):
            if label is not None:
                records.append(_call(schema, label, len(records), rules, trigger))
    else:
        records += [_call(schema, label, i, rules, None) for i, label in enumerate(schema.labels)]
    pieces = json.dumps([string_literal(character)[1:-1] for character in text])
    lines = [
        'start: " "? "[" (record (", " record)*)? "]"',
        f"record: {' | '.join(f'record{i}' for i in range(len(records)))}",
        *(f"record{i}: {body}" for i, body in enumerate(records)),
        *rules,
        'mentions: MENTION | "[" MENTION (", " MENTION)* "]"',
        'numbers: NUMBER | "[" NUMBER (", " NUMBER)* "]"',
        r'MENTION: "\"" (SUBSTRING & /(?s:.+)/) "\""',
        f'SUBSTRING: %regex {{"substring_chunks": {pieces}}}',
        "NUMBER: /[1-9][0-9]{0,3}/",
    ]
    return "\n".join(lines) + "\n"


def _call(schema: Schema, label: Label, number: int, rules: list[str], trigger: str | None) -> str:
    """The rule of one class; the rule of an event's roles is added to `rules`."""
    identifiers = schema.names.slots_of(label)
    fixed, roles = (
        identifiers[: -len(label.roles) or None],
        identifiers[len(identifiers) - len(label.roles) :],
    )
    mention = "MENTION" if trigger is None else _quoted(trigger)
    by_name = ' ", " '.join(f"{_quoted(f'{slot}=')} {mention}" for slot in fixed)
    by_position = ' ", " '.join([mention] * len(fixed))
    parts = [_quoted(f"{schema.names.class_of(label)}("), f"({by_name} | {by_position})"]
    if trigger is None:
        parts += [f"({_quoted(f', {slot}_nth=')} NUMBER)?" for slot in fixed]
    if roles:
        filled = [f"{_quoted(f'{role}=')} mentions" for role in roles]
        filled += [f"{_quoted(f'{role}_nth=')} numbers" for role in roles]
        rules.append(f"roles{number}: {' | '.join(filled)}")
        parts.append(f'(", " roles{number})*')
    return " ".join([*parts, '")"'])


def _quoted(words: str) -> str:
    return json.dumps(words, ensure_ascii=False)


class Constraint:
    """Makes the logits processors that hold a model to the grammars of its questions.

    Args:
        tokenizer: The model's tokenizer, a fast one.
        ends: The tokens that end an answer.

    Raises:
        ImportError: `llguidance` is not installed.
        ValueError: The tokenizer is not a fast one, or nothing ends an answer.
    """

    def __init__(self, tokenizer: Any, ends: Sequence[int]) -> None:
        if find_spec("llguidance") is None:
            raise ImportError(
                "Constrained answers need `llguidance`, which is not installed. Run `pip install "
                "'peft_taskmoe[constrained]'`, or leave `constrained=True` out."
            )
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(
                f"`{type(tokenizer).__name__}` is no fast tokenizer, and the bytes of its tokens "
                "cannot be told. Load a fast one, or leave `constrained=True` out."
            )
        if not ends:
            raise ValueError(
                "The tokenizer has no end-of-sequence token, so a constrained answer could never "
                "end. Set `tokenizer.eos_token`."
            )
        self._tokenizer, self._ends = tokenizer, list(ends)
        self._wrapped: dict[int, Any] = {}

    def processor(self, questions: Iterable[tuple[Schema, str, Sequence[Event]]]) -> Masks:
        """The processor for one generation.

        Args:
            questions: For each row of the batch: schema, text, given events.

        Returns:
            A processor that sets the logits of all tokens to -inf that the row's grammar does not
            allow next.
        """
        return Masks(self, [answer_grammar(*question) for question in questions])

    def matcher(self, grammar: str, vocabulary: int) -> Any:
        """The state of one answer, for logits of so many tokens."""
        import llguidance.hf

        if vocabulary not in self._wrapped:  # takes a second
            self._wrapped[vocabulary] = llguidance.hf.from_tokenizer(
                self._tokenizer, vocabulary, self._ends
            )
        return llguidance.LLMatcher(self._wrapped[vocabulary], grammar, log_level=0)


class Masks(LogitsProcessor):
    """Follows the answers of a batch and masks what they cannot go on with."""

    def __init__(self, constraint: Constraint, grammars: Sequence[str]) -> None:
        self.constraint, self.grammars = constraint, grammars
        self.matchers: list[Any] = []
        self.padded: set[int] = set()

    def keep(self, rows: Sequence[int]) -> None:
        """Follow only these rows from now on; none of them was stopped from outside."""
        self.matchers = [self.matchers[i] for i in rows]
        self.padded.clear()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Mask the logits of every row."""
        vocabulary = scores.shape[1]
        if not self.matchers:
            self.matchers = [
                self.constraint.matcher(grammar, vocabulary) for grammar in self.grammars
            ]
        else:
            for i, token in enumerate(input_ids[:, -1].tolist()):
                matcher = self.matchers[i]
                if i in self.padded or matcher.is_stopped():
                    continue
                if matcher.validate_tokens([token]):
                    matcher.consume_token(token)
                else:  # never chosen under the mask: the row was stopped, for it repeats itself
                    self.padded.add(i)
        allowed = np.ones((len(self.matchers), vocabulary), dtype=bool)
        for i, (row, matcher) in enumerate(zip(allowed, self.matchers, strict=True)):
            if i in self.padded:
                continue
            if matcher.is_error():
                warnings.warn(
                    "An answer goes on without constraint, because its grammar is too much for "
                    f"llguidance: {matcher.get_error()}",
                    stacklevel=2,
                )
            else:  # behind the end of an answer, nothing but an end is allowed
                bits = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
                row[:] = np.unpackbits(bits, count=vocabulary, bitorder="little")
        return scores.masked_fill(~torch.from_numpy(allowed).to(scores.device), -torch.inf)
