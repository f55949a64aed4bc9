"""Where a model runs and with which precision."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")  # accelerate's ways to place layers


def device_of(model: Any) -> torch.device:
    """Where a model takes its input; a layer that is offloaded names where it is executed."""
    table = model.get_input_embeddings()
    if not table.weight.is_meta:
        device: torch.device = table.weight.device
        return device
    hooks = (getattr(module, "_hf_hook", None) for module in (table, *model.modules()))
    found = (getattr(hook, "execution_device", None) for hook in hooks)
    return torch.device(next((device for device in found if device is not None), "cpu"))


def placement(
    device: str | torch.device | None,
    dtype: str | torch.dtype | None,
    model_kwargs: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The arguments of `from_pretrained` that put a base model where it shall run.

    Args:
        device: The device; None takes the accelerator that is there, or else the CPU.
        dtype: The precision; None keeps that of the files.
        model_kwargs: The caller's own arguments, which win.

    Raises:
        ValueError: There is no such device or precision.
    """
    own = dict(model_kwargs or {})
    for precision in (own.get("dtype"), dtype):
        if precision is not None:
            own["dtype"] = _dtype(precision)
    device_map = own.get("device_map")
    if isinstance(device_map, str) and device_map not in _MAPS:
        own["device_map"] = {"": _device(device_map)}
    if device is None and device_map is None and torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator()
    if device is None:
        return own
    chosen = _device(device)
    return own if chosen.type == "cpu" else {**own, "device_map": {"": chosen}}


def _device(device: str | torch.device) -> torch.device:
    try:
        chosen = torch.device(device)
        if chosen.type not in ("cpu", "meta"):
            torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"The device {str(device)!r} cannot be used: {reason}") from error
    return chosen


def _dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype == "auto" or (isinstance(found, torch.dtype) and found.is_floating_point):
        return dtype
    raise ValueError(
        f"The dtype {dtype!r} is no precision of a model. Pass one such as 'float32', 'bfloat16' "
        "or 'float16', or 'auto'."
    )
