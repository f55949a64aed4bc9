"""From the figures of runs to tables, tests and plots; reads `plan.json`, `runs/*.json` and `likelihoods/*.json` of a results folder.

    python examples/benchmark/report.py results

So a report can be made again, and checked, by who has only the results folder. Knows nothing of models.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import matplotlib.pyplot as plt
import numpy as np
from scipy.stats import spearmanr, ttest_1samp
from settings import first_difference

from peft_taskmoe.uie import Comparison, ScoreReport, compare, compare_values
from peft_taskmoe.uie.scoring import Counts, Difference

LIKELIHOODS = "likelihoods"
"""The folder of runs whose answers were not measured: see `measure`."""
GROUP_ROWS = ("NER", "RE", "EE", "EAE", "EE+EAE", "all")
Chosen = dict[str, list["Finished"]]
"""Configuration -> its runs, one for each seed."""
Selection = dict[str, list["Trained"]]
"""The same, with runs whose answers may not have been measured."""
Run = TypeVar("Run", bound="Trained")
Losses = Mapping[str, Mapping[str, Sequence[float]]]
"""Data set -> document -> (loss in nats, tokens)."""


class Trained:
    """A run whose likelihoods were measured, on all data sets or on the documents kept back alone."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        self.settings: dict[str, Any] = content["settings"]
        self.figures: dict[str, Any] = content["figures"]
        self.versions: dict[str, str] = content["versions"]
        self.configuration: str = self.settings["configuration"]["name"]
        self.learning_rate: float = self.settings["learning_rate"]
        self.seed: int = self.settings["seed"]

    def sets(self, part: str) -> list[str]:
        """The data sets of a part: "dev", "zero_shot", "supervised" or "swapped"; none if it was not measured."""
        return list(self.figures.get(f"nll_{part}", {}))

    def likelihood(self, part: str, dataset: str) -> float:
        """Negative log-likelihood per token of a data set's gold answers, in nats."""
        return per_token(self.figures[f"nll_{part}"][dataset])

    def mean_likelihood(self, part: str) -> float:
        """The unweighted mean over a part's data sets."""
        return float(np.mean([self.likelihood(part, name) for name in self.sets(part)]))


class Finished(Trained):
    """A run whose answers were measured as well."""

    def __init__(self, content: Mapping[str, Any]) -> None:
        super().__init__(content)
        self.scores = ScoreReport.from_dict(self.figures["scores"])
        self.identification = ScoreReport.from_dict(self.figures["identification"])

    def scores_of(self, part: str, identification: bool = False) -> ScoreReport:
        """The scores of a part's data sets; or those of identification, which disregard labels and roles."""
        return (self.identification if identification else self.scores).select(self.sets(part))


def per_token(losses: Mapping[str, Sequence[float]]) -> float:
    """A data set's loss per token, from document -> (loss, tokens)."""
    loss, tokens = np.array(list(losses.values())).sum(0)
    return float(loss / tokens)


def load(folder: Path) -> list[Trained]:
    """All runs of a results folder: those with answers, and the others that were only measured by likelihood."""
    finished = {
        path.name: Finished(json.loads(path.read_text()))
        for path in (folder / "runs").glob("*.json")
    }
    others = {
        path.name: Trained(json.loads(path.read_text()))
        for path in (folder / LIKELIHOODS).glob("*.json")
        if path.name not in finished
    }
    found: dict[str, Trained] = {**finished, **others}
    return [found[name] for name in sorted(found)]


def check_comparable(runs: Sequence[Trained]) -> None:
    """Refuse to compare runs on other data or with other training settings.

    Raises:
        ValueError: Naming the first run and setting that differ.
    """
    for run in runs[1:]:
        for part in ("benchmark", "training"):
            ours, theirs = runs[0].settings[part], run.settings[part]
            if name := first_difference(ours, theirs):
                raise ValueError(
                    f"Run {run.configuration}, seed {run.seed}, was made with `{name}` = {theirs.get(name)!r}, run "
                    f"{runs[0].configuration}, seed {runs[0].seed}, with {ours.get(name)!r}. They cannot be compared: move "
                    "one of them to a results folder of its own."
                )


BEST = "each at its best learning rate"


def by_rate(runs: Sequence[Trained], order: Sequence[str]) -> dict[str, dict[float, list[Trained]]]:
    """Configuration -> learning rate -> its runs, one for each seed; all of them in order."""
    found: dict[str, dict[float, list[Trained]]] = {}
    for run in sorted(
        runs, key=lambda run: (order.index(run.configuration), run.learning_rate, run.seed)
    ):
        found.setdefault(run.configuration, {}).setdefault(run.learning_rate, []).append(run)
    return found


def selections(runs: Sequence[Trained], order: Sequence[str]) -> dict[str, Selection]:
    """The comparisons to make: at each learning rate that several configurations share, and each one's best of several.

    The best learning rate of a configuration has the lowest likelihood loss on the documents kept back from training, over the
    seeds that it was tried with at every rate.
    """
    at: dict[float, Selection] = {}
    best: Selection = {}
    for name, rates in by_rate(runs, order).items():
        for rate, tried in rates.items():
            at.setdefault(rate, {})[name] = tried
        if len(rates) > 1:
            common = set.intersection(*({run.seed for run in tried} for tried in rates.values()))
            best[name] = min(
                rates.values(),
                key=lambda tried, seeds=common: _mean(
                    run.mean_likelihood("dev") for run in tried if run.seed in seeds or not seeds
                ),
            )
    found = {
        f"learning rate {rate:g}": chosen for rate, chosen in sorted(at.items()) if len(chosen) > 1
    }
    return {**found, BEST: best} if best else found


def with_answers(selection: Selection) -> Chosen:
    """The runs of a selection whose answers were measured."""
    found = {
        name: [run for run in runs if isinstance(run, Finished)] for name, runs in selection.items()
    }
    return {name: runs for name, runs in found.items() if runs}


def pair(a: Sequence[Run], b: Sequence[Run]) -> tuple[list[Run], list[Run]]:
    """The runs of two configurations with the seeds that both have."""
    common = {run.seed for run in a} & {run.seed for run in b}
    return [run for run in a if run.seed in common], [run for run in b if run.seed in common]


def clusters_of(run: Trained, part: str, patterns: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """What documents of a part are drawn together, by the patterns of `clusters`."""
    return {
        name: {
            key: found.group(1)
            for key in run.figures[f"nll_{part}"][name]
            if (found := re.search(patterns[name], key))
        }
        for name in run.sets(part)
        if name in patterns
    }


def compare_f1(
    a: Sequence[Finished],
    b: Sequence[Finished],
    part: str,
    patterns: Mapping[str, str],
    identification: bool = False,
) -> Comparison:
    """Paired bootstrap of F1, or of that of identification, over documents; F1 is the mean over seeds."""
    reports = ([run.scores_of(part, identification) for run in runs] for runs in (a, b))
    return compare(*reports, clusters=clusters_of(a[0], part, patterns))


def compare_likelihood(
    a: Sequence[Trained],
    b: Sequence[Trained],
    part: str,
    patterns: Mapping[str, str],
    of_a: str | None = None,
) -> Comparison:
    """Paired bootstrap over documents of the likelihood loss per token; each document's value is the mean over seeds."""
    losses = [
        {
            name: {
                key: (float(np.mean([r.figures[f"nll_{of}"][name][key][0] for r in runs])), tokens)
                for key, (_, tokens) in runs[0].figures[f"nll_{of}"][name].items()
            }
            for name in b[0].sets(part)
        }
        for runs, of in ((a, of_a or part), (b, part))
    ]
    return compare_losses(*losses, clusters=clusters_of(b[0], part, patterns))


def compare_losses(
    a: Losses, b: Losses, clusters: Mapping[str, Mapping[str, str]] | None = None
) -> Comparison:
    """Paired bootstrap over documents of the loss per token."""
    tables = [
        {name: {key: loss / n for key, (loss, n) in one.items()} for name, one in losses.items()}
        for losses in (a, b)
    ]
    weights = {name: {key: float(n) for key, (_, n) in one.items()} for name, one in b.items()}
    return compare_values(*tables, weights=weights, clusters=clusters)


def write(folder: Path) -> str:
    """Write `README.md`, `figures.json` and the plots of a results folder from its `plan.json` and its runs.

    Returns:
        The report, as Markdown.
    """
    plan = json.loads((folder / "plan.json").read_text())
    baseline, order, patterns = plan["baseline"], plan["configurations"], plan["clusters"]
    ablated = plan.get("ablated")
    runs = [run for run in load(folder) if run.configuration in order]
    if not runs:
        raise SystemExit(f"There is no run in {folder / 'runs'} or {folder / LIKELIHOODS}.")
    check_comparable(runs)
    lines = ["# Results", "", f"`{plan['command']}`", ""]
    lines += _what_was_run(runs)
    figures: dict[str, Any] = {}
    reported: dict[str, Chosen] = {}
    selected = selections(runs, order)
    if len({run.learning_rate for run in runs}) > 1 or not all(
        isinstance(run, Finished) for run in runs
    ):
        lines += _learning_rates(by_rate(runs, order), selected, baseline, ablated, patterns)
    for title, selection in selected.items():
        chosen = with_answers(selection)
        if len(chosen) < 2:
            continue
        slug = title.replace(" ", "_").replace(".", "-")
        lines += ["", f"## {title[0].upper()}{title[1:]}", ""]
        same = [before for before, of in reported.items() if of == chosen]
        if same:
            lines.append(f'These are the runs of "{same[0]}" above.')
            continue
        reported[title], figures[title] = chosen, {}
        lines += _paper_table(chosen)
        for part in ("zero_shot", "supervised"):
            if next(iter(chosen.values()))[0].sets(part):
                lines += _by_dataset(chosen, part)
        if baseline in chosen:
            compared = _compared(chosen, baseline, ablated, patterns)
            for (a, b), one in compared.items():
                figures[title][f"{a} - {b}"] = {
                    "f1": one.f1.to_dict(),
                    "identification": one.identification.to_dict(),
                    "nll": one.likelihood.to_dict(),
                    "nll_supervised": None if one.supervised is None else one.supervised.to_dict(),
                }
            lines += _comparisons(compared, patterns)
            lines += _plots(chosen, baseline, compared, patterns, folder, slug)
        lines += _router(chosen, patterns)
        lines += _costs(chosen, baseline)
        lines += _labels(chosen, folder / f"{slug}_labels.md")
    lines += ["", "## Made with", "", *_made_with(runs)]
    report = "\n".join(lines) + "\n"
    (folder / "README.md").write_text(report)
    (folder / "figures.json").write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n")
    return report


def _made_with(runs: Sequence[Trained]) -> list[str]:
    """Versions, and which runs had which where they differ: of the training, where the run says so, and of what ended it."""
    several = len({run.learning_rate for run in runs}) > 1
    found: dict[tuple[str, str], list[str]] = {}
    for run in runs:
        rate = f" learning rate {run.learning_rate:g}" if several else ""
        for versions in (run.figures["training"].get("versions", {}), run.versions):
            for item in versions.items():
                found.setdefault(item, []).append(f"{run.configuration}{rate} seed {run.seed}")
    packages = [package for package, _ in found]
    rows = [
        [package, version, "all" if packages.count(package) == 1 else ", ".join(dict.fromkeys(of))]
        for (package, version), of in sorted(found.items())
    ]
    return [table(["package", "version", "runs"], rows)]


def _heads(chosen: Chosen) -> list[str]:
    """The configurations as heads of columns; with their seeds, where these are not the same for all."""
    seeds = {name: ", ".join(str(run.seed) for run in runs) for name, runs in chosen.items()}
    if len(set(seeds.values())) == 1:
        return list(chosen)
    return [f"{name} (seed {seeds[name]})" for name in chosen]


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def _spread(values: Sequence[float], form: str = "{:.1f}") -> str:
    """Mean, and with several seeds their range."""
    if any(math.isnan(value) for value in values):
        return "-"
    text = form.format(_mean(values))
    return (
        text
        if len(values) == 1
        else f"{text} ({form.format(min(values))} .. {form.format(max(values))})"
    )


def interval(line: Difference) -> str:
    """A difference of losses, with its interval."""
    return f"{line.difference:+.4f} [{line.low:+.4f}, {line.high:+.4f}]"


def over_trainings(differences: Sequence[float]) -> str:
    """Mean of the seeds' differences with the 95 % interval of a paired t-test, which takes each training as one draw; "-" for fewer than three."""
    if len(differences) < 3:
        return "-"
    low, high = ttest_1samp(differences, 0.0).confidence_interval(0.95)
    return f"{_mean(differences):+.4f} [{low:+.4f}, {high:+.4f}]"


def _what_was_run(runs: Sequence[Trained]) -> list[str]:
    rows = []
    for run in runs:
        adapter = run.settings["configuration"]["adapter"]
        encoder = run.settings["configuration"]["encoder"]
        training = run.figures["training"]
        rows.append(
            [
                run.configuration,
                f"{run.learning_rate:g}",
                run.seed,
                adapter["r"]
                if "num_experts" not in adapter
                else f"{adapter['num_experts']} x {adapter['r']}",
                f"{run.settings['effective_scale']:g}",
                "-" if encoder is None else f"{encoder['text']} ({encoder['name_or_path']})",
                training["steps"],
                f"{run.mean_likelihood('dev'):.4f}",
            ]
        )
    first = runs[0]
    whole = max(runs, key=lambda run: len(run.sets("zero_shot")))
    tested = {
        name: len(whole.figures[f"nll_{part}"][name])
        for part in ("supervised", "zero_shot")
        for name in whole.sets(part)
    }
    documents = ", ".join(
        f"{name} {count}" for name, count in first.figures["training"]["documents"].items()
    )
    header = [
        "configuration",
        "learning rate",
        "seed",
        "rank",
        "alpha / rank of all",
        "task text",
        "steps",
        "dev NLL",
    ]
    return [
        f"Base model {first.settings['benchmark']['model_name_or_path']}, {first.settings['benchmark']['dtype']}. Training "
        f"documents: {documents} ({sum(first.figures['training']['documents'].values())} in all), tested on "
        + ", ".join(f"{name} {count}" for name, count in tested.items())
        + ".",
        "",
        "NLL is the negative log-likelihood per token of the gold answer, in nats: lower is better. The scale that a soft "
        "mixture starts with is alpha / (r E), since its gates are 1 / E on average; it is the same in all rows that say so.",
        "",
        table(header, rows),
    ]


def _paper_table(chosen: Chosen) -> list[str]:
    """Zero-shot F1 by task, seen / unseen labels: the paper's layout."""
    rows = []
    for group in GROUP_ROWS:
        cells = [group]
        for of_seed in chosen.values():
            reports = [run.scores_of("zero_shot") for run in of_seed]
            if group not in reports[0].groups():
                break
            values = [
                _mean(100 * one.average_f1(group, split) for one in reports)
                for split in ("seen", "unseen")
            ]
            cells.append(
                " / ".join("-" if math.isnan(value) else f"{value:.1f}" for value in values)
            )
        else:
            rows.append(cells)
    return [
        "Zero-shot F1, seen / unseen labels, unweighted means over data sets, then over seeds:",
        "",
        table(["", *_heads(chosen)], rows),
        "",
    ]


def _by_dataset(chosen: Chosen, part: str) -> list[str]:
    first = next(iter(chosen.values()))[0]
    strict, identified = (
        _f1_rows(
            [
                [run.scores_of(part, identification) for run in of_seed]
                for of_seed in chosen.values()
            ]
        )
        for identification in (False, True)
    )
    likelihoods = []
    for name in first.sets(part):
        values = [
            _spread([run.likelihood(part, name) for run in of_seed], "{:.4f}")
            for of_seed in chosen.values()
        ]
        likelihoods.append([name, *values])
    means = [
        _spread([run.mean_likelihood(part) for run in of_seed], "{:.4f}")
        for of_seed in chosen.values()
    ]
    likelihoods.append(["mean", *means])
    counts = []
    for name in first.sets(part):
        cells = [name]
        for of_seed in chosen.values():
            found = [run.scores.answers[name] for run in of_seed]
            kinds = [
                [
                    one.parse_failures,
                    one.hallucinated,
                    *(one.problems.get(kind, 0) for kind in _PROBLEMS),
                ]
                for one in found
            ]
            cells.append(" / ".join(f"{_mean(of_kind):g}" for of_kind in zip(*kinds, strict=True)))
        counts.append(cells)
    what = part.replace("_", "-")
    return [
        f"Strict micro F1, {what} data sets: mean over seeds (lowest .. highest):",
        "",
        table(["data set", "task", "gold items", *_heads(chosen)], strict),
        "",
        f"F1 of identification (mentions without labels and roles: found, whatever they were called), {what} data sets:",
        "",
        table(["data set", "task", "gold items", *_heads(chosen)], identified),
        "",
        f"The label that most records have, and its share of them, {what} data sets, one label for each seed:",
        "",
        table(["data set", "task", "gold", *_heads(chosen)], _commonest(chosen, part)),
        "",
        f"NLL per token, {what} data sets:",
        "",
        table(["data set", *_heads(chosen)], likelihoods),
        "",
        "Answers with a parse failure / records left out because a span is not in the text / because the schema does not have "
        f"the label / because they repeat one, {what} data sets:",
        "",
        table(["data set", *_heads(chosen)], counts),
        "",
    ]


_PROBLEMS = ("unknown_label", "repeated")


def _f1_rows(reports: Sequence[Sequence[ScoreReport]]) -> list[list[Any]]:
    """A row for each data set and task and their mean: F1 of each configuration, over its seeds."""
    rows: list[list[Any]] = []
    for i, score in enumerate(reports[0][0].scores):
        totals = [[one.scores[i].total() or Counts() for one in of_seed] for of_seed in reports]
        cells = [_spread([100 * total.f1 for total in of_seed]) for of_seed in totals]
        rows.append([score.dataset, score.task, totals[0][0].support, *cells])
    means = [_spread([100 * one.average_f1() for one in of_seed]) for of_seed in reports]
    return [*rows, ["mean", "", "", *means]]


def _commonest(chosen: Chosen, part: str) -> list[list[str]]:
    """For each data set and task the label of most gold records and of most predicted ones, with its share."""

    def commonest(counts: Mapping[str, int]) -> str:
        total = sum(counts.values())
        label = max(counts, key=lambda one: counts[one], default="")
        return f"{label} {100 * counts[label] / total:.0f} %" if total else "-"

    rows = []
    for i, score in enumerate(next(iter(chosen.values()))[0].scores_of(part).scores):
        gold = commonest({label: one.support for label, one in score.by_label().items()})
        cells = [
            ", ".join(
                commonest(
                    {
                        label: one.tp + one.fp
                        for label, one in run.scores_of(part).scores[i].by_label().items()
                    }
                )
                for run in of_seed
            )
            for of_seed in chosen.values()
        ]
        rows.append([score.dataset, score.task, gold, *cells])
    return rows


@dataclass(frozen=True)
class _Compared:
    """Two configurations on the zero-shot data sets, with the runs of the seeds that both have.

    `supervised`: likelihood on the other documents of the training sets, or None where there are none.
    """

    runs: list[Finished]
    f1: Comparison
    identification: Comparison
    likelihood: Comparison
    supervised: Comparison | None
    by_seed: dict[int, float]


def _compared(
    chosen: Chosen, baseline: str, ablated: str | None, patterns: Mapping[str, str]
) -> dict[tuple[str, str], _Compared]:
    """The comparisons of `_pairs` over the seeds that both have."""
    found = {}
    for a, b in _pairs(chosen, baseline, ablated):
        runs = pair(chosen[a], chosen[b])
        if runs[0]:
            of_f1 = compare_f1(*runs, "zero_shot", patterns)
            found_at_all = compare_f1(*runs, "zero_shot", patterns, identification=True)
            of_likelihood = compare_likelihood(*runs, "zero_shot", patterns)
            supervised = (
                compare_likelihood(*runs, "supervised", patterns)
                if runs[0][0].sets("supervised")
                else None
            )
            found[a, b] = _Compared(
                runs[0], of_f1, found_at_all, of_likelihood, supervised, _by_seed(*runs)
            )
    return found


def _pairs(
    names: Mapping[str, Sequence[Trained]], baseline: str, ablated: str | None
) -> list[tuple[str, str]]:
    """Every configuration with the baseline; those that read the task with the one that reads tokens only and the ablated one."""
    found = [(name, baseline) for name in names if name != baseline and baseline in names]
    others = [name for name in names if _router_inputs(names[name][0]) == "token"]
    others += [ablated] if ablated in names and ablated != baseline else []
    reading = [name for name in names if _reads_task(names[name][0])]
    return found + [
        (name, other) for other in others for name in reading if name not in (other, baseline)
    ]


def _by_seed(
    a: Sequence[Trained], b: Sequence[Trained], part: str = "zero_shot"
) -> dict[int, float]:
    """Differences of the loss, seed by seed."""
    of_a, of_b = ({run.seed: run.mean_likelihood(part) for run in of} for of in (a, b))
    return {seed: of_a[seed] - of_b[seed] for seed in sorted(of_a)}


def _learning_rates(
    tried: Mapping[str, Mapping[float, Sequence[Trained]]],
    selected: Mapping[str, Selection],
    baseline: str,
    ablated: str | None,
    patterns: Mapping[str, str],
) -> list[str]:
    """What each configuration loses at each learning rate, and the comparisons, by likelihood alone."""
    best = selected.get(BEST, {})
    rows = []
    for name, rates in tried.items():
        for rate, runs in rates.items():
            cells = [name, f"{rate:g}", ", ".join(str(run.seed) for run in runs)]
            for part in ("dev", "supervised", "zero_shot"):
                values = [run.mean_likelihood(part) for run in runs if run.sets(part)]
                cells.append(_spread(values, "{:.4f}") if values else "-")
            rows.append([*cells, "yes" if best.get(name) == runs else ""])
    differences = []
    for title, selection in selected.items():
        measured = {
            name: found
            for name, of in selection.items()
            if (found := [run for run in of if run.sets("zero_shot")])
        }
        for a, b in _pairs(measured, baseline, ablated):
            both = pair(measured[a], measured[b])
            if both[0]:
                cells = [title, f"{a} - {b}"]
                for part in ("zero_shot", "supervised"):
                    if not both[0][0].sets(part):
                        cells += ["-"] * 3
                        continue
                    by_seed = list(_by_seed(*both, part).values())
                    cells += [
                        interval(compare_likelihood(*both, part, patterns)["all"]),
                        ", ".join(f"{value:+.4f}" for value in by_seed),
                        over_trainings(by_seed),
                    ]
                differences.append(cells)
    lines = [
        "",
        "## Learning rates",
        "",
        "NLL per token, unweighted means over data sets, mean over seeds (lowest .. highest). Best of several rates is what has the lowest loss on "
        "the documents kept back, over the seeds that a configuration has at all of them.",
        "",
        table(
            [
                "configuration",
                "learning rate",
                "seeds",
                "dev NLL",
                "supervised NLL",
                "zero-shot NLL",
                "best",
            ],
            rows,
        ),
    ]
    if differences:
        lines += [
            "",
            "Differences of NLL, lower is better. Intervals of 95 %: over documents as below; over trainings by a paired t-test of the seeds "
            "(three or more), which speaks of other seeds and their documents, and of the same test documents.",
            "",
            table(
                [
                    "",
                    "",
                    *("zero-shot, over documents", "seed by seed", "over trainings"),
                    *("supervised, over documents", "seed by seed", "over trainings"),
                ],
                differences,
            ),
        ]
    return lines


def _comparisons(
    compared: dict[tuple[str, str], _Compared], patterns: Mapping[str, str]
) -> list[str]:
    rows = []
    for (a, b), one in compared.items():
        cells = [f"{a} - {b}", len(one.runs)]
        for f1, split in (
            (one.f1, "all"),
            (one.f1, "seen"),
            (one.f1, "unseen"),
            (one.identification, "all"),
        ):
            try:
                line = f1["all", split]
            except KeyError:
                cells.append("-")
                continue
            cells.append(
                f"{100 * line.difference:+.1f} [{100 * line.low:+.1f}, {100 * line.high:+.1f}]"
            )
        cells.append(interval(one.likelihood["all"]))
        cells.append(", ".join(f"{difference:+.4f}" for difference in one.by_seed.values()))
        rows.append([*cells, "-" if one.supervised is None else interval(one.supervised["all"])])
    if not rows:
        return []
    return [
        "Zero-shot differences, and in the last column those on the supervised sets, with 95 % intervals (paired bootstrap over documents, 10,000 resamples; F1 times 100, higher "
        "is better; NLL, lower is better). The intervals speak of other documents, not of other seeds, whose spread the column "
        "before the last shows, and are not corrected for their number."
        + (f" Parts of one whole are drawn together in {', '.join(patterns)}." if patterns else ""),
        "",
        table(
            [
                "",
                "seeds",
                "F1, all labels",
                "F1, seen",
                "F1, unseen",
                "F1 of identification",
                "NLL",
                "NLL, seed by seed",
                "NLL, supervised sets",
            ],
            rows,
        ),
        "",
    ]


def _router_inputs(run: Trained) -> str | None:
    configuration = run.settings["configuration"]
    return (
        configuration["adapter"].get("router_inputs", "token+task")
        if configuration["method"] == "moelora"
        else None
    )


def _reads_task(run: Trained) -> bool:
    return run.settings["configuration"]["encoder"] is not None


def _router(chosen: Chosen, patterns: Mapping[str, str]) -> list[str]:
    """What the routers do: how sure, how much by task, and what the task embedding is worth to the likelihood."""
    rows = []
    for name, runs in chosen.items():
        if "gates" not in runs[0].figures:
            continue
        entropy = [_mean(run.figures["gates"]["entropy"].values()) for run in runs]
        experts = len(
            runs[0].figures["gates"]["mean"][next(iter(runs[0].figures["gates"]["mean"]))][0]
        )
        shares = [
            _mean(b / (w + b) if w + b else 0.0 for w, b in r.figures["gates"]["variance"])
            for r in runs
        ]
        similar = [_mean(s for s, _ in nearest(run).values()) for run in runs]
        cells = [
            name,
            _spread([value / math.log(experts) for value in entropy], "{:.3f}"),
            _spread([100 * share for share in shares]),
            _spread(similar, "{:.4f}"),
            "-",
        ]
        if "nll_swapped" in runs[0].figures:
            line = compare_likelihood(runs, runs, "zero_shot", patterns, of_a="swapped")["all"]
            cells[-1] = interval(line)
        rows.append(cells)
    if not rows:
        return []
    header = [
        "configuration",
        "entropy / ln E",
        "variance between data sets, %",
        "cosine to the nearest training set",
        "zero-shot NLL with another data set's task embeddings, minus its own",
    ]
    return [
        "What the routers do (gates over prompts and gold answers, means over layers):",
        "",
        table(header, rows),
        "",
    ]


def nearest(run: Finished) -> dict[str, tuple[float, str]]:
    """For each zero-shot set the training set with the most similar gates: cosine of the mean gates less those of all sets."""
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


def _costs(chosen: Chosen, baseline: str) -> list[str]:
    rows = []
    sizes = {
        name: runs[0].figures["training"]["trainable_parameters"] for name, runs in chosen.items()
    }
    for name, runs in chosen.items():
        training = [run.figures["training"] for run in runs]
        rows.append(
            [
                name,
                f"{sizes[name]:,}",
                f"{sizes[name] / sizes[baseline]:.3f}" if baseline in sizes else "-",
                _spread([one["seconds"] / 60 for one in training]),
                _spread([one["tokens_per_second"] for one in training], "{:.0f}"),
                _spread([sum(run.figures["generation_seconds"].values()) / 60 for run in runs]),
            ]
        )
    header = [
        "configuration",
        "trainable parameters",
        f"of {baseline}",
        "training, min",
        "training tokens/s",
        "answers, min",
    ]
    return [
        "Cost. The times are those of the runs, with whatever else the machine did then; to compare speeds, measure the methods side "
        "by side (`benchmarks/adapters.py`):",
        "",
        table(header, rows),
        "",
    ]


def _labels(chosen: Chosen, path: Path) -> list[str]:
    """A file with precision, recall and F1 by label and argument role, run by run."""
    parts = [
        f"## {name}, seed {run.seed}\n\n{run.scores.to_markdown(labels=True)}\n"
        for name, runs in chosen.items()
        for run in runs
    ]
    path.write_text("# Scores by label\n\n" + "\n".join(parts))
    return [f"By label and argument role, run by run: [{path.name}]({path.name}).", ""]


def _plots(
    chosen: Chosen,
    baseline: str,
    compared: dict[tuple[str, str], _Compared],
    patterns: Mapping[str, str],
    folder: Path,
    slug: str,
) -> list[str]:
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
    names = list(chosen)
    for i, name in enumerate(names):
        runs = chosen[name]
        reports = [run.scores_of("zero_shot") for run in runs]
        values = [100 * one.average_f1() for one in reports]
        clusters = clusters_of(runs[0], "zero_shot", patterns)
        intervals = [
            one.with_intervals(clusters=clusters).intervals[("all",), "all"] for one in reports
        ]
        low, high = (100 * _mean(getattr(one, end) for one in intervals) for end in ("low", "high"))
        axes[0].bar(i, _mean(values), color="tab:blue", alpha=0.6)
        axes[0].vlines(i, low, high, color="black")
        axes[0].plot([i] * len(values), values, "k.")
        axes[1].plot([i] * len(runs), [run.mean_likelihood("zero_shot") for run in runs], "ko")
    for axis, title in zip(
        axes,
        (
            "zero-shot F1 (dots: seeds; lines: mean of their 95 % intervals)",
            "zero-shot NLL per token",
        ),
        strict=True,
    ):
        axis.set_xticks(range(len(names)), names, rotation=25, ha="right")
        axis.set_title(title, fontsize=9)
    found = [_save(figure, folder, f"{slug}_f1.png")]

    others = {name: one for (name, other), one in compared.items() if other == baseline}
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.2), layout="constrained")
    for j, (name, one) in enumerate(others.items()):
        sets = one.runs[0].sets("zero_shot")
        for axis, comparison, unit in ((axes[0], one.f1, 100.0), (axes[1], one.likelihood, 1.0)):
            lines = [
                line
                for line in comparison.differences
                if line.split == "all" and line.row[0] in sets
            ]
            at = [i + 0.8 * (j + 0.5) / len(others) - 0.4 for i in range(len(lines))]
            middle = [unit * line.difference for line in lines]
            error = [
                [unit * (line.difference - line.low) for line in lines],
                [unit * (line.high - line.difference) for line in lines],
            ]
            axis.errorbar(at, middle, yerr=np.abs(error), fmt="o", markersize=4, label=name)
            axis.set_xticks(
                range(len(lines)), [line.row[0] for line in lines], rotation=30, ha="right"
            )
    for axis, title in zip(
        axes, (f"F1 less that of {baseline}", f"NLL per token less that of {baseline}"), strict=True
    ):
        axis.axhline(0, color="grey", linewidth=0.8)
        axis.set_title(f"{title} (95 % over documents)", fontsize=9)
    axes[0].legend(fontsize=8)
    found.append(_save(figure, folder, f"{slug}_gain.png"))

    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    shown = False
    for name, one in others.items():
        if "gates" not in one.runs[0].figures or not _reads_task(one.runs[0]):
            continue
        near = [nearest(run) for run in one.runs]
        sets = [s for s in one.runs[0].sets("zero_shot") if s in near[0]]
        x = [_mean(of_run[s][0] for of_run in near) for s in sets]
        y = [-one.likelihood[s].difference for s in sets]
        rho = "too few sets for a correlation"
        if len(sets) > 2:
            found_rho = spearmanr(x, y)
            rho = (
                f"Spearman {found_rho.statistic:+.2f}, p = {found_rho.pvalue:.2f}, n = {len(sets)}"
            )
        axis.plot(x, y, "o", label=f"{name} ({rho})")
        for at_x, at_y, dataset in zip(x, y, sets, strict=True):
            axis.annotate(dataset, (at_x, at_y), fontsize=7)
        shown = True
    axis.set_xlabel("cosine of the gates with those of the nearest training set")
    axis.set_ylabel(f"NLL per token gained over {baseline}")
    if shown:
        axis.legend(fontsize=8)
        found.append(_save(figure, folder, f"{slug}_similarity.png"))
    plt.close("all")
    return [f"![{name}]({name})" for name in found] + [""]


def _save(figure: Any, folder: Path, name: str) -> str:
    figure.savefig(folder / name, dpi=110)
    plt.close(figure)
    return name


if __name__ == "__main__":
    if len(sys.argv) != 2:
        print(__doc__)
        raise SystemExit(2)
    print(write(Path(sys.argv[1])))
