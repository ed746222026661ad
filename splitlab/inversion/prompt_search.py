"""The search behind `splitlab.inversion.prompts`: which sequences of tokens span the rows of a gradient?"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import CLIPTextModel

from splitlab.inversion.prefixes import PrefixEncoder, Prefixes
from splitlab.inversion.spans import Rows, captured, complement

FLOOR = 0.2
"""What is left of an eigenvalue of pure noise, in units of the noise, once the noise is subtracted."""

STEP = 1e-3
"""A change must raise a score by more than this, in log10 or units of the noise, to be taken: rounding does not."""

ENOUGH = 2.0
"""Below this mean square, in units of the noise, nothing is left to explain."""

SPREAD, NARROW = 48, 2
"""A thorough search starts from that many first tokens and keeps that many prefixes of each."""

BETTER = 0.8
"""A prompt is exchanged for one that leaves less than this share of what was unexplained before."""

KNOWN = 1e-5
"""A hidden state with a smaller part (relative length) outside the span of the prompts found is explained by them."""


@dataclass(frozen=True)
class Remainder:
    """What some prompts leave unexplained, and the power it can contain along any hidden state.

    Attributes:
        basis: `[d, c]`: orthonormal basis of what is orthogonal to all their hidden states.
        gram: `[c, c]`: the gradient's rows there.
        whiten: `[d, c]`: states times this, squared and summed, are the reciprocal of their power.
    """

    basis: Float[Tensor, "d c"]
    gram: Float[Tensor, "c c"]
    whiten: Float[Tensor, "d c"]
    n_rows: int

    @property
    def level(self) -> float:
        """Mean square of what is left, in units of the noise; about 1 when nothing but noise is."""
        return float(self.gram.trace()) / self.n_rows / max(len(self.gram), 1)

    def power(self, states: Float[Tensor, "*s d"]) -> tuple[Float[Tensor, "*s"], Bool[Tensor, "*s"]]:
        """Return log10 of the power along states, in units of the noise, and which are explained already.

        The power is the largest a² such that a² h hᵀ fits under the gradient's covariance less the noise's (Capon
        1969), h being the state's part outside the explained span, at unit length.
        """
        states = states.double()
        outside = (states @ self.basis).square().sum(-1)
        inverse = (states @ self.whiten).square().sum(-1) * self.n_rows
        power = (outside / inverse.clamp_min(1e-300)).clamp_min(1e-30).log10()
        return power, outside < KNOWN**2 * states.square().sum(-1)

    def total(self, prompts: Prefixes) -> Float[Tensor, " p"]:
        """Sum the log-power over all positions after the first; explained ones count 0."""
        power, known = self.power(prompts.states[:, 1:])
        return power.masked_fill(known, 0.0).sum(-1)


class PromptSearch:
    """Prompts as sequences of tokens, judged by the rows of one update's cross-attention gradients.

    Args:
        rows: the gradients' rows, with unit noise.
        text_encoder: the public text model.
        length: positions that it takes; shorter prompts are padded with `eos`.
        bos, eos: its first and its closing token.
        width: prefixes a beam keeps.
        threshold: evidence that a prompt needs to count.
    """

    def __init__(
        self, rows: Rows, text_encoder: CLIPTextModel, length: int, bos: int, eos: int, width: int, threshold: float
    ):
        self.rows, self.length, self.eos, self.width, self.threshold = rows, length, eos, width, threshold
        self.encoder = PrefixEncoder(text_encoder)
        self.root = self.encoder.start(bos)
        self.n_tokens = text_encoder.config.vocab_size
        vocabulary = torch.arange(self.n_tokens)
        self.tokens, self.eos_only = vocabulary[vocabulary != bos], torch.tensor([eos])

    def remainder(self, found: list[Prefixes]) -> Remainder:
        """Return what `found` leave unexplained."""
        basis = complement(torch.cat([self.root.states[0], *(prompt.states[0] for prompt in found)]))
        left, n = self.rows.matrix @ basis, len(self.rows)
        gram = left.T @ left
        strength, turn = torch.linalg.eigh(gram)
        return Remainder(basis, gram, basis @ turn / (strength - n).clamp_min(FLOOR * n).sqrt(), n)

    def evidence(self, others: list[Prefixes], prompt: Prefixes) -> float:
        """Return how much more a prompt explains, per dimension, than is left over per dimension (noise: about 1)."""
        rest = self.remainder(others)
        energy, rank = captured(rest.gram, prompt.states[0].double() @ rest.basis)
        spare = len(rest.gram) - int(rank)
        if not rank or not spare:
            return 0.0
        return float(energy / rank / ((rest.gram.trace() - energy) / spare).clamp_min(1e-300))

    def add(self, found: list[Prefixes], most: int) -> None:
        """Append prompts to `found` while more than noise is left, then drop those that others explain."""
        while len(found) < most:
            rest = self.remainder(found)
            if rest.level < ENOUGH:
                break
            candidate = self.beam(rest, self.root, self.width)[:1]
            if self.evidence(found, candidate) < self.threshold:
                candidate = self.search(rest)
            if self.evidence(found, candidate) < self.threshold:
                break
            found.append(candidate)
        scores = [self.evidence(_without(found, i), p) for i, p in enumerate(found)]
        while len(found) > 1 and min(scores) < self.threshold:
            del found[scores.index(min(scores))]
            scores = [self.evidence(_without(found, i), p) for i, p in enumerate(found)]

    def revise(self, found: list[Prefixes]) -> bool:
        """Search again for one prompt, given the others: the least convincing that can be bettered; say if one was."""
        totals = [float(self.remainder(_without(found, i)).total(p)) for i, p in enumerate(found)]
        level = self.remainder(found).level
        for index in sorted(range(len(found)), key=totals.__getitem__):
            others = _without(found, index)
            rest = self.remainder(others)
            choices = [self.climb(rest, found[index]), self.search(rest)]
            choices += [self.polish(rest, choice) for choice in choices]
            best = min(choices, key=lambda prompt: self.remainder([*others, prompt]).level)
            if self.remainder([*others, best]).level < BETTER * level:
                found[index] = best
                return True
        return False

    def search(self, rest: Remainder) -> Prefixes:
        """Search for one prompt more thoroughly than one beam: a narrow one after each of many first tokens."""
        firsts = self.beam(rest, self.root, SPREAD, until=2)
        starts = self.beam(rest, firsts, NARROW, groups=len(firsts))
        return max((self.climb(rest, starts[i : i + 1]) for i in range(2)), key=lambda p: float(rest.total(p)))

    def climb(self, rest: Remainder, prompt: Prefixes) -> Prefixes:
        """Improve a prompt's total: the best change of one token, or a new ending, again and again until none helps."""
        while True:
            prompt = self.substitute(prompt, rest.total)
            last = self.last(prompt)
            endings = [self.beam(rest, self.beginning(prompt, place), self.width)[:1] for place in range(1, last + 1)]
            best = max(endings, key=lambda p: float(rest.total(p)))
            if float(rest.total(best)) <= float(rest.total(prompt)) + STEP:
                return prompt
            prompt = best

    def polish(self, rest: Remainder, prompt: Prefixes) -> Prefixes:
        """Change single tokens as long as that leaves less unexplained."""

        def explained(prompts: Prefixes) -> Tensor:
            return captured(rest.gram, prompts.states.double() @ rest.basis)[0] / rest.n_rows

        return self.substitute(prompt, explained)

    def substitute(self, prompt: Prefixes, score: Callable[[Prefixes], Tensor]) -> Prefixes:
        """Put the best token in each place in turn, until no change of one token raises `score`."""
        best, stale, place = float(score(prompt)), 0, 1
        while stale < self.last(prompt):
            variants = self.variants(prompt, place)
            scores = score(variants)
            pick = int(scores.argmax())
            stale += 1
            if float(scores[pick]) > best + STEP:
                prompt, best, stale = variants[pick : pick + 1], float(scores[pick]), 0
            place = place % min(self.last(prompt), self.length - 2) + 1
        return prompt

    def last(self, prompt: Prefixes) -> int:
        """Return the place of a prompt's closing token."""
        return int((prompt.tokens[0] == self.eos).nonzero()[0])

    def beginning(self, prompt: Prefixes, place: int) -> Prefixes:
        """Return a prompt's first `place` tokens."""
        cache = tuple((k[:, :, :place], v[:, :, :place]) for k, v in prompt.cache)
        return Prefixes(prompt.tokens[:, :place], prompt.states[:, :place], cache)

    def variants(self, prompt: Prefixes, place: int) -> Prefixes:
        """Return the prompt with every token of the vocabulary in one place; the closing token ends it there."""
        everyone = torch.zeros(len(self.tokens), dtype=torch.int64)
        result = self.encoder.extend(self.beginning(prompt, place), everyone, self.tokens)
        for position in range(place + 1, self.length):
            ended = (result.tokens[:, -1] == self.eos) | (position == self.length - 1)
            following = prompt.tokens[0, position].where(~ended, self.eos)
            result = self.encoder.extend(result, torch.arange(len(self.tokens)), following)
        return result

    def beam(
        self, rest: Remainder, prefixes: Prefixes, width: int, *, groups: int = 1, until: int | None = None
    ) -> Prefixes:
        """Extend prefixes token by token, keeping those of the largest total power; return them, largest first.

        Args:
            rest: what is to be explained.
            prefixes: where to start, in `groups` groups of equal size, one after the other.
            width: how many prefixes each group keeps.
            groups: how many groups do not compete with each other.
            until: length to extend to; None: that of a complete prompt.
        """
        totals = rest.total(prefixes)
        for position in range(prefixes.tokens.shape[1], until or self.length):
            scores = torch.full((len(prefixes), self.n_tokens), -torch.inf, dtype=torch.float64)
            open_ = prefixes.tokens[:, -1] != self.eos
            last = position == self.length - 1
            for rows, tokens in ((open_, self.eos_only if last else self.tokens), (~open_, self.eos_only)):
                who = rows.nonzero().flatten()
                if len(who):
                    scores[who[:, None], tokens] = totals[who, None] + self.scores(rest, prefixes[who], tokens)
            flat = scores.view(groups, -1)
            best = flat.topk(min(width, int(flat.isfinite().sum(1).amin())), dim=1)
            first = torch.arange(groups)[:, None] * flat.shape[1]
            chosen = (best.indices + first).flatten()
            totals = best.values.flatten()
            prefixes = self.encoder.extend(prefixes, chosen // self.n_tokens, chosen % self.n_tokens)
        return prefixes[totals.argsort(descending=True)]

    def scores(self, rest: Remainder, prefixes: Prefixes, tokens: Tensor) -> Float[Tensor, "p v"]:
        """Return the log-power of each token after each prefix; one explained already is as good as the best."""
        power, known = rest.power(self.encoder.candidates(prefixes, tokens))
        best = power.masked_fill(known, -torch.inf).amax(1, keepdim=True)
        return power.where(~known, best.nan_to_num(neginf=0.0))


def _without(found: list[Prefixes], index: int) -> list[Prefixes]:
    return found[:index] + found[index + 1 :]
