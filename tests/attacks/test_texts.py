"""Hostile answers, schemas and pages: data stays data, whatever it looks like."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from html_page import Page
from peft_taskmoe.uie import Entity, Extraction, Problem, Schema, SchemaError, Span, parse_answer
from peft_taskmoe.uie.view import to_page

SCHEMA = Schema.of({"Person": ""})
TEXT = "Ada met Bob."
watched: list[str] = []


@pytest.fixture(scope="module", autouse=True)
def hook() -> None:
    """Audit hooks cannot be removed: this one looks only while a test watches."""

    def note(event: str, args: tuple) -> None:
        if watched and event in ("exec", "open", "os.system", "subprocess.Popen", "import"):
            watched.append(event)

    sys.addaudithook(note)


@pytest.mark.parametrize(
    "call",
    [
        "__import__('os').system('x')", "Person(__import__('os').system('x'))", "Person(f'{1/0}')",
        "Person(open('/x','w'))", "Person(().__class__.__bases__[0])", "Person(lambda: 0)",
        "Person((yield))", "Person(*['Ada'])", "Person(**{'span': 'Ada'})", "Person(b'Ada')",
        "Person(span:=1)", "Person(1 if 1 else 2)", "Person([x for x in 'Ada'])", "Person('Ada'*9)",
        "Person('Ada')()", "Person(await x)", "exec('x')", "Person(Person('Ada'))", "Person(`x`)",
        "Person(0x" + "f" * 9000 + ")", "Person(" + "9" * 9000 + ")", "Person(1e999999)",
        "Person('\\N{" + "A" * 9000 + "}')", "Person('\x00')", "Person('\ud800')",
    ],
    ids=lambda call: repr(call)[:30],
)  # fmt: skip
def test_code_in_an_answer_is_no_record_and_costs_no_other(call: str) -> None:
    parse_answer("[]", SCHEMA, TEXT)  # what is imported, is imported
    watched.append("watching")
    parsed = parse_answer(f'[Person("Bob"), {call}]', SCHEMA, TEXT)
    events = watched[1:]
    watched.clear()
    assert events == []
    assert Entity("Person", Span("Bob", 8, 11)) in parsed.records and parsed.problems


@pytest.mark.parametrize(
    "piece", ["[", "(", "]", ")", "Person(", "[(", '"', "'", "{", "\\", "\x00"]
)
def test_a_hundred_thousand_of_anything_is_a_problem(piece: str) -> None:
    parsed = parse_answer(piece * 100_000, SCHEMA, TEXT)
    assert not parsed.records and parsed.problems


SCHEMAS: list[Any] = [
    5, None, True, 1.5, [[]], [None], [{}], {"": ""}, {"entities": None}, {"entities": 5},
    {"a": 5}, {"a": []}, {1: ""}, {"a": {"head": 5, "tail": []}}, {"a": {"roles": [[]]}},
    {"a": {"roles": [""]}}, {"a": {"nonsense": 1}}, b"x", "", [""],
]  # fmt: skip


@pytest.mark.parametrize("data", SCHEMAS, ids=repr)
def test_a_schema_that_is_none_is_a_schema_error(data: Any) -> None:
    with pytest.raises(SchemaError):
        Schema.of(data)


@pytest.mark.parametrize("content", ["", "{", "5", "null", "[" * 100_000, '{"a": NaN}', "\x00"])
def test_a_schema_file_that_holds_none_is_a_schema_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "s.json").write_text(content, encoding="utf-8")
    with pytest.raises(SchemaError):
        Schema.from_json(tmp_path / "s.json")


@pytest.mark.parametrize(
    "words",
    [
        "<script>alert(1)</script>", "</style><script>alert(1)</script>", "<img src=x onerror=y>",
        "javascript:alert(1)", '" onmouseover="alert(1)', "' onclick='alert(1)", "</title><svg>",
        "red;background:url(//x)", "}*{display:none", "<!--", "]]>", "&lt;script&gt;", "{{7*7}}",
        "{% include 'x' %}", "\u202eadA\u202c", "\u2066x\u2069", "<base href=//x>", "<a href=//x>",
        "<meta http-equiv=refresh>", "\x00<b>", "＜script＞",
    ],
)  # fmt: skip
def test_a_page_shows_hostile_words_as_words(words: str) -> None:
    span = Span(words, 0, len(words))
    problem = Problem("malformed", words, words)
    page = to_page([Extraction(words, (Entity(words, span),), (problem,), (words,), 0.0)])
    plain = Page(to_page([Extraction("x", (Entity("x", Span("x", 0, 1)),),
                          (Problem("malformed", "x", "x"),), ("x",), 0.0)]))  # fmt: skip
    shown = Page(page)
    assert {tag for tag, _ in shown.tags} <= {tag for tag, _ in plain.tags} and not shown.fetched
    for _, attributes in shown.tags:
        for name, value in attributes.items():
            assert not name.startswith("on") and name != "src"
            assert name != "href" or value.startswith("#")
            assert name != "style" or words not in value
    assert not re.search(r"url\(", "".join(re.findall(r"<style>.*?</style>", page, re.DOTALL)))
