"""The scope of a task: where it is visible, when it is gone, what recomputation sees."""

from __future__ import annotations

import asyncio
import threading
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from peft_taskmoe import TaskMoELoraConfig, task_context
from peft_taskmoe.layer import Linear
from peft_taskmoe.recompute import carry_into_recompute
from peft_taskmoe.router import normalize_task
from peft_taskmoe.task_scope import TaskState, current_state, entered, user_scope
from tiny import TASK_DIM

IDS = torch.arange(4, 16).view(2, 6)


@pytest.fixture(autouse=True)
def _nothing_is_left_in_scope():
    yield
    assert current_state() is None


def tasks(rows: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, TASK_DIM, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def layer() -> Linear:
    torch.manual_seed(4)
    config = TaskMoELoraConfig(
        task_dim=TASK_DIM, num_experts=3, r=2, lora_dropout=0.0, init_weights=False
    )
    return Linear(nn.Linear(5, 4).requires_grad_(False), "default", 2, 32, config)


@pytest.mark.parametrize("scope", [entered, user_scope])
def test_a_scope_ends_with_its_block(scope) -> None:
    outer, inner = TaskState(), TaskState()
    with scope(outer):
        with scope(inner):
            assert current_state() is inner
        assert current_state() is outer
        with pytest.raises(KeyError), task_context(tasks()):
            raise KeyError
        assert current_state() is outer
    assert current_state() is None


def test_each_adapter_has_its_own_task_unless_one_is_given_to_all() -> None:
    own, given, cpu = tasks(seed=1), tasks(seed=2), torch.device("cpu")
    state = TaskState(adapter_embeds={"a": own})
    assert state.embeds_of("a") is own
    torch.testing.assert_close(
        state.normalized_embeds("a", "rms", 9, cpu), normalize_task(own, "rms", 9)
    )
    assert state.embeds_of("b") is None and state.normalized_embeds("b", "rms", 9, cpu) is None
    state.task_embeds = given
    assert state.embeds_of("a") is state.embeds_of("b") is given


def test_a_task_is_scaled_once_for_all_layers_of_one_width() -> None:
    first, second, cpu = tasks(seed=1), tasks(seed=2), torch.device("cpu")
    state = TaskState(adapter_embeds={"a": first, "b": second})
    once = state.normalized_embeds("a", "matched", 9, cpu)
    assert state.normalized_embeds("a", "matched", 9, cpu) is once
    for adapter, norm, width in (
        ("b", "matched", 9),
        ("a", "rms", 9),
        ("a", "none", 9),
        ("a", "matched", 4),
    ):
        expected = normalize_task(first if adapter == "a" else second, norm, width)
        torch.testing.assert_close(state.normalized_embeds(adapter, norm, width, cpu), expected)
    trained = TaskState(task_embeds=tasks().requires_grad_())
    for norm in ("matched", "rms", "none"):
        twice = [trained.normalized_embeds("a", norm, 9, cpu) for _ in range(2)]
        assert all(found.requires_grad for found in twice)
        assert (twice[0] is not twice[1]) == (norm != "none")
        torch.testing.assert_close(twice[0], normalize_task(tasks(), norm, 9))


def test_a_task_goes_to_the_device_of_its_layer() -> None:
    for task in (tasks(), tasks().requires_grad_()):
        found = TaskState(task_embeds=task).normalized_embeds("a", "rms", 9, torch.device("meta"))
        assert found.device.type == "meta"


def test_a_new_thread_is_in_no_scope() -> None:
    seen: list[Any] = []
    with user_scope(TaskState()):
        thread = threading.Thread(target=lambda: seen.append(current_state()))
        thread.start()
        thread.join()
    assert seen == [None]


def test_a_users_scope_inside_of_a_forward_wins() -> None:
    running, given = TaskState(), TaskState()
    with entered(running):
        with user_scope(given):
            assert current_state() is given
        assert current_state() is running


def test_a_failing_forward_leaves_no_task_behind(adapted) -> None:
    model = adapted()
    with pytest.raises(IndexError):
        model(input_ids=torch.tensor([[10_000]]), task_embeds=tasks(1))
    with pytest.raises(ValueError, match="no task embedding"):
        model(input_ids=IDS)


def test_nested_contexts_use_the_inner_task(layer) -> None:
    x = torch.randn(2, 3, 5)
    with task_context(tasks(seed=1)):
        first = layer(x)
        with task_context(tasks(seed=2)):
            second = layer(x)
        assert torch.equal(layer(x), first)
    assert not torch.allclose(first, second)
    with pytest.raises(ValueError, match=r"run inside `with task_context\(task_embeds\):`"):
        layer(x)


def test_an_argument_wins_over_the_context(adapted) -> None:
    model = adapted()
    expected = model(input_ids=IDS, task_embeds=tasks(seed=1)).logits
    with task_context(tasks(seed=2)):
        assert torch.equal(model(input_ids=IDS, task_embeds=tasks(seed=1)).logits, expected)
        assert not torch.allclose(model(input_ids=IDS).logits, expected)
    with task_context(tasks(seed=1)):
        assert torch.equal(model(input_ids=IDS).logits, expected)


def test_a_context_passes_the_recorder_on(layer) -> None:
    """`task_context` inside a recording still shows its gates."""
    seen: list[Any] = []
    with user_scope(TaskState(recorder=lambda *args: seen.append(args))), task_context(tasks()):
        layer(torch.randn(2, 3, 5))
    assert len(seen) == 1


def test_threads_do_not_see_each_other(adapted) -> None:
    """Two threads are inside a forward of the same model at once."""
    model = adapted()
    expected = [model(input_ids=IDS, task_embeds=tasks(seed=i)).logits for i in range(2)]
    both_inside = threading.Barrier(2, timeout=20)
    middle = model.get_base_model().model.layers[1]
    middle.register_forward_pre_hook(lambda module, args: (both_inside.wait(), None)[1])
    found: dict[int, torch.Tensor] = {}

    def run(i: int) -> None:
        with torch.no_grad():
            found[i] = model(input_ids=IDS, task_embeds=tasks(seed=i)).logits

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    with task_context(tasks(seed=9)):  # this thread's, which the others must not see
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert sorted(found) == [0, 1]
    for i in range(2):
        torch.testing.assert_close(found[i], expected[i])


def test_coroutines_do_not_see_each_other(adapted) -> None:
    """Each waits inside its `task_context` while others enter and leave theirs."""
    model = adapted()
    given = [tasks(seed=i) for i in range(4)]
    with torch.no_grad():
        expected = [model(input_ids=IDS, task_embeds=task).logits for task in given]

    async def one(i: int) -> torch.Tensor:
        with task_context(given[i]):
            await asyncio.sleep(0.001 * (i % 3))
            return model(input_ids=IDS).logits.detach()

    async def all_of_them() -> list[torch.Tensor]:
        return await asyncio.gather(*[one(i % 4) for i in range(12)])

    for i, found in enumerate(asyncio.run(all_of_them())):
        torch.testing.assert_close(found, expected[i % 4])
    with pytest.raises(ValueError, match="no task embedding"):
        model(input_ids=IDS)


@pytest.mark.parametrize(
    "task, found",
    [
        ([[1.0]], r"must be a float tensor of shape \(batch, task_dim\), got list"),
        (torch.zeros(3), r"got of shape \(3,\) and dtype torch.float32"),
        (torch.zeros(1, 2, 3), r"got of shape \(1, 2, 3\)"),
        (torch.zeros(2, 3, dtype=torch.long), "got of shape .* and dtype torch.int64"),
    ],
)
def test_what_is_no_task_embedding_is_refused(task, found, adapted) -> None:
    with pytest.raises(ValueError, match=found), task_context(task):
        pass
    with pytest.raises(ValueError, match=found):
        adapted()(input_ids=IDS, task_embeds=task)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("trained_task", [True, False])
def test_recomputation_sees_the_task_of_its_forward(use_reentrant, trained_task, layer) -> None:
    """Two tasks before one backward, as in DPO; each block runs again out of any scope."""
    x = torch.randn(2, 3, 5, requires_grad=True)
    given = [tasks(seed=1).requires_grad_(trained_task), tasks(seed=2).requires_grad_(trained_task)]
    wanted = [x, *(p for p in layer.parameters() if p.requires_grad)] + given * trained_task

    def gradients(run: Any) -> list[torch.Tensor]:
        losses = []
        for task in given:
            with task_context(task):
                losses.append(run(layer, x).square().sum())
        for tensor in wanted:
            tensor.grad = None
        (losses[0] - 2 * losses[1]).backward()
        return [tensor.grad for tensor in wanted]

    expected = gradients(lambda function, x: function(x))
    wrapped = carry_into_recompute(partial(checkpoint, use_reentrant=use_reentrant))
    torch.testing.assert_close(gradients(wrapped), expected)


def test_wrapping_a_checkpoint_function_is_idempotent() -> None:
    once = carry_into_recompute(checkpoint)
    assert carry_into_recompute(once) is once


def test_a_checkpoint_outside_of_a_forward_is_the_usual_one() -> None:
    x = torch.randn(3, requires_grad=True)
    carry_into_recompute(partial(checkpoint, use_reentrant=False))(torch.sin, x).sum().backward()
    assert torch.equal(x.grad, x.detach().cos())
