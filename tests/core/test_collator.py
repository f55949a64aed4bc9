"""`TaskCollator` around the collators people use."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerFast,
    default_data_collator,
)
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from peft_taskmoe.collator import TaskCollator
from peft_taskmoe.encoder import TaskEncoder


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    vocab = {
        word: i for i, word in enumerate(["<pad>", "<unk>", "find", "all", "cheeses", "launchers"])
    }
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>")


@pytest.fixture(scope="module")
def encoder(tokenizer) -> TaskEncoder:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=8, hidden_size=6, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )
    return TaskEncoder(BertModel(config), tokenizer=tokenizer)


@pytest.fixture
def collators(tokenizer):
    return {
        "trl": DataCollatorForLanguageModeling(pad_token_id=0),
        "trl padding-free": DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True),
        "seq2seq": DataCollatorForSeq2Seq(tokenizer),
        "default": default_data_collator,
    }


NAMES = ["trl", "trl padding-free", "seq2seq", "default"]


def examples(name: str, **columns) -> list[dict]:
    lengths = [3, 3, 3] if name == "default" else [3, 1, 2]
    rows = [{"input_ids": list(range(2, 2 + n)), "labels": [-100] * (n - 1) + [4]} for n in lengths]
    return [
        {**row, **{key: values[i] for key, values in columns.items()}} for i, row in enumerate(rows)
    ]


def without_task(batch) -> dict:
    return {key: value for key, value in batch.items() if key != "task_embeds"}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["list", "numpy", "tensor", "float64"])
def test_embeddings_of_any_make_reach_the_batch_and_nothing_else_changes(collators, name, kind):
    values = torch.arange(12.0).reshape(3, 4) / 7
    column = {
        "list": values.tolist(),
        "numpy": values.numpy(),
        "tensor": values,
        "float64": np.asarray(values, dtype=np.float64),
    }[kind]
    rows = examples(name, task_embeds=column)
    batch = TaskCollator(collators[name])(rows)
    torch.testing.assert_close(batch["task_embeds"], values, rtol=0, atol=1e-7)
    assert batch["task_embeds"].dtype == torch.float32
    expected = collators[name](examples(name))
    assert without_task(batch).keys() == expected.keys()
    assert all(np.array_equal(batch[key], expected[key]) for key in expected)
    assert "task_embeds" in rows[0]  # the examples themselves are left as they were


@pytest.mark.parametrize("name", NAMES)
def test_texts_are_encoded(collators, name, encoder):
    texts = ["find all cheeses", "find launchers", "find all cheeses"]
    batch = TaskCollator(collators[name], encoder)(examples(name, task_text=texts))
    assert torch.equal(batch["task_embeds"], encoder(texts))
    assert "task_text" not in batch


def test_an_encoder_of_schemas_reads_a_prompts_schema_alone(collators, tiny_encoder):
    tiny_encoder.config = dataclasses.replace(tiny_encoder.config, text="schema")
    schema = "w4 w5\n"
    texts = [f'{schema}# This is the text to analyze\ntext = "w9"\nresult =', schema, "w9"]
    expected = tiny_encoder([schema, schema, "w9"])
    batch = TaskCollator(collators["trl"], tiny_encoder)(examples("trl", task_text=texts))
    assert torch.equal(batch["task_embeds"], expected)
    data = tiny_encoder.encode_dataset(Dataset.from_dict({"prompt": texts}), column="prompt")
    torch.testing.assert_close(torch.tensor(data["task_embeds"][:]), expected)


def test_rows_of_a_data_set_encoded_beforehand(collators, encoder):
    rows = examples("trl", task_text=["find", "all", "cheeses"])
    data = encoder.encode_dataset(Dataset.from_list(rows))
    encoded = encoder.cache_info()
    batch = TaskCollator(collators["trl"], encoder)([data[i] for i in range(3)])
    assert torch.equal(batch["task_embeds"], encoder(["find", "all", "cheeses"]))
    assert encoder.cache_info().misses == encoded.misses
    assert torch.equal(
        TaskCollator(collators["trl"])(list(data.with_format("torch")))["task_embeds"],
        batch["task_embeds"],
    )


def test_an_example_without_a_task_is_named():
    rows = examples("trl", task_embeds=[[0.0, 1.0]] * 3)
    rows.append({"labels": [1], "input_ids": [1], "task_embeds": None})
    with pytest.raises(ValueError) as error:
        TaskCollator(default_data_collator)(rows)
    assert str(error.value) == (
        "Example 3 has no task embedding (columns: ['input_ids', 'labels', 'task_embeds']), which "
        'the router of adapter "default" reads. Add it with `encoder.encode_dataset(dataset)`, or '
        "leave `TaskCollator` out: an encoder that is attached or named in the config reads the "
        "prompts."
    )
    rows = examples("trl", task_text=["find", None, "all"])
    with pytest.raises(
        ValueError, match=r'Example 1 .*, which the router of adapter "second" reads'
    ):
        TaskCollator(default_data_collator, adapter_name="second")(rows)
    with pytest.raises(ValueError, match=r"Example 0 .*\(columns: \['input_ids', 'labels'\]\)"):
        TaskCollator(default_data_collator)(examples("trl"))


def test_no_examples_are_refused(encoder):
    for collator in (TaskCollator(list), TaskCollator(list, encoder)):
        with pytest.raises(ValueError, match="needs at least one example, got none"):
            collator([])


def test_a_mixture_of_embeddings_and_texts_is_refused(encoder):
    embeds = [[0.0] * 6, None, [1.0] * 6]
    rows = examples("trl", task_embeds=embeds, task_text=[None, "find", "all"])
    with pytest.raises(
        ValueError, match=r"Example 1 has a `task_text` but no `task_embeds`.* Give"
    ):
        TaskCollator(default_data_collator, encoder)(rows)


def test_texts_without_an_encoder_are_refused():
    with pytest.raises(
        ValueError, match=r"no encoder to read it. Call `TaskCollator\(collator, enc"
    ):
        TaskCollator(default_data_collator)(examples("trl", task_text=["find"] * 3))


@pytest.mark.parametrize(
    ("embeds", "task_dim", "message"),
    [
        (
            [[0.0] * 4, [0.0] * 4, [0.0] * 3],
            None,
            r"example 2 must have the shape \(4,\), got \(3,\)",
        ),
        ([[0.0] * 4] * 3, 768, r"example 0 must have the shape \(768,\), got \(4,\)"),
        ([[[0.0] * 4]] * 3, None, r"example 0 must have the shape \(4,\), got \(1, 4\)"),
        ([0.5] * 3, None, r"example 0 must have the shape \(1,\), got \(\)"),
    ],
)
def test_wrong_sizes_are_refused(embeds, task_dim, message):
    rows = examples("default", task_embeds=embeds)
    with pytest.raises(ValueError, match=message):
        TaskCollator(default_data_collator, task_dim=task_dim)(rows)


def test_the_encoders_dimension_is_expected(encoder):
    rows = examples("default", task_embeds=[[0.0] * 4] * 3)
    with pytest.raises(ValueError, match=r"must have the shape \(6,\), got \(4,\)"):
        TaskCollator(default_data_collator, encoder)(rows)
