"""Figures and tables with numbers and captions, whatever a cell shows: a picture, a table, an explorer, a widget.

The directive stands below the cell whose output it names, or below a table that is typed::

    :::{caption} fig-removal
    **The edit grows as more examples leave the prompt.** Left: the norm of the edit. …
    :::

- ``:kind: table`` makes it a table: a series of numbers of its own, and the caption above.
- The text refers to it by ``{numref}`fig-removal```.
- If the cell's code is folded, the fold stands below the caption.
"""

from __future__ import annotations

from typing import Any

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.transforms import SphinxTransform
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

LOGGER = logging.getLogger(__name__)


class NumberedTable(nodes.figure):
    """A figure that Sphinx counts among the tables."""


class Caption(nodes.General, nodes.Element):
    """The caption of what is above it, until the whole page is read."""


class CaptionDirective(SphinxDirective):
    """Name, number and describe the output of the cell, or the table, above."""

    required_arguments = 1
    has_content = True
    option_spec = {"kind": lambda given: directives.choice(given, ("figure", "table"))}  # noqa: RUF012

    def run(self) -> list[nodes.Node]:
        self.assert_has_content()
        label, kind = self.arguments[0], self.options.get("kind", "figure")
        made = (NumberedTable if kind == "table" else nodes.figure)(
            names=[label], classes=["numbered", f"numbered-{kind}"]
        )
        self.state.document.note_explicit_target(made)
        text = nodes.Element()
        self.state.nested_parse(self.content, self.content_offset, text)
        first, *others = text.children
        made += nodes.caption(first.rawsource, "", *first.children)
        if others:
            made += nodes.legend("", *others)
        caption = Caption("", made)
        self.set_source_info(caption)
        return [caption]


class Wrap(SphinxTransform):
    """Move each output and each table with a caption into its figure."""

    default_priority = 400  # after the cells are read, before labels and numbers are collected

    def apply(self, **kwargs: Any) -> None:
        for caption in list(self.document.findall(Caption)):
            made, parent = caption.children[0], caption.parent
            above = parent[parent.index(caption) - 1]
            shown = above if isinstance(above, nodes.table) else next(filter(is_output, above.children), None)
            if shown is None:
                LOGGER.warning(
                    "the caption %r is not below a table or a cell with an output.", made["names"][0], location=caption
                )
                caption.replace_self([])
                continue
            folded = above.get("hide_mode") == "input"
            parent.remove(caption)
            parent.insert(parent.index(above) + (0 if folded else 1), made)
            shown.parent.remove(shown)
            made.insert(0, nodes.container("", shown, classes=["cell"]))  # the style puts a table's caption above it
            if above is not shown and not above.children:
                parent.remove(above)


def is_output(node: nodes.Node) -> bool:
    """Whether a part of a cell is its outputs."""
    return isinstance(node, nodes.container) and node.get("nb_element") == "cell_code_output"


def visit(translator: Any, node: NumberedTable) -> None:
    """Write it as a figure is written."""
    translator.visit_figure(node)


def depart(translator: Any, node: NumberedTable) -> None:
    """Write its end."""
    translator.depart_figure(node)


def title_of(node: nodes.Node) -> str | None:
    """The text of a caption."""
    return next((part.astext() for part in node.children if isinstance(part, nodes.caption)), None)


def setup(app: Any) -> dict[str, Any]:
    """Register with Sphinx."""
    app.add_enumerable_node(NumberedTable, "table", title_of, html=(visit, depart))
    app.add_node(Caption)
    app.add_directive("caption", CaptionDirective)
    app.add_transform(Wrap)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
