"""Pictures of the gates show the recorded values, in cells that can be found, on one screen."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from peft_taskmoe import attach_task_encoder, heat_map, load_plot, similarity_map, token_gates
from peft_taskmoe.inspection import GateRecord, gates_by_token, record_gates

pytest.importorskip("matplotlib")
pytest.importorskip("scipy")
LOG = [
    {"step": 5, "loss": 1.0},
    {"step": 10, "expert_load_0": 0.4, "expert_load_1": 0.6, "gate_entropy": 0.9},
    {"step": 20, "expert_load_0": 0.3, "expert_load_1": 0.7, "task_share": 0.1},
]


def recorded(gates: dict[str, dict[str, list[float]]]) -> GateRecord:
    """A record in which each layer of each task saw one token with these gates."""
    record = GateRecord({})
    for task, by_layer in gates.items():
        for layer, values in by_layer.items():
            one = torch.tensor(values, dtype=torch.float64)
            record._add("default", layer, task, torch.cat((one, one**2, one, torch.ones(2))))
    return record


def large(tasks: int, blocks: int = 30, experts: int = 8) -> dict[str, dict[str, list[float]]]:
    kinds = [f"self_attn.{k}_proj" for k in "qkvo"] + ["mlp.gate_proj", "mlp.up_proj", "mlp.fc"]
    names = [f"model.layers.{b}.{kind}" for b in range(blocks) for kind in kinds]
    draw = np.random.default_rng(0)
    return {
        f"task {t} $x$": dict(zip(names, draw.dirichlet([30] * experts, len(names)), strict=True))
        for t in range(tasks)
    }


def test_the_heat_map_has_a_row_a_block_and_a_group_of_experts_a_kind_of_layer():
    gates = large(tasks=2)
    gates["task 1 $x$"]["model.layers.3.self_attn.v_proj"] = [0.76, *[0.24 / 7] * 7]
    figure = heat_map(recorded(gates), ["task 1 $x$", "task 0 $x$"])
    panels = [ax for ax in figure.axes if ax.get_title()]
    assert [ax.get_title() for ax in panels] == ["task 1 $x$", "task 0 $x$"]
    cells = panels[0].images[0].get_array()
    assert cells.shape == (30, 7 * 8)
    np.testing.assert_allclose(cells[3, 16:24], [0.76, *[0.24 / 7] * 7])
    kinds = [t.get_text() for t in panels[0].get_xticklabels()]
    assert kinds == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "fc"]
    low, high = panels[0].images[0].get_clim()
    assert low + high == pytest.approx(2 / 8) and high < 0.3  # the one gate of 0.76 is clipped


@pytest.mark.parametrize("tasks", [1, 3, 4, 12])
def test_a_heat_map_of_210_layers_fits_on_a_screen(tasks, tmp_path):
    figure = heat_map(recorded(large(tasks)))
    width, height = figure.get_size_inches()
    assert width <= 16 and height <= 9
    drawn = [ax.get_title() for ax in figure.axes if ax.axison and ax.get_title()]
    assert drawn == [f"task {t} $x$" for t in range(tasks)]  # an empty panel has no axes
    figure.savefig(tmp_path / "gates.png")  # titles with dollars are no formulas


def test_layers_outside_of_blocks_and_of_two_stacks_have_rows_of_their_own():
    names = ["encoder.block.0.q", "decoder.block.0.q", "decoder.block.0.cross.q", "lm_head"]
    figure = heat_map(recorded({"a": {name: [0.25, 0.75] for name in names}}))
    ax = figure.axes[0]
    rows = [t.get_text() for t in ax.get_yticklabels()]
    assert rows == ["encoder.block 0", "decoder.block 0", "none"]
    assert np.isnan(ax.images[0].get_array().filled(np.nan)[0, 2:4]).all()  # no cross.q there
    columns = [t.get_text() for t in ax.get_xticklabels()]
    assert columns == ["q", "cross.q", "lm_head"]


def test_the_similarity_map_puts_like_tasks_side_by_side():
    gates = {"a": [0.9, 0.1], "far": [0.1, 0.9], "like a": [0.85, 0.15], "like far": [0.2, 0.8]}
    record = recorded({task: {"h.0.q": values} for task, values in gates.items()})
    figure = similarity_map(record)
    tree, matrix = figure.axes[:2]
    order = [t.get_text() for t in matrix.get_yticklabels()]
    assert sorted([sorted(order[:2]), sorted(order[2:])]) == [["a", "like a"], ["far", "like far"]]
    cells, similarity = matrix.images[0].get_array(), record.similarity()
    for i, one in enumerate(order):
        for j, other in enumerate(order):
            if i != j:
                assert cells[i, j] == pytest.approx(similarity[one][other])
    assert len(tree.collections) == 1  # the dendrogram
    with pytest.raises(ValueError, match="Record two tasks or more"):
        similarity_map(recorded({"a": {"h.0.q": [0.5, 0.5]}}))


def test_token_gates_show_the_gates_of_every_token(adapted, tiny_encoder, word_tokenizer):
    model = attach_task_encoder(adapted(), tiny_encoder, word_tokenizer).train()
    prompt = " ".join(f"w{4 + i % 50}" for i in range(60))
    tokens, by_layer = gates_by_token(model, prompt)
    assert tokens == prompt.split() and model.training
    with record_gates(model.eval()) as record, torch.no_grad():
        model(input_ids=word_tokenizer(prompt, return_tensors="pt").input_ids)
    assert list(by_layer) == record.layers()
    means = torch.stack([gates.mean(0) for gates in by_layer.values()]).double()
    torch.testing.assert_close(means, record.mean_gates("all"), atol=1e-5, rtol=0)
    name = record.layers()[1]
    panels = [ax for ax in token_gates(model, prompt, layer=name).axes if ax.images]
    drawn = np.concatenate([ax.images[0].get_array() for ax in panels[:2]], axis=1)
    np.testing.assert_allclose(drawn, by_layer[name].numpy().T, atol=1e-6)
    assert panels[1].get_xticklabels()[-1].get_text() == prompt.split()[-1]
    with pytest.raises(ValueError, match=r"`layer` must be one of .*got 'lm_head'"):
        token_gates(model, prompt, layer="lm_head")
    with pytest.raises(ValueError, match=r"`adapter` must be one with gates, \['default'\]"):
        token_gates(model, prompt, adapter="other")


def test_the_load_plot_shows_each_expert_over_the_steps():
    loads, shares = load_plot(LOG).axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in loads.lines}
    assert lines["0"] == [[10, 0.4], [20, 0.3]] and lines["1"] == [[10, 0.6], [20, 0.7]]
    assert shares.lines[0].get_ydata()[0] == 0.9 and np.isnan(shares.lines[1].get_ydata()[0])
    with pytest.raises(ValueError, match=r"None of the 1 entries.*`log_routing\(trainer\)`"):
        load_plot(LOG[:1])


@pytest.mark.parametrize("package", ["matplotlib", "scipy"])
def test_optional_packages_are_named_where_missing(package, monkeypatch):
    record = recorded({task: {"h.0.q": [0.5, 0.5]} for task in "ab"})
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"needs `{package}`.*'peft_taskmoe\[plot\]'"):
        similarity_map(record)


@pytest.mark.parametrize("tasks, numbers", [(3, 9), (40, 0)])
def test_a_similarity_map_has_numbers_as_far_as_they_can_be_read(tasks, numbers):
    gates = {f"t{i}": {"h.0.q": [i / 50, 1 - i / 50]} for i in range(1, tasks + 1)}
    _, matrix, *_ = similarity_map(recorded(gates)).axes
    assert len(matrix.texts) == numbers and len(matrix.get_yticklabels()) == tasks
