"""Tables of one selection of runs: F1, likelihood, problems of answers, routers and cost."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from comparing import Patterns, compare_likelihood
from formats import heads, interval, spread, table
from outcomes import Outcome, Selection

from peft_taskmoe.uie import ScoreReport
from peft_taskmoe.uie.scoring.counts import Counts

GROUPS = ("NER", "RE", "EE", "EAE", "EE+EAE", "all")


def f1_by_task(chosen: Selection) -> list[str]:
    """Zero-shot F1 by task, seen / unseen labels: the paper's layout."""
    rows = []
    for group in GROUPS:
        reports = {
            name: [run.scores_of("zero_shot") for run in runs] for name, runs in chosen.items()
        }
        if all(group in of_seed[0].groups() for of_seed in reports.values()):
            cells = [
                " / ".join(
                    spread([fmean(100 * one.average_f1(group, split) for one in of_seed)])
                    for split in ("seen", "unseen")
                )
                for of_seed in reports.values()
            ]
            rows.append([group, *cells])
    return [
        "Zero-shot F1, seen / unseen labels, unweighted means over data sets, then over seeds:",
        "",
        table(["", *heads(chosen)], rows),
        "",
    ]


def by_dataset(chosen: Selection, part: str) -> list[str]:
    """F1, identification, commonest labels, likelihoods and problems of a part's data sets."""
    sets, columns = part.replace("_", "-") + " data sets", heads(chosen)
    scored = ["data set", "task", "gold items", *columns]
    tables = {
        f"Strict micro F1, {sets}: mean over seeds (lowest .. highest):": (
            scored,
            _f1_rows(chosen, part, identification=False),
        ),
        f"F1 of identification (mentions found, whatever label they got), {sets}:": (
            scored,
            _f1_rows(chosen, part, identification=True),
        ),
        f"The label that most records have, and its share of them, {sets}, one for each seed:": (
            ["data set", "task", "gold", *columns],
            _commonest(chosen, part),
        ),
        f"NLL per token, {sets}:": (["data set", *columns], _likelihoods(chosen, part)),
        "Answers with a parse failure / records left out because a span is not in the text / "
        f"the schema lacks the label / they repeat one, {sets}:": (
            ["data set", *columns],
            _problems(chosen, part),
        ),
    }
    return [
        line
        for title, (header, rows) in tables.items()
        for line in (title, "", table(header, rows), "")
    ]


def _f1_rows(chosen: Selection, part: str, identification: bool) -> list[list[Any]]:
    reports = [[run.scores_of(part, identification) for run in runs] for runs in chosen.values()]
    rows: list[list[Any]] = []
    for i, score in enumerate(reports[0][0].scores):
        totals = [[one.scores[i].total() or Counts() for one in of_seed] for of_seed in reports]
        cells = [spread([100 * total.f1 for total in of_seed]) for of_seed in totals]
        rows.append([score.dataset, score.task, totals[0][0].support, *cells])
    means = [spread([100 * one.average_f1() for one in of_seed]) for of_seed in reports]
    return [*rows, ["mean", "", "", *means]]


def _commonest(chosen: Selection, part: str) -> list[list[str]]:
    reports = [[run.scores_of(part) for run in runs] for runs in chosen.values()]
    rows = []
    for i, score in enumerate(reports[0][0].scores):
        gold = _most({label: one.support for label, one in score.by_label().items()})
        cells = [", ".join(_most(_predicted(one, i)) for one in of_seed) for of_seed in reports]
        rows.append([score.dataset, score.task, gold, *cells])
    return rows


def _predicted(report: ScoreReport, i: int) -> dict[str, int]:
    return {label: one.tp + one.fp for label, one in report.scores[i].by_label().items()}


def _most(counts: Mapping[str, int]) -> str:
    total = sum(counts.values())
    label = max(counts, key=lambda one: counts[one], default="")
    return f"{label} {100 * counts[label] / total:.0f} %" if total else "-"


def _likelihoods(chosen: Selection, part: str) -> list[list[str]]:
    names = next(iter(chosen.values()))[0].sets(part)
    form = "{:.4f}"
    rows = [
        [
            name,
            *(
                spread([run.likelihood(part, name) for run in runs], form)
                for runs in chosen.values()
            ),
        ]
        for name in names
    ]
    means = [spread([run.mean_likelihood(part) for run in runs], form) for runs in chosen.values()]
    return [*rows, ["mean", *means]]


def _problems(chosen: Selection, part: str) -> list[list[str]]:
    def counts(run: Outcome, name: str) -> list[int]:
        one = run.scores.answers[name]
        of_kind = (one.problems.get(kind, 0) for kind in ("unknown_label", "repeated"))
        return [one.parse_failures, one.hallucinated, *of_kind]

    def cell(runs: Sequence[Outcome], name: str) -> str:
        return " / ".join(
            f"{fmean(of_kind):g}"
            for of_kind in zip(*(counts(run, name) for run in runs), strict=True)
        )

    names = next(iter(chosen.values()))[0].sets(part)
    return [[name, *(cell(runs, name) for runs in chosen.values())] for name in names]


def routers(chosen: Selection, patterns: Patterns) -> list[str]:
    """What the routers do: how sure, how much by task, and what the task embedding is worth."""
    rows = []
    for name, runs in chosen.items():
        if "gates" not in runs[0].figures:
            continue
        gates = [run.figures["gates"] for run in runs]
        experts = len(next(iter(gates[0]["mean"].values()))[0])
        swapped = "-"
        if runs[0].sets("swapped"):
            line = compare_likelihood(runs, runs, "zero_shot", patterns, of_a="swapped")["all"]
            swapped = interval(line)
        rows.append(
            [
                name,
                spread(
                    [fmean(one["entropy"].values()) / math.log(experts) for one in gates], "{:.3f}"
                ),
                spread([100 * _task_share(one["variance"]) for one in gates]),
                spread([fmean(s for s, _ in nearest(run).values()) for run in runs], "{:.4f}"),
                swapped,
            ]
        )
    if not rows:
        return []
    header = [
        "configuration",
        "entropy / ln E",
        "variance between data sets, %",
        "cosine to the nearest training set",
        "zero-shot NLL with another data set's task embeddings, minus its own",
    ]
    title = "What the routers do (gates over prompts and gold answers, means over layers):"
    return [title, "", table(header, rows), ""]


def _task_share(variances: Iterable[Sequence[float]]) -> float:
    """Share of the gates' variance that is between tasks, mean over layers."""
    return fmean(
        between / (within + between) if within + between else 0.0 for within, between in variances
    )


def nearest(run: Outcome) -> dict[str, tuple[float, str]]:
    """For each zero-shot set the training set with the most similar gates, and their cosine.

    Gates are the layers' means, less those of all training sets.
    """
    gates = {name: np.array(mean).ravel() for name, mean in run.figures["gates"]["mean"].items()}
    centre = np.mean([gates[name] for name in run.sets("dev")], axis=0)

    def cosine(a: Any, b: Any) -> float:
        return float(a @ b / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-12))

    return {
        name: max(
            (cosine(gates[name] - centre, gates[seen] - centre), seen) for seen in run.sets("dev")
        )
        for name in run.sets("zero_shot")
        if name in gates
    }


def costs(chosen: Selection, baseline: str) -> list[str]:
    """Parameters and times."""
    training = {name: [run.figures["training"] for run in runs] for name, runs in chosen.items()}
    sizes = {name: of_seed[0]["trainable_parameters"] for name, of_seed in training.items()}
    rows = [
        [
            name,
            f"{sizes[name]:,}",
            f"{sizes[name] / sizes[baseline]:.3f}" if baseline in sizes else "-",
            spread([one["seconds"] / 60 for one in training[name]]),
            spread([one["tokens_per_second"] for one in training[name]], "{:.0f}"),
            spread([sum(run.figures["generation_seconds"].values()) / 60 for run in runs]),
        ]
        for name, runs in chosen.items()
    ]
    header = [
        "configuration",
        "trainable parameters",
        f"of {baseline}",
        "training, min",
        "training tokens/s",
        "answers, min",
    ]
    return [
        "Cost, with whatever else the machine did then; `benchmarks/adapters.py` compares speeds:",
        "",
        table(header, rows),
        "",
    ]


def labels(chosen: Selection, path: Path) -> list[str]:
    """Write a file with precision, recall and F1 by label and argument role, run by run."""
    parts = [
        f"## {name}, seed {run.seed}\n\n{run.scores.to_markdown(labels=True)}\n"
        for name, runs in chosen.items()
        for run in runs
    ]
    path.write_text("# Scores by label\n\n" + "\n".join(parts), encoding="utf-8")
    return [f"By label and argument role, run by run: [{path.name}]({path.name}).", ""]
