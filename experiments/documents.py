"""The documents of an experiment: which are trained on, in what order, and which are measured."""

from __future__ import annotations

import hashlib
import json
import random
from dataclasses import dataclass

from datasets import Dataset, concatenate_datasets
from settings import ExperimentArguments
from trl import SFTConfig

from peft_taskmoe.uie import Document, mix, read_datasets, sample, to_prompt_completion

Documents = dict[str, list[Document]]
SORTED_TOGETHER = 16
"""Batches whose documents are sorted together: more saves padding, fewer mix the tasks better."""


@dataclass
class Data:
    """The documents by data set, the same for all runs but for `train`, which a seed samples."""

    train: Documents
    dev: Documents
    zero_shot: Documents
    supervised: Documents

    @classmethod
    def read(cls, args: ExperimentArguments) -> Data:
        """Read all data sets; a bad line stops the run with its file and number."""
        pool = read_datasets(args.train_data, split="train")
        dev = {name: sample(documents, args.dev_documents, 0) for name, documents in pool.items()}
        kept = {name: {document.id for document in documents} for name, documents in dev.items()}
        train = {
            name: [d for d in documents if d.id not in kept[name]]
            for name, documents in pool.items()
        }
        return cls(
            train,
            dev,
            read_datasets(args.zero_shot_data, split="test", limit=args.zero_shot_documents),
            read_datasets(args.supervised_data, split="test", limit=args.supervised_documents),
        )

    def training_documents(self, args: ExperimentArguments, seed: int) -> Documents:
        """A seed's sample of the training documents."""
        wanted = {
            name: args.train_documents_of.get(name, args.train_documents) for name in self.train
        }
        return {
            name: documents if wanted[name] is None else sample(documents, wanted[name] or 0, seed)
            for name, documents in self.train.items()
        }

    def checksum(self) -> str:
        """Tells whether two comparisons read the same documents."""
        parts = (self.train, self.dev, self.zero_shot, self.supervised)
        content = [
            [name, [d.to_dict() for d in docs]] for part in parts for name, docs in part.items()
        ]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def measured(self) -> Documents:
        """All data sets that answers are scored on; a supervised set goes by its own name."""
        return {**self.supervised, **self.zero_shot}


def training_examples(
    documents: Documents,
    args: ExperimentArguments,
    sft: SFTConfig,
    seed: int,
    task_text: str = "prompt",
) -> Dataset:
    """Prompts and completions in their order, the same for every configuration of a seed.

    An epoch's documents are shuffled, sorted by length within blocks of a few batches, cut into
    batches of one device's size, and the batches shuffled: documents of like length share a batch,
    whatever their task.
    """
    size = sft.per_device_train_batch_size
    epochs = []
    for epoch in range(args.epochs):
        examples = to_prompt_completion(
            mix(documents, seed=seed + epoch),
            task_text=task_text,  # type: ignore[arg-type]
            format=args.format,
            regularisers=args.regularisers,
            seed=seed + 1000 * epoch,
        )
        lengths = [len(row["prompt"]) + len(row["completion"]) for row in examples]
        chance = random.Random(f"{seed} {epoch}")
        order = list(range(len(lengths)))
        chance.shuffle(order)
        block = size * SORTED_TOGETHER
        order = [
            i
            for start in range(0, len(order), block)
            for i in sorted(order[start : start + block], key=lambda i: lengths[i])
        ]
        batches = [order[start : start + size] for start in range(0, len(order) - size + 1, size)]
        chance.shuffle(batches)
        epochs.append(examples.select([i for batch in batches for i in batch]))
    return concatenate_datasets(epochs)


def swapped(sets: Documents) -> dict[tuple[str, str], Document]:
    """For every document another one, whose task embedding it gets when embeddings are swapped.

    It is of the data set half-way round the list: data sets of one family stand side by side.
    """
    names = list(sets)
    found = {}
    for i, name in enumerate(names):
        other = sets[names[(i + len(names) // 2) % len(names)]]
        for j, document in enumerate(sets[name]):
            found[name, document.id] = other[j % len(other)]
    return found


def count_schemas(documents: Documents) -> int:
    """Number of distinct sets of labels that the documents of each data set ask for."""
    return len(
        {
            (name, frozenset(label.name for label in one.schema.labels))
            for name, found in documents.items()
            for one in found
        }
    )
