"""The website while one writes: ``python book/_ext/serve.py`` builds it, serves it on this machine, and builds it again
after each save of a chapter. An open page then loads itself again.

What takes long is done once: the libraries are imported before the first build, and each build runs in a copy of this
process. Pages with the library's source are not written again. After a change of ``icl_lib``, start again: all
chapters run.
"""

from __future__ import annotations

import argparse
import functools
import http.server
import importlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import page_assets

ROOT = Path(__file__).resolve().parents[2]
BUILT = ROOT / "_build" / "html"
WATCHED = ("book", "_config.yml", "_toc.yml", "CITATION.cff")
IMPORTED = ("jupyter_book.sphinx", "sphinx_book_theme", "myst_nb", "sphinxcontrib.bibtex", "icl_lib.paper.plots")
RELOAD = b"""<script>
(() => {
  let seen;
  setInterval(async () => {
    const now = await (await fetch("/built")).text();
    if (seen && now !== seen) location.reload();
    seen = now;
  }, 500);
})();
</script></body>"""


def saved() -> dict[Path, float]:
    """When each file of the book was last saved."""
    files = [path for name in WATCHED for path in [ROOT / name, *(ROOT / name).rglob("*")]]
    ignored = (".ipynb", ".pyc")
    return {path: path.stat().st_mtime for path in files if path.is_file() and path.suffix not in ignored}


def build_book() -> None:
    """Build what has changed; the exit status says whether it worked."""
    from jupyter_book.sphinx import build_sphinx

    page_assets.renew_source_pages = lambda app: []
    as_make_does = {"external_toc_path": str(ROOT / "_toc.yml"), "latex_individualpages": False, "nitpicky": True}
    given = {"path_config": str(ROOT / "_config.yml"), "noconfig": True, "quiet": True, "confoverrides": as_make_does}
    os._exit(bool(build_sphinx(ROOT, BUILT, **given)))


def build() -> bool:
    """Build in a copy of this process: Sphinx keeps state that a second build in one process would meet."""
    begun = time.monotonic()
    child = multiprocessing.get_context("fork").Process(target=build_book, daemon=True)
    child.start()
    child.join()
    outcome = "built" if child.exitcode == 0 else "not built; the last version stays"
    print(f"{outcome}, {time.monotonic() - begun:.1f} s", flush=True)
    return child.exitcode == 0


class Handler(http.server.SimpleHTTPRequestHandler):
    """The built files; pages with a script that asks whether they are built again."""

    builds = 0

    def do_GET(self) -> None:
        """Send a page, or the number of the last build."""
        path = Path(self.translate_path(self.path))
        if self.path == "/built":
            self.answer(str(Handler.builds).encode(), "text/plain")
        elif path.suffix == ".html" and path.is_file():
            self.answer(path.read_bytes().replace(b"</body>", RELOAD), "text/html; charset=utf-8")
        else:
            super().do_GET()

    def answer(self, body: bytes, kind: str) -> None:
        """Send what is not kept by the browser."""
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Say nothing of requests."""


def main() -> None:
    """Build, serve, and build again, until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # a build that runs ends too
    os.chdir(ROOT)
    for name in IMPORTED:
        importlib.import_module(name)
    known = saved()
    if not build() and not (BUILT / "index.html").exists():
        sys.exit(1)
    handler = functools.partial(Handler, directory=str(BUILT))
    with http.server.ThreadingHTTPServer(("127.0.0.1", given.port), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        print(f"The book is served: http://127.0.0.1:{server.server_port}/book/index.html", flush=True)
        while True:
            time.sleep(0.3)
            if (now := saved()) != known:
                known = now
                Handler.builds += build()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print()
