"""Is less of an adapter better on unseen sets? Likelihoods with its update scaled at test time.

An adapter that overfits its training sets gains when its update is multiplied by less than 1 (for
LoRA that is WiSE-FT, https://huggingface.co/papers/2109.01903). So adapters are compared at equal
scales, and each at its best: for a data set, the scale that is best for the others. Differences are
from the first adapter, with 95 % intervals (paired bootstrap over documents).

    python experiments/adapter_scale.py --adapter my-lora --others mine --files a.jsonl b.jsonl
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from measuring import Measure
from on_adapter import cells, difference, load, mean, parser, scale_layers, show
from outcomes import Losses

from peft_taskmoe.uie import Document, read_datasets


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print the table."""
    asked = parser(__doc__, limit=25)
    asked.add_argument("--others", nargs="*", default=[], help="adapters to compare with it")
    asked.add_argument("--scales", type=float, nargs="+", default=[0.4, 0.6, 0.8, 1.0])
    asked.add_argument("--json", type=Path, help="also write every document's loss and tokens here")
    args = asked.parse_args(arguments)
    sets = read_datasets(args.files, split="test", limit=args.limit)
    found = {
        adapter: at_scales(load(args, adapter), sets, args.scales)
        for adapter in (args.adapter, *args.others)
    }
    first, rows = found[args.adapter], []
    for adapter, by_scale in found.items():
        for scale, losses in by_scale.items():
            rows.append([adapter, f"{scale:g}", *cells(losses), difference(losses, first[scale])])
        if len(sets) > 1:
            best = at_best(by_scale)
            rows.append([adapter, "best", *cells(best), difference(best, at_best(first))])
    title = f"{sum(map(len, sets.values()))} documents of {len(sets)} data sets"
    show(title, ("adapter", "scale", *sets, "mean", "less the first adapter's"), rows)
    if args.json:
        args.json.write_text(json.dumps(found) + "\n", encoding="utf-8")


def at_scales(
    measure: Measure, sets: Mapping[str, list[Document]], scales: Iterable[float]
) -> dict[float, Losses]:
    """The losses of all documents, with the adapter's update times each of the scales."""
    found: dict[float, Losses] = {}
    for scale in scales:
        scale_layers(measure.model, scale)
        found[scale] = {name: measure.likelihoods(documents) for name, documents in sets.items()}
    return found


def at_best(by_scale: Mapping[float, Losses]) -> Losses:
    """For each data set the losses at the scale that is best for the others."""
    names = next(iter(by_scale.values()))
    return {
        name: min(by_scale.values(), key=lambda losses, name=name: mean(losses, name))[name]
        for name in names
    }


if __name__ == "__main__":
    main()
