"""Classifiers that do not take the easy way (Counterfactual Generative Networks, ICLR 2021): Table 2, and ImageNet's ensemble.

On the training split of an MNIST variant shape, foreground and background all give the label away; on the test split only
the shape does. The same CNN is trained on

    original        the biased training split alone
    original+gan    and as many samples of a conditional GAN, whose images are biased alike
    cgn             counterfactual images of a CGN alone
    original+cgn    and real ones: the paper's method
    irm-2, irm-5    real images in environments whose colours agree with the label in 90 to 100 %: invariant risk minimization
    lntl            the biased training split, while colours are unlearned: learning not to learn
    randomised      real images whose foreground and background labels are random: a ceiling no method here may reach
    recombined      the same with ten random foregrounds and backgrounds a digit: the ceiling of ten counterfactuals a shape

    python classify.py --table --dataset colored --seeds 0 1 2     # trains what is missing, writes runs/table-shape.md
    python classify.py --figure --dataset colored                  # Figure 7 as runs/figure7-colored.png
    python classify.py --latents --dataset colored --steps 5000    # Figure 6: a beta-VAE finds neither colour nor shape
    python classify.py --cause --dataset double-colored            # Table 5: which of the three signals is the cause?

On ImageNet a ResNet-50 has a head each for shape, texture and background, which learn from counterfactual images, and
together from real ones (4.3, C.4):

    python classify.py --dataset imagenet --real path/to/train --counterfactuals path/to/counterfactuals
    python classify.py --checkpoint runs/ensemble/checkpoint.pt --say photo.jpg          # Figure 1's sentence
"""
import argparse
import copy
import itertools
import math
import os
import signal
import tempfile
import time
from functools import lru_cache, partial
from pathlib import Path
from typing import Callable, Iterator, Optional, Sequence, Union

import numpy as np
import torch
import torch.distributed as distributed
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageFont
from torchvision import transforms
from torchvision.transforms import functional as F_image

import biggan
import cgn
import evaluate
import mnist_variants
import u2net

METHODS = ("original", "irm-2", "irm-5", "lntl", "original+gan", "cgn", "original+cgn", "randomised", "recombined")
ENVIRONMENTS = {"irm-2": (0.9, 1.0), "irm-5": (0.9, 0.925, 0.95, 0.975, 1.0)}       # agreement of colour and label (C.4)
# Times --steps: one image in twenty disagrees with its colour, on average, one in 270 with both textures; only these teach shapes.
IRM_STEPS = {"colored": 3, "double-colored": 3, "wildlife": 6}
CAUSE = (0.9, 0.95, 1.0)                            # agreements of Table 5's environments (H)
IRM_WEIGHT = 1.0            # of the penalty at the end; it rises linearly from 0 (the README has what larger ones give)
LNTL_REVERSAL, LNTL_HEAD_LR = 30.0, 2e-3  # chosen on the validation split of double-colored; theirs: 0.1 and, of SGD, 0.01
LNTL_VIEW = 7               # rows and columns of the features, of 14, that its head sees at once; odd
LNTL_STEPS = 0.5            # times --steps
BETA = 4.0                  # of the beta-VAE
LABELS = ("shape", "foreground", "background")
WEIGHTS = "resnet50-0676ba61.pth"
BATCH, IRM_BATCH = 64, 30
WORKERS = min(4, os.cpu_count())    # processes that read pictures
ADADELTA = partial(torch.optim.Adadelta, lr=1.0)                                    # authors' code
ADAM = partial(torch.optim.Adam, lr=2e-3)                                           # IRM learns faster with it
EPOCHS = 10                 # an epoch is a tenth of --steps
# Real images in a batch of 64 when counterfactuals are the others. At half, the classifier learns to tell real from
# generated and takes the easy way on the real ones; see the README.
REAL_SHARE = {"gan": 32, "cgn": 4}

Source = tuple[torch.Tensor, torch.Tensor, int]     # images (N, 3, 32, 32) uint8, labels (N,), how many of them in a batch


class Classifier(nn.Sequential):
    """The paper's CNN for all MNIST experiments (C.4; layers from the authors' code): (N, 3, 32, 32) in [-1, 1] -> (N, C).

    The first ReLU stands behind its max-pooling: the same function, with a quarter of the ReLU's work. The norm's scale and shift are
    applied to the first convolution's weights instead of the images, which then need no gradient: a fifth of a step's time.
    """

    def __init__(self, classes: int = 10):
        super().__init__(
            nn.BatchNorm2d(3), nn.Conv2d(3, 32, 5), nn.MaxPool2d(3, 2, 1), nn.ReLU(),       # (N, 32, 14, 14)
            nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU(),                           # (N, 64, 7, 7)
            nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(),
            nn.AvgPool2d(7), nn.Flatten(), nn.Linear(64, classes))                          # (N, C)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """(N, 3, 32, 32) in [-1, 1] -> (N, 32, 14, 14), behind the second convolution and ReLU."""
        norm, conv, *layers = list(self)[:6]
        x = F.batch_norm(x, norm.running_mean, norm.running_var, training=norm.training, momentum=norm.momentum, eps=norm.eps)
        x = F.conv2d(x, conv.weight * norm.weight[:, None, None], conv.bias + conv.weight.sum(dim=(2, 3)) @ norm.bias)
        return nn.Sequential(*layers)(x)

    def rest(self, h: torch.Tensor) -> torch.Tensor:
        """Features (N, 32, 14, 14) -> scores (N, C)."""
        return nn.Sequential(*list(self)[6:])(h)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.rest(self.features(x))


def draw_batch(sources: Sequence[Source], seed: int, step: int, device: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Images (n, 3, 32, 32) in [-1, 1] and labels (n,) from each source, its own number of them, by cgn.rng(seed, step)."""
    generator = cgn.rng(seed, step)
    batches = []
    for images, labels, count in sources:
        chosen = torch.from_numpy(generator.integers(len(images), size=count))
        batches.append((cgn.to_float(images[chosen].to(device)), labels[chosen].to(device)))
    return batches


def erm(scores: Sequence[torch.Tensor], labels: Sequence[torch.Tensor], progress: float) -> torch.Tensor:
    """Empirical risk: the mean cross-entropy of all scores (n, C) of all sources. A scalar."""
    return F.cross_entropy(torch.cat(tuple(scores)), torch.cat(tuple(labels)))


def irm(scores: Sequence[torch.Tensor], labels: Sequence[torch.Tensor], progress: float) -> torch.Tensor:
    """Invariant risk minimization (Arjovsky et al., 2019): mean risk of the environments and, rising with progress 0 .. 1, their
    mean penalty. A scalar."""
    penalty = sum(irm_penalty(z, y) for z, y in zip(scores, labels)) / len(scores)
    risk = sum(F.cross_entropy(z, y) for z, y in zip(scores, labels)) / len(scores)
    return risk + IRM_WEIGHT * progress * penalty


def irm_penalty(z: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Squared derivative of the risk of scores s z (n, C) by the dummy scale s at 1; estimated without bias as the product of
    the derivatives over the even and the odd half of the batch. A scalar, also below 0. Raises ValueError for n < 2."""
    if len(z) < 2:
        raise ValueError(f"the penalty needs two images of an environment or more, not {len(z)}")
    derivative = ((z.softmax(dim=1) - F.one_hot(y, z.shape[1])) * z).sum(dim=1)     # of each image's cross-entropy
    return derivative[::2].mean() * derivative[1::2].mean()


def stepwise(steps: int, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    """A learning rate that is x 0.7 an epoch (authors' code)."""
    return torch.optim.lr_scheduler.StepLR(optimizer, max(1, steps // EPOCHS), 0.7)


def linear(steps: int, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    """A learning rate that falls to 0."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)


def fit(sources: Sequence[Source], steps: int, seed: int = 0, bf16: bool = False, device: str = "cpu",
        objective: Callable = erm, make_optimizer: Callable = ADADELTA, make_schedule: Callable = stepwise, classes: int = 10
        ) -> Classifier:
    """Train a classifier on batches that mix the sources in fixed numbers.

    objective(scores of each source, labels of each, progress in 0 .. 1) -> loss, `erm` or `irm`. make_optimizer(parameters) ->
    optimizer, `ADADELTA` or `ADAM`; make_schedule(steps, optimizer) -> its learning rates, `stepwise` or `linear`. A pure function
    of its arguments on the CPU: step i draws from cgn.rng(seed, i). Returns the classifier in eval mode.
    """
    torch.manual_seed(seed)
    model = Classifier(classes).to(device, memory_format=torch.channels_last)
    optimizer = make_optimizer(model.parameters())
    schedule = make_schedule(steps, optimizer)
    for step in range(steps):
        x, y = zip(*draw_batch(sources, seed, step, device))
        with torch.autocast(device.split(":")[0], torch.bfloat16, enabled=bf16):
            scores = model(torch.cat(x))
        loss = objective(scores.float().split([len(part) for part in y]), y, step / steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def brighter_channels(x: torch.Tensor) -> torch.Tensor:
    """LNTL's target: images (N, 3, H, W) -> in which channels the digit is brighter than the background, 0..7, (N,): red counts 4,
    green 2, blue 1. The background's colour is the median, the digit's that of the pixel farthest from it.

    This is all that an image normalised by itself still has of its colours, if they are two. The eight are one target: a
    head for each channel would not see features that tell whether two channels agree.
    """
    pixels = x.flatten(2)
    background = pixels.median(dim=2).values
    farthest = (pixels - background[:, :, None]).abs().sum(dim=1).argmax(dim=1)
    brighter = pixels[torch.arange(len(x)), :, farthest] > background
    return (brighter * torch.tensor([4, 2, 1], device=x.device)).sum(dim=1)


def reverse_gradient(h: torch.Tensor) -> torch.Tensor:
    """h, whose gradient from here is multiplied by -LNTL_REVERSAL (the layer of Ganin and Lempitsky, 2015, that LNTL uses)."""
    h = h.view_as(h)
    h.register_hook(lambda gradient: -LNTL_REVERSAL * gradient)
    return h


def fit_lntl(source: Source, steps: int, seed: int = 0, *, bf16: bool = False, device: str = "cpu") -> nn.Module:
    """Train a classifier whose features cannot tell colours (LNTL, Kim et al., 2019) on a source as fit's: SGD, momentum 0.9, weight
    decay 5e-4, a learning rate of 0.01 falling to 0. The head, two convolutions, learns with Adam, faster than the features change.

    The image and the outputs of the two convolutions before the features are normalised in each image: otherwise the reversal
    shrinks the features to nothing, or colours hide in averages that no single place tells. The head's view, LNTL_VIEW, is wide
    enough to tell a bright stroke from a dark gap: seen through less, a digit and its negative have the same edges.

    The head learns the colours from the features, and the features learn the label and unlearn the colours, in one step.
    A pure function of its arguments on the CPU. Returns the normalisation and the classifier behind it, in eval mode.
    """
    torch.manual_seed(seed)
    normalise, model = nn.InstanceNorm2d(3), Classifier()
    model[3], model[5] = (nn.Sequential(nn.InstanceNorm2d(32), nn.ReLU()) for _ in range(2))
    head = nn.Sequential(nn.Conv2d(32, 64, LNTL_VIEW, padding="same"), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 8, 1))
    model, head = (network.to(device, memory_format=torch.channels_last) for network in (model, head))
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=5e-4)
    head_optimizer = torch.optim.Adam(head.parameters(), LNTL_HEAD_LR, betas=(0.5, 0.99))
    schedule = linear(steps, optimizer)
    for step in range(steps):
        (x, y), = draw_batch([source], seed, step, device)
        with torch.autocast(device.split(":")[0], torch.bfloat16, enabled=bf16):
            h = model.features(normalise(x))
            scores, colors = model.rest(h), head(reverse_gradient(h))
        everywhere = brighter_channels(x)[:, None, None].expand(-1, *colors.shape[2:])
        loss = F.cross_entropy(scores.float(), y) + F.cross_entropy(colors.float(), everywhere)
        optimizer.zero_grad()
        head_optimizer.zero_grad()
        loss.backward()
        head_optimizer.step()
        optimizer.step()
        schedule.step()
    return nn.Sequential(normalise, model).eval()


@torch.no_grad()
def predict(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Predicted class (N,) of uint8 images (N, 3, 32, 32)."""
    device = next(model.parameters()).device
    return torch.cat([model(cgn.to_float(part.to(device))).argmax(dim=1).cpu() for part in images.split(250)])


def sources(method: str, real: mnist_variants.Variant, label: str, generated: Optional[mnist_variants.Variant],
            ) -> list[Source]:
    """What a method's classifier is trained on; `generated` are a GAN's or a CGN's images where the method uses them."""
    if generated is None:
        return [(real.images, getattr(real, label), BATCH)]
    if method == "cgn":
        return [(generated.images, getattr(generated, label), BATCH)]
    share = REAL_SHARE[method.removeprefix("original+")]
    return [(real.images, getattr(real, label), share), (generated.images, getattr(generated, label), BATCH - share)]


# -------------------------------------------------------------------------------------------------------- runs and results

def train_generator(args: argparse.Namespace, dataset: str, model: str, seed: int) -> Path:
    """The checkpoint of a trained CGN or GAN below --runs; trains or continues it first where it is not finished."""
    out = Path(args.runs) / f"{dataset}-{model}-{seed}"
    command = ["--dataset", dataset, "--model", model, "--seed", str(seed), "--out", str(out), "--mnist", args.mnist,
               "--variance", str(args.variance), "--device", args.device]
    if args.textures and dataset == "wildlife":
        command += ["--textures", args.textures]
    if args.bf16:
        command += ["--bf16"]
    if args.generator_steps:
        command += ["--steps", str(args.generator_steps)]
    if args.shuffle and model == "cgn":
        command += ["--shuffle", args.shuffle]
    cgn.main(command)
    return out / "checkpoint.pt"


@lru_cache(maxsize=1)       # cgn and original+cgn, one after the other, learn from the same images
def generate(checkpoint: Path, count: int, seed: int, per_shape: int, device: str) -> mnist_variants.Variant:
    """Images and labels drawn from the CGN or GAN of a checkpoint."""
    return cgn.counterfactuals(cgn.load(checkpoint).to(device), count, seed, per_shape)


def _real_images(dataset: str, method: str, data: dict) -> mnist_variants.Variant:
    if method == "recombined":
        versions = [mnist_variants.load(dataset, "train", agreement=0.1, **{**data, "seed": 10 * data["seed"] + k}) for k in range(10)]
        return mnist_variants.Variant(*(torch.cat(parts) for parts in zip(*versions)))
    return mnist_variants.load(dataset, "train", agreement=0.1 if method == "randomised" else 1.0, **data)


def run(args: argparse.Namespace, dataset: str, method: str, seed: int, *, count: int, per_shape: int,
        splits: Sequence[str] = ("train", "val", "test"), label: Optional[str] = None) -> dict:
    """One cell of Table 2: train the generator (if the method has one) and the classifier with `seed`, measure accuracies.

    label: what it learns to read, --label by default. A split such as test@0.9 is an environment whose labels agree in 90 %;
    there the class label, the shape's, is to be found, whatever was learned. Returns a row of results; a row that
    --runs/results.jsonl already holds is not computed again.
    """
    label, generates = label or args.label, "gan" in method or "cgn" in method
    steps = math.ceil(args.steps * (IRM_STEPS[dataset] if method in ENVIRONMENTS else LNTL_STEPS if method == "lntl" else 1))
    row = {"dataset": dataset, "method": method, "seed": seed, "label": label, "steps": steps,
           "count": count if generates else 0, "per_shape": per_shape if "cgn" in method else 0,
           "generator_steps": args.generator_steps if generates else None, "shuffle": args.shuffle if "cgn" in method else None,
           "data": ("DTD textures" if args.textures else "drawn textures") if dataset == "wildlife" else f"variance {args.variance}"}
    path = Path(args.runs) / "results.jsonl"
    for held in cgn.read_lines(path):
        if all(held.get(key) == value for key, value in row.items()) and all(split in held for split in splits):
            return held
    started = time.time()
    data = {"textures": args.textures, "variance": args.variance, "root": args.mnist, "seed": seed}
    generated = None
    if generates:
        checkpoint = train_generator(args, dataset, "gan" if "gan" in method else "cgn", seed)
        generated = generate(checkpoint, count, seed, per_shape, args.device)
    if method in ENVIRONMENTS:
        share = IRM_BATCH // len(ENVIRONMENTS[method])
        worlds = [mnist_variants.load(dataset, "train", agreement=agreement, **{**data, "seed": 10 * seed + k})
                  for k, agreement in enumerate(ENVIRONMENTS[method])]
        classifier = fit([(world.images, getattr(world, label), share) for world in worlds], steps, seed,
                         bf16=args.bf16, device=args.device, objective=irm, make_optimizer=ADAM, make_schedule=linear)
    else:
        real = _real_images(dataset, method, data)
        if method == "lntl":
            classifier = fit_lntl((real.images, getattr(real, label), BATCH), steps, seed, bf16=args.bf16, device=args.device)
        else:
            classifier = fit(sources(method, real, label, generated), steps, seed, bf16=args.bf16, device=args.device)
    for split in splits:
        name, _, agreement = split.partition("@")
        held_out = mnist_variants.load(dataset, name, agreement=float(agreement) if agreement else None, **data)
        row[split] = evaluate.accuracy(predict(classifier, held_out.images), held_out.shape if agreement else getattr(held_out, label))
    row["seconds"] = round(time.time() - started)
    cgn.append_row(path, row)
    print(f"{dataset}, {method}, seed {seed}: " + ", ".join(f"{split} {100 * row[split]:.1f} %" for split in splits)
          + f" ({row['seconds']} s)", flush=True)
    return row


def table(args: argparse.Namespace) -> str:
    """Table 2 as Markdown: train and test accuracy in percent, mean and sample standard deviation over seeds."""
    rows = {(dataset, method): [] for dataset in args.dataset for method in args.method}
    for dataset in args.dataset:
        for seed in args.seeds:
            for method in args.method:
                rows[dataset, method].append(run(args, dataset, method, seed, count=args.count, per_shape=args.per_shape))
    lines = [f"| {args.label} label | " + " | ".join(f"{name}: train | test" for name in args.dataset) + " |",
             "|---" * (1 + 2 * len(args.dataset)) + "|"]
    for method in args.method:
        cells = []
        for dataset in args.dataset:
            for split in ("train", "test"):
                mean, std = evaluate.mean_std([row[split] for row in rows[dataset, method]])
                cells.append(f"{100 * mean:.1f} ± {100 * std:.1f}")
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def table5(args: argparse.Namespace, dataset: str) -> str:
    """Table 5 (appendix H) as Markdown: which signal is the cause, when nobody says so? Three classifiers, each trained on
    counterfactuals for another label, look for the class in environments; the one that is equally good in all reads the cause."""
    lines = ["| agreement | " + " | ".join(f"{label} classifier" for label in LABELS) + " |", "|---" * 4 + "|"]
    splits = [f"test@{agreement}" for agreement in CAUSE]
    rows = {label: [run(args, dataset, "cgn", seed, count=args.count, per_shape=args.per_shape, splits=splits, label=label)
                    for seed in args.seeds] for label in LABELS}
    for split in splits:
        found = [evaluate.mean_std([row[split] for row in rows[label]]) for label in LABELS]
        lines.append(f"| {100 * float(split[5:]):.0f} % | " + " | ".join(f"{100 * mean:.1f} ± {100 * std:.1f}" for mean, std in found) + " |")
    return "\n".join(lines)


def figure7(args: argparse.Namespace, dataset: str, path: Path) -> None:
    """Figure 7: test accuracy of original+cgn against the number of counterfactuals, for 1 and for 10 a shape, as a PNG.

    A tenth of --count and --count, for 10 a shape ten times --count as well.
    """
    curves = {}
    for per_shape, counts in ((1, (args.count // 10, args.count)), (10, (args.count // 10, args.count, 10 * args.count))):
        rows = [run(args, dataset, "original+cgn", args.seeds[0], count=count, per_shape=per_shape, splits=("test",))
                for count in counts]
        curves[f"{per_shape} per shape"] = [(row["count"], 100 * row["test"]) for row in rows]
    save_curves(path, curves, f"{dataset}: test accuracy [%] against counterfactual images")


class VAE(nn.Module):
    """A beta-VAE (Higgins et al., 2017) of images (N, 3, 32, 32) in [-1, 1] with two latent variables, for Figure 6."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, 32, 4, 2, 1), nn.ReLU(), nn.Conv2d(32, 64, 4, 2, 1), nn.ReLU(), nn.Conv2d(64, 128, 4, 2, 1), nn.ReLU(),
            nn.Flatten(), nn.Linear(2048, 4))                                           # two means, two log-variances
        self.decoder = nn.Sequential(
            nn.Linear(2, 2048), nn.ReLU(), nn.Unflatten(1, (128, 4, 4)),
            nn.ConvTranspose2d(128, 64, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(64, 32, 4, 2, 1), nn.ReLU(),
            nn.ConvTranspose2d(32, 3, 4, 2, 1))      # no tanh: it saturates at the black background and nothing is learned

    def forward(self, x: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """noise (N, 2) -> reconstruction like x, mean and logarithm of the variance (N, 2)."""
        mean, log_variance = self.encoder(x).chunk(2, dim=1)
        return self.decoder(mean + (log_variance / 2).exp() * noise), mean, log_variance


def vae_loss(x: torch.Tensor, made: torch.Tensor, mean: torch.Tensor, log_variance: torch.Tensor, beta: float) -> torch.Tensor:
    """Half the squared error of an image, plus beta times the divergence of its latents from N(0, 1); mean over images."""
    error = (x - made).square().flatten(1).sum(dim=1) / 2
    divergence = (mean.square() + log_variance.exp() - 1 - log_variance).sum(dim=1) / 2
    return (error + beta * divergence).mean()


def figure6(data: mnist_variants.Variant, path: Path, steps: int, seed: int = 0) -> None:
    """Figure 6 (A.1) as a PNG: training images, and what a beta-VAE of two latents makes of a grid of them, -2 .. 2. Along each
    axis colour and digit change together, as the data never show them apart."""
    torch.manual_seed(seed)
    model = VAE().to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for step in range(steps):
        generator = cgn.rng(seed, step)
        x = cgn.to_float(data.images[torch.from_numpy(generator.integers(len(data.images), size=BATCH))])
        noise = torch.from_numpy(generator.standard_normal((BATCH, 2), dtype=np.float32))
        loss = vae_loss(x, *model(x, noise), BETA)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % 500 == 0:
            print(f"beta-VAE: step {step + 1}/{steps}, loss {loss.item():.1f}", flush=True)
    axis = torch.linspace(-2, 2, 10)
    with torch.no_grad():
        made = cgn.to_uint8(model.decoder(torch.cartesian_prod(axis, axis))).unflatten(0, (10, 10))
    examples = torch.stack([data.images[data.shape == digit][:5] for digit in range(10)])
    mnist_variants.save_sheet(path, torch.cat([examples, made], dim=1), [f"z1 = {value:.1f}" for value in axis.tolist()],
                              ["data"] * 5 + [f"z2 = {value:.1f}" for value in axis.tolist()])


def save_curves(path: Path, curves: dict[str, list[tuple[float, float]]], title: str) -> None:
    """Up to six named curves of points (x > 0, y in percent) as a PNG, x on a logarithmic scale; they differ in width too."""
    width, height, left, top, font = 620, 360, 60, 40, ImageFont.load_default(13)
    points = [point for curve in curves.values() for point in curve]
    x_low, x_high = (math.log10(f(x for x, _ in points)) for f in (min, max))
    y_low, y_high = min(95, int(min(y for _, y in points) // 5 * 5)), 100

    def place(x: float, y: float) -> tuple[float, float]:
        across = (math.log10(x) - x_low) / max(x_high - x_low, 1e-9)
        return left + across * (width - left - 130), height - 40 - (y - y_low) / (y_high - y_low) * (height - 40 - top)

    picture = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((left, 10), title, "black", font)
    for y in range(y_low, y_high + 1, 5 if y_high - y_low <= 40 else 10):
        draw.line([place(10 ** x_low, y), place(10 ** x_high, y)], "#dddddd")
        draw.text((20, place(10 ** x_low, y)[1] - 8), str(y), "black", font)
    for x in sorted({x for x, _ in points}):
        draw.text((place(x, y_low)[0] - 15, height - 32), f"{x:,}", "black", font)
    free = height                                                               # names stand at the curves' ends, none over another
    for number, (name, curve) in sorted(enumerate(curves.items()), key=lambda pair: pair[1][1][-1][1]):
        color = ("#0072b2", "#d55e00", "#000000", "#009e73", "#cc79a7", "#e69f00")[number]      # Okabe & Ito: safe for colour blindness
        corners = [place(*point) for point in curve]
        draw.line(corners, color, 1 + number)
        for x, y in corners:
            (draw.ellipse if number % 2 else draw.rectangle)([x - 4, y - 4, x + 4, y + 4], outline=color, width=2)
        x, y = corners[-1]
        if x < width - 130:
            draw.text((x + 8, y - 22), name, color, font)
        else:
            free = min(free - 15, y - 8)
            draw.text((width - 120, free), name, color, font)
    mnist_variants.save_png(path, picture)


# ------------------------------------------------------------------------------------------------- the ensemble on ImageNet

class Ensemble(nn.Module):
    """A torchvision classifier up to its last layer, and that layer once for each head (4.3): x (N, 3, H, W) -> scores (N, heads, C).

    Heads are those of shape, texture and background. Its prediction is the class of the largest mean score: averaged logits
    (C.4) and averaged log-probabilities (4.3) differ by a constant of each image, so that they rank classes alike and give
    the same cross-entropy. frozen: batch norms stay in eval mode while it trains (authors' code), so that an image's loss does
    not depend on its batch; not where training starts from random weights, whose statistics say nothing.
    """

    def __init__(self, network: nn.Module, heads: int = 3, frozen: bool = True):
        super().__init__()
        linear = [pair for pair in network.named_modules() if isinstance(pair[1], nn.Linear)]
        if not linear:
            raise ValueError(f"{type(network).__name__} has no linear layer that heads could replace: choose another network")
        name, last = linear[-1]
        network.set_submodule(name, nn.Identity())
        self.backbone, self.heads, self.frozen = network, nn.ModuleList(copy.deepcopy(last) for _ in range(heads)), frozen

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.backbone(x)
        if not isinstance(h, torch.Tensor):
            raise ValueError(f"{type(self.backbone).__name__} has auxiliary outputs: choose another network")
        return torch.stack([head(h) for head in self.heads], dim=1)

    def train(self, mode: bool = True) -> "Ensemble":
        super().train(mode)
        for module in self.modules():
            if self.frozen and isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self


def ensemble_loss(real: torch.Tensor, y: torch.Tensor, counterfactual: torch.Tensor, labels: torch.Tensor,
                  smoothing: float = 0.0) -> torch.Tensor:
    """Mean cross-entropy of real images' averaged scores (N, heads, C) with y (N,), and of each head's scores of counterfactuals
    (M, heads, C) with its own label (M, heads), every image counting alike. smoothing: of the labels, 0 to 1. A scalar."""
    losses = [F.cross_entropy(real.mean(dim=1), y, reduction="sum", label_smoothing=smoothing)]
    if len(labels):
        losses.append(F.cross_entropy(counterfactual.mT, labels, reduction="none", label_smoothing=smoothing).mean(dim=1).sum())
    return sum(losses) / (len(y) + len(labels))


class Batches(torch.utils.data.Dataset):
    """Step i's share of a batch: pictures drawn without replacement in each epoch, cut and mirrored at random; i is all it needs.

    files: (path, labels) pairs; an item is x (count, 3, side, side) in [0, 1] and labels (count, ..) long. Raises ValueError
    where a picture does not open, unless `skip` is set: then its name is printed and the next one takes its place.
    """

    def __init__(self, files: Sequence[tuple[str, Sequence[int]]], batch: int, side: int, seed: int, share: slice = slice(None),
                 skip: bool = False):
        self.files, self.batch, self.seed, self.share, self.skip = files, batch, seed, share, skip
        self.cut = transforms.Compose([transforms.RandomResizedCrop(side), transforms.RandomHorizontalFlip()])

    def __getitem__(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        images, labels = [], []
        for position in range(step * self.batch, (step + 1) * self.batch)[self.share]:
            epoch, place = divmod(position, len(self.files))
            index = permutation(len(self.files), self.seed, epoch)[place]
            picture, label = self._open(int(index))
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(int(cgn.rng(self.seed, position).integers(2 ** 63)))
                images.append(self.cut(picture))
            labels.append(label)
        return torch.stack(images).float() / 255, torch.tensor(labels)

    def _open(self, index: int) -> tuple[torch.Tensor, Sequence[int]]:
        for offset in range(len(self.files)):
            path, labels = self.files[(index + offset) % len(self.files)]
            picture = read_picture(path, self.skip)
            if picture is not None:
                return picture, labels
        raise ValueError("none of the pictures opens")


class Pictures(torch.utils.data.Dataset):
    """Pictures in order, as they are judged: item i is cut(picture, side), (3, side, side) in [0, 1]; nan if it was skipped."""

    def __init__(self, paths: Sequence[str], side: int, cut: Callable, skip: bool):
        self.paths, self.side, self.cut, self.skip = paths, side, cut, skip

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        picture = read_picture(self.paths[index], self.skip)
        if picture is None:
            return torch.full((3, self.side, self.side), float("nan"))
        return self.cut(picture, self.side).float() / 255


def read_picture(path: str, skip: bool = False) -> Optional[torch.Tensor]:
    """(3, H, W) uint8. Where it does not open: a ValueError, or if `skip` is set its name is printed and None returned."""
    try:
        with Image.open(path) as picture:
            return F_image.pil_to_tensor(picture.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        if not skip:
            raise ValueError(f"{path} does not open as a picture ({error}): remove it, or give --skip-broken") from None
        print(f"{path} does not open as a picture ({error}): skipped", flush=True)
        return None


@lru_cache(maxsize=4)
def permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch's `count` pictures."""
    return cgn.rng(seed, 2 ** 32 + epoch).permutation(count)


def evaluation_cut(picture: torch.Tensor, side: int) -> torch.Tensor:
    """The middle of a picture (3, H, W) whose shorter side is 8 / 7 of `side`: 256 and 224 for ImageNet."""
    return F_image.center_crop(F_image.resize(picture, side * 8 // 7, antialias=True), side)


def whole(picture: torch.Tensor, side: int) -> torch.Tensor:
    """All of a picture (3, H, W) in `side` x `side` pixels."""
    return F_image.resize(picture, [side, side], antialias=True)


def labelled_files(folder: str) -> list[tuple[str, tuple[int, ...]]]:
    """Pictures and labels of a folder: three labels each from the labels.csv that cgn.py writes, else one of its subfolders'.

    Raises ValueError for a folder without pictures, for a path that leaves it, and for a label that is no number.
    """
    table = Path(folder) / "labels.csv"
    if table.exists():
        rows = evaluate.read_rows(str(table), ("file",), ("shape",), ("texture",), ("background",))
        try:
            files = [(str(Path(folder) / file), tuple(map(int, labels))) for file, *labels in rows]
        except ValueError as error:
            raise ValueError(f"{table} holds a label that is no number ({error})") from None
        outside = [file for file, *_ in rows if Path(file).name != file]
        if outside:
            raise ValueError(f"{table} names {outside[0]!r}, which is not in its folder")
        return files
    try:
        return [(path, (label,)) for path, label in cgn.PictureFolder(folder).samples]
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(f"{folder} holds no pictures in subfolders, one a class ({error})") from None


@cgn.ctrl_c_waits()
def train_ensemble(config: dict, model: Ensemble, real: Callable, counterfactual: Optional[Callable], out: Path,
                   device: str = "cpu") -> None:
    """Train with SGD; real(first) gives x (n, 3, H, W) in [0, 1], y (n,) of each step from `first` on, counterfactual(first)
    x (m, 3, H, W), labels (m, heads).

    config: seed, steps, lr, momentum, weight_decay, decay, milestones (steps), smoothing, save_every, bf16. Every process of a
    group calls it with its own share of each batch; what a network draws itself, as for dropout, depends on seed, step and rank.
    Writes log.jsonl and checkpoint.pt into `out` and continues from there. Raises ValueError where `out` holds another run, or the
    loss is not finite.
    """
    rank = distributed.get_rank() if distributed.is_initialized() else 0
    optimizer = torch.optim.SGD(model.parameters(), config["lr"], config["momentum"], weight_decay=config["weight_decay"])
    parts = {"ensemble": model, "optimizer": optimizer}
    first = cgn.continue_together(out, config, parts)
    network = nn.parallel.DistributedDataParallel(model) if distributed.is_initialized() else model
    model.train()
    reals, others = real(first), counterfactual(first) if counterfactual else None
    started = time.time()
    for step in range(first, config["steps"]):
        x, y = (part.to(device) for part in next(reals))
        x_cf, labels = (part.to(device) for part in next(others)) if others else (x[:0], y.new_zeros(0, 3))
        torch.manual_seed(int(cgn.rng(config["seed"], 2 ** 40 * (rank + 1) + step).integers(2 ** 63)))
        for group in optimizer.param_groups:
            group["lr"] = config["lr"] * config["decay"] ** sum(step >= milestone for milestone in config["milestones"])
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=config["bf16"]):
            scores = network(u2net.normalise(torch.cat([x, x_cf])))
        loss = ensemble_loss(scores[:len(x)].float(), y.flatten(), scores[len(x):].float(), labels[:, :scores.shape[1]],
                             config["smoothing"])
        optimizer.zero_grad()
        loss.backward()
        mean = loss.detach()
        if distributed.is_initialized():
            distributed.all_reduce(mean)
            mean /= distributed.get_world_size()
        if not torch.isfinite(mean):
            raise ValueError(f"step {step + 1}: the loss is not finite; the last checkpoint is kept: try a smaller --lr")
        optimizer.step()
        done = step + 1
        if rank == 0 and (done % config["save_every"] == 0 or done == config["steps"] or cgn.stopping()):
            rate = (done - first) / (time.time() - started)
            cgn.append_row(out / "log.jsonl", {"step": done, "loss": mean.item(), "steps_per_second": float(f"{rate:.3g}")})
            cgn.save_state(out / "checkpoint.pt", {"config": config, "step": done, **{name: part.state_dict() for name, part in parts.items()}})
            print(f"step {done}/{config['steps']}: loss {mean.item():.3f}, {(config['steps'] - done) / rate / 3600:.1f} h left", flush=True)
        if cgn.stopping():
            raise KeyboardInterrupt


def load_steps(dataset: Batches, steps: range, workers: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The items `steps` of a data set, read by `workers` other processes; ValueError where one of them fails or dies."""
    try:
        yield from torch.utils.data.DataLoader(dataset, batch_size=None, sampler=steps, num_workers=workers)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{str(error).strip().splitlines()[-1].removeprefix('ValueError: ')}; the last checkpoint is kept") from None


def draw_steps(model: nn.Module, first: int, batch: int, side: int, seed: int, per_shape: int, share: slice
               ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Counterfactuals made when they are needed, for each step from `first` on: x (n, 3, side, side) in [0, 1] and labels (n, 3).

    Image i of the whole training is image i of the CGN's data set with this seed."""
    for step in itertools.count(first):
        part = range(step * batch, (step + 1) * batch)[share]
        sample, labels = cgn.counterfactual_batch(model, seed, part, per_shape, model.truncation)
        yield F.interpolate((sample.image + 1) / 2, (side, side), mode="bilinear", antialias=True).cpu(), labels.T


def load_ensemble(path: Union[str, os.PathLike]) -> Ensemble:
    """The ensemble of a checkpoint, in eval mode; `.config` is its run's. ValueError for a file that is none."""
    state = cgn.read_checkpoint(path)
    try:
        config = state["config"]
        model = Ensemble(torchvision.models.get_model(config["network"], num_classes=len(config["names"])), config["heads"])
        model.load_state_dict(state["ensemble"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} is no checkpoint of an ensemble ({' '.join(str(error).split())[:200]})") from None
    model.config = config
    return model.eval()


@torch.no_grad()
def score(network: Callable, paths: Sequence[str], side: int, cut: Callable = evaluation_cut, skip: bool = False,
          device: str = "cpu") -> torch.Tensor:
    """What network(x), x (n, 3, side, side) in [0, 1] on the device, gives for the pictures `paths`: (N, ..) on the CPU.

    Raises ValueError for no pictures, and where one does not open, unless `skip` is set: then its name is printed and its row
    is nan.
    """
    if not len(paths):
        raise ValueError("there are no pictures to judge")
    loader = torch.utils.data.DataLoader(Pictures(paths, side, cut, skip), batch_size=50, num_workers=WORKERS)
    try:
        return torch.cat([network(x.to(device)).cpu() for x in loader])
    except (RuntimeError, ValueError) as error:
        raise ValueError(str(error).strip().splitlines()[-1].removeprefix("ValueError: ")) from None


def sentence(model: Ensemble, x: torch.Tensor, names: Sequence[str]) -> str:
    """Figure 1's sentence about x (1, 3, H, W) in [0, 1], with each head's confidence."""
    with torch.no_grad():
        found = model.eval()(u2net.normalise(x))[0].softmax(dim=1).max(dim=1)
    shape, texture, background = (names[index] for index in found.indices.tolist())

    def a(noun: str) -> str:
        return f"{'an' if noun[0].lower() in 'aeiou' else 'a'} {noun}"

    return (f"{a(shape)} shape with {texture} texture on {a(background)} background ("
            + ", ".join(f"{name} {100 * p:.0f} %" for name, p in zip(cgn.MECHANISMS, found.values.tolist())) + ")")


# ------------------------------------------------------------------------------------------------------------ command line

def _ensemble_main(args: argparse.Namespace, out: Path) -> None:
    """Train the ensemble on folders, as --real and --counterfactuals or --cgn say."""
    cgn.join_group(args)
    rank, ranks = (distributed.get_rank(), distributed.get_world_size()) if distributed.is_initialized() else (0, 1)
    if not args.real:
        raise ValueError("--dataset imagenet needs --real FOLDER, with one subfolder a class")
    counted = {"--batch": args.batch, "--ratio": args.ratio * args.batch}
    for name, count in counted.items():
        if count % ranks or count != int(count):
            raise ValueError(f"{name} gives batches of {count} images, which cannot be spread evenly over {ranks} processes")
    files = [row for folder in args.real for row in labelled_files(folder)]
    folders = [cgn.class_folders(folder) for folder in args.real]
    if any(classes != folders[0] for classes in folders):
        raise ValueError(f"the folders {', '.join(args.real)} do not have the same subfolders")
    names = folders[0]
    pictures = [row for folder in args.counterfactuals or () for row in labelled_files(folder)]
    share, epoch, made = slice(rank, None, ranks), -(-len(files) // args.batch), int(args.ratio * args.batch)
    if any(len(labels) != 3 or not all(0 <= label < len(names) for label in labels) for _, labels in pictures):
        raise ValueError(f"the counterfactuals need three labels each in 0..{len(names) - 1}, like --real's subfolders")
    config = {"network": args.network, "heads": args.heads, "names": names, "side": args.side, "seed": args.seeds[0], "batch": args.batch,
              "ratio": args.ratio, "real": args.real, "counterfactuals": args.counterfactuals, "cgn": args.cgn,
              "per_shape": args.per_shape if args.cgn else None, "scratch": args.scratch,
              "steps": 2 if args.dry_run else args.epochs * epoch, "lr": args.lr, "momentum": 0.9, "weight_decay": 1e-4,
              "decay": args.decay, "milestones": [epoch * number for number in args.milestones], "smoothing": args.label_smoothing,
              "save_every": args.save_every or epoch, "bf16": args.bf16}
    torch.manual_seed(args.seeds[0])
    network = torchvision.models.get_model(args.network, num_classes=1000)
    if not args.scratch and not args.dry_run:
        try:
            network.load_state_dict(torch.load(biggan.find_weights(args.weights), map_location="cpu", weights_only=True))
        except Exception as error:          # whatever a hostile or broken file makes the reader raise
            raise ValueError(f"{args.weights} is no state dict of {args.network} ({str(error).splitlines()[0]}): name another with "
                             "--weights, or start anew with --scratch") from None
    model = Ensemble(network, args.heads, frozen=not args.scratch)
    if len(names) != 1000:                          # heads of another data set start anew
        model.heads = nn.ModuleList(nn.Linear(model.heads[0].in_features, len(names)) for _ in range(args.heads))

    def from_files(files: list, batch: int) -> Callable:
        dataset = Batches(files, batch, args.side, args.seeds[0], share, args.skip_broken)
        return lambda first: load_steps(dataset, range(first, config["steps"]), args.workers)

    real, counterfactual = from_files(files, args.batch), None
    if made < 1 and (args.cgn or pictures):
        raise ValueError(f"--ratio {args.ratio} leaves no counterfactual in a batch: raise it, or leave --counterfactuals and --cgn off")
    if args.cgn:
        model_cgn, part = cgn.load(args.cgn).to(args.device), slice(rank * made // ranks, (rank + 1) * made // ranks)
        if model_cgn.classes != len(names):
            raise ValueError(f"{args.cgn} draws {model_cgn.classes} classes: --real has {len(names)}")
        counterfactual = lambda first: draw_steps(model_cgn, first, made, args.side, args.seeds[0], args.per_shape, part)
    elif pictures:
        counterfactual = from_files(pictures, made)
    if rank == 0:
        print(f"{args.network} with {args.heads} heads: {len(files)} real images, {len(names)} classes, {len(pictures)} counterfactuals"
              f"{' and ' + args.cgn if args.cgn else ''}; {config['steps']} steps of {args.batch} + {made if counterfactual else 0}; "
              f"writing to {out}", flush=True)
    try:
        train_ensemble(config, model.to(args.device), real, counterfactual, out, args.device)
    except RuntimeError as error:           # where a worker dies, torch raises this from a signal, wherever the training is
        if "DataLoader worker" not in str(error):
            raise
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)       # another one that ends now is no more news
        raise ValueError(f"{str(error).splitlines()[0]} Its pictures may need more memory: try fewer --workers; the last "
                         "checkpoint is kept") from None
    if rank == 0:
        print(f"done; next: python evaluate.py --ensemble {out / 'checkpoint.pt'} --imagenet path/to/val")


def _say_main(args: argparse.Namespace) -> None:
    if not args.checkpoint:
        raise ValueError(f"--say {args.say} needs --checkpoint, the ensemble's")
    model = load_ensemble(args.checkpoint).to(args.device)
    if model.config["heads"] != 3:
        raise ValueError(f"{args.checkpoint} has {model.config['heads']} head: the sentence needs those of shape, texture and background")
    picture = F_image.pil_to_tensor(u2net.open_photo(args.say))
    names = model.config["names"]
    if len(names) == 1000:                          # folders are named by WordNet number, in torchvision's order
        names = torchvision.models.ResNet50_Weights.IMAGENET1K_V1.meta["categories"]
    print(sentence(model, evaluation_cut(picture, model.config["side"])[None].to(args.device).float() / 255, names))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Train classifiers on real and counterfactual images and compare them.")
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")
    what = parser.add_argument_group("what to make of the MNIST variants").add_mutually_exclusive_group()
    what.add_argument("--table", action="store_true", help="Table 2: every --method on every --dataset (the default)")
    what.add_argument("--figure", action="store_true", help="Figure 7: accuracy against the number of counterfactuals; "
                      "the first of --seeds")
    what.add_argument("--latents", action="store_true", help="Figure 6: what the two latents of a beta-VAE are (on colored in "
                      "the paper); the first of --seeds")
    what.add_argument("--cause", action="store_true", help="Table 5: which signal is the cause, found in environments (double-colored "
                      "in the paper)")
    data = parser.add_argument_group("on what, and how (section 4.3, C.4)")
    data.add_argument("--dataset", nargs="+", choices=(*mnist_variants.NAMES, "imagenet"), help="imagenet: the ensemble of three "
                      "heads, see below (default: the MNIST variants; for --cause those with backgrounds)")
    data.add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS))
    data.add_argument("--label", choices=LABELS, default="shape", help="what the classifier reads (default: %(default)s)")
    data.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of data, generator and classifier together")
    data.add_argument("--count", type=int, default=100_000, help="generated images (default: %(default)s)")
    data.add_argument("--per-shape", type=int, help="counterfactuals that share a shape (default: 10; of --cgn's 1)")
    data.add_argument("--steps", type=int, default=12_000, help=f"of a classifier, {BATCH} images each; of IRM's {IRM_BATCH}, "
                      f"and 3 (wildlife: 6) times as many; of LNTL half as many (default: %(default)s)")
    data.add_argument("--generator-steps", type=int, help="of a missing CGN or GAN (default: as cgn.py)")
    data.add_argument("--shuffle", choices=cgn.SHUFFLES, help="of a missing CGN's textures (default: as cgn.py)")
    data.add_argument("--textures", help="wildlife: folder of DTD with the paper's textures (default: draw textures)")
    data.add_argument("--variance", type=float, default=mnist_variants.COLOR_VARIANCE, help="colored, double-colored: of an "
                        "image's colour around its class colour (default: %(default)s; authors' double-colored: 0.0001)")
    data.add_argument("--mnist", default="data/mnist", help="folder of MNIST's four .gz files (default: %(default)s)")
    run = parser.add_argument_group("run")
    run.add_argument("--runs", default="runs", help="folder of generators and of results.jsonl (default: %(default)s)")
    run.add_argument("--bf16", action="store_true", help="train in bfloat16 where that is safe: as in cgn.py")
    run.add_argument("--device", default="cpu")
    run.add_argument("--threads", type=int, help="CPU threads, at most one a CPU (default: torch's choice)")
    run.add_argument("--dry-run", action="store_true", help="the same in miniature, in a temporary folder")

    imagenet = parser.add_argument_group("the ensemble, --dataset imagenet (section 4.3, C.4)")
    imagenet.add_argument("--real", nargs="+", metavar="FOLDER", help="real images, one subfolder a class (IN, SIN, Mixed-Rand)")
    imagenet.add_argument("--counterfactuals", nargs="+", metavar="FOLDER", help="folders that cgn.py --counterfactuals wrote")
    imagenet.add_argument("--cgn", metavar="FILE", help="or a CGN's checkpoint to draw them from while training")
    imagenet.add_argument("--network", default="resnet50", help="classifier of torchvision that ends in a linear layer and "
                          "has no auxiliary outputs (default: %(default)s)")
    imagenet.add_argument("--weights", metavar="FILE", default=str(cgn.WEIGHTS / WEIGHTS), help=f"state dict to start from (default: "
                          f"weights/{WEIGHTS}, fetched where it is absent)")
    imagenet.add_argument("--scratch", action="store_true", help="start from random weights")
    imagenet.add_argument("--heads", type=int, choices=(1, 3), default=3, help="1: a plain classifier (default: %(default)s)")
    imagenet.add_argument("--batch", type=int, default=256, help="real images in a batch (default: %(default)s)")
    imagenet.add_argument("--ratio", type=float, default=1.0, help="counterfactuals for each of them (3.2; default: %(default)s)")
    imagenet.add_argument("--epochs", type=int, default=70)
    imagenet.add_argument("--lr", type=float, default=0.1)
    imagenet.add_argument("--decay", type=float, default=0.001, help="of the rate after each milestone (default: %(default)s)")
    imagenet.add_argument("--milestones", type=int, nargs="*", default=(30, 60), help="epochs (default: 30 60)")
    imagenet.add_argument("--label-smoothing", type=float, default=0.0, help="of all labels, 0 to 1 (default: %(default)s)")
    imagenet.add_argument("--side", type=int, default=224, help="pixels of an image (default: %(default)s)")
    imagenet.add_argument("--workers", type=int, default=WORKERS, help="processes that read pictures (default: 4, at most one a CPU)")
    imagenet.add_argument("--save-every", type=int, help="steps between checkpoints (default: an epoch)")
    imagenet.add_argument("--skip-broken", action="store_true", help="take the next picture for one that does not open, which is named")
    imagenet.add_argument("--out", default="runs/ensemble", help="folder of the run, continued if it is there (default: %(default)s)")
    imagenet.add_argument("--checkpoint", metavar="FILE", help="with --say: the ensemble's checkpoint")
    imagenet.add_argument("--say", metavar="PHOTO", help="what the three heads see in a picture")
    return parser


def main(argv: Optional[list[str]] = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        for name in ("count", "per_shape", "steps", "generator_steps", "threads", "batch", "epochs", "side", "save_every"):
            if getattr(args, name) is not None and getattr(args, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
        if not 0 <= args.label_smoothing <= 1:
            raise ValueError(f"--label-smoothing {args.label_smoothing}: must be in 0..1")
        if args.figure and args.count < 10:
            raise ValueError(f"--count {args.count}: --figure needs at least 10")
        if args.threads:
            torch.set_num_threads(min(args.threads, os.cpu_count()))
        if args.checkpoint and not args.say:
            raise ValueError(f"--checkpoint {args.checkpoint} needs --say PHOTO; evaluate.py --ensemble judges it on folders")
        args.dataset = args.dataset or [name for name in mnist_variants.NAMES if not (args.cause and name == "colored")]
        args.per_shape = args.per_shape or (1 if args.dataset == ["imagenet"] else 10)
        cgn.check_device(args.device)
        args.bf16 = cgn.bf16_pays(args.bf16, args.device)
        if args.dry_run:
            args.count, args.steps, args.generator_steps, args.seeds = 100, 2, 2, args.seeds[:1]
        with tempfile.TemporaryDirectory() as folder:
            if args.dry_run:
                args.runs = args.out = folder
            if args.say:
                _say_main(args)
            elif args.dataset == ["imagenet"]:
                _ensemble_main(args, Path(args.out))
            elif "imagenet" in args.dataset:
                raise ValueError("--dataset imagenet goes alone: it trains the ensemble, the others make a table")
            else:
                _write(args)
        if args.dry_run:
            print("dry run finished; nothing is kept")
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except RuntimeError as error:
        parser.error(cgn.lost_process(error))
    except KeyboardInterrupt:
        parser.exit(130, "\nstopped: the same command continues from what is written\n")


def _write(args: argparse.Namespace) -> None:
    if (args.cause or args.label == "background") and "colored" in args.dataset:
        raise ValueError(f"--dataset colored has no background label: {'--cause' if args.cause else '--label background'} needs "
                         "double-colored or wildlife")
    if args.latents:
        for dataset in args.dataset:
            path = Path(args.runs) / f"figure6-{dataset}.png"
            data = mnist_variants.load(dataset, "train", textures=args.textures, variance=args.variance, root=args.mnist, seed=args.seeds[0])
            figure6(data, path, args.steps, args.seeds[0])
            print(f"wrote {path}")
        return
    if args.figure:
        for dataset in args.dataset:
            path = Path(args.runs) / f"figure7-{dataset}.png"
            figure7(args, dataset, path)
            print(f"wrote {path}")
        return
    if args.cause:
        path, text = Path(args.runs) / "table5.md", "\n\n".join(f"{name}\n\n{table5(args, name)}" for name in args.dataset)
    else:
        path, text = Path(args.runs) / f"table-{args.label}.md", table(args)
    mnist_variants.write_file(path, (text + "\n").encode())
    print(f"\n{text}\n\nwrote {path}")


if __name__ == "__main__":
    main()
