"""Labels from schema dicts, as Python and JSON have them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from peft_taskmoe.uie.schema.labels import (
    FIXED_SLOTS,
    KIND_OF_TASK,
    PLURALS,
    TASKS,
    Kind,
    Label,
    SchemaError,
    Slot,
    check_name,
    strings,
)
from peft_taskmoe.uie.wording import listed, shown


def labels_from_dict(task: str, data: Any) -> tuple[Label, ...]:
    """The labels of a schema dict; see `Schema.from_dict`."""
    if task not in TASKS:
        raise SchemaError(f"`{task}` is no task. Write one of: {listed(TASKS)}.")
    values = _by_name(data, "A schema cannot be read from")
    grouped = task == "UIE" and values and set(values) <= set(PLURALS)
    if grouped and not any(isinstance(value, str) for value in values.values()):
        return tuple(
            _label(PLURALS[plural], name, value)
            for plural, group in values.items()
            for name, value in _by_name(group, f"`{plural}` of the schema is").items()
        )
    kind = KIND_OF_TASK.get(task)
    return tuple(_label(kind or _guess_kind(v), name, v) for name, v in values.items())


def _by_name(data: Any, what: str) -> Mapping[Any, Any]:
    """Labels (or roles) with their values; a list has only names."""
    if isinstance(data, Mapping):
        return data
    if isinstance(data, (str, bytes)) or not isinstance(data, Sequence):
        raise SchemaError(f"{what} {shown(data)}. Write a dict: {{label: description}}.")
    for name in data:
        check_name(name, "A label or role")
    return dict.fromkeys(data)


def _guess_kind(value: Any) -> Kind:
    keys = set(value) if isinstance(value, Mapping) else set()
    if keys & {"roles", "trigger"}:
        return "event"
    return "relation" if keys & {"head", "tail"} else "entity"


def _label(kind: Kind, name: Any, value: Any) -> Label:
    check_name(name, f"A label of kind `{kind}`")
    if value is None or isinstance(value, str):
        return Label(kind, name, value or "")
    if not isinstance(value, Mapping):
        raise SchemaError(
            f"The {kind} `{name}` is described by {shown(value)}. "
            f'Write a description: {{{json.dumps(name)}: "..."}}.'
        )
    fixed = FIXED_SLOTS[kind]
    known = {"description", "examples", *fixed, *(("roles",) if kind == "event" else ())}
    if unknown := sorted(set(map(str, value)) - known):
        raise SchemaError(
            f"The {kind} `{name}` has the keys {listed(unknown)}. "
            f"A{'n' if kind != 'relation' else ''} {kind} takes {listed(sorted(known))}."
        )
    slots = [_slot(slot, value.get(slot), kind) for slot in fixed]
    if (roles := value.get("roles")) is not None:
        if isinstance(roles, (str, bytes)) or not isinstance(roles, (Mapping, Sequence)):
            raise SchemaError(
                f"The event `{name}` has roles {shown(roles)}. "
                'Write a list of names: "roles": ["Victim"].'
            )
        # A role that is listed twice is one role that several mentions may fill.
        slots += [_slot(role, x, kind) for role, x in _by_name(roles, "").items()]
    examples = strings(value.get("examples"), f"`examples` of `{name}`")
    return Label(kind, name, _description(value), examples, tuple(slots))


def _slot(name: Any, value: Any, kind: Kind) -> Slot:
    check_name(name, f"A slot of kind `{kind}`")
    if value is None:
        return Slot(name)
    if isinstance(value, str):
        # What a relation's end is, its type says; what a role is, its description.
        return Slot(name, types=(value,)) if kind == "relation" else Slot(name, value)
    if isinstance(value, Sequence):
        return Slot(name, types=strings(value, f"types of `{name}`"))
    known = {"description", "examples", "types"}
    if not isinstance(value, Mapping) or set(map(str, value)) - known:
        raise SchemaError(
            f"The slot `{name}` is described by {shown(value)}. Write a description, or a dict "
            f"with {listed(sorted(known))}."
        )
    examples = strings(value.get("examples"), f"`examples` of slot `{name}`")
    types_ = strings(value.get("types"), f"`types` of slot `{name}`")
    return Slot(name, _description(value), examples, types_)


def _description(value: Mapping[Any, Any]) -> Any:
    description = value.get("description")
    return "" if description is None else description
