"""One output written by several processes: blocks of lines, a file each, put together at the end.

Process r of n answers the blocks r, r + n, ... Blocks do not depend on n, so a job that was stopped
goes on with any number of processes. Whichever ends last puts the blocks together.
"""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from tqdm import tqdm


@dataclass(frozen=True, slots=True)
class Processes:
    """Which process this is of how many, and of those of this machine; rank 0 of 1 if alone."""

    rank: int
    count: int
    local_rank: int

    @classmethod
    def of_environment(cls) -> Processes:
        """As `torchrun` and `accelerate launch` say it."""
        rank, count, local = (
            int(os.environ.get(name, default))
            for name, default in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))
        )
        return cls(rank, count, local)

    def wait_for_all(self) -> None:
        """Go on when all processes are here; afterwards none waits for another."""
        import torch.distributed as dist

        if self.count > 1:
            dist.init_process_group("gloo")
            dist.barrier()
            dist.destroy_process_group()


class Write(Protocol):
    """Writes the lines of the texts `first` to `last` that a file lacks."""

    def __call__(self, path: Path, first: int, last: int, *, progress: bool | None) -> int:
        """Return how many lines were written."""


@dataclass(frozen=True, slots=True)
class Shares:
    """The blocks of a job: the lines from `first` to `last` of an output, in files in a folder."""

    output: Path
    folder: Path
    first: int
    last: int

    def blocks(self) -> list[tuple[Path, int, int]]:
        """File, first and last line of each block."""
        size = min(256, max(8, (self.last - self.first) // 32))
        starts = range(self.first, self.last, size)
        ends = [min(start + size, self.last) for start in starts]
        return [(self.folder / f"{a:09}.jsonl", a, b) for a, b in zip(starts, ends, strict=True)]

    def write(self, write: Write, processes: Processes) -> bool:
        """Write the blocks of this process, and say whether the output is complete now."""
        self.folder.mkdir(exist_ok=True)
        own = self.blocks()[processes.rank :: processes.count]
        left = [block for block in own if not _is_whole(*block)]
        for block in own:
            if block not in left:  # checked before anyone can put it together and remove it
                write(*block, progress=False)
        processes.wait_for_all()
        total, missing = (sum(b - a for _, a, b in blocks) for blocks in (own, left))
        with tqdm(
            total=total,
            initial=total - missing,
            desc="Extracting",
            unit=" text",
            disable=processes.rank > 0,
        ) as bar:
            for file, first, last in left:
                write(file, first, last, progress=False)
                bar.update(last - first)
        return self._put_together()

    def _put_together(self) -> bool:
        """Replace the output by its first lines and all blocks, if these are complete."""
        from ..uie.extraction.jobs import only_writer

        with only_writer(self.output, wait=600):
            blocks = self.blocks()
            if not self.folder.exists() or not all(_is_whole(*block) for block in blocks):
                return False
            beside = self.output.with_name(f".{self.output.name}.new")
            with beside.open("wb") as target:
                if self.first:
                    _append(self.output, target)
                for file, _, _ in blocks:
                    _append(file, target)
            beside.replace(self.output)
            shutil.rmtree(self.folder, ignore_errors=True)
        return True


def _is_whole(file: Path, first: int, last: int) -> bool:
    """Whether a block has all its lines."""
    return file.exists() and file.read_bytes().count(b"\n") >= last - first


def _append(file: Path, target: BinaryIO) -> None:
    with file.open("rb") as source:
        shutil.copyfileobj(source, target)


def plan_shares(
    output: Path, job: str, sources: Sequence[str], overwrite: bool, processes: Processes
) -> Shares | None:
    """The blocks of an output; None for a job of one process that never had several.

    Raises:
        ValueError: The output, or blocks beside it, are those of another job.
    """
    from ..uie.extraction.jobs import checksum, lines_done, only_writer

    output = output.absolute()
    found = sorted({file.parent for file in parts_of(output)})
    if processes.count == 1 and not found:
        return None
    with only_writer(output, wait=60):
        first = 0 if overwrite else lines_done(output, sources, job)
    key = checksum([job, first, *sources])
    folder = output.with_name(f".{output.name}.{key}.parts")
    others = [one for one in found if one != folder]
    if first == len(sources) and not overwrite:
        if processes.rank > 0:
            return None
        # What a process that was stopped had put together, but not removed, may go.
        refused = [one for one in others if not _is_of(one, job, sources)]
    else:
        refused = [] if overwrite else others
    if refused:
        raise ValueError(
            f"`{refused[0]}` holds parts of another job for `{output}`. Write to another file, or "
            "pass --overwrite."
        )
    for other in others if processes.rank == 0 else ():
        shutil.rmtree(other)
    if first == len(sources) or (processes.count == 1 and not folder.exists()):
        return None
    return Shares(output, folder, first, len(sources))


def _is_of(folder: Path, job: str, sources: Sequence[str]) -> bool:
    """Whether the blocks in a folder are those of a job."""
    from ..uie.extraction.jobs import json_object

    for file in folder.glob("*.jsonl"):
        with file.open("rb") as lines:
            row = json_object(lines.readline()) or {}
        number = int(file.stem) if file.stem.isdecimal() else len(sources)
        if (row.get("run"), [row.get("source")]) != (job, list(sources[number : number + 1])):
            return False
    return True


def parts_of(output: Path) -> list[Path]:
    """The blocks beside an output, of whatever job."""
    return sorted(output.absolute().parent.glob(f".{glob.escape(output.name)}.*.parts/*.jsonl"))
