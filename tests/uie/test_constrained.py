"""Constrained answers: the grammar's language, the masks, and that a valid free answer is the same
under the constraint.
"""

from __future__ import annotations

import importlib.util
import json
import random
import time
from pathlib import Path

import numpy as np
import pytest

from peft_taskmoe.uie import (
    Argument,
    Document,
    Entity,
    Event,
    Extractor,
    PromptFormat,
    Relation,
    Schema,
    Span,
    build_example,
    parse_answer,
    write_jsonl,
)
from peft_taskmoe.uie.extraction import constrained as constrained_module
from scripted import EOS, Scripted, byte_tokenizer, text_in, tiny_llama

pytest.importorskip("llguidance", reason="llguidance is not installed (the extra `constrained`)")

import llguidance
import llguidance.hf

from peft_taskmoe.uie.extraction.constrained import Constraint, answer_grammar

SCHEMA = Schema.from_dict(
    "UIE",
    {
        "entities": {"creative-work": "a work", "名前": "", "class": "a keyword"},
        "relations": {"works-for": {"head": ["a"], "tail": []}},
        "events": {
            "Life.Die": {"description": "", "roles": ["victim", "the place"]},
            "Attack": {"description": "", "roles": []},
        },
    },
)
TEXT = 'He "died" in Paris\\Rome.\r\nThen é🚀 שלום came;\x00 he died.'
OF_FORM = {
    "malformed",
    "truncated",
    "extra_text",
    "unknown_label",
    "unknown_slot",
    "missing_slot",
    "bad_value",
    "not_in_text",
}


def span(words: str, nth: int = 0) -> Span:
    at = -1
    for _ in range(nth + 1):
        at = TEXT.index(words, at + 1)
    return Span(words, at, at + len(words))


@pytest.fixture(scope="module")
def wrapped():
    return llguidance.hf.from_tokenizer(byte_tokenizer(), 272, [EOS])


def takes(wrapped, grammar: str, answer: str) -> bool:
    matcher = llguidance.LLMatcher(wrapped, grammar, log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    tokens = byte_tokenizer()(answer, split_special_tokens=True).input_ids
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


RECORDS = (
    Entity("creative-work", span('"died"')),
    Entity("creative-work", span("Paris\\Rome")),
    Entity("名前", span("é🚀 שלום")),
    Entity("名前", span("died", 1)),
    Entity("class", span("\r\n")),
    Entity("class", span("\x00")),
    Relation("works-for", span("He"), span("Paris")),
    Relation("works-for", span("died", 1), span("died")),
    Event(
        "Life.Die",
        span("died"),
        (Argument("victim", span("He")), Argument("the place", span("Rome"))),
    ),
    Event(
        "Life.Die",
        span("died", 1),
        (Argument("victim", span("he")), Argument("victim", span("died", 0))),
    ),
    Event("Attack", span("came")),
)


@pytest.mark.parametrize("style", ["dataclass", "compact"])
@pytest.mark.parametrize("occurrences", [True, False])
def test_every_completion_that_is_trained_on_is_in_the_language(wrapped, style, occurrences):
    format = PromptFormat(style=style, occurrences=occurrences)
    grammar = answer_grammar(SCHEMA, TEXT)
    for records in ((), RECORDS, *((record,) for record in RECORDS)):
        answer = build_example(Document("d", TEXT, "UIE", SCHEMA, records), format).completion
        assert takes(wrapped, grammar, answer), answer


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "[",
        " [] ",
        ' [Person("He")]',
        ' [creative_work(span="She")]',
        ' [creative_work(span="")]',
        ' [creative_work(span="He", author="He")]',
        ' [creative_work(span="died\\")]',
        ' [creative_work(span="\\\\")',
        ' [creative_work("He", span_nth=0)]',
        ' [creative_work("He") creative_work("in")]',
        ' [works_for("He")]',
        ' [works_for(head="He", "in")]',
        ' [Attack("came", victim=["He"])]',
        ' [Life_Die("died", victim=["She"])]',
        " [__import__('os')]",
    ],
)
def test_nothing_else_is(wrapped, answer):
    assert not takes(wrapped, answer_grammar(SCHEMA, TEXT), answer)


def test_of_given_events_only_those(wrapped):
    grammar = answer_grammar(
        SCHEMA, TEXT, [Event("Life.Die", span("died", 1)), Event("Attack", span('"died"'))]
    )
    assert takes(
        wrapped, grammar, ' [Life_Die(trigger="died", victim=["he"]), Attack("\\"died\\"")]'
    )
    assert not takes(wrapped, grammar, ' [Life_Die(trigger="came")]')
    assert not takes(wrapped, grammar, ' [Attack(trigger="died")]')
    assert not takes(wrapped, grammar, ' [class_("He")]')


@pytest.mark.slow
def test_any_walk_through_the_masks_is_an_answer_that_parses(wrapped):
    """500 answers of a model that chooses at random among the tokens that are allowed."""
    tokenizer, rng = byte_tokenizer(), random.Random(7)
    closing = {tokenizer(character).input_ids[0] for character in '")]'} | {EOS}
    grammar = answer_grammar(SCHEMA, TEXT)
    lengths = []
    for _ in range(500):
        matcher, tokens = llguidance.LLMatcher(wrapped, grammar, log_level=0), []
        while True:
            bits = np.unpackbits(
                np.frombuffer(matcher.compute_bitmask(), np.uint8), count=272, bitorder="little"
            )
            allowed = np.flatnonzero(bits).tolist()
            near = [token for token in allowed if token in closing]
            token = rng.choice(near if near and rng.random() < 0.2 + len(tokens) / 300 else allowed)
            if token == EOS:
                break
            assert matcher.consume_token(token)
            tokens.append(token)
        parsed = parse_answer(tokenizer.decode(tokens), SCHEMA, TEXT)
        assert not {problem.kind for problem in parsed.problems} & OF_FORM, parsed
        lengths.append(len(parsed.records))
    assert max(lengths) >= 4 and sum(lengths) > 200


# --- in the extractor ----------------------------------------------------------------------------


def extract(answer, texts, schema, **options):
    model = Scripted(answer)
    return Extractor(model, byte_tokenizer(), **{"max_new_tokens": 150, **options})(texts, schema)


@pytest.mark.slow
def test_a_valid_free_answer_is_the_same_under_the_constraint():
    documents = [Document("d", TEXT, "UIE", SCHEMA, (record,)) for record in RECORDS]
    answers = iter([build_example(document).completion for document in documents] * 2)
    texts = [TEXT + "." * i for i in range(len(documents))]
    by_text = dict(zip(texts, answers, strict=False))
    free, held = (
        extract(
            lambda prompt: by_text[text_in(prompt)],
            texts,
            SCHEMA,
            batch_size=4,
            constrained=constrained,
        )
        for constrained in (False, True)
    )
    assert [item.records for item in held] == [item.records for item in free]  # confidences as well
    assert [item.answers[0].parsed.raw for item in held] == list(by_text.values())
    assert all(item.problems == () and item.answers[0].complete for item in held)


@pytest.mark.parametrize(
    "answer",
    ["No idea.", ' [Person("He")]', ' [class_("nowhere")]', "\n\n\n", ' [class_("He"', "[[[["],
)
def test_an_invalid_free_answer_is_not_possible(answer):
    answer += " [] and more" * 20
    (found,) = extract(lambda prompt: answer, [TEXT], SCHEMA, constrained=True, max_new_tokens=400)
    cut = {"truncated", "extra_text"} if not found.answers[0].complete else set()
    assert {problem.kind for problem in found.problems} & OF_FORM <= cut


@pytest.mark.slow
def test_a_row_that_is_stopped_for_repeating_itself_is_let_go_in_silence(recwarn):
    def answer(prompt: str) -> str:
        loops = ' [class_("He"), ' + 'class_("Then"), ' * 100
        names = ", ".join(f'class_("{word}")' for word in names_text.split())
        return loops if "שלום" in prompt else f" [{names}]"

    names_text = " ".join(f"Name{number:02}" for number in range(30))
    looped, whole = extract(
        answer, [TEXT, names_text], SCHEMA, constrained=True, max_new_tokens=900
    )
    assert [record.span.text for record in looped.records] == ["He", "Then"]
    assert any(
        problem.message.endswith("because it repeats itself.") for problem in looped.problems
    )
    assert [record.span.text for record in whole.records] == names_text.split() and whole.answers[
        0
    ].complete
    assert not [
        warning for warning in recwarn if "goes on without constraint" in str(warning.message)
    ]


def test_a_real_model_in_a_batch_and_by_itself():
    model, texts = tiny_llama(), ["Ada met Bob.", "a longer text, about Kourou", "x"]
    results = [
        Extractor(model, byte_tokenizer(), batch_size=size, max_new_tokens=60, constrained=True)(
            texts, {"A": "", "B": ""}
        )
        for size in (1, 3)
    ]
    for alone, together in zip(*results, strict=True):
        assert alone.answers[0].parsed.raw == together.answers[0].parsed.raw
        assert {problem.kind for problem in alone.problems} <= {
            "repeated",
            "truncated",
            "bad_occurrence",
        }
        assert alone.text.find(alone.records[0].span.text) >= 0


def test_the_benchmark_counts_what_is_the_same(tmp_path, monkeypatch, capsys):
    path = Path(__file__).parents[2] / "benchmarks" / "constrained.py"
    if not path.exists():
        pytest.skip("benchmarks/ is not here")
    spec = importlib.util.spec_from_file_location("benchmark_constrained", path)
    benchmark = importlib.util.module_from_spec(spec)
    monkeypatch.syspath_prepend(path.parent)
    spec.loader.exec_module(benchmark)
    schema = Schema.from_dict("NER", {"name": ""})
    texts = ["Ada", "Bob or Eve", "Kim"]
    documents = [
        Document(text, text, "NER", schema, (Entity("name", Span(text[:3], 0, 3)),))
        for text in texts
    ]
    write_jsonl(documents, tmp_path / "made_up.jsonl")
    # Right and valid; a mention that is not in the text; prose.
    written = (' [name(span="Ada")]', ' [name(span="Zoe"), name(span="Bob")]', "no idea")
    answers = dict(zip(texts, written, strict=True))

    def both(args):
        model, options = (
            Scripted(lambda prompt: answers[text_in(prompt)]),
            {"max_new_tokens": 60, "batch_size": 2},
        )
        return {
            way: Extractor(model, byte_tokenizer(), constrained=way == "constrained", **options)
            for way in benchmark.WAYS
        }

    monkeypatch.setattr(benchmark, "both", both)
    figures = benchmark.main(
        [
            "--adapter",
            "a",
            "--files",
            str(tmp_path / "made_up.jsonl"),
            "--batch-size",
            "2",
            "--json",
            str(tmp_path / "f.json"),
        ]
    )
    assert (figures["judged"], figures["valid_free"], figures["same_where_valid"]) == (3, 1, 1)
    assert (
        figures["free"]["f1"]["mean"] == 0.8
    )  # 2 of 3, nothing wrong: what is not in the text is dropped
    assert (figures["free"]["hallucinated"], figures["constrained"]["hallucinated"]) == (1, 0)
    assert (figures["free"]["parse_failures"], figures["constrained"]["parse_failures"]) == (1, 0)
    assert figures["time_ratio"] > 0 and json.loads((tmp_path / "f.json").read_text()) == figures
    assert (
        "1 of 3 free answers are in the constraint's language; 1 of these"
        in capsys.readouterr().out
    )


def test_what_it_needs_is_asked_for(monkeypatch):
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        Constraint(byte_tokenizer(), [])
    with pytest.raises(ValueError, match="`object` is no fast tokenizer"):
        Constraint(object(), [EOS])
    monkeypatch.setattr(constrained_module, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'peft_taskmoe\[constrained\]'"):
        Extractor(Scripted(lambda prompt: " []"), byte_tokenizer(), constrained=True)


def test_long_texts_and_large_schemas_compile_in_a_moment(wrapped):
    """Linear size; the bound is 20 times what it takes here."""
    text = " ".join(f"word{i} Name{i % 37} é" for i in range(2000))
    schema = Schema.from_dict(
        "EE",
        {
            f"Event{i}": {"description": "", "roles": [f"r{j}" for j in range(10)]}
            for i in range(60)
        },
    )
    start = time.perf_counter()
    assert takes(
        wrapped,
        answer_grammar(schema, text),
        ' [Event59(trigger="word1999 Name1", r9=["Name1", "é"])]',
    )
    assert time.perf_counter() - start < 10


def test_a_grammar_that_the_library_refuses_leaves_the_answer_free_and_says_so(monkeypatch):
    monkeypatch.setattr(
        constrained_module, "answer_grammar", lambda *question: "start: unknown_rule\n"
    )
    with pytest.warns(UserWarning, match="goes on without constraint"):
        (found,) = extract(lambda prompt: ' [class_("He")]', [TEXT], SCHEMA, constrained=True)
    assert [record.label for record in found.records] == ["class"]


def test_given_events_of_no_class_are_in_no_answer(wrapped):
    given = [Event("Unknown", span("came")), Event("Attack", span("died"))]
    grammar = answer_grammar(SCHEMA, TEXT, given)
    assert takes(wrapped, grammar, ' [Attack("died")]')
    assert not takes(wrapped, grammar, ' [Attack("came")]')
