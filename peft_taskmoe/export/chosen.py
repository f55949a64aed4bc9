"""The one adapter of a model that is exported, or whose experts are set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from ..conditioning import base_model_of
from ..config import TaskMoELoraConfig
from ..inspection import adapted_layers
from ..layer import Linear


@dataclass(frozen=True, slots=True)
class ChosenAdapter:
    """An adapter, its config and the layers that have it, by their names in the base model."""

    base: nn.Module
    name: str
    config: TaskMoELoraConfig
    layers: dict[str, Linear]

    def weights(self, layer: Linear) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A `(e*r, in)`, B `(out, e*r)` and the router's weight of a layer."""
        parts = (layer.taskmoe_lora_A, layer.taskmoe_lora_B, layer.taskmoe_lora_router)
        a, b, router = (cast(nn.Linear, part[self.name]).weight for part in parts)
        return a, b, router


def choose_adapter(model: nn.Module, adapter_name: str | None) -> ChosenAdapter:
    """The adapter of that name, or the one that is active.

    Raises:
        ValueError: It does not exist, or none is named and not exactly one is active.
    """
    base: Any = base_model_of(model)
    layers = adapted_layers(base)
    known = list(dict.fromkeys(name for layer in layers.values() for name in layer.configs))
    active = list(dict.fromkeys(name for layer in layers.values() for name in active_on(layer)))
    if adapter_name is None and len(active) != 1:
        raise ValueError(
            f"{len(active)} Task-Aware MoELoRA adapters are active ({active}), and one is needed. "
            f"Pass `adapter_name`, one of {known}."
        )
    name = active[0] if adapter_name is None else adapter_name
    if name not in known:
        raise ValueError(
            f'There is no Task-Aware MoELoRA adapter "{name}" on this model; it has {known}.'
        )
    having = {key: layer for key, layer in layers.items() if name in layer.configs}
    return ChosenAdapter(base, name, base.peft_config[name], having)


def active_on(layer: Linear) -> list[str]:
    """The Task-Aware MoELoRA adapters that are active on a layer."""
    names: Any = layer.active_adapters
    return [name for name in names if name in layer.configs]
