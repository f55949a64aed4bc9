"""Requests of all clients share batches: a bounded queue, and the thread that owns the model."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from ..uie import Extraction
from ..uie.extraction.batches import Job, TextJobs
from ..uie.extraction.questions import Thresholds
from .adapters import Adapters, Lane
from .metrics import Metrics

logger = logging.getLogger(__name__)

_LINGER = 0.02  # seconds without a new prompt, after which a batch that is not full starts
_LONGEST_LINGER = 0.2


class FullError(Exception):
    """The queue has no place left."""


class ClosedError(ValueError):
    """The server is stopping."""


@dataclass(eq=False)
class Ticket:
    """One text of a request: its prompts, and the future of its extraction.

    A future that is cancelled takes the prompts out of the queue.
    """

    lane: Lane
    text: TextJobs
    thresholds: Thresholds
    future: Future[Extraction] = field(default_factory=Future)

    def deliver(self) -> None:
        """Hand over the extraction, once every prompt is answered."""
        if not self.text.done or self.future.done():
            return
        try:
            found = self.lane.extractor.extraction_of(self.text, self.thresholds)
        except Exception as error:
            self.fail(error)
        else:
            if self.future.set_running_or_notify_cancel():  # False where nobody waits any more
                self.future.set_result(found)

    def fail(self, error: Exception) -> None:
        """Hand over an error, once."""
        logger.error("A text could not be answered.", exc_info=error)
        if not self.future.done() and self.future.set_running_or_notify_cancel():
            self.future.set_exception(error)


@dataclass(frozen=True, eq=False)
class Row:
    """One prompt in the queue."""

    ticket: Ticket
    job: Job


class PromptQueue:
    """The prompts that wait, oldest first.

    Args:
        capacity: Prompts that may wait.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.closed = False
        self._rows: list[Row] = []
        self._calls: list[tuple[Callable[[], Any], Future[Any]]] = []
        self._changed = threading.Condition()

    def __len__(self) -> int:
        return sum(not row.ticket.future.done() for row in self._rows)

    def check_room(self, prompts: int) -> None:
        """Refuse prompts that there is no room for.

        Raises:
            FullError: There is none.
            ClosedError: The queue takes no more.
        """
        with self._changed:
            if self.closed:
                raise ClosedError("The server is stopping.")
            self._drop()
            if len(self._rows) + prompts > self.capacity:
                raise FullError

    def put(self, tickets: Sequence[Ticket]) -> None:
        """Add the prompts of a request, all or none; errors as in `check_room`."""
        rows = [Row(ticket, job) for ticket in tickets for job in ticket.text.jobs]
        with self._changed:
            self.check_room(len(rows))
            self._rows += rows
            self._changed.notify()

    def take(self, size: int) -> list[Row]:
        """Wait for the next batch: the oldest prompt, with those of its lane of nearest length.

        Clients that were answered together ask again together: without a moment's wait the first
        of them would make a batch of one.

        Returns:
            Up to `size` prompts; none once the queue is closed and empty.
        """
        with self._changed:
            while not self._settled(size):
                if self.closed or self._calls:
                    return []
                self._changed.wait()
            oldest = self._rows[0]
            alike = [row for row in self._rows if row.ticket.lane is oldest.ticket.lane]
            alike.sort(key=lambda row: abs(len(row.job.ids) - len(oldest.job.ids)))
            return self._taken(alike[:size])  # the sort is stable: the oldest is among them

    def take_now(self, lane: Lane, size: int) -> list[Row]:
        """Up to `size` of the oldest prompts, as far as all before them are of this lane, too.

        While a call waits there are none, so that what runs comes to an end.
        """
        with self._changed:
            self._drop()
            size = 0 if self._calls else size
            same = itertools.takewhile(lambda row: row.ticket.lane is lane, self._rows)
            return self._taken(list(itertools.islice(same, size)))

    def _settled(self, size: int) -> bool:
        """Whether there are prompts, once no more come, or enough for a batch; calls go first."""
        if self._calls:
            return False
        self._drop()
        end = time.monotonic() + _LONGEST_LINGER
        while 0 < len(self._rows) < size and not self.closed and time.monotonic() < end:
            if not self._changed.wait(_LINGER):
                break
        self._drop()
        return bool(self._rows)

    def _taken(self, rows: list[Row]) -> list[Row]:
        taken = set(rows)
        self._rows = [row for row in self._rows if row not in taken]
        return rows

    def call(self, work: Callable[[], Any]) -> Any:
        """Have the thread that owns the model do something between batches, and wait for it.

        Raises:
            ClosedError: The queue takes no more.
        """
        future: Future[Any] = Future()
        with self._changed:
            self.check_room(0)
            self._calls.append((work, future))
            self._changed.notify()
        return future.result()

    def run_calls(self) -> None:
        """Do what was asked for by `call`; in the thread that owns the model."""
        with self._changed:
            calls, self._calls = self._calls, []
        for work, future in calls:
            try:
                future.set_result(work())
            except Exception as error:
                future.set_exception(error)

    @property
    def finished(self) -> bool:
        """Whether it is closed, and everything in it was taken."""
        with self._changed:
            self._drop()
            return self.closed and not self._rows and not self._calls

    def give_up(self) -> None:
        """Tell those who wait that nothing more is answered."""
        with self._changed:
            self.closed = True
            rows = self._taken(self._rows)
        for row in rows:
            row.ticket.fail(ClosedError("The server is stopping."))
        self.run_calls()

    def close(self) -> None:
        """Take no more; what waits is still answered."""
        with self._changed:
            self.closed = True
            self._changed.notify()

    def _drop(self) -> None:
        """Forget the prompts that nobody waits for any more."""
        self._rows = [row for row in self._rows if not row.ticket.future.done()]


class Worker:
    """The thread that owns the model and answers batch after batch.

    Attributes:
        ready: Whether every adapter has answered once.
        pace: Seconds that a prompt took in the last batches.
    """

    def __init__(self, adapters: Adapters, queue: PromptQueue, metrics: Metrics) -> None:
        self.queue = queue
        self.ready = False
        self.pace = 1.0
        self._adapters = adapters
        self._metrics = metrics
        self.thread = threading.Thread(target=self._run, name="model", daemon=True)

    def _run(self) -> None:
        try:
            for lane in self._adapters.lanes:
                lane.warm_up()
            self.ready = True
            while self._answer_next():
                pass
        except Exception:
            logger.exception("The model stopped answering.")
        finally:
            self._stop()

    def _stop(self) -> None:
        self.ready = False
        self.queue.give_up()  # nothing is left unless the thread ended by an error

    def _answer_next(self) -> bool:
        """Answer a batch, and keep nothing of it; False once there will be none."""
        rows = self.queue.take(self._adapters.batch_size)
        if rows:
            self._answer(rows)
        self.queue.run_calls()
        return not self.queue.finished

    def _answer(self, rows: Sequence[Row]) -> None:
        start = time.perf_counter()
        try:
            rows[0].ticket.lane.answer([row.job for row in rows])
        except Exception as error:
            if len(rows) == 1:
                rows[0].ticket.fail(error)
                return
        seconds = time.perf_counter() - start
        answers = [row.job.answer for row in rows if row.job.answer is not None]
        left = [row for row in rows if row.job.answer is None]
        if answers:
            self.pace += 0.2 * (seconds / len(rows) - self.pace)
            self._metrics.batch(len(answers), seconds, sum(answer.tokens for answer in answers))
        for ticket in {row.ticket: None for row in rows}:
            ticket.deliver()
        for row in left:  # one of them may be at fault, or all together need too much memory
            self._answer([row])
