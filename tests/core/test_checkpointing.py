"""Gradient checkpointing: what is recomputed in backward sees the task of its own forward.

Gradients are those of the same model without checkpointing, in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from cases import MODELS, SMALL, adapted, config_for, logits_of, louder, tasks
from peft_taskmoe import TaskMoELoraConfig, task_context
from peft_taskmoe.layer import TaskMoELoraLayer
from peft_taskmoe.recompute import carry_into_recompute
from peft_taskmoe.task_scope import current_state
from versions import needs_new_checkpointing, needs_own_integration

torch.set_num_threads(1)

CHECKPOINTING = [name for name, case in MODELS.items() if case.config_class is not None]


def save_the_products(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keep what matrix products gave, recompute the rest."""
    kept = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
    return CheckpointPolicy.MUST_SAVE if op in kept else CheckpointPolicy.PREFER_RECOMPUTE


def contexts() -> Any:
    return create_selective_checkpoint_contexts(save_the_products)


KINDS: dict[str, dict[str, Any]] = {
    "reentrant": {"use_reentrant": True},
    "not reentrant": {"use_reentrant": False},
    "selective": {"use_reentrant": False, "context_fn": contexts},
}


@pytest.fixture(autouse=True)
def _nothing_is_left_in_scope():
    yield
    assert current_state() is None


def loud(name: str, adapter: str = "token+task", **changes: Any) -> Any:
    """An adapted model in training mode whose task moves its gradients."""
    return louder(adapted(name, adapter, **changes)).double().train()


def loss_of(model: Any, name: str, embeds: torch.Tensor) -> torch.Tensor:
    return logits_of(model(**MODELS[name].inputs(), task_embeds=embeds.double())).pow(2).mean()


def gradients(model: Any, backward: Callable[[], None]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(11)
    backward()
    return {
        key.replace("_checkpoint_wrapped_module.", ""): parameter.grad.clone()
        for key, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        assert gradient.abs().max() > 0, key
        assert (found[key] - gradient).abs().max() <= 1e-6 * gradient.abs().max(), key


def count_forwards(model: nn.Module) -> list[nn.Module]:
    """A list that grows by every run of an adapted layer: a recomputation shows there."""
    ran: list[nn.Module] = []
    for module in model.modules():
        if isinstance(module, TaskMoELoraLayer):
            module.register_forward_pre_hook(lambda module, *_: ran.append(module))
    return ran


def switch_on(model: Any, kind: str) -> None:
    model.enable_input_require_grads()  # as reentrant checkpointing needs it, and trainers do
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=KINDS[kind])


def one_backward(model: Any, name: str) -> Callable[[], None]:
    return lambda: loss_of(model, name, tasks()).backward()


def two_tasks_then_backward(model: Any, name: str) -> Callable[[], None]:
    """As in DPO: both forwards are recomputed after the second has run."""

    def run() -> None:
        first, second = loss_of(model, name, tasks()), loss_of(model, name, -tasks(seed=3))
        (first - 2 * second).backward()

    return run


def accumulation(model: Any, name: str) -> Callable[[], None]:
    def run() -> None:
        for seed in range(3):
            (loss_of(model, name, tasks(seed=seed)) / 3).backward()

    return run


def with_a_look_in_between(model: Any, name: str) -> Callable[[], None]:
    """Evaluation under another task and a disabled adapter before the backward."""

    def run() -> None:
        loss = loss_of(model, name, tasks())
        model.eval()
        with torch.no_grad():
            loss_of(model, name, -tasks())
            with model.disable_adapter():
                loss_of(model, name, tasks())
        model.train()
        loss.backward()

    return run


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CHECKPOINTING)
def test_gradients_of_every_architecture_stay(name, kind):
    model = loud(name)
    expected = gradients(model, two_tasks_then_backward(model, name))
    switch_on(model, kind)
    ran = count_forwards(model)
    assert_same(gradients(model, two_tasks_then_backward(model, name)), expected)
    layers = sum(isinstance(module, TaskMoELoraLayer) for module in model.modules())
    assert len(ran) > 2 * layers  # it did recompute


@pytest.mark.parametrize("run", [one_backward, accumulation, with_a_look_in_between])
@pytest.mark.parametrize("adapter", ["token+task", "task", "token", "top_k"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_every_schedule_stay(kind, adapter, run):
    model = loud("llama", adapter)
    expected = gradients(model, run(model, "llama"))
    switch_on(model, kind)
    assert_same(gradients(model, run(model, "llama")), expected)


@pytest.mark.parametrize("run", [one_backward, two_tasks_then_backward])
@pytest.mark.parametrize("kind", KINDS)
def test_dropout_is_drawn_again_as_it_was(kind, run):
    model = loud("llama", lora_dropout=0.4)
    expected = gradients(model, run(model, "llama"))
    switch_on(model, kind)
    assert_same(gradients(model, run(model, "llama")), expected)
    model.zero_grad()
    torch.manual_seed(12)
    loss_of(model, "llama", tasks()).backward()
    weight = "base_model.model.model.layers.0.mlp.up_proj.taskmoe_lora_A.default.weight"
    assert not torch.equal(model.get_parameter(weight).grad, expected[weight])


def test_the_task_matters_to_the_gradients_compared_here():
    model = loud("llama")
    first = gradients(model, one_backward(model, "llama"))
    second = gradients(model, lambda: loss_of(model, "llama", -tasks()).backward())
    assert all(
        (first[key] - second[key]).abs().max() > 1e-3 * first[key].abs().max() for key in first
    )


def _before_the_adapter() -> Any:
    base = MODELS["llama"].build()
    base.gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(0)
    return louder(get_peft_model(base, config_for("llama")))


def _by_its_new_name() -> Any:
    model = loud("llama")
    model.get_base_model().activation_checkpointing_enable()
    return model


def _between_two_forwards() -> Any:
    model = loud("llama")
    loss_of(model, "llama", tasks()).backward()
    switch_on(model, "not reentrant")
    return model


def _by_wrapping_layers() -> Any:
    """What FSDP's activation checkpointing does, after the adapter is on."""
    model = loud("llama")
    model.get_base_model().config.use_cache = False  # which transformers' own checkpointing does
    layers = set(model.get_base_model().model.layers)
    apply_activation_checkpointing(model, check_fn=lambda module: module in layers)
    return model


@pytest.mark.parametrize(
    "build",
    [
        _before_the_adapter,
        pytest.param(_by_its_new_name, marks=needs_new_checkpointing),
        _between_two_forwards,
        _by_wrapping_layers,
    ],
)
def test_it_does_not_matter_when_and_how_it_is_switched_on(build):
    plain = loud("llama")
    expected = gradients(plain, two_tasks_then_backward(plain, "llama"))
    model = build().double().train()
    ran = count_forwards(model)
    assert_same(gradients(model, two_tasks_then_backward(model, "llama")), expected)
    assert len(ran) == 2 * 2 * 14  # two forwards, each layer twice


def test_switched_off_again():
    model = loud("llama")
    expected = gradients(model, one_backward(model, "llama"))
    switch_on(model, "not reentrant")
    gradients(model, one_backward(model, "llama"))
    model.gradient_checkpointing_disable()
    ran = count_forwards(model)
    assert_same(gradients(model, one_backward(model, "llama")), expected)
    assert len(ran) == 14


@needs_own_integration
def test_through_transformers_own_integration():
    plain = loud("llama")
    expected = gradients(plain, one_backward(plain, "llama"))
    torch.manual_seed(0)
    model = MODELS["llama"].build()
    model.add_adapter(config_for("llama"))
    louder(model).double().train()
    model.gradient_checkpointing_enable({"use_reentrant": False})

    def inside_the_context() -> None:
        with task_context(tasks().double()):
            loss = logits_of(model(**MODELS["llama"].inputs())).pow(2).mean()
        loss.backward()  # outside of it

    found = gradients(model, inside_the_context)
    assert_same({f"base_model.model.{key}": gradient for key, gradient in found.items()}, expected)


class OwnCheckpointing(nn.Module):
    """A module that calls a checkpoint function by itself."""

    def __init__(self, function: Callable[..., Any], use_reentrant: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(10, 8), nn.Linear(8, 4)
        self.function, self.use_reentrant = function, use_reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.function(self.first, x, use_reentrant=self.use_reentrant)
        return self.function(self.second, hidden.tanh(), use_reentrant=self.use_reentrant)


def own(
    function: Callable[..., Any], use_reentrant: bool, router_inputs: str = "token+task"
) -> tuple[Any, torch.Tensor]:
    module = OwnCheckpointing(function, use_reentrant)
    torch.manual_seed(0)
    settings = {**SMALL, "router_inputs": router_inputs, "target_modules": ["first", "second"]}
    model = get_peft_model(module, TaskMoELoraConfig(**settings))
    x = torch.randn(3, 10, generator=torch.Generator().manual_seed(1), requires_grad=True)
    return louder(model).train(), x


def without_checkpoint(function: Callable[..., Any], *args: Any, use_reentrant: bool) -> Any:
    return function(*args)


@pytest.mark.parametrize("use_reentrant", [True, False])
class TestAModuleThatCheckpointsByItself:
    def expected(
        self, use_reentrant: bool, router_inputs: str = "token+task"
    ) -> dict[str, torch.Tensor]:
        model, x = own(without_checkpoint, use_reentrant, router_inputs)
        return gradients(model, lambda: model(x, task_embeds=tasks()).pow(2).sum().backward())

    def test_is_told_that_the_task_is_gone_in_backward(self, use_reentrant):
        model, x = own(checkpoint, use_reentrant)
        out = model(x, task_embeds=tasks())
        with pytest.raises(
            ValueError, match=r"no task embedding.*`with task_context\(task_embeds\):`"
        ):
            out.sum().backward()

    def test_works_inside_a_task_context_around_both(self, use_reentrant):
        model, x = own(checkpoint, use_reentrant)

        def run() -> None:
            with task_context(tasks()):
                model(x).pow(2).sum().backward()

        assert_same(gradients(model, run), self.expected(use_reentrant))

    def test_works_with_a_checkpoint_function_that_carries_the_task(self, use_reentrant):
        model, x = own(carry_into_recompute(checkpoint), use_reentrant)
        found = gradients(model, lambda: model(x, task_embeds=tasks()).pow(2).sum().backward())
        assert_same(found, self.expected(use_reentrant))

    def test_needs_nothing_where_the_router_reads_the_token_alone(self, use_reentrant):
        model, x = own(checkpoint, use_reentrant, "token")
        found = gradients(model, lambda: model(x).pow(2).sum().backward())
        assert_same(found, self.expected(use_reentrant, "token"))
