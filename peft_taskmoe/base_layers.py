"""Which layers of a base model can be adapted, and what is known of the tokens they are given."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import (
    BaseTunerLayer,
    _get_in_out_features,
    _maybe_include_all_linear_layers,
)
from torch import nn
from transformers import PreTrainedModel

from .task_scope import TaskState, current_state, entered
from .token_rows import TokenLayout

_NOT_LINEAR = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding, nn.MultiheadAttention)
_READ_BY_SCAN_KERNELS = ("out_proj", "x_proj", "dt_proj")
_SEQUENCE_FIRST = ("xlnet", "longformer", "led", "fsmt")
_POSITIONS_ONLY = ("pos_proj", "pos_q_proj", "pos_key_proj", "pos_query_proj")
_SHARED_WITH_POSITIONS = ("query_proj", "key_proj")  # in DeBERTa's with `share_att_key`
_POSITION_BIAS = ("disentangled_att_bias", "disentangled_attention_bias")
_EXPERT = re.compile(r"(^|\.)\w*experts\.(\w+\.|\w*\d$)")


def linear_features(base_layer: nn.Module) -> tuple[int, int]:
    """In- and out-features of anything that behaves like a linear layer.

    Raises:
        TypeError: If it does not.
    """
    # Layers of GPTQ and AWQ have `qweight`; those of HQQ `W_q`.
    like_linear = any(hasattr(base_layer, n) for n in ("weight", "in_features", "infeatures"))
    if like_linear and not isinstance(base_layer, _NOT_LINEAR):
        features = _get_in_out_features(base_layer)
        if all(isinstance(size, int) for size in features):
            return features
    raise TypeError(
        f"`{type(base_layer).__name__}` is no linear layer, and Task-Aware MoELoRA adapts linear "
        "layers only. Name other modules in `target_modules`, or leave it out with "
        "`exclude_modules`."
    )


def add_packed_linears(peft_config: PeftConfig, model: nn.Module) -> None:
    """Let `"all-linear"` mean quantised layers of classes of their own, which PEFT leaves out."""
    packed = _packed_linears(model)
    if packed and str(peft_config.target_modules).lower() == "all-linear":
        peft_config = _maybe_include_all_linear_layers(peft_config, model)
        peft_config.target_modules = packed | set(peft_config.target_modules or ())


def _packed_linears(model: nn.Module) -> set[str]:
    """Names of those layers; not of the output head, nor inside of layers that are adapted."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    tuned = tuple(f"{n}." for n, m in model.named_modules() if isinstance(m, BaseTunerLayer))
    return {
        name
        for name, module in model.named_modules()
        if _is_packed(module) and module is not head and not name.startswith(tuned)
    }


def _is_packed(module: nn.Module) -> bool:
    """Whether a layer has a matrix of integers, or sizes without a weight, as quantised ones do."""
    if isinstance(module, (nn.Linear, BaseTunerLayer, *_NOT_LINEAR)):
        return False
    weight = getattr(module, "weight", None)
    if isinstance(weight, torch.Tensor):
        return weight.dim() == 2 and not weight.is_floating_point()
    sizes = ("in_features", "infeatures")
    return any(hasattr(module, size) for size in sizes) and not list(module.children())


def check_called(name: str, base_layer: nn.Module, parent: nn.Module) -> None:
    """Refuse layers whose weights are read without a call: an adapter on them would do nothing.

    Args:
        name: Name of the layer in its parent.
        base_layer: The layer.
        parent: The module that holds it.

    Raises:
        ValueError: If it is one.
    """
    reader = None
    if isinstance(base_layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
        reader = "nn.MultiheadAttention"
    elif isinstance(parent, nn.TransformerEncoderLayer):
        reader = "the fast path of nn.TransformerEncoderLayer"
    elif _is_scan_mixer(parent) and name in _READ_BY_SCAN_KERNELS:
        reader = f"the fused kernels of {type(parent).__name__}"
    if reader is not None:
        raise ValueError(
            f"The weight of `{name}` is read by {reader} without calling the layer, so an adapter "
            f'on it would do nothing. Leave it out: `exclude_modules=["{name}"]`.'
        )


def _is_scan_mixer(parent: nn.Module) -> bool:
    """Whether a module is a mixer of Mamba or its kin."""
    return all(isinstance(getattr(parent, name, None), nn.Parameter) for name in ("A_log", "D"))


def tower_of(name: str, model: nn.Module) -> str | None:
    """The part of a composite model that a layer is in, if that is given images or sound.

    Such a part (a vision tower, a projector) is given one row an image, not one a text. In a model
    of transformers with a `text_config` that is everything but the text model and the output head.
    """
    config: Any = getattr(model, "config", None)
    others = set(getattr(config, "sub_configs", None) or ()) - {"text_config"}
    text = getattr(config, "text_config", None)
    if text is None or not any(getattr(config, other, None) is not None for other in others):
        return None
    parts = [
        part
        for part, module in model.named_modules()
        if part and isinstance(module, PreTrainedModel) and type(module.config) is type(text)
    ]
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if not parts or any(name.startswith(part + ".") for part in parts):
        return None
    if head is not None and model.get_submodule(name) is head:
        return None
    return ".".join(name.split(".")[: parts[0].count(".") + 1])


def only_for_positions(name: str, parent: nn.Module) -> bool:
    """Whether a layer is given relative positions alone, as some of DeBERTa's are."""
    return name in _POSITIONS_ONLY and any(hasattr(parent, method) for method in _POSITION_BIAS)


class _PositionBias:
    """DeBERTa's bias by relative position; its layers know that what they are given is no row."""

    def __init__(self, module: nn.Module, method: str) -> None:
        self.module = module
        self.method = method

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        state = current_state() or TaskState()
        with entered(replace(state, positions=True)):
            return getattr(type(self.module), self.method)(self.module, *args, **kwargs)


def mark_positions(model: nn.Module, mark: bool = True) -> None:
    """Let DeBERTa's attention say when it projects relative positions; `mark=False` undoes it."""
    for module in model.modules():
        for method in _POSITION_BIAS:
            if mark and hasattr(type(module), method):
                module.__dict__[method] = _PositionBias(module, method)
            else:
                module.__dict__.pop(method, None)


def layout_of(name: str, model: nn.Module) -> TokenLayout:
    """What is known of how a layer of a model is given tokens."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    parent = model.get_submodule(name.rpartition(".")[0])
    positions = name.endswith(_SHARED_WITH_POSITIONS) and getattr(parent, "share_att_key", False)
    return TokenLayout(
        name, bool(_EXPERT.search(name)), model_type in _SEQUENCE_FIRST, bool(positions)
    )
