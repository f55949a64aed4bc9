"""Carries the comparison with LoRA out, from a YAML file to a results folder.

    python experiments/run.py --config experiments/configs/smoke.yaml
    python experiments/run.py --config experiments/configs/small.yaml --only lora-36 --seeds 0
    accelerate launch --num_processes 8 experiments/run.py --config ...

Every field of `ExperimentArguments` and of TRL's `SFTConfig` can stand in the YAML file or on the
command line. The same command given again resumes where it was killed, and skips what is done.
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
from configurations import Run, first_difference
from documents import Data
from files import versions, write_json
from one_run import Encoders, carry_out
from rich.console import Console
from rich.markdown import Markdown
from settings import ExperimentArguments
from transformers.utils import check_min_version
from trl import SFTConfig, TrlParser

from peft_taskmoe.uie import score

check_min_version("5.0.0")  # whose options these are

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


def main(args: ExperimentArguments, sft: SFTConfig, command: str) -> None:
    """Carry out what is missing of the plan, and report."""
    state = PartialState()
    console = Console(quiet=not state.is_main_process)
    results = Path(args.results_dir)
    data = Data.read(args)
    score(data.measured, {}, seen=args.seen_table())  # one that does not fit the data is found now
    training = training_settings(sft, state, data)
    runs = [(run, run.settings(args, training)) for run in args.plan()]
    missing = [
        (run, settings)
        for run, settings in runs
        if not is_done(run, settings, results, args.measure)
    ]
    console.print(f"{len(runs)} runs, {len(runs) - len(missing)} of them done before.")
    if state.is_main_process:  # first, so that `report.py` can report at any time
        write_json(results / "plan.json", {**args.comparison(), "command": command})
    encoders, started = Encoders(), time.perf_counter()
    for number, (run, settings) in enumerate(missing):
        spent = (time.perf_counter() - started) / 60
        left = f"about {spent / number * (len(missing) - number):.0f}" if number else "unknown"
        console.rule(f"Run {number + 1} of {len(missing)}: {run.name} ({left} min left)")
        check_folder(run, settings, Path(sft.output_dir))
        figures = carry_out(run, args, sft, data, encoders, console)
        if state.is_main_process:
            content = {"settings": settings, "versions": versions(), "figures": figures}
            write_json(results / "runs" / f"{run.name}.json", content)
        state.wait_for_everyone()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    if state.is_main_process:
        console.print(Markdown(report.write(results)))
        console.print(f"The tables, plots and figures are in {results}.")


def training_settings(sft: SFTConfig, state: PartialState, data: Data) -> dict[str, Any]:
    """What figures depend on beside the experiment's own arguments."""
    schedule = getattr(sft.lr_scheduler_type, "value", sft.lr_scheduler_type)
    return {
        **{name: getattr(sft, name, None) for name in TRAINING_SETTINGS},
        "world_size": state.num_processes,
        "data": data.checksum(),
        "lr_scheduler_type": str(schedule),
    }


def is_done(run: Run, settings: dict[str, Any], results: Path, measure: str) -> bool:
    """Whether a run's figures are there, made with the same settings."""
    path = results / "runs" / f"{run.name}.json"
    if not path.is_file():
        return False
    content = json.loads(path.read_text(encoding="utf-8"))
    check_same(run, settings, content["settings"], path)
    needed = {"all": "scores", "likelihood": "nll_supervised", "dev": "nll_dev"}[measure]
    return needed in content["figures"]


def check_folder(run: Run, settings: dict[str, Any], output: Path) -> None:
    """Write the settings into a run's folder, or hold them against those it was begun with."""
    path = output / run.name / "settings.json"
    if path.is_file():
        check_same(run, settings, json.loads(path.read_text(encoding="utf-8")), path)
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
        f"{path} was made with `{part}` = {b!r}, and now it is {a!r}. Set it back, choose another "
        f"`results_dir` and `output_dir`, or delete the run `{run.name}`."
    )


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    if len(sys.argv) == 1:
        print(__doc__)
        raise SystemExit(2)
    parser = TrlParser((ExperimentArguments, SFTConfig))
    experiment_args, sft_args = parser.parse_args_and_config()
    main(experiment_args, sft_args, "python experiments/run.py " + shlex.join(sys.argv[1:]))
