"""What the benchmarks of a trained adapter share: their arguments, and two ways to answer against each other."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from peft_taskmoe.uie import Document, Extractor

WAYS = (False, True)


def parser(description: str, *, limit: int) -> argparse.ArgumentParser:
    """The arguments that all of them have."""
    found = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--adapter", required=True, help="folder or Hub id")
    found.add_argument("--base", help="base model (default: the one that the adapter names)")
    found.add_argument("--files", nargs="+", required=True, help="JSONL documents, or Hub data sets")
    found.add_argument(
        "--limit", type=int, default=limit, help="documents of each file (default: %(default)s)"
    )
    found.add_argument("--device", default="cpu")
    found.add_argument("--threads", type=int, default=1)
    return found


def load(args: argparse.Namespace, adapter: str | None = None, **options: Any) -> Extractor:
    """An adapter (default: `--adapter`) on its device, and the threads as asked for; `options` as for `Extractor.from_pretrained`."""
    torch.set_num_threads(args.threads)
    extractor = Extractor.from_pretrained(adapter or args.adapter, base_model=args.base, **options)
    extractor.model.to(args.device)
    return extractor


def time_ratio(extractors: dict[bool, Extractor], documents: Sequence[Document]) -> list[str]:
    """Seconds of the way `True` over seconds of `False`, batch by batch, in an order that alternates.

    Returns:
        Cells of a table: median, lowest and highest ratio, and how many answers differ.
    """
    for extractor in extractors.values():  # the encoder's first text, and what a tokenizer is asked once
        extractor.documents(documents[:1], progress=False)
    size = extractors[True].batch_size
    ratios, different = [], 0
    for number, first in enumerate(range(0, len(documents), size)):
        batch = documents[first : first + size]
        seconds, raw = {}, {}
        for way in WAYS if number % 2 == 0 else WAYS[::-1]:
            start = time.perf_counter()
            found = extractors[way].documents(batch, progress=False)
            seconds[way] = time.perf_counter() - start
            raw[way] = {name: [answer.parsed.raw for answer in one.answers] for name, one in found.items()}
        ratios.append(seconds[True] / seconds[False])
        different += sum(raw[True][name] != raw[False][name] for name in raw[True])
    figures = (statistics.median(ratios), min(ratios), max(ratios))
    return [*(f"{one:.2f}" for one in figures), f"{different} of {len(documents)}"]
