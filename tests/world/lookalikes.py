"""Small denoisers as other code bases write them: other names, other time embeddings, layers of their own."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SIZE, WIDTH, CLASSES = 8, 32, 5


def sinusoids(t: Tensor, width: int = WIDTH) -> Tensor:
    rates = torch.exp(-math.log(10000) / (width // 2 - 1) * torch.arange(width // 2))
    angles = t.float()[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], 1)


class RootMeanSquare(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.g = nn.Parameter(torch.ones(1, width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1) * self.g * x.shape[1] ** 0.5


class SineUnet(nn.Module):
    """`time_mlp`, scale and shift, RMS norms, linear attention with a memory, self-conditioning by more channels."""

    def __init__(self, channels: int = 3, n_out: int = 1, learned: bool = False):
        super().__init__()
        self.channels = channels
        self.freqs = nn.Parameter(torch.randn(WIDTH // 2)) if learned else None
        self.time_mlp = nn.Sequential(nn.Linear(WIDTH, 64), nn.GELU(), nn.Linear(64, 64))
        self.init_conv = nn.Conv2d(2 * channels, WIDTH, 7, padding=3)
        self.down = nn.Conv2d(WIDTH, WIDTH, 4, 2, 1)
        self.mlp = nn.Linear(64, 2 * WIDTH)
        self.proj, self.norm = nn.Conv2d(WIDTH, WIDTH, 3, padding=1), RootMeanSquare(WIDTH)
        self.to_qkv, self.mem_kv = nn.Conv2d(WIDTH, 3 * WIDTH, 1, bias=False), nn.Parameter(torch.randn(2, WIDTH, 4))
        self.final_conv = nn.Conv2d(2 * WIDTH, n_out * channels, 1)

    def forward(self, x: Tensor, time: Tensor, x_self_cond: Tensor | None = None) -> Tensor:
        x = self.init_conv(torch.cat([torch.zeros_like(x) if x_self_cond is None else x_self_cond, x], 1))
        waves = None if self.freqs is None else time[:, None] / 1000 * self.freqs * 2 * math.pi
        t = self.time_mlp(sinusoids(time) if waves is None else torch.cat([waves.sin(), waves.cos()], 1))
        scale, shift = self.mlp(F.silu(t))[:, :, None, None].chunk(2, 1)
        h = F.silu(self.norm(self.proj(F.silu(self.down(x)))) * (scale + 1) + shift)
        q, k, v = (part.flatten(2) for part in self.to_qkv(h).chunk(3, 1))
        k, v = (torch.cat([m.expand(len(x), -1, -1), p], 2) for m, p in zip(self.mem_kv, (k, v), strict=True))
        h = h + (v @ (k.mT @ q).softmax(1)).view_as(h)
        return self.final_conv(torch.cat([x, F.interpolate(h, scale_factor=2)], 1))


class _Checkpoint(torch.autograd.Function):
    """Gradients of first order only, as checkpointing by hand has them."""

    @staticmethod
    def forward(ctx: Any, run: Callable, n: int, *tensors: Tensor) -> Tensor:
        ctx.run, ctx.tensors, ctx.n = run, tensors, n
        with torch.no_grad():
            return run(*tensors[:n])

    @staticmethod
    def backward(ctx: Any, back: Tensor) -> Any:
        own = [tensor.detach().requires_grad_(True) for tensor in ctx.tensors[: ctx.n]]
        with torch.enable_grad():
            output = ctx.run(*own)
        return None, None, *torch.autograd.grad(output, own + list(ctx.tensors[ctx.n :]), back, allow_unused=True)


def checkpoint(run: Callable, inputs: tuple, parameters: Any) -> Tensor:
    return _Checkpoint.apply(run, len(inputs), *inputs, *parameters)


class GuidedBlock(nn.Module):
    def __init__(self, width: int, groups: int):
        super().__init__()
        self.in_layers = nn.Sequential(nn.GroupNorm(groups, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(64, 2 * width))
        self.out_norm = nn.GroupNorm(groups, width)
        self.out_conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return checkpoint(self._forward, (x, emb), self.parameters())

    def _forward(self, x: Tensor, emb: Tensor) -> Tensor:
        scale, shift = self.emb_layers(emb)[:, :, None, None].chunk(2, 1)
        return x + self.out_conv(F.silu(self.out_norm(self.in_layers(x)) * (1 + scale) + shift))


class GuidedUNet(nn.Module):
    """`time_embed`, `label_emb`, `input_blocks`, checkpointed blocks, norms of single channels, a learned variance."""

    def __init__(self, n_out: int = 1, num_classes: int | None = None):
        super().__init__()
        self.image_size, self.in_channels, self.num_classes = SIZE, 3, num_classes
        self.time_embed = nn.Sequential(nn.Linear(WIDTH, 64), nn.SiLU(), nn.Linear(64, 64))
        if num_classes:
            self.label_emb = nn.Embedding(num_classes, 64)
        self.input_blocks = nn.ModuleList([nn.Conv2d(3, WIDTH, 3, padding=1), nn.Conv2d(WIDTH, 64, 3, 2, 1)])
        self.middle_block = nn.ModuleList([GuidedBlock(64, 64), GuidedBlock(64, 16)])
        self.out = nn.Sequential(nn.SiLU(), nn.Conv2d(64 + WIDTH, 3 * n_out, 3, padding=1))

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        assert (y is not None) == (self.num_classes is not None)
        emb = self.time_embed(sinusoids(timesteps))
        emb = emb if y is None else emb + self.label_emb(y)
        x = self.input_blocks[0](x)
        h = self.input_blocks[1](x)
        for block in self.middle_block:
            h = block(h, emb)
        return self.out(torch.cat([x, F.interpolate(h, scale_factor=2)], 1))


class OwnLinear(nn.Module):
    def __init__(self, d: int, n: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(n, d) / d**0.5), nn.Parameter(torch.zeros(n))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weight.t()).add_(self.bias)


class OwnConv2d(nn.Module):
    def __init__(self, d: int, n: int, down: bool = False):
        super().__init__()
        self.weight, self.down = nn.Parameter(torch.randn(n, d, 3, 3) / (9 * d) ** 0.5), down
        self.bias = nn.Parameter(torch.zeros(n))

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(x, 2) if self.down else x
        return F.conv2d(x, self.weight, padding=1).add_(self.bias.reshape(1, -1, 1, 1))


class NoiseLevelNet(nn.Module):
    """Takes noise levels, not timesteps, predicts the image, and makes its layers itself: needs `call`."""

    def __init__(self) -> None:
        super().__init__()
        self.img_resolution, self.img_channels = SIZE, 3
        self.map_layer0, self.map_layer1 = OwnLinear(WIDTH, 64), OwnLinear(64, 64)
        self.enc, self.down, self.affine = OwnConv2d(3, WIDTH), OwnConv2d(WIDTH, WIDTH, down=True), OwnLinear(64, WIDTH)
        self.conv0, self.conv1, self.aux = OwnConv2d(WIDTH, 64), OwnConv2d(64, 64), OwnConv2d(64 + WIDTH, 3)

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        emb = F.silu(self.map_layer1(F.silu(self.map_layer0(sinusoids(1000 * sigma.log() / 4)))))
        x = self.enc(x / (1 + sigma[:, None, None, None] ** 2).sqrt())
        h = F.silu(self.down(x) + self.affine(emb)[:, :, None, None])
        h = self.conv1(F.silu(self.conv0(h)))
        return self.aux(torch.cat([x, F.interpolate(h, scale_factor=2)], 1))


class DiffusionTransformer(nn.Module):
    """Patches, fused attention, adaptive layer norms, labels that are required."""

    def __init__(self) -> None:
        super().__init__()
        width = 2 * WIDTH
        self.x_embedder = nn.Conv2d(3, width, 2, 2)
        self.t_embedder = nn.Sequential(nn.Linear(WIDTH, width), nn.SiLU(), nn.Linear(width, width))
        self.y_embedder = nn.Embedding(CLASSES, width)
        self.adaLN_modulation, self.qkv = nn.Linear(width, 4 * width), nn.Linear(width, 3 * width)
        self.proj, self.fc1, self.fc2 = nn.Linear(width, width), nn.Linear(width, 128), nn.Linear(128, width)
        self.linear = nn.Linear(width, 12)
        self.pos_embed = nn.Parameter(torch.randn(1, SIZE**2 // 4, width))

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        c = F.silu(self.t_embedder(sinusoids(t)) + self.y_embedder(y))
        shift, scale, gate, mlp_gate = self.adaLN_modulation(c)[:, None].chunk(4, 2)
        h = self.x_embedder(x).flatten(2).mT + self.pos_embed
        parts = self.qkv(F.layer_norm(h, h.shape[2:]) * (1 + scale) + shift).chunk(3, 2)
        q, k, v = (part.unflatten(2, (2, WIDTH)).transpose(1, 2) for part in parts)
        h = h + gate * self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        h = h + mlp_gate * self.fc2(F.gelu(self.fc1(F.layer_norm(h, h.shape[2:]))))
        return F.pixel_shuffle(self.linear(h).mT.unflatten(2, (SIZE // 2, SIZE // 2)), 2)


class StandardisedConv2d(nn.Conv2d):
    """Its weight's gradient is no product of input and signal, whatever its class."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight / weight.std((1, 2, 3), keepdim=True), self.bias, self.stride, self.padding)


class TableNet(nn.Module):
    """Timesteps looked up in a table, standardised weights, a tuple returned."""

    def __init__(self, n_timesteps: int = 1000):
        super().__init__()
        self.steps = nn.Embedding(n_timesteps, WIDTH)
        self.first, self.second = nn.Conv2d(3, WIDTH, 3, 2, 1), StandardisedConv2d(WIDTH, WIDTH, 3, padding=1)
        self.third, self.last = nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.Conv2d(WIDTH, 12, 3, padding=1)

    def forward(self, images: Tensor, steps: Tensor) -> tuple[Tensor, None]:
        h = self.first(images) + self.steps(steps)[:, :, None, None]
        h = h + self.second(F.silu(h))
        return F.pixel_shuffle(self.last(F.silu(h + self.third(F.silu(h)))), 2), None


class ConvTimeNet(nn.Module):
    """The embedding passes through 1x1 convolutions without biases; timesteps have to be floats."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Conv2d(WIDTH, 64, 1, bias=False), nn.SiLU(), nn.Conv2d(64, WIDTH, 1, bias=False))
        self.enter, self.middle = nn.Conv2d(3, WIDTH, 3, 2, 1), nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.leave = nn.Conv2d(WIDTH, 12, 3, padding=1)

    def forward(self, image: Tensor, t: Tensor) -> dict[str, Tensor]:
        if not t.is_floating_point():
            raise TypeError("t must be floats")
        h = self.enter(image) + self.embed(sinusoids(t)[:, :, None, None])
        return {"sample": F.pixel_shuffle(self.leave(h + self.middle(F.silu(h))), 2)}
