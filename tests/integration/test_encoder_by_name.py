"""An adapter whose config names its task encoder needs nothing but the import."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate.state import AcceleratorState
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import LlamaForCausalLM, pipeline
from trl import SFTConfig, SFTTrainer

from peft_taskmoe import TaskEncoder, TaskMoELoraConfig, attach_task_encoder
from tiny import VOCAB, randomise

PROMPTS = ["w4 w5 w6", "w9 w10 w11"]
IDS = torch.tensor([[4, 5, 6], [9, 10, 11]])
BATCH = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
GREEDY = {"max_new_tokens": 4, "do_sample": False}


@pytest.fixture(autouse=True)
def in_a_folder(tiny_model, word_tokenizer, tmp_path, monkeypatch) -> None:
    """The folders of a base and its tokenizer, and of encoders of 6 and 4 dimensions."""
    monkeypatch.chdir(tmp_path)
    tiny_model().save_pretrained("base")
    for seed, (name, width) in enumerate({"wide": 6, "slim": 4}.items()):
        torch.manual_seed(seed)
        config = transformers.BertConfig(
            vocab_size=VOCAB, hidden_size=width, num_hidden_layers=1, num_attention_heads=1,
            intermediate_size=8, initializer_range=1.0,
        )  # fmt: skip
        transformers.BertModel(config).save_pretrained(name)
    for name in ("base", "wide", "slim"):
        word_tokenizer.save_pretrained(name)


def base() -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained("base")


def config(encoder: Any, **settings: Any) -> TaskMoELoraConfig:
    return TaskMoELoraConfig(
        task_type="CAUSAL_LM", task_encoder=encoder, num_experts=3, r=2, lora_dropout=0.0,
        lora_alpha=16, **settings,
    )  # fmt: skip


def adapted(encoder: Any = "wide", **settings: Any) -> PeftModel:
    return randomise(get_peft_model(base(), config(encoder, **settings))).eval()


def logits(model: Any, **extra: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**BATCH, **extra).logits


@pytest.fixture
def saved() -> tuple[torch.Tensor, torch.Tensor]:
    """The folder `adapter`; the logits and tokens that it should give."""
    model = adapted()
    model.save_pretrained("adapter")
    embeds = TaskEncoder("wide")(PROMPTS)
    return logits(model, task_embeds=embeds), model.generate(**BATCH, **GREEDY, task_embeds=embeds)


@pytest.mark.parametrize("given", ["wide", {"name_or_path": "wide", "pooling": "max"}])
def test_the_encoder_is_loaded_once_when_a_router_first_needs_a_task(given, caplog) -> None:
    model = adapted(given)
    names = [name for name, _ in model.named_parameters()]
    settings = {} if isinstance(given, str) else {"pooling": "max"}
    embeds = TaskEncoder("wide", **settings)(PROMPTS)
    expected = logits(model, task_embeds=embeds)
    with caplog.at_level(logging.INFO, "peft_taskmoe"):
        assert not caplog.messages
        assert torch.equal(logits(model), expected)
        assert torch.equal(logits(model), expected)
        tokens = model.generate(**BATCH, **GREEDY)
    assert caplog.messages == ['Loading the task encoder "wide".']
    assert torch.equal(tokens, model.generate(**BATCH, **GREEDY, task_embeds=embeds))
    assert not torch.allclose(logits(model, task_embeds=embeds.flip(0)), expected, atol=1e-3)
    assert [name for name, _ in model.named_parameters()] == names == list(model.state_dict())


def test_the_dimension_is_the_encoders(tmp_path) -> None:
    assert adapted("wide").peft_config["default"].task_dim == 6
    assert adapted("slim").peft_config["default"].task_dim == 4
    assert adapted(None).peft_config["default"].task_dim == 768
    with pytest.raises(OSError, match=r"width of the task encoder `\S*nowhere` cannot be read"):
        adapted(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"4 dimensions, but .*`task_dim=6`"):
        logits(adapted("slim", task_dim=6))


def test_without_an_encoder_or_a_name_the_error_says_what_to_do(tmp_path, tiny_model) -> None:
    missing = str(tmp_path / "nowhere")
    with pytest.raises(OSError, match=r"`\S*nowhere` cannot be loaded"):
        logits(adapted(missing, task_dim=6))
    with pytest.raises(ValueError, match=r"no task embedding.*name a `task_encoder`"):
        logits(adapted(None, task_dim=6))
    nameless = get_peft_model(tiny_model(), config("wide")).eval()
    with pytest.raises(ValueError, match="base model has no name to load its tokenizer from"):
        logits(nameless)


@pytest.mark.parametrize("way", ["from_pretrained", "load_adapter", "transformers"])
def test_a_loaded_adapter_needs_nothing_else(way, saved) -> None:
    model: Any = base()
    if way == "transformers":
        model.load_adapter("adapter")
    elif way == "from_pretrained":
        model = PeftModel.from_pretrained(model, "adapter")
    else:
        model = get_peft_model(model, config("slim"))
        model.load_adapter("adapter", "other")
        model.set_adapter("other")
    model.eval()
    assert torch.equal(logits(model), saved[0])
    assert torch.equal(model.generate(**BATCH, **GREEDY), saved[1])


def test_a_pipeline_on_the_adapters_folder(saved, word_tokenizer) -> None:
    pipe = pipeline("text-generation", model="adapter", tokenizer="base", device="cpu")
    found = pipe(PROMPTS, batch_size=2, return_full_text=False, **GREEDY)
    texts = [row[0]["generated_text"].split() for row in found]
    expected = word_tokenizer.batch_decode(saved[1][:, 3:], skip_special_tokens=True)
    assert texts == [text.split() for text in expected]


def test_sft_trainer_from_names_alone() -> None:
    AcceleratorState._reset_state()  # older ones keep the precision of another test's trainer
    rows = [{"prompt": prompt, "completion": f" w{40 + i}"} for i, prompt in enumerate(PROMPTS)]
    args = SFTConfig(
        "out", max_steps=3, logging_steps=1, learning_rate=1e-2, use_cpu=True, bf16=False,
        report_to=[], disable_tqdm=True,
    )  # fmt: skip
    data = Dataset.from_list(rows)
    trainer = SFTTrainer("base", args=args, train_dataset=data, peft_config=config("wide"))
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < losses[0]
    trainer.save_model("trained")
    loaded = PeftModel.from_pretrained(base(), "trained").eval()
    torch.testing.assert_close(logits(loaded), logits(trainer.model.eval()))


@pytest.fixture
def two() -> tuple[PeftModel, dict[str, torch.Tensor]]:
    """A model with the adapters `first` and `second`, and the embeddings of their own encoders."""
    model = get_peft_model(base(), config("wide"), adapter_name="first")
    model.add_adapter("second", config("slim"))
    embeds = {"first": TaskEncoder("wide")(PROMPTS), "second": TaskEncoder("slim")(PROMPTS)}
    return randomise(model).eval(), embeds


def test_every_adapter_is_routed_by_its_own_encoder(two) -> None:
    model, embeds = two
    alone = {}
    for name in ("first", "second", "first"):
        model.set_adapter(name)
        alone[name] = logits(model, task_embeds=embeds[name])
        assert torch.equal(logits(model), alone[name])
    names = ["second", "first"]
    by_row = logits(model, adapter_names=names)
    expected = torch.stack([alone["second"][0], alone["first"][1]])
    torch.testing.assert_close(by_row, expected, atol=1e-5, rtol=1e-4)
    tokens = model.generate(**BATCH, **GREEDY, adapter_names=names)
    for i, name in enumerate(names):
        model.set_adapter(name)
        row = {key: value[i : i + 1] for key, value in BATCH.items()}
        assert torch.equal(tokens[i], model.generate(**row, **GREEDY)[0])


def test_several_active_adapters_and_embeddings_by_adapter(two) -> None:
    """`task_embeds` may be a dict by adapter; one tensor of two dimensions cannot serve both."""
    model, embeds = two
    model.base_model.set_adapter(["first", "second"])
    found = logits(model)
    assert torch.equal(logits(model, task_embeds=embeds), found)
    other = {**embeds, "second": embeds["second"].flip(0)}
    assert not torch.allclose(logits(model, task_embeds=other), found, atol=1e-3)
    tokens = model.generate(**BATCH, **GREEDY)
    assert torch.equal(model.generate(**BATCH, **GREEDY, task_embeds=embeds), tokens)
    with pytest.raises(ValueError, match=r'6 dimensions, but .* adapter "second" has `task_dim=4`'):
        logits(model, task_embeds=embeds["first"])
    with pytest.raises(ValueError, match=r'no task embedding.* adapter "second"'):
        logits(model, task_embeds={"first": embeds["first"]})
    with pytest.raises(ValueError, match=r"3 task embeddings for a batch of 2 rows"):
        logits(model, task_embeds={**embeds, "second": torch.randn(3, 4)})


def test_adapters_whose_configs_agree_share_an_encoder(caplog) -> None:
    model = get_peft_model(base(), config("wide"), adapter_name="first")
    model.add_adapter("second", config("wide"))
    with caplog.at_level(logging.INFO, "peft_taskmoe"):
        for name in ("first", "second"):
            model.set_adapter(name)
            logits(model.eval())
    assert len(caplog.messages) == 1


def test_what_is_saved_names_the_attached_encoder() -> None:
    model = adapted("slim", task_dim=6)  # the wrong one
    attach_task_encoder(model, TaskEncoder("wide"))
    expected = logits(model)
    model.save_pretrained("adapter")
    assert torch.equal(logits(PeftModel.from_pretrained(base(), "adapter").eval()), expected)


def test_a_loaded_encoder_follows_the_model_and_an_attached_one_stays(monkeypatch) -> None:
    moves: list[Any] = []
    monkeypatch.setattr(TaskEncoder, "to", lambda self, device: moves.append(device))
    model = adapted()
    logits(model)
    assert moves == [torch.device("cpu")]
    attach_task_encoder(model, TaskEncoder("wide"))
    logits(model)
    assert len(moves) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU to move to")
def test_a_moved_model_takes_its_encoder_along() -> None:
    model = adapted()
    expected = logits(model)
    on_gpu = {key: value.cuda() for key, value in BATCH.items()}
    found = model.cuda()(**on_gpu).logits.cpu()
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_the_adapters_dtype_is_not_the_encoders() -> None:
    """`model.half()` and the like leave the encoder in float32: its vectors stay what they were."""
    model = adapted()
    expected = TaskEncoder("wide")(PROMPTS)
    found = logits(model.bfloat16())
    assert torch.equal(found, logits(model, task_embeds=expected))


def test_saving_writes_no_weights_of_the_encoder(saved) -> None:
    from safetensors.torch import load_file

    model = PeftModel.from_pretrained(base(), "adapter").eval()
    logits(model)
    model.save_pretrained("again")
    keys = load_file(Path("again", "adapter_model.safetensors"))
    assert len(keys) == 42 and all("taskmoe_lora_" in key for key in keys)
