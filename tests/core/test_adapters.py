"""Several adapters on one model: everything PEFT lets its users do with them, on every tiny model.

Compared with the base model, a model with one adapter alone, and the merged model.
"""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn

from cases import CASES, MODELS, ROWS, SMALL, adapted, config_for, logits_of, louder, rows_of, tasks
from peft_taskmoe import TaskMoELoraConfig, task_context
from peft_taskmoe.layer import TaskMoELoraLayer

MERGING = [case for case in [*CASES, ("llama", "task top_k")] if case[1].startswith("task")]
EVERY_MODEL = [(name, "token+task") for name in MODELS] + [("llama", "token"), ("llama", "task")]
BATCH = MODELS["llama"].inputs()


def run(model: Any, name: str = "llama", **changes: Any) -> torch.Tensor:
    """Logits for the table's batch."""
    batch = {**MODELS[name].inputs(), "task_embeds": tasks(), **changes}
    with torch.no_grad():
        return logits_of(model.eval()(**batch))


def base_logits(name: str) -> torch.Tensor:
    with torch.no_grad():
        return logits_of(MODELS[name].build()(**MODELS[name].inputs()))


def layers(model: nn.Module) -> list[TaskMoELoraLayer]:
    return [module for module in model.modules() if isinstance(module, TaskMoELoraLayer)]


OTHER: dict[str, Any] = {"num_experts": 2, "r": 3, "lora_alpha": 5, "router_inputs": "task"}


def other_config(name: str, adapter: str, **changes: Any) -> TaskMoELoraConfig:
    torch.manual_seed(21)
    return config_for(name, adapter, **{**changes, **OTHER, "top_k": None})


def with_two(name: str, adapter: str = "token+task", **changes: Any) -> Any:
    """`default`, of the table, and `other`, of another size, which reads the task alone."""
    model = adapted(name, adapter, **changes)
    model.add_adapter("other", other_config(name, adapter, **changes))
    return model.eval()


def only_other(name: str, adapter: str = "token+task", **changes: Any) -> Any:
    """The second of them alone."""
    config = other_config(name, adapter, **changes)
    return get_peft_model(MODELS[name].build(), config, adapter_name="other").eval()


# Adding, switching, deleting


@pytest.mark.parametrize(("name", "adapter"), CASES)
def test_each_of_two_adapters_gives_what_it_gives_alone(name, adapter):
    model = with_two(name, adapter)
    alone = run(adapted(name, adapter), name)
    assert torch.equal(run(model, name), alone)
    model.set_adapter("other")
    assert model.active_adapters == ["other"]
    assert torch.equal(run(model, name), run(only_other(name, adapter), name))
    model.set_adapter("default")
    assert torch.equal(run(model, name), alone)


def test_adapters_of_every_kind_side_by_side():
    """Sizes, router inputs, task dimensions and targets may all differ; each keeps to its own."""
    kinds = {
        "token": {"router_inputs": "token", "r": 1},
        "of task": {"router_inputs": "task", "num_experts": 6},
        "raw": {"task_norm": "none", "top_k": 1, "router_aux_loss_coef": 0.1},
        "wide": {"task_dim": 9},
        "few": {"target_modules": ["q_proj"], "use_rslora": True},
        "head": {"target_modules": ["down_proj", "lm_head"]},
    }
    model = adapted("llama")
    expected = {"default": run(model)}
    for seed, (key, changes) in enumerate(kinds.items()):
        config = config_for("llama", **changes)
        torch.manual_seed(seed)
        model.add_adapter(key, copy.deepcopy(config))
        torch.manual_seed(seed)
        alone = get_peft_model(MODELS["llama"].build(), config, adapter_name=key)
        expected[key] = run(alone, task_embeds=tasks(dim=config.task_dim))
    for key, output in expected.items():
        model.set_adapter(key)
        assert torch.equal(run(model, task_embeds=tasks(dim=9 if key == "wide" else 6)), output)
    model.base_model.set_adapter(["default", "wide"])
    with pytest.raises(ValueError, match=r'6 dimensions.*adapter "wide" has `task_dim=9`'):
        run(model)


@pytest.mark.parametrize("name", MODELS)
def test_several_active_adapters_train_together_or_apart(name):
    model, batch = with_two(name).train(), MODELS[name].inputs()

    def trained(active: Any) -> set[str]:
        model.zero_grad()
        model.base_model.set_adapter(active)
        logits_of(model(**batch, task_embeds=tasks())).pow(2).mean().backward()
        grads = {key: p.grad for key, p in model.named_parameters() if "taskmoe_lora_" in key}
        return {key.split(".")[-2] for key, grad in grads.items() if grad is not None}

    assert trained("default") == {"default"}
    assert trained("other") == {"other"}
    # a classifier's head is of one adapter or of the other
    if not any(isinstance(module, ModulesToSaveWrapper) for module in model.modules()):
        assert trained(["default", "other"]) == {"default", "other"}


@pytest.mark.parametrize("active", [True, False])
@pytest.mark.parametrize(("name", "adapter"), EVERY_MODEL)
def test_delete(name, adapter, active):
    heads = {"modules_to_save": list(MODELS[name].modules_to_save)}
    model = with_two(name, adapter, **heads)
    if active:
        model.set_adapter("other")
    model.delete_adapter("other")
    assert list(model.peft_config) == ["default"] and model.active_adapters == ["default"]
    for layer in layers(model):
        for attribute in (*layer.adapter_layer_names, *layer.other_param_names):
            assert "other" not in getattr(layer, attribute)
    assert torch.equal(run(model, name), run(adapted(name, adapter, **heads), name))
    model.delete_adapter("default")
    with torch.no_grad():
        assert torch.equal(logits_of(model.base_model(**MODELS[name].inputs())), base_logits(name))


def test_the_name_of_a_deleted_adapter_is_free_again():
    model = with_two("llama")
    model.delete_adapter("other")
    with pytest.raises(ValueError, match="Adapter other not found"):
        model.set_adapter("other")
    model.add_adapter("other", other_config("llama", "token+task"))
    model.set_adapter("other")
    assert torch.equal(run(model), run(only_other("llama")))


def test_an_adapter_that_cannot_be_added_leaves_nothing_behind():
    model = adapted("llama")
    expected = run(model)
    with pytest.raises(ValueError, match=r"Target modules .* not found"):
        model.add_adapter("bad", config_for("llama", target_modules=["nowhere"]))
    assert "bad" not in model.peft_config
    assert torch.equal(run(model), expected)


# modules_to_save


@pytest.mark.parametrize("name", MODELS)
def test_modules_to_save_belong_to_their_adapter(name, tmp_path):
    heads = list(MODELS[name].modules_to_save)
    model = with_two(name, modules_to_save=heads)
    wrappers = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    assert wrappers
    with torch.no_grad():
        for wrapper in wrappers:
            for parameter in wrapper.modules_to_save["other"].parameters():
                parameter.add_(0.5)
    alone = run(adapted(name, modules_to_save=heads), name)
    assert torch.equal(run(model, name), alone)
    model.set_adapter("other")
    moved = run(model, name)
    assert not torch.equal(moved, run(only_other(name, modules_to_save=heads), name))
    with model.disable_adapter():
        assert torch.equal(run(model, name), base_logits(name))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(MODELS[name].build(), tmp_path)
    assert torch.equal(run(loaded, name), alone)
    loaded.load_adapter(tmp_path / "other", adapter_name="other")
    loaded.set_adapter("other")
    assert torch.equal(run(loaded, name), moved)


# An adapter for each row of a batch

NAMES = ["__base__", "default", "other"]


def row_of(model: Any, batch: dict, i: int, call: Any, **settings: Any) -> Any:
    """What a call gives for one row alone, with its adapter."""
    one = {**rows_of(batch, slice(i, i + 1)), "task_embeds": tasks()[i : i + 1], **settings}
    with torch.no_grad():
        if NAMES[i] == "__base__":
            with model.disable_adapter():
                return call(**one)
        model.set_adapter(NAMES[i])
        return call(**one)


def assert_each_row_is_as_alone(model: Any, name: str, batch: dict) -> None:
    mixed = run(model, name, **batch, adapter_names=NAMES)
    for i in range(ROWS):
        alone = logits_of(row_of(model, batch, i, model))
        torch.testing.assert_close(mixed[i : i + 1], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_adapter_names(name, heads):
    changes = {"modules_to_save": list(MODELS[name].modules_to_save)} if heads else {}
    model, batch = with_two(name, **changes), MODELS[name].inputs()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "modules_to_save.other" in key:
                parameter.add_(0.3)
    if "attention_mask" in batch:
        batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    if heads and name in ("gemma", "gpt2"):  # PEFT mixes linear heads only
        return
    assert_each_row_is_as_alone(model, name, batch)


@pytest.mark.parametrize(
    "settings",
    [{}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}, {"use_cache": False}],
    ids=str,
)
@pytest.mark.parametrize("name", ["llama", "t5"])
@pytest.mark.parametrize("heads", [False, True])
def test_adapter_names_in_generation(name, settings, heads):
    model = louder(with_two(name, **({"modules_to_save": ["lm_head"]} if heads else {})))
    batch = MODELS[name].inputs()
    batch.pop("decoder_input_ids", None)
    settings = {"max_new_tokens": 4, "do_sample": False, **settings}
    mixed = model.generate(**batch, task_embeds=tasks(), adapter_names=NAMES, **settings)
    each, different = settings.get("num_return_sequences", 1), set()
    for i in range(ROWS):
        alone = row_of(model, batch, i, model.generate, **settings)
        assert torch.equal(mixed[each * i : each * (i + 1)], alone)
        different.add(tuple(alone[0, -4:].tolist()))
    assert len(different) >= 2


def test_adapter_names_with_trained_tokens():
    model = with_two("llama", trainable_token_indices=[9, 11])
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "trainable_tokens_delta.other" in key:
                parameter.add_(1.0)
    assert_each_row_is_as_alone(model, "llama", BATCH)


def test_adapter_names_ask_for_a_task_only_where_a_router_reads_it():
    model = adapted("llama", "token")
    model.add_adapter("other", config_for("llama"))
    names = ["default", "__base__", "default"]
    found = run(model, adapter_names=names, task_embeds=None)
    assert torch.equal(found[1], base_logits("llama")[1])
    with pytest.raises(ValueError, match=r'no task embedding.*adapter "other"'):
        run(model, adapter_names=["default", "other", "default"], task_embeds=None)
    model.set_adapter("other")
    assert torch.equal(run(model, adapter_names=names, task_embeds=None), found)


def test_adapter_names_that_cannot_be_followed_raise():
    model = with_two("llama", "task")
    unknown = r'non-existing adapter\(s\): nobody.*"__base__" for none'
    with pytest.raises(ValueError, match=unknown):
        run(model, adapter_names=["nobody", "default", "other"])
    with pytest.raises(ValueError, match=r"`adapter_names` should be the same .*2 and 3"):
        run(model, adapter_names=["default", "other"])
    with pytest.raises(ValueError, match="when the model is in training mode"):
        model.train()(**BATCH, task_embeds=tasks(), adapter_names=NAMES)
    with task_context(tasks(1)):
        model.eval().merge_adapter()
    with pytest.raises(ValueError, match="when there are merged adapters"):
        run(model, adapter_names=NAMES)


# Disabling and unloading


@pytest.mark.parametrize(("name", "adapter"), EVERY_MODEL)
def test_disabled_the_model_is_its_base(name, adapter):
    model = adapted(name, adapter)
    expected = run(model, name)
    with pytest.raises(RuntimeError, match="mine"), model.disable_adapter():
        for embeds in (tasks(), None):  # it asks for no task
            assert torch.equal(run(model, name, task_embeds=embeds), base_logits(name))
        raise RuntimeError("mine")
    assert torch.equal(run(model, name), expected)


@pytest.mark.parametrize(("name", "adapter"), EVERY_MODEL)
def test_unloaded_the_model_is_its_base(name, adapter):
    keys = MODELS[name].build().state_dict().keys()
    base = with_two(name, adapter).unload()
    assert not any(isinstance(module, BaseTunerLayer) for module in base.modules())
    assert not hasattr(base, "peft_config")
    assert base.state_dict().keys() == keys
    with torch.no_grad():
        assert torch.equal(logits_of(base(**MODELS[name].inputs())), base_logits(name))
    again = get_peft_model(base, config_for(name, adapter, init_weights=True))
    torch.testing.assert_close(run(again, name), base_logits(name))


# Merging


@pytest.mark.parametrize(("name", "adapter"), MERGING)
def test_merge_and_unmerge(name, adapter):
    model, embeds = adapted(name, adapter), tasks(1).expand(ROWS, -1)
    expected = run(model, name, task_embeds=embeds)
    before = copy.deepcopy({key: p for key, p in model.named_parameters() if "base_layer" in key})
    with task_context(tasks(1)):
        model.merge_adapter()
        with pytest.warns(UserWarning, match="All adapters are already merged"):
            model.merge_adapter()
    merged = run(model, name, task_embeds=None)  # the task is in the weights now
    torch.testing.assert_close(merged, expected, atol=1e-5, rtol=1e-4)
    assert all(layer.merged_adapters == ["default"] for layer in layers(model))
    model.unmerge_adapter()
    for key, parameter in before.items():
        torch.testing.assert_close(model.get_parameter(key), parameter, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(run(model, name, task_embeds=embeds), expected, atol=1e-5, rtol=1e-4)
    with task_context(-tasks(1)):
        other = model.merge_and_unload(safe_merge=True)
    with torch.no_grad():
        assert not torch.allclose(logits_of(other(**MODELS[name].inputs())), expected, atol=1e-3)


def test_merging_one_or_all_of_several():
    model, embeds = with_two("llama", "task"), tasks(1).expand(ROWS, -1)
    for names in (["default"], ["other"], ["default", "other"]):
        model.base_model.set_adapter(names)
        expected = run(model, task_embeds=embeds)
        with task_context(tasks(1)):
            merged = with_two("llama", "task").merge_and_unload(adapter_names=names)
        with torch.no_grad():
            torch.testing.assert_close(merged(**BATCH).logits, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("adapter", ["token+task", "token", "top_k"])
def test_a_router_that_reads_the_token_refuses_to_merge(adapter):
    model = with_two("llama", adapter)
    expected = run(model)
    message = (
        r'Adapter "default" cannot be merged: its router reads the token.*`to_lora\(model, ...\)`'
    )
    for names in (None, ["other", "default"]):
        with task_context(tasks(1)):
            with pytest.raises(ValueError, match=message):
                model.merge_adapter(names)
            with pytest.raises(ValueError, match=message):
                model.merge_and_unload(adapter_names=names)
    assert not any(layer.merged for layer in layers(model))
    assert torch.equal(run(model), expected)


# What the model says of itself


@pytest.mark.parametrize("name", ["llama", "bert_tokens", "plain"])
def test_status(name):
    model = with_two(name)
    status, both = model.get_model_status(), {"default", "other"}
    assert status.peft_types == dict.fromkeys(both, "TASKMOE_LORA")
    assert status.adapter_model_type == "TaskMoELoraModel" and status.enabled is True
    assert status.active_adapters == ["default"] and status.merged_adapters == []
    assert set(status.available_adapters) == both
    assert status.requires_grad == {"default": True, "other": False}
    others = sum(isinstance(module, AuxiliaryTrainingWrapper) for module in model.modules())
    assert status.num_adapter_layers == len(layers(model)) + others
    counted = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert status.trainable_params == counted == model.get_nb_trainable_parameters()[0]
    found = [each for each in model.get_layer_status() if each.module_type.startswith("taskmoe")]
    assert {each.module_type for each in found} == {"taskmoe_lora.Linear"}
    assert found[0].enabled and found[0].devices == {key: ["cpu"] for key in both}


def test_repr_tells_what_the_shapes_do_not():
    text = repr(with_two("llama", "top_k").get_base_model().model.layers[0].self_attn.q_proj)
    assert text.startswith("taskmoe_lora.Linear(")
    assert "default: 3 experts of rank 2, scaling 2, router reads token+task, top_k 2\n" in text
    assert re.search(r"other: 2 experts of rank 3, scaling 1\.66667, router reads task\n", text)
    assert "(taskmoe_lora_router): ModuleDict(" in text
    assert "(base_layer): Linear(in_features=16" in text


# Other methods beside this one


def test_adapters_cannot_be_combined_by_weights():
    message = r"cannot be combined by weights.*`model.base_model.set_adapter\(\[...\]\)`"
    with pytest.raises(NotImplementedError, match=message):
        with_two("llama").add_weighted_adapter(["default", "other"], [0.5, 0.5], "mean")


@pytest.mark.parametrize("lora_first", [True, False])
def test_injected_around_or_inside_of_a_lora(lora_first):
    """PEFT lets tuner layers nest; both updates then count."""
    lora = LoraConfig(target_modules=["first"], init_lora_weights=False)
    ours = TaskMoELoraConfig(**{**SMALL, "target_modules": ["first"]})
    model = MODELS["plain"].build()
    for config in (lora, ours) if lora_first else (ours, lora):
        inject_adapter_in_model(config, model)
    x, layer = torch.randn(ROWS, 10), model.first.eval()
    outer, inner = layer, layer.base_layer
    with task_context(tasks()), torch.no_grad():
        both, base = outer(x), inner.base_layer(x)
        outer.enable_adapters(False)
        only_inner = outer(x)
        outer.enable_adapters(True)
        inner.enable_adapters(False)
        only_outer = outer(x)
    total = (only_inner - base) + (only_outer - base)
    torch.testing.assert_close(both - base, total, atol=1e-5, rtol=1e-4)
    assert not torch.equal(only_inner, base) and not torch.equal(only_outer, base)


# The rest of what PEFT's users do


@pytest.mark.parametrize("name", [name for name in MODELS if name != "plain"])
def test_input_vectors_instead_of_ids(name):
    model, batch = adapted(name), MODELS[name].inputs()
    expected = run(model, name)
    vectors = model.get_input_embeddings()(batch.pop("input_ids")).detach()
    with torch.no_grad():
        found = logits_of(model(inputs_embeds=vectors, **batch, task_embeds=tasks()))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_positional_arguments(name):
    model, batch = adapted(name), MODELS[name].inputs()
    first = next(iter(batch))
    value = batch.pop(first)
    with torch.no_grad():
        found = logits_of(model(value, **batch, task_embeds=tasks()))
    assert torch.equal(found, run(model, name))
