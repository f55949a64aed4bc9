"""Wraps a data collator so that its batches carry the task embedding of every example."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from .encoder import TaskEncoder
from .prompts import task_texts

TASK_COLUMNS = ("task_embeds", "task_text")


class TaskCollator:
    """Adds `task_embeds`, `(b, task_dim)` float32, to the batches of any collator.

    They come from the column `task_embeds` (see `TaskEncoder.encode_dataset`) or, where no example
    has one, from encoding the column `task_text` as `encode_dataset` does. The wrapped collator
    sees neither. Both halves of a batch of preference data (TRL's `DPOTrainer`: chosen, then
    rejected answers) get the tasks.

        collator = TaskCollator(DataCollatorForLanguageModeling(pad_token_id=0))
        args = SFTConfig(remove_unused_columns=False, ...)
        trainer = SFTTrainer(..., args=args, data_collator=collator)

    Args:
        collator: Makes a batch of a list of examples.
        encoder: Encodes `task_text`; not needed for data with `task_embeds`.
        task_dim: Numbers of every embedding. `None`: the encoder's, or as the first example has.
        adapter_name: The adapter whose router reads the embeddings; error messages name it.
    """

    def __init__(
        self,
        collator: Callable[[list[dict[str, Any]]], Any],
        encoder: TaskEncoder | None = None,
        *,
        task_dim: int | None = None,
        adapter_name: str = "default",
    ) -> None:
        self.collator = collator
        self.encoder = encoder
        self.task_dim = encoder.task_dim if task_dim is None and encoder is not None else task_dim
        self.adapter_name = adapter_name

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> Any:
        """Collate examples.

        Args:
            examples: b examples, all with `task_embeds` (`task_dim` numbers: list, array or tensor)
                or all with `task_text`. `None` counts as absent.

        Returns:
            The wrapped collator's batch with `task_embeds`, `(b, task_dim)` float32.

        Raises:
            ValueError: If there are no examples, one has no task, some have embeddings and others
                texts, no encoder is there for the texts, or an embedding has the wrong size.
        """
        if not examples:
            raise ValueError("A batch needs at least one example, got none.")
        task_embeds = self._task_embeds(examples)
        rest = [{k: v for k, v in example.items() if k not in TASK_COLUMNS} for example in examples]
        batch = self.collator(rest)
        if all("chosen_ids" in example and "rejected_ids" in example for example in rest):
            task_embeds = task_embeds.repeat(2, 1)
        batch["task_embeds"] = task_embeds
        return batch

    def _task_embeds(self, examples: Sequence[Mapping[str, Any]]) -> torch.Tensor:
        embeds = [example.get("task_embeds") for example in examples]
        texts: list[Any] = [example.get("task_text") for example in examples]
        precomputed = any(value is not None for value in embeds)
        for i, (embed, text) in enumerate(zip(embeds, texts, strict=True)):
            if embed is None and text is None:
                raise ValueError(
                    f"Example {i} has no task embedding (columns: {sorted(examples[i])}), which "
                    f'the router of adapter "{self.adapter_name}" reads. '
                    "Add it with `encoder.encode_dataset(dataset)`, or leave `TaskCollator` out: "
                    "an encoder that is attached or named in the config reads the prompts."
                )
            if precomputed and embed is None:
                raise ValueError(
                    f"Example {i} has a `task_text` but no `task_embeds`, which other examples of "
                    "the batch have. Give all of them one: `encoder.encode_dataset(dataset)`."
                )
        if precomputed:
            return self._stack(embeds)
        if self.encoder is None:
            raise ValueError(
                "The examples have a `task_text`, and there is no encoder to read it. Call "
                "`TaskCollator(collator, encoder)`, or `encoder.encode_dataset(dataset)` before."
            )
        return self.encoder(task_texts(texts, self.encoder.config.text))

    def _stack(self, embeds: list[Any]) -> torch.Tensor:
        rows = [torch.as_tensor(embed, dtype=torch.float32) for embed in embeds]
        expected = (self.task_dim or rows[0].numel(),)
        for i, row in enumerate(rows):
            if tuple(row.shape) != expected:
                raise ValueError(
                    f"The `task_embeds` of example {i} must have the shape {expected}, got "
                    f"{tuple(row.shape)}. Encode one text an example with the adapter's own "
                    "encoder: `encoder.encode_dataset(dataset)`."
                )
        return torch.stack(rows)
