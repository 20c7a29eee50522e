"""The website while one writes: what is watched, and how an open page learns that it is built again."""

from __future__ import annotations

import functools
import http.server
import threading
from pathlib import Path
from urllib.request import urlopen

import pytest
import serve
from conftest import ROOT


def test_chapters_and_their_settings_are_watched():
    watched = {path.relative_to(ROOT).as_posix() for path in serve.saved()}
    assert {"_config.yml", "_toc.yml", "book/index.md", "book/_static/book.css", "book/references.bib"} <= watched
    assert not [path for path in watched if path.endswith((".ipynb", ".pyc"))]


def test_a_page_asks_whether_it_is_built_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "page.html").write_text("<html><body>Text.</body></html>")
    (tmp_path / "style.css").write_text("a { color: red }")
    handler = functools.partial(serve.Handler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()

        def read(name: str) -> str:
            with urlopen(f"http://127.0.0.1:{server.server_port}/{name}") as answer:
                return answer.read().decode()

        page = read("page.html")
        assert page.startswith("<html><body>Text.<script>")
        assert page.endswith("</script></body></html>")
        assert read("style.css") == "a { color: red }"
        before = read("built")
        monkeypatch.setattr(serve.Handler, "builds", serve.Handler.builds + 1)
        assert read("built") != before
        server.shutdown()
