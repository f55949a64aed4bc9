"""In and out: a plain PEFT LoRA from an adapter, experts from plain LoRAs, and the layout of the paper's published adapter.

It knows the layers and PEFT's file formats, and looks at gates through `inspection.py`. It trains nothing.
"""

from __future__ import annotations

import json
import math
import pickle
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftConfig, PeftType, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, load_peft_weights
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from .conditioning import TaskState, check_task_embeds
from .config import TaskMoELoraConfig
from .encoder import TaskEncoderConfig
from .experts import expert_update
from .inspection import adapted_layers, counted_tokens, record_gates, recording
from .layer import Linear
from .model import base_model_of
from .peft_type import PREFIX
from .router import gates_from_logits, task_logits

_PEFT_PREFIX = "base_model.model."
_REPORT_NAME = "export_report.json"


@dataclass(frozen=True, slots=True)
class ExportReport:
    """How faithful an exported LoRA is.

    Attributes:
        adapter_name: The adapter it was made from.
        exact: Whether the LoRA equals the adapter for this task, up to rounding; otherwise it is an approximation.
        rank: Rank of the LoRA, `num_experts * r`, where `rank_pattern` says nothing else.
        tokens: Number of calibration tokens (padding not counted) that the following were measured on; 0 if none were given.
        layer_errors: For every layer, `||update of the LoRA - update of the adapter|| / ||update of the adapter||` over those
            tokens, both on the inputs that the adapter's model gives the layer.
        logits_max_abs: Largest absolute difference between the two models' logits; None if the model gives no logits.
        logits_kl: Mean over those tokens of `KL(adapter || LoRA)` between the predicted distributions, in nats.
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
        """Write a folder that `PeftModel.from_pretrained` loads without this package; the report goes along as JSON."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.state_dict, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        self.config.save_pretrained(str(folder))
        (folder / _REPORT_NAME).write_text(json.dumps(self.report.to_dict(), indent=2) + "\n")


def to_lora(
    model: nn.Module,
    task_embeds: torch.Tensor | None = None,
    *,
    adapter_name: str | None = None,
    calibration: Iterable[Mapping[str, Any] | str] | None = None,
    tokenizer: Any = None,
) -> LoraExport:
    r"""Turn an adapter into a plain PEFT LoRA of rank `num_experts * r`, for one task.

    With gates g that are the same for all tokens, `s * sum_i g_i B_i A_i` is one LoRA: `A` stacked, `B` stacked with the
    columns of expert i multiplied by `g_i`, and `lora_alpha` such that its scale is s. So for `router_inputs="task"` the
    export is exact. Gates that depend on the token are replaced by their mean over the calibration tokens, layer by layer;
    that is an approximation, and the report says how far off it is. Biases, `modules_to_save` and trainable tokens of
    the adapter go along.

    Args:
        model: A model with a Task-Aware MoELoRA adapter, wrapped in `PeftModel` or not. It is not changed.
        task_embeds: `(1, task_dim)` or `(task_dim,)`, the task to export for. For a router that reads token and task it may be
            left out if the calibration batches bring theirs (as `task_embeds`, or through `attach_task_encoder`); the mean
            is then over their tasks, too. Not for `router_inputs="token"`.
        adapter_name: Which adapter; None for the active one.
        calibration: Batches for the model's forward (dicts with e.g. `input_ids` and `attention_mask`), or texts. Needed where
            the router reads the token; otherwise only to measure the difference, which should be rounding.
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
    base = base_model_of(model)
    adapter_name = _adapter_name(base, adapter_name)
    layers = {
        n: layer for n, layer in adapted_layers(base).items() if adapter_name in layer.configs
    }
    config: TaskMoELoraConfig = base.peft_config[adapter_name]  # type: ignore[index,assignment]
    reads_token = "token" in config.router_inputs
    if task_embeds is not None:
        task_embeds = _one_task(task_embeds, config, adapter_name)
    batches = None if calibration is None else _batches(calibration, tokenizer, task_embeds)
    if batches is not None:
        _check_only_active(layers, base, adapter_name)

    if reads_token:
        if not batches:
            raise ValueError(
                f'The router of adapter "{adapter_name}" reads the token (`router_inputs="{config.router_inputs}"`), so its gates '
                "can only be averaged over some text. Pass `calibration=[...]`: batches for the model's forward, or texts of the "
                "task together with `tokenizer=...`."
            )
        gates = _average_gates(base, layers, adapter_name, batches)
    else:
        if task_embeds is None:
            raise ValueError(
                f'The router of adapter "{adapter_name}" reads the task, and a plain LoRA is the adapter for one task. '
                "Pass its embedding: `to_lora(model, encoder([prompt]))`."
            )
        gates = {
            name: _task_gates(layer, adapter_name, task_embeds) for name, layer in layers.items()
        }

    measured = _measure(base, layers, adapter_name, gates, batches) if batches else {}
    report = ExportReport(adapter_name, not reads_token, config.num_experts * config.r, **measured)
    if reads_token:
        warnings.warn(_approximation_message(report), stacklevel=2)
    return LoraExport(_lora_config(config), _lora_state_dict(base, adapter_name, gates), report)


def _approximation_message(report: ExportReport) -> str:
    worst = max(report.layer_errors, key=report.layer_errors.__getitem__)
    logits = ""
    if report.logits_kl is not None:
        logits = (
            f" and the logits by up to {report.logits_max_abs:.3g} (KL {report.logits_kl:.3g} nats)"
        )
    return (
        f'The LoRA is an approximation of adapter "{report.adapter_name}", whose gates depend on the token: over '
        f"{report.tokens} calibration tokens the layer updates differ by up to {report.layer_errors[worst]:.1%} (`{worst}`)"
        f"{logits}. Score it on your task before you use it."
    )


def _adapter_name(base: nn.Module, adapter_name: str | None) -> str:
    """The adapter meant, checked.

    Raises:
        ValueError: If it does not exist, or none or several are active and none is named.
    """
    layers = adapted_layers(base).values()
    known = list(dict.fromkeys(name for layer in layers for name in layer.configs))
    if adapter_name is not None:
        if adapter_name not in known:
            raise ValueError(
                f'There is no Task-Aware MoELoRA adapter "{adapter_name}" on this model; it has {known}. Pass one of these as '
                "`adapter_name`."
            )
        return adapter_name
    active = list(dict.fromkeys(name for layer in layers for name in _active(layer)))
    if len(active) != 1:
        raise ValueError(
            f"{len(active)} Task-Aware MoELoRA adapters are active ({active}), and one is needed. Pass `adapter_name`, one of "
            f"{known}."
        )
    return active[0]


def _active(layer: Linear) -> list[str]:
    names: Any = layer.active_adapters
    return [name for name in names if name in layer.configs]


def _one_task(
    task_embeds: torch.Tensor, config: TaskMoELoraConfig, adapter_name: str
) -> torch.Tensor:
    """`task_embeds` as `(1, task_dim)`, checked."""
    if "task" not in config.router_inputs:
        raise ValueError(
            f'The router of adapter "{adapter_name}" reads the token only, so `task_embeds` would have no effect. Leave it out.'
        )
    if isinstance(task_embeds, torch.Tensor) and task_embeds.dim() == 1:
        task_embeds = task_embeds.unsqueeze(0)
    check_task_embeds(task_embeds)
    if task_embeds.shape != (1, config.task_dim):
        raise ValueError(
            f"`task_embeds` has the shape {tuple(task_embeds.shape)}, but a plain LoRA is the adapter for one task. Pass "
            f"`task_embeds` of shape (1, {config.task_dim}), e.g. `encoder([prompt])`, and export once per task."
        )
    return task_embeds


def _batches(
    calibration: Iterable[Mapping[str, Any] | str], tokenizer: Any, task_embeds: torch.Tensor | None
) -> list[dict[str, Any]]:
    """The calibration batches with their task; texts become batches of one row, uncut."""
    if isinstance(calibration, str | Mapping):
        calibration = [calibration]
    batches = []
    for i, item in enumerate(calibration):
        if isinstance(item, str):
            if tokenizer is None:
                raise ValueError(
                    f"Item {i} of `calibration` is a text, which the model cannot read by itself. Pass the model's tokenizer as well: "
                    "`to_lora(..., tokenizer=tokenizer)`, or pass tokenised batches."
                )
            item = tokenizer(item, return_tensors="pt")
        elif not isinstance(item, Mapping):
            raise ValueError(
                f"Item {i} of `calibration` is a {type(item).__name__}, which is no input of the model. Pass dicts such as "
                '`{"input_ids": ..., "attention_mask": ...}`, or texts together with `tokenizer=...`.'
            )
        batch = dict(item)
        tensors = [
            value for value in batch.values() if isinstance(value, torch.Tensor) and value.dim()
        ]
        if not tensors:
            raise ValueError(
                f"Item {i} of `calibration` has no tensors (keys: {list(batch)}). Pass batches of tensors, as the model's forward "
                "takes them."
            )
        if task_embeds is not None:
            if "task_embeds" in batch:
                raise ValueError(
                    f"Item {i} of `calibration` brings its own `task_embeds`, and `to_lora` was given some as well. Leave one of the "
                    "two out."
                )
            batch["task_embeds"] = task_embeds.expand(tensors[0].shape[0], -1)
        batches.append(batch)
    if not batches:
        raise ValueError(
            "`calibration` is empty, so there is nothing to measure on. Pass some batches or texts of the task."
        )
    return batches


def _check_only_active(layers: dict[str, Linear], base: nn.Module, adapter_name: str) -> None:
    """Refuse to calibrate where the model's forward is not that of this adapter alone."""
    for name, layer in adapted_layers(base).items():
        active = _active(layer)
        if active != [adapter_name] * (name in layers) or layer.merged or layer.disable_adapters:
            state = (
                "merged"
                if layer.merged
                else "disabled"
                if layer.disable_adapters
                else f"active: {active}"
            )
            raise ValueError(
                f'Calibration runs the model with adapter "{adapter_name}" alone, but at layer "{name}" the adapters are {state}. '
                f'Call `model.set_adapter("{adapter_name}")` first (and `unmerge_adapter()`, `enable_adapter_layers()` where they '
                "are merged or disabled)."
            )


def _task_gates(layer: Linear, adapter_name: str, task_embeds: torch.Tensor) -> torch.Tensor:
    """The gates `(e,)` of a router that reads the task only."""
    router_weight = layer._weights(adapter_name)[2]
    task = layer._task(adapter_name, TaskState(task_embeds=task_embeds))
    assert task is not None
    return gates_from_logits(task_logits(task, router_weight), layer.shapes[adapter_name].top_k)[
        0
    ].detach()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients inside the block; every module's mode is restored."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def _run(base: nn.Module, batch: dict[str, Any]) -> Any:
    device = next(base.parameters()).device
    return base(**{k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()})


def _average_gates(
    base: nn.Module,
    layers: dict[str, Linear],
    adapter_name: str,
    batches: Sequence[dict[str, Any]],
) -> dict[str, torch.Tensor]:
    """Mean gates `(e,)` of every layer over all calibration tokens that are not padding."""
    with _evaluating(base), record_gates(base) as record:
        for batch in batches:
            _run(base, batch)
    means = {stats.layer: torch.tensor(stats.mean) for stats in record.stats()}
    missing = [name for name in layers if name not in means]
    if missing:
        raise ValueError(
            f"The calibration batches never reached {len(missing)} of the {len(layers)} adapted layers, e.g. `{missing[0]}`, so "
            "nothing is known about their gates. Add batches that use these layers (for an encoder-decoder with `labels`)."
        )
    return {name: means[name].to(layers[name]._weights(adapter_name)[0].device) for name in layers}


def _measure(
    base: nn.Module,
    layers: dict[str, Linear],
    adapter_name: str,
    gates: dict[str, torch.Tensor],
    batches: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """What replacing the gates by `gates` changes, on the calibration batches: the measured fields of `ExportReport`."""
    errors = _UpdateErrors(layers, gates)
    kl_sum, kl_count = 0.0, 0
    max_abs: float | None = None
    with _evaluating(base):
        for batch in batches:
            with errors.watching():
                exact = _logits(_run(base, batch))
            with _fixed_gates(layers, adapter_name, gates):
                ours = _logits(_run(base, batch))
            if exact is None or ours is None:
                continue
            counted = batch.get("attention_mask")
            if isinstance(counted, torch.Tensor) and counted.shape == exact.shape[:-1]:
                exact, ours = exact[counted.bool()], ours[counted.bool()]
            max_abs = max(max_abs or 0.0, (exact - ours).abs().max().item())
            exact, ours = exact.log_softmax(-1), ours.log_softmax(-1)
            kl = (exact.exp() * (exact - ours)).sum(-1)
            kl_sum, kl_count = kl_sum + kl.sum().item(), kl_count + kl.numel()
    return {
        "tokens": max(errors.tokens.values()),
        "layer_errors": errors.relative(),
        "logits_max_abs": max_abs,
        "logits_kl": max(kl_sum / kl_count, 0.0) if kl_count else None,
    }


def _logits(outputs: Any) -> torch.Tensor | None:
    """Float32 logits `(..., classes)` of a model's output, or None if it has none."""
    logits = getattr(outputs, "logits", None)
    return logits.float() if isinstance(logits, torch.Tensor) else None


class _UpdateErrors:
    """Sums up, layer by layer, how far the update with fixed gates is from the adapter's; a recorder of gates."""

    def __init__(self, layers: dict[str, Linear], gates: dict[str, torch.Tensor]) -> None:
        self.layers = layers
        self.gates = gates
        self.names = {id(layer): name for name, layer in layers.items()}
        self.inputs: dict[int, torch.Tensor] = {}
        self.squares = {name: [0.0, 0.0] for name in layers}
        self.tokens = dict.fromkeys(layers, 0)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Look at the forwards inside the block: a hook keeps each layer's input until its gates come."""
        with ExitStack() as stack:
            for layer in self.layers.values():
                handle = layer.register_forward_pre_hook(
                    lambda module, args: self.inputs.__setitem__(id(module), args[0])
                )
                stack.callback(handle.remove)
            stack.enter_context(recording(self))
            yield

    def __call__(
        self, layer: Any, adapter: str, gates: torch.Tensor, token_tasks: torch.Tensor | None
    ) -> None:
        """Compare the updates of one layer on one batch, in float32 at least."""
        name = self.names[id(layer)]
        x = self.inputs.pop(id(layer))
        update = _updates(layer, adapter, x, promote=True)
        exact = update(gates)
        difference = update(self.gates[name].expand_as(gates)) - exact
        mask = counted_tokens(adapter, gates.shape[0])
        self.tokens[name] += gates.shape[0] if mask is None else int(mask.sum())
        for i, values in enumerate((difference, exact)):
            values = values if mask is None else values[mask.to(values.device)]
            self.squares[name][i] += values.square().sum().item()

    def relative(self) -> dict[str, float]:
        """Relative error per layer; 0 where the adapter does nothing."""
        return {
            name: math.sqrt(difference / exact) if exact else 0.0
            for name, (difference, exact) in self.squares.items()
        }


def _updates(
    layer: Linear, adapter_name: str, x: torch.Tensor, promote: bool
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The layer's update of x `(tokens, out)` as a function of the gates `(tokens, e)`."""
    weight_a, weight_b, _ = layer._weights(adapter_name)
    dtype = torch.promote_types(weight_a.dtype, torch.float32) if promote else weight_a.dtype
    x2, scaling = x.reshape(-1, x.shape[-1]).to(dtype), layer.scaling[adapter_name]
    return lambda gates: expert_update(x2, gates, weight_a.to(dtype), weight_b.to(dtype), scaling)


@contextmanager
def _fixed_gates(
    layers: dict[str, Linear], adapter_name: str, gates: dict[str, torch.Tensor]
) -> Iterator[None]:
    """Inside the block the layers give what the LoRA with these gates would."""

    def hook(name: str) -> Callable[..., torch.Tensor]:
        def with_fixed_gates(
            layer: Any, args: Any, kwargs: Any, output: torch.Tensor
        ) -> torch.Tensor:
            x = args[0]
            fixed = gates[name].expand(x.numel() // x.shape[-1], -1)
            update = _updates(layer, adapter_name, x, promote=False)(fixed)
            base = layer.base_layer(*args, **kwargs)
            return (base + update.view(base.shape)).to(base.dtype)

        return with_fixed_gates

    with ExitStack() as stack:
        for name, layer in layers.items():
            handle = layer.register_forward_hook(hook(name), with_kwargs=True)
            stack.callback(handle.remove)
        yield


def _lora_config(config: TaskMoELoraConfig) -> LoraConfig:
    """The config of the LoRA of rank `E * r` whose scale is the adapter's.

    `lora_alpha / r` becomes `E * lora_alpha / (E * r)`, and `lora_alpha / sqrt(r)` becomes `sqrt(E) * lora_alpha / sqrt(E * r)`.
    """
    experts = config.num_experts
    factor = math.sqrt(experts) if config.use_rslora else experts
    return LoraConfig(
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        auto_mapping=config.auto_mapping,
        inference_mode=True,
        r=experts * config.r,
        lora_alpha=_number(factor * config.lora_alpha),
        rank_pattern={name: experts * r for name, r in (config.rank_pattern or {}).items()},
        alpha_pattern={
            name: _number(factor * a) for name, a in (config.alpha_pattern or {}).items()
        },
        lora_dropout=config.lora_dropout,
        use_rslora=config.use_rslora,
        fan_in_fan_out=config.fan_in_fan_out,
        target_modules=config.target_modules,
        exclude_modules=config.exclude_modules,
        layers_to_transform=config.layers_to_transform,
        layers_pattern=config.layers_pattern,
        modules_to_save=config.modules_to_save,
        trainable_token_indices=config.trainable_token_indices,
        bias="lora_only" if config.bias == "taskmoe_lora_only" else config.bias,
    )


def _number(value: float) -> Any:
    """An int where it is one, as other tools expect `lora_alpha`."""
    return int(value) if float(value).is_integer() else value


def _lora_state_dict(
    base: nn.Module, adapter_name: str, gates: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Everything the adapter saves, with A and gated B under LoRA's names and without the routers."""
    found: dict[str, torch.Tensor] = {}
    for key, value in get_peft_model_state_dict(base, adapter_name=adapter_name).items():
        name, _, part = key.partition(f".{PREFIX}")
        value = value.detach()
        if part == "router.weight":
            continue
        if part == "B.weight":
            per_column = (
                gates[name].repeat_interleave(value.shape[1] // len(gates[name])).to(value.device)
            )
            value = (value * per_column).to(value.dtype)
        if part:
            key = f"{name}.lora_{part}"
        found[_PEFT_PREFIX + key] = value.to("cpu", copy=True).contiguous()
    return found


def experts_from_loras(
    model: nn.Module,
    loras: Sequence[Any],
    *,
    adapter_name: str | None = None,
    combine: Literal["mean", "sum"] = "mean",
    zero_router: bool = True,
) -> None:
    r"""Start the experts of an adapter from existing LoRA adapters, in place.

    A LoRA of rank `n * r` becomes n experts of rank r: n blocks of r rows of its A and columns of its B. B is scaled so that with all
    gates at `1 / E` (which a zero router gives) the adapter equals the mean of the J LoRAs' updates, or their sum:

        s / E * sum_i B_i A_i  =  c * sum_j s_j B^j A^j        c = 1 / J or 1

    that is, `B_i = B^j_block * (s_j / s) * E * c`. For E LoRAs of rank r and the mean, `E * c = 1`: an expert with a gate of 1
    is its LoRA. They must cover exactly the layers of the adapter.

    Args:
        model: A model with a Task-Aware MoELoRA adapter, e.g. fresh from `get_peft_model`.
        loras: Folders or Hub names of saved LoRA adapters, or `PeftModel`s whose active adapter is a LoRA.
        adapter_name: Whose experts to set; None for the active adapter's.
        combine: `"mean"` or `"sum"` of the LoRAs at gates of `1 / E`.
        zero_router: Set the routers to zero, so that the gates are `1 / E`. False leaves them as they are.

    Raises:
        ValueError: If ranks, shapes or layers do not fit, or a LoRA holds more than its A and B.
    """
    if combine not in ("mean", "sum"):
        raise ValueError(f'`combine` is {combine!r}, which is unknown. Pass "mean" or "sum".')
    base = base_model_of(model)
    adapter_name = _adapter_name(base, adapter_name)
    layers = {
        n: layer for n, layer in adapted_layers(base).items() if adapter_name in layer.configs
    }
    config = next(iter(layers.values())).configs[adapter_name]
    if zero_router and config.top_k not in (None, config.num_experts):
        raise ValueError(
            f"With a zero router all gates tie, and `top_k={config.top_k}` would pick the same experts for every token. Pass "
            "`zero_router=False`, or build the adapter with `top_k=None`."
        )
    if not loras:
        raise ValueError(
            "`loras` is empty, so there is nothing to start the experts from. Pass LoRA folders or models."
        )
    sources = [_read_lora(lora, i) for i, lora in enumerate(loras)]
    prepared = {
        name: _stack_loras(sources, name, layer, adapter_name, combine)
        for name, layer in layers.items()
    }
    for source in sources:
        spare = [key for key in source.tensors if key.rpartition(".lora_")[0] not in layers]
        if spare:
            raise ValueError(
                f'{source.name} adapts `{spare[0].rpartition(".lora_")[0]}`, which adapter "{adapter_name}" does not '
                f"({len(spare) // 2} such layers), so that part would be lost. Build the adapter with the LoRA's targets: "
                f"`TaskMoELoraConfig(target_modules={_shown_targets(source.config.target_modules)})`."
            )
    with torch.no_grad():
        for name, (weight_a, weight_b) in prepared.items():
            own_a, own_b, router = layers[name]._weights(adapter_name)
            own_a.copy_(weight_a)
            own_b.copy_(weight_b)
            if zero_router:
                router.zero_()


def _shown_targets(targets: Any) -> Any:
    return sorted(targets) if isinstance(targets, set | list) else repr(targets)


@dataclass(frozen=True, slots=True)
class _Lora:
    """A LoRA that was read: how to call it in errors, its config, and its A and B by `<layer>.lora_A.weight`."""

    name: str
    config: LoraConfig
    tensors: dict[str, torch.Tensor]

    def scaling(self, layer: str, rank: int) -> float:
        """`lora_alpha / rank` (or `/ sqrt(rank)`) at a layer."""
        patterns = self.config.alpha_pattern or {}
        alpha = patterns.get(get_pattern_key(list(patterns), layer), self.config.lora_alpha)
        return alpha / (math.sqrt(rank) if self.config.use_rslora else rank)


# Kinds of LoRA whose update is more, or other, than s B A x at every token.
_NOT_PLAIN = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "layer_replication",
    "velora_config",
)


def _read_lora(lora: Any, i: int) -> _Lora:
    """Read one LoRA; it must hold plain A and B and nothing else."""
    if isinstance(lora, str | Path):
        name = f"LoRA {i} (`{lora}`)"
        config: Any = PeftConfig.from_pretrained(str(lora))
        tensors = (
            load_peft_weights(str(lora), device="cpu") if config.peft_type == PeftType.LORA else {}
        )
    elif hasattr(lora, "peft_config") and hasattr(lora, "active_adapter"):
        name = f'LoRA {i} (adapter "{lora.active_adapter}")'
        config = lora.peft_config[lora.active_adapter]
        tensors = get_peft_model_state_dict(lora, adapter_name=lora.active_adapter)
    else:
        raise ValueError(
            f"Item {i} of `loras` is a {type(lora).__name__}. Pass folders of saved LoRA adapters, or `PeftModel`s."
        )
    if config.peft_type != PeftType.LORA:
        raise ValueError(
            f"{name} has the PEFT type {config.peft_type.value}, but experts start from plain LoRA adapters."
        )
    for setting in _NOT_PLAIN:
        if getattr(config, setting, None):
            raise ValueError(
                f"{name} has `{setting}`, so its update is more than B A x, which is all that an expert computes. Start from a plain LoRA."
            )
    tensors = {key.removeprefix(_PEFT_PREFIX): value.detach() for key, value in tensors.items()}
    for key in tensors:
        if not key.endswith((".lora_A.weight", ".lora_B.weight")):
            raise ValueError(
                f"{name} also holds `{key}`, which no expert can take over. Start from a LoRA of linear layers alone, without "
                "`modules_to_save`, biases or trained tokens."
            )
    return _Lora(name, config, tensors)


def _precise(tensor: torch.Tensor) -> torch.Tensor:
    """In float32, or float64 if it is."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _stack_loras(
    sources: Sequence[_Lora], name: str, layer: Linear, adapter_name: str, combine: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """A `(e*r, in)` and B `(out, e*r)` of one layer, see `experts_from_loras`."""
    r, num_experts = layer.r[adapter_name], layer.num_experts[adapter_name]
    factor = num_experts / (len(sources) if combine == "mean" else 1) / layer.scaling[adapter_name]
    parts_a, parts_b = [], []
    for source in sources:
        weight_a, weight_b = (source.tensors.get(f"{name}.lora_{part}.weight") for part in "AB")
        if weight_a is None or weight_b is None:
            raise ValueError(
                f'{source.name} does not adapt `{name}`, but adapter "{adapter_name}" does. Build the adapter with the LoRA\'s '
                f"targets: `TaskMoELoraConfig(target_modules={_shown_targets(source.config.target_modules)})`."
            )
        rank = weight_a.shape[0]
        if weight_a.shape != (rank, layer.in_features) or weight_b.shape != (
            layer.out_features,
            rank,
        ):
            raise ValueError(
                f"{source.name} has A {tuple(weight_a.shape)} and B {tuple(weight_b.shape)} at `{name}`, which takes "
                f"{layer.in_features} features to {layer.out_features}. It was trained on another base model."
            )
        if rank % r:
            raise ValueError(
                f"{source.name} has rank {rank} at `{name}`, which cannot be cut into experts of rank {r}. Build the adapter with "
                f"`r={rank}`, or another divisor of {rank}."
            )
        parts_a.append(weight_a.cpu())
        parts_b.append(_precise(weight_b.cpu()) * (source.scaling(name, rank) * factor))
    found = sum(part.shape[0] for part in parts_a) // r
    if found != num_experts:
        raise ValueError(
            f'The {len(sources)} LoRAs make {found} experts of rank {r} at `{name}`, but adapter "{adapter_name}" has '
            f"{num_experts}. Build it with `TaskMoELoraConfig(num_experts={found}, r={r})`."
        )
    return torch.cat(parts_a), torch.cat(parts_b, dim=1)


_REFERENCE_PARTS = ("lora_A_weight", "lora_B_weight", "lora_route.weight")


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

    Their layout, per adapted layer: `lora_A_weight` (E, in, r), `lora_B_weight` (E, r, out) and `lora_route.weight`
    (E, in + task), or (E, in) where the router reads the token only. Ours: A (E*r, in), B (out, E*r), the same router, with
    `task_norm="none"`, the raw task vector. Afterwards `PeftModel.from_pretrained(base_model, output_folder)` loads it.

    Args:
        checkpoint: A folder with `adapter_model.safetensors` or `adapter_model.bin`, such a file, or its tensors by key. `.bin` files
            are read with `torch.load(weights_only=True)`.
        output_folder: Where to write.
        base_model: The base model, to check names and sizes of the layers against; optional.
        base_model_name_or_path: Name of the base model to note in the config; default: the one in the checkpoint's
            `adapter_config.json`.
        lora_alpha: Alpha it was trained with; default: the one in `adapter_config.json`. The paper's is 32.
        lora_dropout: For training on; default: the one in `adapter_config.json`, or 0.05.
        task_type: PEFT's task type.
        task_encoder: The encoder of the task embeddings (the paper's is `Salesforce/codet5-base`), to note in the config.

    Returns:
        The config that was written.

    Raises:
        FileNotFoundError: If there are no weights where `checkpoint` points to.
        ValueError: If keys are missing, unknown or of wrong shapes, or the alpha is unknown.
    """
    tensors, theirs, source = _read_reference(checkpoint)
    layers = _reference_layers(tensors)
    state_dict: dict[str, torch.Tensor] = {}
    sizes: dict[str, tuple[int, int, int]] = {}  # (experts, r, task) of each layer
    for name, (weight_a, weight_b, route) in layers.items():
        experts, features, r = weight_a.shape
        sizes[name] = experts, r, route.shape[1] - features
        if base_model is not None:
            _check_against_base(base_model, name, features, weight_b.shape[2])
        prefix = f"{_PEFT_PREFIX}{name}.{PREFIX}"
        state_dict[f"{prefix}A.weight"] = (
            weight_a.transpose(1, 2).reshape(experts * r, features).contiguous()
        )
        state_dict[f"{prefix}B.weight"] = weight_b.reshape(experts * r, -1).t().contiguous()
        state_dict[f"{prefix}router.weight"] = route.contiguous()
    first, size = next(iter(sizes.items()))
    for name, other in sizes.items():
        if other != size:
            raise ValueError(
                f"`{name}` has (experts, rank, task dimension) = {other}, but `{first}` has {size}. One adapter has the same everywhere; "
                "the checkpoint mixes several."
            )
    _check_against_config(theirs, layers, size[1])
    lora_alpha = theirs.get("lora_alpha") if lora_alpha is None else lora_alpha
    if lora_alpha is None:
        raise ValueError(
            "The checkpoint does not say its `lora_alpha` (no `adapter_config.json` with it), and the tensors do not show it. "
            "Pass the one it was trained with, e.g. the paper's `lora_alpha=32`."
        )
    dropout = theirs.get("lora_dropout", 0.05) if lora_dropout is None else lora_dropout
    config = TaskMoELoraConfig(
        task_type=task_type,
        base_model_name_or_path=base_model_name_or_path or theirs.get("base_model_name_or_path"),
        inference_mode=True,
        num_experts=size[0],
        r=size[1],
        lora_alpha=lora_alpha,
        lora_dropout=dropout,
        router_inputs="token+task" if size[2] else "token",
        task_norm="none",
        task_encoder=task_encoder,
        target_modules=list(layers),
        task_dim=size[2] or TaskMoELoraConfig.task_dim,
    )
    folder = Path(output_folder)
    if source is not None and folder.resolve() == source.resolve():
        raise ValueError(
            f"`output_folder` is where the checkpoint is (`{folder}`), and would overwrite it. Pass another folder."
        )
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state_dict, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    config.save_pretrained(str(folder))
    return config


def _read_reference(
    checkpoint: str | Path | Mapping[str, torch.Tensor],
) -> tuple[Mapping[str, Any], dict[str, Any], Path | None]:
    """The tensors by key, what the `adapter_config.json` next to them says, and the folder they are in."""
    if isinstance(checkpoint, Mapping):
        return checkpoint, {}, None
    path = Path(checkpoint)
    folder = path if path.is_dir() else path.parent
    if path.is_dir():
        path = next(
            (
                path / name
                for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)
                if (path / name).is_file()
            ),
            path,
        )
    if not path.is_file():
        raise FileNotFoundError(
            f"`{checkpoint}` holds neither `{SAFETENSORS_WEIGHTS_NAME}` nor `{WEIGHTS_NAME}`. Pass the folder of a downloaded "
            'adapter, e.g. `huggingface_hub.snapshot_download("lbzg/TA-MoELoRA")`.'
        )
    if path.suffix == ".safetensors":
        tensors: Mapping[str, Any] = load_file(path)
    else:
        try:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"`{path}` holds more than tensors, and unpickling that could run code. Ask for a safetensors file, or convert it "
                "where you trust it."
            ) from error
    config_path = folder / "adapter_config.json"
    theirs = json.loads(config_path.read_text()) if config_path.is_file() else {}
    return tensors, theirs, folder


def _reference_layers(
    tensors: Mapping[str, Any],
) -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """A, B and router of each layer, by the layer's name in the base model; shapes checked."""
    parts: dict[str, dict[str, torch.Tensor]] = {}
    keys: dict[tuple[str, str], str] = {}
    for key, value in tensors.items():
        part = next((part for part in _REFERENCE_PARTS if key.endswith(f".{part}")), None)
        if part is None:
            raise ValueError(
                f"`{key}` is no part of the published layout, whose keys end in {', '.join(_REFERENCE_PARTS)}. "
                "Pass the adapter's own weights."
            )
        name = key.removesuffix(f".{part}").removeprefix("module.").removeprefix(_PEFT_PREFIX)
        dims = 2 if part == "lora_route.weight" else 3
        if (
            not isinstance(value, torch.Tensor)
            or value.dim() != dims
            or not value.is_floating_point()
        ):
            found = (
                f"{value.dtype} of shape {tuple(value.shape)}"
                if isinstance(value, torch.Tensor)
                else type(value).__name__
            )
            raise ValueError(
                f"`{key}` is {found}, but a float tensor of {dims} dimensions belongs there. Pass the adapter's own weights."
            )
        parts.setdefault(name, {})[part] = value
        keys[name, part] = key
    if not parts:
        raise ValueError("The checkpoint is empty. Pass the adapter's own weights.")
    layers = {}
    for name, of_layer in parts.items():
        for part in _REFERENCE_PARTS:
            if part not in of_layer:
                raise ValueError(
                    f"`{name}.{part}` is missing, while `{keys[name, next(iter(of_layer))]}` is there. The checkpoint is incomplete."
                )
        weight_a, weight_b, route = (of_layer[part] for part in _REFERENCE_PARTS)
        experts, features, r = weight_a.shape
        if weight_b.shape[:2] != (experts, r):
            raise ValueError(
                f"`{keys[name, 'lora_B_weight']}` has the shape {tuple(weight_b.shape)}, but with `lora_A_weight` {tuple(weight_a.shape)} "
                f"= (experts, in, r) it must be ({experts}, {r}, out)."
            )
        if route.shape[0] != experts or route.shape[1] < features:
            raise ValueError(
                f"`{keys[name, 'lora_route.weight']}` has the shape {tuple(route.shape)}, but with `lora_A_weight` "
                f"{tuple(weight_a.shape)} = (experts, in, r) it must be ({experts}, {features} + task dimension)."
            )
        layers[name] = (weight_a, weight_b, route)
    return layers


def _check_against_base(base_model: nn.Module, name: str, features: int, out: int) -> None:
    """Refuse a layer that the base model does not have, or has in another size."""
    try:
        module = base_model.get_submodule(name)
    except AttributeError:
        linear = [n for n, m in base_model.named_modules() if isinstance(m, nn.Linear | Conv1D)]
        raise ValueError(
            f"The checkpoint adapts `{name}`, but the base model has no such layer (it has e.g. {linear[:3]}). It was trained on "
            "another architecture."
        ) from None
    weight = getattr(module, "weight", None)
    found = tuple(weight.shape) if weight is not None else ()
    if isinstance(module, Conv1D):
        found = found[::-1]
    if found != (out, features):
        raise ValueError(
            f"The checkpoint takes {features} features to {out} at `{name}`, but the base model's weight there is {found}. It was "
            "trained on a base model of another size."
        )


def _check_against_config(theirs: dict[str, Any], layers: Mapping[str, Any], r: int) -> None:
    """Refuse an `adapter_config.json` that does not describe these tensors."""
    if theirs.get("r") not in (None, r):
        raise ValueError(
            f"`adapter_config.json` says `r={theirs['r']}`, but the tensors have experts of rank {r}. The two do not belong together."
        )
    targets = theirs.get("target_modules")
    for target in targets if isinstance(targets, list) else []:
        if not any(name == target or name.endswith(f".{target}") for name in layers):
            raise ValueError(
                f"`adapter_config.json` lists the target `{target}`, but no key is of such a layer (found e.g. "
                f"`{next(iter(layers))}`). The checkpoint is incomplete."
            )
    if theirs.get("bias", "none") != "none":
        raise ValueError(
            f"`adapter_config.json` says `bias={theirs['bias']!r}`, but the published layout holds no biases. Pass the tensors alone."
        )
