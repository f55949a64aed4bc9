"""Shows what the task encoder costs: new and repeated prompts, batches sorted by length and not.

It measures `TaskEncoder` alone, on prompts of its own making. Times are medians over rounds, the
rows of a table interleaved within a round.

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
    schema = ""
    for _ in range(max(1, length // 25)):
        label = f"{rng.choice(NOUNS).title()}{rng.randrange(1000)}"
        description = f"What {rng.choice(VERBS)} a {rng.choice(NOUNS)}."
        schema += f'@dataclass\nclass {label}(Entity):\n    """{description}"""\n    span: str\n\n'
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
    parser.add_argument("--prompts", type=int, default=128, help="prompts of the batches")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    encoder = TaskEncoder(args.encoder, batch_size=args.batch_size, device=args.device)
    rng, console = random.Random(0), Console(width=110)
    encoder(prompt(rng, 50))
    how = f"{args.device}, {args.threads} threads, medians of {args.rounds} rounds"
    for table in (one_prompt(encoder, rng, args.rounds), many_prompts(encoder, rng, args)):
        table.caption = f"{Path(args.encoder).name}, {how}"
        console.print(table)


def one_prompt(encoder: TaskEncoder, rng: random.Random, rounds: int) -> Table:
    """A new prompt against a repeated one, by length."""
    table = Table(title="One prompt: new and repeated")
    for column in ("words", "tokens", "new, ms", "repeated, µs", "new / repeated"):
        table.add_column(column, justify="right")
    for length in (25, 100, 400, 1600):
        new, repeated = [], []
        for _ in range(rounds):
            text = prompt(rng, length)
            new.append(seconds(lambda text=text: encoder(text)))
            repeated.append(seconds(lambda text=text: encoder(text), repeats=100))
        tokens = len(encoder.tokenizer(text, verbose=False)["input_ids"])
        a, b = statistics.median(new), statistics.median(repeated)
        table.add_row(str(length), str(tokens), f"{1e3 * a:.1f}", f"{1e6 * b:.0f}", f"{a / b:.0f}")
    return table


def many_prompts(encoder: TaskEncoder, rng: random.Random, args: argparse.Namespace) -> Table:
    """Prompts one by one, in batches as they come, and in batches sorted by length."""
    texts = [prompt(rng, rng.choice([20, 40, 80, 160, 320])) for _ in range(args.prompts)]
    tokens = sum(len(ids) for ids in encoder.tokenizer(texts)["input_ids"])

    def in_calls_of(size: int) -> None:  # the encoder sorts within a call only
        for start in range(0, len(texts), size):
            encoder(texts[start : start + size])

    batches = f"batches of {args.batch_size}"
    rows = {
        "one by one": lambda: in_calls_of(1),
        f"{batches}, in the order given": lambda: in_calls_of(args.batch_size),
        f"{batches}, sorted by length": lambda: encoder(texts),
    }
    times: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(args.rounds):
        for name, call in rows.items():
            encoder.clear_cache()
            times[name].append(seconds(call))
    table = Table(title=f"{len(texts)} prompts, {tokens} tokens")
    for column in ("", "s", "prompts/s", "tokens/s", "against the order given"):
        table.add_column(column, justify="right")
    reference = statistics.median(times[f"{batches}, in the order given"])
    for name, found in times.items():
        median = statistics.median(found)
        speeds = [f"{len(texts) / median:.0f}", f"{tokens / median:.0f}"]
        table.add_row(name, f"{median:.2f}", *speeds, f"{reference / median:.2f}x")
    return table


if __name__ == "__main__":
    main()
