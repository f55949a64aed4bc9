"""Labels and their slots: what can be asked for, checked when it is made."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from peft_taskmoe.uie.wording import listed, shown

Task = Literal["NER", "RE", "EE", "EAE", "UIE"]
"""`"UIE"` is a schema of several tasks."""

TASKS: tuple[Task, ...] = ("NER", "RE", "EE", "EAE", "UIE")

Kind = Literal["entity", "relation", "event"]

PLURALS: dict[str, Kind] = {"entities": "entity", "relations": "relation", "events": "event"}
KIND_OF_TASK: dict[str, Kind] = {"NER": "entity", "RE": "relation", "EE": "event", "EAE": "event"}
FIXED_SLOTS: dict[Kind, tuple[str, ...]] = {
    "entity": ("span",),
    "relation": ("head", "tail"),
    "event": ("trigger",),
}


class SchemaError(ValueError):
    """A schema that cannot be used; the message says what to write instead."""


@dataclass(frozen=True, slots=True)
class Slot:
    """A place in a record that words of the text fill.

    Attributes:
        name: `span`, `head`, `tail`, `trigger`, or the role's name, which may be any string.
        description: What belongs there.
        examples: Mentions that could stand there.
        types: Labels of the entities that may stand there; empty where that is left open.
    """

    name: str
    description: str = ""
    examples: tuple[str, ...] = ()
    types: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_name(self.name, "A slot")
        _check_description(self.description, f"Slot `{self.name}`")
        strings(self.examples, f"`examples` of slot `{self.name}`")
        if not all(isinstance(type_, str) and type_ for type_ in self.types):
            raise SchemaError(
                f"Slot `{self.name}` has types {shown(self.types)}. "
                'Write label names: types=("Person",).'
            )

    def to_dict(self) -> dict[str, Any]:
        """The slot's value in a schema dict: what there is to say beside its name."""
        data: dict[str, Any] = {"description": self.description} if self.description else {}
        if self.examples:
            data["examples"] = list(self.examples)
        if self.types:
            data["types"] = list(self.types)
        return data


@dataclass(frozen=True, slots=True)
class Label:
    """One thing that can be asked for.

    Attributes:
        kind: `"entity"`, `"relation"` or `"event"`.
        name: The label, any string (`Life.Die.Unspecified`).
        description: The guideline.
        examples: Mentions that the label covers (of an event: triggers).
        slots: `span`; `head` and `tail`; or `trigger` and the roles. Left out, those are plain.
    """

    kind: Kind
    name: str
    description: str = ""
    examples: tuple[str, ...] = ()
    slots: tuple[Slot, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in FIXED_SLOTS:
            raise SchemaError(
                f"Label `{self.name}` has kind `{self.kind}`. Write one of: {listed(FIXED_SLOTS)}."
            )
        check_name(self.name, f"A label of kind `{self.kind}`")
        _check_description(self.description, f"Label `{self.name}`")
        strings(self.examples, f"`examples` of label `{self.name}`")
        fixed = FIXED_SLOTS[self.kind]
        slots = self.slots or tuple(Slot(name) for name in fixed)
        names = [slot.name for slot in slots]
        roles = names[len(fixed) :]
        if names[: len(fixed)] != list(fixed) or (roles and self.kind != "event"):
            raise SchemaError(
                f"Label `{self.name}` of kind `{self.kind}` has the slots {listed(names)}. Its "
                f"slots must be {listed(fixed)}"
                f"{' followed by its roles' if self.kind == 'event' else ''}."
            )
        if len(roles) > len(set(roles)):
            twice = sorted({role for role in roles if roles.count(role) > 1})
            raise SchemaError(
                f"Event `{self.name}` has the role {listed(twice)} twice. Name each role once."
            )
        object.__setattr__(self, "slots", slots)

    @property
    def roles(self) -> tuple[Slot, ...]:
        """The slots of an event behind its trigger; nothing for other kinds."""
        return self.slots[1:] if self.kind == "event" else ()

    @property
    def key(self) -> tuple[Kind, str]:
        """What names the label within a schema: an entity and an event may share a name."""
        return (self.kind, self.name)

    def to_dict(self) -> dict[str, Any] | str:
        """The label's value in a schema dict, as short as it can be said."""
        data: dict[str, Any] = {"description": self.description}
        if self.examples:
            data["examples"] = list(self.examples)
        for slot in self.slots[: len(FIXED_SLOTS[self.kind])]:
            if said := slot.to_dict():
                data[slot.name] = said
        if self.kind == "event":
            roles = {role.name: role.to_dict() for role in self.roles}
            data["roles"] = roles if any(roles.values()) else list(roles)
        return self.description if len(data) == 1 else data


def check_name(name: Any, what: str) -> None:
    """Raise `SchemaError` unless the name is a string that is not blank."""
    if not isinstance(name, str) or not name.strip():
        raise SchemaError(f'{what} is named {shown(name)}. Write a name with letters: "Person".')


def strings(value: Any, what: str) -> tuple[str, ...]:
    """Examples or types as a tuple; raises `SchemaError` for anything but strings with words."""
    if value is None:
        return ()
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise SchemaError(
            f"{what} is {shown(value)}. Write a list of strings: [{json.dumps(shown_text(value))}]."
        )
    found = tuple(value)
    if not all(isinstance(part, str) and part for part in found):
        raise SchemaError(f"{what} is {shown(value)}. Write a list of strings.")
    return found


def shown_text(value: Any) -> str:
    """A value as an example of what to write: a string as it is, another as Python shows it."""
    return value if isinstance(value, str) else shown(value)


def _check_description(description: Any, what: str) -> None:
    if not isinstance(description, str):
        raise SchemaError(f"{what} has the description {shown(description)}. Write it as a string.")
