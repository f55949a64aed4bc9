"""The method's entries in PEFT's tables, made once when the package is imported."""

from __future__ import annotations

import peft
import transformers
from packaging.version import Version
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)

from .config import TaskMoELoraConfig
from .model import TaskMoELoraModel
from .peft_type import PREFIX, TASKMOE_LORA

# First version that works, first that is not known to. PEFT's tuner interface changes between minor versions.
_SUPPORTED = {"peft": ("0.21", "0.22"), "transformers": ("5.23", "6.0")}


def check_versions() -> None:
    """Refuse versions whose interfaces differ, before they fail somewhere inside.

    Raises:
        ImportError: Naming the version found and the command that installs one that works.
    """
    for module in (peft, transformers):
        name, found = module.__name__, Version(module.__version__)
        lowest, limit = _SUPPORTED[name]
        if not Version(lowest) <= found < Version(limit):
            raise ImportError(
                f"peft_taskmoe works with `{name}` {lowest} and up to, but without, {limit}; found {found}, whose interface may "
                f"differ. Run `pip install '{name}>={lowest},<{limit}'`."
            )


def register() -> None:
    """Tell PEFT about the method; doing it again changes nothing.

    Raises:
        ImportError: See `check_versions`.
    """
    check_versions()
    PEFT_TYPE_TO_CONFIG_MAPPING[TASKMOE_LORA] = TaskMoELoraConfig
    PEFT_TYPE_TO_TUNER_MAPPING[TASKMOE_LORA] = TaskMoELoraModel
    PEFT_TYPE_TO_PREFIX_MAPPING[TASKMOE_LORA] = PREFIX
