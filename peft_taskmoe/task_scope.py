"""The task of the running forward, in a scope that adapted layers read."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

from .aux_loss import AuxLoss
from .router import check_task_embeds, normalize_task

GateRecorder = Callable[[Any, str, torch.Tensor, torch.Tensor | None], None]
"""Takes a layer, its adapter's name, gates `(tokens, e)`, each token's row or document if known."""


@dataclass(slots=True, eq=False)
class TaskState:
    """What the layers need to know about the forward that runs.

    Attributes:
        task_embeds: `(n, task_dim)`, or None.
        adapter_embeds: The same by adapter, where each has an encoder; `task_embeds` wins.
        token_tasks: `(tokens,)` index of each token's task for packed rows, or None.
        adapter_names: Name of each row's adapter, or None for the active adapters.
        rows: Rows of the batch, if known.
        lengths: Numbers of tokens that a row may have (input, decoder input), as far as known.
        decoding: What layers prepared for the decode steps of a generation; None outside of one.
        aux: The load-balancing loss, if one is collected.
        recorder: Takes every layer's gates, if given.
        token_mask: `(rows, length)` bool, False for padding; filled for a recorder only.
        prompt_mask: The last that a call had; a static cache's calls have masks of another form.
        positions: True while a layer is given relative positions, which belong to no row.
        owner: The `Conditioner` whose forward runs; None in a `task_context`.
    """

    task_embeds: torch.Tensor | None = None
    adapter_embeds: Mapping[str, torch.Tensor] = field(default_factory=dict)
    token_tasks: torch.Tensor | None = None
    adapter_names: Sequence[str] | None = None
    rows: int | None = None
    lengths: tuple[int, ...] = ()
    decoding: dict[Hashable, Any] | None = None
    aux: AuxLoss | None = None
    recorder: GateRecorder | None = None
    token_mask: torch.Tensor | None = None
    prompt_mask: torch.Tensor | None = None
    positions: bool = False
    owner: Any = None
    _normalized: dict[Hashable, torch.Tensor] = field(default_factory=dict)

    def embeds_of(self, adapter: str) -> torch.Tensor | None:
        """The task embeddings that this adapter reads."""
        return self.adapter_embeds.get(adapter) if self.task_embeds is None else self.task_embeds

    def normalized_embeds(
        self, adapter: str, task_norm: str, in_features: int, device: torch.device
    ) -> torch.Tensor | None:
        """The same at the router's scale, on the layer's device; computed once per input width."""
        embeds = self.embeds_of(adapter)
        if embeds is None:
            return None
        if torch.compiler.is_compiling() or embeds.requires_grad:  # trained: a graph a layer
            return normalize_task(embeds.to(device), task_norm, in_features)
        key = (id(embeds), task_norm, in_features, device)
        if key not in self._normalized:
            self._normalized[key] = normalize_task(embeds.to(device), task_norm, in_features)
        return self._normalized[key]


class _Local(threading.local):
    """The scopes of this thread."""

    def __init__(self) -> None:
        # Of the forward that runs; nothing is awaited inside of it.
        self.running: TaskState | None = None
        # Of the user, for compiled code, which cannot be traced through a `ContextVar`.
        self.traced: TaskState | None = None


_USER: ContextVar[TaskState | None] = ContextVar("peft_taskmoe.task", default=None)
_LOCAL = _Local()


def current_state() -> TaskState | None:
    """The state of the forward that runs in this thread, or of the scope around it, or None."""
    if _LOCAL.running is not None:
        return _LOCAL.running
    return _LOCAL.traced if torch.compiler.is_compiling() else _USER.get()


class entered:  # a class, which torch.compile traces without a break
    """Run a forward under a state, and restore what was there before."""

    def __init__(self, state: TaskState) -> None:
        self.state = state

    def __enter__(self) -> None:
        self.before = _LOCAL.running
        _LOCAL.running = self.state

    def __exit__(self, *exc: object) -> None:
        _LOCAL.running = self.before


@contextmanager
def user_scope(state: TaskState) -> Iterator[None]:
    """Run a block under a state, in this thread or coroutine.

    In a coroutine compiled code does not see the scope: another coroutine may run in between.
    """
    running, traced = _LOCAL.running, _LOCAL.traced
    _LOCAL.running = None  # inside of a forward the scope wins
    in_loop = asyncio._get_running_loop() is not None
    _LOCAL.traced = None if in_loop else state
    token = _USER.set(state)
    try:
        yield
    finally:
        _USER.reset(token)
        _LOCAL.running = running
        _LOCAL.traced = None if in_loop else traced


@contextmanager
def task_context(task_embeds: torch.Tensor) -> Iterator[None]:
    """Route whatever runs inside the block by these task embeddings.

    For layers without a `PeftModel` around them (`inject_adapter_in_model`, `model.add_adapter`)
    and for calls whose arguments are not yours. The scope belongs to this thread, or to this
    coroutine. Arguments given to a call inside win.

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
    outer = current_state() or TaskState()
    with user_scope(TaskState(task_embeds=task_embeds, recorder=outer.recorder)):
        yield
