"""Classifiers that do not take the easy way (Counterfactual Generative Networks, ICLR 2021), and their uses.

On an MNIST variant's training split shape, foreground and background give the label away, on its test split
only the shape. METHODS: what the same CNN learns from in each row of Table 2 (4.3, C.4).

    python classify.py --dataset colored                    # Table 2; trains what is missing, below runs/
    python classify.py --cgn weights/cgn-colored.pth        # on this CGN's counterfactuals
    python classify.py --make mechanisms --cgn FILE         # also table5, figure6, figure7

On ImageNet a ResNet-50 has a head each for shape, texture and background, which learn from counterfactuals,
and together from real images (4.3, C.4). Its predictions are a table, which evaluate.py judges.

    python classify.py --dataset imagenet --real path/to/train --counterfactuals path/to/counterfactuals
    python classify.py --checkpoint runs/ensemble/checkpoint.pt --say photo.jpg         # Figure 1's sentence
"""
import argparse
import copy
import hashlib
import itertools
import json
import math
import os
import tempfile
import time
from functools import lru_cache, partial
from pathlib import Path
from typing import Callable, NamedTuple, Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR, StepLR
from torchvision import transforms
from torchvision.transforms import functional as F_image

import cgn
import drawing
import evaluate
import mnist_variants
import u2net
from run import (Items, Run, append_row, bf16_pays, check_apart, check_output, command, find_device,
                 join_group, one_line, one_process, override, rank_and_world, read_checkpoint, read_lines,
                 refuse_options, rng, save_state, watched, worker_errors)

LABELS = ("shape", "foreground", "background")
COUNTERFACTUAL = 2 ** 36            # from here on counterfactuals have their random numbers, rng(seed, index)
BATCH, BETA = 64, 4.0               # images of a step on MNIST (authors' code); of the beta-VAE

# Every number of every command. Options override some of them, --set NAME=VALUE overrides any.
TABLES = {
    "steps": 12_000,                # of a classifier; a method may take several times as many
    "count": 400_000, "per_shape": 1,           # generated images, of which so many share a shape
    "seeds": [0, 1, 2], "label": "shape",       # of data, generator and classifier; what the last reads
    "variance": mnist_variants.COLOR_VARIANCE,
    "generator_steps": 0}           # of a missing CGN or GAN; 0: as in cgn.PRESETS
FIGURE6 = {"steps": 12_000, "seeds": [0], "variance": mnist_variants.COLOR_VARIANCE}
VARIETY = {"count": 2000, "seeds": [], "reader": "reader.pth"}
MECHANISMS = {**FIGURE6, "count": 5000, "seeds": [], "splits": 10, "inception": ""}
ENSEMBLE = {                        # the paper's (C.4)
    "network": "resnet50", "weights": "resnet50-0676ba61.pth",      # torchvision's, or weights=random
    "heads": 3,                     # 1: a plain classifier
    "batch": 256, "ratio": 1.0,     # real images of a step, and counterfactuals for each of them (3.2)
    "epochs": 70, "lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4, "smoothing": 0.0,   # of all labels
    "milestones": [30, 60], "decay": 0.001,     # after these epochs the rate is multiplied by it
    "side": 224, "per_shape": 1, "seeds": [0], "save_every": 0}     # steps between checkpoints; 0: an epoch

Source = tuple[Tensor, Tensor, int]         # uint8 images (N, 3, 32, 32), labels (N,), how many in a batch
Batch = list[tuple[Tensor, Tensor]]         # of each source images (n, 3, 32, 32) in [-1, 1], labels (n,)


# ---------- networks and training

class Classifier(nn.Sequential):
    """The paper's CNN for all MNIST experiments (C.4, authors' code): (N, 3, 32, 32) in [-1, 1] -> (N, C).

    The first ReLU stands behind its pooling: the same function, a quarter of the work. The norm's scale and
    shift go into the first convolution's weights: images then need no gradient.
    """

    def __init__(self, classes: int = 10):
        super().__init__(
            nn.BatchNorm2d(3), nn.Conv2d(3, 32, 5), nn.MaxPool2d(3, 2, 1), nn.ReLU(),       # (N, 32, 14, 14)
            nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU(),                           # (N, 64, 7, 7)
            nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(),
            nn.AvgPool2d(7), nn.Flatten(), nn.Linear(64, classes))                          # (N, C)

    def features(self, x: Tensor) -> Tensor:
        """(N, 3, 32, 32) in [-1, 1] -> (N, 32, 14, 14), behind the second convolution and ReLU."""
        norm, conv, *layers = list(self)[:6]
        x = F.batch_norm(x, norm.running_mean, norm.running_var, training=norm.training,
                         momentum=norm.momentum, eps=norm.eps)
        x = F.conv2d(x, conv.weight * norm.weight[:, None, None],
                     conv.bias + conv.weight.sum(dim=(2, 3)) @ norm.bias)
        return nn.Sequential(*layers)(x)

    def rest(self, h: Tensor) -> Tensor:
        """Features (N, 32, 14, 14) -> scores (N, C)."""
        return nn.Sequential(*list(self)[6:])(h)

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.features(x))


def normalised() -> nn.Module:
    """`Classifier`, image and features normalised in each image: it sees neither brightness nor contrast."""
    model = Classifier()
    for place in (3, 5):
        model[place] = nn.Sequential(nn.InstanceNorm2d(32), nn.ReLU())
    return nn.Sequential(nn.InstanceNorm2d(3), model)


class Unlearner(nn.Module):
    """LNTL's classifier (Kim et al., 2019), whose features a second head searches for colours: in each of 14
    x 14 places for red, green and blue, in eight bins."""

    def __init__(self):
        super().__init__()
        self.classifier = Classifier()
        self.colors = nn.Sequential(nn.Conv2d(32, 96, 3, padding=1), nn.BatchNorm2d(96), nn.ReLU(),
                                    nn.Conv2d(96, 24, 3, padding=1, groups=3), nn.Unflatten(1, (3, 8)))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(x)


def fit(model: nn.Module, batches: Callable, objective: Callable, steps: int, optimizers: Callable, *,
        bf16: bool = False, device: str = "cpu", report: str = "") -> nn.Module:
    """Train a classifier, a beta-VAE or a network of the miniature; returns it in eval mode.

    batches(step)               gives what the objective reads, on the device
    objective(model, batch, progress 0 .. 1)            the loss, a scalar, in bfloat16 where `bf16`
    optimizers(model, steps)    an optimizer of all parameters, and its schedule or None
    report                      begins lines of progress; none where it is empty
    """
    model.to(device).train()
    optimizer, schedule = optimizers(model, steps)
    for step in watched(range(steps), report):
        batch = batches(step)
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16):
            loss = objective(model, batch, step / steps)
        model.zero_grad()
        loss.backward()
        optimizer.step()
        if schedule:
            schedule.step()
    return model.eval()


def adadelta(model, steps, *, lr, decay, epochs):
    """Adadelta, its rate multiplied by `decay` after each of `epochs` equal parts (authors' code)."""
    optimizer = torch.optim.Adadelta(model.parameters(), lr=lr)
    return optimizer, StepLR(optimizer, max(1, steps // epochs), decay)


def adam(model, steps, *, lr):
    """Adam, its rate falling to 0."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    return optimizer, LambdaLR(optimizer, lambda step: 1 - step / steps)


def sgd(model, steps, *, lr):
    """SGD, its rate falling to 0 (Kim et al., 2019, but for the fall)."""
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=5e-4)
    return optimizer, LambdaLR(optimizer, lambda step: 1 - step / steps)


def mixed(sources: Sequence[Source], seed: int, device: str, step: int) -> Batch:
    """A step's batch for `fit`: of each source its own number of images, by rng(seed, step)."""
    generator, batch = rng(seed, step), []
    for images, labels, count in sources:
        rows = torch.from_numpy(generator.integers(len(images), size=count))
        batch.append((drawing.to_float(images[rows].to(device)), labels[rows].to(device)))
    return batch


# ---------- objectives, and the methods of Table 2

def erm(model: nn.Module, batch: Batch, progress: float) -> Tensor:
    """Empirical risk: the mean cross-entropy of all sources' images. A scalar."""
    x, y = map(torch.cat, zip(*batch))
    return F.cross_entropy(model(x).float(), y)


def irm(model: nn.Module, batch: Batch, progress: float, *, weight: float) -> Tensor:
    """Invariant risk minimization (Arjovsky et al., 2019): the mean risk of the sources, as environments, and
    their mean penalty, its weight rising with the progress 0 .. 1. A scalar."""
    x, y = zip(*batch)
    scores = model(torch.cat(x)).float().split([len(part) for part in y])
    penalty = sum(irm_penalty(*pair) for pair in zip(scores, y)) / len(y)
    risk = sum(F.cross_entropy(*pair) for pair in zip(scores, y)) / len(y)
    return risk + weight * progress * penalty


def irm_penalty(z: Tensor, y: Tensor) -> Tensor:
    """Squared derivative of the risk of scores s z (n, C) by s at 1, estimated without bias: the product of
    those of the even and the odd half. A scalar, also below 0. Raises ValueError for n < 2."""
    if len(z) < 2:
        raise ValueError(f"the penalty needs two images of an environment or more, not {len(z)}")
    derivative = ((z.softmax(dim=1) - F.one_hot(y, z.shape[1])) * z).sum(dim=1)     # of each image's risk
    return derivative[::2].mean() * derivative[1::2].mean()


def lntl(model: Unlearner, batch: Batch, progress: float, *, reversal: float, entropy: float) -> Tensor:
    """Learning not to learn (Kim et al., 2019): the head learns colours from the features; these learn the
    label, unlearn the colours along the head's reversed gradient, and raise its entropy. A scalar."""
    x, y = map(torch.cat, zip(*batch))
    h, bins = model.classifier.features(x), color_bins(x)                           # (N, 3, 14, 14)
    loss = F.cross_entropy(model.classifier.rest(h).float(), y)
    found = model.colors(reverse_gradient(h, reversal)).transpose(1, 2)             # (N, 8, 3, 14, 14)
    loss = loss + sum(F.cross_entropy(found[:, :, k].float(), bins[:, k]) for k in range(3))
    model.colors.requires_grad_(False)
    p = model.colors(h).float().log_softmax(dim=2)
    model.colors.requires_grad_(True)
    return loss + entropy * (p.exp() * p).sum(dim=2).mean()


def color_bins(x: Tensor) -> Tensor:
    """What LNTL's head is to find in images (N, 3, H, W): 0..7 (N, 3, 14, 14), and -100 where they are
    black."""
    small = F.interpolate(x + 1, 14, mode="bilinear", antialias=True)               # of black exactly 0
    return torch.where(small > 0, (small * 4).long().clamp(max=7), -100)


def reverse_gradient(h: Tensor, reversal: float) -> Tensor:
    """h, whose gradient from here is multiplied by -reversal (Ganin and Lempitsky, 2015)."""
    h = h.view_as(h)
    h.register_hook(lambda gradient: -reversal * gradient)
    return h


class Method(NamedTuple):
    """A row of Table 2. batch: how many images of a step come from where; times: of --steps, and on wildlife.

    real            the biased training split, all of whose labels agree
    0.9 .. 1.0      an environment, whose foregrounds and backgrounds agree with the label that often (C.4)
    randomised      real, with random foregrounds and backgrounds: a ceiling
    recombined      ten such sets: the ceiling of ten counterfactuals a shape
    gan, cgn        samples of a conditional GAN, counterfactuals of a CGN
    """
    batch: dict[str, int]
    objective: Callable = erm
    optimizers: Callable = partial(adadelta, lr=1.0, decay=0.7, epochs=10)
    network: Callable = Classifier
    times: tuple[float, float] = (1, 1)


# IRM: one image in twenty disagrees with its colour, one in 200 to 270 with both textures; only these teach
# shapes.
IRM = (partial(adam, lr=2e-3), Classifier, (3, 6))
FIVE = {"0.9": 6, "0.925": 6, "0.95": 6, "0.975": 6, "1.0": 6}
METHODS = {
    "original": Method({"real": BATCH}),
    "irm-2": Method({"0.9": 15, "1.0": 15}, partial(irm, weight=1.0), *IRM),
    "irm-5": Method(FIVE, partial(irm, weight=1.0), *IRM),
    "lntl": Method({"real": 128}, partial(lntl, reversal=0.1, entropy=0.01), partial(sgd, lr=0.01),
                   Unlearner),
    "original+gan": Method({"real": 32, "gan": 32}),
    "cgn": Method({"cgn": BATCH}),
    # DEVIATION: of half real images it learns to tell them apart, and takes the easy way on these.
    "original+cgn": Method({"real": 4, "cgn": 60}),
    "randomised": Method({"randomised": BATCH}),
    "recombined": Method({"recombined": BATCH}),
    # Two controls, run when asked for: IRM's environments in one, and images without brightness and contrast.
    "pooled": Method(FIVE, erm, *IRM),
    "normalised": Method({"real": BATCH}, network=normalised)}


def train(method: Method, sources: Sequence[Source], steps: int, seed: int, *, device: str, **how
          ) -> nn.Module:
    """A method's network, trained on its sources: a pure function of its arguments. how: see `fit`."""
    torch.manual_seed(seed)
    model = method.network().to(memory_format=torch.channels_last)
    return fit(model, partial(mixed, sources, seed, device), method.objective, steps, method.optimizers,
               device=device, **how)


@torch.no_grad()
def predict(model: nn.Module, images: Tensor) -> Tensor:
    """Predicted class (N,) of uint8 images (N, 3, 32, 32)."""
    device = next(model.parameters()).device
    return torch.cat([model(drawing.to_float(x.to(device))).argmax(dim=1).cpu() for x in images.split(250)])


# ---------- Tables 2 and 5

def load(args, dataset, split, agreement, seed, what="load"):
    return getattr(mnist_variants, what)(dataset, split, agreement=agreement, seed=seed, root=args.mnist,
                                         textures=args.textures, variance=args.variance)


def load_source(args, dataset, name, place, seed):
    """What a method's batches mix, a Variant; see `Method`."""
    if name in ("gan", "cgn"):
        return generated(args, dataset, name, seed)
    if name == "recombined":
        sets = [load(args, dataset, "train", 0.1, 10 * seed + k) for k in range(10)]
        return mnist_variants.Variant(*map(torch.cat, zip(*sets)))
    if name in ("real", "randomised"):
        return load(args, dataset, "train", 1.0 if name == "real" else 0.1, seed)
    return load(args, dataset, "train", float(name), 10 * seed + place)


def generated(args, dataset, kind, seed):
    """--counterfactuals, or images of --cgn, or of a CGN or GAN below --runs, which is trained first."""
    if kind == "cgn" and args.counterfactuals:
        return drawing.read_counterfactuals(args.counterfactuals[0])
    checkpoint = args.cgn
    if kind == "gan" or not checkpoint:
        checkpoint = args.runs / f"{dataset}-{kind}-{seed}" / "checkpoint.pt"
        options = {"dataset": dataset, "model": kind, "seed": seed, "out": checkpoint.parent,
                   "steps": args.generator_steps or None, "mnist": args.mnist, "device": args.device}
        options |= {"textures": args.textures} if dataset == "wildlife" else {"variance": args.variance}
        cgn.main([*(f"--{name}={value}" for name, value in options.items() if value is not None),
                  *["--bf16"] * args.bf16])
    print(f"drawing {args.count} images from {checkpoint}", flush=True)
    model = cgn.load(checkpoint).to(args.device)
    with torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.bf16):
        return drawing.counterfactuals(model, args.count, seed, args.per_shape)


def row_key(args, dataset, name, seed, label):
    """All that changes the numbers of a row of results.jsonl."""
    method, wild = METHODS[name], dataset == "wildlife"
    key = {"dataset": dataset, "method": name, "seed": seed, "label": label, "bf16": args.bf16,
           "steps": math.ceil(args.steps * method.times[wild]), "batch": method.batch,
           "data": f"{'DTD' if args.textures else 'drawn'} textures" if wild else f"variance {args.variance}",
           "how": [[part.func.__name__, part.keywords] if isinstance(part, partial) else part.__name__
                   for part in method[1:4]]}
    for kind in {"gan", "cgn"} & method.batch.keys():
        file = kind == "cgn" and (args.cgn or args.counterfactuals and args.counterfactuals[0])
        key["generator"] = cgn.file_hash(file) if file else [cgn.PRESETS["digits"], args.generator_steps]
        if kind == "gan" or not args.counterfactuals:
            key |= {"count": args.count, "per_shape": args.per_shape if kind == "cgn" else 1}
    return json.loads(json.dumps(key))


def cell(args, dataset, name, seed, label, splits):
    """One cell of Table 2: train a classifier to read `label`, keep it, and measure its accuracies. Returns a
    row of results.jsonl; one with the same key is not computed again. In an environment such as test@0.9,
    whose labels agree in 90 %, the shape's is to be found, whatever was learned."""
    key, results, start = row_key(args, dataset, name, seed, label), args.runs / "results.jsonl", time.time()
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:8]
    path = args.runs / f"{dataset}-{name}-{seed}-{digest}" / "classifier.pth"
    found = [row for row in read_lines(results) if key.items() <= row.items() and {*splits} <= row.keys()]
    row = found[0] if found else dict(key)
    if not found:
        sources = []
        for place, (source, count) in enumerate(METHODS[name].batch.items()):
            data = load_source(args, dataset, source, place, seed)
            sources.append((data.images, getattr(data, label), count))
        model = train(METHODS[name], sources, key["steps"], seed, bf16=args.bf16, device=args.device,
                      report=path.parent.name)
        for split in splits:
            part, _, agreement = split.partition("@")
            data = load(args, dataset, part, float(agreement) if agreement else None, seed)
            wanted = data.shape if agreement else getattr(data, label)
            row[split] = evaluate.accuracy(predict(model, data.images), wanted)
        save_state(path, model.state_dict())
        append_row(results, {**row, "seconds": round(time.time() - start), "device": args.device,
                             "torch": torch.__version__, "threads": torch.get_num_threads()})
    print(f"{path}: {', '.join(f'{split} {100 * row[split]:.1f} %' for split in splits)}", flush=True)
    return row


def cells(args, dataset, name, label, *splits):
    """`cell` over --seeds: for each split the mean accuracy in percent and its sample standard deviation."""
    rows = [cell(args, dataset, name, seed, label, splits) for seed in args.seeds]
    found = [evaluate.mean_std([row[split] for row in rows]) for split in splits]
    return [f"{100 * mean:.1f}" + (f" ± {100 * std:.1f}" if len(rows) > 1 else "") for mean, std in found]


def table2(args):
    """Print Table 2: accuracies on the train and the test split."""
    table = {}
    for dataset, method in itertools.product(args.dataset, args.method):
        learned, _, found = cells(args, dataset, method, args.label, "train", "val", "test")
        table.setdefault(method, {}).update({f"{dataset}: train": learned, f"{dataset}: test": found})
    evaluate.print_table(f"{args.label} label", table)


def table5(args):
    """Print Table 5 (H): of three classifiers, each trained on counterfactuals for another label, the one
    that finds the class as well in all environments reads the cause."""
    splits, table = ("test@0.9", "test@0.95", "test@1.0"), {}
    for dataset, label in itertools.product(args.dataset, LABELS):
        for split, found in zip(splits, cells(args, dataset, "cgn", label, *splits)):
            table.setdefault(f"{dataset}, {split}", {})[f"{label} classifier"] = found
    evaluate.print_table("environment", table)


# ---------- Figures 6 and 7

class VAE(nn.Module):
    """A beta-VAE (Higgins et al., 2017) of images (N, 3, 32, 32) in [-1, 1] with two latents: Figure 6."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, 32, 4, 2, 1), nn.ReLU(), nn.Conv2d(32, 64, 4, 2, 1), nn.ReLU(),
            nn.Conv2d(64, 128, 4, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(2048, 4))   # means, log-variances
        up = partial(nn.ConvTranspose2d, kernel_size=4, stride=2, padding=1)
        self.decoder = nn.Sequential(               # no tanh, which saturates at the black background
            nn.Linear(2, 2048), nn.ReLU(), nn.Unflatten(1, (128, 4, 4)), up(128, 64), nn.ReLU(), up(64, 32),
            nn.ReLU(), up(32, 3))

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """noise (N, 2) -> reconstruction like x, mean and logarithm of the variance (N, 2)."""
        mean, log_variance = self.encoder(x).chunk(2, dim=1)
        return self.decoder(mean + (log_variance / 2).exp() * noise), mean, log_variance


def vae_loss(x: Tensor, made: Tensor, mean: Tensor, log_variance: Tensor, beta: float) -> Tensor:
    """Half the squared error, plus beta times the latents' divergence from N(0, 1); mean over images."""
    error = (x - made).square().flatten(1).sum(dim=1) / 2
    divergence = (mean.square() + log_variance.exp() - 1 - log_variance).sum(dim=1) / 2
    return (error + beta * divergence).mean()


def figure6(args):
    """Figure 6 (A.1) as a PNG: training images, and what a beta-VAE makes of a grid of two latents, -2 .. 2.
    Along each axis colour and digit change together, as the data never show them apart."""
    seed, device, axis = args.seeds[0], args.device, torch.linspace(-2, 2, 10)
    rows, columns = ([f"z{k} = {value:.1f}" for value in axis.tolist()] for k in (1, 2))
    for dataset in args.dataset:
        path = check_output(args.runs / f"figure6-{dataset}.png")
        data = load(args, dataset, "train", None, seed)

        def batches(step):
            generator = rng(seed, step)
            chosen = torch.from_numpy(generator.integers(len(data.images), size=BATCH))
            noise = cgn.normal(generator, BATCH, 2)
            return drawing.to_float(data.images[chosen]).to(device), noise.to(device)

        torch.manual_seed(seed)
        model = fit(VAE().to(memory_format=torch.channels_last), batches,
                    lambda model, batch, _: vae_loss(batch[0], *model(*batch), BETA), args.steps,
                    lambda model, _: (torch.optim.Adam(model.parameters(), 1e-3), None),
                    device=device, report="beta-VAE")
        with torch.no_grad():
            made = drawing.to_uint8(model.decoder(torch.cartesian_prod(axis, axis).to(device))).cpu()
        examples = torch.stack([data.images[data.shape == digit][:5] for digit in range(10)])
        sheet = torch.cat([examples, made.unflatten(0, (10, 10))], dim=1)
        mnist_variants.save_sheet(path, sheet, rows, ["data"] * 5 + columns)
        print(f"wrote {path}")


def figure7(args):
    """Print Figure 7 (A.3): test accuracy of original+cgn in percent, over seeds, by the number of
    counterfactuals, a tenth of --count or --count, of which 1 or 10 share a shape."""
    for dataset in args.dataset:
        table, asked = {}, copy.copy(args)
        for asked.count, asked.per_shape in itertools.product((args.count // 10, args.count), (1, 10)):
            found, = cells(asked, dataset, "original+cgn", args.label, "test")
            table.setdefault(asked.count, {})[f"{asked.per_shape} per shape"] = found
        evaluate.print_table(f"{dataset}: counterfactuals drawn", table)


# ---------- the ensemble on ImageNet

class Ensemble(nn.Module):
    """A torchvision classifier with heads for its last layer (4.3), of shape, texture and background:
    x (N, 3, H, W), normalised as ImageNet is -> scores (N, heads, C).

    Means of logits (C.4) rank classes as those of log-probabilities (4.3). frozen: batch norms stay in eval
    mode while it trains (authors' code); not where weights are random.
    """

    def __init__(self, network: nn.Module, heads: int = 3, classes: int = 0, frozen: bool = True):
        super().__init__()
        name, last = [pair for pair in network.named_modules() if isinstance(pair[1], nn.Linear)][-1]
        network.set_submodule(name, nn.Identity())
        self.heads = nn.ModuleList(nn.Linear(last.in_features, classes or last.out_features)
                                   for _ in range(heads))                           # new (authors' code)
        self.backbone, self.frozen = network, frozen

    def forward(self, x: Tensor) -> Tensor:
        h = self.backbone(x)
        return torch.stack([head(h) for head in self.heads], dim=1)

    def train(self, mode: bool = True) -> "Ensemble":
        super().train(mode)
        for module in self.modules():
            if self.frozen and isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self


def ensemble_loss(real: Tensor, y: Tensor, made: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """The authors' sum of mean cross-entropies: of real images' averaged scores (N, heads, C) with y (N,),
    and of each head's scores of counterfactuals (M, heads, C) with its own label (M, heads). A scalar."""
    loss = F.cross_entropy(real.mean(dim=1), y, label_smoothing=smoothing)
    if len(labels):
        own = F.cross_entropy(made.mT, labels, reduction="none", label_smoothing=smoothing)
        loss = loss + own.mean(dim=0).sum()
    return loss


def train_ensemble(config: dict, model: Ensemble, real: Callable, counterfactual: Callable | None, out: Path,
                   device: str = "cpu") -> None:
    """Train with SGD. real(first) gives x (n, 3, H, W) and y (n,) of each step from `first` on,
    counterfactual(first) x (m, 3, H, W) and labels (m, heads); x is uint8, or float in [0, 1].

    config: as ENSEMBLE, with milestones in steps, and what `Run` needs. Each process of a group calls it with
    its share of each batch.
    """
    rank, heads, kind = rank_and_world()[0], len(model.heads), torch.device(device).type
    optimizer = torch.optim.SGD(model.parameters(), config["lr"], config["momentum"],
                                weight_decay=config["weight_decay"])
    free = ("epochs", "steps", "save_every", "log_every", "saves")          # they change no result
    with worker_errors(), Run(out, config, {"ensemble": model, "optimizer": optimizer}, free=free) as run:
        reals, others = real(run.first), counterfactual(run.first) if counterfactual else None
        model.train()
        for step in run:
            x, y = next(reals)
            x_made, labels = next(others) if others else (x[:0], y.new_zeros(0, heads))
            x = torch.cat([F_image.convert_image_dtype(part.to(device)) for part in (x, x_made)])
            # What a network draws itself, as for dropout.
            torch.manual_seed(int(rng(config["seed"], 2 ** 40 * (rank + 1) + step).integers(2 ** 63)))
            passed = sum(step >= milestone for milestone in config["milestones"])
            optimizer.param_groups[0]["lr"] = config["lr"] * config["decay"] ** passed
            with torch.autocast(kind, torch.bfloat16, enabled=config["bf16"]):
                scores = model(u2net.normalise(x)).float()
            loss = ensemble_loss(scores[:len(y)], y.flatten().to(device), scores[len(y):],
                                 labels[:, :heads].to(device), config["smoothing"])
            optimizer.zero_grad()
            loss.backward()
            run.check({"loss": loss}, model.parameters())
            optimizer.step()


def build_ensemble(config: dict, weights: dict | None = None, frozen: bool = True) -> Ensemble:
    """An ensemble by its network, heads, names and side, tried on pictures of that size. ValueError."""
    network, side = config["network"], config["side"]
    with one_line(f"network {network} with these weights makes no ensemble for pictures of {side} pixels"):
        body = torchvision.models.get_model(network, num_classes=1000)
        if weights:
            body.load_state_dict(weights)
        model = Ensemble(body, config["heads"], len(config["names"]), frozen)
        with torch.no_grad():
            copy.deepcopy(model).train()(torch.zeros(2, 3, side, side))
    return model.eval()


def load_ensemble(path: str | os.PathLike) -> Ensemble:
    """The ensemble of a checkpoint, in eval mode; `.config` is its run's. ValueError for another file."""
    state = read_checkpoint(path)
    with one_line(f"{path} is no checkpoint of an ensemble"):
        model = build_ensemble(state["config"])
        model.load_state_dict(state["ensemble"])
    model.config = state["config"]
    return model


# ---------- reading pictures

def read_picture(path: str) -> Tensor:
    """(3, H, W) uint8. Raises ValueError where it does not open."""
    try:
        return F_image.pil_to_tensor(u2net.open_photo(path, smallest=1))
    except ValueError as error:
        raise ValueError(f"{error}: remove it") from None


def random_pictures(files, batch, side, seed, share, stream, step):
    """A step's share of a batch of files, (path, labels): x (n, 3, side, side) uint8, labels (n, ..) long.
    Drawn without replacement in each epoch, cropped and flipped, by seed, stream and step alone."""
    images, labels = [], []
    for position in range(step * batch, (step + 1) * batch)[share]:
        epoch, place = divmod(position, len(files))
        path, label = files[permutation(len(files), seed, stream + epoch)[place]]
        images.append(crop_and_flip(read_picture(path), side, seed, stream + position))
        labels.append(label)
    return torch.stack(images), torch.tensor(labels)


@lru_cache(maxsize=4)
def permutation(count, seed, index):
    return rng(seed, 2 ** 32 + index).permutation(count)


def crop_and_flip(picture: Tensor, side: int, seed: int, index: int) -> Tensor:
    """A random part of a picture (3, H, W) as (3, side, side), perhaps mirrored, by rng(seed, index)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(rng(seed, index).integers(2 ** 63)))
        return transforms.RandomHorizontalFlip()(transforms.RandomResizedCrop(side)(picture))


def drawn_pictures(model, batch, side, seed, per_shape, share, first):
    """A CGN's counterfactuals, made when needed, for each step from `first`: x (n, 3, side, side) in [0, 1]
    and labels (n, 3). Image i of the whole training is image i of the data set with this seed."""
    for step in itertools.count(first):
        part = range(step * batch, (step + 1) * batch)[share]
        sample, labels = drawing.counterfactual_batch(model, seed, part, per_shape)
        yield torch.stack([crop_and_flip((x + 1) / 2, side, seed, COUNTERFACTUAL + index)
                           for index, x in zip(part, sample.image)]), labels.T


def judged_picture(paths, side, crop, index):
    """(3, side, side) uint8: all of a picture, or with `crop` ImageNet's middle, where the shorter side is
    8 / 7 of `side` (256 and 224). What has the network's size is always seen whole."""
    picture = read_picture(paths[index])
    if crop and picture.shape[1:] != (side, side):
        picture = F_image.center_crop(F_image.resize(picture, side * 8 // 7), side)
    return F_image.resize(picture, [side, side])


# ---------- what an ensemble says of pictures

@torch.no_grad()
@worker_errors()
def score(model: Ensemble, paths: Sequence[str], crop: bool = False, workers: int = 0) -> Tensor:
    """An ensemble's scores (N, heads, C) of pictures, on the CPU; see `judged_picture`. Raises ValueError for
    no pictures, and for one that does not open."""
    found, indices, device = [], range(len(paths)), next(model.parameters()).device
    items = Items(judged_picture, paths, model.config["side"], crop).ahead(indices, workers, 50)
    for _, x in zip(watched(indices[::50], "pictures"), items):
        found.append(model(u2net.normalise(x.to(device).float() / 255)).cpu())
    if not found:
        raise ValueError("there are no pictures to judge")
    return torch.cat(found)


def judge_main(args):
    """Judge --checkpoint on folders. The table of predictions, --out, has a column for each head, for the two
    without the background's (the authors' on ImageNet-9), and for all."""
    out = args.out and check_output(args.out, args.checkpoint)
    if out:
        check_apart(out, getattr(args, args.make))
    model = load_ensemble(args.checkpoint).to(args.device)
    rows = rows_to_judge(args, model.config["names"])
    scores = score(model, [row["file"] for row in rows], bool(args.imagenet), args.workers)
    columns = {"prediction": scores[:, 0]}
    if len(model.heads) == 3:
        columns = {**dict(zip(drawing.MECHANISMS, scores.unbind(1))), "average": scores.mean(dim=1),
                   "shape + texture": scores[:, :2].mean(dim=1)}
    for name, found in columns.items():
        found = found.softmax(dim=1)
        best = [" ".join(map(str, row)) for row in found.topk(min(5, found.shape[1])).indices.tolist()]
        for row, text in zip(rows, evaluate.cue_conflict_decisions(found) if args.cue_conflict else best):
            row[name] = text
    if out:
        evaluate.write_table(out, rows)
    evaluate.print_table(args.make, getattr(evaluate, f"judge_{args.make}")(rows))


def rows_to_judge(args, names):
    """Files and labels of ImageNet, by subfolders, of all the training's classes or some, or three by
    labels.csv; files of cue conflict; or files and labels of ImageNet-9's VARIATION/val/00_dog .. 08_fish.
    The published fg_mask holds no pictures, and is left out."""
    if args.imagenet:
        files, held = mnist_variants.labelled_files(args.imagenet), mnist_variants.class_names(args.imagenet)
        if len(files[0][1]) == 3:
            mnist_variants.check_labels(args.imagenet, names, files)
            columns = "file", "shape label", "texture label", "background label"
            return [dict(zip(columns, (file, *labels))) for file, labels in files]
        for name in {*held} - {*names}:
            raise ValueError(f"{args.imagenet}: {name!r} is no class that {args.checkpoint} knows")
        return [{"file": file, "label": names.index(held[label])} for file, (label,) in files]
    if len(names) != 1000:
        raise ValueError(f"{args.checkpoint} does not know ImageNet's 1,000 classes, which are needed here")
    if args.cue_conflict:
        rows = [{"file": str(path)} for path in mnist_variants.picture_files(args.cue_conflict)]
        for row in rows:
            evaluate.cue_conflict_labels(row["file"])       # a ValueError before the work
        return rows
    rows = []
    for folder in sorted(Path(args.imagenet9).glob("[!.]*/val")):
        if mnist_variants.picture_files(folder):
            held = mnist_variants.class_folders(folder)
            if [name[:3] for name in held] != [f"{number:02d}_" for number in range(9)]:
                raise ValueError(f"{folder} holds {', '.join(held)}: 00_dog .. 08_fish are needed")
            rows += [{"file": file, "variation": folder.parent.name, "label": label}
                     for file, (label,) in mnist_variants.labelled_files(folder)]
    return rows


def say_main(args):
    """Print Figure 1's sentence about a photo, with each head's confidence."""
    model = load_ensemble(args.checkpoint).to(args.device)
    if len(model.heads) != 3:
        raise ValueError(f"{args.checkpoint} has one head: the sentence needs three")
    names, found = model.config["names"], score(model, [args.say], True)[0].softmax(dim=1).max(dim=1)
    if len(names) == 1000:                  # folders have WordNet numbers, in torchvision's order
        names = torchvision.models.ResNet50_Weights.IMAGENET1K_V1.meta["categories"]
    nouns = [names[index] for index in found.indices.tolist()]
    a = [f"{'an' if noun[0].lower() in 'aeiou' else 'a'} {noun}" for noun in nouns]
    sure = [f"{name} {100 * p:.0f} %" for name, p in zip(drawing.MECHANISMS, found.values.tolist())]
    print(f"{a[0]} shape with {nouns[1]} texture on {a[2]} background ({', '.join(sure)})")


# ---------- what a CGN's mechanisms show

def read_classifier(path: str | os.PathLike) -> nn.Module:
    """The network of the Inception Score, torchvision's inception_v3, whose scores are not TensorFlow's, or a
    classifier of digits: x (N, 3, H, W) in [-1, 1] -> scores (N, C). Raises ValueError."""
    state = read_checkpoint(path, other=True)
    with one_line(f"{path} is no state dict of inception_v3 or of a classifier of digits"):
        inception = "Conv2d_1a_3x3.conv.weight" in state
        model = (torchvision.models.inception_v3(init_weights=False) if inception
                 else Classifier(len(state["12.bias"])))
        model.load_state_dict(state)
    if inception:
        model = nn.Sequential(nn.Upsample(299, mode="bilinear"), model)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def table1_row(model: nn.Module, network: nn.Module, count: int, seed: int, splits: int = 10) -> dict:
    """Table 1's row of an ImageNet CGN: Inception Score and mean mask with their deviations, and the mask's
    binary entropy, over `count` images with one u and one label for all mechanisms."""
    device, probabilities, masks = next(model.parameters()).device, [], []
    for start in watched(range(0, count, 10), "images"):
        u, y, _ = cgn.draw_training(model, seed, range(count)[start:start + 10])
        sample = model(u.to(device), y.to(device))
        probabilities.append(network(sample.image).softmax(dim=1).cpu())
        masks += [(m.mean().item(), cgn.binary_entropy(m).item()) for m in sample.mask]
    mean, std = evaluate.inception_score(torch.cat(probabilities), splits)
    (area, spread), (entropy, _) = map(evaluate.mean_std, zip(*masks))
    return {"Inception Score": f"{mean:.2f} ± {std:.2f}",
            "mean mask": f"{100 * area:.1f} ± {100 * spread:.1f} %", "binary entropy": f"{entropy:.3f} bit"}


@torch.no_grad()
def disentanglement(sample: cgn.Sample, labels: Tensor, real: Sequence[Tensor], readers: Sequence) -> Tensor:
    """What mechanisms' outputs say to readers of the shape's, the foreground's and the background's label.

    A table (3, 3): row = label read (nan where the reader is None, as there is no such label), column = part
    of the sample (m, f, b), made for `labels` (N,), that is shown among real ones of independent labels.
    """
    def right(reader, column):
        m, f, b = (sample[k] if k == column else real[k] for k in range(3))
        return (reader(cgn.compose(m, f, b)).argmax(dim=1) == labels).double().mean()

    return torch.tensor([[right(reader, column) if reader else math.nan for column in range(3)]
                         for reader in readers])


def mechanisms_main(args):
    """Of --cgn: Table 1's row where it is made of BigGANs, the 3 x 3 table where it draws digits."""
    model = cgn.load(args.cgn).to(args.device)
    imagenet, trained = model.config["model"] == "imagenet", model.config.get("seed", 0)
    dataset = None if imagenet and model.resolution > mnist_variants.SIZE else digits_of(model, args.cgn)
    seed = args.seeds[0] if args.seeds else trained + 1
    print(f"{args.count} draws of seed {seed}; the training's was {trained}", flush=True)
    if imagenet:
        if args.count < args.splits:
            raise ValueError(f"--count {args.count}: the Inception Score needs {args.splits}, one a split")
        file = args.inception or cgn.PRESETS["mini" if dataset else "imagenet"]["inception"]
        network = read_classifier(cgn.find_network(file)).to(args.device)
        evaluate.print_table("Table 1", {args.cgn: table1_row(model, network, args.count, seed, args.splits)})
    if dataset:
        measure_digits(args, model, dataset, trained, seed)


def digits_of(model, path):
    """The variant of MNIST that a CGN draws by mechanisms. ValueError where it draws something else."""
    dataset = "wildlife" if model.config["model"] == "imagenet" else model.config["dataset"]
    if (not model.independent or model.resolution != mnist_variants.SIZE
            or dataset not in mnist_variants.NAMES):
        raise ValueError(f"{path} draws no digits by mechanisms, which are needed here")
    return dataset


def measure_digits(args, model, dataset, trained, seed):
    """Train readers on factor-randomised real images, show them one part at a time that the CGN made, beside
    real ones, and print the table. Readers and real parts have the training's seed, draws another one."""
    images, *labels = load(args, dataset, "train", 0.1, trained)
    parts, wanted = load(args, dataset, "val", None, trained, "load_parts")
    val, readers = mnist_variants.compose(*parts), []
    for name, known, right in zip(LABELS, labels, wanted):
        reader = None
        if right[0] >= 0:                           # colored has no background label
            reader = train(METHODS["original"], [(images, known, BATCH)], args.steps, trained,
                           bf16=args.bf16, device=args.device, report=f"reader of {name}s")
            share = evaluate.accuracy(predict(reader, val), right)
            print(f"reader of {name}s: {100 * share:.1f} % of the validation split", flush=True)
        readers.append(reader)
    order = torch.randint(len(val), (args.count,), generator=torch.Generator().manual_seed(trained))
    mask, *textures = (part[order].to(args.device) for part in parts)
    real = [mask.float() / 255, *map(drawing.to_float, textures)]
    u, y, arrangement = drawing.draw(model, seed, range(args.count))
    sample = model.make(u, y[:1].expand(3, -1), arrangement, 500)
    table = disentanglement(sample, y[0].to(args.device), real, readers)
    evaluate.print_table("label read", {name: {part: f"{100 * value:.1f}" for part, value in zip("mfb", row)}
                                        for name, row in zip(LABELS, table.tolist())})


@torch.no_grad()
def mask_table(masks: Tensor, labels: Tensor, reader: nn.Module, names: Sequence[str]) -> dict[str, dict]:
    """How clean and how various masks (N, 1, 32, 32) in [0, 1] with labels (N,) are, a row a class: the share
    in which a reader of real digits' masks finds the class, the mean IoU of pairs of 50, and the entropy."""
    read = torch.cat([reader(2 * m.expand(-1, 3, -1, -1) - 1).argmax(dim=1) for m in masks.split(500)])
    ious = [evaluate.pairwise_iou(masks[labels == label][:50]) for label in range(len(names))]
    rows = [("all", labels >= 0, sum(ious) / len(ious))]
    rows += [(name, labels == label, ious[label]) for label, name in enumerate(names)]
    return {name: {"read right": f"{100 * evaluate.accuracy(read[own], labels[own]):.1f} %",
                   "IoU of pairs": f"{iou:.3f}", "entropy": f"{cgn.binary_entropy(masks[own]):.3f} bit"}
            for name, own, iou in rows}


def variety_main(args):
    """Judge the masks of --cgn and of its data set's real digits; say how mottled its foregrounds are."""
    model = cgn.load(args.cgn).to(args.device)
    dataset = digits_of(model, args.cgn)
    reader, names = read_classifier(cgn.find_network(args.reader)), drawing.class_names(model)
    seed = args.seeds[0] if args.seeds else model.config.get("seed", 0) + 1
    sample, drawn = drawing.counterfactual_batch(model, seed, range(args.count), 1, 500)
    evaluate.print_table(f"masks of {args.cgn}", mask_table(sample.mask.cpu(), drawn[0], reader, names))
    spread = 127.5 * sample.foreground.flatten(2).std(dim=2).mean()
    print(f"deviation of a colour within one foreground: {spread:.1f} of 255", flush=True)
    parts, (labels, *_) = mnist_variants.load_parts(dataset, "val", root=args.mnist)
    masks = parts.mask[:args.count] / 255
    evaluate.print_table("masks of real digits", mask_table(masks, labels[:args.count], reader, names))


# ---------- command line

def ensemble_main(args):
    """Train the ensemble on the folders of --real, and of --counterfactuals or --cgn."""
    device, (rank, ranks), seed = args.device, rank_and_world(), args.seeds[0]
    folders = args.counterfactuals or []
    made = round(args.ratio * args.batch, 6) if args.cgn or folders else 0
    if args.batch % ranks or made % ranks or args.ratio <= 0:
        raise ValueError(f"batch {args.batch}, ratio {args.ratio}: no whole numbers for {ranks} processes")
    check_apart(args.out, *args.real, *folders)
    names, *others = map(mnist_variants.class_folders, args.real)
    if any(other != names for other in others):
        raise ValueError(f"{', '.join(args.real)} have other subfolders")
    torch.manual_seed(seed)
    anew = args.weights == "random"
    weights = None if anew or args.dry_run else read_checkpoint(cgn.find_network(args.weights), other=True)
    model, made = build_ensemble({**vars(args), "names": names}, weights, not anew).to(device), int(made)
    files, pictures = list(itertools.chain(*map(mnist_variants.labelled_files, args.real))), []
    for folder in folders:
        pictures += mnist_variants.labelled_files(folder)
        mnist_variants.check_labels(folder, names, pictures)
    epoch = -(-len(files) // args.batch)
    period = args.save_every or epoch
    config = {**{name: getattr(args, name) for name in ENSEMBLE}, "names": names, "seed": seed,
              "bf16": args.bf16, "weights": Path(args.weights).name,
              "cgn": args.cgn and cgn.file_hash(args.cgn), "real": [*map(os.path.realpath, args.real)],
              "counterfactuals": [*map(os.path.realpath, folders)],
              "steps": 2 if args.dry_run else args.epochs * epoch, "log_every": min(period, 50),
              "saves": (period,), "milestones": [epoch * number for number in args.milestones]}

    def from_files(files, batch, stream=0):
        items = Items(random_pictures, files, batch, args.side, seed, slice(rank, None, ranks), stream)
        return lambda first: items.ahead(range(first, config["steps"]), args.workers)

    counterfactual = from_files(pictures, made, COUNTERFACTUAL) if pictures else None
    if args.cgn:
        drawer, share = cgn.load(args.cgn).to(device), slice(rank * made // ranks, (rank + 1) * made // ranks)
        mnist_variants.check_names(args.cgn, drawing.class_names(drawer), names)
        counterfactual = partial(drawn_pictures, drawer, made, args.side, seed, args.per_shape, share)
    if rank == 0:
        print(f"{args.network} with {args.heads} heads: {len(files)} real images, {len(names)} classes, "
              f"{args.cgn or len(pictures)} counterfactuals; {config['steps']} steps of {args.batch} + "
              f"{made}; writing to {args.out}", flush=True)
    train_ensemble(config, model, from_files(files, args.batch), counterfactual, args.out, device)


def take_over(args):
    """The textures and the variance of --cgn's training data, where none are given."""
    config = read_checkpoint(args.cgn, other=True).get("config")            # the authors' has none
    if isinstance(config, dict) and args.dataset in (None, [config.get("dataset")]):
        for name in ("textures", "variance"):
            if getattr(args, name) is None:
                setattr(args, name, config.get(name))


def tables_main(args):
    """Tables 2 and 5, Figures 6 and 7, of MNIST variants."""
    label, given = getattr(args, "label", "shape"), args.cgn or args.counterfactuals
    if label not in LABELS:
        raise ValueError(f"label {label} is none of {', '.join(LABELS)}")
    back = args.make == "table5" or label == "background"
    if args.cgn and not args.dataset:
        config = cgn.load(args.cgn).config
        if config.get("dataset") not in mnist_variants.NAMES:
            raise ValueError(f"{args.cgn} is of no variant of MNIST: name the --dataset to test on")
        args.dataset = [config["dataset"]]
    args.dataset = args.dataset or [name for name in mnist_variants.NAMES if not back or name != "colored"]
    args.method = args.method or [name for name in [*METHODS][:-2]
                                  if not given or "cgn" in METHODS[name].batch]
    if back and "colored" in args.dataset:
        raise ValueError("--dataset colored has no background label, which is needed here")
    if given and (len(args.dataset) > 1 or not {"cgn", "original+cgn"} & {*args.method}):
        raise ValueError(f"{given} is of one --dataset, and for --method cgn and original+cgn")
    if len(args.counterfactuals or ()) > 1:
        raise ValueError(f"--counterfactuals {' '.join(args.counterfactuals)}: of digits one file is read")
    check_output(args.runs / "results.jsonl")
    {"table5": table5, "figure6": figure6, "figure7": figure7}.get(args.make, table2)(args)


# A command's preset, the option that it needs, others that it understands, and its function.
MNIST = "dataset textures runs dry_run"
JUDGE = ({}, "checkpoint", "workers out", judge_main)
COMMANDS = {
    "table2": (TABLES, "", f"{MNIST} bf16 cgn counterfactuals method", tables_main),
    "table5": (TABLES, "", f"{MNIST} bf16 cgn counterfactuals", tables_main),
    "figure6": (FIGURE6, "", MNIST, tables_main),
    "figure7": (TABLES, "", f"{MNIST} bf16 cgn", tables_main),
    "mechanisms": (MECHANISMS, "cgn", "textures bf16", mechanisms_main),
    "variety": (VARIETY, "cgn", "", variety_main),
    "ensemble": (ENSEMBLE, "real", "dataset counterfactuals cgn workers out dry_run bf16", ensemble_main),
    "imagenet": JUDGE, "cue_conflict": JUDGE, "imagenet9": JUDGE,
    "say": ({}, "checkpoint", "", say_main)}


def build_parser():
    parser = argparse.ArgumentParser(description="Train classifiers on counterfactual images, and judge. "
                                     "Defaults stand at the head of classify.py.")
    add = parser.add_argument_group("MNIST variants (4.3, C.4)").add_argument
    add("--dataset", nargs="+", choices=(*mnist_variants.NAMES, "imagenet"), help="imagenet: the ensemble")
    add("--method", nargs="+", choices=METHODS, help="default: Table 2's")
    add("--steps", type=int, help="of a classifier")
    add("--count", type=int, help="drawn images")
    add("--textures", help="wildlife: folder of DTD (default: drawn textures)")
    add("--variance", type=float, help="of a class's colours")
    add("--runs", type=Path, help="folder of classifiers and results.jsonl (default: runs)")
    given = parser.add_mutually_exclusive_group().add_argument
    given("--cgn", metavar="FILE", help="checkpoint to draw from (default: trains one)")
    given("--counterfactuals", nargs="+", metavar="PATH", help="or what cgn.py drew: digits' file, folders")
    add = parser.add_argument_group("ensemble, --dataset imagenet (4.3, C.4)").add_argument
    add("--real", nargs="+", metavar="FOLDER", help="with a subfolder a class (IN, SIN, Mixed-Rand)")
    add("--heads", type=int, choices=(1, 3), help="1: a plain classifier")
    add("--ratio", type=float, help="counterfactuals for each real image")
    add("--workers", type=int, help="processes that read pictures (default: up to 4)")
    add("--checkpoint", metavar="FILE", help="the ensemble that judges")
    add = parser.add_argument_group("what to make").add_mutually_exclusive_group().add_argument
    add("--make", choices=[*COMMANDS][:6], help="default: table2")
    add("--imagenet", metavar="FOLDER", help="top-1 and top-5: a subfolder a class, or counterfactuals")
    add("--cue-conflict", metavar="FOLDER", help="shape bias (Table 3)")
    add("--imagenet9", metavar="FOLDER", help="accuracies and BG-Gap (Table 4)")
    add("--say", metavar="PHOTO", help="what the heads see")
    add = parser.add_argument_group("run").add_argument
    add("--set", nargs="+", metavar="NAME=VALUE", help="any other number of the command's preset")
    add("--seeds", nargs="+", type=int, help="default: 0 1 2, of the ensemble 0, of draws the training's + 1")
    add("--out", type=Path, help="ensemble's folder (default: runs/ensemble), or table of predictions")
    add("--bf16", action="store_true", help="train in bfloat16 where that pays")
    add("--device", help="default: auto, a GPU where there is one")
    add("--threads", type=int, help="of the CPU")
    add("--dry-run", action="store_true", help="two steps, in a temporary folder")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    command(build_parser(), choose, argv)


def choose(args):
    """Find the command, refuse what means nothing for it, fill in its preset, and run it."""
    data = args.dataset or ["wildlife", "colored"]
    name = args.make or next((name for name in COMMANDS if getattr(args, name, None)), None)
    args.make = name = name or ("ensemble" if "imagenet" in data else "table2")
    preset, needed, more, run = COMMANDS[name]
    meaningful = {*preset, *more.split(), needed, name, "make", "set", "device", "threads"}
    meaningful -= {"variance"} if data == ["wildlife"] else set() if "wildlife" in data else {"textures"}
    if name == "ensemble" and not args.cgn and not args.counterfactuals:
        meaningful -= {"ratio"}
    if name != "ensemble" and args.counterfactuals:
        meaningful -= {"count"}                             # the file's are all read
    refuse_options(args, meaningful, " ".join([name, *(args.dataset or ())]))
    if needed and not getattr(args, needed):
        raise ValueError(f"{name} needs --{needed}")
    if "imagenet" in data and len(data) > 1:
        raise ValueError(f"--dataset {' '.join(data)}: imagenet goes alone")
    if args.cgn and name != "ensemble":
        take_over(args)
    settings = {"runs": cgn.RUNS, "out": cgn.RUNS / "ensemble" if name == "ensemble" else None,
                "workers": min(4, os.cpu_count()), "mnist": str(mnist_variants.ROOT), **preset}
    override(settings, args.set)
    for key, value in settings.items():
        if getattr(args, key, None) is None:
            setattr(args, key, value)
        held = getattr(args, key)
        if key in ("steps", "count", "per_shape", "batch", "epochs", "side", "splits") and held < 1:
            raise ValueError(f"{key} {held}: must be at least 1")
        if key == "heads" and held not in (1, 3) or key == "smoothing" and not 0 <= held <= 1:
            raise ValueError(f"{key} {held}: must be {'1 or 3' if key == 'heads' else 'in 0..1'}")
    seeds, several = args.seeds or [], name in ("table2", "table5", "figure7")
    if (len(seeds) > 1 and not several or preset.get("seeds") and not seeds
            or not all(0 <= seed < 2 ** 31 for seed in seeds)):
        raise ValueError(f"seeds {seeds}: {name} takes {'some' if several else 'one'} in 0..2^31 - 1")
    if name != "ensemble":
        one_process(name)
    args.device = (join_group if name == "ensemble" else find_device)(args.device)
    args.bf16 = bf16_pays(args.bf16, args.device)
    with tempfile.TemporaryDirectory() as folder:
        if args.dry_run:
            args.runs = args.out = Path(folder)
            args.count, args.steps, args.generator_steps, args.seeds = 100, 2, 2, args.seeds[:1]
        run(args)
    if args.dry_run:
        print("dry run finished; nothing is kept")


if __name__ == "__main__":
    main()
