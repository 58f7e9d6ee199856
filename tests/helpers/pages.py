"""What the tests ask of every page."""

import re
from collections import Counter
from html.parser import HTMLParser

VOID = {"meta", "input", "img", "br", "link", "hr"}


class Page(HTMLParser):
    """What the tests ask of a page; tags that do not match fail at once."""

    def __init__(self, text: str):
        super().__init__()
        self.source = text
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags[tag] += 1
        self.attributes.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("script", "style"):
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.words))

    def values(self, name: str) -> list[str]:
        return [attrs[name] or "" for _, attrs in self.attributes if name in attrs]


def check(page: Page) -> None:
    """What holds for every page."""
    without_data = re.sub(r"base64,[A-Za-z0-9+/=]+", "", page.source)
    assert not re.search(r"//[a-z0-9]|@import|xmlns", without_data)
    assert all(value.startswith(("#", "data:image/")) for name in ("src", "href") for value in page.values(name))
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    targets = [v[1:] for v in page.values("href") if v[0] == "#"]
    targets += [v for name in ("aria-labelledby", "for") for v in page.values(name)]
    targets += re.findall(r"url\(#([^)]+)\)", page.source)
    assert set(targets) <= set(ids)
    # No number that is none; NAN() is a detector.
    assert not re.search(r"\bnan(?!\(\))", page.text.lower())
    assert not re.search(r"\bnan\b", "".join(page.values("d") + page.values("x") + page.values("y")))
    for tag, attrs in page.attributes:
        if tag == "img":
            assert attrs["alt"]
        if tag == "svg":
            assert attrs.get("aria-hidden") == "true" or attrs["aria-label"]
    assert page.tags["table"] == page.tags["caption"]
    assert page.tags["h1"] == 1
