"""Measures an adapter on gold documents and writes the report about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from ...inspection import adapted_layers
from ...nearest import NearTask, TaskCentroids, compared, measure_tasks
from ...plots import heat_map, similarity_map
from ..records import Document
from ..tables import Table
from ..view.report import Picture, report_page
from .extractor import Extractor
from .questions import Question, question_of

_PROMPTS = 8
"""Prompts of each data set whose gates are recorded."""
_PANELS = 6
"""Data sets that the heat map shows."""


def write_report(
    path: str | Path,
    extractor: Extractor,
    documents: Mapping[str, Sequence[Document]],
    answers: Mapping[str, Any] | None = None,
    *,
    name: str,
    centroids: TaskCentroids | None = None,
) -> None:
    """Write a report about an adapter: one HTML file that needs nothing else.

    Args:
        path: The file.
        extractor: The extractor with the adapter.
        documents: For each data set, its documents with their gold records.
        answers: The extractor's answers, as `Extractor.documents` gives them for each data set;
            None asks it.
        name: What the report is about.
        centroids: Those of the training tasks, to say which ones the data sets resemble.
    """
    if answers is None:
        answers = {dataset: extractor.documents(asked) for dataset, asked in documents.items()}
    routing: list[Picture | Table] = []
    notes: list[str] = []
    if adapted_layers(extractor.model):
        prompts = {
            dataset: prompts_of(extractor, map(question_of, asked), _PROMPTS)
            for dataset, asked in documents.items()
        }
        routing, notes = _routing({k: p for k, p in prompts.items() if p}, extractor, centroids)
    page = report_page(
        name, documents, answers, facts=_facts(extractor, documents), routing=routing, notes=notes
    )
    Path(path).write_bytes(page.encode("utf-8", "backslashreplace"))


def prompts_of(extractor: Extractor, questions: Any, limit: int) -> list[str]:
    """The first prompts that ask some questions; none for blank texts."""
    asked = (question for question in questions if question.text.strip() and question.given != ())
    return list(islice((p for question in asked for p in _prompts(extractor, question)), limit))


def _prompts(extractor: Extractor, question: Question) -> list[str]:
    return [part.prompt for part in extractor.windows(question, [])]


def _facts(extractor: Extractor, documents: Mapping[str, Sequence[Document]]) -> dict[str, str]:
    model = extractor.model
    facts = {"documents": ", ".join(f"{len(of)} of {name}" for name, of in documents.items())}
    facts["base model"] = str(getattr(model.config, "_name_or_path", "") or "without a name")
    configs, active = getattr(model, "peft_config", {}), getattr(model, "active_adapter", None)
    config = configs.get(active) if isinstance(active, str) else None
    if config is not None:
        facts["method"] = getattr(config.peft_type, "value", str(config.peft_type))
        keys = ("num_experts", "r", "router_inputs", "top_k")
        facts |= {key: str(getattr(config, key)) for key in keys if getattr(config, key, None)}
    calibrated = extractor.calibration is not None
    facts["prompt style"] = extractor.format.style
    facts["confidences"] = "calibrated" if calibrated else "as the model gives them"
    return facts


def _routing(
    prompts: Mapping[str, Sequence[str]], extractor: Extractor, centroids: TaskCentroids | None
) -> tuple[list[Picture | Table], list[str]]:
    """Pictures and tables about the routing of some prompts, and what is missing."""
    if not prompts:
        return [], []
    record, embeds = measure_tasks(extractor.model, prompts, tokenizer=extractor.tokenizer)
    shown: list[Picture | Table] = []
    notes = []
    try:
        words = "mean gate of each expert, by block and kind of layer, for each data set"
        figure = heat_map(record, record.tasks()[:_PANELS])
        shown.append(Picture.of("Mean gates of the experts", figure, words))
        if len(prompts) > 2:
            words = "similarity of the data sets' mean gates, clustered"
            shown.append(
                Picture.of("Data sets that use like experts", similarity_map(record), words)
            )
    except ImportError as error:
        notes.append(str(error))
    if centroids is None:
        notes.append("No centroids of the training tasks lie beside the adapter.")
        return shown, notes
    near = compared(TaskCentroids.of(record, embeds), centroids)
    return [*shown, nearest_table(near)], notes


def nearest_table(found: Mapping[str, Sequence[NearTask]], limit: int = 3) -> Table:
    """The first of the tasks that each data set or prompt resembles."""
    rows = [
        (name, near.task, f"{near.gates:.4f}", _figure(near.embedding))
        for name, tasks in found.items()
        for near in tasks[:limit]
    ]
    header = ("of", "training task", "cosine of gates", "cosine of embeddings")
    return Table("The nearest training tasks", header, rows)


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
