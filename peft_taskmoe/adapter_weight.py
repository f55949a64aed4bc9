"""The weight of A, B or a router: read without a call, gathered where sharded or offloaded."""

from __future__ import annotations

import warnings

import torch
from accelerate.utils import align_module_device
from peft.utils.warning import PeftWarning
from torch import nn


class AdapterWeight(nn.Linear):
    """A weight that the adapted layer reads; called, it returns a copy.

    FSDP and ZeRO-3 gather a sharded weight for the time of a module's call alone, and PEFT's FSDP
    policy shards each of these by itself.
    """

    def forward(self) -> torch.Tensor:  # type: ignore[override]
        """The weight, `(out, in)`; gradients flow through."""
        return self.weight.clone()


def read_weight(part: nn.Linear, adapter: str) -> torch.Tensor:
    """The weight of a part of an adapter, wherever it is.

    Raises:
        ValueError: If it was created empty and never filled.
    """
    if _is_sharded(part):
        weight: torch.Tensor = part()
        return weight
    if not part.weight.is_meta:
        return part.weight
    with align_module_device(part):  # offloaded by accelerate
        weight = part.weight
    if weight.is_meta:
        raise ValueError(
            f'The weights of adapter "{adapter}" are on the meta device: they were created empty '
            "(`low_cpu_mem_usage=True`, offloaded base) and never filled. Load them with "
            "`PeftModel.from_pretrained` or `load_adapter`, and offload the model with its adapter."
        )
    return weight


def _is_sharded(part: nn.Module) -> bool:
    """Whether a part is a unit of FSDP (wrapped, or of a class made for it) or of ZeRO-3."""
    by_fsdp = type(part) is not AdapterWeight and isinstance(
        getattr(part, "module", part), AdapterWeight
    )
    return by_fsdp or hasattr(part.weight, "ds_id")


def warn_of_parts(weights: dict[str, torch.Tensor]) -> None:
    """Warn of weights to be saved that are parts of sharded ones, as PEFT does for LoRA alone."""
    parts = [name for name, one in weights.items() if one.dim() < 2 or one.numel() == 0]
    if parts:
        warnings.warn(
            f"{len(parts)} adapter weights are parts of sharded ones: {', '.join(parts[:3])}. "
            "What is saved does not load; save inside `deepspeed.zero.GatheredParameters` or "
            "`FullyShardedDataParallel.summon_full_params`, or by the Trainer.",
            PeftWarning,
            stacklevel=3,
        )
