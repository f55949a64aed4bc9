"""Texts and schemas in, typed records with offsets out.

It knows a causal language model, its tokenizer and the prompt format it was trained with. Routing is the model's business:
a Task-Aware MoELoRA adapter gets its task encoder attached once, and plain LoRA or an unadapted model works as well.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from ..encoder import TaskEncoder
from ..model import attach_task_encoder, base_model_of, conditioner_of
from .parse import ParsedAnswer, parse_answer
from .prompt import PromptFormat
from .records import Document, Event, Problem, Record
from .schema import Schema
from .windows import PromptWindow, Window, merge_windows, prompt_windows

if TYPE_CHECKING:
    from pandas import DataFrame

FORMAT_FILE = "uie_config.json"
"""Written beside an adapter: the prompt format it was trained with."""

_LOOKAHEAD_BATCHES = 32


@dataclass(frozen=True, slots=True)
class Question:
    """One thing to ask: a text, what to look for, and the events whose arguments are wanted, if they are given."""

    text: str
    schema: Schema
    given: tuple[Event, ...] = ()


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
        return json.dumps([item.to_dict() for item in self.items], ensure_ascii=False, **options)

    def to_dataframe(self) -> DataFrame:
        """One row a record: number of the text, kind, label, mention, start, end, alignment, confidence, arguments.

        Relations have their head as the mention and head and tail as arguments; events have their trigger.
        """
        from pandas import DataFrame

        rows = []
        for number, item in enumerate(self.items):
            for record in item.records:
                data = record.to_dict()
                mention = getattr(record, "span", None) or getattr(record, "trigger", None) or getattr(record, "head", None)
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
        columns = ["text", "kind", "label", "mention", "start", "end", "alignment", "confidence", "arguments"]
        return DataFrame(rows, columns=columns)


class _ChosenTokens(LogitsProcessor):
    """Remembers the log-probability of every token that was chosen, keeping the logits of one step at a time."""

    def __init__(self, prompt_length: int) -> None:
        self.prompt_length = prompt_length
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


class _EndOfLine(StoppingCriteria):
    """An answer is one line, so a row is done once its last token holds a line feed."""

    def __init__(self, line_feeds: torch.Tensor) -> None:
        self.line_feeds = line_feeds

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:  # type: ignore[override]
        return self.line_feeds.to(input_ids.device)[input_ids[:, -1]]


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
    ) -> None:
        for name, value in (("batch_size", batch_size), ("max_new_tokens", max_new_tokens)):
            if value < 1:
                raise ValueError(f"`{name}` is {value}, but it counts something. Pass at least 1.")
        self.model = model
        self.tokenizer = tokenizer
        self.format = format or PromptFormat()
        self.batch_size = batch_size
        self.max_new_tokens = max_new_tokens
        self.overlap = overlap
        config = getattr(model, "config", None)
        context = getattr(config, "max_position_embeddings", None) or 2**20
        self.max_prompt_tokens = max_prompt_tokens or context - max_new_tokens
        if not 0 < self.max_prompt_tokens + max_new_tokens <= context:
            raise ValueError(
                f"Prompts of up to {self.max_prompt_tokens} tokens and answers of up to {max_new_tokens} do not fit the model's "
                f"context of {context} tokens. Lower `max_prompt_tokens` or `max_new_tokens`."
            )
        self._attach(encoder)

    @classmethod
    def from_pretrained(
        cls,
        adapter: str | Path,
        *,
        encoder: TaskEncoder | None = None,
        revision: str | None = None,
        subfolder: str | None = None,
        token: str | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Extractor:
        """Load an adapter with its base model, tokenizer, task encoder and prompt format.

        Args:
            adapter: Hub id or folder of the adapter.
            encoder: The task encoder; None loads the one that the adapter's config names.
            revision: Branch, tag or commit of the adapter.
            subfolder: Folder inside the repository.
            token: Access token for the Hub.
            model_kwargs: Passed to `AutoPeftModelForCausalLM.from_pretrained`, such as `{"dtype": "bfloat16"}`.
            **options: The other arguments of `Extractor`.

        Returns:
            The extractor.
        """
        from peft import AutoPeftModelForCausalLM
        from transformers import AutoTokenizer

        where = {k: v for k, v in (("revision", revision), ("subfolder", subfolder), ("token", token)) if v is not None}
        model = AutoPeftModelForCausalLM.from_pretrained(str(adapter), **where, **(model_kwargs or {})).eval()
        options.setdefault("format", load_format(adapter, **where))
        tokenizer = options.pop("tokenizer", None)
        if tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(model.peft_config[model.active_adapter].base_model_name_or_path)
        return cls(model, tokenizer, encoder, **options)

    def _attach(self, encoder: TaskEncoder | None) -> None:
        try:
            conditioner = conditioner_of(base_model_of(self.model))
        except ValueError:
            if encoder is not None:
                raise
            return  # no router to serve
        assert conditioner is not None
        reads_task = any(shape.reads_task for layer in conditioner.layers for shape in layer.shapes.values())
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
            schema: What to look for: a `Schema`, anything `Schema.of` takes (label classes, Pydantic models, a dict
                `{label: description}`, a JSON file), or a list of these, which are asked about one after the other.
            given: For each text, the events whose arguments alone are wanted.
            thresholds: Leave out records whose confidence is below this, or below their label's entry. They become problems
                of kind `low_confidence`.
            progress: Show a progress bar; None: from more than one batch on.

        Returns:
            One extraction per text, in their order.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        start = time.perf_counter()
        found = list(self.iterate(texts, schema, given=given, thresholds=thresholds, progress=progress))
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

        Some batches are read ahead so that texts of like length share a generation.
        """
        schemas = [_schema(one) for one in schema] if isinstance(schema, (list, tuple)) else [_schema(schema)]
        events = iter(given) if given is not None else None
        asked = (
            [Question(text, one, tuple(next(events)) if events is not None else ()) for one in schemas]
            for text in texts
        )
        yield from self.answer(asked, thresholds=thresholds, progress=progress, total=_length(texts))

    def documents(self, documents: Sequence[Document], progress: bool | None = None) -> dict[str, Extraction]:
        """Answer the questions that documents with gold records pose; for scoring.

        Args:
            documents: Documents; their records are not looked at, but for the given events of `"EAE"`.
            progress: As in a call.

        Returns:
            For each document's id, its extraction: what `score` takes as answers.
        """
        asked = ([Question(document.text, document.schema, document.given)] for document in documents)
        found = self.answer(asked, progress=progress, total=len(documents))
        return {document.id: extraction for document, extraction in zip(documents, found, strict=True)}

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
                        yield extraction
                        bar.update()
                    groups = []
            for extraction in self._answer_groups(groups, thresholds):
                yield extraction
                bar.update()

    def _answer_groups(
        self, groups: Sequence[Sequence[Question]], thresholds: float | Mapping[str, float] | None
    ) -> Iterator[Extraction]:
        """Answer some groups in batches of like length; a group is yielded as soon as it and those before it are done."""
        jobs: list[tuple[int, Question, PromptWindow]] = []
        for number, group in enumerate(groups):
            for question in group:
                windows = prompt_windows(
                    question.text,
                    question.schema,
                    self.max_prompt_tokens,
                    length=self._prompt_length,
                    given=question.given,
                    format=self.format,
                    overlap=self.overlap,
                )
                jobs += [(number, question, window) for window in windows]
        waiting = [0] * len(groups)
        for number, _, _ in jobs:
            waiting[number] += 1
        answers: list[dict[int, Answer]] = [{} for _ in groups]
        seconds = [0.0] * len(groups)
        order = sorted(range(len(jobs)), key=lambda i: -len(jobs[i][2].prompt))
        next_group = 0
        for first in range(0, len(order), self.batch_size):
            batch = order[first : first + self.batch_size]
            start = time.perf_counter()
            for i, answer in zip(batch, self._generate([jobs[i] for i in batch]), strict=True):
                answers[jobs[i][0]][i] = answer
                waiting[jobs[i][0]] -= 1
            share = (time.perf_counter() - start) / len(batch)
            for i in batch:
                seconds[jobs[i][0]] += share
            while next_group < len(groups) and waiting[next_group] == 0:
                yield self._extraction(groups[next_group], answers[next_group], seconds[next_group], thresholds)
                next_group += 1
        for number in range(next_group, len(groups)):  # groups without questions
            yield self._extraction(groups[number], answers[number], seconds[number], thresholds)

    def _extraction(
        self,
        group: Sequence[Question],
        answers: Mapping[int, Answer],
        seconds: float,
        thresholds: float | Mapping[str, float] | None,
    ) -> Extraction:
        ordered = [answers[i] for i in sorted(answers)]
        text = group[0].text if group else ""
        found = [(_window(answer, text), answer.parsed.records) for answer in ordered]
        records: list[Record] = []
        problems = [problem for answer in ordered for problem in answer.parsed.problems]
        for record in merge_windows(found):
            threshold = thresholds.get(record.label, 0.0) if isinstance(thresholds, Mapping) else thresholds or 0.0
            if record.confidence is not None and record.confidence < threshold:
                message = f"The confidence of {record.confidence:.3f} is below the threshold of {threshold}."
                problems.append(Problem("low_confidence", message, json.dumps(record.to_dict(), ensure_ascii=False)))
            else:
                records.append(record)
        return Extraction(text, tuple(records), tuple(problems), tuple(ordered), seconds)

    def _prompt_length(self, prompt: str) -> int:
        return len(self.tokenizer(prompt, verbose=False).input_ids)

    @cached_property
    def _line_feeds(self) -> torch.Tensor:
        """For every token, whether its text holds a line feed."""
        size = max(len(self.tokenizer), getattr(getattr(self.model, "config", None), "vocab_size", 0) or 0)
        texts = self.tokenizer.batch_decode([[i] for i in range(len(self.tokenizer))])
        holds = torch.zeros(size, dtype=torch.bool)
        holds[: len(texts)] = torch.tensor(["\n" in text for text in texts])
        return holds

    @torch.no_grad()
    def _generate(self, jobs: Sequence[tuple[int, Question, PromptWindow]]) -> Iterator[Answer]:
        """Greedy answers to a batch of prompts."""
        tokenizer = self.tokenizer
        if self.model.training:
            self.model.eval()
        side, pad = tokenizer.padding_side, tokenizer.pad_token
        tokenizer.padding_side = "left"
        if pad is None:
            tokenizer.pad_token = tokenizer.eos_token
        try:
            batch = tokenizer([window.prompt for _, _, window in jobs], return_tensors="pt", padding=True)
        finally:
            tokenizer.padding_side = side
        device = next(self.model.parameters()).device
        batch = {name: batch[name].to(device) for name in ("input_ids", "attention_mask")}
        length = batch["input_ids"].shape[1]
        chosen = _ChosenTokens(length)
        output = self.model.generate(
            **batch,
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            logits_processor=LogitsProcessorList([chosen]),
            stopping_criteria=StoppingCriteriaList([_EndOfLine(self._line_feeds)]),
        )
        chosen.see(output[:, -1])
        written = output[:, length:].cpu()
        log_probs = torch.stack(chosen.log_probs, 1) if chosen.log_probs else torch.zeros(len(jobs), 0)
        for (_, question, window), tokens, row in zip(jobs, written, log_probs, strict=True):
            yield self._read(question, window, tokens.tolist(), row.tolist())

    def _read(self, question: Question, window: PromptWindow, tokens: list[int], log_probs: list[float]) -> Answer:
        ends = {self.tokenizer.eos_token_id, self.tokenizer.pad_token_id}
        count = next((i for i, token in enumerate(tokens) if token in ends), None)
        complete = count is not None or len(tokens) < self.max_new_tokens
        kept = tokens[:count] if count is not None else tokens
        raw = self.tokenizer.decode(kept, skip_special_tokens=True)
        parsed = parse_answer(raw, question.schema, window.window.text, given=window.given)
        parsed = self._with_confidence(parsed, kept, log_probs)
        return Answer((window.window.start, window.window.end), parsed, len(kept), complete)

    def _with_confidence(self, parsed: ParsedAnswer, tokens: list[int], log_probs: list[float]) -> ParsedAnswer:
        """Give each record the geometric mean of the probabilities of the tokens that write it.

        A token counts for a record if any of its characters lies inside the record's part of the answer. The mean over
        tokens makes long and short records comparable; see `docs/extraction.md` for how far it can be trusted.
        """
        if not parsed.records:
            return parsed
        ends = [len(self.tokenizer.decode(tokens[: i + 1], skip_special_tokens=True)) for i in range(len(tokens))]
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


def save_format(format: PromptFormat, folder: str | Path) -> None:
    """Write the prompt format beside an adapter, where `Extractor.from_pretrained` finds it."""
    path = Path(folder) / FORMAT_FILE
    path.write_text(json.dumps({"prompt_format": asdict(format)}, indent=2) + "\n", encoding="utf-8")


def load_format(
    adapter: str | Path, *, revision: str | None = None, subfolder: str | None = None, token: str | None = None
) -> PromptFormat:
    """The prompt format that an adapter was trained with; the default, with a warning, where none is beside it.

    Raises:
        ValueError: If the file has settings that this version does not know.
    """
    folder = Path(adapter) / (subfolder or "")
    if folder.is_dir():
        path: str | Path | None = folder / FORMAT_FILE if (folder / FORMAT_FILE).is_file() else None
    else:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError

        try:
            path = hf_hub_download(str(adapter), FORMAT_FILE, revision=revision, subfolder=subfolder, token=token)
        except EntryNotFoundError:
            path = None
    if path is None:
        warnings.warn(
            f"No `{FORMAT_FILE}` stands beside the adapter {str(adapter)!r}, so prompts are written in the default format. If it "
            "was trained with another, pass `format=PromptFormat(...)`.",
            stacklevel=2,
        )
        return PromptFormat()
    settings = json.loads(Path(path).read_text(encoding="utf-8")).get("prompt_format", {})
    known = set(PromptFormat.__dataclass_fields__)
    if unknown := sorted(set(settings) - known):
        raise ValueError(
            f"`{FORMAT_FILE}` of {str(adapter)!r} has settings this version does not know: {', '.join(unknown)}. It knows "
            f"{', '.join(sorted(known))}. Update `peft_taskmoe`, or pass `format=PromptFormat(...)`."
        )
    return PromptFormat(**settings)


def _schema(source: Any) -> Schema:
    return source if isinstance(source, Schema) else Schema.of(source)


def _window(answer: Answer, text: str) -> Window:
    start, end = answer.window
    return Window(text[start:end], start, end)


def _length(texts: Iterable[str]) -> int | None:
    return len(texts) if isinstance(texts, Sequence) else None
