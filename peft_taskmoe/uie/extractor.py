"""Texts and schemas in, typed records with offsets out.

It knows a causal language model, its tokenizer and the prompt format it was trained with. Routing is the model's business:
a Task-Aware MoELoRA adapter gets its task encoder attached once, and plain LoRA or an unadapted model works as well.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ..automatic import PromptEncoder
from ..conditioning import current_state
from ..encoder import TaskEncoder
from ..model import Conditioner, attach_task_encoder, base_model_of, conditioner_of
from .jobs import Item, checksum, lines_done, write_lines
from .parse import ParsedAnswer, parse_answer
from .prompt import PromptFormat
from .records import Document, Event, Problem, Record, record_key, shift_record
from .schema import Label, Schema
from .windows import PromptWindow, Window, merge_windows, prompt_windows

if TYPE_CHECKING:
    from pandas import DataFrame
    from rich.console import Console

    from .constrained import Constraint

FORMAT_FILE = "uie_config.json"
"""Written beside an adapter: the prompt format it was trained with."""

_LOOKAHEAD_BATCHES = 32
_OF_ATTENTION = (
    DynamicLayer,
    DynamicSlidingWindowLayer,
)  # caches that can be cut by rows, and by tokens
_STRING = re.compile(r'"(?:[^"\\]|\\.)*+"?')
_SHOWN_IN_NOTEBOOK = 20
_LEAVING = 0.25  # of a batch's rows; as soon as so many are done, they leave
_DEPENDS_ON_THE_CALL = (  # settings by which `generate` treats the first tokens of a call, or its cache, in a way of their own
    "begin_suppress_tokens",
    "cache_implementation",
    "encoder_no_repeat_ngram_size",
    "encoder_repetition_penalty",
    "exponential_decay_length_penalty",
    "guidance_scale",
    "max_time",
    "min_new_tokens",
    "prompt_lookup_num_tokens",
)
_LOOP = 96  # tokens; three rounds of the longest loop that is looked for


@dataclass(frozen=True, slots=True)
class Question:
    """One thing to ask: a text and what to look for.

    Attributes:
        text: The text; a blank one is not asked about, for nothing can be in it.
        schema: What to look for.
        given: The events whose arguments alone are wanted; with `()` there is nothing to ask. None: no events are given.
    """

    text: str
    schema: Schema
    given: tuple[Event, ...] | None = None


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


@dataclass(frozen=True, slots=True)
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
        """JSON-ready: text, records in the JSONL format of the data sets, problems, raw answers, seconds."""
        return {
            "text": self.text,
            "records": [record.to_dict() for record in self.records],
            "problems": [asdict(problem) for problem in self.problems],
            "answers": [answer.parsed.raw for answer in self.answers],
            "seconds": round(self.seconds, 4),
        }

    def show(self, console: Console | None = None) -> None:
        """Print the text with its records and problems: with colours in a terminal, as HTML in a notebook.

        Args:
            console: The rich console to print to.
        """
        from .show import show

        show([self], console)

    def save_html(self, path: str | Path) -> None:
        """Write the text with its records and problems as one HTML file that needs nothing else."""
        Extractions([self], self.seconds).save_html(path)

    def _repr_html_(self) -> str:
        from .show import to_html

        return to_html([self])


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
        return json.dumps(
            [item.to_dict() for item in self.items], **{"ensure_ascii": False, **options}
        )

    def show(self, console: Console | None = None) -> None:
        """Print all texts with their records and problems; see `Extraction.show`."""
        from .show import show

        show(self.items, console)

    def save_html(self, path: str | Path) -> None:
        """Write all texts with their records and problems as one HTML file that needs nothing else."""
        from .show import to_page

        Path(path).write_text(to_page(self.items), encoding="utf-8")

    def _repr_html_(self) -> str:
        from .show import to_html

        left = len(self.items) - _SHOWN_IN_NOTEBOOK
        more = (
            f"<p>{left} more texts are not shown here; <code>save_html</code> writes them all.</p>"
            if left > 0
            else ""
        )
        return to_html(self.items[:_SHOWN_IN_NOTEBOOK]) + more

    def to_dataframe(self) -> DataFrame:
        """One row a record: number of the text, kind, label, mention, start, end, alignment, confidence, arguments.

        Relations have their head as the mention and head and tail as arguments; events have their trigger.
        """
        from pandas import DataFrame

        rows = []
        for number, item in enumerate(self.items):
            for record in item.records:
                data = record.to_dict()
                mention = (
                    getattr(record, "span", None)
                    or getattr(record, "trigger", None)
                    or getattr(record, "head", None)
                )
                arguments = data.get("arguments")
                if "head" in data:
                    arguments = [{"role": side, **data[side]} for side in ("head", "tail")]
                rows.append(
                    {
                        "text": number,
                        "kind": type(record).__name__.lower(),
                        "label": record.label,
                        "mention": mention.text,  # type: ignore[union-attr]
                        "start": mention.start,  # type: ignore[union-attr]
                        "end": mention.end,  # type: ignore[union-attr]
                        "alignment": mention.alignment,  # type: ignore[union-attr]
                        "confidence": record.confidence,
                        "arguments": arguments,
                    }
                )
        columns = [
            "text",
            "kind",
            "label",
            "mention",
            "start",
            "end",
            "alignment",
            "confidence",
            "arguments",
        ]
        return DataFrame(rows, columns=columns)


@dataclass(frozen=True, slots=True)
class _Job:
    """One prompt to be answered.

    Attributes:
        group: The number of its text among those that are answered together.
        question: The question.
        window: The part of the text that it is about, with the prompt.
        ids: The prompt's tokens.
    """

    group: int
    question: Question
    window: PromptWindow
    ids: list[int]


class _ChosenTokens(LogitsProcessor):
    """Remembers the log-probability of every token that was chosen, keeping the logits of one step at a time."""

    def __init__(self) -> None:
        self.last: torch.Tensor | None = None
        self.log_probs: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.see(input_ids[:, -1])
        self.last = torch.log_softmax(scores.float(), dim=-1)
        return scores

    def see(self, tokens: torch.Tensor) -> None:
        """Take the tokens that the last step chose."""
        if self.last is not None:
            self.log_probs.append(self.last.gather(1, tokens.unsqueeze(1)).squeeze(1).cpu())
            self.last = None


class _EndOfAnswer(StoppingCriteria):
    """An answer is one list, so a row is done with the first line feed behind the list's end.

    So is one that goes round in circles: greedy decoding hardly ever leaves a loop, and what it repeats counts once.

    Attributes:
        done: `(b,)` bool, the rows that are done; None before the first token.
    """

    def __init__(self, extractor: Extractor, prompt_length: int, rows_leave: bool) -> None:
        self.extractor = extractor
        self.prompt_length = prompt_length
        self.rows_leave = rows_leave
        self.done: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        extractor = self.extractor
        done = torch.tensor(
            [
                last in extractor._ends
                or (
                    last in extractor._line_feeds
                    and extractor._closes(row[self.prompt_length :].tolist())
                )
                for last, row in zip(input_ids[:, -1].tolist(), input_ids, strict=True)
            ],
            device=input_ids.device,
        ) | _repeats(input_ids[:, self.prompt_length :])
        self.done = done if self.done is None else self.done | done
        if self.rows_leave and int(self.done.sum()) >= _LEAVING * len(done):
            return torch.ones_like(
                done
            )  # ends this call of `generate`; the others go on in another
        return self.done


def _cut_short(problems: tuple[Problem, ...], why: str) -> tuple[Problem, ...]:
    """Say of an answer that is not whole why it is not; one whose list is closed lost nothing."""
    kinds = {problem.kind for problem in problems}
    if "truncated" in kinds:
        return tuple(
            replace(problem, message=f"{problem.message} {why}")
            if problem.kind == "truncated"
            else problem
            for problem in problems
        )
    if "malformed" in kinds:
        return (
            *problems,
            Problem("truncated", f"The answer ends inside a broken record. {why}", ""),
        )
    return problems


def _repeats(tokens: torch.Tensor) -> torch.Tensor:
    """Which rows' last `_LOOP` tokens are one sequence three times or more; `(b, length)` to `(b,)`."""
    tail = tokens[:, -_LOOP:]
    if tail.shape[1] < _LOOP:
        return torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    periods = range(1, _LOOP // 3 + 1)
    return torch.stack([(tail[:, p:] == tail[:, :-p]).all(1) for p in periods]).any(0)


class Extractor:
    """Extract typed records from texts with a fine-tuned causal language model.

    Args:
        model: A causal language model, usually a `PeftModel` with a Task-Aware MoELoRA adapter.
        tokenizer: Its tokenizer.
        encoder: The task encoder of the adapter. None: one that was attached before, or the one its config names.
        format: How prompts are written: as in training.
        batch_size: Windows per generation.
        max_new_tokens: The longest answer; one that is longer is cut, reported as `truncated`, and its whole records kept.
        max_prompt_tokens: Longer prompts are cut into overlapping windows. None: the model's context less the answer.
        overlap: Characters that neighbouring windows share.
        constrained: Let the model write only what can be read: labels and slots of the schema, and mentions that are
            substrings of the text. Needs `pip install 'peft_taskmoe[constrained]'` and a fast tokenizer.
        prefix_caching: Read what the prompts of a batch begin with, the schema above all, once for all of them. Answers stay the
            same but for rounding. Not where the router, or a prompt-learning method of PEFT, reads the whole prompt, which changes
            every token of it, nor for models that keep anything but keys and values. It pays where a schema fills whole batches.

    Raises:
        ValueError: A length that cannot be, an encoder-decoder, or `prefix_caching` where it cannot be.

    Example:
        ```python
        extractor = Extractor.from_pretrained("user/my-adapter")
        found = extractor(["Ariane 5 lifted off from Kourou."], {"Launcher": "a vehicle that carries payloads to space"})
        found[0].records   # (Entity(label='Launcher', span=Span(text='Ariane 5', start=0, end=8, ...)),)
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
        constrained: bool = False,
        prefix_caching: bool = False,
    ) -> None:
        counts = {
            "batch_size": batch_size,
            "max_new_tokens": max_new_tokens,
            "max_prompt_tokens": max_prompt_tokens,
        }
        for name, value in counts.items():
            if value is not None and value < 1:
                raise ValueError(f"`{name}` is {value}, but it counts something. Pass at least 1.")
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            raise ValueError(
                f"A `{model.config.model_type}` model is an encoder-decoder, but answers are read as what continues a prompt. Pass a "
                "causal language model."
            )
        self.model = model
        self.tokenizer = tokenizer
        self.format = format or PromptFormat()
        self.batch_size = batch_size
        self.max_new_tokens = max_new_tokens
        self.overlap = overlap
        context = _context(model)
        self.max_prompt_tokens = (
            max(context - max_new_tokens, 0) if max_prompt_tokens is None else max_prompt_tokens
        )
        if self.max_prompt_tokens < 1 or self.max_prompt_tokens + max_new_tokens > context:
            raise ValueError(
                f"Prompts of up to {self.max_prompt_tokens} tokens and answers of up to {max_new_tokens} do not fit the model's "
                f"context of {context} tokens. Lower `max_prompt_tokens` or `max_new_tokens`."
            )
        self._constraint: Constraint | None = None
        if constrained:
            from .constrained import Constraint

            self._constraint = Constraint(tokenizer, sorted(self._ends))
        self._attach(encoder)
        self.prefix_caching = prefix_caching
        if prefix_caching:
            self._check_prefix_caching()

    @classmethod
    def from_pretrained(
        cls,
        adapter: str | Path,
        *,
        base_model: str | Path | None = None,
        encoder: TaskEncoder | None = None,
        revision: str | None = None,
        subfolder: str | None = None,
        token: str | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Extractor:
        """Load an adapter with its base model, tokenizer, task encoder and prompt format.

        The base model, and without a tokenizer beside the adapter also the tokenizer, are those that the adapter's config
        names. Code in a repository is never run.

        Args:
            adapter: Hub id or folder of the adapter: Task-Aware MoELoRA, plain LoRA or any other of PEFT's.
            base_model: Hub id or folder of the base model; None: the one that the adapter's config names. For adapters
                that were trained from a folder of another machine.
            encoder: The task encoder; None loads the one that the adapter's config names.
            revision: Branch, tag or commit of the adapter.
            subfolder: Folder inside the repository.
            token: Access token for the Hub.
            model_kwargs: Passed to `AutoModelForCausalLM.from_pretrained`, such as `{"dtype": "bfloat16"}`.
            **options: `tokenizer`, to use another one, and the other arguments of `Extractor`.

        Returns:
            The extractor.
        """
        from peft import PeftConfig, PeftModel
        from transformers import AutoModelForCausalLM, AutoTokenizer

        where = {
            k: v
            for k, v in (("revision", revision), ("subfolder", subfolder), ("token", token))
            if v is not None
        }
        config = PeftConfig.from_pretrained(str(adapter), **where)
        name, its_revision = config.base_model_name_or_path, config.revision
        if base_model is not None:
            name, its_revision = str(base_model), None
        if not name:
            raise ValueError(
                f"The config of {str(adapter)!r} names no base model (`base_model_name_or_path`). Pass its Hub id or folder as "
                "`base_model`."
            )
        access = {} if token is None else {"token": token}
        base = AutoModelForCausalLM.from_pretrained(
            name, revision=its_revision, **access, **(model_kwargs or {})
        )
        tokenizer = options.pop("tokenizer", None)
        if tokenizer is None and _find(adapter, "tokenizer_config.json", **where) is not None:
            tokenizer = AutoTokenizer.from_pretrained(str(adapter), **where)
        elif tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(name, revision=its_revision, **access)
        if (
            len(tokenizer) > base.get_input_embeddings().weight.shape[0]
        ):  # tokens were added in training
            base.resize_token_embeddings(len(tokenizer))
        model = PeftModel.from_pretrained(base, str(adapter), config=config, **where).eval()
        if options.get("format") is None:
            options["format"] = load_format(adapter, **where)
        return cls(model, tokenizer, encoder, **options)

    def _conditioner(self) -> Conditioner | None:
        """What gives the model's routers their task; None if it has no such adapter."""
        try:
            return conditioner_of(base_model_of(self.model))
        except ValueError:
            return None

    def _attach(self, encoder: TaskEncoder | None) -> None:
        conditioner = self._conditioner()
        if conditioner is None:
            if encoder is not None:
                attach_task_encoder(
                    self.model, encoder, self.tokenizer
                )  # which says why that cannot be
            return
        reads_task = any(
            shape.reads_task for layer in conditioner.layers for shape in layer.shapes.values()
        )
        if reads_task and (encoder is not None or conditioner.prompt_encoder is None):
            attach_task_encoder(self.model, encoder, self.tokenizer)

    def __call__(
        self,
        texts: str | Sequence[str],
        schema: Any,
        *,
        given: Sequence[Sequence[Event]] | None = None,
        thresholds: float | Mapping[str, float] | None = None,
        progress: bool | None = None,
    ) -> Extractions:
        """Extract from texts.

        Args:
            texts: One text or several.
            schema: What to look for: a `Schema` or anything `Schema.of` takes (label classes, Pydantic models, label names,
                a dict `{label: description}`, the `Path` of a JSON file). A list of label names or classes is one schema; a
                list of schemas, dicts, `Path`s or lists are several, asked about in prompts of their own and merged.
            given: For each text, the events whose arguments alone are wanted. Of several schemas, those with events are
                asked about them, the others as ever.
            thresholds: Leave out records whose confidence is below this, or below their label's entry. They become problems
                of kind `low_confidence`.
            progress: Show a progress bar; None: from more than one batch on.

        Returns:
            One extraction per text, in their order.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        start = time.perf_counter()
        found = list(
            self.iterate(texts, schema, given=given, thresholds=thresholds, progress=progress)
        )
        return Extractions(found, time.perf_counter() - start)

    def iterate(
        self,
        texts: Iterable[str],
        schema: Any,
        *,
        given: Iterable[Sequence[Event]] | None = None,
        thresholds: float | Mapping[str, float] | None = None,
        progress: bool | None = None,
    ) -> Iterator[Extraction]:
        """The generator form of a call: takes any iterable of texts, also an endless one, and yields in its order.

        Up to 32 batches are read ahead, so that texts of like length share a generation.

        Args:
            texts: The texts.
            schema: As in a call.
            given: As in a call; any iterable.
            thresholds: As in a call.
            progress: As in a call.

        Returns:
            An iterator with one extraction per text, in their order.
        """
        if isinstance(texts, str):
            texts = [texts]
        schemas = self._checked(schema, thresholds)
        total = len(texts) if isinstance(texts, Sequence) else None
        if total is not None and isinstance(given, Sequence) and len(given) != total:
            raise ValueError(
                f"There are {total} texts and given events for {len(given)}. Pass one list of events for each text."
            )
        asked = _questions(texts, schemas, given)
        return self.answer(asked, thresholds=thresholds, progress=progress, total=total)

    def to_jsonl(
        self,
        texts: Iterable[str],
        schema: Any,
        path: str | Path,
        *,
        ids: Iterable[str] | None = None,
        given: Iterable[Sequence[Event]] | None = None,
        thresholds: float | Mapping[str, float] | None = None,
        progress: bool | None = None,
        overwrite: bool = False,
    ) -> int:
        """Extract to a file, a JSON line for each text; the same call again goes on where the file stops.

        A line is written as soon as its text is answered, so that a job that is stopped, or killed, loses at most the batches
        that were read ahead. What is continued must be the same job: texts, schema, given events, thresholds, the settings
        of the extractor but for `batch_size` and `prefix_caching`, and the weights of the model (a sample of each is compared).

        Args:
            texts: The texts, in the same order each time; any iterable.
            schema: As in a call.
            path: The file. Lines have `id`, `text`, `records`, `problems`, `answers` and `seconds`; `peft-taskmoe score`
                reads them.
            ids: The texts' names; None numbers them from 1.
            given: As in a call; any iterable.
            thresholds: As in a call.
            progress: As in a call.
            overwrite: Start anew if the file is there.

        Returns:
            The number of texts answered by this call.

        Raises:
            ValueError: The file is there and is not that of this job; it is left as it is.
        """
        if isinstance(texts, str):
            texts = [texts]
        schemas = self._checked(schema, thresholds)
        path, total = Path(path), len(texts) if isinstance(texts, Sequence) else None
        settings = [
            self.max_new_tokens,
            self.max_prompt_tokens,
            self.overlap,
            self._constraint is not None,
        ]
        known = [[one.fingerprint() for one in schemas], thresholds, asdict(self.format), *settings]
        run = checksum([*known, _weights_checksum(self.model)])
        names = itertools.count(1) if ids is None else iter(ids)

        def items() -> Iterator[Item]:
            for questions in _questions(texts, schemas, given):
                name = next(names, None)
                if name is None:
                    raise ValueError(
                        "There are fewer `ids` than texts. Pass one for each text, or none."
                    )
                events = [[event.to_dict() for event in q.given or ()] for q in questions]
                yield Item(str(name), checksum([str(name), questions[0].text, events]), questions)

        if overwrite:
            path.unlink(missing_ok=True)
        left = items()
        done = lines_done(path, (item.source for item in left), run)
        total = None if total is None else total - done
        return write_lines(
            self, left, path, run, thresholds=thresholds, progress=progress, total=total
        )

    def documents(
        self, documents: Sequence[Document], progress: bool | None = None
    ) -> dict[str, Extraction]:
        """Answer the questions that documents with gold records pose; for scoring.

        Args:
            documents: Documents; their records are not looked at, but for the given events of `"EAE"`.
            progress: As in a call.

        Returns:
            For each document's id, its extraction: what `score` takes as answers.

        Raises:
            ValueError: Two documents share an id.
        """
        if twice := [
            name
            for name, count in Counter(document.id for document in documents).items()
            if count > 1
        ]:
            raise ValueError(
                f"{len(twice)} ids belong to several documents, the first is `{twice[0]}`, so their answers could not be told "
                "apart. Ask about each data set by itself, or give every document its own id."
            )
        asked = ([question_of(document)] for document in documents)
        found = self.answer(asked, progress=progress, total=len(documents))
        return {
            document.id: extraction for document, extraction in zip(documents, found, strict=True)
        }

    def answer(
        self,
        asked: Iterable[Sequence[Question]],
        *,
        thresholds: float | Mapping[str, float] | None = None,
        progress: bool | None = None,
        total: int | None = None,
    ) -> Iterator[Extraction]:
        """Answer the questions about each text; all questions in one group are about the same text.

        Args:
            asked: Groups of questions.
            thresholds: As in a call.
            progress: As in a call.
            total: Number of groups, for the progress bar.

        Yields:
            One extraction per group, in order.
        """
        ahead = self.batch_size * _LOOKAHEAD_BATCHES
        shown = progress if progress is not None else total is None or total > self.batch_size
        with tqdm(total=total, disable=not shown, desc="Extracting", unit="text") as bar:
            groups: list[Sequence[Question]] = []
            for group in asked:
                groups.append(group)
                if len(groups) == ahead:
                    for extraction in self._answer_groups(groups, thresholds):
                        bar.update()
                        yield extraction
                    groups = []
            for extraction in self._answer_groups(groups, thresholds):
                bar.update()
                yield extraction

    def _answer_groups(
        self, groups: Sequence[Sequence[Question]], thresholds: float | Mapping[str, float] | None
    ) -> Iterator[Extraction]:
        """Answer some groups in batches of like length; a group is yielded as soon as it and those before it are done."""
        jobs: list[_Job] = []
        problems: list[list[Problem]] = [[] for _ in groups]
        for number, group in enumerate(groups):
            for question in group:
                if not question.text.strip() or question.given == ():
                    continue  # nothing to ask
                try:
                    windows = self._windows(question, problems[number])
                except ValueError as error:
                    warnings.warn(f"A question was not asked: {error}", stacklevel=2)
                    problems[number].append(Problem("not_asked", str(error), ""))
                    continue
                jobs += [
                    _Job(number, question, window, self._ids(window.prompt)) for window in windows
                ]
        waiting = [0] * len(groups)
        for job in jobs:
            waiting[job.group] += 1
        answers: list[dict[int, Answer]] = [{} for _ in groups]
        seconds = [0.0] * len(groups)
        next_group = 0
        for batch in self._batches(jobs):
            start = time.perf_counter()
            for i, answer in zip(batch, self._generate([jobs[i] for i in batch]), strict=True):
                answers[jobs[i].group][i] = answer
                waiting[jobs[i].group] -= 1
            share = (time.perf_counter() - start) / len(batch)
            for i in batch:
                seconds[jobs[i].group] += share
            while next_group < len(groups) and waiting[next_group] == 0:
                yield self._extraction(
                    groups[next_group],
                    answers[next_group],
                    problems[next_group],
                    seconds[next_group],
                    thresholds,
                )
                next_group += 1
        for i in range(next_group, len(groups)):  # there was nothing to ask
            yield self._extraction(groups[i], answers[i], problems[i], seconds[i], thresholds)

    def _batches(self, jobs: Sequence[_Job]) -> Iterator[list[int]]:
        """The jobs in batches of like length; with prefix caching those of one schema together, as long as they fill a batch."""
        order = sorted(range(len(jobs)), key=lambda i: -len(jobs[i].ids))
        size = self.batch_size
        if self.prefix_caching:
            by_schema: dict[str, list[int]] = {}
            for i in order:
                by_schema.setdefault(jobs[i].question.schema.fingerprint(), []).append(i)
            for of_schema in by_schema.values():
                while len(of_schema) >= size:
                    yield of_schema[:size]
                    del of_schema[:size]
            left = {i for of_schema in by_schema.values() for i in of_schema}
            order = [i for i in order if i in left]
        for first in range(0, len(order), size):
            yield order[first : first + size]

    def _checked(self, schema: Any, thresholds: float | Mapping[str, float] | None) -> list[Schema]:
        """The schemas that are asked for; whatever is wrong with them is an error before any work."""
        schemas = _schemas(schema)
        _check_thresholds(thresholds, schemas)
        for one in schemas:
            self._windows(Question("", one), None)
        return schemas

    def _windows(
        self, question: Question, problems: list[Problem] | None
    ) -> tuple[PromptWindow, ...]:
        return prompt_windows(
            question.text,
            question.schema,
            self.max_prompt_tokens,
            length=lambda prompt: len(self._ids(prompt)),
            given=question.given or (),
            format=self.format,
            overlap=self.overlap,
            problems=problems,
        )

    def _extraction(
        self,
        group: Sequence[Question],
        answers: Mapping[int, Answer],
        not_asked: Sequence[Problem],
        seconds: float,
        thresholds: float | Mapping[str, float] | None,
    ) -> Extraction:
        ordered = [answers[i] for i in sorted(answers)]
        text = group[0].text if group else ""
        found = [(_window(answer, text), answer.parsed.records) for answer in ordered]
        merged = merge_windows(found)
        records: list[Record] = []
        problems = [
            *not_asked,
            *(problem for answer in ordered for problem in answer.parsed.problems),
        ]
        problems += _cut_by_windows(found, merged)
        for record in merged:
            threshold = (
                thresholds.get(record.label, 0.0)
                if isinstance(thresholds, Mapping)
                else thresholds or 0.0
            )
            if record.confidence is not None and record.confidence < threshold:
                message = f"The confidence of {record.confidence:.3f} is below the threshold of {threshold}."
                problems.append(Problem("low_confidence", message, _source(record)))
            else:
                records.append(record)
        return Extraction(text, tuple(records), tuple(problems), tuple(ordered), seconds)

    def _ids(self, prompt: str) -> list[int]:
        """A prompt's tokens. What looks like a special token in a text is a part of the text."""
        ids: list[int] = self.tokenizer(prompt, split_special_tokens=True, verbose=False).input_ids
        return ids

    def _decode(self, tokens: list[int]) -> str:
        text: str = self.tokenizer.decode(
            tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    @cached_property
    def _ends(self) -> set[int]:
        """The tokens that end an answer: the tokenizer's, and those that the model's generation config adds."""
        found = getattr(getattr(self.model, "generation_config", None), "eos_token_id", None)
        ends = {*found} if isinstance(found, (list, tuple)) else {found}
        return {int(end) for end in {*ends, self.tokenizer.eos_token_id} if end is not None}

    @cached_property
    def _line_feeds(self) -> set[int]:
        """The tokens whose text holds a line feed."""
        texts = self.tokenizer.batch_decode([[i] for i in range(len(self.tokenizer))])
        return {i for i, text in enumerate(texts) if "\n" in text}

    def _closes(self, tokens: list[int]) -> bool:
        """Whether the answer's list is closed."""
        bare = _STRING.sub("", self._decode(tokens))
        return "]" in bare and bare.count("[") <= bare.count("]")

    @torch.no_grad()
    def _generate(self, jobs: Sequence[_Job]) -> list[Answer]:
        """Greedy answers to a batch of prompts.

        A batch would last as long as its longest answer. So rows that are done leave it, a quarter at a time, and the others go on
        with their keys and values.
        """
        prompts = [job.ids for job in jobs]
        length = max(map(len, prompts))
        pad = self.tokenizer.pad_token_id
        pad = next(iter(sorted(self._ends)), 0) if pad is None else pad
        device = next(self.model.parameters()).device
        input_ids = torch.tensor(
            [[pad] * (length - len(ids)) + ids for ids in prompts], device=device
        )
        mask = torch.tensor(
            [[0] * (length - len(ids)) + [1] * len(ids) for ids in prompts], device=device
        )
        constraint = None
        if self._constraint is not None:
            asked = [
                (job.question.schema, job.window.window.text, job.window.given) for job in jobs
            ]
            constraint = self._constraint.processor(asked)
        rows = list(range(len(jobs)))  # of the jobs that are not done
        written: list[list[int]] = [[] for _ in jobs]
        log_probs: list[list[float]] = [[] for _ in jobs]
        training = self.model.training
        self.model.eval()
        try:
            passed = self._read_once(jobs, length) if self.prefix_caching else {}
            rows_leave = self._rows_may_leave(jobs)
            reader = self._reader() if rows_leave else None
            if reader is not None:
                # Or the prompts would be embedded again, with the beginnings of their answers.
                passed["task_embeds"] = reader.tasks_of(
                    input_ids, attention_mask=mask, answers=False
                ).task_embeds
            while True:
                chosen = _ChosenTokens()
                end = _EndOfAnswer(self, length, rows_leave)
                output = self.model.generate(
                    input_ids=input_ids,
                    attention_mask=mask,
                    **passed,
                    max_new_tokens=self.max_new_tokens - (input_ids.shape[1] - length),
                    do_sample=False,
                    num_beams=1,
                    temperature=None,
                    top_p=None,
                    top_k=None,
                    pad_token_id=pad,
                    eos_token_id=sorted(self._ends) or None,
                    # The constraint comes behind: probabilities are the model's own.
                    logits_processor=LogitsProcessorList(
                        [chosen, constraint] if constraint else [chosen]
                    ),
                    stopping_criteria=StoppingCriteriaList([end]),
                    return_dict_in_generate=True,
                )
                input_ids = output.sequences
                chosen.see(input_ids[:, -1])
                of_rows = torch.stack(chosen.log_probs, 1).tolist()
                for row, tokens, values in zip(
                    rows, input_ids[:, length:].tolist(), of_rows, strict=True
                ):
                    written[row] = tokens
                    log_probs[row] += values
                assert end.done is not None
                left = (~end.done).nonzero().flatten()
                if (
                    not rows_leave
                    or len(left) == 0
                    or input_ids.shape[1] - length == self.max_new_tokens
                ):
                    break
                rows = [rows[i] for i in left.tolist()]
                input_ids = input_ids[left]
                mask = F.pad(mask[left], (0, input_ids.shape[1] - mask.shape[1]), value=1)
                if constraint is not None:
                    constraint.keep(left.tolist())
                embeds = passed.get("task_embeds")
                passed = {} if embeds is None else {"task_embeds": embeds[left]}
                passed |= _keys_and_values_of(output, left)
        finally:
            self.model.train(training)
        return [
            self._read(job, tokens, row)
            for job, tokens, row in zip(jobs, written, log_probs, strict=True)
        ]

    def _rows_may_leave(self, jobs: Sequence[_Job]) -> bool:
        """Whether a generation may be continued by another call of `generate` with fewer rows."""
        config = self.model.generation_config
        return (
            len(jobs) > 1
            and not _scope_is_taken()
            and not self._methods_of_whole_prompts()
            and not self.model._is_stateful
            and config.use_cache is not False
            and all(getattr(config, name, None) is None for name in _DEPENDS_ON_THE_CALL)
        )

    def _methods_of_whole_prompts(self) -> list[str]:
        """The model's PEFT methods that change what is computed for a token with the prompt around it."""
        return [
            str(getattr(one.peft_type, "value", one.peft_type))
            for one in getattr(self.model, "peft_config", {}).values()
            if one.is_prompt_learning or one.peft_type == "XLORA"
        ]

    def _check_prefix_caching(self) -> None:
        config = self.model.config
        rope = getattr(config, "rope_parameters", None) or {}
        methods = self._methods_of_whole_prompts()
        reader = self._reader()
        if methods:
            why = f"{methods[0]} changes what the model computes for it with the prompt around it"
        elif rope.get("rope_type") == "longrope":
            why = "a model with `longrope` positions turns the first tokens differently before a long text than before a short one"
        elif reader is not None and reader.encoder.config.text == "prompt":
            why = (
                'the task encoder reads the whole prompt (`text="prompt"`), so the router treats the tokens of a schema differently '
                "before every text"
            )
        else:
            return
        raise ValueError(
            f"`prefix_caching` computes a schema once for many texts, but {why}. Leave it out, or train an adapter for "
            'which that does not hold, such as one whose encoder reads the schema alone (`TaskEncoder(..., text="schema")`).'
        )

    def _reader(self) -> PromptEncoder | None:
        """Who reads the prompts for the active adapters' routers; None if none of these reads the task."""
        conditioner = self._conditioner()
        if conditioner is None or not conditioner.adapters_that_read_the_task(None):
            return None
        return conditioner.prompt_encoder

    def _read_once(self, jobs: Sequence[_Job], length: int) -> dict[str, Any]:
        """Read once what the prompts have in common at their beginning.

        The rows of a batch are padded on the left, so each row's keys and values move right by its padding. What moves beyond
        the shared length stands at other places in other rows; `generate` reads it again.

        Args:
            jobs: The prompts.
            length: Tokens of the longest.

        Returns:
            The arguments of `generate` that pass its keys and values; none if they cannot be shared.
        """
        self._check_prefix_caching()  # adapters and encoders may have changed since
        reader = self._reader()
        if len(jobs) == 1 or _scope_is_taken():
            return {}
        if reader is not None and len({job.question.schema.fingerprint() for job in jobs}) > 1:
            return {}  # the schemas are routed differently
        columns = zip(
            *(job.ids[:-1] for job in jobs), strict=False
        )  # the last token is left to be read
        shared = sum(1 for _ in itertools.takewhile(lambda column: len({*column}) == 1, columns))
        if shared == 0:
            return {}
        ids = torch.tensor([jobs[0].ids], device=next(self.model.parameters()).device)
        extra: dict[str, Any] = (
            {"logits_to_keep": 1} if self.model._supports_logits_to_keep() else {}
        )
        if reader is not None:
            extra["task_embeds"] = reader.tasks_of(ids, answers=False).task_embeds
        output = self.model(input_ids=ids[:, :shared], use_cache=True, **extra)
        if not _keeps_keys_and_values(output):
            raise ValueError(
                f"`prefix_caching` needs the keys and values of attention, but a `{self.model.config.model_type}` model keeps "
                "something else from one token to the next, which cannot be shared by several texts. Leave it out."
            )
        layers = [layer for layer in output.past_key_values.layers if layer.keys is not None]
        if any(layer.keys.shape[-2] != shared for layer in layers):
            return {}  # the schema is longer than a sliding window
        for layer in layers:
            layer.keys, layer.values = (
                torch.cat([one.roll(length - len(job.ids), dims=-2) for job in jobs])
                for one in (layer.keys, layer.values)
            )
        return {
            "past_key_values": output.past_key_values,
            "use_cache": True,
            "cache_implementation": None,
        }

    def _read(self, job: _Job, tokens: list[int], log_probs: list[float]) -> Answer:
        window = job.window.window
        kept = tokens
        complete = False
        for i, token in enumerate(tokens):
            if token in self._ends:
                kept, complete = tokens[:i], True
                break
            if token in self._line_feeds and self._closes(tokens[: i + 1]):
                kept, complete = tokens[: i + 1], True
                break
        parsed = parse_answer(
            self._decode(kept), job.question.schema, window.text, given=job.window.given
        )
        looped = bool(_repeats(torch.tensor([kept])))
        complete = complete and not looped  # what stands behind a stopped row is padding
        if not complete:
            why = f"It was cut off at `max_new_tokens={self.max_new_tokens}`; allow more."
            why = "It was stopped because it repeats itself." if looped else why
            parsed = replace(parsed, problems=_cut_short(parsed.problems, why))
        parsed = self._with_confidence(parsed, kept, log_probs)
        return Answer((window.start, window.end), parsed, len(kept), complete)

    def _with_confidence(
        self, parsed: ParsedAnswer, tokens: list[int], log_probs: list[float]
    ) -> ParsedAnswer:
        """Give each record the geometric mean of the probabilities of the tokens that write it.

        A token counts for a record if any of its characters lies inside the record's part of the answer. The mean over
        tokens makes long and short records comparable; see `docs/extraction.md` for how far it can be trusted.
        """
        if not parsed.records:
            return parsed
        ends = [len(self._decode(tokens[: i + 1])) for i in range(len(tokens))]
        records = []
        for record, (start, end) in zip(parsed.records, parsed.sources, strict=True):
            inside = [
                log_probs[i]
                for i, stop in enumerate(ends)
                if stop > start and (ends[i - 1] if i else 0) < end
            ]
            confidence = float(torch.tensor(inside).mean().exp()) if inside else None
            records.append(replace(record, confidence=confidence))
        return replace(parsed, records=tuple(records))


def _scope_is_taken() -> bool:
    """Whether somebody outside gives the task of every row, or looks at the gates."""
    state = current_state()
    return state is not None and (state.task_embeds is not None or state.recorder is not None)


def _keys_and_values_of(output: Any, rows: torch.Tensor) -> dict[str, Any]:
    """The arguments of `generate` that pass what was computed for some rows; none if that cannot be taken apart."""
    if not _keeps_keys_and_values(output):
        return {}
    cache = output.past_key_values
    cache.batch_select_indices(rows)
    return {"past_key_values": cache, "use_cache": True}


def _keeps_keys_and_values(output: Any) -> bool:
    """Whether a model's output has a cache of attention alone, which can be cut by rows and by tokens."""
    layers = getattr(getattr(output, "past_key_values", None), "layers", [None])
    return all(type(layer) in _OF_ATTENTION for layer in layers)


def save_format(format: PromptFormat, folder: str | Path) -> None:
    """Write the prompt format beside an adapter, where `Extractor.from_pretrained` finds it."""
    path = Path(folder) / FORMAT_FILE
    path.write_text(
        json.dumps({"prompt_format": asdict(format)}, indent=2) + "\n", encoding="utf-8"
    )


def load_format(
    adapter: str | Path,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | None = None,
) -> PromptFormat:
    """The prompt format that an adapter was trained with; the default, with a warning, where none is beside it.

    Raises:
        ValueError: If the file is not what `save_format` writes, or has settings that this version does not know.
    """
    path = _find(adapter, FORMAT_FILE, revision=revision, subfolder=subfolder, token=token)
    if path is None:
        warnings.warn(
            f"No `{FORMAT_FILE}` is found beside the adapter {str(adapter)!r}, so prompts are written in the default format. If it "
            "was trained with another, pass `format=PromptFormat(...)`.",
            stacklevel=2,
        )
        return PromptFormat()
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"`{FORMAT_FILE}` of {str(adapter)!r} is no JSON ({error}). Write it with `save_format`."
        ) from error
    settings = content.get("prompt_format") if isinstance(content, dict) else None
    if not isinstance(settings, dict):
        raise ValueError(
            f'`{FORMAT_FILE}` of {str(adapter)!r} has no `{{"prompt_format": {{...}}}}`. Write it with `save_format`.'
        )
    known = set(PromptFormat.__dataclass_fields__)
    if unknown := sorted({*settings} - known | {*content} - {"prompt_format"}):
        raise ValueError(
            f"`{FORMAT_FILE}` of {str(adapter)!r} has settings this version does not know: {', '.join(unknown)}. It knows "
            f"{', '.join(sorted(known))}. Update `peft_taskmoe`, or pass `format=PromptFormat(...)`."
        )
    return PromptFormat(**settings)


def question_of(document: Document) -> Question:
    """The question that a document with gold records poses."""
    return Question(
        document.text, document.schema, document.given if document.task == "EAE" else None
    )


def _find(
    adapter: str | Path,
    name: str,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | None = None,
) -> Path | None:
    """A file beside an adapter, in its folder or on the Hub; None where there is none."""
    if Path(adapter).is_dir():
        path = Path(adapter) / (subfolder or "") / name
        return path if path.is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return Path(
            hf_hub_download(str(adapter), name, revision=revision, subfolder=subfolder, token=token)
        )
    except EntryNotFoundError:  # not there, or (offline) not in the cache
        return None


def _weights_checksum(model: torch.nn.Module) -> str:
    """A checksum of up to 64 values of every parameter: other weights have another one, for all that matters."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        if not parameter.is_meta:  # offloaded
            values = parameter.detach().flatten()[:: max(parameter.numel() // 64, 1)]
            digest.update(values.float().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


def _context(model: Any) -> int:
    """Tokens that the model can hold; a great many where its config does not say."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(config, "max_position_embeddings", None) or 2**20


def _schemas(schema: Any) -> list[Schema]:
    """One schema or several: a list of label names, classes or `Label`s is one, a list of whole schemas is several."""
    if not isinstance(schema, (list, tuple)):
        return [schema if isinstance(schema, Schema) else Schema.of(schema)]
    labels = [isinstance(part, (str, type, Label)) for part in schema]
    if any(labels) and not all(labels):
        raise ValueError(
            "The list mixes labels with whole schemas, so it is neither one schema nor several. Pass `Schema.of(*parts)` to ask "
            "about all at once, or a list of schemas to ask about one after the other."
        )
    if not schema or all(labels):
        return [Schema.of(*schema)]
    return [
        one
        for part in schema
        for one in ([Schema.of(*part)] if isinstance(part, (list, tuple)) else _schemas(part))
    ]


def _check_thresholds(
    thresholds: float | Mapping[str, float] | None, schemas: Sequence[Schema]
) -> None:
    by_label = (
        thresholds
        if isinstance(thresholds, Mapping)
        else {}
        if thresholds is None
        else {"": thresholds}
    )
    for label, value in by_label.items():
        if not 0 <= value <= 1:
            raise ValueError(
                f"The threshold {value} is no probability. Write a number between 0 and 1."
            )
        if isinstance(thresholds, Mapping) and not any(
            label == known.name for one in schemas for known in one.labels
        ):
            names = ", ".join(f"`{known.name}`" for one in schemas for known in one.labels)
            raise ValueError(
                f"There is a threshold for `{label}`, which is no label that is asked for. The labels are {names}."
            )


def _questions(
    texts: Iterable[str], schemas: Sequence[Schema], given: Iterable[Sequence[Event]] | None
) -> Iterator[Sequence[Question]]:
    """For each text its questions: one for each schema, with those of the given events that the schema has."""
    events = None if given is None else iter(given)
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise TypeError(
                f"Text {number} is {text!r} ({type(text).__name__}), but records are extracted from `str`. Pass texts."
            )
        if events is None:
            yield [Question(text, schema) for schema in schemas]
            continue
        of_text = next(events, None)
        if of_text is None:
            raise ValueError(
                f"There are given events for {number} texts, but more texts. Pass one list of events for each text."
            )
        for event in of_text:
            if not any(schema.get("event", event.label) for schema in schemas):
                raise ValueError(
                    f"The given event `{event.label}` of text {number} is in no schema. Add it to the schema."
                )
        yield [
            Question(
                text,
                schema,
                tuple(event for event in of_text if schema.get("event", event.label))
                if "EE" in schema.tasks
                else None,
            )
            for schema in schemas
        ]


def _window(answer: Answer, text: str) -> Window:
    start, end = answer.window
    return Window(text[start:end], start, end)


def _cut_by_windows(
    found: Sequence[tuple[Window, Sequence[Record]]], merged: Sequence[Record]
) -> list[Problem]:
    """A problem for each entity that was left out because a window's edge cut it short."""
    kept = {record_key(record) for record in merged}
    left_out: dict[object, Problem] = {}
    for window, records in found:
        for record in (shift_record(record, window.start) for record in records):
            if not isinstance(record, Event) and record_key(record) not in kept:
                message = "A window's edge cuts this mention short; another window has the longer one. It is left out."
                left_out.setdefault(
                    record_key(record), Problem("repeated", message, _source(record))
                )
    return list(left_out.values())


def _source(record: Record) -> str:
    """A record as JSON, for a problem about it."""
    return json.dumps(record.to_dict(), ensure_ascii=False)
