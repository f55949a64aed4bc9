"""A page of extractions as a browser reads it."""

from __future__ import annotations

from html.parser import HTMLParser

VOID = {"meta", "br", "img", "hr"}  # elements without an end


class Page(HTMLParser):
    """Reads a page as a browser does, as far as these tests look."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.open: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self.parts: list[tuple[str, int]] = []  # of the text: words, number of lines below
        self.marks: list[str] = []  # words of the tags in the text
        self.under_tags: list[tuple[str, int]] = []  # of a tag: words, lines that go on below it
        self.legend: list[str] = []
        self.styles = self.visible = ""
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        of = {name: value or "" for name, value in attrs}
        self.tags.append((tag, of))
        if tag not in VOID:
            self.open.append((tag, of))
        self.texts += [""] if of.get("class") == "text" else []
        if "tag" in of.get("class", "").split():
            if self.inside("text"):
                self.marks.append("")
                self.under_tags.append(("", self.open[-2][1].get("style", "").count("-gradient")))
            if self.inside("legend"):
                self.legend.append("")

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def inside(self, name: str) -> bool:
        return any(name in of.get("class", "").split() for _, of in self.open)

    def handle_data(self, data):
        if self.open and self.open[-1][0] == "style":
            self.styles += data
            return
        self.visible += data
        if self.inside("legend") and self.inside("tag"):
            self.legend[-1] += data
        if not self.inside("text"):
            return
        if self.inside("tag"):
            self.marks[-1] += data
            self.under_tags[-1] = (self.marks[-1], self.under_tags[-1][1])
            return
        self.texts[-1] += data
        self.parts.append((data, self.open[-1][1].get("style", "").count("-gradient")))

    @property
    def ids(self) -> list[str]:
        return [of["id"] for _, of in self.tags if of.get("id")]

    def links(self) -> list[str]:
        return [of["href"].removeprefix("#") for tag, of in self.tags if tag == "a"]

    @property
    def fetched(self) -> list[str]:
        """Addresses outside of the page, and elements that run or load something."""
        addresses = [of[name] for _, of in self.tags for name in ("src", "href") if of.get(name)]
        elements = [tag for tag, _ in self.tags if tag in ("script", "iframe", "link", "object")]
        return elements + [x for x in addresses if not x.startswith(("data:image/png", "#"))]
