"""The buttons that lead to the repository, whose address is found when the book is built.

The address is ``ICL_LIB_REPOSITORY`` if that is set, otherwise the checkout's ``origin``. Without an address that
readers can open there are no buttons, so no link leads nowhere. ``ICL_LIB_BRANCH`` names the branch; by default it is
the default branch of ``origin``, or else ``main``.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

BINDER = "https://mybinder.org"
_SCP_STYLE = re.compile(r"(?:[\w.+-]+@)?(?P<host>[\w.-]+):(?P<path>[^/\\:][^\\:]*)")
_HOST = re.compile(r"[a-z0-9](?:[a-z0-9-]*[a-z0-9])?(?:\.[a-z0-9](?:[a-z0-9-]*[a-z0-9])?)+(?::\d+)?")
_PATH = re.compile(r"(?:[\w~-][\w.~-]*/)+[\w~-][\w.~-]*", re.ASCII)


def page_address(remote: str) -> str | None:
    """The web page ``https://host/owner/name`` of a git remote, or None if readers cannot reach its host.

    >>> page_address("git@example.org:owner/name.git")
    'https://example.org/owner/name'
    >>> page_address("https://user:secret@example.org/owner/name")
    'https://example.org/owner/name'
    >>> page_address("/srv/git/name.git") is None
    True
    """
    remote = remote.strip()
    if re.search(r"[\s\\]", remote):  # browsers and git read these differently
        return None
    if "://" in remote:
        try:
            parts = urlsplit(remote)
            host, path, port = (parts.hostname or "").lower(), parts.path, parts.port
        except ValueError:  # a malformed host or port
            return None
        if parts.scheme not in ("http", "https", "ssh") or parts.query or parts.fragment:
            return None
        if port and parts.scheme != "ssh":  # an ssh port says nothing about the web page
            host = f"{host}:{port}"
    elif match := _SCP_STYLE.fullmatch(remote):
        host, path = match["host"].lower(), match["path"]
    else:
        return None
    path = re.sub(r"\.git$", "", path.strip("/"))
    if not _HOST.fullmatch(host) or not _PATH.fullmatch(path) or re.fullmatch(r"[\d.:]+", host):
        return None
    return f"https://{host}/{path}"


def theme_options(address: str | None, branch: str = "main", path_to_book: str = "") -> dict[str, Any]:
    """The theme's options for a repository, with the buttons that work for its host. None without an address.

    >>> theme_options(None)
    {}
    >>> sorted(theme_options("https://github.com/owner/name"))[:2]
    ['launch_buttons', 'path_to_docs']
    """
    if address is None:
        return {}
    host, _, path = address.removeprefix("https://").partition("/")
    provider = next((name for name in ("github", "gitlab", "bitbucket") if name in host), None)
    options: dict[str, Any] = {
        "repository_url": address,
        "repository_branch": branch,
        "path_to_docs": path_to_book,
        "repository_provider": provider
        or "github",  # one of the theme's three; for another host it chooses the icon only
        "use_repository_button": True,
        "use_issues_button": provider in ("github", "gitlab"),
    }
    # For other hosts Binder needs a form of address that the theme does not write.
    if host in ("github.com", "gitlab.com") and path.count("/") == 1:
        options["launch_buttons"] = {"binderhub_url": BINDER, "notebook_interface": "jupyterlab"}
    return options


def git(folder: Path, *arguments: str) -> str | None:
    """The output of a git command, or None if there is no git, no repository or no output."""
    try:
        run = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return (run.stdout.strip() or None) if run.returncode == 0 else None


def configure(app: Any, config: Any) -> None:
    """Set the theme's options before the theme reads them."""
    folder = Path(app.srcdir)
    remote = os.environ.get("ICL_LIB_REPOSITORY") or git(folder, "remote", "get-url", "origin") or ""
    default = git(folder, "symbolic-ref", "--short", "refs/remotes/origin/HEAD") or ""
    branch = os.environ.get("ICL_LIB_BRANCH") or default.removeprefix("origin/") or "main"
    prefix = (git(folder, "rev-parse", "--show-prefix") or "").strip("/")
    config.html_theme_options.update(theme_options(page_address(remote), branch, prefix))


def setup(app: Any) -> dict[str, Any]:
    """Register with Sphinx."""
    app.connect("config-inited", configure)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
