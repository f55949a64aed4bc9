"""Extractions for the eye: what a browser makes of the page, and what reaches a terminal."""

from __future__ import annotations

import io
import json
import re
from html.parser import HTMLParser

import pytest
from rich.console import Console

from peft_taskmoe.uie import (
    Argument,
    Entity,
    Event,
    Extraction,
    Extractions,
    Problem,
    Relation,
    Span,
)
from peft_taskmoe.uie.show import COLOURS, to_html, to_page

ALLOWED = {
    "html", "head", "meta", "title", "body", "style", "section", "div", "span", "table", "tbody", "tr", "td",
    "a", "b", "bdi", "br", "code", "details", "summary", "ul", "li", "p",
}  # fmt: skip
VOID = {"meta", "br"}


class Page(HTMLParser):
    """Reads a page as a browser does, as far as these tests look."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.parts: list[tuple[str, int]] = []  # of the text: words, number of underlines
        self.marks: list[str] = []  # words of the tags in the text
        self.under_tags: list[
            tuple[str, int]
        ] = []  # of a tag: words, number of underlines that go on below it
        self.styles = ""
        self.visible = ""
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append((tag, dict(attrs)))
        if dict(attrs).get("class") == "text":
            self.texts.append("")

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        classes = [(attrs.get("class") or "").split() for _, attrs in self.open]
        if self.open and self.open[-1][0] == "style":
            self.styles += data
            return
        self.visible += data
        if not any("text" in names for names in classes):
            return
        if "tag" in classes[-1]:
            self.marks.append(data)
            self.under_tags.append(
                (data, str(self.open[-2][1].get("style")).count("linear-gradient"))
            )
            return
        self.texts[-1] += data
        style = self.open[-1][1].get("style") or ""
        self.parts.append((data, style.count("linear-gradient")))

    @property
    def ids(self) -> list[str]:
        return [attrs["id"] for _, attrs in self.tags if attrs.get("id")]


def extraction(text: str, *records, problems=()) -> Extraction:
    return Extraction(text, records, tuple(problems), (), 0.1)


def span(text: str, words: str, at: int = 0) -> Span:
    start = text.index(words, at)
    return Span(words, start, start + len(words))


TEXT = "The New York Times said Ada met Bob in Paris."
RECORDS = (
    Entity("paper", span(TEXT, "New York Times"), 0.9),
    Entity("place", span(TEXT, "New York")),
    Entity("odd", span(TEXT, "York Times said")),
    Relation("met", span(TEXT, "Ada"), span(TEXT, "Bob"), confidence=0.5),
    Event(
        "Meet",
        span(TEXT, "met"),
        (Argument("who", span(TEXT, "Ada")), Argument("where", span(TEXT, "Paris"))),
    ),
)


def test_nested_and_overlapping_mentions_are_all_underlined_and_the_text_is_whole():
    page = Page(to_page([extraction(TEXT, *RECORDS)]))
    assert page.texts == [TEXT]
    assert page.parts == [
        ("The ", 0), ("New ", 2), ("York", 3), (" Times", 2), (" said", 1), (" ", 0), ("Ada", 2), (" ", 0),
        ("met", 1), (" ", 0), ("Bob", 1), (" in ", 0), ("Paris", 1), (".", 0),
    ]  # fmt: skip
    assert page.marks[:3] == ["place", "paper", "odd"]


def test_relations_and_events_are_listed_and_linked_to_their_mentions():
    html = to_page([extraction(TEXT, *RECORDS)])
    page = Page(html)
    links = [attrs["href"].removeprefix("#") for tag, attrs in page.tags if tag == "a"]
    assert len(links) == 5 and set(links) <= set(page.ids)
    assert {"met: head R1", "met: tail R1", "Meet E1", "who E1", "where E1"} <= set(page.marks)
    assert "0.50" in page.visible and "Ada → Bob" in page.visible
    (section,) = [i for i in page.ids if "m" not in i]
    for name in ("R1", "E1"):  # pointing at one marks all that belongs to it
        assert f"#{section}:has(.{name}:hover) .{name}{{" in page.styles
        assert sum(name in (attrs.get("class") or "").split() for _, attrs in page.tags) >= 5


def test_the_legend_names_every_label_in_its_colour():
    page = Page(to_html([extraction(TEXT, *RECORDS)]))
    legend = page.visible[page.visible.rindex("0.50") :] if "0.50" in page.visible else page.visible
    for label in ("paper", "place", "odd", "met", "Meet"):
        assert label in legend
    colours = {attrs["style"] for _, attrs in page.tags if attrs.get("class") == "tag"}
    assert len(colours) == 5


def test_lines_go_on_below_the_tags_of_inner_mentions():
    page = Page(to_html([extraction(TEXT, *RECORDS[:3])]))
    assert [(words, lines) for words, lines in page.under_tags] == [
        ("place", 2),
        ("paper", 1),
        ("odd", 0),
    ]


def test_lines_of_text_leave_room_for_the_underlines():
    """Nested mentions need more of it; what is reserved is what the deepest of them takes."""
    text = "abcdefgh"
    for levels in (1, 3, 8):
        records = [Entity(f"l{i}", Span(text[: i + 1], 0, i + 1)) for i in range(levels)]
        html = to_html([extraction(text, *records)])
        (room,) = re.findall(r"line-height:calc\(1\.7em \+ (\d+)px\)", html)
        assert (
            set(re.findall(r"[^l]padding-bottom:(\d+)px\">[a-h]", html))
            == {room}
            == {str(4 * levels)}
        )


def test_words_can_be_read_on_every_colour():
    def luminance(colour: str) -> float:
        shares = [
            int(colour[i] * 2 if len(colour) == 4 else colour[2 * i - 1 : 2 * i + 1], 16) / 255
            for i in (1, 2, 3)
        ]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in shares]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    text = "abcdefghijkl"
    html = to_html([extraction(text, *(Entity(c, Span(c, i, i + 1)) for i, c in enumerate(text)))])
    pairs = set(re.findall(r'style="background:(#\w+);color:(#\w+)', html))
    assert {background for background, _ in pairs} == set(COLOURS)
    for pair in pairs:
        low, high = sorted(map(luminance, pair))
        assert (high + 0.05) / (low + 0.05) >= 4.5  # WCAG AA


def test_tags_say_where_their_mention_is_and_how_sure():
    page = Page(to_html([extraction(TEXT, *RECORDS)]))
    titles = [attrs["title"] for _, attrs in page.tags if attrs.get("title")]
    assert "[4:18] 0.90" in titles and "[4:12]" in titles and len(titles) == len(page.marks)


HOSTILE = (
    "<script>alert(1)</script>\"><img src=x onerror=alert(2)> '&amp; </div></style> javascript:x"
)


def test_hostile_texts_labels_and_answers_are_words():
    record = Entity(HOSTILE, span(HOSTILE, "alert(1)"))
    event = Event(HOSTILE, span(HOSTILE, "img"), (Argument(HOSTILE, span(HOSTILE, "src=x")),))
    problems = [Problem("malformed", HOSTILE, HOSTILE)]
    lost = Entity(HOSTILE, Span(HOSTILE, alignment="not_found"))
    html = to_page([extraction(HOSTILE, record, event, lost, problems=problems)])
    page = Page(html)
    assert {tag for tag, _ in page.tags} <= ALLOWED
    assert page.texts == [HOSTILE]
    assert "alert" not in page.styles
    for _, attrs in page.tags:
        assert not any(name.startswith("on") or name == "src" for name in attrs)
        assert (attrs.get("href") or "#").startswith("#")
    assert page.visible.count(HOSTILE) >= 5


def test_the_page_needs_nothing_else():
    html = to_page([extraction(TEXT, *RECORDS)])
    assert "default-src 'none'" in html and 'charset="utf-8"' in html
    assert not re.search(r"https?:|url\(|@import|<link|<script", html)


@pytest.mark.parametrize(
    "text",
    [
        "שלום עולם",
        "a\r\nb\tc",
        "nul\x00 esc\x1b[31m \x9b bell\x07",
        "half \ud83d pair",
        "🚀é\u0301",
        "",
    ],
)
def test_any_text_can_be_written(tmp_path, text):
    records = [Entity("word", Span(text, 0, len(text)))] if text else []
    Extractions([extraction(text, *records)], 0.0).save_html(tmp_path / "page.html")
    page = Page((tmp_path / "page.html").read_bytes().decode("utf-8"))
    (shown,) = page.texts
    assert len(shown) == len(text)
    kept = [(a, b) for a, b in zip(text, shown, strict=True) if a != b]
    assert all(ord(a) < 0x20 or 0x7F <= ord(a) < 0xA0 or 0xD800 <= ord(a) < 0xE000 for a, b in kept)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", shown)
    assert ("dir", "auto") in [(n, v) for _, attrs in page.tags for n, v in attrs.items()]


def test_problems_are_listed():
    problems = [
        Problem("truncated", "The list is not closed.", "[A("),
        Problem("not_in_text", "gone", "x"),
    ]
    page = Page(to_html([extraction("text", problems=problems)]))
    assert "2 problems" in page.visible
    assert "truncated: The list is not closed. [A(" in page.visible
    assert "1 problem" in (
        visible := Page(to_html([extraction("text", problems=problems[:1])])).visible
    )
    assert "problems" not in visible


def test_in_a_notebook_the_first_texts_are_shown_and_ids_differ():
    items = [extraction(TEXT, *RECORDS) for _ in range(25)]
    html = Extractions(items, 1.0)._repr_html_()
    page = Page(html)
    assert len(page.texts) == 20 and "5 more texts are not shown here" in page.visible
    assert len(set(page.ids)) == len(page.ids)
    assert Page(items[0]._repr_html_()).texts == [TEXT]
    assert to_page(items[:2]) == to_page(items[:2])


def test_save_html_of_one_and_of_all(tmp_path):
    items = [extraction(TEXT, *RECORDS), extraction("other")]
    items[0].save_html(tmp_path / "one.html")
    Extractions(items, 1.0).save_html(tmp_path / "all.html")
    assert Page((tmp_path / "one.html").read_text("utf-8")).texts == [TEXT]
    assert Page((tmp_path / "all.html").read_text("utf-8")).texts == [TEXT, "other"]


def printed(item, **options) -> str:
    out = io.StringIO()
    item.show(Console(file=out, width=200, **options))
    return out.getvalue()


def test_in_a_terminal_records_and_problems_are_printed():
    problems = [Problem("repeated", "said twice", "A()")]
    out = printed(extraction(TEXT, *RECORDS, problems=problems))
    assert out.startswith(TEXT)
    assert "paper  New York Times [4:18]  0.90" in out
    assert "R1 met  Ada [24:27] → Bob [32:35]  0.50" in out
    assert "E1 Meet  met [28:31]; who: Ada [24:27]; where: Paris [39:44]" in out
    assert "repeated: said twice A()" in out
    coloured = printed(extraction(TEXT, *RECORDS), force_terminal=True, color_system="truecolor")
    assert re.search("\x1b\\[[^m]*4[^m]*mNew ", coloured)  # underlined where the mention begins
    both = printed(Extractions([extraction("one"), extraction("two")], 0.0))
    assert both.split() == ["one", "two"]


def test_a_terminal_gets_no_commands_from_a_text():
    text = "a\x1b]0;owned\x07b [bold]c[/bold]\x00\r"
    out = printed(extraction(text, Entity("l\x1bl", Span("b", 11, 12))))
    assert not re.search("[\x00-\x09\x0b-\x1f]", out)
    assert "[bold]c[/bold]" in out
    json.dumps(out)
