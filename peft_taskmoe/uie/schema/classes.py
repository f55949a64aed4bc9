"""Labels from classes: `EntityType`, `RelationType`, `EventType`, and Pydantic models."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import types
import typing
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from peft_taskmoe.uie.schema.labels import (
    FIXED_SLOTS,
    Kind,
    Label,
    SchemaError,
    Slot,
    check_name,
    strings,
)
from peft_taskmoe.uie.wording import listed, shown

_SEVERAL = (list, tuple, set, frozenset, Sequence, Collection, Iterable)


class SchemaClass:
    """What the three kinds of schema classes share: they are checked when they are defined."""

    _kind: ClassVar[Kind]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.__module__ == __name__:
            return
        # A name that is defined further down: the class is read when the schema is built.
        with contextlib.suppress(NameError):
            read_class(cls, {})


class EntityType(SchemaClass):
    """Write a subclass for each kind of mention; its docstring is the guideline.

    The label is the class's name, or `label = "creative-work"` in its body.
    `examples = ("Ariane 5",)` gives example mentions. It has one slot, `span`, which need not be
    written.
    """

    _kind: ClassVar[Kind] = "entity"


class RelationType(SchemaClass):
    """Write a subclass for each relation: `head: Person` and `tail: Place | Country`."""

    _kind: ClassVar[Kind] = "relation"


class EventType(SchemaClass):
    """Write a subclass for each event; its fields are the roles (`attackers: list[Person]`).

    `trigger: str` need not be written. `Annotated[str, "description"]` or
    `field(metadata={"description": ..., "examples": [...], "name": "Attack-Pattern"})` describe a
    role and give it a name that is no identifier.
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
        types_ = _types_of(self.annotation, f"{owner.__name__}.{self.name}", self.name)
        return Slot(self.label, self.description, self.examples, types_)


def labels_from_class(source: Any, classes: Mapping[str, type]) -> list[Label]:
    """The labels that a class stands for.

    Args:
        source: A class of this module's kinds or a Pydantic model; anything else is refused.
        classes: Classes by name, which annotations written as strings may mean.
    """
    if isinstance(source, type) and issubclass(source, SchemaClass):
        try:
            return read_class(source, classes)
        except NameError as error:
            raise SchemaError(
                f"`{source.__name__}` uses a name that cannot be found ({error}). Define that "
                "class at module level above, or pass it as well: "
                f"Schema.of({source.__name__}, ...)."
            ) from error
    if _is_pydantic(source):
        return _read_pydantic(source, ())
    if isinstance(source, type):
        raise SchemaError(
            f"A schema cannot be read from `{source.__name__}`. Write `class {source.__name__}"
            "(EntityType):` (or `RelationType`, `EventType`, `pydantic.BaseModel`)."
        )
    raise SchemaError(
        f"A schema cannot be read from `{shown(source)}`. Pass classes, Pydantic models, a dict "
        "{label: description} or the path of a JSON file."
    )


def read_class(cls: type[SchemaClass], classes: Mapping[str, type]) -> list[Label]:
    """The label of a schema class, in a list as Pydantic models may have several."""
    fields = _class_fields(cls, classes)
    own = {f.name for f in fields}
    label = cls.__dict__.get("label", cls.__name__) if "label" not in own else cls.__name__
    check_name(label, f"`{cls.__name__}.label`")
    examples = cls.__dict__.get("examples", ()) if "examples" not in own else ()
    examples = strings(examples, f"`{cls.__name__}.examples`")
    return [_build_label(cls._kind, label, examples, fields, cls)]


def _build_label(
    kind: Kind, name: str, examples: tuple[str, ...], fields: Sequence[_Field], owner: type
) -> Label:
    fixed = FIXED_SLOTS[kind]
    extra = [f for f in fields if f.name not in fixed]
    if extra and kind != "event":
        takes = "an entity has one slot, `span`" if kind == "entity" else "a relation has two slots"
        raise SchemaError(
            f"`{owner.__name__}.{extra[0].name}` has no place: {takes}. Write `class "
            f"{owner.__name__}(EventType):` with `{extra[0].name}: str` for more roles."
        )
    by_name = {f.name: f for f in fields}
    # A fixed slot goes by its own name, whatever alias its field has.
    slots = [
        dataclasses.replace(by_name[slot].slot(owner), name=slot) if slot in by_name else Slot(slot)
        for slot in fixed
    ]
    slots += [f.slot(owner) for f in extra]
    return Label(kind, name, _docstring(owner), examples, tuple(slots))


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
        if unknown := sorted(set(map(str, metadata)) - {"description", "examples", "name"}):
            raise SchemaError(
                f"The metadata of `{cls.__name__}.{name}` has the keys {listed(unknown)}. It takes "
                "`description`, `examples` and `name`."
            )
        said = next((x for x in extras if isinstance(x, str)), "")
        description = metadata.get("description") or said
        examples = strings(metadata.get("examples"), f"`examples` of `{cls.__name__}.{name}`")
        fields.append(_Field(name, annotation, description, examples, metadata.get("name", name)))
    return fields


def _types_of(annotation: Any, where: str, field: str) -> tuple[str, ...]:
    """Labels of the entities that an annotation admits; nothing for plain strings."""
    found: dict[str, None] = {}
    for part in _parts(annotation):
        if part is str:
            continue
        if isinstance(part, type) and issubclass(part, EntityType):
            labels = read_class(part, {})
        elif _is_pydantic(part):
            labels = [label for label in _read_pydantic(part, ()) if label.kind == "entity"]
        else:
            raise SchemaError(
                f"`{where}` is annotated `{_type_name(part)}`, but words of the text stand there. "
                f"Write `{field}: str`, `{field}: list[str]` or the class of an entity."
            )
        found.update(dict.fromkeys(label.name for label in labels))
    return tuple(found)


def _parts(annotation: Any) -> list[Any]:
    """`Optional[list[A | B]]` -> `[A, B]`."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _parts(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType, *_SEVERAL):
        arguments = typing.get_args(annotation)
        inner = [x for x in arguments if x is not type(None) and x is not Ellipsis]
        return [part for argument in inner for part in _parts(argument)]
    return [annotation]


def _type_name(annotation: Any) -> str:
    return getattr(annotation, "__name__", None) or repr(annotation)


def _docstring(cls: type) -> str:
    text = cls.__dict__.get("__doc__") or ""
    # `dataclass` writes a signature where there is no docstring.
    return "" if text.startswith(f"{cls.__name__}(") else " ".join(text.split())


def _is_pydantic(source: Any) -> bool:
    return (
        isinstance(source, type)
        and isinstance(getattr(source, "model_fields", None), dict)
        and hasattr(source, "__pydantic_validator__")
    )


def _read_pydantic(cls: Any, outer: tuple[type, ...]) -> list[Label]:
    """The labels of a model: an entity, relation or event, or all that a container's fields name.

    A model with `head` and `tail` is a relation, one with `trigger` an event, one with `span` or no
    field at all an entity. A field that is a `Literal` or an `Enum` makes one label for each of its
    values. Any other model is a container: a field of models adds their labels, a field of strings
    is an entity label itself.
    """
    if cls in outer:
        return []
    fields = [_pydantic_field(key, info) for key, info in cls.model_fields.items()]
    names = {f.name for f in fields}
    kind = _pydantic_kind(names)
    if kind is None:
        return [label for f in fields for label in _read_container_field(f, cls, outer)]
    choices = [f for f in fields if _choices(f.annotation)]
    if len(choices) > 1:
        raise SchemaError(
            f"`{cls.__name__}` has several fields of fixed choices "
            f"({listed(f.name for f in choices)}). One of them can be the label; make the others "
            "`str`, or labels of their own."
        )
    title = getattr(cls, "model_config", {}).get("title")
    name = getattr(cls, "label", None) or title or cls.__name__
    labels = _choices(choices[0].annotation) if choices else (name,)
    examples = getattr(cls, "examples", ()) if "examples" not in names else ()
    rest = [f for f in fields if f not in choices]
    said = strings(examples, f"`{cls.__name__}.examples`")
    return [_build_label(kind, label, said, rest, cls) for label in labels]


def _pydantic_kind(names: Collection[str]) -> Kind | None:
    if "head" in names and "tail" in names:
        return "relation"
    if "trigger" in names:
        return "event"
    return "entity" if "span" in names or not names else None


def _read_container_field(field: _Field, owner: type, outer: tuple[type, ...]) -> list[Label]:
    labels: dict[Label, None] = {}
    for part in _parts(field.annotation):
        if part is str:
            labels[Label("entity", field.label, field.description, field.examples)] = None
        elif _is_pydantic(part):
            labels.update(dict.fromkeys(_read_pydantic(part, (*outer, owner))))
        else:
            where, found = f"{owner.__name__}.{field.name}", _type_name(part)
            raise SchemaError(
                f"`{where}` is annotated `{found}`, which is neither words of the text nor a "
                f"model. Write `{field.name}: list[str]`, or a model with `span`, with `head` and "
                "`tail`, or with `trigger`, where choices name the labels."
            )
    return list(labels)


def _pydantic_field(name: str, info: Any) -> _Field:
    description = info.description or next((x for x in info.metadata if isinstance(x, str)), "")
    examples = strings(info.examples, f"`examples` of `{name}`")
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
