"""Play the history of an inversion of a federated update."""

import ipywidgets as widgets

from splitlab.core.pixels import to_uint8
from splitlab.explorer import markup
from splitlab.explorer.explore import png
from splitlab.explorer.parts import DESCRIBED, WIDE, dropdown, htmls, reported, row
from splitlab.explorer.update_explore import Inverted, side_by_side


class InversionPanel(widgets.VBox):
    """Play an inversion's history: a federated update, an attack on it, and a slider over its evaluations."""

    def __init__(self, inverted: Inverted):
        super().__init__()
        self.inverted = inverted
        self.cell, self.attack = dropdown("updates"), dropdown("attack")
        self.update = widgets.IntSlider(description="update", max=0, layout=WIDE, style=DESCRIBED)
        self.frame = widgets.IntSlider(description="progress", max=0, readout=False, layout=WIDE, style=DESCRIBED)
        self.play = widgets.Play(min=0, max=0, interval=400, description="play")
        self.about, self.pictures, self.message = htmls(3)
        widgets.jslink((self.play, "value"), (self.frame, "value"))
        self.children = [widgets.HTML(markup.STYLE), self.message]
        with reported(self.message):
            self._cells = inverted.cells
            self.cell.options, self.cell.value = list(self._cells), next(iter(self._cells))
            self._load_cell()
            controls = (self.cell, self.attack, self.update, row([self.play, self.frame]))
            self.children = [*self.children, *controls, self.about, self.pictures]
        for widget, handler in (
            *((self.cell, self._load_cell), (self.attack, self._load)),
            *((self.update, self._load), (self.frame, self._show)),
        ):
            widget.observe(lambda change, handler=handler: handler(), "value")

    def _load_cell(self) -> None:
        with reported(self.message):
            cell = self._cells[self.cell.value]
            self.update.value, self.update.max = 0, self.inverted.n_updates(cell) - 1
            names = self.inverted.attacks(cell)
            self.attack.options = list(names.items())
            self.attack.value = next(iter(names.values()))
            self._load()

    def _load(self) -> None:
        with reported(self.message):
            cell = self._cells[self.cell.value]
            self.progress = self.inverted.progress(cell, self.attack.value, self.update.value)
            self.frame.max = self.play.max = len(self.progress.frames) - 1
            self.frame.value = self.frame.max
            self._show()

    def _show(self) -> None:
        with reported(self.message):
            count, _ = self.progress.frames[self.frame.value]
            picture = png(to_uint8(side_by_side(self.progress, self.frame.value)), side=320)
            rows = [
                ("attack", f"{self.progress.label}; CPU {self.progress.saved.cpu_s:.1f} s for all updates"),
                ("evaluations", f"{count} of {self.progress.saved.n_evals}"),
                ("SSIM", f"{self.progress.ssim[self.frame.value]:.3f}"),
            ]
            self.about.value = markup.rows(rows)
            self.pictures.value = markup.picture(picture, "above: private, below: reconstructed")
