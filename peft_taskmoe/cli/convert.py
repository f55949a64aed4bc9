"""`peft-taskmoe convert`: data sets as JSONL documents."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from .files import check_output
from .messages import Exit, say

_OPTIONS = {"conll": ("scheme", "schema"), "brat": ("task", "schema")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add those of the command."""
    add = parser.add_argument
    formats = ("jsonl", "conll", "brat", "iepile")
    add("--source-format", required=True, choices=formats)
    add("--task", choices=("NER", "RE", "EE"), help="what to read from BRAT")
    schemes = ("IOB1", "IOB2", "BIOES")
    add("--scheme", choices=schemes, help="tags of a CoNLL file (default: IOB2)")
    add("--schema", type=Path, help="JSON file with labels and descriptions, for CoNLL and BRAT")
    add("--keep-going", action="store_true", help="leave out and report what cannot be read")
    add("source", type=Path)
    add("target", type=Path)


def run(args: argparse.Namespace) -> Exit:
    """Convert, and report what could not be read."""
    from ..uie import convert

    check_output(args.target, args.source, args.schema)
    options: dict[str, Any] = {"on_error": "collect" if args.keep_going else "raise"}
    for name in ("task", "scheme", "schema"):
        value = getattr(args, name)
        if value is not None and name not in _OPTIONS.get(args.source_format, ()):
            raise ValueError(
                f"--{name} says nothing about the format `{args.source_format}`. Leave it out."
            )
        if value is not None:
            options[name] = json.loads(value.read_text("utf-8")) if name == "schema" else value
    if args.source_format == "brat" and args.task is None:
        raise ValueError("BRAT files hold several tasks. Pass --task NER, RE or EE.")
    report = convert(args.source, args.target, args.source_format, **options)
    for problem in report.problems:
        say(str(problem))
    say(f"Wrote {args.target}: {report}.")
    return Exit.SOME_LINES_BAD if report.errors else Exit.DONE
