"""Turn a client's defences on and off and see what the server makes of a message."""

from collections.abc import Sequence

import ipywidgets as widgets

from splitlab.data.image_set import ImageSet
from splitlab.explorer import markup
from splitlab.explorer.explore import Artefacts
from splitlab.explorer.parts import DESCRIBED, WIDE, checkbox, dropdown, htmls, reported, row
from splitlab.explorer.playground import Playground
from splitlab.params import load_split
from splitlab.split.defences import DEFENCES, Defence, Defences

SHOWN = {"symsigmoid": True, "half": True, "fixed_noise": 0.5}
"""The defences that are on at first."""


class PlaygroundPanel(widgets.VBox):
    """Turn a client's defences on and off and see at once what the server receives and what it makes of it."""

    def __init__(self, artefacts: Artefacts, *, dataset: str = "photos", n_images: int = 640):
        super().__init__()
        self.artefacts, self.n_images = artefacts, n_images
        self.playground: Playground | None = None
        self.image = widgets.IntSlider(description="image", value=1, layout=WIDE, style=DESCRIBED)
        self.timestep = widgets.IntSlider(description="timestep", value=500, max=999, layout=WIDE, style=DESCRIBED)
        self.defences = {name: _control(defence) for name, defence in DEFENCES.items()}
        for name, value in SHOWN.items():
            self.defences[name].value = value
        self.label, self.messages = checkbox("noise label sent"), _slider("seen so far", (1, 4, 16, 64, 128))
        self.messages.value = 16
        self.pictures, self.scores, self.message = htmls(3)
        names = sorted(artefacts.params["datasets"])
        self.dataset = dropdown("data", names)
        if dataset in names:
            self.dataset.value = dataset
        self.children = [
            *(widgets.HTML(markup.STYLE), self.dataset, self.image, self.timestep),
            row([self.label, self.messages]),
            row([control for control in self.defences.values() if isinstance(control, widgets.Checkbox)]),
            row([control for control in self.defences.values() if not isinstance(control, widgets.Checkbox)]),
            *(self.message, self.pictures, self.scores),
        ]
        self.dataset.observe(lambda change: self._load(), "value")
        for widget in (self.image, self.timestep, self.label, self.messages, *self.defences.values()):
            widget.observe(lambda change: self._show(), "value")
        self._load()

    def _images(self) -> ImageSet:
        return load_split(self.dataset.value or "shapes", "public", self.artefacts.params, limit=self.n_images)

    def _load(self) -> None:
        self.playground = None
        with reported(self.message):
            base, images = self.artefacts.base, self._images()
            playground = Playground(base, images, n_client=min(128, len(images) // 2), cache=self.artefacts.cache)
            self.image.max, self.timestep.max = len(playground.images) - 1, base.n_timesteps - 1
            self.playground = playground
            self._show()

    def _show(self) -> None:
        if self.playground is None:
            return
        with reported(self.message):
            defences = Defences(**{name: control.value for name, control in self.defences.items()})
            trial = self.playground.trial(
                self.image.value,
                self.timestep.value,
                defences,
                send_label=self.label.value,
                n_messages=self.messages.value,
            )
            self.pictures.value = markup.groups(trial.groups)
            self.scores.value = markup.chips(
                {
                    "PSNR": markup.number(trial.psnr_db, 1, " dB"),
                    "VAE ceiling": markup.number(trial.ceiling_psnr_db, 1, " dB"),
                    "hint PSNR": markup.number(trial.hint_psnr_db, 1, " dB"),
                    "on the wire for this sample": f"{trial.size_bytes:,} bytes",
                }
            ) + markup.note(trial.method)


def _control(defence: Defence) -> widgets.Checkbox | widgets.SelectionSlider:
    """Return what sets a defence: a box to tick, or a slider over the values worth trying."""
    name = defence.name.replace("_", " ")
    control = (
        checkbox(name, value=False) if isinstance(defence.off, bool) else _slider(name, (defence.off, *defence.usual))
    )
    control.tooltip = defence.says
    return control


def _slider(name: str, values: Sequence[bool | int | float]) -> widgets.SelectionSlider:
    return widgets.SelectionSlider(description=name, options=values, style=DESCRIBED, continuous_update=False)
