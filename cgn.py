"""Counterfactual Generative Networks (Sauer & Geiger, ICLR 2021) on the MNIST variants.

An image is made by independent mechanisms, each with its own noise u and its own class label y, and a fixed composer
(equation 2; appendix B):

    m = f_shape(y_1, u_1)     f = f_text(y_2, u_2)     b = f_bg(y_3, u_3)     x_gen = m * f + (1 - m) * b

Trained with one label for all three, against real images only (section 3.1: adversarial loss, nothing pre-trained); sampled
with a label for each, it draws images that no data set holds, and classifiers learn from them which part is which.

    python cgn.py --dataset colored                                        # train; sheets and checkpoint in runs/colored
    python cgn.py --checkpoint runs/colored/checkpoint.pt --counterfactuals 100000 --out colored-counterfactuals.pt

Glossary (N images, C classes, Z noise dimensions):
    u        noise                      (N, Z)          standard normal
    y        label or class weights     (N,) / (N, C)   long in 0..C-1 / float
    m        mask                       (N, 1, 32, 32)  0 background .. 1 object
    f, b     foreground, background     (N, 3, 32, 32)  -1 .. 1
    x, x_gen real, composite image      (N, 3, 32, 32)  -1 .. 1
"""
import argparse
import io
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple, Optional, Union

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch.nn.utils.parametrizations import spectral_norm
from torchvision.datasets import ImageFolder
from torchvision.transforms import functional as F_image

import biggan
import mnist_variants

NOISE = 32                  # dimensions of u (authors' code)
CELLS = 10                  # a texture starts as 10 x 10 cells; unpadded convolutions make 32 x 32 pixels of them
PATCH = 2                   # the sliding puzzle moves patches of 2 x 2 cells, about 8 x 8 pixels
MARGIN = 2                  # outermost pixels that are background by construction: see ShapeMechanism
ENTROPY_CLAMP = 1e-4        # masks are clamped to [1e-4, 1 - 1e-4] inside the logarithm (authors' code)
AVERAGE = 0.999             # decay of the averaged generator that all samples are drawn from

SHEET_EVERY, SHEET_COLUMNS = 500, 8
MECHANISMS = ("shape", "texture", "background")


class Sample(NamedTuple):
    """What a CGN makes: mask (N, 1, H, W) in [0, 1]; foreground, background and image (N, 3, H, W) in [-1, 1]."""
    mask: torch.Tensor
    foreground: torch.Tensor
    background: torch.Tensor
    image: torch.Tensor


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


def discriminator_loss(real: torch.Tensor, fake: torch.Tensor) -> torch.Tensor:
    """Hinge loss of the discriminator's scores (N,) for real and generated images: pushes them beyond +1 and -1."""
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


def generator_loss(fake: torch.Tensor) -> torch.Tensor:
    """The generator's side of the hinge loss: raise the discriminator's scores (N,) of generated images."""
    return -fake.mean()


# -------------------------------------------------------------------------------------------------------------- randomness

def rng(seed: int, index: int) -> np.random.Generator:
    """The one source of everything that belongs to `index` (a training step, a sampled image) under `seed`, both >= 0.

    Philox is counter-based: no two (seed, index) share a stream, and none depends on what was drawn before.
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

    def __init__(self, classes: int, noise: int, channels: int, side: int):
        super().__init__()
        self.embedding = nn.Linear(classes, 10, bias=False)     # a weight matrix, so that class weights can be blended
        nn.init.normal_(self.embedding.weight)
        self.linear = nn.Linear(noise + 10, channels * side * side, bias=False)
        self.side = side

    def forward(self, u: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        h = self.linear(torch.cat([u, self.embedding(y)], dim=1))                   # (N, channels * side^2)
        return h.unflatten(1, (-1, self.side, self.side))                           # (N, channels, side, side)


class ShapeMechanism(nn.Module):
    """f_shape: u (N, Z), class weights y (N, C) -> mask (N, 1, 32, 32) in [0, 1].

    The outermost `margin` pixels are 0 by construction: they show the background mechanism's output alone. Without this and
    the `color_loss` of b, nothing in the paper's losses keeps foreground and background from swapping roles for some classes.
    """

    def __init__(self, classes: int, noise: int = NOISE, width: int = 48, margin: int = MARGIN):
        super().__init__()
        self.start = Start(classes, noise, 4 * width, 4)
        self.body = nn.Sequential(nn.BatchNorm2d(4 * width), nn.ReLU(inplace=True), Up(4 * width, 2 * width, 1),
                                  Up(2 * width, width, 1), Up(width, width // 2, 1))
        self.out = nn.Conv2d(width // 2, 1, 3, padding=1)
        side = mnist_variants.SIZE
        interior = F.pad(torch.ones(1, 1, side - 2 * margin, side - 2 * margin), (margin,) * 4)
        self.register_buffer("interior", interior, persistent=False)

    def forward(self, u: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        h = self.body(self.start(u, y))                                             # (N, width/2, 32, 32)
        return torch.sigmoid(self.out(h)) * self.interior                           # (N, 1, 32, 32) in [0, 1]


class TextureMechanism(nn.Module):
    """f_text (and f_bg, its twin): u (N, Z), class weights y (N, C), arrangement (N, 100) long -> (N, 3, 32, 32) in [-1, 1].

    100 cells are made, rearranged at random, and decoded by convolutions without padding: no place in the picture differs
    from another, and no shape larger than a patch can be learned, since the next draw would break it.
    DEVIATION: the paper rearranges just before the output layer. Here convolutions follow, which close the seams.
    """

    def __init__(self, classes: int, noise: int = NOISE, width: int = 32):
        super().__init__()
        self.start = Start(classes, noise, 2 * width, CELLS)
        self.body = nn.Sequential(nn.BatchNorm2d(2 * width), nn.ReLU(inplace=True), Up(2 * width, width, 0),
                                  Up(width, width // 2, 0))
        self.out = nn.Conv2d(width // 2, 3, 3)

    def forward(self, u: torch.Tensor, y: torch.Tensor, arrangement: torch.Tensor) -> torch.Tensor:
        h = self.start(u, y).flatten(2)                                             # (N, 2 width, 100)
        h = h.gather(2, arrangement[:, None].expand_as(h)).unflatten(2, (CELLS, CELLS))
        h = self.body(h.contiguous(memory_format=torch.channels_last))              # (N, width/2, 34, 34)
        return torch.tanh(self.out(h))                                              # (N, 3, 32, 32)


class MnistCGN(nn.Module):
    """The three mechanisms and the composer (appendix B, MNISTs; the background is a second texture mechanism)."""

    def __init__(self, classes: int = 10, noise: int = NOISE, margin: int = MARGIN, shuffle: str = "shift"):
        super().__init__()
        self.classes, self.noise, self.shuffle = classes, noise, shuffle
        self.f_shape = ShapeMechanism(classes, noise, margin=margin)
        self.f_text = TextureMechanism(classes, noise)
        self.f_bg = TextureMechanism(classes, noise)

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

    def __init__(self, classes: int = 10, noise: int = NOISE, width: int = 48):
        super().__init__()
        self.classes, self.noise, self.shuffle = classes, noise, "shift"
        self.start = Start(classes, noise, 4 * width, 4)
        self.body = nn.Sequential(nn.BatchNorm2d(4 * width), nn.ReLU(inplace=True), Up(4 * width, 2 * width, 1),
                                  Up(2 * width, width, 1), Up(width, width, 1))
        self.out = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, u, y, arrangement: Optional[torch.Tensor] = None) -> Sample:
        """Called like a CGN, so that it trains and samples alike; uses the first u and y. All of the image is foreground."""
        u = u[0] if isinstance(u, (tuple, list)) else u
        y = y[0] if isinstance(y, (tuple, list)) else y
        x = torch.tanh(self.out(self.body(self.start(u, class_weights(y, self.classes)))))
        return Sample(torch.ones_like(x[:, :1]), x, torch.zeros_like(x), x)


class Discriminator(nn.Module):
    """Real or generated, given the class: x (N, 3, 32, 32) in [-1, 1], y (N,) long -> scores (N,).

    Spectral norm (Miyato et al., 2018) and class projection (Miyato & Koyama, 2018).
    """

    def __init__(self, classes: int = 10, width: int = 48):
        super().__init__()
        layers = []
        for i, o in ((3, width), (width, 2 * width), (2 * width, 4 * width)):
            layers += [spectral_norm(nn.Conv2d(i, o, 4, stride=2, padding=1)), nn.LeakyReLU(0.2)]
        self.body = nn.Sequential(*layers, nn.Flatten(), spectral_norm(nn.Linear(4 * width * 16, 256)), nn.LeakyReLU(0.2))
        self.score = spectral_norm(nn.Linear(256, 1))
        self.embedding = spectral_norm(nn.Embedding(classes, 256))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        h = self.body(x)                                                            # (N, 256)
        return self.score(h)[:, 0] + (self.embedding(y) * h).sum(dim=1)             # (N,)


def build(config: dict) -> Union[MnistCGN, MnistGAN]:
    """The untrained generator that a run's configuration names."""
    if config["model"] == "gan":
        return MnistGAN(len(config["names"]))
    return MnistCGN(len(config["names"]), margin=config["margin"], shuffle=config["shuffle"])


# ---------------------------------------------------------------------------------------------------------------- training

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
    first = _continue(out, config, parts)
    color = mean_color(images, labels, model.classes).to(device)
    border = mean_color(images, labels, model.classes, config["margin"]).to(device) if config["margin"] else None
    batch, started = config["batch"], time.time()

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

        # Discriminator: raise the score of real images above 1, lower that of generated ones below -1.
        with autocast():
            scores = discriminator(torch.cat([x, sample.image.detach()]) + noise, torch.cat([y, y]))
        real, fake = scores.float().split(batch)
        loss_d = discriminator_loss(real, fake)
        optimizers[1].zero_grad()
        loss_d.backward()
        optimizers[1].step()

        # Generator: raise the score of generated images, with a mask that is binary and neither empty nor full.
        discriminator.requires_grad_(False)
        with autocast():
            scores = discriminator(sample.image + noise[batch:], y)
        losses = {"adversarial": generator_loss(scores.float())}
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
        _update_average(average, model, min(AVERAGE, (step + 1) / (step + 10)))

        done = step + 1
        if done % config["log_every"] == 0 or done == config["steps"]:
            row = {"step": done, "discriminator": loss_d.item(), **{name: loss.item() for name, loss in losses.items()},
                   "mask_mean": sample.mask.mean().item(), "real": real.mean().item(), "fake": fake.mean().item()}
            if not all(np.isfinite(value) for value in row.values()):
                raise ValueError(f"step {done}: not finite: {row}; the last checkpoint is kept: try a smaller --lr")
            rate = (done - first) / (time.time() - started)
            _log(out, {**row, "steps_per_second": round(rate, 2)})
            if sys.stdout.isatty():
                print(f"\rstep {done}/{config['steps']}  {rate:.1f} steps/s  {(config['steps'] - done) / rate / 60:.1f} min "
                      f"left  discriminator {row['discriminator']:.2f}  mask mean {row['mask_mean']:.2f} ", end="", flush=True)
        if done % config["sheet_every"] == 0 or done == config["steps"]:
            save_training_sheet(average, config["names"], out / f"sheet-{done:06d}.png", config["seed"])
            _save(out / "checkpoint.pt", {"config": config, "step": done,
                                          **{name: part.state_dict() for name, part in parts.items()}})
            print(f"{chr(13) if sys.stdout.isatty() else ''}step {done}: {time.time() - started:.0f} s, "
                  f"{out / f'sheet-{done:06d}.png'}")


def _update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    with torch.no_grad():
        for old, new in zip(average.state_dict().values(), model.state_dict().values()):
            if old.is_floating_point():
                old.lerp_(new, 1 - decay)


def _continue(out: Path, config: dict, parts: dict) -> int:
    """Load the checkpoint in `out`, if there is one, into `parts`; cut the log back to it; return its step."""
    out.mkdir(parents=True, exist_ok=True)
    path, log = out / "checkpoint.pt", out / "log.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    held = json.loads(lines[0]) if lines else None
    if held is not None and held != json.loads(json.dumps(config)):
        changed = [key for key in config if held.get(key) != json.loads(json.dumps(config[key]))]
        raise ValueError(f"{out} holds a run with another {', '.join(changed)}: choose another --out, or the same options "
                         "to continue it")
    if not path.exists():
        mnist_variants.write_file(log, (json.dumps(config) + "\n").encode())
        return 0
    state = read_checkpoint(path)
    for name, part in parts.items():
        part.load_state_dict(state[name])
    kept = [line for line in lines[1:] if json.loads(line)["step"] <= state["step"]]
    mnist_variants.write_file(log, ("\n".join([json.dumps(config), *kept]) + "\n").encode())
    print(f"continuing {out} at step {state['step']}")
    return state["step"]


def _log(out: Path, row: dict) -> None:
    with open(out / "log.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")


def _save(path: Path, state: dict) -> None:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    mnist_variants.write_file(path, buffer.getvalue())


def to_float(images: torch.Tensor) -> torch.Tensor:
    """uint8 images 0..255 -> float images -1..1, channels last."""
    return images.float().div(127.5).sub(1).contiguous(memory_format=torch.channels_last)


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """float images -1..1 -> uint8 images 0..255, never stretched by their own minimum and maximum."""
    return images.mul(127.5).add(127.5).round().clamp(0, 255).byte()


# ---------------------------------------------------------------------------------------------------------------- sampling

def read_checkpoint(source: Union[str, os.PathLike]) -> dict:
    """The content of a checkpoint; ValueError where the file is not one. Nothing in the file can run code."""
    try:
        state = torch.load(source, map_location="cpu", weights_only=True)
        if {"config", "average", "step"} <= state.keys():
            return state
        reason = "it holds something else"
    except FileNotFoundError:
        raise ValueError(f"{source} does not exist: train first, e.g. python cgn.py --dataset colored") from None
    except Exception as error:          # whatever a hostile or broken file makes the reader raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    raise ValueError(f"{source} is no checkpoint of cgn.py ({reason}): name the checkpoint.pt of a run")


def load(source: Union[str, os.PathLike]) -> Union[MnistCGN, MnistGAN]:
    """The averaged generator of a checkpoint, in eval mode; `.config` is its run's configuration. Raises ValueError."""
    state = read_checkpoint(source)
    try:
        model = build(state["config"])
        model.load_state_dict(state["average"])
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(f"{source} does not fit its own configuration ({str(error).splitlines()[0]})") from None
    model.config = state["config"]
    return model.to(memory_format=torch.channels_last).eval()


def draw(model, seed: int, indices: range, per_shape: int = 1):
    """Noise u (3, N, Z), labels y (3, N) and arrangements (N, 2, 100) of the counterfactuals `indices`.

    Image i takes them from rng(seed, i) in this order; the shape's u and label come from the first image of its group of
    `per_shape` (section 2.2: fix u, draw the other mechanisms again; 1 gives interventional images, section 2.3).
    """
    u, y, arrangement = [], [], []
    for index in indices:
        generator = rng(seed, index)
        u.append(generator.standard_normal((3, model.noise), dtype=np.float32))
        y.append(generator.integers(model.classes, size=3))
        arrangement.append(draw_arrangement(generator, 1, model.shuffle)[0])
        leader = index - index % per_shape
        if leader != index:
            if index == indices[0]:
                generator = rng(seed, leader)
                held = generator.standard_normal((3, model.noise), dtype=np.float32)[0], generator.integers(model.classes, size=3)[0]
            u[-1][0], y[-1][0] = held
        else:
            held = u[-1][0], y[-1][0]
    return (torch.from_numpy(np.stack(u, 1)), torch.from_numpy(np.stack(y, 1)), torch.from_numpy(np.stack(arrangement)))


@torch.no_grad()
def counterfactuals(model, count: int, seed: int = 0, per_shape: int = 10, batch: int = 100) -> mnist_variants.Variant:
    """`count` counterfactual images with the label of each mechanism, `per_shape` of them sharing one shape.

    A pure function of (weights, seed, index): image i does not depend on `count`, nor, to float error, on `batch`.
    From a GAN, which has no mechanisms, the images are plain samples, and the three labels agree.
    Raises ValueError for a count or per_shape below 1.
    """
    if count < 1 or per_shape < 1:
        raise ValueError(f"{count} images with {per_shape} per shape: both must be at least 1")
    device = next(model.parameters()).device
    images = torch.empty(count, 3, mnist_variants.SIZE, mnist_variants.SIZE, dtype=torch.uint8)
    labels = torch.empty(3, count, dtype=torch.long)
    for start in range(0, count, batch):
        part = range(start, min(start + batch, count))
        u, y, arrangement = (drawn.to(device) for drawn in draw(model, seed, part, per_shape))
        if isinstance(model, MnistGAN):
            y = y[:1].expand(3, -1)
            x = model(u[0], y[0]).image
        else:                           # one mask a group of `per_shape`, shown by all of it
            groups = torch.arange(part.start, part.stop, device=device) // per_shape
            _, inverse, counts = groups.unique_consecutive(return_inverse=True, return_counts=True)
            first = counts.cumsum(0) - counts
            weights = F.one_hot(y, model.classes).float()
            m = model.f_shape(u[0, first], weights[0, first])[inverse]
            x = compose(m, model.f_text(u[1], weights[1], arrangement[:, 0]), model.f_bg(u[2], weights[2], arrangement[:, 1]))
        images[part.start:part.stop] = to_uint8(x).cpu()
        labels[:, part.start:part.stop] = y.cpu()
    return mnist_variants.Variant(images, *labels)


@torch.no_grad()
def interpolate(model: MnistCGN, what: str, seed: int = 0, rows: int = 10, columns: int = 10) -> torch.Tensor:
    """Images (rows, columns, 3, 32, 32) uint8: u and class weights move linearly from one draw to another (Figures 20-22).

    what: the mechanism that moves (shape, texture or background), or all; the others stay. ValueError for anything else.
    """
    if what not in (*MECHANISMS, "all"):
        raise ValueError(f"cannot interpolate {what!r}: choose one of {', '.join(MECHANISMS)}, all")
    u, y, arrangement = draw(model, seed, range(2 * rows))
    y = F.one_hot(y, model.classes).float()
    blend = torch.linspace(0, 1, columns)[:, None]
    moving = [mechanism == what or what == "all" for mechanism in MECHANISMS]
    result = []
    for row in range(rows):
        begin, end = 2 * row, 2 * row + 1
        path = [[torch.lerp(part[k, begin], part[k, end], blend * moving[k]) for k in range(3)] for part in (u, y)]
        sample = model(tuple(path[0]), tuple(path[1]), arrangement[begin].expand(columns, -1, -1))
        result.append(to_uint8(sample.image))
    return torch.stack(result)


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
    Raises ValueError for a name that is neither, an empty folder and a picture that does not open.
    """
    if dataset in mnist_variants.NAMES:
        data = mnist_variants.load(dataset, "train", seed=seed, textures=textures, variance=variance, root=mnist)
        return data.images, data.shape, [f"digit {digit}" for digit in range(10)]
    if not Path(dataset).is_dir():
        raise ValueError(f"unknown data set {dataset!r}: choose {', '.join(mnist_variants.NAMES)}, or a folder with one "
                         "subfolder a class")
    try:
        folder = ImageFolder(dataset)
        pictures = [F_image.center_crop(F_image.resize(picture, mnist_variants.SIZE), mnist_variants.SIZE)
                    for picture, _ in folder]
    except (OSError, Image.DecompressionBombError) as error:
        raise ValueError(f"{dataset} cannot be read ({error}): it needs one subfolder a class, with pictures in each") from None
    images = torch.stack([F_image.pil_to_tensor(picture) for picture in pictures])
    return images, torch.tensor(folder.targets), folder.classes


# ------------------------------------------------------------------------------------------------------------ command line

STEPS = {"colored": 4000, "double-colored": 4000, "wildlife": 6000}       # a folder of pictures trains like wildlife


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Train a Counterfactual Generative Network and draw counterfactual images.")
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")
    run = parser.add_argument_group("run")
    run.add_argument("--dataset", default="colored", help="colored, double-colored, wildlife, or a folder with one subfolder "
                     "a class (default: %(default)s)")
    run.add_argument("--textures", help="wildlife: folder of DTD with the paper's textures (default: draw textures)")
    run.add_argument("--variance", type=float, default=mnist_variants.COLOR_VARIANCE, help="colored, double-colored: of an "
                     "image's colour around its class colour (default: %(default)s; authors' double-colored: 0.0001)")
    run.add_argument("--mnist", default="data/mnist", help="folder of MNIST's four .gz files (default: %(default)s)")
    run.add_argument("--model", choices=("cgn", "gan"), default="cgn", help="gan: the baseline without mechanisms")
    run.add_argument("--out", help="folder of the run, continued if it is there (default: runs/DATASET), or file to write")
    run.add_argument("--seed", type=int, default=0)
    run.add_argument("--device", default="cpu")
    run.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    run.add_argument("--dry-run", action="store_true", help="two training steps, written to a temporary folder")

    mechanisms = parser.add_argument_group("mechanisms (section 3.1)")
    mechanisms.add_argument("--shuffle", choices=("shift", "puzzle"), default="shift", help="how a texture's cells are "
                            "rearranged: cyclic shift (authors' code) or sliding puzzle (paper) (default: %(default)s)")
    mechanisms.add_argument("--margin", type=int, default=MARGIN, help="outermost pixels that are background by "
                            "construction, 0 for objects that touch the border (default: %(default)s)")

    training = parser.add_argument_group("training (appendix C)")
    training.add_argument("--steps", type=int, help=f"default: {STEPS['colored']}, wildlife and own pictures {STEPS['wildlife']}")
    training.add_argument("--batch", type=int, default=64)
    training.add_argument("--lr", type=float, default=4e-4, help="Adam, generator; the discriminator's is twice that")
    training.add_argument("--binary", type=float, default=0.3, help="weight of the mask's binary entropy")
    training.add_argument("--binary-warmup", type=int, default=1000, help="steps over which that weight rises from 0")
    training.add_argument("--color", type=float, default=10.0, help="weight of a class's mean colour in x_gen, like real "
                          "images', and in b, like their borders'")
    training.add_argument("--noise", type=float, default=0.4, help="standard deviation of the noise on what the discriminator "
                          "sees, fading to 0 (default: %(default)s)")
    training.add_argument("--bf16", action="store_true", help="compute in bfloat16 where that is safe: about 1.6 times as fast "
                          "on a CPU with AMX")
    training.add_argument("--mask", type=float, default=10.0, help="weight of the mask interval")
    training.add_argument("--interval", type=float, nargs=2, default=(0.05, 0.4), metavar=("LOW", "HIGH"),
                          help="a mask's mean is kept in it (default: 0.05 0.4; paper: 0.1 0.9)")

    sampling = parser.add_argument_group("sampling from a trained checkpoint (section 3.2)")
    sampling.add_argument("--checkpoint", help="checkpoint.pt of a run")
    sampling.add_argument("--counterfactuals", type=int, metavar="N", help="write N counterfactual images and their labels")
    sampling.add_argument("--per-shape", type=int, default=10, help="counterfactuals that share a shape (default: 10)")
    sampling.add_argument("--interpolate", choices=(*MECHANISMS, "all"), help="write a sheet of interpolations")
    return parser


def main(argv: Optional[list[str]] = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        for name in ("steps", "batch", "threads"):
            if getattr(args, name) is not None and getattr(args, name) < 1:
                raise ValueError(f"--{name} {getattr(args, name)}: must be at least 1")
        if args.seed < 0:
            raise ValueError(f"--seed {args.seed}: must be 0 or more")
        if args.checkpoint:
            _sample_main(args)
        elif args.dry_run:
            with tempfile.TemporaryDirectory() as folder:
                _train_main(args, Path(folder))
        else:
            _train_main(args, Path(args.out or f"runs/{Path(args.dataset).name}{'-gan' if args.model == 'gan' else ''}"))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        parser.exit(130, "\nstopped: the same command continues from the last checkpoint\n")


def _train_main(args: argparse.Namespace, out: Path) -> None:
    images, labels, names = load_images(args.dataset, seed=args.seed, textures=args.textures, mnist=args.mnist,
                                        variance=args.variance)
    config = {"steps": STEPS.get(args.dataset, STEPS["wildlife"]), "log_every": 50, "sheet_every": SHEET_EVERY, "names": names}
    for key in ("dataset", "textures", "variance", "model", "seed", "shuffle", "margin", "steps", "batch", "lr", "binary",
                "binary_warmup", "mask", "interval", "color", "noise", "bf16"):
        if getattr(args, key) is not None or key == "textures":
            config[key] = getattr(args, key)
    if args.dry_run:
        config["steps"] = 2
    print(f"{args.model.upper()} on {args.dataset}: {len(images)} images, {len(names)} classes; {config['steps']} steps of "
          f"{args.batch}, seed {args.seed}; torch {torch.__version__}, {torch.get_num_threads()} threads, {args.device}; "
          f"writing to {out}")
    train(config, images, labels, out, args.device)
    if args.dry_run:
        print("dry run finished; nothing is kept")
    else:
        print(f"done: open the last sheet in {out}; next: python cgn.py --checkpoint {out / 'checkpoint.pt'} "
              "--counterfactuals 100000")


def _sample_main(args: argparse.Namespace) -> None:
    model = load(args.checkpoint).to(args.device)
    if args.interpolate:
        out = Path(args.out or f"interpolate-{args.interpolate}.png")
        images = interpolate(model, args.interpolate, args.seed)
        mnist_variants.save_sheet(out, images, [f"pair {row}" for row in range(len(images))],
                                  [f"{args.interpolate}: from left to right"] * images.shape[1])
    elif args.counterfactuals is not None:
        out = Path(args.out or "counterfactuals.pt")
        data = counterfactuals(model, args.counterfactuals, args.seed, args.per_shape)
        _save(out, {**data._asdict(), "names": model.config["names"], "seed": args.seed, "per_shape": args.per_shape})
    else:
        raise ValueError("--checkpoint needs --counterfactuals N or --interpolate MECHANISM")
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
