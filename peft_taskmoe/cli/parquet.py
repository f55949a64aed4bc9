"""Outputs in Parquet: written from lines, read back as rows."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..optional import needed

# Half of a surrogate pair, which JSON can hold and Parquet cannot, behind an even number of \
_HALF_PAIR = re.compile(rb"(?<!\\)((?:\\\\)*)\\ud[89a-f][0-9a-f]{2}")


def is_parquet(path: Path) -> bool:
    """Whether the name is that of a Parquet file."""
    return path.suffix == ".parquet"


def write_parquet(source: Path, target: Path) -> None:
    """Turn lines into a table, and remove them.

    Columns of mixed types, and of objects without any key, become JSON strings.
    """
    pyarrow, parquet = needed("pyarrow", "uie"), needed("pyarrow.parquet", "uie")
    with source.open("rb") as file:
        rows = [json.loads(_HALF_PAIR.sub(rb"\1\\ufffd", line)) for line in file]
    columns = {}
    refusals = (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError, pyarrow.ArrowNotImplementedError)
    for name in dict.fromkeys(key for row in rows for key in row):
        values = [row.get(name) for row in rows]
        try:
            columns[name] = pyarrow.array(values)
            none = pyarrow.table({name: columns[name][:0]})
            parquet.write_table(none, pyarrow.BufferOutputStream())
        except (*refusals, OverflowError):
            columns[name] = pyarrow.array([json.dumps(value) for value in values])
    beside = target.with_name(f".{target.name}.new")
    parquet.write_table(pyarrow.table(columns), beside)
    beside.replace(target)
    source.unlink()


def read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file that `write_parquet` wrote, without what is null."""
    from ..uie.strict_json import without_nulls

    for batch in needed("pyarrow.parquet", "uie").ParquetFile(path).iter_batches():
        yield from map(without_nulls, batch.to_pylist())


def read_finished(path: Path, sources: Sequence[str], job: str) -> list[dict[str, Any]]:
    """The rows of a finished output.

    Raises:
        ValueError: It is that of another job.
    """
    rows = list(read_parquet(path))
    if [(row.get("source"), row.get("run")) for row in rows] != [(one, job) for one in sources]:
        raise ValueError(
            f"`{path}` was not written by such a run: with these texts, this schema, these "
            "settings and this model. Write to another file, or pass --overwrite."
        )
    return rows
