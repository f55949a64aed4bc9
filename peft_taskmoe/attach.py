"""Gives a model a loaded task encoder."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

from .conditioning import base_model_of, conditioner_of, wrap_outermost
from .config import TaskMoELoraConfig
from .encoder import TaskEncoder
from .prompts import PromptReader
from .task_encoders import check_width, load_tokenizer


def attach_task_encoder(
    model: nn.Module, encoder: TaskEncoder | None = None, tokenizer: Any = None
) -> nn.Module:
    """Give a model its task encoder and tokenizer: the task embedding follows from `input_ids`.

    Needed for an encoder that is loaded already, that runs on another device, or that the adapter's
    config does not name. In `forward` the task text is what precedes the first label that is not
    -100 (everything, where there are no labels), in `generate` it is `input_ids`. A `task_embeds`
    argument still wins. The encoder stays outside the model: not trained, not saved; the config of
    the adapters names it from here on.

    Args:
        model: A model with a Task-Aware MoELoRA adapter, wrapped in `PeftModel` or not.
        encoder: The encoder, for the active adapters and all others of its dimension whose config
            names none; None loads those that the configs name, now.
        tokenizer: The tokenizer of the adapted model; None loads it from the base model's name.

    Returns:
        The same model.

    Raises:
        ValueError: If the encoder's dimension differs from the adapter's `task_dim`, or None is
            given and the config names no encoder.
    """
    base = base_model_of(model)
    wrap_outermost(base)
    conditioner = conditioner_of(base)
    assert conditioner is not None
    encoders = conditioner.encoders
    configs = {name: config for name, config in conditioner.configs().items() if config.reads_task}
    active = [name for name in conditioner.active() if name in configs] or list(configs)
    if encoder is None:
        for name in active:
            encoders.encoder_of(name, configs[name])
    else:
        for name, config in configs.items():
            if name not in active and config.task_encoder not in (None, encoder.config):
                continue
            if name not in active and config.task_dim != encoder.task_dim:
                continue
            check_width(encoder, name, config)
            _warn_of_other_reading(encoder, name, config)
            encoders.attach(name, encoder)
            config.task_encoder = encoder.config
    encoders.reader = PromptReader(tokenizer if tokenizer is not None else load_tokenizer(base))
    return model


def _warn_of_other_reading(encoder: TaskEncoder, name: str, config: TaskMoELoraConfig) -> None:
    """Warn where the config names an encoder that makes other vectors of a prompt."""
    named: Any = config.task_encoder
    if named is None:
        return
    for setting in ("text", "pooling", "overflow"):
        ours, theirs = getattr(encoder.config, setting), getattr(named, setting)
        if ours != theirs:
            warnings.warn(
                f'The config of adapter "{name}" names a task encoder with `{setting}="{theirs}"`, '
                f'and the attached one has `{setting}="{ours}"`, which is kept from here on. Its '
                "vectors are others than those that the router was trained with.",
                UserWarning,
                stacklevel=3,
            )
