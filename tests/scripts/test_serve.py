"""`peft-taskmoe serve`: answers over HTTP are the offline ones, and no client stops the server."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import ModuleType

import pytest
from peft import LoraConfig, get_peft_model
from transformers.generation.continuous_batching import ContinuousBatchingManager

from peft_taskmoe import TaskMoELoraConfig, attach_task_encoder, cli
from peft_taskmoe.cli import Exit
from peft_taskmoe.uie import (
    Entity,
    Extractor,
    PromptFormat,
    Schema,
    Span,
    completion_text,
    save_format,
)
from peft_taskmoe.uie.extraction.questions import Question
from running import ROOT
from scripted import Scripted, byte_tokenizer, text_in, tiny_llama
from tiny import randomise

httpx = pytest.importorskip("httpx")
uvicorn = pytest.importorskip("uvicorn")
server = pytest.importorskip("peft_taskmoe.serving.app", exc_type=ImportError)

from peft_taskmoe.serving.adapters import Lane  # noqa: E402
from peft_taskmoe.serving.batching import ClosedError, PromptQueue  # noqa: E402
from peft_taskmoe.serving.bodies import ExtractRequest, tickets_of  # noqa: E402
from peft_taskmoe.serving.limits import Guard  # noqa: E402
from peft_taskmoe.serving.service import Service  # noqa: E402
from served import SCHEMA, ask, post, serving, until  # noqa: E402

ONE = Schema.from_dict("NER", {"Capital": ""})
OTHER = {"Name": "names", "Capital": ""}
LONG = " ".join(f"Word{n} and more" for n in range(20))


class Gate:
    """An answer to every prompt: words with a capital letter; it may have to wait for it."""

    def __init__(self) -> None:
        self.open, self.busy = threading.Event(), threading.Event()
        self.open.set()

    def __call__(self, prompt: str) -> str:
        text = text_in(prompt)
        self.busy.set()
        assert self.open.wait(20)
        if "poison" in text:
            raise RuntimeError("out of memory")
        found = re.finditer(r"\b[A-Z]\w*", text)
        records = [Entity("Capital", Span(m.group(), *m.span())) for m in found]
        return completion_text(records, text, Schema.from_dict("NER", SCHEMA))

    def shut(self) -> None:
        self.open.clear()
        self.busy.clear()


def scripted(gate: Gate | None = None, **options) -> Extractor:
    options = {"max_new_tokens": 400, "max_prompt_tokens": 500, **options}
    return Extractor(Scripted(gate or Gate()), byte_tokenizer(), **options)


def looping_llama():
    """A random model whose answers end in loops after some tokens."""
    model = tiny_llama().double()
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.data *= 0.3
    return model


def tickets() -> int:
    gc.collect()
    return sum(isinstance(one, server.Ticket) for one in gc.get_objects())


def timeless(result: dict) -> dict:
    return {key: value for key, value in result.items() if key not in ("seconds", "index")}


def approximately(result):
    """The same words, and confidences to rounding."""
    if isinstance(result, dict):
        return {key: approximately(value) for key, value in result.items()}
    if isinstance(result, list):
        return [approximately(one) for one in result]
    return pytest.approx(result, rel=1e-4) if isinstance(result, float) else result


def metric(client, name: str) -> float:
    lines = [line for line in client.get("/metrics").text.splitlines() if line.startswith(name)]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


@pytest.mark.slow
def test_answers_of_many_clients_are_the_offline_ones_from_shared_batches() -> None:
    extractor, offline = scripted(batch_size=4), scripted(batch_size=4)
    kinds = [
        ({"texts": ["Ada met Bob.", " "], "schema": SCHEMA}, SCHEMA, None),
        ({"texts": [{"text": "é🚀 Ünal Zoe", "schema": OTHER}]}, OTHER, None),
        ({"texts": [LONG], "schema": SCHEMA}, SCHEMA, None),
        (
            {"texts": ["Eve\x00 left \ud800"], "schema": [SCHEMA, ["Name"]]},
            [SCHEMA, ["Name"]],
            None,
        ),
        ({"texts": ["In Kourou"], "schema": ["Capital"], "thresholds": 0.7}, ["Capital"], 0.7),
        (
            {"texts": ["Ada"], "schema": SCHEMA, "thresholds": {"Capital": 0.9}},
            SCHEMA,
            {"Capital": 0.9},
        ),
    ]
    with serving(extractor) as client, ThreadPoolExecutor(12) as pool:
        replies = list(pool.map(lambda kind: post(client, kind[0]), kinds * 2))
        assert client.get("/v1/adapters").json() == [
            {"name": "default", "method": "none", "default": True}
        ]
        assert metric(client, "peft_taskmoe_tokens_total") > 100
        assert metric(client, "peft_taskmoe_waiting_prompts") == 0
        whole = 'peft_taskmoe_requests_total{route="/v1/extract",status="200"}'
        assert metric(client, whole) == len(replies)
        assert "openapi" in client.get("/docs").text and "docs" in client.get("/").text
    for (body, schema, thresholds), reply in zip(kinds * 2, replies, strict=True):
        texts = [one if isinstance(one, str) else one["text"] for one in body["texts"]]
        wanted = [one.to_dict() for one in offline(texts, schema, thresholds=thresholds)]
        assert list(map(timeless, reply.json()["results"])) == list(map(timeless, wanted))
    windows = sum(len(one.answers) for one in offline([LONG], SCHEMA))
    assert windows > 1  # of which each is a row
    assert max(map(len, extractor.model.batches)) == 4


@pytest.mark.slow
def test_each_adapter_answers_as_it_does_alone(models, tmp_path) -> None:
    language_model, encoder = models
    settings = {"target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM", "r": 2}
    task = TaskMoELoraConfig(
        num_experts=2, task_dim=8, task_encoder={"name_or_path": str(encoder)}, **settings
    )
    folders = {name: tmp_path / name for name in ("a.task", "b", "lora")}
    for seed, (name, folder) in enumerate(folders.items()):
        config = LoraConfig(**settings) if name == "lora" else task
        randomise(get_peft_model(tiny_llama(), config), seed).save_pretrained(folder)
        save_format(PromptFormat(style="compact" if name == "b" else "dataclass"), folder)
    options = {"base_model": language_model, "max_new_tokens": 12, "device": "cpu"}
    alone = {name: Extractor.from_pretrained(folders[name], **options) for name in ("a.task", "b")}
    adapters = server.Adapters(Extractor.from_pretrained(folders["a.task"], **options), "a.task")
    adapters.load("b", folders["b"])
    other_words = byte_tokenizer()
    other_words.add_tokens(["<<new>>"])
    for name in ("far", "words"):
        folders[name] = shutil.copytree(folders["b"], tmp_path / name)
    other_words.save_pretrained(folders["words"])
    config = json.loads((folders["far"] / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "elsewhere"
    (folders["far"] / "adapter_config.json").write_text(json.dumps(config))
    for name, why in (
        ("b", "Two adapters are called `b`"),
        ("lora", "different peft types"),
        ("far", "was trained on `elsewhere`, but the loaded model is"),
        ("words", "has other tokens than that of the loaded model. Load this adapter by itself"),
    ):
        with pytest.raises(ValueError, match=why):
            adapters.load(name, folders[name])
    cached = Extractor.from_pretrained(folders["a.task"], **options)
    cached.prefix_caching = True  # its encoder reads whole prompts
    with pytest.raises(ValueError, match="computes a schema once for many texts, but"):
        server.Adapters(cached).load("b", folders["b"])
    with serving(adapters) as client, ThreadPoolExecutor(6) as pool:
        names = ["b", None, "a.task"] * 3
        replies = list(pool.map(lambda name: ask(client, "Ada met Bob.", adapter=name), names))
        assert [one["default"] for one in client.get("/v1/adapters").json()] == [True, False]
    wanted = {
        name: one(["Ada met Bob."], SCHEMA)[0].to_dict()["answers"] for name, one in alone.items()
    }
    assert len(set(map(str, wanted.values()))) == 2
    for name, reply in zip(names, replies, strict=True):
        assert reply.json()["results"][0]["answers"] == wanted[name or "a.task"]


def test_a_stream_gives_each_text_as_soon_as_it_is_done() -> None:
    gate = Gate()
    with serving(scripted(gate, batch_size=1)) as client:
        gate.shut()
        body = {"texts": [" ", "Ada", "poison", "Bob"], "schema": SCHEMA}
        with client.stream("POST", "/v1/extract/stream", json=body) as reply:
            lines = reply.iter_lines()
            assert json.loads(next(lines))["index"] == 0  # while the model still works
            gate.open.set()
            rows = [json.loads(line) for line in lines]
    assert reply.headers["content-type"] == "application/x-ndjson"
    assert [row["index"] for row in rows] == [1, 2, 3]
    assert "RuntimeError" in rows[1].pop("error")
    wanted = scripted()(["Ada", "Bob"], SCHEMA)
    assert [timeless(rows[0]), timeless(rows[2])] == [timeless(one.to_dict()) for one in wanted]


def test_constrained_decoding_can_be_asked_for() -> None:
    pytest.importorskip("llguidance")
    options = {"max_new_tokens": 30, "max_prompt_tokens": 500}
    offline = Extractor(tiny_llama(), byte_tokenizer(), constrained=True, **options)
    with serving(Extractor(tiny_llama(), byte_tokenizer(), **options)) as client:
        free, held = (ask(client, "Ada", constrained=one).json() for one in (False, True))
    (wanted,) = offline(["Ada"], SCHEMA)
    assert held["results"][0]["answers"] == wanted.to_dict()["answers"]
    assert held["results"][0]["answers"] != free["results"][0]["answers"]


WORDS = ["Ada", "Ada met Bob.", "In Kourou the rocket waits", "Zoe", "Ünal and Eve left"]


@pytest.mark.slow
@pytest.mark.parametrize("adapted", [False, True], ids=["base", "task"])
def test_continuous_batching_answers_as_batches_do(adapted, tiny_encoder) -> None:
    """Also where lanes take turns, answers loop, and some are held to the grammar."""
    model, tokenizer = looping_llama(), byte_tokenizer()
    if adapted:
        config = TaskMoELoraConfig(
            target_modules=["q_proj", "up_proj"],
            task_type="CAUSAL_LM",
            r=2,
            num_experts=2,
            task_dim=tiny_encoder.task_dim,
        )
        model = randomise(get_peft_model(model, config), 1)
        attach_task_encoder(model, tiny_encoder, tokenizer)
    options = {"max_new_tokens": 150, "max_prompt_tokens": 500, "batch_size": 3}
    wanted = Extractor(model, tokenizer, **options)(WORDS, SCHEMA)
    held = Extractor(model, tokenizer, constrained=True, **options)(WORDS[:2], SCHEMA)
    extractor = Extractor(model, tokenizer, **options)
    with serving(extractor, engine="continuous") as client, ThreadPoolExecutor(8) as pool:
        asked = [(text, False) for text in WORDS] + [(text, True) for text in WORDS[:2]]
        replies = list(pool.map(lambda one: ask(client, one[0], constrained=one[1]), asked * 2))
        assert metric(client, "peft_taskmoe_waiting_prompts") == 0
    found = [reply.json()["results"][0] for reply in replies]
    for one, other in zip(found, [*wanted, *held] * 2, strict=True):
        assert timeless(one) == approximately(timeless(other.to_dict()))
    loops = [96 < answer.tokens < 150 for one in wanted for answer in one.answers]
    assert adapted or any(loops)


@pytest.mark.slow
def test_prompts_that_the_engine_fails_at_are_answered_in_batches(monkeypatch) -> None:
    """One whose batch raises takes those beside it along, and nobody notices."""
    options = {"max_new_tokens": 60, "max_prompt_tokens": 500, "batch_size": 3}
    model, tokenizer = looping_llama(), byte_tokenizer()
    wanted = Extractor(model, tokenizer, **options)(WORDS, SCHEMA)
    step = ContinuousBatchingManager._generation_step
    steps = iter(range(10**6))

    def failing(manager) -> None:
        if next(steps) == 20:
            raise RuntimeError("out of memory")
        step(manager)

    monkeypatch.setattr(ContinuousBatchingManager, "_generation_step", failing)
    extractor = Extractor(model, tokenizer, **options)
    with serving(extractor, engine="continuous") as client, ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda text: ask(client, text), WORDS))
        for reply, one in zip(replies, wanted, strict=True):
            assert reply.json()["results"][0]["answers"] == one.to_dict()["answers"]
        with pytest.raises(httpx.ReadTimeout):  # a client that leaves while it is answered
            client.post("/v1/extract", json={"texts": WORDS, "schema": SCHEMA}, timeout=0.05)
        assert ask(client, "Ada").json()["results"][0]["answers"] == wanted[0].to_dict()["answers"]
        until(lambda: tickets() == 0)
    assert next(steps) > 21
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["read", "add", "engine", "read in batches"])
def test_a_prompt_not_taken_or_an_answer_not_read_stops_nobody(monkeypatch, fault) -> None:
    options = {"max_new_tokens": 20, "max_prompt_tokens": 500, "batch_size": 3}
    model, tokenizer = looping_llama(), byte_tokenizer()
    wanted = Extractor(model, tokenizer, **options)(WORDS, SCHEMA)
    extractor = Extractor(model, tokenizer, **options)
    read, add = Extractor.read, ContinuousBatchingManager.add_request
    reads, adds = iter(range(10**6)), iter(range(10**6))

    def read_badly(self, job, written):
        if next(reads) == 1:
            raise SystemError("recursion depth mismatch")
        read(self, job, written)

    def add_badly(self, *args, **kwargs):
        return None if next(adds) in (2, 3) else add(self, *args, **kwargs)  # as a stopped one does

    def no_engine(*args):
        raise RuntimeError("out of memory")

    if fault == "engine":
        monkeypatch.setattr("peft_taskmoe.serving.continuous.Engine", no_engine)
    elif fault != "add":
        monkeypatch.setattr(Extractor, "read", read_badly)
    else:
        monkeypatch.setattr(ContinuousBatchingManager, "add_request", add_badly)
    engine = "batches" if "batches" in fault else "continuous"
    with serving(extractor, engine=engine) as client, ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda text: ask(client, text), WORDS))
        for reply, one in zip(replies, wanted, strict=True):
            assert reply.json()["results"][0]["answers"] == one.to_dict()["answers"]
        assert ask(client, "Ada").status_code == 200


@pytest.mark.parametrize("engine", ["batches", "continuous"])
def test_who_waits_is_told_when_the_models_thread_ends_by_an_error(monkeypatch, engine) -> None:
    started = threading.Event()

    def broken(lane):
        assert started.wait(20)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(server.Adapters(scripted()).lane(None, None).__class__, "warm_up", broken)
    service = Service(server.Adapters(scripted()), server.Limits(), server.ENGINES[engine])
    service.worker.thread.start()
    body = ExtractRequest(texts=["Ada", "Bob"], schema=SCHEMA)
    waiting = tickets_of(body, service.adapters, service.limits)
    service.queue.put(waiting)
    started.set()
    for one in waiting:
        assert isinstance(one.future.exception(20), ClosedError)
    with pytest.raises(ClosedError):
        service.queue.put(waiting)


REFUSED = [
    ({"texts": ["a"] * 4, "schema": SCHEMA}, 422, "`max_texts` is 3"),
    ({"texts": ["a" * 101], "schema": SCHEMA}, 422, "`max_text_characters` is 100"),
    ({"texts": ["a"], "schema": [f"L{n}" for n in range(11)]}, 422, "`max_labels` is 10"),
    ({"texts": ["a"], "schema": {"events": {"E": {"roles": [*"abcdefghij"]}}}}, 422, "max_labels"),
    ({"texts": ["a"], "schema": {"L": "x" * 700}}, 422, "500 is allowed"),
    ({"texts": ["a", "b"], "schema": [[f"L{n}"] for n in range(9)]}, 413, "`max_waiting` is 16"),
    ({"texts": ["a"]}, 422, "no schema"),
    ({"texts": ["a"] * 3, "schema": [[f"L{n}"] for n in range(6)]}, 413, "make 18 prompts or"),
    ({"texts": [{"text": "a", "schema": {}}], "schema": SCHEMA}, 422, "no labels"),
    ({"texts": [], "schema": SCHEMA}, 422, "at least 1 item"),
    ({"texts": ["a"], "schema": {}}, 422, "no labels"),
    ({"texts": ["a"], "schema": "pyproject.json"}, 422, "valid"),
    ({"texts": ["a"], "schema": SCHEMA, "adapter": "x"}, 422, "The adapters are `default`"),
    ({"texts": ["a"], "schema": SCHEMA, "thresholds": 2}, 422, "no probability"),
    ({"texts": ["a"], "schema": SCHEMA, "thresholds": {"X": 0.5}}, 422, "`X`"),
    ({"texts": ["a"], "schema": SCHEMA, "thresholds": True}, 422, "valid number"),
    ({"texts": ["a"], "schema": SCHEMA, "thresholds": {"\ud800": 0.5}}, 422, "ud800"),
    ({"texts": ["a"], "schema": {"\ud800": ""}, "thresholds": {"X": 0.5}}, 422, "ud800"),
    ({"texts": ["a"], "schema": SCHEMA, "timeout": -1}, 422, "greater than 0"),
    ({"texts": ["a"], "schema": SCHEMA, "colour": 1}, 422, "colour"),
    (b'{"texts": ["a"], "schema": {"A": "1", "A": "2"}}', 422, "`A` is given twice"),
    (b'{"texts": ["a"], "schema": ' + b"[" * 1500 + b"]" * 1500 + b"}", 422, "nested too deeply"),
    (b'{"texts": ["a", ', 422, "Expecting value"),
    (b"\x00\xff\xfe", 422, "decode"),
    (b'{"texts": ["a"], "schema": {"\\ud800": "", "\\ud800": ""}}', 422, "is given twice"),
    (b" " * 6000, 413, "`max_body_bytes` (5000)"),
    (iter([b" " * 3000] * 1000), 413, "`max_body_bytes` (5000)"),
]


@pytest.mark.slow
def test_what_cannot_be_answered_is_refused_by_its_name() -> None:
    limits = {"max_texts": 3, "max_text_characters": 100, "max_labels": 10, "max_waiting": 16}
    headers = {"Authorization": "Bearer secret", "Content-Type": "application/json"}
    with serving(scripted(), "secret", max_body_bytes=5000, **limits) as client:
        for given in ("Bearer wrong", "secret", ""):
            reply = client.get("/v1/adapters", headers={"Authorization": given})
            assert (reply.status_code, reply.headers["www-authenticate"]) == (401, "Bearer")
        for body, status, words in REFUSED:
            content = json.dumps(body).encode() if isinstance(body, dict) else body
            for path in ("/v1/extract", "/v1/extract/stream")[: 2 - hasattr(body, "__next__")]:
                try:
                    reply = client.post(path, content=content, headers=headers)
                except httpx.WriteError:  # closed while it was sent
                    assert status == 413
                    continue
                assert (reply.status_code, words in reply.text) == (status, True), reply.text
                assert len(reply.text) < 1000
        client.headers.update(headers)
        assert ask(client, "Ada").json()["results"][0]["records"]


def test_requests_that_could_never_wait_are_refused_before_they_are_cut(monkeypatch) -> None:
    extractor = scripted()
    room = extractor.max_prompt_tokens - len(extractor.text_jobs([Question("a", ONE)]).jobs[0].ids)
    tight = {"Capital": "d" * (room - 12)}  # windows of some characters
    cut = []
    with serving(extractor, max_waiting=16, max_texts=17) as client:
        several = [[f"L{n}"] for n in range(16)]  # as many prompts as may wait; blanks make none
        assert ask(client, "a", " ", " " * 999, schema=several).status_code == 200
        monkeypatch.setattr(Extractor, "text_jobs", lambda *args: cut.append(args))
        reply = ask(client, "ab " * 4000, schema=tight)
        assert (reply.status_code, "`max_waiting` is 16" in reply.text) == (413, True)
        reply = ask(client, *("a" * 17), schema=tight)
        assert (reply.status_code, "17 texts. `max_waiting`" in reply.text) == (413, True)
    assert not cut


def test_an_error_of_the_server_is_counted_as_one() -> None:
    app = server.make_app(server.Adapters(scripted()))

    @app.get("/broken")
    def broken() -> None:
        raise RuntimeError("out of memory")

    async def asked() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return [await client.get(path) for path in ("/broken", "/metrics")]

    error, metrics = asyncio.run(asked())
    assert error.status_code == 500
    assert 'requests_total{route="/broken",status="500"} 1.0' in metrics.text


@pytest.mark.slow
def test_full_queues_deadlines_and_clients_that_leave() -> None:
    gate = Gate()
    extractor = scripted(gate, batch_size=1)
    with serving(extractor, max_waiting=2) as client, ThreadPoolExecutor(8) as pool:
        gate.shut()
        running = pool.submit(ask, client, "Running")
        assert gate.busy.wait(20)
        with pytest.raises(httpx.ReadTimeout):
            client.post("/v1/extract", json={"texts": ["Gone"], "schema": SCHEMA}, timeout=0.3)
        gone = {"texts": ["Gone too"], "schema": SCHEMA}
        with client.stream("POST", "/v1/extract/stream", json=gone):
            until(lambda: metric(client, "peft_taskmoe_waiting_prompts") == 1)
        until(lambda: metric(client, "peft_taskmoe_waiting_prompts") == 0)
        for path in ("/v1/extract", "/v1/extract/stream"):
            late = ask(client, "Late", timeout=0.2, path=path)
            assert "`timeout` (0.2 s)" in late.text
        waiting = [pool.submit(ask, client, text) for text in ("First", "Second")]
        until(lambda: metric(client, "peft_taskmoe_waiting_prompts") == 2)
        full = ask(client, "Third")
        assert full.status_code == 429 and int(full.headers["retry-after"]) >= 1
        assert client.get("/health").status_code == 200
        gate.open.set()
        assert [one.result().status_code for one in (running, *waiting)] == [200] * 3
        del running, waiting
        for _ in range(3):
            assert all(ask(client, f"Ada {n}").status_code == 200 for n in range(20))
            until(lambda: tickets() == 0)  # the queue and its worker keep none
    asked = [text_in(prompt) for prompt in extractor.model.prompts]
    assert asked[1] == "Running" and sorted(asked[2:4]) == ["First", "Second"]


POST = b"POST /v1/extract HTTP/1.1\r\nHost: a\r\n"
HOSTILE = [
    (POST + b"Content-Length: 100000000\r\n\r\n" + b"x" * 1000, b"413"),
    (POST + b"Content-Length: 100\r\n\r\n{", b"408"),  # and nothing more
    (POST + b"Content-Length: -1\r\n\r\n", b"400"),
    (POST + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n", b"400"),
    (POST + b"Transfer-Encoding: chunked\r\n\r\nFFFFFFFFFFFFFFFFF\r\nx", b"408"),
    (POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", b"422"),
    (POST + b"".join(b"X-%d: a\r\n" % n for n in range(20_000)) + b"\r\n", b"400"),
    (b"GET /health HTTP/1.1\r\nHost: a\0b\r\n\r\n", b"400"),
    (b"GET " + b"/" * 10**6, b"400"),
    (b"\0" * 99, b"400"),
]


@pytest.mark.slow
def test_one_bad_prompt_fails_alone_and_hostile_clients_leave_it_serving() -> None:
    gate = Gate()
    extractor = scripted(gate)
    with serving(extractor, body_timeout=0.5, max_body_bytes=30_000_000) as client:
        gate.shut()
        with ThreadPoolExecutor(4) as pool:
            replies = [pool.submit(ask, client, text) for text in ("Ada", "poison", "Bob", "Eve")]
            assert gate.busy.wait(20)
            time.sleep(0.2)
            gate.open.set()
            assert sorted(one.result().status_code for one in replies) == [200, 200, 200, 500]
        address = (client.base_url.host, client.base_url.port)
        raw = [socket.create_connection(address) for _ in HOSTILE]
        for one, (words, _) in zip(raw, HOSTILE, strict=True):
            one.sendall(words)
        reply = ask(client, "a", schema={f"L{n}": "" for n in range(10**6)})
        assert (reply.status_code, "max_labels" in reply.text) == (422, True)
        for one, (words, status) in zip(raw, HOSTILE, strict=True):
            one.settimeout(20)
            assert (words[:99], one.recv(100).split()[1]) == (words[:99], status)
            one.close()
        assert ask(client, "Ada").status_code == 200


@pytest.mark.slow
def test_the_command_finishes_what_runs_when_it_is_stopped(models, tmp_path) -> None:
    config = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    get_peft_model(tiny_llama(), config).save_pretrained(tmp_path / "adapter")
    options = ["--batch-size", "1", "--max-new-tokens", "60", "--port", "0", "--base-model"]
    options += [models[0], "--adapter", tmp_path / "adapter"]
    command = [sys.executable, "-m", "peft_taskmoe", "serve", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with starting(command, environment) as (process, url):
        with httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
            until(lambda: client.get("/ready").status_code == 200)
            with ThreadPoolExecutor(1) as pool:
                running = pool.submit(ask, client, *(f"Ada {n}" for n in range(20)))
                until(lambda: metric(client, "peft_taskmoe_waiting_prompts") > 0)
                process.send_signal(signal.SIGTERM)
                until(lambda: refused(client.base_url))
                assert len(running.result().json()["results"]) == 20
        assert process.wait(30) == Exit.DONE
    with starting(command, environment) as (process, _):  # uvicorn does not listen to signals yet
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == Exit.DONE


@contextmanager
def starting(command, environment):
    """A server's process and address, as soon as it says that address."""
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    try:
        line = next(line for line in process.stderr if line.startswith("Serving at"))
        yield process, line.split()[-1]
    finally:
        process.kill()
        process.stderr.close()


def refused(url) -> bool:
    try:
        socket.create_connection((url.host, url.port)).close()
    except ConnectionRefusedError:
        return True
    return False


def test_without_a_page_the_server_says_why(adapted, tiny_encoder, monkeypatch) -> None:
    plain = server.Adapters(scripted(), "plain")
    assert "`plain` is `none`" in server.why_no_page(plain, None)
    with pytest.raises(ValueError, match=r"There can be no page\. It shows how experts"):
        server.make_app(plain, page=True)
    model = adapted("llama", task_type="CAUSAL_LM")
    attach_task_encoder(model, tiny_encoder, byte_tokenizer())
    routed = server.Adapters(Extractor(model, byte_tokenizer(), max_new_tokens=8))
    assert "no API key" in server.why_no_page(routed, "secret")
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert "peft_taskmoe[app]" in server.why_no_page(routed, None)
    monkeypatch.setitem(sys.modules, "gradio", ModuleType("gradio"))
    monkeypatch.setitem(sys.modules, "matplotlib", ModuleType("matplotlib"))
    assert server.why_no_page(routed, None) is None
    with serving(scripted()) as client:
        assert "How to ask" in client.get("/").text


def test_without_the_extra_the_command_says_what_to_install(monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert cli.main(["serve", "--adapter", "a"]) == Exit.NOTHING_DONE
    assert "pip install 'peft_taskmoe[serve]'" in capsys.readouterr().err


def test_the_command_says_where_it_serves_and_to_whom(monkeypatch, capsys, tmp_path) -> None:
    """Everything but the server itself."""
    served, loaded, pages = [], [], []
    monkeypatch.setattr(Extractor, "from_pretrained", lambda *args, **options: scripted())
    monkeypatch.setattr(server.Adapters, "load", lambda self, *given: loaded.append(given))
    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: served.append(self))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    command = ["serve", "--port", "0", "--adapter", str(tmp_path), "--adapter", "second=b=c"]
    assert cli.main([*command, "--host", "0.0.0.0", "--no-page"]) == Exit.DONE
    said = capsys.readouterr().err
    assert "Whoever reaches this address may use the server" in said and "no page" not in said
    assert loaded == [("second", "b=c")]
    assert cli.main([*command, "--api-key", "secret"]) == Exit.DONE
    said = capsys.readouterr().err
    assert "There is no page. A browser sends no API key." in said and "Whoever" not in said
    with monkeypatch.context() as patch:
        patch.setattr(server, "why_no_page", lambda *_: None)
        patch.setattr(server, "make_app", lambda *_, **options: pages.append(options["page"]))
        assert cli.main(command) == Exit.DONE
    assert pages == [True] and "no page" not in capsys.readouterr().err and len(served) == 3
    assert cli.main([*command, "--api-key", ""]) == Exit.NOTHING_DONE
    assert "The API key is empty. Pass one, or unset" in capsys.readouterr().err


def test_what_others_ask_of_the_models_thread_is_done_before_prompts() -> None:
    """And what it raises is raised where it was asked for."""
    queue = PromptQueue(1)
    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(queue.call, work) for work in (lambda: 7, lambda: 1 / 0)]
        assert queue.take(1) == []  # waits until something is there
        until(lambda: queue.run_calls() or all(one.done() for one in asked))
        assert asked[0].result() == 7
        with pytest.raises(ZeroDivisionError):
            asked[1].result()
    queue.close()
    assert queue.finished and queue.take(1) == []
    with pytest.raises(ClosedError, match="The server is stopping"):
        queue.call(int)


def test_a_model_that_fails_at_the_start_closes_the_server(monkeypatch) -> None:
    monkeypatch.setattr(Lane, "warm_up", lambda self: 1 / 0)
    service = Service(server.Adapters(scripted()), server.Limits())
    service.worker.thread.start()
    service.worker.thread.join(30)
    assert not service.worker.ready and service.queue.closed
    body = ExtractRequest.model_validate({"texts": ["Ada"], "schema": SCHEMA})
    with pytest.raises(server.HTTPException) as refused:
        asyncio.run(service.admit(body))
    assert (refused.value.status_code, refused.value.detail) == (503, "The server is stopping.")


def test_an_answer_that_cannot_be_put_together_fails_alone(monkeypatch) -> None:
    with serving(scripted()) as client:
        with monkeypatch.context() as patch:
            patch.setattr(Extractor, "extraction_of", lambda *_: 1 / 0)
            reply = ask(client, "Ada")
            assert (reply.status_code, "ZeroDivisionError" in reply.text) == (500, True)
        assert ask(client, "Ada").status_code == 200


def test_a_ticket_that_nobody_waits_for_any_more_is_left() -> None:
    body = ExtractRequest.model_validate({"texts": [" "], "schema": SCHEMA})
    (ticket,) = tickets_of(body, server.Adapters(scripted()), server.Limits())
    ticket.future.cancel()
    ticket.deliver()
    ticket.fail(ValueError("too late"))
    assert ticket.future.cancelled()


def test_a_client_that_leaves_before_its_body_is_whole_is_not_answered() -> None:
    async def leaves() -> dict:
        return {"type": "http.disconnect"}

    async def reached(*_) -> None:
        raise AssertionError

    scope = {"type": "http", "path": "/v1/extract", "headers": []}
    asyncio.run(Guard(reached, server.Limits(), None)(scope, leaves, reached))
