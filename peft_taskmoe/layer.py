"""Router and experts on one base layer: the tuner layer that PEFT injects.

It knows the adapters of one layer and reads the task from the scope; how the task gets there is `conditioning.py`'s and
`model.py`'s business.
"""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from accelerate.utils import align_module_device
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from torch import nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from transformers.pytorch_utils import Conv1D

from .conditioning import TaskState, collect_aux_loss, current_state, made_ahead
from .config import TaskMoELoraConfig
from .experts import mix_bottleneck
from .fused import (
    DecodingWeights,
    ExpertShape,
    FusedUpdate,
    LayerTensors,
    decoding_dtype,
    decoding_step,
    decoding_weights,
)
from .peft_type import PREFIX
from .router import gates_from_logits, load_balancing_loss, sum_logits, task_logits

_CAST = (torch.float32, torch.bfloat16, torch.float16)  # what autocast casts before a product
_NOT_LINEAR = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding, nn.MultiheadAttention)


class _Decoding(NamedTuple):
    """What one layer keeps while a generation runs; without `weights`, steps take the general way."""

    weights: DecodingWeights | None
    place: int  # of this layer among those that the weights are of
    base_weight: torch.Tensor | None
    base_bias: torch.Tensor | None


_GENERAL = _Decoding(None, 0, None, None)


class _MadeAhead(NamedTuple):
    """A layer's output, computed together with that of another layer that reads the same tensor, until the layer is called."""

    out: torch.Tensor
    x: torch.Tensor
    version: int
    grad_enabled: bool

    def is_of(self, x: torch.Tensor) -> bool:
        """Whether it is the output for this x as it is now."""
        return (
            self.x is x
            and self.version == x._version
            and self.grad_enabled == torch.is_grad_enabled()
        )


class _Readers:
    """Which layers were given the very same tensor one after the other (q, k and v), as the first forward of a generation shows."""

    def __init__(self) -> None:
        self.last: Callable[[], torch.Tensor | None] = lambda: None
        self.together: list[Linear] = []
        self.by_layer: dict[Linear, list[Linear]] = {}

    def saw(self, layer: Linear, x: torch.Tensor) -> None:
        """Note that a layer was given x."""
        if layer in self.by_layer:
            return
        if self.last() is not x:
            self.last, self.together = weakref.ref(x), []
        self.together.append(layer)
        self.by_layer[layer] = self.together


class TaskMoELoraLayer(BaseTunerLayer):
    """The adapters of one layer, by adapter name: A `(e*r, in)`, B `(out, e*r)`, router `(e, in + task_dim)`, and their numbers."""

    adapter_layer_names = (f"{PREFIX}A", f"{PREFIX}B", f"{PREFIX}router")
    other_param_names = (
        "num_experts",
        "r",
        "lora_alpha",
        "scaling",
        "lora_dropout",
        "configs",
        "shapes",
    )

    def __init__(self, base_layer: nn.Module) -> None:
        self.base_layer = base_layer
        self.taskmoe_lora_A = nn.ModuleDict()
        self.taskmoe_lora_B = nn.ModuleDict()
        self.taskmoe_lora_router = nn.ModuleDict()
        self.num_experts: dict[str, int] = {}
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.lora_dropout: dict[str, float] = {}
        self.configs: dict[str, TaskMoELoraConfig] = {}
        self.shapes: dict[str, ExpertShape] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._before_merge: dict[str, torch.Tensor] = {}
        self.in_features, self.out_features = _linear_features(self.get_base_layer())

    def update_layer(
        self, adapter_name: str, r: int, lora_alpha: float, config: TaskMoELoraConfig
    ) -> None:
        """Add or replace an adapter.

        Args:
            adapter_name: Its name.
            r: Rank of each expert here (`rank_pattern` may make it differ from `config.r`).
            lora_alpha: Alpha here.
            config: Everything else.
        """
        reads_token, reads_task = "token" in config.router_inputs, "task" in config.router_inputs
        router_in = self.in_features * reads_token + config.task_dim * reads_task
        self.num_experts[adapter_name] = config.num_experts
        self.r[adapter_name] = r
        self.lora_alpha[adapter_name] = lora_alpha
        self.lora_dropout[adapter_name] = config.lora_dropout
        self.configs[adapter_name] = config
        self.set_scale(adapter_name, 1.0)
        self.shapes[adapter_name] = ExpertShape(
            config.num_experts, r, config.top_k, reads_token, reads_task
        )
        rank = config.num_experts * r
        self.taskmoe_lora_A[adapter_name] = AdapterWeight(self.in_features, rank, bias=False)
        self.taskmoe_lora_B[adapter_name] = AdapterWeight(rank, self.out_features, bias=False)
        self.taskmoe_lora_router[adapter_name] = AdapterWeight(
            router_in, config.num_experts, bias=False
        )
        self.reset_parameters(adapter_name, config.init_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def reset_parameters(self, adapter_name: str, init_weights: bool) -> None:
        """Draw A and the router as `nn.Linear` does (uniform within `1 / sqrt(in)`), and set B to zero.

        Each expert's A has `in` inputs, so its initial scale is that of a single LoRA's A.

        Args:
            adapter_name: Which adapter.
            init_weights: If False, B is drawn too.
        """
        weights = [getattr(self, name)[adapter_name].weight for name in self.adapter_layer_names]
        for weight in weights:
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        if init_weights:
            nn.init.zeros_(weights[1])

    def _active_here(self) -> list[str]:
        """The active adapters that this layer has."""
        names: Any = (
            self.active_adapters
        )  # a list; nn.Module's attributes hide it from the type checker
        return [name for name in names if name in self.taskmoe_lora_A]

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set an adapter's `scaling` to `scale` times what its config says, `lora_alpha / r` (`/ sqrt(r)` with `use_rslora`).

        Like `LoraLayer.set_scale`: a layer without the adapter is left as it is.
        """
        if adapter in self.configs:
            r = self.r[adapter]
            divisor = math.sqrt(r) if self.configs[adapter].use_rslora else r
            self.scaling[adapter] = scale * self.lora_alpha[adapter] / divisor

    def scale_layer(self, scale: float) -> None:
        """Multiply the `scaling` of the active adapters by a factor, like `LoraLayer.scale_layer`."""
        for adapter in self._active_here():
            self.scaling[adapter] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the `scaling` of the active adapters by a factor; without one, set it to what their configs say."""
        for adapter in self._active_here():
            if scale is None:
                self.set_scale(adapter, 1.0)
            else:
                self.scaling[adapter] /= scale

    def get_delta_weight(self, adapter_name: str) -> torch.Tensor:
        """`s * sum_i g_i B_i A_i` for the task of the current `task_context`, shaped like the base weight.

        Raises:
            ValueError: If the router reads the token (the gates then differ by token, and no single weight exists), or if
                there is not exactly one task to take the gates of.
        """
        shape = self.shapes[adapter_name]
        if shape.reads_token:
            raise ValueError(
                f'The router of adapter "{adapter_name}" reads the token (`router_inputs='
                f'"{self.configs[adapter_name].router_inputs}"`), so the gates differ from token to token and no single weight '
                "equals the adapter: it cannot be merged. Keep the adapter unmerged, or call `to_lora(model, ...)` for a plain "
                'LoRA that approximates it; adapters with `router_inputs="task"` merge exactly, per task.'
            )
        state = current_state()
        task = self._task(adapter_name, state)
        if task is None or task.shape[0] != 1:
            raise ValueError(
                f'Merging adapter "{adapter_name}" needs the one task to merge for, but '
                f"{'no' if task is None else task.shape[0]} task embeddings are in scope. "
                "Merge inside `with task_context(encoder([prompt])):`."
            )
        weight_a, weight_b, router_weight = self._weights(adapter_name)
        gates = gates_from_logits(task_logits(task, router_weight), shape.top_k).repeat_interleave(
            shape.r, dim=-1
        )
        delta = (weight_b * gates.to(weight_b.dtype)) @ weight_a * self.scaling[adapter_name]
        base = self.get_base_layer()
        if isinstance(base, nn.Linear | Conv1D):  # one config, but a model may have both kinds
            return delta.T if isinstance(base, Conv1D) else delta
        return delta.T if self.configs[adapter_name].fan_in_fan_out else delta

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapter of the current task to the base weight; `router_inputs="task"` only.

        Args:
            safe_merge: Check a copy for values that are not finite first.
            adapter_names: Which adapters; None for the active ones.

        Raises:
            ValueError: See `get_delta_weight`; or if the merged weight is not finite (`safe_merge`).
        """
        names = [
            name
            for name in check_adapters_to_merge(self, adapter_names)
            if name in self.taskmoe_lora_A
        ]
        deltas = {name: self.get_delta_weight(name) for name in names}
        if not deltas:
            return
        weight = self.get_base_layer().weight
        if not weight.is_floating_point():
            raise ValueError(
                f"The base weight is quantised ({weight.dtype}), and adding to it would round the adapter away. "
                "Keep the adapter unmerged, or load the base model unquantised to merge."
            )
        merged = weight.data
        for adapter_name, delta in deltas.items():
            merged = merged + delta.to(weight.dtype)
            if safe_merge and not torch.isfinite(merged).all():
                raise ValueError(
                    f"NaNs detected in the merged weights. The adapter {adapter_name} seems to be broken: it gives values that are "
                    "not finite. The base weight was left as it was."
                )
        weight.data = merged  # only now: whatever is refused leaves the layer unchanged
        self._before_merge.update(deltas)
        self.merged_adapters.extend(deltas)

    def unmerge(self) -> None:
        """Take the merged adapters out of the base weight again."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        while self.merged_adapters:
            delta = self._before_merge.pop(self.merged_adapters.pop())
            weight = self.get_base_layer().weight
            weight.data = weight.data - delta.to(weight)

    def _weights(self, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        parts = (self.taskmoe_lora_A, self.taskmoe_lora_B, self.taskmoe_lora_router)
        linears = [cast(AdapterWeight, part[adapter_name]) for part in parts]
        if _is_sharded(linears[0]):
            weight_a, weight_b, router_weight = (linear() for linear in linears)
        elif linears[0].weight.is_meta:
            weight_a, weight_b, router_weight = (
                _onloaded(linear, adapter_name) for linear in linears
            )
        else:
            weight_a, weight_b, router_weight = (linear.weight for linear in linears)
        return weight_a, weight_b, router_weight

    def _task(
        self, adapter_name: str, state: TaskState | None, device: torch.device | None = None
    ) -> torch.Tensor | None:
        """The task embeddings in scope at the scale this adapter reads them; None if it does not read the task."""
        if not self.shapes[adapter_name].reads_task:
            return None
        config = self.configs[adapter_name]
        device = device or cast(nn.Linear, self.taskmoe_lora_router[adapter_name]).weight.device
        task = (
            None
            if state is None
            else state.normalized_embeds(config.task_norm, self.in_features, device)
        )
        if task is None:
            raise ValueError(missing_task_message(adapter_name))
        if task.shape[-1] != config.task_dim:
            raise ValueError(wrong_dimension_message(adapter_name, task.shape[-1], config.task_dim))
        return task


class AdapterWeight(nn.Linear):
    """A, B or the router of an adapter: a weight that the adapted layer reads without calling anything.

    Called, it gives a copy of its weight. FSDP and ZeRO-3 gather what they sharded for the time of a module's call alone, and PEFT's
    FSDP policy shards each of these by itself.
    """

    def forward(self) -> torch.Tensor:  # type: ignore[override]
        """The weight, `(out, in)`; gradients flow through."""
        return self.weight.clone()


def _one_token_a_row(x: torch.Tensor) -> bool:
    return x.dim() == 3 and x.shape[1] == 1


def _is_sharded(part: nn.Module) -> bool:
    """Whether a part of an adapter is a unit of FSDP (wrapped, or by a class made for it) or one of ZeRO-3's parameters."""
    by_fsdp = type(part) is not AdapterWeight and isinstance(
        getattr(part, "module", part), AdapterWeight
    )
    return by_fsdp or hasattr(part.weight, "ds_id")


def _onloaded(module: nn.Linear, adapter_name: str) -> torch.Tensor:
    """The weight of a part of an adapter that accelerate has offloaded to the CPU or to disk.

    Raises:
        ValueError: If there is none: it was created empty.
    """
    with align_module_device(module):
        weight = module.weight
    if weight.is_meta:
        raise ValueError(
            f'The weights of adapter "{adapter_name}" are on the meta device: they were created empty, by `low_cpu_mem_usage=True` '
            "or on a base layer that is offloaded, and never filled. Load them (`PeftModel.from_pretrained`, `load_adapter`, "
            "`set_peft_model_state_dict(..., low_cpu_mem_usage=True)`), and offload the model only with its adapter on."
        )
    return weight


def wrong_dimension_message(adapter_name: str, found: int, task_dim: int) -> str:
    """What to say to task embeddings of another encoder."""
    return (
        f'The task embeddings have {found} dimensions, but the router of adapter "{adapter_name}" was built for '
        f"`task_dim={task_dim}`. Use the encoder it was trained with, or build the adapter with "
        f"`TaskMoELoraConfig(task_dim={found})`."
    )


def missing_task_message(adapter_name: str) -> str:
    """What to say to a forward without a task."""
    return (
        f'This forward has no task embedding. The router of adapter "{adapter_name}" reads the task, so every example needs one. '
        "Pass task_embeds=..., or call attach_task_encoder(model). Where the call is not yours, run it inside "
        "`with task_context(task_embeds):`."
    )


def _linear_features(base_layer: nn.Module) -> tuple[int, int]:
    """In- and out-features of anything that behaves like a linear layer.

    Raises:
        TypeError: If it does not, or if PyTorch reads its weight without calling it.
    """
    if isinstance(base_layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
        raise TypeError(
            "The output projection of `nn.MultiheadAttention` is read by its parent without being called, so an adapter on it "
            "would do nothing. Leave it out with `exclude_modules`."
        )
    like_linear = isinstance(base_layer, nn.Linear | Conv1D) or hasattr(base_layer, "weight")
    if like_linear and not isinstance(base_layer, _NOT_LINEAR):
        features = _get_in_out_features(base_layer)
        if all(isinstance(size, int) for size in features):
            return features
    raise TypeError(
        f"`{type(base_layer).__name__}` is no linear layer, and Task-Aware MoELoRA adapts linear layers only (`nn.Linear`, "
        "transformers' `Conv1D`, and layers with `in_features` and `out_features` that behave like them). "
        "Name other modules in `target_modules`, or leave this one out with `exclude_modules`."
    )


class Linear(nn.Module, TaskMoELoraLayer):
    """An adapted linear layer.

    Args:
        base_layer: The layer to adapt, or a tuner layer around it.
        adapter_name: Name of the first adapter.
        r: See `TaskMoELoraLayer.update_layer`.
        lora_alpha: Likewise.
        config: Likewise.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        r: int,
        lora_alpha: float,
        config: TaskMoELoraConfig,
    ) -> None:
        super().__init__()
        TaskMoELoraLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        self.together: tuple[Linear, ...] = ()
        """This layer and those that are expected to read the same tensor after it; empty if there are none, or it is not the first."""
        self.update_layer(adapter_name, r, lora_alpha, config)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """`W_0 x` plus the update of every active adapter (or of each row's own).

        Args:
            x: `(..., in)`, rows of the batch first.
            *args: Passed to the base layer.
            **kwargs: Likewise.

        Returns:
            `(..., out)`.
        """
        if self._disable_adapters or self.merged_adapters:
            if self._disable_adapters and self.merged_adapters:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        state = current_state()
        if state is not None:
            if state.memo is not None and not torch.compiler.is_compiling():
                prepared = state.memo.get(self) or self._prepare_decoding(x, state)
                if prepared.weights is not None and _one_token_a_row(x) and not args and not kwargs:
                    return self._decode(x, prepared)
            if state.adapter_names is not None:
                return self._forward_by_row(x, state, *args, **kwargs)
        active = self._active_here()
        if len(active) == 1 and not args and not kwargs:
            return self._forward_one(x, active[0], state)
        out = self.base_layer(x, *args, **kwargs)
        for adapter_name in active:
            out = self._add_update(x, out, adapter_name, state)
        return out

    def _prepare_decoding(self, x: torch.Tensor, state: TaskState) -> _Decoding:
        """Compute what the decoding steps of this generation share, or find that they must take the general way.

        The first forward of a generation, mostly the prompt's, takes it, and shows which layers read the same tensor.
        """
        memo = state.memo
        assert memo is not None
        readers = memo.get(_Readers)
        if readers is None:
            readers = memo[_Readers] = _Readers()
        if self not in readers.by_layer or not _one_token_a_row(x):
            readers.saw(self, x)
            return _GENERAL
        if not self._can_decode(x, state):
            memo[self] = _GENERAL
            return _GENERAL
        name, together = self._active_here()[0], [self]
        if not x.is_inference():
            together = [
                layer
                for layer in readers.by_layer[self]
                if layer not in memo
                and layer._can_decode(x, state)
                and layer._active_here() == [name]
                and layer.shapes[name] == self.shapes[name]
                and layer.taskmoe_lora_A[name].weight.device
                == self.taskmoe_lora_A[name].weight.device
                and layer.taskmoe_lora_A[name].weight.dtype
                == self.taskmoe_lora_A[name].weight.dtype
            ]
        parts = [
            (*layer._weights(name), layer._task_of(x, name, state)[0], layer.scaling[name])
            for layer in together
        ]
        weights = decoding_weights(
            parts, self.shapes[name], decoding_dtype(parts[0][0], x.shape[0])
        )
        for place, layer in enumerate(together):
            frozen = layer.base_layer if layer._frozen_linear(x, x.dtype) else None
            of_base = (None, None) if frozen is None else (frozen.weight, frozen.bias)
            memo[layer] = _Decoding(weights, place, *of_base)
        return memo[self]

    def _can_decode(self, x: torch.Tensor, state: TaskState) -> bool:
        """Whether the decoding steps of this generation may keep products, and compute without autograd."""
        active = self._active_here()
        return (
            len(active) == 1
            and state.adapter_names is None
            and state.recorder is None
            and state.token_tasks is None
            and not self.training
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled(x.device.type)
            and self.shapes[active[0]].top_k is None
            and self.taskmoe_lora_A[active[0]].weight.dtype in (x.dtype, torch.float32)
        )

    def _decode(self, x: torch.Tensor, prepared: _Decoding) -> torch.Tensor:
        """One token a row."""
        assert prepared.weights is not None
        x2 = x.reshape(-1, self.in_features)
        if prepared.base_weight is not None:
            out = F.linear(x2, prepared.base_weight, prepared.base_bias)
        else:
            out = (
                self.base_layer(x).reshape(x2.shape[0], -1).clone()
            )  # a hook or the layer may keep its own
        return decoding_step(x2, out, prepared.weights, prepared.place, x).unsqueeze(1)

    def _forward_one(
        self, x: torch.Tensor, adapter_name: str, state: TaskState | None
    ) -> torch.Tensor:
        """One adapter, no other arguments: the fast cases."""
        if torch.compiler.is_compiling() or not self._frozen_linear(
            x, self._dtype(x, adapter_name)
        ):
            return self._add_update(x, self.base_layer(x), adapter_name, state)
        ahead = made_ahead()
        made = ahead.get(self)
        if made is not None and made.is_of(x) and made.out.dtype == self._dtype(x, adapter_name):
            del ahead[self]
            return made.out
        task, token_tasks = self._task_of(x, adapter_name, state)
        if self._needs_plain_form(adapter_name, state):
            return self._add_update(x, self.base_layer(x), adapter_name, state)
        together = [self]
        if not x.is_inference():
            group = (
                self.together
                if state is None or state.together is None
                else state.together.get(self, ())
            )
            together += [
                layer for layer in group[1:] if layer._computes_like(self, x, adapter_name)
            ]
        dtype = self._dtype(x, adapter_name)
        scalings = tuple(layer.scaling[adapter_name] for layer in together)
        with torch.autocast(x.device.type, enabled=False):
            tensors: list[torch.Tensor | None] = []
            for layer in together:
                base = cast(nn.Linear, layer.base_layer)
                weights = (weight.to(dtype) for weight in layer._weights(adapter_name))
                tensors += LayerTensors(None, base.weight, base.bias, *weights)
            outs = FusedUpdate.apply(
                x.to(dtype), task, token_tasks, self.shapes[adapter_name], scalings, self._dropout(adapter_name),
                *tensors,
            )  # fmt: skip
        if state is None and len(outs) > 1:  # no end of a forward clears what was not taken
            ahead.clear()
        for layer, out in zip(together[1:], outs[1:], strict=True):
            ahead[layer] = _MadeAhead(out, x, x._version, torch.is_grad_enabled())
        return outs[0]

    def _computes_like(self, other: Linear, x: torch.Tensor, adapter_name: str) -> bool:
        """Whether this layer's output for x may be computed together with the other's, before this layer is called.

        Its weights have to be there already: FSDP, ZeRO-3 and offloading bring them for the time of a module's call, by hooks, and
        leave other types, shapes or empty storages in between.
        """
        if (
            self._disable_adapters
            or self.merged_adapters
            or self._forward_pre_hooks
            or self._active_here() != [adapter_name]
            or self.shapes[adapter_name] != other.shapes[adapter_name]
            or self.in_features != other.in_features
            or self._dropout(adapter_name) != other._dropout(adapter_name)
            or not self._frozen_linear(x, self._dtype(x, adapter_name))
        ):
            return False
        parts = [getattr(self, name)[adapter_name] for name in self.adapter_layer_names]
        return all(type(part) is AdapterWeight for part in parts) and all(
            type(part.weight) in (nn.Parameter, torch.Tensor)
            and part.weight.shape == (part.out_features, part.in_features)
            and part.weight.device == x.device
            and part.weight.untyped_storage().nbytes() > 0
            for part in (self.base_layer, *parts)
        )

    def _add_update(
        self, x: torch.Tensor, out: torch.Tensor, adapter_name: str, state: TaskState | None
    ) -> torch.Tensor:
        """Add one adapter's update to the output of any base layer, in the adapter's dtype (or autocast's)."""
        task, token_tasks = self._task_of(x, adapter_name, state)
        weights = self._weights(adapter_name)
        dtype = weights[0].dtype  # FSDP may gather them in another one
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
        if torch.compiler.is_compiling() or self._needs_plain_form(adapter_name, state):
            mixed = self._plain_bottleneck(x.to(dtype), adapter_name, task, token_tasks, state)
            if out.dtype == mixed.dtype:  # one product that adds to the base output
                return torch.addmm(out.reshape(-1, out.shape[-1]), mixed, weights[1].t()).view(
                    out.shape
                )
            return (out + F.linear(mixed, weights[1]).view(out.shape)).to(out.dtype)
        with torch.autocast(x.device.type, enabled=False):
            tensors = LayerTensors(
                out.to(dtype), None, None, *(weight.to(dtype) for weight in weights)
            )
            (total,) = FusedUpdate.apply(
                x.to(dtype), task, token_tasks, self.shapes[adapter_name], (self.scaling[adapter_name],),
                self._dropout(adapter_name), *tensors,
            )  # fmt: skip
        return total.to(out.dtype)

    def _plain_bottleneck(
        self,
        x: torch.Tensor,
        adapter_name: str,
        task: torch.Tensor | None,
        token_tasks: torch.Tensor | None,
        state: TaskState | None,
    ) -> torch.Tensor:
        """The mixed and scaled bottleneck `(tokens, e*r)`, which B is then multiplied with, in the plain form.

        For torch.compile, which fuses it itself, the load-balancing loss and recorders.
        """
        shape = self.shapes[adapter_name]
        weight_a, _, router_weight = self._weights(adapter_name)
        x2 = x.reshape(-1, x.shape[-1])
        dropout = self._dropout(adapter_name)
        token = None
        if shape.reads_token and not dropout:  # one product for A and the router
            stacked = torch.cat((weight_a, router_weight[:, : x2.shape[1]]))
            h, token = F.linear(x2, stacked).split(
                (shape.num_experts * shape.r, shape.num_experts), dim=1
            )
        else:
            h = F.linear(F.dropout(x2, dropout), weight_a)
            if shape.reads_token:
                token = F.linear(x2, router_weight[:, : x2.shape[1]])
        per_task = None if task is None else task_logits(task, router_weight)
        logits = sum_logits(token, per_task, x2.shape[0], token_tasks)
        gates = gates_from_logits(logits, shape.top_k)
        mixed = mix_bottleneck(h, gates * self.scaling[adapter_name])
        if state is None:
            return mixed
        if state.recorder is not None:
            state.recorder(self, adapter_name, gates.detach(), token_tasks)
        coef = self.configs[adapter_name].router_aux_loss_coef
        if state.aux is not None and coef and self.training:
            loss = load_balancing_loss(logits, shape.top_k, state.aux.mask_of(logits.shape[0]))
            loss = loss * (coef / state.aux.num_layers[adapter_name])
            mixed = collect_aux_loss(mixed, loss, state.aux)
        return mixed

    def _forward_by_row(
        self, x: torch.Tensor, state: TaskState, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Each row of the batch with the adapter named for it; `"__base__"` for none."""
        out = self.base_layer(x, *args, **kwargs)
        names = repeat_names(state.adapter_names or (), x.shape[0])
        for adapter_name in sorted(set(names)):
            if adapter_name not in self.taskmoe_lora_A:
                continue
            rows = torch.tensor(
                [i for i, name in enumerate(names) if name == adapter_name], device=x.device
            )
            embeds = state.task_embeds
            if embeds is not None:
                embeds = embeds[(rows // (x.shape[0] // embeds.shape[0])).to(embeds.device)]
            of_rows = TaskState(task_embeds=embeds, recorder=state.recorder)
            out = out.index_copy(
                0, rows, self._add_update(x[rows], out[rows], adapter_name, of_rows)
            )
        return out

    def _task_of(
        self, x: torch.Tensor, adapter_name: str, state: TaskState | None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Task embeddings and, for packed rows, each token's task; checked against the rows of x."""
        task = self._task(adapter_name, state, x.device)
        if task is None:
            return None, None
        assert state is not None
        tokens = x.numel() // x.shape[-1]
        if state.token_tasks is not None:
            if state.token_tasks.shape[0] != tokens:
                raise ValueError(
                    f"This layer gets {tokens} tokens, but the packed batch has {state.token_tasks.shape[0]}, so its tokens cannot "
                    "be told apart by document. Leave the layer out with `exclude_modules`, or do not pack."
                )
            return task, state.token_tasks.to(x.device)
        rows, length = state.rows, state.length
        if (
            x.dim() <= 2
            and rows is not None
            and length is not None
            and x.shape[0] not in (rows, rows * length)
        ):
            raise ValueError(
                f"This layer gets {x.shape[0]} rows in a batch of {rows} x {length} tokens: a part of the tokens, as in a sparse "
                "mixture-of-experts block, so which example each belongs to is unknown here. Leave the layer out with "
                "`exclude_modules`."
            )
        if tokens % task.shape[0] or (x.dim() > 2 and x.shape[0] % task.shape[0]):
            raise ValueError(
                f"{task.shape[0]} task embeddings do not fit an input of shape {tuple(x.shape)}: every example needs exactly one. "
                "Pass one row of `task_embeds` per row of the batch."
            )
        return task, None

    def _needs_plain_form(self, adapter_name: str, state: TaskState | None) -> bool:
        """Whether the gates themselves are wanted: by a recorder or by the load-balancing loss."""
        if state is None:
            return False
        wants_loss = self.training and self.configs[adapter_name].router_aux_loss_coef > 0
        return state.recorder is not None or (state.aux is not None and wants_loss)

    def _dtype(self, x: torch.Tensor, adapter_name: str) -> torch.dtype:
        """What an adapter computes in: autocast's dtype, or its own."""
        if torch.is_autocast_enabled(x.device.type):
            return torch.get_autocast_dtype(x.device.type)
        return cast(AdapterWeight, self.taskmoe_lora_A[adapter_name]).weight.dtype

    def _frozen_linear(self, x: torch.Tensor, dtype: torch.dtype) -> bool:
        """Whether the base is a plain frozen `nn.Linear` of this dtype that nobody hooked, so that its product may be computed here.

        Under a dispatch mode it may not: selective checkpointing keeps the product itself, and the update would be
        accumulated into what it keeps.
        """
        base = self.base_layer
        if type(base) is not nn.Linear or "forward" in base.__dict__:
            return False
        weight = base.weight
        return (
            type(weight) in (nn.Parameter, torch.Tensor)
            and not weight.requires_grad
            and (
                base.bias is None
                or (not base.bias.requires_grad and base.bias.dtype == weight.dtype)
            )
            and weight.dtype == dtype
            and (
                x.dtype == weight.dtype
                or (x.dtype in _CAST and torch.is_autocast_enabled(x.device.type))
            )
            and not is_in_torch_dispatch_mode()
            and not (
                base._forward_hooks
                or base._forward_pre_hooks
                or base._backward_hooks
                or base._backward_pre_hooks
            )
        )

    def _dropout(self, adapter_name: str) -> float:
        return self.lora_dropout[adapter_name] if self.training else 0.0

    def extra_repr(self) -> str:
        """One line per adapter: what its shapes do not tell."""
        return "\n".join(
            f"{name}: {shape.num_experts} experts of rank {shape.r}, scaling {self.scaling[name]:g}, router reads "
            + self.configs[name].router_inputs
            + (f", top_k {shape.top_k}" if shape.top_k else "")
            for name, shape in self.shapes.items()
        )

    def __repr__(self) -> str:
        return "taskmoe_lora." + super().__repr__()


def repeat_names(names: Sequence[str], rows: int) -> list[str]:
    """Adapter names for `rows` rows, each name repeated in place where beams repeat the rows.

    Raises:
        ValueError: If the rows are no multiple of the names.
    """
    if rows % len(names):
        raise ValueError(
            "Length of `adapter_names` should be the same as the number of inputs, but got "
            f"{len(names)} and {rows} respectively."
        )
    return [name for name in names for _ in range(rows // len(names))]
