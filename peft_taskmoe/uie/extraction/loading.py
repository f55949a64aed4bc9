"""Load an adapter with its base model and tokenizer, and refuse one whose weights are broken."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ...nearest import CENTROIDS_FILE, TaskCentroids
from ..scoring.calibration import CALIBRATION_FILE, Calibration
from .format_file import file_beside


def load_model(
    adapter: str | Path,
    base_model: str | Path | None,
    tokenizer: Any,
    where: Mapping[str, Any],
    model_kwargs: Mapping[str, Any],
) -> tuple[Any, Any]:
    """An adapter on its base model, and the tokenizer.

    Args:
        adapter: Hub id or folder of the adapter.
        base_model: Hub id or folder of the base model; None: the one that the adapter names.
        tokenizer: The tokenizer; None loads the adapter's own, or else the base model's.
        where: `revision`, `subfolder` and `token` of the adapter, as far as given.
        model_kwargs: Passed to `AutoModelForCausalLM.from_pretrained`.

    Raises:
        ValueError: No base model is named, or weights of the adapter are missing or not finite.
    """
    from peft import PeftConfig, PeftModel, load_peft_weights
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = PeftConfig.from_pretrained(str(adapter), **where)
    name, revision = config.base_model_name_or_path, config.revision
    if base_model is not None:
        name, revision = str(base_model), None
    if not name:
        raise ValueError(
            f"The config of {str(adapter)!r} names no base model (`base_model_name_or_path`). "
            "Pass its Hub id or folder as `base_model`."
        )
    weights = load_peft_weights(str(adapter), device="cpu", **where)
    _check_finite(adapter, weights)
    access = {key: value for key, value in where.items() if key == "token"}
    base = AutoModelForCausalLM.from_pretrained(name, revision=revision, **access, **model_kwargs)
    if tokenizer is None and file_beside(adapter, "tokenizer_config.json", **where) is not None:
        tokenizer = AutoTokenizer.from_pretrained(str(adapter), **where)
    elif tokenizer is None:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, **access)
    _fit_embeddings(base, weights, len(tokenizer))
    try:
        model = PeftModel.from_pretrained(base, str(adapter), config=config, **where).eval()
    except KeyError as error:  # of `modules_to_save`
        raise ValueError(f"The weights of {str(adapter)!r} lack `{error.args[0]}`.") from error
    _check_complete(adapter, model, weights)
    return model, tokenizer


def load_calibration(adapter: str | Path, **where: Any) -> Calibration | None:
    """The calibration beside an adapter, if there is one; `where` as for `load_format`."""
    path = file_beside(adapter, CALIBRATION_FILE, **where)
    return None if path is None else Calibration.load(path)


def load_centroids(adapter: str | Path, **where: Any) -> TaskCentroids | None:
    """The centroids of the training tasks beside an adapter, if they are there."""
    path = file_beside(adapter, CENTROIDS_FILE, **where)
    return None if path is None else TaskCentroids.load(path)


def add_adapter(model: Any, tokenizer: Any, adapter: str | Path, name: str) -> None:
    """Put another adapter on a loaded model; the active one stays active.

    Args:
        model: The `PeftModel`.
        tokenizer: Its tokenizer.
        adapter: Hub id or folder of the adapter.
        name: Its name in the model.

    Raises:
        ValueError: It belongs to another base model or tokenizer, or weights of it are missing or
            not finite.
    """
    from peft import PeftConfig, load_peft_weights
    from transformers import AutoTokenizer

    own = PeftConfig.from_pretrained(str(adapter)).base_model_name_or_path
    first = next(iter(model.peft_config.values())).base_model_name_or_path
    if own != first:
        raise ValueError(
            f"{str(adapter)!r} was trained on `{own}`, but the loaded model is `{first}`. Load "
            "adapters of one base model together."
        )
    if file_beside(adapter, "tokenizer_config.json") is not None:
        vocabulary = AutoTokenizer.from_pretrained(str(adapter)).get_vocab()
        if vocabulary != tokenizer.get_vocab():
            raise ValueError(
                f"The tokenizer beside {str(adapter)!r} has other tokens than that of the loaded "
                "model. Load this adapter by itself."
            )
    weights = load_peft_weights(str(adapter), device="cpu")
    _check_finite(adapter, weights)
    model.load_adapter(str(adapter), adapter_name=name)
    _check_complete(adapter, model, weights, name)


def _check_finite(adapter: str | Path, weights: Mapping[str, torch.Tensor]) -> None:
    broken = [
        name
        for name, value in weights.items()
        if value.is_floating_point() and not bool(torch.isfinite(value.float()).all())
    ]
    if broken:
        raise ValueError(
            f"Weights of {str(adapter)!r} are NaN or infinite: {_listed(broken)}. Take a "
            "checkpoint from before the training diverged."
        )


def _fit_embeddings(base: Any, weights: Mapping[str, torch.Tensor], tokens: int) -> None:
    """Make the base model's embeddings as large as they were when the adapter was saved."""
    tables = {id(base.get_input_embeddings()), id(base.get_output_embeddings())}
    names = [name for name, module in base.named_modules() if id(module) in tables]
    saved = [
        value.shape[0]
        for key, value in weights.items()
        if any(key.endswith(f".{name}.weight") for name in names)
    ]
    rows = base.get_input_embeddings().weight.shape[0]
    wanted = saved[0] if saved else max(rows, tokens)  # tokens were added in training
    if wanted != rows:
        base.resize_token_embeddings(wanted)


def _check_complete(
    adapter: str | Path, model: Any, weights: Mapping[str, torch.Tensor], name: str = "default"
) -> None:
    """Refuse an adapter whose file does not fill every weight that saving it would write."""
    from peft import get_peft_model_state_dict

    wanted = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    if missing := sorted({*wanted} - {*weights}):
        unknown = sorted({*weights} - {*wanted})
        beside = f" It has others that fit nowhere: {_listed(unknown)}." if unknown else ""
        raise ValueError(
            f"The weights of {str(adapter)!r} lack {_listed(missing)}.{beside} Save the adapter "
            "again with `save_pretrained`."
        )


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(f"`{name}`" for name in names[:3]) + more
