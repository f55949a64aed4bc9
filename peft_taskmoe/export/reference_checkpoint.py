"""Adapters in the layout that the paper's authors published, as folders of ours."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..config import TaskMoELoraConfig
from ..encoder import TaskEncoderConfig
from ..peft_type import PREFIX

_PARTS = ("lora_A_weight", "lora_B_weight", "lora_route.weight")
_PEFT_PREFIX = "base_model.model."


class _Layer(NamedTuple):
    """One layer: A `(experts, in, r)`, B `(experts, r, out)`, router `(experts, in + task)`."""

    a: torch.Tensor
    b: torch.Tensor
    router: torch.Tensor

    @property
    def size(self) -> tuple[int, int, int]:
        """Experts, rank, task dimension."""
        return self.a.shape[0], self.a.shape[2], self.router.shape[1] - self.a.shape[1]


def from_reference_checkpoint(
    checkpoint: str | Path | Mapping[str, torch.Tensor],
    output_folder: str | Path,
    *,
    base_model: nn.Module | None = None,
    base_model_name_or_path: str | None = None,
    lora_alpha: float | None = None,
    lora_dropout: float | None = None,
    task_type: str | None = "CAUSAL_LM",
    task_encoder: TaskEncoderConfig | dict[str, Any] | None = None,
) -> TaskMoELoraConfig:
    r"""Turn an adapter in the layout that the paper's authors published into a folder of ours.

    Their layout, per adapted layer: `lora_A_weight` (E, in, r), `lora_B_weight` (E, r, out) and
    `lora_route.weight` (E, in + task), or (E, in) where the router reads the token only. Ours: A
    (E*r, in), B (out, E*r), the same router, with `task_norm="none"`, the raw task vector.
    Afterwards `PeftModel.from_pretrained(base_model, output_folder)` loads it.

    Args:
        checkpoint: A folder with its weights, a `.safetensors` or `.bin` file, or its tensors.
        output_folder: Where to write.
        base_model: The base model, to check names and sizes of the layers against; optional.
        base_model_name_or_path: Name of the base model; `None`: as the checkpoint's config says.
        lora_alpha: Alpha it was trained with; `None`: likewise. The paper's is 32.
        lora_dropout: For further training; `None`: likewise, else 0.05.
        task_type: PEFT's task type.
        task_encoder: The encoder of the task embeddings (the paper's is `Salesforce/codet5-base`).

    Returns:
        The config that was written.

    Raises:
        FileNotFoundError: If there are no weights where `checkpoint` points to.
        ValueError: If keys are missing, unknown or of wrong shapes, or the alpha is unknown.
    """
    if isinstance(checkpoint, Mapping):
        tensors, theirs = checkpoint, dict[str, Any]()
    else:
        tensors, theirs = _read_folder(Path(checkpoint), Path(output_folder))
    layers = _layers(tensors)
    if base_model is not None:
        _check_against_base(base_model, layers)
    experts, r, task_dim = _common_size(layers)
    _check_against_config(theirs, layers, r)
    given: dict[str, Any] = {"lora_alpha": lora_alpha, "lora_dropout": lora_dropout}
    given["base_model_name_or_path"] = base_model_name_or_path
    config = TaskMoELoraConfig(
        task_type=task_type,
        **_settings(given, theirs),
        inference_mode=True,
        num_experts=experts,
        r=r,
        router_inputs="token+task" if task_dim else "token",
        task_norm="none",
        task_encoder=task_encoder,
        target_modules=list(layers),
        task_dim=task_dim or TaskMoELoraConfig.task_dim,
    )
    _save(config, layers, Path(output_folder))
    return config


def _settings(given: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """What the caller gives, else what the checkpoint's config says."""
    said: dict[str, Any] = (
        {"lora_dropout": 0.05} | theirs | {k: v for k, v in given.items() if v is not None}
    )
    if "lora_alpha" not in said:
        raise ValueError(
            "The checkpoint does not say its `lora_alpha` (no `adapter_config.json` with it). Pass "
            "the one it was trained with, e.g. the paper's `lora_alpha=32`."
        )
    return {name: said[name] for name in given if name in said}


def _save(config: TaskMoELoraConfig, layers: Mapping[str, _Layer], folder: Path) -> None:
    """Write A `(E*r, in)`, B `(out, E*r)` and the same router for each layer."""
    state_dict = {}
    for name, layer in layers.items():
        weights = layer.a.transpose(1, 2).flatten(0, 1), layer.b.flatten(0, 1).t(), layer.router
        for part, weight in zip(("A", "B", "router"), weights, strict=True):
            state_dict[f"{_PEFT_PREFIX}{name}.{PREFIX}{part}.weight"] = weight.contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state_dict, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    config.save_pretrained(str(folder))


def _read_folder(path: Path, output_folder: Path) -> tuple[Mapping[Any, Any], dict[str, Any]]:
    """The tensors of a folder or file, and the fields of the `adapter_config.json` beside them."""
    candidates = [path, path / SAFETENSORS_WEIGHTS_NAME, path / WEIGHTS_NAME]
    file = next((file for file in candidates if file.is_file()), None)
    if file is None:
        raise FileNotFoundError(
            f"`{path}` holds neither `{SAFETENSORS_WEIGHTS_NAME}` nor `{WEIGHTS_NAME}`. Pass the "
            'folder of an adapter, e.g. `huggingface_hub.snapshot_download("lbzg/TA-MoELoRA")`.'
        )
    if output_folder.resolve() == file.parent.resolve():
        raise ValueError(
            f"`output_folder` is where the checkpoint is (`{output_folder}`). Pass another folder."
        )
    return _read_tensors(file), _read_config(file.with_name("adapter_config.json"))


def _read_tensors(file: Path) -> Mapping[str, Any]:
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"`{file}` is broken, or holds more than tensors, which could run code. Get it as an "
            "intact safetensors file."
        ) from error
    return tensors if isinstance(tensors, Mapping) else {}


def _read_config(path: Path) -> dict[str, Any]:
    """The fields of an `adapter_config.json` that are used, their types checked."""
    if not path.is_file():
        return {}
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"`{path}` is no JSON ({error}).") from error
    if not isinstance(fields, dict):
        raise ValueError(f"`{path}` holds a {type(fields).__name__}, but an object belongs there.")
    allowed: dict[str, tuple[Any, str]] = {
        "r": (int, "a whole number"),
        "lora_alpha": (int | float, "a finite number"),
        "lora_dropout": (int | float, "a finite number"),
        "target_modules": (str | list, "names or a regex"),
        "base_model_name_or_path": (str, "a name"),
        "bias": (str, "a string"),
    }
    found = {name: fields[name] for name in allowed if fields.get(name) is not None}
    for name, value in found.items():
        type_, words = allowed[name]
        odd = isinstance(value, bool) or (isinstance(value, float) and not math.isfinite(value))
        if odd or not isinstance(value, type_):
            raise ValueError(f"`{path}` has `{name}` {value!r}. It must be {words}.")
    return found


def _layers(tensors: Mapping[Any, Any]) -> dict[str, _Layer]:
    """A, B and router of each layer, by the layer's name in the base model; shapes checked."""
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        part = next((part for part in _PARTS if str(key).endswith(f".{part}")), None)
        if part is None:
            raise ValueError(
                f"`{key}` is no part of the published layout, whose keys end in "
                f"{', '.join(_PARTS)}. Pass the adapter's own weights."
            )
        dims = 2 if part == _PARTS[2] else 3
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            found = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
            raise ValueError(f"`{key}` is {found}, but a float tensor belongs there.")
        if value.dim() != dims or not value.numel() or not value.isfinite().all():
            raise ValueError(
                f"`{key}` of shape {tuple(value.shape)} is not a tensor of {dims} dimensions with "
                "finite values. Pass the adapter's own weights."
            )
        name = key.removesuffix(f".{part}").removeprefix("module.").removeprefix(_PEFT_PREFIX)
        parts.setdefault(name, {})[part] = value
    if not parts:
        raise ValueError("The checkpoint is empty. Pass the adapter's own weights.")
    return {name: _layer(name, found) for name, found in parts.items()}


def _layer(name: str, found: Mapping[str, torch.Tensor]) -> _Layer:
    missing = [part for part in _PARTS if part not in found]
    if missing:
        raise ValueError(
            f"`{name}.{missing[0]}` is missing, while `{name}.{next(iter(found))}` is there. The "
            "checkpoint is incomplete."
        )
    layer = _Layer(*(found[part] for part in _PARTS))
    experts, features, r = layer.a.shape
    fits = layer.b.shape[:2] == (experts, r) and layer.router.shape[0] == experts
    if not fits or layer.router.shape[1] < features:
        shapes = ", ".join(f"{part} {tuple(found[part].shape)}" for part in _PARTS)
        raise ValueError(
            f"`{name}` has {shapes}. They must be (experts, in, r), (experts, r, out) and "
            "(experts, in + task dimension)."
        )
    return layer


def _common_size(layers: Mapping[str, _Layer]) -> tuple[int, int, int]:
    """Experts, rank and task dimension, the same in every layer."""
    first, layer = next(iter(layers.items()))
    for name, other in layers.items():
        if other.size != layer.size:
            raise ValueError(
                f"`{name}` has (experts, rank, task dimension) = {other.size}, but `{first}` has "
                f"{layer.size}. One adapter has the same everywhere; the checkpoint mixes several."
            )
    return layer.size


def _check_against_base(base_model: nn.Module, layers: Mapping[str, _Layer]) -> None:
    """Refuse a layer that the base model does not have, or has in another size."""
    modules = dict(base_model.named_modules())
    for name, layer in layers.items():
        wanted = layer.b.shape[2], layer.a.shape[1]
        weight = getattr(modules.get(name), "weight", None)
        if weight is None:
            raise ValueError(
                f"The checkpoint adapts `{name}`, but the base model has no such layer. It was "
                "trained on another architecture."
            )
        found = tuple(weight.shape[::-1] if isinstance(modules[name], Conv1D) else weight.shape)
        if found != wanted:
            raise ValueError(
                f"The checkpoint has (out, in) = {wanted} at `{name}`, but the base model has "
                f"{found}. It was trained on a base model of another size."
            )


def _check_against_config(theirs: Mapping[str, Any], layers: Mapping[str, Any], r: int) -> None:
    """Refuse an `adapter_config.json` that does not describe these tensors."""
    if theirs.get("r", r) != r:
        raise ValueError(
            f"`adapter_config.json` says `r={theirs['r']}`, but the tensors have experts of rank "
            f"{r}. The two do not belong together."
        )
    targets = theirs.get("target_modules")
    for target in targets if isinstance(targets, list) else []:
        if not any(f".{name}".endswith(f".{target}") for name in layers):
            raise ValueError(
                f"`adapter_config.json` lists the target `{target}`, but no key is of such a "
                "layer. The checkpoint is incomplete."
            )
    if theirs.get("bias", "none") != "none":
        raise ValueError(
            f"`adapter_config.json` says `bias={theirs['bias']!r}`, but the published layout holds "
            "no biases. Pass the tensors alone."
        )
