"""Which public sample, disguised, would have been sent like this? Bayes over what disguises leave."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated

import torch
from jaxtyping import Float, Int
from torch import Tensor

from splitlab.core.errors import InputError
from splitlab.core.progress import Callback
from splitlab.core.seeds import Key
from splitlab.data.colours import COLOURS
from splitlab.data.image_set import ImageSet, digest
from splitlab.diffusion import metrics
from splitlab.diffusion.base import Base, encoded
from splitlab.split.attacks.calibration import GALLERY, N_PUBLIC, choose_sharpness
from splitlab.split.attacks.closed_form import hint_latents
from splitlab.split.attacks.latent_view import averaged, labelled, latent_view, used_fields
from splitlab.split.attacks.nearest_public import SAMPLES
from splitlab.split.attacks.record import Attack, Option
from splitlab.split.attacks.simulated_client import imitate
from splitlab.split.defences import disguised, disguises
from splitlab.split.defences.borrowed_colours import colours_of, discs
from splitlab.split.defences.hint_layout_noise import layout, sent_layout
from splitlab.split.defences.random_symmetry import SYMMETRIES, every_turn
from splitlab.split.identification import identified_as_sent
from splitlab.split.messages import Knowledge, Observation, Reconstruction, senders

LEAST_STD = 0.1
"""Least standard deviation of a view, for what plain colours leave out of an image."""

SAME_LAYOUT = 0.01
"""Distance of two layouts, in shares of the picture's side, up to which they are one that was sent twice."""


@torch.no_grad()
def surrogate_posterior(
    observations: Sequence[Observation],
    knowledge: Knowledge,
    *,
    generator: torch.Generator,
    callback: Callback | None = None,
    sharpness: Annotated[float, Option("power of the weights; 0: the one that recognises most", least=0)] = 0.0,
) -> Reconstruction:
    """Weigh every public sample by how likely its disguise is to have sent each message; answer with the weighted mean.

    Where clients turn their samples, every public sample is weighed in all eight turns; the answer is turned as sent.
    Messages of one client that show one layout and name one prompt are of one image (`same_image`): their views are
    averaged first, since a disguise stays and noise that is drawn anew does not.

    The layout is read off the sent hint, exactly but for its noise, which is Gaussian and of known size. The view of
    the latents (`latent_view`) is compared with what each public disc would look like in the colours that the
    sent prompt names: between the latents of two plain pictures, position by position as far as the disc covers it.
    Images are answered in the sent colours, since the true ones were never sent.

    Needs `timesteps`, `noisy_latents` and, against a layout, `smashed`.

    Raises:
        InputError: none of `borrowed_colours`, `hint_layout_noise` and `random_symmetry` is on.
    """
    if not disguises(knowledge.defences):
        raise InputError(
            "surrogate_posterior is for clients with borrowed_colours, hint_layout_noise or random_symmetry; "
            "take nearest_public instead"
        )
    seen = labelled(observations, knowledge)
    gallery = _Gallery(knowledge)
    prompts = _prompts(seen, knowledge)
    likelihood, first, labels = gallery.log_likelihood(seen, observations, prompts)
    objective: tuple[float, ...] = ()
    if not sharpness:
        sharpness, objective = _calibrated(gallery, knowledge, generator, callback)
    weights = (sharpness * likelihood).softmax(1)
    used = tuple(dict.fromkeys((*used_fields(seen), *(["smashed"] if knowledge.defences.hint_layout_noise else []))))
    images = gallery.pictures(weights, [prompts[i] for i in first.tolist()] if prompts else ())
    return Reconstruction(images[labels], gallery.drawn(weights)[labels], used=used, objective=objective, n_evals=1)


def _prompts(seen: Observation, knowledge: Knowledge) -> tuple[str, ...]:
    """Read the borrowed prompts off the messages: of all there can be, those of nearest text embedding."""
    if not knowledge.defences.borrowed_colours:
        return ()
    every = [f"{disc} circle with {ground} background" for disc in COLOURS for ground in COLOURS]
    known = knowledge.base.encode_prompts(every).flatten(1)
    nearest = torch.cdist(seen.need("encoder_hidden_states").flatten(1), known).argmin(1)
    return tuple(every[i] for i in nearest.tolist())


def _calibrated(
    gallery: "_Gallery", knowledge: Knowledge, generator: torch.Generator, callback: Callback | None
) -> tuple[float, tuple[float, ...]]:
    """Disguise and send public samples; choose the sharpness under which most are recognised by the hint."""
    public, defences = knowledge.public, knowledge.defences
    truth = torch.randperm(len(public), generator=generator)[:N_PUBLIC]
    part = disguised(public.subset(truth.tolist()), defences, key=Key.published(("rehearsal", int(truth[0]))))
    data = encoded(knowledge.base, part)
    message, _ = imitate(data, knowledge, len(truth), generator, chosen=torch.arange(len(truth)))
    prompts = part.prompts if defences.borrowed_colours else ()
    grouped, _, labels = gallery.log_likelihood(message, [message], prompts)
    likelihood = grouped[labels]
    likelihood.unflatten(1, (-1, len(public)))[torch.arange(len(truth)), :, truth] = -torch.inf
    gallery_indices = metrics.draw_galleries(len(public), truth, min(GALLERY, len(public)), generator)

    def recognised(power: float) -> Tensor:
        hints = gallery.drawn((power * likelihood).softmax(1))
        return identified_as_sent(None, hints, public, (), gallery_indices, defences)["hint"]

    return choose_sharpness(recognised, "surrogate_posterior", callback)


class _Gallery:
    """The public samples, in every turn that a client may give them, as far as a disguise leaves something of them."""

    def __init__(self, knowledge: Knowledge):
        self.knowledge = knowledge
        self.public = in_every_turn(knowledge.public) if knowledge.defences.random_symmetry else knowledge.public
        self.layouts = layout(self.public.need_hints())
        borrowed = knowledge.defences.borrowed_colours
        self.discs = discs(self.public.images, self.public.prompts) if borrowed else None

    def log_likelihood(
        self, seen: Observation, observations: Sequence[Observation], prompts: Sequence[str]
    ) -> tuple[Float[Tensor, "k m"], Int[Tensor, " k"], Int[Tensor, " n"]]:
        """Return how likely the messages of each image are, up to a constant, if they were of each public sample.

        Beside it, the first message of each image, and which image each message is of: one each where nothing says.
        """
        defences = self.knowledge.defences
        view, std = latent_view(seen, self.knowledge)
        first = labels = torch.arange(len(view))
        if defences.hint_layout_noise:
            raw = hint_latents(seen, observations, self.knowledge)
            if raw is None:
                raise InputError("the layout is in smashed, which was not sent")
            shown = sent_layout(self.knowledge.base.decode(torch.as_tensor(raw)), defences.hint_layout_noise)
            first, labels = same_image(shown, prompts, senders(observations))
            view, std = averaged(view, std.clamp_min(1e-3), labels, once=defences.per_image_noise)
        distances = self._distances(view, [prompts[i] for i in first.tolist()] if prompts else ())
        total = -distances / (2 * std.flatten().clamp_min(LEAST_STD).square()[:, None])
        if defences.hint_layout_noise:
            total -= torch.cdist(shown[first], self.layouts).square() / (2 * defences.hint_layout_noise**2)
        return total, first, labels

    def _distances(self, view: Tensor, prompts: Sequence[str]) -> Float[Tensor, "n m"]:
        """Return squared distances of latents to each public sample in the colours of each image."""
        base = self.knowledge.base
        if self.discs is None:
            data = encoded(base, self.public, cache=self.knowledge.cache)
            return torch.cdist(view.flatten(1), data.latents.flatten(1)).square()
        disc, ground = (plain_latents(base, colours, self.public.size) for colours in colours_of(prompts))
        share = torch.nn.functional.adaptive_avg_pool2d(self.discs, (view.shape[2], view.shape[3])).flatten(1)
        off, span = view - ground, disc - ground
        crossed = (off * span).sum(1).flatten(1) @ share.T
        covered = span.square().sum(1).flatten(1) @ share.square().T
        return off.square().sum((1, 2, 3))[:, None] - 2 * crossed + covered

    def drawn(self, weights: Float[Tensor, "n m"]) -> Float[Tensor, "n 3 s s"]:
        """Return weighted means of public hints."""
        hints = self.public.need_hints()
        return (weights @ hints.flatten(1)).view(-1, *hints.shape[1:])

    def pictures(self, weights: Float[Tensor, "n m"], prompts: Sequence[str]) -> Float[Tensor, "n 3 s s"]:
        """Return weighted means of public images, in the colours that were borrowed if any were."""
        if self.discs is None:
            return (weights @ self.public.images.flatten(1)).view(-1, *self.public.images.shape[1:])
        disc, ground = colours_of(prompts)
        share = (weights @ self.discs.flatten(1)).view(-1, *self.discs.shape[1:])
        return ground + share * (disc - ground)


def same_image(
    shown: Float[Tensor, "n 3"], prompts: Sequence[str], owners: Int[Tensor, " n"]
) -> tuple[Int[Tensor, " m"], Int[Tensor, " n"]]:
    """Group messages by what a client draws once per image.

    Args:
        shown: the layouts that were sent.
        prompts: the borrowed prompts that were named; none: colours were not borrowed.
        owners: which client sent each.

    Returns the first message of each group, and which group each message is in.
    """
    same = (torch.cdist(shown, shown) < SAME_LAYOUT) & (owners[:, None] == owners[None])
    if prompts:
        names = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
        named = torch.tensor([names[prompt] for prompt in prompts])
        same &= named[:, None] == named[None]
    return same.int().argmax(1).unique(return_inverse=True)  # argmax: the first that is the same


def in_every_turn(public: ImageSet) -> ImageSet:
    """Return a data set in all symmetries of the square, one after the other."""
    return replace(
        public,
        images=every_turn(public.images).flatten(0, 1),
        hints=every_turn(public.need_hints()).flatten(0, 1),
        prompts=public.prompts * SYMMETRIES,
        sources=public.sources * SYMMETRIES,
        digest=digest({"data": public.digest, "in every turn": SYMMETRIES}),
    )


def plain_latents(base: Base, colours: Float[Tensor, "n 3 1 1"], size: int) -> Float[Tensor, "n c h w"]:
    """Encode plain pictures of these colours, in [-1, 1]."""
    return base.encode(colours.expand(-1, -1, size, size).contiguous())


ATTACKS = (Attack(surrogate_posterior, "public samples in disguise", rank=95, family=SAMPLES, takes_surrogates=False),)
