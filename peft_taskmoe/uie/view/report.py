"""A report about an adapter as one HTML file: scores, confidence, routing and examples."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..records import Document, Problem, Record
from ..scoring.confusion import NOT_FOUND, NOT_GOLD, confusion
from ..scoring.matching import Answers, Match, parts_of
from ..scoring.reliability import reliability
from ..scoring.scorer import score
from ..tables import Table
from .html import template, to_html

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LABELS = 14  # of the matrix; the rarer ones are pooled
_OTHER = "(others)"


@dataclass(frozen=True)
class Picture:
    """A picture inside of the page.

    Args:
        title: What stands above it.
        source: A `data:` address.
        words: Alternative text.
    """

    title: str
    source: str
    words: str

    @classmethod
    def of(cls, title: str, figure: Figure, words: str) -> Picture:
        """Draw a figure of matplotlib."""
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=110)
        return cls(title, _address(file), words)


@dataclass(frozen=True)
class _Shown:
    """A text with what was found in it."""

    text: str
    records: Sequence[Record]
    problems: Sequence[Problem]


def report_page(
    name: str,
    documents: Mapping[str, Sequence[Document]],
    answers: Answers,
    *,
    facts: Mapping[str, str] | None = None,
    routing: Sequence[Picture | Table] = (),
    notes: Sequence[str] = (),
    match: Match = "text",
    examples: int = 12,
) -> str:
    """The page, which needs no other file.

    Args:
        name: What the report is about.
        documents: For each data set, its documents with their gold records.
        answers: For each data set, the answers by the documents' ids.
        facts: What to know about the adapter, by name.
        routing: Pictures and tables about the routing.
        notes: What a reader has to know.
        match: Compare mentions by "text" or by "offsets", as `score` does.
        examples: Texts shown of each data set; those with problems come first.
    """
    report = score(documents, answers, match=match).with_intervals(n_resamples=1000)
    curve = reliability(documents, answers, match=match, n_resamples=1000)
    pictures: list[Picture] = []
    if curve.count:
        try:
            file = io.BytesIO()
            curve.plot(file)
            words = "precision of the records by their confidence"
            pictures = [Picture("Precision by confidence", _address(file), words)]
        except ImportError as error:
            notes = [*notes, str(error)]
    return str(
        template("report").render(
            name=name,
            facts=facts or {},
            scores=report.tables(),
            labels=report.tables(labels=True),
            matrix=_matrix(confusion(documents, answers, match)),
            reliability=curve.tables() if curve.count else [],
            pictures=pictures,
            routing=[(isinstance(one, Picture), one) for one in routing],
            notes=[*notes, *report.notes],
            examples={
                dataset: to_html(_examples(of_dataset, answers.get(dataset, {}), examples))
                for dataset, of_dataset in documents.items()
            },
        )
    )


def _address(file: io.BytesIO) -> str:
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def _matrix(pairs: Counter[tuple[str, str]]) -> dict[str, Any]:
    """Rows of gold labels, columns of predicted ones; cells with their share of the row."""
    counts = Counter[str]()
    for pair, count in pairs.items():
        counts.update(dict.fromkeys({*pair} - {NOT_FOUND, NOT_GOLD}, count))
    common = [label for label, _ in counts.most_common(_LABELS)]
    names = [*common, *([_OTHER] if len(counts) > _LABELS else [])]
    known = {*common, NOT_FOUND, NOT_GOLD}
    pooled = Counter[tuple[str, str]]()
    for (gold, predicted), count in pairs.items():
        one, other = (label if label in known else _OTHER for label in (gold, predicted))
        pooled[one, other] += count
    rows = []
    for gold in [*names, NOT_GOLD]:
        row = [pooled[gold, predicted] for predicted in [*names, NOT_FOUND]]
        rows.append((gold, [(count, count / (sum(row) or 1)) for count in row]))
    return {"columns": [*names, NOT_FOUND], "rows": rows}


def _examples(
    documents: Sequence[Document], answers: Mapping[str, Any], limit: int
) -> list[_Shown]:
    shown = []
    for document in documents:
        if document.id in answers:
            records, problems = parts_of(answers[document.id], document)
            shown.append(_Shown(document.text, records, problems))
    return sorted(shown, key=lambda one: not one.problems)[:limit]
