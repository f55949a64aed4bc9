"""`peft-taskmoe score`: F1 of extracted records against gold documents."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..optional import needed
from .files import check_output, gold_documents, lines
from .messages import Exit, say, show
from .parquet import is_parquet, read_parquet

if TYPE_CHECKING:
    from ..uie import Document, Problem, Record, Reliability, ScoreReport


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add those of the command."""
    add = parser.add_argument
    documents = "JSONL files of documents, one for each data set"
    add("--gold", type=Path, nargs="+", required=True, help=documents)
    written = "what `extract` wrote, in the same order"
    add("--predicted", type=Path, nargs="+", required=True, help=written)
    matches = ("text", "offsets")
    add("--match", choices=matches, default="text", help="what makes mentions equal")
    add("--seen", type=Path, help="JSON table of seen labels (default: the one of the package)")
    add("--labels", action="store_true", help="a row for each label and argument role")
    without = "compare mentions without their labels and roles"
    add("--identification", action="store_true", help=without)
    add("--intervals", action="store_true", help="bootstrap intervals of 95 %%")
    bins = "precision of records by confidence, in ten bins of equal width (the default) or count"
    add("--reliability", nargs="?", const="width", choices=("width", "count"), help=bins)
    add("--reliability-plot", type=Path, help="draw it to this file (.png, .svg)")
    add("--json", type=Path, help="also write all figures to this file")


def run(args: argparse.Namespace) -> Exit:
    """Score, print the tables, write the files that were asked for."""
    from ..uie import SeenLabels, reliability, score

    for path in (args.json, args.reliability_plot):
        if path is not None:
            check_output(path, *args.gold, *args.predicted, args.seen)
    gold, answers, bad = _read(args.gold, args.predicted)
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
    _write(args, report, curve)
    _print(args, report, curve)
    return Exit.SOME_LINES_BAD if bad else Exit.DONE


def _write(args: argparse.Namespace, report: ScoreReport, curve: Reliability | None) -> None:
    from ..uie.tables import json_text

    if args.json:
        figures = report.to_dict(documents=True)
        figures |= {"reliability": curve.to_dict()} if curve else {}
        args.json.write_bytes(json_text(figures).encode() + b"\n")
    if args.reliability_plot and curve:
        curve.plot(args.reliability_plot)
        say(f"Wrote {args.reliability_plot}.")


def _print(args: argparse.Namespace, report: ScoreReport, curve: Reliability | None) -> None:
    if curve and curve.without:
        say(f"{curve.without} of the records have no confidence, or none that is about something.")
    if not sys.stdout.isatty():
        curves = [curve.to_markdown()] if curve else []
        show("\n".join([report.to_markdown(labels=args.labels), *curves]))
        return
    needed("rich.console", "uie").Console().print(
        report.table(labels=args.labels), *([curve.table()] if curve else ())
    )


def _read(
    gold_files: Sequence[Path], predicted_files: Sequence[Path]
) -> tuple[dict[str, list[Document]], dict[str, dict[str, _Answer]], int]:
    """Gold documents and answers by data set, and the number of lines that could not be used."""
    from ..uie.data.conversion import dataset_name

    if len(gold_files) != len(predicted_files):
        raise ValueError(
            f"There are {len(gold_files)} gold files and {len(predicted_files)} predicted ones. "
            "Pass one for each."
        )
    gold: dict[str, list[Document]] = {}
    answers: dict[str, dict[str, _Answer]] = {}
    bad = 0
    for path, predicted in zip(gold_files, predicted_files, strict=True):
        name = dataset_name(path)
        if name in gold:
            raise ValueError(f"Two gold files are called `{name}`. Give them names of their own.")
        gold[name] = gold_documents(path)
        answers[name], errors = _read_predicted(predicted)
        bad += len(errors)
        for number, message in errors:
            say(f"{predicted}:{number}: {message}")
    return gold, answers, bad


@dataclass(frozen=True, slots=True)
class _Answer:
    """Records and problems of a line."""

    records: tuple[Record, ...]
    problems: tuple[Problem, ...]

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> _Answer:
        """Read a row, and refuse records that cannot be scored."""
        from ..uie import Problem, record_from_dict
        from ..uie.scoring.matching import record_fault

        found = row["records"] if "records" in row else row["annotations"]
        records = tuple(record_from_dict("UIE", record) for record in found)
        for record in records:
            if (fault := record_fault(record)) is not None:
                raise ValueError(f"a record has {fault}")
        return cls(records, tuple(Problem(**problem) for problem in row.get("problems", ())))


def _rows(path: Path) -> Iterator[dict[str, Any] | None]:
    """The objects of a JSONL or Parquet file; None for a line that is none."""
    from ..uie.extraction.jobs import json_object

    yield from read_parquet(path) if is_parquet(path) else map(json_object, lines(path))


def _read_predicted(path: Path) -> tuple[dict[str, _Answer], list[tuple[int, str]]]:
    """The answers of a file by their ids, and what is wrong with its lines."""
    answers: dict[str, _Answer] = {}
    errors = []
    for number, row in enumerate(_rows(path), 1):
        if row is None or "id" not in row:
            errors.append((number, "The line is no JSON object with an `id`."))
        elif "error" in row:
            errors.append((number, f"Nothing was extracted: {row['error']}"))
        elif str(row["id"]) in answers:
            errors.append((number, f"The id `{row['id']}` has an answer already; left out."))
        else:
            try:
                answers[str(row["id"])] = _Answer.of_row(row)
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                message = f"The line holds no records: {type(error).__name__}: {error}"
                errors.append((number, message))
    return answers, errors
