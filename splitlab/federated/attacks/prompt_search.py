"""The search behind `splitlab.federated.attacks.prompts`: which sequences of tokens span the rows of a gradient?

A beam goes through the places from left to right. A token is judged by the direction that its hidden state adds to its
prefix's span: what the states share says nothing about the token, and where rounding leaves a few dimensions of noise,
that part hides it. How long a prompt is cannot be told so, since a closed prompt's later states add next to nothing;
every prefix of the beam is therefore closed too, and closed prompts are compared by the power along all their states.

The model is causal: the state at a position depends on the tokens up to it. So every token of the vocabulary can be
tried after a prefix at the cost of one token each, with the prefix's keys and values kept.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import CLIPTextModel

from splitlab.federated.attacks.row_spaces import Rows, captured, complement

FLOOR = 0.2
"""What is left of an eigenvalue of pure noise, in units of the noise, once the noise is subtracted."""

STEP = 1e-3
"""A change must raise a score by more than this, in log10 or units of the noise, to be taken: rounding does not."""

ENOUGH = 2.0
"""Below this mean square, in units of the noise, nothing is left to explain."""

WIDTHS = (512, 256, 1024, 128, 64, 32, 16)
"""Prefixes that a thorough search keeps at the first places, where the least is known; as many as usual afterwards."""

SIBLINGS = 8
"""Of one prefix's extensions no more are kept: a weak state leaves the right token beside hundreds of others, of which
those of better prefixes would otherwise fill the beam."""

CHUNK = 8
"""Prefixes whose extensions are computed at a time, so that they fit in a processor's cache."""

KNOWN = 1e-5
"""A hidden state with a smaller part (relative length) outside the span of the prompts found is explained by them."""


@dataclass(frozen=True)
class Prefixes:
    """Prompts' beginnings of one length.

    Attributes:
        tokens: `[p, l]`.
        states: `[p, l, d]`: last hidden states, as the text-conditional model receives them.
        cache: per layer, keys and values `[p, heads, l, d / heads]`.
    """

    tokens: Tensor
    states: Tensor
    cache: tuple[tuple[Tensor, Tensor], ...]

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, chosen: Tensor | slice) -> "Prefixes":
        return Prefixes(self.tokens[chosen], self.states[chosen], tuple((k[chosen], v[chosen]) for k, v in self.cache))


def joined(parts: list[Prefixes]) -> Prefixes:
    """Put prefixes of one length one after the other."""
    caches = zip(*(part.cache for part in parts), strict=True)
    cache = tuple((torch.cat([k for k, _ in layer]), torch.cat([v for _, v in layer])) for layer in caches)
    return Prefixes(torch.cat([part.tokens for part in parts]), torch.cat([part.states for part in parts]), cache)


class PrefixEncoder:
    """Runs a CLIP text model one position at a time; equal to the model itself up to rounding."""

    def __init__(self, model: CLIPTextModel):
        self.model = model
        self.heads = model.config.num_attention_heads

    def start(self, token: int) -> Prefixes:
        """Return the one prefix that consists of `token`."""
        width = self.model.config.hidden_size
        nothing = torch.zeros(1, self.heads, 0, width // self.heads, device=self.model.device)
        cache = tuple((nothing, nothing) for _ in self.model.encoder.layers)
        tokens = torch.zeros(1, 0, dtype=torch.int64, device=self.model.device)
        empty = Prefixes(tokens, torch.zeros(1, 0, width, device=self.model.device), cache)
        return self.extend(empty, torch.tensor([0]), torch.tensor([token]))

    def candidates(self, prefixes: Prefixes, tokens: Int[Tensor, " v"]) -> Float[Tensor, "p v d"]:
        """Return the hidden state of each token in the place after each prefix."""
        return self._step(prefixes.cache, tokens.expand(len(prefixes), -1), prefixes.tokens.shape[1])[0]

    def extend(self, prefixes: Prefixes, parents: Int[Tensor, " n"], tokens: Int[Tensor, " n"]) -> Prefixes:
        """Return the prefixes `parents`, each with one token more."""
        chosen = prefixes[parents]
        states, added = self._step(chosen.cache, tokens[:, None], prefixes.tokens.shape[1])
        cache = tuple(
            (torch.cat([k, new_k], 2), torch.cat([v, new_v], 2))
            for (k, v), (new_k, new_v) in zip(chosen.cache, added, strict=True)
        )
        return Prefixes(torch.cat([chosen.tokens, tokens[:, None]], 1), torch.cat([chosen.states, states], 1), cache)

    @torch.no_grad()
    def _step(
        self, cache: tuple[tuple[Tensor, Tensor], ...], tokens: Tensor, position: int
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """Run the layers on `tokens` `[p, v]`, each of which sees its prefix and itself."""
        p, v = tokens.shape
        embeddings = self.model.embeddings
        x = embeddings.token_embedding(tokens) + embeddings.position_embedding.weight[position]
        added = []
        for layer, (keys, values) in zip(self.model.encoder.layers, cache, strict=True):
            attention, normed = layer.self_attn, layer.layer_norm1(x)
            query, key, value = (
                project(normed).view(p, v, self.heads, -1).transpose(1, 2)
                for project in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            scores = torch.cat([query @ keys.mT, (query * key).sum(-1, keepdim=True)], -1) * attention.scale
            weights = scores.softmax(-1)
            mixed = weights[..., :-1] @ values + weights[..., -1:] * value
            x = x + attention.out_proj(mixed.transpose(1, 2).reshape(p, v, -1))
            x = x + layer.mlp(layer.layer_norm2(x))
            added.append((key, value))
        return self.model.final_layer_norm(x), added


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

    def power(
        self, states: Float[Tensor, "*s v d"], given: Float[Tensor, "*s k d"] | None = None
    ) -> tuple[Float[Tensor, "*s v"], Bool[Tensor, "*s v"]]:
        """Return log10 of the power along states, in units of the noise, and which are explained already.

        The power is the largest a² such that a² h hᵀ fits under the gradient's covariance less the noise's (Capon
        1969), h being the state's part outside the explained span, at unit length. With states `given`, h is the part
        outside their span as well, and some amount of them is under the covariance too.
        """
        states = states.double()
        outside, whitened = states @ self.basis, states @ self.whiten
        given = states[..., :0, :] if given is None else given.double()
        turn, lengths, _ = torch.linalg.svd(given @ self.basis, full_matrices=False)
        real = lengths > KNOWN * states.norm(dim=-1).amax(-1, keepdim=True)
        given = (turn * real[..., None, :]).mT @ given
        outside, inverse = _apart(outside, given @ self.basis), _apart(whitened, given @ self.whiten) * self.n_rows
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
        width: prefixes that a beam keeps.
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
        self.words = vocabulary[(vocabulary != bos) & (vocabulary != eos)]

    def remainder(self, prompts: list[Prefixes]) -> Remainder:
        """Return what `prompts` leave unexplained."""
        basis = complement(torch.cat([self.root.states[0], *(prompt.states[0] for prompt in prompts)]))
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

    def add(self, prompts: list[Prefixes], most: int) -> None:
        """Append prompts to `prompts` while more than noise is left, then drop those that others explain."""
        while len(prompts) < most:
            rest = self.remainder(prompts)
            if rest.level < ENOUGH:
                break
            beams = (self.beam(rest, self.root, joint=joint) for joint in (True, False))
            candidate = max(beams, key=lambda prompt: float(rest.total(prompt)))
            if self.evidence(prompts, candidate) < self.threshold:
                candidate = self.beam(rest, self.root, widths=WIDTHS)
            if self.evidence(prompts, candidate) < self.threshold:
                break
            prompts.append(candidate)
        scores = [self.evidence(_without(prompts, i), p) for i, p in enumerate(prompts)]
        while len(prompts) > 1 and min(scores) < self.threshold:
            del prompts[scores.index(min(scores))]
            scores = [self.evidence(_without(prompts, i), p) for i, p in enumerate(prompts)]

    def revise(self, prompts: list[Prefixes]) -> bool:
        """Exchange the least convincing prompt that can be bettered, and drop the still less convincing; say if done.

        A wrong prompt hides what would tell the next ones, so those found on its strength are for `add` to find again.
        """
        totals = [float(self.remainder(_without(prompts, i)).total(p)) for i, p in enumerate(prompts)]
        order = sorted(range(len(prompts)), key=totals.__getitem__, reverse=True)
        for place in reversed(range(len(order))):
            others = [prompts[index] for index in order[:place]]
            rest, before = self.remainder(others), prompts[order[place]]
            best = self.search(rest, before)
            if float(rest.total(best)) > float(rest.total(before)) + STEP:
                prompts[:] = [*others, best]
                return True
        return False

    def search(self, rest: Remainder, before: Prefixes) -> Prefixes:
        """Return the prompt of the largest total that a wide beam finds, or climbing from its end or from `before`."""
        widest = self.beam(rest, self.root, widths=WIDTHS)
        if float(rest.total(widest)) > float(rest.total(before)) + STEP:
            return self.climb(rest, widest)
        return self.climb(rest, before)

    def climb(self, rest: Remainder, prompt: Prefixes) -> Prefixes:
        """Improve a prompt's total: the best change of one token, or a new ending, again and again until none helps."""
        while True:
            prompt = self.substitute(rest, prompt)
            endings = [self.beam(rest, self.beginning(prompt, place)) for place in range(1, self.last(prompt) + 1)]
            best = max(endings, key=lambda p: float(rest.total(p)))
            if float(rest.total(best)) <= float(rest.total(prompt)) + STEP:
                return prompt
            prompt = best

    def substitute(self, rest: Remainder, prompt: Prefixes) -> Prefixes:
        """Put the best token in each place in turn, until no change of one token raises the total."""
        best, stale, place = float(rest.total(prompt)), 0, 1
        while stale < self.last(prompt):
            variants = self.variants(prompt, place)
            totals = rest.total(variants)
            pick = int(totals.argmax())
            stale += 1
            if float(totals[pick]) > best + STEP:
                prompt, best, stale = variants[pick : pick + 1], float(totals[pick]), 0
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
        everyone = torch.zeros(len(self.words), dtype=torch.int64)
        result = self.encoder.extend(self.beginning(prompt, place), everyone, self.words)
        for position in range(place + 1, self.length):
            ended = (result.tokens[:, -1] == self.eos) | (position == self.length - 1)
            following = prompt.tokens[0, position].where(~ended, self.eos)
            result = self.encoder.extend(result, torch.arange(len(self.words)), following)
        return result

    def beam(self, rest: Remainder, prefix: Prefixes, *, widths: tuple[int, ...] = (), joint: bool = True) -> Prefixes:
        """Extend a prefix token by token; return the best prompt that closes any of those kept at any place.

        Args:
            rest: what is to be explained.
            prefix: where to start.
            widths: how many prefixes to keep at the first places; `width` at the others.
            joint: judge a token by what it adds to its prefix's span, not by its whole state.
        """
        prefixes, totals = prefix, torch.zeros(1, dtype=torch.float64)
        closed = prefix[:0]
        for position in range(prefix.tokens.shape[1], self.length):
            closed = joined([closed, prefixes])
            ending = torch.tensor([self.eos]).expand(len(closed))
            closed = self.encoder.extend(closed, torch.arange(len(closed)), ending)
            if position == self.length - 1:
                break  # the last place is for the closing token
            width = (*widths[position - 1 : position], self.width)[0]
            siblings = min(max(SIBLINGS, width // len(prefixes)), len(self.words))
            values, tokens = (totals[:, None] + self.scores(rest, prefixes, joint)).topk(siblings, dim=1)
            totals, best = values.flatten().topk(min(width, values.numel()))
            prefixes = self.encoder.extend(prefixes, best // siblings, self.words[tokens.flatten()[best]])
        best_closed = int(rest.total(closed).argmax())
        return closed[best_closed : best_closed + 1]

    def scores(self, rest: Remainder, prefixes: Prefixes, joint: bool) -> Float[Tensor, "p v"]:
        """Return the log-power of each word after each prefix; one explained already is as good as the best."""
        scores = []
        for first in range(0, len(prefixes), CHUNK):
            some = prefixes[first : first + CHUNK]
            power, known = rest.power(self.encoder.candidates(some, self.words), some.states if joint else None)
            best = power.masked_fill(known, -torch.inf).amax(1, keepdim=True)
            scores.append(power.where(~known, best.nan_to_num(neginf=0.0)))
        return torch.cat(scores)


def _apart(vectors: Float[Tensor, "*s v c"], given: Float[Tensor, "*s k c"]) -> Float[Tensor, "*s v"]:
    """Return the squared length of vectors outside the span of those given; zeros among these are passed over."""
    _, lengths, basis = torch.linalg.svd(given, full_matrices=False)
    basis = basis * (lengths > 1e-9 * lengths[..., :1])[..., None]
    return (vectors.square().sum(-1) - (vectors @ basis.mT).square().sum(-1)).clamp_min(0.0)


def _without(prompts: list[Prefixes], index: int) -> list[Prefixes]:
    return prompts[:index] + prompts[index + 1 :]
