"""The method's entries in PEFT's tables, made once when the package is imported, and the versions with which that works.

Importing this module imports neither PEFT nor transformers nor torch: their versions are read from their metadata, because an
interface that differs could fail in an import already, unexplained.
"""

from __future__ import annotations

import warnings
from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet

from .peft_type import PREFIX, TASKMOE_LORA

# As in pyproject.toml. PEFT's tuner interface changes between minor versions.
REQUIRED = {"torch": ">=2.13", "peft": ">=0.21.2,<0.22", "transformers": ">=5.23,<6"}
OPTIONAL = {"trl": ">=1.16,<2"}


def check_versions() -> None:
    """Refuse versions whose interfaces may differ, before they fail somewhere inside; warn of such an optional one.

    Raises:
        ImportError: Naming the version found and the command that installs one that works.
    """
    for name, supported in REQUIRED.items():
        if message := _mismatch(name, supported):
            raise ImportError(message)
    for name, supported in OPTIONAL.items():
        if message := _mismatch(name, supported):
            warnings.warn(message, stacklevel=2)


def _mismatch(name: str, supported: str) -> str | None:
    """What is wrong with the installed version, as pip would judge it; nothing where the package is not installed."""
    try:
        found = version(name)
    except PackageNotFoundError:
        return None
    if SpecifierSet(supported).contains(found, prereleases=True):
        return None
    return (
        f"peft_taskmoe works with `{name}{supported}`; found {name} {found}, whose interface may differ. "
        f"Run `pip install '{name}{supported}'`."
    )


def register() -> None:
    """Tell PEFT about the method; doing it again changes nothing.

    Raises:
        ImportError: See `check_versions`.
    """
    check_versions()

    from peft.mapping import (
        PEFT_TYPE_TO_CONFIG_MAPPING,
        PEFT_TYPE_TO_PREFIX_MAPPING,
        PEFT_TYPE_TO_TUNER_MAPPING,
    )

    from .config import TaskMoELoraConfig
    from .model import TaskMoELoraModel

    PEFT_TYPE_TO_CONFIG_MAPPING[TASKMOE_LORA] = TaskMoELoraConfig
    PEFT_TYPE_TO_TUNER_MAPPING[TASKMOE_LORA] = TaskMoELoraModel
    PEFT_TYPE_TO_PREFIX_MAPPING[TASKMOE_LORA] = PREFIX
