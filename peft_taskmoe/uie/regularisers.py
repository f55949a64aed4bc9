"""Regularisers vary how a document is shown in training: label order, masks, negatives.

Everything is a function of (seed, document id) alone: the same in every process. After GoLLIE
(Sainz et al., 2024), written from its description.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias

from peft_taskmoe.uie.records import Document, Entity, Record, Relation
from peft_taskmoe.uie.schema import Kind, Label, Names, Schema

_Chances: TypeAlias = Callable[[str], random.Random]
MentionPool: TypeAlias = Mapping[tuple[Kind, str], Sequence[str]]
"""Mentions seen for each label, by its kind and name; `collect_mentions` makes one."""


@dataclass(frozen=True, slots=True)
class Regularisers:
    """Switches, all off.

    GoLLIE's settings: `Regularisers(shuffle=True, dropout=0.15, mask=0.5, examples=5)`. None looks
    at the gold records to decide an order, a mask or a dropout, so that neither the order of the
    classes nor their presence tells the answer; `max_negatives` alone cannot do without.

    Attributes:
        shuffle: Show the labels in random order instead of the schema's.
        dropout: Probability with which each label is left out, together with its gold records. At
            least one label stays; the label of a given event (EAE) always does.
        mask: Probability with which a document's labels are called `LABEL_1`, `LABEL_2`, ...
            instead of by name. Labels without a guideline keep their names.
        examples: Largest number of example mentions shown with a label. The number is drawn from
            0 to this, the mentions from the pool and the label's own examples, leaving out what
            the document's text contains.
        max_negatives: Largest number of labels shown that the gold records do not have.
        added_negatives: Number of labels added from other schemas (`negative_pool`), of which the
            text is not known to have any record.
    """

    shuffle: bool = False
    dropout: float = 0.0
    mask: float = 0.0
    examples: int = 0
    max_negatives: int | None = None
    added_negatives: int = 0

    def __post_init__(self) -> None:
        for name in ("dropout", "mask"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(
                    f"`{name}` is {getattr(self, name)}. It is a probability: write 0.0 to 1.0."
                )
        for name in ("examples", "max_negatives", "added_negatives"):
            if (getattr(self, name) or 0) < 0:
                raise ValueError(f"`{name}` is {getattr(self, name)}. It counts: write 0 or more.")


def regularise(
    document: Document,
    regularisers: Regularisers,
    seed: int,
    mentions: MentionPool | None = None,
    negative_pool: Schema | None = None,
) -> tuple[Document, Names]:
    """The document as it is shown this time.

    Args:
        document: The document with its gold records.
        regularisers: What to do.
        seed: Together with the document's id, all that chance depends on.
        mentions: Example mentions for each label.
        negative_pool: Labels to add from, for `added_negatives`.

    Returns:
        The document with the labels shown, in the order shown, and the gold records that they ask
        for; and the identifiers of the labels.

    Raises:
        ValueError: `added_negatives` without a `negative_pool`.
    """
    chances = partial(_random, seed, document.id)
    labels = list(document.schema.labels)
    if regularisers.added_negatives:
        labels += _added(labels, regularisers.added_negatives, negative_pool, chances)
    names = Names.of(Schema(tuple(labels)))
    labels = _kept(labels, document, regularisers, chances)
    if regularisers.shuffle:
        chances("shuffle").shuffle(labels)
    if regularisers.examples:
        chance, pool = chances("examples"), mentions or {}
        most, text = regularisers.examples, document.text
        labels = [_with_examples(label, most, pool, text, chance) for label in labels]

    schema = Schema(tuple(labels))
    if regularisers.mask and chances("mask").random() < regularisers.mask:
        names = Names.masked(schema)
    shown_keys = {label.key for label in labels}
    records = tuple(record for record in document.records if key_of(record) in shown_keys)
    return replace(document, schema=schema, records=records), names


def _added(
    labels: Sequence[Label], most: int, pool: Schema | None, chances: _Chances
) -> list[Label]:
    if pool is None:
        raise ValueError(
            f"`added_negatives` is {most}, but there is no schema to add labels from. Pass "
            "`negative_pool=Schema.of(...)`."
        )
    # Labels under whose name this schema asks for something are no negatives.
    own = {label.name for label in labels}
    others = [label for label in pool.labels if label.name not in own]
    return chances("added_negatives").sample(others, min(most, len(others)))


def _kept(
    labels: list[Label], document: Document, regularisers: Regularisers, chances: _Chances
) -> list[Label]:
    """The labels that neither dropout nor the limit of negatives leaves out."""
    if regularisers.dropout:
        chance, given = chances("dropout"), {key_of(event) for event in document.given}
        last = chance.choice(labels)  # stays if no other does
        kept = [x for x in labels if chance.random() >= regularisers.dropout or x.key in given]
        labels = kept or [last]
    if regularisers.max_negatives is not None:
        positive = {key_of(record) for record in document.records}
        negatives = [label for label in labels if label.key not in positive]
        most = min(regularisers.max_negatives, len(negatives))
        shown = set(chances("max_negatives").sample(negatives, most))
        labels = [x for x in labels if x.key in positive or x in shown] or [labels[0]]
    return labels


def collect_mentions(documents: Iterable[Document]) -> dict[tuple[Kind, str], tuple[str, ...]]:
    """The mentions of each label (of an event: its triggers), each once, in order of appearance.

    Relations have none: an example would be a pair, which their guidelines do not speak of.
    """
    pool: dict[tuple[Kind, str], dict[str, None]] = {}
    for document in documents:
        for record in document.records:
            if not isinstance(record, Relation):
                span = record.span if isinstance(record, Entity) else record.trigger
                pool.setdefault(key_of(record), {})[span.text] = None
    return {key: tuple(found) for key, found in pool.items()}


def key_of(record: Record) -> tuple[Kind, str]:
    """The key of a record's label within a schema."""
    if isinstance(record, Entity):
        return ("entity", record.label)
    return ("relation" if isinstance(record, Relation) else "event", record.label)


def _with_examples(
    label: Label, most: int, pool: MentionPool, text: str, chance: random.Random
) -> Label:
    if label.kind == "relation":
        return label
    text = text.casefold()
    seen = dict.fromkeys((*label.examples, *pool.get(label.key, ())))
    candidates = [mention for mention in seen if mention.casefold() not in text]
    number = min(chance.randint(0, most), len(candidates))
    return replace(label, examples=tuple(chance.sample(candidates, number)))


def _random(seed: int, document_id: str, what: str) -> random.Random:
    """A generator for each regulariser, so that one more leaves the others as they are."""
    content = f"{seed}\0{what}\0{document_id}"
    digest = hashlib.sha256(content.encode("utf-8", "surrogatepass")).digest()
    return random.Random(int.from_bytes(digest[:8], "big"))
