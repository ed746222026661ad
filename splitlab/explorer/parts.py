"""What all panels are built from: choices, rows, areas for HTML, and errors shown where they belong."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ipywidgets as widgets
from markupsafe import Markup

from splitlab.core.errors import InputError
from splitlab.explorer import markup
from splitlab.explorer.explore import run_label
from splitlab.split.config import TrainConfig

WIDE = widgets.Layout(width="min(640px, 100%)")
DESCRIBED = {"description_width": "84px"}
MAKE_IT = Markup("<code>dvc repro</code> makes what is missing.")


@contextmanager
def reported(area: widgets.HTML, *, make_it: str = MAKE_IT) -> Iterator[None]:
    """Show bad or missing input in `area`, with the command that makes it, in place of a traceback."""
    try:
        yield
        area.value = ""
    except InputError as error:
        area.value = markup.message(error, hint="" if "dvc" in str(error) else make_it)


def run_rows(config: TrainConfig) -> list[tuple[str, str]]:
    """Say in two rows what a run is."""
    return [("run", run_label(config)), ("defences", config.defences.label)]


def dropdown(description: str, options: Sequence[Any] = (), *, width: str = "min(640px, 100%)") -> widgets.Dropdown:
    """Return a choice among `options`, its name in front."""
    layout = widgets.Layout(width=width)
    return widgets.Dropdown(description=description, options=options, layout=layout, style=DESCRIBED)


def checkbox(description: str, *, value: bool = True) -> widgets.Checkbox:
    """Return a box to tick, its name behind."""
    return widgets.Checkbox(description=description, value=value, indent=False, layout=widgets.Layout(width="170px"))


def row(children: Sequence[widgets.Widget]) -> widgets.HBox:
    """Lay widgets side by side, as far as there is room."""
    return widgets.HBox(children, layout=widgets.Layout(flex_flow="row wrap", align_items="center"))


def htmls(count: int) -> list[widgets.HTML]:
    """Return empty areas for HTML."""
    return [widgets.HTML() for _ in range(count)]
