"""`Schema`: an ordered set of labels, from whatever a user has and back to JSON."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from peft_taskmoe.uie.schema.classes import labels_from_class
from peft_taskmoe.uie.schema.dicts import labels_from_dict
from peft_taskmoe.uie.schema.labels import (
    KIND_OF_TASK,
    PLURALS,
    TASKS,
    Kind,
    Label,
    SchemaError,
    Task,
)
from peft_taskmoe.uie.schema.names import Names
from peft_taskmoe.uie.strict_json import parse_json
from peft_taskmoe.uie.wording import listed, shown


@dataclass(frozen=True)
class Schema:
    """An immutable, ordered set of labels. `Schema.of(...)` builds one from whatever a user has.

    `Schema.of` and `from_dict` put entities first, then relations, then events: documents keep no
    other order between kinds. A schema made from labels keeps theirs, for training may shuffle
    them across kinds (`Regularisers`); in a file it gets the order of the kinds.

    Attributes:
        labels: The labels, in the order in which prompts show them.
    """

    labels: tuple[Label, ...]

    def __post_init__(self) -> None:
        if not self.labels:
            raise SchemaError(
                'The schema has no labels. Write at least one: {"Person": "names of people"}.'
            )
        seen: set[tuple[Kind, str]] = set()
        for label in self.labels:
            if not isinstance(label, Label):
                raise SchemaError(
                    f"`{shown(label)}` is no `Label`. Build schemas with `Schema.of(...)`."
                )
            if label.key in seen:
                raise SchemaError(
                    f"The {label.kind} `{label.name}` is defined twice. Keep one of the two."
                )
            seen.add(label.key)

    @classmethod
    def of(cls, *sources: Any) -> Schema:
        """Build a schema of everything that is passed: in that order, kind by kind.

        Args:
            sources: Any of: subclasses of `EntityType`, `RelationType`, `EventType`; Pydantic
                models; dicts `{label: description}` or with richer values (see `from_dict`, task
                `"UIE"`); paths of JSON files, as `Path` or as a string that ends in `.json` or
                is the path of a file; lists or tuples of these, or of entity label names;
                `Label`s and `Schema`s.

        Returns:
            The schema. A label that several sources define in the same words is kept once.

        Raises:
            SchemaError: A source cannot be read; the message says what to write.
        """
        flat = list(_flatten(sources))
        classes = {c.__name__: c for c in flat if isinstance(c, type)}
        labels: dict[Label, None] = {}
        for source in flat:
            labels.update(dict.fromkeys(cls._read(source, classes)))
        return cls(_by_kind(labels))

    @classmethod
    def _read(cls, source: Any, classes: Mapping[str, type]) -> Iterable[Label]:
        if isinstance(source, Label):
            return (source,)
        if isinstance(source, Schema):
            return source.labels
        if isinstance(source, Mapping):
            return cls.from_dict("UIE", source).labels
        if isinstance(source, Path) or (isinstance(source, str) and _is_path(source)):
            return cls.from_json(source).labels
        if isinstance(source, str):
            return (Label("entity", source),)
        return labels_from_class(source, classes)

    @classmethod
    def from_dict(cls, task: str, data: Mapping[str, Any] | Sequence[str]) -> Schema:
        """Read a schema dict.

        Args:
            task: `"NER"`, `"RE"`, `"EE"` or `"EAE"` say what the labels are. With `"UIE"`, `data`
                is either `{"entities": {...}, "relations": {...}, "events": {...}}` (any of the
                three) or one dict in which a value with `roles` or `trigger` is an event, one with
                `head` or `tail` a relation, any other an entity.
            data: `{label: value}`, where a value is a description, or a dict with `description`,
                `examples` and, of a relation, `head` and `tail`, of an event `trigger` and
                `roles`. `roles` is a list of names or `{role: slot}`. A slot is a description or
                `{"description", "examples", "types"}`; of a relation, a list of types. A list of
                names stands for labels without description.

        Returns:
            The schema: in the order of the dict, kind by kind.

        Raises:
            SchemaError: The task is unknown, or a value cannot be read.
        """
        return cls(_by_kind(labels_from_dict(task, data)))

    @classmethod
    def from_json(cls, path: str | Path) -> Schema:
        """Read a JSON file with a schema dict as `from_dict("UIE", ...)` takes it.

        Raises:
            SchemaError: The file is not JSON or no schema; the message names it.
        """
        try:
            return cls.from_dict("UIE", parse_json(Path(path).read_text(encoding="utf-8-sig")))
        except ValueError as error:
            raise SchemaError(f"`{path}` holds no schema: {error}") from error

    def to_dict(self, task: str = "UIE") -> dict[str, Any]:
        """The schema dict that `from_dict(task, ...)` reads.

        Args:
            task: `"UIE"` gives `{"entities": {...}, "relations": {...}, "events": {...}}` (those
                there are), another task the plain `{label: value}` of the JSONL format.

        Raises:
            SchemaError: The schema has labels that the task does not know.
        """
        if task == "UIE":
            groups = {
                plural: {label.name: label.to_dict() for label in self.labels if label.kind == kind}
                for plural, kind in PLURALS.items()
            }
            return {plural: group for plural, group in groups.items() if group}
        foreign = [label.name for label in self.labels if label.kind != KIND_OF_TASK[task]]
        if foreign:
            raise SchemaError(
                f"Task `{task}` has no place for {listed(foreign)}. "
                "Use task `UIE` for several tasks."
            )
        return {label.name: label.to_dict() for label in self.labels}

    def fingerprint(self) -> str:
        """SHA-256, as hex, of everything a prompt could show of the schema, its order included."""
        content = [[label.kind, label.name, label.to_dict()] for label in self.labels]
        return hashlib.sha256(json.dumps(content).encode("ascii")).hexdigest()

    @property
    def tasks(self) -> tuple[Task, ...]:
        """The tasks that the labels ask for: some of `"NER"`, `"RE"`, `"EE"`."""
        kinds = {label.kind for label in self.labels}
        return tuple(task for task in TASKS[:3] if KIND_OF_TASK[task] in kinds)

    def get(self, kind: str, name: str) -> Label | None:
        """The label of this kind and name, or `None`."""
        return self._by_key.get((kind, name))

    @cached_property
    def _by_key(self) -> dict[tuple[str, str], Label]:
        return {label.key: label for label in self.labels}

    @cached_property
    def names(self) -> Names:
        """The identifiers of the schema's own names."""
        return Names.of(self)


def _by_kind(labels: Iterable[Label]) -> tuple[Label, ...]:
    """The labels with entities first, then relations, then events."""
    kinds = tuple(PLURALS.values())
    return tuple(sorted(labels, key=lambda label: kinds.index(label.kind)))


def _flatten(sources: Iterable[Any]) -> Iterable[Any]:
    for source in sources:
        if isinstance(source, (list, tuple)):
            yield from _flatten(source)
        else:
            yield source


def _is_path(source: str) -> bool:
    """Whether a string means a file; a plain word is a label whatever files there are."""
    if source.lower().endswith(".json"):
        if not os.path.isfile(source):
            raise SchemaError(
                f"There is no file `{source}`. Pass the path of a schema file; "
                f'a label of that name is {{"{source}": ""}}.'
            )
        return True
    return (os.sep in source or "." in source) and os.path.isfile(source)
