"""Maps token states and task embeddings to expert gates."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

TYPICAL_INPUT_RMS = 0.25
"""Root mean square of a linear layer's input entries in a pretrained transformer: medians of 0.14
to 0.32 over the seven kinds of linears of SmolLM2-135M (`experiments/router_scale.py`)."""


def check_task_embeds(task_embeds: Any) -> None:
    """Raise `ValueError` unless given a float tensor `(n, task_dim)`."""
    found = type(task_embeds).__name__
    if isinstance(task_embeds, torch.Tensor):
        if task_embeds.dim() == 2 and task_embeds.is_floating_point():
            return
        found = f"of shape {tuple(task_embeds.shape)} and dtype {task_embeds.dtype}"
    raise ValueError(
        f"`task_embeds` must be a float tensor of shape (batch, task_dim), got {found}. "
        "Pass e.g. `task_embeds=encoder(prompts)`."
    )


def normalize_task(task_embeds: torch.Tensor, task_norm: str, in_features: int) -> torch.Tensor:
    """Bring task embeddings to the scale at which the router reads them.

    The logits of a fresh router spread over the experts in proportion to the norms of its inputs,
    whatever the number of experts and the encoder. `"matched"`: `e / |e| * 0.25 sqrt(in)`, the
    norm that the layer's own input typically has, so that both parts start with about the same
    say. `"rms"`: `e / rms(e)`, entries of size about 1. `"none"`: the paper's raw vector.

    Args:
        task_embeds: `(n, task_dim)`.
        task_norm: `"matched"`, `"rms"` or `"none"`.
        in_features: Input features of the adapted layer.

    Returns:
        `(n, task_dim)`. A zero vector stays zero.
    """
    if task_norm == "none":
        return task_embeds
    norm = (
        TYPICAL_INPUT_RMS * in_features**0.5
        if task_norm == "matched"
        else task_embeds.shape[-1] ** 0.5
    )
    return F.normalize(task_embeds, dim=-1, eps=1e-12) * norm


def spread_over_tokens(
    per_task: torch.Tensor, num_tokens: int, token_tasks: torch.Tensor | None
) -> torch.Tensor:
    """Repeat one row per task to one row per token.

    Tokens are flattened in row-major order, so without `token_tasks` each of the n tasks owns
    `num_tokens / n` consecutive tokens; beams and `num_return_sequences`, which repeat each prompt
    in place, come out right by the same rule.

    Args:
        per_task: `(n, e)`.
        num_tokens: Number of tokens.
        token_tasks: `(num_tokens,)` index of each token's task, for packed rows; None for the rule
            above.

    Returns:
        `(num_tokens, e)`.
    """
    if token_tasks is not None:
        return per_task[token_tasks]
    return per_task.repeat_interleave(num_tokens // per_task.shape[0], dim=0)


def task_logits(task: torch.Tensor, router_weight: torch.Tensor) -> torch.Tensor:
    """The task part of the router, `W_e e`: `(n, task_dim)` -> `(n, e)` in float32 at least."""
    weight = router_weight[:, router_weight.shape[1] - task.shape[1] :]
    precise = torch.promote_types(weight.dtype, torch.float32)
    return F.linear(task.to(weight.dtype), weight).to(precise)


def sum_logits(
    token: torch.Tensor | None,
    per_task: torch.Tensor | None,
    num_tokens: int,
    token_tasks: torch.Tensor | None,
) -> torch.Tensor:
    """`W_r [x_t ; e]` as `W_x x_t + W_e e`: the task part costs one product per task.

    Args:
        token: Token part `W_x x`, `(tokens, e)`, or None if the router does not read the token.
        per_task: Task part `W_e e` of each of n tasks (`task_logits`), or None if it does not read
            the task.
        num_tokens: Number of tokens.
        token_tasks: See `spread_over_tokens`.

    Returns:
        `(tokens, e)`, float32 (float64 for float64 parts).
    """
    if token is None:
        assert per_task is not None
        return spread_over_tokens(per_task, num_tokens, token_tasks)
    token = token.to(torch.promote_types(token.dtype, torch.float32))
    if per_task is None:
        return token
    if token_tasks is not None:
        return token + spread_over_tokens(per_task, num_tokens, token_tasks)
    n, num_experts = per_task.shape
    # Broadcast, not repeated: torch.compile then adds it inside the softmax.
    by_task = token.view(n, num_tokens // n, num_experts) + per_task.unsqueeze(1)
    return by_task.view(num_tokens, num_experts)


def keep_top_k(logits: torch.Tensor, top_k: int | None) -> torch.Tensor:
    """Set all but the `top_k` largest logits of each row to minus infinity; ties keep `top_k`."""
    if top_k is None or top_k == logits.shape[-1]:
        return logits
    kept = logits.topk(top_k, dim=-1).indices
    dropped = torch.ones_like(logits, dtype=torch.bool).scatter(-1, kept, False)
    return logits.masked_fill(dropped, float("-inf"))


def gates_from_logits(logits: torch.Tensor, top_k: int | None) -> torch.Tensor:
    """Softmax over the experts, in float32 at least; with `top_k`, over the `top_k` largest alone.

    Args:
        logits: `(tokens, e)`.
        top_k: Number of gates to keep, or None for all.

    Returns:
        `(tokens, e)`, rows that sum to 1.
    """
    return torch.softmax(keep_top_k(logits, top_k), dim=-1)


@torch.no_grad()
def load_balancing_loss(
    logits: torch.Tensor, top_k: int | None, token_mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""`E * sum_i f_i P_i` over the tokens that are not padding: 1 for experts used alike, up to E.

    `f_i` is the share of the (token, slot) choices that fall on expert i, with `top_k` slots per
    token (1 where all gates are kept), and `P_i` the mean of the full softmax. The gradient flows
    through `P_i`. Source: Fedus et al., "Switch Transformers", JMLR 2022, equations 4 to 6.

    Args:
        logits: `(tokens, e)`, before `top_k`.
        top_k: Gates kept per token.
        token_mask: `(tokens,)` bool, True for tokens that count; None for all.

    Returns:
        The loss, a scalar, and its gradient with respect to the logits, `(tokens, e)`.
    """
    num_experts, slots = logits.shape[-1], top_k or 1
    probs = torch.softmax(logits, dim=-1)
    chosen = torch.zeros_like(probs).scatter(-1, logits.topk(slots, dim=-1).indices, 1.0)
    counted = torch.ones_like(probs[:, :1])
    if token_mask is not None:
        counted = token_mask.to(probs).unsqueeze(-1)
    weights = counted / counted.sum().clamp(min=1.0)
    share = (chosen * weights).sum(0) / slots
    of_probs = num_experts * share * weights
    gradient = probs * (of_probs - (probs * of_probs).sum(-1, keepdim=True))
    return (of_probs * probs).sum(), gradient
