"""The configuration of Task-Aware MoELoRA: its fields and their checks, nothing else.

It knows no torch, no layer and no model. `encoder.py` is read only for the type of `task_encoder`.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any, Literal

from peft import PeftConfig

from .encoder_config import TaskEncoderConfig
from .peft_type import TASKMOE_LORA

ROUTER_INPUTS = ("token+task", "token", "task")
TASK_NORMS = ("matched", "rms", "none")


@dataclass
class TaskMoELoraConfig(PeftConfig):
    r"""Configuration of Task-Aware MoELoRA (`peft_type="TASKMOE_LORA"`).

    Every adapted linear layer `W_0` gets `num_experts` LoRA experts of rank `r` and a router of its own:

        g_t = softmax(W_r [x_t ; e])                              (`num_experts` gates per token, float32)
        y_t = W_0 x_t + s * sum_i g_{t,i} B_i A_i dropout(x_t)    s = `lora_alpha` / `r`

    with `x_t` the input of that layer and `e` the embedding of the task (`TaskEncoder`) of the token's example.
    Source: Guo, Sanz-Cruzado, McCreadie, "Selecting the Right Experts", ECAI 2025, DOI 10.3233/FAIA251308.

    Args:
        num_experts: Number of experts `E` per adapted layer.
        r: Rank of each expert. The whole adapter has rank `num_experts * r`.
        lora_alpha: Numerator of the scale `s`. Soft gates average `1 / num_experts`, so the mixture as a whole acts at
            about `lora_alpha / (r * num_experts)`: 1.0 for the defaults.
        lora_dropout: Probability of zeroing an input feature of the experts; the router sees the input undropped.
            Layers that read the same tensor (q, k and v; gate and up) mostly share one draw.
        router_inputs: What the router reads: `"token+task"`, `"token"` (no task embedding needed) or `"task"`
            (all tokens of an example share their gates; only this kind merges exactly, see `to_lora`).
        top_k: If given, only the `top_k` largest gates of a token are kept, and renormalised to sum to 1.
        router_aux_loss_coef: Weight of the load-balancing loss `E * sum_i f_i P_i` (mean over adapted layers) that is
            added to the loss the model returns while it trains. 0.0 turns it off.
        task_dim: Dimension of the task embedding, 768 for CodeT5-base.
        task_norm: Scale at which the router reads the task embedding. `"matched"` gives it the norm that the layer's own input
            typically has, `0.25 sqrt(in)`, so that encoders of any scale start out with about the token's say; `"rms"` divides
            it by its root mean square; `"none"` is the paper's raw vector. Measured by `experiments/router_scale.py`.
        task_encoder: Which frozen encoder made the embeddings (a `TaskEncoderConfig` or its dict). It travels in
            `adapter_config.json`, its weights never do; `attach_task_encoder(model)` reads it.
        target_modules: Names (suffixes), a regex, or `"all-linear"`: every linear layer but the output head.
        exclude_modules: Names or a regex of modules not to adapt.
        layers_to_transform: Indices of the layers to adapt, if not all of them.
        layers_pattern: Name of the list of layers that `layers_to_transform` counts in.
        rank_pattern: Ranks that differ from `r`: `{module name or regex: rank}`.
        alpha_pattern: Alphas that differ from `lora_alpha`: `{module name or regex: alpha}`.
        modules_to_save: Modules trained in full and saved with the adapter.
        trainable_token_indices: Token ids of the input embedding to train as well.
        bias: Which biases of the base model to train: `"none"`, `"all"` or `"taskmoe_lora_only"`.
        init_weights: True starts with B = 0, so that a fresh adapter changes nothing. False also draws B at random
            (for tests).
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
    task_dim: int = field(default=768, metadata={"help": "Dimension of the task embedding."})
    task_norm: Literal["matched", "rms", "none"] = field(
        default="matched",
        metadata={"help": "Scale of the task embedding at the router: 'matched', 'rms' or 'none'."},
    )
    task_encoder: TaskEncoderConfig | dict[str, Any] | None = field(
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
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]  # as PEFT's methods keep it
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]
        if isinstance(self.task_encoder, dict):
            self.task_encoder = TaskEncoderConfig.from_dict(self.task_encoder)
        self._check()

    def _check(self) -> None:
        """Refuse values that cannot work, naming the field, what was found and what to write instead."""
        if not isinstance(self.task_encoder, TaskEncoderConfig | None):
            raise ValueError(
                f"`task_encoder` is {self.task_encoder!r}, but it describes the encoder and its settings. "
                'Pass e.g. `TaskEncoderConfig(name_or_path="Salesforce/codet5-base")` or its dict.'
            )
        _check_count("num_experts", self.num_experts)
        _check_count("r", self.r)
        _check_count("task_dim", self.task_dim)
        for name, rank in (self.rank_pattern or {}).items():
            _check_count(f"rank_pattern[{name!r}]", rank)
        _check_choice("router_inputs", self.router_inputs, ROUTER_INPUTS)
        _check_choice("task_norm", self.task_norm, TASK_NORMS)
        _check_choice("bias", self.bias, ("none", "all", "taskmoe_lora_only"))
        if not 0.0 <= self.lora_dropout < 1.0:
            raise ValueError(
                f"`lora_dropout` is {self.lora_dropout!r}, but it is a probability below 1. "
                "Pass e.g. `lora_dropout=0.05`, or 0.0 for none."
            )
        if self.top_k is not None and not (
            isinstance(self.top_k, int) and 1 <= self.top_k <= self.num_experts
        ):
            raise ValueError(
                f"`top_k` is {self.top_k!r}, but a token can keep 1 to `num_experts` = {self.num_experts} of its gates. "
                f"Pass `top_k=None` to keep all of them, or a number from 1 to {self.num_experts}."
            )
        if self.top_k == 1 and self.num_experts > 1 and not self.router_aux_loss_coef:
            warnings.warn(
                "`top_k` is 1: the one gate that is kept always equals 1, so the loss gives the router no gradient, and it stays as it "
                "was drawn. Pass `top_k=2` or more, or a `router_aux_loss_coef` above 0.",
                stacklevel=2,
            )
        if self.router_aux_loss_coef < 0:
            raise ValueError(
                f"`router_aux_loss_coef` is {self.router_aux_loss_coef!r}; a negative weight would unbalance the "
                "experts. Pass 0.0 to turn the load-balancing loss off, or e.g. 0.01."
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                "`layers_pattern` was given without `layers_to_transform`, so it would have no effect. "
                "Pass `layers_to_transform=[...]` as well, or leave `layers_pattern` out."
            )
        targets = self.target_modules
        if (
            self.layers_to_transform is not None
            and isinstance(targets, str)
            and targets.lower() != "all-linear"
        ):
            raise ValueError(
                f"`layers_to_transform` does not go together with `target_modules={targets!r}`, a regex that is matched as a "
                'whole. Let the regex name the layers, or pass `target_modules="all-linear"` or a list such as '
                '`target_modules=["q_proj", "v_proj"]`.'
            )


def _check_count(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(
            f"`{name}` is {value!r}, but it counts something. Pass a whole number of at least 1."
        )


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(
            f"`{name}` is {value!r}, which is unknown. Pass one of {', '.join(map(repr, choices))}."
        )
