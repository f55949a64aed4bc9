"""Router and experts as one autograd function: the fast path of the adapted layer.

It knows tensors only. What it computes stands readably in `router.py` and `experts.py`, against which it is tested in
float64. What it saves over them: it keeps x, the bottleneck and the gates for backward and nothing with (tokens, out) entries; one
product serves A and the token part of the router; the update is accumulated into the base output, and the gradient of
the input into the base's, instead of adding tensors of that size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from .experts import keep_mask, mix_bottleneck
from .router import keep_top_k, spread_over_tokens, task_logits


@dataclass(frozen=True, slots=True)
class ExpertShape:
    """The plain numbers of one adapter on one layer.

    Attributes:
        num_experts: E.
        r: Rank of each expert.
        scaling: `lora_alpha / r`.
        top_k: Gates kept per token, or None for all.
        reads_token: Whether the router reads the token.
        reads_task: Whether the router reads the task.
    """

    num_experts: int
    r: int
    scaling: float
    top_k: int | None
    reads_token: bool
    reads_task: bool


def _gates(
    token: torch.Tensor | None,
    per_task: torch.Tensor | None,
    tokens: int,
    token_tasks: torch.Tensor | None,
    top_k: int | None,
) -> torch.Tensor:
    """Softmax of token part `(tokens, e)` plus task part `(n, e)`, without spreading the latter where a view does."""
    if token is None:
        assert per_task is not None
        logits = spread_over_tokens(per_task, tokens, token_tasks)
    else:
        logits = token.to(torch.promote_types(token.dtype, torch.float32))
        if per_task is not None:
            if token_tasks is not None:
                logits = logits + per_task[token_tasks]
            elif per_task.shape[0] == tokens:
                logits = logits + per_task
            else:
                grouped = logits.reshape(per_task.shape[0], tokens // per_task.shape[0], logits.shape[-1])
                logits = (grouped + per_task.unsqueeze(1)).view(logits.shape)
    return torch.softmax(keep_top_k(logits, top_k), dim=-1)


class FusedUpdate(torch.autograd.Function):
    """`y = base + scaling * sum_i g_i B_i A_i dropout(x)` with its gates, for tensors of one dtype.

    The base output is either given (`base`, any layer's) or computed here from a frozen `weight` and `bias`, in which case
    the input's gradient is accumulated in one buffer. Gradients are those of the plain form. Double backward refuses.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        base: torch.Tensor | None,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        weight_a: torch.Tensor,
        weight_b: torch.Tensor,
        router_weight: torch.Tensor,
        task: torch.Tensor | None,
        token_tasks: torch.Tensor | None,
        shape: ExpertShape,
        dropout: float,
    ) -> torch.Tensor:
        """Compute the output.

        Args:
            ctx: Autograd's context.
            x: `(..., in)`.
            base: Output of the base layer `(..., out)`, or None to compute it from `weight`.
            weight: Frozen `(out, in)`, or None.
            bias: Frozen `(out,)`, or None.
            weight_a: `(e*r, in)`.
            weight_b: `(out, e*r)`.
            router_weight: `(e, in + task_dim)`, or what of it the router reads.
            task: `(n, task_dim)`, or None.
            token_tasks: `(tokens,)` index of each token's task, or None.
            shape: The plain numbers.
            dropout: Probability of dropping an input feature; 0.0 when not training.

        Returns:
            `(..., out)`.
        """
        x2 = x.reshape(-1, x.shape[-1])
        rank = shape.num_experts * shape.r
        scaling, keep = shape.scaling, None
        w_x = router_weight[:, : x2.shape[1]] if shape.reads_token else None
        if dropout:
            keep, rate = keep_mask(x2, dropout)
            scaling /= 1.0 - rate
            h = (x2 * keep) @ weight_a.t()
            token = None if w_x is None else x2 @ w_x.t()
        elif w_x is None:
            h, token = x2 @ weight_a.t(), None
        else:
            h_and_token = x2 @ torch.cat((weight_a, w_x)).t()
            h, token = h_and_token[:, :rank], h_and_token[:, rank:]
        per_task = None if task is None else task_logits(task, router_weight)
        gates = _gates(token, per_task, x2.shape[0], token_tasks, shape.top_k)
        if not h.is_contiguous():
            h = h.contiguous()
        z = mix_bottleneck(h, gates)
        if weight is not None:
            out = F.linear(x, weight, bias)
            out.view(-1, out.shape[-1]).addmm_(z, weight_b.t(), alpha=scaling)
        else:
            assert base is not None
            out = torch.addmm(base.reshape(-1, base.shape[-1]), z, weight_b.t(), alpha=scaling).view(
                base.shape
            )
        ctx.save_for_backward(x, h, gates, keep, weight, weight_a, weight_b, router_weight, task, token_tasks)
        ctx.scaling, ctx.reads_token = scaling, shape.reads_token
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of x, base, A, B, the router and the task embedding."""
        x, h, gates, keep, weight, weight_a, weight_b, router_weight, task, token_tasks = ctx.saved_tensors
        x2 = x.reshape(-1, x.shape[-1])
        dy = grad_out.reshape(-1, grad_out.shape[-1])
        tokens, num_experts = gates.shape
        in_features, rank = x2.shape[1], h.shape[1]

        dz = dy @ (weight_b * ctx.scaling)
        grad_b = dy.t() @ mix_bottleneck(h, gates).mul_(ctx.scaling)
        d_gates = (dz * h).view(tokens, num_experts, rank // num_experts).sum(-1).to(gates.dtype)
        d_logits = torch._softmax_backward_data(d_gates, gates, -1, gates.dtype)
        dh = mix_bottleneck(dz, gates)
        d_token = d_logits.to(dh.dtype) if ctx.reads_token else None
        w_x = router_weight[:, :in_features] if ctx.reads_token else None

        grad_x = None
        if ctx.needs_input_grad[0]:
            if keep is None:
                grad_x = (dy @ weight).view_as(x2) if weight is not None else None
                left, right = dh, weight_a
                if w_x is not None and d_token is not None:
                    left, right = torch.cat((dh, d_token), 1), torch.cat((weight_a, w_x))
                grad_x = left @ right if grad_x is None else grad_x.addmm_(left, right)
            else:
                grad_x = (dh @ weight_a).mul_(keep)
                if w_x is not None:
                    grad_x.addmm_(d_token, w_x)
                if weight is not None:
                    grad_x.addmm_(dy, weight)
            grad_x = grad_x.view(x.shape)

        if keep is None and d_token is not None:
            both = torch.cat((dh, d_token), 1).t() @ x2
            grad_a, grad_w_x = both[:rank], both[rank:]
        else:
            grad_a = dh.t() @ (x2 if keep is None else x2 * keep)
            grad_w_x = None if d_token is None else d_token.t() @ x2

        grad_router, grad_task = grad_w_x, None
        if task is not None:
            n = task.shape[0]
            if token_tasks is None:
                per_task = d_logits.view(n, tokens // n, num_experts).sum(1)
            else:
                per_task = d_logits.new_zeros(n, num_experts).index_add_(0, token_tasks, d_logits)
            per_task = per_task.to(router_weight.dtype)
            grad_w_e = per_task.t() @ task.to(per_task.dtype)
            grad_router = grad_w_e if grad_w_x is None else torch.cat((grad_w_x, grad_w_e), 1)
            if ctx.needs_input_grad[7]:
                grad_task = (per_task @ router_weight[:, -task.shape[1] :]).to(task.dtype)
        grad_base = grad_out if ctx.needs_input_grad[1] else None
        return grad_x, grad_base, None, None, grad_a, grad_b, grad_router, grad_task, None, None, None


@dataclass(slots=True)
class DecodingWeights:
    """What stays the same from one decoding step to the next, for one layer and adapter.

    A decoding step has few tokens, so that its cost is the number of operations. Each row of `W_x` stands here r times: the softmax
    over e*r logits, times r, is then each gate r times, and meets the bottleneck without reshaping. r is folded into the scale.

    Attributes:
        a: `(in, e*r)`.
        b: `(e*r, out)`.
        w_x: Token part of the router, each expert r times, `(in, e*r)`; None if the router does not read the token.
        per_task: Task part of the logits, each expert r times, `(n, e*r)`, or None if the router does not read the task; if it
            reads nothing else, the gates themselves.
        scale: What the update is multiplied by.
        by_rows: `per_task` for each row of the batch, by the number of rows.
    """

    a: torch.Tensor
    b: torch.Tensor
    w_x: torch.Tensor | None
    per_task: torch.Tensor | None
    scale: float
    by_rows: dict[int, torch.Tensor | None]


def decoding_weights(
    weight_a: torch.Tensor,
    weight_b: torch.Tensor,
    router_weight: torch.Tensor,
    task: torch.Tensor | None,
    shape: ExpertShape,
) -> DecodingWeights:
    """Prepare `decoding_step` for a generation; arguments as in `FusedUpdate`, without `top_k`."""
    w_x = (
        router_weight[:, : weight_a.shape[1]].repeat_interleave(shape.r, dim=0).t()
        if shape.reads_token
        else None
    )
    per_task = None if task is None else task_logits(task, router_weight)
    scale = shape.scaling * shape.r
    if w_x is None:
        assert per_task is not None
        per_task, scale = torch.softmax(per_task, dim=-1), shape.scaling
    if per_task is not None:
        per_task = per_task.repeat_interleave(shape.r, dim=-1).to(weight_a.dtype)
    return DecodingWeights(weight_a.t(), weight_b.t(), w_x, per_task, scale, {})


def decoding_step(x: torch.Tensor, out: torch.Tensor, prepared: DecodingWeights) -> torch.Tensor:
    """Add the update to `out` in place for one token a row, without autograd and without dropout.

    Args:
        x: `(rows, in)`.
        out: Output of the base layer, `(rows, out)`, owned by the caller.
        prepared: See `decoding_weights`.

    Returns:
        `out`.
    """
    rows = x.shape[0]
    row_part = prepared.by_rows.get(rows)
    if row_part is None and prepared.per_task is not None:
        row_part = prepared.by_rows[rows] = spread_over_tokens(prepared.per_task, rows, None)
    h = torch.mm(x, prepared.a)
    if prepared.w_x is None:
        assert row_part is not None
        gates = row_part
    else:
        logits = torch.mm(x, prepared.w_x) if row_part is None else torch.addmm(row_part, x, prepared.w_x)
        if logits.dtype.itemsize < 4:
            gates = torch.softmax(logits, -1, dtype=torch.float32).to(h.dtype)
        else:
            gates = torch.softmax(logits, -1)
    return out.addmm_(h.mul_(gates), prepared.b, alpha=prepared.scale)
