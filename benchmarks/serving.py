"""What a server answers to many clients at once, against one request at a time and the Extractor.

    python benchmarks/serving.py --adapter outputs/demo --files examples/data/demo/test_seen.jsonl

Each document is a request of its own, with its own schema. Prints documents a second, the latency,
the server's memory, and how many answers differ from the Extractor's (rounding: batches differ).
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import psutil
from answering import load, parser

from peft_taskmoe.uie import Document, read_datasets
from peft_taskmoe.uie.tables import markdown_table

_MIB = 2**20


def main() -> None:
    """Measure and print."""
    args = arguments()
    files = read_datasets(args.files, split="test", limit=args.limit).values()
    documents = [one for file in files for one in file if one.task != "EAE"]
    seconds, wanted = offline(args, documents)
    name = f"Extractor, batches of {args.batch_size}"
    rows = [[name, f"{len(documents) / seconds:.2f}", "", "", ""]]
    offline_speed = len(documents) / seconds
    for engine in args.engine:
        with server(args, engine) as (client, process):
            answer(client, documents[0])  # what only the first request waits for
            speed = {}
            for connections in (1, args.connections):
                every = max(len(documents) // args.one_at_a_time, 1) if connections == 1 else 1
                some = documents[::every]
                before = process.memory_info().rss / _MIB
                speed[connections], latencies, found = asked(client, some, connections, args.rounds)
                after = process.memory_info().rss / _MIB
                same = [*wanted[::every]] * args.rounds
                differ = sum(a != b for a, b in zip(same, found, strict=True))
                p50, p99 = quantiles(latencies)
                name = f"server, {engine}, {connections} connections"
                figures = [f"{speed[connections]:.2f}", f"{p50:.2f}", f"{p99:.2f}"]
                rows.append([name, *figures, f"{differ} of {len(found)}"])
                print(f"{name}: {before:.0f} MiB before, {after:.0f} MiB after")
        many = speed[args.connections]
        print(f"{engine}: {many / speed[1]:.2f} times one request at a time, ", end="")
        print(f"{many / offline_speed:.2f} of the Extractor.")
    print(markdown_table(["way", "documents/s", "p50 s", "p99 s", "differ"], rows))


def arguments() -> argparse.Namespace:
    """The arguments of the command line."""
    add = (found := parser(__doc__ or "", limit=64)).add_argument
    add("--connections", type=int, default=32)
    add("--engine", nargs="+", choices=["batches", "continuous"], default=["batches"])
    add("--batch-size", type=int, default=32)
    add("--max-new-tokens", type=int, default=256)
    add("--rounds", type=int, default=1, help="how often all documents are sent")
    once = "documents, evenly drawn, that are sent one at a time (default: %(default)s)"
    add("--one-at-a-time", type=int, default=16, help=once)
    return found.parse_args()


def offline(
    args: argparse.Namespace, documents: Sequence[Document]
) -> tuple[float, list[list[str]]]:
    """Seconds and answers of the Extractor."""
    sizes = {"batch_size": args.batch_size, "max_new_tokens": args.max_new_tokens}
    extractor = load(args, **sizes)
    extractor.documents(documents[:1], progress=False)
    start = time.perf_counter()
    found = extractor.documents(documents, progress=False)
    seconds = time.perf_counter() - start
    return seconds, [found[one.id].to_dict()["answers"] for one in documents]


@contextmanager
def server(args: argparse.Namespace, engine: str) -> Iterator[tuple[httpx.Client, psutil.Process]]:
    """A client of a server process."""
    command = [sys.executable, "-m", "peft_taskmoe", "serve", "--port", "0", "--engine", engine]
    command += ["--adapter", args.adapter, "--device", args.device]
    command += ["--batch-size", str(args.batch_size), "--max-new-tokens", str(args.max_new_tokens)]
    if args.base:
        command += ["--base-model", args.base]
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    try:
        url = next(line.split()[-1] for line in process.stderr if line.startswith("Serving at"))
        limits = httpx.Limits(max_connections=args.connections)
        with httpx.Client(base_url=url, timeout=None, limits=limits, trust_env=False) as client:
            while client.get("/ready").status_code != 200:
                time.sleep(0.1)
            yield client, psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait()


def asked(
    client: httpx.Client, documents: Sequence[Document], connections: int, rounds: int
) -> tuple[float, list[float], list[list[str]]]:
    """Documents a second, the seconds of each request, and the answers."""
    start = time.perf_counter()
    with ThreadPoolExecutor(connections) as pool:
        found = list(pool.map(lambda one: answer(client, one), [*documents] * rounds))
    speed = len(found) / (time.perf_counter() - start)
    return speed, [one[0] for one in found], [one[1] for one in found]


def answer(client: httpx.Client, document: Document) -> tuple[float, list[str]]:
    """Seconds and answers of one request."""
    body = {"texts": [document.text], "schema": document.schema.to_dict()}
    start = time.perf_counter()
    reply = client.post("/v1/extract", json=body).raise_for_status()
    return time.perf_counter() - start, reply.json()["results"][0]["answers"]


def quantiles(values: Sequence[float]) -> tuple[float, float]:
    """The median and the 99th percentile."""
    cuts = statistics.quantiles([*values, *values], n=100, method="inclusive")
    return cuts[49], cuts[98]


if __name__ == "__main__":
    main()
