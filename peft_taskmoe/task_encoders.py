"""The task encoder of each adapter: attached, or named by its config and loaded when needed."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .config import TaskMoELoraConfig
from .encoder import TaskEncoder, TaskEncoderConfig
from .prompts import PromptReader, schema_part

logger = logging.getLogger(__name__)


class TaskEncoders:
    """Embeds the prompts of a batch for every adapter of one model.

    A plain object, no module: the encoders' weights stay out of parameters and state dicts.
    Adapters whose configs agree share one encoder. An encoder that was loaded here follows the
    model's device; an attached one stays where it is.
    """

    def __init__(self) -> None:
        self.reader: PromptReader | None = None
        self._attached: dict[str, TaskEncoder] = {}
        self._loaded: dict[TaskEncoderConfig, TaskEncoder] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> TaskEncoders:
        copied = TaskEncoders()  # the encoders are frozen: a copied model goes on with the same
        copied.reader = self.reader
        copied._attached, copied._loaded = dict(self._attached), dict(self._loaded)
        return copied

    def attach(self, adapter: str, encoder: TaskEncoder) -> None:
        """Let an adapter be routed by this encoder."""
        self._attached[adapter] = encoder

    def forget(self, adapter: str) -> None:
        """Take an adapter's encoder away again."""
        self._attached.pop(adapter, None)

    def known(self, adapter: str, config: TaskMoELoraConfig) -> bool:
        """Whether an adapter has an encoder, or a config that names one."""
        return adapter in self._attached or config.task_encoder is not None

    def encoder_of(self, adapter: str, config: TaskMoELoraConfig) -> TaskEncoder:
        """The encoder of an adapter.

        Raises:
            ValueError: If it has none, or one of another dimension.
            OSError: If the one that its config names cannot be loaded.
        """
        encoder = self._attached.get(adapter)
        if encoder is None:
            named = config.task_encoder
            if not isinstance(named, TaskEncoderConfig):
                raise ValueError(
                    f'The config of adapter "{adapter}" names no task encoder. Pass one: '
                    '`attach_task_encoder(model, TaskEncoder("Salesforce/codet5-base"))`.'
                )
            encoder = self._attached_as(named) or self._loaded.get(named)
            if encoder is None:
                logger.info('Loading the task encoder "%s".', named.name_or_path)
                encoder = self._loaded[named] = TaskEncoder.from_config(named)
        check_width(encoder, adapter, config)
        return encoder

    def _attached_as(self, config: TaskEncoderConfig) -> TaskEncoder | None:
        """The one attached encoder of this config: adapters may be copied, as TRL's "ref" is."""
        found = {id(e): e for e in self._attached.values() if e.config == config}
        return next(iter(found.values())) if len(found) == 1 else None

    def embed(
        self, adapters: Mapping[str, TaskMoELoraConfig], texts: list[str], device: torch.device
    ) -> dict[str, torch.Tensor]:
        """Embed prompts for each adapter.

        Args:
            adapters: Adapters whose router reads the task, with their configs.
            texts: n prompts.
            device: Where the embeddings are needed.

        Returns:
            `(n, task_dim)` for each adapter; the same tensor for those that share an encoder.
        """
        found: dict[tuple[int, str], torch.Tensor] = {}
        embeds = {}
        for adapter, config in adapters.items():
            encoder = self.encoder_of(adapter, config)
            if any(encoder is loaded for loaded in self._loaded.values()):
                encoder.to(device)
            key = (id(encoder), encoder.config.text)
            if key not in found:
                whole = encoder.config.text == "prompt"
                read = texts if whole else [schema_part(text) for text in texts]
                found[key] = encoder(read).to(device)
            embeds[adapter] = found[key]
        return embeds

    def reader_for(self, model: nn.Module) -> PromptReader:
        """The reader of the model's prompts; its tokenizer is loaded from the base model's name.

        Raises:
            ValueError: If the model has no name.
            OSError: If there is no tokenizer of that name.
        """
        if self.reader is None:
            self.reader = PromptReader(load_tokenizer(model))
        return self.reader


def check_width(encoder: TaskEncoder, adapter: str, config: TaskMoELoraConfig) -> None:
    """Raise `ValueError` unless an encoder gives what an adapter's router was built for."""
    if encoder.task_dim != config.task_dim:
        raise ValueError(
            f'The encoder has {encoder.task_dim} dimensions, but the router of adapter "{adapter}" '
            f"was built for `task_dim={config.task_dim}`. Attach the encoder it was trained with, "
            f"or build it with `task_dim={encoder.task_dim}`."
        )


def load_tokenizer(model: nn.Module) -> Any:
    """The tokenizer that the base model's name leads to."""
    from transformers import AutoTokenizer

    config = getattr(model, "config", None)
    name = getattr(config, "_name_or_path", None) or getattr(model, "name_or_path", None)
    if not name:
        raise ValueError(
            "The base model has no name to load its tokenizer from, which reads `input_ids`. "
            "Pass it: `attach_task_encoder(model, encoder, tokenizer)`."
        )
    return AutoTokenizer.from_pretrained(name)
