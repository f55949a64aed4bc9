"""`peft-taskmoe report`: what an adapter does on gold documents, as one HTML file."""

from __future__ import annotations

import argparse
from pathlib import Path

from .files import check_output, gold_documents
from .messages import Exit, say
from .model_options import add_model_options, count, load


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add those of the command."""
    add = parser.add_argument
    add("--adapter", required=True, help="folder or Hub id of the adapter")
    documents = "JSONL documents, one file for each data set"
    add("--gold", type=Path, nargs="+", required=True, help=documents)
    add("--output", type=Path, required=True, help="the page, such as report.html")
    add("--max-documents", type=count, help="only the first of each data set")
    add_model_options(parser)


def run(args: argparse.Namespace) -> Exit:
    """Extract from the documents, score, look at the routing, and write the page."""
    from ..uie.data.conversion import dataset_name
    from ..uie.extraction.loading import load_centroids
    from ..uie.extraction.report import write_report

    check_output(args.output, *args.gold)
    documents = {}
    for path in args.gold:
        if (name := dataset_name(path)) in documents:
            raise ValueError(f"Two gold files are called `{name}`. Give them names of their own.")
        documents[name] = gold_documents(path)[: args.max_documents]
    extractor, centroids = load(args, args.adapter), load_centroids(args.adapter)
    name = Path(args.adapter).name
    write_report(args.output, extractor, documents, name=name, centroids=centroids)
    say(f"Wrote {args.output}.")
    return Exit.DONE
