"""Imports run one way, the core never knows extraction, and some modules stay light: read from the sources with `ast`."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

import peft_taskmoe

ROOT = Path(peft_taskmoe.__file__).parent
PACKAGE = ROOT.name

# A module imports from levels before its own, and within its own level only what stands in WITHIN.
LEVELS = [
    {
        "help_only",
        "checkpoints",
        "peft_type",
        "cache",
        "config",
        "router",
        "experts",
        "fused",
        "conditioning",
        "encoder",
        "encoder_chunks",
        "encoder_config",
        "encoder_loading",
        "collator",
        "automatic",
    },
    {"layer"},
    {"model", "inspection"},
    {"registration", "export", "training_log"},
    {"__init__"},
]
WITHIN = {
    "config": {"encoder_config", "peft_type"},
    "encoder": {"cache", "encoder_chunks", "encoder_config", "encoder_loading"},
    "encoder_chunks": {"encoder_config"},
    "encoder_loading": {"encoder_config"},
    "fused": {"router", "experts"},
    "conditioning": {"router"},
    "collator": {"encoder"},
    "automatic": {"encoder"},
}
PURE_TORCH = {"router", "experts", "fused", "conditioning"}
WITHOUT_TORCH = {
    *("records", "schema", "prompt", "parse", "scoring", "tables", "view"),
    *("extraction/jobs", "extraction/questions", "extraction/results"),
}


def imported(path: Path) -> set[str]:
    """Full names of everything a file imports, at its top or inside a function; relative imports made absolute."""
    relative = path.relative_to(ROOT.parent).with_suffix("").parts
    parent = relative[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = parent[: len(parent) - node.level + 1] if node.level else ()
            module = ".".join((*start, node.module) if node.module else start)
            found |= {f"{module}.{alias.name}" for alias in node.names} | {module}
    return found


def role(path: Path) -> str:
    """The name directly below the package: a module's, or that of the folder it is in."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def core_files() -> list[Path]:
    """All but extraction and the command line, which stand on the core."""
    outside = {"cli", "uie", "__main__"}
    return sorted(path for path in ROOT.rglob("*.py") if role(path) not in outside)


def imports_of_package(path: Path) -> set[str]:
    """The package's own modules that a file imports, e.g. `{"router", "uie"}`."""
    parts = [name.split(".") for name in imported(path) if name.split(".")[0] == PACKAGE]
    known = {role(file) for file in core_files()} | {"uie"}
    return {part[1] for part in parts if len(part) > 1 and part[1] in known}


def test_every_module_of_the_core_has_its_level() -> None:
    listed = set().union(*LEVELS)
    assert {role(path) for path in core_files()} - listed == set()


@pytest.mark.parametrize("path", core_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path) -> None:
    own = role(path)
    level = next(i for i, modules in enumerate(LEVELS) if own in modules)
    before = set().union(*LEVELS[:level]) if level else set()
    allowed = before | WITHIN.get(own, set()) | {own}
    assert imports_of_package(path) <= allowed


def test_within_the_first_level_there_is_no_cycle() -> None:
    done: set[str] = set()
    waiting = {name: WITHIN.get(name, set()) for name in LEVELS[0]}
    while waiting:
        ready = {name for name, needs in waiting.items() if needs <= done}
        assert ready, f"cycle among {sorted(waiting)}"
        done |= ready
        waiting = {name: needs for name, needs in waiting.items() if name not in ready}


@pytest.mark.parametrize("path", core_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_core_never_imports_extraction(path) -> None:
    assert "uie" not in imports_of_package(path)


@pytest.mark.parametrize("name", sorted(PURE_TORCH))
def test_the_method_itself_knows_no_peft_and_no_transformers(name) -> None:
    outside = {module.split(".")[0] for module in imported(ROOT / f"{name}.py")}
    assert outside <= {"torch", PACKAGE, *sys.stdlib_module_names}


@pytest.mark.parametrize("name", sorted(WITHOUT_TORCH))
def test_what_reads_and_scores_text_is_free_of_torch(name) -> None:
    uie = ROOT / "uie"
    files = [*uie.glob(f"{name}.py"), *(uie / name).glob("*.py")]
    outside = {module.split(".")[0] for path in files for module in imported(path)}
    assert files and not outside & {"torch", "transformers", "peft", "safetensors"}


@pytest.mark.parametrize(
    "path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT))
)
def test_every_file_has_a_role_and_says_it(path) -> None:
    assert path.stem not in {"utils", "base", "common", "helpers", "misc"}
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    assert docstring and len(docstring) > 40


@pytest.mark.parametrize(
    "path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT))
)
def test_nothing_runs_what_it_reads(path) -> None:
    """No eval, exec or unpickling anywhere: what a model or a file says is data."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in {
                "eval",
                "exec",
                "compile",
                "__import__",
                "pickle.load",
                "pickle.loads",
            }
            if called == "torch.load":
                assert "weights_only=True" in map(ast.unparse, node.keywords)


def test_the_public_names_are_there() -> None:
    assert {
        "TaskMoELoraConfig", "TaskMoELoraModel", "TaskEncoder", "attach_task_encoder", "task_context", "TaskCollator",
    } <= set(peft_taskmoe.__all__)  # fmt: skip
    assert all(hasattr(peft_taskmoe, name) for name in peft_taskmoe.__all__)
