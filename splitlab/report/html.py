"""From a notebook to one HTML file that needs nothing else: no network, no server, no kernel."""

import html
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import nbformat
import papermill
from nbconvert.filters import markdown2html
from nbformat import NotebookNode

from splitlab.core.paths import ROOT
from splitlab.core.storage import writing
from splitlab.core.templates import templates


def execute(notebook: Path, executed: Path, parameters: Mapping[str, str]) -> NotebookNode:
    """Run a notebook from the project root with papermill; keep the executed copy and return it."""
    with writing(executed):
        executed.parent.mkdir(parents=True, exist_ok=True)
        papermill.execute_notebook(
            str(notebook),
            str(executed),
            parameters=dict(parameters),
            kernel_name="python3",
            progress_bar=False,
            cwd=str(ROOT),
        )
    return nbformat.read(executed, as_version=4)


def page(notebook: NotebookNode) -> str:
    """Return an executed notebook as one HTML page: its prose, and what cells show as HTML or Markdown.

    Code, widgets, printed text and cells tagged "interactive" stay out.
    """
    body = "\n".join(_parts(notebook))
    title, chapters = _headings(body, 1), _headings(body, 2)
    opening, mark, rest = body.partition("<h2 ")  # contents stand before the first chapter
    template = templates("splitlab.report").get_template("page.html")
    return template.render(
        title=title[0][1] if title else "splitlab", chapters=chapters, opening=opening, body=mark + rest
    )


def _parts(notebook: NotebookNode) -> Iterator[str]:
    for cell in notebook.cells:
        if "interactive" in cell.metadata.get("tags", ()):
            continue
        shown = [{"text/markdown": cell.source}] if cell.cell_type == "markdown" else cell.get("outputs", [])
        for data in (output.get("data", output) for output in shown):
            if "text/html" in data:
                yield data["text/html"]
            elif "text/markdown" in data:
                yield markdown2html(data["text/markdown"])


def _headings(body: str, level: int) -> list[tuple[str, str]]:
    """Return (anchor, text) of the headings of a level; the anchor's own sign is no text."""
    found = re.findall(rf'<h{level} id="([^"]*)">(.*?)(?:<a class="anchor-link"|</h{level}>)', body, re.DOTALL)
    return [(anchor, html.unescape(re.sub(r"<[^>]+>", "", text)).strip()) for anchor, text in found]
