"""Scores the answers of one system against the gold records of some data sets."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import get_args

import numpy as np
from numpy.typing import NDArray

from ..records import Document, Problem, Record
from .counts import AnswerCounts, Counts, DatasetScore
from .matching import Answer, Answers, Documents, Items, Match, items_of, parts_of, tasks_of, usable
from .report import ScoreReport
from .seen_labels import SeenLabels

# Problems of the form of an answer; an empty list with words behind it could be read.
_OF_FORM = frozenset({"malformed", "truncated", "extra_text"})


def score(
    documents: Documents,
    answers: Answers,
    *,
    match: Match = "text",
    seen: SeenLabels | None = None,
    identification: bool = False,
) -> ScoreReport:
    """Score the answers of one system against the gold records of some data sets.

    Args:
        documents: For each data set, its documents with their gold records.
        answers: For each data set, the answer to each document by its id: an object with `records`
            and `problems`, or records alone. The gold records of other documents are missed.
        match: Compare mentions by "text" or by "offsets"; see `scoring.matching`.
        seen: The table of seen labels; None: the one in the package, which is not used, with a
            note in the report, for a data set that has other gold labels.
        identification: Compare items without labels and roles. Low F1 with high identification
            means that mentions are found and called by other names.

    Returns:
        The report: `report.average_f1()`, `report.table()`, `report.to_json()`.

    Raises:
        ValueError: If two documents of a data set share an id, an answer belongs to no document or
            cannot be read, a mention has no offsets to match by, or a table that was passed knows
            a data set but not one of its gold labels.
    """
    if match not in get_args(Match):
        raise ValueError(f'There is no match by `{match}`. Choose "text" or "offsets".')
    if unknown := [name for name in answers if name not in documents]:
        raise ValueError(
            f"There are answers for data set `{unknown[0]}`, but no documents of it. Pass them."
        )
    table = SeenLabels({}, {}) if identification else SeenLabels.load() if seen is None else seen
    scores: list[DatasetScore] = []
    counted: dict[str, AnswerCounts] = {}
    notes: list[str] = []
    for name, gold in documents.items():
        ids = _ids(name, gold, answers.get(name, {}))
        tallies, counted[name] = _count(gold, answers.get(name, {}), match, identification)
        of_set = table.seen.get(name)
        if of_set is not None and (note := _unknown_gold_label(name, tallies, table)):
            if seen is not None:
                raise ValueError(
                    note + 'Add it to the "seen" or the "unseen" list of the data set.'
                )
            notes.append(note + "The data set gets no split by seen labels; pass a table with it.")
            of_set = None
        scores += [tally.score(name, task, ids, of_set) for task, tally in tallies.items()]
    return ScoreReport(
        match, tuple(scores), counted, identification=identification, notes=tuple(notes)
    )


class _Tally:
    """The counts of one data set under one task while documents come in."""

    def __init__(self, with_roles: bool) -> None:
        self.with_roles = with_roles
        self.cells: dict[tuple[int, str], NDArray[np.int64]] = defaultdict(_three)
        self.roles: dict[str, NDArray[np.int64]] = defaultdict(_three)
        self.gold_labels: dict[str, None] = {}

    def add(self, row: int, gold: Items, predicted: Items) -> None:
        """Count the items of one document."""
        for item in gold | predicted:
            label = str(item[0])
            tp = min(gold[item], predicted[item])
            three = (tp, predicted[item] - tp, gold[item] - tp)
            self.cells[row, label] += three
            if self.with_roles:
                self.roles[str(item[2])] += three
            if gold[item]:
                self.gold_labels[label] = None

    def score(
        self, dataset: str, task: str, ids: tuple[str, ...], seen: Mapping[str, str] | None
    ) -> DatasetScore:
        labels = tuple(dict.fromkeys([*self.gold_labels, *(label for _, label in self.cells)]))
        column = {label: i for i, label in enumerate(labels)}
        counts = np.zeros((len(ids), len(labels), 3), dtype=np.int64)
        for (row, label), cell in self.cells.items():
            counts[row, column[label]] = cell
        roles = {role: Counts(*three.tolist()) for role, three in self.roles.items()}
        is_seen = None if seen is None else tuple(label in seen for label in labels)
        return DatasetScore(dataset, task, labels, is_seen, ids, counts, roles)


def _unknown_gold_label(name: str, tallies: Mapping[str, _Tally], table: SeenLabels) -> str:
    """The message where the table has a data set, but not all its gold labels."""
    labels = (label for tally in tallies.values() for label in tally.gold_labels)
    for label in labels:
        if not table.knows(name, label):
            return f"The table of seen labels knows data set `{name}` but not its label `{label}`. "
    return ""


def _three() -> NDArray[np.int64]:
    return np.zeros(3, dtype=np.int64)


def _ids(
    name: str, documents: Sequence[Document], answers: Mapping[str, object]
) -> tuple[str, ...]:
    ids = Counter(document.id for document in documents)
    if repeated := [id_ for id_, n in ids.items() if n > 1]:
        raise ValueError(
            f"Data set `{name}` has two documents `{repeated[0]}`. Give each an id of its own."
        )
    if others := sorted(set(answers) - set(ids)):
        raise ValueError(
            f"Data set `{name}` has {len(others)} answers to documents it does not have, the first "
            f"`{others[0]}`. Score the answers against the documents they were given for."
        )
    return tuple(ids)


def _count(
    documents: Sequence[Document],
    answers: Mapping[str, Answer | Sequence[Record]],
    match: Match,
    identification: bool,
) -> tuple[dict[str, _Tally], AnswerCounts]:
    """The tally of each task of a data set, and what became of its answers."""
    tallies: dict[str, _Tally] = {}
    problems: Counter[str] = Counter()
    hallucinated = parse_failures = unanswered = 0
    for row, document in enumerate(documents):
        unanswered += document.id not in answers
        records, reported = parts_of(answers.get(document.id, ()), document)
        parse_failures += not records and _is_of_form(reported)
        kinds = Counter(problem.kind for problem in reported)
        reported_spans = kinds.pop("not_in_text", 0)
        kept, dropped, of_other_task = usable(records, document, not reported_spans)
        hallucinated += reported_spans + dropped
        problems.update(kinds, wrong_task=of_other_task)
        for task in tasks_of(document):
            tally = tallies.setdefault(task, _Tally(task == "EAE" and not identification))
            tally.add(
                row,
                items_of(document.records, task, match, document.id, identification),
                items_of(kept, task, match, document.id, identification),
            )
    found = {kind: n for kind, n in sorted(problems.items()) if n}
    return tallies, AnswerCounts(len(documents), unanswered, parse_failures, hallucinated, found)


def _is_of_form(problems: Sequence[Problem]) -> bool:
    kinds = {problem.kind for problem in problems}
    return kinds <= _OF_FORM and not kinds <= {"extra_text"}
