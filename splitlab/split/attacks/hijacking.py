"""Feature-space hijacking (Pasquini et al. 2021): decode what clients of a malicious server sent.

The server, `splitlab.split.hijacker`, has trained the clients' encoder for itself, and a decoder for what it makes.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated

import torch
from torch import Tensor
from tqdm import tqdm

from splitlab.core.errors import InputError
from splitlab.core.progress import Callback
from splitlab.diffusion.base import Base
from splitlab.split.attacks.record import Attack, Family, Option
from splitlab.split.hijacker import HijackingNetworks, hijacking_networks
from splitlab.split.messages import Knowledge, Observation, Reconstruction, stack


@torch.no_grad()
def hijacking(
    observations: Sequence[Observation],
    knowledge: Knowledge,
    *,
    generator: torch.Generator,
    callback: Callback | None = None,
    batch: Annotated[int, Option("samples decoded at once", least=1)] = 256,
) -> Reconstruction:
    """Decode what a hijacked client sent with the decoder that the malicious server trained (Pasquini et al. 2021).

    It is after the hints, whose features are all that a client's encoder sends: needs `smashed` `[b, k, h, w]`, of late
    messages (`record_from`), since the first are those of a client that is not hijacked yet, and the networks that
    `HijackingServer` trained (`knowledge.server`). The objective is the share that the discriminator takes for public
    hints.

    Raises:
        InputError: the server was honest, or its networks are of another shape.
    """
    networks = restored_networks(knowledge.base, knowledge.size, knowledge.server)
    smashed = stack(observations).need("smashed")
    hints, objective = [], []
    parts = smashed.split(batch)
    for number, part in enumerate(tqdm(parts, desc="hijacking", mininterval=2, leave=False)):
        hints.append(networks.decoder(part))
        objective.append(networks.discriminator(part).sigmoid().mean().item())
        if callback:
            callback("hijacking", number + 1, len(parts), objective[-1])
    return Reconstruction(hints=torch.cat(hints), used=("smashed",), objective=tuple(objective), n_evals=1)


def restored_networks(base: Base, size: int, server: Mapping[str, Tensor]) -> HijackingNetworks:
    """Build the networks and load what a malicious server saved.

    Raises:
        InputError: there is nothing to load, or it is of another base model or image size.
    """
    if not server:
        raise InputError(
            "hijacking needs the networks of a malicious server, and this run's was honest: train with "
            "server: hijack (scheme split_gradients) and give its server.safetensors"
        )
    networks = hijacking_networks(base, size)
    try:
        networks.load_state_dict(dict(server))
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise InputError(
            f"the malicious server's networks do not fit this base model and image size ({reason}); "
            "give those of the attacked run"
        ) from None
    return networks.eval()


HIJACKING = Family(
    "Feature-space hijacking (FSHA)",
    "A malicious server returns gradients that pull the client's part towards a feature space it can decode "
    "(Pasquini et al. 2021). It needs the returned gradient: where nothing returns, as in S1, it has no lever.",
)

ATTACKS = (
    Attack(hijacking, "feature-space hijacking (FSHA)", rank=110, family=HIJACKING, schemes=("split_gradients",)),
)
