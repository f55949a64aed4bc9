"""Finds the prompts in `input_ids`: what precedes the first label of a row or document."""

from __future__ import annotations

import re
import warnings
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .cache import LRUCache

IGNORED_LABEL = -100
SCHEMA_END = re.compile(r'^(?:# This is the text to analyze$|text = ")', re.MULTILINE)
"""Where in a prompt of `peft_taskmoe.uie` the schema ends and the text begins, in either style."""
_MEMO_BYTES = 256 * 2**20


@dataclass(frozen=True, slots=True)
class BatchPrompts:
    """The prompts of one batch.

    Attributes:
        texts: One per row, or per document of packed rows.
        token_tasks: `(rows * length,)` index of each token's document for packed rows, else None.
    """

    texts: list[str]
    token_tasks: torch.Tensor | None


def packed_documents(
    position_ids: torch.Tensor | None, attention_mask: torch.Tensor | None
) -> torch.Tensor | None:
    """Which document each token of a packed batch belongs to.

    A batch is packed (or padding-free) if it has no attention mask and its positions start over
    within a row.

    Args:
        position_ids: `(rows, length)` or None.
        attention_mask: None for packed batches.

    Returns:
        `(rows * length,)` indices counting up from 0, or None if no row holds several documents.
    """
    if position_ids is None or attention_mask is not None:
        return None
    if position_ids.dim() != 2 or position_ids.shape[1] < 2:
        return None
    starts = position_ids[:, 1:] <= position_ids[:, :-1]
    if not bool(starts.any()):
        return None
    starts = torch.cat((torch.ones_like(starts[:, :1]), starts), dim=1)
    return starts.flatten().long().cumsum(0) - 1


def prompt_ids(
    input_ids: torch.Tensor,
    labels: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    documents: torch.Tensor | None,
) -> list[list[int]]:
    """The token ids of every example's prompt: what precedes its first label that is not -100.

    An example's first token is prompt even with a label, which no loss reads: nothing predicts it.

    Args:
        input_ids: `(rows, length)`.
        labels: Same shape; None, or of another shape such as one class per row: all is prompt.
        attention_mask: Same shape, 0 for padding; or None.
        documents: See `packed_documents`.

    Returns:
        One list of ids per row, or per document of packed rows.
    """
    ids = input_ids.reshape(-1).tolist()
    count, length = input_ids.shape
    answer = None
    if labels is not None and labels.shape == input_ids.shape:
        answer = (labels.reshape(-1) != IGNORED_LABEL).tolist()
    visible = None
    if attention_mask is not None and attention_mask.shape == input_ids.shape:
        visible = attention_mask.reshape(-1).tolist()
    owner = [i // length for i in range(len(ids))] if documents is None else documents.tolist()
    prompts: list[list[int]] = [[] for _ in range(count if documents is None else owner[-1] + 1)]
    started = [False] * len(prompts)
    answered = [False] * len(prompts)
    for i, (token, example) in enumerate(zip(ids, owner, strict=True)):
        if visible is not None and not visible[i]:
            continue
        if answer is not None and answer[i] and started[example]:
            answered[example] = True
        started[example] = True
        if not answered[example]:
            prompts[example].append(token)
    return prompts


def schema_part(prompt: str) -> str:
    """The part of a prompt of `peft_taskmoe.uie` before its text.

    Raises:
        ValueError: If the prompt has another format.
    """
    end = SCHEMA_END.search(prompt)
    if end is None:
        raise ValueError(
            'The task encoder reads the schema only (`text="schema"`), but this prompt has no line '
            f"`text = ...` that ends it: {prompt[:80]!r}... Write prompts in the format of "
            "`peft_taskmoe.uie`, or pass `task_embeds`."
        )
    return prompt[: end.start()]


def task_texts(texts: Sequence[str], part: str) -> Sequence[str]:
    """What an encoder reads of a column of prompts or schemas.

    Args:
        texts: The column.
        part: The encoder's `text`. Of `"schema"`, a text that is no prompt of `peft_taskmoe.uie` is
            a schema already.
    """
    if part != "schema":
        return texts
    return [schema_part(x) if isinstance(x, str) and SCHEMA_END.search(x) else x for x in texts]


class PromptReader:
    """Turns the `input_ids` of a batch into the texts of its prompts.

    Args:
        tokenizer: The adapted model's own tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._texts: LRUCache[tuple[int, ...], str] = LRUCache(
            _MEMO_BYTES, lambda ids, text: 36 * len(ids) + 2 * len(text) + 200
        )
        self._last: tuple[weakref.ref[torch.Tensor], int, BatchPrompts] | None = None
        self._warned = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": None, "_texts": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["tokenizer"])  # type: ignore[misc]

    def read(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        *,
        answers: bool = True,
        training: bool = False,
    ) -> BatchPrompts:
        """Find the prompts of a batch.

        Args:
            input_ids: See `prompt_ids`.
            labels: Likewise. Trainers that compute the loss themselves leave them out; if the same
                tensor of `input_ids` was seen with labels before, those count.
            attention_mask: Likewise.
            position_ids: See `packed_documents`.
            answers: Whether `input_ids` hold answers as well, which `labels` mark; if not,
                everything is prompt.
            training: Whether the model trains on the batch.

        Returns:
            The prompts.

        Raises:
            ValueError: If the model trains on answers and no labels tell them from the prompts.
        """
        if not answers:
            labels = None
        elif labels is None:
            found = self._recall(input_ids)
            if found is not None:
                return found
            if training:
                raise ValueError(
                    "This training step has `input_ids` without `labels`, so the router would read "
                    "the answers. Pass `task_embeds`: encode the prompts with "
                    "`encoder.encode_dataset(dataset)` and wrap the collator in `TaskCollator`."
                )
        documents = packed_documents(position_ids, attention_mask)
        prompts = prompt_ids(input_ids, labels, attention_mask, documents)
        texts = [self.text_of(ids) for ids in prompts]
        if documents is not None:
            for i, size in enumerate(documents.bincount().tolist()):
                if size == 1 and not texts[i]:  # a token of padding (`pad_to_multiple_of`)
                    texts[i], prompts[i] = texts[i - 1], prompts[i - 1]
        found = BatchPrompts(texts, documents)
        if labels is not None:
            self._warn_of_missing_prompts(prompts)
            if not input_ids.is_inference():
                self._last = (weakref.ref(input_ids), input_ids._version, found)
        return found

    def text_of(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens."""
        key = tuple(ids)
        text = self._texts.get(key)
        if text is None:
            text = self.tokenizer.decode(list(ids), skip_special_tokens=True)
            self._texts.put(key, text)
        return text

    def _recall(self, input_ids: torch.Tensor) -> BatchPrompts | None:
        """The prompts found when this very batch came with labels, if it was the last that did."""
        if self._last is None:
            return None
        last, version, found = self._last
        return found if last() is input_ids and input_ids._version == version else None

    def _warn_of_missing_prompts(self, prompts: list[list[int]]) -> None:
        missing = sum(len(prompt) <= 1 for prompt in prompts)
        if missing and not self._warned:
            self._warned = True
            warnings.warn(
                f"{missing} of {len(prompts)} examples have no prompt: their labels begin at the "
                "first token, which alone chooses their experts. Train on prompts and completions, "
                'pack with `packing_strategy="bfd"`, or pass `task_embeds`.',
                UserWarning,
                stacklevel=6,
            )
