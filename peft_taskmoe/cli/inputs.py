"""The question of each line of an input file, or why it has none."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .files import lines

if TYPE_CHECKING:
    from ..uie import Schema
    from ..uie.extraction.jobs import Item
    from ..uie.extraction.questions import Question

_READ = {"id", "text"}
_QUESTION = {"schema", "task", "annotations", "entities"}  # read where no schema is given for all
_WRITTEN = {"source", "records", "problems", "answers", "seconds", "error", "run", "input"}


def items_of(path: Path, schema: Schema | None, first: int, last: int) -> Iterator[Item]:
    """What the lines `first` (from 0) to `last` ask; an error where it is nothing."""
    from ..uie.extraction.jobs import Item, checksum

    read = _READ | (_QUESTION if schema is None else set())
    for number, line in islice(enumerate(lines(path), 1), first, last):
        source = checksum(line)
        try:
            row = _row(line, is_text=path.suffix == ".txt")
            name = str(number if row.get("id") is None else row["id"])
            yield Item(name, source, [_question(row, name, schema)], extra=_extra(row, read))
        except ValueError as error:
            yield Item(str(number), source, error=str(error))
        except Exception as error:  # whatever a line holds, it must not end the job
            found = f"{type(error).__name__}: {error}"
            yield Item(str(number), source, error=f"The line cannot be used ({found}).")


def _row(line: bytes, is_text: bool) -> dict[str, Any]:
    """An input line as an object with a text.

    Raises:
        ValueError: It is none.
    """
    from ..uie.strict_json import parse_json

    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        found = f"Byte {error.start} (0x{line[error.start]:02x}) of the line is no UTF-8"
        raise ValueError(f"{found}. Save the file as UTF-8.") from error
    try:
        row = text if is_text else parse_json(text)
    except ValueError as error:
        raise ValueError(f'The line is no JSON ({error}). Write {{"text": ...}}.') from error
    row = {"text": row} if isinstance(row, str) else row
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise ValueError('The line has no text. Write {"text": ...}, with an "id" if you like.')
    return row


def _question(row: dict[str, Any], name: str, schema: Schema | None) -> Question:
    """The question of an input line.

    Raises:
        ValueError: There is none in it.
    """
    from ..uie import Document
    from ..uie.extraction.questions import Question, question_of

    if schema is not None:
        return Question(row["text"], schema)
    if "schema" not in row:
        raise ValueError('The line has no "schema", and no --schema was given. Pass --schema FILE.')
    document = Document.from_dict({"task": "UIE", **row, "id": name})
    if document.task == "EAE" and not document.given:
        raise ValueError(
            "An EAE line needs the events whose arguments are asked for, with type and trigger, in "
            "`annotations`."
        )
    return question_of(document)


def _extra(row: dict[str, Any], read: set[str]) -> dict[str, Any]:
    """The keys of an input line that its output keeps; those that mean another thing in `input`."""
    extra = {key: row[key] for key in row.keys() - read - _WRITTEN}
    taken = {key: row[key] for key in row.keys() & _WRITTEN}
    return extra | ({"input": taken} if taken else {})
