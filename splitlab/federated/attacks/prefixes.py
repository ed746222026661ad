"""Hidden states of a CLIP text model for many prompts that share their beginnings.

The model is causal: the state at a position depends on the tokens up to it. So every token of the vocabulary can be
tried after a prefix at the cost of one token each, with the prefix's keys and values kept.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import CLIPTextModel


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
        states, own = self._step(chosen.cache, tokens[:, None], prefixes.tokens.shape[1])
        cache = tuple(
            (torch.cat([k, new_k], 2), torch.cat([v, new_v], 2))
            for (k, v), (new_k, new_v) in zip(chosen.cache, own, strict=True)
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
        own = []
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
            own.append((key, value))
        return self.model.final_layer_norm(x), own
