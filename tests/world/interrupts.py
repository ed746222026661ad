"""Machines that fail in the middle of a run."""


class Interrupt(Exception):
    """Stands in for a machine that fails."""


def interrupted_at(step: int):
    def callback(what: str, done: int, total: int, objective: float) -> None:
        if done == step:
            raise Interrupt

    return callback
