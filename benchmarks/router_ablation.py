"""What a trained router is worth when it is used: the likelihood of gold answers with parts of it taken away.

    =========  ==================================================================================
    swapped    every text gets the task embedding of another of the data sets
    no task    the router's columns for the task embedding are zero: `softmax(W_x x)`
    no token   those for the hidden state are zero: `softmax(W_e e)`
    uniform    all are zero: every gate is 1 / E, for every token of every task
    =========  ==================================================================================

Negative log-likelihood per token in nats, mean over data sets, less that of the whole router, with 95 % intervals (paired bootstrap over
documents): above 0, the part helps. What was learned with a part cannot always do without it, so "no task" also changes what the
token's part was trained beside; "swapped" leaves all of that as it is, and asks only whether it matters which task.

    python benchmarks/router_ablation.py --adapter my-adapter --files data/a/test.jsonl data/b/test.jsonl
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from peft_taskmoe.layer import TaskMoELoraLayer
from peft_taskmoe.uie import Extractor, compare_values, read_datasets

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "benchmark"))
from one_run import Measure, swapped


@contextmanager
def without(model: Any, part: str) -> Iterator[None]:
    """The routers' columns of a part ("token", "task" or "all") are zero inside."""
    kept = []
    for layer in model.modules():
        if isinstance(layer, TaskMoELoraLayer):
            weight = layer.taskmoe_lora_router[layer.active_adapters[0]].weight.data
            kept.append((weight, weight.clone()))
            edge = layer.in_features
            columns = {"token": slice(None, edge), "task": slice(edge, None), "all": slice(None)}[part]
            weight[:, columns] = 0
    try:
        yield
    finally:
        for weight, before in kept:
            weight.copy_(before)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--adapter", required=True, help="folder or Hub id")
    parser.add_argument("--base", help="base model (default: the one that the adapter names)")
    parser.add_argument("--files", nargs="+", required=True, help="JSONL documents, or Hub data sets")
    parser.add_argument(
        "--limit", type=int, default=25, help="documents of each data set (default: %(default)s)"
    )
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    extractor = Extractor.from_pretrained(args.adapter, base_model=args.base)
    model = extractor.model.to(args.device)
    reader = extractor._reader()
    encoder = None if reader is None else reader.encoder
    settings: Any = SimpleNamespace(format=extractor.format, likelihood_batch_size=args.batch_size)
    measure = Measure(model, extractor.tokenizer, encoder, settings)
    sets = read_datasets(args.files, split="test", limit=args.limit)

    def likelihoods(task_of: dict[tuple[str, str], Any] | None = None) -> dict[str, dict[str, list[float]]]:
        return {
            name: measure.likelihoods(
                documents, None if task_of is None else [task_of[name, one.id] for one in documents]
            )
            for name, documents in sets.items()
        }

    found = {"whole": likelihoods()}
    if encoder is not None and len(sets) > 1:
        found["swapped"] = likelihoods(swapped(sets))
    for title, part in (("no task", "task"), ("no token", "token"), ("uniform", "all")):
        if encoder is not None or part == "all":
            with without(model, part):
                found[title] = likelihoods()

    def values(way: str, what: int | None) -> dict[str, dict[str, float]]:
        """Loss per token of each document, or its tokens."""
        return {
            name: {key: n if what else loss / n for key, (loss, n) in of_set.items()}
            for name, of_set in found[way].items()
        }

    table = Table(title=f"{sum(map(len, sets.values()))} documents of {len(sets)} data sets")
    for column in ("router", *sets, "mean", "less the whole router's"):
        table.add_column(column, justify="right")
    for way in found:
        line = compare_values(values(way, None), values("whole", None), weights=values("whole", 1))["all"]
        per_set = [
            sum(loss for loss, _ in of_set.values()) / sum(n for _, n in of_set.values())
            for of_set in found[way].values()
        ]
        cells = [f"{one:.4f}" for one in (*per_set, sum(per_set) / len(per_set))]
        table.add_row(way, *cells, f"{line.difference:+.4f} [{line.low:+.4f}, {line.high:+.4f}]")
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
