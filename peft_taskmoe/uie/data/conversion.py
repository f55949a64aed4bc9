"""Readers by the name of their format, and data sets as a command line names them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from peft_taskmoe.uie.data.brat import read_brat
from peft_taskmoe.uie.data.conll import read_conll
from peft_taskmoe.uie.data.doccano import read_doccano
from peft_taskmoe.uie.data.hub import read_hub
from peft_taskmoe.uie.data.iepile import read_iepile
from peft_taskmoe.uie.data.jsonl import read_jsonl, write_jsonl
from peft_taskmoe.uie.data.label_studio import read_label_studio
from peft_taskmoe.uie.data.reading import ReadReport
from peft_taskmoe.uie.data.spacy_docs import read_spacy
from peft_taskmoe.uie.data.text_lines import read_text
from peft_taskmoe.uie.data.training import sample
from peft_taskmoe.uie.records import Document

READERS: dict[str, Callable[..., ReadReport]] = {
    "jsonl": read_jsonl,
    "conll": read_conll,
    "brat": read_brat,
    "iepile": read_iepile,
    "label-studio": read_label_studio,
    "doccano": read_doccano,
    "spacy": read_spacy,
    "text": read_text,
}
"""The formats that `convert` reads, by name."""

_SPLITS = ("train", "test", "dev", "validation")


def convert(
    source: str | Path, target: str | Path, source_format: str, **options: Any
) -> ReadReport:
    """Read a file or folder in any of the formats and write its documents as JSONL.

    Args:
        source: What to read.
        target: The JSONL file to write.
        source_format: A key of `READERS`.
        options: Of that reader, e.g. `on_error="collect"`, `scheme="BIOES"`, `task="RE"`.

    Returns:
        The report of the reader; all its documents have been written.

    Raises:
        ReadError: At the first error, unless they are collected; nothing is written then.
        ValueError: There is no such format.
    """
    if source_format not in READERS:
        raise ValueError(
            f"There is no format `{source_format}`. Choose one of {', '.join(READERS)}."
        )
    report = READERS[source_format](source, **options)
    write_jsonl(report.documents, target)
    return report


def read_datasets(
    sources: Iterable[str | Path], *, split: str, limit: int | None = None, seed: int = 0
) -> dict[str, list[Document]]:
    """Read several data sets, each from a JSONL file or of the Hub, as a command line names them.

    `conll04/train.jsonl` is of the data set `conll04`, as are all files whose names say only which
    split they hold (train, test, dev, validation); any other file is a data set of its own name.
    What does not end in `.jsonl` is the id of a Hub data set whose rows are in the JSONL format.

    Args:
        sources: The files and ids.
        split: The split to read of Hub data sets.
        limit: Draw at most so many documents of each data set.
        seed: Of that draw.

    Returns:
        For each data set, its documents.

    Raises:
        ReadError: At the first error in a data set.
    """
    found: dict[str, list[Document]] = {}
    for source in sources:
        path = Path(source)
        if path.suffix == ".jsonl":
            name, report = dataset_name(path), read_jsonl(path)
        else:
            name, report = str(source), read_hub(str(source), split=split)
        found.setdefault(name, []).extend(report.documents)
    return {
        name: docs if limit is None else sample(docs, limit, seed) for name, docs in found.items()
    }


def dataset_name(path: Path) -> str:
    """The name of a file's data set: that of its folder, where the file is named by its split."""
    return (path.stem in _SPLITS and path.parent.name) or path.stem
