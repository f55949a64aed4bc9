"""Prefix caching: what the prompts of a batch begin with is read once for all of them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ..schema import Schema
from .placement import device_of
from .routing import reader_of, scope_is_taken

OF_ATTENTION = (DynamicLayer, DynamicSlidingWindowLayer)
"""Caches that can be cut by rows, and by tokens."""


class PrefixCache:
    """Reads the common beginning of prompts.

    Args:
        model: The causal language model.

    Raises:
        ValueError: Prompts that begin alike are not computed alike by this model.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self._check()

    def read_once(self, prompts: Sequence[list[int]], schemas: Sequence[Schema]) -> dict[str, Any]:
        """Read once what the prompts have in common at their beginning.

        The rows of a batch are padded on the left, so each row's keys and values move right by its
        padding. What moves beyond the shared length stands at other places in other rows;
        `generate` reads it again.

        Args:
            prompts: The tokens of each prompt.
            schemas: The schema of each prompt.

        Returns:
            The arguments of `generate` that pass its keys and values; none if there are none.
        """
        self._check()  # adapters and encoders may have changed since
        reader = reader_of(self.model)
        if len(prompts) == 1 or scope_is_taken():
            return {}
        if reader is not None and len({schema.fingerprint() for schema in schemas}) > 1:
            return {}  # the schemas are routed differently
        # The last token is left to be read.
        columns = zip(*(ids[:-1] for ids in prompts), strict=False)
        shared = sum(1 for _ in itertools.takewhile(lambda column: len({*column}) == 1, columns))
        if shared == 0:
            return {}
        ids = torch.tensor([prompts[0]], device=device_of(self.model))
        keep_one = self.model._supports_logits_to_keep()
        extra: dict[str, Any] = {"logits_to_keep": 1} if keep_one else {}
        if reader is not None:
            extra["task_embeds"] = reader.embed(ids)
        output = self.model(input_ids=ids[:, :shared], use_cache=True, **extra)
        if not keeps_keys_and_values(output):
            raise ValueError(
                "`prefix_caching` needs the keys and values of attention, but a "
                f"`{self.model.config.model_type}` model keeps something else from one token to "
                "the next, which cannot be shared by several texts. Leave it out."
            )
        layers = [layer for layer in output.past_key_values.layers if layer.keys is not None]
        if any(layer.keys.shape[-2] != shared for layer in layers):
            return {}  # the schema is longer than a sliding window
        padding = [max(map(len, prompts)) - len(ids) for ids in prompts]
        for layer in layers:
            layer.keys, layer.values = (
                torch.cat([one.roll(by, dims=-2) for by in padding])
                for one in (layer.keys, layer.values)
            )
        cache = output.past_key_values
        return {"past_key_values": cache, "use_cache": True, "cache_implementation": None}

    def _check(self) -> None:
        settings = self.model.config
        rope = getattr(settings, "rope_parameters", None)  # transformers 5
        rope = rope or getattr(settings, "rope_scaling", None) or {}
        methods = methods_of_whole_prompts(self.model)
        reader = reader_of(self.model)
        if methods:
            why = f"{methods[0]} changes what the model computes for it with the prompt around it"
        elif rope.get("rope_type") == "longrope":
            why = (
                "a model with `longrope` positions turns the first tokens differently before a "
                "long text than before a short one"
            )
        elif reader is not None and any(one.config.text == "prompt" for one in reader.encoders):
            why = (
                'the task encoder reads the whole prompt (`text="prompt"`), so the router treats '
                "the tokens of a schema differently before every text"
            )
        else:
            return
        raise ValueError(
            f"`prefix_caching` computes a schema once for many texts, but {why}. Leave it out, or "
            "train an adapter for which that does not hold, such as one whose encoder reads the "
            'schema alone (`TaskEncoder(..., text="schema")`).'
        )


def keeps_keys_and_values(output: Any) -> bool:
    """Whether a model's output has a cache of attention alone, which can be cut."""
    layers = getattr(getattr(output, "past_key_values", None), "layers", [None])
    return all(type(layer) in OF_ATTENTION for layer in layers)


def methods_of_whole_prompts(model: Any) -> list[str]:
    """The PEFT methods that change what is computed for a token with the prompt around it."""
    return [
        str(getattr(one.peft_type, "value", one.peft_type))
        for one in getattr(model, "peft_config", {}).values()
        if one.is_prompt_learning or one.peft_type == "XLORA"
    ]
