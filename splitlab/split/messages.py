"""The words the whole package speaks: Observation, Truth, Knowledge, Reconstruction, PrivacyEvent."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from splitlab.core.errors import InputError

if TYPE_CHECKING:
    from splitlab.data.image_set import ImageSet
    from splitlab.diffusion.base import Base
    from splitlab.split.config import Defences


@dataclass(frozen=True)
class Observation:
    """Everything the server receives for one client batch. None: not sent. These fields are all that leaves a client.

    Attributes:
        client: who sent it (the server knows its connections).
        sequence: the sender's message number.
        timesteps: `[b]` integers in [0, T): diffusion timesteps.
        noisy_latents: `[b, c, h, w]`: sqrt(ᾱ_t) latents + sqrt(1 - ᾱ_t) noise (Ho et al. 2020, eq. 4).
        smashed: the cut-layer activation. S1: `[b, c, h, w]`, activation(hint_latents + noisy_latents); conventional
            split learning: `[b, k, h, w]`, the hint encoder's output.
        noise: `[b, c, h, w]`: the diffusion noise, the label of the server's loss.
        encoder_hidden_states: `[b, l, d]`: text embeddings; None where prompts are hidden.
        noise_pred: `[b, c, h, w]`: U-shaped split: the server's own prediction, which it handed to the client.
        noise_pred_gradient: `[b, c, h, w]`: U-shaped split: the gradient of the client's loss by it, sent back.
    """

    client: int
    sequence: int
    timesteps: Tensor | None = None
    noisy_latents: Tensor | None = None
    smashed: Tensor | None = None
    noise: Tensor | None = None
    encoder_hidden_states: Tensor | None = None
    noise_pred: Tensor | None = None
    noise_pred_gradient: Tensor | None = None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The fields that were sent, by name."""
        named = {name: getattr(self, name) for name in OBSERVATION_FIELDS}
        return {name: value for name, value in named.items() if value is not None}

    @property
    def batch_size(self) -> int:
        """How many samples the message covers (0 if it carries no tensor)."""
        return next((len(value) for value in self.tensors.values()), 0)

    def without(self, *names: str) -> "Observation":
        """Return a copy that lacks the fields `names`: what an attacker ignorant of them would see."""
        unknown = set(names) - set(OBSERVATION_FIELDS)
        if unknown:
            raise InputError(f"no such observation field: {sorted(unknown)}; fields: {', '.join(OBSERVATION_FIELDS)}")
        kept = {name: value for name, value in self.tensors.items() if name not in names}
        return Observation(self.client, self.sequence, **kept)

    def changed(self, **values: Tensor) -> "Observation":
        """Return a copy with the given fields in place of its own."""
        return Observation(self.client, self.sequence, **(self.tensors | values))

    def map(self, change: Callable[[Tensor], Tensor]) -> "Observation":
        """Return a copy with `change` applied to every field that was sent."""
        return Observation(self.client, self.sequence, **{k: change(v) for k, v in self.tensors.items()})

    def float(self) -> "Observation":
        """Return a copy whose floating-point fields are float32 and whose integers are int64."""
        return self.map(lambda value: value.float() if value.is_floating_point() else value.long())

    def need(self, name: str) -> Tensor:
        """Return the field `name`; raise InputError if it was not sent."""
        value: Tensor | None = getattr(self, name)
        if value is None:
            raise InputError(
                f"message {self.sequence} of client {self.client} carries no {name}; "
                f"it carries {', '.join(self.tensors) or 'nothing'}: use what needs no {name}"
            )
        return value


OBSERVATION_FIELDS = tuple(f.name for f in fields(Observation) if f.name not in ("client", "sequence"))


@dataclass(frozen=True)
class Truth:
    """What only the client and the evaluator hold about one message.

    Attributes:
        indices: `[b]` int64 positions in the private data set.
        timesteps: `[b]` int64.
        noise: `[b, c, h, w]` float32.
        prompts: b texts as they were sent, where those were borrowed; empty where they are the data set's own.
    """

    indices: Tensor
    timesteps: Tensor
    noise: Tensor
    prompts: tuple[str, ...] = ()

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What is not text, by name."""
        return {"indices": self.indices, "timesteps": self.timesteps, "noise": self.noise}


@dataclass(frozen=True)
class Knowledge:
    """The adversary's prior: everything an attack may use besides the observations. This is the threat model.

    Attributes:
        base: the public pre-trained models and noise schedule.
        scheme: which training scheme runs (public).
        defences: which client-side defences are on, and their strengths (public; keys and draws are not).
        size: image height and width, pixels.
        public: auxiliary public data of the same kind as the private data.
        ignored: observation fields the attacker is denied, or "defences": for ablations.
        cache: where encodings of the public data are kept; no knowledge, only saved time.
        server: a malicious server's own networks, as it trained them during the run; empty for an honest one.
    """

    base: "Base"
    scheme: str
    defences: "Defences"
    size: int
    public: "ImageSet"
    ignored: tuple[str, ...] = ()
    cache: Path | None = None
    server: Mapping[str, Tensor] = field(default_factory=dict)

    def describe(self, observations: Sequence[Observation], used: Sequence[str]) -> list[tuple[str, str]]:
        """Return the threat model as (what, value) rows for a report; `used`: the fields an attack looked at."""
        sent = list(observations[0].tensors) if observations else []
        return [
            ("adversary", "malicious server" if self.server else "honest-but-curious server"),
            ("scheme", self.scheme),
            ("receives", ", ".join(sent)),
            ("uses of it", ", ".join(used) or "nothing"),
            ("knows the defences", "no" if "defences" in self.ignored else str(self.defences)),
            ("does not know", "keys, fixed-noise tensors, private images, hints and prompts"),
            ("public base model", self.base.digest[:12]),
            ("public images", f"{len(self.public)} of {self.size}x{self.size} pixels"),
        ]


@dataclass(frozen=True)
class Reconstruction:
    """What an attack made of the observations, sample by sample, in the order they were sent.

    Attributes:
        images: `[n, 3, h, w]` in [-1, 1], or None if the attack is after hints or prompts only.
        hints: `[n, 3, h, w]` in [-1, 1], or None if the attack does not try.
        prompts: n texts, or None if the attack does not try.
        used: the observation fields the attack looked at; none for a guess without information.
        objective: the attack's own objective as it went on, for pictures of progress.
        n_evals: evaluations of the objective or network, per sample.
        wall_s: seconds for all samples.
        cpu_s: processor seconds for all samples, over all threads.
    """

    images: Tensor | None = None
    hints: Tensor | None = None
    prompts: tuple[str, ...] | None = None
    used: tuple[str, ...] = ()
    objective: tuple[float, ...] = ()
    n_evals: int = 0
    wall_s: float = 0.0
    cpu_s: float = 0.0


def stack(observations: Sequence[Observation]) -> Observation:
    """Concatenate messages into one observation over all their samples, float32; `client` and `sequence` are -1.

    Raises:
        InputError: there are no messages, or they carry different fields or shapes.
    """
    if not observations:
        raise InputError("no messages to attack; the transcript is empty")
    names = set(observations[0].tensors)
    for other in observations[1:]:
        if set(other.tensors) != names:
            raise InputError(
                f"message {other.sequence} of client {other.client} carries {sorted(other.tensors)}, "
                f"the first message {sorted(names)}; attack messages of one protocol at a time"
            )
    parts = [observation.float() for observation in observations]
    for name in names:
        shapes = {tuple(getattr(part, name).shape[1:]) for part in parts}
        if len(shapes) > 1:
            raise InputError(f"the messages carry {name} of different shapes {shapes}; attack messages of one run")
    return Observation(-1, -1, **{name: torch.cat([getattr(p, name) for p in parts]) for name in sorted(names)})


def senders(observations: Sequence[Observation]) -> Tensor:
    """Return `[n]` int64: which client sent each sample, aligned with `stack`."""
    return torch.cat([torch.full((o.batch_size,), o.client, dtype=torch.int64) for o in observations])
