"""Prompts and completions as they are written, and what the regularisers may and may not change."""

import ast
import os
import random
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest

from peft_taskmoe.uie.parse import parse_answer
from peft_taskmoe.uie.prompt import (
    PromptFormat,
    build_example,
    completion_text,
    prompt_schema_text,
    prompt_text,
    string_literal,
)
from peft_taskmoe.uie.records import Argument, Document, Entity, Event, Relation, Span, record_key
from peft_taskmoe.uie.regularisers import Regularisers, collect_mentions, regularise
from peft_taskmoe.uie.schema import EntityType, Schema

COMPACT = PromptFormat(style="compact")


class Launcher(EntityType):
    """A vehicle designed to carry a payload to space."""

    examples = ("Falcon 9", "Soyuz")


CARRIES = {"description": "", "head": ["Launcher"]}
CARRIES["tail"] = {"description": "what", "types": ["Probe", "Crew"]}
ROLES = {"Vehicle": {"examples": ["Soyuz"]}, "Launch.Site": "a \\ place"}
LAUNCH = {"Launch": {"description": 'It "starts"', "roles": ROLES}}
SCHEMA = Schema.of(Launcher, {"creative-work": ""}, {"carries": CARRIES}, LAUNCH)


def span(text, words, nth=1):
    start = -1
    for _ in range(nth):
        start = text.index(words, start + 1)
    return Span(words, start, start + len(words))


def test_dataclass_style():
    expected = '''\
@dataclass
class Launcher(Entity):
    """A vehicle designed to carry a payload to space. Such as: Falcon 9, Soyuz"""
    span: str  # the mention, as it stands in the text
@dataclass
class creative_work(Entity):
    """creative-work"""
    span: str  # the mention, as it stands in the text
@dataclass
class carries(Relation):
    head: str  # Launcher
    tail: str  # Probe or Crew: what
@dataclass
class Launch(Event):
    """It \\"starts\\""""
    trigger: str  # the words that name the event
    Vehicle: List[str]  # Such as: Soyuz
    Launch_Site: List[str]  # a \\ place
# This is the text to analyze
text = "Ariane 5 \\"flew\\"\\nto Mars."
# The annotation instances that take place in the text above are listed here
result ='''
    assert prompt_text('Ariane 5 "flew"\nto Mars.', SCHEMA) == expected


def test_compact_style():
    expected = """\
Launcher(span): A vehicle designed to carry a payload to space. Such as: Falcon 9, Soyuz
creative_work(span): creative-work
carries(head, tail): head: Launcher; tail: Probe or Crew: what
Launch(trigger, Vehicle, Launch_Site): It "starts"; Vehicle: Such as: Soyuz; Launch_Site: a \\ place
text = "Ariane 5"
result ="""
    assert prompt_text("Ariane 5", SCHEMA, format=COMPACT) == expected


@pytest.mark.parametrize("format", [PromptFormat(), COMPACT])
def test_the_schema_text_is_the_beginning_of_every_prompt(format):
    schema_text = prompt_schema_text(SCHEMA, format=format)
    for text in ("", "one", "two\nlines"):
        prompt = prompt_text(text, SCHEMA, format=format)
        assert prompt.startswith(schema_text) and prompt.endswith("\nresult =")
        assert string_literal(text) in prompt[len(schema_text) :]


def test_the_prompt_is_python_whatever_the_guidelines_hold():
    ends = ["ends with \\", 'ends with "']
    nasty = [*ends, '"""', "new\nline", "'''", "\0", "\ud800", "# result =", "{x}"]
    for words in nasty:
        label = {"description": words, "examples": [words], "roles": {words: words}}
        ast.parse(prompt_text(words, Schema.of({words: label})) + " []")


def test_completions():
    text = "Ariane 5 and Ariane 5 carried Rosetta from Kourou, not from Kourou."
    second = span(text, "Ariane 5", 2)
    site, vehicle = Argument("Launch.Site", span(text, "Kourou", 2)), Argument("Vehicle", second)
    records = [
        Event("Launch", span(text, "carried"), (site, vehicle)),
        Entity("Launcher", second),
        Entity("Launcher", second),
        Relation("carries", second, span(text, "Rosetta")),
        Entity("creative-work", span(text, "Rosetta")),
    ]
    assert completion_text(records, text, SCHEMA) == (
        ' [Launcher(span="Ariane 5", span_nth=2), '
        'carries(head="Ariane 5", tail="Rosetta", head_nth=2), '
        'Launch(trigger="carried", Vehicle=["Ariane 5"], '
        'Launch_Site=["Kourou"], Launch_Site_nth=2), '
        'creative_work(span="Rosetta")]'
    )
    assert completion_text(records, text, SCHEMA, format=COMPACT) == (
        ' [Launcher("Ariane 5", span_nth=2), carries("Ariane 5", "Rosetta", head_nth=2), '
        'Launch("carried", Vehicle="Ariane 5", Launch_Site="Kourou", Launch_Site_nth=2), '
        'creative_work("Rosetta")]'
    )
    words_only = PromptFormat("compact", occurrences=False)
    plain = completion_text(records, text, SCHEMA, format=words_only)
    assert "_nth" not in plain and len(parse_answer(plain, SCHEMA, text).records) == 4
    assert completion_text([], text, SCHEMA) == " []"


@pytest.mark.parametrize(
    ("head", "tail", "numbers"),
    [
        (1, 1, ""),
        (2, 1, ", head_nth=2"),
        (1, 2, ", tail_nth=2"),
        (2, 2, ", head_nth=2, tail_nth=2"),
    ],
)
def test_relations_have_as_few_numbers_as_will_do(head, tail, numbers):
    text = "Soyuz Rosetta; Soyuz Rosetta"
    relation = Relation("carries", span(text, "Soyuz", head), span(text, "Rosetta", tail))
    answer = completion_text([relation], text, SCHEMA, format=COMPACT)
    assert answer == f' [carries("Soyuz", "Rosetta"{numbers})]'
    assert parse_answer(answer, SCHEMA, text).records == (relation,)


def test_gold_without_offsets_is_written_in_words():
    records = [Entity("Launcher", Span("Ariane 5")), Entity("Launcher", Span("Soyuz"))]
    assert completion_text(records, "Ariane 5, Ariane 5", SCHEMA, format=COMPACT) == (
        ' [Launcher("Ariane 5"), Launcher("Soyuz")]'
    )


def test_given_events_are_shown_without_their_arguments():
    text = "It flew, then it flew from Kourou."
    event = Event("Launch", span(text, "flew", 2), (Argument("Launch.Site", span(text, "Kourou")),))
    schema = Schema(SCHEMA.labels[-1:])
    document = Document("d", text, "EAE", schema, (event,))
    example = build_example(document, COMPACT)
    assert 'given = [Launch("flew", trigger_nth=2)]\nresult =' in example.prompt
    assert "Kourou" not in example.prompt.split("given =")[1]
    assert example.completion == ' [Launch("flew", Launch_Site="Kourou")]'
    options = {"names": example.names, "given": document.given}
    assert parse_answer(example.completion, example.schema, text, **options).records == (event,)
    shown = (
        "# These events are given; list each with its arguments\n"
        'given = [Launch(trigger="flew", trigger_nth=2)]'
    )
    assert shown in build_example(document).prompt


ANY_TEXT = [
    *("", "plain", "quotes \" ' \"\"\" '''", "back\\slash \\n \\", "a\nb\r\nc\rd", "tab\there"),
    *("NUL \0 here", "x = 'code'  # result = [A()]\nresult =", "\\N{DASH}", "\U0010ffff"),
    *("שלום עולם", "\u202eright-to-left\u202c", "👩\u200d🚀 emoji ❤️", "é e\u0301", "日本語"),
    *("\u2028\u2029\x85", "lone \ud83d surrogate", "\ufeffbom", "\x7f\x80\x1b[0m"),
    "f'{x}' %s {0}",
]


@pytest.mark.parametrize("text", ANY_TEXT)
def test_any_text_goes_in_and_comes_back(text):
    literal = string_literal(text)
    assert ast.literal_eval(literal) == text
    assert len(literal.splitlines()) == 1
    literal.encode("utf-8")
    prompt = prompt_text(text, SCHEMA, format=COMPACT)
    assert ast.literal_eval(prompt.split("\ntext = ")[1].split("\nresult =")[0]) == text
    # Every character of it can be a span, with exact offsets.
    records = tuple(
        Entity("Launcher", Span(text[i : i + 2], i, min(i + 2, len(text))))
        for i in range(len(text))
    )
    example = build_example(Document("d", text, "NER", Schema.of(Launcher), records))
    parsed = parse_answer(example.completion, example.schema, text)
    assert (parsed.records, parsed.problems) == (records, ())


def test_readable_characters_stay_readable():
    assert string_literal("Größe 東京 🚀") == '"Größe 東京 🚀"'


def test_unknown_labels_and_roles_are_errors():
    text = "It flew."
    wrong = Document("d7", text, "NER", Schema.of(Launcher), (Entity("Rocket", span(text, "It")),))
    unknown = r"Document `d7`: There is a record of the entity `Rocket`.*has `Launcher`"
    with pytest.raises(ValueError, match=unknown):
        build_example(wrong)
    with pytest.raises(ValueError, match="There is a record of the entity `Rocket`"):
        completion_text(wrong.records, text, SCHEMA)
    event = Event("Launch", span(text, "flew"), (Argument("Crew", span(text, "It")),))
    role = r"event `Launch` has an argument in the role `Crew`.*roles: `Vehicle`, `Lau"
    with pytest.raises(ValueError, match=role):
        completion_text([event], text, SCHEMA)
    with pytest.raises(ValueError, match=r'`style` is .long.\. Write "dataclass" or "compact"'):
        PromptFormat("long")


# --- regularisers

LABELS = Schema.from_dict("NER", {f"L{i}": f"guideline {i}" for i in range(8)})
WORDS = [f"word{i}" for i in range(8)]
TEXT = " ".join(WORDS)


FLEW = Event("Launch", span("It flew.", "flew"))
LAUNCHED = Document("e", "It flew.", "EAE", Schema(SCHEMA.labels[-1:]), (FLEW,))


def document(number, labels=(0, 3)):
    records = tuple(Entity(f"L{i}", span(TEXT, WORDS[i])) for i in labels)
    return Document(f"doc-{number}", TEXT, "NER", LABELS, records)


ALL = Regularisers(
    shuffle=True, dropout=0.15, mask=0.5, examples=3, max_negatives=4, added_negatives=2
)
POOL = {("entity", f"L{i}"): ("alpha", "beta", f"word{i}", f"gamma {i}") for i in range(8)}
NEGATIVES = Schema.from_dict("NER", {"N1": "n", "N2": "n", "N3": "n", "L1": "other"})


def test_off_is_the_plain_example():
    plain = build_example(document(1))
    assert plain == build_example(document(1), regularisers=Regularisers(), seed=9)
    assert plain.schema == LABELS and plain.names == LABELS.names


def test_examples_differ_by_seed_and_by_document_and_by_nothing_else():
    def build(number, seed):
        return build_example(document(number), COMPACT, ALL, seed, POOL, NEGATIVES).prompt

    assert build(1, 0) == build(1, 0)
    assert len({build(1, seed) for seed in range(20)}) == 20
    assert len({build(number, 0) for number in range(20)}) == 20


def test_they_do_not_depend_on_the_hash_seed():
    # The packages' own __init__ are stepped over: they import torch, which takes its time.
    code = (
        "import sys, types; sys.path[:0] = ['tests/uie', '.']\n"
        "for name in ('peft_taskmoe', 'peft_taskmoe.uie'):\n"
        "    module = sys.modules[name] = types.ModuleType(name)\n"
        "    module.__path__ = [name.replace('.', '/')]\n"
        "import test_prompt as t\n"
        "given = (t.COMPACT, t.ALL, 3, t.POOL, t.NEGATIVES)\n"
        "for i in range(20): print(t.build_example(t.document(i), *given))"
    )
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    outputs = set()
    for seed in ("0", "1"):
        options = {"cwd": root, "capture_output": True, "text": True, "check": True}
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run([sys.executable, "-c", code], env=environment, **options)
        outputs.add(done.stdout)
    assert len(outputs) == 1 and "LABEL_" in outputs.pop()


def test_all_of_them_still_come_back():
    for number in range(200):
        example = build_example(document(number, (0, 2, 5)), COMPACT, ALL, 1, POOL, NEGATIVES)
        parsed = parse_answer(example.completion, example.schema, TEXT, names=example.names)
        assert parsed.problems == ()
        assert set(map(record_key, parsed.records)) == set(
            map(record_key, example.document.records)
        )
        for label in example.schema.labels:
            assert f"{example.names.class_of(label)}(span)" in example.prompt


@pytest.mark.parametrize(
    "regularisers", [Regularisers(shuffle=True), replace(ALL, max_negatives=None)]
)
def test_what_is_shown_does_not_depend_on_the_gold_records(regularisers):
    for number in range(100):
        gold = [document(number, labels) for labels in ((), (0,), (1, 2), range(8))]
        options = (COMPACT, regularisers, 4, POOL, NEGATIVES)
        shown = {build_example(one, *options).prompt for one in gold}
        assert len(shown) == 1


def test_class_order_does_not_leak_the_answer():
    # With negatives limited, positives are always there; their place must tell nothing.
    places = Counter()
    for number in range(2_000):
        limited = Regularisers(shuffle=True, max_negatives=2)
        shown, _ = regularise(document(number, (0, 3)), limited, 0)
        names = [label.name for label in shown.schema.labels]
        assert len(names) == 4
        places.update(i for i, name in enumerate(names) if name in ("L0", "L3"))
    assert sum(places.values()) == 4_000
    assert max(abs(places[i] - 1_000) for i in range(4)) < 100  # 5 standard deviations
    unshuffled, _ = regularise(document(1, (3, 5)), Regularisers(max_negatives=3), 0)
    names = [label.name for label in unshuffled.schema.labels]
    assert names == sorted(names) and {"L3", "L5"} < set(names)


def test_dropout_takes_labels_with_their_records():
    kept = Counter()
    for number in range(2_000):
        shown, _ = regularise(document(number, (0, 3)), Regularisers(dropout=0.15), 0)
        names = [label.name for label in shown.schema.labels]
        assert {record.label for record in shown.records} == {"L0", "L3"} & set(names)
        kept.update(names)
    for i in range(8):
        assert abs(kept[f"L{i}"] / 2_000 - 0.85) < 0.04
    for number in range(50):
        shown, _ = regularise(document(number), Regularisers(dropout=1.0), 0)
        assert len(shown.schema.labels) == 1
    assert regularise(LAUNCHED, Regularisers(dropout=1.0), 0)[0] == LAUNCHED


def test_masks_are_counted_in_the_order_shown():
    example = build_example(document(1), COMPACT, Regularisers(shuffle=True, mask=1.0))
    identifiers = [example.names.class_of(label) for label in example.schema.labels]
    assert identifiers == [f"LABEL_{i}" for i in range(1, 9)]
    assert "L0" not in example.prompt + example.completion
    half = Regularisers(mask=0.5)
    masked = [regularise(document(i), half, 0)[1] != LABELS.names for i in range(1_000)]
    assert 430 < sum(masked) < 570


def test_example_mentions_are_sampled_and_never_in_the_text():
    seen = Counter()
    for number in range(200):
        shown, _ = regularise(document(number), Regularisers(examples=2), 0, POOL)
        for label in shown.schema.labels:
            assert len(label.examples) <= 2
            seen.update(label.examples)
    assert {"alpha", "beta", "gamma 0"} < set(seen) and not any(word in seen for word in WORDS)
    example = build_example(document(2), regularisers=Regularisers(examples=2), mentions=POOL)
    assert "Such as: " in example.prompt


def test_negatives_are_added_from_other_schemas():
    shown, _ = regularise(document(1), Regularisers(added_negatives=9), 0, negative_pool=NEGATIVES)
    names = [label.name for label in shown.schema.labels]
    assert sorted(names[8:]) == ["N1", "N2", "N3"]  # not L1: that is asked for already
    assert shown.records == document(1).records
    with pytest.raises(ValueError, match=r"`added_negatives` is 1, but.*negative_pool=Schema.of"):
        regularise(document(1), Regularisers(added_negatives=1), 0)
    with pytest.raises(ValueError, match=r"`dropout` is 2. It is a probability"):
        Regularisers(dropout=2)
    with pytest.raises(ValueError, match=r"`examples` is -1. It counts: write 0 or more"):
        Regularisers(examples=-1)


def test_collected_mentions():
    launch = replace(LAUNCHED, task="EE")
    assert collect_mentions([document(1), document(2, (0, 1)), launch]) == {
        ("entity", "L0"): ("word0",),
        ("entity", "L3"): ("word3",),
        ("entity", "L1"): ("word1",),
        ("event", "Launch"): ("flew",),
    }


def test_random_source_is_its_own():
    random.seed(3)
    state = random.getstate()
    build_example(document(1), COMPACT, ALL, 3, POOL, NEGATIVES)
    assert random.getstate() == state


def test_an_argument_that_is_given_twice_is_written_once():
    text = "Ariane flew."
    arguments = (Argument("Vehicle", span(text, "Ariane")),) * 2
    event = Event("Launch", span(text, "flew"), arguments)
    assert completion_text([event], text, SCHEMA).count("Ariane") == 1
