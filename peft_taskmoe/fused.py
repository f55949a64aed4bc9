"""Router and experts as one autograd function: the fast path of the adapted layer.

It knows tensors only. What it computes stands readably in `router.py` and `experts.py`, against which it is tested in
float64. What it saves over them: it keeps x, the bottleneck and the gates for backward and nothing with (tokens, out) entries; one
product serves A and the token part of the router; the update is accumulated into the base output, and the gradient of
the input into the base's, instead of adding tensors of that size. Bottleneck and gates stand features first, `(features, tokens)`:
softmax, gates and their gradients then run along the tokens, and products as narrow as the router's are faster on a CPU.
"""

from __future__ import annotations

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


def _mix(h: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """`mix_bottleneck` for `(e*r, tokens)` and `(e, tokens)`."""
    by_expert = h.unflatten(0, (gates.shape[0], h.shape[0] // gates.shape[0]))
    return (by_expert * gates.to(h.dtype).unsqueeze(1)).view(h.shape)


def _gates(
    token: torch.Tensor | None,
    per_task: torch.Tensor | None,
    tokens: int,
    token_tasks: torch.Tensor | None,
    top_k: int | None,
) -> torch.Tensor:
    """Softmax of token part `(e, tokens)` plus task part `(n, e)`, as `(e, tokens)`."""
    logits = None if token is None else token.to(torch.promote_types(token.dtype, torch.float32))
    if per_task is not None:
        n, num_experts = per_task.shape
        if logits is None:
            logits = spread_over_tokens(per_task, tokens, token_tasks).t()
        elif token_tasks is not None:
            logits = logits + spread_over_tokens(per_task, tokens, token_tasks).t()
        else:
            by_task = logits.view(num_experts, n, tokens // n) + per_task.t().unsqueeze(-1)
            logits = by_task.view(num_experts, tokens)
    assert logits is not None
    if top_k is not None:
        logits = keep_top_k(logits.t(), top_k).t()
    return torch.softmax(logits, dim=0)


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
        in_features = x.shape[-1]
        tokens_x = x.reshape(-1, in_features)
        tokens, rank = tokens_x.shape[0], shape.num_experts * shape.r
        dropped = None
        w_x = router_weight[:, :in_features] if shape.reads_token else None
        if dropout:
            dropped = draw_dropped(tokens_x, dropout)
            scaling /= 1.0 - dropout
            h = weight_a @ zero_dropped(tokens_x.clone(), dropped).t()
            token = None if w_x is None else w_x @ tokens_x.t()
        elif w_x is None:
            h, token = weight_a @ tokens_x.t(), None
        else:
            h_and_token = torch.cat((weight_a, w_x)) @ tokens_x.t()
            h, token = h_and_token[:rank].clone(), h_and_token[rank:]  # a view would keep the logits as well
        per_task = None if task is None else task_logits(task, router_weight)
        gates = _gates(token, per_task, tokens, token_tasks, shape.top_k)
        if weight is not None:
            out = F.linear(x, weight, bias)
        else:
            assert base is not None
            out = base.clone(memory_format=torch.contiguous_format)
        out.view(tokens, out.shape[-1]).addmm_(_mix(h, gates).t(), weight_b.t(), alpha=scaling)
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
        in_features = x.shape[-1]
        tokens_x = x.reshape(-1, in_features)
        tokens, rank, num_experts = tokens_x.shape[0], h.shape[0], gates.shape[0]
        dy = grad_out.reshape(tokens, grad_out.shape[-1])
        w_x = router_weight[:, :in_features] if ctx.reads_token else None

        dz = torch.addmm(h, weight_b.t(), dy.t(), beta=0, alpha=ctx.scaling)
        grad_b = torch.addmm(weight_b, dy.t(), _mix(h, gates).t(), beta=0, alpha=ctx.scaling)
        d_gates = (dz * h).view(num_experts, rank // num_experts, tokens).sum(1).to(gates.dtype)
        d_logits = torch._softmax_backward_data(d_gates, gates, 0, gates.dtype)
        dh = _mix(dz, gates)
        left, right = dh, weight_a
        d_token = None
        if w_x is not None:
            d_token = d_logits.to(dh.dtype)
            if dropped is None:
                left, right = torch.cat((dh, d_token)), torch.cat((weight_a, w_x))

        grad_x = None
        if ctx.needs_input_grad[0]:
            if dropped is None and weight is not None:
                grad_x = (dy @ weight).addmm_(left.t(), right)
            else:
                grad_x = left.t() @ right
                if dropped is not None:
                    zero_dropped(grad_x, dropped)
                    if d_token is not None and w_x is not None:
                        grad_x.addmm_(d_token.t(), w_x)
                    if weight is not None:
                        grad_x.addmm_(dy, weight)
            grad_x = grad_x.view(x.shape)

        grad_a = left @ (tokens_x if dropped is None else zero_dropped(tokens_x.clone(), dropped))
        grad_w_x = None
        if d_token is not None:
            if dropped is None:
                grad_a, grad_w_x = grad_a[:rank], grad_a[rank:]
            else:
                grad_w_x = d_token @ tokens_x

        grad_router, grad_task = grad_w_x, None
        if task is not None:
            n = task.shape[0]
            if token_tasks is None:
                per_task = d_logits.view(num_experts, n, tokens // n).sum(2).t()
            else:
                per_task = d_logits.new_zeros(n, num_experts).index_add_(0, token_tasks, d_logits.t())
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
