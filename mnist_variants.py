"""The MNIST variants of Counterfactual Generative Networks (ICLR 2021; section 4, appendix A.2).

Each writes the class label into an image up to three times: as the digit's shape, as its colour or texture
(foreground) and as that behind it (background). In the training split all agree, so that a classifier may
take the easy way; in the others each is drawn on its own.

    colored         grey digit times a class colour, on black      (Kim et al., 2019, variance 0.02)
    double-colored  one class colour for the digit, another for the background
    wildlife        patches of a striped texture for the digit, of a veined one for the background

    python mnist_variants.py --textures path/to/dtd       # a sheet of each; without DTD, textures are drawn

A person's own labelled folder is read here too: `load_folder` needs u2net.py.
"""
import argparse
import csv
import gzip
import hashlib
import json
import math
import os
import re
import sys
import tempfile
import unicodedata
from functools import lru_cache
from pathlib import Path
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision import datasets
from torchvision.transforms import functional as F_image

PathLike = str | os.PathLike
NAMES = ("colored", "double-colored", "wildlife")
SPLITS = {"train": slice(50_000), "val": slice(50_000, 60_000), "test": slice(10_000)}
SIZE = 32           # images are 32x32, digits scaled up from 28x28 by nearest neighbour
ROOT = Path(__file__).parent / "data" / "mnist"

MNIST_FILES = {  # file (without .gz): SHA-256 of the decompressed content
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}

# Kim et al. (2019), supplement: the digit's colours, RGB.
COLORED = torch.tensor([
    (220, 20, 60), (0, 128, 128), (253, 233, 16), (0, 149, 182), (237, 145, 33),
    (145, 30, 188), (70, 240, 240), (250, 197, 187), (210, 245, 60), (128, 0, 0)])
# The authors' code: background colours; the digit's are shifted by six.
DOUBLE_BACKGROUND = torch.tensor([
    (0, 100, 0), (0, 0, 139), (176, 48, 96), (255, 69, 0), (255, 255, 0),
    (222, 184, 135), (0, 255, 0), (0, 255, 255), (255, 0, 255), (100, 149, 237)])
DOUBLE_FOREGROUND = DOUBLE_BACKGROUND.roll(-6, 0)
COLOR_VARIANCE = 0.02  # of one image's colour around its class colour, on the [0, 1] scale

# Agreements of cue conflict (Geirhos et al., 2019) and of Mixed-Same and Mixed-Rand (Xiao et al., 2020).
CUE_CONFLICT, MIXED_SAME, MIXED_RAND = (0.0, 0.1), (1.0, 1.0), (1.0, 0.1)

DTD_FILES = {  # the paper's textures for classes 0..9: images/striped/striped_0001.jpg
    "striped": "0001 0091 0008 0043 0092 0028 0097 0004 0125 0033".split(),  # foreground
    "veined": "0066 0067 0073 0180 0131 0157 0158 0104 0188 0189".split(),  # background
}
TEXTURE_SIZE, TEXTURE_PAD = 150, 3  # the authors scale DTD's pictures, then pad them by reflection


class Parts(NamedTuple):
    """Of images, uint8: `mask` (N, 1, 32, 32) in 0..255, the others (N, 3, 32, 32) or (N, 3, 1, 1)."""
    mask: Tensor
    foreground: Tensor
    background: Tensor


class Variant(NamedTuple):
    """`images` (N, 3, 32, 32) uint8 in 0..255; three labels (N,) long in 0..9, -1 for none."""
    images: Tensor
    shape: Tensor
    foreground: Tensor
    background: Tensor


# ---------- digits

@lru_cache(maxsize=4)  # a table reads the same two files a hundred times
def read_mnist(train: bool, root: PathLike = ROOT) -> tuple[Tensor, Tensor]:
    """MNIST's 60,000 or 10,000 images (N, 28, 28) uint8 and labels (N,) long; all callers share the tensors.

    Reads the files in `root` or torchvision's `root`/MNIST/raw, packed or not; downloads them if absent.
    Raises ValueError for a file that is missing or not MNIST's own.
    """
    root, split = Path(root), "train" if train else "t10k"
    if any((root / "MNIST" / "raw").glob("*ubyte*")):
        root = root / "MNIST" / "raw"
    elif not any(root.glob(f"{split}-images*")):
        _download(root)
    images = _read_idx(root, f"{split}-images-idx3-ubyte")[16:]
    labels = _read_idx(root, f"{split}-labels-idx1-ubyte")[8:]
    return images.reshape(-1, 28, 28), labels.long()


def _download(root: Path) -> None:
    try:
        with tempfile.TemporaryDirectory() as folder:  # a download that fails leaves nothing in `root`
            datasets.MNIST(folder, download=True)
            for path in Path(folder).rglob("*.gz"):
                write_file(root / path.name, path.read_bytes())
    except (RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{root} holds no MNIST, none downloaded ({reason}): name another --mnist") from None


def _read_idx(folder: Path, name: str) -> Tensor:
    path = folder / name if (folder / name).exists() else folder / f"{name}.gz"
    try:
        with (gzip.open if path.suffix else open)(path, "rb") as file:
            content = bytearray(file.read(48_000_000))  # the largest has 47,040,016 bytes
        if hashlib.sha256(content).hexdigest() != MNIST_FILES[name]:
            raise OSError("its content has another SHA-256")
    except (OSError, EOFError, gzip.zlib.error) as error:
        raise ValueError(f"{path} is not MNIST's own ({error}): name another --mnist") from None
    return torch.frombuffer(content, dtype=torch.uint8)


# ---------- textures

def read_textures(folder: PathLike) -> Tensor:
    """The paper's twenty pictures of DTD: (2, 10, 3, 156, 156) uint8. ValueError names what does not open."""
    textures = []
    for name in (f"{kind}/{kind}_{number}.jpg" for kind, numbers in DTD_FILES.items() for number in numbers):
        path = Path(folder, "images", name)
        try:
            with Image.open(path) as picture:
                picture = picture.convert("RGB").resize((TEXTURE_SIZE, TEXTURE_SIZE), Image.NEAREST)
        except Exception as error:  # whatever a broken picture makes its decoder raise
            raise ValueError(f"{path} does not open ({error}): name DTD's folder") from None
        textures.append(F_image.pil_to_tensor(picture))
    return F_image.pad(torch.stack(textures), TEXTURE_PAD, padding_mode="reflect").unflatten(0, (2, 10))


def draw_textures() -> Tensor:
    """Twenty textures drawn here: (2, 10, 3, 156, 156) uint8, ten striped then ten veined.

    Each holds two modes, so that the patches of one class look different. Stripes differ by class in
    direction, width and colours; veins, the zero lines of noise, in density and colours.
    """
    size = TEXTURE_SIZE + 2 * TEXTURE_PAD
    generator = torch.Generator().manual_seed(0)
    x = torch.arange(size)
    y = x[:, None]

    def noise(cells):  # smooth, about N(0, 1)
        grid = torch.randn(1, 1, cells, cells, generator=generator)
        return F.interpolate(grid, size=(size, size), mode="bicubic", align_corners=True)[0, 0]

    def color(hue, value):  # (3, 1, 1) in [0, 1]
        phase = torch.tensor([0.0, 1 / 3, 2 / 3])[:, None, None]
        return value * (0.55 + 0.45 * torch.cos(2 * math.pi * (hue - phase)))

    def stripes(label, mode):
        angle = math.pi * (label / 10 + mode / 4)
        width = (5, 8, 12)[(label + mode) % 3]
        along = x * math.cos(angle) + y * math.sin(angle) + 3 * noise(6)
        return torch.sigmoid(6 * torch.sin(2 * math.pi * along / width))

    def veins(label, mode):
        return torch.exp(-(noise(12 + 2 * ((3 * label + mode) % 7)) / 0.18) ** 2)

    textures = torch.empty(2, 10, 3, size, size)
    for label in range(10):
        second = torch.sigmoid(8 * noise(4))  # of the two modes
        for kind, draw in enumerate((stripes, veins)):
            modes = []
            for mode in range(2):
                ink = draw(label, mode)
                hue = (3 * label + 5 * kind) / 10 + 0.08 * mode
                paper = color(hue + 0.3 + 0.2 * mode, 0.45 + 0.1 * (label % 3))
                modes.append(ink * color(hue, 0.95) + (1 - ink) * paper)
            textures[kind, label] = (1 - second) * modes[0] + second * modes[1] + 0.03 * noise(size)
    return (255 * textures.clamp(0, 1)).round().byte()


def _patches(textures, labels, generator):
    """A random patch of each label's texture: (N, 3, 32, 32) uint8."""
    windows = textures.unfold(2, SIZE, 1).unfold(3, SIZE, 1)  # (10, 3, 125, 125, 32, 32), a view
    top, left = torch.randint(windows.shape[2], (2, len(labels)), generator=generator)
    return windows[labels, :, top, left]


# ---------- variants

def load(name: str, split: str, *, agreement: float | tuple[float, float] | None = None, seed: int = 0,
         textures: PathLike | None = None, variance: float = COLOR_VARIANCE, root: PathLike = ROOT
         ) -> Variant:
    """One split of a variant, a pure function of its arguments (appendix A.2).

    split      train (first 50,000 of MNIST's training file), val (its last 10,000), test (MNIST's own)
    agreement  probability that the foreground carries the shape's label, else one of the other nine; the
               background, drawn separately, the same; or a tuple of two. None: 1 for train, otherwise 0.1,
               which makes labels uniform
    textures   wildlife: folder of DTD (`torchvision.datasets.DTD`); None draws some
    variance   colored, double-colored: of an image's colour around its class colour, on the [0, 1] scale
    Raises ValueError for what is unknown, out of range or not in its file.
    """
    parts, labels = load_parts(name, split, agreement, seed, textures, variance, root)
    return Variant(compose(*parts), *labels)


def load_parts(name, split, agreement=None, seed=0, textures=None, variance=COLOR_VARIANCE, root=ROOT
               ) -> tuple[Parts, tuple[Tensor, Tensor, Tensor]]:
    """What `load` composes its images of, and their three labels. Its arguments and errors."""
    if name not in NAMES or split not in SPLITS:
        raise ValueError(f"no data set {name!r} of split {split!r}: there are {', '.join(NAMES)}, each of "
                         f"{', '.join(SPLITS)}")
    if agreement is None:
        agreement = 1.0 if split == "train" else 0.1
    of_fore, of_back = agreement if isinstance(agreement, (tuple, list)) else [agreement] * 2
    if not (0 <= of_fore <= 1 and 0 <= of_back <= 1):
        raise ValueError(f"agreement {agreement}: must be in [0, 1]")
    if not 0 <= variance < math.inf or not 0 <= seed < 2 ** 62:
        raise ValueError(f"variance {variance} or seed {seed} is below 0 or too large")

    digits, shape = (part[SPLITS[split]].clone() for part in read_mnist(split != "test", root))
    mask = F.interpolate(digits[:, None], size=SIZE, mode="nearest")
    generator = torch.Generator().manual_seed(len(SPLITS) * seed + list(SPLITS).index(split))
    foreground = _other_labels(shape, of_fore, generator)
    background = _other_labels(shape, of_back, generator)
    if name == "colored":
        background = torch.full_like(shape, -1)
        fore = _colors(COLORED[foreground], variance, generator)
        back = torch.zeros_like(fore)
    else:
        mask = 255 * (mask > 0.1 * 255).byte()  # the authors binarise here
        if name == "double-colored":
            fore = _colors(DOUBLE_FOREGROUND[foreground], variance, generator)
            back = _colors(DOUBLE_BACKGROUND[background], variance, generator)
        else:
            striped, veined = draw_textures() if textures is None else read_textures(textures)
            fore, back = _patches(striped, foreground, generator), _patches(veined, background, generator)
    return Parts(mask, fore, back), (shape, foreground, background)


def compose(mask: Tensor, foreground: Tensor, background: Tensor) -> Tensor:
    """Equation 2 of uint8 `Parts`, the mask as 0..255: (N, 3, 32, 32) uint8."""
    if ((mask == 0) | (mask == 255)).all():  # the same, in a quarter of the memory
        return torch.where(mask > 0, foreground, background)
    return torch.lerp(background.float(), foreground.float(), mask.float() / 255).round_().byte()


def _other_labels(shape, agreement, generator):
    other = (shape + torch.randint(1, 10, shape.shape, generator=generator)) % 10
    return torch.where(torch.rand(shape.shape, generator=generator) < agreement, shape, other)


def _colors(mean, variance, generator):
    """One colour an image, N(mean, variance) on the [0, 1] scale, clipped: (N, 3, 1, 1) uint8."""
    noise = torch.randn(mean.shape, generator=generator)
    return (mean + 255 * variance ** 0.5 * noise).clamp(0, 255).round().byte()[:, :, None, None]


# ---------- own folders

def class_folders(folder: PathLike) -> list[str]:
    """The sorted names of subfolders, as numbers where all are; no hidden ones. ValueError for none."""
    names = [path.name for path in Path(folder).glob("[!.]*") if path.is_dir()]
    if not names:
        raise ValueError(f"{folder} has no subfolders, one a class")
    return sorted(sorted(names), key=int if all(name.isdecimal() for name in names) else str)


def picture_files(folder: PathLike) -> list[Path]:
    """The pictures below a folder, sorted; none that is hidden, no 00000000-mask.png."""
    return [path for path in sorted(Path(folder).rglob("*"))
            if path.suffix.lower() in datasets.folder.IMG_EXTENSIONS
            and not any(part.startswith(".") for part in path.relative_to(folder).parts)
            and not re.fullmatch(r"\d{8}-(mask|foreground|background)\.png", path.name)]


def labelled_files(folder: PathLike) -> list[tuple[str, tuple[int, ...]]]:
    """Pictures and labels: three each (shape, texture, background) by labels.csv, else one each by subfolder.

    Raises ValueError for no picture, a path that leaves the folder and a label that is no number.
    """
    table = Path(folder, "labels.csv")
    if not table.exists():
        return _in_subfolders(folder)
    try:
        with open(table, newline="", encoding="utf-8-sig") as file:
            rows = [(row["file"], tuple(int(row[name]) for name in ("shape", "texture", "background")))
                    for row in csv.DictReader(file, restval="")]
    except (KeyError, csv.Error, ValueError) as error:
        raise ValueError(f"{table} lacks file, shape, texture, background or a number ({error})") from None
    if not rows:
        raise ValueError(f"{table} has no row")
    for file, _ in rows:
        if Path(file).name != file or file in ("", ".."):
            raise ValueError(f"{table} names {file!r}, which is not in its folder")
    return [(str(Path(folder, file)), labels) for file, labels in rows]


def _in_subfolders(folder):
    found = []
    for label, name in enumerate(class_folders(folder)):
        files = picture_files(Path(folder, name))
        if not files:
            raise ValueError(f"{Path(folder, name)} holds no picture")
        found += [(str(path), (label,)) for path in files]
    return found


def class_names(folder: PathLike) -> list[str] | None:
    """A folder's subfolders; beside a labels.csv the "names" of settings.json, or None."""
    if not Path(folder, "labels.csv").exists():
        return class_folders(folder)
    path = Path(folder, "settings.json")
    try:
        names = json.loads(path.read_text(encoding="utf-8")).get("names") if path.exists() else None
        return names and [*map(str, names)]
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is not what cgn.py wrote ({error})") from None


def check_labels(folder: PathLike, names: list[str], files: list[tuple[str, tuple[int, ...]]]) -> None:
    """Raises ValueError for files of counterfactuals, (path, labels), of other classes than `names`."""
    check_names(folder, class_names(folder) or names, names)
    if any(len(labels) != 3 or not 0 <= min(labels) <= max(labels) < len(names) for _, labels in files):
        raise ValueError(f"{folder} needs a labels.csv, of labels in 0..{len(names) - 1}")


def check_names(source: PathLike, drawn: list[str], names: list[str]) -> None:
    """Raises ValueError for counterfactuals `drawn` of other classes than `names`. Only their number counts
    where names are WordNet's, as those of ImageNet's folders, or where the drawn classes have none."""
    ordered = re.fullmatch(r"n\d{8}", names[0]) or drawn[0] == "class 0"
    if len(drawn) != len(names) or drawn != names and not ordered:
        raise ValueError(f"{source} was drawn of {', '.join(drawn)[:60]}, not of {', '.join(names)[:60]}")


def load_folder(folder: PathLike, size: int = SIZE) -> tuple[Tensor, Tensor, list[str]]:
    """Images (N, 3, R, R) uint8, labels (N,) long and class names of a folder with one subfolder a class.

    The shorter side is scaled to `size` pixels R and the middle cut out. Raises ValueError.
    """
    import u2net
    images, labels = [], []
    for path, (label,) in _in_subfolders(folder):
        picture = F_image.resize(u2net.open_photo(path, smallest=1), size)
        images.append(F_image.pil_to_tensor(F_image.center_crop(picture, size)))
        labels.append(label)
    return torch.stack(images), torch.tensor(labels), class_folders(folder)


# ---------- sheets

def save_sheet(path: PathLike, images: Tensor, rows: list[str], columns: list[str], scale: int = 2) -> None:
    """Write pictures as one labelled PNG: `images` (R, C, 3, H, W) uint8, a name a row and a name a column.

    Pictures are enlarged, their values kept. A column name like its left neighbour's is written once.
    Raises ValueError where names do not fit, and what `save_png` raises.
    """
    if (len(rows), len(columns)) != images.shape[:2]:
        raise ValueError(f"{len(rows)} row and {len(columns)} column names for {tuple(images.shape)}")
    gap, font = 2, ImageFont.load_default(12)
    rows, columns = list(map(_plain, rows)), list(map(_plain, columns))
    height, width = (side * scale + gap for side in images.shape[3:])
    left = 8 + int(max(map(font.getlength, rows)))
    sheet = Image.new("RGB", (left + len(columns) * width, 18 + len(rows) * height), "white")
    draw = ImageDraw.Draw(sheet)
    for c, name in enumerate(columns):
        if c == 0 or name != columns[c - 1]:
            draw.text((left + c * width, 2), name, "black", font)
    for r, name in enumerate(rows):
        draw.text((4, 18 + r * height + height // 2 - 8), name, "black", font)
        for c, picture in enumerate(images[r]):
            picture = F_image.to_pil_image(picture).resize((width - gap, height - gap), Image.NEAREST)
            sheet.paste(picture, (left + c * width, 18 + r * height))
    save_png(path, sheet)


def _plain(text):
    """What the font has: 'é' as 'e', '→' as '->', what is not like ASCII as '?'."""
    signs = unicodedata.normalize("NFKD", text.replace("→", "->"))
    signs = "".join(s for s in signs if not unicodedata.combining(s))
    return signs.encode("ascii", "replace").decode()


def save_png(path: PathLike, picture: Image.Image) -> None:
    """Write a picture as `write_file` does. ValueError where `path` does not end in .png."""
    if Path(path).suffix.lower() != ".png":
        raise ValueError(f"{path} does not end in .png")
    write_file(path, lambda file: picture.save(file, format="PNG"))


def write_file(path: PathLike, content: bytes | Callable) -> None:
    """Write bytes, or what content(file) writes: `path` holds the old content or the new, never half of it.

    Several processes may write it. Raises OSError, also for a folder or a device.
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}.{os.urandom(4).hex()}.partial")
    try:
        if path.exists() and not path.is_file():
            raise OSError("it is no regular file")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(partial, "wb") as file:
                content(file) if callable(content) else file.write(content)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:  # torch.save raises the latter for a full disk
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise OSError(f"{path} could not be written ({reason}): what was there is intact") from None


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Write a sheet of each MNIST variant.")
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")
    add = parser.add_argument
    add("--split", choices=SPLITS, default="train")
    add("--textures", help="DTD's folder (default: textures are drawn)")
    add("--mnist", default=ROOT, help="MNIST's folder (default: %(default)s)")
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=ROOT.parents[1] / "sheets", help="default: %(default)s")
    return parser


def main(argv: list[str] | None = None) -> None:
    if hasattr(sys.stdout, "reconfigure"):  # a console that lacks a sign
        sys.stdout.reconfigure(errors="replace")
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        for name in NAMES:
            data = load(name, args.split, seed=args.seed, textures=args.textures, root=args.mnist)
            rows = torch.stack([torch.nonzero(data.shape == digit)[:12, 0] for digit in range(10)])
            path = args.out / f"{name}.png"
            save_sheet(path, data.images[rows], [f"digit {digit}" for digit in range(10)], [name] * 12)
            print(f"wrote {path}")
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        parser.exit(130, "stopped\n")


if __name__ == "__main__":
    main()
