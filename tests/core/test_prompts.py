"""The prompts in `input_ids`: what precedes the first label, per row or per packed document."""

from __future__ import annotations

import pickle
import warnings

import pytest
import torch

from peft_taskmoe.prompts import PromptReader, packed_documents, prompt_ids, schema_part
from tiny import FakeTokenizer

IDS = torch.tensor([[4, 5, 6, 7, 8], [9, 10, 11, 12, 13]])
PAD = -100


@pytest.mark.parametrize(
    "labels, mask, expected",
    [
        (None, None, [[4, 5, 6, 7, 8], [9, 10, 11, 12, 13]]),
        # before the *first* label
        ([[PAD, PAD, 6, 7, 8], [PAD, 10, PAD, 12, 13]], None, [[4, 5], [9]]),
        # nothing predicts a first token
        ([[PAD] * 5, [9, 10, 11, 12, 13]], None, [[4, 5, 6, 7, 8], [9]]),
        # padded right, padded left
        (None, [[1, 1, 1, 0, 0], [0, 0, 1, 1, 1]], [[4, 5, 6], [11, 12, 13]]),
        (
            [[PAD, PAD, 6, PAD, PAD], [PAD, PAD, PAD, PAD, 13]],
            [[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]],
            [[4, 5], [10, 11, 12]],
        ),
        ([0, 1], None, [[4, 5, 6, 7, 8], [9, 10, 11, 12, 13]]),  # a class a row is no answer
        # a 4-D mask hides nothing
        (None, [[[[0] * 5] * 5]] * 2, [[4, 5, 6, 7, 8], [9, 10, 11, 12, 13]]),
    ],
)  # fmt: skip
def test_the_prompt_is_what_precedes_the_first_label(labels, mask, expected) -> None:
    labels = None if labels is None else torch.tensor(labels)
    mask = None if mask is None else torch.tensor(mask)
    assert prompt_ids(IDS, labels, mask, None) == expected


@pytest.mark.parametrize(
    "positions, mask, expected",
    [
        ([[0, 1, 2, 0, 1]], None, [0, 0, 0, 1, 1]),
        ([[0, 0, 1, 0, 0]], None, [0, 1, 1, 2, 3]),  # documents of one token
        ([[0, 1, 0, 1], [0, 1, 2, 3]], None, [0, 0, 1, 1, 2, 2, 2, 2]),  # a row is a new document
        ([[0, 1, 2, 3], [0, 1, 2, 3]], None, None),  # nothing starts over
        ([[5, 6, 7, 8]], None, None),  # a later piece of one document
        ([[0, 1, 0, 1]], [[1, 1, 1, 1]], None),  # padded batches have a mask, packed ones none
        ([[3]], None, None),  # a decode step
        ([[[0] * 4]] * 3, None, None),  # positions in three dimensions
        (None, None, None),
    ],
)
def test_packed_documents_start_where_positions_do(positions, mask, expected) -> None:
    positions = None if positions is None else torch.tensor(positions)
    mask = None if mask is None else torch.tensor(mask)
    found = packed_documents(positions, mask)
    assert (None if found is None else found.tolist()) == expected


def test_packed_prompts_are_found_per_document() -> None:
    documents = torch.tensor([0, 0, 0, 1, 1])
    assert prompt_ids(IDS[:1], torch.tensor([[PAD, 5, 6, PAD, 8]]), None, documents) == [[4], [7]]


def test_texts_have_no_special_tokens_and_are_decoded_once() -> None:
    decoded = []

    class Counting(FakeTokenizer):
        def decode(self, ids, skip_special_tokens=False):
            decoded.append(ids)
            return super().decode(ids, skip_special_tokens)

    reader = PromptReader(Counting())
    for _ in range(3):
        found = reader.read(torch.tensor([[1, 4, 5, 2, 0]]))
        assert found.texts == ["t4 t5"] and found.token_tasks is None
    assert decoded == [[1, 4, 5, 2, 0]]


def test_kept_texts_take_a_bounded_number_of_bytes(monkeypatch) -> None:
    """65,536 prompts of 2,000 tokens, which used to be kept, are 5 GiB."""
    monkeypatch.setattr("peft_taskmoe.prompts._MEMO_BYTES", 10_000)
    reader = PromptReader(FakeTokenizer())
    for start in range(50):
        reader.read(torch.arange(start, start + 100).unsqueeze(0) + 4)
    assert 1 <= len(reader._texts) <= 3


@pytest.mark.parametrize("end", ['# This is the text to analyze\ntext = "x"', 'text = "x"'])
def test_the_schema_is_the_part_before_the_text(end) -> None:
    schema = 'class A:\n    """Not text = "y" inside a line."""\n'
    assert schema_part(f"{schema}{end}\nresult =") == schema


def test_a_prompt_without_a_schema_is_refused() -> None:
    message = r"reads the schema only .* has no line .*: 't4 t5'.* or pass `task_embeds`"
    with pytest.raises(ValueError, match=message):
        schema_part("t4 t5")


def test_a_padding_token_behind_packed_documents_takes_the_task_before_it() -> None:
    """`pad_to_multiple_of` adds documents of one special token, which say nothing to encode."""
    ids, positions = torch.tensor([[4, 5, 6, 0, 0]]), torch.tensor([[0, 1, 2, 0, 0]])
    labels = torch.tensor([[PAD, PAD, 6, PAD, PAD]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # and is no example without a prompt
        found = PromptReader(FakeTokenizer()).read(ids, labels, None, positions)
    assert found.texts == ["t4 t5"] * 3
    assert found.token_tasks.tolist() == [0, 0, 0, 1, 2]


def test_a_pickled_reader_reads_on() -> None:
    reader = PromptReader(FakeTokenizer())
    reader.read(IDS, IDS)
    assert pickle.loads(pickle.dumps(reader)).read(IDS[:1]).texts == ["t4 t5 t6 t7 t8"]
