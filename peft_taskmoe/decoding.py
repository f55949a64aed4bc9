"""Router and experts of one layer for a decode step: one new token a row, without autograd."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .fused import ExpertShape
from .router import spread_over_tokens, task_logits

_FEW_ROWS = 8


@dataclass(frozen=True, slots=True)
class DecodingWeights:
    """What does not change during one generation.

    Attributes:
        a_and_router: A, then the token part of the router, `(e*r + e, in)`; A alone for a router
            that does not read the token.
        b: `scaling * B`, `(e*r, out)`.
        start: `(e*r + e, rows)`: zeros, then the task's logits of each row. None for a router that
            does not read both.
        gates: `(e, 1, rows)` for a router that reads the task alone, else None.
        shape: The adapter's numbers.
    """

    a_and_router: torch.Tensor
    b: torch.Tensor
    start: torch.Tensor | None
    gates: torch.Tensor | None
    shape: ExpertShape


def decoding_dtype(weight: torch.Tensor, rows: int) -> torch.dtype:
    """The dtype of decode steps: the adapter's, or float32 where a CPU is faster with it.

    A product in half precision takes a CPU 20 to 30 us whatever its size; a float32 product of up
    to 8 rows takes 10.
    """
    low = weight.dtype in (torch.bfloat16, torch.float16)
    few = weight.device.type == "cpu" and rows <= _FEW_ROWS
    return torch.float32 if low and few else weight.dtype


def decoding_weights(
    weight_a: torch.Tensor,
    weight_b: torch.Tensor,
    router_weight: torch.Tensor,
    task: torch.Tensor | None,
    rows: int,
    scaling: float,
    shape: ExpertShape,
) -> DecodingWeights:
    """Prepare `decoding_step` for a generation of so many rows.

    Args:
        weight_a: `(e*r, in)`.
        weight_b: `(out, e*r)`.
        router_weight: `(e, in + task_dim)`, or the part of it that the router reads.
        task: `(n, task_dim)`, each for `rows / n` consecutive rows; or None.
        rows: Rows of a step.
        scaling: `lora_alpha / r`, unless it was set otherwise.
        shape: The adapter's numbers, without `top_k`.

    Returns:
        What each step takes.
    """
    dtype = decoding_dtype(weight_a, rows)
    per_row = start = gates = None
    if task is not None:
        per_row = spread_over_tokens(task_logits(task, router_weight), rows, None).t()
    if not shape.reads_token:
        assert per_row is not None
        gates = torch.softmax(per_row, dim=0).to(dtype).unsqueeze(1)
    else:
        if per_row is not None:
            start = per_row.new_zeros(weight_a.shape[0] + shape.num_experts, rows)
            start[weight_a.shape[0] :] = per_row
            start = start.to(dtype)
        weight_a = torch.cat((weight_a, router_weight[:, : weight_a.shape[1]]))
    b = (weight_b.to(dtype) * scaling).t().contiguous()
    return DecodingWeights(weight_a.to(dtype), b, start, gates, shape)


def decoding_step(x: torch.Tensor, out: torch.Tensor, prepared: DecodingWeights) -> torch.Tensor:
    """Add the update to `out` in place.

    Args:
        x: `(rows, in)`.
        out: Output of the base layer, `(rows, out)`, owned by the caller.
        prepared: See `decoding_weights`.

    Returns:
        `out`.
    """
    weight, shape = prepared.a_and_router, prepared.shape
    x = x.to(weight.dtype)
    if prepared.start is None:
        product = torch.mm(weight, x.t())
    else:
        product = torch.addmm(prepared.start, weight, x.t())
    rank, gates = shape.num_experts * shape.r, prepared.gates
    if gates is None:
        precise = torch.promote_types(weight.dtype, torch.float32)
        gates = torch.softmax(product[rank:], 0, dtype=precise).to(weight.dtype).unsqueeze(1)
    by_expert = product[:rank].view(shape.num_experts, shape.r, x.shape[0])
    mixed = (by_expert * gates).view(rank, x.shape[0]).t()
    if out.dtype == prepared.b.dtype:
        return out.addmm_(mixed, prepared.b)
    return out.add_(mixed @ prepared.b)
