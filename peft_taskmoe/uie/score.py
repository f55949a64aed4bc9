"""How well the answers match the gold records: counts, F1, means, intervals and paired tests.

Knows records, documents and numbers. Knows nothing of models, prompts or how an answer was parsed (an answer
is anything with `records` and `problems`), and imports no torch.

What counts as one item, and when two are equal
    =====  =====================================================================
    NER    (label, mention)
    RE     (label, head mention, tail mention); the types of the arguments do not count, the direction does
    EE     (label, trigger mention)
    EAE    (label, trigger mention, role, argument mention): an argument inside a matched event. Arguments of an
           event whose label or trigger is wrong are wrong, those of a gold event that was missed are missed.
    =====  =====================================================================

    `match="text"` (the paper's): a mention is its string, and items are a multiset: a name that stands twice in the
    text and is annotated twice has to be found twice, and found once too often it is wrong once.
    `match="offsets"`: a mention is its (start, end), and items are a set.
    The label of an EAE item is the event's; each role is counted by itself as well (`DatasetScore.roles`), whatever the
    event's type. Labels of either kind add up to the same totals.
    The same item at the same place counts once in both, in gold and predicted records alike.
    The documents of an EE data set are scored as EE and as EAE, and count as two data sets in a mean; those of several
    tasks ("UIE") under each of them.
    `identification=True`: the items without their labels and roles, so NER (mention), RE (head mention, tail mention),
    EE (trigger mention), EAE (trigger mention, argument mention): what was found, whatever it was called.

Predictions with a span that is not in the text are dropped and counted as hallucinated, as in the paper: they cost
recall, not precision. A hallucinated argument drops that argument, a hallucinated trigger the whole event.

An "average F1" is the unweighted mean over the data sets that have a gold item, or have one with a seen or unseen
label. F1 is `nan` (None in JSON) where there is neither a gold nor a predicted item.
Figures are 0..1 in objects and JSON, and times 100 in tables.
"""

from __future__ import annotations

import json
import math
import zlib
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from peft_taskmoe.uie.records import Document, Entity, Event, Problem, Record, Relation, Span

if TYPE_CHECKING:
    from rich.table import Table

Match = Literal["text", "offsets"]
Split = Literal["all", "seen", "unseen"]
SPLITS: tuple[Split, ...] = get_args(Split)
# Means are taken over the data sets of these tasks; "EE+EAE" and "all" are the paper's.
GROUPS: dict[str, frozenset[str]] = {
    "NER": frozenset({"NER"}),
    "RE": frozenset({"RE"}),
    "EE": frozenset({"EE"}),
    "EAE": frozenset({"EAE"}),
    "EE+EAE": frozenset({"EE", "EAE"}),
    "all": frozenset({"NER", "RE", "EE", "EAE"}),
}
_TASK_OF_RECORD: dict[type, str] = {Entity: "NER", Relation: "RE", Event: "EE"}
# Problems of the form of an answer; an empty list with words behind it ("extra_text" alone) could still be read.
_OF_FORM = frozenset({"malformed", "truncated", "extra_text"})
_SEEN_LABELS_FILE = Path(__file__).with_name("seen_labels.json")
_CELLS_PER_BLOCK = 4_000_000  # bounds the memory of one block of resamples (32 MB of int64)


Clusters = Mapping[str, Mapping[str, str]]
"""Data set -> document id -> name of what the document is a part of."""


@runtime_checkable
class Answer(Protocol):
    """What a model answered to one document: the records that could be read, and what was wrong with the rest."""

    @property
    def records(self) -> Sequence[Record]:
        """The records."""

    @property
    def problems(self) -> Sequence[Problem]:
        """What could not be used, each with its kind."""


@dataclass(frozen=True, slots=True)
class Counts:
    """True positives, false positives and false negatives, and what follows from them.

    `precision = tp / (tp + fp)`, `recall = tp / (tp + fn)`, `f1 = 2 tp / (2 tp + fp + fn)`; each is `nan` where its
    denominator is 0.
    """

    tp: int = 0
    fp: int = 0
    fn: int = 0

    @property
    def precision(self) -> float:
        """Share of the predicted items that are gold."""
        return _ratio(self.tp, self.tp + self.fp)

    @property
    def recall(self) -> float:
        """Share of the gold items that were predicted."""
        return _ratio(self.tp, self.tp + self.fn)

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall."""
        return _ratio(2 * self.tp, 2 * self.tp + self.fp + self.fn)

    @property
    def support(self) -> int:
        """Number of gold items."""
        return self.tp + self.fn

    def to_dict(self) -> dict[str, Any]:
        """Counts and ratios, with None for what is undefined."""
        ratios = {"precision": self.precision, "recall": self.recall, "f1": self.f1}
        return {
            "tp": self.tp,
            "fp": self.fp,
            "fn": self.fn,
            **{k: _none_if_nan(v) for k, v in ratios.items()},
        }


def _ratio(numerator: int, denominator: int) -> float:
    return numerator / denominator if denominator else math.nan


def _none_if_nan(value: float) -> float | None:
    return None if math.isnan(value) else value


@dataclass(frozen=True, slots=True)
class SeenLabels:
    """Which labels of which data set a model has seen in training: a table that a person reads and changes.

    The paper's rule: a label is seen if its concept occurs in the training sets, even under another task or name.

    The file is JSON: `{"datasets": {"crossner_ai": {"seen": {"person": "wnut17 person"}, "unseen": ["field"]}}}`, each
    seen label with its reason; other keys are notes for the reader. The one in the package covers public sets, with
    the training sets it assumes; pass your own to `load` where you train on others.

    Args:
        seen: for each data set, its seen labels, each with the reason.
        unseen: for each data set, its other labels.
    """

    seen: Mapping[str, Mapping[str, str]]
    unseen: Mapping[str, tuple[str, ...]]

    @classmethod
    def load(cls, path: str | Path = _SEEN_LABELS_FILE) -> SeenLabels:
        """Read a table; without a path, the one in the package.

        Raises:
            ValueError: if the file is not such a table, or has a label in both lists of a data set.
        """
        table = json.loads(Path(path).read_text(encoding="utf-8"))
        shape = '`{"datasets": {NAME: {"seen": {LABEL: REASON}, "unseen": [LABEL]}}}`'
        if not isinstance(table, dict) or not isinstance(table.get("datasets"), dict):
            raise ValueError(f"`{path}` has no table of data sets. Write it as {shape}.")
        seen: dict[str, dict[str, str]] = {}
        unseen: dict[str, tuple[str, ...]] = {}
        for name, entry in table["datasets"].items():
            if not isinstance(entry, dict) or set(entry) != {"seen", "unseen"}:
                raise ValueError(
                    f'Data set `{name}` in `{path}` needs the keys "seen" and "unseen": {shape}.'
                )
            if not isinstance(entry["seen"], dict) or not isinstance(entry["unseen"], list):
                raise ValueError(
                    f"Data set `{name}` in `{path}` has lists of the wrong kind. Write it as {shape}."
                )
            if both := sorted(set(entry["seen"]) & set(entry["unseen"])):
                raise ValueError(
                    f"Label `{both[0]}` of data set `{name}` in `{path}` is both seen and unseen. Delete it from one list."
                )
            seen[name], unseen[name] = entry["seen"], tuple(entry["unseen"])
        return cls(seen, unseen)

    def __contains__(self, dataset: str) -> bool:
        return dataset in self.seen

    def knows(self, dataset: str, label: str) -> bool:
        """Whether the label stands in one of the lists of the data set."""
        return label in self.seen[dataset] or label in self.unseen[dataset]


@dataclass(frozen=True, eq=False)
class DatasetScore:
    """The counts of one data set under one task, by document and label.

    Args:
        dataset: name of the data set.
        task: "NER", "RE", "EE" or "EAE".
        labels: its labels: of the gold records and of the predicted ones.
        seen: for each label whether it is seen; None where the table does not know the data set.
        documents: the ids of the data set's documents.
        counts: (documents, labels, 3) integers: true positives, false positives, false negatives.
        roles: of EAE, the counts of each argument role over all documents and event types.
    """

    dataset: str
    task: str
    labels: tuple[str, ...]
    seen: tuple[bool, ...] | None
    documents: tuple[str, ...]
    counts: NDArray[np.int64]
    roles: Mapping[str, Counts] = field(default_factory=dict)

    def by_document(self, split: Split = "all") -> NDArray[np.int64] | None:
        """Counts of each document over the labels of a split.

        Returns:
            (documents, 3) integers, or None where the split has no gold item or is not known.
        """
        if split == "all":
            return np.asarray(self.counts.sum(axis=1))
        if self.seen is None:
            return None
        wanted = np.array([is_seen == (split == "seen") for is_seen in self.seen], dtype=bool)
        counts = self.counts[:, wanted].sum(axis=1)
        return np.asarray(counts) if counts[:, [0, 2]].sum() else None

    def total(self, split: Split = "all") -> Counts | None:
        """Micro-averaged counts over the labels of a split; None where `by_document` is."""
        counts = self.by_document(split)
        return None if counts is None else Counts(*(int(n) for n in counts.sum(axis=0)))

    def by_label(self) -> dict[str, Counts]:
        """Counts of each label over all documents."""
        sums = self.counts.sum(axis=0)
        return {label: Counts(*(int(n) for n in sums[i])) for i, label in enumerate(self.labels)}


@dataclass(frozen=True, slots=True)
class AnswerCounts:
    """What became of the answers of one data set.

    Args:
        documents: number of documents.
        unanswered: documents without an answer; their gold records are missed.
        parse_failures: answers from which nothing could be read although they are no empty list.
        hallucinated: predicted spans that are not in the text, dropped.
        problems: how often each other kind of problem was reported.
    """

    documents: int
    unanswered: int
    parse_failures: int
    hallucinated: int
    problems: Mapping[str, int]

    def to_dict(self) -> dict[str, Any]:
        """The counts as a dict."""
        return {
            "documents": self.documents,
            "unanswered": self.unanswered,
            "parse_failures": self.parse_failures,
            "hallucinated": self.hallucinated,
            "problems": dict(self.problems),
        }


@dataclass(frozen=True, slots=True)
class Interval:
    """A bootstrap interval: the middle `confidence` of the resampled values."""

    low: float
    high: float
    confidence: float


@dataclass(frozen=True)
class ScoreReport:
    """The scores of one system on some data sets: what `score` returns.

    Args:
        match: how mentions were compared, "text" or "offsets".
        scores: one entry for each data set and task.
        answers: for each data set, what became of the answers.
        intervals: by (row, split), where `with_intervals` was called; the rows are `(dataset, task)` and `(group,)`.
        identification: items were compared without their labels; all are counted under the label "".
    """

    match: Match
    scores: tuple[DatasetScore, ...]
    answers: Mapping[str, AnswerCounts]
    intervals: Mapping[tuple[tuple[str, ...], Split], Interval] = field(default_factory=dict)
    identification: bool = False

    def average_f1(self, group: str = "all", split: Split = "all") -> float:
        """Unweighted mean F1 over the data sets of a group of tasks.

        Args:
            group: a key of `GROUPS`: a task, "EE+EAE" or "all".
            split: all labels, the seen ones or the unseen ones.

        Returns:
            The mean over the data sets with a gold item in the split; `nan` where none has one.
        """
        totals = [
            total for score in self._of(group) if (total := score.total(split)) and total.support
        ]
        return sum(total.f1 for total in totals) / len(totals) if totals else math.nan

    def _of(self, group: str) -> list[DatasetScore]:
        if group not in GROUPS:
            raise ValueError(
                f"There is no group `{group}` of tasks. Choose one of {', '.join(GROUPS)}."
            )
        return [score for score in self.scores if score.task in GROUPS[group]]

    def groups(self) -> list[str]:
        """The groups that have a data set, without those that repeat one of fewer tasks."""
        members = {group: tuple(map(id, self._of(group))) for group in GROUPS}
        present = [group for group in GROUPS if members[group]]
        return [
            g
            for g in present
            if g == "all" or members[g] not in [members[h] for h in present[: present.index(g)]]
        ]

    def select(self, datasets: Iterable[str]) -> ScoreReport:
        """The report of some of the data sets, e.g. the zero-shot ones; without intervals.

        Raises:
            ValueError: if a name is not in the report.
        """
        names = list(datasets)
        if missing := [name for name in names if name not in self.answers]:
            raise ValueError(
                f"Data set `{missing[0]}` is not in the report, which has {', '.join(self.answers)}."
            )
        return ScoreReport(
            self.match,
            tuple(score for score in self.scores if score.dataset in names),
            {name: counts for name, counts in self.answers.items() if name in names},
            identification=self.identification,
        )

    def with_intervals(
        self,
        n_resamples: int = 2000,
        confidence: float = 0.95,
        seed: int = 0,
        clusters: Clusters | None = None,
    ) -> ScoreReport:
        """The same report with percentile bootstrap intervals for every F1 and every mean of F1.

        The documents of each data set are drawn with replacement, `n_resamples` times; a mean's resample is the mean
        of its data sets' resamples. Resamples without a gold item are left out.

        Source: Efron & Tibshirani, "An Introduction to the Bootstrap" (1993), ch. 13.

        Args:
            n_resamples: number of resamples.
            confidence: width of the interval, between 0 and 1.
            seed: same seed, same intervals; those of a data set do not depend on the others.
            clusters: as in `compare`.
        """
        _check_resampling(n_resamples, confidence)
        resampled = _resampled_f1([self], n_resamples, seed, clusters)
        intervals = {
            key: interval
            for key, values in resampled[0].items()
            if (interval := _percentiles(values, confidence)) is not None
        }
        return replace(self, intervals=intervals)

    def values(self) -> dict[tuple[tuple[str, ...], Split], float]:
        """Every F1 with a gold item behind it, by (row, split): rows `(dataset, task)` and, for means, `(group,)`."""
        out: dict[tuple[tuple[str, ...], Split], float] = {}
        for score in self.scores:
            for split in SPLITS:
                if (total := score.total(split)) and total.support:
                    out[(score.dataset, score.task), split] = total.f1
        for group in self.groups():
            for split in SPLITS:
                if not math.isnan(mean := self.average_f1(group, split)):
                    out[(group,), split] = mean
        return out

    def to_dict(self, documents: bool = False) -> dict[str, Any]:
        """All figures as JSON-ready dicts.

        Args:
            documents: also the counts of every document, from which `from_dict` restores the report, so that
                two systems scored in different runs can be compared.
        """

        def with_interval(
            row: tuple[str, ...], split: Split, figures: dict[str, Any]
        ) -> dict[str, Any]:
            interval = self.intervals.get((row, split))
            return figures | ({"f1_interval": [interval.low, interval.high]} if interval else {})

        out: dict[str, Any] = {"match": self.match, "identification": self.identification}
        out |= {"datasets": [], "average_f1": {}, "answers": {}}
        if self.intervals:
            out["confidence"] = next(iter(self.intervals.values())).confidence
        for score in self.scores:
            row = (score.dataset, score.task)
            entry: dict[str, Any] = {"dataset": score.dataset, "task": score.task}
            for split in SPLITS:
                total = score.total(split)
                entry[split] = None if total is None else with_interval(row, split, total.to_dict())
            seen = score.seen or [None] * len(score.labels)
            counts = score.by_label().items()
            entry["labels"] = {
                label: c.to_dict() | {"seen": known}
                for (label, c), known in zip(counts, seen, strict=True)
            }
            if score.roles:
                entry["roles"] = {role: of_role.to_dict() for role, of_role in score.roles.items()}
            if documents:
                entry["documents"] = [
                    [
                        name,
                        {
                            score.labels[i]: score.counts[d, i].tolist()
                            for i in np.flatnonzero(score.counts[d].any(-1))
                        },
                    ]
                    for d, name in enumerate(score.documents)
                ]
            out["datasets"].append(entry)
        for group in self.groups():
            means = {split: {"f1": _none_if_nan(self.average_f1(group, split))} for split in SPLITS}
            out["average_f1"][group] = {
                split: with_interval((group,), split, means[split]) for split in SPLITS
            }
        out["answers"] = {name: counts.to_dict() for name, counts in self.answers.items()}
        return out

    @classmethod
    def from_dict(cls, figures: Mapping[str, Any]) -> ScoreReport:
        """The report that wrote `to_dict(documents=True)`; intervals are not restored, they follow from the seed.

        Raises:
            ValueError: if the counts of the documents were not written.
        """
        scores = []
        for entry in figures["datasets"]:
            if "documents" not in entry:
                raise ValueError(
                    f"The figures of `{entry['dataset']}` have no counts by document, which a comparison needs. "
                    "Write them with `to_dict(documents=True)`."
                )
            column = {label: i for i, label in enumerate(entry["labels"])}
            counts = np.zeros((len(entry["documents"]), len(column), 3), dtype=np.int64)
            for d, (_, by_label) in enumerate(entry["documents"]):
                for label, three in by_label.items():
                    counts[d, column[label]] = three
            seen = tuple(figures["seen"] for figures in entry["labels"].values())
            scores.append(
                DatasetScore(
                    entry["dataset"],
                    entry["task"],
                    tuple(entry["labels"]),
                    None if None in seen else seen,
                    tuple(name for name, _ in entry["documents"]),
                    counts,
                    {
                        role: Counts(c["tp"], c["fp"], c["fn"])
                        for role, c in entry.get("roles", {}).items()
                    },
                )
            )
        return cls(
            figures["match"],
            tuple(scores),
            {name: AnswerCounts(**counts) for name, counts in figures["answers"].items()},
            identification=figures.get("identification", False),
        )

    def to_json(self, documents: bool = False) -> str:
        """`to_dict` as a JSON text."""
        return json.dumps(self.to_dict(documents), ensure_ascii=False, indent=1, allow_nan=False)

    def table(self, labels: bool = False) -> Table:
        """A table for the terminal: `rich.print(report.table())`.

        Args:
            labels: one row for each label, and each argument role, instead of one for each data set.
        """
        return _rich_table(*(self._label_rows() if labels else self._rows()))

    def to_markdown(self, labels: bool = False) -> str:
        """The same table as Markdown."""
        return _markdown_table(*(self._label_rows() if labels else self._rows())[1:])

    def _rows(self) -> tuple[str, list[str], list[list[str]]]:
        def f1(row: tuple[str, ...], split: Split, value: float) -> str:
            interval = self.intervals.get((row, split))
            return _percent(value) + (
                f" [{_percent(interval.low)}, {_percent(interval.high)}]" if interval else ""
            )

        header = ["task", "data set", "documents", "P", "R", "F1", "F1 seen", "F1 unseen"]
        header += ["parse failures", "hallucinated", "unanswered"]
        rows = []
        for score in self.scores:
            answers, total, row = (
                self.answers[score.dataset],
                score.total() or Counts(),
                (score.dataset, score.task),
            )
            splits = [f1(row, split, (score.total(split) or Counts()).f1) for split in SPLITS]
            counted = [
                str(n) for n in (answers.parse_failures, answers.hallucinated, answers.unanswered)
            ]
            figures = [
                str(answers.documents),
                _percent(total.precision),
                _percent(total.recall),
                *splits,
            ]
            rows.append([score.task, score.dataset, *figures, *counted])
        for group in self.groups():
            splits = [f1((group,), split, self.average_f1(group, split)) for split in SPLITS]
            rows.append([group, "mean", "", "", "", *splits, "", "", ""])
        return f"{self._measure}, match by {self.match}", header, rows

    @property
    def _measure(self) -> str:
        return "F1 of identification" if self.identification else "Strict F1"

    def _label_rows(self) -> tuple[str, list[str], list[list[str]]]:
        rows = []
        for score in self.scores:
            seen = [
                "" if score.seen is None else ("yes" if s else "no")
                for s in score.seen or [None] * len(score.labels)
            ]
            figures = [*zip(score.by_label().items(), seen, strict=True)]
            figures += [((f"role {role}", counts), "") for role, counts in score.roles.items()]
            for (label, counts), known in figures:
                ratios = [_percent(value) for value in (counts.precision, counts.recall, counts.f1)]
                rows.append([score.task, score.dataset, label, known, str(counts.support), *ratios])
        header = ["task", "data set", "label", "seen", "gold", "P", "R", "F1"]
        return f"{self._measure} by label, match by {self.match}", header, rows


def score(
    documents: Mapping[str, Sequence[Document]],
    answers: Mapping[str, Mapping[str, Answer | Sequence[Record]]],
    *,
    match: Match = "text",
    seen: SeenLabels | None = None,
    identification: bool = False,
) -> ScoreReport:
    """Score the answers of one system against the gold records of some data sets.

    Args:
        documents: for each data set, its documents with their gold records.
        answers: for each data set, the answer to each document by its id: an object with `records` and `problems`,
            or records alone. Documents without one count as unanswered, and their gold records as missed.
        match: compare mentions by "text" or by "offsets"; the module's docstring says what is compared.
        seen: the table of seen labels; None: the one in the package. Data sets it does not have get no split.
        identification: compare items without labels and roles. Low F1 with high identification means that the
            mentions are found and called by other names. There is no split by seen labels then.

    Returns:
        The report: `report.average_f1()`, `report.table()`, `report.to_json()`.

    Raises:
        ValueError: if two documents of a data set share an id, an answer belongs to no document, a mention has no
            offsets to match by, or a gold label of a known data set is missing in the table of seen labels.
    """
    if match not in get_args(Match):
        raise ValueError(f'There is no match by `{match}`. Choose "text" or "offsets".')
    if unknown := [name for name in answers if name not in documents]:
        raise ValueError(
            f"There are answers for data set `{unknown[0]}`, but no documents of it. Pass its documents."
        )
    table = SeenLabels({}, {}) if identification else SeenLabels.load() if seen is None else seen
    scores: list[DatasetScore] = []
    counted: dict[str, AnswerCounts] = {}
    for name, gold in documents.items():
        of_dataset, counted[name] = _score_dataset(
            name, gold, answers.get(name, {}), match, table, identification
        )
        scores += of_dataset
    return ScoreReport(match, tuple(scores), counted, identification=identification)


def _score_dataset(
    name: str,
    documents: Sequence[Document],
    answers: Mapping[str, Answer | Sequence[Record]],
    match: Match,
    table: SeenLabels,
    identification: bool,
) -> tuple[list[DatasetScore], AnswerCounts]:
    ids = tuple(document.id for document in documents)
    if len(set(ids)) < len(ids):
        repeated = next(id_ for id_, n in Counter(ids).items() if n > 1)
        raise ValueError(
            f"Data set `{name}` has two documents `{repeated}`, so their answers cannot be told apart."
        )
    if strays := sorted(set(answers) - set(ids)):
        raise ValueError(
            f"Data set `{name}` has {len(strays)} answers to documents it does not have, the first `{strays[0]}`. "
            "Score the answers against the documents they were given for."
        )
    cells: dict[str, dict[tuple[int, str], list[int]]] = {}
    roles: dict[str, list[int]] = {}
    gold_labels: dict[str, dict[str, None]] = {}
    hallucinated = parse_failures = 0
    problems: Counter[str] = Counter()
    for row, document in enumerate(documents):
        answer = answers.get(document.id, ())
        records, reported = (
            (answer.records, answer.problems) if isinstance(answer, Answer) else (answer, ())
        )
        kinds = Counter(problem.kind for problem in reported)
        parse_failures += (
            not records and set(kinds) <= _OF_FORM and not set(kinds) <= {"extra_text"}
        )
        reported_spans = kinds.pop("not_in_text", 0)
        problems.update(kinds)
        kept, dropped, of_other_task = _usable(
            records, document, count_not_found=not reported_spans
        )
        hallucinated += reported_spans + dropped
        if of_other_task:
            problems["wrong_task"] += of_other_task
        for task in _tasks(document):
            named_roles = task == "EAE" and not identification
            of_task = cells.setdefault(task, {})
            labels = gold_labels.setdefault(task, {})
            gold_items, items = (
                _items(records, task, match, document.id, identification)
                for records in (document.records, kept)
            )
            for item in gold_items | items:
                label = str(item[0])
                n_gold, n_predicted = gold_items[item], items[item]
                tp = min(n_gold, n_predicted)
                cell = of_task.setdefault((row, label), [0, 0, 0])
                of_role = roles.setdefault(str(item[2]), [0, 0, 0]) if named_roles else [0, 0, 0]
                for i, n in enumerate((tp, n_predicted - tp, n_gold - tp)):
                    cell[i] += n
                    of_role[i] += n
                if n_gold:
                    labels[label] = None
    scores = []
    for task, of_task in cells.items():
        labels = gold_labels[task]
        if name in table and (
            strangers := [label for label in labels if not table.knows(name, label)]
        ):
            raise ValueError(
                f"The table of seen labels knows data set `{name}` but not its label `{strangers[0]}`. "
                'Add the label to the "seen" or the "unseen" list of the data set.'
            )
        names = [*labels, *dict.fromkeys(label for _, label in of_task if label not in labels)]
        column = {label: i for i, label in enumerate(names)}
        counts = np.zeros((len(ids), len(names), 3), dtype=np.int64)
        for (row, label), cell in of_task.items():
            counts[row, column[label]] = cell
        is_seen = tuple(label in table.seen[name] for label in names) if name in table else None
        by_role = (
            {role: Counts(*of_role) for role, of_role in roles.items()} if task == "EAE" else {}
        )
        scores.append(DatasetScore(name, task, tuple(names), is_seen, ids, counts, by_role))
    unanswered = sum(id_ not in answers for id_ in ids)
    return scores, AnswerCounts(
        len(ids), unanswered, parse_failures, hallucinated, dict(sorted(problems.items()))
    )


def _tasks(document: Document) -> tuple[str, ...]:
    """The tasks a document is scored under: of all its records, and events also by their arguments."""
    if document.task == "EAE":
        return ("EAE",)
    tasks = document.schema.tasks if document.task == "UIE" else (document.task,)
    return (*tasks, "EAE") if "EE" in tasks else tasks


def _usable(
    records: Sequence[Record], document: Document, count_not_found: bool
) -> tuple[list[Record], int, int]:
    """The predicted records that can be scored, and what was dropped.

    Args:
        records: what was predicted.
        document: the text and the tasks.
        count_not_found: count spans whose alignment is "not_found"; not where the parser has reported them already.

    Returns:
        The records of the document's tasks with spans of its text, the number of other spans, that of other records.
    """
    asked = {"EE" if task == "EAE" else task for task in _tasks(document)}
    kept: list[Record] = []
    dropped = of_other_task = 0

    def in_text(span: Span) -> bool:
        nonlocal dropped
        if span.alignment == "not_found":
            dropped += count_not_found
            return False
        found = span.start is not None or span.text in document.text
        dropped += not found
        return found

    for record in records:
        if _TASK_OF_RECORD[type(record)] not in asked:
            of_other_task += 1
        elif isinstance(record, Entity):
            if in_text(record.span):
                kept.append(record)
        elif isinstance(record, Relation):
            if all([in_text(record.head), in_text(record.tail)]):  # both, so that both are counted
                kept.append(record)
        else:
            arguments = tuple(argument for argument in record.arguments if in_text(argument.span))
            if in_text(record.trigger):
                kept.append(replace(record, arguments=arguments))
    return kept, dropped, of_other_task


def _items(
    records: Iterable[Record], task: str, match: Match, document: str, identification: bool = False
) -> Counter[tuple[Hashable, ...]]:
    """The multiset of items of a task, each place once; the label comes first in each item, "" for identification."""
    items: Counter[tuple[Hashable, ...]] = Counter()
    places: set[tuple[Hashable, ...]] = set()

    def add(*parts: str | Span) -> None:
        spans = [part for part in parts if isinstance(part, Span)]
        if identification:
            parts = ("", *spans)
        if all(span.start is not None for span in spans):
            place = tuple(
                (part.start, part.end) if isinstance(part, Span) else part for part in parts
            )
            if place in places:
                return
            places.add(place)
        elif match == "offsets":
            unplaced = next(span for span in spans if span.start is None)
            raise ValueError(
                f"The mention {unplaced.text!r} in document `{document}` has no offsets, so it cannot be matched by "
                'them. Align the answer to its text first, or pass match="text".'
            )
        by_text = tuple(part.text if isinstance(part, Span) else part for part in parts)
        items[place if match == "offsets" else by_text] += 1

    for record in records:
        if isinstance(record, Entity):
            if task == "NER":
                add(record.label, record.span)
        elif isinstance(record, Relation):
            if task == "RE":
                add(record.label, record.head, record.tail)
        elif task == "EE":
            add(record.label, record.trigger)
        elif task == "EAE":
            for argument in record.arguments:
                add(record.label, record.trigger, argument.role, argument.span)
    return items


@dataclass(frozen=True, slots=True)
class Difference:
    """One line of a comparison: system `a` against system `b` on one data set, or on the mean of some.

    Args:
        row: `(dataset, task)`, `(dataset,)` or, for a mean, `(group,)`.
        split: all labels, the seen or the unseen ones.
        a: value of system a.
        b: value of system b.
        low: lower end of the interval of `a - b`.
        high: upper end of it.
        p: two-sided p value of "there is no difference".
    """

    row: tuple[str, ...]
    split: Split
    a: float
    b: float
    low: float
    high: float
    p: float

    @property
    def difference(self) -> float:
        """`a - b`."""
        return self.a - self.b

    def to_dict(self) -> dict[str, Any]:
        """The line as a dict."""
        out: dict[str, Any] = {"row": list(self.row), "split": self.split, "a": self.a, "b": self.b}
        interval = [_none_if_nan(self.low), _none_if_nan(self.high)]
        return out | {"difference": self.difference, "interval": interval, "p": self.p}


@dataclass(frozen=True)
class Comparison:
    """Two systems on the same documents: what `compare` and `compare_values` return.

    Args:
        differences: one for each data set and mean, and each split.
        n_resamples: number of bootstrap resamples.
        confidence: width of the intervals.
        unit: what the values are, for the tables: "F1" (shown times 100) or "value".
    """

    differences: tuple[Difference, ...]
    n_resamples: int
    confidence: float
    unit: Literal["F1", "value"]

    def __getitem__(self, key: str | tuple[str, ...]) -> Difference:
        """The line of a row, e.g. `comparison["all"]`, `comparison["wnut17", "NER"]`, `comparison["all", "unseen"]`."""
        row = (key,) if isinstance(key, str) else key
        wanted: tuple[tuple[str, ...], str] = (row, "all")
        if row and row[-1] in SPLITS and len(row) > 1:
            wanted = (row[:-1], row[-1])
        for line in self.differences:
            if (line.row, line.split) == wanted:
                return line
        raise KeyError(key)

    def to_dict(self) -> dict[str, Any]:
        """The comparison as JSON-ready dicts."""
        return {
            "unit": self.unit,
            "n_resamples": self.n_resamples,
            "confidence": self.confidence,
            "differences": [line.to_dict() for line in self.differences],
        }

    def to_json(self) -> str:
        """`to_dict` as a JSON text."""
        return json.dumps(self.to_dict(), ensure_ascii=False, indent=1, allow_nan=False)

    def table(self) -> Table:
        """A table for the terminal: `rich.print(comparison.table())`."""
        return _rich_table(*self._rows())

    def to_markdown(self) -> str:
        """The same table as Markdown."""
        return _markdown_table(*self._rows()[1:])

    def _rows(self) -> tuple[str, list[str], list[list[str]]]:
        show = _percent if self.unit == "F1" else "{:.4f}".format
        rows = []
        for line in self.differences:
            interval = f"[{show(line.low)}, {show(line.high)}]"
            values = [show(line.a), show(line.b), show(line.difference), interval, f"{line.p:.4f}"]
            rows.append([" ".join(line.row), line.split, *values])
        header = ["data set", "labels", "a", "b", "a - b", f"{self.confidence:.0%} interval", "p"]
        return f"Paired bootstrap of {self.unit}, {self.n_resamples} resamples", header, rows


def compare(
    a: ScoreReport | Sequence[ScoreReport],
    b: ScoreReport | Sequence[ScoreReport],
    *,
    n_resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
    clusters: Clusters | None = None,
) -> Comparison:
    """Paired bootstrap test of F1 between two systems on the same documents.

    Both systems are scored on the same resampled documents. With d the observed difference and d* those of the B
    resamples, the interval holds the middle `confidence` of d*, and `p = (1 + #{|d* - d| >= |d|}) / (1 + B)`: d*
    shifted to the null hypothesis of no difference. A mean's resample is the mean of its data sets' resamples. The
    p values are not corrected for the number of lines.

    Source: Efron & Tibshirani (1993), ch. 16; Berg-Kirkpatrick, Burkett & Klein (EMNLP 2012).

    Args:
        a: report of the first system, or one report for each of its seeds: F1 is then the mean over the seeds, and the
            interval speaks of other documents, not of other seeds.
        b: report of the second system, likewise.
        n_resamples: number of resamples.
        confidence: width of the intervals, between 0 and 1.
        seed: seed of the resampling.
        clusters: for each data set whose documents are not independent, what each document by its id is a part of, e.g. its article:
            whole clusters are drawn then. Documents without one are drawn by themselves.

    Raises:
        ValueError: if the reports are not of the same documents and gold records, or a cluster names no document.
    """
    _check_resampling(n_resamples, confidence)
    of_a = [a] if isinstance(a, ScoreReport) else list(a)
    of_b = [b] if isinstance(b, ScoreReport) else list(b)
    if not of_a or not of_b:
        raise ValueError(
            "A system without a report cannot be compared. Pass at least one report for each system."
        )
    reports = of_a + of_b
    for report in reports[1:]:
        _check_same_documents(reports[0], report)
    resampled = _resampled_f1(reports, n_resamples, seed, clusters)
    values = [report.values() for report in reports]
    lines = []
    for row, split in values[0]:
        observed = np.array([v[row, split] for v in values])
        drawn = np.stack([r[row, split] for r in resampled])
        of_systems = [slice(0, len(of_a)), slice(len(of_a), None)]
        value_a, value_b = (float(observed[s].mean()) for s in of_systems)
        drawn_a, drawn_b = (drawn[s].mean(axis=0) for s in of_systems)
        lines.append(_difference(row, split, value_a, value_b, drawn_a - drawn_b, confidence))
    return Comparison(tuple(lines), n_resamples, confidence, "F1")


def compare_values(
    a: Mapping[str, Mapping[str, float]],
    b: Mapping[str, Mapping[str, float]],
    *,
    weights: Mapping[str, Mapping[str, float]] | None = None,
    n_resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
    clusters: Clusters | None = None,
) -> Comparison:
    """Paired bootstrap test of a real number per document, e.g. the negative log-likelihood of its gold answer.

    The value of a data set is the weighted mean `sum(w v) / sum(w)` over its documents, that of the row `("all",)` the
    unweighted mean over data sets. Resampling, interval and p as in `compare`.

    Args:
        a: for each data set, the first system's value of each document by its id.
        b: the second system's, for the same documents.
        weights: for each data set, the weight of each document, e.g. its number of answer tokens where the values
            are means over tokens; None: all documents weigh the same.
        n_resamples: number of resamples.
        confidence: width of the intervals, between 0 and 1.
        seed: seed of the resampling.
        clusters: as in `compare`.

    Raises:
        ValueError: if the systems do not have the same documents, a value is not finite, a weight not positive, or a cluster names no
            document.
    """
    _check_resampling(n_resamples, confidence)
    if set(a) != set(b) or not a:
        raise ValueError(
            f"The systems have different data sets: {sorted(a)} and {sorted(b)}. Compare them on the same."
        )
    observed: list[tuple[float, float]] = []
    drawn: list[tuple[NDArray[np.float64], NDArray[np.float64]]] = []
    lines = []
    for name in a:
        weight = dict.fromkeys(a[name], 1.0) if weights is None else weights.get(name, {})
        if set(a[name]) != set(b[name]) or not a[name]:
            raise ValueError(
                f"The systems have different documents of `{name}`, or none. Compare them on the same."
            )
        if lacking := [id_ for id_ in a[name] if not weight.get(id_, 0) > 0]:
            raise ValueError(
                f"Document `{lacking[0]}` of `{name}` has no positive weight. Give one, or drop the document."
            )
        columns = np.array(
            [[weight[i], weight[i] * a[name][i], weight[i] * b[name][i]] for i in a[name]]
        )
        if not np.isfinite(columns).all():
            broken = list(a[name])[int(np.flatnonzero(~np.isfinite(columns).all(axis=1))[0])]
            raise ValueError(
                f"Document `{broken}` of `{name}` has a value that is not finite, so no mean can be taken."
            )
        total = columns.sum(axis=0)
        sums = _resampled_sums(
            _by_cluster(columns, name, list(a[name]), clusters), n_resamples, name, seed
        )
        observed.append((total[1] / total[0], total[2] / total[0]))
        drawn.append((sums[:, 1] / sums[:, 0], sums[:, 2] / sums[:, 0]))
        lines.append(
            _difference((name,), "all", *observed[-1], drawn[-1][0] - drawn[-1][1], confidence)
        )
    value_a, value_b = (float(np.mean([values[s] for values in observed])) for s in (0, 1))
    mean_a, mean_b = (np.mean([values[s] for values in drawn], axis=0) for s in (0, 1))
    lines.append(_difference(("all",), "all", value_a, value_b, mean_a - mean_b, confidence))
    return Comparison(tuple(lines), n_resamples, confidence, "value")


def _difference(
    row: tuple[str, ...],
    split: Split,
    a: float,
    b: float,
    drawn: NDArray[np.float64],
    confidence: float,
) -> Difference:
    drawn = drawn[~np.isnan(drawn)]
    interval = _percentiles(drawn, confidence) or Interval(math.nan, math.nan, confidence)
    # Rounding errors must not hide a resample that equals the observed difference.
    as_far = int((np.abs(drawn - (a - b)) >= abs(a - b) - 1e-12).sum())
    return Difference(
        row, split, float(a), float(b), interval.low, interval.high, (1 + as_far) / (1 + len(drawn))
    )


def _check_resampling(n_resamples: int, confidence: float) -> None:
    if n_resamples < 1 or not 0 < confidence < 1:
        raise ValueError(
            f"Found n_resamples={n_resamples} and confidence={confidence}. "
            "Pass at least one resample and a confidence between 0 and 1, e.g. 0.95."
        )


def _check_same_documents(a: ScoreReport, b: ScoreReport) -> None:
    """Raise where two reports are not of the same documents, gold records, match and seen labels."""
    advice = "Score both systems on the same documents in the same way."
    if a.match != b.match:
        raise ValueError(f"One report matches by {a.match}, the other by {b.match}. {advice}")
    if a.identification != b.identification:
        raise ValueError(f"Only one report is of identification, without labels. {advice}")
    rows_a = {(score.dataset, score.task): score for score in a.scores}
    rows_b = {(score.dataset, score.task): score for score in b.scores}
    if set(rows_a) != set(rows_b):
        different = sorted(set(rows_a) ^ set(rows_b))[0]
        raise ValueError(
            f"Only one report has data set `{different[0]}` under {different[1]}. {advice}"
        )
    for row, score_a in rows_a.items():
        score_b = rows_b[row]
        for split in SPLITS:
            counts = [score.by_document(split) for score in (score_a, score_b)]
            gold = [None if c is None else (c[:, 0] + c[:, 2]).tolist() for c in counts]
            if score_a.documents != score_b.documents or gold[0] != gold[1]:
                raise ValueError(
                    f"The reports have different documents or gold records of `{row[0]}`. {advice}"
                )


def _resampled_f1(
    reports: Sequence[ScoreReport], n_resamples: int, seed: int, clusters: Clusters | None
) -> list[dict[tuple[tuple[str, ...], Split], NDArray[np.float64]]]:
    """For each report, n_resamples values of each F1 and mean, drawn with the same documents for all reports."""
    out: list[dict[tuple[tuple[str, ...], Split], NDArray[np.float64]]] = [{} for _ in reports]
    for name in reports[0].answers:
        keys: list[tuple[int, tuple[str, ...], Split]] = []
        columns = []
        ids: Sequence[str] = ()
        for i, report in enumerate(reports):
            for score in report.scores:
                for split in SPLITS:
                    if score.dataset == name and (counts := score.by_document(split)) is not None:
                        keys.append((i, (name, score.task), split))
                        columns.append(counts)
                        ids = score.documents
        if not columns:
            continue
        together = _by_cluster(np.hstack(columns), name, ids, clusters)
        sums = _resampled_sums(together, n_resamples, name, seed).reshape(n_resamples, len(keys), 3)
        twice_tp = 2 * sums[..., 0]
        denominator = twice_tp + sums[..., 1] + sums[..., 2]
        has_gold = (
            sums[..., 0] + sums[..., 2] > 0
        )  # the same for all systems, whatever they predicted
        f1 = np.divide(
            twice_tp, denominator, out=np.full(denominator.shape, np.nan), where=has_gold
        )
        for k, (i, row, split) in enumerate(keys):
            out[i][row, split] = f1[:, k]
    for report, values in zip(reports, out, strict=True):
        scored = report.values()
        for group in report.groups():
            rows = [(score.dataset, score.task) for score in report._of(group)]
            for split in SPLITS:
                if members := [values[row, split] for row in rows if (row, split) in scored]:
                    values[(group,), split] = _mean_without_nan(np.stack(members))
    return out


def _mean_without_nan(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over the first axis of what is not nan; nan where all is."""
    defined = ~np.isnan(values)
    sums = np.where(defined, values, 0.0).sum(axis=0)
    n = defined.sum(axis=0)
    return np.divide(sums, n, out=np.full(sums.shape, np.nan), where=n > 0)


def _by_cluster(
    columns: NDArray[Any], dataset: str, ids: Sequence[str], clusters: Clusters | None
) -> NDArray[Any]:
    """Sum the rows `(documents, columns)` of documents that are drawn together."""
    of_document = (clusters or {}).get(dataset, {})
    if unknown := set(of_document) - set(ids):
        raise ValueError(
            f"`clusters` has document `{sorted(unknown)[0]}` of `{dataset}`, which was not scored. Name the documents that were."
        )
    names = [(1, of_document[id_]) if id_ in of_document else (0, id_) for id_ in ids]
    places = {name: place for place, name in enumerate(dict.fromkeys(names))}
    sums = np.zeros((len(places), columns.shape[1]), dtype=columns.dtype)
    np.add.at(sums, [places[name] for name in names], columns)
    return sums


def _resampled_sums(
    columns: NDArray[Any], n_resamples: int, name: str, seed: int
) -> NDArray[np.float64]:
    """Column sums over documents drawn with replacement.

    Args:
        columns: (documents, columns).
        n_resamples: number of resamples.
        name: the data set's name: each draws from its own stream, so that it does not depend on the others.
        seed: the seed.

    Returns:
        (n_resamples, columns).
    """
    n = len(columns)
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    block = max(1, _CELLS_PER_BLOCK // n)
    sums = []
    for size in _blocks(n_resamples, block):
        drawn = rng.integers(n, size=(size, n)) + n * np.arange(size)[:, None]
        times_drawn = np.bincount(drawn.ravel(), minlength=size * n).reshape(size, n)
        sums.append(times_drawn @ columns.astype(np.float64))
    return np.concatenate(sums)


def _blocks(total: int, size: int) -> Iterator[int]:
    for start in range(0, total, size):
        yield min(size, total - start)


def _percentiles(values: NDArray[np.float64], confidence: float) -> Interval | None:
    defined = values[~np.isnan(values)]
    if not len(defined):
        return None
    low, high = np.quantile(defined, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(low), float(high), confidence)


def _percent(value: float) -> str:
    return "" if math.isnan(value) else f"{100 * value:.1f}"


def _rich_table(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=title)
    for i, name in enumerate(header):
        table.add_column(name, justify="left" if i < 2 else "right")
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def _markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return (
        "\n".join(
            "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
        )
        + "\n"
    )
