"""Routed LoRA under transformers' continuous batching: every request gets `generate`'s tokens."""

from __future__ import annotations

import gc
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from torch import Tensor
from transformers import GenerationConfig, generation
from trl import GRPOConfig, GRPOTrainer

from peft_taskmoe import TaskMoELoraConfig, attach_task_encoder, record_gates, task_context
from peft_taskmoe.continuous_batching import RequestTask
from scripted import EOS, tiny_llama
from tiny import TASK_DIM, randomise

pytestmark = pytest.mark.skipif(
    not hasattr(getattr(generation, "ContinuousBatchingConfig", None), "page_size"),
    reason="transformers before 5.18 has another engine for continuous batching",
)
SMALL = {"page_size": 4, "num_blocks": 256, "max_batch_tokens": 24}
GREEDY = GenerationConfig(do_sample=False, max_new_tokens=8, eos_token_id=EOS)


def adapted(dtype: torch.dtype = torch.float64, **settings: Any) -> Any:
    settings = {"task_dim": TASK_DIM, "num_experts": 3, "r": 2, **settings}
    config = TaskMoELoraConfig(task_type="CAUSAL_LM", **settings)
    return randomise(get_peft_model(tiny_llama().to(dtype), config).to(dtype), std=0.5).eval()


def engine(**changes: Any) -> Any:
    """A small cache and small batches, so that prompts are prefilled in pieces."""
    return generation.ContinuousBatchingConfig(**{**SMALL, **changes})


def requests(count: int, longest: int = 40) -> tuple[list[list[int]], torch.Tensor]:
    """Prompts of many lengths, some of them alike, and a task for each."""
    lengths = torch.randint(1, longest + 1, (count,)).tolist()
    prompts = [torch.randint(3, 259, (length,)).tolist() for length in lengths]
    prompts[count // 2 :] = prompts[: count - count // 2]
    return prompts, torch.randn(count, TASK_DIM)


def alone(model: Any, prompts: list[list[int]], embeds: Any = None) -> list[Any]:
    """The tokens that `generate` gives each prompt alone."""
    found = []
    for i, prompt in enumerate(prompts):
        given = {} if embeds is None else {"task_embeds": embeds[i : i + 1]}
        given |= {"attention_mask": torch.ones(1, len(prompt)), "max_new_tokens": 8}
        rows = model.generate(torch.tensor([prompt]), do_sample=False, **given)
        found.append(rows[0, len(prompt) :].tolist())
    return found


def batched(model: Any, prompts: list[list[int]], config: Any = None, **given: Any) -> list[Any]:
    outputs = model.generate_batch(prompts, GREEDY, config or engine(), **given)
    return [output.generated_tokens for output in outputs.values()]


def session(model: Any, **changes: Any) -> Any:
    config = engine(**changes)
    return model.continuous_batching_context_manager(GREEDY, continuous_batching_config=config)


def results(manager: Any, ids: list[str]) -> list[list[int]]:
    """The tokens of these requests, in their order."""
    found: dict[str, list[int]] = {}
    while len(found) < len(ids):
        assert manager.is_running()
        output = manager.get_result(timeout=0.1)
        if output is not None and output.is_finished():
            found[output.request_id] = output.generated_tokens
    return [found[i] for i in ids]


@pytest.mark.slow
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


@pytest.mark.parametrize(
    "settings", [{"router_inputs": "task"}, {"router_inputs": "token"}, {"top_k": 1}]
)
@pytest.mark.slow
def test_other_routers(settings):
    model = adapted(**settings)
    prompts, embeds = requests(8)
    expected = alone(model, prompts, embeds)
    assert batched(model, prompts, task_embeds=embeds) == expected
    for _ in range(2):  # with a manager that is kept
        given = {"task_embeds": {"default": embeds}, "persistent_manager": True}
        assert batched(model, prompts, **given) == expected
    model.get_base_model().destroy_cached_continuous_batching_manager()


@pytest.mark.slow
def test_preempted_requests_keep_their_task(monkeypatch):
    restarts, name = [], "create_equivalent_initial_request"
    from transformers.generation.continuous_batching.requests import RequestState

    restart = getattr(RequestState, name)
    monkeypatch.setattr(RequestState, name, lambda s: restarts.append(s) or restart(s))
    model = adapted()
    prompts, embeds = requests(12, longest=8)
    found = batched(model, prompts, engine(num_blocks=12), task_embeds=embeds)
    assert restarts and found == alone(model, prompts, embeds)


@pytest.mark.slow
def test_several_sequences_of_a_request_share_its_task():
    model = adapted()
    prompts, embeds = requests(6)
    several = GenerationConfig(do_sample=True, top_k=1, max_new_tokens=8, eos_token_id=EOS)
    several.num_return_sequences = 3
    outputs = model.generate_batch(prompts, several, engine(), task_embeds=embeds)
    expected = [tokens for tokens in alone(model, prompts, embeds) for _ in range(3)]
    assert [output.generated_tokens for output in outputs.values()] == expected


@pytest.mark.slow
def test_the_encoder_embeds_each_prompt_once(tiny_encoder, word_tokenizer, monkeypatch):
    model = adapted()
    attach_task_encoder(model, tiny_encoder, word_tokenizer)
    prompts = [[4 + token % 60 for token in prompt] for prompt in requests(8)[0]]
    expected = alone(model, prompts)
    before = tiny_encoder.cache_info()
    assert batched(model, prompts) == expected
    after = tiny_encoder.cache_info()
    assert after.hits + after.misses - before.hits - before.misses == len(prompts)


@pytest.mark.slow
def test_the_scope_around_gives_the_tasks():
    model = adapted()
    prompts, embeds = requests(4)
    expected = alone(model, prompts, embeds)
    with task_context(embeds):
        assert batched(model, prompts) == expected
    with pytest.raises(ValueError, match="1 task embeddings"), task_context(embeds[:1]):
        batched(model, prompts)


@pytest.mark.slow
def test_paged_generate_is_routed_by_row():
    model = adapted()
    prompts, embeds = [[5, 6, 7], [5, 6, 7], [9, 8, 3]], torch.randn(3, TASK_DIM)
    model.generation_config.eos_token_id = None  # the engine's rows must end alike
    expected = alone(model, prompts, embeds)
    model.generation_config.continuous_batching_config = engine()
    given = {"cache_implementation": "paged", "do_sample": False, "max_new_tokens": 8}
    rows = model.generate(torch.tensor(prompts), task_embeds=embeds, **given)
    assert rows[0, :, 3:].tolist() == expected
    given["attention_mask"] = torch.tensor([[0, 1, 1], [1, 1, 1], [1, 1, 1]])
    with pytest.raises(ValueError, match="Padding"):
        model.generate(torch.tensor(prompts), task_embeds=embeds, **given)


@pytest.mark.slow
def test_two_managers_at_once_and_another_adapter():
    model = adapted()
    other = TaskMoELoraConfig(task_dim=TASK_DIM, num_experts=2, r=1, router_inputs="task")
    model.add_adapter("other", other)
    randomise(model.to(torch.float64), seed=3, std=0.5)
    prompts, embeds = requests(12)
    for name in ("default", "other"):
        model.set_adapter(name)
        expected = alone(model, prompts, embeds)

        def run(part: int) -> list[Any]:
            return batched(model, prompts[part::2], task_embeds=embeds[part::2])

        with ThreadPoolExecutor() as pool:
            found = list(pool.map(run, (0, 1)))
        assert found == [expected[0::2], expected[1::2]]


def alive() -> list[int]:
    """Numbers of tasks kept and of tensors alive."""
    gc.collect()
    kinds = [type(found) for found in gc.get_objects()]
    return [sum(issubclass(kind, wanted) for kind in kinds) for wanted in (RequestTask, Tensor)]


@pytest.mark.slow
def test_a_task_is_freed_when_its_request_ends_or_is_cancelled():
    model = adapted()
    prompts, embeds = requests(100, longest=4)
    with session(model, max_batch_tokens=128) as manager:
        counts = []
        for _ in range(10):
            results(manager, manager.add_requests(prompts, 2, task_embeds=embeds))
            counts.append(alive())
        assert counts[-1][0] <= counts[0][0] and counts[-1][1] <= counts[0][1]
        for i in manager.add_requests(prompts, 200, task_embeds=embeds):
            manager.cancel_request(i)
        last = manager.add_request(prompts[0], task_embeds=embeds[0])
        assert results(manager, [last]) == alone(model, prompts[:1], embeds)
        assert alive()[0] == 1 and alive()[1] <= counts[0][1]


def test_what_the_engine_lacks_is_refused(monkeypatch):
    model, task = adapted(), {"task_embeds": torch.randn(1, TASK_DIM)}
    base = model.get_base_model()
    for holder, name, why in (
        (base.config, "compile_config", "compile_config"),
        (base, "_device_mesh", "tensor parallelism"),
    ):
        with monkeypatch.context() as patch, pytest.raises(ValueError, match=why):
            patch.setattr(holder, name, object(), raising=False)
            model.init_continuous_batching(GREEDY, engine())
    with pytest.raises(ValueError, match=f"have {TASK_DIM + 1} dimensions"):
        batched(model, [[5]], task_embeds=torch.randn(1, TASK_DIM + 1))
    paged = {"cache_implementation": "paged", "logits_processor": [object()], **task}
    with pytest.raises(ValueError, match="drops a `logits_processor`"):
        model.generate(torch.tensor([[5]]), **paged)
    for name in ("use_cuda_graph", "use_async_batching", "default_compile_level"):
        with pytest.raises(ValueError, match="CUDA graphs"):
            model.init_continuous_batching(GREEDY, engine(**{name: True}))
    for setting in ({"num_beams": 2}, {"stop_strings": ["."]}):
        with pytest.raises(ValueError, match=next(iter(setting))):
            model.init_continuous_batching(GenerationConfig(**setting), engine())
    with pytest.raises(ValueError, match="no task embedding"):
        batched(model, [[5]])
    with pytest.raises(ValueError, match="stopping_criteria"):
        batched(model, [[5]], stopping_criteria=[], **task)
    for router, given in (("token+task", task), ("token", {})):
        read = adapted(router_inputs=router)
        with pytest.raises(ValueError, match="record_gates"), record_gates(read):
            batched(read, [[5]], **given)
    with pytest.raises(ValueError, match="lm_head"):
        batched(adapted(target_modules=["lm_head"]), [[5]], **task)


def error_of(manager: Any) -> str:
    manager.start()
    error = manager.get_result(timeout=60).error
    manager.stop()
    return error


@pytest.mark.slow
def test_requests_without_a_task_fail_and_say_so():
    base = tiny_llama()
    before = base.init_continuous_batching(GREEDY, engine())
    before.add_request([5, 6])
    model = get_peft_model(base, TaskMoELoraConfig(task_type="CAUSAL_LM", task_dim=TASK_DIM)).eval()
    assert "made before an adapter" in error_of(before)
    manager = model.init_continuous_batching(GREEDY, engine())
    with model.disable_adapter():
        manager.add_request([5, 6])
    assert 'Adapter "default" was not active' in error_of(manager)
    manager = model.init_continuous_batching(GREEDY, engine())
    manager.add_request([5, 6], task_embeds=torch.randn(TASK_DIM))
    base.config._attn_implementation = "eager"
    assert "changed its attention implementation" in error_of(manager)
    base._cached_continuous_batching_manager = before
    with pytest.raises(ValueError, match="destroy_cached"):
        batched(model, [[5]], task_embeds=torch.randn(1, TASK_DIM))


@pytest.mark.slow
def test_grpo_generates_with_each_prompts_task(tiny_encoder, word_tokenizer, tmp_path):
    seen: dict[str, list[int]] = {}

    def reward(prompts: Any, completion_ids: Any, **columns: Any) -> list[float]:
        seen.update(zip(prompts, completion_ids, strict=True))
        return torch.rand(len(prompts)).tolist()

    model = adapted(torch.float32)
    attach_task_encoder(model, tiny_encoder, word_tokenizer)
    texts = [" ".join(f"w{4 + (7 * i + k) % 60}" for k in range(3 + i)) for i in range(4)]
    expected = alone(model, word_tokenizer(texts).input_ids)
    arguments = GRPOConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[], max_steps=2,
        per_device_train_batch_size=8, num_generations=2, max_completion_length=8, top_k=1,
        learning_rate=0.0, use_transformers_continuous_batching=True,
        transformers_continuous_batching_config=SMALL,
    )  # fmt: skip
    data = Dataset.from_dict({"prompt": texts})
    GRPOTrainer(model, reward, arguments, data, processing_class=word_tokenizer).train()
    assert [seen[text] for text in texts] == expected
