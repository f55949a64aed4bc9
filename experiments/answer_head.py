"""Asks the language-model head about answer tokens alone: the same loss, in less time.

TRL's own head scores every token where there is no Triton, on a CPU most of a step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from trl import SFTTrainer


@contextmanager
def head_asked_about(model: Any, labels: torch.Tensor) -> Iterator[None]:
    """The head sees positions that predict a label only: logits `(labelled tokens, vocabulary)`.

    Args:
        model: The model, not wrapped for several processes.
        labels: `(rows, length)`, -100 where there is none.
    """
    asked = torch.nn.functional.pad(labels[:, 1:] != -100, (0, 1))
    hook = model.get_output_embeddings().register_forward_pre_hook(
        lambda _, hidden: (hidden[0][asked],)
    )
    try:
        yield
    finally:
        hook.remove()


def answer_losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood in nats of every labelled token, from the logits of such a head."""
    following = labels[:, 1:]
    return torch.nn.functional.cross_entropy(
        logits.float(), following[following != -100], reduction="none"
    )


class AnswerTrainer(SFTTrainer):
    """`SFTTrainer` whose language-model head is asked about labelled tokens only: the same loss."""

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """The mean loss of the labelled tokens of all micro-batches that make a step.

        Raises:
            NotImplementedError: If the logits are asked for, as in evaluation.
        """
        if return_outputs:
            raise NotImplementedError(
                "This trainer has no logits of most tokens. Evaluate with SFTTrainer."
            )
        labels = inputs["labels"]
        rest = {name: value for name, value in inputs.items() if name != "labels"}
        with head_asked_about(self.accelerator.unwrap_model(model), labels):
            logits = model(**rest, use_cache=False).logits
        loss = answer_losses(logits, labels).sum()
        if num_items_in_batch is None:
            return loss / max(len(logits), 1)
        processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return loss / num_items_in_batch * processes
