"""ATen operations per adapted linear, forward and backward: ours against PEFT's LoRA. On a GPU each of them is a launch or a view.

    python benchmarks/op_count.py             # eager, as on a GPU
    python benchmarks/op_count.py --device cpu
    python benchmarks/op_count.py --compiled  # kernels that torch.compile makes of it, products included

Counted is what reaches the dispatcher while the seven linears of a Llama layer of SmolLM2-135M's shape run forward and backward, less what
the linears take without adapters, divided by seven; views and allocations, which launch nothing, are counted apart. Layers that read the
same tensor (q, k and v; gate and up) are one function of ours. It takes another way under a dispatch mode, so it is called here directly;
the normalisation of the task, once per forward and width, is therefore not included; compiled, where a single linear of 576 x 576 is
counted, it is. Tensors of the meta device, which have no data, take the ways of a GPU's, but for dropout itself (LoRA's is one operation
forward and one backward there); on a CPU ours joins the products of a layer that reads alone. Knows no model and measures no time.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Callable, Sequence
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
from peft_taskmoe.fused import ExpertShape, FusedUpdate, LayerTensors

VIEWS = {
    "view", "_unsafe_view", "t", "transpose", "expand", "slice", "unsqueeze", "squeeze", "alias", "detach", "as_strided",
    "_reshape_alias", "split", "split_with_sizes", "select", "promote_types", "new_empty", "empty", "empty_like",
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


def counted(
    forward: Callable[[torch.Tensor], Sequence[torch.Tensor]], width: int, device: str
) -> Counter[str]:
    """Operations of one forward and backward of a batch of 4 rows of 256 tokens."""
    x = torch.randn(4, 256, width, requires_grad=True, device=device)
    with Counting() as mode:
        outs = forward(x)
        torch.autograd.backward(outs, [torch.ones_like(out) for out in outs])
    return mode.counts


WIDTH, NUM_EXPERTS, R, TASK_DIM = 576, 8, 4, 768
LLAMA_LAYER = ((576, (576, 192, 192)), (576, (576,)), (576, (1536, 1536)), (1536, (576,)))
"""In-features, and the out-features of the linears that read the same tensor: q, k, v; o; gate, up; down."""


def adapted(config: PeftConfig, in_features: int = WIDTH, out_features: int = WIDTH) -> nn.Module:
    """A linear layer with an adapter."""
    model = nn.ModuleDict({"linear": nn.Linear(in_features, out_features, bias=False)})
    return inject_adapter_in_model(config, model)["linear"]


def of_readers(
    in_features: int, outs: Sequence[int], dropout: float, device: str
) -> dict[str, Counter[str]]:
    """Operations beyond the linears' own, of the linears that read one tensor."""
    weights = [torch.randn(out, in_features, device=device) for out in outs]
    config = LoraConfig(r=36, lora_alpha=36, lora_dropout=dropout, target_modules=["linear"])
    loras = [adapted(config, in_features, out).to(device) for out in outs]
    tensors: list[torch.Tensor | None] = []
    for weight, out in zip(weights, outs, strict=True):
        sizes = (
            (NUM_EXPERTS * R, in_features),
            (out, NUM_EXPERTS * R),
            (NUM_EXPERTS, in_features + TASK_DIM),
        )
        tensors += LayerTensors(
            None,
            weight,
            None,
            *(torch.randn(*size, requires_grad=True, device=device) for size in sizes),
        )
    task, shape = (
        torch.randn(4, TASK_DIM, device=device),
        ExpertShape(NUM_EXPERTS, R, None, True, True),
    )
    alone = counted(lambda x: [F.linear(x, weight) for weight in weights], in_features, device)
    found = {
        "LoRA-36": counted(lambda x: [lora(x) for lora in loras], in_features, device),
        "ours 8x4": counted(
            lambda x: FusedUpdate.apply(
                x, task, None, shape, (1.0,) * len(outs), dropout, *tensors
            ),
            in_features,
            device,
        ),
    }
    for counts in found.values():
        counts.subtract(alone)
    return found


class PerLinear(NamedTuple):
    """Of all seven linears, divided by seven."""

    launched: float
    views: float
    which: dict[str, int]


def per_linear(dropout: float, device: str) -> dict[str, PerLinear]:
    """What eager mode launches, by method."""
    totals: dict[str, Counter[str]] = {}
    for in_features, outs in LLAMA_LAYER:
        for name, counts in of_readers(in_features, outs, dropout, device).items():
            totals.setdefault(name, Counter()).update(counts)
    found = {}
    for name, counts in totals.items():
        launched = {op: n for op, n in sorted(counts.items()) if n and op not in VIEWS}
        views = sum(n for op, n in counts.items() if op in VIEWS)
        found[name] = PerLinear(sum(launched.values()) / 7, views / 7, launched)
    return found


def eager(device: str) -> Table:
    """The table of it."""
    table = Table(
        title=f"operations per adapted linear of a Llama layer, forward and backward, {device}"
    )
    for column in ("dropout", "method", "operations", "views, allocations", "which, of all seven"):
        table.add_column(column, overflow="fold")
    for dropout in (0.0, 0.05):
        for name, found in per_linear(dropout, device).items():
            table.add_row(
                str(dropout), name, f"{found.launched:.1f}", f"{found.views:.1f}",
                ", ".join(f"{op} {n}" for op, n in found.which.items()),
            )  # fmt: skip
    return table


def compiled() -> Table:
    """Calls of products and of fused kernels in the code that torch.compile generates."""
    table = Table(
        title="kernels per adapted layer beyond the linear layer's two products, compiled"
    )
    for column in ("dropout", "method", "kernels", "products", "fused"):
        table.add_column(column, overflow="fold")
    task = torch.randn(4, TASK_DIM)
    for dropout in (0.0, 0.05):
        common = {"lora_dropout": dropout, "target_modules": ["linear"]}
        for name, config in (
            ("LoRA-36", LoraConfig(r=36, lora_alpha=36, **common)),
            (
                "ours 8x4",
                TaskMoELoraConfig(num_experts=NUM_EXPERTS, r=R, task_dim=TASK_DIM, **common),
            ),
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
                len(re.findall(r"\b(?:cpp|triton)_\w*fused_\w+(?:\.run)?\(", body))
                for body in bodies
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
    parser.add_argument(
        "--device", default="meta", help="Where the tensors of the eager count lie."
    )
    args = parser.parse_args()
    Console().print(compiled() if args.compiled else eager(args.device))


if __name__ == "__main__":
    main()
