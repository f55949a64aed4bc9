"""The paper's comparison, from a YAML file to a results folder: is it better than plain LoRA, on labels never seen?

    python examples/benchmark/run.py --config examples/benchmark/smoke.yaml
    python examples/benchmark/run.py --config examples/benchmark/small.yaml --only lora-36 task-aware --seeds 0
    accelerate launch --num_processes 8 examples/benchmark/run.py --config examples/benchmark/codellama-7b.yaml

Every field of `BenchmarkArguments` and of TRL's `SFTConfig` can stand in the YAML file or on the command line. The same
command given again goes on where it was killed, and does nothing where all is done. Without `--only`, all configurations run.
"""

from __future__ import annotations

import gc
import json
import logging
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import report
import torch
from accelerate import PartialState
from one_run import Data, Encoders, carry_out, versions, write_json
from rich.console import Console
from rich.markdown import Markdown
from settings import BenchmarkArguments, Run, first_difference
from trl import SFTConfig, TrlParser

from peft_taskmoe.uie import score

TRAINING_SETTINGS = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "max_length",
    "max_steps",
    "packing",
    "packing_strategy",
    "padding_free",
    "completion_only_loss",
    "loss_type",
    "label_smoothing_factor",
    "neftune_noise_alpha",
    "bf16",
    "fp16",
    "gradient_checkpointing",
    "optim",
    "optim_args",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
)


def main(args: BenchmarkArguments, sft: SFTConfig, command: str) -> None:
    """Carry out what is missing of the plan, and report."""
    state = PartialState()
    console = Console(quiet=not state.is_main_process)
    results = Path(args.results_dir)
    data = Data.read(args)
    encoders = Encoders()
    score(data.measured, {}, seen=args.seen_table())  # one that does not fit the data is found now
    training = {name: getattr(sft, name, None) for name in TRAINING_SETTINGS}
    training |= {"world_size": state.num_processes, "data": data.checksum()}
    training["lr_scheduler_type"] = str(
        getattr(sft.lr_scheduler_type, "value", sft.lr_scheduler_type)
    )
    runs = [(run, run.settings(args, training)) for run in args.plan()]
    missing = [
        (run, settings)
        for run, settings in runs
        if not is_done(run, settings, results, args.measure)
    ]
    console.print(f"{len(runs)} runs, {len(runs) - len(missing)} of them done before.")
    plan = {
        "baseline": args.baseline,
        "ablated": args.ablated,
        "configurations": list(args.configurations),
        "clusters": args.clusters,
        "command": command,
    }
    if state.is_main_process:
        write_json(results / "plan.json", plan)  # first, so that `report.py` can report at any time
    folder = "runs" if args.measure == "all" else report.LIKELIHOODS
    started = time.perf_counter()
    for number, (run, settings) in enumerate(missing):
        spent = (time.perf_counter() - started) / 60
        left = (
            f"about {spent / number * (len(missing) - number):.0f} min left"
            if number
            else "time left unknown yet"
        )
        console.rule(f"Run {number + 1} of {len(missing)}: {run.name} ({left})")
        check_folder(run, settings, Path(sft.output_dir))
        figures = carry_out(run, args, sft, data, encoders, console)
        if state.is_main_process:
            content = {"settings": settings, "versions": versions(), "figures": figures}
            write_json(results / folder / f"{run.name}.json", content)
        state.wait_for_everyone()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    if state.is_main_process:
        console.print(Markdown(report.write(results)))
        console.print(f"The tables, plots and figures are in {results}.")


def is_done(run: Run, settings: dict[str, Any], results: Path, measure: str) -> bool:
    """Whether a run's figures are there, made with the same settings."""
    needed = {"all": "scores", "likelihood": "nll_supervised", "dev": "nll_dev"}[measure]
    for folder in ("runs", report.LIKELIHOODS):
        path = results / folder / f"{run.name}.json"
        if path.is_file():
            content = json.loads(path.read_text())
            check_same(run, settings, content["settings"], path)
            if needed in content["figures"]:
                return True
    return False


def check_folder(run: Run, settings: dict[str, Any], output: Path) -> None:
    """Write the settings into a run's folder, or hold them against those it was begun with."""
    path = output / run.name / "settings.json"
    if path.is_file():
        check_same(run, settings, json.loads(path.read_text()), path)
    elif PartialState().is_main_process:
        write_json(path, settings)


def check_same(run: Run, settings: dict[str, Any], found: dict[str, Any], path: Path) -> None:
    """Refuse to mix figures of different settings.

    Raises:
        ValueError: Naming the first setting that differs.
    """
    ours, theirs = (json.loads(json.dumps(one)) for one in (settings, found))
    part = first_difference(ours, theirs)
    if part is None:
        return
    a, b = ours.get(part, {}), theirs.get(part, {})
    if isinstance(a, dict) and isinstance(b, dict):
        name = first_difference(a, b)
        assert name is not None
        part, a, b = f"{part}.{name}", a.get(name), b.get(name)
    raise ValueError(
        f"{path} was made with `{part}` = {b!r}, and now it is {a!r}. Figures of different settings cannot be "
        f"compared. Set it back, choose another `results_dir` and `output_dir`, or delete the run `{run.name}`."
    )


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    if len(sys.argv) == 1:
        print(__doc__)
        raise SystemExit(2)
    parser = TrlParser((BenchmarkArguments, SFTConfig))
    benchmark_args, sft_args = parser.parse_args_and_config()
    main(benchmark_args, sft_args, "python examples/benchmark/run.py " + shlex.join(sys.argv[1:]))
