"""`peft-taskmoe extract`: a line of records for each line of texts, continued where it stopped."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .files import check_output, lines
from .messages import Exit, say

if TYPE_CHECKING:
    from ..uie import Extractor, Schema
    from ..uie.extraction.jobs import Item
    from ..uie.extraction.questions import Question


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add those of the command."""
    add = parser.add_argument
    add("--adapter", required=True, help="folder or Hub id of the adapter")
    base = "folder or Hub id of the base model (default: the one that the adapter names)"
    add("--base-model", help=base)
    add("--schema", type=Path, help="JSON file; without it, every line needs its own")
    texts = 'JSONL: {"text": ...} or a string on each line'
    add("--input", type=Path, required=True, help=texts)
    output = "JSONL: a line for each line; continued if it is there"
    add("--output", type=Path, required=True, help=output)
    add("--overwrite", action="store_true", help="start anew if the output is there")
    add("--threshold", type=float, help="leave out records of lower confidence")
    add("--batch-size", type=int, default=8, help="prompts per generation (default: %(default)s)")
    longest = "the longest answer (default: %(default)s)"
    add("--max-new-tokens", type=int, default=256, help=longest)
    windows = "longer texts are read in windows (default: the model's context)"
    add("--max-prompt-tokens", type=int, help=windows)
    add("--device", help="where the model runs, such as cuda (default: where it is loaded)")
    add("--dtype", help="precision of the base model, such as bfloat16 (default: as it is stored)")
    grammar = "constrain decoding to the schema's grammar"
    add("--constrained", action="store_true", help=grammar)
    once = "read what prompts share once; not where the encoder reads whole prompts"
    add("--prefix-caching", action="store_true", help=once)


def run(args: argparse.Namespace) -> Exit:
    """Extract what is not done yet, and report all error lines of the output."""
    from ..uie import Schema
    from ..uie.extraction.jobs import write_lines

    if not args.input.is_file():
        raise ValueError(f"There is no file `{args.input}` to read.")
    check_output(args.output, args.input, args.schema)
    schema = Schema.from_json(args.schema) if args.schema else None
    extractor = _load(args)
    asked = extractor.check(schema, args.threshold) if schema else ()
    total = sum(1 for _ in lines(args.input))
    written = write_lines(
        extractor,
        _items(enumerate(lines(args.input), 1), schema),
        args.output,
        extractor.fingerprint(asked, args.threshold),
        thresholds=args.threshold,
        total=total,
        overwrite=args.overwrite,
    )
    if written < total:
        say(f"{total - written} of {total} lines were done already.")
    return _finish(args)


def _finish(args: argparse.Namespace) -> Exit:
    """Report the error lines of the output, those of earlier runs included."""
    bad = 0
    for number, line in enumerate(lines(args.output), 1):
        row = json.loads(line)
        if "error" in row:
            bad += 1
            say(f"{args.input}:{number}: {row['error']}")
    say(f"Wrote {args.output}." + (f" {bad} lines could not be used." if bad else ""))
    return Exit.SOME_LINES_BAD if bad else Exit.DONE


def _load(args: argparse.Namespace) -> Extractor:
    from ..uie import Extractor

    model_kwargs = {"dtype": args.dtype, "device_map": args.device}
    return Extractor.from_pretrained(
        args.adapter,
        base_model=args.base_model,
        model_kwargs={key: value for key, value in model_kwargs.items() if value},
        batch_size=args.batch_size,
        max_new_tokens=args.max_new_tokens,
        max_prompt_tokens=args.max_prompt_tokens,
        constrained=args.constrained,
        prefix_caching=args.prefix_caching,
    )


def _items(rows: Iterable[tuple[int, bytes]], schema: Schema | None) -> Iterator[Item]:
    """What is asked by each line."""
    from ..uie.extraction.jobs import Item, checksum

    for number, line in rows:
        try:
            name, question = _question(line, schema, number)
        except ValueError as error:
            yield Item(str(number), checksum(line), error=str(error))
        else:
            yield Item(name, checksum(line), [question])


def _question(line: bytes, schema: Any, number: int) -> tuple[str, Question]:
    """The id and the question of an input line.

    Raises:
        ValueError: There is none in it.
    """
    from ..uie import Document
    from ..uie.extraction.questions import Question, question_of

    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f'The line is no JSON ({error}). Write {{"text": ...}}.') from error
    row = {"text": row} if isinstance(row, str) else row
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise ValueError('The line has no text. Write {"text": ...}, with an "id" if you like.')
    name = str(row.get("id", number))
    if schema is not None:
        return name, Question(row["text"], schema)
    if "schema" not in row:
        raise ValueError('The line has no "schema", and no --schema was given. Pass --schema FILE.')
    document = Document.from_dict({"task": "UIE", **row, "id": name})
    if document.task == "EAE" and not document.given:
        raise ValueError(
            "An EAE line needs the events whose arguments are asked for, with type and trigger, in "
            "`annotations`."
        )
    return name, question_of(document)
