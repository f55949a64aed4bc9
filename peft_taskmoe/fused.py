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
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from .experts import draw_dropped, without_dropped, zero_dropped
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


class LayerTensors(NamedTuple):
    """What `FusedUpdate` takes of each layer.

    Attributes:
        base: Output of the base layer `(..., out)`, or None to compute it from `weight`.
        weight: Frozen `(out, in)`, or None.
        bias: Frozen `(out,)`, or None.
        weight_a: `(e*r, in)`.
        weight_b: `(out, e*r)`.
        router_weight: `(e, in + task_dim)`, or what of it the router reads.
    """

    base: torch.Tensor | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    weight_a: torch.Tensor
    weight_b: torch.Tensor
    router_weight: torch.Tensor


_PER_LAYER = len(LayerTensors._fields)
_FEW_ROWS = 8  # see `decoding_dtype`


def _stacked(rows: Sequence[torch.Tensor]) -> torch.Tensor:
    """The rows of all in one tensor; of a single one no copy."""
    return rows[0] if len(rows) == 1 else torch.cat(tuple(rows))


def _mix(h: torch.Tensor, gates: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """`mix_bottleneck` for `(m*e*r, tokens)` and `(m, e, tokens)`."""
    all_experts, tokens = gates.shape[0] * gates.shape[1], gates.shape[2]
    by_expert = h.view(all_experts, h.shape[0] // all_experts, tokens)
    gates = gates.to(h.dtype).view(all_experts, 1, tokens)
    if out is None:
        return (by_expert * gates).view(h.shape)
    torch.mul(by_expert, gates, out=out.view(by_expert.shape))
    return out


def _gates(
    token: torch.Tensor | None,
    per_task: torch.Tensor | None,
    tokens: int,
    token_tasks: torch.Tensor | None,
    num_layers: int,
    shape: ExpertShape,
) -> torch.Tensor:
    """Softmax over the experts of token part `(m*e, tokens)` plus task part `(n, m*e)`, as `(m, e, tokens)`."""
    logits = None if token is None else token.to(torch.promote_types(token.dtype, torch.float32))
    if per_task is not None:
        n, all_experts = per_task.shape
        if logits is None:
            logits = spread_over_tokens(per_task, tokens, token_tasks).t()
        elif token_tasks is not None:
            logits = logits + spread_over_tokens(per_task, tokens, token_tasks).t()
        else:
            logits = logits.view(all_experts, n, tokens // n) + per_task.t().unsqueeze(-1)
    assert logits is not None
    logits = logits.view(num_layers, shape.num_experts, tokens)
    if shape.top_k is not None:
        logits = keep_top_k(logits.transpose(1, 2), shape.top_k).transpose(1, 2)
    return torch.softmax(logits, dim=1)


class FusedUpdate(torch.autograd.Function):
    """`y = base + scaling * sum_i g_i B_i A_i dropout(x)` with its gates, of m layers that read the same x, for tensors of one dtype.

    One product serves A and the token part of the router of all layers, and the gradient of x is accumulated in one buffer. The base
    output is either given (`base`, any layer's) or computed here from a frozen `weight` and `bias`. Gradients are those of the plain
    form. Double backward refuses.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        task: torch.Tensor | None,
        token_tasks: torch.Tensor | None,
        shape: ExpertShape,
        scalings: tuple[float, ...],
        dropout: float,
        *tensors: Any,
    ) -> tuple[torch.Tensor, ...]:
        """Compute the outputs.

        Args:
            ctx: Autograd's context.
            x: `(..., in)`.
            task: `(n, task_dim)`, or None.
            token_tasks: `(tokens,)` index of each token's task, or None.
            shape: The plain numbers, the same for all layers.
            scalings: `lora_alpha / r` of each layer, unless it was set otherwise.
            dropout: Probability of dropping an input feature, for all layers alike; 0.0 when not training.
            *tensors: The `LayerTensors` of each layer, one after the other.

        Returns:
            `(..., out)` of each layer.
        """
        bases, weights, biases, weights_a, weights_b, routers = (
            tensors[i::_PER_LAYER] for i in range(_PER_LAYER)
        )
        in_features = x.shape[-1]
        tokens_x = x.reshape(-1, in_features)
        tokens, ranks = tokens_x.shape[0], sum(weight.shape[0] for weight in weights_a)
        read = [router[:, :in_features] for router in routers] if shape.reads_token else []
        token, dropped = None, None
        seen_by_a = tokens_x
        if dropout:
            scalings = tuple(scaling / (1.0 - dropout) for scaling in scalings)
            dropped = draw_dropped(tokens_x, dropout)
            seen_by_a = without_dropped(tokens_x, dropped)
        # For one layer two products are an operation less than a joined one. But MKL rounds by where a weight lies in memory: joined, the
        # weights are always copied to the same alignment, and a reloaded adapter gives the same bits.
        if dropout or not read or (len(read) == 1 and x.device.type != "cpu"):
            h = _stacked(weights_a) @ seen_by_a.t()
            if read:
                token = _stacked(read) @ tokens_x.t()
        else:
            both = _stacked((*weights_a, *read)) @ tokens_x.t()
            h, token = both[:ranks].clone(), both[ranks:]  # a view would keep the logits as well
        per_task = None
        if task is not None:
            per_task = task_logits(
                task, _stacked([router[:, -task.shape[1] :] for router in routers])
            )
        gates = _gates(token, per_task, tokens, token_tasks, len(routers), shape)
        outs = []
        for base, weight, bias, weight_b, mixed, scaling in zip(
            bases,
            weights,
            biases,
            weights_b,
            _mix(h, gates).chunk(len(weights_b)),
            scalings,
            strict=True,
        ):
            if weight is not None:
                out = F.linear(x, weight, bias)
            else:
                out = base.clone(memory_format=torch.contiguous_format)
            out.view(tokens, out.shape[-1]).addmm_(mixed.t(), weight_b.t(), alpha=scaling)
            outs.append(out)
        ctx.save_for_backward(
            x, h, gates, dropped, task, token_tasks, *weights, *weights_a, *weights_b, *routers
        )
        ctx.scalings, ctx.reads_token = scalings, shape.reads_token
        ctx.set_materialize_grads(False)  # an output that nobody used has None
        return tuple(outs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grad_outs: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        """Gradients of x, the task embedding, and base, A, B and router of each layer."""
        x, h, gates, dropped, task, token_tasks, *saved = ctx.saved_tensors
        m, in_features = len(grad_outs), x.shape[-1]
        weights, weights_a, weights_b, routers = (saved[i * m : (i + 1) * m] for i in range(4))
        tokens_x = x.reshape(-1, in_features)
        tokens, ranks, all_experts = tokens_x.shape[0], h.shape[0], gates.shape[0] * gates.shape[1]
        dys = [None if grad is None else grad.reshape(tokens, grad.shape[-1]) for grad in grad_outs]
        read = [router[:, :in_features] for router in routers] if ctx.reads_token else []

        dz, grads_b = torch.empty_like(h), list[torch.Tensor | None]()
        for dy, weight_b, mixed, dz_here, scaling in zip(
            dys, weights_b, _mix(h, gates).chunk(m), dz.chunk(m), ctx.scalings, strict=True
        ):
            if dy is None:
                dz_here.zero_()
                grads_b.append(None)
                continue
            torch.addmm(dz_here, weight_b.t(), dy.t(), beta=0, alpha=scaling, out=dz_here)
            grads_b.append(torch.addmm(weight_b, dy.t(), mixed.t(), beta=0, alpha=scaling))
        by_expert = (dz * h).view(*gates.shape[:2], ranks // all_experts, tokens)
        d_gates = by_expert.sum(2, dtype=gates.dtype)
        # Gradients of the bottlenecks, then of the logits.
        left = h.new_empty(ranks + (all_experts if read else 0), tokens)
        dh, d_token = left[:ranks], left[ranks:]
        _mix(dz, gates, out=dh)
        in_place = bool(read) and d_token.dtype == gates.dtype
        d_logits = d_token if in_place else d_gates.new_empty(all_experts, tokens)
        torch._softmax_backward_data(
            d_gates, gates, 1, gates.dtype, grad_input=d_logits.view(gates.shape)
        )
        if read and not in_place:
            d_token.copy_(d_logits)

        if dropped is None:
            grads_a, of_token = (left @ tokens_x).split([ranks, left.shape[0] - ranks])
        else:
            grads_a, of_token = dh @ without_dropped(tokens_x, dropped), d_token @ tokens_x
        grad_x = None
        if ctx.needs_input_grad[0]:
            products = [
                (dy, weight)
                for dy, weight in zip(dys, weights, strict=True)
                if dy is not None and weight is not None
            ]
            if dropped is None:
                products.append((left.t(), _stacked((*weights_a, *read))))
            else:
                grad_x = zero_dropped(dh.t() @ _stacked(weights_a), dropped)
                if read:
                    products.append((d_token.t(), _stacked(read)))
            for one, other in products:
                grad_x = one @ other if grad_x is None else grad_x.addmm_(one, other)
            assert grad_x is not None
            grad_x = grad_x.view(x.shape)

        grad_routers = of_token if read else None
        grad_task = None
        if task is not None:
            n = task.shape[0]
            if token_tasks is None:
                per_task = d_logits.view(all_experts, n, tokens // n).sum(2)
            else:
                per_task = (
                    d_logits.new_zeros(n, all_experts).index_add_(0, token_tasks, d_logits.t()).t()
                )
            per_task = per_task.to(routers[0].dtype)
            of_task = per_task @ task.to(per_task.dtype)
            grad_routers = (
                of_task if grad_routers is None else torch.cat((grad_routers, of_task), 1)
            )
            if ctx.needs_input_grad[1]:
                grad_task = (
                    per_task.t() @ _stacked([router[:, -task.shape[1] :] for router in routers])
                ).to(task.dtype)
        grads: list[torch.Tensor | None] = [grad_x, grad_task, None, None, None, None]
        assert grad_routers is not None  # a router reads the token or the task
        for grad_out, grad_a, grad_b, grad_router in zip(
            grad_outs, grads_a.chunk(m), grads_b, grad_routers.chunk(m), strict=True
        ):
            if grad_out is None:
                grads += [None] * _PER_LAYER
                continue
            grad_base = grad_out if ctx.needs_input_grad[len(grads)] else None
            grads += [grad_base, None, None, grad_a, grad_b, grad_router]
        return tuple(grads)


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
        b: `scaling * B`, `(e*r, out)`, of each layer.
        per_task: Task part of the logits, `(n, m*e)`, or None if the routers do not read the task; if they read nothing else, the
            gates themselves.
        shape: The adapter's, the same on all layers.
        workspaces: By the number of rows.
        source: What the workspace was computed from, as the layers got it, and its version; None if nothing was.
        waiting: The layers that have not taken their part of it.
    """

    a_and_router: torch.Tensor
    b: tuple[torch.Tensor, ...]
    per_task: torch.Tensor | None
    shape: ExpertShape
    workspaces: dict[int, _Workspace] = field(default_factory=dict)
    source: tuple[torch.Tensor, int] | None = None
    waiting: set[int] = field(default_factory=set)


def decoding_dtype(weight: torch.Tensor, rows: int) -> torch.dtype:
    """What decoding steps of so many rows compute in: what the adapter is in, or float32 where that is faster and fits.

    In half precision a CPU's library takes 20 to 30 us to start a product of any size; a float32 product of up to 8 rows is done in 10.
    """
    low = weight.dtype in (torch.bfloat16, torch.float16)
    return (
        torch.float32 if low and weight.device.type == "cpu" and rows <= _FEW_ROWS else weight.dtype
    )


def decoding_weights(
    layers: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, float]],
    shape: ExpertShape,
    dtype: torch.dtype,
) -> DecodingWeights:
    """Prepare `decoding_step` for a generation.

    Args:
        layers: `weight_a`, `weight_b`, `router_weight`, `task` and `scaling` of each, as in `FusedUpdate`.
        shape: Of all of them, without `top_k`.
        dtype: To compute in.

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
    scaled = (
        weight.to(dtype) * scaling for weight, scaling in zip(weights_b, scalings, strict=True)
    )
    return DecodingWeights(
        torch.cat(weights_a).to(dtype),
        tuple(weight.t().contiguous() for weight in scaled),
        per_task,
        shape,
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
    x = x.to(prepared.a_and_router.dtype)
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
        if (
            of is None
            or of[0] is not source
            or of[1] != source._version
            or layer not in prepared.waiting
        ):
            _mix_for_all(x, space, prepared)
            prepared.source = (source, source._version)
            prepared.waiting.update(range(len(prepared.b)))
        prepared.waiting.remove(layer)
    mixed, weight_b = space.mixed[layer], prepared.b[layer]
    return (
        out.addmm_(mixed, weight_b) if out.dtype == weight_b.dtype else out.add_(mixed @ weight_b)
    )
