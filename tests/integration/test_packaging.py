"""What is installed is whole: files of the wheel, declared dependencies, named extras."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import peft_taskmoe
from peft_taskmoe.cli.parquet import read_parquet
from peft_taskmoe.optional import needed
from peft_taskmoe.uie import Extractions, score
from peft_taskmoe.uie.tables import Table
from peft_taskmoe.uie.view import show
from running import PYPROJECT, syntax_tree

ROOT = Path(__file__).parents[2]
PACKAGE = Path(peft_taskmoe.__file__).parent
PROJECT = PYPROJECT["project"]
DISTRIBUTIONS = {"sklearn": "scikit-learn", "yaml": "pyyaml"}
OF_THE_NOTEBOOK = {"IPython"}  # there wherever it is asked for


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[^\w-]", requirement)[0] for requirement in requirements}


def distribution(module: str) -> str:
    return DISTRIBUTIONS.get(module, module.replace("_", "-"))


CORE = names(PROJECT["dependencies"])
EXTRAS = {extra: names(of) for extra, of in PROJECT["optional-dependencies"].items()}
OF_USERS = set(EXTRAS) - {"all", "dev", "docs"}


def imports_of(tree: ast.AST, inside: bool = False) -> set[tuple[str, bool]]:
    """Modules that are imported, and whether inside a function; not those for types alone."""
    found: set[tuple[str, bool]] = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            found |= {(alias.name, inside) for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add((str(node.module), inside))
        function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        found |= imports_of(node, inside or function)
    return found


def test_whatever_is_imported_is_declared() -> None:
    optional = set().union(*(EXTRAS[extra] for extra in OF_USERS))
    known = {*sys.stdlib_module_names, "peft_taskmoe", *OF_THE_NOTEBOOK}
    for path in PACKAGE.rglob("*.py"):
        whole = path.parent.name == "serving"  # needs its extra to be imported at all
        for module, inside in imports_of(syntax_tree(path)):
            top = module.partition(".")[0]
            if top not in known:
                allowed = CORE | optional if inside or whole else CORE
                assert distribution(top) in allowed, (path.name, module)


def test_the_extras_that_errors_name_bring_the_package() -> None:
    told = 0
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(syntax_tree(path)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "needed":
                if not all(isinstance(one, ast.Constant) for one in node.args):
                    continue
                module, extra = (ast.literal_eval(one) for one in node.args)
                top = module.partition(".")[0]
                assert distribution(top) in EXTRAS[extra], (path.name, module)
                told += 1
    assert told > 10
    (everything,) = PROJECT["optional-dependencies"]["all"]
    assert set(re.findall(r"\w+", everything.partition("[")[2])) == OF_USERS


@pytest.mark.parametrize(
    ("package", "extra", "call"),
    [
        ("rich", "uie", lambda: Table("scores", ["F1"], []).to_rich()),
        ("rich", "uie", lambda: score({}, {}).table()),
        ("rich", "uie", lambda: show([])),
        ("pandas", "uie", lambda: Extractions([], 0.0).to_dataframe()),
        ("pyarrow", "uie", lambda: list(read_parquet(Path("a.parquet")))),
        ("matplotlib", "plot", lambda: needed("matplotlib.figure", "plot")),
    ],
)
def test_a_missing_package_is_named_with_its_extra(monkeypatch, package, extra, call) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        ImportError, match=rf"needs `{package}`.*pip install 'peft_taskmoe\[{extra}\]'"
    ):
        call()


@pytest.mark.slow
def test_the_wheel_holds_every_file_of_the_package(tmp_path) -> None:
    wheels = pytest.importorskip("hatchling.builders.wheel", reason="hatchling is not installed")
    (wheel,) = wheels.WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    built = {path.relative_to(tmp_path / "site") for path in (tmp_path / "site").rglob("*.*")}
    kept = [path for path in PACKAGE.rglob("*.*") if "__pycache__" not in path.parts]
    assert {path.relative_to(PACKAGE.parent) for path in kept if path.is_file()} <= built
    found = "from importlib.resources import files\n"
    found += "import peft_taskmoe; print(peft_taskmoe.__file__)\n"
    found += "for name in ('py.typed', 'model_card.md', 'uie/view/templates/tables.html.jinja',\n"
    found += "             'uie/scoring/seen_labels.json'):\n"
    found += "    assert files('peft_taskmoe').joinpath(name).is_file(), name"
    code = f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n{found}"
    said = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert said.stdout.startswith(str(tmp_path / "site"))


def test_every_dependency_has_its_reason_and_its_version_in_the_lock() -> None:
    extras = PROJECT["optional-dependencies"]
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8").partition("## Dependencies")[2]
    table = re.findall(r"^\| ([a-z][^|]*) \|", text.partition("\n## ")[0], re.MULTILINE)
    explained = {name for row in table for name in row.split(", ")}
    lock = (ROOT / "constraints.txt").read_text("utf-8")
    locked = {
        re.sub("[-_.]+", "-", name).lower() for name in re.findall(r"^([\w.-]+)==\S+$", lock, re.M)
    }
    assert len(locked) == sum(not line.startswith("#") for line in lock.splitlines())
    for requirement in [*PROJECT["dependencies"], *(r for rs in extras.values() for r in rs)]:
        name = re.split(r"[\[<>=~! ]", requirement)[0].lower()
        if name != "peft_taskmoe":
            assert name in explained, f"{name} has no reason in CONTRIBUTING.md"
    for extra in ("train", "uie", "constrained", "plot", "serve", "docs", "dev"):
        for requirement in extras[extra]:
            name = re.split(r"[\[<>=~! ]", requirement)[0].lower()
            assert name in locked, f"{name} is not in constraints.txt"
