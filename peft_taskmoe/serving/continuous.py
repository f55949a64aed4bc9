"""transformers' continuous batching behind the server: a prompt starts when another has ended."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from ..uie.extraction.generation import Written
from ..uie.extraction.stopping import repeats
from .adapters import Lane
from .batching import ClosedError, Row, Worker

logger = logging.getLogger(__name__)

_PAGE = 256  # tokens of a page of the cache
_TOKENS = 1024  # a prompt and its answer, for which there is room in every row
_WAIT = 0.05  # seconds, after which new prompts are looked for


@dataclass(eq=False)
class Running:
    """A prompt that the engine works on, since when, and what it has written at its end."""

    row: Row
    since: float
    written: Written | None = None


class Engine:
    """The engine of one lane; the model is its own until it is closed.

    Args:
        lane: What answers.
        rows: Prompts that run at once.
    """

    def __init__(self, lane: Lane, rows: int) -> None:
        from transformers.generation import ContinuousBatchingConfig

        self.lane, self.rows = lane, rows
        self.running: dict[str, Running] = {}
        extractor = lane.extractor
        self._ends = extractor.generator.ends
        lane.activate()
        longest = extractor.max_prompt_tokens + extractor.max_new_tokens
        generation = GenerationConfig(
            do_sample=False,
            max_new_tokens=extractor.max_new_tokens,
            eos_token_id=sorted(self._ends.tokens) or -1,
        )
        config = ContinuousBatchingConfig(
            page_size=_PAGE,
            num_blocks=rows + max(rows * _TOKENS, longest) // _PAGE,
            allow_block_sharing=False,  # by tokens alone, whatever adapter read them
            use_cuda_graph=False,
            use_async_batching=False,
            return_logprobs=True,
        )
        self._manager = extractor.model.init_continuous_batching(
            generation_config=generation, continuous_batching_config=config
        )
        self._manager.start()

    @property
    def room(self) -> int:
        """Prompts that may be added."""
        return self.rows - len(self.running)

    def add(self, row: Row) -> bool:
        """Start a prompt; False if the engine does not take it."""
        try:
            name = self._manager.add_request(row.job.ids, streaming=True)
        except Exception:
            logger.exception("A prompt could not be given to the engine.")
            return False
        if name is None:  # it has stopped
            return False
        self.running[name] = Running(row, time.perf_counter())
        return True

    def ended(self) -> Iterator[Running]:
        """The prompts that have ended since the last call; one that failed has written nothing."""
        output = self._manager.get_result(timeout=_WAIT)
        while output is not None:
            if (ended := self._after(output)) is not None:
                yield ended
            output = self._manager.get_result(timeout=0) if self._waiting() else None
        if not self._manager.is_running():
            yield from self.running.values()
            self.running.clear()
        for name, one in list(self.running.items()):
            if one.row.ticket.future.done():  # nobody waits for it any more
                self._manager.cancel_request(name)
                del self.running[name]

    def close(self) -> None:
        """Give the model back."""
        self._manager.destroy()

    def _waiting(self) -> bool:
        return not self._manager.output_router.output_queue.empty()

    def _after(self, output: Any) -> Running | None:
        """The prompt of an output, if that was its last."""
        one = self.running.get(output.request_id)
        if one is None:  # cancelled
            return None
        tokens = output.generated_tokens
        if output.error is None:
            stopped = self._ends.end_at(tokens[-1], tokens) or bool(repeats(torch.tensor([tokens])))
            if not (stopped or output.is_finished()):
                return None
            one.written = Written(tokens, output.logprobs)
            if not output.is_finished():
                self._manager.cancel_request(output.request_id)
        return self.running.pop(output.request_id)


class ContinuousWorker(Worker):
    """Answers with the engine, and what that cannot do, or failed at, in batches."""

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        self._engine: Engine | None = None
        self._unfit: set[Lane] = set()  # for which no engine could be made

    def _answer_next(self) -> bool:
        engine = self._engine
        if engine is not None and engine.running:
            self._step(engine, self.queue.take_now(engine.lane, engine.room))
            return True
        rows = self.queue.take(self._adapters.batch_size)
        lane = rows[0].ticket.lane if rows else None
        if engine is not None and engine.lane is not lane:
            self._close_engine()
        if lane is None:
            self.queue.run_calls()
            return not self.queue.finished
        if (engine := self._engine_of(lane)) is None:
            self._answer(rows)
        else:
            self._step(engine, rows)
        return True

    def _engine_of(self, lane: Lane) -> Engine | None:
        """The engine, made when a lane first needs it; None where batches answer."""
        if lane.constrained or lane.extractor.prefix_caching or lane in self._unfit:
            return None
        try:
            self._engine = self._engine or Engine(lane, self._adapters.batch_size)
        except Exception:
            logger.exception("No engine can be made for `%s`: batches answer.", lane.adapter)
            self._unfit.add(lane)
        return self._engine

    def _stop(self) -> None:
        left = list(self._engine.running.values()) if self._engine else []
        try:
            self._close_engine()
        finally:
            for one in left:
                one.row.ticket.fail(ClosedError("The server is stopping."))
            super()._stop()

    def _close_engine(self) -> None:
        if self._engine is not None:
            self._engine.close()
        self._engine = None

    def _step(self, engine: Engine, rows: Sequence[Row]) -> None:
        """Start prompts, and hand over what has been answered in the meantime."""
        failed = [row for row in rows if not engine.add(row)]
        failed += [one.row for one in engine.ended() if not self._delivered(one, engine)]
        if failed:  # and those that ran beside them: one by one, without the engine
            failed += [one.row for one in engine.running.values()]
            self._close_engine()
            for row in failed:
                self._answer([row])

    def _delivered(self, one: Running, engine: Engine) -> bool:
        """Hand over an answer; False if there is none."""
        if one.written is None:
            return False
        job, now = one.row.job, time.perf_counter()
        try:
            engine.lane.extractor.read(job, one.written)
        except Exception:
            logger.exception("An answer could not be read.")
        if job.answer is None:
            return False
        job.seconds = (now - one.since) / (len(engine.running) + 1)
        self.pace += 0.2 * (job.seconds - self.pace)
        self._metrics.batch(len(engine.running) + 1, now - one.since, job.answer.tokens)
        one.row.ticket.deliver()
        return True
