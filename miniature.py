"""The miniature: networks for `python cgn.py --dataset imagenet --mini`, and tables of the paper with them.

ImageNet's thousand classes are ten digits here, photos are wildlife MNIST with the drawn textures, and each
pre-trained network of the paper is a small one:

    teacher     BigGAN-deep, for BigGAN-deep-256: digits that always wear their class's textures
    saliency    U-2-Net, for U-2-Net: digits whose textures are random, and their masks
    style       VGG16 with batch norm, for torchvision's: the labels of digit and both textures, each alone
    classifier  a CNN, for Inception: biased digits, as the teacher; it gives the Inception Score
    reader      the same CNN, for classify.py --make variety: bare masks

    python miniature.py teacher saliency style classifier reader --out made
    python miniature.py table1 tables34 patches                 # Tables 1, 3 and 4, and appendix F
    python miniature.py masks --cgn FILE                        # U-2-Net learns masks of digits from a CGN
"""
import argparse
import itertools
from functools import partial
from pathlib import Path
from typing import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.models.vgg import make_layers

import biggan
import cgn
import classify
import drawing
import evaluate
import mnist_variants
import u2net
from run import (Run, bf16_pays, check_output, command, find_device, one_process, refuse_options, rng,
                 save_state)

DATASET = "wildlife"
GENERATOR = ((256, 256),) * 4 + ((256, 128), (128, 64))             # channels of BigGAN's blocks
SALIENCY = ((3, 8, 16),) + ((16, 8, 16),) * 5 + ((32, 8, 16),) * 5  # channels of U-2-Net's stages
STYLE = (16, 32, 64, 64)    # channels of VGG16's first four stages
NOISE = 32  # dimensions of the teacher's noise, and of its class embedding
EMPTY = 5   # every fifth picture for U-2-Net is bare: else it finds digits in textures, and L_bg blurs these
TEACHER = {
    "batch": 64,
    "pack": 2,              # images that the discriminator sees at once; with one, digits become all alike
    "lr": 4e-4,             # Adam's; the discriminator's is twice that
    "noise": 0.4,           # deviation of noise on all the discriminator sees; fades to 0
    "average": 0.999,       # decay of the average of weights that is kept
    "log_every": 50, "saves": (500,)}
READER = classify.METHODS["original"]
ENSEMBLE = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4, "decay": 0.1, "smoothing": 0.2,
            "log_every": 50, "saves": (1000,)}
WORK = {                    # steps, and the options that mean something
    "teacher": (5500, "mnist out runs"), "saliency": (2000, "mnist out bf16"),
    **dict.fromkeys(("style", "classifier", "reader"), (4000, "mnist out bf16")),
    "table1": (cgn.PRESETS["mini"]["steps"], "runs bf16"), "tables34": (2000, "mnist runs bf16"),
    "patches": (4000, "mnist bf16"), "masks": (2000, "mnist bf16 cgn textures")}
DRAWS = {"table1": 5000, "tables34": 20_000, "patches": 2000, "masks": 20_000}      # images of each


# ---------- the teacher

def train_teacher(config: dict, model: biggan.BigGAN, discriminator: nn.Module, images: Tensor,
                  labels: Tensor, out: Path, device: str = "cpu") -> biggan.BigGAN:
    """Train on uint8 images (N, 3, R, R) and labels (N,) long, a `Run` in `out`; returns the averaged
    generator, for `measure_statistics`. config: as TEACHER, with steps and seed.

    discriminator(x, y) -> scores judges `pack` images of a class at once, in 3 `pack` channels, and so sees
    where the generated ones are all alike (PacGAN; Lin et al., 2018). Raises ValueError as `Run`.
    """
    batch, pack, steps = config["batch"], config["pack"], config["steps"]
    model, discriminator = model.to(device), discriminator.to(device)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config["average"]))
    parts = cgn.learners(model, average, discriminator, config["lr"], steps)
    optimizer_g, optimizer_d, *schedules = list(parts.values())[3:]
    batches = draw_batches(images, labels, model.noise, batch, pack, config["seed"])

    with Run(out, config, parts, images=batch) as run:
        for step, drawn in zip(run, itertools.islice(batches, run.first, None)):
            x, y, z, noise = (part.to(device) for part in drawn)
            y_pack, noise = y[::pack], config["noise"] * (1 - step / steps) * noise
            fake = model(z, y, None)

            # Discriminator: real images above generated ones.
            seen = packed(torch.cat([x, fake.detach()]) + noise, pack)
            real_score, fake_score = discriminator(seen, y_pack.repeat(2)).chunk(2)
            loss = relativistic_hinge(real_score, fake_score)
            optimizer_d.zero_grad()
            loss.backward()
            run.check({"discriminator": loss}, discriminator.parameters())
            optimizer_d.step()

            # Generator: generated images above real ones.
            discriminator.requires_grad_(False)
            fake_score = discriminator(packed(fake + noise[batch:], pack), y_pack)
            loss = relativistic_hinge(fake_score, real_score.detach())
            optimizer_g.zero_grad()
            loss.backward()
            run.check({"generator": loss}, model.parameters())
            optimizer_g.step()
            model.power_iteration()
            discriminator.requires_grad_(True)
            for schedule in schedules:
                schedule.step()
            average.update_parameters(model)
    for _ in range(30):                             # its weights' norms are not those of the last weights
        average.module.power_iteration()
    return average.module


def relativistic_hinge(leading: Tensor, trailing: Tensor) -> Tensor:
    """Scores (N,) shall lead others, image by image, by 1 (Jolicoeur-Martineau, 2019). A scalar."""
    return F.relu(1 - (leading - trailing)).mean()


def packed(x: Tensor, pack: int) -> Tensor:
    """(N, 3, R, R) -> (N / pack, 3 pack, R, R)."""
    return x.unflatten(0, (-1, pack)).flatten(1, 2)


def draw_batches(images: Tensor, labels: Tensor, noise: int, batch: int, pack: int, seed: int) -> Iterator:
    """For each step x (N, 3, R, R), y (N,) in packs of a class, z (N, noise), and noise for 2 N images. It is
    one stream: a training that continues draws again, in seconds, what it has used."""
    generator = torch.Generator().manual_seed(seed)
    by_class, counts = labels.argsort(stable=True), labels.bincount()
    starts = counts.cumsum(0) - counts
    while True:
        y = labels[torch.randint(len(labels), (batch // pack,), generator=generator)].repeat_interleave(pack)
        place = torch.rand(batch, generator=generator, dtype=torch.double) * counts[y]
        x = drawing.to_float(images[by_class[starts[y] + place.long()]])
        z = biggan.truncated_noise(batch, noise, generator=generator)
        yield x, y, z, torch.randn(2 * batch, *x.shape[1:], generator=generator)


@torch.no_grad()
def measure_statistics(model: biggan.BigGAN, batches: int = 10, batch: int = 100, seed: int = 0) -> None:
    """Fill the 51 rows of every normalisation with means and variances over `batches` x `batch` draws at that
    truncation."""
    norms = [module for module in model.modules() if isinstance(module, biggan.BatchNorm)]
    generator, device = torch.Generator().manual_seed(seed), next(model.parameters()).device
    for row in range(biggan.ROWS):
        totals = [0.0] * len(norms)
        for _ in range(batches):
            y = torch.randint(model.classes, (batch,), generator=generator)
            z = biggan.truncated_noise(batch, model.noise, row / (biggan.ROWS - 1), generator=generator)
            model(z.to(device), y.to(device), None)
            totals = [total + torch.stack([norm.batch[0], norm.batch[1] + norm.batch[0] ** 2]) / batches
                      for total, norm in zip(totals, norms)]
        for norm, (mean, square) in zip(norms, totals):
            norm.running_means[row], norm.running_vars[row] = mean, square - mean ** 2


# ---------- saliency, style and the classifier

def train_saliency(images: Tensor, masks: Tensor, steps: int, seed: int, *, device: str, **how
                   ) -> u2net.U2Net:
    """A small U-2-Net that learned from uint8 images (N, 3, H, W) and masks (N, 1, H, W); how: as
    `classify.fit`."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)

    def batches(step):
        rows = torch.randint(len(images), (32,), generator=generator)
        x, m = (part[rows].to(device).float() / 255 for part in (images, masks))
        return u2net.normalise(x), m

    def objective(model, batch, progress):      # of every map: deep supervision
        return sum(F.binary_cross_entropy_with_logits(logit, batch[1]) for logit in model.logits(batch[0]))

    return classify.fit(u2net.U2Net(SALIENCY), batches, objective, steps, partial(classify.adam, lr=3e-3),
                        device=device, **how)


def train_style(images: Tensor, labels: Tensor, steps: int, seed: int, *, device: str, **how
                ) -> nn.Module:
    """VGG16 with batch norm up to its fourth pool, `features`, trained to read all three labels (N, 3) of
    uint8 images (N, 3, 32, 32); how: as `classify.fit`."""
    layout = [layer for width, count in zip(STYLE, cgn.STYLE_CONVS) for layer in [width] * count + ["M"]]
    model = nn.Sequential()
    model.features = make_layers(layout, batch_norm=True)
    model.append(nn.Flatten()).append(nn.Linear(4 * STYLE[-1], 30))

    def batches(step):
        rows = torch.from_numpy(rng(seed, step).integers(len(labels), size=classify.BATCH))
        x = u2net.normalise(images[rows].to(device).float() / 255)
        return x.contiguous(memory_format=torch.channels_last), labels[rows].to(device)

    def objective(model, batch, progress):
        scores = model(batch[0]).unflatten(1, (3, 10)).mT                   # (N, 10, 3)
        return F.cross_entropy(scores.float(), batch[1])

    optimizer = partial(classify.adam, lr=1e-3)
    model = classify.fit(model, batches, objective, steps, optimizer, device=device, **how)
    return nn.ModuleDict({"features": model.features})


def make(what, args, steps):
    """Train one of the networks and write its raw state dict into the folder args.out; see `file_name`."""
    agreement, seed = {"saliency": 0.1, "style": 0.1}.get(what, 1.0), args.seed
    how = {"bf16": args.bf16, "device": args.device, "report": what}
    parts, labels = mnist_variants.load_parts(DATASET, "train", agreement, seed, root=args.mnist)
    if what == "saliency":
        parts.mask[::EMPTY] = 0
    images = parts.mask.expand(-1, 3, -1, -1) if what == "reader" else mnist_variants.compose(*parts)
    torch.manual_seed(seed)
    if what == "teacher":
        model = biggan.BigGAN(GENERATOR, None, 10, NOISE, NOISE)
        judge = cgn.Discriminator(channels=3 * TEACHER["pack"]).to(memory_format=torch.channels_last)
        model = train_teacher({"steps": steps, "seed": seed, **TEACHER}, model, judge, images, labels[0],
                              args.runs / "mini-teacher", args.device)
        measure_statistics(model, seed=seed)
    elif what == "saliency":
        model = train_saliency(images, parts.mask, steps, seed, **how)
    elif what == "style":
        model = train_style(images, torch.stack(labels, dim=1), steps, seed, **how)
    else:
        model = classify.train(READER, [(images, labels[0], classify.BATCH)], steps, seed, **how)
    path = args.out / file_name(what)
    save_state(path, dict(model.cpu().state_dict()))
    print(f"wrote {path}; weights.txt must list {cgn.file_hash(path)}")


def file_name(what):
    return "reader.pth" if what == "reader" else f"mini-{what}.pth"


# ---------- Tables 1, 3 and 4

def table1(args, steps):
    """Table 1: a CGN with all losses, and one without each, trained where args.runs does not hold it; the
    sheets there show what each has lost."""
    network = classify.read_classifier(cgn.find_network(cgn.PRESETS["mini"]["inception"])).to(args.device)
    rows = {}
    for off in (None, *cgn.WITHOUT):
        out = args.runs / (f"mini-without-{off}" if off else "mini")
        cgn.main(["--dataset=imagenet", "--mini", f"--out={out}", f"--seed={args.seed}", f"--steps={steps}",
                  f"--device={args.device}", *["--bf16"] * args.bf16, *([f"--without={off}"] if off else ())])
        model = cgn.load(out / "checkpoint.pt").to(args.device)
        # Measured on other draws than those of the training, which have the training's seed.
        row = classify.table1_row(model, network, DRAWS["table1"], args.seed + 1)
        rows[f"without {off}" if off else "all"] = row
    return rows


def train_ensemble(config: dict, real: mnist_variants.Variant, made: tuple | None, out: Path,
                   device: str = "cpu") -> classify.Ensemble:
    """Three heads on a few real images and counterfactuals, each of three random parts of those `made`: uint8
    masks, foregrounds and backgrounds (N, ..), and labels (3, N); or one head on real ones. config: as
    ENSEMBLE, with steps, milestones, seed, bf16."""
    seed, share = config["seed"], classify.METHODS["original+cgn" if made else "original"].batch["real"]
    torch.manual_seed(seed)
    model = classify.Ensemble(classify.Classifier(), 3 if made else 1).to(device)

    def real_images(first):
        for step in itertools.count(first):
            rows = torch.from_numpy(rng(seed, step).integers(len(real.images), size=share))
            yield real.images[rows].float() / 255, real.shape[rows]

    def counterfactuals(first):
        (parts, labels), size = made, (3, classify.BATCH - share)
        for step in itertools.count(first):
            rows = torch.from_numpy(rng(seed + 1000, step).integers(labels.shape[1], size=size))
            m, f, b = (part[chosen].float() / 255 for part, chosen in zip(parts, rows))
            yield cgn.compose(m, f, b), labels.gather(1, rows).T

    classify.train_ensemble(config, model, real_images, counterfactuals if made else None, out, device)
    return model.eval().requires_grad_(False)


def tables34(args, steps):
    """Tables 3 and 4, with the CGN in args.runs/mini: shape bias, and accuracy on the test split in agreeing
    textures (mixed-same) and with any background (mixed-rand). Rows of the ensemble, of each head, and of the
    two whose BG-Gap the authors measure."""
    checkpoint, device, rows = args.runs / "mini" / "checkpoint.pt", args.device, {}
    model = cgn.load(checkpoint).to(device)
    load = partial(mnist_variants.load, DATASET, seed=args.seed, root=args.mnist)
    real, sets = load("train"), {kind: load("test", agreement=getattr(mnist_variants, kind.upper()))
                                 for kind in ("mixed_same", "mixed_rand", "cue_conflict")}
    with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=args.bf16):
        sample, labels = drawing.counterfactual_batch(model, args.seed, range(DRAWS["tables34"]), 1, 100)
    parts = 255 * (sample.mask > 0.5).byte(), *map(drawing.to_uint8, sample[1:3])   # digits have hard edges
    drawn = [part.cpu() for part in parts], labels
    config = {**ENSEMBLE, "steps": steps, "milestones": [steps // 2, 3 * steps // 4], "seed": args.seed,
              "bf16": args.bf16}
    heads = {"": [0, 1, 2], "/shape": [0], "/texture": [1], "/background": [2], "/shape + texture": [0, 1]}
    for name, made, kinds in ("real", None, {"": [0]}), ("real+CGN", drawn, heads):
        config["made"] = [model.sha256, DRAWS["tables34"]] if made else None
        ensemble = train_ensemble(config, real, made, args.runs / f"mini-{name}", device)
        scores = {kind: torch.cat([ensemble(u2net.normalise(part.to(device).float() / 255)).cpu()
                                   for part in data.images.split(500)]) for kind, data in sets.items()}
        for head, some in kinds.items():
            found = {kind: score[:, some].mean(dim=1).argmax(dim=1) for kind, score in scores.items()}
            top = {kind: evaluate.accuracy(found[kind], sets[kind].shape) for kind in sets}
            conflict = found["cue_conflict"], sets["cue_conflict"].shape, sets["cue_conflict"].foreground
            rows[name + head] = {"shape bias": evaluate.shape_bias(*(part.tolist() for part in conflict)),
                                 "mixed-same": top["mixed_same"], "mixed-rand": top["mixed_rand"],
                                 "BG-Gap": evaluate.bg_gap(top)}
    return rows


# ---------- masks without supervision, appendix F, and the command

def masks(args, steps):
    """How well masks of the test split's digits are found without a single true mask, as others judge theirs
    (Voynov et al., 2021): by a small U-2-Net that learned from images of --cgn and the masks in them, its
    counterfactuals or those of one label; and by the distance from the border's mean colour, its threshold
    chosen on the validation split. Beside them a U-2-Net that learned from true masks."""
    model = cgn.load(args.cgn).to(args.device)
    config, count = model.config, DRAWS["masks"]
    if not model.independent or config.get("dataset") not in mnist_variants.NAMES:
        raise ValueError(f"--cgn {args.cgn} draws no variant of MNIST by mechanisms, which is needed here")
    if args.textures and not config["textures"]:
        raise ValueError(f"--textures means nothing for {args.cgn}, whose data had none: leave it off")
    how = {"textures": args.textures or config["textures"], "root": args.mnist, "seed": config["seed"],
           "variance": mnist_variants.COLOR_VARIANCE if config["variance"] is None else config["variance"]}
    train, val, test = (mnist_variants.load_parts(config["dataset"], split, **how)[0]
                        for split in mnist_variants.SPLITS)
    pairs = {"true masks": (mnist_variants.compose(*train)[:count], train.mask[:count])}
    u, y, arrangement = drawing.draw(model, config["seed"] + 1, range(count))
    for name, labels in ("counterfactuals", y), ("images of one label", y[:1].expand(3, -1)):
        sample = model.make(u, labels, arrangement, 500)
        pairs[name] = drawing.to_uint8(sample.image), (255 * sample.mask).round().byte().cpu()
    truth, rows = test.mask > 127, {}

    def measure(predicted, threshold=0.5):
        mask = predicted > threshold
        return {"IoU": evaluate.mask_iou(mask, truth), "max F": evaluate.max_f(predicted, truth),
                "pixels right": (mask == truth).double().mean().item()}

    distance = border_distance(mnist_variants.compose(*val))
    best = max(range(100), key=lambda k: evaluate.mask_iou(distance > k / 100, val.mask > 127)) / 100
    distance = border_distance(mnist_variants.compose(*test))
    rows[f"distance from the border's colour, above {best}"] = measure(distance, best)
    for name, (images, target) in pairs.items():
        network = train_saliency(images, target, steps, args.seed, bf16=args.bf16, device=args.device,
                                 report=name).requires_grad_(False)
        rows[name] = measure(torch.cat([network(u2net.normalise(x.to(args.device).float() / 255)).cpu()
                                        for x in mnist_variants.compose(*test).split(500)]))
    return rows


def border_distance(images: Tensor) -> Tensor:
    """How far each pixel of images (N, 3, H, W) uint8 is from the mean colour of the outermost 2 pixels of
    its image: (N, 1, H, W), 1 for the largest distance in the image."""
    x = images.float()
    border = torch.ones(x.shape[2:], dtype=torch.bool)
    border[2:-2, 2:-2] = False
    color = x[:, :, border].mean(dim=2)[:, :, None, None]
    distance = (x - color).square().sum(dim=1, keepdim=True).sqrt()
    return distance / distance.amax(dim=(2, 3), keepdim=True).clamp(min=1)


def patches(args, steps):
    """Appendix F: patch grids of digits in two sizes, of patches of one side and of some by the digit's size.

    How much of a grid is object (the rest is background that f would learn), and how often a reader, trained
    on digits in random textures, finds the texture's label in it, seen through the whole digit.
    """
    load = {"seed": args.seed, "root": args.mnist}
    train = mnist_variants.load(DATASET, "train", agreement=0.1, **load)
    reader = classify.train(READER, [(train.images, train.foreground, classify.BATCH)], steps, args.seed,
                            bf16=args.bf16, device=args.device, report="reader").requires_grad_(False)
    parts, (_, label, _) = mnist_variants.load_parts(DATASET, "val", **load)
    mask, f, b, label = (part[:DRAWS["patches"]] for part in (*parts, label))
    f, b, side, rows = drawing.to_float(f), drawing.to_float(b), cgn.PRESETS["mini"]["patch"], {}
    draws = torch.rand(len(mask), cgn.PATCHES ** 2, generator=torch.Generator().manual_seed(args.seed))
    for name, margin in (("whole", 0), ("half as high", mnist_variants.SIZE // 4)):
        m = F.pad(F.interpolate(mask, mnist_variants.SIZE - 2 * margin), (margin,) * 4).float() / 255
        by_size = cgn.relative_patch(m, side)
        for patch, pixels in (side, side), (by_size, f"by size, {by_size.float().mean():.1f}"):
            grid, share = (cgn.patch_grid(x, m, draws, patch)
                           for x in (cgn.compose(m, f, b), m.expand(-1, 3, -1, -1)))
            shown = cgn.compose(mask.float() / 255, grid, b).to(args.device)
            found = torch.cat([reader(part).argmax(dim=1).cpu() for part in shown.split(500)])
            rows[f"{name}, {pixels} pixels"] = {"object in the grid": share.mean().item(),
                                                "texture's label read": evaluate.accuracy(found, label)}
    return rows


TABLES = {table.__name__: table for table in (table1, tables34, patches, masks)}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Make the miniature's networks, and tables with them.")
    add = parser.add_argument
    add("what", nargs="+", choices=WORK, help="networks to train, or tables to print")
    add("--steps", type=int, help=f"default: {', '.join(f'{name} {WORK[name][0]}' for name in WORK)}")
    add("--seed", type=int, default=0, help="default: 0")
    add("--mnist", help="folder of MNIST's four .gz files (default: data/mnist)")
    add("--out", type=Path, help="folder of the networks (default: weights)")
    add("--runs", type=Path, help="folder of longer trainings (default: runs)")
    add("--cgn", metavar="FILE", help="checkpoint of a CGN of digits, for masks")
    add("--textures", help="its folder of DTD, if that has moved")
    add("--bf16", action="store_true", help="bfloat16 where that is safe")
    add("--device", help="cpu, cuda, .. (default: a GPU where there is one)")
    add("--threads", type=int, help="CPU threads (default: torch's choice)")
    return parser


def main(argv: list[str] | None = None) -> None:
    command(build_parser(), _main, argv)


def _main(args):
    one_process("the miniature")
    known = {word for what in args.what for word in WORK[what][1].split()}
    refuse_options(args, {"what", "steps", "seed", "device", "threads", *known}, " and ".join(args.what))
    args.mnist, args.out = args.mnist or mnist_variants.ROOT, args.out or cgn.WEIGHTS
    args.runs, args.device = args.runs or cgn.RUNS, find_device(args.device)
    args.bf16 = bf16_pays(args.bf16, args.device)
    if "masks" in args.what and not args.cgn:
        raise ValueError("masks needs --cgn")
    for what in {*args.what} - {*TABLES}:
        check_output(args.out / file_name(what), *args.out.glob(file_name(what)))
    for what in args.what:
        steps = args.steps or WORK[what][0]
        print(f"{what}: {steps} steps on {args.device}", flush=True)
        if what in TABLES:
            evaluate.print_table(what, TABLES[what](args, steps))
        else:
            make(what, args, steps)


if __name__ == "__main__":
    main()
