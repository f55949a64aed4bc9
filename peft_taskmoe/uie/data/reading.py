"""What a reader found: documents and problems, and the rules that every reader follows.

No line is skipped silently. An "error" costs a document or an annotation, or had to be repaired;
`on_error="raise"` (the default) stops at the first, `on_error="collect"` goes on. A "note" says
what a document cannot hold, and never stops.

Files are UTF-8, with or without a byte order mark, with line ends of any system; blank lines at
the end mean nothing. An id is a string or a whole number; a row without one gets the file's name
and its line; no two documents of a file have the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from peft_taskmoe.uie.records import Document, RowReader
from peft_taskmoe.uie.strict_json import parse_json

OnError = Literal["raise", "collect"]


@dataclass(frozen=True, slots=True)
class ReadProblem:
    """Something in a file that was not taken as it stands.

    Attributes:
        kind: One of those in docs/formats.md.
        message: What was found, why it cannot be used, what to do.
        file: The file, or the name of the data set.
        line: Line number from 1 (row number for data sets); `None` if about the whole file.
        severity: `"error"`, or `"note"` where nothing that a document can hold was lost.
    """

    kind: str
    message: str
    file: str
    line: int | None = None
    severity: Literal["error", "note"] = "error"

    def __str__(self) -> str:
        place = self.file if self.line is None else f"{self.file}:{self.line}"
        return f"{place}: {self.kind}: {self.message}"


class ReadError(ValueError):
    """The first error of a file read with `on_error="raise"`; `problem` has its parts."""

    def __init__(self, problem: ReadProblem) -> None:
        super().__init__(
            f'{problem}\nPass on_error="collect" to read the rest and get a list of all problems.'
        )
        self.problem = problem


@dataclass(repr=False)
class ReadReport:
    """What a reader found: the documents, in the order of the file, and the problems."""

    documents: list[Document] = field(default_factory=list)
    problems: list[ReadProblem] = field(default_factory=list)

    @property
    def errors(self) -> list[ReadProblem]:
        """The problems that cost something."""
        return [problem for problem in self.problems if problem.severity == "error"]

    def counts(self) -> dict[str, int]:
        """How often each kind of problem occurs."""
        return dict(Counter(problem.kind for problem in self.problems))

    def __str__(self) -> str:
        kinds = ", ".join(f"{n} {kind}" for kind, n in self.counts().items())
        found = f"{len(self.documents)} documents, {len(self.problems)} problems"
        return f"{found}: {kinds}" if kinds else found

    def __repr__(self) -> str:
        return f"ReadReport({self})"

    def _repr_html_(self) -> str:
        from peft_taskmoe.uie.tables import Table
        from peft_taskmoe.uie.view import tables_to_html

        rows = [[str(p.file), str(p.line or ""), p.kind, p.message] for p in self.problems[:20]]
        more = len(self.problems) - len(rows)
        notes = [f"{more} more problems are not shown."] if more else []
        header = ["file", "line", "problem", "message"]
        return tables_to_html([Table(str(self), header, rows, left=4)], notes)


class Reading:
    """Collects the documents and problems of one reader; raises at the first error if asked to.

    Args:
        source: The file that is read; problems are about it unless they name another.
        on_error: `"raise"` or `"collect"`.
    """

    def __init__(self, source: str | Path, on_error: OnError) -> None:
        if on_error not in ("raise", "collect"):
            raise ValueError(f'There is no on_error="{on_error}". Choose "raise" or "collect".')
        self.source, self.on_error = source, on_error
        self.report = ReadReport()
        self._places: dict[str, str] = {}

    def error(
        self, kind: str, message: str, line: int | None = None, file: str | Path | None = None
    ) -> None:
        """Report something that costs a document or a part of one."""
        problem = ReadProblem(kind, message, str(file or self.source), line)
        if self.on_error == "raise":
            raise ReadError(problem)
        self.report.problems.append(problem)

    def note(
        self,
        message: str,
        line: int | None = None,
        file: str | Path | None = None,
        kind: str = "unsupported",
    ) -> None:
        """Report something that costs nothing."""
        problem = ReadProblem(kind, message, str(file or self.source), line, "note")
        self.report.problems.append(problem)

    def lines(self, path: Path) -> Iterator[tuple[int, str | None]]:
        r"""Numbered lines without `\n` or `\r\n`; `None` for one that cannot be decoded."""
        with path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                raw = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
                yield number, self.decoded(raw.removesuffix(b"\n").removesuffix(b"\r"), number)

    def decoded(
        self, raw: bytes, line: int | None = None, file: str | Path | None = None
    ) -> str | None:
        """The text of bytes, or `None` and an error."""
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            found = f"Byte {error.start} (0x{raw[error.start]:02x}) is no UTF-8"
            self.error("encoding", f"{found}. Save the file as UTF-8.", line, file)
            return None

    def texts(self, path: Path) -> Iterator[tuple[int, str]]:
        """Numbered lines with something in them; a file without any is an error."""
        found = False
        blank: list[int] = []
        for number, line in self.lines(path):
            if line is not None and not line.strip():
                blank.append(number)
                continue
            found = True
            for earlier in blank:  # blank lines at the end of a file are no surprise
                self.note("The line is blank.", earlier)
            blank.clear()
            if line is not None:
                yield number, line
        if not found:
            self.empty()

    def values(self, path: Path) -> Iterator[tuple[int, Any]]:
        """The JSON value of each line."""
        for number, line in self.texts(path):
            try:
                value = parse_json(line)
            except ValueError as error:
                self.error(
                    "json", f"The line is no JSON: {error}. Write one object a line.", number
                )
            else:
                yield number, value

    def shaped(
        self, values: Iterable[tuple[int, Any]], shape: Callable[[Any, int, Reading], Any]
    ) -> Iterator[tuple[int, Any]]:
        """What `shape` returns for each value, without `None`; what it raises is an error."""
        for number, value in values:
            try:
                found = shape(value, number, self)
            except ReadError:
                raise
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                message = f"The item is not in the format of this reader: {type(error).__name__}"
                self.error("row", f"{message}: {error}.", number)
            else:
                if found is not None:
                    yield number, found

    def add(self, row: Any, line: int | None = None, file: str | Path | None = None) -> None:
        """Check a row of the JSONL format and take its document, or report all its faults."""
        if isinstance(row, dict) and "id" not in row:
            row = {"id": f"{Path(file or self.source).stem}-{line}"} | row
        reader = RowReader(strict=True)
        document, faults = reader.document(row), reader.faults
        if document is not None and not faults and document.id in self._places:
            message = f"The id `{document.id}` is that of {self._places[document.id]}."
            faults = [("duplicate_id", f"{message} Give every document its own.")]
        for kind, message in faults:
            self.error(kind, message, line, file)
        if document is not None and not faults:
            place = f"line {line}" if line is not None else str(file or self.source)
            self._places[document.id] = place
            self.report.documents.append(document)
            if reader.unknown:
                self.note(reader.not_kept, line, file)

    def empty(self) -> None:
        """Report a file without anything in it."""
        self.error("empty", "The file has no document. Check that it is the right one.")
