"""What extraction has to know of a model's task routers: whether they read, and who reads for them.

Everything else of the core stays hidden behind this file; other models have no routers at all.
"""

from __future__ import annotations

from typing import Any

from ...automatic import PromptEncoder
from ...conditioning import current_state
from ...encoder import TaskEncoder
from ...model import Conditioner, attach_task_encoder, base_model_of, conditioner_of


def attach_encoder(model: Any, encoder: TaskEncoder | None, tokenizer: Any) -> None:
    """Attach an encoder, or the one that the adapter names where a router has none yet."""
    conditioner = _conditioner(model)
    if conditioner is None:
        if encoder is not None:
            attach_task_encoder(model, encoder, tokenizer)  # which says why that cannot be
        return
    reads = any(shape.reads_task for layer in conditioner.layers for shape in layer.shapes.values())
    if reads and (encoder is not None or conditioner.prompt_encoder is None):
        attach_task_encoder(model, encoder, tokenizer)


def reader_of(model: Any) -> PromptEncoder | None:
    """Who reads the prompts for the active adapters; None if no router of theirs reads the task."""
    conditioner = _conditioner(model)
    if conditioner is None or not conditioner.adapters_that_read_the_task(None):
        return None
    return conditioner.prompt_encoder


def scope_is_taken() -> bool:
    """Whether somebody outside gives the task of every row, or looks at the gates."""
    state = current_state()
    return state is not None and (state.task_embeds is not None or state.recorder is not None)


def _conditioner(model: Any) -> Conditioner | None:
    try:
        return conditioner_of(base_model_of(model))
    except ValueError:
        return None
