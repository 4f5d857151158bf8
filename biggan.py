"""BigGAN-deep (Brock, Donahue & Simonyan, ICLR 2019; appendix B): the generator, from its released weights.

Made from a raw state dict, as huggingface/pytorch-pretrained-BigGAN released them (DeepMind's, for ImageNet
at 128, 256 and 512 pixels), or one of other widths, depths and classes. Submodules are named as its keys.

    python biggan.py --classes 207,ostrich --truncation 0.5 --out sheet.png

Every weight comes with two vectors that estimate its spectral norm: `load(.., frozen=False)` trains it as it
was trained, `load(..)` divides once and for all. Statistics for normalisation: row i for truncation i / 50.
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
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

ROWS = 51           # truncation 0, 0.02, .. 1
ALL = slice(None)
EPSILON = 1e-4      # in every normalisation
WEIGHTS = "biggan-deep-256-pytorch_model.bin"


# ---------- modules

class Normed(nn.Module):
    """A weight divided by its largest singular value (Miyato et al., 2018), estimated as u^T W v; and a bias.
    For `held` see BigGAN."""

    def __init__(self, *shape, bias=True):
        super().__init__()
        self.weight_orig = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.zeros(shape[0])) if bias else None
        self.register_buffer("weight_u", torch.empty(shape[0]))
        self.register_buffer("weight_v", torch.empty(self.weight_orig[0].numel()))
        self.folded, self.held = False, None
        if not self.weight_orig.is_meta:    # where a loader needs no numbers yet
            nn.init.orthogonal_(self.weight_orig)
            for vector in (self.weight_u, self.weight_v):
                vector.copy_(F.normalize(torch.randn_like(vector), dim=0))
            self.power_iteration()          # of random u and v, u^T W v is nearly 0; this makes it 1

    def norm(self):
        with torch.autocast(self.weight_orig.device.type, enabled=False):   # bfloat16: up to 0.4 % off
            return self.weight_u @ (self.weight_orig.flatten(1) @ self.weight_v)

    def weight(self):
        if self.folded:
            return self.weight_orig
        return self.weight_orig / self.norm() if self.held is None else self.held

    @torch.no_grad()
    def power_iteration(self):
        """One step of u and v towards the largest singular value's."""
        matrix = self.weight_orig.flatten(1)
        self.weight_v.copy_(F.normalize(matrix.T @ self.weight_u, dim=0, eps=EPSILON))
        self.weight_u.copy_(F.normalize(matrix @ self.weight_v, dim=0, eps=EPSILON))

    @torch.no_grad()
    def fold(self):
        """Divide once and for all."""
        if not self.folded:
            self.weight_orig.div_(self.norm())
            self.folded = True
            del self.weight_u, self.weight_v


class Linear(Normed):
    def forward(self, x):
        return F.linear(x, self.weight(), self.bias)


class Conv(Normed):
    """k x k convolution, odd k, same size; `double` upsamples by nearest neighbour first: of a large map at
    once, with 4/9 of the multiplications."""

    def __init__(self, i, o, k, bias=True, double=False):
        super().__init__(o, i, k, k, bias=bias)
        self.padding, self.double = k // 2, double

    def forward(self, x, channels=ALL):
        """x (N, i, H, W) -> (N, o, H, W) or (N, o, 2H, 2W); of the o channels only those."""
        weight, bias = self.weight()[channels], None if self.bias is None else self.bias[channels]
        if self.padding == 0:
            return F.linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)
        if self.double and x.shape[2] * x.shape[3] > 32 * 32:   # below, making the kernel costs more
            return F.conv_transpose2d(x, doubling_kernel(weight), bias, stride=2, padding=1)
        return F.conv2d(twice(x) if self.double else x, weight, bias, padding=self.padding)


def twice(x):
    """Nearest-neighbour upsampling in x's own precision, which autocast would leave."""
    with torch.autocast(x.device.type, enabled=False):
        return F.interpolate(x, scale_factor=2.0)


def doubling_kernel(weight: Tensor) -> Tensor:
    """The transposed convolution (i, o, 4, 4), stride 2, that equals nearest-neighbour upsampling and then a
    convolution (o, i, 3, 3): each pixel counts twice."""
    eye = torch.eye(4, 3, dtype=weight.dtype, device=weight.device)
    side = (eye + eye.roll(1, 0)).flip(0)   # in one dimension: 001, 011, 110, 100
    return (weight.transpose(0, 1).flatten(2) @ torch.kron(side, side).T).unflatten(2, (4, 4))


class BatchNorm(nn.Module):
    """Normalisation by a truncation's statistics (None: the batch's, kept in `batch`), scale and offset,
    linear in the condition if there is one, and ReLU."""

    def __init__(self, channels, condition):
        super().__init__()
        self.register_buffer("running_means", torch.zeros(ROWS, channels))
        self.register_buffer("running_vars", torch.ones(ROWS, channels))
        if condition:
            self.scale = Linear(channels, condition, bias=False)
            self.offset = Linear(channels, condition, bias=False)
        else:
            self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x, condition, truncation, keep=False, channels=ALL):
        """x holds those channels. Writes over x where no gradient needs it, unless to keep it."""
        if condition is None:
            scale, offset = self.weight[None, channels], self.bias[None, channels]
        else:
            scale, offset = 1 + self.scale(condition), self.offset(condition)   # (N, C)
        if truncation is None:
            mean, var = self.running_means.new_zeros(2, x.shape[1])
            x = F.batch_norm(x, mean, var, training=True, momentum=1.0, eps=EPSILON)
            self.batch = mean, var * (1 - x.shape[1] / x.numel())   # var was divided by n - 1
        else:
            mean, var = (_row(rows, truncation)[channels] for rows in (self.running_means, self.running_vars))
            scale = scale * (var + EPSILON).rsqrt()
            offset = offset - mean * scale
        scale, offset = (part.to(x.dtype)[:, :, None, None] for part in (scale, offset))
        out = None if keep or torch.is_grad_enabled() else x
        return F.relu(torch.addcmul(offset, x, scale, out=out), inplace=True)


def _row(rows, truncation):
    """Statistics (C,) for a truncation: a row of (51, C), or between two."""
    position = truncation * (ROWS - 1)
    nearest = round(position)
    if abs(position - nearest) < 1e-6:      # 0.28 * 50 is 14.000000000000002
        return rows[nearest]
    return torch.lerp(rows[int(position)], rows[int(position) + 1], position - int(position))


class Block(nn.Module):
    """Figure 16b's residual block: (N, i, H, W) -> (N, o, H, W) or (N, o, 2H, 2W)."""

    def __init__(self, i, o, condition, double):
        super().__init__()
        mid = i // 4
        self.channels, self.double = o, double
        self.bn_0, self.conv_0 = BatchNorm(i, condition), Conv(i, mid, 1)
        self.bn_1, self.conv_1 = BatchNorm(mid, condition), Conv(mid, mid, 3, double=double)
        self.bn_2, self.conv_2 = BatchNorm(mid, condition), Conv(mid, mid, 3)
        self.bn_3, self.conv_3 = BatchNorm(mid, condition), Conv(mid, o, 1)

    def forward(self, x, condition, truncation):
        return self.join(x, self.residual(x, condition, truncation))

    def residual(self, x, condition, truncation):
        h = self.conv_0(self.bn_0(x, condition, truncation, keep=True))   # (N, i/4, H, W)
        h = self.conv_1(self.bn_1(h, condition, truncation))              # (N, i/4, 2H, 2W)
        h = self.conv_2(self.bn_2(h, condition, truncation))
        return self.bn_3(h, condition, truncation)

    def join(self, x, h, channels=ALL):
        """The block's input x and `residual`'s h -> its output, or some channels of it."""
        h = self.conv_3(h, channels)
        if h.shape[1] < x.shape[1]:     # sliced in its layout, (N, H, W, C), as its gradient is then
            x = x.movedim(1, 3)[..., :self.channels][..., channels].movedim(3, 1)
        if torch.is_grad_enabled():
            return h + (twice(x) if self.double else x)
        if not self.double:
            return h.add_(x)
        h.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).add_(x[:, :, :, None, :, None])   # x is not copied
        return h


class Attention(nn.Module):
    """Self-attention (Zhang et al., 2019) of every pixel over the four times fewer of a max-pooled map."""

    def __init__(self, channels):
        super().__init__()
        self.snconv1x1_theta = Conv(channels, channels // 8, 1, bias=False)
        self.snconv1x1_phi = Conv(channels, channels // 8, 1, bias=False)
        self.snconv1x1_g = Conv(channels, channels // 2, 1, bias=False)
        self.snconv1x1_o_conv = Conv(channels // 2, channels, 1, bias=False)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        query = self.snconv1x1_theta(x).flatten(2).mT                 # (N, HW, C/8)
        key = F.max_pool2d(self.snconv1x1_phi(x), 2).flatten(2).mT    # (N, HW/4, C/8)
        value = F.max_pool2d(self.snconv1x1_g(x), 2).flatten(2).mT    # (N, HW/4, C/2)
        # Not scaled_dot_product_attention, which computes in float32 on a CPU, whatever x is.
        h = [(part @ key.mT).softmax(dim=2) @ value for part in query.split(1024, dim=1)]
        h = torch.cat(h, dim=1).mT.unflatten(2, x.shape[2:])          # (N, C/2, H, W)
        return x + self.snconv1x1_o_conv(self.gamma * h)


class BigGAN(nn.Module):
    """The generator. `blocks`: channels in and out of each residual block, of which every second doubles the
    size, at first 4 x 4; `attention`: the number of blocks before it, None for none."""

    def __init__(self, blocks: list[tuple[int, int]], attention: int | None = None, classes: int = 1000,
                 noise: int = 128, embedding: int = 128):
        super().__init__()
        self.noise, self.classes, self.resolution = noise, classes, 4 * 2 ** (len(blocks) // 2)
        condition = noise + embedding
        self.embeddings = nn.Linear(classes, embedding, bias=False)
        layers = [Block(i, o, condition, double=number % 2 == 1) for number, (i, o) in enumerate(blocks)]
        if attention is not None:
            layers.insert(attention, Attention(blocks[attention][0]))
        start, end = blocks[0][0], blocks[-1][1]
        self.generator = nn.ModuleDict({
            "gen_z": Linear(16 * start, condition), "layers": nn.ModuleList(layers),
            "bn": BatchNorm(end, None), "conv_to_rgb": Conv(end, end, 3)})

    def forward(self, z: Tensor, y: Tensor, truncation: float | None = 1.0) -> Tensor:
        """z (N, noise), y labels (N,) long or class weights (N, classes) float -> (N, 3, R, R) in [-1, 1].

        truncation, 0.02..1 or None, selects statistics. Raises ValueError for other truncations, classes and
        shapes. For z see `truncated_noise`."""
        if truncation is not None and not 0.02 <= truncation <= 1:
            raise ValueError(f"truncation {truncation} is not in 0.02..1")
        if not isinstance(z, Tensor) or z.shape[1:] != (self.noise,):
            raise ValueError(f"noise {getattr(z, 'shape', z)}: expected a tensor (N, {self.noise})")
        if not isinstance(y, Tensor) or y.shape[:1] != z.shape[:1]:
            raise ValueError(f"classes {getattr(y, 'shape', y)}: expected a tensor, one for each noise")
        condition = torch.cat([z, self.embed(y)], dim=1)      # (N, noise + embedding)
        x = self.generator["gen_z"](condition)                # (N, 16 C), laid out (h, w, c)
        x = x.unflatten(1, (4, 4, -1)).permute(0, 3, 1, 2)    # (N, C, 4, 4)
        *layers, last = self.generator["layers"]
        for layer in layers:
            x = layer(x) if isinstance(layer, Attention) else layer(x, condition, truncation)

        # The last block's maps are the largest: without a gradient a few channels at a time do, and of the
        # last convolution three.
        whole = truncation is None or torch.is_grad_enabled()
        h, step = last.residual(x, condition, truncation), last.channels if whole else 16
        bn, out = self.generator["bn"], self.generator["conv_to_rgb"]
        weight, image = out.weight()[:3], out.bias[:3, None, None]
        for part in (slice(first, first + step) for first in range(0, last.channels, step)):
            seen = bn(last.join(x, h, part), None, truncation, channels=part)
            with torch.autocast(x.device.type, enabled=False):      # bfloat16 would round what is seen
                image = image + F.conv2d(seen.to(weight.dtype), weight[:, part], padding=1)
        return torch.tanh(image)

    def embed(self, y: Tensor) -> Tensor:
        """Labels (N,) or class weights (N, classes) -> (N, embedding)."""
        if y.is_floating_point() and y.shape[1:] == (self.classes,):
            return self.embeddings(y)
        if y.ndim != 1 or y.dtype == torch.bool or y.is_floating_point() or y.is_complex():
            raise ValueError(f"classes {y.shape}, {y.dtype}: not (N,) long or (N, {self.classes}) float")
        # Only labels on the CPU are looked at: it would make a GPU wait, and cut a compiled graph in two.
        if y.device.type == "cpu" and not torch.compiler.is_compiling():
            for label in y.tolist():
                if not 0 <= label < self.classes:
                    raise ValueError(f"class {label} is not in 0..{self.classes - 1}")
        return self.embeddings.weight.T[y.long()]

    def norms(self) -> list[Normed]:
        return [module for module in self.modules() if isinstance(module, Normed)]

    def power_iteration(self) -> None:
        """One step of every spectral norm; call it once per optimiser step."""
        for module in self.norms():
            module.power_iteration()

    @contextlib.contextmanager
    def held(self):
        """Divide by the spectral norms once for many batches before one optimiser step, with the same images
        and, at the end, gradients. Raises ValueError inside another `held`, and for a frozen network."""
        if any(norm.folded or norm.held is not None for norm in self.norms()):
            raise ValueError("the spectral norms are frozen or held already")
        quotients = {norm: norm.weight() for norm in self.norms()}
        for norm, quotient in quotients.items():
            norm.held = quotient.detach().requires_grad_()
        try:
            yield self
            for norm, quotient in quotients.items():
                if norm.held.grad is not None:
                    quotient.backward(norm.held.grad)
        finally:
            for norm in quotients:
                norm.held = None

    def freeze(self) -> "BigGAN":
        """Divide by the spectral norms once and for all, in place; eval mode, no gradients."""
        for module in self.norms():
            module.fold()
        return self.eval().requires_grad_(False)


def truncated_noise(count: int, dimensions: int = 128, truncation: float = 1.0, seed: int | None = None,
                    generator: torch.Generator | None = None) -> Tensor:
    """(count, dimensions): a standard normal cut at -2 and 2, times truncation; by a seed or a generator."""
    generator = generator if seed is None else torch.Generator().manual_seed(seed)
    return truncation * nn.init.trunc_normal_(torch.empty(count, dimensions), a=-2, b=2, generator=generator)


# ---------- loading

def load(source: str | Path | dict, *, frozen: bool = True) -> BigGAN:
    """A BigGAN from a raw state dict or the path of one; frozen: eval mode, norms folded, no gradients.
    Raises ValueError that names, in one line, what is missing, unexpected, misshapen or not finite."""
    state, name = read_state(source), "the state dict" if isinstance(source, dict) else source
    for key, value in state.items():
        stored = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta and (
            0 < value.nbytes <= value.untyped_storage().nbytes())
        if not stored or not value.is_floating_point():
            raise ValueError(f"{name}: {key} is no dense tensor of floating-point numbers, all stored")
        state[key] = value = value.detach().to(torch.float, copy=True)
        low, high = value.aminmax()
        if not -torch.inf < low <= high < torch.inf or key.endswith("running_vars") and low < 0:
            raise ValueError(f"{name}: {key} is not finite, or holds negative variances")
    with torch.device("meta"):
        model = _build(state, name)
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


def _build(state, name):
    """The network that fits the shapes of a raw dict."""
    def shape(key, dimensions):
        if key not in state or state[key].ndim != dimensions:
            raise ValueError(f"{name} is no BigGAN-deep: it lacks {key} of {dimensions} dimensions")
        return state[key].shape

    embedding, classes = shape("embeddings.weight", 2)
    noise = shape("generator.gen_z.weight_orig", 2)[1] - embedding
    layers = range(len({key.split(".")[2] for key in state if key.startswith("generator.layers.")}))
    attention = next((n for n in layers if f"generator.layers.{n}.gamma" in state), None)
    blocks = [(shape(f"generator.layers.{n}.conv_0.weight_orig", 4)[1],
               shape(f"generator.layers.{n}.conv_3.weight_orig", 4)[0]) for n in layers if n != attention]
    joined = all(o == i for (_, o), (i, _) in zip(blocks, blocks[1:])) and all(3 <= o <= i for i, o in blocks)
    if not blocks or not joined or attention == len(blocks) or noise < 1:
        raise ValueError(f"{name} is no BigGAN-deep: its blocks do not follow each other ({blocks})")
    return BigGAN(blocks, attention, classes, noise, embedding)


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
    elif not found.startswith(sha256):  # torchvision publishes the first digits only
        raise ValueError(f"{path} has SHA-256 {found}, weights.txt lists {sha256}: remove one of them")
    return path


# ---------- command line

def class_numbers(text: str, classes: int) -> dict[int, str]:
    """Numbers, or names of ImageNet's 1,000 classes, with commas -> {number: name}; ValueError for others."""
    names = []
    if classes == 1000:
        from torchvision.models import ResNet50_Weights  # 170 MB
        names = ResNet50_Weights.IMAGENET1K_V1.meta["categories"]
    chosen = {}
    for word in map(str.strip, text.split(",")):
        number = int(word) if word.isdecimal() else names.index(word) if word in names else classes
        if number >= classes:
            near = " or ".join([name for name in names if word and word.lower() in name.lower()][:3])
            raise ValueError(f"class {word!r} is not in 0..{classes - 1}: did you mean {near or 'another'}?")
        chosen[number] = names[number] if names else f"class {number}"
    return chosen


@torch.no_grad()
def save_sheet(model: BigGAN, chosen: dict[int, str], count: int, truncation: float, seed: int, path: Path):
    """A PNG: a row a class, its name to the left of `count` draws; a column shares its noise."""
    z, device = truncated_noise(count, model.noise, truncation, seed), model.embeddings.weight.device
    labels, font = [f"{number} {name}" for number, name in chosen.items()], ImageFont.load_default(14)
    left, size = 12 + max(int(font.getlength(label)) for label in labels), model.resolution + 2
    high = max(size, 20)
    sheet = Image.new("RGB", (left + count * size, len(chosen) * high), "white")
    for row, number in enumerate(chosen):
        ImageDraw.Draw(sheet).text((4, (row + 0.5) * high), labels[row], "black", font, anchor="lm")
        for column in range(count):
            x = model(z[column, None].to(device), torch.tensor([number], device=device), truncation)[0]
            if not x.isfinite().all():
                raise ValueError(f"class {number} gives no finite numbers: broken weights")
            x = x.add(1).mul(127.5).round().byte().permute(1, 2, 0).cpu()
            sheet.paste(Image.fromarray(x.numpy()), (left + column * size, row * high))
    sheet.save(path, format="PNG")


def build_parser() -> argparse.ArgumentParser:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description="Draw images by BigGAN-deep.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {' '.join(message.split())}\n")
    add = parser.add_argument
    add("--classes", default="0,1,2,3", help="numbers or ImageNet's names, with commas")
    add("--truncation", type=float, default=0.5, help="0.02, alike and typical, to 1, varied")
    add("--count", type=int, default=4, help="images a class")
    add("--seed", type=int, default=0)
    add("--out", default=here / "sheet.png", help="PNG to write")
    add("--weights", default=here / "weights" / WEIGHTS, help="raw state dict of any size")
    add("--device", default="auto", help="cuda, mps or cpu; auto: the first here")
    add("--dry-run", action="store_true", help="a tiny random network; nothing is kept")
    return parser


def run(args: argparse.Namespace) -> None:
    if not 1 <= args.count <= 100:
        raise ValueError(f"--count {args.count} is not in 1..100")
    gpu = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
    device = gpu if args.device == "auto" else args.device
    if device not in (gpu, "cpu"):
        raise ValueError(f"--device {device} is not here: choose {' or '.join(sorted({gpu, 'cpu'}))}")
    out, shelf = Path(args.out).resolve(), Path(__file__).parent / "weights"
    weights = [Path(args.weights).resolve(), (shelf / args.weights).resolve()]
    if out.suffix.lower() != ".png" or out in weights or out.exists() and not out.is_file():
        raise ValueError(f"--out {out}: choose a PNG to write, no folder or device, and not --weights")
    if not args.dry_run:
        out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=None if args.dry_run else out.parent) as folder:
        model = BigGAN([(32, 16), (16, 8)]).freeze() if args.dry_run else load(find_weights(args.weights))
        chosen, side = class_numbers(args.classes, model.classes), model.resolution
        print(f"{len(chosen)} x {args.count} images of {side} x {side} pixels, on {device}")
        sheet = Path(folder) / out.name
        save_sheet(model.to(device), chosen, args.count, args.truncation, args.seed % 2 ** 63, sheet)
        print("dry run finished; nothing is kept" if args.dry_run else f"wrote {sheet.replace(out)}")


def main(argv: list[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        run(args)
    except (ValueError, OSError) as error:
        parser.error(str(error) if isinstance(error, ValueError) else f"--out {args.out}: {error}")
    except torch.OutOfMemoryError:
        parser.error("the GPU's memory is full: give --device cpu")
    except KeyboardInterrupt:
        parser.exit(130, "stopped\n")


if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):  # a console that lacks a sign; a notebook's has no such method
        sys.stdout.reconfigure(errors="replace")
    main()
