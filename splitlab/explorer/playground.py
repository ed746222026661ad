"""The defence playground: a client made of public images, and a server that attacks at once what it sends."""

from dataclasses import dataclass
from pathlib import Path

import torch

from splitlab.core.errors import InputError
from splitlab.core.pixels import to_uint8
from splitlab.core.seeds import Key, generator
from splitlab.data.image_set import ImageSet
from splitlab.diffusion import metrics
from splitlab.diffusion.base import Base
from splitlab.explorer.explore import PRIVATE, RECONSTRUCTED, WIRE, Groups, Picture, png, wire_pictures
from splitlab.split.attacks.closed_form import closed_form
from splitlab.split.attacks.one_step import one_step
from splitlab.split.config import Defences
from splitlab.split.defences import protect, transforms
from splitlab.split.messages import Knowledge, Observation


@dataclass(frozen=True)
class Trial:
    """One trial on the playground.

    Attributes:
        groups: the pictures.
        method: what the server did.
        psnr_db, hint_psnr_db: of the reconstruction.
        ceiling_psnr_db: of the VAE's own reconstruction of the image.
        size_bytes: payload of the chosen sample on the wire.
    """

    groups: Groups
    method: str
    psnr_db: float
    hint_psnr_db: float
    ceiling_psnr_db: float
    size_bytes: int


class Playground:
    """A client made of public images, and a server that attacks what it sends.

    The first `n_client` images play the client's, the rest are the attacker's auxiliary data.
    """

    def __init__(self, base: Base, images: ImageSet, *, n_client: int = 128, cache: Path | None = None):
        if len(images) < 2 * n_client:
            raise InputError(f"the playground needs {2 * n_client} public images, got {len(images)}")
        self.base, self.cache = base, cache
        self.images = images.subset(range(n_client))
        self._public = images.subset(range(n_client, len(images)))
        self._latents, self._hints = base.encode(self.images.images), base.encode(self.images.need_hints())
        self._ceiling = metrics.psnr_db(base.decode(self._latents), self.images.images)

    def messages(self, chosen: int, timestep: int, defences: Defences, n_messages: int) -> Observation:
        """Play the client: the chosen image first, `n_messages` - 1 others behind it, as the server receives them."""
        draw = generator("playground", chosen)
        order = torch.cat([torch.tensor([chosen]), torch.randperm(len(self.images), generator=draw)])[:n_messages]
        timesteps = torch.randint(defences.timestep_floor, self.base.n_timesteps, (len(order),), generator=draw)
        timesteps[0] = timestep
        noise = torch.randn(self._latents[order].shape, generator=draw)
        noisy = self.base.noised(self._latents[order], noise, timesteps)
        message = Observation(0, 0, timesteps, noisy, self._hints[order] + noisy, noise)
        return protect(message, transforms(defences, client_key=Key.published(0)), draw)

    def trial(
        self, chosen: int, timestep: int, defences: Defences, *, send_label: bool = True, n_messages: int = 64
    ) -> Trial:
        """Send an image and attack it: by algebra where the label is sent, else by the public U-Net.

        The hint follows by algebra either way, since it needs the noisy latents only.
        """
        sent = self.messages(chosen, timestep, defences, n_messages)
        knowledge = Knowledge(self.base, "split", defences, self.images.size, self._public, cache=self.cache)
        draw = generator("playground attack")
        solved = closed_form([sent], knowledge, generator=draw)
        image, method = torch.as_tensor(solved.images)[0], "closed form"
        if not send_label:
            sent = sent.without("noise")
            found = one_step([sent.map(lambda value: value[:1])], knowledge, generator=draw)
            image = torch.as_tensor(found.images)[0]
            method = "image: one-step denoising by the public U-Net; hint: closed form, which needs no label"
        first, truth = sent.map(lambda value: value[:1]), self.images
        hints = solved.hints
        assert hints is not None, "scheme split solves for hints"
        shown = [png(to_uint8(one)) for one in (truth.images[chosen], truth.need_hints()[chosen], image, hints[0])]
        pictures = [Picture(caption, content) for caption, content in zip(("image", "hint") * 2, shown, strict=True)]
        groups: Groups = [
            (PRIVATE, "a public image plays the part", pictures[:2]),
            (WIRE, "what the server receives", wire_pictures(first, self.base)),
            (RECONSTRUCTED, "by the server", pictures[2:]),
        ]
        return Trial(
            groups,
            method,
            float(metrics.psnr_db(image[None], truth.images[chosen : chosen + 1])),
            float(metrics.psnr_db(hints[:1], truth.need_hints()[chosen : chosen + 1])),
            float(self._ceiling[chosen]),
            sum(value.nbytes for value in first.tensors.values()),
        )
