"""Bases that are no text decoders: rows are routed by their own task, or layers refused by name."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from inspect import signature
from typing import Any

import pytest
import torch
import transformers as tf
from peft import PeftModel, get_peft_model
from torch import nn

from cases import SMALL, louder, tasks
from peft_taskmoe import TaskMoELoraConfig, task_context, to_lora
from peft_taskmoe.layer import TaskMoELoraLayer
from tiny import randomise

WIDE = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
LED = {
    "vocab_size": 64, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "init_std": 0.3,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24, "attention_window": 8, "max_encoder_position_embeddings": 64,
    "max_decoder_position_embeddings": 64, "eos_token_id": None, "dropout": 0.0,
}  # fmt: skip
DEBERTA = {**WIDE, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
DEBERTA_V3 = {
    **DEBERTA, "share_att_key": True, "position_buckets": 16, "position_biased_input": False,
    "norm_rel_ebd": "layer_norm",
}  # fmt: skip
BASES: dict[str, Callable[[], nn.Module]] = {
    "longformer": lambda: tf.LongformerModel(
        tf.LongformerConfig(**WIDE, attention_window=8, pad_token_id=1)
    ),
    "led": lambda: tf.LEDForConditionalGeneration(tf.LEDConfig(**LED)),
    "xlnet": lambda: tf.XLNetModel(
        tf.XLNetConfig(vocab_size=64, d_model=16, n_layer=1, n_head=2, d_inner=24, dropout=0.0)
    ),
    "deberta": lambda: tf.DebertaModel(tf.DebertaConfig(**DEBERTA)),
    "deberta-v2": lambda: tf.DebertaV2Model(tf.DebertaV2Config(**DEBERTA)),
    "deberta-v3": lambda: tf.DebertaV2Model(tf.DebertaV2Config(**DEBERTA_V3)),
}


def adapt(base: nn.Module, **settings: Any) -> PeftModel:
    """A base with a strong random adapter, in eval mode."""
    return louder(
        randomise(get_peft_model(base, TaskMoELoraConfig(**{**SMALL, **settings})))
    ).eval()


def batch_of(rows: int, length: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, 60, (rows, length), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def assert_rows_are_those_alone(
    model: PeftModel, batches: list[dict[str, Any]], atol: float = 1e-5
) -> None:
    """The last batch against the others, which hold one row each; the tasks differ and matter."""
    *alone, together = batches
    embeds = tasks(len(alone))
    with torch.no_grad():
        found = model(**together, task_embeds=embeds)[0]
        expected = [
            model(**row, task_embeds=embeds[i : i + 1])[0][0] for i, row in enumerate(alone)
        ]
        other = model(**together, task_embeds=embeds.flip(0))[0]
    torch.testing.assert_close(found, torch.stack(expected), atol=atol, rtol=1e-4)
    assert (other - found).abs().max() > 1e-3


def rows_and_all(batch: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    count = batch["input_ids"].shape[0]
    return [{k: v[i : i + 1] for k, v in batch.items()} for i in range(count)] + [batch]


@pytest.mark.parametrize("name", BASES)
def test_a_row_in_a_batch_equals_the_row_alone(name) -> None:
    """Longformer, LED and XLNet hand (length, rows, d) to layers, DeBERTa relative positions."""
    model = adapt(BASES[name]())
    atol = 5e-4 if name == "led" else 1e-5  # LED of transformers 4.57 rounds more
    assert_rows_are_those_alone(model, rows_and_all(batch_of(3, 8)), atol)
    assert_rows_are_those_alone(model, rows_and_all(batch_of(2, 8)), atol)


def test_a_generated_row_of_led_equals_the_row_alone() -> None:
    model = adapt(BASES["led"]())
    batch, embeds = batch_of(3, 8), tasks(3)
    options = {"max_new_tokens": 5, "do_sample": False}
    found = model.generate(**batch, task_embeds=embeds, **options)
    alone = [
        model.generate(**row, task_embeds=embeds[i : i + 1], **options)
        for i, row in enumerate(rows_and_all(batch)[:-1])
    ]
    assert torch.equal(found, torch.cat(alone))


@pytest.mark.parametrize("name", ["longformer", "led", "xlnet"])
def test_a_square_batch_in_which_rows_and_tokens_look_alike_is_refused(name) -> None:
    model = adapt(BASES[name]())
    with pytest.raises(ValueError, match=r"Layer `\S+` gets .*batch and tokens look alike"):
        model(**batch_of(8, 8), task_embeds=tasks(8))


@pytest.mark.parametrize("name", ["deberta", "deberta-v2", "deberta-v3"])
@pytest.mark.parametrize("router_inputs", ["token+task", "token"])
def test_deberta_trains(name, router_inputs) -> None:
    model = adapt(BASES[name](), router_inputs=router_inputs).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    batch, losses = batch_of(2, 8), []
    target = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(3))
    for _ in range(3):
        loss = (model(**batch, task_embeds=tasks(2))[0] - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]


def test_no_weight_equals_an_adapter_that_leaves_positions_alone() -> None:
    """DeBERTa v3 gives its query and key projections positions as well, which no task owns."""
    model, task = adapt(BASES["deberta-v3"](), router_inputs="task"), tasks(1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with task_context(task), pytest.raises(ValueError, match="also projects relative positions"):
        model.merge_adapter()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.warns(UserWarning, match=r"2 layers, such as `\S*query_proj`, also.*to measure it"):
        assert not to_lora(model, task).report.exact
    without = {"exclude_modules": ["query_proj", "key_proj"], "router_inputs": "task"}
    model = adapt(BASES["deberta-v3"](), **without)
    expected = model(**batch_of(1, 8), task_embeds=task)[0]
    assert to_lora(model, task).report.exact
    with task_context(task):
        model.merge_adapter()
    torch.testing.assert_close(model(**batch_of(1, 8))[0], expected, atol=1e-4, rtol=1e-4)


# --- Experts that are linear layers


class SparseBlock(nn.Module):
    """Experts that are linear layers and see a part of the tokens each."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(16, 16, bias=False) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.reshape(-1, 16)
        out = torch.zeros_like(tokens)
        for i, expert in enumerate(self.experts):
            chosen = ((tokens[:, 0] > 0).long() == i).nonzero()[:, 0]
            out = out.index_copy(0, chosen, expert(tokens[chosen]))
        return out.view(x.shape)


def _llama_with_a_sparse_block() -> nn.Module:
    settings = {k: v for k, v in WIDE.items() if not k.endswith("_prob")}
    base = tf.LlamaForCausalLM(tf.LlamaConfig(**settings, eos_token_id=None, pad_token_id=0))
    base.model.layers[0].mlp = SparseBlock()
    return base


def _switch() -> nn.Module:
    return tf.SwitchTransformersForConditionalGeneration(
        tf.SwitchTransformersConfig(
            vocab_size=64, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_decoder_layers=1,
            num_heads=2, num_experts=2, num_sparse_encoder_layers=1, num_sparse_decoder_layers=0,
            decoder_start_token_id=0,
        )
    )  # fmt: skip


EXPERTS = [(_llama_with_a_sparse_block, r".*experts\.\d"), (_switch, r".*experts.*\.w[io]")]


@pytest.mark.parametrize(("build", "targets"), EXPERTS)
def test_experts_that_see_a_part_of_the_tokens_are_refused_everywhere(build, targets) -> None:
    """Also where an expert's tokens happen to be as many as rows, or as all tokens."""
    model = adapt(build(), target_modules=targets)
    batch, embeds = batch_of(2, 6), tasks(2)
    extra = {"decoder_input_ids": batch["input_ids"]} if build is _switch else {}
    with pytest.raises(ValueError, match=r"`\S*experts\S*` gets a part of the tokens") as first:
        model(**batch, **extra, task_embeds=embeds)
    with pytest.raises(ValueError) as second:
        model.generate(**batch, task_embeds=embeds, max_new_tokens=1)
    assert str(first.value) == str(second.value)
    model.generate(**batch_of(1, 6), task_embeds=tasks(1), max_new_tokens=1)  # one task: no doubt
    token_only = adapt(build(), target_modules=targets, router_inputs="token")
    token_only.generate(**batch, max_new_tokens=1)


# --- Vision and language

TEXT = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 64, "initializer_range": 0.3,
}  # fmt: skip
IMAGE = 63


def _llava() -> nn.Module:
    vision = tf.CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        image_size=8, patch_size=4,
    )  # fmt: skip
    config = tf.LlavaConfig(
        vision_config=vision, text_config=tf.LlamaConfig(**TEXT), image_token_id=IMAGE
    )
    return tf.LlavaForConditionalGeneration(config)


def _llava_batch(images: list[int]) -> list[dict[str, Any]]:
    """Rows of 15 tokens with so many images each, of four tokens an image."""
    pixels = torch.randn(sum(images), 3, 8, 8, generator=torch.Generator().manual_seed(1))
    ids = batch_of(len(images), 15)["input_ids"]
    for row, count in zip(ids, images, strict=True):
        row[: 4 * count] = IMAGE
    parts = zip(ids, pixels.split(images), strict=True)
    alone = [{"input_ids": row[None], "pixel_values": of if len(of) else None} for row, of in parts]
    return [*alone, {"input_ids": ids, "pixel_values": pixels}]


def _qwen2_vl() -> nn.Module:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10_000.0}
    config = tf.Qwen2VLConfig(
        text_config={**TEXT, "rope_parameters": rope},
        vision_config={
            "depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 4,
            "spatial_merge_size": 2,
        },
        image_token_id=IMAGE, vision_start_token_id=62,
    )  # fmt: skip
    return tf.Qwen2VLForConditionalGeneration(config)


def _qwen2_vl_batch(rows: int) -> list[dict[str, Any]]:
    """Rows of six tokens with one image of four patches, one token, each."""
    ids = batch_of(rows, 6)["input_ids"]
    ids[:, 0], ids[:, 1] = 62, IMAGE
    pixels = torch.randn(4 * rows, 96, generator=torch.Generator().manual_seed(1))
    found = []
    for i in [*(slice(row, row + 1) for row in range(rows)), slice(0, rows)]:
        count = ids[i].shape[0]
        patches = pixels[4 * i.start : 4 * i.start + 4 * count]
        found.append(
            {
                "input_ids": ids[i],
                "attention_mask": torch.ones_like(ids[i]),
                "mm_token_type_ids": (ids[i] == IMAGE).long(),
                "pixel_values": patches,
                "image_grid_thw": torch.tensor([[1, 2, 2]] * count),
            }
        )
    return found


@pytest.mark.parametrize(
    ("build", "tower", "batches"),
    [
        (_llava, "vision_tower", _llava_batch([3, 1])),
        (_llava, "vision_tower", _llava_batch([2, 1])),
        (_llava, "vision_tower", _llava_batch([1, 0])),
        pytest.param(
            *(_qwen2_vl, "visual", _qwen2_vl_batch(2)),
            marks=pytest.mark.skipif(
                "mm_token_type_ids" not in signature(tf.Qwen2VLModel.forward).parameters,
                reason="Qwen2-VL of transformers 4 has another config and forward",
            ),
        ),
    ],
)
def test_images_are_left_to_the_base_model(build, tower, batches) -> None:
    """One warning names the tower; rows with several or no images are those alone."""
    with pytest.warns(UserWarning, match=rf"\.{tower}`.* not adapted") as caught:
        model = adapt(build())
    assert sum("not adapted" in str(warning.message) for warning in caught) == 1
    names = [n for n, m in model.named_modules() if isinstance(m, TaskMoELoraLayer)]
    assert len(names) == 7 and all(".language_model." in name for name in names)
    assert_rows_are_those_alone(model, batches)


def test_a_router_that_reads_the_token_alone_adapts_images_too() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = adapt(_llava(), router_inputs="token")
    names = [n for n, m in model.named_modules() if isinstance(m, TaskMoELoraLayer)]
    assert any("vision_tower" in name for name in names)


def test_the_output_head_beside_a_text_model_sees_the_text() -> None:
    model = adapt(_llava(), target_modules=r"lm_head|.*language_model.*q_proj")
    names = [n for n, m in model.named_modules() if isinstance(m, TaskMoELoraLayer)]
    assert [name.split(".")[-1] for name in sorted(names)] == ["lm_head", "q_proj"]
    assert_rows_are_those_alone(model, _llava_batch([2, 1]))


# --- Layers whose weights are read without a call

MAMBA = {"hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 64, "state_size": 4}
MIXERS: dict[str, Callable[[], nn.Module]] = {
    "mamba": lambda: tf.MambaForCausalLM(tf.MambaConfig(**MAMBA)),
    "mamba2": lambda: tf.Mamba2ForCausalLM(
        tf.Mamba2Config(**MAMBA, num_heads=4, head_dim=8, n_groups=1)
    ),
    "falcon mamba": lambda: tf.FalconMambaForCausalLM(tf.FalconMambaConfig(**MAMBA)),
}


@pytest.mark.parametrize("targets", ["all-linear", ["out_proj"]])
@pytest.mark.parametrize("name", MIXERS)
def test_projections_that_scan_kernels_read_are_refused(name, targets) -> None:
    message = r"`\w+_proj` is read by the fused kernels of \w+ without calling.*exclude_modules"
    with pytest.raises(ValueError, match=message):
        adapt(MIXERS[name](), target_modules=targets)


def test_the_fast_path_of_torchs_encoder_layer_is_refused() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, dim_feedforward=24, batch_first=True)
    with pytest.raises(ValueError, match=r"`linear1` is read by the fast path of nn.Transformer"):
        adapt(nn.Sequential(layer), target_modules=["linear1", "linear2"])


# --- In-place operations behind an adapted layer


def _half_doubled(x: torch.Tensor) -> torch.Tensor:
    x[..., :4].mul_(2)
    return x


def _divided_view(x: torch.Tensor) -> torch.Tensor:
    view = x.view(*x.shape[:-1], 2, 4).transpose(-3, -2)
    view /= 2.0
    return view.transpose(-3, -2).reshape(x.shape)


IN_PLACE = [nn.ReLU(inplace=True), lambda x: x.add_(1), _half_doubled, _divided_view]


@pytest.mark.parametrize("operation", IN_PLACE)
def test_in_place_operations_behind_an_adapted_layer(operation) -> None:
    """The gradients are those of the same operation on a copy."""

    class Net(nn.Module):
        def __init__(self, copies: bool) -> None:
            super().__init__()
            self.first, self.second, self.copies = nn.Linear(8, 8), nn.Linear(8, 8), copies

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = self.first(x)
            return self.second(operation(hidden.clone() if self.copies else hidden))

    found = []
    for copies in (False, True):
        torch.manual_seed(0)
        targets = ["first", "second"]
        model = adapt(Net(copies), target_modules=targets).train()
        x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))
        model(x, task_embeds=tasks(2)).square().sum().backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    torch.testing.assert_close(found[0], found[1])
    assert all(grad.abs().max() > 0 for grad in found[0].values())
