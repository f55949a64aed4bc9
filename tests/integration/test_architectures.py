"""Every architecture of `cases.py`: what is adapted, routed by its own row, trained and saved."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import BertConfig, BertForQuestionAnswering

from cases import (
    CASES,
    MODELS,
    ROWS,
    SMALL,
    STACKED_EXPERTS,
    adapted,
    config_for,
    logits_of,
    real_positions,
    rows_of,
    tasks,
)
from peft_taskmoe import TaskMoELoraConfig, task_context
from peft_taskmoe.layer import TaskMoELoraLayer

torch.set_num_threads(1)


@pytest.mark.parametrize("name", MODELS)
def test_all_linear_adapts_every_linear_layer_but_the_head(name):
    if isinstance(MODELS[name].target_modules, str) and MODELS[name].target_modules != "all-linear":
        pytest.skip("the experts are linear layers before transformers 5")
    model = adapted(name)
    found = {
        key.rsplit(".", 1)[-1]
        for key, module in model.named_modules()
        if isinstance(module, TaskMoELoraLayer)
    }
    assert found == MODELS[name].linears
    left = [
        key for key, module in model.get_base_model().named_modules()
        if isinstance(module, nn.Linear) and "base_layer" not in key and "taskmoe_lora_" not in key
    ]  # fmt: skip
    assert all(
        key.split(".")[-1] in ("lm_head", "embed_out", "head") or "classifier" in key
        for key in left
    ), left


@pytest.mark.parametrize("name", MODELS)
def test_fresh_adapter_changes_nothing(name):
    batch = MODELS[name].inputs()
    before = logits_of(MODELS[name].build()(**batch))
    after = logits_of(adapted(name, init_weights=True)(**batch, task_embeds=tasks()))
    torch.testing.assert_close(after, before)


@pytest.mark.parametrize(("name", "adapter"), CASES)
def test_each_row_is_routed_by_its_own_task(name, adapter):
    """A row gives what it gives alone, and a change of a task reaches its row only."""
    model, batch = adapted(name, adapter), MODELS[name].inputs()
    embeds = tasks()
    other = embeds.clone()
    other[1] = -other[1]
    with torch.no_grad():
        together = logits_of(model(**batch, task_embeds=embeds))
        changed = logits_of(model(**batch, task_embeds=other))
        real = real_positions(name, batch, together)
        for i in range(ROWS):
            row = slice(i, i + 1)
            alone = logits_of(model(**rows_of(batch, row), task_embeds=embeds[row]))
            torch.testing.assert_close(
                together[row][real[row]], alone[real[row]], atol=1e-5, rtol=1e-4
            )
    torch.testing.assert_close(changed[[0, 2]], together[[0, 2]])
    moved = (changed[1] - together[1]).abs().max()
    if "task" in config_for(name, adapter).router_inputs:
        assert moved > 1e-4
    else:
        assert moved == 0


@pytest.mark.parametrize("name", MODELS)
def test_merged_equals_unmerged(name):
    """On every kind of base weight, Conv1D's transposed one included."""
    model, batch = adapted(name, "task"), MODELS[name].inputs()
    embeds = tasks(1)
    with torch.no_grad(), task_context(embeds):
        unmerged = logits_of(model(**batch, task_embeds=embeds.expand(ROWS, -1)))
        merged_model = model.merge_and_unload()
    merged = logits_of(merged_model(**batch))
    torch.testing.assert_close(merged, unmerged, atol=1e-5, rtol=1e-4)
    assert not any(isinstance(module, TaskMoELoraLayer) for module in merged_model.modules())


@pytest.mark.parametrize(("name", "adapter"), CASES)
def test_training_reaches_every_adapter_weight_and_nothing_else(name, adapter):
    model, batch = adapted(name, adapter), MODELS[name].inputs()
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    base = copy.deepcopy(
        {key: p for key, p in model.named_parameters() if "taskmoe_lora_" not in key}
    )
    torch.manual_seed(3)
    target = torch.randn_like(logits_of(model(**batch, task_embeds=tasks())))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(3):
        loss = (logits_of(model(**batch, task_embeds=tasks())) - target).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        for key, parameter in model.named_parameters():
            if "taskmoe_lora_" in key:
                assert parameter.grad is not None and parameter.grad.isfinite().all(), key
                assert parameter.grad.abs().max() > 0, key
            elif "modules_to_save" not in key:
                assert parameter.grad is None, key
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]
    now = dict(model.named_parameters())
    for key, before in base.items():
        if "modules_to_save" not in key:
            assert torch.equal(now[key], before), key


@pytest.mark.parametrize(("name", "adapter"), CASES)
def test_saved_and_loaded_gives_the_same_output(name, adapter, tmp_path):
    model, batch = adapted(name, adapter), MODELS[name].inputs()
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    loaded = PeftModel.from_pretrained(MODELS[name].build(), tmp_path).eval()
    with torch.no_grad():
        expected = logits_of(model(**batch, task_embeds=tasks()))
        torch.testing.assert_close(
            logits_of(loaded(**batch, task_embeds=tasks())), expected, rtol=0, atol=0
        )
    peft_fills_in = {"inference_mode", "auto_mapping", "modules_to_save"}
    before, after = (m.peft_config["default"].to_dict() for m in (model, loaded))
    assert {k: v for k, v in before.items() if k not in peft_fills_in} == {
        k: v for k, v in after.items() if k not in peft_fills_in
    }


@pytest.mark.skipif(not STACKED_EXPERTS, reason="they are linear layers before transformers 5")
def test_experts_of_a_sparse_block_are_no_linear_layers_and_stay():
    """Mixtral's experts are stacked parameters: named outright they are refused, with a way out."""
    with pytest.raises(TypeError, match=r"`MixtralExperts` is no linear layer.*`exclude_modules`"):
        get_peft_model(
            MODELS["mixtral"].build(), config_for("mixtral", target_modules=["experts", "q_proj"])
        )


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(4, 4, 1),
        nn.Conv2d(4, 4, 1),
        nn.Embedding(4, 4),
        nn.LayerNorm(4),
        nn.Bilinear(4, 4, 4),
    ],
)
def test_what_is_no_linear_layer_is_refused(layer):
    with pytest.raises(
        TypeError, match=rf"`{type(layer).__name__}` is no linear layer.*adapts linear layers only"
    ):
        get_peft_model(
            nn.ModuleDict({"it": layer}), TaskMoELoraConfig(**SMALL, target_modules=["it"])
        )


def test_multihead_attention_refuses_its_uncalled_projection():
    model = nn.Sequential(nn.MultiheadAttention(8, 2))
    with pytest.raises(
        ValueError, match=r"read by nn.MultiheadAttention without calling.*out_proj"
    ):
        get_peft_model(model, TaskMoELoraConfig(**SMALL, target_modules=["out_proj"]))


def test_all_linear_keeps_off_the_head_of_a_question_answerer():
    model = BertForQuestionAnswering(BertConfig(**MODELS["bert_tokens"].config))
    model = get_peft_model(model, TaskMoELoraConfig(**SMALL, task_type="QUESTION_ANS"))
    assert not isinstance(model.get_base_model().qa_outputs, TaskMoELoraLayer)
    trained = {
        name.split(".")[2]
        for name, p in model.named_parameters()
        if p.requires_grad and "modules_to_save" in name
    }
    assert trained == {"qa_outputs"}
