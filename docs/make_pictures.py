"""The pictures of the documents: the method, a page of extractions, the demonstration's gates.

python docs/make_pictures.py                          # docs/images/method.svg
python docs/make_pictures.py --browser chromium       # also docs/images/extractions.png
python docs/make_pictures.py --adapter outputs/demo   # also docs/images/gates.png
With both, and playwright installed, also docs/images/page.png.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
from pathlib import Path
from xml.sax.saxutils import escape

from peft_taskmoe.uie import (
    Argument,
    Entity,
    Event,
    Extraction,
    Extractions,
    Problem,
    Record,
    Relation,
    Span,
)

IMAGES = Path(__file__).parent / "images"
GATES = (0.08, 0.31, 0.05, 0.06, 0.22, 0.09, 0.12, 0.07)  # an example
STYLE = """
  text { font: 15px system-ui, sans-serif; fill: #1f2328; text-anchor: middle }
  .small { font-size: 12.5px } .math { font-style: italic; font-family: Georgia, serif }
  .page { fill: #ffffff } .box { fill: #eef1f5; stroke: #6b7785 }
  .frozen { fill: #dcebfa; stroke: #2f6fae } .trained { fill: #fdebd3; stroke: #b8690f }
  .bar { fill: #b8690f } .line { stroke: #57606a; stroke-width: 1.5; fill: none }
  .head { fill: #57606a }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 } .page { fill: #0d1117 } .box { fill: #1c2430; stroke: #7d8895 }
    .frozen { fill: #14304d; stroke: #5ea3e0 } .trained { fill: #3f2a10; stroke: #e0a04c }
    .bar { fill: #e0a04c } .line { stroke: #9aa5b1 } .head { fill: #9aa5b1 }
  }
"""


def text(x: float, y: float, words: str, kind: str = "") -> str:
    """Centred words."""
    return f'<text x="{x}" y="{y}" class="{kind}">{escape(words)}</text>'


def box(x: float, y: float, width: float, height: float, kind: str, *lines: str) -> str:
    """A rounded box with centred lines: the first large, the others small."""
    parts = [f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="8" class="{kind}"/>']
    top = y + height / 2 + 5 - 9 * (len(lines) - 1)
    parts += [
        text(x + width / 2, top + 18 * i, line, "small" if i else "")
        for i, line in enumerate(lines)
    ]
    return "".join(parts)


def arrow(*points: tuple[float, float]) -> str:
    """A line through points that ends in an arrow head."""
    path = " L".join(f"{x} {y}" for x, y in points)
    return f'<path d="M{path}" class="line" marker-end="url(#head)"/>'


def gate_bars(x: float, bottom: float) -> str:
    """The gates of one token as bars."""
    return "".join(
        f'<rect x="{x + 13 * i}" y="{bottom - 120 * gate:.1f}" width="9" height="{120 * gate:.1f}" '
        'class="bar"/>'
        for i, gate in enumerate(GATES)
    )


def method_svg() -> str:
    """Prompt to task embedding to gates to the update of one adapted layer."""
    parts = [
        '<rect width="860" height="330" rx="10" class="page"/>',
        box(20, 30, 150, 62, "box", "prompt", "schema and text"),
        arrow((170, 61), (206, 61)),
        box(210, 30, 150, 62, "frozen", "task encoder", "frozen"),
        arrow((360, 61), (436, 61)),
        text(396, 50, "e", "math"),
        box(20, 195, 150, 62, "box", "token", "hidden state x"),
        arrow((170, 226), (256, 226), (256, 282), (366, 282)),
        arrow((256, 226), (256, 184), (436, 184)),
        arrow((256, 184), (256, 130), (400, 130), (400, 78), (436, 78)),
        text(232, 172, "x", "math"),
        box(440, 30, 150, 62, "trained", "router", "softmax(W [x ; e])"),
        arrow((590, 61), (630, 61)),
        gate_bars(640, 78),
        text(691, 98, "8 gates, sum 1", "small"),
        box(440, 153, 150, 62, "trained", "8 experts", "B A x, rank 4 each"),
        arrow((590, 184), (626, 184)),
        arrow((691, 106), (691, 158)),
        box(630, 162, 122, 44, "box", "weighted sum"),
        arrow((691, 206), (691, 258)),
        box(630, 262, 122, 40, "box", "+"),
        box(370, 251, 150, 62, "frozen", "base layer", "W₀ x, frozen"),
        arrow((520, 282), (626, 282)),
        arrow((752, 282), (806, 282)),
        text(826, 287, "y", "math"),
        text(112, 312, "blue: frozen · orange: trained", "small"),
    ]
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 860 330" role="img">'
        "<title>Task-Aware MoELoRA: the router reads the token's hidden state and the prompt's "
        "embedding, and weighs eight LoRA experts whose sum is added to the frozen layer</title>"
        f"<style>{STYLE}</style>"
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        'markerHeight="7" orient="auto"><path d="M0 0L8 4L0 8z" class="head"/></marker></defs>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def example() -> Extractions:
    """Two extractions written by hand: entities, a relation, an event, and a problem."""
    first = "Ariane 5, built by Arianespace, launched the James Webb telescope from Kourou in 2021."
    second = "Ada Lovelace met Charles Babbage in London."

    def span(words: str, within: str = first) -> Span:
        start = within.index(words)
        return Span(words, start, start + len(words))

    records: tuple[Record, ...] = (
        Entity("Launcher", span("Ariane 5"), 0.97),
        Entity("Organisation", span("Arianespace"), 0.94),
        Entity("Place", span("Kourou"), 0.91),
        Relation("built-by", span("Ariane 5"), span("Arianespace"), confidence=0.88),
        Event(
            "Launch",
            span("launched"),
            (
                Argument("vehicle", span("Ariane 5")),
                Argument("payload", span("James Webb telescope")),
                Argument("date", span("2021")),
            ),
            0.83,
        ),
    )
    people = (
        Entity("Person", span("Ada Lovelace", second), 0.99),
        Entity("Person", span("Charles Babbage", second), 0.98),
        Entity("Place", span("London", second), 0.95),
    )
    wrong = Problem("not_in_text", 'The text does not contain "Paris".', 'Place(span="Paris")')
    items = [Extraction(first, records, (), (), 0.4), Extraction(second, people, (wrong,), (), 0.4)]
    return Extractions(items, 0.8)


def screenshot(browser: str, page: Path, picture: Path, width: int, height: int) -> None:
    """Write what a headless browser shows of a page."""
    subprocess.run(
        [
            *(browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
            *(f"--window-size={width},{height}", f"--screenshot={picture}", page.as_uri()),
        ],
        check=True,
        capture_output=True,
        timeout=120,
    )


def draw_gates(adapter: str, picture: Path) -> None:
    """Draw the gates of an adapter for the four tasks of the demonstration's test documents."""
    import torch
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    from peft_taskmoe import heat_map, record_gates
    from peft_taskmoe.uie import build_example, load_format, read_jsonl

    model = AutoPeftModelForCausalLM.from_pretrained(adapter).eval()
    tokenizer, form = AutoTokenizer.from_pretrained(adapter), load_format(adapter)
    by_task: dict[str, list[str]] = {}
    for document in read_jsonl("examples/data/demo/test_seen.jsonl").documents:
        by_task.setdefault(document.task, []).append(build_example(document, format=form).prompt)
    with record_gates(model) as record, torch.no_grad():
        for task, prompts in by_task.items():
            for prompt in prompts[:3]:
                with record.task(task):
                    model(**tokenizer(prompt, return_tensors="pt"))
    heat_map(record).savefig(picture, dpi=70)


def draw_page(adapter: str, browser: str, picture: Path) -> None:
    """Ask the demonstration page its first question, and write what it shows."""
    from playwright.sync_api import sync_playwright

    from peft_taskmoe.page import page
    from peft_taskmoe.uie import Extractor
    from peft_taskmoe.uie.extraction.loading import load_centroids

    extractor = Extractor.from_pretrained(adapter, max_new_tokens=64)
    blocks = page(extractor, load_centroids(adapter))
    _, url, _ = blocks.launch(prevent_thread_lock=True, quiet=True, ssr_mode=False)
    with sync_playwright() as driver:
        window = driver.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        shown = window.new_page(viewport={"width": 1280, "height": 1150})
        shown.goto(url, timeout=90_000)
        shown.click("#extract", timeout=90_000)
        shown.wait_for_selector("#gates img", timeout=90_000)
        shown.screenshot(path=picture)
        window.close()
    blocks.close()


def main() -> None:
    """Draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--browser", help="A Chromium, for the page of extractions.")
    parser.add_argument("--adapter", help="What `make demo` trained, for the picture of its gates.")
    args = parser.parse_args()
    IMAGES.mkdir(exist_ok=True)
    (IMAGES / "method.svg").write_text(method_svg(), encoding="utf-8")
    if args.adapter:
        draw_gates(args.adapter, IMAGES / "gates.png")
    if args.browser:
        with tempfile.TemporaryDirectory() as folder:
            page = Path(folder) / "extractions.html"
            example().save_html(page)
            screenshot(args.browser, page, IMAGES / "extractions.png", 860, 500)
    if args.browser and args.adapter:
        draw_page(args.adapter, shutil.which(args.browser) or args.browser, IMAGES / "page.png")


if __name__ == "__main__":
    main()
