"""The task encoder: texts in, one frozen float32 vector a text out.

It knows tokenizers, encoder models, windows, pooling and caching. It knows nothing of experts, routers or
PEFT: how a vector is scaled against the token states is the router's business, and which text describes a
task (`TaskEncoderConfig.text`) is the caller's.

`transformers` is imported when an encoder is built, not before, which keeps `import peft_taskmoe` cheap.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import threading
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args, get_type_hints

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Tokens, where neither the model nor its tokenizer states a limit (T5's positions are relative).
UNKNOWN_WINDOW = 512
# A tokenizer's `model_max_length` above this means "not known"; transformers writes 1e30.
NO_LIMIT = 1_000_000
# Tokens to which shorter batches are padded. Products with fewer rows take other paths in the BLAS libraries,
# and the text's vector then depends on its company by 1e-6 instead of 4e-7 (MiniLM, entries up to 2.6).
SHORTEST_BATCH = 16


@dataclass(frozen=True, kw_only=True)
class TaskEncoderConfig:
    """How to build the same task encoder again; travels in `adapter_config.json`, the weights never do.

    Args:
        name_or_path: Hub id or folder of the encoder model with its tokenizer.
        revision: Branch, tag or commit on the Hub. `None`: the default branch; a `TaskEncoder` then records
            the commit it found here, so that a saved adapter names exactly the weights it was trained with.
        pooling: What becomes of the last hidden states of a text's N tokens, special tokens included: their
            `"mean"` (the paper's), their element-wise `"max"`, or the state of the first (`"cls"`) or of the
            last (`"last"`) token.
        max_length: Tokens the encoder reads at once, special tokens included. `None`: the encoder's own
            window.
        overflow: A longer text is read in overlapping chunks (`"chunk"`) or cut with a warning
            (`"truncate"`).
        stride: Tokens that neighbouring chunks share. `None`: an eighth of the window.
        text: What the encoder is to read: the whole `"prompt"` (the paper's task-aware variant) or only the
            `"schema"`, the part before the input text. The encoder reads what it is given; those who call it
            follow this field.

    Raises:
        ValueError: For a value that is not among those above.
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
            value, allowed = getattr(self, name), get_args(hints[name])
            if value not in allowed:
                raise ValueError(
                    f"`{name}` is {value!r}, which the task encoder does not know. "
                    f"Use one of {list(allowed)}."
                )
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(
                f"`max_length` is {self.max_length}: a chunk needs at least one token. "
                "Leave it `None` or raise it."
            )
        if self.stride is not None and self.stride < 0:
            raise ValueError(
                f"`stride` is {self.stride}, but chunks cannot share fewer than 0 tokens. "
                "Leave it `None` or raise it."
            )

    def to_dict(self) -> dict[str, Any]:
        """The fields as a JSON-ready dict; `from_dict` gives the same config back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TaskEncoderConfig:
        """Build a config from a dict such as `to_dict` returns; fields that are missing take their default.

        Raises:
            ValueError: For a key that is no field.
        """
        fields = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(values) - set(fields))
        if unknown:
            raise ValueError(
                f"The task encoder has no setting {unknown}. Its settings are {fields}."
            )
        return cls(**values)


class CacheInfo(NamedTuple):
    """Texts answered from the cache, texts encoded, and the vectors the cache may hold and holds."""

    hits: int
    misses: int
    maxsize: int
    currsize: int


class _Chunk(NamedTuple):
    """Tokens read at once: ids, the weight of each token's state in its text's vector, the text's number."""

    ids: list[int]
    weights: list[float]
    text: int


class TaskEncoder:
    """Frozen encoder from texts to task embeddings `(b, task_dim)`, float32, cached by content.

    A text of N tokens that fits the window gives one state `h_i` a token; `pooling="mean"` is `1/N sum_i
    h_i`. A longer one is read in K overlapping chunks, each with the tokenizer's special tokens around it.
    Every token of the text still counts once: with `C_i` the chunks that contain token i (all K for a special
    token), its state is the mean over them,

        h_i = 1/|C_i| sum_{c in C_i} h_{c,i}        e = 1/N sum_i h_i    (`"cls"`: h_1, `"last"`: h_N)

    and `"max"` is the element-wise maximum over all tokens of all chunks. Padding never counts, so a vector
    does not depend on the texts it shared a batch with (to float32 rounding, about 1e-7; with a
    half-precision `dtype`, to its rounding).

    An empty text gives the vector of the tokenizer's special tokens.

    The encoder is no `nn.Module`: assigned to a model it adds no parameters to it. Its weights ask for no
    gradient, it stays in eval mode, and it computes outside autograd, autocast and inference mode, whatever
    surrounds the call: a cached vector is the same everywhere and may be multiplied by trainable weights.
    Code in a model's repository is never run.

    Args:
        model: Hub id or folder of any encoder that `AutoModel` loads; of encoder-decoders (T5, CodeT5) the
            encoder half is used. Or a loaded model, which is frozen in place and needs its `tokenizer`.
        tokenizer: The tokenizer of a loaded model; by default that of the Hub id or folder.
        device: Where the encoder runs. `None`: the CPU, or where a loaded model is.
        dtype: Precision it runs in. `None`: float32, or what a loaded model has.
        batch_size: Chunks that are read at once.
        cache_size: Vectors kept, the least recently used goes first; 0 keeps none. 10,000 of 768 numbers are
            31 MB.
        settings: The fields of `TaskEncoderConfig` but `name_or_path`.

    Raises:
        OSError: If the encoder is not there or cannot be reached.
        ValueError: If its repository wants to run code, its checkpoint lacks weights, or the settings do not
            fit it.

    Source: the embedding of Guo et al., ECAI 2025 (frozen CodeT5 encoder, mean over the last hidden states),
    without padding in the mean and without the cut at 512 tokens.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | PreTrainedModel = "Salesforce/codet5-base",
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        batch_size: int = 32,
        cache_size: int = 10_000,
        **settings: Any,
    ) -> None:
        if batch_size < 1 or cache_size < 0:
            raise ValueError(
                "`batch_size` must be at least 1 and `cache_size` at least 0, "
                f"found {batch_size} and {cache_size}."
            )
        if isinstance(model, nn.Module):
            if tokenizer is None:
                raise ValueError(
                    "A loaded model was given without its `tokenizer`. "
                    "Call `TaskEncoder(model, tokenizer=tokenizer)`."
                )
            self.config = TaskEncoderConfig.from_dict(
                {"name_or_path": model.name_or_path, **settings}
            )
            whole: Any = model
            encoder = whole.get_encoder() if whole.config.is_encoder_decoder else whole
        else:
            self.config = TaskEncoderConfig.from_dict(
                {"name_or_path": os.fspath(model), **settings}
            )
            encoder, found, commit = _load(self.config, dtype or torch.float32)
            tokenizer = tokenizer or found
            self.config = dataclasses.replace(self.config, revision=self.config.revision or commit)
        self.model: Any = encoder.eval().requires_grad_(False).to(device=device, dtype=dtype)
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self._cache_size = cache_size
        self._cache: OrderedDict[bytes, torch.Tensor] = OrderedDict()
        self._hits = self._misses = 0
        self._lock = threading.Lock()
        self._warned = False
        self._fingerprint: str | None = None

        self._prefix, self._suffix = _special_tokens(tokenizer)
        self.window = _window(self.config.max_length, self.model, tokenizer)
        self._body = (
            self.window - len(self._prefix) - len(self._suffix)
        )  # tokens of the text in one chunk
        self._stride = self.window // 8 if self.config.stride is None else self.config.stride
        if self._stride >= self._body:
            raise ValueError(
                f"Chunks of {self.window} tokens hold {max(self._body, 0)} of the text beside the special tokens "
                f"and cannot share {self._stride} of them. Lower `stride` or raise `max_length`."
            )

    @classmethod
    def from_config(cls, config: TaskEncoderConfig, **kwargs: Any) -> TaskEncoder:
        """Build the encoder that `config` describes; `kwargs` are the other arguments of `TaskEncoder`."""
        settings = config.to_dict()
        return cls(settings.pop("name_or_path"), **kwargs, **settings)

    @property
    def task_dim(self) -> int:
        """Numbers in a task embedding."""
        return int(self.model.config.hidden_size)

    @property
    def device(self) -> torch.device:
        """Where the encoder runs."""
        return next(self.model.parameters()).device

    def to(self, device: str | torch.device) -> TaskEncoder:
        """Move the encoder, and return it."""
        self.model.to(device)
        return self

    def __call__(
        self, texts: str | Sequence[str], *, device: str | torch.device | None = None
    ) -> torch.Tensor:
        """Encode texts; equal ones and those in the cache cost no forward pass.

        Args:
            texts: One text or a sequence of b texts.
            device: Where the result goes; the CPU by default.

        Returns:
            `(b, task_dim)`, float32; `(1, task_dim)` for one text. A copy: changing it leaves the cache
            alone.

        Raises:
            TypeError: If something else than a text is among them.
            ValueError: If a text has no token, which only an empty one has, and only where the tokenizer adds
                none.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise TypeError(
                    f"Text {i} is {text!r} ({type(text).__name__}), but the task encoder reads `str`. "
                    "Pass the prompts as texts."
                )
        keys = [
            hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
            for text in texts
        ]
        found: dict[bytes, torch.Tensor] = {}
        with self._lock:
            for key in keys:
                if key in self._cache:
                    self._cache.move_to_end(key)
                    found[key] = self._cache[key]
        new = {key: text for key, text in zip(keys, texts, strict=True) if key not in found}
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            torch.autocast(self.device.type, enabled=False),
        ):
            found.update(zip(new, self._encode(list(new.values())), strict=True))
            vectors = (
                torch.stack([found[key] for key in keys]) if keys else torch.empty(0, self.task_dim)
            )
            vectors = vectors.to(device)
        with self._lock:
            self._hits += len(texts) - len(new)
            self._misses += len(new)
            self._cache.update((key, found[key]) for key in new)
            while len(self._cache) > self._cache_size:
                self._cache.popitem(last=False)
        return vectors

    def encode_dataset(
        self,
        dataset: Any,
        column: str = "task_text",
        output_column: str = "task_embeds",
        *,
        batch_size: int = 1000,
    ) -> Any:
        """Add a column with the embedding of every row's text, so that training reads it and runs no encoder.

        Built on `datasets.map`, whose cache it keeps valid: the same data and an encoder of the same
        `fingerprint` are not encoded again.

            dataset = encoder.encode_dataset(dataset, column="prompt")
            trainer = SFTTrainer(..., train_dataset=dataset, data_collator=TaskCollator(collator))

        Args:
            dataset: A `datasets.Dataset`, or a `DatasetDict` of them, each of which is encoded.
            column: The column with the texts.
            output_column: The column to write, `task_dim` float32 numbers a row.
            batch_size: Rows that are encoded together, sorted by length among themselves.

        Returns:
            The data with the new column.

        Raises:
            ValueError: If there is no column of that name.
        """
        from datasets import Dataset, DatasetDict
        from datasets.fingerprint import Hasher

        if isinstance(dataset, DatasetDict):
            splits = {
                name: self.encode_dataset(split, column, output_column, batch_size=batch_size)
                for name, split in dataset.items()
            }
            return DatasetDict(splits)
        if not isinstance(dataset, Dataset):
            raise TypeError(
                f"`encode_dataset` got a {type(dataset).__name__}; it encodes a `datasets.Dataset` or a "
                "`DatasetDict`. Call the encoder on other data yourself: `encoder(texts)`."
            )
        if column not in dataset.column_names:
            raise ValueError(
                f"The data has no column `{column}` to encode (columns: {dataset.column_names}). "
                "Pass `column=` with the one that holds the texts."
            )
        return dataset.map(
            lambda texts: {output_column: self(texts).numpy()},
            batched=True,
            batch_size=batch_size,
            input_columns=column,
            new_fingerprint=Hasher.hash(
                [dataset._fingerprint, self.fingerprint(), column, output_column]
            ),
            desc="Encoding tasks",
        )

    def cache_info(self) -> CacheInfo:
        """What the cache did and holds."""
        with self._lock:
            return CacheInfo(self._hits, self._misses, self._cache_size, len(self._cache))

    def clear_cache(self) -> None:
        """Forget every vector, and the counts."""
        with self._lock:
            self._cache.clear()
            self._hits = self._misses = 0

    def fingerprint(self) -> str:
        """Hash of all that a vector depends on: weights, tokenizer, window, pooling; not the name or place."""
        if self._fingerprint is None:
            backend = getattr(self.tokenizer, "backend_tokenizer", None)
            words = (
                backend.to_str()
                if backend is not None
                else json.dumps(self.tokenizer.get_vocab(), sort_keys=True)
            )
            model_config = self.model.config.to_dict()
            for place in ("_name_or_path", "transformers_version", "architectures"):
                model_config.pop(place, None)
            settings = {
                "model": type(self.model).__name__,
                "pooling": self.config.pooling,
                "overflow": self.config.overflow,
                "window": self.window,
                "stride": self._stride,
                "special tokens": (self._prefix, self._suffix),
            }
            digest = hashlib.blake2b(digest_size=16)
            digest.update(
                json.dumps([settings, model_config, words], sort_keys=True, default=str).encode()
            )
            for name, weight in self.model.state_dict().items():
                if "pooler" not in name:  # not used, and often random: many checkpoints have none
                    digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
                    digest.update(
                        weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
                    )
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def __repr__(self) -> str:
        name = self.config.name_or_path
        return f"TaskEncoder({name!r}, task_dim={self.task_dim}, window={self.window}, device='{self.device}')"

    def __getstate__(self) -> dict[str, Any]:
        """A copy in another process starts with an empty cache and a lock of its own."""
        return {**self.__dict__, "_lock": None, "_cache": OrderedDict(), "_hits": 0, "_misses": 0}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def _encode(self, texts: list[str]) -> list[torch.Tensor]:
        """The vectors of `texts`, each `(task_dim,)`, float32 on the CPU, chunks of similar length together."""
        chunks = sorted(
            (
                chunk
                for i, ids in enumerate(self._tokenize(texts))
                for chunk in self._chunks(ids, i)
            ),
            key=lambda c: len(c.ids),
        )
        largest = self.config.pooling == "max"
        vectors = torch.full((len(texts), self.task_dim), -torch.inf if largest else 0.0)
        for start in range(0, len(chunks), self.batch_size):
            batch = chunks[start : start + self.batch_size]
            longest = max(len(batch[-1].ids), min(SHORTEST_BATCH, self.window))
            # Padding stands on the right and is masked, so any id will do.
            ids = torch.tensor(
                [c.ids + [0] * (longest - len(c.ids)) for c in batch], device=self.device
            )
            weights = torch.tensor(
                [c.weights + [0.0] * (longest - len(c.ids)) for c in batch], device=self.device
            )
            lengths = torch.tensor([len(c.ids) for c in batch], device=self.device)
            mask = torch.arange(longest, device=self.device) < lengths[:, None]  # (chunks, tokens)
            hidden = self.model(input_ids=ids, attention_mask=mask.long()).last_hidden_state.float()
            owner = torch.tensor([c.text for c in batch])
            if largest:
                pooled = hidden.masked_fill(~mask[..., None], -torch.inf).amax(1).cpu()
                vectors.scatter_reduce_(0, owner[:, None].expand_as(pooled), pooled, "amax")
            else:
                pooled = (weights[:, None] @ hidden)[:, 0].cpu()
                vectors.index_add_(0, owner, pooled)
        # Rows of their own: one that stays in the cache must not keep the others alive.
        return [vector.clone() for vector in vectors]

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        """The tokens of every text, without special ones; cut, with one warning, where the config says so."""
        if not texts:
            return []
        with self._lock:  # a fast tokenizer is no place for two threads
            tokens = self.tokenizer(
                texts, add_special_tokens=False, padding=False, truncation=False, verbose=False
            )["input_ids"]
        if self.config.overflow == "truncate":
            longest = max(map(len, tokens))
            if longest > self._body and not self._warned:
                self._warned = True
                warnings.warn(
                    f"A task text has {longest} tokens, but the encoder `{self.config.name_or_path}` reads {self._body} at "
                    'once and `overflow="truncate"` drops the rest, here and in later texts. '
                    'Use `overflow="chunk"` to read all of it.',
                    UserWarning,
                    stacklevel=4,
                )
            tokens = [ids[: self._body] for ids in tokens]
        return tokens

    def _chunks(self, ids: list[int], text: int) -> Iterator[_Chunk]:
        """Overlapping chunks of one text, with the weights that make every token of the text count once."""
        starts = [0]
        while starts[-1] + self._body < len(ids):
            starts.append(starts[-1] + self._body - self._stride)
        bodies = [ids[start : start + self._body] for start in starts]
        seen = [0] * len(ids)  # chunks that contain a token
        for start, body in zip(starts, bodies, strict=True):
            for i in range(start, start + len(body)):
                seen[i] += 1
        prefix, suffix = self._prefix, self._suffix
        shares = [1 / n for n in [len(starts)] * len(prefix) + seen + [len(starts)] * len(suffix)]
        if not shares:
            raise ValueError(
                "The task text is empty and the tokenizer adds no special tokens, so there is nothing to encode. "
                "Pass a text."
            )
        if self.config.pooling == "mean":
            shares = [share / len(shares) for share in shares]
        elif self.config.pooling == "cls":
            shares[1:] = [0.0] * (len(shares) - 1)
        elif self.config.pooling == "last":
            shares[:-1] = [0.0] * (len(shares) - 1)
        before, after = shares[: len(prefix)], shares[len(prefix) + len(ids) :]
        for start, body in zip(starts, bodies, strict=True):
            inside = shares[len(prefix) + start : len(prefix) + start + len(body)]
            yield _Chunk(prefix + body + suffix, before + inside + after, text)


def _load(
    config: TaskEncoderConfig, dtype: torch.dtype
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str | None]:
    """Load an encoder and its tokenizer, all of one commit, without running any code of its repository.

    Returns:
        The model, of encoder-decoders the encoder half; the tokenizer; the commit, `None` for a folder.

    Raises:
        OSError: If something is missing or out of reach.
        ValueError: If the repository wants to run code, or its checkpoint does not hold the encoder's
            weights.
    """
    from huggingface_hub import hf_hub_download
    from transformers import (
        AutoConfig,
        AutoModel,
        AutoModelForTextEncoding,
        AutoTokenizer,
        PreTrainedConfig,
    )
    from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    name = config.name_or_path
    folder = Path(name).is_dir()
    try:
        commit = None
        if not folder:  # the cache keeps a file of commit C in `snapshots/C/`
            commit = Path(
                hf_hub_download(name, "config.json", revision=config.revision)
            ).parent.name
        elif not Path(name, "config.json").is_file():
            raise FileNotFoundError("There is no config.json.")
        place = {} if commit is None else {"revision": commit}
        settings = {
            "config.json": PreTrainedConfig.get_config_dict(name, **place)[0],
            "tokenizer_config.json": get_tokenizer_config(name, **place),
        }
        code = [file for file, values in settings.items() if "auto_map" in values]
        if not code:
            model_config = AutoConfig.from_pretrained(name, trust_remote_code=False, **place)
            halves = model_config.is_encoder_decoder
            encoder_only = halves and type(model_config) in MODEL_FOR_TEXT_ENCODING_MAPPING
            loader = AutoModelForTextEncoding if encoder_only else AutoModel
            model, report = loader.from_pretrained(
                name, trust_remote_code=False, dtype=dtype, output_loading_info=True, **place
            )
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, **place)
            if len(set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens)) < 2:
                # What transformers makes of a folder that has none of the tokenizer's files.
                raise FileNotFoundError("The tokenizer has no vocabulary.")
    except (OSError, ValueError) as error:
        found = (
            f"a folder with {sorted(os.listdir(name))}"
            if folder
            else "no such folder, nor can the Hub give it"
        )
        at = f" (revision `{config.revision}`)" if config.revision else ""
        raise OSError(
            f"The task encoder `{name}`{at} cannot be loaded: found {found}. Pass the path of a folder with config.json, "
            "model.safetensors and the tokenizer's files, or a Hub id that this machine can reach or has "
            f"cached. The cause: {error}"
        ) from error
    if code:
        raise ValueError(
            f"The task encoder `{name}` wants code from its repository to be run (`auto_map` in its {code[0]}), "
            "which never happens here. Use an encoder that transformers knows itself, or load this one as you "
            "see fit and pass `TaskEncoder(model, tokenizer=tokenizer)`."
        )
    missing = sorted(key for key in report["missing_keys"] if "pooler" not in key)
    if missing:
        raise ValueError(
            f"The checkpoint of the task encoder `{name}` lacks {len(missing)} weights (`{missing[0]}`, ...), "
            f"which would stay random. Pass a checkpoint of a {type(model).__name__}."
        )
    return (model.get_encoder() if halves and not encoder_only else model), tokenizer, commit


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The tokens that `tokenizer` puts before and after a text."""
    body = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(body) + 1):
        if whole[start : start + len(body)] == body:
            return whole[:start], whole[start + len(body) :]
    raise ValueError(
        f"The {type(tokenizer).__name__} gives the tokens {body} for `a` and {whole} with special tokens, so these "
        "do not stand around the text and texts cannot be cut into chunks. Use another encoder."
    )


def _window(max_length: int | None, model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens the encoder reads at once: `max_length`, or the least of the limits that model and tokenizer state.

    Raises:
        ValueError: If `max_length` is more than the model has positions for.
    """
    config: Any = model.config
    positions = getattr(
        config, "max_position_embeddings", None
    )  # T5 has none: its positions are relative
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            if positions is not None and module.padding_idx is not None:
                positions -= module.padding_idx + 1  # RoBERTa and its kin count from there
            break
    if max_length is not None:
        if positions and max_length > positions:
            raise ValueError(
                f"`max_length` is {max_length}, but the task encoder has {positions} positions. "
                "Use at most that, or `None`."
            )
        return max_length
    stated = [
        limit
        for limit in (tokenizer.model_max_length, positions or getattr(config, "n_positions", None))
        if limit and limit < NO_LIMIT
    ]
    return int(min(stated, default=UNKNOWN_WINDOW))
