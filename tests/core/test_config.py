"""`TaskMoELoraConfig`: fields and their effects, errors, and the JSON file."""

from __future__ import annotations

import dataclasses
import json
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn

from peft_taskmoe import TaskEncoderConfig, TaskMoELoraConfig, task_context
from peft_taskmoe.layer import Linear, TaskMoELoraLayer
from tiny import TASK_DIM

OWN_FIELDS = {f.name for f in dataclasses.fields(TaskMoELoraConfig)} - {
    f.name for f in dataclasses.fields(PeftConfig)
}


def layers(model: nn.Module) -> dict[str, Linear]:
    """The adapted layers by their short name, e.g. `0.self_attn.q_proj`."""
    found = {n: m for n, m in model.named_modules() if isinstance(m, TaskMoELoraLayer)}
    return {
        name.partition("layers.")[2] or name.rpartition(".")[2]: layer
        for name, layer in found.items()
    }


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def _list_changes(model, fresh) -> None:
    assert set(layers(model)) == {"0.self_attn.q_proj", "1.self_attn.q_proj"}


def _only_layer_1(model, fresh) -> None:
    assert set(layers(model)) == {"1.self_attn.q_proj", "1.self_attn.v_proj"}


def _adapters_differ(model, fresh) -> None:
    assert any(layer.taskmoe_lora_B["default"].weight.any() for layer in layers(model).values())
    assert not any(layer.taskmoe_lora_B["default"].weight.any() for layer in layers(fresh).values())


def _shape(model, a, b, router) -> None:
    parts = layers(model)["0.self_attn.q_proj"].weights_of("default")
    assert tuple(tuple(weight.shape) for weight in parts) == (a, b, router)


def _each(holds) -> Callable[[PeftModel, PeftModel], None]:
    def check(model, fresh) -> None:
        assert layers(model) and all(holds(layer) for layer in layers(model).values())

    return check


def _of_k_and_q(attribute: str, k: float, q: float) -> Callable[[PeftModel, PeftModel], None]:
    def check(model, fresh) -> None:
        found = [layers(model)[f"0.self_attn.{name}_proj"] for name in "kq"]
        assert [getattr(layer, attribute) for layer in found] == [{"default": k}, {"default": q}]

    return check


def _head_trains(model, fresh) -> None:
    names = {name for name in trainable(model) if "lm_head" in name}
    assert names == {"base_model.model.lm_head.modules_to_save.default.weight"}


def _two_tokens_train(model, fresh) -> None:
    found = [p.shape for n, p in model.named_parameters() if p.requires_grad and "embed" in n]
    assert found == [(2, 16)]


def _biases_train(model, fresh) -> None:
    assert any("bias" in n for n in trainable(model)) > any("bias" in n for n in trainable(fresh))


def _encoder_is_kept(model, fresh) -> None:
    named = model.peft_config["default"].task_encoder
    assert named == TaskEncoderConfig(name_or_path="x")


def _loss_grows(model, fresh) -> None:
    ids, loss = torch.arange(4, 12).view(1, 8), []
    for each in (fresh, model):
        embeds = torch.ones(1, TASK_DIM)
        loss.append(each.train()(input_ids=ids, labels=ids, task_embeds=embeds).loss.item())
    assert loss[1] - loss[0] >= 0.5 - 1e-5  # the least that perfect balance costs


def _dropout_is_drawn(model, fresh) -> None:
    x = torch.randn(1, 4, 16)
    for each, differs in ((model, True), (fresh, False)):
        layer = layers(each)["0.self_attn.q_proj"].train()
        layer.reset_parameters("default", init_weights=False)
        with task_context(torch.ones(1, TASK_DIM)):
            assert torch.equal(layer(x), layer(x)) != differs


# For every field: a value that is not the default, and what it changes in a tiny Llama. Fields
# whose effect is numeric (`top_k`, `task_norm`, ...) are held to the reference in test_layer.py;
# here it is that they arrive.
Q_AND_V = {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]}
EFFECTS: dict[str, tuple[Any, Callable[[PeftModel, PeftModel], None]]] = {
    "num_experts": (3, lambda m, f: _shape(m, (12, 16), (16, 12), (3, 22))),
    "r": (2, lambda m, f: _shape(m, (16, 16), (16, 16), (8, 22))),
    "lora_alpha": (20, _each(lambda layer: layer.scaling["default"] == 5.0)),
    "lora_dropout": (0.5, _dropout_is_drawn),
    "router_inputs": ("task", lambda m, f: _shape(m, (32, 16), (16, 32), (8, TASK_DIM))),
    "top_k": (2, _each(lambda layer: layer.shapes["default"].top_k == 2)),
    "router_aux_loss_coef": (0.5, _loss_grows),
    "task_dim": (9, lambda m, f: _shape(m, (32, 16), (16, 32), (8, 25))),
    "task_norm": ("none", _each(lambda layer: layer.configs["default"].task_norm == "none")),
    "task_encoder": ({"name_or_path": "x"}, _encoder_is_kept),
    "target_modules": (["q_proj"], _list_changes),
    "exclude_modules": (r".*(mlp|[kvo]_proj).*", _list_changes),
    "layers_to_transform": (Q_AND_V, _only_layer_1),
    "layers_pattern": ({**Q_AND_V, "layers_pattern": "layers"}, _only_layer_1),
    "rank_pattern": ({"rank_pattern": {"k_proj": 1}}, _of_k_and_q("r", 1, 4)),
    "alpha_pattern": ({"alpha_pattern": {"k_proj": 4}}, _of_k_and_q("scaling", 1.0, 8.0)),
    "modules_to_save": (["lm_head"], _head_trains),
    "trainable_token_indices": ([1, 5], _two_tokens_train),
    "bias": ("all", _biases_train),
    "init_weights": (False, _adapters_differ),
    "use_rslora": (True, _each(lambda layer: layer.scaling["default"] == 16.0)),
    # the injection knows it for nn.Linear and Conv1D and corrects it
    "fan_in_fan_out": (True, _each(lambda layer: not layer.configs["default"].fan_in_fan_out)),
}


@pytest.mark.parametrize("field", sorted(OWN_FIELDS))
def test_every_field_does_something(field, tiny_model) -> None:
    value, check = EFFECTS[field]
    settings = value if isinstance(value, dict) and field in value else {field: value}
    changes = {"attention_bias": True} if field == "bias" else {}
    usual = {"task_dim": TASK_DIM, "lora_dropout": 0.0}
    fresh, model = (
        get_peft_model(tiny_model("llama", **changes), TaskMoELoraConfig(**{**usual, **more}))
        for more in ({}, settings)
    )
    check(model, fresh)


def test_only_the_adapters_biases_train_with_taskmoe_lora_only(tiny_model) -> None:
    config = TaskMoELoraConfig(bias="taskmoe_lora_only", target_modules=["q_proj"])
    model = get_peft_model(tiny_model("llama", attention_bias=True), config)
    biases = {name for name in trainable(model) if name.endswith("bias")}
    of_q = "base_model.model.model.layers.{}.self_attn.q_proj.base_layer.bias"
    assert biases == {of_q.format(i) for i in (0, 1)}


def test_the_defaults_are_the_papers() -> None:
    config = TaskMoELoraConfig()
    sizes = (config.num_experts, config.r, config.lora_alpha, config.lora_dropout)
    assert sizes == (8, 4, 32, 0.05)
    routing = (config.router_inputs, config.top_k, config.router_aux_loss_coef)
    assert routing == ("token+task", None, 0.0)
    assert (config.task_dim, config.target_modules, config.bias) == (None, "all-linear", "none")
    assert config.peft_type == "TASKMOE_LORA" and config.peft_type.value == "TASKMOE_LORA"


def test_without_targets_and_task_dim_all_linears_read_768_dimensions(tiny_model) -> None:
    model = get_peft_model(tiny_model("llama"), TaskMoELoraConfig(target_modules=None))
    assert len(layers(model)) == 14 and not any("lm_head" in name for name in layers(model))
    _shape(model, (32, 16), (16, 32), (8, 16 + 768))
    assert model.peft_config["default"].task_dim == 768


def test_task_dim_is_that_of_the_encoder_named(tiny_model, tiny_encoder, tmp_path) -> None:
    tiny_encoder.model.save_pretrained(tmp_path)
    config = TaskMoELoraConfig(task_encoder=str(tmp_path))
    model = get_peft_model(tiny_model("llama"), config)
    assert model.peft_config["default"].task_dim == TASK_DIM
    _shape(model, (32, 16), (16, 32), (8, 16 + TASK_DIM))


INTEGERS = [(field, value) for field in ("num_experts", "r", "task_dim", "top_k")
            for value in (0, -1, 1.5, "4", True)]  # fmt: skip


@pytest.mark.parametrize("settings, message", [
    *(({field: value}, f"`{field}` must be a positive integer, got {value!r}.")
      for field, value in [*INTEGERS, ("r", None), ("num_experts", None)]),
    ({"rank_pattern": {"q": 0}}, "`rank_pattern['q']` must be a positive integer, got 0."),
    ({"alpha_pattern": {"q": "2"}}, "`alpha_pattern['q']` must be a finite number, got '2'."),
    ({"rank_pattern": 4}, "`rank_pattern` must map module names to numbers, got 4."),
    ({"lora_alpha": None}, "`lora_alpha` must be a finite number, got None."),
    ({"lora_dropout": 1.0}, "`lora_dropout` must be at least 0 and below 1, got 1.0."),
    ({"lora_dropout": -0.1}, "`lora_dropout` must be at least 0 and below 1, got -0.1."),
    ({"lora_dropout": float("nan")}, "`lora_dropout` must be a finite number, got nan."),
    ({"router_inputs": "tokens"},
     "`router_inputs` must be one of ['token+task', 'token', 'task'], got 'tokens'."),
    ({"task_norm": "l2"}, "`task_norm` must be one of ['matched', 'rms', 'none'], got 'l2'."),
    ({"bias": "lora_only"}, "`bias` must be one of ['none', 'all', 'taskmoe_lora_only'], got"),
    ({"use_rslora": 1}, "`use_rslora` must be true or false, got 1."),
    ({"top_k": 9}, "`top_k` must be at most `num_experts` = 8, got 9. None keeps all gates."),
    ({"router_aux_loss_coef": -1}, "`router_aux_loss_coef` must not be negative, got -1."),
    ({"target_modules": 3}, "`target_modules` must be a name, a regex or a list of names, got 3."),
    ({"layers_pattern": "layers"}, "`layers_pattern` has no effect without `layers_to_transform`."),
    ({"layers_to_transform": [0], "target_modules": ".*q_proj"},
     "`layers_to_transform` does not work with the regex `target_modules='.*q_proj'`."),
    ({"task_encoder": {"name": "x"}}, "The task encoder has no setting ['name']. Its settings are"),
    ({"task_encoder": {"pooling": "sum"}}, "`pooling` of the task encoder must be one of"),
    ({"task_encoder": 3}, "`task_encoder`"),
    ({"target_modules": "x" * 10_001}, "`target_modules` must be a regex of at most 10000 char"),
])  # fmt: skip
def test_what_cannot_work_raises(settings, message) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        TaskMoELoraConfig(**settings)


def test_an_unknown_field_raises() -> None:
    with pytest.raises(TypeError, match="n_experts"):
        TaskMoELoraConfig(n_experts=4)


SETTINGS = [
    {},
    {"task_encoder": {
        "name_or_path": "here", "revision": "abc", "pooling": "max", "max_length": 64,
        "overflow": "truncate", "text": "schema",
    }},
    {"task_encoder": TaskEncoderConfig(name_or_path="there", stride=3)},
    {"task_encoder": "there"},
    {**Q_AND_V, "exclude_modules": ["k_proj"], "layers_pattern": "layers"},
    {"num_experts": 2, "r": 3, "lora_alpha": 7.5, "lora_dropout": 0.0, "router_inputs": "task",
     "top_k": 1, "router_aux_loss_coef": 0.1},
    {"task_dim": 5, "task_norm": "none", "rank_pattern": {"a": 2}, "alpha_pattern": {"a": 0.5},
     "modules_to_save": ["x"], "bias": "all"},
    {"trainable_token_indices": {"embed": [1]}, "init_weights": False, "use_rslora": True,
     "fan_in_fan_out": True},
    {"task_type": "CAUSAL_LM", "base_model_name_or_path": "m", "revision": "r",
     "inference_mode": True},
]  # fmt: skip


@pytest.mark.parametrize("settings", SETTINGS)
def test_save_and_load_give_the_same_config(settings, tmp_path) -> None:
    config = TaskMoELoraConfig(**settings)
    config.save_pretrained(tmp_path)
    for cls in (PeftConfig, TaskMoELoraConfig):
        loaded = cls.from_pretrained(str(tmp_path))
        assert isinstance(loaded, TaskMoELoraConfig)
        # PEFT itself writes `inference_mode: true` and lets the loader turn it off
        assert dataclasses.replace(loaded, inference_mode=config.inference_mode) == config


def test_the_json_file_is_plain(tmp_path) -> None:
    """A string for the type, lists for sets, a dict for the encoder; unknown settings raise."""
    TaskMoELoraConfig(target_modules=["q", "k"], task_encoder="here").save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    assert found["peft_type"] == "TASKMOE_LORA"
    assert sorted(found["target_modules"]) == ["k", "q"]
    assert found["task_encoder"]["name_or_path"] == "here"
    assert set(found) >= OWN_FIELDS
    found["task_encoder"]["remote_code"] = True
    path.write_text(json.dumps(found), encoding="utf-8")
    with pytest.raises(ValueError, match=r"no setting \['remote_code'\]"):
        PeftConfig.from_pretrained(str(tmp_path))


def test_one_gate_alone_warns_that_its_router_does_not_learn() -> None:
    with pytest.warns(UserWarning, match=r"With `top_k=1` the one gate .*`top_k=2` or more"):
        TaskMoELoraConfig(top_k=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TaskMoELoraConfig(top_k=1, router_aux_loss_coef=0.01)
        TaskMoELoraConfig(top_k=2)
