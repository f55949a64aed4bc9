"""Puts the method's model card into what `PeftModel.push_to_hub` uploads."""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from transformers.utils import PushToHubMixin

from .model_card import write_card
from .peft_type import TASKMOE_LORA


def push_with_card() -> None:
    """From here on a `PeftModel` of the method pushes its card. Idempotent.

    Just before the upload, transformers writes a card over that of `save_pretrained`.
    """

    def upload(self: Any, working_dir: str, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        config = self.peft_config.get("default")
        if config is not None and config.peft_type == TASKMOE_LORA:
            write_card(working_dir, config, adapter=repo_id)
        return PushToHubMixin._upload_modified_files(self, working_dir, repo_id, *args, **kwargs)

    PeftModel._upload_modified_files = upload
