"""`TaskMoELoraConfig`: every field does something or raises, errors say what to do, and the JSON file comes back equal."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn

from peft_taskmoe import TaskEncoderConfig, TaskMoELoraConfig
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


def weights(
    model: nn.Module, name: str = "0.self_attn.q_proj"
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return layers(model)[name]._weights("default")


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def _list_changes(model, fresh) -> None:
    assert set(layers(model)) == {"0.self_attn.q_proj", "1.self_attn.q_proj"}


def _only_layer_1(model, fresh) -> None:
    assert set(layers(model)) == {"1.self_attn.q_proj", "1.self_attn.v_proj"}


def _adapters_differ(model, fresh) -> None:
    assert any(layer.taskmoe_lora_B["default"].weight.any() for layer in layers(model).values())
    assert not any(layer.taskmoe_lora_B["default"].weight.any() for layer in layers(fresh).values())


# For every field: a value that is not the default, and what it changes in a tiny Llama. Fields whose effect is numeric
# (`top_k`, `task_norm`, `lora_alpha`, ...) are held to the reference in test_layer.py; here it is that they arrive.
EFFECTS: dict[str, tuple[dict, Callable[[PeftModel, PeftModel], None]]] = {
    "num_experts": ({"num_experts": 3}, lambda m, f: _shape(m, (12, 16), (16, 12), (3, 22))),
    "r": ({"r": 2}, lambda m, f: _shape(m, (16, 16), (16, 16), (8, 22))),
    "lora_alpha": ({"lora_alpha": 20}, lambda m, f: _each(m, lambda layer: layer.scaling["default"] == 5.0)),
    "lora_dropout": ({"lora_dropout": 0.5}, lambda m, f: _each(m, lambda layer: layer.train()._dropout("default") == 0.5)),
    "router_inputs": ({"router_inputs": "task"}, lambda m, f: _shape(m, (32, 16), (16, 32), (8, TASK_DIM))),
    "top_k": ({"top_k": 2}, lambda m, f: _each(m, lambda layer: layer.shapes["default"].top_k == 2)),
    "router_aux_loss_coef": ({"router_aux_loss_coef": 0.5}, lambda m, f: _loss_grows(m, f)),
    "task_dim": ({"task_dim": 9}, lambda m, f: _shape(m, (32, 16), (16, 32), (8, 25))),
    "task_norm": ({"task_norm": "none"}, lambda m, f: _each(m, lambda layer: layer.configs["default"].task_norm == "none")),
    "task_encoder": (
        {"task_encoder": {"name_or_path": "x"}},
        lambda m, f: _equal(m.peft_config["default"].task_encoder, TaskEncoderConfig(name_or_path="x")),
    ),
    "target_modules": ({"target_modules": ["q_proj"]}, _list_changes),
    "exclude_modules": ({"exclude_modules": r".*(mlp|[kvo]_proj).*"}, _list_changes),
    "layers_to_transform": ({"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]}, _only_layer_1),
    "layers_pattern": (
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
        _only_layer_1,
    ),
    "rank_pattern": (
        {"rank_pattern": {"k_proj": 1}},
        lambda m, f: _equal((layers(m)["0.self_attn.k_proj"].r, layers(m)["0.self_attn.q_proj"].r), ({"default": 1}, {"default": 4})),
    ),
    "alpha_pattern": (
        {"alpha_pattern": {"k_proj": 4}},
        lambda m, f: _equal(
            (layers(m)["0.self_attn.k_proj"].scaling, layers(m)["0.self_attn.q_proj"].scaling), ({"default": 1.0}, {"default": 8.0})
        ),
    ),
    "modules_to_save": (
        {"modules_to_save": ["lm_head"]},
        lambda m, f: _equal({n for n in trainable(m) if "lm_head" in n}, {"base_model.model.lm_head.modules_to_save.default.weight"}),
    ),
    "trainable_token_indices": (
        {"trainable_token_indices": [1, 5]},
        lambda m, f: _equal([p.shape for n, p in m.named_parameters() if p.requires_grad and "embed" in n], [(2, 16)]),
    ),
    "bias": ({"bias": "all"}, lambda m, f: _equal({n for n in trainable(m) if "bias" in n} > {n for n in trainable(f) if "bias" in n}, True)),
    "init_weights": ({"init_weights": False}, _adapters_differ),
    "use_rslora": ({"use_rslora": True}, lambda m, f: _each(m, lambda layer: layer.scaling["default"] == 16.0)),
    # the injection knows it for nn.Linear and Conv1D and corrects it
    "fan_in_fan_out": ({"fan_in_fan_out": True}, lambda m, f: _equal(m.peft_config["default"].fan_in_fan_out, False)),
}  # fmt: skip


def _shape(model, a, b, router) -> None:
    assert tuple(tuple(w.shape) for w in weights(model)) == (a, b, router)


def _each(model, holds) -> None:
    assert layers(model) and all(holds(layer) for layer in layers(model).values())


def _equal(found, expected) -> None:
    assert found == expected


def _loss_grows(model, fresh) -> None:
    ids = torch.arange(4, 12).view(1, 8)
    loss = {}
    for key, of in (("with", model), ("without", fresh)):
        of.train()
        loss[key] = of(input_ids=ids, labels=ids, task_embeds=torch.ones(1, TASK_DIM)).loss.item()
    assert loss["with"] - loss["without"] >= 0.5 - 1e-5  # the least that perfect balance costs


def test_the_table_has_every_field() -> None:
    assert set(EFFECTS) == OWN_FIELDS


@pytest.mark.parametrize("field", sorted(EFFECTS))
def test_every_field_does_something(field, tiny_model) -> None:
    settings, check = EFFECTS[field]
    changes = {"attention_bias": True} if field == "bias" else {}
    usual = {"task_dim": TASK_DIM, "lora_dropout": 0.0}
    fresh = get_peft_model(tiny_model("llama", **changes), TaskMoELoraConfig(**usual))
    model = get_peft_model(
        tiny_model("llama", **changes), TaskMoELoraConfig(**{**usual, **settings})
    )
    check(model, fresh)


def test_only_the_adapters_biases_train_with_taskmoe_lora_only(tiny_model) -> None:
    config = TaskMoELoraConfig(bias="taskmoe_lora_only", target_modules=["q_proj"])
    model = get_peft_model(tiny_model("llama", attention_bias=True), config)
    biases = {name for name in trainable(model) if name.endswith("bias")}
    assert biases == {
        f"base_model.model.model.layers.{i}.self_attn.q_proj.base_layer.bias" for i in (0, 1)
    }


def test_the_defaults_are_the_papers() -> None:
    config = TaskMoELoraConfig()
    assert (config.num_experts, config.r, config.lora_alpha, config.lora_dropout) == (
        8,
        4,
        32,
        0.05,
    )
    assert (config.router_inputs, config.top_k, config.router_aux_loss_coef) == (
        "token+task",
        None,
        0.0,
    )
    assert (config.task_dim, config.target_modules, config.bias) == (768, "all-linear", "none")
    assert config.peft_type == "TASKMOE_LORA" and config.peft_type.value == "TASKMOE_LORA"


def test_no_target_modules_means_all_linear(tiny_model) -> None:
    model = get_peft_model(tiny_model("llama"), TaskMoELoraConfig(target_modules=None))
    assert len(layers(model)) == 14 and not any("lm_head" in name for name in layers(model))


@pytest.mark.parametrize(
    "settings, message",
    [
        *(({field: value}, rf"`{field}` is {value!r}, but it counts something. Pass a whole number of at least 1")
          for field in ("num_experts", "r", "task_dim") for value in (0, -1, 1.5, "4", None, True)),
        ({"rank_pattern": {"q_proj": 0}}, r"`rank_pattern\['q_proj'\]` is 0, but it counts something"),
        ({"lora_dropout": 1.0}, r"`lora_dropout` is 1.0, but it is a probability below 1. Pass e.g. `lora_dropout=0.05`"),
        ({"lora_dropout": -0.1}, "`lora_dropout` is -0.1, but it is a probability"),
        ({"lora_dropout": float("nan")}, "`lora_dropout` is nan, but it is a probability"),
        ({"router_inputs": "tokens"}, "`router_inputs` is 'tokens', which is unknown. Pass one of 'token\\+task', 'token', 'task'"),
        ({"task_norm": "l2"}, "`task_norm` is 'l2', which is unknown. Pass one of 'matched', 'rms', 'none'"),
        ({"bias": "lora_only"}, "`bias` is 'lora_only', which is unknown. Pass one of 'none', 'all', 'taskmoe_lora_only'"),
        *(({"top_k": k}, rf"`top_k` is {k}, but a token can keep 1 to `num_experts` = 8 of its gates. Pass `top_k=None`")
          for k in (0, 9, 1.5)),
        ({"router_aux_loss_coef": -1}, r"`router_aux_loss_coef` is -1; a negative weight would unbalance .* Pass 0.0"),
        ({"layers_pattern": "layers"}, r"`layers_pattern` was given without `layers_to_transform`.*`layers_to_transform=\[...\]`"),
        ({"layers_to_transform": [0], "target_modules": ".*q_proj"}, r"`layers_to_transform` does not go together with `target_modules='.\*q_proj'`.*Let the regex name the layers"),
        ({"task_encoder": {"name": "x"}}, r"The task encoder has no setting \['name'\]. Its settings are \['name_or_path'"),
        ({"task_encoder": {"pooling": "sum"}}, "`pooling` of the task encoder must be one of"),
        ({"task_encoder": "Salesforce/codet5-base"},
         r"`task_encoder` is 'Salesforce/codet5-base', .* Pass e.g. `TaskEncoderConfig\(name_or_path=\"Salesforce/codet5-base\"\)` or its dict"),
        ({"task_encoder": 3}, "`task_encoder` is 3, .*`TaskEncoderConfig"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused(settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        TaskMoELoraConfig(**settings)


def test_an_unknown_field_is_refused() -> None:
    with pytest.raises(TypeError, match="n_experts"):
        TaskMoELoraConfig(n_experts=4)


SETTINGS = [
    {},
    {"task_encoder": {"name_or_path": "here", "revision": "abc", "pooling": "max", "max_length": 64, "overflow": "truncate", "text": "schema"}},
    {"task_encoder": TaskEncoderConfig(name_or_path="there", stride=3)},
    {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["k_proj"], "layers_to_transform": [0], "layers_pattern": "layers"},
    {"num_experts": 2, "r": 3, "lora_alpha": 7.5, "lora_dropout": 0.0, "router_inputs": "task", "top_k": 1, "router_aux_loss_coef": 0.1},
    {"task_dim": 5, "task_norm": "none", "rank_pattern": {"a": 2}, "alpha_pattern": {"a": 0.5}, "modules_to_save": ["x"], "bias": "all"},
    {"trainable_token_indices": {"embed": [1]}, "init_weights": False, "use_rslora": True, "fan_in_fan_out": True},
    {"task_type": "CAUSAL_LM", "base_model_name_or_path": "m", "revision": "r", "inference_mode": True},
]  # fmt: skip


@pytest.mark.parametrize("settings", SETTINGS)
def test_save_and_load_give_the_same_config(settings, tmp_path) -> None:
    config = TaskMoELoraConfig(**settings)
    config.save_pretrained(tmp_path)
    for loaded in (
        PeftConfig.from_pretrained(str(tmp_path)),
        TaskMoELoraConfig.from_pretrained(str(tmp_path)),
    ):
        assert isinstance(loaded, TaskMoELoraConfig)
        # PEFT itself writes `inference_mode: true` and lets the loader turn it off
        assert dataclasses.replace(loaded, inference_mode=config.inference_mode) == config


def test_the_json_file_is_plain(tmp_path) -> None:
    """A string for the type, lists for sets, a dict for the encoder: readable without this package."""
    TaskMoELoraConfig(
        target_modules=["q", "k"], task_encoder=TaskEncoderConfig(name_or_path="here")
    ).save_pretrained(tmp_path)
    found = json.loads((tmp_path / "adapter_config.json").read_text())
    assert found["peft_type"] == "TASKMOE_LORA"
    assert sorted(found["target_modules"]) == ["k", "q"]
    assert found["task_encoder"]["name_or_path"] == "here"
    assert set(found) >= OWN_FIELDS


def test_an_unknown_encoder_setting_in_a_file_is_refused(tmp_path) -> None:
    TaskMoELoraConfig(task_encoder={"name_or_path": "here"}).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    found = json.loads(path.read_text())
    found["task_encoder"]["remote_code"] = True
    path.write_text(json.dumps(found))
    with pytest.raises(ValueError, match=r"no setting \['remote_code'\]"):
        PeftConfig.from_pretrained(str(tmp_path))


def test_one_gate_alone_warns_that_its_router_does_not_learn():
    with pytest.warns(
        UserWarning,
        match=r"`top_k` is 1: the one gate that is kept always equals 1.*`top_k=2` or more",
    ):
        TaskMoELoraConfig(top_k=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TaskMoELoraConfig(top_k=1, router_aux_loss_coef=0.01)
        TaskMoELoraConfig(top_k=2)
