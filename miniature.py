"""The miniature: weights for `python cgn.py --dataset imagenet --mini`, made from digits by this project's own code.

ImageNet's thousand classes are ten digits here, photos are 32 x 32 pixels of wildlife MNIST with the drawn textures, and each
pre-trained network of the paper is a small one, trained in minutes on a CPU:

    teacher     BigGAN-deep, for BigGAN-deep-256: the biased training split, where a digit always wears its class's textures
    saliency    U-2-Net, for U-2-Net: digits whose textures are random, and their masks
    style       VGG16 with batch norm, for torchvision's: the labels of digit and both textures, each on its own
    classifier  a CNN, for Inception: the labels of the biased training split; its scores give the Inception Score

    python miniature.py teacher saliency style classifier     # writes weights/mini-*.pth
    python miniature.py table1                                # the paper's Table 1: one loss off at a time
    python miniature.py tables34                              # Tables 3 and 4: shape bias and BG-Gap of the ensemble
    python miniature.py patches                               # appendix F: patches that follow the object's size
"""
import argparse
import itertools
import os
import time
from pathlib import Path
from typing import Callable, Optional, Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision.models.vgg import make_layers

import biggan
import cgn
import classify
import evaluate
import mnist_variants
import u2net

DATASET = "wildlife"
NOISE = 32
GENERATOR = ((256, 256), (256, 256), (256, 256), (256, 256), (256, 128), (128, 64))  # channels of BigGAN's blocks
SALIENCY = ((3, 8, 16),) + ((16, 8, 16),) * 5 + ((32, 8, 16),) * 5                  # channels of U-2-Net's stages
EMPTY = 5                   # every fifth picture for U-2-Net holds no digit: else it finds some in bare textures, and L_bg blurs these
PACK = 2                    # images that the teacher's discriminator sees at once; with one the teacher's digits become all alike
STYLE = (16, 32, 64, 64)                                                            # of VGG16's first four stages
STEPS = {"teacher": 5500, "saliency": 2000, "style": 4000, "classifier": 4000}


def make_teacher(data: mnist_variants.Variant, steps: int, seed: int, report: Callable) -> dict:
    """A BigGAN-deep trained on images whose three labels agree; its raw state dict, as `biggan.load` reads it."""
    torch.manual_seed(seed)
    model = biggan.BigGAN(GENERATOR, None, 10, NOISE, NOISE)
    discriminator = cgn.Discriminator(channels=3 * PACK).to(memory_format=torch.channels_last)  # biggan's learns shapes slower
    model = biggan.train(model, discriminator, data.images, data.shape, steps=steps, pack=PACK, seed=seed, report=report)
    biggan.measure_statistics(model, seed=seed)
    return model.state_dict()


def make_saliency(images: torch.Tensor, masks: torch.Tensor, steps: int, seed: int, report: Callable) -> dict:
    """A U-2-Net trained on images (N, 3, 32, 32) and masks (N, 1, 32, 32), uint8; its raw state dict."""
    torch.manual_seed(seed)
    return u2net.train(u2net.U2Net(SALIENCY), images, masks, steps=steps, lr=3e-3, seed=seed, report=report).state_dict()


def make_style(data: mnist_variants.Variant, steps: int, seed: int, report: Callable) -> dict:
    """VGG16 with batch norm up to its fourth pool, trained to read all three labels; the state dict of its features."""
    torch.manual_seed(seed)
    layout = [layer for width, count in zip(STYLE, cgn.STYLE_CONVS) for layer in [width] * count + ["M"]]
    model = nn.Sequential()
    model.features = make_layers(layout, batch_norm=True)
    model.append(nn.Flatten()).append(nn.Linear(4 * STYLE[-1], 30))
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    labels = torch.stack(data[1:], dim=1)                                           # (N, 3)
    for step in range(steps):
        chosen = torch.from_numpy(cgn.rng(seed, step).integers(len(labels), size=64))
        scores = model(u2net.normalise(data.images[chosen].float() / 255).contiguous(memory_format=torch.channels_last))
        loss = F.cross_entropy(scores.unflatten(1, (3, 10)).mT, labels[chosen])     # (N, 10, 3) against (N, 3)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 50 == 0:
            report(step + 1, loss.item())
    return {key: value for key, value in model.state_dict().items() if key.startswith("features.")}


def make_classifier(data: mnist_variants.Variant, steps: int, seed: int) -> dict:
    """The MNIST classifier, trained on images whose three labels agree; its state dict."""
    return classify.fit([(data.images, data.shape, classify.BATCH)], steps, seed).state_dict()


def make(what: str, out: Path, *, steps: Optional[int] = None, seed: int = 0, mnist: str = "data/mnist", bf16: bool = False) -> Path:
    """Train one of the four networks and write its raw state dict as `out`/mini-WHAT.pth."""
    steps, started = steps or STEPS[what], time.time()

    def report(step: int, losses) -> None:
        if step % (steps // 20 // 50 * 50 or 50) == 0:
            print(f"{what}: step {step}/{steps}, {time.time() - started:.0f} s, {losses}", flush=True)

    parts, labels = mnist_variants.load_parts(DATASET, "train", agreement=0.1 if what in ("saliency", "style") else 1.0,
                                              seed=seed, root=mnist)
    if what == "saliency":
        parts.mask[::EMPTY] = 0
    data = mnist_variants.Variant(mnist_variants.compose(*parts), *labels)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16, cache_enabled=False):   # a cache would keep the first weights
        if what == "teacher":
            state = make_teacher(data, steps, seed, report)
        elif what == "saliency":
            state = make_saliency(data.images, parts.mask, steps, seed, report)
        elif what == "style":
            state = make_style(data, steps, seed, report)
        else:
            state = make_classifier(data, steps, seed)
    path = out / f"mini-{what}.pth"
    cgn.save_state(path, state)
    print(f"wrote {path}: {path.stat().st_size / 1e6:.1f} MB after {time.time() - started:.0f} s")
    return path


@torch.no_grad()
def table1(runs: Path, *, samples: int = 5000, seed: int = 0, options: Sequence[str] = ()) -> str:
    """Table 1 as Markdown: trains a CGN with all losses, and one with each of them off, where `runs` does not hold it yet.

    Writes how the mean mask of each went (appendix G) as `runs`/masks.png.
    """
    lines, curves = ["| losses | IS | mean mask |", "|---|---|---|"], {}
    for off in (None, *cgn.WITHOUT):
        out = runs / f"mini-without-{off}" if off else runs / "mini"
        with torch.enable_grad():
            cgn.main(["--dataset", "imagenet", "--mini", "--out", str(out), "--seed", str(seed), *options,
                      *(("--without", off) if off else ())])
        model = cgn.load(out / "checkpoint.pt")
        u, y, _ = cgn.draw_training(model, seed, range(samples), model.truncation)
        classifier = cgn.read_classifier(biggan.find_weights(cgn.WEIGHTS / cgn.MINI["inception"]))
        score = cgn.inception_score(model, classifier, samples, model.truncation, seed)
        area = torch.cat([model.saliency(model.f_shape(u_k, y_k, model.truncation)).mean(dim=(1, 2, 3))
                          for u_k, y_k in zip(u.split(500), y.split(500))])
        name, rows = f"without {off}" if off else "all", cgn.read_lines(out / "log.jsonl")[1:]
        shown = {*(2 ** k for k in range(12)), model.step}
        curves[name] = [(row["step"], 100 * row["mask_mean"]) for row in rows if "mask_mean" in row and row["step"] in shown]
        lines.append(f"| {name} | {score:.2f} | {100 * area.mean():.1f} ± {100 * area.std():.1f} % |")
    classify.save_curves(runs / "masks.png", curves, "mean mask in % against updates, with one loss off (Table 1)")
    return "\n".join(lines)


Parts = tuple[list[torch.Tensor], torch.Tensor]     # masks, foregrounds, backgrounds, uint8, and their labels (3, N)


def draw_parts(model: cgn.ImagenetCGN, count: int, seed: int, batch: int = 100) -> Parts:
    """The mechanisms' outputs of `count` counterfactuals, one a shape; masks are rounded, as digits have hard edges here."""
    parts, labels = [], []
    for start in range(0, count, batch):
        sample, y = cgn.counterfactual_batch(model, seed, range(start, min(start + batch, count)), per_shape=1,
                                             truncation=model.truncation)
        parts.append((255 * (sample.mask > 0.5).byte(), cgn.to_uint8(sample.foreground), cgn.to_uint8(sample.background)))
        labels.append(y)
    return [torch.cat(part) for part in zip(*parts)], torch.cat(labels, dim=1)


def train_ensemble(out: Path, real: mnist_variants.Variant, made: Optional[Parts], steps: int, seed: int, bf16: bool = False
                   ) -> classify.Ensemble:
    """Three heads on counterfactuals and as few real images as `classify` mixes in, or without counterfactuals one head on
    real ones. Each counterfactual joins a mask, a foreground and a background that were drawn at random from those `made`."""
    torch.manual_seed(seed)
    model = classify.Ensemble(classify.Classifier(), 3 if made else 1)
    config = {"steps": steps, "seed": seed, "lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4, "decay": 0.1, "bf16": bf16,
              "milestones": [steps // 2, 3 * steps // 4], "smoothing": 0.2, "save_every": 1000}
    share = classify.REAL_SHARE["cgn"] if made else classify.BATCH

    def real_images(first: int):
        for step in itertools.count(first):
            chosen = torch.from_numpy(cgn.rng(seed, step).integers(len(real.images), size=share))
            yield real.images[chosen].float() / 255, real.shape[chosen]

    def counterfactuals(first: int):
        parts, labels = made
        for step in itertools.count(first):
            chosen = torch.from_numpy(cgn.rng(seed + 1000, step).integers(labels.shape[1], size=(3, classify.BATCH - share)))
            m, f, b = (part[rows].float() / 255 for part, rows in zip(parts, chosen))
            yield cgn.compose(m, f, b), torch.stack([y[rows] for y, rows in zip(labels, chosen)], dim=1)

    classify.train_ensemble(config, model, real_images, counterfactuals if made else None, out)
    return model.eval()


@torch.no_grad()
def tables34(runs: Path, *, seed: int = 0, steps: int = 2000, count: int = 20_000, mnist: str = "data/mnist",
             bf16: bool = False) -> str:
    """Tables 3 and 4 as Markdown, from `count` counterfactuals of the CGN in `runs`/mini: shape bias, and accuracy on the test
    split, whose digits no network has seen, with textures that agree (mixed-same) and with any background (mixed-rand)."""
    if not (runs / "mini" / "checkpoint.pt").exists():
        raise ValueError(f"{runs / 'mini' / 'checkpoint.pt'} is missing: python miniature.py table1 makes it")
    model = cgn.load(runs / "mini" / "checkpoint.pt")
    real = mnist_variants.load(DATASET, "train", seed=seed, root=mnist)
    sets = {name: mnist_variants.load(DATASET, "test", agreement=agreement, seed=seed, root=mnist) for name, agreement in
            (("mixed_same", mnist_variants.MIXED_SAME), ("mixed_rand", mnist_variants.MIXED_RAND),
             ("cue-conflict", mnist_variants.CUE_CONFLICT))}
    rows = {}
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        drawn = draw_parts(model, count, seed)
    for name, made in (("real", None), ("real + CGN", drawn)):
        with torch.enable_grad():
            ensemble = train_ensemble(runs / f"mini-{name.replace(' ', '')}", real, made, steps, seed, bf16)
        scores = {key: torch.cat([ensemble(u2net.normalise(part.float() / 255)) for part in data.images.split(500)])
                  for key, data in sets.items()}
        for number, head in enumerate(cgn.MECHANISMS if made else ()):
            rows[f"{name}/{head}"] = {key: score[:, number].argmax(dim=1) for key, score in scores.items()}
        if made:                            # the authors' BG-Gap is that of these two heads
            rows[f"{name}/shape + texture"] = {key: score[:, :2].mean(dim=1).argmax(dim=1) for key, score in scores.items()}
        rows[name] = {key: score.mean(dim=1).argmax(dim=1) for key, score in scores.items()}
    lines = ["| trained on | shape bias | mixed-same | mixed-rand | BG-Gap |", "|---" * 5 + "|"]
    for name, found in rows.items():
        conflict = sets["cue-conflict"]
        bias = evaluate.shape_bias(*(list(map(str, part.tolist())) for part in (found["cue-conflict"], conflict.shape, conflict.foreground)))
        top = {key: evaluate.accuracy(found[key], sets[key].shape) for key in ("mixed_same", "mixed_rand")}
        lines.append(f"| {name} | " + " | ".join(f"{100 * value:.1f}" for value in (bias, *top.values(), evaluate.bg_gap(top))) + " |")
    return "\n".join(lines)


@torch.no_grad()
def patches(*, samples: int = 2000, steps: int = 4000, seed: int = 0, mnist: str = "data/mnist", bf16: bool = False) -> str:
    """Appendix F as Markdown: patch grids of digits in two sizes, with patches of one side and with some that follow the size.

    How much of a grid is object (the rest is background that f would learn), and how often a reader, trained on real digits in
    random textures, finds the object's label in the grid, seen through the whole digit.
    """
    train = mnist_variants.load(DATASET, "train", agreement=0.1, seed=seed, root=mnist)
    with torch.enable_grad():
        reader = classify.fit([(train.images, train.foreground, classify.BATCH)], steps, seed, bf16=bf16)
    (mask, *textures), labels = mnist_variants.load_parts(DATASET, "val", seed=seed, root=mnist)
    mask, (f, b), label = mask[:samples], (cgn.to_float(part[:samples]) for part in textures), labels[1][:samples]
    draws, side = torch.rand(len(mask), cgn.PATCHES ** 2, generator=torch.Generator().manual_seed(seed)), cgn.MINI["patch"]
    whole = mask.float() / 255
    lines = ["| digits | patches | object in the grid | texture's label read |", "|---" * 4 + "|"]
    for name, margin in (("whole", 0), ("half as high", mnist_variants.SIZE // 4)):
        m = F.pad(F.interpolate(mask, mnist_variants.SIZE - 2 * margin), (margin,) * 4).float() / 255
        relative = cgn.relative_patch(m, side)
        for kind, patch in ((f"{side} pixels", side), (f"{relative.float().mean():.1f} pixels, by size", relative)):
            grid, share = (cgn.patch_grid(x, m, draws, patch) for x in (cgn.compose(m, f, b), m.expand(-1, 3, -1, -1)))
            found = torch.cat([reader(part).argmax(dim=1) for part in cgn.compose(whole, grid, b).split(500)])
            lines.append(f"| {name} | {kind} | {100 * share.mean():.1f} % | {100 * evaluate.accuracy(found, label):.1f} % |")
    return "\n".join(lines)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Make the miniature's weights.")
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")
    parser.add_argument("what", nargs="+", choices=(*STEPS, "table1", "tables34", "patches"), help="networks to train, or a table to make")
    parser.add_argument("--steps", type=int, help=f"training steps (default: {STEPS}, table1 as cgn.py --mini)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mnist", default="data/mnist", help="folder of MNIST's four .gz files (default: %(default)s)")
    parser.add_argument("--out", default="weights", help="folder of the networks (default: %(default)s)")
    parser.add_argument("--runs", default="runs", help="folder of the trained CGNs (default: %(default)s)")
    parser.add_argument("--bf16", action="store_true", help="train in bfloat16 where that is safe")
    parser.add_argument("--threads", type=int, help="CPU threads, at most one a CPU (default: torch's choice)")
    return parser


def main(argv: Optional[list[str]] = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        for name in ("steps", "threads"):
            if getattr(args, name) is not None and getattr(args, name) < 1:
                raise ValueError(f"--{name} {getattr(args, name)}: must be at least 1")
        if args.threads:
            torch.set_num_threads(min(args.threads, os.cpu_count()))
        args.bf16 = cgn.bf16_pays(args.bf16, "cpu")
        for what in args.what:
            if what in STEPS:
                make(what, Path(args.out), steps=args.steps, seed=args.seed, mnist=args.mnist, bf16=args.bf16)
            elif what == "table1":
                print(table1(Path(args.runs), seed=args.seed, options=[f"--{name}={getattr(args, name)}" for name in
                             ("steps", "threads") if getattr(args, name)] + ["--bf16"] * args.bf16))
            elif what == "tables34":
                print(tables34(Path(args.runs), seed=args.seed, steps=args.steps or 2000, mnist=args.mnist, bf16=args.bf16))
            else:
                print(patches(seed=args.seed, steps=args.steps or 4000, mnist=args.mnist, bf16=args.bf16))
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
