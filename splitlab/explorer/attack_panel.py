"""Attack the explorer's run live."""

import threading
import time
from typing import Any

import ipywidgets as widgets

from splitlab.core.labels import FIELD_WORDS
from splitlab.explorer import markup
from splitlab.explorer.explorer_panel import Explorer
from splitlab.explorer.parts import DESCRIBED, checkbox, dropdown, reported, row
from splitlab.explorer.run_view import RunView
from splitlab.split.attacks import ATTACKS, NO_INFORMATION
from splitlab.split.attacks.record import Parameter


class Cancelled(Exception):
    """The user stopped an attack."""


class AttackPanel(widgets.VBox):
    """Attack the explorer's run live: choose attack, fields and options; the result joins the explorer, in memory."""

    def __init__(self, explorer: Explorer):
        super().__init__()
        self.explorer = explorer
        self.attack = dropdown("attack", [(record.label, name) for name, record in ATTACKS.items()])
        self.attack.value = next(n for n in ATTACKS if n not in NO_INFORMATION)  # the simplest that looks
        self.seed = widgets.IntText(description="seed", value=0, layout=widgets.Layout(width="170px"), style=DESCRIBED)
        self.fields = {name: checkbox(f"use {FIELD_WORDS[name]}") for name in FIELD_WORDS if name != "timesteps"}
        self.options: dict[str, Any] = {}
        self._options = row([])
        self.button = widgets.Button(description="Attack now", button_style="primary", icon="play")
        self.cancel = widgets.Button(description="Cancel", icon="stop", disabled=True)
        self.progress = widgets.FloatProgress(min=0.0, max=1.0, layout=widgets.Layout(width="320px"))
        self.status, self.message = widgets.HTML(), widgets.HTML()
        self.thread: threading.Thread | None = None
        self._stop = threading.Event()
        self._shown_at = 0.0
        self.children = [
            row([self.attack, self.seed]),
            row(list(self.fields.values())),
            self._options,
            row([self.button, self.cancel, self.progress, self.status]),
            self.message,
        ]
        self.attack.observe(lambda change: self._list_options(), "value")
        explorer.run.observe(lambda change: self._list_fields(), "value")
        self.button.on_click(lambda button: self._start())
        self.cancel.on_click(lambda button: self._stop.set())
        self._list_options()
        self._list_fields()

    def _list_options(self) -> None:
        """Offer every option of the attack that has a default, at it; its words and range come up over it."""
        offered = ATTACKS[self.attack.value].options
        self.options = {name: _field(name, p) for name, p in offered.items() if p.default is not None}
        self._options.children = tuple(self.options.values())

    def _list_fields(self) -> None:
        """Offer the fields that were sent."""
        view = self.explorer.view
        sent = view.seen.tensors if view else {}
        for name, box in self.fields.items():
            box.layout.display = "" if name in sent else "none"
        self.button.disabled = view is None

    def _start(self) -> None:
        view = self.explorer.view
        if view is None or (self.thread and self.thread.is_alive()):
            return
        options = {name: box.value for name, box in self.options.items()}
        ignore = tuple(name for name, box in self.fields.items() if name in view.seen.tensors and not box.value)
        job = {"attack": self.attack.value, "ignore": ignore, "seed": self.seed.value, "options": options}
        self._stop.clear()
        self.button.disabled, self.cancel.disabled, self.message.value = True, False, ""
        self.progress.value, self.progress.bar_style, self.status.value = 0.0, "", "preparing and attacking …"
        self.thread = threading.Thread(target=self._work, args=(view, job), daemon=True)
        self.thread.start()

    def _work(self, view: RunView, job: dict[str, Any]) -> None:
        """Run in a thread, so that the explorer and the cancel button stay alive."""
        began = time.perf_counter()
        try:
            with reported(self.message, make_it=""):
                attempt = self.explorer.artefacts.attack_live(view, callback=self._tell, **job)
                self.explorer.add(attempt, view)
                self.progress.value, self.progress.bar_style = 1.0, "success"
                self.status.value = f"done in {time.perf_counter() - began:.1f} s: see “live” among the attacks above"
        except Cancelled:
            self.message.value = ""
        except Exception as error:  # a thread's traceback would go nowhere
            self.message.value = markup.message(f"{type(error).__name__}: {error}")
        finally:
            if self.progress.bar_style != "success":
                self.progress.bar_style = "warning"
                self.status.value = "cancelled" if self._stop.is_set() else "stopped"
            self.button.disabled, self.cancel.disabled = False, True

    def _tell(self, what: str, done: int, total: int, objective: float) -> None:
        """Take an attack's callback: stop it if asked to, else show how far it is."""
        if self._stop.is_set():
            raise Cancelled
        if time.monotonic() - self._shown_at > 0.2 or done >= total:
            self._shown_at = time.monotonic()
            self.progress.value = min(1.0, done / total)
            self.status.value = f"step {min(done, total)} of {total}, objective {objective:.4g}"


def _field(name: str, parameter: Parameter) -> Any:
    """Make the input of an option."""
    option, layout = parameter.option, widgets.Layout(width="190px")
    words = f"{option.words} ({option.range})" if option.range else option.words
    shown = {"description": name, "value": parameter.default, "layout": layout, "style": DESCRIBED, "tooltip": words}
    if option.choices:
        return widgets.Dropdown(options=option.choices, **shown)
    kinds = {bool: widgets.Checkbox, int: widgets.IntText, float: widgets.FloatText}
    return kinds[type(parameter.default)](**shown)
