"""What it saves that answers which are done leave their batch, instead of waiting for the longest one.

With a trained adapter, for it is the lengths of real answers that count. Every batch is answered both ways, one behind the other,
in an order that alternates; the ratio is the median over batches.

    python benchmarks/finished_rows.py --adapter outputs/demo --files data/crossner_ai/test.jsonl data/conll04/test.jsonl
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from prefix_caching import measure
from rich.console import Console
from rich.table import Table

from peft_taskmoe.uie import Extractor, read_datasets


class Waiting(Extractor):
    """An extractor whose batches last as long as their longest answers."""

    def _rows_may_leave(self, jobs: Any) -> bool:
        return False


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--adapter", required=True, help="folder or Hub id")
    parser.add_argument("--base", help="base model (default: the one that the adapter names)")
    parser.add_argument("--files", nargs="+", required=True, help="JSONL documents, or Hub data sets")
    parser.add_argument("--limit", type=int, default=48, help="documents of each file (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    options = {"batch_size": args.batch_size, "max_new_tokens": args.max_new_tokens}
    leaving = Extractor.from_pretrained(args.adapter, base_model=args.base, **options)
    leaving.model.to(args.device)
    waiting = Waiting(leaving.model, leaving.tokenizer, format=leaving.format, **options)
    table = Table(
        title=f"Time with rows that leave / without, batches of {args.batch_size}, {args.threads} threads"
    )
    for column in ("data set", "median", "lowest", "highest", "answers that differ"):
        table.add_column(column)
    for name, documents in read_datasets(args.files, split="test", limit=args.limit).items():
        documents = sorted(documents, key=lambda document: len(document.text))
        for extractor in (leaving, waiting):
            extractor.documents(documents[:1], progress=False)
        ratios, different = measure({True: leaving, False: waiting}, documents)
        figures = (statistics.median(ratios), min(ratios), max(ratios))
        table.add_row(name, *(f"{one:.2f}" for one in figures), f"{different} of {len(documents)}")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
