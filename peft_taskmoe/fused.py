"""Router and experts of one layer as one autograd function.

Compared with `router.py` and `experts.py` it keeps only x, the bottleneck and the gates for the
backward pass. One product serves A and the token part of the router, and the update is added to the
base output in place. The bottleneck and the gates are stored features first, `(features, tokens)`:
the softmax then runs along contiguous tokens, and narrow products are faster on a CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

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


class FusedUpdate(torch.autograd.Function):
    """`y = W_0 x + scaling * sum_i g_i B_i A_i dropout(x)`, for tensors of one dtype.

    The base output is given (`base`, of any layer) or computed from a frozen `weight` and `bias`.
    Gradients are those of the plain form. Double backward raises.
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
            router_weight: `(e, in + task_dim)`, or the part of it that the router reads.
            task: `(n, task_dim)`, or None.
            token_tasks: `(tokens,)` index of each token's task, or None.
            shape: The plain numbers.
            scaling: `lora_alpha / r`, unless it was set otherwise.
            dropout: Probability of dropping an input feature; 0.0 when not training.

        Returns:
            `(..., out)`.
        """
        x2 = x.reshape(-1, x.shape[-1])
        dropped, x_a = None, x2
        if dropout:
            scaling /= 1.0 - dropout
            dropped = draw_dropped(x2, dropout)
            x_a = without_dropped(x2, dropped)
        h, token = _bottleneck(x2, x_a, weight_a, _token_part(router_weight, x2, shape))
        gates = _gates(token, task, token_tasks, router_weight, x2.shape[0], shape)
        out = _base_output(x, base, weight, bias, weight_b.shape[0])
        mixed = _mix(h, gates)
        out.view(-1, out.shape[-1]).addmm_(mixed.t(), weight_b.t(), alpha=scaling)
        ctx.save_for_backward(
            x, h, gates, dropped, task, token_tasks, weight, weight_a, weight_b, router_weight
        )
        ctx.shape, ctx.scaling = shape, scaling
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Gradients of x, base, A, B, the router and the task embeddings."""
        x, h, gates, dropped, task, token_tasks, weight, weight_a, weight_b, router = (
            ctx.saved_tensors
        )
        x2, dy = x.reshape(-1, x.shape[-1]), grad_out.reshape(-1, grad_out.shape[-1])
        rank, read = h.shape[0], _token_part(router, x2, ctx.shape)
        dz = torch.empty_like(h)
        torch.addmm(dz, weight_b.t(), dy.t(), beta=0, alpha=ctx.scaling, out=dz)
        grad_b = torch.addmm(weight_b, dy.t(), _mix(h, gates).t(), beta=0, alpha=ctx.scaling)
        both, d_logits = _grad_of_logits(h, dz, gates, ctx.shape)
        if dropped is None:
            grads = both @ x2
            grad_a, grad_router = grads[:rank], None if read is None else grads[rank:]
        else:
            grad_a = both[:rank] @ without_dropped(x2, dropped)
            grad_router = None if read is None else both[rank:] @ x2
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = _grad_of_x(both, weight_a, read, dropped)
            grad_x = (grad_x if weight is None else grad_x.addmm_(dy, weight)).view(x.shape)
        grad_task = None
        if task is not None:
            of_task, grad_task = _grad_of_task(
                d_logits, task, token_tasks, router, ctx.needs_input_grad[7]
            )
            grad_router = of_task if grad_router is None else torch.cat((grad_router, of_task), 1)
        grad_base = grad_out if ctx.needs_input_grad[1] else None
        return (
            grad_x, grad_base, None, None, grad_a, grad_b, grad_router, grad_task,
            None, None, None, None,
        )  # fmt: skip


def _token_part(router: torch.Tensor, x2: torch.Tensor, shape: ExpertShape) -> torch.Tensor | None:
    """The columns of the router that read the token, `(e, in)`."""
    return router[:, : x2.shape[1]] if shape.reads_token else None


def _bottleneck(
    x2: torch.Tensor, x_a: torch.Tensor, weight_a: torch.Tensor, read: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`A x_a`, `(e*r, tokens)`, and the token's logits `(e, tokens)`.

    On a CPU both come from one product of copied weights: MKL rounds by where a weight lies in
    memory, and a copy is always aligned alike, so that a reloaded adapter gives the same bits.
    """
    if read is None:
        return weight_a @ x_a.t(), None
    if x_a is not x2 or x2.device.type != "cpu":
        return weight_a @ x_a.t(), read @ x2.t()
    both = torch.cat((weight_a, read)) @ x2.t()
    rank = weight_a.shape[0]
    return both[:rank].clone(), both[rank:]  # a view would keep the logits for backward


def _gates(
    token: torch.Tensor | None,
    task: torch.Tensor | None,
    token_tasks: torch.Tensor | None,
    router: torch.Tensor,
    tokens: int,
    shape: ExpertShape,
) -> torch.Tensor:
    """Softmax over the experts of token part plus task part, `(e, tokens)`."""
    logits = None if token is None else token.to(torch.promote_types(token.dtype, torch.float32))
    if task is not None:
        per_task = task_logits(task, router)
        if logits is None:
            logits = spread_over_tokens(per_task, tokens, token_tasks).t()
        elif token_tasks is not None:
            logits = logits + spread_over_tokens(per_task, tokens, token_tasks).t()
        else:  # broadcast: each task owns an equal share of consecutive tokens
            n = per_task.shape[0]
            by_task = logits.view(shape.num_experts, n, tokens // n)
            logits = (by_task + per_task.t().unsqueeze(-1)).view(shape.num_experts, tokens)
    assert logits is not None
    if shape.top_k is not None:
        logits = keep_top_k(logits.t(), shape.top_k).t()
    return torch.softmax(logits, dim=0)


def _mix(h: torch.Tensor, gates: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """`experts.mix_bottleneck` for `(e*r, tokens)` and `(e, tokens)`."""
    experts, tokens = gates.shape
    by_expert = h.view(experts, h.shape[0] // experts, tokens)
    gates = gates.to(h.dtype).unsqueeze(1)
    if out is None:
        return (by_expert * gates).view(h.shape)
    torch.mul(by_expert, gates, out=out.view(by_expert.shape))
    return out


def _base_output(
    x: torch.Tensor,
    base: torch.Tensor | None,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_features: int,
) -> torch.Tensor:
    """A base output to add to; no view, so that operations behind the layer may be in place."""
    if weight is None:
        assert base is not None
        return base.clone(memory_format=torch.contiguous_format)
    out = x.new_empty(*x.shape[:-1], out_features)
    x2, out2 = x.reshape(-1, x.shape[-1]), out.view(-1, out_features)
    if bias is None:
        torch.mm(x2, weight.t(), out=out2)
    else:
        torch.addmm(bias, x2, weight.t(), out=out2)
    return out


def _grad_of_logits(
    h: torch.Tensor, dz: torch.Tensor, gates: torch.Tensor, shape: ExpertShape
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the bottleneck and, below it, the token's logits; the latter in full precision.

    One tensor `(e*r [+ e], tokens)`, so that one product takes both to the weights and to x.
    """
    (experts, tokens), rank = gates.shape, h.shape[0]
    d_gates = (dz * h).view(experts, rank // experts, tokens).sum(1, dtype=gates.dtype)
    both = h.new_empty(rank + experts * shape.reads_token, tokens)
    _mix(dz, gates, out=both[:rank])
    in_place = shape.reads_token and h.dtype == gates.dtype
    d_logits = both[rank:] if in_place else torch.empty_like(gates)
    torch._softmax_backward_data(d_gates, gates, 0, gates.dtype, grad_input=d_logits)
    if shape.reads_token and not in_place:
        both[rank:].copy_(d_logits)
    return both, d_logits


def _grad_of_x(
    both: torch.Tensor,
    weight_a: torch.Tensor,
    read: torch.Tensor | None,
    dropped: torch.Tensor | None,
) -> torch.Tensor:
    """Gradient of x through the experts and the router."""
    if dropped is None:
        return both.t() @ (weight_a if read is None else torch.cat((weight_a, read)))
    rank = weight_a.shape[0]
    grad = zero_dropped(both[:rank].t() @ weight_a, dropped)
    return grad if read is None else grad.addmm_(both[rank:].t(), read)


def _grad_of_task(
    d_logits: torch.Tensor,
    task: torch.Tensor,
    token_tasks: torch.Tensor | None,
    router: torch.Tensor,
    task_needs_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradients of the router's task part `(e, task_dim)` and of the task embeddings."""
    experts, n = d_logits.shape[0], task.shape[0]
    if token_tasks is None:
        per_task = d_logits.view(experts, n, d_logits.shape[1] // n).sum(2)
    else:
        per_task = d_logits.new_zeros(n, experts).index_add_(0, token_tasks, d_logits.t()).t()
    per_task = per_task.to(router.dtype)
    grad_router = per_task @ task.to(router.dtype)
    if not task_needs_grad:
        return grad_router, None
    return grad_router, (per_task.t() @ router[:, -task.shape[1] :]).to(task.dtype)
