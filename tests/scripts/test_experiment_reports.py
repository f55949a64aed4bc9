"""Reports of `experiments`: which runs are compared, and what their tables say."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from peft_taskmoe.uie import Entity, read_jsonl, score
from versions import needs_transformers_5

pytestmark = needs_transformers_5

DOCUMENTS = Path(__file__).parents[2] / "examples" / "data" / "demo" / "test_unseen.jsonl"
PLAN = {"baseline": "lora-36", "command": "x", "clusters": {}}


def content(name: str, rate: float, seed: int, loss: float, label: str | None = None) -> dict:
    """A run's file: two zero-shot sets, whose gold answers have one loss per token and are found.

    `label`: what every entity is called; None: what it is called in the gold records.
    """
    documents = read_jsonl(DOCUMENTS).documents[:6]
    sets = {"a": documents[:3], "b": documents[3:]}

    def answer(record):
        return replace(record, label=label) if label and isinstance(record, Entity) else record

    answers = {
        key: {one.id: [answer(record) for record in one.records] for one in found}
        for key, found in sets.items()
    }
    nll = {
        key: {one.id: [loss * (i + 1), i + 1] for i, one in enumerate(found)}
        for key, found in sets.items()
    }
    configuration = {"name": name, "method": "lora", "adapter": {"r": 4, "lora_alpha": 4}}
    training = {"documents": {"x": 2}, "steps": 1, "trainable_parameters": 10, "seconds": 60.0}
    return {
        "settings": {
            "configuration": configuration | {"encoder": None},
            "effective_scale": 1.0,
            "learning_rate": rate,
            "seed": seed,
            "benchmark": {"epochs": 1, "model_name_or_path": "m", "dtype": "float32"},
            "training": {"max_length": 512},
        },
        "versions": {},
        "figures": {
            "scores": score(sets, answers).to_dict(documents=True),
            "identification": score(sets, answers, identification=True).to_dict(documents=True),
            **{"nll_dev": nll, "nll_zero_shot": nll, "nll_supervised": {}},
            "generation_seconds": {"a": 60.0},
            "training": training | {"tokens_per_second": 5.0},
        },
    }


@pytest.fixture
def outcome(parts):
    """`outcome(name, rate, seed, loss)`: a finished run."""
    return lambda *args: parts.outcomes.Outcome(content(*args))


def write(folder: Path, runs: list[dict], order: list[str], **plan: object) -> None:
    """A results folder."""
    (folder / "runs").mkdir(exist_ok=True)
    for run in runs:
        settings = run["settings"]
        name = f"{settings['configuration']['name']}{settings['learning_rate']}{settings['seed']}"
        (folder / "runs" / f"{name}.json").write_text(json.dumps(run))
    (folder / "plan.json").write_text(json.dumps({**PLAN, "configurations": order, **plan}))


def test_comparisons_are_made_at_each_learning_rate_and_at_each_ones_best(parts, outcome) -> None:
    losses = {
        **{("lora-36", 1e-3): 2.0, ("lora-36", 1e-4): 1.0},
        **{("task-aware", 1e-3): 0.5, ("task-aware", 1e-4): 3.0},
    }
    runs = [outcome(*at, seed, loss) for at, loss in losses.items() for seed in (1, 0)]
    found = parts.outcomes.selections(runs, ["lora-36", "task-aware"])
    best = found.pop("each at its best learning rate")
    assert list(found) == ["learning rate 0.0001", "learning rate 0.001"]
    assert [(name, of[0].learning_rate, [run.seed for run in of]) for name, of in best.items()] == [
        ("lora-36", 1e-4, [0, 1]),
        ("task-aware", 1e-3, [0, 1]),
    ]
    both = best["task-aware"], best["lora-36"]
    line = parts.comparing.compare_likelihood(*both, "zero_shot", {})["all"]
    assert line.difference == pytest.approx(-0.5) and line.high < 0
    # Per token, not per document.
    assert best["lora-36"][0].likelihood("zero_shot", "a") == pytest.approx(1.0)


def test_the_best_learning_rate_is_chosen_over_the_seeds_of_every_rate(parts, outcome) -> None:
    # Seed 1 is a harder draw, and only one rate has it.
    tried = {(1e-3, 0): 2.0, (1e-4, 0): 1.0, (1e-4, 1): 9.0}
    runs = [outcome("lora-36", rate, seed, loss) for (rate, seed), loss in tried.items()]
    best = parts.outcomes.selections(runs, ["lora-36"])[parts.outcomes.BEST]["lora-36"]
    assert [(run.learning_rate, run.seed) for run in best] == [(1e-4, 0), (1e-4, 1)]


def test_a_report_names_the_seeds_versions_and_documents_of_its_figures(parts, tmp_path) -> None:
    losses = {
        **{("lora-36", 0): 2.0, ("lora-36", 1): 3.0},
        **{("task-aware", 1): 2.5, ("task-aware", 0): 1.9},
    }
    runs = []
    for (name, seed), loss in losses.items():
        run = content(name, 1e-3, seed, loss)
        run["figures"]["nll_supervised"] = {"a": {"x": [loss, 1], "y": [2 * loss, 1]}}
        run["versions"] = {"torch": "2.13"}
        versions = {"torch": "2.13", "sources": "old" if seed else "new"}
        run["figures"]["training"]["versions"] = versions
        runs.append(run)
    write(tmp_path, runs, ["lora-36", "task-aware"], clusters={"a": "(.*)-"})
    text = parts.report.write(tmp_path)
    scores = parts.outcomes.Outcome(runs[0]).scores.scores
    for words in (
        *("| task-aware - lora-36 | 2 |", "| -0.1000, -0.5000 | -0.4500 ["),  # by seed, supervised
        "| sources | old | lora-36 seed 1, task-aware seed 1 |",
        *("| torch | 2.13 | all |", "Parts of one whole are drawn together in a."),
        *(f"| {one.dataset} | {one.task} | {one.total().support} |" for one in scores),
        "| data set | lora-36 | task-aware |",
    ):
        assert words in text, words
    (tmp_path / "runs" / "task-aware0.0010.json").unlink()
    text = parts.report.write(tmp_path)
    assert "| data set | lora-36 (seed 0, 1) | task-aware (seed 1) |" in text


def test_documents_of_one_whole_are_drawn_together(parts, outcome) -> None:
    run = outcome("a", 1e-3, 0, 1.0)
    names = ("x-news-E1", "x-news-E2", "alone")
    run.figures["nll_zero_shot"]["a"] = {name: [1.0, 1] for name in names}
    found = parts.outcomes.clusters_of(run, "zero_shot", {"a": r"(.*)-E\d+$"})
    assert found == {"a": {"x-news-E1": "x-news", "x-news-E2": "x-news"}}


def test_an_interval_over_trainings_is_a_paired_t_interval(parts) -> None:
    """Mean 0.1, standard error 0.15275; with 2 degrees of freedom 4.30265 times that."""
    assert parts.formats.t_interval([-0.1, 0.0, 0.4]) == "+0.1000 [-0.5572, +0.7572]"
    assert parts.formats.t_interval([-0.1, 0.0]) == "-"


@pytest.mark.slow
def test_runs_measured_by_likelihood_alone_are_compared_by_it(parts, tmp_path) -> None:
    order = ["lora-32", "lora-36", "task-aware"]

    def run(name: str, rate: float, loss: float, *leave_out: str) -> dict:
        found = content(name, rate, 0, loss) | {"versions": {"torch": str(rate)}}
        for figure in leave_out:
            del found["figures"][figure]
        return found

    unscored = ("scores", "identification", "generation_seconds")
    runs = [
        run("lora-36", 1e-3, 2.0),
        run("lora-32", 1e-3, 9.0),
        run("task-aware", 1e-3, 1.9),
        run("task-aware", 2e-3, 1.5, *unscored),
        run("lora-36", 2e-3, 2.5, *unscored, "nll_zero_shot", "nll_supervised"),
    ]
    write(tmp_path, runs, order)
    text = parts.report.write(tmp_path)
    best = "each at its best learning rate"
    for row in (
        "| lora-36 | 0.001 | 0 | 2.0000 | - | 2.0000 | yes |",
        "| lora-36 | 0.002 | 0 | 2.5000 | - | - |  |",
        "| task-aware | 0.001 | 0 | 1.9000 | - | 1.9000 |  |",
        "| task-aware | 0.002 | 0 | 1.5000 | - | 1.5000 | yes |",
        "| learning rate 0.001 | task-aware - lora-36 | -0.1000 [-0.1000, -0.1000] | -0.1000 | - |",
        f"| {best} | task-aware - lora-36 | -0.5000 [-0.5000, -0.5000] | -0.5000 | - |",
        "| lora-32 | 0.001 | 0 | 9.0000 | - | 9.0000 |  |",  # tried with one rate: none is its best
        "| torch | 0.002 | lora-36 learning rate 0.002 seed 0, task-aware learning rate 0.002 seed",
    ):
        assert row in text, row
    assert f"| {best} | lora-32" not in text
    # There are no answers at 2e-3, nor of task-aware at its best.
    assert [line for line in text.splitlines() if line.startswith("## ")] == [
        *("## Learning rates", "## Learning rate 0.001", "## Made with")
    ]

    write(tmp_path, [run("lora-36", 2e-3, 1.8), run("task-aware", 2e-3, 1.5)], order)
    text = parts.report.write(tmp_path)
    # Both are best at 2e-3: the same runs are not shown again.
    assert text.count("Zero-shot differences") == 2
    heading = "## Each at its best learning rate\n\n"
    assert heading + 'These are the runs of "learning rate 0.002" above.' in text

    write(tmp_path, [run("lora-36", 1e-3, 2.0, *unscored)], ["lora-36"])
    for path in (tmp_path / "runs").glob("*0.002*"):
        path.unlink()
    assert "Strict micro F1" not in parts.report.write(tmp_path)


def test_a_report_tells_mentions_not_found_from_mentions_mislabelled(parts, tmp_path) -> None:
    runs = [content("lora-36", 1e-3, 0, 1.0), content("task-aware", 1e-3, 0, 1.0, "thing")]
    for run in runs:
        for counts in run["figures"]["scores"]["answers"].values():
            problems = {"repeated": 7, "unknown_label": 5}
            counts |= {"parse_failures": 1, "hallucinated": 2, "problems": problems}
    write(tmp_path, runs, ["lora-36", "task-aware"])
    text = parts.report.write(tmp_path)
    strict, identified, labels = (
        text.split(heading)[1].split("\n\n")[1]
        for heading in ("Strict micro F1, zero", "F1 of identification (", "The label that most")
    )
    scores = parts.outcomes.Outcome(runs[0]).scores.scores
    entities = [one for one in scores if one.task == "NER"]
    assert entities
    for one in entities:
        cells = f"| {one.dataset} | NER | {one.total().support} | 100.0 |"
        assert f"{cells} 0.0 |" in strict and f"{cells} 100.0 |" in identified
    assert "| thing 100 % |" in labels
    assert "| a | 1 / 2 / 5 / 7 | 1 / 2 / 5 / 7 |" in text
    (row,) = (line for line in text.splitlines() if line.startswith("| task-aware - lora-36 |"))
    cells = row.split(" | ")
    assert cells[2].startswith("-") and cells[5] == "+0.0 [+0.0, +0.0]"


def test_runs_of_other_settings_are_not_compared(parts, outcome) -> None:
    a, b = (outcome(name, 1e-3, 0, 1.0) for name in "ab")
    parts.outcomes.check_comparable([a, b])
    b.settings["training"] = {"max_length": 1024}
    message = "Run b, seed 0, was made with `max_length` = 1024, run a, seed 0, with 512"
    with pytest.raises(ValueError, match=message):
        parts.outcomes.check_comparable([a, b])


def test_only_seeds_that_both_have_are_compared(parts, outcome) -> None:
    a, b = ([outcome(n, 1e-3, s, 1.0) for s in of] for n, of in (("a", (0, 1, 2)), ("b", (2, 0))))
    assert [[run.seed for run in runs] for runs in parts.outcomes.pair(a, b)] == [[0, 2], [2, 0]]


def test_what_reads_the_task_is_compared_with_token_only_and_the_ablated(parts, outcome) -> None:
    runs = {name: [outcome(name, 1e-3, 0, 1.0)] for name in ("lora-36", "token", "task", "pooling")}
    token = {"method": "moelora", "adapter": {"router_inputs": "token"}}
    runs["token"][0].settings["configuration"] |= token
    for name in ("task", "pooling"):
        runs[name][0].settings["configuration"] |= {"method": "moelora", "encoder": {}}
    with_baseline = [("token", "lora-36"), ("task", "lora-36"), ("pooling", "lora-36")]
    with_tokens = [("task", "token"), ("pooling", "token")]
    pairs = parts.outcomes.pairs
    assert pairs(runs, "lora-36", None) == with_baseline + with_tokens
    assert pairs(runs, "lora-36", "task") == [*with_baseline, *with_tokens, ("pooling", "task")]
    others = [(name, "task") for name in ("lora-36", "token", "pooling")]
    assert pairs(runs, "task", "task") == [*others, ("pooling", "token")]
    del runs["task"]  # not run yet
    assert pairs(runs, "lora-36", "task") == [*with_baseline[::2], ("pooling", "token")]


def test_the_nearest_training_set_is_that_with_the_likest_gates(parts, outcome) -> None:
    run = outcome("a", 1e-3, 0, 1.0)
    run.figures["nll_dev"] = {"x": {}, "y": {}}
    mean = {"x": [[0.9, 0.1]], "y": [[0.2, 0.8]], "a": [[0.8, 0.2]], "b": [[0.1, 0.9]]}
    run.figures["gates"] = {"mean": mean}
    near = parts.answer_tables.nearest(run)
    assert {name: other for name, (_, other) in near.items()} == {"a": "x", "b": "y"}
    assert all(math.isclose(value, 1.0) for value, _ in near.values())


def test_what_is_kept_of_a_study_makes_its_table_and_plots(parts, tmp_path) -> None:
    runs = [content("lora-36", 1e-3, seed, 2.0 + 0.1 * seed) for seed in range(3)]
    runs += [content("task-aware", 1e-3, seed, 1.9) for seed in range(3)]
    for run in runs[3:]:
        swapped = {
            key: {i: [0.5 * n, n] for i, (_, n) in found.items()}
            for key, found in run["figures"]["nll_zero_shot"].items()
        }
        run["figures"]["nll_swapped"] = swapped
    (tmp_path / "results").mkdir()
    write(tmp_path / "results", runs, ["lora-36", "task-aware"])
    study = tmp_path / "study"
    parts.study.main(["keep", str(tmp_path / "results"), str(study), "--training-schemas", "9"])
    kept = (study / "README.md").read_text()
    assert "| lora-36 | 0.001 | 0, 1, 2 | 2.1000 (2.0000 .. 2.2000) | - | 2.1000 (" in kept
    assert (
        "| task-aware - lora-36 | -0.2000 [-0.2000, -0.2000] | -0.1000, -0.2000, -0.3000 |" in kept
    )
    assert "| task-aware, swapped task - task-aware | -1.4000 [" in kept
    for name in ("README.md", "nll.png"):
        (study / name).unlink()
    parts.study.main(["show", str(study)])
    assert (study / "README.md").read_text() == kept and (study / "nll.png").is_file()
    parts.study.main(["against", str(study), str(study)])
    assert (study / "schemas.png").is_file()
