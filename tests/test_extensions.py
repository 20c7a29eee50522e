"""The parts of the book's Sphinx extensions that need no build."""

from __future__ import annotations

import doctest
import json
import re

import bibliography
import byline
import claims
import docstrings
import execution
import formulas
import markup
import meanings
import notebooks
import page_assets
import previews
import pytest
import repository
import section_search
import symbols
from conftest import ROOT
from docutils import nodes
from pybtex.database import parse_string
from sphinx.errors import ConfigError

from icl_lib.widgets.page import page_html

MODULES = [
    bibliography,
    byline,
    claims,
    docstrings,
    execution,
    formulas,
    markup,
    meanings,
    notebooks,
    page_assets,
    previews,
    repository,
    section_search,
    symbols,
]


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_examples(module):
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0


@pytest.mark.parametrize(
    ("remote", "page"),
    [
        ("https://github.com/owner/name", "https://github.com/owner/name"),
        ("https://github.com/owner/name.git\n", "https://github.com/owner/name"),
        ("https://github.com/owner/name/", "https://github.com/owner/name"),
        ("http://example.org/owner/name.js.git", "https://example.org/owner/name.js"),
        ("git@github.com:owner/name.git", "https://github.com/owner/name"),
        ("example.org:owner/name", "https://example.org/owner/name"),
        ("ssh://git@example.org:2222/owner/name.git", "https://example.org/owner/name"),
        ("https://example.org:8443/owner/name", "https://example.org:8443/owner/name"),
        ("https://gitlab.com/group/part/name.git", "https://gitlab.com/group/part/name"),
        ("https://EXAMPLE.org/Owner/Name", "https://example.org/Owner/Name"),
        ("https://user:p%40ss@example.org/owner/name", "https://example.org/owner/name"),
        ("https://token@example.org/owner/name.git", "https://example.org/owner/name"),
    ],
)
def test_addresses_of_hosts(remote, page):
    assert repository.page_address(remote) == page


@pytest.mark.parametrize(
    "remote",
    [
        "",
        "/srv/git/name.git",
        "../name",
        "./owner/name",
        "name",
        r"C:\work\owner\name",
        "C:/code/owner/name",
        "file:///srv/git/owner/name",
        "git://example.org/owner/name",
        "ftp://example.org/owner/name",
        "javascript://example.org/owner/name",
        "javascript:alert(1)",
        "ext::sh -c whoami",
        "https://localhost/owner/name",
        "http://127.0.0.1:8080/owner/name",
        "http://[::1]/owner/name",
        "http://[::1/owner/name",
        "https://example.org:port/owner/name",
        "https://example.org/owner",
        "https://example.org/",
        "https://example.org/owner/../../name",
        "https://example.org/owner/name?token=secret",
        "https://example.org/owner/name#secret",
        'https://example.org/owner/"><script>alert(1)</script>',
        "https://example.org/owner/na me",
        "https://exam ple.org/owner/name",
        "https://example.org\\@evil.org/owner/name",
        "git@example.org:/owner/name;rm",
        "git@machine:owner/name",
    ],
)
def test_addresses_that_no_reader_can_open(remote):
    assert repository.page_address(remote) is None


def test_no_buttons_without_an_address():
    assert repository.theme_options(None) == {}


def test_buttons_only_where_the_host_has_them():
    github = repository.theme_options("https://github.com/owner/name", "main", "paper")
    assert github["launch_buttons"] == {"binderhub_url": "https://mybinder.org", "notebook_interface": "jupyterlab"}
    assert (github["use_repository_button"], github["use_issues_button"]) == (True, True)
    assert (github["repository_branch"], github["path_to_docs"]) == ("main", "paper")
    other = repository.theme_options("https://example.org/owner/name")
    assert other["use_repository_button"]
    assert not other["use_issues_button"]
    assert "launch_buttons" not in other
    assert "launch_buttons" not in repository.theme_options("https://gitlab.com/group/part/name")


def test_git_answers_or_is_silent(tmp_path):
    assert repository.git(tmp_path, "remote", "get-url", "origin") is None


@pytest.fixture
def library(tmp_path):
    folder = tmp_path / "lib"
    (folder / "part").mkdir(parents=True)
    (folder / "a.py").write_text("x = 1")
    (folder / "part" / "b.mjs").write_text("const y = 2;")
    return folder


def test_cache_key_follows_contents_names_and_versions(library):
    key = execution.cache_key([library], ["torch==1"])
    assert key == execution.cache_key([library], ["torch==1"])
    keys = [key, execution.cache_key([library], ["torch==2"])]
    (library / "a.py").write_text("x = 2")
    keys.append(execution.cache_key([library], ["torch==1"]))
    (library / "part" / "b.mjs").rename(library / "part" / "c.mjs")
    keys.append(execution.cache_key([library], ["torch==1"]))
    (library / "empty.py").write_text("")
    keys.append(execution.cache_key([library], ["torch==1"]))
    assert len(set(keys)) == len(keys)


def test_cache_key_ignores_comments_and_layout_of_python_alone(library):
    key = execution.cache_key([library])
    (library / "a.py").write_text("# why\nx = (\n    1\n)\n")
    assert execution.cache_key([library]) == key
    keys = [key]
    for name, text in (
        ("a.py", '"""Said."""\nx = 1'),
        ("a.py", "x = 1.0"),
        ("a.py", "x = (1 1)  # no syntax"),
        ("part/b.mjs", "const y = 2;  "),
    ):
        (library / name).write_text(text)
        keys.append(execution.cache_key([library]))
    assert len(set(keys)) == len(keys)


def test_cache_key_ignores_compiled_python_and_missing_folders(library, tmp_path):
    key = execution.cache_key([library])
    (library / "part" / "__pycache__").mkdir()
    (library / "part" / "__pycache__" / "b.cpython-311.pyc").write_bytes(b"\0")
    assert execution.cache_key([library, tmp_path / "missing"]) == key


def test_installed_versions():
    assert [line.split("==")[0] for line in execution.installed_versions("pytest>=8  # tests\nPlaywright\n-e .\n")] == [
        "playwright",
        "pytest",
    ]


def test_bundle_of_the_library():
    static = ROOT / "icl_lib" / "static"
    script = page_assets.bundle({path.stem: path.read_text() for path in static.glob("*.mjs")}, "")
    assert not re.search(r"^\s*(import|export)\b", script, re.MULTILINE)
    assert set(re.findall(r'modules\["(\w+)"\] =', script)) == {path.stem for path in static.glob("*.mjs")}


@pytest.mark.parametrize(
    "source",
    [
        "const render = 1;\n",
        'import x from "x";\nexport default { render };\n',
        "export default { render };\nconst more = 1;\n",
        "export default { a };\nexport default { b };\n",
        "const a = 1;\nexport { a };\nexport default { a };\n",
    ],
)
def test_bundle_refuses_what_it_cannot_take(source):
    with pytest.raises(ValueError, match=r"^odd\.mjs: .* end with"):
        page_assets.bundle({"odd": source}, "")


def test_bundle_puts_a_module_behind_those_that_it_imports():
    user = 'import { one, two } from "./second.mjs";\nexport const three = one + two;\nexport default { three };\n'
    script = page_assets.bundle(
        {"first": user, "second": "const [one, two] = [1, 2];\nexport default { one, two };"}, ""
    )
    assert script.index('modules["second"] = { one, two };') < script.index('const { one, two } = modules["second"];')
    with pytest.raises(ValueError, match=r"^second\.mjs is imported, but there is no such module"):
        page_assets.bundle({"first": user}, "")


def test_scripts_that_a_page_keeps():
    scripts = [
        ("_static/widgets.js?v=1", "", ""),
        ("https://a.example/require.min.js", "", ""),
        ("https://b.example/dist/embed-amd.js", "", ""),
        ("", "application/vnd.jupyter.widget-state+json", "{}"),
        ("", "", 'const THEBE_JS_URL = "x"'),
        ("", "", "var twice;"),
        ("", "", "var twice;"),
        ("_static/doctools.js", "", ""),
        ("_static/clipboard.min.js", "", ""),
    ]

    def kept(body: str) -> list[int]:
        return [i for i, keep in enumerate(page_assets.used_scripts(scripts, body)) if keep]

    assert kept("<p>") == [5, 8]
    assert kept(page_html("explore", {}, "")) == [0, 5, 8]
    assert kept('<script type="application/vnd.jupyter.widget-view+json">') == [1, 2, 3, 5, 8]


def test_the_rules_that_a_page_can_use():
    css = """/* .gone{} */ @charset "utf-8"; a:not(.b, .c) .d, .e{color:red} @media (width > 1px){.b{top:0} .d{top:1px}}
    .bs-tooltip-top{left:0} @font-face{font-family:Font Awesome; src:url(x)} .fa{x:y} @keyframes fa-spin{to{x:y}}"""
    expected = "a:not(.b, .c) .d{color:red}@media (width > 1px){.d{top:1px}}.bs-tooltip-top{left:0}"
    assert page_assets.used_rules(css, {"d", "fa"}) == expected


def test_formulas_are_set_also_in_the_frames_of_a_widget():
    formula = '<span class="math notranslate">\\(a &lt; b\\)</span>'
    frames = json.dumps({"frames": [f"<p>{formula}</p>", None, "no formula \\(x\\)"]}).replace("</", "<\\/")
    numbered = '<div class="math"><span class="eqno">(1)<a href="#x">#</a></span>\\[x^2\\]</div>'
    script = f'<script type="application/json">{frames}</script>'
    page = formulas.with_formulas(f"<head></head>{formula}{numbered}{script}", "fonts")
    assert page.count("<mjx-container") == 3
    assert "<mo>&lt;</mo>" in page.partition("<script")[0]
    state = json.loads(re.search(r"json\">(.*?)</script>", page)[1])
    assert "<mjx-container" in state["frames"][0]
    assert state["frames"][1:] == [None, "no formula \\(x\\)"]
    assert re.search(r'</a></span><mjx-container [^>]*display="true"', page)
    assert formulas.with_formulas("<head></head>", "fonts") == "<head></head>"
    for wrong in ("\\undefinedcommand", "x^"):
        with pytest.raises(ValueError, match=r"MathJax cannot read the formula .*: "):
            formulas.with_formulas(formula.replace("a &lt; b", wrong), "fonts")


def test_sections_are_found_with_their_text():
    page = """<nav>menu</nav><article><section id="a"><h1>First<a class="headerlink" href="#a">#</a></h1><p>Some
    <em>text</em>.</p><pre>code</pre><mjx-math>x</mjx-math><section id="b"><h2>Second</h2><svg>tick</svg><p>More</p>
    </section>
    <dl><dt class="sig sig-object" id="icl_lib.f">f(x)</dt><dd><p>It adds.</p></dd></dl></section></article>"""
    found = list(section_search.sections(page))
    assert found == [("a", "First", "Some text."), ("b", "Second", "More"), ("icl_lib.f", "f", "It adds.")]


def test_mathematics_of_docstrings():
    text = [
        "The norm $\\|a_0\\|$, of cost \\$5 and ``$x$``.",
        "",
        "    $$x = 1,",
        "      y = 2$$",
        ">>> price = '$1 or $2'",
    ]
    assert docstrings.with_math(text) == [
        "The norm :math:`\\|a_0\\|`, of cost \\$5 and ``$x$``.",
        "",
        "",
        "    .. math::",
        "",
        "       x = 1,",
        "       y = 2",
        "",
        ">>> price = '$1 or $2'",
    ]


def document(paragraphs: list[list[str | nodes.Node]]) -> nodes.document:
    doctree = nodes.document(None, None)
    for parts in paragraphs:
        doctree += nodes.paragraph("", "", *(nodes.Text(part) if isinstance(part, str) else part for part in parts))
    return doctree


@pytest.mark.parametrize(
    ("paragraphs", "expected"),
    [
        ([["One. Two, which is short. Three."]], "One. Two, which is short. Three."),
        ([["One."], ["Two?"]], "One. Two?"),
        ([["Short.", " " + "A" + 250 * "a" + ". After."]], "Short."),
        ([["A" + 250 * "a" + ". After."]], "A" + 250 * "a" + "."),
        ([["First. Then ", nodes.math("", "x"), " is set. Last."]], "First."),
        ([["First. ", nodes.math("", "x"), " is set. Last."]], "First."),
        ([["Let ", nodes.math("", "x"), " be set. Last."]], "Last."),
        ([["It holds (Dherin et al. [2025], v. 4). A list follows:"]], "It holds (Dherin et al. [2025], v. 4)."),
        ([[nodes.math("", "x")]], ""),
    ],
)
def test_a_description_is_whole_sentences_without_formulas(paragraphs, expected):
    assert previews.description(document(paragraphs)) == expected


@pytest.mark.parametrize("address", ["example.org", "ftp://example.org", "https://", "https://a b", 'https://a"b'])
def test_addresses_of_the_site_that_are_refused(address):
    with pytest.raises(ConfigError, match=r"ICL_LIB_SITE_URL is .*: give the site's address"):
        previews.site_url(address)


def test_labels_name_the_authors_as_citations_do():
    entries = parse_string(
        """@misc{a, author = {von Oswald, Johannes and Sacramento, Jo{\\~a}o and Vladymyrov, Max}, year = {2023}}
        @misc{b, author = {Akyürek, Ekin}, year = {2022}}
        @misc{c, editor = {Brown, Tom and others}, year = {2020}}
        @misc{d, title = {No author}}""",
        "bibtex",
    ).entries.values()
    labels = list(bibliography.AuthorYearLabels().format_labels(entries))
    assert labels == ["von Oswald et al., 2023", "Akyürek, 2022", "Brown et al., 2020", "d"]


def test_a_page_without_folds_or_viewport_is_not_changed():
    page = '<head><meta name="description" content="viewport"></head><summary aria-label="Contents">…</summary>'
    assert markup.corrected(page) == page


def test_every_symbol_with_one_atom_on_the_notation_page_is_explained():
    everywhere, own = meanings.by_page((ROOT / "book" / "notation.md").read_text(encoding="utf-8"))
    assert everywhere["\\boldsymbola_0"] == "a₀: the MLP's input without the removed part"
    assert "A" not in everywhere, "a bare letter holds only on the pages of its section"
    assert own["trained-attention"]["A"] != own["deriving"]["A"]
    for page in own.values():
        for symbol, meaning in page.items():
            assert not re.search(r"\\|\$|^, |, :", meaning), (symbol, meaning)
    said = meanings.explained(r"(W + \Delta W)\, \boldsymbol a_0 = W \boldsymbol a_C", own["deriving"])
    assert [line.split(":")[0] for line in said.split("\n")] == ["W, b", "ΔW", "a₀", "a_C"]
