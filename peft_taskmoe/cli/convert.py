"""`peft-taskmoe convert`: data sets as JSONL documents."""

from __future__ import annotations

import argparse
import inspect
from pathlib import Path
from typing import Any

from .files import check_output
from .messages import Exit, say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add those of the command; what is not said is the reader's default."""
    add = parser.add_argument
    formats = "jsonl, conll, brat, iepile, label-studio, doccano, spacy or text"
    add("--source-format", required=True, help=formats)
    add("--keep-going", action="store_true", help="leave out and report what cannot be read")
    add("--schema", type=Path, help="JSON file with labels and descriptions")
    add("--task", choices=("NER", "RE", "EE", "UIE"), help="what to read (default: UIE, all)")
    schemes = ("IOB1", "IOB2", "BIOES")
    add("--scheme", choices=schemes, help="CoNLL: the tags (default: IOB2)")
    column = "CoNLL: column of the %s, from 0 or, negative, from the end (default: the %s)"
    add("--token-column", type=int, help=column % ("token", "first"))
    add("--tag-column", type=int, help=column % ("tag", "last"))
    columns = r"CoNLL: what stands between columns, \t for a tab (default: tabs, or else blanks)"
    add("--separator", type=lambda text: text.replace(r"\t", "\t"), help=columns)
    add("--comment", help="CoNLL: what a line that is skipped starts with")
    add("--unit", choices=("sentence", "document"), help="CoNLL: what becomes a document")
    joined = "CoNLL: join tokens as people write, not by blanks"
    add("--detokenize", action="store_true", default=None, help=joined)
    add("source", type=Path)
    add("target", type=Path)


def run(args: argparse.Namespace) -> Exit:
    """Convert, and report what could not be read."""
    from ..uie import ReadError, convert

    inside = args.source.rglob("*") if args.source.is_dir() else [args.source]
    check_output(args.target, args.schema, *inside)
    options = _options(args)
    try:
        report = convert(args.source, args.target, args.source_format, **options)
    except ReadError as error:
        advice = "Pass --keep-going to leave out and report what cannot be read."
        raise ValueError(f"{error.problem}\n{advice}") from error
    for problem in report.problems:
        say(str(problem))
    say(f"Wrote {args.target}: {report}.")
    return Exit.SOME_LINES_BAD if report.errors else Exit.DONE


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of the reader.

    Raises:
        ValueError: The reader has no such argument, needs a schema and has none, or the schema is
            no JSON object.
    """
    from ..uie.data.conversion import READERS
    from ..uie.strict_json import parse_json

    if args.source_format not in READERS:
        known = ", ".join(READERS)
        raise ValueError(f"--source-format is {args.source_format!r}. Choose one of {known}.")
    other = {"command", "run", "source", "target", "source_format", "keep_going"}
    options = {k: v for k, v in vars(args).items() if k not in other and v is not None}
    taken = inspect.signature(READERS[args.source_format]).parameters
    for name in options.keys() - taken.keys():
        raise ValueError(
            f"--{name.replace('_', '-')} says nothing about the format `{args.source_format}`. "
            "Leave it out."
        )
    if args.source_format == "text" and args.schema is None:
        raise ValueError("A text file has no labels. Pass --schema FILE.")
    if args.schema is not None:
        try:
            options["schema"] = parse_json(args.schema.read_text("utf-8-sig"))
        except ValueError as error:
            raise ValueError(f"`{args.schema}` holds no schema: {error}") from error
        if not isinstance(options["schema"], dict):
            raise ValueError(f"`{args.schema}` holds no schema. Write {{label: description}}.")
    return options | {"on_error": "collect" if args.keep_going else "raise"}
