"""Saving and loading bit for bit, as PEFT and transformers do; what a config selects."""

from __future__ import annotations

import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import dispatch_model
from peft import (
    AutoPeftModelForCausalLM,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from cases import LENGTH, MODELS, ROWS, SMALL, VOCAB, TwoLayers, adapted, config_for, tasks
from peft_taskmoe import TaskMoELoraConfig, task_context
from peft_taskmoe.layer import TaskMoELoraLayer
from versions import needs_own_integration

torch.set_num_threads(1)

BATCH = MODELS["llama"].inputs()


def logits(model: Any, embeds: torch.Tensor | None = None) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**BATCH, task_embeds=tasks() if embeds is None else embeds).logits


def assert_same(model: Any, expected: torch.Tensor) -> None:
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=0)


def layers_of(model: Any) -> dict[str, TaskMoELoraLayer]:
    base = model.get_base_model()
    return {
        name: module
        for name, module in base.named_modules()
        if isinstance(module, TaskMoELoraLayer)
    }


QV = [f"model.layers.{i}.self_attn.{name}_proj" for i in (0, 1) for name in "qv"]


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("base")
    MODELS["llama"].build().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, base_folder) -> tuple[str, torch.Tensor]:
    """The folder of an adapter, and the logits it gives."""
    folder = tmp_path_factory.mktemp("adapter")
    model = adapted("llama")
    model.peft_config["default"].base_model_name_or_path = base_folder
    model.save_pretrained(folder)
    return str(folder), logits(model)


# PeftModel.from_pretrained and friends


@pytest.mark.parametrize(
    "options",
    [
        {"low_cpu_mem_usage": True},
        {"torch_device": "cpu"},
        {"autocast_adapter_dtype": False},
        {"ephemeral_gpu_offload": False},
        {"device_map": {"": "cpu"}},
        {"adapter_name": "other"},
    ],
    ids=str,
)
def test_from_pretrained_with(options, saved):
    folder, expected = saved
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        model = PeftModel.from_pretrained(MODELS["llama"].build(), folder, **options)
    assert_same(model, expected)
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert model.active_adapters == [options.get("adapter_name", "default")]


def test_is_trainable(saved):
    folder, expected = saved
    frozen = PeftModel.from_pretrained(MODELS["llama"].build(), folder)
    assert frozen.peft_config["default"].inference_mode and not any(
        p.requires_grad for p in frozen.parameters()
    )
    model = PeftModel.from_pretrained(MODELS["llama"].build(), folder, is_trainable=True)
    assert_same(model, expected)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, _ in model.named_parameters() if "taskmoe_lora_" in name
    }


def test_config_given_by_hand(saved):
    folder, expected = saved
    config = PeftConfig.from_pretrained(folder)
    assert isinstance(config, TaskMoELoraConfig) and config.peft_type == "TASKMOE_LORA"
    model = PeftModel.from_pretrained(MODELS["llama"].build(), folder, config=config)
    assert model.peft_config["default"] is config and config.inference_mode
    assert_same(model, expected)


def test_auto_class_finds_base_and_adapter(saved):
    folder, expected = saved
    assert_same(AutoPeftModelForCausalLM.from_pretrained(folder), expected)


def test_load_adapter_says_what_it_found(saved):
    folder, expected = saved
    model = PeftModel.from_pretrained(MODELS["llama"].build(), folder)
    for name in ("other", "yet-another"):
        result = model.load_adapter(folder, adapter_name=name)
        assert result.missing_keys == [] and result.unexpected_keys == []
    model.set_adapter("yet-another")
    assert_same(model, expected)
    model.load_adapter(folder, adapter_name="at once", low_cpu_mem_usage=True)
    model.set_adapter("at once")
    assert_same(model, expected)


def test_key_mapping(saved):
    """The same model under another name, as an adapter trained elsewhere may find it."""
    folder, expected = saved
    config = PeftConfig.from_pretrained(folder)
    config.target_modules, config.task_type = ".*_proj", None
    outer = nn.ModuleDict({"inner": MODELS["llama"].build()})
    mapping = {r"^model\.": "inner.model."}
    PeftModel.from_pretrained(outer, folder, config=config, key_mapping=mapping)
    with task_context(tasks()), torch.no_grad():
        assert torch.equal(outer["inner"](**BATCH).logits, expected)


def test_sizes_that_do_not_match(tmp_path):
    adapted("llama", modules_to_save=["lm_head"]).save_pretrained(tmp_path)
    larger = {**MODELS["llama"].config, "vocab_size": VOCAB + 4}
    with pytest.raises(RuntimeError, match=r"size mismatch for .*lm_head"):
        PeftModel.from_pretrained(LlamaForCausalLM(LlamaConfig(**larger)), tmp_path)
    with pytest.warns(UserWarning, match="lm_head"):
        model = PeftModel.from_pretrained(
            LlamaForCausalLM(LlamaConfig(**larger)), tmp_path, ignore_mismatched_sizes=True
        )
    state = load_file(tmp_path / "adapter_model.safetensors")
    key = "base_model.model.model.layers.0.self_attn.q_proj.taskmoe_lora_router"
    assert torch.equal(model.get_parameter(f"{key}.default.weight"), state[f"{key}.weight"])
    other = get_peft_model(MODELS["llama"].build(), config_for("llama", num_experts=4))
    with pytest.raises(
        RuntimeError, match=r"size mismatch for .*taskmoe_lora_router.default.weight"
    ):
        set_peft_model_state_dict(other, state)


NAMES = "model layers 0 self_attn q_proj base_layer weight lora A router taskmoe taskmoe_lora_A"


@pytest.mark.parametrize("name", NAMES.split())
def test_adapter_names_that_are_parts_of_module_names(name, saved, tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(MODELS["llama"].build(), config_for("llama"), adapter_name=name)
    expected = saved[1]
    assert_same(model, expected)
    model.add_adapter("other", config_for("llama"))
    model.save_pretrained(tmp_path)
    assert len(load_file(tmp_path / name / "adapter_model.safetensors")) == 3 * 14
    for adapter_name in (name, "default"):
        loaded = PeftModel.from_pretrained(
            MODELS["llama"].build(), tmp_path / name, adapter_name=adapter_name
        )
        assert_same(loaded, expected)
    model.delete_adapter("other")
    assert_same(model, expected)


@pytest.mark.parametrize("other", ["default2", "my_default", "xdefaulty", "efaul"])
def test_only_the_selected_adapter_is_saved(other, tmp_path):
    model = adapted("llama")
    count = len(get_peft_model_state_dict(model))
    model.add_adapter(other, config_for("llama", num_experts=2))
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == count
    assert not (tmp_path / other).exists()


def test_state_dict_round_trip_by_hand():
    model, other = adapted("llama"), adapted("llama", seed=5)
    assert not torch.equal(logits(other), logits(model))
    result = set_peft_model_state_dict(other, get_peft_model_state_dict(model))
    assert result.unexpected_keys == []
    assert_same(other, logits(model))


def test_base_model_names_stay_usable(saved):
    """`get_base_model_state_dict` and `unload` give the base model back, key by key."""
    from peft import get_base_model_state_dict

    base = MODELS["llama"].build().state_dict()
    model = adapted("llama")
    found = get_base_model_state_dict(model)
    assert found.keys() == base.keys() and all(torch.equal(found[key], base[key]) for key in base)
    assert model.unload().state_dict().keys() == base.keys()


# Models that accelerate has spread out


def _before(model: nn.Module) -> Any:
    dispatch_model(model, {"": "cpu"}, force_hooks=True)
    torch.manual_seed(0)
    return get_peft_model(model, config_for("llama"))


def _after(model: nn.Module) -> Any:
    torch.manual_seed(0)
    return dispatch_model(get_peft_model(model, config_for("llama")), {"": "cpu"}, force_hooks=True)


@pytest.mark.parametrize("build", [_before, _after])
def test_models_with_accelerate_hooks(build, saved):
    model = build(MODELS["llama"].build())
    for _ in range(2):  # up to rounding: layers whose base is hooked are computed alone
        torch.testing.assert_close(logits(model), saved[1])
    tokens = model.generate(**BATCH, task_embeds=tasks(), max_new_tokens=2)
    assert tokens.shape == (ROWS, LENGTH + 2)
    model.train()(**BATCH, task_embeds=tasks(), labels=BATCH["input_ids"]).loss.backward()
    base = model.unload()
    with torch.no_grad():
        torch.testing.assert_close(
            base.eval()(**BATCH).logits, MODELS["llama"].build()(**BATCH).logits
        )


DISK = {
    **dict.fromkeys(["model.embed_tokens", "model.norm", "lm_head", "model.rotary_emb"], "cpu"),
    **{"model.layers.0": "cpu", "model.layers.1": "disk"},
}


def test_layers_offloaded_to_disk_with_their_adapters(saved, tmp_path):
    torch.manual_seed(0)
    devices = {f"base_model.model.{name}": device for name, device in DISK.items()}
    model = get_peft_model(MODELS["llama"].build(), config_for("llama"))
    model = dispatch_model(
        model, devices, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True
    )
    assert layers_of(model)[QV[2]].taskmoe_lora_router["default"].weight.is_meta
    torch.testing.assert_close(logits(model), saved[1])
    torch.testing.assert_close(model(**BATCH, task_embeds=tasks()).logits, saved[1])  # with grad on
    expected = adapted("llama").generate(
        **BATCH, task_embeds=tasks(), max_new_tokens=3, do_sample=False
    )
    assert torch.equal(
        model.generate(**BATCH, task_embeds=tasks(), max_new_tokens=3, do_sample=False), expected
    )


def _on_an_offloaded_base(folder: str) -> Any:
    base = dispatch_model(
        MODELS["llama"].build(), DISK, main_device="cpu", offload_dir=folder, force_hooks=True
    )
    return get_peft_model(base, config_for("llama"))


def _created_empty(folder: str) -> Any:
    return get_peft_model(MODELS["llama"].build(), config_for("llama"), low_cpu_mem_usage=True)


@pytest.mark.parametrize("build", [_on_an_offloaded_base, _created_empty])
@pytest.mark.parametrize("grad", [True, False])
def test_weights_that_were_never_filled_are_refused(build, grad, tmp_path):
    """PyTorch would compute with whatever is in memory."""
    model = build(str(tmp_path)).eval()
    with (
        torch.set_grad_enabled(grad),
        pytest.raises(ValueError, match=r'adapter "default" are on the meta device.*Load them'),
    ):
        model(**BATCH, task_embeds=tasks())


# transformers' own integration, and injection without any wrapper


class TestTransformersOwnIntegration:
    @needs_own_integration
    def test_add_adapter(self, saved, tmp_path):
        model = MODELS["llama"].build()
        torch.manual_seed(0)
        model.add_adapter(config_for("llama"))
        assert model.active_adapters() == ["default"]
        assert_same(model, saved[1])
        with task_context(tasks()), torch.no_grad():
            assert torch.equal(model(**BATCH).logits, saved[1])
        model.disable_adapters()
        assert_same(model, MODELS["llama"].build()(**BATCH).logits)
        model.enable_adapters()
        assert len(model.get_adapter_state_dict()) == 3 * 14
        model.save_pretrained(tmp_path)
        assert {"adapter_config.json", "adapter_model.safetensors"} <= set(os.listdir(tmp_path))
        again = MODELS["llama"].build()
        again.load_adapter(str(tmp_path))
        assert_same(again, saved[1])

    @needs_own_integration
    def test_load_adapter_and_switch(self, saved):
        folder, expected = saved
        model = MODELS["llama"].build()
        model.load_adapter(folder, adapter_name="first")
        model.add_adapter(config_for("llama", "task"), adapter_name="second")
        model.set_adapter("first")
        assert_same(model, expected)
        model.set_adapter("second")
        assert not torch.equal(logits(model), expected)
        model.set_adapter(["first", "second"])
        both = logits(model)
        model.delete_adapter("second")
        model.set_adapter("first")
        assert_same(model, expected)
        assert not torch.equal(both, expected)

    @pytest.mark.parametrize(
        "options", [{}, {"low_cpu_mem_usage": True}, {"is_trainable": True}], ids=str
    )
    def test_load_adapter_with(self, options, saved):
        folder, expected = saved
        model = MODELS["llama"].build()
        model.load_adapter(folder, **options)
        assert_same(model, expected)
        trained = {
            name
            for name, p in model.named_parameters()
            if p.requires_grad and "taskmoe_lora_" in name
        }
        assert bool(trained) == bool(options.get("is_trainable"))

    def test_auto_model_on_an_adapter_folder(self, saved):
        folder, expected = saved
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert isinstance(model, LlamaForCausalLM)
        assert_same(model, expected)
        with task_context(tasks()):
            assert model.generate(**BATCH, max_new_tokens=2, do_sample=False).shape == (
                ROWS,
                LENGTH + 2,
            )


class TestInjection:
    def test_with_a_context_or_an_argument(self, saved):
        torch.manual_seed(0)
        model = inject_adapter_in_model(config_for("llama"), MODELS["llama"].build()).eval()
        assert_same(model, saved[1])
        with task_context(tasks()), torch.no_grad():
            assert torch.equal(model(**BATCH).logits, saved[1])
        with pytest.raises(ValueError, match=r"no task embedding"):
            model(**BATCH)

    def test_from_a_state_dict_on_no_device(self, saved):
        state = load_file(Path(saved[0]) / "adapter_model.safetensors")
        state = {key.removeprefix("base_model.model."): value for key, value in state.items()}
        model = inject_adapter_in_model(
            config_for("llama"), MODELS["llama"].build(), state_dict=state, low_cpu_mem_usage=True
        )
        assert any(parameter.is_meta for parameter in model.parameters())
        assert set_peft_model_state_dict(model, state, low_cpu_mem_usage=True).unexpected_keys == []
        assert_same(model, saved[1])

    def test_inside_a_larger_module(self):
        """The injected module's own parent never heard of tasks; a context reaches it."""
        inner = TwoLayers()
        parent = nn.Sequential(nn.Linear(10, 10), inner)
        x = torch.randn(ROWS, 10)
        settings = {**SMALL, "target_modules": ["first", "second"]}
        inject_adapter_in_model(TaskMoELoraConfig(**settings), inner)
        with task_context(tasks()):
            one, other = parent(x), parent(x)
        with task_context(-tasks()):
            moved = parent(x)
        assert torch.equal(one, other) and not torch.equal(one, moved)


# What a config selects


ONLY_QV = {"target_modules": ["q_proj", "v_proj"]}
SELECTIONS = {
    "suffixes": (ONLY_QV, QV),
    "whole path": ({"target_modules": [QV[0]]}, QV[:1]),
    "regex": ({"target_modules": r".*\.[qv]_proj"}, QV),
    "regex of one layer": ({"target_modules": r"model\.layers\.1\..*_attn\.[qv]_proj"}, QV[2:]),
    "layers_to_transform": ({**ONLY_QV, "layers_to_transform": [1]}, QV[2:]),
    "one layer and a pattern": (
        {**ONLY_QV, "layers_to_transform": 0, "layers_pattern": "layers"}, QV[:2],
    ),
    "exclude_modules": (
        {"target_modules": ["q_proj", "k_proj", "v_proj"], "exclude_modules": ["k_proj"]}, QV,
    ),
    "exclude a regex": ({**ONLY_QV, "exclude_modules": r".*layers\.0.*"}, QV[2:]),
    "exclude from all": (
        {"exclude_modules": ["o_proj", "k_proj", "gate_proj", "up_proj", "down_proj"]}, QV,
    ),
    "modules_to_save are not adapted": (
        {"target_modules": ["q_proj", "v_proj", "lm_head"], "modules_to_save": ["lm_head"]}, QV,
    ),
    "None is all-linear": (
        {"target_modules": None, "exclude_modules": r".*\.(o|k|gate|up|down)_proj"}, QV,
    ),
}  # fmt: skip


@pytest.mark.parametrize("settings", SELECTIONS.values(), ids=SELECTIONS)
def test_selected_layers(settings, tmp_path):
    changes, expected = settings
    model = adapted("llama", **changes)
    assert list(layers_of(model)) == expected
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(MODELS["llama"].build(), tmp_path)
    assert list(layers_of(loaded)) == expected
    assert_same(loaded, logits(model))


def test_layers_to_transform_goes_with_all_linear(tmp_path):
    model = adapted("llama", layers_to_transform=[1])
    assert len(layers_of(model)) == 7 and all(".layers.1." in name for name in layers_of(model))
    model.save_pretrained(tmp_path)
    assert_same(PeftModel.from_pretrained(MODELS["llama"].build(), tmp_path), logits(model))
    assert {
        name.split(".")[2]
        for name in layers_of(adapted("gpt2", layers_to_transform=0, layers_pattern="h"))
    } == {"0"}


def test_selections_that_find_nothing_say_so():
    with pytest.raises(ValueError, match=r"Target modules .*nowhere.* not found in the base model"):
        adapted("llama", target_modules=["nowhere"])
    with pytest.raises(ValueError, match="No modules were targeted"):
        adapted("llama", target_modules=["q_proj"], exclude_modules=["q_proj"])
    with pytest.warns(UserWarning, match="no modules were excluded"):
        adapted("llama", target_modules=["q_proj"], exclude_modules=["nowhere"])
    with pytest.warns(RuntimeWarning, match="rank_pattern keys did not match"):
        adapted("llama", target_modules=["q_proj"], rank_pattern={"nowhere": 3})
    with pytest.raises(
        ValueError,
        match=r"`layers_to_transform` does not work with the regex `target_modules='.\*q_proj'`",
    ):
        config_for("llama", target_modules=".*q_proj", layers_to_transform=[0])


def test_rank_and_alpha_patterns(tmp_path):
    patterns = {
        "rank_pattern": {"q_proj": 3, r"layers\.1\.mlp\..*": 1},
        "alpha_pattern": {"q_proj": 9, "v_proj": 1.0},
    }
    model = adapted("llama", **patterns)
    layers = layers_of(model)
    assert layers[QV[0]].r["default"] == 3 and layers[QV[0]].scaling["default"] == 3.0
    assert layers[QV[1]].r["default"] == 2 and layers[QV[1]].scaling["default"] == 0.5
    assert layers["model.layers.1.mlp.up_proj"].r["default"] == 1
    assert layers["model.layers.0.mlp.up_proj"].r["default"] == 2
    model.save_pretrained(tmp_path)
    assert_same(PeftModel.from_pretrained(MODELS["llama"].build(), tmp_path), logits(model))


@pytest.mark.parametrize("given", [True, False])
def test_fan_in_fan_out_is_read_off_the_layer(given):
    """As PEFT's LoRA does, but without leaving a wrong setting in the saved config."""
    assert adapted("gpt2", fan_in_fan_out=given).peft_config["default"].fan_in_fan_out is True
    assert adapted("llama", fan_in_fan_out=given).peft_config["default"].fan_in_fan_out is False


@pytest.mark.parametrize("bias", ["none", "all", "taskmoe_lora_only"])
def test_bias(bias, tmp_path):
    """Trained, saved and loaded; `"all"` includes those of layers without an adapter."""
    name, batch = "gpt2", MODELS["gpt2"].inputs()
    model = adapted(name, bias=bias, target_modules=["c_attn"])
    trained = {
        key for key, p in model.named_parameters() if p.requires_grad and "taskmoe_lora_" not in key
    }
    assert all(key.endswith("bias") for key in trained)
    assert any("c_attn" in key for key in trained) == (bias != "none")
    assert any("c_fc" in key for key in trained) == (bias == "all")
    model.train()(**batch, labels=batch["input_ids"], task_embeds=tasks()).loss.backward()
    with torch.no_grad():
        for key in trained:
            parameter = model.get_parameter(key)
            assert parameter.grad is not None
            parameter.add_(0.5)
        expected = model.eval()(**batch, task_embeds=tasks()).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(MODELS[name].build(), tmp_path)
    assert torch.equal(loaded(**batch, task_embeds=tasks()).logits, expected)
    if bias != "none":
        with pytest.raises(ValueError, match="supports only 1 adapter with bias"):
            model.add_adapter("other", config_for(name, bias=bias, target_modules=["c_attn"]))
        assert "other" not in model.peft_config and "other" not in model.base_model.peft_config


@pytest.mark.parametrize("tokens", [[9, 11], {"embed_tokens": [9, 11]}], ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_trainable_token_indices(name, tokens, tmp_path):
    """Gemma's input and output embeddings are one: the trained tokens count in both."""
    batch = MODELS[name].inputs()
    model = adapted(name, trainable_token_indices=tokens)
    before = model(**batch, task_embeds=tasks()).logits
    model.train()(**batch, labels=batch["input_ids"], task_embeds=tasks()).loss.backward()
    deltas = {
        key: p
        for key, p in model.named_parameters()
        if "trainable_tokens_delta" in key and p.requires_grad
    }
    assert deltas and all(delta.grad.abs().max() > 0 for delta in deltas.values())
    with torch.no_grad():
        for delta in deltas.values():
            delta.add_(1.0)
        expected = model.eval()(**batch, task_embeds=tasks()).logits
    assert not torch.allclose(before, expected)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(MODELS[name].build(), tmp_path)
    assert torch.equal(loaded(**batch, task_embeds=tasks()).logits, expected)


def test_modules_to_save_are_saved_and_loaded(tmp_path):
    model = adapted("llama", modules_to_save=["lm_head"])
    with torch.no_grad():
        model.get_base_model().lm_head.modules_to_save["default"].weight.add_(0.3)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(MODELS["llama"].build(), tmp_path)
    assert_same(loaded, logits(model))
    assert not torch.equal(logits(model), logits(adapted("llama")))


def test_saving_the_merged_model(tmp_path):
    model = adapted("llama", "task")
    one = tasks(1).expand(ROWS, -1)
    expected = logits(model, one)
    with task_context(tasks(1)):
        merged = model.merge_and_unload()
    assert not hasattr(merged, "peft_config")
    with tempfile.TemporaryDirectory() as folder:
        merged.save_pretrained(folder)
        loaded = LlamaForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**BATCH).logits, expected, atol=1e-5, rtol=1e-4)
