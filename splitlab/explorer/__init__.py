"""Widgets to look at reconstructions, to attack live, to try and plan defences: the only importers of ipywidgets.

A thin layer: what is shown comes from `splitlab.explorer.explore`, how it looks from
`splitlab.explorer.markup`.
"""

from splitlab.explorer.attack_panel import AttackPanel
from splitlab.explorer.explorer_panel import Explorer
from splitlab.explorer.panels import Gallery, InversionPanel, PlannerPanel, PlaygroundPanel

__all__ = ["AttackPanel", "Explorer", "Gallery", "InversionPanel", "PlannerPanel", "PlaygroundPanel"]
