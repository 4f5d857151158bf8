"""BigGAN-deep (Brock, Donahue & Simonyan, ICLR 2019; appendix B): the generator with released weights, and training it.

One file that turns a raw state dict, as released for ImageNet at 128, 256 and 512 pixels by the port of DeepMind's modules
(huggingface/pytorch-pretrained-BigGAN), into a working network; any other width, depth and number of classes is read from
the dict as well. Counterfactual Generative Networks (Sauer & Geiger, ICLR 2021) use it four times over.

    python biggan.py --weights biggan-deep-256-pytorch_model.bin --classes 207,ostrich --truncation 0.5 --out sheet.png

Every weight is stored with the two vectors of its spectral norm: `load(..., frozen=False)` trains it as it was trained,
`load(...)` divides once and for all. Normalisation uses stored statistics, 51 rows of them, row i for truncation i / 50.
Submodules have the names of the released keys. Needs torch and torchvision, and nothing else of this project.

Glossary (N images, C channels, K classes, R pixels):
    z       noise                        (N, 128)       truncated normal, within -2 t .. 2 t
    y       labels or class weights      (N,) / (N, K)  long in 0..K-1 / float
    t       truncation                   float          0.02 .. 1; None: normalise by the batch's own statistics
    x       images                       (N, 3, R, R)   -1 .. 1
"""
import argparse
import contextlib
import hashlib
import importlib.util
import os
import pickle
import runpy
import tempfile
import zipfile
from pathlib import Path
from typing import Optional, Sequence, Union

import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

ROWS = 51           # of stored statistics: truncation 0, 0.02, .. 1
ALL = slice(None)
EPSILON = 1e-4      # inside every normalisation, and in spectral norms
FLOATS = (torch.half, torch.bfloat16, torch.float, torch.double)
WEIGHTS = "biggan-deep-256-pytorch_model.bin"


# ----------------------------------------------------------------------------------------------------------------- modules

class Normed(nn.Module):
    """A weight divided by its largest singular value (Miyato et al., 2018), estimated as u^T W v; and a bias.

    `fold` divides once and for all, after which the layer is a plain one that cannot be trained; for `held` see BigGAN.
    """

    def __init__(self, *shape: int, bias: bool = True):
        super().__init__()
        self.weight_orig = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.zeros(shape[0])) if bias else None
        self.register_buffer("weight_u", torch.empty(shape[0]))
        self.register_buffer("weight_v", torch.empty(self.weight_orig[0].numel()))
        self.folded, self.held = False, None
        if not self.weight_orig.is_meta:                            # where a loader needs no numbers yet
            nn.init.orthogonal_(self.weight_orig)
            for vector in (self.weight_u, self.weight_v):
                vector.copy_(F.normalize(torch.randn_like(vector), dim=0))

    def weight(self) -> torch.Tensor:
        if self.folded:
            return self.weight_orig
        if self.held is not None:
            return self.held
        return self.weight_orig / (self.weight_u @ (self.weight_orig.flatten(1) @ self.weight_v))

    @torch.no_grad()
    def power_iteration(self) -> None:
        """One step of u and v towards the largest singular value's vectors."""
        matrix = self.weight_orig.flatten(1)
        self.weight_v.copy_(F.normalize(matrix.T @ self.weight_u, dim=0, eps=EPSILON))
        self.weight_u.copy_(F.normalize(matrix @ self.weight_v, dim=0, eps=EPSILON))

    @torch.no_grad()
    def fold(self) -> None:
        if self.folded:
            return
        self.weight_orig.div_(self.weight_u @ (self.weight_orig.flatten(1) @ self.weight_v))
        self.folded = True
        del self.weight_u, self.weight_v


class Linear(Normed):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight(), self.bias)


class Conv(Normed):
    """k x k convolution, odd k, same size; `double` upsamples by nearest neighbour first.

    A large map is doubled and convolved at once, with 4/9 of the multiplications. A 1 x 1 convolution is a linear map of
    every pixel's channels, which needs no copies in other memory layouts.
    """

    def __init__(self, i: int, o: int, k: int, bias: bool = True, double: bool = False):
        super().__init__(o, i, k, k, bias=bias)
        self.padding, self.double = k // 2, double

    def forward(self, x: torch.Tensor, channels: slice = ALL) -> torch.Tensor:
        """x (N, i, H, W) -> (N, o, H, W) or (N, o, 2H, 2W); of the o channels only those."""
        weight, bias = self.weight()[channels], None if self.bias is None else self.bias[channels]
        if self.padding == 0:
            return F.linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)
        if self.double and x.shape[2] * x.shape[3] > 32 * 32:           # below, making the kernel costs more than it saves
            return F.conv_transpose2d(x, doubling_kernel(weight), bias, stride=2, padding=1)
        return F.conv2d(F.interpolate(x, scale_factor=2.0) if self.double else x, weight, bias, padding=self.padding)


def doubling_kernel(weight: torch.Tensor) -> torch.Tensor:
    """The transposed convolution (i, o, 4, 4), stride 2, that equals nearest-neighbour upsampling and then a convolution
    (o, i, 3, 3): each pixel counts twice."""
    side = weight.new_tensor([[0, 0, 1], [0, 1, 1], [1, 1, 0], [1, 0, 0]])          # in one dimension
    return (weight.transpose(0, 1).flatten(2) @ torch.kron(side, side).T).unflatten(2, (4, 4))


class BatchNorm(nn.Module):
    """Normalisation by the statistics of a truncation, with a scale and an offset (linear in the condition, if there is one),
    and ReLU: one multiply-add an element."""

    def __init__(self, channels: int, condition: Optional[int]):
        super().__init__()
        self.register_buffer("running_means", torch.zeros(ROWS, channels))
        self.register_buffer("running_vars", torch.ones(ROWS, channels))
        if condition:
            self.scale = Linear(channels, condition, bias=False)
            self.offset = Linear(channels, condition, bias=False)
        else:
            self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: torch.Tensor, condition: Optional[torch.Tensor], truncation: Optional[float], keep: bool = False,
                channels: slice = ALL) -> torch.Tensor:
        """x holds those channels. Writes over x where no gradient needs it, unless told to keep it."""
        if condition is None:
            scale, offset = self.weight[None, channels], self.bias[None, channels]
        else:
            scale, offset = 1 + self.scale(condition), self.offset(condition)       # (N, C)
        if truncation is None:
            mean, var = self.running_means.new_zeros(2, x.shape[1])
            x = F.batch_norm(x, mean, var, training=True, momentum=1.0, eps=EPSILON)
            self.batch = mean, var * (1 - x.shape[1] / x.numel())   # for measure_statistics; var has been divided by n - 1
        else:
            mean, var = _row(self.running_means, truncation)[channels], _row(self.running_vars, truncation)[channels]
            scale = scale * (var + EPSILON).rsqrt()
            offset = offset - mean * scale
        scale, offset = scale.to(x.dtype), offset.to(x.dtype)                       # which autocast may have changed
        out = None if keep or torch.is_grad_enabled() else x
        return F.relu(torch.addcmul(offset[:, :, None, None], x, scale[:, :, None, None], out=out), inplace=True)


def _row(rows: torch.Tensor, truncation: float) -> torch.Tensor:
    """Statistics (C,) for a truncation: a stored row (51, C), or the line between two."""
    position = truncation * (ROWS - 1)
    nearest = round(position)
    if abs(position - nearest) < 1e-6:                              # 0.28 * 50 is 14.000000000000002
        return rows[nearest]
    return torch.lerp(rows[int(position)], rows[int(position) + 1], position - int(position))


class Block(nn.Module):
    """Residual block with a bottleneck (figure 16a): (N, i, H, W) -> (N, o, H, W), or (N, o, 2H, 2W) with `double`; o <= i."""

    def __init__(self, i: int, o: int, condition: int, double: bool):
        super().__init__()
        mid = i // 4
        self.channels, self.double = o, double
        self.bn_0, self.conv_0 = BatchNorm(i, condition), Conv(i, mid, 1)
        self.bn_1, self.conv_1 = BatchNorm(mid, condition), Conv(mid, mid, 3, double=double)
        self.bn_2, self.conv_2 = BatchNorm(mid, condition), Conv(mid, mid, 3)
        self.bn_3, self.conv_3 = BatchNorm(mid, condition), Conv(mid, o, 1)

    def forward(self, x: torch.Tensor, condition: torch.Tensor, truncation: Optional[float]) -> torch.Tensor:
        return self.join(x, self.residual(x, condition, truncation))

    def residual(self, x: torch.Tensor, condition: torch.Tensor, truncation: Optional[float]) -> torch.Tensor:
        h = self.conv_0(self.bn_0(x, condition, truncation, keep=True))             # (N, i/4, H, W)
        h = self.conv_1(self.bn_1(h, condition, truncation))                        # (N, i/4, 2H, 2W)
        h = self.conv_2(self.bn_2(h, condition, truncation))
        return self.bn_3(h, condition, truncation)

    def join(self, x: torch.Tensor, h: torch.Tensor, channels: slice = ALL) -> torch.Tensor:
        """The block's input x and h, which `residual` made of it -> the block's output, or some channels of it."""
        h = self.conv_3(h, channels)                                                # (N, o, 2H, 2W)
        x = x[:, :self.channels][:, channels]
        if torch.is_grad_enabled():                                 # in place is slow then: h is a view
            return h + (F.interpolate(x, scale_factor=2.0) if self.double else x)
        if self.double:                                             # add each pixel of x to four of h, without a copy of x
            h.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).add_(x[:, :, :, None, :, None])
            return h
        return h.add_(x)


class Attention(nn.Module):
    """Self-attention (Zhang et al., 2019) of every pixel over the four times fewer pixels of a max-pooled map."""

    def __init__(self, channels: int):
        super().__init__()
        self.snconv1x1_theta = Conv(channels, channels // 8, 1, bias=False)
        self.snconv1x1_phi = Conv(channels, channels // 8, 1, bias=False)
        self.snconv1x1_g = Conv(channels, channels // 2, 1, bias=False)
        self.snconv1x1_o_conv = Conv(channels // 2, channels, 1, bias=False)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query = self.snconv1x1_theta(x).flatten(2).mT                               # (N, HW, C/8)
        key = F.max_pool2d(self.snconv1x1_phi(x), 2).flatten(2).mT                  # (N, HW/4, C/8)
        value = F.max_pool2d(self.snconv1x1_g(x), 2).flatten(2).mT                  # (N, HW/4, C/2)
        h = torch.cat([F.scaled_dot_product_attention(part, key, value, scale=1.0) for part in query.split(1024, dim=1)], dim=1)
        h = h.mT.unflatten(2, x.shape[2:])                                          # (N, HW, C/2) -> (N, C/2, H, W)
        return x + self.snconv1x1_o_conv(self.gamma * h)


class BigGAN(nn.Module):
    """The generator. `blocks`: channels in and out of each residual block, every second one doubles the 4 x 4 pixels of the
    start; `attention`: the number of blocks before the attention, None for none."""

    def __init__(self, blocks: Sequence[tuple[int, int]], attention: Optional[int] = None, classes: int = 1000,
                 noise: int = 128, embedding: int = 128):
        super().__init__()
        self.noise, self.classes, self.resolution = noise, classes, 4 * 2 ** (len(blocks) // 2)
        condition = noise + embedding
        self.embeddings = nn.Linear(classes, embedding, bias=False)
        layers = [Block(i, o, condition, double=number % 2 == 1) for number, (i, o) in enumerate(blocks)]
        if attention is not None:
            layers.insert(attention, Attention(blocks[attention][0]))
        start, end = blocks[0][0], blocks[-1][1]
        self.generator = nn.ModuleDict({"gen_z": Linear(16 * start, condition), "layers": nn.ModuleList(layers),
                                        "bn": BatchNorm(end, None), "conv_to_rgb": Conv(end, end, 3)})

    def forward(self, z: torch.Tensor, y: torch.Tensor, truncation: Optional[float] = 1.0) -> torch.Tensor:
        """z (N, noise) float, y labels (N,) long or class weights (N, classes) float -> images (N, 3, R, R) in [-1, 1].

        truncation selects the statistics; z itself is taken as it is (see `truncated_noise`). Raises ValueError for a
        truncation outside 0.02..1, a class that is not there, and shapes that do not fit.
        """
        if truncation is not None and not 0.02 <= truncation <= 1:
            raise ValueError(f"truncation {truncation} is not in 0.02..1")
        if z.ndim != 2 or z.shape[1] != self.noise:
            raise ValueError(f"noise of shape {tuple(z.shape)}, expected (N, {self.noise})")
        if y.shape[:1] != z.shape[:1]:
            raise ValueError(f"noise of shape {tuple(z.shape)} and classes of shape {tuple(y.shape)}: another N")
        condition = torch.cat([z, self.embed(y)], dim=1)                            # (N, noise + embedding)
        x = self.generator["gen_z"](condition)                                      # (N, 16 C)
        x = x.unflatten(1, (4, 4, -1)).permute(0, 3, 1, 2)                          # (N, C, 4, 4): laid out (h, w, c)
        *layers, last = self.generator["layers"]
        for layer in layers:
            x = layer(x) if isinstance(layer, Attention) else layer(x, condition, truncation)

        # Of all maps the last block's are the largest. With known statistics a few channels at a time are enough, unless they
        # are kept for a gradient; and of the last convolution three channels, since the others are never seen.
        whole = truncation is None or torch.is_grad_enabled()
        h, step = last.residual(x, condition, truncation), last.channels if whole else 16
        bn, out = self.generator["bn"], self.generator["conv_to_rgb"]
        weight, image = out.weight()[:3], out.bias[:3, None, None]
        for part in (slice(first, first + step) for first in range(0, last.channels, step)):
            image = image + F.conv2d(bn(last.join(x, h, part), None, truncation, channels=part), weight[:, part], padding=1)
        return torch.tanh(image)

    def embed(self, y: torch.Tensor) -> torch.Tensor:
        """Labels (N,) or class weights (N, classes) -> (N, embedding)."""
        if y.is_floating_point():
            if y.ndim != 2 or y.shape[1] != self.classes:
                raise ValueError(f"class weights of shape {tuple(y.shape)}, expected (N, {self.classes})")
            return self.embeddings(y)
        if y.ndim != 1 or y.is_complex() or y.dtype == torch.bool:
            raise ValueError(f"labels of shape {tuple(y.shape)} and type {y.dtype}, expected (N,) long")
        if len(y) and not 0 <= int(y.min()) <= int(y.max()) < self.classes:
            raise ValueError(f"class {int(y.min()) if y.min() < 0 else int(y.max())} is not in 0..{self.classes - 1}")
        return self.embeddings.weight.T[y.long()]

    def norms(self) -> list[Normed]:
        return [module for module in self.modules() if isinstance(module, Normed)]

    def power_iteration(self) -> None:
        """One step of every spectral norm; call it once per optimiser step."""
        for module in self.norms():
            module.power_iteration()

    @contextlib.contextmanager
    def held(self):
        """Divide by the spectral norms once, for all forward passes inside, and hand their gradients on at the end.

        For many small batches before one optimiser step: images and gradients are the same. Raises ValueError inside another
        `held`, and for a frozen network.
        """
        norms = self.norms()
        if any(norm.folded or norm.held is not None for norm in norms):
            raise ValueError("the spectral norms are frozen or held already")
        quotients = [norm.weight() for norm in norms]
        for norm, quotient in zip(norms, quotients):
            norm.held = quotient.detach().requires_grad_()
        try:
            yield self
            for norm in norms:
                quotient, gradient = quotients.pop(0), norm.held.grad
                norm.held = None                                # of large networks, memory is freed one by one
                if gradient is not None:
                    quotient.backward(gradient)
        finally:
            for norm in norms:
                norm.held = None

    def freeze(self) -> "BigGAN":
        """Divide by the spectral norms once and for all, in place; eval mode, no gradients."""
        for module in self.norms():
            module.fold()
        return self.eval().requires_grad_(False)


def truncated_noise(count: int, dimensions: int = 128, truncation: float = 1.0, seed: Optional[int] = None,
                    generator: Optional[torch.Generator] = None) -> torch.Tensor:
    """(count, dimensions): a standard normal cut at -2 and 2, times the truncation; by a seed, or by a generator."""
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
    return truncation * nn.init.trunc_normal_(torch.empty(count, dimensions), a=-2, b=2, generator=generator)


# ----------------------------------------------------------------------------------------------------------------- loading

def load(source: Union[str, os.PathLike, dict], *, frozen: bool = True) -> BigGAN:
    """A BigGAN from a raw state dict or the path of one; resolution, widths and classes are read from it.

    frozen: eval mode, norms folded, no gradients; else ready to be trained further. Nothing in a file can run code. Raises
    ValueError that names what is missing, unexpected, misshapen or not finite.
    """
    state = dict(source) if isinstance(source, dict) else read_state(source)
    name = "the state dict" if isinstance(source, dict) else source
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.is_meta:
            raise ValueError(f"{name}: {key} is no dense tensor with a name")
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise ValueError(f"{name}: {key} claims more numbers than are stored")
    with torch.device("meta"):
        model = _build(state, name)
    expected = model.state_dict()
    wrong = [f"lacks {key}" for key in expected.keys() - state.keys()]
    wrong += [f"has too much: {key}" for key in state.keys() - expected.keys()]
    wrong += [f"{key} has shape {tuple(state[key].shape)}, expected {tuple(value.shape)}" for key, value in expected.items()
              if key in state and state[key].shape != value.shape]
    if wrong:
        raise ValueError(f"{name} does not fit: {'; '.join(sorted(wrong))}")
    for key, value in state.items():                                        # a copy: the caller's tensors stay as they are
        if value.dtype not in FLOATS:
            raise ValueError(f"{name}: {key} holds {value.dtype}, not floating-point numbers")
        state[key] = value = value.detach().to(torch.float, copy=isinstance(source, dict) or not value.is_contiguous())
        if not torch.isfinite(value.sum()) and not torch.isfinite(value).all():
            raise ValueError(f"{name}: {key} holds values that are not finite numbers")
        if key.endswith("running_vars") and value.min() < 0:
            raise ValueError(f"{name}: {key} holds negative variances")
    model.load_state_dict(state, assign=True)
    return model.freeze() if frozen else model


def read_state(path: Union[str, os.PathLike]) -> dict:
    """What a file written by torch.save holds, memory-mapped where its format allows. Nothing in it can run code. Raises
    ValueError where it is no dict."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))  # not before torch 1.6
        if isinstance(state, dict):
            return dict(state)
        reason = "it holds something else"
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except pickle.UnpicklingError:
        reason = "it is damaged, or holds more than tensors and could run code"
    except Exception as error:              # whatever a hostile or broken file makes the reader raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
    raise ValueError(f"{path} is no state dict of tensors ({reason})")


def _build(state: dict, name: object) -> BigGAN:
    """The network that fits the shapes of a raw dict."""
    def shape(key: str, dimensions: int) -> torch.Size:
        if key not in state or state[key].ndim != dimensions or 0 in state[key].shape:
            raise ValueError(f"{name} is no BigGAN-deep: it lacks {key}, or its shape is another")
        return state[key].shape

    embedding, classes = shape("embeddings.weight", 2)
    noise = shape("generator.gen_z.weight_orig", 2)[1] - embedding
    numbers = {int(key.split(".")[2]) for key in state if key.startswith("generator.layers.") and key.split(".")[2].isdecimal()}
    blocks, attention = [], None
    for number in range(len(numbers)):
        prefix = f"generator.layers.{number}"
        if f"{prefix}.gamma" in state and attention is None:
            attention = len(blocks)
        else:
            blocks.append((shape(f"{prefix}.conv_0.weight_orig", 4)[1], shape(f"{prefix}.conv_3.weight_orig", 4)[0]))
    joined = all(o == i for (_, o), (i, _) in zip(blocks, blocks[1:])) and all(i >= max(o, 4) and o >= 3 for i, o in blocks)
    joined = joined and (attention is None or attention < len(blocks) and blocks[attention][0] >= 8)
    if not blocks or not joined or noise < 1:
        raise ValueError(f"{name} is no BigGAN-deep: its blocks do not follow each other ({blocks})")
    return BigGAN(blocks, attention, classes, noise, embedding)


# ---------------------------------------------------------------------------------------------------------------- training

class DiscriminatorBlock(nn.Module):
    """Residual block of the discriminator (figure 16b): (N, i, H, W) -> (N, o, H, W), or half the size with `half`; o >= i."""

    def __init__(self, i: int, o: int, half: bool):
        super().__init__()
        mid = o // 4
        self.conv_0, self.conv_1 = Conv(i, mid, 1), Conv(mid, mid, 3)
        self.conv_2, self.conv_3 = Conv(mid, mid, 3), Conv(mid, o, 1)
        self.shortcut = Conv(i, o - i, 1) if o > i else None
        self.half = half

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.conv_0(F.relu(x))
        h = F.relu(self.conv_2(F.relu(self.conv_1(F.relu(h)))))
        if self.half:
            h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)
        if self.shortcut is not None:
            x = torch.cat([x, self.shortcut(x)], dim=1)
        return x + self.conv_3(h)


class Discriminator(nn.Module):
    """x (N, channels, R, R) in [-1, 1], y (N,) long -> scores (N,): a head of `widths[0]` channels, then two blocks a width, the
    first of which halves the image; the sum over pixels; a linear score and the class's projection. In training mode each call
    takes one step of every spectral norm first. channels: 3 for each image that is seen at once."""

    def __init__(self, widths: Sequence[int], attention: Optional[int] = None, classes: int = 1000, channels: int = 3):
        super().__init__()
        self.head = Conv(channels, widths[0], 3)
        layers = []
        for i, o in zip(widths, widths[1:]):
            layers += [DiscriminatorBlock(i, o, True), DiscriminatorBlock(o, o, False)]
        if attention is not None:
            layers.insert(2 * attention, Attention(widths[attention]))
        self.layers = nn.Sequential(*layers)
        self.score, self.embedding = Linear(1, widths[-1]), Normed(classes, widths[-1], bias=False)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.power_iteration()
        h = F.relu(self.layers(self.head(x)))
        h = F.avg_pool2d(h, h.shape[2:], divisor_override=1).flatten(1)             # (N, C), the sum over pixels
        return self.score(h)[:, 0] + (self.embedding.weight()[y] * h).sum(dim=1)    # (N,)

    norms, power_iteration = BigGAN.norms, BigGAN.power_iteration


def train(model: BigGAN, discriminator: nn.Module, images: torch.Tensor, labels: torch.Tensor, *, steps: int,
          batch: int = 64, pack: int = 1, lr: float = 4e-4, noise: float = 0.4, seed: int = 0, average: float = 0.999,
          report=None) -> BigGAN:
    """Adversarial training on uint8 images (N, 3, R, R) and labels (N,); returns the averaged generator.

    The loss is the relativistic hinge (Jolicoeur-Martineau, 2019): real images shall lead generated ones of their class by 1.
    discriminator: `Discriminator`, or any module that is called like it; it judges `pack` images of a class at once, one above the
    other in 3 `pack` channels, and so sees where the generated ones are all alike (PacGAN; Lin et al., 2018). Adam, betas (0.5,
    0.99), the discriminator at twice `lr`, both falling to zero over the second half; `noise`: standard deviation of what is
    added to all that the discriminator sees, fading to zero (Sonderby et al., 2017). The 51 rows of statistics are to be
    measured afterwards, see `measure_statistics`. report(step, {loss: float}) is called every 50 steps. Raises ValueError for a
    batch that `pack` does not divide.
    """
    if batch % pack:
        raise ValueError(f"a batch of {batch} images is not made of packs of {pack}")
    generator = torch.Generator().manual_seed(seed)
    averaged = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(average))
    optimizers = [torch.optim.Adam(network.parameters(), rate, betas=(0.5, 0.99), fused=True)
                  for network, rate in ((model, lr), (discriminator, 2 * lr))]
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, 2 * (1 - step / steps)))
                 for optimizer in optimizers]
    by_class, counts = labels.argsort(stable=True), labels.bincount()
    starts = counts.cumsum(0) - counts

    def packed(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(0, (-1, pack)).flatten(1, 2)                             # (N, 3, R, R) -> (N / pack, 3 pack, R, R)

    for step in range(steps):
        y_pack = labels[torch.randint(len(labels), (batch // pack,), generator=generator)]
        y = y_pack.repeat_interleave(pack)
        chosen = by_class[starts[y] + (torch.rand(batch, generator=generator, dtype=torch.double) * counts[y]).long()]
        x = (images[chosen].float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        fake = model(truncated_noise(batch, model.noise, generator=generator), y, None)

        # Discriminator: real images above generated ones.
        blur = noise * (1 - step / steps) * torch.randn(2 * batch, *x.shape[1:], generator=generator)
        real_score, fake_score = discriminator(packed(torch.cat([x, fake.detach()]) + blur), y_pack.repeat(2)).chunk(2)
        loss_d = F.relu(1 - (real_score - fake_score)).mean()
        optimizers[1].zero_grad()
        loss_d.backward()
        optimizers[1].step()

        # Generator: generated images above real ones.
        discriminator.requires_grad_(False)
        loss_g = F.relu(1 - (discriminator(packed(fake + blur[batch:]), y_pack) - real_score.detach())).mean()
        optimizers[0].zero_grad()
        loss_g.backward()
        optimizers[0].step()
        model.power_iteration()
        discriminator.requires_grad_(True)
        for schedule in schedules:
            schedule.step()
        averaged.update_parameters(model)
        if report and (step + 1) % 50 == 0:
            report(step + 1, {"discriminator": loss_d.item(), "generator": loss_g.item()})
    averaged = averaged.module
    for _ in range(30):                             # its weights' norms are not those of the last weights
        averaged.power_iteration()
    return averaged


@torch.no_grad()
def measure_statistics(model: BigGAN, batches: int = 10, batch: int = 100, seed: int = 0) -> None:
    """Fill the 51 rows of every normalisation with means and variances over `batches` x `batch` draws at that truncation."""
    norms = [module for module in model.modules() if isinstance(module, BatchNorm)]
    generator = torch.Generator().manual_seed(seed)
    for row in range(ROWS):
        totals = [0.0] * len(norms)
        for _ in range(batches):
            y = torch.randint(model.classes, (batch,), generator=generator)
            model(truncated_noise(batch, model.noise, row / (ROWS - 1), generator=generator), y, None)
            totals = [total + torch.stack([norm.batch[0], norm.batch[1] + norm.batch[0] ** 2]) / batches
                      for total, norm in zip(totals, norms)]
        for norm, (mean, square) in zip(norms, totals):
            norm.running_means[row], norm.running_vars[row] = mean, square - mean ** 2


# ------------------------------------------------------------------------------------------------------------ command line

def class_numbers(text: str, classes: int) -> dict[int, str]:
    """Numbers, or names of ImageNet's 1,000 classes, separated by commas -> {number: name}. ValueError for an unknown one."""
    names = []
    if classes == 1000:
        package = Path(importlib.util.find_spec("torchvision").origin).parent      # importing all of it takes 170 MB
        names = runpy.run_path(str(package / "models" / "_meta.py"))["_IMAGENET_CATEGORIES"]
    chosen = {}
    for word in (word.strip() for word in text.split(",")):
        if word.isdecimal() and int(word) < classes:
            chosen[int(word)] = names[int(word)] if names else f"class {int(word)}"
        elif word in names:
            chosen[names.index(word)] = word
        else:
            near = [name for name in names if word and word.lower() in name.lower()][:3]
            raise ValueError(f"class {word!r} is neither a number in 0..{classes - 1} nor a name of ImageNet"
                             f"{': did you mean ' + ', '.join(near) + '?' if near else ''}")
    return chosen


def find_weights(path: Union[str, os.PathLike]) -> Path:
    """The path of a file of weights, fetched first where it is absent and weights.txt, beside this module, has its address.

    Raises ValueError where it cannot be had, and where weights.txt lists another SHA-256 for its name; one that is not listed
    is printed.
    """
    path, table = Path(path), Path(__file__).with_name("weights.txt")
    if path.parent == Path(".") and not path.exists():      # a bare name
        path = Path(__file__).parent / "weights" / path.name
    rows = [line.split(" | ") for line in table.read_text().splitlines()] if table.exists() else []
    size, sha256, _, address, _ = next((row[1:] for row in rows if row[0] == path.name), ("", "", "", "", ""))
    size = f"{size} bytes" if size.isdigit() else size or "file (its size is not known)"
    try:
        if not path.exists() and address.startswith("https"):
            print(f"fetching {path} ({size}) from {address}")
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(address, str(path), sha256)      # checks the hash, then renames into place
        if path.exists() and not path.is_file():
            raise OSError("it is no file")                  # of a device, reading might never end
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            for chunk in iter(lambda: file.read(2 ** 20), b""):
                digest.update(chunk)
    except Exception as error:              # whatever a network, a downloader or a disk raises
        remedy = f"put the {size} of {address} there" if address.startswith("https") else "name another file"
        raise ValueError(f"{path} is missing or cannot be read ({error}): {remedy}") from None
    if not sha256:
        print(f"weights.txt has no SHA-256 of {path.name}; it is {digest.hexdigest()}")
    elif not digest.hexdigest().startswith(sha256):     # torchvision publishes the first digits only
        raise ValueError(f"{path} has SHA-256 {digest.hexdigest()}, but weights.txt lists {sha256}: remove it and fetch it again, "
                         "or, if it is your own, write its hash there")
    return path


@torch.no_grad()
def save_sheet(model: BigGAN, chosen: dict[int, str], count: int, truncation: float, seed: int, path: Path) -> None:
    """Labelled PNG, written atomically: a row a class, `count` draws each; a column's noise is the same in every row."""
    z = truncated_noise(count, model.noise, truncation, seed)
    size, left, font = model.resolution + 2, 150, ImageFont.load_default(14)
    sheet = Image.new("RGB", (left + count * size, 22 + len(chosen) * size), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((left, 2), f"truncation {truncation}, seed {seed}: one noise a column", "black", font)
    for row, (number, name) in enumerate(chosen.items()):
        draw.multiline_text((4, 22 + row * size + size // 2 - 16), f"{number}\n{name}", "black", font)
        for column in range(count):
            x = model(z[column, None], torch.tensor([number]), truncation)[0]
            if not torch.isfinite(x).all():
                raise ValueError(f"the image of class {number} is not made of finite numbers: these weights are broken")
            picture = Image.fromarray(x.add(1).mul(127.5).round().byte().permute(1, 2, 0).numpy())
            sheet.paste(picture, (left + column * size, 22 + row * size))
    partial = path.with_name(path.name + ".partial")
    try:
        sheet.save(partial, format="PNG")
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Draw images from a BigGAN-deep with released weights.")
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")
    parser.add_argument("--classes", default="0,1,2,3", help="numbers or ImageNet names, with commas (default: %(default)s)")
    parser.add_argument("--truncation", type=float, default=0.5, help="0.02, alike and typical, .. 1, varied (default: 0.5)")
    parser.add_argument("--count", type=int, default=4, help="images a class (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="sheet.png", help="PNG file to write (default: %(default)s)")
    parser.add_argument("--weights", default=str(Path(__file__).parent / "weights" / WEIGHTS), help="raw state dict of a "
                        f"BigGAN-deep of any size (default: weights/{WEIGHTS}, fetched where it is absent)")
    parser.add_argument("--threads", type=int, help="CPU threads, at most one a CPU (default: torch's choice)")
    parser.add_argument("--dry-run", action="store_true", help="a tiny network with random weights; nothing is kept")
    return parser


def main(argv: Optional[list[str]] = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        if not 1 <= args.count <= 100 or not 0 <= args.seed < 2 ** 63 or args.threads is not None and args.threads < 1:
            raise ValueError(f"--count {args.count}, --seed {args.seed}, --threads {args.threads}: possible are 1 to 100, 0 or "
                             "more, 1 or more")
        if args.threads:
            torch.set_num_threads(min(args.threads, os.cpu_count()))
        model = BigGAN([(32, 16), (16, 8)]).freeze() if args.dry_run else load(find_weights(args.weights))
        chosen = class_numbers(args.classes, model.classes)
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "sheet.png" if args.dry_run else Path(args.out)
            print(f"{len(chosen)} classes, {args.count} images of {model.resolution} x {model.resolution} pixels each, truncation "
                  f"{args.truncation}; writing {out}", flush=True)
            save_sheet(model, chosen, args.count, args.truncation, args.seed, out)
        print("dry run finished; nothing is kept" if args.dry_run else f"wrote {out}")
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
