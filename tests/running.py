"""Runs a script of the repository as a user does: as a process."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def syntax_tree(path: Path) -> ast.Module:
    """A file's tree; a second try where Python 3.11 parsed in two places at once (gh-106905)."""
    source = path.read_text(encoding="utf-8")
    try:
        return ast.parse(source)
    except SystemError:
        return ast.parse(source)


def run(
    script: str,
    *arguments: object,
    folder: str = "examples",
    launcher: Sequence[str] = (),
    fails: bool = False,
    **environment: str,
) -> str:
    """Run a script of a folder; return what it printed, or its errors where it must fail."""
    done = subprocess.run(
        [sys.executable, *launcher, ROOT / folder / script, *map(str, arguments)],
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "200",
            "PYTHONPATH": str(ROOT),
            **environment,
        },
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (done.returncode != 0) == fails, done.stderr[-3000:]
    return done.stderr if fails else done.stdout
