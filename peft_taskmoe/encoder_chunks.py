"""Cuts the tokens of a text into overlapping chunks that fit an encoder's window."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from .encoder_config import TaskEncoderConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Tokens, where neither the model nor its tokenizer states a limit (T5's positions are relative).
UNKNOWN_WINDOW = 512
# A tokenizer's `model_max_length` above this means "not known"; transformers writes 1e30.
NO_LIMIT = 1_000_000


class Chunk(NamedTuple):
    """Tokens read at once, the weight of each in its text's vector, and the text's number."""

    ids: list[int]
    weights: list[float]
    text: int


class Chunker:
    """Cuts texts for one encoder: `window` tokens a chunk, of which `body` are the text's."""

    def __init__(
        self, config: TaskEncoderConfig, model: nn.Module, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        self.pooling = config.pooling
        self.prefix, self.suffix = _special_tokens(tokenizer)
        self.window = _window(config.max_length, model, tokenizer)
        self.body = self.window - len(self.prefix + self.suffix)
        self.stride = self.window // 8 if config.stride is None else config.stride
        if self.stride >= self.body:
            raise ValueError(
                f"Chunks of {self.window} tokens hold {max(self.body, 0)} of the text and cannot "
                f"share {self.stride} of them. Lower `stride` or raise `max_length`."
            )

    def cut(self, ids: list[int], text: int) -> Iterator[Chunk]:
        """Chunks of one text, whose weights make every token of it count once."""
        starts = [0]
        while starts[-1] + self.body < len(ids):
            starts.append(starts[-1] + self.body - self.stride)
        bodies = [ids[start : start + self.body] for start in starts]
        seen = [0] * len(ids)  # chunks that contain a token
        for start, body in zip(starts, bodies, strict=True):
            for i in range(start, start + len(body)):
                seen[i] += 1
        prefix, suffix, k = self.prefix, self.suffix, len(starts)
        shares = [1 / n for n in [k] * len(prefix) + seen + [k] * len(suffix)]
        if not shares:
            raise ValueError(
                "The task text is empty and the tokenizer adds no special tokens, so there is "
                "nothing to encode. Pass a text."
            )
        if self.pooling == "mean":
            shares = [share / len(shares) for share in shares]
        elif self.pooling == "cls":
            shares[1:] = [0.0] * (len(shares) - 1)
        elif self.pooling == "last":
            shares[:-1] = [0.0] * (len(shares) - 1)
        before, after = shares[: len(prefix)], shares[len(prefix) + len(ids) :]
        for start, body in zip(starts, bodies, strict=True):
            inside = shares[len(prefix) + start : len(prefix) + start + len(body)]
            yield Chunk(prefix + body + suffix, before + inside + after, text)


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The tokens that a tokenizer puts before and after a text."""
    body = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(body) + 1):
        if whole[start : start + len(body)] == body:
            return whole[:start], whole[start + len(body) :]
    raise ValueError(
        f"The special tokens of a {type(tokenizer).__name__} must stand around the text, got "
        f"{whole} for a text of the tokens {body}. Use another encoder."
    )


def _window(max_length: int | None, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> int:
    """`max_length`, if the model has the positions; by default the least limit that is stated."""
    config: Any = model.config
    positions = getattr(config, "max_position_embeddings", None)  # T5 has relative ones
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            if positions is not None and module.padding_idx is not None:
                positions -= module.padding_idx + 1  # RoBERTa and its kin count from there
            break
    if max_length is not None:
        if positions and max_length > positions:
            raise ValueError(
                f"`max_length` must be at most the {positions} positions of the task encoder, "
                f"got {max_length}."
            )
        return max_length
    limits = (tokenizer.model_max_length, positions or getattr(config, "n_positions", None))
    stated = [limit for limit in limits if limit and limit < NO_LIMIT]
    return int(min(stated, default=UNKNOWN_WINDOW))
