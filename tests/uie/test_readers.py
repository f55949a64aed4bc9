"""Files of other tools as they are found: each is read rightly, or reported."""

import json
import sys
from pathlib import Path

import pytest

from peft_taskmoe.uie import (
    ReadError,
    Relation,
    Schema,
    TokenTags,
    convert,
    read_brat,
    read_conll,
    read_doccano,
    read_iepile,
    read_jsonl,
    read_label_studio,
    read_spacy,
    read_text,
)


def write(path, *lines, newline="\n"):
    shown = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("".join(line + newline for line in shown), encoding="utf-8", newline="")
    return path


def found(document):
    """Every record as (label, words): offsets are checked on the way."""
    records = []
    for record in document.records:
        spans = [record.head, record.tail] if isinstance(record, Relation) else [record.span]
        assert all(document.text[span.start : span.end] == span.text for span in spans)
        records.append((record.label, *(span.text for span in spans)))
    return records


def kinds(report):
    return [(problem.kind, problem.line) for problem in report.problems]


# CoNLL


@pytest.mark.parametrize("blank", ["\u00a0", "\u2009", "\u3000", " ", "\x0b"])
def test_white_space_inside_a_token_of_a_file_with_tabs_stays(tmp_path, blank):
    lines = ["Elle\tO", "a\tO", f"10{blank}000\tB-NUM", f"{blank}\tI-NUM", "euros\tO"]
    (document,) = read_conll(write(tmp_path / "a.conll", *lines)).documents
    assert document.text == f"Elle a 10{blank}000 {blank} euros"
    assert found(document) == [("NUM", f"10{blank}000 {blank}")]


@pytest.mark.parametrize(
    "line", ["New York O", "a b c d O", "alone", "\tO", "Bob\t"], ids=lambda line: repr(line)
)
def test_a_line_with_other_columns_costs_its_sentence(tmp_path, line):
    path = write(tmp_path / "a.conll", "Ann B-PER", "saw O", line, "", "Bob B-PER")
    report = read_conll(path, on_error="collect")
    assert kinds(report) == [("columns", 3)]
    assert [document.text for document in report.documents] == ["Bob"]


def test_mixed_and_repeated_separators(tmp_path):
    lines = ["Ann  B-PER", "Lee\tI-PER ", "saw \t\t O", " Bob   B-PER"]
    path = write(tmp_path / "a.conll", *(lines[:2]), "", lines[2], "", lines[3], newline="\r\n")
    report = read_conll(path)
    assert [document.text for document in report.documents] == ["Ann Lee", "saw", "Bob"]


def test_comments_before_sentences_are_found(tmp_path):
    lines = [
        "# id 1 domain=en", "Ada _ _ B-PER", "# _ _ O", "ran _ _ O", "",
        "# id 2\tdomain=en", "# text = Bob", "#tag _ _ O", "#begin _ _ B-X",
    ]  # fmt: skip
    report = read_conll(write(tmp_path / "a.conll", *lines))
    assert [document.text for document in report.documents] == ["Ada # ran", "#tag #begin"]
    (note,) = report.problems
    assert "3 lines that start with `#` were taken for comments" in note.message
    report = read_conll(tmp_path / "a.conll", comment="# ")
    assert [document.text for document in report.documents] == ["Ada ran", "#tag #begin"]


def test_detokenized_text_keeps_the_mentions(tmp_path):
    tokens = ["She", "said", ":", "``", "It", "'s", "5", "%", ",", "-LRB-", "or", ")"]
    tokens += ['"', "so", '"', "in", "Rome", ".", "''"]
    tags = ["B-NE" if token in ("Rome", "5") else "O" for token in tokens]
    tags[tokens.index("%")] = "I-NE"
    lines = [f"{token} {tag}" for token, tag in zip(tokens, tags, strict=True)]
    path = write(tmp_path / "a.conll", *lines)
    (document,) = read_conll(path, detokenize=True).documents
    assert document.text == 'She said: "It\'s 5%, (or) "so" in Rome."'
    assert found(document) == [("NE", "5%"), ("NE", "Rome")]
    own = read_conll(path, detokenize=lambda tokens: "  ".join(tokens)).documents[0]
    assert found(own) == [("NE", "5  %"), ("NE", "Rome")]
    with pytest.raises(ValueError, match="The detokenized text has no `She` behind character 0"):
        read_conll(path, detokenize=lambda tokens: "")
    row = {"tokens": ["北京", "很", "大", "Ann", "ran"], "ner_tags": ["B-LOC", "O", "O", "O", "O"]}
    assert TokenTags({"LOC": ""}, detokenize=True)(row)["text"] == "北京很大Ann ran"


# BRAT


def brat(folder, text, *lines):
    (folder / "a.txt").write_text(text, encoding="utf-8", newline="")
    write(folder / "a.ann", *lines)
    return folder / "a.txt"


def test_brat_offsets_may_count_a_windows_line_end_once(tmp_path):
    text = "Ann left.\r\nShe ran.\r\nHe sat."
    path = brat(tmp_path, text, "T1\tPER 0 3\tAnn", "T2\tPER 10 13\tShe", "T3\tPER 19 21\tHe")
    (document,) = read_brat(path, "NER").documents
    assert document.text == text.replace("\r\n", "\n")
    assert [words for _, words in found(document)] == ["Ann", "She", "He"]
    path = brat(tmp_path, text, "T1\tPER 11 14\tShe")  # and may count it twice
    assert read_brat(path, "NER").documents[0].text == text


def test_brat_in_one_pass(tmp_path):
    lines = ["T1\tPER 0 3\tAnn", "T2\tMeet 4 7\tmet", "T3\tPER 8 11\tBob"]
    lines.append("R1\tknows Arg1:T1 Arg2:T3")
    path = brat(tmp_path, "Ann met Bob", *lines, "E1\tMeet:T2 Who:T1 Who2:T3")
    report = convert(path, tmp_path / "out.jsonl", "brat", task="UIE")
    (document,) = read_jsonl(tmp_path / "out.jsonl").documents
    assert report.problems == [] and report.documents == [document]
    assert [record.label for record in document.records] == ["PER", "PER", "knows", "Meet"]
    assert document.schema.to_dict() == {
        "entities": {"PER": ""},
        "relations": {"knows": ""},
        "events": {"Meet": {"description": "", "roles": ["Who"]}},
    }
    whole = {"entities": {"PER": "people"}, "relations": {"knows": "acquaintance"}}
    documents = read_brat(path, "RE", schema=whole).documents
    assert documents[0].schema == Schema.from_dict("RE", {"knows": "acquaintance"})


def test_brat_relations_lead_from_arg1_to_arg2(tmp_path):
    lines = ["T1\tPER 0 3\tAnn", "T2\tPER 8 11\tBob"]
    links = ["R1\tmet Arg2:T2 Arg1:T1", "R2\tsaw Arg1:T1 Arg2:T2", "R3\tled Who:T2 Whom:T1"]
    (document,) = read_brat(brat(tmp_path, "Ann met Bob", *lines, *links), "RE").documents
    pairs = [("met", "Ann", "Bob"), ("saw", "Ann", "Bob"), ("led", "Bob", "Ann")]
    assert found(document) == pairs


def test_a_brat_line_with_the_id_of_another_is_an_error(tmp_path):
    lines = ["T1\tPER 0 3\tAnn", "T2\tMeet 4 7\tmet", "T1\tPER 8 11\tBob"]
    lines += ["E1\tMeet:T2 Who:T1", "E1\tMeet:T2 Whom:T1"]
    report = read_brat(brat(tmp_path, "Ann met Bob", *lines), on_error="collect")
    assert kinds(report) == [("brat", 3), ("brat", 5)]
    assert "An earlier line has the id `T1`" in report.problems[0].message
    person, event = report.documents[0].records
    assert (person.span.text, event.arguments[0].role) == ("Ann", "Who")


@pytest.mark.parametrize("schema", [{"PER": "people"}, {"entities": {"PER": ""}}, {}])
def test_relations_with_a_schema_of_entities_are_refused(tmp_path, schema):
    path = brat(tmp_path, "Ann met Bob", "T1\tPER 0 3\tAnn")
    with pytest.raises(ReadError, match=r"Pass one of relations"):
        convert(path, tmp_path / "out.jsonl", "brat", task="RE", schema=schema)
    report = read_brat(path, "RE", schema=schema, on_error="collect")
    assert (report.documents, [problem.kind for problem in report.errors]) == ([], ["schema"])
    assert not (tmp_path / "out.jsonl").exists()


# Exports of tools


ROCKET = "Ariane 5 🚀 by Arianespace, of Evry."
LINK = {"type": "relation", "from_id": "a", "to_id": "b"}


def region(name, start, end, label, words=None):
    value = {"start": start, "end": end, "labels": [label], "text": words}
    value = {key: given for key, given in value.items() if given is not None}
    return {"id": name, "type": "labels", "from_name": "l", "to_name": "t", "value": value}


def test_label_studio(tmp_path):
    regions = [
        region("a", 0, 8, "Launcher", "Ariane 5"),
        region("b", 15, 26, "Firm", "Arianespace"),  # as a browser counts: behind a rocket
        region("c", None, None, "Place", "Evry"),
        {"id": "d", "type": "choices", "value": {"choices": ["good"]}},
        LINK | {"direction": "left", "labels": ["built"]},
    ]
    cancelled = {"was_cancelled": True, "result": []}
    item = {"id": 7, "data": {"text": ROCKET}, "annotations": [cancelled, {"result": regions}]}
    empty = {"id": 8, "data": {"title": "Nothing."}, "annotations": [{"result": []}] * 2}
    path = tmp_path / "a.json"
    untouched = [{"data": {"text": "a"}, "annotations": one} for one in ([], [cancelled])]
    path.write_text(json.dumps([item, empty, *untouched], indent=1), encoding="utf-8-sig")
    report = read_label_studio(path)
    assert kinds(report) == [*(("unsupported", n) for n in (1, 2, 3, 4)), ("aligned", 1)]
    assert "Nobody annotated the text" in report.problems[2].message
    assert "1 mentions without offsets were placed" in report.problems[4].message
    document, other = report.documents
    assert (document.id, document.task, other.records) == ("7", "UIE", ())
    entities = [("Launcher", "Ariane 5"), ("Firm", "Arianespace"), ("Place", "Evry")]
    assert found(document) == [*entities, ("built", "Arianespace", "Ariane 5")]
    smallest = {"id": 7, "text": ROCKET, "label": [{"start": 0, "end": 8, "labels": ["Launcher"]}]}
    path.write_text(json.dumps([smallest]), encoding="utf-8")
    assert found(read_label_studio(path).documents[0]) == [("Launcher", "Ariane 5")]


def test_doccano(tmp_path):
    entities = [
        {"id": 1, "label": "Launcher", "start_offset": 0, "end_offset": 8},
        {"id": 2, "label": "Firm", "start_offset": 14, "end_offset": 25},
        {"id": 3, "label": "Place", "text": "Evry"},
    ]
    line = {"id": 3, "text": ROCKET, "entities": entities, "Comments": [], "source": "x"}
    line["relations"] = [{"id": 1, "from_id": 2, "to_id": 1, "type": "built"}]
    report = read_doccano(write(tmp_path / "a.jsonl", line, "", ""))
    assert kinds(report) == [("aligned", 1)]
    (document,) = report.documents
    assert found(document)[2:] == [("Place", "Evry"), ("built", "Arianespace", "Ariane 5")]
    assert document.extra == {"source": "x"}
    old = [{"data": ROCKET, "label": [[0, 8, "Launcher"]]}, {"text": "None.", "labels": []}]
    report = read_doccano(write(tmp_path / "old.jsonl", *old))
    assert [document.id for document in report.documents] == ["old-1", "old-2"]
    assert found(report.documents[0]) == [("Launcher", "Ariane 5")]
    report = read_doccano(write(tmp_path / "both.jsonl", line | {"label": [], "id": 1}))
    assert len(report.documents[0].records) == 4
    report = read_doccano(write(tmp_path / "two.jsonl", {**line, **old[0], "relations": []}))
    assert len(report.documents[0].records) == 1
    assert "only the first is read" in report.problems[0].message
    (document,) = read_doccano(tmp_path / "a.jsonl", task="RE", schema={"built": "made"}).documents
    assert [entity.label for entity in document.entities] == ["Launcher", "Firm", "Place"]


def test_mentions_that_share_an_id_are_all_kept_and_the_first_has_the_relations(tmp_path):
    entities = [(0, 8, "Launcher"), (14, 25, "Firm"), (0, 8, "Launcher")]
    line = {"text": ROCKET, "relations": [{"from_id": 1, "to_id": 1, "type": "is"}]}
    line["entities"] = [
        {"id": 1, "label": label, "start_offset": start, "end_offset": end}
        for start, end, label in entities
    ]
    report = read_doccano(write(tmp_path / "a.jsonl", line))
    both = [("Launcher", "Ariane 5"), ("Firm", "Arianespace")]
    assert found(report.documents[0]) == [*both, ("is", "Ariane 5", "Ariane 5")]
    regions = [region("a", 0, 8, "Launcher"), region("a", 0, 8, "Vehicle")]
    report = read_label_studio(write(tmp_path / "b.jsonl", studio(*regions, text=ROCKET)))
    assert found(report.documents[0]) == [("Launcher", "Ariane 5"), ("Vehicle", "Ariane 5")]
    spans = [FIRST | {"label": "Launcher"}, FIRST | {"label": "Vehicle"}]
    report = read_spacy(write(tmp_path / "c.jsonl", {"text": ROCKET, "spans": spans}))
    assert found(report.documents[0]) == [("Launcher", "Ariane 5"), ("Vehicle", "Ariane 5")]
    assert report.problems == []


def test_utf_16_offsets_are_told_from_characters_by_all_regions_of_a_text(tmp_path):
    text = "\N{ROCKET}\N{ROCKET} haha and Bob"
    regions = [region("a", 5, 7, "laugh", "ha"), region("b", 14, 17, "person", "Bob")]
    path = write(tmp_path / "a.jsonl", studio(*regions, text=text))
    spans = [record.span for record in read_label_studio(path).documents[0].records]
    assert [(span.text, span.start) for span in spans] == [("ha", 3), ("Bob", 12)]
    path = write(tmp_path / "b.jsonl", studio(regions[0], text=text))
    assert read_label_studio(path).documents[0].records[0].span.start == 5


def studio(*results, text="Ann"):
    return {"data": {"text": text}, "annotations": [{"result": list(results)}]}


@pytest.mark.parametrize(
    ("read", "line", "kind", "message"),
    [
        (read_doccano, {"text": "Ann", "label": ["pos"]}, "row", "not places in the text"),
        (read_doccano, {"text": "Ann", "label": [[0, 4, "P"]]}, "offsets", "not have the mention"),
        (read_doccano, {"text": "Ann", "label": [[3, 0, "P"]]}, "offsets", "of `P` at 3:0"),
        (read_doccano, {"text": "Ann", "label": [[0, 3, 5]]}, "row", "a label is `5`, not a name"),
        (read_doccano, {"text": 3, "label": []}, "row", "its text is `3`"),
        (read_doccano, {"id": []}, "row", "KeyError"),
        (read_doccano, [1], "row", "The item is not in the format"),
        (read_label_studio, {"data": {"a": "x", "b": "y"}}, "row", "it has no `text`"),
        (read_label_studio, studio(region("a", 0, 3, "P", "Bob")), "offsets", "`'Bob'` of `P` at"),
        (read_label_studio, studio(region("a", None, None, "P", "Bob")), "not_in_text", "'Bob'"),
        (read_label_studio, studio(LINK), "row", "a relation is `''`, not a name"),
        (read_label_studio, studio(LINK | {"labels": ["r"]}), "reference", "no usable mention `a`"),
        (read_spacy, {"text": "Ann", "spans": 5, "ents": [[0]]}, "row", "ValueError"),
    ],
)
def test_items_that_cannot_be_read_are_reported(tmp_path, read, line, kind, message):
    path = write(tmp_path / "a.jsonl", line)
    with pytest.raises(ReadError, match=message) as caught:
        read(path, schema={"P": "", "Q": ""} if kind != "reference" else None)
    assert (caught.value.problem.kind, caught.value.problem.line) == (kind, 1)


FIRST, SECOND = {"start": 0, "end": 8}, {"start": 14, "end": 25}
TASK = {
    "text": ROCKET,
    "spans": [FIRST | {"label": "Launcher"}, SECOND | {"label": "Firm"}],
    "relations": [{"label": "built", "head_span": SECOND, "child_span": FIRST}],
    "answer": "accept",
}


def test_spacy_and_prodigy_lines(tmp_path):
    lines = [
        TASK,
        TASK | {"answer": "reject"},
        {"text": ROCKET, "ents": [{"start": 0, "end": 8, "label": "Launcher"}], "spans": {}},
    ]
    report = read_spacy(write(tmp_path / "a.jsonl", *lines))
    assert kinds(report) == [("unsupported", 2)]
    assert [found(document) for document in report.documents] == [
        [("Launcher", "Ariane 5"), ("Firm", "Arianespace"), ("built", "Arianespace", "Ariane 5")],
        [("Launcher", "Ariane 5")],
    ]
    groups = {"sc": [SECOND | {"label": "Firm"}], "empty": []}
    lines = [lines[2] | {"spans": groups}, [ROCKET, {"entities": [], "spans": groups}], TASK]
    report = read_spacy(write(tmp_path / "groups.jsonl", *lines))
    assert kinds(report) == [("unsupported", 1), ("unsupported", 2)]
    assert "The span groups `sc` are not read" in report.problems[0].message
    assert [len(document.records) for document in report.documents] == [1, 0, 3]
    example = [ROCKET, {"entities": [[0, 8, "Launcher"]]}]
    for lines in ([example], [example, example], [[example, example]]):
        report = read_spacy(write(tmp_path / "train.jsonl", *lines))
        assert found(report.documents[-1]) == [("Launcher", "Ariane 5")]


def test_spacy_doc_bins(tmp_path):
    spacy = pytest.importorskip("spacy")
    from spacy.tokens import DocBin, Span

    doc = spacy.blank("en")(ROCKET)
    doc.ents = [Span(doc, 0, 2, "Launcher"), Span(doc, 4, 5, "Firm")]
    doc.user_data["._.", "rel", None, None] = {(4, 0): {"built": 0.9, "sold": 0.1}}
    DocBin(docs=[doc], store_user_data=True).to_disk(tmp_path / "a.spacy")
    (document,) = read_spacy(tmp_path / "a.spacy").documents
    assert found(document) == [
        ("Launcher", "Ariane 5"), ("Firm", "Arianespace"), ("built", "Arianespace", "Ariane 5"),
    ]  # fmt: skip
    doc.user_data["._.", "rel", None, None] = [3]
    doc.spans["sc"] = [Span(doc, 4, 5, "Firm")]
    DocBin(docs=[doc], store_user_data=True).to_disk(tmp_path / "a.spacy")
    report = read_spacy(tmp_path / "a.spacy")
    assert kinds(report) == [("unsupported", 1)] * 2 and len(report.documents[0].records) == 2
    assert "The span groups `sc` are not read" in report.problems[0].message
    with pytest.raises(ValueError, match="is no DocBin"):
        read_spacy(write(tmp_path / "b.spacy", "x"))


def test_a_package_that_is_missing_is_named_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(ImportError, match=r"needs `spacy`.*pip install 'peft_taskmoe\[spacy\]'"):
        read_spacy(tmp_path / "a.spacy")


# One rule for every reader


def test_plain_text_is_a_document_a_line(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfAnn met Bob.\r\n\r\nZo\xc3\xab ran.\r\n\r\n")
    report = read_text(path, {"Person": "people"})
    assert [(document.id, document.text) for document in report.documents] == [
        ("a-1", "Ann met Bob."), ("a-3", "Zoë ran."),
    ]  # fmt: skip
    assert kinds(report) == [("unsupported", 2)] and report.documents[0].records == ()
    with pytest.raises(ValueError, match="A text file has no labels"):
        convert(path, tmp_path / "out.jsonl", "text")


ROW = {"text": "Ann", "task": "NER", "schema": {"P": ""}, "annotations": []}
INSTRUCTION = {"schema": ["P"], "input": "Ann"}
LINES = {
    read_jsonl: ROW,
    read_doccano: {"text": "Ann", "label": [[0, 3, "P"]]},
    read_label_studio: {"text": "Ann", "label": [{"start": 0, "end": 3, "labels": ["P"]}]},
    read_spacy: {"text": "Ann", "ents": [{"start": 0, "end": 3, "label": "P"}]},
    read_iepile: {"task": "NER", "instruction": INSTRUCTION, "output": {"P": ["Ann"]}},
}


@pytest.mark.parametrize("read", LINES, ids=lambda read: read.__name__)
def test_ids_marks_and_blank_lines(tmp_path, read):
    lines = [LINES[read], LINES[read] | {"id": 7}, LINES[read] | {"id": "x"}]
    content = "\r\n".join(json.dumps(line) for line in lines).encode()
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + content + b"\r\n\r\n \n")
    report = read(path)
    assert report.problems == []
    assert [document.id for document in report.documents] == ["a-1", "7", "x"]
    write(path, lines[0], "", lines[1] | {"id": True}, lines[1] | {"id": "7"}, lines[1], "{")
    with path.open("ab") as file:
        file.write(b"\xff\n")
    report = read(path, on_error="collect")
    assert {document.id for document in report.documents} == {"a-1", "7"}
    assert sorted(kinds(report)) == [
        ("duplicate_id", 5), ("encoding", 7), ("json", 6), ("row", 3), ("unsupported", 2),
    ]  # fmt: skip
    assert Path(report.problems[0].file) == path
