"""HTML in which no text of a file can become markup: every string is escaped unless it was made here."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bench.report.style import CSS

# No script, and nothing from elsewhere, whatever a text of the report says.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_VOID = {"img", "meta", "br"}
# Neither XML nor UTF-8 holds them.
_ILLEGIBLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")


class Html(str):
    """Markup, not to be escaped again."""


Content = str | int | None | Iterable["Content"]


@dataclass(frozen=True)
class Section:
    """A part of the page, with its title in the table of contents; without `body` it is left out."""

    title: str
    body: Html


def tag(name: str, *children: Content, **attributes: str | int | None) -> Html:
    """Return an element; texts are escaped, `None` is left out, iterables are taken apart.

    Args:
        name: of the element.
        children: its contents.
        attributes: without the `_` that tells `class_` from Python's own words; others become hyphens.
    """
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{_escaped(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{name}{given}>" if name in _VOID else f"<{name}{given}>{join(*children)}</{name}>")


def join(*children: Content) -> Html:
    """Return the contents of an element, in which only `Html` is markup."""
    return Html("".join(_markup(child) for child in children))


def paragraph(*children: Content) -> Html:
    """Return a paragraph of notes."""
    return tag("p", *children, class_="note")


def code(text: str) -> Html:
    """Return a line that a person copies."""
    return tag("pre", tag("code", text), tabindex=0)


def missing(reason: str, remedy: str) -> Html:
    """Return what stands where there is nothing to show: why, and the command that fills it."""
    return join(paragraph(reason), code(remedy))


def figure(picture: Html, caption: Content) -> Html:
    """Return a picture, which has its text alternative, over its caption."""
    return tag("figure", picture, tag("figcaption", caption))


def table(
    caption: str, header: Sequence[Content], rows: Iterable[Sequence[Content]], *, align: str, class_: str = ""
) -> Html:
    """Return a table that scrolls in a box of its own where it is wider than the screen.

    Args:
        caption: what it shows.
        header: of the columns.
        rows: the first cell of each names it.
        align: one letter a column, l or r.
        class_: of the table.
    """
    kinds = {"l": None, "r": "number"}
    head = tag(
        "tr", (tag("th", cell, scope="col", class_=kinds[a]) for cell, a in zip(header, align, strict=True))
    )
    body = (
        tag("tr", tag("th", first, scope="row", class_=kinds[align[0]]),
            (tag("td", cell, class_=kinds[a]) for cell, a in zip(rest, align[1:], strict=True)))
        for first, *rest in rows
    )  # fmt: skip
    contents = tag("caption", caption), tag("thead", head), tag("tbody", body)
    contents_table = tag("table", *contents, class_=class_ or None)
    return tag("div", contents_table, class_="wide", role="region", aria_label=caption, tabindex=0)


def folded(summary: str, *children: Content) -> Html:
    """Return contents that open on a click, and are open on paper."""
    return tag("details", tag("summary", summary), *children)


def document(title: str, lead: Content, sections: Iterable[Section | None]) -> str:
    """Return the page.

    Args:
        title: of the page.
        lead: beneath the title.
        sections: in their order; None and those without a body are left out.
    """
    shown = [section for section in sections if section is not None and section.body]
    links = (tag("a", section.title, href=f"#{_anchor(section.title)}") for section in shown)
    body = join(
        tag("header", tag("h1", title), tag("p", lead, class_="lead"), tag("nav", links, aria_label="Contents")),
        tag("main", (
            tag("section", tag("h2", section.title), section.body, id=_anchor(section.title)) for section in shown
        )),
    )  # fmt: skip
    head = join(
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name_="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", Html(CSS)),
    )
    return f"<!DOCTYPE html>\n{tag('html', tag('head', head), tag('body', body), lang='en')}\n"


def legible(text: str) -> str:
    """Return a text with what no file can hold replaced."""
    return _ILLEGIBLE.sub("\ufffd", text)


def _escaped(text: str) -> str:
    return html.escape(legible(text))


def _markup(child: Content) -> str:
    if child is None:
        return ""
    if isinstance(child, Html):
        return child
    if isinstance(child, str | int):
        return _escaped(str(child))
    return join(*child)


def _anchor(title: str) -> str:
    return re.sub(r"\W+", "-", title.lower()).strip("-")
