"""How the package is built: levels, no import circle, no private names across files; by `ast`."""

from __future__ import annotations

import ast
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import peft_taskmoe
from peft_taskmoe.optional import needed
from running import syntax_tree

ROOT = Path(peft_taskmoe.__file__).parent
PACKAGE = ROOT.name

# A file of the core, or a folder, imports from the levels above its own line only.
LEVELS = [
    {
        "config_checks",
        "router",
        "experts",
        "adapter_weight",
        "encoder_config",
        "encoder_chunks",
        "encoder_loading",
    },
    {"peft_type", "wrapping", "help_only", "model_card", "optional", "cache", "checkpoints"},
    {"fused", "aux_loss", "config", "prompts", "figures"},
    {"decoding", "task_scope", "encoder"},
    {"token_rows", "call_arguments", "recompute", "collator", "task_encoders"},
    {"base_layers", "push"},
    {"adapters"},
    {"layer", "continuous_batching"},
    {"conditioning", "row_adapters"},
    {"model", "attach", "inspection"},
    {"registration", "callback", "nearest", "plots"},
    {"export"},
    {"__init__"},
    {"uie"},
    {"page"},
    {"serving"},
    {"cli"},
    {"__main__"},
]
WITHIN_A_LEVEL = {("encoder_chunks", "encoder_config"), ("encoder_loading", "encoder_config")}
PURE_TORCH = ("router", "experts", "fused", "decoding", "aux_loss", "task_scope", "token_rows")
WITHOUT_TORCH = (
    *("records", "schema", "prompt", "parse", "scoring", "tables", "view"),
    *("extraction/jobs", "extraction/questions", "extraction/results"),
)


def name_of(path: Path) -> str:
    """A file's full name, e.g. `peft_taskmoe.uie.view` for that folder's `__init__.py`."""
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(path): path for path in sorted(ROOT.rglob("*.py"))}
TREES = {name: syntax_tree(path) for name, path in FILES.items()}


def for_types_only(tree: ast.Module) -> set[ast.AST]:
    """Everything below `if TYPE_CHECKING:`."""
    found: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            found |= {inner for statement in node.body for inner in ast.walk(statement)}
    return found


@cache
def imported(name: str) -> set[tuple[str, str]]:
    """Modules, and what is taken of them, that a file imports, at its top or in a function."""
    is_folder = FILES[name].name == "__init__.py"
    folder = (name if is_folder else name.rpartition(".")[0]).split(".")
    found, skipped = set(), for_types_only(TREES[name])
    for node in set(ast.walk(TREES[name])) - skipped:
        if isinstance(node, ast.Import):
            found |= {(alias.name, "") for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = folder[: len(folder) - node.level + 1] if node.level else []
            module = ".".join((*start, *filter(None, [node.module])))
            found |= {(module, alias.name) for alias in node.names}
    return found


def files_imported(name: str) -> set[str]:
    """The package's own files that a file imports."""
    whole = {(f"{module}.{taken}", module) for module, taken in imported(name)}
    found = {longer if longer in FILES else module for longer, module in whole}
    return found & set(FILES) - {name}


def role(name: str) -> str:
    """A file of the core or, below it, the folder."""
    return "__init__" if name == PACKAGE else name.split(".")[1]


def test_imports_run_from_level_to_level() -> None:
    level = {role: i for i, roles in enumerate(LEVELS) for role in roles}
    assert {role(name) for name in FILES} == set(level)
    wrong = []
    for name in FILES:
        for other in files_imported(name):
            pair = role(name), role(other)
            below = level[pair[1]] < level[pair[0]]
            if not (below or pair[0] == pair[1] or pair in WITHIN_A_LEVEL):
                wrong.append(f"{name} imports {other}")
    assert not wrong


def test_no_import_circle() -> None:
    try:
        TopologicalSorter({name: files_imported(name) for name in FILES}).prepare()
    except CycleError as error:
        pytest.fail(f"circle: {' <- '.join(error.args[1])}")


def test_no_private_name_crosses_files() -> None:
    private = [
        (name, module, taken)
        for name in FILES
        for module, taken in imported(name)
        if module.split(".")[0] == PACKAGE and f"{module}.{taken}".count("._")
    ]
    assert not private


@pytest.mark.parametrize("name", PURE_TORCH)
def test_the_method_itself_imports_no_peft_and_no_transformers(name) -> None:
    name = f"{PACKAGE}.{name}"
    outside = {module.split(".")[0] for module, _ in imported(name)}
    assert outside <= {"torch", PACKAGE, *sys.stdlib_module_names}
    assert {role(other) for other in files_imported(name)} <= set(PURE_TORCH)


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_what_reads_and_scores_text_is_free_of_torch(name) -> None:
    start = f"{PACKAGE}.uie.{name.replace('/', '.')}"
    files = [file for file in FILES if f"{file}.".startswith(f"{start}.")]
    outside = {module.split(".")[0] for file in files for module, _ in imported(file)}
    assert files and not outside & {"torch", "transformers", "peft", "safetensors"}


def test_every_file_opens_with_one_sentence() -> None:
    for name, path in FILES.items():
        assert path.stem not in {"utils", "base", "common", "helpers", "misc"}
        first, *rest = (ast.get_docstring(TREES[name]) or "").split("\n")
        assert len(first) > 25 and first[-1] in ".:" and rest[:1] in ([], [""]), name


def test_the_public_names_are_there() -> None:
    assert set(peft_taskmoe.__all__) == {
        "ChecksumCallback", "RoutingCallback", "TaskCollator", "TaskEncoder", "TaskEncoderConfig",
        "TaskMoELoraConfig", "TaskMoELoraModel", "attach_task_encoder", "checkpoint_fault",
        "experts_from_loras", "from_reference_checkpoint", "heat_map", "load_plot", "log_routing",
        "nearest_tasks", "newest_whole_checkpoint", "record_gates", "save_task_centroids",
        "similarity_map", "task_context", "to_lora", "token_gates",
    }  # fmt: skip
    assert all(hasattr(peft_taskmoe, name) for name in peft_taskmoe.__all__)


def test_a_package_that_is_broken_is_not_called_missing(tmp_path, monkeypatch) -> None:
    (tmp_path / "broken_package.py").write_text("import not_there", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="No module named 'not_there'"):
        needed("broken_package", "plot")
