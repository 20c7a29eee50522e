"""What was a₀ again? Each formula in the text says what its symbols mean, when the reader points at it or taps it.

The meanings are the rows of the page "Notation". Its first section holds on every page; a section that names a chapter
below its heading holds there, and a letter that it defines anew has its new meaning.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping
from typing import Any

from docutils import nodes
from execution import ROOT
from page_assets import fingerprint
from sphinx.transforms.post_transforms import SphinxPostTransform

NOTATION = "book/notation"
_SECTION = re.compile(r"^## .+\n+((?:\{ref\}`[\w-]+`,? ?)+)$", re.M)
_ROW = re.compile(r"^\| (?P<symbols>\$.*?) \| (?P<words>.*?) \|", re.M)
_FORMULA = re.compile(r"\$(.+?)\$")
_GROUP = r"\{[^{}]*\}"
_WORD = r"\\[A-Za-z]+"
_ATOM = re.compile(
    rf"(?:\\(?:boldsymbol|bar|hat|tilde|mathrm|mathcal)\s*|\\Delta\s*)*(?:{_GROUP}|{_WORD}|[A-Za-z])(?:_(?:{_GROUP}|{_WORD}|\w))?'*"
)
_SIGNS = {
    r"^\top": "ᵀ", "^{-1}": "⁻¹", "^{+}": "⁺", "^2": "²", r"\setminus": " ∖ ", r"\lVert": "‖", r"\rVert": "‖",
    r"\cdot": "·", r"\dots": "…", r"\oslash": "⊘", r"\,": "", r"\;": "",
}  # fmt: skip
_HARD = re.compile(r",? ?\$[^$]*\\(?:sum|frac|tfrac|operatorname|hat)(?![A-Za-z])[^$]*\$")
_ACCENTS = {"bar": "\u0304", "hat": "\u0302", "tilde": "\u0303"}
_LOWERED = str.maketrans("0123456789+-ijlmnhx", "₀₁₂₃₄₅₆₇₈₉₊₋ᵢⱼₗₘₙₕₓ")


def atoms(formula: str) -> Iterator[str]:
    r"""The symbols of a formula, each with its subscript, without spaces.

    >>> list(atoms(r"(W + \Delta W)\, \boldsymbol a_0 = W' \boldsymbol a_{C}"))
    ['W', '\\DeltaW', '\\boldsymbola_0', "W'", '\\boldsymbola_C']
    """
    for found in _ATOM.finditer(re.sub(r"\\[,;!: ]", " ", formula)):
        yield re.sub(r"\s|(?<=_)\{(?=.\})|(?<=_\{.)\}", "", re.sub(r"_\{(.)\}", r"_\1", found[0]))


def plain(formula: str) -> str:
    r"""A formula in letters.

    >>> plain(r"\boldsymbol a_0"), plain(r"\Delta W_i"), plain(r"f_\theta")
    ('a₀', 'ΔWᵢ', 'f_θ')
    >>> plain(r"(\boldsymbol g_i - \bar{\boldsymbol o})^\top")
    '(gᵢ − ō)ᵀ'
    """
    text = re.sub(
        r"\\(bar|hat|tilde)\s*\{?(?:\\boldsymbol )?(\w)\}?", lambda found: found[2] + _ACCENTS[found[1]], formula
    )
    for sign, letter in _SIGNS.items():
        text = re.sub(rf"{re.escape(sign)}(?![A-Za-z]) ?", letter, text)
    text = re.sub(r"\\([A-Za-z]+)\s*", lambda found: _greek(found[1]), text)
    text = re.sub(r"_\{?([0-9+ijlmnhx-]+)\}?", lambda found: found[1].translate(_LOWERED), text)
    return unicodedata.normalize("NFC", re.sub(r"[{}\\]", "", text)).replace("-", "−").strip()


def _greek(name: str) -> str:
    size, name = ("CAPITAL" if name[0].isupper() else "SMALL"), name.upper().replace("LAMBDA", "LAMDA")
    try:
        return unicodedata.lookup(f"GREEK {size} LETTER {name}")
    except KeyError:
        return ""  # a style, such as \\boldsymbol


def rows(section: str) -> dict[str, str]:
    r"""The meanings of the symbols in the rows of a section.

    >>> rows(r"| $\boldsymbol a_C = A(C, x)$, $b$ | input of the MLP, its bias | `a_with` |")
    {'\\boldsymbola_C': 'a_C, b: input of the MLP, its bias', 'b': 'a_C, b: input of the MLP, its bias'}
    """
    found = {}
    for row in _ROW.finditer(section):
        defined = [formula.split("=")[0].strip() for formula in _FORMULA.findall(row["symbols"])]
        names = {symbols[0]: plain(each) for each in defined if len(symbols := list(atoms(each))) == 1 and plain(each)}
        words = _FORMULA.sub(lambda formula: plain(formula[1]), _HARD.sub("", row["words"]))
        meaning = f"{', '.join(names.values())}: {words}"
        found |= dict.fromkeys(names, meaning)
    return found


def by_page(notation: str) -> tuple[dict[str, str], dict[str, dict[str, str]]]:
    r"""What holds on every page, and what holds in the chapters that a section names.

    On every page the symbols of the first section hold that are no bare letters, which have many meanings.

    >>> first = "## A\n\n{ref}`one`\n\n| $a$ | first | |\n| $a_0$ | none | |\n\n"
    >>> by_page(first + "## B\n\n{ref}`two`\n\n| $a$ | second | |\n")
    ({'a_0': 'a₀: none'}, {'one': {'a': 'a: first', 'a_0': 'a₀: none'}, 'two': {'a': 'a: second'}})
    """
    own: dict[str, dict[str, str]] = {}
    parts = _SECTION.split(notation)[1:]
    sections = [
        (re.findall(r"`([\w-]+)`", names), rows(text)) for names, text in zip(parts[::2], parts[1::2], strict=True)
    ]
    for names, meanings in sections:
        for name in names:
            own.setdefault(name, {}).update(meanings)
    everywhere = {
        symbol: meaning for symbol, meaning in sections[0][1].items() if re.search(r"_|\\Delta|\\bold", symbol)
    }
    return everywhere, own


def explained(formula: str, meanings: Mapping[str, str]) -> str:
    """The meanings of the symbols of a formula, in their order, each once."""
    return "\n".join(dict.fromkeys(meanings[atom] for atom in atoms(formula) if atom in meanings))


class Explain(SphinxPostTransform):
    """Give every formula in the text the meanings of its symbols."""

    default_priority = 190
    formats = ("html",)

    def run(self, **kwargs: Any) -> None:
        page = self.env.docname.removeprefix("book/")
        if self.env.docname == NOTATION or page.startswith("api"):
            return
        everywhere, own = by_page((ROOT / f"{NOTATION}.md").read_text(encoding="utf-8"))
        meanings = everywhere | own.get(page, {})
        for formula in list(self.document.findall(nodes.math)):
            said = explained(formula.astext(), meanings)
            if said and not isinstance(formula.parent, nodes.title | nodes.reference):
                formula.replace_self(
                    nodes.abbreviation("", "", formula.deepcopy(), explanation=said, classes=["symbols"])
                )


def setup(app: Any) -> dict[str, Any]:
    """Register with Sphinx."""
    app.add_config_value("meanings", fingerprint([ROOT / f"{NOTATION}.md"]), "html")  # all pages when a row changes
    app.add_post_transform(Explain)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
