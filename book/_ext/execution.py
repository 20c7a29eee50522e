"""How the book's notebooks run: with this checkout's library, and from the cache if nothing has changed.

- Kernels import ``icl_lib`` from this checkout, installed or not.
- ``ICL_LIB_BOOK_BUILD=1`` tells the library's widgets to draw in advance what the page will show.
- Jupyter Book caches the outputs of a chapter until the chapter changes. The outputs also depend on the library, on
  the data and on the installed packages. Each state of these has its own cache.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def installed_versions(requirements: str) -> list[str]:
    """``name==version`` of each installed package among the lines of a requirements file.

    >>> installed_versions("# a comment\\n--extra-index-url somewhere\\nno-such-package>=1\\n")
    []
    """
    versions = []
    for line in requirements.splitlines():
        name = re.match(r"\s*([A-Za-z0-9][\w.-]*)", line)
        if name:
            try:
                versions.append(f"{name[1].lower()}=={metadata.version(name[1])}")
            except metadata.PackageNotFoundError:
                continue
    return sorted(versions)


def cache_key(folders: Iterable[Path], versions: Iterable[str] = ()) -> str:
    """A hash of ``versions`` and of the names and contents of all files in ``folders``, except compiled Python."""
    digest = hashlib.sha256("\n".join(versions).encode())
    for folder in folders:
        for file in sorted(path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts):
            name, content = file.relative_to(folder).as_posix(), file.read_bytes()
            digest.update(f"\0{folder.name}/{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:16]


def prepare(app: Any, config: Any) -> None:
    """Set the environment variables of the kernels, and choose the cache."""
    search = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(search))
    os.environ["ICL_LIB_BOOK_BUILD"] = "1"
    if config.nb_execution_mode == "cache":
        requirements = ROOT / "requirements.txt"
        listed = requirements.read_text(encoding="utf-8") if requirements.exists() else ""
        versions = [f"python=={platform.python_version()}", *installed_versions(listed)]
        key = cache_key([ROOT / "icl_lib", ROOT / "book" / "data"], versions)
        config.nb_execution_cache_path = str(Path(app.outdir).parent / ".jupyter_cache" / key)


def setup(app: Any) -> dict[str, Any]:
    """Register with Sphinx."""
    sys.path.insert(0, str(ROOT))  # for autodoc
    app.connect("config-inited", prepare)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
