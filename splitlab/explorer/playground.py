"""The defence playground: a client made of public images, and a server that attacks at once what it sends."""

from dataclasses import dataclass
from pathlib import Path

import torch

from splitlab.core.errors import InputError
from splitlab.core.pixels import to_uint8
from splitlab.core.seeds import Key, generator
from splitlab.data.image_set import ImageSet
from splitlab.diffusion import metrics
from splitlab.diffusion.base import Base, Encoded, encoded
from splitlab.explorer.explore import PRIVATE, RECONSTRUCTED, WIRE, Groups, Picture, png, wire_pictures
from splitlab.split.client import Client, client_message
from splitlab.split.defences import Defences, disguised, unseen
from splitlab.split.defences.timestep_floor import draw_timesteps, last_timestep
from splitlab.split.messages import Knowledge, Observation
from splitlab.split.server import run_attack


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
        self._encoded: dict[str, Encoded] = {}
        self._ceiling = metrics.psnr_db(base.decode(self._client(Defences()).data.latents), self.images.images)

    def _client(self, defences: Defences) -> Client:
        """Play the client: the one of training, with a published key."""
        key = Key.published(0)
        images = disguised(self.images, defences, key=key)
        if images.digest not in self._encoded:
            self._encoded[images.digest] = encoded(self.base, images, cache=self.cache)
        data = self._encoded[images.digest]
        return Client(0, self.base, data, torch.arange(len(data)), defences, key)

    def messages(self, chosen: int, timestep: int, defences: Defences, n_messages: int) -> Observation:
        """Send the chosen image and `n_messages` - 1 others behind it, as the server receives them.

        Samples that are mixed come in whole groups. The timestep is moved to the nearest that such a client sends.

        Raises:
            InputError: no client can apply the defences to these images.
        """
        client, alphas_cumprod = self._client(defences), self.base.alphas_cumprod
        draw, group = generator("playground", chosen), defences.key_mixing or 1
        others = torch.randperm(len(self.images), generator=draw)
        n_groups = max(1, min(-(-n_messages // group), len(self.images) // group))
        order = torch.cat([torch.tensor([chosen]), others[others != chosen]])[: n_groups * group]
        timesteps = draw_timesteps(defences, len(order), alphas_cumprod, draw)
        timesteps[:group] = min(max(timestep, defences.timestep_floor), last_timestep(defences, alphas_cumprod))
        return client_message(client, chosen, order, timesteps=timesteps)[0]

    def trial(
        self, chosen: int, timestep: int, defences: Defences, *, send_label: bool = True, n_messages: int = 64
    ) -> Trial:
        """Send an image and attack it: by algebra where the label is sent, else by the public U-Net.

        The hint follows by algebra either way, since it needs the noisy latents only.

        Raises:
            InputError: no client can apply the defences to these images.
        """
        sent = self.messages(chosen, timestep, defences, n_messages)
        knowledge = Knowledge(self.base, "split", defences, self.images.size, self._public, cache=self.cache)
        draw = generator("playground attack")
        solved = run_attack("closed_form", [sent], knowledge, generator=draw)
        image, method = torch.as_tensor(solved.images)[0], "closed form"
        first = sent.map(lambda value: value[:1])
        if not send_label:
            first = first.without("noise")
            image = torch.as_tensor(run_attack("one_step", [first], knowledge, generator=draw).images)[0]
            method = "image: one-step denoising by the public U-Net; hint: closed form, which needs no label"
        if missed := ", ".join(defence.name for defence in unseen(defences)):
            method += f"; this attacker does not undo {missed}"
        truth = self.images
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
