"""Loads a task encoder and its tokenizer from a folder or the Hub, without running code from it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .encoder_config import TaskEncoderConfig

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


def task_dim_of(config: TaskEncoderConfig) -> int:
    """The length of an encoder's vectors, read from its config.json; no weights are loaded.

    Raises:
        OSError: If no config.json can be reached, or it states no width.
    """
    from transformers import AutoConfig

    name = config.name_or_path
    try:
        place = _place(config)
        return width_of(AutoConfig.from_pretrained(name, trust_remote_code=False, **place))
    except Exception as error:
        raise OSError(
            f"The width of the task encoder `{name}` cannot be read from a config.json "
            f"({type(error).__name__}). Pass `task_dim=`, or an encoder that can be reached."
        ) from error


def width_of(model_config: Any) -> int:
    """The width of a model's hidden states; of an encoder-decoder, of its encoder half."""
    half = getattr(model_config, "encoder", model_config)
    return int(getattr(half, "hidden_size", None) or model_config.hidden_size)


def load_encoder(
    config: TaskEncoderConfig, dtype: torch.dtype
) -> tuple[Any, PreTrainedTokenizerBase, str | None]:
    """Load an encoder (of an encoder-decoder: the encoder half) and its tokenizer, of one commit.

    Returns:
        The model; the tokenizer; the commit, `None` for a folder.

    Raises:
        OSError: If something is missing, broken or out of reach.
        ValueError: If the repository wants to run code, or its checkpoint lacks weights or has
            NaN or infinite ones.
    """
    name = config.name_or_path
    try:
        place = _place(config)
        code = _files_with_code(name, place)
        loaded = None if code else _load(name, place, dtype)
    except Exception as error:
        found = "no such folder, nor can the Hub give it"
        if os.path.isdir(name):
            found = f"a folder with {sorted(os.listdir(name))}"
        at = f" (revision `{config.revision}`)" if config.revision else ""
        raise OSError(
            f"The task encoder `{name}`{at} cannot be loaded: found {found}. Pass a folder "
            "with config.json, model.safetensors and the tokenizer's files, or a Hub id that this "
            f"machine can reach or has cached. The cause: {error}"
        ) from error
    if loaded is None:
        raise ValueError(
            f"The task encoder `{name}` wants code from its repository to run (`auto_map` in its "
            f"{code[0]}), which is never done. Use one that transformers knows, or load this one "
            "yourself and pass `TaskEncoder(model, tokenizer=tokenizer)`."
        )
    model, tokenizer, missing = loaded
    weights = model.named_parameters()
    broken = [key for key, weight in weights if "pooler" not in key and not weight.isfinite().all()]
    for fault, keys in (("lacks", missing), ("has NaN or infinite numbers in", broken)):
        if keys:
            raise ValueError(
                f"The checkpoint of the task encoder `{name}` {fault} {len(keys)} weights "
                f"(`{keys[0]}`, ...). Pass a whole checkpoint of a {type(model).__name__}."
            )
    return model, tokenizer, place.get("revision")


def _place(config: TaskEncoderConfig) -> dict[str, str]:
    """The commit of an encoder on the Hub, as keyword argument; nothing for a folder."""
    from huggingface_hub import hf_hub_download

    name = config.name_or_path
    if not name:
        raise FileNotFoundError("it was a loaded model without a name, which must be passed again")
    if not os.path.isdir(name):  # the cache keeps a file of commit C in `snapshots/C/`
        file = hf_hub_download(name, "config.json", revision=config.revision)
        return {"revision": Path(file).parent.name}
    if not Path(name, "config.json").is_file():
        raise FileNotFoundError("there is no config.json")
    return {}


def _files_with_code(name: str, place: dict[str, str]) -> list[str]:
    """The files of a repository that ask for code of its own to be run."""
    from transformers import PretrainedConfig
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    settings = {
        "config.json": PretrainedConfig.get_config_dict(name, **place)[0],
        "tokenizer_config.json": get_tokenizer_config(name, **place),
    }
    return [file for file, values in settings.items() if "auto_map" in values]


def _load(
    name: str, place: dict[str, str], dtype: torch.dtype
) -> tuple[Any, PreTrainedTokenizerBase, list[str]]:
    """The encoder, its tokenizer, and the names of the weights that its checkpoint lacks."""
    from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding, AutoTokenizer
    from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING

    config = AutoConfig.from_pretrained(name, trust_remote_code=False, **place)
    halves = config.is_encoder_decoder
    encoder_only = halves and type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING
    model, report = (AutoModelForTextEncoding if encoder_only else AutoModel).from_pretrained(
        name,
        trust_remote_code=False,
        weights_only=True,
        dtype=dtype,
        output_loading_info=True,
        **place,
    )
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, **place)
    if len(set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens)) < 2:
        # What transformers makes of a folder that has none of the tokenizer's files.
        raise FileNotFoundError("the tokenizer has no vocabulary")
    missing = sorted(key for key in report["missing_keys"] if "pooler" not in key)
    return (model.get_encoder() if halves and not encoder_only else model), tokenizer, missing
