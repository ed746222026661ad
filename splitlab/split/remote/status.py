"""How a run between machines stands, as its server last said."""

import json
import time
from typing import Any

from splitlab.core.errors import InputError
from splitlab.split.remote.broker import Names
from splitlab.split.remote.link import Link


def status(name: str, link: Link) -> dict[str, Any]:
    """Ask the broker how a run stands.

    Args:
        name: the run's name.
        link: a connection of the server or a client; only the server's learns how many messages wait (`lag`).

    Returns step, samples, position, acknowledged position, `messages` and `refused` by client, the last reasons,
    `mb_per_s`, and `silent_s`, seconds since the server said so.

    Raises:
        InputError: no server has said anything yet.
    """
    names = Names(name)
    found = link.last(names.state_stream, names.state)
    if found is None:
        raise InputError(f"run {name}: no server has said anything yet; start `splitlab serve {name}`")
    state: dict[str, Any] = json.loads(found[1])
    terms = state.pop("terms")
    state |= {"steps": terms["steps"], "samples": state["step"] * terms["batch_size"]}
    state["silent_s"] = round(max(0.0, time.time() - state.pop("at")), 1)
    if link.party == "server":
        stream = link.api(f"STREAM.INFO.{names.stream}")["state"]
        state |= {"lag": stream["last_seq"] - state["position"], "stream_mb": round(stream["bytes"] / 1e6, 1)}
    return state


def lines(name: str, state: dict[str, Any]) -> list[str]:
    """Return a run's status as people read it."""
    waiting = f", {state['lag']} waiting in {state['stream_mb']} MB" if "lag" in state else ""
    told = [
        f"run {name}: step {state['step']} of {state['steps']}, {state['samples']} samples, {state['mb_per_s']} MB/s",
        f"stream: position {state['position']}, acknowledged {state['acknowledged']}{waiting}; "
        f"the server spoke {state['silent_s']} s ago",
    ]
    for client, count in state["messages"].items():
        told.append(f"client {client}: {count} applied, {state['refused'].get(client, 0)} refused")
    told += [f"  refused at {position}, client {client}: {why}" for position, client, why in state["reasons"]]
    return told
