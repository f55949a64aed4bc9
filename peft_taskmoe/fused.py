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
from .router import keep_top_k, spread_over_tokens


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


def task_logits(task: torch.Tensor, router_weight: torch.Tensor) -> torch.Tensor:
    """The task part of the router, `W_e e`: `(n, task_dim)` -> `(n, e)` in float32 at least."""
    weight = router_weight[:, router_weight.shape[1] - task.shape[1] :]
    precise = torch.promote_types(weight.dtype, torch.float32)
    return F.linear(task.to(weight.dtype), weight).to(precise)


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
            out = torch.addmm(base.reshape(-1, base.shape[-1]), z, weight_b.t(), alpha=scaling).view(base.shape)
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
                left, right = (dh, weight_a) if w_x is None else (
                    torch.cat((dh, d_token), 1), torch.cat((weight_a, w_x))
                )
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
class InferenceWeights:
    """What stays the same from one decoding step to the next, for one layer and adapter.

    Attributes:
        a_and_w_x: A and the token part of the router, `(in, e*r + e)`, or A alone, `(in, e*r)`.
        b: `(e*r, out)`.
        per_task: `W_e e` of each task, `(n, e)`, or None if the router does not read the task.
        task_gates: If the router reads the task only: the gates of each task, each repeated r times, `(n, e*r)`.
        by_rows: For a number of tokens that was met with one token a row: the task part of each row beside zeros, `(rows,
            e*r + e)`, which starts the product's sum; or each row's `task_gates`.
    """

    a_and_w_x: torch.Tensor
    b: torch.Tensor
    per_task: torch.Tensor | None
    task_gates: torch.Tensor | None
    by_rows: dict[int, torch.Tensor]


def inference_weights(
    weight_a: torch.Tensor,
    weight_b: torch.Tensor,
    router_weight: torch.Tensor,
    task: torch.Tensor | None,
    shape: ExpertShape,
) -> InferenceWeights:
    """Prepare `fused_inference` for a generation; arguments as in `FusedUpdate`."""
    in_features = weight_a.shape[1]
    a_and_w_x = torch.cat((weight_a, router_weight[:, :in_features])) if shape.reads_token else weight_a
    per_task = None if task is None else task_logits(task, router_weight)
    task_gates = None
    if not shape.reads_token:
        assert per_task is not None
        gates = torch.softmax(keep_top_k(per_task, shape.top_k), dim=-1)
        task_gates = gates.repeat_interleave(shape.r, dim=-1).to(weight_a.dtype)
    return InferenceWeights(a_and_w_x.t(), weight_b.t(), per_task, task_gates, {})


def fused_inference(
    x: torch.Tensor,
    out: torch.Tensor,
    prepared: InferenceWeights,
    token_tasks: torch.Tensor | None,
    shape: ExpertShape,
) -> torch.Tensor:
    """Add the update to `out` in place, without autograd and without dropout.

    Args:
        x: `(..., in)`.
        out: Output of the base layer, `(..., out)`, contiguous and owned by the caller.
        prepared: See `inference_weights`.
        token_tasks: `(tokens,)` index of each token's task, or None.
        shape: The plain numbers.

    Returns:
        `out`.
    """
    x2 = x.reshape(-1, x.shape[-1])
    tokens, rank = x2.shape[0], shape.num_experts * shape.r
    one_token_a_row = token_tasks is None and x.dim() == 3 and x.shape[1] == 1
    row_part = _row_part(prepared, tokens, rank) if one_token_a_row else None
    if prepared.task_gates is not None:
        spread = row_part if row_part is not None else spread_over_tokens(prepared.task_gates, tokens, token_tasks)
        z = (x2 @ prepared.a_and_w_x) * spread
    else:
        if row_part is not None:
            h = torch.addmm(row_part, x2, prepared.a_and_w_x)
            gates = torch.softmax(keep_top_k(h[:, rank:], shape.top_k), dim=-1, dtype=torch.promote_types(h.dtype, torch.float32))
        else:
            h = x2 @ prepared.a_and_w_x
            gates = _gates(h[:, rank:], prepared.per_task, tokens, token_tasks, shape.top_k)
        z = (h[:, :rank].view(tokens, shape.num_experts, shape.r) * gates.to(h.dtype).unsqueeze(-1)).view(tokens, rank)
    out.view(-1, out.shape[-1]).addmm_(z, prepared.b, alpha=shape.scaling)
    return out


def _row_part(prepared: InferenceWeights, rows: int, rank: int) -> torch.Tensor | None:
    """`InferenceWeights.by_rows` for this number of rows, made the first time; None where no row has a task."""
    found = prepared.by_rows.get(rows)
    if found is None and prepared.per_task is not None:
        if prepared.task_gates is not None:
            found = spread_over_tokens(prepared.task_gates, rows, None)
        else:
            per_row = spread_over_tokens(prepared.per_task, rows, None).to(prepared.a_and_w_x.dtype)
            found = torch.cat((per_row.new_zeros(rows, rank), per_row), dim=1)
        prepared.by_rows[rows] = found
    return found
