"""`experts.py` against the loops of `reference.py`, and its dropout against statistics."""

from __future__ import annotations

import pytest
import torch

import reference
from peft_taskmoe.experts import (
    draw_dropped,
    expert_update,
    mix_bottleneck,
    without_dropped,
    zero_dropped,
)


@pytest.mark.parametrize("num_experts", [1, 2, 5])
@pytest.mark.parametrize("r", [1, 3])
def test_the_update_equals_the_loops(num_experts, r) -> None:
    torch.manual_seed(num_experts)
    x = torch.randn(4, 6, dtype=torch.float64)
    weight_a = torch.randn(num_experts * r, 6, dtype=torch.float64)
    weight_b = torch.randn(5, num_experts * r, dtype=torch.float64)
    router = torch.randn(num_experts, 6, dtype=torch.float64)
    gates = reference.all_gates(x, router, None, [])
    update = expert_update(x, gates, weight_a, weight_b, 1.7)
    base, weights = torch.zeros(5, 6, dtype=torch.float64), (weight_a, weight_b, router)
    expected = reference.adapted_linear(x, base, None, *weights, None, [], r=r, scaling=1.7)
    torch.testing.assert_close(update, expected, rtol=0, atol=1e-12)


def test_each_gate_meets_its_own_expert() -> None:
    h = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    assert mix_bottleneck(h, torch.tensor([[10.0, 100.0]])).tolist() == [[10.0, 20.0, 300.0, 400.0]]


def test_gates_in_full_precision_leave_the_bottleneck_in_its_own() -> None:
    assert mix_bottleneck(torch.ones(2, 6, dtype=torch.bfloat16), torch.ones(2, 3)).dtype == (
        torch.bfloat16
    )


@pytest.mark.parametrize("dtype", [torch.long, torch.int8])
def test_features_of_any_layout_come_back_contiguous_without_the_dropped_ones(dtype) -> None:
    features = torch.arange(1.0, 7.0).view(2, 3).t()
    dropped = (
        torch.tensor([1, 4])
        if dtype == torch.long
        else torch.tensor([[1, 0], [1, 1], [0, 1]], dtype=dtype)
    )
    left = without_dropped(features, dropped)
    assert left.tolist() == [[1.0, 0.0], [2.0, 5.0], [0.0, 6.0]]
    assert features.flatten().tolist() == [1.0, 4.0, 2.0, 5.0, 3.0, 6.0]


def test_no_tokens_give_no_update() -> None:
    assert mix_bottleneck(torch.zeros(0, 6), torch.zeros(0, 3)).shape == (0, 6)


def kept(p: float, *size: int) -> torch.Tensor:
    """1 where a feature was kept, 0 where it was dropped."""
    return zero_dropped(torch.ones(size, dtype=torch.float64), draw_dropped(torch.empty(size), p))


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_dropout_drops_at_its_rate_and_scales_without_bias(p) -> None:
    torch.manual_seed(11)
    n = 400_001
    keep = kept(p, n)
    assert set(keep.unique().tolist()) == {0, 1}
    deviation = (p * (1 - p) / n) ** 0.5
    assert abs(1 - keep.mean().item() - p) < 4 * deviation
    x = torch.rand(n, dtype=torch.float64) + 1
    assert (x * keep / (1 - p)).mean().item() == pytest.approx(
        x.mean().item(), abs=10 * deviation / (1 - p)
    )


def test_dropout_draws_neighbours_independently() -> None:
    """Gaps are drawn, so dropping one must say nothing of the next, nor one row of the next."""
    torch.manual_seed(12)
    keep = kept(0.3, 2000, 100)
    for a, b in ((keep[:, :-1], keep[:, 1:]), (keep[:, :-2], keep[:, 2:]), (keep[:-1], keep[1:])):
        correlation = torch.corrcoef(torch.stack((a.flatten(), b.flatten())))[0, 1].item()
        assert abs(correlation) < 4 / a.numel() ** 0.5


def test_dropout_reaches_the_first_and_the_last_feature() -> None:
    torch.manual_seed(13)
    rate = 1 - torch.stack([kept(0.5, 3) for _ in range(2000)]).mean(0)
    assert (rate - 0.5).abs().max() < 4 * (0.25 / 2000) ** 0.5


def test_dropout_takes_more_draws_where_the_first_fall_short(monkeypatch) -> None:
    """Gaps of 1 only, as if 0 were drawn each time, drop every feature."""
    monkeypatch.setattr(torch, "rand", lambda size, dtype: torch.zeros(size, dtype=dtype))
    assert draw_dropped(torch.empty(10_000), 0.05).tolist() == list(range(10_000))


@pytest.mark.parametrize("p", [1e-300, 1e-9, 1 - 1e-9])
def test_dropout_at_the_ends(p) -> None:
    torch.manual_seed(14)
    assert kept(p, 100).sum() == (100 if p < 0.5 else 0)
