"""An attached encoder: which call of a model is routed by the embedding of which text."""

from __future__ import annotations

import copy
import warnings
from contextlib import nullcontext
from dataclasses import dataclass, field

import pytest
import torch
from peft import get_peft_model
from transformers import MambaConfig, MambaForCausalLM

from peft_taskmoe import TaskEncoderConfig, TaskMoELoraConfig, attach_task_encoder, task_context
from tiny import TASK_DIM, VOCAB, FakeTokenizer, randomise


@dataclass
class FakeEncoder:
    """A vector by the text alone, and every call remembered."""

    task_dim: int = TASK_DIM
    config: TaskEncoderConfig = field(
        default_factory=lambda: TaskEncoderConfig(name_or_path="fake")
    )
    calls: list[list[str]] = field(default_factory=list)

    def __call__(self, texts: list[str]) -> torch.Tensor:
        self.calls.append(list(texts))
        return torch.stack([self.vector(text) for text in texts])

    def vector(self, text: str) -> torch.Tensor:
        seed = sum((i + 1) * ord(character) for i, character in enumerate(text))
        return torch.randn(self.task_dim, generator=torch.Generator().manual_seed(seed))

    def vectors(self, *texts: str) -> torch.Tensor:
        return torch.stack([self.vector(text) for text in texts])


IDS = torch.tensor([[4, 5, 6, 7, 8], [9, 10, 11, 12, 13]])
PAD = -100


@pytest.fixture
def attached(adapted):
    """A tiny model with a fake encoder attached, and that encoder."""

    def make(name: str = "llama", encoder: FakeEncoder | None = None, **settings):
        encoder = encoder or FakeEncoder()
        return attach_task_encoder(adapted(name, **settings), encoder, FakeTokenizer()), encoder

    return make


def test_training_without_labels_cannot_tell_the_prompt(attached) -> None:
    model, encoder = attached()
    with pytest.raises(
        ValueError,
        match=r"without `labels`, so the router would read the answers.* Pass `task_embeds`",
    ):
        model.train()(input_ids=IDS)
    assert encoder.calls == []
    with model.disable_adapter():
        model(input_ids=IDS)
    model.generate(input_ids=IDS, max_new_tokens=1)  # has no answers yet
    model.eval()(input_ids=IDS)
    assert encoder.calls == [["t4 t5 t6 t7 t8", "t9 t10 t11 t12 t13"]] * 2


def test_labels_seen_with_the_same_batch_count(attached) -> None:
    """A trainer takes the labels out and calls again; another batch is not mistaken for it."""
    model, encoder = attached()
    labels = torch.tensor([[PAD, PAD, 6, 7, 8], [PAD, PAD, PAD, PAD, 13]])
    ids = IDS.clone()
    expected = model.train()(input_ids=ids, labels=labels).logits
    assert torch.equal(model(input_ids=ids).logits, expected)
    assert encoder.calls == [["t4 t5", "t9 t10 t11 t12"]] * 2
    with pytest.raises(ValueError, match="without `labels`"):
        model(input_ids=IDS)
    ids[0, 0] = 20  # changed in place: no longer the batch that the labels came with
    with pytest.raises(ValueError, match="without `labels`"):
        model(input_ids=ids)


def test_generate_takes_all_of_a_batch_that_came_with_labels(attached) -> None:
    model, encoder = attached()
    model(input_ids=IDS, labels=torch.tensor([[PAD, PAD, 6, 7, 8], [PAD, PAD, PAD, PAD, 13]]))
    model.generate(input_ids=IDS, max_new_tokens=1)
    assert encoder.calls[1:] == [["t4 t5 t6 t7 t8", "t9 t10 t11 t12 t13"]]


@pytest.mark.parametrize("cache", ["past_key_values", "cache_params"])
@torch.no_grad()
def test_a_loop_over_a_cache_has_no_whole_prompt(attached, cache: str) -> None:
    model, encoder = attached()
    if cache == "cache_params":
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 4, "vocab_size": VOCAB}
        config = TaskMoELoraConfig(task_dim=TASK_DIM, num_experts=3, target_modules=["in_proj"])
        base = MambaForCausalLM(MambaConfig(**sizes))
        model = randomise(get_peft_model(base, config)).eval()
        attach_task_encoder(model, encoder, FakeTokenizer())
    task_embeds = encoder.vectors("t4 t5 t6 t7 t8", "t9 t10 t11 t12 t13")
    output = model(input_ids=IDS, use_cache=True)
    tokens = output.logits[:, -1:].argmax(-1)
    step = {"input_ids": tokens, cache: output[cache], "use_cache": True}
    with pytest.raises(ValueError, match=r"goes on from a cache.* Pass `task_embeds=encoder"):
        model(**step)
    with task_context(task_embeds):
        logits = model(**copy.deepcopy(step)).logits
    assert torch.equal(model(**copy.deepcopy(step), task_embeds=task_embeds).logits, logits)
    again = torch.cat((IDS, tokens), dim=1)
    expected = model(input_ids=again, task_embeds=task_embeds).logits[:, -1:]
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)


def test_examples_without_a_prompt_warn_once(attached) -> None:
    model, encoder = attached()
    with pytest.warns(
        UserWarning, match=r"2 of 2 examples have no prompt: their labels begin.*`task_embeds`"
    ):
        model(input_ids=IDS, labels=IDS)
    assert encoder.calls == [["t4", "t9"]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(input_ids=IDS, labels=IDS)


def test_forward_routes_each_row_by_its_prompt(attached) -> None:
    model, encoder = attached()
    labels = torch.tensor([[PAD, PAD, 6, 7, 8], [PAD, PAD, PAD, PAD, 13]])
    found = model(input_ids=IDS, labels=labels)
    assert encoder.calls == [["t4 t5", "t9 t10 t11 t12"]]
    expected = model(
        input_ids=IDS, labels=labels, task_embeds=encoder.vectors("t4 t5", "t9 t10 t11 t12")
    )
    assert torch.equal(found.logits, expected.logits) and torch.equal(found.loss, expected.loss)


def test_positional_arguments_are_understood(attached) -> None:
    model, encoder = attached()
    mask = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]])
    model.get_base_model()(IDS, mask)
    assert encoder.calls == [["t4 t5 t6", "t10 t11 t12 t13"]]


def test_task_embeds_and_task_context_win_over_the_encoder(attached, adapted) -> None:
    model, encoder = attached()
    given = torch.randn(2, TASK_DIM)
    expected = adapted()(input_ids=IDS, task_embeds=given).logits
    assert torch.equal(model(input_ids=IDS, task_embeds=given).logits, expected)
    with task_context(given):
        assert torch.equal(model(input_ids=IDS).logits, expected)
    assert encoder.calls == []


def test_packed_rows_are_routed_by_document(attached) -> None:
    model, encoder = attached()
    batch = {
        "input_ids": torch.tensor([[4, 5, 6, 7, 8, 9, 10]]),
        "labels": torch.tensor([[PAD, PAD, 6, PAD, PAD, 9, 10]]),
        "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2, 3]]),
    }
    found = model(**batch).logits
    assert encoder.calls == [["t4 t5", "t7 t8"]]
    expected = model(
        **batch, task_embeds=encoder.vectors("t4 t5", "t7 t8")
    ).logits  # one task a document
    assert torch.equal(found, expected)
    swapped = model(**batch, task_embeds=encoder.vectors("t7 t8", "t4 t5")).logits
    assert not torch.allclose(found, swapped, atol=1e-3)
    with pytest.raises(ValueError, match="There are 3 task embeddings for a batch of 1 rows"):
        model(**batch, task_embeds=torch.randn(3, TASK_DIM))
    for given in ({}, {"task_embeds": torch.randn(2, TASK_DIM)}):
        with pytest.raises(ValueError, match=r"these rows hold several documents\. Pass them unp"):
            model(**batch, **given, adapter_names=["default"])


def test_an_encoder_decoder_reads_its_input_not_its_labels(attached) -> None:
    model, encoder = attached("t5")
    model(input_ids=IDS, labels=torch.tensor([[5, 6], [7, 8]]))
    model(input_ids=IDS, labels=IDS)
    assert encoder.calls == [["t4 t5 t6 t7 t8", "t9 t10 t11 t12 t13"]] * 2


def test_a_classifier_reads_its_whole_input(attached) -> None:
    model, encoder = attached("bert")
    model(input_ids=IDS, labels=torch.tensor([1, 0]))
    assert encoder.calls == [["t4 t5 t6 t7 t8", "t9 t10 t11 t12 t13"]]


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}, {"use_cache": False}],
)
def test_generate_encodes_once_per_call(name, options, attached) -> None:
    model, encoder = attached(name)
    model.generate(input_ids=IDS, max_new_tokens=4, min_new_tokens=4, **options)
    assert encoder.calls == [["t4 t5 t6 t7 t8", "t9 t10 t11 t12 t13"]]


def test_generate_reads_the_unpadded_prompt_however_it_is_passed(attached) -> None:
    model, encoder = attached()
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    base = model.get_base_model()
    outputs = [
        model.generate(input_ids=IDS, attention_mask=mask, max_new_tokens=2),
        base.generate(IDS, attention_mask=mask, max_new_tokens=2),
        base.generate(inputs=IDS, attention_mask=mask, max_new_tokens=2),
    ]
    assert encoder.calls == [["t6 t7 t8", "t9 t10 t11 t12 t13"]] * 3
    assert all(torch.equal(output, outputs[0]) for output in outputs)


@pytest.mark.parametrize("router_inputs", ["token", "token+task"])
def test_no_encoder_is_asked_where_no_router_reads_the_task(attached, router_inputs) -> None:
    model, encoder = attached(router_inputs=router_inputs)
    with model.disable_adapter() if "task" in router_inputs else nullcontext():
        model(input_ids=IDS)
    assert encoder.calls == []


def test_a_copied_model_goes_on_with_the_same_encoder(attached) -> None:
    model, encoder = attached()
    expected = model(input_ids=IDS).logits
    copied = copy.deepcopy(model)
    assert torch.equal(copied(input_ids=IDS).logits, expected) and len(encoder.calls) == 2


def test_embeddings_alone_have_no_text(attached) -> None:
    model, _ = attached()
    embeds = model.get_input_embeddings()(IDS)
    with pytest.raises(ValueError, match="no task embedding"):
        model(inputs_embeds=embeds)
    model(inputs_embeds=embeds, task_embeds=torch.randn(2, TASK_DIM))


@pytest.mark.parametrize("named", [None, TaskEncoderConfig(name_or_path="another")])
def test_the_config_names_the_attached_encoder_from_then_on(attached, named) -> None:
    model, encoder = attached(task_encoder=named)
    assert model.peft_config["default"].task_encoder == encoder.config


def test_a_schema_encoder_reads_the_part_before_the_text(adapted) -> None:
    class Prompt(FakeTokenizer):
        def decode(self, ids, skip_special_tokens=False):
            return 'class A:\n    pass\ntext = "x"\nresult ='

    encoder = FakeEncoder(config=TaskEncoderConfig(name_or_path="fake", text="schema"))
    model = attach_task_encoder(adapted(), encoder, Prompt())
    model(input_ids=IDS[:1])
    assert encoder.calls == [["class A:\n    pass\n"]]


def test_an_encoder_that_reads_otherwise_than_the_configs_warns(attached) -> None:
    named = TaskEncoderConfig(name_or_path="fake", pooling="max", text="schema")
    with pytest.warns(UserWarning, match="others than those that the router") as caught:
        attached(task_encoder=named)
    found = [str(one.message) for one in caught if "task encoder with" in str(one.message)]
    assert [text.split("`")[1] for text in found] == ['text="schema"', 'pooling="max"']
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*task encoder with")
        attached(task_encoder=TaskEncoderConfig(name_or_path="another place"))


def test_what_cannot_be_attached_says_so(adapted, tiny_model, tiny_encoder, word_tokenizer) -> None:
    def refused(message, *args) -> None:
        with pytest.raises(ValueError, match=message):
            attach_task_encoder(*args)

    refused(r'"default" names no task encoder.*attach_task_encoder\(model, TaskEnc', adapted())
    no_adapter = r"`LlamaForCausalLM` has no Task-Aware MoELoRA adapter.*`get_peft_model"
    refused(no_adapter, tiny_model(), tiny_encoder, word_tokenizer)
    no_name = r"base model has no name to load its tokenizer from.*\(model, encoder, tokenizer\)`"
    refused(no_name, adapted(), tiny_encoder)
    other = get_peft_model(tiny_model(), TaskMoELoraConfig(task_dim=5))
    dimension = rf"encoder has {TASK_DIM} dimensions, but .* `task_dim=5`.*`task_dim={TASK_DIM}`"
    refused(dimension, other, tiny_encoder, word_tokenizer)
    with pytest.raises(ValueError, match="no task embedding"):
        other(input_ids=IDS)  # the refused encoder was not attached


def test_an_encoder_is_attached_to_the_active_adapters_and_to_those_it_fits(adapted) -> None:
    """Not to others of another width, or whose config names another encoder."""
    model, encoder, named = adapted(), FakeEncoder(), TaskEncoderConfig(name_or_path="another")
    others = {"wide": {"task_dim": 5}, "named": {"task_encoder": named}, "like": {}}
    for name, changes in others.items():
        settings = {"task_dim": TASK_DIM, "num_experts": 2, "r": 2, **changes}
        model.add_adapter(name, TaskMoELoraConfig(**settings))
    attach_task_encoder(model, encoder, FakeTokenizer())
    found = {name: config.task_encoder for name, config in model.peft_config.items()}
    own = encoder.config
    assert found == {"default": own, "wide": None, "named": named, "like": own}
    model.base_model.set_adapter(["default", "like"])
    model(input_ids=IDS)
    assert encoder.calls == [["t4 t5 t6 t7 t8", "t9 t10 t11 t12 t13"]]  # once for both


def test_an_adapter_of_a_deleted_ones_name_does_not_have_its_encoder(attached) -> None:
    model, encoder = attached()
    for _ in range(2):
        model.add_adapter("other", TaskMoELoraConfig(task_dim=TASK_DIM, num_experts=2, r=2))
        model.set_adapter("other")
        with pytest.raises(ValueError, match="no task embedding"):
            model(input_ids=IDS)
        attach_task_encoder(model, encoder, FakeTokenizer())
        model(input_ids=IDS)
        model.delete_adapter("other")
    assert len(encoder.calls) == 2


def test_a_batch_made_in_inference_mode_is_not_remembered(attached) -> None:
    """Such a tensor does not count its changes."""
    model, encoder = attached()
    with torch.inference_mode():
        ids = IDS.clone()
        model(input_ids=ids, labels=torch.tensor([[PAD, PAD, 6, 7, 8], [PAD, 10, 11, 12, 13]]))
        model(input_ids=ids)
    assert encoder.calls == [["t4 t5", "t9"], ["t4 t5 t6 t7 t8", "t9 t10 t11 t12 t13"]]
