"""The `Extractor`: what reaches the model, what becomes of its answers, and how batches, windows
and files are handled.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import accelerate
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import decoders, processors

from loopback_hub import LoopbackHub
from peft_taskmoe import (
    TaskEncoder,
    TaskMoELoraConfig,
    attach_task_encoder,
    record_gates,
    task_context,
)
from peft_taskmoe.task_scope import current_state
from peft_taskmoe.uie import (
    Argument,
    Calibration,
    Document,
    Entity,
    EntityType,
    Event,
    Extraction,
    Extractions,
    Extractor,
    PromptFormat,
    Relation,
    Schema,
    Span,
    completion_text,
    prompt_text,
    save_format,
    score,
)
from peft_taskmoe.uie.extraction import extractor as extractor_module
from peft_taskmoe.uie.extraction import prefix, stopping
from peft_taskmoe.uie.extraction.fingerprint import adapters_of, weights_checksum
from peft_taskmoe.uie.extraction.format_file import FORMAT_FILE, load_format
from peft_taskmoe.uie.extraction.generation import Generator
from peft_taskmoe.uie.extraction.placement import placement
from peft_taskmoe.uie.extraction.questions import Question
from peft_taskmoe.uie.extraction.reading import token_ends
from peft_taskmoe.uie.scoring.calibration import Curve
from scripted import (
    BOS,
    EOS,
    PAD,
    VOCAB,
    Scripted,
    byte_tokenizer,
    probability,
    text_in,
    tiny_llama,
)
from tiny import randomise

WORDS = Schema.from_dict("NER", {"Capital": "words with a capital letter"})
EVENTS = Schema.from_dict("EE", {"Attack": {"description": "", "roles": ["attacker"]}})
TEXTS = [
    "Ada met Bob.",
    "nothing",
    "In Kourou, Ariane lifted off; Ada saw it.",
    "é🚀 Ünal",
    "x" * 50 + " Zoe",
]


def capitals(prompt: str) -> str:
    """The right answer to `WORDS`."""
    text = text_in(prompt)
    found = [
        Entity("Capital", Span(m.group(), *m.span())) for m in re.finditer(r"\b[A-ZÜ]\w*", text)
    ]
    return completion_text(found, text, WORDS)


def spans(extraction) -> list[tuple[str, int, int]]:
    for record in extraction.records:
        assert extraction.text[record.span.start : record.span.end] == record.span.text
    return [(record.span.text, record.span.start, record.span.end) for record in extraction.records]


@pytest.fixture
def tokenizer():
    return byte_tokenizer()


def scripted(answer=capitals, model_changes=None, **options) -> Extractor:
    options.setdefault("max_new_tokens", 200)
    return Extractor(Scripted(answer, **(model_changes or {})), byte_tokenizer(), **options)


def test_three_lines_from_text_to_records():
    extractor = scripted()
    found = extractor("Ada met Bob.", {"Capital": "words with a capital letter"})
    assert [(r.label, r.span) for r in found[0].records] == [
        ("Capital", Span("Ada", 0, 3)),
        ("Capital", Span("Bob", 8, 11)),
    ]
    assert found[0].problems == ()
    assert found[0].answers[0].parsed.raw == ' [Capital(span="Ada"), Capital(span="Bob")]'
    assert found[0].answers[0].complete
    assert found[0].answers[0].tokens == len(found[0].answers[0].parsed.raw)


def test_the_prompt_is_that_of_the_format_and_the_tokens_are_the_texts_own():
    extractor = scripted(format=PromptFormat(style="compact"))
    text = 'a "quote", </s> and <pad> in it'
    extractor(text, WORDS)
    expected = prompt_text(text, WORDS, format=PromptFormat(style="compact"))
    assert extractor.model.prompts == [expected]
    # What looks like a special token is words: one token a byte, and no end of sequence inside the
    # prompt.
    assert extractor.model.batches == [[len(expected.encode())]]


def test_an_end_token_that_the_tokenizer_adds_does_not_part_prompt_and_answer():
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    extractor = Extractor(Scripted(capitals, tokenizer), tokenizer, max_new_tokens=3)
    ids = extractor.generator.ids("text </s>\nresult =")
    assert ids[0] == BOS and tokenizer.decode(ids[1:]) == "text </s>\nresult ="
    assert EOS not in ids


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_batches_are_sorted_by_length_and_answers_are_in_order(batch_size):
    extractor = scripted(batch_size=batch_size)
    found = extractor(TEXTS, WORDS)
    assert [item.text for item in found] == TEXTS
    assert [[text for text, _, _ in spans(item)] for item in found] == [
        ["Ada", "Bob"],
        [],
        ["In", "Kourou", "Ariane", "Ada"],
        ["Ünal"],
        ["Zoe"],
    ]
    lengths = list(itertools.chain(*extractor.model.batches))
    assert len(extractor.model.batches) == math.ceil(len(TEXTS) / batch_size)
    assert lengths == sorted(lengths, reverse=True)


def test_batched_answers_equal_those_one_by_one_with_a_real_model(tokenizer):
    model = tiny_llama()
    together = Extractor(model, tokenizer, batch_size=8, max_new_tokens=12)(TEXTS, WORDS)
    alone = Extractor(model, tokenizer, batch_size=1, max_new_tokens=12)(TEXTS, WORDS)
    raw = [item.answers[0].parsed.raw for item in together]
    assert raw == [item.answers[0].parsed.raw for item in alone]
    assert len(set(raw)) > 1  # the prompt makes a difference


def test_an_unadapted_model_and_plain_lora_need_no_encoder(tokenizer):
    plain = get_peft_model(
        tiny_llama(),
        LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False),
    )
    for model in (tiny_llama(), plain):
        found = Extractor(model, tokenizer, max_new_tokens=4)(["Ada met Bob."], WORDS)
        assert found[0].answers[0].tokens <= 4
    with pytest.raises(ValueError, match="has no Task-Aware MoELoRA adapter"):
        Extractor(tiny_llama(), tokenizer, encoder=tiny_encoder())


def test_an_answer_that_goes_round_in_circles_is_stopped_and_says_so():
    def answer(prompt: str) -> str:
        return (
            capitals(prompt)
            if "Bob" in prompt
            else ' [Capital(span="Ada"), ' + 'Capital(span="Eve"), ' * 100
        )

    extractor = scripted(answer, max_new_tokens=1000)
    whole, looped = extractor(["Ada met Bob.", "Ada met Eve."], WORDS)
    assert [text for text, _, _ in spans(whole)] == ["Ada", "Bob"]
    assert whole.answers[0].complete and whole.problems == ()
    assert [text for text, _, _ in spans(looped)] == ["Ada", "Eve"]
    assert not looped.answers[0].complete
    assert looped.answers[0].tokens < 200
    (truncated,) = (problem for problem in looped.problems if problem.kind == "truncated")
    assert truncated.message.endswith("It was stopped because it repeats itself.")
    # Beside a longer answer, behind which it is padded, it is the same.
    texts = ["Ada met Eve.", "Bob " + " ".join(f"W{i}{i * i}x" for i in range(9))]
    alone, beside = (scripted(answer, max_new_tokens=1000, batch_size=n)(texts, WORDS)[0]
                     for n in (1, 2))  # fmt: skip
    assert (alone.answers, alone.problems) == (beside.answers, beside.problems)


@pytest.mark.slow
def test_answers_of_many_like_records_are_not_taken_for_a_loop():
    text = " ".join(f"Name{number:03}" for number in range(60))
    found = scripted(max_new_tokens=3000)(text, WORDS)
    assert len(found[0].records) == 60 and found[0].answers[0].complete


# --- routing -------------------------------------------------------------------------------------


def tiny_encoder(**settings) -> TaskEncoder:
    torch.manual_seed(3)
    config = transformers.BertConfig(
        vocab_size=VOCAB,
        hidden_size=6,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
    )
    return TaskEncoder(transformers.BertModel(config), tokenizer=byte_tokenizer(), **settings)


def moe_model(**settings):
    config = TaskMoELoraConfig(
        task_type="CAUSAL_LM", task_dim=6, num_experts=3, r=2, lora_dropout=0.0, **settings
    )
    model = get_peft_model(tiny_llama(), config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in sorted(model.named_parameters()):
        if "taskmoe_lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def test_task_embeddings_of_the_prompts_reach_the_model(tokenizer, monkeypatch):
    model, encoder = moe_model(), tiny_encoder()
    seen = []
    layer = next(m for n, m in model.named_modules() if n.endswith("q_proj"))
    layer.register_forward_pre_hook(lambda *_: seen.append(current_state().embeds_of("default")))
    extractor = Extractor(model, tokenizer, encoder, max_new_tokens=3)
    found = extractor(["Ada met Bob.", "a longer text about Kourou"], WORDS)
    prompts = sorted((prompt_text(item.text, WORDS) for item in found), key=len, reverse=True)
    for embeds in seen:
        torch.testing.assert_close(embeds, encoder(prompts), atol=1e-5, rtol=0)
    ids = tokenizer(prompts[0], return_tensors="pt").input_ids
    explicit = model.generate(
        input_ids=ids,
        task_embeds=encoder(prompts[:1]),
        max_new_tokens=3,
        do_sample=False,
        pad_token_id=PAD,
    )
    assert tokenizer.decode(explicit[0, ids.shape[1] :]) == found[1].answers[0].parsed.raw


def test_one_schema_over_many_texts_costs_one_forward_of_the_encoder(tokenizer):
    encoder = tiny_encoder(text="schema")
    forwards = []
    encoder.model.register_forward_pre_hook(lambda *_: forwards.append(1))
    extractor = Extractor(moe_model(), tokenizer, encoder, batch_size=2, max_new_tokens=2)
    extractor([f"text number {i}" for i in range(7)], WORDS)
    assert len(forwards) == 1
    assert encoder.cache_info().misses == 1
    extractor(["another text"], {"Other": "something else"})
    assert len(forwards) == 2


# --- rows that are done --------------------------------------------------------------------------


def ends_often(model):
    """Many tokens end an answer, so that the answers of a random model have many lengths."""
    model.generation_config.eos_token_id = [EOS, *range(3, 259, 7)]
    return model


def until_the_end(extractor: Extractor, found: dict) -> dict:
    """What `written` found, without what stands behind the ends."""
    cut = {}
    for prompt, (tokens, log_probs) in found.items():
        stop = next(
            (i + 1 for i, token in enumerate(tokens) if token in extractor.generator.ends.tokens),
            len(tokens),
        )
        cut[prompt] = (tokens[:stop], log_probs[:stop])
    return cut


def assert_leaving_changes_nothing(
    monkeypatch, model, encoder=None, less=True, texts=None, **options
) -> None:
    """With and without rows that leave, the same tokens come out, at the same log-probabilities;
    `less` work is done, or as much.
    """
    texts = [f"{text} {i}" for i, text in enumerate(TEXTS * 3)] if texts is None else texts
    found, cost = [], []
    for share in (2.0, 0.25, 0.01):
        monkeypatch.setattr(stopping, "LEAVING", share)
        extractor = Extractor(
            ends_often(model),
            byte_tokenizer(),
            encoder,
            **{"batch_size": 8, "max_new_tokens": 20, **options},
        )
        cost.append(
            read_by(
                model,
                lambda it=extractor: found.append(
                    until_the_end(it, written(monkeypatch, it, texts, WORDS))
                ),
            )
        )
    lengths = {len(tokens) for tokens, _ in found[0].values()}
    assert len(lengths) > 2
    for others in found[1:]:
        assert set(others) == set(found[0])
        for prompt, (tokens, log_probs) in found[0].items():
            assert others[prompt][0] == tokens
            assert others[prompt][1] == pytest.approx(log_probs, abs=1e-9)
    assert cost[0] >= cost[1] >= cost[2] and (cost[0] > cost[2]) == less


@pytest.mark.parametrize(
    ("reads", "caching"),
    [*itertools.product(["nothing", "lora", "token", "schema"], [False, True]), ("prompt", False)],
)
@pytest.mark.slow
def test_rows_that_are_done_leave_and_no_answer_changes(monkeypatch, reads, caching):
    model, encoder = (moe_model().double(), tiny_encoder()) if reads == "prompt" else adapted(reads)
    assert_leaving_changes_nothing(monkeypatch, model, encoder, prefix_caching=caching)
    model.train()
    assert_leaving_changes_nothing(monkeypatch, model, encoder, prefix_caching=caching)
    assert model.training


@pytest.mark.parametrize("window", [64, 256])
def test_rows_leave_a_model_with_a_sliding_window(monkeypatch, window):
    assert_leaving_changes_nothing(monkeypatch, sliding(window))


def test_rows_leave_a_constrained_generation(monkeypatch):
    pytest.importorskip("llguidance")
    model, encoder = moe_model().double(), tiny_encoder()
    assert_leaving_changes_nothing(monkeypatch, model, encoder, constrained=True)


@pytest.mark.parametrize("changes", [{"use_cache": False}, {"cache_implementation": "static"}])
@pytest.mark.slow
def test_rows_stay_where_the_cache_cannot_be_continued(monkeypatch, changes):
    model = ends_often(tiny_llama().double())
    model.generation_config.update(**changes)
    assert_leaving_changes_nothing(monkeypatch, model, less=False)


SETTINGS = {
    "sampling": {"do_sample": True, "temperature": 0.1, "top_k": 3, "top_p": 0.5, "min_p": 0.2},
    "penalties": {"repetition_penalty": 1.9, "encoder_repetition_penalty": 1.5},
    "n-grams": {"no_repeat_ngram_size": 2, "encoder_no_repeat_ngram_size": 2},
    "lengths": {"min_new_tokens": 12, "min_length": 1000, "max_length": 5, "max_time": 1e-9},
    "several": {"num_return_sequences": 3, "num_beams": 3, "length_penalty": 0.2},
    "tokens": {"suppress_tokens": [*range(60, 200)], "begin_suppress_tokens": [*range(3, 90)]},
    "bias": {"bad_words_ids": [[i] for i in range(40, 120)], "sequence_bias": [[[50], 9.0]]},
    "forced": {"forced_bos_token_id": 70, "forced_eos_token_id": 71},
    "decay": {"exponential_decay_length_penalty": (2, 3.0), "renormalize_logits": True},
    "ways": {"guidance_scale": 2.0, "prompt_lookup_num_tokens": 3, "stop_strings": ["a", "e"]},
    "outputs": {"output_scores": True, "return_dict_in_generate": False},
    "watermark": {"watermarking_config": transformers.WatermarkingConfig(bias=9.0)},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_generation_settings_of_the_base_have_no_part_in_answers(monkeypatch, name):
    """Neither in the tokens nor in their probabilities."""
    model = ends_often(tiny_llama().double())
    extractor = Extractor(model, byte_tokenizer(), batch_size=3, max_new_tokens=10)
    plain = written(monkeypatch, extractor, TEXTS, WORDS)
    model.generation_config.update(**SETTINGS[name])
    changed = written(monkeypatch, extractor, TEXTS, WORDS)
    assert changed == plain and len(plain) == len(TEXTS)


@pytest.mark.slow
def test_rows_stay_in_a_task_context_under_recorded_gates_and_with_states_of_another_kind(
    monkeypatch,
):
    model, encoder = moe_model().double(), tiny_encoder()
    texts = [f"{text} {i}" for i, text in enumerate(TEXTS * 2)][:8]
    with task_context(torch.randn(8, 6, dtype=torch.float64)):
        assert_leaving_changes_nothing(monkeypatch, model, encoder, less=False, texts=texts)
    with record_gates(model):
        assert_leaving_changes_nothing(monkeypatch, model, encoder, less=False)
    config = transformers.MambaConfig(
        vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, state_size=4
    )
    torch.manual_seed(0)
    mamba = transformers.MambaForCausalLM(config).double().eval()
    for parameter in mamba.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.5)
    assert_leaving_changes_nothing(monkeypatch, mamba, less=False, max_prompt_tokens=500)


def test_rows_leave_a_cache_that_cannot_be_cut(monkeypatch):
    """What is left is read again, and answered alike."""
    model = ends_often(tiny_llama().double())
    texts = [f"{text} {i}" for i, text in enumerate(TEXTS * 3)]
    extractor = Extractor(model, byte_tokenizer(), batch_size=8, max_new_tokens=20)
    expected = until_the_end(extractor, written(monkeypatch, extractor, texts, WORDS))
    monkeypatch.setattr(prefix, "OF_ATTENTION", ())
    assert until_the_end(extractor, written(monkeypatch, extractor, texts, WORDS)) == {
        prompt: (tokens, pytest.approx(log_probs, abs=1e-9))
        for prompt, (tokens, log_probs) in expected.items()
    }


# --- prefix caching ------------------------------------------------------------------------------


def adapted(reads: str):
    """A tiny model in float64 and its encoder: unadapted, with LoRA, or with a router that reads
    tokens or the schema.
    """
    if reads == "nothing":
        return tiny_llama().double(), None
    if reads == "lora":
        config = LoraConfig(
            task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False
        )
        return get_peft_model(tiny_llama(), config).double(), None
    inputs = {"token": "token", "schema": "token+task"}[reads]
    return moe_model(router_inputs=inputs).double(), tiny_encoder(
        text="schema"
    ) if reads == "schema" else None


def read_by(model, ask) -> int:
    """How many tokens the model embeds while it is asked."""
    tokens = []
    table = model.get_input_embeddings()
    hook = table.register_forward_pre_hook(lambda module, args: tokens.append(args[0].numel()))
    try:
        ask()
    finally:
        hook.remove()
    return sum(tokens)


def written(monkeypatch, extractor: Extractor, texts, schema, **options) -> dict:
    """The tokens of each prompt's answer and their log-probabilities, by prompt."""
    found = {}
    generate = Generator.generate

    def spy(self, prompts, max_new_tokens):
        answers = generate(self, prompts, max_new_tokens)
        for prompt, written in zip(prompts, answers, strict=True):
            found[self.tokenizer.decode(prompt.ids)] = written
        return answers

    with monkeypatch.context() as patch:
        patch.setattr(Generator, "generate", spy)
        extractor(texts, schema, **options)
    return found


def assert_alike(
    monkeypatch, model, encoder=None, texts=TEXTS, schema=WORDS, options=None, **asked
) -> None:
    """With and without prefix caching the same tokens come out, at the same log-probabilities."""
    options = {"batch_size": len(TEXTS), "max_new_tokens": 6, **(options or {})}
    plain, cached = (
        written(
            monkeypatch,
            Extractor(model, byte_tokenizer(), encoder, prefix_caching=on, **options),
            texts,
            schema,
            **asked,
        )
        for on in (False, True)
    )
    assert set(plain) == set(cached) and len(plain) >= len(texts)
    for prompt, (tokens, log_probs) in plain.items():
        assert cached[prompt][0] == tokens
        assert cached[prompt][1] == pytest.approx(log_probs, abs=1e-9)


def costs(model, encoder=None, texts=TEXTS, schema=WORDS, **options) -> dict[bool, int]:
    """Tokens that the model embeds without and with prefix caching."""
    options = {"batch_size": len(TEXTS), "max_new_tokens": 2, **options}
    return {
        on: read_by(
            model,
            lambda on=on: Extractor(model, byte_tokenizer(), encoder, prefix_caching=on, **options)(
                texts, schema
            ),
        )
        for on in (False, True)
    }


@pytest.mark.parametrize("style", ["dataclass", "compact"])
@pytest.mark.parametrize("reads", ["nothing", "lora", "token", "schema"])
def test_prefix_caching_reads_the_schema_once_and_changes_no_answer(monkeypatch, reads, style):
    model, encoder = adapted(reads)
    format = PromptFormat(style=style)
    assert_alike(monkeypatch, model, encoder, options={"format": format})
    prompt = prompt_text("", WORDS, format=format)
    shared = prompt.index('text = "') + len(
        'text = "'
    )  # one token a character; the texts begin differently
    cost = costs(model, encoder, format=format)
    assert cost[False] - cost[True] == shared * (len(TEXTS) - 1)


@pytest.mark.parametrize(
    "changes",
    [
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"repetition_penalty": 1.5, "pad_token_id": PAD},
    ],
)
def test_prefix_caching_under_other_generation_configs(monkeypatch, changes):
    model, _ = adapted("nothing")
    model.generation_config.update(**changes)
    assert_alike(monkeypatch, model)


def sliding(window: int):
    """A tiny model that attends to so many tokens."""
    of_llama = {
        n: getattr(tiny_llama().config, n)
        for n in ("vocab_size", "hidden_size", "intermediate_size")
    }
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    torch.manual_seed(0)
    config = transformers.MistralConfig(**of_llama, **layers, sliding_window=window)
    model = transformers.MistralForCausalLM(config).double().eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("window", [64, 170, 256])
def test_prefix_caching_with_a_sliding_window(monkeypatch, window):
    """Shorter than the schema (then nothing is shared), than the longer prompts, and longer than
    all.
    """
    model = sliding(window)
    assert_alike(monkeypatch, model)
    cost = costs(model)
    assert (cost[True] < cost[False]) == (window > 64)


@pytest.mark.slow
def test_prefix_caching_with_given_events_windows_several_schemas_and_a_constraint(monkeypatch):
    pytest.importorskip("llguidance")
    model, encoder = adapted("schema")
    given = [[Event("Attack", Span("hit", 4, 7))], [Event("Attack", Span("bit", 4, 7))]]
    assert_alike(
        monkeypatch, model, encoder, ["Bob hit Ada.", "Eve bit me, too."], EVENTS, given=given
    )
    long = ["Ada met Bob in Kourou. " * 9, "Zoe slept."]
    assert_alike(
        monkeypatch, model, encoder, long, options={"max_prompt_tokens": 300, "overlap": 20}
    )
    other = {"Town": "names of towns", "River": "names of rivers"}
    assert_alike(monkeypatch, model, encoder, schema=[WORDS, other], options={"batch_size": 2})
    assert_alike(monkeypatch, model, encoder, options={"constrained": True})


def test_prefix_caching_of_one_text_and_of_prompts_that_are_alike(monkeypatch):
    """At least the last token of every prompt is left to be read."""
    model, encoder = adapted("schema")
    for texts in (TEXTS[:1], [TEXTS[0]] * 3):
        extractor = Extractor(
            model, byte_tokenizer(), encoder, prefix_caching=True, max_new_tokens=6
        )
        alone = Extractor(model, byte_tokenizer(), encoder, max_new_tokens=6)
        assert [a.answers[0].parsed.raw for a in extractor(texts, WORDS)] == [
            a.answers[0].parsed.raw for a in alone(texts, WORDS)
        ]


def test_prefix_caching_costs_nothing_where_no_schema_fills_a_batch():
    """Batches that a schema does not fill are made by length alone, as ever."""
    model, encoder = adapted("schema")
    groups = [
        [Question(text, Schema.from_dict("NER", {f"Label{i}": "x" * i}))]
        for i, text in enumerate(TEXTS * 2)
    ]
    cost = {}
    for on in (False, True):
        extractor = Extractor(
            model, byte_tokenizer(), encoder, prefix_caching=on, batch_size=3, max_new_tokens=2
        )
        cost[on] = read_by(model, lambda asked=extractor: list(asked.answer(groups)))
    assert cost[True] == cost[False]


def test_prefix_caching_gives_way_to_a_task_context_and_to_recorded_gates(monkeypatch):
    model, encoder = adapted("schema")
    with task_context(torch.randn(len(TEXTS), 6, dtype=torch.float64)):
        assert_alike(monkeypatch, model, encoder)
        cost = costs(model, encoder)
    assert cost[True] == cost[False]
    with record_gates(model):
        cost = costs(model, encoder)
    assert cost[True] == cost[False]


def test_prefix_caching_follows_an_encoder_that_is_attached_later(tokenizer):
    model, encoder = adapted("schema")
    plain, cached = (
        Extractor(model, tokenizer, encoder, prefix_caching=on, batch_size=5, max_new_tokens=6)
        for on in (False, True)
    )
    other = tiny_encoder(text="schema", pooling="max")
    attach_task_encoder(model, other, tokenizer)
    raw = [[item.answers[0].parsed.raw for item in one(TEXTS, WORDS)] for one in (plain, cached)]
    assert raw[0] == raw[1]
    attach_task_encoder(model, tiny_encoder(), tokenizer)
    with pytest.raises(ValueError, match="task encoder reads the whole prompt"):
        cached(TEXTS, WORDS)


def test_prefix_caching_is_refused_where_prompts_with_one_schema_are_not_computed_alike(tokenizer):
    advice = (
        r".* Leave it out, or train an adapter for which that does not hold, such as one whose "
        "encoder reads the schema alone"
    )
    with pytest.raises(
        ValueError, match=r'task encoder reads the whole prompt \(`text="prompt"`\)' + advice
    ):
        Extractor(moe_model(), tokenizer, tiny_encoder(), prefix_caching=True)
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(
        ValueError, match="but PROMPT_TUNING changes what the model computes for it" + advice
    ):
        Extractor(get_peft_model(tiny_llama(), config), tokenizer, prefix_caching=True)
    model = tiny_llama()
    name = "rope_parameters" if hasattr(model.config, "rope_parameters") else "rope_scaling"
    setattr(model.config, name, {**(getattr(model.config, name) or {}), "rope_type": "longrope"})
    with pytest.raises(
        ValueError,
        match="a model with `longrope` positions turns the first tokens differently" + advice,
    ):
        Extractor(model, tokenizer, prefix_caching=True)


def test_prefix_caching_of_a_model_without_keys_and_values_is_refused(tokenizer):
    model = transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=VOCAB, hidden_size=8, num_hidden_layers=1, state_size=4)
    )
    extractor = Extractor(
        model, tokenizer, prefix_caching=True, max_new_tokens=2, max_prompt_tokens=500
    )
    with pytest.raises(
        ValueError,
        match=r"a `mamba` model keeps something else from one token to the next.*Leave it out",
    ):
        extractor(TEXTS[:2], WORDS)


def test_an_encoder_decoder_is_refused(tokenizer):
    config = transformers.T5Config(
        vocab_size=VOCAB, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2
    )
    with pytest.raises(
        ValueError, match=r"A `t5` model is an encoder-decoder, .* Pass a causal language model"
    ):
        Extractor(transformers.T5ForConditionalGeneration(config), tokenizer)


# --- windows -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_long_texts_are_read_in_windows_with_offsets_of_the_whole_text():
    text = " ".join(
        f"word{i} {'Ada Zürich 🚀 Name' + str(i) if i % 3 == 0 else 'and so on'}."
        for i in range(60)
    )
    wanted = [m.span() for m in re.finditer(r"\b[A-ZÜ]\w*", text)]
    short = len(prompt_text("", WORDS).encode())
    extractor = scripted(max_prompt_tokens=short + 200, overlap=40, max_new_tokens=400)
    found = extractor([text, "Ada"], WORDS)
    assert [(start, end) for _, start, end in spans(found[0])] == wanted
    assert len(found[0].answers) > 5
    assert all(length <= short + 200 for batch in extractor.model.batches for length in batch)
    covered = [window for answer in found[0].answers for window in range(*answer.window)]
    assert set(covered) == set(range(len(text)))
    assert spans(found[1]) == [("Ada", 0, 3)]


def test_the_problems_of_all_windows_are_kept_and_what_an_edge_cuts_is_one():
    text = " ".join(f"word{i:02}" for i in range(30))
    prompt = len(prompt_text("", WORDS).encode())

    def answer(prompt_: str) -> str:
        words = text_in(prompt_).split()
        found = (words[0], " ".join(words[-4:]), "elsewhere")
        return f" [{', '.join(f'Capital(span={one!r})' for one in found)}]"

    extractor = scripted(answer, max_prompt_tokens=prompt + 70, overlap=20)
    (found,) = extractor([text], WORDS)
    kinds = [problem.kind for problem in found.problems]
    assert kinds.count("not_in_text") == len(found.answers) > 2
    written = sum(len(a.parsed.records) for a in found.answers)
    left_out = [problem for problem in found.problems if problem.kind == "repeated"]
    assert all("window's edge cuts this mention short" in problem.message for problem in left_out)
    assert left_out
    # Every record that a window gave is in the result, a problem, or the same as another window's.
    places = {
        (answer.window[0] + r.span.start, answer.window[0] + r.span.end)
        for answer in found.answers
        for r in answer.parsed.records
    }
    reported = {(json.loads(p.source)["start"], json.loads(p.source)["end"]) for p in left_out}
    assert {(start, end) for _, start, end in spans(found)} | reported == places
    assert written >= len(places)


def test_a_schema_that_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match="before any text"):
        scripted(max_prompt_tokens=50)(["Ada"], WORDS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "`batch_size` must be a positive integer, got 0"),
        ({"max_new_tokens": -1}, "`max_new_tokens` must be a positive integer, got -1"),
        ({"max_prompt_tokens": 0}, "`max_prompt_tokens` must be a positive integer, got 0"),
        ({"max_new_tokens": 5000}, "context of 4096 tokens"),
        ({"max_prompt_tokens": 4000, "max_new_tokens": 97}, "context of 4096 tokens"),
    ],
)
def test_lengths_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        scripted(**options)


def test_one_record_of_a_mention_can_stand_for_every_place_of_it():
    text = "Ada met Ada Lovelace. Adalbert and ADA saw Ada." + " x" * 80 + " Ada"
    answers = {True: ' [Capital(span="Ada"), Capital(span="Ada Lovelace")]', False: " []"}
    prompt = len(prompt_text("", WORDS).encode())
    for options in ({}, {"max_prompt_tokens": prompt + 90, "overlap": 10}):
        extractor = scripted(
            lambda prompt: answers["Lovelace" in prompt], all_occurrences=True, **options
        )
        (found,) = extractor([text], WORDS)
        assert spans(found) == [
            ("Ada", 0, 3), ("Ada Lovelace", 8, 20), ("Ada", 43, 46),
            ("Ada", len(text) - 3, len(text))
        ]  # fmt: skip
        assert len({record.confidence for record in found.records}) == 2
    once = scripted(lambda prompt: answers[True])
    assert len(once([text], WORDS)[0].records) == 2


# --- given events and several schemas ------------------------------------------------------------


def arguments(prompt: str) -> str:
    """Answers to `EVENTS`: everything given, or every "hit", each with Bob."""
    given = (
        re.findall(r'Attack\(trigger="(\w+)"', prompt.split("given = ")[-1])
        if "given = " in prompt
        else ["hit"]
    )
    calls = [f'Attack(trigger="{trigger}", attacker=["Bob"])' for trigger in given]
    return f" [{', '.join(calls)}]"


def test_arguments_of_given_events_alone():
    text = "Bob hit and hurt Ada."
    given = [Event("Attack", Span("hurt", 12, 16))]
    extractor = scripted(arguments)
    found = extractor([text, text, text], EVENTS, given=[given, [], given])
    expected = Event("Attack", Span("hurt", 12, 16), (Argument("attacker", Span("Bob", 0, 3)),))
    assert [
        tuple(Event(r.label, r.trigger, r.arguments) for r in item.records) for item in found
    ] == [
        (expected,),
        (),
        (expected,),
    ]
    assert found[1].answers == () and found[1].text == text  # there was nothing to ask
    assert found[1].to_dict()["records"] == []


def test_several_schemas_are_merged_and_given_events_go_to_the_one_that_has_them():
    def answer(prompt: str) -> str:
        return arguments(prompt) if "Attack" in prompt else capitals(prompt)

    extractor = scripted(answer)
    given = [[Event("Attack", Span("hurt", 12, 16))]]
    (found,) = extractor(["Bob hit and hurt Ada."], [WORDS, EVENTS], given=given)
    assert [(type(r).__name__, r.label) for r in found.records] == [
        ("Entity", "Capital"),
        ("Event", "Attack"),
        ("Entity", "Capital"),
    ]
    assert len(found.answers) == 2
    (free,) = extractor(["Bob hit and hurt Ada."], [WORDS, EVENTS])
    assert [r.trigger.text for r in free.records if isinstance(r, Event)] == ["hit"]


def test_given_events_that_do_not_fit_the_question_are_errors():
    extractor = scripted(arguments)
    given = [[Event("Attack", Span("hit", 4, 7))]]
    with pytest.raises(ValueError, match="There are 2 texts and given events for 1"):
        extractor(["Bob hit", "Bob hit"], EVENTS, given=given)
    with pytest.raises(ValueError, match="given events for 1 texts, but more texts"):
        list(extractor.iterate(iter(["Bob hit", "Bob hit"]), EVENTS, given=given))
    with pytest.raises(ValueError, match="There are more lists of given events than texts"):
        list(extractor.iterate(iter(["Bob hit"]), EVENTS, given=given * 2))
    with pytest.raises(ValueError, match="given event `Attack` of text 0 is in no schema"):
        extractor(["Bob hit"], WORDS, given=given)


def test_a_given_event_that_cannot_be_asked_about_is_a_problem_and_the_job_goes_on():
    long = "Bob hit " * 150
    given = [
        [Event("Attack", Span(long[:700], 0, 700)), Event("Attack", Span("hit", 804, 807))],
        [Event("Attack", Span("nowhere"))],
        [Event("Attack", Span("hit", 4, 7))],
    ]
    extractor = scripted(arguments, max_prompt_tokens=700)
    found = extractor([long, "Bob hit", "Bob hit"], EVENTS, given=given)
    assert [[problem.kind for problem in item.problems] for item in found] == [
        ["not_asked"]
    ] * 2 + [[]]
    assert json.loads(found[0].problems[0].source)["trigger"]["end"] == 700
    assert [[event.trigger.start for event in item.records] for item in found] == [[804], [], [4]]
    assert found[1].answers == () and found[1].text == "Bob hit"


def test_a_trigger_across_all_windows_is_asked_about_in_a_window_of_its_own():
    text = " ".join(f"word{i}" for i in range(150))
    trigger = Span(text[300:420], 300, 420)
    answer = f' [Attack(trigger="{trigger.text}")]'
    extractor = scripted(lambda prompt: answer, max_prompt_tokens=600, overlap=5)
    (found,) = extractor([text], EVENTS, given=[[Event("Attack", trigger)]])
    assert [(r.label, r.trigger) for r in found.records] == [
        ("Attack", trigger)
    ] and found.problems == ()


def test_a_question_that_fits_in_no_prompt_is_a_problem_of_its_text_alone():
    large = Schema.from_dict(
        "NER", {f"label number {i}": "a long guideline " * 20 for i in range(20)}
    )
    documents = [Document("large", "Ada", "NER", large), Document("small", "Ada", "NER", WORDS)]
    extractor = scripted(max_prompt_tokens=1000)
    with pytest.warns(UserWarning, match="A question was not asked: The prompt has a length of"):
        found = extractor.documents(documents)
    assert [problem.kind for problem in found["large"].problems] == ["not_asked"]
    assert "before any text" in found["large"].problems[0].message
    assert spans(found["small"]) == [("Ada", 0, 3)]


def test_a_list_of_labels_is_one_schema_and_a_list_of_schemas_is_several():
    class Person(EntityType):
        """People."""

    class Place(EntityType):
        """Places."""

    def prompts(schema) -> int:
        extractor = scripted(lambda prompt: " []")
        extractor("Ada", schema)
        return len(extractor.model.prompts)

    assert (
        prompts(["Person", "Place"]) == prompts([Person, Place]) == prompts([WORDS.labels[0]]) == 1
    )
    assert (
        prompts([WORDS, EVENTS])
        == prompts([{"A": ""}, {"B": ""}])
        == prompts([["A"], ["B", "C"]])
        == 2
    )
    with pytest.raises(ValueError, match="mixes labels with whole schemas"):
        prompts(["Person", WORDS])


# --- thresholds and confidence -------------------------------------------------------------------


def test_confidence_is_the_geometric_mean_of_the_probabilities_of_a_records_tokens():
    (found,) = scripted()(["Ada met Bob."], WORDS)
    raw = found.answers[0].parsed.raw
    for record, call in zip(
        found.records, ('Capital(span="Ada")', 'Capital(span="Bob")'), strict=True
    ):
        steps = range(raw.index(call), raw.index(call) + len(call))  # a token a byte
        by_hand = math.exp(sum(math.log(probability(step)) for step in steps) / len(steps))
        assert record.confidence == pytest.approx(by_hand, rel=1e-4)


def test_confidence_of_answers_with_tokens_of_several_bytes_and_in_windows():
    (found,) = scripted()(["é🚀 Ünal met Ada"], WORDS)
    raw = found.answers[0].parsed.raw
    for record in found.records:
        call = f'Capital(span="{record.span.text}")'
        first = len(raw[: raw.index(call)].encode())
        steps = range(first, first + len(call.encode()))
        by_hand = math.exp(sum(math.log(probability(step)) for step in steps) / len(steps))
        assert record.confidence == pytest.approx(by_hand, rel=1e-3)


@pytest.mark.parametrize(
    "decoder", [decoders.ByteLevel(), decoders.Metaspace(), decoders.WordPiece()]
)
def test_ends_of_tokens_are_those_of_whole_prefixes_and_cost_linear_time(decoder):
    rng = random.Random(8)
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.decoder = decoder
    read = 0

    def decode(tokens):
        nonlocal read
        read += len(tokens)
        return tokenizer.decode(tokens, clean_up_tokenization_spaces=False)

    for length in (0, 1, 15, 16, 17, 200):
        text = "".join(rng.choice(["a", " ", "é", "🚀", "日本", '"']) for _ in range(length))
        tokens = tokenizer(text).input_ids + rng.choices(range(3, 259), k=length // 9)
        whole = [len(decode(tokens[: i + 1])) for i in range(len(tokens))]
        read = 0
        assert token_ends(tokens, decode) == [max(whole[: i + 1]) for i in range(len(whole))]
        assert read <= 40 * len(tokens)


def test_records_whose_probabilities_are_no_numbers_have_no_confidence():
    extractor = scripted()
    process = extractor.generator.generate
    extractor.generator.generate = lambda *args: [
        one._replace(log_probs=[math.nan] * len(one.log_probs)) for one in process(*args)
    ]
    found = extractor(["Ada met Bob."], WORDS, thresholds=0.9)
    assert [record.confidence for record in found[0].records] == [None, None]
    assert "NaN" not in found.to_json()


def test_records_below_a_threshold_become_problems():
    extractor = scripted()
    (free,) = extractor(["Ada met Bob."], WORDS)
    low, high = sorted(record.confidence for record in free.records)
    for thresholds in ((low + high) / 2, {"Capital": (low + high) / 2}):
        (found,) = extractor(["Ada met Bob."], WORDS, thresholds=thresholds)
        assert [record.confidence for record in found.records] == [high]
        (problem,) = found.problems
        assert problem.kind == "low_confidence" and "below the threshold" in problem.message
        assert json.loads(problem.source)["confidence"] == low
    with pytest.raises(ValueError, match="threshold for `Captial`, which is no label"):
        extractor(["Ada"], WORDS, thresholds={"Captial": 0.5})
    for wrong in (50, math.nan, "0.5", {"Capital": -1}):
        for ask in (
            lambda t: extractor(["Ada"], WORDS, thresholds=t),
            lambda t: extractor.answer([], thresholds=t),
        ):
            with pytest.raises(ValueError, match=r"threshold .* is no probability"):
                ask(wrong)


# --- answers that end, and that do not -----------------------------------------------------------


def test_an_answer_that_is_cut_off_keeps_its_whole_records_and_says_so():
    extractor = scripted(max_new_tokens=33)
    (found,) = extractor(["Ada met Bob."], WORDS)
    assert spans(found) == [("Ada", 0, 3)]
    (problem,) = found.problems
    assert problem.kind == "truncated" and "`max_new_tokens=33`" in problem.message
    assert found.answers[0].parsed.raw == ' [Capital(span="Ada"), Capital(sp'
    assert not found.answers[0].complete and found.answers[0].tokens == 33
    broken = scripted(
        lambda prompt: ' [Capital(span="Ada"), Capital(span=' + "[" * 60, max_new_tokens=60
    )
    (found,) = broken(["Ada met Bob."], WORDS)
    assert {problem.kind for problem in found.problems} >= {"truncated"}
    assert any("max_new_tokens=60" in problem.message for problem in found.problems)
    whole = ' [Capital(span="Ada")]'
    (found,) = scripted(lambda prompt: whole + " " * 50, max_new_tokens=30)(["Ada met Bob."], WORDS)
    assert spans(found) == [("Ada", 0, 3)] and found.problems == ()  # nothing was lost


def test_an_answer_over_several_lines_is_read_whole_and_a_run_on_is_not():
    lines = '\n[\n  Capital(span="Ada"),\n  Capital(span="Bob"),\n]\nresult = [Capital(span="met")]'
    extractor = scripted(lambda prompt: lines)
    (found,) = extractor(["Ada met Bob."], WORDS)
    assert [text for text, _, _ in spans(found)] == ["Ada", "Bob"]
    assert (
        found.answers[0].parsed.raw.endswith("]\n")
        and found.answers[0].complete
        and found.problems == ()
    )


def test_a_bracket_or_line_feed_inside_a_mention_ends_nothing():
    text = "Ada] and\n[Bob"
    extractor = scripted(lambda prompt: ' [Capital(span="Ada]"), Capital(span="[Bob")]\n')
    (found,) = extractor([text], WORDS)
    assert [words for words, _, _ in spans(found)] == ["Ada]", "[Bob"]


def test_every_end_that_the_generation_config_names_ends_an_answer():
    answer = ' [Capital(span="Ada")]'
    extractor = scripted(lambda prompt: f"{answer}~ and more")
    tilde = extractor.tokenizer("~").input_ids[0]
    extractor.model.generation_config.eos_token_id = [tilde, EOS]
    (found,) = extractor(["Ada"], WORDS)
    assert found.answers[0].parsed.raw == answer and found.answers[0].complete


@pytest.mark.parametrize("special", [{"pad_token": None}, {"pad_token": None, "eos_token": None}])
def test_models_without_a_pad_or_an_end_token(special):
    tokenizer = byte_tokenizer(**special)
    model = Scripted(
        lambda prompt: capitals(prompt) + "\n", tokenizer, eos_token_id=None, pad_token_id=None
    )
    model.generation_config.eos_token_id = None
    found = Extractor(model, tokenizer, max_new_tokens=100)(TEXTS[:3], WORDS)
    assert [len(item.records) for item in found] == [2, 0, 4]
    assert all(item.answers[0].complete and item.problems == () for item in found)
    assert tokenizer.pad_token is None  # the caller's tokenizer is as it was


def test_a_model_in_training_mode_answers_in_eval_mode_and_goes_on_training():
    extractor = scripted()
    modes = []
    extractor.model.register_forward_pre_hook(lambda model, *_: modes.append(model.training))
    extractor.model.train()
    extractor("Ada", WORDS)
    assert modes and not any(modes) and extractor.model.training


HOSTILE = [
    "",
    " ]",
    "[[[[",
    "import os",
    " [Capital(span=__import__('os'))]",
    '" * 100',
    ' [Capital(span="Ada"',
    "�\x00\x1b[",
]


@pytest.mark.parametrize("answer", HOSTILE)
def test_hostile_answers_are_kept_raw_with_their_problems(answer):
    (found,) = scripted(lambda prompt: answer, max_new_tokens=100)(["Ada met Bob."], WORDS)
    assert found.records == () and found.problems
    assert found.answers[0].parsed.raw == answer
    assert found.to_dict()["answers"] == [answer]
    json.loads(json.dumps(found.to_dict()))


# --- input of every form -------------------------------------------------------------------------


@pytest.mark.slow
def test_the_first_result_comes_after_one_batch_and_an_endless_iterable_is_read_as_needed():
    extractor = scripted(batch_size=2)
    taken = []

    def endless():
        for i in itertools.count():
            taken.append(i)
            yield f"text {i} Ada"

    found = extractor.iterate(endless(), WORDS, progress=False)
    assert next(found).text == "text 0 Ada"
    assert (len(taken), len(extractor.model.batches)) == (2, 1)
    assert [next(found).text for _ in range(69)] == [f"text {i} Ada" for i in range(1, 70)]
    assert len(taken) <= 128  # reading ahead doubles
    # A long text is not waited for by a short one before it.
    short = len(prompt_text("", WORDS).encode())
    windows = scripted(batch_size=2, max_prompt_tokens=short + 40, overlap=5)
    assert next(windows.iterate(["Ada", "Bob " * 100], WORDS)).text == "Ada"
    assert len(windows.model.prompts) <= 2 + 40


def test_progress_is_shown_for_long_work_only(capsys):
    extractor = scripted(batch_size=2)
    extractor(["Ada", "Bob"], WORDS)
    assert "Extracting" not in capsys.readouterr().err
    extractor(["Ada", "Bob", "Zoe"], WORDS)
    assert re.search(r"Extracting.*3/3", capsys.readouterr().err)
    extractor(["Ada", "Bob", "Zoe"], WORDS, progress=False)
    assert "Extracting" not in capsys.readouterr().err


def test_empty_texts_and_empty_lists():
    extractor = scripted()
    assert len(extractor([], WORDS)) == 0
    found = extractor(["", " \n", "Ada"], WORDS)
    assert [item.text for item in found] == ["", " \n", "Ada"]
    assert [len(item.records) for item in found] == [0, 0, 1]
    assert found[0].answers == () and found[0].problems == ()
    assert len(extractor.model.prompts) == 1
    with pytest.raises(TypeError, match="Text 1 is None"):
        extractor(["Ada", None], WORDS)


def test_documents_are_asked_as_their_tasks_ask_and_can_be_scored():
    ner = Document(
        "a",
        "Ada met Bob.",
        "NER",
        WORDS,
        (Entity("Capital", Span("Ada", 0, 3)), Entity("Capital", Span("Bob", 8, 11))),
    )
    eae = Document(
        "b",
        "Bob hit Ada.",
        "EAE",
        EVENTS,
        (Event("Attack", Span("hit", 4, 7), (Argument("attacker", Span("Bob", 0, 3)),)),),
    )
    extractor = scripted(
        lambda prompt: arguments(prompt) if "Attack" in prompt else capitals(prompt)
    )
    answers = extractor.documents([ner, eae])
    assert "given = " in next(p for p in extractor.model.prompts if "Attack" in p)
    assert score({"x": [ner, eae]}, {"x": answers}).average_f1() == 1.0
    with pytest.raises(ValueError, match="1 ids belong to several documents, the first is `a`"):
        extractor.documents([ner, ner])


def test_groups_of_questions_can_be_asked_directly():
    extractor = scripted()
    found = list(extractor.answer([[], [Question("Ada", WORDS)], []], progress=False))
    assert [len(item.records) for item in found] == [0, 1, 0]


# --- output --------------------------------------------------------------------------------------


def test_tables_and_json():
    found = scripted()(TEXTS, WORDS)
    data = json.loads(found.to_json())
    assert [row["text"] for row in data] == TEXTS
    assert data[0]["records"][0] == found[0].records[0].to_dict()
    assert "\\u" not in found.to_json() and "\\u" in found.to_json(ensure_ascii=True)
    assert found.seconds >= sum(item.seconds for item in found) > 0
    table = found.to_dataframe()
    assert list(table["mention"]) == ["Ada", "Bob", "In", "Kourou", "Ariane", "Ada", "Ünal", "Zoe"]
    assert list(table["text"]) == [0, 0, 2, 2, 2, 2, 3, 4] and set(table["kind"]) == {"entity"}
    assert repr(found)[:-7] == "Extractions(5 texts: 8 records, 0 problems,"
    assert repr(found[0]) == "Extraction('Ada met Bob.': 2 records, 0 problems)"
    assert len(repr(scripted()("a b " * 500, WORDS)[0])) < 110
    broken = Extraction("a\ud800", (Entity("p", Span("a\ud800", 0, 2)),), (), (), 0.0)
    assert list(Extractions([broken], 0.0).to_dataframe()["mention"]) == ["a\\ud800"]
    assert found[1:3][0].text == TEXTS[1] and len(found[1:3]) == 2
    assert list(scripted()([], WORDS).to_dataframe().columns) == list(table.columns)


def test_tables_of_relations_and_events():
    schema = Schema.of(Schema.from_dict("RE", {"Met": ""}), EVENTS)
    answer = ' [Met(head="Ada", tail="Bob"), Attack(trigger="hit", attacker=["Ada"])]'
    found = scripted(lambda prompt: answer)(["Ada hit Bob."], schema)
    assert isinstance(found[0].records[0], Relation)
    relation, event = found.to_dataframe().to_dict("records")
    assert (relation["kind"], relation["mention"]) == ("relation", "Ada")
    assert [(a["role"], a["text"]) for a in relation["arguments"]] == [
        ("head", "Ada"),
        ("tail", "Bob"),
    ]
    assert (event["kind"], event["mention"], event["start"]) == ("event", "hit", 4)
    assert [(a["role"], a["text"]) for a in event["arguments"]] == [("attacker", "Ada")]


# --- loading -------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path, tokenizer) -> Path:
    """A folder with an adapter, its base model and its encoder, all of them tiny."""
    tiny_llama().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    encoder = tiny_encoder()
    encoder.model.save_pretrained(tmp_path / "encoder")
    tokenizer.save_pretrained(tmp_path / "encoder")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = TaskMoELoraConfig(
        task_type="CAUSAL_LM",
        task_dim=6,
        num_experts=2,
        r=2,
        task_encoder={"name_or_path": str(tmp_path / "encoder")},
    )
    get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_from_pretrained_loads_adapter_encoder_tokenizer_and_format(saved, tokenizer):
    save_format(PromptFormat(style="compact", occurrences=False), saved)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        extractor = Extractor.from_pretrained(saved, max_new_tokens=3, batch_size=2)
    assert extractor.format == PromptFormat(style="compact", occurrences=False)
    assert extractor.max_new_tokens == 3 and extractor.batch_size == 2
    assert not extractor.model.training
    (found,) = extractor(["Ada"], WORDS)
    assert found.answers[0].tokens <= 3
    # In a subfolder, and with a tokenizer beside the adapter.
    tokenizer.add_tokens(["<<new>>"] * 1)
    tokenizer.save_pretrained(saved)
    inner = Extractor.from_pretrained(saved.parent, subfolder="adapter", max_new_tokens=2)
    assert inner.format == extractor.format
    assert "<<new>>" in inner.tokenizer.get_vocab()


def test_the_calibration_beside_an_adapter_is_applied_unless_asked_not_to(saved):
    save_format(PromptFormat(), saved)
    halves = Calibration({"all": Curve(9, (0.0, 1.0), (0.0, 0.5))})
    halves.save(saved)
    assert Extractor.from_pretrained(saved).calibration == halves
    assert Extractor.from_pretrained(saved, calibrated=False).calibration is None
    (saved / "uie_calibration.json").write_text('{"curves": {}}')
    with pytest.raises(ValueError, match="is no calibration"):
        Extractor.from_pretrained(saved)
    plain, halved = (scripted(calibration=one) for one in (None, halves))
    (before,), (after,) = (one(["Ada met Bob."], WORDS) for one in (plain, halved))
    values = [record.confidence for record in before.records]
    assert [r.confidence for r in after.records] == pytest.approx([v / 2 for v in values])
    assert after.answers == before.answers  # the model's own
    (none,) = halved(["Ada met Bob."], WORDS, thresholds=0.51)  # of the calibrated confidence
    assert not none.records and {one.kind for one in none.problems} == {"low_confidence"}
    assert plain.fingerprint() != halved.fingerprint()


def test_the_checksum_of_weights_sees_integers_and_needs_no_memory():
    """Quantised layers keep theirs as buffers of integers; running means are no weights."""

    def part(code: int, mean: float, device: str = "cpu") -> torch.nn.Module:
        layer = torch.nn.Linear(2, 2, device=device)
        if device == "cpu":
            torch.nn.init.ones_(layer.weight), torch.nn.init.zeros_(layer.bias)
        layer.register_buffer("codes", torch.tensor([code], device=device))
        layer.register_buffer("mean", torch.tensor([mean], device=device))
        return layer

    same = weights_checksum(part(1, 0.0))
    assert weights_checksum(part(1, 1.0)) == same != weights_checksum(part(2, 0.0))
    assert weights_checksum(part(1, 0.0, "meta")) != same


def test_the_fingerprint_is_that_of_the_adapters_as_they_are_used(tmp_path, tokenizer):
    def fingerprint(model) -> str:
        return Extractor(model, tokenizer).fingerprint()

    def adapted(config):
        return randomise(get_peft_model(tiny_llama(), config))

    lora = {"task_type": "CAUSAL_LM", "r": 2, "target_modules": ["up_proj", "q_proj"]}
    experts = {**lora, "num_experts": 3, "router_inputs": "token"}
    makers = {LoraConfig: ({}, {"lora_alpha": 64}), TaskMoELoraConfig: ({}, {"top_k": 1})}
    for make, changes in makers.items():
        settings = lora if make is LoraConfig else experts
        own, other = (fingerprint(adapted(make(**settings, **change))) for change in changes)
        assert own != other
        model = adapted(make(**settings, base_model_name_or_path="here"))
        assert fingerprint(model) == own
        model.save_pretrained(tmp_path)
        saved = PeftModel.from_pretrained(tiny_llama(), tmp_path, revision="of another")
        assert fingerprint(saved) == own
        assert adapters_of(saved)[0]["default"]["target_modules"] == ["q_proj", "up_proj"]
        model.add_adapter("other", make(**settings))
        seen = [fingerprint(model)]
        with model.disable_adapter():
            seen.append(fingerprint(model))
        model.set_adapter("other")
        assert len({*seen, fingerprint(model)}) == 3
        model.set_adapter("default")
        assert fingerprint(model) == seen[0]
    prompts = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    model = get_peft_model(tiny_llama(), prompts)
    before = fingerprint(model)
    with model.disable_adapter():
        assert fingerprint(model) != before


def test_from_pretrained_without_a_format_warns_unless_one_is_passed(saved):
    with pytest.warns(UserWarning, match=f"No `{FORMAT_FILE}` is found beside the adapter"):
        assert Extractor.from_pretrained(saved).format == PromptFormat()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        chosen = Extractor.from_pretrained(saved, format=PromptFormat(style="compact"))
    assert chosen.format.style == "compact"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{"prompt_format": {"style": "compact", "colour": 1}}',
            "settings this version does not know: colour",
        ),
        ('{"prompt_format": {}, "other": 1}', "settings this version does not know: other"),
        ('{"format": {}}', "Write it with `save_format`"),
        ("[]", "Write it with `save_format`"),
        ("{", "is no JSON"),
        ('{"prompt_format": {"style": "yaml"}}', "`style` is 'yaml'"),
    ],
)
def test_a_format_file_with_anything_unknown_is_an_error(tmp_path, content, message):
    (tmp_path / FORMAT_FILE).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_format(tmp_path)


def test_an_adapter_that_names_no_base_model_says_what_to_do(saved):
    config = json.loads((saved / "adapter_config.json").read_text())
    (saved / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": None})
    )
    with pytest.raises(
        ValueError, match=r"names no base model .* Pass its Hub id or folder as `base_model`"
    ):
        Extractor.from_pretrained(saved)


def test_a_base_model_that_lies_elsewhere_is_passed(saved, tmp_path):
    save_format(PromptFormat(), saved)
    expected = Extractor.from_pretrained(saved, max_new_tokens=3)(["Ada met Bob."], WORDS)
    (tmp_path / "base").rename(tmp_path / "moved")
    config = json.loads((saved / "adapter_config.json").read_text())
    (saved / "adapter_config.json").write_text(
        json.dumps({**config, "revision": "of the other place"})
    )
    moved = Extractor.from_pretrained(saved, base_model=tmp_path / "moved", max_new_tokens=3)
    found = moved(["Ada met Bob."], WORDS)
    assert [one.answers[0].parsed.raw for one in found] == [
        one.answers[0].parsed.raw for one in expected
    ]


def test_the_extractor_asks_for_nothing_from_the_hub_when_all_is_local(saved, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked")

    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    monkeypatch.setattr(huggingface_hub.file_download, "get_hf_file_metadata", refuse)
    save_format(PromptFormat(), saved)
    assert Extractor.from_pretrained(saved).format == PromptFormat()
    assert FORMAT_FILE == "uie_config.json"


@pytest.mark.parametrize("trained", [["embed_tokens", "lm_head"], None])
@pytest.mark.parametrize(("added", "multiple"), [(20, 64), (0, 1)], ids=["padded", "shrunk"])
def test_a_base_is_made_as_large_as_it_was_when_the_adapter_was_saved(
    saved, tokenizer, trained, added, multiple
):
    base = transformers.AutoModelForCausalLM.from_pretrained(saved.parent / "base")
    tokenizer.add_tokens([f"<<{i}>>" for i in range(added)])
    base.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=multiple)
    assert len(base.get_input_embeddings().weight) == {20: 320, 0: 259}[added]
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=trained)
    adapter = saved.parent / "resized"
    model = get_peft_model(base, config).eval()
    model.save_pretrained(adapter)
    tokenizer.save_pretrained(adapter)
    loaded = Extractor.from_pretrained(adapter, format=PromptFormat()).model
    ids = torch.tensor([[5, 70, 8]])
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


def renamed(weights):
    return {f"z.{name}": value for name, value in weights.items()}


def without_b(weights):
    return {name: value for name, value in weights.items() if "lora_B" not in name}


def times(factor):
    return lambda weights: {n: v * factor if "layers.1.mlp" in n else v for n, v in weights.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (renamed, r"lack `base_model\.model\.\S+`, .* others that fit nowhere: `z\.base_model"),
        (without_b, r"lack `base_model\.model\.\S+taskmoe_lora_B\.weight`, .* and 11 more"),
        (times(math.nan), r"NaN or infinite: `base_model\S+layers\.1\.mlp\S+`"),
        (times(math.inf), r"NaN or infinite: `base_model\S+layers\.1\.mlp\S+`"),
        (lambda weights: {}, r"lack `base_model"),
    ],
)
@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
def test_broken_weights_are_refused_by_name(saved, change, message):
    path = saved / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)
    with pytest.raises(ValueError, match=message):
        Extractor.from_pretrained(saved, format=PromptFormat())


def test_a_trained_head_that_is_not_in_the_file_is_refused(saved):
    base = transformers.AutoModelForCausalLM.from_pretrained(saved.parent / "base")
    config = LoraConfig(
        task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["lm_head"]
    )
    get_peft_model(base, config).save_pretrained(saved)
    path = saved / "adapter_model.safetensors"
    save_file({n: v for n, v in load_file(path).items() if "lm_head" not in n}, path)
    with pytest.raises(ValueError, match=r"lack `.*lm_head\.weight`"):
        Extractor.from_pretrained(saved, format=PromptFormat())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "bf17"}, "The dtype 'bf17' is no precision"),
        ({"dtype": "int8"}, "The dtype 'int8' is no precision"),
        ({"model_kwargs": {"dtype": "float99"}}, "The dtype 'float99' is no precision"),
        ({"device": "nowhere"}, "The device 'nowhere' cannot be used"),
        ({"device": "xla"}, "The device 'xla' cannot be used"),
        ({"model_kwargs": {"device_map": "xla"}}, "The device 'xla' cannot be used"),
    ],
)
def test_devices_and_precisions_that_are_not_there_are_refused_at_once(
    monkeypatch, options, message
):
    monkeypatch.setattr(extractor_module, "load_model", None)  # nothing is loaded
    with pytest.raises(ValueError, match=message):
        Extractor.from_pretrained("an adapter", **options)


def test_the_accelerator_that_is_there_is_taken_unless_told_otherwise(saved, monkeypatch):
    found = Extractor.from_pretrained(saved, format=PromptFormat(), device="cpu", dtype="bfloat16")
    assert {p.dtype for n, p in found.model.named_parameters() if "lora_" not in n} == {
        torch.bfloat16
    }
    there = torch.device("meta")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: there)
    assert placement(None, None, None) == {"device_map": {"": there}}
    assert placement("cpu", None, None) == {}
    assert placement(None, None, {"device_map": "auto"}) == {"device_map": "auto"}


@pytest.mark.parametrize("adapter", [False, True])
@pytest.mark.parametrize("part", ["all", "embeddings"])
def test_models_that_are_offloaded_answer_as_others_do(tmp_path, tokenizer, adapter, part):
    model = moe_model(router_inputs="token") if adapter else tiny_llama()
    expected = Extractor(model, tokenizer, max_new_tokens=8)(TEXTS[:2], WORDS)
    offloaded = model if part == "all" else model.get_input_embeddings()
    accelerate.disk_offload(offloaded, tmp_path, execution_device="cpu")
    assert model.get_input_embeddings().weight.is_meta
    found = Extractor(model, tokenizer, max_new_tokens=8)(TEXTS[:2], WORDS)
    assert [one.answers for one in found] == [one.answers for one in expected]


FROM_HUB = """
import sys, warnings
from huggingface_hub import HfApi
from peft_taskmoe.uie import Extractor
api = HfApi()
api.create_repo("user/kit")
api.upload_folder(repo_id="user/kit", folder_path=sys.argv[1])
api.create_branch("user/kit", branch="first")
api.upload_folder(repo_id="user/kit", folder_path=sys.argv[2], path_in_repo="inner")
found = [Extractor.from_pretrained("user/kit", revision="first", max_new_tokens=2)]
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always", UserWarning)
    found.append(Extractor.from_pretrained("user/kit", subfolder="inner", max_new_tokens=2))
print([one.format.style for one in found], found[0]("Ada", "Capital")[0].answers[0].tokens,
      sum("uie_config.json" in str(one.message) for one in caught))
"""


@pytest.mark.slow
def test_from_the_hub_with_revision_and_subfolder(saved, tmp_path):
    """In a process of its own, since the client reads its settings when it is imported."""
    shutil.copytree(saved, tmp_path / "plain")
    save_format(PromptFormat(style="compact"), saved)
    with LoopbackHub() as hub:
        settings = {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "home"),
            "HF_TOKEN": hub.token,
            "HF_HUB_DISABLE_XET": "1",
        }
        inherited = {
            k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_"))
        }
        done = subprocess.run(
            [sys.executable, "-c", FROM_HUB, str(saved), str(tmp_path / "plain")],
            env={**inherited, **settings, "NO_PROXY": "127.0.0.1", "OMP_NUM_THREADS": "1"},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "['compact', 'dataclass'] 2 1"
