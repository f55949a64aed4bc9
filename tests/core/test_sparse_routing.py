"""`top_k` and the load-balancing loss in whole models: its value, its gradients, where it goes.

The reference takes each layer's input from a model without that loss, and computes it by
`reference.py`.
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
from peft_taskmoe import TaskCollator, TaskMoELoraConfig, attach_task_encoder, log_routing
from peft_taskmoe.aux_loss import AuxLoss, AuxLossLog
from peft_taskmoe.conditioning import conditioner_of
from peft_taskmoe.layer import Linear
from tiny import TASK_DIM, randomise
from versions import needs_labels_in_dpo

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


def reference_loss(layer: Linear, x: torch.Tensor, tasks, mask, adapter: str) -> torch.Tensor:
    """The load-balancing loss of one layer, without its coefficient."""
    config = layer.configs[adapter]
    read = [x.reshape(-1, x.shape[-1])] if "token" in config.router_inputs else []
    if "task" in config.router_inputs:
        scaled = [reference.scaled_task(task, config.task_norm, x.shape[-1]) for task in tasks]
        read.append(torch.stack(scaled).to(x).repeat_interleave(x.shape[1], 0))
    logits = torch.cat(read, -1) @ layer.taskmoe_lora_router[adapter].weight.T
    return reference.balancing_loss(logits, config.top_k, mask.reshape(-1).bool().tolist())


def by_hand(
    model: PeftModel, batch: dict[str, Any], coefs: dict[str, float], masks=None, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """The model's own loss and the load-balancing loss, of a model without a coefficient."""
    layers = [module for module in model.modules() if isinstance(module, Linear)]
    inputs: dict[Linear, torch.Tensor] = {}
    hooks = [
        layer.register_forward_pre_hook(lambda m, a: inputs.__setitem__(m, a[0]))
        for layer in layers
    ]
    loss = model(**batch, **kwargs).loss
    for hook in hooks:
        hook.remove()
    masks, aux = masks or {batch["input_ids"].shape[1]: batch["attention_mask"]}, 0
    for layer in layers:
        x = inputs[layer]
        for name, coef in coefs.items():
            of_layer = reference_loss(layer, x, batch["task_embeds"], masks[x.shape[1]], name)
            aux = aux + coef * of_layer / len(layers)
    return loss, aux


def assert_same(model, plain, found: torch.Tensor, expected: torch.Tensor) -> None:
    """The same loss and, by their backward passes, the same gradients."""
    torch.testing.assert_close(found, expected.to(found.dtype))  # transformers' are float32
    found.backward()
    expected.backward()
    torch.testing.assert_close(gradients(model), gradients(plain))


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
    assert last_aux_loss(model) == pytest.approx(aux.item()) and aux > COEF
    routers = [parameter for name, parameter in plain.named_parameters() if "router" in name]
    grads = torch.autograd.grad(aux, routers, retain_graph=True)
    assert all(grad.abs().max() > 1e-6 for grad in grads)
    assert_same(model, plain, found, own + aux)


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
    """Also with two forwards of different tasks before one backward."""
    model, plain = pair(top_k=2)
    other = {**BATCH, "task_embeds": TASKS.flip(0)}
    one, two = (sum(by_hand(plain, batch, {"default": COEF})) for batch in (BATCH, other))
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    found = model(**BATCH).loss - 2 * model(**other).loss
    assert_same(model, plain, found, one - 2 * two)


def test_the_weight_follows_the_scale_of_the_loss(pair) -> None:
    """A loss scaler's factor reaches the load-balancing loss, here in a tuple of outputs."""
    model, plain = pair()
    expected = 1024 * sum(by_hand(plain, BATCH, {"default": COEF}))
    assert_same(model, plain, 1024 * model(**BATCH, return_dict=False)[0], expected)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_accumulated_batches_have_weight_one_together(pair, checkpointing) -> None:
    """With `num_items_in_batch` a batch's weight is its share of the labels; else all of it."""
    model, plain = pair(top_k=1)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": True})
        model.enable_input_require_grads()
    parts = [rows(0, 1), rows(1, 3)]
    labels = [(part["labels"][:, 1:] != -100).sum() for part in parts]
    for items in ({"num_items_in_batch": sum(labels)}, {}):
        found = expected = 0
        for part, count in zip(parts, labels, strict=True):
            found = found + model(**part, **items).loss
            own, aux = by_hand(plain, part, {"default": COEF}, **items)
            expected = expected + own + aux * (count / sum(labels) if items else 1)
        assert_same(model, plain, found, expected)


def test_each_adapter_has_its_own(tiny_model) -> None:
    def make(*coefs: float) -> PeftModel:
        sizes = {"r": 2, "lora_dropout": 0.0, "task_dim": TASK_DIM}
        one, two = (
            TaskMoELoraConfig(num_experts=2 + k, top_k=k, router_aux_loss_coef=coef, **sizes)
            for k, coef in enumerate(coefs, start=1)
        )
        model = get_peft_model(tiny_model(), one)
        model.add_adapter("two", two)
        model.base_model.set_adapter(["default", "two"])
        return randomise(model).double().train()

    model, plain = make(0.3, 0.9), make(0.0, 0.0)
    for coefs in ({"default": 0.3, "two": 0.9}, {"two": 0.9}):
        for each in (model, plain):
            each.base_model.set_adapter(list(coefs))
        assert_same(model, plain, model(**BATCH).loss, sum(by_hand(plain, BATCH, coefs)))


def test_only_training_has_the_loss(pair) -> None:
    model, plain = pair()
    assert torch.equal(model.eval()(**BATCH).loss, plain.eval()(**BATCH).loss)
    with torch.no_grad():
        assert torch.equal(model.train()(**BATCH).loss, plain(**BATCH).loss)
    with model.disable_adapter(), plain.disable_adapter():
        assert torch.equal(model(**BATCH).loss, plain(**BATCH).loss)
    assert last_aux_loss(model) is None


def test_an_encoder_decoder_leaves_the_padding_of_both_out(pair) -> None:
    model, plain = pair("t5", top_k=1)
    labels = torch.tensor([[5, 6, 7, 8], [9, 10, -100, -100], [11, 12, 13, -100]])
    batch = {**BATCH, "labels": labels}
    expected = sum(by_hand(plain, batch, {"default": COEF}, {6: MASK, 4: labels != -100}))
    assert_same(model, plain, model(**batch).loss, expected)


# --- in trainers

DOCUMENTS = [
    {"prompt": " ".join(f"w{4 + 5 * i + j}" for j in range(2 + i)),
     "completion": f" w{40 + i}" + " w50" * i}
    for i in range(4)
]  # fmt: skip
COMMON: dict[str, Any] = {
    "report_to": [], "use_cpu": True, "bf16": False, "disable_tqdm": True, "logging_steps": 1,
}  # fmt: skip


def config_with(coef: float, **settings: Any) -> TaskMoELoraConfig:
    small = {"task_dim": TASK_DIM, "num_experts": 3, "r": 2, "lora_dropout": 0.0}
    return TaskMoELoraConfig(**small, router_aux_loss_coef=coef, **settings)


@pytest.fixture
def sft(tiny_model, tiny_encoder, word_tokenizer, tmp_path):
    def make(coef: float = COEF, **settings: Any) -> SFTTrainer:
        arguments = {**COMMON, "per_device_train_batch_size": 3, **settings}
        data = Dataset.from_list(DOCUMENTS)
        trainer = SFTTrainer(
            tiny_model(),
            SFTConfig(str(tmp_path), **arguments),
            train_dataset=data,
            eval_dataset=data,
            processing_class=word_tokenizer,
            peft_config=config_with(coef, top_k=2),
        )
        attach_task_encoder(randomise(trainer.model), tiny_encoder, word_tokenizer)
        return trainer

    return make


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.slow
def test_it_reaches_the_gradients_of_sft(sft, checkpointing, tiny_encoder, word_tokenizer) -> None:
    """`SFTTrainer` computes its loss from log-probabilities; their gradient tells the weight."""
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
        texts = [
            word_tokenizer.decode(ids[m])
            for ids, m in zip(batch["input_ids"], prompts, strict=True)
        ]
        given = {**batch, "task_embeds": tiny_encoder(texts)}
        own, aux = by_hand(plain, given, {"default": COEF}, num_items_in_batch=items)
        (own + aux * (batch["labels"][:, 1:] != -100).sum() / items).backward()
    torch.testing.assert_close(gradients(model), gradients(plain), atol=1e-6, rtol=1e-6)


@pytest.mark.slow
def test_trainers_log_it(sft) -> None:
    """Once, however often it is asked for, the mean of the accumulated batches."""
    settings = {"max_steps": 3, "eval_strategy": "steps", "eval_steps": 1}
    trainer = log_routing(log_routing(sft(gradient_accumulation_steps=2, **settings)))
    trainer.train()
    training = [row for row in trainer.state.log_history if "loss" in row]
    assert len(training) == 3
    assert all(COEF < row["router_aux_loss"] < 3 * COEF for row in training)
    evaluations = [row for row in trainer.state.log_history if "eval_loss" in row]
    assert evaluations and not any("router_aux_loss" in row for row in evaluations)
    with pytest.raises(ValueError, match="has no Task-Aware MoELoRA adapter"):
        log_routing(type("T", (), {"model": torch.nn.Linear(2, 2)})())


def trainer_of(model, tokenizer, folder, collator=None, data=None, **settings: Any) -> Trainer:
    rows = []
    for row in DOCUMENTS:
        ids = tokenizer(row["prompt"] + row["completion"])["input_ids"]
        length = len(tokenizer(row["prompt"])["input_ids"])
        labels = [-100] * length + ids[length:]
        rows.append({"input_ids": ids, "labels": labels, "prompt": row["prompt"]})
    arguments = {**COMMON, "per_device_train_batch_size": 2, "num_train_epochs": 1, **settings}
    return Trainer(
        model,
        TrainingArguments(str(folder), **arguments),
        train_dataset=Dataset.from_list(rows) if data is None else data,
        data_collator=collator or DataCollatorForSeq2Seq(tokenizer),
        processing_class=tokenizer,
    )


@pytest.mark.slow
def test_the_loss_that_trainer_sees_contains_it(
    adapted, tiny_encoder, word_tokenizer, tmp_path
) -> None:
    shown = []
    for coef in (0.0, COEF):
        model = adapted(router_aux_loss_coef=coef)
        attach_task_encoder(model, tiny_encoder, word_tokenizer)
        settings = {"max_steps": 1, "gradient_accumulation_steps": 2}
        trainer = log_routing(trainer_of(model, word_tokenizer, tmp_path, **settings))
        trainer.train()
        shown.append(next(row for row in trainer.state.log_history if "loss" in row))
    # Two accumulated batches, each with its share of the labels
    assert "router_aux_loss" not in shown[0]
    added = shown[1]["loss"] - shown[0]["loss"]
    assert added == pytest.approx(shown[1]["router_aux_loss"], rel=0.2) and added > COEF


NO_EFFECT = r"`router_aux_loss_coef` of \['default'\] has no effect here.*set the coefficient to 0"


def test_a_model_that_is_not_trained_has_the_loss_and_no_gradient(adapted) -> None:
    """As where a frozen model is evaluated in training mode."""
    model = adapted(router_aux_loss_coef=COEF).train().requires_grad_(False)
    plain = adapted().train().requires_grad_(False)
    added = model(**BATCH).loss - plain(**BATCH).loss
    assert added.item() == pytest.approx(last_aux_loss(model), rel=1e-4) and added > 0.9 * COEF
    log, outputs = AuxLossLog(), {"log_probs": torch.zeros(2, 3), "label_mask": torch.ones(2, 3)}
    found = log.add_to_outputs(AuxLoss({"default": COEF}, value=0.5), dict(outputs))
    assert found["log_probs"] is outputs["log_probs"] and log.take_mean() == 0.5


def test_a_loss_of_the_models_logits_warns_that_it_has_no_effect(adapted) -> None:
    model = adapted(router_aux_loss_coef=COEF).train()
    with pytest.warns(UserWarning, match=NO_EFFECT):
        model(**BATCH).logits.square().mean().backward()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*router_aux_loss_coef")
        adapted(router_aux_loss_coef=COEF).train()(**BATCH).loss.backward()


def test_label_smoothing_warns_that_it_has_no_effect(
    adapted, tiny_encoder, word_tokenizer, tmp_path
) -> None:
    model = adapted(router_aux_loss_coef=COEF)
    data = trainer_of(model, word_tokenizer, tmp_path).train_dataset
    data = tiny_encoder.encode_dataset(data, column="prompt")
    collator = TaskCollator(DataCollatorForSeq2Seq(word_tokenizer))
    given = (model, word_tokenizer, tmp_path, collator, data)
    trainer = trainer_of(*given, label_smoothing_factor=0.1)
    with pytest.warns(UserWarning, match=NO_EFFECT) as found:
        log_routing(trainer).train()
    assert sum("router_aux_loss_coef" in str(warning.message) for warning in found) == 1
    assert not any("router_aux_loss" in row for row in trainer.state.log_history)


@needs_labels_in_dpo
def test_dpo_warns_that_it_has_no_effect(
    tiny_model, tiny_encoder, word_tokenizer, tmp_path
) -> None:
    rows = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": " w60"}
            for row in DOCUMENTS]  # fmt: skip
    found = []
    for coef in (0.0, COEF):
        trainer = DPOTrainer(
            tiny_model(),
            args=DPOConfig(str(tmp_path), **COMMON, per_device_train_batch_size=4),
            train_dataset=Dataset.from_list(rows),
            processing_class=word_tokenizer,
            peft_config=config_with(coef),
        )
        model = attach_task_encoder(randomise(trainer.model), tiny_encoder, word_tokenizer)
        batch = next(iter(trainer.get_train_dataloader()))
        loss = trainer.compute_loss(model.train().double(), dict(batch))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loss.backward()
        assert any("router_aux_loss_coef" in str(w.message) for w in caught) == bool(coef)
        found.append(gradients(model))
    torch.testing.assert_close(*found, atol=1e-9, rtol=1e-7)


@needs_labels_in_dpo
def test_weighted_losses_warn_that_it_has_no_effect(sft) -> None:
    """Of `"dft"`, which weighs each label by its probability, no common weight can be read off."""
    trainer = sft(loss_type="dft")
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(trainer.model.train(), dict(batch))
    with pytest.warns(UserWarning, match=NO_EFFECT):
        loss.backward()
