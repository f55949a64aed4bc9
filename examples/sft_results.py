"""What `sft_uie.py` shows and writes: progress, scores, results.json, a model card, a page."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from rich.console import Console
from sft_checks import ADAPTER_FILES, PAGE, Documents, fail, first_line
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

import peft_taskmoe
from peft_taskmoe.model_card import write_card
from peft_taskmoe.nearest import TaskCentroids
from peft_taskmoe.uie import (
    Extraction,
    Extractor,
    PromptFormat,
    ScoreReport,
    save_format,
    score,
)
from peft_taskmoe.uie.extraction.report import write_report
from peft_taskmoe.uie.tables import Table

LOSSES = {"loss", "router_aux_loss", "eval_loss", "train_loss"}
Answers = dict[str, dict[str, Extraction]]  # by data set and id


class PlainProgress(TrainerCallback):
    """Prints losses as lines, where the Trainer prints dictionaries."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Print what was measured."""
        found = [f"{name} {float(logs[name]):.4g}" for name in logs or () if name in LOSSES]
        if state.is_world_process_zero and found:
            at = f"step {state.global_step} of {state.max_steps}"
            print(f"{at}: {', '.join(found)}", flush=True)


def answer(
    trainer: SFTTrainer, documents: Documents, format: PromptFormat, data: Any, when: str
) -> Answers:
    """Ask the model about every document."""
    count = sum(map(len, documents.values()))
    print(f"Asking the model about {count} documents {when}.", flush=True)
    extractor = extractor_of(trainer, format, data)
    bar = sys.stderr.isatty()
    return {name: extractor.documents(part, progress=bar) for name, part in documents.items()}


def extractor_of(trainer: SFTTrainer, format: PromptFormat, data: Any) -> Extractor:
    """An extractor with the model that is trained."""
    return Extractor(
        trainer.accelerator.unwrap_model(trainer.model),
        trainer.processing_class,
        format=format,
        batch_size=data.eval_batch_size,
        max_new_tokens=data.max_new_tokens,
    )


def score_answers(documents: Documents, answers: Answers) -> ScoreReport:
    """Compare answers with the gold records; the answer to a single question as it was parsed."""
    parsed = {
        name: {
            id_: one.answers[0].parsed if len(one.answers) == 1 else one
            for id_, one in found.items()
        }
        for name, found in answers.items()
    }
    return score(documents, parsed)


def score_table(before: ScoreReport | None, after: ScoreReport) -> Table:
    """F1 by data set and task."""
    reports = [after] if before is None else [before, after]
    header = ["data set", "task", *(["F1"] if before is None else ["before", "after"])]
    rows = []
    for name in after.answers:
        for group in after.select([name]).groups():
            if group == "all" or "+" not in group:
                figures = [report.select([name]).average_f1(group) for report in reports]
                task = "mean" if group == "all" else group
                rows.append([name, task, *(f"{100 * figure:.1f}" for figure in figures)])
    return Table("Strict micro F1", header, rows)


def write_results(
    trainer: SFTTrainer,
    format: PromptFormat,
    data: Any,
    documents: Documents,
    before: ScoreReport | None,
    results: dict[str, Any],
) -> None:
    """Score, and write the prompt format, a page, the card, and last of all results.json."""
    folder = Path(trainer.args.output_dir)
    save_format(format, folder)
    after = None
    if documents:
        answers = answer(trainer, documents, format, data, "after training")
        after = score_answers(documents, answers)
        table = score_table(before, after)
        Console(width=min(80, Console().width)).print(table.to_rich())
        write_report(
            folder / PAGE,
            extractor_of(trainer, format, data),
            documents,
            answers,
            name=results["repository"],
            centroids=TaskCentroids.load(folder),
        )
        print(f"The scores and extractions as a page: {folder / PAGE}")
        results["scores"] = after.to_dict()
        results["scores_before"] = None if before is None else before.to_dict()
    results["prompt_format"] = asdict(format)
    results["versions"] = {"peft_taskmoe": peft_taskmoe.__version__, "torch": torch.__version__}
    _write_card(trainer, results, after)
    text = json.dumps(results, indent=2, ensure_ascii=False, default=sorted) + "\n"  # sets
    (folder / "results.json").write_text(text, encoding="utf-8")


def _write_card(trainer: SFTTrainer, results: dict[str, Any], report: ScoreReport | None) -> None:
    """The adapter's model card with data and scores, in place of the one that TRL wrote."""
    folder = Path(trainer.args.output_dir)
    (folder / "README.md").unlink(missing_ok=True)
    trained = ", ".join(f"{name} ({n} documents)" for name, n in results["train_documents"].items())
    f1 = {name: report.select([name]).average_f1() for name in report.answers} if report else {}
    scores = report.to_markdown() if report else "Not scored."
    made = f"Made with peft_taskmoe {peft_taskmoe.__version__}, seed {results['seed']}."
    write_card(
        folder,
        trainer.accelerator.unwrap_model(trainer.model).peft_config["default"],
        adapter=results["repository"],
        sections=f"## Data\n\nTrained on {trained}.\n\n## Scores\n\n{scores}\n\n{made}",
        scores={name: round(value, 4) for name, value in f1.items() if value == value},
    )


def push(folder: Path, repository: str, training: SFTConfig) -> None:
    """Push the adapter; if that fails, say what to type."""
    try:
        commit = HfApi(token=training.hub_token).upload_folder(
            repo_id=repository,
            folder_path=folder,
            allow_patterns=ADAPTER_FILES,
            revision=training.hub_revision,
        )
    except Exception as error:  # whatever the client raises: the adapter is on the disk
        command = ["hf", "upload", repository, str(folder), "."]
        command += [part for name in ADAPTER_FILES for part in ("--include", name)]
        fail(
            f"The push to {repository} failed: {first_line(error)}\n"
            f"The adapter in {folder} is whole. To push it, type:\n{shlex.join(command)}"
        )
    print(f"Pushed to {commit.commit_url}.")
