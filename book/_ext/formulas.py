"""Formulas are set when the book is built: a page needs no script to show them.

MathJax runs in a small JavaScript engine. Each formula becomes HTML for the eye and MathML for screen readers, also in
the frames of widgets. A page has the style rules of its own formulas, and the site has MathJax's fonts. A formula that
MathJax cannot read fails the build.
"""

from __future__ import annotations

import functools
import html
import importlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import quickjs
from sphinx.errors import ExtensionError
from sphinx.ext.mathjax import html_visit_displaymath, html_visit_math

RENDERER = "typeset"
FONTS = "mathjax"
MATHJAX = Path(importlib.import_module("sphinx-mathjax-offline").__file__).parent / "static" / "mathjax"
COMPONENTS = ("loader", "core", "adaptors/liteDOM", "input/tex-full", "output/chtml", "output/chtml/fonts/tex")
ACCESSIBLE = "a11y/assistive-mml"
# MathJax sees no page here, so it cannot measure the text around a formula. Its letters are lower than those of fonts
# for screens.
SCALE = 1.15
BEFORE = """
globalThis.MathJax = { startup: { ready() {} }, loader: { load: [] } };
globalThis.setTimeout = globalThis.clearTimeout = () => 0;
"""
# A string that was put together step by step reaches Python only as JSON.
AFTER = """
const { mathjax, input, output, adaptors, handlers, a11y } = MathJax._;
const adaptor = adaptors.liteAdaptor.liteAdaptor();
a11y["assistive-mml"].AssistiveMmlHandler(handlers.html_ts.RegisterHTMLHandler(adaptor));
const formatError = (_, error) => { throw error; };
globalThis.typeset = (formulas, fontURL, scale) => {
  const InputJax = new input.tex_ts.TeX({ packages: ["base", "ams", "newcommand", "boldsymbol"], formatError });
  const OutputJax = new output.chtml_ts.CHTML({ font: new output.chtml.fonts.tex_ts.TeXFont({ fontURL }), scale });
  const page = mathjax.mathjax.document("", { InputJax, OutputJax });
  const set = JSON.parse(formulas).map(([tex, display]) => {
    try {
      return [adaptor.outerHTML(page.convert(tex, { display })), ""];
    } catch (error) {
      return ["", error.message];
    }
  });
  return JSON.stringify([set, adaptor.textContent(OutputJax.styleSheet(page))]);
};
"""
_FORMULA = re.compile(
    r'(?P<before><(?P<tag>span|div) class="math\b[^>]*>\s*(?:<span class="eqno">.*?</a></span>)?)'
    r"\\(?P<kind>[(\[])(?P<tex>.*?)\\[)\]](?=\s*</(?P=tag)>)",
    re.DOTALL,
)
_STATE = re.compile(r'(?<=<script type="application/json">).*?(?=</script>)', re.DOTALL)


@functools.cache
def engine() -> quickjs.Context:
    """A JavaScript engine with MathJax."""
    context = quickjs.Context()
    sources = [(MATHJAX / f"{name}.js").read_text(encoding="utf-8") for name in (*COMPONENTS, ACCESSIBLE)]
    for source in (BEFORE, *sources, AFTER):
        context.eval(f"{source}\n;0")
    return context


def typeset(formulas: list[tuple[str, bool]], fonts: str) -> tuple[list[str], str]:
    """The HTML of formulas, given as ``(TeX, is displayed)``, and their style rules; ``fonts`` is the fonts' address.

    Raises `ValueError` for a formula that MathJax cannot read.

    >>> (formula,), rules = typeset([("x^2", False)], "fonts")
    >>> "<msup><mi>x</mi><mn>2</mn></msup>" in formula, 'url("fonts/MathJax_Main-Regular.woff")' in rules
    (True, True)
    """
    found, rules = json.loads(engine().get("typeset")(json.dumps(formulas), fonts, SCALE))
    for (tex, _), (_, error) in zip(formulas, found, strict=True):
        if error:
            raise ValueError(f"MathJax cannot read the formula {tex.strip()!r}: {error}.")
    return [shown for shown, _ in found], rules


def replace(page: str, each: Callable[[str, bool], str]) -> str:
    """The same page with ``each(TeX, is displayed)`` in place of the formulas, also of those in a widget's state.

    >>> replace('<span class="math notranslate">\\\\(a &lt; b\\\\)</span>', lambda tex, display: f"{tex} {display}")
    '<span class="math notranslate">a < b False</span>'
    """

    def text(given: str) -> str:
        return _FORMULA.sub(lambda m: m["before"] + each(html.unescape(m["tex"]), m["kind"] == "["), given)

    def values(given: Any) -> Any:
        if isinstance(given, dict):
            return {name: values(value) for name, value in given.items()}
        if isinstance(given, list):
            return [values(value) for value in given]
        return text(given) if isinstance(given, str) else given

    def state(found: re.Match[str]) -> str:
        return json.dumps(values(json.loads(found[0])), ensure_ascii=False).replace("</", "<\\/")

    # A widget's state is changed only if there is a formula in it.
    return _STATE.sub(lambda found: state(found) if 'class=\\"math' in found[0] else found[0], text(page))


def with_formulas(page: str, fonts: str) -> str:
    """The same page with its formulas set, and with their style rules."""
    formulas: dict[tuple[str, bool], str] = {}
    replace(page, lambda tex, display: formulas.setdefault((tex, display), ""))
    if not formulas:
        return page
    shown, rules = typeset(list(formulas), fonts)
    formulas = {
        given: each.replace(" ", f' data-tex="{html.escape(given[0].strip())}" ', 1)  # book.js copies it
        for given, each in zip(formulas, shown, strict=True)
    }
    page = replace(page, lambda tex, display: formulas[tex, display])
    rules = re.sub(r"\s*\n\s*", "", rules)
    return page.replace("</head>", f"<style>{rules}</style>\n</head>", 1)


def install(app: Any) -> None:
    """Set the formulas of every page that the builder's templates make, and add the fonts."""
    if app.builder.format != "html":
        return
    folder = Path(app.doctreedir) / "formulas"
    shutil.copytree(MATHJAX / "output" / "chtml" / "fonts" / "woff-v2", folder / FONTS, dirs_exist_ok=True)
    app.config.html_static_path.append(str(folder))
    render = app.builder.templates.render

    def render_and_set(template: str, context: dict[str, Any]) -> str:
        page = render(template, context)
        try:
            return with_formulas(page, f"{context.get('content_root', '')}_static/{FONTS}")
        except ValueError as error:
            raise ExtensionError(f"{context.get('pagename')}: {error}") from error

    app.builder.templates.render = render_and_set


def setup(app: Any) -> dict[str, Any]:
    """Register with Sphinx: the pages have TeX, as for MathJax, until they are finished."""
    app.add_html_math_renderer(RENDERER, (html_visit_math, None), (html_visit_displaymath, None))
    app.connect("builder-inited", install)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
