"""Experts that start from existing LoRA adapters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftConfig, PeftType, get_peft_model_state_dict
from peft.utils import load_peft_weights
from peft.utils.other import get_pattern_key
from torch import nn

from ..layer import Linear
from .chosen import ChosenAdapter, choose_adapter

# Kinds of LoRA whose update is more, or other, than s B A x at every token.
_NOT_PLAIN = (
    "use_dora use_qalora use_bdlora alora_invocation_tokens layer_replication velora_config"
)

_SAME_BASE = ("gaussian", "eva", "orthogonal")  # starts of A and B that leave the base as it is


def experts_from_loras(
    model: nn.Module,
    loras: Sequence[Any],
    *,
    adapter_name: str | None = None,
    combine: Literal["mean", "sum"] = "mean",
    zero_router: bool = True,
) -> None:
    r"""Start the experts of an adapter from existing LoRA adapters, in place.

    A LoRA of rank `n * r` becomes n experts of rank r: n blocks of r rows of its A and columns of
    its B. B is scaled so that with all gates at `1 / E` (which a zero router gives) the adapter
    equals the mean of the J LoRAs' updates, or their sum:

        s / E * sum_i B_i A_i  =  c * sum_j s_j B^j A^j        c = 1 / J or 1

    that is, `B_i = B^j_block * (s_j / s) * E * c`. For E LoRAs of rank r and the mean, `E * c = 1`:
    an expert with a gate of 1 is its LoRA. They must cover exactly the layers of the adapter.

    Args:
        model: A model with a Task-Aware MoELoRA adapter, e.g. fresh from `get_peft_model`.
        loras: Folders or Hub names of saved LoRAs, or `PeftModel`s whose active adapter is one.
        adapter_name: Whose experts to set; None for the active adapter's.
        combine: `"mean"` or `"sum"` of the LoRAs at gates of `1 / E`.
        zero_router: Set the routers to zero, so that the gates are `1 / E`. False leaves them.

    Raises:
        ValueError: If ranks, shapes or layers do not fit, or a LoRA holds more than its A and B.
    """
    if combine not in ("mean", "sum"):
        raise ValueError(f'`combine` is {combine!r}, which is unknown. Pass "mean" or "sum".')
    if not loras:
        raise ValueError("`loras` is empty. Pass LoRA folders or models.")
    adapter = choose_adapter(model, adapter_name)
    top_k = adapter.config.top_k
    if zero_router and top_k not in (None, adapter.config.num_experts):
        raise ValueError(
            f"With a zero router all gates tie, and `top_k={top_k}` would pick the same experts "
            "for every token. Pass `zero_router=False`, or build the adapter with `top_k=None`."
        )
    sources = [_read_lora(lora, i) for i, lora in enumerate(loras)]
    stacked = {
        name: _stack_loras(sources, name, layer, adapter, combine)
        for name, layer in adapter.layers.items()
    }
    for source in sources:
        source.check_nothing_is_left(adapter)
    with torch.no_grad():
        for name, (weight_a, weight_b) in stacked.items():
            own_a, own_b, router = adapter.weights(adapter.layers[name])
            own_a.copy_(weight_a)
            own_b.copy_(weight_b)
            if zero_router:
                router.zero_()


@dataclass(frozen=True, slots=True)
class _Lora:
    """A LoRA: its name in errors, its config, its A and B by `<layer>.lora_A.weight`."""

    name: str
    config: LoraConfig
    tensors: dict[str, torch.Tensor]

    def scaling(self, layer: str, rank: int) -> float:
        """`lora_alpha / rank` (or `/ sqrt(rank)`) at a layer."""
        patterns = self.config.alpha_pattern or {}
        alpha = patterns.get(get_pattern_key(list(patterns), layer), self.config.lora_alpha)
        if (
            isinstance(alpha, bool)
            or not isinstance(alpha, int | float)
            or not math.isfinite(alpha)
        ):
            raise ValueError(f"{self.name} has the alpha {alpha!r}. It must be a finite number.")
        return alpha / (math.sqrt(rank) if self.config.use_rslora else rank)

    def targets(self) -> str:
        """How to build an adapter of the same layers."""
        targets = self.config.target_modules
        shown = sorted(targets) if isinstance(targets, set | list) else repr(targets)
        return f"Build the adapter with `TaskMoELoraConfig(target_modules={shown})`."

    def check_nothing_is_left(self, adapter: ChosenAdapter) -> None:
        """Refuse to lose layers that the adapter does not have."""
        spare = {key.rpartition(".lora_")[0]: key for key in self.tensors}.keys() - adapter.layers
        if spare:
            raise ValueError(
                f'{self.name} adapts `{min(spare)}`, which adapter "{adapter.name}" does not '
                f"({len(spare)} such layers), so that part would be lost. {self.targets()}"
            )


def _read_lora(lora: Any, i: int) -> _Lora:
    """Read one LoRA; it must hold plain A and B and nothing else."""
    if isinstance(lora, str | Path):
        name, config = f"LoRA {i} (`{lora}`)", PeftConfig.from_pretrained(str(lora))
    elif hasattr(lora, "peft_config") and hasattr(lora, "active_adapter"):
        name = f'LoRA {i} (adapter "{lora.active_adapter}")'
        config = lora.peft_config[lora.active_adapter]
    else:
        raise ValueError(
            f"Item {i} of `loras` is a {type(lora).__name__}. Pass folders of saved LoRA adapters, "
            "or `PeftModel`s."
        )
    kind = next((kind for kind in _NOT_PLAIN.split() if getattr(config, kind, None)), None)
    start = getattr(config, "init_lora_weights", True)
    if not kind and isinstance(start, str) and start.partition("_")[0] not in _SAME_BASE:
        raise ValueError(
            f'{name} has `init_lora_weights="{start}"`, which changes the base weights, so that it '
            "is an update of another base. Save it as a plain LoRA with PEFT's "
            "`path_initial_model_for_weight_conversion` first."
        )
    if config.peft_type != PeftType.LORA or kind:
        found = f"has `{kind}`" if kind else f"has the PEFT type {config.peft_type.value}"
        raise ValueError(
            f"{name} {found}, but experts compute B A x and nothing else. Start from a plain LoRA."
        )
    if isinstance(lora, str | Path):
        tensors = load_peft_weights(str(lora), device="cpu")
    else:
        tensors = get_peft_model_state_dict(lora, adapter_name=lora.active_adapter)
    tensors = {key.removeprefix("base_model.model."): t.detach() for key, t in tensors.items()}
    for key, tensor in tensors.items():
        if not key.endswith((".lora_A.weight", ".lora_B.weight")):
            raise ValueError(
                f"{name} also holds `{key}`, which no expert can take over. Start from a LoRA of "
                "linear layers alone, without `modules_to_save`, biases or trained tokens."
            )
        if not tensor.isfinite().all():
            raise ValueError(f"{name} has NaN or infinite values in `{key}`.")
    return _Lora(name, config, tensors)


def _stack_loras(
    sources: Sequence[_Lora], name: str, layer: Linear, adapter: ChosenAdapter, combine: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """A `(e*r, in)` and B `(out, e*r)` of one layer, see `experts_from_loras`."""
    num_experts = adapter.config.num_experts
    r = adapter.weights(layer)[0].shape[0] // num_experts
    factor = num_experts / (len(sources) if combine == "mean" else 1) / layer.scaling[adapter.name]
    parts_a, parts_b = [], []
    for source in sources:
        weight_a, weight_b = _blocks(source, name, layer, r)
        precise = torch.promote_types(weight_b.dtype, torch.float32)
        parts_a.append(weight_a)
        parts_b.append(weight_b.to(precise) * (source.scaling(name, weight_a.shape[0]) * factor))
    found = sum(part.shape[0] for part in parts_a) // r
    if found != num_experts:
        raise ValueError(
            f"The {len(sources)} LoRAs make {found} experts of rank {r} at `{name}`, but adapter "
            f'"{adapter.name}" has {num_experts}. Build it with '
            f"`TaskMoELoraConfig(num_experts={found}, r={r})`."
        )
    return torch.cat(parts_a), torch.cat(parts_b, dim=1)


def _blocks(source: _Lora, name: str, layer: Linear, r: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A LoRA's A and B of one layer on the CPU, checked to be whole experts of rank r."""
    weight_a, weight_b = (source.tensors.get(f"{name}.lora_{part}.weight") for part in "AB")
    if weight_a is None or weight_b is None:
        raise ValueError(
            f"{source.name} does not adapt `{name}`, but the adapter does. {source.targets()}"
        )
    rank = weight_a.shape[0]
    if weight_a.shape != (rank, layer.in_features) or weight_b.shape != (layer.out_features, rank):
        raise ValueError(
            f"{source.name} has A {tuple(weight_a.shape)} and B {tuple(weight_b.shape)} at "
            f"`{name}`, which takes {layer.in_features} features to {layer.out_features}. It was "
            "trained on another base model."
        )
    if rank % r:
        raise ValueError(
            f"{source.name} has rank {rank} at `{name}`, which cannot be cut into experts of rank "
            f"{r}. Build the adapter with `r={rank}`, or another divisor of {rank}."
        )
    return weight_a.cpu(), weight_b.cpu()
