"""From the tokens that a model wrote to an answer: where it ends, its records, their confidence."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import fmean

import torch

from ..parse import ParsedAnswer, parse_answer
from ..records import Problem
from ..schema import Schema
from .generation import Written
from .prompts import PromptWindow
from .results import Answer
from .stopping import AnswerEnds, repeats

_STEP = 16  # tokens that are decoded at a time, with as many before them


def read_answer(
    written: Written, ends: AnswerEnds, schema: Schema, part: PromptWindow, max_new_tokens: int
) -> Answer:
    """Read what a model wrote about a window.

    Args:
        written: The tokens, with whatever stands behind the answer's end.
        ends: Which tokens end an answer.
        schema: What was asked for.
        part: The window that was asked about.
        max_new_tokens: The length that answers are cut off at.
    """
    tokens, complete = ends.cut(written.tokens)
    parsed = parse_answer(ends.decode(tokens), schema, part.window.text, given=part.given)
    if bool(repeats(torch.tensor([tokens]))):
        complete = False  # what stands behind a stopped row is padding
        why = "It was stopped because it repeats itself."
    else:
        why = f"It was cut off at `max_new_tokens={max_new_tokens}`; allow more."
    if not complete:
        parsed = replace(parsed, problems=_cut_short(parsed.problems, why))
    parsed = with_confidence(parsed, tokens, written.log_probs, ends.decode)
    return Answer((part.window.start, part.window.end), parsed, len(tokens), complete)


def _cut_short(problems: tuple[Problem, ...], why: str) -> tuple[Problem, ...]:
    """Say of an answer that is not whole why it is not; one whose list is closed lost nothing."""
    kinds = {problem.kind for problem in problems}
    if "truncated" not in kinds and "malformed" in kinds:
        more = Problem("truncated", f"The answer ends inside a broken record. {why}", "")
        return (*problems, more)
    return tuple(
        replace(one, message=f"{one.message} {why}") if one.kind == "truncated" else one
        for one in problems
    )


def with_confidence(
    parsed: ParsedAnswer,
    tokens: Sequence[int],
    log_probs: Sequence[float],
    decode: Callable[[list[int]], str],
) -> ParsedAnswer:
    """Give each record the geometric mean of the probabilities of the tokens that write it.

    A token counts for a record if any of its characters lies inside the record's part of the
    answer. The mean over tokens makes long and short records comparable. A record whose
    probabilities are not numbers has no confidence.
    """
    if not parsed.records:
        return parsed
    ends = token_ends(tokens, decode)
    records = []
    for record, (start, end) in zip(parsed.records, parsed.sources, strict=True):
        behind = min(bisect_left(ends, end) + 1, len(ends))
        inside = log_probs[bisect_right(ends, start) : behind]
        value = math.exp(fmean(inside)) if inside else math.nan
        records.append(replace(record, confidence=value if math.isfinite(value) else None))
    return replace(parsed, records=tuple(records))


def token_ends(tokens: Sequence[int], decode: Callable[[list[int]], str]) -> list[int]:
    """Where each token ends in the text of all, in characters.

    Some tokens before are decoded along, for what a token says may depend on its neighbours; a
    character that is not whole yet counts as one.
    """
    ends: list[int] = []
    reached = 0
    for first in range(0, len(tokens), _STEP):
        before = max(first - _STEP, 0)
        offset = reached - len(decode(list(tokens[before:first])))
        for behind in range(first + 1, min(first + _STEP, len(tokens)) + 1):
            reached = max(offset + len(decode(list(tokens[before:behind]))), reached)
            ends.append(reached)
    return ends
