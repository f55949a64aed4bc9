"""`experts.py` against the loops of `reference.py`, and its dropout against statistics."""

from __future__ import annotations

import pytest
import reference
import torch

from peft_taskmoe.experts import expert_update, keep_mask, mix_bottleneck


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
    expected = reference.adapted_linear(
        x,
        torch.zeros(5, 6, dtype=torch.float64),
        None,
        weight_a,
        weight_b,
        router,
        None,
        [],
        r=r,
        scaling=1.7,
    )
    torch.testing.assert_close(update, expected, rtol=0, atol=1e-12)


def test_each_gate_meets_its_own_expert() -> None:
    h = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    assert mix_bottleneck(h, torch.tensor([[10.0, 100.0]])).tolist() == [[10.0, 20.0, 300.0, 400.0]]


def test_no_tokens_give_no_update() -> None:
    assert mix_bottleneck(torch.zeros(0, 6), torch.zeros(0, 3)).shape == (0, 6)


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_dropout_drops_at_its_rate_and_scales_without_bias(p) -> None:
    torch.manual_seed(11)
    n = 400_001  # odd: the draws come in pairs
    keep, rate = keep_mask(torch.empty(n), p)
    assert keep.shape == (n,) and keep.dtype == torch.int8
    assert set(keep.unique().tolist()) == {0, 1}
    assert abs(rate - p) <= 2**-16
    dropped = 1 - keep.double().mean().item()
    deviation = (p * (1 - p) / n) ** 0.5
    assert abs(dropped - rate) < 4 * deviation
    x = torch.rand(n, dtype=torch.float64) + 1
    assert (x * keep / (1 - rate)).mean().item() == pytest.approx(
        x.mean().item(), abs=10 * deviation / (1 - p)
    )


def test_dropout_draws_neighbours_independently() -> None:
    """Two draws share a 32-bit word: dropping one must say nothing of the other, nor one row of the next."""
    torch.manual_seed(12)
    keep = keep_mask(torch.empty(2000, 100), 0.3)[0].double()
    for a, b in ((keep[:, ::2], keep[:, 1::2]), (keep[:, 1:-1:2], keep[:, 2::2]), (keep[:-1], keep[1:])):
        correlation = torch.corrcoef(torch.stack((a.flatten(), b.flatten())))[0, 1].item()
        assert abs(correlation) < 4 / a.numel() ** 0.5


def test_dropout_is_never_nothing_nor_everything() -> None:
    """The rate is rounded to 2^-15, but 0 < p < 1 stays so."""
    assert keep_mask(torch.empty(4), 1e-9)[1] == 2**-15
    assert keep_mask(torch.empty(4), 1 - 1e-9)[1] == 1 - 2**-15


def test_dropout_follows_the_seed() -> None:
    masks = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        masks.append(keep_mask(torch.empty(64), 0.5)[0])
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])
