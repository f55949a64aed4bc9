"""`benchmarks`: what is counted, which no machine's speed moves."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path


def test_operations_per_adapted_linear_stay_within_twice_loras() -> None:
    """Forward and backward of a Llama layer's linears, on tensors that are on no CPU."""
    folder = str(Path(__file__).parents[2] / "benchmarks")
    sys.path.insert(0, folder)
    try:
        op_count = importlib.import_module("op_count")
    finally:
        sys.path.remove(folder)
    for dropout, lora, ours in ((0.0, 10, 20), (0.05, 14, 25)):
        found = op_count.per_linear(dropout, "meta")
        assert found["LoRA-36"].launched == lora
        assert lora < found["ours 8x4"].launched <= ours
