"""A Trainer callback that logs routing figures."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from transformers import TrainerCallback

from .conditioning import Conditioner, base_model_of, conditioner_of
from .inspection import counted_tokens

_DEAD_LOAD = 0.01
_IGNORED_SHARE = 1e-4


class RoutingCallback(TrainerCallback):
    """Adds figures about the routing to a Trainer's training entries.

    - `router_aux_loss`: load-balancing loss, coefficient included, mean since the last entry;
    - `gate_entropy`: mean over tokens and layers of `-sum_i g_i ln g_i / ln E`;
    - `expert_load_0`, ...: mean gate of each expert over tokens and layers; they sum to 1;
    - `task_share`: share of the gates' variance that lies between the rows of a batch, mean over
      layers; near 0, the router ignores the task.

    The gates are those of one micro-batch of the step that is logged, without a second forward.
    Warns once when an expert's load falls below 1 % (`E` >= 2), and once when the task explains
    less than 0.01 % of the variance. A Trainer calls the integrations of `report_to` before
    callbacks that it is given; `log_routing(trainer)` adds this one in front of them.

    Args:
        gates: Whether to record gates; False logs the load-balancing loss alone.

    Example:
        ```python
        trainer = log_routing(SFTTrainer(model, ...))
        ```
    """

    def __init__(self, gates: bool = True) -> None:
        self.gates = gates
        self._routing = _Routing()
        self._warned: set[str] = set()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record the first micro-batch of a step that will be logged."""
        step = state.global_step + 1
        steps = max(1, int(state.logging_steps or 1))
        due = step % steps == 0 or (step == 1 and args.logging_first_step)
        if self.gates and (due or args.logging_strategy == "epoch"):
            self._routing = _Routing()
            _conditioner(kwargs["model"]).recorder = self._routing

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop recording."""
        _conditioner(kwargs["model"]).recorder = None

    on_step_end = on_substep_end

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the figures to an entry about training."""
        logs: dict[str, float] = kwargs.get("logs") or {}
        if "loss" not in logs:
            return
        found = self._routing.figures()
        aux_loss = _conditioner(kwargs["model"]).aux_log.take_mean()
        if aux_loss is not None:
            found["router_aux_loss"] = aux_loss
        logs.update(found)
        if state.log_history:
            state.log_history[-1].update(found)
        self._warn(found)

    def _warn(self, found: dict[str, float]) -> None:
        """Warn once of experts that die, and once of a router that ignores the task."""
        messages = {}
        dead = [n for n, x in found.items() if n.startswith("expert_load") and x < _DEAD_LOAD]
        if dead:
            messages["dead"] = (
                f"Experts are hardly used: {', '.join(dead)} below {_DEAD_LOAD:.0%}. A "
                "`router_aux_loss_coef` such as 0.01 balances them."
            )
        if found.get("task_share", 1.0) < _IGNORED_SHARE:
            messages["ignored"] = (
                f"The task explains {found['task_share']:.4%} of the gates' variance: the router "
                "ignores it. Check that the batch has several tasks, and `task_norm`."
            )
        for key in messages.keys() - self._warned:
            self._warned.add(key)
            warnings.warn(messages[key], UserWarning, stacklevel=3)


class _Routing:
    """A `GateRecorder` that keeps sums over the layers of one micro-batch."""

    def __init__(self) -> None:
        self.loads: list[torch.Tensor] = []
        self.entropies: list[float] = []
        self.shares: list[float] = []

    @torch.compiler.disable
    def __call__(
        self, layer: Any, adapter: str, gates: torch.Tensor, token_rows: torch.Tensor | None
    ) -> None:
        mask = counted_tokens(token_rows, gates.shape[0])
        rows = None if token_rows is None else token_rows.to(gates.device)
        if mask is not None:
            mask = mask.to(gates.device)
            gates, rows = gates[mask], None if rows is None else rows[mask]
        if not gates.shape[0]:
            return
        entropy = torch.special.entr(gates).sum(-1).mean().item()
        self.loads.append(gates.mean(0).cpu())
        self.entropies.append(entropy / math.log(max(2, gates.shape[1])))
        if rows is None or layer.shapes[adapter].reads_task is False:
            return
        found, index, counts = rows.unique(return_inverse=True, return_counts=True)
        if len(found) > 1:
            means = gates.new_zeros(len(found), gates.shape[1]).index_add_(0, index, gates)
            means = means / counts.unsqueeze(1)
            between = (counts.unsqueeze(1) * (means - gates.mean(0)).square()).sum() / len(gates)
            total = (gates - gates.mean(0)).square().sum() / len(gates)
            self.shares.append((between / total).item() if total > 0 else 0.0)

    def figures(self) -> dict[str, float]:
        """The figures of the micro-batch; nothing where none was recorded."""
        found: dict[str, float] = {}
        if self.loads and len({len(load) for load in self.loads}) == 1:
            loads = torch.stack(self.loads).mean(0).tolist()
            found.update((f"expert_load_{i}", load) for i, load in enumerate(loads))
        if self.entropies:
            found["gate_entropy"] = sum(self.entropies) / len(self.entropies)
        if self.shares:
            found["task_share"] = sum(self.shares) / len(self.shares)
        return found


def log_routing(trainer: Any, gates: bool = True) -> Any:
    """Add a `RoutingCallback` to a trainer, in front of those that report. Idempotent.

    Args:
        trainer: A transformers `Trainer` or one that builds on it.
        gates: See `RoutingCallback`.

    Returns:
        The same trainer.

    Raises:
        ValueError: If its model has no Task-Aware MoELoRA adapter.
    """
    base_model_of(trainer.model)
    callbacks = trainer.callback_handler.callbacks
    if not any(isinstance(callback, RoutingCallback) for callback in callbacks):
        callbacks.insert(0, RoutingCallback(gates))
    return trainer


def _conditioner(model: Any) -> Conditioner:
    found = conditioner_of(base_model_of(model))
    assert found is not None
    return found
