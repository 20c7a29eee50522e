"""Whether the library runs inside the build of the book."""

from __future__ import annotations

import os


def building_book() -> bool:
    """Return whether this process executes a page of the book; the build sets ``ICL_LIB_BOOK_BUILD=1``.

    The built page has no kernel. So widgets draw all their frames during the build, and progress bars are not shown.
    """
    return os.environ.get("ICL_LIB_BOOK_BUILD") == "1"
