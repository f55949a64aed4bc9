"""Shows the speed and memory of Task-Aware MoELoRA against what users would pick instead.

    python benchmarks/adapters.py                      # the table of the README
    python benchmarks/adapters.py --dtype bfloat16 --device cuda --layers 8
    python benchmarks/adapters.py --dtype bfloat16 --autocast --methods LoRA-36 "ours 8x4"
    python benchmarks/adapters.py --compile --methods "frozen base" LoRA-36 "ours 8x4"
    python benchmarks/adapters.py --methods "bare products" LoRA-36 "ours 8x4" --skip-decoding

Every method adapts all seven linears of a Llama of SmolLM2-135M's shape. Each round times every
method once, and a figure is the median over rounds of its ratio to LoRA r=36 in the same round, so
that a machine whose speed drifts slows both sides. Bytes are those that autograd keeps between
forward and backward, each storage once, weights left out. "bare products" is no method but a bound:
the matrix products of ours alone.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import torch
from methods import TASK_DIM, Method, build
from rich.console import Console
from rich.table import Table
from timing import decode, interleaved, kept_bytes, ratios, train_step

REFERENCE = "LoRA-36"
METHODS = [
    *("frozen base", "LoRA-32", "LoRA-36", "ours 8x4", "ours 32x1", "Poly", "X-LoRA", "loop 8x4")
]
CONSOLE = Console(width=110)


def main() -> None:
    """Measure and print."""
    args = arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(1)
    task = torch.randn(args.batch, TASK_DIM, device=args.device)
    settings = {name: str(value) for name, value in vars(args).items()}
    results: dict[str, Any] = {"settings": settings, "torch": torch.__version__}
    for dropout in args.dropouts:
        names = [name for name in args.methods if not dropout or name != "bare products"]
        methods = [build(name, args, task, dropout) for name in names]
        results[f"train dropout {dropout}"] = training(methods, args, dropout)
        decodes = not (args.skip_decoding or args.compile or args.autocast)
        if decodes and dropout == args.dropouts[0]:
            results["decoding"] = decoding(methods, args)
        del methods
        torch.compiler.reset()
        gc.collect()
    if args.output is not None:
        args.output.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--vocab", type=int, default=1024, help="small: no adapter is on the head")
    for name, default in (("layers", 8), ("batch", 4), ("length", 256), ("new-tokens", 32)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dropouts", type=float, nargs="+", default=[0.0, 0.05])
    parser.add_argument("--skip-decoding", action="store_true")
    parser.add_argument("--autocast", action="store_true", help="float32 adapters; no decoding")
    parser.add_argument("--compile", action="store_true", help="compile the models; no decoding")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--output", type=Path, help="write the figures here as JSON")
    args = parser.parse_args()
    if REFERENCE not in args.methods:
        parser.error(f"`--methods` must name {REFERENCE}, which the others are compared with.")
    return args


def training(
    methods: list[Method], args: argparse.Namespace, dropout: float
) -> dict[str, dict[str, float]]:
    """Time and memory of a train step; prints the table."""
    for method in methods:
        method.model.train()
        if args.compile:
            method.model.compile()
    dtype = getattr(torch, args.dtype)
    embeds = torch.randn(args.batch, args.length, 576, device=args.device, dtype=dtype)
    labels = torch.randint(0, args.vocab, (args.batch, args.length), device=args.device)
    step = partial(train_step, embeds=embeds, labels=labels, autocast=args.autocast)
    seconds = interleaved(methods, step, args.rounds, args.device)
    kept = {one.name: kept_bytes(one, embeds, labels, args.autocast) for one in methods}
    found = ratios(seconds, REFERENCE)
    how = "".join(f", {name}" for name in ("autocast", "compile") if getattr(args, name))
    size = f"{args.batch} x {args.length} tokens, {args.layers} layers"
    table = Table(title=f"train step, {args.dtype}, dropout {dropout}, {size}{how}")
    for column in (
        "method",
        f"time / {REFERENCE}",
        "min .. max",
        "ms",
        "bytes",
        "MiB",
        "trainable",
    ):
        table.add_column(column, justify="left" if column == "method" else "right")
    rows = {}
    for method in methods:
        name, (middle, low, high) = method.name, found[method.name]
        row = rows[name] = {
            "time": middle,
            "seconds": statistics.median(seconds[name]),
            "bytes": kept[name] / kept[REFERENCE],
            "trainable": sum(p.numel() for p in method.model.parameters() if p.requires_grad),
        }
        cells = [f"{middle:.3f}", f"{low:.2f} .. {high:.2f}", f"{1e3 * row['seconds']:.0f}"]
        cells += [f"{row['bytes']:.3f}", f"{kept[name] / 2**20:.0f}", f"{row['trainable']:,}"]
        table.add_row(name, *cells)
    CONSOLE.print(table)
    return rows


def decoding(methods: list[Method], args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Time of greedy decoding; prints the table."""
    methods = [one for one in methods if one.name not in ("X-LoRA", "Poly", "bare products")]
    for method in methods:
        method.model.eval()
    prompt = torch.randint(0, args.vocab, (args.batch, 64), device=args.device)
    run = partial(decode, prompt=prompt, new_tokens=args.new_tokens)
    seconds = interleaved(methods, run, args.rounds, args.device)
    size = f"batch {args.batch}, 64 + {args.new_tokens} tokens, KV cache"
    table = Table(title=f"greedy decoding, {args.dtype}, {size}")
    for column in ("method", f"time / {REFERENCE}", "min .. max", "tokens/s"):
        table.add_column(column, justify="left" if column == "method" else "right")
    rows = {}
    for name, (middle, low, high) in ratios(seconds, REFERENCE).items():
        speed = args.batch * args.new_tokens / statistics.median(seconds[name])
        rows[name] = {"time": middle, "tokens_per_second": speed}
        table.add_row(name, f"{middle:.3f}", f"{low:.2f} .. {high:.2f}", f"{speed:.0f}")
    CONSOLE.print(table)
    return rows


if __name__ == "__main__":
    main()
