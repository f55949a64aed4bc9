"""Reliability curves: which records are right, bins, the calibration error against other computations, tables and plots."""

from __future__ import annotations

import io
import json
import math
import random
from dataclasses import replace

import numpy as np
import pytest

from peft_taskmoe.uie import (
    Argument,
    Document,
    Entity,
    Event,
    Relation,
    Schema,
    Span,
    reliability,
    score,
)
from peft_taskmoe.uie.scoring import SeenLabels

TEXT = "Ann met Bob and Ann hit Eve"
SCHEMAS = {
    "NER": {"P": "", "Q": ""},
    "RE": {"R": ""},
    "EE": {"E": {"description": "", "roles": ["x", "y"]}},
}
SCHEMAS["EAE"] = SCHEMAS["EE"]


def at(start: int, end: int) -> Span:
    return Span(TEXT[start:end], start, end)


ANN, MET, BOB, ANN2, HIT, EVE = (
    at(*p) for p in ((0, 3), (4, 7), (8, 11), (16, 19), (20, 23), (24, 27))
)


def document(task: str, *records, name: str = "1") -> Document:
    return Document(name, TEXT, task, Schema.from_dict(task, SCHEMAS[task]), records)


def curve(task: str, gold, predicted, **options):
    return reliability({"set": [document(task, *gold)]}, {"set": {"1": predicted}}, **options)


def of_bins(found) -> list[tuple[int, float, float]]:
    return [(one.count, round(one.confidence, 6), one.precision) for one in found.bins if one.count]


def test_figures_by_hand():
    gold = [Entity("P", ANN), Entity("P", BOB), Entity("Q", EVE)]
    predicted = [
        Entity("P", ANN, 0.95),
        Entity("P", BOB, 0.85),
        Entity("Q", BOB, 0.81),
        Entity("P", EVE, 0.3),
        Entity("Q", MET),
    ]
    found = curve("NER", gold, predicted)
    assert of_bins(found) == [(1, 0.3, 0.0), (2, 0.83, 0.5), (1, 0.95, 1.0)]
    assert [one.low for one in found.bins] == pytest.approx([i / 10 for i in range(10)])
    assert (found.count, found.without, found.precision) == (4, 1, 0.5)
    assert found.confidence == pytest.approx((0.95 + 0.85 + 0.81 + 0.3) / 4)
    assert found.ece == pytest.approx((0.3 + 2 * 0.33 + 0.05) / 4)


def test_a_value_on_an_edge_belongs_to_the_bin_below():
    predicted = [Entity("P", span, value) for span, value in ((ANN, 0.0), (BOB, 0.5), (EVE, 1.0))]
    assert [one.count for one in curve("NER", [], predicted, bins=2).bins] == [2, 1]


def test_one_gold_mention_makes_one_record_right():
    gold = [Entity("P", ANN)]
    both = [Entity("P", ANN, 0.9), Entity("P", ANN2, 0.6)]
    assert curve("NER", gold, both).precision == 0.5
    assert curve("NER", [*gold, Entity("P", ANN2)], both).precision == 1.0
    assert of_bins(curve("NER", gold, both[::-1], match="offsets")) == [
        (1, 0.6, 0.0),
        (1, 0.9, 1.0),
    ]
    assert curve("NER", gold, [both[0], both[0]]).count == 1  # the same place twice is said once


def test_an_event_is_right_if_all_that_it_says_is():
    gold = [Event("E", MET, (Argument("x", ANN), Argument("y", BOB)))]

    def right(task: str, *arguments: Argument, trigger: Span = MET) -> float:
        return curve(task, gold, [Event("E", trigger, arguments, 0.5)]).precision

    for task in ("EE", "EAE"):
        assert right(task, Argument("x", ANN), Argument("y", BOB)) == 1.0
        assert right(task, Argument("x", ANN)) == 1.0  # what it leaves out is a matter of recall
        assert right(task, Argument("x", ANN), Argument("y", EVE)) == 0.0
        assert right(task, Argument("y", ANN)) == 0.0
        assert right(task, Argument("x", ANN), trigger=HIT) == 0.0
    assert right("EE") == 1.0
    silent = curve("EAE", gold, [Event("E", MET, (), 0.5)])
    assert (silent.count, silent.without) == (0, 1)


def test_relations_and_spans_that_are_not_in_the_text():
    gold = [Relation("R", ANN, BOB)]
    lost = Relation("R", ANN, Span("Zoe", alignment="not_found"), confidence=0.9)
    found = curve(
        "RE",
        gold,
        [Relation("R", ANN, BOB, confidence=0.7), Relation("R", BOB, ANN, confidence=0.7), lost],
    )
    assert (found.count, found.precision) == (
        2,
        0.5,
    )  # as in precision, what is not in the text is dropped


def random_sets(seed: int, sets: int = 3, documents: int = 40):
    rng = random.Random(seed)
    gold: dict = {}
    answers: dict = {}
    for number in range(sets):
        name = f"set{number}"
        gold[name], answers[name] = [], {}
        for i in range(documents):
            spans = [at(s, s + 1) for s in rng.sample(range(len(TEXT)), 8)]
            truth = [Entity(rng.choice("PQ"), span) for span in spans[:5]]
            written = [
                replace(record, confidence=rng.random() ** 0.3)
                for record in truth
                if rng.random() < 0.7
            ]
            written += [Entity(rng.choice("PQ"), span, rng.random()) for span in spans[4:]]
            rng.shuffle(written)
            gold[name].append(document("NER", *truth, name=str(i)))
            answers[name][str(i)] = written
    return gold, answers


@pytest.mark.parametrize("match", ["text", "offsets"])
def test_precision_is_that_of_score(match):
    gold, answers = random_sets(1)
    found = reliability(gold, answers, match=match)
    totals = [s.total() for s in score(gold, answers, match=match, seen=SeenLabels({}, {})).scores]
    tp, fp = sum(t.tp for t in totals), sum(t.fp for t in totals)
    assert found.count == tp + fp and found.precision == pytest.approx(tp / (tp + fp))


def judged(gold, answers) -> tuple[list[float], list[bool]]:
    """Confidences and whether they are right by offsets, where sets do: every place is named once for each label."""
    values, right = [], []
    for name, of_set in gold.items():
        for one in of_set:
            places = {(r.label, r.span.start, r.span.end) for r in one.records}
            seen = set()
            for record in answers[name][one.id]:
                place = (record.label, record.span.start, record.span.end)
                if place not in seen:
                    values.append(record.confidence)
                    right.append(place in places)
                seen.add(place)
    return values, right


@pytest.mark.parametrize("bins", [1, 7, 10, 15])
def test_the_error_agrees_with_a_plain_computation(bins):
    gold, answers = random_sets(bins)
    values, right = judged(gold, answers)
    error = 0.0
    for b in range(bins):
        inside = [i for i, v in enumerate(values) if b / bins < v <= (b + 1) / bins]
        error += abs(sum(right[i] for i in inside) - sum(values[i] for i in inside))
    assert reliability(gold, answers, match="offsets", bins=bins).ece == pytest.approx(
        error / len(values)
    )


@pytest.mark.parametrize(("binning", "strategy"), [("width", "uniform"), ("count", "quantile")])
def test_the_curve_agrees_with_that_of_scikit_learn(binning, strategy):
    calibration = pytest.importorskip("sklearn.calibration", reason="scikit-learn is not installed")
    gold, answers = random_sets(2)
    values, right = judged(gold, answers)
    precisions, confidences = calibration.calibration_curve(
        right, values, n_bins=8, strategy=strategy
    )
    found = reliability(gold, answers, match="offsets", bins=8, binning=binning)
    full = [one for one in found.bins if one.count]
    assert [one.precision for one in full] == pytest.approx(list(precisions))
    assert [one.confidence for one in full] == pytest.approx(list(confidences))


def test_bins_of_equal_count():
    gold, answers = random_sets(3)
    found = reliability(gold, answers, bins=6, binning="count")
    counts = [one.count for one in found.bins]
    assert len(counts) == 6 and max(counts) - min(counts) <= 2
    assert (found.bins[0].low, found.bins[-1].high) == (0.0, 1.0)
    same = [Entity("P", at(i, i + 1), 1.0) for i in range(5)]
    (only,) = [one for one in curve("NER", [], same, binning="count").bins if one.count]
    assert only.count == 5


def test_the_interval_depends_on_the_seed_alone_and_agrees_with_drawn_documents():
    gold, answers = random_sets(4, sets=1, documents=60)
    found = reliability(gold, answers, n_resamples=2000, match="offsets")
    assert found.interval == reliability(gold, answers, n_resamples=2000, match="offsets").interval
    by_document = [judged({"set0": [one]}, answers) for one in gold["set0"]]
    rng = np.random.default_rng(9)
    drawn = []
    for _ in range(1000):
        picked = rng.integers(60, size=60)
        values = np.concatenate([by_document[i][0] for i in picked])
        right = np.concatenate([by_document[i][1] for i in picked]).astype(float)
        of_bin = np.ceil(values * 10)
        gaps = [abs((right - values)[of_bin == b].sum()) for b in range(11)]
        drawn.append(sum(gaps) / len(values))
    low, high = np.quantile(drawn, [0.025, 0.975])
    assert (found.interval.low, found.interval.high) == pytest.approx((low, high), abs=0.01)


def test_nothing_to_judge_and_wrong_calls():
    empty = curve("NER", [Entity("P", ANN)], [])
    assert empty.count == 0 and math.isnan(empty.ece) and json.loads(empty.to_json())["ece"] is None
    assert curve("NER", [], [], n_resamples=10).interval is None
    assert "| all | 0 |" in empty.to_markdown()
    with pytest.raises(ValueError, match="`bins` must be a positive integer, got 0"):
        curve("NER", [], [], bins=0)
    with pytest.raises(ValueError, match=r'binning="quantile".*"width" or "count"'):
        curve("NER", [], [], binning="quantile")
    with pytest.raises(ValueError, match="not between 0 and 1"):
        curve("NER", [], [Entity("P", ANN, 1.5)])
    with pytest.raises(ValueError, match="answer to document `9` of `set`, which is not among"):
        reliability({"set": [document("NER")]}, {"set": {"9": []}})


def test_tables_and_plot(tmp_path):
    from rich.console import Console

    gold, answers = random_sets(5)
    found = reliability(gold, answers, n_resamples=50)
    lines = found.to_markdown().splitlines()
    assert (
        lines[0]
        == "| confidence | records | mean confidence | precision | precision - confidence |"
    )
    assert len(lines) == 13 and lines[-1].startswith(f"| all | {found.count} |")
    assert f"ECE {found.ece:.3f} [" in lines[-1]
    console = Console(file=io.StringIO(), width=160)
    console.print(found.table())
    assert f"ECE {found.ece:.3f} [" in console.file.getvalue()
    figures = json.loads(found.to_json())
    assert (
        figures["ece"] == found.ece and sum(one["count"] for one in figures["bins"]) == found.count
    )
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (the extra `plot`)")
    found.plot(tmp_path / "curve.svg")
    drawn = (tmp_path / "curve.svg").read_text()
    assert "<svg" in drawn and drawn.count("<use") > 10
