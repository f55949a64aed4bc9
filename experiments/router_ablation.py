"""What a trained router is worth when it is used: likelihoods with parts of it taken away.

    =========  ==============================================================================
    swapped    every text gets the task embedding of a text of another data set
    no task    the router's columns for the task embedding are zero: `softmax(W_x x)`
    no token   those for the hidden state are zero: `softmax(W_e e)`
    uniform    all are zero: every gate is 1 / E
    =========  ==============================================================================

Differences from the whole router, with 95 % intervals (paired bootstrap over documents): above 0,
the part helps. "swapped" asks only whether it matters which task; the others also take from the
experts what they were trained beside.

    python experiments/router_ablation.py --adapter my-adapter --files a.jsonl b.jsonl
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from documents import swapped
from on_adapter import cells, difference, load, parser, routers, scale_layers, show
from outcomes import Losses

from peft_taskmoe.uie import Document, read_datasets


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print the table."""
    asked = parser(__doc__, limit=25)
    asked.add_argument("--scale", type=float, default=1.0, help="times the adapter's update")
    args = asked.parse_args(arguments)
    measure = load(args)
    scale_layers(measure.model, args.scale)
    sets = read_datasets(args.files, split="test", limit=args.limit)

    def likelihoods(task_of: Mapping[tuple[str, str], Document] | None = None) -> Losses:
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
            with without(measure.model, part):
                found[title] = likelihoods()
    rows = [
        [way, *cells(losses), difference(losses, found["whole"])] for way, losses in found.items()
    ]
    documents = sum(map(len, sets.values()))
    title = f"{documents} documents of {len(sets)} data sets, scale {args.scale:g}"
    show(title, ("router", *sets, "mean", "less the whole router's"), rows)


@contextmanager
def without(model: Any, part: str) -> Iterator[None]:
    """The routers' columns of a part ("token", "task" or "all") are zero inside."""
    kept = []
    for _, weight, edge in routers(model).values():
        kept.append((weight, weight.clone()))
        columns = {"token": slice(edge), "task": slice(edge, None), "all": slice(None)}[part]
        weight[:, columns] = 0
    try:
        yield
    finally:
        for weight, before in kept:
            weight.copy_(before)


if __name__ == "__main__":
    main()
