"""What holds of every file and every long text."""

import contextlib
import json
from functools import partial

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from peft_taskmoe.uie import Entity, ReadError, Span, read_conll, read_jsonl, write_jsonl
from peft_taskmoe.uie.data.conversion import READERS
from peft_taskmoe.uie.data.tokens import join_tokens
from peft_taskmoe.uie.extraction.windows import every_place, merge_windows, split_windows
from peft_taskmoe.uie.records import record_key, shift_record, spans_of
from strategies import JSON, TEXTS, documents, spans

pytestmark = pytest.mark.filterwarnings("ignore")
# Every example writes all the files that it reads, so that they may share a folder.
in_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
PLAIN = st.text(st.characters(categories=["L", "N", "P"]), min_size=1, max_size=6)
TOKENS = PLAIN.filter(lambda token: not token.startswith("#") and "-DOCSTART-" not in token)
NEEDED = {"brat": {"task": "NER"}, "text": {"schema": {"Person": ""}}}
SUFFIXES = {"brat": ".ann", "spacy": ".spacy"}


def entities(document):
    for record in document.records:
        assert document.text[record.span.start : record.span.end] == record.span.text
    return {(record.label, record.span.start, record.span.end) for record in document.records}


@st.composite
def tagged(draw):
    """A text of plain words with entities that do not touch."""
    words = draw(st.lists(TOKENS, min_size=1, max_size=8))
    labels = [draw(st.sampled_from([None, None, "PER", "creative-work"])) for _ in words]
    places, at = [], 0
    for word, label in zip(words, labels, strict=True):
        if label:
            places.append((label, at, at + len(word)))
        at += len(word) + 1
    return words, labels, " ".join(words), set(places)


@in_folder
@given(kind=st.sampled_from(sorted(READERS)), content=st.binary(max_size=80), value=JSON)
def test_a_reader_reads_any_file_or_says_what_is_wrong(tmp_path, kind, content, value):
    path = (tmp_path / "file").with_suffix(SUFFIXES.get(kind, ".jsonl"))
    read = partial(READERS[kind], path, **NEEDED.get(kind, {}))
    texts = [content, json.dumps(value).encode(), json.dumps([value]).encode() + content]
    for data in texts:
        path.write_bytes(data)
        path.with_suffix(".txt").write_bytes(b"Ada met Bob.") if kind == "brat" else None
        with contextlib.suppress(ReadError):
            read()
        report = read(on_error="collect")
        for document in report.documents:
            for record in document.records:
                for span in spans_of(record):
                    assert document.text[span.start : span.end] == span.text


@in_folder
@given(drawn=st.lists(documents(), min_size=1, max_size=3, unique_by=lambda document: document.id))
def test_documents_come_back_from_jsonl(tmp_path, drawn):
    write_jsonl(drawn, tmp_path / "a.jsonl")
    read = read_jsonl(tmp_path / "a.jsonl", on_error="collect")
    assert [x.to_dict() for x in read.documents] == [x.to_dict() for x in drawn]


@in_folder
@given(drawn=tagged())
def test_tags_of_conll_are_mentions(tmp_path, drawn):
    words, labels, text, places = drawn
    lines = [
        f"{word}\t{'O' if label is None else 'B-' + label}"
        for word, label in zip(words, labels, strict=True)
    ]
    (tmp_path / "a.conll").write_text("\n".join(lines) + "\n", encoding="utf-8")
    schema = {"PER": "people", "creative-work": ""}
    (document,) = read_conll(tmp_path / "a.conll", schema=schema).documents
    assert document.text == text and entities(document) == places


@in_folder
@given(drawn=tagged())
def test_exports_of_annotation_tools_are_mentions(tmp_path, drawn):
    _, _, text, places = drawn
    brat = [
        f"T{i}\t{label} {start} {end}\t{text[start:end]}"
        for i, (label, start, end) in enumerate(sorted(places))
    ]
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    (tmp_path / "a.ann").write_text("\n".join(brat), encoding="utf-8")
    row = {"id": 1, "text": text, "label": [[s, e, label] for label, s, e in places]}
    (tmp_path / "d.jsonl").write_text(json.dumps(row), encoding="utf-8")
    result = [
        {
            "id": str(i), "type": "labels", "from_name": "label", "to_name": "text",
            "value": {"start": s, "end": e, "text": text[s:e], "labels": [label]},
        }
        for i, (label, s, e) in enumerate(places)
    ]  # fmt: skip
    task = [{"id": 1, "data": {"text": text}, "annotations": [{"result": result}]}]
    (tmp_path / "s.json").write_text(json.dumps(task), encoding="utf-8")
    if not places:
        return  # a file without labels has no schema
    for format, name in (("brat", "a.ann"), ("doccano", "d.jsonl"), ("label-studio", "s.json")):
        (document,) = READERS[format](tmp_path / name).documents
        assert document.text == text and entities(document) == places


@given(st.lists(TOKENS, min_size=1, max_size=8), st.booleans())
def test_tokens_stand_where_they_are_said_to(tokens, detokenize):
    text, places = join_tokens(tokens, detokenize)
    behind = 0
    for token, (start, end) in zip(tokens, places, strict=True):
        assert behind <= start < end <= len(text)
        assert text[start:end] == token or token in ("``", "''")
        behind = end


# windows


@given(TEXTS, st.integers(2, 40), st.integers(0, 20))
def test_windows_fit_and_hold_every_character(text, most, overlap):
    windows = split_windows(text, most, overlap=overlap)
    covered = set()
    for window in windows:
        assert window.text == text[window.start : window.end] and 0 < len(window.text) <= most
        covered |= set(range(window.start, window.end))
    assert covered == set(range(len(text)))


@given(TEXTS, st.integers(4, 40), st.data())
def test_records_of_windows_are_put_together_again(text, most, data):
    windows = split_windows(text, most, overlap=10)
    drawn = data.draw(st.lists(spans(text), max_size=6, unique=True))
    gold = [Entity(f"label {i}", span) for i, span in enumerate(drawn)]  # none inside another
    inside = [
        [x for x in gold if window.start <= x.span.start and x.span.end <= window.end]
        for window in windows
    ]
    found = [
        (window, [shift_record(record, -window.start) for record in whole])
        for window, whole in zip(windows, inside, strict=True)
    ]
    merged = merge_windows(found)
    assert {record_key(x) for x in merged} == {record_key(x) for part in inside for x in part}
    assert [x.span.start for x in merged] == sorted(x.span.start for x in merged)


@given(TEXTS, st.data())
def test_every_place_adds_only_places_of_the_same_words(text, data):
    drawn = data.draw(st.lists(spans(text), max_size=4))
    records = [Entity("PER", Span(x.text, x.start, x.end)) for x in drawn]
    more = every_place(text, records)
    assert {record_key(x) for x in records} <= {record_key(x) for x in more}
    for record in more:
        assert text[record.span.start : record.span.end] == record.span.text
        assert record.span.text in {x.text for x in drawn}
