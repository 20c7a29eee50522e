"""What each page loads: only files of the site itself, and only those that the page uses.

- The widgets' ES modules become one classic deferred script: a module cannot be loaded from ``file://``.
- The small language model becomes another, which only the pages load that run it.
- RequireJS, the ipywidgets manager and the widgets' saved state stay only on pages with a live ipywidgets view.
- MathJax is served from the site. Of its 24 MB, only the files that a page can load are kept.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Mapping
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

BOOK = Path(__file__).resolve().parents[1]
STATIC = BOOK.parent / "icl_lib" / "static"
MODEL = BOOK.parent / "icl_lib" / "paper" / "hidden_rule" / "hidden_rule.safetensors"
SCRIPT, MODEL_SCRIPT, STYLE = "widgets.js", "hidden_rule.js", "widgets.css"
EVERYWHERE = ("book.js", "book.css")
MATHJAX_KEPT = (  # the entry, the files it always loads, and those for the accessibility settings of its menu
    "tex-chtml.js",
    "output/chtml/fonts",
    "input/tex/extensions",
    "a11y",
    "sre/mathmaps/base.json",
    "sre/mathmaps/en.json",
)
WIDGET = '<div class="icl-widget"'  # how icl_lib.widgets.page_html begins
IMPORT = re.compile(r'^import (\{[^}]*\}) from "\./(\w+)\.mjs";$', re.MULTILINE)
NEEDED = {SCRIPT: WIDGET, MODEL_SCRIPT: f'{WIDGET} data-widget="puzzle"'}  # in the body of a page that loads the script
IPYWIDGETS = ("require.min.js", "embed-amd.js")


def bundle(modules: Mapping[str, str], host: str) -> str:
    """One classic script made of ES modules, by name, and of the host that runs them.

    A module may import names from another one: ``import { … } from "./other.mjs";``, on one line. Raises `ValueError`
    for a module with any other import, for one whose last statement is not ``export default { … };``, and for an
    import from a module that is not given.

    >>> print(bundle({"dot": "export const r = 1;\\nexport default { r };\\n"}, "modules.dot.r;"))
    (() => {
    "use strict";
    const modules = {};
    (() => {
    const r = 1;
    modules["dot"] = { r };
    })();
    modules.dot.r;
    })();
    """
    parts = ["(() => {", '"use strict";', "const modules = {};"]
    needed = {name: [found[1] for found in IMPORT.findall(source)] for name, source in sorted(modules.items())}
    for name in TopologicalSorter(needed).static_order():
        if name not in modules:
            raise ValueError(f"{name}.mjs is imported, but there is no such module.")
        body, ends = re.subn(
            r"^export default (\{[^}]*\});\s*\Z", f'modules["{name}"] = \\1;', modules[name], flags=re.M
        )
        body = IMPORT.sub(r'const \1 = modules["\2"];', body)
        body = re.sub(r"^export (?=(?:async )?(?:const|let|function|class)\b)", "", body, flags=re.M)
        if ends != 1 or re.search(r"^(?:import|export)\b", body, re.M):
            raise ValueError(
                f'{name}.mjs: import only as in `import {{ name }} from "./other.mjs";`, and end with '
                "`export default { … };` to be bundled."
            )
        parts += ["(() => {", body, "})();"]
    return "\n".join([*parts, host.strip(), "})();"])


def model_script(weights: Path) -> str:
    """A classic script that defines ``iclHiddenRule``: the model's configuration, and its weights file in base64.

    A page on the disk can fetch nothing, so the numbers come as a script.
    """
    config = json.loads(weights.with_suffix(".json").read_text(encoding="utf-8"))["config"]
    model = {"config": config, "weights": base64.b64encode(weights.read_bytes()).decode()}
    return f"globalThis.iclHiddenRule = {json.dumps(model)};\n"


def used_scripts(scripts: list[tuple[str, str, str]], body: str) -> list[bool]:
    """For each script, given as ``(filename, type, text)``, whether a page with this body keeps it."""
    live = "application/vnd.jupyter.widget-view+json" in body
    keep, texts = [], set()
    for filename, kind, text in scripts:
        name = filename.split("?")[0].rsplit("/", 1)[-1]
        is_ipywidgets = name in IPYWIDGETS or kind == "application/vnd.jupyter.widget-state+json"
        # Jupyter Book 1.0.4 declares `const THEBE_JS_URL` twice, which is a syntax error.
        again = "THEBE_JS_URL" in text and text in texts
        texts.add(text)
        keep.append(not (NEEDED.get(name, "") not in body or (is_ipywidgets and not live) or again))
    return keep


def prune_mathjax(folder: Path, kept: tuple[str, ...] = MATHJAX_KEPT) -> None:
    """Delete all files except the named ones and those in the named folders."""
    for file in [path for path in folder.rglob("*") if path.is_file()]:
        name = file.relative_to(folder).as_posix()
        if not any(name == keep or name.startswith(f"{keep}/") for keep in kept):
            file.unlink()
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()


def write_assets(app: Any) -> None:
    """Put the bundle and the style sheets where Sphinx collects static files."""
    if app.builder.format != "html":
        return
    folder = Path(app.doctreedir) / "page-assets"
    folder.mkdir(parents=True, exist_ok=True)
    modules = {path.stem: path.read_text(encoding="utf-8") for path in STATIC.glob("*.mjs")}
    script = bundle(modules, (STATIC / "mount.js").read_text(encoding="utf-8"))
    (folder / SCRIPT).write_text(script, encoding="utf-8")
    (folder / MODEL_SCRIPT).write_text(model_script(MODEL), encoding="utf-8")
    shutil.copyfile(STATIC / STYLE, folder / STYLE)
    for name in EVERYWHERE:
        shutil.copyfile(BOOK / "_static" / name, folder / name)
    app.config.html_static_path.append(str(folder))


def fingerprint(files: Iterable[Path]) -> str:
    """A hash of the names and contents of files."""
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def renew_source_pages(app: Any) -> list[Any]:
    """Make sphinx.ext.viewcode write all its pages: it keeps those of unchanged modules, with their old styles."""
    shutil.rmtree(Path(app.outdir) / "_modules", ignore_errors=True)
    return []


def choose(app: Any, pagename: str, templatename: str, context: dict[str, Any], doctree: Any) -> None:
    """Remove from a page the scripts and style sheets that it does not use."""
    body = context.get("body") or ""
    scripts = context["script_files"]
    described = []
    for script in scripts:
        attributes = getattr(script, "attributes", {})
        filename = str(getattr(script, "filename", script) or "")
        described.append((filename, attributes.get("type", ""), attributes.get("body") or ""))
    kept = used_scripts(described, body)
    context["script_files"][:] = [script for script, keep in zip(scripts, kept, strict=True) if keep]
    if WIDGET not in body:
        context["css_files"][:] = [
            css for css in context["css_files"] if Path(str(getattr(css, "filename", css))).name != STYLE
        ]


def finish(app: Any, exception: Exception | None) -> None:
    """Prune the copy of MathJax after sphinx_mathjax_offline has made it."""
    folder = Path(app.outdir) / "_static" / "mathjax"
    if exception is None and app.builder.format == "html" and folder.is_dir():
        prune_mathjax(folder)


def setup(app: Any) -> dict[str, Any]:
    """Register with Sphinx."""
    # Sphinx copies static files only when it writes a page. It writes a page only if a setting or the text changes.
    app.add_config_value("page_assets", fingerprint([*STATIC.iterdir(), *(BOOK / "_static").iterdir(), MODEL]), "html")
    app.connect("builder-inited", write_assets)
    for script in (MODEL_SCRIPT, SCRIPT):  # the widgets start when the model is there
        app.add_js_file(script, defer="defer")
    app.add_css_file(STYLE)
    for name in EVERYWHERE:
        app.add_js_file(name, defer="defer") if name.endswith(".js") else app.add_css_file(name)
    app.connect("html-collect-pages", renew_source_pages, priority=100)
    app.connect("html-page-context", choose, priority=900)
    app.connect("build-finished", finish, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
