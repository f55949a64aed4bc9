"""Lines and documents of the files that commands read, and outputs that must not be one of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..uie import Document


def lines(path: Path) -> Iterator[bytes]:
    """The lines of a file without their ends; blank ones at the end of the file are none."""
    blank = 0
    with path.open("rb") as file:
        for number, line in enumerate(file):
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 0 else line
            if not line.strip():
                blank += 1
                continue
            yield from [b""] * blank
            yield line.removesuffix(b"\n").removesuffix(b"\r")
            blank = 0


def gold_documents(path: Path) -> list[Document]:
    """The documents of a JSONL file.

    Raises:
        ValueError: The first error in it.
    """
    from ..uie import ReadError, read_jsonl

    try:
        return read_jsonl(path).documents
    except ReadError as error:
        raise ValueError(
            f"{error.problem}\nMend the line, or write a file without such lines: `peft-taskmoe "
            f"convert --source-format jsonl --keep-going {path} NEW_FILE`."
        ) from error


def check_output(output: Path, *inputs: Path | None) -> None:
    """Refuse an output that cannot be written, or that is one of the inputs by whatever name.

    Raises:
        ValueError: Naming the file.
    """
    if not output.absolute().parent.is_dir():
        raise ValueError(f"There is no folder `{output.absolute().parent}` for `{output.name}`.")
    if output.is_dir():
        raise ValueError(f"`{output}` is a folder. Name a file in it.")
    for path in inputs:
        if path is not None and path.exists() and output.exists() and output.samefile(path):
            raise ValueError(f"`{output}` is `{path}`, which is read. Write to another file.")
