"""Unloading and merging: the base comes back whole, and what is refused has changed nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model, get_peft_model_state_dict
from peft.helpers import disable_input_dtype_casting, rescale_adapter_scale
from torch import nn
from transformers import RobertaConfig, RobertaForSequenceClassification

from cases import MODELS, SMALL, adapted, tasks
from peft_taskmoe import TaskMoELoraConfig, task_context
from peft_taskmoe.layer import TaskMoELoraLayer

BATCH = MODELS["llama"].inputs()


def logits(model: nn.Module, **extra: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**BATCH, **extra).logits


def train_a_little(model: nn.Module) -> None:
    """Move whatever is trained beside the adapter."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name or "trainable_tokens_delta" in name:
                parameter.add_(1.0)


def test_trained_tokens_do_not_stand_in_the_way() -> None:
    """They leave with the adapter, and stay where it is merged."""
    ids = {"trainable_token_indices": [4, 9]}
    model = adapted("llama", "token", **ids)
    train_a_little(model)
    assert torch.equal(logits(model.unload()), logits(MODELS["llama"].build()))
    model = adapted("llama", "task", **ids)
    train_a_little(model)
    expected = logits(model, task_embeds=tasks(1).expand(3, -1))
    with task_context(tasks(1)):
        merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=1e-4)
    assert not any(isinstance(module, TaskMoELoraLayer) for module in merged.modules())


@pytest.mark.parametrize("merge", [True, False])
def test_a_trained_head_without_a_weight_stays(merge) -> None:
    """RoBERTa's classification head is a module of two layers."""
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=40,
    )  # fmt: skip
    settings = TaskMoELoraConfig(task_type="SEQ_CLS", **SMALL, router_inputs="task")
    model = get_peft_model(RobertaForSequenceClassification(config), settings).eval()
    train_a_little(model)
    batch = {"input_ids": torch.arange(4, 12).view(2, 4)}
    with torch.no_grad():
        expected = model(**batch, task_embeds=tasks(1).expand(2, -1)).logits
        head = {n.rpartition("default.")[2]: p for n, p in model.named_parameters() if "_save" in n}
        with task_context(tasks(1)):
            bare = model.merge_and_unload() if merge else model.unload()
        found = bare(**batch).logits
    left = dict(bare.classifier.named_parameters())  # the trained one, as with LoRA
    assert left.keys() == head.keys() and all(torch.equal(left[n], head[n]) for n in left)
    if merge:
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


EXTRAS = [{"modules_to_save": ["embed_tokens"]}, {"trainable_token_indices": [0, 1]}]
REFUSED = [(why, "merge_and_unload", extra) for why in ("token", "no task") for extra in EXTRAS]
REFUSED += [("not finite", "merge_and_unload", {}), ("not finite", "merge_adapter", {})]
REFUSED += [(why, "merge_adapter", EXTRAS[1]) for why in ("token", "no task")]


@pytest.mark.parametrize(("why", "way", "extra"), REFUSED, ids=str)
def test_a_refused_merge_changes_nothing(why, way, extra) -> None:
    model = adapted("llama", "token" if why == "token" else "task", **extra)
    train_a_little(model)
    if why == "not finite":  # in the last layer alone
        layer = [m for m in model.modules() if isinstance(m, TaskMoELoraLayer)][-1]
        layer.taskmoe_lora_B["default"].weight.data[0, 0] = float("nan")
    embeds = tasks(1).expand(3, -1)
    before = {name: p.clone() for name, p in model.named_parameters()}
    given = {} if why == "no task" else {"task_embeds": embeds}
    saved = set(get_peft_model_state_dict(model))
    expected = None if why == "no task" else logits(model, **given)
    with pytest.raises(ValueError):
        if why == "no task":
            getattr(model, way)()
        else:
            with task_context(tasks(1)):
                getattr(model, way)(safe_merge=True)
    assert set(get_peft_model_state_dict(model)) == saved
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[n].nan_to_num(), p.nan_to_num()) for n, p in before.items())
    if expected is not None:
        assert torch.equal(logits(model, **given).nan_to_num(), expected.nan_to_num())


def test_pefts_helpers_work_or_refuse_by_name() -> None:
    model = adapted("llama").bfloat16()
    for module in model.modules():
        if isinstance(module, TaskMoELoraLayer):
            for part in (module.taskmoe_lora_A, module.taskmoe_lora_B, module.taskmoe_lora_router):
                part.float()
    cast = logits(model, task_embeds=tasks())
    with disable_input_dtype_casting(model):  # the adapter computes in the input's bfloat16
        uncast = logits(model, task_embeds=tasks())
    assert not torch.equal(uncast, cast)
    torch.testing.assert_close(uncast, cast, atol=0.3, rtol=0.1)
    assert torch.equal(logits(model, task_embeds=tasks()), cast)
    with pytest.raises(ValueError, match="LoraLayer"), rescale_adapter_scale(model, 0.5):
        pass
