"""The project's own format: one document a line, as JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from peft_taskmoe.uie.data.reading import OnError, Reading, ReadReport
from peft_taskmoe.uie.records import Document


def read_jsonl(path: str | Path, *, on_error: OnError = "raise") -> ReadReport:
    """Read documents from the project's format, one JSON object a line.

    Each line is `{"id", "text", "task", "schema", "annotations"[, "entities"]}`; other keys are
    kept in `Document.extra`. Offsets count characters: `text[start:end]` is the mention.

    Args:
        path: The file.
        on_error: "raise" at the first error, or "collect" them all.

    Raises:
        ReadError: At the first error, where asked to.
    """
    reading = Reading(path, on_error)
    for number, row in reading.values(Path(path)):
        reading.add(row, number)
    return reading.report


def write_jsonl(documents: Iterable[Document], path: str | Path) -> int:
    """Write documents in the format that `read_jsonl` reads.

    Args:
        documents: The documents.
        path: The file to write; one that is there is replaced when all is written.

    Returns:
        How many were written.
    """
    path = Path(path)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    written = 0
    try:
        with unfinished.open("w", encoding="utf-8", newline="\n") as file:
            for document in documents:
                file.write(json.dumps(document.to_dict(), ensure_ascii=False) + "\n")
                written += 1
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    return written
