"""Tiny models made from configs, adapters whose parameters are all random, a fake tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf
from torch import nn

TASK_DIM = 6
VOCAB = 64

_ENDS = {"vocab_size": VOCAB, "pad_token_id": 0, "eos_token_id": 2}
_SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
_LLAMA = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
_GPT2 = {
    "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64,
    "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0,
}  # fmt: skip
_T5 = {
    "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
}  # fmt: skip
_BERT = {
    "num_attention_heads": 2, "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip


def _made_by(model: type, config: type, **settings: Any) -> Callable[[], tuple[type, Any]]:
    return lambda: (model, config(**_ENDS, **settings))


# Their own dropout is off: the adapter's draws would otherwise shift theirs.
MODELS = {
    "llama": _made_by(tf.LlamaForCausalLM, tf.LlamaConfig, bos_token_id=1, **_SIZES, **_LLAMA),
    "gpt2": _made_by(tf.GPT2LMHeadModel, tf.GPT2Config, bos_token_id=1, **_GPT2),
    "t5": _made_by(tf.T5ForConditionalGeneration, tf.T5Config, **_T5),
    "bert": _made_by(tf.BertForSequenceClassification, tf.BertConfig, **_SIZES, **_BERT),
}


def randomise(model: nn.Module, seed: int = 1, std: float = 0.2) -> nn.Module:
    """Give every adapter parameter a random value, as training would leave it."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(model.named_parameters()):
        if "taskmoe_lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model


@dataclass
class FakeTokenizer:
    """Token 7 is the word `t7`; below 4 they are special."""

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return " ".join(f"t{i}" for i in ids if i >= 4 or not skip_special_tokens)
