"""Data collation: a column with the task of every example becomes the batch's `task_embeds`.

It knows examples, batches and columns; everything else in a batch is made by the collator it wraps. It knows
no model: that the batch reaches the router is the adapted model's business.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from .encoder import TaskEncoder

TASK_COLUMNS = ("task_embeds", "task_text")


class TaskCollator:
    """Wraps any collator and adds `task_embeds`, `(b, task_dim)` float32, to what it returns.

    The embeddings come from the column `task_embeds` (see `TaskEncoder.encode_dataset`) or, where no example
    has one, from encoding the column `task_text`. Where both are there, `task_embeds` is taken as the
    encoding of `task_text`. The wrapped collator sees neither. Of preference data (TRL's `DPOTrainer`), whose batch
    holds all chosen answers and then all rejected ones, both halves get the tasks of their prompts.

        collator = TaskCollator(DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id))
        trainer = SFTTrainer(..., args=SFTConfig(remove_unused_columns=False, ...), data_collator=collator)

    Args:
        collator: Makes a batch of a list of examples.
        encoder: Encodes `task_text`; not needed for data with `task_embeds`.
        task_dim: Numbers that every embedding must have. `None`: the encoder's, or as many as the first
            example has.
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
            examples: b examples, each with `task_embeds` (`task_dim` numbers: list, array or tensor) or each
                with `task_text`. `None` counts as absent.

        Returns:
            The wrapped collator's batch with `task_embeds`, `(b, task_dim)` float32.

        Raises:
            ValueError: If an example has no task, some have embeddings and others texts, there is no encoder
                for the texts, or an embedding has the wrong size.
        """
        embeds = [example.get("task_embeds") for example in examples]
        texts: list[Any] = [example.get("task_text") for example in examples]
        precomputed = any(value is not None for value in embeds)
        for i, (embed, text) in enumerate(zip(embeds, texts, strict=True)):
            if embed is None and text is None:
                raise ValueError(
                    f"Example {i} has no task embedding (columns: {sorted(examples[i])}). The router of adapter "
                    f'"{self.adapter_name}" reads the task, so every example needs one. '
                    "Pass task_embeds=..., or call attach_task_encoder(model)."
                )
            if precomputed and embed is None:
                raise ValueError(
                    f"Example {i} has a `task_text` but no `task_embeds`, which other examples of the batch have. "
                    "Give all of them one: `encoder.encode_dataset(dataset)`."
                )
        if precomputed:
            task_embeds = self._stack(embeds)
        elif self.encoder is not None:
            task_embeds = self.encoder(texts)
        else:
            raise ValueError(
                "The examples have a `task_text`, and there is no encoder to read it. Call "
                "`TaskCollator(collator, encoder)`, or encode the data beforehand: `encoder.encode_dataset(dataset)`."
            )
        rest = [{k: v for k, v in example.items() if k not in TASK_COLUMNS} for example in examples]
        batch = self.collator(rest)
        if all("chosen_ids" in example and "rejected_ids" in example for example in rest):
            task_embeds = task_embeds.repeat(2, 1)
        batch["task_embeds"] = task_embeds
        return batch

    def _stack(self, embeds: list[Any]) -> torch.Tensor:
        """`(b, task_dim)` float32 from one embedding an example."""
        rows = [torch.as_tensor(embed, dtype=torch.float32) for embed in embeds]
        expected = (self.task_dim or rows[0].numel(),)
        for i, row in enumerate(rows):
            if tuple(row.shape) != expected:
                raise ValueError(
                    f"The `task_embeds` of example {i} has the shape {tuple(row.shape)}, but {expected} is needed: "
                    "one vector of the encoder's `task_dim`. Encode the data with the adapter's own encoder, "
                    "one text an example: `encoder.encode_dataset(dataset)`."
                )
        return torch.stack(rows)
