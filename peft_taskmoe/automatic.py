"""The automatic way: the task embedding of a forward from its own `input_ids`.

It finds each example's prompt (everything before its first label, per document where rows are packed), turns it back into
text with the model's tokenizer, and has the encoder embed it. It knows no layer and no PEFT.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .encoder import TaskEncoder

IGNORED_LABEL = -100
SCHEMA_END = re.compile(r'^(?:# This is the text to analyze$|text = ")', re.MULTILINE)
"""Where in a prompt of `peft_taskmoe.uie` the schema ends and the text begins, in either style."""
_CACHED_PROMPTS = 65_536


@dataclass(slots=True)
class FoundTasks:
    """The tasks of one batch.

    Attributes:
        task_embeds: `(n, task_dim)`.
        token_tasks: `(rows * length,)` index of each token's document for packed rows, else None.
    """

    task_embeds: torch.Tensor
    token_tasks: torch.Tensor | None


def packed_documents(position_ids: torch.Tensor | None, attention_mask: torch.Tensor | None) -> torch.Tensor | None:
    """Which document each token of a packed batch belongs to.

    A batch is packed (or padding-free) if it has no attention mask and its positions start over within a row.

    Args:
        position_ids: `(rows, length)` or None.
        attention_mask: None for packed batches.

    Returns:
        `(rows * length,)` indices counting up from 0, or None if no row holds more than one document.
    """
    if position_ids is None or attention_mask is not None or position_ids.dim() != 2 or position_ids.shape[1] < 2:
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

    Args:
        input_ids: `(rows, length)`.
        labels: Same shape, or None: then everything is prompt.
        attention_mask: Same shape, 0 for padding; or None.
        documents: See `packed_documents`.

    Returns:
        One list of ids per row, or per document of packed rows.
    """
    ids = input_ids.reshape(-1).tolist()
    count, length = input_ids.shape
    answer = None if labels is None else (labels.reshape(-1) != IGNORED_LABEL).tolist()
    visible = None
    if attention_mask is not None and attention_mask.shape == input_ids.shape:
        visible = attention_mask.reshape(-1).tolist()
    owner = [i // length for i in range(len(ids))] if documents is None else documents.tolist()
    prompts: list[list[int]] = [[] for _ in range(count if documents is None else owner[-1] + 1)]
    answered = [False] * len(prompts)
    for i, (token, example) in enumerate(zip(ids, owner, strict=True)):
        if visible is not None and not visible[i]:
            continue
        if answer is not None and answer[i]:
            answered[example] = True
        if not answered[example]:
            prompts[example].append(token)
    return prompts


class PromptEncoder:
    """An encoder and the tokenizer that turns `input_ids` back into the text it reads.

    Args:
        encoder: The frozen task encoder.
        tokenizer: The adapted model's own tokenizer.
    """

    def __init__(self, encoder: TaskEncoder, tokenizer: Any) -> None:
        self.encoder = encoder
        self.tokenizer = tokenizer
        self._texts: OrderedDict[tuple[int, ...], str] = OrderedDict()

    def __deepcopy__(self, memo: dict[int, Any]) -> PromptEncoder:
        return self  # frozen: a copied model goes on with the same encoder

    def tasks_of(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> FoundTasks:
        """Embed the prompts of a batch; arguments as in `prompt_ids` and `packed_documents`."""
        documents = packed_documents(position_ids, attention_mask)
        texts = [self._text(ids) for ids in prompt_ids(input_ids, labels, attention_mask, documents)]
        return FoundTasks(self.encoder(texts).to(input_ids.device), documents)

    def _text(self, ids: Sequence[int]) -> str:
        key = tuple(ids)
        text = self._texts.get(key)
        if text is None:
            text = self._read(self.tokenizer.decode(list(ids), skip_special_tokens=True))
            self._texts[key] = text
            if len(self._texts) > _CACHED_PROMPTS:
                self._texts.popitem(last=False)
        else:
            self._texts.move_to_end(key)
        return text

    def _read(self, prompt: str) -> str:
        """The part of a prompt that the encoder reads, by its `text` setting."""
        if self.encoder.config.text == "prompt":
            return prompt
        end = SCHEMA_END.search(prompt)
        if end is None:
            raise ValueError(
                "The task encoder reads only the schema (`text=\"schema\"`), the part of a prompt before the line `text = ...`, "
                f"but this prompt has no such line: {prompt[:80]!r}... Write prompts in the format of `peft_taskmoe.uie`, or encode "
                "the schemas yourself and pass `task_embeds`."
            )
        return prompt[: end.start()]
