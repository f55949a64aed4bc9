"""How far off confidences are before and after calibration, on answers of a trained adapter.

The curves are fitted on some documents (`--fit`) and applied to others: of the same data sets
(`--same`), and of data sets that the adapter was not trained on (`--other`).

    python experiments/calibration.py --adapter A --fit f.jsonl --same s.jsonl --other o.jsonl
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft_taskmoe.uie import (
    Document,
    Extraction,
    Extractor,
    Reliability,
    fit_calibration,
    read_jsonl,
    reliability,
)
from peft_taskmoe.uie.extraction.questions import question_of

Answered = tuple[list[Document], dict[str, Extraction]]


def main(arguments: Sequence[str] | None = None) -> None:
    """Answer, fit, apply and print."""
    args = parsed(arguments)
    extractor = Extractor.from_pretrained(
        args.adapter, calibrated=False, batch_size=args.batch_size
    )
    groups = {name: answered(extractor, getattr(args, name)) for name in ("fit", "same", "other")}
    before = {name: curve(group, args.seed) for name, group in groups.items()}
    calibration = fit_calibration(before["fit"], min_records=args.min_records)
    if args.save:
        calibration.save(args.adapter)
    fitted = {kind: one.records for kind, one in calibration.curves.items()}
    figures: dict[str, Any] = {"adapter": Path(args.adapter).name, "records fitted on": fitted}
    for name, (documents, found) in groups.items():
        calibrated = {
            id_: replace(one, records=calibration.apply(one.records)) for id_, one in found.items()
        }
        figures[name] = {
            "documents": len(documents),
            "records": before[name].count,
            "right": round(before[name].precision, 3),
            "before": error(before[name]),
            "after": error(curve((documents, calibrated), args.seed)),
        }
    print(json.dumps(figures, indent=2))
    if args.output:
        args.output.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapter", required=True)
    for name in ("fit", "same", "other"):
        parser.add_argument(f"--{name}", nargs="+", type=Path, required=True)
    parser.add_argument("--batch_size", type=int, default=24)
    parser.add_argument("--min_records", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", action="store_true", help="write the curves beside the adapter")
    parser.add_argument("--output", type=Path)
    return parser.parse_args(arguments)


def answered(extractor: Extractor, files: Sequence[Path]) -> Answered:
    """The documents of some files, and what the adapter answers."""
    documents = [
        replace(document, id=f"{file.stem} {document.id}")
        for file in files
        for document in read_jsonl(file).documents
    ]
    found = extractor.answer([[question_of(document)] for document in documents])
    return documents, {document.id: one for document, one in zip(documents, found, strict=True)}


def curve(group: Answered, seed: int) -> Reliability:
    """The reliability of a group's confidences."""
    documents, found = group
    return reliability({"own": documents}, {"own": found}, n_resamples=1000, seed=seed)


def error(one: Reliability) -> dict[str, float]:
    """The expected calibration error with its 95 % confidence interval, and the mean confidence."""
    assert one.interval is not None
    bounds = {"low": one.interval.low, "high": one.interval.high}
    figures = {"ece": one.ece, **bounds, "confidence": one.confidence}
    return {name: round(value, 3) for name, value in figures.items()}


if __name__ == "__main__":
    main()
