"""Which parameters of the U-Net private fine-tuning touches: everything else stays public, and needs no noise."""

from collections.abc import Callable

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from peft import LoraConfig
from torch import nn

from splitlab.core.errors import InputError

TRAINABLE: dict[str, Callable[[str], bool]] = {
    "attention": lambda name: ".attn1." in name or ".attn2." in name,
    "blocks": lambda name: ".transformer_blocks." in name,
    "transformers": lambda name: ".attentions." in name,
    "lora": lambda name: "lora_" in name,
    "unet": lambda name: True,
}
"""Trainable sets by parameter name: the attention modules; whole transformer blocks; the spatial transformers with
their norms and projections (all three: DP-LDM); low-rank adapters on attention (DP-LoRA); the full U-Net."""

LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


def transformers_of(unet: nn.Module) -> tuple[str, ...]:
    """Return the names of the spatial transformers in the order in which the U-Net runs them: down, middle, up."""
    found = [name for name, module in unet.named_modules() if isinstance(module, Transformer2DModel)]
    order = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}
    return tuple(sorted(found, key=lambda name: order.get(name.partition(".")[0], 1)))  # stable within a part


def mark_trainable(
    unet: UNet2DConditionModel, trainable: str, *, from_block: int = 0, rank: int = 8, seed: int = 0
) -> tuple[str, ...]:
    """Set `requires_grad` on a trainable set and on nothing else, in place; return the names of its parameters.

    Args:
        unet: the U-Net; "lora" adds its adapters here.
        trainable: a key of `TRAINABLE`.
        from_block: train spatial transformers from this one on, counted from 0 in `transformers_of`'s order (the
            paper's ablation_blocks); without meaning for "unet".
        rank: of the LoRA adapters.
        seed: of the LoRA adapters' initial weights.

    Raises:
        InputError: an unknown set, or no such transformer.
    """
    if trainable not in TRAINABLE:
        raise InputError(f"trainable {trainable!r} is unknown; choose one of {', '.join(TRAINABLE)}")
    blocks = transformers_of(unet)
    if trainable != "unet" and not 0 <= from_block < len(blocks):
        raise InputError(
            f"from_block {from_block}: the U-Net has {len(blocks)} transformers; give 0 to {len(blocks) - 1}"
        )
    kept = tuple(f"{name}." for name in blocks[from_block:])
    if trainable == "lora":
        _add_lora(unet, kept, rank=rank, seed=seed)
    names = []
    for name, parameter in unet.named_parameters():
        wanted = TRAINABLE[trainable](name) and (trainable == "unet" or name.startswith(kept))
        parameter.requires_grad_(wanted)
        names += [name] if wanted else []
    return tuple(names)


def _add_lora(unet: UNet2DConditionModel, kept: tuple[str, ...], *, rank: int, seed: int) -> None:
    targets = [
        name
        for name, module in unet.named_modules()
        if isinstance(module, nn.Linear) and name.startswith(kept) and name.endswith(LORA_TARGETS)
    ]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets))


def merge_lora(unet: UNet2DConditionModel) -> None:
    """Fold LoRA adapters, if there are any, into the weights they adapt, in place: a plain U-Net is left."""
    if getattr(unet, "peft_config", None):
        unet.fuse_lora()
        unet.unload_lora()


def count_trainable(model: nn.Module) -> int:
    """Count the weights that `requires_grad`."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def check_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimiser that steps other parameters than those trained: they would move without noise, or not at all.

    Raises:
        InputError: the two sets differ.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if trained != stepped:
        apart = sorted(names.get(i, "a parameter of another model") for i in trained ^ stepped)
        raise InputError(
            f"{len(apart)} parameters are trained but not in the optimiser, or the other way round, e.g. {apart[0]}; "
            "give the optimiser exactly the parameters with requires_grad"
        )
