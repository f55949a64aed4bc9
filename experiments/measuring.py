"""Measures a trained adapter: likelihoods of gold answers, gates, and answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from answer_head import answer_losses, head_asked_about
from documents import Documents
from settings import ExperimentArguments
from tqdm.auto import tqdm

from peft_taskmoe import TaskEncoder, record_gates
from peft_taskmoe.uie import Document, Extractor, build_example


class Measure:
    """What is measured of a finished adapter; every process gets all figures.

    Args:
        model: The model with its adapter, on this process's device.
        tokenizer: Its tokenizer.
        encoder: The task encoder, attached to the model; None where the router reads no task.
        args: The comparison's settings.
    """

    def __init__(
        self, model: Any, tokenizer: Any, encoder: TaskEncoder | None, args: ExperimentArguments
    ) -> None:
        self.model, self.tokenizer, self.encoder, self.args = model, tokenizer, encoder, args

    def likelihoods(
        self, documents: Sequence[Document], task_of: Sequence[Document] | None = None
    ) -> dict[str, list[float]]:
        """Negative log-likelihood in nats and tokens of each gold answer, by document id.

        Args:
            documents: The documents.
            task_of: For each document the one whose task embedding it gets; None: its own.
        """
        pairs = list(zip(documents, documents if task_of is None else task_of, strict=True))
        return _shared(pairs, self._likelihoods)

    def _likelihoods(self, pairs: list[tuple[Document, Document]]) -> list[tuple[str, list[float]]]:
        found = []
        for batch in self._batches(pairs):
            logits, labels = self._forward([pair[0] for pair in batch], [pair[1] for pair in batch])
            counts = (labels[:, 1:] != -100).sum(1).tolist()
            losses = answer_losses(logits, labels).split(counts)
            for (document, _), loss, count in zip(batch, losses, counts, strict=True):
                found.append((document.id, [loss.sum().item(), count]))
        return found

    def _batches(
        self, pairs: list[tuple[Document, Document]]
    ) -> Iterable[list[tuple[Document, Document]]]:
        """Batches by length, longest first: what does not fit fails at once."""
        ordered = sorted(pairs, key=lambda pair: -sum(map(len, self._tokens(pair[0]))))
        size = self.args.likelihood_batch_size
        for start in tqdm(range(0, len(ordered), size), desc="Likelihood", leave=False):
            yield ordered[start : start + size]

    def _tokens(self, document: Document) -> tuple[list[int], list[int]]:
        """The tokens of prompt and gold answer: the answer begins where the texts part."""
        example = build_example(document, format=self.args.format)
        prompt = self.tokenizer(example.prompt).input_ids
        whole = [
            *self.tokenizer(example.prompt + example.completion).input_ids,
            self.tokenizer.eos_token_id,
        ]
        same = next(
            (i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), len(prompt)
        )
        return whole[:same], whole[same:]

    @torch.no_grad()
    def _forward(
        self, documents: Sequence[Document], task_of: Sequence[Document]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of the answers' tokens, row after row, and all labels."""
        rows = [self._tokens(document) for document in documents]
        width = max(len(prompt) + len(answer) for prompt, answer in rows)
        pad = (
            self.tokenizer.eos_token_id
            if self.tokenizer.pad_token_id is None
            else self.tokenizer.pad_token_id
        )
        device = next(self.model.parameters()).device
        padding = [width - len(prompt) - len(answer) for prompt, answer in rows]
        ids = torch.tensor(
            [[pad] * p + prompt + answer for p, (prompt, answer) in zip(padding, rows, strict=True)]
        )
        mask = torch.tensor([[0] * p + [1] * (width - p) for p in padding])
        labels = torch.tensor([[-100] * (width - len(answer)) + answer for _, answer in rows]).to(
            device
        )
        task = {}
        if self.encoder is not None:
            task["task_embeds"] = self.encoder([self.task_text(one) for one in task_of]).to(device)
        with head_asked_about(self.model, labels):
            logits = self.model(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                position_ids=(mask.cumsum(1) - 1).clamp(min=0).to(device),
                use_cache=False,
                **task,
            ).logits
        return logits, labels

    def task_text(self, document: Document) -> str:
        """What the task encoder reads of a document."""
        example = build_example(document, format=self.args.format)
        assert self.encoder is not None
        return example.prompt if self.encoder.config.text == "prompt" else example.schema_text

    def gates(self, sets: Documents) -> dict[str, Any]:
        """How every layer weighs its experts, by data set: prompts with their gold answers."""
        with record_gates(self.model) as record:
            for name, documents in sets.items():
                pairs = [(document, document) for document in documents]
                for batch in self._batches(pairs):
                    with record.task(name):
                        self._forward([one for one, _ in batch], [one for one, _ in batch])
        stats = record.stats()
        return {
            "layers": record.layers(),
            "mean": {
                name: [[round(g, 5) for g in layer] for layer in record.mean_gates(name).tolist()]
                for name in sets
            },
            "entropy": {
                name: sum(s.entropy for s in stats if s.task == name) / len(record.layers())
                for name in sets
            },
            "variance": [[v.within_tasks, v.between_tasks] for v in record.variances()],
        }

    def answers(self, documents: Sequence[Document]) -> dict[str, Any]:
        """What the model answers about every document, by its id, and how long that took."""
        start = time.perf_counter()
        found = _shared(list(documents), self._answers)
        return {"seconds": time.perf_counter() - start, "answers": found}

    def _answers(self, documents: list[Document]) -> list[tuple[str, dict[str, Any]]]:
        extractor = Extractor(
            self.model,
            self.tokenizer,
            self.encoder,
            format=self.args.format,
            batch_size=self.args.eval_batch_size,
            max_new_tokens=self.args.max_new_tokens,
            prefix_caching=self.encoder is None or self.encoder.config.text == "schema",
        )
        return [
            (name, one.to_dict())
            for name, one in extractor.documents(documents, progress=True).items()
        ]


def _shared(items: list[Any], work: Callable[[list[Any]], list[tuple[str, Any]]]) -> dict[str, Any]:
    """Let every process work on its share, and give all of them everything, by document."""
    state = PartialState()
    found = work(items[state.process_index :: state.num_processes])
    return dict(gather_object(found) if state.num_processes > 1 else found)
