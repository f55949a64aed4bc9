"""Generation follows each row's own task in every way of decoding, and leaves nothing behind.

Compared with the row generated alone, or with one forward over the finished sequence.
"""

from __future__ import annotations

import itertools
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, TextIteratorStreamer, generation

from cases import MODELS, ROWS, config_for, louder, rows_of, tasks
from cases import adapted as softly_adapted
from peft_taskmoe import task_context
from peft_taskmoe.task_scope import current_state

GENERATING = [name for name, case in MODELS.items() if str(case.task_type).endswith("_LM")]
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
    batch = MODELS[name].inputs()
    batch.pop("decoder_input_ids", None)
    return batch


def generated(model, name: str, batch: dict, embeds: torch.Tensor, **settings) -> torch.Tensor:
    """What was generated greedily, without the prompt in front of it."""
    settings = {"max_new_tokens": NEW, "do_sample": False, **settings}
    out = model.generate(**batch, task_embeds=embeds, **settings)
    return out if MODELS[name].task_type == "SEQ_2_SEQ_LM" else out[:, len(batch["input_ids"][0]) :]


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


CASES = [
    *itertools.product(("llama", "t5"), ("token+task", "task", "top_k"), WAYS),
    *((name, "token+task", way) for name in GENERATING for way in ("greedy", "without cache")),
]


@pytest.mark.parametrize("name, adapter, way", dict.fromkeys(CASES))
def test_each_row_gets_the_tokens_it_gets_alone(name, adapter, way):
    model, batch, embeds = adapted(name, adapter), prompts(name), tasks()
    together = generated(model, name, batch, embeds, **WAYS[way])
    per_row = WAYS[way].get("num_return_sequences", 1)
    for row in range(ROWS):
        one = generated(model, name, alone(batch, row), embeds[row : row + 1], **WAYS[way])
        assert torch.equal(together[row * per_row : (row + 1) * per_row], one)
    assert not torch.equal(generated(model, name, batch, -embeds.flip(0), **WAYS[way]), together)
    if way == "greedy":
        assert torch.equal(generated(model, name, batch, embeds, use_cache=False), together)


def test_every_layer_takes_decode_steps_and_prepares_them_once():
    model, states = adapted("llama"), []
    head = model.get_base_model().lm_head
    with head.register_forward_hook(lambda *_: states.append(current_state())):
        generated(model, "llama", prompts(), tasks())
    assert len(states) == NEW and len(set(map(id, states))) == 1
    prepared = states[0].decoding.values()
    assert len(prepared) == MODELS["llama"].config["num_hidden_layers"] * 7 and all(prepared)
    with torch.inference_mode():
        found = generated(model, "llama", prompts(), tasks())
    assert torch.equal(found, generated(model, "llama", prompts(), tasks(), use_cache=False))


@pytest.mark.parametrize(
    "settings",
    [{"num_return_sequences": 3}, {"num_return_sequences": 2, "top_p": 0.9, "temperature": 1.7}],
)
def test_sampling_draws_each_row_from_its_own_distribution(settings):
    """The logits of every sampled step are those of one forward over the row with its task."""
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
        one = {"input_ids": sequence[real][None], "task_embeds": embeds[row : row + 1]}
        with torch.no_grad():
            whole = model(**one).logits[0]
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
        positions = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0), "attention_mask": mask}
        with torch.no_grad():
            following = model(input_ids=ids, **positions, task_embeds=embeds).logits[:, -1]
        ids = torch.cat((ids, following.argmax(-1, keepdim=True)), 1)
        mask = torch.cat((mask, torch.ones_like(mask[:, :1])), 1)
    assert torch.equal(found, ids[:, -NEW:])


def small_assistant() -> LlamaForCausalLM:
    torch.manual_seed(3)
    settings = {**MODELS["llama"].config, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**settings)).eval()


@pytest.mark.parametrize("row", range(2))
@pytest.mark.parametrize(
    "helper", [None, small_assistant, MODELS["llama"].build, lambda: adapted("llama", seed=9)]
)
def test_assisted_decoding_gives_the_greedy_tokens(helper, row):
    """From the prompt, or from a smaller model, the base or another adapter."""
    model, one, task = adapted("llama"), alone(prompts(), row), tasks()[row : row + 1]
    settings: dict = {"assistant_model": helper() if helper else None}
    if helper is None:  # transformers 5.8 looks for an end token; there is none of this number
        settings = {"prompt_lookup_num_tokens": 2, "eos_token_id": -1}
    expected = generated(model, "llama", one, task)
    assert torch.equal(generated(model, "llama", one, task, **settings), expected)


def test_assistant_sees_the_task():
    """An assistant with the same adapter proposes what the model would say; most is accepted."""
    model, task = adapted("llama"), tasks(1)
    one = alone(prompts(), 0)
    helper = adapted("llama").get_base_model()
    helper.generation_config.num_assistant_tokens_schedule = "constant"
    helper.generation_config.num_assistant_tokens = 4
    helper.generation_config.assistant_confidence_threshold = 0.0
    head, calls = model.get_base_model().lm_head, []
    with head.register_forward_hook(lambda *_: calls.append(1)):
        expected = generated(model, "llama", one, task)
        greedy_steps, _ = len(calls), calls.clear()
        assert torch.equal(generated(model, "llama", one, task, assistant_model=helper), expected)
    assert len(calls) < greedy_steps


def test_streaming_from_a_thread(word_tokenizer):
    model, task, one = adapted("llama"), tasks(1), alone(prompts(), 0)
    expected = word_tokenizer.decode(generated(model, "llama", one, task)[0])
    streamer = TextIteratorStreamer(word_tokenizer, skip_prompt=True, timeout=30)
    with ThreadPoolExecutor() as pool:
        pool.submit(generated, model, "llama", one, task, streamer=streamer)
        assert "".join(streamer).split() == expected.split()


def test_threads_generate_for_their_own_tasks_at_the_same_time():
    model, one = adapted("llama"), alone(prompts(), 0)
    embeds = [tasks(1, seed) for seed in range(4)]
    expected = [generated(model, "llama", one, task) for task in embeds]
    assert len({tuple(tokens[0].tolist()) for tokens in expected}) > 1
    start = threading.Barrier(len(embeds))

    def run(task: torch.Tensor) -> list[torch.Tensor]:
        start.wait()
        return [generated(model, "llama", one, task) for _ in range(3)]

    with ThreadPoolExecutor(len(embeds)) as pool:
        for results, right in zip(pool.map(run, embeds), expected, strict=True):
            assert all(torch.equal(result, right) for result in results)


def test_back_to_back_calls_share_nothing():
    """Another task, other weights or a disabled adapter in between: as with a fresh model."""
    model, batch, embeds = adapted("llama"), prompts(), tasks()
    first = generated(model, "llama", batch, embeds)
    flipped = generated(adapted("llama"), "llama", batch, -embeds)
    assert torch.equal(generated(model, "llama", batch, -embeds), flipped)
    base = MODELS["llama"].build()
    plain = base.generate(**batch, max_new_tokens=NEW, do_sample=False)[:, -NEW:]
    with model.disable_adapter():
        assert torch.equal(generated(model, "llama", batch, embeds), plain)
    assert torch.equal(generated(model, "llama", batch, embeds), first)
    other = adapted("llama", seed=3)
    model.load_state_dict(other.state_dict())
    expected = generated(other, "llama", batch, embeds)
    assert torch.equal(generated(model, "llama", batch, embeds), expected)


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
        # an argument wins over the context
        other = model.generate(ids, task_embeds=-embeds, **settings)
    assert torch.equal(other, model.generate(ids, task_embeds=-embeds, **settings))
    vectors = {"inputs_embeds": model.get_input_embeddings()(ids)}
    vectors["attention_mask"] = torch.ones_like(ids)
    from_vectors = model.generate(**vectors, task_embeds=embeds, **settings)
    assert torch.equal(from_vectors, expected[:, ids.shape[1] :])


def test_a_token_reading_router_needs_no_task_and_takes_one_silently():
    model, batch = adapted("llama", "token"), prompts()
    settings = {**batch, "max_new_tokens": NEW, "do_sample": False}
    expected = model.generate(**settings)
    assert torch.equal(model.generate(**settings, task_embeds=tasks()), expected)


@pytest.mark.parametrize("task, message", [
    (None, r'This forward has no task embedding.*adapter "default" reads. Pass task_embeds=...'),
    (tasks(2), r"2 task embeddings for a batch of 3 rows.*shape \(3, 6\), one row per example"),
    (tasks(dim=9), r"have 9 dimensions.* has `task_dim=6`. Use the encoder it was trained with"),
    (tasks().tolist(), r"`task_embeds` must be a float tensor .*, got list"),
])  # fmt: skip
def test_a_wrong_task_raises_before_decoding(task, message):
    with pytest.raises(ValueError, match=message):
        adapted("llama").generate(**prompts(), task_embeds=task, max_new_tokens=2)


def test_an_older_engine_of_continuous_batching_is_refused(monkeypatch):
    monkeypatch.setattr(generation, "ContinuousBatchingConfig", object, raising=False)
    model = adapted("llama")
    with pytest.raises(ImportError, match=r"transformers 5\.18 or newer.*or use `generate`"):
        model.generate_batch([[5, 6]], task_embeds=tasks(1))
    with pytest.raises(ImportError, match=r"transformers 5\.18 or newer"):
        model.get_base_model().init_continuous_batching()
