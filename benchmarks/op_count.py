"""ATen operations per adapted layer, forward and backward: ours against PEFT's LoRA. On a GPU each of them is a launch or a view.

    python benchmarks/op_count.py

Counted is what reaches the dispatcher while one `nn.Linear` with an adapter runs forward and backward, accumulation of the weight gradients
included, less what the linear layer alone takes; views, which launch nothing, are counted apart. Our layer takes another way under
a dispatch mode, so the function that it calls otherwise is called here directly; the normalisation of the task, once per forward and
width, is therefore not included. Knows no model and measures no time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from peft_taskmoe.fused import ExpertShape, FusedUpdate

VIEWS = {
    "view", "_unsafe_view", "t", "transpose", "expand", "slice", "unsqueeze", "squeeze", "alias", "detach", "as_strided",
    "_reshape_alias", "split", "select", "promote_types",
}  # fmt: skip


class Counting(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count and run."""
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def counted(forward: Callable[[torch.Tensor], torch.Tensor], width: int) -> Counter[str]:
    """Operations of one forward and backward of a batch of 4 rows of 256 tokens."""
    x = torch.randn(4, 256, width, requires_grad=True)
    with Counting() as mode:
        out = forward(x)
        out.backward(torch.ones_like(out))
    return mode.counts


def main() -> None:
    """Count and print."""
    width, num_experts, r, task_dim = 576, 8, 4, 768
    base = nn.Linear(width, width, bias=False).requires_grad_(False)
    router_weight = torch.randn(num_experts, width + task_dim, requires_grad=True)
    weight_a = torch.randn(num_experts * r, width, requires_grad=True)
    weight_b = torch.randn(width, num_experts * r, requires_grad=True)
    task = torch.randn(4, task_dim)
    shape = ExpertShape(num_experts, r, None, True, True)
    table = Table(title="operations per adapted layer beyond the linear layer's own, forward and backward")
    for column in ("dropout", "method", "operations", "views", "which"):
        table.add_column(column, overflow="fold")
    alone = counted(lambda x: F.linear(x, base.weight), width)
    for dropout in (0.0, 0.05):
        model = nn.ModuleDict({"linear": nn.Linear(width, width, bias=False)})
        config = LoraConfig(r=36, lora_alpha=36, lora_dropout=dropout, target_modules=["linear"])
        lora = inject_adapter_in_model(config, model)["linear"]

        def ours(x: torch.Tensor, dropout: float = dropout) -> torch.Tensor:
            return FusedUpdate.apply(
                x, None, base.weight, None, weight_a, weight_b, router_weight, task, None, shape, 1.0, dropout
            )

        for name, forward in (("LoRA-36", lora), ("ours 8x4", ours)):
            for leaf in (weight_a, weight_b, router_weight):
                leaf.grad = None
            counts = counted(forward, width)
            counts.subtract(alone)
            launched = {op: n for op, n in counts.items() if n and op not in VIEWS}
            views = sum(n for op, n in counts.items() if op in VIEWS)
            table.add_row(
                str(dropout), name, str(sum(launched.values())), str(views),
                ", ".join(f"{op} {n}" for op, n in sorted(launched.items())),
            )  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    main()
