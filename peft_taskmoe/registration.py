"""The method's entries in PEFT's tables, made once when the package is imported."""

from __future__ import annotations

from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)

from .config import TaskMoELoraConfig
from .model import TaskMoELoraModel
from .peft_type import PREFIX, TASKMOE_LORA


def register() -> None:
    """Tell PEFT about the method; doing it again changes nothing."""
    PEFT_TYPE_TO_CONFIG_MAPPING[TASKMOE_LORA] = TaskMoELoraConfig
    PEFT_TYPE_TO_TUNER_MAPPING[TASKMOE_LORA] = TaskMoELoraModel
    PEFT_TYPE_TO_PREFIX_MAPPING[TASKMOE_LORA] = PREFIX
