"""Records and documents as JSON, both ways, and the errors of rows that cannot be read."""

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_taskmoe.uie.records import (
    Argument,
    Document,
    Entity,
    Event,
    Relation,
    RowReader,
    Span,
    record_from_dict,
    record_key,
    shift_record,
    spans_of,
)

TEXT = "Ada met Bob in Rome."
ADA = {"text": "Ada", "start": 0, "end": 3}
BOB = {"text": "Bob", "start": 8, "end": 11}
MET = {"text": "met", "start": 4, "end": 7}
PER = {"label": "PER", **ADA}


def row(id_, task, schema, *annotations, **more):
    annotations = list(annotations)
    return {
        "id": id_,
        "text": TEXT,
        "task": task,
        "schema": schema,
        "annotations": annotations,
    } | more


def meet(*arguments):
    return {"type": "Meet", "trigger": MET, "arguments": list(arguments)}


EVENTS = {"Meet": {"description": "meets", "roles": ["Who", "Where"]}}
KNOWS = {"relation": "knows", "head": {"type": "PER", **ADA}, "tail": BOB, "confidence": 1.0}
EVE = {"relation": "knows", "head": ADA, "tail": {"text": "Eve", "start": None, "end": None}}
ALL = {"entities": {"PER": "people"}, "relations": {"knows": ""}, "events": EVENTS}
SURE = {"label": "x-y", **BOB, "alignment": "normalised", "confidence": 0.5}
ROWS = [
    row("a", "NER", {"PER": "people", "x-y": ""}, PER, SURE, split="test", meta={"k": [1]}),
    row("b", "RE", {"knows": "knows"}, KNOWS, entities=[PER]),
    row("c", "EE", EVENTS, meet({"role": "Who", **ADA}, {"role": "Who", **BOB})),
    row("d", "EAE", EVENTS, meet()),
    row("e", "UIE", ALL, PER, EVE, meet()),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["task"])
def test_rows_come_back(row):
    document = Document.from_dict(row)
    assert document.to_dict() == row
    assert json.loads(json.dumps(document.to_dict())) == row
    assert Document.from_dict(document.to_dict()) == document
    assert len({document, Document.from_dict(row)}) == 1
    for record, annotation in zip(document.records, row["annotations"], strict=True):
        assert record_from_dict(row["task"], record.to_dict()) == record
        assert record.to_dict() == annotation


def test_given_events_have_no_arguments():
    document = Document.from_dict(ROWS[2])
    assert document.given == ()
    eae = Document(document.id, TEXT, "EAE", document.schema, document.records)
    assert eae.given == (Event("Meet", Span("met", 4, 7)),)


def test_keys_tell_records_apart_by_label_and_place_only():
    ada, bob = Span("Ada", 0, 3), Span("Bob", 8, 11)
    same = Entity("PER", Span("ADA", 0, 3, "normalised"))
    assert record_key(Entity("PER", ada, 0.5)) == record_key(same)
    assert record_key(Relation("knows", ada, bob, "PER")) == record_key(Relation("knows", ada, bob))
    who, whom = Argument("Who", ada), Argument("Whom", bob)
    events = Event("Meet", bob, (who, whom)), Event("Meet", bob, (whom, who))
    assert len(set(map(record_key, events))) == 1
    different = [
        Entity("PER", ada),
        Entity("LOC", ada),
        Entity("PER", bob),
        Entity("PER", Span("Ada")),
        Relation("PER", ada, bob),
        Relation("PER", bob, ada),
        Event("PER", ada),
        Event("PER", ada, (who,)),
        Event("PER", ada, (Argument("Who", bob),)),
    ]
    assert len({record_key(record) for record in different}) == len(different)


def test_shifted_records():
    document = Document.from_dict(ROWS[2])
    (event,) = document.records
    moved = shift_record(event, 10)
    places = [(span.text, span.start, span.end) for span in spans_of(moved)]
    assert places == [("met", 14, 17), ("Ada", 10, 13), ("Bob", 18, 21)]
    assert shift_record(moved, -10) == event
    lost = Entity("PER", Span("Eve", alignment="not_found"))
    assert shift_record(lost, 10) == lost


@pytest.mark.parametrize(
    ("annotation", "message"),
    [
        ("Ada", r"`annotations\[0\]` is `'Ada'`, not an object"),
        ({"label": "PER"}, r"`annotations\[0\]` needs its words as text"),
        ({"text": "Ada"}, r"`annotations\[0\]` has no `label` \(keys: text\)"),
        (PER | {"confidence": "1"}, "has the confidence `'1'`, which is no number"),
        (PER | {"start": 1, "end": 4}, r"but text\[1:4\] is `'da '`.*stands at 0"),
        (PER | {"end": None}, "needs two integers, start and end; found 0, None"),
        (PER | {"text": ""}, "needs its words as text"),
        (PER | {"alignment": "lost"}, "has to be one of `exact`, `normalised`, `not_found`"),
    ],
)
def test_the_first_fault_of_a_row_is_an_error(annotation, message):
    """`test_bad_lines_are_reported_by_number` has the others."""
    with pytest.raises(ValueError, match=message):
        Document.from_dict(ROWS[0] | {"annotations": [annotation]})


def test_missing_keys_and_unknown_tasks():
    with pytest.raises(ValueError, match=r"The key `schema` is missing \(keys: id, text, task\)"):
        Document.from_dict({"id": "a", "text": "", "task": "NER"})
    with pytest.raises(ValueError, match="`X` is no task"):
        record_from_dict("X", {})
    with pytest.raises(ValueError, match=r"Document `a` has task `X`. Write one of: `NER`"):
        Document("a", "", "X", Document.from_dict(ROWS[0]).schema)


KEYS = "id text task schema annotations entities label start end head tail relation type trigger"
KEY = st.sampled_from([*KEYS.split(), "arguments", "role", "alignment", "confidence"])
LEAF = st.sampled_from([None, True, 0, 3, float("nan"), "", "PER", "Ada", "UIE", "\ud800"])
JSON = st.recursive(
    LEAF, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEY, inner, max_size=5)
)


@settings(max_examples=500, deadline=None)
@given(st.sampled_from(ROWS), st.dictionaries(KEY, JSON, max_size=3), JSON)
@pytest.mark.filterwarnings("ignore:The annotations have keys")
@pytest.mark.slow
def test_any_row_is_a_document_or_a_value_error(row, changes, record):
    for changed in (row | changes, row | {"annotations": [record]}):
        with contextlib.suppress(ValueError):
            assert Document.from_dict(changed).to_dict()["text"] == changed["text"]
        strict = RowReader(strict=True)
        read = strict.document(changed)
        assert strict.faults or read == Document.from_dict(changed)


def test_keys_that_are_not_kept_are_said():
    with pytest.warns(UserWarning, match="The annotations have keys that are not kept: `nested`"):
        record_from_dict("NER", {"label": "PER", **ADA, "nested": True})


def test_reading_and_writing_answers_needs_no_torch():
    root = Path(__file__).parents[2]
    names = ("prompt", "parse", "data.conversion", "data.training", "scoring.comparison")
    # The packages' own __init__ are stepped over: they hold names that do need torch.
    code = (
        "import sys, types\n"
        "for name in ('peft_taskmoe', 'peft_taskmoe.uie'):\n"
        "    module = sys.modules[name] = types.ModuleType(name)\n"
        "    module.__path__ = [name.replace('.', '/')]\n"
        f"for name in {names!r}: __import__('peft_taskmoe.uie.' + name)\n"
        "heavy = {'torch', 'transformers', 'peft', 'pydantic', 'datasets'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, check=True, capture_output=True, text=True
    )
    assert done.stdout == "[]\n"
