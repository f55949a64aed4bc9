"""Readers, writers and training examples, on made-up files and on public sets."""

import json
from collections import Counter
from pathlib import Path

import pytest

from peft_taskmoe.uie import (
    Document,
    Entity,
    Event,
    ReadError,
    Regularisers,
    Relation,
    Schema,
    TokenTags,
    convert,
    mix,
    prompt_text,
    read_brat,
    read_conll,
    read_datasets,
    read_hub,
    read_iepile,
    read_jsonl,
    sample,
    to_dataset,
    to_prompt_completion,
    write_jsonl,
)

DATA = Path(__file__).parents[2] / ".." / "shared" / "data" / "uie"

NER = {
    "id": "n1", "text": "Zoë flew to 東京 🚀.", "task": "NER",
    "schema": {"Person": "people", "creative-work": ""},
    "annotations": [{"label": "Person", "text": "Zoë", "start": 0, "end": 3}],
}  # fmt: skip
RE = {
    "id": "r1", "text": "Ann works for Acme.", "task": "RE", "schema": {"Work_For": "employment"},
    "annotations": [{
        "relation": "Work_For",
        "head": {"type": "Person", "text": "Ann", "start": 0, "end": 3},
        "tail": {"type": "Org", "text": "Acme", "start": 14, "end": 18},
    }],
    "entities": [{"label": "Person", "text": "Ann", "start": 0, "end": 3}],
}  # fmt: skip
EE = {
    "id": "e1", "text": "Rebels attacked the town.", "task": "EE",
    "schema": {"Conflict.Attack": {"description": "violence", "roles": ["Attacker", "Place"]}},
    "annotations": [{
        "type": "Conflict.Attack", "trigger": {"text": "attacked", "start": 7, "end": 15},
        "arguments": [{"role": "Attacker", "text": "Rebels", "start": 0, "end": 6}],
    }],
}  # fmt: skip
EAE = EE | {"id": "a1", "task": "EAE", "source": "made up"}
ROWS = [NER, RE, EE, EAE]


def jsonl(path, *rows):
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def changed(row, **changes):
    """A deep copy with other values; `a__0__b=v` reaches into lists and objects, None deletes."""
    row = json.loads(json.dumps(row))
    for path, value in changes.items():
        *outer, last = [int(key) if key.isdigit() else key for key in path.split("__")]
        target = row
        for key in outer:
            target = target[key]
        if value is None:
            del target[last]
        else:
            target[last] = value
    return row


def places(report):
    return [(problem.kind, problem.line) for problem in report.problems]


# --- JSONL


def test_jsonl_is_read_and_written_back(tmp_path):
    report = read_jsonl(jsonl(tmp_path / "in.jsonl", *ROWS))
    assert report.problems == [] and str(report) == "4 documents, 0 problems"
    ner, re_, ee, eae = report.documents
    kinds = [type(document.records[0]) for document in (ner, re_, ee)]
    assert kinds == [Entity, Relation, Event] and re_.entities[0].label == "Person"
    assert (eae.task, eae.extra) == ("EAE", {"source": "made up"})
    assert write_jsonl(report.documents, tmp_path / "out.jsonl") == 4
    written = (tmp_path / "out.jsonl").read_text("utf-8").splitlines()
    assert [json.loads(line) for line in written] == ROWS
    assert read_jsonl(tmp_path / "out.jsonl").documents == report.documents
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl", "out.jsonl"}


def test_writing_leaves_the_old_file_where_it_fails(tmp_path):
    target = jsonl(tmp_path / "out.jsonl", NER)
    before = target.read_bytes()

    def documents():
        yield Document.from_dict(RE)
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        write_jsonl(documents(), target)
    assert target.read_bytes() == before and list(tmp_path.iterdir()) == [target]


ARGUMENT = "annotations__0__arguments__0__"


def ner(**changes):
    return changed(NER, **{f"annotations__0__{key}": value for key, value in changes.items()})


BAD_ROWS = [
    ("[1]", "row", "which is no JSON object"),
    ('{"id": ', "json", "The line is no JSON"),
    ('{"id": "a", "id": "b"}', "json", "the key `id` is given twice in one object"),
    ("[" * 100_000, "json", "nested too deeply"),
    (json.dumps(changed(NER, score=float("nan"))), "json", "`NaN` is no value of JSON"),
    (changed(NER, text=None), "row", r"The key `text` is missing \(keys: id, task, schema, anno"),
    (changed(NER, id=1.5), "row", "The id is 1.5. Write a string or a whole number"),
    (changed(NER, id=""), "row", "The id is ''"),
    (changed(NER, task="NRE"), "task", "`NRE` is no task"),
    (changed(NER, schema={}), "schema", "The schema has no labels"),
    (changed(NER, annotations={}), "row", "`annotations` is `{}`; it has to be a list"),
    (changed(NER, annotations__0="x"), "row", r"`annotations\[0\]` is `'x'`, not an object"),
    (ner(label="Place"), "label", r"has the label `Place`.* Its own: `Person`, `creative-work`"),
    (ner(label=None), "row", r"`annotations\[0\]` has no `label` \(keys: text, start, end\)"),
    (ner(start=1, end=4), "offsets", r"but text\[1:4\] is `'oë '`. The mention stands at 0"),
    (ner(text="Zoe"), "offsets", r"says `'Zoe'`, but text\[0:3\] is `'Zoë'`"),
    (ner(end=99), "offsets", r"text\[0:99\] is outside of the text of 17 characters"),
    (ner(start=-17), "offsets", r"text\[-17:3\] is outside"),
    (ner(start=None), "row", "needs two integers, start and end"),
    (ner(start=False), "row", "needs two integers, start and end"),
    (ner(confidence="high"), "row", "has the confidence `'high'`, which is no number"),
    (json.dumps(changed(NER, text="\ud800 Zoë")), "encoding", "half a character .a lone surrogate"),
    (changed(RE, annotations__0__relation="Kill"), "label", "has the relation `Kill`"),
    (changed(RE, annotations__0__tail=None), "row", r"`annotations\[0\].tail` is `None`, not an"),
    (changed(RE, annotations__0__tail__start=13), "offsets", r"`annotations\[0\].tail` says"),
    (changed(RE, annotations__0__head__type=3), "row", "needs a string as type"),
    (changed(RE, entities__0__end=4), "offsets", r"`entities\[0\]` says"),
    (changed(RE, entities=3), "row", "The value of `entities` is `3`; it has to be a list"),
    (changed(EE, annotations__0__trigger__start=8), "offsets", r"`annotations\[0\].trigger` says"),
    (changed(EE, **{ARGUMENT + "role": "Tool"}), "label", "`Tool`, which `Conflict.Attack` does"),
    (changed(EE, **{ARGUMENT + "role": None}), "row", r"`annotations\[0\].arguments\[0\]` has no"),
    (changed(EE, **{ARGUMENT + "end": 5}), "offsets", r"`annotations\[0\].arguments\[0\]` says"),
    (changed(EE, annotations__0__arguments="x"), "row", r"arguments` is `'x'`, not a list"),
    (changed(EAE, annotations=[]), "row", "An EAE document needs the event"),
    (NER, "duplicate_id", "The id `n1` is that of line 1"),
]


@pytest.mark.parametrize(("row", "kind", "message"), BAD_ROWS, ids=range(len(BAD_ROWS)))
def test_bad_lines_are_reported_by_number(tmp_path, row, kind, message):
    path = jsonl(tmp_path / "in.jsonl", NER, row, RE | {"id": "last"})
    report = read_jsonl(path, on_error="collect")
    assert [document.id for document in report.documents] == ["n1", "last"]
    assert places(report) == [(kind, 2)] and report.counts() == {kind: 1}
    with pytest.raises(ReadError, match=message) as caught:
        read_jsonl(path)
    said = str(caught.value)
    assert said.startswith(f"{path}:2: {kind}: ") and 'Pass on_error="collect"' in said
    assert caught.value.problem == report.problems[0]


def test_all_faults_of_a_row_are_reported(tmp_path):
    changes = {"annotations__0__head__start": 1, "annotations__0__relation": "Kill"}
    row = changed(RE, **changes, entities__0__end=4)
    report = read_jsonl(jsonl(tmp_path / "in.jsonl", row), on_error="collect")
    assert report.counts() == {"label": 1, "offsets": 2}
    assert str(report) == "0 documents, 3 problems: 1 label, 2 offsets"


def test_characters_that_only_python_takes_for_line_ends(tmp_path):
    row = changed(NER, text="Zoë\u2028\x85\x0b.")
    (document,) = read_jsonl(jsonl(tmp_path / "in.jsonl", row)).documents
    assert document.text == "Zoë\u2028\x85\x0b."


def test_empty_files_and_blank_lines(tmp_path):
    path = tmp_path / "in.jsonl"
    for content in ("", "\n\n"):
        path.write_text(content)
        with pytest.raises(ReadError, match=r"The file has no document. Check that it is the righ"):
            read_jsonl(path)
    report = read_jsonl(jsonl(path, NER, "", RE, "", ""))
    assert places(report) == [("unsupported", 2)] and report.errors == []
    assert len(report.documents) == 2
    with pytest.raises(FileNotFoundError):
        read_jsonl(tmp_path / "missing.jsonl")
    with pytest.raises(ValueError, match=r'There is no on_error="skip". Choose "raise" or "colle'):
        read_jsonl(path, on_error="skip")


def test_keys_that_no_record_holds_are_noted(tmp_path):
    row = changed(RE, annotations__0__certainty="high", annotations__0__head__kb="Q1")
    report = read_jsonl(jsonl(tmp_path / "in.jsonl", row))
    (note,) = report.problems
    assert len(report.documents) == 1 and note.severity == "note"
    assert note.message == "The annotations have keys that are not kept: `certainty`, `kb`."


def test_several_tasks_in_one_schema(tmp_path):
    schema = {"entities": {"Person": ""}, "relations": RE["schema"]}
    row = {"id": "u", "text": RE["text"], "task": "UIE", "schema": schema}
    row["annotations"] = [RE["annotations"][0], RE["entities"][0]]
    (document,) = read_jsonl(jsonl(tmp_path / "in.jsonl", row)).documents
    assert [type(record) for record in document.records] == [Relation, Entity]
    path = jsonl(tmp_path / "in.jsonl", changed(row, annotations__1__label="Work_For"))
    assert read_jsonl(path, on_error="collect").counts() == {"label": 1}


# --- CoNLL

TOKENS = ["Ann", "Lee", "Bob", "saw", "New", "York"]
SPANS = [("PER", "Ann Lee"), ("PER", "Bob"), ("LOC", "New York")]
TAGS = {
    "IOB1": ["I-PER", "I-PER", "B-PER", "O", "I-LOC", "I-LOC"],
    "IOB2": ["B-PER", "I-PER", "B-PER", "O", "B-LOC", "I-LOC"],
    "BIOES": ["B-PER", "E-PER", "S-PER", "O", "B-LOC", "E-LOC"],
    "BILOU": ["B-PER", "L-PER", "U-PER", "O", "B-LOC", "L-LOC"],
}


def conll(path, *sentences):
    lines = ("".join(f"{line}\n" for line in lines) for lines in sentences)
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def found(document):
    assert all(document.text[r.span.start : r.span.end] == r.span.text for r in document.records)
    return [(r.label, r.span.text) for r in document.records]


@pytest.mark.parametrize("tags", TAGS)
def test_conll_schemes(tmp_path, tags):
    lines = [f"{token} x {tag}" for token, tag in zip(TOKENS, TAGS[tags], strict=True)]
    scheme = "BIOES" if tags == "BILOU" else tags
    path = conll(tmp_path / "a.conll", ["-DOCSTART- -X- O"], lines, lines[:2])
    report = read_conll(path, scheme=scheme)
    assert [found(document) for document in report.documents] == [SPANS, SPANS[:1]]
    first = report.documents[0]
    assert (first.id, first.text) == ("a-0", "Ann Lee Bob saw New York")
    assert first.schema == Schema.from_dict("NER", {"PER": "", "LOC": ""})


CONTINUES = "The tag `{}` continues no entity in {}"
NO_END = "The entity `PER` does not end with E- or S-"


@pytest.mark.parametrize(
    ("scheme", "tags", "line", "message", "expected"),
    [
        ("IOB2", "O I-PER I-PER", 2, CONTINUES.format("I-PER", "IOB2"), ["PER Lee Bob"]),
        ("IOB2", "B-PER I-LOC O", 2, CONTINUES.format("I-LOC", "IOB2"), ["PER Ann", "LOC Lee"]),
        ("IOB2", "B-PER X-PER O", 2, "`X-PER` is none of IOB2. It is read as O", ["PER Ann"]),
        ("IOB2", "B-PER B- O", 2, "The tag `B-` is none of IOB2", ["PER Ann"]),
        ("IOB2", "B-PER E-PER O", 2, "The tag `E-PER` is none of IOB2", ["PER Ann"]),
        ("BIOES", "B-PER I-PER O", 2, NO_END, ["PER Ann Lee"]),
        ("BIOES", "O E-PER O", 2, CONTINUES.format("E-PER", "BIOES"), ["PER Lee"]),
        ("BIOES", "S-PER O B-PER", 3, NO_END, ["PER Ann", "PER Bob"]),
    ],
)
def test_conll_tags_that_break_the_scheme(tmp_path, scheme, tags, line, message, expected):
    lines = [f"{token}\t{tag}" for token, tag in zip(TOKENS, tags.split(), strict=False)]
    path, schema = conll(tmp_path / "a.conll", lines), {"PER": "", "LOC": ""}
    report = read_conll(path, schema=schema, scheme=scheme, on_error="collect")
    assert places(report) == [("tags", line)]
    assert [" ".join(mention) for mention in found(report.documents[0])] == expected
    with pytest.raises(ReadError, match=message):
        read_conll(path, schema=schema, scheme=scheme)


def test_conll_columns_and_documents(tmp_path):
    path = tmp_path / "a.txt"
    text = "# id 1\n1\tNew York\tB-creative-work\n2\tTimes\tI-creative-work\n\n1\t#\tO\n"
    path.write_text(f"{text}-DOCSTART-\n\n1\tAnn\tB-PER\n", "utf-8")
    options = {"token_column": 1, "separator": "\t", "comment": "# id"}
    report = read_conll(path, unit="document", **options)
    assert [document.text for document in report.documents] == ["New York Times\n#", "Ann"]
    assert found(report.documents[0]) == [("creative-work", "New York Times")]
    sentences = [document.text for document in read_conll(path, **options).documents]
    assert sentences == ["New York Times", "#", "Ann"]
    report = read_conll(path, token_column=5, comment="# id", on_error="collect")
    assert report.documents == [] and set(report.counts()) == {"columns"}
    asked = r"a\.txt:2: columns: Found .*: 3 columns, asked for token_column=5 and tag_column=-1"
    with pytest.raises(ReadError, match=asked):
        read_conll(path, separator="\t", token_column=5, comment="# id")
    with pytest.raises(ValueError, match="Choose IOB1, IOB2 or BIOES; sentence or document"):
        read_conll(path, scheme="BIO")


def test_conll_lines_without_their_columns_cost_their_sentence(tmp_path):
    path = tmp_path / "a.conll"
    path.write_bytes(b"Ann B-PER\n\nBob\nsaw O\n\nL\xe9a B-PER\n\nZoe B-PER\n")
    report = read_conll(path, token_column=0, tag_column=1, on_error="collect")
    assert [document.text for document in report.documents] == ["Ann", "Zoe"]
    assert places(report) == [("columns", 3), ("encoding", 6)]


def test_conll_without_documents_or_labels(tmp_path):
    path = conll(tmp_path / "a.conll", ["-DOCSTART- O"], [])
    with pytest.raises(ReadError, match="The file has no document"):
        read_conll(path)
    conll(path, ["Ann O"])
    with pytest.raises(
        ReadError, match=r"has no label for NER. Pass a schema, \{label: description\}"
    ):
        read_conll(path)
    assert read_conll(path, schema={"LOC": ""}).documents[0].records == ()
    with pytest.raises(ReadError, match="has the label `PER`, which the schema does not have"):
        read_conll(conll(path, ["Ann B-PER"]), schema={"LOC": ""})


# --- BRAT

BRAT_TEXT = "Ann joined Acme\nCorp. The move hit Bob."
BRAT_ANN = """T1\tPerson 0 3\tAnn
T2\tOrg 11 20\tAcme Corp
T3\tJoin 4 10\tjoined
T4\tHit 31 34\thit
T5\tPerson 35 38\tBob
R1\tWorkFor Arg1:T1 Arg2:T2\t
E1\tJoin:T3 Who:T1 Who2:T5 Org:T2
E2\tHit:T4 Cause:E1 Whom:T5
A1\tNegated E1
#1\tAnnotatorNotes T1\tsure
"""


def brat(folder, name="one", text=BRAT_TEXT, ann=BRAT_ANN):
    (folder / name).parent.mkdir(exist_ok=True, parents=True)
    (folder / f"{name}.txt").write_text(text, encoding="utf-8", newline="")
    (folder / f"{name}.ann").write_text(ann, encoding="utf-8", newline="")
    return folder


def test_brat_of_each_task(tmp_path):
    report = read_brat(brat(tmp_path), "NER")
    (document,) = report.documents
    assert found(document) == [("Person", "Ann"), ("Org", "Acme\nCorp"), ("Person", "Bob")]
    assert document.id == "one" and document.text == BRAT_TEXT
    assert not report.errors  # but notes: an attribute, a note, a relation, two events
    assert report.counts() == {"unsupported": 5}

    (document,) = read_brat(tmp_path, "RE").documents
    (relation,) = document.records
    assert (relation.label, relation.head_type, relation.tail_type) == ("WorkFor", "Person", "Org")
    assert (relation.head.text, relation.tail.text) == ("Ann", "Acme\nCorp")
    assert len(document.entities) == 3

    (document,) = read_brat(tmp_path, "EE").documents
    assert {e.label: [(a.role, a.span.text) for a in e.arguments] for e in document.records} == {
        "Join": [("Who", "Ann"), ("Who", "Bob"), ("Org", "Acme\nCorp")],
        "Hit": [("Cause", "joined"), ("Whom", "Bob")],
    }
    assert [slot.name for slot in document.schema.get("event", "Join").roles] == ["Who", "Org"]


@pytest.mark.parametrize(
    ("line", "kind", "message"),
    [
        ("T6\tPerson 0 3;35 38\tAnn Bob", "discontinuous", r"has several pieces \(0 3;35 38\)"),
        ("T6\tPerson 1 4\tAnn", "offsets", r"`T6` says `'Ann'`, but text\[1:4\] is `'nn '`"),
        ("T6\tPerson 90 93\tAnn", "offsets", "but text.90:93. is `''`"),
        ("T6 Person 0 3 Ann", "brat", "Cannot read `'T6 Person 0 3 Ann'`. Expected a T, R or E"),
        ("R2\tWorkFor Arg1:T1 Arg2:T9", "reference", "There is no usable mention `T9`"),
        ("E3\tJoin:T9 Who:T1", "reference", "There is no usable mention `T9`"),
        ("X1\twhat", "brat", "Cannot read"),
    ],
)
def test_brat_lines_that_cannot_be_read(tmp_path, line, kind, message):
    task = {"R": "RE", "E": "EE"}.get(line[0], "NER")
    brat(tmp_path, ann=BRAT_ANN + line + "\n")
    report = read_brat(tmp_path, task, on_error="collect")
    assert [(p.kind, p.line) for p in report.errors] == [(kind, 11)]
    assert report.documents == read_brat(brat(tmp_path), task).documents  # the rest is kept
    brat(tmp_path, ann=BRAT_ANN + line + "\n")
    with pytest.raises(ReadError, match=message):
        read_brat(tmp_path / "one.ann", task)


def test_brat_folders(tmp_path):
    brat(tmp_path, "a/one")
    brat(tmp_path, "a/two.v1", text="No one.", ann="")
    brat(tmp_path, "b/bad")
    (tmp_path / "b/bad.txt").write_bytes(b"\xff")
    (tmp_path / "alone.txt").write_text("x")
    report = read_brat(tmp_path, "NER", on_error="collect")
    assert [document.id for document in report.documents] == ["a/one", "a/two.v1"]
    errors = [(problem.kind, Path(problem.file).name) for problem in report.errors]
    assert errors == [("brat", "alone.ann"), ("encoding", "bad.txt")]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ReadError, match="The file has no document"):
        read_brat(tmp_path / "empty", "NER")
    with pytest.raises(ReadError, match=r"The file has no label for RE. Pass a schema, "):
        read_brat(tmp_path / "a/two.v1.txt", "RE")
    with pytest.raises(ValueError, match=r'Found task="EAE". BRAT files hold NER, RE and EE'):
        read_brat(tmp_path, "EAE")


# --- IEPile


def iepile(task, schema, text, output, as_strings=True, **more):
    instruction = {"instruction": "You are an expert.", "schema": schema, "input": text}
    instruction, output = map(json.dumps if as_strings else (lambda x: x), (instruction, output))
    return {"task": task, "source": "made up", "instruction": instruction, "output": output} | more


def arguments_of(event):
    return [(argument.role, argument.span.text) for argument in event.arguments]


@pytest.mark.parametrize("as_strings", [True, False])
def test_iepile_tasks(tmp_path, as_strings):
    people = {"person": ["Ann", "Ann", "Ann Lee"], "place": []}
    works = {"works for": [{"subject": "Ann", "object": "Acme"}]}
    asked = [{"event_type": "hire", "trigger": True, "arguments": ["who", "whom", "when"]}]
    arguments = {"who": "Ann Lee", "whom": ["Ann"], "when": "NAN"}
    hired = {"hire": [{"trigger": "hired", "arguments": arguments}]}
    rows = [
        ("NER", ["person", "place"], people, {}),
        ("RE", ["works for"], works, {"id": "r"}),
        ("EE", asked, hired, {}),
        ("EET", ["hire", "fire"], {"hire": ["hired"], "fire": []}, {}),
    ]
    text = "Ann Lee hired Ann at Acme"
    rows = [iepile(task, asked, text, out, as_strings, **id_) for task, asked, out, id_ in rows]
    ner, re_, ee, eet = read_iepile(jsonl(tmp_path / "in.json", *rows)).documents
    starts = [(record.span.start, record.span.text) for record in ner.records]
    assert starts == [(0, "Ann"), (14, "Ann"), (0, "Ann Lee")]
    assert (ner.id, re_.id, ner.extra) == ("in-1", "r", {"source": "made up"})
    assert [label.name for label in ner.schema.labels] == ["person", "place"]
    assert (re_.records[0].head.start, re_.records[0].tail.text) == (0, "Acme")
    assert ee.records[0].trigger.text == "hired"
    assert arguments_of(ee.records[0]) == [("who", "Ann Lee"), ("whom", "Ann")]
    assert [event.trigger.text for event in eet.records] == ["hired"]


def test_iepile_lines_as_they_are_published(tmp_path):
    """What occurs in the files: blanks at the end of a mention, no trigger, a list for one role."""
    text = "The  board dismissed Ann Lee in May; Bo quit ."
    end, roles = "end position", ["Person", "Time.Point"]
    hire = {"event_type": end, "trigger": True, "arguments": [*roles, "agent"]}
    given = {"event_type": end, "trigger": ["dismissed "], "arguments": roles}
    two = {"event_type": "quit", "trigger": ["dismissed", "quit"], "arguments": ["Person"]}
    arguments = {"Person": ["Ann Lee ", "Bo"], "Time.Point": "May", "agent": "NAN"}
    ann, bo = {"Person": "Ann Lee"}, {"Person": "Bo"}
    events = [
        ("EE", [hire], {end: [{"trigger": "dismissed ", "arguments": arguments}]}),
        ("EE", [hire | {"trigger": False}], {end: [{"arguments": bo}]}),
        ("EE", [hire], {end: [{"trigger": "NAN", "arguments": {}}]}),
        ("EEA", [given], {end: [ann | {"Time.Point": "NAN"}]}),
        ("EEA", [given], {end: []}),
        ("EEA", [given, two], {end: [ann], "quit": [bo]}),
        ("EEA", [two], {"quit": [bo, ann]}),
    ]
    rows = [iepile(task, asked, text, output) for task, asked, output in events]
    rows[0]["split"] = "train"
    chinese = {"人物": ["王小明"], "地点": ["北京", "北京"]}
    rows.append(iepile("NER", [*chinese], "王小明住在北京，北京很大。", chinese))
    report = read_iepile(jsonl(tmp_path / "in.json", *rows), on_error="collect")
    assert places(report) == [("no_trigger", n) for n in (2, 3, 6, 7)]
    assert "`end position` has no trigger" in report.problems[0].message
    assert "2 triggers and 1 sets of arguments of `quit`" in report.problems[2].message
    ee, _, _, eea, empty, partly, ner = report.documents
    assert ee.extra == {"source": "made up", "split": "train"}
    (event,) = ee.records
    assert (event.trigger.text, event.trigger.start) == ("dismissed", 11)
    expected = [("Person", "Ann Lee"), ("Person", "Bo"), ("Time.Point", "May")]
    assert arguments_of(event) == expected
    assert [slot.name for slot in ee.schema.labels[0].roles] == [*roles, "agent"]
    assert (eea.task, eea.given[0].trigger.text) == ("EAE", "dismissed")
    assert arguments_of(eea.records[0]) == [("Person", "Ann Lee")]
    assert empty.given == eea.given and empty.records[0].arguments == ()
    assert [r.label for r in partly.records] == ["end position"] and len(partly.schema.labels) == 2
    assert [(r.label, r.span.start) for r in ner.records] == [("人物", 0), ("地点", 5), ("地点", 8)]


def test_iepile_keys_that_a_document_has_for_itself(tmp_path):
    row = iepile("NER", ["person"], "Ann", {"person": ["Ann"]}, split="dev")
    row |= {"schema": ["x"], "text": "other", "entities": 3}
    report = read_iepile(jsonl(tmp_path / "in.json", row))
    (document,) = report.documents
    assert document.text == "Ann" and document.extra == {"source": "made up", "split": "dev"}
    (note,) = report.problems
    assert note.severity == "note" and "not kept: `schema`, `text`, `entities`" in note.message
    # Of the test conversion of the repository:
    converted = {"id": "1", "instruction": row["instruction"], "label": "[]"}
    with pytest.raises(ReadError, match=r"it has no `task` \(keys: id, instruction, label\)"):
        read_iepile(jsonl(tmp_path / "test.json", converted))


def test_iepile_problems(tmp_path):
    rows = [
        ("NER", ["person"], {"person": ["Ann"]}),
        ("NER", ["person"], {"person": ["Bob", "Ann"]}),
        ("KG", ["person"], {}),
        ("NER", ["person"], {"place": ["Ann"]}),
        ("RE", ["knows"], {"knows": ["Ann"]}),
        ("NER", {"person": "people"}, {"person": ["Ann"]}),
    ]
    lines = [iepile(task, schema, "Ann", output) for task, schema, output in rows]
    path = jsonl(tmp_path / "in.json", *lines, {"task": "NER"}, "{")
    report = read_iepile(path, on_error="collect")
    kinds = ["not_in_text", "row", "label", "row", "row", "row", "json"]
    assert places(report) == list(zip(kinds, range(2, 9), strict=True))
    assert [(one.id, len(one.records)) for one in report.documents] == [("in-1", 1), ("in-2", 1)]
    no_task = "there is no reading of task `KG`, only of NER, RE, EE, EET, EEA"
    assert no_task in report.problems[1].message
    with pytest.raises(ReadError, match=r"The text has no `'Bob'`. What it belongs to is left out"):
        read_iepile(path)
    asked = [{"event_type": "Hit", "trigger": ["hit"], "arguments": ["by"]}]
    asked.append({"event_type": "Sit", "trigger": [], "arguments": []})  # nothing is said of it
    lines = [
        iepile("EE", asked, "Ann hit", {"Hit": [{"trigger": "struck", "arguments": {}}]}),
        iepile("EEA", asked, "Ann hit", {"Hit": [{"by": "Ann"}], "Sit": []}),
    ]
    report = read_iepile(jsonl(tmp_path / "events.json", *lines), on_error="collect")
    assert places(report) == [("not_in_text", 1)]
    assert [len(one.records) for one in report.documents] == [0, 1]


# --- Hub

CONLL_ROWS = [
    {"id": str(i), "tokens": ["Ann", f"Lee{i}", "saw"], "ner_tags": [1, 2, 0]} for i in range(6)
]
TAG_NAMES = ["O", "B-PER", "I-PER"]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A local JSON data set and a cache folder of its own; returns load options."""
    pytest.importorskip("datasets")
    rows = [*CONLL_ROWS[:4], CONLL_ROWS[4] | {"ner_tags": [2, 2, 0]}, CONLL_ROWS[5]]
    path, cache = jsonl(tmp_path / "rows.jsonl", *rows), tmp_path / "cache"
    return {"data_files": {"test": str(path)}, "cache_dir": str(cache)}


@pytest.mark.parametrize(
    "options", [{}, {"num_proc": 2}, {"streaming": True}], ids=["plain", "num_proc", "streaming"]
)
def test_hub_rows_are_mapped(hub, options):
    mapping = TokenTags({"PER": "people"}, TAG_NAMES, id_="id")
    report = read_hub("json", mapping, split="test", on_error="collect", **hub, **options)
    assert [document.id for document in report.documents] == ["0", "1", "2", "3", "5"]
    assert found(report.documents[1]) == [("PER", "Ann Lee1")]
    assert [(p.kind, p.file, p.line) for p in report.problems] == [("mapping", "json[test]", 5)]
    assert "ValueError: tag 0: The tag `I-PER` continues no entity" in report.problems[0].message
    assert len(read_hub("json", mapping, split="test", limit=3, **hub, **options).documents) == 3
    with pytest.raises(ReadError, match=r"json\[test\]:5: mapping: The mapping raised ValueError"):
        read_hub("json", mapping, split="test", **hub, **options)


def test_hub_mapping_may_leave_rows_out_and_ids_to_be_made(hub):
    def mapping(row):
        return None if row["id"] == "0" else {k: v for k, v in NER.items() if k != "id"}

    report = read_hub("json", mapping, split="test", limit=3, **hub)
    assert [document.id for document in report.documents] == ["2", "3"]
    assert [(p.severity, p.line) for p in report.problems] == [("note", 1)]


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_rows_in_the_jsonl_format(tmp_path, streaming):
    pytest.importorskip("datasets")
    other = changed(EE, id="e2", schema={"Die": {"description": "", "roles": []}}, annotations=[])
    # Arrow gives each row's schema the labels of the other, as None.
    path, cache = jsonl(tmp_path / "rows.jsonl", EE, other), tmp_path / "cache"
    options = {"data_files": str(path), "cache_dir": str(cache), "streaming": streaming}
    report = read_hub("json", split="train", **options)
    assert [document.to_dict() for document in report.documents] == [EE, other]


def test_a_configuration_of_the_hub_is_named_and_one_without_rows_is_reported(hub):
    mapping = TokenTags({"PER": "people"}, TAG_NAMES)
    report = read_hub("json", mapping, split="test", subset="mine", limit=2, **hub)
    assert len(report.documents) == 2
    report = read_hub("json", mapping, split="test", limit=0, on_error="collect", **hub)
    assert [problem.kind for problem in report.errors] == ["empty"]


@pytest.mark.parametrize("tag", [-1, -100, 3])
def test_a_number_without_a_name_is_no_tag(tag):
    with pytest.raises(ValueError, match=f"the tag {tag} is none of the 3 names"):
        TokenTags({"PER": ""}, TAG_NAMES)({"tokens": ["Ann"], "ner_tags": [tag]})


def test_hub_calls_that_cannot_work(hub):
    with pytest.raises(ValueError, match=r"A stream is read in one process. Leave num_proc out"):
        read_hub("json", split="test", streaming=True, num_proc=2, **hub)
    with pytest.raises(ReadError, match=r"tags are numbers: pass names=dataset.features"):
        read_hub("json", TokenTags({"PER": ""}), split="test", **hub)
    with pytest.raises(ReadError, match="there are 3 tokens, but 1 tags"):
        mapping = TokenTags({"PER": ""}, TAG_NAMES)
        read_hub("json", lambda row: mapping(row | {"ner_tags": [0]}), split="test", **hub)


def test_datasets_of_a_command_line(tmp_path, monkeypatch):
    """Files of one folder are one data set; `limit` is per data set, and draws as `sample` does."""
    rows = [changed(NER, id=f"n{i}") for i in range(6)]
    parts = {"a/train": rows[:3], "a/dev": rows[3:], "demo/test_seen": rows[:2]}
    for name, part in parts.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        jsonl(tmp_path / f"{name}.jsonl", *part)
    train, dev, seen = (tmp_path / f"{name}.jsonl" for name in parts)
    sources = [train, str(dev), seen]
    whole = read_datasets(sources, split="train")
    ids = {name: [one.id for one in documents] for name, documents in whole.items()}
    assert ids == {"a": [row["id"] for row in rows], "test_seen": ["n0", "n1"]}
    drawn = read_datasets(sources, split="train", limit=4, seed=7)
    assert drawn == {"a": sample(whole["a"], 4, 7), "test_seen": whole["test_seen"]}
    assert drawn["a"] != sample(whole["a"], 4, 0)
    monkeypatch.chdir(tmp_path / "a")  # a bare name has no folder
    assert {*read_datasets(["train.jsonl"], split="train")} == {"train"}


def test_datasets_of_the_hub(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    (tmp_path / "user" / "set").mkdir(parents=True)
    jsonl(tmp_path / "user" / "set" / "test.jsonl", NER)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    found = read_datasets(["user/set"], split="test")
    assert [(name, [one.to_dict() for one in of]) for name, of in found.items()] == [
        ("user/set", [NER])
    ]


# --- Conversion and training examples


def test_conversion(tmp_path):
    target = tmp_path / "out.jsonl"
    brat(tmp_path / "brat")
    report = convert(tmp_path / "brat", target, "brat", task="EE")
    assert read_jsonl(target).documents == report.documents
    lines = [f"{token} {tag}" for token, tag in zip(TOKENS, TAGS["BIOES"], strict=True)]
    path, schema = conll(tmp_path / "a.conll", lines), {"PER": "p", "LOC": "l"}
    report = convert(path, target, "conll", scheme="BIOES", schema=schema)
    assert found(read_jsonl(target).documents[0]) == SPANS
    with pytest.raises(
        ValueError, match=r"There is no format `xml`. Choose one of jsonl, conll, b"
    ):
        convert(target, tmp_path / "x", "xml")
    before = target.read_bytes()
    with pytest.raises(ReadError):
        convert(jsonl(tmp_path / "bad.jsonl", "{"), target, "jsonl")
    assert target.read_bytes() == before


def documents_of(name, n):
    return [Document.from_dict(changed(NER, id=f"{name}-{i}")) for i in range(n)]


def test_sample_keeps_the_order_and_grows():
    documents = documents_of("a", 50)
    ten, twenty = sample(documents, 10, seed=3), sample(documents, 20, seed=3)
    assert len(ten) == 10 and [d for d in documents if d in ten] == ten
    assert all(d in twenty for d in ten)
    assert sample(documents, 10, seed=4) != ten and sample(documents, 99) == documents


def test_mix_spreads_data_sets_evenly():
    sizes = {"big": 60, "small": 20, "tiny": 4}
    sets = {name: documents_of(name, n) for name, n in sizes.items()}
    mixed = mix(sets, seed=1)
    assert Counter(name for name, _ in mixed) == sizes
    assert {d.id for _, d in mixed} == {d.id for of in sets.values() for d in of}
    for start in range(0, 84, 21):  # each quarter has a quarter of each, give or take one
        quarter = Counter(name for name, _ in mixed[start : start + 21])
        assert all(abs(quarter[name] - n / 4) <= 1 for name, n in sizes.items())
    assert mix(sets, seed=1) == mixed != mix(sets, seed=2)
    assert [d.id for name, d in mixed if name == "big"] != [d.id for d in sets["big"]]


def test_mix_draws_of_each_data_set_whatever_the_others():
    sets = {"big": documents_of("big", 60), "small": documents_of("small", 5)}
    mixed = mix(sets, max_per_dataset=10, seed=1)
    assert Counter(name for name, _ in mixed) == {"big": 10, "small": 5}
    alone = mix({"big": sets["big"]}, max_per_dataset=10, seed=1)
    assert [pair for pair in mixed if pair[0] == "big"] == alone


@pytest.mark.parametrize("num_proc", [None, 2])
def test_prompt_completion_rows(num_proc):
    pytest.importorskip("datasets")
    documents = [(f"set{i % 2}", Document.from_dict(row)) for i, row in enumerate(ROWS)]
    rows = to_prompt_completion(documents, num_proc=num_proc)
    assert set(rows.column_names) == {"id", "dataset", "prompt", "completion", "task_text"}
    assert rows["id"][:] == [row["id"] for row in ROWS]
    assert rows["dataset"][:] == ["set0", "set1", "set0", "set1"]
    assert all(row["prompt"].endswith("result =") for row in rows)
    assert all(row["task_text"] == row["prompt"] for row in rows)
    assert "Zoë" in rows[0]["completion"] and "Work_For" in rows[1]["completion"]
    schema_aware = to_prompt_completion(documents, task_text="schema", num_proc=num_proc)
    for row, (_, document) in zip(schema_aware, documents, strict=True):
        assert row["prompt"].startswith(row["task_text"])
        assert document.text not in row["task_text"]
    with pytest.raises(
        ValueError, match=r'Found task_text="text". The task encoder reads the "pro'
    ):
        to_prompt_completion(documents, task_text="text")


def test_prompts_of_several_tasks_are_those_of_an_extractor():
    pytest.importorskip("datasets")
    schema = Schema.of({"met": {"head": ["person"]}}, {"person": ""})
    document = Document("1", "Ada met Bob.", "UIE", schema)
    rows = to_prompt_completion([("a", document)])
    assert rows[0]["prompt"] == prompt_text(document.text, schema)


def test_prompt_completion_takes_regularisers_and_seeds():
    pytest.importorskip("datasets")
    row = changed(NER, schema=dict.fromkeys(["Person", *"ABCDEFG"], ""))
    documents = [("a", Document.from_dict(row))]
    plain = to_prompt_completion(documents)[0]["prompt"]
    options = {"regularisers": Regularisers(shuffle=True)}
    shuffled = [to_prompt_completion(documents, **options, seed=s)[0]["prompt"] for s in (1, 2, 1)]
    assert shuffled[0] == shuffled[2] and len({plain, *shuffled}) == 3


def test_to_dataset_holds_whole_documents():
    pytest.importorskip("datasets")
    dataset = to_dataset([("set", Document.from_dict(row)) for row in ROWS])
    assert [json.loads(document) for document in dataset["document"]] == ROWS
    assert dataset["task"][:] == ["NER", "RE", "EE", "EAE"]


@pytest.mark.slow
def test_public_sets_are_read_whole(tmp_path):
    if not DATA.exists():
        pytest.skip("needs the data sets in ../shared/data/uie")
    described = json.loads((DATA / "datasets.json").read_text(encoding="utf-8"))
    for name, description in described.items():
        for split in ("train", "test"):
            path = DATA / name / f"{split}.jsonl"
            report = read_jsonl(path)
            assert report.problems == [] and len(report.documents) == description[split], path
            write_jsonl(report.documents, tmp_path / "out.jsonl")
            rows = [json.loads(line) for line in path.open(encoding="utf-8")]
            for row in rows:  # an empty list of entities is not written, a role named twice is one
                if not row.get("entities", True):
                    del row["entities"]
                for event in row["schema"].values() if row["task"] in ("EE", "EAE") else ():
                    event["roles"] = list(dict.fromkeys(event["roles"]))
            written = (tmp_path / "out.jsonl").open(encoding="utf-8")
            assert [json.loads(line) for line in written] == rows, path
