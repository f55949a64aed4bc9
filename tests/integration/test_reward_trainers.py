"""TRL's trainers on rewards and preferences: every row is routed by its own task.

Losses and gradients are held against plain forwards with explicit `task_embeds`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from peft import PeftModel
from transformers import LlamaForSequenceClassification, generation
from trl.trainer.reward_trainer import DataCollatorForPreference

from peft_taskmoe import TaskCollator, TaskMoELoraConfig, attach_task_encoder
from tiny import TASK_DIM, randomise
from versions import needs_labels_in_dpo, needs_one_batch_in_dpo

PROMPTS = [" ".join(f"w{4 + 5 * i + j}" for j in range(2 + i)) for i in range(4)]
JUDGED = Dataset.from_list(
    [
        {"prompt": p, "completion": f" w{40 + i} w{45 + i}"[: 4 + 4 * (i % 2)], "label": i < 2}
        for i, p in enumerate(PROMPTS)
    ]
)
PREFERENCES = Dataset.from_list(
    [
        {"prompt": p, "chosen": f" w{40 + i} w{45 + i} w{46 + i}", "rejected": f" w{50 + i}"}
        for i, p in enumerate(PROMPTS)
    ]
)


@pytest.fixture
def made(tiny_model, tiny_encoder, word_tokenizer, tmp_path):
    """`made("KTO", rows, **arguments)`: a trainer whose adapter is random, with an encoder."""

    def make(kind: str, data: Dataset, model: Any = None, **arguments: Any) -> Any:
        further = {name: arguments.pop(name) for name in ("reward_funcs", "data_collator")
                   if name in arguments}  # fmt: skip
        settings = {"task_dim": TASK_DIM, "num_experts": 3, "r": 2, "lora_dropout": 0.0}
        settings["task_type"] = "CAUSAL_LM" if model is None else "SEQ_CLS"
        trainer = getattr(trl, f"{kind}Trainer")(
            model or tiny_model(),
            args=getattr(trl, f"{kind}Config")(
                str(tmp_path), report_to=[], use_cpu=True, bf16=False, disable_tqdm=True,
                per_device_train_batch_size=4, **arguments,
            ),
            train_dataset=data, processing_class=word_tokenizer,
            peft_config=TaskMoELoraConfig(**settings), **further,
        )  # fmt: skip
        attach_task_encoder(randomise(trainer.model), tiny_encoder, word_tokenizer)
        return trainer

    return make


def log_probs(
    model: PeftModel, ids: torch.Tensor, seen: torch.Tensor, answer: torch.Tensor, **task: Any
) -> torch.Tensor:
    """Log-probability `(rows, length - 1)` of each token of an answer, 0 elsewhere."""
    logits = model(input_ids=ids, attention_mask=seen, **task).logits[:, :-1]
    picked = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    return picked * answer[:, 1:]


def gradients(model: PeftModel, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """The gradient of every trained parameter, none of which is zero."""
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    assert all(gradient.abs().max() > 0 for gradient in found.values())
    return found


def same_step(trainer: Any, batch: Any, expected: torch.Tensor) -> None:
    """The trainer's loss is this one, and so are its gradients."""
    found = trainer.compute_loss(trainer.model, dict(batch))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    wanted = gradients(trainer.model, expected)
    torch.testing.assert_close(gradients(trainer.model, found), wanted, atol=1e-5, rtol=1e-3)


@needs_labels_in_dpo
def test_kto(made, tiny_encoder) -> None:
    """The pairs for the estimate of the divergence are routed by their prompts as well."""
    trainer = made("KTO", JUDGED, beta=1.0)
    model = trainer.model.train()
    batch = dict(next(iter(trainer.get_train_dataloader())))
    names = ("input_ids", "attention_mask", "completion_mask")
    answered, paired = ([batch[kind + name] for name in names] for kind in ("", "KL_"))
    prompts = [
        trainer.processing_class.decode(ids[(answer == 0) & seen.bool()])
        for ids, seen, answer in zip(*answered, strict=True)
    ]
    assert sorted(prompts) == sorted(PROMPTS)
    embeds = tiny_encoder(prompts)

    def loss(task: torch.Tensor) -> torch.Tensor:
        policy = log_probs(model, *answered, task_embeds=task).sum(1)
        with torch.no_grad():
            divergence = log_probs(model, *paired, task_embeds=task).sum(1)
            with model.disable_adapter():
                reference = log_probs(model, *answered).sum(1)
                divergence = divergence - log_probs(model, *paired).sum(1)
        margin = policy - reference - divergence.mean().clamp(min=0)
        return (1 - torch.where(batch["label"].bool(), margin, -margin).sigmoid()).mean()

    expected = loss(embeds)
    assert abs(loss(embeds.flip(0)) - expected) > 1e-3
    same_step(trainer, batch, expected)


@needs_labels_in_dpo
@pytest.mark.parametrize("continuous", [False, True])
@pytest.mark.parametrize("kind", ["RLOO", "GRPO"])
def test_training_on_rewards_of_what_was_generated(
    made, tiny_encoder, monkeypatch, kind, continuous
) -> None:
    """Completions are generated, and learned from, under the task of their own prompt."""
    settings: dict[str, Any] = {} if kind == "RLOO" else {"loss_type": "grpo"}
    if continuous:
        if not hasattr(getattr(generation, "ContinuousBatchingConfig", None), "page_size"):
            pytest.skip("transformers before 5.18 has another engine for continuous batching")
        settings["use_transformers_continuous_batching"] = True
        small = {"page_size": 4, "num_blocks": 256, "max_batch_tokens": 24}
        settings["transformers_continuous_batching_config"] = small
    seen: list[dict[str, torch.Tensor]] = []
    trainer = made(
        kind, JUDGED.select_columns("prompt"), num_generations=2, max_completion_length=6, top_k=1,
        max_steps=1, learning_rate=0.0, beta=0.0, gradient_accumulation_steps=2,
        reward_funcs=lambda completions, **columns: torch.rand(len(completions)).tolist(),
        **settings,
    )  # fmt: skip
    compute_loss = trainer.compute_loss

    def watched(model: Any, inputs: Any, **options: Any) -> torch.Tensor:
        seen.append(inputs)
        return compute_loss(model, inputs, **options)

    monkeypatch.setattr(trainer, "compute_loss", watched)
    trainer.train()
    monkeypatch.undo()
    model, decode = trainer.model, trainer.processing_class.decode
    assert len(seen) == 2
    for batch in seen:
        ids, mask = (
            torch.cat([batch[f"{part}_{name}"] for part in ("prompt", "completion")], 1)
            for name in ("ids", "mask")
        )
        answer = mask.clone()
        answer[:, : batch["prompt_ids"].shape[1]] = 0
        prompts = [decode(row[(of == 0) & see.bool()]) for row, see, of in zip(
            ids, mask, answer, strict=True
        )]  # fmt: skip
        assert set(prompts) <= set(PROMPTS) and len(set(prompts)) > 1
        embeds = tiny_encoder(prompts)
        model.eval()
        for row, seen_here, of, embed in zip(ids, mask.bool(), answer.bool(), embeds, strict=True):
            generated = model.generate(
                row[~of & seen_here][None], task_embeds=embed[None], do_sample=False,
                max_new_tokens=6, pad_token_id=0, eos_token_id=2,
            )  # fmt: skip
            assert generated[0].tolist() == row[seen_here].tolist()
        found = log_probs(model.train(), ids, mask, answer, task_embeds=embeds)
        other = log_probs(model, ids, mask, answer, task_embeds=embeds.flip(0))
        assert not torch.allclose(found, other, atol=1e-3)
        if kind == "RLOO":
            torch.testing.assert_close(found.sum(1), batch["old_logps"], atol=1e-5, rtol=1e-4)
            ratio = (found.sum(1) - found.sum(1).detach()).exp()
        else:
            ratio = ((found - found.detach()).exp() * answer[:, 1:]).sum(1) / answer.sum(1)
        expected = -(ratio * batch["advantages"]).mean()
        scale = trainer.current_gradient_accumulation_steps if kind == "GRPO" else 1
        same_step(trainer, batch, expected / scale)


@pytest.mark.parametrize("way", ["automatic", pytest.param("column", marks=needs_one_batch_in_dpo)])
def test_reward_model(made, tiny_model, tiny_encoder, way) -> None:
    """A classifier's task is its whole text, or what the column says: that of its prompt."""
    judge = LlamaForSequenceClassification(tiny_model(num_labels=1).config)
    given: dict[str, Any] = {}
    data = PREFERENCES
    if way == "column":
        data = tiny_encoder.encode_dataset(data, column="prompt")
        given["data_collator"] = TaskCollator(DataCollatorForPreference(pad_token_id=0))
        given["remove_unused_columns"] = False
    trainer = made("Reward", data, judge, **given)
    model = trainer.model.train()
    batch = dict(next(iter(trainer.get_train_dataloader())))
    lengths = batch["attention_mask"].sum(1).tolist()
    rows = [ids[:length] for ids, length in zip(batch["input_ids"], lengths, strict=True)]
    texts = [trainer.processing_class.decode(row, skip_special_tokens=True) for row in rows]
    if way == "column":
        texts = [next(p for p in reversed(PROMPTS) if text.startswith(p)) for text in texts]
        torch.testing.assert_close(batch.pop("task_embeds"), tiny_encoder(texts))
    assert len(set(texts)) == (8 if way == "automatic" else 4)
    embeds = tiny_encoder(texts)
    rewards = model(**batch, task_embeds=embeds).logits[:, 0]
    alone = [
        model(input_ids=row[None], task_embeds=embed[None]).logits[0, 0]
        for row, embed in zip(rows, embeds, strict=True)
    ]
    torch.testing.assert_close(rewards, torch.stack(alone), atol=1e-5, rtol=1e-4)
    by_another = model(**batch, task_embeds=embeds.flip(0)).logits[:, 0]
    assert not torch.allclose(by_another, rewards, atol=1e-4)
    expected = -torch.nn.functional.logsigmoid(rewards[:4] - rewards[4:]).mean()
    if way == "column":
        batch["task_embeds"] = embeds
    same_step(trainer, batch, expected)
