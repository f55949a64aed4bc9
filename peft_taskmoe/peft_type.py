"""The name under which PEFT knows the method.

PEFT keys its tables by members of its own `PeftType`, which cannot be extended from outside.
Members of a `str` enum hash and compare like their value, so a one-member enum of ours finds its
way through the same tables, through `adapter_config.json` (where it is a plain string) and through
code that reads `peft_type.value`.
"""

from __future__ import annotations

import enum


class TaskMoELoraType(str, enum.Enum):  # as PEFT's own, whose members format by name
    """A one-member companion of `peft.PeftType`."""

    TASKMOE_LORA = "TASKMOE_LORA"


TASKMOE_LORA = TaskMoELoraType.TASKMOE_LORA
"""The `peft_type` of `TaskMoELoraConfig`."""

PREFIX = "taskmoe_lora_"
"""What all adapter parameters' names begin with; transformers lower-cases the type for it."""
