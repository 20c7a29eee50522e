"""Corrections of the HTML that the theme and the extensions write, made on each finished page.

- A fold's name for screen readers is its visible text; MyST-NB names them all "Toggle hidden content".
- A proof is set apart from what it proves; sphinx-proof gives all of them one id and no name.
- The keys that open the search are no part of its button's name. The site's title is in a landmark. Roles that no
  browser knows are left out. An empty cell is no heading. What unfolds the pages of a chapter has a name.
- A page has one viewport; Sphinx, docutils and the theme each declare one.
"""

from __future__ import annotations

import re
from typing import Any

_VIEWPORT = re.compile(r'\s*<meta\b(?=[^>]*\bname="viewport")[^>]*>')
_PROOF = re.compile(r'<div class="proof admonition" id="proof">\n<p>Proof\. ')
_ROLES = (
    ('<span class="search-button__kbd-shortcut"', '<span aria-hidden="true" class="search-button__kbd-shortcut"'),
    ('<div id="pst-primary-sidebar"', '<div role="region" aria-label="Book" id="pst-primary-sidebar"'),
    ('<div role="list" class="citation-list">', '<div class="citation-list">'),
    (' role="doc-biblioentry"', ""),
    ('<summary><span class="toctree-toggle"', '<summary aria-label="Its pages"><span class="toctree-toggle"'),
)
_EMPTY = re.compile(r'<th class="head[^"]*"><p></p></th>')
_FOLD = re.compile(r'<summary aria-label="Toggle hidden content">')


def corrected(page: str) -> str:
    """The same page with these corrections.

    >>> corrected('<meta name="viewport" content="a"><meta content="b" name="viewport"/><title>T</title>')
    '<meta name="viewport" content="a"><title>T</title>'
    >>> corrected('<summary aria-label="Toggle hidden content">Show the proof</summary>')
    '<summary>Show the proof</summary>'
    """
    if first := _VIEWPORT.search(page):
        page = page[: first.end()] + _VIEWPORT.sub("", page[first.end() :])
    for theirs, ours in _ROLES:
        page = page.replace(theirs, ours)
    page = _EMPTY.sub("<td></td>", page)
    page = _PROOF.sub('<div class="proof demonstration admonition">\n<p><em>Proof.</em> ', page)
    return _FOLD.sub("<summary>", page)


def install(app: Any) -> None:
    """Correct every page that the builder's templates make."""
    if app.builder.format == "html":
        render = app.builder.templates.render
        app.builder.templates.render = lambda template, context: corrected(render(template, context))


def setup(app: Any) -> dict[str, Any]:
    """Register with Sphinx."""
    app.connect("builder-inited", install)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
