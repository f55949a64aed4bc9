"""What the task encoder costs: a new prompt against a repeated one, and batches sorted by length against unsorted ones.

It measures `TaskEncoder` alone, on prompts of its own making; it knows no language model. Times are medians over rounds, the
rows of a table interleaved within a round, so that a busy machine slows all of them.

    python benchmarks/encoder.py --encoder sentence-transformers/all-MiniLM-L6-v2
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from peft_taskmoe.encoder import TaskEncoder

NOUNS = [
    "launcher",
    "cheese",
    "gene",
    "disorder",
    "archive",
    "merger",
    "breach",
    "harbour",
    "tremor",
    "sonata",
]
VERBS = ["describes", "carries", "precedes", "causes", "holds", "follows", "contains", "replaces"]


def prompt(rng: random.Random, length: int) -> str:
    """A prompt of about `length` words, a schema and a text; no two are alike."""
    schema = "".join(
        f'@dataclass\nclass {rng.choice(NOUNS).title()}{rng.randrange(1000)}(Entity):\n    """What {rng.choice(VERBS)} a {rng.choice(NOUNS)}."""\n    span: str\n\n'
        for _ in range(max(1, length // 25))
    )
    text = " ".join(rng.choice(NOUNS + VERBS) for _ in range(length // 2))
    return f'{schema}# This is the text to analyze\ntext = "{text}"\nresult ='


def seconds(call: Callable[[], object], repeats: int = 1) -> float:
    """Seconds that one of `repeats` calls takes."""
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--encoder", required=True, help="Hub id or folder")
    parser.add_argument(
        "--prompts", type=int, default=128, help="prompts of the throughput measurement"
    )
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    console = Console(width=110)
    rng = random.Random(0)
    encoder = TaskEncoder(args.encoder, batch_size=args.batch_size, device=args.device)
    encoder(prompt(rng, 50))
    setting = f"{Path(args.encoder).name}, {args.device}, {args.threads} threads, medians of {args.rounds} rounds"

    table = Table(title="One prompt: new and repeated", caption=setting)
    for column in ("words", "tokens", "new, ms", "repeated, µs", "new / repeated"):
        table.add_column(column, justify="right")
    for length in (25, 100, 400, 1600):
        new, repeated = [], []
        for _ in range(args.rounds):
            text = prompt(rng, length)
            new.append(seconds(lambda text=text: encoder(text)))
            repeated.append(seconds(lambda text=text: encoder(text), repeats=100))
        tokens = len(encoder.tokenizer(text, verbose=False)["input_ids"])
        a, b = statistics.median(new), statistics.median(repeated)
        table.add_row(str(length), str(tokens), f"{1e3 * a:.1f}", f"{1e6 * b:.0f}", f"{a / b:.0f}")
    console.print(table)

    texts = [prompt(rng, rng.choice([20, 40, 80, 160, 320])) for _ in range(args.prompts)]
    tokens = sum(len(ids) for ids in encoder.tokenizer(texts)["input_ids"])
    size = args.batch_size

    def one_by_one() -> None:
        for text in texts:
            encoder(text)

    def unsorted() -> (
        None
    ):  # the encoder sorts within a call; a call a batch leaves the order as it is
        for start in range(0, len(texts), size):
            encoder(texts[start : start + size])

    rows = {
        "one by one": one_by_one,
        f"batches of {size}, in the order given": unsorted,
        f"batches of {size}, sorted by length": lambda: encoder(texts),
    }
    times: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(args.rounds):
        for name, call in rows.items():
            encoder.clear_cache()
            times[name].append(seconds(call))
    table = Table(title=f"{len(texts)} prompts, {tokens} tokens", caption=setting)
    for column in ("", "s", "prompts/s", "tokens/s", "against the order given"):
        table.add_column(column, justify="right")
    reference = statistics.median(times[f"batches of {size}, in the order given"])
    for name, found in times.items():
        median = statistics.median(found)
        table.add_row(
            name,
            f"{median:.2f}",
            f"{len(texts) / median:.0f}",
            f"{tokens / median:.0f}",
            f"{reference / median:.2f}x",
        )
    console.print(table)


if __name__ == "__main__":
    main()
