"""Which labels of which data set a model has seen in training: a table that a person can change."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_OF_THE_PACKAGE = Path(__file__).with_name("seen_labels.json")
_SHAPE = '`{"datasets": {NAME: {"seen": {LABEL: REASON}, "unseen": [LABEL]}}}`'


@dataclass(frozen=True, slots=True)
class SeenLabels:
    """The seen and the unseen labels of data sets.

    The paper's rule: a label is seen if its concept occurs in the training sets, even under another
    task or name. The file is JSON: `{"datasets": {"crossner_ai": {"seen": {"person": "wnut17
    person"}, "unseen": ["field"]}}}`, each seen label with its reason; other keys are notes for the
    reader. The one in the package covers public sets, with the training sets that it assumes.

    Args:
        seen: For each data set, its seen labels, each with the reason.
        unseen: For each data set, its other labels.
    """

    seen: Mapping[str, Mapping[str, str]]
    unseen: Mapping[str, tuple[str, ...]]

    @classmethod
    def load(cls, path: str | Path = _OF_THE_PACKAGE) -> SeenLabels:
        """Read a table; without a path, the one in the package.

        Raises:
            ValueError: If the file is no such table, or has a label in both lists of a data set.
        """
        table = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(table, dict) or not isinstance(table.get("datasets"), dict):
            raise ValueError(f"`{path}` has no table of data sets. Write it as {_SHAPE}.")
        seen: dict[str, dict[str, str]] = {}
        unseen: dict[str, tuple[str, ...]] = {}
        for name, entry in table["datasets"].items():
            where = f"ata set `{name}` in `{path}`"
            if not isinstance(entry, dict) or set(entry) != {"seen", "unseen"}:
                raise ValueError(f'D{where} needs the keys "seen" and "unseen": {_SHAPE}.')
            if not isinstance(entry["seen"], dict) or not isinstance(entry["unseen"], list):
                raise ValueError(f"D{where} has lists of the wrong kind. Write it as {_SHAPE}.")
            seen[name], unseen[name] = entry["seen"], tuple(entry["unseen"])
            if both := sorted(set(seen[name]) & set(map(str, unseen[name]))):
                raise ValueError(
                    f"Label `{both[0]}` of d{where} is both seen and unseen. Keep it in one."
                )
        return cls(seen, unseen)

    def __contains__(self, dataset: str) -> bool:
        return dataset in self.seen

    def knows(self, dataset: str, label: str) -> bool:
        """Whether the label stands in one of the lists of the data set."""
        return label in self.seen[dataset] or label in self.unseen[dataset]
