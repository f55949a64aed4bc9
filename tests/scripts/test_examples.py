"""The scripts that a user copies, with tiny models: interrupted, resumed, refused, pushed."""

from __future__ import annotations

import html
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from loopback_hub import LoopbackHub
from running import ROOT, run
from versions import needs_transformers_5

pytestmark = needs_transformers_5

DEMO = "examples/data/demo"
SETTINGS = {
    "train_data": [f"{DEMO}/train.jsonl"],
    "prompt_style": "compact",
    "expert_dropout": 0.0,
    "learning_rate": 1e-3,
    "gradient_checkpointing": "false",
    "bf16": "false",
    "report_to": "none",
    "max_train_documents": 8,
    "max_eval_documents": 2,
    "max_new_tokens": 4,
    "per_device_train_batch_size": 2,
    "save_steps": 1,
    "save_total_limit": 5,
    "logging_steps": 1,
    "max_steps": 2,
    "max_length": 900,
}


def as_arguments(settings: dict[str, Any]) -> list[str]:
    """`{"max_steps": 2}` as `["--max_steps", "2"]`; a list as several values; None left out."""
    arguments: list[str] = []
    for name, value in settings.items():
        if value is not None:
            values = value if isinstance(value, list) else [value]
            arguments += [f"--{name}", *map(str, values)]
    return arguments


@pytest.fixture
def script(monkeypatch) -> Any:
    """The training script as a module."""
    monkeypatch.syspath_prepend(ROOT / "examples")
    monkeypatch.chdir(ROOT)
    import sft_uie

    return sft_uie


def parsed(script: Any, arguments: list[str]) -> tuple[Any, ...]:
    """The four groups of options, as the script parses them."""
    if "overwrite_output_dir" in transformers.TrainingArguments.__dataclass_fields__:
        pytest.skip("the training scripts have options that transformers 4 has itself")
    groups = (
        script.DataArguments,
        script.TaskMoEArguments,
        script.SFTConfig,
        script.ModelArguments,
    )
    return script.TrlParser(groups, conflict_handler="resolve").parse_args_and_config(arguments)


@pytest.fixture
def train(script, models, tmp_path) -> Callable[..., Path]:
    """`train(max_steps=3)`: the script in this process, with these settings; its output folder."""
    language_model, encoder = models

    def start(**changes: Any) -> Path:
        settings = {
            **SETTINGS,
            "model_name_or_path": language_model,
            "task_encoder": encoder,
            "output_dir": tmp_path / "out",
            "use_cpu": "true",
            **changes,
        }
        script.main(*parsed(script, as_arguments(settings)))
        return Path(settings["output_dir"])

    return start


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def same(a: Path, b: Path) -> bool:
    """Whether two folders hold the same adapter."""
    first, second = weights(a), weights(b)
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def trained_steps(folder: Path) -> list[int]:
    """The steps whose loss results.json has."""
    log = json.loads((folder / "results.json").read_text(encoding="utf-8"))["loss"]
    return [entry["step"] for entry in log if "loss" in entry]


# Resuming ----------------------------------------------------------------------------------------


class Killed(BaseException):
    """Ends the process of a test where a kill would."""


def kill_while_saving(monkeypatch, where: str, step: int) -> None:
    """Let the saving of `checkpoint-STEP` break off at a file of it."""
    from peft import peft_model

    writer, name = {
        "weights": (peft_model, "safe_save_file"),
        "before the optimizer": (transformers.Trainer, "_save_optimizer_and_scheduler"),
        "state": (transformers.TrainerState, "save_to_json"),
    }[where]
    write = getattr(writer, name)

    def write_half(*args: Any, **kwargs: Any) -> None:
        path = next((str(a) for a in args if f"checkpoint-{step}" in str(a)), None)
        if path is None:
            write(*args, **kwargs)
            return
        if where != "before the optimizer":
            write(*args, **kwargs)
            Path(path).write_bytes(Path(path).read_bytes()[:100])
        raise Killed

    monkeypatch.setattr(writer, name, write_half)


@pytest.mark.parametrize("where", ["weights", "before the optimizer", "state"])
@pytest.mark.slow
def test_a_run_killed_while_saving_goes_on_from_the_newest_whole_checkpoint(
    train, tmp_path, capsys, monkeypatch, where
) -> None:
    settings = {"max_steps": 4, "expert_dropout": 0.1}
    whole = train(output_dir=tmp_path / "whole", **settings)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_while_saving(patch, where, 3)
        train(**settings)
    capsys.readouterr()
    resumed = train(**settings)
    printed = capsys.readouterr().out
    assert "checkpoint-3 is broken and skipped" in printed
    assert f"going on from {resumed / 'checkpoint-2'}" in printed
    assert trained_steps(resumed) == [1, 2, 3, 4] and same(resumed, whole)


def test_the_same_command_again_trains_no_further_step(train, capsys, monkeypatch) -> None:
    output = train(max_steps=3)
    first = weights(output)
    training_step = transformers.Trainer.training_step

    def no_step(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a stray step")

    monkeypatch.setattr(transformers.Trainer, "training_step", no_step)
    train(max_steps=3, eval_data=[f"{DEMO}/test_seen.jsonl"])  # what is scored is no other run
    (output / "trainer_state.json").unlink()  # as if killed before the adapter was saved
    (output / "adapter_model.safetensors").unlink()
    train(max_steps=3)
    assert "Step 3, the last, was trained before" in capsys.readouterr().out
    assert trained_steps(output) == [1, 2, 3]
    assert all(torch.equal(first[name], tensor) for name, tensor in weights(output).items())

    monkeypatch.setattr(transformers.Trainer, "training_step", training_step)
    train(max_steps=4)
    assert trained_steps(output) == [1, 2, 3, 4]


@pytest.mark.slow
def test_another_run_in_the_same_folder_is_refused_or_started_anew(train, tmp_path) -> None:
    data = tmp_path / "train.jsonl"
    shutil.copy(f"{DEMO}/train.jsonl", data)
    output = train(train_data=[data])
    before = (output / "adapter_model.safetensors").read_bytes()
    with pytest.raises(SystemExit, match=r"learning_rate was 0\.001, is 0\.01.*--overwrite_output"):
        train(train_data=[data], learning_rate=0.01)
    with pytest.raises(SystemExit, match="max_steps was 2, is 1"):
        train(train_data=[data], max_steps=1)
    shutil.copy(f"{DEMO}/test_seen.jsonl", data)
    with pytest.raises(SystemExit, match="examples was"):
        train(train_data=[data])
    with pytest.raises(SystemExit, match="no checkpoint of this run"):
        train(output_dir=tmp_path / "b", resume_from_checkpoint=output / "checkpoint-1")
    assert (output / "adapter_model.safetensors").read_bytes() == before

    (output / "mine.txt").write_text("kept")
    train(train_data=[data], overwrite_output_dir="true", max_steps=1)
    assert trained_steps(output) == [1] and (output / "mine.txt").exists()
    assert not (output / "checkpoint-2").exists()

    (output / "run.json").unlink()
    with pytest.raises(SystemExit, match="something else"):
        train(train_data=[data], max_steps=1)


# What is checked before the training -------------------------------------------------------------


def test_options_without_effect_are_refused(train, tmp_path) -> None:
    for option, value, advice in (
        ("lora_r", 16, "--expert_r"),  # 16 is TRL's default
        ("lora_target_modules", ["q_proj"], "--target_modules"),
        ("use_peft", "false", "always trains an adapter"),
        ("use_dora", "true", "low-rank"),
        ("completion_only_loss", "false", "the router must know the prompt"),
        ("chat_template_path", "x.jinja", "no chats"),
        ("hub_strategy", "checkpoint", "pushed once"),
        ("eval_strategy", "epoch", "--dev_data"),
        ("dev_data", [f"{DEMO}/test_seen.jsonl"], "--eval_strategy"),
        ("early_stopping_patience", 2, "--load_best_model_at_end"),
        ("train_data", [], "nothing to train on"),
    ):
        with pytest.raises(SystemExit, match=advice):
            train(**{option: value or None})
    assert not (tmp_path / "out").exists()


def test_data_that_cannot_be_used_is_found_before_training(train, tmp_path) -> None:
    lines = Path(f"{DEMO}/test_seen.jsonl").read_text().splitlines()[:3]
    rows = [json.loads(line) for line in lines]
    twice, no_schema = tmp_path / "a" / "test.jsonl", tmp_path / "b.jsonl"
    twice.parent.mkdir()
    twice.write_text(lines[0])
    (tmp_path / "a" / "dev.jsonl").write_text(lines[0])
    no_schema.write_text(json.dumps({**rows[0], "schema": {"": 3}}))
    for data, message in (
        ([twice, twice.with_name("dev.jsonl")], "two documents"),
        ([no_schema], "schema"),
        ([tmp_path / "missing.jsonl"], "missing.jsonl"),
    ):
        with pytest.raises(SystemExit, match=message):
            train(eval_data=data)
    with pytest.raises(SystemExit, match="A model cannot be loaded"):
        train(task_encoder=tmp_path / "nowhere")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_answers_that_max_length_cuts_are_counted_and_left_out(train, capsys) -> None:
    with pytest.raises(SystemExit, match="`--max_length 60` cuts all 8 answers"):
        train(max_length=60)
    output = train(max_length=300, max_steps=1, eval_data=[f"{DEMO}/test_seen.jsonl"])
    printed = capsys.readouterr().out
    results = json.loads((output / "results.json").read_text())
    left = results["left_out"]
    assert 0 < left < 8 and f"`--max_length 300` would cut {left} of 8 answers" in printed
    assert results["train_documents"] == {"demo": 8 - left}
    assert f"demo ({8 - left} documents)" in (output / "README.md").read_text()


@pytest.mark.slow
def test_the_layers_named_are_adapted(train, tmp_path) -> None:
    for targets, layers in (
        (["q_proj", "v_proj"], {"q_proj", "v_proj"}),
        (["o_proj"], {"o_proj"}),
        ([r".*\.(up|down)_proj"], {"up_proj", "down_proj"}),
        (None, {f"{x}_proj" for x in ("q", "k", "v", "o", "up", "down", "gate")}),
    ):
        output = train(target_modules=targets, max_steps=1, overwrite_output_dir="true")
        adapted = {part for name in weights(output) for part in name.split(".") if "_proj" in part}
        assert adapted == layers


# Evaluation while it trains ----------------------------------------------------------------------


@pytest.mark.slow
def test_it_evaluates_stops_early_and_keeps_the_best_checkpoint(train, capsys) -> None:
    settings = {
        "dev_data": [f"{DEMO}/test_seen.jsonl"],
        "eval_strategy": "steps",
        "eval_steps": 1,
        "load_best_model_at_end": "true",
        "early_stopping_patience": 2,
        "max_steps": 40,
        "learning_rate": 5.0,
        "warmup_steps": 0,
    }
    output = train(**settings)
    log = json.loads((output / "results.json").read_text())["loss"]
    losses = {entry["step"]: entry["eval_loss"] for entry in log if "eval_loss" in entry}
    best = min(losses, key=lambda step: losses[step])
    assert max(losses) == best + 2 < 40
    assert same(output, output / f"checkpoint-{best}")
    assert "eval_loss" in capsys.readouterr().out
    train(**settings)  # stopped early is finished
    assert "was trained before" in capsys.readouterr().out
    assert same(output, output / f"checkpoint-{best}")


@pytest.mark.slow
def test_tables_fit_into_80_columns(train, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    data = tmp_path / f"{'a-long-name-' * 10}.jsonl"
    shutil.copy(f"{DEMO}/test_seen.jsonl", data)
    output = train(max_steps=1, score_before="true", eval_data=[data])
    table = [line for line in capsys.readouterr().out.splitlines() if line[:1] in "┏┃┡│└"]
    assert table and all(len(line) <= 80 for line in table) and "before" in "".join(table)
    page = (output / "report.html").read_text(encoding="utf-8")
    texts = [json.loads(line)["text"] for line in data.read_text(encoding="utf-8").splitlines()]
    assert "Strict F1" in page and data.stem in page and "The nearest training tasks" in page
    assert sum(html.escape(text) in page for text in texts) == 2


# Processes: the Hub, torchrun, the command line --------------------------------------------------


@pytest.fixture
def arguments(models, tmp_path) -> list[str]:
    """Options of the script for a process of its own."""
    language_model, encoder = models
    data = {"model_name_or_path": language_model, "task_encoder": encoder}
    data["eval_data"] = [f"{DEMO}/test_{which}.jsonl" for which in ("seen", "unseen")]
    return as_arguments({**SETTINGS, **data, "output_dir": tmp_path / "out"})


def online(hub: LoopbackHub, home: Path, token: str = "hf_test") -> dict[str, str]:
    return {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": token,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(home),
    }


@pytest.mark.slow
def test_pushed_after_a_failed_push_and_reloaded(tmp_path, models, arguments) -> None:
    output = tmp_path / "out"
    with LoopbackHub() as hub:
        environment = online(hub, tmp_path / "home")
        hub.fail_next("POST commit", status=403)
        push = ("--push_to_hub", "--hub_model_id", "user/tiny")
        errors = run("sft_uie.py", *arguments, *push, fails=True, **environment)
        failed, whole, command = errors.strip().splitlines()[-3:]
        assert failed.startswith("The push to user/tiny failed: ")
        assert whole == f"The adapter in {output} is whole. To push it, type:"
        hf, *typed = shlex.split(command)
        program = Path(sys.executable).with_name(hf)
        subprocess.run([program, *typed], env={**os.environ, **environment}, check=True)
        files = hub.files("user/tiny")
        adapter = (output / "adapter_model.safetensors").read_bytes()
        assert files["adapter_model.safetensors"] == adapter

        printed = run("sft_uie.py", *arguments, *push, **environment)
        assert "was trained before" in printed and "Pushed to" in printed
        files = hub.files("user/tiny")
    pushed = {"adapter_config.json", "adapter_model.safetensors", "uie_config.json"}
    pushed |= {"task_centroids.safetensors", "results.json", "README.md", ".gitattributes"}
    assert set(files) == pushed
    card = files["README.md"].decode()
    for needed in ("import peft_taskmoe", 'Extractor.from_pretrained("user/tiny")', *models):
        assert str(needed) in card
    results = json.loads((output / "results.json").read_text())
    assert trained_steps(output) == [1, 2]
    assert {row["dataset"] for row in results["scores"]["datasets"]} == {"test_seen", "test_unseen"}

    asked = ("--adapter", output, "--text", "Ada met Bo.", "--max_new_tokens", 4)
    printed = run("extract.py", *asked, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "home"))
    assert "Ada met Bo." in printed


def test_hub_access_is_checked_before_training(train, tmp_path, monkeypatch) -> None:
    with LoopbackHub() as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        for name, token, found in (
            ("user/tiny", "hf_wrong", "401"),
            ("somebody/tiny", "hf_test", "rights"),
            ("not a name", "hf_test", "alphanumeric"),
        ):
            with pytest.raises(SystemExit, match=rf"(?s){found}.*hf auth login"):
                train(push_to_hub="true", hub_model_id=name, hub_token=token)
        hub.fail_next("GET auth-check", status=403)
        with pytest.raises(SystemExit, match="does not take an adapter as `user/tiny`"):
            train(push_to_hub="true", hub_model_id="user/tiny", hub_token="hf_test")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.skipif(torch.accelerator.is_available(), reason="for machines without accelerators")
def test_bfloat16_without_an_accelerator_ends_in_what_to_type(arguments) -> None:
    errors = run("sft_uie.py", *arguments, "--bf16", "true", fails=True)
    assert "On a CPU add `--bf16 false --dtype float32`." in errors and "Traceback" not in errors


@pytest.mark.slow
@pytest.mark.skipif(torch.accelerator.is_available(), reason="for machines without accelerators")
def test_two_processes_without_accelerators_need_use_cpu(tmp_path, arguments) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    errors = run("sft_uie.py", *arguments, launcher=launcher, fails=True)
    assert "Pass `--use_cpu`" in errors and not (tmp_path / "out").exists()
    printed = run("sft_uie.py", *arguments, "--use_cpu", launcher=launcher)
    assert printed.count("step 2 of 2: loss") == 1 and trained_steps(tmp_path / "out") == [1, 2]


@pytest.mark.parametrize("preset", ["demo", "codellama-7b"])
def test_every_field_of_a_preset_is_known(script, preset) -> None:
    arguments = ["--config", f"examples/{preset}.yaml", "--bf16", "false"]
    _, adapter, training, _ = parsed(script, arguments)
    assert (adapter.num_experts, adapter.expert_r) == (8, 4) and training.learning_rate > 0


@pytest.mark.parametrize(
    "text",
    ['It cost $5 ($(HOME)), she said "no" & it\'s `ls` \\ # done; é %s $$x', "-dash", "two\nlines"],
)
def test_make_demo_extracts_at_once_from_any_text(tmp_path, text) -> None:
    (tmp_path / "bin").mkdir()
    python, called = tmp_path / "bin" / "python", tmp_path / "called"
    python.write_text(f'#!/bin/sh\nprintf "%s\\0" "$@" > {shlex.quote(str(called))}\n')
    python.chmod(0o755)
    (tmp_path / "results.json").touch()
    for file in ("installed", "models"):
        (tmp_path / file).touch()
    variables = [f"VENV={tmp_path}", f"DEMO={tmp_path}", f"TEXT={text}"]
    subprocess.run(["make", "--silent", "demo", *variables], cwd=ROOT, check=True)
    arguments = ["examples/extract.py", "--adapter", str(tmp_path), f"--text={text}"]
    assert called.read_text(encoding="utf-8").split("\0")[:-1] == arguments
