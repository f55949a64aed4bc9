"""What extraction knows of a model's task routers: whether they read, and who reads for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ...attach import attach_task_encoder
from ...conditioning import Conditioner, base_model_of, conditioner_of
from ...encoder import TaskEncoder
from ...task_scope import current_state


@dataclass(frozen=True)
class TaskReader:
    """Embeds prompts for the active adapters of a model."""

    model: Any
    conditioner: Conditioner

    def embed(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """The `task_embeds` of prompts `(rows, length)`, by adapter."""
        encoders = self.conditioner.encoders
        reader = encoders.reader_for(base_model_of(self.model))
        prompts = reader.read(input_ids, attention_mask=attention_mask, answers=False)
        readers = self.conditioner.task_readers()
        return encoders.embed(readers, prompts.texts, input_ids.device)

    @property
    def encoders(self) -> list[TaskEncoder]:
        """The encoder of each adapter."""
        readers = self.conditioner.task_readers()
        return [self.conditioner.encoders.encoder_of(*reader) for reader in readers.items()]


def attach_encoder(model: Any, encoder: TaskEncoder | None, tokenizer: Any) -> None:
    """Attach an encoder, or load the one that the adapter names where no prompt is read yet."""
    conditioner = _conditioner(model)
    if conditioner is None:
        if encoder is not None:
            attach_task_encoder(model, encoder, tokenizer)  # which says why that cannot be
        return
    reads = any(config.reads_task for config in conditioner.configs().values())
    if reads and (encoder is not None or conditioner.encoders.reader is None):
        attach_task_encoder(model, encoder, tokenizer)


def reader_of(model: Any) -> TaskReader | None:
    """Who reads the prompts for the active adapters; None if no router of theirs reads the task."""
    conditioner = _conditioner(model)
    if conditioner is None or not conditioner.task_readers():
        return None
    return TaskReader(model, conditioner)


def scope_is_taken() -> bool:
    """Whether somebody outside gives the task of every row, or looks at the gates."""
    state = current_state()
    return state is not None and (state.task_embeds is not None or state.recorder is not None)


def _conditioner(model: Any) -> Conditioner | None:
    try:
        return conditioner_of(base_model_of(model))
    except ValueError:
        return None
