"""The report's page: one HTML file without a script, a font or a link to anywhere.

A section is a list of blocks; ``report.html.jinja`` makes HTML of them, and escapes every text.
"""

from __future__ import annotations

import base64
import functools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from statex_dist.evaluation.page.figures import Figure


@dataclass(frozen=True, kw_only=True, slots=True)
class PageBlock:
    """A piece of a section.

    Attributes:
        kind: ``heading``, ``paragraph``, ``table``, ``figures``, ``details`` or ``pre``.
        text: Its text, or the caption or title.
        strong: Words in bold before a paragraph.
        lines: The head of a table, then its rows; each row's first cell is its name.
        drawn: The figures: their SVG in base64, and their words.
        inside: The blocks that details show when they are opened.
    """

    kind: str
    text: str = ""
    strong: str = ""
    lines: Sequence[Sequence[str]] = ()
    drawn: Sequence[tuple[str, str]] = ()
    inside: Sequence[PageBlock] = ()


Blocks = list[PageBlock]


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """A part of the page.

    Attributes:
        title: Its heading; empty for none.
        body: What it shows.
    """

    title: str
    body: Blocks

    @property
    def anchor(self) -> str:
        """What links to it are called."""
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")


def make_html(title: str, sections: Sequence[Section], *, lead: Sequence[PageBlock] = ()) -> str:
    """Return the page; from two headings on, with links to them at its top.

    Args:
        title: Its name.
        sections: Its parts.
        lead: What stands below the title.
    """
    named = [section for section in sections if section.title]
    return _template().render(title=title, sections=sections, lead=lead, links=named if len(named) > 1 else [])


@functools.cache
def _template() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("statex_dist.evaluation.page", package_path="")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("report.html.jinja")


def heading(text: str) -> Blocks:
    """Return a heading inside a section."""
    return [PageBlock(kind="heading", text=text)]


def paragraph(text: str, *, strong: str = "") -> Blocks:
    """Return a paragraph, with some words in bold before it."""
    return [PageBlock(kind="paragraph", text=text, strong=strong)]


def table(lines: Sequence[Sequence[str]], *, caption: str = "") -> Blocks:
    """Return a table in a box of its own, which scrolls where the page is too narrow for it."""
    return [PageBlock(kind="table", text=caption, lines=lines)]


def figures(drawn: Iterable[Figure]) -> Blocks:
    """Return drawings beside and below each other; nothing where there is none."""
    # Images of their own: inlined, the figures' elements would share their ids.
    found = [(base64.b64encode(figure.svg.encode()).decode(), figure.text) for figure in drawn]
    return [PageBlock(kind="figures", drawn=found)] if found else []


def details(title: str, body: Sequence[PageBlock]) -> Blocks:
    """Return what is shown when its title is opened."""
    return [PageBlock(kind="details", text=title, inside=body)]


def preformatted(text: str) -> Blocks:
    """Return a text as it is."""
    return [PageBlock(kind="pre", text=text)]
