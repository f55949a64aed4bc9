"""The experts: gates to one low-rank update. Pure torch; it knows no PEFT, no router and no layer.

The E experts of rank r are stacked into one A `(e*r, in)` and one B `(out, e*r)`. Multiplying the e*r bottleneck by the
gates, each repeated r times, before B equals the weighted sum over experts, without a loop over them and without any tensor
that has both a token and an expert x out axis.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def mix_bottleneck(h: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """Multiply each expert's r bottleneck features by its gate.

    Args:
        h: `A x`, `(tokens, e*r)`, expert by expert.
        gates: `(tokens, e)`.

    Returns:
        `(tokens, e*r)` of `h`'s dtype.
    """
    tokens, num_experts = gates.shape
    by_expert = h.view(tokens, num_experts, h.shape[1] // num_experts)
    return (by_expert * gates.to(h.dtype).unsqueeze(-1)).view(h.shape)


def expert_update(
    x: torch.Tensor, gates: torch.Tensor, weight_a: torch.Tensor, weight_b: torch.Tensor, scaling: float
) -> torch.Tensor:
    """`scaling * sum_i g_i B_i A_i x`, the plain form.

    Args:
        x: Input after dropout, `(tokens, in)`.
        gates: `(tokens, e)`.
        weight_a: `(e*r, in)`.
        weight_b: `(out, e*r)`.
        scaling: `lora_alpha / r`.

    Returns:
        `(tokens, out)`.
    """
    return F.linear(mix_bottleneck(F.linear(x, weight_a), gates), weight_b) * scaling


def keep_mask(like: torch.Tensor, p: float) -> tuple[torch.Tensor, float]:
    """Draw which input features the experts see this time.

    One byte per feature is kept for backward, against the float32 noise and the dropped input that `F.dropout` keeps on a
    CPU. There the draw itself is the larger cost, so it takes 15 random bits per feature instead of a float each: p is
    rounded to a multiple of 2^-15 and the returned rate is the rounded one, so that scaling by `1 / (1 - rate)` is exact.

    Args:
        like: Tensor whose shape and device the mask takes.
        p: Probability of dropping a feature, 0 < p < 1.

    Returns:
        The int8 mask (1 keep, 0 drop) and the rate at which it drops.
    """
    if like.device.type != "cpu":
        return torch.empty(like.shape, dtype=torch.int8, device=like.device).bernoulli_(1.0 - p), p
    threshold = min(max(round(p * 2**15), 1), 2**15 - 1)
    words = torch.empty((like.numel() + 1) // 2, dtype=torch.int32).random_()
    draws = words.bitwise_and_(0x7FFF7FFF).view(torch.int16)[: like.numel()]
    return torch.ge(draws, threshold).view(torch.int8).view(like.shape), threshold / 2**15
