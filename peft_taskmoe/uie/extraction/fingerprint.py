"""A checksum of everything but the text that decides what an extractor finds."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from accelerate.utils import align_module_device
from peft.tuners.tuners_utils import BaseTunerLayer

_SAMPLE = 64  # values of each weight
# Where things lie, who wrote them, and the encoder, which has a fingerprint of its own.
_NOT_COMPARED = ("revision", "inference_mode", "auto_mapping", "peft_version", "task_encoder")


def weights_checksum(model: torch.nn.Module) -> str:
    """A checksum of a sample of every weight, offloaded ones included."""
    digest = hashlib.sha256()
    for name, module in model.named_modules():
        if not any(True for _ in _weights(module)):
            continue
        with align_module_device(module):
            for key, value in _weights(module):
                digest.update(f"{name}.{key} {tuple(value.shape)} {value.dtype}".encode())
                if not value.is_meta:
                    sample = value.detach().flatten()[:: max(value.numel() // _SAMPLE, 1)]
                    digest.update(sample.double().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


def _weights(module: torch.nn.Module) -> Any:
    """A module's own parameters, and the integers in which quantised layers keep theirs."""
    yield from module.named_parameters(recurse=False)
    for name, value in module.named_buffers(recurse=False):
        if not value.is_floating_point():
            yield name, value


def adapters_of(model: torch.nn.Module) -> list[Any]:
    """The active adapters of a model with their configs, and whether they are disabled."""
    layers = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    named = getattr(model, "active_adapters", None)  # a method of transformers' models
    active = {name for layer in layers for name in layer.active_adapters}
    active |= set(named) if isinstance(named, list) else set()
    known = getattr(model, "peft_config", {})
    disabled = any(layer.disable_adapters for layer in layers)
    return [
        {name: _settings(known[name]) for name in sorted(active)},
        disabled or getattr(model, "_adapters_disabled", False),
    ]


def _settings(config: Any) -> Any:
    """What a config of PEFT says but for `_NOT_COMPARED` and paths, in JSON's types."""
    kept = {
        key: sorted(value, key=str) if isinstance(value, (set, frozenset)) else value
        for key, value in config.to_dict().items()
        if key not in _NOT_COMPARED and not key.endswith("name_or_path")
    }
    return json.loads(json.dumps(kept, default=str))
