"""The identifiers of a schema's labels and roles, both ways."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from peft_taskmoe.uie.identifiers import canonical, identifier_of, identifiers_of
from peft_taskmoe.uie.schema.labels import FIXED_SLOTS, Kind, Label

_RESERVED = (
    *("Entity", "Relation", "Event", "List", "str"),
    *("dataclass", "text", "result", "given", "__debug__"),
)


class _HasLabels(Protocol):
    @property
    def labels(self) -> tuple[Label, ...]: ...


@dataclass(frozen=True)
class Names:
    """The Python identifiers that stand for labels and roles in a prompt and its answer.

    An identifier is the name itself where that is one, otherwise the name with `_` for every
    character that cannot be part of one (`Life_Die_Unspecified`), NFKC-normalised as Python's own
    parser does, `_` behind a keyword or a word that the prompt needs, and a number behind the
    second of two that would be the same. It does not depend on the order of the labels.

    Attributes:
        entries: For each label: kind, name, class identifier, identifiers of its slots in order.
    """

    entries: tuple[tuple[Kind, str, str, tuple[str, ...]], ...]

    @classmethod
    def of(cls, schema: _HasLabels) -> Names:
        """The identifiers of all labels of a schema."""
        # Names that are identifiers keep theirs, whatever else is in the schema.
        order = sorted(schema.labels, key=lambda x: (identifier_of(x.name) != x.name, x.key))
        identifiers = identifiers_of([label.name for label in order], _RESERVED)
        classes = {label.key: name for label, name in zip(order, identifiers, strict=True)}
        return cls(tuple((*x.key, classes[x.key], _slot_identifiers(x)) for x in schema.labels))

    @classmethod
    def masked(cls, schema: _HasLabels) -> Names:
        """The same with `LABEL_1`, `LABEL_2`, ... for the classes, in the schema's order.

        A label that nothing is said about but its name keeps it: no model could know what
        `LABEL_3` is.
        """
        return cls(
            tuple(
                (*label.key, f"LABEL_{n}" if label.description or label.examples else class_, slots)
                for n, (label, (_, _, class_, slots)) in enumerate(
                    zip(schema.labels, cls.of(schema).entries, strict=True), start=1
                )
            )
        )

    def class_of(self, label: Label) -> str:
        """The class identifier of a label."""
        return self._forward[label.key][0]

    def slots_of(self, label: Label) -> tuple[str, ...]:
        """The identifiers of a label's slots, in their order."""
        return self._forward[label.key][1]

    def label_key(self, identifier: str) -> tuple[Kind, str] | None:
        """Kind and name of the label that a class identifier stands for, or `None`."""
        return self._back.get(canonical(identifier))

    @cached_property
    def _forward(self) -> dict[tuple[Kind, str], tuple[str, tuple[str, ...]]]:
        return {(kind, name): (class_, slots) for kind, name, class_, slots in self.entries}

    @cached_property
    def _back(self) -> dict[str, tuple[Kind, str]]:
        return {class_: (kind, name) for kind, name, class_, _ in self.entries}


def _slot_identifiers(label: Label) -> tuple[str, ...]:
    fixed = FIXED_SLOTS[label.kind]
    names = [slot.name for slot in label.slots[len(fixed) :]]
    # Natural identifiers first, as for classes; `..._nth` is the word for an occurrence.
    order = sorted(names, key=lambda name: (identifier_of(name) != name, name))
    stems = [f"{name}_" if identifier_of(name).endswith("_nth") else name for name in order]
    identifiers = dict(zip(order, identifiers_of(stems, (*fixed, "__debug__")), strict=True))
    return (*fixed, *(identifiers[name] for name in names))
