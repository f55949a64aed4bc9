"""A tiny language model and a tiny encoder as folders, for scripts."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

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


@pytest.fixture(scope="module")
def parts():
    """The modules of `experiments`, which find each other as scripts do."""
    folder = Path(__file__).parents[2] / "experiments"
    sys.path.insert(0, str(folder))
    names = {path.stem for path in folder.glob("*.py")}
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in sorted(names)})
    finally:
        sys.path.remove(str(folder))
        for name in names:
            sys.modules.pop(name, None)
