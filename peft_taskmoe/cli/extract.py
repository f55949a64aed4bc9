"""`peft-taskmoe extract`: a line of records for each line of texts, continued where it stopped."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .files import check_output, lines
from .inputs import items_of
from .messages import Exit, StoppedError, say
from .model_options import add_model_options, load, probability
from .parquet import is_parquet, read_finished, write_parquet
from .shares import Processes, parts_of, plan_shares


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add those of the command."""
    add = parser.add_argument
    add("--adapter", required=True, help="folder or Hub id of the adapter")
    add("--schema", type=Path, help="JSON file; without it, every line needs its own")
    texts = 'JSONL, {"text": ...} or a string on each line; or .txt, a text a line'
    add("--input", type=Path, required=True, help=texts)
    output = ".jsonl, a line for each line, continued if it is there; or .parquet"
    add("--output", type=Path, required=True, help=output)
    anew = "start anew; the old output is kept until there is a new line"
    add("--overwrite", action="store_true", help=anew)
    add("--threshold", type=probability, help="leave out records of lower confidence")
    add_model_options(parser)


def run(args: argparse.Namespace) -> Exit:
    """Extract what is not done yet, and report all error lines of the output."""
    from ..uie import Schema
    from ..uie.extraction.jobs import checksum, write_lines

    if not args.input.is_file():
        raise ValueError(f"There is no file `{args.input}` to read.")
    check_output(args.output, args.input, args.schema)
    if (ending := args.output.suffix) in (".csv", ".tsv", ".xlsx", ".json"):
        raise ValueError(f"`{args.output}` would be no {ending}. Write .jsonl or .parquet.")
    written = args.output
    if is_parquet(args.output):  # a file beside it, which becomes the output
        written = args.output.with_name(f"{args.output.name}.jsonl")
        check_output(written, args.input, args.schema)
    schema = Schema.from_json(args.schema) if args.schema else None
    sources = [checksum(line) for line in lines(args.input)]
    processes = Processes.of_environment()
    extractor = load(args, args.adapter, processes.local_rank)
    job = extractor.fingerprint(
        [] if schema is None else extractor.check(schema, args.threshold), args.threshold
    )
    if is_parquet(args.output) and args.output.exists() and not args.overwrite:
        return _end(args, _report(args, read_finished(args.output, sources, job)))

    def write(path: Path, first: int, last: int, *, progress: bool | None = None) -> int:
        items = items_of(args.input, schema, first, last)
        return write_lines(
            extractor,
            items,
            path,
            job,
            thresholds=args.threshold,
            progress=progress,
            total=last - first,
            overwrite=args.overwrite and path == written,
        )

    before = _state(written)
    try:
        shares = plan_shares(written, job, sources, args.overwrite, processes)
        if shares is None and processes.rank == 0:
            done = len(sources) - write(written, 0, len(sources))
            if done:
                say(f"{done} of {len(sources)} lines were done already.")
        elif shares is None or not shares.write(write, processes):
            return Exit.DONE  # another process puts the parts together
        bad = _report(args, map(json.loads, lines(written)))
        if is_parquet(args.output):
            write_parquet(written, args.output)
    except Exception as error:
        if _state(written) == before:
            raise
        raise StoppedError(f"{type(error).__name__}: {error}") from error
    return _end(args, bad)


def _state(path: Path) -> list[tuple[Path, int, int]]:
    """What differs once a line was written: the files, and their numbers of whole lines."""
    files = [file for file in [path, *parts_of(path)] if file.is_file()]
    return [(f, f.stat().st_ino, f.read_bytes().count(b"\n")) for f in files]


def _report(args: argparse.Namespace, rows: Iterable[dict[str, Any]]) -> int:
    """Report the error lines of the output, those of earlier runs included, and count them."""
    bad = 0
    for number, row in enumerate(rows, 1):
        if "error" in row:
            bad += 1
            say(f"{args.input}:{number}: {row['error']}")
    return bad


def _end(args: argparse.Namespace, bad: int) -> Exit:
    """Say that the output is written, and how many of its lines are error lines."""
    say(f"Wrote {args.output}." + (f" {bad} lines could not be used." if bad else ""))
    return Exit.SOME_LINES_BAD if bad else Exit.DONE
