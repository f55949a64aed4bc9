"""What no file of the project may do, found by `ast`: run data as code, or guess an encoding."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FORBIDDEN_CALLS = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "pty.spawn", "yaml.load"),
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.load", "marshal.loads"),
    *(
        "shelve.open",
        "dill.load",
        "dill.loads",
        "joblib.load",
        "runpy.run_path",
        "yaml.unsafe_load",
    ),
    *("builtins.eval", "builtins.exec", "np.load", "numpy.load", "pd.read_pickle", "code.interact"),
}
OF_FILES = {"open", "read_text", "write_text"}
# Modules that only name errors, or that import names of the package itself.
IMPORTED_BY_NAME = {"cli/main.py", "uie/__init__.py", "optional.py"}
STARTS_PROCESSES = {"benchmarks", "experiments", "examples"}
FILES = [
    path
    for folder in ("peft_taskmoe", "examples", "experiments", "benchmarks")
    for path in sorted((ROOT / folder).rglob("*.py"))
]


def faults(source: str, name: str = "x.py") -> list[str]:
    """What a file does that it may not, as `line: what`."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            found.append((node.lineno, "bare except"))
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            modules = names if isinstance(node, ast.Import) else [node.module or ""]
            first = {module.split(".")[0] for module in modules}
            if first & {"marshal", "dill", "shelve", "joblib"}:
                found.append((node.lineno, f"import of {sorted(first)}"))
            if isinstance(node, ast.ImportFrom) and first & {"pickle", "builtins", "os"}:
                found += [(node.lineno, n) for n in names if n in ("load", "loads", "system")]
            if "subprocess" in first and name.split("/")[0] not in STARTS_PROCESSES:
                found.append((node.lineno, "subprocess"))
        if isinstance(node, ast.Call):
            found += [(node.lineno, fault) for fault in faults_of_call(node, name)]
    return [f"{line}: {fault}" for line, fault in found]


def faults_of_call(node: ast.Call, name: str) -> list[str]:
    called = ast.unparse(node.func)
    keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
    found = [called] if called in FORBIDDEN_CALLS else []
    if called.endswith("import_module"):
        inside = name.removeprefix("peft_taskmoe/") in IMPORTED_BY_NAME
        found += [] if inside else [called]
    if keywords.get("trust_remote_code", "False") != "False":
        found.append("trust_remote_code")
    if called == "torch.load" and keywords.get("weights_only") != "True":
        found.append("torch.load without weights_only=True")
    if keywords.get("weights_only", "True") != "True":
        found.append("weights_only")
    if keywords.get("shell", "False") != "False":
        found.append("shell")
    method = called.rpartition(".")[2]
    values = [*(ast.unparse(a) for a in node.args), *keywords.values()]
    binary = any(v.strip("'\"") in ("rb", "wb", "ab", "rb+", "xb") for v in values)
    own = method == "read_text" and "." not in called  # the reader of that name
    if method in OF_FILES and called != "os.open" and not binary and not own:
        place = {"read_text": 0, "write_text": 1}.get(method)
        if "encoding" not in keywords and not (place is not None and len(node.args) > place):
            found.append(f"{called} without an encoding")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_runs_data_or_guesses_an_encoding(path: Path) -> None:
    name = path.relative_to(ROOT).as_posix()
    assert faults(path.read_text(encoding="utf-8"), name) == []


@pytest.mark.parametrize(
    "source",
    [
        "eval(x)", "exec(x)", "compile(x, '', 'exec')", "__import__(x)", "import marshal",
        "pickle.loads(x)", "from pickle import loads", "importlib.import_module(x)",
        "from_pretrained(x, trust_remote_code=True)", "from_pretrained(x, trust_remote_code=y)",
        "torch.load(x)", "torch.load(x, weights_only=False)", "os.system(x)", "yaml.load(x)",
        "try:\n    x\nexcept:\n    y", "open(x)", "path.open('w')", "path.read_text()",
        "path.write_text(x)", "import subprocess", "run(x, shell=True)",
    ],
)  # fmt: skip
def test_the_check_finds(source: str) -> None:
    assert faults(source, "peft_taskmoe/x.py")
