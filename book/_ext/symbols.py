r"""The page of notation: each symbol links to where its chapter first uses it.

A section of the page names its chapters in its first paragraph. A symbol is looked for in their formulas, in reading
order, and links to the section or the statement that has it. So the page says nothing that the chapters do not: a
symbol that is in no formula of its chapters has no link, and a test asks for few of these.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from docutils import nodes
from meanings import atoms, plain

PAGE = "book/notation"


def compact(formula: str) -> str:
    r"""A formula without spaces and braces.

    >>> compact(r"W_{i} - W,\; (x, y)")
    'W_i-W,(x,y)'
    """
    return re.sub(r"\\[,;!]|[\s{}]", "", formula)


def has(formula: str, wanted: str) -> bool:
    r"""Whether a formula has a symbol, and not only one of which it is a part. Of ``wanted``, what is before = counts.

    >>> has(r"W \boldsymbol a_C", "W"), has(r"\Delta W + W'", "W"), has("h_i + 1", "h_i = c_i"), has("(x,y)", "(x, y)")
    (True, False, True, True)
    """
    wanted = wanted.split("=")[0]
    if [compact(atom) for atom in atoms(wanted)] == [compact(wanted)]:
        return compact(wanted) in map(compact, atoms(formula))
    return re.search(rf"{re.escape(compact(wanted))}(?![_'])", compact(formula)) is not None


def formulas(doctree: nodes.document) -> Iterator[tuple[str, str]]:
    """Yield each formula of a page, with the anchor of the innermost section or statement around it."""
    for node in doctree.findall(lambda node: isinstance(node, (nodes.math, nodes.math_block))):
        around = node.parent
        while around is not None and around.get("ids", []) in ([], ["proof"]):  # all proofs have this one
            around = around.parent
        if around is not None:
            yield node.astext(), around["ids"][0]


def link(app: Any, doctree: nodes.document, docname: str) -> None:
    """Give each symbol in a first column its link."""
    if docname != PAGE:
        return
    known: dict[str, list[tuple[str, str]]] = {}
    for section in doctree.findall(nodes.section):
        tables = [child for child in section.children if isinstance(child, nodes.table)]
        named = next((child for child in section.children if isinstance(child, nodes.paragraph)), None)
        if not tables or named is None:
            continue
        chapters = [ref["refuri"].partition(".html")[0] for ref in named.findall(nodes.reference)]
        for chapter in chapters:
            if chapter not in known:
                known[chapter] = list(formulas(app.env.get_doctree(f"book/{chapter}")))
        for table in tables:
            table["classes"].append("notation")
            for row in next(table.findall(nodes.tbody)).children:
                for math in list(row[0].findall(nodes.math)):
                    target = first(math.astext(), [(name, known[name]) for name in chapters])
                    if target:
                        title = f"{plain(math.astext())}, where it is first used"
                        reference = nodes.reference(
                            "", "", math.deepcopy(), internal=True, refuri=target, reftitle=title
                        )
                        math.replace_self(reference)


def first(wanted: str, chapters: list[tuple[str, list[tuple[str, str]]]]) -> str | None:
    """The address of the first formula that has a symbol."""
    for name, listed in chapters:
        for formula, anchor in listed:
            if has(formula, wanted):
                return f"{name}.html#{anchor}"
    return None


def setup(app: Any) -> dict[str, Any]:
    """Register with Sphinx."""
    app.connect("doctree-resolved", link)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
