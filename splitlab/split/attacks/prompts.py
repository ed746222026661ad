"""Prompts: solved for from a sent text embedding, or guessed from the image where prompts are hidden."""

import itertools
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from splitlab.core.errors import InputError
from splitlab.core.progress import Callback
from splitlab.diffusion.base import Base, Encoded, encoded
from splitlab.split.attacks.latent_view import labelled, latent_view, matching_timesteps
from splitlab.split.attacks.record import Attack
from splitlab.split.messages import Knowledge, Observation, Reconstruction, stack

TOLERANCE = 2e-3
"""A token fits if it predicts the sent state to that relative error: fp16 rounds to 3e-4 at worst, and in the shipped
text model another token is off by 6e-3 at least."""


def normalise_prompt(text: str) -> str:
    """Return a prompt as CLIP's tokenizer sees it: lower case, words, digits and signs apart, single spaces.

    Two prompts that tokenise alike are equal after this, so "exact match" means equality after it.
    """
    return " ".join(re.findall(r"[^\W\d_]+|\d|[^\w\s]|_", text.lower()))


def word_accuracy(found: str, prompt: str) -> float:
    """Return the share in [0, 1] of words that agree place by place, of the longer of the two (normalised) prompts."""
    ours, theirs = normalise_prompt(found).split(), normalise_prompt(prompt).split()
    return sum(a == b for a, b in zip(ours, theirs, strict=False)) / max(1, len(ours), len(theirs))


def prompt_inversion(
    observations: Sequence[Observation],
    knowledge: Knowledge,
    *,
    generator: torch.Generator,
    callback: Callback | None = None,
    beam: int = 4,
    tolerance: float = TOLERANCE,
) -> Reconstruction:
    """Read the prompts off the sent text embeddings, token by token.

    The embedding is the last hidden state of a public, causal text model: state i depends on tokens 0 … i only, so
    given the tokens before it, token i is the one that predicts state i. Candidates are tried in tiers, the next only
    where none so far fits: tokens that follow the last one somewhere in the public prompts, all tokens of public
    prompts, the whole vocabulary. Samples with a common beginning share the work, and a sample that even the whole
    vocabulary does not fit (no output of this text model) is searched among the first tier from there on.

    The last tier costs one pass of the text model over its vocabulary per beginning: 20 ms for the shipped model,
    minutes of CPU time for the 49,408 tokens of Stable Diffusion 1.5's. Signs for which the shipped tokenizer has no
    token become its end-of-text token, and there the search ends.

    Args:
        observations: what was sent; needs `encoder_hidden_states`.
        knowledge: the threat model; of the public data, the prompts order the candidates.
        generator: unused, nothing is drawn.
        callback: told of every position, with the samples' mean squared relative residual.
        beam: hypotheses kept per sample where none fits, by the sum of their squared relative residuals.
        tolerance: relative error up to which a token fits.

    Raises:
        InputError: no text embedding was sent (prompts are hidden), `beam` is below 1, or the embeddings have
            another shape than the base model's.
    """
    if beam < 1:
        raise InputError(f"beam is a number of hypotheses and must be 1 or more, got {beam}")
    base = knowledge.base
    states, inverse = torch.unique(_embeddings(observations, base), dim=0, return_inverse=True)
    search = _Search(base, knowledge.public.prompts, states, beam, tolerance)
    objective = []
    last = base.text_shape[0] - 1
    for position in tqdm(range(1, last + 1), desc="prompt inversion", mininterval=2, leave=False):
        if not search.advance(position):
            break
        objective.append(search.residual())
        if callback:
            callback("prompt_inversion", position, last, objective[-1])
    texts = [base.tokenizer.decode(h[0].tokens, skip_special_tokens=True).strip() for h in search.found]
    return Reconstruction(
        prompts=tuple(texts[i] for i in inverse.tolist()),
        used=("encoder_hidden_states",),
        objective=tuple(objective),
        n_evals=search.n_evals // max(1, len(states)),
    )


def _embeddings(observations: Sequence[Observation], base: Base) -> Float[Tensor, "n l d"]:
    sent = stack(observations).encoder_hidden_states
    if sent is None:
        raise InputError("no encoder_hidden_states were sent (prompts are hidden): use prompt_guess instead")
    if tuple(sent.shape[1:]) != base.text_shape:
        raise InputError(
            f"encoder_hidden_states are {tuple(sent.shape[1:])} per sample, the base model's {base.text_shape}: "
            "give the base model that the run used"
        )
    return sent


@dataclass(frozen=True, order=True)
class _Hypothesis:
    score: float
    tokens: tuple[int, ...]
    step: float = field(default=0.0, compare=False)  # squared relative residual of the last token


class _Search:
    """Beam search for the token sequences behind `states` `[u, l, d]`, all samples abreast."""

    def __init__(self, base: Base, prompts: Iterable[str], states: Tensor, beam: int, tolerance: float):
        self.base, self.states, self.beam, self.limit = base, states, beam, tolerance**2
        self.start, self.end = int(base.tokenizer.bos_token_id), int(base.tokenizer.eos_token_id)
        self.power = states.square().sum(-1).clamp_min(1e-12)
        first = token_states(base, torch.empty(1, 0, dtype=torch.long), torch.tensor([self.start]))[0, 0]
        fit = (states[:, 0] - first).square().sum(-1) / self.power[:, 0]
        self.foreign = (fit > self.limit).tolist()  # not this model's, or altered: no use searching everything
        self.found = [[_Hypothesis(0.0, (self.start,))] for _ in states]
        self.n_evals = 0
        self._learn(prompts)

    def _learn(self, prompts: Iterable[str]) -> None:
        followers: dict[int, set[int]] = defaultdict(lambda: {self.end})
        for ids in self.base.tokenizer(sorted(set(prompts))).input_ids:
            for token, following in itertools.pairwise(ids):
                followers[token].add(following)
        self.followers = followers
        self.public = torch.tensor(sorted(set().union({self.end}, *followers.values())))
        self.vocabulary = torch.arange(len(self.base.tokenizer))

    def residual(self) -> float:
        """Return the mean over samples of the best hypothesis's last squared relative residual."""
        return sum(hypotheses[0].step for hypotheses in self.found) / max(1, len(self.found))

    def advance(self, position: int) -> bool:
        """Find every unfinished sample's token at `position`; False if there is none left."""
        live = [i for i, hypotheses in enumerate(self.found) if hypotheses[0].tokens[-1] != self.end or position == 1]
        open_ended = {i: [h for h in self.found[i] if len(h.tokens) == position] for i in live}
        grown = self._tier(open_ended, position, None)
        for candidates in (self.public, self.vocabulary):
            unfit = [i for i in live if not self.foreign[i] and min(grown[i]).step > self.limit]
            grown |= self._tier({i: open_ended[i] for i in unfit}, position, candidates)
        for i in live:
            self.foreign[i] |= min(grown[i]).step > self.limit
            ended = [h for h in self.found[i] if len(h.tokens) < position]
            fitting = [h for h in grown[i] if h.step <= self.limit]
            self.found[i] = sorted((fitting or grown[i]) + ended)[: self.beam]
        return bool(live)

    def _tier(
        self, wanted: dict[int, list[_Hypothesis]], position: int, candidates: Tensor | None
    ) -> dict[int, list[_Hypothesis]]:
        """Extend hypotheses by their best `beam` of the candidates (None: those that follow their last token)."""
        askers: dict[tuple[int, ...], list[tuple[int, float]]] = defaultdict(list)
        for i, hypotheses in wanted.items():
            for hypothesis in hypotheses:
                askers[hypothesis.tokens].append((i, hypothesis.score))
        groups: dict[int | None, list[tuple[int, ...]]] = defaultdict(list)
        for prefix in sorted(askers):
            groups[prefix[-1] if candidates is None else None].append(prefix)
        grown: dict[int, list[_Hypothesis]] = defaultdict(list)
        for last, prefixes in groups.items():
            tokens = candidates if candidates is not None else torch.tensor(sorted(self.followers[last or 0]))
            for part in torch.tensor(prefixes).split(max(1, 4096 // len(tokens))):
                self.n_evals += len(part) * len(tokens)
                for prefix, predicted in zip(part.tolist(), token_states(self.base, part, tokens), strict=True):
                    self._rank(tuple(prefix), predicted, tokens, position, askers[tuple(prefix)], grown)
        return grown

    def _rank(
        self,
        prefix: tuple[int, ...],
        predicted: Tensor,
        tokens: Tensor,
        position: int,
        askers: list[tuple[int, float]],
        grown: dict[int, list[_Hypothesis]],
    ) -> None:
        samples = torch.tensor([i for i, _ in askers])
        distance = (
            torch.cdist(self.states[samples, position], predicted, compute_mode="donot_use_mm_for_euclid_dist").square()
            / self.power[samples, position, None]
        )
        steps, order = distance.topk(min(self.beam, len(tokens)), dim=1, largest=False)
        for (i, score), own, chosen in zip(askers, steps.tolist(), tokens[order].tolist(), strict=True):
            grown[i] += [_Hypothesis(score + s, (*prefix, t), s) for s, t in zip(own, chosen, strict=True)]


@torch.no_grad()
def token_states(
    base: Base, prefixes: Int[Tensor, "p i"], candidates: Int[Tensor, " m"], *, rows: int = 512
) -> Float[Tensor, "p m d"]:
    """Return the text model's last hidden state of every candidate token after every prefix.

    Candidates do not look at one another, so as many as the text model has positions left go into one sequence: all
    at position i, each attending to the prefix and to itself.

    Args:
        base: the public models.
        prefixes: token sequences that begin with the start token (or are empty).
        candidates: tokens to follow them.
        rows: sequences per pass of the text model.
    """
    length, position = base.text_shape[0], prefixes.shape[1]
    width = min(length - position, len(candidates))
    n_rows = -(-len(candidates) // width)
    padded = torch.cat([candidates, candidates[:1].expand(n_rows * width - len(candidates))]).view(n_rows, width)
    ids = torch.cat(
        [prefixes.repeat_interleave(n_rows, 0), padded.repeat(len(prefixes), 1)],
        dim=1,
    )
    places = torch.tensor([*range(position), *[position] * width])
    visible = torch.ones(position + width, position + width, dtype=torch.bool).tril()
    visible[position:, position:] = torch.eye(width, dtype=torch.bool)
    mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)[None, None]
    parts = [
        base.text_encoder(
            part, attention_mask=mask.expand(len(part), -1, -1, -1), position_ids=places.expand(len(part), -1)
        ).last_hidden_state[:, position:]
        for part in ids.split(rows)
    ]
    return torch.cat(parts).reshape(len(prefixes), n_rows * width, -1)[:, : len(candidates)]


def prompt_guess(
    observations: Sequence[Observation],
    knowledge: Knowledge,
    *,
    generator: torch.Generator,
    callback: Callback | None = None,
    steps: int = 500,
    batch: int = 64,
    lr: float = 6e-3,
    shortlist: int = 8,
    draws: int = 4,
    weight: float = 2.0,
) -> Reconstruction:
    """Guess hidden prompts from what the messages still say about the image.

    1. The messages become latents plus Gaussian noise of known strength (`channel.latent_view`): with the label and
       without feature noise, the latents themselves.
    2. A captioner, trained on public (latents, prompt) pairs noised alike, proposes a shortlist by beam search.
    3. The public U-Net judges it (diffusion classifier, Li et al. 2023): the prompt under which it denoises the view
       best is the likeliest; both logarithms of probability are added.

    The U-Net knows more than the captioner, but can judge few prompts. Words of no public prompt cannot be guessed.

    Args:
        observations: what was sent; needs `noisy_latents` and `timesteps`, and takes the label where there is one.
        knowledge: the threat model.
        generator: of initialisation, training draws and the U-Net's noise.
        callback: told of every training step's loss, then of every draw.
        steps, batch, lr: of the captioner's training (AdamW, warm-up, cosine decay).
        shortlist: prompts proposed per sample.
        draws: noise draws per sample and prompt for the U-Net; 0: the captioner decides alone.
        weight: of the U-Net's squared error against the captioner's log probability (chosen on held-out shapes).

    Raises:
        InputError: noisy latents or timesteps were not sent, or `shortlist` is below 1.
    """
    if shortlist < 1:
        raise InputError(f"shortlist is a number of prompts and must be 1 or more, got {shortlist}")
    seen, base = labelled(observations, knowledge), knowledge.base
    view, std = latent_view(seen, knowledge)
    data = encoded(base, knowledge.public, cache=knowledge.cache)
    ids = prompt_tokens(base, knowledge.public.prompts)
    captioner = _fresh_captioner(view.shape[1], ids, base, generator)
    losses = _fit(captioner, data, ids, std, generator, callback, steps=steps, batch=batch, lr=lr)
    tokens, scores = _propose(captioner, base, view, std, beam=shortlist, length=ids.shape[1])
    for done in range(draws if shortlist > 1 else 0):
        scores = scores - weight / draws * _misfit(knowledge, tokens, view, std, generator)
        if callback:
            callback("prompt_guess", done + 1, draws, losses[-1] if losses else 0.0)
    chosen = tokens[torch.arange(len(tokens)), scores.argmax(1)]
    label = ("noise",) if seen.noise_pred is None else ("noise_pred", "noise_pred_gradient")
    return Reconstruction(
        prompts=tuple(text.strip() for text in base.tokenizer.batch_decode(chosen, skip_special_tokens=True)),
        used=("timesteps", "noisy_latents", *(label if seen.noise is not None else ())),
        objective=tuple(losses),
        n_evals=1 + shortlist * draws,
    )


def prompt_tokens(base: Base, prompts: Sequence[str]) -> Int[Tensor, "n k"]:
    """Return the prompts' tokens, from start to end of text, padded to the longest with the end token."""
    found = base.tokenizer(list(prompts)).input_ids
    longest = max(len(ids) for ids in found)
    return torch.tensor([[*ids, *[int(base.tokenizer.eos_token_id)] * (longest - len(ids))] for ids in found])


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


def _fresh_captioner(channels: int, ids: Int[Tensor, "n k"], base: Base, draw: torch.Generator) -> Captioner:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**31, (1,), generator=draw)))
        return Captioner(channels, ids, base.text_shape[1])


def _fit(
    captioner: Captioner,
    data: Encoded,
    ids: Int[Tensor, "n k"],
    std: Float[Tensor, "m 1 1 1"],
    draw: torch.Generator,
    callback: Callback | None,
    *,
    steps: int,
    batch: int,
    lr: float,
) -> list[float]:
    """Train on public pairs, noised as the messages are."""
    optimizer = torch.optim.AdamW(captioner.parameters(), lr=lr, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rise_and_fall(step, max(1, steps)))
    wanted = torch.searchsorted(captioner.tokens, ids[:, 1:].contiguous())
    wanted[:, 1:][ids[:, 1:-1] == ids[0, -1]] = -100  # past the end: every row's last token is the end's
    losses = []
    for step in tqdm(range(steps), desc="captioner", mininterval=2, leave=False):
        chosen = torch.randint(len(data), (batch,), generator=draw)
        level = _blurred(std[torch.randint(len(std), (batch,), generator=draw)])
        latents = data.latents[chosen]
        view = latents + level * torch.randn(latents.shape, generator=draw)
        if torch.rand((), generator=draw) < 0.5:
            view = view.flip(3)
        scores = captioner(captioner.features(view, level), data.text[chosen, : ids.shape[1] - 1])
        loss = F.nll_loss(scores.flatten(0, 1), wanted[chosen].flatten(), ignore_index=-100)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if callback:
            callback("prompt_guess", step + 1, steps, losses[-1])
    return losses


def _rise_and_fall(step: int, steps: int) -> float:
    """Return the learning rate's factor in (0, 1]: a linear warm-up over a tenth of the steps, then half a cosine."""
    return min(1.0, 10 * (step + 1) / steps) * 0.5 * (1 + math.cos(math.pi * step / (steps + 1)))


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
    draw: torch.Generator,
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
    states = view + r * torch.randn(view.shape, generator=draw)
    unique, inverse = torch.unique(tokens.flatten(0, 1), dim=0, return_inverse=True)
    text = torch.cat([base.text_encoder(part).last_hidden_state for part in unique.split(256)])
    rows, misfits = torch.arange(len(view)).repeat_interleave(tokens.shape[1]), []
    for part in torch.arange(len(rows)).split(batch):
        own = rows[part]
        noisy_latents = states[own] / (1 + q[own].square()).sqrt()
        noise_pred = base.unet(noisy_latents, timesteps[own], encoder_hidden_states=text[inverse[part]]).sample
        mean = states[own] - noise_pred * (q - std.square() / q)[own]
        misfits.append((view[own] - mean).square().flatten(1).sum(1) / r.square())
    return torch.cat(misfits).view(tokens.shape[:2])


ATTACKS = (
    Attack(prompt_inversion, "prompt inversion", rank=120),
    Attack(prompt_guess, "prompt guess", rank=121),
)
