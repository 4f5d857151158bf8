"""The MNIST variants of Counterfactual Generative Networks (Sauer & Geiger, ICLR 2021; section 4, appendix A.2).

Each variant writes the class label into an image up to three times: as the digit's shape, as the colour or texture of the
digit (foreground) and as the colour or texture behind it (background). In the training split all of them agree, so that a
classifier may take the easy way; in the validation and test splits each is drawn on its own.

    colored         grey digit times a class colour, on black      (Kim et al., 2019, variance 0.02)
    double-colored  one class colour for the digit, another for the background
    wildlife        patches of a striped texture for the digit, of a veined one for the background

    python mnist_variants.py --out sheets                 # one labelled PNG a variant
    python mnist_variants.py --textures path/to/dtd       # wildlife from the paper's DTD pictures

The digits are the four IDX files in data/mnist, checked by SHA-256; where that folder is absent, torchvision downloads it.
The paper's twenty textures belong to DTD (Cimpoi et al., 2014; `torchvision.datasets.DTD`). Without them the module draws
ten striped and ten veined textures of its own. Needs torch, torchvision and Pillow, and nothing else of this project.
"""
import argparse
import gzip
import hashlib
import io
import math
import os
from functools import lru_cache
from pathlib import Path
from typing import Callable, NamedTuple, Optional, Union

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

NAMES = ("colored", "double-colored", "wildlife")
SPLITS = {"train": slice(50_000), "val": slice(50_000, 60_000), "test": slice(10_000)}     # of MNIST's training or test file
SIZE = 32                                   # images are 32x32, digits scaled up from 28x28 by nearest neighbour

MNIST_FILES = {  # file (without .gz): bytes and SHA-256 of the decompressed content
    "train-images-idx3-ubyte": (47_040_016, "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"),
    "train-labels-idx1-ubyte": (60_008, "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5"),
    "t10k-images-idx3-ubyte": (7_840_016, "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7"),
    "t10k-labels-idx1-ubyte": (10_008, "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"),
}

# Kim et al. (2019), "Learning Not to Learn", supplement: the digit's colour for classes 0..9, RGB.
COLORED = torch.tensor([(220, 20, 60), (0, 128, 128), (253, 233, 16), (0, 149, 182), (237, 145, 33), (145, 30, 188),
                        (70, 240, 240), (250, 197, 187), (210, 245, 60), (128, 0, 0)])
# Double-colored, the authors' code: background colours of classes 0..9; the digit's are the same list shifted by six.
DOUBLE_BACKGROUND = torch.tensor([(0, 100, 0), (0, 0, 139), (176, 48, 96), (255, 69, 0), (255, 255, 0), (222, 184, 135),
                                  (0, 255, 0), (0, 255, 255), (255, 0, 255), (100, 149, 237)])
DOUBLE_FOREGROUND = DOUBLE_BACKGROUND.roll(-6, 0)
COLOR_VARIANCE = 0.02                       # of one image's colour around its class colour, on the [0, 1] scale

# Agreements of test sets like ImageNet's: a texture never the shape's (Geirhos et al., 2019); backgrounds of the same or of
# any class behind an object that is as it was (Xiao et al., 2020).
CUE_CONFLICT, MIXED_SAME, MIXED_RAND = (0.0, 0.1), (1.0, 1.0), (1.0, 0.1)

DTD_FILES = {  # the paper's textures for classes 0..9, in DTD's own layout: images/striped/striped_0001.jpg
    "striped": ("0001", "0091", "0008", "0043", "0092", "0028", "0097", "0004", "0125", "0033"),  # foreground
    "veined": ("0066", "0067", "0073", "0180", "0131", "0157", "0158", "0104", "0188", "0189"),   # background
}
TEXTURE_SIZE, TEXTURE_PAD = 150, 3          # textures are scaled to 150x150 and padded by reflection (authors' code)


class Parts(NamedTuple):
    """What images are made of, uint8: `mask` (N, 1, 32, 32), `foreground` and `background` (N, 3, 32, 32) or (N, 3, 1, 1)."""
    mask: torch.Tensor
    foreground: torch.Tensor
    background: torch.Tensor


class Variant(NamedTuple):
    """`images` (N, 3, 32, 32) uint8 in 0..255; `shape`, `foreground`, `background` labels (N,) long in 0..9, -1 for none."""
    images: torch.Tensor
    shape: torch.Tensor
    foreground: torch.Tensor
    background: torch.Tensor


# ---------------------------------------------------------------------------------------------------------------- digits

def read_mnist(train: bool, root: str | os.PathLike = "data/mnist") -> tuple[torch.Tensor, torch.Tensor]:
    """MNIST's training file (60,000) or test file (10,000): images (N, 28, 28) uint8 and labels (N,) long.

    Reads the .gz files in `root`, or in torchvision's `root`/MNIST/raw; torchvision downloads them where there are none.
    Raises ValueError where a file is missing, truncated or altered (its SHA-256 is compared).
    """
    root = Path(root)
    raw = root / "MNIST" / "raw"
    if not any((folder / f"{name}.gz").exists() for folder in (root, raw) for name in MNIST_FILES):
        from torchvision.datasets import MNIST
        try:
            MNIST(str(root), download=True)
        except (RuntimeError, OSError) as error:
            raise ValueError(f"{root} holds no MNIST, and it could not be downloaded ({' '.join(str(error).split())}): put the four "
                             ".gz files of MNIST there, or name another folder with --mnist") from None
    if any(raw.glob("*.gz")):
        root = raw
    return tuple(part.clone() for part in _read_file(root.resolve(), "train" if train else "t10k"))


@lru_cache(maxsize=2)       # a table reads the same two files a hundred times
def _read_file(root: Path, prefix: str) -> tuple[torch.Tensor, torch.Tensor]:
    images = _read_idx(root, f"{prefix}-images-idx3-ubyte")[16:].reshape(-1, 28, 28)
    labels = _read_idx(root, f"{prefix}-labels-idx1-ubyte")[8:]
    return torch.from_numpy(images), torch.from_numpy(labels).long()


def _read_idx(folder: Path, name: str) -> np.ndarray:
    size, sha256 = MNIST_FILES[name]
    path = folder / f"{name}.gz"
    remedy = f"put MNIST's own {name}.gz there, or name another folder with --mnist"
    try:
        with gzip.open(path) as file:
            content = bytearray(file.read(size + 1))        # never more than the file should hold
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: {remedy}") from None
    except (OSError, EOFError, gzip.zlib.error) as error:
        raise ValueError(f"{path} cannot be unpacked ({error}): {remedy}") from None
    if hashlib.sha256(content).hexdigest() != sha256:
        raise ValueError(f"{path} is not MNIST's file (its content has another SHA-256): {remedy}")
    return np.frombuffer(content, np.uint8)


# -------------------------------------------------------------------------------------------------------------- textures

def read_textures(folder: str | os.PathLike) -> torch.Tensor:
    """The paper's twenty DTD pictures, from a folder in DTD's layout: (2, 10, 3, 156, 156) uint8, striped then veined.

    Raises ValueError that names the first picture that is missing or does not open.
    """
    folder = Path(folder)
    textures = []
    for kind, numbers in DTD_FILES.items():
        for number in numbers:
            path = folder / "images" / kind / f"{kind}_{number}.jpg"
            try:
                with Image.open(path) as picture:
                    picture = picture.convert("RGB").resize((TEXTURE_SIZE, TEXTURE_SIZE), Image.NEAREST)
            except FileNotFoundError:
                raise ValueError(f"{path} is missing: --textures needs the folder of DTD that holds images/striped and "
                                 "images/veined; without --textures, textures are drawn") from None
            except (OSError, Image.DecompressionBombError) as error:
                raise ValueError(f"{path} does not open as a picture ({error}): put DTD's own file there") from None
            textures.append(torch.from_numpy(np.array(picture)).permute(2, 0, 1))
    padded = F.pad(torch.stack(textures).float(), (TEXTURE_PAD,) * 4, mode="reflect")
    return padded.byte().unflatten(0, (2, 10))


def draw_textures() -> torch.Tensor:
    """Twenty textures drawn here: (2, 10, 3, 156, 156) uint8, ten striped (foreground) then ten veined (background).

    Each holds two modes, which a smooth border divides, so that the patches of one class look different. Stripes differ by
    class in direction, width and colours; veins, which follow the zero lines of smooth noise, in density and colours.
    """
    size = TEXTURE_SIZE + 2 * TEXTURE_PAD
    generator = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")

    def noise(cells: int) -> torch.Tensor:                                              # smooth, about N(0, 1)
        grid = torch.randn(1, 1, cells, cells, generator=generator)
        return F.interpolate(grid, size=(size, size), mode="bicubic", align_corners=True)[0, 0]

    def color(hue: float, value: float) -> torch.Tensor:                                # (3, 1, 1) in [0, 1]
        phase = torch.tensor([0.0, 1 / 3, 2 / 3])
        return (value * (0.55 + 0.45 * torch.cos(2 * math.pi * (hue - phase))))[:, None, None]

    textures = torch.empty(2, 10, 3, size, size)
    for label in range(10):
        second = torch.sigmoid(8 * noise(4))                                            # 0 in mode one, 1 in mode two
        for kind in range(2):
            modes = []
            for mode in range(2):
                if kind == 0:
                    angle = math.pi * (label / 10 + mode / 4)
                    width = (5, 8, 12)[(label + mode) % 3]
                    along = x * math.cos(angle) + y * math.sin(angle) + 3 * noise(6)
                    ink = torch.sigmoid(6 * torch.sin(2 * math.pi * along / width))
                else:
                    ink = torch.exp(-(noise(12 + 2 * ((3 * label + mode) % 7)) / 0.18) ** 2)
                hue = (3 * label + 5 * kind) / 10 + 0.08 * mode
                modes.append(ink * color(hue, 0.95) + (1 - ink) * color(hue + 0.3 + 0.2 * mode, 0.45 + 0.1 * (label % 3)))
            textures[kind, label] = (1 - second) * modes[0] + second * modes[1] + 0.03 * noise(size)
    return (255 * textures.clamp(0, 1)).round().byte()


def _patches(textures: torch.Tensor, labels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A random 32x32 patch of `textures[label]` for each label: (N, 3, 32, 32) uint8."""
    windows = textures.unfold(2, SIZE, 1).unfold(3, SIZE, 1)                            # (10, 3, 125, 125, 32, 32), a view
    corner = torch.randint(windows.shape[2], (2, len(labels)), generator=generator)
    return windows[labels, :, corner[0], corner[1]]


# -------------------------------------------------------------------------------------------------------------- variants

def load(name: str, split: str, *, agreement: Union[float, tuple[float, float], None] = None, seed: int = 0,
         textures: Optional[str | os.PathLike] = None, variance: float = COLOR_VARIANCE,
         root: str | os.PathLike = "data/mnist") -> Variant:
    """One split of a variant, a pure function of its arguments (appendix A.2).

    name       colored, double-colored or wildlife
    split      train (MNIST's first 50,000 training digits), val (its last 10,000) or test (the official 10,000)
    agreement  probability that the foreground carries the shape's label, else it is uniform over the other nine; for the
               background the same, drawn separately, or with a probability of its own: (foreground, background). Default:
               1 for train, 0.1 for val and test, where labels are uniform; see also CUE_CONFLICT, MIXED_SAME, MIXED_RAND
    textures   wildlife: folder in DTD's layout with the paper's twenty pictures; None draws textures
    variance   colored and double-colored: of an image's colour around its class colour, on the [0, 1] scale
    Raises ValueError for an unknown name or split, an agreement outside [0, 1] and for files that are not as they should be.
    """
    parts, labels = load_parts(name, split, agreement=agreement, seed=seed, textures=textures, variance=variance, root=root)
    return Variant(compose(*parts), *labels)


def load_parts(name: str, split: str, *, agreement: Union[float, tuple[float, float], None] = None, seed: int = 0,
               textures: Optional[str | os.PathLike] = None, variance: float = COLOR_VARIANCE,
               root: str | os.PathLike = "data/mnist"
               ) -> tuple[Parts, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """What `load` composes its images of, and their labels (shape, foreground, background); same arguments and errors."""
    if name not in NAMES:
        raise ValueError(f"unknown data set {name!r}: choose one of {', '.join(NAMES)}")
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
    if agreement is None:
        agreement = 1.0 if split == "train" else 0.1
    of_fore, of_back = agreement if isinstance(agreement, tuple) else (agreement, agreement)
    if not (0 <= of_fore <= 1 and 0 <= of_back <= 1):
        raise ValueError(f"agreement is a probability in [0, 1], or two, not {agreement}")

    if variance < 0:
        raise ValueError(f"variance {variance}: must be 0 or more")

    digits, shape = (part[SPLITS[split]] for part in read_mnist(split != "test", root))
    mask = F.interpolate(digits[:, None], size=SIZE, mode="nearest")

    generator = torch.Generator().manual_seed(len(SPLITS) * seed + list(SPLITS).index(split))
    foreground = _other_labels(shape, of_fore, generator)
    background = _other_labels(shape, of_back, generator)
    if name == "colored":
        background = torch.full_like(shape, -1)
        fore = _colors(COLORED[foreground], variance, generator)
        back = torch.zeros_like(fore)
    else:
        mask = torch.where(mask > 0.1 * 255, 255, 0).byte()                             # the authors binarise here
        if name == "double-colored":
            fore = _colors(DOUBLE_FOREGROUND[foreground], variance, generator)
            back = _colors(DOUBLE_BACKGROUND[background], variance, generator)
        else:
            striped, veined = draw_textures() if textures is None else read_textures(textures)
            fore, back = _patches(striped, foreground, generator), _patches(veined, background, generator)
    return Parts(mask, fore, back), (shape, foreground, background)


def compose(mask: torch.Tensor, foreground: torch.Tensor, background: torch.Tensor) -> torch.Tensor:
    """The picture that uint8 parts (see `Parts`) make, (N, 3, 32, 32) uint8: equation 2 with the mask as 0..255."""
    if ((mask == 0) | (mask == 255)).all():
        return torch.where(mask > 0, foreground, background)
    return torch.lerp(background.float(), foreground.float(), mask.float() / 255).round_().byte()


def _other_labels(shape: torch.Tensor, agreement: float, generator: torch.Generator) -> torch.Tensor:
    other = (shape + torch.randint(1, 10, shape.shape, generator=generator)) % 10
    return torch.where(torch.rand(shape.shape, generator=generator) < agreement, shape, other)


def _colors(mean: torch.Tensor, variance: float, generator: torch.Generator) -> torch.Tensor:
    """One colour an image, N(mean, variance) on the [0, 1] scale, clipped: (N, 3, 1, 1) uint8."""
    noise = torch.randn(mean.shape, generator=generator)
    return (mean + 255 * variance ** 0.5 * noise).clamp(0, 255).round().byte()[:, :, None, None]


# ---------------------------------------------------------------------------------------------------------------- sheets

def save_sheet(path: str | os.PathLike, images: torch.Tensor, rows: list[str], columns: list[str], scale: int = 2) -> None:
    """Write pictures as one labelled PNG, atomically: `images` (R, C, 3, H, W) uint8, a name a row and a name a column.

    Pictures are enlarged `scale` times without interpolation and keep their values. A column name that repeats its left
    neighbour's is written once. Raises ValueError where the names do not fit, OSError where the file cannot be written.
    """
    count_r, count_c, _, height, width = images.shape
    if (len(rows), len(columns)) != (count_r, count_c):
        raise ValueError(f"{len(rows)} row and {len(columns)} column names for {count_r} x {count_c} pictures")
    gap, font = 2, ImageFont.load_default(12)
    height, width = height * scale + gap, width * scale + gap
    left = 8 + int(max(font.getlength(name) for name in rows))
    sheet = Image.new("RGB", (left + count_c * width, 18 + count_r * height), "white")
    draw = ImageDraw.Draw(sheet)
    for c, name in enumerate(columns):
        if c == 0 or name != columns[c - 1]:
            draw.text((left + c * width, 2), name, "black", font)
    for r, name in enumerate(rows):
        draw.text((4, 18 + r * height + height // 2 - 8), name, "black", font)
        for c in range(count_c):
            picture = Image.fromarray(images[r, c].permute(1, 2, 0).numpy())
            picture = picture.resize((width - gap, height - gap), Image.NEAREST)
            sheet.paste(picture, (left + c * width, 18 + r * height))
    save_png(path, sheet)


def save_png(path: str | os.PathLike, picture: Image.Image) -> None:
    """Write a picture as PNG, atomically. Raises OSError."""
    content = io.BytesIO()
    picture.save(content, format="PNG")
    write_file(path, content.getvalue())


def write_file(path: str | os.PathLike, content: Union[bytes, Callable]) -> None:
    """Write bytes, or what content(file) writes, under a temporary name, then rename: `path` holds the old content or the new,
    never half of it. Raises OSError."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            content(file) if callable(content) else file.write(content)
        partial.replace(path)
    except (OSError, RuntimeError) as error:                # torch.save raises the latter for a full disk
        partial.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise OSError(f"{path} could not be written ({reason}): make room or choose another --out; what was written "
                      "before is intact") from None


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Write one labelled sheet of each MNIST variant.")
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")
    parser.add_argument("--split", choices=SPLITS, default="train", help="train: all labels agree; val, test: each its own")
    parser.add_argument("--textures", help="folder of DTD for wildlife (default: draw textures)")
    parser.add_argument("--mnist", default="data/mnist", help="folder of MNIST's four .gz files (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="sheets", help="folder to write into (default: %(default)s)")
    return parser


def main(argv: Optional[list[str]] = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        Path(args.out).mkdir(parents=True, exist_ok=True)
        for name in NAMES:
            data = load(name, args.split, seed=args.seed, textures=args.textures, root=args.mnist)
            rows = torch.stack([torch.nonzero(data.shape == digit)[:12, 0] for digit in range(10)])
            path = Path(args.out) / f"{name}.png"
            save_sheet(path, data.images[rows], [f"digit {digit}" for digit in range(10)], [name] * 12)
            print(f"wrote {path}: rows are the digits 0 to 9, twelve images of the {args.split} split each")
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
