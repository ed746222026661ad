"""HTML by templates: it lies in a package's `templates/`, and whatever text is put into it is escaped."""

import re
from base64 import b64encode
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape


def templates(package: str) -> Environment:
    """Return the templates of a package, with filters `png` (bytes to an image's source) and `emphasised` (*words*)."""
    made = Environment(
        loader=PackageLoader(package),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    made.filters["png"] = lambda content: f"data:image/png;base64,{b64encode(content).decode()}"
    made.filters["emphasised"] = lambda text: Markup(re.sub(r"\*(.+?)\*", r"<i>\1</i>", str(escape(text))))
    return made


def macros(package: str) -> Any:
    """Return the macros of a package's `templates/parts.html` as functions from texts to `markupsafe.Markup`."""
    return templates(package).get_template("parts.html").module


def read_text(package: str, name: str) -> str:
    """Return a file of a package's `templates/` as it is: a style sheet, a script."""
    source, _, _ = PackageLoader(package).get_source(Environment(), name)
    return source
