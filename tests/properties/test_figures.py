"""What holds of every score, calibration and page."""

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from html_page import Page
from peft_taskmoe.uie import Calibration, Entity, Extraction, Problem, fit_calibration, score
from peft_taskmoe.uie.scoring.bootstrap import percentile_interval, resampled_sums
from peft_taskmoe.uie.scoring.reliability import reliability
from peft_taskmoe.uie.view.html import to_page
from strategies import TEXTS, documents, spans

pytestmark = pytest.mark.filterwarnings("ignore")
SETS = st.lists(documents(), min_size=1, max_size=4, unique_by=lambda document: document.id)


@dataclass
class Answered:
    records: tuple
    problems: tuple = ()


def total(drawn, answers, **options):
    report = score({"own": drawn}, {"own": answers}, **options)
    counts = [one.total() for one in report.scores]
    return sum(x.tp for x in counts), sum(x.fp for x in counts), sum(x.fn for x in counts)


@given(SETS, st.sampled_from(["text", "offsets"]))
def test_gold_answers_are_perfect_and_no_answers_find_nothing(drawn, match):
    gold = {document.id: Answered(document.records) for document in drawn}
    tp, fp, fn = total(drawn, gold, match=match)
    assert fp == fn == 0
    assert total(drawn, {}, match=match) == (0, 0, tp)


@given(SETS, st.randoms(), st.sampled_from(["text", "offsets"]))
def test_the_order_of_answers_and_records_does_not_matter(drawn, random, match):
    answers = {
        document.id: Answered(tuple(random.sample(document.records, len(document.records) // 2)))
        for document in drawn
    }
    shuffled = {
        name: Answered(tuple(reversed(answer.records)))
        for name, answer in reversed(list(answers.items()))
    }
    assert total(drawn, answers, match=match) == total(drawn[::-1], shuffled, match=match)


@given(SETS, st.data())
def test_one_more_record_is_one_more_item_right_or_wrong(drawn, data):
    document = drawn[0]
    labels = [label.name for label in document.schema.labels if label.kind == "entity"]
    assume(labels)
    extra = Entity(data.draw(st.sampled_from(labels)), data.draw(spans(document.text)))
    before = total(drawn, {})
    after = total(drawn, {document.id: Answered((extra,))})
    assert after[0] + after[1] <= 1 and after[0] + after[2] == before[2]


@given(st.lists(st.lists(st.integers(0, 9), min_size=3, max_size=3), min_size=1, max_size=6))
def test_an_interval_lies_between_the_least_and_the_most(rows):
    sums = resampled_sums(np.array(rows), 50, "own", 0)[:, 0] / len(rows)
    interval = percentile_interval(sums, 0.9)
    column = [row[0] for row in rows]
    assert min(column) <= interval.low <= interval.high <= max(column)


@st.composite
def confident(draw):
    drawn = draw(SETS)
    found = {}
    for document in drawn:
        labels = [label.name for label in document.schema.labels if label.kind == "entity"]
        made = [
            Entity(draw(st.sampled_from(labels)), draw(spans(document.text)), draw(st.floats(0, 1)))
            for _ in range(draw(st.integers(0, 4)) if labels else 0)
        ]
        gold = [replace(record, confidence=draw(st.floats(0, 1))) for record in document.records]
        found[document.id] = Answered(tuple(gold + made))
    return drawn, found


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(drawn=confident())
def test_a_calibration_never_falls_and_comes_back_from_its_file(tmp_path, drawn):
    documents, answers = drawn
    curve = reliability({"own": documents}, {"own": answers})
    assume(curve.count)
    assert 0 <= curve.ece <= 1
    calibration = fit_calibration(curve, min_records=1)
    calibration.save(tmp_path)
    again = Calibration.load(tmp_path)
    records = [record for answer in answers.values() for record in answer.records]
    after = calibration.apply(records)
    assert again.apply(records) == after
    pairs = sorted(
        (before.confidence, calibrated.confidence)
        for before, calibrated in zip(records, after, strict=True)
        if isinstance(before, Entity)
    )
    assert all(0 <= b <= 1 for _, b in pairs)
    assert all(x[1] <= y[1] for x, y in pairwise(pairs))


MARKUP = st.sampled_from(
    ["<script>x</script>", "</style>", "&lt;", '"><img src=x onerror=y>', "]]>"]
)


@given(documents(), st.lists(MARKUP, max_size=2))
def test_a_page_shows_every_word_and_runs_nothing(document, markup):
    hostile = "".join(markup)
    problem = Problem("extra_text", f"found {hostile}", hostile)
    item = Extraction(hostile + document.text, (), (problem,), (), 0.0)
    records = tuple(record for record in document.records)
    shown = Page(to_page([item, Extraction(document.text, records, (), (), 0.0)]))
    assert not {tag for tag, _ in shown.tags} & {"script", "img", "iframe", "object", "link"}
    assert not any(name.startswith("on") for _, of in shown.tags for name in of)
    words = "".join(shown.visible.split())
    for mark in markup:
        assert "".join(mark.split()) in words
    for record in records:
        assert all(c in words for c in record.label if c.isalnum() and c.isprintable())


@given(TEXTS)
def test_a_text_without_records_is_shown_as_it_is(text):
    shown = Page(to_page([Extraction(text, (), (), (), 0.0)]))
    kept = [c for c in text if c.isalnum() and c.isprintable()]
    words = iter(shown.visible)
    assert all(c in words for c in kept)  # in their order
