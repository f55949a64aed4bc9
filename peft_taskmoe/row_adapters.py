"""Rows that name their adapter: the `adapter_names` of PEFT's `forward` and `generate`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .adapters import TaskMoELoraLayer
from .layer import repeat_names
from .task_scope import TaskState, current_state, user_scope


def check_adapter_names(model: nn.Module, names: Sequence[str], known: Iterable[str]) -> None:
    """Refuse names that PEFT refuses for LoRA, in its words.

    Raises:
        ValueError: The model trains, has no such adapter, or has merged ones.
    """
    if model.training:
        raise ValueError(
            "Cannot pass `adapter_names` when the model is in training mode. "
            "Call `model.eval()` first."
        )
    unknown = sorted(set(names) - set(known) - {"__base__"})
    if unknown:
        raise ValueError(
            f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}. "
            f'This model has {", ".join(sorted(known))}, and "__base__" for none.'
        )
    if any(m.merged for m in model.modules() if isinstance(m, TaskMoELoraLayer)):
        raise ValueError(
            "Cannot pass `adapter_names` when there are merged adapters, please call "
            "`unmerge_adapter` first."
        )


@contextmanager
def adapters_by_row(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Let each row of the calls inside be answered by the adapter that it names."""
    outer = current_state() or TaskState()
    state = TaskState(
        task_embeds=outer.task_embeds, adapter_names=list(names), recorder=outer.recorder
    )
    pass_names = partial(_pass_names, names=list(names))
    handles = [
        module.register_forward_pre_hook(pass_names, with_kwargs=True)
        for module in model.modules()
        if isinstance(module, AuxiliaryTrainingWrapper)
    ]
    try:
        with user_scope(state):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _pass_names(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], names: list[str]
) -> Any:
    """Hand each row's adapter to a module that is saved with the adapters."""
    values = (*args, *kwargs.values())
    rows = next(value.shape[0] for value in values if isinstance(value, torch.Tensor))
    kwargs["adapter_names"] = repeat_names(names, rows)
    return args, kwargs
