"""Widgets to look at reconstructions, to attack live, to try and plan defences: the only importers of ipywidgets.

A thin layer, one file per panel: what is shown comes from `splitlab.explore`, how it looks from `splitlab.markup`.
"""

from splitlab.widgets.attack_panel import AttackPanel
from splitlab.widgets.explorer import Explorer
from splitlab.widgets.gallery import Gallery
from splitlab.widgets.inversion_panel import InversionPanel
from splitlab.widgets.planner_panel import PlannerPanel
from splitlab.widgets.playground_panel import PlaygroundPanel

__all__ = ["AttackPanel", "Explorer", "Gallery", "InversionPanel", "PlannerPanel", "PlaygroundPanel"]
