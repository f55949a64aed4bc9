"""The command line: `peft-taskmoe extract | score | convert`.

It knows files, arguments and exit codes; the work is done by `peft_taskmoe.uie`.

Exit codes: 0 everything was done; 1 it was done, but some lines could not be used (each is reported with its number, and
`extract` writes an error line in its place); 2 nothing was done, because of what was asked; 130 interrupted, and `extract`
goes on where it stopped when the same command is given again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from .uie.extractor import Extractor, Question
    from .uie.jobs import Item

DONE, SOME_LINES_BAD, NOTHING_DONE, INTERRUPTED = 0, 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: As on the command line; None takes those of the process.

    Returns:
        The exit code; see the top of this file.
    """
    args = _parser().parse_args(arguments)
    try:
        from rich.console import Console
    except ImportError:
        print(
            "The command line needs more packages: pip install 'peft_taskmoe[uie]'", file=sys.stderr
        )
        return NOTHING_DONE
    console = Console(stderr=True)
    try:
        code: int = args.run(args, console)
    except (ValueError, OSError, ImportError) as error:
        _say(console, f"Error: {error}", "bold red")
        return NOTHING_DONE
    except KeyboardInterrupt:
        _say(console, "Interrupted. The same command goes on from here.")
        return INTERRUPTED
    return code


def _parser() -> argparse.ArgumentParser:
    codes = "Exit codes: 0 done; 1 done, but some lines could not be used; 2 nothing done; 130 interrupted."
    parser = argparse.ArgumentParser(
        prog="peft-taskmoe", description="Information extraction from files.", epilog=codes
    )
    commands = parser.add_subparsers(required=True, metavar="command")

    extract = commands.add_parser("extract", help="extract records from texts", epilog=codes)
    extract.add_argument("--adapter", required=True, help="folder or Hub id of the adapter")
    extract.add_argument(
        "--base-model",
        help="folder or Hub id of the base model (default: the one that the adapter names)",
    )
    extract.add_argument(
        "--schema",
        type=Path,
        help="JSON file with the schema; without it, every line needs its own",
    )
    extract.add_argument(
        "--input", type=Path, required=True, help='JSONL: {"text": ...} or a string on each line'
    )
    extract.add_argument(
        "--output",
        type=Path,
        required=True,
        help="JSONL: a line for each line; continued if it is there",
    )
    extract.add_argument(
        "--overwrite", action="store_true", help="start anew if the output is there"
    )
    extract.add_argument("--threshold", type=float, help="leave out records of lower confidence")
    extract.add_argument(
        "--batch-size", type=int, default=8, help="prompts per generation (default: %(default)s)"
    )
    extract.add_argument(
        "--max-new-tokens", type=int, default=256, help="the longest answer (default: %(default)s)"
    )
    extract.add_argument(
        "--max-prompt-tokens",
        type=int,
        help="longer texts are read in windows (default: the model's context)",
    )
    extract.add_argument(
        "--device", help="where the model runs, such as cuda (default: where it is loaded)"
    )
    extract.add_argument(
        "--dtype", help="precision of the base model, such as bfloat16 (default: as it is stored)"
    )
    extract.add_argument(
        "--constrained", action="store_true", help="let the model write only what can be read"
    )
    extract.add_argument(
        "--prefix-caching",
        action="store_true",
        help="read the schema that the texts of a batch share once; not where the encoder reads whole prompts",
    )
    extract.set_defaults(run=_extract)

    score = commands.add_parser("score", help="score records against gold documents", epilog=codes)
    score.add_argument(
        "--gold",
        type=Path,
        nargs="+",
        required=True,
        help="JSONL files of documents, one for each data set",
    )
    score.add_argument(
        "--predicted",
        type=Path,
        nargs="+",
        required=True,
        help="what `extract` wrote, in the same order",
    )
    score.add_argument(
        "--match",
        choices=("text", "offsets"),
        default="text",
        help="what makes mentions equal (default: text)",
    )
    score.add_argument(
        "--seen", type=Path, help="JSON table of seen labels (default: the one of the package)"
    )
    score.add_argument(
        "--labels", action="store_true", help="a row for each label and argument role"
    )
    score.add_argument(
        "--identification",
        action="store_true",
        help="compare mentions without their labels and roles: what was found, whatever it was called",
    )
    score.add_argument("--intervals", action="store_true", help="bootstrap intervals of 95 %%")
    score.add_argument(
        "--reliability",
        nargs="?",
        const="width",
        choices=("width", "count"),
        help="also the precision of records by their confidence, in ten bins of equal width or count (default: width)",
    )
    score.add_argument("--reliability-plot", type=Path, help="draw it to this file (.png, .svg)")
    score.add_argument("--json", type=Path, help="also write all figures to this file")
    score.set_defaults(run=_score)

    convert = commands.add_parser(
        "convert", help="turn data sets into JSONL documents", epilog=codes
    )
    convert.add_argument(
        "--source-format", required=True, choices=("jsonl", "conll", "brat", "iepile")
    )
    convert.add_argument("--task", choices=("NER", "RE", "EE"), help="what to read from BRAT")
    convert.add_argument(
        "--scheme", choices=("IOB1", "IOB2", "BIOES"), help="tags of a CoNLL file (default: IOB2)"
    )
    convert.add_argument(
        "--schema", type=Path, help="JSON file with labels and descriptions, for CoNLL and BRAT"
    )
    convert.add_argument(
        "--keep-going", action="store_true", help="leave out what cannot be read, and report it"
    )
    convert.add_argument("source", type=Path)
    convert.add_argument("target", type=Path)
    convert.set_defaults(run=_convert)
    return parser


# --- extract -------------------------------------------------------------------------------------------------------


def _extract(args: argparse.Namespace, console: Console) -> int:
    from .uie.jobs import checksum, lines_done, write_lines
    from .uie.schema import Schema

    schema = Schema.from_json(args.schema) if args.schema else None
    if not args.input.is_file():
        raise ValueError(f"There is no file `{args.input}` to read.")
    settings = [args.adapter, schema and schema.fingerprint(), args.threshold, args.max_new_tokens]
    run = checksum([*settings, args.dtype, args.max_prompt_tokens, args.constrained])
    if args.overwrite:
        args.output.unlink(missing_ok=True)
    done = lines_done(args.output, map(checksum, _lines(args.input)), run)
    total = sum(1 for _ in _lines(args.input))
    if done:
        _say(console, f"{done} of {total} lines are done already.")
    if done < total:
        write_lines(
            _load(args),
            _items(islice(enumerate(_lines(args.input), 1), done, None), schema),
            args.output,
            run,
            thresholds=args.threshold,
            total=total - done,
        )
    return _finish(args, console)


def _finish(args: argparse.Namespace, console: Console) -> int:
    """Report the error lines of the output, those of earlier runs included."""
    bad = 0
    for number, line in enumerate(_lines(args.output), 1):
        row = json.loads(line)
        if "error" in row:
            bad += 1
            _say(console, f"{args.input}:{number}: {row['error']}", "red")
    _say(console, f"Wrote {args.output}." + (f" {bad} lines could not be used." if bad else ""))
    return SOME_LINES_BAD if bad else DONE


def _load(args: argparse.Namespace) -> Extractor:
    from .uie.extractor import Extractor

    return Extractor.from_pretrained(
        args.adapter,
        base_model=args.base_model,
        model_kwargs={
            key: value
            for key, value in (("dtype", args.dtype), ("device_map", args.device))
            if value
        },
        batch_size=args.batch_size,
        max_new_tokens=args.max_new_tokens,
        max_prompt_tokens=args.max_prompt_tokens,
        constrained=args.constrained,
        prefix_caching=args.prefix_caching,
    )


def _items(rows: Iterable[tuple[int, bytes]], schema: Any) -> Iterator[Item]:
    """What is asked by each line."""
    from .uie.jobs import Item, checksum

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
    from .uie.extractor import Question, question_of
    from .uie.records import Document

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
            "An EAE line needs the events whose arguments are asked for, with type and trigger, in `annotations`."
        )
    return name, question_of(document)


# --- score and convert ---------------------------------------------------------------------------------------------


def _score(args: argparse.Namespace, console: Console) -> int:
    from rich.console import Console

    from .uie.data import read_jsonl
    from .uie.reliability import reliability
    from .uie.score import SeenLabels, score

    if len(args.gold) != len(args.predicted):
        raise ValueError(
            f"There are {len(args.gold)} gold files and {len(args.predicted)} predicted ones. Pass one for each."
        )
    gold, answers = {}, {}
    bad = 0
    for path, predicted in zip(args.gold, args.predicted, strict=True):
        name = (
            path.parent.name
            if path.stem in ("train", "test", "dev", "validation") and path.parent.name
            else path.stem
        )
        if name in gold:
            raise ValueError(f"Two gold files are called `{name}`. Give them names of their own.")
        gold[name] = read_jsonl(path).documents
        answers[name], errors = _read_predicted(predicted)
        bad += len(errors)
        for number, message in errors:
            _say(console, f"{predicted}:{number}: {message}", "red")
    report = score(
        gold,
        answers,
        match=args.match,
        seen=SeenLabels.load(args.seen) if args.seen else None,
        identification=args.identification,
    )
    if args.intervals:
        report = report.with_intervals()
    curve = None
    if args.reliability or args.reliability_plot:
        curve = reliability(
            gold,
            answers,
            match=args.match,
            binning=args.reliability or "width",
            n_resamples=2000 if args.intervals else 0,
        )
    if sys.stdout.isatty():
        Console().print(report.table(labels=args.labels), *([curve.table()] if curve else ()))
    else:
        print(
            report.to_markdown(labels=args.labels),
            *([curve.to_markdown()] if curve else ()),
            sep="\n",
        )
    if curve and curve.without:
        _say(
            console,
            f"{curve.without} records have no confidence, or say nothing that it could be about.",
        )
    if curve and args.reliability_plot:
        curve.plot(args.reliability_plot)
        _say(console, f"Wrote {args.reliability_plot}.")
    if args.json:
        figures = report.to_dict(documents=True) | (
            {"reliability": curve.to_dict()} if curve else {}
        )
        args.json.write_text(
            json.dumps(figures, ensure_ascii=False, indent=1, allow_nan=False) + "\n",
            encoding="utf-8",
        )
    return SOME_LINES_BAD if bad else DONE


class _Answer:
    """Records and problems of a line."""

    def __init__(self, row: Mapping[str, Any]) -> None:
        from .uie.records import Problem, record_from_dict

        found = row["records"] if "records" in row else row["annotations"]
        self.records = tuple(record_from_dict("UIE", record) for record in found)
        self.problems = tuple(Problem(**problem) for problem in row.get("problems", ()))


def _read_predicted(path: Path) -> tuple[dict[str, _Answer], list[tuple[int, str]]]:
    """The answers of a file by their ids, and what is wrong with its lines; a document without an answer is unanswered."""
    from .uie.jobs import json_object

    answers: dict[str, _Answer] = {}
    errors = []
    for number, line in enumerate(_lines(path), 1):
        row = json_object(line)
        if row is None or "id" not in row:
            errors.append((number, "The line is no JSON object with an `id`."))
        elif "error" in row:
            errors.append((number, f"Nothing was extracted: {row['error']}"))
        elif str(row["id"]) in answers:
            errors.append(
                (number, f"The id `{row['id']}` has an answer already; this one is left out.")
            )
        else:
            try:
                answers[str(row["id"])] = _Answer(row)
            except (ValueError, TypeError, KeyError) as error:
                errors.append(
                    (number, f"The line holds no records: {type(error).__name__}: {error}")
                )
    return answers, errors


def _convert(args: argparse.Namespace, console: Console) -> int:
    from .uie.data import convert

    options: dict[str, Any] = {"on_error": "collect" if args.keep_going else "raise"}
    allowed = {"conll": ("scheme", "schema"), "brat": ("task", "schema")}.get(
        args.source_format, ()
    )
    for name in ("task", "scheme", "schema"):
        value = getattr(args, name)
        if value is not None and name not in allowed:
            raise ValueError(
                f"--{name} says nothing about the format `{args.source_format}`. Leave it out."
            )
        if value is not None:
            options[name] = (
                json.loads(value.read_text(encoding="utf-8")) if name == "schema" else value
            )
    if args.source_format == "brat" and args.task is None:
        raise ValueError("BRAT files hold several tasks. Pass --task NER, RE or EE.")
    report = convert(args.source, args.target, args.source_format, **options)
    for problem in report.problems:
        _say(console, str(problem), "red" if problem.severity == "error" else "dim")
    _say(console, f"Wrote {args.target}: {report}.")
    return SOME_LINES_BAD if report.errors else DONE


# --- messages and files ---------------------------------------------------------------------------------------------------------


def _say(console: Console, words: str, style: str = "") -> None:
    console.print(words, style=style, markup=False, highlight=False, soft_wrap=True)


def _lines(path: Path) -> Iterator[bytes]:
    """The lines of a file, as bytes without their ends."""
    with path.open("rb") as file:
        for number, line in enumerate(file):
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 0 else line
            yield line.removesuffix(b"\n").removesuffix(b"\r")


if __name__ == "__main__":
    sys.exit(main())
