"""Generation: every way of decoding follows each row's own task, with and without a cache, and leaves nothing behind.

The yardstick is the row generated alone, or a single forward over the finished sequence.
"""

from __future__ import annotations

import threading
import warnings

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TextIteratorStreamer,
)

from cases import MODELS, NO_END, ROWS, VOCAB, config_for, louder, rows_of, tasks
from cases import adapted as softly_adapted
from peft_taskmoe import fused, task_context
from peft_taskmoe.task_scope import current_state

torch.set_num_threads(1)

GENERATING = [
    name for name, case in MODELS.items() if case.task_type in ("CAUSAL_LM", "SEQ_2_SEQ_LM")
]
NEW = 5


def adapted(*args, **kwargs):
    return louder(softly_adapted(*args, **kwargs))


@pytest.fixture(autouse=True)
def _nothing_is_left_in_scope():
    warnings.simplefilter("error", UserWarning)
    yield
    assert current_state() is None


def prompts(name: str = "llama") -> dict[str, torch.Tensor]:
    """The table's batch (padded on the left) without the decoder's input."""
    return {
        key: value for key, value in MODELS[name].inputs().items() if key != "decoder_input_ids"
    }


def new_tokens(name: str, output: torch.Tensor, prompt_length: int) -> torch.Tensor:
    """What was generated, without the prompt in front of it."""
    return output if MODELS[name].task_type == "SEQ_2_SEQ_LM" else output[:, prompt_length:]


def generated(model, name: str, batch: dict, embeds: torch.Tensor, **settings) -> torch.Tensor:
    out = model.generate(
        **batch, task_embeds=embeds, max_new_tokens=NEW, **{"do_sample": False, **settings}
    )
    return new_tokens(name, out, batch["input_ids"].shape[1])


def alone(batch: dict, row: int) -> dict:
    """One row without its padding."""
    one = rows_of(batch, slice(row, row + 1))
    real = one["attention_mask"][0].bool()
    return {key: value[:, real] for key, value in one.items()}


WAYS = {
    "greedy": {},
    "without cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    "beams": {"num_beams": 3},
    "beams without cache": {"num_beams": 3, "use_cache": False},
    "several of the beams": {"num_beams": 4, "num_return_sequences": 2},
    "penalties": {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["llama", "t5"])
@pytest.mark.parametrize("adapter", ["token+task", "task", "top_k"])
def test_each_row_gets_the_tokens_it_gets_alone(name, adapter, way):
    model, batch, embeds = adapted(name, adapter), prompts(name), tasks()
    together = generated(model, name, batch, embeds, **WAYS[way])
    per_row = WAYS[way].get("num_return_sequences", 1)
    for row in range(ROWS):
        one = generated(model, name, alone(batch, row), embeds[row : row + 1], **WAYS[way])
        assert torch.equal(together[row * per_row : (row + 1) * per_row], one)
    assert not torch.equal(
        generated(model, name, batch, embeds.flip(0) * -1, **WAYS[way]), together
    )


@pytest.mark.parametrize("name", GENERATING)
def test_every_architecture_generates_the_same_alone_and_without_cache(name):
    model, batch, embeds = adapted(name), prompts(name), tasks()
    together = generated(model, name, batch, embeds)
    assert torch.equal(generated(model, name, batch, embeds, use_cache=False), together)
    assert not torch.equal(generated(model, name, batch, -embeds), together)
    for row in range(ROWS):
        one = generated(model, name, alone(batch, row), embeds[row : row + 1])
        assert torch.equal(together[row : row + 1], one)


def spied(monkeypatch) -> list[fused.DecodingWeights]:
    """What decoding steps mix from now on, one entry for each time."""
    computed: list[fused.DecodingWeights] = []
    compute = fused._mix_for_all
    monkeypatch.setattr(
        fused, "_mix_for_all", lambda *args: (computed.append(args[2]), compute(*args))
    )
    return computed


def test_a_decoding_step_of_a_llama_mixes_experts_four_times_a_layer(monkeypatch):
    """Once for q, k and v, once for o, once for gate and up, once for down; and the tokens are those of the general way."""
    model, batch, embeds = adapted("llama"), prompts(), tasks()
    computed = spied(monkeypatch)
    found = generated(model, "llama", batch, embeds)
    linears = MODELS["llama"].config["num_hidden_layers"] * 7
    assert len(computed) == (NEW - 1) * linears * 4 // 7
    assert sum(len(weights.b) for weights in computed) == (NEW - 1) * linears
    computed.clear()
    assert (
        torch.equal(generated(model, "llama", batch, embeds, use_cache=False), found)
        and not computed
    )
    with torch.inference_mode():
        assert torch.equal(generated(model, "llama", batch, embeds), found)
    assert [len(weights.b) for weights in computed] == [1] * (
        NEW - 1
    ) * linears  # each layer for itself


@pytest.mark.parametrize("rows", [2, fused._FEW_ROWS + 2])
@pytest.mark.parametrize(
    ("base", "adapter"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),  # what PEFT makes of a base in half precision
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
    ],
)
def test_decoding_steps_are_taken_in_every_precision(base, adapter, rows, monkeypatch):
    """Four a layer, in float32 for a few rows."""
    model, batch, embeds = adapted("llama").to(base), prompts(), tasks()
    for name, parameter in model.named_parameters():
        if "taskmoe_lora_" in name:
            parameter.data = parameter.data.to(adapter)
    batch = {key: value[:2].repeat(rows // 2, 1) for key, value in batch.items()}
    embeds = embeds[:2].repeat(rows // 2, 1)
    computed = spied(monkeypatch)
    generated(model, "llama", batch, embeds)
    computed_in = [weights.a_and_router.dtype for weights in computed]
    few = adapter == torch.float32 or rows <= fused._FEW_ROWS
    assert set(computed_in) == {torch.float32 if few else adapter}
    assert len(computed_in) == (NEW - 1) * MODELS["llama"].config["num_hidden_layers"] * 4


def test_layers_whose_adapters_differ_in_precision_decode_apart(monkeypatch):
    """k's adapter is in the base's bfloat16, q's and v's in float32."""
    model, computed = adapted("llama").bfloat16(), spied(monkeypatch)
    for name, parameter in model.named_parameters():
        if "taskmoe_lora_" in name and "k_proj" not in name:
            parameter.data = parameter.data.float()
    generated(model, "llama", prompts(), tasks())
    groups = [len(weights.b) for weights in computed]
    layers = MODELS["llama"].config["num_hidden_layers"]
    assert sorted(groups) == sorted([1, 1, 1, 2, 2] * layers * (NEW - 1))


@pytest.mark.parametrize(
    "settings",
    [{"num_return_sequences": 3}, {"num_return_sequences": 2, "top_p": 0.9, "temperature": 1.7}],
)
def test_sampling_draws_each_row_from_its_own_distribution(settings):
    """The logits of every sampled step are those of one forward over the row's sequence with the row's task."""
    model, batch, embeds = adapted("llama"), prompts(), tasks()
    draw = {**batch, "task_embeds": embeds, "do_sample": True, "max_new_tokens": NEW, **settings}
    torch.manual_seed(5)
    found = model.generate(**draw, return_dict_in_generate=True, output_logits=True)
    torch.manual_seed(5)
    assert torch.equal(model.generate(**draw), found.sequences)
    per_row = settings["num_return_sequences"]
    assert len({tuple(row) for row in found.sequences[:per_row].tolist()}) > 1
    start = batch["input_ids"].shape[1]
    logits = torch.stack(found.logits, dim=1)
    for i, sequence in enumerate(found.sequences):
        row = i // per_row
        real = torch.cat((batch["attention_mask"][row].bool(), torch.ones(NEW, dtype=torch.bool)))
        with torch.no_grad():
            whole = model(input_ids=sequence[real][None], task_embeds=embeds[row : row + 1]).logits[
                0
            ]
        padding = int((~real).sum())
        torch.testing.assert_close(logits[i], whole[start - padding - 1 : -1], atol=1e-4, rtol=1e-4)


def test_several_active_adapters_generate_what_their_forward_says():
    model, batch, embeds = adapted("llama"), prompts(), tasks()
    model.add_adapter("other", config_for("llama", "task", num_experts=2))
    model.base_model.set_adapter(["default", "other"])
    model.eval()
    found = generated(model, "llama", batch, embeds)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    for _ in range(NEW):
        with torch.no_grad():
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            following = model(
                input_ids=ids, attention_mask=mask, position_ids=positions, task_embeds=embeds
            ).logits[:, -1]
        ids = torch.cat((ids, following.argmax(-1, keepdim=True)), 1)
        mask = torch.cat((mask, torch.ones_like(mask[:, :1])), 1)
    assert torch.equal(found, ids[:, -NEW:])


def assistant(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    settings = {**MODELS["llama"].config, "num_hidden_layers": 1, **NO_END}
    return LlamaForCausalLM(LlamaConfig(**settings)).eval()


@pytest.mark.parametrize("row", range(2))
@pytest.mark.parametrize(
    "kind", ["prompt lookup", "small assistant", "unadapted base", "adapted assistant"]
)
def test_assisted_decoding_gives_the_greedy_tokens(kind, row):
    model, batch, embeds = adapted("llama"), prompts(), tasks()
    one, task = alone(batch, row), embeds[row : row + 1]
    expected = generated(model, "llama", one, task)
    if kind == "prompt lookup":
        settings = {"prompt_lookup_num_tokens": 2}
    else:
        helpers = {
            "small assistant": lambda: assistant(3),
            "unadapted base": MODELS["llama"].build,
            "adapted assistant": lambda: adapted("llama", seed=9),
        }
        settings = {"assistant_model": helpers[kind]()}
    assert torch.equal(generated(model, "llama", one, task, **settings), expected)


def test_assistant_sees_the_task():
    """An assistant with the same adapter proposes what the model would say, so that nearly all of it is accepted."""
    model, task = adapted("llama"), tasks(1)
    one = alone(prompts(), 0)
    helper = adapted("llama").get_base_model()
    helper.generation_config.num_assistant_tokens_schedule = "constant"
    helper.generation_config.num_assistant_tokens = 4
    helper.generation_config.assistant_confidence_threshold = 0.0
    calls = []
    hook = model.get_base_model().lm_head.register_forward_hook(lambda *_: calls.append(1))
    expected = generated(model, "llama", one, task)
    greedy_steps, _ = len(calls), calls.clear()
    assert torch.equal(generated(model, "llama", one, task, assistant_model=helper), expected)
    hook.remove()
    assert len(calls) < greedy_steps


def word_tokenizer() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="w0", unk_token="w0")


def test_streaming_from_a_thread():
    model, task, one, tokenizer = adapted("llama"), tasks(1), alone(prompts(), 0), word_tokenizer()
    expected = tokenizer.decode(generated(model, "llama", one, task)[0])
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=30)
    thread = threading.Thread(
        target=model.generate,
        kwargs={
            **one,
            "task_embeds": task,
            "max_new_tokens": NEW,
            "do_sample": False,
            "streamer": streamer,
        },
    )
    thread.start()
    text = "".join(streamer)
    thread.join()
    assert text.split() == expected.split()


def test_threads_generate_for_their_own_tasks_at_the_same_time():
    model, one = adapted("llama"), alone(prompts(), 0)
    embeds = [tasks(1, seed) for seed in range(4)]
    expected = [generated(model, "llama", one, task) for task in embeds]
    assert len({tuple(tokens[0].tolist()) for tokens in expected}) > 1
    found: dict[int, list[torch.Tensor]] = {i: [] for i in range(len(embeds))}
    start = threading.Barrier(len(embeds))

    def run(i: int) -> None:
        start.wait()
        for _ in range(3):
            found[i].append(generated(model, "llama", one, embeds[i]))

    threads = [threading.Thread(target=run, args=(i,)) for i in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, results in found.items():
        assert len(results) == 3 and all(torch.equal(result, expected[i]) for result in results)


def test_back_to_back_calls_share_nothing():
    """Another task, other weights or a disabled adapter in between: each call gives what a fresh model gives."""
    model, batch, embeds = adapted("llama"), prompts(), tasks()
    first = generated(model, "llama", batch, embeds)
    flipped = generated(adapted("llama"), "llama", batch, -embeds)
    assert torch.equal(generated(model, "llama", batch, -embeds), flipped)
    with model.disable_adapter():
        plain = generated(model, "llama", batch, embeds)
    assert torch.equal(
        plain,
        MODELS["llama"].build().generate(**batch, max_new_tokens=NEW, do_sample=False)[:, -NEW:],
    )
    assert torch.equal(generated(model, "llama", batch, embeds), first)
    other = adapted("llama", seed=3)
    model.load_state_dict(other.state_dict())
    assert torch.equal(
        generated(model, "llama", batch, embeds), generated(other, "llama", batch, embeds)
    )


def test_the_ways_to_pass_inputs_and_task_agree():
    model, embeds = adapted("llama"), tasks()
    ids = prompts()["input_ids"].clamp(min=1)
    settings = {"max_new_tokens": NEW, "do_sample": False}
    expected = model.generate(input_ids=ids, task_embeds=embeds, **settings)
    assert torch.equal(model.generate(ids, task_embeds=embeds, **settings), expected)
    assert torch.equal(model.generate(inputs=ids, task_embeds=embeds, **settings), expected)
    with task_context(embeds):
        assert torch.equal(model.generate(ids, **settings), expected)
        assert torch.equal(model.get_base_model().generate(ids, **settings), expected)
        other = model.generate(
            ids, task_embeds=-embeds, **settings
        )  # an argument wins over the context
    assert torch.equal(other, model.generate(ids, task_embeds=-embeds, **settings))
    from_vectors = model.generate(
        inputs_embeds=model.get_input_embeddings()(ids),
        attention_mask=torch.ones_like(ids),
        task_embeds=embeds,
        **settings,
    )
    assert torch.equal(from_vectors, expected[:, ids.shape[1] :])


def test_a_token_reading_router_needs_no_task_and_takes_one_silently():
    model, batch = adapted("llama", "token"), prompts()
    expected = model.generate(**batch, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(
        model.generate(**batch, task_embeds=tasks(), max_new_tokens=NEW, do_sample=False), expected
    )


def test_what_is_wrong_with_the_task_is_said_before_decoding():
    model, batch = adapted("llama"), prompts()
    with pytest.raises(
        ValueError,
        match=r"This forward has no task embedding.*adapter \"default\".*Pass task_embeds=...",
    ):
        model.generate(**batch, max_new_tokens=2)
    with pytest.raises(
        ValueError, match=r"2 task embeddings for a batch of 3 rows.*one row per example"
    ):
        model.generate(**batch, task_embeds=tasks(2), max_new_tokens=2)
    with pytest.raises(ValueError, match=r"9 dimensions.*built for `task_dim=6`"):
        model.generate(**batch, task_embeds=tasks(dim=9), max_new_tokens=2)
    with pytest.raises(ValueError, match=r"`task_embeds` is a list.*float tensor"):
        model.generate(**batch, task_embeds=tasks().tolist(), max_new_tokens=2)
    assert model.generate(**batch, task_embeds=tasks(), max_new_tokens=2).shape == (ROWS, 9)
