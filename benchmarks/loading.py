"""Shows what starting costs: the import and loading an adapter, against PEFT and LoRA r=36.

    python benchmarks/loading.py

Imports are timed in fresh processes, in turn; an adapter is loaded into a Llama of SmolLM2-135M's
shape (30 layers, all seven linears), both kinds in turn. Figures are medians of a round's ratios.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time

import torch
from methods import LINEARS, TASK_DIM, base_model
from peft import LoraConfig, PeftModel, get_peft_model

from peft_taskmoe import TaskMoELoraConfig


def import_seconds(statement: str) -> float:
    """Seconds that a statement takes in a fresh process, the interpreter's own start left out."""
    code = (
        f"import time; start = time.perf_counter(); {statement}; print(time.perf_counter() - start)"
    )
    return float(
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
    )


def summary(ratios: list[float]) -> str:
    """Median, lowest and highest."""
    return f"{statistics.median(ratios):.3f} ({min(ratios):.3f} .. {max(ratios):.3f})"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    args.vocab, args.layers, args.device, args.dtype = 1024, 30, "cpu", "float32"
    torch.set_num_threads(2)

    ratios = []
    for _ in range(args.rounds):
        peft = import_seconds("import peft")
        ratios.append(import_seconds("import peft, peft_taskmoe") / peft)
    print(f"import peft, peft_taskmoe / import peft: {summary(ratios)}")

    common = {"task_type": "CAUSAL_LM", "target_modules": LINEARS}
    configs = {
        "LoRA-36": LoraConfig(r=36, lora_alpha=36, **common),
        "ours": TaskMoELoraConfig(task_dim=TASK_DIM, **common),
    }
    with tempfile.TemporaryDirectory() as folder:
        for name, config in configs.items():
            get_peft_model(base_model(args), config).save_pretrained(f"{folder}/{name}")
        seconds: dict[str, list[float]] = {name: [] for name in configs}
        for round_ in range(args.rounds + 1):
            for name in configs:
                base = base_model(args)
                start = time.perf_counter()
                PeftModel.from_pretrained(base, f"{folder}/{name}")
                if round_:  # the first one warms the disk's cache
                    seconds[name].append(time.perf_counter() - start)
    ratios = [ours / lora for ours, lora in zip(seconds["ours"], seconds["LoRA-36"], strict=True)]
    middle = statistics.median(seconds["ours"])
    print(f"loading ours / LoRA-36: {summary(ratios)}, {1e3 * middle:.0f} ms")


if __name__ == "__main__":
    main()
