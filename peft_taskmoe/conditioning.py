"""The task of the running forward: where it is kept, and how it reaches what runs later.

Adapted layers sit deep inside models that were not written for them, so the task embedding does not travel through arguments.
It stands in a scope: set while one forward (or one whole `generate`) runs, visible to that thread alone, restored afterwards.
Nothing is left on a module. Recomputation in backward runs after the scope has closed, so a checkpointed function takes the
state it was called with along (`carry_into_recompute`).

This file knows no layer, no encoder and no PEFT.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

from .router import normalize_task


class GateRecorder(Protocol):
    """What `inspection.py` passes into the scope to see gates."""

    def __call__(
        self, layer: Any, adapter: str, gates: torch.Tensor, token_tasks: torch.Tensor | None
    ) -> None:
        """Take the gates `(tokens, e)` of one layer."""


@dataclass(slots=True)
class AuxLoss:
    """The load-balancing loss of one forward, collected over the adapted layers.

    The layers of a checkpointed model run again in backward, and under reentrant checkpointing only that second run has a
    graph. So the loss is not summed through the graph: `weight` reaches the layers' backward from the loss's own backward (where
    it carries the Trainer's division by accumulation steps and any loss scale), and each layer adds its share there.

    Attributes:
        token_mask: `(tokens,)` bool, False for padding; None if every token counts.
        num_layers: Number of adapted layers per adapter, which the mean runs over.
        value: Sum of coefficient x loss / layers over the layers that ran; read when the forward ends, so that what a recomputation
            adds counts nowhere.
        weight: Gradient of the final loss with respect to `value`; None until backward reached it.
        decoder_mask: Of an encoder-decoder, `(tokens,)` of the decoder; None if every token counts.
        share: Which part of the labels that the loss is divided by (`num_items_in_batch`, over all accumulated batches) is this
            forward's, so that the weights of accumulated batches sum to 1.
    """

    token_mask: torch.Tensor | None
    num_layers: dict[str, int]
    value: torch.Tensor | float = 0.0
    weight: torch.Tensor | None = None
    decoder_mask: torch.Tensor | None = None
    share: torch.Tensor | float = 1.0

    def mask_of(self, tokens: int) -> torch.Tensor | None:
        """The mask of a layer that gets this many tokens.

        Encoder and decoder are told apart by their number of tokens; where these are equal, every token counts.
        """
        masks = [
            mask
            for mask in (self.token_mask, self.decoder_mask)
            if mask is not None and mask.shape[0] == tokens
        ]
        return masks[0] if len(masks) == 1 else None


@dataclass(slots=True, eq=False)
class TaskState:
    """What the layers need to know about the forward that runs.

    Attributes:
        task_embeds: `(n, task_dim)`, or None if no task was given.
        token_tasks: `(tokens,)` index of each token's task for packed rows, or None: each task then owns an equal number of
            consecutive tokens.
        adapter_names: Name of the adapter of each row, or None for the active adapters.
        rows: Rows of the batch in the running forward, if known.
        length: Tokens per row in the running forward, if known.
        memo: What the layers keep while a generation runs; None outside of one.
        aux: The load-balancing loss, if one is collected.
        recorder: Sees every layer's gates, if given.
        token_mask: `(rows, length)` bool, False for padding; filled only for a recorder.
        owner: Whose forward it is the state of, so that a wrapper inside that forward leaves it alone; None in a
            `task_context` or a generation.
        together: Layers that read the same tensor, by the first of them, as they were known when the model's forward began; None
            outside of a model's forward.
        made_ahead: Outputs of the others, computed with the first one's, until they are called with that tensor.
        apart: Layers that were not, in a checkpointed part of the forward.
    """

    task_embeds: torch.Tensor | None = None
    token_tasks: torch.Tensor | None = None
    adapter_names: Sequence[str] | None = None
    rows: int | None = None
    length: int | None = None
    memo: dict[Hashable, Any] | None = None
    aux: AuxLoss | None = None
    recorder: GateRecorder | None = None
    token_mask: torch.Tensor | None = None
    owner: Any = None
    together: dict[Any, tuple[Any, ...]] | None = None
    made_ahead: dict[Any, Any] = field(default_factory=dict)
    apart: set[Any] = field(default_factory=set)
    normalized: dict[Hashable, torch.Tensor] = field(default_factory=dict)

    def normalized_embeds(
        self, task_norm: str, in_features: int, device: torch.device
    ) -> torch.Tensor | None:
        """The task embeddings at the router's scale, on the layer's device; computed once per forward and input width."""
        if self.task_embeds is None:
            return None
        if (
            torch.compiler.is_compiling() or self.task_embeds.requires_grad
        ):  # a trained one: each layer its own graph
            return normalize_task(self.task_embeds.to(device), task_norm, in_features)
        key = (task_norm, in_features, device)
        found = self.normalized.get(key)
        if found is None:
            found = self.normalized[key] = normalize_task(
                self.task_embeds.to(device), task_norm, in_features
            )
        return found


class _Scope(threading.local):
    def __init__(self) -> None:
        self.state: TaskState | None = None
        self.made_ahead: dict[
            Any, Any
        ] = {}  # where there is no state: in what others recompute in backward


_SCOPE = _Scope()


def current_state() -> TaskState | None:
    """The state of the forward that runs in this thread, or None."""
    return _SCOPE.state


def made_ahead() -> dict[Any, Any]:
    """Outputs that were computed ahead in the running forward, by layer; see `TaskState.made_ahead`."""
    state = _SCOPE.state
    return _SCOPE.made_ahead if state is None else state.made_ahead


class entered:  # written as a class so that torch.compile traces it without a break
    """Run a block under a state, and restore what was there before.

    Args:
        state: The state to run under.
    """

    def __init__(self, state: TaskState | None) -> None:
        self.state = state

    def __enter__(self) -> TaskState | None:
        self.before = _SCOPE.state
        _SCOPE.state = self.state
        return self.state

    def __exit__(self, *exc: object) -> None:
        _SCOPE.state = self.before


@contextmanager
def task_context(task_embeds: torch.Tensor) -> Iterator[None]:
    """Route whatever runs inside the block by these task embeddings.

    For layers without a `PeftModel` around them (`inject_adapter_in_model`, `model.add_adapter`) and for calls whose
    arguments are not yours. The scope belongs to this thread. Arguments given to a call inside win.

    Args:
        task_embeds: `(n, task_dim)`, one row per example of the batch.

    Raises:
        ValueError: If `task_embeds` is not a float tensor of two dimensions.

    Example:
        ```python
        with task_context(encoder(prompts)):
            logits = model(**batch).logits
        ```
    """
    check_task_embeds(task_embeds)
    before = _SCOPE.state
    recorder = before.recorder if before is not None else None
    with entered(TaskState(task_embeds=task_embeds, recorder=recorder)):
        yield


def check_task_embeds(task_embeds: Any) -> None:
    """Refuse what is no `(n, task_dim)` float tensor.

    Raises:
        ValueError: Saying what was found.
    """
    if not isinstance(task_embeds, torch.Tensor):
        raise ValueError(
            f"`task_embeds` is a {type(task_embeds).__name__}, but the router multiplies it as a tensor. "
            "Pass a float tensor of shape (batch, task_dim), e.g. `task_embeds=encoder(prompts)`."
        )
    if task_embeds.dim() != 2 or not task_embeds.is_floating_point():
        raise ValueError(
            f"`task_embeds` has shape {tuple(task_embeds.shape)} and dtype {task_embeds.dtype}, but every example needs one "
            "float vector. Pass a float tensor of shape (batch, task_dim), e.g. `task_embeds=encoder(prompts)`."
        )


class _CarryState:
    """A checkpoint function that recomputes under the state it was called with."""

    def __init__(self, checkpoint: Callable[..., Any]) -> None:
        self.checkpoint = checkpoint

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        state = _SCOPE.state
        if state is None or (torch.compiler.is_compiling() and state.aux is None):
            return self.checkpoint(function, *args, **kwargs)

        def under_state(*inner_args: Any, **inner_kwargs: Any) -> Any:
            if torch.compiler.is_compiling():
                with entered(state):
                    return function(*inner_args, **inner_kwargs)
            inner = replace(
                state, made_ahead={}
            )  # what runs here runs again: it takes and leaves nothing
            with entered(inner):
                out = function(*inner_args, **inner_kwargs)
            state.apart.update(inner.made_ahead)
            return out

        return self.checkpoint(under_state, *args, **kwargs)


def carry_into_recompute(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a checkpoint function so that what it recomputes in backward sees the task it saw in forward.

    Works for reentrant and non-reentrant checkpointing alike, and for several forwards before one backward: each call
    carries its own state. Wrapping twice is harmless.

    Args:
        checkpoint: `torch.utils.checkpoint.checkpoint` or a partial of it.

    Returns:
        A function with the same arguments.
    """
    return checkpoint if isinstance(checkpoint, _CarryState) else _CarryState(checkpoint)


class InjectAuxLoss(torch.autograd.Function):
    """Identity on the update of a layer whose backward also sends the load-balancing loss's gradient to the gates."""

    @staticmethod
    def forward(ctx: Any, out: torch.Tensor, loss: torch.Tensor, aux: AuxLoss) -> torch.Tensor:
        """Return `out`; remember where the weight will stand."""
        ctx.aux = aux
        ctx.loss_dtype, ctx.loss_device = loss.dtype, loss.device
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        """Pass `grad` on, and the loss's own weight to the load-balancing loss."""
        weight = ctx.aux.weight
        return grad, None if weight is None else weight.to(ctx.loss_device, ctx.loss_dtype), None


@torch.compiler.disable
def collect_aux_loss(update: torch.Tensor, loss: torch.Tensor, aux: AuxLoss) -> torch.Tensor:
    """Add a layer's load-balancing loss to what the forward collects, and hang its gradient on the layer's update.

    A compiled layer leaves its graph for this: tracing would freeze `aux.weight`, which backward is to read.
    """
    aux.value = loss.detach() + torch.as_tensor(aux.value, device=loss.device)
    return InjectAuxLoss.apply(update, loss, aux)


class AddAuxLoss(torch.autograd.Function):
    """`loss + share * aux.value`, whose backward runs before any layer's and leaves the weight of the loss for them."""

    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor, aux: AuxLoss) -> torch.Tensor:
        """Add the collected value."""
        ctx.aux = aux
        return loss + torch.as_tensor(aux.share * aux.value, dtype=loss.dtype, device=loss.device)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Remember the incoming gradient and pass it on."""
        ctx.aux.weight = grad.detach() * ctx.aux.share
        return grad, None


class WeighAuxLoss(torch.autograd.Function):
    """Identity on the log-probabilities of the labels, for losses that are computed from them outside the model.

    Where the loss is `-c sum_t log p_t`, as TRL's `SFTTrainer` computes it, every label has the same gradient -c, and c times the
    number of labels is the weight that the load-balancing loss would have had as a part of that loss. Other losses, such as
    DPO's, have no such weight: the load-balancing loss then has no effect, and `otherwise` is called.
    """

    @staticmethod
    def forward(
        ctx: Any,
        log_probs: torch.Tensor,
        counted: torch.Tensor,
        aux: AuxLoss,
        otherwise: Callable[[], None],
    ) -> torch.Tensor:
        """Return `log_probs`; `counted` marks those of labels."""
        ctx.save_for_backward(counted)
        ctx.aux, ctx.otherwise = aux, otherwise
        return log_probs.view_as(log_probs)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        """Read the weight off the incoming gradient and pass it on."""
        (counted,) = ctx.saved_tensors
        of_labels = grad[counted]
        if torch.equal(of_labels, of_labels[:1].expand_as(of_labels)) and bool(
            (of_labels <= 0).all()
        ):
            ctx.aux.weight = -of_labels.sum()
        else:
            ctx.otherwise()
        return grad, None, None, None
