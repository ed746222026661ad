"""What private fine-tuning conditions on: a class, a text, or nothing; and the noise predictor together with it."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import CLIPTextModel

from splitlab.core.errors import InputError
from splitlab.diffusion.base import Base
from splitlab.diffusion.denoisers import Denoiser

CONDITIONINGS = ("class", "text", "none")


class ClassEmbedder(ModelMixin, ConfigMixin):
    """One learnable sequence of hidden states per class, in place of the text encoder's output.

    Args:
        n_classes: how many.
        length, width: of a sequence, tokens and features.
    """

    @register_to_config
    def __init__(self, n_classes: int, length: int, width: int):
        super().__init__()
        self.states = nn.Embedding(n_classes, length * width)

    def forward(self, labels: Int[Tensor, " b"]) -> Float[Tensor, "b l d"]:
        """Look the classes' hidden states up."""
        return self.states(labels).unflatten(1, (self.config.length, self.config.width))


class TextEmbedder(nn.Module):
    """A CLIP text model from token ids `[b, l]` to hidden states `[b, l, d]`, fit for per-sample gradients.

    CLIP looks its position embeddings up once for the whole batch; here every sample has its own look-up, so that
    each sample's gradient is its own.
    """

    def __init__(self, text_encoder: CLIPTextModel):
        super().__init__()
        self.text_encoder = text_encoder

    def forward(self, ids: Int[Tensor, "b l"]) -> Float[Tensor, "b l d"]:
        """Encode token ids."""
        positions = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
        return self.text_encoder(ids, position_ids=positions).last_hidden_state


@dataclass(frozen=True)
class Conditioning:
    """How a model is conditioned.

    Attributes:
        kind: one of `CONDITIONINGS`.
        embedder: the trainable `ClassEmbedder` or `TextEmbedder`; None where hidden states are fixed.
        conditions: one per private sample: labels `[n]`, token ids `[n, l]`, or hidden states `[n, l, d]`.
    """

    kind: str
    embedder: nn.Module | None
    conditions: Tensor


def class_embedder(base: Base, classes: Sequence[str]) -> ClassEmbedder:
    """Build the embedder that starts as the base's text encoding of one prompt per class."""
    length, width = base.text_shape
    embedder = ClassEmbedder(len(classes), length, width)
    with torch.no_grad():
        embedder.states.weight.copy_(base.encode_prompts(classes).flatten(1))
    return embedder


def text_embedder(base: Base) -> TextEmbedder:
    """Copy the base's text model; its layers are trainable.

    Its token and position tables stay public: their per-sample gradients would hold the whole vocabulary per image
    (49,408 x 768 for Stable Diffusion 1.5), nearly all of it zeros that only take on noise.
    """
    encoder = copy.deepcopy(base.text_encoder)
    for name, parameter in encoder.named_parameters():
        parameter.requires_grad_("embedding" not in name)
    return TextEmbedder(encoder)


def labels_of(prompts: Sequence[str], classes: Sequence[str]) -> Int[Tensor, " n"]:
    """Return each prompt's class.

    Raises:
        InputError: a prompt names no class.
    """
    number = {prompt: label for label, prompt in enumerate(classes)}
    unknown = sorted(set(prompts) - set(number))
    if unknown:
        raise InputError(
            f"the prompt {unknown[0]!r} is none of the {len(classes)} classes; list every class in `classes`. "
            "They are public, so they are not read off the private data"
        )
    return torch.tensor([number[prompt] for prompt in prompts])


def make_conditioning(
    base: Base, kind: str, prompts: Sequence[str], *, classes: Sequence[str] = (), train_embedder: bool = True
) -> Conditioning:
    """Build what the U-Net is conditioned on, equal to the public base before the first step.

    Args:
        base: the public models.
        kind: "class": a learnable sequence per class; "text": the CLIP text model; "none": the empty prompt.
        prompts: of the private samples.
        classes: for "class": one public prompt per class, in the order of the labels.
        train_embedder: else the embedder stays the base's.

    Raises:
        InputError: an unknown kind, no classes, or a prompt that names none of them.
    """
    if kind not in CONDITIONINGS:
        raise InputError(f"conditioning {kind!r} is unknown; choose one of {', '.join(CONDITIONINGS)}")
    if kind == "none":
        return Conditioning(kind, None, base.encode_prompts([""]).expand(len(prompts), -1, -1))
    if kind == "class":
        if not classes:
            raise InputError("class-conditional training needs `classes`: one public prompt per class, in order")
        labels = labels_of(prompts, classes)
        if train_embedder:
            return Conditioning(kind, class_embedder(base, classes), labels)
        return Conditioning(kind, None, base.encode_prompts(classes)[labels])
    if train_embedder:
        return Conditioning(kind, text_embedder(base), base.token_ids(prompts))
    return Conditioning(kind, None, base.encode_prompts(prompts))


def denoiser(base: Base, conditioning: Conditioning) -> Denoiser:
    """Copy the base's U-Net, nothing of it trainable yet, and join it with the conditioning."""
    unet = copy.deepcopy(base.unet).requires_grad_(False)
    return Denoiser(unet, conditioning.embedder, base.alphas_cumprod)


def save_embedder(embedder: nn.Module | None, folder: Path) -> None:
    """Save a trained embedder in the layout of diffusers: `embedder/` or `text_encoder/`; nothing if there is none."""
    if isinstance(embedder, ClassEmbedder):
        embedder.save_pretrained(folder / "embedder")
    elif isinstance(embedder, TextEmbedder):
        embedder.text_encoder.save_pretrained(folder / "text_encoder")
