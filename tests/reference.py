"""Task-Aware MoELoRA as its paper writes it: loops over tokens and experts, one formula a line,
float64.

It shares no code with the package. Gradients follow by autograd through these loops, so they share
none either.

    g_t = softmax(W_r [x_t ; e])
    y_t = W_0 x_t + s * sum_i g_{t,i} B_i A_i dropout(x_t)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def scaled_task(task: Tensor, task_norm: str, in_features: int) -> Tensor:
    """One task embedding `(task_dim,)` at the scale the router reads it."""
    length = sum(value * value for value in task) ** 0.5
    if task_norm == "none":
        return task
    if task_norm == "rms":
        return task / length * math.sqrt(len(task))
    assert task_norm == "matched"
    return task / length * 0.25 * math.sqrt(in_features)


def gates_of_token(router_input: Tensor, router: Tensor, top_k: int | None) -> list[Tensor]:
    """Softmax over the experts; with `top_k` over the largest logits only, other gates are 0."""
    logits = [row @ router_input for row in router]
    best = sorted(range(len(logits)), key=lambda i: logits[i].item(), reverse=True)
    kept = best if top_k is None else best[:top_k]
    total = sum(torch.exp(logits[i]) for i in kept)
    return [
        torch.exp(logit) / total if i in kept else torch.zeros((), dtype=logit.dtype)
        for i, logit in enumerate(logits)
    ]


def all_gates(
    x: Tensor,
    router: Tensor,
    tasks: Tensor | None,
    task_of_token: Sequence[int],
    *,
    reads_token: bool = True,
    top_k: int | None = None,
    task_norm: str = "none",
) -> Tensor:
    """Gates `(tokens, e)` of x `(tokens, in)`; `tasks` is `(n, task_dim)`, or None if the router
    does not read it.
    """
    rows = []
    for t, x_t in enumerate(x):
        read = [x_t] if reads_token else []
        if tasks is not None:
            read.append(scaled_task(tasks[task_of_token[t]], task_norm, x.shape[1]))
        rows.append(torch.stack(gates_of_token(torch.cat(read), router, top_k)))
    return torch.stack(rows)


def adapted_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    router: Tensor,
    tasks: Tensor | None,
    task_of_token: Sequence[int],
    *,
    r: int,
    scaling: float,
    reads_token: bool = True,
    top_k: int | None = None,
    task_norm: str = "none",
    kept: Tensor | None = None,
    drop_rate: float = 0.0,
) -> Tensor:
    """The adapted layer's output `(tokens, out)`.

    x is `(tokens, in)`, weight `(out, in)`, A `(e*r, in)` and B `(out, e*r)` expert by expert,
    router `(e, in + task_dim)`. `kept` `(tokens, in)` says which input features dropout left to
    the experts, at rate `drop_rate`.
    """
    gates = all_gates(
        x, router, tasks, task_of_token, reads_token=reads_token, top_k=top_k, task_norm=task_norm
    )
    outputs = []
    for t, x_t in enumerate(x):
        y_t = weight @ x_t
        if bias is not None:
            y_t = y_t + bias
        dropped = x_t if kept is None else x_t * kept[t] / (1 - drop_rate)
        for i in range(router.shape[0]):
            a_i = lora_a[i * r : (i + 1) * r]
            b_i = lora_b[:, i * r : (i + 1) * r]
            y_t = y_t + scaling * gates[t, i] * (b_i @ (a_i @ dropped))
        outputs.append(y_t)
    return torch.stack(outputs)


def balancing_loss(logits: Tensor, top_k: int | None, counted: Sequence[bool]) -> Tensor:
    """`E * sum_i f_i P_i` over the counted tokens; f_i: share of their choices on expert i, P_i:
    its mean probability.
    """
    tokens = [t for t, counts in enumerate(counted) if counts]
    num_experts, slots = logits.shape[1], top_k or 1
    loss = torch.zeros((), dtype=logits.dtype)
    for i in range(num_experts):
        f_i, p_i = 0.0, torch.zeros((), dtype=logits.dtype)
        for t in tokens:
            best = sorted(range(num_experts), key=lambda j, t=t: logits[t, j].item(), reverse=True)[
                :slots
            ]
            f_i += (i in best) / (slots * len(tokens))
            p_i = p_i + torch.exp(logits[t, i]) / torch.exp(logits[t]).sum() / len(tokens)
        loss = loss + f_i * p_i
    return num_experts * loss
