"""Shows what it saves that finished answers leave their batch before the longest one ends.

With a trained adapter, since the lengths of real answers count. Every batch is answered both ways
in an alternating order; the ratio is the median over batches.

    python benchmarks/finished_rows.py --adapter outputs/demo --files a.jsonl b.jsonl
"""

from __future__ import annotations

from collections.abc import Sequence

from answering import load, parser, time_ratio
from rich.console import Console
from rich.table import Table

from peft_taskmoe.uie import Extractor, read_datasets
from peft_taskmoe.uie.extraction.generation import Generator


class Waiting(Generator):
    """Generates batches that last as long as their longest answers."""

    def _rows_may_leave(self, rows: int) -> bool:
        return False


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print the table."""
    asked = parser(__doc__, limit=48)
    asked.add_argument("--batch-size", type=int, default=16)
    asked.add_argument("--max-new-tokens", type=int, default=256)
    args = asked.parse_args(arguments)
    options = {"batch_size": args.batch_size, "max_new_tokens": args.max_new_tokens}
    leaving = load(args, **options)
    waiting = Extractor(leaving.model, leaving.tokenizer, format=leaving.format, **options)
    waiting.generator = Waiting(waiting.model, waiting.tokenizer, waiting.generator.ends)
    how = f"batches of {args.batch_size}, {args.threads} threads"
    table = Table(title=f"Time with rows that leave / without, {how}")
    for column in ("data set", "median", "lowest", "highest", "answers that differ"):
        table.add_column(column)
    for name, documents in read_datasets(args.files, split="test", limit=args.limit).items():
        documents = sorted(documents, key=lambda document: len(document.text))
        table.add_row(name, *time_ratio(waiting, leaving, documents))
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
