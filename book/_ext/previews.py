"""What a link to the book shows in a message or a search result: a title, a description and a picture.

Open Graph takes absolute addresses only. The address of the site is ``ICL_LIB_SITE_URL``. Without it, a page names
neither its address nor a picture. It always has a title and a description.
"""

from __future__ import annotations

import html
import os
import re
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.errors import ConfigError

CARD = "preview.png"
ALT = "Two planes with arrows: the inputs of a layer, and its outputs with and without the rank-one edit."
LENGTH = 200  # of a description: longer ones are cut off where they are shown
_ADDRESS = re.compile(r"https?://[^\s\"<>]+")
_RELATIVE = re.compile(r'\s*<meta property="og:(?:url|image)" content="(?!https?://)[^"]*" />')
_FORMULA = "\0"


def site_url(given: str) -> str:
    """The address of the site, with a slash at its end; empty if none is given.

    Raises `ConfigError` for anything but an absolute address.

    >>> site_url(" https://example.org/book "), site_url("")
    ('https://example.org/book/', '')
    """
    given = given.strip()
    if given and not _ADDRESS.fullmatch(given):
        raise ConfigError(f"ICL_LIB_SITE_URL is {given!r}: give the site's address, https://…, or leave it unset.")
    return f"{given.rstrip('/')}/" if given else ""


def configure(app: Any, config: Any) -> None:
    """Give the address and the picture to sphinxext.opengraph and to Sphinx."""
    address = site_url(os.environ.get("ICL_LIB_SITE_URL", ""))
    if address:
        config.ogp_site_url = config.html_baseurl = address
        config.ogp_image = f"_static/{CARD}"
        config.ogp_image_alt = ALT
        config.ogp_custom_meta_tags = ('<meta name="twitter:card" content="summary_large_image" />',)


def draw_card(path: Path, title: str, below: str = "") -> None:
    """Draw the picture of a preview, 1200 × 630 pixels, with a title and a line below the drawing."""
    from icl_lib.paper.figures import PLANE_EXAMPLE, draw_rank_one, figure

    with figure(width=8, height=4.2, columns=2) as (fig, planes):
        fig.get_layout_engine().set(w_pad=0.2, h_pad=0.15)
        fig.suptitle(title, fontsize=17, fontweight="bold")
        fig.supxlabel(below, fontsize=12)
        draw_rank_one(planes, **PLANE_EXAMPLE)
        fig.savefig(path, dpi=150, facecolor="white")


def write_card(app: Any) -> None:
    """Put the picture where Sphinx collects static files, if a page can refer to it."""
    if app.builder.format == "html" and app.config.ogp_image:
        folder = Path(app.doctreedir) / "previews"
        folder.mkdir(parents=True, exist_ok=True)
        draw_card(folder / CARD, app.config.ogp_site_name or app.config.project)
        app.config.html_static_path.append(str(folder))


def description(doctree: nodes.document, length: int = LENGTH) -> str:
    """The first whole sentences of a page without formulas that fit in ``length``, or one sentence if it is longer."""
    paragraphs = [node for node in doctree.findall(nodes.paragraph) if not isinstance(node.parent, nodes.citation)]
    text = " ".join(map(_plain, paragraphs))
    chosen = ""
    for sentence in re.split(r"(?<=[.!?])\s+(?=[A-Z“(\0])", " ".join(text.split())):
        if _FORMULA in sentence or sentence[-1:] not in list(".!?"):
            if chosen:
                break
        elif not chosen or len(f"{chosen} {sentence}") <= length:
            chosen = f"{chosen} {sentence}".strip()
        else:
            break
    return chosen


def _plain(node: nodes.Node) -> str:
    if isinstance(node, (nodes.math, nodes.math_block)):
        return _FORMULA
    if isinstance(node, nodes.Text):
        return node.astext()
    return "".join(_plain(child) for child in node.children)


def describe(app: Any, pagename: str, templatename: str, context: dict[str, Any], doctree: Any) -> None:
    """Give a page its description, unless the page has one of its own."""
    if doctree is None or 'name="description"' in context["metatags"]:
        return
    if text := html.escape(description(doctree)):
        context["metatags"] += f'<meta name="description" content="{text}" />\n'
        context["meta"] = {"og:description": text, **(context.get("meta") or {})}


def picture(app: Any, pagename: str, templatename: str, context: dict[str, Any], doctree: Any) -> None:
    """Give a chapter a picture with its own title; the pages of the library share the book's."""
    folder, _, page = pagename.rpartition("/")
    if doctree is None or folder != "book" or pagename == app.config.root_doc or not app.config.ogp_image:
        return
    path = Path(app.outdir) / "_static" / f"preview-{page}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    draw_card(path, re.sub(r"<[^>]+>", "", html.unescape(context["title"])), app.config.ogp_site_name)
    tags = {"og:image": f"{app.config.ogp_site_url}_static/{path.name}", "og:image:alt": app.config.ogp_image_alt}
    context["meta"] = {**(context.get("meta") or {}), **tags}


def drop_relative(app: Any, pagename: str, templatename: str, context: dict[str, Any], doctree: Any) -> None:
    """Remove addresses that are not absolute."""
    context["metatags"] = _RELATIVE.sub("", context.get("metatags") or "")


def setup(app: Any) -> dict[str, Any]:
    """Register with Sphinx; sphinxext.opengraph writes its tags between the two events of a page."""
    app.connect("config-inited", configure)
    app.connect("builder-inited", write_card)
    app.connect("html-page-context", describe, priority=400)
    app.connect("html-page-context", picture, priority=400)
    app.connect("html-page-context", drop_relative, priority=600)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
