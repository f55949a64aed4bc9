"""From the runs of a results folder to tables and plots, without models.

python experiments/report.py outputs/experiments/small-results
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from answer_tables import by_dataset, costs, f1_by_task, labels, routers
from comparing import compare_all
from difference_tables import comparisons, learning_rates
from formats import table
from outcomes import (
    Outcome,
    Selection,
    by_rate,
    check_comparable,
    load,
    selections,
    with_answers,
)
from plots import draw


def write(folder: Path) -> str:
    """Write `README.md` and the plots of a results folder from its `plan.json` and its runs.

    Returns:
        The report, as Markdown.
    """
    plan, runs = planned(folder)
    order, patterns = plan["configurations"], plan["clusters"]
    lines = ["# Results", "", f"`{plan['command']}`", "", *_what_was_run(runs)]
    selected = selections(runs, order)
    if len({run.learning_rate for run in runs}) > 1 or not all(run.has_answers for run in runs):
        tried = by_rate(runs, order)
        lines += learning_rates(tried, selected, plan["baseline"], plan.get("ablated"), patterns)
    reported: dict[str, Selection] = {}
    for title, selection in selected.items():
        chosen = with_answers(selection)
        if len(chosen) < 2:
            continue
        lines += ["", f"## {title[0].upper()}{title[1:]}", ""]
        same = [before for before, of in reported.items() if of == chosen]
        if same:
            lines.append(f'These are the runs of "{same[0]}" above.')
            continue
        reported[title] = chosen
        lines += _with_answers(title, chosen, plan, folder)
    lines += ["", "## Made with", "", *_made_with(runs)]
    report = "\n".join(lines) + "\n"
    (folder / "README.md").write_text(report, encoding="utf-8")
    return report


def planned(folder: Path) -> tuple[dict[str, Any], list[Outcome]]:
    """The plan of a results folder, and its runs of configurations that the plan has.

    Raises:
        SystemExit: If there is none.
        ValueError: If the runs cannot be compared.
    """
    plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    runs = [run for run in load(folder) if run.configuration in plan["configurations"]]
    if not runs:
        raise SystemExit(f"There is no run in {folder / 'runs'}.")
    check_comparable(runs)
    return plan, runs


def _with_answers(title: str, chosen: Selection, plan: dict[str, Any], folder: Path) -> list[str]:
    """The section of a selection whose answers were measured."""
    baseline, patterns = plan["baseline"], plan["clusters"]
    slug = title.replace(" ", "_").replace(".", "-")
    lines = f1_by_task(chosen)
    for part in ("zero_shot", "supervised"):
        if next(iter(chosen.values()))[0].sets(part):
            lines += by_dataset(chosen, part)
    if baseline in chosen:
        compared = compare_all(chosen, baseline, plan.get("ablated"), patterns)
        lines += comparisons(compared, patterns)
        lines += draw(chosen, baseline, compared, patterns, folder, slug)
    lines += routers(chosen, patterns)
    lines += costs(chosen, baseline)
    return lines + labels(chosen, folder / f"{slug}_labels.md")


def _what_was_run(runs: Sequence[Outcome]) -> list[str]:
    rows = []
    for run in runs:
        adapter, encoder = (run.settings["configuration"][part] for part in ("adapter", "encoder"))
        experts = f"{adapter['num_experts']} x " if "num_experts" in adapter else ""
        rows.append(
            [
                run.configuration,
                f"{run.learning_rate:g}",
                run.seed,
                f"{experts}{adapter['r']}",
                f"{run.settings['effective_scale']:g}",
                "-" if encoder is None else f"{encoder['text']} ({encoder['name_or_path']})",
                run.figures["training"]["steps"],
                f"{run.mean_likelihood('dev'):.4f}",
            ]
        )
    header = ["configuration", "learning rate", "seed", "rank", "alpha / rank of all"]
    benchmark, documents = runs[0].settings["benchmark"], runs[0].figures["training"]["documents"]
    whole = max(runs, key=lambda run: len(run.sets("zero_shot")))
    tested = {
        name: len(whole.losses(part)[name])
        for part in ("supervised", "zero_shot")
        for name in whole.sets(part)
    }
    return [
        f"Base model {benchmark['model_name_or_path']}, {benchmark['dtype']}. Training documents: "
        f"{_counts(documents)} ({sum(documents.values())} in all), tested on {_counts(tested)}.",
        "",
        "NLL is the negative log-likelihood per token of the gold answer in nats: lower is better. "
        "A soft mixture starts with the scale alpha / (r E), since its gates are 1 / E on average.",
        "",
        table([*header, "task text", "steps", "dev NLL"], rows),
    ]


def _counts(documents: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in documents.items())


def _made_with(runs: Sequence[Outcome]) -> list[str]:
    """Versions, and which runs had which where they differ."""
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


if __name__ == "__main__":
    if len(sys.argv) != 2:
        print(__doc__)
        raise SystemExit(2)
    print(write(Path(sys.argv[1])))
