"""Extraction on a local Ray of two workers, one of which is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TextIO

import pyarrow
import pyarrow.parquet
import pytest
from peft import LoraConfig, get_peft_model

from peft_taskmoe import cli
from peft_taskmoe.cli.parquet import read_parquet
from peft_taskmoe.uie import PromptFormat, save_format
from running import ROOT

pytest.importorskip("ray.data", reason="Ray is not installed: pip install 'peft_taskmoe[ray]'")
psutil = pytest.importorskip("psutil", reason="psutil, which accelerate needs, is not installed")

TEXTS = [f"Ada met Bob {i}." for i in range(48)]


@pytest.fixture
def job(tmp_path, models) -> list[str]:
    """What both commands are told: a tiny adapter, a schema, short answers."""
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(models[0])
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    save_format(PromptFormat(style="compact"), tmp_path / "adapter")
    (tmp_path / "schema.json").write_text('{"Name": "words with a capital letter"}')
    files = ["--adapter", f"{tmp_path}/adapter", "--schema", f"{tmp_path}/schema.json"]
    return [*files, "--batch-size", "4", "--max-new-tokens", "40", "--constrained"]


def answered(rows) -> tuple[list[dict], list[float]]:
    """What two runs have in common, and the confidences, which rounding changes with the batch."""
    found = [{key: row[key] for key in ("id", "text", "records", "answers")} for row in rows]
    return found, [record.pop("confidence") for row in found for record in row["records"]]


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_a_killed_worker_is_replaced_and_no_text_is_lost(job, tmp_path, suffix):
    lines = tmp_path / "texts.jsonl"
    lines.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    assert cli.main(["extract", *job, f"--input={lines}", f"--output={tmp_path}/one.jsonl"]) == 0
    wanted = read_lines(tmp_path / "one.jsonl")
    assert sum(len(row["records"]) for row in wanted) >= len(TEXTS)

    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), tmp_path / "texts.parquet")
    source, output = tmp_path / f"texts{suffix}", tmp_path / f"several{suffix}"
    with (
        tempfile.TemporaryDirectory(prefix="ray") as folder,  # its sockets need a short path
        (tmp_path / "log").open("w") as log,
    ):
        process = run(job, source, output, log, RAY_TMPDIR=folder)
        partial = output.with_name(f".{output.name}.partial")
        while not (partial.exists() and partial.stat().st_size):
            assert process.poll() is None, (tmp_path / "log").read_text()
            time.sleep(0.02)
        written = partial.read_bytes().count(b"\n")
        pids = workers(process.pid)
        assert len(pids) == 2
        os.kill(pids[0], signal.SIGKILL)
        assert process.wait(timeout=300) == 0, (tmp_path / "log").read_text()
    assert written < len(TEXTS)
    rows = read_parquet(output) if suffix == ".parquet" else read_lines(output)
    found, confidences = answered(rows)
    expected, of_one = answered(wanted)
    assert found == expected and confidences == pytest.approx(of_one, rel=1e-3)


def run(
    job: list[str], source: Path, output: Path, log: TextIO, **environment: str
) -> subprocess.Popen:
    script = [ROOT / "examples" / "extract_ray.py", f"--input={source}", f"--output={output}"]
    path = os.pathsep.join([str(ROOT), *sys.path])
    usual = {**os.environ, "PYTHONPATH": path, "RAY_USAGE_STATS_ENABLED": "0"}
    return subprocess.Popen(
        [sys.executable, *script, *job, "--workers=2", "--rows=4"],
        env=usual | environment,
        stdout=log,
        stderr=log,
    )


def workers(driver: int) -> list[int]:
    """The processes of the actors."""
    below = psutil.Process(driver).children(recursive=True)
    return [one.pid for one in below if "MapWorker" in " ".join(one.cmdline())]
