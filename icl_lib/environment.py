"""Where the library is running."""

from __future__ import annotations

import os


def building_book() -> bool:
    """Whether this process executes a page of the book, whose build sets ``ICL_LIB_BOOK_BUILD=1``.

    A page has no kernel behind it: widgets then draw in advance what they will show, and progress bars stay away.
    """
    return os.environ.get("ICL_LIB_BOOK_BUILD") == "1"
