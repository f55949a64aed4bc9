"""The method's entries in PEFT's tables, made when the package is imported."""

from __future__ import annotations

from .peft_type import PREFIX, TASKMOE_LORA


def register() -> None:
    """Tell PEFT about the method. Idempotent.

    Raises:
        ImportError: If this version of PEFT has another tuner interface.
    """
    try:
        from peft.mapping import (
            PEFT_TYPE_TO_CONFIG_MAPPING,
            PEFT_TYPE_TO_PREFIX_MAPPING,
            PEFT_TYPE_TO_TUNER_MAPPING,
        )

        from .config import TaskMoELoraConfig
        from .model import TaskMoELoraModel
        from .push import push_with_card
    except ImportError as error:
        from importlib.metadata import version

        raise ImportError(
            f"peft_taskmoe needs PEFT's tuner interface of 0.21 or newer; found peft "
            f"{version('peft')}: {error}. Run `pip install 'peft>=0.21'`."
        ) from error

    PEFT_TYPE_TO_CONFIG_MAPPING[TASKMOE_LORA] = TaskMoELoraConfig
    PEFT_TYPE_TO_TUNER_MAPPING[TASKMOE_LORA] = TaskMoELoraModel
    PEFT_TYPE_TO_PREFIX_MAPPING[TASKMOE_LORA] = PREFIX
    push_with_card()
