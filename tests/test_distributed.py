"""DDP and FSDP: the gradients of two processes that share batch and weights are those of one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("distributed") / "gradients.pt"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"),
            *(str(HERE / "distributed_step.py"), str(out)),
        ],
        env={**os.environ, "PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1"},
        cwd=HERE,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("way", ["ddp", "fsdp1", "fsdp2", "fsdp2 by layer"])
def test_the_gradients_are_those_of_one_process(found, way, checkpointing) -> None:
    expected = found["alone", False]
    assert len(expected) == 42 and all(grad.abs().max() > 0 for grad in expected.values())
    assert set(found[way, checkpointing]) == set(expected)
    for name, grad in found[way, checkpointing].items():
        torch.testing.assert_close(
            grad, expected[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
