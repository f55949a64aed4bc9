"""Scoring, against a brute-force scorer, nervaluate, scipy's bootstrap and figures by hand."""

import io
import json
import math
import random
import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from peft_taskmoe.uie import (
    ScoreReport,
    SeenLabels,
    compare,
    compare_values,
    reliability,
    score,
)
from peft_taskmoe.uie.records import Argument, Document, Entity, Event, Problem, Relation, Span
from peft_taskmoe.uie.schema import Schema
from peft_taskmoe.uie.scoring import bootstrap
from peft_taskmoe.uie.scoring.counts import AnswerCounts, Counts
from peft_taskmoe.uie.scoring.matching import items_of

DATA = Path(__file__).parents[2] / ".." / "shared" / "data" / "uie"
NO_TABLE = SeenLabels({}, {})
refused = partial(pytest.raises, ValueError)
LABELS = {"NER": {"A": "", "B": "", "C": ""}, "RE": {"A": "", "B": ""}}
EVENTS = {"A": {"description": "", "roles": ["x", "y"]}, "B": {"description": "", "roles": ["x"]}}
LABELS |= {"EE": EVENTS, "EAE": EVENTS}


def document(id_, text, task, *records, schema=None):
    return Document(id_, text, task, Schema.from_dict(task, schema or LABELS[task]), records)


def at(text, start, end):
    return Span(text[start:end], start, end)


def answer(*records, problems=()):
    return SimpleNamespace(records=records, problems=[Problem(kind, "", "") for kind in problems])


def one(documents, answers, **options):
    return score({"set": documents}, {"set": answers}, **{"seen": NO_TABLE} | options)


def counts(report, task):
    return next(s for s in report.scores if s.task == task).total()


ANN = document("1", "Ann", "NER", Entity("A", at("Ann", 0, 3)))


def tallied(task, text, gold, predicted, **options):
    """The counts of one document."""
    return counts(one([document("1", text, task, *gold)], {"1": predicted}, **options), task)


def random_record(rng, text, task):
    def span():
        start = rng.randrange(0, len(text) - 1)
        return at(text, start, min(len(text), start + rng.choice([1, 2])))

    if task == "NER":
        return Entity(rng.choice("ABC"), span())
    if task == "RE":
        return Relation(rng.choice("AB"), span(), span())
    label = rng.choice("AB")
    roles = "xy" if label == "A" else "x"
    event = Event(label, span())
    arguments = [Argument(rng.choice(roles), span()) for _ in range(rng.randrange(3))]
    return replace(event, arguments=tuple(arguments))


def random_case(rng, task, n=12):
    """Documents over a two-letter text, so that mentions repeat, and answers near to gold."""
    documents, answers = [], {}
    for i in range(n):
        text = "".join(rng.choice("ab") for _ in range(6))
        gold = [random_record(rng, text, task) for _ in range(rng.randrange(4))]
        predicted = [record for record in gold if rng.random() < 0.6]
        predicted += [random_record(rng, text, task) for _ in range(rng.randrange(3))]
        rng.shuffle(predicted)
        documents.append(document(str(i), text, task, *gold))
        answers[str(i)] = predicted
    return documents, answers


def brute_force(documents, answers, task, match, identification=False):
    """Cross out equal pairs one by one, on lists of items; returns (tp, fp, fn) by label."""

    def rows(records):
        rows = [record.to_dict() for record in records]
        if task == "NER":
            return [[r["label"], r] for r in rows]
        if task == "RE":
            return [[r["relation"], r["head"], r["tail"]] for r in rows]
        if task == "EE":
            return [[r["type"], r["trigger"]] for r in rows]
        return [[r["type"], r["trigger"], a["role"], a] for r in rows for a in r["arguments"]]

    def items(records):
        def shown(row, *keys):
            return [part if isinstance(part, str) else [part[key] for key in keys] for part in row]

        places, found = [], []
        for row in rows(records):
            if identification:
                row = ["", *(part for part in row if isinstance(part, dict))]
            if shown(row, "start", "end") not in places:
                places.append(shown(row, "start", "end"))
                found.append(shown(row, *(["text"] if match == "text" else ["start", "end"])))
        return found

    tally = {}
    for doc in documents:
        left = items(answers[doc.id])
        for item in items(doc.records):
            of_label = tally.setdefault(item[0], [0, 0, 0])
            if item in left:
                left.remove(item)
                of_label[0] += 1
            else:
                of_label[2] += 1
        for item in left:
            tally.setdefault(item[0], [0, 0, 0])[1] += 1
    return tally


@pytest.mark.parametrize("identification", [False, True])
@pytest.mark.parametrize("match", ["text", "offsets"])
@pytest.mark.parametrize(
    ("of_documents", "task"),
    [("NER", "NER"), ("RE", "RE"), ("EE", "EE"), ("EE", "EAE"), ("EAE", "EAE")],
)
def test_agrees_with_brute_force(of_documents, task, match, identification):
    rng = random.Random(7)
    for _ in range(25):
        documents, answers = random_case(rng, of_documents)
        report = one(documents, answers, match=match, identification=identification)
        of_task = next(s for s in report.scores if s.task == task)
        expected = brute_force(documents, answers, task, match, identification)
        assert {k: [c.tp, c.fp, c.fn] for k, c in of_task.by_label().items()} == expected
        total = np.sum(list(expected.values()) or [[0, 0, 0]], axis=0).tolist()
        assert [of_task.total().tp, of_task.total().fp, of_task.total().fn] == total


def test_agrees_with_nervaluate_strict():
    nervaluate = pytest.importorskip("nervaluate")
    rng = random.Random(11)

    def disjoint(records):  # nervaluate works on sets of disjoint spans with inclusive ends
        kept = []
        for r in records:
            if all(r.span.end <= k.span.start or k.span.end <= r.span.start for k in kept):
                kept.append(r)
        return kept

    def theirs(documents, answers, label=None):
        def plain(r):
            return {"label": label or r.label, "start": r.span.start, "end": r.span.end - 1}

        both = [d.records for d in documents], [answers[d.id] for d in documents]
        spans = [[[plain(r) for r in records] for records in of] for of in both]
        return nervaluate.Evaluator(*spans, tags=list("ABC"), loader="dict").evaluate()

    for _ in range(20):
        documents, answers = random_case(rng, "NER")
        documents = [replace(d, records=tuple(disjoint(d.records))) for d in documents]
        answers = {id_: disjoint(records) for id_, records in answers.items()}
        report = one(documents, answers, match="offsets")
        total = counts(report, "NER")
        found = counts(one(documents, answers, match="offsets", identification=True), "NER")
        strict = theirs(documents, answers)
        assert strict["overall"]["strict"].correct == total.tp > 0
        for ours, of in ((total, strict), (found, theirs(documents, answers, "A"))):
            of = of["overall"]["strict"]
            expected = pytest.approx((ours.precision, ours.recall, ours.f1))
            assert (of.precision, of.recall, of.f1) == expected
        for label, ours in report.scores[0].by_label().items():
            expected = pytest.approx(ours.f1 if ours.tp else 0)
            assert strict["entities"][label]["strict"].f1 == expected


NAMES = "Ann met Bob and Ann."
A1, BOB, A2 = at(NAMES, 0, 3), at(NAMES, 8, 11), at(NAMES, 16, 19)


def test_figures_by_hand():
    gold = document("1", NAMES, "NER", Entity("A", A1), Entity("A", A2), Entity("B", BOB))
    report = one([gold], {"1": [Entity("A", A1), Entity("A", BOB)]})
    total = counts(report, "NER")
    assert total == Counts(tp=1, fp=1, fn=2)
    assert (total.precision, total.recall, total.f1, total.support) == (1 / 2, 1 / 3, 2 / 5, 3)
    assert report.scores[0].by_label() == {"A": Counts(1, 1, 1), "B": Counts(0, 0, 1)}


def test_identification_ignores_what_things_are_called():
    gold = document("1", NAMES, "NER", Entity("A", A1), Entity("B", BOB))
    answers = {"1": [Entity("B", A1), Entity("A", BOB), Entity("C", BOB)]}
    assert counts(one([gold], answers), "NER") == Counts(0, 3, 2)
    table = SeenLabels({"set": {"A": "why"}}, {"set": ("B",)})
    report = one([gold], answers, identification=True, seen=table)
    assert counts(report, "NER") == Counts(2, 0, 0)  # a place with two labels is found once
    assert report.scores[0].labels == ("",) and report.scores[0].seen is None
    assert report.select(["set"]).identification
    assert ScoreReport.from_dict(json.loads(report.to_json(documents=True))).identification
    assert "F1 of identification" in report.tables()[0].title

    met = at(NAMES, 4, 7)
    gold_event = Event("A", met, (Argument("x", A1),))
    other = Event("B", met, (Argument("y", A1), Argument("y", BOB)))
    events = one([document("1", NAMES, "EE", gold_event)], {"1": [other]}, identification=True)
    assert counts(events, "EE") == Counts(1, 0, 0) and counts(events, "EAE") == Counts(1, 1, 0)
    assert not events.scores[1].roles
    with refused(match=r"Only one report is of identification, without labels\. Score both"):
        compare(report, one([gold], answers))


def test_items_have_their_label_unless_it_is_left_out():
    assert items_of(ANN.records, "NER", "text", "1") == {("A", "Ann"): 1}
    assert items_of(ANN.records, "NER", "offsets", "1", identification=True) == {("", (0, 3)): 1}


def test_a_repeated_mention_has_to_be_found_as_often():
    text = "Ann, Ann"
    both = first, second = Entity("A", at(text, 0, 3)), Entity("A", at(text, 5, 8))
    found = partial(tallied, "NER", text)
    assert found(both, [first]) == Counts(1, 0, 1)
    assert found([first], both) == Counts(1, 1, 0)
    # the same place twice is no second mention; without offsets, every one counts
    assert found([first, first], [first] * 3) == Counts(1, 0, 0)
    assert found(both, [Entity("A", Span("Ann"))] * 3) == Counts(2, 1, 0)
    # the second mention in place of the first: right by text, wrong by offsets
    assert found([first], [second]) == Counts(1, 0, 0)
    assert found([first], [second], match="offsets") == Counts(0, 1, 1)


def test_relations_have_a_direction_and_no_types():
    ann, bob = at("Ann Bob", 0, 3), at("Ann Bob", 4, 7)
    gold = [Relation("A", ann, bob, "Person", "Person")]
    assert tallied("RE", "Ann Bob", gold, [Relation("A", ann, bob)]) == Counts(1, 0, 0)
    assert tallied("RE", "Ann Bob", gold, [Relation("A", bob, ann)]) == Counts(0, 1, 1)


def test_arguments_count_inside_matched_events_only():
    text = "hit struck Ann Bob"
    hit, struck = at(text, 0, 3), at(text, 4, 10)
    ann, bob = Argument("x", at(text, 11, 14)), Argument("y", at(text, 15, 18))
    gold = [document("1", text, "EE", Event("A", hit, (ann, bob)))]

    def found(*event):
        report = one(gold, {"1": [Event("A", *event)]})
        return counts(report, "EE"), counts(report, "EAE")

    assert found(hit, (ann,)) == (Counts(1, 0, 0), Counts(1, 0, 1))
    assert found(struck, (ann, bob)) == (Counts(0, 1, 1), Counts(0, 2, 2))
    assert found(hit, (Argument("y", ann.span),)) == (Counts(1, 0, 0), Counts(0, 1, 2))
    given = [document("1", text, "EAE", *gold[0].records)]
    assert [s.task for s in one(given, {"1": gold[0].records}).scores] == ["EAE"]


def test_roles_are_counted_by_themselves():
    text = "hit struck Ann Bob"
    ann, bob = at(text, 11, 14), at(text, 15, 18)
    both = Event("A", at(text, 0, 3), (Argument("x", ann), Argument("y", bob)))
    gold = [
        document("1", text, "EE", both),
        document("2", text, "EE", Event("B", at(text, 4, 10), (Argument("x", bob),))),
    ]
    answers = {
        "1": [Event("A", at(text, 0, 3), (Argument("x", ann), Argument("y", ann)))],
        "2": [Event("B", at(text, 0, 3), (Argument("x", bob),))],
    }
    report = one(gold, answers)
    ee, eae = report.scores
    assert eae.roles == {"x": Counts(1, 1, 1), "y": Counts(0, 1, 1)} and ee.roles == {}
    assert eae.by_label() == {"A": Counts(1, 1, 1), "B": Counts(0, 1, 1)}
    assert "| EAE | set | role x |  | 2 | 50.0 | 50.0 | 50.0 |" in report.to_markdown(labels=True)
    again = ScoreReport.from_dict(json.loads(report.to_json(documents=True)))
    assert again.scores[1].roles == eae.roles


@pytest.mark.parametrize("match", ["text", "offsets"])
def test_roles_add_up_to_the_same_as_labels(match):
    rng = random.Random(8)
    for _ in range(20):
        (_, eae) = one(*random_case(rng, "EE"), match=match).scores
        sums = np.array([[c.tp, c.fp, c.fn] for c in eae.roles.values()]).sum(axis=0)
        assert tuple(sums) == (eae.total().tp, eae.total().fp, eae.total().fn)


def test_several_tasks_in_one_document_are_scored_each():
    text = "Ann hit Bob"
    ann, hit, bob = at(text, 0, 3), at(text, 4, 7), at(text, 8, 11)
    events = {"E": {"description": "", "roles": ["x"]}}
    schema = {"entities": {"P": ""}, "relations": {"R": ""}, "events": events}
    records = Entity("P", ann), Relation("R", ann, bob), Event("E", hit, (Argument("x", bob),))
    report = one([document("1", text, "UIE", *records, schema=schema)], {"1": records[1:]})
    assert {s.task: s.total() for s in report.scores} == {
        "NER": Counts(0, 0, 1),
        **dict.fromkeys(("RE", "EE", "EAE"), Counts(1, 0, 0)),
    }


@pytest.mark.parametrize("confidence", [0, 0.0, 0.5, 1, 1.0, None])
def test_a_confidence_is_a_number_from_0_to_1(confidence):
    assert one([ANN], {"1": [Entity("A", at("Ann", 0, 3), confidence)]}).scores[0].total().tp == 1


def test_a_mention_is_its_place_or_its_text_however_it_was_found():
    gold, found = Entity("A", Span("Ann", 0, 3)), Entity("A", Span("Ann", 0, 3, "normalised"))
    for match in ("text", "offsets"):
        assert tallied("NER", "Ann", [gold], [found, found], match=match) == Counts(1, 0, 0)


def test_records_of_other_tasks_are_counted():
    others = [Relation("A", at("Ann", 0, 3), at("Ann", 0, 3)), Event("A", at("Ann", 0, 3))]
    report = one([ANN], {"1": [*ANN.records, *others]})
    assert report.answers["set"].problems["wrong_task"] == 2
    assert counts(report, "NER") == Counts(1, 0, 0)


def test_hallucinated_spans_are_dropped_and_counted():
    text = "Ann hit Bob"
    invented = Span("Carl", alignment="not_found")
    never_aligned = Span("Dora")
    entities = [Entity("A", at(text, 0, 3)), Entity("A", invented), Entity("B", never_aligned)]
    entities.append(Entity("A", Span("Bob")))
    report = one([document("1", text, "NER", entities[0])], {"1": entities})
    assert counts(report, "NER") == Counts(1, 1, 0)  # two are dropped; "Bob" is in the text, wrong
    assert report.answers["set"].hallucinated == 2
    # what the parser has reported, and may have kept or left out, counts once
    nothing = [document("1", text, "NER")]
    for records in (entities, entities[:1] + entities[2:]):
        found = one(nothing, {"1": answer(*records, problems=["not_in_text"])}).answers["set"]
        assert found.hallucinated == 2 and found.problems == {}
    relation = one([document("1", text, "RE")], {"1": [Relation("A", invented, never_aligned)]})
    assert relation.answers["set"].hallucinated == 2
    event = Event("A", at(text, 4, 7), (Argument("x", invented), Argument("x", at(text, 8, 11))))
    gold = Event("A", at(text, 4, 7), (Argument("x", at(text, 8, 11)),))
    report = one([document("1", text, "EE", gold)], {"1": [event, Event("B", invented)]})
    assert (counts(report, "EE"), counts(report, "EAE")) == (Counts(1, 0, 0), Counts(1, 0, 0))
    assert report.answers["set"].hallucinated == 2


def test_failures_and_problems_are_counted():
    text = "Ann"
    ann = Entity("A", at(text, 0, 3))
    documents = [document(str(i), text, "NER", ann) for i in range(7)]
    answers = {
        "0": answer(problems=["malformed", "malformed"]),  # nothing could be read: one failure
        "1": answer(ann, problems=["truncated", "unknown_label"]),  # something could
        "2": answer(),  # an empty list
        "3": answer(ann, Relation("A", ann.span, ann.span), problems=["extra_text"]),
        "4": answer(problems=["extra_text"]),  # an empty list with prose behind it
        "5": answer(problems=["unknown_label", "truncated"]),  # a record was read, of no use
    }
    counted = one(documents, answers).answers["set"]
    kinds = {"extra_text": 2, "malformed": 2, "truncated": 2, "unknown_label": 2, "wrong_task": 1}
    assert counted == AnswerCounts(7, 1, 1, 0, kinds)  # unanswered, parse failures, hallucinated
    assert counts(one(documents, answers), "NER") == Counts(2, 0, 5)


def test_mean_is_unweighted_over_data_sets():
    text = "Ann"
    ann = Entity("A", at(text, 0, 3))
    few = [document("1", text, "NER", ann)]
    many = [document(str(i), text, "NER", ann) for i in range(99)]
    nothing = [document("1", text, "NER")]
    event = [document("1", text, "EE", Event("A", at(text, 0, 3)))]
    report = score(
        {"few": few, "many": many, "nothing": nothing, "event": event},
        {"few": {"1": [ann]}, "event": {}},
        seen=NO_TABLE,
    )
    assert report.average_f1("NER") == 0.5  # "nothing" has nothing to score
    assert report.average_f1() == pytest.approx(1 / 3)
    assert report.average_f1("EE+EAE") == 0
    assert math.isnan(report.average_f1("RE"))
    assert math.isnan(report.average_f1("NER", "unseen"))
    assert report.select(["few"]).average_f1() == 1
    with refused(match="Data set `fewer` is not in the report: few, many, nothing, event"):
        report.select(["fewer"])
    with refused(match=r"There is no group `NRE` of tasks\. Choose one of NER, RE, EE"):
        report.average_f1("NRE")


def test_a_data_set_without_gold_items_is_in_no_mean_whatever_was_predicted():
    text = "Ann"
    ann = Entity("A", at(text, 0, 3))
    documents = {"set": [document("1", text, "NER", ann)], "nothing": [document("1", text, "NER")]}
    silent = score(documents, {"set": {"1": [ann]}}, seen=NO_TABLE)
    noisy = score(documents, {"set": {"1": [ann]}, "nothing": {"1": [ann]}}, seen=NO_TABLE)
    assert silent.average_f1() == noisy.average_f1() == 1
    assert math.isnan(silent.scores[1].total().f1) and noisy.scores[1].total() == Counts(0, 1, 0)
    rows = [line.row for line in compare(noisy, silent, n_resamples=10).differences]
    assert rows == [("set", "NER"), ("NER",), ("all",)]


TWO = "Ann Bob"
ANN_A, BOB_B = Entity("A", at(TWO, 0, 3)), Entity("B", at(TWO, 4, 7))
SPLIT = SeenLabels({"set": {"A": "person"}}, {"set": ("B",)})


def test_seen_and_unseen_labels():
    documents = [document("1", TWO, "NER", ANN_A, BOB_B)]
    predicted = {"1": [ANN_A, Entity("A", BOB_B.span), Entity("C", BOB_B.span)]}
    report = one(documents, predicted, seen=SPLIT)
    assert report.scores[0].total("seen") == Counts(1, 1, 0)
    assert report.scores[0].total("unseen") == Counts(0, 1, 1)  # C is in no list: not seen
    assert (report.average_f1("all", "seen"), report.average_f1("all", "unseen")) == (2 / 3, 0)
    assert one(documents, predicted).scores[0].total("seen") is None
    # a part without a gold item is not scored, whatever was predicted
    table = SeenLabels({"set": {"A": "", "B": ""}}, {"set": ()})
    all_seen = one(documents, predicted, seen=table)
    assert all_seen.scores[0].total("unseen") is None
    assert math.isnan(all_seen.average_f1("all", "unseen"))
    with refused(match=r'knows data set `set` but not its label `B`. Add it to the "seen"'):
        one(documents, {}, seen=SeenLabels({"set": {"A": ""}}, {"set": ()}))


def test_seen_table_of_the_package_is_whole():
    table = SeenLabels.load()
    assert not set(table.seen["crossner_ai"]) & set(table.unseen["crossner_ai"])
    assert all(reason.strip() for labels in table.seen.values() for reason in labels.values())
    assert table.seen["crossner_ai"]["person"] == "wnut17 person"
    assert "field" in table.unseen["crossner_ai"]


def test_seen_table_covers_the_public_sets():
    if not DATA.exists():
        pytest.skip("needs the data sets in ../shared/data/uie")
    table = SeenLabels.load()
    descriptions = json.loads((DATA / "datasets.json").read_text(encoding="utf-8"))
    for name, description in ((name, of) for name, of in descriptions.items() if name in table):
        labels = set(description["labels"]) | set(description["schema"] or ())
        assert {label for label in labels if not table.knows(name, label)} == set(), name
        if description["use"] == "supervised":
            assert not table.unseen[name], name


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "has no table of data sets. Write it as"),
        ({"seen": {}}, 'Data set `s` in .* needs the keys "seen" and "unseen"'),
        ({"seen": ["A"], "unseen": []}, "Data set `s` in .* has lists of the wrong kind"),
        ({"seen": {"A": ""}, "unseen": ["A"]}, "Label `A` of data set `s` in .* is both seen and"),
    ],
)
def test_seen_table_of_a_user_is_checked(tmp_path, content, message):
    table = content and {"datasets": {"s": content}}
    (tmp_path / "seen.json").write_text(json.dumps(table))
    with refused(match=message):
        SeenLabels.load(tmp_path / "seen.json")


def test_wrong_calls_say_what_to_do():
    documents = [ANN]
    with refused(match=r'There is no match by `start`. Choose "text" or "offsets"'):
        one(documents, {}, match="start")
    with refused(match="answers for data set `other`, but no documents of it"):
        score({"set": documents}, {"other": {}})
    with refused(match="has 1 answers to documents it does not have, the first `2`"):
        one(documents, {"2": []})
    with refused(match="Data set `set` has two documents `1`. Give each an id"):
        one(documents * 2, {})
    unplaced = (
        "The mention 'Ann' in document `1` has no offsets, so it cannot be matched by them. "
        'Align the answer to its text first, or pass match="text".'
    )
    with refused(match=f"^{re.escape(unplaced)}$"):
        one(documents, {"1": [Entity("A", Span("Ann"))]}, match="offsets")


def test_report_survives_json():
    rng = random.Random(3)
    documents, answers = random_case(rng, "EE", 20)
    report = one(documents, answers, seen=SPLIT).with_intervals(200)
    again = ScoreReport.from_dict(json.loads(report.to_json(documents=True)))
    assert again.values() == report.values() and again.answers == report.answers
    assert again.with_intervals(200).intervals == report.intervals
    figures = json.loads(report.to_json())
    assert figures["datasets"][0]["all"]["f1"] == report.scores[0].total().f1
    low, high = figures["average_f1"]["all"]["unseen"]["f1_interval"]
    assert low < figures["average_f1"]["all"]["unseen"]["f1"] < high
    assert figures["datasets"][0]["labels"]["A"]["seen"] is True
    with refused(match=r"no counts by document.*Write them with `to_dict\(documents=True\)`"):
        ScoreReport.from_dict(report.to_dict())


def test_nothing_to_score_is_null_in_json():
    report = one([document("1", "Ann", "NER")], {"1": []}).with_intervals(10)
    figures = json.loads(report.to_json(documents=True))
    assert figures["datasets"][0]["all"]["f1"] is None
    assert figures["average_f1"]["all"]["all"]["f1"] is None
    assert math.isnan(ScoreReport.from_dict(figures).average_f1())


def test_tables_show_the_figures():
    from rich.console import Console

    report = one([document("1", TWO, "NER", ANN_A, BOB_B)], {"1": [ANN_A]}, seen=SPLIT)
    lines = report.to_markdown().splitlines()
    assert lines[0] == "| task | data set | P | R | F1 | F1 seen | F1 unseen |"
    assert lines[2] == "| NER | set | 100.0 | 50.0 | 66.7 | 100.0 | 0.0 |"
    assert lines[4] == "| all | mean |  |  | 66.7 | 100.0 | 0.0 |"
    assert lines[-3] == "| data set | documents | unanswered | parse failures | hallucinated |"
    assert lines[-1] == "| set | 1 | 0 | 0 | 0 |"
    assert "| NER | set | B | no | 1 |  | 0.0 | 0.0 |" in report.to_markdown(labels=True)
    with_intervals = report.with_intervals(10).to_markdown()
    assert "| NER | set | all | 100.0 | 50.0 | 66.7 | [66.7, 66.7] |" in with_intervals
    assert "| NER | set | seen |  |  | 100.0 | [100.0, 100.0] |" in with_intervals
    console = Console(file=io.StringIO(), width=200)
    compared = compare(report, report, n_resamples=10)
    console.print(report.table(), report.table(labels=True), compared.table())
    shown = console.file.getvalue()
    assert "66.7" in shown and "F1 unseen" in shown
    assert "[0.0, 0.0]" in shown  # brackets are no markup


def test_tables_fit_a_terminal_of_80_columns():
    from rich.console import Console

    report = score({"crossner_literature": [ANN]}, {}, seen=NO_TABLE)
    both = compare(report, report, n_resamples=10)
    for shown in (report, report.with_intervals(10), both):
        assert max(map(len, shown.to_markdown().splitlines())) <= 80
        console = Console(file=io.StringIO(), width=80)
        console.print(shown.table())
        printed = console.file.getvalue()
        assert "crossner_literature" in printed and "\N{HORIZONTAL ELLIPSIS}" not in printed


def test_a_report_is_short_where_python_shows_it_and_a_table_in_a_notebook():
    report = one([ANN], {"1": ANN.records})
    assert repr(report) == "ScoreReport(1 data sets, 1 documents: mean F1 all 100.0, match by text)"
    assert "<td" in report._repr_html_() and "Strict F1" in report._repr_html_()
    assert "not defined" in repr(one([replace(ANN, records=())], {}))


def test_own_labels_in_a_set_that_is_called_like_a_public_one_are_scored_with_a_note():
    report = score({"wnut17": [ANN]}, {"wnut17": {"1": ANN.records}})
    assert report.average_f1() == 1 and report.scores[0].seen is None
    (note,) = report.notes
    assert "`wnut17` but not its label `A`" in note and note in report.to_markdown()
    assert ScoreReport.from_dict(json.loads(report.to_json(documents=True))).notes == (note,)
    with refused(match="`wnut17` but not its label `A`"):  # a table of one's own
        score({"wnut17": [ANN]}, {}, seen=SeenLabels.load())
    person = [document("1", "Ann", "NER", Entity("person", at("Ann", 0, 3)), schema={"person": ""})]
    assert score({"wnut17": person}, {}).scores[0].seen == (True,)


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (None, "is a NoneType"),
        ("A", "is a str"),
        ([{"label": "A"}], "a dict where a record is expected"),
        ([Entity(["A"], Span("Ann"))], "the label or role ['A'], which is no string"),
        ([Event("A", Span("Ann"), (Argument(None, Span("Ann")),))], "the label or role None"),
        ([Entity("A", Span(7))], "the mention 7 with start None"),
        ([Entity("A", Span("Ann", "0", 3))], "the mention 'Ann' with start '0' and end 3"),
        ([Entity("A", Span("Ann", 0, None))], "the mention 'Ann' with start 0 and end None"),
        ([Entity("A", Span("Ann"), "high")], "the confidence 'high', which is no number"),
        ([Entity("A", Span("Ann"), 1.01)], "the confidence 1.01, which is no number from 0 to 1"),
        ([Entity("A", Span("Ann"), -0.01)], "the confidence -0.01, which is no number"),
    ],
)
def test_broken_answers_are_named(answer, found):
    advice = "Pass its records as a list, or an object with `records` and `problems`."
    if isinstance(answer, list):
        advice = "Read records with `record_from_dict`, or leave this one out."
    for judge in (score, reliability):
        with refused(match=re.escape(found)) as caught:
            judge({"s": [ANN]}, {"s": {"1": answer}})
        assert str(caught.value).startswith("The answer to document `1` ")
        assert str(caught.value).endswith(f". {advice}")


def test_half_characters_in_names_reach_every_file():
    gold = [document("\ud800", "Ann", "NER", Entity("\udfff", at("Ann", 0, 3)), schema={"A": ""})]
    report = score({"s\ud800": gold}, {}, seen=NO_TABLE).with_intervals(10)
    figures = json.loads(report.to_json(documents=True).encode("utf-8"))
    assert ScoreReport.from_dict(figures).values() == report.values()


# Intervals and tests


def simulated(rng, n, rate, gold=3, noise=0.3):
    """Documents with `gold` entities each, and answers that find each with probability `rate`."""
    text = "abcdefgh"
    documents, answers = [], {}
    for i in range(n):
        entities = [Entity("A", at(text, k, k + 1)) for k in range(gold)]
        documents.append(document(str(i), text, "NER", *entities))
        found = [entity for entity in entities if rng.random() < rate]
        answers[str(i)] = found + ([Entity("A", at(text, 7, 8))] if rng.random() < noise else [])
    return documents, answers


def test_intervals_agree_with_scipy():
    from scipy import stats

    report = one(*simulated(random.Random(1), 120, 0.6)).with_intervals(8000, 0.9)
    by_document = report.scores[0].by_document()

    def f1(rows, axis):
        tp, fp, fn = np.moveaxis(by_document[rows].sum(axis=-2), -1, 0)  # rows: (..., documents)
        return 2 * tp / (2 * tp + fp + fn)

    options = {"n_resamples": 8000, "confidence_level": 0.9, "method": "percentile"}
    found = stats.bootstrap((np.arange(120),), f1, vectorized=True, **options)
    theirs = found.confidence_interval
    ours = report.intervals[("set", "NER"), "all"]
    width = theirs.high - theirs.low
    assert abs(ours.low - theirs.low) < 0.05 * width and abs(ours.high - theirs.high) < 0.05 * width
    assert ours.low < report.scores[0].total().f1 < ours.high and ours.confidence == 0.9


def test_intervals_depend_on_the_seed_alone():
    documents, answers = simulated(random.Random(2), 30, 0.5)
    report = one(documents, answers)
    assert report.with_intervals(50).intervals == report.with_intervals(50).intervals
    assert report.with_intervals(50).intervals != report.with_intervals(50, seed=1).intervals
    sets, found = {"other": documents, "set": documents}, {"other": {}, "set": answers}
    both = score(sets, found, seen=NO_TABLE).with_intervals(50)
    key = (("set", "NER"), "all")
    assert both.intervals[key] == report.with_intervals(50).intervals[key]


def test_blocks_of_resamples_make_no_difference(monkeypatch):
    report = one(*simulated(random.Random(2), 30, 0.5))
    whole = report.with_intervals(50).intervals
    monkeypatch.setattr(bootstrap, "_CELLS_PER_BLOCK", 100)
    assert report.with_intervals(50).intervals == whole


def test_interval_of_a_mean_is_that_of_independent_data_sets():
    rng = random.Random(4)
    cases = {name: simulated(rng, 100, 0.5) for name in "abcd"}
    documents, answers = ({name: case[i] for name, case in cases.items()} for i in (0, 1))
    intervals = score(documents, answers, seen=NO_TABLE).with_intervals(4000).intervals
    of_sets = [intervals[(name, "NER"), "all"] for name in "abcd"]
    widths = [interval.high - interval.low for interval in of_sets]
    mean = intervals[("all",), "all"]
    assert mean.high - mean.low == pytest.approx(math.sqrt(sum(w**2 for w in widths)) / 4, rel=0.08)


@pytest.mark.slow
def test_coverage_of_the_interval():
    rng = random.Random(5)
    rate, noise = 0.5, 0.3
    true_f1 = 2 * 3 * rate / (2 * 3 * rate + noise + 3 * (1 - rate))
    covered = 0
    for seed in range(200):
        report = one(*simulated(rng, 60, rate)).with_intervals(300, 0.9, seed)
        interval = report.intervals[("set", "NER"), "all"]
        covered += interval.low <= true_f1 <= interval.high
    assert 165 <= covered <= 195  # 180 expected, standard deviation 4.2


def test_paired_test_sees_a_difference_and_no_difference():
    documents, good = simulated(random.Random(6), 150, 0.7)
    _, better = simulated(random.Random(7), 150, 0.85)
    good, better = one(documents, good), one(documents, better)
    difference = compare(better, good, n_resamples=2000)["set", "NER"]
    assert difference.p < 0.01 and 0 < difference.low < difference.difference < difference.high
    same = compare(good, good, n_resamples=500)["all"]
    assert (same.difference, same.low, same.high, same.p) == (0, 0, 0, 1)
    turned = compare(good, better, n_resamples=2000)["set", "NER"]
    assert (turned.difference, turned.low) == (-difference.difference, -difference.high)
    assert turned.p == difference.p


@pytest.mark.slow
def test_p_is_uniform_where_there_is_no_difference():
    rng = random.Random(8)
    p = []
    for seed in range(200):
        documents, a = simulated(rng, 60, 0.5)
        _, b = simulated(rng, 60, 0.5)
        p.append(compare(one(documents, a), one(documents, b), n_resamples=200, seed=seed)["all"].p)
    assert 3 <= sum(value < 0.1 for value in p) <= 34  # 20 expected, standard deviation 4.2
    assert 0.4 < np.mean(p) < 0.6


def test_comparison_pairs_the_documents():
    # b makes the same errors as a, and one more: unpaired, it would drown in the spread
    documents, a = simulated(random.Random(9), 200, 0.5, noise=0)
    b = {id_: records[1:] if int(id_) % 20 == 0 else records for id_, records in a.items()}
    line = compare(one(documents, a), one(documents, b), n_resamples=1000)["set", "NER"]
    interval = one(documents, a).with_intervals(1000).intervals[("set", "NER"), "all"]
    assert line.low >= 0 and line.high - line.low < (interval.high - interval.low) / 2


def test_comparison_of_seeds_and_splits():
    documents = [document(str(i), TWO, "NER", ANN_A, BOB_B) for i in range(20)]
    first = one(documents, {d.id: d.records for d in documents}, seen=SPLIT)
    second = one(documents, {d.id: d.records[:1] for d in documents}, seen=SPLIT)
    comparison = compare([first, second], [second], n_resamples=100)
    assert comparison["set", "NER", "unseen"].a == comparison["all", "unseen"].difference == 0.5
    assert comparison["all", "seen"].difference == 0
    assert comparison["all"].a == pytest.approx((1 + 2 / 3) / 2)
    assert json.loads(comparison.to_json())["differences"][0]["row"] == ["set", "NER"]
    assert "| NER | seen |" in comparison.to_markdown()
    with pytest.raises(KeyError):
        comparison["other"]


def test_comparison_refuses_other_documents():
    documents, answers = simulated(random.Random(1), 5, 0.5)
    report = one(documents, answers)
    other = r"different documents or gold records of `set`. Score both systems on the same"
    for documents_of_b in (documents[:4], [replace(d, records=()) for d in documents]):
        with refused(match=other):
            compare(report, one(documents_of_b, {}))
    with refused(match="One report matches by text, the other by offsets"):
        compare(report, one(documents, answers, match="offsets"))
    with refused(match="Only one report has data set `other` under NER"):
        compare(report, score({"set": documents, "other": documents}, {}, seen=NO_TABLE))
    with refused(match=r"Found n_resamples=0 and confidence=0.95. Pass at least one resample"):
        compare(report, report, n_resamples=0)
    with refused(match="without a report cannot be compared"):
        compare([], report)


def test_values_are_compared_by_document():
    rng = np.random.default_rng(0)
    base = rng.normal(2, 1, 80)
    a = {n: {str(i): v + k for i, v in enumerate(base)} for k, n in enumerate("xy")}
    b = {
        n: {i: v + 0.02 + 0.01 * rng.normal() for i, v in reversed(of.items())}
        for n, of in a.items()
    }
    line = compare_values(a, b, n_resamples=2000)["all"]
    assert line.difference == pytest.approx(-0.02, abs=0.003) and line.high < 0 and line.p < 0.001
    assert line.high - line.low < 0.01  # the spread of the documents, 1, is paired away
    assert compare_values(a, b, n_resamples=50)["x"].a == pytest.approx(base.mean())
    one_set = compare_values({"x": a["x"]}, {"x": b["x"]}, n_resamples=50)
    assert (one_set["all"].low, one_set["all"].p) == (one_set["x"].low, one_set["x"].p)


def test_values_can_be_weighted():
    a, b = {"x": {"1": 1.0, "2": 4.0}}, {"x": {"1": 1.0, "2": 1.0}}
    line = compare_values(a, b, weights={"x": {"1": 3, "2": 1}}, n_resamples=10)["x"]
    assert (line.a, line.b) == (7 / 4, 1)


def repeated(times: int) -> tuple[list[Document], dict, dict]:
    """Documents that stand there several times, their answers by two systems, and which are one."""
    documents, answers = simulated(random.Random(3), 40, 0.5)
    copies = [replace(d, id=f"{d.id}-{i}") for d in documents for i in range(times)]
    of = {d.id: d.id.split("-")[0] for d in copies}
    return copies, {id_: answers[of[id_]] for id_ in of}, of


def test_documents_of_one_cluster_are_drawn_together():
    """Copies of a document bring nothing new: drawn as clusters they change no interval."""
    documents, answers, clusters = repeated(4)
    alone, alone_answers, _ = repeated(1)
    half = {id_: records[:1] for id_, records in answers.items()}
    systems = one(documents, answers), one(documents, half)
    single = one(alone, alone_answers), one(alone, {i: r[:1] for i, r in alone_answers.items()})
    expected = compare(*single, n_resamples=500)["set", "NER"]
    assert compare(*systems, n_resamples=500, clusters={"set": clusters})["set", "NER"] == expected
    by_document = compare(*systems, n_resamples=500)["set", "NER"]
    assert by_document.high - by_document.low < 0.7 * (expected.high - expected.low)

    interval = single[0].with_intervals(500).intervals[("set", "NER"), "all"]
    clustered = systems[0].with_intervals(500, clusters={"set": clusters})
    assert clustered.intervals[("set", "NER"), "all"] == interval

    def values(documents, **options):
        of = {d.id: float(d.id.split("-")[0]) for d in documents}
        zeros = dict.fromkeys(of, 0.0)
        return compare_values({"set": of}, {"set": zeros}, n_resamples=500, **options)["set"]

    assert values(documents, clusters={"set": clusters}) == values(alone)
    with refused(match="`clusters` has document `x` of `set`, which was not scored"):
        compare(*systems, n_resamples=5, clusters={"set": {"x": "y"}})


def test_a_resample_without_gold_counts_for_no_system():
    """Else a system that predicts nothing would leave it out, and a wrong one count it as 0."""
    text = "ab"
    documents = [document("0", text, "NER", Entity("A", at(text, 0, 1)))]
    documents += [document(str(i), text, "NER") for i in range(1, 4)]
    right = {d.id: d.records for d in documents}
    answers = right, {**right, "1": [Entity("A", at(text, 1, 2))]}
    sets = {"x": documents, "y": documents[:1]}
    a, b = (score(sets, {"x": x, "y": {"0": right["0"]}}, seen=NO_TABLE) for x in answers)
    line = compare(a, b, n_resamples=2000, confidence=0.9999)["all"]
    # With k gold documents and j wrong answers b has 2k / (2k + j) in x, at worst 2 / 5; 1 in y.
    assert line.low == 0 and line.high == pytest.approx((1 - 2 / 5) / 2)


def test_wrong_values_say_what_to_do():
    good = {"x": {"1": 1.0, "2": 2.0}}
    with refused(match="different data sets: \\['x'\\] and \\[\\]"):
        compare_values(good, {})
    with refused(match="different documents of `x`, or none"):
        compare_values(good, {"x": {"1": 1.0}})
    with refused(match="Document `2` of `x` has a value that is not finite"):
        compare_values(good, {"x": {"1": 1.0, "2": math.nan}})
    with refused(match="Document `2` of `x` has no positive weight"):
        compare_values(good, good, weights={"x": {"1": 1.0}})


def test_a_data_set_without_documents_has_no_row():
    report = score({"set": [ANN], "none": []}, {"set": {"1": ANN.records}}, seen=NO_TABLE)
    assert report.with_intervals(10).average_f1() == 1
    assert [one.dataset for one in report.scores] == ["set"]
