"""`torch.compile`: no graph break in an adapted layer, no recompilation, the same gradients.

`fullgraph=True` raises at the first graph break, which `.item()` and branches on data are;
`error_on_recompile` at the first recompilation. Both are on unless a test says otherwise.
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

pytestmark = pytest.mark.slow


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
    made = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    made["task_embeds"] = torch.randn(rows, TASK_DIM, generator=generator, dtype=torch.float64)
    for value in made.values() if dynamic else ():
        mark_dynamic(value, 0)
    return made


@pytest.fixture
def model(adapted):
    """A model of one layer, in float64."""
    return lambda **settings: adapted(model_changes={"num_hidden_layers": 1}, **settings).double()


@pytest.fixture
def layer(model):
    """One adapted layer (16 -> 16), in float64."""
    return lambda **settings: model(**settings).get_base_model().model.layers[0].self_attn.q_proj


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def same_step(model: PeftModel, compiled: Any, inputs: dict[str, torch.Tensor]) -> None:
    """One training step of each gives the same loss, logits and gradients."""
    expected = model(**inputs)
    expected.loss.backward()
    wanted = gradients(model)
    found = compiled(**inputs)
    found.loss.backward()
    torch.testing.assert_close((found.loss, found.logits), (expected.loss, expected.logits))
    torch.testing.assert_close(gradients(model), wanted)
    assert wanted and all(grad.abs().max() > 0 for grad in wanted.values())


def same_layer(eager: Linear, compiled: Any, **close: float) -> None:
    """The same outputs and gradients for three batches."""
    assert isinstance(eager, Linear)
    dtype = eager.base_layer.weight.dtype
    for seed in range(3):
        x = torch.randn(2, 5, 16, dtype=dtype, requires_grad=True)
        weights = [x, *(p for p in eager.parameters() if p.requires_grad)]
        with task_context(batch(seed=seed)["task_embeds"].to(dtype)):
            outs = compiled(x), eager(x)
        grads = (torch.autograd.grad(out.square().sum(), weights) for out in outs)
        torch.testing.assert_close(*outs, **close)
        torch.testing.assert_close(*grads, **close)


@pytest.mark.parametrize("settings", [
    {}, {"router_inputs": "token"}, {"router_inputs": "task"}, {"top_k": 2}, {"lora_dropout": 0.5},
])  # fmt: skip
def test_a_layer_is_one_graph(layer, settings) -> None:
    eager = layer(**settings).train("lora_dropout" not in settings)
    counter = CompileCounterWithBackend("aot_eager")
    same_layer(eager, torch.compile(eager, backend=counter, fullgraph=True))
    assert counter.frame_count == 1


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler on a CPU")
def test_inductor(layer) -> None:
    eager = layer(top_k=2).float().train()
    same_layer(eager, torch.compile(eager, fullgraph=True), atol=1e-4, rtol=1e-4)


def test_a_layer_takes_two_products_more_than_lora(layer) -> None:
    """LoRA's two forward and four backward, and the task's; the token's is part of A's."""
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


@pytest.mark.parametrize("router_inputs", ["token+task", "task"])
def test_a_model_is_one_graph_for_all_batches(model, router_inputs) -> None:
    """Batches of other contents and of other sizes, one graph."""
    eager = model(router_inputs=router_inputs).train()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(eager, backend=counter, fullgraph=True)
    for rows in (2, 2, 3, 5):
        same_step(eager, compiled, batch(rows, seed=counter.frame_count + rows, dynamic=True))
    assert counter.frame_count == 1


@pytest.mark.parametrize("settings", [{"top_k": 2}, {"router_inputs": "task"}])
def test_inference_is_one_graph(model, settings) -> None:
    eager = model(target_modules=["q_proj", "down_proj"], **settings)
    compiled = torch.compile(eager, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for seed in range(2):
            inputs = batch(seed=seed)
            torch.testing.assert_close(compiled(**inputs).logits, eager(**inputs).logits)


@pytest.mark.parametrize("coefficient, checkpointing", [(0.0, True), (0.7, False), (0.7, True)])
def test_checkpointing_and_the_load_balancing_loss(model, coefficient, checkpointing) -> None:
    """Both break the graph around the layers; gradients stay what they are."""
    settings = {"router_aux_loss_coef": coefficient, "target_modules": ["q_proj", "down_proj"]}
    eager = model(**settings).train()
    if checkpointing:
        eager.gradient_checkpointing_enable({"use_reentrant": False})
        eager.enable_input_require_grads()
    compiled = torch.compile(eager, backend="aot_eager")
    with dynamo_config.patch(error_on_recompile=False):
        for seed in range(2):
            same_step(eager, compiled, batch(seed=seed))


def test_packing_and_the_encoder_stay_outside(model, tiny_encoder, word_tokenizer) -> None:
    """Reading prompts breaks the graph before the model, not in it."""
    eager = attach_task_encoder(model(target_modules=["q_proj"]), tiny_encoder, word_tokenizer)
    packed = {
        "input_ids": batch(1, 8)["input_ids"],
        "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]]),
        "labels": torch.tensor([[-100, -100, 5, 6, -100, 7, 8, 9]]),
    }
    other = {**packed, "input_ids": packed["input_ids"].flip(1)}
    compiled = torch.compile(eager, backend="aot_eager")
    with torch.no_grad(), dynamo_config.patch(error_on_recompile=False):
        expected = [eager(**inputs).logits for inputs in (packed, other)]
        found = [compiled(**inputs).logits for inputs in (packed, other)]
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(*expected)
