"""The trainers people use, with an attached encoder and with a column of embeddings.

A step is held against the plain forward with explicit `task_embeds`.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import (
    BertForTokenClassification,
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
)
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from peft_taskmoe import TaskCollator, TaskMoELoraConfig, attach_task_encoder
from tiny import TASK_DIM, randomise
from versions import (
    needs_labels_in_dpo,
    needs_new_checkpointing,
    needs_one_batch_in_dpo,
    needs_own_integration,
)

COMMON: dict[str, Any] = {
    "report_to": [],
    "use_cpu": True,
    "learning_rate": 1e-2,
    "disable_tqdm": True,
}
FP32 = {**COMMON, "bf16": False}
PROMPTS = [" ".join(f"w{4 + 5 * i + j}" for j in range(2 + i)) for i in range(4)]
TEXTS = Dataset.from_list(
    [{"prompt": prompt, "completion": f" w{40 + i} w{50 + i}"} for i, prompt in enumerate(PROMPTS)]
)
PREFERENCES = Dataset.from_list(
    [
        {"prompt": p, "chosen": f" w{40 + i} w{45 + i} w{46 + i}", "rejected": f" w{50 + i}"}
        for i, p in enumerate(PROMPTS)
    ]
)


def config(**settings: Any) -> TaskMoELoraConfig:
    return TaskMoELoraConfig(
        **{"task_dim": TASK_DIM, "num_experts": 3, "r": 2, "lora_dropout": 0.0, **settings}
    )


@pytest.fixture
def attach(tiny_encoder, word_tokenizer):
    return lambda model: attach_task_encoder(model, tiny_encoder, word_tokenizer)


@pytest.fixture
def tokenized(word_tokenizer):
    """Rows for `Trainer`: ids, labels with the prompt masked, and the prompt."""
    rows = []
    for row in TEXTS:
        prompt, answer = (word_tokenizer(row[key])["input_ids"] for key in ("prompt", "completion"))
        rows.append(
            {
                "input_ids": prompt + answer,
                "labels": [-100] * len(prompt) + answer,
                "prompt": row["prompt"],
            }
        )
    return Dataset.from_list(rows)


def adapter_of(model) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if "taskmoe_lora_" in n}


def changed(before: dict[str, torch.Tensor], model) -> bool:
    return all(not torch.equal(before[name], weight) for name, weight in adapter_of(model).items())


def losses(trainer: Trainer, key: str = "loss") -> list[float]:
    return [row[key] for row in trainer.state.log_history if key in row]


def gradients(model) -> dict[str, torch.Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.fixture
def sft(tiny_model, word_tokenizer, tmp_path):
    def make(data=TEXTS, collator=None, model=None, **settings: Any) -> SFTTrainer:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            trainer = SFTTrainer(
                model or tiny_model(),
                SFTConfig(str(tmp_path), **{**FP32, "per_device_train_batch_size": 4, **settings}),
                train_dataset=data,
                data_collator=collator,
                processing_class=word_tokenizer,
                peft_config=None if model is not None else config(),
            )
        randomise(trainer.model)
        return trainer

    return make


# --- SFTTrainer


@pytest.mark.parametrize("when", ["before", "after"])
def test_sft_with_default_arguments(tiny_model, word_tokenizer, attach, tmp_path, when) -> None:
    """bf16 autocast, gradient checkpointing, fused LM head; the adapter made before or after."""
    adapted = when == "before"
    model = attach(get_peft_model(tiny_model(), config())) if adapted else tiny_model()
    args = SFTConfig(str(tmp_path), max_steps=4, logging_steps=1, **COMMON)
    assert args.bf16 and args.gradient_checkpointing and args.remove_unused_columns
    trainer = SFTTrainer(
        model, args, train_dataset=TEXTS, eval_dataset=TEXTS, processing_class=word_tokenizer,
        peft_config=None if adapted else config(),
    )  # fmt: skip
    if not adapted:
        attach(trainer.model)
    before = adapter_of(trainer.model)
    start = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < start and len(losses(trainer)) == 4
    assert changed(before, trainer.model)


def test_the_fused_loss_is_that_of_the_plain_forward(sft, attach, tiny_encoder) -> None:
    """TRL calls the backbone behind the model's back; the loss and its gradients are the same."""
    trainer = sft()
    model = attach(trainer.model).train()
    batch = dict(next(iter(trainer.get_train_dataloader())))
    trainer.compute_loss(model, dict(batch)).backward()
    fused = gradients(model)
    plain = model(**batch, task_embeds=tiny_encoder(PROMPTS)[trainer_order(batch, trainer)])
    plain.loss.backward()
    torch.testing.assert_close(fused, gradients(model), atol=1e-5, rtol=1e-4)
    wrong = model(
        **batch, task_embeds=tiny_encoder(PROMPTS)[trainer_order(batch, trainer)].flip(0)
    ).loss
    assert abs(wrong - plain.loss) > 1e-4


def trainer_order(batch, trainer) -> list[int]:
    """The number of the prompt of each row."""
    decode = trainer.processing_class.decode
    return [PROMPTS.index(decode(ids[(labels == -100) & mask.bool()])) for ids, labels, mask in zip(
        batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True
    )]  # fmt: skip


def test_two_trainers_on_one_model(sft, attach) -> None:
    """Each puts a forward of its own over the model's."""
    first = sft()
    model = attach(first.model)
    batch = dict(next(iter(first.get_train_dataloader())))
    expected = first.compute_loss(model, dict(batch))
    second = sft(model=model)
    randomise(model)
    assert torch.equal(second.compute_loss(model, dict(batch)), expected)
    ids = batch["input_ids"][:, :2]
    generated = model.generate(input_ids=ids, max_new_tokens=3)
    assert (
        torch.equal(model.generate(input_ids=ids, max_new_tokens=3), generated)
        and generated.shape[1] == 5
    )
    restored = model.unload()
    assert torch.isfinite(restored(**batch).loss)  # nothing of the adapter is left in the way


@pytest.mark.slow
def test_sft_with_a_column_of_embeddings(sft, tiny_encoder) -> None:
    data = tiny_encoder.encode_dataset(TEXTS, column="prompt")
    trainer = sft(
        data,
        TaskCollator(DataCollatorForLanguageModeling(pad_token_id=0)),
        remove_unused_columns=False,
    )
    batch = dict(next(iter(trainer.get_train_dataloader())))
    torch.testing.assert_close(
        batch["task_embeds"], tiny_encoder(PROMPTS)[trainer_order(batch, trainer)]
    )
    expected = trainer.model(**batch).loss
    torch.testing.assert_close(trainer.compute_loss(trainer.model, dict(batch)), expected)
    trainer.train()
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] < expected


@needs_own_integration
def test_sft_on_an_adapter_without_a_peft_model(sft, tiny_model, attach, tiny_encoder) -> None:
    """After `add_adapter` TRL's forward hides the model's; attaching wraps it again."""
    model = tiny_model()
    model.add_adapter(config())
    trainer = sft(model=model)
    batch = dict(next(iter(trainer.get_train_dataloader())))
    with pytest.raises(ValueError, match="no task embedding"):
        trainer.compute_loss(model, dict(batch))
    attach(trainer.model)
    found = trainer.compute_loss(model, dict(batch))
    torch.testing.assert_close(
        found, model(**batch, task_embeds=tiny_encoder(PROMPTS)[trainer_order(batch, trainer)]).loss
    )


def test_sft_without_any_task_says_what_to_do(sft) -> None:
    trainer = sft()
    with pytest.raises(
        ValueError, match=r"This forward has no task embedding.*attach_task_encoder\(model\)"
    ):
        trainer.train()


def test_metrics_see_logits_of_the_same_task(sft, attach) -> None:
    """For `compute_metrics` TRL runs the model again, without labels."""
    trainer = sft(loss_type="nll")
    model = attach(trainer.model)
    batch = dict(next(iter(trainer.get_train_dataloader())))
    with torch.no_grad():
        expected = model(**batch).logits
    trainer.model.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        _, logits, _ = trainer.prediction_step(model, dict(batch), prediction_loss_only=False)
    torch.testing.assert_close(logits, expected)
    unlabelled = {key: value.clone() for key, value in batch.items() if key != "labels"}
    with torch.no_grad():
        whole = model(**unlabelled).logits  # another tensor: everything is prompt
    assert not torch.allclose(whole, expected, atol=1e-3)


@pytest.mark.slow
def test_label_smoothing_needs_the_column(sft, attach, tiny_encoder) -> None:
    trainer = sft(label_smoothing_factor=0.1)
    attach(trainer.model)
    with pytest.raises(
        ValueError, match=r"`input_ids` without `labels`.*read the answers.*`TaskCollator`"
    ):
        trainer.train()
    data = tiny_encoder.encode_dataset(TEXTS, column="prompt")
    collator = TaskCollator(DataCollatorForLanguageModeling(pad_token_id=0))
    trainer = sft(
        data, collator, label_smoothing_factor=0.1, remove_unused_columns=False, num_train_epochs=1
    )
    before = adapter_of(trainer.model)
    trainer.train()
    assert changed(before, trainer.model)


@needs_labels_in_dpo
def test_dft_loss(sft, attach) -> None:
    trainer = sft(loss_type="dft", max_steps=2)
    before = adapter_of(attach(trainer.model))
    trainer.train()
    assert changed(before, trainer.model)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"use_reentrant": True},
        {"use_reentrant": False},
        pytest.param({"selective": True}, marks=needs_new_checkpointing),
    ],
)
def test_checkpointing_in_sft_changes_no_gradient(sft, attach, kwargs) -> None:
    found = []
    for settings in ({"gradient_checkpointing": False}, {"gradient_checkpointing_kwargs": kwargs}):
        trainer = sft(**settings)
        model = attach(trainer.model)
        if trainer.args.gradient_checkpointing:
            model.gradient_checkpointing_enable(
                trainer.args.gradient_checkpointing_kwargs
            )  # as `train` does
            assert model.get_base_model().model.gradient_checkpointing
        model.train().double()  # the ways differ in float32's rounding
        batch = dict(next(iter(trainer.get_train_dataloader())))
        trainer.compute_loss(model, dict(batch)).backward()
        found.append(gradients(model))
    torch.testing.assert_close(found[0], found[1], atol=1e-9, rtol=1e-9)


# --- DPOTrainer


@pytest.fixture
def dpo(tiny_model, word_tokenizer, tmp_path):
    def make(data=PREFERENCES, collator=None, **settings: Any) -> DPOTrainer:
        arguments = {**FP32, "per_device_train_batch_size": 4, **settings}
        trainer = DPOTrainer(
            tiny_model(), args=DPOConfig(str(tmp_path), **arguments), train_dataset=data,
            data_collator=collator, processing_class=word_tokenizer, peft_config=config(),
        )  # fmt: skip
        randomise(trainer.model)
        return trainer

    return make


def log_probs_of(model, batch, **task: Any) -> torch.Tensor:
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    logits = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **task
    ).logits[:, :-1]
    picked = logits.log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
    return (picked * (labels[:, 1:] != -100)).sum(1)


@pytest.mark.parametrize(
    "way",
    [
        pytest.param("automatic", marks=needs_labels_in_dpo),
        pytest.param("column", marks=needs_one_batch_in_dpo),
    ],
)
def test_dpo_routes_by_the_prompt_and_refers_to_the_base(dpo, attach, tiny_encoder, way) -> None:
    if way == "automatic":
        trainer = dpo()
        model = attach(trainer.model)
    else:
        data = tiny_encoder.encode_dataset(PREFERENCES, column="prompt")
        trainer = dpo(
            data,
            TaskCollator(DataCollatorForPreference(pad_token_id=0)),
            remove_unused_columns=False,
        )
        model = trainer.model
    batch = dict(next(iter(trainer.get_train_dataloader())))
    prompts = [
        trainer.processing_class.decode(ids[(mask == 0) & seen.bool()])
        for ids, mask, seen in zip(
            batch["input_ids"], batch["completion_mask"], batch["attention_mask"], strict=True
        )
    ]
    assert prompts[:4] == prompts[4:] and set(prompts) == set(PROMPTS)
    embeds = tiny_encoder(prompts)
    if way == "column":
        torch.testing.assert_close(batch["task_embeds"], embeds)
    with torch.no_grad():
        policy = log_probs_of(model, batch, task_embeds=embeds)
        with model.disable_adapter():
            reference = log_probs_of(model, batch)
        chosen, rejected = ((policy - reference)[:4], (policy - reference)[4:])
        expected = -torch.nn.functional.logsigmoid(trainer.beta * (chosen - rejected)).mean()
        wrong = log_probs_of(model, batch, task_embeds=embeds.flip(0))
        assert not torch.allclose(wrong, policy, atol=1e-3)
    found = trainer.compute_loss(model, dict(batch))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    found.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@needs_labels_in_dpo
def test_dpo_trains_with_default_arguments(dpo, attach) -> None:
    trainer = dpo(
        bf16=True, max_steps=4, logging_steps=1, eval_strategy="no", precompute_ref_log_probs=True
    )
    before = adapter_of(attach(trainer.model))
    trainer.train()
    assert changed(before, trainer.model) and losses(trainer)[-1] < losses(trainer)[0]


@needs_labels_in_dpo
def test_dpo_on_a_trained_adapter_keeps_a_copy_as_reference(
    tiny_model, word_tokenizer, attach, tmp_path
) -> None:
    """TRL adds it as a second adapter "ref" and switches between the two; both read the task."""
    model = attach(randomise(get_peft_model(tiny_model(), config())))
    args = DPOConfig(str(tmp_path), **FP32, per_device_train_batch_size=4, max_steps=3)
    settings = {"train_dataset": PREFERENCES, "processing_class": word_tokenizer}
    trainer = DPOTrainer(model, args=args, **settings)
    assert set(trainer.model.peft_config) == {"default", "ref"}

    def weights(adapter: str) -> dict[str, torch.Tensor]:
        found = adapter_of(trainer.model).items()
        return {n.replace(adapter, ""): w for n, w in found if f".{adapter}." in n}

    start = weights("default")
    torch.testing.assert_close(weights("ref"), start)
    batch = dict(next(iter(trainer.get_train_dataloader())))
    loss = trainer.compute_loss(trainer.model, dict(batch)).item()
    assert loss == pytest.approx(math.log(2), abs=1e-5)  # policy and reference agree
    trainer.train()
    assert all(not torch.equal(weight, start[name]) for name, weight in weights("default").items())
    torch.testing.assert_close(weights("ref"), start)


# --- Trainer, Seq2SeqTrainer


@pytest.fixture
def trainer(adapted, word_tokenizer, tokenized, tmp_path):
    def make(model=None, data=None, collator=None, **settings: Any) -> Trainer:
        arguments = {
            **COMMON,
            "per_device_train_batch_size": 2,
            "logging_steps": 1,
            "max_steps": 4,
            **settings,
        }
        return Trainer(
            model or adapted(),
            TrainingArguments(str(tmp_path), **arguments),
            train_dataset=data or tokenized,
            eval_dataset=data or tokenized,
            data_collator=collator or DataCollatorForSeq2Seq(word_tokenizer),
            processing_class=word_tokenizer,
        )

    return make


def test_trainer_finds_the_task_itself(trainer, adapted, attach) -> None:
    model = attach(adapted())
    before = adapter_of(model)
    found = trainer(model)
    start = found.evaluate()["eval_loss"]
    found.train()
    assert found.evaluate()["eval_loss"] < start and changed(before, model)


def test_trainer_keeps_a_column_of_embeddings(
    trainer, tokenized, word_tokenizer, tiny_encoder
) -> None:
    """The signature of the model's forward names it, so `remove_unused_columns` may stay."""
    data = tiny_encoder.encode_dataset(tokenized, column="prompt")
    found = trainer(data=data, collator=TaskCollator(DataCollatorForSeq2Seq(word_tokenizer)))
    assert found.args.remove_unused_columns
    batch = next(iter(found.get_train_dataloader()))
    assert batch["task_embeds"].shape == (2, TASK_DIM)
    start = found.evaluate()["eval_loss"]
    found.train()
    assert found.evaluate()["eval_loss"] < start


def test_group_by_length_and_the_best_model_at_the_end(trainer, adapted, attach) -> None:
    model = attach(adapted())
    grouped: dict[str, Any] = {"train_sampling_strategy": "group_by_length"}
    if "train_sampling_strategy" not in TrainingArguments.__dataclass_fields__:
        grouped = {"group_by_length": True}  # before transformers 5
    found = trainer(
        model, max_steps=6, **grouped, eval_strategy="steps",
        eval_steps=2, save_steps=2, load_best_model_at_end=True, metric_for_best_model="eval_loss",
        learning_rate=0.3,
    )  # fmt: skip
    found.train()
    best = min(losses(found, "eval_loss"))
    assert found.state.best_metric == best
    assert found.evaluate()["eval_loss"] == pytest.approx(
        best, abs=1e-5
    )  # the encoder is still attached, too


@pytest.mark.slow
def test_a_resumed_run_ends_where_an_unbroken_one_does(
    trainer, adapted, attach, tiny_model, tmp_path
) -> None:
    steps = {"max_steps": 6, "save_steps": 3, "save_strategy": "steps"}
    whole = trainer(attach(adapted(lora_dropout=0.2)), **steps)
    whole.train()
    resumed = trainer(attach(adapted(lora_dropout=0.2)), **steps)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    torch.testing.assert_close(adapter_of(resumed.model), adapter_of(whole.model))
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path / "checkpoint-6")
    torch.testing.assert_close(adapter_of(loaded), adapter_of(resumed.model))


@pytest.mark.slow
def test_gradients_accumulate(trainer, adapted, attach) -> None:
    """Two batches of two with one step equal one batch of four."""
    weights = []
    for size, steps in ((2, 2), (4, 1)):
        torch.manual_seed(0)
        model = attach(adapted())
        trainer(
            model, per_device_train_batch_size=size, gradient_accumulation_steps=steps, max_steps=2,
            train_sampling_strategy="sequential", optim="sgd", lr_scheduler_type="constant",
        ).train()  # fmt: skip
        weights.append(adapter_of(model))
    torch.testing.assert_close(weights[0], weights[1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("way", ["automatic", "column"])
@pytest.mark.slow
def test_seq2seq_trainer_predicts_with_generate(
    adapted, attach, tokenized, word_tokenizer, tiny_encoder, tmp_path, way
) -> None:
    rows = [
        {"input_ids": r["input_ids"][:-2], "labels": r["input_ids"][-2:], "prompt": r["prompt"]}
        for r in tokenized
    ]
    data = Dataset.from_list(rows)
    model = adapted("t5")
    collator: Any = DataCollatorForSeq2Seq(word_tokenizer, model)
    if way == "automatic":
        attach(model)
    else:
        data, collator = tiny_encoder.encode_dataset(data, column="prompt"), TaskCollator(collator)
    arguments = Seq2SeqTrainingArguments(
        str(tmp_path), predict_with_generate=True, generation_max_length=5,
        per_device_eval_batch_size=4, max_steps=4, generation_num_beams=2, logging_steps=1,
        **COMMON,
    )  # fmt: skip
    trainer = Seq2SeqTrainer(
        model,
        arguments,
        train_dataset=data,
        eval_dataset=data,
        data_collator=collator,
        processing_class=word_tokenizer,
    )
    start = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < start
    predicted = torch.tensor(trainer.predict(data).predictions)
    batch = word_tokenizer(PROMPTS, padding=True, return_tensors="pt")
    expected = model.eval().generate(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
        task_embeds=tiny_encoder(PROMPTS), max_length=5, num_beams=2,
    )  # fmt: skip
    expected = torch.nn.functional.pad(expected, (0, predicted.shape[1] - expected.shape[1]))
    assert torch.equal(predicted.clamp(min=0), expected)


def test_a_token_classifiers_task_is_its_whole_text(tiny_model, attach, tiny_encoder) -> None:
    """Its labels stand at every token and mark no answer."""
    tagger = BertForTokenClassification(tiny_model("bert").config)
    model = attach(randomise(get_peft_model(tagger, config()))).eval()
    ids = torch.arange(4, 12).view(2, 4)
    expected = model(
        input_ids=ids, task_embeds=tiny_encoder(["w4 w5 w6 w7", "w8 w9 w10 w11"])
    ).logits
    torch.testing.assert_close(model(input_ids=ids, labels=torch.ones_like(ids)).logits, expected)
