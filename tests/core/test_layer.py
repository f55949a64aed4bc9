"""The adapted layer: every way it computes, over all kinds of bases, against the loops of `reference.py` in float64."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from transformers.pytorch_utils import Conv1D

import peft_taskmoe.fused
import peft_taskmoe.layer
import reference
from peft_taskmoe import TaskMoELoraConfig, fused, task_context
from peft_taskmoe.task_scope import TaskState, entered
from peft_taskmoe.experts import draw_dropped, zero_dropped
from peft_taskmoe.layer import Linear

IN, OUT, TASK_DIM = 5, 4, 3
CLOSE = {"rtol": 0, "atol": 1e-10}


class Duck(nn.Module):
    """A layer that only behaves like a linear one, with a weight of its own kind."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.randn(out_features, in_features) * 0.3)
        self.bias = nn.Parameter(torch.randn(out_features)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = torch.einsum("oi,...i->...o", self.weight, x)
        return out if self.bias is None else out + self.bias


class Scaled(nn.Linear):
    """A subclass whose forward is its own: calling it is the only right way."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


# How the layer computes: by its fused function from the weight of a frozen linear, by the same function from any base's
# output, by the plain form (a recorder looks on), or, in generation, with products kept from step to step.
PATHS = (
    "frozen",
    "trainable",
    "conv1d",
    "duck",
    "subclass",
    "hooked",
    "plain",
    "memo",
    "memo_conv1d",
)


def make_base(path: str, bias: bool = True) -> nn.Module:
    torch.manual_seed(7)
    if "conv1d" in path:
        base: nn.Module = Conv1D(OUT, IN)
        nn.init.normal_(base.weight, std=0.3)
        nn.init.normal_(base.bias, std=float(bias))
    elif path == "duck":
        base = Duck(IN, OUT, bias)
    elif path == "subclass":
        base = Scaled(IN, OUT, bias)
    else:
        base = nn.Linear(IN, OUT, bias)
    if path == "hooked":
        base.register_forward_hook(lambda module, args, out: out + 1)
    return base.double().requires_grad_(path == "trainable")


def make_layer(path: str = "frozen", bias: bool = True, **settings: Any) -> Linear:
    settings = {
        "task_dim": TASK_DIM,
        "num_experts": 3,
        "r": 2,
        "lora_dropout": 0.0,
        "init_weights": False,
        **settings,
    }
    config = TaskMoELoraConfig(**settings)
    layer = Linear(make_base(path, bias), "default", config.r, config.lora_alpha, config).double()
    layer.configs["default"].fan_in_fan_out = "conv1d" in path
    for module in (layer.taskmoe_lora_A, layer.taskmoe_lora_B, layer.taskmoe_lora_router):
        nn.init.normal_(module["default"].weight, std=0.7)
    return layer.eval()


def base_weights(layer: Linear) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The base as `(out, in)` weight and bias."""
    base = layer.base_layer
    weight = base.weight.detach().T if isinstance(base, Conv1D) else base.weight
    bias = base.bias
    if isinstance(base, Scaled):
        weight, bias = 2 * weight, None if bias is None else 2 * bias
    if base._forward_hooks:
        bias = 1 + (0 if bias is None else bias) + torch.zeros(OUT, dtype=torch.float64)
    return weight, bias


def by_loops(
    layer: Linear,
    x: torch.Tensor,
    tasks: torch.Tensor | None,
    task_of_token: list[int] | None = None,
    kept: torch.Tensor | None = None,
    rate: float = 0.0,
    scale: float = 1.0,
) -> torch.Tensor:
    """What the layer has to give, by its config and weights alone."""
    config = layer.configs["default"]
    x2 = x.reshape(-1, IN)
    if tasks is not None and task_of_token is None:
        task_of_token = [t * len(tasks) // len(x2) for t in range(len(x2))]
    out = reference.adapted_linear(
        x2,
        *base_weights(layer),
        layer.taskmoe_lora_A["default"].weight,
        layer.taskmoe_lora_B["default"].weight,
        layer.taskmoe_lora_router["default"].weight,
        tasks if "task" in config.router_inputs else None,
        task_of_token or [],
        r=config.r,
        scaling=scale * config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r),
        reads_token="token" in config.router_inputs,
        top_k=config.top_k,
        task_norm=config.task_norm,
        kept=kept,
        drop_rate=rate,
    )
    return out.view(*x.shape[:-1], OUT)


def leaves(layer: Linear, *more: torch.Tensor | None) -> list[torch.Tensor]:
    """Everything that asks for a gradient."""
    return [p for p in layer.parameters() if p.requires_grad] + [
        t for t in more if t is not None and t.requires_grad
    ]


def gradients(out: torch.Tensor, wanted: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    weights = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view(out.shape)
    return torch.autograd.grad((out * weights).sum(), wanted, allow_unused=True)


@dataclass(frozen=True)
class Variation:
    """One deviation from the usual case."""

    name: str
    settings: dict[str, Any]
    shape: tuple[int, ...] = (2, 3, IN)
    bias: bool = True
    task_of_token: tuple[int, ...] | None = None
    needs_grad: bool = True

    def __str__(self) -> str:
        return self.name


VARIATIONS = [
    Variation("usual", {}),
    Variation("no bias", {}, bias=False),
    Variation("2-D", {}, shape=(4, IN)),
    Variation("4-D", {}, shape=(2, 2, 2, IN)),
    Variation("one row", {}, shape=(1, 4, IN)),
    Variation("one token", {}, shape=(1, IN)),
    Variation("one token a row", {}, shape=(3, 1, IN)),
    Variation("one token a row, rank 3", {"r": 3, "use_rslora": True}, shape=(2, 1, IN)),
    Variation("one expert", {"num_experts": 1}),
    Variation("rank 1", {"r": 1, "num_experts": 5}),
    Variation("rank 3", {"r": 3, "num_experts": 2}),
    Variation("top 1", {"top_k": 1}),
    Variation("top 2 of 4", {"top_k": 2, "num_experts": 4}),
    Variation("alpha, rslora", {"lora_alpha": 5, "use_rslora": True, "r": 3}),
    Variation("raw task", {"task_norm": "none"}),
    Variation("rms task", {"task_norm": "rms"}),
    Variation("packed", {}, shape=(1, 6, IN), task_of_token=(0, 0, 0, 1, 2, 2)),
    Variation("packed rows", {"top_k": 1}, shape=(2, 3, IN), task_of_token=(0, 1, 1, 2, 2, 2)),
    Variation("frozen input", {}, needs_grad=False),
]


# These differ from another path only in what the base is, so the cases in which the base matters will do.
SAME_BUT_FOR_THE_BASE = {"subclass", "hooked", "memo_conv1d"}
CASES = [
    pytest.param(path, variation, id=f"{path}-{variation}")
    for path, variation in itertools.product(PATHS, VARIATIONS)
    if path not in SAME_BUT_FOR_THE_BASE
    or variation.name in {"usual", "no bias", "4-D", "packed", "one token a row"}
]


@pytest.mark.parametrize("path, variation", CASES)
@pytest.mark.parametrize("router_inputs", ["token+task", "token", "task"])
def test_outputs_and_gradients_equal_the_loops(path, router_inputs, variation) -> None:
    layer = make_layer(path, variation.bias, router_inputs=router_inputs, **variation.settings)
    x = torch.randn(*variation.shape, dtype=torch.float64, requires_grad=variation.needs_grad)
    owners = None if variation.task_of_token is None else list(variation.task_of_token)
    n = variation.shape[0] if owners is None else max(owners) + 1
    tasks = torch.randn(n, TASK_DIM, dtype=torch.float64, requires_grad=variation.needs_grad)
    packed = None if owners is None else torch.tensor(owners)
    expected = by_loops(layer, x, tasks, owners)
    state = TaskState(task_embeds=tasks, token_tasks=packed)
    if path == "plain":
        state.recorder = lambda *args: None
    if path.startswith("memo"):
        state.memo = {}
        with entered(state), torch.no_grad():
            layer(x)
            assert layer not in state.memo  # the first forward shows who reads what
            first = layer(x)
            again = layer(x)
        one_token_a_row = len(variation.shape) == 3 and variation.shape[1] == 1
        decoded = [state.memo[layer].weights is not None] if layer in state.memo else []
        assert decoded == (
            [True] if one_token_a_row else []
        )  # what is kept serves decoding steps alone
        torch.testing.assert_close(first, expected.detach(), **CLOSE)
        assert torch.equal(first, again)
        return
    with entered(state):
        out = layer(x)
    torch.testing.assert_close(out, expected, **CLOSE)
    wanted = leaves(layer, x, tasks)
    assert len(wanted) >= 3
    torch.testing.assert_close(gradients(out, wanted), gradients(expected, wanted), **CLOSE)


@pytest.mark.parametrize("rows", [2, fused._FEW_ROWS + 2])
@pytest.mark.parametrize("path", ["memo", "memo_conv1d"])
@pytest.mark.parametrize(
    ("base", "adapter"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),  # what PEFT makes of a base in half precision
        (torch.float16, torch.float16),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
    ],
)
def test_a_decoding_step_in_every_precision(base, adapter, path, rows) -> None:
    """What the layer's usual way gives, as close to the loops in float64 as that, up to one rounding of the output."""
    layer = make_layer(path).to(base)
    layer.scaling["default"] *= 0.3  # no power of two
    for part in (layer.taskmoe_lora_A, layer.taskmoe_lora_B, layer.taskmoe_lora_router):
        part.to(adapter)
    x, tasks = torch.randn(rows, 1, IN).to(base), torch.randn(rows, TASK_DIM)
    state = TaskState(task_embeds=tasks)
    with torch.no_grad():
        with entered(state):
            usual = layer(x)
        state.memo = {}
        with entered(state):
            layer(x)
            found = layer(x)
        prepared = state.memo[layer]
        assert prepared.weights.a_and_router.dtype == (torch.float32 if rows == 2 else adapter)
        assert prepared.base_weight is (layer.base_layer.weight if path == "memo" else None)
        expected = by_loops(layer.double(), x.double(), tasks.double(), scale=0.3)
    assert found.dtype == usual.dtype == base
    largest, eps = expected.abs().max(), torch.finfo(base).eps
    error, of_usual = ((out.double() - expected).abs().max() / largest for out in (found, usual))
    assert error <= of_usual + 4 * eps < 12 * eps


def test_an_adapter_in_half_precision_on_a_float32_base_takes_no_decoding_steps() -> None:
    layer, x = make_layer().float(), torch.randn(2, 1, IN)
    for part in (layer.taskmoe_lora_A, layer.taskmoe_lora_B, layer.taskmoe_lora_router):
        part.bfloat16()
    state = TaskState(task_embeds=torch.randn(2, TASK_DIM), memo={})
    with torch.no_grad(), entered(state):
        layer(x)
        layer(x)
    assert state.memo[layer].weights is None


class Keeping(Duck):
    """Keeps what it returns, in a dtype of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.kept = super().forward(x).float()
        return self.kept


def test_a_decoding_step_leaves_a_base_layers_output_to_it_and_has_its_dtype() -> None:
    layer, x = make_layer("duck"), torch.randn(2, 1, IN, dtype=torch.float64)
    layer.base_layer.__class__ = Keeping
    state = TaskState(task_embeds=torch.randn(2, TASK_DIM), memo={})
    with torch.no_grad():
        with entered(TaskState(task_embeds=state.task_embeds)):
            usual = layer(x)
        with entered(state):
            layer(x)
            found = layer(x)
        assert state.memo[layer].weights is not None
        base = layer.base_layer.kept.clone()
        torch.testing.assert_close(base, layer.base_layer(x), rtol=0, atol=0)
    assert usual.dtype == found.dtype == torch.float32
    assert (found - base).abs().max() > 0.1
    torch.testing.assert_close(found, usual)


@pytest.mark.parametrize("shape", [(1, 7, IN), (7, IN)])
def test_dropout_on_an_input_that_is_not_contiguous(shape) -> None:
    """As a convolution gives it: the same as for a contiguous copy, gradients included."""
    layer = make_layer(lora_dropout=0.4).train()
    x = torch.randn(*shape[:-2], shape[-1], shape[-2], dtype=torch.float64).transpose(-1, -2)
    tasks, results = torch.randn(1, TASK_DIM, dtype=torch.float64), []
    for given in (x, x.contiguous()):
        leaf = given.detach().requires_grad_()
        torch.manual_seed(5)
        with task_context(tasks):
            out = layer(leaf)
        results.append((out, *gradients(out, [leaf, *leaves(layer, leaf, None)[1:]])))
    torch.testing.assert_close(results[0], results[1], **CLOSE)


@pytest.mark.parametrize("path", PATHS)
def test_a_scaling_that_was_set_counts_on_every_path(path) -> None:
    """As with PEFT's LoRA: `layer.scaling[...]` is what is computed with."""
    layer = make_layer(path)
    x, tasks = (
        torch.randn(2, 1, IN, dtype=torch.float64),
        torch.randn(2, TASK_DIM, dtype=torch.float64),
    )
    layer.scaling["default"] *= 0.3
    state = TaskState(task_embeds=tasks)
    if path == "plain":
        state.recorder = lambda *args: None
    if path.startswith("memo"):
        state.memo = {}
    with entered(state), torch.no_grad():
        layer(x)
        torch.testing.assert_close(layer(x), by_loops(layer, x, tasks, scale=0.3), **CLOSE)


def test_a_scaling_that_was_set_is_merged() -> None:
    layer = make_layer(router_inputs="task")
    x, tasks = (
        torch.randn(2, 1, IN, dtype=torch.float64),
        torch.randn(1, TASK_DIM, dtype=torch.float64),
    )
    expected = by_loops(layer, x, tasks, scale=0.3)
    layer.scale_layer(0.3)
    with task_context(tasks):
        layer.merge()
    torch.testing.assert_close(layer(x), expected, **CLOSE)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_scales_are_set_as_those_of_lora_are(use_rslora) -> None:
    ours = make_layer(use_rslora=use_rslora, lora_alpha=5, r=3)
    model = nn.ModuleDict({"linear": nn.Linear(IN, OUT)})
    config = LoraConfig(r=3, lora_alpha=5, use_rslora=use_rslora, target_modules=["linear"])
    theirs = inject_adapter_in_model(config, model)["linear"]
    calls = (
        ("scale_layer", 0.5), ("scale_layer", 3.0), ("unscale_layer", 2.0), ("set_scale", "default", 0.25), ("scale_layer", 2),
        ("unscale_layer", None), ("set_scale", "unknown", 7.0),
    )  # fmt: skip
    found = []
    for name, *arguments in calls:
        for layer in (ours, theirs):
            getattr(layer, name)(*arguments)
        found.append((ours.scaling["default"], theirs.scaling["default"]))
        assert set(ours.scaling) == {"default"}
    assert all(a == pytest.approx(b) for a, b in found) and len({a for a, _ in found}) == 5
    ours.set_adapter([])
    ours.scale_layer(0.5)  # what is not active keeps its scale
    assert ours.scaling["default"] == pytest.approx(theirs.scaling["default"])


@pytest.mark.parametrize("path", ["frozen", "trainable", "conv1d"])
@pytest.mark.parametrize("router_inputs", ["token+task", "token", "task"])
def test_with_dropout_gradients_are_those_under_the_drawn_mask(path, router_inputs) -> None:
    layer = make_layer(path, router_inputs=router_inputs, lora_dropout=0.4).train()
    x = torch.randn(2, 3, IN, dtype=torch.float64, requires_grad=True)
    tasks = torch.randn(2, TASK_DIM, dtype=torch.float64)
    torch.manual_seed(3)
    kept = zero_dropped(torch.ones(6, IN), draw_dropped(x, 0.4))
    torch.manual_seed(3)
    with task_context(tasks):
        out = layer(x)
    expected = by_loops(layer, x, tasks, kept=kept, rate=0.4)
    torch.testing.assert_close(out, expected, **CLOSE)
    assert not torch.allclose(out, by_loops(layer, x, tasks))
    torch.testing.assert_close(
        gradients(out, leaves(layer, x)), gradients(expected, leaves(layer, x)), **CLOSE
    )
    with task_context(tasks):
        torch.testing.assert_close(layer.eval()(x), by_loops(layer, x, tasks), **CLOSE)


def test_dropout_of_the_plain_form_equals_the_loops_under_its_mask() -> None:
    layer = make_layer(lora_dropout=0.4).train()
    x = torch.randn(2, 3, IN, dtype=torch.float64, requires_grad=True)
    tasks = torch.randn(2, TASK_DIM, dtype=torch.float64)
    torch.manual_seed(3)
    kept = torch.nn.functional.dropout(torch.ones(6, IN, dtype=torch.float64), 0.4) > 0
    torch.manual_seed(3)
    with entered(TaskState(task_embeds=tasks, recorder=lambda *args: None)):
        out = layer(x)
    expected = by_loops(layer, x, tasks, kept=kept, rate=0.4)
    torch.testing.assert_close(out, expected, **CLOSE)
    torch.testing.assert_close(
        gradients(out, leaves(layer, x)), gradients(expected, leaves(layer, x)), **CLOSE
    )


@pytest.mark.parametrize(
    "path, from_weight",
    [(p, p == "frozen") for p in PATHS if p != "plain" and not p.startswith("memo")],
)
def test_only_a_frozen_plain_linear_is_computed_from_its_weight(
    path, from_weight, monkeypatch
) -> None:
    """The base is called wherever that could make a difference, and not twice."""
    seen = []

    class Spy(peft_taskmoe.layer.FusedUpdate):
        @classmethod
        def apply(cls, *args):
            tensors = peft_taskmoe.fused.LayerTensors(*args[-6:])
            seen.append((tensors.base is not None, tensors.weight is not None))
            return peft_taskmoe.fused.FusedUpdate.apply(*args)

    monkeypatch.setattr(peft_taskmoe.layer, "FusedUpdate", Spy)
    layer = make_layer(path, router_inputs="token")
    layer(torch.randn(2, IN, dtype=torch.float64))
    assert seen == [(not from_weight, from_weight)]


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("path", ["frozen", "duck", "memo"])
def test_an_input_that_is_not_contiguous(path, transposed) -> None:
    layer = make_layer(path)
    length = 1 if path == "memo" else 3
    x = torch.randn(IN, length, 2, dtype=torch.float64)
    x = x.transpose(0, 2) if transposed else x.transpose(0, 2)[:1].expand(2, length, IN)
    assert not x.is_contiguous()
    tasks = torch.randn(2, TASK_DIM, dtype=torch.float64)
    with (
        entered(TaskState(task_embeds=tasks, memo={} if path == "memo" else None)),
        torch.set_grad_enabled(path != "memo"),
    ):
        layer(x)
        torch.testing.assert_close(layer(x), by_loops(layer, x, tasks), **CLOSE)


@pytest.mark.parametrize("repeats", [2, 3])
@pytest.mark.parametrize("memo", [True, False])
@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("top_k", [None, 2])
def test_beams_repeat_each_task_in_place(repeats, memo, length, top_k) -> None:
    layer = make_layer(top_k=top_k)
    x = torch.randn(2 * repeats, length, IN, dtype=torch.float64)
    tasks = torch.randn(2, TASK_DIM, dtype=torch.float64)
    with entered(TaskState(task_embeds=tasks, memo={} if memo else None)), torch.no_grad():
        layer(x)
        out = layer(x)
    torch.testing.assert_close(
        out, by_loops(layer, x, tasks.repeat_interleave(repeats, 0)), **CLOSE
    )


class Reading:
    """Layers in a generation, and how often a mixed bottleneck was computed for one or more of them."""

    def __init__(
        self, layers: list[Linear], monkeypatch: pytest.MonkeyPatch, rows: int = 2
    ) -> None:
        self.layers, self.mixes = layers, 0
        for seed, layer in enumerate(layers):
            torch.manual_seed(seed)
            for parameter in layer.parameters():
                nn.init.normal_(parameter, std=0.7)
        self.tasks = torch.randn(rows, TASK_DIM, dtype=torch.float64)
        self.state = TaskState(task_embeds=self.tasks, memo={})
        compute = peft_taskmoe.fused._mix_for_all

        def counted(*args: Any) -> None:
            self.mixes += 1
            compute(*args)

        monkeypatch.setattr(peft_taskmoe.fused, "_mix_for_all", counted)

    def run(self, x: torch.Tensor, order: list[int]) -> list[torch.Tensor]:
        """What the layers give for the very same x, one after the other."""
        with entered(self.state), torch.no_grad():
            return [self.layers[i](x) for i in order]

    def check(self, x: torch.Tensor, order: list[int], mixes: int) -> None:
        """Run, compare with the loops, and count."""
        self.mixes = 0
        expected = [by_loops(self.layers[i], x, self.tasks) for i in order]
        torch.testing.assert_close(self.run(x, order), expected, **CLOSE)
        assert self.mixes == mixes


def one_token_a_row() -> torch.Tensor:
    return torch.randn(2, 1, IN, dtype=torch.float64)


@pytest.mark.parametrize("router_inputs", ["token+task", "token", "task"])
@pytest.mark.parametrize("path", ["frozen", "conv1d", "duck"])
def test_layers_that_read_the_same_tensor_mix_their_experts_at_once(
    path, router_inputs, monkeypatch
) -> None:
    layers = [make_layer(path, router_inputs=router_inputs) for _ in range(4)]
    reading = Reading(layers, monkeypatch)
    layers[1].scaling["default"], layers[1].configs["default"].lora_alpha = (
        3.0,
        3.0 * layers[1].r["default"],
    )
    reading.check(
        torch.randn(2, 3, IN, dtype=torch.float64), [0, 1, 2], mixes=0
    )  # the prompt shows who reads what
    reading.check(torch.randn(2, 3, IN, dtype=torch.float64), [3], mixes=0)
    for _ in range(2):
        reading.check(one_token_a_row(), [0, 1, 2], mixes=1)
        reading.check(one_token_a_row(), [3], mixes=1)
    reading.check(one_token_a_row(), [2, 0, 1], mixes=1)
    reading.check(one_token_a_row(), [1], mixes=1)  # the others did not come
    reading.check(one_token_a_row(), [0, 1, 1, 2, 0], mixes=2)  # one came twice, then another


def test_a_generation_that_begins_with_one_token_shows_who_reads_what_as_well(monkeypatch) -> None:
    """An encoder-decoder's, and one that goes on from keys and values."""
    reading = Reading([make_layer(), make_layer(), make_layer()], monkeypatch)
    reading.check(one_token_a_row(), [0, 1], mixes=0)
    reading.check(one_token_a_row(), [2], mixes=0)
    reading.check(one_token_a_row(), [0, 1], mixes=1)
    reading.check(one_token_a_row(), [2], mixes=1)


def test_layers_that_read_tensors_of_equal_values_do_not_share(monkeypatch) -> None:
    reading = Reading([make_layer(), make_layer()], monkeypatch)
    reading.run(torch.randn(2, 3, IN, dtype=torch.float64), [0, 1])
    x = one_token_a_row()
    reading.check(x, [0], mixes=1)
    reading.check(x.clone(), [1], mixes=1)


def test_a_tensor_that_was_changed_between_two_layers_is_read_again(monkeypatch) -> None:
    reading = Reading([make_layer(), make_layer()], monkeypatch)
    reading.run(torch.randn(2, 3, IN, dtype=torch.float64), [0, 1])
    x = one_token_a_row()
    reading.check(x, [0], mixes=1)
    x.add_(1)
    reading.check(x, [1], mixes=1)


def test_in_inference_mode_where_changes_cannot_be_seen_no_layers_share(monkeypatch) -> None:
    reading = Reading([make_layer(), make_layer()], monkeypatch)
    with torch.inference_mode():
        reading.run(torch.randn(2, 3, IN, dtype=torch.float64), [0, 1])
        x = one_token_a_row()
        reading.check(x, [0], mixes=1)
        x.add_(1)
        reading.check(x, [1], mixes=1)


@pytest.mark.parametrize(
    "settings", [{"r": 1}, {"num_experts": 2}, {"top_k": 2}, {"router_inputs": "task"}], ids=str
)
def test_layers_of_other_shapes_do_not_share(settings, monkeypatch) -> None:
    reading = Reading([make_layer(), make_layer(**settings), make_layer()], monkeypatch)
    reading.run(torch.randn(2, 3, IN, dtype=torch.float64), [0, 1, 2])
    reading.check(one_token_a_row(), [0, 1, 2], mixes=1 if "top_k" in settings else 2)


def test_rows_may_become_more_or_fewer(monkeypatch) -> None:
    """As beams do, and answers that are done."""
    reading = Reading([make_layer(), make_layer()], monkeypatch)
    reading.run(torch.randn(2, 3, IN, dtype=torch.float64), [0, 1])
    for rows in (2, 6, 2):
        x = torch.randn(rows, 1, IN, dtype=torch.float64)
        reading.mixes = 0
        tasks = reading.tasks.repeat_interleave(rows // 2, 0)
        expected = [by_loops(layer, x, tasks) for layer in reading.layers]
        torch.testing.assert_close(reading.run(x, [0, 1]), expected, **CLOSE)
        assert reading.mixes == 1


@pytest.mark.parametrize(
    "base_dtype, adapter_dtype",
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
    ],
)
@pytest.mark.parametrize("path", ["frozen", "conv1d", "memo", "plain"])
def test_lower_precision_is_close_to_float64(path, base_dtype, adapter_dtype) -> None:
    """The output is rounded to the base's dtype; what is summed is as precise as the adapter's."""
    layer = make_layer(path)
    layer.base_layer.to(base_dtype)
    for module in (layer.taskmoe_lora_A, layer.taskmoe_lora_B, layer.taskmoe_lora_router):
        module["default"].to(adapter_dtype)
    x, tasks = (
        torch.randn(2, 1 if path == "memo" else 3, IN, dtype=base_dtype),
        torch.randn(2, TASK_DIM),
    )
    recorder = (lambda *args: None) if path == "plain" else None
    state = TaskState(task_embeds=tasks, memo={} if path == "memo" else None, recorder=recorder)
    with entered(state), torch.no_grad():
        layer(x)
        out = layer(x)
    if path == "memo":
        assert state.memo[layer].weights is not None or base_dtype != adapter_dtype
    assert out.dtype == base_dtype
    expected = by_loops(layer.double(), x.double(), tasks.double()).detach()
    error = (out.double() - expected).abs().max() / expected.abs().max()
    assert error < 4 * torch.finfo(base_dtype).eps


@pytest.mark.parametrize("path", ["frozen", "conv1d", "plain"])
def test_autocast_computes_in_its_dtype_and_is_close_to_float64(path) -> None:
    layer = make_layer(path).float()
    x, tasks = torch.randn(2, 3, IN, requires_grad=True), torch.randn(2, TASK_DIM)
    state = TaskState(task_embeds=tasks, recorder=(lambda *args: None) if path == "plain" else None)
    with entered(state), torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x)
        base = layer.base_layer(x)
    assert out.dtype == base.dtype
    found = gradients(out, leaves(layer, x))
    assert all(grad.dtype == torch.float32 for grad in found)
    layer.double()
    exact = x.detach().double().requires_grad_()
    expected = by_loops(layer, exact, tasks.double())
    torch.testing.assert_close(
        out.double(), expected, rtol=0, atol=0.05 * expected.abs().max().item()
    )
    for grad, wanted in zip(found, gradients(expected, leaves(layer, exact)), strict=True):
        torch.testing.assert_close(
            grad.double(), wanted, rtol=0, atol=0.05 * wanted.abs().max().item()
        )


def test_active_adapters_add_up() -> None:
    layer = make_layer(num_experts=3)
    other = TaskMoELoraConfig(
        num_experts=2, r=1, router_inputs="token", init_weights=False, lora_dropout=0.0
    )
    layer.update_layer("other", 1, other.lora_alpha, other)
    layer.double()
    x, tasks = (
        torch.randn(2, 3, IN, dtype=torch.float64),
        torch.randn(2, TASK_DIM, dtype=torch.float64),
    )
    with task_context(tasks):
        alone = []
        for name in ("default", "other"):
            layer.set_adapter(name)
            alone.append(layer(x))
        layer.set_adapter(["default", "other"])
        both = layer(x)
    torch.testing.assert_close(both, alone[0] + alone[1] - layer.base_layer(x), **CLOSE)
    assert not torch.allclose(alone[0], alone[1])


def test_each_row_with_its_own_adapter() -> None:
    layer = make_layer()
    other = TaskMoELoraConfig(
        num_experts=2, r=1, task_dim=TASK_DIM, init_weights=False, lora_dropout=0.0
    )
    layer.update_layer("other", 1, other.lora_alpha, other)
    layer.double()
    x, tasks = (
        torch.randn(4, 3, IN, dtype=torch.float64),
        torch.randn(2, TASK_DIM, dtype=torch.float64),
    )
    names = ["other", "default"]  # repeated in place for 4 rows, as the tasks are: beams
    with entered(TaskState(task_embeds=tasks, adapter_names=names)):
        out = layer(x)
    for row, (name, task) in enumerate(
        [("other", 0), ("other", 0), ("default", 1), ("default", 1)]
    ):
        layer.set_adapter(name)
        with task_context(tasks[task : task + 1]):
            torch.testing.assert_close(out[row : row + 1], layer(x[row : row + 1]), **CLOSE)
    with entered(TaskState(task_embeds=tasks, adapter_names=["__base__", "__base__"])):
        assert torch.equal(layer(x), layer.base_layer(x))
    with (
        entered(TaskState(task_embeds=tasks, adapter_names=["other"] * 3)),
        pytest.raises(
            ValueError, match="should be the same as the number of inputs, but got 3 and 4"
        ),
    ):
        layer(x)


@pytest.mark.parametrize("path", ["frozen", "conv1d"])
@pytest.mark.parametrize("top_k", [None, 2])
def test_a_task_router_merges_exactly_per_task(path, top_k) -> None:
    layer = make_layer(path, router_inputs="task", top_k=top_k)
    x, tasks = (
        torch.randn(1, 3, IN, dtype=torch.float64),
        torch.randn(1, TASK_DIM, dtype=torch.float64),
    )
    before = layer.base_layer.weight.clone()
    with task_context(tasks):
        expected = layer(x)
        layer.merge(safe_merge=True)
    assert layer.merged and not torch.allclose(before, layer.base_layer.weight)
    torch.testing.assert_close(layer(x), expected, **CLOSE)  # needs no task any more
    layer.unmerge()
    assert not layer.merged
    torch.testing.assert_close(layer.base_layer.weight, before, rtol=0, atol=1e-14)
    with pytest.warns(UserWarning, match="Already unmerged"):
        layer.unmerge()


def test_what_cannot_merge_says_so() -> None:
    tasks = torch.randn(2, TASK_DIM, dtype=torch.float64)
    layer = make_layer(router_inputs="token+task")
    with (
        task_context(tasks[:1]),
        pytest.raises(ValueError, match=r"the gates differ from token to token .* `to_lora"),
    ):
        layer.merge()
    layer = make_layer(router_inputs="task")
    with (
        task_context(tasks),
        pytest.raises(ValueError, match=r"needs the one task to merge for, but 2 task embeddings"),
    ):
        layer.merge()
    layer.taskmoe_lora_B["default"].weight.data[0, 0] = torch.inf
    before = layer.base_layer.weight.clone()
    with (
        task_context(tasks[:1]),
        pytest.raises(ValueError, match=r"adapter default seems to be broken.*not finite"),
    ):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, before) and not layer.merged


def test_a_disabled_adapter_is_the_base_and_needs_no_task() -> None:
    layer = make_layer()
    x = torch.randn(2, 3, IN, dtype=torch.float64)
    layer.enable_adapters(False)
    assert torch.equal(layer(x), layer.base_layer(x))


def test_a_fresh_layer_is_the_base_bit_for_bit() -> None:
    for path, bias in itertools.product(PATHS, (True, False)):
        layer = make_layer(path, bias)
        layer.reset_parameters("default", init_weights=True)
        assert not layer.taskmoe_lora_B["default"].weight.any()
        assert layer.taskmoe_lora_A["default"].weight.abs().max() <= IN**-0.5
        decodes = path.startswith("memo")
        x = torch.randn(2, 1 if decodes else 3, IN, dtype=torch.float64)
        recorder = (lambda *args: None) if path == "plain" else None
        for training in (True, False):
            state = TaskState(
                task_embeds=torch.randn(2, TASK_DIM),
                memo={} if decodes else None,
                recorder=recorder,
            )
            layer.train(training)
            with entered(state), torch.set_grad_enabled(not decodes):
                for _ in range(1 + decodes):
                    assert torch.equal(layer(x), layer.base_layer(x)), path


def test_a_recorder_sees_the_gates_of_every_token() -> None:
    layer = make_layer(top_k=2)
    x, tasks = (
        torch.randn(2, 3, IN, dtype=torch.float64),
        torch.randn(2, TASK_DIM, dtype=torch.float64),
    )
    seen = []
    with entered(TaskState(task_embeds=tasks, recorder=lambda *args: seen.append(args))):
        layer(x)
    ((recorded_layer, adapter, gates, token_tasks),) = seen
    assert recorded_layer is layer and adapter == "default" and token_tasks is None
    expected = reference.all_gates(
        x.view(-1, IN),
        layer.taskmoe_lora_router["default"].weight,
        tasks,
        [0, 0, 0, 1, 1, 1],
        top_k=2,
        task_norm="matched",
    )
    torch.testing.assert_close(gates, expected.detach(), **CLOSE)
    assert not gates.requires_grad


MISSING = r'This forward has no task embedding. The router of adapter "default" reads the task, .* call attach_task_encoder\(model\)'


@pytest.mark.parametrize(
    "shape, tasks, state, message",
    [
        ((2, 3, IN), None, {}, MISSING),
        ((2, 3, IN), (2, 4), {}, r"have 4 dimensions, but .* `task_dim=3`. .*`TaskMoELoraConfig\(task_dim=4\)`"),
        ((2, 3, IN), (3, 3), {}, r"3 task embeddings do not fit an input of shape \(2, 3, 5\): every example needs exactly one"),
        ((4, 3, IN), (3, 3), {}, r"3 task embeddings do not fit an input of shape \(4, 3, 5\)"),
        ((5, IN), (2, 3), {}, r"2 task embeddings do not fit an input of shape \(5, 5\)"),
        ((4, IN), (2, 3), {"rows": 2, "length": 3}, "This layer gets 4 rows in a batch of 2 x 3 tokens.*`exclude_modules`"),
        ((1, 4, IN), (2, 3), {"token_tasks": torch.tensor([0, 0, 1])}, "gets 4 tokens, but the packed batch has 3.*do not pack"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("path", ["frozen", "conv1d", "plain", "memo"])
def test_a_task_that_is_missing_or_does_not_fit(path, shape, tasks, state, message) -> None:
    layer = make_layer(path)
    embeds = None if tasks is None else torch.randn(*tasks, dtype=torch.float64)
    recorder = (lambda *args: None) if path == "plain" else None
    whole = TaskState(
        task_embeds=embeds, memo={} if path == "memo" else None, recorder=recorder, **state
    )
    with (
        entered(whole),
        torch.set_grad_enabled(path != "memo"),
        pytest.raises(ValueError, match=message),
    ):
        layer(torch.randn(*shape, dtype=torch.float64))


@pytest.mark.parametrize(
    "base", [nn.Conv2d(3, 4, 1), nn.Embedding(3, 4), nn.LayerNorm(4), nn.Conv1d(3, 4, 1), nn.ReLU()]
)
def test_what_is_no_linear_layer_is_refused(base) -> None:
    config = TaskMoELoraConfig()
    with pytest.raises(
        TypeError, match=rf"`{type(base).__name__}` is no linear layer.*`exclude_modules`"
    ):
        Linear(base, "default", 4, 32, config)


def test_a_projection_that_is_never_called_is_refused() -> None:
    attention = nn.MultiheadAttention(4, 2)
    with pytest.raises(
        TypeError, match=r"read by its parent without being called.*`exclude_modules`"
    ):
        Linear(attention.out_proj, "default", 4, 32, TaskMoELoraConfig())
