"""Hypothesis strategies: texts of many scripts, schemas, documents and broken answers."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from peft_taskmoe.uie import (
    Argument,
    Document,
    Entity,
    Event,
    Record,
    Relation,
    Schema,
    Span,
    completion_text,
)

MENTIONS = (
    "Ada|Ada Lovelace|met|in|Bergen|don't|“Ariane-5”|e\u0301|é|ß|SS|pel·lícula|हिन्दी|ไทย|"
    "עִבְרִית|العَرَبِيَّة|日本語|한국어에서|👨\u200d👩|İ|ﬁ"
)
WORDS = st.one_of(st.sampled_from(MENTIONS.split("|")), st.text(min_size=1, max_size=6))
BLANKS = st.sampled_from([" ", " ", " ", "\n", "\t", "", ". ", "\r\n", "\u00a0", "-"])
TEXTS = st.lists(st.tuples(WORDS, BLANKS), min_size=1, max_size=12).map(
    lambda pairs: "".join(word + blank for word, blank in pairs)
)
NAMES = st.one_of(
    st.sampled_from(["Person", "creative-work", "class", "हिन्दी", "pel·lícula", "Life.Die", "🚀"]),
    st.text(min_size=1, max_size=8).filter(lambda name: bool(name.strip())),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
)


@st.composite
def schemas(draw: st.DrawFn) -> Schema:
    """Up to three labels of each kind; a name may be that of an entity and of an event."""
    names = st.lists(NAMES, max_size=3, unique=True)
    described = st.text(max_size=8) | st.fixed_dictionaries(
        {"description": st.text(max_size=8), "examples": st.lists(WORDS, max_size=2)}
    )
    data: dict[str, Any] = {
        "entities": {name: draw(described) for name in draw(names)},
        "relations": {name: {"head": draw(names), "tail": []} for name in draw(names)},
        "events": {name: {"roles": draw(names)} for name in draw(names)},
    }
    if not any(data.values()):
        data["entities"] = {"Person": ""}
    return Schema.from_dict("UIE", {kind: labels for kind, labels in data.items() if labels})


@st.composite
def spans(draw: st.DrawFn, text: str) -> Span:
    """Any part of a text that is not empty."""
    start = draw(st.integers(0, len(text) - 1))
    end = draw(st.integers(start + 1, min(len(text), start + 12)))
    return Span(text[start:end], start, end)


@st.composite
def records(draw: st.DrawFn, schema: Schema, text: str) -> Record:
    """A record of one of the schema's labels."""
    label, part = draw(st.sampled_from(schema.labels)), spans(text)
    if label.kind == "entity":
        return Entity(label.name, draw(part))
    if label.kind == "relation":
        return Relation(label.name, draw(part), draw(part))
    roles = [role.name for role in label.roles]
    arguments: list[Argument] = []
    if roles:
        argument = st.builds(Argument, st.sampled_from(roles), part)
        arguments = draw(st.lists(argument, max_size=3, unique=True))
    return Event(label.name, draw(part), tuple(arguments))


@st.composite
def documents(draw: st.DrawFn) -> Document:
    """A text with gold records of a schema of all three kinds."""
    schema, text = draw(schemas()), draw(TEXTS)
    found = draw(st.lists(records(schema, text), max_size=5))
    return Document(draw(st.text(min_size=1, max_size=5)), text, "UIE", schema, tuple(found))


SHORT = (
    '" \' """ [ ] ( ) , = : * ** - { } \\ # … （ ” \x00 \ud800 \u202e f span head trigger span_nth '
    "None True =1 =-1 =1e999 lambda __import__ os.system ().__class__ **{} Person Person( "
    '[Person( Works( Meet( \\" ﬁ e\u0301 “Ada” Ada \\N{DASH} \\x4'
)
LONG = ("lambda: 0", "__import__('os').system('x')", 'Person("Ada")', '], [Person("Bob")', "f'{1}'")
SIZES = ("=0x" + "f" * 99, "=" + "9" * 99, "Ada" * 50, "(" * 60, "[" * 60)
PIECES = [*SHORT.split(" "), *LONG, *SIZES, ' [Person(span="Ada")', "result =", "\n", "\u2028"]
"""Parts of answers that have a meaning to a parser."""


@st.composite
def broken_answers(draw: st.DrawFn) -> tuple[str, Document]:
    """An answer for a document after some edits, or parts of answers in a row."""
    document = draw(documents())
    answer = completion_text(document.records, document.text, document.schema)
    pieces = st.sampled_from(PIECES)
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(answer)))
        behind = draw(st.integers(at, min(len(answer), at + 9)))
        answer = answer[:at] + draw(pieces | st.text(max_size=3)) + answer[behind:]
    return draw(st.one_of(st.just(answer), st.lists(pieces, max_size=30).map("".join))), document
