"""Reliability: which records are right, bins, the error against other computations; calibration."""

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
    Calibration,
    Document,
    Entity,
    Event,
    Relation,
    Reliability,
    Schema,
    SeenLabels,
    Span,
    fit_calibration,
    reliability,
    score,
)
from peft_taskmoe.uie.scoring.reliability import Judged

TEXT = "Ann met Bob and Ann hit Eve"
EVENTS = {"E": {"description": "", "roles": ["x", "y"]}}
SCHEMAS = {"NER": {"P": "", "Q": ""}, "RE": {"R": ""}, "EE": EVENTS, "EAE": EVENTS}


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
    predicted = [Entity("P", ANN, 0.95), Entity("P", BOB, 0.85), Entity("Q", BOB, 0.81)]
    predicted += [Entity("P", EVE, 0.3), Entity("Q", MET)]
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
    by_offsets = curve("NER", gold, both[::-1], match="offsets")
    assert of_bins(by_offsets) == [(1, 0.6, 0.0), (1, 0.9, 1.0)]
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


@pytest.mark.parametrize("match", ["text", "offsets"])
@pytest.mark.parametrize("task", ["EE", "EAE"])
def test_two_events_of_one_trigger_make_two_records_right(task, match):
    gold = [Event("E", MET, (Argument("x", span),)) for span in (ANN, BOB)]
    found = [replace(event, confidence=0.9) for event in gold]
    assert curve(task, gold, found, match=match).precision == 1.0
    assert curve(task, [*gold, gold[0]], [*found, found[0]], match=match).count == 2
    assert curve(task, gold[:1], found, match=match).precision == 0.5


def test_relations_and_spans_that_are_not_in_the_text():
    gold = [Relation("R", ANN, BOB)]
    lost = Relation("R", ANN, Span("Zoe", alignment="not_found"), confidence=0.9)
    turned = [Relation("R", *pair, confidence=0.7) for pair in ((ANN, BOB), (BOB, ANN))]
    found = curve("RE", gold, [*turned, lost])  # as in precision, lost spans are dropped
    assert (found.count, found.precision) == (2, 0.5)
    unplaced = [Entity("P", Span("Bob"), 0.5)] * 2  # by its words alone: said twice, there once
    found = curve("NER", [Entity("P", BOB)], unplaced)
    assert (found.count, found.precision) == (2, 0.5)


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
            kept = [record for record in truth if rng.random() < 0.7]
            written = [replace(record, confidence=rng.random() ** 0.3) for record in kept]
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
    """Confidences and whether they are right by offsets: each place once for a label."""
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
    found = reliability(gold, answers, match="offsets", bins=bins)
    assert found.ece == pytest.approx(error / len(values))


@pytest.mark.parametrize(("binning", "strategy"), [("width", "uniform"), ("count", "quantile")])
def test_the_curve_agrees_with_that_of_scikit_learn(binning, strategy):
    calibration = pytest.importorskip("sklearn.calibration", reason="scikit-learn is not installed")
    gold, answers = random_sets(2)
    values, right = judged(gold, answers)
    options = {"n_bins": 8, "strategy": strategy}
    precisions, confidences = calibration.calibration_curve(right, values, **options)
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
    with pytest.raises(ValueError, match=r"confidence 1\.5, which is no number from 0 to 1"):
        curve("NER", [], [Entity("P", ANN, 1.5)])
    with pytest.raises(ValueError, match="answer to document `9` of `set`, which is not among"):
        reliability({"set": [document("NER")]}, {"set": {"9": []}})


def test_tables_and_plot(tmp_path):
    from rich.console import Console

    gold, answers = random_sets(5)
    found = reliability(gold, answers, n_resamples=50)
    lines = found.to_markdown().splitlines()
    header = "| confidence | records | mean confidence | precision | precision - confidence |"
    assert lines[0] == header
    assert len(lines) == 13 and lines[-1].startswith(f"| all | {found.count} |")
    assert f"ECE {found.ece:.3f} [" in lines[-1]
    console = Console(file=io.StringIO(), width=160)
    console.print(found.table())
    assert f"ECE {found.ece:.3f} [" in console.file.getvalue()
    figures = json.loads(found.to_json())
    assert figures["ece"] == found.ece
    assert sum(one["count"] for one in figures["bins"]) == found.count
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (the extra `plot`)")
    found.plot(tmp_path / "curve.svg")
    drawn = (tmp_path / "curve.svg").read_text()
    assert "<svg" in drawn and drawn.count("<use") > 10


# The published curve of a small model on its training sets: confidence and share of right records.
MEASURED = ((0.61, 0.05), (0.73, 0.20), (0.80, 0.33), (0.86, 0.35), (0.93, 0.60))


def like_measured(seed: int, documents: int = 60):
    """Gold documents and records whose confidences promise as much too much."""
    rng = random.Random(seed)
    gold, answers = [], {}
    for i in range(documents):
        spans = [at(k, k + 1) for k in rng.sample(range(len(TEXT)), 8)]
        drawn = [(span, *rng.choice(MEASURED)) for span in spans]
        written = [Entity("P", span, value + rng.uniform(-0.04, 0.04)) for span, value, _ in drawn]
        truth = [Entity("P", span) for span, _, precision in drawn if rng.random() < precision]
        gold.append(document("NER", *truth, name=str(i)))
        answers[str(i)] = written
    return {"set": gold}, {"set": answers}


@pytest.fixture(scope="module")
def calibration():
    return fit_calibration(reliability(*like_measured(1), match="offsets"))


def test_calibrated_confidences_hold_on_documents_they_were_not_fitted_on(calibration):
    gold, answers = like_measured(2)
    before = reliability(gold, answers, match="offsets")
    calibrated = {id_: calibration.apply(records) for id_, records in answers["set"].items()}
    after = reliability(gold, {"set": calibrated}, match="offsets")
    assert before.ece > 0.45 and after.ece < 0.12
    assert after.precision == before.precision and after.count == before.count


def test_calibration_leaves_records_without_a_confidence(calibration):
    assert calibration.apply([Entity("P", ANN)]) == (Entity("P", ANN),)


def test_each_kind_of_record_has_its_curve_and_rare_ones_share_one():
    entities = [Judged(i, "entity", 0.9, i % 10 < 8) for i in range(100)]
    relations = [Judged(i, "relation", 0.9, i % 10 < 2) for i in range(100)]
    events = [Judged(i, "event", 0.9, True) for i in range(3)]
    calibration = fit_calibration(Reliability((), 0, None, (*entities, *relations, *events)))
    assert set(calibration.curves) == {"entity", "relation", "all"}
    entity, relation, event = calibration.apply(
        [Entity("P", ANN, 0.5), Relation("R", ANN, BOB, confidence=0.5), Event("E", MET, (), 0.5)]
    )
    assert entity.confidence == pytest.approx(0.8) and relation.confidence == pytest.approx(0.2)
    assert event.confidence == pytest.approx(103 / 203, abs=1e-6)
    with pytest.raises(ValueError, match="3 records with a confidence, too few"):
        fit_calibration(Reliability((), 0, None, tuple(events)))


def test_a_calibration_is_saved_beside_the_adapter(tmp_path, calibration):
    path = calibration.save(tmp_path)
    assert path.name == "uie_calibration.json" and set(json.loads(path.read_text())) == {"curves"}
    assert Calibration.load(tmp_path) == Calibration.load(path) == calibration


@pytest.mark.parametrize(
    ("curve", "found"),
    [
        ({"records": 9, "confidence": [0.1, 0.9], "precision": [0.9, 0.1]}, "falls"),
        ({"records": 9, "confidence": [0.9, 0.1], "precision": [0.1, 0.9]}, "falls"),
        ({"records": 9, "confidence": [0.1, 0.9], "precision": [0.1]}, "shape"),
        ({"records": 9, "confidence": [], "precision": []}, "not made of points"),
        ({"records": 9, "confidence": [0.1], "precision": [1.5]}, "between 0 and 1"),
        ({"records": 9, "confidence": [float("nan")], "precision": [0.5]}, "`NaN`|between 0 and 1"),
        ({"records": 9, "confidence": ["x"], "precision": [0.5]}, "x"),
        ({"confidence": [0.1], "precision": [0.5]}, "records"),
        ([], "list"),
    ],
)
def test_a_broken_calibration_is_refused_by_name(tmp_path, curve, found):
    path = tmp_path / "uie_calibration.json"
    path.write_text(json.dumps({"curves": {"all": curve}}), encoding="utf-8")
    message = f"(?s)`.*uie_calibration.json` is no calibration.*({found})"
    with pytest.raises(ValueError, match=message):
        Calibration.load(tmp_path)


def test_a_file_that_is_no_calibration_is_refused(tmp_path):
    for content in ("", "[]", '{"curves": {}}', '{"curves": {"entity": 1}}', "[" * 100_000):
        (tmp_path / "x.json").write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match="is no calibration"):
            Calibration.load(tmp_path / "x.json")
