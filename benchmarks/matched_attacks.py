"""Who is recognised from the messages of `matched_settings`: the strongest attacks, and the holder of the candidates.

100 private images are the candidates (chance 1 %), each sent by `KEYS` clients with other secrets.
"""

from dataclasses import replace
from functools import cache

import torch
from matched_parts import VARIANTS, identified_by_likelihood, recolour, recoloured
from matched_settings import read
from tqdm import tqdm

from splitlab import CACHE, TrainConfig
from splitlab.core.checkpoint import load_json, save_json
from splitlab.core.seeds import Key, generator
from splitlab.data.image_set import digest
from splitlab.diffusion.base import encoded
from splitlab.diffusion.metrics import psnr_db
from splitlab.split.attacks.closed_form import hint_latents, public_hints
from splitlab.split.attacks.latent_view import averaged, labelled, latent_view
from splitlab.split.client import client_send
from splitlab.split.defences import disguised, disguises
from splitlab.split.defences.borrowed_colours import in_colours
from splitlab.split.defences.hint_layout_noise import layout, sent_layout
from splitlab.split.defences.random_symmetry import every_turn
from splitlab.split.identification import identified_as_sent
from splitlab.split.messages import Knowledge
from splitlab.split.server import run_attack
from splitlab.split.train import make_clients
from splitlab.split.wire import from_bytes

ATTACKS = {"closed_form": {}, "posterior": {}, "nearest_public": {}, "adaptive_network": {}}
AGAINST_DISGUISES = {"surrogate_posterior": {}}
TOGETHER = {"accumulation": {}}
N, KEYS = 100, 3
FOLDER = CACHE / "matched_client"


def attacked(name, client, dataset, base, messages=1):
    """Attack so many messages per private image; rows of attacks, strongest first, with the ideal attacker's shares.

    Of several messages, only the attack that puts them together is run: the others do no better than on one.
    """
    defences, hidden = client
    adapted = AGAINST_DISGUISES if disguises(defences) else {}
    attacks = ATTACKS | adapted if messages == 1 else adapted or TOGETHER
    facts = {"defences": defences, "hidden": hidden, "base": base.digest, "attacks": ATTACKS, "n": N, "keys": KEYS}
    facts |= {"dataset": dataset} if dataset != "shapes" else {}
    facts |= {"attacks": attacks, "messages": messages} if messages > 1 else {}
    path = FOLDER / f"attacks-{name}-{digest(facts)[:12]}.json"
    if path.exists():
        return load_json(path)["rows"]
    private = candidates(dataset)
    sent, owners, prompts = sent_by_clients(private, dataset, defences, hidden, base, messages)
    public = read(dataset, "public")
    public = recoloured(public, key=Key.published("public")) if hidden else public
    knowledge = Knowledge(base, "split", defences, private.size, public, cache=CACHE)
    if disguises(defences):
        ideal = ideal_shares_disguised(sent, knowledge, private, prompts, owners)
    else:
        ideal = ideal_shares(sent, knowledge, private, hidden, owners)
    rows, named = [], tuple(prompts[owner] for owner in owners)
    for attack, options in attacks.items():
        found = run_attack(attack, sent, knowledge, generator=generator("attack", attack), options=options)
        known = identified_as_sent(found.images, found.hints, private, named, draw_galleries()[owners], defences)
        row = {f"id_{way}": share.float().mean().item() for way, share in known.items()}
        psnr = psnr_db(found.images, private.images[owners % N]).mean().item()
        rows.append({"attack": attack, **row, "id_worst": max(row.values()), "psnr_db": psnr, **ideal, "n": KEYS * N})
    rows.sort(key=lambda row: -row["id_worst"])
    save_json(path, {"rows": rows})
    return rows


def candidates(dataset):
    """The private samples whose messages are attacked: shapes stand in random order, photographs by original."""
    private = read(dataset, "private")
    chosen = range(N)
    if dataset != "shapes":
        chosen = torch.randperm(len(private), generator=generator("candidates", dataset))[:N].tolist()
    return private.subset(chosen)


def sent_by_clients(private, dataset, defences, hidden, base, messages):
    """Be `KEYS` clients with other secrets and the same images.

    Returns what they send, in as many messages per image; whose each sample is, owners `[n]` in [0, KEYS x N); and the
    prompt of every owner.
    """
    sent, owners, prompts = [], [], []
    for key in range(KEYS):
        config = TrainConfig(dataset=dataset, defences=defences, batch_size=N // 2, seed=key, published_key=key)
        own = recoloured(private, key=Key.published(("private", key))) if hidden else private
        (client,) = make_clients(base, own, config, cache=CACHE)
        for step in range(2 * messages):
            message, truth = client_send(client, step, N // 2)
            sent.append(replace(from_bytes(message), client=key))
            owners.append(truth.indices + key * N)
        prompts += disguised(own, defences, key=Key.published(key)).prompts
    return sent, torch.cat(owners), prompts


def draw_galleries():
    """The candidates for every owner, the own image first."""
    order = [torch.cat([torch.tensor([i]), torch.tensor([j for j in range(N) if j != i])]) for i in range(N)]
    return torch.stack(order * KEYS)


def ideal_shares(sent, knowledge, private, hidden, owners):
    """Identification by who holds the candidates and knows which messages show one image: by image, hint and both."""
    seen, base, once = labelled(sent, knowledge), knowledge.base, knowledge.defences.per_image_noise
    view, std = latent_view(seen, knowledge)
    data = encoded(base, private, cache=CACHE)
    variants = range(len(VARIANTS)) if hidden else (0,)
    gallery = torch.stack([base.encode(recolour(private.images, one)) for one in variants], 1)
    hints = hint_latents(seen, sent, knowledge)
    view, std = averaged(view, std.clamp_min(0.01), owners, once=once)
    noise = torch.full((len(hints), 1, 1, 1), max(knowledge.defences.hint_noise, 0.01))
    hints, noise = averaged(hints, noise, owners, once=once)
    image = (view, std.flatten(), gallery)
    hint = (hints, noise.flatten(), public_hints(data.hint_latents, knowledge)[:, None])
    ways = {"image": [image], "hint": [hint], "both": [image, hint]}
    return {
        f"id_{k}_ideal": identified_by_likelihood(v, draw_galleries()).float().mean().item() for k, v in ways.items()
    }


def ideal_shares_disguised(sent, knowledge, private, prompts, owners):
    """The same where clients disguise themselves: every candidate in the colours that the messages' prompt names."""
    seen, base, noise = labelled(sent, knowledge), knowledge.base, knowledge.defences.hint_layout_noise
    view, std = latent_view(seen, knowledge)
    hints, _ = averaged(hint_latents(seen, sent, knowledge), torch.ones_like(std), owners, once=True)
    view, std = averaged(view, std, owners, once=knowledge.defences.per_image_noise)
    turned, gallery_indices = knowledge.defences.random_symmetry, draw_galleries()
    layouts = layout(in_turns(private.hints, turned).flatten(0, 1)).double().unflatten(0, (-1, N))
    gallery = in_disguise(base, private, tuple(prompts), turned)
    errors = torch.stack([(one - could).square().sum((2, 3, 4)) for one, could in zip(view, gallery, strict=True)])
    image = -errors.double() / (2 * std.double().square().flatten(1)[..., None])
    image = image.transpose(1, 2)[torch.arange(len(image))[:, None], gallery_indices]
    shown = sent_layout(base.decode(hints), noise).double()
    hint = -(shown[:, None, None] - layouts.transpose(0, 1)[gallery_indices]).square().sum(3) / (2 * noise**2)
    ways = {way: v.logsumexp(2) for way, v in {"image": image, "hint": hint, "both": image + hint}.items()}
    return {f"id_{k}_ideal": (v[:, 0] > v[:, 1:].max(1).values).float().mean().item() for k, v in ways.items()}


def in_turns(pictures, turned):
    """Pictures as they are, or in all symmetries of the square: `[r, m, c, h, w]`."""
    return every_turn(pictures) if turned else pictures[None]


@cache
def galleries():
    """What `in_disguise` has encoded so far."""
    return {}


def in_disguise(base, private, prompts, turned):
    """The latents of all candidates, in all turns, in the colours that each prompt names: `[n, r, m, c, h, w]`."""
    if (prompts, turned) not in galleries():
        pictures = in_turns(private.images, turned)
        asked = list(private.prompts) * len(pictures)
        every = tqdm(prompts, desc="candidates in disguise", leave=False)
        encoded = [base.encode(in_colours(pictures.flatten(0, 1), asked, [prompt] * len(asked))) for prompt in every]
        galleries()[prompts, turned] = torch.stack(encoded).unflatten(1, pictures.shape[:2])
    return galleries()[prompts, turned]
