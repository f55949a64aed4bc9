"""The way of a text from its questions over prompts and batches to its extraction."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from ..records import Event, Problem, Record, record_key, shift_record
from ..scoring.calibration import Calibration
from .prompts import PromptWindow
from .questions import Question, Thresholds
from .results import Answer, Extraction
from .windows import Window, every_place, merge_windows

_MOST_BATCHES = 32  # that are read ahead, so that prompts of like length share a generation


@dataclass(slots=True, eq=False)
class Job:
    """One prompt to be answered.

    Attributes:
        question: The question.
        part: The window of the text that it is about, with the prompt.
        ids: The prompt's tokens.
        answer: The answer, once it is there.
        seconds: Its share of the time that its batch took.
    """

    question: Question
    part: PromptWindow
    ids: list[int]
    answer: Answer | None = None
    seconds: float = 0.0


@dataclass(slots=True, eq=False)
class TextJobs:
    """One text with its prompts, and what could not be asked about it."""

    text: str
    jobs: list[Job] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    @property
    def done(self) -> bool:
        """Whether every prompt is answered."""
        return all(job.answer is not None for job in self.jobs)

    def extraction(
        self,
        thresholds: Thresholds,
        *,
        all_occurrences: bool = False,
        calibration: Calibration | None = None,
    ) -> Extraction:
        """What its answers say, put together."""
        answers = tuple(job.answer for job in self.jobs if job.answer is not None)
        found = [(_window(answer, self.text), answer.parsed.records) for answer in answers]
        merged = merge_windows(found)
        problems = [*self.problems, *(one for answer in answers for one in answer.parsed.problems)]
        problems += _cut_by_windows(found, merged)
        if all_occurrences:
            merged = every_place(self.text, merged)
        if calibration is not None:
            merged = calibration.apply(merged)
        kept = []
        for record in merged:
            least = (
                thresholds.get(record.label, 0.0)
                if isinstance(thresholds, Mapping)
                else thresholds or 0.0
            )
            if record.confidence is None or record.confidence >= least:
                kept.append(record)
                continue
            message = (
                f"The confidence of {record.confidence:.3f} is below the threshold of {least}."
            )
            problems.append(Problem("low_confidence", message, _source(record)))
        seconds = sum(job.seconds for job in self.jobs)
        return Extraction(self.text, tuple(kept), tuple(problems), answers, seconds)


def read_ahead(
    texts: Iterable[TextJobs], batch_size: int, *, at_once: bool
) -> Iterator[list[TextJobs]]:
    """Texts in groups of up to 32 batches.

    Args:
        texts: The texts.
        batch_size: Prompts of a batch.
        at_once: Whether all results are wanted together. If not, the first group is one batch and
            each is twice the one before, so that the first result comes soon.
    """
    batches = _MOST_BATCHES if at_once else 1
    group: list[TextJobs] = []
    prompts = 0
    for text in texts:
        group.append(text)
        prompts += len(text.jobs)
        if prompts >= batches * batch_size or len(group) >= _MOST_BATCHES * batch_size:
            yield group
            group, prompts, batches = [], 0, min(2 * batches, _MOST_BATCHES)
    if group:
        yield group


def batches_of(jobs: Sequence[Job], size: int, *, by_schema: bool) -> Iterator[list[Job]]:
    """The jobs in batches of like length.

    With `by_schema`, those of one schema stand together as long as they fill a batch.
    """
    order = sorted(jobs, key=lambda job: -len(job.ids))
    if by_schema:
        of_schema: dict[str, list[Job]] = {}
        for job in order:
            of_schema.setdefault(job.question.schema.fingerprint(), []).append(job)
        left = set()
        for alike in of_schema.values():
            whole = len(alike) - len(alike) % size
            for first in range(0, whole, size):
                yield alike[first : first + size]
            left |= {*alike[whole:]}
        order = [job for job in order if job in left]
    for first in range(0, len(order), size):
        yield order[first : first + size]


def _window(answer: Answer, text: str) -> Window:
    start, end = answer.window
    return Window(text[start:end], start, end)


def _cut_by_windows(
    found: Sequence[tuple[Window, Sequence[Record]]], merged: Sequence[Record]
) -> list[Problem]:
    """A problem for each record that was left out because a window's edge cut it short."""
    kept = {record_key(record) for record in merged}
    left_out: dict[object, Problem] = {}
    message = (
        "A window's edge cuts this mention short; another window has the longer one. "
        "It is left out."
    )
    for window, records in found:
        for record in (shift_record(record, window.start) for record in records):
            key = record_key(record)
            if not isinstance(record, Event) and key not in kept:
                left_out.setdefault(key, Problem("repeated", message, _source(record)))
    return list(left_out.values())


def _source(record: Record) -> str:
    """A record as JSON, for a problem about it."""
    return json.dumps(record.to_dict(), ensure_ascii=False)
