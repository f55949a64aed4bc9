"""The settings of a task encoder, as they travel in `adapter_config.json`."""

from __future__ import annotations

import dataclasses
import os
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_type_hints


@dataclass(frozen=True, kw_only=True)
class TaskEncoderConfig:
    """Settings to build a task encoder again; saved with an adapter, the encoder's weights are not.

    Args:
        name_or_path: Hub id or folder of the encoder and its tokenizer; empty for a loaded model
            without a name.
        revision: Branch, tag or commit on the Hub. `None`: the default branch. A `TaskEncoder`
            records the commit that it loaded.
        pooling: How the last hidden states of a text's tokens, special tokens included, become one
            vector: their `"mean"` (the paper's), their `"max"`, or the `"cls"` (first) or `"last"`
            state.
        max_length: Window in tokens, special tokens included. `None`: the encoder's own.
        overflow: A longer text is read in overlapping chunks (`"chunk"`) or cut with a warning
            (`"truncate"`).
        stride: Tokens that neighbouring chunks share. `None`: an eighth of the window.
        text: The part of a prompt that callers give to the encoder: the whole `"prompt"` (the
            paper's) or the `"schema"`, the part before the input text.

    Raises:
        ValueError: If a field has a wrong type or value.
    """

    name_or_path: str = "Salesforce/codet5-base"
    revision: str | None = None
    pooling: Literal["mean", "max", "cls", "last"] = "mean"
    max_length: int | None = None
    overflow: Literal["chunk", "truncate"] = "chunk"
    stride: int | None = None
    text: Literal["prompt", "schema"] = "prompt"

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for name in ("pooling", "overflow", "text"):
            choices = get_args(hints[name])
            self._require(name, getattr(self, name) in choices, f"one of {list(choices)}")
        self._require("name_or_path", isinstance(self.name_or_path, str), "a string")
        named = self.revision is None or (isinstance(self.revision, str) and self.revision != "")
        self._require("revision", named, "a string that is not empty, or None")
        self._require("max_length", _counts(self.max_length, 1), "a positive integer or None")
        self._require("stride", _counts(self.stride, 0), "a non-negative integer or None")

    def _require(self, name: str, fulfilled: bool, allowed: str) -> None:
        if not fulfilled:
            found = reprlib.repr(getattr(self, name))
            raise ValueError(f"`{name}` of the task encoder must be {allowed}, got {found}.")

    def to_dict(self) -> dict[str, Any]:
        """The fields as a JSON-ready dict, for `from_dict`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TaskEncoderConfig:
        """Build a config from a dict; missing fields take their defaults.

        Raises:
            ValueError: If a key is no field, or a field has a wrong type or value.
        """
        fields = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(map(str, set(values) - set(fields)))
        if unknown:
            raise ValueError(
                f"The task encoder has no setting {unknown}. Its settings are {fields}."
            )
        return cls(**values)

    @classmethod
    def of(cls, value: Any) -> TaskEncoderConfig:
        """Build a config from a Hub id or folder, a dict of fields, or take a config as it is.

        Raises:
            ValueError: If the value is something else, or a field has a wrong type or value.
        """
        if isinstance(value, TaskEncoderConfig):
            return value
        if isinstance(value, Mapping):
            return cls.from_dict(value)
        if isinstance(value, str | os.PathLike) and os.fspath(value):
            return cls(name_or_path=os.fspath(value))
        raise ValueError(
            "`task_encoder` must be a Hub id, a folder, a `TaskEncoderConfig` or its dict, "
            f"got {reprlib.repr(value)}. Of a loaded encoder, pass its `config`."
        )


def _counts(value: object, least: int) -> bool:
    """Whether a value is None or an integer of at least `least`."""
    return value is None or (type(value) is int and value >= least)
