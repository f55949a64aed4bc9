"""`router.py` against the loops of `reference.py`."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import reference
from peft_taskmoe.router import (
    check_task_embeds,
    gates_from_logits,
    keep_top_k,
    load_balancing_loss,
    normalize_task,
    spread_over_tokens,
    sum_logits,
    task_logits,
)

CLOSE = {"rtol": 0, "atol": 1e-12}


@pytest.mark.parametrize("task_norm", ["matched", "rms", "none"])
def test_the_task_is_scaled_as_documented(task_norm) -> None:
    tasks = torch.randn(3, 6, dtype=torch.float64) * 7
    expected = torch.stack([reference.scaled_task(task, task_norm, 10) for task in tasks])
    torch.testing.assert_close(normalize_task(tasks, task_norm, 10), expected, **CLOSE)


def test_the_scale_of_the_encoder_does_not_reach_the_router() -> None:
    task, zero = torch.randn(1, 6), torch.zeros(2, 6)
    for norm, size in (("matched", 0.25 * 10**0.5), ("rms", 6**0.5)):
        scaled = normalize_task(task * 1e-3, norm, 10)
        torch.testing.assert_close(scaled, normalize_task(task * 1e3, norm, 10))
        assert scaled.norm().item() == pytest.approx(size, rel=1e-5)
        assert torch.equal(normalize_task(zero, norm, 10), zero)
    assert torch.equal(normalize_task(task, "none", 10), task)


@pytest.mark.parametrize("value, found", [
    ("a task", "str"),
    (torch.zeros(3), "of shape (3,) and dtype torch.float32"),
    (torch.zeros(1, 3, dtype=torch.int64), "of shape (1, 3) and dtype torch.int64"),
])  # fmt: skip
def test_what_is_no_batch_of_tasks_is_refused(value, found) -> None:
    with pytest.raises(ValueError) as caught:
        check_task_embeds(value)
    assert str(caught.value) == (
        f"`task_embeds` must be a float tensor of shape (batch, task_dim), got {found}. "
        "Pass e.g. `task_embeds=encoder(prompts)`."
    )
    check_task_embeds(torch.zeros(1, 3, dtype=torch.bfloat16))


def test_each_task_owns_consecutive_tokens() -> None:
    per_task = torch.tensor([[1.0], [2.0]])
    assert spread_over_tokens(per_task, 6, None).flatten().tolist() == [1, 1, 1, 2, 2, 2]
    packed = torch.tensor([0, 1, 1, 1, 0])
    assert spread_over_tokens(per_task, 5, packed).flatten().tolist() == [1, 2, 2, 2, 1]


@pytest.mark.parametrize("top_k", [None, 1, 2, 4])
@pytest.mark.parametrize("router_inputs", ["token+task", "token", "task"])
@pytest.mark.parametrize("packed", [False, True])
def test_gates_equal_the_loops(top_k, router_inputs, packed) -> None:
    x = torch.randn(6, 5, dtype=torch.float64)
    tasks = None if router_inputs == "token" else torch.randn(2, 3, dtype=torch.float64)
    reads_token = "token" in router_inputs
    router = torch.randn(4, 5 * reads_token + 3 * (tasks is not None), dtype=torch.float64)
    owners = [0, 1, 1, 0, 0, 1] if packed else [0, 0, 0, 1, 1, 1]
    token = F.linear(x, router[:, :5]) if reads_token else None
    per_task = None if tasks is None else task_logits(tasks, router)
    logits = sum_logits(token, per_task, 6, torch.tensor(owners) if packed else None)
    expected = reference.all_gates(x, router, tasks, owners, reads_token=reads_token, top_k=top_k)
    gates = gates_from_logits(logits, top_k)
    torch.testing.assert_close(gates, expected, **CLOSE)
    torch.testing.assert_close(gates.sum(-1), torch.ones(6, dtype=torch.float64), **CLOSE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gates_are_float32(dtype) -> None:
    x, router = torch.randn(4, 5, dtype=dtype), torch.randn(3, 8, dtype=dtype)
    logits = sum_logits(F.linear(x, router[:, :5]), task_logits(torch.randn(2, 3), router), 4, None)
    assert logits.dtype == gates_from_logits(logits, None).dtype == torch.float32
    assert sum_logits(F.linear(x, router[:, :5]), None, 4, None).dtype == torch.float32
    assert task_logits(torch.randn(2, 3), router).dtype == torch.float32


def test_ties_keep_exactly_top_k() -> None:
    kept = keep_top_k(torch.zeros(3, 4), 2)
    assert (kept == 0).sum(-1).tolist() == [2, 2, 2]
    assert torch.isneginf(kept).sum(-1).tolist() == [2, 2, 2]
    assert torch.isneginf(keep_top_k(torch.zeros(2, 4), 2)).sum(-1).tolist() == [2, 2]


@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_the_balancing_loss_and_its_gradient_equal_the_loops(top_k, masked) -> None:
    logits = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    counted = [True, False, True, True, False] if masked else [True] * 5
    mask = torch.tensor(counted) if masked else None
    loss, gradient = load_balancing_loss(logits, top_k, mask)
    expected = reference.balancing_loss(logits, top_k, counted)
    torch.testing.assert_close(loss, expected.detach(), **CLOSE)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, logits)[0], **CLOSE)


def test_the_balancing_loss_is_1_when_balanced_e_when_collapsed_0_of_padding() -> None:
    collapsed, balanced = torch.zeros(8, 4), torch.full((8, 4), -60.0)
    collapsed[:, 2] = 60.0
    balanced[torch.arange(8), torch.arange(8) % 4] = 60.0
    assert load_balancing_loss(collapsed, None, None)[0].item() == pytest.approx(4.0)
    assert load_balancing_loss(balanced, None, None)[0].item() == pytest.approx(1.0)
    loss, gradient = load_balancing_loss(collapsed, None, torch.zeros(8, dtype=torch.bool))
    assert loss.item() == 0.0 and not gradient.any()
