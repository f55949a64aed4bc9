"""Puts the method's model card into what `PeftModel.push_to_hub` uploads."""

from __future__ import annotations

from functools import cache
from typing import Any

from peft import PeftModel
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from .model_card import write_card
from .peft_type import PREFIX

_UPLOAD = "_upload_modified_files"  # of transformers, the last step of `push_to_hub`


class UploadWithCard:
    """The upload of one `PeftModel`; copies and pickles with it.

    Just before it uploads, transformers writes a card over that of `save_pretrained`.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, working_dir: str, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        """Write the card, then upload."""
        config = self.model.peft_config.get("default")
        if config is not None:
            write_card(working_dir, config, adapter=repo_id)
        return getattr(type(self.model), _UPLOAD)(self.model, working_dir, repo_id, *args, **kwargs)


@cache
def push_with_card() -> None:
    """From here on every new `PeftModel` of the method pushes its card. Idempotent.

    A tuner is not told which `PeftModel` it belongs to, so torch tells when it is set in one.
    """

    def when_set(parent: nn.Module, name: str, module: nn.Module | None) -> None:
        if isinstance(parent, PeftModel) and getattr(module, "prefix", None) == PREFIX:
            parent.__dict__[_UPLOAD] = UploadWithCard(parent)

    register_module_module_registration_hook(when_set)
