"""The configuration of split training: what its clients do to hide, one run, and one attack."""

import math
from dataclasses import dataclass, field, fields
from typing import Any

from splitlab.core.config import parse
from splitlab.core.errors import InputError
from splitlab.core.seeds import PUBLISHED, SECRET

SCHEMES = ("central", "federated", "split_gradients", "split", "u_shaped")

SENDING = ("split_gradients", "split", "u_shaped")
"""The schemes whose clients send activations."""

SERVERS = ("honest", "hijack")
"""How a server may behave."""


@dataclass(frozen=True)
class Defences:
    """What a client does to a message before it leaves; all off by default. Applied in the order of the fields.

    Attributes:
        timestep_floor: timesteps are drawn from [floor, T) (S1's timestep sampling policy).
        latent_norm: L2 norm to which a sample's image latents and hint latents are scaled down, each for itself, where
            they exceed it: the bound that a privacy guarantee needs. 0: off.
        feature_noise: standard deviation σ1 of Gaussian noise, drawn anew for every sample, on the noisy latents and
            on what is computed from them; the label does not reveal it. 0: off.
        independent_draws: draw the feature noise for each field apart, after the activation; else one draw covers all.
        matched: scale the noised message and name the timestep it then has, so that the public U-Net still fits it
            (`splitlab.split.defences.signal_level`).
        hint_noise: standard deviation σh of Gaussian noise of its own on the hint latents, drawn anew for every sample.
            The server, which can take the sent latents off `smashed`, is left with the noised hint: no second view of
            the image. 0: off.
        coarse_hints: keep that many spatial frequencies per axis of the noised hint latents, without their mean and
            amplified so that white noise keeps its size (`splitlab.diffusion.controlnet.coarsened`): fewer numbers,
            which noise hides sooner, and a signal that is learned sooner. 2 or more; 0: all.
        per_image_noise: draw feature and hint noise once per image, on its latents and hint latents, and use them in
            every epoch; σ1 is then in units of the latents, and no repetition averages anything out.
        borrowed_colours: shapes only: once per image, recolour it to two public colours drawn at random, and send the
            prompt that names those: image and prompt then say nothing of its colours (`splitlab.split.surrogates`).
        hint_layout_noise: once per image, replace its hint by a ring that shows the hint's layout, three numbers in
            [0, 1], under Gaussian noise of that standard deviation (`splitlab.split.surrogates.laid_out`). 0: off.
        random_symmetry: once per image, turn image and hint by one of the eight symmetries of the square, drawn at
            random: what is sent says no more than up to eight places where something may have been
            (`splitlab.split.surrogates.turn`).
        symsigmoid: replace the cut-layer sum x by |x| (2 sigmoid(x) - 1) (S1's activation).
        fixed_noise: standard deviation of one Gaussian tensor per client, added to every cut-layer activation; 0: off.
        key_mixing: mix that many samples, which share timestep and noise, by a secret row-stochastic key; 0: off.
        patch_shuffle: cut messages into square patches of that side, in latent pixels, and permute them by a secret
            permutation; 0: off.
        fresh_keys: draw mixing keys and permutations anew for every message and sample; else one per client.
        half: send fp16 (and 16-bit timesteps).
        hide_prompts: send no text embeddings; the server trains with zeros.
    """

    timestep_floor: int = 0
    latent_norm: float = 0.0
    feature_noise: float = 0.0
    independent_draws: bool = False
    matched: bool = False
    hint_noise: float = 0.0
    coarse_hints: int = 0
    per_image_noise: bool = False
    borrowed_colours: bool = False
    hint_layout_noise: float = 0.0
    random_symmetry: bool = False
    symsigmoid: bool = False
    fixed_noise: float = 0.0
    key_mixing: int = 0
    patch_shuffle: int = 0
    fresh_keys: bool = False
    half: bool = False
    hide_prompts: bool = False

    def __post_init__(self) -> None:
        """Refuse values no client could apply."""
        if self.timestep_floor < 0:
            raise InputError(f"timestep_floor must be 0 or more, got {self.timestep_floor}")
        if not 0 <= self.latent_norm < math.inf:
            raise InputError(f"latent_norm is a norm and must be 0 or more (0: off), got {self.latent_norm}")
        for name in ("fixed_noise", "feature_noise", "hint_noise", "hint_layout_noise"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name} is a standard deviation and must be 0 or more, got {getattr(self, name)}")
        if self.coarse_hints < 0 or self.coarse_hints == 1:
            raise InputError(f"coarse_hints is a number of frequencies, 2 or more (0: all), got {self.coarse_hints}")
        if self.key_mixing < 0 or self.key_mixing == 1:
            raise InputError(f"key_mixing is a number of samples, 2 or more (0: off), got {self.key_mixing}")
        if self.patch_shuffle < 0:
            raise InputError(f"patch_shuffle is a patch's side and must be 0 or more, got {self.patch_shuffle}")
        if (self.independent_draws or self.matched) and not self.feature_noise:
            raise InputError("independent_draws and matched say how feature_noise is added: give it, or leave them out")
        if self.independent_draws and self.matched:
            raise InputError("matched needs one draw over all fields: leave out independent_draws")
        if self.per_image_noise and not (self.feature_noise or self.hint_noise):
            raise InputError(
                "per_image_noise says how noise is drawn: give feature_noise or hint_noise, or leave it out"
            )
        if self.per_image_noise and self.independent_draws:
            raise InputError("per_image_noise is one draw on the latents: leave out independent_draws")
        if self.hint_layout_noise and (self.hint_noise or self.coarse_hints):
            raise InputError(
                "hint_layout_noise protects the hint by itself: leave out hint_noise and coarse_hints, or it"
            )
        if self.borrowed_colours and self.hide_prompts:
            raise InputError(
                "borrowed_colours sends prompts that say nothing of the image: leave hide_prompts or it out"
            )
        if self.fresh_keys and not (self.key_mixing or self.patch_shuffle):
            raise InputError("fresh_keys needs a key: switch key_mixing or patch_shuffle on, or leave it out")

    def __str__(self) -> str:
        """Name the defences that are on, as tables show them; "none" where there are none."""
        active = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name)}
        return " ".join(name if value is True else f"{name}={value:g}" for name, value in active.items()) or "none"


@dataclass(frozen=True)
class TrainConfig:
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
    scheme: str = "split"
    defences: Defences = field(default_factory=Defences)
    server: str = "honest"
    samples: int = 0
    n_clients: int = 1
    steps: int = 600
    batch_size: int = 32
    lr: float = 2e-3
    local_steps: int = 10
    record_messages: int = 16
    record_from: int = 0
    eval_samples: int = 64
    checkpoint_every: int = 200
    seed: int = 0
    published_key: int | None = None

    def __post_init__(self) -> None:
        """Refuse contradictions at construction."""
        if self.scheme not in SCHEMES:
            raise InputError(f"scheme {self.scheme!r} is unknown; choose one of {', '.join(SCHEMES)}")
        if self.scheme not in SENDING and self.defences != Defences():
            raise InputError(
                f"scheme {self.scheme!r} sends no activations, so these defences do nothing: {self.defences}; "
                "leave them out, or use scheme 'split'"
            )
        if self.scheme == "split_gradients" and self.defences.symsigmoid:
            raise InputError("symsigmoid is for latent hints; split_gradients has a trained hint encoder: leave it out")
        if self.scheme == "split_gradients" and self.defences.feature_noise and not self.defences.independent_draws:
            raise InputError("split_gradients sends features of another shape: add independent_draws to feature_noise")
        if self.scheme == "split_gradients" and (self.defences.hint_noise or self.defences.coarse_hints):
            raise InputError(
                "hint_noise and coarse_hints are for latent hints; split_gradients trains a hint encoder: give neither"
            )
        own = self.defences
        if self.scheme == "split_gradients" and (own.hint_layout_noise or own.borrowed_colours or own.random_symmetry):
            raise InputError(
                "hint_layout_noise, borrowed_colours, random_symmetry are for schemes 'split', 'u_shaped': give none"
            )
        if self.defences.key_mixing and self.batch_size % self.defences.key_mixing:
            raise InputError(
                f"batch_size {self.batch_size} is no multiple of key_mixing {self.defences.key_mixing}: change either"
            )
        if self.server not in SERVERS:
            raise InputError(f"server {self.server!r} is unknown; choose one of {', '.join(SERVERS)}")
        if self.server != "honest" and self.scheme != "split_gradients":
            raise InputError(
                f"scheme {self.scheme!r} returns no gradient, so a server that hijacks has no lever; "
                "set server to 'honest', or use scheme 'split_gradients'"
            )
        for name in ("samples", "record_from"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} must be 0 or more, got {getattr(self, name)}")
        for name in ("n_clients", "steps", "batch_size", "local_steps", "eval_samples", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if self.record_from >= self.steps:
            raise InputError(f"record_from {self.record_from} leaves no message of {self.steps} steps: lower it")
        a_round = self.local_steps * self.n_clients
        if self.scheme == "federated" and self.steps % a_round:
            raise InputError(
                f"{self.steps} steps are no whole number of rounds of {self.n_clients} clients with {self.local_steps} "
                f"local steps each, and the rest would be lost; give a multiple of {a_round} steps"
            )
        if not 0 < self.lr < math.inf:
            raise InputError(f"lr must be positive and finite, got {self.lr}")

    @property
    def randomness(self) -> str:
        """What the run's private draws rest on: a "secret" or a "published" key."""
        return SECRET if self.published_key is None else PUBLISHED


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
        if self.when and self.when not in {f.name for f in fields(Defences)}:
            raise InputError(
                f"attack {self.attack}: when={self.when!r} is no defence; see splitlab.split.config.Defences"
            )

    @property
    def name(self) -> str:
        """A file-name-safe name: the attack, and what it was denied."""
        return "-without-".join([self.attack, *(["-".join(self.ignore)] if self.ignore else [])])


def read_defences(text: str) -> Defences:
    """Read defences as tables name them, the inverse of `str(Defences(...))`.

    Raises:
        InputError: the text names no defences.
    """
    values: dict[str, object] = {}
    kinds = {f.name: f.type for f in fields(Defences)}
    for word in text.split() if text != "none" else ():
        name, _, value = word.partition("=")
        if kinds.get(name) in (int, "int"):
            values[name] = int(float(value))
        elif value:
            try:
                values[name] = float(value)
            except ValueError:
                raise InputError(f"defences {text!r}: {value!r} is no number; write them as tables do") from None
        else:
            values[name] = True
    return parse(Defences, values, where=f"defences {text!r}")
