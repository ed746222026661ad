"""The one exception type for input that is not what it should be."""


class InputError(ValueError):
    """Bad input: the message says what was wrong, where, and what to do about it."""


def brief(error: Exception) -> str:
    """Return what a library's error says, on one line of no great length."""
    return " ".join(str(error).split())[:200] or type(error).__name__
