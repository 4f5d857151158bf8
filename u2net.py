"""U-2-Net (Qin et al., Pattern Recognition 2020): what stands out in an image, as a mask. The full and the lite network.

One file that turns a raw state dict, as released by the authors (xuebinqin/U-2-Net), into a working network; widths are read
from the dict. Counterfactual Generative Networks (Sauer & Geiger, ICLR 2021) use it for masks and for empty backgrounds.

    python u2net.py photo.jpg --out mask.png --cutout object.png        # the lite network, whose weights are in weights/

Submodules have the names of the released keys. Needs torch, torchvision and Pillow, and nothing else of this project.
"""
import argparse
import hashlib
import os
import pickle
import tempfile
import warnings
from pathlib import Path
from typing import Optional, Sequence, Union

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.datasets.utils import download_file_from_google_drive
from torchvision.transforms import functional as F_image

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)    # of ImageNet's pixels in [0, 1]: what the network was trained on
SIDE = 320                                                  # a photo is scaled to 320 x 320 (upstream's test script)
FLOATS = (torch.half, torch.bfloat16, torch.float, torch.double)
SMALLEST, LARGEST = 16, 64_000_000                          # pixels: shorter side, area

STAGES = ("stage1", "stage2", "stage3", "stage4", "stage5", "stage6", "stage5d", "stage4d", "stage3d", "stage2d", "stage1d")
DEPTHS = (7, 6, 5, 4, 4, 4, 4, 4, 5, 6, 7)                  # levels of the small U in each stage
DILATED = ("stage5", "stage6", "stage5d")                   # these widen their view by dilation instead of pooling
FULL = ((3, 32, 64), (64, 32, 128), (128, 64, 256), (256, 128, 512), (512, 256, 512), (512, 256, 512),
        (1024, 256, 512), (1024, 128, 256), (512, 64, 128), (256, 32, 64), (128, 16, 64))
LITE = ((3, 16, 64),) + ((64, 16, 64),) * 5 + ((128, 16, 64),) * 5


class ConvBlock(nn.Module):
    """3 x 3 convolution, batch norm, ReLU: (N, i, H, W) -> (N, o, H, W)."""

    def __init__(self, i: int, o: int, dilation: int = 1):
        super().__init__()
        self.conv_s1 = nn.Conv2d(i, o, 3, padding=dilation, dilation=dilation)
        self.bn_s1 = nn.BatchNorm2d(o)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn_s1(self.conv_s1(x)), inplace=True)


class Stage(nn.Module):
    """RSU (figure 3): a small U-Net of `depth` levels inside a residual connection, (N, i, H, W) -> (N, o, H, W).

    Each level halves the size; with `dilated` (RSU-4F) sizes stay, and the distance between the kernel's taps doubles.
    """

    def __init__(self, i: int, mid: int, o: int, depth: int, dilated: bool, align_corners: bool):
        super().__init__()
        self.depth, self.dilated, self.align_corners = depth, dilated, align_corners

        def dilation(level: int) -> int:
            return 2 ** (level - 1) if dilated else 1 + (level == depth)            # the deepest level never pools

        self.rebnconvin = ConvBlock(i, o)
        for level in range(1, depth + 1):
            setattr(self, f"rebnconv{level}", ConvBlock(o if level == 1 else mid, mid, dilation(level)))
        for level in range(depth - 1, 0, -1):
            setattr(self, f"rebnconv{level}d", ConvBlock(2 * mid, o if level == 1 else mid, dilation(level)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.rebnconvin(x)                                                      # (N, o, H, W)
        h, skips = x, []
        for level in range(1, self.depth + 1):
            if 1 < level < self.depth and not self.dilated:
                h = F.max_pool2d(h, 2, ceil_mode=True)
            h = getattr(self, f"rebnconv{level}")(h)                                # (N, mid, H / 2^(level - 1), ..)
            skips.append(h)
        skips.pop()
        for level in range(self.depth - 1, 0, -1):
            h = resize(h, skips[-1], self.align_corners)
            h = getattr(self, f"rebnconv{level}d")(torch.cat([h, skips.pop()], dim=1))
        return h + x


def resize(h: torch.Tensor, like: torch.Tensor, align_corners: bool) -> torch.Tensor:
    """h (N, C, ..) at the height and width of `like`, bilinear."""
    if h.shape[2:] == like.shape[2:]:
        return h
    return F.interpolate(h, like.shape[2:], mode="bilinear", align_corners=align_corners)


class U2Net(nn.Module):
    """A U-Net whose every stage is a small U-Net. `stages`: channels (in, inside, out) of the eleven, FULL, LITE or others.

    align_corners: of the upsampling; False is how the released weights were trained, True how the CGN's authors run them.
    """

    def __init__(self, stages: Sequence[tuple[int, int, int]] = LITE, align_corners: bool = False):
        super().__init__()
        self.align_corners = align_corners
        for name, (i, mid, o), depth in zip(STAGES, stages, DEPTHS):
            setattr(self, name, Stage(i, mid, o, depth, name in DILATED, align_corners))
        for number, stage in enumerate((10, 9, 8, 7, 6, 5), 1):
            setattr(self, f"side{number}", nn.Conv2d(stages[stage][2], 1, 3, padding=1))
        self.outconv = nn.Conv2d(6, 1, 1)

    def forward(self, x: torch.Tensor, maps: bool = False) -> Union[torch.Tensor, tuple[torch.Tensor, ...]]:
        """x (N, 3, H, W), ImageNet-normalised (see `normalise`) -> saliency (N, 1, H, W) in [0, 1].

        maps: all seven, the fused one first, then the side outputs from fine to coarse. Raises ValueError for an x of
        another shape or with a side under 16 pixels.
        """
        logits = self.logits(x)
        return tuple(torch.sigmoid(logit) for logit in logits) if maps else torch.sigmoid(logits[0])

    def logits(self, x: torch.Tensor) -> list[torch.Tensor]:
        """The seven maps (N, 1, H, W) before the sigmoid."""
        if x.ndim != 4 or x.shape[1] != 3 or min(x.shape[2:]) < SMALLEST:
            raise ValueError(f"input of shape {tuple(x.shape)}: expected (N, 3, H, W) with H and W of at least {SMALLEST}")
        h, down = x, []
        for number in range(1, 7):
            if number > 1:
                h = F.max_pool2d(h, 2, ceil_mode=True)
            h = getattr(self, f"stage{number}")(h)                                  # (N, .., H / 2^(number - 1), ..)
            down.append(h)
        up = [down.pop()]
        for number in range(5, 0, -1):
            h = resize(h, down[-1], self.align_corners)
            h = getattr(self, f"stage{number}d")(torch.cat([h, down.pop()], dim=1))
            up.append(h)
        sides = [resize(getattr(self, f"side{number}")(h), x, self.align_corners) for number, h in enumerate(up[::-1], 1)]
        return [self.outconv(torch.cat(sides, dim=1)), *sides]

    def freeze(self) -> "U2Net":
        """Fold the batch norms into the convolutions, in place; eval mode, no gradients for weights."""
        self.eval()
        for module in self.modules():
            if isinstance(module, ConvBlock) and isinstance(module.bn_s1, nn.BatchNorm2d):
                module.conv_s1, module.bn_s1 = fuse_conv_bn_eval(module.conv_s1, module.bn_s1), nn.Identity()
        return self.requires_grad_(False)


def normalise(x: torch.Tensor) -> torch.Tensor:
    """x (N, 3, H, W) in [0, 1] -> what the network was trained on."""
    return F_image.normalize(x, MEAN, STD)


# ----------------------------------------------------------------------------------------------------------------- loading

def load(source: Union[str, os.PathLike, dict], *, align_corners: bool = False, frozen: bool = True) -> U2Net:
    """A U2Net in eval mode, full, lite or of other widths, from a raw state dict or the path of one.

    frozen: batch norms folded into the convolutions, no gradients for weights; else ready to be trained further. Nothing in a
    file can run code. Raises ValueError that names what is missing, unexpected, misshapen or not finite.
    """
    state = dict(source) if isinstance(source, dict) else _read(source)
    name = "the state dict" if isinstance(source, dict) else source
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.is_meta:
            raise ValueError(f"{name}: {key} is no dense tensor with a name")
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            raise ValueError(f"{name}: {key} claims more numbers than are stored")
    with torch.device("meta"):
        model = U2Net(_stages(state, name), align_corners)
    expected = model.state_dict()
    wrong = [f"lacks {key}" for key in expected.keys() - state.keys()]
    wrong += [f"has too much: {key}" for key in state.keys() - expected.keys()]
    wrong += [f"{key} has shape {tuple(state[key].shape)}, expected {tuple(value.shape)}" for key, value in expected.items()
              if key in state and state[key].shape != value.shape]
    if wrong:
        raise ValueError(f"{name} does not fit: {'; '.join(sorted(wrong))}")
    for key, value in state.items():
        if value.dtype not in FLOATS and not (value.dtype == torch.long and key.endswith("num_batches_tracked")):
            raise ValueError(f"{name}: {key} holds {value.dtype}, not floating-point numbers")
        if not torch.isfinite(value.float()).all() or key.endswith("running_var") and value.min() < 0:
            raise ValueError(f"{name}: {key} holds values that are not finite numbers, or negative variances")
    model = model.to_empty(device="cpu")
    model.load_state_dict(state)
    model.eval()
    return model.freeze() if frozen else model


def _read(path: Union[str, os.PathLike]) -> dict:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if isinstance(state, dict):
            return dict(state)
        reason = "it holds something else"
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist") from None
    except pickle.UnpicklingError:
        reason = "it is damaged, or holds more than tensors and could run code"
    except Exception as error:              # whatever a hostile or broken file makes the reader raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
    raise ValueError(f"{path} is no state dict of tensors ({reason})")


def _stages(state: dict, name: object) -> list[tuple[int, int, int]]:
    """The channels of the eleven stages that fit the shapes of a raw dict."""
    stages = []
    for stage in STAGES:
        shapes = [getattr(state.get(f"{stage}.{part}.conv_s1.weight"), "shape", ()) for part in ("rebnconvin", "rebnconv1")]
        if any(len(shape) != 4 or 0 in shape for shape in shapes):
            raise ValueError(f"{name} is no U-2-Net: it lacks {stage}.rebnconvin or .rebnconv1, or their shapes are others")
        stages.append((shapes[0][1], shapes[1][0], shapes[0][0]))
    return stages


# ------------------------------------------------------------------------------------------------------ photos to masks

def open_photo(path: Union[str, os.PathLike], smallest: int = SMALLEST) -> Image.Image:
    """A photo as it is meant to be seen, RGB. Raises ValueError where it is none, or too large or a side below `smallest`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)         # the size is checked here
            photo = Image.open(path)
        with photo:
            width, height = photo.size
            if min(width, height) < smallest or width * height > LARGEST:
                raise ValueError(f"{path} has {width} x {height} pixels: at least {smallest} a side and at most "
                                 f"{LARGEST // 10 ** 6} million in all are possible; scale it first")
            photo = ImageOps.exif_transpose(photo)
        if photo.mode.startswith("I;16"):                           # convert() would cut 16 bits off at 255
            photo = Image.fromarray((np.asarray(photo) // 257).astype(np.uint8))
        if photo.mode in ("I", "F"):
            raise ValueError(f"{path} has pixels of mode {photo.mode}, whose range is not known: save it with 8 or 16 bits")
        if photo.has_transparency_data:                             # hidden pixels have no colour
            photo = photo.convert("RGBA")
            photo = Image.alpha_composite(Image.new("RGBA", photo.size, "white"), photo)
        return photo.convert("RGB")
    except ValueError as error:
        raise error if str(path) in str(error) else ValueError(f"{path} does not open as a picture ({error})") from None
    except Exception as error:              # whatever a broken picture makes its decoder raise
        raise ValueError(f"{path} does not open as a picture ({error})") from None


@torch.no_grad()
def saliency(model: U2Net, photo: Image.Image) -> Image.Image:
    """The mask of an RGB photo, grey, 0..255, at the photo's size; the network sees it at 320 x 320."""
    x = F_image.to_tensor(photo.resize((SIDE, SIDE), Image.BILINEAR, reducing_gap=3))
    mask = model(normalise(x[None]))[0]                                             # (1, 320, 320) in [0, 1]
    if not torch.isfinite(mask).all():
        raise ValueError("the mask is not made of finite numbers: these weights are broken")
    return F_image.to_pil_image(mask.mul(255).round().byte()).resize(photo.size, Image.BILINEAR)


# ---------------------------------------------------------------------------------------------------------------- training

def saliency_loss(logits: Sequence[torch.Tensor], target: torch.Tensor) -> torch.Tensor:
    """Deep supervision: binary cross-entropy of every map's logits (N, 1, H, W) with target (N, 1, H, W) in [0, 1], summed."""
    return sum(F.binary_cross_entropy_with_logits(logit, target) for logit in logits)


def train(model: U2Net, images: torch.Tensor, masks: torch.Tensor, *, steps: int, batch: int = 32, lr: float = 1e-3,
          seed: int = 0, report=None) -> U2Net:
    """Train on uint8 images (N, 3, H, W) and masks (N, 1, H, W) with Adam, `lr` falling to zero; eval mode afterwards.

    report(step, loss) is called every 50 steps.
    """
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        chosen = torch.randint(len(images), (batch,), generator=generator)
        loss = saliency_loss(model.logits(normalise(images[chosen].float() / 255)), masks[chosen].float() / 255)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if report and (step + 1) % 50 == 0:
            report(step + 1, loss.item())
    return model.eval()


# ------------------------------------------------------------------------------------------------------------ command line

def find_weights(path: Union[str, os.PathLike]) -> Path:
    """The path of a file of weights, fetched first where it is absent and weights.txt, beside this module, has its address.

    Raises ValueError where it cannot be had, and where weights.txt lists another SHA-256 for its name; one that is not listed
    is printed.
    """
    path, table = Path(path), Path(__file__).with_name("weights.txt")
    if path.parent == Path(".") and not path.exists():      # a bare name
        path = Path(__file__).parent / "weights" / path.name
    rows = [line.split(" | ") for line in table.read_text().splitlines()] if table.exists() else []
    size, sha256, _, address, _ = next((row[1:] for row in rows if row[0] == path.name), ("", "", "", "", ""))
    size = f"{size} bytes" if size else "file (its size is not known)"
    try:
        if not path.exists() and address.startswith("https://drive.google.com/"):
            print(f"fetching {path} ({size}) from {address}")
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                download_file_from_google_drive(address.split("/d/")[1], folder, path.name)
                return _check(Path(folder) / path.name, sha256).replace(path)
        return _check(path, sha256)
    except ValueError:
        raise
    except Exception as error:              # whatever a network, torchvision's helper (it needs gdown) or a disk raises
        remedy = f"put the {size} of {address} there" if address.startswith("https") else "name another file with --weights"
        raise ValueError(f"{path} is missing or cannot be read ({error}): {remedy}") from None


def _check(path: Path, sha256: str) -> Path:
    if path.exists() and not path.is_file():
        raise OSError("it is no file")                              # of a device, reading might never end
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        for chunk in iter(lambda: file.read(2 ** 20), b""):
            digest.update(chunk)
    if not sha256:
        print(f"weights.txt has no SHA-256 of {path.name}; it is {digest.hexdigest()}")
    elif digest.hexdigest() != sha256:
        raise ValueError(f"{path} has SHA-256 {digest.hexdigest()}, but weights.txt lists {sha256}: fetch it again, "
                         "or, if it is your own, write its hash there")
    return path


def save_png(picture: Image.Image, path: Path) -> None:
    """Write a picture as PNG, under a temporary name first. Raises OSError."""
    partial = path.with_name(path.name + ".partial")
    try:
        picture.save(partial, format="PNG")
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Find what stands out in a photo: its mask, or the object cut out.")
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")
    parser.add_argument("photo", help="a picture of up to 64 megapixels")
    parser.add_argument("--out", help="mask to write, a grey PNG of the photo's size (default: mask.png without --cutout)")
    parser.add_argument("--cutout", help="PNG to write of the photo, transparent where the mask is 0")
    parser.add_argument("--weights", default=str(Path(__file__).parent / "weights" / "u2netp.pth"), help="raw state dict, full "
                        "or lite, u2net.pth is fetched where it is absent (default: weights/u2netp.pth)")
    parser.add_argument("--align-corners", action="store_true", help="upsample as the CGN's authors do (default: as trained)")
    parser.add_argument("--threads", type=int, help="CPU threads, at most one a CPU (default: torch's choice)")
    return parser


def main(argv: Optional[list[str]] = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        if args.threads is not None:
            if args.threads < 1:
                raise ValueError(f"--threads {args.threads}: must be at least 1")
            torch.set_num_threads(min(args.threads, os.cpu_count()))
        paths = [Path(path).resolve() for path in (args.photo, args.out, args.cutout) if path]
        if len(set(paths)) < len(paths):
            raise ValueError(f"photo {args.photo}, --out {args.out}, --cutout {args.cutout}: each needs a name of its own")
        photo = open_photo(args.photo)
        mask = saliency(load(find_weights(args.weights), align_corners=args.align_corners), photo)
        if args.out or not args.cutout:
            save_png(mask, Path(args.out or "mask.png"))
            print(f"wrote {args.out or 'mask.png'}: white is what stands out")
        if args.cutout:
            photo.putalpha(mask)
            save_png(photo, Path(args.cutout))
            print(f"wrote {args.cutout}")
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
