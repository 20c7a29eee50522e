"""Where the library runs: inside the build of the book or not, and with which of its extras."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator


def building_book() -> bool:
    """Return whether this process executes a page of the book; the build sets ``ICL_LIB_BOOK_BUILD=1``.

    The built page has no kernel. So widgets draw all their frames during the build, and progress bars are not shown.
    """
    return os.environ.get("ICL_LIB_BOOK_BUILD") == "1"


@contextlib.contextmanager
def extra(name: str, command: bool = False) -> Iterator[None]:
    """Name the extra of this library that brings a package, if the package is missing when it is imported inside.

    >>> with extra("llm"):
    ...     import a_package_that_nobody_has
    Traceback (most recent call last):
    ModuleNotFoundError: a_package_that_nobody_has is missing: pip install 'icl_lib[llm]'.

    Args:
        name: the extra, a key of ``[project.optional-dependencies]`` in ``pyproject.toml``.
        command: print the error and exit with the code 2 instead, as a command does.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "icl_lib"):  # a mistake in this library, which no extra would repair
            raise
        told = f"{package} is missing: pip install 'icl_lib[{name}]'."
        if command:
            print(f"error: {told}", file=sys.stderr)
            raise SystemExit(2) from None
        raise ModuleNotFoundError(told, name=package) from None
