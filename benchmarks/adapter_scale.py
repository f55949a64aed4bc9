"""Is less of an adapter better on data sets that it never saw? The likelihood of gold answers with its update scaled at test time.

An adapter that overfits its training sets gains when its update is multiplied by less than 1 (for LoRA that is wise-ft,
https://huggingface.co/papers/2109.01903). Adapters that differ in the size of their updates should therefore be compared at each one's
best scale, too. The first is the one that the others are compared with: at equal scales, and at the best ones, where the scale for a
data set is chosen on the other data sets.

Negative log-likelihood per token in nats, mean over data sets; differences with 95 % intervals (paired bootstrap over documents).

    python benchmarks/adapter_scale.py --adapter my-lora --others my-experts --files data/a/test.jsonl data/b/test.jsonl
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from likelihoods import Losses, cells, difference, mean, measure_of, scale_layers
from on_adapter import load, parser
from rich.console import Console
from rich.table import Table

from peft_taskmoe.uie import Document, read_datasets


def at_scales(
    args: Any, adapter: str, sets: dict[str, list[Document]], scales: Iterable[float]
) -> dict[float, Losses]:
    """The losses of all documents, with the adapter's update times each of the scales."""
    extractor = load(args, adapter)
    measure = measure_of(extractor, args.batch_size)
    found = {}
    for scale in scales:
        scale_layers(extractor.model, scale)
        found[scale] = {name: measure.likelihoods(documents) for name, documents in sets.items()}
    return found


def at_best(by_scale: dict[float, Losses]) -> Losses:
    """For each data set the losses at the scale that is best for the others."""
    names = next(iter(by_scale.values()))
    return {
        name: min(by_scale.values(), key=lambda losses: mean(losses, name))[name] for name in names
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print the table."""
    asked = parser(__doc__, limit=25)
    asked.add_argument("--others", nargs="*", default=[], help="adapters to compare with it")
    asked.add_argument(
        "--scales", type=float, nargs="+", default=[0.4, 0.6, 0.8, 1.0], help="default: %(default)s"
    )
    asked.add_argument("--batch-size", type=int, default=8)
    asked.add_argument(
        "--json", type=Path, help="also write every document's loss and tokens to this file"
    )
    args = asked.parse_args(arguments)
    sets = read_datasets(args.files, split="test", limit=args.limit)
    found = {
        adapter: at_scales(args, adapter, sets, args.scales)
        for adapter in (args.adapter, *args.others)
    }
    table = Table(title=f"{sum(map(len, sets.values()))} documents of {len(sets)} data sets")
    for column in ("adapter", "scale", *sets, "mean", "less the first adapter's"):
        table.add_column(column, justify="right")
    first = found[args.adapter]
    for adapter, by_scale in found.items():
        rows: list[tuple[Any, Losses, Losses]] = [
            (scale, by_scale[scale], first[scale]) for scale in by_scale
        ]
        if len(sets) > 1:
            rows.append(("best", at_best(by_scale), at_best(first)))
        for scale, losses, against in rows:
            table.add_row(adapter, str(scale), *cells(losses), difference(losses, against))
        table.add_section()
    Console(width=180).print(table)
    if args.json:
        args.json.write_text(json.dumps(found) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
