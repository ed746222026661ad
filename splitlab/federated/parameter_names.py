"""Which parameter of the model each name of a gradient means: wrappers' prefixes, and the names of LoRA layers."""

import re
from collections.abc import Iterable, Mapping

from torch import nn

from splitlab.core.errors import InputError
from splitlab.diffusion.denoisers import ControlledUNet
from splitlab.federated.update import some

WRAPPERS = re.compile(r"\b(module|_orig_mod|_module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""Put anywhere into names by data parallelism, torch.compile, Opacus, FSDP and checkpointing."""

SPELLINGS = (
    (re.compile(r"\.base_layer\."), "."),
    (re.compile(r"\.processor\.to_out_lora\."), ".to_out.0.lora."),
    (re.compile(r"\.processor\.(to_[qkv])_lora\."), r".\1.lora."),
    (re.compile(r"\.lora[._]down\.weight$"), ".lora_A.weight"),
    (re.compile(r"\.lora[._]up\.weight$"), ".lora_B.weight"),
    (re.compile(r"\.(lora_[A-Za-z_]+)\.[^.]+\.(weight|bias)$"), r".\1.\2"),
)
"""Several names of one layer are made one; the last line drops the adapter's name, which files leave out."""

ALPHA = re.compile(r"^lora_\w+\.alpha$")
KOHYA = re.compile(r"^lora_unet_(.+)\.(lora_down|lora_up)\.weight$")

SCHEMES = (
    ("kohya's (lora_unet_…)", re.compile(r"^lora_(unet|te\d?)_")),
    ("diffusers' before 0.26 (….lora.down.weight)", re.compile(r"\.(lora|\w+_lora)\.(down|up)\.weight$")),
    ("peft's (….lora_A.weight)", re.compile(r"\.lora_[AB]\.")),
    ("LyCORIS'", re.compile(r"\.(hada|lokr)_\w+$")),
)

OTHER_MODELS = re.compile(r"^(text_encoder(_\d)?|vae|lora_te\d?|image_encoder)[._]")
"""Parts of a pipeline that an attack on its denoiser has no use for."""


def match_names(names: Iterable[str], model: nn.Module) -> tuple[dict[str, str], tuple[str, ...]]:
    """Return the model's parameter that each name means, and what was done to find it, in words.

    Names of other parts of a pipeline, and kohya's alphas, are left out, and the words say so. A name that cannot be
    matched is returned as it is.

    Raises:
        InputError: the names are of LoRA layers, and the model has none; or two names mean one parameter.
    """
    names, targets = list(names), _targets(model)
    if all(name in targets.values() for name in names):
        return {name: name for name in names}, ()
    kept = [name for name in names if not OTHER_MODELS.match(name) and not ALPHA.match(name)]
    words = []
    if len(kept) < len(names) and kept:
        words.append(f"{some([n for n in names if n not in kept])} left out: no part of the denoiser's gradient")
    kept = kept or names
    _check_adapters(kept, targets, type(model).__name__)
    matched = _by_path(kept, targets) or _from_kohya(kept, targets)
    if matched is None:
        return {name: name for name in names}, ()
    if len(set(matched.values())) < len(matched):
        raise InputError(f"{some(_twins(matched))} mean one parameter; give each once")
    changed = [name for name in kept if name != matched[name]]
    if changed:
        words.append(f"names matched to the model's, e.g. {changed[0]} is {matched[changed[0]]}")
    return matched, tuple(words)


def _targets(model: nn.Module) -> dict[str, str]:
    """Return the model's parameters by the one spelling of their names, where that is unambiguous."""
    names = [name for name, _ in model.named_parameters()]
    if isinstance(model, ControlledUNet):
        names = [name for name in names if name.startswith("controlnet.")]
    spelt = {_spelt(name): name for name in names}
    return spelt if len(spelt) == len(names) else {name: name for name in names}


def _spelt(name: str) -> str:
    name = WRAPPERS.sub("", name)
    for pattern, spelling in SPELLINGS:
        name = pattern.sub(spelling, name)
    return name


def _check_adapters(names: list[str], targets: Mapping[str, str], kind: str) -> None:
    scheme = next((words for words, pattern in SCHEMES if any(pattern.search(name) for name in names)), None)
    if scheme and not any(".lora_" in name for name in targets):
        raise InputError(
            f"the names are {scheme}, of adapters, and this {kind} has none: add those that the client was sent, with "
            "their weights (diffusers: model.load_lora_adapter), and give the model itself as model="
        )


def _by_path(names: list[str], targets: Mapping[str, str]) -> dict[str, str] | None:
    """Match names that differ from the model's by one prefix, on either side; None if none fits, or several do."""
    spelt = {name: _spelt(name) for name in names}
    segments = spelt[names[0]].split(".")
    for dropped in range(len(segments)):
        old, end = ".".join([*segments[:dropped], ""]).lstrip("."), ".".join(segments[dropped:])
        if not all(other.startswith(old) for other in spelt.values()):
            return None
        prefixes = {t[: len(t) - len(end)] for t in targets if t == end or t.endswith("." + end)}
        fitting = [new for new in prefixes if all(new + other[len(old) :] in targets for other in spelt.values())]
        if len(fitting) == 1:
            return {name: targets[fitting[0] + other[len(old) :]] for name, other in spelt.items()}
        if fitting:
            return None
    return None


def _from_kohya(names: list[str], targets: Mapping[str, str]) -> dict[str, str] | None:
    """Match kohya's names, which have underscores where the model's have dots."""
    flat = {re.sub(r"[._]", "_", name): target for name, target in targets.items()}
    matched = {}
    for name in names:
        parts = KOHYA.match(name)
        letter = "A" if parts and parts[2] == "lora_down" else "B"
        key = f"{parts[1]}_lora_{letter}_weight" if parts else ""
        ends = [target for other, target in flat.items() if other == key or other.endswith(f"_{key}")] if parts else []
        if len(ends) != 1:
            return None
        matched[name] = ends[0]
    return matched


def _twins(matched: Mapping[str, str]) -> list[str]:
    targets = list(matched.values())
    return [name for name, target in matched.items() if targets.count(target) > 1]
