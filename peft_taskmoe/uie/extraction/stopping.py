"""When an answer ends: an end token, the line feed behind its list, or a loop."""

from __future__ import annotations

import re
from functools import cached_property
from typing import Any

import torch
from transformers import StoppingCriteria

LOOP = 96
"""Tokens that are looked at for a loop: three rounds of the longest one."""

LEAVING = 0.25
"""Of a batch's rows; as soon as so many are done, they leave."""

_STRING = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?')


class AnswerEnds:
    """Which tokens end an answer.

    Args:
        model: The model, whose generation config may add end tokens.
        tokenizer: Its tokenizer.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer

    @cached_property
    def tokens(self) -> set[int]:
        """End tokens: the tokenizer's, and those of the model's generation config."""
        found = getattr(getattr(self.model, "generation_config", None), "eos_token_id", None)
        ends = {*found} if isinstance(found, (list, tuple)) else {found}
        return {int(end) for end in {*ends, self.tokenizer.eos_token_id} if end is not None}

    @cached_property
    def line_feeds(self) -> set[int]:
        """The tokens whose text holds a line feed."""
        texts = self.tokenizer.batch_decode([[i] for i in range(len(self.tokenizer))])
        return {i for i, text in enumerate(texts) if "\n" in text}

    def decode(self, tokens: list[int] | torch.Tensor) -> str:
        """The text of an answer's tokens."""
        text: str = self.tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def closes(self, tokens: list[int] | torch.Tensor) -> bool:
        """Whether the answer's list is closed."""
        bare = _STRING.sub("", self.decode(tokens))
        return "]" in bare and bare.count("[") <= bare.count("]")

    def end_at(self, last: int, tokens: list[int] | torch.Tensor) -> bool:
        """Whether the last of an answer's tokens ends it."""
        return last in self.tokens or (last in self.line_feeds and self.closes(tokens))

    def cut(self, tokens: list[int]) -> tuple[list[int], bool]:
        """The tokens up to the answer's end, and whether it ended by itself."""
        for i, token in enumerate(tokens):
            if token in self.tokens:
                return tokens[:i], True
            if token in self.line_feeds and self.closes(tokens[: i + 1]):
                return tokens[: i + 1], True
        return tokens, False


class EndOfAnswer(StoppingCriteria):
    """Stops the rows whose answer has ended or repeats itself.

    Greedy decoding hardly ever leaves a loop, and what it repeats counts once.

    Args:
        ends: Which tokens end an answer.
        prompt_length: Tokens of the prompts.
        rows_leave: End the generation as soon as a share of `LEAVING` is done; the others go on in
            another.

    Attributes:
        done: `(b,)` bool, the rows that are done; None before the first token.
        lengths: `(b,)`, the tokens of each answer; what stands behind them is padding.
    """

    def __init__(self, ends: AnswerEnds, prompt_length: int, rows_leave: bool) -> None:
        self.ends, self.prompt_length, self.rows_leave = ends, prompt_length, rows_leave
        self.done: torch.Tensor | None = None
        self.lengths: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """`(b,)` bool: which rows stop."""
        written = input_ids[:, self.prompt_length :]
        lasts = input_ids[:, -1].tolist()
        ended = [self.ends.end_at(last, row) for last, row in zip(lasts, written, strict=True)]
        done = torch.tensor(ended, device=input_ids.device) | repeats(written)
        before = torch.zeros_like(done) if self.done is None else self.done
        lengths = torch.full_like(done, written.shape[1], dtype=torch.long)
        self.lengths = lengths if self.lengths is None else lengths.where(~before, self.lengths)
        self.done = before | done
        if self.rows_leave and int(self.done.sum()) >= LEAVING * len(done):
            return torch.ones_like(done)
        return self.done


def repeats(tokens: torch.Tensor) -> torch.Tensor:
    """Which rows' last `LOOP` tokens are one sequence three times or more.

    Args:
        tokens: `(b, length)`.

    Returns:
        `(b,)` bool.
    """
    tail = tokens[:, -LOOP:]
    if tail.shape[1] < LOOP:
        return torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    periods = range(1, LOOP // 3 + 1)
    return torch.stack([(tail[:, p:] == tail[:, :-p]).all(1) for p in periods]).any(0)
