"""Turns texts into task embeddings with a frozen encoder, pooled and cached."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import threading
import warnings
import weakref
from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from .cache import LRUCache
from .encoder_chunks import Chunk, Chunker
from .encoder_config import TaskEncoderConfig
from .encoder_loading import load_encoder, width_of
from .optional import needed
from .prompts import task_texts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Tokens to which shorter batches are padded. Products with fewer rows take other paths in the BLAS
# libraries, and a vector then depends on its batch by 1e-6 instead of 4e-7 (MiniLM).
SHORTEST_BATCH = 16


class CacheInfo(NamedTuple):
    """Texts found in the cache, texts encoded, vectors that the cache can hold and holds."""

    hits: int
    misses: int
    maxsize: int
    currsize: int


class TaskEncoder:
    """A frozen encoder from texts to task embeddings `(b, task_dim)`, float32 and cached.

    The vector of a text of N tokens is `e = 1/N sum_i h_i`, the mean of its last hidden states
    (`pooling="mean"`). A text longer than the window is read in overlapping chunks, each with the
    special tokens. The state of token i is then its mean over the chunks `C_i` that contain it, so
    that every token counts once:

        h_i = 1/|C_i| sum_{c in C_i} h_{c,i}        (`"cls"`: e = h_1, `"last"`: e = h_N)

    `"max"` is the element-wise maximum over all tokens of all chunks. Padding never counts: a
    vector does not depend on its batch, up to rounding (float32: about 1e-7).

    The encoder is no `nn.Module`: a model that holds it gets no parameters from it. It runs in eval
    mode, outside autograd, autocast and inference mode. Threads may share it and encode new texts
    one after another; forks and copies start with an empty cache.

    Args:
        model: Hub id or folder of any encoder that `AutoModel` loads without code of its own (of an
            encoder-decoder, the encoder half is used), or a loaded model, which is frozen in place.
        tokenizer: Required for a loaded model, else that of the Hub id or folder.
        device: Where the encoder runs. `None`: the CPU, or where a loaded model is.
        dtype: Precision it runs in. `None`: float32, or that of a loaded model.
        batch_size: Chunks read at once.
        cache_size: Vectors kept, least recently used go first. 10,000 of 768 numbers are 31 MB.
        settings: The fields of `TaskEncoderConfig` except `name_or_path`.

    Raises:
        OSError: If the encoder is missing, broken or out of reach.
        ValueError: If its repository wants to run code, its checkpoint lacks weights or has NaN or
            infinite ones, or the settings do not fit it.

    Source: Guo et al., ECAI 2025 (frozen CodeT5 encoder, mean of the last hidden states); here
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
                f"got {batch_size} and {cache_size}."
            )
        loaded: Any = model if isinstance(model, nn.Module) else None
        name = os.fspath(model) if loaded is None else loaded.name_or_path
        self.config = TaskEncoderConfig.from_dict({"name_or_path": name, **settings})
        if loaded is None:
            encoder, found, commit = load_encoder(self.config, dtype or torch.float32)
            tokenizer = tokenizer or found
            self.config = dataclasses.replace(self.config, revision=self.config.revision or commit)
        else:
            encoder = loaded.get_encoder() if loaded.config.is_encoder_decoder else loaded
        if tokenizer is None:
            raise ValueError(
                "A loaded model needs its tokenizer, got none. "
                "Call `TaskEncoder(model, tokenizer=tokenizer)`."
            )
        self.model: Any = encoder.eval().requires_grad_(False).to(device=device, dtype=dtype)
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self._cache_size = cache_size
        vector_bytes = self.task_dim * torch.float32.itemsize
        self._cache = LRUCache[bytes, torch.Tensor](cache_size * vector_bytes, _bytes_held)
        self._hits = self._misses = 0
        self._warned = False
        self._fingerprint: str | None = None
        self._renew_locks()
        self._chunker = Chunker(self.config, self.model, tokenizer)

    @classmethod
    def from_config(cls, config: TaskEncoderConfig, **kwargs: Any) -> TaskEncoder:
        """Build the encoder that `config` describes; `kwargs` are other arguments of the class."""
        settings = config.to_dict()
        return cls(settings.pop("name_or_path"), **kwargs, **settings)

    @property
    def task_dim(self) -> int:
        """Numbers in a task embedding."""
        return width_of(self.model.config)

    @property
    def window(self) -> int:
        """Tokens read at once, special tokens included."""
        return self._chunker.window

    @property
    def device(self) -> torch.device:
        """Where the encoder runs."""
        return next(self.model.parameters()).device

    def to(self, device: str | torch.device) -> TaskEncoder:
        """Move the encoder when running calls are done, and return it. Cheap if it is there."""
        if torch.device(device) != self.device:
            with self._lock:
                self.model.to(device)
        return self

    def __call__(
        self, texts: str | Sequence[str], *, device: str | torch.device | None = None
    ) -> torch.Tensor:
        """Encode texts; equal ones and cached ones cost no forward pass.

        Args:
            texts: One text or a sequence of b texts.
            device: Where the result goes; the CPU by default.

        Returns:
            `(b, task_dim)`, float32; `(1, task_dim)` for one text. A copy of what is cached.

        Raises:
            TypeError: If one of the texts is no `str`.
            ValueError: If a text has no token (an empty one, where the tokenizer adds none), or a
                vector has NaN or infinite numbers.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise TypeError(
                    f"The task encoder reads `str`, but text {i} is {text!r} "
                    f"({type(text).__name__}). Pass the prompts as texts."
                )
        keys = [
            hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
            for text in texts
        ]
        with torch.inference_mode(False), torch.no_grad():
            found, new = self._vectors(dict(zip(keys, texts, strict=True)))
            rows = [found[key] for key in keys]
            vectors = (torch.stack(rows) if rows else torch.empty(0, self.task_dim)).to(device)
        with self._count_lock:
            self._hits += len(texts) - new
            self._misses += new
        return vectors

    def encode_dataset(
        self,
        dataset: Any,
        column: str = "task_text",
        output_column: str = "task_embeds",
        *,
        batch_size: int = 1000,
    ) -> Any:
        """Add a column with the embedding of every row's text, so that training runs no encoder.

        With `text="schema"`, of a prompt of `peft_taskmoe.uie` the part before the text is read,
        and all of any other text.

        The same data and an encoder of the same `fingerprint` are not encoded again.

            dataset = encoder.encode_dataset(dataset, column="prompt")
            trainer = SFTTrainer(..., train_dataset=dataset, data_collator=TaskCollator(collator))

        Args:
            dataset: A `datasets.Dataset`, or a `DatasetDict`, of which every split is encoded.
            column: The column with the texts.
            output_column: The column to write, `task_dim` float32 numbers a row.
            batch_size: Rows encoded together.

        Raises:
            TypeError: If the data is something else.
            ValueError: If there is no column of that name.
        """
        needed("datasets", "train")
        from datasets import Dataset, DatasetDict
        from datasets.fingerprint import Hasher

        if isinstance(dataset, DatasetDict):
            encode = partial(self.encode_dataset, batch_size=batch_size)
            splits = dataset.items()
            return DatasetDict({k: encode(data, column, output_column) for k, data in splits})
        if not isinstance(dataset, Dataset):
            raise TypeError(
                f"`dataset` must be a `datasets.Dataset` or `DatasetDict`, got a "
                f"{type(dataset).__name__}. Encode other data yourself: `encoder(texts)`."
            )
        if column not in dataset.column_names:
            raise ValueError(
                f"The data has no column `{column}` (columns: {dataset.column_names}). "
                "Pass `column=` with the one that holds the texts."
            )
        made_from = [
            *(dataset._fingerprint, self.fingerprint(), self.config.text),
            *(column, output_column),
        ]
        return dataset.map(
            lambda texts: {output_column: self(task_texts(texts, self.config.text)).numpy()},
            batched=True,
            batch_size=batch_size,
            input_columns=column,
            new_fingerprint=Hasher.hash(made_from),
            desc="Encoding tasks",
        )

    def cache_info(self) -> CacheInfo:
        """What the cache did and holds."""
        with self._count_lock:
            return CacheInfo(self._hits, self._misses, self._cache_size, len(self._cache))

    def clear_cache(self) -> None:
        """Forget every vector, and the counts."""
        with self._count_lock:
            self._cache.clear()
            self._hits = self._misses = 0

    def fingerprint(self) -> str:
        """Hash of what a vector depends on: weights, tokenizer, window, pooling; not the name."""
        if self._fingerprint is None:
            backend = getattr(self.tokenizer, "backend_tokenizer", None)
            vocab = self.tokenizer.get_vocab
            words = backend.to_str() if backend else json.dumps(vocab(), sort_keys=True)
            model_config = self.model.config.to_dict()
            for place in ("_name_or_path", "transformers_version", "architectures"):
                model_config.pop(place, None)
            settings = {
                "model": type(self.model).__name__,
                "pooling": self.config.pooling,
                "overflow": self.config.overflow,
                "window": self.window,
                "stride": self._chunker.stride,
                "special tokens": (self._chunker.prefix, self._chunker.suffix),
            }
            everything = json.dumps([settings, model_config, words], sort_keys=True, default=str)
            digest = hashlib.blake2b(everything.encode(), digest_size=16)
            for name, weight in self.model.state_dict().items():
                if "pooler" not in name:  # not used, and often random: many checkpoints have none
                    digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
                    raw = weight.detach().cpu().contiguous().flatten().view(torch.uint8)
                    digest.update(raw.numpy().data)
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def __repr__(self) -> str:
        numbers = f"task_dim={self.task_dim}, window={self.window}, device='{self.device}'"
        return f"TaskEncoder({self.config.name_or_path!r}, {numbers})"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lock": None, "_count_lock": None, "_hits": 0, "_misses": 0}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._renew_locks()

    def _renew_locks(self) -> None:
        self._lock = threading.Lock()  # of the tokenizer and the model
        self._count_lock = threading.Lock()
        _ENCODERS.add(self)

    def _vectors(self, texts: dict[bytes, str]) -> tuple[dict[bytes, torch.Tensor], int]:
        """The vector of every text by its key, and how many of them were encoded for it."""
        found = self._cached(texts)
        if len(found) == len(texts):
            return found, 0
        with self._lock:
            found = self._cached(texts)  # another thread may have encoded some in the meantime
            new = [key for key in texts if key not in found]
            for key, vector in zip(new, self._encode([texts[key] for key in new]), strict=True):
                found[key] = vector
                self._cache.put(key, vector)
        return found, len(new)

    def _cached(self, keys: Iterable[bytes]) -> dict[bytes, torch.Tensor]:
        return {key: vector for key in keys if (vector := self._cache.get(key)) is not None}

    def _encode(self, texts: list[str]) -> list[torch.Tensor]:
        """The vectors `(task_dim,)` of texts, float32 on the CPU; the lock must be held."""
        tokens = enumerate(self._tokenize(texts))
        chunks = [chunk for i, ids in tokens for chunk in self._chunker.cut(ids, i)]
        chunks.sort(key=lambda chunk: len(chunk.ids))
        largest = self.config.pooling == "max"
        vectors = torch.full((len(texts), self.task_dim), -torch.inf if largest else 0.0)
        for start in range(0, len(chunks), self.batch_size):
            batch = chunks[start : start + self.batch_size]
            pooled = self._pool(batch, largest)
            owner = torch.tensor([chunk.text for chunk in batch])
            if largest:
                vectors.scatter_reduce_(0, owner[:, None].expand_as(pooled), pooled, "amax")
            else:
                vectors.index_add_(0, owner, pooled)
        if not vectors.isfinite().all():
            raise ValueError(
                f"The task encoder `{self.config.name_or_path}` gives NaN or infinite numbers. "
                f"Check its weights, or a wider `dtype` than {self.model.dtype}."
            )
        # Rows of their own: one that stays in the cache must not keep the others alive.
        return [vector.clone() for vector in vectors]

    def _pool(self, batch: list[Chunk], largest: bool) -> torch.Tensor:
        """Each chunk's weighted sum of hidden states, or their maximum: (chunks, task_dim)."""
        longest = max(len(batch[-1].ids), min(SHORTEST_BATCH, self.window))
        # Padding stands on the right and is masked, so any id will do.
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        weights, mask = torch.zeros(ids.shape), torch.zeros_like(ids)
        for i, chunk in enumerate(batch):
            n = len(chunk.ids)
            ids[i, :n], weights[i, :n] = torch.tensor(chunk.ids), torch.tensor(chunk.weights)
            mask[i, :n] = 1
        ids, weights, mask = (tensor.to(self.device) for tensor in (ids, weights, mask))
        with torch.autocast(self.device.type, enabled=False):
            hidden = self.model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
            if largest:
                return hidden.masked_fill(mask[..., None] == 0, -torch.inf).amax(1).cpu()
            return (weights[:, None] @ hidden)[:, 0].cpu()

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        """The tokens of texts without special ones; cut, with one warning, if so configured."""
        if not texts:
            return []
        tokens = self.tokenizer(
            texts, add_special_tokens=False, padding=False, truncation=False, verbose=False
        )["input_ids"]
        if self.config.overflow == "chunk":
            return tokens
        longest, body = max(map(len, tokens)), self._chunker.body
        if longest > body and not self._warned:
            self._warned = True
            warnings.warn(
                f"A task text has {longest} tokens, but the encoder `{self.config.name_or_path}` "
                f'reads {body} at once and `overflow="truncate"` drops the rest, here and in later '
                'texts. Use `overflow="chunk"` to read all of it.',
                UserWarning,
                stacklevel=5,  # the caller of the encoder
            )
        return [ids[:body] for ids in tokens]


def _bytes_held(key: bytes, vector: torch.Tensor) -> int:
    return vector.untyped_storage().nbytes()


_ENCODERS: weakref.WeakSet[TaskEncoder] = weakref.WeakSet()


def _after_fork() -> None:
    """A lock that another thread held when the process was forked would never be released."""
    for encoder in list(_ENCODERS):
        encoder._renew_locks()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
