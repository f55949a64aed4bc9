"""The demonstration page in a headless Chromium: typed, clicked, by two users at once."""

from __future__ import annotations

import json
import shutil

import pytest
from peft import get_peft_model

from peft_taskmoe import TaskMoELoraConfig, attach_task_encoder, save_task_centroids
from peft_taskmoe import page as app
from peft_taskmoe.nearest import TaskCentroids
from peft_taskmoe.uie import Extractor
from scripted import byte_tokenizer, tiny_llama
from tiny import randomise

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.slow
WAIT = 90_000  # ms
PERSON = json.dumps({"Person": "names"})


@pytest.fixture
def extractor(tiny_encoder, word_tokenizer):
    config = TaskMoELoraConfig(task_type="CAUSAL_LM", num_experts=3, r=2, task_dim=6)
    model = randomise(get_peft_model(tiny_llama(), config)).eval()
    attach_task_encoder(model, tiny_encoder, byte_tokenizer())
    return Extractor(model, byte_tokenizer(), max_new_tokens=6)


@pytest.fixture
def centroids(extractor, tmp_path) -> TaskCentroids:
    tasks = {"people": ["w4 w5"], "places": ["w40 w41"]}
    return TaskCentroids.load(save_task_centroids(extractor.model, tasks, tmp_path))


@pytest.fixture
def browser():
    pytest.importorskip("gradio", reason="gradio is not installed")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed")
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


def opened(browser, url):
    page = browser.new_page(viewport={"width": 1280, "height": 1000})
    page.goto(url, timeout=WAIT)
    page.wait_for_selector("#extract", timeout=WAIT)
    return page


def asked(page, schema: str, text: str) -> None:
    page.fill("#schema textarea", schema)
    page.fill("#text textarea", text)
    page.click("#extract")


def answered(page, words: str) -> None:
    page.wait_for_function(
        "words => document.querySelector('#found').innerText.includes(words)",
        arg=words,
        timeout=WAIT,
    )


def test_the_page_answers_what_is_typed_by_two_users_at_once(
    extractor, centroids, browser, tmp_path
):
    blocks = app.page(extractor, centroids)
    _, url, _ = blocks.launch(prevent_thread_lock=True, quiet=True, ssr_mode=False)
    try:
        one, two = opened(browser, url), opened(browser, url)
        asked(one, PERSON, "Ada met Bob.")
        asked(two, json.dumps({"Ort": "places"}), "<b>Köln</b> \U0001f680 مرحبا بالعالم")
        answered(one, "Ada met Bob.")
        answered(two, "<b>Köln</b> \U0001f680 مرحبا بالعالم")
        assert two.locator("#found .text b").count() == 0
        assert two.locator("#found .text").get_attribute("dir") == "auto"
        for page, mine, other in ((one, "Person", "Ort"), (two, "Ort", "Person")):
            page.wait_for_selector("#gates img", timeout=WAIT)
            assert "people" in page.inner_text("#near") and "places" in page.inner_text("#near")
            page.get_by_text("Prompt and records").click()
            page.wait_for_selector("#prompt .cm-line", timeout=WAIT)
            prompt = page.inner_text("#prompt")
            assert mine in prompt and other not in prompt
        two.screenshot(path=tmp_path / "two.png", full_page=True)

        asked(one, "{broken", "Ada")
        answered(one, "The schema is no JSON")
        asked(one, PERSON, "  ")
        answered(one, "The text is empty")
        asked(one, PERSON, "long " * 4001)
        answered(one, "more than 20,000")
        one.screenshot(path=tmp_path / "one.png", full_page=True)

        one.get_by_label("base: the base model without the adapter").check()
        asked(one, PERSON, "Zoe sang.")
        answered(one, "Zoe sang.")
        assert one.inner_text("#near").strip() == ""
    finally:
        blocks.close()


@pytest.mark.parametrize("engine", ["batches", "continuous"])
def test_the_server_shows_the_page_and_answers_beside_it(extractor, centroids, browser, engine):
    pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")
    from served import ask, serving

    wanted = extractor(["Zoe sang."], {"Person": "names"}, progress=False)[0].to_dict()
    with serving(extractor, engine=engine, page=True, centroids=centroids) as client:
        page = opened(browser, str(client.base_url))
        asked(page, PERSON, "Ada met Bob.")
        replies = [ask(client, "Zoe sang.", schema={"Person": "names"}) for _ in range(5)]
        answered(page, "Ada met Bob.")
        page.wait_for_selector("#gates img", timeout=WAIT)
        assert "people" in page.inner_text("#near")
        assert [one.json()["results"][0]["answers"] for one in replies] == [wanted["answers"]] * 5
        assert client.get("/v1/adapters").json()[0]["method"] == "TASKMOE_LORA"
        many = {"files": ("a.txt", b"x" * 1000)}
        assert client.post("/gradio_api/upload", files=many).status_code == 413
        assert client.get("/nothing").status_code == 404


def test_the_ways_differ_in_what_the_router_sees(extractor, centroids):
    answer = app.Demonstration(extractor, centroids)
    found = {way: answer(PERSON, "Ada met Bob. " * 30, way) for way in app.WAYS}
    assert found[app.AWARE][2] == found[app.TOKEN][2] == found[app.BASE][2]  # the prompt
    panels = {way: one[3] and one[3].axes[0].images[0].get_array() for way, one in found.items()}
    assert panels[app.BASE] is None
    assert abs(panels[app.AWARE] - panels[app.TOKEN]).max() > 1e-4
    assert "0." in found[app.TOKEN][4] and extractor.model.active_adapters == ["default"]


def test_what_cannot_be_asked_is_said_instead_of_an_answer(extractor):
    answer = app.Demonstration(extractor, None)
    for schema, text, why in (
        ("{broken", "Ada", "The schema is no JSON: "),
        ('["a"]', "Ada", "no JSON object"),
        (PERSON, " \n", "The text is empty"),
        (PERSON, "a" * 20_001, "20,001 characters, more than 20,000"),
        ('{"<b>": "x", "<b>": "y"}', "Ada", "&lt;b&gt;"),
    ):
        shown, *rest = answer(schema, text, app.AWARE)
        assert 'role="alert"' in shown and "<b>" not in shown
        assert why in shown and rest == ["", "", None, ""]
    *_, near = answer(PERSON, "Ada", app.AWARE)
    assert near == "No task centroids beside the adapter."
