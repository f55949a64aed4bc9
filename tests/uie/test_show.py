"""Extractions for the eye: what a browser makes of the page, and what reaches a terminal."""

from __future__ import annotations

import io
import re
import sys
from types import ModuleType

import pytest
from rich.console import Console

from html_page import Page
from peft_taskmoe.uie import (
    Argument,
    Entity,
    Event,
    Extraction,
    Extractions,
    Problem,
    Relation,
    Span,
    read_jsonl,
)
from peft_taskmoe.uie.tables import Table
from peft_taskmoe.uie.view import tables_to_html, to_html, to_page
from peft_taskmoe.uie.view.layout import COLOURS

ALLOWED = {
    *("html", "head", "meta", "title", "body", "style", "section", "div", "span", "table"),
    *("tbody", "tr", "td", "a", "b", "bdi", "br", "code", "ul", "li", "p"),
}


def extraction(text: str, *records, problems=()) -> Extraction:
    return Extraction(text, records, tuple(problems), (), 0.1)


def span(text: str, words: str, at: int = 0) -> Span:
    start = text.index(words, at)
    return Span(words, start, start + len(words))


TEXT = "The New York Times said Ada met Bob in Paris."
ADA, PARIS = span(TEXT, "Ada"), span(TEXT, "Paris")
RECORDS = (
    Entity("paper", span(TEXT, "New York Times"), 0.9),
    Entity("place", span(TEXT, "New York")),
    Entity("odd", span(TEXT, "York Times said")),
    Relation("met", ADA, span(TEXT, "Bob"), confidence=0.5),
    Event("Meet", span(TEXT, "met"), (Argument("who", ADA), Argument("where", PARIS))),
)


def test_nested_and_overlapping_mentions_are_all_underlined_and_the_text_is_whole():
    page = Page(to_page([extraction(TEXT, *RECORDS)]))
    assert page.texts == [TEXT]
    words, lines = ("The ", "New ", "York", " Times", " said", " "), (0, 2, 3, 2, 1, 0)
    assert page.parts[:6] == list(zip(words, lines, strict=True))
    words, lines = ("Ada", " ", "met", " ", "Bob", " in ", "Paris", "."), (2, 0, 1, 0, 1, 0, 1, 0)
    assert page.parts[6:] == list(zip(words, lines, strict=True))
    assert page.marks[:3] == ["place", "paper", "odd"]


def test_relations_and_events_are_listed_and_linked_to_their_mentions():
    page = Page(to_page([extraction(TEXT, *RECORDS)]))
    assert set(page.links()) <= set(page.ids)
    assert sum("m" in link[-3:] for link in page.links()) == 5  # from the rows to the mentions
    assert sum(link.endswith(("R1", "E1")) for link in page.links()) == 5  # and back
    assert {"met: head R1", "met: tail R1", "Meet E1", "who E1", "where E1"} <= set(page.marks)
    assert "0.50" in page.visible and "Ada → Bob" in page.visible
    for name in ("R1", "E1"):  # pointing at one marks all that belongs to it
        assert f".uie section:has(.{name}:hover) .{name}" in page.styles
        assert sum(name in of.get("class", "").split() for _, of in page.tags) >= 5


def test_a_label_has_one_colour_on_the_whole_page_and_stands_in_the_legend():
    other = extraction("Paris", Entity("place", Span("Paris", 0, 5)))
    page = Page(to_html([other, extraction(TEXT, *RECORDS), other]))
    assert page.legend == ["place", "paper", "odd", "met", "Meet"]
    (place,) = {of["style"] for tag, of in page.tags if of.get("title", "").startswith("[0:5]")}
    (inner,) = {of["style"] for tag, of in page.tags if of.get("title", "").startswith("[4:12]")}
    assert place == inner == "background:var(--l0);color:var(--i0)"
    many = [Entity(f"l{i}", Span("Paris", 0, 5)) for i in range(200)]
    page = Page(to_html([extraction("Paris", *many)]))
    assert len(set(re.findall(r"--l\d+:(#\w{6});", page.styles.split("@media")[0]))) == 200


def test_lines_go_on_below_the_tags_of_inner_mentions():
    page = Page(to_html([extraction(TEXT, *RECORDS[:3])]))
    assert page.under_tags == [("place", 2), ("paper", 1), ("odd", 0)]


def test_lines_of_text_leave_room_for_the_underlines():
    """Nested mentions need more of it; what is reserved is what the deepest of them takes."""
    text = "abcdefghij"
    for deep, lines in ((1, 1), (3, 3), (8, 8), (10, 8)):
        records = [Entity(f"l{i}", Span(text[: i + 1], 0, i + 1)) for i in range(deep)]
        html = to_html([extraction(text, *records)])
        assert re.findall(r"line-height:calc\(1\.7em \+ (\d+)px\)", html) == [str(4 * lines)]
        assert set(re.findall(r"[^l]padding-bottom:(\d+)px\">[a-j]", html)) == {str(4 * lines)}
        assert ("2 mentions lie deeper than 8 lines" in html) == (deep == 10)
        assert html.count('title="[0:') == deep  # every one has a tag


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_words_can_be_read_on_every_colour(theme):
    def luminance(colour: str) -> float:
        digits = colour[1:] if len(colour) == 7 else "".join(c * 2 for c in colour[1:])
        shares = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in shares]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(*pair: str) -> float:
        low, high = sorted(map(luminance, pair))
        return (high + 0.05) / (low + 0.05)

    text = "abcdefghijklmnopqrst"
    records = [Entity(c, Span(c, i, i + 1)) for i, c in enumerate(text)]
    light, dark = Page(to_html([extraction(text, *records)])).styles.split("@media screen")
    style = {"light": light, "dark": dark.split("}")[0]}[theme]
    pairs = re.findall(r"--l\d+:(#\w+);--i\d+:(#\w+);", style)
    assert len(pairs) == 20 and (theme == "dark" or [line for line, _ in pairs][:12] == [*COLOURS])
    assert all(contrast(*pair) >= 4.5 for pair in pairs)  # WCAG AA
    (paper, words) = re.findall(r"--bg:(#\w+);--fg:(#\w+)", style)[0]
    assert contrast(paper, words) >= 7
    assert all(contrast(paper, line) >= 1.8 for line, _ in pairs)


@pytest.mark.parametrize("shape", ["relations", "one head", "nested", "tags"])
def test_large_extractions_grow_linearly(shape):
    """Twice the records, about twice the page; 4,000 nested mentions were 629 MB."""

    def size(n: int) -> int:
        text = "ab " * n
        spans = [Span("ab", 3 * i, 3 * i + 2) for i in range(n)]
        whole = Span(text, 0, len(text))
        records = {
            "relations": lambda i: Relation("r", spans[i], spans[7 * i % n]),
            "one head": lambda i: Relation("r", whole, spans[i]),
            "nested": lambda i: Entity("e", Span(text[i:-i], i, 3 * n - i)),
            "tags": lambda i: Entity(f"label {i}", spans[0]),
        }[shape]
        return len(to_html([extraction(text, *map(records, range(1, n)))]))

    assert size(800) < 2.3 * size(400)


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


ANY = ["שלום עולם", "a\r\nb\tc", "nul\x00 esc\x1b[31m \x9b bell\x07", "half \ud83d pair"]


@pytest.mark.parametrize("text", [*ANY, "🚀é\u0301", ""])
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
    cut, gone = Problem("truncated", "The list is not closed.", "[A("), Problem("repeated", "x", "")
    visible = Page(to_html([extraction("text", problems=[cut, gone])])).visible
    assert "2 problems" in visible and "truncated: The list is not closed. [A(" in visible
    visible = Page(to_html([extraction("text", problems=[cut])])).visible
    assert "1 problem" in visible and "problems" not in visible


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


@pytest.mark.parametrize("encoding", ["cp1252", "cp850", "ascii", "utf-8"])
def test_a_terminal_of_any_code_page_is_written_to(encoding):
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="")
    relation = Relation("met 🚀", Span("Ада", 0, 3), Span("東京", 4, 6))
    extraction("Ада 東京", relation).show(Console(file=file, width=80))
    file.flush()
    shown = file.buffer.getvalue().decode(encoding)
    assert shown.startswith("Ада 東京" if encoding == "utf-8" else "??? ??")


def test_mentions_outside_the_text_are_listed_and_not_marked():
    records = [Entity("a", Span("x", *place)) for place in ((-3, -1), (2, 2), (1, 99))]
    page = Page(to_html([extraction("text", *records)]))
    assert page.texts == ["text"] and page.marks == [] and page.visible.count("x (a)") == 3


def test_tables_of_a_report_in_a_notebook():
    table = Table(HOSTILE, ["name", "F1"], [[HOSTILE, "50.0"]])
    page = Page(tables_to_html([table], [HOSTILE]))
    assert {tag for tag, _ in page.tags} == {"table", "caption", "tr", "th", "td", "p"}
    assert page.visible.count(HOSTILE) == 3 and "50.0" in page.visible


def test_what_a_reader_found_is_short_where_python_shows_it(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("<b>\n" * 25, encoding="utf-8")
    report = read_jsonl(path, on_error="collect")
    assert repr(report) == "ReadReport(0 documents, 25 problems: 25 json)"
    page = Page(report._repr_html_())
    assert sum(tag == "tr" for tag, _ in page.tags) == 21
    assert "5 more problems are not shown." in page.visible


def test_in_a_notebook_a_console_shows_the_page_of_the_extractions(monkeypatch):
    shown = []
    display = ModuleType("IPython.display")
    display.HTML, display.display = (lambda page: page), shown.append
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    item = extraction(TEXT, *RECORDS)
    item.show(Console(file=io.StringIO(), force_jupyter=True))
    assert shown == [to_html([item])]
