"""Fixtures: tiny models, adapters, a tokenizer and an encoder."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from hypothesis import settings
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

from peft_taskmoe import TaskEncoder, TaskMoELoraConfig
from tiny import MODELS, TASK_DIM, VOCAB, randomise

# Everywhere the same examples; `make fuzz` makes up others, and many more of them.
settings.register_profile("same", derandomize=True, max_examples=60, deadline=None, database=None)
settings.register_profile("fuzz", max_examples=2000, deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def tiny_model() -> Callable[..., nn.Module]:
    """`tiny_model("llama", **changes of its config)`: the same weights at every call."""

    def make(
        name: str = "llama", *, dtype: torch.dtype = torch.float32, **changes: Any
    ) -> nn.Module:
        cls, config = MODELS[name]()
        config.update(changes)
        torch.manual_seed(0)
        model = cls(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:  # far enough from zero for attention and adapters to show
                nn.init.normal_(parameter, std=0.3)
        return model.to(dtype)

    return make


@pytest.fixture
def adapted(tiny_model) -> Callable[..., PeftModel]:
    """`adapted("llama", num_experts=2, ...)`: a tiny model with a random adapter, in eval mode."""

    def make(
        name: str = "llama", *, model_changes: dict[str, Any] | None = None, **settings: Any
    ) -> PeftModel:
        small = {"task_dim": TASK_DIM, "num_experts": 3, "r": 2, "lora_dropout": 0.0}
        config = TaskMoELoraConfig(**{**small, **settings})
        return randomise(get_peft_model(tiny_model(name, **(model_changes or {})), config)).eval()

    return make


@pytest.fixture
def word_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A word a token: `<pad> <s> </s> <unk> w4 ... w63`, as many as the tiny models know."""
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    vocab = {token: i for i, token in enumerate([*special, *(f"w{n}" for n in range(4, VOCAB))])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), special, strict=True))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **names)


@pytest.fixture
def tiny_encoder(word_tokenizer) -> TaskEncoder:
    """A real `TaskEncoder` on a random BERT of `TASK_DIM` dimensions."""
    torch.manual_seed(3)
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    config = transformers.BertConfig(vocab_size=VOCAB, hidden_size=TASK_DIM, **sizes)
    return TaskEncoder(transformers.BertModel(config), tokenizer=word_tokenizer)
