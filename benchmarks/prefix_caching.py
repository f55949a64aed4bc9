"""Shows what `Extractor(..., prefix_caching=True)` saves where many texts share a schema.

A fresh adapter whose encoder reads the schema alone; its experts change nothing yet, so the answers
are the base model's and the time is that of a trained one. Every batch is answered both ways in an
alternating order; the ratio is the median over batches.

    python benchmarks/prefix_caching.py --model MODEL --task-encoder ENCODER --files a.jsonl b.jsonl
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from answering import time_ratio
from peft import get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from peft_taskmoe import TaskEncoder, TaskMoELoraConfig
from peft_taskmoe.uie import Extractor, PromptFormat, read_datasets


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder or Hub id of the base model")
    parser.add_argument("--task-encoder", required=True, help="folder or Hub id of the encoder")
    parser.add_argument(
        "--files", nargs="+", required=True, help="JSONL documents, or Hub data sets"
    )
    parser.add_argument(
        "--limit", type=int, default=32, help="documents of each file (default: %(default)s)"
    )
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    encoder = TaskEncoder(args.task_encoder, text="schema")
    base = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype)
    config = TaskMoELoraConfig(
        task_type="CAUSAL_LM", target_modules="all-linear", task_dim=encoder.task_dim
    )
    model = get_peft_model(base, config).eval().to(args.device)
    sets = read_datasets(args.files, split="test", limit=args.limit)
    how = f"batches of {args.batch_size}, {args.threads} threads"
    table = Table(title=f"Time with the prefix shared / without, {how}")
    for column in ("data set", "style", "median", "lowest", "highest", "answers that differ"):
        table.add_column(column)
    for name, documents in sets.items():
        for style in ("dataclass", "compact"):
            extractors = [
                Extractor(
                    model,
                    tokenizer,
                    encoder,
                    format=PromptFormat(style=style),  # type: ignore[arg-type]
                    batch_size=args.batch_size,
                    max_new_tokens=args.max_new_tokens,
                    prefix_caching=way,
                )
                for way in (False, True)
            ]
            table.add_row(name, style, *time_ratio(*extractors, documents))
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
