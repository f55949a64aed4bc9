"""`fused.py` and `decoding.py` against `reference.py`: outputs, gradients, precision, memory."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import peft_taskmoe.fused
import reference
from peft_taskmoe.decoding import decoding_step, decoding_weights
from peft_taskmoe.experts import draw_dropped, zero_dropped
from peft_taskmoe.fused import ExpertShape, FusedUpdate

IN, OUT, TASK_DIM = 5, 4, 3
CLOSE = {"rtol": 0, "atol": 1e-10}
TENSORS = ("x", "base", "weight", "bias", "a", "b", "router", "task", "token_tasks")
SHAPES = [
    ExpertShape(num_experts=3, r=2, top_k=None, reads_token=True, reads_task=True),
    ExpertShape(num_experts=3, r=2, top_k=None, reads_token=True, reads_task=False),
    ExpertShape(num_experts=3, r=2, top_k=None, reads_token=False, reads_task=True),
    ExpertShape(num_experts=4, r=1, top_k=2, reads_token=True, reads_task=True),
    ExpertShape(num_experts=1, r=3, top_k=None, reads_token=True, reads_task=True),
]
PACKED = [1, 0, 0, 1, 1, 1]
SCALINGS = dict(zip(SHAPES, (1.5, 1.5, 1.5, 0.5, 8.0), strict=True))
Given = dict[str, torch.Tensor | None]


def tensors(shape: ExpertShape, *, frozen_base: bool = True, packed: bool = False) -> Given:
    """Random float64 arguments of `FusedUpdate`: two rows of three tokens."""

    def draw(*size: int, grad: bool = True) -> torch.Tensor:
        return torch.randn(*size, dtype=torch.float64).requires_grad_(grad)

    rank = shape.num_experts * shape.r
    return {
        "x": draw(2, 3, IN),
        "base": None if frozen_base else draw(2, 3, OUT),
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


def fused(given: Given, shape: ExpertShape, dropout: float = 0.0) -> torch.Tensor:
    arguments = (given[name] for name in TENSORS)
    return FusedUpdate.apply(*arguments, shape, SCALINGS[shape], dropout)


def by_loops(
    given: Given, shape: ExpertShape, kept: torch.Tensor | None = None, rate: float = 0.0
) -> torch.Tensor:
    x, base = given["x"], given["base"]
    out = reference.adapted_linear(
        x.reshape(-1, IN),
        torch.zeros(OUT, IN, dtype=torch.float64) if base is not None else given["weight"],
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
    ).view(*x.shape[:-1], OUT)
    return out if base is None else base + out


def gradients(out: torch.Tensor, given: Given) -> dict[str, torch.Tensor]:
    wanted = {n: v for n, v in given.items() if v is not None and v.requires_grad}
    loss = (out * torch.arange(1.0, out.numel() + 1, dtype=out.dtype).view(out.shape)).sum()
    return dict(zip(wanted, torch.autograd.grad(loss, list(wanted.values())), strict=True))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("frozen_base", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_and_gradients_equal_the_loops(shape, frozen_base, packed, dropout) -> None:
    """With dropout: those of the plain computation under the very mask that was drawn."""
    given = tensors(shape, frozen_base=frozen_base, packed=packed)
    before = {name: value.clone() for name, value in given.items() if value is not None}
    torch.manual_seed(5)
    kept = drawn_mask(given["x"], dropout).view(-1, IN) if dropout else None
    torch.manual_seed(5)
    out = fused(given, shape, dropout)
    expected = by_loops(given, shape, kept, dropout)
    torch.testing.assert_close(out, expected, **CLOSE)
    assert kept is None or 0 < kept.double().mean() < 1
    found = gradients(out, given)
    torch.testing.assert_close(found, gradients(expected, given), **CLOSE)
    assert all(grad.is_contiguous() for grad in found.values())
    assert all(torch.equal(given[name], value) for name, value in before.items())


@pytest.mark.parametrize("frozen_base", [True, False])
def test_gradients_equal_finite_differences(frozen_base) -> None:
    given = tensors(SHAPES[0], frozen_base=frozen_base, packed=True)
    names = [n for n, v in given.items() if v is not None and v.requires_grad]

    def function(*values: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(5)  # the same mask at every call
        return fused({**given, **dict(zip(names, values, strict=True))}, SHAPES[0], 0.4)

    assert torch.autograd.gradcheck(function, [given[name] for name in names])


@pytest.mark.parametrize("shape", SHAPES)
def test_a_mask_drops_what_indices_drop(shape, monkeypatch) -> None:
    """Other devices than CPUs draw a mask."""
    given, results = tensors(shape), []
    for draw in (draw_dropped, lambda like, p: drawn_mask(like, p).to(torch.int8)):
        torch.manual_seed(5)
        monkeypatch.setattr(peft_taskmoe.fused, "draw_dropped", draw)
        out = fused(given, shape, 0.4)
        results.append({"out": out, **gradients(out, given)})
    torch.testing.assert_close(results[0], results[1], **CLOSE)


def test_double_backward_raises() -> None:
    given = tensors(SHAPES[0])
    out = fused(given, SHAPES[0]).square().sum()
    (grad,) = torch.autograd.grad(out, given["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_a_base_output_of_any_layout_is_added_to() -> None:
    """A layer may return a transposed view, which cannot be flattened in place."""
    given = tensors(SHAPES[0], frozen_base=False)
    given["base"] = torch.randn(OUT, 3, 2, dtype=torch.float64).permute(2, 1, 0).requires_grad_()
    torch.testing.assert_close(fused(given, SHAPES[0]), by_loops(given, SHAPES[0]), **CLOSE)


def test_a_task_in_another_dtype_gets_its_gradient_in_its_own() -> None:
    given = tensors(SHAPES[0])
    exact = gradients(fused(given, SHAPES[0]), given)
    given["task"] = given["task"].detach().float().requires_grad_()
    found = gradients(fused(given, SHAPES[0]), given)
    assert found["task"].dtype == torch.float32 and found["router"].dtype == torch.float64
    torch.testing.assert_close(found["task"].double(), exact["task"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision_is_close_to_float64(dtype) -> None:
    """Within a few roundings of the dtype, relative to the largest entry of each tensor."""

    def cast(values: Given, to: torch.dtype) -> Given:
        return {
            name: None if v is None else v.detach().to(to).requires_grad_(v.requires_grad)
            for name, v in values.items()
        }

    given = tensors(SHAPES[0])
    with torch.no_grad():
        given["router"] *= 0.3  # gates near 0 and 1 would make small differences of large numbers
    given = cast(given, dtype)
    exact = cast(given, torch.float64)
    out, expected = fused(given, SHAPES[0]), by_loops(exact, SHAPES[0])
    found = {"out": out.detach(), **gradients(out, given)}
    wanted = {"out": expected.detach(), **gradients(expected, exact)}
    for name, value in found.items():
        assert value.dtype == dtype and value.is_contiguous()
        error = (value.double() - wanted[name]).abs().max() / wanted[name].abs().max()
        assert error < 8 * torch.finfo(dtype).eps, name


VIEWS = {
    "view", "_unsafe_view", "t", "transpose", "expand", "slice", "unsqueeze", "squeeze", "alias",
    "detach", "as_strided", "_reshape_alias", "split", "split_with_sizes", "select",
    "promote_types", "new_empty", "empty", "empty_like",
}  # fmt: skip


class Seen(TorchDispatchMode):
    """What ran under it: shapes made, dtypes of softmaxes, the number of operations but views."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[torch.Size] = []
        self.softmax_dtypes: set[torch.dtype] = set()
        self.launched = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.launched += func.overloadpacket.__name__ not in VIEWS
        self.shapes += [leaf.shape for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        if "softmax" in func.__name__:
            self.softmax_dtypes |= {leaf.dtype for leaf in tree_leaves(out)}
        return out


def train_step(
    num_experts: int = 8,
    dtype: torch.dtype = torch.float32,
    dropout: float = 0.1,
    reads_task: bool = True,
    device: str = "cpu",
) -> Seen:
    """64 tokens through a layer of 32 x 32, whose router reads a task of 40 dimensions."""
    shape = ExpertShape(num_experts, 2, None, True, reads_task)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, dtype=dtype, device=device, requires_grad=True)

    weights = (draw(num_experts * 2, 32), draw(32, num_experts * 2))
    weights += (draw(num_experts, 32 + 40 * reads_task),)
    task = draw(2, 40).detach() if reads_task else None
    x, weight = draw(64, 32), draw(32, 32).detach()
    with Seen() as seen:
        out = FusedUpdate.apply(x, None, weight, None, *weights, task, None, shape, 1.0, dropout)
        torch.autograd.backward(out, torch.ones_like(out))
    return seen


def test_at_most_ten_operations_more_than_lora() -> None:
    """Forward and backward of one linear, on tensors that are on no CPU; five more with dropout."""
    model = nn.ModuleDict({"linear": nn.Linear(32, 32, bias=False)})
    lora = inject_adapter_in_model(LoraConfig(target_modules=["linear"]), model)["linear"]
    lora, x = lora.to("meta"), torch.randn(64, 32, device="meta", requires_grad=True)
    with Seen() as of_lora:
        out = lora(x)
        torch.autograd.backward(out, torch.ones_like(out))
    ours, dropped = (train_step(device="meta", dropout=p).launched for p in (0.0, 0.1))
    assert of_lora.launched < ours <= of_lora.launched + 10
    assert ours < dropped <= ours + 5


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_no_tensor_has_a_token_and_an_expert_by_out_axis(dropout) -> None:
    """With 8 experts it would have 16384 entries; x has 2048, all weights fewer."""
    assert max(size.numel() for size in train_step(dropout=dropout).shapes) == 64 * 32


def test_the_task_part_is_computed_per_example_not_per_token() -> None:
    assert not any(64 in shape and (40 in shape or 72 in shape) for shape in train_step().shapes)


def test_there_is_no_loop_over_experts() -> None:
    assert train_step(2).launched == train_step(16).launched > 10


@pytest.mark.parametrize("reads_task", [True, False])
def test_the_softmax_runs_in_float32(reads_task) -> None:
    assert train_step(4, torch.bfloat16, reads_task=reads_task).softmax_dtypes == {torch.float32}


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_backward_keeps_nothing_of_the_output(dropout) -> None:
    """Kept are x, bottleneck, gates and, with dropout, 8 bytes a dropped feature; no logits."""
    tokens, width, out_width, num_experts, r = 64, 32, 256, 4, 2
    shape = ExpertShape(num_experts, r, None, True, False)
    weight, a, b, router = (
        torch.randn(*size)
        for size in (
            (out_width, width), (num_experts * r, width), (out_width, num_experts * r),
            (num_experts, width),
        )
    )  # fmt: skip
    x = torch.randn(tokens, width, requires_grad=True)
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    a.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        FusedUpdate.apply(x, None, weight, None, a, b, router, None, None, shape, 1.0, dropout)
    for given in (weight, a, b, router):
        del kept[given.untyped_storage().data_ptr()]
    n = tokens * width * dropout
    dropped = 8 * (n + 6 * n**0.5 + 18) if dropout else 0
    assert sum(kept.values()) <= 4 * tokens * (width + num_experts * r + num_experts) + dropped


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape.top_k is None])
def test_a_decode_step_equals_the_loops(shape) -> None:
    """Six rows, three of each task."""
    given = tensors(shape)
    expected, x = by_loops(given, shape).view(6, OUT), given["x"].view(6, IN)
    with torch.no_grad():
        weights = (given["a"], given["b"], given["router"], given["task"])
        prepared = decoding_weights(*weights, 6, SCALINGS[shape], shape)
        for _ in range(2):  # a step leaves the weights as they are
            out = torch.nn.functional.linear(x, given["weight"], given["bias"])
            assert decoding_step(x, out, prepared) is out  # in place
            torch.testing.assert_close(out, expected, **CLOSE)


@pytest.mark.parametrize("shape", SHAPES[:3])
def test_no_tokens(shape) -> None:
    given = tensors(shape)
    given["x"] = torch.zeros(0, IN, dtype=torch.float64, requires_grad=True)
    out = fused(given, shape, 0.2)
    assert out.shape == (0, OUT)
    assert all(not grad.any() for grad in gradients(out, given).values())


@pytest.mark.parametrize("bias", [True, False])
def test_the_base_is_computed_into_memory_of_its_own_shape(bias) -> None:
    """Torch warns where an output has another one."""
    given = tensors(SHAPES[0]) | ({} if bias else {"bias": None})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fused(given, SHAPES[0])
