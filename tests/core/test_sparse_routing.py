"""`top_k` and the load-balancing loss in whole models: its value, its gradients, and where it goes.

The reference takes each adapted layer's input from a model without that loss and computes it there with `reference.py`.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import reference
from peft_taskmoe import TaskCollator, TaskMoELoraConfig, attach_task_encoder
from peft_taskmoe.layer import Linear
from peft_taskmoe.conditioning import conditioner_of
from peft_taskmoe import log_routing
from tiny import TASK_DIM, randomise

COEF = 0.7
IDS = torch.randint(4, 60, (3, 6), generator=torch.Generator().manual_seed(2))
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1]])
LABELS = torch.where(MASK.bool(), IDS, -100)
TASKS = torch.randn(3, TASK_DIM, generator=torch.Generator().manual_seed(3))
BATCH = {"input_ids": IDS, "attention_mask": MASK, "labels": LABELS, "task_embeds": TASKS}


def rows(start: int, end: int) -> dict[str, torch.Tensor]:
    return {name: value[start:end] for name, value in BATCH.items()}


def gradients(model) -> dict[str, torch.Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def last_aux_loss(model: PeftModel) -> float | None:
    """The load-balancing loss of the forward since the last look."""
    return conditioner_of(model.get_base_model()).aux_log.take_mean()


def reference_loss(
    layer: Linear, x: torch.Tensor, tasks, mask, adapter: str = "default"
) -> torch.Tensor:
    """The load-balancing loss of one layer, without its coefficient."""
    config = layer.configs[adapter]
    read = [x.reshape(-1, x.shape[-1])] if "token" in config.router_inputs else []
    if "task" in config.router_inputs:
        scaled = torch.stack(
            [reference.scaled_task(task, config.task_norm, x.shape[-1]) for task in tasks]
        )
        read.append(scaled.to(x).repeat_interleave(x.shape[1], 0))
    logits = torch.cat(read, -1) @ layer.taskmoe_lora_router[adapter].weight.T
    return reference.balancing_loss(logits, config.top_k, mask.reshape(-1).bool().tolist())


def by_hand(
    model: PeftModel, batch: dict[str, Any], coefs: dict[str, float], masks=None, **kwargs: Any
):
    """The model's own loss and the load-balancing loss, both with a graph; `model` has no coefficient itself."""
    layers = [module for module in model.modules() if isinstance(module, Linear)]
    inputs: dict[Linear, torch.Tensor] = {}
    hooks = [
        layer.register_forward_pre_hook(lambda m, a: inputs.__setitem__(m, a[0]))
        for layer in layers
    ]
    loss = model(**batch, **kwargs).loss
    for hook in hooks:
        hook.remove()
    masks = masks or {batch["input_ids"].shape[1]: batch["attention_mask"]}
    aux = sum(
        coef
        * reference_loss(
            layer, inputs[layer], batch["task_embeds"], masks[inputs[layer].shape[1]], name
        )
        / len(layers)
        for layer in layers
        for name, coef in coefs.items()
    )
    return loss, aux


@pytest.fixture
def pair(adapted):
    """The same adapter in float64 with and without the load-balancing loss."""

    def make(name: str = "llama", **settings: Any) -> tuple[PeftModel, PeftModel]:
        with_loss = adapted(name, router_aux_loss_coef=COEF, **settings).double().train()
        return with_loss, adapted(name, **settings).double().train()

    return make


@pytest.mark.parametrize("router_inputs", ["token+task", "token", "task"])
@pytest.mark.parametrize("top_k", [None, 1, 2])
def test_the_loss_and_its_gradients_equal_the_reference(pair, top_k, router_inputs) -> None:
    model, plain = pair(top_k=top_k, router_inputs=router_inputs)
    own, aux = by_hand(plain, BATCH, {"default": COEF})
    found = model(**BATCH).loss
    torch.testing.assert_close(found, (own + aux).float())  # transformers' losses are float32
    assert last_aux_loss(model) == pytest.approx(aux.item()) and aux > COEF
    found.backward()
    (own + aux).backward()
    with_loss = gradients(model)
    torch.testing.assert_close(with_loss, gradients(plain))
    plain(**BATCH).loss.backward()
    assert any(
        not torch.allclose(grad, with_loss[name])
        for name, grad in gradients(plain).items()
        if "router" in name
    )


def test_padding_does_not_count(pair) -> None:
    model, _ = pair(top_k=1)
    padded = rows(1, 2)
    short = {name: value[:, :4] for name, value in padded.items() if name != "task_embeds"}
    model(**padded)
    with_padding = last_aux_loss(model)
    model(**short, task_embeds=padded["task_embeds"])
    assert with_padding == pytest.approx(last_aux_loss(model), rel=1e-9)
    model(**{name: value for name, value in padded.items() if name != "attention_mask"})
    assert with_padding != pytest.approx(last_aux_loss(model), rel=1e-4)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing_changes_no_gradient(pair, use_reentrant) -> None:
    """Also with two forwards of different tasks before one backward; recomputation adds no second share."""
    model, plain = pair(top_k=2)
    other = {**BATCH, "task_embeds": TASKS.flip(0)}
    sums = [by_hand(plain, batch, {"default": COEF}) for batch in (BATCH, other)]
    (sum(sums[0]) - 2 * sum(sums[1])).backward()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    (model(**BATCH).loss - 2 * model(**other).loss).backward()
    torch.testing.assert_close(gradients(model), gradients(plain))


def test_the_weight_follows_the_scale_of_the_loss(pair) -> None:
    """A loss scaler's factor reaches the load-balancing loss, too."""
    model, plain = pair()
    (1024 * model(**BATCH).loss).backward()
    (1024 * sum(by_hand(plain, BATCH, {"default": COEF}))).backward()
    torch.testing.assert_close(gradients(model), gradients(plain))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_accumulated_batches_have_weight_one_together(pair, checkpointing) -> None:
    """With `num_items_in_batch`, by which a Trainer divides, a batch's weight is its share of the labels; else all of it."""
    model, plain = pair(top_k=1)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": True})
        model.enable_input_require_grads()
    parts = [rows(0, 1), rows(1, 3)]
    labels = [(part["labels"][:, 1:] != -100).sum() for part in parts]
    for part, count in zip(parts, labels, strict=True):
        model(**part, num_items_in_batch=sum(labels)).loss.backward()
        own, aux = by_hand(plain, part, {"default": COEF}, num_items_in_batch=sum(labels))
        (own + aux * count / sum(labels)).backward()
    torch.testing.assert_close(gradients(model), gradients(plain))
    for part in parts:
        (model(**part).loss / 2).backward()
        (sum(by_hand(plain, part, {"default": COEF})) / 2).backward()
    torch.testing.assert_close(gradients(model), gradients(plain))


def test_each_adapter_has_its_own(tiny_model) -> None:
    def make(coefs: tuple[float, float]) -> PeftModel:
        sizes = {"r": 2, "lora_dropout": 0.0, "task_dim": TASK_DIM}
        model = get_peft_model(
            tiny_model(),
            TaskMoELoraConfig(num_experts=3, top_k=1, router_aux_loss_coef=coefs[0], **sizes),
        )
        model.add_adapter(
            "two", TaskMoELoraConfig(num_experts=4, top_k=2, router_aux_loss_coef=coefs[1], **sizes)
        )
        model.base_model.set_adapter(["default", "two"])
        return randomise(model).double().train()

    model, plain = make((0.3, 0.9)), make((0.0, 0.0))
    own, aux = by_hand(plain, BATCH, {"default": 0.3, "two": 0.9})
    found = model(**BATCH).loss
    torch.testing.assert_close(found, (own + aux).float())  # transformers' losses are float32
    found.backward()
    (own + aux).backward()
    torch.testing.assert_close(gradients(model), gradients(plain))
    model.set_adapter("two")
    plain.set_adapter("two")
    torch.testing.assert_close(
        model(**BATCH).loss, sum(by_hand(plain, BATCH, {"two": 0.9})).float()
    )


def test_only_training_has_the_loss(pair) -> None:
    model, plain = pair()
    assert torch.equal(model.eval()(**BATCH).loss, plain.eval()(**BATCH).loss)
    with torch.no_grad():
        assert torch.equal(model.train()(**BATCH).loss, plain(**BATCH).loss)
    with model.disable_adapter(), plain.disable_adapter():
        assert torch.equal(model(**BATCH).loss, plain(**BATCH).loss)
    assert last_aux_loss(model) is None


def test_a_tuple_of_outputs(pair) -> None:
    model, _ = pair()
    torch.testing.assert_close(model(**BATCH, return_dict=False)[0], model(**BATCH).loss)


def test_an_encoder_decoder_leaves_the_padding_of_both_out(pair) -> None:
    model, plain = pair("t5", top_k=1)
    labels = torch.tensor([[5, 6, 7, 8], [9, 10, -100, -100], [11, 12, 13, -100]])
    batch = {**BATCH, "labels": labels}
    own, aux = by_hand(plain, batch, {"default": COEF}, masks={6: MASK, 4: labels != -100})
    found = model(**batch).loss
    torch.testing.assert_close(found, own + aux)
    found.backward()
    (own + aux).backward()
    torch.testing.assert_close(gradients(model), gradients(plain))


# --- in trainers

DOCUMENTS = Dataset.from_list(
    [
        {
            "prompt": " ".join(f"w{4 + 5 * i + j}" for j in range(2 + i)),
            "completion": f" w{40 + i}" + " w50" * i,
        }
        for i in range(4)
    ]
)
COMMON: dict[str, Any] = {
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
    "logging_steps": 1,
}


@pytest.fixture
def sft(tiny_model, tiny_encoder, word_tokenizer, tmp_path):
    def make(**settings: Any) -> SFTTrainer:
        peft_config = TaskMoELoraConfig(
            task_dim=TASK_DIM,
            num_experts=3,
            r=2,
            top_k=2,
            lora_dropout=0.0,
            router_aux_loss_coef=settings.pop("coef", COEF),
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            trainer = SFTTrainer(
                tiny_model(), SFTConfig(str(tmp_path), **{**COMMON, "per_device_train_batch_size": 3, **settings}),
                train_dataset=DOCUMENTS, eval_dataset=DOCUMENTS, processing_class=word_tokenizer, peft_config=peft_config,
            )  # fmt: skip
        attach_task_encoder(randomise(trainer.model), tiny_encoder, word_tokenizer)
        return trainer

    return make


@pytest.mark.parametrize("checkpointing", [True, False])
def test_it_reaches_the_gradients_of_sft(sft, checkpointing, tiny_encoder, word_tokenizer) -> None:
    """`SFTTrainer` computes its loss from log-probabilities; the weight is read off their gradient."""
    trainer = sft(gradient_checkpointing=checkpointing)
    model, plain = trainer.model.train().double(), sft(coef=0.0).model.train().double()
    if checkpointing:
        model.gradient_checkpointing_enable()
    batches = [dict(batch) for batch in trainer.get_train_dataloader()]
    assert [len(batch["input_ids"]) for batch in batches] == [3, 1]
    items = sum((batch["labels"][:, 1:] != -100).sum() for batch in batches)
    for batch in batches:  # as two accumulated ones
        trainer.compute_loss(model, dict(batch), num_items_in_batch=items).backward()
        prompts = (batch["labels"] == -100) & batch["attention_mask"].bool()
        texts = [word_tokenizer.decode(ids[m]) for ids, m in zip(batch["input_ids"], prompts)]
        given = {**batch, "task_embeds": tiny_encoder(texts)}
        own, aux = by_hand(plain, given, {"default": COEF}, num_items_in_batch=items)
        (own + aux * (batch["labels"][:, 1:] != -100).sum() / items).backward()
    torch.testing.assert_close(gradients(model), gradients(plain), atol=1e-6, rtol=1e-6)


def test_trainers_log_it(sft, adapted, tiny_encoder, word_tokenizer, tmp_path) -> None:
    trainer = log_routing(
        log_routing(
            sft(max_steps=3, eval_strategy="steps", eval_steps=1, gradient_accumulation_steps=2)
        )
    )
    trainer.train()
    history = [row for row in trainer.state.log_history if "loss" in row]
    assert len(history) == 3 and all(COEF < row["router_aux_loss"] < 3 * COEF for row in history)
    assert not any(
        "router_aux_loss" in row for row in trainer.state.log_history if "eval_loss" in row
    )

    model = attach_task_encoder(adapted(router_aux_loss_coef=COEF), tiny_encoder, word_tokenizer)
    plain = log_routing(trainer_of(model, word_tokenizer, tmp_path))
    batches = [dict(batch) for batch in plain.get_train_dataloader()]
    plain.train()
    logged = [row["router_aux_loss"] for row in plain.state.log_history if "loss" in row]
    assert len(logged) == len(batches) == 2 and logged[0] != logged[1]
    with pytest.raises(ValueError, match="has no Task-Aware MoELoRA adapter"):
        log_routing(type("T", (), {"model": torch.nn.Linear(2, 2)})())


def trainer_of(model, tokenizer, folder, collator=None, data=None, **settings: Any) -> Trainer:
    rows = [
        {
            "input_ids": tokenizer(row["prompt"] + row["completion"])["input_ids"],
            "prompt": row["prompt"],
        }
        for row in DOCUMENTS
    ]
    for row in rows:
        length = len(tokenizer(row["prompt"])["input_ids"])
        row["labels"] = [-100] * length + row["input_ids"][length:]
    data = Dataset.from_list(rows) if data is None else data
    arguments = {**COMMON, "per_device_train_batch_size": 2, "num_train_epochs": 1, **settings}
    return Trainer(
        model, TrainingArguments(str(folder), **arguments), train_dataset=data,
        data_collator=collator or DataCollatorForSeq2Seq(tokenizer), processing_class=tokenizer,
    )  # fmt: skip


def test_the_loss_that_trainer_sees_contains_it(
    adapted, tiny_encoder, word_tokenizer, tmp_path
) -> None:
    shown = {}
    for coef in (0.0, COEF):
        model = attach_task_encoder(
            adapted(router_aux_loss_coef=coef), tiny_encoder, word_tokenizer
        )
        trainer = log_routing(
            trainer_of(model, word_tokenizer, tmp_path, max_steps=1, gradient_accumulation_steps=2)
        )
        trainer.train()
        shown[coef] = next(row for row in trainer.state.log_history if "loss" in row)
    # Two accumulated batches, each with its share of the labels: between the least and the largest of the two
    assert "router_aux_loss" not in shown[0.0]
    added = shown[COEF]["loss"] - shown[0.0]["loss"]
    assert added == pytest.approx(shown[COEF]["router_aux_loss"], rel=0.2) and added > COEF


NO_EFFECT = r"`router_aux_loss_coef` of \['default'\] has no effect here.*label smoothing, DPO.*set the coefficient to 0"


def test_label_smoothing_says_that_it_has_no_effect(
    adapted, tiny_encoder, word_tokenizer, tmp_path
) -> None:
    model = adapted(router_aux_loss_coef=COEF)
    data = trainer_of(model, word_tokenizer, tmp_path).train_dataset
    data = tiny_encoder.encode_dataset(data, column="prompt")
    collator = TaskCollator(DataCollatorForSeq2Seq(word_tokenizer))
    trainer = trainer_of(
        model, word_tokenizer, tmp_path, collator, data, label_smoothing_factor=0.1
    )
    with pytest.warns(UserWarning, match=NO_EFFECT) as found:
        log_routing(trainer).train()
    assert sum("router_aux_loss_coef" in str(warning.message) for warning in found) == 1
    assert not any("router_aux_loss" in row for row in trainer.state.log_history)


def test_dpo_says_that_it_has_no_effect(tiny_model, tiny_encoder, word_tokenizer, tmp_path) -> None:
    data = Dataset.from_list(
        [
            {"prompt": row["prompt"], "chosen": row["completion"], "rejected": " w60"}
            for row in DOCUMENTS
        ]
    )
    found = {}
    for coef in (0.0, COEF):
        trainer = DPOTrainer(
            tiny_model(), args=DPOConfig(str(tmp_path), **COMMON, per_device_train_batch_size=4), train_dataset=data,
            processing_class=word_tokenizer,
            peft_config=TaskMoELoraConfig(
                task_dim=TASK_DIM, num_experts=3, r=2, lora_dropout=0.0, router_aux_loss_coef=coef
            ),
        )  # fmt: skip
        model = (
            attach_task_encoder(randomise(trainer.model), tiny_encoder, word_tokenizer)
            .train()
            .double()
        )
        loss = trainer.compute_loss(model, dict(next(iter(trainer.get_train_dataloader()))))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loss.backward()
        assert any("router_aux_loss_coef" in str(w.message) for w in caught) == bool(coef)
        found[coef] = gradients(model)
    torch.testing.assert_close(found[0.0], found[COEF], atol=1e-9, rtol=1e-7)


def test_weighted_losses_say_that_it_has_no_effect(sft) -> None:
    """Of `"dft"`, which weighs each label by its probability, no common weight can be read off."""
    trainer = sft(loss_type="dft")
    loss = trainer.compute_loss(
        trainer.model.train(), dict(next(iter(trainer.get_train_dataloader())))
    )
    with pytest.warns(UserWarning, match=NO_EFFECT):
        loss.backward()
