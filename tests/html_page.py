"""Reads an HTML page the way a browser would, as far as tests ask."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"img", "meta", "br"}


@dataclass
class Element:
    name: str
    attributes: dict[str, str | None]
    parent: Element | None = None
    children: list[Element | str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(child if isinstance(child, str) else child.text for child in self.children)

    def find(self, name: str, **attributes: str) -> list[Element]:
        """Return all elements of a name beneath this one, in their order."""
        found = []
        for child in self.children:
            if isinstance(child, Element):
                wanted = {key.rstrip("_"): value for key, value in attributes.items()}
                if child.name == name and wanted.items() <= child.attributes.items():
                    found.append(child)
                found += child.find(name, **attributes)
        return found

    def walk(self) -> list[Element]:
        return [e for child in self.children if isinstance(child, Element) for e in (child, *child.walk())]


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.root = self.at = Element("", {})

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(set(names)) == len(names), (tag, attrs)
        element = Element(tag, dict(attrs), self.at)
        self.at.children.append(element)
        if tag not in VOID:
            self.at = element

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.at.name == tag, f"</{tag}> closes <{self.at.name}>"
        assert self.at.parent is not None
        self.at = self.at.parent

    def handle_data(self, data: str) -> None:
        self.at.children.append(data)


def read_page(text: str) -> Element:
    """Return the root of a page; every element must be closed in its turn."""
    reader = _Reader()
    reader.feed(text)
    reader.close()
    assert reader.at is reader.root, f"<{reader.at.name}> stays open"
    return reader.root


def assert_sound(root: Element) -> None:
    """Check what holds for every report: nothing from elsewhere, no script, a text for every picture."""
    elements = root.walk()
    ids = [e.attributes["id"] for e in elements if "id" in e.attributes]
    assert len(set(ids)) == len(ids)
    for e in elements:
        assert e.name not in {"script", "iframe", "object", "embed", "link", "base", "form", "image"}, e
        for key, value in e.attributes.items():
            assert not key.startswith("on"), (e.name, key)
            if key in {"src", "href", "xlink:href"}:
                assert value is not None
                assert value.startswith(("#", "data:image/png;base64,")), value
                assert not value.startswith("#") or value[1:] in ids, value
            assert "url(" not in (value or "") or key in {"style", "clip-path"}
            for part in (value or "").split("url(")[1:]:
                assert part.startswith("#"), value
                assert part[1 : part.index(")")] in ids
        if e.name == "svg":
            assert e.attributes["role"] == "img"
            title, described = (e.find(name)[0] for name in ("title", "desc"))
            assert e.attributes["aria-labelledby"] == title.attributes["id"]
            assert e.attributes["aria-describedby"] == described.attributes["id"]
            assert len(title.text) > 5
            assert len(described.text) > 20
        if e.name == "img":
            assert len(e.attributes["alt"] or "") > 10
        if e.name == "figure":
            assert e.find("figcaption")[0].text
            assert e.find("svg") or e.find("img")
        if e.name == "table":
            assert e.find("caption")[0].text
            widths = {len(row.find("th")) + len(row.find("td")) for row in e.find("tr")}
            assert len(widths) == 1
    (style,) = root.find("style")
    assert "url(" not in style.text
    assert "@import" not in style.text
    (policy,) = root.find("meta", **{"http-equiv": "Content-Security-Policy"})
    assert policy.attributes["content"] == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    assert [e.attributes.get("name") for e in root.find("meta")].count("viewport") == 1
