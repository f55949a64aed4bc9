"""Span alignment: against a brute-force search over all substrings, and the rules by which records
take places.
"""

import random
import unicodedata

import pytest

from peft_taskmoe.uie import alignment
from peft_taskmoe.uie.alignment import Aligner, LongestSpans, TextIndex, normalise, stands_alone

# Pieces that are awkward alone or next to each other: case that changes length, marks composed and
# not, ligatures,
# emoji with joiners and selectors, line ends, quotes, kana with and without voicing, Hangul, an
# Indic cluster.
PIECES = [
    "a", "b", "A", "ß", "SS", "ss", "İ", "i", "ﬁ", "fi", "é", "e", "\u0301", "e\u0301", "Å", "Å",
    " ", "  ", "\r\n",
    "\n", "\t", "\u00a0", ".", ",", "'", "’", '"', "”", "-", "–", "が", "か", "\u3099", "각", "가",
    "ᆨ", "क", "\u093c",
    "👩", "👨\u200d👩", "❤", "\ufe0f", "\u200b", "\u0327", "½", "…", "ς", "σ", "١",
    "\0", "\ud800", "_",
]  # fmt: skip


def slow_normal_form(words):
    """The definition of the normal form, in passes over the whole string."""
    plain = (
        dict.fromkeys("‘’‚‛′`´", "'")
        | dict.fromkeys("“”„‟″«»", '"')
        | dict.fromkeys("‐‑‒–—―−", "-")
    )
    out = []
    for character in words:
        for c in unicodedata.normalize("NFKD", plain.get(character, character)):
            for f in unicodedata.normalize("NFKD", c.casefold()):
                out.append(plain.get(f, f))
    dropped = [
        c
        for c in out
        if unicodedata.combining(c) < 10
        and unicodedata.category(c) != "Cf"
        and not 0xFE00 <= ord(c) <= 0xFE0F
        and not 0xE0100 <= ord(c) <= 0xE01EF
    ]
    runs = "".join(" " if c.isspace() else c for c in dropped).split(" ")
    result = ""
    for run in (run for run in runs if run):
        wordlike = [
            x and (x.isalnum() or unicodedata.category(x).startswith("M"))
            for x in (result[-1:], run[0])
        ]
        result += (" " if all(wordlike) else "") + run
    return result


def brute_force(text, mention):
    """All places of a mention, by trying every substring of the text."""
    places = [
        (i, i + len(mention))
        for i in range(len(text) - len(mention) + 1)
        if text[i : i + len(mention)] == mention
    ]
    if mention and places:
        return "exact", places
    wanted = slow_normal_form(mention)
    forms = {}
    if wanted:
        for start in range(len(text)):
            for end in range(start + 1, len(text) + 1):
                if slow_normal_form(text[start:end]) == wanted:
                    forms.setdefault(start, []).append(end)
    places = []
    for start, ends in forms.items():
        # It begins with a character of the form, and ends with one, and with the marks that belong
        # to that.
        if not slow_normal_form(text[start]) or text[start].isspace():
            continue
        end = min(ends)
        while (
            end < len(text)
            and unicodedata.category(text[end])[0] == "M"
            and not slow_normal_form(text[end])
        ):
            end += 1
        if end < len(text) and unicodedata.category(text[end])[0] == "M":
            continue
        places.append((start, end))
    return ("normalised", places) if places else ("not_found", [])


def variant(words, rng):
    """The same words as somebody else might write them."""
    change = rng.randrange(7)
    if change == 0:
        return words.upper()
    if change == 1:
        return words.casefold()
    if change == 2:
        return unicodedata.normalize("NFKC", words)
    if change == 3:
        return unicodedata.normalize("NFD", words)
    if change == 4:
        return words.replace("\r\n", "\n").replace(" ", "\t")
    if change == 5:
        return words.replace("’", "'").replace("”", '"').replace("–", "-")
    return "".join(c for c in words if not unicodedata.combining(c))


@pytest.mark.slow
def test_agrees_with_brute_force_in_100_000_trials():
    rng = random.Random(20240607)
    statuses = dict.fromkeys(("exact", "normalised", "not_found"), 0)
    trials = 0
    while trials < 100_000:
        text = "".join(rng.choice(PIECES) for _ in range(rng.randrange(1, 7)))
        index = TextIndex(text)
        for _ in range(20):
            trials += 1
            start = rng.randrange(len(text))
            mention = text[start : start + rng.randrange(1, 6)]
            if rng.random() < 0.7:
                mention = variant(mention, rng)
            if rng.random() < 0.2:
                mention += rng.choice(PIECES)
            found = index.occurrences(mention)
            alignment, places = cached_brute_force(text, mention)
            in_order = sorted(places, key=lambda place: (not stands_alone(text, *place), place))
            assert (found.alignment, list(found.places)) == (alignment, in_order), (text, mention)
            statuses[alignment] += 1
    assert min(statuses.values()) > 2_000, statuses  # each outcome was tried, not only the easy one


_CACHE: dict[tuple[str, str], tuple[str, list[tuple[int, int]]]] = {}


def cached_brute_force(text, mention):
    if (text, mention) not in _CACHE:
        _CACHE[text, mention] = brute_force(text, mention)
    return _CACHE[text, mention]


@pytest.mark.parametrize(
    ("text", "mention", "status", "found"),
    [
        ("Ariane 5 flew", "Ariane 5", "exact", "Ariane 5"),
        ("Ariane 5 flew", "ariane 5", "normalised", "Ariane 5"),
        ("die STRASSE da", "Straße", "normalised", "STRASSE"),
        ("die Straße da", "STRASSE", "normalised", "Straße"),
        ("in İstanbul today", "istanbul", "normalised", "İstanbul"),
        ("a cafe\u0301 here", "café", "normalised", "cafe\u0301"),
        ("a café here", "cafe\u0301", "normalised", "café"),
        ("New\r\n  York", "New York", "normalised", "New\r\n  York"),
        ("the so - called “x”", 'so-called "x"', "normalised", "so - called “x”"),
        ("Fred 's dog", "Fred’s", "normalised", "Fred 's"),
        ("I ❤\ufe0f you", "❤", "exact", "❤"),
        ("I ❤\ufe0f you", "i ❤", "normalised", "I ❤\ufe0f"),
        ("office", "ﬀi", "normalised", "ffi"),
        ("ガラス", "カ", "not_found", None),
        ("xﬁ", "FI", "normalised", "ﬁ"),
        ("ﬁsh", "ish", "not_found", None),
        ("ﬁsh; ish", "ISH", "normalised", "ish"),
        ("\ufdfa", "وسلم", "not_found", None),
        ("A\u093c; A", "a", "normalised", "A"),
        ("nothing here", "something", "not_found", None),
        ("nothing here", "", "not_found", None),
        ("nothing here", "\u200b", "not_found", None),
    ],
)
def test_known_cases(text, mention, status, found):
    occurrences = TextIndex(text).occurrences(mention)
    assert occurrences.alignment == status
    assert [text[start:end] for start, end in occurrences.places] == (
        [found] if found is not None else []
    )


def test_occurrences_that_stand_alone_come_first():
    text = "artful art, party art"
    assert TextIndex(text).occurrences("art").places == ((7, 10), (18, 21), (0, 3), (13, 16))
    assert not stands_alone("cafe\u0301", 0, 4)  # the mark belongs to the last letter
    assert stands_alone("日本人", 0, 2)  # no spaces between words: any boundary may be one
    assert not stands_alone("a_b", 0, 1) and not stands_alone("_b", 1, 2)
    assert stands_alone("日本a", 0, 2) and stands_alone("a日本", 1, 3)
    assert stands_alone("in 서울에서", 3, 5) and not stands_alone("서울 artful", 3, 6)


def test_nth_and_number_are_inverse():
    index = TextIndex("aa aaa a")
    places = index.occurrences("a").places
    assert len(places) == 6
    assert [index.number("a", place) for place in places] == [1, 2, 3, 4, 5, 6]
    assert [index.nth("a", number) for number in range(8)] == [None, *places, None]


def test_repeated_mentions_take_their_places_in_order():
    aligner = Aligner(TextIndex("Rome and Rome and Rome"))
    taken = []
    while place := aligner.free_place("City", "Rome"):
        aligner.take("City", place)
        taken.append(place)
    assert taken == [(0, 4), (9, 13), (18, 22)]
    assert aligner.free_place("Team", "Rome") == (0, 4)  # another label counts for itself


def test_a_default_passes_what_a_number_has_taken():
    aligner = Aligner(TextIndex("Rome and Rome"))
    aligner.take("City", (0, 4))
    assert aligner.free_place("City", "Rome") == (9, 13)


@pytest.mark.parametrize(
    ("text", "pairs"),
    [
        ("A killed B. A killed B.", [((0, 1), (9, 10)), ((12, 13), (21, 22))]),
        ("A killed B and B", [((0, 1), (9, 10)), ((0, 1), (15, 16))]),
    ],
)
def test_relations_take_pairs_in_order(text, pairs):
    aligner = Aligner(TextIndex(text))
    taken = []
    while pair := aligner.free_pair("Kill", "A", "B"):
        aligner.take("Kill", pair)
        taken.append(pair)
    assert taken == pairs


def test_a_relation_between_the_same_words_is_between_two_occurrences():
    assert Aligner(TextIndex("x is x")).free_pair("Same", "x", "x") == ((0, 1), (5, 6))
    assert Aligner(TextIndex("x is y")).free_pair("Same", "x", "x") == ((0, 1), (0, 1))
    assert Aligner(TextIndex("x x x")).free_pair("Same", "x", "x", tail_place=(0, 1)) == (
        (2, 3),
        (0, 1),
    )


def test_arguments_are_nearest_to_their_trigger():
    text = "Bob left. Ann met Bob; Bob and Bobby stayed."
    aligner = Aligner(TextIndex(text))
    trigger = (text.index("met"), text.index("met") + 3)
    order = []
    while place := aligner.free_argument("met", "Bob", trigger):
        aligner.take("met", place)
        order.append(place[0])
    assert order == [18, 23, 0, 31]


def test_normal_form_is_idempotent():
    rng = random.Random(1)
    for _ in range(2_000):
        words = "".join(rng.choice(PIECES) for _ in range(rng.randrange(8)))
        assert normalise(normalise(words)) == normalise(words), words
        assert normalise(words) == slow_normal_form(words), words


def in_turn(next_one, take):
    """Everything that is found when each find is taken before the next."""
    found = []
    while (one := next_one()) is not None:
        take(one)
        found.append(one)
    return found


@pytest.mark.parametrize(
    ("text", "trigger", "starts"),
    [
        ("b xx b", (2, 4), [0, 5]),  # equally far: the earlier one
        ("b  xx b", (3, 5), [6, 0]),
        ("b x.b", (2, 4), [4, 0]),  # it touches the trigger
        ("b xx b", (0, 6), [0, 5]),  # both are inside of it
        ("b b b x", (6, 7), [4, 2, 0]),
        ("x b b b", (0, 1), [2, 4, 6]),
        ("b    x ab", (5, 6), [0, 8]),  # words of their own first, however far
        ("bb b b", None, [3, 5, 0, 1]),  # without a place the order of the text, words first
    ],
)
def test_arguments_by_distance(text, trigger, starts):
    aligner = Aligner(TextIndex(text))
    places = in_turn(
        lambda: aligner.free_argument("role", "b", trigger),
        lambda place: aligner.take("role", place),
    )
    assert [start for start, _ in places] == starts


def test_other_words_in_the_same_role_or_relation_are_found_for_themselves():
    aligner = Aligner(TextIndex("Ann met Bob. Eve saw Dan."))
    assert aligner.free_argument("role", "Bob", (4, 7)) == (8, 11)
    assert aligner.free_argument("role", "Ann", (4, 7)) == (0, 3)
    assert aligner.free_pair("Meet", "Ann", "Bob") == ((0, 3), (8, 11))
    assert aligner.free_pair("Meet", "Eve", "Dan") == ((13, 16), (21, 24))
    assert aligner.free_pair("Meet", "Eve", "Sue") is aligner.free_pair("Meet", "Sue", "Eve")
    assert aligner.free_pair("Meet", "Eve", "Sue") is None


@pytest.mark.parametrize(
    ("text", "given", "pairs"),
    [
        ("A B A", {}, [(0, 2), (4, 2)]),  # a side with fewer stays at its last one
        ("A B A", {"head_place": (4, 5)}, [(4, 2)]),
        ("A B B", {"head_place": (0, 1)}, [(0, 2), (0, 4)]),
        ("A A B", {"tail_place": (4, 5)}, [(0, 4), (2, 4)]),
    ],
)
def test_a_side_that_is_given_stays(text, given, pairs):
    aligner = Aligner(TextIndex(text))
    found = in_turn(
        lambda: aligner.free_pair("R", "A", "B", **given), lambda pair: aligner.take("R", pair)
    )
    assert [(head[0], tail[0]) for head, tail in found] == pairs


def test_relations_of_words_with_themselves_end():
    aligner = Aligner(TextIndex("x is x is x"))
    found = in_turn(lambda: aligner.free_pair("R", "x", "x"), lambda pair: aligner.take("R", pair))
    assert [(head[0], tail[0]) for head, tail in found] == [(0, 5), (5, 10)]
    only = Aligner(TextIndex("x is y"))
    assert only.free_pair("R", "x", "x", tail_place=(0, 1)) == ((0, 1), (0, 1))


def test_a_mention_much_longer_than_the_text_is_in_none():
    """A ligature may write one character as several, so a longer mention can be in a text."""
    assert TextIndex("\ufdfa").occurrences("صلى الله عليه وسلم").alignment == "normalised"
    for length, found in ((1_016, "normalised"), (1_017, "not_found")):
        mention = "ab".ljust(length, "\u200b")
        assert TextIndex("ab").occurrences(mention).alignment == found


@pytest.mark.parametrize(
    ("left_out", "kept"),
    [
        ("\u0301", "\u3099"),
        ("\u05b0", "\u093c"),
        ("\u200d", "\u093c"),
        ("\ufe00", "\ufe10"),
        ("\ufe0f", "\u0335"),
        ("\U000e0100", "\U000e01f0"),
        ("\U000e01ef", "\u094d"),
    ],
)
def test_what_is_no_character_of_its_own_is_left_out_of_the_normal_form(left_out, kept):
    assert normalise("a" + left_out) == "a" != normalise("a" + kept)


def test_order_of_spans_of_which_none_is_inside_another():
    spans = LongestSpans()
    spans.add((5, 9))
    assert not spans.covers((5, 9)) and not spans.covers((0, 3)) and not spans.covers((4, 9))
    assert spans.covers((5, 8)) and spans.covers((6, 9)) and not spans.covers((6, 10))
    spans.add((0, 3))
    spans.add((6, 7))  # inside already
    spans.add((5, 12))  # around the first
    spans.add((20, 22))
    spans.add((15, 16))  # before the last
    covered = [(a, b) for a in range(24) for b in range(a + 1, 24) if spans.covers((a, b))]
    longest = ((0, 3), (5, 12), (15, 16), (20, 22))
    expected = [
        (a, b)
        for a in range(24)
        for b in range(a + 1, 24)
        if any(s <= a and b <= e and (s, e) != (a, b) for s, e in longest)
    ]
    assert covered == expected


@pytest.mark.parametrize("plain_scans", [0, 200])
def test_of_a_mention_the_first_places_are_looked_at(monkeypatch, plain_scans):
    """However the text is searched."""
    monkeypatch.setattr(alignment, "_PLAIN_SCANS", plain_scans)
    monkeypatch.setattr(alignment, "MAX_OCCURRENCES", 3)
    assert TextIndex("a b a b a b a b").occurrences("a").places == ((0, 1), (4, 5), (8, 9))


@pytest.mark.parametrize("budget", [102, 118])  # six mentions of one character, nearly seven
def test_places_are_counted_against_a_budget_by_the_length_of_their_mention(monkeypatch, budget):
    monkeypatch.setattr(alignment, "_PLACES_BUDGET", budget)
    monkeypatch.setattr(alignment, "_MOST_BEYOND_BUDGET", 2)
    index = TextIndex("a b " * 20)
    assert [len(index.occurrences(mention).places) for mention in "aba"] == [6, 2, 6]


def test_once_a_text_was_read_so_often_further_mentions_are_not_looked_for(monkeypatch):
    monkeypatch.setattr(alignment, "_SCAN_BUDGET", 3)
    monkeypatch.setattr(alignment, "_SCANS", 2)
    index = TextIndex("abc")  # of nine characters in all, and the last time counts
    found = [index.occurrences(mention) for mention in ("a", "b", "c", "ab", "bc")]
    assert [one.searched for one in found] == [True] * 4 + [False]
    assert (found[4].alignment, found[4].places, found[4].alone) == ("not_found", (), 0)
