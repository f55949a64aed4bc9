"""An adapter as a plain PEFT LoRA, for one task."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.tuners_utils import _find_minimal_target_modules
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import nn

from ..peft_type import PREFIX
from ..router import gates_from_logits, normalize_task, task_logits
from .calibration import average_gates, calibration_batches, measure_difference
from .chosen import ChosenAdapter, choose_adapter

_REPORT_NAME = "export_report.json"
_SHARED = (  # settings that mean the same for a LoRA
    "task_type base_model_name_or_path revision auto_mapping lora_dropout use_rslora "
    "fan_in_fan_out modules_to_save trainable_token_indices"
)


@dataclass(frozen=True, slots=True)
class ExportReport:
    """How faithful an exported LoRA is.

    Attributes:
        adapter_name: The adapter it was made from.
        exact: Whether the LoRA equals the adapter for this task, up to rounding.
        rank: Rank of the LoRA, `num_experts * r`, where `rank_pattern` has no other.
        tokens: Calibration tokens (without padding) of the following; 0 if none were given.
        layer_errors: For each layer, `||update of the LoRA - update of the adapter|| / ||update of
            the adapter||` over those tokens, both on the inputs of the adapter's model.
        logits_max_abs: Largest absolute difference of logits; None if the model gives none.
        logits_kl: Mean over those tokens of `KL(adapter || LoRA)` of the predictions, in nats.
    """

    adapter_name: str
    exact: bool
    rank: int
    tokens: int = 0
    layer_errors: dict[str, float] = field(default_factory=dict)
    logits_max_abs: float | None = None
    logits_kl: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, for JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class LoraExport:
    """A plain PEFT LoRA.

    Attributes:
        config: Its `LoraConfig`.
        state_dict: Its tensors, named as in `adapter_model.safetensors`.
        report: How faithful it is.
    """

    config: LoraConfig
    state_dict: dict[str, torch.Tensor]
    report: ExportReport

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that stock PEFT loads, and the report beside the weights as JSON."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.state_dict, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        self.config.save_pretrained(str(folder))
        report = json.dumps(self.report.to_dict(), indent=2)
        (folder / _REPORT_NAME).write_text(report + "\n", encoding="utf-8")


def to_lora(
    model: nn.Module,
    task_embeds: torch.Tensor | None = None,
    *,
    adapter_name: str | None = None,
    calibration: Iterable[Mapping[str, Any] | str] | None = None,
    tokenizer: Any = None,
) -> LoraExport:
    r"""Turn an adapter into a plain PEFT LoRA of rank `num_experts * r`, for one task.

    With gates g that are the same for all tokens, `s * sum_i g_i B_i A_i` is one LoRA: `A` stacked,
    and `B` stacked with the columns of expert i multiplied by `g_i`. So `router_inputs="task"` is
    exported exactly, but for the positions of DeBERTa v3. Gates that depend on the token are
    replaced by their mean over the calibration tokens, layer by layer: an approximation, measured
    in the report. Biases, `modules_to_save` and trainable tokens of the adapter go along.

    Args:
        model: A model with a Task-Aware MoELoRA adapter, wrapped in `PeftModel` or not. It is not
            changed.
        task_embeds: `(1, task_dim)` or `(task_dim,)`, the task to export for. A router that reads
            token and task does without if the calibration batches bring their own (as
            `task_embeds`, or through `attach_task_encoder`). Not for `router_inputs="token"`.
        adapter_name: Which adapter; None for the active one.
        calibration: Batches for the model's forward (dicts with e.g. `input_ids` and
            `attention_mask`), or texts. Needed where the router reads the token; otherwise only to
            measure the difference, which should be rounding.
        tokenizer: The model's tokenizer, if `calibration` holds texts.

    Returns:
        The `LoraExport`: config, state dict, report, `save_pretrained(folder)`.

    Raises:
        ValueError: If the task or the calibration is missing or does not fit.

    Example:
        ```python
        export = to_lora(model, encoder([prompt]), calibration=texts, tokenizer=tokenizer)
        print(export.report)
        export.save_pretrained("my-lora")
        ```
    """
    adapter = choose_adapter(model, adapter_name)
    reads_token = "token" in adapter.config.router_inputs
    task_embeds = _one_task(adapter, task_embeds)
    if calibration is None and reads_token:
        raise ValueError(
            f'The router of adapter "{adapter.name}" reads the token '
            f'(`router_inputs="{adapter.config.router_inputs}"`): its gates can only be averaged '
            "over some text. Pass `calibration=[...]`: batches, or texts with `tokenizer=...`."
        )
    batches = []
    if calibration is not None:
        batches = calibration_batches(adapter, calibration, tokenizer, task_embeds)
    gates = average_gates(adapter, batches) if reads_token else _task_gates(adapter, task_embeds)
    measured = measure_difference(adapter, gates, batches) if batches else {}
    positions = _given_positions(adapter)
    exact, rank = not (reads_token or positions), adapter.config.num_experts * adapter.config.r
    report = ExportReport(adapter.name, exact, rank, **measured)
    for message in _reservations(report, reads_token, positions):
        warnings.warn(message, stacklevel=2)
    return LoraExport(_lora_config(adapter), _lora_state_dict(adapter, gates), report)


def _given_positions(adapter: ChosenAdapter) -> list[str]:
    """The layers whose update a LoRA adds to relative positions as well, and the adapter not."""
    if not adapter.config.reads_task:
        return []
    return [name for name, layer in adapter.layers.items() if layer.layout.given_positions]


def _reservations(report: ExportReport, reads_token: bool, positions: list[str]) -> list[str]:
    """What a user has to know of a LoRA that is not exact."""
    messages = [_approximation_message(report)] if reads_token else []
    return messages + ([_positions_message(report, positions)] if positions else [])


def _positions_message(report: ExportReport, layers: list[str]) -> str:
    found = report.logits_max_abs
    logits = "Pass `calibration` to measure it"
    if found is not None:
        logits = f"Over {report.tokens} calibration tokens the logits differ by up to {found:.3g}"
    return (
        f"{len(layers)} layers, such as `{layers[0]}`, also project relative positions, which "
        f'adapter "{report.adapter_name}" leaves alone and the LoRA does not. {logits}. Score it '
        "on your task before you use it."
    )


def _approximation_message(report: ExportReport) -> str:
    worst = max(report.layer_errors, key=report.layer_errors.__getitem__)
    found = report.logits_max_abs
    logits = "" if found is None else f" and the logits by up to {found:.3g}"
    return (
        f'The LoRA is an approximation of adapter "{report.adapter_name}", whose gates depend on '
        f"the token: over {report.tokens} calibration tokens the layer updates differ by up to "
        f"{report.layer_errors[worst]:.1%} (`{worst}`){logits}. Score it on your task before you "
        "use it."
    )


def _one_task(adapter: ChosenAdapter, task_embeds: torch.Tensor | None) -> torch.Tensor | None:
    """`task_embeds` as `(1, task_dim)`, checked; None where calibration batches bring their own."""
    reads = adapter.config.router_inputs
    if task_embeds is None:
        if reads != "task":
            return None
        raise ValueError(
            f'The router of adapter "{adapter.name}" reads the task, and a plain LoRA is the '
            "adapter for one task. Pass its embedding: `to_lora(model, encoder([prompt]))`."
        )
    if "task" not in reads:
        raise ValueError(
            f'The router of adapter "{adapter.name}" reads the token only, so `task_embeds` would '
            "have no effect. Leave it out."
        )
    wanted = f"a float tensor of shape (1, {adapter.config.task_dim})"
    if not isinstance(task_embeds, torch.Tensor) or not task_embeds.is_floating_point():
        found = getattr(task_embeds, "dtype", type(task_embeds).__name__)
        raise ValueError(f"`task_embeds` is {found}. Pass {wanted}, e.g. `encoder([prompt])`.")
    one = task_embeds.unsqueeze(0) if task_embeds.dim() == 1 else task_embeds
    if one.shape != (1, adapter.config.task_dim):
        raise ValueError(
            f"`task_embeds` has the shape {tuple(one.shape)}, but a plain LoRA is the adapter for "
            f"one task. Pass {wanted}, and export once per task."
        )
    return one


def _task_gates(adapter: ChosenAdapter, task_embeds: Any) -> dict[str, torch.Tensor]:
    """The gates `(e,)` of every layer's router, which reads the task only."""
    gates = {}
    for name, layer in adapter.layers.items():
        router = adapter.weights(layer)[2].detach()
        task = task_embeds.to(router.device)
        task = normalize_task(task, adapter.config.task_norm, layer.in_features)
        gates[name] = gates_from_logits(task_logits(task, router), adapter.config.top_k)[0].detach()
    return gates


def _lora_config(adapter: ChosenAdapter) -> LoraConfig:
    """The config of the LoRA of rank `E * r` of the same layers, whose scale is the adapter's.

    `lora_alpha / r` becomes `E * lora_alpha / (E * r)`, and `lora_alpha / sqrt(r)` becomes
    `sqrt(E) * lora_alpha / sqrt(E * r)`.
    """
    config = adapter.config
    experts = config.num_experts
    factor = math.sqrt(experts) if config.use_rslora else experts
    return LoraConfig(
        **{name: getattr(config, name) for name in _SHARED.split()},
        target_modules=_targets(adapter),
        inference_mode=True,
        r=experts * config.r,
        lora_alpha=_number(factor * config.lora_alpha),
        rank_pattern={name: experts * r for name, r in (config.rank_pattern or {}).items()},
        alpha_pattern={n: _number(factor * a) for n, a in (config.alpha_pattern or {}).items()},
        bias="lora_only" if config.bias == "taskmoe_lora_only" else config.bias,
    )


def _targets(adapter: ChosenAdapter) -> set[str]:
    """The shortest names that mean the adapter's layers and no others."""
    names = [name for name, _ in adapter.base.named_modules() if name]
    inside = tuple(f"{name}." for name in adapter.layers)
    others = {n for n in names if n not in adapter.layers and not n.startswith(inside)}
    return _find_minimal_target_modules({*adapter.layers}, others)


def _number(value: float) -> Any:
    """An int where it is one, as other tools expect `lora_alpha`."""
    return int(value) if float(value).is_integer() else value


def _lora_state_dict(
    adapter: ChosenAdapter, gates: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """What the adapter saves, with A and gated B under LoRA's names and without the routers."""
    found: dict[str, torch.Tensor] = {}
    saved = get_peft_model_state_dict(adapter.base, adapter_name=adapter.name)
    for key, value in saved.items():
        name, _, part = key.partition(f".{PREFIX}")
        value = value.detach()
        if part == "router.weight":
            continue
        if part == "B.weight":
            columns = value.shape[1] // len(gates[name])
            scaled = gates[name] * adapter.layers[name].scale_of(adapter.name)
            per_column = scaled.repeat_interleave(columns).to(value.device)
            value = (value * per_column).to(value.dtype)
        if part:
            key = f"{name}.lora_{part}"
        found[f"base_model.model.{key}"] = value.to("cpu", copy=True).contiguous()
    return found
