"""The configuration of split training: one run, and one attack on it."""

from dataclasses import dataclass, field
from typing import Annotated, Any

from splitlab.core.config import Count, Natural, Positive, Settings, one_of
from splitlab.core.errors import InputError
from splitlab.core.seeds import PUBLISHED, SECRET
from splitlab.split.defences import DEFENCES, Defences, read_defences

__all__ = ["SCHEMES", "SENDING", "SERVERS", "Adversary", "AttackSpec", "Defences", "TrainConfig", "read_defences"]

SCHEMES = ("central", "federated", "split_gradients", "split", "u_shaped")

SENDING = ("split_gradients", "split", "u_shaped")
"""The schemes whose clients send activations."""

SERVERS = ("honest", "hijack")
"""How a server may behave."""


@dataclass(frozen=True)
class TrainConfig(Settings):
    """One training run.

    Attributes:
        dataset: a name in the section `datasets`, the path of a folder with private / public / heldout splits, or
            `hub:<id>` of a set with splits of those names.
        scheme: who computes what: one of `SCHEMES`.
        defences: the clients' defences (schemes that send activations only).
        server: "honest", or "hijack": it returns gradients that steer the clients (split_gradients only; FSHA).
        samples: use the first that many private samples only; 0: all.
        n_clients: private data are shared out among that many clients, who take turns (federated: run in parallel).
        steps: optimiser steps on batches of `batch_size`, summed over clients.
        batch_size: samples per message.
        lr: peak learning rate of AdamW, after a warm-up of 5 % and before cosine decay.
        local_steps: federated only: steps a client takes between two averagings.
        record_messages: how many messages the transcript keeps.
        record_from: the step whose message is the first that the transcript keeps.
        eval_samples: held-out hints to generate images for.
        checkpoint_every: steps between checkpoints.
        seed: of what is public: initial weights, a malicious server, and the samples generated in the end.
        published_key: seed of a published key that the clients' draws follow from, so that others can repeat the run;
            nothing that the clients claim is then more than a simulation. None: a secret, as the system's entropy.
    """

    dataset: str = "shapes"
    scheme: Annotated[str, one_of(SCHEMES)] = "split"
    defences: Defences = field(default_factory=Defences)
    server: Annotated[str, one_of(SERVERS)] = "honest"
    samples: Natural = 0
    n_clients: Count = 1
    steps: Count = 600
    batch_size: Count = 32
    lr: Positive = 2e-3
    local_steps: Count = 10
    record_messages: int = 16
    record_from: Natural = 0
    eval_samples: Count = 64
    checkpoint_every: Count = 200
    seed: int = 0
    published_key: int | None = None

    def __post_init__(self) -> None:
        """Refuse contradictions at construction."""
        super().__post_init__()
        if self.scheme not in SENDING and self.defences != Defences():
            raise InputError(
                f"scheme {self.scheme!r} sends no activations, so these defences do nothing: {self.defences}; "
                "leave them out, or use scheme 'split'"
            )
        for defence in self.defences.active:
            if reason := defence.refuses_run(self.defences, self.scheme, self.batch_size):
                raise InputError(reason)
        if self.server != "honest" and self.scheme != "split_gradients":
            raise InputError(
                f"scheme {self.scheme!r} returns no gradient, so a server that hijacks has no lever; "
                "set server to 'honest', or use scheme 'split_gradients'"
            )
        if self.record_from >= self.steps:
            raise InputError(f"record_from {self.record_from} leaves no message of {self.steps} steps: lower it")
        a_round = self.local_steps * self.n_clients
        if self.scheme == "federated" and self.steps % a_round:
            raise InputError(
                f"{self.steps} steps are no whole number of rounds of {self.n_clients} clients with {self.local_steps} "
                f"local steps each, and the rest would be lost; give a multiple of {a_round} steps"
            )

    @property
    def randomness(self) -> str:
        """What the run's private draws rest on: a "secret" or a "published" key."""
        return SECRET if self.published_key is None else PUBLISHED


@dataclass(frozen=True, order=True)
class Adversary:
    """Who attacks: an attack, and the facts that it is denied.

    Attributes:
        attack: its name in `splitlab.split.attacks.ATTACKS`.
        denied: fields of the messages, or "defences".
    """

    attack: str
    denied: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """A name for its files, which nobody takes apart again."""
        return "-without-".join([self.attack, *(["-".join(self.denied)] if self.denied else [])])


@dataclass(frozen=True)
class AttackSpec:
    """One attack on one run.

    Attributes:
        attack: its name in `splitlab.split.attacks.ATTACKS`.
        ignore: observation fields to deny it, or "defences" (it takes the client for undefended), for ablations.
        seeds: how many attackers, who differ in their draws, try; 1 for an attack without randomness.
        when: survey only: the defence that must be on.
        options: keyword arguments of the attack function.
    """

    attack: str
    ignore: tuple[str, ...] = ()
    seeds: int = 3
    when: str = ""
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse a defence that does not exist."""
        if self.when and self.when not in DEFENCES:
            raise InputError(f"attack {self.attack}: when={self.when!r} is no defence; there are {', '.join(DEFENCES)}")

    @property
    def adversary(self) -> Adversary:
        """Who attacks."""
        return Adversary(self.attack, self.ignore)
