"""The adapted layer: every way it computes, over all kinds of bases, against `reference.py`."""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from transformers.pytorch_utils import Conv1D

import reference
from peft_taskmoe import TaskMoELoraConfig, task_context
from peft_taskmoe.experts import draw_dropped, zero_dropped
from peft_taskmoe.layer import Linear
from peft_taskmoe.task_scope import TaskState, entered
from peft_taskmoe.token_rows import RowsError, TokenLayout, rows_of_tokens

IN, OUT, TASK_DIM = 5, 4, 3
CLOSE = {"rtol": 0, "atol": 1e-10}
DOUBLE = torch.float64


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


class Keeping(Duck):
    """Keeps what it returns, in a dtype of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.kept = super().forward(x).float()
        return self.kept


class Scaled(nn.Linear):
    """A subclass whose forward is its own: calling it is the only right way."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


# How the layer computes: fused with the product of a frozen linear, fused on any base's output,
# in the plain form (a recorder looks on), or by decode steps.
BASES = ("frozen", "trainable", "conv1d", "duck", "subclass", "hooked")
PATHS = (*BASES, "plain", "decode", "decode_conv1d")


def make_base(path: str, bias: bool = True) -> nn.Module:
    torch.manual_seed(7)
    if "conv1d" in path:
        base: nn.Module = Conv1D(OUT, IN)
        nn.init.normal_(base.weight, std=0.3)
        nn.init.normal_(base.bias, std=float(bias))
    else:
        base = {"duck": Duck, "subclass": Scaled}.get(path, nn.Linear)(IN, OUT, bias)
    if path == "hooked":
        base.register_forward_hook(lambda module, args, out: out + 1)
    return base.double().requires_grad_(path == "trainable")


def config_of(**settings: Any) -> TaskMoELoraConfig:
    small = {"task_dim": TASK_DIM, "num_experts": 3, "r": 2, "lora_dropout": 0.0}
    return TaskMoELoraConfig(**{**small, "init_weights": False, **settings})


def make_layer(path: str = "frozen", bias: bool = True, **settings: Any) -> Linear:
    config = config_of(fan_in_fan_out="conv1d" in path, **settings)
    base, layout = make_base(path, bias), TokenLayout("q_proj")
    layer = Linear(base, "default", config.r, config.lora_alpha, config, layout).double()
    for part in parts_of(layer):
        nn.init.normal_(part.weight, std=0.7)
    return layer.eval()


def parts_of(layer: Linear) -> list[nn.Linear]:
    """A, B and the router."""
    return [getattr(layer, name)["default"] for name in layer.adapter_layer_names]


def state_for(path: str, tasks: torch.Tensor | None, **more: Any) -> TaskState:
    """A scope in which a layer takes this way."""
    recorder = (lambda *args: None) if path == "plain" else None
    decoding: dict | None = {} if path.startswith("decode") else None
    return TaskState(task_embeds=tasks, recorder=recorder, decoding=decoding, **more)


def run(layer: Linear, path: str, x: torch.Tensor, tasks: torch.Tensor | None, **more: Any):
    """The layer's output by one of its ways; decode steps run twice, which must not matter."""
    state = state_for(path, tasks, **more)
    with entered(state), torch.set_grad_enabled(state.decoding is None):
        out = layer(x)
        assert state.decoding is None or torch.equal(out, layer(x))
    top_k = layer.configs["default"].top_k
    if state.decoding is not None and x.dim() == 3 and x.shape[1] == 1 and top_k is None:
        assert list(map(bool, state.decoding.values())) == [True]  # a step was taken
    return out


def base_weights(layer: Linear) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The base as `(out, in)` weight and bias."""
    base = layer.base_layer
    weight, bias = (base.weight.detach().T if isinstance(base, Conv1D) else base.weight), base.bias
    if isinstance(base, Scaled):
        weight, bias = 2 * weight, None if bias is None else 2 * bias
    if base._forward_hooks:
        bias = 1 + (0 if bias is None else bias) + torch.zeros(OUT, dtype=DOUBLE)
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
        *(part.weight for part in parts_of(layer)),
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


def gradients(out: torch.Tensor, layer: Linear, *more: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Gradients of everything that asks for one."""
    wanted = [t for t in (*layer.parameters(), *more) if t.requires_grad]
    assert len(wanted) >= 3
    weights = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view(out.shape)
    return torch.autograd.grad((out * weights).sum(), wanted, allow_unused=True)


VARIATIONS: dict[str, dict[str, Any]] = {
    "usual": {},
    "no bias": {"bias": False},
    "2-D": {"shape": (4, IN)},
    "4-D": {"shape": (2, 2, 2, IN)},
    "one row": {"shape": (1, 4, IN)},
    "one token": {"shape": (1, IN)},
    "one token a row": {"shape": (3, 1, IN)},
    "one token a row, rank 3": {"shape": (2, 1, IN), "r": 3, "use_rslora": True},
    "one expert": {"num_experts": 1},
    "rank 1": {"r": 1, "num_experts": 5},
    "top 1": {"top_k": 1},
    "top 2 of 4": {"top_k": 2, "num_experts": 4},
    "alpha, rslora": {"lora_alpha": 5, "use_rslora": True, "r": 3},
    "raw task": {"task_norm": "none"},
    "rms task": {"task_norm": "rms"},
    "packed": {"shape": (1, 6, IN), "owners": [0, 0, 0, 1, 2, 2]},
    "packed rows": {"owners": [0, 1, 1, 2, 2, 2], "top_k": 1},
    "frozen input": {"needs_grad": False},
}
# These differ from another way only in the base, so the cases in which the base matters will do.
SAME_BUT_FOR_THE_BASE = {"subclass", "hooked", "decode_conv1d"}
CASES = [
    (path, variation)
    for path, variation in itertools.product(PATHS, VARIATIONS)
    if path not in SAME_BUT_FOR_THE_BASE
    or variation in {"usual", "no bias", "4-D", "packed", "one token a row"}
]


@pytest.mark.parametrize("path, variation", CASES)
@pytest.mark.parametrize("router_inputs", ["token+task", "token", "task"])
def test_outputs_and_gradients_equal_the_loops(path, router_inputs, variation) -> None:
    settings = dict(VARIATIONS[variation])
    shape, owners = settings.pop("shape", (2, 3, IN)), settings.pop("owners", None)
    needs_grad = settings.pop("needs_grad", True)
    layer = make_layer(path, router_inputs=router_inputs, **settings)
    x = torch.randn(*shape, dtype=DOUBLE, requires_grad=needs_grad)
    n = shape[0] if owners is None else max(owners) + 1
    tasks = torch.randn(n, TASK_DIM, dtype=DOUBLE, requires_grad=needs_grad)
    packed = None if owners is None else torch.tensor(owners)
    expected = by_loops(layer, x, tasks, owners)
    out = run(layer, path, x, tasks, token_tasks=packed)
    if path.startswith("decode"):
        torch.testing.assert_close(out, expected.detach(), **CLOSE)
        return
    torch.testing.assert_close(out, expected, **CLOSE)
    found, wanted = gradients(out, layer, x, tasks), gradients(expected, layer, x, tasks)
    torch.testing.assert_close(found, wanted, **CLOSE)


@pytest.mark.parametrize("rows", [2, 10])  # decode steps of few rows are taken in float32
@pytest.mark.parametrize("path", ["frozen", "conv1d", "plain", "decode", "decode_conv1d"])
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
def test_lower_precision_is_close_to_float64(path, base, adapter, rows) -> None:
    """The output is rounded to the base's dtype; what is summed is as precise as the adapter's."""
    layer = make_layer(path).to(base)
    layer.scaling["default"] *= 0.3  # no power of two
    for part in parts_of(layer):
        part.to(adapter)
    x = torch.randn(rows, 1 if path.startswith("decode") else 3, IN, dtype=base)
    tasks = torch.randn(rows, TASK_DIM)
    with torch.no_grad():
        out = run(layer, path, x, tasks)
        expected = by_loops(layer.double(), x.double(), tasks.double(), scale=0.3)
    assert out.dtype == base
    error = (out.double() - expected).abs().max() / expected.abs().max()
    assert error < 8 * torch.finfo(base).eps


def test_a_half_precision_adapter_on_a_float32_base_decodes_the_general_way() -> None:
    layer, x = make_layer().float(), torch.randn(2, 1, IN)
    for part in parts_of(layer):
        part.bfloat16()
    tasks = torch.randn(2, TASK_DIM)
    state = state_for("decode", tasks)
    with torch.no_grad(), entered(state):
        assert torch.equal(layer(x), run(layer, "frozen", x, tasks))
    assert list(state.decoding.values()) == [None]


def test_a_decode_step_leaves_the_bases_output_to_it_and_has_its_dtype() -> None:
    layer, x = make_layer("duck"), torch.randn(2, 1, IN, dtype=DOUBLE)
    layer.base_layer.__class__ = Keeping
    tasks = torch.randn(2, TASK_DIM)
    with torch.no_grad():
        usual, found = run(layer, "duck", x, tasks), run(layer, "decode", x, tasks)
        kept = layer.base_layer.kept.clone()
        assert torch.equal(kept, layer.base_layer(x))
    assert usual.dtype == found.dtype == torch.float32
    assert (found - kept).abs().max() > 0.1
    torch.testing.assert_close(found, usual)


@pytest.mark.parametrize("path", [path for path in PATHS if path != "conv1d"])  # which cannot
@pytest.mark.parametrize("transposed", [True, False])
def test_an_input_that_is_not_contiguous(path, transposed) -> None:
    layer, length = make_layer(path), 1 if path.startswith("decode") else 3
    x = torch.randn(IN, length, 2, dtype=DOUBLE).transpose(0, 2)
    x = x if transposed else x[:1].expand(2, length, IN)
    assert not x.is_contiguous()
    tasks = torch.randn(2, TASK_DIM, dtype=DOUBLE)
    expected = by_loops(layer, x, tasks).detach()
    torch.testing.assert_close(run(layer, path, x, tasks).detach(), expected, **CLOSE)


@pytest.mark.parametrize("path", ["frozen", "trainable", "conv1d", "plain", "transposed"])
@pytest.mark.parametrize("router_inputs", ["token+task", "token", "task"])
def test_with_dropout_gradients_are_those_under_the_drawn_mask(path, router_inputs) -> None:
    """Each layer draws its own; the plain form draws as `nn.Dropout` does."""
    layer = make_layer(path, router_inputs=router_inputs, lora_dropout=0.4).train()
    x = torch.randn(2, 3, IN, dtype=DOUBLE, requires_grad=True)
    if path == "transposed":  # not contiguous, as a convolution gives it
        x = torch.randn(2, IN, 3, dtype=DOUBLE).transpose(1, 2).requires_grad_()
    tasks = torch.randn(2, TASK_DIM, dtype=DOUBLE)
    ones = torch.ones(6, IN, dtype=DOUBLE)
    torch.manual_seed(3)
    if path == "plain":
        kept = nn.functional.dropout(ones, 0.4) > 0
    else:
        kept = zero_dropped(ones, draw_dropped(x, 0.4))
    torch.manual_seed(3)
    out = run(layer, path, x, tasks)
    assert not torch.equal(out, run(layer, path, x, tasks))  # drawn anew
    expected = by_loops(layer, x, tasks, kept=kept, rate=0.4)
    torch.testing.assert_close(out, expected, **CLOSE)
    torch.testing.assert_close(gradients(out, layer, x), gradients(expected, layer, x), **CLOSE)
    undropped = by_loops(layer, x, tasks)
    torch.testing.assert_close(run(layer.eval(), path, x, tasks), undropped, **CLOSE)


@pytest.mark.parametrize("path", PATHS)
def test_a_scaling_that_was_set_counts_on_every_path(path) -> None:
    """As with PEFT's LoRA: `layer.scaling[...]` is what is computed with."""
    layer, x = make_layer(path), torch.randn(2, 1, IN, dtype=DOUBLE)
    tasks = torch.randn(2, TASK_DIM, dtype=DOUBLE)
    layer.scaling["default"] *= 0.3
    with torch.no_grad():
        expected = by_loops(layer, x, tasks, scale=0.3)
        torch.testing.assert_close(run(layer, path, x, tasks), expected, **CLOSE)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_scales_are_set_as_those_of_lora_are(use_rslora) -> None:
    ours = make_layer(use_rslora=use_rslora, lora_alpha=5, r=3)
    model = nn.ModuleDict({"linear": nn.Linear(IN, OUT)})
    config = LoraConfig(r=3, lora_alpha=5, use_rslora=use_rslora, target_modules=["linear"])
    theirs = inject_adapter_in_model(config, model)["linear"]
    calls = (
        ("scale_layer", 0.5), ("scale_layer", 3.0), ("unscale_layer", 2.0),
        ("set_scale", "default", 0.25), ("scale_layer", 2), ("unscale_layer", None),
        ("set_scale", "unknown", 7.0),
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


@pytest.mark.parametrize("path", ["frozen", "decode"])
@pytest.mark.parametrize("top_k", [None, 2])
def test_rows_may_become_more_or_fewer_and_repeat_each_task_in_place(path, top_k) -> None:
    """As beams do, and answers that are done: within one generation."""
    layer, tasks = make_layer(top_k=top_k), torch.randn(2, TASK_DIM, dtype=DOUBLE)
    with entered(state_for(path, tasks)), torch.no_grad():
        for rows, length in itertools.product((2, 6, 4, 2), (3, 1)):
            x = torch.randn(rows, length, IN, dtype=DOUBLE)
            expected = by_loops(layer, x, tasks.repeat_interleave(rows // 2, 0))
            torch.testing.assert_close(layer(x), expected, **CLOSE)


@pytest.mark.parametrize("path", ["frozen", "conv1d", "plain"])
def test_tokens_before_rows(path) -> None:
    """`(length, rows, d)`, in a batch whose shape tells; remembered where it does not."""
    layer, tasks = make_layer(path), torch.randn(2, TASK_DIM, dtype=DOUBLE)
    for length in (3, 2):
        x = torch.randn(length, 2, IN, dtype=DOUBLE)
        expected = by_loops(layer, x, tasks, [0, 1] * length)
        out = run(layer, path, x, tasks, rows=2, lengths=(length,))
        torch.testing.assert_close(out, expected, **CLOSE)
    with pytest.raises(RowsError, match="rows first in one call and tokens first in another"):
        run(layer, path, torch.randn(2, 3, IN, dtype=DOUBLE), tasks, rows=2, lengths=(3,))
    layer = make_layer(path)
    run(layer, path, torch.randn(2, 2, IN, dtype=DOUBLE), tasks, rows=2, lengths=(2,))
    with pytest.raises(RowsError, match="earlier square batches were read wrongly"):
        run(layer, path, torch.randn(3, 2, IN, dtype=DOUBLE), tasks, rows=2, lengths=(3,))


def test_rows_that_a_shape_does_not_tell_are_unknown_to_a_recorder() -> None:
    state = TaskState(rows=3, lengths=(4,))
    assert rows_of_tokens(torch.Size([5, IN]), state, TokenLayout("q_proj")) is None
    assert rows_of_tokens(torch.Size([12, IN]), state, TokenLayout("q_proj")).tolist() == [
        *([0] * 4), *([1] * 4), *([2] * 4)
    ]  # fmt: skip


@pytest.mark.parametrize("path", ["frozen", "conv1d", "plain"])
def test_autocast_computes_in_its_dtype_and_is_close_to_float64(path) -> None:
    layer = make_layer(path).float()
    x, tasks = torch.randn(2, 3, IN, requires_grad=True), torch.randn(2, TASK_DIM)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = run(layer, path, x, tasks)
        assert out.dtype == layer.base_layer(x).dtype
    found = gradients(out, layer, x)
    assert all(grad.dtype == torch.float32 for grad in found)
    exact = x.detach().double().requires_grad_()
    expected = by_loops(layer.double(), exact, tasks.double())
    wanted = gradients(expected, layer, exact)
    for value, right in zip((out, *found), (expected, *wanted), strict=True):
        atol = 0.05 * right.abs().max().item()
        torch.testing.assert_close(value.double(), right, rtol=0, atol=atol)


def with_other(**settings: Any) -> Linear:
    """A layer with a second adapter of another size."""
    layer, other = make_layer(), config_of(num_experts=2, r=1, **settings)
    layer.update_layer("other", 1, other.lora_alpha, other)
    return layer.double()


def test_active_adapters_add_up() -> None:
    layer = with_other(router_inputs="token")
    x = torch.randn(2, 3, IN, dtype=DOUBLE)
    tasks, alone = torch.randn(2, TASK_DIM, dtype=DOUBLE), []
    with task_context(tasks):
        for name in ("default", "other"):
            layer.set_adapter(name)
            alone.append(layer(x))
        layer.set_adapter(["default", "other"])
        both = layer(x)
    torch.testing.assert_close(both, alone[0] + alone[1] - layer.base_layer(x), **CLOSE)
    assert not torch.allclose(alone[0], alone[1])


def test_each_row_with_its_own_adapter() -> None:
    layer, x = with_other(), torch.randn(4, 3, IN, dtype=DOUBLE)
    tasks = torch.randn(2, TASK_DIM, dtype=DOUBLE)
    # repeated in place for 4 rows, as the tasks are: beams
    with entered(TaskState(task_embeds=tasks, adapter_names=["other", "default"])):
        out = layer(x)
    for row in range(4):
        layer.set_adapter(["other", "default"][row // 2])
        with task_context(tasks[row // 2][None]):
            torch.testing.assert_close(out[row : row + 1], layer(x[row : row + 1]), **CLOSE)
    with entered(TaskState(task_embeds=tasks, adapter_names=["__base__", "__base__"])):
        assert torch.equal(layer(x), layer.base_layer(x))
    message = "should be the same as the number of inputs, but got 3 and 4"
    names = TaskState(task_embeds=tasks, adapter_names=["other"] * 3)
    with entered(names), pytest.raises(ValueError, match=message):
        layer(x)


def test_each_row_with_its_own_adapter_where_tokens_come_before_rows() -> None:
    layer, x = with_other(), torch.randn(3, 2, IN, dtype=DOUBLE)
    tasks, names = torch.randn(2, TASK_DIM, dtype=DOUBLE), ["other", "default"]
    with entered(TaskState(task_embeds=tasks, adapter_names=names, rows=2, lengths=(3,))):
        out = layer(x)
    for row, name in enumerate(names):
        layer.set_adapter(name)
        with task_context(tasks[row][None]):
            torch.testing.assert_close(out[:, row], layer(x[:, row]), **CLOSE)


@pytest.mark.parametrize("path", ["frozen", "conv1d"])
@pytest.mark.parametrize("top_k", [None, 2])
def test_a_task_router_merges_exactly_per_task(path, top_k) -> None:
    layer = make_layer(path, router_inputs="task", top_k=top_k)
    layer.scale_layer(0.3)
    x, tasks = torch.randn(1, 3, IN, dtype=DOUBLE), torch.randn(1, TASK_DIM, dtype=DOUBLE)
    before, expected = layer.base_layer.weight.clone(), by_loops(layer, x, tasks, scale=0.3)
    with task_context(tasks):
        layer.merge(safe_merge=True)
    assert layer.merged and not torch.allclose(before, layer.base_layer.weight)
    torch.testing.assert_close(layer(x), expected, **CLOSE)  # needs no task any more
    layer.unmerge()
    assert not layer.merged
    torch.testing.assert_close(layer.base_layer.weight, before, rtol=0, atol=1e-14)
    with pytest.warns(UserWarning, match="Already unmerged"):
        layer.unmerge()
    with task_context(tasks):
        layer.merge()
    layer.enable_adapters(False)
    torch.testing.assert_close(layer(x), layer.base_layer(x), rtol=0, atol=0)
    assert not layer.merged
    torch.testing.assert_close(layer.base_layer.weight, before, rtol=0, atol=1e-14)


@pytest.mark.parametrize("router_inputs, n, message", [
    ("token+task", 1, r"cannot be merged: its router reads the token .* `to_lora"),
    ("task", 2, r"needs one task, but 2 task embeddings are in scope. Merge inside"),
    ("task", 0, r"no task embedding.*`with task_context\(task_embeds\):`"),
    ("task", 1, r"adapter default seems to be broken"),
])  # fmt: skip
def test_what_cannot_merge_raises_and_changes_nothing(router_inputs, n, message) -> None:
    layer = make_layer(router_inputs=router_inputs)
    layer.taskmoe_lora_B["default"].weight.data[0, 0] = torch.inf
    before = layer.base_layer.weight.clone()
    scope = task_context(torch.randn(n, TASK_DIM, dtype=DOUBLE)) if n else nullcontext()
    with scope, pytest.raises(ValueError, match=message):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, before) and not layer.merged


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("bias", [True, False])
def test_a_fresh_layer_is_the_base_bit_for_bit(path, bias) -> None:
    layer = make_layer(path, bias)
    layer.reset_parameters("default", init_weights=True)
    a, b, _ = parts_of(layer)
    assert not b.weight.any() and a.weight.abs().max() <= IN**-0.5
    x = torch.randn(2, 1 if path.startswith("decode") else 3, IN, dtype=DOUBLE)
    for training in {False, not path.startswith("decode")}:
        out = run(layer.train(training), path, x, torch.randn(2, TASK_DIM))
        assert torch.equal(out, layer.base_layer(x))


@pytest.mark.parametrize("rows", [None, 2])
def test_a_recorder_gets_the_gates_and_the_row_of_every_token(rows) -> None:
    layer, seen = make_layer(top_k=2), []
    x, tasks = torch.randn(2, 3, IN, dtype=DOUBLE), torch.randn(2, TASK_DIM, dtype=DOUBLE)
    state = TaskState(task_embeds=tasks, rows=rows, recorder=lambda *args: seen.append(args))
    with entered(state):
        layer(x)
    ((recorded_layer, adapter, gates, token_rows),) = seen
    assert recorded_layer is layer and adapter == "default" and not gates.requires_grad
    assert token_rows is None if rows is None else token_rows.tolist() == [0, 0, 0, 1, 1, 1]
    router, owners = layer.taskmoe_lora_router["default"].weight, [0, 0, 0, 1, 1, 1]
    settings = {"top_k": 2, "task_norm": "matched"}
    expected = reference.all_gates(x.view(-1, IN), router, tasks, owners, **settings)
    torch.testing.assert_close(gates, expected.detach(), **CLOSE)


@pytest.mark.parametrize("shape, tasks, state, message", [
    ((2, 3), None, {}, r'no task embedding, which the router of adapter "default" reads. Pass'),
    ((2, 3), (2, 4), {}, r"have 4 dimensions, but .* `task_dim=3`. Use the encoder it was trained"),
    ((2, 3), (3, 3), {}, r"`q_proj` gets an input of shape \(2, 3, 5\) for 3 task embeddings"),
    ((4, 3), (3, 3), {}, r"shape \(4, 3, 5\) for 3 .*`exclude_modules`, or use a batch of one"),
    ((5,), (2, 3), {}, r"an input of shape \(5, 5\) for 2 task embeddings"),
    ((4,), (2, 3), {"rows": 2, "lengths": (3,)}, r"shape \(4, 5\) in a batch of 2 rows"),
    ((3, 1), (2, 3), {"rows": 3}, "a batch of 3 rows for 2 task embeddings"),
    ((1, 4), (2, 3), {"token_tasks": torch.tensor([0, 0, 1])}, "gets 4 tokens of a packed .* of 3"),
])  # fmt: skip
@pytest.mark.parametrize("path", ["frozen", "conv1d", "plain", "decode"])
def test_a_task_that_is_missing_or_does_not_fit_raises(path, shape, tasks, state, message) -> None:
    layer = make_layer(path)
    embeds = None if tasks is None else torch.randn(*tasks, dtype=DOUBLE)
    with pytest.raises(ValueError, match=message):
        run(layer, path, torch.randn(*shape, IN, dtype=DOUBLE), embeds, **state)


@pytest.mark.parametrize(
    "base", [nn.Conv2d(3, 4, 1), nn.Embedding(3, 4), nn.LayerNorm(4), nn.Conv1d(3, 4, 1), nn.ReLU()]
)
def test_what_is_no_linear_layer_raises(base) -> None:
    message = rf"`{type(base).__name__}` is no linear layer.*`exclude_modules`"
    with pytest.raises(TypeError, match=message):
        Linear(base, "default", 4, 32, config_of())
