"""`conditioning.py`: where the task of a forward is visible, when it is gone, and that recomputation sees the right one."""

from __future__ import annotations

import copy
import pickle
import threading
from functools import partial
from typing import Any

import pytest
import torch
from peft import inject_adapter_in_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from peft_taskmoe import TaskMoELoraConfig, task_context
from peft_taskmoe.conditioning import (
    AddAuxLoss,
    AuxLoss,
    TaskState,
    carry_into_recompute,
    current_state,
    entered,
)
from peft_taskmoe.layer import Linear, TaskMoELoraLayer
from peft_taskmoe.conditioning import conditioner_of
from tiny import TASK_DIM, randomise


def tasks(rows: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, TASK_DIM, generator=torch.Generator().manual_seed(seed))


IDS = torch.arange(4, 16).view(2, 6)


def test_the_scope_ends_with_the_block() -> None:
    outer, inner = TaskState(), TaskState()
    assert current_state() is None
    with entered(outer):
        assert current_state() is outer
        with entered(inner):
            assert current_state() is inner
        assert current_state() is outer
        with entered(None):
            assert current_state() is None
        assert current_state() is outer
    assert current_state() is None


def test_the_scope_is_restored_after_an_exception() -> None:
    outer = TaskState()
    with entered(outer):
        with pytest.raises(KeyError), task_context(tasks()):
            raise KeyError
        assert current_state() is outer
    assert current_state() is None


def test_a_failing_forward_leaves_no_task_behind(adapted) -> None:
    model = adapted()
    with pytest.raises(IndexError):
        model(input_ids=torch.tensor([[10_000]]), task_embeds=tasks(1))
    assert current_state() is None
    with pytest.raises(ValueError, match="no task embedding"):
        model(input_ids=IDS)


def test_nested_contexts_use_the_inner_task() -> None:
    layer = _layer()
    x = torch.randn(2, 3, 5)
    with task_context(tasks(seed=1)):
        first = layer(x)
        with task_context(tasks(seed=2)):
            second = layer(x)
        assert torch.equal(layer(x), first)
    assert not torch.allclose(first, second)
    with pytest.raises(
        ValueError,
        match=r"Where the call is not yours, run it inside `with task_context\(task_embeds\):`",
    ):
        layer(x)


def test_an_argument_wins_over_the_context(adapted) -> None:
    model = adapted()
    expected = model(input_ids=IDS, task_embeds=tasks(seed=1)).logits
    with task_context(tasks(seed=2)):
        assert torch.equal(model(input_ids=IDS, task_embeds=tasks(seed=1)).logits, expected)
        assert not torch.allclose(model(input_ids=IDS).logits, expected)
    with task_context(tasks(seed=1)):
        assert torch.equal(model(input_ids=IDS).logits, expected)


def test_a_context_passes_the_recorder_on() -> None:
    """`task_context` inside a recording still shows its gates."""
    seen: list[Any] = []
    with entered(TaskState(recorder=lambda *args: seen.append(args))), task_context(tasks()):
        _layer()(torch.randn(2, 3, 5))
    assert len(seen) == 1


def test_threads_do_not_see_each_other(adapted) -> None:
    """Two threads run the same model at once, each stopped in the middle of its forward until the other is there too."""
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


@pytest.mark.parametrize(
    "task, found",
    [
        ([[1.0]], r"`task_embeds` is a list, but the router multiplies it as a tensor. Pass a float tensor of shape \(batch, task_dim\)"),
        (torch.zeros(3), r"`task_embeds` has shape \(3,\) and dtype torch.float32, but every example needs one float vector"),
        (torch.zeros(1, 2, 3), r"has shape \(1, 2, 3\)"),
        (torch.zeros(2, 3, dtype=torch.long), "dtype torch.int64, but every example needs one float vector"),
    ],
)  # fmt: skip
def test_what_is_no_task_embedding_is_refused(task, found, adapted) -> None:
    with pytest.raises(ValueError, match=found), task_context(task):
        pass
    with pytest.raises(ValueError, match=found):
        adapted()(input_ids=IDS, task_embeds=task)


def _layer(**settings: Any) -> Linear:
    torch.manual_seed(4)
    settings = {
        "task_dim": TASK_DIM,
        "num_experts": 3,
        "r": 2,
        "lora_dropout": 0.0,
        "init_weights": False,
        **settings,
    }
    return Linear(
        nn.Linear(5, 4).requires_grad_(False), "default", 2, 32, TaskMoELoraConfig(**settings)
    )


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("trained_task", [True, False])
def test_recomputation_sees_the_task_of_its_forward(use_reentrant, trained_task) -> None:
    """Two forwards with different tasks before one backward, as in DPO; each block runs again in backward, out of any scope."""
    layer = _layer()
    x = torch.randn(2, 3, 5, requires_grad=True)
    given = [tasks(seed=1).requires_grad_(trained_task), tasks(seed=2).requires_grad_(trained_task)]
    wanted = [
        x,
        *(p for p in layer.parameters() if p.requires_grad),
        *(t for t in given if trained_task),
    ]

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
    assert current_state() is None


def test_wrapping_a_checkpoint_function_twice_is_harmless() -> None:
    once = carry_into_recompute(checkpoint)
    assert carry_into_recompute(once) is once


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert"])
def test_gradient_checkpointing_changes_no_gradient(name, when, use_reentrant, tiny_model) -> None:
    """Switched on before or after the adapter is there; two forwards with different tasks before one backward."""
    labels = torch.tensor([0, 1]) if name == "bert" else IDS

    def gradients(checkpointing: bool) -> dict[str, torch.Tensor]:
        base, runs = tiny_model(name), []
        options = {"use_reentrant": use_reentrant}
        if checkpointing and when == "before":
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
        base = inject_adapter_in_model(
            TaskMoELoraConfig(task_dim=TASK_DIM, num_experts=3, r=2, lora_dropout=0.0), base
        )
        if checkpointing and when == "after":  # by its newer name, where there is one
            enable = getattr(
                base, "activation_checkpointing_enable", base.gradient_checkpointing_enable
            )
            enable(options)
        base.enable_input_require_grads()
        first = next(
            m for m in randomise(base).double().train().modules() if isinstance(m, TaskMoELoraLayer)
        )
        first.register_forward_pre_hook(
            lambda module, args: runs.append(current_state().task_embeds)
        )
        loss = base(input_ids=IDS, labels=labels, task_embeds=tasks(seed=1)).loss
        loss = loss - 2 * base(input_ids=IDS, labels=labels, task_embeds=tasks(seed=2)).loss
        loss.backward()
        assert len(runs) == (4 if checkpointing else 2)  # it did recompute
        return {n: p.grad for n, p in base.named_parameters() if p.requires_grad}

    expected, found = gradients(False), gradients(True)
    assert expected and all(grad is not None for grad in expected.values())
    torch.testing.assert_close(found, expected)


def test_a_copied_model_uses_its_own_layers(adapted) -> None:
    model = adapted()
    expected = model(input_ids=IDS, task_embeds=tasks()).logits
    copied = copy.deepcopy(model)
    own = {id(m) for m in copied.modules() if isinstance(m, TaskMoELoraLayer)}
    conditioner = conditioner_of(copied.get_base_model())
    assert {id(layer) for layer in conditioner.layers} == own
    assert conditioner is not conditioner_of(model.get_base_model())
    for parameter in model.parameters():
        parameter.data.zero_()
    assert torch.equal(copied(input_ids=IDS, task_embeds=tasks()).logits, expected)
    copied.disable_adapter_layers()  # its own flags, too: the original still asks for a task
    copied(input_ids=IDS)
    with pytest.raises(ValueError, match="no task embedding"):
        model(input_ids=IDS)


def test_a_pickled_model_still_takes_the_task(adapted) -> None:
    """As `torch.save(model)` and processes that are sent one do."""
    model = adapted(router_aux_loss_coef=0.5)
    expected = model(input_ids=IDS, task_embeds=tasks()).logits
    loaded = pickle.loads(pickle.dumps(model))
    assert torch.equal(loaded(input_ids=IDS, task_embeds=tasks()).logits, expected)
    for of in (model.train(), loaded.train()):
        torch.testing.assert_close(
            of(input_ids=IDS, labels=IDS, task_embeds=tasks()).loss,
            model(input_ids=IDS, labels=IDS, task_embeds=tasks()).loss,
        )
    assert conditioner_of(loaded.get_base_model()).aux_loss == pytest.approx(
        conditioner_of(model.get_base_model()).aux_loss
    )


def test_a_state_dict_holds_the_weights_only(adapted, tmp_path) -> None:
    model = adapted()
    torch.save(model.state_dict(), tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    assert set(loaded) == {name for name, _ in model.named_parameters()}
    other = adapted()
    for parameter in other.parameters():
        parameter.data.zero_()
    other.load_state_dict(loaded)
    x = {"input_ids": IDS, "task_embeds": tasks()}
    assert torch.equal(other(**x).logits, model(**x).logits)


def test_nothing_is_left_on_a_module(adapted) -> None:
    """A forward leaves no tensor behind that the module had not before."""
    model = adapted()

    def attributes() -> dict[str, list[str]]:
        return {name: sorted(module.__dict__) for name, module in model.named_modules()}

    before = attributes()
    model(input_ids=IDS, task_embeds=tasks())
    model.generate(input_ids=IDS, task_embeds=tasks(), max_new_tokens=2)
    assert attributes() == before


def test_the_weight_of_the_balancing_loss_is_that_of_the_final_loss() -> None:
    """Scaled by whatever stands behind it, such as a division by accumulation steps."""
    aux = AuxLoss(token_mask=None, num_layers={"default": 1}, value=0.25)
    loss = torch.tensor(2.0, requires_grad=True)
    total = AddAuxLoss.apply(loss, aux)
    assert total.item() == 2.25 and aux.weight is None
    (total / 8).backward()
    assert aux.weight.item() == loss.grad.item() == 0.125
