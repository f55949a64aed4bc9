"""Tiny models made from configs, a tokenizer, an encoder, and adapters whose parameters are all random.

It knows no expected value: those come from `reference.py` or from the tests. Nothing here reads a file or the network.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn

TASK_DIM = 6
VOCAB = 64

# Their own dropout is off: the adapter's draws would otherwise shift theirs.
MODELS: dict[str, Callable[[], tuple[type, Any]]] = {
    "llama": lambda: (
        transformers.LlamaForCausalLM,
        transformers.LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        ),
    ),
    "gpt2": lambda: (
        transformers.GPT2LMHeadModel,
        transformers.GPT2Config(
            vocab_size=VOCAB,
            n_embd=16,
            n_layer=2,
            n_head=2,
            n_positions=64,
            attn_pdrop=0.0,
            embd_pdrop=0.0,
            resid_pdrop=0.0,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        ),
    ),
    "t5": lambda: (
        transformers.T5ForConditionalGeneration,
        transformers.T5Config(
            vocab_size=VOCAB,
            d_model=16,
            d_kv=8,
            d_ff=24,
            num_layers=2,
            num_heads=2,
            dropout_rate=0.0,
            pad_token_id=0,
            eos_token_id=2,
            decoder_start_token_id=0,
        ),
    ),
    "bert": lambda: (
        transformers.BertForSequenceClassification,
        transformers.BertConfig(
            vocab_size=VOCAB,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=64,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            pad_token_id=0,
        ),
    ),
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
