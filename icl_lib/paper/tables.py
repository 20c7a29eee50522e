"""Tables of numbers as the book sets them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tabulate import tabulate

from icl_lib.environment import extra
from icl_lib.measures import scientific

with extra("widgets"):
    from IPython.display import Markdown

_NUMBER = re.compile(r"[≤<>≥≈]?\s?[−+-]?\d.*")
_ROUNDING = re.compile(r"≤?\s?−?\d(?:\.\d+)?\s×\s10⁻(?:¹[¹²³⁴⁵⁶⁷⁸⁹]|[²³][⁰¹²³⁴⁵⁶⁷⁸⁹])")


def quoted(text: str) -> str:
    """A text as a cell of a table, with its spaces and line breaks.

    >>> print(quoted(" a|b\\n"))
    `' a\\|b\\n'`
    """
    return f"`{text!r}`".replace("|", "\\|")


def table(rows: Iterable[Mapping[str, Any]], digits: int = 1) -> Markdown:
    """A table whose columns are the keys of its rows.

    Floats are written by :func:`~icl_lib.measures.scientific`, other values as they are. Columns of numbers are aligned
    at the right. Errors of the size of rounding, below 10⁻¹⁰, are marked, so that the eye tells them from the controls.

    Args:
        rows: dictionaries with the same keys.
        digits: significant digits of the floats.

    Raises:
        ValueError: without rows, and for rows with different keys.

    >>> print(table([{"block": "MLP", "edited": 0.0, "bare": 0.31}]).data)
    | block   |   edited |   bare |
    |:--------|---------:|-------:|
    | MLP     |        0 |    0.3 |
    """
    listed = list(rows)
    if not listed:
        raise ValueError("rows is empty: give at least one row.")
    names = list(listed[0])
    for i, row in enumerate(listed):
        if list(row) != names:
            raise ValueError(f"rows[{i}] has the columns {list(row)}, rows[0] has {names}: give each row the same.")
    texts = [
        [scientific(value, digits) if isinstance(value, float) else str(value) for value in row.values()]
        for row in listed
    ]
    align = ["right" if _numbers([line[i] for line in texts]) else "left" for i in range(len(names))]
    shown = [[_marked(text) for text in line] for line in texts]
    return Markdown(tabulate(shown, headers=names, tablefmt="pipe", disable_numparse=True, colalign=align))


def _numbers(column: Sequence[str]) -> bool:
    """Whether a column consists of numbers and gaps."""
    filled = [text for text in column if text not in ("", "–", "—")]
    return bool(filled) and all(_NUMBER.fullmatch(text) for text in filled)


def _marked(text: str) -> str:
    """A number of the size of rounding, marked."""
    return f'<span class="icl-rounding">{text}</span>' if _ROUNDING.fullmatch(text) else text
