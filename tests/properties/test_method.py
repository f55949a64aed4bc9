"""What holds of router, experts and configurations, whatever their sizes."""

import contextlib
import json

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from peft_taskmoe import TaskEncoderConfig, TaskMoELoraConfig
from peft_taskmoe.cache import LRUCache
from peft_taskmoe.decoding import decoding_step, decoding_weights
from peft_taskmoe.experts import draw_dropped, expert_update, zero_dropped
from peft_taskmoe.fused import ExpertShape, FusedUpdate
from peft_taskmoe.router import (
    gates_from_logits,
    load_balancing_loss,
    normalize_task,
    spread_over_tokens,
    sum_logits,
    task_logits,
)
from reference import adapted_linear, balancing_loss
from strategies import JSON


@st.composite
def layers(draw):
    """One layer of random sizes in float64: its weights, x for each row, a task for each row."""
    rows, length, experts, r = (draw(st.integers(1, most)) for most in (3, 4, 4, 3))
    width, out, task_dim = (draw(st.integers(1, 6)) for _ in range(3))
    inputs = draw(st.sampled_from(["token+task", "token", "task"]))
    top_k = draw(st.sampled_from([None, *range(1, experts + 1)]))
    shape = ExpertShape(experts, r, top_k, inputs != "task", inputs != "token")
    g = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    read = width * shape.reads_token + task_dim * shape.reads_task

    def normal(*sizes):
        return torch.randn(*sizes, generator=g, dtype=torch.float64)

    task = normal(rows, task_dim) if shape.reads_task else None
    weights = normal(experts * r, width), normal(out, experts * r), normal(experts, read)
    return shape, normal(rows, length, width), normal(out, width), weights, task


def fused(shape, x, base, weights, task, scaling=0.7):
    return FusedUpdate.apply(x, None, base, None, *weights, task, None, shape, scaling, 0.0)


@given(layers())
def test_the_fused_layer_is_the_papers_formula(layer):
    shape, x, base, weights, task = layer
    rows, length, width = x.shape
    owners = [row for row in range(rows) for _ in range(length)]
    expected = adapted_linear(
        x.reshape(-1, width), base, None, *weights, task, owners,
        r=shape.r, scaling=0.7, reads_token=shape.reads_token, top_k=shape.top_k,
    )  # fmt: skip
    found = fused(*layer).reshape(rows * length, -1)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@given(layers())
def test_a_row_is_computed_as_if_it_were_alone(layer):
    shape, x, base, weights, task = layer
    together = fused(*layer)
    for row in range(x.shape[0]):
        own = None if task is None else task[row : row + 1]
        alone = fused(shape, x[row : row + 1], base, weights, own)
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-9, atol=1e-9)


@given(layers(), st.randoms())
def test_the_order_of_experts_does_not_matter(layer, random):
    shape, x, base, (a, b, router), task = layer
    order = random.sample(range(shape.num_experts), shape.num_experts)
    features = [expert * shape.r + i for expert in order for i in range(shape.r)]
    permuted = a[features], b[:, features], router[order]
    torch.testing.assert_close(
        fused(shape, x, base, permuted, task), fused(*layer), rtol=1e-9, atol=1e-9
    )


@given(layers())
def test_a_decode_step_is_the_fused_layer_of_one_token(layer):
    shape, x, base, weights, task = layer
    shape = ExpertShape(shape.num_experts, shape.r, None, shape.reads_token, shape.reads_task)
    x = x[:, :1]
    prepared = decoding_weights(*weights, task, x.shape[0], 0.7, shape)
    step = decoding_step(x[:, 0], x[:, 0] @ base.t(), prepared)
    expected = fused(shape, x, base, weights, task)[:, 0]
    torch.testing.assert_close(step, expected, rtol=1e-9, atol=1e-9)


@given(layers())
def test_the_plain_form_is_the_fused_one(layer):
    shape, x, base, (a, b, router), task = layer
    x2 = x.reshape(-1, x.shape[-1])
    token = x2 @ router[:, : x2.shape[1]].t() if shape.reads_token else None
    per_task = None if task is None else task_logits(task, router)
    gates = gates_from_logits(sum_logits(token, per_task, x2.shape[0], None), shape.top_k)
    plain = x2 @ base.t() + expert_update(x2, gates, a, b, 0.7)
    torch.testing.assert_close(fused(*layer).view(plain.shape), plain, rtol=1e-9, atol=1e-9)


@given(layers())
def test_gradients_of_the_fused_layer_are_those_of_the_formula(layer):
    shape, x, base, weights, task = layer
    owners = [row for row in range(x.shape[0]) for _ in range(x.shape[1])]
    found, expected = [], []
    for grads, plain in ((found, False), (expected, True)):
        leaves = [t.clone().requires_grad_() for t in (x, *weights)]
        if plain:
            out = adapted_linear(
                leaves[0].reshape(-1, x.shape[-1]), base, None, *leaves[1:], task, owners,
                r=shape.r, scaling=0.7, reads_token=shape.reads_token, top_k=shape.top_k,
            )  # fmt: skip
        else:
            out = fused(shape, leaves[0], base, leaves[1:], task)
        (out.reshape(-1) * torch.arange(out.numel())).sum().backward()
        grads += [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-7)


LOGITS = st.integers(1, 5).flatmap(
    lambda e: st.lists(st.lists(st.floats(-50, 50), min_size=e, max_size=e), min_size=1, max_size=5)
).map(lambda rows: torch.tensor(rows, dtype=torch.float64))  # fmt: skip


@given(LOGITS, st.data())
def test_gates_are_a_distribution_over_the_kept_experts(logits, data):
    top_k = data.draw(st.sampled_from([None, *range(1, logits.shape[1] + 1)]))
    gates = gates_from_logits(logits, top_k)
    torch.testing.assert_close(gates.sum(-1), torch.ones(len(gates), dtype=gates.dtype))
    assert (gates >= 0).all() and ((gates > 0).sum(-1) <= (top_k or logits.shape[1])).all()
    larger = logits[:, :, None] > logits[:, None, :]
    assert (gates[:, :, None] >= gates[:, None, :])[larger].all()


@given(LOGITS, st.data())
def test_the_balancing_loss_and_its_gradient_are_those_of_the_formula(logits, data):
    logits = logits + torch.arange(logits.shape[1]) * 1e-3  # no ties
    mask = data.draw(st.lists(st.booleans(), min_size=len(logits), max_size=len(logits)))
    top_k = data.draw(st.sampled_from([None, 1]))
    leaf = logits.clone().requires_grad_()
    loss, gradient = load_balancing_loss(logits, top_k, torch.tensor(mask))
    expected = balancing_loss(leaf, top_k, mask)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-9, atol=1e-12)
    if any(mask):
        expected.backward()
        torch.testing.assert_close(gradient, leaf.grad, rtol=1e-8, atol=1e-12)


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 3))
def test_each_task_owns_an_equal_share_of_consecutive_tokens(n, share, e):
    per_task = torch.arange(n * e, dtype=torch.float64).view(n, e)
    spread = spread_over_tokens(per_task, n * share, None)
    owners = torch.tensor([t for t in range(n) for _ in range(share)])
    assert torch.equal(spread, spread_over_tokens(per_task, n * share, owners))


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=6), st.integers(1, 50))
def test_task_norms_forget_the_encoders_scale(values, width):
    e = torch.tensor([values], dtype=torch.float64)
    for norm in ("matched", "rms"):
        scaled = normalize_task(e, norm, width)
        assert scaled.isfinite().all()
        if e.norm() > 1e-6:
            torch.testing.assert_close(normalize_task(e * 7.5, norm, width), scaled)


@given(st.integers(1, 300), st.floats(0.01, 0.9), st.integers(0, 10**6))
def test_dropped_features_are_named_once_and_in_order(n, p, seed):
    torch.manual_seed(seed)
    features = torch.ones(n)
    dropped = draw_dropped(features, p)
    assert dropped.tolist() == sorted(set(dropped.tolist()))
    assert dropped.numel() == 0 or (dropped[0] >= 0 and dropped[-1] < n)
    assert zero_dropped(features, dropped).sum() == n - dropped.numel()


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 40)), max_size=40))
def test_a_cache_never_holds_more_than_it_may(puts):
    cache, last = LRUCache[int, bytes](100, lambda key, value: len(value)), {}
    for key, size in puts:
        cache.put(key, bytes(size))
        last[key] = size
        assert cache.get(key) == bytes(size)
        held = {k: v for k in last if (v := cache.get(k)) is not None}
        assert sum(map(len, held.values())) == cache.nbytes <= 100
        assert all(len(value) == last[k] for k, value in held.items())


FIELDS = ["num_experts", "r", "lora_alpha", "lora_dropout", "router_inputs", "top_k", "task_dim"]
FIELDS += ["router_aux_loss_coef", "task_norm", "task_encoder", "target_modules", "rank_pattern"]
FIELDS += ["alpha_pattern", "bias", "init_weights", "use_rslora", "exclude_modules"]


@given(st.sampled_from(FIELDS), JSON)
def test_a_setting_is_taken_or_refused_by_its_name(field, value):
    try:
        config = TaskMoELoraConfig(**{field: value})
    except (ValueError, TypeError) as error:
        assert field.replace("_", " ") in str(error).replace("_", " ")
        return
    again = TaskMoELoraConfig(**json.loads(json.dumps(config.to_dict(), default=sorted)))
    assert again.to_dict() == config.to_dict()


@given(st.dictionaries(st.sampled_from(["pooling", "max_length", "stride", "revision", "x"]), JSON))
def test_settings_of_an_encoder_are_taken_or_refused(values):
    with contextlib.suppress(ValueError):
        config = TaskEncoderConfig.from_dict(values)
        assert TaskEncoderConfig.of(config.to_dict()) == config
        assert np.isfinite(config.max_length or 0)
