"""The report's page: one HTML file without a script, a font or a link to anywhere.

Every text that is not ours is escaped here, and nowhere else.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from string import Template

from statex_dist.evaluation.page.figures import Figure

_PAGE = Template(
    """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><title>$title</title><style>
:root { color-scheme: light dark;
  --ground: #fbfbfc; --card: #fff; --ink: #1d1d21; --faint: #5f5f68; --line: #dcdce2; --link: #0a5f98 }
@media (prefers-color-scheme: dark) {
  :root { --ground: #141417; --card: #1c1c20; --ink: #ececf0; --faint: #b4b4bf; --line: #3a3a42; --link: #7cc8f4 }
}
* { box-sizing: border-box }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--ground); overflow-wrap: anywhere;
  max-width: 84rem; margin: 0 auto; padding: 1rem }
h1 { font-size: 1.7rem; line-height: 1.25; margin: .5rem 0 } h2 { font-size: 1.3rem; margin: 2.5rem 0 .5rem }
h3 { font-size: 1.05rem; margin: 1.5rem 0 .25rem }
p { margin: .5rem 0; max-width: 70ch } a { color: var(--link) } .faint { color: var(--faint) }
nav ul { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; padding: 0; margin: .75rem 0; list-style: none }
.figures { display: grid; align-items: start; gap: 1rem; margin: 1rem 0;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr)) }
figure { margin: 0; padding: .5rem; background: var(--card); border: 1px solid var(--line); border-radius: .5rem }
figure img { display: block; width: 100%; height: auto }
.wide { overflow-x: auto; margin: 1rem 0 } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
caption { text-align: left; color: var(--faint); padding-bottom: .25rem; position: sticky; left: 0;
  max-width: calc(100vw - 2rem) }
th, td { padding: .25rem 1rem .25rem 0; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap }
th { font-weight: 600 } tbody th { font-weight: 400 }
th:first-child { text-align: left; position: sticky; left: 0; background: var(--ground) }
thead th { white-space: normal; vertical-align: bottom; min-width: 4rem; max-width: 14rem }
@media (max-width: 40rem) { table { font-size: .9rem } tbody th { white-space: normal; min-width: 7.5rem } }
summary { cursor: pointer }
pre { overflow-x: auto; overflow-wrap: normal; padding: .5rem; background: var(--card); border: 1px solid var(--line) }
:focus-visible { outline: 2px solid var(--link); outline-offset: 2px }
@media print {
  body { max-width: none; padding: 0 } nav { display: none }
  figure, tr { break-inside: avoid } .wide { overflow: visible }
}
</style></head><body>
<header><h1>$title</h1>
$lead</header>
<main>$sections</main>
</body></html>
"""
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    """A part of the page.

    Attributes:
        title: Its heading; empty for none.
        body: HTML.
    """

    title: str
    body: str


def make_html(title: str, sections: Sequence[Section], *, lead: str = "") -> str:
    """Return the page; from two headings on, with links to them at its top.

    Args:
        title: Its name.
        sections: Its parts.
        lead: HTML below the title.
    """
    named = [section for section in sections if section.title]
    links = "".join(f'<li><a href="#{_anchor(s.title)}">{html.escape(s.title)}</a></li>' for s in named)
    nav = f'<nav aria-label="Sections"><ul>{links}</ul></nav>' if len(named) > 1 else ""
    return _PAGE.substitute(
        title=html.escape(title), lead=lead + nav, sections="\n".join(_section(section) for section in sections)
    )


def _section(section: Section) -> str:
    if not section.title:
        return f"<section>{section.body}</section>"
    anchor = _anchor(section.title)
    heading = f'<h2 id="{anchor}">{html.escape(section.title)}</h2>'
    return f'<section aria-labelledby="{anchor}">{heading}\n{section.body}</section>'


def _anchor(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def heading(text: str) -> str:
    """Return a heading inside a section."""
    return f"<h3>{html.escape(text)}</h3>"


def paragraph(text: str, *, strong: str = "") -> str:
    """Return a paragraph, with some words in bold before it."""
    lead = f"<b>{html.escape(strong)}</b>: " if strong else ""
    return f"<p>{lead}{html.escape(text)}</p>"


def table(lines: Sequence[Sequence[str]], *, caption: str = "") -> str:
    """Return a table in a box of its own, which scrolls where the page is too narrow for it.

    Args:
        lines: The head, then the rows; each row's first cell is its name.
        caption: What the table says.
    """

    def row(cells: Sequence[str]) -> str:
        first, *others = (html.escape(cell) for cell in cells)
        return f'<tr><th scope="row">{first}</th>' + "".join(f"<td>{cell}</td>" for cell in others) + "</tr>"

    head = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in lines[0])
    said = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    label = html.escape(caption or "Table", quote=True)
    body = "".join(row(line) for line in lines[1:])
    return (
        f'<div class="wide" role="region" tabindex="0" aria-label="{label}"><table>{said}'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def figures(drawn: Iterable[Figure]) -> str:
    """Return drawings beside and below each other; nothing where there is none."""
    found = "\n".join(_figure(figure) for figure in drawn)
    return f'<div class="figures">{found}</div>' if found else ""


def _figure(figure: Figure) -> str:
    # An image of its own: inlined, the figures' elements would share their ids.
    data = base64.b64encode(figure.svg.encode()).decode()
    text = html.escape(figure.text, quote=True)
    return f'<figure><img src="data:image/svg+xml;base64,{data}" alt="{text}"></figure>'


def details(title: str, body: str) -> str:
    """Return HTML that is shown when its title is opened."""
    return f"<details><summary>{html.escape(title)}</summary>{body}</details>"


def preformatted(text: str) -> str:
    """Return a text as it is."""
    return f"<pre>{html.escape(text)}</pre>"
