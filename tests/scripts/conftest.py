"""A tiny language model and a tiny encoder as folders, for scripts."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

import scripted


@pytest.fixture
def models(tmp_path) -> tuple[Path, Path]:
    """Folders of a tiny language model and a tiny encoder, each with its tokenizer."""
    language_model, encoder = tmp_path / "lm", tmp_path / "encoder"
    scripted.tiny_llama().save_pretrained(language_model)
    config = transformers.BertConfig(
        vocab_size=scripted.VOCAB,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
    )
    transformers.BertModel(config).save_pretrained(encoder)
    for folder in (language_model, encoder):
        scripted.byte_tokenizer().save_pretrained(folder)
    return language_model, encoder
