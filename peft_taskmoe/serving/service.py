"""Admits requests to the queue and waits for their answers, on the server's event loop."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from fastapi import HTTPException, Request

from .adapters import Adapters
from .batching import ClosedError, FullError, PromptQueue, Ticket, Worker
from .bodies import ExtractRequest, TooManyError, tickets_of
from .limits import Limits
from .metrics import Metrics


class Service:
    """The parts of a running server: queue, worker, figures and the thread that reads requests."""

    def __init__(self, adapters: Adapters, limits: Limits, worker: type[Worker] = Worker) -> None:
        self.adapters, self.limits = adapters, limits
        self.queue = PromptQueue(limits.max_waiting)
        self.metrics = Metrics(lambda: len(self.queue))
        self.worker = worker(adapters, self.queue, self.metrics)
        self.reader = ThreadPoolExecutor(1, "reader")
        self._read = 0  # texts that are being read

    async def admit(self, body: ExtractRequest) -> list[Ticket]:
        """Read a request and queue its prompts, or refuse it."""
        texts = len(body.texts)
        if texts > self.limits.max_texts:
            why = f"The request has {texts} texts. `max_texts` is {self.limits.max_texts}."
            raise HTTPException(422, why)
        if texts > self.limits.max_waiting:
            why = f"The request has {texts} texts. `max_waiting` is {self.limits.max_waiting}."
            raise HTTPException(413, why)
        try:
            self.queue.check_room(self._read + texts)
            self._read += texts
            try:
                reading = partial(tickets_of, body, self.adapters, self.limits)
                loop = asyncio.get_running_loop()
                tickets = await loop.run_in_executor(self.reader, reading)
            finally:
                self._read -= texts
            self.queue.put(tickets)
        except FullError:
            wait = math.ceil(self.worker.pace * len(self.queue)) or 1
            why = f"`max_waiting` ({self.limits.max_waiting}) prompts wait already. Come again."
            raise HTTPException(429, why, {"Retry-After": str(min(wait, 600))}) from None
        except ClosedError:
            raise HTTPException(503, "The server is stopping.") from None
        except TooManyError as error:
            raise HTTPException(413, str(error)) from None
        except (ValueError, ImportError) as error:
            raise HTTPException(422, str(error)) from None
        for ticket in tickets:
            if not ticket.text.jobs:  # nothing is asked about a blank text
                ticket.deliver()
        return tickets

    async def answered(
        self, tickets: Sequence[Ticket], request: Request, timeout: float | None, start: float
    ) -> AsyncIterator[int]:
        """The numbers of the texts that are done; what is left at the end is given up.

        The time counts from `start`, of `time.perf_counter`.

        Raises:
            TimeoutError: The time is over.
            ConnectionError: The client left.
        """
        waiting: dict[Any, int] = {
            asyncio.wrap_future(ticket.future): number for number, ticket in enumerate(tickets)
        }
        gone = asyncio.ensure_future(_disconnected(request))
        end = start + self._seconds(timeout)
        try:
            while waiting:
                done, _ = await asyncio.wait(
                    {gone, *waiting},
                    timeout=max(end - time.perf_counter(), 0),
                    return_when=asyncio.FIRST_COMPLETED,
                )
                if gone in done:
                    raise ConnectionError
                if not done:
                    raise TimeoutError
                for one in done:
                    one.exception()  # read here, or asyncio logs that nobody did
                for number in sorted(waiting.pop(one) for one in done):
                    yield number
        finally:
            gone.cancel()
            for ticket in tickets:
                ticket.future.cancel()

    def too_late(self, timeout: float | None) -> str:
        """What a client is told whose time is over."""
        return f"The request took longer than `timeout` ({self._seconds(timeout):g} s)."

    def _seconds(self, timeout: float | None) -> float:
        return min(timeout or self.limits.timeout, self.limits.timeout)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
