"""What could be quadratic: four times the input must not take more than seven times as long."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import pytest

from peft_taskmoe.uie import (
    Entity,
    Extraction,
    Relation,
    Schema,
    Span,
    parse_answer,
)
from peft_taskmoe.uie.alignment import TextIndex
from peft_taskmoe.uie.extraction.reading import with_confidence
from peft_taskmoe.uie.extraction.windows import merge_windows, split_windows
from peft_taskmoe.uie.suffixes import SortedSuffixes
from peft_taskmoe.uie.view import to_page
from scripted import byte_tokenizer

SCHEMA = Schema.of("person")


def letters(n: int) -> str:
    return "".join(random.Random(0).choices("ab", k=n))


def answer(n: int, tail: str = "") -> Callable[[], object]:
    text = letters(40 * n)
    calls = ", ".join(f'person("{text[40 * i : 40 * i + 40]}{tail}")' for i in range(n))
    return lambda: parse_answer(f"[{calls}]", SCHEMA, text)


def relations(n: int) -> Callable[[], object]:
    spans = [Span("ab", 3 * i, 3 * i + 2) for i in range(n)]
    found = tuple(Relation("r", spans[i], spans[7 * i % n]) for i in range(n))
    return lambda: to_page([Extraction("ab " * n, found, (), (), 0.0)])


def nested(n: int) -> Callable[[], object]:
    text = "ab " * n
    found = tuple(Entity("e", Span(text[i:-i], i, 3 * n - i)) for i in range(1, n))
    return lambda: to_page([Extraction(text, found, (), (), 0.0)])


def windows(n: int) -> Callable[[], object]:
    cut = split_windows("Ada met Bob. " * n, 26, overlap=5)
    found = [(window, (Entity("person", Span("Ada", 0, 3)),)) for window in cut]
    return lambda: merge_windows(found)


def identifiers(n: int) -> Callable[[], object]:
    names = {chr(0x1F300 + i % 700) * (1 + i // 700): "" for i in range(n)}
    return lambda: Schema.of(names).names


def one_word(n: int) -> Callable[[], object]:
    return lambda: parse_answer(f'[person("{"x" * 1000 * n}")]', SCHEMA, "x" * 2000 * n)


def brackets(n: int) -> Callable[[], object]:
    return lambda: parse_answer("[person(" * 10 * n, SCHEMA, "Ada")


def confidences(n: int) -> Callable[[], object]:
    """Of an answer of about 16 n tokens."""
    tokenizer = byte_tokenizer()
    text = " ".join(f"{i:04}" for i in range(n))
    written = "[" + ", ".join(f'person("{i:04}")' for i in range(n)) + "]"
    tokens, parsed = tokenizer(written).input_ids, parse_answer(written, SCHEMA, text)
    assert len(parsed.records) == n and len(tokens) > 15 * n
    return lambda: with_confidence(parsed, tokens, [-0.1] * len(tokens), tokenizer.decode)


CASES = {
    "mentions of the text": (answer, 400),
    "mentions of another text": (lambda n: answer(n, "c"), 400),
    "relations of a page": (relations, 300),
    "nested mentions of a page": (nested, 100),
    "windows": (windows, 500),
    "identifiers": (identifiers, 400),
    "one word": (one_word, 500),
    "brackets": (brackets, 500),
    "confidences": (confidences, 80),
}


def seconds(work: Callable[[], object]) -> float:
    times = []
    for _ in range(3):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


@pytest.mark.parametrize(("make", "n"), CASES.values(), ids=CASES)
def test_four_times_as_much_takes_about_four_times_as_long(make: Callable, n: int) -> None:
    assert seconds(make(4 * n)) < 7 * seconds(make(n)) + 0.02


@pytest.mark.parametrize("text", ["", "a", "abab" * 40, "\ud800é🚀" * 9, letters(300), "a" * 200])
@pytest.mark.parametrize("most", [1, 10_000])
def test_sorted_suffixes_find_what_reading_finds(text: str, most: int) -> None:
    suffixes = SortedSuffixes(text)
    needles = {text[i : i + n] for i in range(len(text)) for n in (1, 3, 31, 33, 90)} | {"b", "zz"}
    for needle in needles:
        starts = [i for i in range(len(text)) if text.startswith(needle, i)]
        assert suffixes.find_all(needle, most)[0] == starts[:most]


def test_many_mentions_of_a_long_text_are_all_looked_for() -> None:
    text = letters(100_000)
    index = TextIndex(text)
    assert all(index.occurrences(text[i : i + 40]).places for i in range(0, 90_000, 30))
    assert all(index.occurrences(f"{text[i : i + 40]}c").searched for i in range(0, 90_000, 30))
