"""Tables of differences between configurations, and of their likelihood at each learning rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from comparing import Compared, Patterns, by_seed, compare_likelihood
from formats import interval, signed, spread, t_interval, table
from outcomes import BEST, Outcome, Selection, measured, pair, pairs

from peft_taskmoe.uie import Comparison


def learning_rates(
    tried: Mapping[str, Mapping[float, Sequence[Outcome]]],
    selected: Mapping[str, Selection],
    baseline: str,
    ablated: str | None,
    patterns: Patterns,
) -> list[str]:
    """The loss of each configuration at each learning rate, and the differences."""
    best = selected.get(BEST, {})
    rows = []
    for name, rates in tried.items():
        for rate, runs in rates.items():
            cells = [name, f"{rate:g}", ", ".join(str(run.seed) for run in runs)]
            for part in ("dev", "supervised", "zero_shot"):
                values = [run.mean_likelihood(part) for run in runs if run.sets(part)]
                cells.append(spread(values, "{:.4f}") if values else "-")
            rows.append([*cells, "yes" if best.get(name) == runs else ""])
    header = ["configuration", "learning rate", "seeds", "dev NLL", "supervised NLL"]
    lines = [
        "",
        "## Learning rates",
        "",
        "NLL per token, unweighted means over data sets, mean over seeds (lowest .. highest). The "
        "best rate has the lowest loss on documents kept back, over the seeds tried at all rates.",
        "",
        table([*header, "zero-shot NLL", "best"], rows),
    ]
    differences = [
        row
        for title, selection in selected.items()
        for row in _differences(
            title, measured(selection, "zero_shot"), baseline, ablated, patterns
        )
    ]
    if not differences:
        return lines
    of_part = ("over documents", "seed by seed", "over trainings")
    columns = [f"{part}, {one}" for part in ("zero-shot", "supervised") for one in of_part]
    return [
        *lines,
        "",
        "Differences of NLL, lower is better. 95 % intervals: over documents by a bootstrap, "
        "over trainings by a paired t-test of three or more seeds.",
        "",
        table(["", "", *columns], differences),
    ]


def _differences(
    title: str, selection: Selection, baseline: str, ablated: str | None, patterns: Patterns
) -> list[list[str]]:
    rows = []
    for a, b in pairs(selection, baseline, ablated):
        both = pair(selection[a], selection[b])
        if both[0]:
            cells = [title, f"{a} - {b}"]
            for part in ("zero_shot", "supervised"):
                if not both[0][0].sets(part):
                    cells += ["-"] * 3
                    continue
                of_seeds = list(by_seed(*both, part).values())
                over_documents = interval(compare_likelihood(*both, part, patterns)["all"])
                cells += [over_documents, signed(of_seeds), t_interval(of_seeds)]
            rows.append(cells)
    return rows


def comparisons(compared: Mapping[tuple[str, str], Compared], patterns: Patterns) -> list[str]:
    """Differences of F1 and likelihood on the zero-shot sets."""
    rows = [
        [
            f"{a} - {b}",
            len(one.runs),
            _f1(one.f1, "all"),
            _f1(one.f1, "seen"),
            _f1(one.f1, "unseen"),
            _f1(one.identification, "all"),
            interval(one.likelihood["all"]),
            signed(one.by_seed.values()),
            "-" if one.supervised is None else interval(one.supervised["all"]),
        ]
        for (a, b), one in compared.items()
    ]
    if not rows:
        return []
    header = ["", "seeds", "F1, all labels", "F1, seen", "F1, unseen", "F1 of identification"]
    header += ["NLL", "NLL, seed by seed", "NLL, supervised sets"]
    together = (
        f" Parts of one whole are drawn together in {', '.join(patterns)}." if patterns else ""
    )
    return [
        "Zero-shot differences, in the last column those on the supervised sets. 95 % intervals: "
        "paired bootstrap over documents, 10,000 resamples, not corrected for their number; they "
        "say nothing of other seeds. F1 times 100, higher is better; NLL, lower is better."
        + together,
        "",
        table(header, rows),
        "",
    ]


def _f1(comparison: Comparison, split: str) -> str:
    try:
        line = comparison["all", split]
    except KeyError:
        return "-"
    return f"{100 * line.difference:+.1f} [{100 * line.low:+.1f}, {100 * line.high:+.1f}]"
