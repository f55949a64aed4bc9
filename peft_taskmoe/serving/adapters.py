"""The adapters of one model, and the extractor that answers with each of them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..uie import Extractor
from ..uie.extraction.batches import Job, TextJobs
from ..uie.extraction.constrained import Constraint
from ..uie.extraction.format_file import load_format
from ..uie.extraction.generation import Prompt
from ..uie.extraction.loading import add_adapter, load_calibration
from ..uie.extraction.prefix import PrefixCache
from ..uie.extraction.questions import Question
from ..uie.extraction.routing import attach_encoder
from ..uie.schema import Schema


@dataclass(frozen=True, eq=False)
class Lane:
    """What may share a batch: one adapter, constrained or not.

    Attributes:
        adapter: PEFT's name of the adapter; None for a model without.
        extractor: Answers prompts, in the thread that owns the model.
        reading: The same with a tokenizer of its own, for the thread that reads requests.
    """

    adapter: str | None
    extractor: Extractor
    reading: Extractor

    @property
    def constrained(self) -> bool:
        """Whether answers are held to their grammars."""
        return self.extractor.generator.constraint is not None

    def answer(self, jobs: Sequence[Job]) -> None:
        """Answer prompts in one generation."""
        self.activate()
        self.extractor.answer_jobs(jobs)

    def warm_up(self) -> None:
        """Load and compute what the first request would wait for."""
        self.activate()
        text, schema = "Ready.", Schema.from_dict("NER", ["Word"])
        prompts = [
            Prompt(job.ids, schema, text) for job in self.text_jobs([Question(text, schema)]).jobs
        ]
        if prompts:
            self.extractor.generator.generate(prompts, 1)

    def text_jobs(self, questions: Sequence[Question]) -> TextJobs:
        """The prompts that ask these questions."""
        return self.reading.text_jobs(questions)

    def activate(self) -> None:
        """Switch the model to the adapter."""
        model = self.extractor.model
        if self.adapter is not None and model.active_adapter != self.adapter:
            model.set_adapter(self.adapter, inference_mode=True)


class Adapters:
    """One loaded model with its adapters.

    Args:
        extractor: The extractor of the first adapter, which answers where none is asked for.
        name: The name of that adapter.

    Attributes:
        methods: The PEFT method of each adapter, by name.
    """

    def __init__(self, extractor: Extractor, name: str = "default") -> None:
        self.model = extractor.model
        self.batch_size = extractor.batch_size
        self.default = name
        self.constrained = extractor.generator.constraint is not None
        self._tokenizer = copy.deepcopy(extractor.tokenizer)
        self.methods: dict[str, str] = {}
        self._lanes: dict[tuple[str, bool], Lane] = {}
        adapted = bool(getattr(self.model, "peft_config", None))
        self._add(name, self.model.active_adapter if adapted else None, extractor)

    def load(self, name: str, adapter: str | Path) -> None:
        """Load another adapter of the same base model.

        Raises:
            ValueError: The name is taken, or the adapter does not fit the model.
        """
        if name in self.methods:
            raise ValueError(f"Two adapters are called `{name}`. Write NAME=FOLDER for one.")
        first = self._lanes[self.default, self.constrained]
        own = f"adapter{len(self.methods)}"  # a name may have characters that PEFT refuses
        add_adapter(self.model, first.extractor.tokenizer, adapter, own)
        extractor = copy.copy(first.extractor)
        extractor.format, extractor.calibration = load_format(adapter), load_calibration(adapter)
        self.model.set_adapter(own, inference_mode=True)
        attach_encoder(self.model, None, extractor.tokenizer)
        if extractor.prefix_caching:
            PrefixCache(self.model)  # which says why that cannot be
        self._add(name, own, extractor)

    @property
    def lanes(self) -> list[Lane]:
        """What has been asked for so far."""
        return list(self._lanes.values())

    def lane(self, name: str | None, constrained: bool | None) -> Lane:
        """What answers a request.

        Raises:
            ValueError: There is no such adapter.
            ImportError: Constrained decoding is not installed.
        """
        name = self.default if name is None else name
        if name not in self.methods:
            known = ", ".join(f"`{one}`" for one in self.methods)
            raise ValueError(f"There is no adapter {name!r}. The adapters are {known}.")
        key = name, self.constrained if constrained is None else constrained
        if key not in self._lanes:
            other = self._lanes[name, not key[1]]
            ends = sorted(other.extractor.generator.ends.tokens)
            constraint = Constraint(self._tokenizer, ends) if key[1] else None
            changed = copy.copy(other.extractor)
            changed.generator = replace(changed.generator, constraint=constraint)
            self._lanes[key] = Lane(other.adapter, changed, other.reading)
        return self._lanes[key]

    def _add(self, name: str, adapter: str | None, extractor: Extractor) -> None:
        reading = copy.copy(extractor)
        reading.generator = replace(extractor.generator, tokenizer=self._tokenizer)
        self._lanes[name, self.constrained] = Lane(adapter, extractor, reading)
        method = "none" if adapter is None else self.model.peft_config[adapter].peft_type
        self.methods[name] = str(getattr(method, "value", method))
