"""From a notebook to one HTML file that needs nothing else: no network, no server, no kernel."""

import html
import re
from collections.abc import Mapping
from pathlib import Path

import nbformat
import papermill
from nbconvert import HTMLExporter
from nbformat import NotebookNode
from traitlets.config import Config

from splitlab.core.paths import ROOT
from splitlab.core.storage import writing

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; base-uri 'none'"
"""Content security policy of the page: the browser refuses every request, whatever a cell may have put into it."""

STYLE = """
:root { --ink: #1c2430; --soft: #5b6675; --line: #d9dee5; --wash: #f5f7f9; --link: #0b5cad; }
* { box-sizing: border-box; }
html { scroll-behavior: smooth; scroll-padding-top: 1rem; }
body { margin: 0; background: #fff; color: var(--ink);
  font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif; }
main { max-width: 1020px; margin: 0 auto; padding: 1.5rem 1.5rem 5rem; }
h1 { font-size: 2rem; line-height: 1.2; margin: 1rem 0 0.5rem; }
h2 { font-size: 1.45rem; margin: 3rem 0 0.8rem; padding-bottom: 0.3rem; border-bottom: 2px solid var(--line); }
h3 { font-size: 1.1rem; margin: 2rem 0 0.5rem; }
p, li { max-width: 76ch; }
li { margin: 0.35rem 0; }
a { color: var(--link); }
a.anchor-link, .prompt, .jp-InputPrompt, .jp-OutputPrompt { display: none; }
code { background: var(--wash); padding: 0.1em 0.3em; border-radius: 3px; font-size: 0.9em; }
nav { font-size: 0.9rem; border: 1px solid var(--line); border-radius: 6px; padding: 0.7rem 1rem; margin: 1rem 0; }
nav strong { display: block; color: var(--soft); font-weight: 600; }
nav ol { list-style: none; margin: 0.3rem 0 0; padding: 0; }
nav li { margin: 0.2rem 0; line-height: 1.35; }
nav a { text-decoration: none; }
nav a:hover { text-decoration: underline; }
.table { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: 0.86rem; line-height: 1.4; width: 100%;
  font-variant-numeric: tabular-nums; }
th { text-align: left; vertical-align: bottom; background: var(--wash); border-bottom: 2px solid var(--line); }
td, th { padding: 0.42rem 0.6rem; }
td { border-bottom: 1px solid var(--line); vertical-align: top; }
td.number, th.number { text-align: right; }
td.number { white-space: nowrap; }
td.number, th.number { padding-left: 0.4rem; padding-right: 0.4rem; }
td.name { white-space: nowrap; }
td ul { margin: 0; padding-left: 1.1em; }
td li { margin: 0 0 0.35rem; }
tr.group th { background: #fff; padding-top: 1rem; border-bottom: 1px solid #aab4c0; }
tr.group th small { color: var(--soft); font-weight: 400; margin-left: 0.8em; }
td.says { width: 23%; font-weight: 600; }
td.setting { min-width: 15.5rem; font-weight: 600; }
td code { white-space: normal; }
td small, .note { color: var(--soft); font-size: 0.86em; }
td small { display: block; margin-top: 0.4rem; font-weight: 400; white-space: normal; max-width: 30em; }
.verdict { display: inline-block; white-space: nowrap; padding: 0.1rem 0.55rem; border-radius: 1rem; font-weight: 600;
  border: 1px solid; }
.holds { color: #00543a; background: #dff3ea; border-color: #7cc4a5; }
.holds-in-part { color: #6b4a00; background: #fdf0cf; border-color: #dfb64f; }
.refuted { color: #8a2c00; background: #fde3d5; border-color: #e5976b; }
.not-measured { color: #4a5563; background: #eceff3; border-color: #b8c0ca; }
figure { margin: 1.2rem 0 1.8rem; }
figure img { max-width: 100%; height: auto; cursor: zoom-in; display: block; }
figcaption { color: var(--soft); font-size: 0.88rem; max-width: 84ch; margin-top: 0.4rem; }
figure.zoomed { position: fixed; inset: 0; z-index: 10; margin: 0; padding: 1rem; background: #fff; overflow: auto; }
figure.zoomed img { max-width: none; min-width: 100%; cursor: zoom-out; }
@media (min-width: 1360px) {
  main { margin-left: max(270px, calc(50vw - 510px)); }
  nav { position: fixed; top: 2rem; left: max(1rem, calc(50vw - 510px - 260px)); width: 240px; margin: 0;
    max-height: calc(100vh - 4rem); overflow: auto; }
}
@media print { nav { display: none; } h2, h3 { break-after: avoid; } figure, tr { break-inside: avoid; } }
"""

SCRIPT = """
const toggle = image => image.closest("figure").classList.toggle("zoomed");
document.querySelectorAll("figure img").forEach(image => {
  image.tabIndex = 0;
  image.title = "click to enlarge";
  image.addEventListener("click", () => toggle(image));
  image.addEventListener("keydown", event => { if (event.key === "Enter") toggle(image); });
});
document.addEventListener("keydown", event => {
  if (event.key === "Escape")
    document.querySelectorAll("figure.zoomed").forEach(figure => figure.classList.remove("zoomed"));
});
"""


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
    """Return an executed notebook as one HTML page: no code, no widgets, no cell tagged "interactive"."""
    notebook.metadata.pop("widgets", None)
    config = Config()
    config.TagRemovePreprocessor.enabled = True
    config.TagRemovePreprocessor.remove_cell_tags = {"interactive", "parameters", "injected-parameters"}
    exporter = HTMLExporter(
        config=config, template_name="basic", exclude_input=True, exclude_output_prompt=True, exclude_input_prompt=True
    )
    for name in ("mathjax_url", "require_js_url", "jupyter_widgets_base_url", "mermaid_js_url"):
        setattr(exporter, name, "")
    body, _ = exporter.from_notebook_node(notebook)
    heading = re.search(r"<h1[^>]*>(.*?)(?:<a |</h1>)", body, re.DOTALL)
    title = html.escape(_plain(heading[1])) if heading else "splitlab"
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<main>\n{_with_contents(body)}\n</main>\n"
        f"<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def _with_contents(body: str) -> str:
    """Put a table of contents, made of the second-level headings, in front of the first of them."""
    headings = re.findall(r'<h2 id="([^"]*)">(.*?)(?:<a |</h2>)', body, re.DOTALL)
    items = "".join(f'<li><a href="#{anchor}">{html.escape(_plain(text))}</a></li>' for anchor, text in headings)
    nav = f'<nav aria-label="Contents"><strong>Contents</strong><ol>{items}</ol></nav>\n' if items else ""
    return body.replace("<h2 ", f"{nav}<h2 ", 1)


def _plain(text: str) -> str:
    """Strip tags and entities from a heading."""
    return html.unescape(re.sub(r"<[^>]+>", "", text)).strip()
