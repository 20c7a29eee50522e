"""The page of claims: what each chapter checked in this build, beside the statement and its source.

- On the page, a directive ``claim`` registers a claim: its name, its statement, its source and what derives it.
- In a chapter, ``icl_lib.paper.claims.claim`` checks it in a cell, and a role ``{claim}`name``` marks the place in the
  text with a small link to its row.
- The row shows the numbers of this build and links back. ``claims.json`` has the same, for programs.

Each claim has one row, one check and one place. Anything else is a warning, which fails the build.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from docutils import nodes
from docutils.parsers.rst import directives
from myst_nb.sphinx_ import NbMetadataCollector
from sphinx.domains import Domain
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective, SphinxRole

if TYPE_CHECKING:  # while Sphinx runs, the library is imported once all extensions are there: see execution.py
    from icl_lib.paper.claims import Claim

KINDS = {
    "identity": "exact identity",
    "measurement": "measurement",
    "figure": "reproduced figure",
    "negative": "negative result",
}
JSON = "claims.json"
LOGGER = logging.getLogger(__name__)
ByPage = Mapping[str, Mapping[str, Any]]


class Unfilled(nodes.General, nodes.Element):
    """To fill when all pages are read: a ``mark`` in a chapter; ``numbers``, ``place`` or ``summary`` of the rows."""


class ClaimRole(SphinxRole):
    """The place in a chapter where a claim is made: a small link to its row."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        return [Unfilled(what="mark", claim=self.text, ids=[f"check-{self.text}"])], []


class ClaimDirective(SphinxDirective):
    """One row of the page: the statement is its content."""

    required_arguments = 1
    has_content = True
    option_spec = {  # noqa: RUF012
        "kind": lambda given: directives.choice(given, tuple(KINDS)),
        "source": directives.unchanged_required,
        "derived": directives.unchanged_required,
    }

    def run(self) -> list[nodes.Node]:
        name, kind = self.arguments[0], self.options.get("kind", "identity")
        row = nodes.container(classes=["claim"], ids=[f"claim-{name}"], names=[f"claim-{name}"])
        self.state.document.note_explicit_target(row)
        statement = nodes.container(classes=["claim-statement"])
        self.state.nested_parse(self.content, self.content_offset, statement)
        source = nodes.paragraph(classes=["claim-source"])
        parts = [self.options.get("source", "")]
        if label := self.options.get("derived"):
            parts.append(f"derived: {{prf:ref}}`{label}`")
        for part in filter(None, parts):
            source += [*self.parse_inline_myst(part), nodes.Text(" · ")]
        source += [Unfilled(what="place", claim=name), nodes.Text(f" · {KINDS[kind]}")]
        row += [statement, Unfilled(what="numbers", claim=name), source]
        entry = {
            "statement": plain(statement),
            "source": re.sub(r"\{cite:\w+\}`(.+?)`", r"\1", self.options.get("source", "")),
            "derived": (label or "").replace("-", "_"),
            "kind": KINDS[kind],
        }
        self.env.get_domain(Claims.name).register(self.env.docname, name, entry)
        return [row]

    def parse_inline_myst(self, text: str) -> list[nodes.Node]:
        """The nodes of a piece of text in the page's own language."""
        found, _ = self.state.inline_text(text, self.lineno)
        return found


class SummaryDirective(SphinxDirective):
    """How many claims of which kind hold, and the link to the file for programs."""

    def run(self) -> list[nodes.Node]:
        return [Unfilled(what="summary", claim="")]


class Claims(Domain):
    """The claims by page: registered in a row, checked in a cell, placed in the text. The environment keeps them."""

    name = "claims"
    label = "claims"
    initial_data = {"registered": {}, "checked": {}, "placed": {}}  # noqa: RUF012

    def register(self, page: str, name: str, entry: dict[str, str]) -> None:
        rows = self.data["registered"].setdefault(page, {})
        if name in rows:
            LOGGER.warning("the claim %r has two rows on this page: remove one.", name, location=page)
        rows[name] = entry

    def process_doc(self, env: Any, docname: str, document: nodes.document) -> None:
        """Keep the claims that the page's cells checked, and the sections in which its text marks them."""
        from icl_lib.paper.claims import GLUE

        marks = [node for node in document.findall(Unfilled) if node["what"] == "mark"]
        self.data["placed"][docname] = {node["claim"]: section_of(node) for node in marks}
        glued = NbMetadataCollector.get_doc_data(env).get(docname, {}).get("glue", [])
        if any(key.startswith(GLUE) for key in glued):
            kept = Path(env.mystnb_config.output_folder) / f"{docname}.glue.json"
            outputs = json.loads(kept.read_text(encoding="utf-8"))
            self.data["checked"][docname] = {
                key.removeprefix(GLUE): outputs[key]["metadata"]["claim"] for key in glued if key.startswith(GLUE)
            }

    def clear_doc(self, docname: str) -> None:
        for pages in self.data.values():
            if isinstance(pages, dict):  # Sphinx keeps the version of the data among them
                pages.pop(docname, None)

    def merge_domaindata(self, docnames: Iterable[str], otherdata: Mapping[str, Any]) -> None:
        for what in self.initial_data:
            self.data[what].update({page: kept for page, kept in otherdata[what].items() if page in docnames})

    def check_consistency(self) -> None:
        for page, fault in faults(self.data["registered"], self.data["checked"], self.data["placed"]):
            LOGGER.warning(fault, location=page)

    def check_of(self, name: str) -> tuple[str, Claim] | tuple[None, None]:
        """The page that checked a claim, and what it found."""
        from icl_lib.paper.claims import Claim

        for page, claims in self.data["checked"].items():
            if name in claims:
                return page, Claim(**claims[name])
        return None, None

    def row_of(self, name: str) -> str | None:
        """The page with the row of a claim."""
        return next((page for page, rows in self.data["registered"].items() if name in rows), None)


def faults(registered: ByPage, checked: ByPage, placed: ByPage) -> Iterator[tuple[str, str]]:
    """What is wrong with the claims of a book, with the page to mend.

    >>> list(faults({"claims": {"a": {}}}, {"one": {"a": {}}}, {"one": {"a": ""}}))
    []
    >>> list(faults({"claims": {"a": {}}}, {}, {}))
    [('claims', "no chapter checks the claim 'a': call claim('a', …) in a cell, or remove its row.")]
    """
    rows = [name for page in registered.values() for name in page]
    checks = [name for page in checked.values() for name in page]
    for page, claims in checked.items():
        for name in claims:
            if name not in rows:
                yield page, f"the claim {name!r} is not registered: give it a row on the page of claims."
            if checks.count(name) > 1:
                yield page, f"the claim {name!r} is checked on several pages: give each check a name of its own."
            if name not in placed.get(page, {}):
                yield page, f"the claim {name!r} has no place: write {{claim}}`{name}` where the text states it."
    for page, marks in placed.items():
        for name in marks:
            if name not in checked.get(page, {}):
                yield page, f"the text marks the claim {name!r}, which no cell of this page checks: call claim()."
    for page, claims in registered.items():
        for name in claims:
            if rows.count(name) > 1:
                yield page, f"the claim {name!r} has rows on several pages: remove one."
            if name not in checks:
                yield (
                    page,
                    f"no chapter checks the claim {name!r}: call claim({name!r}, …) in a cell, or remove its row.",
                )


def section_of(node: nodes.Node) -> str:
    """The title of the section in which a node stands, unless it is the page's own."""
    parent = node.parent
    while parent is not None and not isinstance(parent, nodes.section):
        parent = parent.parent
    inner = parent is not None and isinstance(parent.parent, nodes.section)
    return parent.next_node(nodes.title).astext() if inner else ""


def plain(node: nodes.Node) -> str:
    """The text of a statement in one line, with its formulas between dollar signs."""
    if isinstance(node, nodes.math | nodes.math_block):
        return f"${node.astext().strip()}$"
    if isinstance(node, nodes.Text):
        return node.astext()
    inside = " " if isinstance(node, nodes.container) else ""
    return " ".join(inside.join(map(plain, node.children)).split()) if inside else "".join(map(plain, node.children))


class Fill(SphinxPostTransform):
    """Put what the whole book has checked into marks and rows."""

    default_priority = 3  # before references are resolved

    def run(self, **kwargs: Any) -> None:
        self.claims = self.env.get_domain(Claims.name)
        for node in list(self.document.findall(Unfilled)):
            node.replace_self(getattr(self, node["what"])(node))

    def link(self, page: str, anchor: str, text: str, title: str = "") -> nodes.reference:
        address = self.app.builder.get_relative_uri(self.env.docname, page)
        more = {"reftitle": title} if title else {}
        return nodes.reference("", text, internal=True, refuri=f"{address}#{anchor}", **more)

    def mark(self, node: Unfilled) -> nodes.Node:
        _, found = self.claims.check_of(node["claim"])
        row = self.claims.row_of(node["claim"])
        mark = nodes.inline("", ids=node["ids"], classes=["claim-mark"])
        title = f"Checked in this build: {found.result}. Control: {found.control_result}." if found else ""
        mark += self.link(row, f"claim-{node['claim']}", "✓", title) if row else nodes.Text("✓")
        return mark

    def numbers(self, node: Unfilled) -> nodes.Node:
        _, found = self.claims.check_of(node["claim"])
        shown = nodes.paragraph(classes=["claim-numbers"])
        if found is None:
            return shown
        shown += nodes.strong("", f"✓ {found.result}")
        shown += [nodes.Text(" "), nodes.inline("", f"control: {found.control_result}", classes=["claim-control"])]
        return shown

    def place(self, node: Unfilled) -> list[nodes.Node]:
        page, _ = self.claims.check_of(node["claim"])
        if page is None:
            return [nodes.Text("not checked")]
        section = self.claims.data["placed"].get(page, {}).get(node["claim"], "")
        where = f"{self.env.titles[page].astext()}{section and ': '}{section}"
        return [nodes.Text("checked in "), self.link(page, f"check-{node['claim']}", where)]

    def summary(self, node: Unfilled) -> nodes.Node:
        kinds = [row["kind"] for rows in self.claims.data["registered"].values() for row in rows.values()]
        counted = ", ".join(f"{kind}: {kinds.count(kind)}" for kind in KINDS.values() if kind in kinds)
        checked = (
            "1 claim was checked, and it holds" if len(kinds) == 1 else f"{len(kinds)} claims were checked, all hold"
        )
        text = f"In this build {checked} ({counted}). For programs: "
        return nodes.paragraph("", text, nodes.reference("", JSON, internal=True, refuri=JSON), nodes.Text("."))


def entries(claims: Claims, address: Any) -> list[dict[str, Any]]:
    """The rows as they are written for programs; ``address`` gives the address of a page."""
    found = []
    for page, rows in claims.data["registered"].items():
        for name, row in rows.items():
            where, checked = claims.check_of(name)
            if checked is not None:
                links = {"row": f"{address(page)}#claim-{name}", "place": f"{address(where)}#check-{name}"}
                found.append({**row, **checked.__dict__, "holds": True, **links})
    return found


def rewrite(app: Any, env: Any) -> list[str]:
    """Write the pages with rows in every build, also if only a chapter has changed."""
    return list(env.get_domain(Claims.name).data["registered"])


def write_json(app: Any, exception: Exception | None) -> None:
    """Write the claims for programs, beside the page that lists them."""
    if exception is not None or app.builder.format != "html":
        return
    claims = app.env.get_domain(Claims.name)
    for page in claims.data["registered"]:
        found = entries(claims, app.builder.get_target_uri)
        file = Path(app.outdir, page).with_name(JSON)
        file.write_text(json.dumps(found, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def setup(app: Any) -> dict[str, Any]:
    """Register with Sphinx."""
    app.add_node(Unfilled)
    app.add_role("claim", ClaimRole())
    app.add_directive("claim", ClaimDirective)
    app.add_directive("claims-summary", SummaryDirective)
    app.add_domain(Claims)
    app.add_post_transform(Fill)
    app.connect("env-updated", rewrite)
    app.connect("build-finished", write_json)
    return {"parallel_read_safe": True, "parallel_write_safe": True, "env_version": 1}
