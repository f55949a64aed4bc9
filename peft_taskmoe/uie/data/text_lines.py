"""Plain text files: every line is a document without records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft_taskmoe.uie.data.reading import OnError, Reading, ReadReport
from peft_taskmoe.uie.schema import Schema


def read_text(path: str | Path, schema: Any = None, *, on_error: OnError = "raise") -> ReadReport:
    """Read a text file, a text a line, as documents without records.

    Args:
        path: The file.
        schema: What is asked of every text, as `Schema.of` takes it.
        on_error: "raise" at the first error, or "collect" them all.

    Raises:
        ReadError: At the first error, where asked to.
        ValueError: There is no schema, or none that can be used.
    """
    if schema is None:
        raise ValueError("A text file has no labels. Pass schema={label: description}.")
    reading = Reading(path, on_error)
    asked = {"task": "UIE", "schema": Schema.of(schema).to_dict(), "annotations": []}
    for number, text in reading.texts(Path(path)):
        reading.add({"text": text} | asked, number)
    return reading.report
