"""Below the title of a page, how long it takes and what to read first; at its end, how to cite it.

Authors, title and version are those of ``CITATION.cff``. The date is that of the commit that is built. What to read
first is the entry ``after`` in the head of a chapter. The role ``{minutes}`` sums the reading times of pages:
``{minutes}`deriving theorem```.
"""

from __future__ import annotations

import datetime
import html
import re
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from docutils import nodes
from repository import git

ROOT = Path(__file__).resolve().parents[2]
WORDS_A_MINUTE = 220
_UNREAD = re.compile(  # what is not read as words: the head, code, comments, formulas, options and the names of roles
    r"\A---\n.*?^---\n|^(?P<fence>```+|~~~+).*?^(?P=fence)$|^%.*?$|\$\$.*?\$\$|\$[^$\n]+\$|^:[\w-]+:.*?$|\{[\w:-]+\}|^\([\w-]+\)=$",
    re.MULTILINE | re.DOTALL,
)


def words(page: str) -> int:
    r"""The number of words in the source of a page, without code and formulas.

    >>> words("---\nkernelspec: x\n---\n# A title\n\nThe norm $\\|x\\|$ of {ref}`here`.\n\n```python\nmore = 1\n```\n")
    6
    """
    return len(re.findall(r"[^\W\d_][\w’'-]*", _UNREAD.sub(" ", page)))


def minutes(*pages: str) -> int:
    """The minutes that pages of the book take, at 220 words a minute."""
    count = sum(words((ROOT / "book" / f"{page}.md").read_text(encoding="utf-8")) for page in pages)
    return max(1, round(count / WORDS_A_MINUTE))


def duration(given: str) -> str:
    """The reading time of pages whose names are separated by spaces, in words."""
    count = minutes(*given.split())
    return f"{count} minute{'' if count == 1 else 's'}"


@cache
def citation() -> dict[str, Any]:
    """What ``CITATION.cff`` says."""
    return yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))


def authors() -> list[str]:
    """The names of the authors."""
    listed = citation()["authors"]
    return [one.get("name") or f"{one['given-names']} {one['family-names']}" for one in listed]


@cache
def date() -> datetime.date | None:
    """The date of the commit that is built; without a repository, that of the release, if there was one."""
    given = git(ROOT, "log", "-1", "--format=%cs") or citation().get("date-released")
    return datetime.date.fromisoformat(str(given)) if given else None


def edition() -> str:
    """The version and the date."""
    day = date()
    return f"version {citation()['version']}" + (f", {day.day} {day:%B %Y}" if day else "")


def bibtex(page: str, title: str, address: str, whole: bool) -> str:
    """The entry of a page for a bibliography, or that of the whole book."""
    book = citation()["title"]
    fields = {
        "author": " and ".join(f"{{{name}}}" if " " not in name or "_" in name else name for name in authors()),
        "title": f"{{{book if whole else title}}}",
        "booktitle": "" if whole else book,
        "year": str(date().year) if date() else "",
        "note": edition().replace("v", "V", 1),
        "url": address,
    }
    lines = [f"  {name:<9} = {{{value}}}," for name, value in fields.items() if value]
    key = "icl-lib" if whole else f"icl-lib-{page.replace('/', '-')}"
    return "\n".join([f"@{'misc' if whole else 'incollection'}{{{key},", *lines, "}"])


def below_title(before: list[tuple[str, str]], reading: str, address: str) -> str:
    """The line below the title of a page. Authors and address are for print: a screen shows both elsewhere."""
    said = [reading] if reading else []
    if before:
        links = [f'<a href="{html.escape(target)}">{html.escape(title)}</a>' for target, title in before]
        said.append("read " + " and ".join(links) + " first")
    said.append(html.escape(edition()))
    return f'<p class="byline">{" · ".join(said)}<span class="printed"> · {signed(address)}</span></p>'


def signed(address: str) -> str:
    """The authors, and the address of a page."""
    return html.escape(" · ".join([", ".join(authors()), *filter(None, [address])]))


def at_end(page: str, title: str, address: str, whole: bool) -> str:
    """The fold with the entry for a bibliography."""
    what = "book" if whole else "page"
    entry = html.escape(bibtex(page, title, address, whole))
    return (
        f'<details class="cite">\n<summary>\nCite this {what}\n</summary>\n<div class="highlight-bibtex notranslate">'
        f'<div class="highlight"><pre>{entry}\n</pre></div></div>\n</details>'
    )


def add(app: Any, pagename: str, templatename: str, context: dict[str, Any], doctree: Any) -> None:
    """Put both into a page. The first screen of the landing page belongs to the model that runs there."""
    if doctree is None or not pagename.startswith("book/"):
        return
    page = pagename.removeprefix("book/")
    title = re.sub(r"<[^>]+>", "", html.unescape(context["title"]))
    address = f"{app.config.html_baseurl}{pagename}.html" if app.config.html_baseurl else ""
    body = context["body"]
    whole = pagename == app.config.root_doc
    if not whole:
        meta = app.env.metadata[pagename]
        first = [name.strip() for name in str(meta.get("after", "")).split(",") if name.strip()]
        before = [
            (app.builder.get_relative_uri(pagename, f"book/{name}"), app.env.titles[f"book/{name}"].astext())
            for name in first
            if f"book/{name}" in app.env.titles
        ]
        reading = duration(page) if "kernelspec" in meta else ""
        line = below_title(before, reading, address)
    else:
        line = f'<p class="byline printed">{signed(address)} · {html.escape(edition())}</p>'
    body = body.replace("</h1>", f"</h1>\n{line}", 1)
    context["body"] = body + at_end(page, title, address, whole)


def role(name: str, rawtext: str, text: str, *args: Any, **kwargs: Any) -> tuple[list[nodes.Node], list[Any]]:
    """The role ``{minutes}``."""
    return [nodes.Text(duration(text))], []


def setup(app: Any) -> dict[str, Any]:
    """Register with Sphinx."""
    app.add_role("minutes", role)
    app.connect("html-page-context", add, priority=450)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
