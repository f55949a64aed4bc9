"""Names of any script as identifiers: they are made, found and read back by one rule."""

import keyword
import re
import time
import unicodedata

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from peft_taskmoe.uie import Argument, Entity, Event, Schema, Span, completion_text, parse_answer
from peft_taskmoe.uie.identifiers import IDENTIFIER, identifiers_of
from peft_taskmoe.uie.prompt import PromptFormat

SCRIPTS = [
    *("व्यक्ति", "ব্যক্তি", "பெயர்", "บุคคล", "ජනයා", "שֵׁם", "اَلشَّخْص", "pel·lícula", "ᠮᠣᠩᠭᠣᠯ", "人物"),
    *("℮℘", "a‿b", "፩x፪", "ｆｕｌｌ", "e\u0301", "\u0301a", "ﷺ", "𝔘𝔫𝔦", "x\U000e0100", "\ud800"),
    *("🚀", "·a", "ªº", "ſ", "K", "Ŀa", "ᢅᢆ"),
]
TEXT = "Ada met Bob."
ADA, MET, BOB = Span("Ada", 0, 3), Span("met", 4, 7), Span("Bob", 8, 11)
WORDS = st.from_regex(r"[^\W\d][\w·]{0,6}", fullmatch=True)
NAMES = st.one_of(st.text(min_size=1), st.sampled_from(SCRIPTS), WORDS).filter(str.strip)


def test_an_answer_has_every_character_that_an_identifier_may_have():
    whole = re.compile(IDENTIFIER)
    for character in map(chr, range(0x110000)):
        if f"_{character}".isidentifier():
            assert whole.fullmatch(f"_{character}"), hex(ord(character))
            assert not character.isidentifier() or whole.fullmatch(character)
        elif character.isspace() or unicodedata.category(character)[0] in "PS":
            assert not whole.match(character), hex(ord(character))


@settings(max_examples=300, deadline=None)
@given(st.lists(NAMES, min_size=1, max_size=6, unique=True), st.booleans())
@example(SCRIPTS, False)
@example(SCRIPTS, True)
@pytest.mark.slow
def test_records_of_any_label_and_role_come_back(names, compact):
    format = PromptFormat("compact" if compact else "dataclass")
    schema = Schema.from_dict(
        "UIE", {"entities": names, "events": {n: {"roles": names} for n in names}}
    )
    for label in schema.labels:
        identifier = schema.names.class_of(label)
        assert identifier.isidentifier() and not keyword.iskeyword(identifier)
        assert schema.names.label_key(identifier) == label.key
    records = [Entity(name, ADA) for name in names]
    records += [Event(name, MET, tuple(Argument(role, BOB) for role in names)) for name in names]
    answer = completion_text(records, TEXT, schema, format=format)
    for read in (answer, unicodedata.normalize("NFD", answer)):
        parsed = parse_answer(read, schema, TEXT)
        assert parsed.problems == () and set(parsed.records) == set(records)


@settings(max_examples=300)
@given(st.lists(st.text(max_size=8)), st.sets(st.sampled_from(["label", "a", "span"])))
def test_identifiers_are_valid_and_no_two_are_the_same(names, reserved):
    found = identifiers_of(names, reserved)
    assert len(set(found) | reserved) == len(names) + len(reserved)
    for identifier in found:
        assert identifier.isidentifier() and not keyword.iskeyword(identifier)
        assert unicodedata.normalize("NFKC", identifier) == identifier
        assert not identifier.startswith("LABEL_") or identifier.endswith(("_", *"0123456789"))


@pytest.mark.parametrize("names", [["🚀"] * 8000, ["a b", "a-b"] * 4000])
def test_thousands_of_names_that_are_alike_take_no_time(names):
    start = time.perf_counter()
    found = identifiers_of(names, ())
    assert len(set(found)) == 8000 and found[:2] in (["label", "label_2"], ["a_b", "a_b_2"])
    assert time.perf_counter() - start < 2  # 5 s when each looked for its number from 2 on
