"""What `sft_uie.py` checks before it trains: options, the Hub, and the folder of an earlier run."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NoReturn

from datasets import Dataset
from huggingface_hub import HfApi
from transformers import TrainerState
from trl import ModelConfig, SFTConfig

from peft_taskmoe import checkpoint_fault, newest_whole_checkpoint
from peft_taskmoe.uie import Document, read_datasets, score

Documents = dict[str, list[Document]]  # by data set

ADAPTER_FILES = ["adapter_config.json", "adapter_model.safetensors", "uie_config.json"]
ADAPTER_FILES += ["task_centroids.safetensors", "results.json", "README.md"]
RUN_FILE, STATE_FILE, PAGE = "run.json", "trainer_state.json", "report.html"

REFUSED = {
    "use_peft": "It always trains an adapter.",
    "lora_r": "Pass `--expert_r` and `--num_experts`.",
    "lora_alpha": "Pass `--expert_alpha`.",
    "lora_dropout": "Pass `--expert_dropout`.",
    "lora_target_modules": "Pass `--target_modules`.",
    "lora_target_parameters": "Experts stand on linear layers only: pass `--target_modules`.",
    "lora_modules_to_save": "Only the experts and their routers are trained.",
    "lora_task_type": "The task is always CAUSAL_LM.",
    "use_rslora": "Pass another `--expert_alpha`.",
    "use_dora": "Its experts are plain low-rank updates.",
    "completion_only_loss": "Only answers are learned, and the router must know the prompt.",
    "assistant_only_loss": "Prompts are no chats; only answers are learned anyway.",
    "chat_template_path": "Prompts are no chats.",
    "dataset_text_field": "The examples are written from `--train_data`.",
    "dataset_kwargs": "The examples are written from `--train_data`.",
    "eos_token": "Whoever loads the adapter has the end token of the base model's tokenizer.",
    "truncation_mode": "No answer is cut: longer examples are left out.",
    "do_predict": "Pass `--eval_data`.",
    "hub_strategy": "The adapter is pushed once, with its scores.",
    "hub_always_push": "The adapter is pushed once, with its scores.",
}
NOT_LEARNED = (  # beginnings of the names of options that do not change what is learned
    *("eval_", "max_eval", "max_new_tokens", "score_before", "per_device_eval", "do_", "include_"),
    *("output_dir", "overwrite", "resume", "save_", "hub_", "push_", "run_name", "project"),
    *("logging", "log_", "report_to", "trackio", "disable_tqdm", "skip_memory", "debug"),
    *("dataloader", "dataset_num_proc", "use_cpu", "local_rank", "ddp"),
)
ANEW = "Pass another `--output_dir`, or `--overwrite_output_dir` to start anew."


def fail(message: str) -> NoReturn:
    """End the script with an error that needs no traceback."""
    raise SystemExit(message)


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def check_options(data: Any, training: SFTConfig, model: ModelConfig) -> None:
    """Refuse options that would be ignored or contradict each other."""
    for arguments in (training, model):
        for field in fields(arguments):
            if field.name in REFUSED and getattr(arguments, field.name) != field.default:
                fail(f"`--{field.name}` has no effect here. {REFUSED[field.name]}")
    if not data.train_data:
        fail("There is nothing to train on. Pass `--train_data file.jsonl ...`.")
    if (training.eval_strategy != "no") != bool(data.dev_data):
        fail("`--eval_strategy` and `--dev_data` need each other. Pass both or neither.")
    if data.early_stopping_patience is not None and not training.load_best_model_at_end:
        fail("`--early_stopping_patience` needs `--load_best_model_at_end true`.")
    if training.packing and training.packing_strategy == "wrapped":
        fail("`--packing_strategy wrapped` cuts answers. Leave it out.")
    if int(os.environ.get("WORLD_SIZE", "1")) != training.world_size:
        fail("There is no accelerator for several processes. Pass `--use_cpu` to train on CPUs.")


def check_hub(training: SFTConfig) -> str:
    """Create the repository and make sure that the token may write to it; return its full id."""
    name = training.hub_model_id or Path(training.output_dir).name
    api = HfApi(token=training.hub_token)
    try:
        name = api.create_repo(name, private=training.hub_private_repo, exist_ok=True).repo_id
        api.auth_check(name, write=True)
        if training.hub_revision:
            api.create_branch(name, branch=training.hub_revision, exist_ok=True)
    except Exception as error:  # whatever the client raises
        fail(
            f"The Hub does not take an adapter as `{name}`: {first_line(error)}\n"
            "Check `--hub_model_id` and the token (`hf auth login`), or leave `--push_to_hub` out."
        )
    return name


def read_documents(data: Any, seed: int) -> tuple[Documents, Documents, Documents]:
    """The documents to train on, to evaluate on meanwhile, and to score afterwards; checked."""
    most = data.max_eval_documents
    try:
        train = read_datasets(
            data.train_data, split="train", limit=data.max_train_documents, seed=seed
        )
        dev = read_datasets(data.dev_data, split="validation", limit=most, seed=seed)
        test = read_datasets(data.eval_data, split="test", limit=most, seed=seed)
        score(test, {})  # raises where documents cannot be scored, such as those that share an id
    except (OSError, ValueError) as error:
        fail(f"The data cannot be used: {error}")
    return train, dev, test


def describe_run(arguments: Iterable[Any], examples: Iterable[Dataset | None]) -> dict[str, Any]:
    """What a run learns from: its settings, and a hash of its examples."""
    run: dict[str, Any] = {}
    for group in arguments:
        run |= group.to_dict() if isinstance(group, SFTConfig) else asdict(group)
    run = {name: run[name] for name in sorted(run) if not name.startswith(NOT_LEARNED)}
    texts = [(part["prompt"][:], part["completion"][:]) for part in examples if part is not None]
    run["examples"] = hashlib.sha256(json.dumps(texts).encode()).hexdigest()
    return json.loads(json.dumps(run, default=str))


def check_output(output: Path, run: dict[str, Any]) -> bool:
    """Refuse a folder that holds another run; say whether this run is longer than the one in it."""
    if not (any(output.glob("checkpoint-*")) or (output / "adapter_config.json").exists()):
        return False
    try:
        old = json.loads((output / RUN_FILE).read_text(encoding="utf-8"))
        longer = {name for name in ("max_steps", "num_train_epochs") if run[name] > old[name]}
    except (OSError, ValueError, KeyError, TypeError):
        fail(f"{output} holds an adapter or checkpoints of something else. {ANEW}")
    both = [name for name in run if name in old and name not in longer]  # versions have others
    changed = [name for name in both if run[name] != old[name]]
    if changed:
        shown = ", ".join(f"{name} was {old[name]}, is {run[name]}" for name in changed)
        fail(f"{output} holds another run: {shown}. {ANEW}")
    return bool(longer)


def start_run(output: Path, run: dict[str, Any], *, anew: bool, longer: bool) -> None:
    """Record the run in its folder; `anew` removes what this script left there before."""
    output.mkdir(parents=True, exist_ok=True)
    for folder in output.glob("checkpoint-*") if anew else ():
        shutil.rmtree(folder)
    for name in (*ADAPTER_FILES, RUN_FILE, STATE_FILE, PAGE) if anew else ():
        (output / name).unlink(missing_ok=True)
    if longer:
        (output / STATE_FILE).unlink(missing_ok=True)  # what says that the run was completed
    partial = output / f"{RUN_FILE}.partial"
    partial.write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")
    partial.replace(output / RUN_FILE)


def find_checkpoint(output: Path, wanted: str | None) -> Path | None:
    """The checkpoint to resume from: the one asked for, or the newest whole one."""
    if wanted is not None:
        folder = Path(wanted)
        if not folder.is_dir() or folder.resolve().parent != output.resolve():
            fail(f"`--resume_from_checkpoint {wanted}` is no checkpoint of this run in {output}.")
        if fault := checkpoint_fault(folder):
            fail(f"{folder} cannot be resumed from: {fault}.")
        return folder
    folder, broken = newest_whole_checkpoint(output)
    for name, fault in broken.items():
        print(f"{output / name} is broken and skipped: {fault}.")
    return folder


def finished(output: Path, last: Path | None, args: SFTConfig) -> tuple[Path, TrainerState] | None:
    """The folder with the adapter of a training that was completed, and its state; else None."""
    saved = all((output / name).is_file() for name in (STATE_FILE, "adapter_model.safetensors"))
    folder = output if saved else last
    if folder is None:
        return None
    state = TrainerState.load_from_json(str(folder / STATE_FILE))
    if folder == output:
        return output, state
    if args.max_steps > 0:
        complete = state.global_step >= args.max_steps
    else:
        complete = (state.epoch or 0.0) >= args.num_train_epochs - 1e-6
    best = state.best_model_checkpoint if args.load_best_model_at_end else None
    return (Path(best or folder), state) if complete else None
