"""Packed and padding-free batches of `SFTTrainer`, against the same documents one by one."""

from __future__ import annotations

import warnings
from itertools import pairwise
from typing import Any

import pytest
import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from peft_taskmoe import TaskMoELoraConfig, attach_task_encoder
from peft_taskmoe.prompts import packed_documents, prompt_ids
from tiny import TASK_DIM, randomise

# Prompts and completions, all of different lengths.
DOCUMENTS = [
    {
        "prompt": " ".join(f"w{4 + 7 * i + j}" for j in range(2 + i)),
        "completion": " " + " ".join(f"w{50 + i}" for _ in range(1 + i % 2)),
    }
    for i in range(6)
]
PACKINGS: dict[str, dict[str, Any]] = {
    "packing": {"packing": True, "max_length": 16},
    "padding-free": {"padding_free": True, "max_length": None},
    "both": {"packing": True, "padding_free": True, "max_length": 16},
    "padded to 8": {"packing": True, "max_length": 16, "pad_to_multiple_of": 8},
}


@pytest.fixture
def sft(tiny_model, word_tokenizer, tiny_encoder, tmp_path):
    """`sft(packing=True, ...)`: an `SFTTrainer` in fp32 with a random adapter and an encoder."""

    def make(documents=DOCUMENTS, attention: str = "sdpa", **settings: Any) -> SFTTrainer:
        arguments = {
            "report_to": [], "use_cpu": True, "bf16": False, "per_device_train_batch_size": 4,
            "learning_rate": 1e-2, "loss_type": "nll",  # gives logits, whatever the default is
            **settings,
        }  # fmt: skip
        trainer = SFTTrainer(
            tiny_model(attn_implementation=attention),
            SFTConfig(str(tmp_path), **arguments),
            train_dataset=Dataset.from_list(documents),
            processing_class=word_tokenizer,
            peft_config=TaskMoELoraConfig(task_dim=TASK_DIM, num_experts=3, r=2, lora_dropout=0.0),
        )
        randomise(trainer.model)
        attach_task_encoder(trainer.model, tiny_encoder, word_tokenizer)
        return trainer

    return make


def batch_of(trainer: SFTTrainer) -> dict[str, Any]:
    return dict(next(iter(trainer.get_train_dataloader())))


def documents_in(batch: dict[str, Any]) -> list[slice]:
    """Where the documents of a flattened batch are: positions begin anew."""
    starts = (batch["position_ids"][0] == 0).nonzero()[:, 0].tolist()
    return [slice(*place) for place in pairwise([*starts, batch["position_ids"].shape[1]])]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("packing", PACKINGS)
def test_packed_logits_equal_those_of_each_document_alone(
    sft, tiny_encoder, word_tokenizer, packing, attention
) -> None:
    trainer = sft(attention=attention, **PACKINGS[packing])
    model = trainer.model.eval().double()
    batch = batch_of(trainer)
    assert batch["input_ids"].shape[0] == 1 and "attention_mask" not in batch
    prompts = {document["prompt"] for document in DOCUMENTS}
    seen = []
    with torch.no_grad():
        # As trainers do: with a cache, transformers 4.57 looks across documents.
        packed = model(**batch, use_cache=False).logits[0]
        for place in documents_in(batch):
            ids, labels = batch["input_ids"][:, place], batch["labels"][:, place]
            if (ids == word_tokenizer.pad_token_id).all():
                continue
            prompt = word_tokenizer.decode(ids[labels == -100])
            seen.append(prompt)
            alone = model(input_ids=ids, task_embeds=tiny_encoder([prompt])).logits[0]
            other = model(input_ids=ids, task_embeds=tiny_encoder(["w63 w62"])).logits[0]
            torch.testing.assert_close(packed[place], alone, atol=1e-6, rtol=0)
            torch.testing.assert_close(
                model(input_ids=ids, labels=labels).logits[0], alone, atol=1e-6, rtol=0
            )
            assert (alone - other).abs().max() > 1e-3  # the task does matter
    assert set(seen) <= prompts and len(set(seen)) >= 2


@pytest.mark.parametrize("packing", ["packing", "padding-free"])
def test_packed_gradients_equal_those_of_a_padded_batch(sft, packing) -> None:
    """Through TRL's own loss (fused LM head) and gradient checkpointing, which is on by default."""
    found = {}
    for settings in (PACKINGS[packing], {}):
        trainer = sft(per_device_train_batch_size=8, **settings)
        model = trainer.model.train().double()
        trainer.compute_loss(model, batch_of(trainer)).backward()
        found[bool(settings)] = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    torch.testing.assert_close(found[True], found[False], atol=1e-6, rtol=1e-6)
    assert max(grad.abs().max() for grad in found[True].values()) > 1e-3


def test_training_with_packing_learns(sft) -> None:
    trainer = sft(**PACKINGS["packing"], max_steps=6, logging_steps=1, bf16=True)
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < losses[0]


def test_a_cut_document_keeps_its_prompt(sft, word_tokenizer) -> None:
    """`"bfd"` drops what does not fit; the prompt, which stands first, is cut last."""
    trainer = sft(packing=True, max_length=4)
    batch = batch_of(trainer)
    tasks = prompt_ids(
        batch["input_ids"], batch["labels"], None, packed_documents(batch["position_ids"], None)
    )
    prompts = [document["prompt"] for document in DOCUMENTS]
    for found in map(word_tokenizer.decode, tasks):
        assert any(
            prompt == found or (len(found.split()) == 4 and prompt.startswith(found))
            for prompt in prompts
        )


def test_wrapped_packing_warns_that_documents_are_cut(sft) -> None:
    """`"wrapped"` hides where documents begin; a row that begins within an answer has no prompt."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = sft(packing=True, packing_strategy="wrapped", max_length=5)
    batch = next(
        batch
        for batch in trainer.get_train_dataloader()
        if (batch["labels"][:, :2] != -100).all(1).any()
    )
    assert "position_ids" not in batch
    with pytest.warns(UserWarning, match=r"examples have no prompt.*`packing_strategy=\"bfd\"`"):
        trainer.model(**batch)
    with warnings.catch_warnings():  # once
        warnings.simplefilter("error")
        trainer.model(**batch)


def test_split_documents_warn_too(sft) -> None:
    try:
        trainer = sft(packing=True, packing_strategy="bfd_split", max_length=4)
    except ValueError as error:
        pytest.skip(f"this TRL has no such strategy: {error}")
    batches = list(trainer.get_train_dataloader())
    with pytest.warns(UserWarning, match="examples have no prompt"):
        for batch in batches:
            trainer.model(**batch)
