"""The chapters as notebooks that read like the site, in any program that opens notebooks.

A chapter is written in MyST. Its roles and boxes are unknown outside the site: a reader would see the name of a number
in place of the number. In these notebooks they are plain Markdown: numbers, citations with links, titles, theorems.

- The build of the site writes one notebook for each page, which the page offers for download. The numbers are those of
  the build.
- ``python book/_ext/notebooks.py`` runs every chapter, writes its notebook beside it, and prints the time and the
  memory that it took. Binder does this once for each state of the repository (``.binder/postBuild``).
- ``python book/_ext/notebooks.py --executed FOLDER`` writes them with their outputs. It takes these from the last build
  of the site, and runs what that does not have.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import itertools
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import byline
import execution
import nbformat
import yaml
from bibliography import names
from execution import ROOT
from jupyter_cache import get_cache
from myst_nb.core.read import read_myst_markdown_notebook
from pybtex.database import parse_file

BOOK = ROOT / "book"
FOLDED = {"remove-cell", "remove-input", "hide-input"}
"""The tags of cells whose code the site hides or folds."""
ABOUT = "A page of *In-context learning as weight updates*."
RUN = """\
The numbers in the text are those of the run that made this notebook. Run all cells for the tables and figures; some
cells are folded."""
NEEDED = "The cells need the library, `pip install 'icl_lib[llm,widgets]{source}'`{data}."
DATA = ", and the folder `book/data` of the repository, as `data` beside this notebook"
GLUE = '''\
def glue(name, value, display=False):
    """Do nothing: the text shows the value already."""'''
_BOX = re.compile(r"(?P<fence>:{3,})\{(?P<kind>[\w:-]+)\} ?(?P<title>.*)")
_OPTION = re.compile(r":(?P<name>[\w-]+): ?(?P<value>.*)")
_LABEL = re.compile(r"^\((?P<label>[\w-]+)\)=\n+#+ (?P<title>.+)", re.M)
_ROLE = re.compile(r"\{(?P<role>[a-z][a-z:]*)\}`(?P<given>[^`]+)`")
_NAMED = re.compile(r"(?P<text>.+?)\s*<(?P<target>[^<>]+)>", re.S)


def pages(toc: str) -> list[str]:
    """The pages of a table of contents in reading order.

    >>> pages("{root: book/index, parts: [{chapters: [{file: book/one, sections: [{file: book/one/a}]}]}]}")
    ['index', 'one', 'one/a']
    """
    read = yaml.safe_load(toc)
    return [file.removeprefix("book/") for file in [read["root"], *_files(read)]]


def _files(entry: Mapping[str, Any]) -> Iterator[str]:
    for part in entry.get("parts", []):
        yield from _files(part)
    for child in [*entry.get("chapters", []), *entry.get("sections", [])]:
        yield child["file"]
        yield from _files(child)


def boxes(lines: Iterable[str], show: Callable[[str, str, dict[str, str], list[str]], Iterable[str]]) -> Iterator[str]:
    """Replace each box of MyST by the lines ``show(kind, title, options, lines)``, the outermost boxes only.

    >>> list(boxes([":::{tip} A title", ":label: x", "", "Text.", ":::", "After."], lambda *box: [str(box)]))
    ["('tip', 'A title', {'label': 'x'}, ['Text.'])", 'After.']
    """
    lines = iter(lines)
    for line in lines:
        found = _BOX.fullmatch(line.rstrip())
        if found is None:
            yield line
            continue
        body = list(itertools.takewhile(lambda line, end=found["fence"]: line.rstrip() != end, lines))
        given = list(itertools.takewhile(lambda pair: pair is not None, map(_OPTION.fullmatch, body)))
        options = {option["name"]: option["value"] for option in given}
        yield from show(found["kind"], found["title"], options, "\n".join(body[len(given) :]).strip("\n").split("\n"))


def quoted(lines: Iterable[str]) -> Iterator[str]:
    """The lines as a quotation, each displayed formula in one line: programs differ in how they read a longer one.

    >>> list(quoted(["Let", "", "$$", "x =", "y", "$$"]))
    ['> Let', '>', '> $$ x = y $$']
    """
    formula: list[str] | None = None
    for line in lines:
        if line.strip() == "$$":
            if formula is not None:
                yield f"> $$ {' '.join(formula)} $$"
            formula = [] if formula is None else None
        elif formula is not None:
            formula.append(line.strip())
        else:
            yield f"> {line}".rstrip()


def can_show(text: str) -> bool:
    """Whether a notebook can show a page: Sphinx writes those of the library, of the claims and of the literature."""
    return not any(written in text for written in ("{eval-rst}", "{claims-summary}", "{bibliography}"))


class Book:
    """What the roles of the pages refer to.

    Args:
        folder: of the pages and of ``references.bib``.
        listed: the pages in reading order.
        source: where pip finds the library, such as `` @ git+https://…``; empty if it is unknown or installed.
        installed: whether the notebooks are for a machine that has the library and the repository, as Binder has.
    """

    def __init__(self, folder: Path, listed: Iterable[str], source: str = "", installed: bool = False) -> None:
        self.texts = {page: (folder / f"{page}.md").read_text(encoding="utf-8") for page in listed}
        self.source, self.installed = source, installed
        self.notebooks = [page for page, text in self.texts.items() if can_show(text)]
        self.titles: dict[str, tuple[str, str]] = {}
        numbers: Counter[str] = Counter()
        for page, text in self.texts.items():
            self.titles |= {found["label"]: (page, found["title"]) for found in _LABEL.finditer(text)}
            for label, title in self._numbered(text, numbers):
                self.titles[label] = (page, title)
        self.sources = parse_file(str(folder / "references.bib")).entries

    @staticmethod
    def _numbered(text: str, numbers: Counter[str]) -> Iterator[tuple[str, str]]:
        """Yield the label and the number of each statement, figure and exercise, as the site counts them."""
        found: list[tuple[str, str]] = []

        def note(kind: str, title: str, options: dict[str, str], body: list[str]) -> list[str]:
            label = options.get("label")
            if kind == "caption":
                kind, label = options.get("kind", "figure"), title
            if label:
                kind = kind.removeprefix("prf:").capitalize()
                numbers[kind] += 1
                found.append((label, f"{kind} {numbers[kind]}"))
            return list(boxes(body, note))

        list(boxes(text.split("\n"), note))
        yield from found

    def link(self, page: str, text: str) -> str:
        """A link to another page, or its text if that has no notebook."""
        return f"[{text}]({page}.ipynb)" if page in self.notebooks else text

    def citation(self, key: str, in_text: bool) -> str:
        """The authors and the year, with a link to the source."""
        entry = self.sources[key]
        last = [" ".join([*person.prelast_names, *person.last_names]) for person in entry.persons["author"]]
        who, year, fields = names([name.strip("{}") for name in last]), entry.fields["year"], entry.fields
        addresses = {"eprint": "https://arxiv.org/abs/", "doi": "https://doi.org/", "url": ""}
        address = next((start + fields[name] for name, start in addresses.items() if name in fields), None)
        said = f"{who} ({year})" if in_text else f"{who}, {year}"
        return f"[{said}]({address})" if address else said

    def role(self, name: str, given: str, here: str, values: Mapping[str, str]) -> str:
        """What a role of MyST shows on the page ``here``."""
        named = _NAMED.fullmatch(given)
        target, text = (named["target"], named["text"]) if named else (given, None)
        if name in ("glue:", "glue:text"):
            return values[given]
        if name in ("cite:t", "cite:p"):
            cited = [self.citation(key.strip(), name == "cite:t") for key in given.split(",")]
            return " and ".join(cited) if name == "cite:t" else f"({'; '.join(cited)})"
        if name in ("ref", "prf:ref", "numref"):
            if target not in self.titles:
                raise ValueError(f"{{{name}}}`{given}` on the page {here}: no page has this label.")
            page, title = self.titles[target]
            return text or title if page == here else self.link(page, text or title)
        if name == "minutes":
            return byline.duration(given)
        if name == "claim":  # a small link to the page of claims
            return ""
        if name in ("func", "class", "mod", "meth", "attr"):
            return f"`{text or (target.split('.')[-1] if target.startswith('~') else target)}`"
        raise ValueError(f"{{{name}}}`{given}`: no notebook can show this role yet; see {Path(__file__).name}.")

    def box(self, kind: str, title: str, options: dict[str, str], body: list[str]) -> list[str]:
        """What a box of MyST shows, as lines of Markdown."""
        if kind == "grid":
            return list(boxes(body, self.box))
        if kind == "grid-item-card":
            return [f"- {self.link(options['link'], title)} " + " ".join(body)]
        if kind == "caption":
            return [f"**{self.titles[title][1]}.** " + body[0], *body[1:]]
        if kind == "prf:proof":
            return ["**Proof.** " + body[0], *body[1:]]
        if kind == "exercise":
            return [f"**{self.titles[options['label']][1]}.** " + body[0], *body[1:]]
        if kind == "solution":
            summary = f"<summary>Solution to {self.titles[title][1]}</summary>"
            return ["<details>", summary, "", *body, "", "</details>"]
        if kind == "margin":
            return list(quoted(body))
        if kind == "admonition":
            return list(quoted([f"**{title}**", "", *body]))
        if kind.startswith("prf:"):
            return list(quoted([f"**{self.titles[options['label']][1]}** ({title}).", "", *body]))
        raise ValueError(f"{{{kind}}} {title}: no notebook can show this box yet; see {Path(__file__).name}.")

    def markdown(self, text: str, here: str, values: Mapping[str, str]) -> str:
        """The text of a page as plain Markdown, with the values of the glued names."""
        text = "\n".join(boxes(re.sub(r"^\([\w-]+\)=\n+", "", text, flags=re.M).split("\n"), self.box))
        return _ROLE.sub(lambda found: self.role(found["role"], found["given"], here, values), text)

    def about(self, page: str) -> str:
        """What a notebook says about itself, below its title."""
        said = [ABOUT]
        if "{code-cell}" in self.texts[page]:
            said.append(RUN)
            if not self.installed:
                said.append(NEEDED.format(source=self.source, data=DATA if '"data' in self.texts[page] else ""))
        return "\n".join(quoted("\n".join(said).split("\n")))

    def notebook(self, page: str, values: Mapping[str, str]) -> nbformat.NotebookNode:
        """The notebook of a page. Each heading begins a cell, and a slide if the notebook is converted to slides."""
        cells = []
        for cell in read_myst_markdown_notebook(self.texts[page]).cells:
            if cell.cell_type == "code":
                made = nbformat.v4.new_code_cell(re.sub(r"^from myst_nb import glue$", GLUE, cell.source, flags=re.M))
                if FOLDED & set(cell.metadata.get("tags", [])):
                    made.metadata.jupyter = {"source_hidden": True}
                cells.append(made)
                continue
            for part in re.split(r"\n(?=#{1,3} )", self.markdown(cell.source, page, values)):
                text = re.sub(r"^# .+", rf"\g<0>\n\n{self.about(page)}", part).strip()
                made = nbformat.v4.new_markdown_cell(text)
                if text.startswith("#"):
                    made.metadata.slideshow = {"slide_type": "slide"}
                cells.append(made)
        for number, cell in enumerate(cells):
            cell.id = f"{page}-{number}"  # the same in each build
        metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
        return nbformat.v4.new_notebook(cells=cells, metadata=metadata)


def value(data: Mapping[str, Any]) -> str:
    """The text of a glued value, without the quotes of a string.

    >>> value({"text/plain": "'0.3'"}), value({"application/papermill.record/text/plain": "12"})
    ('0.3', '12')
    """
    text = "".join(next(text for kind, text in data.items() if kind.endswith("text/plain")))
    return ast.literal_eval(text) if text[:1] in ("'", '"') else text


def glued(cells: Iterable[Any]) -> dict[str, str]:
    """The glued values among the outputs of executed cells."""
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    glued = [output for output in outputs if "scrapbook" in output.get("metadata", {})]
    return {output["metadata"]["scrapbook"]["name"]: value(output["data"]) for output in glued}


def write_all(app: Any, exception: Exception | None) -> None:
    """Write the notebooks of all pages among the sources of the site."""
    if exception is not None or app.builder.format != "html":
        return
    address = app.config.html_theme_options.get("repository_url")
    book = Book(BOOK, _built(app), f" @ git+{address}" if address else "")
    for page in book.notebooks:
        kept = Path(app.outdir).parent / "jupyter_execute" / "book" / f"{page}.glue.json"  # as MyST-NB writes it
        outputs = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
        values = {name: value(output["data"]) for name, output in outputs.items() if "text/plain" in output["data"]}
        path = Path(app.outdir) / "_sources" / "book" / f"{page}.ipynb"
        path.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(book.notebook(page, values), path)


def _built(app: Any) -> list[str]:
    listed = pages((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    return [page for page in listed if f"book/{page}" in app.env.found_docs]


def offer(app: Any, pagename: str, templatename: str, context: dict[str, Any], doctree: Any) -> None:
    """Make the theme offer the notebook of a page for download."""
    source = ROOT / f"{pagename}.md"
    if doctree is not None and source.exists() and can_show(source.read_text(encoding="utf-8")):
        context["ipynb_source"] = f"{pagename}.ipynb"


def to_notebook(buttons: list[dict[str, Any]], page: str) -> None:
    """Let the buttons that open a chapter on a server open its notebook.

    >>> buttons = [{"buttons": [{"url": "https://host/v2/gh/a/b/main?urlpath=lab/tree/book/cost.md"}]}]
    >>> to_notebook(buttons, "book/cost")
    >>> buttons[0]["buttons"][0]["url"]
    'https://host/v2/gh/a/b/main?urlpath=lab/tree/book/cost.ipynb'
    """
    for button in buttons:
        to_notebook(button.get("buttons", []), page)
        if "urlpath=" in button.get("url", ""):
            button["url"] = button["url"].replace(f"{page}.md", f"{page}.ipynb")


def launch(app: Any, pagename: str, templatename: str, context: dict[str, Any], doctree: Any) -> None:
    """Open the notebooks in Binder, where ``.binder/postBuild`` has written them."""
    to_notebook(context.get("header_buttons", []), pagename)


def run(text: str) -> Any:
    """The notebook of a page, run from its beginning."""
    from nbclient import NotebookClient

    read = read_myst_markdown_notebook(text)
    if any(cell.cell_type == "code" for cell in read.cells):
        NotebookClient(read, timeout=600, resources={"metadata": {"path": str(BOOK)}}).execute()
    return read


def with_outputs(page: nbformat.NotebookNode, ran: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook of a page with the outputs of its run: widgets as on the site, glued values in the text only."""
    pairs = zip(_code(page), _code(ran), strict=True)
    for cell, source in pairs:
        cell.execution_count = source.execution_count
        cell.outputs = [output for output in source.outputs if "scrapbook" not in output.get("metadata", {})]
        for output in cell.outputs:
            if "text/html" in output.get("data", {}):
                output.data.pop("application/vnd.jupyter.widget-view+json", None)
    return page


def _code(page: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in page.cells if cell.cell_type == "code"]


def write_executed(folder: Path) -> None:
    """Write every chapter with its outputs, and the data that the chapters read beside them."""
    execution.use_this_checkout()
    book = Book(BOOK, pages((ROOT / "_toc.yml").read_text(encoding="utf-8")))
    cache = get_cache(execution.cache_folder(ROOT / "_build"))
    for page in book.notebooks:
        ran = None
        with contextlib.suppress(KeyError):  # the cache does not have it
            _, ran = cache.merge_match_into_notebook(read_myst_markdown_notebook(book.texts[page]))
        ran = ran or run(book.texts[page])
        path = folder / f"{page}.ipynb"
        path.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(with_outputs(book.notebook(page, glued(ran.cells)), ran), path)
    shutil.copytree(BOOK / "data", folder / "data", dirs_exist_ok=True)
    print(f"{len(book.notebooks)} notebooks are written: {folder}")


def main() -> None:
    """Run every chapter and write its notebook beside it; print the seconds and the memory of each."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--executed", type=Path, metavar="FOLDER", help="write them with outputs into this folder")
    if folder := parser.parse_args().executed:
        write_executed(folder)
        return
    took: dict[str, dict[str, float]] = {}
    execution.use_this_checkout()
    execution.watch_kernels(lambda: page, took.__setitem__)
    book = Book(BOOK, pages((ROOT / "_toc.yml").read_text(encoding="utf-8")), installed=True)
    for page in book.notebooks:
        read = run(book.texts[page])
        if page in took:
            print(f"{page}: {took[page]['seconds']:.0f} s, {took[page]['peak_mib']} MiB", flush=True)
        nbformat.write(book.notebook(page, glued(read.cells)), BOOK / f"{page}.ipynb")


def setup(app: Any) -> dict[str, Any]:
    """Register with Sphinx; the theme adds its buttons between the two events of a page."""
    app.connect("html-page-context", offer, priority=100)
    app.connect("html-page-context", launch, priority=950)
    app.connect("build-finished", write_all, priority=950)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


if __name__ == "__main__":
    main()
