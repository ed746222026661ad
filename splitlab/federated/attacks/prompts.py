"""Prompts from the gradients of cross-attention's key and value projections.

Both projections read the text embeddings, so the rows of their gradients lie in the span of the embeddings of all
prompts in the batch. The text model is public and causal: prompts are found token by token, from the whole
vocabulary, by how much of a direction the gradient can contain (Capon's estimate of power: the largest a² such that
a² h hᵀ fits under the gradient's covariance), then judged as wholes by what they leave unexplained.
"""

import re
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import CLIPTokenizer

from splitlab.core.errors import InputError
from splitlab.core.progress import Callback
from splitlab.federated.attacks.prompt_search import ENOUGH, Prefixes, PromptSearch
from splitlab.federated.attacks.record import Attack
from splitlab.federated.attacks.row_spaces import Rows, block, unit_rows
from splitlab.federated.client import InversionKnowledge
from splitlab.federated.update import Update, check_update

PROJECTION = re.compile(r"attn2\.to_[kv]\.(weight|base_layer\.weight|lora_A\.[^.]+\.weight)$")


@dataclass(frozen=True)
class PromptsFound:
    """What an attack on prompts made of an update.

    Attributes:
        prompts: the distinct prompts, in no meaningful order; prompts of equal text count once.
        tokens: `[n, l]` their tokens, padded as the text model pads them.
        evidence: `[n]`: how much more of the gradient than noise each explains that no other does (a ratio of mean
            squares; noise: about 1).
        unexplained: mean square of what no prompt explains, in units of the noise: about 1 when all are right.
        rank: dimensions of their span.
    """

    prompts: tuple[str, ...]
    tokens: Tensor
    evidence: Tensor
    unexplained: float
    rank: int


def prompts(
    update: Update,
    knowledge: InversionKnowledge,
    *,
    generator: torch.Generator,
    callback: Callback | None = None,
    beam: int = 8,
    threshold: float = 2.0,
    most: int = 8,
    rounds: int = 4,
) -> PromptsFound:
    """Read the prompts off an update; how many there are is found too, unless the server knows.

    Args:
        update, knowledge, generator, callback: see `record.Attack`; nothing is drawn, and the base model provides text
            model and vocabulary.
        beam: prefixes kept per position.
        threshold: evidence a prompt needs (see `PromptsFound`).
        most: stop at that many prompts.
        rounds: how often a prompt is searched for again while something stays unexplained.

    Raises:
        InputError: no cross-attention projection was shared, its gradients are zero, or there is no text model.
    """
    rows = evidence_rows(update, knowledge)
    base = knowledge.base
    assert base is not None  # evidence_rows has checked
    tokens = base.tokenizer
    search = PromptSearch(
        rows, base.text_encoder, tokens.model_max_length, tokens.bos_token_id, tokens.eos_token_id, beam, threshold
    )
    most = min(most, knowledge.batch_size or most)
    chosen: list[Prefixes] = []
    search.add(chosen, most)
    for done in range(rounds):
        if callback:
            callback("prompts", done, rounds, search.remainder(chosen).level)
        if not chosen or search.remainder(chosen).level < ENOUGH or not search.revise(chosen):
            break
        search.add(chosen, most)
    return _result(search, chosen, tokens)


def _result(search: PromptSearch, chosen: list[Prefixes], tokenizer: CLIPTokenizer) -> PromptsFound:
    evidence = [search.evidence([o for o in chosen if o is not p], p) for p in chosen]
    tokens = torch.cat([p.tokens for p in chosen]) if chosen else torch.zeros(0, search.length, dtype=torch.int64)
    texts = tuple(text.strip() for text in tokenizer.batch_decode(tokens, skip_special_tokens=True))
    rest = search.remainder(chosen)
    return PromptsFound(texts, tokens, torch.tensor(evidence), rest.level, len(rest.basis) - len(rest.gram))


def evidence_rows(update: Update, knowledge: InversionKnowledge) -> Rows:
    """Return the rows that lie in the span of the prompts' embeddings.

    Raises:
        InputError: see `prompts`.
    """
    check_update(update, knowledge.model)
    if knowledge.base is None:
        raise InputError("prompts need the base model's text encoder and tokenizer; give knowledge.base")
    width = knowledge.base.text_encoder.config.hidden_size
    names = [n for n, g in update.gradients.items() if PROJECTION.search(n) and g.shape[-1] == width]
    if not names:
        raise InputError(
            "prompts are not recoverable: the update has no gradient of a cross-attention key or value projection "
            f"of width {width} (attn2.to_k, attn2.to_v); they were frozen or the model takes no text"
        )
    return unit_rows([block(update, knowledge.model, name) for name in names])


ATTACKS = (Attack(prompts, "prompts, span test", rank=20, finds="prompts", family="closed form", may_be_0=("rounds",)),)
