"""Counterfactual Generative Networks (Sauer & Geiger, ICLR 2021), on MNIST variants and on ImageNet.

An image is made by independent mechanisms, each with its own noise u and its own class label y, and a fixed
composer (equation 2; appendix B):

    m = f_shape(y_1, u_1)     f = f_text(y_2, u_2)     b = f_bg(y_3, u_3)     x_gen = m * f + (1 - m) * b

Trained with one label for all three, sampled with a label for each, it draws images that no data set holds.
A classifier that learns from them reads one part and ignores the others. Two models, called alike:

    MnistCGN     small networks trained adversarially on real images, nothing pre-trained (3.1)
    ImagenetCGN  three BigGAN-deep generators, the shape's behind a U-2-Net, that take the images of a frozen
                 BigGAN apart: no real image is needed (equation 4). --mini: of ten digits, see miniature.py

    python cgn.py --dataset colored                       # train; sheets and checkpoint in runs/colored
    python cgn.py --dataset imagenet                      # the paper's run
    python cgn.py --checkpoint runs/colored/checkpoint.pt --counterfactuals 100000 --out counterfactuals.pt

Glossary (N images, C classes, Z noise dimensions, R pixels: 32 or 64, or 256 on ImageNet):
    u        noise                      (N, Z)          standard normal; on ImageNet cut at -2 and 2
    y        label or class weights     (N,) / (N, C)   long in 0..C-1 / float
    m        mask                       (N, 1, R, R)    0 background .. 1 object
    f, b     foreground, background     (N, 3, R, R)    -1 .. 1
    x, x_gen real, composite image      (N, 3, R, R)    -1 .. 1
    x_gt     the frozen BigGAN's image  (N, 3, R, R)    -1 .. 1
"""
import argparse
import contextlib
import difflib
import hashlib
import os
import shutil
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Callable, Iterator, NamedTuple, Sequence

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.vgg import make_layers

import biggan
import drawing
import evaluate
import mnist_variants
import u2net
from drawing import MECHANISMS, SHEET_TRUNCATION, class_names, to_float, training_sheet
from run import (Run, bf16_pays, check_apart, command, find_device, in_turn, is_due, join_group, one_process,
                 override, rank_and_world, read_checkpoint, refuse_options, rng, save_state)

HERE = Path(__file__).parent       # of all default paths
WEIGHTS, RUNS = HERE / "weights", HERE / "runs"


def _columns(kinds: Sequence[str], rows: dict[str, tuple]) -> dict[str, dict]:
    return {kind: {name: values[place] for name, values in rows.items()} for place, kind in enumerate(kinds)}


# Every number of every kind of run. Options override some of them, `--set name=value` overrides any. "digits"
# are all variants of MNIST, and own folders of pictures; chosen on validation splits.
PRESETS = {
    "digits": {
        "steps": 16_000,
        "batch": 64,
        "lr": 4e-4,                 # Adam's, of the generator; the discriminator's is twice that
        "noise": 0.4,               # deviation of noise on the discriminator's images; fades to 0
        "binary": 0.3,              # weight of L_binary, equation 3; rises from 0 over `warmup` steps
        "center": 10.0,             # weight of what lies off a mask's middle; falls to 0 over `warmup` steps
        "warmup": 1000,
        "mask": 10.0,               # weight of L_mask, equation 3 ..
        "interval": (0.05, 0.4),    # .. which keeps a mask's mean in here. DEVIATION: paper 0.1 .. 0.9
        "color": 10.0,              # weight of a class's mean colour in x_gen, and of borders' in b
        "margin": 2,                # outermost pixels that are background, see ShapeMechanism
        "shuffle": "shift",         # of textures' cells: authors' shift, or the paper's "puzzle"
        "recency": 4,               # samples come from an average over about the last 1/4 of the steps
        "bf16": False,              # compute in bfloat16
        "log_every": 50,
        "saves": (0, 100, 250, 500)},       # checkpoints and sheets, then at multiples of the last
    **_columns(("imagenet", "imagenet-short", "mini"), {
        # the paper (C.3)        the authors' configuration file          ten digits of 32 x 32 pixels
        "teacher": (biggan.WEIGHTS, biggan.WEIGHTS, "mini-teacher.pth"),
        "saliency": ("u2net.pth", "u2net.pth", "mini-saliency.pth"),
        "style": ("vgg16_bn-6c64b313.pth", "vgg16_bn-6c64b313.pth", "mini-style.pth"),
        "inception": ("inception_v3_google-0cc3c7bd.pth",) * 2 + ("mini-classifier.pth",),
        "steps": (300, 50, 200),                # updates; the first is the authors' command line's
        "accumulate": (4000, 2048, 50),         # images of an update
        "batch": (1, 1, 50),                    # at once, which changes no result; on a GPU as many as fit
        "lr": ((8e-6, 1e-5, 1e-5), (8e-6, 3e-5, 1e-5), (6e-7, 1e-4, 6e-5)),     # Adam's
        "truncation": (1.0, 1.0, 0.7),
        "l1": (100.0, 100.0, 100.0),            # the weights of equation 4: L_rec ..
        "perceptual": (5.0, 5.0, 0.05),         # .. a narrow network's Gram matrices are larger
        "binary": (300.0, 300.0, 300.0),        # L_shape
        "mask": (500.0, 500.0, 500.0),
        "texture": (5.0, 5.0, 0.25),            # L_text
        "background": (2000.0, 2000.0, 2000.0),     # L_bg
        "without": ((), (), ()),                # losses to leave off: shape, text, bg, rec (Table 1)
        "patch": (15, 15, 4),                   # side of L_text's patches ..
        "relative_patch": (False, False, False),    # .. by the object's size: appendix F
        "bf16": (False, False, False),
        "log_every": (1, 1, 1),
        "saves": ((0, 1, 2, 5, 10), (0, 1, 2, 5, 10), (0, 10, 25, 50)),
    })}
TERMS = ("l1", "perceptual", "binary", "mask", "texture", "background")     # of equation 4, in its order
WITHOUT = {"shape": TERMS[2:4], "text": TERMS[4:5], "bg": TERMS[5:], "rec": TERMS[:2]}      # Table 1


class Sample(NamedTuple):
    """What a CGN makes: mask (N, 1, H, W) in [0, 1]; foreground, background and image (N, 3, H, W) in [-1,
    1]; for ImageNet pre_mask (N, 3, H, W) in [-1, 1] too, the picture that the mask was found in."""
    mask: Tensor
    foreground: Tensor
    background: Tensor
    image: Tensor
    pre_mask: Tensor | None = None


# ---------- equations, losses

ENTROPY_CLAMP = 1e-4                # masks are clamped to [1e-4, 1 - 1e-4] in logarithms (authors' code)
GRAM_SCALE = 25_000.0               # a perceptual weight of 5 is 5^2 * 5e3 a layer in the authors' code
PATCHES = 6                         # L_text compares with a grid of 6 x 6 patches ..
PATCH_TOLERANCE = 0.05              # .. from where the mask's mean is that close to the best place's


def compose(m: Tensor, f: Tensor, b: Tensor) -> Tensor:
    """Equation 2, alpha blending: mask (N, 1, H, W) in [0, 1], foreground and background (N, 3, H, W) -> (N,
    3, H, W)."""
    return m * f + (1 - m) * b


def binary_entropy(m: Tensor) -> Tensor:
    """L_binary of equation 3, a scalar: the mask's mean binary entropy in bits, 0 (binary) .. 1 (all 0.5)."""
    m = m.clamp(ENTROPY_CLAMP, 1 - ENTROPY_CLAMP)
    return -(m * m.log2() + (1 - m) * (1 - m).log2()).mean()


def mask_interval(m: Tensor, low: float = 0.1, high: float = 0.9) -> Tensor:
    """L_mask of equation 3, a scalar: how far the mean of each mask lies outside [low, high] (tau = 0.1)."""
    mean = m.mean(dim=(1, 2, 3))
    return (F.relu(low - mean) + F.relu(mean - high)).mean()


def off_center(m: Tensor) -> Tensor:
    """How much of the image's area masks (N, 1, H, W) fill within 3/16 of its sides, a scalar. DEVIATION: not
    in the paper. Early in training it keeps masks from becoming frames around the object."""
    k = 3 * m.shape[2] // 16
    return (m.sum() - m[..., k:-k, k:-k].sum()) / m.numel()


def color_loss(images: Tensor, y: Tensor, target: Tensor) -> Tensor:
    """How far the mean colour of images (N, 3, H, W), with labels y (N,), is from that of real ones, `target`
    (C, 3). A scalar. DEVIATION: not in the paper.

    The squared difference of a class's means, averaged over the classes with two images or more. It is
    estimated from pairs of different images, (|sum d|^2 - sum |d|^2) / (n (n - 1)), so that colours of a
    class may differ at no cost.
    """
    d = images.mean(dim=(2, 3)) - target[y]                                 # (N, 3)
    zero, count = torch.zeros_like(target), y.bincount(minlength=len(target))       # (C, 3), (C,)
    squares = zero.index_add(0, y, d).square() - zero.index_add(0, y, d.square())
    several = count > 1
    pairs = (squares.mean(dim=1)[several] / (count * (count - 1))[several]).sum()
    return pairs / several.sum().clamp(min=1)


def mean_color(images: Tensor, labels: Tensor, classes: int, margin: int = 0) -> Tensor:
    """Mean colour (C, 3) in [-1, 1] of uint8 images (N, 3, H, W), by class; with `margin`, of so many
    outermost pixels."""
    color = images.mean(dim=(2, 3), dtype=torch.float)
    if margin:
        inner = images[..., margin:-margin, margin:-margin]
        ratio = inner[0, 0].numel() / images[0, 0].numel()
        color = (color - ratio * inner.mean(dim=(2, 3), dtype=torch.float)) / (1 - ratio)
    return torch.stack([color[labels == label].mean(dim=0) for label in range(classes)]) / 127.5 - 1


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Hinge loss, a scalar: the discriminator's scores (N,) of real images shall exceed 1, of generated ones
    fall below -1. The generator's side raises the latter's mean."""
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


def gram(h: Tensor) -> Tensor:
    """Gram matrices (N, C, C) of feature maps (N, C, H, W), divided by C H W (Johnson et al., 2016)."""
    h = _at_least_float(h).flatten(2)
    with torch.autocast(h.device.type, enabled=False):
        return h @ h.mT / h[0].numel()


def _at_least_float(x: Tensor) -> Tensor:
    """bfloat16 as float: in bfloat16 0.999 is 1, where a sigmoid has no gradient; sums lose small terms."""
    return x.to(torch.promote_types(x.dtype, torch.float))


def perceptual(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """L_perc, a scalar: the mean absolute difference of Gram matrices of feature maps (N, C, H, W), summed
    over the layers. DEVIATION: Johnson et al. square it."""
    return GRAM_SCALE * sum((gram(x) - gram(y)).abs().mean() for x, y in zip(a, b))


def relative_patch(m: Tensor, patch: int) -> Tensor:
    """Sides (N,) of patches that follow the object's size (appendix F): `patch` where the mask m (N, 1, H, W)
    fills a quarter of the image, in proportion to the root of its area; at least 1 pixel."""
    return (2 * patch * m.detach().mean(dim=(1, 2, 3)).sqrt()).round().clamp(1, min(m.shape[2:])).long()


def patch_grid(x: Tensor, m: Tensor, draws: Tensor, patch: int | Tensor = 15) -> Tensor:
    """pg of the texture loss (C.2): 6 x 6 patches of x (N, 3, H, W) from where the mask m (N, 1, H, W) is
    highest, scaled to x's size. No gradient passes.

    draws (N, 36) in [0, 1) choose among the places whose mean mask is within 0.05 of the best; patch: the
    side of all, or of each image's (N,). Raises ValueError for a patch that is no pixel or larger than x.
    """
    if isinstance(patch, Tensor):
        grids = torch.empty_like(x)
        for side in patch.unique().tolist():
            chosen = patch == side
            grids[chosen] = patch_grid(x[chosen], m[chosen], draws[chosen], side)
        return grids
    if not 1 <= patch <= min(x.shape[2:]):
        raise ValueError(f"patches of {patch} pixels from images of {x.shape[2]} x {x.shape[3]}")
    with torch.no_grad():
        score = F.avg_pool2d(m, patch, 1)                                   # (N, 1, H - patch + 1, ..)
        across = score.shape[3]
        score, order = score.flatten(1).sort(dim=1, descending=True, stable=True)
        count = (score >= score[:, :1] - PATCH_TOLERANCE).sum(dim=1, keepdim=True)
        place = order.gather(1, (draws * count).long())                     # (N, 36)
        windows = x.unfold(2, patch, 1).unfold(3, patch, 1)                 # (N, 3, .., .., patch, patch)
        image = torch.arange(len(x), device=x.device)[:, None]
        patches = windows[image, :, place // across, place % across]        # (N, 36, 3, patch, patch)
        grid = patches.unflatten(1, (PATCHES, PATCHES)).permute(0, 3, 1, 4, 2, 5)
        return F.interpolate(grid.flatten(4, 5).flatten(2, 3), x.shape[2:], mode="bilinear")


def imagenet_losses(model: "ImagenetCGN", m: Tensor, f: Tensor, b: Tensor, x_gt: Tensor, style: nn.Module,
                    draws: Tensor, *, patch: int = 15, relative: bool = False, terms: Sequence[str] = TERMS
                    ) -> Iterator[tuple[str, Tensor]]:
    """The unweighted terms of equation 4 that are asked for, by name: scalars, means over images.

    m, f, b: what the mechanisms made; x_gt (N, 3, R, R): the teacher's images for the same u and y; style:
    see StyleFeatures; draws, patch: see `patch_grid`; relative: see `relative_patch`. A term is computed when
    the one before has been used: two graphs never need memory at once. DEVIATION: patches of L_text come from
    x_gt (authors' code). From x_gen, they would smooth its textures ever more: enlarging the grid blurs it.
    """
    m, f, b = (_at_least_float(part) for part in (m, f, b))

    def style_loss(image: Tensor, target: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = style(target)
        return perceptual(style(image), wanted)

    def texture() -> Tensor:
        return style_loss(f, patch_grid(x_gt, m, draws, relative_patch(m, patch) if relative else patch))

    compute = {"l1": lambda: (compose(m, f, b) - x_gt).abs().mean(),
               "perceptual": lambda: style_loss(compose(m, f, b), x_gt),
               "binary": lambda: binary_entropy(m), "mask": lambda: mask_interval(m),
               "texture": texture, "background": lambda: model.saliency(b).mean()}
    for name in terms:
        yield name, compute[name]()


# ---------- mechanisms, models

NOISE = 32                          # dimensions of u at MNIST's scale (authors' code)
PATCH_CELLS = 2                     # the puzzle moves so many cells of a texture at once, each way


def draw_arrangement(generator: np.random.Generator, count: int, shuffle: str, side: int = 10) -> np.ndarray:
    """Where each of the side^2 cells of a texture comes from, (count, 2, side^2) ints: of foreground,
    background.

    puzzle  patches of 2 x 2 cells in random order (the paper's "shuffled sliding puzzle", section 3.1)
    shift   all cells moved cyclically by a random distance (authors' code)
    """
    grid = np.arange(side * side).reshape(side, side)
    if shuffle == "shift":
        moved = (np.arange(side) + generator.integers(side, size=(count, 2, 2))[..., None]) % side
        return grid[moved[:, :, 0, :, None], moved[:, :, 1, None, :]].reshape(count, 2, -1)
    across, cells = side // PATCH_CELLS, PATCH_CELLS
    patches = grid.reshape(across, cells, across, cells).transpose(0, 2, 1, 3).reshape(-1, cells, cells)
    order = generator.permuted(np.tile(np.arange(across * across), (count, 2, 1)), axis=2)
    puzzle = patches[order].reshape(count, 2, across, across, cells, cells)
    return puzzle.transpose(0, 1, 2, 4, 3, 5).reshape(count, 2, -1)


def normal(generator: np.random.Generator, *shape: int) -> Tensor:
    """Standard normal numbers of that shape, float."""
    return torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))


class CGN(nn.Module):
    """What all generators share: they are drawn and called alike, and the composer joins their parts.

    A subclass has `classes`, `noise` (dimensions of u), `resolution`, and the mechanisms `shape`, `texture`,
    `background`.
    """

    truncation = 1.0                # of ImageNet's noise and statistics; may be set
    compose = staticmethod(compose)
    independent = True              # whether shape and texture have labels of their own

    def draw(self, generator: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """One image's u (3, Z), labels y (3,) and arrangement (2, cells) of the textures' cells."""
        u = self.draw_noise(generator, 3)
        y = torch.from_numpy(generator.integers(self.classes, size=3))
        return u, y, self.arrange(generator, 1)[0]

    def draw_noise(self, generator: np.random.Generator, count: int) -> Tensor:
        """(count, Z)."""
        return normal(generator, count, self.noise)

    def arrange(self, generator: np.random.Generator, count: int) -> Tensor:
        """(count, 2, cells): none where nothing is rearranged."""
        return torch.empty(count, 2, 0, dtype=torch.long)

    def forward(self, u, y, arrangement: Tensor | None = None) -> Sample:
        """u (N, Z), y labels (N,) or class weights (N, C), each one tensor or a triple (shape, texture,
        background) -> Sample.

        arrangement (N, 2, cells) long; None draws one by torch's global generator. Raises ValueError for a
        label outside 0..C-1 and for noise or weights of another width.
        """
        (u_1, u_2, u_3), (y_1, y_2, y_3) = triple(u), triple(y)
        if arrangement is None:
            arrangement = self.arrange(rng(int(torch.randint(2 ** 31, ())), 0), len(u_1))
            arrangement = arrangement.to(next(self.parameters()).device)
        m, pre_mask = self.shape(u_1, y_1)
        f, b = self.texture(u_2, y_2, arrangement), self.background(u_3, y_3, arrangement)
        return Sample(m, f, b, compose(m, f, b), pre_mask)

    @torch.no_grad()
    def make(self, u: Sequence[Tensor], y: Sequence[Tensor], arrangement: Tensor, at_once: int | None = None
             ) -> Sample:
        """What the model makes of noise u (3, N, Z), labels y (3, N) or class weights (3, N, C), and
        arrangements (N, 2, cells): `at_once` pictures at a time, by default all, and one mask for neighbours
        that share its noise and label."""
        device = next(self.parameters()).device
        u, y = ([part.to(device) for part in three] for three in (u, y))
        arrangement = arrangement.to(device)
        shapes = torch.cat([u[0], y[0].reshape(len(u[0]), -1)], dim=1)
        _, inverse, counts = shapes.unique_consecutive(return_inverse=True, return_counts=True, dim=0)
        first = counts.cumsum(0) - counts

        def made(mechanism: Callable, *inputs: Tensor) -> list:
            return [mechanism(*chunk) for chunk in zip(*(x.split(at_once or len(x)) for x in inputs))]

        masks, pre_masks = zip(*made(self.shape, u[0][first], y[0][first]))
        m = torch.cat(masks)[inverse]
        pre_mask = torch.cat(pre_masks)[inverse] if pre_masks[0] is not None else None
        f, b = (torch.cat(made(mechanism, u_k, y_k, arrangement))
                for mechanism, u_k, y_k in ((self.texture, u[1], y[1]), (self.background, u[2], y[2])))
        return Sample(m, f, b, compose(m, f, b), pre_mask)


def triple(x) -> tuple:
    """x three times, or the three it is. Raises ValueError for a tuple or list of another length."""
    if not isinstance(x, (tuple, list)):
        return x, x, x
    if len(x) != 3:
        raise ValueError(f"{len(x)} given: one tensor, or one each for shape, texture and background")
    return tuple(x)


class Up(nn.Module):
    """Twice the size: (N, i, n, n) -> (N, o, 2n, 2n), or (N, o, 2n - 2, 2n - 2) without padding.

    Nearest-neighbour upsampling and a 3 x 3 convolution, as one transposed convolution in half the time.
    """

    def __init__(self, i: int, o: int, padding: int):
        super().__init__()
        self.weight = nn.Conv2d(i, o, 3, bias=False).weight
        self.padding = padding
        self.rest = nn.Sequential(nn.BatchNorm2d(o), nn.ReLU(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        kernel = biggan.doubling_kernel(self.weight)
        return self.rest(F.conv_transpose2d(x, kernel, stride=2, padding=2 - self.padding))


def upward(channels: Sequence[int], padding: int) -> nn.Sequential:
    """Batch norm, ReLU, and twice the size for each further number of channels."""
    return nn.Sequential(nn.BatchNorm2d(channels[0]), nn.ReLU(inplace=True),
                         *(Up(i, o, padding) for i, o in zip(channels, channels[1:])))


class Start(nn.Module):
    """u (N, Z) and y, labels (N,) or class weights (N, C) -> feature maps (N, channels, side, side)."""

    def __init__(self, classes: int, channels: int, side: int):
        super().__init__()
        self.embedding = nn.Linear(classes, 10, bias=False)         # of class weights, which can be blended
        nn.init.normal_(self.embedding.weight)
        self.linear = nn.Linear(NOISE + 10, channels * side * side, bias=False)
        self.side = side

    def forward(self, u: Tensor, y: Tensor) -> Tensor:
        y = class_weights(y, self.embedding.in_features)
        if u.ndim != 2 or u.shape[1] != NOISE or len(u) != len(y):
            raise ValueError(f"noise of shape {tuple(u.shape)}: expected ({len(y)}, {NOISE})")
        h = self.linear(torch.cat([u, self.embedding(y)], dim=1))           # (N, channels * side^2)
        h = h.unflatten(1, (-1, self.side, self.side))                      # (N, channels, side, side)
        return h.contiguous(memory_format=torch.channels_last)


def class_weights(y: Tensor, classes: int) -> Tensor:
    """Labels (N,) long -> one-hot class weights (N, C) float; class weights pass. ValueError for what is
    neither, and for a label out of range (on a GPU, where looking would wait for it, torch's own error)."""
    if not isinstance(y, Tensor) or y.is_complex() or y.dtype == torch.bool or (
            y.shape[1:] != ((classes,) if y.is_floating_point() else ()) or not y.ndim):
        raise ValueError(f"labels {y!r:.99}: expected a tensor (N,) long, or class weights (N, {classes})")
    if y.is_floating_point():
        return y
    if y.device.type == "cpu" and len(y) and not 0 <= int(y.min()) <= int(y.max()) < classes:
        raise ValueError(f"class {int(y.min()) if y.min() < 0 else int(y.max())} is not in 0..{classes - 1}")
    return torch.zeros(len(y), classes, device=y.device).scatter_(1, y.long()[:, None], 1.0)


class ShapeMechanism(nn.Module):
    """f_shape: u (N, Z), y -> mask (N, 1, R, R) in [0, 1], R = 32 or 64.

    The outermost `margin` pixels are 0: only the background is seen there. Without this, the `color_loss` of
    b and `off_center`, foreground and background swap roles for some classes. DEVIATION: not in the paper.
    """

    def __init__(self, classes: int, margin: int, size: int):
        super().__init__()
        channels = [192 >> doubled for doubled in range((size // 4).bit_length())]     # 192, 96, 48, 24
        self.start = Start(classes, channels[0], 4)
        self.body = upward(channels, 1)
        self.out = nn.Conv2d(channels[-1], 1, 3, padding=1)
        interior = F.pad(torch.ones(1, 1, size - 2 * margin, size - 2 * margin), (margin,) * 4)
        self.register_buffer("interior", interior, persistent=False)

    def forward(self, u: Tensor, y: Tensor) -> Tensor:
        h = self.body(self.start(u, y))                                     # (N, C, R, R)
        return torch.sigmoid(_at_least_float(self.out(h))) * self.interior  # (N, 1, R, R) in [0, 1]


class TextureMechanism(nn.Module):
    """f_text (and f_bg, its twin): u (N, Z), y, arrangement (N, cells) long -> (N, 3, R, R) in [-1, 1].

    10 x 10 cells (of 64 pixels 18 x 18) are made, rearranged at random, and decoded without padding: no place
    differs from another, and a shape larger than a patch cannot be learned, since the next draw would break
    it. DEVIATION: the paper rearranges just before the output layer. Here convolutions follow, which close
    the seams.
    """

    def __init__(self, classes: int, size: int):
        super().__init__()
        self.start = Start(classes, 64, size // 4 + 2)
        self.body = upward((64, 32, 16), 0)
        self.out = nn.Conv2d(16, 3, 3)

    def forward(self, u: Tensor, y: Tensor, arrangement: Tensor) -> Tensor:
        h = self.start(u, y)
        cells = h.flatten(2)                                                # (N, 64, cells)
        h = cells.gather(2, arrangement[:, None].expand_as(cells)).view_as(h)
        h = self.body(h.contiguous(memory_format=torch.channels_last))      # (N, 16, R + 2, R + 2)
        return torch.tanh(_at_least_float(self.out(h)))                     # (N, 3, R, R)


class MnistCGN(CGN):
    """Three small mechanisms (appendix B, MNISTs): the background is a second texture mechanism."""

    def __init__(self, classes: int = 10, margin: int = 2, shuffle: str = "shift", size: int = 32):
        super().__init__()
        self.classes, self.noise, self.resolution, self.shuffle = classes, NOISE, size, shuffle
        self.f_shape = ShapeMechanism(classes, margin, size)
        self.f_text, self.f_bg = TextureMechanism(classes, size), TextureMechanism(classes, size)

    def arrange(self, generator: np.random.Generator, count: int) -> Tensor:
        return torch.from_numpy(draw_arrangement(generator, count, self.shuffle, self.resolution // 4 + 2))

    def shape(self, u: Tensor, y: Tensor) -> tuple[Tensor, None]:
        return self.f_shape(u, y), None

    def texture(self, u: Tensor, y: Tensor, arrangement: Tensor) -> Tensor:
        return self.f_text(u, y, arrangement[:, 0])

    def background(self, u: Tensor, y: Tensor, arrangement: Tensor) -> Tensor:
        return self.f_bg(u, y, arrangement[:, 1])


class MnistGAN(MnistCGN):
    """A conditional GAN, the baseline of Table 2: one network makes the whole image, which counts as
    foreground. It is drawn and called like a CGN, and of three u and y uses the first."""

    independent = False

    def __init__(self, classes: int = 10, size: int = 32):
        CGN.__init__(self)
        self.classes, self.noise, self.resolution, self.shuffle = classes, NOISE, size, "shift"
        self.start = Start(classes, 192, 4)
        self.body = upward((192, 96, 48, 48, 48)[:(size // 4).bit_length()], 1)
        self.out = nn.Conv2d(48, 3, 3, padding=1)

    def draw(self, generator: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
        u, y, arrangement = super().draw(generator)
        return u[:1].expand(3, -1), y[:1].expand(3), arrangement

    def forward(self, u, y, arrangement: Tensor | None = None) -> Sample:
        x = self.texture(triple(u)[0], triple(y)[0], arrangement)
        return Sample(torch.ones_like(x[:, :1]), x, torch.zeros_like(x), x)

    def shape(self, u: Tensor, y: Tensor) -> tuple[Tensor, None]:
        return u.new_ones(len(u), 1, self.resolution, self.resolution), None

    def texture(self, u: Tensor, y: Tensor, arrangement: Tensor) -> Tensor:
        return torch.tanh(_at_least_float(self.out(self.body(self.start(u, y)))))

    def background(self, u: Tensor, y: Tensor, arrangement: Tensor) -> Tensor:
        return u.new_zeros(len(u), 3, self.resolution, self.resolution)


class Discriminator(nn.Module):
    """Real or generated, given the class: x (N, channels, R, R) in [-1, 1], y (N,) long -> scores (N,).

    Spectral norm (Miyato et al., 2018) and class projection (Miyato & Koyama, 2018).
    """

    def __init__(self, classes: int = 10, channels: int = 3, size: int = 32):
        super().__init__()
        widths, layers = (channels, 48, 96, 192, 192)[:(size // 4).bit_length()], []
        for i, o in zip(widths, widths[1:]):
            layers += [spectral_norm(nn.Conv2d(i, o, 4, stride=2, padding=1)), nn.LeakyReLU(0.2)]
        layers += [nn.Flatten(), spectral_norm(nn.Linear(192 * 16, 256)), nn.LeakyReLU(0.2)]
        self.body = nn.Sequential(*layers)
        self.score = spectral_norm(nn.Linear(256, 1))
        self.embedding = spectral_norm(nn.Embedding(classes, 256))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.body(x)                                                    # (N, 256)
        return self.score(h)[:, 0] + (self.embedding(y) * h).sum(dim=1)     # (N,)


class ImagenetCGN(CGN):
    """Figure 2: three BigGAN-deep generators, of any size; what the frozen U-2-Net finds salient in the first
    one's picture is the mask.

    raw: feed U-2-Net [-1, 1], as the authors do. Channels last make U-2-Net faster on a CPU, and the
    generators larger.
    """

    def __init__(self, f_shape: biggan.BigGAN, f_text: biggan.BigGAN, f_bg: biggan.BigGAN,
                 saliency: u2net.U2Net, raw: bool = False):
        super().__init__()
        self.classes, self.noise, self.resolution = f_shape.classes, f_shape.noise, f_shape.resolution
        self.f_shape, self.f_text, self.f_bg, self.raw = f_shape, f_text, f_bg, raw
        self.u2net = saliency.to(memory_format=torch.channels_last)

    def draw_noise(self, generator: np.random.Generator, count: int) -> Tensor:
        seed = int(generator.integers(2 ** 63))
        return biggan.truncated_noise(count, self.noise, self.truncation, seed)

    def shape(self, u: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        pre_mask = self.f_shape(u, y, self.truncation)
        return self.saliency(pre_mask), pre_mask

    def texture(self, u: Tensor, y: Tensor, arrangement=None) -> Tensor:
        return self.f_text(u, y, self.truncation)

    def background(self, u: Tensor, y: Tensor, arrangement=None) -> Tensor:
        return self.f_bg(u, y, self.truncation)

    def saliency(self, x: Tensor) -> Tensor:
        """How salient each pixel of x (N, 3, H, W) in [-1, 1] is, (N, 1, H, W) in [0, 1].

        DEVIATION: the authors feed [-1, 1]; U-2-Net was trained on ImageNet's mean and deviation.
        """
        return self.u2net(x if self.raw else u2net.normalise((x + 1) / 2))


STYLE_CONVS = (2, 2, 3, 3)          # convolutions of VGG16 before each of its first four max-pools


class StyleFeatures(nn.ModuleList):
    """VGG16 up to its fourth max-pool, frozen: x (N, 3, H, W) in [-1, 1] -> feature maps after each of them.

    Built from torchvision's state dict of vgg16_bn, or of a narrower one, its batch norms folded into the
    convolutions; other entries are left aside. Raises ValueError where the dict does not fit.
    """

    def __init__(self, state: dict):
        super().__init__()
        layout, number = [], 0
        try:
            for count in STYLE_CONVS:
                layout += [len(state[f"features.{number + 3 * k}.weight"]) for k in range(count)] + ["M"]
                number += 3 * count + 1
            plain = make_layers(layout, batch_norm=True).eval()
            plain.load_state_dict({key: state[f"features.{key}"] for key in plain.state_dict()
                                   if not key.endswith("num_batches_tracked")})
        except (KeyError, RuntimeError, TypeError) as error:
            raise ValueError(f"this is no state dict of vgg16_bn: {str(error).splitlines()[0]}") from None
        layers = iter(plain)
        for count in STYLE_CONVS:
            stage = nn.Sequential()
            for _ in range(count):
                stage.append(fuse_conv_bn_eval(next(layers), next(layers))).append(next(layers))
            self.append(stage.append(next(layers)))
        self.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> list[Tensor]:
        h, features = u2net.normalise((x + 1) / 2), []
        for stage in self:
            h = stage(h)
            features.append(h)
        return features


# ---------- training on MNIST variants

def build(config: dict) -> CGN:
    """The untrained generator that a digits run's configuration names."""
    classes, size = len(config["names"]), config["size"]
    if config["model"] == "gan":
        return MnistGAN(classes, size)
    return MnistCGN(classes, config["margin"], config["shuffle"], size)


def train(config: dict, images: Tensor, labels: Tensor, out: Path, device: str = "cpu") -> None:
    """Train a CGN (or the GAN baseline) adversarially on images (N, 3, R, R) uint8 with labels (N,) long.

    Writes log.jsonl, checkpoint.pt and labelled sheets into `out`, or continues what lies there: step i draws
    from rng(seed, i), so this is the uninterrupted run, bit for bit on the CPU. Raises ValueError as `Run`.
    """
    batch, parts = config["batch"], adversaries(config, device)
    model, average, discriminator, optimizer_g, optimizer_d, *schedules = parts.values()
    color = mean_color(images, labels, model.classes).to(device)
    border = mean_color(images, labels, model.classes, config["margin"]).to(device)
    autocast = partial(torch.autocast, torch.device(device).type, torch.bfloat16, enabled=config["bf16"])
    sheet = partial(training_sheet, average, config, out, None)

    free = ("dataset", "textures", "variance", "log_every", "saves")        # they change no result
    with Run(out, config, parts, free=free, sheet=sheet, images=batch) as run:
        for step in run:
            generator = rng(config["seed"], step)
            chosen = torch.from_numpy(generator.integers(len(images), size=batch))
            u = normal(generator, 3, batch, model.noise).to(device)
            arrangement = model.arrange(generator, batch).to(device)
            x, y = to_float(images[chosen].to(device)), labels[chosen].to(device)
            # Instance noise (Sonderby et al., 2017): at first the discriminator is too good to teach. It
            # averages over pixels: of four times as many, twice the noise has the same effect.
            noise = normal(generator, 2 * batch, *x.shape[1:]).to(device)
            noise *= config["noise"] * config["size"] / mnist_variants.SIZE * (1 - step / config["steps"])

            # Discriminator: raise the score of real images, lower that of generated ones.
            with autocast():
                sample = model(tuple(u), y, arrangement)
                scores = discriminator(torch.cat([x, sample.image.detach()]) + noise, torch.cat([y, y]))
            real, fake = scores.float().split(batch)
            loss = discriminator_loss(real, fake)
            optimizer_d.zero_grad()
            loss.backward()
            optimizer_d.step()

            # Generator: raise the score of generated images; the mask binary, neither empty nor full.
            discriminator.requires_grad_(False)
            with autocast():
                scores = discriminator(sample.image + noise[batch:], y)
            losses = {"adversarial": -scores.float().mean()}
            if model.independent:
                losses.update(part_losses(config, sample, y, step, color, border))
            optimizer_g.zero_grad()
            sum(losses.values()).backward()
            # One check for both, since it waits for the device: nothing of this step is saved yet.
            shown = {"discriminator": loss, "real": real.mean(), "fake": fake.mean(), **losses}
            shown["mask_mean"] = sample.mask.mean()
            run.check(shown, [*discriminator.parameters(), *model.parameters()])
            optimizer_g.step()
            discriminator.requires_grad_(True)
            for schedule in schedules:
                schedule.step()
            update_average(average, model, (step + 1) / (step + 1 + config["recency"]))
            if model.independent and is_due(step + 1, config["saves"]):
                run.row.update(variety(average, config["seed"]))


def adversaries(config: dict, device: str) -> dict:
    """The `learners` of a digits run."""
    torch.manual_seed(config["seed"])
    model, discriminator, average = (network.to(device, memory_format=torch.channels_last) for network in (
        build(config), Discriminator(len(config["names"]), size=config["size"]), build(config).eval()))
    average.load_state_dict(model.state_dict())
    return learners(model, average, discriminator, config["lr"], config["steps"])


def learners(model: nn.Module, average: nn.Module, discriminator: nn.Module, lr: float, steps: int
             ) -> dict[str, object]:
    """What an adversarial `Run` holds: the three, Adam for model and discriminator, whose rate is twice the
    model's, and how both fall to 0 in the second half."""
    optimizers = [torch.optim.Adam(network.parameters(), lr=rate, betas=(0.5, 0.99), fused=True)
                  for network, rate in ((model, lr), (discriminator, 2 * lr))]
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, 2 * (1 - step / steps)))
                 for optimizer in optimizers]
    return {"model": model, "average": average, "discriminator": discriminator, "optimizer0": optimizers[0],
            "optimizer1": optimizers[1], "schedule0": schedules[0], "schedule1": schedules[1]}


def part_losses(config: dict, sample: Sample, y: Tensor, step: int, color: Tensor,
                border: Tensor) -> dict[str, Tensor]:
    """The weighted terms beside the adversarial one: equation 3's, the mean colours of x_gen and b, and early
    in training what lies off the mask's middle."""
    m, warm = sample.mask, min(1, step / config["warmup"])
    losses = {"binary": config["binary"] * warm * binary_entropy(m),
              "mask": config["mask"] * mask_interval(m, *config["interval"]),
              "color": config["color"] * color_loss(sample.image, y, color)}
    if config["margin"]:
        losses["border"] = config["color"] * color_loss(sample.background, y, border)
        losses["center"] = config["center"] * (1 - warm) * off_center(m)
    return losses


@torch.no_grad()
def variety(model: CGN, seed: int, count: int = 50) -> dict[str, float]:
    """How much `count` masks of a class overlap, 1 for masks that are all alike, and their entropy in bits:
    means over the first ten classes."""
    y = torch.arange(min(model.classes, 10)).repeat_interleave(count)
    u, device = normal(rng(seed, 0), len(y), model.noise), next(model.parameters()).device
    masks = model.shape(u.to(device), y.to(device))[0]                      # (10 * count, 1, R, R)
    ious = [evaluate.pairwise_iou(of_class) for of_class in masks.split(count)]
    return {"pairwise_iou": sum(ious) / len(ious), "entropy": binary_entropy(masks).item()}


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Polynomial-decay averaging (Shamir & Zhang, 2013) of weights and statistics, in place."""
    for old, new in zip(average.state_dict().values(), model.state_dict().values()):
        if old.is_floating_point():
            old.lerp_(new, 1 - decay)


# ---------- training on ImageNet

def draw_training(model: ImagenetCGN, seed: int, indices: range) -> tuple[Tensor, Tensor, Tensor]:
    """Noise u (N, Z), labels y (N,) and patch draws (N, 36) of training images, image i's by rng(seed, i)."""
    u, y, draws = [], [], []
    for index in indices:
        generator = rng(seed, index)
        u.append(model.draw_noise(generator, 1))
        y.append(int(generator.integers(model.classes)))
        draws.append(generator.random(PATCHES ** 2, dtype=np.float32))
    return torch.cat(u), torch.tensor(y), torch.from_numpy(np.stack(draws))


def micro_step(model: ImagenetCGN, teacher: biggan.BigGAN, style: StyleFeatures, u: Tensor, y: Tensor,
               draws: Tensor, config: dict, fraction: float = 1.0) -> dict[str, Tensor]:
    """Adds `fraction` times the gradient of equation 4's sum for a few images, drawn by `draw_training`, to
    what the mechanisms hold; returns `fraction` times each term and the mean mask, by name. config: see
    PRESETS."""
    terms = [name for name in TERMS if not any(name in WITHOUT[part] for part in config["without"])]
    found = {}
    with torch.autocast(u.device.type, torch.bfloat16, enabled=config["bf16"]):
        with torch.no_grad():
            x_gt = teacher(u, y, model.truncation)
        sample = model(u, y)
        leaves = [made.detach().requires_grad_() for made in sample[:3]]    # the losses' graphs end here
        for name, loss in imagenet_losses(model, *leaves, x_gt, style, draws, patch=config["patch"],
                                          relative=config["relative_patch"], terms=terms):
            (fraction * config[name] * loss).backward()
            found[name] = fraction * loss.detach()
    reached = [(made, leaf.grad) for made, leaf in zip(sample, leaves) if leaf.grad is not None]
    torch.autograd.backward(*zip(*reached))
    return {**found, "mask_mean": fraction * leaves[0].detach().mean()}


def train_imagenet(config: dict, model: ImagenetCGN, teacher: biggan.BigGAN, style: StyleFeatures, out: Path,
                   device: str = "cpu") -> None:
    """Train `model` to take the frozen teacher's images apart (section 3, C.3), no real image needed.

    An update's gradient is the mean over `accumulate` images, `batch` at a time, spread over the processes of
    a group if there is one; spectral norms take one power iteration an update: the result does not depend on
    how it is cut. Files as `train` has them, no frozen network in the checkpoint. Raises ValueError as `Run`.
    """
    rank, ranks = rank_and_world()
    if config["accumulate"] % ranks:
        raise ValueError(f"{config['accumulate']} images an update cannot be spread over {ranks} processes")
    share, model.truncation = config["accumulate"] // ranks, config["truncation"]
    mechanisms = {"f_shape": model.f_shape, "f_text": model.f_text, "f_bg": model.f_bg}
    optimizer = torch.optim.Adam([{"params": list(mechanism.parameters()), "lr": lr}
                                  for mechanism, lr in zip(mechanisms.values(), config["lr"])])

    def learn(part: range) -> dict[str, Tensor]:
        drawn = (tensor.to(device) for tensor in draw_training(model, config["seed"], part))
        return micro_step(model, teacher, style, *drawn, config, len(part) / share)

    sheet = partial(training_sheet, model, config, out, teacher)
    free = ("batch", "steps", "log_every", "saves", *NETWORKS)
    with Run(out, config, {**mechanisms, "optimizer": optimizer}, free=free, sheet=sheet,
             images=config["accumulate"]) as run:
        batch = config["batch"] or images_at_once(learn, model, share, run)
        for step in run:
            for mechanism in mechanisms.values():
                mechanism.power_iteration()
            begin, means = step * config["accumulate"] + rank * share, {}
            with norms_held(model):
                for start in range(begin, begin + share, batch):
                    for name, mean in learn(range(start, min(start + batch, begin + share))).items():
                        means[name] = means.get(name, 0) + mean
                    if start + batch < begin + share:
                        run.tell(step + (start + batch - begin) / share)
            run.check(means, model.parameters())
            optimizer.step()
            optimizer.zero_grad()
            if rank == 0 and not 0.1 <= run.row["mask_mean"] <= 0.9:
                print(f"masks collapse, their mean is {run.row['mask_mean']:.3f} (appendix G: 0.1 .. 0.9)")


@contextlib.contextmanager
def norms_held(model: ImagenetCGN):
    """Divide by the spectral norms of all mechanisms once, for many micro-steps; see `biggan.BigGAN.held`."""
    with model.f_shape.held(), model.f_text.held(), model.f_bg.held():
        yield


def images_at_once(learn: Callable, model: ImagenetCGN, share: int, run: Run) -> int:
    """How many images a GPU's memory holds at once, a divisor of `share`, by what one and what two of them
    take. The progress line then shows the share of the GPU's rate of bfloat16 matrix products."""
    peaks = []
    for count in (1, 2):
        torch.cuda.reset_peak_memory_stats()
        with norms_held(model), FlopCounterMode(display=False) as flops:
            learn(range(count))
        model.zero_grad()
        peaks.append(torch.cuda.max_memory_allocated())
    operations, rate = flops.get_total_flops() / 2, matrix_rate("cuda")
    run.note = lambda images: f", {100 * images * operations / rate:.1f} % of {rate / 1e12:.0f} TFLOP/s"
    adam = 4 * sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    memory = torch.cuda.get_device_properties(next(model.parameters()).device).total_memory
    room = 0.92 * memory - peaks[0] - adam
    fit = max(1, int(1 + room / max(1, peaks[1] - peaks[0])))
    return max(count for count in range(1, min(fit, share) + 1) if share % count == 0)


def matrix_rate(device: str, dtype: torch.dtype = torch.bfloat16, side: int = 8192) -> float:
    """Operations a second of a matrix product, the best of five."""
    a, seconds = torch.randn(side, side, device=device).to(dtype), []
    for _ in range(5):
        started = time.perf_counter()
        (a @ a)[0, 0].item()                                                # waits for it
        seconds.append(time.perf_counter() - started)
    return 2 * side ** 3 / min(seconds)


# ---------- sampling

def load(source: str | os.PathLike, saliency: str | os.PathLike | None = None) -> CGN:
    """The generator of a checkpoint (of digits' the averaged one), or of the authors' cgn.pth, frozen, in
    eval mode. It has `.config`, the run's, `.step`, `.truncation` of its noise, and the file's `.sha256`.

    saliency: the file of U-2-Net, if it is not the one that the checkpoint names. The authors' was trained
    with U-2-Net fed [-1, 1] and align_corners=True: so it is run. Raises ValueError for a file that is none.
    """
    state = read_checkpoint(source, other=True)
    if any(str(key).startswith(("f_shape.", "module.f_shape.")) for key in state):      # the authors', flat
        parts = {"config": {"model": "imagenet", "authors": True}, "step": 0}
        for key, value in state.items():
            part, key = key.removeprefix("module.").split(".", 1)
            parts.setdefault(part, {})[key] = value
        state = parts
    try:
        config = state["config"]
        if config["model"] == "imagenet":
            authors = config.get("authors", False)
            network = state["u2net"] if "u2net" in state else find_network(saliency or config["saliency"])
            model = ImagenetCGN(*(biggan.load(dict(state[name])) for name in ("f_shape", "f_text", "f_bg")),
                                u2net.load(network, align_corners=authors), raw=authors)
        else:
            model = build(config).to(memory_format=torch.channels_last)
            model.load_state_dict(state["average"])
        model.step, model.truncation = state["step"], config.get("truncation", 1.0)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{source} is no checkpoint of a CGN ({str(error).splitlines()[0]})") from None
    model.config, model.sha256 = config, file_hash(source)
    return model.eval().requires_grad_(False)


def save_generator(checkpoint: str | os.PathLike, out: Path) -> None:
    """What `load` needs of a run's checkpoint, in half precision: a small file to ship."""
    state = read_checkpoint(checkpoint)
    halves = {name: {key: value.half() if value.is_floating_point() else value
                     for key, value in state[name].items()}
              for name in ("average", "f_shape", "f_text", "f_bg") if name in state}
    save_state(out, {"config": state["config"], "step": state["step"], **halves})


def file_hash(path: str | os.PathLike) -> str:
    return hashlib.sha256(np.memmap(path, mode="r")).hexdigest()


# ---------- command line

NETWORKS = ("teacher", "saliency", "style", "inception")
# What each kind of command understands; any other option is refused.
EVERY = {"out", "seed", "device", "threads", "bf16"}
TRAINING = EVERY | {"dataset", "steps", "batch", "set", "dry_run"}
DIGITS = TRAINING | {"model", "margin", "interval"}
VARIANTS = {"colored": {"mnist", "variance"}, "double-colored": {"mnist", "variance"},
            "wildlife": {"mnist", "textures"}}
FOLDER = {"size"}
IMAGENET = TRAINING | {"mini", "short", "without", "truncation"}
SAMPLING = EVERY | {"checkpoint", "truncation"}
DRAWINGS = {"counterfactuals": {"per_shape", "parts", "batch"}, "interpolate": {"classes"}, "triples": set(),
            "outputs": set(), "photo": {"texture", "background"}}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Train a CGN and draw counterfactual images.")
    run = parser.add_argument_group("run")
    run.add_argument("--dataset", help="colored (default), double-colored, wildlife, imagenet, or a folder "
                     "with one subfolder a class")
    run.add_argument("--out", help="folder of the run, continued if it is there, or file to write")
    run.add_argument("--seed", type=int, help="default: 0")
    run.add_argument("--device", help="default: a GPU where there is one")
    run.add_argument("--threads", type=int, help="CPU threads, at most one a CPU")
    run.add_argument("--bf16", action="store_true", help="bfloat16: faster on a CPU that has it; ImageNet's "
                     "default on a GPU")
    run.add_argument("--set", nargs="+", metavar="NAME=VALUE", help="any other number of PRESETS: noise=0.2")
    run.add_argument("--dry-run", action="store_true", help="two steps; ImageNet's with tiny random networks")
    training = parser.add_argument_group("training (section 3.1, appendix C)")
    training.add_argument("--steps", type=int, help="training steps; ImageNet's are updates")
    training.add_argument("--batch", type=int, help="images at once")
    training.add_argument("--model", choices=("cgn", "gan"), help="gan: the baseline without mechanisms")
    training.add_argument("--textures", help="wildlife: folder of DTD (default: textures drawn here)")
    training.add_argument("--variance", type=float, help="colored, double-colored: of colours within a class "
                          f"(default: {mnist_variants.COLOR_VARIANCE}; authors' double-colored: 0.0001)")
    training.add_argument("--mnist", help="folder of MNIST's four .gz files (default: data/mnist)")
    training.add_argument("--size", type=int, choices=(32, 64), help="pixels of a side, of own folders")
    training.add_argument("--margin", type=int, help="outermost pixels that are background by construction")
    training.add_argument("--interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help="of a mask's mean")
    imagenet = parser.add_argument_group("ImageNet (section 3, C.3)")
    scale = imagenet.add_mutually_exclusive_group()
    scale.add_argument("--mini", action="store_true", help="the same on ten digits, in minutes")
    scale.add_argument("--short", action="store_true", help="the authors' configuration file")
    imagenet.add_argument("--without", nargs="+", choices=[*WITHOUT], help="losses to leave off (Table 1)")
    imagenet.add_argument("--truncation", type=float, help="of the noise (default: as in training, of sheets "
                          f"{SHEET_TRUNCATION})")
    sampling = parser.add_argument_group("sampling from a trained checkpoint (section 3.2)")
    sampling.add_argument("--checkpoint", help="of a run, or the authors' cgn.pth; alone, it draws a sheet")
    sampling.add_argument("--counterfactuals", type=int, metavar="N", help="write N images with a label for "
                          "each mechanism: tensors where --out ends in .pt, else pictures in a folder")
    sampling.add_argument("--per-shape", type=int, help="counterfactuals that share a shape (default: 1)")
    sampling.add_argument("--parts", nargs="+", choices=Sample._fields[:3], help="to write beside pictures")
    sampling.add_argument("--interpolate", choices=(*MECHANISMS, "all"), help="write a sheet of it")
    sampling.add_argument("--classes", nargs=2, metavar=("FROM", "TO"), help="of --interpolate")
    sampling.add_argument("--triples", nargs="+", metavar="SHAPE,TEXTURE,BACKGROUND", help="write a sheet of "
                          "them, numbers or names: 9,949,983; or of Figure 24: figure24")
    sampling.add_argument("--outputs", metavar="CLASS", help="write a sheet of what each mechanism makes")
    sampling.add_argument("--photo", metavar="PATH", help="a photo to change, or a folder with a "
                          "subfolder a class")
    sampling.add_argument("--texture", metavar="CLASS", help="its object's, or any (default: its own)")
    sampling.add_argument("--background", metavar="CLASS", help="its background, or any (default: its own)")
    return parser


def main(argv: list[str] | None = None) -> None:
    command(build_parser(), _main, argv)


def _main(args: argparse.Namespace) -> None:
    drawings = [name for name in DRAWINGS if getattr(args, name) is not None]
    if args.checkpoint:
        return _sample(args, drawings)
    if drawings:
        raise ValueError(f"--{drawings[0]} draws from a trained CGN: name its --checkpoint")
    dataset = args.dataset or "colored"
    imagenet = dataset == "imagenet"
    known = IMAGENET if imagenet else DIGITS | VARIANTS.get(dataset, FOLDER)
    known = known - {"margin", "interval"} if args.model == "gan" else known
    refuse_options(args, known, f"--dataset {dataset}")
    name = Path(os.path.abspath(dataset)).name                              # of a link its own
    name = "mini" if args.mini else "imagenet-short" if args.short else name
    out = Path(args.out or RUNS / (name + ("-gan" if args.model == "gan" else "")))
    with tempfile.TemporaryDirectory() as folder:
        (_imagenet if imagenet else _digits)(args, name if imagenet else dataset,
                                             Path(folder) / "run" if args.dry_run else out)
    if args.dry_run:
        print("dry run finished; nothing is kept")
    elif rank_and_world()[0] == 0:
        print(f"done: open the last sheet in {out}; next: python cgn.py --checkpoint {out / 'checkpoint.pt'} "
              "--counterfactuals 1000 --out counterfactuals")


def configure(args: argparse.Namespace, kind: str, **more) -> dict:
    """The configuration of a run: its preset and what the options override. Raises ValueError for what cannot
    be."""
    config = {**PRESETS[kind]}
    override(config, args.set)
    config.update(more, seed=args.seed or 0)
    for name in config.keys() & {"steps", "batch", "margin", "interval", "without", "truncation"}:
        value = getattr(args, name)
        if value is not None:
            config[name] = tuple(value) if isinstance(value, list) else value
    for name in ("steps", "batch", "accumulate", "warmup", "recency", "log_every"):
        if config.get(name, 1) < 1:
            raise ValueError(f"--{name} {config[name]}: must be at least 1")
    if not 0 <= config.get("margin", 0) < config.get("size", 32) // 2:
        raise ValueError(f"--margin {config['margin']}: must be in 0..{config['size'] // 2 - 1}")
    low, high = config.get("interval", (0, 1))
    if not 0 <= low < high <= 1:
        raise ValueError(f"--interval {low} {high}: two numbers in 0..1 are needed, the lower one first")
    rate, rates = PRESETS[kind]["lr"], config["lr"]
    if np.shape(rates) != np.shape(rate) or not (np.asarray(rates) > 0).all():
        raise ValueError(f"--set lr={rates}: must be more than 0, and as many as {rate}")
    if config.get("shuffle", "shift") not in ("shift", "puzzle"):
        raise ValueError(f"--set shuffle={config['shuffle']}: shift or puzzle")
    if not config["saves"] or config["saves"][-1] < 1:
        raise ValueError(f"--set saves={config['saves']}: the last must be at least 1")
    if not {*config.get("without", ())} < WITHOUT.keys():
        raise ValueError(f"--without {' '.join(config['without'])}: some of {', '.join(WITHOUT)}, not all")
    return {**config, "steps": 2} if args.dry_run else config


def load_images(dataset: str, args: argparse.Namespace) -> tuple[Tensor, Tensor, list[str]]:
    """Training images (N, 3, R, R) uint8, labels (N,) long and class names of a variant or of a labelled
    folder."""
    if dataset in mnist_variants.NAMES:
        more = {"variance": args.variance, "root": args.mnist}
        data = mnist_variants.load(dataset, "train", seed=args.seed or 0, textures=args.textures,
                                   **{name: value for name, value in more.items() if value is not None})
        return data.images, data.shape, [f"digit {digit}" for digit in range(10)]
    if not Path(dataset).is_dir():
        known = (*mnist_variants.NAMES, "imagenet")
        near = difflib.get_close_matches(dataset, known, 1)
        raise ValueError(f"--dataset {dataset!r} is neither {', '.join(known)} nor a folder of subfolders, a "
                         "class each" + (f": did you mean {near[0]}?" if near else ""))
    print(f"reading the pictures of {dataset}", flush=True)
    return mnist_variants.load_folder(dataset, args.size or mnist_variants.SIZE)


def announce(config: dict, what: str, device: str, out: Path) -> None:
    if rank_and_world()[0] == 0:
        print(f"{config['model']} on {config['dataset']}: {what}, seed {config['seed']}; {device}, torch "
              f"{torch.__version__}, {torch.get_num_threads()} threads; writing to {out}", flush=True)


def _digits(args: argparse.Namespace, dataset: str, out: Path) -> None:
    one_process(f"--dataset {dataset}")
    if dataset not in mnist_variants.NAMES:
        check_apart(out, dataset)
    device = find_device(args.device)
    images, labels, names = load_images(dataset, args)
    data = hashlib.sha256(images.numpy().tobytes() + labels.numpy().tobytes()).hexdigest()
    config = configure(args, "digits", model=args.model or "cgn", dataset=dataset, data=data, names=names,
                       size=images.shape[3])
    config.update(textures=args.textures, variance=args.variance)
    config["bf16"] = bf16_pays(args.bf16 or config["bf16"], device)
    what = (f"{len(images)} images of {config['size']} x {config['size']} pixels, {len(names)} classes; "
            f"{config['steps']} steps of {config['batch']}")
    announce(config, what, device, out)
    train(config, images, labels, out, device)


def _imagenet(args: argparse.Namespace, kind: str, out: Path) -> None:
    device = join_group(args.device)
    gpu = device.startswith("cuda")
    config = configure(args, kind, model="imagenet", dataset=kind)
    given = {text.partition("=")[0] for text in args.set or ()}
    config["bf16"] = bf16_pays(args.bf16 or config["bf16"] or gpu and "bf16" not in given, device)
    if gpu and args.batch is None and "batch" not in given:
        config["batch"] = 0                                                 # as many as fit
    wanted = [config[name] for name in NETWORKS[:3]]
    if args.dry_run:
        absent = [name for name in wanted if not (WEIGHTS / name).exists()]
        print(f"dry run with tiny random networks; the run would miss {', '.join(absent) or 'none'}")
        teacher, saliency, style = random_networks()
        config.update(accumulate=2 * rank_and_world()[1], patch=5)
    else:
        teacher, saliency, style = find_networks(wanted)
        config["sha256"] = [file_hash(path) for path in (teacher, saliency, style)]
        style = read_checkpoint(style, other=True)
    mechanisms = (biggan.load(teacher, frozen=False) for _ in MECHANISMS)
    model = ImagenetCGN(*mechanisms, u2net.load(saliency)).to(device)
    model.config = config
    config["names"] = class_names(model)
    announce(config, f"{model.classes} classes, {model.resolution} x {model.resolution} pixels; "
             f"{config['steps']} updates of {config['accumulate']} images", device, out)
    if device == "cpu" and model.resolution > 64:
        rate = matrix_rate("cpu", torch.bfloat16 if config["bf16"] else torch.float, 2048)
        seconds = 1.06e12 * config["steps"] * config["accumulate"] / (0.4 * rate)
        print(f"about {seconds / 86400:.0f} days on this CPU; --mini takes minutes", flush=True)
    teacher, style = biggan.load(teacher).to(device), StyleFeatures(style).to(device)
    train_imagenet(config, model, teacher, style, out, device)


def find_network(name: str | os.PathLike) -> Path:
    """A file of weights by its path or by its name in weights/, fetched if it must be. Raises ValueError."""
    return biggan.find_weights(name if Path(name).exists() else WEIGHTS / name)


def find_networks(names: Sequence[str]) -> list[Path]:
    """The files of all networks, fetched where they must be. Says first what is there, what is not, and what
    disk the run needs. Raises one ValueError that names all that cannot be had."""
    if rank_and_world()[0] == 0:
        table = HERE / "weights.txt"
        lines = table.read_text().splitlines() if table.exists() else ()
        listed = {row[0]: row for row in (line.split(" | ") for line in lines) if len(row) == 6}
        sizes = []
        for name in names:
            _, size, _, _, address, _ = listed.get(name, ["", "?", "", "", "nowhere", ""])
            held = next((path for path in (Path(name), WEIGHTS / name) if path.exists()), None)
            sizes.append(held.stat().st_size if held else size)
            print(f"{name}: {'here' if held else f'{size} bytes, to be fetched from {address}'}")
        # Three mechanisms with Adam's two moments, and once more while a checkpoint is replaced.
        need = f"{18 * int(sizes[0]) / 1e9:.1f} GB" if str(sizes[0]).isdecimal() else "18 times the teacher"
        print(f"checkpoints need {need} of disk; {shutil.disk_usage(HERE).free / 1e9:.1f} GB are free here")
    found, missing = [], []

    def find() -> None:
        for name in names:
            try:
                found.append(find_network(name))
            except ValueError as error:
                missing.append(str(error))

    in_turn(find)
    if missing:
        remedy = "--mini runs now, with networks that are here"
        if names[0] == PRESETS["mini"]["teacher"]:
            remedy = "the repository holds them: git checkout weights"
        raise ValueError(". ".join([*missing, remedy]))
    return found


def random_networks() -> tuple[dict, dict, dict]:
    """State dicts of a BigGAN of 32 x 32 pixels, a U-2-Net and VGG16's features, tiny and random, to try the
    training with."""
    teacher = biggan.BigGAN([(16, 16)] * 6, None, 10, 8, 8)
    saliency = u2net.U2Net(((3, 4, 8),) + ((8, 4, 8),) * 5 + ((16, 4, 8),) * 5)
    style = nn.Module()
    layers = [layer for count in STYLE_CONVS for layer in [4] * count + ["M"]]
    style.features = make_layers(layers, batch_norm=True)
    return teacher.state_dict(), saliency.state_dict(), style.state_dict()


def _sample(args: argparse.Namespace, drawings: list[str]) -> None:
    if len(drawings) > 1:
        raise ValueError(f"--{' and --'.join(drawings)}: one at a time")
    what = drawings[0] if drawings else "sheet"
    refuse_options(args, SAMPLING | {what} | DRAWINGS.get(what, set()),
                   f"--{what}" if drawings else "--checkpoint alone")
    device = find_device(args.device)
    model = load(args.checkpoint).to(device)
    if args.truncation is not None:
        if model.config["model"] != "imagenet":
            raise ValueError("--truncation means nothing for digits: leave it off")
        model.truncation = args.truncation
    elif what in ("sheet", "triples", "outputs"):
        model.truncation = SHEET_TRUNCATION
    args.bf16, args.seed = bf16_pays(args.bf16, device), args.seed or 0
    with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=args.bf16):
        commands = {"counterfactuals": drawing.data_set, "photo": drawing.photo}
        commands.get(what, drawing.sheet)(args, model, what)


if __name__ == "__main__":
    main()
