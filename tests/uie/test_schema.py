"""Schemas from everything a user may have, errors of those that cannot be, and their names."""

import enum
import json
import keyword
from dataclasses import FrozenInstanceError, dataclass, field
from typing import Annotated, ClassVar, Literal, Optional

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_taskmoe.uie.schema import (
    TASKS,
    EntityType,
    EventType,
    Label,
    Names,
    RelationType,
    Schema,
    SchemaError,
    Slot,
)

pydantic = pytest.importorskip("pydantic")


class Person(EntityType):
    """Names of
    people."""

    examples = ("Ada",)


@dataclass
class Work(EntityType):
    """Books."""

    label = "creative-work"
    span: str


class Wrote(RelationType):
    """The head wrote the tail."""

    head: Person
    tail: Annotated["Work | None", "what was written"]


@dataclass
class Attack(EventType):
    """Somebody attacks."""

    trigger: Annotated[str, "the verb"]
    attacker: list[Person]
    place: str = field(
        default="", metadata={"description": "where", "examples": ["Rome"], "name": "Attack-Place"}
    )
    counter: ClassVar[int] = 3


ATTACK = Label(
    "event",
    "Attack",
    "Somebody attacks.",
    slots=(
        Slot("trigger", "the verb"),
        Slot("attacker", types=("Person",)),
        Slot("Attack-Place", "where", ("Rome",)),
    ),
)


def test_classes():
    schema = Schema.of(Person, Work, Wrote, Attack)
    assert schema.labels == (
        Label("entity", "Person", "Names of people.", ("Ada",)),
        Label("entity", "creative-work", "Books."),
        Label(
            "relation",
            "Wrote",
            "The head wrote the tail.",
            slots=(
                Slot("head", types=("Person",)),
                Slot("tail", "what was written", types=("creative-work",)),
            ),
        ),
        ATTACK,
    )
    assert schema.tasks == ("NER", "RE", "EE")


def test_a_dataclass_without_docstring_has_no_guideline():
    @dataclass
    class Plain(EntityType):
        span: str

    assert Schema.of(Plain).labels == (Label("entity", "Plain"),)


def test_sources_can_be_mixed_and_a_label_is_kept_once():
    schema = Schema.of([Person, {"Place": "places"}], Person, "Thing", ATTACK, Schema.of(Work))
    assert [label.name for label in schema.labels] == [
        "Person",
        "Place",
        "Thing",
        "creative-work",
        "Attack",
    ]
    assert schema.get("entity", "Place") == Label("entity", "Place", "places")
    assert schema.get("event", "Place") is None


def test_labels_come_in_the_order_that_documents_keep():
    for make in (
        lambda met, person: Schema.of(met, person),
        lambda met, person: Schema.from_dict("UIE", met | person),
        lambda met, person: Schema.from_dict("UIE", {"relations": met, "entities": person}),
    ):
        schema = make({"met": {"head": ["person"]}}, {"person": ""})
        assert [label.name for label in schema.labels] == ["person", "met"]
        assert Schema.from_dict("UIE", schema.to_dict()) == schema


JOINT = {
    "entities": {"Person": {"description": "people", "examples": ["Ada"]}, "Place": "places"},
    "relations": {
        "born-in": {
            "description": "",
            "head": {"types": ["Person"]},
            "tail": {"types": ["Place", "City"]},
        }
    },
    "events": {
        "Life.Die": {"description": "die", "roles": ["Victim", "Place"]},
        "Attack": {
            "description": "",
            "trigger": {"description": "the verb"},
            "roles": {"Place": {"description": "where", "examples": ["Rome"]}, "Who": {}},
        },
    },
}


def test_dicts_and_json_files(tmp_path):
    schema = Schema.from_dict("UIE", JOINT)
    assert schema.to_dict() == JOINT
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(JOINT), encoding="utf-8")
    assert Schema.from_json(path) == Schema.of(path) == Schema.of(JOINT) == schema
    assert hash(Schema.from_json(path)) == hash(schema)
    flat = {name: value for group in JOINT.values() for name, value in group.items()}
    assert Schema.of(flat) == schema
    with pytest.raises(FrozenInstanceError):
        schema.labels = ()


@pytest.mark.parametrize(
    ("task", "data"),
    [
        ("NER", {"PER": "people", "creative-work": ""}),
        ("RE", {"Kill": "kills", "Live_In": {"description": "", "head": {"types": ["Person"]}}}),
        ("EE", {"Die": {"description": "d", "roles": ["Victim", "Subject.Age"]}}),
        ("EAE", {"Die": {"description": "d", "roles": []}}),
    ],
)
def test_the_dicts_of_the_jsonl_format_come_back(task, data):
    assert Schema.from_dict(task, data).to_dict(task) == data


def test_short_forms_of_dicts():
    assert Schema.from_dict("NER", ["PER", "LOC"]) == Schema.from_dict(
        "NER", {"PER": "", "LOC": None}
    )
    assert Schema.from_dict("RE", {"in": {"head": "Person", "tail": ["Place"]}}).labels[
        0
    ].slots == (
        Slot("head", types=("Person",)),
        Slot("tail", types=("Place",)),
    )
    # Several participants: one role that several mentions may fill.
    assert [
        r.name
        for r in Schema.from_dict("EE", {"Meet": {"roles": ["Who", "Who", "Where"]}})
        .labels[0]
        .roles
    ] == [
        "Who",
        "Where",
    ]


def test_fingerprint_depends_on_all_that_is_shown():
    schema = Schema.from_dict("UIE", JOINT)
    assert (
        schema.fingerprint() == Schema.from_dict("UIE", json.loads(json.dumps(JOINT))).fingerprint()
    )
    others = [
        Schema(schema.labels[::-1]),
        Schema(schema.labels[:-1]),
        Schema.of({"Person": "people"}),
        Schema.of({"Person": "People"}),
        Schema.of({"Person": {"roles": []}}),
        Schema.of({"Person": {"roles": {"who": "x", "whom": "y"}}}),
        Schema.of({"Person": {"roles": {"whom": "y", "who": "x"}}}),
    ]
    assert len({schema.fingerprint(), *(other.fingerprint() for other in others)}) == 8


# --- Pydantic


class Colour(enum.Enum):
    RED = "red"
    DARK = "dark-blue"


def test_pydantic_models():
    class Mention(pydantic.BaseModel):
        """Things."""

        span: str
        label: Literal["PER", "creative-work"]

    class Paint(pydantic.BaseModel):
        span: str
        colour: Colour

    class Company(pydantic.BaseModel):
        """Firms."""

        model_config = pydantic.ConfigDict(title="organi-sation")

    class Works(pydantic.BaseModel):
        """Works for."""

        head: str = pydantic.Field(description="a person", examples=["Ada"])
        tail: Optional[Company] = None  # noqa: UP045 (older code is read as well)

    class Hit(pydantic.BaseModel):
        """Hits."""

        trigger: str
        victims: list[Annotated[Company, "hurt"]] = pydantic.Field(
            alias="Victim-s", description="who"
        )
        place: Annotated[str | None, "where"] = None

    class Report(pydantic.BaseModel):
        mentions: list[Mention]
        paints: list[Paint]
        works: list[Works] | None = None
        hit: Hit
        title: list[str] = pydantic.Field(description="titles")
        nested: Optional["Report"] = None

    schema = Schema.of(Report)
    assert schema.labels == (
        Label("entity", "PER", "Things."),
        Label("entity", "creative-work", "Things."),
        Label("entity", "red"),
        Label("entity", "dark-blue"),
        Label("entity", "title", "titles"),
        Label(
            "relation",
            "Works",
            "Works for.",
            slots=(Slot("head", "a person", ("Ada",)), Slot("tail", types=("organi-sation",))),
        ),
        Label(
            "event",
            "Hit",
            "Hits.",
            slots=(
                Slot("trigger"),
                Slot("Victim-s", "who", types=("organi-sation",)),
                Slot("place", "where"),
            ),
        ),
    )


# --- what cannot be


def class_of(base, field="span", type_=str, **more):
    return type("Sale", (base,), {"__annotations__": {field: type_}, **more})


class Amount(pydantic.BaseModel):
    amount: int


class Choices(pydantic.BaseModel):
    span: str
    a: Literal["x"]
    b: Literal["y"]


UNKNOWN = field(metadata={"desc": "who"})
PLACE = r"`Sale.place` has no place.*Write `class Sale\(EventType\):` with `place: str`"
KEYS = r"event `Die` has the keys `role`. An event takes"
ROLES = r"event `Die` has roles 'Who'. Write a list of names"
METADATA = r"metadata of `Sale.x` has the keys `desc`. It takes `description`, `examples`"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: class_of(EntityType, "place"), PLACE),
        (lambda: class_of(RelationType, "place"), PLACE),
        (
            lambda: class_of(EventType, "x", int),
            r"`Sale.x` is annotated `int`.*Write `x: str`, `x: ",
        ),
        (
            lambda: class_of(EventType, "x", Literal["a"]),
            r"`Sale.x` is annotated `.*Literal.*Write",
        ),
        (lambda: class_of(EventType, label=""), r"`Sale.label` is named ''. Write a name with let"),
        (
            lambda: class_of(EntityType, examples="A"),
            r'`Sale.examples` is \'A\'. Write a.*: \["A"\]',
        ),
        (lambda: class_of(EventType, "x", x=UNKNOWN), METADATA),
        (
            lambda: Schema.of(Amount),
            r"`Amount.amount` is annotated `int`.*Write `amount: list\[str\]`",
        ),
        (lambda: Schema.of(Choices), r"`Choices` has several fields of fixed choices \(`a`, `b`\)"),
        (
            lambda: Schema.of(class_of(EventType, "x", "Nobody")),
            r"`Sale` uses a name that cannot be",
        ),
        (lambda: Schema.of(), r'The schema has no labels. Write at least one: {"Person"'),
        (lambda: Schema.of(3), r"A schema cannot be read from `3`. Pass classes, Pydantic models"),
        (lambda: Schema.of(int), r"cannot be read from `int`. Write `class int\(EntityType\):`"),
        (lambda: Schema.of(Person, {"Person": "x"}), r"The entity `Person` is defined twice. Keep"),
        (lambda: Schema((1,)), r"`1` is no `Label`. Build schemas with"),
        (lambda: Schema.of("no.json"), r"There is no file `no.json`. Pass the path"),
        (lambda: Schema.from_dict("NRE", {}), r"`NRE` is no task. Write one of: `NER`, `RE`"),
        (
            lambda: Schema.from_dict("NER", "PER"),
            r"A schema cannot be read from 'PER'. Write a dict",
        ),
        (
            lambda: Schema.from_dict("NER", {"P": 3}),
            r'entity `P` is described by 3. Write .*: {"P"',
        ),
        (
            lambda: Schema.from_dict("NER", {"": "x"}),
            r"A label of kind `entity` is named ''. Write a",
        ),
        (lambda: Schema.from_dict("EE", {"Die": {"role": []}}), KEYS),
        (lambda: Schema.from_dict("EE", {"Die": {"roles": "Who"}}), ROLES),
        (
            lambda: Schema.from_dict("EE", {"D": {"roles": {"Who": 3}}}),
            r"slot `Who` is described by 3",
        ),
        (
            lambda: Schema.from_dict("NER", {"A": {"examples": "x"}}),
            r"`examples` of `A` is 'x'. Write",
        ),
        (
            lambda: Schema.of(ATTACK).to_dict("NER"),
            r"Task `NER` has no place for `Attack`. Use task",
        ),
        (
            lambda: Label("event", "A", slots=(Slot("x"),)),
            r"`A` of kind `event` has the slots `x`.",
        ),
        (lambda: Label("event", "A", slots=(Slot("trigger"), *[Slot("x")] * 2)), r"role `x` twice"),
        (lambda: Label("thing", "A"), r"Label `A` has kind `thing`. Write one of: `entity`"),
        (lambda: Slot("a", types=(1,)), r"Slot `a` has types \(1,\). Write label names"),
    ],
)
def test_invalid_schemas_say_what_to_write(make, message):
    with pytest.raises(SchemaError, match=message):
        make()


BAD_FILES = [
    *("{", "", "null", "5", '"x"', "[]", "[[]]", '[["a"]]', "[null]", "[{}]", '{"a": []}'),
    *('{"entities": null}', '{"entities": 5}', '{"entities": [[]]}', '{"a": {"examples": [1]}}'),
    *('{"events": {"a": {"roles": [[]]}}}', '{"events": {"a": {"roles": [{}]}}}', '{"a": NaN}'),
    *('{"relations": {"a": {"head": {"types": 5}}}}', '{"a": {"description": []}}', "1" * 5000),
    *('{"a": "x", "a": "y"}', "[" * 100_000, '{"a": ' + "[" * 200 + "]" * 200 + "}"),
]


@pytest.mark.parametrize("content", BAD_FILES, ids=lambda content: content[:40])
def test_a_file_that_is_no_schema_is_named(tmp_path, content):
    path = tmp_path / "bad.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(SchemaError, match=r"bad.json` holds no schema: ") as caught:
        Schema.from_json(path)
    assert len(str(caught.value)) < 600
    path.write_bytes(b"\xff")
    with pytest.raises(SchemaError, match=r"bad.json` holds no schema"):
        Schema.of(str(path))


WORDS = ["entities", "relations", "events", "description", "examples", "roles", "trigger", "head"]
KEY = st.one_of(st.sampled_from([*WORDS, "tail", "types", "Person"]), st.text(max_size=3))
LEAF = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), KEY)
JSON = st.recursive(
    LEAF, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEY, inner, max_size=4)
)


@settings(max_examples=500, deadline=None)
@given(JSON, st.sampled_from([*TASKS, "NRE"]))
@pytest.mark.slow
def test_any_value_is_a_schema_or_a_schema_error(value, task):
    try:
        schema = Schema.from_dict(task, value)
    except SchemaError:
        return
    assert Schema.from_dict("UIE", json.loads(json.dumps(schema.to_dict()))) == schema
    assert all(schema.names.label_key(schema.names.class_of(x)) == x.key for x in schema.labels)


def test_the_path_of_a_file_is_no_label(tmp_path, monkeypatch):
    (tmp_path / "schema.json").write_text('{"Person": "people"}', encoding="utf-8-sig")
    (tmp_path / "Person").write_text("not read", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    expected = Schema.of({"Person": "people"})
    for path in ("schema.json", str(tmp_path / "schema.json"), ["./schema.json"]):
        assert Schema.of(path) == expected
    assert Schema.of("Person", "Life.Die", "a/b") == Schema.of(["Person", "Life.Die", "a/b"])
    with pytest.raises(SchemaError, match="holds no schema"):
        Schema.of("./Person")


# --- identifiers

HARD_NAMES = [
    *("Life.Die.Unspecified", "creative-work", "creative_work", "creative work", "Ünïcode-Größe"),
    *("人物", "الشخص", "class", "None", "match", "Entity", "Entity_", "List", "5G", "🚀", "🛰"),
    *("...", "label", "label_2", "ﬁre", "fire", "a\nb", "__debug__", "result", "LABEL_1", "x_nth"),
    *("Person", "person", "e\u0301", "é", "\ud800"),
]


def test_any_label_name_survives():
    schema = Schema.from_dict("NER", HARD_NAMES)
    names = schema.names
    identifiers = [names.class_of(label) for label in schema.labels]
    assert len(set(identifiers)) == len(HARD_NAMES)
    for label, identifier in zip(schema.labels, identifiers, strict=True):
        assert identifier.isidentifier() and not keyword.iskeyword(identifier)
        assert names.label_key(identifier) == label.key
    by_name = dict(zip(HARD_NAMES, identifiers, strict=True))
    assert by_name["Life.Die.Unspecified"] == "Life_Die_Unspecified"
    assert by_name["creative_work"] == "creative_work"  # a name that is an identifier keeps it
    assert by_name["人物"] == "人物"
    assert by_name["class"] == "class_"
    reordered = Schema(schema.labels[::-1]).names
    assert [reordered.class_of(label) for label in schema.labels] == identifiers


def test_any_role_name_survives():
    roles = [*HARD_NAMES, "trigger", "trigger_nth", "x", "span"]
    (label,) = Schema.from_dict("EE", {"E": {"roles": roles}}).labels
    trigger, *identifiers = Schema.of(label).names.slots_of(label)
    assert trigger == "trigger" and len({trigger, *identifiers}) == len(roles) + 1
    assert all(
        x.isidentifier() and not keyword.iskeyword(x) and not x.endswith("_nth")
        for x in identifiers
    )


def test_an_entity_and_an_event_may_share_a_name():
    schema = Schema.of({"entities": {"Attack": ""}, "events": {"Attack": {"roles": []}}})
    identifiers = [schema.names.class_of(label) for label in schema.labels]
    assert identifiers == ["Attack", "Attack_2"]
    assert [schema.names.label_key(x) for x in identifiers] == [
        ("entity", "Attack"),
        ("event", "Attack"),
    ]


def test_masked_names_leave_labels_without_guideline():
    schema = Schema.from_dict("NER", {"A": "first", "B": "", "C": {"examples": ["c"]}})
    names = Names.masked(schema)
    assert [names.class_of(label) for label in schema.labels] == ["LABEL_1", "B", "LABEL_3"]
