"""What all panels are built from: choices, rows, areas for HTML, and errors shown where they belong."""

from collections.abc import Callable, Iterator, Sequence
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


class Panel(widgets.VBox):
    """A column of widgets. Bad input shows in `message`, in place of a traceback, whichever control brought it."""

    make_it = MAKE_IT

    def __init__(self) -> None:
        super().__init__()
        self.message = widgets.HTML()
        self._quiet = False

    def run_reported(self, handler: Callable[[], None]) -> None:
        """Call a handler, with its errors in `message` and without those handlers that its changes would call."""
        with reported(self.message, make_it=self.make_it), self.quietly():
            handler()

    def lay_out(self, *children: widgets.Widget) -> None:
        """Show `children`, in the explorer's style."""
        self.children = [widgets.HTML(markup.STYLE), *children]

    def when(self, handler: Callable[[], None], *controls: widgets.Widget) -> None:
        """Call `handler` when the user changes one of `controls`, not when another handler does."""

        def handle(change: object) -> None:
            if not self._quiet:
                self.run_reported(handler)

        for control in controls:
            control.observe(handle, "value")

    @contextmanager
    def quietly(self) -> Iterator[None]:
        """Change controls in the block without calling what they are observed by."""
        before, self._quiet = self._quiet, True
        try:
            yield
        finally:
            self._quiet = before


def run_rows(config: TrainConfig) -> list[tuple[str, str]]:
    """Say in two rows what a run is."""
    return [("run", run_label(config)), ("defences", config.defences.label)]


def dropdown(description: str, options: Sequence[Any] = (), *, width: str = "min(640px, 100%)") -> widgets.Dropdown:
    """Return a choice among `options`, its name in front."""
    layout = widgets.Layout(width=width)
    return widgets.Dropdown(description=description, options=options, layout=layout, style=DESCRIBED)


def slider(description: str, **options: Any) -> widgets.IntSlider:
    """Return a wide slider, its name in front."""
    return widgets.IntSlider(description=description, layout=WIDE, style=DESCRIBED, **options)


def checkbox(description: str, *, value: bool = True) -> widgets.Checkbox:
    """Return a box to tick, its name behind."""
    return widgets.Checkbox(description=description, value=value, indent=False, layout=widgets.Layout(width="170px"))


def row(children: Sequence[widgets.Widget]) -> widgets.HBox:
    """Lay widgets side by side, as far as there is room."""
    return widgets.HBox(children, layout=widgets.Layout(flex_flow="row wrap", align_items="center"))


def htmls(count: int) -> list[widgets.HTML]:
    """Return empty areas for HTML."""
    return [widgets.HTML() for _ in range(count)]
