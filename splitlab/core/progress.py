"""How long jobs tell of their progress."""

from collections.abc import Callable

Callback = Callable[[str, int, int, float], None]
"""`(what, done, total, objective)`: called by every long job as it goes on."""
