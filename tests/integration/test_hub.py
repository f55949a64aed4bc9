"""Adapters over the Hub: push, load in a fresh process, revisions, subfolders, failed uploads.

The client is the real one, the Hub is `loopback_hub.py`. The client reads its settings when it is
imported, so a publisher and a reader are processes of their own.
"""

import itertools
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, ParamSpec, TypeVar
from unittest import mock

import pytest
import safetensors.torch
import torch
from huggingface_hub import HfApi
from peft import PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from loopback_hub import LoopbackHub
from peft_taskmoe import TaskEncoder, TaskMoELoraConfig, attach_task_encoder

P = ParamSpec("P")
T = TypeVar("T")

pytestmark = pytest.mark.slow  # processes of its own

TOKEN = "hf_test"
ADAPTER_FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
TASK_DIM = 16
BOTH_ADAPTERS = ("default", "second")
ATTEMPTS = 6  # of the client, before it gives up on a request that ends in 500


# What runs in the other processes


@dataclass(frozen=True)
class Failed:
    """An exception in another process, and what caused it: types and messages, outermost first."""

    chain: tuple[tuple[str, str], ...]


def _failed(error: BaseException | None) -> Failed:
    chain = []
    while error is not None:
        chain.append((type(error).__name__, str(error)))
        error = error.__cause__ or error.__context__
    return Failed(tuple(chain))


def _config() -> TaskMoELoraConfig:
    return TaskMoELoraConfig(task_type="CAUSAL_LM", task_dim=TASK_DIM)


def _model(base: Path, seed: int, adapters: tuple[str, ...] = ("default",)) -> PeftModel:
    """The base model with adapters whose parameters are all random."""
    base_model = LlamaForCausalLM.from_pretrained(base)
    frozen = {id(parameter) for parameter in base_model.parameters()}
    model = get_peft_model(base_model, _config())
    for name in adapters[1:]:
        model.add_adapter(name, _config())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if id(parameter) not in frozen:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def _logits(model: PeftModel | LlamaForCausalLM, **kwargs: torch.Tensor) -> bytes:
    """The logits of two fixed examples, bit for bit."""
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.arange(24).reshape(2, 12), **kwargs).logits
    assert logits.isfinite().all()
    return logits.numpy().tobytes()


def _adapted_logits(model: PeftModel) -> bytes:
    return _logits(model, task_embeds=torch.linspace(-1, 1, 2 * TASK_DIM).reshape(2, TASK_DIM))


def _logits_by_adapter(model: PeftModel) -> dict[str, bytes]:
    logits = {}
    for name in list(model.peft_config):
        model.set_adapter(name)
        logits[name] = _adapted_logits(model)
    return logits


def push(
    base: Path, repo_id: str, seed: int, adapters: tuple[str, ...] = ("default",), **kwargs: Any
) -> dict[str, bytes] | Failed:
    """Push adapters with `model.push_to_hub`; the logits of each."""
    model = _model(base, seed, adapters)
    try:
        with mock.patch("time.sleep"):  # no pauses between attempts
            model.push_to_hub(repo_id, **{"token": TOKEN, **kwargs})
    except Exception as error:
        return _failed(error)
    return _logits_by_adapter(model)


def upload(repo_id: str, folder: Path) -> None:
    """Push a folder, as transformers' and TRL's trainers do."""
    HfApi(token=TOKEN).upload_folder(repo_id=repo_id, folder_path=folder)


def load(base: Path, adapter: str | Path, **kwargs: Any) -> bytes | Failed:
    """Load an adapter with `PeftModel.from_pretrained`; its logits."""
    try:
        model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), adapter, **kwargs)
    except Exception as error:
        return _failed(error)
    return _adapted_logits(model)


def push_with_encoder(base: Path, encoder: Path, repo_id: str, seed: int) -> bytes:
    """Push an adapter that reads the task from `input_ids`; its logits."""
    model = attach_task_encoder(_model(base, seed), TaskEncoder(encoder))
    model.push_to_hub(repo_id, token=TOKEN)
    return _logits(model)


def load_with_encoder(base: Path, repo_id: str) -> bytes:
    """Load an adapter, whose config names its encoder; its logits."""
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), repo_id)
    return _logits(model)


# The processes


@dataclass(frozen=True)
class Process:
    """An interpreter of its own, set to talk to the Hub; functions of this module run in it."""

    pool: ProcessPoolExecutor

    def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return self.pool.submit(function, *args, **kwargs).result(timeout=120)


@contextmanager
def _process(hub: LoopbackHub, home: Path, token: str | None) -> Iterator[Process]:
    settings = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
    }
    if token is not None:
        settings["HF_TOKEN"] = token
    pool = ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn"))
    with pytest.MonkeyPatch.context() as environment:
        for name in os.environ:
            if name.startswith(("HF_", "HUGGING", "TRANSFORMERS_")):
                environment.delenv(name)
        for name, value in settings.items():
            environment.setenv(name, value)
        pool.submit(torch.set_num_threads, 1)  # starts the process, which inherits these settings
    with pool:
        yield Process(pool)


@pytest.fixture(scope="module")
def hub() -> Iterator[LoopbackHub]:
    with LoopbackHub(token=TOKEN) as hub:
        yield hub


@dataclass(frozen=True)
class Processes:
    publisher: Process
    reader: Process


@pytest.fixture(scope="module")
def processes(hub: LoopbackHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    with (
        _process(hub, tmp_path_factory.mktemp("publisher"), token=None) as publisher,
        _process(hub, tmp_path_factory.mktemp("reader"), token=TOKEN) as reader,
    ):
        yield Processes(publisher, reader)


TINY = {
    "vocab_size": 64,
    "hidden_size": TASK_DIM,
    "intermediate_size": 32,
    "num_attention_heads": 2,
}


def _save_tokenizer(folder: Path) -> None:
    words = {"[PAD]": 0, "[UNK]": 1} | {f"w{i}": i for i in range(2, 64)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(folder)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny language model."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**TINY, num_hidden_layers=2)).save_pretrained(folder)
    _save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny task encoder."""
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(1)
    BertModel(BertConfig(**TINY, num_hidden_layers=1)).save_pretrained(folder)
    _save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def seeds() -> Iterator[int]:
    """Seeds of adapters, each used once: the Hub's storage takes no file that it has already."""
    return itertools.count(1)


# An adapter goes to the Hub and comes back


@dataclass(frozen=True)
class Version:
    """A version of an adapter that was pushed: its commit, and its logits."""

    sha: str
    logits: bytes


@pytest.fixture(scope="module")
def versions(
    hub: LoopbackHub, processes: Processes, base: Path, seeds: Iterator[int]
) -> dict[str, Version]:
    """Versions of `user/adapter`: `main`, `old` before it on the same branch, the branch `v2`."""
    versions = {}
    for name, branch in [("old", None), ("v2", "v2"), ("main", None)]:
        logits = processes.publisher.run(push, base, "user/adapter", next(seeds), revision=branch)
        assert not isinstance(logits, Failed), logits
        versions[name] = Version(hub.head("user/adapter", branch or "main"), logits["default"])
    return versions


def _check_pushed_files(files: dict[str, bytes]) -> None:
    """The adapter's own files, and no parameter but the adapter's."""
    assert files.keys() == ADAPTER_FILES | {".gitattributes"}  # the latter is the Hub's own
    parameters = safetensors.torch.load(files["adapter_model.safetensors"])
    assert parameters
    assert all("taskmoe_lora_" in name for name in parameters)


def test_the_adapter_and_nothing_else_is_pushed(
    hub: LoopbackHub, versions: dict[str, Version]
) -> None:
    files = hub.files("user/adapter")
    _check_pushed_files(files)
    assert json.loads(files["adapter_config.json"])["peft_type"] == "TASKMOE_LORA"
    card = files["README.md"].decode()
    assert "library_name: peft" in card and "[More Information Needed]" not in card
    assert 'from_pretrained("user/adapter")' in card and "import peft_taskmoe" in card


def test_a_fresh_process_loads_the_pushed_adapter_bit_for_bit(
    processes: Processes, base: Path, versions: dict[str, Version]
) -> None:
    assert processes.reader.run(load, base, "user/adapter") == versions["main"].logits
    assert versions["main"].logits != _logits(LlamaForCausalLM.from_pretrained(base))


@pytest.mark.parametrize(("name", "by"), [("v2", "branch"), ("v2", "commit"), ("old", "commit")])
def test_revision(
    processes: Processes, base: Path, versions: dict[str, Version], name: str, by: str
) -> None:
    revision = name if by == "branch" else versions[name].sha
    assert (
        processes.reader.run(load, base, "user/adapter", revision=revision) == versions[name].logits
    )
    assert versions[name].logits != versions["main"].logits


def test_subfolder(
    hub: LoopbackHub, processes: Processes, base: Path, seeds: Iterator[int]
) -> None:
    logits = processes.publisher.run(push, base, "user/two", next(seeds), BOTH_ADAPTERS)
    assert not isinstance(logits, Failed), logits
    assert hub.files("user/two").keys() == ADAPTER_FILES | {
        ".gitattributes",
        "second/adapter_config.json",
        "second/adapter_model.safetensors",
    }
    assert processes.reader.run(load, base, "user/two", subfolder="second") == logits["second"]
    assert processes.reader.run(load, base, "user/two") == logits["default"]
    assert logits["second"] != logits["default"]


def test_the_task_encoder_travels_by_name_without_its_weights(
    hub: LoopbackHub, processes: Processes, base: Path, encoder: Path, seeds: Iterator[int]
) -> None:
    logits = processes.publisher.run(
        push_with_encoder, base, encoder, "user/conditioned", next(seeds)
    )
    files = hub.files("user/conditioned")
    _check_pushed_files(files)
    assert json.loads(files["adapter_config.json"])["task_encoder"]["name_or_path"] == str(encoder)
    assert processes.reader.run(load_with_encoder, base, "user/conditioned") == logits


def test_pushing_the_same_adapter_again_makes_no_commit(
    hub: LoopbackHub, processes: Processes, base: Path, seeds: Iterator[int]
) -> None:
    seed = next(seeds)
    first = processes.publisher.run(push, base, "user/again", seed)
    head = hub.head("user/again")
    assert processes.publisher.run(push, base, "user/again", seed) == first
    assert hub.head("user/again") == head


def test_a_card_that_a_person_wrote_on_the_hub_is_kept(
    hub: LoopbackHub, processes: Processes, base: Path, seeds: Iterator[int], tmp_path: Path
) -> None:
    processes.publisher.run(push, base, "user/mine", next(seeds))
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n\n# Mine\n", encoding="utf-8")
    processes.publisher.run(upload, "user/mine", tmp_path)
    processes.reader.run(push, base, "user/mine", next(seeds))
    assert hub.files("user/mine")["README.md"].decode().endswith("# Mine\n")


def test_a_failed_first_push_leaves_no_adapter_to_load(
    hub: LoopbackHub, processes: Processes, base: Path, seeds: Iterator[int]
) -> None:
    hub.fail_next("PUT lfs", times=ATTEMPTS)
    failed = processes.publisher.run(push, base, "user/first", next(seeds))
    assert isinstance(failed, Failed)
    assert hub.files("user/first").keys() == {".gitattributes"}
    missing = processes.reader.run(load, base, "user/first")
    assert isinstance(missing, Failed)
    assert missing.chain[1][0] == "RemoteEntryNotFoundError"
