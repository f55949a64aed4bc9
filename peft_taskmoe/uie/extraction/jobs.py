"""Long jobs: a JSON line for each text, written as it is answered, continued where the file stops.

A line is `{"id", "source", "text", "records", "problems", "answers", "seconds", "run"}`, or
`{"id", "source", "error", "run"}` where nothing could be asked. `source` is a checksum of what was
asked, `run` one of the settings.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock, Timeout

from .questions import Question, Thresholds
from .results import Extraction

_ID, _BEHIND_ID = b'{"id": "', b'", "source": "'  # in every line that is written here
_UP_TO_ID = re.compile(rb'{"id": "(?:[^"\\]|\\.?)*')
_ADVICE = "Write to another file, or overwrite this one (`overwrite=True`, `--overwrite`)."


class Answers(Protocol):
    """What answers questions: an `Extractor`."""

    def answer(
        self,
        asked: Iterable[Sequence[Question]],
        *,
        thresholds: Thresholds = None,
        progress: bool | None = None,
        total: int | None = None,
    ) -> Iterator[Extraction]:
        """See `Extractor.answer`."""


@dataclass(frozen=True, slots=True)
class Item:
    """One text of a job.

    Attributes:
        id: Its name in the output.
        source: A checksum of what is asked: `checksum`.
        asked: The questions about it; see `Extractor.answer`.
        error: Why nothing can be asked, if so; it becomes the line.
        extra: What else the line holds.
    """

    id: str
    source: str
    asked: Sequence[Question] = ()
    error: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)


def checksum(data: bytes | Any) -> str:
    """A short checksum of bytes, or of anything that JSON can hold."""
    data = data if isinstance(data, bytes) else json.dumps(data, sort_keys=True).encode()
    return hashlib.sha256(data).hexdigest()[:12]


def named(
    asked: Iterable[Sequence[Question]], ids: Iterable[str] | None
) -> Iterator[tuple[str, Sequence[Question]]]:
    """The name of each text with its questions; without `ids` its number, from 1 on.

    Raises:
        ValueError: There are more or fewer names than texts.
    """
    names = iter(itertools.count(1) if ids is None else ids)
    for questions in asked:
        name = next(names, None)
        if name is None:
            raise ValueError("There are fewer `ids` than texts. Pass one for each text, or none.")
        yield str(name), questions
    if ids is not None and next(names, None) is not None:
        raise ValueError("There are more `ids` than texts. Pass one for each text, or none.")


def lines_done(path: Path, sources: Iterable[str], run: str) -> int:
    """How many texts an earlier run has written; a line that it was stopped in is cut off.

    Args:
        path: The output; none is done if it is not there.
        sources: The checksums of the texts, in their order. As many as are done are taken from it.
        run: The checksum of the settings.

    Raises:
        ValueError: The file is not that of such a run. It is left as it is.
    """
    if not path.exists():
        return 0
    sources = iter(sources)
    whole, rest, done = 0, b"", 0
    with path.open("rb+") as file:
        for line in file:
            if not line.endswith(b"\n"):
                rest = line
                break
            whole, done = whole + len(line), done + 1
            row = json_object(line)
            if row is None or row.get("run") != run:
                raise ValueError(
                    f"`{path}:{done}` was not written by such a run: with this schema, these "
                    f"settings and this model. {_ADVICE}"
                )
            source = next(sources, None)
            if source is None:
                raise ValueError(f"`{path}` has more lines than there are texts. {_ADVICE}")
            if row.get("source") != source:
                raise ValueError(
                    f"`{path}:{done}` does not belong to text {done}, which is another now. "
                    f"{_ADVICE}"
                )
        if not _is_beginning(rest, run):
            raise ValueError(f"The last line of `{path}` was not written by such a run. {_ADVICE}")
        file.truncate(whole)
    return done


def write_lines(
    answers: Answers,
    items: Iterable[Item],
    path: Path,
    run: str,
    *,
    thresholds: Thresholds = None,
    progress: bool | None = None,
    total: int | None = None,
    overwrite: bool = False,
) -> int:
    """Answer the texts that a file has no line for yet, and append theirs, each at once.

    Args:
        answers: What answers: an `Extractor`.
        items: All texts of the job, in their order.
        path: The output.
        run: The checksum of the settings: `Extractor.fingerprint`.
        thresholds: As in a call of the extractor.
        progress: As in a call of the extractor.
        total: Number of items, for the progress bar.
        overwrite: Start anew. The old file stays until the first new line is written.

    Returns:
        The number of lines written.

    Raises:
        ValueError: The file is not that of such a run, or another process is writing it.
    """
    items = iter(items)
    with only_writer(path):
        done = 0 if overwrite else lines_done(path, (item.source for item in items), run)
        waiting: list[Item] = []

        def asked() -> Iterator[Sequence[Question]]:
            for item in items:
                waiting.append(item)
                yield item.asked

        left = None if total is None else total - done
        found = answers.answer(asked(), thresholds=thresholds, progress=progress, total=left)
        lines = (_line(waiting.pop(0), extraction, run) for extraction in found)
        written = 0
        if overwrite:
            _replace(path, next(lines, b""))
            written = path.stat().st_size > 0
        with path.open("ab") as file:
            for line in lines:
                file.write(line)
                file.flush()
                written += 1
        return int(written)


def json_object(line: bytes) -> dict[str, Any] | None:
    """The JSON object of a line; None if it is none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _is_beginning(rest: bytes, run: str) -> bool:
    """Whether a line without an end may be one of this run that was not written whole."""
    row = json_object(rest)
    if row is not None:
        return row.get("run") == run
    up_to_id = _UP_TO_ID.match(rest)
    behind = rest[up_to_id.end() :] if up_to_id else b""
    return rest.startswith(_ID[: len(rest)]) and behind.startswith(_BEHIND_ID[: len(behind)])


def _line(item: Item, extraction: Extraction, run: str) -> bytes:
    found = extraction.to_dict() if item.error is None else {"error": item.error}
    row = {"id": item.id, "source": item.source, **found, **item.extra, "run": run}
    return json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def _replace(path: Path, content: bytes) -> None:
    """Write a file beside, then put it in the place of this one."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.new")
    beside.write_bytes(content)
    beside.replace(path)


@contextmanager
def only_writer(path: Path, wait: float = 0.0) -> Iterator[None]:
    """Hold the lock of an output, which dies with its process."""
    lock = FileLock(path.with_name(f".{path.name}.lock"), timeout=wait)
    try:
        lock.acquire()
    except Timeout as error:
        raise ValueError(
            f"Another process is writing `{path}`. Wait for it, or write to another file."
        ) from error
    try:
        yield
    finally:
        lock.release()
