"""A malicious server (Pasquini et al. 2021): it trains the clients' encoder for itself.

In conventional split learning the server decides what gradient a client gets. A discriminator tells what clients send
from the features of public hints under a pilot encoder f̃; its gradient drives the client's encoder into the pilot's
feature space, where a decoder f̃⁻¹, trained on public hints only, inverts it (`splitlab.split.attacks.hijacking`).
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from safetensors.torch import save as save_bytes
from torch import Tensor, nn
from torch.nn import functional as F

from splitlab.core.seeds import generator as splitlab_generator
from splitlab.data.image_set import ImageSet
from splitlab.diffusion.base import Base
from splitlab.split.wire import from_bytes

FEATURE_STD = 0.5
"""Standard deviation of every band of the pilot's features; clients' encoders start at zero and have to get there."""


class Pilot(nn.Module):
    """The pilot encoder f̃: the hint itself, blurred to several degrees and folded to the cut layer's shape.

    A fixed, invertible f̃ in place of Pasquini et al.'s trained one: nothing about it has to settle before clients can
    be steered to it, and blurred lines are what a convolutional client can be made to send within a few hundred steps.
    Channel `k r² + j` is pixel j of each r x r cell: brightness in [0, 1], blurred by `sigmas[k]`, then shifted to mean
    0 and scaled to `FEATURE_STD` over the public hints. With a mean, clients' first steps all go into constants, and
    some encoders die of it. Channels that make no whole band are zero.

    Args:
        n_channels: channels of the cut layer.
        factor: pixels of a hint per cut-layer pixel.
        sigmas: the blurs' standard deviations, pixels; the first is the sharpest. As many are used as bands fit.
    """

    means: Tensor
    scales: Tensor

    def __init__(self, n_channels: int, factor: int, *, sigmas: Sequence[float]):
        super().__init__()
        self.n_channels, self.factor = n_channels, factor
        self.cell = next(r for r in range(factor, 0, -1) if factor % r == 0 and r * r <= n_channels)
        self.sigmas = tuple(sigmas)[: n_channels // self.cell**2]
        self.register_buffer("means", torch.zeros(len(self.sigmas)))
        self.register_buffer("scales", torch.ones(len(self.sigmas)))

    @torch.no_grad()
    def fit(self, hints: Float[Tensor, "n 3 s s"]) -> None:
        """Set the bands' means and scales from public hints."""
        bands = self._bands(hints)
        self.means.copy_(torch.stack([band.mean() for band in bands]))
        self.scales.copy_(torch.stack([FEATURE_STD / band.std().clamp_min(1e-6) for band in bands]))

    def forward(self, hints: Float[Tensor, "b 3 s s"]) -> Float[Tensor, "b k h w"]:
        """Return the features of hints in [-1, 1]."""
        levels = zip(self._bands(hints), self.means, self.scales, strict=True)
        features = torch.cat([F.pixel_unshuffle((band - mean) * scale, self.cell) for band, mean, scale in levels], 1)
        return F.pad(features, (0, 0, 0, 0, 0, self.n_channels - features.shape[1]))

    def _bands(self, hints: Tensor) -> list[Tensor]:
        brightness = F.avg_pool2d((hints.mean(1, keepdim=True) + 1.0) / 2.0, self.factor // self.cell)
        return [_blur(brightness, sigma) for sigma in self.sigmas]


def _blur(images: Float[Tensor, "b 1 h w"], sigma: float) -> Float[Tensor, "b 1 h w"]:
    radius = max(1, round(3 * sigma))
    kernel = torch.exp(-torch.arange(-radius, radius + 1).float().square() / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).view(1, 1, -1, 1)
    blurred = F.conv2d(images, kernel, padding=(radius, 0))
    return F.conv2d(blurred, kernel.transpose(2, 3), padding=(0, radius))


class HijackingNetworks(nn.Module):
    """The malicious server's networks: `pilot`, `decoder`, `discriminator`; its state is all that it learned.

    Args:
        n_channels: channels of the cut layer.
        factor: pixels of a hint per cut-layer pixel.
        side: height and width of the cut layer.
        width: of the trained networks.
        sigmas: the pilot's blurs, pixels.
    """

    n_received: Tensor

    def __init__(
        self, n_channels: int, factor: int, side: int, *, width: int = 32, sigmas: Sequence[float] = (0.7, 2.0)
    ):
        super().__init__()
        self.pilot = Pilot(n_channels, factor, sigmas=sigmas)
        self.decoder = nn.Sequential(
            nn.Conv2d(n_channels, 2 * width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(2 * width, 3 * factor**2, 1),
            nn.PixelShuffle(factor),
            nn.Tanh(),
        )
        half = (side + 1) // 2
        self.discriminator = nn.Sequential(
            nn.Conv2d(n_channels, width, 3, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, width, 3, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 1, half),
            nn.Flatten(0),
        )
        self.register_buffer("n_received", torch.zeros((), dtype=torch.int64))


def hijacking_networks(base: Base, size: int) -> HijackingNetworks:
    """Build the networks for hints of `size` pixels and image-hint ControlNets of this base model."""
    factor = base.pipeline.vae_scale_factor
    return HijackingNetworks(base.unet.config.block_out_channels[0], factor, base.latent_shape(size)[-1])


class HijackingServer:
    """Answers every message with the gradient that makes the client's features look like the pilot's.

    Three terms make it. Discriminator and client play the relativistic game with zero-centred gradient penalties on
    both sides (Huang et al. 2024, R3GAN; Pasquini et al. use a Wasserstein critic), through instance noise that fades
    (Sønderby et al. 2017), so that coarse position comes before fine lines. The statistics of neighbouring features are
    matched to the pilot's (`_statistics`): that holds where the game alone blows encoders up or lets them die.
    Of a message the server reads `smashed` only.

    Attributes:
        modules, optimizers: its whole state between two messages, for checkpoints.
        objective: the client's loss at the last message, which the returned gradient descends.

    Args:
        base: the public models, which fix the cut layer's shape.
        public: public data of the kind of the private data.
        steps: how many messages are to come.
        seed: of its weights and draws.
        feature_noise: standard deviation of the noise that clients add to what they send; the server imitates it.
        lr: of discriminator and decoder (Adam); it falls linearly to zero over the second half of the messages.
        penalty: weight γ of the gradient penalties γ/2 |∇D|², applied at every fourth message with fourfold weight.
        statistics: weight of the statistics' mismatch.
        noise: standard deviation of the instance noise at first, and of the noise that the decoder has to withstand.
    """

    def __init__(
        self,
        base: Base,
        public: ImageSet,
        *,
        steps: int,
        seed: int,
        feature_noise: float = 0.0,
        lr: float = 1e-3,
        penalty: float = 1.0,
        statistics: float = 5.0,
        noise: float = 0.5,
    ):
        self.steps, self.seed, self.lr, self.penalty = steps, seed, lr, penalty
        self.feature_noise, self.statistics, self.noise = feature_noise, statistics, noise
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(splitlab_generator("hijacking", seed).initial_seed())
            self.networks = hijacking_networks(base, public.size)
        self.networks.pilot.fit(public.need_hints())
        self._hints = public.need_hints()
        self._mean, covariance = _statistics(self.networks.pilot(self._hints[:1000]))
        self._covariance = covariance + feature_noise**2 * torch.eye(len(covariance))
        parts = {"decoder": self.networks.decoder, "discriminator": self.networks.discriminator}
        self.modules: dict[str, nn.Module] = {"hijacker": self.networks}
        self.optimizers: dict[str, torch.optim.Optimizer] = {
            f"hijacker_{name}": torch.optim.Adam(part.parameters(), lr=lr, betas=(0.5, 0.99))
            for name, part in parts.items()
        }
        self.objective = 0.0

    def receive(self, message: bytes) -> bytes:
        """Learn from one message and return the gradient for its `smashed`, as an honest server's reply is laid out.

        Raises:
            InputError: the message is damaged or carries no `smashed`.
        """
        sent = from_bytes(message).need("smashed")
        smashed, count = sent.float(), int(self.networks.n_received)
        draw = splitlab_generator("hijacking", self.seed, "message", count)
        hints = self._hints[torch.randint(len(self._hints), (len(smashed),), generator=draw)]
        features = self.networks.pilot(hints)
        features = features + self.feature_noise * torch.randn(features.shape, generator=draw)
        blur, other, again, shaken = (torch.randn(features.shape, generator=draw) for _ in range(4))
        lr = self.lr * min(1.0, 2.0 * (1.0 - count / self.steps))
        fading = self.noise * max(0.0, 1.0 - 1.5 * count / self.steps)

        real = features + fading * blur
        self._train_discriminator(real, smashed + fading * other, lr, penalised=count % 4 == 0)
        restored = self.networks.decoder(features + self.noise * shaken)
        _descend(F.mse_loss(restored, hints), self.optimizers["hijacker_decoder"], lr)
        self.networks.n_received.add_(1)
        return save_bytes({"gradient": self._steering(real, smashed, fading * again).to(sent.dtype)})

    def _train_discriminator(self, real: Tensor, fake: Tensor, lr: float, *, penalised: bool) -> None:
        real, fake = (part.detach().requires_grad_(penalised) for part in (real, fake))
        for_real, for_fake = self.networks.discriminator(real), self.networks.discriminator(fake)
        loss = F.softplus(for_fake - for_real).mean()
        if penalised:
            slopes = torch.autograd.grad(for_real.sum() + for_fake.sum(), (real, fake), create_graph=True)
            loss = loss + 4 * self.penalty / 2 * torch.stack([s.square().sum((1, 2, 3)).mean() for s in slopes]).sum()
        _descend(loss, self.optimizers["hijacker_discriminator"], lr)

    def _steering(self, real: Tensor, smashed: Tensor, noise: Tensor) -> Tensor:
        """Return the gradient by `smashed` of the client's side of the game and of the statistics' mismatch."""
        fake = smashed.detach().requires_grad_()
        with torch.no_grad():
            for_real = self.networks.discriminator(real)
        game = F.softplus(for_real - self.networks.discriminator(fake + noise)).mean()
        mean, covariance = _statistics(fake)
        mismatch = (covariance - self._covariance).square().sum() / self._covariance.square().sum()
        mismatch = mismatch + (mean - self._mean).square().sum() / self._covariance.diagonal().sum()
        loss = game + self.statistics * mismatch
        self.objective = loss.item()
        (gradient,) = torch.autograd.grad(loss, fake)
        return gradient


def _statistics(features: Float[Tensor, "b k h w"]) -> tuple[Float[Tensor, " q"], Float[Tensor, "q q"]]:
    """Return mean and covariance of 2 x 2 neighbourhoods, q = 4 k: what lies where in a cell, and beside what."""
    corners = [features[:, :, i : i - 1 or None, j : j - 1 or None] for i in (0, 1) for j in (0, 1)]
    columns = torch.cat(corners, 1).permute(1, 0, 2, 3).flatten(1)
    mean = columns.mean(1, keepdim=True)
    return mean[:, 0], (columns - mean) @ (columns - mean).T / columns.shape[1]


def _descend(loss: Tensor, optimizer: torch.optim.Optimizer, lr: float) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
