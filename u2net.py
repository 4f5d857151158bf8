"""U-2-Net (Qin et al., Pattern Recognition 2020): what stands out in a picture, as a mask.

Made from a raw state dict, as the authors released them (xuebinqin/U-2-Net), or one of other widths.
Submodules are named as its keys. `open_photo` reads a person's pictures.

    python u2net.py photo.jpg --out mask.png --cutout object.png
"""
import argparse
import contextlib
import hashlib
import sys
import tempfile
import urllib.request
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.transforms import functional as F_image

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)    # of ImageNet's pixels in [0, 1]
SIDE = 320  # of what the network sees of a photo (upstream's test script)
SMALLEST, LARGEST = 16, 64_000_000  # pixels: shorter side, area

STAGES = "stage1 stage2 stage3 stage4 stage5 stage6 stage5d stage4d stage3d stage2d stage1d".split()
DEPTHS = (7, 6, 5, 4, 4, 4, 4, 4, 5, 6, 7)  # levels of the small U in each stage
DILATED = ("stage5", "stage6", "stage5d")   # widen their view by dilation, not pooling
FULL = ((3, 32, 64), (64, 32, 128), (128, 64, 256), (256, 128, 512), (512, 256, 512), (512, 256, 512),
        (1024, 256, 512), (1024, 128, 256), (512, 64, 128), (256, 32, 64), (128, 16, 64))
LITE = ((3, 16, 64),) + ((64, 16, 64),) * 5 + ((128, 16, 64),) * 5


# ---------- modules

class ConvBlock(nn.Module):
    """3 x 3 convolution, batch norm, ReLU: (N, i, H, W) -> (N, o, H, W)."""

    def __init__(self, i, o, dilation=1):
        super().__init__()
        self.conv_s1 = nn.Conv2d(i, o, 3, padding=dilation, dilation=dilation)
        self.bn_s1 = nn.BatchNorm2d(o)

    def forward(self, x):
        return F.relu(self.bn_s1(self.conv_s1(x)), inplace=True)


class Stage(nn.Module):
    """RSU (figure 3): a small U-Net of `depth` levels in a residual connection, (N, i, H, W) -> (N, o, H, W).
    Each level halves the size; `dilated` (RSU-4F) moves the kernel's taps apart instead."""

    def __init__(self, i, mid, o, depth, dilated, align_corners):
        super().__init__()
        self.depth, self.dilated, self.align_corners = depth, dilated, align_corners

        def dilation(level):
            return 2 ** (level - 1) if dilated else 1 + (level == depth)    # the deepest level never pools

        self.rebnconvin = ConvBlock(i, o)
        for level in range(1, depth + 1):
            setattr(self, f"rebnconv{level}", ConvBlock(o if level == 1 else mid, mid, dilation(level)))
        for level in range(depth - 1, 0, -1):
            setattr(self, f"rebnconv{level}d", ConvBlock(2 * mid, o if level == 1 else mid, dilation(level)))

    def forward(self, x):
        x = self.rebnconvin(x)  # (N, o, H, W)
        h, skips = x, []
        for level in range(1, self.depth + 1):
            if 1 < level < self.depth and not self.dilated:
                h = F.max_pool2d(h, 2, ceil_mode=True)
            h = getattr(self, f"rebnconv{level}")(h)  # (N, mid, H / 2^(level - 1), ..)
            skips.append(h)
        skips.pop()
        for level in range(self.depth - 1, 0, -1):
            h = resize(h, skips[-1], self.align_corners)
            h = getattr(self, f"rebnconv{level}d")(torch.cat([h, skips.pop()], dim=1))
        return h + x


def resize(h, like, align_corners):
    """h (N, C, ..) at the height and width of `like`, bilinear."""
    if h.shape[2:] == like.shape[2:]:
        return h
    with torch.autocast(h.device.type, enabled=False):      # autocast would leave h's precision
        return F.interpolate(h, like.shape[2:], mode="bilinear", align_corners=align_corners)


class U2Net(nn.Module):
    """A U-Net whose every stage is a small U-Net. `stages`: channels (in, inside, out) of the eleven;
    align_corners: of the upsampling, False as weights were trained, True as the CGN's authors run them."""

    def __init__(self, stages=LITE, align_corners: bool = False):
        super().__init__()
        self.align_corners = align_corners
        for name, (i, mid, o), depth in zip(STAGES, stages, DEPTHS):
            setattr(self, name, Stage(i, mid, o, depth, name in DILATED, align_corners))
        for number in range(1, 7):
            setattr(self, f"side{number}", nn.Conv2d(stages[-number][2], 1, 3, padding=1))
        self.outconv = nn.Conv2d(6, 1, 1)

    def forward(self, x: Tensor, maps: bool = False) -> Tensor | tuple:
        """x (N, 3, H, W), ImageNet-normalised (see `normalise`) -> saliency (N, 1, H, W) in [0, 1]; maps: all
        seven, fused, then from fine to coarse. Raises ValueError for another shape or sides under 16."""
        logits = self.logits(x)
        return tuple(torch.sigmoid(logit) for logit in logits) if maps else torch.sigmoid(logits[0])

    def logits(self, x: Tensor) -> list[Tensor]:
        """The seven maps (N, 1, H, W) before the sigmoid."""
        if x.ndim != 4 or x.shape[1] != 3 or min(x.shape[2:]) < SMALLEST:
            raise ValueError(f"input of shape {tuple(x.shape)}: expected (N, 3, H, W), H and W >= {SMALLEST}")
        h, down = x, []
        for number in range(1, 7):
            h = F.max_pool2d(h, 2, ceil_mode=True) if down else h
            h = getattr(self, f"stage{number}")(h)  # (N, .., H / 2^(number - 1), ..)
            down.append(h)
        up = [down.pop()]
        for number in range(5, 0, -1):
            h = resize(h, down[-1], self.align_corners)
            h = getattr(self, f"stage{number}d")(torch.cat([h, down.pop()], dim=1))
            up.append(h)
        sides = [resize(getattr(self, f"side{number}")(h), x, self.align_corners)
                 for number, h in enumerate(up[::-1], 1)]
        with torch.autocast(x.device.type, enabled=False):      # bfloat16 would make masks of 0 and 1
            return [self.outconv(torch.cat(sides, dim=1).to(self.outconv.weight.dtype)), *sides]

    def freeze(self) -> "U2Net":
        """Fold the batch norms into convolutions, in place; eval mode, no gradients for weights."""
        self.eval()
        for module in self.modules():
            if isinstance(getattr(module, "bn_s1", None), nn.BatchNorm2d):
                module.conv_s1 = fuse_conv_bn_eval(module.conv_s1, module.bn_s1)
                module.bn_s1 = nn.Identity()
        return self.requires_grad_(False)


def normalise(x: Tensor) -> Tensor:
    """x (N, 3, H, W) in [0, 1] -> what networks for ImageNet were trained on."""
    return F_image.normalize(x, MEAN, STD)


# ---------- loading

def load(source: str | Path | dict, *, align_corners: bool = False, frozen: bool = True) -> U2Net:
    """A U2Net in eval mode from a raw state dict or the path of one; frozen: batch norms folded, no gradients
    for weights. Raises ValueError that names, in one line, what is missing, unexpected, misshapen or not
    finite."""
    state, name = read_state(source), "the state dict" if isinstance(source, dict) else source
    for key, value in state.items():
        stored = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta and (
            0 < value.nbytes <= value.untyped_storage().nbytes())
        count = key.endswith("num_batches_tracked")
        if not stored or not count and not value.is_floating_point():
            raise ValueError(f"{name}: {key} is no dense tensor of floating-point numbers, all stored")
        state[key] = value = value.detach().to(torch.long if count else torch.float, copy=True)
        low, high = value.aminmax()
        if not -torch.inf < low <= high < torch.inf or key.endswith("running_var") and low < 0:
            raise ValueError(f"{name}: {key} is not finite, or holds negative variances")
    with torch.device("meta"):
        model = U2Net(_stages(state, name), align_corners).eval()
    try:
        model.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{name} does not fit: {' '.join(str(error).split())}") from None
    return model.freeze() if frozen else model


def read_state(source: str | Path | dict) -> dict:
    """A new raw state dict from one or from a file, of which nothing is run, without {"state_dict": ..}
    around it or DataParallel's `module.` before its keys. Raises ValueError if there is none."""
    try:
        state = source
        if not isinstance(source, dict):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                state = torch.load(source, map_location="cpu", weights_only=True)
        state = state.get("state_dict", state)
        return {str(key).removeprefix("module."): value for key, value in state.items()}
    except Exception as error:  # whatever a hostile or broken file makes the reader raise
        reason = getattr(error, "strerror", None) or "it is damaged, or holds what could run code"
        raise ValueError(f"{source} is no state dict of tensors: {reason}") from None


def _stages(state, name):
    shapes = {key: value.shape for key, value in state.items() if value.ndim == 4}
    try:
        outer = [shapes[f"{stage}.rebnconvin.conv_s1.weight"] for stage in STAGES]
        inner = [shapes[f"{stage}.rebnconv1.conv_s1.weight"] for stage in STAGES]
    except KeyError as error:
        raise ValueError(f"{name} is no U-2-Net: it lacks {error} of four dimensions") from None
    return [(i, mid, o) for (o, i, *_), (mid, *_) in zip(outer, inner)]


def find_weights(path: str | Path) -> Path:
    """The path of weights, for a bare name in weights/; fetched where absent and listed in weights.txt beside
    this file. Raises ValueError for what is not to be had or has another SHA-256."""
    path, table = Path(path), Path(__file__).with_name("weights.txt")
    if path.parent == Path(".") and not path.exists():
        path = table.parent / "weights" / path.name
    lines = table.read_text().splitlines() if table.exists() else ()
    listed = {row[0]: row for row in (line.split(" | ") for line in lines) if len(row) == 6}
    _, size, sha256, _, address, _ = listed.get(path.name, [""] * 6)
    remedy = f"put the {size} bytes of {address} there" if "://" in address else "name another file"
    try:
        if not path.exists() and "://" in address:
            print(f"fetching {path} ({size} bytes) from {address}", flush=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            with urllib.request.urlopen(address) as answer:
                length = int(answer.headers["Content-Length"] or 0)
            torch.hub.download_url_to_file(address, str(path), sha256, progress=sys.stderr.isatty())
            if path.stat().st_size < length:    # torch takes a broken connection for the end
                path.unlink()
                raise OSError("the connection broke off")
        found = hashlib.sha256(np.memmap(path, mode="r")).hexdigest()
    except Exception as error:  # whatever a network, a downloader or a disk raises
        raise ValueError(f"{path} is missing or cannot be read ({error}): {remedy}") from None
    if not sha256:
        print(f"{path.name} has SHA-256 {found}, weights.txt lists none")
    elif not found.startswith(sha256):
        raise ValueError(f"{path} has SHA-256 {found}, weights.txt lists {sha256}: remove one of them")
    return path


# ---------- photos to masks

def open_photo(path: str | Path, smallest: int = SMALLEST) -> Image.Image:
    """A picture as it is meant to be seen, RGB: turned as EXIF says, 16 bits scaled, white where transparent.
    Raises ValueError where it is none, has over 64 million pixels or a side below `smallest`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as photo:
                (width, height), deep = photo.size, photo.format in ("PNG", "PPM") and photo.mode == "I"
                if min(width, height) < smallest or width * height > LARGEST:
                    raise ValueError(f"{width} x {height} pixels: {smallest} a side to {LARGEST} in all fit")
                photo.load()    # a picture that is cut off is refused here
                with contextlib.suppress(Exception):    # broken EXIF: it stays as it lies
                    photo = ImageOps.exif_transpose(photo)
            if deep or photo.mode.startswith("I;16"):   # convert() would cut 16 bits off at 255
                deep, clear = np.asarray(photo), photo.info.get("transparency", -1)
                grey, alpha = (deep // 257).astype(np.uint8), 255 * (deep != clear).astype(np.uint8)
                photo = Image.merge("LA", [Image.fromarray(band) for band in (grey, alpha)])
            if photo.mode in ("I", "F"):
                raise ValueError(f"pixels of mode {photo.mode}, whose range is not known: save 8 or 16 bits")
            if photo.has_transparency_data:     # hidden pixels have no colour
                photo = photo.convert("RGBA")
                photo = Image.alpha_composite(Image.new("RGBA", photo.size, "white"), photo)
            return photo.convert("RGB")
    except Exception as error:  # whatever a broken picture makes its decoder raise
        raise ValueError(f"{path} does not open as a picture: {' '.join(str(error).split())}") from None


@torch.no_grad()
def saliency(model: U2Net, photo: Image.Image, side: int = SIDE) -> Image.Image:
    """The mask of an RGB photo, grey, at its size. The network sees it at side x side, divided by its maximum
    as in U-2-Net's training: a dark photo has the mask of a bright one."""
    x = F_image.to_tensor(photo.resize((side, side), Image.BILINEAR, reducing_gap=3))
    x = normalise(x[None] / x.max().clamp(min=1 / 255))         # a black one stays black
    mask = model(x.to(model.outconv.weight))[0].cpu()           # (1, side, side) in [0, 1]
    return F_image.to_pil_image(mask.mul(255).round().byte()).resize(photo.size, Image.BILINEAR)


# ---------- command line

def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="The mask of what stands out in a photo.")
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {' '.join(message.split())}\n")
    add = parser.add_argument
    add("photo", help="a picture of up to 64 megapixels")
    add("--out", help="PNG to write, the mask (default without --cutout: mask.png beside this file)")
    add("--cutout", help="PNG to write, the photo, transparent where the mask is 0")
    add("--weights", default=Path(__file__).parent / "weights" / "u2netp.pth", help="raw state dict "
        "(default: u2netp.pth; u2net.pth is fetched)")
    add("--align-corners", action="store_true", help="as the CGN's authors upsample")
    add("--device", default="auto", help="cuda, mps or cpu (default: the first here)")
    return parser


def run(args: argparse.Namespace) -> None:
    gpu = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
    device = gpu if args.device == "auto" else args.device
    if device not in (gpu, "cpu"):
        raise ValueError(f"--device {device} is not here: choose {' or '.join(sorted({gpu, 'cpu'}))}")
    photo, here = open_photo(args.photo), Path(__file__).parent
    known = [Path(path).resolve() for path in (args.photo, args.weights, here / "weights" / args.weights)]
    if not args.out and not args.cutout:
        args.out = here / "mask.png"
    outs = [Path(out).resolve() if out else None for out in (args.out, args.cutout)]
    for path in filter(None, outs):
        if path.suffix.lower() != ".png" or path in known or path.exists() and not path.is_file():
            raise ValueError(f"{path}: choose a PNG to write, no folder or device, and no file named twice")
        path.parent.mkdir(parents=True, exist_ok=True)
        known.append(path)
    model = load(find_weights(args.weights), align_corners=args.align_corners).to(device)
    mask = saliency(model, photo)
    photo.putalpha(mask)
    for path, picture in zip(outs, (mask, photo)):
        if path:
            with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                part = Path(folder) / path.name
                picture.save(part, format="PNG")
                part.replace(path)
            print(f"wrote {path}, computed on {device}")


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        run(args)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except torch.OutOfMemoryError:
        parser.error("the GPU's memory is full: give --device cpu")
    except KeyboardInterrupt:
        parser.exit(130, "stopped\n")


if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):  # a console that lacks a sign; a notebook's has no such method
        sys.stdout.reconfigure(errors="replace")
    main()
