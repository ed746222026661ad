"""How the package's annotations are checked while tests run."""

from collections.abc import Callable

from beartype import beartype


def outermost(function: Callable) -> Callable:
    """Check a function's arguments and result, but not those of functions inside functions.

    They would be compiled anew whenever the outer one runs, which took most of the suite's time; arrays with a shape
    are named in none of their annotations.
    """
    return function if "<locals>" in function.__qualname__ else beartype(function)
