"""Extract from many texts on a Ray cluster: every actor holds a model and takes blocks of texts.

    pip install 'peft_taskmoe[ray]'

    python examples/extract_ray.py --adapter user/my-adapter --schema schema.json \
        --input texts.parquet --output records.parquet --workers 8 --gpus_per_worker 1

Without a cluster (`RAY_ADDRESS`) Ray starts on this machine. A lost worker is started again, and so
are its blocks; a lost driver is not. Input and output are .jsonl or .parquet, as those of
`peft-taskmoe extract`, but the input may be a folder of such files. Adapter and input must be where
every machine finds them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from tqdm import tqdm
from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg

from peft_taskmoe.cli.parquet import is_parquet, write_parquet
from peft_taskmoe.uie import Extractor, Schema


@dataclass
class Arguments:
    """What is read, by what, and how many share the work."""

    adapter: str = HfArg(help="Folder or Hub id of the adapter.")
    schema: Path = HfArg(help="JSON file {label: description}.")
    input: Path = HfArg(help="Rows with a `text`, and an `id` if you like.")
    output: Path = HfArg(help="A row for each text, in the order of the input.")
    workers: int = HfArg(default=2, help="Actors, each with a model.")
    gpus_per_worker: float = HfArg(default=0.0, help="0: they run on CPUs.")
    rows: int = HfArg(default=256, help="Texts that an actor takes at a time.")
    batch_size: int = HfArg(default=8, help="Prompts per generation.")
    max_new_tokens: int = HfArg(default=256, help="The longest answer.")
    dtype: str | None = HfArg(default=None, help="Such as bfloat16; None: as it is stored.")
    constrained: bool = HfArg(default=False, help="Constrain decoding to the schema's grammar.")


class Worker:
    """An actor: loads the model once, then answers blocks of texts."""

    def __init__(self, args: Arguments, schema: Schema) -> None:
        self.schema = schema
        self.extractor = Extractor.from_pretrained(
            args.adapter,
            dtype=args.dtype,
            batch_size=args.batch_size,
            max_new_tokens=args.max_new_tokens,
            constrained=args.constrained,
        )

    def __call__(self, block: Any) -> dict[str, list[str]]:
        """The output row of each input row, as JSON; an error for a row that has no text."""
        rows = [read_line(row["line"]) if "line" in row else row for row in block.to_pylist()]
        texts = [row["text"] for row in rows if isinstance(row.get("text"), str)]
        found = iter(self.extractor(texts, self.schema, progress=False))
        out = []
        for row in rows:
            answer = {"error": 'The row has no text. Write {"text": ...}.'}
            if isinstance(row.get("text"), str):
                answer = next(found).to_dict()
            out.append(json.dumps({"id": row.get("id"), **answer}))
        return {"row": out}


def read_line(line: str) -> dict[str, Any]:
    """A line of JSONL as a row; an empty one if it is no JSON object."""
    try:
        row = json.loads(line)
    except ValueError:
        return {}
    return row if isinstance(row, dict) else {"text": row}


def main() -> None:
    """Read, answer, write."""
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    if args.output.exists():
        raise SystemExit(f"`{args.output}` is there already. Name another file.")
    if Path(args.adapter).is_dir():  # actors run elsewhere
        args.adapter = str(Path(args.adapter).resolve())
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    source = str(args.input.resolve())
    if is_parquet(args.input) or list(args.input.glob("*.parquet")):
        texts = ray.data.read_parquet(source)
    else:
        texts = ray.data.read_text(source).rename_columns({"text": "line"})
    answered = texts.repartition(target_num_rows_per_block=args.rows).map_batches(
        Worker,
        fn_constructor_args=(args, Schema.from_json(args.schema)),
        compute=ray.data.ActorPoolStrategy(size=args.workers),
        batch_size=args.rows,
        batch_format="pyarrow",
        num_cpus=0,  # of what readers need: with every core taken by an actor, none could start
        num_gpus=args.gpus_per_worker,
        max_restarts=-1,
        max_task_retries=-1,
    )
    lines = args.output.with_name(f".{args.output.name}.partial")
    with lines.open("w", buffering=1, encoding="utf-8", errors="backslashreplace") as file:
        for number, row in enumerate(tqdm(answered.iter_rows(), unit="text"), 1):
            content = json.loads(row["row"])
            content["id"] = str(number if content["id"] is None else content["id"])
            file.write(json.dumps(content, ensure_ascii=False) + "\n")
    if is_parquet(args.output):
        write_parquet(lines, args.output)
    else:
        lines.replace(args.output)


if __name__ == "__main__":
    main()
