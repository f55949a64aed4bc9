"""Shows what constrained decoding changes and costs: one adapter's free and constrained answers.

Every batch is answered both ways in an alternating order, so that a busy machine slows both. A free
answer is "valid" if it is a sentence of the constraint's language (`answer_grammar`); those have to
come out the same, token for token. An invalid one may still have records.

    python benchmarks/constrained.py --adapter my-adapter --files a.jsonl b.jsonl --limit 100
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from answering import load, measure, parser
from rich.console import Console
from rich.table import Table

from peft_taskmoe.uie import Document, Extraction, Extractor, read_datasets, score
from peft_taskmoe.uie.extraction.constrained import answer_grammar
from peft_taskmoe.uie.extraction.questions import question_of

WAYS = ("free", "constrained")


def both(args: argparse.Namespace) -> dict[str, Extractor]:
    """The two extractors, which share model and encoder."""
    options = {"batch_size": args.batch_size, "max_new_tokens": args.max_new_tokens}
    dtype = {} if args.dtype is None else {"dtype": args.dtype}
    free = load(args, model_kwargs=dtype, **options)
    held = Extractor(free.model, free.tokenizer, format=free.format, constrained=True, **options)
    return dict(zip(WAYS, (free, held), strict=True))


def valid(extractor: Extractor, document: Document, extraction: Extraction) -> bool:
    """Whether every answer to a document is complete and in the constraint's language.

    The document has to be one whole window: other answers are about parts of it.
    """
    constraint, question = extractor.generator.constraint, question_of(document)
    assert constraint is not None
    (answer,) = extraction.answers
    matcher = constraint.matcher(
        answer_grammar(document.schema, document.text, question.given or ()),
        len(extractor.tokenizer),
    )
    tokens = extractor.generator.ids(answer.parsed.raw.removesuffix("\n"))
    return (
        answer.complete
        and matcher.try_consume_tokens(tokens) == len(tokens)
        and matcher.is_accepting()
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    """All figures."""
    extractors = both(args)
    sets = read_datasets(args.files, split="test", limit=args.limit, seed=args.seed)
    warm_up = next(iter(sets.values()))[:1]
    for extractor in extractors.values():  # masks of the whole vocabulary are made once
        extractor.documents(warm_up, progress=False)
    found: dict[str, dict[str, dict[str, Extraction]]] = {way: {} for way in WAYS}
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    n_valid = n_same = n_judged = 0
    for name, documents in sets.items():
        documents = sorted(
            documents, key=lambda document: len(document.text)
        )  # batches of like length
        answers, of_set = measure(extractors, documents, args.batch_size)
        for way in WAYS:
            found[way][name] = answers[way]
            seconds[way] += of_set[way]
        for document in documents:
            free, held = (answers[way][document.id] for way in WAYS)
            if [answer.window for answer in free.answers] != [(0, len(document.text))]:
                continue
            n_judged += 1
            if valid(extractors["constrained"], document, free):
                n_valid += 1
                n_same += (
                    free.answers[0].parsed.raw.removesuffix("\n") == held.answers[0].parsed.raw
                )
    ratios = [
        held / free for free, held in zip(seconds["free"], seconds["constrained"], strict=True)
    ]
    figures: dict[str, Any] = {
        "documents": sum(map(len, sets.values())),
        "judged": n_judged,
        "valid_free": n_valid,
        "same_where_valid": n_same,
        "time_ratio": sum(seconds["constrained"]) / sum(seconds["free"]),
        "time_ratio_median_of_batches": statistics.median(ratios),
    }
    for way in WAYS:
        report = score(sets, found[way])
        counts = report.answers.values()
        of_all = [one for of_set in found[way].values() for one in of_set.values()]
        tokens = sum(answer.tokens for one in of_all for answer in one.answers)
        figures[way] = {
            "f1": {name: report.select([name]).average_f1() for name in sets}
            | {"mean": report.average_f1()},
            "parse_failures": sum(one.parse_failures for one in counts),
            "hallucinated": sum(one.hallucinated for one in counts),
            "not_well_formed": sum(
                not answer.parsed.well_formed for one in of_all for answer in one.answers
            ),
            "cut_off": sum(not answer.complete for one in of_all for answer in one.answers),
            "tokens": tokens,
            "seconds": sum(seconds[way]),
            "ms_per_token": 1e3 * sum(seconds[way]) / max(tokens, 1),
        }
    return figures


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure and print the table; returns the figures."""
    asked = parser(__doc__, limit=50)
    asked.add_argument("--batch-size", type=int, default=8)
    asked.add_argument("--max-new-tokens", type=int, default=256)
    asked.add_argument("--dtype", help="precision of the base model (default: as it is stored)")
    asked.add_argument("--seed", type=int, default=0, help="of the sample")
    asked.add_argument("--json", type=Path, help="also write the figures to this file")
    args = asked.parse_args(arguments)
    figures = run(args)
    how = f"{args.device}, {args.threads} threads, batches of {args.batch_size}"
    table = Table(title=f"{figures['documents']} documents, {how}")
    for column in ("", *WAYS):
        table.add_column(column, justify="left" if not column else "right")
    for name in figures["free"]["f1"]:
        table.add_row(f"F1 {name}", *(f"{100 * figures[way]['f1'][name]:.1f}" for way in WAYS))
    for row in ("parse_failures", "hallucinated", "not_well_formed", "cut_off", "tokens"):
        table.add_row(row.replace("_", " "), *(str(figures[way][row]) for way in WAYS))
    for row in ("seconds", "ms_per_token"):
        table.add_row(row.replace("_", " "), *(f"{figures[way][row]:.2f}" for way in WAYS))
    console = Console(width=100)
    console.print(table)
    console.print(
        f"{figures['valid_free']} of {figures['judged']} free answers are in the constraint's "
        f"language; {figures['same_where_valid']} of these come out the same."
    )
    console.print(
        f"Time, constrained / free: {figures['time_ratio']:.2f} (median of batches "
        f"{figures['time_ratio_median_of_batches']:.2f})."
    )
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return figures


if __name__ == "__main__":
    main()
