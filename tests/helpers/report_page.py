"""A report's page as a browser takes it apart, with the checks that every page must pass."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path

from plpp_reg.prompts.recorded import PromptReader
from plpp_reg.results import report

VOID = {"meta", "link", "br", "img", "input", "wbr", "hr"}


class Page(HTMLParser):
    """Elements of a page, in order: (tag, attributes, text below it); an element that is not closed is an error."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.feed(html)
        self.close()
        assert not self.open, [tag for tag, _, _ in self.open]

    def handle_starttag(self, tag, attrs):
        element = (tag, dict(attrs), [])
        self.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), []))

    def handle_endtag(self, tag):
        assert self.open[-1][0] == tag, (self.open[-1], tag)
        self.open.pop()

    def handle_data(self, data):
        for _, _, text in self.open:
            text.append(data)

    def of(self, tag: str, **attributes: str) -> list[tuple[dict[str, str | None], str]]:
        wanted = {name.rstrip("_"): value for name, value in attributes.items()}
        return [(a, "".join(t)) for name, a, t in self.elements if name == tag and wanted.items() <= a.items()]

    @property
    def text(self) -> str:
        return "".join(self.elements[0][2])


def check_page(html: str, folder: Path) -> Page:
    """What holds of every page: nothing from outside, our script alone, ids once, links that lead somewhere, alt texts."""
    page = Page(html)
    tags = {tag for tag, _, _ in page.elements}
    assert not tags & {"iframe", "link", "object", "embed", "base", "form", "foreignobject", "image", "a:b"}
    ids = [a["id"] for _, a, _ in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    for tag, attributes, _ in page.elements:
        assert not [name for name in attributes if name.startswith("on")], attributes
        if tag == "img":
            assert attributes.keys() == {"src", "alt"} and attributes["alt"], attributes
            assert re.fullmatch(r"data:image/jpeg;base64,[A-Za-z0-9+/=]+", attributes["src"])
        for name in ("srcset", *(("src",) if tag != "img" else ()), "action", "data", "poster", "background"):
            assert name not in attributes, (tag, attributes)
        for name in ("href", "xlink:href"):
            if name in attributes:
                place = attributes[name]
                there = place[1:] in ids if place.startswith("#") else (folder / place).is_file()
                assert there and "//" not in place and ":" not in place, place
        for value in attributes.values():
            assert all(place.startswith("#") for place in re.findall(r"url\(([^)]*)", value or "")), value
        if tag == "th":
            assert attributes["scope"] in ("col", "row", "rowgroup")
        if attributes.get("role") in ("img", "region"):
            assert attributes["aria-label"]
    (style,) = page.of("style")
    assert "url(" not in style[1] and "@import" not in style[1] and "prefers-color-scheme: dark" in style[1]
    assert len(page.of("div", role="img")) == len(page.of("figure")) == html.count("<svg ")
    (policy,) = page.of("meta", http_equiv="") or page.of("meta", **{"http-equiv": "Content-Security-Policy"})
    ((attributes, script),) = page.of("script")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert not attributes and policy[0]["content"] == (
        f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"
    )
    return page


def report_of(folder: Path, **options) -> Page:
    path = report.write_report(folder, say=lambda line: None, reader=PromptReader, **options)
    return check_page(path.read_text(encoding="utf-8"), path.parent)
