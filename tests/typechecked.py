"""Annotations checked after the body has run, so that a function's own refusal comes first.

pytest is told to use this checker by ``--jaxtyping-packages`` in ``pyproject.toml``. A user, who checks no annotations,
sees the `ValueError` of a function's body; so do the tests. Where the body accepts what its annotations forbid, or
returns what they forbid, the call raises ``jaxtyping.TypeCheckError``, a `TypeError`.
"""

from __future__ import annotations

import collections.abc
from collections.abc import Callable
from typing import Any, get_origin

from beartype import beartype

# jaxtyping calls two functions that do nothing: before the body, one with the annotated parameters; after it, one that
# takes the returned value as well, in a further argument. The second checks the parameters too, so the first need not.
_RETURNED = "ret0"

# The body of a generator function runs after the call, when the first value is asked for, so no check can come after.
_GENERATORS = (collections.abc.Iterator, collections.abc.Generator)


def after_the_body(function: Callable[..., Any]) -> Callable[..., Any]:
    """Check the annotations of the second function that jaxtyping makes, and not those of the first."""
    if _RETURNED not in function.__code__.co_varnames or get_origin(function.__annotations__["return"]) in _GENERATORS:
        return function
    return beartype(function)
