"""What comes back: answers, the extraction of a text, the extractions of several."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...optional import needed
from ..parse import ParsedAnswer
from ..records import Problem, Record, Relation, spans_of

if TYPE_CHECKING:
    from pandas import DataFrame
    from rich.console import Console

_SHOWN_IN_NOTEBOOK = 20
_COLUMNS = (
    *("text", "kind", "label", "mention", "start", "end"),
    *("alignment", "confidence", "arguments"),
)


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model wrote about one window of a text, and what was read from it.

    Attributes:
        window: Start and end of the window in the text.
        parsed: Records (with offsets of the window), problems and the raw answer.
        tokens: Tokens that the model wrote.
        complete: Whether the answer ended by itself and was not cut off at `max_new_tokens`.
    """

    window: tuple[int, int]
    parsed: ParsedAnswer
    tokens: int
    complete: bool


@dataclass(frozen=True, slots=True, repr=False)
class Extraction:
    """All that was found in one text.

    Attributes:
        text: The text.
        records: Records with offsets of the text, in its order, each once.
        problems: What could not be taken as the model wrote it; nothing is dropped silently.
        answers: The raw answers, one for each window and schema.
        seconds: This text's share of the time its batches took.
    """

    text: str
    records: tuple[Record, ...]
    problems: tuple[Problem, ...]
    answers: tuple[Answer, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: text, records as in the data sets' JSONL, problems, raw answers, seconds."""
        return {
            "text": self.text,
            "records": [record.to_dict() for record in self.records],
            "problems": [asdict(problem) for problem in self.problems],
            "answers": [answer.parsed.raw for answer in self.answers],
            "seconds": round(self.seconds, 4),
        }

    def show(self, console: Console | None = None) -> None:
        """Print the text with its records and problems: coloured, or as HTML in a notebook.

        Args:
            console: The rich console to print to.
        """
        Extractions([self], self.seconds).show(console)

    def save_html(self, path: str | Path) -> None:
        """Write the text with its records and problems as one HTML file that needs nothing else."""
        Extractions([self], self.seconds).save_html(path)

    def __repr__(self) -> str:
        text = self.text if len(self.text) <= 60 else self.text[:57] + "..."
        counts = f"{_count(self.records, 'record')}, {_count(self.problems, 'problem')}"
        return f"Extraction({text!r}: {counts})"

    def _repr_html_(self) -> str:
        return Extractions([self], self.seconds)._repr_html_()


class Extractions(Sequence[Extraction]):
    """The extractions of several texts, in their order."""

    def __init__(self, items: Sequence[Extraction], seconds: float) -> None:
        self.items = tuple(items)
        self.seconds = seconds

    def __getitem__(self, index: Any) -> Any:
        found = self.items[index]
        return Extractions(found, self.seconds) if isinstance(index, slice) else found

    def __len__(self) -> int:
        return len(self.items)

    def to_json(self, **options: Any) -> str:
        """All extractions as a JSON list; `options` go to `json.dumps`."""
        rows = [item.to_dict() for item in self.items]
        return json.dumps(rows, **{"ensure_ascii": False, **options})

    def show(self, console: Console | None = None) -> None:
        """Print all texts with their records and problems; see `Extraction.show`."""
        from ..view import show

        show(self.items, console)

    def save_html(self, path: str | Path) -> None:
        """Write all texts with their records and problems as one HTML file."""
        from ..view import to_page

        page = to_page(self.items).encode("utf-8", "backslashreplace")  # lone surrogates
        Path(path).write_bytes(page)

    def __repr__(self) -> str:
        records = [record for item in self.items for record in item.records]
        problems = [problem for item in self.items for problem in item.problems]
        counts = f"{_count(records, 'record')}, {_count(problems, 'problem')}"
        return f"Extractions({_count(self.items, 'text')}: {counts}, {self.seconds:.1f} s)"

    def _repr_html_(self) -> str:
        from ..view import to_html

        left = len(self.items) - _SHOWN_IN_NOTEBOOK
        more = f"<p>{left} more texts are not shown here; <code>save_html</code> writes them all."
        return to_html(self.items[:_SHOWN_IN_NOTEBOOK]) + (f"{more}</p>" if left > 0 else "")

    def to_dataframe(self) -> DataFrame:
        """One row a record: text number, kind, label, mention, offsets, confidence, arguments.

        Relations have their head as the mention and head and tail as arguments; events have their
        trigger. Lone surrogates, which tables cannot hold, are written as escapes.
        """
        needed("pandas", "uie")
        from pandas import DataFrame

        rows = [
            _row(number, record)
            for number, item in enumerate(self.items)
            for record in item.records
        ]
        return DataFrame(rows, columns=list(_COLUMNS))


def _row(number: int, record: Record) -> dict[str, Any]:
    data, mention = record.to_dict(), spans_of(record)[0]
    arguments = data.get("arguments")
    if isinstance(record, Relation):
        arguments = [{"role": side, **data[side]} for side in ("head", "tail")]
    return {
        "text": number,
        "kind": type(record).__name__.lower(),
        "label": _printable(record.label),
        "mention": _printable(mention.text),
        "start": mention.start,
        "end": mention.end,
        "alignment": mention.alignment,
        "confidence": record.confidence,
        "arguments": arguments and [{**one, "text": _printable(one["text"])} for one in arguments],
    }


def _printable(words: str) -> str:
    return words.encode("utf-8", "backslashreplace").decode("utf-8")


def _count(things: Sequence[object], name: str) -> str:
    return f"{len(things)} {name}{'' if len(things) == 1 else 's'}"
