r"""How wide a formula is, and where it is broken so that it fits a phone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

import sympy as sp

from icl_lib.symbolic.notation import latex, signed_terms

LINE = 15.5
"""A formula that is wider than this, in em, is broken: a phone of 390 pixels shows 16."""

SHORT = 4.5
"""A left side that is narrower than this, with its equals sign, never stands on a line of its own."""

WIDTHS = {"frac": 0.24, "tfrac": 0.24, "neq": 1.4, "odot": 1.4, "oslash": 1.4, "sum": 1.3, "top": 0.8, "cos": 1.5}
THIN = {",": 0.17, ";": 0.28, "!": 0.0, "quad": 1.0, "|": 0.5, "left": 0.0, "right": 0.0, "Bigl": 0.2, "Bigr": 0.2}
THIN |= dict.fromkeys(("boldsymbol", "mathcal", "mathrm", "operatorname", "bar", "text"), 0.0)  # set as their argument


def width(formula: str, operator: float = 1.3) -> float:
    r"""Estimate the width of a formula, in em: within a tenth of what MathJax sets.

    >>> round(width(r"W \boldsymbol{a}_{C}"), 1), round(width(r"\frac{W}{\|\boldsymbol{a}_{0}\|^2}"), 1)
    (2.0, 2.5)
    """
    total, at = 0.0, 0
    while at < len(formula):
        token = _token(formula, at)
        at += len(token)
        name = token.removeprefix("\\")
        if token in "_^":
            argument, at = _argument(formula, at)
            total += 0.7 * width(argument, operator=0.6)
        elif name in ("frac", "tfrac"):
            above, at = _argument(formula, at)
            below, at = _argument(formula, at)
            total += WIDTHS[name] + (1.0 if name == "frac" else 0.7) * max(width(above), width(below))
        elif token.startswith("\\"):
            total += WIDTHS.get(name, THIN.get(name, 0.65))
        elif token in "+-=":
            total += operator
        elif token in "()|[].,'":
            total += 0.38
        elif token not in " {}":
            total += 0.5 if token.isdigit() else 0.85 if token.isupper() else 0.57
    return total


def rows(parts: Sequence[Any]) -> list[str]:
    """Return the LaTeX of equal expressions, broken before the equals signs and then before the terms."""
    whole = " = ".join(latex(part) for part in parts)
    if width(whole) <= LINE:
        return [whole]
    found = terms(parts[0])
    for part in parts[1:]:
        beside = f"{found[-1]} = "
        first, *rest = terms(part, LINE - width(beside)) if width(beside) < SHORT else terms(part)
        if width(beside + first) <= LINE or width(beside) < SHORT:
            found[-1] = beside + first
        else:
            found.append(f"{{}} = {first}")
        found += rest
    return found


def terms(expression: Any, room: float = LINE) -> list[str]:
    """Return the LaTeX of an expression; a sum that needs more room is broken before its signs."""
    whole = latex(expression)
    if width(whole) <= room or not isinstance(expression, sp.MatAdd | sp.Add):
        return [whole]
    (negative, first), *others = signed_terms(expression)
    broken = [f"- {first}" if negative else first]
    for negative, term in others:
        signed = f"{'-' if negative else '+'} {term}"
        if width(f"{broken[-1]} {signed}") <= (room if len(broken) == 1 else LINE):
            broken[-1] += f" {signed}"
        else:
            broken.append(f"{{}} {signed}")
    return broken


def stacked(formulas: Iterable[str]) -> str:
    """Set formulas one below the other."""
    formulas = list(formulas)
    if len(formulas) == 1:
        return formulas[0]
    return "\\begin{gathered}\n" + " \\\\[0.4em]\n".join(formulas) + "\n\\end{gathered}"


def _token(formula: str, at: int) -> str:
    return re.compile(r"\\(?:[a-zA-Z]+|.)|.", re.DOTALL).match(formula, at)[0]


def _argument(formula: str, at: int) -> tuple[str, int]:
    """Return what a command takes from here on, and where it ends."""
    while formula[at] == " ":
        at += 1
    if formula[at] != "{":
        token = _token(formula, at)
        return token, at + len(token)
    depth = 0
    for end in range(at, len(formula)):
        depth += {"{": 1, "}": -1}.get(formula[end], 0)
        if not depth:
            return formula[at + 1 : end], end + 1
    raise ValueError(f"formula {formula!r} has a brace that is not closed.")
