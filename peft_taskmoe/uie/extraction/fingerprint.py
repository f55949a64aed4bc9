"""A checksum of everything but the text that decides what an extractor finds."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from accelerate.utils import align_module_device

_SAMPLE = 64  # values of each weight


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
