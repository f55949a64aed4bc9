"""Answers, whole and broken: every complete record comes back, everything else is a problem,
nothing raises.
"""

import ast
import gc
import json
import random
import re
import sys
import time
import warnings

import pytest

from peft_taskmoe.uie import alignment, calls
from peft_taskmoe.uie.parse import parse_answer
from peft_taskmoe.uie.prompt import PromptFormat, completion_text
from peft_taskmoe.uie.records import (
    PROBLEM_KINDS,
    Argument,
    Entity,
    Event,
    Problem,
    Relation,
    Span,
    record_key,
)
from peft_taskmoe.uie.schema import Names, Schema

SCHEMA = Schema.from_dict(
    "UIE",
    {
        "Launcher": "rockets",
        "Mission": "missions",
        "creative-work": "works",
        "carries": {"description": "", "head": "Launcher", "tail": ["Mission", "creative-work"]},
        "Launch": {"description": "a start", "roles": ["Vehicle", "Launch.Site", "Date"]},
    },
)
TEXT = (
    "Ariane 5 flew. Then Ariane 5 carried Rosetta from Kourou, and Apollo, not Ariane 5, "
    "(8) flew in 'x' \"y\"."
)


def parse(answer, text=TEXT, **options):
    return parse_answer(answer, SCHEMA, text, **options)


def spans(parsed):
    return [(r.label, r.span.text, r.span.start) for r in parsed.records]


def kinds(parsed):
    return [problem.kind for problem in parsed.problems]


ARIANE, APOLLO = ("Launcher", "Ariane 5", 0), ("Mission", "Apollo", TEXT.index("Apollo"))


def test_a_whole_answer():
    parsed = parse(
        ' [Launcher(span="Ariane 5"), Launcher(span="Ariane 5"), Mission(span="Apollo")]'
    )
    assert spans(parsed) == [ARIANE, ("Launcher", "Ariane 5", 20), APOLLO]
    assert parsed.problems == () and parsed.well_formed
    assert [parsed.raw[a:b] for a, b in parsed.sources][2] == 'Mission(span="Apollo")'


@pytest.mark.parametrize(
    ("answer", "found", "problems"),
    [
        ("[]", [], []),
        (" []\n\ntext = \"Apollo\"\nresult = [Mission(span='Apollo')]", [], ["extra_text"]),
        ("", [], ["truncated"]),
        ("[", [], ["truncated"]),
        ("I do not know.", [], ["extra_text", "truncated"]),
        ('[Launcher(span="Ariane 5")', [ARIANE], ["truncated"]),
        ('Launcher(span="Ariane 5")', [ARIANE], ["truncated"]),
        ('[Launcher(span="Ariane 5"), Mission(span="Apo', [ARIANE], ["truncated"]),
        ('[Launcher(span="Ariane 5"), Miss', [ARIANE], ["extra_text", "truncated"]),
        ('[Launcher(span="Ariane 5), Mission(span="Apollo")]', [APOLLO], ["malformed"]),
        ("[Launcher(span=\"Ariane 5), Mission(span='Apollo')]", [APOLLO], ["malformed"]),
        ('[\n  Launcher(span="Ariane 5),\n  Mission(span="Apollo"),\n]', [APOLLO], ["malformed"]),
        ('[Launcher(span="Ariane 5", Mission(span="Apollo")]', [APOLLO], ["malformed"]),
        ('[Launcher(span="Ariane 5"] , Mission(span="Apollo")]', [APOLLO], ["malformed"]),
        ('[Launcher(span="Ariane 5")]]]', [ARIANE], ["extra_text"]),
        (
            '[Launcher(span="Ariane 5")]], Mission(span="Apollo")]',
            [ARIANE, APOLLO],
            ["extra_text"] * 2,
        ),
        ('[[Launcher(span="Ariane 5")], [Mission(span="Apollo")]]', [ARIANE, APOLLO], []),
        ('[Launcher(span="Ariane 5")], [Mission(span="Apollo")]', [ARIANE, APOLLO], []),
        ('[Launcher(span="Ariane 5")]\nMission(span="Apollo")', [ARIANE, APOLLO], []),
        (
            '[Launcher(span="Ariane 5") and also Mission(span="Apollo")]',
            [ARIANE, APOLLO],
            ["extra_text"],
        ),
        ('[Launcher(span="Ariane 5"),, , Mission(span="Apollo"),]', [ARIANE, APOLLO], []),
        ('```python\nresult = [Launcher("Ariane 5")]\n```', [ARIANE], []),
        (
            'Here [as asked] you are (see below):\n[Launcher("Ariane 5")]\nHope it helps!',
            [ARIANE],
            ["extra_text"] * 2,
        ),
        ("[Launcher('Ariane 5'), Mission(span=\"\"\"Apollo\"\"\")]", [ARIANE, APOLLO], []),
        ("[Launcher(\n    span='Ariane' ' 5',  # a rocket\n)]", [ARIANE], []),
        ("[Launcher(span=['Ariane 5'])]", [ARIANE], []),
        ("[Launcher(span=u'Ariane 5')]", [], ["malformed"]),
        ("[Launcher(span=f'Ariane 5')]", [], ["malformed"]),
        ("[Launcher(span=(s := 'Ariane 5'))]", [], ["malformed"]),
        ("[Launcher(span=x) for x in ('Ariane 5',)]", [], ["malformed"]),
        ("[Launcher(span='Ariane 5', span_nth=2)]", [("Launcher", "Ariane 5", 20)], []),
        ("[Launcher(span_nth=2, span='Ariane 5')]", [("Launcher", "Ariane 5", 20)], []),
        ("[Launcher(span='Ariane 5', span_nth=9)]", [ARIANE], ["bad_occurrence"]),
        ("[Launcher(span='Ariane 5', span_nth=-1)]", [ARIANE], ["bad_occurrence"]),
        ("[Launcher(span='Ariane 5', span_nth='2')]", [ARIANE], ["bad_occurrence"]),
        ("[Launcher(span='Ariane 5', span_nth=True)]", [ARIANE], ["bad_occurrence"]),
        ("[Launcher(span='Ariane 5', weight='8')]", [ARIANE], ["unknown_slot"]),
        ("[Launcher('Ariane 5', 'Apollo')]", [ARIANE], ["unknown_slot"]),
        ("[Launcher(name='Ariane 5')]", [], ["unknown_slot", "missing_slot"]),
        ("[Launcher()]", [], ["missing_slot"]),
        ("[Launcher(span=None)]", [], ["missing_slot"]),
        ("[Launcher(span=8)]", [], ["bad_value", "missing_slot"]),
        ("[Launcher(8)]", [], ["bad_value", "missing_slot"]),
        ("[Launcher(span='')]", [], ["bad_value", "missing_slot"]),
        ("[Launcher(span=['Ariane 5', 'Apollo'])]", [], ["bad_value"]),
        ("[Launcher(span='a', 'b')]", [], ["malformed"]),
        ("[Rocket(span='Ariane 5'), Mission(span='Apollo')]", [APOLLO], ["unknown_label"]),
        ("[Launcher(span='Falcon 9'), Mission(span='Apollo')]", [APOLLO], ["not_in_text"]),
        ("[Mission('Apollo'), Mission('Apollo'), Mission('Apollo')]", [APOLLO], ["repeated"] * 2),
        ("[Mission('Apollo'), Mission('Apollo', span_nth=1)]", [APOLLO], ["repeated"]),
        ("[Mission('APOLLO'), Mission('Apollo')]", [APOLLO], ["repeated"]),
        (
            "__import__('os').system('true')",
            [],
            ["unknown_label", "extra_text", "unknown_label", "truncated"],
        ),
    ],
)  # fmt: skip
def test_broken_answers(answer, found, problems):
    parsed = parse(answer)
    assert spans(parsed) == found
    assert sorted(kinds(parsed)) == sorted(problems), parsed.problems
    assert parsed.raw == answer
    assert all(problem.source in answer for problem in parsed.problems)


def test_labels_that_are_no_identifiers_and_normalised_spans():
    parsed = parse("[creative_work(span='rosetta')]")
    assert parsed.records == (Entity("creative-work", Span("Rosetta", 37, 44, "normalised")),)


def test_spans_that_are_not_in_the_text_can_be_kept():
    answer = (
        "[Launcher('Falcon 9'), carries('Ariane 5', 'Sputnik'), "
        "Launch('carried', Vehicle=['Falcon 9'])]"
    )
    assert kinds(parse(answer)) == ["not_in_text"] * 3
    assert [type(record) for record in parse(answer).records] == [Event]
    kept = parse(answer, keep_not_found=True)
    assert kinds(kept) == ["not_in_text"] * 3
    lost = Span("Falcon 9", None, None, "not_found")
    assert kept.records[0] == Entity("Launcher", lost)
    assert kept.records[1].head.start == 0 and kept.records[1].tail.alignment == "not_found"
    assert kept.records[2].arguments == (Argument("Vehicle", lost),)


def test_relations_get_the_types_that_the_answer_says_and_no_others():
    said = "[carries('Ariane 5', 'Rosetta'), creative_work('Rosetta'), Mission('Ariane 5')]"
    relation = parse(said).records[0]
    assert isinstance(relation, Relation)
    # The schema would have a Launcher as the head; the model said something else.
    assert (relation.head_type, relation.tail_type) == (None, "creative-work")
    for types in ("Launcher('Ariane 5')", "Launcher('Ariane 5'), Mission('Ariane 5')"):
        relation = parse(f"[carries('Ariane 5', 'Rosetta'), {types}]").records[0]
        assert (relation.head_type, relation.tail_type) == ("Launcher", None)


@pytest.mark.parametrize(
    ("text", "answer", "starts"),
    [
        (
            "John is ill. John Doe visited Japan. John likes sushi.",
            "a(John) a(John Doe) a(John)",
            [0, 13, 37],
        ),
        ("John Doe visited Japan. John likes sushi.", "a(John Doe) b(John)", [0, 24]),
        ("University of Bergen in Bergen", "a(University of Bergen) b(Bergen)", [0, 24]),
        (
            "University of Bergen in Bergen",
            "b(Bergen) a(University of Bergen) b(Bergen)",
            [14, 0, 24],
        ),
        ("New York City and York", "a(New York) a(New York City) b(York) b(York)", [0, 0, 18, 4]),
        ("New York", "a(New York) b(York) b(New York)", [0, 4, 0]),
        ("art and party; art", "a(art and party) a(art) a(art) a(art)", [0, 15, 0, 9]),
        ("서울에서 열린 회의. 서울 시장은", "a(서울) a(서울)", [0, 12]),
        ("东京在日本。东京很大", "a(东京) a(东京)", [0, 6]),
        ("partying is no art", "a(art) a(art)", [15, 1]),
        ("the art; party", "a(the art) a(art) a(art)", [0, 4, 10]),
        ("nothing", "a(n) a(n)", [0, 5]),
    ],
)  # fmt: skip
def test_successive_mentions_take_free_places_before_those_inside_longer_ones(text, answer, starts):
    schema = Schema.of(["a", "b"])
    calls = re.sub(r"(\w)\(([^)]*)\)", r'\1("\2"),', answer)
    parsed = parse_answer(f"[{calls}]", schema, text)
    assert [record.span.start for record in parsed.records] == starts
    # Where that is not what is meant, completions say so by numbers, and come back.
    for records in (parsed.records, parsed.records[::-1]):
        again = parse_answer(completion_text(records, text, schema), schema, text)
        assert {record_key(r) for r in again.records} == {record_key(r) for r in records}
    assert (
        parse_answer('[a("John", span_nth=2)]', schema, "John and John").records[0].span.start == 9
    )


def test_events_with_roles_that_are_no_identifiers():
    parsed = parse(
        "[Launch(trigger='carried', Vehicle='Ariane 5', "
        "Launch_Site=['Kourou', 'Mars', 7], Crew=['x'])]"
    )
    (event,) = parsed.records
    assert [(a.role, a.span.text, a.span.start) for a in event.arguments] == [
        ("Vehicle", "Ariane 5", 20),  # the nearest to the trigger
        ("Launch.Site", "Kourou", TEXT.index("Kourou")),
    ]
    assert sorted(kinds(parsed)) == ["bad_value", "not_in_text", "unknown_slot"]


def test_occurrences_of_a_role():
    answer = "[Launch('carried', Vehicle=['Ariane 5', 'Ariane 5'], Vehicle_nth=[3, 1])]"
    assert [a.span.start for a in parse(answer).records[0].arguments] == [
        TEXT.rindex("Ariane 5"),
        0,
    ]
    parsed = parse("[Launch('carried', Vehicle=['Ariane 5', 'Ariane 5'], Vehicle_nth=[3])]")
    assert kinds(parsed) == ["bad_occurrence"] and len(parsed.records[0].arguments) == 2
    parsed = parse("[Launch('carried', Vehicle=['Ariane 5', 'Ariane 5'], Vehicle_nth=[1, 1])]")
    assert kinds(parsed) == ["repeated"] and len(parsed.records[0].arguments) == 1
    parsed = parse("[Launch('carried', Launch_Site=['Kourou', 'Kourou'])]")
    assert kinds(parsed) == ["repeated"] and len(parsed.records[0].arguments) == 1


def test_an_argument_of_one_event_can_be_one_of_the_next():
    parsed = parse("[Launch('flew', Vehicle='Apollo'), Launch('carried', Vehicle='Apollo')]")
    assert [len(event.arguments) for event in parsed.records] == [1, 1] and not parsed.problems


def test_given_events():
    first = Event("Launch", Span("flew", 9, 13))
    second = Event("Launch", Span("flew", TEXT.rindex("flew"), TEXT.rindex("flew") + 4))
    answer = "[Launch('flew'), Launch('flew', Vehicle='Apollo'), Launch('flew'), Launch('carried')]"
    parsed = parse(answer, given=(second, first))
    assert [(r.trigger.start, len(r.arguments)) for r in parsed.records] == [
        (9, 0),
        (second.trigger.start, 1),
    ]
    assert kinds(parsed) == ["not_given"] * 2
    chosen = parse("[Launch('flew', trigger_nth=2)]", given=(first, second))
    assert chosen.records[0].trigger == second.trigger


def test_a_given_event_is_named_by_its_words_or_their_normal_form():
    """The very words come first; whatever is written is what was given."""
    text = "launch, Launch"
    lower, upper = (Event("Launch", Span(text[a : a + 6], a, a + 6)) for a in (0, 8))
    other = Event("Mission", Span("launch", 0, 6))
    schema = Schema.from_dict("EE", {"Launch": "starts", "Mission": "missions"})
    for answer, starts in (
        ("[Launch('Launch'), Launch('Launch')]", [8, 0]),
        ("[Launch('LAUNCH'), Launch('LAUNCH')]", [0, 8]),
        ("[Launch('launch', trigger_nth=1)]", [0]),
    ):
        parsed = parse_answer(answer, schema, text, given=(other, lower, upper))
        assert [event.trigger.start for event in parsed.records] == starts
        assert parsed.problems == () and all(e.label == "Launch" for e in parsed.records)
    parsed = parse_answer("[Launch()]", schema, text, given=(lower,))
    assert (parsed.records, kinds(parsed)) == ((), ["missing_slot"])
    twice = [Event("Launch", Span("a", i, i + 1)) for i in (1, 0)]
    parsed = parse_answer("[Launch('a'), Launch('a')]", schema, "aa", given=twice)
    assert [event.trigger.start for event in parsed.records] == [0, 1]
    unplaced = Event("Launch", Span("launch"))
    parsed = parse_answer("[Launch('launch')] * 2", schema, text, given=(unplaced, lower))
    assert parsed.records[0].trigger is lower.trigger
    parsed = parse_answer(f"[Launch({'x' * 200!r})]", schema, text, given=(lower,))
    assert parsed.problems[0].message == (
        f"No given event `Launch` with trigger {'x' * 80!r} is left; it is left out."
    )


def test_relations_between_repeated_words_take_the_next_pair():
    again = "carries('Ariane 5', 'Rosetta')"
    parsed = parse(f"[{again}, {again}, {again}, {again}]")
    assert [r.head.start for r in parsed.records] == [0, 20, TEXT.rindex("Ariane 5")]
    assert kinds(parsed) == ["repeated"]
    numbered = "carries('Ariane 5', 'Rosetta', head_nth=1, tail_nth=1)"
    parsed = parse(f"[{again}, {numbered}]")
    assert [r.head.start for r in parsed.records] == [0]
    assert parsed.problems[0].message.startswith("An earlier record says the same")


def test_what_is_no_number_leaves_the_default():
    parsed = parse("[Launcher('Ariane 5'), Launcher('Ariane 5', span_nth='x')]")
    assert spans(parsed) == [ARIANE, ("Launcher", "Ariane 5", 20)]


def test_a_given_event_without_a_place_takes_arguments_in_the_order_of_the_text():
    given = (Event("Launch", Span("lift-off")),)
    parsed = parse("[Launch('lift-off', Vehicle=['Ariane 5', 'Ariane 5'])]", given=given)
    assert [a.span.start for a in parsed.records[0].arguments] == [0, 20]


def test_relations_with_one_side_only():
    for answer in ("[carries('Ariane 5')]", "[carries(tail='Apollo')]"):
        assert (parse(answer).records, kinds(parse(answer))) == ((), ["missing_slot"])
    for answer, head, tail in (
        ("[carries('Falcon 9', 'Apollo')]", None, TEXT.index("Apollo")),
        ("[carries('Falcon 9', 'Ariane 5', tail_nth=2)]", None, 20),
        ("[carries('Ariane 5', 'Sputnik', head_nth=2)]", 20, None),
        ("[carries('Falcon 9', 'Sputnik')]", None, None),
    ):
        assert parse(answer).records == ()
        (relation,) = parse(answer, keep_not_found=True).records
        assert (relation.head.start, relation.tail.start) == (head, tail)
        assert relation.head.text in answer and relation.tail.text in answer


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("[Rocket('x')]", "The schema has no class `Rocket`; the record is left out."),
        ("[Mission('Apollo'), Mission('Apollo', span_nth=1)]",
         "An earlier record says the same; this one is left out."),
        ("[Mission('Apollo'), Mission('Apollo')]",
         "The text does not have these words once more; this one is left out."),
        ("[Launch('carried', Launch_Site=['Kourou', 'Kourou'])]",
         "The text does not have these words once more; the argument is left out."),
        ("[Mission('Apollo', 'x')]", "The class has 1 slots; 2 are filled."),
        ("[Mission('Apollo', x='x')]", "The class has no slot `x`; the slot is left out."),
        (f"[Mission(['Apollo', {'1' * 90}])]",
         f"Slot `span` is filled with `{'1' * 80}`, which is no words."),
        ("[Mission('Apollo', span_nth='1')]",
         "The occurrence of `span` is no number from 1 on."),
        ("[Mission()]", "`span` is not filled; the record is left out."),
        ("[Mission(['Apollo', 'x'])]",
         "`span` takes one mention and has 2; the record is left out."),
        ("[Mission('Apollo', span_nth=7)]",
         "The text has no occurrence 7 of `span`; the default is taken."),
        (f"[Mission('{'x' * 90}')]",
         f"The text does not have '{'x' * 80}'; the record is left out."),
        ("[Launch('carried', Vehicle='Apollo', Vehicle_nth=9)]",
         "The text has no occurrence 9 of `Vehicle`; the default is taken."),
        ("[Launch('carried', Vehicle='Mars')]",
         "The text does not have 'Mars'; the argument is left out."),
        ("[Launch('carried', Vehicle='Apollo', Vehicle_nth=[1, 2])]",
         "`Vehicle` has 1 mentions, 2 occurrences."),
    ],
)  # fmt: skip
def test_a_problem_says_what_is_wrong(answer, message):
    assert [problem.message for problem in parse(answer).problems] == [message]


@pytest.mark.parametrize(
    ("answer", "problems"),
    [
        ("", [("truncated", "The answer has no list.", "")]),
        ("[", [("truncated", "The list is not closed.", "[")]),
        (" [ [", [("truncated", "The list is not closed.", "[ [")]),
        ("[[]", [("truncated", "The list is not closed.", "[[]")]),
        ("[Mission('Apollo')", [("truncated", "The list is not closed.", "")]),
        ("Mission('Apollo')", [("truncated", "The list is not closed.", "")]),
        (
            "[Mission('Apollo'",
            [("truncated", "The answer ends inside this record; it is left out.",
              "Mission('Apollo'")],
        ),
        (
            "Sorry. \n[Mission('Apollo')] ",
            [("extra_text", "These words belong to no record.", "Sorry. \n[")],
        ),
        (
            "[5]",
            [("extra_text", "These words belong to no record.", "5]"),
             ("truncated", "The answer has no list.", "")],
        ),
        ("[] the end  ", [("extra_text", "These words belong to no record.", "the end")]),
        (
            "[Mission('Apollo' x), Launcher('Ariane 5')]",
            [("malformed", "This is no well-formed record; it is left out.",
              "Mission('Apollo' x),")],
        ),
        (
            "[Rocket ('x')]",
            [("extra_text", "These words belong to no record.", "Rocket ('x')]"),
             ("truncated", "The answer has no list.", "")],
        ),
        ("[Mission ('Apollo')]", []),
        ("[Mission('' 'Apollo')]", []),
        *(
            (f"[{call}]",
             [("malformed", "This is no well-formed record; it is left out.", f"{call}]")])
            for call in ("Mission(= 'Apollo')", "Mission('Apollo']", "Mission(span=)")
        ),
        (
            "[Mission('\\N{NO SUCH NAME}')]",
            [("malformed", "This is no well-formed record; it is left out.",
              "Mission('\\N{NO SUCH NAME}')")],
        ),
        *(
            (f"[{call}",
             [("truncated", "The answer ends inside this record; it is left out.", call)])
            for call in ("Mission('Apo", "Mission(['Apo", "Mission('Ap' 'ollo")
        ),
        (
            "So [Mission('Apo",
            [("extra_text", "These words belong to no record.", "So ["),
             ("truncated", "The answer ends inside this record; it is left out.",
              "Mission('Apo")],
        ),
        (
            "So [Mission('Apollo' x)]",
            [("extra_text", "These words belong to no record.", "So ["),
             ("malformed", "This is no well-formed record; it is left out.",
              "Mission('Apollo' x)]")],
        ),
    ],
)  # fmt: skip
def test_a_problem_has_the_words_that_it_is_about(answer, problems):
    found = parse(answer).problems
    assert [(problem.kind, problem.message, problem.source) for problem in found] == problems


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        ("Apo", "truncated"),
        ("xApo", "malformed"),
        ("Apolloq", "malformed"),
        ("Apollo, not Ari", "truncated"),
        ("Apollo\\u00", "truncated"),
        ("\\u00", "truncated"),
        ("Apollo\\n and then much more", "malformed"),
        ("Apollo\\n\\u0", "malformed"),
        ("Apollo\\U0001F680x", "malformed"),
    ],
)
def test_a_string_at_the_end_is_cut_off_if_the_text_goes_on_so(words, kind):
    (problem,) = parse(f'[Mission("{words}').problems
    assert (problem.kind, problem.source) == (kind, f'Mission("{words}')


@pytest.mark.parametrize("words", ["a\\d", "a\0b", "a\nb", "a\ud800", "\\"])
def test_what_python_takes_for_no_character_stands_for_itself(words):
    text = f"see {words} here"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parsed = parse(f'[Mission("""{words} """)]', text)
    assert [record.span.text for record in parsed.records] == [text[4 : 5 + len(words)]]


def nested(depth):
    return "Mission(" + "[" * depth + "'Apollo'" + "]" * depth + ")"


@pytest.mark.parametrize(
    ("call", "kinds_"),
    [
        (nested(7), ["bad_value", "missing_slot"]),
        (nested(8), ["malformed"]),
        (f"Mission('Apollo', span_nth={'1' * 100})", ["bad_occurrence"]),
        (f"Mission('Apollo', span_nth={'1' * 101})", ["malformed"]),
        (f"Launch('flew',Vehicle=[{'None,' * 4_996}])", []),
        (f"Launch('flew', Vehicle=[{'None,' * 4_996}])", []),
        (f"Launch('flew', Vehicle=[{'None,' * 4_996}] )", ["malformed"]),
    ],
)
def test_a_record_has_at_most_so_many_brackets_digits_and_tokens(call, kinds_):
    assert kinds(parse(f"[{call}]")) == kinds_


@pytest.mark.parametrize("failures", [4, 5])
def test_a_disturbed_parse_is_tried_five_times(monkeypatch, failures):
    parse_, left = ast.parse, [SystemError] * failures

    def disturbed(*args, **kwargs):
        if left:
            raise left.pop()
        return parse_(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(calls.ast, "parse", disturbed)
        try:
            found = calls.expression("7")
        except SystemError:
            found = None
    assert isinstance(found, ast.Constant) == (failures == 4) and not left


def test_masked_names():
    names = Names.masked(SCHEMA)
    assert spans(parse("[LABEL_1('Ariane 5'), Launcher('Ariane 5')]", names=names)) == [ARIANE]


def random_text(rng):
    pieces = [
        "Ariane 5",
        "Rosetta",
        "Launcher(span='Apollo')",
        '"',
        "'",
        "\\",
        "\n",
        "\r\n",
        "]",
        "result = [",
        "é",
        "🚀",
    ]
    pieces += [
        "Apollo",
        "\0",
        "\ud83d",
        "שלום",
        ", ",
        "(",
        "#",
        '[Mission(span="Apollo")]',
        "\\n",
        "```",
        "{}",
        "text",
    ]
    return " ".join(rng.choice(pieces) for _ in range(rng.randrange(2, 20)))


def random_records(text, rng):
    def span():
        start = rng.randrange(len(text))
        end = min(len(text), start + rng.randrange(1, 30))
        return Span(text[start:end], start, end)

    records = []
    for _ in range(rng.randrange(6)):
        kind = rng.randrange(3)
        if kind == 0:
            records.append(Entity(rng.choice(["Launcher", "Mission", "creative-work"]), span()))
        elif kind == 1:
            records.append(Relation("carries", span(), span()))
        else:
            roles = [
                rng.choice(["Vehicle", "Launch.Site", "Date"]) for _ in range(rng.randrange(4))
            ]
            arguments = {Argument(role, span()): None for role in roles}
            records.append(Event("Launch", span(), tuple(arguments)))
    return records


@pytest.mark.parametrize("style", ["dataclass", "compact"])
def test_any_records_of_any_text_come_back(style):
    rng = random.Random(5)
    for _ in range(1_500):
        text = random_text(rng)
        records = random_records(text, rng)
        answer = completion_text(records, text, SCHEMA, format=PromptFormat(style))
        parsed = parse(answer, text)
        assert {record_key(r) for r in parsed.records} == {record_key(r) for r in records}, (
            text,
            answer,
        )
        assert parsed.problems == ()


@pytest.mark.parametrize("style", ["dataclass", "compact"])
@pytest.mark.slow
def test_every_prefix_gives_exactly_its_complete_records(style):
    rng = random.Random(6)
    prefixes = 0
    for _ in range(60):
        text = random_text(rng)
        answer = completion_text(
            random_records(text, rng), text, SCHEMA, format=PromptFormat(style)
        )
        whole = parse(answer, text)
        for cut in range(len(answer)):
            parsed = parse(answer[:cut], text)
            complete = sum(end <= cut for _, end in whole.sources)
            keys = [record_key(record) for record in parsed.records]
            assert keys == [record_key(record) for record in whole.records[:complete]], (
                text,
                answer[:cut],
            )
            assert not parsed.well_formed
            prefixes += 1
    assert prefixes > 3_000


def test_an_escape_may_be_cut_off_as_well():
    text = "see Launcher(span='Apollo') \ud83d and \n\\ Apollo"
    answer = completion_text([Entity("Mission", Span(text, 0, len(text)))], text, SCHEMA)
    for cut in range(len(answer) - 2):
        assert parse(answer[:cut], text).records == ()
    assert len(parse(answer[:-1], text).records) == 1


N = 20_000
HOSTILE = {
    "brackets": "[" * 100_000,
    "calls in calls": "Launcher(" * N,
    "nested values": "Launcher(span=" + "[" * 100_000 + "]" * 100_000 + ")",
    "strings that never end": 'nothing("' + "nothing('" * N,
    "unterminated": 'Mission("' * N,
    "alternating quotes": ("Mission('" + 'Mission("') * N,
    "long string": '[Mission(span="' + "x" * 1_000_000 + '")]',
    "backslashes": '[Mission(span="' + "\\" * 999_999,
    "bad escapes": '[Mission(span="\\N{NO SUCH NAME}\\xZZ\\u12 \\U00110000 \\777 \\d")]' * 5_000,
    "quotes": '"' * 1_000_000,
    "NUL": '[Mission(span="Ap\0ollo")]\0',
    "surrogate": '[Mission(span="\ud800")]',
    "huge hexadecimal": "[Mission(span=0x" + "f" * 3600 + ")]",
    "huge hexadecimal occurrence": "[Mission(span='Apollo', span_nth=0x" + "f" * 3600 + ")]",
    "huge octal and binary": "[Mission(0o" + "7" * 9000 + "), Mission(0b" + "1" * 90_000 + ")]",
    "a long mention of other words": "[Mission('" + "\ufdfa" * 20_000_000 + "')]",
    "huge number": "[Mission(span='Apollo', span_nth=" + "9" * 500_000 + ")]",
    "many values": "[Launch('flew', Vehicle=[" + "'Apollo'," * N + "])]",
    "many records": "[" + "Mission('Apollo')," * N,
    "many unknown": "Nothing('Apollo')," * N,
    "prose": "Mission ( of the " * N,
    "spaces": "Mission" + " " * 500_000 + "(",
    "names": "M" * 1_000_000,
    "comments": "Mission(#" * N,
    "triple quotes": 'Mission("""' * N,
    "lists": "[] " * N,
    "closing": "]" * 500_000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_answers(name):
    answer = HOSTILE[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parsed = parse(answer)
    assert {record_key(record) for record in parsed.records} <= {
        ("entity", "Mission", (APOLLO[2], APOLLO[2] + 6)),
        ("event", "Launch", (9, 13), frozenset({("Vehicle", (APOLLO[2], APOLLO[2] + 6))})),
    }
    assert parsed.raw == answer
    assert all(problem.kind in PROBLEM_KINDS for problem in parsed.problems)


@pytest.mark.parametrize(
    "name", ["calls in calls", "unterminated", "alternating quotes", "many records", "spaces"]
)
@pytest.mark.slow
def test_time_is_linear(name):
    answer = HOSTILE[name]

    def seconds(part):
        start = time.process_time()
        parse(part)
        return time.process_time() - start

    short = min(seconds(answer[: len(answer) // 4]) for _ in range(2))
    # Four times the length: 4 if linear, 16 if quadratic.
    assert seconds(answer) < 9 * short + 0.5


def test_many_distinct_mentions_of_a_long_text_are_bounded_and_say_so(monkeypatch):
    text = " ".join(f"n{i}" for i in range(6_000))
    answer = "[" + ",".join(f"Mission('n{i} n{i + 1}')" for i in range(0, 5_998, 2)) + "]"
    assert len(parse(answer, text).records) == 2_999
    monkeypatch.setattr(alignment, "_SCAN_BUDGET", 0)
    monkeypatch.setattr(alignment, "_SCANS", 100)
    parsed = parse(f"{answer[:-1]}, Mission('{'x' * 90}')]", text)
    assert len(parsed.records) == 101 and kinds(parsed) == ["not_in_text"] * (3_000 - 101)
    assert parsed.problems[-1].message == (
        f"{'x' * 80!r} was not looked for after so many others in so long a text; the record is "
        "left out."
    )
    assert "was not looked for after so many others in so long a text" in parsed.problems[0].message


def test_nothing_is_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "os_spy", None)
    for code in (
        "open('made', 'w')",
        "__import__('pathlib').Path('made').touch()",
        'exec(\'open("made", "w")\')',
    ):
        parse(f"[Launcher(span={code}), {code}, Launcher(span=f'{{{code}}}')]")
    assert list(tmp_path.iterdir()) == []


def test_random_garbage_never_raises():
    rng = random.Random(7)
    alphabet = [
        "Launcher",
        "Mission(",
        "span=",
        "'",
        '"',
        "Apollo",
        "(",
        ")",
        "[",
        "]",
        ",",
        "\\",
        "\n",
        "#",
        "=",
        " ",
        "5",
    ]
    for _ in range(3_000):
        parsed = parse("".join(rng.choice(alphabet) for _ in range(rng.randrange(40))))
        assert all(isinstance(problem, Problem) for problem in parsed.problems)


def test_answers_are_read_while_other_code_parses():
    """Python 3.11 fails when one parse runs inside another, here from a garbage collection."""
    answer = f"[Mission('Apollo', {', '.join(['launchers=[]'] * 200)})]"
    alone = parse(answer)
    collections = 0

    def other_code(*_):
        nonlocal collections
        collections += 1
        if collections == moment:
            ast.parse("0")

    threshold = gc.get_threshold()
    gc.callbacks.append(other_code)
    gc.set_threshold(1)
    try:
        for moment in range(1, 60):
            collections = 0
            assert parse(answer) == alone
            assert collections > moment
    finally:
        gc.set_threshold(*threshold)
        gc.callbacks.remove(other_code)


def test_a_problem_has_a_known_kind_and_is_json():
    with pytest.raises(
        ValueError, match=r"`oops` is no kind of problem. The kinds are: `malformed`"
    ):
        Problem("oops", "", "")
    (problem,) = parse("[Rocket('Apollo')]").problems
    assert json.loads(json.dumps(problem.to_dict()))["kind"] == "unknown_label"
    assert problem.message == "The schema has no class `Rocket`; the record is left out."
