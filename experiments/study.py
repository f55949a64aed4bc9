"""The small files that are kept of a study: `figures.json`, and the table and plot made from it.

    python experiments/study.py keep outputs/experiments/small-results experiments/results/small
    python experiments/study.py show experiments/results/small
    python experiments/study.py against experiments/results/small_bf16 experiments/results/other

`keep` reads the raw runs, `show` and `against` only what was kept. `against` draws the differences
of several studies against the number of their training schemas, into the last one's folder.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib.pyplot as plt
from comparing import by_seed, compare_likelihood, over_trainings
from formats import bounds, signed, spread, table
from outcomes import BEST, Outcome, measured, pair, pairs, selections
from report import planned

from peft_taskmoe.uie.scoring.comparison import Difference

PARTS = ("dev", "supervised", "zero_shot", "swapped")
DIGITS = 5


def keep(results: Path, folder: Path, training_schemas: int | None = None) -> None:
    """Write `figures.json`, table and plot of a study from its raw runs.

    Args:
        results: The results folder of the runs.
        folder: Where to write.
        training_schemas: Number of distinct training schemas; default: what the runs say.
    """
    plan, runs = planned(results)
    training = runs[0].figures["training"]
    whole = max(runs, key=lambda run: len(run.sets("zero_shot")))
    figures = {
        "command": plan["command"],
        "model": runs[0].settings["benchmark"]["model_name_or_path"],
        "dtype": runs[0].settings["benchmark"]["dtype"],
        "training_documents": training["documents"],
        "training_schemas": training_schemas or training.get("schemas"),
        "documents": {
            part: {name: len(of_set) for name, of_set in whole.losses(part).items()}
            for part in PARTS[:3]
            if whole.sets(part)
        },
        "runs": [_of_run(run) for run in sorted(runs, key=lambda run: _order(run, plan))],
        "differences": _differences(runs, plan),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "figures.json").write_text(_as_json(figures), encoding="utf-8")
    show(folder)


def _as_json(figures: dict[str, Any]) -> str:
    """JSON with one item of a list a line."""
    parts = []
    for name, value in figures.items():
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        if isinstance(value, list):
            items = (json.dumps(one, ensure_ascii=False, allow_nan=False) for one in value)
            text = "[\n" + ",\n".join(items) + "\n]"
        parts.append(f"{json.dumps(name)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _order(run: Outcome, plan: dict[str, Any]) -> tuple[int, float, int]:
    return plan["configurations"].index(run.configuration), run.learning_rate, run.seed


def _of_run(run: Outcome) -> dict[str, Any]:
    training = run.figures["training"]
    found: dict[str, Any] = {
        "configuration": run.configuration,
        "learning_rate": run.learning_rate,
        "seed": run.seed,
        "steps": training["steps"],
        "trainable_parameters": training["trainable_parameters"],
        "training_minutes": round(training["seconds"] / 60, 1),
        "sources": training.get("versions", run.versions).get("sources"),
        "nll": {
            part: {name: round(run.likelihood(part, name), DIGITS) for name in run.sets(part)}
            for part in PARTS
            if run.sets(part)
        },
    }
    if run.has_answers:
        for kind, identification in (("f1", False), ("identification", True)):
            scores = run.scores_of("zero_shot", identification)
            of_sets = {name: scores.select([name]).average_f1() for name in run.sets("zero_shot")}
            found[kind] = {
                name: round(f1, DIGITS) for name, f1 in of_sets.items() if not math.isnan(f1)
            }
    return found


def _differences(runs: Sequence[Outcome], plan: dict[str, Any]) -> list[dict[str, Any]]:
    """Differences of likelihood of every selection, over documents and over trainings."""
    found = []
    patterns = plan["clusters"]
    for title, selection in selections(runs, plan["configurations"]).items():
        compared = measured(selection, "zero_shot")
        for a, b in pairs(compared, plan["baseline"], plan.get("ablated")):
            both = pair(compared[a], compared[b])
            for part in ("zero_shot", "supervised"):
                if both[0] and both[0][0].sets(part):
                    line = compare_likelihood(*both, part, patterns)["all"]
                    found.append(_difference((title, part, a, b), line, by_seed(*both, part)))
        for name, of in measured(compared, "swapped").items():
            line = compare_likelihood(of, of, "zero_shot", patterns, of_a="swapped")["all"]
            of_seeds = {
                run.seed: run.mean_likelihood("swapped") - run.mean_likelihood("zero_shot")
                for run in of
            }
            found.append(
                _difference((title, "zero_shot", f"{name}, swapped task", name), line, of_seeds)
            )
    return found


def _difference(
    which: tuple[str, str, str, str], line: Difference, of_seeds: dict[int, float]
) -> dict[str, Any]:
    trainings = over_trainings(list(of_seeds.values()))
    return {
        **dict(zip(("selection", "part", "a", "b"), which, strict=True)),
        "documents": [round(value, DIGITS) for value in (line.difference, line.low, line.high)],
        "seeds": {str(seed): round(value, DIGITS) for seed, value in of_seeds.items()},
        "trainings": None if trainings is None else [round(value, DIGITS) for value in trainings],
    }


def show(folder: Path) -> str:
    """Write `README.md` and `nll.png` of a study from its `figures.json`; returns the table."""
    figures = json.loads((folder / "figures.json").read_text(encoding="utf-8"))
    documents = sum(figures["training_documents"].values())
    measured_on = ", ".join(
        f"{sum(sets.values())} documents of {len(sets)} {part.replace('_', '-')} sets"
        for part, sets in figures["documents"].items()
    )
    text = "\n".join(
        [
            f"# {folder.name}",
            "",
            f"{figures['model']} in {figures['dtype']}; {documents} training documents of "
            f"{len(figures['training_documents'])} sets, {figures['training_schemas']} distinct "
            f"schemas. Measured on {measured_on}. Runs are made with",
            "",
            f"    {figures['command']}",
            "",
            "(`--only`, `--seeds`, `--measure` for a part), this page and the plot from "
            "`figures.json` with",
            "",
            f"    python experiments/study.py show experiments/results/{folder.name}",
            "",
            "NLL per token of the gold answers in nats, lower is better; F1 x 100. Unweighted "
            "means over data sets, then over seeds (lowest .. highest).",
            "",
            table(*_values(figures["runs"])),
            "",
            "Differences of NLL. 95 % confidence intervals: over documents by a paired bootstrap; "
            "over trainings by a paired t-test of three or more seeds.",
            "",
            table(*_difference_rows(figures["differences"])),
            "",
            "![NLL of each configuration](nll.png)",
            "",
        ]
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
    _plot(_grouped(figures["runs"]), folder / "nll.png")
    return text


def _grouped(runs: Sequence[dict[str, Any]]) -> dict[tuple[str, float], list[dict[str, Any]]]:
    found: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for run in runs:
        found.setdefault((run["configuration"], run["learning_rate"]), []).append(run)
    return found


def _values(runs: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    rows = []
    for (name, rate), of in _grouped(runs).items():
        cells = [name, f"{rate:g}", ", ".join(str(run["seed"]) for run in of)]
        for part in PARTS[:3]:
            values = [fmean(run["nll"][part].values()) for run in of if part in run["nll"]]
            cells.append(spread(values, "{:.4f}") if values else "-")
        for kind in ("f1", "identification"):
            values = [100 * fmean(run[kind].values()) for run in of if kind in run]
            cells.append(spread(values) if values else "-")
        rows.append(cells)
    header = ["configuration", "learning rate", "seeds", "dev NLL", "supervised NLL"]
    return [*header, "zero-shot NLL", "zero-shot F1", "identification"], rows


def _difference_rows(
    differences: Sequence[dict[str, Any]],
) -> tuple[list[str], list[list[str]]]:
    rows = [
        [
            one["selection"],
            one["part"].replace("_", "-"),
            f"{one['a']} - {one['b']}",
            bounds(*one["documents"]),
            signed(one["seeds"].values()),
            "-" if one["trainings"] is None else bounds(*one["trainings"]),
        ]
        for one in differences
    ]
    return ["", "sets", "", "over documents", "seed by seed", "over trainings"], rows


def _plot(grouped: dict[tuple[str, float], list[dict[str, Any]]], path: Path) -> None:
    """A dot for each training: NLL on unseen data sets and on those of the training."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained", sharey=True)
    names = [f"{name}, {rate:g}" for name, rate in grouped]
    for axis, part in zip(axes, ("zero_shot", "supervised"), strict=True):
        for i, runs in enumerate(grouped.values()):
            values = [fmean(run["nll"][part].values()) for run in runs if part in run["nll"]]
            axis.plot(values, [i] * len(values), "o", color="tab:blue", alpha=0.7)
            if values:
                axis.plot(fmean(values), i, "k|", markersize=14)
        axis.set_yticks(range(len(names)), names)
        axis.set_title(
            f"NLL per token, {part.replace('_', '-')} sets (dots: trainings; bar: mean)", fontsize=9
        )
    axes[0].invert_yaxis()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def against(folders: Sequence[Path], a_and_b: Sequence[tuple[str, str]]) -> Path:
    """Draw zero-shot differences against the number of training schemas, into the last folder."""
    studies = [json.loads((one / "figures.json").read_text(encoding="utf-8")) for one in folders]
    counts = {figures["training_schemas"] for figures in studies}
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    for j, (a, b) in enumerate(a_and_b):
        for figures in studies:
            schemas = figures["training_schemas"] * (1 + 0.08 * j)
            for one in figures["differences"]:
                which = (one["a"], one["b"], one["part"]) == (a, b, "zero_shot")
                if which and one["trainings"] and one["selection"] != BEST:
                    middle, low, high = one["trainings"]
                    error = [[middle - low], [high - middle]]
                    axis.errorbar(schemas, middle, yerr=error, fmt="o", color=f"C{j}", capsize=3)
                    seeds = list(one["seeds"].values())
                    axis.plot([schemas] * len(seeds), seeds, ".", color=f"C{j}", alpha=0.5)
        axis.plot([], [], "o", color=f"C{j}", label=f"{a} - {b}")
    axis.axhline(0, color="grey", linewidth=0.8)
    axis.set_xscale("log")
    axis.set_xticks(sorted(counts), [str(count) for count in sorted(counts)])
    axis.minorticks_off()
    axis.set_xlim(min(counts) / 2, max(counts) * 2)
    axis.set_xlabel("distinct schemas of the training documents")
    axis.set_ylabel("difference of zero-shot NLL, below 0 is better")
    axis.set_title("means and 95 % intervals over trainings; small dots: seeds", fontsize=9)
    axis.legend(fontsize=8)
    path = folders[-1] / "schemas.png"
    figure.savefig(path, dpi=100)
    plt.close(figure)
    return path


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one of the three commands."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    keeping = commands.add_parser("keep", help="from raw runs to the files that are kept")
    keeping.add_argument("results", type=Path)
    keeping.add_argument("folder", type=Path)
    keeping.add_argument("--training-schemas", type=int, help="where the runs do not say it")
    showing = commands.add_parser("show", help="table and plot from figures.json")
    showing.add_argument("folder", type=Path)
    drawing = commands.add_parser("against", help="several studies by their training schemas")
    drawing.add_argument("folders", type=Path, nargs="+")
    args = parser.parse_args(arguments)
    if args.command == "keep":
        keep(args.results, args.folder, args.training_schemas)
    elif args.command == "show":
        print(show(args.folder))
    else:
        names = [("task-aware", other) for other in ("lora-36", "token-only")]
        print(against(args.folders, names))


if __name__ == "__main__":
    main()
