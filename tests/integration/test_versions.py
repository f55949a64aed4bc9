"""Versions outside of the ranges in `pyproject.toml` get a message that says what was found and what to install."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import peft_taskmoe
from peft_taskmoe import registration

PYPROJECT = Path(peft_taskmoe.__file__).parent.parent / "pyproject.toml"
RANGES = {"torch": ">=2.13", "peft": ">=0.21.2,<0.22", "transformers": ">=5.23,<6"}


@pytest.fixture
def installed(monkeypatch):
    """Pretend that other versions are installed; `None` stands for a package that is not."""

    def pretend(**versions: str | None) -> None:
        def found(name: str) -> str:
            pretended = versions.get(name, version(name) if name not in versions else None)
            if pretended is None:
                raise PackageNotFoundError(name)
            return pretended

        monkeypatch.setattr(registration, "version", found)

    return pretend


@pytest.mark.parametrize(
    "name, found",
    [
        ("peft", "0.14.0"),
        ("peft", "0.21.1"),  # calls what transformers 5.23 no longer has
        ("peft", "0.22.0"),
        ("peft", "0.22.0.dev0"),
        ("transformers", "4.57.6"),
        ("transformers", "5.22.2"),
        ("transformers", "6.0.0"),
        ("transformers", "6.0.0rc1"),
        ("torch", "2.12.1"),
        ("torch", "2.12.1+cpu"),
    ],
)
def test_a_version_outside_the_range_is_refused(installed, name, found) -> None:
    installed(**{name: found})
    with pytest.raises(ImportError) as error:
        registration.register()
    assert str(error.value) == (
        f"peft_taskmoe works with `{name}{RANGES[name]}`; found {name} {found}, whose interface may differ. "
        f"Run `pip install '{name}{RANGES[name]}'`."
    )


@pytest.mark.parametrize(
    "name, found",
    [
        ("peft", "0.21.2"),
        ("peft", "0.21.9"),
        ("transformers", "5.23.0"),
        ("transformers", "5.31.0.dev0"),
        ("torch", "2.13.0+cpu"),
        ("torch", "2.15.0+cu130"),
        ("torch", "2.16.0a0+git1234567"),
        ("trl", "1.16.0"),
        ("trl", "1.99.0"),
        ("trl", None),
    ],
)
def test_a_version_inside_the_range_passes_in_silence(installed, name, found) -> None:
    installed(**{name: found})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        registration.check_versions()


@pytest.mark.parametrize("found", ["0.29.1", "1.15.0", "2.0.0", "2.0.0.dev0"])
def test_another_trl_is_warned_of(installed, found) -> None:
    """The package itself does not use TRL, so whoever only has it installed is not stopped."""
    installed(trl=found)
    with pytest.warns(UserWarning) as caught:
        registration.check_versions()
    assert [str(warning.message) for warning in caught] == [
        f"peft_taskmoe works with `trl>=1.16,<2`; found trl {found}, whose interface may differ. "
        "Run `pip install 'trl>=1.16,<2'`."
    ]


@pytest.mark.skipif(not PYPROJECT.is_file(), reason="pyproject.toml is there in a checkout only")
def test_the_ranges_are_those_of_pyproject() -> None:
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    declared = {
        requirement.name: requirement.specifier
        for requirement in map(
            Requirement, project["dependencies"] + project["optional-dependencies"]["train"]
        )
    }
    checked = registration.REQUIRED | registration.OPTIONAL
    assert list(checked) == ["torch", "peft", "transformers", "trl"]
    assert {name: SpecifierSet(supported) for name, supported in checked.items()} == {
        name: declared[name] for name in checked
    }


@pytest.mark.parametrize(
    "name, found",
    [("peft", "0.14.0"), ("transformers", "4.40.0"), ("torch", "2.1.0"), ("peft", "0.22.0")],
)
def test_it_is_refused_before_an_import_can_fail_in_it(tmp_path, name, found) -> None:
    """In a fresh process, with a package of that version on the path that cannot even be imported."""
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text(
        "raise AttributeError('an import of the other version')"
    )
    metadata = tmp_path / f"{name}-{found}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {found}\n")
    done = subprocess.run(
        [sys.executable, "-c", "import peft_taskmoe"],
        capture_output=True,
        text=True,
        cwd=Path(peft_taskmoe.__file__).parent.parent,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        timeout=120,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(
        f"ImportError: peft_taskmoe works with `{name}{RANGES[name]}`; found {name} {found}"
    )
