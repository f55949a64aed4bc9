"""Texts and schemas in, typed records with offsets out.

It knows a causal language model, its tokenizer and the prompt format it was trained with. Routing
is the model's business: plain LoRA or an unadapted model works as well.
"""

from __future__ import annotations

import itertools
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ...encoder import TaskEncoder
from ..prompt import PromptFormat
from ..records import Document, Event, Problem
from ..schema import Schema
from ..scoring.calibration import Calibration
from .batches import Job, TextJobs, batches_of, read_ahead
from .fingerprint import adapters_of, weights_checksum
from .format_file import load_format
from .generation import Generator, Prompt, Written
from .jobs import Item, checksum, named, write_lines
from .loading import load_calibration, load_model
from .placement import placement
from .prefix import PrefixCache
from .prompts import PromptWindow, prompt_windows
from .questions import Question, Thresholds, check_thresholds, question_of, questions_of, schemas_of
from .reading import read_answer
from .results import Extraction, Extractions
from .routing import attach_encoder, reader_of
from .stopping import AnswerEnds


class Extractor:
    """Extract typed records from texts with a fine-tuned causal language model.

    Args:
        model: A causal language model, usually a `PeftModel` with a Task-Aware MoELoRA adapter.
        tokenizer: Its tokenizer.
        encoder: The task encoder of the adapter. None: one that was attached before, or the one
            that its config names.
        format: How prompts are written: as in training.
        batch_size: Windows per generation.
        max_new_tokens: The longest answer. One that is longer is cut and reported as `truncated`;
            its whole records are kept.
        max_prompt_tokens: Longer prompts are cut into overlapping windows. None: the model's
            context less the answer.
        overlap: Characters that neighbouring windows share.
        all_occurrences: Make of one entity an entity at every place of its words in the text.
        constrained: Constrain decoding to the schema's grammar: its labels and slots, and mentions
            that are substrings of the text. Needs the extra `constrained` and a fast tokenizer.
        prefix_caching: Read what the prompts of a batch begin with, the schema above all, once for
            all of them. Answers are the same but for rounding. Not where the router, or a
            prompt-learning method of PEFT, reads the whole prompt, nor for models that keep
            anything but keys and values. It pays where a schema fills whole batches.
        calibration: What makes of a record's confidence the share of right ones; `answers` keep
            the model's own. None: confidences as the model gives them.

    Raises:
        ValueError: An impossible length, an encoder-decoder, or `prefix_caching` out of place.

    Example:
        ```python
        extractor = Extractor.from_pretrained("user/my-adapter")
        schema = {"Launcher": "a vehicle that carries payloads to space"}
        found = extractor(["Ariane 5 lifted off from Kourou."], schema)
        found[0].records  # (Entity(label='Launcher', span=Span(text='Ariane 5', start=0, ...)),)
        ```
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        encoder: TaskEncoder | None = None,
        *,
        format: PromptFormat | None = None,
        batch_size: int = 8,
        max_new_tokens: int = 256,
        max_prompt_tokens: int | None = None,
        overlap: int = 100,
        all_occurrences: bool = False,
        constrained: bool = False,
        prefix_caching: bool = False,
        calibration: Calibration | None = None,
    ) -> None:
        context = _context(model)
        lengths = {"batch_size": batch_size, "max_new_tokens": max_new_tokens}
        for name, value in (lengths | {"max_prompt_tokens": max_prompt_tokens}).items():
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be a positive integer, got {value}.")
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            raise ValueError(
                f"A `{model.config.model_type}` model is an encoder-decoder, but answers are read "
                "as what continues a prompt. Pass a causal language model."
            )
        if max_prompt_tokens is None:
            max_prompt_tokens = max(context - max_new_tokens, 0)
        if max_prompt_tokens < 1 or max_prompt_tokens + max_new_tokens > context:
            raise ValueError(
                f"Prompts of up to {max_prompt_tokens} tokens and answers of up to "
                f"{max_new_tokens} do not fit the model's context of {context} tokens. Lower "
                "`max_prompt_tokens` or `max_new_tokens`."
            )
        self.model = model
        self.tokenizer = tokenizer
        self.format = format or PromptFormat()
        self.batch_size = batch_size
        self.max_new_tokens = max_new_tokens
        self.max_prompt_tokens = max_prompt_tokens
        self.overlap = overlap
        self.all_occurrences = all_occurrences
        self.prefix_caching = prefix_caching
        self.calibration = calibration
        self.generator = Generator(model, tokenizer, AnswerEnds(model, tokenizer))
        if constrained:
            from .constrained import Constraint

            self.generator.constraint = Constraint(tokenizer, sorted(self.generator.ends.tokens))
        attach_encoder(model, encoder, tokenizer)
        if prefix_caching:
            self.generator.prefix = PrefixCache(model)

    @classmethod
    def from_pretrained(
        cls,
        adapter: str | Path,
        *,
        base_model: str | Path | None = None,
        encoder: TaskEncoder | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        revision: str | None = None,
        subfolder: str | None = None,
        token: str | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        calibrated: bool = True,
        **options: Any,
    ) -> Extractor:
        """Load an adapter with its base model, tokenizer, task encoder and prompt format.

        The base model, and without a tokenizer beside the adapter also the tokenizer, are those
        that the adapter's config names. Code in a repository is never run.

        Args:
            adapter: Hub id or folder of the adapter: Task-Aware MoELoRA or any other of PEFT's.
            base_model: Hub id or folder of the base model; None: the one that the config names.
            encoder: The task encoder; None loads the one that the adapter's config names.
            device: Where the model runs; None takes the accelerator that is there.
            dtype: Precision of the base model, such as `"bfloat16"`; None keeps that of its files.
            revision: Branch, tag or commit of the adapter.
            subfolder: Folder inside the repository.
            token: Access token for the Hub.
            model_kwargs: Passed to `AutoModelForCausalLM.from_pretrained`, such as
                `{"device_map": "auto"}`.
            calibrated: Apply the calibration beside the adapter, where there is one. False to fit
                another.
            **options: `tokenizer`, to use another one, and the other arguments of `Extractor`.

        Returns:
            The extractor.

        Raises:
            ValueError: The config names no base model, a device or dtype is unknown, or weights
                of the adapter are missing, NaN or infinite.
        """
        where = {"revision": revision, "subfolder": subfolder, "token": token}
        given = {key: value for key, value in where.items() if value is not None}
        put = placement(device, dtype, model_kwargs)
        tokenizer = options.pop("tokenizer", None)
        model, tokenizer = load_model(adapter, base_model, tokenizer, given, put)
        if options.get("format") is None:
            options["format"] = load_format(adapter, **where)
        if calibrated and options.get("calibration") is None:
            options["calibration"] = load_calibration(adapter, **where)
        return cls(model, tokenizer, encoder, **options)

    def __call__(
        self,
        texts: str | Sequence[str],
        schema: Any,
        *,
        given: Sequence[Sequence[Event]] | None = None,
        thresholds: Thresholds = None,
        progress: bool | None = None,
    ) -> Extractions:
        """Extract from texts.

        Args:
            texts: One text or several.
            schema: What to look for: a `Schema` or anything `Schema.of` takes (label classes,
                Pydantic models, label names, a dict `{label: description}`, the `Path` of a JSON
                file). A list of label names or classes is one schema; a list of schemas, dicts,
                `Path`s or lists are several, asked about in prompts of their own and merged.
            given: For each text, the events whose arguments alone are wanted. Of several schemas,
                those with events are asked about them, the others as ever.
            thresholds: Leave out records whose confidence is below this, or below their label's
                entry. They become problems of kind `low_confidence`.
            progress: Show a progress bar; None: from more than one batch on.

        Returns:
            One extraction per text, in their order.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        start = time.perf_counter()
        asked = self._asked(texts, schema, given, thresholds)
        found = list(self._answer(asked, thresholds, progress, len(texts), at_once=True))
        return Extractions(found, time.perf_counter() - start)

    def iterate(
        self,
        texts: Iterable[str],
        schema: Any,
        *,
        given: Iterable[Sequence[Event]] | None = None,
        thresholds: Thresholds = None,
        progress: bool | None = None,
    ) -> Iterator[Extraction]:
        """The generator form of a call: takes any iterable of texts, also an endless one.

        The first result comes after one batch. Then more and more batches are read ahead, up to
        32, so that texts of like length share a generation.

        Args:
            texts: The texts.
            schema: As in a call.
            given: As in a call; any iterable.
            thresholds: As in a call.
            progress: As in a call.

        Returns:
            An iterator with one extraction per text, in their order.
        """
        texts = [texts] if isinstance(texts, str) else texts
        total = len(texts) if isinstance(texts, Sequence) else None
        asked = self._asked(texts, schema, given, thresholds)
        return self.answer(asked, thresholds=thresholds, progress=progress, total=total)

    def to_jsonl(
        self,
        texts: Iterable[str],
        schema: Any,
        path: str | Path,
        *,
        ids: Iterable[str] | None = None,
        given: Iterable[Sequence[Event]] | None = None,
        thresholds: Thresholds = None,
        progress: bool | None = None,
        overwrite: bool = False,
    ) -> int:
        """Extract to a file, a JSON line for each text; the same call again goes on behind them.

        A line is written as soon as its text is answered. What is continued must be the same job:
        texts, schema, given events, thresholds and `fingerprint`.

        Args:
            texts: The texts, in the same order each time; any iterable.
            schema: As in a call.
            path: The file. Lines have `id`, `text`, `records`, `problems`, `answers` and
                `seconds`; `peft-taskmoe score` reads them.
            ids: The texts' names, one for each; None numbers them from 1.
            given: As in a call; any iterable.
            thresholds: As in a call.
            progress: As in a call.
            overwrite: Start anew if the file is there. It is replaced when the first new line is
                written.

        Returns:
            The number of texts answered by this call.

        Raises:
            ValueError: The file is there and is not that of this job, or another process is
                writing it. It is left as it is. Or there are more or fewer `ids`, or lists of
                `given` events, than texts.
        """
        texts = [texts] if isinstance(texts, str) else texts
        schemas = self.check(schema, thresholds)

        def items() -> Iterator[Item]:
            for name, questions in named(questions_of(texts, schemas, given), ids):
                events = [[event.to_dict() for event in q.given or ()] for q in questions]
                yield Item(name, checksum([name, questions[0].text, events]), questions)

        return write_lines(
            self,
            items(),
            Path(path),
            self.fingerprint(schemas, thresholds),
            thresholds=thresholds,
            progress=progress,
            total=len(texts) if isinstance(texts, Sequence) else None,
            overwrite=overwrite,
        )

    def documents(
        self, documents: Sequence[Document], progress: bool | None = None
    ) -> dict[str, Extraction]:
        """Answer the questions that documents with gold records pose; for scoring.

        Args:
            documents: Documents; of their records only the given events of `"EAE"` are looked at.
            progress: As in a call.

        Returns:
            For each document's id, its extraction: what `score` takes as answers.

        Raises:
            ValueError: Two documents share an id.
        """
        counts = Counter(document.id for document in documents)
        if twice := [name for name, count in counts.items() if count > 1]:
            raise ValueError(
                f"{len(twice)} ids belong to several documents, the first is `{twice[0]}`. Ask "
                "about each data set by itself, or give every document its own id."
            )
        asked = ([question_of(document)] for document in documents)
        found = self._answer(asked, None, progress, len(documents), at_once=True)
        return {one.id: extraction for one, extraction in zip(documents, found, strict=True)}

    def answer(
        self,
        asked: Iterable[Sequence[Question]],
        *,
        thresholds: Thresholds = None,
        progress: bool | None = None,
        total: int | None = None,
    ) -> Iterator[Extraction]:
        """Answer the questions about each text; all questions in one group are about one text.

        Args:
            asked: Groups of questions.
            thresholds: As in a call.
            progress: As in a call.
            total: Number of groups, for the progress bar.

        Returns:
            An iterator with one extraction per group, in order.
        """
        check_thresholds(thresholds)
        return self._answer(asked, thresholds, progress, total, at_once=False)

    def check(self, schema: Any, thresholds: Thresholds = None) -> list[Schema]:
        """Refuse what cannot be asked, before any work.

        Args:
            schema: As in a call.
            thresholds: As in a call.

        Returns:
            The schemas.

        Raises:
            ValueError: A schema fits in no prompt, or a threshold is no probability or for a label
                that no schema has.
        """
        schemas = schemas_of(schema)
        check_thresholds(thresholds, schemas)
        for one in schemas:
            self.windows(Question("", one), None)
        return schemas

    def fingerprint(self, schemas: Sequence[Schema] = (), thresholds: Thresholds = None) -> str:
        """A checksum of all that decides what is found in a text, as a resumed job must have it.

        It covers a sample of the model's weights with those of the base model, the active adapters
        with their configs, the task encoder, the prompt format, the calibration, and the settings
        but for `batch_size` and `prefix_caching`.

        Args:
            schemas: What is asked of every text, if that is the same.
            thresholds: As in a call.
        """
        reader = reader_of(self.model)
        return checksum(
            [
                [one.fingerprint() for one in schemas],
                dict(thresholds) if isinstance(thresholds, Mapping) else thresholds,
                asdict(self.format),
                *(self.max_new_tokens, self.max_prompt_tokens, self.overlap, self.all_occurrences),
                self.generator.constraint is not None,
                None if self.calibration is None else asdict(self.calibration),
                *(weights_checksum(self.model), adapters_of(self.model)),
                None if reader is None else [one.fingerprint() for one in reader.encoders],
            ]
        )

    def _asked(
        self,
        texts: Iterable[str],
        schema: Any,
        given: Iterable[Sequence[Event]] | None,
        thresholds: Thresholds,
    ) -> Iterator[Sequence[Question]]:
        schemas = self.check(schema, thresholds)
        if isinstance(texts, Sequence) and isinstance(given, Sequence) and len(given) != len(texts):
            raise ValueError(
                f"There are {len(texts)} texts and given events for {len(given)}. Pass one list of "
                "events for each text."
            )
        return questions_of(texts, schemas, given)

    def _answer(
        self,
        asked: Iterable[Sequence[Question]],
        thresholds: Thresholds,
        progress: bool | None,
        total: int | None,
        *,
        at_once: bool,
    ) -> Iterator[Extraction]:
        shown = progress if progress is not None else total is None or total > self.batch_size
        with tqdm(total=total, disable=not shown, desc="Extracting", unit=" text") as bar:
            for texts in read_ahead(map(self.text_jobs, asked), self.batch_size, at_once=at_once):
                waiting = iter(texts)
                text = next(waiting, None)
                jobs = [job for one in texts for job in one.jobs]
                for batch in itertools.chain(
                    batches_of(jobs, self.batch_size, by_schema=self.prefix_caching), [[]]
                ):
                    self.answer_jobs(batch)
                    while text is not None and text.done:  # and so are those before it
                        bar.update()
                        yield self.extraction_of(text, thresholds)
                        text = next(waiting, None)

    def text_jobs(self, questions: Sequence[Question]) -> TextJobs:
        """The prompts that ask these questions, all about one text."""
        text = TextJobs(questions[0].text if questions else "")
        for question in questions:
            if not question.text.strip() or question.given == ():
                continue  # nothing to ask
            try:
                parts = self.windows(question, text.problems)
            except ValueError as error:
                warnings.warn(f"A question was not asked: {error}", stacklevel=2)
                text.problems.append(Problem("not_asked", str(error), ""))
                continue
            text.jobs += [Job(question, part, self.generator.ids(part.prompt)) for part in parts]
        return text

    def extraction_of(self, text: TextJobs, thresholds: Thresholds) -> Extraction:
        """What the answers about a text say, put together."""
        every, calibration = self.all_occurrences, self.calibration
        return text.extraction(thresholds, all_occurrences=every, calibration=calibration)

    def windows(
        self, question: Question, problems: list[Problem] | None
    ) -> tuple[PromptWindow, ...]:
        """The prompts that ask a question; see `prompt_windows`."""
        return prompt_windows(
            question.text,
            question.schema,
            self.max_prompt_tokens,
            length=lambda prompt: len(self.generator.ids(prompt)),
            given=question.given or (),
            format=self.format,
            overlap=self.overlap,
            problems=problems,
        )

    def answer_jobs(self, jobs: Sequence[Job]) -> None:
        """Answer prompts in one generation; each job gets its answer."""
        if not jobs:
            return
        start = time.perf_counter()
        prompts = [
            Prompt(job.ids, job.question.schema, job.part.window.text, job.part.given)
            for job in jobs
        ]
        written = self.generator.generate(prompts, self.max_new_tokens)
        for job, one in zip(jobs, written, strict=True):
            self.read(job, one)
        for job in jobs:
            job.seconds = (time.perf_counter() - start) / len(jobs)

    def read(self, job: Job, written: Written) -> None:
        """Read what a model wrote; the job gets its answer."""
        job.answer = read_answer(
            written, self.generator.ends, job.question.schema, job.part, self.max_new_tokens
        )


def _context(model: Any) -> int:
    """Tokens that the model can hold; a great many where its config does not say."""
    config: Any = getattr(model, "config", None)
    text: Any = getattr(config, "get_text_config", lambda: config)()
    return getattr(text, "max_position_embeddings", None) or 2**20
