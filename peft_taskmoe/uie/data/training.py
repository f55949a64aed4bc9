"""Documents drawn, mixed, and written as training examples."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from peft_taskmoe.optional import needed
from peft_taskmoe.uie.prompt import PromptFormat, build_example
from peft_taskmoe.uie.records import Document
from peft_taskmoe.uie.regularisers import MentionPool, Regularisers
from peft_taskmoe.uie.schema import Schema

if TYPE_CHECKING:
    from datasets import Dataset


def sample(documents: Sequence[Document], n: int, seed: int = 0) -> list[Document]:
    """At most `n` documents, drawn without replacement, in their own order.

    Those drawn for a smaller `n` with the same seed are among those drawn for a larger one.
    """
    order = list(range(len(documents)))
    random.Random(seed).shuffle(order)
    return [documents[i] for i in sorted(order[:n])]


def mix(
    documents: Mapping[str, Sequence[Document]],
    *,
    max_per_dataset: int | None = None,
    seed: int = 0,
) -> list[tuple[str, Document]]:
    """The documents of several data sets in one order in which every stretch has of each its share.

    Each data set is shuffled by itself, cut to `max_per_dataset`, and spread evenly: document k of
    n takes place (k + u) / n, with one u in [0, 1) for each data set. The order follows from the
    seed; which documents a data set gives, and their order, does not depend on the others.

    Args:
        documents: For each data set, its documents.
        max_per_dataset: Draw at most so many of each.
        seed: The seed.

    Returns:
        Pairs of data set and document.
    """
    placed: list[tuple[float, str, int]] = []
    shuffled: dict[str, list[Document]] = {}
    for name, of_dataset in documents.items():
        rng = random.Random(f"{seed}/{name}")  # seeded by SHA-512, whatever PYTHONHASHSEED
        shuffled[name] = rng.sample(list(of_dataset), len(of_dataset))[:max_per_dataset]
        shift = rng.random()
        placed += [((k + shift) / len(shuffled[name]), name, k) for k in range(len(shuffled[name]))]
    return [(name, shuffled[name][k]) for _, name, k in sorted(placed)]


def to_dataset(documents: Iterable[tuple[str, Document]]) -> Dataset:
    """Documents as a `datasets.Dataset`: columns id, dataset, task, text and the document as JSON.

    Args:
        documents: Pairs of data set and document, as `mix` gives them.

    Raises:
        ImportError: `datasets` is not installed.
    """
    columns: dict[str, list[str]] = {
        name: [] for name in ("id", "dataset", "task", "text", "document")
    }
    for name, document in documents:
        values = (document.id, name, document.task, document.text, json.dumps(document.to_dict()))
        for column, value in zip(columns.values(), values, strict=True):
            column.append(value)
    return needed("datasets", "uie").Dataset.from_dict(columns)


def to_prompt_completion(
    documents: Iterable[tuple[str, Document]],
    *,
    task_text: Literal["prompt", "schema"] = "prompt",
    format: PromptFormat | None = None,
    regularisers: Regularisers | None = None,
    seed: int = 0,
    mentions: MentionPool | None = None,
    negative_pool: Schema | None = None,
    num_proc: int | None = None,
) -> Dataset:
    """Training examples in the prompt-completion format of TRL.

    `documents` are pairs as `mix` gives them, `num_proc` is a number of processes; the other
    arguments are those of `build_example`. Another `seed` gives other examples, e.g. each epoch.

    `task_text` is what the task encoder reads: the whole "prompt" (the paper's
    task-aware) or the part before the input text, the "schema" (schema-aware).

    Returns:
        A dataset with the string columns id, dataset, prompt, completion and task_text, one row a
        document.

    Raises:
        ValueError: There is no such `task_text`, or a record has a label that is not in its schema.
        ImportError: `datasets` is not installed.
    """
    if task_text not in ("prompt", "schema"):
        raise ValueError(
            f'Found task_text="{task_text}". The task encoder reads the "prompt" or the "schema".'
        )
    options = {
        "format": format,
        "regularisers": regularisers,
        "seed": seed,
        "mentions": mentions,
        "negative_pool": negative_pool,
    }
    return to_dataset(documents).map(
        _training_row,
        fn_kwargs={"task_text": task_text, "options": options},
        remove_columns=["task", "text", "document"],
        num_proc=num_proc,
        desc="Writing prompts",
    )


def _training_row(
    row: Mapping[str, str], task_text: str, options: Mapping[str, Any]
) -> dict[str, str]:
    example = build_example(Document.from_dict(json.loads(row["document"])), **options)
    return {
        "prompt": example.prompt,
        "completion": example.completion,
        "task_text": example.prompt if task_text == "prompt" else example.schema_text,
    }
