"""ATen operations per adapted layer, forward and backward: ours against PEFT's LoRA. On a GPU each of them is a launch or a view.

    python benchmarks/op_count.py             # eager
    python benchmarks/op_count.py --compiled  # kernels that torch.compile makes of it, products included

Counted is what reaches the dispatcher while one `nn.Linear` with an adapter runs forward and backward, accumulation of the weight gradients
included, less what the linear layer alone takes; views, which launch nothing, are counted apart. Our layer takes another way under
a dispatch mode, so the function that it calls otherwise is called here directly; the normalisation of the task, once per forward and
width, is therefore not included; compiled, it is. Knows no model and measures no time.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftConfig, inject_adapter_in_model
from rich.console import Console
from rich.table import Table
from torch import nn
from torch._inductor.utils import run_and_get_code
from torch.utils._python_dispatch import TorchDispatchMode

from peft_taskmoe import TaskMoELoraConfig, task_context
from peft_taskmoe.fused import ExpertShape, FusedUpdate, LayerTensors

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


WIDTH, NUM_EXPERTS, R, TASK_DIM = 576, 8, 4, 768


def adapted(config: PeftConfig) -> nn.Module:
    """A linear layer with an adapter."""
    model = nn.ModuleDict({"linear": nn.Linear(WIDTH, WIDTH, bias=False)})
    return inject_adapter_in_model(config, model)["linear"]


def eager() -> Table:
    """What eager mode launches."""
    base = nn.Linear(WIDTH, WIDTH, bias=False).requires_grad_(False)
    router_weight = torch.randn(NUM_EXPERTS, WIDTH + TASK_DIM, requires_grad=True)
    weight_a = torch.randn(NUM_EXPERTS * R, WIDTH, requires_grad=True)
    weight_b = torch.randn(WIDTH, NUM_EXPERTS * R, requires_grad=True)
    task = torch.randn(4, TASK_DIM)
    shape = ExpertShape(NUM_EXPERTS, R, None, True, True)
    table = Table(title="operations per adapted layer beyond the linear layer's own, forward and backward")
    for column in ("dropout", "method", "operations", "views", "which"):
        table.add_column(column, overflow="fold")
    alone = counted(lambda x: F.linear(x, base.weight), WIDTH)
    for dropout in (0.0, 0.05):
        lora = adapted(LoraConfig(r=36, lora_alpha=36, lora_dropout=dropout, target_modules=["linear"]))

        def ours(x: torch.Tensor, dropout: float = dropout) -> torch.Tensor:
            tensors = LayerTensors(None, base.weight, None, weight_a, weight_b, router_weight)
            return FusedUpdate.apply(x, task, None, shape, (1.0,), dropout, *tensors)[0]

        for name, forward in (("LoRA-36", lora), ("ours 8x4", ours)):
            for leaf in (weight_a, weight_b, router_weight):
                leaf.grad = None
            counts = counted(forward, WIDTH)
            counts.subtract(alone)
            launched = {op: n for op, n in counts.items() if n and op not in VIEWS}
            views = sum(n for op, n in counts.items() if op in VIEWS)
            table.add_row(
                str(dropout), name, str(sum(launched.values())), str(views),
                ", ".join(f"{op} {n}" for op, n in sorted(launched.items())),
            )  # fmt: skip
    return table


def compiled() -> Table:
    """Calls of products and of fused kernels in the code that torch.compile generates."""
    table = Table(title="kernels per adapted layer beyond the linear layer's two products, compiled")
    for column in ("dropout", "method", "kernels", "products", "fused"):
        table.add_column(column, overflow="fold")
    task = torch.randn(4, TASK_DIM)
    for dropout in (0.0, 0.05):
        common = {"lora_dropout": dropout, "target_modules": ["linear"]}
        for name, config in (
            ("LoRA-36", LoraConfig(r=36, lora_alpha=36, **common)),
            ("ours 8x4", TaskMoELoraConfig(num_experts=NUM_EXPERTS, r=R, task_dim=TASK_DIM, **common)),
        ):
            torch.compiler.reset()
            layer = torch.compile(adapted(config), fullgraph=True)

            def step(layer: nn.Module = layer) -> None:
                with task_context(task):
                    out = layer(torch.randn(4, 256, WIDTH, requires_grad=True))
                out.backward(torch.ones_like(out))

            _, sources = run_and_get_code(step)
            bodies = [source[source.index("def call(") :] for source in sources]
            products = sum(len(re.findall(r"extern_kernels\.\w*mm\(", body)) for body in bodies) - 2
            fused = sum(
                len(re.findall(r"\b(?:cpp|triton)_\w*fused_\w+(?:\.run)?\(", body)) for body in bodies
            )
            table.add_row(str(dropout), name, str(products + fused), str(products), str(fused))
    return table


def main() -> None:
    """Count and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--compiled", action="store_true", help="Count what torch.compile makes of the layer."
    )
    Console().print(compiled() if parser.parse_args().compiled else eager())


if __name__ == "__main__":
    main()
