"""The training schemes: who computes what. Each turns one step's batch into one optimiser step."""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from diffusers import ControlNetModel
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes
from torch import Tensor, nn

from splitlab.core.errors import InputError
from splitlab.data.image_set import ImageSet
from splitlab.diffusion.base import Base
from splitlab.diffusion.controlnet import image_hint_controlnet, latent_hint_controlnet
from splitlab.split.client import (
    Client,
    attach_hint_encoder,
    client_message,
    client_send,
    detach_hint_encoder,
    epoch_batch,
    noise_loss,
    server_loss,
    server_prediction,
)
from splitlab.split.config import TrainConfig
from splitlab.split.hijacker import HijackingServer
from splitlab.split.messages import Truth
from splitlab.split.wire import from_bytes, to_bytes


@dataclass(frozen=True)
class Step:
    """What one step did.

    Attributes:
        loss: the training loss.
        message: the bytes that went up, where the server sees activations.
        truth: what only the client knew about that message.
        up_bytes, down_bytes: bytes to and from the server.
        client_s, server_s: seconds computed on each side.
    """

    loss: float
    message: bytes | None = None
    truth: Truth | None = None
    up_bytes: int = 0
    down_bytes: int = 0
    client_s: float = 0.0
    server_s: float = 0.0


@runtime_checkable
class Scheme(Protocol):
    """A training scheme: `modules` and `optimizers` are its whole state between two steps."""

    modules: dict[str, nn.Module]
    optimizers: dict[str, torch.optim.Optimizer]

    def step(self, number: int, lr: float) -> Step:
        """Do step `number` (from 0) at learning rate `lr`."""

    def controlnet(self) -> ControlNetModel:
        """Return the whole ControlNet as trained so far, ready to save and to generate with."""


class Federated:
    """FedAvg of the whole ControlNet (McMahan et al. 2017): clients train locally, the server averages weights.

    Step numbers count every client's steps: clients take `local_steps` each, one after the other, from the same global
    weights, then the server averages. Clients start every round with a fresh optimiser.
    """

    def __init__(self, base: Base, config: TrainConfig, clients: Sequence[Client]):
        self.base, self.config, self.clients = base, config, clients
        self._model = latent_hint_controlnet(base)  # the client at work
        self._global = latent_hint_controlnet(base).requires_grad_(False)
        self._sum = latent_hint_controlnet(base).requires_grad_(False)
        _scale(self._sum, 0.0)
        self.modules: dict[str, nn.Module] = {"client": self._model, "controlnet": self._global, "sum": self._sum}
        self.optimizers: dict[str, torch.optim.Optimizer] = {"local": _adamw(self._model)}

    def step(self, number: int, lr: float) -> Step:
        """Take one local step; at the end of a client's turn add its weights, at the end of a round average."""
        local, n_clients = self.config.local_steps, len(self.clients)
        turn, client = number // local, self.clients[(number // local) % n_clients]
        began = time.perf_counter()
        if number % local == 0:
            self._model.load_state_dict(self._global.state_dict())
            self.optimizers["local"].state.clear()
        own_step = turn // n_clients * local + number % local
        loss = _local_step(self.base, self._model, self.optimizers["local"], client, own_step, self.config, lr)
        client_s, began = time.perf_counter() - began, time.perf_counter()
        up = down = 0
        if (number + 1) % local == 0:
            up = down = len(save_bytes(dict(self._model.state_dict())))
            _add(self._sum, self._model, 1.0 / n_clients)
            if (turn + 1) % n_clients == 0:
                self._global.load_state_dict(self._sum.state_dict())
                _scale(self._sum, 0.0)
        return Step(loss, up_bytes=up, down_bytes=down, client_s=client_s, server_s=time.perf_counter() - began)

    def controlnet(self) -> ControlNetModel:
        """Return the last averaged ControlNet."""
        return self._global


class Split:
    """S1: the client sends one message per step, the server trains the ControlNet, nothing comes back (Yao 2024)."""

    def __init__(self, base: Base, config: TrainConfig, clients: Sequence[Client]):
        self.base, self.config, self.clients = base, config, clients
        defences = config.defences
        self._model = latent_hint_controlnet(
            base,
            activation="symsigmoid" if defences.symsigmoid else "none",
            hide_prompts=defences.hide_prompts,
            coarse_hints=defences.coarse_hints,
        )
        self.modules: dict[str, nn.Module] = {"controlnet": self._model}
        self.optimizers: dict[str, torch.optim.Optimizer] = {"server": _adamw(self._model)}

    def step(self, number: int, lr: float) -> Step:
        """Send, receive, train."""
        client, turn = _turn(self.clients, number)
        began = time.perf_counter()
        message, truth = client_send(client, turn, self.config.batch_size)
        sent = time.perf_counter()
        loss = server_loss(self.base, self._model, from_bytes(message), defences=self.config.defences)
        _descend(loss, self.optimizers["server"], lr)
        server_s = time.perf_counter() - sent
        return Step(loss.item(), message, truth, len(message), 0, sent - began, server_s)

    def controlnet(self) -> ControlNetModel:
        """Return the trained ControlNet."""
        return self._model


class Central(Split):
    """The yardstick: one party holds data and model."""

    def step(self, number: int, lr: float) -> Step:
        """Train on one batch, no message leaves."""
        began = time.perf_counter()
        client, turn = _turn(self.clients, number)
        loss = _local_step(self.base, self._model, self.optimizers["server"], client, turn, self.config, lr)
        return Step(loss, server_s=time.perf_counter() - began)


class UShaped(Split):
    """S1 with the loss on the client: it keeps the noise, is handed the prediction and returns the loss's gradient."""

    def step(self, number: int, lr: float) -> Step:
        """Send, receive, predict, hand back, take the gradient, train."""
        client, turn = _turn(self.clients, number)
        began = time.perf_counter()
        # Client: send the message without the noise, which it keeps.
        message, truth = client_message(client, turn, epoch_batch(client, turn, self.config.batch_size))
        up, kept = to_bytes(message.without("noise")), message.float()
        sent = time.perf_counter()
        # Server: predict, and hand the prediction down.
        received = from_bytes(up)
        prediction = server_prediction(self.base, self._model, received)
        handed = prediction.detach()
        down = save_bytes({"noise_pred": handed})
        predicted = time.perf_counter()
        # Client: return the gradient of its loss by the prediction.
        asked = load_bytes(down)["noise_pred"].requires_grad_()
        loss = noise_loss(self.base, client.defences, asked, kept.need("noise"), kept.need("timesteps"))
        (gradient,) = torch.autograd.grad(loss, asked)
        back = save_bytes({"gradient": gradient})
        returned = time.perf_counter()
        # Server: train on it.
        if torch.isfinite(loss):
            _descend((prediction * load_bytes(back)["gradient"]).sum(), self.optimizers["server"], lr)
        seen = replace(received, noise_pred=handed, noise_pred_gradient=gradient)
        client_s = sent - began + returned - predicted
        server_s = predicted - sent + time.perf_counter() - returned
        return Step(loss.item(), to_bytes(seen), truth, len(up) + len(back), len(down), client_s, server_s)


class SplitGradients:
    """Conventional split learning: a trainable hint encoder on the client, the cut gradient returned to it.

    Clients take turns with one hint encoder, handed on from each to the next (Vepakomma et al. 2018); its hand-over is
    not counted as traffic with the server. A malicious server (`config.server` "hijack") returns another gradient in
    the same layout and trains no ControlNet: it keeps its initial weights, and the loss is the hijacking's.
    """

    def __init__(
        self,
        base: Base,
        config: TrainConfig,
        clients: Sequence[Client],
        hints: Tensor,
        public: ImageSet | None = None,
    ):
        self.base, self.config, self.clients, self.hints = base, config, clients, hints
        self._server = image_hint_controlnet(base, seed=config.seed)
        self._encoder = detach_hint_encoder(self._server)
        self._hijacker = _hijacking_server(base, config, public) if config.server == "hijack" else None
        self.modules: dict[str, nn.Module] = {"controlnet": self._server, "hint_encoder": self._encoder}
        self.optimizers: dict[str, torch.optim.Optimizer] = {"client": _adamw(self._encoder)}
        if self._hijacker:
            self.modules |= self._hijacker.modules
            self.optimizers |= self._hijacker.optimizers
        else:
            self.optimizers["server"] = _adamw(self._server)

    def step(self, number: int, lr: float) -> Step:
        """Send features, let the server train its part and return a gradient, train the client's part."""
        client, turn = _turn(self.clients, number)
        began = time.perf_counter()
        chosen = epoch_batch(client, turn, self.config.batch_size)
        features = self._encoder((self.hints[client.indices[chosen]] + 1.0) / 2.0)
        message, truth = client_message(client, turn, chosen, features=features.detach())
        up = to_bytes(message)
        sent = time.perf_counter()

        loss, down = self._answer(up, lr)
        returned = time.perf_counter()
        if down is None:
            return Step(loss, up, truth, len(up))

        self.optimizers["client"].zero_grad(set_to_none=True)
        features.backward(load_bytes(down)["gradient"].float())
        _update(self.optimizers["client"], lr)
        client_s = sent - began + time.perf_counter() - returned
        return Step(loss, up, truth, len(up), len(down), client_s, returned - sent)

    def _answer(self, up: bytes, lr: float) -> tuple[float, bytes | None]:
        """Play the server: return its loss and the bytes it sends down, None if its loss has no gradient."""
        if self._hijacker:
            down = self._hijacker.receive(up)
            return self._hijacker.objective, down
        received = from_bytes(up)
        smashed = received.float().need("smashed").requires_grad_()
        loss = server_loss(self.base, self._server, received, smashed, defences=self.config.defences)
        if not torch.isfinite(loss):
            return loss.item(), None
        _descend(loss, self.optimizers["server"], lr)
        gradient = torch.as_tensor(smashed.grad).to(received.need("smashed").dtype)
        return loss.item(), save_bytes({"gradient": gradient})

    def controlnet(self) -> ControlNetModel:
        """Return the two parts put together again, as a copy."""
        return attach_hint_encoder(copy.deepcopy(self._server), copy.deepcopy(self._encoder))


def _hijacking_server(base: Base, config: TrainConfig, public: ImageSet | None) -> HijackingServer:
    if public is None:
        raise InputError(
            "server 'hijack' learns from public data, and none were given: pass public=, the data set's public split"
        )
    noise = config.defences.feature_noise
    return HijackingServer(base, public, steps=config.steps, seed=config.seed, feature_noise=noise)


def make_scheme(
    base: Base,
    config: TrainConfig,
    clients: Sequence[Client],
    hints: Tensor,
    *,
    public: ImageSet | None = None,
) -> Scheme:
    """Build the scheme that `config` names; `hints` are the private hint images `[n, 3, s, s]`.

    `public` is the data that a malicious server learns from; no other server sees it.

    Raises:
        InputError: the server is malicious and there are no public data.
    """
    if config.scheme == "split_gradients":
        return SplitGradients(base, config, clients, hints, public)
    kinds: dict[str, Callable[..., Scheme]] = {
        "central": Central,
        "federated": Federated,
        "split": Split,
        "u_shaped": UShaped,
    }
    return kinds[config.scheme](base, config, clients)


def _turn(clients: Sequence[Client], number: int) -> tuple[Client, int]:
    """Return whose turn step `number` is and how many turns that client had before."""
    return clients[number % len(clients)], number // len(clients)


def _local_step(
    base: Base,
    model: ControlNetModel,
    optimizer: torch.optim.Optimizer,
    client: Client,
    step: int,
    config: TrainConfig,
    lr: float,
) -> float:
    """Train where the data are: no message, no defence."""
    message, _ = client_message(client, step, epoch_batch(client, step, config.batch_size))
    loss = server_loss(base, model, message)
    _descend(loss, optimizer, lr)
    return loss.item()


def _adamw(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=0.0, weight_decay=0.01, fused=True)


def _descend(loss: Tensor, optimizer: torch.optim.Optimizer, lr: float) -> None:
    if not torch.isfinite(loss):
        return  # the training loop reports it; weights stay as they are
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    _update(optimizer, lr)


def _update(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
        nn.utils.clip_grad_norm_(group["params"], 1.0)
    optimizer.step()


@torch.no_grad()
def _scale(module: nn.Module, factor: float) -> None:
    for value in module.state_dict().values():
        value.mul_(factor)


@torch.no_grad()
def _add(total: nn.Module, part: nn.Module, weight: float) -> None:
    for kept, new in zip(total.state_dict().values(), part.state_dict().values(), strict=True):
        kept.add_(new, alpha=weight)
