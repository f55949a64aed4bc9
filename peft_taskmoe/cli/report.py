"""`peft-taskmoe report`: what an adapter does on gold documents, as one HTML file."""

from __future__ import annotations

import argparse
from pathlib import Path

from .files import check_output
from .messages import Exit, say
from .score import dataset_name


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add those of the command."""
    add = parser.add_argument
    add("--adapter", required=True, help="folder or Hub id of the adapter")
    documents = "JSONL documents, one file for each data set"
    add("--gold", type=Path, nargs="+", required=True, help=documents)
    add("--output", type=Path, required=True, help="the page, such as report.html")
    add("--base-model", help="folder or Hub id (default: the one that the adapter names)")
    add("--max-documents", type=int, help="only the first of each data set")
    add("--batch-size", type=int, default=8, help="prompts per generation (default: %(default)s)")
    longest = "the longest answer (default: %(default)s)"
    add("--max-new-tokens", type=int, default=256, help=longest)
    add("--device", help="such as cpu or cuda:1 (default: the accelerator that is there)")


def run(args: argparse.Namespace) -> Exit:
    """Extract from the documents, score, look at the routing, and write the page."""
    from ..uie import Extractor, read_jsonl
    from ..uie.extraction.loading import load_centroids
    from ..uie.extraction.report import write_report

    check_output(args.output, *args.gold)
    documents = {}
    for path in args.gold:
        if (name := dataset_name(path)) in documents:
            raise ValueError(f"Two gold files are called `{name}`. Give them names of their own.")
        documents[name] = read_jsonl(path).documents[: args.max_documents]
    extractor = Extractor.from_pretrained(
        args.adapter,
        base_model=args.base_model,
        device=args.device,
        batch_size=args.batch_size,
        max_new_tokens=args.max_new_tokens,
    )
    name = Path(args.adapter).name
    write_report(
        args.output, extractor, documents, name=name, centroids=load_centroids(args.adapter)
    )
    say(f"Wrote {args.output}.")
    return Exit.DONE
