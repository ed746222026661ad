"""Attack a gradient that somebody brings, of any model that is called with noisy inputs and timesteps."""

import inspect
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
from diffusers import DDPMScheduler
from torch import nn

from splitlab.core.errors import InputError
from splitlab.core.progress import Callback
from splitlab.core.seeds import generator
from splitlab.diffusion.base import Base, load_base
from splitlab.diffusion.denoisers import argument, needs
from splitlab.federated.attacks import INVERSIONS, ON_IMAGES
from splitlab.federated.attacks.class_labels import label_options
from splitlab.federated.attacks.scale import clipped_to
from splitlab.federated.attacks.shapes import input_shape, input_size
from splitlab.federated.client import InversionKnowledge
from splitlab.federated.defences.clip import Clip
from splitlab.federated.external_model import check_called, external_model, plain_torch
from splitlab.federated.facts import batch_of, checked_schedule, embedded, whole_numbers
from splitlab.federated.gradient_files import by_parameter, read_gradient
from splitlab.federated.update import Update, check_update, with_header

KINDS = {"gradient": "gradient", "weight_difference": "fedavg", "fedavg": "fedavg"}

CLIPPED = Clip.__name__
"""What an update is marked with that was clipped to an unknown norm."""

EXPLAINED = 1e-6
"""Class labels that leave less of the gradient unexplained need no others beside them."""


@dataclass(frozen=True)
class Given:
    """What is said about a gradient that is attacked: how it was made, and the facts that its attacker is granted.

    Attributes:
        size: height and width of the model's input, one number or two; None: as the model says.
        channels: of its input; None: as the model says, or its first convolution.
        objective: what it was trained to predict: "epsilon" or "v_prediction".
        alphas_cumprod: `[T]`; None: the base's, else those of diffusers' DDPMScheduler.
        call: `(model, noisy, timesteps) -> prediction`, for models that are not called with noisy inputs `[b, c, h, w]`
            and timesteps `[b]` from 0 to T - 1, or predict something else; facts granted as text, hint_latents and
            class_labels come by name.
        kind: "gradient", or "weight_difference": weights before minus after `steps` steps of SGD.
        lr, steps: of a weight difference. Without lr its scale is found like that of a gradient.
        scale: what the gradient of the loss's mean over batch and elements was multiplied with (a sum in place of a
            mean, a GradScaler, a share of an accumulation); None: found from the noise, whose variance is 1.
        sign: 1, or -1 if the update points downhill (weights after minus before); None: found where it shows.
        clipped: whether it was shortened to some norm, so that its scale is any number.
        batch_size, timesteps, noise, text, hint_latents, class_labels: facts granted, as numbers, lists, arrays or
            tensors, see `InversionKnowledge`; text may be prompts where there is a base.
    """

    size: Any = None
    channels: Any = None
    objective: Any = "epsilon"
    alphas_cumprod: Any = None
    call: Any = None
    kind: Any = "gradient"
    lr: Any = None
    steps: Any = 1
    scale: Any = None
    sign: Any = None
    clipped: Any = False
    batch_size: Any = None
    timesteps: Any = None
    noise: Any = None
    text: Any = None
    hint_latents: Any = None
    class_labels: Any = None

    def check(self) -> None:
        """Refuse contradictions.

        Raises:
            InputError: there is one.
        """
        if self.kind not in KINDS:
            raise InputError(f"kind {self.kind!r} is unknown; choose one of gradient, weight_difference")
        if self.kind == "gradient" and (self.lr is not None or self.steps != 1):
            raise InputError(
                "lr and steps are of a weight difference; say kind='weight_difference' as well, or leave them out"
            )
        _check_whole("steps", self.steps, 1)
        for name in ("lr", "scale"):
            value = getattr(self, name)
            if value is not None and not (_is_number(value) and 0 < value < float("inf")):
                raise InputError(f"{name}: expected a positive number (which way it points is sign's), got {value!r}")
        if self.sign not in (None, 1, -1):
            raise InputError(f"sign: expected 1, -1 or None, got {self.sign!r}")
        call = self.call
        if call is not None and not callable(call):
            raise InputError(f"call: expected a function (model, noisy, timesteps) -> prediction, got {call!r:.80}")


@plain_torch()
def attack_gradient(
    gradient: Any,
    *,
    model: str | Path | nn.Module,
    attack: str = "unknown_noise",
    base: str | Path | Base | None = None,
    seed: int = 0,
    callback: Callback | None = None,
    **told: Any,
) -> Any:
    """Run one attack on a shared gradient.

    What is done to names, and what speaks against a result, is said in warnings and in `Inversion.warnings`.

    Args:
        gradient: a safetensors or .npz file, parameter name -> gradient; a dict of tensors or arrays; a list or .npz of
            arrays in the order of the parameters, as Flower sends them. Prefixes of wrappers (`module.`, `_orig_mod.`,
            `unet.`, ...) are taken off, LoRA layers may have the names of peft, diffusers or kohya, some parameters may
            be absent. Per-sample gradients `[b, ...]` are attacked one by one.
        model: the weights that the client started from: a directory written by `save_pretrained`, or the module.
        attack: a key of `INVERSIONS`.
        base: Stable Diffusion directory, for latent models (VAE, text model, schedule) and ControlNets.
        seed: of the attacker's draws.
        callback: told of progress.
        told: how the gradient was made and facts that you grant the attacker (see `Given`), and options of the attack.

    Returns what the attack returns: an `Inversion`; or a `TimestepsFound` or `PromptsFound`, of per-sample gradients a
    tuple of them.

    Raises:
        InputError: a file, model, fact or option that is of no use, or a gradient that is not this model's (says why).
    """
    given = Given(**{name: told[name] for name in told if name in Given.__dataclass_fields__})
    options = {name: value for name, value in told.items() if name not in Given.__dataclass_fields__}
    _check_options(attack, options)
    given.check()
    _check_whole("seed", seed, 0)
    base = load_base(base) if isinstance(base, str | Path) else base
    # What comes in is made one thing: updates of a model's parameters, and what their attacker knows.
    updates, known, words = _read(gradient, external_model(model, base), base, given, attack)
    known, more_words = check_called(known, updates[0].size)
    shape = input_shape(known.model, size=updates[0].size, channels=known.channels)
    if known.noise is not None and known.noise.shape[1:] != shape:
        raise InputError(f"noise: expected [b, {', '.join(map(str, shape))}], got {list(known.noise.shape)}")
    _say(words + more_words)
    results = _run(attack, updates, known, shape, seed, {"callback": callback, **INVERSIONS[attack].usual, **options})
    for result in results if isinstance(results, tuple) else (results,):
        _say(getattr(result, "warnings", ()))
    return results


def _read(
    gradient: Any, model: nn.Module, base: Base | None, given: Given, attack: str
) -> tuple[list[Update], InversionKnowledge, tuple[str, ...]]:
    """Return the updates that were given, what is known about them, and what was done to read them, in words."""
    updates, words, is_ours = _updates(gradient, model, given)
    default = DDPMScheduler().alphas_cumprod if base is None else base.alphas_cumprod
    alphas = checked_schedule(default if given.alphas_cumprod is None else given.alphas_cumprod)
    known = _granted(InversionKnowledge(model, alphas, base, call=given.call, channels=given.channels), given)
    if given.scale is None and not (is_ours or given.clipped) and (length := clipped_to(updates)):
        updates = [replace(update, defence=CLIPPED) for update in updates]
        words += (f"its length is {length:g}, as of a gradient clipped to it, and it is taken for one",)
    if updates[0].local_steps > 1:
        words += (
            f"what {updates[0].local_steps} local steps add up to is taken for one step's gradient, which it is only "
            "as far as the weights hardly move between them: the larger lr, the worse what is found",
        )
    scale, sign, is_clipped = given.scale, given.sign or (1 if is_ours else None), updates[0].defence == CLIPPED
    if is_ours or (given.lr is not None and not is_clipped):
        scale = scale or 1.0
    if INVERSIONS[attack].as_published:
        if None in (scale, sign) and not is_clipped:
            words += (f"{attack} finds no scale or sign: the gradient is taken to be that of the mean loss",)
        scale, sign = scale or 1.0, sign or 1
    batch_size = known.batch_size if len(updates) == 1 else 1
    return updates, replace(known, scale=scale, sign=sign, batch_size=batch_size), words


def _check_options(attack: str, options: Mapping[str, Any]) -> None:
    if attack not in INVERSIONS:
        raise InputError(f"attack {attack!r} is unknown; choose one of {', '.join(INVERSIONS)}")
    taken = dict(list(inspect.signature(INVERSIONS[attack].function).parameters.items())[2:])
    taken = {name: option for name, option in taken.items() if name not in ("generator", "callback")}
    if unknown := [name for name in options if name not in taken]:
        raise InputError(f"{attack} has no option {', '.join(unknown)}; it has {', '.join(taken)}")
    for name, value in options.items():
        default, choices = taken[name].default, get_args(taken[name].annotation)
        if isinstance(default, int) and not isinstance(default, bool):
            _check_whole(name, value, int(default != 0 and name not in INVERSIONS[attack].may_be_0))
        if isinstance(default, float) and not _is_number(value):
            raise InputError(f"{name}: expected a number, got {value!r}")
        if isinstance(default, str) and choices and value not in choices:
            raise InputError(f"{name} {value!r} is unknown; choose one of {', '.join(choices)}")


def _check_whole(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InputError(f"{name}: expected a whole number of {least} or more, got {value!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _updates(gradient: Any, model: nn.Module, given: Given) -> tuple[list[Update], tuple[str, ...], bool]:
    """Return the updates that were given, several if they are per sample; words; and whether splitlab wrote them."""
    where = str(gradient) if isinstance(gradient, str | Path) else "gradient"
    header = gradient if isinstance(gradient, Update) else None
    read, meta = read_gradient(header.gradients if header else gradient, where)
    if isinstance(read, dict) and header is None:
        header = with_header({}, meta, where=where)
    parts, words = by_parameter(read, model, where)
    template = header or Update(
        {},
        KINDS[given.kind],
        given.objective,
        input_size(model, given.size),
        model="",
        defence=CLIPPED if given.clipped else "none",
        local_steps=given.steps,
        lr=given.lr or 1.0,
    )
    updates = [replace(template, gradients=part) for part in parts]
    for update in updates:
        check_update(update, model, where=where)
    return updates, words, header is not None


def _granted(known: InversionKnowledge, given: Given) -> InversionKnowledge:
    """Return the knowledge with facts, as tensors.

    Raises:
        InputError: a fact has another form, or the model takes no such fact.
    """
    facts = {name: getattr(given, name) for name in ("timesteps", "noise", "hint_latents", "class_labels")}
    facts["text"] = None if given.text is None else embedded(given.text, known.base)
    kind, batch_size = type(known.model).__name__, given.batch_size
    tensors: dict[str, Any] = {}
    for name, value in facts.items():
        if value is None:
            continue
        if name in ("text", "hint_latents", "class_labels") and known.call is None and not argument(known.model, name):
            raise InputError(f"{name}: a {kind} takes none; leave it out, or say how to call the model (call=)")
        below = {"timesteps": len(known.alphas_cumprod), "class_labels": None}
        tensors[name] = whole_numbers(value, name, below=below[name]) if name in below else batch_of(value, name)
    if batch_size is not None:
        batch_size = int(whole_numbers(batch_size, "batch_size")[0])
        if batch_size < 1:
            raise InputError("batch_size: expected 1 or more, got 0")
    return replace(known, batch_size=batch_size, **tensors)


def _run(
    attack: str,
    updates: list[Update],
    known: InversionKnowledge,
    shape: tuple[int, int, int],
    seed: int,
    options: Mapping[str, Any],
) -> Any:
    """Run the attack, on images with every assignment of class labels that the update allows.

    Raises:
        InputError: the attack refuses, or the model cannot be differentiated as it needs.
    """

    def run(target: Any, knowledge: InversionKnowledge) -> Any:
        draw = generator("attack_gradient", attack, seed)
        return INVERSIONS[attack].function(target, knowledge, generator=draw, **options)

    try:
        if attack not in ON_IMAGES:
            results = tuple(run(update, known) for update in updates)
            return results[0] if len(results) == 1 else results
        if known.class_labels is not None or not needs(known.model, "class_labels"):
            return run(updates, known)
        each = [label_options(update, known, shape) for update in updates]
        ways = each[0] if len(each) == 1 else [torch.cat([ways[0] for ways in each])]
        if any(len(ways) > 1 for ways in each[1:]):
            raise InputError("class labels of per-sample gradients do not show here; grant class_labels")
        trials = []
        for labels in ways:
            trials.append(replace(run(updates, replace(known, class_labels=labels)), class_labels=labels))
            if float(trials[-1].final.max()) < EXPLAINED:
                break
        return min(trials, key=lambda result: float(result.final.max()))
    except RuntimeError as error:
        raise InputError(
            f"{attack} cannot run on this {type(known.model).__name__} ({str(error).splitlines()[0]:.300}); parts that "
            "cannot be differentiated twice, such as checkpointing or fused attention, have to be switched off"
        ) from error


def _say(words: Sequence[str]) -> None:
    for word in words:
        warnings.warn(word, stacklevel=3)
