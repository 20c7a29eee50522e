"""What each page loads: only files of the site itself, and only those that the page uses.

- The widgets' ES modules become one classic deferred script: a module cannot be loaded from ``file://``.
- The small language model becomes another, which a widget loads after the page is drawn: see mount.js.
- RequireJS, the ipywidgets manager and the widgets' saved state stay only on pages with a live ipywidgets view.
- A page loads neither an icon font nor what Sphinx needs for its own search; book.js loads ours when a reader searches.
- The theme's style sheet has ten times the rules that the book uses: pages load those that they can use.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
from collections.abc import Container, Iterable, Iterator, Mapping
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

BOOK = Path(__file__).resolve().parents[1]
STATIC = BOOK.parent / "icl_lib" / "static"
MODEL = BOOK.parent / "icl_lib" / "paper" / "hidden_rule" / "hidden_rule.safetensors"
SCRIPT, MODEL_SCRIPT, STYLE = "widgets.js", "hidden_rule.js", "widgets.css"
EVERYWHERE = ("book.js", "book.css", "icons.css")
UNUSED = (  # scripts and styles that the theme and the extensions give to each page, and none uses
    "design-tabs.js",
    "doctools.js",
    "fontawesome.js",
    "language_data.js",
    "searchindex.js",
    "searchtools.js",
    "sphinx-thebe.css",
    "sphinx-thebe.js",
    "sphinx_highlight.js",
)
THEME, THEME_USED = "styles/pydata-sphinx-theme.css", "styles/theme-used.css"
WIDGET = '<div class="icl-widget"'  # how icl_lib.widgets.page_html begins
IMPORT = re.compile(r'^import (\{[^}]*\}) from "\./(\w+)\.mjs";$', re.MULTILINE)
NEEDED = {  # in the body of a page that loads the file
    SCRIPT: WIDGET,
    STYLE: WIDGET,
    "sphinx-design.min.css": 'class="sd-',
    "exercise.css": "exercise",
    "proof.css": 'class="proof',
    "togglebutton.css": "dropdown",
    "togglebutton.js": "dropdown",
}
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


def used(filename: str, body: str) -> bool:
    """Whether a page with this body uses a script or a style sheet.

    >>> used("_static/widgets.js?v=1", "<p>"), used("_static/widgets.js?v=1", '<div class="icl-widget">')
    (False, True)
    """
    name = filename.split("?")[0].rsplit("/", 1)[-1]
    return name not in UNUSED and NEEDED.get(name, "") in body


def used_scripts(scripts: list[tuple[str, str, str]], body: str) -> list[bool]:
    """For each script, given as ``(filename, type, text)``, whether a page with this body keeps it."""
    live = "application/vnd.jupyter.widget-view+json" in body
    keep, texts = [], set()
    for filename, kind, text in scripts:
        name = filename.split("?")[0].rsplit("/", 1)[-1]
        is_ipywidgets = name in IPYWIDGETS or kind == "application/vnd.jupyter.widget-state+json"
        again = bool(text) and text in texts  # the extension of the folds says the same twice
        texts.add(text)
        keep.append(used(filename, body) and (live or not is_ipywidgets) and "THEBE_JS_URL" not in text and not again)
    return keep


def without_unused(page: str) -> str:
    """The finished page without the unused scripts that the theme's templates name, and with its used rules.

    >>> without_unused('<script src="searchindex.js"></script><link href="styles/pydata-sphinx-theme.css?digest=1">')
    '<link href="styles/theme-used.css">'
    """
    names = "|".join(map(re.escape, UNUSED))
    page = re.sub(rf'\s*<script\b[^>]*\bsrc="(?:[^"]*/)?(?:{names})(?:\?[^"]*)?"[^>]*></script>', "", page)
    return re.sub(rf'{re.escape(THEME)}(?:\?[^"]*)?(?=")', THEME_USED, page)


def blocks(css: str) -> Iterator[tuple[str, str]]:
    """Yield the rules of a style sheet without comments: what is before the braces, and what is in them.

    >>> list(blocks("@charset 'x';a{b:c}@media print{d{e:f}}"))
    [('a', 'b:c'), ('@media print', 'd{e:f}')]
    """
    start = depth = opened = 0
    for brace in re.finditer(r"[{}]", css):
        depth += 1 if brace[0] == "{" else -1
        if brace[0] == "{" and depth == 1:
            opened = brace.start()
        elif brace[0] == "}" and depth == 0:
            yield css[start:opened].rpartition(";")[2].strip(), css[opened + 1 : brace.start()]
            start = brace.end()


def used_rules(css: str, classes: Container[str]) -> str:
    """The rules of a style sheet that can apply to elements with these classes only. Icon fonts are left out.

    >>> used_rules(".a .b{c:d}.a,.e{f:g}@media print{.e{h:i}}.fa-x{j:k}", {"a", "b", "fa-x"})
    '.a .b{c:d}.a{f:g}'
    """
    kept = []
    for before, inside in blocks(re.sub(r"/\*.*?\*/", "", css, flags=re.DOTALL)):
        if before.startswith(("@media", "@supports")):
            inside = used_rules(inside, classes)
        elif not before.startswith("@"):
            selectors = re.split(r",(?![^(]*\))", before)
            before = ",".join(selector for selector in selectors if _can_apply(selector, classes))
        if before and inside and "Font Awesome" not in inside and not before.startswith("@keyframes fa-"):
            kept.append(f"{before}{{{inside}}}")
    return "".join(kept)


def _can_apply(selector: str, classes: Container[str]) -> bool:
    """Whether all classes that a selector requires are known; those in parentheses may be excluded or alternatives."""
    named = re.findall(r"\.((?:\\.|[\w-])+)", re.sub(r"\([^()]*(?:\([^()]*\)[^()]*)*\)", "", selector))
    # The tooltips' classes are put together by a script, and icons.css has rules of its own for the icons.
    return all(name.startswith("bs-") or (name in classes and not name.startswith("fa")) for name in named)


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
    context["css_files"][:] = [css for css in context["css_files"] if used(str(getattr(css, "filename", css)), body)]


def install(app: Any) -> None:
    """Make every page lighter that the builder's templates make."""
    if app.builder.format == "html":
        render = app.builder.templates.render
        app.builder.templates.render = lambda template, context: without_unused(render(template, context))


def finish(app: Any, exception: Exception | None) -> None:
    """Write the used rules of the theme, and remove from the site what no page loads."""
    if exception is not None or app.builder.format != "html":
        return
    site = Path(app.outdir)
    static = site / "_static"
    classes: set[str] = set()
    for page in site.rglob("*.html"):
        for found in re.findall(r'\bclass=\\?"([^"\\]*)', page.read_text(encoding="utf-8")):
            classes.update(found.split())
    for script in static.rglob("*.js"):
        if script.name not in UNUSED:
            classes.update(re.findall(r"[\w-]+", script.read_text(encoding="utf-8")))
    rules = (static / THEME).read_text(encoding="utf-8")
    (static / THEME_USED).write_text(used_rules(rules, classes), encoding="utf-8")
    shutil.rmtree(static / "vendor", ignore_errors=True)
    for file in [path for path in static.rglob("*") if path.name in UNUSED or path.suffix == ".map"]:
        file.unlink()
    (site / "searchindex.js").unlink(missing_ok=True)


def setup(app: Any) -> dict[str, Any]:
    """Register with Sphinx."""
    # Sphinx copies static files only when it writes a page. It writes a page only if a setting or the text changes.
    app.add_config_value("page_assets", fingerprint([*STATIC.iterdir(), *(BOOK / "_static").iterdir(), MODEL]), "html")
    app.connect("builder-inited", write_assets)
    app.connect("builder-inited", install)
    app.add_js_file(SCRIPT, defer="defer")
    app.add_css_file(STYLE)
    for name in EVERYWHERE:
        app.add_js_file(name, defer="defer") if name.endswith(".js") else app.add_css_file(name)
    app.connect("html-collect-pages", renew_source_pages, priority=100)
    app.connect("html-page-context", choose, priority=900)
    app.connect("build-finished", finish, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
