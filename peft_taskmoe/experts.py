"""Mixes low-rank experts by gates; dropout on their input.

The E experts of rank r are stacked into one A `(e*r, in)` and one B `(out, e*r)`. Multiplying the
e*r bottleneck by the gates, each repeated r times, before B equals the weighted sum over experts,
without a loop over them and without any tensor that has both a token and an expert x out axis.
"""

from __future__ import annotations

import math

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
    x: torch.Tensor,
    gates: torch.Tensor,
    weight_a: torch.Tensor,
    weight_b: torch.Tensor,
    scaling: float,
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


def draw_dropped(like: torch.Tensor, p: float) -> torch.Tensor:
    """Draw which input features the experts do not see this time.

    On a CPU the draw is the larger part of dropout's cost, and most features are kept. So only the
    dropped ones are drawn: the gaps between them are geometric, `1 + floor(log(1 - u) / log(1 -
    p))` for u uniform on [0, 1).

    Args:
        like: Tensor whose shape and device the draw is for.
        p: Probability of dropping a feature, 0 < p < 1.

    Returns:
        For `zero_dropped`: on a CPU the indices of the dropped features in the flattened tensor,
        ascending; elsewhere an int8 mask (1 keep, 0 drop).
    """
    if like.device.type != "cpu":
        return torch.empty(like.shape, dtype=torch.int8, device=like.device).bernoulli_(1.0 - p)
    n = like.numel()
    draws = int(n * p + 6.0 * math.sqrt(n * p) + 16.0)  # falls short once in 1e9 times
    dropped = torch.full((1,), -1)
    while dropped[-1] < n:
        gaps = torch.rand(draws, dtype=torch.float64).neg_().log1p_().mul_(1.0 / math.log1p(-p))
        further = gaps.clamp_(max=n).long().add_(1).cumsum_(0).add_(dropped[-1])
        dropped = torch.cat((dropped, further))
    return dropped[1 : torch.searchsorted(dropped, n)]


def zero_dropped(features: torch.Tensor, dropped: torch.Tensor) -> torch.Tensor:
    """Set the features dropped by `draw_dropped` to zero in a contiguous tensor, in place."""
    if dropped.dtype == torch.int8:
        return features.mul_(dropped)
    features.view(-1).index_fill_(0, dropped, 0.0)
    return features


def without_dropped(features: torch.Tensor, dropped: torch.Tensor) -> torch.Tensor:
    """A contiguous copy with the features dropped by `draw_dropped` set to zero."""
    if dropped.dtype == torch.int8:
        return features * dropped
    return zero_dropped(features.clone(memory_format=torch.contiguous_format), dropped)
