"""Mean gates over calibration batches, and what replacing the gates by them changes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ..experts import expert_update
from ..inspection import adapted_layers, counted_tokens, evaluating, record_gates, recording
from ..layer import Linear
from .chosen import ChosenAdapter, active_on

Batch = dict[str, Any]
Gates = dict[str, torch.Tensor]  # `(e,)` of each layer, by its name


def calibration_batches(
    adapter: ChosenAdapter,
    calibration: Iterable[Mapping[str, Any] | str],
    tokenizer: Any,
    task_embeds: torch.Tensor | None,
) -> list[Batch]:
    """The batches for the model's forward, with their task; a text becomes a batch of one row.

    Raises:
        ValueError: An item is no batch, or the model's forward is not that of this adapter alone.
    """
    if isinstance(calibration, str | Mapping):
        calibration = [calibration]
    batches = [_batch(i, item, tokenizer, task_embeds) for i, item in enumerate(calibration)]
    if not batches:
        raise ValueError("`calibration` is empty. Pass some batches or texts of the task.")
    _check_only_active(adapter)
    return batches


def _batch(i: int, item: Any, tokenizer: Any, task_embeds: torch.Tensor | None) -> Batch:
    if isinstance(item, str):
        if tokenizer is None:
            raise ValueError(f"Item {i} of `calibration` is a text. Pass `tokenizer=tokenizer`.")
        item = tokenizer(item, return_tensors="pt")
    batch = dict(item) if isinstance(item, Mapping) else {}
    tensors = [value for value in batch.values() if isinstance(value, torch.Tensor) and value.dim()]
    if not tensors:
        raise ValueError(
            f"Item {i} of `calibration` is a {type(item).__name__} without tensors. Pass dicts "
            'such as `{"input_ids": tensor}`, or texts together with `tokenizer=...`.'
        )
    if task_embeds is not None:
        if "task_embeds" in batch:
            raise ValueError(
                f"Item {i} of `calibration` brings its own `task_embeds`, and `to_lora` was given "
                "some as well. Leave one of the two out."
            )
        batch["task_embeds"] = task_embeds.expand(tensors[0].shape[0], -1)
    return batch


def _check_only_active(adapter: ChosenAdapter) -> None:
    """Refuse to calibrate where the model's forward is not that of this adapter alone."""
    for name, layer in adapted_layers(adapter.base).items():
        active = active_on(layer)
        state = "merged" if layer.merged else "disabled" if layer.disable_adapters else ""
        if not state and active != [adapter.name] * (name in adapter.layers):
            state = f"active: {active}"
        if state:
            raise ValueError(
                f'Calibration runs the model with adapter "{adapter.name}" alone, but at layer '
                f'"{name}" the adapters are {state}. Call `model.set_adapter("{adapter.name}")` '
                "first (and `unmerge_adapter()` or `enable_adapter_layers()` where needed)."
            )


def _run(base: nn.Module, batch: Batch) -> Any:
    device = next(base.parameters()).device
    moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    return base(**moved)


def average_gates(adapter: ChosenAdapter, batches: Sequence[Batch]) -> Gates:
    """Mean gates of every layer over all calibration tokens that are not padding.

    Raises:
        ValueError: The batches do not reach every adapted layer.
    """
    with evaluating(adapter.base), record_gates(adapter.base) as record:
        for batch in batches:
            _run(adapter.base, batch)
    means = {stats.layer: torch.tensor(stats.mean) for stats in record.stats()}
    missing = [name for name in adapter.layers if name not in means]
    if missing:
        raise ValueError(
            f"The calibration batches never reached {len(missing)} of the {len(adapter.layers)} "
            f"adapted layers, e.g. `{missing[0]}`. Add batches that use these layers (for an "
            "encoder-decoder with `labels`)."
        )
    layers = adapter.layers.items()
    return {name: means[name].to(adapter.weights(layer)[0].device) for name, layer in layers}


def measure_difference(
    adapter: ChosenAdapter, gates: Gates, batches: Sequence[Batch]
) -> dict[str, Any]:
    """What replacing the gates by `gates` changes: the measured fields of `ExportReport`."""
    errors = _UpdateErrors(adapter, gates)
    kl: list[torch.Tensor] = []
    max_abs: list[float] = []
    with evaluating(adapter.base):
        for batch in batches:
            with errors.watching():
                exact = _logits(_run(adapter.base, batch))
            with _fixed_gates(adapter, gates):
                ours = _logits(_run(adapter.base, batch))
            if exact is None or ours is None:
                continue
            counted = batch.get("attention_mask")
            if isinstance(counted, torch.Tensor) and counted.shape == exact.shape[:-1]:
                exact, ours = exact[counted.bool()], ours[counted.bool()]
            max_abs.append((exact - ours).abs().max().item())
            exact, ours = exact.log_softmax(-1), ours.log_softmax(-1)
            kl.append((exact.exp() * (exact - ours)).sum(-1).flatten())
    return {
        "tokens": max(errors.tokens.values()),
        "layer_errors": errors.relative(),
        "logits_max_abs": max(max_abs, default=None),
        "logits_kl": max(torch.cat(kl).mean().item(), 0.0) if kl else None,
    }


def _logits(outputs: Any) -> torch.Tensor | None:
    """Float32 logits `(..., classes)` of a model's output, or None if it has none."""
    logits = getattr(outputs, "logits", None)
    return logits.float() if isinstance(logits, torch.Tensor) else None


class _UpdateErrors:
    """Sums up, layer by layer, how far the update with fixed gates is from the adapter's."""

    def __init__(self, adapter: ChosenAdapter, gates: Gates) -> None:
        self.adapter = adapter
        self.gates = gates
        self.names = {id(layer): name for name, layer in adapter.layers.items()}
        self.inputs: dict[int, torch.Tensor] = {}
        self.squares = {name: [0.0, 0.0] for name in adapter.layers}
        self.tokens = dict.fromkeys(adapter.layers, 0)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """See the forwards inside: a hook keeps each layer's input until its gates come."""
        with ExitStack() as stack:
            for layer in self.adapter.layers.values():
                handle = layer.register_forward_pre_hook(
                    lambda module, args: self.inputs.__setitem__(id(module), args[0])
                )
                stack.callback(handle.remove)
            stack.enter_context(recording(self))
            yield

    def __call__(
        self, layer: Any, adapter: str, gates: torch.Tensor, token_rows: torch.Tensor | None
    ) -> None:
        """Compare the updates of one layer on one batch, in float32 at least: a `GateRecorder`."""
        name = self.names[id(layer)]
        update = _updates(self.adapter, layer, self.inputs.pop(id(layer)), promote=True)
        exact = update(gates)
        difference = update(self.gates[name].expand_as(gates)) - exact
        mask = counted_tokens(token_rows, gates.shape[0])
        self.tokens[name] += gates.shape[0] if mask is None else int(mask.sum())
        for i, values in enumerate((difference, exact)):
            values = values if mask is None else values[mask.to(values.device)]
            self.squares[name][i] += values.square().sum().item()

    def relative(self) -> dict[str, float]:
        """Relative error per layer; 0 where the adapter does nothing."""
        squares = self.squares.items()
        return {
            name: math.sqrt(apart / exact) if exact else 0.0 for name, (apart, exact) in squares
        }


def _updates(
    adapter: ChosenAdapter, layer: Linear, x: torch.Tensor, promote: bool
) -> Callable[[torch.Tensor], torch.Tensor]:
    """The layer's update of x, `(tokens, out)`, as a function of the gates `(tokens, e)`."""
    weight_a, weight_b, _ = adapter.weights(layer)
    dtype = torch.promote_types(weight_a.dtype, torch.float32) if promote else weight_a.dtype
    x2, scaling = x.reshape(-1, x.shape[-1]).to(dtype), layer.scaling[adapter.name]
    return lambda gates: expert_update(x2, gates, weight_a.to(dtype), weight_b.to(dtype), scaling)


@contextmanager
def _fixed_gates(adapter: ChosenAdapter, gates: Gates) -> Iterator[None]:
    """Inside the block the layers give what the LoRA with these gates would."""
    names = {id(layer): name for name, layer in adapter.layers.items()}

    def hook(layer: Any, args: Any, kwargs: Any, output: torch.Tensor) -> torch.Tensor:
        x = args[0]
        fixed = gates[names[id(layer)]].expand(x.numel() // x.shape[-1], -1)
        update = _updates(adapter, layer, x, promote=False)(fixed)
        base = layer.base_layer(*args, **kwargs)
        return (base + update.view(base.shape)).to(base.dtype)

    with ExitStack() as stack:
        for layer in adapter.layers.values():
            handle = layer.register_forward_hook(hook, with_kwargs=True)
            stack.callback(handle.remove)
        yield
