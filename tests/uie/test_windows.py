"""Texts cut into windows and records put together again, with the offsets of the whole text."""

import random
import time
from itertools import pairwise

import pytest

from peft_taskmoe.uie.extraction.prompts import prompt_windows
from peft_taskmoe.uie.extraction.windows import Window, merge_windows, split_windows
from peft_taskmoe.uie.parse import parse_answer
from peft_taskmoe.uie.prompt import PromptFormat, build_example, completion_text, prompt_text
from peft_taskmoe.uie.records import Argument, Document, Entity, Event, Relation, Span
from peft_taskmoe.uie.schema import Schema

SCHEMA = Schema.of({"Word": "words", "Pair": {"head": [], "tail": []}, "Act": {"roles": ["Who"]}})
COMPACT = PromptFormat("compact")


def random_text(rng, pieces):
    ends = [
        " ",
        " ",
        ". ",
        "\n",
        "\r\n",
        "\n\n",
        "\u3000",
        "",
        "e\u0301",
        "👨\u200d👩",
        "\0",
        "日本語",
    ]
    return "".join(
        rng.choice(["word", "Ariane", "a", "Überschall"]) + rng.choice(ends) for _ in range(pieces)
    )


def test_windows_cover_the_text_and_fit():
    rng = random.Random(0)
    for _ in range(300):
        text = random_text(rng, rng.randrange(120))
        most, overlap = rng.randrange(4, 120), rng.randrange(40)
        windows = split_windows(text, most, overlap=overlap)
        assert windows[0].start == 0 and windows[-1].end == len(text)
        for window in windows:
            assert window.text == text[window.start : window.end] and len(window.text) <= most
        for before, after in pairwise(windows):
            assert before.start < after.start <= before.end < after.end
            assert text[before.end - 1 : before.end + 1] != "\r\n" or most < 8


def test_short_mentions_are_whole_in_some_window():
    rng = random.Random(1)
    for _ in range(100):
        text = random_text(rng, 100)
        windows = split_windows(text, 80, overlap=20)
        for start in range(len(text) - 20):
            assert any(w.start <= start and start + 20 <= w.end for w in windows)


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("one two three.\n\nfour five six seven", "one two three.\n\n"),
        ("one two three\nfour five six seven", "one two three\n"),
        ("one two. Three four five six seven", "one two. Three four five "),
        ("one two three four. Five six seven", "one two three four. "),
        ("onetwothreefourfivesixseveneight", "onetwothreefourfivesixsev"),
    ],
)
def test_windows_end_where_a_reader_would(text, first):
    assert split_windows(text, 25, overlap=0)[0].text == first


def test_characters_are_not_parted():
    assert [w.text for w in split_windows("aaae\u0301bbb", 4, overlap=0)] == [
        "aaa",
        "e\u0301bb",
        "b",
    ]
    assert [w.text for w in split_windows("aaaa\r\nbb", 5, overlap=0)] == ["aaaa", "\r\nbb"]


def test_a_text_that_fits_is_one_window():
    assert split_windows("", 5) == (Window("", 0, 0),)
    assert split_windows("abc", 3) == (Window("abc", 0, 3),)


def test_windows_share_nothing_where_what_they_share_leaves_no_room():
    found = split_windows("a" * 10 + "Xbb", 10, length=lambda t: len(t) + 7 * t.count("X"))
    assert [(w.text, w.start) for w in found] == [("a" * 10, 0), ("Xbb", 10)]


def test_length_is_asked_seldom_and_never_for_much_more_than_a_window():
    asked = []

    def length(text):
        asked.append(len(text))
        return len(text) // 4

    windows = split_windows("word " * 20_000, 500, length=length)
    assert len(asked) < 25 * len(windows) and max(asked) < 10_000
    assert all(length(window.text) <= 500 for window in windows)


def test_what_cannot_fit_is_an_error():
    with pytest.raises(ValueError, match="Not one character fits into a window of 3"):
        split_windows("abc", 3, length=lambda text: 4 * len(text))
    with pytest.raises(ValueError, match="`overlap` is -1"):
        split_windows("abc", 3, overlap=-1)
    with pytest.raises(
        ValueError, match=r"The prompt has a length of \d+ before any text, and 20 is allowed"
    ):
        prompt_windows("abc", SCHEMA, 20)


@pytest.mark.parametrize("format", [PromptFormat(), COMPACT])
def test_prompts_stay_within_their_budget(format):
    rng = random.Random(2)
    text = random_text(rng, 400)
    found = prompt_windows(text, SCHEMA, 900, format=format, overlap=30)
    assert len(found) > 3
    for part in found:
        assert (
            part.prompt == prompt_text(part.window.text, SCHEMA, format=format)
            and len(part.prompt) <= 900
        )
    assert found[-1].window.end == len(text)


def test_a_long_document_comes_back_whole():
    rng = random.Random(3)
    for _ in range(20):
        text = random_text(rng, 300)
        starts = sorted(rng.sample(range(len(text) - 20), 40))
        gold = {
            Entity("Word", Span(text[s : s + k], s, s + k))
            for s in starts
            if (k := rng.randrange(1, 12))
        }
        parts = []
        for part in prompt_windows(text, SCHEMA, 400, format=COMPACT, overlap=30):
            window = part.window
            inside = [
                Entity(
                    "Word",
                    Span(r.span.text, r.span.start - window.start, r.span.end - window.start),
                )
                for r in gold
                if window.start <= r.span.start and r.span.end <= window.end
            ]
            answer = completion_text(inside, window.text, SCHEMA, format=COMPACT)
            parts.append((window, parse_answer(answer, SCHEMA, window.text).records))
        merged = merge_windows(parts)
        lost = gold - set(merged)
        # Only what an edge cuts short, inside a longer mention, is left out.
        assert all(
            any(
                o != r and o.span.start <= r.span.start and r.span.end <= o.span.end for o in merged
            )
            for r in lost
        )
        assert set(merged) <= gold and list(merged) == sorted(merged, key=lambda r: r.span.start)


def test_events_of_two_windows_are_one():
    first, second = Window("Ann met", 0, 7), Window("met Bob", 4, 11)
    ann, bob = Argument("Who", Span("Ann", 0, 3)), Argument("Who", Span("Bob", 4, 7))
    merged = merge_windows(
        [
            (
                first,
                [Event("Act", Span("met", 4, 7), (ann,)), Relation("Pair", ann.span, ann.span)],
            ),
            (second, [Event("Act", Span("met", 0, 3), (bob,)), Event("Act", Span("Bob", 4, 7))]),
        ]
    )
    assert merged == (
        Relation("Pair", ann.span, ann.span),
        Event("Act", Span("met", 4, 7), (ann, Argument("Who", Span("Bob", 8, 11)))),
        Event("Act", Span("Bob", 8, 11)),
    )


def test_mentions_that_an_edge_cuts_are_left_out():
    whole, cut = Entity("Word", Span("New York", 0, 8)), Entity("Word", Span("New", 7, 10))
    merged = merge_windows(
        [(Window("He saw New", 0, 10), [cut]), (Window("New York", 7, 15), [whole])]
    )
    assert merged == (Entity("Word", Span("New York", 7, 15)),)
    inner = Entity(
        "Word", Span("York", 4, 8)
    )  # not at an edge of its window, so it is a mention of its own
    assert len(merge_windows([(Window("New York.", 0, 9), [whole, inner])])) == 2


def test_mentions_inside_others_at_the_ends_of_a_text_are_kept():
    text = "Bank of England Museum"
    found = [Entity("Org", Span(text, 0, 22)), Entity("Org", Span("Bank of England", 0, 15))]
    found.append(Entity("Org", Span("Museum", 16, 22)))
    assert {*merge_windows([(Window(text, 0, 22), found)])} == {*found}


def test_a_mention_that_one_window_cuts_and_another_has_whole_is_kept():
    cut, whole = Entity("Word", Span("New", 7, 10)), Entity("Word", Span("New York", 0, 8))
    inner = Entity("Word", Span("New", 0, 3))
    windows = [(Window("He saw New", 0, 10), [cut]), (Window("New York", 7, 15), [whole, inner])]
    assert [one.span.end for one in merge_windows(windows)] == [10, 15]


def test_events_of_one_answer_with_the_same_trigger_stay_apart():
    def attack(who, start, of="Who"):
        return Event("Act", Span("hit", 4, 7), (Argument(of, Span(who, start, start + 3)),))

    ann, bob = attack("Ann", 0), attack("Bob", 8)
    whole, text = Window("Ann hit Bob", 0, 11), "Ann hit Bob and Cyd"
    assert merge_windows([(whole, [ann, bob])]) == (ann, bob)
    # The event of another window is the one that it shares arguments with.
    more = Event("Act", ann.trigger, (*bob.arguments, *attack("Cyd", 16, "Whom").arguments))
    assert merge_windows([(whole, [ann, bob]), (Window(text, 0, 19), [more])]) == (ann, more)
    assert set(merge_windows([(whole, [ann, bob]), (Window(text, 0, 19), [bob, ann])])) == {
        ann,
        bob,
    }


def test_merging_is_linear_and_agrees_with_its_definition():
    rng = random.Random(4)
    for _ in range(200):
        found = []
        for start in range(0, 30, 10):
            spans = {(a, a + rng.randrange(1, 12)) for a in rng.choices(range(0, 15), k=6)}
            inside = [
                Entity(rng.choice("XY"), Span("x" * (b - a), a, b)) for a, b in spans if b < 16
            ]
            found.append((Window("x" * 15, start, start + 15), inside))
        places = {
            (w, (r.label, r.span.start + w.start, r.span.end + w.start))
            for w, rs in found
            for r in rs
        }
        longer = {place for _, place in places}

        def cuts(window, place, longer=longer):
            covering = [
                one
                for one in longer
                if one[0] == place[0] and one[1] <= place[1] and place[2] <= one[2]
            ]
            return (place[1] == window.start and any(o[1] < window.start for o in covering)) or (
                place[2] == window.end and any(o[2] > window.end for o in covering)
            )

        whole = {place for window, place in places if not cuts(window, place)}
        kept = {(r.label, r.span.start, r.span.end) for r in merge_windows(found)}
        assert kept == whole
    many = [
        (
            Window("x" * 20, 10 * i, 10 * i + 20),
            [Entity("X", Span("x" * 9, 0, 9)), Entity("X", Span("x", 19, 20))],
        )
        for i in range(8_000)
    ]  # fmt: skip
    start = time.process_time()
    assert len(merge_windows(many)) > 8_000
    assert time.process_time() - start < 4  # 23 s where every pair is looked at


def test_each_given_event_is_asked_about_once():
    text = "word " * 200 + "flew " + "word " * 200 + "flew"
    at = [text.index("flew"), text.rindex("flew")]
    given = [Event("Act", Span("flew", start, start + 4)) for start in at]
    parts = prompt_windows(text, SCHEMA, 500, given=given, format=COMPACT)
    assert len(parts) == 2
    for part, start in zip(parts, at, strict=True):
        (event,) = part.given
        assert part.window.start + event.trigger.start == start and len(part.prompt) <= 500
        assert 'given = [Act("flew")]' in part.prompt


def test_equal_given_events_are_asked_about_as_in_training():
    text = "Ann and Bob flew."
    records = [
        Event("Act", Span("flew", 12, 16), (Argument("who", Span(who, at, at + 3)),))
        for who, at in (("Ann", 0), ("Bob", 8))
    ]
    schema = Schema.from_dict("EE", {"Act": {"roles": ["who"]}})
    document = Document("1", text, "EAE", schema, tuple(records))
    example = build_example(document)
    (part,) = prompt_windows(text, schema, 5000, given=document.given)
    assert part.prompt == example.prompt
    parsed = parse_answer(example.completion, schema, text, given=part.given)
    assert (list(parsed.records), parsed.problems) == (records, ())


def test_a_trigger_longer_than_the_overlap_gets_a_window_of_its_own():
    text = "word " * 60 + "e\u0301" * 150 + " word" * 60 + "\r\n" * 40
    start, end = 260, 420  # no regular window has it whole
    given = [Event("Act", Span(text[start:end], start, end)), Event("Act", Span("word", 0, 4))]
    first, own = prompt_windows(text, SCHEMA, 650, given=given, format=COMPACT, overlap=10)
    assert [event.trigger.text for event in first.given] == ["word"]
    (event,) = own.given
    window = own.window
    assert window.text == text[window.start : window.end] and len(own.prompt) <= 650
    assert (window.start + event.trigger.start, window.start + event.trigger.end) == (start, end)
    assert window.text[event.trigger.start : event.trigger.end] == text[start:end]
    assert window.start < start and end < window.end  # with as much around it as fits
    assert len(own.prompt) > 600


@pytest.mark.slow
def test_prompts_with_numbered_triggers_fit():
    text = "flew " * 400
    given = [Event("Act", Span("flew", at, at + 4)) for at in range(500, 600, 5)]
    for most in range(700, 760, 3):
        parts = prompt_windows(text, SCHEMA, most, given=given, format=COMPACT)
        assert all(len(part.prompt) <= most for part in parts)
        found = [part.window.start + event.trigger.start for part in parts for event in part.given]
        assert sorted(found) == list(range(500, 600, 5))


def test_a_given_event_without_a_place_is_asked_about_at_its_first():
    text = "word " * 100 + "flew " + "word " * 100 + "flew"
    given = [Event("Act", Span("flew"))]
    (part,) = prompt_windows(text, SCHEMA, 500, given=given, format=COMPACT)
    assert part.window.start <= 500 < part.window.end < 900


def test_a_trigger_among_characters_that_take_more_room_is_asked_about_alone():
    text, given = "\0" * 5 + "a" + "\0" * 5, [Event("Act", Span("a", 5, 6))]
    most = len(prompt_text("a", SCHEMA, given=[Event("Act", Span("a", 0, 1))], format=COMPACT))
    (part,) = prompt_windows(text, SCHEMA, most, given=given, format=COMPACT)
    assert part.window == Window("a", 5, 6)


def test_a_window_of_a_triggers_own_begins_and_ends_with_whole_characters():
    text, start, end = "e\u0301" * 150 + "x" * 160 + "e\u0301" * 150, 300, 460
    given = [Event("Act", Span("x" * 160, start, end))]
    for most in range(650, 658):
        (part,) = prompt_windows(text, SCHEMA, most, given=given, format=COMPACT, overlap=10)
        inside = part.window.text
        assert inside[0] == "e" and inside[-1] == "\u0301" and len(part.prompt) <= most
        assert part.window.start < start and end < part.window.end


def test_given_events_that_no_prompt_can_hold():
    text = "word " * 300
    good = Event("Act", Span("word", 500, 504))
    bad = [
        Event("Act", Span(text[:900], 0, 900)),
        Event("Act", Span("elsewhere")),
        Event("Act", Span("word", 1, 5)),
        Event("Act", Span("word", 5000, 5004)),
    ]
    problems = []
    (part,) = prompt_windows(
        text, SCHEMA, 700, given=[*bad, good], format=COMPACT, problems=problems
    )
    assert part.window.start + part.given[0].trigger.start == 500
    assert [problem.kind for problem in problems] == ["not_asked"] * 4
    assert "Its trigger of 900 characters makes a prompt of" in problems[0].message
    assert "and 700 is allowed" in problems[0].message
    assert "The text has no 'elsewhere'" in problems[1].message
    assert (
        "The text has 'ord ' at 1:5, where the trigger is said to be 'word'" in problems[2].message
    )
    assert "The text has '' at 5000:5004" in problems[3].message
    assert all("`Act`" in problem.message for problem in problems)
    assert prompt_windows(text, SCHEMA, 700, given=bad, format=COMPACT, problems=[]) == ()
    for event in bad:
        with pytest.raises(ValueError, match="The given event `Act` cannot be asked about"):
            prompt_windows(text, SCHEMA, 700, given=[event, good], format=COMPACT)


def test_more_given_events_than_a_prompt_can_hold_are_asked_about_in_several():
    text = " ".join(f"happened{i}" for i in range(120))
    given = [
        Event("Act", Span(word, text.index(word + " "), text.index(word + " ") + len(word)))
        for word in text.split()[:-1]
    ]
    parts = prompt_windows(text, SCHEMA, 900, given=given, format=COMPACT, overlap=20)
    assert all(len(part.prompt) <= 900 for part in parts)
    assert sorted(event.trigger.text for part in parts for event in part.given) == sorted(
        text.split()[:-1]
    )
    assert [part.window.start for part in parts] == sorted(part.window.start for part in parts)
