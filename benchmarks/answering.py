"""What the benchmarks of extraction share: arguments, loading, and two ways to answer in turn."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from peft_taskmoe.uie import Document, Extraction, Extractor


def parser(description: str, *, limit: int, files: Sequence[str] = ()) -> argparse.ArgumentParser:
    """The arguments that all of them have; `files` are those that are read by default."""
    found = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--adapter", required=True, help="folder or Hub id")
    found.add_argument("--base", help="base model (default: the one that the adapter names)")
    found.add_argument(
        "--files",
        nargs="+",
        required=not files,
        default=files,
        help="JSONL documents, or Hub data sets",
    )
    found.add_argument(
        "--limit", type=int, default=limit, help="documents of each file (default: %(default)s)"
    )
    found.add_argument("--device", default="cpu")
    found.add_argument("--threads", type=int, default=1)
    return found


def load(args: argparse.Namespace, adapter: str | None = None, **options: Any) -> Extractor:
    """An adapter (default: `--adapter`) on its device, and the threads as asked for.

    Args:
        args: The arguments of `parser`.
        adapter: Another adapter than `--adapter`.
        options: As for `Extractor.from_pretrained`.
    """
    torch.set_num_threads(args.threads)
    extractor = Extractor.from_pretrained(adapter or args.adapter, base_model=args.base, **options)
    extractor.model.to(args.device)
    return extractor


def measure(
    extractors: Mapping[Any, Extractor], documents: Sequence[Document], size: int
) -> tuple[dict[Any, dict[str, Extraction]], dict[Any, list[float]]]:
    """The answers of each way by document, and the seconds of each batch; the order alternates."""
    ways = list(extractors)
    answers: dict[Any, dict[str, Extraction]] = {way: {} for way in ways}
    seconds: dict[Any, list[float]] = {way: [] for way in ways}
    for number, first in enumerate(range(0, len(documents), size)):
        batch = documents[first : first + size]
        for way in ways if number % 2 == 0 else ways[::-1]:
            start = time.perf_counter()
            answers[way] |= extractors[way].documents(batch, progress=False)
            seconds[way].append(time.perf_counter() - start)
    return answers, seconds


def time_ratio(without: Extractor, with_it: Extractor, documents: Sequence[Document]) -> list[str]:
    """Seconds of the second extractor over those of the first, batch by batch.

    Returns:
        Cells of a table: median, lowest and highest ratio, and how many answers differ.
    """
    for extractor in (
        without,
        with_it,
    ):  # the encoder's first text, and what a tokenizer is asked once
        extractor.documents(documents[:1], progress=False)
    answers, seconds = measure({False: without, True: with_it}, documents, with_it.batch_size)
    ratios = [new / old for old, new in zip(seconds[False], seconds[True], strict=True)]
    raw = [
        {name: [answer.parsed.raw for answer in one.answers] for name, one in answers[way].items()}
        for way in (False, True)
    ]
    different = sum(raw[0][name] != raw[1][name] for name in raw[0])
    figures = (statistics.median(ratios), min(ratios), max(ratios))
    return [*(f"{one:.2f}" for one in figures), f"{different} of {len(documents)}"]
