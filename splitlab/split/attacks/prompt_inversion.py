"""Prompts solved for from a sent text embedding."""

import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Annotated

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from splitlab.core.errors import InputError
from splitlab.core.progress import Callback
from splitlab.diffusion.base import Base
from splitlab.split.attacks.record import Attack, Option
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
    beam: Annotated[int, Option("hypotheses kept per sample where none fits", least=1)] = 4,
    tolerance: Annotated[float, Option("relative error up to which a token fits", above=0)] = TOLERANCE,
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

    Needs `encoder_hidden_states`; of the public data, the prompts order the candidates. Hypotheses are ranked by the
    sum of their squared relative residuals; the objective is the samples' mean of the last one.

    Raises:
        InputError: no text embedding was sent (prompts are hidden), or not of the base model's shape.
    """
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
    """Beam search for the token sequences behind `states` `[u, l, d]`, all samples at once."""

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
        for (i, score), residuals, best in zip(askers, steps.tolist(), tokens[order].tolist(), strict=True):
            grown[i] += [_Hypothesis(score + s, (*prefix, t), s) for s, t in zip(residuals, best, strict=True)]


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


ATTACKS = (Attack(prompt_inversion, "prompt inversion", rank=120),)
