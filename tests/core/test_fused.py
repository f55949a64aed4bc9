"""`fused.py`: its function, its hand-written backward and its inference form, against the loops of `reference.py`."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import peft_taskmoe.fused as fused_module
import reference
from peft_taskmoe.experts import draw_dropped, zero_dropped
from peft_taskmoe.fused import (
    ExpertShape,
    FusedUpdate,
    LayerTensors,
    decoding_step,
    decoding_weights,
)

IN, OUT, TASK_DIM, TOKENS = 5, 4, 3, 6
CLOSE = {"rtol": 0, "atol": 1e-10}
NAMES = ("x", "base", "weight", "bias", "a", "b", "router", "task")
SHAPES = [
    ExpertShape(num_experts=3, r=2, top_k=None, reads_token=True, reads_task=True),
    ExpertShape(num_experts=3, r=2, top_k=None, reads_token=True, reads_task=False),
    ExpertShape(num_experts=3, r=2, top_k=None, reads_token=False, reads_task=True),
    ExpertShape(num_experts=4, r=1, top_k=2, reads_token=True, reads_task=True),
    ExpertShape(num_experts=1, r=3, top_k=None, reads_token=True, reads_task=True),
]
PACKED = [1, 0, 0, 1, 1, 1]
SCALINGS = dict(zip(SHAPES, (1.5, 1.5, 1.5, 0.5, 8.0), strict=True))


def tensors(
    shape: ExpertShape, *, frozen_base: bool, packed: bool = False
) -> dict[str, torch.Tensor | None]:
    """Random float64 arguments of `FusedUpdate`, those that may get a gradient asking for one."""

    def draw(*size: int, grad: bool = True) -> torch.Tensor:
        return torch.randn(*size, dtype=torch.float64).requires_grad_(grad)

    rank = shape.num_experts * shape.r
    return {
        "x": draw(TOKENS, IN),
        "base": None if frozen_base else draw(TOKENS, OUT),
        "weight": draw(OUT, IN, grad=False) if frozen_base else None,
        "bias": draw(OUT, grad=False) if frozen_base else None,
        "a": draw(rank, IN),
        "b": draw(OUT, rank),
        "router": draw(shape.num_experts, IN * shape.reads_token + TASK_DIM * shape.reads_task),
        "task": draw(2, TASK_DIM) if shape.reads_task else None,
        "token_tasks": torch.tensor(PACKED) if packed and shape.reads_task else None,
    }


def drawn_mask(like: torch.Tensor, p: float) -> torch.Tensor:
    """What `zero_dropped` does to ones."""
    return zero_dropped(torch.ones(like.shape), draw_dropped(like, p))


def fused(
    given: dict[str, torch.Tensor | None], shape: ExpertShape, dropout: float = 0.0
) -> torch.Tensor:
    return fused_at(given, shape, SCALINGS[shape], dropout)


def fused_at(
    given: dict[str, torch.Tensor | None], shape: ExpertShape, scaling: float, dropout: float = 0.0
) -> torch.Tensor:
    (out,) = FusedUpdate.apply(
        given["x"],
        given["task"],
        given["token_tasks"],
        shape,
        (scaling,),
        dropout,
        *of_layer(given),
    )
    return out


def of_layer(given: dict[str, torch.Tensor | None]) -> LayerTensors:
    return LayerTensors(*(given[name] for name in ("base", "weight", "bias", "a", "b", "router")))


def by_loops(
    given: dict[str, torch.Tensor | None],
    shape: ExpertShape,
    kept: torch.Tensor | None = None,
    rate: float = 0.0,
) -> torch.Tensor:
    x, base = given["x"], given["base"]
    weight = given["weight"] if base is None else torch.zeros(OUT, IN, dtype=torch.float64)
    update = reference.adapted_linear(
        x,
        weight,
        given["bias"],
        given["a"],
        given["b"],
        given["router"],
        given["task"],
        [0, 0, 0, 1, 1, 1] if given["token_tasks"] is None else PACKED,
        r=shape.r,
        scaling=SCALINGS[shape],
        reads_token=shape.reads_token,
        top_k=shape.top_k,
        kept=kept,
        drop_rate=rate,
    )
    return update if base is None else base + update


def gradients(out: torch.Tensor, given: dict[str, torch.Tensor | None]) -> dict[str, torch.Tensor]:
    wanted = {n: given[n] for n in NAMES if given[n] is not None and given[n].requires_grad}
    loss = (out * torch.arange(1.0, out.numel() + 1, dtype=out.dtype).view(out.shape)).sum()
    return dict(zip(wanted, torch.autograd.grad(loss, list(wanted.values())), strict=True))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("frozen_base", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_and_gradients_equal_the_loops(shape, frozen_base, packed, dropout) -> None:
    """With dropout: those of the plain computation under the very mask that was drawn."""
    given = tensors(shape, frozen_base=frozen_base, packed=packed)
    torch.manual_seed(5)
    kept = drawn_mask(given["x"], dropout) if dropout else None
    torch.manual_seed(5)
    out = fused(given, shape, dropout)
    expected = by_loops(given, shape, kept, dropout)
    torch.testing.assert_close(out, expected, **CLOSE)
    assert kept is None or 0 < kept.double().mean() < 1
    torch.testing.assert_close(gradients(out, given), gradients(expected, given), **CLOSE)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("frozen_base", [True, False])
@pytest.mark.parametrize("tasks", [1, 2, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_long_rows_are_computed_row_by_row(shape, tasks, frozen_base, dropout) -> None:
    """4 rows of 64 tokens: the same as one row of 256, in outputs and gradients."""
    given = tensors(shape, frozen_base=frozen_base)
    for name, width in (("x", IN), ("base", OUT)):
        if given[name] is not None:
            given[name] = torch.randn(4, 64, width, dtype=torch.float64, requires_grad=True)
    if shape.reads_task:
        given["task"] = torch.randn(tasks, TASK_DIM, dtype=torch.float64, requires_grad=True)
    flat = {
        n: v.flatten(0, 1) if n in ("x", "base") and v is not None else v for n, v in given.items()
    }
    torch.manual_seed(5)
    out = fused(given, shape, dropout)
    torch.manual_seed(5)
    expected = fused(flat, shape, dropout).view(out.shape)
    torch.testing.assert_close(out, expected, **CLOSE)
    found, wanted = gradients(out / out.numel(), given), gradients(expected / out.numel(), given)
    torch.testing.assert_close(found, wanted, **CLOSE)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[2]])
def test_gradients_equal_finite_differences(shape, dropout) -> None:
    given = tensors(shape, frozen_base=True, packed=True)

    def function(x, a, b, router, task):
        torch.manual_seed(5)  # the same mask at every call
        return fused(
            {**given, "x": x, "a": a, "b": b, "router": router, "task": task}, shape, dropout
        )

    assert torch.autograd.gradcheck(function, [given[n] for n in ("x", "a", "b", "router", "task")])


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_several_layers_are_computed_as_each_alone(shape, packed, dropout) -> None:
    """Three layers of other sizes and scalings on one x, one task and one mask; the second is given its base output."""
    layers = [tensors(shape, frozen_base=i != 1, packed=packed) for i in range(3)]
    for i, given in enumerate(layers):
        for name in ("x", "task", "token_tasks"):
            given[name] = layers[0][name]
        for name in ("base", "weight", "bias", "b"):  # other numbers of outputs
            if given[name] is not None:
                wider = torch.cat([given[name]] * (i + 1), 1 if name == "base" else 0)
                given[name] = wider.detach().requires_grad_(given[name].requires_grad)
    first, scalings = layers[0], (0.5, 1.0, 2.0)
    torch.manual_seed(5)
    together = FusedUpdate.apply(
        first["x"], first["task"], first["token_tasks"], shape, scalings, dropout,
        *(tensor for given in layers for tensor in of_layer(given)),
    )  # fmt: skip
    alone = []
    for given, scaling in zip(layers, scalings, strict=True):
        torch.manual_seed(5)  # the same mask
        alone.append(fused_at(given, shape, scaling, dropout))
    torch.testing.assert_close(together, tuple(alone), **CLOSE)
    wanted = [given[name] for given in layers for name in NAMES if given[name] is not None]
    wanted = list({id(leaf): leaf for leaf in wanted if leaf.requires_grad}.values())
    found, expected = (
        torch.autograd.grad(sum((out * out).sum() for out in outs), wanted)
        for outs in (together, alone)
    )
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert all(grad.is_contiguous() for grad in found)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_mask_drops_what_indices_drop(shape, monkeypatch) -> None:
    """Other devices than CPUs draw a mask."""
    given, results = tensors(shape, frozen_base=True), []
    for masks in (False, True):
        torch.manual_seed(5)
        if masks:
            monkeypatch.setattr(
                fused_module, "draw_dropped", lambda like, p: drawn_mask(like, p).to(torch.int8)
            )
        out = fused(given, shape, 0.4)
        results.append({"out": out, **gradients(out, given)})
    torch.testing.assert_close(results[0], results[1], **CLOSE)


def test_at_most_three_operations_more_than_lora() -> None:
    """Per linear of a Llama layer, forward and backward, on tensors that are on no CPU."""
    path = Path(__file__).parents[2] / "benchmarks" / "op_count.py"
    if not path.exists():
        pytest.skip("benchmarks/ is not here")
    spec = importlib.util.spec_from_file_location("benchmark_op_count", path)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    found = benchmark.per_linear(dropout=0.0, device="meta")
    assert found["LoRA-36"].launched == 10
    assert 10 < found["ours 8x4"].launched <= 13
    with_dropout = benchmark.per_linear(dropout=0.05, device="meta")
    assert found["ours 8x4"].launched < with_dropout["ours 8x4"].launched < 17


def test_gradcheck_on_a_given_base() -> None:
    given = tensors(SHAPES[1], frozen_base=False)

    def function(x, base, a, b, router):
        return fused({**given, "x": x, "base": base, "a": a, "b": b, "router": router}, SHAPES[1])

    assert torch.autograd.gradcheck(function, [given[n] for n in ("x", "base", "a", "b", "router")])


def test_double_backward_refuses() -> None:
    given = tensors(SHAPES[0], frozen_base=True)
    out = fused(given, SHAPES[0]).square().sum()
    (grad,) = torch.autograd.grad(out, given["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_an_input_without_gradient_gets_none() -> None:
    """The first adapted layer of a frozen model: A, B and the router still get theirs."""
    given = tensors(SHAPES[0], frozen_base=True)
    everything = gradients(fused(given, SHAPES[0]), given)
    given["x"].requires_grad_(False)
    given["task"].requires_grad_(False)
    found = gradients(fused(given, SHAPES[0]), given)
    assert set(found) == {"a", "b", "router"}
    torch.testing.assert_close(found, {name: everything[name] for name in found}, **CLOSE)


@pytest.mark.parametrize("frozen_base", [True, False])
def test_the_given_tensors_are_left_as_they_are(frozen_base) -> None:
    given = tensors(SHAPES[0], frozen_base=frozen_base)
    before = {name: value.clone() for name, value in given.items() if value is not None}
    gradients(fused(given, SHAPES[0], 0.3), given)
    assert all(torch.equal(given[name], value) for name, value in before.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision_is_close_to_float64(dtype) -> None:
    """Within a few roundings of the dtype, relative to the largest entry of each tensor."""
    given = tensors(SHAPES[0], frozen_base=True)
    with torch.no_grad():
        given["router"] *= 0.3  # gates near 0 and 1 would make small differences of large numbers
        given = {
            n: None if v is None else v.to(dtype).requires_grad_(v.requires_grad)
            for n, v in given.items()
        }
    exact = {
        n: None if v is None else v.detach().double().requires_grad_(v.requires_grad)
        for n, v in given.items()
    }
    out, expected = fused(given, SHAPES[0]), by_loops(exact, SHAPES[0])
    assert out.dtype == dtype
    assert all(grad.is_contiguous() for grad in gradients(fused(given, SHAPES[0]), given).values())
    found = {"out": out.detach(), **gradients(out, given)}
    wanted = {"out": expected.detach(), **gradients(expected, exact)}
    for name, value in found.items():
        assert value.dtype == dtype
        error = (value.double() - wanted[name]).abs().max() / wanted[name].abs().max()
        assert error < 8 * torch.finfo(dtype).eps, name


class _Seen(TorchDispatchMode):
    """Shapes and dtypes of every tensor that any operation made, and how many operations ran."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[torch.Tensor] = []
        self.softmax_dtypes: set[torch.dtype] = set()
        self.operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.operations += 1
        self.made += [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        if "softmax" in func.__name__:
            self.softmax_dtypes |= {leaf.dtype for leaf in tree_leaves(out)}
        return out


def _train_step(
    num_experts: int,
    dtype: torch.dtype = torch.float32,
    dropout: float = 0.1,
    reads_task: bool = True,
) -> _Seen:
    tokens, width, task_dim, r = 64, 32, 40, 2
    shape = ExpertShape(num_experts, r, None, True, reads_task)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, dtype=dtype, requires_grad=True)

    layer = LayerTensors(
        None, draw(width, width).detach(), None, draw(num_experts * r, width), draw(width, num_experts * r),
        draw(num_experts, width + task_dim * reads_task),
    )  # fmt: skip
    task = draw(2, task_dim).detach() if reads_task else None
    x = draw(tokens, width)
    with _Seen() as seen:
        FusedUpdate.apply(x, task, None, shape, (1.0,), dropout, *layer)[0].sum().backward()
    return seen


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_nothing_has_a_token_and_an_expert_by_out_axis(dropout) -> None:
    """64 tokens, 8 experts of rank 2, 32 x 32: such a tensor would have 16384 entries; x has 2048, all weights fewer."""
    seen = _train_step(8, dropout=dropout)
    assert max(t.numel() for t in seen.made) == 64 * 32


def test_the_task_part_is_computed_per_example_not_per_token() -> None:
    """No tensor has a token and a task axis; with 64 tokens it would have 64 x 40 entries."""
    shapes = {tuple(t.shape) for t in _train_step(8).made}
    assert not any(64 in shape and (40 in shape or 72 in shape) for shape in shapes)


def test_there_is_no_loop_over_experts() -> None:
    assert _train_step(2).operations == _train_step(16).operations > 10


@pytest.mark.parametrize("reads_task", [True, False])
def test_the_softmax_runs_in_float32(reads_task) -> None:
    assert _train_step(4, torch.bfloat16, reads_task=reads_task).softmax_dtypes == {torch.float32}


@pytest.mark.parametrize("layers", [1, 2])
def test_backward_keeps_nothing_of_the_output(layers) -> None:
    """Kept are x, the bottlenecks, the gates and, with dropout, 8 bytes a dropped feature; the logits are not."""
    tokens, width, out_width, num_experts, r, p = 64, 32, 256, 4, 2, 0.1
    shape = ExpertShape(num_experts, r, None, True, False)
    weights: list[torch.Tensor | None] = []
    for _ in range(layers):
        weights += LayerTensors(
            None, torch.randn(out_width, width), None, torch.randn(num_experts * r, width, requires_grad=True),
            torch.randn(out_width, num_experts * r), torch.randn(num_experts, width),
        )  # fmt: skip
    x = torch.randn(tokens, width, requires_grad=True)
    for dropout, dropped in (
        (0.0, 0.0),
        (p, tokens * width * p + 6 * (tokens * width * p) ** 0.5 + 18),
    ):
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor, kept: dict[int, int] = kept) -> torch.Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            FusedUpdate.apply(x, None, None, shape, (1.0,) * layers, dropout, *weights)
        for weight in weights:
            if weight is not None:
                del kept[weight.untyped_storage().data_ptr()]
        of_layers = layers * (num_experts * r + num_experts)
        assert sum(kept.values()) <= 4 * tokens * (width + of_layers) + 8 * dropped


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape.top_k is None])
def test_a_decoding_step_equals_the_loops(shape) -> None:
    given = tensors(shape, frozen_base=True)
    expected = by_loops(given, shape)
    with torch.no_grad():
        parts = (given["a"], given["b"], given["router"], given["task"], SCALINGS[shape])
        prepared = decoding_weights([parts], shape, torch.float64)
        for _ in range(2):  # the second step finds what the first one left
            out = torch.nn.functional.linear(given["x"], given["weight"], given["bias"])
            result = decoding_step(given["x"], out, prepared, 0, given["x"])
            assert result is out  # in place
            torch.testing.assert_close(out, expected, **CLOSE)


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_no_tokens(shape) -> None:
    given = tensors(shape, frozen_base=True)
    given["x"] = torch.zeros(0, IN, dtype=torch.float64, requires_grad=True)
    out = fused(given, shape, 0.2)
    assert out.shape == (0, OUT)
    assert all(not grad.any() for grad in gradients(out, given).values())


def test_other_numbers_give_other_outputs() -> None:
    """Each plain number is used: a changed one changes the output."""
    given = tensors(SHAPES[0], frozen_base=True)
    out = fused(given, SHAPES[0])
    for shape, scaling in ((SHAPES[0], 2.0), (replace(SHAPES[0], top_k=1), SCALINGS[SHAPES[0]])):
        assert not torch.allclose(out, fused_at(given, shape, scaling))
