"""Look at what trained ControlNets make of held-out hints."""

from typing import Any

import ipywidgets as widgets

from splitlab.core.labels import UNMEASURED
from splitlab.core.pixels import to_uint8
from splitlab.explorer import markup
from splitlab.explorer.explore import Artefacts, png
from splitlab.explorer.parts import DESCRIBED, WIDE, dropdown, htmls, reported, run_rows
from splitlab.split.artefacts import read_record, read_samples


class Gallery(widgets.VBox):
    """What the trained ControlNets make of held-out hints: any run, in pairs of hint and generated image."""

    def __init__(self, artefacts: Artefacts, *, shown: int = 12):
        super().__init__()
        self.artefacts, self.shown = artefacts, shown
        self.run = dropdown("run")
        self.first = widgets.IntSlider(description="from", step=shown, layout=WIDE, style=DESCRIBED)
        self.about, self.pictures, self.message = htmls(3)
        self._samples: tuple[Any, Any, list[str]] | None = None
        self.children = [widgets.HTML(markup.STYLE), self.message]
        with reported(self.message):
            names = artefacts.trained()
            self.run.options, self.run.value = names, names[0]
            self._load()
            self.children = [*self.children, self.run, self.about, self.first, self.pictures]
        self.run.observe(lambda change: self._load(), "value")
        self.first.observe(lambda change: self._show(), "value")

    def _load(self) -> None:
        with reported(self.message):
            folder = self.artefacts.runs / self.run.value
            record, config = read_record(folder / "record.json")
            hints, images, prompts = read_samples(folder / "samples.safetensors")
            self._samples = to_uint8(hints), to_uint8(images), prompts
            overlap, edges = (record.get(f"control_{what}") for what in ("iou", "edges"))
            followed = f"disc overlap {overlap:.2f}, " if overlap is not None else ""
            where = UNMEASURED if edges is None else f"{edges:+.2f} (0: by chance)"
            followed += f"edges where the hints want them {where}"
            self.about.value = markup.rows([*run_rows(config), ("follows the hints", followed)])
            self.first.max = (len(prompts) - 1) // self.shown * self.shown
            self._show()

    def _show(self) -> None:
        if self._samples is not None:
            hints, images, prompts = (part[self.first.value : self.first.value + self.shown] for part in self._samples)
            pairs = zip(hints, images, prompts, strict=True)
            self.pictures.value = markup.gallery([(png(h, side=96), png(i, side=96), p) for h, i, p in pairs])
