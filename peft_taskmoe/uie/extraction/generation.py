"""Greedy answers to a batch of prompts, with the model's own probabilities.

The generation settings of the base model have no part in them, but for how caches are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteriaList,
)

from ..records import Event
from ..schema import Schema
from .placement import device_of
from .prefix import PrefixCache, keeps_keys_and_values, methods_of_whole_prompts
from .routing import reader_of, scope_is_taken
from .stopping import AnswerEnds, EndOfAnswer

if TYPE_CHECKING:
    from .constrained import Constraint

_KEPT_SETTINGS = (  # of the model's generation config: how it computes, not what
    *("use_cache", "cache_implementation", "cache_config", "max_cache_len", "prefill_chunk_size"),
    *("compile_config", "disable_compile", "bos_token_id", "decoder_start_token_id"),
    *("continuous_batching_config", "transformers_version"),
)


class Prompt(NamedTuple):
    """One prompt: its tokens, and what it asks about."""

    ids: list[int]
    schema: Schema
    text: str
    given: tuple[Event, ...] = ()


class Written(NamedTuple):
    """The tokens that answer a prompt, and their log-probabilities."""

    tokens: list[int]
    log_probs: list[float]


@dataclass
class Generator:
    """Answers batches of prompts.

    Attributes:
        model: The causal language model.
        tokenizer: Its tokenizer.
        ends: Which tokens end an answer.
        constraint: What holds answers to their grammars, if anything does.
        prefix: What reads the common beginning of prompts once, if anything does.
    """

    model: Any
    tokenizer: Any
    ends: AnswerEnds
    constraint: Constraint | None = None
    prefix: PrefixCache | None = None

    def ids(self, prompt: str) -> list[int]:
        """A prompt's tokens. What looks like a special token in a text is a part of the text.

        An end token that the tokenizer adds would stand between the prompt and its answer.
        """
        ids: list[int] = self.tokenizer(prompt, split_special_tokens=True, verbose=False).input_ids
        while ids and ids[-1] in self.tokenizer.all_special_ids:
            ids.pop()
        return ids

    @torch.no_grad()
    def generate(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[Written]:
        """Greedy answers.

        A batch would last as long as its longest answer. So rows that are done leave it, some at a
        time, and the others go on with their keys and values.
        """
        training = self.model.training
        self.model.eval()
        try:
            return self._generate(prompts, max_new_tokens)
        finally:
            self.model.train(training)

    def _generate(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[Written]:
        input_ids, mask = self._padded(prompts)
        length = input_ids.shape[1]
        passed: dict[str, Any] = {}
        if self.prefix is not None:
            passed = self.prefix.read_once([p.ids for p in prompts], [p.schema for p in prompts])
        rows_leave = self._rows_may_leave(len(prompts))
        reader = reader_of(self.model) if rows_leave else None
        if reader is not None:
            # Or the prompts would be embedded again, with the beginnings of their answers.
            passed["task_embeds"] = reader.embed(input_ids, mask)
        constraint = None
        if self.constraint is not None:
            constraint = self.constraint.processor([(p.schema, p.text, p.given) for p in prompts])
        written = [Written([], []) for _ in prompts]
        rows = list(range(len(prompts)))  # of the prompts that are not done
        while True:
            chosen = _ChosenTokens()
            end = EndOfAnswer(self.ends, length, rows_leave)
            output = self.model.generate(
                input_ids=input_ids,
                attention_mask=mask,
                **{**self._settings(), **passed},
                max_new_tokens=max_new_tokens - (input_ids.shape[1] - length),
                # The constraint comes behind: probabilities are the model's own.
                logits_processor=LogitsProcessorList(
                    [chosen, *([constraint] if constraint else [])]
                ),
                stopping_criteria=StoppingCriteriaList([end]),
            )
            input_ids = output.sequences
            new = chosen.log_probs_of(input_ids[:, -1])
            assert end.done is not None and end.lengths is not None
            for row, tokens, log_probs, n in zip(
                rows, input_ids[:, length:].tolist(), new, end.lengths.tolist(), strict=True
            ):
                log_probs = written[row].log_probs + log_probs
                written[row] = Written(tokens[:n], log_probs[:n])
            left = (~end.done).nonzero().flatten()
            if not rows_leave or not len(left) or input_ids.shape[1] - length == max_new_tokens:
                return written
            rows = [rows[i] for i in left.tolist()]
            input_ids = input_ids[left]
            mask = F.pad(mask[left], (0, input_ids.shape[1] - mask.shape[1]), value=1)
            if constraint is not None:
                constraint.keep(left.tolist())
            embeds = passed.get("task_embeds")
            if embeds is not None:
                embeds = {adapter: rows_of[left] for adapter, rows_of in embeds.items()}
            passed = {} if embeds is None else {"task_embeds": embeds}
            passed |= _keys_and_values_of(output, left)

    def _padded(self, prompts: Sequence[Prompt]) -> tuple[torch.Tensor, torch.Tensor]:
        """The prompts padded on the left, and their mask."""
        length = max(len(prompt.ids) for prompt in prompts)
        missing = [length - len(prompt.ids) for prompt in prompts]
        ids = [[self._pad] * n + p.ids for n, p in zip(missing, prompts, strict=True)]
        mask = [[0] * n + [1] * (length - n) for n in missing]
        device = device_of(self.model)
        return torch.tensor(ids, device=device), torch.tensor(mask, device=device)

    @property
    def _pad(self) -> int:
        pad: int | None = self.tokenizer.pad_token_id
        return next(iter(sorted(self.ends.tokens)), 0) if pad is None else pad

    def _settings(self) -> dict[str, Any]:
        """Plain greedy decoding, whatever the model's own generation config says."""
        defaults = vars(GenerationConfig())
        unset = {
            name: defaults.get(name)
            for name, value in vars(self.model.generation_config).items()
            if value != defaults.get(name) and name not in _KEPT_SETTINGS and name[0] != "_"
        }
        return {
            **unset,
            "do_sample": False,
            "num_beams": 1,
            "num_return_sequences": 1,
            "pad_token_id": self._pad,
            "eos_token_id": sorted(self.ends.tokens) or None,
            "return_dict_in_generate": True,
        }

    def _rows_may_leave(self, rows: int) -> bool:
        """Whether a generation may be continued by another call of `generate` with fewer rows."""
        config = self.model.generation_config
        return (
            rows > 1
            and not scope_is_taken()
            and not methods_of_whole_prompts(self.model)
            and not self.model._is_stateful
            and config.use_cache is not False
            and config.cache_implementation is None
        )


class _ChosenTokens(LogitsProcessor):
    """Remembers the log-probability of every token that was chosen, one step's logits at a time."""

    def __init__(self) -> None:
        self.last: torch.Tensor | None = None
        self.log_probs: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self._see(input_ids[:, -1])
        self.last = torch.log_softmax(scores.float(), dim=-1)
        return scores

    def log_probs_of(self, last: torch.Tensor) -> list[list[float]]:
        """The log-probabilities of every row, whose last step chose these tokens."""
        self._see(last)
        found: list[list[float]] = torch.stack(self.log_probs, 1).tolist()
        return found

    def _see(self, tokens: torch.Tensor) -> None:
        if self.last is not None:
            self.log_probs.append(self.last.gather(1, tokens.unsqueeze(1)).squeeze(1).cpu())
            self.last = None


def _keys_and_values_of(output: Any, rows: torch.Tensor) -> dict[str, Any]:
    """The arguments of `generate` that pass what was computed for some rows, if it can be cut."""
    if not keeps_keys_and_values(output):
        return {}
    cache = output.past_key_values
    cache.batch_select_indices(rows)
    return {"past_key_values": cache, "use_cache": True}
