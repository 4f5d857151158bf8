"""All tests: `python -m pytest -q test_cgn.py`. CPU, about five minutes, nothing is downloaded."""
import contextlib
import copy
import gzip
import io
import itertools
import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import ResNet50_Weights
from torchvision.transforms import functional as F_image

import biggan
import cgn
import classify
import evaluate
import miniature
import mnist_variants
import u2net

HERE = Path(__file__).parent
SHARED = HERE.parent / "shared"
DTD = SHARED / "data" / "dtd"
needs_dtd = pytest.mark.skipif(not DTD.is_dir(), reason=f"the paper's DTD pictures are not in {DTD}")


CHILD = "CGN_TEST_BESIDE" in os.environ                 # this process runs one of the long tests
LONG = []


def beside(test):
    """Marks a long test: a process of its own runs it on the second core, one such test after the other, while the other tests
    run here, where its end is waited for."""
    if CHILD:
        return test
    LONG.append(test.__name__)

    def wait(processes):
        result = processes[test.__name__].result()
        print(result.stdout)
        assert result.returncode == 0, result.stdout + result.stderr

    return wait


@pytest.fixture(scope="session", autouse=True)
def processes(request):
    """The long tests that are selected: name -> future of the finished process. One thread each for it and for this process."""
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    pool, selected = ThreadPoolExecutor(1), {item.name for item in request.session.items}

    def run(name):
        return subprocess.run([sys.executable, "-m", "pytest", "-q", "-s", f"{__file__}::{name}"], env={**os.environ, "CGN_TEST_BESIDE": "1"},
                              capture_output=True, text=True, timeout=900)

    yield {name: pool.submit(run, name) for name in LONG if name in selected}
    pool.shutdown(cancel_futures=True)


@pytest.fixture(autouse=True)
def in_project(monkeypatch):
    monkeypatch.chdir(HERE)


@pytest.fixture
def few_images(monkeypatch):
    """Splits of 200 images: enough to see that the parts of a long command fit together."""
    monkeypatch.setattr(mnist_variants, "SPLITS", {name: slice(200) for name in mnist_variants.SPLITS})


def script(name, *arguments):
    """Runs a script's main in this process, which saves the seconds that importing torch takes; the result of a process."""
    out, error, code, threads = io.StringIO(), io.StringIO(), 0, torch.get_num_threads()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try:
            sys.modules[Path(name).stem].main([str(argument) for argument in arguments])
        except SystemExit as stopped:
            code = stopped.code
    torch.set_num_threads(threads)
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), error.getvalue())


def process(name, *arguments, cwd=HERE, **kwargs):
    return subprocess.run([sys.executable, name, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=300,
                          **kwargs)


def one_line(result, *words):
    """The run ended with exit code 2 and one line that holds the words."""
    assert result.returncode == 2, result
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    for word in words:
        assert word in result.stderr, result.stderr


def tiny_config(**changes):
    return {"model": "cgn", "dataset": "colored", "textures": None, "variance": 0.02, "margin": 2, "shuffle": "shift",
            "names": [f"digit {k}" for k in range(10)], "seed": 3, "steps": 6, "batch": 8, "lr": 1e-3, "binary": 1.0, "binary_warmup": 4, "mask": 10.0,
            "interval": [0.05, 0.4], "noise": 0.3, "color": 10.0, "bf16": False, "relativistic": False, "log_every": 1, "sheet_every": 2, **changes}


def tiny_data(count=64):
    generator = torch.Generator().manual_seed(0)
    return (torch.randint(256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8), torch.arange(count) % 10)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a finished tiny run."""
    out = tmp_path_factory.mktemp("run")
    cgn.train(tiny_config(), *tiny_data(), out)
    return out


# ---------------------------------------------------------------------------------------------------------- mnist_variants

def test_splits_are_mnists_first_50000_last_10000_and_the_test_file():
    train, labels = mnist_variants.read_mnist(True)
    _, test = mnist_variants.read_mnist(False)
    for split, expected in (("train", labels[:50_000]), ("val", labels[50_000:]), ("test", test)):
        assert torch.equal(mnist_variants.load("colored", split).shape, expected)


@pytest.mark.parametrize("name", mnist_variants.NAMES)
def test_a_split_is_a_pure_function_of_its_seed(name):
    first, again, other = (mnist_variants.load(name, "val", seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not torch.equal(first.images, other.images) and torch.equal(first.shape, other.shape)
    assert first.images.dtype == torch.uint8 and first.images.shape == (10_000, 3, 32, 32)


@pytest.mark.parametrize("agreement", [0.0, 0.1, 0.9, 1.0])
def test_labels_agree_as_often_as_asked_and_the_rest_is_uniform(agreement):
    data = mnist_variants.load("double-colored", "train", agreement=agreement)
    for label in (data.foreground, data.background):
        agrees = label == data.shape
        assert abs(agrees.double().mean() - agreement) < 0.005
        if agreement < 1:
            other = (label - data.shape)[~agrees] % 10
            assert (other.bincount(minlength=10)[1:] / len(other) - 1 / 9).abs().max() < 4 * (8 / 81 / len(other)) ** 0.5
    both = ((data.foreground == data.shape) & (data.background == data.shape)).double().mean()
    assert abs(both - agreement ** 2) < 0.005                                       # drawn separately


def test_foreground_and_background_may_agree_apart():
    for agreement, expected in ((mnist_variants.CUE_CONFLICT, (0.0, 0.1)), (mnist_variants.MIXED_RAND, (1.0, 0.1))):
        data = mnist_variants.load("wildlife", "test", agreement=agreement)
        found = [(label == data.shape).double().mean().item() for label in (data.foreground, data.background)]
        assert found == pytest.approx(expected, abs=0.012)


def test_train_agrees_and_val_and_test_do_not_by_default():
    for split, expected in (("train", 1.0), ("val", 0.1), ("test", 0.1)):
        data = mnist_variants.load("wildlife", split)
        assert abs((data.foreground == data.shape).double().mean() - expected) < 0.01


def test_colored_is_a_grey_digit_times_a_class_color_of_variance_0_02():
    data = mnist_variants.load("colored", "train")
    assert (data.background == -1).all()
    brightest = data.images.flatten(2).amax(2).double() / 255                       # MNIST digits reach grey 255 nearly always
    for label in range(10):
        mean = mnist_variants.COLORED[label] / 255
        inner = (mean > 0.4) & (mean < 0.6)                                         # channels that clipping leaves alone
        found = brightest[data.foreground == label]
        if inner.any():
            assert (found[:, inner].mean(0) - mean[inner]).abs().max() < 0.02
            assert (found[:, inner].var(0) - 0.02).abs().max() < 0.003
    grey = data.images.double().sum(1)
    assert (grey.amax((1, 2)) > 0).all() and (data.images[:, :, 0, 0] == 0).double().mean() > 0.99


def test_double_colored_has_two_flat_colors_and_the_variance_can_be_the_authors():
    data = mnist_variants.load("double-colored", "val", variance=0.01 ** 2)
    for image, fore, back in zip(data.images[:200], data.foreground, data.background):
        colors = image.flatten(1).T.unique(dim=0)
        assert len(colors) <= 2
        for mean in (mnist_variants.DOUBLE_FOREGROUND[fore], mnist_variants.DOUBLE_BACKGROUND[back]):
            assert (colors.long() - mean).abs().amax(1).min() <= 15
    assert torch.equal(mnist_variants.DOUBLE_FOREGROUND[0], mnist_variants.DOUBLE_BACKGROUND[6])


def test_wildlife_shows_patches_of_its_labels_textures():
    parts, (_, fore, back) = mnist_variants.load_parts("wildlife", "val")
    textures = mnist_variants.draw_textures()
    for kind, pictures, labels in ((0, parts.foreground, fore), (1, parts.background, back)):
        for index in range(5):
            windows = textures[kind, labels[index]].unfold(1, 32, 1).unfold(2, 32, 1)
            assert (windows == pictures[index][:, None, None]).all(0).all(-1).all(-1).any()


def test_a_patch_is_cut_at_a_random_row_and_at_a_random_column():
    side, count = 156, 5000
    place = torch.arange(side, dtype=torch.uint8)
    textures = torch.stack([place[:, None].expand(side, side), place.expand(side, side), torch.zeros(side, side).byte()]).repeat(10, 1, 1, 1)
    corners = mnist_variants._patches(textures, torch.arange(count) % 10, torch.Generator().manual_seed(0))[:, :2, 0, 0].double()
    assert (corners.amin(0) == 0).all() and (corners.amax(0) == side - 32).all() and abs(corners.T.corrcoef()[0, 1]) < 0.05


def test_drawn_textures_are_multi_modal_within_a_class_and_distinct_between_classes():
    textures = mnist_variants.draw_textures().double()
    assert textures.shape == (2, 10, 3, 156, 156)
    blocks = textures.unfold(3, 32, 31).unfold(4, 32, 31).mean((-1, -2)).flatten(3)   # mean colour of 16+ patches a texture
    for kind in blocks:
        spread = (kind - kind.mean(2, keepdim=True)).norm(dim=1)
        assert spread.amax(1).min() > 8                                             # grey levels
        centers = kind.mean(2)
        between = torch.cdist(centers, centers) + 1e9 * torch.eye(10)
        assert between.min() > 3


@needs_dtd
def test_the_papers_textures_are_scaled_padded_and_ordered_by_class():
    textures = mnist_variants.read_textures(DTD)
    assert textures.shape == (2, 10, 3, 156, 156)
    with Image.open(DTD / "images" / "veined" / "veined_0073.jpg") as picture:
        expected = np.array(picture.convert("RGB").resize((150, 150), Image.NEAREST))
    assert np.array_equal(textures[1, 2, :, 3:153, 3:153].permute(1, 2, 0).numpy(), expected)
    assert torch.equal(textures[..., 0], textures[..., 6])                          # reflected about column 3


def test_fifty_thousand_wildlife_images_take_seconds():
    started = time.perf_counter()
    mnist_variants.load("wildlife", "train")
    assert time.perf_counter() - started < 10                                       # the authors' loader: 170 s


def test_a_sheet_shows_pictures_unstretched_under_their_names(tmp_path):
    images = torch.full((2, 3, 3, 4, 4), 100, dtype=torch.uint8)
    mnist_variants.save_sheet(tmp_path / "sheet.png", images, ["a", "b"], ["x", "x", "y"], scale=2)
    sheet = np.array(Image.open(tmp_path / "sheet.png"))
    assert (sheet == 100).all(2).sum() >= 6 * 8 * 8 and (sheet < 50).all(2).any()
    with pytest.raises(ValueError, match="1 row and 3 column names"):
        mnist_variants.save_sheet(tmp_path / "sheet.png", images, ["a"], ["x", "x", "y"])


def test_mnist_that_cannot_be_downloaded_is_one_line_and_is_tried_again(tmp_path, monkeypatch):
    calls = []

    def offline(root, download):
        calls.append(root)
        (Path(root) / "MNIST" / "raw").mkdir(parents=True, exist_ok=True)           # torchvision leaves them behind
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz:\nTried https://..\n<no network>")

    monkeypatch.setattr("torchvision.datasets.MNIST", offline)
    for _ in range(2):
        one_line(script("cgn.py", "--mnist", tmp_path / "absent", "--out", tmp_path / "run"), "absent", "no network", "--mnist")
    assert len(calls) == 2


@pytest.mark.parametrize("damage", ["altered", "truncated", "missing", "longer", "no gzip"])
def test_a_damaged_idx_file_is_named_in_one_line(tmp_path, damage):
    for name in mnist_variants.MNIST_FILES:
        os.symlink(HERE / "data" / "mnist" / f"{name}.gz", tmp_path / f"{name}.gz")
    victim = tmp_path / "train-labels-idx1-ubyte.gz"
    packed = victim.read_bytes()
    victim.unlink()
    content = bytearray(gzip.decompress(packed))
    if damage == "altered":
        content[100] ^= 1
    if damage == "longer":
        content += b"\0"
    if damage == "truncated":
        victim.write_bytes(packed[:-1000])
    elif damage == "no gzip":
        victim.write_bytes(b"not a gzip file at all")
    elif damage != "missing":
        victim.write_bytes(gzip.compress(bytes(content), 1))
    one_line(script("mnist_variants.py", "--mnist", tmp_path, "--out", tmp_path / "out"), str(victim))


def test_a_textures_folder_that_lacks_a_picture_is_refused_by_its_name(tmp_path):
    for kind, numbers in mnist_variants.DTD_FILES.items():
        (tmp_path / "images" / kind).mkdir(parents=True)
        for number in numbers:
            Image.new("RGB", (200, 180), (int(number) % 256, 0, 0)).save(tmp_path / "images" / kind / f"{kind}_{number}.jpg")
    assert mnist_variants.read_textures(tmp_path).shape == (2, 10, 3, 156, 156)
    (tmp_path / "images" / "veined" / "veined_0158.jpg").unlink()
    one_line(script("cgn.py", "--dataset", "wildlife", "--textures", tmp_path, "--out", tmp_path / "run"), "veined_0158.jpg")
    (tmp_path / "images" / "veined" / "veined_0158.jpg").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="veined_0158.jpg does not open"):
        mnist_variants.read_textures(tmp_path)


# -------------------------------------------------------------------------------------------- cgn: equations and mechanisms

def test_compose_is_equation_2():
    m, f, b = torch.tensor([[[[0.0, 0.25, 1.0]]]]), torch.full((1, 3, 1, 3), 0.8), torch.full((1, 3, 1, 3), -0.4)
    assert torch.allclose(cgn.compose(m, f, b)[0, 0, 0], torch.tensor([-0.4, -0.1, 0.8]), atol=1e-6)


def test_binary_entropy_is_one_bit_at_a_half_and_nothing_for_a_binary_mask():
    assert abs(cgn.binary_entropy(torch.full((2, 1, 4, 4), 0.5)) - 1) < 1e-6
    assert cgn.binary_entropy(torch.tensor([[[[0.0, 1.0]]]])) < 2e-3
    assert abs(cgn.binary_entropy(torch.tensor([[[[0.25]]]])) - 0.8112781) < 1e-6


def test_mask_interval_is_the_distance_of_each_images_mean():
    masks = torch.stack([torch.full((1, 2, 2), value) for value in (0.02, 0.5, 0.95)])
    assert abs(cgn.mask_interval(masks) - (0.08 + 0 + 0.05) / 3) < 1e-6
    assert abs(cgn.mask_interval(masks, 0.6, 0.7) - (0.58 + 0.1 + 0.25) / 3) < 1e-6


def test_mean_colors_of_whole_images_and_of_borders():
    images = torch.full((4, 3, 8, 8), 255, dtype=torch.uint8)
    images[2:, :, :2], images[2:, :, -2:], images[2:, :, :, :2], images[2:, :, :, -2:] = 0, 0, 0, 51
    labels = torch.tensor([0, 0, 1, 1])
    dark = 51 * 16 / 48                                                             # mean of the second class's border
    assert torch.allclose(cgn.mean_color(images, labels, 2, margin=2), torch.tensor([[1.0] * 3, [2 * dark / 255 - 1] * 3]))
    whole = (255 * 16 + 51 * 16) / 64
    assert torch.allclose(cgn.mean_color(images, labels, 2), torch.tensor([[1.0] * 3, [2 * whole / 255 - 1] * 3]))


def test_color_loss_compares_class_means_and_not_single_images():
    y, target = torch.tensor([0, 0, 1, 2, 2, 2]), torch.tensor([[0.2] * 3, [0.7] * 3, [0.0] * 3])
    level = torch.tensor([0.5, 0.1, 1.0, -0.3, 0.0, 0.3])[:, None, None, None].expand(6, 3, 8, 8)
    # class 0: 0.3 * -0.1; class 1 has one image only; class 2: mean of -0.3 * 0, 0 * 0.3, -0.3 * 0.3
    assert abs(cgn.color_loss(level, y, target) - (0.3 * -0.1 + -0.09 / 3) / 2) < 1e-6
    assert cgn.color_loss(level[2:3], y[2:3], target) == 0
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(20_000, 1, 1, 1, generator=generator).expand(-1, 3, 2, 2)  # no price for spread about the right mean
    estimates = torch.stack([cgn.color_loss(part, torch.full((4,), 2), target) for part in spread.split(4)])
    assert abs(estimates.mean()) < 4 * estimates.std() / 5000 ** 0.5


def test_hinge_losses_by_hand():
    real, fake = torch.tensor([2.0, 0.5, 1.0]), torch.tensor([-3.0, 0.0, 2.0])
    assert abs(cgn.discriminator_loss(real, fake) - ((0 + 0.5 + 0) / 3 + (0 + 1 + 3) / 3)) < 1e-6
    assert abs(cgn.generator_loss(real, fake) - 1 / 3) < 1e-6
    assert abs(cgn.discriminator_loss(real, fake, relativistic=True) - (0 + 0.5 + 2) / 3) < 1e-6
    assert abs(cgn.generator_loss(real, fake, relativistic=True) - (6 + 1.5 + 0) / 3) < 1e-6


@pytest.mark.parametrize("loss", [cgn.binary_entropy, lambda m: cgn.mask_interval(m, 0.6, 0.7)])
def test_mask_losses_have_the_right_gradient(loss):
    m = (0.1 + 0.8 * torch.rand(2, 1, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).requires_grad_()
    assert torch.autograd.gradcheck(loss, (m,))


@pytest.mark.parametrize("shuffle", ["shift", "puzzle"])
def test_an_arrangement_moves_every_cell_once(shuffle):
    drawn = cgn.draw_arrangement(cgn.rng(0, 0), 20, shuffle)
    assert drawn.shape == (20, 2, 100) and (np.sort(drawn, 2) == np.arange(100)).all()
    assert not np.array_equal(drawn[:, 0], drawn[:, 1])
    neighbours = drawn.reshape(20, 2, 10, 10)
    right = neighbours[..., 1:] - neighbours[..., :-1]
    if shuffle == "shift":                                                          # a step right is a step right, but at the seam
        assert (((right == 1) | (right == -9))).all()
    else:                                                                           # whole patches of 2 x 2
        assert (right[..., ::2] == 1).all() and not (right[..., 1::2] == 1).all()
        assert (neighbours[..., 1::2, :] - neighbours[..., ::2, :] == 10).all()


def test_the_texture_follows_its_arrangement():
    model = cgn.MnistCGN().eval()
    u, y = torch.randn(1, 32), torch.tensor([3])
    still = torch.arange(100).expand(1, 2, 100)
    moved = still.reshape(1, 2, 10, 10).roll(1, 3).reshape(1, 2, 100)
    with torch.no_grad():
        a, b = model(u, y, still), model(u, y, moved)
    assert torch.allclose(a.foreground[..., :, 4:20], b.foreground[..., :, 8:24], atol=1e-5)   # one cell is four pixels
    assert torch.equal(a.mask, b.mask)


@pytest.mark.parametrize("padding", [0, 1])
def test_up_is_upsampling_and_a_convolution(padding):
    up, x = cgn.Up(3, 5, padding).double(), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    expected = F.conv2d(F.interpolate(x, scale_factor=2), up.weight, padding=padding)
    up.rest = torch.nn.Identity()
    assert torch.allclose(up(x), expected, atol=1e-12)


def test_documented_shapes_and_ranges():
    model = cgn.MnistCGN(classes=7)
    sample = model(torch.randn(4, 32), torch.tensor([0, 6, 3, 3]))
    assert sample.mask.shape == (4, 1, 32, 32) and 0 <= sample.mask.min() <= sample.mask.max() <= 1
    for part in sample[1:4]:
        assert part.shape == (4, 3, 32, 32) and -1 <= part.min() <= part.max() <= 1
    assert torch.equal(sample.image, cgn.compose(sample.mask, sample.foreground, sample.background))
    assert cgn.Discriminator(7)(sample.image, torch.tensor([0, 6, 3, 3])).shape == (4,)
    for y in (torch.tensor([0, 7, 1, 1]), torch.tensor([-1, 0, 1, 1])):
        with pytest.raises(ValueError, match=r"is not in 0\.\.6"):
            model(torch.randn(4, 32), y)


def test_each_mechanism_answers_to_its_own_noise_and_label_only():
    model = cgn.MnistCGN().eval()
    u, y = [torch.randn(2, 32) for _ in range(3)], [torch.tensor([1, 2])] * 3
    still = torch.arange(100).expand(2, 2, 100)
    with torch.no_grad():
        before = model(u, y, still)
        for k in range(3):
            for other_u, other_y in (([torch.randn(2, 32) if j == k else u[j] for j in range(3)], y),
                                     (u, [torch.tensor([5, 7]) if j == k else y[j] for j in range(3)])):
                after = model(other_u, other_y, still)
                assert [torch.equal(a, b) for a, b in zip(before[:3], after[:3])] == [j != k for j in range(3)]


def test_labels_and_one_hot_class_weights_are_the_same():
    model = cgn.MnistCGN().eval()
    u, y, still = torch.randn(2, 32), torch.tensor([1, 9]), torch.arange(100).expand(2, 2, 100)
    with torch.no_grad():
        assert torch.equal(model(u, y, still).image, model(u, F.one_hot(y, 10).float(), still).image)


def test_the_masks_margin_is_background():
    mask = cgn.MnistCGN(margin=3)(torch.randn(2, 32), torch.tensor([0, 1])).mask
    assert mask[..., :3, :].max() == mask[..., -3:].max() == 0 and mask[..., 3:-3, 3:-3].min() > 0


# ------------------------------------------------------------------------------------------------------------ cgn: training

def test_the_noise_on_what_the_discriminator_sees_fades_to_nothing(tmp_path, monkeypatch):
    seen, forward = [], cgn.Discriminator.forward

    def watched(self, x, y):
        if len(x) == 2 * 64:                                                        # its own turn: real images, then generated ones
            seen.append(x[:64].std().item())
        return forward(self, x, y)

    monkeypatch.setattr(cgn.Discriminator, "forward", watched)
    grey = torch.full((64, 3, 32, 32), 128, dtype=torch.uint8)
    cgn.train(tiny_config(batch=64, steps=3, noise=0.3), grey, torch.arange(64) % 10, tmp_path)
    assert seen == pytest.approx([0.3, 0.2, 0.1], rel=0.02)


def test_the_average_moves_slowly_and_at_first_follows_the_generator(tmp_path, monkeypatch):
    old, new = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    torch.nn.init.constant_(old.weight, 1.0)
    torch.nn.init.constant_(new.weight, 2.0)
    cgn._update_average(old, new, 0.9)
    assert abs(old.weight.item() - 1.1) < 1e-6 and new.weight.item() == 2.0

    decays = []
    monkeypatch.setattr(cgn, "_update_average", lambda average, model, decay: decays.append(decay))
    for dataset in ("colored", "my pictures"):
        cgn.train(tiny_config(dataset=dataset, batch=4, steps=3), torch.zeros(10, 3, 32, 32, dtype=torch.uint8), torch.arange(10),
                  tmp_path / dataset)
    assert decays == pytest.approx([1 / 10, 2 / 11, 3 / 12, 1 / 5, 2 / 6, 3 / 7])


def test_training_writes_log_sheet_and_checkpoint(trained):
    lines = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    assert lines[0]["seed"] == 3 and [line["step"] for line in lines[1:]] == [1, 2, 3, 4, 5, 6]
    assert {"discriminator", "adversarial", "binary", "mask"} <= lines[1].keys()
    assert sorted(path.name for path in trained.glob("*.png")) == [f"sheet-00000{k}.png" for k in (2, 4, 6)]
    assert cgn.load(trained / "checkpoint.pt").config["steps"] == 6


@pytest.mark.parametrize("model", ["cgn", "gan"])
def test_a_stopped_run_continues_bit_for_bit(tmp_path, monkeypatch, model):
    config = tiny_config(model=model)
    cgn.train(config, *tiny_data(), tmp_path / "whole")
    update, calls = cgn._update_average, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 5:
            raise KeyboardInterrupt
        update(*arguments)

    monkeypatch.setattr(cgn, "_update_average", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cgn.train(config, *tiny_data(), tmp_path / "parts")
    assert cgn.read_checkpoint(tmp_path / "parts" / "checkpoint.pt")["step"] == 4
    torch.manual_seed(99)
    cgn.train(config, *tiny_data(), tmp_path / "parts")
    whole, parts = (cgn.read_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("whole", "parts"))
    for name in ("model", "average", "discriminator"):
        assert all(torch.equal(whole[name][key], parts[name][key]) for key in whole[name]), name
    logs = [[{k: v for k, v in json.loads(line).items() if k != "steps_per_second"} for line in
             (tmp_path / name / "log.jsonl").read_text().splitlines()] for name in ("whole", "parts")]
    assert logs[0] == logs[1]


def test_the_generator_step_leaves_the_discriminators_gradients_alone():
    model, discriminator = cgn.MnistCGN(), cgn.Discriminator()
    discriminator.requires_grad_(False)
    y = torch.tensor([1, 2])
    cgn.generator_loss(torch.zeros(2), discriminator(model(torch.randn(2, 32), y).image, y)).backward()
    assert all(p.grad is None for p in discriminator.parameters()) and all(p.grad is not None for p in model.parameters())


def test_a_run_folder_of_another_run_is_refused_and_kept(trained):
    before = {path.name: path.read_bytes() for path in trained.iterdir()}
    with pytest.raises(ValueError, match="another seed, lr"):
        cgn.train(tiny_config(seed=4, lr=1e-2), *tiny_data(), trained)
    assert {path.name: path.read_bytes() for path in trained.iterdir()} == before


def test_ctrl_c_ends_the_step_and_writes_its_checkpoint(trained, tmp_path, monkeypatch):
    interval, calls = cgn.mask_interval, []

    def press(*arguments):
        calls.append(1)
        if len(calls) == 4:
            signal.raise_signal(signal.SIGINT)
        return interval(*arguments)

    monkeypatch.setattr(cgn, "mask_interval", press)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)               # it is ignored in the background
    with pytest.raises(KeyboardInterrupt):
        cgn.train(tiny_config(sheet_every=6), *tiny_data(), tmp_path / "run")
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] == 4 and not cgn.stopping()
    cgn.train(tiny_config(sheet_every=6), *tiny_data(), tmp_path / "run")
    a, b = (torch.load(folder / "checkpoint.pt", weights_only=True)["model"] for folder in (tmp_path / "run", trained))
    assert all(torch.equal(a[key], b[key]) for key in a)

    def press_twice(*arguments):
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(ValueError, match="not finite"):                             # a broken state is not saved
        calls.clear()
        cgn.train(tiny_config(sheet_every=6, log_every=6, mask=float("nan")), *tiny_data(), tmp_path / "nan")
    assert not (tmp_path / "nan" / "checkpoint.pt").exists()
    monkeypatch.setattr(cgn, "mask_interval", press_twice)
    with pytest.raises(KeyboardInterrupt):
        cgn.train(tiny_config(), *tiny_data(), tmp_path / "twice")
    assert not (tmp_path / "twice" / "checkpoint.pt").exists() and signal.signal(signal.SIGINT, before) is signal.default_int_handler


def test_a_checkpoint_of_another_run_is_refused_without_its_log(trained, imagenet_ensemble, tmp_path):
    for source, words in ((trained / "checkpoint.pt", "another seed"), (imagenet_ensemble, "another model")):
        shutil.copy(source, tmp_path / "checkpoint.pt")
        with pytest.raises(ValueError, match=words):
            cgn.train(tiny_config(seed=4), *tiny_data(), tmp_path)
    assert not (tmp_path / "log.jsonl").exists()


def test_a_row_is_appended_whole_or_not_at_all(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))                     # a full disk
    try:
        with pytest.raises(OSError, match="log.jsonl could not be written .*make room"):
            for step in range(9):
                cgn.append_row(tmp_path / "new" / "log.jsonl", {"step": step, "loss": 0.123456789012345})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [row["step"] for row in cgn.read_lines(tmp_path / "new" / "log.jsonl")] == [0, 1]


def test_a_loss_that_is_not_finite_stops_the_run_and_names_its_terms(tmp_path):
    with pytest.raises(ValueError, match="not finite.*last checkpoint is kept"):
        cgn.train(tiny_config(mask=float("nan")), *tiny_data(), tmp_path)


def test_sheets_do_not_change_the_model(trained, tmp_path):
    model = cgn.load(trained / "checkpoint.pt")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    cgn.save_training_sheet(model, model.config["names"], tmp_path / "again.png", 3)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert (tmp_path / "again.png").read_bytes() == (trained / "sheet-000006.png").read_bytes()


def test_a_folder_of_pictures_trains_like_a_variant(tmp_path):
    for label, color in (("cat", (200, 10, 10)), ("dog", (10, 200, 10))):
        (tmp_path / "pictures" / label).mkdir(parents=True)
        for k in range(3):
            Image.new("RGB", (40 + 10 * k, 50), color).save(tmp_path / "pictures" / label / f"{k}.png")
    images, labels, names = cgn.load_images(str(tmp_path / "pictures"))
    assert images.shape == (6, 3, 32, 32) and names == ["cat", "dog"] and labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert images[0, :, 5, 5].tolist() == [200, 10, 10]
    result = script("cgn.py", "--dataset", tmp_path / "pictures", "--steps", 2, "--batch", 4, "--out", tmp_path / "run")
    assert result.returncode == 0, result.stderr
    assert cgn.load(tmp_path / "run" / "checkpoint.pt").classes == 2
    with open(tmp_path / "pictures" / "cat" / "0.png", "rb") as file:               # one picture less, and it is another run
        whole = file.read()
    (tmp_path / "pictures" / "cat" / "0.png").unlink()
    one_line(script("cgn.py", "--dataset", tmp_path / "pictures", "--steps", 2, "--batch", 4, "--out", tmp_path / "run"), "another images")
    for name, content in (("broken.png", b"no picture"), ("cut.png", whole[:len(whole) // 2])):
        (tmp_path / "pictures" / "cat" / name).write_bytes(content)
        one_line(script("cgn.py", "--dataset", tmp_path / "pictures", "--out", tmp_path / "run2"), name)
        (tmp_path / "pictures" / "cat" / name).unlink()


def test_own_pictures_are_read_as_they_are_meant_to_be_seen(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    Image.fromarray(np.full((8, 8), 0x4000, np.uint16)).save(folder / "0.png")      # a quarter of 16 bits
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(folder / "1.png")                # nothing but transparency
    (folder / "._0.png").write_bytes(b"a file of macOS")
    (folder / "Thumbs.db").write_bytes(b"a file of Windows")
    (tmp_path / ".ipynb_checkpoints").mkdir()
    images, labels, names = cgn.load_images(str(tmp_path))
    assert names == ["a"] and labels.tolist() == [0, 0] and images[:, :, 0, 0].tolist() == [[63] * 3, [255] * 3]


# ------------------------------------------------------------------------------------------------------------ cgn: sampling

@pytest.mark.parametrize("per_shape", [1, 4])
def test_counterfactuals_are_a_pure_function_of_seed_and_index(trained, per_shape):
    model = cgn.load(trained / "checkpoint.pt")
    whole = cgn.counterfactuals(model, 22, 5, per_shape, batch=22)
    parts = cgn.counterfactuals(model, 18, 5, per_shape, batch=5)
    for a, b in zip(whole[1:], parts[1:]):
        assert torch.equal(a[:18], b)
    assert (whole.images[:18].int() - parts.images.int()).abs().max() <= 1
    assert not torch.equal(cgn.counterfactuals(model, 22, 6, per_shape).shape, whole.shape)


def test_counterfactuals_of_one_shape_share_mask_and_label_and_nothing_else(trained):
    model = cgn.load(trained / "checkpoint.pt")
    u, y, arrangement = cgn.draw(model, 7, range(40), per_shape=4)
    groups = u[0].reshape(10, 4, -1), y[0].reshape(10, 4)
    assert all((group == group[:, :1]).all() for group in groups) and len(groups[0][:, 0].unique(dim=0)) == 10
    for k in (1, 2):
        assert len(u[k].unique(dim=0)) == 40
        assert (y[k].reshape(10, 4) != y[k].reshape(10, 4)[:, :1]).any()
    assert len(arrangement.flatten(1).unique(dim=0)) > 30
    single = cgn.draw(model, 7, range(40), per_shape=1)
    assert torch.equal(single[0][1:], u[1:]) and len(single[0][0].unique(dim=0)) == 40


def test_counterfactuals_show_what_each_mechanism_makes_of_its_own_noise_and_label(trained):
    model = cgn.load(trained / "checkpoint.pt")
    sample, labels = cgn.counterfactual_batch(model, 2, range(4, 8), per_shape=4)
    u, y, arrangement = cgn.draw(model, 2, range(4, 8), 4)
    assert torch.equal(labels, y)
    with torch.no_grad():
        expected = model(tuple(u), tuple(y), arrangement)
    for made, wanted in zip(sample[:4], expected):
        assert torch.allclose(made, wanted, atol=1e-5)


def test_counterfactual_labels_are_uniform_and_independent(trained):
    _, y, _ = cgn.draw(cgn.load(trained / "checkpoint.pt"), 0, range(4000), per_shape=1)
    for k in range(3):
        assert (y[k].bincount(minlength=10) / 4000 - 0.1).abs().max() < 0.02
        assert abs((y[k] == y[k - 1]).double().mean() - 0.1) < 0.02


def test_a_gans_samples_are_all_new_and_carry_one_label(tmp_path):
    cgn.train(tiny_config(model="gan", steps=2), *tiny_data(), tmp_path)
    data = cgn.counterfactuals(cgn.load(tmp_path / "checkpoint.pt"), 12)
    assert torch.equal(data.shape, data.foreground) and torch.equal(data.shape, data.background)
    assert len(data.images.flatten(1).unique(dim=0)) == 12


def test_the_written_data_set_holds_what_counterfactuals_gives(trained, tmp_path):
    result = script("cgn.py", "--checkpoint", trained / "checkpoint.pt", "--counterfactuals", 12, "--per-shape", 3, "--seed", 2,
                    "--out", tmp_path / "set.pt")
    assert result.returncode == 0, result.stderr
    held = torch.load(tmp_path / "set.pt", weights_only=True)
    expected = cgn.counterfactuals(cgn.load(trained / "checkpoint.pt"), 12, 2, 3)
    assert held["names"][9] == "digit 9" and (held["seed"], held["per_shape"]) == (2, 3)
    assert all(torch.equal(held[key], value) for key, value in expected._asdict().items() if key != "images")
    assert (held["images"].int() - expected.images.int()).abs().max() <= 1


@pytest.mark.parametrize("what", ["shape", "texture", "background", "all"])
def test_interpolations_move_only_what_they_name(trained, what):
    model = cgn.load(trained / "checkpoint.pt")
    images = cgn.interpolate(model, what, seed=1, rows=2, columns=5)
    assert images.shape == (2, 5, 3, 32, 32) and images.dtype == torch.uint8
    assert (images[:, 0] != images[:, -1]).any()
    corner = images[..., :1, :1].int()                                              # the margin shows the background alone
    assert (corner.amax(1) - corner.amin(1) <= 1).all() == (what in ("shape", "texture"))
    with pytest.raises(ValueError, match="cannot interpolate 'color'"):
        cgn.interpolate(model, "color")


# ---------------------------------------------------------------------------------------------------------------- classify

def test_the_classifier_is_the_papers():
    model = classify.Classifier()
    sizes, h = [], torch.zeros(2, 3, 32, 32)
    for layer in model:
        h = layer(h)
        if isinstance(layer, torch.nn.Conv2d):
            sizes.append(tuple(h.shape[1:]))
    assert sizes == [(32, 28, 28), (32, 14, 14), (64, 7, 7), (64, 7, 7)] and h.shape == (2, 10)


@pytest.mark.parametrize("training", (True, False))
def test_the_classifier_computes_what_its_layers_do_one_after_the_other(training):
    torch.manual_seed(0)
    fast = classify.Classifier().double().train(training)
    with torch.no_grad():
        for tensor in (*fast[0].parameters(), *list(fast[0].buffers())[:2]):
            tensor.uniform_(0.5, 1.5)
    plain, x, y = copy.deepcopy(fast), torch.rand(8, 3, 32, 32, dtype=torch.double), torch.arange(8)
    for scores in (fast(x), torch.nn.Sequential(*plain)(x)):
        F.cross_entropy(scores, y).backward()
    assert torch.allclose(fast(x), torch.nn.Sequential(*plain)(x), rtol=1e-9)
    assert all(torch.allclose(a.grad, b.grad, atol=1e-12) for a, b in zip(fast.parameters(), plain.parameters()))
    assert torch.allclose(fast[0].running_mean, plain[0].running_mean) and torch.allclose(fast[0].running_var, plain[0].running_var)


def test_a_classifier_trained_on_biased_images_reads_their_colors_not_their_digits():
    """The first row of Table 2 in small: 150 steps."""
    real, val = (mnist_variants.load("double-colored", split) for split in ("train", "val"))
    model = classify.fit(classify.sources("original", real, "shape", None), 150)
    predictions = classify.predict(model, val.images[:2000])
    by_color = (predictions == val.foreground[:2000]) | (predictions == val.background[:2000])
    assert by_color.double().mean() > 0.5 and evaluate.accuracy(predictions, val.shape[:2000]) < 0.2


def test_fit_is_a_pure_function_of_its_seed():
    images, labels = tiny_data()
    first, again = (classify.fit([(images, labels, 8)], 4, seed=1) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters()))


def test_the_irm_penalty_is_the_squared_derivative_by_a_dummy_scale():
    generator = torch.Generator().manual_seed(0)
    half, y = torch.randn(6, 10, dtype=torch.float64, generator=generator), torch.arange(6)
    z = half.repeat_interleave(2, dim=0)                                            # both halves of the batch are the same
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    derivative, = torch.autograd.grad(F.cross_entropy(scale * half, y), scale)
    assert abs(classify.irm_penalty(z, y.repeat_interleave(2)) - derivative ** 2) < 1e-12
    with pytest.raises(ValueError, match="not 1"):
        classify.irm_penalty(z[:1], y[:1])
    risk = classify.erm([half, -half], [y, y], 0.5)
    assert abs(classify.irm([half, -half], [y, y], 0.0) - risk) < 1e-12             # at first the plain risk
    penalty = (classify.irm_penalty(half, y) + classify.irm_penalty(-half, y)) / 2
    assert abs(classify.irm([half, -half], [y, y], 0.5) - (risk + penalty / 2)) < 1e-12
    assert torch.autograd.gradcheck(lambda z: classify.irm([z, -z], [y, y], 0.3), (half.clone().requires_grad_(),))


def test_brighter_channels_by_hand():
    x = torch.full((3, 3, 4, 4), -0.5)
    x[0, :, 1, 1:3] = torch.tensor([-1.0, 0.0, 1.0])[:, None]       # the digit: darker, brighter, brighter
    x[0, :, 2, 1:3] = torch.tensor([-0.4, -0.6, -0.6])[:, None]     # nearer to the background
    x[1, 0, 2, 2] = 0.0
    assert classify.brighter_channels(x).tolist() == [0b011, 0b100, 0b000]


def test_lntl_unlearns_along_the_reversed_gradient(monkeypatch):
    h = torch.tensor([1.0, -2.0], requires_grad=True)
    seen = classify.reverse_gradient(h)
    assert torch.equal(seen, h)
    (h ** 3 + seen ** 2).sum().backward()
    assert torch.allclose(h.grad, 3 * h.detach() ** 2 - classify.LNTL_REVERSAL * 2 * h.detach())
    unlearned = classify.fit_lntl((*tiny_data(), 64), 1, 1)
    monkeypatch.setattr(classify, "LNTL_REVERSAL", 0.0)                             # nothing is unlearned
    plain = classify.fit_lntl((*tiny_data(), 64), 1, 1)
    changed = [not torch.equal(a, b) for a, b in zip(plain.parameters(), unlearned.parameters())]
    assert changed == [True] * 6 + [False] * 6      # batch norm and two convolutions, but not what is behind the features


def test_lntl_knows_no_brightness_or_contrast():
    normalise, model = classifier = classify.fit_lntl((*tiny_data(), 64), 1)
    assert not classifier.training
    x = cgn.to_float(tiny_data()[0])
    gain, shift = torch.tensor([[0.5, 0.8, 2.0], [0.2, 0.0, -0.1]])[:, :, None, None]
    assert torch.allclose(classifier(x), classifier(gain * x + shift), atol=0.01)
    means = []
    for layer in (model[3], model[5]):                              # of what the features' two convolutions give, in each image
        layer[0].register_forward_hook(lambda norm, given, out: means.append(out.mean(dim=(2, 3))))
    model.features(normalise(x))
    assert len(means) == 2 and max(mean.abs().max() for mean in means) < 1e-4


def test_sources_mix_in_the_stated_numbers():
    real, generated = (mnist_variants.Variant(torch.zeros(1), *(torch.tensor([k + 3 * i]) for k in range(3))) for i in range(2))
    assert [(y.item(), n) for _, y, n in classify.sources("original", real, "background", None)] == [(2, 64)]
    assert [(y.item(), n) for _, y, n in classify.sources("cgn", real, "foreground", generated)] == [(4, 64)]
    for method, share in classify.REAL_SHARE.items():
        mixed = classify.sources(f"original+{method}", real, "foreground", generated)
        assert [(y.item(), n) for _, y, n in mixed] == [(1, share), (4, 64 - share)]


def test_the_table_runs_end_to_end_and_is_not_computed_twice(tmp_path, few_images):
    command = ("classify.py", "--dataset", "colored", "--method", "irm-2", "lntl", "original+gan", "original+cgn", "--seeds", 0,
               "--count", 100, "--steps", 3, "--generator-steps", 2, "--runs", tmp_path)
    result = script(*command)
    assert result.returncode == 0, result.stderr
    assert re.search(r"\| original\+cgn \| \d+\.\d ± 0\.0 \| \d+\.\d ± 0\.0 \|", (tmp_path / "table-shape.md").read_text())
    rows = (tmp_path / "results.jsonl").read_text()
    assert [json.loads(row)["steps"] for row in rows.splitlines()] == [3 * classify.IRM_STEPS["colored"], 2, 3, 3]
    assert all(0 <= json.loads(row)["test"] <= 1 for row in rows.splitlines())
    assert script(*command).returncode == 0 and (tmp_path / "results.jsonl").read_text() == rows
    one_line(script(*command, "--generator-steps", 3), "colored-gan-0", "another")     # and not the result of two steps
    one_line(script(*command, "--shuffle", "puzzle"), "colored-cgn-0", "shuffle")


def test_the_figure_runs_end_to_end(few_images):
    result = script("classify.py", "--figure", "--dataset", "colored", "--dry-run")
    assert result.returncode == 0 and "figure7-colored.png" in result.stdout, result.stderr
    assert result.stdout.count("colored, original+cgn, seed 0") == 5


def test_the_cause_is_looked_for_in_environments(tmp_path, monkeypatch):
    """A classifier that reads the foreground is right where the foreground agrees with the class: as often as it does."""
    monkeypatch.setitem(mnist_variants.SPLITS, "train", slice(200))                 # on which nothing is trained here
    monkeypatch.setattr(classify, "fit", lambda sources, *arguments, **options: sources[0][1])
    monkeypatch.setattr(classify, "train_generator", lambda *arguments: None)
    monkeypatch.setattr(classify, "generate", lambda *arguments: mnist_variants.Variant(*("images", *classify.LABELS)))
    worlds = {}

    def load(name, split, *, agreement=None, load=mnist_variants.load, **options):
        world = load(name, split, agreement=agreement, **options)
        worlds[id(world.images)] = world
        return world

    monkeypatch.setattr(mnist_variants, "load", load)
    monkeypatch.setattr(classify, "predict", lambda label, images: getattr(worlds[id(images)], label))
    args = classify.build_parser().parse_args(["--cause", "--dataset", "double-colored", "--seeds", "0", "--runs", str(tmp_path)])
    rows = [[float(cell.split(" ±")[0]) for cell in line.split("| ")[2:]] for line in classify.table5(args, "double-colored").splitlines()[2:]]
    assert [row[0] for row in rows] == [100, 100, 100]
    for row, agreement in zip(rows, (90, 95, 100)):
        assert row[1:] == pytest.approx([agreement, agreement], abs=1)
    one_line(script("classify.py", "--cause", "--dataset", "colored", "--runs", tmp_path), "no background label")
    assert classify.build_parser().parse_args(["--cause"]).dataset is None          # then all that have backgrounds


def test_the_vae_loss_by_hand_and_its_picture(tmp_path, few_images):
    x, made = torch.ones(1, 3, 1, 1), torch.tensor([0.0, 1.0, -1.0]).view(1, 3, 1, 1)
    mean, log_variance = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, np.log(2.0)]])
    expected = (1 + 0 + 4) / 2 + 3 * (1 + (2 - 1 - np.log(2))) / 2
    assert classify.vae_loss(x, made, mean, log_variance, 3.0).item() == pytest.approx(expected)
    model, noise = classify.VAE(), torch.tensor([[1.0, -1.0]])
    x = torch.zeros(1, 3, 32, 32)
    made, mean, log_variance = model(x, noise)
    assert made.shape == x.shape and torch.allclose(made, model.decoder(mean + noise * (log_variance / 2).exp()))
    result = script("classify.py", "--latents", "--dataset", "colored", "--steps", 100, "--runs", tmp_path)
    assert result.returncode == 0, result.stderr
    picture = np.array(Image.open(tmp_path / "figure6-colored.png"))
    made = picture[18:, -10 * 66:].reshape(10, 66, 10, 66, 3)[:, :64, :, :64]                  # the grid, without its white lines
    assert picture.shape[0] == 18 + 10 * 66 and made.max(axis=(1, 3, 4)).min() > 40             # no picture is black


def test_curves_are_drawn_with_name_and_scale(tmp_path):
    classify.save_curves(tmp_path / "c.png", {"a": [(10, 50.0), (1000, 90.0)], "b": [(10, 60.0), (1000, 80.0)]}, "title")
    pixels = np.array(Image.open(tmp_path / "c.png")).reshape(-1, 3)
    for color in ((0, 0x72, 0xB2), (0xD5, 0x5E, 0)):
        assert (pixels == color).all(1).sum() > 100


# ---------------------------------------------------------------------------------------------------------------- evaluate

def test_accuracy_and_confusion_by_hand():
    labels, predictions = torch.tensor([0, 0, 1, 2, 2]), torch.tensor([0, 1, 1, 2, 0])
    assert abs(evaluate.accuracy(predictions, labels) - 0.6) < 1e-12
    assert evaluate.confusion(predictions, labels, 3).tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 1]]
    for bad in ((torch.tensor([]), torch.tensor([])), (torch.tensor([1]), torch.tensor([1, 2]))):
        with pytest.raises(ValueError):
            evaluate.accuracy(*bad)
    with pytest.raises(ValueError, match="not in 0..1"):
        evaluate.confusion(predictions, labels, 2)


def test_mean_and_sample_standard_deviation_by_hand():
    assert evaluate.mean_std([1.0, 2.0, 4.0]) == pytest.approx((7 / 3, (7 / 3) ** 0.5))
    assert evaluate.mean_std([2.0]) == (2.0, 0.0)
    with pytest.raises(ValueError):
        evaluate.mean_std([])


def test_top_k_accuracy_by_hand():
    scores, labels = torch.tensor([[0.1, 0.5, 0.4], [0.6, 0.3, 0.1], [0.2, 0.3, 0.5]]), torch.tensor([2, 2, 2])
    assert [evaluate.top_k_accuracy(scores, labels, k) for k in (1, 2, 3)] == pytest.approx([1 / 3, 2 / 3, 1])
    with pytest.raises(ValueError, match="the 4 highest of 3"):
        evaluate.top_k_accuracy(scores, labels, 4)


def test_inception_score_by_hand():
    assert evaluate.inception_score(torch.eye(4).repeat(25, 1), 1) == pytest.approx((4, 0))     # sure and even: the class count
    assert evaluate.inception_score(torch.full((10, 4), 0.25), 5) == pytest.approx((1, 0))
    p = torch.tensor([[0.5, 0.5], [1.0, 0.0]])
    expected = np.exp((0.5 * np.log(0.5 / 0.75) + 0.5 * np.log(0.5 / 0.25) + np.log(1 / 0.75)) / 2)
    assert evaluate.inception_score(p, 1)[0] == pytest.approx(expected)
    mean, std = evaluate.inception_score(torch.eye(5).repeat(21, 1), 10)            # 105 rows: parts of 11 and of 10
    assert 3 < mean < 5 and 0 < std < 1                                             # shuffled: no part is even
    for bad in ((p, 3), (p, 0), (2 * p, 1), (p[0], 1)):
        with pytest.raises(ValueError):
            evaluate.inception_score(*bad)


def test_categories_and_imagenet9_have_the_published_sizes():
    categories = evaluate.cue_conflict_categories()
    sizes = {"airplane": 1, "bear": 4, "bicycle": 2, "bird": 49, "boat": 5, "bottle": 7, "car": 3, "cat": 6, "chair": 4, "clock": 3,
             "dog": 109, "elephant": 2, "keyboard": 2, "knife": 1, "oven": 1, "truck": 8}
    assert {name: len(set(indices)) for name, indices in categories.items()} == sizes and sum(sizes.values()) == 207
    classes = torch.tensor(evaluate.imagenet9_map())
    assert len(classes) == 1000 and (classes >= 0).sum() == 370
    for index, number in ((151, 0), (171, -1), (268, 0), (7, 1), (146, 1), (407, 2), (880, 2), (33, 3), (299, 4), (326, 5), (889, 6),
                          (384, 7), (0, 8), (397, 8), (999, -1)):
        assert classes[index] == number, index


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"published decisions are not in {SHARED}")
@pytest.mark.parametrize("name, percent, hits", [
    ("squeezenet1_1_session-1", 18.22, (133, 597)), ("squeezenet1_1_train_60_epochs_lr0.001_session-1", 79.02, (467, 124)),
    ("alexnet_session_1", 42.94, (283, 376))])
def test_published_decisions_give_the_published_shape_bias(name, percent, hits):
    folder = SHARED / "oracles" / "cue_conflict"
    result = script("evaluate.py", "--cue-conflict", folder / f"style-transfer-512-nomask-experiment_{name}.csv")
    assert f"| decisions | {percent} % | {hits[0]} | {hits[1]} | 1280 |" in result.stdout, result
    lines = (folder / "categories.txt").read_text().splitlines()
    table = dict(line.split("\t") for line in lines if not line.startswith("#"))
    assert evaluate.cue_conflict_categories() == {name: evaluate._indices(text) for name, text in table.items()}


def test_shape_bias_by_hand():
    shape, texture = ["cat", "cat", "dog", "dog", "car"], ["dog", "dog", "cat", "dog", "oven"]
    assert evaluate.shape_bias(["cat", "dog", "dog", "dog", "cat"], shape, texture) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="undefined"):
        evaluate.shape_bias(["oven"] * 4 + ["cat"], shape, texture)
    with pytest.raises(ValueError, match="4 decisions for 5 shapes"):
        evaluate.shape_bias(["cat"] * 4, shape, texture)
    probabilities = torch.zeros(2, 1000)
    probabilities[0, 152:200] = 0.01                                                # 47 dogs, of 109: less on average than one knife
    probabilities[0, 499], probabilities[1, 385] = 0.006, 1.0
    assert evaluate.cue_conflict_decisions(probabilities) == ["knife", "elephant"]


def test_a_table_of_decisions_with_a_mistake_is_one_line(tmp_path):
    for content, word in (("file,choice\na,cat\n", "decision or object_response"), ("file,decision\n", "no row"),
                          ("file,decision\ncat1-dog2.png,cow\n", "'cow' is none of the 16"),
                          ("file,decision\ncat.png,cat\n", "'cat.png'"), ("file,decision\ncat1-dog2.png,car\n", "undefined")):
        (tmp_path / "d.csv").write_text(content)
        one_line(script("evaluate.py", "--cue-conflict", tmp_path / "d.csv"), word)


def test_disentanglement_of_perfect_hidden_and_swapped_mechanisms():
    """Labels are grey levels: the mask's in row 0, the foreground's in row 1, the background's in row 2 of a 4 x 4 picture."""
    labels = torch.arange(10).repeat(20)
    other = (labels + torch.randint(1, 10, labels.shape, generator=torch.Generator().manual_seed(0))) % 10

    def level(y):
        return (y.float() / 9)[:, None, None, None]

    def parts(y):
        m = torch.zeros(len(y), 1, 4, 4)
        m[:, :, 0], m[:, :, 1] = level(y)[:, 0], 1.0
        f, b = (level(y).expand(-1, 3, 4, 4).clone() for _ in range(2))
        f[:, :, 0], b[:, :, 0] = 1.0, 0.0
        return cgn.Sample(m, f, b, None)

    def reader(row):
        return lambda x: -(x[:, 0, row, 0, None] * 9 - torch.arange(10)).abs()

    made, real, readers = parts(labels), parts(other), [reader(0), reader(1), reader(2)]
    result = evaluate.disentanglement(made, labels, real[:3], readers)
    assert torch.equal(result.table, torch.eye(3, dtype=torch.float64)) and result.swapped == []
    for texture in made[1:3]:                                                       # rows 0 of f and b are the same always
        assert evaluate.hidden_digits(texture, labels, reader(0)) == pytest.approx(0.1)

    made.foreground[:, :, 0] = level(labels)[:, 0]                                  # now the digit shows in f as well
    made.foreground[labels == 4, :, 1] = 0.0                                        # and b looks more like a 4's f than f does
    result = evaluate.disentanglement(made, labels, real[:3], readers)
    assert result.swapped == [4] and evaluate.hidden_digits(made.foreground, labels, reader(0)) == 1.0
    assert evaluate.hidden_digits(made.foreground, labels, lambda x: F.pad(reader(0)(x), (0, 1), value=0.5)) == 0.0     # 10: none


def test_mask_iou_by_hand():
    a = torch.tensor([[1.0, 0.9, 0.0, 0.2], [0, 0, 0, 0], [1, 0, 0, 0]])[:, None, None]
    b = torch.tensor([[1.0, 0.0, 0.8, 0.6], [0, 0, 0, 0], [0, 1, 0, 0]])[:, None, None]
    assert evaluate.mask_iou(a, b) == pytest.approx((1 / 4 + 1 + 0) / 3)


def test_predictions_of_any_system_are_judged(tmp_path):
    (tmp_path / "p.csv").write_text("label,prediction,file\n0,0,a\n1,0,b\n1,1,c\n2,1,d\n")
    result = script("evaluate.py", "--predictions", tmp_path / "p.csv", "--out", tmp_path / "p.json")
    assert "| predictions | 4 | 50.00 % |" in result.stdout and "| 2 | 0 | 1 | 0 |" in result.stdout
    assert json.loads((tmp_path / "p.json").read_text())["confusion"] == [[1, 0, 0], [1, 1, 0], [0, 1, 0]]
    (tmp_path / "p.csv").write_text("label,prediction\n0,0 1 2 3 4 5\n5,0 1 2 3 4 5\n4,0 1 2 3 4 5\n999,0 1 2 3 4 5\n")
    result = script("evaluate.py", "--predictions", tmp_path / "p.csv")
    assert "| accuracy | samples | top-1 | top-5 |" in result.stdout and "| predictions | 4 | 25.00 % | 50.00 % |" in result.stdout
    assert len(result.stdout.splitlines()) == 3                                     # no table of a thousand classes
    for content, word in (("label,guess\n0,0\n", "no column prediction"), ("label,prediction\n", "no row"),
                          ("label,prediction\n0,cat\n", "cat"), ("label,prediction\n0\n", "no prediction"), ("label,prediction\n0,1 2\n0,1\n", "whole numbers"),
                          ("label,prediction\n-1,0\n", "-1")):
        (tmp_path / "p.csv").write_text(content)
        one_line(script("evaluate.py", "--predictions", tmp_path / "p.csv"), word)


def test_the_mechanisms_table_of_a_checkpoint(trained, tmp_path, few_images):
    result = script("evaluate.py", "--cgn", trained / "checkpoint.pt", "--samples", 50, "--reader-steps", 3,
                    "--out", tmp_path / "d.json")
    assert result.returncode == 0, result.stderr
    assert [line.split(":")[0] for line in result.stdout.splitlines()[:3]] == [
        "reader of shapes", "reader of foregrounds", "reader of shapes or none"]    # colored has no label of b
    assert "| background | – | – | – |" in result.stdout and "swapped classes" in result.stdout
    number = r"\d+\.\d"
    assert re.search(rf"\| f (\| {number} ){{6}}\|\n\| b (\| {number} \| – ){{3}}\|\n", result.stdout)
    held = json.loads((tmp_path / "d.json").read_text())
    columns = [held[name] for name in ("must_be_named", "may_be_none", "any_digit")]
    assert all(0 <= value <= 1 for f, b in columns for value in (f["generated"], f["real"], b["generated"]))
    assert all(b["real"] is None for _, b in columns)
    assert all(own["generated"] <= some["generated"] + 1e-6 for own, some in zip(*columns[1:]))


# ------------------------------------------------------------------------------------------------------------------ biggan

ORACLES = SHARED / "oracles"
needs_oracles = pytest.mark.skipif(not ORACLES.is_dir(), reason=f"stored outputs of other implementations are not in {ORACLES}")


def raw_biggan(blocks, attention, classes=20, noise=8, embedding=8, seed=0):
    """A raw state dict with random numbers, 51 distinct rows of statistics included."""
    with torch.device("meta"):
        model = biggan.BigGAN(blocks, attention, classes, noise, embedding)
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for key, value in model.state_dict().items():
        numbers = torch.randn(value.shape, generator=generator)
        if key.endswith(("weight_u", "weight_v")):
            numbers = F.normalize(numbers, dim=0)
        elif key.endswith("running_vars"):
            numbers = 0.5 + numbers.square()
        elif key.endswith("running_means"):
            numbers *= 0.1
        state[key] = numbers
    for key in [key for key in state if key.endswith("weight_orig")]:               # u and v near the largest singular value's
        matrix = state[key].flatten(1)
        u, v = key.replace("weight_orig", "weight_u"), key.replace("weight_orig", "weight_v")
        for _ in range(3):
            state[v] = F.normalize(matrix.T @ state[u], dim=0)
            state[u] = F.normalize(matrix @ state[v], dim=0)
    return state


RELEASED = [(2048, 2048), (2048, 2048), (2048, 2048), (2048, 1024), (1024, 1024), (1024, 1024), (1024, 1024), (1024, 512),
            (512, 512), (512, 256), (256, 256), (256, 128)]                         # 256 x 256 pixels
SMALL = [(32, 32), (32, 16), (16, 16), (16, 8)]                                     # 16 x 16 pixels


def plain_biggan(state, z, y, row, channels=None):
    """BigGAN-deep line by line from a raw dict, every norm recomputed and nothing left out, in the dict's own precision."""
    def weight(name):
        matrix = state[f"{name}.weight_orig"]
        return matrix / (state[f"{name}.weight_u"] @ matrix.flatten(1) @ state[f"{name}.weight_v"])

    def conv(name, x):
        kernel = weight(name)
        return F.conv2d(x, kernel, state.get(f"{name}.bias"), padding=kernel.shape[-1] // 2)

    def norm(name, x):
        mean, var = state[f"{name}.running_means"][row], state[f"{name}.running_vars"][row]
        x = (x - mean[:, None, None]) / (var[:, None, None] + 1e-4).sqrt()
        scale = 1 + condition @ weight(f"{name}.scale").T
        return F.relu(x * scale[:, :, None, None] + (condition @ weight(f"{name}.offset").T)[:, :, None, None])

    condition = torch.cat([z, state["embeddings.weight"][:, y].T], 1)
    x = condition @ weight("generator.gen_z").T + state["generator.gen_z.bias"]
    x = x.view(len(z), 4, 4, -1).permute(0, 3, 1, 2).contiguous()
    number, block = 0, 0
    while any(key.startswith(f"generator.layers.{number}.") for key in state):
        name = f"generator.layers.{number}"
        number += 1
        if f"{name}.gamma" in state:
            theta = conv(f"{name}.snconv1x1_theta", x).flatten(2)
            phi, g = (F.max_pool2d(conv(f"{name}.snconv1x1_{part}", x), 2).flatten(2) for part in ("phi", "g"))
            attended = g @ torch.softmax(theta.transpose(1, 2) @ phi, -1).transpose(1, 2)
            x = x + state[f"{name}.gamma"] * conv(f"{name}.snconv1x1_o_conv", attended.view(len(x), -1, *x.shape[2:]))
            continue
        h = conv(f"{name}.conv_0", norm(f"{name}.bn_0", x))
        h = norm(f"{name}.bn_1", h)
        if block % 2:
            h, x = F.interpolate(h, scale_factor=2), F.interpolate(x, scale_factor=2)
        h = conv(f"{name}.conv_2", norm(f"{name}.bn_2", conv(f"{name}.conv_1", h)))
        h = conv(f"{name}.conv_3", norm(f"{name}.bn_3", h))
        x = x[:, :h.shape[1]] + h
        block += 1
    x = F.batch_norm(x, state["generator.bn.running_means"][row], state["generator.bn.running_vars"][row],
                     state["generator.bn.weight"], state["generator.bn.bias"], False, 0.0, 1e-4)
    return torch.tanh(conv("generator.conv_to_rgb", F.relu(x)))[:, :3]


@needs_oracles
@pytest.mark.parametrize("resolution", [128, 256])
@pytest.mark.parametrize("frozen", [True, False])
def test_biggan_equals_stored_outputs_of_another_implementation(resolution, frozen):
    stored = torch.load(ORACLES / f"biggan-deep-{resolution}-narrow.pt", weights_only=True)
    model = biggan.load(stored["state_dict"], frozen=frozen)
    assert model.resolution == resolution and model.classes == stored["num_classes"]
    for truncation, expected in stored["outputs"].items():
        with torch.no_grad():
            found = model(stored["z"], stored["y"], float(truncation))
        difference = (found - expected).abs().max()
        print(f"BigGAN-deep-{resolution}, narrow, truncation {truncation}: maximal difference {difference:.1e}")
        assert difference <= 1e-5


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"tables of the released files are not in {SHARED}")
@pytest.mark.parametrize("resolution", [128, 256, 512])
def test_biggan_has_the_keys_and_shapes_of_the_released_files(resolution):
    table = (SHARED / "state_dicts" / f"biggan-deep-{resolution}.txt").read_text().splitlines()
    rows = dict(line.split("\t") for line in table if not line.startswith("#"))
    with torch.device("meta"):
        state = {key: torch.empty([int(size) for size in shape.split("x")]) for key, shape in rows.items()}
        model = biggan._build(state, "table")
    assert {key: value.shape for key, value in model.state_dict().items()} == {key: value.shape for key, value in state.items()}
    assert model.resolution == resolution and model.noise == 128


@pytest.fixture(scope="module")
def released_size():
    """Random weights in the shapes of the released file for 256 pixels."""
    return raw_biggan(RELEASED, 8, 1000, 128, 128)


def test_biggan_equals_the_plain_forward_at_full_size(released_size):
    """The plain forward in float64. Relative error 1e-4."""
    z, y = biggan.truncated_noise(1, seed=3), torch.tensor([207])
    with torch.no_grad():
        expected = plain_biggan({key: value.double() for key, value in released_size.items()}, z.double(), y, 50)
        found = biggan.load(released_size)(z, y, 1.0)
    error = (found - expected).norm() / expected.norm()
    print(f"BigGAN-deep-256, full size: relative error {error:.1e}")
    assert error <= 1e-4 and expected.std() > 0.1


@beside
def test_frozen_biggan_takes_less_than_two_thirds_of_the_plain_forwards_time():
    """The best of four runs each, taken in turns on one thread, in seconds of the processor: other programs do not count."""
    state = raw_biggan(RELEASED, 8, 1000, 128, 128)
    model, z, y = biggan.load(state), biggan.truncated_noise(1, seed=3), torch.tensor([207])
    seconds = [], []
    with torch.no_grad():
        for _ in range(4):
            for times, run in zip(seconds, (lambda: plain_biggan(state, z, y, 50), lambda: model(z, y, 1.0))):
                started = time.process_time()
                run()
                times.append(time.process_time() - started)
    plain, frozen = map(min, seconds)
    print(f"frozen {frozen:.2f} s, plain {plain:.2f} s, on one thread")
    assert frozen <= 0.65 * plain


def test_every_row_of_statistics_is_met_and_what_lies_between_is_interpolated():
    state = raw_biggan(SMALL, 2)
    norm = biggan.load(state).generator["bn"]
    for row in range(1, 51):
        assert torch.equal(biggan._row(norm.running_means, row / 50), state["generator.bn.running_means"][row])
    between = 0.25 * state["generator.bn.running_vars"][13] + 0.75 * state["generator.bn.running_vars"][14]
    assert torch.allclose(biggan._row(norm.running_vars, 0.275), between, atol=1e-5)


def test_three_channels_give_the_gradients_of_all():
    """The last convolution makes the 3 channels that are seen; the norm of its weight still sees them all."""
    state = {key: value.double() for key, value in raw_biggan(SMALL, 2).items()}
    model = biggan.load(state, frozen=False).double()
    model.load_state_dict(state)
    z, y = torch.randn(2, 8, dtype=torch.float64), torch.tensor([3, 19])
    model(z, y, 0.4).square().sum().backward()
    names = [name for name, _ in model.named_parameters()]
    leaves = {name: state[name].clone().requires_grad_() for name in names}
    plain_biggan({**state, **leaves}, z, y, 20).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad - leaves[name].grad).norm() <= 1e-9 * (1e-6 + leaves[name].grad.norm()), name


def test_held_norms_give_the_same_images_and_gradients():
    """Two batches between hold and release: one division, and the gradient of both."""
    model = biggan.load(raw_biggan(SMALL, 2), frozen=False).double()
    z, y = torch.randn(4, 8, dtype=torch.float64), torch.tensor([3, 19, 0, 7])
    plain = model(z, y, 0.4)
    plain.square().sum().backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    with model.held():
        for part in (slice(0, 1), slice(1, 4)):
            held = model(z[part], y[part], 0.4)
            assert torch.allclose(held, plain[part], atol=1e-12)
            held.square().sum().backward()
        with pytest.raises(ValueError, match="held already"), model.held():
            pass
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter.grad, expected[name], rtol=1e-9, atol=1e-12), name


def test_class_weights_and_labels_agree_and_what_does_not_fit_is_refused():
    model = biggan.load(raw_biggan(SMALL, None))
    z, y = torch.randn(2, 8), torch.tensor([1, 19])
    assert torch.allclose(model(z, y, 0.5), model(z, F.one_hot(y, 20).float(), 0.5), atol=1e-6)
    assert model(z, y, 0.5).shape == (2, 3, 16, 16)
    for arguments, words in (((z, y, 0.0), "truncation 0.0"), ((z, y, 1.5), "truncation 1.5"), ((z[:, :5], y, 1.0), "noise"),
                             ((z, torch.tensor([1, 20]), 1.0), "class 20 is not in 0..19"), ((z, torch.zeros(2, 19), 1.0), "19"),
                             ((z, y[:1], 1.0), "another N"), ((z, y[:, None], 1.0), "labels of shape")):
        with pytest.raises(ValueError, match=words):
            model(*arguments)


def test_truncated_noise_is_cut_and_seeded():
    z = biggan.truncated_noise(2000, truncation=0.5, seed=1)
    assert z.shape == (2000, 128) and z.abs().max() <= 1 and abs(z.std() / 0.5 - 0.8796) < 0.01     # of a normal cut at 2
    assert torch.equal(z, biggan.truncated_noise(2000, truncation=0.5, seed=1))


def test_power_iteration_finds_the_largest_singular_value():
    layer = biggan.Conv(4, 6, 3)
    torch.nn.init.normal_(layer.weight_orig)
    for _ in range(200):
        layer.power_iteration()
    assert abs(torch.linalg.svdvals(layer.weight().detach().flatten(1))[0] - 1) < 1e-4


@pytest.mark.parametrize("change, words", [
    (lambda state: state.pop("generator.bn.bias"), "lacks generator.bn.bias"),
    (lambda state: state.update(extra=torch.zeros(1)), "too much: extra"),
    (lambda state: state.update({"generator.layers.1.conv_1.bias": torch.zeros(9)}), r"conv_1.bias has shape \(9,\), expected \(8,\)"),
    (lambda state: [state.pop(f"generator.layers.{k}.conv_1.bias") for k in (0, 1, 3, 4)], "(lacks .*){4}"),
    (lambda state: state["generator.layers.0.conv_0.weight_orig"].view(-1)[5].fill_(float("nan")), "not finite"),
    (lambda state: state.pop("generator.layers.0.conv_0.weight_orig"), "no BigGAN-deep"),
    (lambda state: state.update({"generator.gen_z.bias": state["generator.gen_z.bias"].long()}), "gen_z.bias holds torch.int64"),
    (lambda state: state["generator.bn.running_vars"][3].fill_(-1), "bn.running_vars holds negative variances"),
    (lambda state: state.update({"generator.gen_z.bias": None}), "gen_z.bias is no dense tensor"),
    (lambda state: state.update({"generator.gen_z.bias": torch.zeros(1).expand(512)}), "claims more numbers than are stored"),
    (lambda state: state.clear(), "no BigGAN-deep"),
])
def test_a_raw_dict_that_does_not_fit_is_refused_with_every_difference(change, words):
    state = raw_biggan(SMALL, 2)
    change(state)
    with pytest.raises(ValueError, match=words):
        biggan.load(state)


def test_files_that_run_code_are_cut_off_or_of_another_network_are_one_line(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    torch.save({"embeddings.weight": Evil()}, tmp_path / "evil.pt")
    torch.save(raw_biggan(SMALL, 2), tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    (tmp_path / "short.pt").write_bytes(whole[:len(whole) // 2])
    torch.save(u2net.U2Net().state_dict(), tmp_path / "other.pt")
    torch.save({1: torch.zeros(1)}, tmp_path / "numbered.pt")
    for name in ("evil.pt", "short.pt", "other.pt", "numbered.pt", "nowhere.pt"):
        one_line(script("biggan.py", "--weights", tmp_path / name), name)
    for option in (("--truncation", 0), ("--truncation", 1.5), ("--classes", "1000"), ("--classes", "ostrich"), ("--count", 0)):
        one_line(script("biggan.py", "--weights", tmp_path / "whole.pt", "--out", tmp_path / "x.png", *option), str(option[1]))
    assert not (tmp_path / "ran").exists() and not (tmp_path / "x.png").exists()
    result = script("biggan.py", "--weights", tmp_path / "whole.pt", "--classes", "3,7", "--out", tmp_path / "x.png")
    assert result.returncode == 0 and "SHA-256" in result.stdout, result.stderr
    assert Image.open(tmp_path / "x.png").size[1] == 22 + 2 * 18


def test_old_and_new_file_formats_load_alike(tmp_path):
    state = raw_biggan(SMALL, 2)
    torch.save(state, tmp_path / "new.pt")
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    z, y = torch.randn(1, 8), torch.tensor([0])
    assert torch.equal(biggan.load(tmp_path / "new.pt")(z, y), biggan.load(tmp_path / "old.pt")(z, y))
    assert torch.equal(state["generator.gen_z.weight_orig"], torch.load(tmp_path / "new.pt")["generator.gen_z.weight_orig"])


def test_imagenet_names_and_numbers_name_classes():
    assert biggan.class_numbers("207, ostrich,9", 1000) == {207: "golden retriever", 9: "ostrich"}
    everything = biggan.class_numbers(",".join(map(str, range(1000))), 1000)
    assert list(everything.values()) == ResNet50_Weights.IMAGENET1K_V1.meta["categories"]
    with pytest.raises(ValueError, match="did you mean ostrich"):
        biggan.class_numbers("Ostric", 1000)


def test_a_listed_file_with_another_hash_is_refused_and_an_unlisted_hash_is_printed(tmp_path, capsys):
    for module in (biggan, u2net):
        name = biggan.WEIGHTS if module is biggan else "u2netp.pth"
        (tmp_path / name).write_bytes(b"something else")
        with pytest.raises(ValueError, match=f"{name} has SHA-256 [0-9a-f]+, but weights.txt lists"):
            module.find_weights(tmp_path / name)
        (tmp_path / "mine.pth").write_bytes(b"abc")
        module.find_weights(tmp_path / "mine.pth")
        assert "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad" in capsys.readouterr().out


def test_weights_that_cannot_be_fetched_are_named_with_size_address_and_place(tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    monkeypatch.setattr(u2net, "download_file_from_google_drive", fail)
    for module, name, size, address in ((biggan, biggan.WEIGHTS, "234411737", "https://s3.amazonaws.com/.*/biggan-deep-256"),
                                        (u2net, "u2net.pth", "176290937", "https://drive.google.com/file/d/1ao1")):
        with pytest.raises(ValueError, match=f"{tmp_path}.*{name} is missing.*no network.*put the {size} bytes of {address}.* there"):
            module.find_weights(tmp_path / "weights" / name)
        assert not any((tmp_path / "weights").glob("*"))


def test_fetched_weights_with_another_hash_are_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(u2net, "download_file_from_google_drive", lambda key, folder, name: (Path(folder) / name).write_bytes(b"?"))
    monkeypatch.setattr(u2net, "__file__", str(tmp_path / "u2net.py"))
    (tmp_path / "weights.txt").write_text("u2net.pth | 1 | 00ff | - | https://drive.google.com/file/d/1 | u2net.py\n")
    with pytest.raises(ValueError, match="u2net.pth has SHA-256 [0-9a-f]+, but weights.txt lists 00ff"):
        u2net.find_weights(tmp_path / "u2net.pth")
    assert [path.name for path in tmp_path.iterdir()] == ["weights.txt"]


def test_weights_txt_agrees_with_the_modules():
    rows = [line.split(" | ") for line in (HERE / "weights.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(len(row) == 6 for row in rows)
    hashes = {row[0]: row[2] for row in rows}
    for name, (_, sha256) in mnist_variants.MNIST_FILES.items():
        assert hashes[f"{name}.gz"] == sha256
    for row in rows:
        for folder in ("weights", "data/mnist"):
            if (HERE / folder / row[0]).exists() and row[1]:
                assert (HERE / folder / row[0]).stat().st_size == int(row[1])


def test_a_small_biggan_learns_and_its_statistics_are_measured():
    """Two flat colours: after 150 steps each class shows its own, and frozen statistics give what batch statistics gave."""
    torch.manual_seed(0)
    colors = torch.tensor([[220, 30, 30], [30, 30, 220]], dtype=torch.uint8)
    labels = torch.arange(64) % 2
    images = colors[labels][:, :, None, None].expand(-1, 3, 8, 8)
    model = biggan.BigGAN([(32, 32), (32, 16)], None, 2, 8, 8)
    losses = []
    model = biggan.train(model, biggan.Discriminator((16, 32), None, 2), images, labels, steps=150, batch=16, lr=1e-3, average=0.9,
                         report=lambda step, row: losses.append(row))
    biggan.measure_statistics(model, batches=2, batch=50)
    norm = model.generator["bn"]
    assert len(losses) == 3 and (norm.running_vars[1:] > 0).all() and not torch.equal(norm.running_means[25], norm.running_means[50])
    frozen = biggan.load(model.state_dict())
    with torch.no_grad():
        x = frozen(biggan.truncated_noise(20, 8, 1.0, seed=0), torch.arange(20) % 2, 1.0)
    mean = x.mean((2, 3)).view(10, 2, 3).mean(0)
    assert mean[0, 0] > mean[0, 2] + 0.5 and mean[1, 2] > mean[1, 0] + 0.5, mean


def test_the_discriminator_sees_packs_of_one_class():
    """Images whose grey value is their class: in a pack all are of it, real ones and labels in the same order."""
    seen = []

    class Judge(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(()))

        def forward(self, x, y):
            seen.append((x, y))
            return self.weight * x.mean(dim=(1, 2, 3))

    judge, labels = Judge(), torch.arange(60) % 3 // 2 * 2                          # class 1 has no image
    images = (100 * labels).byte()[:, None, None, None].expand(-1, 3, 8, 8)
    torch.manual_seed(0)                        # with some weights real images lead by 1 from the start: no gradient
    model = biggan.BigGAN([(32, 32), (32, 16)], None, 3, 8, 8)
    biggan.train(model, judge, images, labels, steps=2, batch=12, pack=3, noise=0.0)
    both, y = seen[0]
    assert both.shape == (8, 9, 8, 8) and seen[1][0].shape == (4, 9, 8, 8) and set(y.tolist()) == {0, 2}
    assert torch.allclose(both[:4], (100 * y[:4].float() / 127.5 - 1)[:, None, None, None]) and torch.equal(y[:4], y[4:])
    own = biggan.Discriminator([16], classes=3, channels=9)
    before = own.head.weight_orig.clone()
    biggan.train(model, own, images, labels, steps=1, batch=12, pack=3)
    assert own.head.weight_orig.shape[1] == 9 and not torch.equal(own.head.weight_orig, before)
    with pytest.raises(ValueError, match="12 images .* packs of 5"):
        biggan.train(model, judge, images, labels, steps=1, batch=12, pack=5)


def test_each_row_of_measured_statistics_is_that_of_its_truncation():
    """One batch a row: with the same draws, stored statistics give what the batch's own gave."""
    torch.manual_seed(0)
    model, generator = biggan.BigGAN([(32, 32), (32, 16)], None, 2, 8, 8), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.rand_like(parameter))                # means far from 0, so that they count
    biggan.measure_statistics(model, batches=1, batch=30, seed=5)
    with torch.no_grad():
        for row in range(biggan.ROWS):
            y = torch.randint(2, (30,), generator=generator)
            z = biggan.truncated_noise(30, 8, row / 50, generator=generator)
            if row:
                assert torch.allclose(model(z, y, None), model(z, y, row / 50), atol=1e-3), row


def test_measured_statistics_of_many_batches_are_those_of_all_draws():
    torch.manual_seed(0)
    model, generator = biggan.BigGAN([(32, 32), (32, 16)], None, 2, 8, 8), torch.Generator().manual_seed(5)
    biggan.measure_statistics(model, batches=3, batch=30, seed=5)
    inputs = []
    hook = model.generator["layers"][0].bn_0.register_forward_pre_hook(lambda module, arguments: inputs.append(arguments[0]))
    with torch.no_grad():
        for row in (0, 1):
            inputs.clear()
            for _ in range(3):
                y = torch.randint(2, (30,), generator=generator)
                model(biggan.truncated_noise(30, 8, row / 50, generator=generator), y, None)
    var, mean = torch.var_mean(torch.cat(inputs), (0, 2, 3), correction=0)
    norm = model.generator["layers"][0].bn_0
    assert torch.allclose(norm.running_means[1], mean, atol=1e-5) and torch.allclose(norm.running_vars[1], var, atol=1e-5)


@pytest.mark.parametrize("frozen", [True, False])
def test_loading_a_dict_leaves_it_alone_and_only_frozen_weights_have_no_gradient(frozen):
    state = raw_biggan(SMALL, 2)
    before = {key: value.clone() for key, value in state.items()}
    model = biggan.load(state, frozen=frozen)
    model(torch.randn(1, 8), torch.tensor([1]), 0.5)
    assert all(torch.equal(state[key], before[key]) for key in before)
    assert all(parameter.requires_grad is not frozen for parameter in model.parameters())


def test_a_sheet_shows_the_models_own_pixels(tmp_path):
    model = biggan.load(raw_biggan(SMALL, 2))
    biggan.save_sheet(model, {3: "a", 7: "b"}, 2, 0.5, 1, tmp_path / "s.png")
    x = model(biggan.truncated_noise(2, 8, 0.5, 1), torch.tensor([7, 7]), 0.5)[1]
    found = np.array(Image.open(tmp_path / "s.png"))[22 + 18:22 + 18 + 16, 150 + 18:150 + 18 + 16]
    assert np.abs(found - ((x.permute(1, 2, 0).numpy() + 1) * 127.5)).max() <= 0.51


def test_the_discriminator_scores_by_class_and_attends():
    torch.manual_seed(0)
    d = biggan.Discriminator((16, 32, 32), 1, 3)
    kinds = [type(layer).__name__ for layer in d.layers]
    assert kinds == ["DiscriminatorBlock"] * 2 + ["Attention"] + ["DiscriminatorBlock"] * 2
    x = torch.randn(3, 3, 16, 16)
    scores = torch.stack([d(x, torch.full((3,), k)) for k in range(3)])
    assert scores.shape == (3, 3) and not torch.allclose(scores[0], scores[1])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak memory from Linux's /proc")
@pytest.mark.parametrize("allocator, bound", [({}, 380), ({"MALLOC_MMAP_THRESHOLD_": "131072"}, 340)])
@pytest.mark.parametrize("zipped", [True, False])
def test_biggan_in_little_memory(tmp_path, zipped, allocator, bound):
    """234 MB of weights are loaded and one image is made in 380 MB more than importing torch takes; in 340 where glibc's
    threshold for mmap stays at its initial 128 KiB. By default it moves with what is freed, and what the heap keeps varies.
    """
    code = f"""
import sys; sys.path.insert(0, {str(HERE)!r})
import torch
def peak():
    return next(int(line.split()[1]) / 1000 for line in open("/proc/self/status") if line.startswith("VmHWM"))
before = peak()
import biggan
with torch.no_grad():
    biggan.load({str(tmp_path / 'w.pt')!r})(biggan.truncated_noise(1, seed=0), torch.tensor([1]))
biggan.class_numbers("ostrich", 1000)           # which must not import torchvision: that alone takes 170 MB
print(before, peak())
"""
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in biggan.BigGAN(RELEASED, 8).state_dict().items()}
    torch.save({key: torch.full(shape, 0.01) for key, shape in shapes.items()}, tmp_path / "w.pt",
               _use_new_zipfile_serialization=zipped)
    assert (tmp_path / "w.pt").stat().st_size > 234e6
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                            env={**os.environ, **allocator})
    assert result.returncode == 0, result
    before, after = map(float, result.stdout.split())
    print(f"BigGAN-deep-256, {'memory-mapped' if zipped else 'old format'}: peak {after:.0f} MB, import torch {before:.0f} MB")
    assert after - before <= bound


# ------------------------------------------------------------------------------------------------------------------- u2net

@needs_oracles
def test_images_in_minus_one_to_one_give_another_mask_of_the_same_object():
    """What the CGN's authors feed, against ImageNet's mean and deviation: why cgn.ImagenetCGN.saliency normalises."""
    model, found = u2net.load(HERE / "weights" / "u2netp.pth"), {}
    for name in ("0002-01", "boat", "horse", "im_21", "long", "sailboat3"):
        x = F_image.to_tensor(Image.open(ORACLES / "u2netp" / f"{name}.png").convert("RGB"))[None]
        with torch.no_grad():
            found[name] = evaluate.mask_iou(model(u2net.normalise(x)), model(2 * x - 1))
    print("IoU of the masks:", {name: round(iou, 2) for name, iou in found.items()})
    assert all(iou > 0.75 for iou in found.values()) and min(found.values()) < 0.9


def random_u2net(stages=u2net.LITE, align_corners=False):
    """A U-2-Net in eval mode whose batch norms do something."""
    torch.manual_seed(0)
    model = u2net.U2Net(stages, align_corners)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                torch.nn.init.uniform_(tensor, 0.5, 1.5)
    return model.eval()


@needs_oracles
@pytest.mark.parametrize("name", ["0002-01", "boat", "horse", "im_21", "long", "sailboat3"])
def test_the_lite_network_equals_another_runtime(name):
    x = F_image.to_tensor(Image.open(ORACLES / "u2netp" / f"{name}.png").convert("RGB"))[None]
    expected = F_image.to_tensor(Image.open(ORACLES / "u2netp" / f"{name}.mask.png"))
    with torch.no_grad():
        found = u2net.load(HERE / "weights" / "u2netp.pth")(u2net.normalise(x))[0]
    difference = (found - expected).abs().max()
    print(f"lite U-2-Net, {name}: maximal difference {difference:.4f}")
    assert difference <= 1 / 255 + 1e-3


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"tables of the released files are not in {SHARED}")
@pytest.mark.parametrize("name, stages", [("u2net", u2net.FULL), ("u2netp", u2net.LITE)])
def test_u2net_has_the_keys_and_shapes_of_the_released_files(name, stages):
    table = (SHARED / "state_dicts" / f"{name}.txt").read_text().splitlines()
    rows = dict(line.split("\t") for line in table if not line.startswith("#"))
    with torch.device("meta"):
        found = {key: "x".join(map(str, value.shape)) or "scalar" for key, value in u2net.U2Net(stages).state_dict().items()}
    assert found == rows


def test_folding_batch_norms_changes_nothing_and_seven_maps_come_with_one():
    model = random_u2net(((3, 4, 8),) + ((8, 4, 8),) * 5 + ((16, 4, 8),) * 5)
    x = torch.randn(2, 3, 45, 38)
    with torch.no_grad():
        expected, found = model(x, maps=True), u2net.load(model.state_dict())(x, maps=True)
        assert len(found) == 7 and all(a.shape == (2, 1, 45, 38) and 0 <= a.min() <= a.max() <= 1 for a in found)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(expected, found))
        assert torch.equal(u2net.load(model.state_dict())(x), found[0])
        assert not torch.allclose(u2net.load(model.state_dict(), align_corners=True)(x), found[0], atol=1e-5)
    for shape in ((1, 3, 1, 1), (1, 3, 8, 100), (1, 1, 32, 32), (3, 32, 32)):
        with pytest.raises(ValueError, match="input of shape"):
            model(torch.zeros(shape))


def test_saliency_loss_sums_the_cross_entropies_of_all_maps():
    target, logits = torch.tensor([[[[0.0, 1.0]]]]), [torch.tensor([[[[0.0, 2.0]]]])] * 7
    expected = 7 * (np.log(2) + np.log1p(np.exp(-2))) / 2
    assert abs(u2net.saliency_loss(logits, target) - expected) < 1e-5


@beside
def test_a_small_u2net_learns_to_find_bright_squares():
    torch.manual_seed(0)
    masks = torch.zeros(64, 1, 32, 32, dtype=torch.uint8)
    for mask in masks:
        top, left = torch.randint(2, 20, (2,)).tolist()
        mask[:, top:top + 9, left:left + 9] = 255
    images = (masks // 2 + torch.randint(100, masks.shape)).expand(-1, 3, -1, -1)
    model = u2net.train(u2net.U2Net(((3, 4, 8),) + ((8, 4, 8),) * 5 + ((16, 4, 8),) * 5), images[:48], masks[:48], steps=120, batch=16)
    with torch.no_grad():
        found = model(u2net.normalise(images[48:].float() / 255)) > 0.5
    truth = masks[48:] > 0
    assert (found & truth).sum() / (found | truth).sum() > 0.7


def test_a_photo_becomes_a_mask_and_a_cutout_of_its_own_size(tmp_path):
    """A dark disc on a bright ground, taken with the camera on its side."""
    pixels = np.full((200, 300, 3), 220, np.uint8)
    y, x = np.mgrid[:200, :300]
    disc = (y - 100) ** 2 + (x - 150) ** 2 < 60 ** 2
    pixels[disc] = (90, 30, 30)
    exif = Image.Exif()
    exif[0x0112] = 6                                                                # turn by 90 degrees to see it
    Image.fromarray(pixels).save(tmp_path / "photo.jpg", exif=exif)
    result = script("u2net.py", tmp_path / "photo.jpg", "--out", tmp_path / "mask.png", "--cutout", tmp_path / "cutout.png")
    assert result.returncode == 0, result.stderr
    mask, cutout = Image.open(tmp_path / "mask.png"), Image.open(tmp_path / "cutout.png")
    assert mask.size == cutout.size == (200, 300) and mask.mode == "L" and cutout.mode == "RGBA"
    found, truth = np.array(mask) > 127, disc.T
    assert (found & truth).sum() / (found | truth).sum() > 0.9
    assert np.array_equal(np.array(cutout)[..., 3], np.array(mask))


def test_sixteen_bits_and_hidden_colors_are_read_as_they_are_seen(tmp_path):
    grey = np.linspace(0, 255, 64, dtype=np.uint8).reshape(8, 8).repeat(4, 0).repeat(4, 1)
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "16.png")
    assert np.array_equal(np.array(u2net.open_photo(tmp_path / "16.png")), np.stack([grey] * 3, 2))
    hidden = np.dstack([grey, grey, grey, np.where(grey > 100, 255, 0)]).astype(np.uint8)
    Image.fromarray(hidden, "RGBA").save(tmp_path / "alpha.png")
    seen = np.array(u2net.open_photo(tmp_path / "alpha.png"))
    assert (seen[grey <= 100] == 255).all() and np.array_equal(seen[grey > 100][:, 0], grey[grey > 100])
    Image.fromarray(np.zeros((20, 20), np.float32)).save(tmp_path / "float.tiff")
    with pytest.raises(ValueError, match="float.tiff has pixels of mode F"):
        u2net.open_photo(tmp_path / "float.tiff")


def test_photos_that_are_none_or_too_small_or_large_and_wrong_weights_are_one_line(tmp_path):
    (tmp_path / "text.jpg").write_text("no picture")
    Image.new("RGB", (1, 1)).save(tmp_path / "dot.png")
    Image.new("1", (10_000, 10_000)).save(tmp_path / "huge.png")
    torch.save(raw_biggan(SMALL, 2), tmp_path / "other.pth")
    state = u2net.U2Net().state_dict()
    state["side1.bias"] = torch.full((1,), float("inf"))
    torch.save(state, tmp_path / "inf.pth")
    Image.new("RGB", (40, 40)).save(tmp_path / "photo.png")
    for name, word in (("text.jpg", "does not open"), ("dot.png", "1 x 1"), ("huge.png", "10000 x 10000"), ("nowhere.jpg", "nowhere")):
        one_line(script("u2net.py", tmp_path / name, "--out", tmp_path / "mask.png"), name, word)
    for name, word in (("other.pth", "no U-2-Net"), ("inf.pth", "side1.bias"), ("nowhere.pth", "missing")):
        one_line(script("u2net.py", tmp_path / "photo.png", "--weights", tmp_path / name, "--out", tmp_path / "mask.png"), name, word)
    assert not (tmp_path / "mask.png").exists()


# ----------------------------------------------------------------------------------------------------------- cgn: ImageNet

@pytest.fixture(scope="module")
def networks():
    """State dicts of a teacher, a U-2-Net and VGG features, tiny; norms and statistics that do something."""
    torch.manual_seed(0)
    _, _, style = cgn.random_networks()
    for key, value in style.items():
        if value.is_floating_point():
            style[key] = 0.5 + torch.rand_like(value) if key.endswith("var") else value + 0.1 * torch.randn_like(value)
    saliency = random_u2net(((3, 4, 8),) + ((8, 4, 8),) * 5 + ((16, 4, 8),) * 5).state_dict()
    for key in saliency:                                            # about as many salient pixels as not, of a clear opinion
        if key == "outconv.bias":
            saliency[key] = saliency[key] * 0
    return raw_biggan([(16, 16)] * 6, 2, classes=10), saliency, style


def imagenet_model(networks, frozen=False):
    return cgn.ImagenetCGN(*(biggan.load(networks[0], frozen=frozen) for _ in range(3)), u2net.load(networks[1]))


def imagenet_config(**changes):
    return {"model": "imagenet", "dataset": "imagenet", "names": [f"class {k}" for k in range(10)], "seed": 3, "steps": 3,
            "align_corners": False, "batch": 1, "accumulate": 6, "lr": [1e-4, 2e-4, 3e-4], "truncation": 1.0, "patch": 5,
            "without": [], "bf16": False, "networks": {}, "sheet_every": 1, "relative_patch": False, "style_scales": [1.0, 1.0], **changes}


def imagenet_run(states, out, classifier=None, **changes):
    model = imagenet_model(states)
    cgn.train_imagenet(imagenet_config(**changes), model, biggan.load(states[0]), cgn.StyleFeatures(states[2]), out,
                       classifier=classifier)
    return model


def test_gram_matrices_and_the_perceptual_loss_by_hand():
    h = torch.tensor([[[[1.0, 2.0]], [[3.0, 4.0]]]])                                # two channels of 1 x 2 pixels
    assert torch.equal(cgn.gram(torch.cat([h, 2 * h])), torch.tensor([[[5.0, 11.0], [11.0, 25.0]], [[20.0, 44.0], [44.0, 100.0]]]) / 4)
    assert abs(cgn.perceptual([h, h], [0 * h, h]) / (25_000 * (5 + 11 + 11 + 25) / 16) - 1) < 1e-6


def test_patches_come_from_where_the_mask_is_highest_and_fill_a_grid():
    x = torch.arange(24 * 24).float().view(1, 1, 24, 24).expand(2, 3, 24, 24)
    m = torch.full((2, 1, 24, 24), 0.2)
    m[0, :, 2:6, 3:7], m[1, :, 15:19, 10:14] = 1.0, 0.9                             # one place of 4 x 4 pixels in each
    grid = cgn.patch_grid(x, m, torch.linspace(0, 0.999, 36).repeat(2, 1), patch=4)
    assert grid.shape == (2, 3, 24, 24)
    assert torch.equal(grid[0, 1], x[0, 0, 2:6, 3:7].repeat(6, 6)) and torch.equal(grid[1, 0], x[0, 0, 15:19, 10:14].repeat(6, 6))
    everywhere = cgn.patch_grid(x, torch.ones(2, 1, 24, 24), torch.linspace(0, 0.999, 36).repeat(2, 1), patch=4)
    assert len(everywhere[0, 0, ::4, ::4].unique()) == 36
    sides = cgn.relative_patch(torch.stack([torch.full((1, 24, 24), area) for area in (0.25, 0.25 / 4, 0.0001, 1.0)]), 4)
    assert sides.tolist() == [4, 2, 1, 8]                       # in proportion to the root of the object's area
    each = cgn.patch_grid(x, m, torch.zeros(2, 36), torch.tensor([4, 2]))
    assert torch.equal(each[:1], cgn.patch_grid(x[:1], m[:1], torch.zeros(1, 36), 4))
    assert torch.equal(each[1:], cgn.patch_grid(x[1:], m[1:], torch.zeros(1, 36), 2))
    leaf = x.clone().requires_grad_()
    assert not cgn.patch_grid(leaf, m, torch.zeros(2, 36), patch=4).requires_grad
    with pytest.raises(ValueError, match="patches of 25 pixels"):
        cgn.patch_grid(x, m, torch.zeros(2, 36), patch=25)


def test_style_features_are_vggs_after_four_pools(networks):
    layout = [layer for count in (2, 2, 3, 3) for layer in [4] * count + ["M"]]
    plain = cgn.make_layers(layout, batch_norm=True).eval()
    plain.load_state_dict({key.removeprefix("features."): value for key, value in networks[2].items()})
    x, h, expected = torch.rand(2, 3, 32, 32) * 2 - 1, None, []
    h = ((x + 1) / 2 - torch.tensor(u2net.MEAN)[:, None, None]) / torch.tensor(u2net.STD)[:, None, None]
    for layer in plain:
        h = layer(h)
        if isinstance(layer, torch.nn.MaxPool2d):
            expected.append(h)
    found = cgn.StyleFeatures(networks[2])(x)
    assert len(found) == 4 and all(torch.allclose(a, b, atol=1e-4) for a, b in zip(found, expected))
    with pytest.raises(ValueError, match="no state dict of vgg16_bn.*features.14.weight"):
        cgn.StyleFeatures({key: value for key, value in networks[2].items() if "features.14" not in key})


def test_an_imagenet_cgn_is_called_like_a_small_one(networks):
    model = imagenet_model(networks, frozen=True)
    u, y = [torch.randn(2, 8) for _ in range(3)], [torch.tensor([1, 9])] * 3
    before = model(u, y)
    assert before.mask.shape == (2, 1, 32, 32) and 0 <= before.mask.min() <= before.mask.max() <= 1
    assert all(part.shape == (2, 3, 32, 32) and part.abs().max() <= 1 for part in before[1:])
    assert torch.equal(before.image, cgn.compose(*before[:3]))
    for k in range(3):
        after = model([torch.randn(2, 8) if j == k else u[j] for j in range(3)], y)
        assert [torch.equal(a, b) for a, b in zip(before, after)][:3] == [j != k for j in range(3)]
    with pytest.raises(ValueError, match=r"is not in 0\.\.9"):
        model(u[0], torch.tensor([1, 10]))


def straight_line_terms(networks, raw, u, y, draws, patch):
    """Equation 4's terms line by line, in the precision of u: plain networks, nothing shared, nothing folded; `raw`: three raw
    dicts."""
    teacher = {key: value.to(u) for key, value in networks[0].items()}
    saliency_net = u2net.load(networks[1], frozen=False).to(u).eval().requires_grad_(False)
    widths = [len(networks[2][f"features.{number}.weight"]) for number in (0, 7, 14, 24)]
    layers = cgn.make_layers([layer for count, width in zip((2, 2, 3, 3), widths) for layer in [width] * count + ["M"]],
                             batch_norm=True).to(u).eval().requires_grad_(False)
    layers.load_state_dict({key.removeprefix("features."): value for key, value in networks[2].items()})
    mean, std = (torch.tensor(numbers).to(u)[:, None, None] for numbers in (u2net.MEAN, u2net.STD))

    def saliency(x):
        return saliency_net(((x + 1) / 2 - mean) / std)

    def grams(x):
        h, found = ((x + 1) / 2 - mean) / std, []
        for layer in layers:
            h = layer(h)
            if isinstance(layer, torch.nn.MaxPool2d):
                found.append(torch.einsum("nchw,ndhw->ncd", h, h) / h[0].numel())
        return found

    def style(a, b):
        return 25_000 * sum((p - q.detach()).abs().mean() for p, q in zip(grams(a), grams(b)))

    x_gt = plain_biggan(teacher, u, y, 50)
    pre, f, b = (plain_biggan(state, u, y, 50) for state in raw)
    m = saliency(pre)
    x = m * f + (1 - m) * b
    grid = cgn.patch_grid(x_gt, m, draws, patch).to(u)
    clamped, mean_mask = m.clamp(1e-4, 1 - 1e-4), m.mean((1, 2, 3))
    return {"l1": (x - x_gt).abs().mean(), "perceptual": style(x, x_gt),
            "binary": -(clamped * clamped.log2() + (1 - clamped) * (1 - clamped).log2()).mean(),
            "mask": ((0.1 - mean_mask).clamp(min=0) + (mean_mask - 0.9).clamp(min=0)).mean(),
            "texture": style(f, grid), "background": saliency(b).mean()}


def test_the_style_terms_are_scaled_and_the_others_are_not(networks, tmp_path, monkeypatch):
    step, seen = cgn.micro_step, []
    monkeypatch.setattr(cgn, "micro_step", lambda *arguments: seen.append(arguments[6]) or step(*arguments))
    imagenet_run(networks, tmp_path, steps=1, accumulate=1, style_scales=[0.001, 0.01])
    assert seen == [{"l1": 100, "perceptual": 0.005, "binary": 300, "mask": 500, "texture": 0.05, "background": 2000}]


@pytest.mark.parametrize("term", list(cgn.LAMBDAS))
def test_every_term_and_its_gradient_equal_the_straight_line(networks, term):
    """Through spectral norm, held or not, into the stored weights of all three mechanisms; float64, relative error 1e-5."""
    saliency = dict(networks[1])
    if term == "mask":                                              # masks that are too small, so that there is a loss
        saliency["outconv.bias"] = saliency["outconv.bias"] - 20
    networks = networks[0], saliency, networks[2]
    states = [{key: value.double() for key, value in raw_biggan([(16, 16)] * 6, 2, classes=10, seed=k).items()} for k in (1, 2, 3)]
    model = imagenet_model(networks).double()
    for part, state in zip((model.f_shape, model.f_text, model.f_bg), states):
        part.load_state_dict(state)
    teacher = biggan.load(networks[0], frozen=False).double()
    teacher.load_state_dict({key: value.double() for key, value in networks[0].items()})
    u, y, draws = cgn.draw_training(model, 0, range(2), 1.0)
    u = u.double()
    with torch.no_grad():
        x_gt = teacher(u, y, 1.0)
    with model.f_shape.held(), model.f_text.held(), model.f_bg.held():
        found = dict(cgn.imagenet_losses(model, *model(u, y)[:3], x_gt, cgn.StyleFeatures(networks[2]).double(), draws, patch=5,
                                         terms=[term]))
        found[term].backward()
    raw = []
    for part, state in zip((model.f_shape, model.f_text, model.f_bg), states):
        names = {name for name, _ in part.named_parameters()}
        raw.append({key: value.clone().requires_grad_() if key in names else value for key, value in state.items()})
    expected = straight_line_terms(networks, raw, u, y, draws, 5)[term]
    expected.backward()
    assert expected > 0 and abs(found[term] / expected - 1) < 1e-5
    checked = 0
    for part, leaves in zip((model.f_shape, model.f_text, model.f_bg), raw):
        for name, parameter in part.named_parameters():
            if leaves[name].grad is not None and leaves[name].grad.norm() > 0:
                assert (parameter.grad - leaves[name].grad).norm() <= 1e-5 * leaves[name].grad.norm(), name
                checked += 1
    assert checked > 50


def test_an_update_does_not_depend_on_how_its_images_are_cut(networks, tmp_path):
    runs = [imagenet_run(networks, tmp_path / str(batch), batch=batch, steps=2) for batch in (1, 4, 6)]
    before = networks[0]["generator.gen_z.weight_orig"]
    for other in runs[1:]:
        for a, b in zip(runs[0].parameters(), other.parameters()):
            assert torch.allclose(a, b, atol=2e-5)
    assert (runs[0].f_text.generator["gen_z"].weight_orig - before).abs().max() > 1e-4
    rows = [[json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()[1:]] for name in ("1", "6")]
    for a, b in zip(*rows):
        assert all(abs(a[name] - b[name]) <= 1e-4 * abs(a[name]) for name in (*cgn.LAMBDAS, "mask_mean"))


@beside
def test_two_processes_train_like_one(networks, tmp_path):
    torch.save(networks, tmp_path / "networks.pt")
    (tmp_path / "run.py").write_text(f"""
import sys; sys.path.insert(0, {str(HERE)!r})
import torch, torch.distributed as distributed, test_cgn
from pathlib import Path
torch.set_num_threads(1)
distributed.init_process_group("gloo")
test_cgn.imagenet_run(torch.load({str(tmp_path / 'networks.pt')!r}), Path({str(tmp_path / 'two')!r}), steps=2)
""")
    result = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29533",
                             str(tmp_path / "run.py")], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    imagenet_run(networks, tmp_path / "one", steps=2)
    one, two = (cgn.read_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("one", "two"))
    for name in ("f_shape", "f_text", "f_bg"):
        assert all(torch.allclose(one[name][key], two[name][key], atol=2e-5) for key in one[name])
    assert len((tmp_path / "two" / "log.jsonl").read_text().splitlines()) == 3


def test_a_term_that_is_not_finite_is_named_and_the_last_checkpoint_kept(networks, tmp_path):
    imagenet_run(networks, tmp_path, steps=1)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)               # as if two updates had been asked for
    torch.save({**state, "config": {**state["config"], "steps": 2}}, tmp_path / "checkpoint.pt")
    (tmp_path / "log.jsonl").unlink()
    before = (tmp_path / "checkpoint.pt").read_bytes()
    broken = {**networks[2], "features.0.bias": networks[2]["features.0.bias"] + 1e30}
    with pytest.raises(ValueError, match="update 2: perceptual, texture is not finite; the last checkpoint is kept"):
        imagenet_run((*networks[:2], broken), tmp_path, steps=2)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_a_stopped_imagenet_run_continues_bit_for_bit_without_frozen_networks_in_its_checkpoint(networks, tmp_path, monkeypatch):
    imagenet_run(networks, tmp_path / "whole")
    save, calls = cgn.save_imagenet_sheet, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        save(*arguments)

    monkeypatch.setattr(cgn, "save_imagenet_sheet", interrupted)
    with pytest.raises(KeyboardInterrupt):
        imagenet_run(networks, tmp_path / "parts")
    imagenet_run(networks, tmp_path / "parts")
    whole, parts = (cgn.read_checkpoint(tmp_path / name / "checkpoint.pt") for name in ("whole", "parts"))
    assert whole.keys() == {"config", "step", "f_shape", "f_text", "f_bg", "optimizer"}
    for name in ("f_shape", "f_text", "f_bg"):
        assert all(torch.equal(whole[name][key], parts[name][key]) for key in whole[name]), name
    with pytest.raises(ValueError, match="another accumulate"):
        imagenet_run(networks, tmp_path / "parts", accumulate=4)


@pytest.mark.parametrize("without, missing", [("shape", {"binary", "mask"}), ("text", {"texture"}), ("bg", {"background"}),
                                              ("rec", {"l1", "perceptual"})])
def test_losses_are_left_off_by_name(networks, tmp_path, without, missing):
    imagenet_run(networks, tmp_path, steps=1, accumulate=1, without=[without])
    row = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[1])
    assert set(cgn.LAMBDAS) - row.keys() == missing


def test_imagenet_checkpoints_load_and_go_to_the_authors_layout_and_back(networks, tmp_path):
    for name, state in zip(("teacher.pt", "saliency.pt"), networks):
        torch.save(state, tmp_path / name)
    trained = imagenet_run(networks, tmp_path, steps=1, networks={"saliency": str(tmp_path / "saliency.pt")})
    torch.save({f"module.{key}": value for key, value in cgn.export(tmp_path / "checkpoint.pt", tmp_path / "teacher.pt").items()},
               tmp_path / "cgn.pth")
    u, y = torch.randn(2, 8), torch.tensor([0, 9])
    own, theirs = cgn.load(tmp_path / "checkpoint.pt"), cgn.load(tmp_path / "cgn.pth")
    with torch.no_grad():
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(trained(u, y), own(u, y)))
        assert torch.equal(own(u, y).foreground, theirs(u, y).foreground)
    assert theirs.u2net.align_corners and not own.u2net.align_corners               # as the authors ran theirs
    keys = torch.load(tmp_path / "cgn.pth").keys()
    assert {key.split(".")[1] for key in keys} == {"biggan_GT", "f_shape", "f_text", "f_bg", "u2net"}
    one_line(script("cgn.py", "--checkpoint", tmp_path / "cgn.pth", "--export", "--out", tmp_path / "again.pth"), "cgn.pth")


@pytest.fixture(scope="module")
def imagenet_checkpoint(networks, tmp_path_factory):
    out = tmp_path_factory.mktemp("imagenet")
    torch.save(networks[1], out / "saliency.pt")
    imagenet_run(networks, out, steps=1, accumulate=1, networks={"saliency": str(out / "saliency.pt")})
    return out / "checkpoint.pt"


def test_an_imagenet_data_set_is_a_pure_function_of_its_index_and_is_continued(imagenet_checkpoint, tmp_path, monkeypatch):
    model = cgn.load(imagenet_checkpoint)
    cgn.write_counterfactuals(model, tmp_path / "whole", 11, seed=5, per_shape=3, batch=6)
    save, calls = mnist_variants.save_png, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        save(*arguments)

    monkeypatch.setattr(mnist_variants, "save_png", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cgn.write_counterfactuals(model, tmp_path / "parts", 11, seed=5, per_shape=3, batch=1)
    assert not (tmp_path / "parts" / "labels.csv").exists() and len(list((tmp_path / "parts").glob("*.png"))) == 4
    cgn.write_counterfactuals(model, tmp_path / "parts", 11, seed=5, per_shape=3, batch=1)
    assert len(calls) == 5 + 8                                                      # the first three were not made again
    rows = (tmp_path / "whole" / "labels.csv").read_text()
    assert rows == (tmp_path / "parts" / "labels.csv").read_text() and len(rows.splitlines()) == 12
    _, y, _ = cgn.draw(model, 5, range(11), 3)
    for index, row in enumerate(rows.splitlines()[1:]):
        assert row == f"{index:08d}.png,5,{index - index % 3},{y[0, index]},{y[1, index]},{y[2, index]}"
        a, b = (np.array(Image.open(tmp_path / name / row.split(",")[0])).astype(int) for name in ("whole", "parts"))
        assert a.shape == (32, 32, 3) and np.abs(a - b).max() <= 1
    with pytest.raises(ValueError, match="holds counterfactuals of another"):
        cgn.write_counterfactuals(model, tmp_path / "parts", 11, seed=6, per_shape=3)


def test_counterfactuals_show_what_the_cgn_makes_of_their_noise_and_labels(imagenet_checkpoint):
    model = cgn.load(imagenet_checkpoint)
    sample, labels = cgn.counterfactual_batch(model, 2, range(4, 8), per_shape=4, truncation=0.5)
    u, y, _ = cgn.draw(model, 2, range(4, 8), 4, 0.5)
    assert torch.equal(labels, y) and (y[0] == y[0, 0]).all() and u.abs().max() <= 1 and torch.equal(u[0, 0], u[0, 3])
    with torch.no_grad():
        expected = model(tuple(u), tuple(y), 0.5)
    for made, wanted in zip(sample[:4], expected):
        assert torch.allclose(made, wanted, atol=1e-5)


def test_counterfactuals_in_bfloat16_are_nearly_those_in_float32(imagenet_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(cgn, "bf16_pays", lambda wanted, device: wanted)
    for name, option in (("whole", ()), ("half", ("--bf16",))):
        result = script("cgn.py", "--checkpoint", imagenet_checkpoint, "--counterfactuals", 4, "--out", tmp_path / name, *option)
        assert result.returncode == 0, result.stderr
    whole, half = (np.stack([np.array(Image.open(path)).astype(int) for path in sorted((tmp_path / name).glob("*.png"))])
                   for name in ("whole", "half"))
    assert 0 < np.abs(whole - half).mean() < 5 and (tmp_path / "whole" / "labels.csv").read_text() == (tmp_path / "half" / "labels.csv").read_text()


def test_bfloat16_is_left_alone_where_the_cpu_only_emulates_it(monkeypatch, capsys):
    for supported in (True, False):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported and not including_emulation)
        for device in ("cpu", "cuda:1"):
            assert cgn.bf16_pays(True, device) == supported and not cgn.bf16_pays(False, device)
            assert ("computing in float32" in capsys.readouterr().out) != supported


def test_masks_and_backgrounds_are_written_beside_a_counterfactual(imagenet_checkpoint, tmp_path):
    model = cgn.load(imagenet_checkpoint)
    cgn.write_counterfactuals(model, tmp_path, 2, seed=3)
    cgn.write_counterfactuals(model, tmp_path, 2, seed=3, parts=("mask", "background"))        # adds what is not there
    sample, _ = cgn.counterfactual_batch(model, 3, range(2))
    for name, part in (("-mask", sample.mask * 2 - 1), ("-background", sample.background), ("", sample.image)):
        for index in range(2):
            written = F_image.pil_to_tensor(Image.open(tmp_path / f"0000000{index}{name}.png"))
            assert (written.int() - cgn.to_uint8(part[index]).int()).abs().max() <= 1
    assert len(list(tmp_path.glob("*.png"))) == 6 and len((tmp_path / "labels.csv").read_text().splitlines()) == 3


def test_the_inception_score_is_logged_with_every_sheet(networks, tmp_path, monkeypatch):
    torch.save(classify.Classifier().state_dict(), tmp_path / "classifier.pth")
    classifier = cgn.read_classifier(tmp_path / "classifier.pth")
    save, last = cgn.save_state, []

    def watched(path, state):                   # a run that is killed after it has saved must have lost no score
        last.append(json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1]).get("inception_score"))
        save(path, state)

    monkeypatch.setattr(cgn, "save_state", watched)
    imagenet_run(networks, tmp_path, steps=2, accumulate=1, sheet_every=1, scored=6, classifier=classifier)
    assert len(last) == 2 and None not in last
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    scores = {row["step"]: row["inception_score"] for row in rows if "inception_score" in row}
    torch.save(networks[1], tmp_path / "saliency.pt")
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    model = cgn.ImagenetCGN(*(biggan.load(state[name]) for name in ("f_shape", "f_text", "f_bg")), u2net.load(networks[1]))
    u, y, _ = cgn.draw_training(model, 0, range(6), 1.0)
    expected = evaluate.inception_score(classifier(model(u, y).image).softmax(dim=1), splits=1)[0]
    assert scores.keys() == {1, 2} and scores[2] == pytest.approx(expected, rel=1e-3)


def test_torchvisions_inception_reads_images_in_minus_one_to_one(tmp_path):
    from torchvision.models import inception_v3
    model = inception_v3(init_weights=False)
    torch.save(model.state_dict(), tmp_path / "inception.pth")
    x = torch.rand(1, 3, 299, 299) * 2 - 1
    with torch.no_grad():
        assert torch.allclose(cgn.read_classifier(tmp_path / "inception.pth")(x), model.eval()(x), atol=1e-5)
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="other.pth is no state dict of inception_v3"):
        cgn.read_classifier(tmp_path / "other.pth")


def test_the_triples_of_figure_24():
    names = [[name for _, name in cgn.parse_classes(",".join(map(str, row)), 1000, 3)] for row in cgn.FIGURE_24]
    assert len(names) == 25 and names[0] == ["school bus", "giant panda", "geyser"]
    assert names[13] == ["drilling platform", "ambulance", "breakwater"] and names[24] == ["teapot", "military uniform", "baseball"]


@pytest.mark.parametrize("options, size", [
    (("--outputs", "3"), (6, 5)), (("--triples", "1,2,3", "4,4,4"), (4, 2)), (("--interpolate", "all"), (8, 4)),
])
def test_imagenet_sheets(imagenet_checkpoint, tmp_path, options, size):
    result = script("cgn.py", "--checkpoint", imagenet_checkpoint, *options, "--out", tmp_path / "sheet.png")
    assert result.returncode == 0, result.stderr
    width, height = Image.open(tmp_path / "sheet.png").size
    side = 34 if "--interpolate" in options else 66                                 # small pictures are enlarged
    assert height == 18 + size[1] * side and width >= size[0] * side


def test_an_interpolation_moves_as_an_animation(trained, tmp_path):
    result = script("cgn.py", "--checkpoint", trained / "checkpoint.pt", "--interpolate", "all", "--out", tmp_path / "move.gif")
    assert result.returncode == 0, result.stderr
    animation = Image.open(tmp_path / "move.gif")
    assert animation.n_frames == 18 and animation.size == (320, 32)


@pytest.mark.parametrize("options, words", [
    (("--triples", "1,2"), ("'1,2' names 2 classes: 3 are needed",)), (("--triples", "1,2,10"), ("'10'", "0..9")),
    (("--outputs", "cat"), ("'cat'",)), (("--counterfactuals", "0"), ("at least 1",)), ((), ("--counterfactuals N",)),
])
def test_mistakes_in_sampling_imagenet_are_one_line(imagenet_checkpoint, tmp_path, options, words):
    one_line(script("cgn.py", "--checkpoint", imagenet_checkpoint, *options, "--out", tmp_path / "x"), *words)


def test_images_are_drawn_with_the_truncation_of_the_training(imagenet_checkpoint, tmp_path):
    state = torch.load(imagenet_checkpoint, weights_only=True)
    state["config"]["truncation"] = 0.5
    torch.save(state, tmp_path / "checkpoint.pt")
    for name, options, expected in (("a", (), 0.5), ("b", ("--truncation", 1), 1.0)):
        result = script("cgn.py", "--checkpoint", tmp_path / "checkpoint.pt", "--counterfactuals", 2, *options, "--out", tmp_path / name)
        assert result.returncode == 0, result.stderr
        assert json.loads((tmp_path / name / "settings.json").read_text())["truncation"] == expected


def test_the_imagenet_defaults_are_the_papers():
    """C.1 to C.3, as literals."""
    args = cgn.build_parser().parse_args(["--dataset", "imagenet"])
    assert [getattr(args, name) for name in ("mini", "steps", "accumulate", "batch", "lrs", "truncation", "patch")] == [False] + [None] * 6
    assert [cgn.PAPER[name] for name in ("steps", "accumulate", "batch", "lrs", "truncation", "patch")] == [
        300, 4000, 1, (8e-6, 1e-5, 1e-5), 1, 15]
    assert cgn.PATCHES ** 2 == 36
    assert list(cgn.LAMBDAS.values()) == [100, 5, 300, 500, 5, 2000]


def test_missing_big_networks_are_named(tmp_path, monkeypatch):
    def offline(*arguments):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setattr(u2net, "download_file_from_google_drive", offline)
    monkeypatch.setattr(cgn, "WEIGHTS", tmp_path)
    one_line(script("cgn.py", "--dataset", "imagenet", "--out", tmp_path / "run"), biggan.WEIGHTS, "u2net.pth", "vgg16_bn-6c64b313.pth",
             "no network", "--mini runs now")
    one_line(script("cgn.py", "--dataset", "imagenet", "--teacher", tmp_path / "teacher.bin", "--out", tmp_path / "run"), "teacher.bin")
    for option, word in ((("--lr", 1), "--lrs"), (("--shuffle", "puzzle"), "--shuffle"), (("--mini", "--model", "gan"), "--model")):
        one_line(script("cgn.py", "--dataset", "imagenet", *option, "--out", tmp_path / "run"), word)


def test_weights_are_found_by_their_bare_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert biggan.find_weights("mini-teacher.pth") == HERE / "weights" / "mini-teacher.pth"
    assert u2net.find_weights("u2netp.pth") == HERE / "weights" / "u2netp.pth"
    for find in (biggan.find_weights, u2net.find_weights):
        with pytest.raises(ValueError, match="it is no file"):
            find("/dev/zero")


def test_the_released_vgg_is_older_than_a_batch_norms_count(networks):
    style = {key: value for key, value in networks[2].items() if not key.endswith("num_batches_tracked")}
    x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert len(style) < len(networks[2])
    assert all(torch.equal(a, b) for a, b in zip(cgn.StyleFeatures(style)(x), cgn.StyleFeatures(networks[2])(x)))


@beside
def test_processes_that_find_other_folders_or_lose_one_another_say_so(tmp_path):
    """Rank 0 finds a checkpoint, rank 1 none, as on two machines without a common disk; then rank 1 ends."""
    (tmp_path / "0").mkdir()
    torch.save({"config": {"seed": 1}, "step": 7}, tmp_path / "0" / "checkpoint.pt")
    code = f"""
import os, sys; sys.path.insert(0, {str(HERE)!r})
import torch, cgn
from pathlib import Path
rank = 1 if os.fork() == 0 else 0
torch.distributed.init_process_group("gloo", init_method="file://{tmp_path}/meeting", rank=rank, world_size=2)
try:
    cgn.continue_together(Path({str(tmp_path)!r}) / str(rank), {{"seed": 1}}, {{}})
except ValueError as error:
    print(error)
if rank:
    os._exit(0)
try:
    torch.distributed.all_reduce(torch.zeros(1))
except RuntimeError as error:
    print(cgn.lost_process(error))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert result.stdout.count("steps 7, 0 in") >= 1 and "machines share" in result.stdout, result
    assert "another process of the run has ended" in result.stdout, result


def test_a_checkpoint_names_its_saliency_network_elsewhere_or_is_refused(imagenet_checkpoint, tmp_path):
    state = torch.load(imagenet_checkpoint, weights_only=True)
    moved = {**state, "config": {**state["config"], "networks": {"saliency": "/nowhere/u2net-of-mine.pth"}}}
    torch.save(moved, tmp_path / "moved.pt")
    one_line(script("cgn.py", "--checkpoint", tmp_path / "moved.pt", "--counterfactuals", 1, "--out", tmp_path / "a"), "u2net-of-mine.pth")
    result = script("cgn.py", "--checkpoint", tmp_path / "moved.pt", "--saliency", imagenet_checkpoint.parent / "saliency.pt",
                    "--counterfactuals", 1, "--out", tmp_path / "a")
    assert result.returncode == 0 and (tmp_path / "a" / "00000000.png").exists(), result
    for change in ({"f_text": "/dev/zero"}, {"config": 3}, {"config": {"model": "imagenet"}}):
        torch.save({**state, **change}, tmp_path / "bad.pt")
        for option in (("--counterfactuals", 1), ("--export",)):
            if option[0] != "--export" or "config" in change:
                one_line(script("cgn.py", "--checkpoint", tmp_path / "bad.pt", *option, "--out", tmp_path / "b"), "bad.pt")


def test_textures_are_made_as_many_at_a_time_as_asked(imagenet_checkpoint, monkeypatch):
    model, counts = cgn.load(imagenet_checkpoint), []
    whole, labels = cgn.counterfactual_batch(model, 1, range(6), per_shape=6)
    for mechanism in (model.f_shape, model.f_text, model.f_bg):
        mechanism.register_forward_hook(lambda module, given, made: counts.append(len(made)))
    parts, _ = cgn.counterfactual_batch(model, 1, range(6), per_shape=6, batch=4)
    assert counts == [1, 4, 2, 4, 2] and torch.allclose(parts.image, whole.image, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------- miniature

@beside
def test_the_miniature_is_made_trained_and_tabulated(tmp_path, monkeypatch, few_images):
    """Two steps of each network, of narrow ones, and of each CGN of Table 1: the commands fit together."""
    monkeypatch.setattr(miniature, "GENERATOR", ((8, 8),) * 6)
    monkeypatch.setattr(cgn, "WEIGHTS", tmp_path)
    for module in (biggan, u2net):
        monkeypatch.setattr(module, "find_weights", Path)           # whose hashes weights.txt does not list
    monkeypatch.setitem(cgn.MINI, "scored", 20)
    monkeypatch.setattr(biggan, "measure_statistics", partial(biggan.measure_statistics, batches=1, batch=4))
    miniature.main(["teacher", "saliency", "style", "classifier", "--steps", "2", "--bf16", "--out", str(tmp_path)])
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"mini-{name}.pth" for name in ("classifier", "saliency", "style", "teacher")]
    table = miniature.table1(tmp_path / "runs", samples=20, options=["--steps=2", "--accumulate=4", "--batch=4"])
    rows = [line.split(" | ") for line in table.splitlines()[2:]]
    assert [row[0] for row in rows] == ["| all", "| without shape", "| without text", "| without bg", "| without rec"]
    assert all(1 <= float(row[1]) <= 10 for row in rows)
    assert Image.open(tmp_path / "runs" / "masks.png").size == (620, 360)
    held = json.loads((tmp_path / "runs" / "mini-without-bg" / "log.jsonl").read_text().splitlines()[1])
    assert "background" not in held and "texture" in held
    table = miniature.tables34(tmp_path / "runs", steps=2, count=100)
    assert [line.split(" | ")[0] for line in table.splitlines()[2:]] == ["| real"] + [
        f"| real + CGN{head}" for head in ("/shape", "/texture", "/background", "/shape + texture", "")]
    table = miniature.patches(samples=20, steps=2).splitlines()[2:]
    assert [row.split(" | ")[0] for row in table] == ["| whole"] * 2 + ["| half as high"] * 2
    shares = [float(row.split(" | ")[2].split()[0]) for row in table]
    assert shares[3] > shares[2] + 10 and min(shares[0], shares[1], shares[3]) > 95
    draw, drawn = cgn.draw, []
    monkeypatch.setattr(cgn, "draw", lambda *given, truncation: drawn.append(truncation) or draw(*given, truncation=truncation))
    result = script("evaluate.py", "--cgn", tmp_path / "runs" / "mini" / "checkpoint.pt", "--samples", 20, "--reader-steps", 1)
    assert result.returncode == 0 and "IoU with what is salient" in result.stdout, result.stderr
    assert drawn == [cgn.MINI["truncation"]]


def test_the_miniatures_ensemble_learns_from_recombined_mechanisms(monkeypatch, imagenet_checkpoint, tmp_path):
    model = cgn.load(imagenet_checkpoint)
    model.truncation = 0.5
    (masks, f, _), _ = miniature.draw_parts(model, 3, seed=0)
    sample, _ = cgn.counterfactual_batch(model, 0, range(3), 1, truncation=0.5)
    assert set(masks.unique().tolist()) <= {0, 255} and torch.equal(f, cgn.to_uint8(sample.foreground))
    y = torch.arange(40) % 10
    masks = 255 * (torch.arange(32) < 3 * y[:, None, None, None] + 1).byte().expand(-1, 1, 32, -1)     # as wide as their label
    f, b = ((20 * y + start).byte()[:, None, None, None].expand(-1, 3, 32, 32) for start in (0, 10))
    seen = []
    monkeypatch.setattr(classify, "train_ensemble", lambda config, model, real, made, out: seen.append(next(made(5))))
    real = mnist_variants.Variant(f, y, y, y)
    miniature.train_ensemble(tmp_path, real, ([masks, f, b], torch.stack([y] * 3)), 1, 0)
    (x, labels), = seen
    assert x.shape == (60, 3, 32, 32) and len({tuple(row) for row in labels.tolist()}) > 50
    assert torch.equal((255 * x[:, 0, 0, 0]).round().long(), 20 * labels[:, 1])
    assert torch.equal((255 * x[:, 0, 0, -1]).round().long(), 20 * labels[:, 2] + 10)
    assert torch.equal((x[:, 0, 0] == x[:, 0, 0, :1]).sum(dim=1), 3 * labels[:, 0] + 1)


def test_a_fifth_of_the_saliency_networks_pictures_hold_no_digit(monkeypatch, tmp_path, few_images):
    seen = []
    monkeypatch.setattr(miniature, "make_saliency", lambda images, masks, *rest: seen.append((images, masks)) or {})
    miniature.make("saliency", tmp_path, steps=1)
    (images, masks), = seen
    assert (masks.flatten(1).amax(dim=1) == 0).nonzero().flatten().tolist() == list(range(0, len(masks), 5))
    parts, _ = mnist_variants.load_parts("wildlife", "train", agreement=0.1, seed=0)
    assert torch.equal(images[::5], parts.background[::5]) and not torch.equal(images[1], parts.background[1])


def test_the_shipped_miniature_draws_digits_and_finds_them(few_images):
    """Of the teacher's images the shipped classifier reads at least 85 % (it was trained on real ones), masks are binary, and
    nothing is salient in a bare background."""
    teacher, saliency = (load(find(cgn.WEIGHTS / f"mini-{name}.pth")) for load, find, name in
                         ((biggan.load, biggan.find_weights, "teacher"), (u2net.load, u2net.find_weights, "saliency")))
    classifier = cgn.read_classifier(biggan.find_weights(cgn.WEIGHTS / "mini-classifier.pth"))
    cgn.StyleFeatures(biggan.read_state(biggan.find_weights(cgn.WEIGHTS / "mini-style.pth")))
    y, (parts, _) = torch.arange(200) % 10, mnist_variants.load_parts("wildlife", "val")
    with torch.no_grad():
        x = teacher(biggan.truncated_noise(200, teacher.noise, seed=0), y, 1.0)
        m = saliency(u2net.normalise((x + 1) / 2))
        assert (classifier(x).argmax(dim=1) == y).double().mean() >= 0.85
        assert saliency(u2net.normalise(parts.background / 255)).mean() < 1e-3
    assert cgn.binary_entropy(m) < 0.25 and 0.1 < m.mean() < 0.4
    assert sum(path.stat().st_size for path in cgn.WEIGHTS.glob("mini-*.pth")) < 12e6


def test_a_missing_miniature_says_how_it_is_made(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cgn, "WEIGHTS", tmp_path)
    with pytest.raises(SystemExit) as stopped:
        cgn.main(["--dataset", "imagenet", "--mini", "--out", str(tmp_path / "run")])
    assert stopped.value.code == 2 and "python miniature.py teacher saliency style classifier" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------- classify: the ensemble

@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two classes of five small pictures in subfolders, six counterfactuals as cgn.py writes them, weights to start from."""
    root, generator = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    (root / "counterfactuals").mkdir()
    for name, count in (("real/ant", 5), ("real/bee", 5), ("counterfactuals", 6)):
        (root / name).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            Image.fromarray(generator.integers(256, size=(40, 36, 3), dtype=np.uint8)).save(root / name / f"{index:08d}.png")
    rows = [f"{index:08d}.png,0,{index},{index % 2},{index // 2 % 2},{index // 4 % 2}" for index in range(6)]
    (root / "counterfactuals" / "labels.csv").write_text("\n".join(["file,seed,u,shape,texture,background", *rows]) + "\n")
    torch.manual_seed(0)
    torch.save(classify.torchvision.models.get_model("shufflenet_v2_x0_5", num_classes=1000).state_dict(), root / "weights.pth")
    return root


def ensemble_options(pictures, out, *more):
    return ("--dataset", "imagenet", "--real", pictures / "real", "--counterfactuals", pictures / "counterfactuals", "--network",
            "shufflenet_v2_x0_5", "--weights", pictures / "weights.pth", "--side", 32, "--batch", 4, "--epochs", 2, "--lr", 0.01, "--save-every", 1, "--workers", 1,
            "--threads", 1, "--out", out, *more)


def losses(out):
    return [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()[1:]]


def test_averaged_logits_and_log_probabilities_are_one_prediction_and_one_loss():
    z, y = torch.randn(5, 3, 7, generator=torch.Generator().manual_seed(0)) * 4, torch.arange(5)
    assert torch.equal(z.mean(1).argmax(1), z.log_softmax(2).mean(1).argmax(1))
    assert torch.allclose(F.cross_entropy(z.mean(1), y), F.cross_entropy(z.log_softmax(2).mean(1), y))


def test_ensemble_loss_by_hand():
    real = torch.tensor([[[2.0, 0.0], [0.0, 0.0], [1.0, 0.0]]])                     # one image, three heads: mean scores 1, 0
    counterfactual = torch.tensor([[[3.0, 0.0], [0.0, 3.0], [0.0, 0.0]]])
    expected = (np.log(1 + np.exp(-1)) + (2 * np.log(1 + np.exp(-3)) + np.log(2)) / 3) / 2
    assert classify.ensemble_loss(real, torch.tensor([0]), counterfactual, torch.tensor([[0, 1, 1]])).item() == pytest.approx(expected)
    alone = classify.ensemble_loss(real, torch.tensor([0]), real[:0], torch.zeros(0, 3).long())
    assert alone.item() == pytest.approx(np.log(1 + np.exp(-1)))
    smooth = classify.ensemble_loss(real, torch.tensor([0]), counterfactual, torch.tensor([[0, 1, 1]]), 0.2)
    assert smooth.item() == pytest.approx(expected + 0.1 * (1 + 2 * 3 / 3) / 2)     # a tenth of each margin more


def test_an_ensemble_starts_as_its_network_and_keeps_its_batch_norms():
    torch.manual_seed(0)
    network = classify.torchvision.models.get_model("shufflenet_v2_x0_5", num_classes=6).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = network(x)
        model = classify.Ensemble(network)
        assert torch.allclose(model.train()(x), expected[:, None].expand(-1, 3, -1), atol=1e-5)
    model(x)[:, 1].sum().backward()
    assert not model.heads[0].weight.grad.any() and model.heads[1].weight.grad.any()
    norm = model.backbone.conv1[1]
    assert not norm.running_mean.any()
    model.frozen = False                                                            # from random weights they learn
    model.train()(x)
    assert norm.running_mean.any()


def test_dropout_is_the_same_in_a_run_that_was_stopped(tmp_path):
    config = {"seed": 3, "steps": 4, "lr": 0.1, "momentum": 0.9, "weight_decay": 0.0, "decay": 0.1, "milestones": [], "bf16": False,
              "smoothing": 0.0, "save_every": 1}

    def train(out, stop):
        def batches(first):
            for step in range(first, stop):
                generator = torch.Generator().manual_seed(step)
                yield torch.rand(4, 3, 8, 8, generator=generator), torch.randint(5, (4,), generator=generator)
        torch.manual_seed(0)
        network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(), torch.nn.Linear(192, 5))
        classify.train_ensemble(config, classify.Ensemble(network), batches, None, out)

    train(tmp_path / "whole", 4)
    with pytest.raises(StopIteration):
        train(tmp_path / "parts", 2)
    torch.rand(7)
    train(tmp_path / "parts", 4)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole") and len(losses(tmp_path / "whole")) == 4


@beside
def test_a_worker_that_dies_is_one_line(pictures, tmp_path, monkeypatch):
    import multiprocessing
    normalise, calls = u2net.normalise, []

    def kill(x):
        calls.append(1)
        if len(calls) == 2:
            multiprocessing.active_children()[0].kill()
            time.sleep(20)                  # the signal of the child's end comes now
        return normalise(x)

    monkeypatch.setattr(u2net, "normalise", kill)
    result = script("classify.py", *ensemble_options(pictures, tmp_path / "run"))
    one_line(result, "DataLoader worker", "killed", "--workers")
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] == 1


def test_each_epoch_holds_every_picture_once(pictures):
    files = classify.labelled_files(str(pictures / "counterfactuals"))
    assert files[5][1] == (1, 0, 1)
    data = classify.Batches([(path, (number,)) for number, (path, _) in enumerate(files)], 3, 32, seed=1)
    first, again = [data[0], data[1]], classify.Batches(data.files, 3, 32, seed=1)
    assert sorted(torch.cat([labels for _, labels in first]).flatten().tolist()) == list(range(6))
    assert torch.equal(again[1][0], first[1][0]) and first[0][0].shape == (3, 3, 32, 32) and first[0][0].max() <= 1
    share = classify.Batches(data.files, 3, 32, seed=1, share=slice(1, None, 2))
    assert torch.equal(share[0][0], first[0][0][1::2]) and not torch.equal(data[2][1], data[0][1])


@beside
def test_the_ensemble_trains_the_same_stopped_or_not_alone_or_in_two_processes(pictures, tmp_path):
    result = script("classify.py", *ensemble_options(pictures, tmp_path / "whole"))
    assert result.returncode == 0 and "10 real images, 2 classes, 6 counterfactuals; 6 steps of 4 + 4" in result.stdout, result.stderr
    code = f"""
import sys; sys.path.insert(0, {str(HERE)!r})
import cgn, classify
save, saved = cgn.save_state, []
def stop(path, state):
    save(path, state)
    saved.append(path)
    if len(saved) == 2:
        raise KeyboardInterrupt
cgn.save_state = stop
classify.main({[str(option) for option in ensemble_options(pictures, tmp_path / 'parts')]})
"""
    stopped = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert stopped.returncode != 0 and torch.load(tmp_path / "parts" / "checkpoint.pt", weights_only=True)["step"] == 2
    assert script("classify.py", *ensemble_options(pictures, tmp_path / "parts")).returncode == 0
    a, b = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("whole", "parts"))
    assert all(torch.equal(a["ensemble"][key], b["ensemble"][key]) for key in a["ensemble"])
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")

    result = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29534", "classify.py",
                             *map(str, ensemble_options(pictures, tmp_path / "two"))], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "whole"), abs=1e-5)

    said = script("classify.py", "--checkpoint", tmp_path / "whole" / "checkpoint.pt", "--say", pictures / "real" / "ant" / "00000000.png")
    assert re.fullmatch(r"(an ant|a bee) shape with (ant|bee) texture on (an ant|a bee) background "
                        r"\(shape \d+ %, texture \d+ %, background \d+ %\)\n", said.stdout), said


@pytest.fixture(scope="module")
def imagenet_ensemble(tmp_path_factory):
    """A checkpoint of an ensemble of 1,000 classes whose heads always answer airplane, bear and dog."""
    path = tmp_path_factory.mktemp("ensemble") / "checkpoint.pt"
    model = classify.Ensemble(classify.torchvision.models.get_model("shufflenet_v2_x0_5", num_classes=1000))
    for head, label in zip(model.heads, (404, 294, 152)):
        torch.nn.init.zeros_(head.weight)
        torch.nn.init.zeros_(head.bias)
        head.bias.data[label] = 5.0 + (label == 404)
    config = {"model": "ensemble", "network": "shufflenet_v2_x0_5", "heads": 3, "names": [f"n{number:03d}" for number in range(1000)], "side": 32}
    torch.save({"config": config, "step": 1, "ensemble": model.state_dict()}, path)
    return path


def judged(*arguments):
    result = script("evaluate.py", *arguments)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_each_head_of_an_ensemble_is_judged(imagenet_ensemble, tmp_path):
    def picture(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), "red").save(path)

    for name in ("airplane1-bear2", "bear1-airplane3", "dog1-dog2", "dog1-airplane1"):
        picture(tmp_path / "cue" / "any" / f"{name}.png")
    out = judged("--ensemble", imagenet_ensemble, "--cue-conflict", tmp_path / "cue", "--out", tmp_path / "r.json")
    assert "| cue conflict | shape bias | by shape | by texture | images |" in out and "| shape | 33.33 % | 1 | 2 | 4 |" in out
    held = json.loads((tmp_path / "r.json").read_text())
    assert held["texture"]["by shape"] == held["texture"]["by texture"] == 1 and held["background"]["shape bias"] == 1.0
    assert held["average"]["shape bias"] == pytest.approx(1 / 3)                    # the first head is the surest
    broken = tmp_path / "cue" / "any" / "dog1-bear1.png"
    broken.write_text("no picture")
    one_line(script("evaluate.py", "--ensemble", imagenet_ensemble, "--cue-conflict", tmp_path / "cue"), broken.name, "--skip-broken")
    assert "| shape | 33.33 % | 1 | 2 | 4 |" in judged("--ensemble", imagenet_ensemble, "--cue-conflict", tmp_path / "cue", "--skip-broken")

    names = ("dog", "bird", "wheeled vehicle", "reptile", "carnivore", "insect", "musical instrument", "primate", "fish")
    for variation, more in (("original", ()), ("mixed_same", (0, 0, 4)), ("mixed_rand", (4, 4, 4))):
        for number, label in enumerate((*range(9), *more)):
            picture(tmp_path / "in9" / variation / "val" / f"{label:02d}_{names[label]}" / f"{number}.JPEG")
    (tmp_path / "in9" / "fg_mask" / "val" / "00_dog").mkdir(parents=True)           # in the published archive: no pictures
    (tmp_path / "in9" / "fg_mask" / "val" / "00_dog" / "0.npy").write_bytes(b"mask")
    out = judged("--ensemble", imagenet_ensemble, "--imagenet9", tmp_path / "in9")
    assert "| accuracy | mixed_rand | mixed_same | original | BG-Gap |" in out
    assert "| texture | 33.33 % | 16.67 % | 11.11 % | -16.67 % |" in out           # bears are carnivores
    assert "| background | 8.33 % | 25.00 % | 11.11 % | 16.67 % |" in out
    shutil.rmtree(tmp_path / "in9" / "mixed_same")
    out = judged("--ensemble", imagenet_ensemble, "--imagenet9", tmp_path / "in9")
    assert "| background | 8.33 % | 11.11 % |" in out and "no BG-Gap" in out
    (tmp_path / "in9" / "original" / "val" / "00_dog").rename(tmp_path / "in9" / "original" / "val" / "00_cat")
    one_line(script("evaluate.py", "--ensemble", imagenet_ensemble, "--imagenet9", tmp_path / "in9"), "original", "00_cat", "00_dog")

    for number, name in enumerate((404, 404, 294, 0)):                              # three of the thousand classes, by their names
        picture(tmp_path / "val" / f"n{name:03d}" / f"{number}.png")
    out = judged("--ensemble", imagenet_ensemble, "--imagenet", tmp_path / "val")
    assert "| shape | 50.00 % |" in out and "| texture | 25.00 % |" in out
    (tmp_path / "val" / "cat").mkdir()
    (tmp_path / "val" / "cat" / "0.png").write_text("told before it is opened")
    one_line(script("evaluate.py", "--ensemble", imagenet_ensemble, "--imagenet", tmp_path / "val"), "'cat'")

    rows = [f"{number}.png,{shape},{texture},152" for number, (shape, texture) in enumerate(((404, 294), (404, 0), (0, 0), (0, 0)))]
    for number in range(4):                                                         # counterfactuals: each head has its own label
        picture(tmp_path / "made" / f"{number}.png")
    (tmp_path / "made" / "labels.csv").write_text("\n".join(["file,shape,texture,background", *rows]))
    out = judged("--ensemble", imagenet_ensemble, "--imagenet", tmp_path / "made")
    assert "| shape | 50.00 % |" in out and "| texture | 25.00 % |" in out and "| background | 100.00 % |" in out


def test_a_checkpoint_of_another_head_count_is_named(imagenet_ensemble, pictures, tmp_path):
    state = torch.load(imagenet_ensemble, weights_only=True)
    for change, words in (({"heads": 1}, ("heads.1.weight",)), ({"heads": "3"}, ("str",)), ({"network": "resnet18"}, ("no checkpoint",))):
        torch.save({**state, "config": {**state["config"], **change}}, tmp_path / "other.pt")
        one_line(script("evaluate.py", "--ensemble", tmp_path / "other.pt", "--imagenet", pictures / "real"), "other.pt", *words)
    torch.save({**state, "config": [1]}, tmp_path / "other.pt")
    one_line(script("classify.py", "--checkpoint", tmp_path / "other.pt", "--say", "photo.jpg"), "other.pt", "no checkpoint")
    (tmp_path / "p.csv").write_text("variation,label,prediction\noriginal,0,151\n")
    one_line(script("evaluate.py", "--ensemble", imagenet_ensemble, "--imagenet9", tmp_path / "p.csv"), "p.csv", "folder")


def test_inception_score_and_masks_of_folders_tables_and_checkpoints(pictures, imagenet_checkpoint, tmp_path, monkeypatch):
    network = ("--inception", cgn.WEIGHTS / "mini-classifier.pth")
    out = judged("--inception-score", pictures / "counterfactuals", *network, "--splits", 2, "--out", tmp_path / "r.json")
    x = torch.stack([classify.whole(classify.read_picture(path), 32) for path in sorted(map(str, (pictures / "counterfactuals").glob("*.png")))])
    probabilities = cgn.read_classifier(network[1])(x.float() / 127.5 - 1).softmax(dim=1)
    mean, std = evaluate.inception_score(probabilities, 2)
    held = json.loads((tmp_path / "r.json").read_text())
    assert held["inception_score"] == pytest.approx(mean, rel=1e-4) and held["std"] == pytest.approx(std, abs=1e-4)
    assert f"| 6 | {mean:.2f} ± {std:.2f} |" in out
    rows = [",".join(map(str, row)) for row in probabilities.double().tolist()]
    (tmp_path / "p.csv").write_text("\n".join([",".join(f"class{k}" for k in range(10)), *rows]))
    assert f"| 6 | {mean:.2f} ± {std:.2f} |" in judged("--inception-score", tmp_path / "p.csv", "--splits", 2)
    one_line(script("evaluate.py", "--inception-score", tmp_path / "p.csv", "--splits", 7), "7 splits")
    (tmp_path / "p.csv").write_text("a,b\n0.5,cat\n")
    one_line(script("evaluate.py", "--inception-score", tmp_path / "p.csv"), "p.csv", "'cat'")

    for number, level in enumerate((0, 255, 102)):
        Image.new("L", (8, 8), level).save(tmp_path / f"{number}-mask.png")
    out = judged("--masks", tmp_path)
    entropy = cgn.binary_entropy(torch.tensor([0, 1, 0.4])).item()
    assert f"| 3 | {1.4 / 3:.3f} ± 0.503 | {entropy:.3f} |" in out
    one_line(script("evaluate.py", "--masks", pictures), str(pictures), "--parts mask")

    monkeypatch.setattr(mnist_variants, "SIZE", 28)                                 # so that this CGN is none of digits
    judged("--cgn", imagenet_checkpoint, *network, "--samples", 12, "--splits", 2, "--out", tmp_path / "r.json")
    model, held = cgn.load(imagenet_checkpoint), json.loads((tmp_path / "r.json").read_text())
    u, y, _ = cgn.draw_training(model, 0, range(12), model.truncation)
    with torch.no_grad():
        sample = model(u, y, model.truncation)
    assert held["mask_mean"] == pytest.approx(sample.mask.mean().item(), rel=1e-4) and held["images"] == 12
    assert held["binary_entropy"] == pytest.approx(cgn.binary_entropy(sample.mask).item(), rel=1e-4)
    config = tiny_config(model="gan")
    torch.save({"config": config, "step": 1, "average": cgn.build(config).state_dict()}, tmp_path / "gan.pt")
    one_line(script("evaluate.py", "--cgn", tmp_path / "gan.pt"), "gan.pt", "no mechanisms")


def test_predictions_of_any_system_on_imagenet9(tmp_path):
    (tmp_path / "p.csv").write_text("variation,label,prediction\nmixed_same,0,151\nmixed_same,8,0\nmixed_rand,0,151\nmixed_rand,8,500\n")
    assert "| predictions | 100.00 % | 50.00 % | 50.00 % |" in judged("--imagenet9", tmp_path / "p.csv")
    for content, words in (("variation,label\n", "no column prediction"),
                           ("variation,label,prediction\nmixed_same,9,1\n", "0..8"), ("variation,label,prediction\nmixed_same,x,1\n", "'x'"),
                           ("variation,label,prediction\nmixed_same,1,1000\n", "0..999")):
        (tmp_path / "p.csv").write_text(content)
        one_line(script("evaluate.py", "--imagenet9", tmp_path / "p.csv"), words)
    one_line(script("evaluate.py", "--imagenet9", tmp_path), "no folder VARIATION")
    one_line(script("evaluate.py", "--imagenet", tmp_path), str(tmp_path))


def test_an_ensemble_draws_its_counterfactuals_from_a_cgn(pictures, imagenet_checkpoint):
    model = cgn.load(imagenet_checkpoint)
    model.truncation = 0.5
    steps = classify.draw_steps(model, 3, 4, 24, seed=1, per_shape=2, share=slice(1, 3))
    x, labels = next(steps)
    sample, expected = cgn.counterfactual_batch(model, 1, range(13, 15), 2, truncation=0.5)
    assert torch.allclose(x, F.interpolate((sample.image + 1) / 2, (24, 24), mode="bilinear", antialias=True), atol=1e-6)
    assert x.shape == (2, 3, 24, 24) and 0 <= x.min() and x.max() <= 1 and torch.equal(labels, expected.T)
    assert torch.equal(next(steps)[1], cgn.draw(model, 1, range(17, 19), 2)[1].T)


@pytest.mark.parametrize("change, words", [
    (("--real", "nowhere"), ("nowhere",)), (("--real", "docs"), ("docs",)), (("--batch", "0"), ("--batch 0",)),
    (("--network", "lenet"), ("lenet",)), (("--counterfactuals", "docs"), ("docs",)), (("--out", "requirements.txt"), ("requirements.txt",)),
    (("--weights", "requirements.txt"), ("--scratch",)), (("--ratio", "0.3"), ("--ratio",)), (("--ratio", "0"), ("--ratio 0",)),
    (("--label-smoothing", "1.5"), ("--label-smoothing 1.5",)),
    (("--network", "squeezenet1_0", "--scratch"), ("no linear layer",)), (("--network", "googlenet", "--scratch"), ("auxiliary",)),
])
@pytest.mark.filterwarnings("ignore:The default weight initialization of GoogleNet")
def test_mistakes_with_the_ensemble_are_one_line(pictures, tmp_path, change, words):
    one_line(script("classify.py", *ensemble_options(pictures, tmp_path), *change), *words)


def test_a_cgn_of_other_classes_than_the_real_images_is_refused(pictures, trained, tmp_path):
    one_line(script("classify.py", *ensemble_options(pictures, tmp_path), "--cgn", trained / "checkpoint.pt"), "10 classes", "2")


def test_broken_pictures_and_labels_are_named(pictures, tmp_path):
    shutil.copytree(pictures, tmp_path / "p")
    (tmp_path / "p" / "real" / "ant" / "00000001.png").write_text("no picture")
    one_line(script("classify.py", *ensemble_options(tmp_path / "p", tmp_path / "out")), "00000001.png does not open", "--skip-broken")
    result = script("classify.py", *ensemble_options(tmp_path / "p", tmp_path / "out", "--skip-broken", "--workers", 0))
    assert result.returncode == 0 and re.search(r"00000001\.png does not open as a picture .*: skipped", result.stdout), result
    for row, words in (("../../x.png,0,0,1,1,1", "not in its folder"), ("00000000.png,0,0,one,1,1", "no number"),
                       ("00000000.png,0,0,1,1,2", "0..1")):
        (tmp_path / "p" / "counterfactuals" / "labels.csv").write_text("file,seed,u,shape,texture,background\n" + row + "\n")
        one_line(script("classify.py", *ensemble_options(tmp_path / "p", tmp_path / "out2")), words)


# ---------------------------------------------------------------------------------------------------------- users' mistakes

@pytest.mark.parametrize("arguments, words", [
    (("cgn.py", "--dataset", "nope"), ("'nope'", "colored", "folder")),
    (("cgn.py", "--steps", "0"), ("--steps 0", "at least 1")),
    (("cgn.py", "--batch", "-3"), ("--batch -3",)),
    (("cgn.py", "--dataset", "imagenet", "--mini", "--accumulate", "0"), ("--accumulate 0",)),
    (("cgn.py", "--dataset", "imagenet", "--mini", "--without", "shape", "text", "bg", "rec"), ("no loss",)),
    (("cgn.py", "--binary-warmup", "0"), ("--binary-warmup 0",)), (("cgn.py", "--margin", "16"), ("--margin 16", "0..15")),
    (("cgn.py", "--variance", "-1"), ("variance -1",)), (("cgn.py", "--device", "nowhere"), ("--device nowhere", "cpu")),
    (("classify.py", "--device", "cuda:99"), ("--device cuda:99", "cpu")), (("cgn.py", "--device", "meta"), ("--device meta",)),
    (("classify.py", "--label", "background", "--dataset", "colored"), ("no background label",)),
    (("classify.py", "--checkpoint", "ensemble.pt"), ("--say",)),
    (("cgn.py", "--seed", "-1"), ("--seed -1",)), (("cgn.py", "--seed", str(2 ** 64)), (str(2 ** 64), "2^63")),
    (("cgn.py", "--lr", "-1"), ("--lr -1",)), (("cgn.py", "--interval", "0.9", "0.1"), ("0.9 0.1", "lower one first")),
    (("cgn.py", "--mini"), ("--mini", "imagenet", "colored")), (("cgn.py", "--counterfactuals", "3"), ("--checkpoint",)),
    (("cgn.py", "--out", "README.md"), ("README.md is a file",)),
    (("cgn.py", "--threads", "-1"), ("--threads -1",)),
    (("miniature.py", "style", "--steps", "-1"), ("--steps -1",)),
    (("cgn.py", "--shuffle", "cut"), ("cut", "shift")),
    (("cgn.py", "--checkpoint", "nowhere.pt", "--counterfactuals", "5"), ("nowhere.pt", "train first")),
    (("cgn.py", "--checkpoint", "README.md", "--counterfactuals", "5"), ("README.md", "no checkpoint")),
    (("classify.py", "--dataset", "mnist"), ("mnist", "colored")),
    (("classify.py", "--count", "0"), ("--count 0",)),
    (("evaluate.py", "--cgn", "requirements.txt"), ("requirements.txt",)),
    (("evaluate.py", "--predictions", "nowhere.csv"), ("nowhere.csv",)),
    (("mnist_variants.py", "--split", "dev"), ("dev", "val")),
])
def test_a_mistake_is_one_line_and_exit_code_2(arguments, words):
    one_line(script(*arguments), *words)


def test_options_that_a_checkpoint_of_digits_cannot_serve(trained, tmp_path):
    sample = ("cgn.py", "--checkpoint", trained / "checkpoint.pt", "--counterfactuals", 3)
    one_line(script(*sample, "--parts", "mask", "--out", tmp_path / "set.pt"), "--parts mask", "ImageNet")
    shutil.copy(trained / "checkpoint.pt", tmp_path / "checkpoint.pt")
    one_line(script(*sample, "--out", tmp_path / "checkpoint.pt"), "checkpoint.pt", "would be lost")
    assert (tmp_path / "checkpoint.pt").read_bytes() == (trained / "checkpoint.pt").read_bytes()
    assert script(*sample, "--out", tmp_path / "new" / "set.pt").returncode == 0    # the folder is made


def test_counts_below_one_are_refused(trained):
    for option in (("--counterfactuals", 0), ("--counterfactuals", 5, "--per-shape", -1)):
        one_line(script("cgn.py", "--checkpoint", trained / "checkpoint.pt", *option), "at least 1")


def test_a_checkpoint_that_would_run_code_or_is_of_something_else_is_refused(trained, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    torch.save({"config": Evil(), "average": {}, "step": 1}, tmp_path / "evil.pt")
    whole = (trained / "checkpoint.pt").read_bytes()
    (tmp_path / "short.pt").write_bytes(whole[:len(whole) // 2])
    torch.save({"weights": torch.zeros(3)}, tmp_path / "other.pt")
    state = cgn.read_checkpoint(trained / "checkpoint.pt")
    del state["average"]["f_text.out.bias"]
    torch.save(state, tmp_path / "lacks.pt")
    for name in ("evil.pt", "short.pt", "other.pt", "lacks.pt"):
        with pytest.raises(ValueError, match=name):
            cgn.load(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_a_full_disk_is_one_line_and_leaves_the_last_checkpoint(trained, tmp_path):
    """A limit on file sizes stands in for the full disk: the write fails midway in the same way."""
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    target = run / "data set.pt"
    target.write_bytes(b"written before")
    result = process("cgn.py", "--checkpoint", run / "checkpoint.pt", "--counterfactuals", 200, "--out", target,
                    preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)))
    one_line(result, "could not be written", "intact")
    assert target.read_bytes() == b"written before"
    assert {path.name for path in run.iterdir()} == {path.name for path in trained.iterdir()} | {target.name}


@beside
def test_runs_killed_at_twenty_random_moments_end_as_if_they_had_not_been(tmp_path):
    """Each kind of run, each of its processes, is killed at random moments and continued; then compared with the run left alone.

    The process has one thread, so that it may be forked.
    """
    folder, total = tmp_path, 0
    counter, generator = itertools.count(), np.random.default_rng(0)
    states = raw_biggan([(16, 16)] * 6, 2, classes=10), random_u2net(((3, 4, 8),) + ((8, 4, 8),) * 5 + ((16, 4, 8),) * 5).state_dict(), cgn.random_networks()[2]
    torch.save(states[1], folder / "saliency.pt")
    imagenet_run(states, folder / "made", steps=1, accumulate=1, networks={"saliency": str(folder / "saliency.pt")})
    made = cgn.load(folder / "made" / "checkpoint.pt")

    def ensemble(out):
        def batches(seed):
            def draws(first):
                for step in itertools.count(first):
                    generator = torch.Generator().manual_seed(1000 * seed + step)
                    yield torch.rand(4, 3, 32, 32, generator=generator), torch.randint(10, (4, 3)[:seed], generator=generator)
            return draws
        torch.manual_seed(0)
        classify.train_ensemble({"seed": 0, "steps": 20, "lr": 0.01, "momentum": 0.9, "weight_decay": 0.0, "decay": 0.1, "milestones": [9], "bf16": False,
                                 "smoothing": 0.0, "save_every": 1}, classify.Ensemble(classify.Classifier()), batches(1), batches(2), out)

    runs = {"mnist": (1, lambda out: cgn.train(tiny_config(steps=4, sheet_every=1), *tiny_data(), out)),
            "imagenet": (1, lambda out: imagenet_run(states, out, steps=3, accumulate=1)),
            "imagenet, two ranks": (2, lambda out: imagenet_run(states, out, steps=3, accumulate=2)),
            "data set": (1, lambda out: cgn.write_counterfactuals(made, out, 40, 1, per_shape=2, batch=2)),
            "data set, two ranks": (2, lambda out: cgn.write_counterfactuals(made, out, 40, 1, per_shape=2, batch=2)),
            "classifier": (1, ensemble)}

    def start(kind, out):
        ranks, run = runs[kind]
        meeting, children = folder / f"meeting{next(counter)}", []
        for rank in range(ranks):
            child = os.fork()
            if child == 0:
                code = 1
                try:
                    if ranks > 1:
                        torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks)
                    run(out)
                    code = 0
                finally:
                    os._exit(code)
            children.append(child)
        return children

    def finish(children):
        assert [os.waitpid(child, 0)[1] for child in children] == [0] * len(children)

    def result(out):
        if (out / "labels.csv").exists():
            return {path.name: path.read_bytes() for path in out.iterdir()}
        rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        state, flat = torch.load(out / "checkpoint.pt", weights_only=True), {}

        def walk(name, value):
            for key, part in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
                walk(f"{name}.{key}", part)
            if not isinstance(value, (dict, list)):
                flat[name] = value.numpy().tobytes() if isinstance(value, torch.Tensor) else value
        walk("", state)
        return flat, [{key: value for key, value in row.items() if "per_second" not in key} for row in rows]

    for kind in runs:
        began = time.time()
        finish(start(kind, folder / kind))
        seconds, kills = time.time() - began, 4 if kind in ("mnist", "imagenet") else 3
        for number in range(kills):
            out = folder / f"{kind} {number}"
            children = start(kind, out)
            time.sleep(generator.uniform(0, seconds))
            for child in children:
                os.kill(child, signal.SIGKILL)
            for child in children:
                os.waitpid(child, 0)
            finish(start(kind, out))
            assert result(out) == result(folder / kind), (kind, number)
        total += kills
        print(f"{kind}: {kills} kills in runs of {seconds:.1f} s")
    assert total == 20


def mutate(content, generator):
    """A damaged copy: single bytes changed, a piece cut out, doubled or overwritten, or the end missing."""
    content = bytearray(content)
    for _ in range(generator.integers(1, 4)):
        a = int(generator.integers(len(content)))
        b = min(len(content), a + int(generator.integers(1, 64)))
        kind = generator.integers(6)
        if kind < 2:
            content[a] ^= 1 << int(generator.integers(8))
        elif kind == 2:
            content[a:b] = generator.bytes(b - a)
        elif kind == 3 and a:
            del content[a:b]
        elif kind == 4:
            content[a:a] = content[a:b]
        elif a:
            del content[a:]
    return bytes(content)


@beside
def test_ten_thousand_damaged_files_are_read_or_refused(tmp_path):
    """For all readers: each is read, or refused with ValueError, in ten seconds and 2 GiB."""
    folder, count = tmp_path, 10_000
    generator, outcomes = np.random.default_rng(0), {}
    picture = Image.fromarray(generator.integers(256, size=(40, 48, 3), dtype=np.uint8))
    state, small = raw_biggan([(8, 8), (8, 8)], None, 2, 4, 4), random_u2net(((3, 2, 2),) + ((2, 2, 2),) * 5 + ((4, 2, 2),) * 5).state_dict()
    texts = {"predictions.csv": (b"label,prediction\n1,2\n3,3\n", evaluate.read_predictions),
             "labels.csv": (b"file,seed,u,shape,texture,background\n00000000.png,1,0,3,4,5\n00000001.png,1,1,0,9,2\n",
                            lambda path: classify.labelled_files(path.parent)),
             "log.jsonl": (json.dumps(tiny_config()).encode() + b'\n{"step": 1, "binary": 0.5}\n{"step": 2, "binary": 0.25}\n',
                           lambda path: cgn.continue_run(Path(shutil.copy(folder / "checkpoint.pt", path.parent)).parent, tiny_config(), {})),
             "results.jsonl": (b'{"dataset": "colored", "seed": 0, "test": 0.9684}\n{"dataset": "wildlife", "seed": 1}\n', cgn.read_lines)}
    torch.save(state, folder / "new.pt")
    torch.save(state, folder / "old.pt", _use_new_zipfile_serialization=False)
    torch.save(small, folder / "u2net.pt")
    torch.save({"config": tiny_config(), "step": 3, "average": {"a": torch.ones(5)}}, folder / "checkpoint.pt")
    torch.save(classify.Classifier().state_dict(), folder / "classifier.pt")
    torch.save(cgn.random_networks()[2], folder / "style.pt")
    for suffix in ("png", "jpg", "gif", "tif", "bmp", "webp"):
        picture.save(folder / f"photo.{suffix}")
    shutil.copy(HERE / "data" / "mnist" / "t10k-labels-idx1-ubyte.gz", folder)
    readers = [("new.pt", biggan.load, 8), ("old.pt", biggan.load, 8), ("u2net.pt", u2net.load, 1), ("checkpoint.pt", cgn.load, 12),
               ("checkpoint.pt", classify.load_ensemble, 6), ("classifier.pt", cgn.read_classifier, 4),
               ("style.pt", lambda path: cgn.StyleFeatures(biggan.read_state(path)), 4),
               ("t10k-labels-idx1-ubyte.gz", lambda path: mnist_variants._read_idx(path.parent, path.stem), 4)]
    readers += [(f"photo.{suffix}", reader, 4) for suffix in ("png", "jpg", "gif", "tif", "bmp", "webp") for reader in (u2net.open_photo, classify.read_picture)]
    readers += [(name, reader, 8) for name, (_, reader) in texts.items()]
    total = sum(weight for *_, weight in readers)
    signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(TimeoutError("ten seconds")))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name, reader, weight in readers:
        whole = texts[name][0] if name in texts else (folder / name).read_bytes()
        place = folder / "damaged" / name
        for number in range(-(-count * weight // total)):
            shutil.rmtree(place.parent, ignore_errors=True)
            place.parent.mkdir()
            place.write_bytes(mutate(whole, generator))
            signal.alarm(10)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    reader(place)
                outcome = "read"
            except ValueError:
                outcome = "refused"
            except BaseException as error:
                shutil.copy(place, folder / "culprit")
                raise AssertionError(f"{name} number {number}: {type(error).__name__}: {error}") from error
            finally:
                signal.alarm(0)
            outcomes[outcome] = outcomes.get(outcome, 0) + 1
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2 ** 20
    assert grown < 2, f"{grown} GiB"
    print(outcomes)
    assert sum(outcomes.values()) >= count and min(outcomes["read"], outcomes["refused"]) > 1000


# ------------------------------------------------------------------------------------------------------------- the project

@pytest.mark.parametrize("module, line", [
    ("mnist_variants.py", "import mnist_variants as m; print(m.draw_textures().shape)"),
    ("evaluate.py", "import evaluate, torch; print(evaluate.accuracy(torch.tensor([1]), torch.tensor([1])))"),
    ("biggan.py", "import biggan; biggan.main(['--dry-run', '--classes', '0,ostrich'])"),
    ("u2net.py", "import u2net, torch; print(u2net.load(u2net.U2Net().state_dict())(torch.zeros(1, 3, 32, 32)).shape)"),
])
def test_a_ground_floor_file_works_when_copied_alone(tmp_path, module, line):
    shutil.copy(HERE / module, tmp_path)
    result = subprocess.run([sys.executable, "-W", "error", "-c", line], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("command", [("--dataset", "colored"), ("--dataset", "wildlife", "--shuffle", "puzzle"),
                                     ("--dataset", "imagenet"),
                                     ("--dataset", "double-colored", "--model", "gan")])
def test_dry_runs_pass_and_keep_nothing(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = script("cgn.py", *command, "--dry-run", "--mnist", HERE / "data" / "mnist")
    assert result.returncode == 0 and "dry run finished" in result.stdout, result.stderr
    assert list(tmp_path.iterdir()) == []


def test_every_readme_command_of_this_project_is_understood():
    """Each `python X.py ...` of the README names options and choices that its parser knows."""
    commands = re.findall(r"^(?:\$ )?python (\w+)\.py ?([^\n#]*)", (HERE / "README.md").read_text(), re.M)
    assert len(commands) >= 5
    for module, arguments in commands:
        sys.modules[module].build_parser().parse_args(shlex.split(arguments))


def test_defaults_are_the_documented_ones():
    args = cgn.build_parser().parse_args([])
    assert (args.dataset, args.model, args.lr, args.per_shape) == ("colored", "cgn", 4e-4, 10)
    assert classify.build_parser().parse_args([]).seeds == [0, 1, 2]


# ------------------------------------------------------------------------------------- measurements at full size: no tests

def full_size(paths):
    """Writes random weights of the released sizes: teacher, three mechanisms, U-2-Net, VGG16."""
    for number, path in enumerate(paths[:4]):
        torch.save(raw_biggan(RELEASED, 8, 1000, 128, 128, seed=number), path)
    torch.save(random_u2net(u2net.FULL).state_dict(), paths[4])
    vgg = torch.nn.Module()
    vgg.features = cgn.make_layers([layer for count, width in zip((2, 2, 3, 3), (64, 128, 256, 512)) for layer in [width] * count + ["M"]],
                                   batch_norm=True)
    torch.save(vgg.state_dict(), paths[5])


def measure(what, folder):
    """`python test_cgn.py step | parts | memory | draw | image [FOLDER]`: the ImageNet CGN at full size with random weights, which
    stay in FOLDER. 5 minutes and 12 GB at most."""
    paths = [Path(folder) / f"{name}.pth" for name in ("teacher", "shape", "text", "bg", "u2net", "vgg16")]
    if not paths[-1].exists():
        full_size(paths)
    frozen, saliency = what in ("draw", "image"), u2net.load(paths[4])
    model = cgn.ImagenetCGN(*(biggan.load(path, frozen=frozen) for path in paths[1:4]), saliency)
    mechanisms = model.f_shape, model.f_text, model.f_bg
    u, y, draws = cgn.draw_training(model, 0, range(1), 1.0)
    config = {"truncation": 1.0, "patch": 15, "relative_patch": False, "bf16": False}
    kinds = ("float32", "bfloat16") if cgn.bf16_pays(True, "cpu") else ("float32",)

    def clock(run):
        started = time.time()
        run()
        return time.time() - started

    def held(run):
        with contextlib.ExitStack() as stack:
            for mechanism in mechanisms:
                stack.enter_context(mechanism.held())
            return run()

    if what == "image":
        cgn.counterfactual_batch(model, 0, range(1))
        print(f"peak memory of one counterfactual image: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20:.2f} GiB")
        return
    if what == "draw":
        raw = [torch.load(path) for path in paths[1:4]]

        def plain(count):
            for index in range(count):
                z, labels, _ = cgn.draw(model, 0, range(index, index + 1))
                with torch.no_grad():
                    x = [plain_biggan(raw[k], z[k], labels[k], 50) for k in range(3)]
                    cgn.compose(u2net_plain(u2net.normalise((x[0] + 1) / 2)), x[1], x[2])

        u2net_plain = u2net.load(paths[4], frozen=False).eval()
        for count in (1, 10):
            seconds = []
            for _ in range(2):
                row = [clock(lambda: plain(count))]
                for name in kinds:
                    with torch.autocast("cpu", torch.bfloat16, enabled=name == "bfloat16"):
                        row.append(clock(lambda: cgn.counterfactual_batch(model, 0, range(count), per_shape=count)))
                seconds.append(row)
            line, *ours = map(min, zip(*seconds))
            print(f"{count} counterfactuals of a shape: straight line {line:.2f} s"
                  + "".join(f", {name} {best:.2f} s: {best / line:.2f}" for name, best in zip(kinds, ours)))
        return
    teacher, style = biggan.load(paths[0]), cgn.StyleFeatures(torch.load(paths[5]))
    if what == "memory":
        optimizer = torch.optim.Adam([parameter for mechanism in mechanisms for parameter in mechanism.parameters()], 1e-5)
        held(lambda: cgn.micro_step(model, teacher, style, u, y, draws, cgn.LAMBDAS, config))
        optimizer.step()
        optimizer.zero_grad()
        held(lambda: cgn.micro_step(model, teacher, style, u, y, draws, cgn.LAMBDAS, config))
        print(f"peak memory of two micro-steps around an optimiser step: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20:.2f} GiB")
        return
    if what == "parts":
        def report(name, run):
            with FlopCounterMode(display=False) as flops:
                held(run)
            seconds, billions = min(held(lambda: clock(run)) for _ in range(2)), flops.get_total_flops() / 1e9
            print(f"{name}: {seconds:.2f} s, {billions:.0f} GFLOP, {billions / seconds:.0f} GFLOP/s")

        @torch.no_grad()
        def teach():
            return teacher(u, y)

        report("teacher, forward", teach)
        report("three mechanisms, forward and backward", lambda: sum(mechanism(u, y).sum() for mechanism in mechanisms).backward())
        x_gt, leaf = teach(), model.f_shape(u, y).detach().requires_grad_()
        report("U-2-Net of the mask, forward and backward", lambda: model.saliency(leaf).sum().backward())
        leaves = [part.detach().requires_grad_() for part in model(u, y)[:3]]
        for name in cgn.LAMBDAS:
            report(f"{name}, forward and backward", lambda: next(
                cgn.imagenet_losses(model, *leaves, x_gt, style, draws, terms=(name,)))[1].backward())
        return
    raw = [torch.load(path) for path in paths[1:4]]
    networks = [torch.load(path) for path in (paths[0], paths[4], paths[5])]
    for mechanism, state in zip(mechanisms, raw):
        for name, _ in mechanism.named_parameters():
            state[name].requires_grad_()

    def straight():
        sum(cgn.LAMBDAS[name] * term for name, term in straight_line_terms(networks, raw, u, y, draws, 15).items()).backward()

    found, seconds = {}, {"straight line": [], **{name: [] for name in kinds}}
    for _ in range(3):
        seconds["straight line"].append(clock(straight))
        for name in kinds:
            def step():
                found[name] = cgn.micro_step(model, teacher, style, u, y, draws, cgn.LAMBDAS, {**config, "bf16": name == "bfloat16"})
            seconds[name].append(held(lambda: clock(step)))
    plain = min(seconds["straight line"])
    for name, times in seconds.items():
        print(f"micro-step, {name}: {min(times):.2f} s: {min(times) / plain:.2f}")
    if "bfloat16" in found:
        error = (found["bfloat16"] - found["float32"]).abs() / found["float32"].clamp(min=1e-9)
        print(f"terms in bfloat16 differ from float32 by at most {100 * error.max():.2f} %")
    for name in kinds:
        a = torch.randn(2048, 2048).to(getattr(torch, name))
        print(f"matrix product of {name}: {2 * 2048 ** 3 / min(clock(lambda: a @ a) for _ in range(5)) / 1e9:.0f} GFLOP/s")
    with FlopCounterMode(display=False) as flops:
        held(lambda: cgn.micro_step(model, teacher, style, u, y, draws, cgn.LAMBDAS, config))
    print(f"{flops.get_total_flops() / 1e9:.0f} GFLOP in a micro-step")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        measure(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else temporary)
