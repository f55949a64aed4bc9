"""The tuner: PEFT's contract for Task-Aware MoELoRA."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
    onload_layer,
)
from peft.utils.other import AuxiliaryTrainingWrapper, get_pattern_key
from peft.utils.warning import PeftWarning
from torch import nn
from transformers.pytorch_utils import Conv1D

from .adapters import TaskMoELoraLayer
from .base_layers import (
    check_called,
    layout_of,
    only_for_positions,
    packed_linears,
    tower_of,
)
from .conditioning import install_conditioning, remove_conditioning, wrap_outermost
from .config import TaskMoELoraConfig
from .encoder_config import TaskEncoderConfig
from .encoder_loading import task_dim_of
from .layer import Linear, repeat_names
from .peft_type import PREFIX
from .task_scope import TaskState, current_state, user_scope

_TRAINED_HEADS = {"TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
_DEFAULT_TASK_DIM = 768  # of CodeT5-base


class TaskMoELoraModel(BaseTuner):
    """Task-Aware MoELoRA on a model: what `get_peft_model(model, TaskMoELoraConfig(...))` builds.

    Args:
        model: The model to adapt, in place.
        config: A `TaskMoELoraConfig`.
        adapter_name: Name of the adapter.
        low_cpu_mem_usage: Create empty adapter weights on the meta device, to be loaded.

    Source: the method of Guo, Sanz-Cruzado, McCreadie, ECAI 2025, DOI 10.3233/FAIA251308.
    """

    prefix: str = PREFIX
    tuner_layer_cls = TaskMoELoraLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012  # PEFT's name

    def _prepare_adapter_config(
        self, peft_config: TaskMoELoraConfig, model_config: dict[str, Any]
    ) -> TaskMoELoraConfig:
        if peft_config.target_modules is None:
            peft_config.target_modules = "all-linear"
        if peft_config.task_dim is None:
            named = peft_config.task_encoder
            if isinstance(named, TaskEncoderConfig) and peft_config.reads_task:
                peft_config.task_dim = task_dim_of(named)
            else:
                peft_config.task_dim = _DEFAULT_TASK_DIM
        return peft_config

    def _prepare_model(self, peft_config: TaskMoELoraConfig, model: nn.Module) -> None:
        """Let `"all-linear"` mean quantised layers of classes of their own as well."""
        packed = packed_linears(model)
        if packed and str(peft_config.target_modules).lower() == "all-linear":
            peft_config = _maybe_include_all_linear_layers(peft_config, model)
            packed |= set(peft_config.target_modules or ())
            peft_config.target_modules = packed  # type: ignore[assignment]

    @staticmethod
    def _check_target_module_exists(peft_config: TaskMoELoraConfig, key: str) -> Any:
        """As every tuner matches, with two gaps of `"all-linear"` closed.

        It leaves out the heads that PEFT trains in full for every task type, not for `SEQ_CLS`
        alone, and it works with `layers_to_transform`.
        """
        name = key.rpartition(".")[2]
        if name in _TRAINED_HEADS.get(peft_config.task_type or "", ()):
            return False
        if peft_config.layers_to_transform is not None and key in (
            peft_config.target_modules or ()
        ):
            # PEFT counts layers for names that end a path, not for whole paths.
            peft_config = copy(peft_config)
            peft_config.target_modules = {name}  # type: ignore[assignment]
        return BaseTuner._check_target_module_exists(peft_config, key)

    def _create_and_replace(
        self,
        peft_config: TaskMoELoraConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        check_called(target_name, base, parent)
        if peft_config.reads_task and self._sees_no_text(target_name, parent, current_key):
            return
        rank_key = get_pattern_key(list(peft_config.rank_pattern), current_key)
        alpha_key = get_pattern_key(list(peft_config.alpha_pattern), current_key)
        r = peft_config.rank_pattern.get(rank_key, peft_config.r)
        lora_alpha = peft_config.alpha_pattern.get(alpha_key, peft_config.lora_alpha)
        is_conv1d = isinstance(base, Conv1D)
        if is_conv1d or isinstance(base, nn.Linear):
            peft_config.fan_in_fan_out = is_conv1d
        if isinstance(target, TaskMoELoraLayer):
            target.update_layer(adapter_name, r, lora_alpha, peft_config)
            return
        layout = layout_of(current_key, self.model)
        layer = Linear(target, adapter_name, r, lora_alpha, peft_config, layout)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _sees_no_text(self, target_name: str, parent: nn.Module, key: str) -> bool:
        """Whether a layer is left out: what it is given belongs to no row of the text."""
        if only_for_positions(target_name, parent):
            return True
        tower = tower_of(key, self.model)
        if tower not in (None, *self._left_out):
            self._left_out.append(str(tower))
        return tower is not None

    def inject_adapter(self, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        """Create the adapted layers, as every tuner does, and what comes with them."""
        self._left_out: list[str] = []
        super().inject_adapter(model, *args, **kwargs)
        if self._left_out:
            warnings.warn(
                f"The layers of `{'`, `'.join(self._left_out)}` are not adapted: they see a row "
                'per image, but a task belongs to a text. `router_inputs="token"` adapts them.',
                stacklevel=2,
            )
        install_conditioning(model)

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Unsupported: raises `NotImplementedError`."""
        raise NotImplementedError(
            "Adapters with a router cannot be combined by weights: each routes its own experts. "
            "Activate them together (`model.base_model.set_adapter([...])`), or combine what "
            "`to_lora` makes of each."
        )

    def merge_adapter(self, adapter_names: Any = None, safe_merge: bool = False) -> None:
        """Merge in place, as every tuner does; if a layer refuses, none is changed."""
        self._check_merge(adapter_names, safe_merge)
        super().merge_adapter(adapter_names, safe_merge)

    def _unload_and_optionally_merge(self, merge: bool = True, **kwargs: Any) -> nn.Module:
        if merge:
            self._check_merge(kwargs.get("adapter_names"), kwargs.get("safe_merge", False))
        model = super()._unload_and_optionally_merge(merge, **kwargs)
        remove_conditioning(model)
        return model

    def _check_merge(self, adapter_names: list[str] | None, safe_merge: bool) -> None:
        """Let every layer refuse before any is changed."""
        for layer in self.model.modules():
            if isinstance(layer, TaskMoELoraLayer):
                with onload_layer(layer):
                    layer.merged_weight(safe_merge, adapter_names)

    @classmethod
    def _get_adapter_state_dict(cls, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        """What PEFT saves of an adapter; warns of parts of weights, as PEFT does for LoRA alone."""
        found = super()._get_adapter_state_dict(*args, **kwargs)
        parts = [n for n, w in found.items() if PREFIX in n and (w.dim() < 2 or w.numel() == 0)]
        if parts:
            warnings.warn(
                f"{len(parts)} adapter weights are parts of sharded ones: {', '.join(parts[:3])}. "
                "What is saved does not load; save inside `deepspeed.zero.GatheredParameters` or "
                "`FullyShardedDataParallel.summon_full_params`, or by the Trainer.",
                PeftWarning,
                stacklevel=2,
            )
        return found

    def _replace_module(self, parent: Any, child_name: str, new_module: Any, child: Any) -> None:
        if isinstance(new_module, TaskMoELoraLayer):
            super()._replace_module(parent, child_name, new_module, child)
        else:  # unloading: there is no weight to hand over, and a trained head may have none
            setattr(parent, child_name, new_module)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT calls this around `forward` and `generate`: here `adapter_names` enter the scope."""
        wrap_outermost(self.model)
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        self._check_adapter_names(names)
        outer = current_state() or TaskState()
        state = TaskState(
            task_embeds=outer.task_embeds, adapter_names=list(names), recorder=outer.recorder
        )
        pass_names = partial(_pass_adapter_names, names=list(names))
        handles = [
            module.register_forward_pre_hook(pass_names, with_kwargs=True)
            for module in self.model.modules()
            if isinstance(module, AuxiliaryTrainingWrapper)
        ]
        try:
            with user_scope(state):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _check_adapter_names(self, names: Sequence[str]) -> None:
        if self.training:
            raise ValueError(
                "Cannot pass `adapter_names` when the model is in training mode. "
                "Call `model.eval()` first."
            )
        known = set(self.peft_config)
        unknown = sorted(set(names) - known - {"__base__"})
        if unknown:
            raise ValueError(
                f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}. "
                f'This model has {", ".join(sorted(known))}, and "__base__" for none.'
            )
        if any(m.merged for m in self.model.modules() if isinstance(m, TaskMoELoraLayer)):
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call "
                "`unmerge_adapter` first."
            )


def _pass_adapter_names(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], names: list[str]
) -> Any:
    """Hand each row's adapter to a module that is saved with the adapters."""
    values = (*args, *kwargs.values())
    rows = next(value.shape[0] for value in values if isinstance(value, torch.Tensor))
    kwargs["adapter_names"] = repeat_names(names, rows)
    return args, kwargs
