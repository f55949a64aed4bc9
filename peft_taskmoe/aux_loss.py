"""The load-balancing loss of one forward, right under checkpointing and accumulation.

Checkpointed layers run again in backward, and only that run may have a graph. So the value is
added to the model's loss as a constant; a hook on that loss reads its weight when backward begins,
and hooks on the routers' logits add weight x gradient.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from .router import load_balancing_loss


@dataclass(slots=True)
class AuxLoss:
    """The load-balancing loss of one forward.

    Attributes:
        coefficients: By adapter, `router_aux_loss_coef` / number of its layers.
        masks: `(tokens,)` bool, False for padding, of the input and, in an encoder-decoder, of the
            decoder; None where every token counts.
        share: Part of the labels that the loss is divided by (`num_items_in_batch`, over all
            accumulated batches) in this forward, so that weights of accumulated batches sum to 1.
        value: Sum of coefficient x loss over the layers that ran.
        weight: Gradient of the total loss with respect to `value`; None before backward.
        unread: Called where backward comes and `weight` is still None.
    """

    coefficients: dict[str, float]
    masks: tuple[torch.Tensor | None, ...] = ()
    share: torch.Tensor | float = 1.0
    value: torch.Tensor | float = 0.0
    weight: torch.Tensor | None = None
    unread: Callable[[AuxLoss], None] | None = None

    @torch.compiler.disable  # tracing would freeze `weight`, which backward reads
    def collect(self, logits: torch.Tensor, top_k: int | None, adapter: str) -> None:
        """Add one layer's loss, and its gradient to the logits `(tokens, e)` once backward comes.

        The gates must be computed from these very logits after this call.
        """
        loss, gradient = load_balancing_loss(logits, top_k, self._mask_of(logits.shape[0]))
        coefficient = self.coefficients[adapter]
        self.value = coefficient * loss + torch.as_tensor(self.value, device=loss.device)

        def add(grad: torch.Tensor) -> torch.Tensor:
            if self.weight is None:
                if self.unread is not None:
                    self.unread(self)
                return grad
            return grad + self.weight.to(gradient) * coefficient * gradient

        if logits.requires_grad:
            logits.register_hook(add)

    def _mask_of(self, tokens: int) -> torch.Tensor | None:
        """The one mask of so many tokens; none where encoder and decoder cannot be told apart."""
        fitting = [m for m in self.masks if m is not None and m.shape[0] == tokens]
        return fitting[0] if len(fitting) == 1 else None

    def added_to(self, loss: torch.Tensor) -> torch.Tensor:
        """`loss + share * value`, whose backward leaves the weight for the layers."""
        share = torch.as_tensor(self.share * self.value, dtype=loss.dtype, device=loss.device)
        total = loss + share
        if total.requires_grad:
            total.register_hook(self._take_weight)
        return total

    def _take_weight(self, grad: torch.Tensor) -> None:
        self.weight = grad.detach() * self.share


@dataclass
class AuxLossLog:
    """Adds each forward's load-balancing loss to what the model returns, and keeps the values."""

    values: deque[torch.Tensor] = field(default_factory=lambda: deque(maxlen=10_000))
    _warned: bool = False

    @torch.compiler.disable
    def add_to_outputs(self, aux: AuxLoss, outputs: Any) -> Any:
        """Add the loss where the outputs have one; else see to its gradient, or warn once."""
        named = outputs if isinstance(outputs, dict) else {}
        loss: Any = outputs[0] if isinstance(outputs, tuple) and outputs else named.get("loss")
        log_probs, counted = named.get("log_probs"), named.get("label_mask")
        added = isinstance(loss, torch.Tensor) and loss.dim() == 0
        aux.unread = self._warn
        if added and named:
            outputs["loss"] = aux.added_to(loss)
        elif added:
            outputs = (aux.added_to(loss), *outputs[1:])
        if isinstance(log_probs, torch.Tensor) and isinstance(counted, torch.Tensor):
            outputs["log_probs"] = self._watched(log_probs, counted, aux)
        elif not added:
            self._warn(aux)
            return outputs
        self.values.append(torch.as_tensor(aux.value))
        return outputs

    def _watched(
        self, log_probs: torch.Tensor, counted: torch.Tensor, aux: AuxLoss
    ) -> torch.Tensor:
        """`log_probs` whose backward reads the weight off the labels' gradient.

        It is -c for each label of `-c sum_t log p_t`, as in TRL's `SFTTrainer`, not so in DPO.
        """
        if not log_probs.requires_grad:
            return log_probs
        watched = log_probs.view_as(log_probs)

        def read(grad: torch.Tensor) -> None:
            of_labels = grad[counted]
            same = torch.equal(of_labels, of_labels[:1].expand_as(of_labels))
            if same and bool((of_labels <= 0).all()):
                aux.weight = -of_labels.sum()
            else:
                self._warn(aux)

        watched.register_hook(read)
        return watched

    def _warn(self, aux: AuxLoss) -> None:
        if self._warned:
            return
        self._warned = True
        warnings.warn(
            f"`router_aux_loss_coef` of {list(aux.coefficients)} has no effect here: this loss is "
            "computed outside of the model (label smoothing, DPO, a loss function of your own). "
            "Train with the model's own loss, or set the coefficient to 0.",
            UserWarning,
            stacklevel=4,
        )

    def take_mean(self) -> float | None:
        """The mean since this was last called; None where there was none."""
        if not self.values:
            return None
        mean = float(torch.stack(list(self.values)).mean())
        self.values.clear()
        return mean
