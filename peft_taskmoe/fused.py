"""Router and experts as one autograd function: the fast path of the adapted layer.

It knows tensors only. What it computes stands readably in `router.py` and `experts.py`, against which it is tested in
float64. What it saves over them: it keeps x, the bottleneck and the gates for backward and nothing with (tokens, out) entries; one
product serves A and the token part of the router; the update is accumulated into the base output, and the gradient of
the input into the base's, instead of adding tensors of that size. Bottleneck and gates stand features first, `(groups, features, length)`:
softmax, gates and their gradients then run along the tokens, and products as narrow as the router's are faster on a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
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

    Features first, like the training step's: with few rows a CPU reads the weights up to twice as fast so.

    Attributes:
        row_part: Task part of the logits for each row after zeros for the bottleneck, `(m*e*r + m*e, rows)`, or None.
        product: Bottleneck and, if the routers read the token, logits, `(m*e*r + m*e, rows)`.
        by_expert: The bottleneck, `(m*e, r, rows)`.
        logits: `(m, e, rows)`, or None.
        gates: `(m, e, rows)`, at least float32; if the routers read the task alone, these very gates.
        gates_by_expert: The same, `(m*e, 1, rows)`.
        mixed_by_expert: Where the mixed bottleneck goes, `(m*e, r, rows)`.
        mixed: The same, `(rows, e*r)` for each layer.
    """

    row_part: torch.Tensor | None
    product: torch.Tensor
    by_expert: torch.Tensor
    logits: torch.Tensor | None
    gates: torch.Tensor
    gates_by_expert: torch.Tensor
    mixed_by_expert: torch.Tensor
    mixed: tuple[torch.Tensor, ...]


@dataclass(slots=True)
class DecodingWeights:
    """What stays the same from one decoding step to the next, for one adapter on the m layers that read the same input (q, k and v).

    A decoding step has few tokens, so that its cost is the number of operations and the weights it reads. The first of the
    layers to run computes the mixed bottleneck of all of them.

    Attributes:
        a_and_router: A of every layer, then the token part of every router, `(m*e*r + m*e, in)`; A alone if the routers do not read
            the token.
        b: `(e*r, out)` of each layer.
        per_task: Task part of the logits, `(n, m*e)`, or None if the routers do not read the task; if they read nothing else, the
            gates themselves.
        shape: The adapter's, the same on all layers.
        scalings: Of each layer.
        workspaces: By the number of rows.
        source: What the workspace was computed from, as the layers got it, and its version; None if nothing was.
        waiting: The layers that have not taken their part of it.
    """

    a_and_router: torch.Tensor
    b: tuple[torch.Tensor, ...]
    per_task: torch.Tensor | None
    shape: ExpertShape
    scalings: tuple[float, ...]
    workspaces: dict[int, _Workspace] = field(default_factory=dict)
    source: tuple[torch.Tensor, int] | None = None
    waiting: set[int] = field(default_factory=set)


def decoding_weights(
    layers: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, float]],
    shape: ExpertShape,
) -> DecodingWeights:
    """Prepare `decoding_step` for a generation.

    Args:
        layers: `weight_a`, `weight_b`, `router_weight`, `task` and `scaling` of each, as in `FusedUpdate`.
        shape: Of all of them, without `top_k`.

    Returns:
        What the steps take.
    """
    weights_a, weights_b, routers, tasks, scalings = zip(*layers, strict=True)
    per_task = None
    if shape.reads_task:
        per_layer = [task_logits(task, router) for task, router in zip(tasks, routers, strict=True)]
        if not shape.reads_token:
            per_layer = [torch.softmax(logits, dim=-1) for logits in per_layer]
        per_task = torch.cat(per_layer, 1)
    if shape.reads_token:
        weights_a += tuple(router[:, : weights_a[0].shape[1]] for router in routers)
    return DecodingWeights(
        torch.cat(weights_a), tuple(weight.t() for weight in weights_b), per_task, shape, scalings
    )


def _workspace(prepared: DecodingWeights, rows: int) -> _Workspace:
    """Make room for the decoding steps of so many rows."""
    shape, like, per_task = prepared.shape, prepared.a_and_router, prepared.per_task
    num_layers, rank = len(prepared.b), shape.num_experts * shape.r
    of_experts = (num_layers, shape.num_experts, rows)
    product = like.new_empty(like.shape[0], rows)
    bottleneck, logits = product.split((num_layers * rank, like.shape[0] - num_layers * rank))
    per_row = None if per_task is None else spread_over_tokens(per_task, rows, None).t()
    row_part = None
    if not shape.reads_token:
        assert per_row is not None
        gates = per_row.reshape(of_experts)
    else:
        gates = like.new_empty(of_experts, dtype=torch.promote_types(like.dtype, torch.float32))
        if per_row is not None:
            row_part = F.pad(per_row, (0, 0, num_layers * rank, 0)).to(like.dtype)
    mixed = like.new_empty(rows, num_layers * rank)
    by_expert = (-1, shape.r, rows)
    return _Workspace(
        row_part,
        product,
        bottleneck.view(by_expert),
        logits.view(of_experts) if shape.reads_token else None,
        gates,
        gates.view(-1, 1, rows),
        mixed.t().unflatten(0, by_expert[:2]),
        mixed.split(rank, 1),
    )


def _mix_for_all(x: torch.Tensor, space: _Workspace, prepared: DecodingWeights) -> None:
    """Fill the workspace with the mixed bottlenecks of all layers that read x `(rows, in)`."""
    if space.row_part is None:
        torch.mm(prepared.a_and_router, x.t(), out=space.product)
    else:
        torch.addmm(space.row_part, prepared.a_and_router, x.t(), out=space.product)
    if space.logits is not None:
        if space.gates.dtype == x.dtype:
            torch.softmax(space.logits, 1, out=space.gates)
        else:
            torch.softmax(space.logits, 1, dtype=space.gates.dtype, out=space.gates)
    torch.mul(space.by_expert, space.gates_by_expert, out=space.mixed_by_expert)


def decoding_step(
    x: torch.Tensor, out: torch.Tensor, prepared: DecodingWeights, layer: int, source: torch.Tensor
) -> torch.Tensor:
    """Add the update to `out` in place for one token a row, without autograd and without dropout.

    Args:
        x: `(rows, in)`.
        out: Output of the base layer, `(rows, out)`, owned by the caller.
        prepared: See `decoding_weights`.
        layer: Which of its layers.
        source: The tensor that x is a view of, as the layer got it: another layer that gets the same one, unchanged since, takes
            what this call computed. In inference mode tensors do not tell whether they were changed; there none may share.

    Returns:
        `out`.
    """
    rows = x.shape[0]
    space = prepared.workspaces.get(rows)
    if space is None:
        space = prepared.workspaces[rows] = _workspace(prepared, rows)
    if len(prepared.b) == 1:
        _mix_for_all(x, space, prepared)
    else:
        of = prepared.source
        if of is None or of[0] is not source or of[1] != source._version or layer not in prepared.waiting:
            _mix_for_all(x, space, prepared)
            prepared.source = (source, source._version)
            prepared.waiting.update(range(len(prepared.b)))
        prepared.waiting.remove(layer)
    return out.addmm_(space.mixed[layer], prepared.b[layer], alpha=prepared.scalings[layer])
