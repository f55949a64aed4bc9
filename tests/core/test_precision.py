"""Half precision, autocast and mixed dtypes of adapter and base, within rounding of float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model

from peft_taskmoe import TaskMoELoraConfig
from tiny import TASK_DIM, randomise

HALVES = [torch.bfloat16, torch.float16]
IDS = torch.arange(4, 16).view(2, 6)
LABELS = torch.where(torch.arange(6) < 3, -100, IDS)
TASKS = torch.randn(2, TASK_DIM, generator=torch.Generator().manual_seed(0))
BATCH: dict[str, Any] = {"input_ids": IDS, "labels": LABELS, "task_embeds": TASKS}


@pytest.fixture
def adapted_in(tiny_model):
    """`adapted_in(bfloat16, autocast=True, ...)`: base in one dtype, adapter as PEFT makes it."""

    def make(dtype: torch.dtype, autocast: bool = True, **settings: Any):
        small = {"task_dim": TASK_DIM, "num_experts": 3, "r": 2, "lora_dropout": 0.0}
        config = TaskMoELoraConfig(**{**small, **settings})
        model = get_peft_model(tiny_model(dtype=dtype), config, autocast_adapter_dtype=autocast)
        return randomise(model)

    return make


def worst(found: torch.Tensor, expected: torch.Tensor) -> float:
    difference = found.detach().double() - expected.detach()
    return float(difference.abs().max() / expected.detach().abs().max())


@pytest.mark.parametrize("aux", [0.0, 0.5])  # the fused and the plain form
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_autocast(adapted_in, base, aux) -> None:
    """The adapter computes in bf16, keeps gradients in its own dtype, and stays near float32."""
    model = adapted_in(base, router_aux_loss_coef=aux).train()
    plain = adapted_in(torch.float32, router_aux_loss_coef=aux).train()
    expected = plain(**BATCH)
    expected.loss.backward()
    with torch.autocast("cpu", torch.bfloat16):
        found = model(**BATCH)
    found.loss.backward()
    # Every weight is random, so rounding grows from layer to layer: directions can be compared
    logits = (found.logits.float().flatten(), expected.logits.flatten())
    assert torch.cosine_similarity(*logits, dim=0) > 0.98
    got, wanted = (
        torch.cat([p.grad.flatten() for p in each.parameters() if p.requires_grad])
        for each in (model, plain)
    )
    assert got.dtype == torch.float32 and torch.cosine_similarity(got, wanted, dim=0) > 0.9


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_models_train_and_generate(adapted_in, dtype, autocast) -> None:
    """The adapter is in float32 or, without PEFT's `autocast_adapter_dtype`, in the base's."""
    model, losses = adapted_in(dtype, autocast).train(), []
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.01)
    for _ in range(4):
        out = model(**BATCH)
        out.loss.backward()
        assert out.logits.dtype == dtype
        assert {p.grad.dtype for p in trained} == {torch.float32 if autocast else dtype}
        assert all(torch.isfinite(p.grad).all() and p.grad.any() for p in trained)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(out.loss.item())
    assert min(losses[1:]) < losses[0]
    model.eval()
    settings = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    generated = model.generate(input_ids=IDS, task_embeds=TASKS, **settings)
    with torch.no_grad():
        first = model(input_ids=IDS, task_embeds=TASKS).logits[:, -1].argmax(-1)
    assert generated.shape == (2, 9) and torch.equal(generated[:, 6], first)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_task_embeddings_of_any_float_dtype(adapted_in, dtype) -> None:
    model = adapted_in(torch.float32).eval()
    with torch.no_grad():
        expected = model(**BATCH).logits
        found = model(input_ids=IDS, task_embeds=TASKS.to(dtype)).logits
    assert found.dtype == torch.float32 and worst(found, expected.double()) < 0.02


def test_a_model_cast_after_injection(adapted_in) -> None:
    """`model.to(torch.bfloat16)` takes the adapter along."""
    model = adapted_in(torch.float32).to(torch.bfloat16).train()
    loss = model(**BATCH).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert {p.grad.dtype for p in model.parameters() if p.requires_grad} == {torch.bfloat16}
