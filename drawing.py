"""What a trained CGN draws: counterfactual data sets, labelled sheets and the paper's figures, and a person's
photo with another texture or before another background.

    python cgn.py --checkpoint weights/cgn-wildlife.pth                         # a row for each class
    python cgn.py --checkpoint FILE --counterfactuals 100000 --out drawn.pt
    python cgn.py --checkpoint FILE --photo cat.jpg --background any

`model` is any `cgn.CGN`, of either scale. u (3, N, Z), y (3, N) and arrangements (N, 2, cells) are noise,
labels and the order of a texture's cells, for shape, texture and background each; see the glossary of cgn.py.
"""
import argparse
import difflib
import json
import os
import re
from pathlib import Path
from typing import Callable, NamedTuple, Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as F_image

import biggan
import mnist_variants
import u2net
from run import (check_apart, check_output, one_line, one_process, read_checkpoint, rng, save_state,
                 watched)

HERE = Path(__file__).parent        # of all default paths
MECHANISMS = ("shape", "texture", "background")
SHEET_TRUNCATION = 0.5              # of ImageNet's sheets


# ---------- counterfactuals

def draw(model: nn.Module, seed: int, indices: range, per_shape: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Noise u (3, N, Z), labels y (3, N) and arrangements (N, 2, cells) of the counterfactuals `indices`.

    Image i takes them from rng(seed, i), the shape's u and label from the first image of its group of
    `per_shape` (section 2.2: u is fixed, other mechanisms drawn again; 1 gives 2.3's interventional images).
    """
    drawn = [model.draw(rng(seed, index)) for index in indices]
    u, y, arrangement = (torch.stack(part, dim=dim) for part, dim in zip(zip(*drawn), (1, 1, 0)))
    for place, index in enumerate(indices):
        if model.independent and index % per_shape:
            start = index - index % per_shape
            first = (u[:, place - 1], y[:, place - 1]) if place else model.draw(rng(seed, start))
            u[0, place], y[0, place] = first[0][0], first[1][0]
    return u, y, arrangement


def counterfactual_batch(model: nn.Module, seed: int, part: range, per_shape: int = 1,
                         at_once: int | None = None) -> tuple[NamedTuple, Tensor]:
    """The counterfactuals `part`, N of them, a `Sample`, and their labels (3, N); see `draw`, `CGN.make`."""
    u, y, arrangement = draw(model, seed, part, per_shape)
    return model.make(u, y, arrangement, at_once), y


def counterfactuals(model: nn.Module, count: int, seed: int = 0, per_shape: int = 1, at_once: int = 100
                    ) -> mnist_variants.Variant:
    """`count` counterfactual images with each mechanism's label, `per_shape` of them sharing one shape.

    A pure function of (weights, seed, index): image i does not depend on `count`, nor, to float error, on
    `at_once`. A GAN gives plain samples, whose three labels agree. ValueError for a count below 1.
    """
    check_counts(count, per_shape, at_once)
    images = torch.empty(count, 3, model.resolution, model.resolution, dtype=torch.uint8)
    labels = torch.empty(3, count, dtype=torch.long)
    for start in watched(range(0, count, at_once), "counterfactuals"):
        part = range(start, min(start + at_once, count))
        sample, labels[:, part.start:part.stop] = counterfactual_batch(model, seed, part, per_shape)
        images[part.start:part.stop] = to_uint8(sample.image)
    return mnist_variants.Variant(images, *labels)


def check_counts(count: int, per_shape: int, at_once: int) -> None:
    if min(count, per_shape, at_once) < 1:
        raise ValueError(f"{count} images, {per_shape} per shape, {at_once} at once: all must be at least 1")


def write_counterfactuals(model: nn.Module, out: Path, count: int, seed: int = 0, per_shape: int = 1,
                          at_once: int = 10, parts: Sequence[str] = (), bf16: bool = False) -> None:
    """Write counterfactuals as a folder: 00000000.png and so on, and labels.csv when all are there.

    parts: of mask, foreground and background, what is written as well: 00000000-mask.png and so on. Processes
    of torchrun share the work by RANK and WORLD_SIZE, and need not meet; what is there is not made again.
    Raises ValueError for a count or per_shape below 1 and for a folder of other settings.
    """
    check_counts(count, per_shape, at_once)
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    settings = {"seed": seed, "per_shape": per_shape, "truncation": model.truncation, "bf16": bf16,
                "weights": model.sha256, "names": class_names(model)}
    held = out / "settings.json"
    if not held.exists():
        mnist_variants.write_file(held, json.dumps(settings).encode())
    if json.loads(held.read_text()) != settings:
        raise ValueError(f"{out} holds counterfactuals of other weights, another seed, --per-shape, "
                         "--truncation or precision: choose another --out")
    group = -(-at_once // per_shape) * per_shape                            # whole: a mask is made once
    for start in watched(range(rank * group, count, ranks * group), "counterfactuals"):
        part = range(start, min(start + group, count))
        paths = {name: [out / f"{index:08d}{suffix}.png" for index in part]
                 for name, suffix in (("image", ""), *((name, f"-{name}") for name in parts))}
        if all(path.exists() for row in paths.values() for path in row):
            continue
        sample, _ = counterfactual_batch(model, seed, part, per_shape, at_once)
        for name, row in paths.items():
            made = getattr(sample, name) * 2 - 1 if name == "mask" else getattr(sample, name)
            for path, picture in zip(row, to_uint8(made).cpu()):
                mnist_variants.save_png(path, F_image.to_pil_image(picture))
    if all((out / f"{index:08d}.png").exists() for index in range(count)):  # whoever is the last
        rows = ["file,seed,u,shape,texture,background"]
        for index in range(count):
            labels = draw(model, seed, range(index, index + 1), per_shape)[1].flatten().tolist()
            rows.append(f"{index:08d}.png,{seed},{index - index % per_shape},{','.join(map(str, labels))}")
        mnist_variants.write_file(out / "labels.csv", ("\n".join(rows) + "\n").encode())


def to_float(images: Tensor) -> Tensor:
    """uint8 images 0..255 -> float images -1..1, channels last."""
    return images.float().div(127.5).sub(1).contiguous(memory_format=torch.channels_last)


def to_uint8(images: Tensor) -> Tensor:
    """float images -1..1 -> uint8 images 0..255, never stretched by their own minimum and maximum."""
    return images.float().mul(127.5).add(127.5).round().clamp(0, 255).byte()


# ---------- sheets

COLUMNS = ("pre-mask", "m", "f", "b", "x_gen")


def render(model: nn.Module, u: Sequence[Tensor], y: Sequence[Tensor], arrangement: Tensor
           ) -> dict[str, Tensor]:
    """What `make` makes, by the names in COLUMNS that the model has: (N, 3, R, R) uint8 on the CPU."""
    sample = model.make(u, y, arrangement, max(1, 2 ** 17 // model.resolution ** 2))
    parts = zip(COLUMNS, (sample.pre_mask, sample.mask * 2 - 1, *sample[1:4]))
    return {name: to_uint8(part.expand(-1, 3, -1, -1)).cpu() for name, part in parts if part is not None}


def save_sheet(model: nn.Module, path: str | Path, images: Tensor, rows: list[str], columns: list[str]
               ) -> str | Path:
    """Images (rows, columns, 3, R, R) uint8 as a labelled PNG, small ones enlarged; returns the path."""
    mnist_variants.save_sheet(path, images, rows, columns, scale=max(1, 64 // model.resolution))
    return path


def class_sheet(model: nn.Module, labels: Sequence[int] | None, names: Sequence[str], path: Path, seed: int,
                plain: int = 3, mixed: int = 8, teacher: nn.Module | None = None) -> Path:
    """A row for each of the labels, None for up to ten classes: what each mechanism makes of `plain` draws of
    it, a teacher's images of them (Figures 5, 8-19, 25-29), and `mixed` counterfactuals with its shape. On
    ImageNet one u serves all mechanisms of plain draws, as in training."""
    count = max(plain, mixed)
    labels = labels or torch.linspace(0, model.classes - 1, min(model.classes, 10)).long().tolist()
    u, y, arrangement = draw(model, seed, range(len(labels) * count))
    y[0] = torch.tensor(labels).repeat_interleave(count)
    few = torch.arange(len(y[0])).view(-1, count)[:, :plain].flatten()
    shared = model.config["model"] == "imagenet"
    u_few, y_few = (u[:1].expand(3, -1, -1) if shared else u)[:, few], y[:1, few].expand(3, -1)
    made = render(model, u_few, y_few, arrangement[few])
    if teacher:
        drawn = [tensor[0].to(next(model.parameters()).device) for tensor in (u_few, y_few)]
        made["x_gt"] = torch.cat([to_uint8(teacher(u_k[None], y_k[None], model.truncation)).cpu()
                                  for u_k, y_k in zip(*drawn)])
    blocks = {name: images.unflatten(0, (-1, plain)) for name, images in made.items()}
    if model.independent:
        made = render(model, u, y, arrangement)["x_gen"]
        blocks["counterfactuals"] = made.unflatten(0, (-1, count))[:, :mixed]
    else:
        blocks = {"x_gen": blocks["x_gen"]}
    columns = [name for name, block in blocks.items() for _ in range(block.shape[1])]
    rows = [names[label] for label in labels]
    return save_sheet(model, path, torch.cat([*blocks.values()], dim=1), rows, columns)


@torch.no_grad()
def training_sheet(model: nn.Module, config: dict, out: Path, teacher: nn.Module | None, step: int) -> Path:
    """The sheet of a step, of up to ten classes; ImageNet's with the teacher's images."""
    more = {"plain": 1, "mixed": 2, "teacher": teacher} if teacher else {}
    path, truncation = out / f"sheet-{step:06d}.png", model.truncation
    model.config, model.truncation = config, SHEET_TRUNCATION
    try:
        return class_sheet(model, None, config["names"], path, config["seed"], **more)
    finally:
        model.truncation = truncation


def interpolate(model: nn.Module, what: str, seed: int = 0, rows: int = 10, columns: int = 10,
                ends: Sequence[int] | None = None) -> Tensor:
    """Images (rows, columns, 3, R, R) uint8: u and class weights move linearly from one draw to another
    (Figures 20-22). what: the mechanism that moves, or all; the others stay. ends: its two classes, by
    default drawn. Raises ValueError for another mechanism."""
    if what not in (*MECHANISMS, "all"):
        raise ValueError(f"cannot interpolate {what!r}: choose one of {', '.join(MECHANISMS)}, all")
    u, y, arrangement = draw(model, seed, range(2 * rows))
    moving = torch.tensor([what in (mechanism, "all") for mechanism in MECHANISMS])
    if ends:
        y[moving] = torch.tensor(ends).repeat(rows)
    y = F.one_hot(y, model.classes).float()
    blend = torch.linspace(0, 1, columns).repeat(rows) * moving[:, None]    # (3, rows * columns)

    def between(x: Tensor) -> Tensor:       # (3, 2 * rows, D) -> (3, rows * columns, D)
        begin, end = (x[:, first::2].repeat_interleave(columns, dim=1) for first in (0, 1))
        return torch.lerp(begin, end, blend[..., None])

    made = render(model, between(u), between(y), arrangement[::2].repeat_interleave(columns, dim=0))
    return made["x_gen"].unflatten(0, (rows, columns))


def triples(model: nn.Module, labels: Sequence[Sequence[int]], seed: int = 0, columns: int = 4) -> Tensor:
    """Counterfactuals of given (shape, texture, background) classes (Figures 4 and 24): (rows, columns, 3, R,
    R) uint8."""
    u, _, arrangement = draw(model, seed, range(columns))
    y = torch.tensor(labels)[..., None].expand(-1, -1, columns)             # (rows, 3, columns)
    return torch.stack([render(model, u, row, arrangement)["x_gen"] for row in y])


# ---------- counterfactuals of a photo

@torch.no_grad()
def recompose(model: nn.Module, photo: Image.Image, u: Tensor, texture: int | None = None,
              background: int | None = None) -> Tensor:
    """Equation 2 with a person's own photo, RGB: x (3, H, W) uint8, at the photo's size.

    m is what U-2-Net finds in the photo. f and b are the photo itself or, for a class, drawn with u (3, Z)
    and scaled to it: another texture on the same object, the object before another background.
    """
    device = next(model.parameters()).device
    own = to_float(F_image.pil_to_tensor(photo)[None].to(device))           # (1, 3, H, W)
    side = u2net.SIDE if model.resolution > mnist_variants.SIZE else mnist_variants.SIZE
    m = F_image.to_tensor(u2net.saliency(model.u2net, photo, side)).to(device)      # (1, H, W)

    def part(mechanism: Callable, u: Tensor, label: int | None) -> Tensor:
        if label is None:
            return own
        made = mechanism(u[None].to(device), torch.tensor([label], device=device))
        return F.interpolate(made, own.shape[2:], mode="bilinear", antialias=True)

    f, b = part(model.texture, u[1], texture), part(model.background, u[2], background)
    return to_uint8(model.compose(m[None], f, b))[0].cpu()


def write_photos(model: nn.Module, folder: str | os.PathLike, out: Path, seed: int = 0,
                 texture: int | str | None = None, background: int | str | None = None) -> Tensor:
    """`recompose` each picture of a folder with a subfolder a class, as a folder with labels.csv, on which
    the ensemble trains. Returns up to ten of them and what they became, (2, 10, 3, R, R) uint8.

    texture, background: a class, "any" (one drawn for each picture) or None (its own). Picture i is drawn by
    rng(seed, i). Raises ValueError for classes that the model does not know.
    """
    names, held = class_names(model), mnist_variants.class_folders(folder)
    if (out / "labels.csv").exists() or (out / "settings.json").exists():
        raise ValueError(f"{out} holds a data set: choose another --out")
    known = [*range(len(names))]            # WordNet's numbers have the order of ImageNet's classes
    if len(held) != len(names) or not re.fullmatch(r"n\d{8}", held[0]):
        known = [parse_classes(name, names, 1)[0] for name in held]
    rows, files, shown = ["file,shape,texture,background"], mnist_variants.labelled_files(folder), []
    step = -(-len(files) // 10)
    for index in watched(range(len(files)), "photos"):
        path, (label,) = files[index]
        photo, (u, y, _) = u2net.open_photo(path, smallest=1), model.draw(rng(seed, index))
        chosen = [y_k.item() if asked == "any" else asked for y_k, asked in zip(y[1:], (texture, background))]
        image = recompose(model, photo, u, *chosen)
        mnist_variants.save_png(out / f"{index:08d}.png", F_image.to_pil_image(image))
        labels = [known[label] if choice is None else choice for choice in (None, *chosen)]
        rows.append(f"{index:08d}.png,{','.join(map(str, labels))}")
        if index % step == 0:
            pair = F_image.pil_to_tensor(photo), image
            shown.append(torch.stack([F_image.resize(x, [model.resolution] * 2) for x in pair]))
    settings = {"names": held if known == [*range(len(names))] else names, "seed": seed}
    mnist_variants.write_file(out / "settings.json", json.dumps(settings).encode())
    mnist_variants.write_file(out / "labels.csv", ("\n".join(rows) + "\n").encode())
    return torch.stack(shown, dim=1)


# ---------- commands

# Shape, texture and background of Figure 24's pictures, row by row: school bus, giant panda, geyser, and so
# on.
FIGURE_24 = """
    779,388,974 275,486,949 15,629,983 63,409,46 751,719,952 275,461,7 235,145,133 438,439,953 63,950,815
    850,441,119 225,758,888 350,881,977 604,951,93 540,407,460 947,66,9 802,930,354 484,293,74 22,949,998
    873,267,30 561,854,979 907,720,970 724,869,337 833,751,958 330,607,20 849,652,429""".split()


def class_names(model: nn.Module) -> list[str]:
    """The names of a model's classes: those it was trained with, or ImageNet's."""
    numbers = ",".join(map(str, range(model.classes)))
    return list(model.config.get("names") or biggan.class_numbers(numbers, model.classes).values())


def parse_classes(text: str, names: list[str], count: int) -> list[int]:
    """`count` classes, numbers or names with commas between. Raises ValueError."""
    chosen = []
    for word in (word.strip() for word in text.split(",")):
        if word not in names and not (word.isdecimal() and int(word) < len(names)):
            near = difflib.get_close_matches(word, names, 1)
            raise ValueError(f"class {word!r} is neither a number in 0..{len(names) - 1} nor a name"
                             + (f": did you mean {near[0]}?" if near else ""))
        chosen.append(names.index(word) if word in names else int(word))
    if len(chosen) != count:
        raise ValueError(f"{text!r} names {len(chosen)} classes: {count} are needed")
    return chosen


def check_png(path: str | os.PathLike, *inputs: str | os.PathLike) -> Path:
    """`check_output` of a picture, before the work. Raises ValueError where it does not end in .png."""
    if Path(path).suffix.lower() != ".png":
        raise ValueError(f"--out {path} does not end in .png")
    return check_output(path, *inputs)


def data_set(args: argparse.Namespace, model: nn.Module, _: str) -> None:
    """--counterfactuals: tensors in one file, or a folder of pictures; and a preview of the first."""
    pictures = model.resolution > mnist_variants.SIZE or args.parts
    default = "counterfactuals" if pictures else "counterfactuals.pt"
    out, count = Path(args.out or HERE / default), args.counterfactuals
    in_one = out.suffix == ".pt"
    if in_one and args.parts:
        raise ValueError(f"--parts are pictures, and --out {out} is a file of tensors: name a folder")
    at_once = args.batch or (100 if in_one and model.resolution <= 64 else 10)
    per_shape = 1 if args.per_shape is None else args.per_shape
    preview = check_output(out.with_name(f"{out.stem}-preview.png"), args.checkpoint)
    if in_one:
        one_process("--counterfactuals into one file")
        if check_output(out, args.checkpoint).name == "checkpoint.pt":
            raise ValueError(f"--out {out}: a run's checkpoint has this name, and would be lost")
    if os.environ.get("RANK", "0") == "0":
        few = min(count, 100) // 10 * 10 or count
        few = counterfactuals(model, few, args.seed, per_shape, at_once).images
        few = few.unflatten(0, (-1, min(10, len(few))))
        save_sheet(model, preview, few, [str(10 * row) for row in range(len(few))],
                   [f"the first of {count} counterfactuals, {per_shape} a shape"] * few.shape[1])
    if in_one:
        data = counterfactuals(model, count, args.seed, per_shape, at_once)
        save_state(out, {**data._asdict(), "names": class_names(model), "seed": args.seed,
                         "per_shape": per_shape, "weights": model.sha256})
    else:
        write_counterfactuals(model, out, count, args.seed, per_shape, at_once, args.parts or (), args.bf16)
    print(f"wrote {out} and {preview}")


def read_counterfactuals(path: str | os.PathLike) -> mnist_variants.Variant:
    """The digits that `data_set` wrote into one file. Raises ValueError for any other file."""
    state = read_checkpoint(path, other=True)
    with one_line(f"{path} is no set of digits that cgn.py --counterfactuals wrote"):
        images, *labels = (state[name] for name in mnist_variants.Variant._fields)
        assert images.shape == (len(labels[0]), 3, 32, 32) and images.dtype == torch.uint8
        labels = torch.stack(labels)
        assert labels.dtype == torch.long and 0 <= labels.min() <= labels.max() < 10
    return mnist_variants.Variant(images, *labels)


def photo(args: argparse.Namespace, model: nn.Module, _: str) -> None:
    """--photo: a picture, or a folder with labels.csv and a preview."""
    one_process("--photo")
    if not hasattr(model, "u2net"):
        raise ValueError(f"{args.checkpoint} has no U-2-Net, which finds a photo's object: ImageNet's have")
    if args.texture is args.background is None:
        raise ValueError("--photo needs a --texture or a --background: a class, or any")
    names = class_names(model)
    asked = [text if text in (None, "any") else parse_classes(text, names, 1)[0]
             for text in (args.texture, args.background)]
    if Path(args.photo).is_dir():
        out = Path(args.out or HERE / "photos")
        check_apart(out, args.photo)
        shown = write_photos(model, args.photo, out, args.seed, *asked)
        preview, columns = out.with_name(f"{out.name}-preview.png"), [str(k) for k in range(shown.shape[1])]
        save_sheet(model, preview, shown, ["photo", "counterfactual"], columns)
    else:
        out = check_png(args.out or HERE / "photo.png", args.checkpoint, args.photo)
        u, y, _ = model.draw(rng(args.seed, 0))
        labels = [label.item() if text == "any" else text for label, text in zip(y[1:], asked)]
        picture = recompose(model, u2net.open_photo(args.photo), u, *labels)
        mnist_variants.save_png(out, F_image.to_pil_image(picture))
    print(f"wrote {out}")


def sheet(args: argparse.Namespace, model: nn.Module, what: str = "sheet") -> None:
    """A sheet of all classes, of one (--outputs), of --interpolate or of --triples."""
    one_process(f"--{what}")
    if not model.independent and (what == "triples" or args.interpolate in MECHANISMS):
        raise ValueError(f"{args.checkpoint} is a GAN's: it has no mechanisms for --{what}")
    path, names = check_png(args.out or HERE / f"{what}.png", args.checkpoint), class_names(model)
    if what == "sheet":
        class_sheet(model, None, names, path, args.seed, plain=1)
    elif what == "outputs":
        labels = parse_classes(args.outputs, names, 1) * 6
        class_sheet(model, labels, names, path, args.seed, plain=1, mixed=3)
    elif what == "interpolate":
        ends = [parse_classes(text, names, 1)[0] for text in args.classes or ()]
        size = (10, 10) if model.resolution <= 64 else (4, 8)
        images = interpolate(model, args.interpolate, args.seed, *size, ends)
        title = args.interpolate + (f": {names[ends[0]]} → {names[ends[1]]}" if ends else "")
        save_sheet(model, path, images, [f"pair {row}" for row in range(size[0])], [title] * size[1])
    else:
        texts = FIGURE_24 if args.triples == ["figure24"] else args.triples
        chosen = [parse_classes(text, names, 3) for text in texts]
        rows = [" / ".join(names[label] for label in row) for row in chosen]
        save_sheet(model, path, triples(model, chosen, args.seed), rows, ["shape / texture / background"] * 4)
    print(f"wrote {path}")
