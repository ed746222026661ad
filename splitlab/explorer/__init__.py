"""Widgets to look at reconstructions, to attack live, to try and plan defences: the only importers of ipywidgets.

A thin layer, one file per panel: what is shown comes from `splitlab.explorer.explore`, how it looks from
`splitlab.explorer.markup`.
"""

from splitlab.explorer.attack_panel import AttackPanel
from splitlab.explorer.explorer_panel import Explorer
from splitlab.explorer.gallery import Gallery
from splitlab.explorer.inversion_panel import InversionPanel
from splitlab.explorer.planner_panel import PlannerPanel
from splitlab.explorer.playground_panel import PlaygroundPanel

__all__ = ["AttackPanel", "Explorer", "Gallery", "InversionPanel", "PlannerPanel", "PlaygroundPanel"]
