"""Layers that read the same tensor (q, k and v; gate and up) are computed in one function: when, and that nothing else changes."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from peft import inject_adapter_in_model
from torch import nn
from torch.utils.checkpoint import checkpoint

import peft_taskmoe.fused
import peft_taskmoe.layer
from cases import MODELS, WIDTH, adapted, config_for, logits_of, louder, tasks
from peft_taskmoe import record_gates, task_context
from peft_taskmoe.conditioning import made_ahead
from peft_taskmoe.layer import Linear, TaskMoELoraLayer
from peft_taskmoe.model import conditioner_of

LLAMA = [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)]


def loud(name: str = "llama", adapter: str = "token+task", **changes: Any) -> Any:
    return louder(adapted(name, adapter, **changes)).double()


def alone(model: nn.Module) -> nn.Module:
    """The model with every layer computed by itself."""
    conditioner_of(getattr(model, "get_base_model", lambda: model)()).group([])
    return model


@contextmanager
def functions(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many layers each call of the fused function computed."""
    sizes: list[int] = []

    class Spy(peft_taskmoe.fused.FusedUpdate):
        @classmethod
        def apply(cls, x: torch.Tensor, *args: Any) -> Any:
            outs = peft_taskmoe.fused.FusedUpdate.apply(x, *args)
            sizes.append(len(outs))
            return outs

    with monkeypatch.context() as patch:
        patch.setattr(peft_taskmoe.layer, "FusedUpdate", Spy)
        yield sizes


def outputs_and_gradients(model: Any, name: str = "llama") -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(5)
    logits = logits_of(model(**MODELS[name].inputs(), task_embeds=tasks().double()))
    logits.square().mean().backward()
    found = {"logits": logits.detach()}
    return found | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).abs().max() <= 1e-9 * value.abs().max(), name


@pytest.mark.parametrize("adapter", ["token+task", "token", "task", "top_k"])
@pytest.mark.parametrize(
    "name, sizes",
    [
        ("llama", [3, 1, 2, 1] * 2),
        ("gemma", [3, 1, 2, 1]),
        ("gpt2", [1] * 8),  # one linear for q, k and v
        ("bert_sequences", [3, 1, 1, 1, 1]),
        # Encoder; decoder: q reads another tensor than k and v in its cross-attention, so it is never with them.
        ("t5", [1, 2, 1, 2, 1, 1, 2, 1, 1, 2, 1, 2, 1]),
    ],
)
def test_outputs_and_gradients_are_those_of_each_layer_alone(
    name, sizes, adapter, monkeypatch
) -> None:
    model = loud(name, adapter)
    with functions(monkeypatch) as seen:
        found = outputs_and_gradients(model, name)
    assert seen == sizes
    assert_same(found, outputs_and_gradients(alone(model), name))


def test_scales_of_its_own_stay_each_layers_own() -> None:
    model = loud(alpha_pattern={"k_proj": 9, "up_proj": 1})
    found = outputs_and_gradients(model)
    assert_same(found, outputs_and_gradients(alone(model)))
    assert not torch.allclose(found["logits"], outputs_and_gradients(loud())["logits"])


def test_the_first_forward_has_the_very_bits_of_the_second() -> None:
    """Who reads the same tensor is known before it runs, and not learned from it."""
    model = loud().float()
    batch = {**MODELS["llama"].inputs(), "task_embeds": tasks()}
    assert torch.equal(model(**batch).logits, model(**batch).logits)


def test_dropout_draws_one_mask_for_the_layers_that_read_the_same_tensor(monkeypatch) -> None:
    model = loud(lora_dropout=0.4).train()
    drawn = []
    draw = peft_taskmoe.fused.draw_dropped
    monkeypatch.setattr(
        peft_taskmoe.fused, "draw_dropped", lambda like, p: drawn.append(draw(like, p)) or drawn[-1]
    )
    outputs_and_gradients(model)
    assert len(drawn) == 2 * len(LLAMA)
    outputs_and_gradients(alone(model))
    assert len(drawn) == 2 * len(LLAMA) + 2 * 7


def named(model: nn.Module, name: str) -> list[Linear]:
    return [m for n, m in model.named_modules() if n.endswith(name) and isinstance(m, Linear)]


def _hook_before(layer: Linear) -> None:
    """As FSDP, ZeRO-3 and offloading bring weights."""
    layer.register_forward_pre_hook(lambda module, args: None)


def _hook_the_base(layer: Linear) -> None:
    layer.base_layer.register_forward_hook(lambda module, args, out: out + 1)


def _train_the_base(layer: Linear) -> None:
    layer.base_layer.weight.requires_grad_(True)


def _other_rank(layer: Linear) -> None:
    layer.update_layer("default", 5, 10, layer.configs["default"])
    layer.double()


def _other_dropout(layer: Linear) -> None:
    layer.lora_dropout["default"] = 0.5


def _disabled(layer: Linear) -> None:
    layer._disable_adapters = True


@pytest.mark.parametrize(
    "change",
    [_hook_before, _hook_the_base, _train_the_base, _other_rank, _other_dropout, _disabled],
    ids=lambda change: change.__name__.strip("_"),
)
def test_a_layer_that_differs_is_computed_alone(change, monkeypatch) -> None:
    model = loud().train()
    for layer in named(model, "k_proj"):
        change(layer)
    with functions(monkeypatch) as sizes:
        found = outputs_and_gradients(model)
    assert sizes[0] == 2  # q and v
    assert sum(sizes) <= 14
    if change is not _other_dropout:  # which draws masks in another order
        assert_same(found, outputs_and_gradients(alone(model)))


def _another_input(layer: Linear) -> None:
    own = type(layer).forward
    layer.forward = lambda x, *args, **kwargs: own(layer, x + 1, *args, **kwargs)


def _changed_input(layer: Linear) -> None:
    """Reads the same tensor, which somebody changes just before."""
    own = type(layer).forward
    layer.forward = lambda x, *args, **kwargs: own(layer, x.mul_(2), *args, **kwargs)


@pytest.mark.parametrize("change", [_another_input, _changed_input])
def test_a_layer_that_is_given_another_tensor_is_right_and_from_then_on_alone(
    change, monkeypatch
) -> None:
    model = loud()
    for layer in named(model, "v_proj"):
        change(layer)

    def run() -> torch.Tensor:
        with torch.no_grad():
            return model(**MODELS["llama"].inputs(), task_embeds=tasks().double()).logits

    with functions(monkeypatch) as first:
        found = run()
    assert first[:2] == [3, 1]  # v once in vain, once as it was called
    with functions(monkeypatch) as second:
        again = run()
    assert second[:2] == [2, 1]
    expected = (alone(model), run())[1]
    torch.testing.assert_close([found, again], [expected, expected], rtol=0, atol=1e-9)
    assert all(
        len(group) == 2 for group in conditioner_of(model.get_base_model()).together.values()
    )


def test_where_q_alone_reads_another_tensor_k_and_v_stay_together(monkeypatch) -> None:
    model = loud()
    for layer in named(model, "q_proj"):
        _another_input(layer)
    for sizes in ([3, 1, 1, 1, 2, 1] * 2, [1, 2, 1, 2, 1] * 2):
        with functions(monkeypatch) as seen:
            found = outputs_and_gradients(model)
        assert seen == sizes
    assert_same(found, outputs_and_gradients(alone(model)))


def test_a_generation_learns_too_who_does_not_read_the_same(monkeypatch) -> None:
    model = loud(adapter="top_k")  # whose decoding steps take the general way
    for layer in named(model, "v_proj"):
        _another_input(layer)
    batch = {**MODELS["llama"].inputs(), "task_embeds": tasks().double()}
    states = []
    for layer in named(model, "down_proj"):
        layer.register_forward_hook(lambda *_: states.append(peft_taskmoe.layer.current_state()))
    with functions(monkeypatch) as sizes:
        found = model.generate(**batch, max_new_tokens=3, do_sample=False)
    assert sizes == [3, 1, 1, 2, 1] * 2 + [2, 1, 1, 2, 1] * 4
    assert states and not any(
        state.made_ahead for state in states
    )  # of the prompt, all through the generation
    assert torch.equal(found, alone(model).generate(**batch, max_new_tokens=3, do_sample=False))


@pytest.mark.parametrize("missing", ["storage", "shape", "device"])
@pytest.mark.parametrize(
    "part", ["base_layer", "taskmoe_lora_A", "taskmoe_lora_B", "taskmoe_lora_router"]
)
def test_weights_that_are_not_there_before_the_call_are_not_read_before_it(
    part, missing, monkeypatch
) -> None:
    """FSDP and ZeRO-3 empty them between calls: their storage or their shape; offloading leaves them on the meta device."""
    model = loud()
    layers = named(model, "k_proj")
    whole = []
    for layer in layers:
        module = getattr(layer, part)
        module = module if part == "base_layer" else module["default"]
        whole.append((module, module.weight.data))
        if missing == "device":
            module.weight = nn.Parameter(
                torch.empty_like(module.weight, device="meta"), requires_grad=False
            )
        elif missing == "shape":
            module.weight.data = torch.empty(0, dtype=torch.float64)
        else:
            module.weight.data = torch.empty_like(module.weight)
            module.weight.untyped_storage().resize_(0)
        own = type(layer).forward

        def brought(
            x: torch.Tensor, layer: Any = layer, own: Any = own, place: int = len(whole) - 1
        ) -> Any:
            module, data = whole[place]
            module.weight = nn.Parameter(data, requires_grad=False)
            return own(layer, x)

        layer.forward = brought
    with functions(monkeypatch) as sizes, torch.no_grad():
        found = model(**MODELS["llama"].inputs(), task_embeds=tasks().double()).logits
    assert sizes == [2, 1, 1, 2, 1] * 2
    with torch.no_grad():
        expected = alone(model)(**MODELS["llama"].inputs(), task_embeds=tasks().double()).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


def test_nothing_of_a_forward_is_left_behind() -> None:
    model = loud()
    states = []
    for layer in named(model, "down_proj"):
        layer.register_forward_hook(lambda *_: states.append(peft_taskmoe.layer.current_state()))
    outputs_and_gradients(model)
    assert states
    assert all(not state.made_ahead for state in states)


def test_what_needs_the_gates_is_computed_as_before(monkeypatch) -> None:
    """A recorder and the load-balancing loss take the plain form, for every layer."""
    model = loud()
    with functions(monkeypatch) as sizes, record_gates(model) as record:
        model(**MODELS["llama"].inputs(), task_embeds=tasks().double())
    assert sizes == []
    assert len(record.layers()) == 14


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inference(mode, monkeypatch) -> None:
    """In inference mode tensors do not tell whether they were changed, so there each layer is computed alone."""
    model = loud()
    batch = {**MODELS["llama"].inputs(), "task_embeds": tasks().double()}
    with functions(monkeypatch) as sizes, mode():
        found = model(**batch).logits
    assert sizes == ([3, 1, 2, 1] * 2 if mode is torch.no_grad else [1] * 14)
    torch.testing.assert_close(found, alone(model)(**batch).logits.detach(), rtol=0, atol=1e-9)


def test_a_generations_prompt_is_computed_together_too(monkeypatch) -> None:
    model = loud()
    batch = {**MODELS["llama"].inputs(), "task_embeds": tasks().double()}
    options = {
        "max_new_tokens": 3,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    with functions(monkeypatch) as sizes:
        found = model.generate(**batch, **options)
    assert sizes == [3, 1, 2, 1] * 2
    expected = alone(model).generate(**batch, **options)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-9)


def test_a_second_adapter_and_a_bare_model(monkeypatch) -> None:
    model = loud()
    model.add_adapter("other", config_for("llama"))
    model.double()
    batch = {**MODELS["llama"].inputs(), "task_embeds": tasks().double()}
    for active, sizes in (
        ("other", [3, 1, 2, 1] * 2),
        ("default", [3, 1, 2, 1] * 2),
        (["default", "other"], None),
    ):
        model.base_model.set_adapter(active)
        with functions(monkeypatch) as seen:
            found = model(**batch).logits
        if sizes is not None:
            assert seen == sizes
        groups = conditioner_of(model.get_base_model()).together.values()
        expected = alone(model)(**batch).logits
        conditioner_of(model.get_base_model()).group(groups)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    bare = inject_adapter_in_model(config_for("llama"), MODELS["llama"].build()).double()
    with functions(monkeypatch) as seen:
        bare(**batch)
    assert seen == [3, 1, 2, 1] * 2


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_groups_of_its_own_layers(copied) -> None:
    model = loud()
    twin = copied(model)
    groups = conditioner_of(twin.get_base_model()).together
    assert len(groups) == 4
    own = {m for m in twin.modules() if isinstance(m, TaskMoELoraLayer)}
    assert all(layer in own for group in groups.values() for layer in group)
    assert_same(outputs_and_gradients(twin), outputs_and_gradients(model))


@pytest.mark.parametrize("stream", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("base", [torch.bfloat16, torch.float32])
def test_autocast(base, stream, monkeypatch) -> None:
    """As trainers with `bf16=True` run it: adapters in float32. A base in float32 is called, so that autocast casts it."""
    model = loud().to(base)
    for name, parameter in model.named_parameters():
        if "taskmoe_lora_" in name:
            parameter.data = parameter.data.float()
    embeds = model.get_input_embeddings()(MODELS["llama"].inputs()["input_ids"]).detach().to(stream)

    def run() -> dict[str, torch.Tensor]:
        model.zero_grad()
        leaf = embeds.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(inputs_embeds=leaf, task_embeds=tasks()).logits
        logits.float().square().mean().backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        return {"logits": logits.detach(), "input": leaf.grad, **grads}

    with functions(monkeypatch) as sizes:
        found = run()
    assert sizes == ([3, 1, 2, 1] * 2 if base is torch.bfloat16 else [1] * 14)
    expected = (alone(model), run())[1]
    assert len(found) == 2 + 3 * 14
    for name, value in expected.items():
        assert (
            found[name].dtype
            == value.dtype
            == (torch.float32 if "taskmoe" in name else value.dtype)
        )
        assert (found[name] - value).abs().max() < 0.05 * value.abs().max(), name


def test_a_layer_called_outside_of_autocast_is_not_given_what_was_made_inside(monkeypatch) -> None:
    model = loud().to(torch.bfloat16)
    for layer in named(model, "v_proj"):
        own = type(layer).forward

        def outside(x: torch.Tensor, layer: Any = layer, own: Any = own) -> torch.Tensor:
            with torch.autocast("cpu", enabled=False):
                return own(layer, x)

        layer.forward = outside
    for name, parameter in model.named_parameters():
        if "taskmoe_lora_" in name:
            parameter.data = parameter.data.float()
    with functions(monkeypatch) as sizes, torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(**MODELS["llama"].inputs(), task_embeds=tasks())
    assert sizes[:2] == [3, 1]


class Attention(nn.Module):
    """Three linears that read the same tensor, or with `from_memory` two that read another one; it checkpoints as it is told to."""

    def __init__(self, memory: int = WIDTH, from_memory: bool = False) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (
            nn.Linear(size, WIDTH) for size in (WIDTH, memory, memory)
        )
        self.memory, self.from_memory, self.how = memory, from_memory, "no"
        self.checkpoint_fn: Any = None

    def whole(self, x: torch.Tensor) -> torch.Tensor:
        other = x.new_ones(*x.shape[:-1], self.memory) if self.from_memory else x
        return self.q_proj(x).tanh() * self.k_proj(other) + self.v_proj(other).sin()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.how == "no":
            return self.whole(x)
        again = self.checkpoint_fn or partial(
            checkpoint, use_reentrant=self.how.startswith("reentrant")
        )
        if "each" not in self.how:
            return again(self.whole, x)
        return again(self.q_proj, x).tanh() * again(self.k_proj, x) + again(self.v_proj, x).sin()


class Wrapped(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.block = Attention(**options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(x)


def attention(router_inputs: str, dropout: float = 0.0, **options: Any) -> Any:
    torch.manual_seed(0)
    config = config_for("plain", lora_dropout=dropout, router_inputs=router_inputs)
    config.target_modules = {"q_proj", "k_proj", "v_proj"}
    return louder(inject_adapter_in_model(config, Wrapped(**options))).double().train()


def gradients_of(model: Any, embeds: torch.Tensor | None) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(5)
    x = torch.randn(3, 4, WIDTH, dtype=torch.float64, requires_grad=True)
    with nullcontext() if embeds is None else task_context(embeds):
        out = model(x)
        out.square().sum().backward()
    return {
        "x": x.grad,
        **{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None},
    }


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("how", ["reentrant", "not reentrant"])
@pytest.mark.parametrize("router_inputs", ["token", "token+task"])
def test_a_checkpoint_that_knows_nothing_of_the_task_recomputes_together(
    router_inputs, how, dropout, monkeypatch
) -> None:
    """PyTorch's own, called by a module of the user's: what runs in backward runs outside of the model's forward."""
    model = attention(router_inputs, dropout)
    embeds = None if router_inputs == "token" else tasks().double()
    expected = gradients_of(model, embeds)
    model.block.how = how
    with functions(monkeypatch) as sizes:
        found = gradients_of(model, embeds)
    assert sizes == [3, 3]
    assert_same(found, expected)


@pytest.mark.parametrize("how", ["reentrant, each", "not reentrant, each"])
def test_nothing_is_handed_from_one_checkpointed_part_to_another(how) -> None:
    """Each linear is a part of its own, with a mask of its own, which the recomputation draws again."""
    model = attention("token", 0.4)
    model.block.how = how
    model.block.checkpoint_fn = partial(checkpoint, use_reentrant=how.startswith("reentrant"))
    found = gradients_of(model, None)  # q still expects the others
    assert_same(found, gradients_of(model, None))  # k expects v
    assert conditioner_of(model).together == {}
    assert_same(found, gradients_of(model, None))
    model.block.how = "no"
    assert_same(found, gradients_of(model, None))  # each alone, without checkpoints


def test_layers_of_other_widths_are_not_expected_to_read_the_same() -> None:
    model = attention("token", memory=24, from_memory=True)
    assert gradients_of(model, None)["block.q_proj.taskmoe_lora_A.default.weight"].abs().max() > 0
    assert conditioner_of(model).together == {}


@pytest.mark.parametrize("carried", [True, False])
@pytest.mark.parametrize("how", ["no", "reentrant", "not reentrant"])
def test_a_forward_without_backward_leaves_no_tensor_behind(how, carried) -> None:
    """Also where q expected k and v to read what it reads, and they did not."""
    model = attention("token", from_memory=True)
    model.block.how = how
    if carried:
        model.block.checkpoint_fn = partial(checkpoint, use_reentrant=how == "reentrant")
    made: list[weakref.ref] = []
    compute = peft_taskmoe.fused.FusedUpdate.forward

    def watched(ctx: Any, *args: Any) -> tuple[torch.Tensor, ...]:
        outs = compute(ctx, *args)
        made.extend(weakref.ref(out) for out in outs)
        return outs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peft_taskmoe.fused.FusedUpdate, "forward", staticmethod(watched))
        model(torch.randn(3, 4, WIDTH, dtype=torch.float64, requires_grad=True))
    gc.collect()
    assert len(made) == 5  # q's, with k's and v's in vain, then these
    assert not any(out() is not None for out in made)


def test_an_output_that_nobody_used_has_no_gradient() -> None:
    model = attention("token")
    model.block.whole = lambda x: (model.block.k_proj.requires_grad_(True), model.block.q_proj(x))[
        1
    ]
    for layer in (model.block.k_proj, model.block.v_proj):
        own = layer
        model.block.register_forward_hook(lambda module, args, out, own=own: (own(args[0]), out)[1])
    found = gradients_of(model, None)
    assert {name.split(".")[1] for name in found if name != "x" and "taskmoe" in name} == {"q_proj"}


@pytest.mark.parametrize("bias", [torch.bfloat16, torch.float32])
def test_a_bias_of_another_dtype_is_left_to_the_base_layer(bias, monkeypatch) -> None:
    model = attention("token").requires_grad_(True)
    for layer in model.block.children():
        layer.base_layer.requires_grad_(False).to(torch.bfloat16)
        layer.base_layer.bias.data = layer.base_layer.bias.data.to(bias)
    with functions(monkeypatch) as sizes, torch.autocast("cpu", torch.bfloat16):
        out = model(torch.randn(3, 4, WIDTH))
    assert out.dtype == torch.bfloat16 or out.dtype == torch.float32
    assert sizes == ([3] if bias is torch.bfloat16 else [1, 1, 1])


def test_outside_of_any_forward_the_last_outputs_that_were_not_taken_are_kept_and_no_others() -> (
    None
):
    """Layers that are called by hand, q alone: nothing tells that the others will not come."""
    model = attention("token")
    x = torch.randn(2, 4, WIDTH, dtype=torch.float64)
    other = attention("token")
    for called in (other, model):
        called.block.q_proj(x.clone())
    ahead = made_ahead()
    assert set(ahead) == {model.block.k_proj, model.block.v_proj}
    model.block.q_proj(x)
    torch.testing.assert_close(
        model.block.k_proj(x), alone(model).block.k_proj(x), rtol=0, atol=1e-9
    )
    assert set(ahead) == {model.block.v_proj}
    ahead.clear()
