"""One table of tiny models and one of adapter settings, for tests that run through all of them.

Everything is random, one or two layers deep and sixteen wide, so that a case takes milliseconds.
No model has dropout of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf
from peft import PeftModel, get_peft_model
from torch import nn

from peft_taskmoe import TaskMoELoraConfig

VOCAB, WIDTH, TASK_DIM, ROWS, LENGTH = 32, 16, 6, 3, 7
NO_END = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}


class TwoLayers(nn.Module):
    """A plain module with one row of features per example."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(10, WIDTH)
        self.act = nn.Tanh()
        self.second = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.act(self.second(self.act(self.first(x)))))


@dataclass(frozen=True)
class ModelCase:
    """A tiny model.

    Attributes:
        model_class: Its class.
        config: The arguments of its config; empty for a module without one.
        linears: The last names of the layers that `"all-linear"` adapts.
        task_type: PEFT's task type.
        modules_to_save: A module to train in full beside the adapter.
        target_modules: What to adapt.
    """

    model_class: Callable[..., nn.Module]
    config: dict[str, Any]
    linears: frozenset[str]
    task_type: str | None = "CAUSAL_LM"
    modules_to_save: tuple[str, ...] = ("lm_head",)
    target_modules: str | list[str] = "all-linear"

    @property
    def config_class(self) -> Callable[..., Any] | None:
        """Its config's class, or None for a module without one."""
        return getattr(self.model_class, "config_class", None)

    def build(self) -> nn.Module:
        """The model: the same weights each time, in eval mode."""
        state = torch.get_rng_state()
        torch.manual_seed(0)
        made = () if self.config_class is None else (self.config_class(**self.config),)
        model = self.model_class(*made)
        torch.set_rng_state(state)
        return model.eval()

    def inputs(self) -> dict[str, torch.Tensor]:
        """A batch of three rows, the last one padded where there is a mask."""
        generator = torch.Generator().manual_seed(1)
        if self.config_class is None:
            return {"x": torch.randn(ROWS, 10, generator=generator)}
        ids = torch.randint(1, VOCAB, (ROWS, LENGTH), generator=generator)
        mask = torch.ones_like(ids)
        mask[-1, :2] = 0  # on the left
        batch = {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}
        if self.task_type == "SEQ_2_SEQ_LM":
            batch["decoder_input_ids"] = torch.randint(1, VOCAB, (ROWS, 4), generator=generator)
        return batch


def _names(names: str) -> frozenset[str]:
    return frozenset(names.split())


# Before transformers 5 they were linear layers, which `"all-linear"` adapts.
STACKED_EXPERTS = hasattr(tf.models.mixtral.modeling_mixtral, "MixtralExperts")
_BUT_EXPERTS = r".*(self_attn|shared_expert)\..*_proj|.*shared_expert_gate"

_LOUD = {"vocab_size": VOCAB, "initializer_range": 0.3, **NO_END}  # the models say something
_SHALLOW: dict[str, Any] = {
    **_LOUD, "hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 2, "max_position_embeddings": 64, "tie_word_embeddings": False,
}  # fmt: skip
_GROUPED = {**_SHALLOW, "num_key_value_heads": 1}
_SPARSE = {**_GROUPED, "experts_implementation": "eager", "num_experts_per_tok": 2}
_BERT = {"num_labels": 3, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_GPT2 = {
    **_LOUD, "n_embd": WIDTH, "n_layer": 2, "n_head": 2, "n_positions": 64,
    "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
}  # fmt: skip
_T5 = {
    "vocab_size": VOCAB, **NO_END, "d_model": WIDTH, "d_kv": 8, "d_ff": 24, "num_layers": 1,
    "num_heads": 2, "feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0,
    "tie_word_embeddings": False, "dropout_rate": 0.0,
}  # fmt: skip
_QWEN_EXPERTS = {
    "num_experts": 4,
    "moe_intermediate_size": 12,
    "shared_expert_intermediate_size": 12,
}
_HEAD = ("classifier",)
_ATTENTION = _names("q_proj k_proj v_proj o_proj")
_ALL = _ATTENTION | _names("gate_proj up_proj down_proj")
_OF_BERT = _names("query key value dense")
_OF_GPT_NEOX = _names("query_key_value dense dense_h_to_4h dense_4h_to_h")

# "lm_head", or "embed_out" of older transformers
_HEAD_OF_GPT_NEOX = (next(iter(tf.GPTNeoXForCausalLM._tied_weights_keys)).partition(".")[0],)

MODELS: dict[str, ModelCase] = {
    "llama": ModelCase(tf.LlamaForCausalLM, {**_GROUPED, "num_hidden_layers": 2}, _ALL),
    "qwen2": ModelCase(tf.Qwen2ForCausalLM, _GROUPED, _ALL),
    "mistral": ModelCase(tf.MistralForCausalLM, {**_GROUPED, "sliding_window": 4}, _ALL),
    "gemma": ModelCase(
        tf.GemmaForCausalLM, {**_GROUPED, "head_dim": 8, "tie_word_embeddings": True}, _ALL,
        modules_to_save=("norm",),
    ),
    "gpt2": ModelCase(
        tf.GPT2LMHeadModel, _GPT2, _names("c_attn c_proj c_fc"), modules_to_save=("ln_f",)
    ),
    "gpt_neox": ModelCase(
        tf.GPTNeoXForCausalLM, _SHALLOW, _OF_GPT_NEOX, modules_to_save=_HEAD_OF_GPT_NEOX
    ),
    "mixtral": ModelCase(
        tf.MixtralForCausalLM, {**_SPARSE, "num_local_experts": 4}, _ATTENTION,
        target_modules="all-linear" if STACKED_EXPERTS else _BUT_EXPERTS,
    ),
    "qwen2_moe": ModelCase(
        tf.Qwen2MoeForCausalLM, {**_SPARSE, **_QWEN_EXPERTS}, _ALL | {"shared_expert_gate"},
        target_modules="all-linear" if STACKED_EXPERTS else _BUT_EXPERTS,
    ),
    "t5": ModelCase(
        tf.T5ForConditionalGeneration, _T5, _names("q k v o wi_0 wi_1 wo"), "SEQ_2_SEQ_LM"
    ),
    "bert_sequences": ModelCase(
        tf.BertForSequenceClassification, {**_SHALLOW, **_BERT}, _OF_BERT, "SEQ_CLS", _HEAD
    ),
    "bert_tokens": ModelCase(
        tf.BertForTokenClassification, {**_SHALLOW, **_BERT}, _OF_BERT, "TOKEN_CLS", _HEAD
    ),
    "plain": ModelCase(
        TwoLayers, {}, _names("first second"), None, ("head",), target_modules=["first", "second"]
    ),
}  # fmt: skip

SMALL: dict[str, Any] = {
    "num_experts": 3, "r": 2, "lora_alpha": 4, "lora_dropout": 0.0, "task_dim": TASK_DIM,
    "init_weights": False,
}  # fmt: skip

ADAPTERS: dict[str, dict[str, Any]] = {
    "token+task": {},
    "token": {"router_inputs": "token"},
    "task": {"router_inputs": "task"},
    "top_k": {"top_k": 2},
    "task top_k": {"router_inputs": "task", "top_k": 2},
    "raw task": {"task_norm": "none"},
    "rslora": {"use_rslora": True},
    "many experts": {"num_experts": 5, "r": 1},
}

CASES = [(model, "token+task") for model in MODELS]
CASES += [(model, "task") for model in ("llama", "gpt2", "t5", "bert_tokens", "plain")]
CASES += [("llama", adapter) for adapter in ADAPTERS if adapter not in ("token+task", "task")]
CASES += [("t5", "token"), ("gpt2", "top_k"), ("plain", "token")]


def config_for(model: str, adapter: str = "token+task", **changes: Any) -> TaskMoELoraConfig:
    """The adapter's config for a model of the table."""
    case = MODELS[model]
    settings = {"target_modules": case.target_modules, **SMALL, **ADAPTERS[adapter], **changes}
    return TaskMoELoraConfig(task_type=case.task_type, **settings)


def adapted(model: str, adapter: str = "token+task", seed: int = 0, **changes: Any) -> PeftModel:
    """A model of the table with one adapter, in eval mode."""
    torch.manual_seed(seed)
    return get_peft_model(MODELS[model].build(), config_for(model, adapter, **changes)).eval()


def louder(model: nn.Module) -> Any:
    """The model with an adapter so strong that other tasks lead to other words."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "taskmoe_lora_router" in name:
                parameter.mul_(8)
            elif "taskmoe_lora_B" in name:
                parameter.mul_(4)
    return model


def tasks(rows: int = ROWS, seed: int = 7, dim: int = TASK_DIM) -> torch.Tensor:
    """Task embeddings `(rows, dim)`, all different."""
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)) * 3


def logits_of(output: Any) -> torch.Tensor:
    """The logits of a model's output."""
    return output if isinstance(output, torch.Tensor) else output.logits


def rows_of(batch: dict[str, torch.Tensor], rows: slice) -> dict[str, torch.Tensor]:
    """Some rows of a batch."""
    return {name: value[rows] for name, value in batch.items()}


def real_positions(
    model: str, batch: dict[str, torch.Tensor], logits: torch.Tensor
) -> torch.Tensor:
    """Bool mask over the logits: False where a token is padding, whose output means nothing."""
    mask = batch.get("attention_mask")
    if mask is None or logits.dim() < 3 or MODELS[model].task_type == "SEQ_2_SEQ_LM":
        return torch.ones_like(logits, dtype=torch.bool)
    return mask.bool().unsqueeze(-1).expand_as(logits)
