"""`torch.compile`: no graph break in an adapted layer, no recompilation between batches, the same outputs and gradients.

`fullgraph=True` raises at the first graph break, which `.item()` and branches on data are; `error_on_recompile` at the first
recompilation. Both are on wherever a test does not say otherwise.
"""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch._dynamo import config as dynamo_config
from torch._dynamo import mark_dynamic
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch.aot_autograd import make_boxed_func

from peft_taskmoe import attach_task_encoder, task_context
from peft_taskmoe.layer import Linear
from tiny import TASK_DIM

SMALL = {"num_hidden_layers": 1}


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    with dynamo_config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


def batch(
    rows: int = 2, length: int = 5, seed: int = 0, dynamic: bool = False
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 60, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[-1, -2:] = 0
    made = {
        "input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100),
        "task_embeds": torch.randn(rows, TASK_DIM, generator=generator, dtype=torch.float64),
    }  # fmt: skip
    if dynamic:
        for value in made.values():
            mark_dynamic(value, 0)
    return made


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def same_step(
    model: PeftModel, compiled: Any, inputs: dict[str, torch.Tensor], **kwargs: Any
) -> None:
    """One training step of each gives the same loss, logits and gradients."""
    expected = model(**inputs, **kwargs)
    expected.loss.backward()
    wanted = gradients(model)
    found = compiled(**inputs, **kwargs)
    found.loss.backward()
    torch.testing.assert_close((found.loss, found.logits), (expected.loss, expected.logits))
    torch.testing.assert_close(gradients(model), wanted)
    assert wanted and all(grad.abs().max() > 0 for grad in wanted.values())


@pytest.fixture
def layer(adapted):
    """One adapted layer (16 -> 16), in float64."""
    return lambda **settings: (
        adapted(model_changes=SMALL, **settings)
        .double()
        .get_base_model()
        .model.layers[0]
        .self_attn.q_proj
    )


@pytest.mark.parametrize("settings", [
    {}, {"router_inputs": "token"}, {"router_inputs": "task"}, {"top_k": 2}, {"lora_dropout": 0.5},
])  # fmt: skip
def test_a_layer_is_one_graph(layer, settings) -> None:
    eager = layer(**settings).train("lora_dropout" not in settings)
    assert isinstance(eager, Linear)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(eager, backend=counter, fullgraph=True)
    for seed in range(3):
        x, task = (
            torch.randn(2, 5, 16, dtype=torch.float64, requires_grad=True),
            batch(seed=seed)["task_embeds"],
        )
        with task_context(task):
            expected, found = eager(x), compiled(x)
        torch.testing.assert_close(found, expected)
        wanted = torch.autograd.grad(
            expected.square().sum(), [x, *filter(lambda p: p.requires_grad, eager.parameters())]
        )
        got = torch.autograd.grad(
            found.square().sum(), [x, *filter(lambda p: p.requires_grad, eager.parameters())]
        )
        torch.testing.assert_close(got, wanted)
    assert counter.frame_count == 1


def test_a_layer_takes_two_products_more_than_lora(layer) -> None:
    """LoRA has two forward and four backward; ours those, and the task's forward and backward: the token's is part of A's."""
    products: list[int] = []

    def count(graph: torch.fx.GraphModule, _: Any) -> Any:
        called = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        products.append(sum("mm." in name for name in called))
        return make_boxed_func(graph.forward)

    compiled = torch.compile(
        layer().train(), backend=aot_autograd(fw_compiler=count, bw_compiler=count)
    )
    with task_context(batch()["task_embeds"]):
        out = compiled(torch.randn(2, 5, 16, dtype=torch.float64, requires_grad=True))
    out.sum().backward()
    base = 1
    assert products == [base + 2 + 1, base + 4 + 1]


def test_a_model_is_one_graph_for_all_batches(adapted) -> None:
    """Batches of other contents and of other sizes, one graph."""
    model = adapted(model_changes=SMALL).double().train()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for rows in (2, 2, 3, 5):
        same_step(model, compiled, batch(rows, seed=counter.frame_count + rows, dynamic=True))
    assert counter.frame_count == 1


def test_inference_is_one_graph(adapted) -> None:
    model = adapted(model_changes=SMALL, target_modules=["q_proj", "down_proj"], top_k=2).double()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for seed in range(2):
            inputs = batch(seed=seed)
            torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits)


def test_gradient_checkpointing(adapted) -> None:
    """transformers' own checkpointing breaks the graph around the layers; gradients stay what they are."""
    model = adapted(model_changes=SMALL, target_modules=["q_proj", "down_proj"]).double().train()
    compiled = torch.compile(model, backend="aot_eager")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    with dynamo_config.patch(error_on_recompile=False):
        for seed in range(2):
            same_step(model, compiled, batch(seed=seed))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_load_balancing_loss_leaves_the_graph(adapted, checkpointing) -> None:
    """Its gradient's weight is known in backward only, so each layer breaks the graph there; nothing of it is lost."""
    model = (
        adapted(model_changes=SMALL, router_aux_loss_coef=0.7, target_modules=["q_proj"])
        .double()
        .train()
    )
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    compiled = torch.compile(model, backend="aot_eager")
    with dynamo_config.patch(error_on_recompile=False):
        same_step(model, compiled, batch())


def test_packing_and_the_encoder_stay_outside(adapted, tiny_encoder, word_tokenizer) -> None:
    """Reading prompts is no matter of tensors, so the automatic way breaks the graph before the model, not in it."""
    model = attach_task_encoder(
        adapted(model_changes=SMALL, target_modules=["q_proj"]).double(),
        tiny_encoder,
        word_tokenizer,
    )
    inputs = batch(1, 8)
    packed = {
        "input_ids": inputs["input_ids"], "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]]),
        "labels": torch.tensor([[-100, -100, 5, 6, -100, 7, 8, 9]]),
    }  # fmt: skip
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad(), dynamo_config.patch(error_on_recompile=False):
        expected = model(**packed).logits
        torch.testing.assert_close(compiled(**packed).logits, expected)
        other = {**packed, "input_ids": packed["input_ids"].flip(1)}
        torch.testing.assert_close(compiled(**other).logits, model(**other).logits)
    assert not torch.allclose(model(**other).logits, expected)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler on a CPU")
def test_inductor(layer) -> None:
    eager = layer(top_k=2).float().train()
    compiled = torch.compile(eager, fullgraph=True)
    x, task = torch.randn(2, 5, 16, requires_grad=True), batch()["task_embeds"].float()
    weights = [x, *filter(lambda p: p.requires_grad, eager.parameters())]
    with task_context(task):
        expected, found = eager(x), compiled(x)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    wanted, got = (torch.autograd.grad(out.square().sum(), weights) for out in (expected, found))
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
