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

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from likelihoods import Losses, cells, difference, measure_of, scale_layers
from on_adapter import load, parser
from one_run import swapped  # found by `likelihoods`
from rich.console import Console
from rich.table import Table

from peft_taskmoe.layer import TaskMoELoraLayer
from peft_taskmoe.uie import read_datasets


@contextmanager
def without(model: Any, part: str) -> Iterator[None]:
    """The routers' columns of a part ("token", "task" or "all") are zero inside."""
    kept = []
    for layer in model.modules():
        if isinstance(layer, TaskMoELoraLayer):
            weight = layer.taskmoe_lora_router[layer.active_adapters[0]].weight.data
            kept.append((weight, weight.clone()))
            edge = layer.in_features
            columns = {"token": slice(None, edge), "task": slice(edge, None), "all": slice(None)}[
                part
            ]
            weight[:, columns] = 0
    try:
        yield
    finally:
        for weight, before in kept:
            weight.copy_(before)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print the table."""
    asked = parser(__doc__, limit=25)
    asked.add_argument("--batch-size", type=int, default=8)
    asked.add_argument(
        "--scale", type=float, default=1.0, help="times the adapter's update, see adapter_scale.py"
    )
    args = asked.parse_args(arguments)
    extractor = load(args)
    model, measure = extractor.model, measure_of(extractor, args.batch_size)
    scale_layers(model, args.scale)
    sets = read_datasets(args.files, split="test", limit=args.limit)

    def likelihoods(task_of: dict[tuple[str, str], Any] | None = None) -> Losses:
        return {
            name: measure.likelihoods(
                documents, None if task_of is None else [task_of[name, one.id] for one in documents]
            )
            for name, documents in sets.items()
        }

    found = {"whole": likelihoods()}
    if measure.encoder is not None and len(sets) > 1:
        found["swapped"] = likelihoods(swapped(sets))
    for title, part in (("no task", "task"), ("no token", "token"), ("uniform", "all")):
        if measure.encoder is not None or part == "all":
            with without(model, part):
                found[title] = likelihoods()

    table = Table(
        title=f"{sum(map(len, sets.values()))} documents of {len(sets)} data sets, scale {args.scale:g}"
    )
    for column in ("router", *sets, "mean", "less the whole router's"):
        table.add_column(column, justify="right")
    for way in found:
        table.add_row(way, *cells(found[way]), difference(found[way], found["whole"]))
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
