"""Shows the ATen operations per adapted linear, forward and backward: ours against PEFT's LoRA.

    python benchmarks/op_count.py             # eager, as on a GPU
    python benchmarks/op_count.py --device cpu
    python benchmarks/op_count.py --compiled  # kernels that torch.compile makes of it

On a GPU each operation is a launch or a view. Counted is what reaches the dispatcher while the
seven linears of a Llama layer of SmolLM2-135M's shape run, less what they take without adapters,
divided by seven; views and allocations, which launch nothing, are counted apart. The fused function
is called directly, since layers take another way under a dispatch mode. The task's normalisation,
once a forward and width, is in the compiled count of one linear only. Tensors of the meta device
take the ways of a GPU's, but for dropout, one operation forward and one backward for LoRA there.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftConfig, inject_adapter_in_model
from rich.console import Console
from rich.table import Table
from torch import nn
from torch._inductor.utils import run_and_get_code
from torch.utils._python_dispatch import TorchDispatchMode

from peft_taskmoe import TaskMoELoraConfig, task_context
from peft_taskmoe.fused import ExpertShape, FusedUpdate

VIEWS = {
    *("view", "_unsafe_view", "t", "transpose", "expand", "slice", "unsqueeze", "squeeze"),
    *("alias", "detach", "as_strided", "_reshape_alias", "split", "split_with_sizes", "select"),
    *("promote_types", "new_empty", "empty", "empty_like"),
}
WIDTH, NUM_EXPERTS, R, TASK_DIM = 576, 8, 4, 768
LLAMA_LAYER = (
    *((576, 576), (576, 192), (576, 192), (576, 576)),
    *((576, 1536), (576, 1536), (1536, 576)),
)
"""In- and out-features of q, k, v, o, gate, up, down."""


class PerLinear(NamedTuple):
    """Operations of all seven linears, divided by seven, and which they are."""

    launched: float
    views: float
    which: dict[str, int]


class Counting(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count and run."""
        self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def counted(
    forward: Callable[[torch.Tensor], torch.Tensor], width: int, device: str
) -> Counter[str]:
    """Operations of one forward and backward of a batch of 4 rows of 256 tokens."""
    x = torch.randn(4, 256, width, requires_grad=True, device=device)
    with Counting() as mode:
        out = forward(x)
        out.backward(torch.ones_like(out))
    return mode.counts


def adapted(config: PeftConfig, in_features: int = WIDTH, out_features: int = WIDTH) -> nn.Module:
    """A linear layer with an adapter."""
    model = nn.ModuleDict({"linear": nn.Linear(in_features, out_features, bias=False)})
    return inject_adapter_in_model(config, model)["linear"]


def of_linear(
    in_features: int, out_features: int, dropout: float, device: str
) -> dict[str, Counter[str]]:
    """Operations beyond the linear's own, by method."""
    weight = torch.randn(out_features, in_features, device=device)
    config = LoraConfig(r=36, lora_alpha=36, lora_dropout=dropout, target_modules=["linear"])
    lora = adapted(config, in_features, out_features).to(device)
    a, b, router = (
        torch.randn(*size, requires_grad=True, device=device)
        for size in (
            (NUM_EXPERTS * R, in_features),
            (out_features, NUM_EXPERTS * R),
            (NUM_EXPERTS, in_features + TASK_DIM),
        )
    )
    task = torch.randn(4, TASK_DIM, device=device)
    shape = ExpertShape(NUM_EXPERTS, R, None, reads_token=True, reads_task=True)

    def ours(x: torch.Tensor) -> torch.Tensor:
        return FusedUpdate.apply(
            x, None, weight, None, a, b, router, task, None, shape, 1.0, dropout
        )

    found = {
        "LoRA-36": counted(lora, in_features, device),
        "ours 8x4": counted(ours, in_features, device),
    }
    alone = counted(lambda x: F.linear(x, weight), in_features, device)
    for counts in found.values():
        counts.subtract(alone)
    return found


def per_linear(dropout: float, device: str) -> dict[str, PerLinear]:
    """What eager mode launches, by method."""
    totals: dict[str, Counter[str]] = {}
    for sizes in LLAMA_LAYER:
        for name, counts in of_linear(*sizes, dropout, device).items():
            totals.setdefault(name, Counter()).update(counts)
    found = {}
    for name, counts in totals.items():
        launched = {op: n for op, n in sorted(counts.items()) if n and op not in VIEWS}
        views = sum(n for op, n in counts.items() if op in VIEWS)
        found[name] = PerLinear(sum(launched.values()) / 7, views / 7, launched)
    return found


def eager(device: str) -> Table:
    """The table of it."""
    table = Table(title=f"operations per adapted linear of a Llama layer, {device}")
    for column in ("dropout", "method", "operations", "views, allocations", "which, of all seven"):
        table.add_column(column, overflow="fold")
    for dropout in (0.0, 0.05):
        for name, found in per_linear(dropout, device).items():
            which = ", ".join(f"{op} {n}" for op, n in found.which.items())
            counts = (f"{found.launched:.1f}", f"{found.views:.1f}")
            table.add_row(str(dropout), name, *counts, which)
    return table


def compiled() -> Table:
    """Calls of products and of fused kernels in the code that torch.compile generates."""
    table = Table(title="kernels per adapted layer beyond the linear's two products, compiled")
    for column in ("dropout", "method", "kernels", "products", "fused"):
        table.add_column(column, overflow="fold")
    for dropout in (0.0, 0.05):
        common = {"lora_dropout": dropout, "target_modules": ["linear"]}
        ours = TaskMoELoraConfig(num_experts=NUM_EXPERTS, r=R, task_dim=TASK_DIM, **common)
        configs = {"LoRA-36": LoraConfig(r=36, lora_alpha=36, **common), "ours 8x4": ours}
        for name, config in configs.items():
            products, fused = kernels(config)
            counts = (products + fused, products, fused)
            table.add_row(str(dropout), name, *map(str, counts))
    return table


def kernels(config: PeftConfig) -> tuple[int, int]:
    """Products and fused kernels of an adapted layer, compiled, beyond the linear's own."""
    torch.compiler.reset()
    layer, task = torch.compile(adapted(config), fullgraph=True), torch.randn(4, TASK_DIM)

    def step() -> None:
        with task_context(task):
            out = layer(torch.randn(4, 256, WIDTH, requires_grad=True))
        out.backward(torch.ones_like(out))

    _, sources = run_and_get_code(step)
    bodies = [source[source.index("def call(") :] for source in sources]
    fused = r"\b(?:cpp|triton)_\w*fused_\w+(?:\.run)?\("
    counts = [
        sum(len(re.findall(one, body)) for body in bodies)
        for one in (r"extern_kernels\.\w*mm\(", fused)
    ]
    return counts[0] - 2, counts[1]


def main() -> None:
    """Count and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--compiled", action="store_true", help="count what torch.compile makes")
    parser.add_argument("--device", default="meta", help="where the tensors of the count lie")
    args = parser.parse_args()
    Console().print(compiled() if args.compiled else eager(args.device))


if __name__ == "__main__":
    main()
