"""The corpus in examples/data/demo is what its README says: format, offsets, coverage, held-out
labels, no templates.

Reads the three JSONL files with the standard library alone; knows neither torch nor
`peft_taskmoe`, so that it checks the data and not our readers of it.
"""

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "data" / "demo"
FILES = ("train", "test_seen", "test_unseen")
TASKS = {"NER", "RE", "EE", "EAE"}
FUNCTION_WORDS = {"by", "for", "from", "in", "into", "of", "on", "to", "with"}

Row = dict[str, Any]


@pytest.fixture(scope="module")
def corpus() -> dict[str, list[Row]]:
    return {
        name: [
            json.loads(line)
            for line in (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        for name in FILES
    }


def mentions(row: Row) -> Iterator[dict[str, Any]]:
    """Every {text, start, end} of a row, entities given beside included."""
    for annotation in row["annotations"]:
        if row["task"] == "NER":
            yield annotation
        elif row["task"] == "RE":
            yield annotation["head"]
            yield annotation["tail"]
        else:
            yield annotation["trigger"]
            yield from annotation["arguments"]
    yield from row.get("entities", ())


def names_in_schema(row: Row) -> set[str]:
    """All names a row's schema defines: labels, relations, event types and roles, and the types of
    given entities.
    """
    names = set(row["schema"])
    if row["task"] in {"EE", "EAE"}:
        names |= {role for event in row["schema"].values() for role in event["roles"]}
    return names | {entity["label"] for entity in row.get("entities", ())}


def annotated_labels(row: Row) -> Iterator[str]:
    """The label of every annotation, and `Type:Role` of every argument."""
    for annotation in row["annotations"]:
        if row["task"] == "NER":
            yield annotation["label"]
        elif row["task"] == "RE":
            yield annotation["relation"]
        else:
            yield annotation["type"]
            yield from (
                f"{annotation['type']}:{argument['role']}" for argument in annotation["arguments"]
            )


def is_empty(row: Row) -> bool:
    """Whether the right answer has no record (EAE: no argument)."""
    if row["task"] == "EAE":
        return not row["annotations"][0]["arguments"]
    return not row["annotations"]


def masked(row: Row) -> str:
    """The text with every annotated mention replaced by one placeholder: what a template leaves
    behind.
    """
    text, upto = "", 0
    for start, end in sorted({(m["start"], m["end"]) for m in mentions(row)}):
        if start >= upto:
            text += row["text"][upto:start] + "MENTION"
            upto = end
    return text + row["text"][upto:]


def four_grams(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.casefold())
    return set(zip(*(words[i:] for i in range(4)), strict=False))


def overlap(a: set[tuple[str, ...]], b: set[tuple[str, ...]]) -> float:
    """|a & b| / min(|a|, |b|)."""
    return len(a & b) / max(1, min(len(a), len(b)))


def label_words(name: str) -> set[str]:
    return set(re.findall(r"[a-z]+", name.casefold())) - FUNCTION_WORDS


def test_sizes_and_tasks(corpus):
    assert sum(map(len, corpus.values())) >= 150
    assert len(corpus["train"]) >= 150
    for rows in corpus.values():
        assert {row["task"] for row in rows} == TASKS
    assert min(len(corpus["test_seen"]), len(corpus["test_unseen"])) >= 40
    shares = {
        task: n / len(corpus["train"])
        for task, n in Counter(r["task"] for r in corpus["train"]).items()
    }
    assert shares == pytest.approx({"NER": 0.45, "RE": 0.25, "EE": 0.15, "EAE": 0.15}, abs=0.03)


@pytest.mark.parametrize("name", FILES)
def test_rows_have_the_format(corpus, name):
    for row in corpus[name]:
        expected = {"id", "text", "task", "domain", "schema", "annotations"} | (
            {"entities"} if row["task"] == "RE" else set()
        )
        assert set(row) == expected, row["id"]
        assert 60 <= len(row["text"]) <= 220, row["id"]
        assert row["text"] == row["text"].strip() and "  " not in row["text"], row["id"]
        for definition in row["schema"].values():
            event = row["task"] in {"EE", "EAE"}
            assert (
                (set(definition) == {"description", "roles"})
                if event
                else isinstance(definition, str)
            )
            description = definition["description"] if event else definition
            assert 3 <= len(description.split()) <= 10, description
            if event:
                assert 2 <= len(definition["roles"]) <= 4 and len(set(definition["roles"])) == len(
                    definition["roles"]
                )
        low, high = {"NER": (2, 5), "RE": (1, 4), "EE": (1, 3), "EAE": (1, 1)}[row["task"]]
        assert low <= len(row["schema"]) <= high, row["id"]


@pytest.mark.parametrize("name", FILES)
def test_annotations_follow_their_schema(corpus, name):
    for row in corpus[name]:
        assert len(row["annotations"]) <= 5, row["id"]
        if row["task"] == "EAE":
            assert len(row["annotations"]) == 1, row["id"]
        given = [(e["label"], e["text"], e["start"], e["end"]) for e in row.get("entities", ())]
        for annotation in row["annotations"]:
            if row["task"] == "NER":
                assert (
                    set(annotation) == {"label", "text", "start", "end"}
                    and annotation["label"] in row["schema"]
                )
            elif row["task"] == "RE":
                assert (
                    set(annotation) == {"relation", "head", "tail"}
                    and annotation["relation"] in row["schema"]
                )
                for end in (annotation["head"], annotation["tail"]):
                    assert (end["type"], end["text"], end["start"], end["end"]) in given, row["id"]
            else:
                assert set(annotation) == {"type", "trigger", "arguments"}
                roles = row["schema"][annotation["type"]]["roles"]
                assert all(argument["role"] in roles for argument in annotation["arguments"]), row[
                    "id"
                ]
        keys = [json.dumps(annotation, sort_keys=True) for annotation in row["annotations"]]
        assert len(keys) == len(set(keys)), f"{row['id']} has the same annotation twice"


@pytest.mark.parametrize("name", FILES)
def test_offsets_are_exact_and_on_word_boundaries(corpus, name):
    for row in corpus[name]:
        text = row["text"]
        for mention in mentions(row):
            start, end = mention["start"], mention["end"]
            assert mention["text"] and text[start:end] == mention["text"], (row["id"], mention)
            assert mention["text"] == mention["text"].strip(), (row["id"], mention)
            assert not (start and text[start - 1].isalnum() and text[start].isalnum()), (
                row["id"],
                mention,
            )
            assert not (end < len(text) and text[end - 1].isalnum() and text[end].isalnum()), (
                row["id"],
                mention,
            )


def test_mentions_carry_no_leading_article(corpus):
    for row in itertools.chain.from_iterable(corpus.values()):
        titles = {m["text"] for m in row["annotations"] if m.get("label") == "creative-work"}
        titles |= {e["text"] for e in row.get("entities", ()) if e["label"] == "creative-work"}
        for mention in mentions(row):
            leading = re.match(r"(the|a|an) ", mention["text"], re.IGNORECASE)
            assert leading is None or mention["text"] in titles, (row["id"], mention["text"])


def test_one_name_one_meaning_within_a_domain(corpus):
    seen: dict[tuple[str, str, str], Any] = {}
    for row in itertools.chain.from_iterable(corpus.values()):
        for label, definition in row["schema"].items():
            assert seen.setdefault((row["task"], row["domain"], label), definition) == definition, (
                row["id"]
            )


def test_labels_of_test_unseen_are_held_out(corpus):
    trained = set().union(*map(names_in_schema, corpus["train"]))
    held_out = set().union(*map(names_in_schema, corpus["test_unseen"]))
    assert not {n.casefold() for n in trained} & {n.casefold() for n in held_out}
    # Nor does a held-out name share a content word with a trained one (`river` and `river-boat`
    # would).
    assert not set().union(*map(label_words, trained)) & set().union(*map(label_words, held_out))
    assert not {r["domain"] for r in corpus["train"]} & {r["domain"] for r in corpus["test_unseen"]}


def test_labels_of_test_seen_are_covered_by_training(corpus):
    trained = Counter(label for row in corpus["train"] for label in annotated_labels(row))
    tested = {label for row in corpus["test_seen"] for label in annotated_labels(row)}
    assert {label: trained[label] for label in tested if trained[label] < 6} == {}
    assert tested == set(trained)  # and nothing that is trained goes untested


@pytest.mark.parametrize("name", FILES)
def test_some_answers_are_empty(corpus, name):
    share = sum(map(is_empty, corpus[name])) / len(corpus[name])
    assert 0.05 <= share <= 0.15


def test_the_hard_cases_occur_in_training(corpus):
    rows = corpus["train"]
    labels = {name for row in rows for name in row["schema"]}
    spans = [mention["text"] for row in rows for mention in mentions(row)]
    assert sum(not label.isidentifier() for label in labels) >= 10
    assert sum(not span.isascii() for span in spans) >= 20
    assert sum(" " in span for span in spans) >= 50
    assert any("'" in span for span in spans) and any('"' in row["text"] for row in rows)
    assert any(
        len(row["annotations"]) > len({(a["label"], a["text"]) for a in row["annotations"]})
        for row in rows
        if row["task"] == "NER"
    ), "no repeated mention"


def test_ids_and_texts_are_unique_across_files(corpus):
    rows = list(itertools.chain.from_iterable(corpus.values()))
    for values in ([row["id"] for row in rows], [row["text"].casefold() for row in rows]):
        assert [value for value, n in Counter(values).items() if n > 1] == []


def test_no_two_texts_share_a_template(corpus):
    rows = list(itertools.chain.from_iterable(corpus.values()))
    for view in (lambda row: row["text"], masked):
        grams = [(row["id"], four_grams(view(row))) for row in rows]
        shared = [
            (a, b) for (a, x), (b, y) in itertools.combinations(grams, 2) if overlap(x, y) > 0.6
        ]
        assert shared == []


def test_the_template_check_sees_a_template():
    def row(name: str, city: str) -> Row:
        text = f"{name} moved to {city} last year and liked it there."
        spans = [(text.index(s), text.index(s) + len(s)) for s in (name, city)]
        return {
            "text": text,
            "task": "NER",
            "annotations": [{"start": a, "end": b} for a, b in spans],
        }

    one, other = row("Ann", "Bath"), row("Mary Lou", "New York")
    assert masked(one) == "MENTION moved to MENTION last year and liked it there."
    assert overlap(four_grams(masked(one)), four_grams(masked(other))) == 1.0
    assert (
        overlap(four_grams(one["text"]), four_grams("Nobody else was in the room when it rained."))
        == 0.0
    )


def test_readme_states_the_counts(corpus):
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    for name, rows in corpus.items():
        tasks = Counter(row["task"] for row in rows)
        cells = (
            len(rows),
            *(tasks[t] for t in ("NER", "RE", "EE", "EAE")),
            sum(map(is_empty, rows)),
        )
        assert f"| `{name}.jsonl` | " + " | ".join(map(str, cells)) + " |" in readme
