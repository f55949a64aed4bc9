"""Routed LoRA under transformers' continuous batching: every request gets `generate`'s tokens."""

from __future__ import annotations

import gc
import threading
import time
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import GenerationConfig
from transformers.generation import ContinuousBatchingConfig
from transformers.generation.continuous_batching.requests import RequestState

from peft_taskmoe import TaskMoELoraConfig, attach_task_encoder, record_gates, task_context
from peft_taskmoe.continuous_batching import RequestTask
from scripted import EOS, tiny_llama
from tiny import TASK_DIM, randomise

GREEDY = GenerationConfig(do_sample=False, max_new_tokens=8, eos_token_id=EOS)


def adapted(dtype: torch.dtype = torch.float64, **settings: Any) -> Any:
    settings = {"task_dim": TASK_DIM, "num_experts": 3, "r": 2, **settings}
    config = TaskMoELoraConfig(task_type="CAUSAL_LM", **settings)
    return randomise(get_peft_model(tiny_llama().to(dtype), config).to(dtype), std=0.5).eval()


def engine(**changes: Any) -> ContinuousBatchingConfig:
    """A small cache and small batches, so that prompts are prefilled in pieces."""
    return ContinuousBatchingConfig(
        **{"page_size": 4, "num_blocks": 256, "max_batch_tokens": 24, **changes}
    )


def requests(count: int, longest: int = 40) -> tuple[list[list[int]], torch.Tensor]:
    """Prompts of many lengths, some of them alike, and a task for each."""
    lengths = torch.randint(1, longest + 1, (count,)).tolist()
    prompts = [torch.randint(3, 259, (length,)).tolist() for length in lengths]
    prompts[count // 2 :] = prompts[: count - count // 2]
    return prompts, torch.randn(count, TASK_DIM)


def alone(model: Any, prompts: list[list[int]], embeds: Any = None, new: int = 8) -> list[Any]:
    """The tokens that `generate` gives each prompt alone."""
    found = []
    for i, prompt in enumerate(prompts):
        task = {} if embeds is None else {"task_embeds": embeds[i : i + 1]}
        ids = torch.tensor([prompt])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new, **task
        )
        found.append(out[0, len(prompt) :].tolist())
    return found


def batched(model: Any, prompts: list[list[int]], config: Any = None, **given: Any) -> list[Any]:
    outputs = model.generate_batch(prompts, GREEDY, config or engine(), progress_bar=False, **given)
    return [output.generated_tokens for output in outputs.values()]


def session(model: Any, config: Any = None) -> Any:
    return model.continuous_batching_context_manager(
        generation_config=GREEDY, continuous_batching_config=config or engine()
    )


def results(manager: Any, ids: list[str]) -> list[list[int]]:
    """The tokens of these requests, in their order."""
    found: dict[str, list[int]] = {}
    until = time.monotonic() + 120
    while len(found) < len(ids):
        assert time.monotonic() < until and manager.is_running()
        output = manager.get_result(timeout=0.1)
        if output is not None and output.is_finished():
            found[output.request_id] = output.generated_tokens
    return [found[i] for i in ids]


@pytest.mark.parametrize("attention", ["sdpa", "paged|eager"])
def test_requests_that_arrive_over_time_get_the_tokens_of_generate(attention):
    model = adapted()
    prompts, embeds = requests(64)
    expected = alone(model, prompts, embeds)
    by_another = alone(model, prompts, embeds.roll(1, 0))
    assert sum(a != b for a, b in zip(expected, by_another, strict=True)) > 50
    model.get_base_model().set_attn_implementation(attention)
    with session(model) as manager:
        ids = []
        for i in range(0, 64, 4):
            ids += [manager.add_request(prompts[i], task_embeds=embeds[i])]
            ids += manager.add_requests(prompts[i + 1 : i + 4], task_embeds=embeds[i + 1 : i + 4])
            time.sleep(0.02)
        assert results(manager, ids) == expected


@pytest.mark.parametrize("settings", [{"router_inputs": "task"}, {"top_k": 1}])
def test_other_routers(settings):
    model = adapted(**settings)
    prompts, embeds = requests(8)
    assert batched(model, prompts, task_embeds=embeds) == alone(model, prompts, embeds)


def test_preempted_requests_keep_their_task(monkeypatch):
    restarts = []
    restart = RequestState.create_equivalent_initial_request
    monkeypatch.setattr(
        RequestState,
        "create_equivalent_initial_request",
        lambda state: restarts.append(state) or restart(state),
    )
    model = adapted()
    prompts, embeds = requests(12, longest=8)
    found = batched(model, prompts, engine(num_blocks=12), task_embeds=embeds)
    assert restarts
    assert found == alone(model, prompts, embeds)


def test_several_sequences_of_a_request_share_its_task():
    model = adapted()
    prompts, embeds = requests(6)
    several = GenerationConfig(
        do_sample=True, top_k=1, max_new_tokens=8, eos_token_id=EOS, num_return_sequences=3
    )
    outputs = model.generate_batch(
        prompts, several, engine(), progress_bar=False, task_embeds=embeds
    )
    expected = [tokens for tokens in alone(model, prompts, embeds) for _ in range(3)]
    assert [output.generated_tokens for output in outputs.values()] == expected


def test_the_encoder_embeds_each_prompt_once(tiny_encoder, word_tokenizer, monkeypatch):
    model = adapted()
    attach_task_encoder(model, tiny_encoder, word_tokenizer)
    prompts = [[4 + token % 60 for token in prompt] for prompt in requests(8)[0]]
    expected = alone(model, prompts)
    before = tiny_encoder.cache_info()
    assert batched(model, prompts) == expected
    after = tiny_encoder.cache_info()
    assert after.hits + after.misses - before.hits - before.misses == len(prompts)


def test_the_scope_around_gives_the_tasks():
    model = adapted()
    prompts, embeds = requests(4)
    expected = alone(model, prompts, embeds)
    with task_context(embeds):
        assert batched(model, prompts) == expected
    with pytest.raises(ValueError, match="1 task embeddings"), task_context(embeds[:1]):
        batched(model, prompts)


def test_paged_generate_is_routed_by_row():
    model = adapted()
    prompts, embeds = [[5, 6, 7], [5, 6, 7], [9, 8, 3]], torch.randn(3, TASK_DIM)
    model.generation_config.eos_token_id = None  # the engine's rows must end alike
    expected = alone(model, prompts, embeds)
    model.generation_config.continuous_batching_config = engine()
    given = {"cache_implementation": "paged", "do_sample": False, "max_new_tokens": 8}
    rows = model.generate(torch.tensor(prompts), task_embeds=embeds, **given)
    assert rows[0, :, 3:].tolist() == expected
    mask = torch.tensor([[0, 1, 1], [1, 1, 1], [1, 1, 1]])
    with pytest.raises(ValueError, match="padding"):
        model.generate(torch.tensor(prompts), attention_mask=mask, task_embeds=embeds, **given)


def test_two_managers_at_once_and_another_adapter():
    model = adapted()
    model.add_adapter(
        "other", TaskMoELoraConfig(task_dim=TASK_DIM, num_experts=2, r=1, router_inputs="task")
    )
    randomise(model.to(torch.float64), seed=3, std=0.5)
    prompts, embeds = requests(24)
    for name in ("default", "other"):
        model.set_adapter(name)
        expected = alone(model, prompts, embeds)
        found: dict[int, Any] = {}

        def run(part: int, found: dict[int, Any] = found) -> None:
            found[part] = batched(model, prompts[part::2], task_embeds=embeds[part::2])

        threads = [threading.Thread(target=run, args=(part,)) for part in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == {0: expected[0::2], 1: expected[1::2]}


def alive() -> tuple[int, int]:
    """Numbers of tasks kept and of tensors alive."""
    gc.collect()
    objects = gc.get_objects()
    return (
        sum(type(found) is RequestTask for found in objects),
        sum(issubclass(type(found), torch.Tensor) for found in objects),
    )


@pytest.mark.slow
def test_a_task_is_freed_when_its_request_ends_or_is_cancelled():
    model = adapted()
    prompts, embeds = requests(100, longest=4)
    with session(model, engine(max_batch_tokens=128)) as manager:
        counts = []
        for _ in range(10):
            results(manager, manager.add_requests(prompts, 2, task_embeds=embeds))
            counts.append(alive())
        assert counts[-1] <= counts[0]
        ids = manager.add_requests(prompts, 200, task_embeds=embeds)
        for i in ids:
            manager.cancel_request(i)
        last = manager.add_request(prompts[0], task_embeds=embeds[0])
        assert results(manager, [last]) == alone(model, prompts[:1], embeds)
        assert alive() <= (1, counts[0][1])


@pytest.mark.parametrize(
    ("config", "generation", "message"),
    [
        (engine(use_cuda_graph=True), {}, "CUDA graphs"),
        (engine(use_async_batching=True), {}, "CUDA graphs"),
        (engine(default_compile_level=1), {}, "CUDA graphs"),
        (engine(), {"num_beams": 2}, "num_beams"),
        (engine(), {"stop_strings": ["."]}, "stop_strings"),
    ],
)
def test_what_the_engine_lacks_is_refused(config, generation, message):
    with pytest.raises(ValueError, match=message):
        adapted().init_continuous_batching(GenerationConfig(**generation), config)


def test_calls_that_would_be_wrong_are_refused():
    model = adapted()
    with pytest.raises(ValueError, match="no task embedding"):
        batched(model, [[5]])
    with pytest.raises(ValueError, match="stopping_criteria"):
        batched(model, [[5]], task_embeds=torch.randn(1, TASK_DIM), stopping_criteria=[])
    with pytest.raises(ValueError, match="record_gates"), record_gates(model):
        batched(model, [[5]], task_embeds=torch.randn(1, TASK_DIM))
    with pytest.raises(ValueError, match="lm_head"):
        batched(adapted(target_modules=["lm_head"]), [[5]], task_embeds=torch.randn(1, TASK_DIM))


def test_requests_added_without_the_adapter_fail_under_it():
    model = adapted()
    manager = model.init_continuous_batching(GREEDY, engine())
    with model.disable_adapter():
        manager.add_request([5, 6])
    manager.start()
    output = manager.get_result(timeout=60)
    manager.stop()
    assert 'Adapter "default" was not active' in output.error


def test_a_manager_made_before_the_adapter_is_refused():
    base = tiny_llama()
    with base.continuous_batching_context_manager(
        GREEDY, continuous_batching_config=engine(), persistent_manager=True
    ):
        pass
    model = get_peft_model(base, TaskMoELoraConfig(task_type="CAUSAL_LM", task_dim=TASK_DIM))
    with pytest.raises(ValueError, match="destroy_cached"):
        batched(model, [[5]], task_embeds=torch.randn(1, TASK_DIM))


@pytest.mark.slow
def test_grpo_generates_with_each_prompts_task(tiny_encoder, word_tokenizer, tmp_path):
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    seen: dict[str, list[int]] = {}

    def reward(prompts: Any, completion_ids: Any, **columns: Any) -> list[float]:
        seen.update(zip(prompts, completion_ids, strict=True))
        return torch.rand(len(prompts)).tolist()

    model = adapted(torch.float32)
    attach_task_encoder(model, tiny_encoder, word_tokenizer)
    texts = [" ".join(f"w{4 + (7 * i + k) % 60}" for k in range(3 + i)) for i in range(4)]
    expected = alone(model, word_tokenizer(texts).input_ids)
    arguments = GRPOConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        bf16=False,
        report_to=[],
        max_steps=2,
        per_device_train_batch_size=8,
        num_generations=2,
        max_completion_length=8,
        top_k=1,
        learning_rate=0.0,
        use_transformers_continuous_batching=True,
        transformers_continuous_batching_config={
            "page_size": 4, "num_blocks": 256, "max_batch_tokens": 24,
        },
    )  # fmt: skip
    data = Dataset.from_dict({"prompt": texts})
    GRPOTrainer(model, reward, arguments, data, processing_class=word_tokenizer).train()
    assert [seen[text] for text in texts] == expected
