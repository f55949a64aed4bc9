"""Which labels are taken for which: the gold and predicted labels of the same mentions."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable

from .matching import Answers, Documents, Items, Match, items_of, parts_of, tasks_of, usable

NOT_FOUND = "(not found)"
NOT_GOLD = "(not gold)"


def confusion(
    documents: Documents, answers: Answers, match: Match = "text"
) -> Counter[tuple[str, str]]:
    """How often a gold label was answered by a predicted one.

    Items of a task that agree in all but the label (of an argument, its role) belong together.
    Equal labels are matched first. A gold item that is left over counts under `NOT_FOUND`, a
    predicted one under `NOT_GOLD`. The arguments are those of `score`.

    Returns:
        Counts by (gold label, predicted label).
    """
    found: Counter[tuple[str, str]] = Counter()
    for name, of_dataset in documents.items():
        for document in of_dataset:
            records, _ = parts_of(answers.get(name, {}).get(document.id, ()), document)
            kept, _, _ = usable(records, document, count_not_found=False)
            for task in tasks_of(document):
                gold, predicted = (
                    _labels(items_of(of, task, match, document.id), task)
                    for of in (document.records, kept)
                )
                for place in gold.keys() | predicted.keys():
                    found += _pairs(gold[place], predicted[place])
    return found


def _labels(items: Items, task: str) -> defaultdict[Hashable, Counter[str]]:
    """The labels of each item without its label; of EAE, roles."""
    at = 2 if task == "EAE" else 0
    labels: defaultdict[Hashable, Counter[str]] = defaultdict(Counter)
    for item, count in items.items():
        rest = (*item[:at], *item[at + 1 :])
        labels[rest][str(item[at])] += count
    return labels


def _pairs(gold: Counter[str], predicted: Counter[str]) -> Counter[tuple[str, str]]:
    pairs = Counter({(label, label): count for label, count in (gold & predicted).items()})
    left = sorted((gold - predicted).elements())
    wrong = sorted((predicted - gold).elements())
    pairs.update(zip(left, wrong, strict=False))
    pairs.update((label, NOT_FOUND) for label in left[len(wrong) :])
    pairs.update((NOT_GOLD, label) for label in wrong[len(left) :])
    return pairs
