r"""The mathematics of docstrings: ``$x$`` and ``$$x$$``, as chapters write it, become Sphinx's roles and directives.

Docstrings then use one notation in ``help()``, in JupyterLab and on the API page.
"""

from __future__ import annotations

import re
from typing import Any


def with_math(lines: list[str]) -> list[str]:
    r"""The docstring with reStructuredText's notation for mathematics. Code and examples are not changed.

    >>> with_math(["The norm $\\|x\\|$ costs ``$5``."])
    ['The norm :math:`\\|x\\|` costs ``$5``.']
    >>> with_math(["$$", "x = 1", "$$"])
    ['', '.. math::', '', '   x = 1', '']
    """
    text = re.sub(r"^([ \t]*)\$\$(.+?)\$\$[ \t]*$", _display, "\n".join(lines), flags=re.DOTALL | re.MULTILINE)
    literal = r"``.+?``|^[ \t]*(?:>>>|\.\.\.).*$"
    inline = r"(?<![\\$\w])\$(?! )([^$`]+?)(?<! )\$(?![\w$])"
    math = re.compile(f"(?P<literal>{literal})|{inline}", re.MULTILINE)
    return math.sub(lambda m: m[0] if m["literal"] else f":math:`{' '.join(m[2].split())}`", text).split("\n")


def _display(match: re.Match[str]) -> str:
    indent = match[1]
    body = [f"{indent}   {line.strip()}" for line in match[2].strip().split("\n")]
    return "\n".join(["", f"{indent}.. math::", "", *body, ""])


def process(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Sphinx's event ``autodoc-process-docstring``."""
    lines[:] = with_math(lines)


def undivided(lines: list[str]) -> list[str]:
    """The description of an attribute in one piece: napoleon takes what is before its first colon for a type.

    >>> undivided(["odd, so that zero has one of its own.", "", ":type: The number of colours"])
    ['The number of colours: odd, so that zero has one of its own.', '']
    """
    for at, line in enumerate(lines):
        if line.startswith(":type: "):
            return [f"{line.removeprefix(':type: ')}: {lines[0]}", *lines[1:at], *lines[at + 1 :]]
    return lines


def join(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Sphinx's event ``autodoc-process-docstring``, after napoleon."""
    if what in ("attribute", "data", "property"):
        lines[:] = undivided(lines)


def says_nothing(app: Any, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """Leave out the fields of a named tuple: the signature has them, and Python describes them by their numbers."""
    return True if str(getattr(obj, "__doc__", "")).startswith("Alias for field number") else None


def setup(app: Any) -> dict[str, Any]:
    """Register with Sphinx."""
    app.connect("autodoc-process-docstring", process, priority=400)  # before napoleon reads the sections
    app.connect("autodoc-process-docstring", join, priority=600)
    app.connect("autodoc-skip-member", says_nothing)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
