"""Counterfactual Generative Networks (Sauer & Geiger, ICLR 2021), on MNIST variants and on ImageNet.

An image is made by independent mechanisms, each with its own noise u and its own class label y, and a fixed composer
(equation 2; appendix B):

    m = f_shape(y_1, u_1)     f = f_text(y_2, u_2)     b = f_bg(y_3, u_3)     x_gen = m * f + (1 - m) * b

Trained with one label for all three; sampled with a label for each, it draws images that no data set holds, and classifiers
learn from them which part is which. Two models, called alike:

    MnistCGN     small networks trained adversarially on real images, nothing pre-trained (3.1)
    ImagenetCGN  three BigGAN-deep generators, the shape's behind a U-2-Net, that take the images of a frozen BigGAN
                 apart: no real image is needed (equation 4). --mini: the same of ten digits, see miniature.py

    python cgn.py --dataset colored                                        # train; sheets and checkpoint in runs/colored
    python cgn.py --dataset imagenet --device cuda                         # the paper's run
    python cgn.py --checkpoint runs/colored/checkpoint.pt --counterfactuals 100000 --out colored-counterfactuals.pt

Glossary (N images, C classes, Z noise dimensions, R pixels: 32, or 256 on ImageNet):
    u        noise                      (N, Z)          standard normal; on ImageNet cut at -2 and 2
    y        label or class weights     (N,) / (N, C)   long in 0..C-1 / float
    m        mask                       (N, 1, R, R)    0 background .. 1 object
    f, b     foreground, background     (N, 3, R, R)    -1 .. 1
    x, x_gen real, composite image      (N, 3, R, R)    -1 .. 1
    x_gt     the frozen BigGAN's image  (N, 3, R, R)    -1 .. 1
"""
import argparse
import contextlib
import errno
import json
import os
import re
import signal
import sys
import tempfile
import threading
import time
import zipfile
from functools import partial
from pathlib import Path
from typing import Iterator, NamedTuple, Optional, Sequence, Union

import numpy as np
import torch
import torch.distributed as distributed
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.nn.utils.parametrizations import spectral_norm
from torchvision.datasets.folder import IMG_EXTENSIONS, ImageFolder, find_classes, has_file_allowed_extension
from torchvision.models.vgg import make_layers
from torchvision.transforms import functional as F_image

import biggan
import evaluate
import mnist_variants
import u2net

NOISE = 32                  # dimensions of u (authors' code)
CELLS = 10                  # a texture starts as 10 x 10 cells; unpadded convolutions make 32 x 32 pixels of them
SHUFFLES = ("shift", "puzzle")      # how they are moved: the authors' code's cyclic shift, or the paper's sliding puzzle
PATCH = 2                   # the sliding puzzle moves patches of 2 x 2 cells, about 8 x 8 pixels
MARGIN = 2                  # outermost pixels that are background by construction: see ShapeMechanism
ENTROPY_CLAMP = 1e-4        # masks are clamped to [1e-4, 1 - 1e-4] inside the logarithm (authors' code)
# Samples are drawn from an average of the generator (Shamir & Zhang, 2013, polynomial decay), over about the last ninth of its steps;
# on textures over a quarter, as there a class may break in the last few steps.
AVERAGE = {"colored": 9, "double-colored": 9, "wildlife": 4}

SHEET_EVERY, SHEET_COLUMNS = 500, 8
SHEET_ROWS, SHEET_TRUNCATION = 8, 0.5
MECHANISMS = ("shape", "texture", "background")


# ImageNet (appendix C). Names of equation 4's terms: l1, perceptual, binary, mask, texture, background.
LAMBDAS = {"l1": 100.0, "perceptual": 5.0, "binary": 300.0, "mask": 500.0, "texture": 5.0, "background": 2000.0}
WITHOUT = {"shape": ("binary", "mask"), "text": ("texture",), "bg": ("background",), "rec": ("l1", "perceptual")}   # Table 1
GRAM_SCALE = 25_000.0       # a perceptual weight of 5 is 5^2 * 5e3 a layer in the authors' code
STYLE_CONVS = (2, 2, 3, 3)  # convolutions of VGG16 before each of its first four max-pools
PATCHES = 6                 # the texture loss compares with a grid of 6 x 6 patches
PATCH_TOLERANCE = 0.05      # they are drawn where the mask's mean is that close to the best place's


class Sample(NamedTuple):
    """What a CGN makes: mask (N, 1, H, W) in [0, 1]; foreground, background and image (N, 3, H, W) in [-1, 1]; for ImageNet
    pre_mask (N, 3, H, W) in [-1, 1] too, the picture that the mask was found in."""
    mask: torch.Tensor
    foreground: torch.Tensor
    background: torch.Tensor
    image: torch.Tensor
    pre_mask: Optional[torch.Tensor] = None


# ------------------------------------------------------------------------------------------------------ equations, losses

def compose(m: torch.Tensor, f: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Equation 2, alpha blending: mask (N, 1, H, W) in [0, 1], foreground and background (N, 3, H, W) -> (N, 3, H, W)."""
    return m * f + (1 - m) * b


def binary_entropy(m: torch.Tensor) -> torch.Tensor:
    """L_binary of equation 3: the mask's mean binary entropy a pixel, in bits, 0 (binary) .. 1 (all 0.5). A scalar."""
    m = m.clamp(ENTROPY_CLAMP, 1 - ENTROPY_CLAMP)
    return -(m * m.log2() + (1 - m) * (1 - m).log2()).mean()


def mask_interval(m: torch.Tensor, low: float = 0.1, high: float = 0.9) -> torch.Tensor:
    """L_mask of equation 3: how far each image's mean mask lies outside [low, high], averaged over images. A scalar.

    The paper's tau = 0.1 gives [0.1, 0.9].
    """
    mean = m.mean(dim=(1, 2, 3))
    return (F.relu(low - mean) + F.relu(mean - high)).mean()


def color_loss(images: torch.Tensor, y: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """How far the mean colour of images (N, 3, H, W) is from that of real ones, class by class. A scalar. Not in the paper.

    y (N,) long, target (C, 3): the squared difference of means, averaged over the classes with two images or more. Estimated
    from pairs of different images, (|sum d|^2 - sum |d|^2) / (n (n - 1)), so that colours of a class may differ at no cost.
    """
    d = images.mean(dim=(2, 3)) - target[y]                                         # (N, 3)
    count = y.bincount(minlength=len(target))                                       # (C,)
    squares = torch.zeros_like(target).index_add(0, y, d).square() - torch.zeros_like(target).index_add(0, y, d.square())
    several = count > 1
    return (squares.mean(dim=1)[several] / (count * (count - 1))[several]).sum() / several.sum().clamp(min=1)


def mean_color(images: torch.Tensor, labels: torch.Tensor, classes: int, margin: Optional[int] = None) -> torch.Tensor:
    """Mean colour (C, 3) in [-1, 1] of uint8 images (N, 3, H, W), by class; of `margin` outermost pixels, if given."""
    color = images.mean(dim=(2, 3), dtype=torch.float)
    if margin:
        inner = images[..., margin:-margin, margin:-margin]
        ratio = inner[0, 0].numel() / images[0, 0].numel()
        color = (color - ratio * inner.mean(dim=(2, 3), dtype=torch.float)) / (1 - ratio)
    return torch.stack([color[labels == label].mean(dim=0) for label in range(classes)]) / 127.5 - 1


def discriminator_loss(real: torch.Tensor, fake: torch.Tensor, relativistic: bool = False) -> torch.Tensor:
    """Hinge loss of the discriminator's scores (N,) for real and generated images: pushes them beyond +1 and -1. A scalar.

    relativistic (Jolicoeur-Martineau, 2019): each real image shall lead the generated one of its class by 1.
    """
    return F.relu(1 - (real - fake)).mean() if relativistic else F.relu(1 - real).mean() + F.relu(1 + fake).mean()


def generator_loss(real: torch.Tensor, fake: torch.Tensor, relativistic: bool = False) -> torch.Tensor:
    """The generator's side: raise the scores (N,) of generated images; relativistic: until each leads its real one by 1."""
    return F.relu(1 - (fake - real)).mean() if relativistic else -fake.mean()


def gram(h: torch.Tensor) -> torch.Tensor:
    """Gram matrices (N, C, C) of feature maps (N, C, H, W), divided by C H W (Johnson et al., 2016)."""
    h = _at_least_float(h).flatten(2)
    return h @ h.mT / h[0].numel()


def _at_least_float(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float))


def perceptual(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> torch.Tensor:
    """L_perc: mean absolute difference of the Gram matrices of feature maps (N, C, H, W), summed over the layers. A scalar.

    Scaled so that the paper's weight of 5 is the authors' (GRAM_SCALE).
    """
    return GRAM_SCALE * sum((gram(x) - gram(y)).abs().mean() for x, y in zip(a, b))


def relative_patch(m: torch.Tensor, patch: int) -> torch.Tensor:
    """Sides (N,) of patches that follow the object's size, appendix F's remedy: `patch` where masks m (N, 1, H, W) fill a quarter
    of the image, and in proportion to the root of the area; at least 1 pixel."""
    return (2 * patch * m.detach().mean(dim=(1, 2, 3)).sqrt()).round().clamp(1, min(m.shape[2:])).long()


def patch_grid(x: torch.Tensor, m: torch.Tensor, draws: torch.Tensor, patch: Union[int, torch.Tensor] = 15) -> torch.Tensor:
    """pg of the texture loss (C.2): 6 x 6 patches of x (N, 3, H, W) from where the mask m (N, 1, H, W) is highest, scaled to x.

    draws (N, 36) in [0, 1) choose among the places whose mean mask is within 0.05 of the best; patch: the side of all, or of
    each image's (N,). No gradient passes. Raises ValueError for a patch that is no pixel or larger than x.
    """
    if isinstance(patch, torch.Tensor):
        grids = torch.empty_like(x)
        for side in patch.unique().tolist():
            chosen = patch == side
            grids[chosen] = patch_grid(x.detach()[chosen], m[chosen], draws[chosen], side)
        return grids
    if not 1 <= patch <= min(x.shape[2:]):
        raise ValueError(f"patches of {patch} pixels from images of {x.shape[2]} x {x.shape[3]}")
    with torch.no_grad():
        score = F.avg_pool2d(m, patch, 1)                                           # (N, 1, H - patch + 1, ..)
        across = score.shape[3]
        score, order = score.flatten(1).sort(dim=1, descending=True, stable=True)
        count = (score >= score[:, :1] - PATCH_TOLERANCE).sum(dim=1, keepdim=True)
        place = order.gather(1, (draws * count).long())                             # (N, 36)
        windows = x.unfold(2, patch, 1).unfold(3, patch, 1)                         # (N, 3, .., .., patch, patch), a view
        image = torch.arange(len(x), device=x.device)[:, None]
        patches = windows[image, :, place // across, place % across]                # (N, 36, 3, patch, patch)
        grid = patches.unflatten(1, (PATCHES, PATCHES)).permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
        return F.interpolate(grid, x.shape[2:], mode="bilinear")


# -------------------------------------------------------------------------------------------------------------- randomness

def rng(seed: int, index: int) -> np.random.Generator:
    """The one source of everything that belongs to `index` (a training step, or a sampled image) under `seed`, both >= 0.

    Philox is counter-based: no two pairs of these share a stream, and none depends on what was drawn before.
    """
    return np.random.Generator(np.random.Philox(key=[seed, index]))


def draw_arrangement(generator: np.random.Generator, count: int, shuffle: str) -> np.ndarray:
    """Where each of the 100 cells of a texture comes from, (count, 2, 100) ints: for the foreground and the background.

    puzzle  patches of 2 x 2 cells in random order (the paper's "shuffled sliding puzzle", section 3.1)
    shift   all cells moved cyclically by a random distance (authors' code)
    """
    grid = np.arange(CELLS * CELLS).reshape(CELLS, CELLS)
    if shuffle == "shift":
        moved = (np.arange(CELLS) + generator.integers(CELLS, size=(count, 2, 2))[..., None]) % CELLS
        return grid[moved[:, :, 0, :, None], moved[:, :, 1, None, :]].reshape(count, 2, -1)
    side = CELLS // PATCH
    patches = grid.reshape(side, PATCH, side, PATCH).transpose(0, 2, 1, 3).reshape(side * side, PATCH, PATCH)
    order = generator.permuted(np.tile(np.arange(side * side), (count, 2, 1)), axis=2)
    puzzle = patches[order].reshape(count, 2, side, side, PATCH, PATCH)
    return puzzle.transpose(0, 1, 2, 4, 3, 5).reshape(count, 2, -1)


# ----------------------------------------------------------------------------------------------------------------- modules

class Up(nn.Module):
    """Twice the size: (N, i, n, n) -> (N, o, 2n, 2n), or, without padding, (N, o, 2n - 2, 2n - 2) free of border effects.

    Nearest-neighbour upsampling and a 3 x 3 convolution, as one 4 x 4 transposed convolution: equal, in half the time.
    """

    def __init__(self, i: int, o: int, padding: int):
        super().__init__()
        self.weight = nn.Conv2d(i, o, 3, bias=False).weight
        self.padding = padding
        self.rest = nn.Sequential(nn.BatchNorm2d(o), nn.ReLU(inplace=True))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.rest(F.conv_transpose2d(x, biggan.doubling_kernel(self.weight), stride=2, padding=2 - self.padding))


class Start(nn.Module):
    """u and the label's embedding -> `channels` feature maps of `side` x `side` cells."""

    def __init__(self, classes: int, channels: int, side: int):
        super().__init__()
        self.embedding = nn.Linear(classes, 10, bias=False)     # a weight matrix, so that class weights can be blended
        nn.init.normal_(self.embedding.weight)
        self.linear = nn.Linear(NOISE + 10, channels * side * side, bias=False)
        self.side = side

    def forward(self, u: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        h = self.linear(torch.cat([u, self.embedding(y)], dim=1))                   # (N, channels * side^2)
        return h.unflatten(1, (-1, self.side, self.side))                           # (N, channels, side, side)


class ShapeMechanism(nn.Module):
    """f_shape: u (N, Z), class weights y (N, C) -> mask (N, 1, 32, 32) in [0, 1].

    The outermost `margin` pixels are 0 by construction: they show the background mechanism's output alone. Without this and
    the `color_loss` of b, nothing in the paper's losses keeps foreground and background from swapping roles for some classes.
    """

    def __init__(self, classes: int, margin: int = MARGIN):
        super().__init__()
        self.start = Start(classes, 192, 4)
        self.body = nn.Sequential(nn.BatchNorm2d(192), nn.ReLU(inplace=True), Up(192, 96, 1), Up(96, 48, 1), Up(48, 24, 1))
        self.out = nn.Conv2d(24, 1, 3, padding=1)
        side = mnist_variants.SIZE
        interior = F.pad(torch.ones(1, 1, side - 2 * margin, side - 2 * margin), (margin,) * 4)
        self.register_buffer("interior", interior, persistent=False)

    def forward(self, u: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        h = self.body(self.start(u, y))                                             # (N, 24, 32, 32)
        return torch.sigmoid(self.out(h)) * self.interior                           # (N, 1, 32, 32) in [0, 1]


class TextureMechanism(nn.Module):
    """f_text (and f_bg, its twin): u (N, Z), class weights y (N, C), arrangement (N, 100) long -> (N, 3, 32, 32) in [-1, 1].

    100 cells are made, rearranged at random, and decoded by convolutions without padding: no place in the picture differs
    from another, and no shape larger than a patch can be learned, since the next draw would break it.
    DEVIATION: the paper rearranges just before the output layer. Here convolutions follow, which close the seams.
    """

    def __init__(self, classes: int):
        super().__init__()
        self.start = Start(classes, 64, CELLS)
        self.body = nn.Sequential(nn.BatchNorm2d(64), nn.ReLU(inplace=True), Up(64, 32, 0), Up(32, 16, 0))
        self.out = nn.Conv2d(16, 3, 3)

    def forward(self, u: torch.Tensor, y: torch.Tensor, arrangement: torch.Tensor) -> torch.Tensor:
        h = self.start(u, y).flatten(2)                                             # (N, 64, 100)
        h = h.gather(2, arrangement[:, None].expand_as(h)).unflatten(2, (CELLS, CELLS))
        h = self.body(h.contiguous(memory_format=torch.channels_last))              # (N, 16, 34, 34)
        return torch.tanh(self.out(h))                                              # (N, 3, 32, 32)


class MnistCGN(nn.Module):
    """The three mechanisms and the composer (appendix B, MNISTs; the background is a second texture mechanism)."""

    def __init__(self, classes: int = 10, margin: int = MARGIN, shuffle: str = "shift"):
        super().__init__()
        self.classes, self.noise, self.shuffle = classes, NOISE, shuffle
        self.f_shape, self.f_text, self.f_bg = ShapeMechanism(classes, margin), TextureMechanism(classes), TextureMechanism(classes)

    def forward(self, u, y, arrangement: Optional[torch.Tensor] = None) -> Sample:
        """u (N, Z), y labels (N,) or class weights (N, C), each one tensor or a triple (shape, foreground, background).

        arrangement: of the two textures' cells, (N, 2, 100) long from `draw_arrangement`; None draws one by torch's global
        generator. Returns a Sample. Raises ValueError for a label outside 0..C-1.
        """
        u_1, u_2, u_3 = u if isinstance(u, (tuple, list)) else (u, u, u)
        y_1, y_2, y_3 = (class_weights(label, self.classes) for label in (y if isinstance(y, (tuple, list)) else (y, y, y)))
        if arrangement is None:
            arrangement = random_arrangement(len(u_1), self.shuffle).to(u_1.device)
        m = self.f_shape(u_1, y_1)
        f = self.f_text(u_2, y_2, arrangement[:, 0])
        b = self.f_bg(u_3, y_3, arrangement[:, 1])
        return Sample(m, f, b, compose(m, f, b))


def class_weights(y: torch.Tensor, classes: int) -> torch.Tensor:
    """Labels (N,) long -> one-hot class weights (N, C) float; class weights pass. ValueError for a label out of range."""
    if y.is_floating_point():
        return y
    if len(y) and not 0 <= int(y.min()) <= int(y.max()) < classes:
        raise ValueError(f"class {int(y.min()) if y.min() < 0 else int(y.max())} is not in 0..{classes - 1}")
    return F.one_hot(y, classes).float()


def random_arrangement(count: int, shuffle: str) -> torch.Tensor:
    seed = int(torch.randint(2 ** 31, ()))
    return torch.from_numpy(draw_arrangement(rng(seed, 0), count, shuffle))


class MnistGAN(nn.Module):
    """A conditional GAN without mechanisms, the baseline "Original + GAN" of Table 2: one network makes the whole image."""

    def __init__(self, classes: int = 10):
        super().__init__()
        self.classes, self.noise, self.shuffle = classes, NOISE, "shift"
        self.start = Start(classes, 192, 4)
        self.body = nn.Sequential(nn.BatchNorm2d(192), nn.ReLU(inplace=True), Up(192, 96, 1), Up(96, 48, 1), Up(48, 48, 1))
        self.out = nn.Conv2d(48, 3, 3, padding=1)

    def forward(self, u, y, arrangement: Optional[torch.Tensor] = None) -> Sample:
        """Called like a CGN, so that it trains and samples alike; uses the first u and y. All of the image is foreground."""
        u = u[0] if isinstance(u, (tuple, list)) else u
        y = y[0] if isinstance(y, (tuple, list)) else y
        x = torch.tanh(self.out(self.body(self.start(u, class_weights(y, self.classes)))))
        return Sample(torch.ones_like(x[:, :1]), x, torch.zeros_like(x), x)


class Discriminator(nn.Module):
    """Real or generated, given the class: x (N, channels, 32, 32) in [-1, 1], y (N,) long -> scores (N,).

    Spectral norm (Miyato et al., 2018) and class projection (Miyato & Koyama, 2018).
    """

    def __init__(self, classes: int = 10, width: int = 48, channels: int = 3):
        super().__init__()
        layers = []
        for i, o in ((channels, width), (width, 2 * width), (2 * width, 4 * width)):
            layers += [spectral_norm(nn.Conv2d(i, o, 4, stride=2, padding=1)), nn.LeakyReLU(0.2)]
        self.body = nn.Sequential(*layers, nn.Flatten(), spectral_norm(nn.Linear(4 * width * 16, 256)), nn.LeakyReLU(0.2))
        self.score = spectral_norm(nn.Linear(256, 1))
        self.embedding = spectral_norm(nn.Embedding(classes, 256))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        h = self.body(x)                                                            # (N, 256)
        return self.score(h)[:, 0] + (self.embedding(y) * h).sum(dim=1)             # (N,)


class ImagenetCGN(nn.Module):
    """Figure 2: three BigGAN-deep generators; what the frozen U-2-Net finds salient in the first one's picture is the mask.

    Of 256 x 256 pixels and 1,000 classes, or as large as the given generators are. U-2-Net runs in channels last, which is faster
    on a CPU; the generators gain nothing by it and take more memory.
    """

    def __init__(self, f_shape: biggan.BigGAN, f_text: biggan.BigGAN, f_bg: biggan.BigGAN, saliency: u2net.U2Net):
        super().__init__()
        self.classes, self.noise, self.resolution = f_shape.classes, f_shape.noise, f_shape.resolution
        self.f_shape, self.f_text, self.f_bg = f_shape, f_text, f_bg
        self.u2net = saliency.to(memory_format=torch.channels_last)

    def forward(self, u, y, truncation: float = 1.0) -> Sample:
        """u (N, Z), y labels (N,) or class weights (N, C), each one tensor or a triple (shape, foreground, background).

        truncation selects the statistics of normalisation; u is taken as it is. Returns a Sample with `pre_mask`. Raises
        ValueError for a class or a truncation that is not there.
        """
        u_1, u_2, u_3 = u if isinstance(u, (tuple, list)) else (u, u, u)
        y_1, y_2, y_3 = y if isinstance(y, (tuple, list)) else (y, y, y)
        pre_mask = self.f_shape(u_1, y_1, truncation)
        m = self.saliency(pre_mask)
        f, b = self.f_text(u_2, y_2, truncation), self.f_bg(u_3, y_3, truncation)
        return Sample(m, f, b, compose(m, f, b), pre_mask)

    def saliency(self, x: torch.Tensor) -> torch.Tensor:
        """How salient each pixel of x (N, 3, H, W) in [-1, 1] is, (N, 1, H, W) in [0, 1].

        DEVIATION: the authors feed [-1, 1]; U-2-Net was trained on ImageNet's mean and deviation.
        """
        return self.u2net(u2net.normalise((x + 1) / 2))


class StyleFeatures(nn.ModuleList):
    """VGG16 with batch norm up to its fourth max-pool, frozen: x (N, 3, H, W) in [-1, 1] -> feature maps after each of them.

    Built from torchvision's state dict of vgg16_bn, or of a narrower one; other entries are left aside, nothing else of the
    network is made. Batch norms are folded into the convolutions. Raises ValueError where the dict does not fit.
    """

    def __init__(self, state: dict):
        super().__init__()
        i, number = 3, 0
        try:
            for count in STYLE_CONVS:
                stage = nn.Sequential()
                for _ in range(count):
                    conv = nn.Conv2d(i, len(state[f"features.{number}.weight"]), 3, padding=1)
                    norm = nn.BatchNorm2d(conv.out_channels)
                    for layer, index in ((conv, number), (norm, number + 1)):
                        layer.load_state_dict({key: state[f"features.{index}.{key}"] for key in layer.state_dict()
                                               if key != "num_batches_tracked"})    # the released file is older than it
                    stage.append(fuse_conv_bn_eval(conv.eval(), norm.eval())).append(nn.ReLU(inplace=True))
                    i, number = conv.out_channels, number + 3
                self.append(stage.append(nn.MaxPool2d(2)))
                number += 1
        except (KeyError, RuntimeError, TypeError) as error:
            raise ValueError(f"this is no state dict of vgg16_bn: {str(error).splitlines()[0]}") from None
        self.eval().requires_grad_(False).to(memory_format=torch.channels_last)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        h, features = u2net.normalise((x + 1) / 2), []
        for stage in self:
            h = stage(h)
            features.append(h)
        return features


def build(config: dict) -> Union[MnistCGN, MnistGAN]:
    """The untrained generator that a run's configuration names."""
    if config["model"] == "gan":
        return MnistGAN(len(config["names"]))
    return MnistCGN(len(config["names"]), margin=config["margin"], shuffle=config["shuffle"])


# ---------------------------------------------------------------------------------------------------------------- training

_pressed = []               # Ctrl-C while `ctrl_c_waits`


@contextlib.contextmanager
def ctrl_c_waits():
    """While it holds, Ctrl-C is noted for `stopping`, so that a training ends its step and writes its checkpoint; once more, and
    it interrupts at once. For use as a decorator as well."""
    def note(*_) -> None:
        if _pressed:
            raise KeyboardInterrupt
        _pressed.append(True)
        if os.getpid() == process:                          # workers that read pictures are told, too
            print("\nstopping after this step, with its checkpoint; Ctrl-C again stops at once", flush=True)

    process, before = os.getpid(), signal.getsignal(signal.SIGINT)
    noted = threading.current_thread() is threading.main_thread() and before != signal.SIG_IGN      # as it is in the background
    if noted:
        signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        if noted:
            signal.signal(signal.SIGINT, before)
        _pressed.clear()


def stopping() -> bool:
    """Whether Ctrl-C was pressed while `ctrl_c_waits`."""
    return bool(_pressed)


@ctrl_c_waits()
def train(config: dict, images: torch.Tensor, labels: torch.Tensor, out: Path, device: str = "cpu") -> None:
    """Train a CGN (or the GAN baseline) adversarially on `images` (N, 3, 32, 32) uint8 with `labels` (N,) long.

    Writes log.jsonl, checkpoint.pt and labelled sheets into `out`; continues from the checkpoint that lies there. Every
    random number of step i comes from rng(seed, i), so a continued run is the uninterrupted one, bit for bit on the CPU.
    Raises ValueError where `out` holds a run of another configuration, or a loss is not finite.
    """
    torch.manual_seed(config["seed"])
    model = build(config).to(device, memory_format=torch.channels_last)
    discriminator = Discriminator(model.classes).to(device, memory_format=torch.channels_last)
    average = build(config).to(device, memory_format=torch.channels_last).eval()
    average.load_state_dict(model.state_dict())
    optimizers = [torch.optim.Adam(network.parameters(), lr=lr, betas=(0.5, 0.99))
                  for network, lr in ((model, config["lr"]), (discriminator, 2 * config["lr"]))]
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, 2 * (1 - step / config["steps"])))
                 for optimizer in optimizers]
    parts = {"model": model, "average": average, "discriminator": discriminator,
             **{f"optimizer{i}": part for i, part in enumerate(optimizers)},
             **{f"schedule{i}": part for i, part in enumerate(schedules)}}
    first = continue_run(out, config, parts)
    color = mean_color(images, labels, model.classes).to(device)
    border = mean_color(images, labels, model.classes, config["margin"]).to(device) if config["margin"] else None
    batch, started = config["batch"], time.time()
    recency = AVERAGE.get(config["dataset"], AVERAGE["wildlife"])

    def autocast():
        return torch.autocast(device.split(":")[0], torch.bfloat16, enabled=config["bf16"])

    for step in range(first, config["steps"]):
        generator = rng(config["seed"], step)
        chosen = torch.from_numpy(generator.integers(len(images), size=batch))
        u = torch.from_numpy(generator.standard_normal((3, batch, model.noise), dtype=np.float32)).to(device)
        arrangement = torch.from_numpy(draw_arrangement(generator, batch, model.shuffle)).to(device)
        y = labels[chosen].to(device)
        x = to_float(images[chosen].to(device))

        # Instance noise (Sonderby et al., 2017): at first the discriminator is too good to teach; it fades out over training.
        noise = torch.from_numpy(generator.standard_normal((2 * batch, *x.shape[1:]), dtype=np.float32)).to(device)
        noise *= config["noise"] * (1 - step / config["steps"])

        with autocast():
            sample = model(tuple(u), y, arrangement)

        # Discriminator: raise the score of real images, lower that of generated ones.
        with autocast():
            scores = discriminator(torch.cat([x, sample.image.detach()]) + noise, torch.cat([y, y]))
        real, fake = scores.float().split(batch)
        loss_d = discriminator_loss(real, fake, config["relativistic"])
        optimizers[1].zero_grad()
        loss_d.backward()
        optimizers[1].step()

        # Generator: raise the score of generated images, with a mask that is binary and neither empty nor full.
        discriminator.requires_grad_(False)
        with autocast():
            scores = discriminator(sample.image + noise[batch:], y)
        losses = {"adversarial": generator_loss(real.detach(), scores.float(), config["relativistic"])}
        if config["model"] == "cgn":
            losses["binary"] = config["binary"] * min(1, step / config["binary_warmup"]) * binary_entropy(sample.mask.float())
            losses["mask"] = config["mask"] * mask_interval(sample.mask.float(), *config["interval"])
            losses["color"] = config["color"] * color_loss(sample.image.float(), y, color)
            if border is not None:
                losses["border"] = config["color"] * color_loss(sample.background.float(), y, border)
        optimizers[0].zero_grad()
        sum(losses.values()).backward()
        optimizers[0].step()
        discriminator.requires_grad_(True)
        for schedule in schedules:
            schedule.step()
        _update_average(average, model, (step + 1) / (step + 1 + recency))

        done, stop = step + 1, stopping()
        if done % config["log_every"] == 0 or done == config["steps"] or stop:      # what is not finite is never saved
            row = {"step": done, "discriminator": loss_d.item(), **{name: loss.item() for name, loss in losses.items()},
                   "mask_mean": sample.mask.mean().item(), "real": real.mean().item(), "fake": fake.mean().item()}
            if not all(np.isfinite(value) for value in row.values()):
                raise ValueError(f"step {done}: not finite: {row}; the last checkpoint is kept: try a smaller --lr")
            rate = (done - first) / (time.time() - started)
            append_row(out / "log.jsonl", {**row, "steps_per_second": round(rate, 2)})
            if done == first + config["log_every"]:
                print(f"{rate:.1f} steps/s, {(config['steps'] - done) / rate / 60:.1f} minutes to go; a sheet every "
                      f"{config['sheet_every']} steps, beside checkpoint.pt, from which the same command continues")
            if sys.stdout.isatty():
                print(f"\rstep {done}/{config['steps']}  {rate:.1f} steps/s  {(config['steps'] - done) / rate / 60:.1f} min "
                      f"left  discriminator {row['discriminator']:.2f}  mask mean {row['mask_mean']:.2f} ", end="", flush=True)
        if done % config["sheet_every"] == 0 or done == config["steps"]:
            path = out / f"sheet-{done:06d}.png"
            save_training_sheet(average, config["names"], path, config["seed"])
            print(f"{chr(13) if sys.stdout.isatty() else ''}step {done}: {time.time() - started:.0f} s, {path}")
        if done % config["sheet_every"] == 0 or done == config["steps"] or stop:
            save_state(out / "checkpoint.pt", {"config": config, "step": done,
                                          **{name: part.state_dict() for name, part in parts.items()}})
        if stop:
            raise KeyboardInterrupt


def imagenet_losses(model: ImagenetCGN, m: torch.Tensor, f: torch.Tensor, b: torch.Tensor, x_gt: torch.Tensor,
                    style: StyleFeatures, draws: torch.Tensor, *, patch: int = 15, relative: bool = False,
                    terms: Sequence[str] = tuple(LAMBDAS)) -> Iterator[tuple[str, torch.Tensor]]:
    """The unweighted terms of equation 4 that are asked for, by name: scalars, means over images.

    m, f, b: what the mechanisms made; x_gt (N, 3, R, R) in [-1, 1]: the teacher's images for the same u and y; draws (N, 36):
    see `patch_grid`; relative: see `relative_patch`. One term is computed when the one before has been used, so that two graphs
    never need memory at once. DEVIATION: patches of L_text come from x_gt (authors' code), not from x_gen, whose textures they
    would smooth ever more: enlarging the grid blurs it.
    """
    m, f, b = (_at_least_float(part) for part in (m, f, b))

    def style_loss(image, target):
        with torch.no_grad():
            wanted = style(target)
        return perceptual(style(image), wanted)

    compute = {"l1": lambda: (compose(m, f, b) - x_gt).abs().mean(), "perceptual": lambda: style_loss(compose(m, f, b), x_gt),
               "binary": lambda: binary_entropy(m), "mask": lambda: mask_interval(m),
               "texture": lambda: style_loss(f, patch_grid(x_gt, m, draws, relative_patch(m, patch) if relative else patch)),
               "background": lambda: model.saliency(b).mean()}
    for name in terms:
        yield name, compute[name]()


def draw_training(model: ImagenetCGN, seed: int, indices: range, truncation: float):
    """Noise u (N, Z), labels y (N,) and patch draws (N, 36) of the training images `indices`; image i's from rng(seed, i)."""
    u, y, draws = [], [], []
    for index in indices:
        generator = rng(seed, index)
        u.append(draw_truncated(generator, 1, model.noise, truncation))
        y.append(int(generator.integers(model.classes)))
        draws.append(generator.random(PATCHES ** 2, dtype=np.float32))
    return torch.cat(u), torch.tensor(y), torch.from_numpy(np.stack(draws))


def draw_truncated(generator: np.random.Generator, count: int, noise: int, truncation: float) -> torch.Tensor:
    """(count, noise): a standard normal cut at -2 and 2, times the truncation."""
    return biggan.truncated_noise(count, noise, truncation, seed=int(generator.integers(2 ** 63)))


def read_classifier(path: Union[str, os.PathLike]) -> nn.Module:
    """The network of the Inception Score: torchvision's inception_v3, or the miniature's; x in [-1, 1] -> scores (N, C).

    Raises ValueError for another state dict. torchvision's weights give other scores than TensorFlow's.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if "Conv2d_1a_3x3.conv.weight" in state:
            from torchvision.models import inception_v3
            model = inception_v3(init_weights=False)
            model = nn.Sequential(nn.Upsample(299, mode="bilinear"), model)
            model[1].load_state_dict(state)
        else:
            from classify import Classifier
            model = Classifier(len(state["12.bias"]))
            model.load_state_dict(state)
    except Exception as error:              # whatever a hostile or broken file makes the reader raise
        raise ValueError(f"{path} is no state dict of inception_v3 ({str(error).splitlines()[0]})") from None
    return model.eval().requires_grad_(False)


@torch.no_grad()
def inception_score(model: ImagenetCGN, classifier: nn.Module, count: int, truncation: float = 1.0, seed: int = 0,
                    batch: int = 50) -> float:
    """Inception Score, one split, of `count` images x_gen, one u and one label for all three mechanisms of each."""
    device, probabilities = next(model.parameters()).device, []
    for start in range(0, count, batch):
        u, y, _ = draw_training(model, seed, range(start, min(start + batch, count)), truncation)
        probabilities.append(classifier(model(u.to(device), y.to(device), truncation).image).softmax(dim=1).cpu())
    return evaluate.inception_score(torch.cat(probabilities), splits=1)[0]


def micro_step(model: ImagenetCGN, teacher: biggan.BigGAN, style: StyleFeatures, u: torch.Tensor, y: torch.Tensor,
               draws: torch.Tensor, weights: dict[str, float], config: dict, fraction: float = 1.0) -> torch.Tensor:
    """Adds `fraction` times the gradient of equation 4's sum for a few images, drawn by `draw_training`, to what the mechanisms
    hold; returns `fraction` times each term of `weights` and, last, the mean mask."""
    with torch.autocast(u.device.type, torch.bfloat16, enabled=config["bf16"]):
        with torch.no_grad():
            x_gt = teacher(u, y, config["truncation"])
        sample = model(u, y, config["truncation"])
        leaves = [made.detach().requires_grad_() for made in sample[:3]]            # the losses' graphs end here
        terms, found = imagenet_losses(model, *leaves, x_gt, style, draws, patch=config["patch"],
                                       relative=config["relative_patch"], terms=tuple(weights)), []
        for name, loss in terms:
            (fraction * weights[name] * loss).backward()
            found.append(loss.detach())
    reached = [(made, leaf.grad) for made, leaf in zip(sample, leaves) if leaf.grad is not None]
    torch.autograd.backward(*zip(*reached))
    return fraction * torch.stack([*found, leaves[0].detach().mean()])


@ctrl_c_waits()
def train_imagenet(config: dict, model: ImagenetCGN, teacher: biggan.BigGAN, style: StyleFeatures, out: Path,
                   device: str = "cpu", classifier: Optional[nn.Module] = None) -> None:
    """Train `model` to take the frozen teacher's images apart (section 3, C.3), no real image needed.

    An update's gradient is the mean over `accumulate` images, `batch` at a time, spread over the ranks of a process group if
    there is one; spectral norms take one power iteration an update, so that the result does not depend on how it is cut.
    Writes log.jsonl, checkpoint.pt (no frozen network in it) and sheets into `out`; continues from the checkpoint there. With a
    classifier (see `read_classifier`) the Inception Score is logged with every sheet. Raises ValueError where `out` holds a run
    of another configuration, or a term is not finite.
    """
    rank, ranks = (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)
    if config["accumulate"] % ranks:
        raise ValueError(f"{config['accumulate']} images an update cannot be spread evenly over {ranks} processes")
    scale = dict(zip(("perceptual", "texture"), config["style_scales"]))
    weights = {name: weight * scale.get(name, 1) for name, weight in LAMBDAS.items()
               if not any(name in WITHOUT[part] for part in config["without"])}
    mechanisms = {"f_shape": model.f_shape, "f_text": model.f_text, "f_bg": model.f_bg}
    optimizer = torch.optim.Adam([{"params": list(mechanism.parameters()), "lr": lr}
                                  for mechanism, lr in zip(mechanisms.values(), config["lr"])])
    parts = {**mechanisms, "optimizer": optimizer}
    first = continue_together(out, config, parts)
    share = config["accumulate"] // ranks
    started = time.time()

    for step in range(first, config["steps"]):
        begin = step * config["accumulate"] + rank * share
        for mechanism in mechanisms.values():
            mechanism.power_iteration()
        means = torch.zeros(len(weights) + 1, device=device)
        with model.f_shape.held(), model.f_text.held(), model.f_bg.held():
            for start in range(begin, begin + share, config["batch"]):
                part = range(start, min(start + config["batch"], begin + share))
                u, y, draws = (drawn.to(device) for drawn in draw_training(model, config["seed"], part, config["truncation"]))
                means += micro_step(model, teacher, style, u, y, draws, weights, config, len(part) / config["accumulate"])
                if step == first and start == begin + 2 * config["batch"] and not rank:
                    seconds = (time.time() - started) / 3 * share / config["batch"]
                    print(f"about {seconds / 60:.1f} minutes an update, {(config['steps'] - first) * seconds / 3600:.1f} hours in all")
        if ranks > 1:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:          # None where --without leaves a mechanism no loss
                        distributed.all_reduce(parameter.grad)
            distributed.all_reduce(means)
        row = {"step": step + 1, **dict(zip((*weights, "mask_mean"), means.tolist()))}
        wrong = [name for name, value in row.items() if not np.isfinite(value)]
        if wrong:
            raise ValueError(f"update {step + 1}: {', '.join(wrong)} is not finite; the last checkpoint is kept: try smaller --lrs")
        optimizer.step()
        optimizer.zero_grad()
        if rank:
            if stopping():
                raise KeyboardInterrupt
            continue
        done = step + 1
        rate = (done - first) / (time.time() - started)
        append_row(out / "log.jsonl", {**row, "updates_per_second": float(f"{rate:.3g}")})
        if done == first + 1:
            print(f"{rate:.2g} updates/s, {(config['steps'] - done) / rate / 3600:.2f} hours to go; a sheet every "
                  f"{config['sheet_every']} updates, beside checkpoint.pt, from which the same command continues")
        if not 0.1 <= row["mask_mean"] <= 0.9:
            print(f"update {done}: masks collapse, their mean is {row['mask_mean']:.3f} (appendix G: 0.1 .. 0.9)")
        if sys.stdout.isatty():
            print(f"\rupdate {done}/{config['steps']}  {(config['steps'] - done) / rate / 3600:.1f} h left  mask mean "
                  f"{row['mask_mean']:.2f} ", end="", flush=True)
        if done % config["sheet_every"] == 0 or done == config["steps"]:
            path = out / f"sheet-{done:06d}.png"
            save_imagenet_sheet(model, teacher, config["names"], path, config["seed"])
            print(f"{chr(13) if sys.stdout.isatty() else ''}update {done}: {time.time() - started:.0f} s, {path}")
            if classifier is not None:
                score = inception_score(model, classifier, config["scored"], config["truncation"], config["seed"], config["batch"])
                append_row(out / "log.jsonl", {"step": done, "inception_score": score})
                print(f"update {done}: Inception Score {score:.2f} of {config['scored']} images")
        if done % config["sheet_every"] == 0 or done == config["steps"] or stopping():
            save_state(out / "checkpoint.pt", {"config": config, "step": done,      # last: what is logged after it would be lost
                                          **{name: part.state_dict() for name, part in parts.items()}})
        if stopping():
            raise KeyboardInterrupt


def _update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    with torch.no_grad():
        for old, new in zip(average.state_dict().values(), model.state_dict().values()):
            if old.is_floating_point():
                old.lerp_(new, 1 - decay)


def continue_run(out: Path, config: dict, parts: dict, write: bool = True) -> int:
    """Load the checkpoint in `out`, if there is one, into `parts`; cut the log back to it (`write`); return its step.

    Raises ValueError where the log or the checkpoint is another run's.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: choose another --out, for a folder")
    out.mkdir(parents=True, exist_ok=True)
    path, log = out / "checkpoint.pt", out / "log.jsonl"
    rows, state, asked = read_lines(log), read_checkpoint(path) if path.exists() else None, json.loads(json.dumps(config))
    for held in (*rows[:1], *([json.loads(json.dumps(state["config"]))] if state else ())):
        if held != asked:
            changed = [key for key in {**asked, **held} if held.get(key) != asked.get(key)]
            raise ValueError(f"{out} holds a run with another {', '.join(changed)}: choose another --out, or the same options "
                             "to continue it")
    if not state:
        if write:
            mnist_variants.write_file(log, (json.dumps(config) + "\n").encode())
        return 0
    for name, part in parts.items():
        part.load_state_dict(state[name])
    if write:
        kept = [row for row in rows[1:] if row.get("step", 0) <= state["step"]]
        mnist_variants.write_file(log, "".join(json.dumps(row) + "\n" for row in (config, *kept)).encode())
        print(f"continuing {out} at step {state['step']}")
    return state["step"]


def continue_together(out: Path, config: dict, parts: dict) -> int:
    """`continue_run` in each process of a group, if there is one; only rank 0 writes. ValueError where they find other steps."""
    if not distributed.is_initialized():
        return continue_run(out, config, parts)
    for turn in (0, 1):                                                             # rank 0 first
        if (distributed.get_rank() > 0) == turn:
            first = continue_run(out, config, parts, write=turn == 0)
        distributed.barrier()
    found = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, first)
    if len(set(found)) > 1:
        raise ValueError(f"the processes find checkpoints of steps {', '.join(map(str, found))} in {out}: it must be a folder that all of "
                         "their machines share")
    return first


def read_lines(path: Path) -> list[dict]:
    """The objects of a file of JSON lines; none where there is no file. Raises ValueError where a line is no such object."""
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines() if path.exists() else ()):
        try:
            rows.append(json.loads(line))
        except ValueError:
            rows.append(None)
        if not isinstance(rows[-1], dict) or not isinstance(rows[-1].get("step", 0), int):
            raise ValueError(f"{path}, line {number + 1}, is damaged: remove that line")
    return rows


def append_row(path: Path, row: dict) -> None:
    """Append a line of JSON, all of it or nothing. Raises OSError."""
    line = (json.dumps(row) + "\n").encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab", buffering=0) as file:
            size = file.tell()
            if file.write(line) < len(line):                # a disk that is nearly full takes a part
                file.truncate(size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        raise OSError(f"{path} could not be written ({error.strerror}): make room; what was written before is intact") from None


def save_state(path: Path, state: dict) -> None:
    """torch.save, atomically. Raises OSError."""
    mnist_variants.write_file(path, partial(torch.save, state))


def to_float(images: torch.Tensor) -> torch.Tensor:
    """uint8 images 0..255 -> float images -1..1, channels last."""
    return images.float().div(127.5).sub(1).contiguous(memory_format=torch.channels_last)


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """float images -1..1 -> uint8 images 0..255, never stretched by their own minimum and maximum."""
    return images.float().mul(127.5).add(127.5).round().clamp(0, 255).byte()


# ---------------------------------------------------------------------------------------------------------------- sampling

def read_checkpoint(source: Union[str, os.PathLike]) -> dict:
    """The content of a checkpoint; ValueError where the file is not one. Nothing in the file can run code."""
    try:
        state = torch.load(source, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(source))
        if {"config", "step"} <= state.keys():
            return state
        if any(key.startswith(("f_shape.", "module.f_shape.")) for key in state):   # the authors' cgn.pth, one flat dict
            parts = {}
            for key, value in state.items():
                part, key = key.removeprefix("module.").split(".", 1)
                parts.setdefault(part, {})[key] = value
            return {"config": {"model": "imagenet", "align_corners": True}, "step": 0, **parts}
        reason = "it holds something else"
    except FileNotFoundError:
        raise ValueError(f"{source} does not exist: train first, e.g. python cgn.py --dataset colored") from None
    except Exception as error:          # whatever a hostile or broken file makes the reader raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    raise ValueError(f"{source} is no checkpoint of cgn.py ({reason}): name the checkpoint.pt of a run")


def load(source: Union[str, os.PathLike], saliency: Union[str, os.PathLike, None] = None) -> Union[MnistCGN, MnistGAN, ImagenetCGN]:
    """The generator of a checkpoint (of MNIST's the averaged one), or of the authors' cgn.pth, frozen, in eval mode.

    saliency: the file of U-2-Net, where it is not where an ImageNet checkpoint says. `.config` is its run's configuration,
    `.truncation` that of the noise it was trained on. Raises ValueError for a file that is none, or does not fit its
    configuration.
    """
    state = read_checkpoint(source)
    try:
        if state["config"]["model"] == "imagenet":
            held = {name: dict(state[name]) for name in ("f_shape", "f_text", "f_bg", "u2net") if name in state}
            if "u2net" not in held:
                held["u2net"] = u2net.find_weights(WEIGHTS / (saliency or state["config"]["networks"]["saliency"]))
            model = ImagenetCGN(biggan.load(held["f_shape"]), biggan.load(held["f_text"]), biggan.load(held["f_bg"]),
                                u2net.load(held["u2net"], align_corners=state["config"]["align_corners"]))
        else:
            model = build(state["config"]).to(memory_format=torch.channels_last)
            model.load_state_dict(state["average"])
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{source} does not fit its own configuration ({str(error).splitlines()[0]})") from None
    model.config, model.step, model.truncation = state["config"], state["step"], state["config"].get("truncation", 1.0)
    return model.eval()


def export(source: Union[str, os.PathLike], teacher: Union[str, os.PathLike, None] = None) -> dict:
    """An ImageNet checkpoint as one flat state dict in the layout of the authors' cgn.pth, U-2-Net and teacher (by default the
    training's) included. Raises ValueError for any other checkpoint."""
    state = read_checkpoint(source)
    config = state["config"] if isinstance(state["config"], dict) else {}
    networks = config.get("networks")
    if config.get("model") != "imagenet" or not isinstance(networks, dict):
        raise ValueError(f"{source} is no checkpoint of --dataset imagenet: the authors' layout is ImageNet's")
    teacher = biggan.find_weights(teacher or WEIGHTS / networks.get("teacher", PAPER["teacher"]))
    saliency = u2net.find_weights(WEIGHTS / networks.get("saliency", PAPER["saliency"]))
    parts = {"biggan_GT": biggan.load(teacher, frozen=False).state_dict(),
             "u2net": u2net.load(saliency, frozen=False).state_dict(),
             **{name: state[name] for name in ("f_shape", "f_text", "f_bg")}}
    return {f"{part}.{key}": value for part, held in parts.items() for key, value in held.items()}


def draw(model, seed: int, indices: range, per_shape: int = 1, truncation: float = 1.0):
    """Noise u (3, N, Z), labels y (3, N) and arrangements (N, 2, 100) of the counterfactuals `indices`.

    Image i takes them from rng(seed, i) in this order; the shape's u and label come from the first image of its group of
    `per_shape` (section 2.2: fix u, draw the other mechanisms again; 1 gives interventional images, section 2.3). An ImageNet
    CGN's noise is cut at -2 and 2 and scaled by `truncation`, and there is nothing to arrange: (N, 0).
    """
    def draw_one(index: int):
        generator = rng(seed, index)
        if isinstance(model, ImagenetCGN):
            return draw_truncated(generator, 3, model.noise, truncation).numpy(), generator.integers(model.classes, size=3), ()
        return (generator.standard_normal((3, model.noise), dtype=np.float32), generator.integers(model.classes, size=3),
                draw_arrangement(generator, 1, model.shuffle)[0])

    u, y, arrangement = zip(*(draw_one(index) for index in indices))
    u, y = np.stack(u, 1), np.stack(y, 1)
    for place, index in enumerate(indices):
        if index % per_shape:
            u[0, place], y[0, place] = (u[0, place - 1], y[0, place - 1]) if place else (
                part[0] for part in draw_one(index - index % per_shape)[:2])
    return torch.from_numpy(u), torch.from_numpy(y), torch.from_numpy(np.array(arrangement))


@torch.no_grad()
def counterfactual_batch(model, seed: int, part: range, per_shape: int = 10, truncation: float = 1.0,
                         batch: Optional[int] = None) -> tuple[Sample, torch.Tensor]:
    """The counterfactuals `part`, N of them, and their labels (3, N): what `draw` gives, each mask made once. An ImageNet CGN
    makes `batch` textures at a time, by default all."""
    device = next(model.parameters()).device
    gan = isinstance(model, MnistGAN)
    u, y, arrangement = (drawn.to(device) for drawn in draw(model, seed, part, 1 if gan else per_shape, truncation))
    if gan:
        return model(u[0], y[0]), y[:1].expand(3, -1).cpu()
    groups = torch.arange(part.start, part.stop, device=device) // per_shape
    _, inverse, counts = groups.unique_consecutive(return_inverse=True, return_counts=True)
    first = counts.cumsum(0) - counts
    if isinstance(model, ImagenetCGN):
        def make(mechanism: nn.Module, u: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return torch.cat([mechanism(*chunk, truncation) for chunk in zip(u.split(batch or len(u)), y.split(batch or len(u)))])

        m = make(lambda *chunk: model.saliency(model.f_shape(*chunk)), u[0, first], y[0, first])
        f, b = make(model.f_text, u[1], y[1]), make(model.f_bg, u[2], y[2])
    else:
        weights = F.one_hot(y, model.classes).float()
        m = model.f_shape(u[0, first], weights[0, first])
        f, b = model.f_text(u[1], weights[1], arrangement[:, 0]), model.f_bg(u[2], weights[2], arrangement[:, 1])
    return Sample(m[inverse], f, b, compose(m[inverse], f, b)), y.cpu()


def counterfactuals(model, count: int, seed: int = 0, per_shape: int = 10, batch: int = 100) -> mnist_variants.Variant:
    """`count` counterfactual images with the label of each mechanism, `per_shape` of them sharing one shape.

    A pure function of (weights, seed, index): image i does not depend on `count`, nor, to float error, on `batch`.
    From a GAN, which has no mechanisms, the images are plain samples, and the three labels agree.
    Raises ValueError for a count or per_shape below 1.
    """
    _check_counts(count, per_shape)
    images = torch.empty(count, 3, mnist_variants.SIZE, mnist_variants.SIZE, dtype=torch.uint8)
    labels = torch.empty(3, count, dtype=torch.long)
    for start in range(0, count, batch):
        part = range(start, min(start + batch, count))
        sample, labels[:, part.start:part.stop] = counterfactual_batch(model, seed, part, per_shape)
        images[part.start:part.stop] = to_uint8(sample.image)
    return mnist_variants.Variant(images, *labels)


def _check_counts(count: int, per_shape: int) -> None:
    if count < 1 or per_shape < 1:
        raise ValueError(f"{count} images with {per_shape} per shape: both must be at least 1")


def write_counterfactuals(model, out: Path, count: int, seed: int = 0, per_shape: int = 10, truncation: float = 1.0,
                          batch: int = 10, parts: Sequence[str] = ()) -> None:
    """Write counterfactuals as a folder: 00000000.png and so on, and labels.csv when all are there.

    parts: of mask, foreground and background, what is written as well: 00000000-mask.png and so on.

    The processes of a group share the work; what an interrupted run has written is not made again. Raises ValueError for a
    count or per_shape below 1 and for a folder that holds images of other settings.
    """
    _check_counts(count, per_shape)
    rank, ranks = (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)
    out.mkdir(parents=True, exist_ok=True)
    settings = {"seed": seed, "per_shape": per_shape, "truncation": truncation, "step": model.step, "run": model.config}
    held = out / "settings.json"
    if held.exists():
        if json.loads(held.read_text()) != json.loads(json.dumps(settings)):
            raise ValueError(f"{out} holds counterfactuals of another checkpoint, seed, --per-shape or --truncation: choose another --out")
    elif rank == 0:
        mnist_variants.write_file(held, json.dumps(settings).encode())
    groups = -(-batch // per_shape) * per_shape                                     # whole groups: a mask is made once
    for start in range(rank * groups, count, ranks * groups):
        part = range(start, min(start + groups, count))
        paths = {name: [out / f"{index:08d}{'' if name == 'image' else '-' + name}.png" for index in part] for name in ("image", *parts)}
        if all(path.exists() for row in paths.values() for path in row):
            continue
        sample, _ = counterfactual_batch(model, seed, part, per_shape, truncation, batch)
        for name, row in paths.items():
            pictures = getattr(sample, name) * 2 - 1 if name == "mask" else getattr(sample, name)
            for path, picture in zip(row, to_uint8(pictures).cpu()):
                mnist_variants.save_png(path, F_image.to_pil_image(picture))
    if ranks > 1:
        distributed.barrier()
    if rank == 0:
        rows = ["file,seed,u,shape,texture,background"]
        for start in range(0, count, 1000):
            part = range(start, min(start + 1000, count))
            labels = draw(model, seed, part, per_shape, truncation)[1].T.tolist()
            rows += [f"{index:08d}.png,{seed},{index - index % per_shape},{','.join(map(str, row))}" for index, row in zip(part, labels)]
        mnist_variants.write_file(out / "labels.csv", ("\n".join(rows) + "\n").encode())


@torch.no_grad()
def interpolate(model, what: str, seed: int = 0, rows: int = 10, columns: int = 10, truncation: float = 1.0) -> torch.Tensor:
    """Images (rows, columns, 3, H, W) uint8: u and class weights move linearly from one draw to another (Figures 20-22).

    what: the mechanism that moves (shape, texture or background), or all; the others stay. ValueError for anything else.
    """
    if what not in (*MECHANISMS, "all"):
        raise ValueError(f"cannot interpolate {what!r}: choose one of {', '.join(MECHANISMS)}, all")
    device = next(model.parameters()).device
    u, y, arrangement = (drawn.to(device) for drawn in draw(model, seed, range(2 * rows), truncation=truncation))
    y = F.one_hot(y, model.classes).float()
    moving = [mechanism == what or what == "all" for mechanism in MECHANISMS]
    result = []
    for row in range(rows):
        begin, end = 2 * row, 2 * row + 1
        for blend in torch.linspace(0, 1, columns, device=device):
            u_k, y_k = [[torch.lerp(part[k, begin], part[k, end], blend * moving[k])[None] for k in range(3)] for part in (u, y)]
            last = truncation if isinstance(model, ImagenetCGN) else arrangement[begin, None]
            result.append(to_uint8(model(u_k, y_k, last).image[0]).cpu())
    return torch.stack(result).unflatten(0, (rows, columns))


@torch.no_grad()
def outputs(model: ImagenetCGN, label: int, seed: int = 0, columns: int = 6, truncation: float = 0.5) -> torch.Tensor:
    """What each mechanism makes of one class (Figures 8-19): (5, columns, 3, R, R) uint8: pre-mask, m, f, b, x_gen."""
    result = []
    for index in range(columns):
        u = draw_truncated(rng(seed, index), 1, model.noise, truncation).to(next(model.parameters()).device)
        sample = model(u, torch.tensor([label], device=u.device), truncation)
        result.append(_steps_of(sample))
    return to_uint8(torch.stack(result, 1)).cpu()


def _steps_of(sample: Sample) -> torch.Tensor:
    """Pre-mask, m, f, b and x_gen of one draw, (5, 3, R, R)."""
    return torch.cat([sample.pre_mask, (sample.mask * 2 - 1).expand(-1, 3, -1, -1), *sample[1:4]])


@torch.no_grad()
def triples(model: ImagenetCGN, labels: Sequence[Sequence[int]], seed: int = 0, columns: int = 4, truncation: float = 0.5
            ) -> torch.Tensor:
    """Counterfactuals of given (shape, texture, background) classes (Figures 4 and 24): (rows, columns, 3, R, R) uint8."""
    result = []
    for row in labels:
        for index in range(columns):
            u = draw_truncated(rng(seed, index), 3, model.noise, truncation).to(next(model.parameters()).device)
            y = torch.tensor(row, device=u.device)[:, None]
            result.append(to_uint8(model(tuple(u[:, None]), tuple(y), truncation).image[0]).cpu())
    return torch.stack(result).unflatten(0, (len(labels), columns))


@torch.no_grad()
def save_imagenet_sheet(model: ImagenetCGN, teacher: biggan.BigGAN, names: list[str], path: Path, seed: int) -> None:
    """Labelled PNG of one fixed u for each of eight classes: pre-mask, m, f, b, x_gen and the teacher's x_gt (Figures 5, 25-29)."""
    device = next(model.parameters()).device
    shown = torch.linspace(0, model.classes - 1, min(model.classes, SHEET_ROWS)).long()
    rows = []
    for label in shown:
        u = draw_truncated(rng(seed, int(label)), 1, model.noise, SHEET_TRUNCATION).to(device)
        y = label[None].to(device)
        rows.append(torch.cat([_steps_of(model(u, y, SHEET_TRUNCATION)), teacher(u, y, SHEET_TRUNCATION)]))
    mnist_variants.save_sheet(path, to_uint8(torch.stack(rows)).cpu(), [names[label] for label in shown],
                              ["pre-mask", "m", "f", "b", "x_gen", "x_gt"], scale=max(1, 64 // model.resolution))


def save_gif(path: Path, images: torch.Tensor) -> None:
    """An animation, written atomically: images (rows, frames, 3, H, W) uint8, the rows side by side, there and back again."""
    frames = [F_image.to_pil_image(frame.permute(1, 2, 0, 3).flatten(2)) for frame in images.transpose(0, 1)]
    mnist_variants.write_file(path, partial(frames[0].save, format="GIF", save_all=True, append_images=frames[1:] + frames[-2:0:-1],
                                            duration=100, loop=0))


@torch.no_grad()
def save_training_sheet(model, names: list[str], path: Path, seed: int) -> None:
    """Labelled PNG, a row a class: m, f, b and x_gen of the same draws, then counterfactuals with that class's shape."""
    device = next(model.parameters()).device
    classes, shown = min(model.classes, 10), 3
    u, y, arrangement = draw(model, seed, range(classes * SHEET_COLUMNS))
    y[0] = torch.arange(classes).repeat_interleave(SHEET_COLUMNS)
    u, y, arrangement = u.to(device), y.to(device), arrangement.to(device)

    def grid(images):
        return to_uint8(images).cpu().unflatten(0, (classes, SHEET_COLUMNS))

    plain = model(tuple(u), y[0], arrangement)
    if isinstance(model, MnistGAN):
        mnist_variants.save_sheet(path, grid(plain.image), names[:classes], ["x_gen"] * SHEET_COLUMNS)
        return
    pictures = {"m": (plain.mask * 2 - 1).expand(-1, 3, -1, -1), "f": plain.foreground, "b": plain.background,
                "x_gen": plain.image}
    blocks = [grid(images)[:, :shown] for images in pictures.values()]
    blocks.append(grid(model(tuple(u), tuple(y), arrangement).image))
    columns = [name for name in pictures for _ in range(shown)] + ["counterfactuals"] * SHEET_COLUMNS
    mnist_variants.save_sheet(path, torch.cat(blocks, 1), names[:classes], columns)


# -------------------------------------------------------------------------------------------------------------------- data

def load_images(dataset: str, *, seed: int = 0, textures: Optional[str] = None, mnist: str = "data/mnist",
                variance: float = mnist_variants.COLOR_VARIANCE) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Training images (N, 3, 32, 32) uint8, labels (N,) long and class names of an MNIST variant or of a labelled folder.

    A folder holds one subfolder a class; pictures are scaled so that the shorter side has 32 pixels and cut to the middle.
    Raises ValueError for a name that is neither, an empty folder and, by its name, a picture that does not open.
    """
    if dataset in mnist_variants.NAMES:
        data = mnist_variants.load(dataset, "train", seed=seed, textures=textures, variance=variance, root=mnist)
        return data.images, data.shape, [f"digit {digit}" for digit in range(10)]
    if not Path(dataset).is_dir():
        raise ValueError(f"unknown data set {dataset!r}: choose {', '.join(mnist_variants.NAMES)}, or a folder with one "
                         "subfolder a class")
    try:
        folder = PictureFolder(dataset)
        pictures = [F_image.center_crop(F_image.resize(picture, mnist_variants.SIZE), mnist_variants.SIZE)
                    for picture, _ in folder]
    except OSError as error:
        raise ValueError(f"{dataset} cannot be read ({error}): it needs one subfolder a class, with pictures in each") from None
    images = torch.stack([F_image.pil_to_tensor(picture) for picture in pictures])
    return images, torch.tensor(folder.targets), folder.classes


class PictureFolder(ImageFolder):
    """torchvision's, without hidden files and folders, and with pictures as they are meant to be seen (`u2net.open_photo`)."""

    def __init__(self, folder: str):
        super().__init__(folder, loader=partial(u2net.open_photo, smallest=1), is_valid_file=lambda path:
                         has_file_allowed_extension(path, IMG_EXTENSIONS) and not os.path.basename(path).startswith("."))

    def find_classes(self, directory: Union[str, os.PathLike]) -> tuple[list[str], dict[str, int]]:
        names = class_folders(directory)
        return names, {name: label for label, name in enumerate(names)}


def class_folders(folder: Union[str, os.PathLike]) -> list[str]:
    """The names of the subfolders, sorted: the classes. Raises FileNotFoundError for none."""
    return [name for name in find_classes(folder)[0] if not name.startswith(".")]


# ------------------------------------------------------------------------------------------------------------ command line

STEPS = {"colored": 4000, "double-colored": 4000, "wildlife": 8000}                     # a folder trains like wildlife
# Shape, texture and background of Figure 24's pictures, row by row: school bus, giant panda, geyser, and so on.
FIGURE_24 = ((779, 388, 974), (275, 486, 949), (15, 629, 983), (63, 409, 46), (751, 719, 952), (275, 461, 7), (235, 145, 133),
             (438, 439, 953), (63, 950, 815), (850, 441, 119), (225, 758, 888), (350, 881, 977), (604, 951, 93), (540, 407, 460),
             (947, 66, 9), (802, 930, 354), (484, 293, 74), (22, 949, 998), (873, 267, 30), (561, 854, 979), (907, 720, 970),
             (724, 869, 337), (833, 751, 958), (330, 607, 20), (849, 652, 429))
NETWORKS, WEIGHTS = ("teacher", "saliency", "style", "inception"), Path(__file__).parent / "weights"
# The schedule of --dataset imagenet: the paper's (C.3), and that of --mini for digits of 32 x 32 pixels. What an option
# gives goes before either. style_scales: of the weights of L_perc and L_text, since a narrow network's Gram matrices are larger.
PAPER = {"teacher": biggan.WEIGHTS, "saliency": "u2net.pth", "style": "vgg16_bn-6c64b313.pth", "steps": 300,
         "accumulate": 4000, "batch": 1, "lrs": (8e-6, 1e-5, 1e-5), "truncation": 1.0, "patch": 15, "style_scales": (1.0, 1.0),
         "sheet_every": 10, "scored": 5000, "inception": "inception_v3_google-0cc3c7bd.pth"}
MINI = {"teacher": "mini-teacher.pth", "saliency": "mini-saliency.pth", "style": "mini-style.pth", "steps": 200,
        "accumulate": 50, "batch": 50, "lrs": (6e-7, 1e-4, 6e-5), "truncation": 0.7, "patch": 4, "style_scales": (0.01, 0.05),
        "sheet_every": 100, "scored": 5000, "inception": "mini-classifier.pth"}


def parse_classes(text: str, classes: int, count: int) -> list[tuple[int, str]]:
    """`count` classes, numbers or ImageNet names with commas between, as (number, name). Raises ValueError."""
    chosen = [pair for word in text.split(",") for pair in biggan.class_numbers(word, classes).items()]
    if len(chosen) != count:
        raise ValueError(f"{text!r} names {len(chosen)} classes: {count} are needed{' (shape, texture, background)' * (count == 3)}")
    return chosen


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Train a Counterfactual Generative Network and draw counterfactual images.")
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")
    run = parser.add_argument_group("run")
    run.add_argument("--dataset", default="colored", help="colored, double-colored, wildlife, imagenet, or a folder with one "
                     "subfolder a class (default: %(default)s)")
    run.add_argument("--textures", help="wildlife: folder of DTD with the paper's textures (default: draw textures)")
    run.add_argument("--variance", type=float, default=mnist_variants.COLOR_VARIANCE, help="colored, double-colored: of an "
                     "image's colour around its class colour (default: %(default)s; authors' double-colored: 0.0001)")
    run.add_argument("--mnist", default="data/mnist", help="folder of MNIST's four .gz files (default: %(default)s)")
    run.add_argument("--model", choices=("cgn", "gan"), default="cgn", help="gan: the baseline without mechanisms")
    run.add_argument("--out", help="folder of the run, continued if it is there (default: runs/DATASET), or file to write")
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--device", default="cpu")
    run.add_argument("--threads", type=int, help="CPU threads, at most one a CPU (default: torch's choice)")
    run.add_argument("--dry-run", action="store_true", help="two training steps, written to a temporary folder")

    mechanisms = parser.add_argument_group("mechanisms (section 3.1)")
    mechanisms.add_argument("--shuffle", choices=SHUFFLES, default=SHUFFLES[0], help="how a texture's cells are "
                            "rearranged: cyclic shift (authors' code) or sliding puzzle (paper) (default: %(default)s)")
    mechanisms.add_argument("--margin", type=int, default=MARGIN, help="outermost pixels that are background by "
                            "construction, 0 for objects that touch the border (default: %(default)s)")

    imagenet = parser.add_argument_group("ImageNet (section 3, C.3)")
    imagenet.add_argument("--mini", action="store_true", help="ten digits of 32 x 32 pixels for the thousand classes: the same "
                          "training in minutes, with the networks of miniature.py")

    def default(name: str) -> str:
        return f"(default: {PAPER[name]}; --mini: {MINI[name]})"

    imagenet.add_argument("--accumulate", type=int, help=f"images of an update {default('accumulate')}")
    imagenet.add_argument("--lrs", type=float, nargs=3, metavar=("SHAPE", "TEXT", "BG"),
                          help=f"Adam, of each mechanism {default('lrs')}")
    imagenet.add_argument("--truncation", type=float, help=f"of the noise {default('truncation')}, of a checkpoint's images as in its "
                          "training; sheets 0.5")
    imagenet.add_argument("--patch", type=int, help=f"side of the texture loss's patches {default('patch')}")
    imagenet.add_argument("--relative-patch", action="store_true", help="patches that follow the object's size (appendix F): of "
                          "--patch pixels where it fills a quarter of the image")
    imagenet.add_argument("--without", nargs="+", choices=tuple(WITHOUT), default=(), help="losses to leave off (Table 1)")
    for name in NETWORKS:
        imagenet.add_argument(f"--{name}", metavar="FILE", help="file of a frozen network, by default in weights/, " + (
            "whose Inception Score is logged if it is there " if name == "inception" else "fetched where it is absent ") + default(name))

    training = parser.add_argument_group("training (appendix C)")
    training.add_argument("--steps", type=int, help=f"default: {STEPS['colored']}, wildlife and own pictures {STEPS['wildlife']},"
                          f" ImageNet {PAPER['steps']} updates, --mini {MINI['steps']}")
    training.add_argument("--batch", type=int, help=f"images at once (default: 64, ImageNet 1, --mini {MINI['batch']})")
    training.add_argument("--lr", type=float, default=4e-4, help="Adam, generator; the discriminator's is twice that")
    training.add_argument("--binary", type=float, default=0.3, help="weight of the mask's binary entropy")
    training.add_argument("--binary-warmup", type=int, default=1000, help="steps over which that weight rises from 0")
    training.add_argument("--color", type=float, default=10.0, help="weight of a class's mean colour in x_gen, like real "
                          "images', and in b, like their borders'")
    training.add_argument("--noise", type=float, default=0.4, help="standard deviation of the noise on what the discriminator "
                          "sees, fading to 0 (default: %(default)s)")
    training.add_argument("--adversarial", choices=("hinge", "relativistic"), help="default: hinge for the flat colours of "
                          "colored and double-colored, else relativistic")
    training.add_argument("--bf16", action="store_true", help="compute in bfloat16 where that is safe, in training and sampling: "
                          "about 1.4 times as fast on a CPU with AMX or AVX-512 BF16, ignored on one without")
    training.add_argument("--mask", type=float, default=10.0, help="weight of the mask interval")
    training.add_argument("--interval", type=float, nargs=2, default=(0.05, 0.4), metavar=("LOW", "HIGH"),
                          help="a mask's mean is kept in it (default: 0.05 0.4; paper: 0.1 0.9)")

    sampling = parser.add_argument_group("sampling from a trained checkpoint (section 3.2)")
    sampling.add_argument("--checkpoint", help="checkpoint.pt of a run")
    sampling.add_argument("--counterfactuals", type=int, metavar="N", help="write N counterfactual images and their labels "
                          "(ImageNet: a folder of PNG files and labels.csv)")
    sampling.add_argument("--per-shape", type=int, default=10, help="counterfactuals that share a shape (default: 10)")
    sampling.add_argument("--parts", nargs="+", choices=("mask", "foreground", "background"), default=(), help="ImageNet: what to "
                          "write beside each counterfactual: its mask, or its background with nothing on it")
    sampling.add_argument("--interpolate", choices=(*MECHANISMS, "all"), help="write a sheet of interpolations, or an "
                          "animation to an --out that ends in .gif")
    sampling.add_argument("--triples", nargs="+", metavar="SHAPE,TEXTURE,BACKGROUND", help="ImageNet: write a sheet of these "
                          "counterfactuals, numbers or names: 9,949,983; or the 25 of Figure 24: figure24")
    sampling.add_argument("--outputs", metavar="CLASS", help="ImageNet: write a sheet of what each mechanism makes of a class")
    sampling.add_argument("--export", action="store_true", help="ImageNet: write the authors' layout of one flat state dict")
    return parser


def main(argv: Optional[list[str]] = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        for name in ("steps", "batch", "threads", "accumulate", "binary_warmup"):
            if getattr(args, name) is not None and getattr(args, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
        if not 0 <= args.margin < mnist_variants.SIZE // 2:
            raise ValueError(f"--margin {args.margin}: must be in 0..{mnist_variants.SIZE // 2 - 1}, so that something is left inside")
        if set(args.without) == set(WITHOUT):
            raise ValueError(f"--without {' '.join(args.without)}: no loss is left")
        check_device(args.device)
        if not 0 <= args.seed < 2 ** 63:
            raise ValueError(f"--seed {args.seed}: must be in 0..2^63 - 1")
        if not 0 <= args.interval[0] < args.interval[1] <= 1:
            raise ValueError(f"--interval {args.interval[0]} {args.interval[1]}: two numbers in 0..1 are needed, the lower one first")
        if not args.lr > 0:
            raise ValueError(f"--lr {args.lr}: must be more than 0")
        for name in ("counterfactuals", "interpolate", "triples", "outputs", "export"):
            if getattr(args, name) not in (None, False) and not args.checkpoint:
                raise ValueError(f"--{name} draws from a trained CGN: name its --checkpoint")
        given = [name for name in ("lr", "mask", "binary", "color", "noise", "interval", "shuffle", "margin", "adversarial", "model",
                                   "textures") if getattr(args, name) != parser.get_default(name)]
        if args.dataset == "imagenet" and given:
            raise ValueError(f"--{given[0]} goes with the MNIST variants and own pictures, not with imagenet (rates: --lrs)")
        for name in ("mini", "accumulate", "lrs", "patch", "relative_patch", "without"):
            if getattr(args, name) and args.dataset != "imagenet" and not args.checkpoint:
                raise ValueError(f"--{name.replace('_', '-')} goes with --dataset imagenet, not with {args.dataset}")
        if args.threads:
            torch.set_num_threads(min(args.threads, os.cpu_count()))
        args.bf16 = bf16_pays(args.bf16, args.device)
        if args.checkpoint:
            _sample_main(args)
        else:
            run = _imagenet_main if args.dataset == "imagenet" else _train_main
            name = Path(args.dataset).resolve().name + ("-gan" if args.model == "gan" else "")
            with tempfile.TemporaryDirectory() as folder:
                run(args, Path(folder) if args.dry_run else Path(args.out or f"runs/{name}"))
            if args.dry_run:
                print("dry run finished; nothing is kept")
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except RuntimeError as error:
        parser.error(lost_process(error))
    except KeyboardInterrupt:
        parser.exit(130, "\nstopped: the same command continues from the last checkpoint\n")


def _train_main(args: argparse.Namespace, out: Path) -> None:
    images, labels, names = load_images(args.dataset, seed=args.seed, textures=args.textures, mnist=args.mnist,
                                        variance=args.variance)
    flat = args.dataset in ("colored", "double-colored")
    relativistic = not flat if args.adversarial is None else args.adversarial == "relativistic"
    config = {"steps": STEPS.get(args.dataset, STEPS["wildlife"]), "batch": 64, "relativistic": relativistic,
              "log_every": 50, "sheet_every": SHEET_EVERY, "names": names, "images": len(images)}
    for key in ("dataset", "textures", "variance", "model", "seed", "shuffle", "margin", "steps", "batch", "lr", "binary",
                "binary_warmup", "mask", "interval", "color", "noise", "bf16"):
        if getattr(args, key) is not None or key == "textures":
            config[key] = getattr(args, key)
    if args.dry_run:
        config["steps"] = 2
    print(f"{args.model.upper()} on {args.dataset}: {len(images)} images, {len(names)} classes; {config['steps']} steps of "
          f"{config['batch']} images, seed {args.seed}; torch {torch.__version__}, {torch.get_num_threads()} threads, {args.device}; "
          f"writing to {out}")
    train(config, images, labels, out, args.device)
    if not args.dry_run:
        print(f"done: open the last sheet in {out}; next: python cgn.py --checkpoint {out / 'checkpoint.pt'} "
              "--counterfactuals 100000")


def check_device(name: str) -> None:
    """Raises ValueError for a device that torch does not know, and for a GPU that is not here."""
    try:
        torch.zeros(1, device=name).item()
    except Exception:                       # each kind of device has errors of its own
        raise ValueError(f"--device {name}: torch finds no such device here: choose cpu, or cuda where there is a GPU for it") from None
    if name == "cpu" and torch.cuda.is_available():
        print("computing on the CPU; there is a GPU: --device cuda is faster")


def bf16_pays(wanted: bool, device: str) -> bool:
    """Whether to compute in bfloat16: if it is `wanted`, but not on a CPU that only emulates it, where a convolution takes
    ten times as long as in float32; then a line says so."""
    if not wanted:
        return False
    if device.startswith("cuda"):
        pays = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        pays = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if not pays:
        print(f"--bf16: this {device} has no instructions for bfloat16; computing in float32, which is faster here")
    return pays


def lost_process(error: RuntimeError) -> str:
    """What to say where another process of the group has ended; other errors are raised again."""
    if not distributed.is_initialized() or not re.search("onnection|NCCL|gloo|pipe", str(error)):
        raise error
    return f"another process of the run has ended ({str(error).splitlines()[0]}); the last checkpoint is kept: the same command continues"


def join_group(args: argparse.Namespace) -> None:
    """Join the other processes where torchrun has started this one, each with a GPU of its own."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        if args.device == "cuda":
            args.device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(args.device)
        distributed.init_process_group("nccl" if args.device.startswith("cuda") else "gloo")


def _imagenet_main(args: argparse.Namespace, out: Path) -> None:
    join_group(args)
    device, schedule = args.device, MINI if args.mini else PAPER
    for name, value in schedule.items():
        if getattr(args, name, value) is None:
            setattr(args, name, value)
        elif name in NETWORKS:
            path = Path(getattr(args, name))
            setattr(args, name, str(path.resolve()) if path.exists() or not (WEIGHTS / path).exists() else str(path))
    if args.dry_run:
        teacher, saliency, style = random_networks()
        args.steps = args.accumulate = 2
    else:
        found, missing = [], []
        for find, name in ((biggan.find_weights, args.teacher), (u2net.find_weights, args.saliency), (biggan.find_weights, args.style)):
            try:
                found.append(find(WEIGHTS / name))
            except ValueError as error:
                missing.append(str(error))
        if missing:
            remedy = ("python miniature.py teacher saliency style classifier makes the networks of --mini" if args.mini else
                      "--mini runs now, with networks that are here")
            raise ValueError(". ".join([*missing, remedy]))
        teacher, saliency, style = *found[:2], biggan.read_state(found[2])
    model = ImagenetCGN(*(biggan.load(teacher, frozen=False) for _ in range(3)), u2net.load(saliency)).to(device)
    names = list(biggan.class_numbers(",".join(map(str, range(model.classes))), model.classes).values())
    config = {"model": "imagenet", "dataset": args.dataset, "names": names, "seed": args.seed, "align_corners": False,
              "steps": args.steps, "batch": args.batch, "accumulate": args.accumulate, "lr": list(args.lrs), "truncation": args.truncation,
              "patch": min(args.patch, model.resolution // 2), "without": list(args.without), "bf16": args.bf16,
              "networks": {name: getattr(args, name) for name in NETWORKS}, "sheet_every": schedule["sheet_every"],
              "scored": schedule["scored"], "style_scales": list(schedule["style_scales"]), "relative_patch": args.relative_patch}
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"CGN on {args.dataset}: {model.classes} classes, {model.resolution} x {model.resolution} pixels; {config['steps']} "
              f"updates of {config['accumulate']} images, {config['batch']} at a time, seed {args.seed}; torch {torch.__version__}, "
              f"{torch.get_num_threads()} threads, {device}; writing to {out}", flush=True)
    scoring = WEIGHTS / args.inception
    wanted = scoring.exists() or args.inception != schedule["inception"]
    classifier = read_classifier(biggan.find_weights(scoring)).to(device) if wanted and not args.dry_run else None
    train_imagenet(config, model, biggan.load(teacher).to(device), StyleFeatures(style).to(device), out, device, classifier)
    if not args.dry_run and int(os.environ.get("RANK", 0)) == 0:
        print(f"done: open the last sheet in {out}; next: python cgn.py --checkpoint {out / 'checkpoint.pt'} "
              "--counterfactuals 1000 --out counterfactuals")


def random_networks(classes: int = 10, width: int = 16) -> tuple[dict, dict, dict]:
    """State dicts of a BigGAN of 32 x 32 pixels, a U-2-Net and VGG16's features, tiny and random: to try the training with."""
    teacher = biggan.BigGAN([(width, width)] * 6, None, classes, 8, 8)
    saliency = u2net.U2Net(((3, 4, 8),) + ((8, 4, 8),) * 5 + ((16, 4, 8),) * 5)
    layout = [layer for count in STYLE_CONVS for layer in [4] * count + ["M"]]
    style = nn.Module()
    style.features = make_layers(layout, batch_norm=True)
    return teacher.state_dict(), saliency.state_dict(), style.state_dict()


def _sample_main(args: argparse.Namespace) -> None:
    if args.export:
        out = Path(args.out or "cgn.pth")
        save_state(out, export(args.checkpoint, args.teacher))
        print(f"wrote {out}")
        return
    join_group(args)
    model = load(args.checkpoint, args.saliency).to(args.device)
    with torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.bf16):
        print(f"wrote {_draw_main(args, model)}")


def _draw_main(args: argparse.Namespace, model) -> Path:
    """Draw what the options ask for, and return where it was written."""
    imagenet = isinstance(model, ImagenetCGN)
    truncation = model.truncation if args.truncation is None else args.truncation
    if args.interpolate:
        out = Path(args.out or f"interpolate-{args.interpolate}.png")
        images = interpolate(model, args.interpolate, args.seed, *((4, 8) if imagenet else (10, 10)), truncation)
        if out.suffix == ".gif":
            save_gif(out, images)
        else:
            mnist_variants.save_sheet(out, images, [f"pair {row}" for row in range(len(images))],
                                      [f"{args.interpolate}: from left to right"] * images.shape[1], 1 if imagenet else 2)
    elif args.counterfactuals is not None and imagenet:
        out = Path(args.out or "counterfactuals")
        write_counterfactuals(model, out, args.counterfactuals, args.seed, args.per_shape, truncation, args.batch or 10, args.parts)
    elif args.counterfactuals is not None:
        out = Path(args.out or "counterfactuals.pt")
        if args.parts:
            raise ValueError(f"--parts {' '.join(args.parts)}: {args.checkpoint} is no CGN of ImageNet; leave it off")
        if out.name == "checkpoint.pt":
            raise ValueError(f"--out {out}: this is the name of a run's checkpoint, which would be lost; choose another")
        data = counterfactuals(model, args.counterfactuals, args.seed, args.per_shape)
        save_state(out, {**data._asdict(), "names": model.config["names"], "seed": args.seed, "per_shape": args.per_shape})
    elif (args.triples or args.outputs) and imagenet:
        truncation = SHEET_TRUNCATION if args.truncation is None else args.truncation
        scale = max(1, 64 // model.resolution)
        if args.outputs:
            out = Path(args.out or "outputs.png")
            (label, name), = parse_classes(args.outputs, model.classes, 1)
            images = outputs(model, label, args.seed, truncation=truncation)
            mnist_variants.save_sheet(out, images, ["pre-mask", "m", "f", "b", "x_gen"], [name] * images.shape[1], scale)
        else:
            out = Path(args.out or "triples.png")
            texts = [",".join(map(str, row)) for row in FIGURE_24] if args.triples == ["figure24"] else args.triples
            chosen = [parse_classes(text, model.classes, 3) for text in texts]
            images = triples(model, [[label for label, _ in row] for row in chosen], args.seed, truncation=truncation)
            mnist_variants.save_sheet(out, images, [" / ".join(name for _, name in row) for row in chosen],
                                      ["shape / texture / background"] * images.shape[1], scale)
    else:
        raise ValueError("--checkpoint needs --counterfactuals N, --interpolate MECHANISM or, of ImageNet, --triples, --outputs "
                         "or --export")
    return out


if __name__ == "__main__":
    main()
