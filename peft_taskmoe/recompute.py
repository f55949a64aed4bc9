"""What a checkpoint recomputes in backward runs under the task of its forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .task_scope import current_state, entered


class _CarryState:
    """A checkpoint function that recomputes under the state it was called with."""

    def __init__(self, checkpoint: Callable[..., Any]) -> None:
        self.checkpoint = checkpoint

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        state = current_state()
        if state is None or (torch.compiler.is_compiling() and state.aux is None):
            return self.checkpoint(function, *args, **kwargs)

        def under_state(*inner_args: Any, **inner_kwargs: Any) -> Any:
            with entered(state):
                return function(*inner_args, **inner_kwargs)

        return self.checkpoint(under_state, *args, **kwargs)


def carry_into_recompute(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a checkpoint function so that recomputation sees the task of its forward.

    For reentrant and non-reentrant checkpointing, and several forwards before one backward: each
    call carries its own state. Idempotent.

    Args:
        checkpoint: `torch.utils.checkpoint.checkpoint` or a partial of it.

    Returns:
        A function with the same arguments.
    """
    return checkpoint if isinstance(checkpoint, _CarryState) else _CarryState(checkpoint)
