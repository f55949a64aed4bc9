"""Long jobs: a JSON line for each text, written as soon as it is answered, and continued where the file stops.

It knows the file and what its lines must hold to be continued; `Extractor.to_jsonl` and the command line are built on
it. It does not know where texts come from, and imports no torch.

A line is `{"id", "source", "text", "records", "problems", "answers", "seconds", "run"}`, or `{"id", "source", "error",
"run"}` where nothing could be asked. `source` is a checksum of what was asked, `run` one of the settings.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .extractor import Extractor, Question

_LINE_START = b'{"id": '  # of every line that is written here


@dataclass(frozen=True, slots=True)
class Item:
    """One text of a job.

    Attributes:
        id: Its name in the output.
        source: A checksum of what is asked: `checksum`.
        asked: The questions about it; see `Extractor.answer`.
        error: Why nothing can be asked, if so; it becomes the line.
    """

    id: str
    source: str
    asked: Sequence[Question] = ()
    error: str | None = None


def checksum(data: bytes | Any) -> str:
    """A short checksum of bytes, or of anything that JSON can hold."""
    data = data if isinstance(data, bytes) else json.dumps(data, sort_keys=True).encode()
    return hashlib.sha256(data).hexdigest()[:12]


def lines_done(path: Path, sources: Iterator[str], run: str) -> int:
    """How many texts an earlier run has written; the part of a line that it was stopped in is taken off the file.

    Args:
        path: The output; made if it is not there.
        sources: The checksums of the texts, in their order. As many as are done are taken from it.
        run: The checksum of the settings.

    Raises:
        ValueError: The file is not that of such a run. It is left as it is.
    """
    advice = "Write to another file, or overwrite this one (`overwrite=True`, `--overwrite`)."
    whole, rest, done = 0, b"", 0
    with path.open("ab+") as file:
        file.seek(0)
        for line in file:
            if not line.endswith(b"\n"):
                rest = line
                break
            whole += len(line)
            done += 1
            row = json_object(line)
            if row is None or row.get("run") != run:
                raise ValueError(
                    f"`{path}:{done}` was not written by such a run: with this schema, these settings and this model. {advice}"
                )
            source = next(sources, None)
            if source is None:
                raise ValueError(f"`{path}` has more lines than there are texts. {advice}")
            if row.get("source") != source:
                raise ValueError(
                    f"`{path}:{done}` does not belong to text {done}, which is another now. {advice}"
                )
        if not rest.startswith(_LINE_START[: len(rest)]):
            raise ValueError(f"The last line of `{path}` was not written by such a run. {advice}")
        file.truncate(whole)
    return done


def write_lines(
    extractor: Extractor,
    items: Iterable[Item],
    path: Path,
    run: str,
    *,
    thresholds: float | Mapping[str, float] | None = None,
    progress: bool | None = None,
    total: int | None = None,
) -> int:
    """Answer the questions about each text and append its line to a file, which every line reaches at once.

    Args:
        extractor: What answers.
        items: The texts that are not done yet.
        path: The output.
        run: The checksum of the settings.
        thresholds: As in a call of the extractor.
        progress: As in a call of the extractor.
        total: Number of items, for the progress bar.

    Returns:
        The number of lines written.
    """
    waiting: list[Item] = []

    def asked() -> Iterator[Sequence[Question]]:
        for item in items:
            waiting.append(item)
            yield item.asked

    written = 0
    with path.open("ab") as file:
        for extraction in extractor.answer(
            asked(), thresholds=thresholds, progress=progress, total=total
        ):
            item = waiting.pop(0)
            found = extraction.to_dict() if item.error is None else {"error": item.error}
            row = {"id": item.id, "source": item.source, **found, "run": run}
            file.write(
                json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
            )
            file.flush()
            written += 1
    return written


def json_object(line: bytes) -> dict[str, Any] | None:
    """The JSON object of a line; None if it is none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None
