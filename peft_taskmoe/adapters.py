"""The adapters of one layer as PEFT sees them: parameters by name, scaling, merging."""

from __future__ import annotations

import math
import warnings
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn
from transformers.pytorch_utils import Conv1D

from .adapter_weight import AdapterWeight, read_weight
from .base_layers import linear_features
from .config import TaskMoELoraConfig
from .fused import ExpertShape
from .peft_type import PREFIX
from .router import gates_from_logits, task_logits
from .task_scope import TaskState, current_state
from .token_rows import TokenLayout

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_MOST_TIMES_LAYER = 4
_MOST_WEIGHTS = 10_000_000  # of a layer, however small it is


class TaskMoELoraLayer(BaseTunerLayer):
    """Adapters of one layer by name: A `(e*r, in)`, B `(out, e*r)`, router `(e, in + task_dim)`."""

    adapter_layer_names = (f"{PREFIX}A", f"{PREFIX}B", f"{PREFIX}router")
    other_param_names = (
        "r", "lora_alpha", "scaling", "lora_dropout", "configs", "shapes",
    )  # fmt: skip
    cast_input_dtype_enabled = True  # PEFT's `disable_input_dtype_casting` sets it

    def __init__(self, base_layer: nn.Module, layout: TokenLayout | None = None) -> None:
        self.base_layer = base_layer
        self.layout = layout or TokenLayout()
        self.taskmoe_lora_A = nn.ModuleDict()
        self.taskmoe_lora_B = nn.ModuleDict()
        self.taskmoe_lora_router = nn.ModuleDict()
        self.r: dict[str, int] = {}
        self.lora_alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.lora_dropout: dict[str, float] = {}
        self.configs: dict[str, TaskMoELoraConfig] = {}
        self.shapes: dict[str, ExpertShape] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._deltas: dict[str, torch.Tensor] = {}
        self.in_features, self.out_features = linear_features(self.get_base_layer())

    def update_layer(
        self, adapter_name: str, r: int, lora_alpha: float, config: TaskMoELoraConfig
    ) -> None:
        """Add or replace an adapter.

        Args:
            adapter_name: Its name.
            r: Rank of each expert here (`rank_pattern` may make it differ from `config.r`).
            lora_alpha: Alpha here.
            config: Everything else; its `task_dim` is set.
        """
        assert config.task_dim is not None
        shape = ExpertShape(
            config.num_experts, r, config.top_k, config.reads_token, config.reads_task
        )
        router_in = self.in_features * shape.reads_token + config.task_dim * shape.reads_task
        rank = config.num_experts * r
        _check_size(self.in_features, self.out_features, rank, router_in * config.num_experts)
        self.r[adapter_name] = r
        self.lora_alpha[adapter_name] = lora_alpha
        self.lora_dropout[adapter_name] = config.lora_dropout
        self.configs[adapter_name] = config
        self.shapes[adapter_name] = shape
        self.set_scale(adapter_name, 1.0)
        self.taskmoe_lora_A[adapter_name] = AdapterWeight(self.in_features, rank, bias=False)
        self.taskmoe_lora_B[adapter_name] = AdapterWeight(rank, self.out_features, bias=False)
        self.taskmoe_lora_router[adapter_name] = AdapterWeight(
            router_in, config.num_experts, bias=False
        )
        self.reset_parameters(adapter_name, config.init_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def reset_parameters(self, adapter_name: str, init_weights: bool) -> None:
        """Draw A and the router within `1 / sqrt(in)`, as `nn.Linear` does; set B to zero.

        Args:
            adapter_name: Which adapter.
            init_weights: If False, B is drawn too.
        """
        weights = [getattr(self, name)[adapter_name].weight for name in self.adapter_layer_names]
        for weight in weights:
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        if init_weights:
            nn.init.zeros_(weights[1])

    def active_here(self) -> list[str]:
        """The active adapters that this layer has."""
        names: Any = self.active_adapters
        return [name for name in names if name in self.taskmoe_lora_A]

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set `scaling` to `scale` times the config's, `lora_alpha / r` (`/ sqrt(r)` with rsLoRA).

        Like `LoraLayer.set_scale`: a layer without the adapter is left as it is.
        """
        if adapter in self.configs:
            self.scaling[adapter] = scale * self._config_scaling(adapter)

    def scale_of(self, adapter: str) -> float:
        """`scaling` as a multiple of the config's; 1 unless it was set."""
        own = self._config_scaling(adapter)
        return self.scaling[adapter] / own if own else 1.0  # an alpha of 0 stays 0

    def _config_scaling(self, adapter: str) -> float:
        r = self.r[adapter]
        divisor = math.sqrt(r) if self.configs[adapter].use_rslora else r
        return self.lora_alpha[adapter] / divisor

    def scale_layer(self, scale: float) -> None:
        """Multiply the `scaling` of the active adapters, like `LoraLayer.scale_layer`."""
        for adapter in self.active_here():
            self.scaling[adapter] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the `scaling` of the active adapters; None resets it to the config's."""
        for adapter in self.active_here():
            if scale is None:
                self.set_scale(adapter, 1.0)
            else:
                self.scaling[adapter] /= scale

    def get_delta_weight(self, adapter_name: str) -> torch.Tensor:
        """`s * sum_i g_i B_i A_i` for the task of the current `task_context`, like the base weight.

        Raises:
            ValueError: If no single weight equals the adapter, since the gates differ from token to
                token or the layer is given positions, which a task's update leaves out; or if there
                is not exactly one task in scope.
        """
        shape = self.shapes[adapter_name]
        if shape.reads_token:
            raise ValueError(
                f'Adapter "{adapter_name}" cannot be merged: its router reads the token '
                f'(`router_inputs="{self.configs[adapter_name].router_inputs}"`), so no single '
                "weight equals it. Keep it unmerged, or export a LoRA with `to_lora(model, ...)`."
            )
        if self.layout.given_positions:
            raise ValueError(
                f'Adapter "{adapter_name}" cannot be merged into `{self.layout.name}`: the layer '
                "also projects relative positions, which the adapter leaves alone and a merged "
                "weight would not. Keep it unmerged, or build it without these layers "
                "(`exclude_modules`)."
            )
        task = self.task_of(adapter_name, current_state() or TaskState())
        if task is None or task.shape[0] != 1:
            raise ValueError(
                f'Merging adapter "{adapter_name}" needs one task, but '
                f"{'no' if task is None else task.shape[0]} task embeddings are in scope. "
                "Merge inside `with task_context(encoder([prompt])):`."
            )
        weight_a, weight_b, router_weight = self.weights_of(adapter_name)
        gates = gates_from_logits(task_logits(task, router_weight), shape.top_k)
        gates = gates.repeat_interleave(shape.r, dim=-1)
        delta = (weight_b * gates.to(weight_b.dtype)) @ weight_a * self.scaling[adapter_name]
        base = self.get_base_layer()
        transposed = isinstance(base, Conv1D)
        if not isinstance(base, nn.Linear | Conv1D):
            transposed = self.configs[adapter_name].fan_in_fan_out
        return delta.T if transposed else delta

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapter of the current task to the base weight; `router_inputs="task"` only.

        Args:
            safe_merge: Check for values that are not finite first.
            adapter_names: Which adapters; None for the active ones.

        Raises:
            ValueError: See `get_delta_weight`; or if the base is quantised or, with `safe_merge`,
                the result is not finite. The layer is then unchanged.
        """
        deltas, merged = self.merged_weight(safe_merge, adapter_names)
        if deltas:
            self.get_base_layer().weight.data = merged
            self._deltas.update(deltas)
            self.merged_adapters.extend(deltas)

    def merged_weight(
        self, safe_merge: bool, adapter_names: list[str] | None
    ) -> tuple[dict[str, torch.Tensor], Any]:
        """What `merge` adds, by adapter, and the base weight with it; changes nothing."""
        names = check_adapters_to_merge(self, adapter_names)
        deltas = {n: self.get_delta_weight(n) for n in names if n in self.taskmoe_lora_A}
        base = self.get_base_layer()
        weight: Any = getattr(base, "weight", None)  # quantised layers may have another name for it
        if not deltas:
            return deltas, weight
        plain = weight is not None and type(weight.data) is torch.Tensor
        if not plain or weight.dtype not in _FLOATS:
            kind = weight.dtype if plain else type(base if weight is None else weight.data).__name__
            raise ValueError(
                f"The base weight is quantised ({kind}), and adding to it would round the "
                "adapter away. Keep the adapter unmerged, or load the base model unquantised."
            )
        merged = weight.data
        for adapter_name, delta in deltas.items():
            merged = merged + delta.to(weight.dtype)
            if safe_merge and not torch.isfinite(merged).all():
                raise ValueError(
                    f"NaNs detected in the merged weights. The adapter {adapter_name} seems to be "
                    "broken; the base weight was left as it was."
                )
        return deltas, merged

    def unmerge(self) -> None:
        """Take the merged adapters out of the base weight."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        while self.merged_adapters:
            delta = self._deltas.pop(self.merged_adapters.pop())
            weight = self.get_base_layer().weight
            weight.data = weight.data - delta.to(weight)

    def weights_of(self, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A, B and the router of an adapter, wherever they are."""
        parts = (self.taskmoe_lora_A, self.taskmoe_lora_B, self.taskmoe_lora_router)
        a, b, router = (read_weight(cast(nn.Linear, p[adapter_name]), adapter_name) for p in parts)
        return a, b, router

    def task_of(
        self, adapter_name: str, state: TaskState, device: torch.device | None = None
    ) -> torch.Tensor | None:
        """The task embeddings in scope at this router's scale; None if it does not read the task.

        Raises:
            ValueError: If there are none, or they have another dimension.
        """
        if not self.shapes[adapter_name].reads_task:
            return None
        config = self.configs[adapter_name]
        router = cast(nn.Linear, self.taskmoe_lora_router[adapter_name])
        task = state.normalized_embeds(
            adapter_name, config.task_norm, self.in_features, device or router.weight.device
        )
        if task is None:
            raise ValueError(missing_task_message(adapter_name))
        if task.shape[-1] != config.task_dim:
            raise ValueError(wrong_dimension_message(adapter_name, task.shape[-1], config.task_dim))
        return task


def wrong_dimension_message(adapter_name: str, found: int, task_dim: int | None) -> str:
    """The error for task embeddings of another encoder."""
    return (
        f"The task embeddings have {found} dimensions, but the router of adapter "
        f'"{adapter_name}" has `task_dim={task_dim}`. Use the encoder it was trained with.'
    )


def missing_task_message(adapter_name: str) -> str:
    """The error for a forward without a task."""
    return (
        f'This forward has no task embedding, which the router of adapter "{adapter_name}" reads. '
        "Pass task_embeds=..., or run inside `with task_context(task_embeds):`. Where prompts are "
        "`input_ids`, name a `task_encoder` in the config or call attach_task_encoder(model)."
    )


def _check_size(wide_in: int, wide_out: int, rank: int, router: int) -> None:
    """Refuse, before memory is taken, an adapter that is far larger than its layer."""
    weights = rank * (wide_in + wide_out) + router
    if weights > max(_MOST_WEIGHTS, _MOST_TIMES_LAYER * wide_in * wide_out):
        raise ValueError(
            f"`num_experts`, `r` and `task_dim` give {weights:,} weights beside a layer of "
            f"{wide_in} x {wide_out}: more than {_MOST_TIMES_LAYER} times as many as it has. "
            "Lower them."
        )
