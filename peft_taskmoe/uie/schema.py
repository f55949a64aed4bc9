"""What can be asked for: labels with guidelines and slots, however a user writes them down.

Knows the ways to define a schema (classes, Pydantic models, dicts, JSON, the JSONL's schema dicts), checks them at
definition, and knows the Python identifiers that stand for label and role names in prompts, both ways. Does not know
how a schema is shown to a model (`prompt`) nor how answers are read (`parse`).

A schema of classes::

    class Person(EntityType):
        '''Names of people.'''

    class WorksFor(RelationType):
        '''The head works for the tail.'''
        head: Person
        tail: Organisation | Company

    class Attack(EventType):
        '''Somebody attacks somebody.'''
        attacker: list[Person]
        place: Annotated[str, "where it happened"]

    schema = Schema.of(Person, WorksFor, Attack)
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import hashlib
import json
import keyword
import types
import typing
import unicodedata
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

Task = Literal["NER", "RE", "EE", "EAE", "UIE"]
"""`"UIE"` is a schema of several tasks."""

TASKS: tuple[Task, ...] = ("NER", "RE", "EE", "EAE", "UIE")

Kind = Literal["entity", "relation", "event"]

_KINDS: tuple[Kind, ...] = ("entity", "relation", "event")
_PLURALS: dict[str, Kind] = {"entities": "entity", "relations": "relation", "events": "event"}
_KIND_OF_TASK: dict[str, Kind] = {"NER": "entity", "RE": "relation", "EE": "event", "EAE": "event"}
_FIXED_SLOTS: dict[Kind, tuple[str, ...]] = {
    "entity": ("span",),
    "relation": ("head", "tail"),
    "event": ("trigger",),
}


class SchemaError(ValueError):
    """A schema that cannot be used; the message holds the line to write instead."""


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
        _check_name(self.name, "A slot")
        _check_strings(self.description, self.examples, f"Slot `{self.name}`")
        if not all(isinstance(type_, str) and type_ for type_ in self.types):
            raise SchemaError(
                f'Slot `{self.name}` has types {self.types!r}. Write label names: types=("Person",).'
            )


@dataclass(frozen=True, slots=True)
class Label:
    """One thing that can be asked for.

    Attributes:
        kind: `"entity"`, `"relation"` or `"event"`.
        name: The label, any string (`Life.Die.Unspecified`).
        description: The guideline.
        examples: Mentions that the label covers (of an event: triggers).
        slots: `span`; `head` and `tail`; or `trigger` and the roles. Left out, an entity's or relation's are plain.
    """

    kind: Kind
    name: str
    description: str = ""
    examples: tuple[str, ...] = ()
    slots: tuple[Slot, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in _KINDS:
            raise SchemaError(
                f"Label `{self.name}` has kind `{self.kind}`. Write one of: {_list(_KINDS)}."
            )
        _check_name(self.name, f"A label of kind `{self.kind}`")
        _check_strings(self.description, self.examples, f"Label `{self.name}`")
        fixed = _FIXED_SLOTS[self.kind]
        slots = self.slots or tuple(Slot(name) for name in fixed)
        names = [slot.name for slot in slots]
        if names[: len(fixed)] != list(fixed) or (
            self.kind != "event" and len(names) != len(fixed)
        ):
            raise SchemaError(
                f"Label `{self.name}` of kind `{self.kind}` has the slots {_list(names)}. Its slots must be "
                f"{_list(fixed)}{' followed by its roles' if self.kind == 'event' else ''}."
            )
        roles = names[len(fixed) :]
        twice = sorted({role for role in roles if roles.count(role) > 1})
        if twice:
            raise SchemaError(
                f"Event `{self.name}` has the role {_list(twice)} twice. Name each role once."
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
        if self.kind == "event":
            if self.slots[0] != Slot("trigger"):
                data["trigger"] = _slot_to_dict(self.slots[0])
            if all(role == Slot(role.name) for role in self.roles):
                data["roles"] = [role.name for role in self.roles]
            else:
                data["roles"] = {role.name: _slot_to_dict(role) for role in self.roles}
            return data
        for slot in self.slots:
            if slot != Slot(slot.name):
                data[slot.name] = _slot_to_dict(slot)
        return self.description if len(data) == 1 else data


@dataclass(frozen=True)
class Schema:
    """An immutable, ordered set of labels. `Schema.of(...)` builds one from whatever a user has.

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
                    f"`{label!r}` is no `Label`. Build schemas with `Schema.of(...)`."
                )
            if label.key in seen:
                raise SchemaError(
                    f"The {label.kind} `{label.name}` is defined twice. Keep one of the two."
                )
            seen.add(label.key)

    @classmethod
    def of(cls, *sources: Any) -> Schema:
        """Build a schema of everything that is passed, in that order.

        Args:
            sources: Any of: subclasses of `EntityType`, `RelationType`, `EventType`; Pydantic models; dicts
                `{label: description}` or with richer values (see `from_dict`, task `"UIE"`); `Path`s of JSON
                files; lists or tuples of these, or of entity label names; `Label`s and `Schema`s.

        Returns:
            The schema. A label that several sources define in the same words is kept once.

        Raises:
            SchemaError: A source cannot be read; the message says what to write.
        """
        classes = {c.__name__: c for c in _flatten(sources) if isinstance(c, type)}
        labels: dict[Label, None] = {}
        for source in _flatten(sources):
            labels.update(dict.fromkeys(_read_source(source, classes)))
        return cls(tuple(labels))

    @classmethod
    def from_dict(cls, task: str, data: Mapping[str, Any] | Sequence[str]) -> Schema:
        """Read a schema dict.

        Args:
            task: `"NER"`, `"RE"`, `"EE"` or `"EAE"` say what the labels are. With `"UIE"`, `data` is either
                `{"entities": {...}, "relations": {...}, "events": {...}}` (any of the three) or one dict in which
                a value with `roles` or `trigger` is an event, one with `head` or `tail` a relation, any other an
                entity.
            data: `{label: value}`, where a value is a description, or a dict with `description`, `examples` and, of
                a relation, `head` and `tail`, of an event `trigger` and `roles`. `roles` is a list of names or
                `{role: slot}`. A slot is a description or `{"description", "examples", "types"}`; of a relation, a
                list of types. A list of names stands for labels without description.

        Returns:
            The schema, in the order of the dict.

        Raises:
            SchemaError: The task is unknown, or a value cannot be read.
        """
        if task not in TASKS:
            raise SchemaError(f"`{task}` is no task. Write one of: {_list(TASKS)}.")
        if isinstance(data, str) or not isinstance(data, (Mapping, Sequence)):
            raise SchemaError(
                f"A schema cannot be read from {data!r}. Write a dict: {{label: description}}."
            )
        if not isinstance(data, Mapping):
            data = dict.fromkeys(data, "")
        if (
            task == "UIE"
            and data
            and set(data) <= set(_PLURALS)
            and not any(isinstance(v, str) for v in data.values())
        ):
            parts = []
            for plural, labels in data.items():
                part = labels if isinstance(labels, Mapping) else dict.fromkeys(labels, "")
                parts += [
                    _label_from_dict(_PLURALS[plural], name, value) for name, value in part.items()
                ]
            return cls(tuple(parts))
        kind = _KIND_OF_TASK.get(task)
        return cls(
            tuple(_label_from_dict(kind or _guess_kind(v), name, v) for name, v in data.items())
        )

    @classmethod
    def from_json(cls, path: str | Path) -> Schema:
        """Read a JSON file with a schema dict as `from_dict("UIE", ...)` takes it.

        Raises:
            SchemaError: The file is not JSON or no schema; the message names it.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls.from_dict("UIE", data)
        except ValueError as error:
            raise SchemaError(f"`{path}` holds no schema: {error}") from error

    def to_dict(self, task: str = "UIE") -> dict[str, Any]:
        """The schema dict that `from_dict(task, ...)` reads.

        Args:
            task: `"UIE"` gives `{"entities": {...}, "relations": {...}, "events": {...}}` (those there are),
                another task the plain `{label: value}` of the JSONL format.

        Raises:
            SchemaError: The schema has labels that the task does not know.
        """
        if task == "UIE":
            groups = {
                plural: {label.name: label.to_dict() for label in self.labels if label.kind == kind}
                for plural, kind in _PLURALS.items()
            }
            return {plural: group for plural, group in groups.items() if group}
        foreign = [label.name for label in self.labels if label.kind != _KIND_OF_TASK[task]]
        if foreign:
            raise SchemaError(
                f"Task `{task}` has no place for {_list(foreign)}. Use task `UIE` for several tasks."
            )
        return {label.name: label.to_dict() for label in self.labels}

    def fingerprint(self) -> str:
        """SHA-256, as hex, of everything a prompt could show of the schema, its order included."""
        content = [[label.kind, label.name, label.to_dict()] for label in self.labels]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode("ascii")).hexdigest()

    @property
    def tasks(self) -> tuple[Task, ...]:
        """The tasks that the labels ask for: some of `"NER"`, `"RE"`, `"EE"`."""
        kinds = {label.kind for label in self.labels}
        return tuple(task for task in TASKS[:3] if _KIND_OF_TASK[task] in kinds)

    def select(self, labels: Iterable[Label]) -> Schema:
        """The schema of these labels, in their order."""
        return Schema(tuple(labels))

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


@dataclass(frozen=True)
class Names:
    """The Python identifiers that stand for labels and roles in a prompt and its answer.

    An identifier is the name itself where that is one, otherwise the name with `_` for every character that cannot
    be part of one (`Life_Die_Unspecified`), NFKC-normalised as Python's own parser does, `_` behind a keyword or a
    word that the prompt needs, and a number behind the second of two that would be the same. It does not depend on
    the order of the labels.

    Attributes:
        entries: For each label: kind, name, class identifier, identifiers of its slots (in the label's order).
    """

    entries: tuple[tuple[Kind, str, str, tuple[str, ...]], ...]

    @classmethod
    def of(cls, schema: Schema) -> Names:
        """The identifiers of all labels of a schema."""
        # Names that are identifiers keep theirs, whatever else is in the schema.
        order = sorted(
            schema.labels, key=lambda label: (_identifier(label.name) != label.name, label.key)
        )
        classes = dict(
            zip(
                (label.key for label in order),
                _identifiers([x.name for x in order], _RESERVED),
                strict=True,
            )
        )
        return cls(
            tuple(
                (*label.key, classes[label.key], _slot_identifiers(label))
                for label in schema.labels
            )
        )

    @classmethod
    def masked(cls, schema: Schema) -> Names:
        """The same with `LABEL_1`, `LABEL_2`, ... for the classes, counted in the schema's order.

        A label that nothing is said about but its name keeps it: no model could know what `LABEL_3` is.
        """
        plain = cls.of(schema)
        return cls(
            tuple(
                (
                    *label.key,
                    f"LABEL_{number}"
                    if label.description or label.examples
                    else plain.class_of(label),
                    plain.slots_of(label),
                )
                for number, label in enumerate(schema.labels, start=1)
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
        return self._back.get(identifier)

    @cached_property
    def _forward(self) -> dict[tuple[Kind, str], tuple[str, tuple[str, ...]]]:
        return {(kind, name): (class_, slots) for kind, name, class_, slots in self.entries}

    @cached_property
    def _back(self) -> dict[str, tuple[Kind, str]]:
        return {class_: (kind, name) for kind, name, class_, _ in self.entries}


# --- identifiers ---------------------------------------------------------------------------------------------------

_RESERVED = (
    "Entity",
    "Relation",
    "Event",
    "List",
    "str",
    "dataclass",
    "text",
    "result",
    "given",
    "__debug__",
)


def _identifier(name: str) -> str:
    normal = unicodedata.normalize("NFKC", name)
    word = "".join(c if f"_{c}".isidentifier() else "_" for c in normal)
    word = unicodedata.normalize("NFKC", word)
    if not word.strip("_"):
        return "label"
    return word if word.isidentifier() else f"_{word}"


def _identifiers(names: Sequence[str], reserved: Collection[str]) -> list[str]:
    taken = set(reserved)
    identifiers = []
    for name in names:
        stem = _identifier(name)
        if (
            keyword.iskeyword(stem) or stem in reserved or stem.startswith("LABEL_")
        ):  # masks are called so
            stem += "_"
        identifier, number = stem, 2
        while identifier in taken:
            identifier, number = f"{stem}_{number}", number + 1
        taken.add(identifier)
        identifiers.append(identifier)
    return identifiers


def _slot_identifiers(label: Label) -> tuple[str, ...]:
    fixed = _FIXED_SLOTS[label.kind]
    names = [slot.name for slot in label.slots[len(fixed) :]]
    # Natural identifiers first, as for classes; `..._nth` is the word for an occurrence.
    order = sorted(names, key=lambda name: (_identifier(name) != name, name))
    stems = [f"{name}_" if _identifier(name).endswith("_nth") else name for name in order]
    identifiers = dict(zip(order, _identifiers(stems, (*fixed, "__debug__")), strict=True))
    return (*fixed, *(identifiers[name] for name in names))


# --- dicts ---------------------------------------------------------------------------------------------------------


def _guess_kind(value: Any) -> Kind:
    keys = set(value) if isinstance(value, Mapping) else set()
    return (
        "event"
        if keys & {"roles", "trigger"}
        else "relation"
        if keys & {"head", "tail"}
        else "entity"
    )


def _label_from_dict(kind: Kind, name: Any, value: Any) -> Label:
    _check_name(name, f"A label of kind `{kind}`")
    if value is None or isinstance(value, str):
        return Label(kind, name, value or "")
    if not isinstance(value, Mapping):
        raise SchemaError(
            f'The {kind} `{name}` is described by {value!r}. Write a description: {{{json.dumps(name)}: "..."}}.'
        )
    fixed = _FIXED_SLOTS[kind]
    known = {"description", "examples", *fixed, *(("roles",) if kind == "event" else ())}
    unknown = sorted(set(map(str, value)) - known)
    if unknown:
        raise SchemaError(
            f"The {kind} `{name}` has the keys {_list(unknown)}. A{'n' if kind != 'relation' else ''} {kind} takes "
            f"{_list(sorted(known))}."
        )
    slots = [_slot_from_dict(slot, value.get(slot), kind) for slot in fixed]
    roles = value.get("roles") or ()
    if isinstance(roles, str) or not isinstance(roles, (Mapping, Sequence)):
        raise SchemaError(
            f'The event `{name}` has roles {roles!r}. Write a list of names: "roles": ["Victim"].'
        )
    if isinstance(roles, Mapping):
        slots += [_slot_from_dict(role, slot, kind) for role, slot in roles.items()]
    else:
        # A role that is listed twice is one role that several mentions may fill.
        slots += dict.fromkeys(_slot_from_dict(role, None, kind) for role in roles)
    examples = _strings(value.get("examples"), f"`examples` of `{name}`")
    return Label(kind, name, value.get("description") or "", examples, tuple(slots))


def _slot_from_dict(name: Any, value: Any, kind: Kind) -> Slot:
    _check_name(name, f"A slot of kind `{kind}`")
    if value is None:
        return Slot(name)
    if isinstance(value, str):
        # What a relation's end is, its type says; what a role is, its description.
        return Slot(name, types=(value,)) if kind == "relation" else Slot(name, value)
    if isinstance(value, Sequence):
        return Slot(name, types=_strings(value, f"types of `{name}`"))
    unknown = (
        sorted(set(map(str, value)) - {"description", "examples", "types"})
        if isinstance(value, Mapping)
        else []
    )
    if unknown or not isinstance(value, Mapping):
        raise SchemaError(
            f"The slot `{name}` is described by {value!r}. Write a description, or a dict with `description`, "
            "`examples` and `types`."
        )
    examples = _strings(value.get("examples"), f"`examples` of slot `{name}`")
    types_ = _strings(value.get("types"), f"`types` of slot `{name}`")
    return Slot(name, value.get("description") or "", examples, types_)


def _slot_to_dict(slot: Slot) -> dict[str, Any]:
    data: dict[str, Any] = {"description": slot.description} if slot.description else {}
    if slot.examples:
        data["examples"] = list(slot.examples)
    if slot.types:
        data["types"] = list(slot.types)
    return data


# --- classes -------------------------------------------------------------------------------------------------------


class _SchemaClass:
    """What the three kinds of schema classes share: they are read, and so checked, when they are defined."""

    _kind: ClassVar[Kind]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__module__ == __name__:
            return
        # A name that is defined further down: the class is read, and checked, when the schema is built.
        with contextlib.suppress(NameError):
            _read_class(cls, {})


class EntityType(_SchemaClass):
    """Write a subclass for each kind of mention; its docstring is the guideline.

    The label is the class's name, or `label = "creative-work"` in its body. `examples = ("Ariane 5",)` gives example
    mentions. It has one slot, `span`, which need not be written.
    """

    _kind: ClassVar[Kind] = "entity"


class RelationType(_SchemaClass):
    """Write a subclass for each relation: `head: Person` and `tail: Place | Country` say what it holds between."""

    _kind: ClassVar[Kind] = "relation"


class EventType(_SchemaClass):
    """Write a subclass for each event; its fields are the roles (`victim: str`, `attackers: list[Person]`).

    `trigger: str` need not be written. `Annotated[str, "description"]` or `field(metadata={"description": ...,
    "examples": [...], "name": "Attack-Pattern"})` describe a role and give it a name that is no identifier.
    """

    _kind: ClassVar[Kind] = "event"


@dataclass(frozen=True)
class _Field:
    """A field of a class, however the class was made."""

    name: str
    annotation: Any
    description: str
    examples: tuple[str, ...]
    label: str

    def slot(self, owner: type) -> Slot:
        return Slot(
            self.label,
            self.description,
            self.examples,
            _types_of(self.annotation, owner, self.name),
        )


def _read_source(source: Any, classes: Mapping[str, type]) -> list[Label]:
    if isinstance(source, Label):
        return [source]
    if isinstance(source, Schema):
        return list(source.labels)
    if isinstance(source, Mapping):
        return list(Schema.from_dict("UIE", source).labels)
    if isinstance(source, Path):
        return list(Schema.from_json(source).labels)
    if isinstance(source, str):
        return [Label("entity", source)]
    if isinstance(source, type) and issubclass(source, _SchemaClass):
        try:
            return _read_class(source, classes)
        except NameError as error:
            raise SchemaError(
                f"`{source.__name__}` uses a name that cannot be found ({error}). Define that class at module level "
                f"above, or pass it as well: Schema.of({source.__name__}, ...)."
            ) from error
    if isinstance(source, type) and _is_pydantic(source):
        return _read_pydantic(source, ())
    shown = source.__name__ if isinstance(source, type) else repr(source)
    raise SchemaError(
        f"A schema cannot be read from `{shown}`. Write `class {source.__name__}(EntityType):` (or `RelationType`, "
        "`EventType`, `pydantic.BaseModel`)."
        if isinstance(source, type)
        else f"A schema cannot be read from `{shown}`. Pass classes, Pydantic models, a dict {{label: description}} "
        "or the `Path` of a JSON file."
    )


def _read_class(cls: type[_SchemaClass], classes: Mapping[str, type]) -> list[Label]:
    kind, fields = cls._kind, _class_fields(cls, classes)
    field_names = {f.name for f in fields}
    label = cls.__dict__.get("label", cls.__name__) if "label" not in field_names else cls.__name__
    examples = cls.__dict__.get("examples", ()) if "examples" not in field_names else ()
    _check_name(label, f"`{cls.__name__}.label`")
    examples = _strings(examples, f"`{cls.__name__}.examples`")
    return [_build_label(kind, label, _docstring(cls), examples, fields, cls)]


def _build_label(
    kind: Kind,
    name: str,
    description: str,
    examples: tuple[str, ...],
    fields: Sequence[_Field],
    owner: type,
) -> Label:
    fixed = _FIXED_SLOTS[kind]
    by_name = {f.name: f for f in fields}
    extra = [f for f in fields if f.name not in fixed]
    if extra and kind != "event":
        hint = (
            f"an entity has one slot, `span`. Write `class {owner.__name__}(EventType):` with `{extra[0].name}: str` "
            "as a role, or a `RelationType` between two mentions"
            if kind == "entity"
            else f"a relation has `head` and `tail` only. Write `class {owner.__name__}(EventType):` for more roles"
        )
        raise SchemaError(f"`{owner.__name__}.{extra[0].name}` has no place: {hint}.")
    slots = [by_name[slot].slot(owner) if slot in by_name else Slot(slot) for slot in fixed]
    # A fixed slot goes by its own name, whatever alias its field has.
    slots = [
        dataclasses.replace(slot, name=fixed_name)
        for slot, fixed_name in zip(slots, fixed, strict=True)
    ]
    return Label(kind, name, description, examples, (*slots, *(f.slot(owner) for f in extra)))


def _class_fields(cls: type, classes: Mapping[str, type]) -> list[_Field]:
    hints = typing.get_type_hints(cls, localns=dict(classes), include_extras=True)
    fields = []
    for name, hint in hints.items():
        if name.startswith("_") or typing.get_origin(hint) is ClassVar or hint is ClassVar:
            continue
        extras = getattr(hint, "__metadata__", ())
        annotation = typing.get_args(hint)[0] if extras else hint
        spec = getattr(cls, "__dataclass_fields__", {}).get(name, getattr(cls, name, None))
        metadata = spec.metadata if isinstance(spec, dataclasses.Field) else {}
        unknown = sorted(set(map(str, metadata)) - {"description", "examples", "name"})
        if unknown:
            raise SchemaError(
                f"The metadata of `{cls.__name__}.{name}` has the keys {_list(unknown)}. It takes `description`, "
                "`examples` and `name`."
            )
        description = metadata.get("description") or next(
            (x for x in extras if isinstance(x, str)), ""
        )
        examples = _strings(metadata.get("examples"), f"`examples` of `{cls.__name__}.{name}`")
        fields.append(_Field(name, annotation, description, examples, metadata.get("name", name)))
    return fields


def _types_of(annotation: Any, owner: type, field_name: str) -> tuple[str, ...]:
    """Labels of the entities that an annotation admits; nothing for plain strings."""
    parts: dict[str, None] = {}
    for part in _parts(annotation):
        if part is str:
            continue
        if isinstance(part, type) and issubclass(part, EntityType):
            parts.update(dict.fromkeys(label.name for label in _read_class(part, {})))
        elif isinstance(part, type) and _is_pydantic(part):
            labels = _read_pydantic(part, ())
            parts.update(dict.fromkeys(label.name for label in labels if label.kind == "entity"))
        else:
            shown = getattr(part, "__name__", None) or repr(part)
            raise SchemaError(
                f"`{owner.__name__}.{field_name}` is annotated `{shown}`, but words of the text stand there. "
                f"Write `{field_name}: str`, `{field_name}: list[str]` or the class of an entity."
            )
    return tuple(parts)


def _parts(annotation: Any) -> list[Any]:
    """`Optional[list[A | B]]` -> `[A, B]`."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _parts(typing.get_args(annotation)[0])
    if origin in (
        typing.Union,
        types.UnionType,
        list,
        tuple,
        set,
        frozenset,
        Sequence,
        Collection,
        Iterable,
    ):
        arguments = [
            x for x in typing.get_args(annotation) if x is not type(None) and x is not Ellipsis
        ]
        return [part for argument in arguments for part in _parts(argument)]
    return [annotation]


def _docstring(cls: type) -> str:
    text = cls.__dict__.get("__doc__") or ""
    # `dataclass` writes a signature where there is no docstring.
    return "" if text.startswith(f"{cls.__name__}(") else " ".join(text.split())


# --- Pydantic ------------------------------------------------------------------------------------------------------


def _is_pydantic(cls: type) -> bool:
    return isinstance(getattr(cls, "model_fields", None), dict) and hasattr(
        cls, "__pydantic_validator__"
    )


def _read_pydantic(cls: type, outer: tuple[type, ...]) -> list[Label]:
    """The labels of a model: an entity, relation or event, or all that a container's fields name.

    A model with `head` and `tail` is a relation, one with `trigger` an event, one with `span` or no field at all an
    entity. A field that is a `Literal` or an `Enum` makes one label for each of its values. Any other model is a
    container: a field of models adds their labels, a field of strings is an entity label itself.
    """
    if cls in outer:
        return []
    config = getattr(cls, "model_config", {})
    name = getattr(cls, "label", None) or config.get("title") or cls.__name__
    fields = [_pydantic_field(key, info) for key, info in cls.model_fields.items()]  # type: ignore[attr-defined]
    names = {f.name for f in fields}
    kind: Kind | None = None
    if {"head", "tail"} <= names:
        kind = "relation"
    elif "trigger" in names:
        kind = "event"
    elif "span" in names or not names:
        kind = "entity"
    if kind is None:
        return [label for f in fields for label in _read_container_field(f, cls, outer)]
    choices = [f for f in fields if _choices(f.annotation)]
    if len(choices) > 1:
        raise SchemaError(
            f"`{cls.__name__}` has several fields of fixed choices ({_list(f.name for f in choices)}). One of them "
            "can be the label; make the others `str`, or labels of their own."
        )
    rest = [f for f in fields if f not in choices]
    labels = _choices(choices[0].annotation) if choices else (name,)
    examples = getattr(cls, "examples", ()) if "examples" not in names else ()
    return [
        _build_label(kind, x, _docstring(cls), _strings(examples, "`examples`"), rest, cls)
        for x in labels
    ]


def _read_container_field(f: _Field, owner: type, outer: tuple[type, ...]) -> list[Label]:
    labels: dict[Label, None] = {}
    for part in _parts(f.annotation):
        if part is str:
            labels[Label("entity", f.label, f.description, f.examples)] = None
        elif isinstance(part, type) and _is_pydantic(part):
            labels.update(dict.fromkeys(_read_pydantic(part, (*outer, owner))))
        else:
            shown = getattr(part, "__name__", None) or repr(part)
            raise SchemaError(
                f"`{owner.__name__}.{f.name}` is annotated `{shown}`, which is neither words of the text nor a model. "
                f"Write `{f.name}: list[str]`, or a model with `span`, with `head` and `tail`, or with `trigger`; "
                "choices (`Literal`, `Enum`) belong into such a model, where they name its labels."
            )
    return list(labels)


def _pydantic_field(name: str, info: Any) -> _Field:
    description = info.description or next((x for x in info.metadata if isinstance(x, str)), "")
    examples = _strings(info.examples, f"`examples` of `{name}`")
    return _Field(name, info.annotation, description, examples, info.alias or name)


def _choices(annotation: Any) -> tuple[str, ...]:
    """The values of a `Literal` or an `Enum` of strings; nothing for other annotations."""
    found: list[str] = []
    for part in _parts(annotation):
        if typing.get_origin(part) is Literal:
            found += [str(value) for value in typing.get_args(part)]
        elif isinstance(part, type) and issubclass(part, enum.Enum):
            found += [str(member.value) for member in part]
        else:
            return ()
    return tuple(dict.fromkeys(found))


# --- checks --------------------------------------------------------------------------------------------------------


def _flatten(sources: Iterable[Any]) -> list[Any]:
    flat: list[Any] = []
    for source in sources:
        flat += _flatten(source) if isinstance(source, (list, tuple)) else [source]
    return flat


def _check_name(name: Any, what: str) -> None:
    if not isinstance(name, str) or not name.strip():
        raise SchemaError(f'{what} is named {name!r}. Write a name with letters: "Person".')


def _check_strings(description: Any, examples: Any, what: str) -> None:
    if not isinstance(description, str):
        raise SchemaError(f"{what} has the description {description!r}. Write it as a string.")
    _strings(examples, f"`examples` of {what}")


def _strings(value: Any, what: str) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise SchemaError(
            f"{what} is {value!r}. Write a list of strings: [{json.dumps(str(value))}]."
        )
    strings = tuple(value)
    if not all(isinstance(x, str) and x for x in strings):
        raise SchemaError(f"{what} is {value!r}. Write a list of strings.")
    return strings


def _list(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names) or "nothing"
