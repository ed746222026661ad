"""Prompts guessed from what a message says of the image."""

import math
from collections.abc import Sequence
from typing import Annotated

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from splitlab.core.progress import Callback
from splitlab.core.schedule import cosine
from splitlab.diffusion.base import Base, Encoded, encoded
from splitlab.diffusion.sampling import Level, level_model
from splitlab.split.attacks.latent_view import labelled, latent_view, matching_timesteps, used_fields
from splitlab.split.attacks.networks import fit, initialised
from splitlab.split.attacks.record import Attack, Option
from splitlab.split.messages import Knowledge, Observation, Reconstruction


def prompt_guess(
    observations: Sequence[Observation],
    knowledge: Knowledge,
    *,
    generator: torch.Generator,
    callback: Callback | None = None,
    steps: Annotated[int, Option("training steps of the captioner (AdamW, warm-up, cosine decay)", least=0)] = 500,
    batch: Annotated[int, Option("samples per training step", least=1)] = 64,
    lr: Annotated[float, Option("highest learning rate", above=0)] = 6e-3,
    shortlist: Annotated[int, Option("prompts proposed per sample", least=1)] = 8,
    draws: Annotated[int, Option("U-Net noise draws per prompt; 0: the captioner decides alone", least=0)] = 4,
    weight: Annotated[float, Option("of the U-Net's squared error against a log probability", least=0)] = 2.0,
) -> Reconstruction:
    """Guess hidden prompts from what the messages still say about the image.

    Needs `noisy_latents` and `timesteps`, and takes the label where there is one. The U-Net knows more than the
    captioner, but can judge few prompts. Words of no public prompt cannot be guessed. The default weight was chosen on
    held-out shapes.
    """
    # Step 1: latents plus Gaussian noise of known strength; none with the label and without feature noise.
    seen, base = labelled(observations, knowledge), knowledge.base
    view, std = latent_view(seen, knowledge)

    # Step 2: a captioner, trained on public (latents, prompt) pairs noised alike, proposes a shortlist by beam search.
    data = encoded(base, knowledge.public, cache=knowledge.cache)
    ids = prompt_tokens(base, knowledge.public.prompts)
    with initialised(generator):
        captioner = Captioner(view.shape[1], ids, base.text_shape[1])
    losses = _fit(captioner, data, ids, std, generator, callback, steps=steps, batch=batch, lr=lr)
    tokens, scores = _propose(captioner, base, view, std, beam=shortlist, length=ids.shape[1])

    # Step 3: the prompt under which the public U-Net denoises the view best is the likeliest (diffusion classifier, Li
    # et al. 2023); both logarithms of probability are added.
    for done in range(draws if shortlist > 1 else 0):
        scores = scores - weight / draws * _misfit(knowledge, tokens, view, std, generator)
        if callback:
            callback("prompt_guess", done + 1, draws, losses[-1] if losses else 0.0)
    chosen = tokens[torch.arange(len(tokens)), scores.argmax(1)]
    return Reconstruction(
        prompts=tuple(text.strip() for text in base.tokenizer.batch_decode(chosen, skip_special_tokens=True)),
        used=used_fields(seen, prompts=False),
        objective=tuple(losses),
        n_evals=1 + shortlist * draws,
    )


def prompt_tokens(base: Base, prompts: Sequence[str]) -> Int[Tensor, "n k"]:
    """Return the prompts' tokens, from start to end of text, padded to the longest with the end token."""
    rows = base.tokenizer(list(prompts)).input_ids
    longest = max(len(ids) for ids in rows)
    return torch.tensor([[*ids, *[int(base.tokenizer.eos_token_id)] * (longest - len(ids))] for ids in rows])


class Captioner(nn.Module):
    """Predicts a prompt's next token from noised latents and the public text model's state at the last token.

    That state asks, by attention, for places in the map: what is where does not matter, so few pairs teach much.
    """

    def __init__(self, channels: int, ids: Int[Tensor, "n k"], text_width: int, *, width: int = 48, heads: int = 4):
        super().__init__()
        self.tokens = ids.unique()
        self.heads = heads
        self.look = nn.Sequential(
            nn.Conv2d(channels + 1, width, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.SiLU(),
        )
        self.query = nn.Linear(text_width, width * heads)
        self.text = nn.Linear(text_width, 4 * width)
        self.image = nn.Linear(width * heads, 4 * width)
        self.last = nn.Sequential(
            nn.SiLU(), nn.Linear(4 * width, 4 * width), nn.SiLU(), nn.Linear(4 * width, len(self.tokens))
        )

    def features(self, view: Float[Tensor, "n c h w"], std: Float[Tensor, "n 1 1 1"]) -> Float[Tensor, "n p k"]:
        """Look at latents plus noise of `std`; place by place."""
        scale = (1 + std.square()).sqrt()
        level = scale.log().expand(-1, 1, *view.shape[2:])
        return self.look(torch.cat([view / scale, level], 1)).flatten(2).transpose(1, 2)

    def forward(self, features: Float[Tensor, "n p k"], states: Float[Tensor, "n l d"]) -> Float[Tensor, "n l v"]:
        """Return the log probabilities of `self.tokens` after each state."""
        queries = self.query(states).unflatten(2, (self.heads, -1))
        looks = torch.einsum("nlhk,npk->nlhp", queries, features) / queries.shape[-1] ** 0.5
        seen = torch.einsum("nlhp,npk->nlhk", looks.softmax(-1), features).flatten(2)
        return self.last(self.text(states) + self.image(seen)).log_softmax(-1)


def _fit(
    captioner: Captioner,
    data: Encoded,
    ids: Int[Tensor, "n k"],
    std: Float[Tensor, "m 1 1 1"],
    generator: torch.Generator,
    callback: Callback | None,
    *,
    steps: int,
    batch: int,
    lr: float,
) -> list[float]:
    """Train on public pairs, noised as the messages are."""
    wanted = torch.searchsorted(captioner.tokens, ids[:, 1:].contiguous())
    wanted[:, 1:][ids[:, 1:-1] == ids[0, -1]] = -100  # past the end: every row's last token is the end's

    def loss() -> Tensor:
        chosen = torch.randint(len(data), (batch,), generator=generator)
        level = _blurred(std[torch.randint(len(std), (batch,), generator=generator)])
        latents = data.latents[chosen]
        view = latents + level * torch.randn(latents.shape, generator=generator)
        if torch.rand((), generator=generator) < 0.5:
            view = view.flip(3)
        scores = captioner(captioner.features(view, level), data.text[chosen, : ids.shape[1] - 1])
        return F.nll_loss(scores.flatten(0, 1), wanted[chosen].flatten(), ignore_index=-100)

    def rate(step: int) -> float:
        return lr * cosine(1.0, step, steps + 1, warm_up=steps / 10)

    options = {"steps": steps, "lr": lr, "weight_decay": 0.01, "max_norm": math.inf}
    return fit(captioner, loss, "prompt_guess", callback, rate=rate, **options)  # type: ignore[arg-type]


def _blurred(std: Tensor) -> Tensor:
    return (std.square() + 0.02**2).sqrt()  # fp16 and the VAE's own error are there even without any noise


@torch.no_grad()
def _propose(
    captioner: Captioner,
    base: Base,
    view: Float[Tensor, "n c h w"],
    std: Float[Tensor, "n 1 1 1"],
    *,
    beam: int,
    length: int,
) -> tuple[Int[Tensor, "n b l"], Float[Tensor, "n b"]]:
    """Return the captioner's likeliest prompts by beam search, padded for the text model, and their log probability."""
    features, end = captioner.features(view, _blurred(std)), int(base.tokenizer.eos_token_id)
    at_end = captioner.tokens == end
    beams = torch.full((len(view), 1, 1), int(base.tokenizer.bos_token_id))
    scores = torch.zeros(len(view), 1)
    for position in range(1, length):
        unique, inverse = torch.unique(beams.flatten(0, 1), dim=0, return_inverse=True)
        states = torch.cat([base.text_encoder(part).last_hidden_state[:, -1] for part in unique.split(512)])
        following = captioner(features, states[inverse].unflatten(0, beams.shape[:2]))
        if position > 1:
            over = beams[..., -1:] == end
            following = torch.where(over, torch.where(at_end, 0.0, -1e9), following)
        if position == length - 1:
            following = torch.where(at_end, following, -1e9)  # no longer than public prompts are
        total = (scores[..., None] + following).flatten(1)
        scores, places = total.topk(min(beam, total.shape[1]), 1)
        parents, tokens = places // len(captioner.tokens), captioner.tokens[places % len(captioner.tokens)]
        beams = torch.cat([beams.gather(1, parents[..., None].expand(-1, -1, position)), tokens[..., None]], 2)
    padding = torch.full((*beams.shape[:2], base.text_shape[0] - length), int(base.tokenizer.pad_token_id))
    return torch.cat([beams, padding], 2), scores


@torch.no_grad()
def _misfit(
    knowledge: Knowledge,
    tokens: Int[Tensor, "n b l"],
    view: Float[Tensor, "n c h w"],
    std: Float[Tensor, "n 1 1 1"],
    generator: torch.Generator,
    *,
    added: int = 300,
    batch: int = 128,
) -> Float[Tensor, "n b"]:
    """Return how badly the public U-Net, given each prompt, denoises the view after more noise was added to it.

    The view is y = latents + s n; x = y + r n' is a diffusion state of standard deviation q = sqrt(s² + r²), in which
    the U-Net predicts the noise, so E[y | x] = x - q noise_pred (1 - s²/q²). The misfit is |y - E[y | x]|² / r²; with
    s = 0 it is the U-Net's training loss, summed over the map. r is the level of timestep `added`.
    """
    base = knowledge.base
    alpha = base.alphas_cumprod[min(added, base.n_timesteps - 1)]
    r = ((1 - alpha) / alpha).sqrt()
    q = (std.square() + r.square()).sqrt()
    timesteps, _ = matching_timesteps(q, knowledge)
    states = view + r * torch.randn(view.shape, generator=generator)
    unique, inverse = torch.unique(tokens.flatten(0, 1), dim=0, return_inverse=True)
    text = torch.cat([base.text_encoder(part).last_hidden_state for part in unique.split(256)])
    rows, misfits = torch.arange(len(view)).repeat_interleave(tokens.shape[1]), []
    for part in torch.arange(len(rows)).split(batch):
        row = rows[part]
        model = level_model(base.unet, text[inverse[part]])
        noise_pred = model(states[row], Level(timesteps[row], q[row]))
        mean = states[row] - noise_pred * (q - std.square() / q)[row]
        misfits.append((view[row] - mean).square().flatten(1).sum(1) / r.square())
    return torch.cat(misfits).view(tokens.shape[:2])


ATTACKS = (Attack(prompt_guess, "prompt guess", rank=121),)
