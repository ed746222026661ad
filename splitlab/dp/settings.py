"""What is asked of a private fine-tuning, and the mechanism that this comes to for its data."""

import math
import warnings
from dataclasses import dataclass
from typing import Annotated

from splitlab.core.config import Count, Level, Positive, Settings, one_of
from splitlab.core.errors import InputError
from splitlab.core.seeds import PUBLISHED, SECRET
from splitlab.diffusion.trainable import TRAINABLE
from splitlab.dp.conditioning import CONDITIONINGS
from splitlab.privacy.accounting import ACCOUNTANTS, noise_multiplier_for
from splitlab.privacy.mechanisms import Mechanism


@dataclass(frozen=True)
class DPConfig(Settings):
    """One private fine-tuning.

    Attributes:
        dataset: as in `splitlab.split.config.TrainConfig`.
        conditioning: "class", "text" or "none".
        classes: for "class": one public prompt per class, in the order of the labels.
        trainable: the part of the U-Net that is trained, a key of `splitlab.diffusion.trainable.TRAINABLE`.
        from_block: train spatial transformers from this one on, counted from 0: down, middle, up.
        embedder: train the conditioning embedder as well.
        lora_rank: of the adapters where `trainable` is "lora".
        epsilon: the guarantee to meet with the given steps; the noise is computed. Infinite: not asked for.
        noise_multiplier: σ: standard deviation of the noise over `max_grad_norm`, in place of `epsilon`. With neither,
            training is not private, and nothing is clipped.
        delta: of the guarantee; below 1 / n.
        accountant: "prv" (Gopi et al. 2021) or "rdp" (Mironov 2017).
        batch_size: expected size of a Poisson batch.
        sample_rate: probability of a sample to be in a batch, in place of `batch_size`; 0: batch_size / n.
        steps: optimiser steps.
        multiplicity: K, draws of (timestep, noise) per image and step, averaged before clipping (DPDM).
        physical_batch: rows (images times K) on their way at once; bounds memory, not the batch.
        max_grad_norm: C, the bound on each image's gradient norm.
        lr: learning rate of Adam, after a warm-up of 10 steps.
        ema_decay: of the averaged weights, which are the ones kept; 0: keep the last ones.
        checkpoint_every: steps between checkpoints.
        seed: of the adapters' initial weights, which are public.
        published_key: seed of a published key that batches, timesteps and noise follow from, so that others can repeat
            the run; its ε is then a simulation's. None: they follow from a secret of the operating system's entropy.
    """

    dataset: str = "digits"
    conditioning: Annotated[str, one_of(CONDITIONINGS)] = "class"
    classes: tuple[str, ...] = ()
    trainable: Annotated[str, one_of(TRAINABLE)] = "attention"
    from_block: int = 3
    embedder: bool = True
    lora_rank: Count = 8
    epsilon: float = math.inf
    noise_multiplier: Level = 0.0
    delta: float = 1e-5
    accountant: Annotated[str, one_of(ACCOUNTANTS)] = "prv"
    batch_size: Count = 256
    sample_rate: float = 0.0
    steps: Count = 200
    multiplicity: Count = 1
    physical_batch: Count = 128
    max_grad_norm: Positive = 0.1
    lr: Positive = 1e-3
    ema_decay: float = 0.95
    checkpoint_every: Count = 50
    seed: int = 0
    published_key: int | None = None

    def __post_init__(self) -> None:
        """Refuse contradictions at construction."""
        super().__post_init__()
        if not self.epsilon > 0:
            raise InputError(f"epsilon must be positive, got {self.epsilon}; leave it out to train without privacy")
        if self.noise_multiplier and self.epsilon < math.inf:
            raise InputError("epsilon and noise_multiplier determine each other: give one of them")
        if not 0 < self.delta < 1:
            raise InputError(f"delta is a probability and must lie between 0 and 1, got {self.delta}")
        if not 0 <= self.sample_rate <= 1:
            raise InputError(f"sample_rate must lie in (0, 1], or be 0 to use batch_size, got {self.sample_rate}")
        if not 0 <= self.ema_decay < 1:
            raise InputError(f"ema_decay must lie in [0, 1), got {self.ema_decay}")

    @property
    def randomness(self) -> str:
        """What the run's private draws rest on: a "secret" or a "published" key."""
        return SECRET if self.published_key is None else PUBLISHED

    @property
    def private(self) -> bool:
        """Whether a guarantee is asked for."""
        return self.epsilon < math.inf or self.noise_multiplier > 0


def mechanism(config: DPConfig, n: int) -> Mechanism:
    """Work out sampling rate and noise for n private samples.

    Raises:
        InputError: the batch is larger than the data set, or no noise meets epsilon with that many steps.
    """
    if not config.sample_rate and config.batch_size > n:
        raise InputError(f"batch_size {config.batch_size} is larger than the data set of {n}; give at most {n}")
    rate = config.sample_rate or config.batch_size / n
    if config.private and config.delta >= 1 / n:
        warnings.warn(
            f"delta {config.delta:g} is not below 1/n = {1 / n:.3g}: publishing one of the {n} samples at random would "
            "meet such a guarantee, so it protects nobody; give a smaller delta",
            stacklevel=2,
        )
    sigma = config.noise_multiplier
    if config.epsilon < math.inf:
        sigma = noise_multiplier_for(
            config.epsilon, delta=config.delta, sample_rate=rate, steps=config.steps, accountant=config.accountant
        )
    return Mechanism(sigma, rate, n)
