"""Router and experts as one autograd function: the fast path of the adapted layer.

It knows tensors only. What it computes stands readably in `router.py` and `experts.py`, against which it is tested in
float64. What it saves over them: it keeps x, the bottleneck and the gates for backward and nothing with (tokens, out) entries; one
product serves A and the token part of the router; the update is accumulated into the base output, and the gradient of
the input into the base's, instead of adding tensors of that size. Bottleneck and gates stand features first, `(groups, features, length)`:
softmax, gates and their gradients then run along the tokens, and products as narrow as the router's are faster on a CPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from .experts import draw_dropped, zero_dropped
from .router import keep_top_k, spread_over_tokens, task_logits


@dataclass(frozen=True, slots=True)
class ExpertShape:
    """The plain numbers of one adapter on one layer.

    Attributes:
        num_experts: E.
        r: Rank of each expert.
        top_k: Gates kept per token, or None for all.
        reads_token: Whether the router reads the token.
        reads_task: Whether the router reads the task.
    """

    num_experts: int
    r: int
    top_k: int | None
    reads_token: bool
    reads_task: bool


def _in_groups(x: torch.Tensor) -> torch.Tensor:
    """View `(..., d)` as `(groups, length, d)`: one group a row of the batch, or all tokens in one if the rows are short."""
    tokens = math.prod(x.shape[:-1])
    groups = x.shape[0] if x.dim() > 2 and tokens >= 64 * x.shape[0] else 1
    return x.reshape(groups, tokens // groups, x.shape[-1])


def _features_first(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """`weight x` for x `(groups, length, d)` and weight `(k, d)`, as `(groups, k, length)`."""
    return torch.bmm(weight.expand(x.shape[0], -1, -1), x.transpose(1, 2))


def _mix(h: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """`mix_bottleneck` for `(groups, e*r, length)` and `(groups, e, length)`."""
    by_expert = h.unflatten(1, (gates.shape[1], h.shape[1] // gates.shape[1]))
    return (by_expert * gates.to(h.dtype).unsqueeze(2)).view(h.shape)


def _gates(
    token: torch.Tensor | None,
    per_task: torch.Tensor | None,
    size: tuple[int, int],
    token_tasks: torch.Tensor | None,
    top_k: int | None,
) -> torch.Tensor:
    """Softmax of token part `(groups, e, length)` plus task part `(n, e)`, the latter broadcast where each group has one task."""
    groups, length = size
    logits = None if token is None else token.to(torch.promote_types(token.dtype, torch.float32))
    if per_task is not None:
        n = per_task.shape[0]
        if token_tasks is None and groups % n == 0:
            of_group = per_task.unsqueeze(1).expand(-1, groups // n, -1).reshape(groups, -1, 1)
        else:
            spread = spread_over_tokens(per_task, groups * length, token_tasks)
            of_group = spread.view(groups, length, spread.shape[-1]).transpose(1, 2)
        logits = of_group if logits is None else logits + of_group
    assert logits is not None
    if top_k is not None:
        logits = keep_top_k(logits.transpose(1, 2), top_k).transpose(1, 2)
    return torch.softmax(logits, dim=1).expand(groups, logits.shape[1], length)


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
        scaling: float,
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
            scaling: `lora_alpha / r`, unless it was set otherwise.
            dropout: Probability of dropping an input feature; 0.0 when not training.

        Returns:
            `(..., out)`.
        """
        xg = _in_groups(x)
        groups, length, in_features = xg.shape
        rank = shape.num_experts * shape.r
        dropped = None
        w_x = router_weight[:, :in_features] if shape.reads_token else None
        if dropout:
            dropped = draw_dropped(xg, dropout)
            scaling /= 1.0 - dropout
            h = _features_first(weight_a, zero_dropped(xg.clone(), dropped))
            token = None if w_x is None else _features_first(w_x, xg)
        elif w_x is None:
            h, token = _features_first(weight_a, xg), None
        else:
            h_and_token = _features_first(torch.cat((weight_a, w_x)), xg)
            h, token = h_and_token[:, :rank], h_and_token[:, rank:]
        per_task = None if task is None else task_logits(task, router_weight)
        gates = _gates(token, per_task, (groups, length), token_tasks, shape.top_k)
        if weight is not None:
            out = F.linear(x, weight, bias)
        else:
            assert base is not None
            out = base.clone(memory_format=torch.contiguous_format)
        update = out.view(groups, length, out.shape[-1])
        update.baddbmm_(_mix(h, gates).transpose(1, 2), weight_b.t().expand(groups, -1, -1), alpha=scaling)
        ctx.save_for_backward(
            x, h, gates, dropped, weight, weight_a, weight_b, router_weight, task, token_tasks
        )
        ctx.scaling, ctx.reads_token = scaling, shape.reads_token
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of x, base, A, B, the router and the task embedding."""
        x, h, gates, dropped, weight, weight_a, weight_b, router_weight, task, token_tasks = ctx.saved_tensors
        xg = _in_groups(x)
        groups, length, in_features = xg.shape
        rank, num_experts = h.shape[1], gates.shape[1]
        dy = grad_out.reshape(groups, length, grad_out.shape[-1])
        w_x = router_weight[:, :in_features] if ctx.reads_token else None

        b_t = weight_b.t().expand(groups, -1, -1)
        dz = torch.baddbmm(h, b_t, dy.transpose(1, 2), beta=0, alpha=ctx.scaling)
        grad_b = torch.bmm(dy.transpose(1, 2), _mix(h, gates).transpose(1, 2)).sum(0).mul_(ctx.scaling)
        d_gates = (dz * h).view(groups, num_experts, rank // num_experts, length).sum(2).to(gates.dtype)
        d_logits = torch._softmax_backward_data(d_gates, gates, 1, gates.dtype)
        dh = _mix(dz, gates)
        left, right = dh, weight_a
        d_token = None
        if w_x is not None:
            d_token = d_logits.to(dh.dtype)
            if dropped is None:
                left, right = torch.cat((dh, d_token), 1), torch.cat((weight_a, w_x))

        grad_x = None
        if ctx.needs_input_grad[0]:
            left_t, right_g = left.transpose(1, 2), right.expand(groups, -1, -1)
            if dropped is None and weight is not None:
                grad_x = (dy @ weight).baddbmm_(left_t, right_g)
            else:
                grad_x = torch.bmm(left_t, right_g)
                if dropped is not None:
                    zero_dropped(grad_x, dropped)
                    if d_token is not None and w_x is not None:
                        grad_x.baddbmm_(d_token.transpose(1, 2), w_x.expand(groups, -1, -1))
                    if weight is not None:
                        grad_x.view(-1, in_features).addmm_(dy.view(-1, dy.shape[-1]), weight)
            grad_x = grad_x.view(x.shape)

        grad_a = torch.bmm(left, xg if dropped is None else zero_dropped(xg.clone(), dropped)).sum(0)
        grad_w_x = None
        if d_token is not None:
            if dropped is None:
                grad_a, grad_w_x = grad_a[:rank], grad_a[rank:]
            else:
                grad_w_x = torch.bmm(d_token, xg).sum(0)

        grad_router, grad_task = grad_w_x, None
        if task is not None:
            n = task.shape[0]
            if token_tasks is None and groups % n == 0:
                per_task = d_logits.view(n, groups // n, num_experts, length).sum((1, 3))
            else:
                of_token = d_logits.transpose(1, 2).reshape(groups * length, num_experts)
                if token_tasks is None:
                    per_task = of_token.view(n, groups * length // n, num_experts).sum(1)
                else:
                    per_task = of_token.new_zeros(n, num_experts).index_add_(0, token_tasks, of_token)
            per_task = per_task.to(router_weight.dtype)
            grad_w_e = per_task.t() @ task.to(per_task.dtype)
            grad_router = grad_w_e if grad_w_x is None else torch.cat((grad_w_x, grad_w_e), 1)
            if ctx.needs_input_grad[7]:
                grad_task = (per_task @ router_weight[:, -task.shape[1] :]).to(task.dtype)
        grad_base = grad_out if ctx.needs_input_grad[1] else None
        return grad_x, grad_base, None, None, grad_a, grad_b, grad_router, grad_task, None, None, None, None


@dataclass(frozen=True, slots=True)
class _Workspace:
    """Memory for one decoding step of some rows, and the views of it that the step needs: a view costs as much as a small product.

    Attributes:
        row_part: Task part of the logits for each row, zeros for the bottleneck before it, `(rows, e*r + e)`; without a token part
            the gates, each r times, `(rows, e*r)`; or None.
        product: Bottleneck and logits, `(rows, e*r + e)`; without a token part the bottleneck.
        bottleneck: `(rows, e*r)`.
        by_expert: The same, `(rows, e, r)`.
        logits: `(rows, e)`.
        gates: `(rows, e)`, at least float32.
        gates_by_expert: The same, `(rows, e, 1)`.
    """

    row_part: torch.Tensor | None
    product: torch.Tensor
    bottleneck: torch.Tensor
    by_expert: torch.Tensor
    logits: torch.Tensor
    gates: torch.Tensor
    gates_by_expert: torch.Tensor


@dataclass(slots=True)
class DecodingWeights:
    """What stays the same from one decoding step to the next, for one layer and adapter.

    A decoding step has few tokens, so that its cost is the number of operations and the weights it reads.

    Attributes:
        a_and_router: A and the token part of the router, `(in, e*r + e)`; A alone if the router does not read the token.
        b: `(e*r, out)`.
        per_task: Task part of the logits, `(n, e)`, or None if the router does not read the task; if it reads nothing else, the
            gates themselves.
        shape: The adapter's.
        scaling: Likewise.
        workspaces: By the number of rows.
    """

    a_and_router: torch.Tensor
    b: torch.Tensor
    per_task: torch.Tensor | None
    shape: ExpertShape
    scaling: float
    workspaces: dict[int, _Workspace]


def decoding_weights(
    weight_a: torch.Tensor,
    weight_b: torch.Tensor,
    router_weight: torch.Tensor,
    task: torch.Tensor | None,
    shape: ExpertShape,
    scaling: float,
) -> DecodingWeights:
    """Prepare `decoding_step` for a generation; arguments as in `FusedUpdate`, without `top_k`."""
    per_task = None if task is None else task_logits(task, router_weight)
    if shape.reads_token:
        weight_a = torch.cat((weight_a, router_weight[:, : weight_a.shape[1]]))
    else:
        assert per_task is not None
        per_task = torch.softmax(per_task, dim=-1)
    return DecodingWeights(weight_a.t(), weight_b.t(), per_task, shape, scaling, {})


def _workspace(prepared: DecodingWeights, rows: int) -> _Workspace:
    """Make room for the decoding steps of so many rows."""
    shape, like = prepared.shape, prepared.a_and_router
    rank = shape.num_experts * shape.r
    product = like.new_empty(rows, like.shape[1])
    bottleneck, logits = product[:, :rank], product[:, rank:]
    row_part = None
    if prepared.per_task is not None:
        per_row = spread_over_tokens(prepared.per_task, rows, None)
        if shape.reads_token:
            row_part = F.pad(per_row, (rank, 0)).to(like.dtype)
        else:
            row_part = per_row.repeat_interleave(shape.r, dim=1).to(like.dtype)
    gates = like.new_empty(rows, shape.num_experts, dtype=torch.promote_types(like.dtype, torch.float32))
    by_expert = bottleneck.unflatten(1, (shape.num_experts, shape.r))
    return _Workspace(row_part, product, bottleneck, by_expert, logits, gates, gates.unsqueeze(-1))


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
    space = prepared.workspaces.get(rows)
    if space is None:
        space = prepared.workspaces[rows] = _workspace(prepared, rows)
    if not prepared.shape.reads_token:
        assert space.row_part is not None
        torch.mm(x, prepared.a_and_router, out=space.product)
        space.product.mul_(space.row_part)
    else:
        if space.row_part is None:
            torch.mm(x, prepared.a_and_router, out=space.product)
        else:
            torch.addmm(space.row_part, x, prepared.a_and_router, out=space.product)
        if space.gates.dtype == x.dtype:
            torch.softmax(space.logits, -1, out=space.gates)
        else:
            torch.softmax(space.logits, -1, dtype=space.gates.dtype, out=space.gates)
        space.by_expert.mul_(space.gates_by_expert)
    return out.addmm_(space.bottleneck, prepared.b, alpha=prepared.scaling)
