"""The bibliography in the form of the citations: sorted by author, labelled by author and year, with links back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from docutils import nodes
from pybtex.plugin import register_plugin
from pybtex.style.formatting.unsrt import Style
from pybtex.style.labels import BaseLabelStyle
from sphinx.transforms.post_transforms import SphinxPostTransform


def names(last: list[str]) -> str:
    """The authors as a citation names them.

    >>> names(["Innocenti", "Achour"]), names(["Garg", "Tsipras", "Liang"])
    ('Innocenti and Achour', 'Garg et al.')
    """
    return f"{last[0]} et al." if len(last) > 2 or last[1:] == ["others"] else " and ".join(last)


class AuthorYearLabels(BaseLabelStyle):
    """Labels such as "Brown et al., 2020"."""

    def format_labels(self, sorted_entries: Iterable[Any]) -> Iterator[str]:
        for entry in sorted_entries:
            people = entry.persons.get("author") or entry.persons.get("editor") or []
            last = [" ".join(str(name) for name in [*p.rich_prelast_names, *p.rich_last_names]) for p in people]
            yield ", ".join(filter(None, [names(last) if last else entry.key, entry.fields.get("year")]))


class AuthorYearStyle(Style):
    """The style ``author_year`` of a bibliography."""

    default_label_style = "author_year"
    default_sorting_style = "author_year_title"


class LinksBack(SphinxPostTransform):
    """Below each entry of the bibliography, links to the first citation on each page that cites it."""

    default_priority = 6  # right after sphinxcontrib.bibtex has made the entries
    formats = ("html",)

    def run(self, **kwargs: Any) -> None:
        domain = self.env.get_domain("cite")
        entries = [
            entry for bibliography in domain.bibliographies.values() for entry in bibliography.citation_nodes.items()
        ]
        keys = {id(node): key for key, node in entries}
        for node in list(self.document.findall(nodes.citation)):
            places: dict[str, str] = {}
            for ref in domain.citation_refs:
                if keys.get(id(node)) in {target.key for target in ref.targets}:
                    places.setdefault(ref.docname, ref.citation_ref_id)
            if places:
                node += self.links(places)

    def links(self, places: dict[str, str]) -> nodes.paragraph:
        """The sentence with the links, to an anchor on each page."""
        paragraph = nodes.paragraph("", "Cited in: ", classes=["cited-in"])
        root = self.config.root_doc
        order = [root, *self.env.toctree_includes.get(root, [])]
        for i, page in enumerate(sorted(places, key=lambda page: order.index(page) if page in order else len(order))):
            address = f"{self.app.builder.get_relative_uri(self.env.docname, page)}#{places[page]}"
            title = self.env.titles[page].astext()
            paragraph += [nodes.Text(", " if i else ""), nodes.reference("", title, internal=True, refuri=address)]
        paragraph += nodes.Text(".")
        return paragraph


def setup(app: Any) -> dict[str, Any]:
    """Register with pybtex and with Sphinx."""
    register_plugin("pybtex.style.labels", "author_year", AuthorYearLabels)
    register_plugin("pybtex.style.formatting", "author_year", AuthorYearStyle)
    app.add_post_transform(LinksBack)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
