"""The one exception type for input that is not what it should be."""


class InputError(ValueError):
    """Bad input: the message says what was wrong, where, and what to do about it."""
