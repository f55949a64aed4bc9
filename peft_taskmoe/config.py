"""The configuration of Task-Aware MoELoRA: its fields and their checks."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from reprlib import repr as shown
from typing import Any, Literal

from peft import PeftConfig

from .config_checks import (
    check_choice,
    check_count,
    check_indices,
    check_names,
    check_number,
    check_pattern,
    check_regex,
    check_tokens,
)
from .encoder_config import TaskEncoderConfig
from .model_card import write_card
from .peft_type import TASKMOE_LORA

ROUTER_INPUTS = ("token+task", "token", "task")
TASK_NORMS = ("matched", "rms", "none")


@dataclass
class TaskMoELoraConfig(PeftConfig):
    r"""Configuration of Task-Aware MoELoRA (`peft_type="TASKMOE_LORA"`).

    Every adapted linear layer `W_0` gets `num_experts` LoRA experts of rank `r` and its own router:

        g_t = softmax(W_r [x_t ; e])                              (`num_experts` gates, float32)
        y_t = W_0 x_t + s * sum_i g_{t,i} B_i A_i dropout(x_t)    s = `lora_alpha` / `r`

    with `x_t` the input of that layer and `e` the embedding of the task of the token's example.
    Source: Guo, Sanz-Cruzado, McCreadie, "Selecting the Right Experts", ECAI 2025,
    DOI 10.3233/FAIA251308.

    Args:
        num_experts: Number of experts `E` per adapted layer.
        r: Rank of each expert. The whole adapter has rank `num_experts * r`.
        lora_alpha: Numerator of the scale `s`. Soft gates average `1 / num_experts`, so the mixture
            acts at about `lora_alpha / (r * num_experts)`: 1.0 for the defaults.
        lora_dropout: Probability of zeroing an input feature of the experts; the router sees the
            input undropped.
        router_inputs: What the router reads: `"token+task"`, `"token"` (no task embedding needed)
            or `"task"` (all tokens of an example share their gates; only this kind merges
            exactly).
        top_k: If given, only the `top_k` largest gates of a token are kept, renormalised to sum to
            1.
        router_aux_loss_coef: Weight of the load-balancing loss `E * sum_i f_i P_i` (mean over
            adapted layers) that is added to the model's loss in training. 0.0 turns it off.
        task_dim: Dimension of the task embedding. None: that of `task_encoder`, read from its
            config when the layers are made; 768 (CodeT5-base) where none is named.
        task_norm: Scale at which the router reads the task embedding. `"matched"`: the norm that
            the layer's own input typically has, `0.25 sqrt(in)`, so that encoders of any scale
            start out with about the token's say; `"rms"`: divided by its root mean square;
            `"none"`: the paper's raw vector.
        task_encoder: The frozen encoder of the task texts: a Hub id or folder, a
            `TaskEncoderConfig` or its dict. It is loaded when a router first needs a task and none
            was given. The config travels in `adapter_config.json`, the weights never do.
        target_modules: Names (suffixes), a regex, or `"all-linear"`: every linear layer but the
            output head.
        exclude_modules: Names or a regex of modules not to adapt.
        layers_to_transform: Indices of the layers to adapt, if not all of them.
        layers_pattern: Name of the list of layers that `layers_to_transform` counts in.
        rank_pattern: Ranks that differ from `r`: `{module name or regex: rank}`.
        alpha_pattern: Alphas that differ from `lora_alpha`: `{module name or regex: alpha}`.
        modules_to_save: Modules trained in full and saved with the adapter.
        trainable_token_indices: Token ids of the input embedding to train as well.
        bias: Which biases of the base model to train: `"none"`, `"all"` or `"taskmoe_lora_only"`.
        init_weights: True starts with B = 0, so that a fresh adapter changes nothing. False also
            draws B at random (for tests).
        use_rslora: Scale by `lora_alpha / sqrt(r)` instead.
        fan_in_fan_out: Whether the base weight is stored (in, out), as in transformers' `Conv1D`.
    """

    num_experts: int = field(
        default=8, metadata={"help": "Number of LoRA experts per adapted layer."}
    )
    r: int = field(default=4, metadata={"help": "Rank of each expert."})
    lora_alpha: float = field(
        default=32, metadata={"help": "The experts are scaled by lora_alpha / r."}
    )
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout on the experts' input."})
    router_inputs: Literal["token+task", "token", "task"] = field(
        default="token+task",
        metadata={"help": "What the router reads: 'token+task', 'token' or 'task'."},
    )
    top_k: int | None = field(
        default=None, metadata={"help": "Keep only the top_k gates of a token."}
    )
    router_aux_loss_coef: float = field(
        default=0.0, metadata={"help": "Weight of the load-balancing loss."}
    )
    task_dim: int | None = field(
        default=None, metadata={"help": "Dimension of the task embedding; None: the encoder's."}
    )
    task_norm: Literal["matched", "rms", "none"] = field(
        default="matched",
        metadata={"help": "Scale of the task embedding at the router: 'matched', 'rms' or 'none'."},
    )
    task_encoder: TaskEncoderConfig | dict[str, Any] | str | None = field(
        default=None, metadata={"help": "The frozen encoder of the task texts."}
    )
    target_modules: list[str] | str | None = field(
        default="all-linear", metadata={"help": "Module names, a regex, or 'all-linear'."}
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Module names or a regex not to adapt."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the layers to adapt."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None,
        metadata={"help": "Name of the layer list that layers_to_transform counts in."},
    )
    rank_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "Module name or regex -> rank."}
    )
    alpha_pattern: dict[str, float] = field(
        default_factory=dict, metadata={"help": "Module name or regex -> lora_alpha."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules trained in full and saved with the adapter."}
    )
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Token ids of the input embedding to train as well."}
    )
    bias: Literal["none", "all", "taskmoe_lora_only"] = field(
        default="none", metadata={"help": "Biases to train: 'none', 'all' or 'taskmoe_lora_only'."}
    )
    init_weights: bool = field(
        default=True, metadata={"help": "True: B = 0, a fresh adapter changes nothing."}
    )
    use_rslora: bool = field(default=False, metadata={"help": "Scale by lora_alpha / sqrt(r)."})
    fan_in_fan_out: bool = field(
        default=False, metadata={"help": "Whether the base weight is stored (in, out)."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = TASKMOE_LORA
        for name in ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save"):
            check_names(name, getattr(self, name), one=name != "modules_to_save")
        for name in ("target_modules", "exclude_modules"):  # as PEFT's methods keep them
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        if self.task_encoder is not None:
            self.task_encoder = TaskEncoderConfig.of(self.task_encoder)
        self._check()

    @property
    def reads_token(self) -> bool:
        """Whether the router reads the token's hidden state."""
        return "token" in self.router_inputs

    @property
    def reads_task(self) -> bool:
        """Whether the router reads the task embedding."""
        return "task" in self.router_inputs

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Save the config; where PEFT wrote a model card, write the method's instead.

        Args:
            save_directory: The folder of the adapter.
            **kwargs: PEFT's.
        """
        super().save_pretrained(save_directory, **kwargs)
        if (Path(save_directory) / "README.md").is_file():
            write_card(save_directory, self)

    def _check(self) -> None:
        """Raise `ValueError` naming field, value and what is allowed."""
        for name in ("base_model_name_or_path", "revision"):
            if not isinstance(getattr(self, name), str | PathLike | None):
                raise ValueError(f"`{name}` must be a string, got {shown(getattr(self, name))}.")
        for name in ("num_experts", "r"):
            check_count(name, getattr(self, name))
        if self.task_dim is not None:
            check_count("task_dim", self.task_dim)
        check_pattern("rank_pattern", self.rank_pattern, check_count)
        check_pattern("alpha_pattern", self.alpha_pattern, check_number)
        check_number("lora_alpha", self.lora_alpha)
        check_choice("router_inputs", self.router_inputs, ROUTER_INPUTS)
        check_choice("task_norm", self.task_norm, TASK_NORMS)
        check_choice("bias", self.bias, ("none", "all", "taskmoe_lora_only"))
        for name in ("init_weights", "use_rslora", "fan_in_fan_out", "inference_mode"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(
                    f"`{name}` must be true or false, got {shown(getattr(self, name))}."
                )
        check_number("lora_dropout", self.lora_dropout)
        if not 0.0 <= self.lora_dropout < 1.0:
            raise ValueError(
                f"`lora_dropout` must be at least 0 and below 1, got {shown(self.lora_dropout)}."
            )
        self._check_routing()
        self._check_targets()

    def _check_routing(self) -> None:
        check_number("router_aux_loss_coef", self.router_aux_loss_coef)
        if self.router_aux_loss_coef < 0:
            raise ValueError(
                "`router_aux_loss_coef` must not be negative, got "
                f"{shown(self.router_aux_loss_coef)}. 0.0 turns the load-balancing loss off."
            )
        if self.top_k is None:
            return
        check_count("top_k", self.top_k)
        if self.top_k > self.num_experts:
            raise ValueError(
                f"`top_k` must be at most `num_experts` = {self.num_experts}, got {self.top_k}. "
                "None keeps all gates."
            )
        if self.top_k == 1 and self.num_experts > 1 and not self.router_aux_loss_coef:
            warnings.warn(
                "With `top_k=1` the one gate that is kept always equals 1, so the loss gives the "
                "router no gradient. Pass `top_k=2` or more, or a `router_aux_loss_coef` above 0.",
                stacklevel=5,
            )

    def _check_targets(self) -> None:
        targets = self.target_modules
        check_indices("layers_to_transform", self.layers_to_transform)
        check_tokens("trainable_token_indices", self.trainable_token_indices)
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), str):
                check_regex(name, getattr(self, name))
        patterns = self.layers_pattern or ()
        for pattern in (patterns,) if isinstance(patterns, str) else patterns:
            check_regex("layers_pattern", pattern)
        for name in self.modules_to_save or ():  # PEFT reads them as expressions
            check_regex("modules_to_save", name)
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                "`layers_pattern` has no effect without `layers_to_transform`. Pass "
                "`layers_to_transform=[...]` as well, or leave `layers_pattern` out."
            )
        is_regex = isinstance(targets, str) and targets.lower() != "all-linear"
        if self.layers_to_transform is not None and is_regex:
            raise ValueError(
                f"`layers_to_transform` does not work with the regex `target_modules={targets!r}`. "
                'Pass `target_modules="all-linear"` or a list of names.'
            )
