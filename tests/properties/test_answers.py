"""What holds of every answer, schema and text, tried on what hypothesis makes up."""

import ast
import json
import unicodedata

from hypothesis import assume, given
from hypothesis import strategies as st

from peft_taskmoe.uie import (
    Document,
    Entity,
    PromptFormat,
    Schema,
    build_example,
    completion_text,
    parse_answer,
    record_from_dict,
)
from peft_taskmoe.uie.alignment import Aligner, LongestSpans, TextIndex, normalise
from peft_taskmoe.uie.prompt import string_literal
from peft_taskmoe.uie.records import PROBLEM_KINDS, record_key, shift_record, spans_of
from strategies import TEXTS, WORDS, broken_answers, documents, records, schemas, spans

FORMATS = st.sampled_from([PromptFormat("dataclass"), PromptFormat("compact")])


def keys(records):
    return [record_key(record) for record in records]


# answers


@given(broken_answers(), st.booleans())
def test_any_answer_gives_records_of_the_text_and_problems(broken, keep):
    answer, document = broken
    parsed = parse_answer(answer, document.schema, document.text, keep_not_found=keep)
    assert parsed.raw == answer and len(parsed.sources) == len(parsed.records)
    assert {problem.kind for problem in parsed.problems} <= set(PROBLEM_KINDS)
    for record, (start, end) in zip(parsed.records, parsed.sources, strict=True):
        assert 0 <= start < end <= len(answer)
        kind = type(record).__name__.lower()
        assert document.schema.get(kind, record.label) is not None
        for span in spans_of(record):
            if span.alignment == "not_found":
                assert keep and span.start is None
            else:
                assert document.text[span.start : span.end] == span.text != ""
    assert len(set(keys(parsed.records))) == len(parsed.records)


@given(st.text(max_size=60), schemas(), TEXTS)
def test_any_string_is_an_answer(answer, schema, text):
    assert parse_answer(answer, schema, text).raw == answer


@given(documents(), FORMATS)
def test_what_is_written_is_read_back(document, format):
    answer = completion_text(document.records, document.text, document.schema, format=format)
    parsed = parse_answer(answer, document.schema, document.text)
    assert set(keys(parsed.records)) == set(keys(document.records)) and parsed.problems == ()
    again = completion_text(parsed.records, document.text, document.schema, format=format)
    assert again == answer


@given(documents(), FORMATS, st.data())
def test_a_prefix_of_an_answer_gives_the_records_that_are_complete(document, format, data):
    answer = completion_text(document.records, document.text, document.schema, format=format)
    whole = parse_answer(answer, document.schema, document.text).records
    cut = answer[: data.draw(st.integers(0, len(answer) - 1))]
    parsed = parse_answer(cut, document.schema, document.text)
    assert keys(parsed.records) == keys(whole)[: len(parsed.records)]
    assert "truncated" in [problem.kind for problem in parsed.problems]


@given(documents(), FORMATS, st.sampled_from(["", "\n\n", "\nNote that", " # done", "\n[Other("]))
def test_words_behind_an_answer_change_no_record(document, format, behind):
    answer = completion_text(document.records, document.text, document.schema, format=format)
    alone = parse_answer(answer, document.schema, document.text)
    parsed = parse_answer(answer + behind, document.schema, document.text)
    assert keys(parsed.records) == keys(alone.records)
    assert {problem.kind for problem in parsed.problems} <= {"extra_text", "truncated"}


@given(broken_answers())
def test_keeping_what_is_not_in_the_text_only_adds(broken):
    answer, document = broken
    fewer = parse_answer(answer, document.schema, document.text)
    more = parse_answer(answer, document.schema, document.text, keep_not_found=True)
    entities = [r for r in keys(fewer.records) if r[0] == "entity"]
    assert set(entities) <= set(keys(more.records))
    assert [p.kind for p in fewer.problems].count("not_in_text") <= len(more.problems)


@given(documents(), FORMATS)
def test_a_prompt_ends_where_the_answer_begins_and_holds_text_and_labels(document, format):
    example = build_example(document, format)
    assert example.prompt.startswith(example.schema_text) and example.prompt.endswith("result =")
    assert string_literal(document.text) in example.prompt
    for label in document.schema.labels:
        assert example.names.class_of(label) in example.schema_text
    assert set(keys(example.document.records)) == set(keys(document.records))


@given(st.text())
def test_a_literal_is_one_line_that_python_reads_back(text):
    literal = string_literal(text)
    assert literal.splitlines() == [literal] and ast.literal_eval(literal) == text


# places in a text


@given(TEXTS, WORDS)
def test_exact_places_are_those_of_a_plain_search(text, mention):
    found = TextIndex(text).occurrences(mention)
    places = [(i, i + len(mention)) for i in range(len(text)) if text.startswith(mention, i)]
    if places:
        assert found.alignment == "exact" and sorted(found.places) == places
    else:
        assert found.alignment != "exact"
    assert list(found.places[: found.alone]) == sorted(found.places[: found.alone])


OTHERWISE = [
    str.upper,
    str.casefold,
    lambda words: f" {words}\n",
    lambda words: words.replace("-", "–"),
]
OTHERWISE += [lambda words: unicodedata.normalize("NFKD", words)]


@given(TEXTS, st.data(), st.sampled_from(OTHERWISE))
def test_words_written_otherwise_are_found_by_their_form(text, data, change):
    span = data.draw(spans(text))
    mention = change(span.text)
    assume(normalise(mention) == normalise(span.text) != "")
    index = TextIndex(text)
    if normalise(change(text)) == normalise(text) != "":
        assert index.occurrences(change(text)).places
    found = index.occurrences(mention)
    for start, end in found.places:
        assert 0 <= start < end <= len(text)
        assert normalise(text[start:end]) == normalise(mention)


@given(TEXTS, st.data())
def test_numbers_and_places_are_inverse(text, data):
    index, mention = TextIndex(text), data.draw(spans(text)).text
    for number, place in enumerate(index.occurrences(mention).places, start=1):
        assert index.nth(mention, number) == place and index.number(mention, place) == number
    assert index.nth(mention, 0) is index.nth(mention, number + 1) is None


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 5)), max_size=12))
def test_longest_spans_cover_what_lies_inside_one_of_them(drawn):
    longest, places = LongestSpans(), [(start, start + size) for start, size in drawn]
    for place in places:
        longest.add(place)
    for start in range(10):
        for end in range(start + 1, 15):
            inside = any(a <= start and end <= b and (a, b) != (start, end) for a, b in places)
            assert longest.covers((start, end)) == inside


@given(TEXTS, st.data())
def test_records_of_one_label_never_take_a_place_twice(text, data):
    aligner, seen = Aligner(TextIndex(text)), set()
    for mention in data.draw(st.lists(spans(text).map(lambda span: span.text), max_size=8)):
        place = aligner.free_place("label", mention)
        if place is None:
            places = aligner.index.occurrences(mention).places
            assert set(places) <= seen
        else:
            assert place not in seen and text[place[0] : place[1]] == mention
            aligner.take_mention("label", place)
            seen.add(place)


# schemas, records, documents


@given(schemas())
def test_a_schema_is_its_json(schema):
    again = Schema.from_dict("UIE", json.loads(json.dumps(schema.to_dict())))
    assert again.to_dict() == schema.to_dict() and Schema.of(again, schema.to_dict()) == again
    assert set(again.labels) == set(schema.labels)


@given(documents())
def test_a_document_is_its_row(document):
    row = json.loads(json.dumps(document.to_dict()))
    again = Document.from_dict(row)
    assert again.to_dict() == row and again.records == document.records


@given(schemas(), TEXTS, st.data())
def test_a_record_is_its_dict_and_moves_there_and_back(schema, text, data):
    record = data.draw(records(schema, text))
    assert record_from_dict("UIE", record.to_dict()) == record
    moved = shift_record(record, 7)
    assert shift_record(moved, -7) == record != moved
    assert isinstance(record, Entity) or type(moved) is type(record)
