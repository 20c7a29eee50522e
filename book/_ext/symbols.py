r"""The page of notation: each symbol links to where its chapter first uses it.

A section of the page names its chapters in its first paragraph. A symbol is looked for in their formulas, in reading
order, and links to the section or the statement that has it. So the page says nothing that the chapters do not: a
symbol that is in no formula of its chapters has no link, and a test asks for few of these.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from docutils import nodes
from meanings import plain

PAGE = "book/notation"
ACCENTS = {"\\hat", "\\bar", "\\tilde", "\\boldsymbol", "\\mathcal", "\\mathrm", "\\Delta", "\\operatorname", "_", "^"}
"""After one of these a letter is part of another symbol."""


def tokens(formula: str) -> list[str]:
    r"""The commands and signs of a formula, without spaces, braces and layout.

    >>> tokens(r"\boldsymbol{a}_{C} = A(C, x)")
    ['\\boldsymbol', 'a', '_', 'C', '=', 'A', '(', 'C', ',', 'x', ')']
    """
    return [token for token in re.findall(r"\\[a-zA-Z]+|\\.|[^\s{}]", formula) if token not in ("\\,", "\\;", "\\!")]


def symbol(formula: str) -> list[str]:
    r"""What a formula of the table names: its left-hand side.

    >>> symbol(r"h_i = c_i + A_i"), symbol(r"(x, y)")
    (['h', '_', 'i'], ['(', 'x', ',', 'y', ')'])
    """
    found = tokens(formula)
    return found[: found.index("=")] if "=" in found[1:] else found


def has(formula: Sequence[str], wanted: Sequence[str]) -> bool:
    r"""Whether a formula has a symbol, and not only one of which it is a part.

    >>> has(tokens(r"W \boldsymbol a_C"), tokens("W")), has(tokens(r"\Delta W + W'"), tokens("W"))
    (True, False)
    """
    size, wanted = len(wanted), list(wanted)
    for at in range(len(formula) - size + 1):
        before, after = formula[at - 1 : at], formula[at + size : at + size + 1]
        if list(formula[at : at + size]) == wanted and not ACCENTS & {*before} and after not in (["_"], ["'"]):
            return True
    return False


def formulas(doctree: nodes.document) -> Iterator[tuple[list[str], str]]:
    """Yield each formula of a page in tokens, with the anchor of the innermost section or statement around it."""
    for node in doctree.findall(lambda node: isinstance(node, (nodes.math, nodes.math_block))):
        around = node.parent
        while around is not None and around.get("ids", []) in ([], ["proof"]):  # all proofs have this one
            around = around.parent
        if around is not None:
            yield tokens(node.astext()), around["ids"][0]


def link(app: Any, doctree: nodes.document, docname: str) -> None:
    """Give each symbol in a first column its link."""
    if docname != PAGE:
        return
    known: dict[str, list[tuple[list[str], str]]] = {}
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
                    target = first(symbol(math.astext()), [(name, known[name]) for name in chapters])
                    if target:
                        title = f"{plain(math.astext())}, where it is first used"
                        reference = nodes.reference(
                            "", "", math.deepcopy(), internal=True, refuri=target, reftitle=title
                        )
                        math.replace_self(reference)


def first(wanted: Sequence[str], chapters: list[tuple[str, list[tuple[list[str], str]]]]) -> str | None:
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
