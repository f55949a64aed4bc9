"""Router and experts on one base layer: what an adapted layer computes when it is called."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .adapters import TaskMoELoraLayer
from .config import TaskMoELoraConfig
from .decoding import DecodingWeights, decoding_step, decoding_weights
from .experts import mix_bottleneck
from .fused import FusedUpdate
from .router import gates_from_logits, sum_logits, task_logits
from .task_scope import TaskState, current_state
from .token_rows import TokenLayout, rows_of_tokens, tasks_of_tokens

_CAST = (torch.float32, torch.bfloat16, torch.float16)  # what autocast casts before a product
_NO_STATE = TaskState()


class _Task(NamedTuple):
    """The task embeddings of a call `(n, task_dim)`, and each token's task where they differ."""

    embeds: torch.Tensor | None
    of_tokens: torch.Tensor | None


class _Decoding(NamedTuple):
    """What the decode steps of one generation take; None: the base layer is called."""

    weights: DecodingWeights
    base_weight: torch.Tensor | None
    base_bias: torch.Tensor | None


class Linear(nn.Module, TaskMoELoraLayer):
    """An adapted linear layer.

    Args:
        base_layer: The layer to adapt, or a tuner layer around it.
        adapter_name: Name of the first adapter.
        r: See `TaskMoELoraLayer.update_layer`.
        lora_alpha: Likewise.
        config: Likewise.
        layout: What is known of the tokens it is given.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        r: int,
        lora_alpha: float,
        config: TaskMoELoraConfig,
        layout: TokenLayout | None = None,
    ) -> None:
        super().__init__()
        TaskMoELoraLayer.__init__(self, base_layer, layout)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha, config)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """`W_0 x` plus the update of every active adapter, or of each row's own.

        Args:
            x: `(..., in)`.
            *args: Passed to the base layer.
            **kwargs: Likewise.

        Returns:
            `(..., out)`.
        """
        if self._disable_adapters or self.merged_adapters:
            if self._disable_adapters and self.merged_adapters:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        state = current_state() or _NO_STATE
        if state.adapter_names is not None:
            return self._forward_by_row(x, state, *args, **kwargs)
        active = [name for name in self.active_here() if self._applies(name, state)]
        if len(active) == 1 and not args and not kwargs:
            if state.decoding is not None and not torch.compiler.is_compiling():
                out = self._decode(x, active[0], state)
                if out is not None:
                    return out
            base = self._frozen_base(x, active[0])
            if base is not None and not self._wants_gates(active[0], state):
                task = self._task(x, active[0], state)
                return self._fused(x, None, base, active[0], task)
        out = self.base_layer(x, *args, **kwargs)
        for adapter_name in active:
            task = self._task(x, adapter_name, state)
            out = self._add_update(x, out, adapter_name, state, task)
        return out

    def _applies(self, adapter_name: str, state: TaskState) -> bool:
        """Whether an adapter acts here: a task says nothing about positions, which no row owns."""
        return not (state.positions and self.shapes[adapter_name].reads_task)

    def _task(self, x: torch.Tensor, adapter_name: str, state: TaskState) -> _Task:
        """The task embeddings for x, checked against its rows."""
        embeds = self.task_of(adapter_name, state, x.device)
        if embeds is None:
            return _Task(None, None)
        of_tokens = tasks_of_tokens(x.shape, embeds.shape[0], state, self.layout)
        return _Task(embeds, None if of_tokens is None else of_tokens.to(x.device))

    def _decode(self, x: torch.Tensor, adapter_name: str, state: TaskState) -> torch.Tensor | None:
        """A decode step of one token a row, or None where the general way must be taken."""
        if x.dim() != 3 or x.shape[1] != 1:
            return None
        assert state.decoding is not None
        key = (self, adapter_name, x.shape[0])
        if key not in state.decoding:
            state.decoding[key] = self._prepare_decoding(x, adapter_name, state)
        prepared: _Decoding | None = state.decoding[key]
        if prepared is None:
            return None
        x2 = x.reshape(-1, self.in_features)
        if prepared.base_weight is not None:
            out = F.linear(x2, prepared.base_weight, prepared.base_bias)
        else:
            out = self.base_layer(x).reshape(x2.shape[0], -1).clone()  # a hook may keep its own
        return decoding_step(x2, out, prepared.weights).unsqueeze(1)

    def _prepare_decoding(
        self, x: torch.Tensor, adapter_name: str, state: TaskState
    ) -> _Decoding | None:
        """What the decode steps of this generation share; None where they cannot be taken."""
        shape = self.shapes[adapter_name]
        if (
            self.training
            or torch.is_grad_enabled()
            or torch.is_autocast_enabled(x.device.type)
            or state.recorder is not None
            or shape.top_k is not None
        ):
            return None
        weights, task = self.weights_of(adapter_name), self._task(x, adapter_name, state)
        if task.of_tokens is not None or weights[0].dtype not in (x.dtype, torch.float32):
            return None
        scaling = self.scaling[adapter_name]
        prepared = decoding_weights(*weights, task.embeds, x.shape[0], scaling, shape)
        base = self._frozen_base(x, adapter_name, x.dtype)
        return _Decoding(prepared, *((None, None) if base is None else (base.weight, base.bias)))

    def _fused(
        self,
        x: torch.Tensor,
        out: torch.Tensor | None,
        base: nn.Linear | None,
        adapter_name: str,
        task: _Task,
    ) -> torch.Tensor:
        """One adapter's update, added to a given output or to that of a plain frozen base."""
        weights = self.weights_of(adapter_name)
        dtype = self._dtype(x, weights[0])
        with torch.autocast(x.device.type, enabled=False):
            return FusedUpdate.apply(
                x.to(dtype),
                None if out is None else out.to(dtype),
                None if base is None else base.weight,
                None if base is None else base.bias,
                *(weight.to(dtype) for weight in weights),
                *task,
                self.shapes[adapter_name],
                self.scaling[adapter_name],
                self._dropout(adapter_name),
            )

    def _add_update(
        self,
        x: torch.Tensor,
        out: torch.Tensor,
        adapter_name: str,
        state: TaskState,
        task: _Task,
        token_rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Add one adapter's update to the output of any base layer."""
        if not (torch.compiler.is_compiling() or self._wants_gates(adapter_name, state)):
            return self._fused(x, out, None, adapter_name, task).to(out.dtype)
        weights = self.weights_of(adapter_name)
        dtype = self._dtype(x, weights[0])
        weight_a, weight_b, router_weight = (weight.to(dtype) for weight in weights)
        h, logits = self._plain(x.to(dtype), adapter_name, weight_a, router_weight, task)
        gates = self._gates(x, logits, adapter_name, state, token_rows)
        mixed = mix_bottleneck(h, gates * self.scaling[adapter_name])
        if out.dtype == mixed.dtype:  # one product that adds to the base output
            out2 = out.reshape(-1, out.shape[-1])
            return torch.addmm(out2, mixed, weight_b.t()).view(out.shape)
        return (out + F.linear(mixed, weight_b).view(out.shape)).to(out.dtype)

    def _plain(
        self,
        x: torch.Tensor,
        adapter_name: str,
        weight_a: torch.Tensor,
        router_weight: torch.Tensor,
        task: _Task,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Bottleneck `(tokens, e*r)` and logits `(tokens, e)` in the plain form of `router.py`.

        For torch.compile, which fuses it itself, and where the gates themselves are wanted.
        """
        shape, x2 = self.shapes[adapter_name], x.reshape(-1, x.shape[-1])
        dropout, token = self._dropout(adapter_name), None
        read = router_weight[:, : x2.shape[1]]
        if shape.reads_token and not dropout:  # one product for A and the router
            stacked = torch.cat((weight_a, read))
            h, token = F.linear(x2, stacked).split((weight_a.shape[0], shape.num_experts), dim=1)
        else:
            h = F.linear(F.dropout(x2, dropout), weight_a)
            token = F.linear(x2, read) if shape.reads_token else None
        per_task = None if task.embeds is None else task_logits(task.embeds, router_weight)
        return h, sum_logits(token, per_task, x2.shape[0], task.of_tokens)

    def _gates(
        self,
        x: torch.Tensor,
        logits: torch.Tensor,
        adapter_name: str,
        state: TaskState,
        token_rows: torch.Tensor | None,
    ) -> torch.Tensor:
        """The gates; shown to the recorder, and their load-balancing loss collected."""
        top_k = self.shapes[adapter_name].top_k
        if state.aux is not None and self._has_aux_loss(adapter_name):
            state.aux.collect(logits, top_k, adapter_name)
        gates = gates_from_logits(logits, top_k)
        if state.recorder is not None:
            if token_rows is None:
                token_rows = rows_of_tokens(x.shape, state, self.layout)
            state.recorder(self, adapter_name, gates.detach(), token_rows)
        return gates

    def _forward_by_row(
        self, x: torch.Tensor, state: TaskState, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Each row of the batch with the adapter named for it; `"__base__"` for none."""
        out = self.base_layer(x, *args, **kwargs)
        names = repeat_names(state.adapter_names or (), state.rows or x.shape[0])
        x2, out2 = x.reshape(-1, x.shape[-1]), out.reshape(-1, out.shape[-1])
        owners = tasks_of_tokens(x.shape, len(names), state, self.layout)
        if owners is None:
            owners = torch.arange(len(names)).repeat_interleave(x2.shape[0] // len(names))
        for adapter_name in sorted(set(names)):
            if adapter_name not in self.taskmoe_lora_A or not self._applies(adapter_name, state):
                continue
            named = torch.tensor([name == adapter_name for name in names])
            tokens = named[owners].nonzero().squeeze(1).to(x.device)
            task = self._task(x, adapter_name, state)
            if task.embeds is not None:
                of_all = task.of_tokens
                if of_all is None:
                    of_all = torch.arange(task.embeds.shape[0], device=x.device)
                    of_all = of_all.repeat_interleave(x2.shape[0] // task.embeds.shape[0])
                task = _Task(task.embeds, of_all[tokens])
            update = self._add_update(
                x2[tokens], out2[tokens], adapter_name, state, task, owners.to(x.device)[tokens]
            )
            out2 = out2.index_copy(0, tokens, update)
        return out2.view(out.shape)

    def _has_aux_loss(self, adapter_name: str) -> bool:
        return self.training and self.configs[adapter_name].router_aux_loss_coef > 0

    def _wants_gates(self, adapter_name: str, state: TaskState) -> bool:
        """Whether a recorder or the load-balancing loss takes the gates themselves."""
        wants_loss = state.aux is not None and self._has_aux_loss(adapter_name)
        return state.recorder is not None or wants_loss

    def _dtype(self, x: torch.Tensor, weight: torch.Tensor) -> torch.dtype:
        """What an adapter computes in: autocast's dtype, or its own; the input's if that stays."""
        if torch.is_autocast_enabled(x.device.type):
            return torch.get_autocast_dtype(x.device.type)
        return weight.dtype if self.cast_input_dtype_enabled else x.dtype

    def _frozen_base(
        self, x: torch.Tensor, adapter_name: str, dtype: torch.dtype | None = None
    ) -> nn.Linear | None:
        """The base, if it is a plain frozen `nn.Linear` that nobody hooked, of the adapter's dtype.

        Its product may then be computed here. Under a dispatch mode it may not: selective
        checkpointing keeps the product itself, and the update would be added to what it keeps.
        """
        base = self.base_layer
        if type(base) is not nn.Linear or "forward" in base.__dict__:
            return None
        weight, bias = base.weight, base.bias
        if dtype is None:
            adapter_weight = cast(nn.Linear, self.taskmoe_lora_A[adapter_name]).weight
            dtype = self._dtype(x, adapter_weight)
        cast_by_autocast = x.dtype in _CAST and torch.is_autocast_enabled(x.device.type)
        hooks = (
            base._forward_hooks, base._forward_pre_hooks,
            base._backward_hooks, base._backward_pre_hooks,
        )  # fmt: skip
        plain = (
            type(weight) in (nn.Parameter, torch.Tensor)
            and not weight.requires_grad
            and (bias is None or (not bias.requires_grad and bias.dtype == weight.dtype))
            and weight.dtype == dtype
            and (x.dtype == dtype or cast_by_autocast)
            and not torch.compiler.is_compiling()
            and not is_in_torch_dispatch_mode()
            and not any(hooks)
        )
        return base if plain else None

    def _dropout(self, adapter_name: str) -> float:
        return self.lora_dropout[adapter_name] if self.training else 0.0

    def _replicate_for_data_parallel(self) -> Any:
        """Refuse the copies of `nn.DataParallel`: wrapped methods stay those of the original."""
        raise RuntimeError(
            "`nn.DataParallel` cannot copy a model with Task-Aware MoELoRA adapters. Use "
            "`DistributedDataParallel` (`torchrun`), or one device (`CUDA_VISIBLE_DEVICES=0`)."
        )

    def extra_repr(self) -> str:
        """One line an adapter: what its shapes do not tell."""
        return "\n".join(
            f"{name}: {shape.num_experts} experts of rank {shape.r}, "
            f"scaling {self.scaling[name]:g}, router reads {self.configs[name].router_inputs}"
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
