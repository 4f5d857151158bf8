"""All tests: `python -m pytest -q test_cgn.py`. CPU, minutes, nothing is downloaded.

A bare command is the paper's: test_the_presets_are_the_papers, test_settings_of_classifiers_are_the_papers.
A killed run continues exactly: test_runs_killed_at_twenty_random_moments_end_as_if_they_had_not_been.
Ctrl-C ends the step and saves: test_a_signal_ends_the_step_saves_and_the_run_continues_bit_for_bit.
Several processes give what one gives: test_two_processes_give_what_one_gives_and_stop_together.
Weights, seed, index make an image: test_counterfactuals_are_a_pure_function_of_seed_and_index.
A damaged file is read or refused: test_ten_thousand_damaged_files_are_read_or_refused.
No file runs code: test_files_that_run_code_are_cut_off_or_of_another_network_are_one_line.
A listed SHA-256 must match: test_weights_of_another_hash_are_not_kept_nor_read_and_an_unlisted_is_printed.
A missing file is named: test_a_fetch_that_fails_leaves_nothing_and_names_size_address_and_place.
Nothing written is lost: test_a_row_is_appended_whole_or_not_at_all_and_a_damaged_one_is_named,
test_a_folder_is_locked_and_keeps_the_run_of_another_configuration,
test_nothing_that_is_not_finite_is_stepped_or_saved.
A lost process or worker is one line: test_processes_that_find_other_folders_or_lose_one_another_say_so,
test_a_worker_that_fails_or_dies_is_one_line.
A mistake is one line: test_a_script_ends_in_one_line, and those with `mistake` in their names.
A ground-floor file works alone: test_a_ground_floor_file_works_when_copied_alone.
Documented commands exist: test_every_documented_command_is_understood."""
import contextlib
import copy
import gzip
import hashlib
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
import threading
import time
import types
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import functional as F_image

import biggan
import cgn
import classify
import evaluate
import miniature
import mnist_variants
import run
import u2net

HERE = Path(__file__).parent
SHARED = HERE.parent / "shared"
DTD = SHARED / "data" / "dtd"
ORACLES = SHARED / "oracles"
needs_dtd = pytest.mark.skipif(not DTD.is_dir(), reason=f"no pictures of DTD in {DTD}")
needs_oracles = pytest.mark.skipif(not ORACLES.is_dir(), reason=f"no outputs of others in {ORACLES}")

LONG = []


def beside(test):
    """Marks a long test: a process runs it on the second core, one such after the other. The other tests run
    here, where its end is waited for."""
    if "CGN_TEST_BESIDE" in os.environ:                     # this is such a process
        return test
    LONG.append(test.__name__)

    def wait(processes):
        result = processes[test.__name__].result()
        print(result.stdout)
        assert result.returncode == 0, result.stdout + result.stderr

    return wait


@pytest.fixture(scope="session", autouse=True)
def processes(request):
    """The selected long tests: name -> future of the finished process. Each process has one thread."""
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    pool, alone = ThreadPoolExecutor(1), {**os.environ, "CGN_TEST_BESIDE": "1"}

    def start(name):
        return process("-m", "pytest", "-q", "-s", f"{__file__}::{name}", env=alone, timeout=900)

    yield {item.name: pool.submit(start, item.name) for item in request.session.items if item.name in LONG}
    pool.shutdown(cancel_futures=True)


@pytest.fixture(autouse=True)
def in_project(monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.chdir(HERE)


@pytest.fixture
def few_images(monkeypatch):
    """Splits of 200 images: enough to see that the parts of a long command fit together."""
    monkeypatch.setattr(mnist_variants, "SPLITS", {name: slice(200) for name in mnist_variants.SPLITS})


def script(name, *arguments):
    """Runs a script's main here, which saves importing torch again; the result is like a process's."""
    out, error, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try:
            sys.modules[Path(name).stem].main([str(argument) for argument in arguments])
        except SystemExit as stopped:
            code = stopped.code
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), error.getvalue())


def process(*arguments, cwd=HERE, timeout=300, **more):
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout, **more)


def torchrun(processes, port):
    return "-m", "torch.distributed.run", "--nproc-per-node", processes, "--master-port", port


def one_line(result, *words):
    """The run ended with exit code 2 and one line that holds the words."""
    assert result.returncode == 2, result
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    for word in words:
        assert word in result.stderr, result.stderr


# ---------- mnist_variants

mv, mv_main = mnist_variants, partial(script, "mnist_variants.py")


def test_splits_are_mnists_first_50000_last_10000_and_the_test_file():
    _, labels = mv.read_mnist(True)
    _, test = mv.read_mnist(False)
    for split, expected in (("train", labels[:50_000]), ("val", labels[50_000:]), ("test", test)):
        assert torch.equal(mv.load("colored", split).shape, expected)


@pytest.mark.parametrize("name", mv.NAMES)
def test_a_split_is_a_pure_function_of_its_seed(name):
    first, again, other = (mv.load(name, "val", seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not torch.equal(first.images, other.images) and torch.equal(first.shape, other.shape)
    assert first.images.dtype == torch.uint8 and first.images.shape == (10_000, 3, 32, 32)


@pytest.mark.parametrize("agreement", [0.0, 0.1, 0.9, 1.0])
def test_labels_agree_as_often_as_asked_and_the_rest_is_uniform(agreement):
    data = mv.load("double-colored", "train", agreement=agreement)
    for label in (data.foreground, data.background):
        agrees = label == data.shape
        assert abs(agrees.double().mean() - agreement) < 0.005
        if agreement < 1:
            other = (label - data.shape)[~agrees] % 10
            share = other.bincount(minlength=10)[1:] / len(other)
            assert (share - 1 / 9).abs().max() < 4 * (8 / 81 / len(other)) ** 0.5
    both = ((data.foreground == data.shape) & (data.background == data.shape)).double().mean()
    assert abs(both - agreement ** 2) < 0.005  # drawn separately


def test_foreground_and_background_may_agree_apart_and_train_alone_agrees_by_default():
    for split, agreement, expected in (
            ("test", mv.CUE_CONFLICT, (0.0, 0.1)), ("test", mv.MIXED_RAND, (1.0, 0.1)),
            ("train", None, (1, 1)), ("val", None, (0.1, 0.1)), ("test", None, (0.1, 0.1))):
        data = mv.load("wildlife", split, agreement=agreement)
        found = [(label == data.shape).double().mean().item() for label in (data.foreground, data.background)]
        assert found == pytest.approx(expected, abs=0.012)


def test_colored_is_a_grey_digit_times_a_class_color_of_variance_0_02():
    data = mv.load("colored", "train")
    assert (data.background == -1).all()
    brightest = data.images.flatten(2).amax(2).double() / 255  # digits reach grey 255 nearly always
    for label in range(10):
        mean = mv.COLORED[label] / 255
        inner = (mean > 0.4) & (mean < 0.6)  # channels that clipping leaves alone
        found = brightest[data.foreground == label]
        if inner.any():
            assert (found[:, inner].mean(0) - mean[inner]).abs().max() < 0.02
            assert (found[:, inner].var(0) - 0.02).abs().max() < 0.003
    grey = data.images.double().sum(1)
    assert (grey.amax((1, 2)) > 0).all() and (data.images[:, :, 0, 0] == 0).double().mean() > 0.99


def test_double_colored_has_two_flat_colors_and_the_variance_can_be_the_authors():
    data = mv.load("double-colored", "val", variance=0.01 ** 2)
    for image, fore, back in zip(data.images[:200], data.foreground, data.background):
        colors = image.flatten(1).T.unique(dim=0)
        assert len(colors) <= 2
        for mean in (mv.DOUBLE_FOREGROUND[fore], mv.DOUBLE_BACKGROUND[back]):
            assert (colors.long() - mean).abs().amax(1).min() <= 15
    assert torch.equal(mv.DOUBLE_FOREGROUND[0], mv.DOUBLE_BACKGROUND[6])


def test_wildlife_shows_patches_of_its_labels_textures_in_seconds():
    started = time.perf_counter()
    parts, (_, fore, back) = mv.load_parts("wildlife", "train", agreement=0.1)
    assert time.perf_counter() - started < 10  # the authors' loader: 170 s
    textures = mv.draw_textures()
    for kind, pictures, labels in ((0, parts.foreground, fore), (1, parts.background, back)):
        for index in range(5):
            windows = textures[kind, labels[index]].unfold(1, 32, 1).unfold(2, 32, 1)
            assert (windows == pictures[index][:, None, None]).all(0).all(-1).all(-1).any()


def test_a_patch_is_cut_at_a_random_row_and_at_a_random_column():
    place = torch.arange(156, dtype=torch.uint8).expand(10, 156, 156)
    textures = torch.stack([place.mT, place, 0 * place], dim=1)
    corners = mv._patches(textures, torch.arange(5000) % 10, torch.Generator().manual_seed(0))
    corners = corners[:, :2, 0, 0].double()
    assert (corners.amin(0) == 0).all() and (corners.amax(0) == 156 - 32).all()
    assert abs(corners.T.corrcoef()[0, 1]) < 0.05


def test_drawn_textures_are_multi_modal_within_a_class_and_distinct_between_classes():
    textures = mv.draw_textures().double()
    blocks = textures.unfold(3, 32, 31).unfold(4, 32, 31).mean((-1, -2)).flatten(3)  # mean colours of patches
    for kind in blocks:
        assert (kind - kind.mean(2, keepdim=True)).norm(dim=1).amax(1).min() > 8  # grey levels
        centers = kind.mean(2)
        assert (torch.cdist(centers, centers) + 1e9 * torch.eye(10)).min() > 3


@needs_dtd
def test_the_papers_textures_are_scaled_padded_and_ordered_by_class():
    textures = mv.read_textures(DTD)
    assert textures.shape == (2, 10, 3, 156, 156)
    with Image.open(DTD / "images" / "veined" / "veined_0073.jpg") as picture:
        expected = np.array(picture.convert("RGB").resize((150, 150), Image.NEAREST))
    assert np.array_equal(textures[1, 2, :, 3:153, 3:153].permute(1, 2, 0).numpy(), expected)
    assert torch.equal(textures[..., 0], textures[..., 6])  # reflected about column 3


def test_a_texture_that_does_not_open_is_refused_by_its_name(tmp_path):
    victim = tmp_path / "images" / "striped" / "striped_0001.jpg"
    victim.parent.mkdir(parents=True)
    for _ in range(2):                  # missing, then broken
        with pytest.raises(ValueError, match="striped_0001.jpg does not open"):
            mv.read_textures(tmp_path)
        victim.write_bytes(b"no picture")


def test_a_download_that_fails_is_one_line_leaves_nothing_and_is_tried_again(tmp_path, monkeypatch):
    def fetch(root, download):
        raw = Path(root, "MNIST", "raw")
        raw.mkdir(parents=True)         # torchvision leaves them behind
        calls.append(root)
        if len(calls) < 3:
            raise RuntimeError("Error downloading train-images-idx3-ubyte.gz:\n<no network>")
        for path in (HERE / "data" / "mnist").glob("*.gz"):
            shutil.copy(path, raw)

    calls, root = [], tmp_path / "absent"
    monkeypatch.setattr("torchvision.datasets.MNIST", fetch)
    for _ in range(2):
        one_line(mv_main("--mnist", root, "--out", tmp_path), "absent", "no network", "--mnist")
        assert not root.exists()
    assert len(mv.read_mnist(False, root)[1]) == 10_000 and len(list(root.iterdir())) == 4


@pytest.mark.parametrize("damage", ["altered", "truncated", "missing", "longer", "no gzip"])
def test_a_damaged_idx_file_is_named_in_one_line(tmp_path, damage):
    for name in mv.MNIST_FILES:
        os.symlink(HERE / "data" / "mnist" / f"{name}.gz", tmp_path / f"{name}.gz")
    victim = tmp_path / "train-labels-idx1-ubyte.gz"
    packed = victim.read_bytes()
    victim.unlink()
    content = bytearray(gzip.decompress(packed))
    content[100] ^= damage == "altered"
    if damage in ("altered", "longer"):
        packed = gzip.compress(content + b"\0" * (damage == "longer"), 1)
    if damage != "missing":
        victim.write_bytes({"truncated": packed[:-1000], "no gzip": b"none"}.get(damage, packed))
    one_line(mv_main("--mnist", tmp_path, "--out", tmp_path), str(victim))


def test_a_sheet_shows_pictures_unstretched_under_names_without_boxes(tmp_path):
    images = torch.full((2, 3, 3, 4, 4), 100, dtype=torch.uint8)
    mv.save_sheet(tmp_path / "s.png", images, ["café", "日"], ["x", "x", "1 → 9"], scale=2)
    sheet = np.array(Image.open(tmp_path / "s.png"))
    assert (sheet == 100).all(2).sum() >= 6 * 8 * 8 and (sheet < 50).all(2).any()
    mv.save_sheet(tmp_path / "t.png", images, ["cafe\u0301", "?"], ["x", "x", "1 -> 9"], scale=2)
    assert (tmp_path / "s.png").read_bytes() == (tmp_path / "t.png").read_bytes()
    for name, rows, words in (("s.png", "a", "1 row and 3 column names"), ("s.jpg", "ab", "s.jpg .* .png")):
        with pytest.raises(ValueError, match=words):
            mv.save_sheet(tmp_path / name, images, rows, "xxy")


def test_a_file_is_written_whole_or_not_at_all_and_by_two_at_once(tmp_path):
    path = tmp_path / "new" / "a.bin"
    mv.write_file(path, b"old")

    def content(file):
        file.write(b"ne")
        mv.write_file(path, b"of another")  # meanwhile
        file.write(b"w")

    def fail(file):
        file.write(b"half")
        raise error("x")

    mv.write_file(path, content)
    for error in (KeyboardInterrupt, OSError, RuntimeError):
        with pytest.raises((KeyboardInterrupt, OSError)):
            mv.write_file(path, fail)
    assert path.read_bytes() == b"new" and os.listdir(path.parent) == ["a.bin"]
    for place in (tmp_path, "/dev/null", path / "b"):
        with pytest.raises(OSError, match="could not be written"):
            mv.write_file(place, b"")


def test_own_pictures_are_read_as_they_are_meant_to_be_seen(tmp_path):
    for name in ("10", "9", ".ipynb_checkpoints"):
        (tmp_path / name / "more").mkdir(parents=True)
    quarter, gas = tmp_path / "9" / "more" / "0.png", tmp_path / "10" / "gas-mask.PNG"
    Image.fromarray(np.full((8, 12), 0x4000, np.uint16)).save(quarter)  # of 16 bits
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(gas)  # nothing but transparency
    for name in ("._0.png", "Thumbs.db", "00000000-mask.png", "more/00000001-background.png"):
        (tmp_path / "10" / name).write_bytes(b"no picture of the class")
    images, labels, names = mv.load_folder(tmp_path)
    assert names == ["9", "10"] and labels.tolist() == [0, 1]  # as numbers
    assert images.shape == (2, 3, 32, 32) and images[:, :, 0, 0].tolist() == [[63] * 3, [255] * 3]
    assert mv.class_names(tmp_path) == names
    assert mv.labelled_files(tmp_path) == [(str(quarter), (0,)), (str(gas), (1,))]
    (tmp_path / "a").mkdir()
    assert mv.class_folders(tmp_path) == ["10", "9", "a"]
    for folder, words in (("", "a holds no picture"), ("a", "no subfolders"), ("", "0.png does not open")):
        with pytest.raises(ValueError, match=words):
            mv.load_folder(tmp_path / folder)
        if folder:
            (tmp_path / "a" / "0.png").write_bytes(b"no picture")


def test_labels_and_class_names_travel_with_counterfactuals(tmp_path):
    table = tmp_path / "labels.csv"
    table.write_bytes(b"\xef\xbb\xbffile,seed,u,shape,texture,background\n00000000.png,0,0,1,2,3\n")
    assert mv.labelled_files(tmp_path) == [(str(tmp_path / "00000000.png"), (1, 2, 3))]
    assert mv.class_names(tmp_path) is None
    (tmp_path / "settings.json").write_text('{"names": ["ü", "b"]}', encoding="utf-8")
    assert mv.class_names(tmp_path) == ["ü", "b"]
    for row, words in (("../x.png,1,1,1", "not in its"), ("..,1,1,1", "not in its"), ("", "no row"),
                       ("0.png,1,one,1", "no number"), ("0.png,1", "no number"), ("\xff", "utf-8")):
        table.write_bytes(f"file,shape,texture,background\n{row}\n".encode("latin-1"))
        with pytest.raises(ValueError, match=f"labels.csv .*{words}"):
            mv.labelled_files(tmp_path)


def test_mistakes_and_ctrl_c_are_one_line(tmp_path, monkeypatch):
    for name, near in (("double_colored", "double-colored"), ("colourd", "colored")):
        with pytest.raises(ValueError, match=f"did you mean {near}.* colored, double-colored, wildlife"):
            mv.load(name, "train")
    (tmp_path / "file").write_text("")
    one_line(mv_main("--out", tmp_path / "file"), "file is a file")
    one_line(mv_main("--seed", -1, "--out", tmp_path), "seed -1")
    monkeypatch.chdir(tmp_path)  # MNIST is found beside the file
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="cp1252"))
    mv.main(["--out", "日"])
    assert sorted(path.stem for path in Path("日").glob("*.png")) == sorted(mv.NAMES)
    monkeypatch.setattr(mv, "load", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    result = mv_main("--out", tmp_path)
    assert (result.returncode, result.stderr) == (130, "stopped\n")


# ---------- evaluate

def test_accuracy_and_confusion_by_hand():
    labels, predictions = torch.tensor([0, 0, 1, 2, 2]), torch.tensor([0, 1, 1, 2, 0])
    assert abs(evaluate.accuracy(predictions, labels) - 0.6) < 1e-12
    assert evaluate.confusion(predictions, labels, 3).tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 1]]
    for count in (0, 4):
        with pytest.raises(ValueError):
            evaluate.accuracy(predictions[:count], labels[:0])
    with pytest.raises(ValueError, match="not in 0..1"):
        evaluate.confusion(predictions, labels, 2)


def test_mean_deviation_and_top_k_accuracy_by_hand():
    assert evaluate.mean_std([1.0, 2.0, 4.0]) == pytest.approx((7 / 3, (7 / 3) ** 0.5))
    assert evaluate.mean_std([2.0]) == (2.0, 0.0)
    with pytest.raises(ValueError):
        evaluate.mean_std([])
    scores = torch.tensor([[0.1, 0.5, 0.4], [0.6, 0.3, 0.1], [0.2, 0.3, 0.5]])
    found = [evaluate.top_k_accuracy(scores, torch.tensor([2, 2, 2]), k) for k in (1, 2, 3)]
    assert found == pytest.approx([1 / 3, 2 / 3, 1])
    with pytest.raises(ValueError, match="the 4 highest of 3"):
        evaluate.top_k_accuracy(scores, torch.tensor([2, 2, 2]), 4)


def test_mask_iou_by_hand():
    a = torch.tensor([[1.0, 0.9, 0.0, 0.2], [0, 0, 0, 0], [1, 0, 0, 0]])[:, None, None]
    b = torch.tensor([[1.0, 0.0, 0.8, 0.6], [0, 0, 0, 0], [0, 1, 0, 0]])[:, None, None]
    assert evaluate.mask_iou(a, b) == pytest.approx((1 / 4 + 1 + 0) / 3)


def test_inception_score_by_hand():
    even, sure = torch.full((10, 4), 0.25), torch.eye(4).repeat(25, 1)
    assert evaluate.inception_score(sure, 1) == pytest.approx((4, 0))  # the class count
    assert evaluate.inception_score(even, 5) == pytest.approx((1, 0))
    p = torch.tensor([[0.5, 0.5], [1.0, 0.0]])
    expected = np.exp((0.5 * np.log(0.5 / 0.75) + 0.5 * np.log(0.5 / 0.25) + np.log(1 / 0.75)) / 2)
    assert evaluate.inception_score(p, 1)[0] == pytest.approx(expected)
    mean, std = evaluate.inception_score(torch.eye(5).repeat(21, 1), 10)  # 105 rows: parts of 11 and of 10
    assert 3 < mean < 5 and 0 < std < 1  # shuffled: no part is even
    for bad in ((p, 3), (p, 0), (2 * p, 1), (p[0], 1)):
        with pytest.raises(ValueError):
            evaluate.inception_score(*bad)


def test_a_table_of_probabilities_gives_its_inception_score(tmp_path):
    probabilities = torch.rand(7, 10, generator=torch.Generator().manual_seed(0)).double().softmax(dim=1)
    mean, std = evaluate.inception_score(probabilities, 2, seed=1)
    rows = [",".join(map(str, row)) for row in probabilities.tolist()]
    (tmp_path / "p.csv").write_text("\n".join([",".join(f"class{k}" for k in range(10)), *rows]))
    score = ("evaluate.py", "--inception-score", tmp_path / "p.csv", "--splits")
    result = script(*score, 2, "--seed", 1, "--out", tmp_path / "new" / "r.json")
    assert f"| 7 | {mean:.2f} ± {std:.2f} |" in result.stdout, result
    held = json.loads((tmp_path / "new" / "r.json").read_text())  # the folder is made
    assert held == {"images": 7, "splits": 2, "inception_score": mean, "std": std}
    one_line(script(*score, 8), "8 splits")
    (tmp_path / "p.csv").write_text("a,b\n0.5,cat\n")
    one_line(script(*score, 1), "p.csv", "'cat'")


def test_categories_and_imagenet9_have_the_published_sizes():
    sizes = [len(set(indices)) for indices in evaluate.cue_conflict_categories().values()]
    assert sizes == [1, 4, 2, 49, 5, 7, 3, 6, 4, 3, 109, 2, 2, 1, 1, 8]
    classes = torch.tensor(evaluate.imagenet9_map())
    assert len(classes) == 1000 and (classes >= 0).sum() == 370
    for index, number in ((151, 0), (171, -1), (268, 0), (7, 1), (146, 1), (407, 2), (880, 2), (33, 3),
                          (299, 4), (326, 5), (889, 6), (384, 7), (0, 8), (397, 8), (999, -1)):
        assert classes[index] == number, index


@needs_oracles
@pytest.mark.parametrize("files, percent, hits, images", [
    ("*experiment_squeezenet1_1_session-1.csv", "18.22", (133, 597), 1280),
    ("*_train_60_epochs_lr0.001_session-1.csv", "79.02", (467, 124), 1280),
    ("*experiment_alexnet_session_1.csv", "42.94", (283, 376), 1280),
    ("humans/*.csv", "95.87", (9236, 398), 12800)])  # pooled, with missed answers: na
def test_published_decisions_give_the_published_shape_bias(files, percent, hits, images):
    folder = ORACLES / "cue_conflict"
    result = script("evaluate.py", "--cue-conflict", *sorted(folder.glob(files)))
    assert f"| object_response | {percent} % | {hits[0]} | {hits[1]} | {images} |" in result.stdout, result
    lines = (folder / "categories.txt").read_text().splitlines()
    table = dict(line.split("\t") for line in lines if not line.startswith("#"))
    table = {name: evaluate._indices(text) for name, text in table.items()}
    assert evaluate.cue_conflict_categories() == table


def test_shape_bias_by_hand():
    shape, texture = ["cat", "cat", "dog", "dog", "car"], ["dog", "dog", "cat", "dog", "oven"]
    assert evaluate.shape_bias(["cat", "dog", "dog", "dog", "cat"], shape, texture) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="undefined"):
        evaluate.shape_bias(["oven"] * 4 + ["cat"], shape, texture)
    with pytest.raises(ValueError, match="4 decisions for 5 shapes"):
        evaluate.shape_bias(["cat"] * 4, shape, texture)
    probabilities = torch.zeros(2, 1000)
    probabilities[0, 152:200] = 0.01  # 47 dogs, of 109: less on average than one knife
    probabilities[0, 499], probabilities[1, 385] = 0.006, 1.0
    assert evaluate.cue_conflict_decisions(probabilities) == ["knife", "elephant"]


def test_columns_of_a_table_are_judged_one_by_one_and_rows_pooled():
    rows = [{"file": "cat1-dog2.png", "shape": "cat", "texture": "dog"},
            {"file": "cat2-dog1.png", "shape": "na", "texture": "cat"},
            {"imagename": "x/cat3-dog1.png", "object_response": "dog"}]
    held = evaluate.judge_cue_conflict(rows)
    assert held["shape"] == {"shape bias": 1.0, "by shape": 1, "by texture": 0, "images": 2}
    assert held["texture"]["shape bias"] == 0.5 and held["object_response"]["by texture"] == 1
    rows = [{"shape label": 3, "texture label": "4", "shape": "3 1", "texture": "3 4", "average": "3 4"},
            {"shape label": "5", "texture label": "6", "shape": "4 5", "texture": "5 4", "average": "3 4"}]
    assert evaluate.judge_imagenet(rows) == {"shape": {"samples": 2, "top-1": 0.5, "top-2": 1.0},
                                             "texture": {"samples": 2, "top-1": 0.0, "top-2": 0.5}}
    rows = [{"variation": name, "label": "0", "average": f"{best} 0", "shape": "151"} for name, best in
            (("mixed_same", 151), ("mixed_rand", 151), ("mixed_rand", 1), ("original", 500))]
    held = evaluate.judge_imagenet9(rows)
    assert held["average"] == {"mixed_same": 1.0, "mixed_rand": 0.5, "original": 0.0, "BG-Gap": 0.5}
    assert held["shape"]["BG-Gap"] == 0.0
    assert evaluate.judge_imagenet9(rows[-1:])["average"] == {"original": 0.0}
    for judge in (evaluate.judge_imagenet, evaluate.judge_cue_conflict, evaluate.judge_imagenet9):
        with pytest.raises(ValueError, match="no row"):
            judge([])


def test_a_table_is_written_whole_and_read_with_or_without_a_byte_order_mark(tmp_path):
    rows = [{"file": 'a "quoted", ü.png', "label": "1", "shape + texture": "1 2"},
            {"file": "日.png", "label": "0", "shape + texture": "0 2"}]
    evaluate.write_table(tmp_path / "t.csv", rows)
    assert evaluate.read_table(tmp_path / "t.csv") == rows and len(list(tmp_path.iterdir())) == 1
    (tmp_path / "t.csv").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "t.csv").read_bytes())
    assert evaluate.read_table(tmp_path / "t.csv") == rows
    before = (tmp_path / "t.csv").read_bytes()
    with pytest.raises(KeyboardInterrupt), evaluate._written(tmp_path / "t.csv") as file:
        file.write("half")
        raise KeyboardInterrupt
    assert (tmp_path / "t.csv").read_bytes() == before and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(OSError, match="no regular file"):
        evaluate.write_table(tmp_path, rows)


def test_predictions_of_any_system_are_judged(tmp_path):
    table = tmp_path / "p.csv"
    table.write_text("label,prediction,file\n0,0,a\n1,0,b\n1,1,c\n2,1,d\n")
    result = script("evaluate.py", "--predictions", table, "--out", tmp_path / "p.json")
    assert "| prediction | 4 | 50.00 % |" in result.stdout and "| 2 | 0 | 1 | 0 |" in result.stdout
    held = json.loads((tmp_path / "p.json").read_text())["prediction"]
    assert held["confusion"] == [[1, 0, 0], [1, 1, 0], [0, 1, 0]]
    table.write_text("label,prediction\n" + "".join(f"{label},0 1 2 3 4 5\n" for label in (0, 5, 4, 999)))
    lines = script("evaluate.py", "--predictions", table).stdout.splitlines()
    assert lines[0] == "| accuracy | samples | top-1 | top-5 |"
    assert lines[2:] == ["| prediction | 4 | 25.00 % | 50.00 % |"]  # no table of a thousand classes


@pytest.mark.parametrize("what, content, words", [
    ("predictions", "label,guess\n0,0\n", "no column of prediction"), ("predictions", "", "no row"),
    ("predictions", "label,prediction\n", "no row"), ("predictions", "label,prediction\n0\n", "fewer cells"),
    *(("predictions", f"label,prediction\n{rows}\n", words) for rows, words in (
        ("0,cat", "'cat'"), ("0,1 2\n0,1", "whole numbers"), ("-1,0", "-1"), ("0,", "nothing"),
        ("1 2,3", "(1, 2)"), (f"{2 ** 70},1", "label"))),
    ("predictions", "file,prediction\na,1\n", "no column label"), ("predictions", b"\xff\xfe\0", "no CSV"),
    ("cue-conflict", "file,choice\na,cat\n", "decision, object_response"),
    ("cue-conflict", "file,decision\ncat1-dog2.png,cow\n", "'cow' is none of the 16"),
    ("cue-conflict", "file,decision\ncat.png,cat\n", "'cat.png'"),
    ("cue-conflict", "file,decision\ncat1-dog2.png,na\n", "undefined"),
    ("imagenet9", "label,prediction\n0,1\n", "variation"),
    ("imagenet9", "variation,label,prediction\nmixed_same,9,1\n", "0..8"),
    ("imagenet9", "variation,label,prediction\nmixed_same,1,1000\n", "0..999"),
])
def test_a_table_with_a_mistake_is_one_line(tmp_path, what, content, words):
    (tmp_path / "t.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    one_line(script("evaluate.py", f"--{what}", tmp_path / "t.csv"), "t.csv", words)


def test_an_output_is_tried_before_the_work_and_destroys_nothing(tmp_path, monkeypatch):
    table = tmp_path / "t.csv"
    judge = ("evaluate.py", "--predictions", table)
    table.write_text("label,prediction\n0,0\n")
    os.symlink(table, tmp_path / "link.csv")
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "read_table", lambda path: 1 / 0)  # is not reached
        for out in (table, tmp_path / "link.csv", tmp_path, "/dev/null", table / "r.json"):
            one_line(script(*judge, "--out", out), str(out).removesuffix("/r.json"))
        patch.setattr(evaluate, "read_table", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
        result = script(*judge, "--out", tmp_path / "r.json")
        assert (result.returncode, result.stderr) == (130, "stopped\n")
    assert table.read_text() == "label,prediction\n0,0\n" and len(list(tmp_path.iterdir())) == 2
    one_line(script("evaluate.py", "--predictions", "nowhere.csv"), "nowhere.csv", "classify.py")
    one_line(script(*judge, "--splits", 3), "--splits")


def test_a_console_that_cannot_encode_a_name_ends_no_evaluation(tmp_path):
    rows = [("日本", 0, 151), ("mixed_same", 0, 151), ("mixed_rand", 0, 151), ("mixed_rand", 8, 500)]
    rows = [dict(zip(("variation", "label", "prediction"), row)) for row in rows]
    evaluate.write_table(tmp_path / "t.csv", rows)
    console = {**os.environ, "PYTHONIOENCODING": "cp1252"}
    result = process("evaluate.py", "--imagenet9", tmp_path / "t.csv", env=console)
    lines = result.stdout.splitlines()
    assert lines[0] == "| accuracy | ?? | mixed_same | mixed_rand | BG-Gap |", result
    assert lines[2] == "| prediction | 100.00 % | 100.00 % | 50.00 % | 50.00 % |"


import http.server

from torch._subclasses.fake_tensor import FakeTensorMode

# ---------- biggan

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
    for key in [key for key in state if key.endswith("weight_orig")]:  # u, v nearly as they are trained
        matrix = state[key].flatten(1)
        u, v = key.replace("weight_orig", "weight_u"), key.replace("weight_orig", "weight_v")
        for _ in range(3):
            state[v] = F.normalize(matrix.T @ state[u], dim=0)
            state[u] = F.normalize(matrix @ state[v], dim=0)
    return state


RELEASED = [(2048, 2048), (2048, 2048), (2048, 2048), (2048, 1024), (1024, 1024), (1024, 1024), (1024, 1024),
            (1024, 512), (512, 512), (512, 256), (256, 256), (256, 128)]  # 256 x 256 pixels
RELEASED_SIZE = RELEASED, 8, 1000, 128, 128
SMALL = [(32, 32), (32, 16), (16, 16), (16, 8)]  # 16 x 16 pixels


def plain_biggan(state, z, y, row):
    """BigGAN-deep line by line from a raw dict, every norm recomputed and nothing left out."""
    def weight(name):
        matrix = state[f"{name}.weight_orig"]
        return matrix / (state[f"{name}.weight_u"] @ matrix.flatten(1) @ state[f"{name}.weight_v"])

    def conv(name, x):
        kernel = weight(name)
        return F.conv2d(x, kernel, state.get(f"{name}.bias"), padding=kernel.shape[-1] // 2)

    def norm(name, x):
        mean, var = state[f"{name}.running_means"][row], state[f"{name}.running_vars"][row]
        x = (x - mean[:, None, None]) / (var[:, None, None] + 1e-4).sqrt()
        scale, offset = 1 + condition @ weight(f"{name}.scale").T, condition @ weight(f"{name}.offset").T
        return F.relu(x * scale[:, :, None, None] + offset[:, :, None, None])

    condition = torch.cat([z, state["embeddings.weight"][:, y].T], 1)
    x = condition @ weight("generator.gen_z").T + state["generator.gen_z.bias"]
    x = x.view(len(z), 4, 4, -1).permute(0, 3, 1, 2).contiguous()
    number, block = 0, 0
    while any(key.startswith(f"generator.layers.{number}.") for key in state):
        name = f"generator.layers.{number}"
        number += 1
        if f"{name}.gamma" in state:
            theta = conv(f"{name}.snconv1x1_theta", x).flatten(2)
            phi, g = (F.max_pool2d(conv(f"{name}.snconv1x1_{k}", x), 2).flatten(2) for k in ("phi", "g"))
            attended = g @ torch.softmax(theta.transpose(1, 2) @ phi, -1).transpose(1, 2)
            attended = conv(f"{name}.snconv1x1_o_conv", attended.view(len(x), -1, *x.shape[2:]))
            x = x + state[f"{name}.gamma"] * attended
            continue
        h = conv(f"{name}.conv_0", norm(f"{name}.bn_0", x))
        h = norm(f"{name}.bn_1", h)
        if block % 2:
            h, x = F.interpolate(h, scale_factor=2), F.interpolate(x, scale_factor=2)
        h = conv(f"{name}.conv_2", norm(f"{name}.bn_2", conv(f"{name}.conv_1", h)))
        h = conv(f"{name}.conv_3", norm(f"{name}.bn_3", h))
        x = x[:, :h.shape[1]] + h
        block += 1
    name = "generator.bn"
    x = F.batch_norm(x, state[f"{name}.running_means"][row], state[f"{name}.running_vars"][row],
                     state[f"{name}.weight"], state[f"{name}.bias"], False, 0.0, 1e-4)
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
        assert (found - expected).abs().max() <= 1e-5, truncation


@needs_oracles
@pytest.mark.parametrize("resolution", [128, 256, 512])
def test_biggan_has_the_keys_and_shapes_of_the_released_files(resolution):
    table = (SHARED / "state_dicts" / f"biggan-deep-{resolution}.txt").read_text().splitlines()
    rows = dict(line.split("\t") for line in table if not line.startswith("#"))
    with torch.device("meta"):
        state = {key: torch.empty([int(side) for side in shape.split("x")]) for key, shape in rows.items()}
        model = biggan._build(state, "table")
    model.load_state_dict(state, assign=True)
    assert model.resolution == resolution and model.noise == 128


def test_biggan_equals_the_plain_forward_in_float64_at_full_size():
    z, y, state = biggan.truncated_noise(1, seed=3), torch.tensor([207]), raw_biggan(*RELEASED_SIZE)
    with torch.no_grad():
        expected = plain_biggan({key: value.double() for key, value in state.items()}, z.double(), y, 50)
        found = biggan.load(state)(z, y, 1.0)
    assert (found - expected).norm() <= 1e-4 * expected.norm() and expected.std() > 0.1


@beside
def test_frozen_biggan_takes_less_than_two_thirds_of_the_plain_forwards_time():
    """The best of five runs each, in turns on one thread, in the processor's time."""
    z, y, state = biggan.truncated_noise(1, seed=3), torch.tensor([207]), raw_biggan(*RELEASED_SIZE)
    model, seconds = biggan.load(state), ([], [])
    with torch.no_grad():
        for _ in range(5):
            for times, run in zip(seconds, (lambda: plain_biggan(state, z, y, 50), lambda: model(z, y, 1.0))):
                started = time.process_time()
                run()
                times.append(time.process_time() - started)
    plain, frozen = map(min, seconds)
    assert frozen <= 0.65 * plain, (frozen, plain)


def test_every_row_of_statistics_is_met_and_what_lies_between_is_interpolated():
    state = raw_biggan(SMALL, 2)
    norm = biggan.load(state).generator["bn"]
    for row in range(1, 51):
        means = state["generator.bn.running_means"][row]
        assert torch.equal(biggan._row(norm.running_means, row / 50), means)
    low, high = state["generator.bn.running_vars"][13:15]
    assert torch.allclose(biggan._row(norm.running_vars, 0.275), 0.25 * low + 0.75 * high, atol=1e-5)


def test_three_channels_give_the_gradients_of_all():
    state = {key: value.double() for key, value in raw_biggan(SMALL, 2).items()}
    model = biggan.load(state, frozen=False).double()
    model.load_state_dict(state)
    z, y = torch.randn(2, 8, dtype=torch.float64), torch.tensor([3, 19])
    model(z, y, 0.4).square().sum().backward()
    leaves = {name: state[name].clone().requires_grad_() for name, _ in model.named_parameters()}
    plain_biggan({**state, **leaves}, z, y, 20).square().sum().backward()
    for name, parameter in model.named_parameters():
        difference = (parameter.grad - leaves[name].grad).norm()
        assert difference <= 1e-9 * (1e-6 + leaves[name].grad.norm()), name


def test_held_norms_give_the_same_images_and_gradients():
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
    for arguments, words in (((z, y, 0.0), "truncation 0.0"), ((z[:, :5], y), "noise .*8"),
                             ((z.numpy(), y), "noise .*tensor"), ((z, 3), "classes 3.*tensor"),
                             ((z, [1, 19]), r"classes \[1, 19\].*tensor"), ((z, y > 1), "classes .*bool"),
                             ((z, y + 1), "class 20 is not in 0..19"), ((z, y - 5), "class -4"),
                             ((z, torch.zeros(2, 19)), "19"), ((z, y[:1]), "one for each noise"),
                             ((z, y[:, None]), "classes .*2, 1")):
        with pytest.raises(ValueError, match=words):
            model(*arguments)


@pytest.mark.parametrize("truncation", [0.37, None])
def test_labels_on_a_device_are_never_read_and_the_forward_compiles_to_one_graph(truncation):
    """Reading makes a GPU wait; of a fake GPU's tensor nothing can be read."""
    z, y, model = torch.randn(2, 8), torch.tensor([3, 19]), biggan.BigGAN(SMALL, 2, 20, 8, 8)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(compiled(z, y, truncation), model(z, y, truncation))
    with FakeTensorMode(), torch.device("cuda"):
        y = torch.zeros(2).long()
        assert biggan.BigGAN(SMALL, 2, 20, 8, 8)(torch.randn(2, 8), y, truncation).device == y.device


def test_a_new_biggan_of_full_depth_draws_finite_images():
    torch.manual_seed(0)
    model = biggan.BigGAN([(i // 16, o // 16) for i, o in RELEASED], 8, 20, 8, 8)
    assert all(abs(norm.norm() - 1) < 1e-4 for norm in model.norms())  # weights are orthogonal
    for truncation in (1.0, 0.02, None):
        x = model(biggan.truncated_noise(2, 8, seed=0), torch.tensor([1, 7]), truncation)
        assert torch.isfinite(x).all() and 0.1 < x.std() < 0.95, truncation


def test_truncated_noise_is_cut_and_seeded():
    z = biggan.truncated_noise(2000, truncation=0.5, seed=1)
    assert z.shape == (2000, 128) and z.abs().max() <= 1
    assert abs(z.std() / 0.5 - 0.8796) < 0.01  # of a normal cut at 2
    assert torch.equal(z, biggan.truncated_noise(2000, truncation=0.5, seed=1))


def test_power_iteration_finds_the_largest_singular_value():
    layer = biggan.Conv(4, 6, 3)
    torch.nn.init.normal_(layer.weight_orig)
    for _ in range(200):
        layer.power_iteration()
    assert abs(torch.linalg.svdvals(layer.weight().detach().flatten(1))[0] - 1) < 1e-4


BIAS, CONV = "generator.gen_z.bias", "generator.layers.0.conv_0.weight_orig"


@pytest.mark.parametrize("change, words", [
    (lambda s: s.pop("generator.bn.bias"), "Missing.*generator.bn.bias"),
    (lambda s: s.update(extra=torch.zeros(1)), "Unexpected.*extra"),
    (lambda s: s.update({"generator.layers.1.conv_1.bias": torch.zeros(9)}), "layers.1.conv_1.bias.*9.*8"),
    (lambda s: [s.pop(f"generator.layers.{k}.conv_1.bias") for k in (0, 1, 3, 4)], "(conv_1.bias.*){4}"),
    (lambda s: s[CONV].view(-1)[5].fill_(float("nan")), "conv_0.*not finite"),
    (lambda s: s.pop(CONV), "no BigGAN-deep"), (lambda s: s.clear(), "no BigGAN-deep"),
    (lambda s: s["generator.bn.running_vars"][3].fill_(-1), "bn.running_vars .*negative variances"),
    (lambda s: s.update({BIAS: s[BIAS].long()}), "gen_z.bias is no dense tensor of floating"),
    (lambda s: s.update({BIAS: None}), "gen_z.bias is no dense tensor"),
    (lambda s: s.update({BIAS: s[BIAS].to_sparse()}), "gen_z.bias is no dense tensor"),
    (lambda s: s.update({BIAS: torch.zeros(1).expand(512)}), "gen_z.bias .*all stored"),
])
def test_a_raw_dict_that_does_not_fit_is_refused_with_every_difference(change, words):
    state = raw_biggan(SMALL, 2)
    change(state)
    with pytest.raises(ValueError, match=words) as error:
        biggan.load(state)
    assert "\n" not in str(error.value)


def test_files_that_run_code_are_cut_off_or_of_another_network_are_one_line(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    torch.save({"embeddings.weight": Evil()}, tmp_path / "evil.pt")
    torch.save(raw_biggan(SMALL, 2), tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    (tmp_path / "short.pt").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "empty.pt").write_bytes(b"")
    torch.save(u2net.U2Net().state_dict(), tmp_path / "other.pt")
    torch.save({1: torch.zeros(1)}, tmp_path / "numbered.pt")
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "script.pt")
    for name in "evil.pt short.pt empty.pt other.pt numbered.pt list.pt script.pt nowhere.pt".split():
        result = script("biggan.py", "--weights", tmp_path / name, "--out", tmp_path / "x.png")
        one_line(result, name)
        assert "weights_only" not in result.stderr
        with pytest.raises(ValueError, match=name), warnings.catch_warnings():
            warnings.simplefilter("error")
            biggan.load(tmp_path / name)
    assert not (tmp_path / "ran").exists() and not (tmp_path / "x.png").exists()


@pytest.mark.parametrize("wrap", [
    lambda state: {f"module.{key}": value for key, value in state.items()},
    lambda state: {"state_dict": state, "epoch": 3},
])
def test_weights_of_dataparallel_or_in_a_wrapper_are_read(tmp_path, wrap):
    state, z, y = raw_biggan(SMALL, 2), torch.randn(1, 8), torch.tensor([5])
    torch.save(wrap(state), tmp_path / "wrapped.pt")
    for source in (tmp_path / "wrapped.pt", wrap(state)):
        assert torch.equal(biggan.load(source)(z, y), biggan.load(state)(z, y))


def test_old_and_new_file_formats_load_alike_and_without_mapping_a_file_may_be_replaced(tmp_path):
    state = raw_biggan(SMALL, 2)
    torch.save(state, tmp_path / "new.pt")
    torch.save(state, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    z, y = torch.randn(1, 8), torch.tensor([0])
    assert torch.equal(biggan.load(tmp_path / "new.pt")(z, y), biggan.load(tmp_path / "old.pt")(z, y))
    kept = biggan.read_state(tmp_path / "new.pt", mmap=False)
    (tmp_path / "new.pt").write_bytes(b"")
    assert all(torch.equal(kept[key], value) for key, value in state.items())


@pytest.mark.parametrize("frozen", [True, False])
def test_loading_a_dict_leaves_it_alone_and_only_frozen_weights_have_no_gradient(frozen):
    state = raw_biggan(SMALL, 2)
    before = {key: value.clone() for key, value in state.items()}
    model = biggan.load(state, frozen=frozen)
    model(torch.randn(1, 8), torch.tensor([1]), 0.5)
    assert all(torch.equal(state[key], before[key]) for key in before)
    assert all(parameter.requires_grad is not frozen for parameter in model.parameters())


def test_imagenet_names_and_numbers_name_classes():
    assert biggan.class_numbers("207, ostrich,9", 1000) == {207: "golden retriever", 9: "ostrich"}
    assert biggan.class_numbers("3", 10) == {3: "class 3"}
    for word, words in (("Ostric", "did you mean ostrich"), ("1000", "'1000' is not in 0..999"), ("", "''")):
        with pytest.raises(ValueError, match=words):
            biggan.class_numbers(word, 1000)


# ---------- biggan, u2net: their weights

@pytest.fixture(params=["biggan", "u2net"])
def shelf(request, tmp_path, monkeypatch):
    """A module that stands in a folder of its own, and a function that lists one file of weights there."""
    module = sys.modules[request.param]
    monkeypatch.setattr(module, "__file__", str(tmp_path / "module.py"))

    def listed(address, sha256=""):
        (tmp_path / "weights.txt").write_text(f"# so\nw.pth | 10000 | {sha256} | - | {address} | here\n")
        return module, tmp_path / "weights"
    return listed


@contextlib.contextmanager
def full_disk(size):
    """A limit on the size of files stands in for it."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@contextlib.contextmanager
def served(content, sent):
    """The address of a server that promises the content and breaks off after some bytes."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[:sent])

        log_message = print

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}/w.pth"
        server.shutdown()


CONTENT = bytes(range(250)) * 40
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.mark.parametrize("sha256", [DIGEST, DIGEST[:8], ""])
def test_absent_weights_are_fetched_into_weights_beside_the_module(shelf, tmp_path, capsys, sha256):
    (tmp_path / "elsewhere").write_bytes(CONTENT)
    module, weights = shelf((tmp_path / "elsewhere").as_uri(), sha256)
    for _ in range(2):  # the second time it is there
        assert module.find_weights("w.pth") == weights / "w.pth"
    assert (weights / "w.pth").read_bytes() == CONTENT and len(list(weights.iterdir())) == 1
    out, error = capsys.readouterr()
    assert out.count("fetching") == 1 and out.count(f"SHA-256 {DIGEST}") == (0 if sha256 else 2) and not error
    with served(CONTENT, len(CONTENT)) as address:
        (weights / "w.pth").unlink()
        shelf(address, sha256)
        assert module.find_weights(tmp_path / "new" / "w.pth").read_bytes() == CONTENT


@pytest.mark.parametrize("sha256", [DIGEST, ""])
def test_a_fetch_that_fails_leaves_nothing_and_names_size_address_and_place(shelf, tmp_path, sha256):
    (tmp_path / "elsewhere").write_bytes(CONTENT)
    file = (tmp_path / "elsewhere").as_uri()
    with served(CONTENT, 5000) as broken:
        for address, size in ((broken, -1), ("http://127.0.0.1:9/w.pth", -1), (file, 5000)):  # no server at 9
            module, weights = shelf(address, sha256)
            words = f"{weights}/w.pth is missing.*put the 10000 bytes of {address}"
            with full_disk(size), pytest.raises(ValueError, match=words) as error:
                module.find_weights("w.pth")
            assert "\n" not in str(error.value) and not list(weights.iterdir())


def test_weights_of_another_hash_are_not_kept_nor_read_and_an_unlisted_is_printed(shelf, tmp_path, capsys):
    (tmp_path / "elsewhere").write_bytes(CONTENT)
    module, weights = shelf((tmp_path / "elsewhere").as_uri(), "00ff")
    with pytest.raises(ValueError, match=f"00ff.*{DIGEST}"):
        module.find_weights("w.pth")
    assert not list(weights.iterdir())
    (weights / "w.pth").write_bytes(b"?")
    with pytest.raises(ValueError, match="w.pth has SHA-256 [0-9a-f]{64}, weights.txt lists 00ff"):
        module.find_weights("w.pth")
    (tmp_path / "mine.pth").write_bytes(b"abc")
    assert module.find_weights(tmp_path / "mine.pth") == tmp_path / "mine.pth"
    assert "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad" in capsys.readouterr().out


def test_weights_txt_lists_what_is_shipped_and_where_the_rest_is():
    rows = [line.split(" | ") for line in (HERE / "weights.txt").read_text().splitlines() if line[0] != "#"]
    for name, size, sha256, _, address, _ in rows:
        if address.startswith("shipped in weights"):
            content = (HERE / "weights" / name).read_bytes()
            assert len(content) == int(size) and hashlib.sha256(content).hexdigest() == sha256
        assert address.startswith(("https://", "shipped", "torchvision.datasets"))
    assert {biggan.WEIGHTS, "u2net.pth", "u2netp.pth"} <= {row[0] for row in rows}


# ---------- biggan: the command

def test_a_sheet_shows_the_models_own_pixels_beside_each_classs_name(tmp_path):
    model = biggan.load(raw_biggan(SMALL, 2))
    names = {3: "a", 7: "the longest name that a class has"}
    biggan.save_sheet(model, names, 2, 0.5, 1, tmp_path / "s.png")
    found = np.array(Image.open(tmp_path / "s.png"))
    left = found.shape[1] - 2 * 18  # two pictures of 16 + 2 pixels
    x = model(biggan.truncated_noise(2, 8, 0.5, 1), torch.tensor([7, 7]), 0.5)[1]
    picture = found[20:20 + 16, left + 18:left + 18 + 16]
    assert np.abs(picture - ((x.permute(1, 2, 0).numpy() + 1) * 127.5)).max() <= 0.51
    short, long = (found[top:top + 20, :left].min(2) < 128 for top in (0, 20))
    assert np.flatnonzero(short.any(0)).max() < 40 and 150 < np.flatnonzero(long.any(0)).max() < left - 4
    assert not (long[[0, -1]].any() or short[[0, -1]].any() or long[:, :3].any())


def test_the_command_draws_a_sheet_into_a_new_folder_and_mistakes_are_one_line(tmp_path, monkeypatch):
    torch.save(raw_biggan(SMALL, 2), tmp_path / "w.png")
    run = "biggan.py", "--weights", tmp_path / "w.png", "--device", "cpu"
    out = tmp_path / "new" / "x.png"
    (tmp_path / "folder.png").mkdir()
    weights, jpg, folder = tmp_path / "w.png", tmp_path / "x.jpg", tmp_path / "folder.png"
    for option in (("--truncation", 0), ("--classes", "20"), ("--count", 0), ("--device", "nowhere"),
                   ("--out", jpg), ("--out", weights), ("--out", folder), ("--out", weights / "x.png")):
        one_line(script(*run, "--out", out, *option), str(option[1]))
    with full_disk(100):
        full = script(*run, "--classes", "3,7", "--out", out)
    one_line(full, "x.png", "too large")
    assert not list(out.parent.iterdir())
    result = script(*run, "--classes", "3,7", "--out", out)
    assert result.returncode == 0 and "SHA-256" in result.stdout and "cpu" in result.stdout, result
    assert [path.name for path in out.parent.iterdir()] == ["x.png"] and Image.open(out).size[1] == 2 * 20
    monkeypatch.setattr(biggan, "load", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
    stopped = script(*run, "--out", out)
    assert (stopped.returncode, stopped.stderr) == (130, "stopped\n")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak memory from Linux's /proc")
@pytest.mark.parametrize("allocator, bound", [({}, 380), ({"MALLOC_MMAP_THRESHOLD_": "131072"}, 340)])
@pytest.mark.parametrize("zipped", [True, False])
def test_biggan_in_little_memory(tmp_path, zipped, allocator, bound):
    """234 MB are loaded and one image is made in 380 MB more than torch alone takes; in 340 where glibc's
    threshold for mmap stays."""
    code = f"""
import sys; sys.path.insert(0, {str(HERE)!r})
import torch
def peak():
    return next(int(line.split()[1]) / 1000 for line in open("/proc/self/status") if line.startswith("VmHWM"))
before = peak()
import biggan
with torch.no_grad():
    biggan.load({str(tmp_path / 'w.pt')!r})(biggan.truncated_noise(1, seed=0), torch.tensor([1]))
assert "torchvision" not in sys.modules
print(peak() - before)
"""
    with torch.device("meta"):
        state = biggan.BigGAN(RELEASED, 8).state_dict()
    state = {key: torch.full(value.shape, 0.01) for key, value in state.items()}
    torch.save(state, tmp_path / "w.pt", _use_new_zipfile_serialization=zipped)
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                            env={**os.environ, **allocator})
    assert result.returncode == 0, result
    assert float(result.stdout) <= bound


# ---------- u2net

PHOTOS = ("0002-01", "boat", "horse", "im_21", "long", "sailboat3")
TINY = ((3, 4, 8),) + ((8, 4, 8),) * 5 + ((16, 4, 8),) * 5


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
@pytest.mark.parametrize("name", PHOTOS)
def test_the_lite_network_equals_another_runtime(name):
    x = F_image.to_tensor(Image.open(ORACLES / "u2netp" / f"{name}.png").convert("RGB"))[None]
    expected = F_image.to_tensor(Image.open(ORACLES / "u2netp" / f"{name}.mask.png"))
    with torch.no_grad():
        found = u2net.load(HERE / "weights" / "u2netp.pth")(u2net.normalise(x))[0]
    assert (found - expected).abs().max() <= 1 / 255 + 1e-3


@needs_oracles
def test_a_photo_at_a_tenth_of_its_brightness_has_the_same_mask():
    model = u2net.load(HERE / "weights" / "u2netp.pth")
    for name in ("0002-01", "long", "sailboat3"):
        photo = u2net.open_photo(ORACLES / "u2netp" / f"{name}.png")
        dark = photo.point(lambda value: round(value / 10))
        a, b = (np.array(u2net.saliency(model, seen)) > 127 for seen in (photo, dark))
        assert (a & b).sum() / (a | b).sum() >= 0.98, name
    assert u2net.saliency(model, Image.new("RGB", (40, 50))).size == (40, 50)  # black: no division by 0


@needs_oracles
def test_images_in_minus_one_to_one_give_another_mask_of_the_same_object():
    """The first are what the CGN's authors feed."""
    model, found = u2net.load(HERE / "weights" / "u2netp.pth"), {}
    for name in ("0002-01", "long", "sailboat3"):
        x = F_image.to_tensor(Image.open(ORACLES / "u2netp" / f"{name}.png").convert("RGB"))[None]
        with torch.no_grad():
            found[name] = evaluate.mask_iou(model(u2net.normalise(x)), model(2 * x - 1))
    assert all(iou > 0.75 for iou in found.values()) and min(found.values()) < 0.9, found


@needs_oracles
@pytest.mark.parametrize("name, stages", [("u2net", u2net.FULL), ("u2netp", u2net.LITE)])
def test_u2net_has_the_keys_and_shapes_of_the_released_files(name, stages):
    table = (SHARED / "state_dicts" / f"{name}.txt").read_text().splitlines()
    rows = dict(line.split("\t") for line in table if not line.startswith("#"))
    with torch.device("meta"):
        state = u2net.U2Net(stages).state_dict()
    assert {key: "x".join(map(str, value.shape)) or "scalar" for key, value in state.items()} == rows


def test_folding_batch_norms_changes_nothing_and_seven_maps_come_with_one():
    model = random_u2net(TINY)
    x, state = torch.randn(2, 3, 45, 38), model.state_dict()
    with torch.no_grad():
        expected, found = model(x, maps=True), u2net.load(state)(x, maps=True)
        assert len(found) == 7
        assert all(a.shape == (2, 1, 45, 38) and 0 <= a.min() <= a.max() <= 1 for a in found)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(expected, found))
        assert torch.equal(u2net.load(state)(x), found[0])
        assert not torch.allclose(u2net.load(state, align_corners=True)(x), found[0], atol=1e-5)
    again = u2net.load(state, frozen=False).state_dict()
    assert all(torch.equal(state[key], value) for key, value in again.items())
    for shape in ((1, 3, 1, 1), (1, 3, 8, 100), (1, 1, 32, 32), (3, 32, 32)):
        with pytest.raises(ValueError, match="input of shape"):
            model(torch.zeros(shape))


def test_u2nets_weights_are_read_wrapped_and_refused_with_every_difference(tmp_path):
    state, x = random_u2net(TINY).state_dict(), torch.randn(1, 3, 32, 32)
    wrapped = {"state_dict": {f"module.{key}": value for key, value in state.items()}, "epoch": 1}
    torch.save(wrapped, tmp_path / "wrapped.pt")
    for source in (tmp_path / "wrapped.pt", wrapped):
        assert torch.equal(u2net.load(source)(x), u2net.load(state)(x))
    for key, value, words in (("side1.bias", torch.full((1,), float("inf")), "not finite"),
                              ("side1.bias", None, "dense"), ("outconv.bias", torch.zeros(1).long(), "float"),
                              ("stage1.rebnconvin.bn_s1.running_var", -torch.ones(8), "negative variances"),
                              ("side2.weight", torch.zeros(1, 9, 3, 3), "9, 3, 3.*8, 3, 3"),
                              ("extra", torch.zeros(1), "Unexpected.*extra"),
                              ("stage3.rebnconv1.conv_s1.weight", torch.zeros(4), "no U-2-Net")):
        with pytest.raises(ValueError, match=words) as error:
            u2net.load({**state, key: value})
        assert key in str(error.value) and "\n" not in str(error.value)


def test_pictures_are_read_as_they_are_meant_to_be_seen(tmp_path):
    grey = np.linspace(0, 255, 64, dtype=np.uint8).reshape(8, 8).repeat(4, 0).repeat(4, 1)
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "16.png")
    (tmp_path / "16.pgm").write_bytes(b"P5 32 32 65535\n" + (grey.astype(">u2") * 257).tobytes())
    for name in ("16.png", "16.pgm"):
        assert np.array_equal(np.array(u2net.open_photo(tmp_path / name)), np.stack([grey] * 3, 2))
    hidden = np.dstack([grey, grey, grey, np.where(grey > 100, 255, 0)]).astype(np.uint8)
    Image.fromarray(hidden, "RGBA").save(tmp_path / "alpha.png")
    seen = np.array(u2net.open_photo(tmp_path / "alpha.png"))
    assert (seen[grey <= 100] == 255).all() and np.array_equal(seen[grey > 100][:, 0], grey[grey > 100])
    assert u2net.open_photo(tmp_path / "16.png", smallest=32).size == (32, 32)
    Image.fromarray(np.zeros((20, 20), np.float32)).save(tmp_path / "float.tiff")
    Image.new("RGB", (1, 1)).save(tmp_path / "dot.png")
    Image.new("1", (10_000, 10_000)).save(tmp_path / "huge.png")
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "empty.png").touch()
    (tmp_path / "cut.png").write_bytes((tmp_path / "16.png").read_bytes()[:-40])
    for name, words in (("float.tiff", "mode F"), ("dot.png", "1 x 1"), ("huge.png", "10000 x 10000"),
                        ("text.jpg", ""), ("empty.png", ""), ("cut.png", ""), ("nowhere.png", "No such")):
        with pytest.raises(ValueError, match=f"{tmp_path / name} does not open.*{words}") as error:
            u2net.open_photo(tmp_path / name)
        assert "\n" not in str(error.value)


def test_a_photo_becomes_a_mask_and_a_cutout_of_its_own_size_in_new_folders(tmp_path):
    """A dark disc on a bright ground, taken with the camera on its side."""
    pixels = np.full((200, 300, 3), 220, np.uint8)
    y, x = np.mgrid[:200, :300]
    disc = (y - 100) ** 2 + (x - 150) ** 2 < 60 ** 2
    pixels[disc] = (90, 30, 30)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to see it
    Image.fromarray(pixels).save(tmp_path / "photo.jpg", exif=exif)
    out, cut = tmp_path / "a" / "mask.png", tmp_path / "b" / "cutout.png"
    result = script("u2net.py", tmp_path / "photo.jpg", "--out", out, "--cutout", cut, "--device", "cpu")
    assert result.returncode == 0 and "on cpu" in result.stdout, result.stderr
    mask, cutout = Image.open(out), Image.open(cut)
    assert mask.size == cutout.size == (200, 300) and mask.mode == "L" and cutout.mode == "RGBA"
    found = np.array(mask) > 127
    assert (found & disc.T).sum() / (found | disc.T).sum() > 0.9
    assert np.array_equal(np.array(cutout)[..., 3], np.array(mask))
    assert len(list(out.parent.iterdir())) == len(list(cut.parent.iterdir())) == 1


def test_no_output_destroys_an_input_or_holds_a_png_under_another_name(tmp_path, monkeypatch):
    photo = tmp_path / "mask.png"
    Image.new("RGB", (40, 40)).save(photo)
    before, new = photo.read_bytes(), tmp_path / "new.png"
    monkeypatch.setattr(u2net, "__file__", str(tmp_path / "u2net.py"))  # beside it is the default, mask.png
    jpg, folder = tmp_path / "x.jpg", tmp_path / "folder.png"
    folder.mkdir()
    for options, word in (((), "mask.png"), (("--out", photo), "mask"), (("--out", photo / "x.png"), "mask"),
                          (("--cutout", tmp_path / "a/../mask.png"), "mask"), (("--out", jpg), "x.jpg"),
                          (("--out", new, "--cutout", new), "new.png"), (("--cutout", tmp_path / "x"), "PNG"),
                          (("--out", new, "--weights", new), "new.png"), (("--device", "tpu"), "tpu"),
                          (("--out", folder), "folder"), (("--out", new, "--weights", "none.pth"), "none")):
        one_line(script("u2net.py", photo, *options), word)
    assert photo.read_bytes() == before and not new.exists()
    monkeypatch.setattr(u2net, "open_photo", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
    stopped = script("u2net.py", photo, "--out", new)
    assert (stopped.returncode, stopped.stderr) == (130, "stopped\n")


# ------------------------------------------------------------------------------------------------------- run

def toy_run(folder, *, at=lambda step: None, share=slice(None), steps=6, scale=1.0, hook=None, config={},
            **more):
    """A tiny training; at(step) happens between its forward and its backward pass."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    if hook:
        model.bias.register_hook(hook)
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    config = {"seed": 0, "steps": steps, "log_every": 1, "saves": (2,), **config}
    with run.Run(folder, config, {"model": model, "optimizer": optimizer}, **more) as training:
        for step in training:
            x = torch.from_numpy(np.random.default_rng(step).standard_normal((4, 3), dtype=np.float32))
            loss = scale * model(x[share]).square().mean()
            at(step)
            optimizer.zero_grad()
            loss.backward()
            training.check({"loss": loss}, model.parameters())
            optimizer.step()


def toy_state(folder):
    state, rows = run.read_checkpoint(folder / "checkpoint.pt"), run.read_lines(folder / "log.jsonl")
    for row in rows:
        row.pop("steps_per_second", None)
    moment = state["optimizer"]["state"][0]["exp_avg"]
    return state["step"], state["model"]["weight"].tolist(), moment.tolist(), rows


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_saves_and_the_run_continues_bit_for_bit(tmp_path, capsys, number):
    whole, parts, twice = (tmp_path / name for name in ("whole", "parts", "twice"))
    toy_run(whole)
    before = signal.signal(number, signal.default_int_handler)
    try:
        with pytest.raises(run.Stopped, match="stopped after step 3; the same command continues"):
            toy_run(parts, at=lambda step: step == 2 and signal.raise_signal(number))
        assert signal.getsignal(number) is signal.default_int_handler   # as it was
        with pytest.raises(KeyboardInterrupt):                  # twice: at once, nothing saved
            toy_run(twice, at=lambda step: [signal.raise_signal(number) for _ in range(2)])
        assert not (twice / "checkpoint.pt").exists()
    finally:
        signal.signal(number, before)
    assert toy_state(parts)[0] == 3
    toy_run(parts)
    assert toy_state(parts) == toy_state(whole)
    assert "continuing" in capsys.readouterr().out


@pytest.mark.parametrize("name, more", [("loss", {"scale": float("nan")}),
                                        ("gradient", {"hook": lambda gradient: gradient * float("inf")})])
def test_nothing_that_is_not_finite_is_stepped_or_saved(tmp_path, name, more):
    """A loss, or one number of one gradient while all losses are finite."""
    toy_run(tmp_path, steps=2)
    kept = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.raises(ValueError, match=f"step 3: .*{name}.* not finite; the last checkpoint is kept"):
        toy_run(tmp_path, free=("steps",), **more)
    assert (tmp_path / "checkpoint.pt").read_bytes() == kept


def test_a_folder_is_locked_and_keeps_the_run_of_another_configuration(tmp_path):
    def second(step):
        with pytest.raises(ValueError, match="in use by another process"):
            toy_run(tmp_path)

    def files():
        return {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    toy_run(tmp_path, steps=2, at=second)
    for _ in range(2):                                      # by its log, or without one by its checkpoint
        before = files()
        with pytest.raises(ValueError, match="another seed, more: choose another --out"):
            toy_run(tmp_path, steps=2, config={"seed": 1, "more": 2})
        assert files() == before
        (tmp_path / "log.jsonl").unlink(missing_ok=True)
    toy_run(tmp_path, steps=4, free=("steps", "other"), config={"other": "elsewhere"})
    assert toy_state(tmp_path)[0] == 4 and run.read_lines(tmp_path / "log.jsonl")[0]["other"] == "elsewhere"
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        toy_run(tmp_path / "file")


def test_sheets_are_drawn_at_the_marks_at_multiples_of_the_last_and_after_the_checkpoint(tmp_path):
    drawn = []

    def sheet(step):
        drawn.append((step, (tmp_path / "checkpoint.pt").exists() and toy_state(tmp_path)[0]))
        return "sheet.png"

    toy_run(tmp_path, steps=9, sheet=sheet, config={"saves": (0, 2, 4)})
    assert drawn == [(0, False), (2, 2), (4, 4), (8, 8), (9, 9)]


def test_a_row_is_appended_whole_or_not_at_all_and_a_damaged_one_is_named(tmp_path):
    log, limits = tmp_path / "new" / "log.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))                     # a full disk
    try:
        with pytest.raises(OSError, match="log.jsonl could not be written .*make room"):
            for step in range(9):
                run.append_row(log, {"step": step, "loss": 0.123456789012345})
        with pytest.raises(OSError, match="could not be written .*intact"):
            run.save_state(log.with_name("a.pt"), {"a": torch.zeros(1000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [row["step"] for row in run.read_lines(log)] == [0, 1] and list(log.parent.iterdir()) == [log]
    log.write_text('{"step": 1}\n{"step": "x"}\n')
    with pytest.raises(ValueError, match="line 2, is damaged"):
        run.read_lines(log)


def test_two_processes_give_what_one_gives_and_stop_together(tmp_path):
    """Each has half of the images; the second is told to stop, once, and both end after the same step."""
    one, two = tmp_path / "one", tmp_path / "two"
    (tmp_path / "two.py").write_text(f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch, {Path(__file__).stem} as tests
torch.set_num_threads(1)
rank = int(os.environ["RANK"])
print(tests.run.join_group("cpu"))
stop = lambda step: (rank, step) == (1, 2) and os.kill(os.getpid(), signal.SIGTERM)
for at in (stop, lambda step: None):
    try:
        tests.toy_run(tests.Path({str(two)!r}), at=at, share=slice(2 * rank, 2 * rank + 2))
    except KeyboardInterrupt as stopped:
        print(stopped)
""")
    result = process(*torchrun(2, 29533), tmp_path / "two.py")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("stopped after step 3") == 2, result.stdout
    toy_run(one)
    weights = [run.read_checkpoint(folder / "checkpoint.pt")["model"]["weight"] for folder in (one, two)]
    assert torch.allclose(*weights, atol=1e-6)
    losses = [[row["loss"] for row in run.read_lines(folder / "log.jsonl")[1:]] for folder in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(losses[1]) == 6


def test_processes_that_find_other_folders_or_lose_one_another_say_so(tmp_path):
    """Rank 0 finds a checkpoint, rank 1 none, as on two machines without a common disk; then rank 1 ends."""
    (tmp_path / "0").mkdir()
    torch.save({"config": {"seed": 1, "saves": [1]}, "step": 7}, tmp_path / "0" / "checkpoint.pt")
    code = f"""
import os, sys; sys.path.insert(0, {str(HERE)!r})
import torch, run
from pathlib import Path
rank = 1 if os.fork() == 0 else 0
torch.distributed.init_process_group("gloo", init_method="file://{tmp_path}/meeting", rank=rank, world_size=2)
try:
    run.Run(Path({str(tmp_path)!r}) / str(rank), {{"seed": 1, "saves": [1]}}, {{}}).__enter__()
except ValueError as error:
    print(error)
if rank:
    os._exit(0)
try:
    torch.distributed.all_reduce(torch.zeros(1))
except RuntimeError as error:
    print(run.lost_process(error))
"""
    result = process("-c", code)
    assert result.stdout.count("steps 7, 0 in") >= 1 and "machines share" in result.stdout, result
    assert "another process of the run has ended" in result.stdout, result


def test_a_checkpoint_that_would_run_code_or_is_none_is_one_line_without_torchs_advice(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    torch.save({"config": Evil(), "step": 1}, tmp_path / "evil.pt")
    torch.save({"config": 3, "step": 1}, tmp_path / "other.pt")
    torch.save({"config": {}, "step": 1, "a": torch.zeros(99)}, tmp_path / "whole.pt")
    (tmp_path / "short.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:700])
    for name in ("evil.pt", "other.pt", "short.pt", "absent.pt"):
        with pytest.raises(ValueError, match=name) as error:
            run.read_checkpoint(tmp_path / name)
        assert "weights_only" not in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()


def test_a_name_with_a_value_overrides_with_the_type_that_is_there():
    config = {"lr": (1e-3, 1.0), "steps": 4, "noise": 0.4, "flag": False, "shuffle": "shift"}
    run.override(config, ["lr=1e-5,2.0", "steps=7", "noise=1", "flag=True", "shuffle=puzzle"])
    assert config == {"lr": (1e-5, 2.0), "steps": 7, "noise": 1.0, "flag": True, "shuffle": "puzzle"}
    for text, words in (("nois=3", "did you mean noise"), ("steps=2.5", "like 7"), ("noise=a", "like 1.0"),
                        ("steps", "like 7")):
        with pytest.raises(ValueError, match=words):
            run.override(config, [text])


def test_an_output_is_no_input_no_folder_and_its_place_is_made_first(tmp_path):
    folder = tmp_path / "new"
    for path in (folder / "deep" / "a.png", folder / "a.png"):
        assert run.check_output(path) == path and path.parent.is_dir()
    for path in (folder, Path("/dev/null"), folder / ".." / "b.png"):
        with pytest.raises(ValueError, match="choose another name"):
            run.check_output(path, tmp_path / "b.png")


def test_bfloat16_is_left_alone_where_the_processor_only_emulates_it(monkeypatch, capsys):
    for supported in (True, False):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported)
        for device in ("cpu", "cuda:1"):
            assert run.bf16_pays(True, device) == supported and not run.bf16_pays(False, device)
            assert ("float32 is faster here" in capsys.readouterr().out) != supported


def test_a_script_ends_in_one_line(capsys):
    import argparse

    def ended(error):
        parser = argparse.ArgumentParser(prog="x.py")
        parser.add_argument("--threads", type=int)

        def main(args):
            raise error

        with pytest.raises(SystemExit) as stop:
            run.command(parser, main, [])
        return stop.value.code, capsys.readouterr().err

    assert ended(ValueError("a\n b")) == (2, "x.py: a b\n") and ended(OSError("disk"))[0] == 2
    assert ended(KeyboardInterrupt()) == (130, "\nstopped\n")
    assert ended(run.Stopped("stopped after step 3")) == (130, "\nstopped after step 3\n")
    assert "memory is full" in ended(torch.OutOfMemoryError())[1]
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252"}              # a console that has no arrow
    result = process("cgn.py", "--dataset", "colored → x", env=environment)
    one_line(result, "colored ? x", "did you mean colored")


# ------------------------------ cgn: equations and mechanisms

def tiny_config(**changes):
    return {"model": "cgn", "dataset": "colored", "names": [f"digit {k}" for k in range(10)], "seed": 3,
            **cgn.PRESETS["colored"], "steps": 6, "batch": 8, "lr": 1e-3, "binary": 1.0, "binary_warmup": 4,
            "noise": 0.3, "log_every": 1, "saves": (2,), **changes}


def tiny_data(count=64):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return images, torch.arange(count) % 10


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a finished tiny run."""
    out = tmp_path_factory.mktemp("run")
    cgn.train(tiny_config(), *tiny_data(), out)
    return out


def ctrl_c_at_call(monkeypatch, place, name, at):
    """The at-th call of the function is Ctrl-C; returns the list of its calls."""
    function, calls = getattr(place, name), []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == at:
            raise KeyboardInterrupt
        return function(*arguments)

    monkeypatch.setattr(place, name, interrupted)
    return calls


def cgn_works(*options):
    result = script("cgn.py", *options)
    assert result.returncode == 0, result.stderr
    return result


def cgn_refuses(options, *words):
    one_line(script("cgn.py", *options), *words)


def picture(path):
    return F_image.pil_to_tensor(Image.open(path))


def nearly(a, b):
    return (a.int() - b.int()).abs().max() <= 1


def test_compose_is_equation_2():
    m = torch.tensor([[[[0.0, 0.25, 1.0]]]])
    f, b = torch.full((1, 3, 1, 3), 0.8), torch.full((1, 3, 1, 3), -0.4)
    assert torch.allclose(cgn.compose(m, f, b)[0, 0, 0], torch.tensor([-0.4, -0.1, 0.8]), atol=1e-6)


def test_mask_losses_by_hand():
    assert abs(cgn.binary_entropy(torch.full((2, 1, 4, 4), 0.5)) - 1) < 1e-6
    assert cgn.binary_entropy(torch.tensor([[[[0.0, 1.0]]]])) < 2e-3
    assert abs(cgn.binary_entropy(torch.tensor([[[[0.25]]]])) - 0.8112781) < 1e-6
    masks = torch.stack([torch.full((1, 2, 2), value) for value in (0.02, 0.5, 0.95)])
    assert abs(cgn.mask_interval(masks) - (0.08 + 0 + 0.05) / 3) < 1e-6
    assert abs(cgn.mask_interval(masks, 0.6, 0.7) - (0.58 + 0.1 + 0.25) / 3) < 1e-6
    generator = torch.Generator().manual_seed(0)
    m = (0.1 + 0.8 * torch.rand(2, 1, 3, 3, dtype=torch.float64, generator=generator)).requires_grad_()
    assert torch.autograd.gradcheck(cgn.binary_entropy, (m,))
    assert torch.autograd.gradcheck(partial(cgn.mask_interval, low=0.6, high=0.7), (m,))


def test_mean_colors_of_whole_images_and_of_borders():
    images = torch.full((4, 3, 8, 8), 255, dtype=torch.uint8)
    images[2:, :, :2], images[2:, :, -2:], images[2:, :, :, :2], images[2:, :, :, -2:] = 0, 0, 0, 51
    labels, dark = torch.tensor([0, 0, 1, 1]), 51 * 16 / 48  # mean of the second class's border
    expected = torch.tensor([[1.0] * 3, [2 * dark / 255 - 1] * 3])
    assert torch.allclose(cgn.mean_color(images, labels, 2, margin=2), expected)
    expected[1] = 2 * (255 * 16 + 51 * 16) / 64 / 255 - 1
    assert torch.allclose(cgn.mean_color(images, labels, 2), expected)


def test_color_loss_compares_class_means_and_not_single_images():
    y, target = torch.tensor([0, 0, 1, 2, 2, 2]), torch.tensor([[0.2] * 3, [0.7] * 3, [0.0] * 3])
    level = torch.tensor([0.5, 0.1, 1.0, -0.3, 0.0, 0.3])[:, None, None, None].expand(6, 3, 8, 8)
    # class 0: 0.3 * -0.1; class 1 has one image only; class 2: mean of -0.3 * 0, 0 * 0.3, -0.3 * 0.3
    assert abs(cgn.color_loss(level, y, target) - (0.3 * -0.1 + -0.09 / 3) / 2) < 1e-6
    assert cgn.color_loss(level[2:3], y[2:3], target) == 0
    spread = torch.randn(20_000, 1, 1, 1, generator=torch.Generator().manual_seed(0)).expand(-1, 3, 2, 2)
    parts = torch.stack([cgn.color_loss(part, torch.full((4,), 2), target) for part in spread.split(4)])
    assert abs(parts.mean()) < 4 * parts.std() / 5000 ** 0.5  # no price for spread about the right mean


def test_hinge_losses_by_hand():
    real, fake = torch.tensor([2.0, 0.5, 1.0]), torch.tensor([-3.0, 0.0, 2.0])
    assert abs(cgn.discriminator_loss(real, fake) - ((0 + 0.5 + 0) / 3 + (0 + 1 + 3) / 3)) < 1e-6
    assert abs(cgn.generator_loss(real, fake) - 1 / 3) < 1e-6
    assert abs(cgn.discriminator_loss(real, fake, relativistic=True) - (0 + 0.5 + 2) / 3) < 1e-6
    assert abs(cgn.generator_loss(real, fake, relativistic=True) - (6 + 1.5 + 0) / 3) < 1e-6


def test_gram_matrices_and_the_perceptual_loss_by_hand():
    h = torch.tensor([[[[1.0, 2.0]], [[3.0, 4.0]]]])  # two channels of 1 x 2 pixels
    expected = torch.tensor([[[5.0, 11.0], [11.0, 25.0]], [[20.0, 44.0], [44.0, 100.0]]]) / 4
    assert torch.equal(cgn.gram(torch.cat([h, 2 * h])), expected)
    assert abs(cgn.perceptual([h, h], [0 * h, h]) / (25_000 * (5 + 11 + 11 + 25) / 16) - 1) < 1e-6


def test_patches_come_from_where_the_mask_is_highest_and_fill_a_grid():
    x = torch.arange(24 * 24).float().view(1, 1, 24, 24).expand(2, 3, 24, 24)
    m, spread = torch.full((2, 1, 24, 24), 0.2), torch.linspace(0, 0.999, 36).repeat(2, 1)
    m[0, :, 2:6, 3:7], m[1, :, 15:19, 10:14] = 1.0, 0.9  # one place of 4 x 4 pixels in each
    grid = cgn.patch_grid(x, m, spread, patch=4)
    assert grid.shape == (2, 3, 24, 24)
    assert torch.equal(grid[0, 1], x[0, 0, 2:6, 3:7].repeat(6, 6))
    assert torch.equal(grid[1, 0], x[0, 0, 15:19, 10:14].repeat(6, 6))
    everywhere = cgn.patch_grid(x, torch.ones(2, 1, 24, 24), spread, patch=4)
    assert len(everywhere[0, 0, ::4, ::4].unique()) == 36
    areas = torch.stack([torch.full((1, 24, 24), area) for area in (0.25, 0.25 / 4, 0.0001, 1.0)])
    assert cgn.relative_patch(areas, 4).tolist() == [4, 2, 1, 8]  # in proportion to the area's root
    first = torch.zeros(2, 36)
    each = cgn.patch_grid(x, m, first, torch.tensor([4, 2]))
    assert torch.equal(each[:1], cgn.patch_grid(x[:1], m[:1], first[:1], 4))
    assert torch.equal(each[1:], cgn.patch_grid(x[1:], m[1:], first[1:], 2))
    assert not cgn.patch_grid(x.clone().requires_grad_(), m, first, patch=4).requires_grad
    with pytest.raises(ValueError, match="patches of 25 pixels"):
        cgn.patch_grid(x, m, first, patch=25)


@pytest.mark.parametrize("shuffle", ["shift", "puzzle"])
def test_an_arrangement_moves_every_cell_once(shuffle):
    drawn = cgn.draw_arrangement(cgn.rng(0, 0), 20, shuffle)
    assert drawn.shape == (20, 2, 100) and (np.sort(drawn, 2) == np.arange(100)).all()
    assert not np.array_equal(drawn[:, 0], drawn[:, 1])
    neighbours = drawn.reshape(20, 2, 10, 10)
    right = neighbours[..., 1:] - neighbours[..., :-1]
    if shuffle == "shift":  # a step right is one, but at the seam
        assert ((right == 1) | (right == -9)).all()
    else:  # whole patches of 2 x 2
        assert (right[..., ::2] == 1).all() and not (right[..., 1::2] == 1).all()
        assert (neighbours[..., 1::2, :] - neighbours[..., ::2, :] == 10).all()


def test_the_texture_follows_its_arrangement_and_the_masks_margin_is_background():
    model = cgn.MnistCGN(margin=3).eval()
    u, y, still = torch.randn(1, 32), torch.tensor([3]), torch.arange(100).expand(1, 2, 100)
    moved = still.reshape(1, 2, 10, 10).roll(1, 3).reshape(1, 2, 100)
    with torch.no_grad():
        a, b = model(u, y, still), model(u, y, moved)
    assert torch.allclose(a.foreground[..., 4:20], b.foreground[..., 8:24], atol=1e-5)  # a cell is 4 pixels
    assert torch.equal(a.mask, b.mask)
    assert a.mask[..., :3, :].max() == a.mask[..., -3:].max() == 0 and a.mask[..., 3:-3, 3:-3].min() > 0


@pytest.mark.parametrize("padding", [0, 1])
def test_up_is_upsampling_and_a_convolution(padding):
    up, x = cgn.Up(3, 5, padding).double(), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    expected = F.conv2d(F.interpolate(x, scale_factor=2), up.weight, padding=padding)
    up.rest = torch.nn.Identity()
    assert torch.allclose(up(x), expected, atol=1e-12)


@pytest.fixture(params=["digits", "imagenet"])
def any_cgn(request, networks):
    """A CGN of either scale, untrained, in eval mode, of ten classes."""
    torch.manual_seed(0)
    return cgn.MnistCGN().eval() if request.param == "digits" else imagenet_model(networks, frozen=True)


def test_documented_shapes_and_ranges(any_cgn):
    y = torch.tensor([0, 9, 3, 3])
    with torch.no_grad():
        sample = any_cgn(torch.randn(4, any_cgn.noise), y)
    assert sample.mask.shape == (4, 1, 32, 32) and 0 <= sample.mask.min() <= sample.mask.max() <= 1
    for part in sample[1:4]:
        assert part.shape == (4, 3, 32, 32) and -1 <= part.min() <= part.max() <= 1
    assert torch.equal(sample.image, cgn.compose(sample.mask, sample.foreground, sample.background))
    assert cgn.Discriminator(10)(sample.image, y).shape == (4,)


def test_each_mechanism_answers_to_its_own_noise_and_label_only(any_cgn):
    u, y = [torch.randn(2, any_cgn.noise) for _ in range(3)], [torch.tensor([1, 2])] * 3
    still = torch.arange(100).expand(2, 2, 100)
    with torch.no_grad():
        before = any_cgn(u, y, still)
        for k in range(3):
            other_u, other_y = u.copy(), y.copy()
            other_u[k], other_y[k] = torch.randn(2, any_cgn.noise), torch.tensor([5, 7])
            for after in (any_cgn(other_u, y, still), any_cgn(u, other_y, still)):
                same = [torch.equal(a, b) for a, b in zip(before[:3], after[:3])]
                assert same == [j != k for j in range(3)]
        weights = [F.one_hot(label, 10).float() for label in y]  # labels and class weights are the same
        assert torch.allclose(before.image, any_cgn(u, weights, still).image, atol=1e-6)


def test_labels_and_noise_that_do_not_fit_are_value_errors(any_cgn):
    u, y = torch.randn(2, any_cgn.noise), torch.tensor([1, 2])
    for wrong in ((u, torch.tensor([1, 10])), (u, torch.tensor([-1, 1])), (u, [1, 2]), (u, 3), (u[:, 1:], y),
                  ([u, u], y), (u, torch.rand(2, 11))):
        with pytest.raises(ValueError):
            any_cgn(*wrong)


def test_masks_in_bfloat16_are_not_rounded_to_one(any_cgn):
    """Where a mask is exactly 1 it has no gradient; bfloat16 knows no number between 0.996 and 1."""
    last = any_cgn.f_shape.out if hasattr(any_cgn.f_shape, "out") else any_cgn.u2net.outconv
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        last.bias.fill_(6.0)  # sigmoid: 0.9975
        inside = any_cgn(torch.randn(8, any_cgn.noise), torch.arange(8)).mask[..., 4:-4, 4:-4]
    assert inside.dtype == torch.float and (inside > 0.99).any() and (inside == 1).float().mean() < 0.01


# ------------------------------ cgn: training on digits

def test_the_presets_are_the_papers():
    """C.1 to C.3, and the authors' configuration file, as literals."""
    paper, short = cgn.PRESETS["imagenet"], cgn.PRESETS["imagenet-short"]
    assert [paper[name] for name in ("steps", "accumulate", "batch", "lr", "truncation", "patch")] == [
        300, 4000, 1, (8e-6, 1e-5, 1e-5), 1, 15]
    assert [paper[name] for name in cgn.TERMS] == [100, 5, 300, 500, 5, 2000] and cgn.PATCHES ** 2 == 36
    changed = {name: short[name] for name in short if short[name] != paper[name]}
    assert changed == {"steps": 50, "accumulate": 2048, "lr": (8e-6, 3e-5, 1e-5)}
    assert [cgn.WITHOUT[part] for part in ("shape", "text", "bg", "rec")] == [
        ("binary", "mask"), ("texture",), ("background",), ("l1", "perceptual")]


def test_noise_fades_the_average_lags_and_the_generators_turn_is_its_own(tmp_path, monkeypatch):
    old, new = torch.nn.PReLU(init=1.0), torch.nn.PReLU(init=2.0)
    cgn.update_average(old, new, 0.9)
    assert abs(old.weight.item() - 1.1) < 1e-6 and new.weight.item() == 2.0
    noise, decays, forward = [], [], cgn.Discriminator.forward

    def watched(self, x, y):
        own_turn = len(x) == 2 * 64  # real images, then generated ones
        assert all(p.requires_grad == own_turn for p in self.parameters())
        if own_turn:
            noise.append(x[:64].std().item())
        return forward(self, x, y)

    def update(average, model, decay):
        assert all(p.grad is not None for p in model.parameters())
        decays.append(decay)

    monkeypatch.setattr(cgn.Discriminator, "forward", watched)
    monkeypatch.setattr(cgn, "update_average", update)
    grey = torch.full((64, 3, 32, 32), 128, dtype=torch.uint8)
    cgn.train(tiny_config(batch=64, steps=3, noise=0.3, recency=9), grey, torch.arange(64) % 10, tmp_path)
    assert noise == pytest.approx([0.3, 0.2, 0.1], rel=0.02)
    assert decays == pytest.approx([1 / 10, 2 / 11, 3 / 12])


def test_training_writes_log_checkpoint_and_sheets_which_do_not_change_the_model(trained, tmp_path):
    rows = run.read_lines(trained / "log.jsonl")
    assert rows[0]["seed"] == 3 and [row["step"] for row in rows[1:]] == [1, 2, 3, 4, 5, 6]
    logged = "discriminator", "adversarial", "binary", "mask", "color", "border", "mask_mean"
    assert rows[1].keys() >= set(logged)
    assert sorted(path.name for path in trained.glob("*.png")) == [f"sheet-00000{k}.png" for k in (2, 4, 6)]
    model = cgn.load(trained / "checkpoint.pt")
    assert model.config["steps"] == 6 and not any(p.requires_grad for p in model.parameters())
    before = copy.deepcopy(model.state_dict())
    cgn.training_sheet(model, model.config, tmp_path, None, 6)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert (tmp_path / "sheet-000006.png").read_bytes() == (trained / "sheet-000006.png").read_bytes()


@pytest.mark.parametrize("model", ["cgn", "gan"])
def test_a_stopped_run_of_digits_continues_bit_for_bit(tmp_path, monkeypatch, trained, model):
    config, whole = tiny_config(model=model), trained
    if model == "gan":
        whole = tmp_path / "whole"
        cgn.train(config, *tiny_data(), whole)
    ctrl_c_at_call(monkeypatch, cgn, "update_average", at=5)
    with pytest.raises(KeyboardInterrupt):
        cgn.train(config, *tiny_data(), tmp_path / "parts")
    assert run.read_checkpoint(tmp_path / "parts" / "checkpoint.pt")["step"] == 4
    torch.manual_seed(99)
    cgn.train(config, *tiny_data(), tmp_path / "parts")
    assert run_result(tmp_path / "parts") == run_result(whole)
    if model == "gan":  # its samples are all new and carry one label
        data = cgn.counterfactuals(cgn.load(whole / "checkpoint.pt"), 12)
        assert torch.equal(data.shape, data.foreground) and torch.equal(data.shape, data.background)
        assert len(data.images.flatten(1).unique(dim=0)) == 12


def run_result(out):
    """All that a run leaves, but its speed: every number of the checkpoint, and the log."""
    if (out / "labels.csv").exists():
        return {path.name: path.read_bytes() for path in out.iterdir()}

    def plain(value):
        if isinstance(value, dict):
            return {key: plain(part) for key, part in value.items() if "per_second" not in str(key)}
        if isinstance(value, (list, tuple)):
            return [plain(part) for part in value]
        return value.numpy().tobytes() if isinstance(value, torch.Tensor) else value

    checkpoint = torch.load(out / "checkpoint.pt", weights_only=True)
    return plain([checkpoint, run.read_lines(out / "log.jsonl")])


def test_a_shipped_generator_is_small_and_draws_the_same(trained, tmp_path):
    cgn.save_generator(trained / "checkpoint.pt", tmp_path / "small.pth")
    assert (tmp_path / "small.pth").stat().st_size < 2e6
    a, b = (cgn.counterfactuals(cgn.load(path), 4)
            for path in (trained / "checkpoint.pt", tmp_path / "small.pth"))
    assert torch.equal(a.shape, b.shape) and (a.images.int() - b.images.int()).abs().float().mean() < 1


def test_a_folder_of_pictures_trains_like_a_variant_and_may_be_named_otherwise(tmp_path, monkeypatch):
    pictures = tmp_path / "pictures"
    for label, color in (("cat", "red"), ("dog", "green")):
        (pictures / label).mkdir(parents=True)
        for k in range(3):
            Image.new("RGB", (40 + 10 * k, 50), color).save(pictures / label / f"{k}.png")
    monkeypatch.chdir(tmp_path)
    options = ("--batch", 4, "--steps", 2, "--interval", 0.1, 0.9, "--margin", 0, "--out", tmp_path / "run")
    for name in ("pictures", "pictures/", pictures):  # continued: the same pictures
        cgn_works(*options, "--dataset", name)
    assert cgn.load(tmp_path / "run" / "checkpoint.pt").config["names"] == ["cat", "dog"]
    assert "border" not in run.read_lines(tmp_path / "run" / "log.jsonl")[1]
    (pictures / "cat" / "0.png").unlink()  # one less, and it is another run
    cgn_refuses((*options, "--dataset", "pictures"), "another data")


# ------------------------------ cgn: training on ImageNet

@pytest.fixture(scope="module")
def networks():
    """State dicts of a teacher, a U-2-Net and VGG features, tiny; norms and statistics that do something."""
    torch.manual_seed(0)
    _, _, style = cgn.random_networks()
    for key, value in style.items():
        if key.endswith("var"):
            style[key] = 0.5 + torch.rand_like(value)
        elif value.is_floating_point():
            style[key] = value + 0.1 * torch.randn_like(value)
    saliency = random_u2net(((3, 4, 8),) + ((8, 4, 8),) * 5 + ((16, 4, 8),) * 5).state_dict()
    saliency["outconv.bias"] *= 0  # about as many salient pixels as not, and clearly so
    return raw_biggan([(16, 16)] * 6, 2, classes=10), saliency, style


def imagenet_model(networks, frozen=False):
    mechanisms = (biggan.load(networks[0], frozen=frozen) for _ in range(3))
    return cgn.ImagenetCGN(*mechanisms, u2net.load(networks[1]))


def imagenet_config(**changes):
    return {"model": "imagenet", "dataset": "imagenet", "names": [f"class {k}" for k in range(10)], "seed": 3,
            **cgn.PRESETS["imagenet"], "steps": 3, "accumulate": 3, "lr": (1e-4, 2e-4, 3e-4), "patch": 5,
            "saves": (1,), **changes}


def imagenet_run(states, out, **changes):
    model = imagenet_model(states)
    style = cgn.StyleFeatures(states[2])
    cgn.train_imagenet(imagenet_config(**changes), model, biggan.load(states[0]), style, out)
    return model


def plain_normalise(x):
    mean, std = (torch.tensor(numbers).to(x)[:, None, None] for numbers in (u2net.MEAN, u2net.STD))
    return ((x + 1) / 2 - mean) / std


def plain_vgg(state, x):
    """What torchvision's VGG16, nothing folded, has after each of its four pools, in the precision of x."""
    widths = [len(state[f"features.{number}.weight"]) for number in (0, 7, 14, 24)]
    layout = [layer for count, width in zip((2, 2, 3, 3), widths) for layer in [width] * count + ["M"]]
    layers = cgn.make_layers(layout, batch_norm=True).to(x).eval().requires_grad_(False)
    layers.load_state_dict({key.removeprefix("features."): value for key, value in state.items()})
    h, found = plain_normalise(x), []
    for layer in layers:
        h = layer(h)
        if isinstance(layer, torch.nn.MaxPool2d):
            found.append(h)
    return found


def test_style_features_are_vggs_after_four_pools(networks):
    state, x = networks[2], torch.rand(2, 3, 32, 32) * 2 - 1
    expected = plain_vgg(state, x)
    released = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    for held in (state, released):
        found = cgn.StyleFeatures(held)(x)
        assert len(found) == 4 and all(torch.allclose(a, b, atol=1e-4) for a, b in zip(found, expected))
    with pytest.raises(ValueError, match="no state dict of vgg16_bn.*features.14.weight"):
        cgn.StyleFeatures({key: value for key, value in state.items() if "features.14" not in key})


def straight_line_terms(networks, raw, u, y, draws, patch):
    """Equation 4's terms line by line, in the precision of u: plain networks, nothing shared, nothing
    folded; `raw`: three raw dicts."""
    teacher = {key: value.to(u) for key, value in networks[0].items()}
    saliency_net = u2net.load(networks[1], frozen=False).to(u).eval().requires_grad_(False)

    def saliency(x):
        return saliency_net(plain_normalise(x))

    def grams(x):
        return [torch.einsum("nchw,ndhw->ncd", h, h) / h[0].numel() for h in plain_vgg(networks[2], x)]

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


@pytest.mark.parametrize("term", ["l1", "perceptual", "binary", "mask", "texture", "background"])
def test_every_term_and_its_gradient_equal_the_straight_line(networks, term):
    """Through spectral norm, held or not, into the stored weights of all three mechanisms; float64, relative
    error 1e-5."""
    saliency = dict(networks[1])
    if term == "mask":  # masks that are too small, so that there is a loss
        saliency["outconv.bias"] = saliency["outconv.bias"] - 20
    networks = networks[0], saliency, networks[2]
    stored, *states = [{key: value.double() for key, value in state.items()} for state in (
        networks[0], *(raw_biggan([(16, 16)] * 6, 2, classes=10, seed=k) for k in (1, 2, 3)))]
    model = imagenet_model(networks).double()
    parts = model.f_shape, model.f_text, model.f_bg
    teacher = biggan.load(networks[0], frozen=False).double()
    for part, state in zip((teacher, *parts), (stored, *states)):
        part.load_state_dict(state)
    u, y, draws = cgn.draw_training(model, 0, range(2))
    u = u.double()
    with torch.no_grad():
        x_gt = teacher(u, y, 1.0)
    style = cgn.StyleFeatures(networks[2]).double()
    with cgn.norms_held(model):
        made = model(u, y)[:3]
        found = dict(cgn.imagenet_losses(model, *made, x_gt, style, draws, patch=5, terms=[term]))
        found[term].backward()
    learned = {name for name, _ in model.f_shape.named_parameters()}
    raw = [{key: value.clone().requires_grad_(key in learned) for key, value in state.items()}
           for state in states]
    expected = straight_line_terms(networks, raw, u, y, draws, 5)[term]
    expected.backward()
    assert expected > 0 and abs(found[term] / expected - 1) < 1e-5
    pairs = [(parameter.grad, leaves[name].grad) for part, leaves in zip(parts, raw)
             for name, parameter in part.named_parameters() if leaves[name].grad is not None]
    pairs = [(grad, wanted) for grad, wanted in pairs if wanted.norm() > 0]
    assert len(pairs) > 50
    assert all((grad - wanted).norm() <= 1e-5 * wanted.norm() for grad, wanted in pairs)


def test_a_micro_step_weighs_each_term_and_leaves_out_what_it_is_told(networks):
    model, teacher, style = imagenet_model(networks), biggan.load(networks[0]), cgn.StyleFeatures(networks[2])
    drawn = cgn.draw_training(model, 0, range(2))

    def gradient(**changes):
        model.zero_grad()
        with cgn.norms_held(model):
            found = cgn.micro_step(model, teacher, style, *drawn, imagenet_config(**changes), 0.5)
        return found, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    terms, whole = gradient()
    assert list(terms) == [*cgn.TERMS, "mask_mean"]
    nothing = dict.fromkeys(cgn.TERMS, 0.0)
    single = sum(gradient(**{**nothing, name: cgn.PRESETS["imagenet"][name]})[1] for name in cgn.TERMS)
    assert (whole - single).norm() < 1e-4 * whole.norm()
    for part, missing in cgn.WITHOUT.items():
        assert set(cgn.TERMS) - gradient(without=(part,))[0].keys() == set(missing)


def test_an_update_does_not_depend_on_how_its_images_are_cut(networks, tmp_path):
    runs = [imagenet_run(networks, tmp_path / str(batch), batch=batch, steps=2) for batch in (1, 2, 3)]
    for other in runs[1:]:
        for a, b in zip(runs[0].parameters(), other.parameters()):
            assert torch.allclose(a, b, atol=2e-5)
    before = networks[0]["generator.gen_z.weight_orig"]
    assert (runs[0].f_text.generator["gen_z"].weight_orig - before).abs().max() > 1e-4
    rows = [run.read_lines(tmp_path / name / "log.jsonl")[1:] for name in ("1", "3")]
    for a, b in zip(*rows):
        assert all(abs(a[name] - b[name]) <= 1e-4 * abs(a[name]) for name in (*cgn.TERMS, "mask_mean"))


def test_a_stopped_imagenet_run_continues_bit_for_bit_without_frozen_networks_in_its_checkpoint(
        networks, tmp_path, monkeypatch):
    imagenet_run(networks, tmp_path / "whole")
    ctrl_c_at_call(monkeypatch, cgn, "training_sheet", at=2)
    continued = partial(imagenet_run, networks, tmp_path / "parts")
    with pytest.raises(KeyboardInterrupt):
        continued()
    continued(batch=1, style="moved.pth")  # what changes no result may change
    (whole, _), (parts, _) = (run_result(tmp_path / name) for name in ("whole", "parts"))
    assert whole.keys() == {"config", "step", "f_shape", "f_text", "f_bg", "optimizer"}
    assert {**parts, "config": whole["config"]} == whole
    continued(steps=4)  # more of them
    assert run.read_checkpoint(tmp_path / "parts" / "checkpoint.pt")["step"] == 4


def test_a_term_that_is_not_finite_is_named_and_the_last_checkpoint_kept(networks, tmp_path):
    imagenet_run(networks, tmp_path, steps=1, accumulate=1)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    broken = {**networks[2], "features.0.bias": networks[2]["features.0.bias"] + 1e30}
    words = "step 2: perceptual, texture.* not finite; the last checkpoint is kept"
    with pytest.raises(ValueError, match=words):
        imagenet_run((*networks[:2], broken), tmp_path, steps=2, accumulate=1)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


@pytest.fixture(scope="module")
def imagenet_checkpoint(networks, tmp_path_factory):
    out = tmp_path_factory.mktemp("imagenet")
    torch.save(networks[1], out / "saliency.pt")
    imagenet_run(networks, out, steps=1, accumulate=1, saliency=str(out / "saliency.pt"))
    return out / "checkpoint.pt"


def test_the_authors_checkpoint_is_run_as_it_was_trained(networks, imagenet_checkpoint, tmp_path):
    """U-2-Net gets [-1, 1] and align_corners=True."""
    state = run.read_checkpoint(imagenet_checkpoint)
    state.update(biggan_GT=networks[0], u2net=networks[1])
    flat = {f"module.{part}.{key}": value for part in ("biggan_GT", "u2net", "f_shape", "f_text", "f_bg")
            for key, value in state[part].items()}
    torch.save(flat, tmp_path / "cgn.pth")
    own, theirs = cgn.load(imagenet_checkpoint), cgn.load(tmp_path / "cgn.pth")
    u, y = torch.randn(2, 8), torch.tensor([0, 9])
    a, b = own(u, y), theirs(u, y)
    assert torch.equal(a.foreground, b.foreground) and torch.equal(a.pre_mask, b.pre_mask)
    expected = u2net.load(networks[1], align_corners=True)(b.pre_mask)
    assert torch.allclose(b.mask, expected, atol=1e-6) and not torch.allclose(a.mask, b.mask, atol=1e-3)


def test_a_checkpoint_names_its_saliency_network_or_is_refused(imagenet_checkpoint, trained, tmp_path):
    state, digits = run.read_checkpoint(imagenet_checkpoint), run.read_checkpoint(trained / "checkpoint.pt")
    del digits["average"]["f_text.out.bias"]
    saliency = "/nowhere/u2net-of-mine.pth"
    for held, words in (({**state, "config": {**state["config"], "saliency": saliency}}, "u2net-of-mine"),
                        ({**state, "f_text": "/dev/zero"}, "bad.pt"),
                        ({**state, "config": {"model": "imagenet"}}, "bad.pt"),
                        (digits, "bad.pt"), ({"weights": torch.zeros(3)}, "bad.pt")):
        torch.save(held, tmp_path / "bad.pt")
        cgn_refuses(("--checkpoint", tmp_path / "bad.pt", "--out", tmp_path / "a.png"), words)


def test_missing_big_networks_are_named(tmp_path, monkeypatch):
    def offline(*arguments, **more):
        raise OSError("no network")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    monkeypatch.setattr(cgn, "WEIGHTS", tmp_path)
    options = ("--dataset", "imagenet", "--out", tmp_path / "run")
    cgn_refuses(options, biggan.WEIGHTS, "u2net.pth", "vgg16_bn-6c64b313.pth", "no network",
                "--mini runs now")
    cgn_refuses((*options, "--set", f"teacher={tmp_path / 'teacher.bin'}"), "teacher.bin")
    assert "u2net.pth" in cgn_works(*options, "--dry-run").stdout and not (tmp_path / "run").exists()


# ------------------------------ cgn: sampling

@pytest.fixture(params=["digits", "imagenet"])
def loaded(request, trained, imagenet_checkpoint):
    return cgn.load(trained / "checkpoint.pt" if request.param == "digits" else imagenet_checkpoint)


@pytest.mark.parametrize("per_shape", [1, 4])
def test_counterfactuals_are_a_pure_function_of_seed_and_index(loaded, per_shape):
    whole = cgn.counterfactuals(loaded, 22, 5, per_shape, at_once=22)
    parts = cgn.counterfactuals(loaded, 18, 5, per_shape, at_once=5)
    assert all(torch.equal(a[:18], b) for a, b in zip(whole[1:], parts[1:]))
    assert nearly(whole.images[:18], parts.images)
    assert not torch.equal(cgn.counterfactuals(loaded, 22, 6, per_shape).shape, whole.shape)


def test_counterfactuals_of_one_shape_share_its_noise_and_label_and_nothing_else(loaded):
    u, y, arrangement = cgn.draw(loaded, 7, range(40), per_shape=4)
    for part in (u.reshape(3, 10, 4, -1), y.reshape(3, 10, 4)):
        same = part == part[:, :, :1]
        assert same[0].all() and not same[1].all() and not same[2].all()
    assert [len(noise.unique(dim=0)) for noise in u] == [10, 40, 40]
    single = cgn.draw(loaded, 7, range(40), per_shape=1)
    assert torch.equal(single[0][1:], u[1:]) and len(single[0][0].unique(dim=0)) == 40
    middle = cgn.draw(loaded, 7, range(6, 11), per_shape=4)  # from the middle of a shape's group
    assert torch.equal(middle[0], u[:, 6:11]) and torch.equal(middle[1], y[:, 6:11])
    assert arrangement.shape[2] == 0 or len(arrangement.flatten(1).unique(dim=0)) > 30


def test_each_shape_is_made_once_and_textures_as_many_at_a_time_as_asked(loaded):
    loaded.truncation, counts = 0.5, []
    for mechanism in (loaded.f_shape, loaded.f_text, loaded.f_bg):
        mechanism.register_forward_hook(lambda module, given, made: counts.append(len(made)))
    sample, labels = cgn.counterfactual_batch(loaded, 2, range(4, 10), per_shape=6, at_once=4)
    assert counts == [2, 4, 2, 4, 2]  # indices 4 and 5 end a shape, 6 to 9 begin another
    u, y, arrangement = cgn.draw(loaded, 2, range(4, 10), 6)
    assert torch.equal(labels, y) and (loaded.config["model"] == "cgn" or u.abs().max() <= 1)
    with torch.no_grad():
        expected = loaded(tuple(u), tuple(y), arrangement)
    assert all(torch.allclose(made, wanted, atol=1e-5) for made, wanted in zip(sample[:4], expected))


def test_counterfactual_labels_are_uniform_and_independent():
    _, y, _ = cgn.draw(cgn.MnistCGN(), 0, range(4000), per_shape=1)
    for k in range(3):
        assert (y[k].bincount(minlength=10) / 4000 - 0.1).abs().max() < 0.02
        assert abs((y[k] == y[k - 1]).double().mean() - 0.1) < 0.02


def test_written_tensors_are_what_counterfactuals_gives_beside_a_preview(trained, tmp_path):
    checkpoint, copied = trained / "checkpoint.pt", tmp_path / "checkpoint.pt"
    command = ("--checkpoint", checkpoint, "--counterfactuals", 12, "--per-shape", 3, "--seed", 2)
    cgn_works(*command, "--out", tmp_path / "new" / "set.pt")
    held = torch.load(tmp_path / "new" / "set.pt", weights_only=True)
    assert held["names"][9] == "digit 9" and (held["seed"], held["per_shape"]) == (2, 3)
    assert held["weights"] == hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    for key, value in cgn.counterfactuals(cgn.load(checkpoint), 12, 2, 3)._asdict().items():
        assert (held[key].int() - value.int()).abs().max() <= (key == "images")
    assert Image.open(tmp_path / "new" / "set-preview.png").width > 10 * 64
    shutil.copy(checkpoint, copied)
    for out in (copied, checkpoint):
        cgn_refuses((*command, "--out", out), "checkpoint.pt")
    assert copied.read_bytes() == checkpoint.read_bytes()


def test_a_data_set_is_a_pure_function_of_its_index_and_is_continued(
        imagenet_checkpoint, tmp_path, monkeypatch):
    model, whole, parts = cgn.load(imagenet_checkpoint), tmp_path / "whole", tmp_path / "parts"
    write = partial(cgn.write_counterfactuals, model, count=11, seed=5, per_shape=3)
    write(whole, at_once=6)
    calls = ctrl_c_at_call(monkeypatch, mnist_variants, "save_png", at=5)
    with pytest.raises(KeyboardInterrupt):
        write(parts, at_once=1)
    assert not (parts / "labels.csv").exists() and len(list(parts.glob("*.png"))) == 4
    write(parts, at_once=1)
    assert len(calls) == 5 + 8  # the first three were not made again
    rows = (whole / "labels.csv").read_text()
    assert rows == (parts / "labels.csv").read_text() and len(rows.splitlines()) == 12
    _, y, _ = cgn.draw(model, 5, range(11), 3)
    for index, row in enumerate(rows.splitlines()[1:]):
        assert row == f"{index:08d}.png,5,{index - index % 3},{y[0, index]},{y[1, index]},{y[2, index]}"
        a, b = (picture(out / row.split(",")[0]) for out in (whole, parts))
        assert a.shape == (3, 32, 32) and nearly(a, b)


def test_a_data_set_is_of_one_model_one_seed_and_one_precision(imagenet_checkpoint, tmp_path):
    """What may change is which parts lie beside the pictures."""
    model, write = cgn.load(imagenet_checkpoint), partial(cgn.write_counterfactuals, out=tmp_path, seed=3)
    write(model, count=2)
    write(model, count=2, parts=("mask", "background"))
    sample, _ = cgn.counterfactual_batch(model, 3, range(2))
    parts = {"": sample.image, "-mask": sample.mask * 2 - 1, "-background": sample.background}
    for name, part in parts.items():
        for index in range(2):
            assert nearly(picture(tmp_path / f"0000000{index}{name}.png"), cgn.to_uint8(part[index]))
    assert len(list(tmp_path.glob("*.png"))) == 6
    assert len((tmp_path / "labels.csv").read_text().splitlines()) == 3
    other = copy.copy(model)
    other.sha256 = "another"
    for changes in ({"seed": 4}, {"per_shape": 1}, {"bf16": True}, {"model": other}):
        with pytest.raises(ValueError, match="holds counterfactuals of other weights"):
            write(**{"model": model, "count": 2, **changes})
    with pytest.raises(ValueError, match="at least 1"):
        write(model, count=0)


def test_a_data_set_has_the_trainings_truncation_or_bfloat16(imagenet_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(cgn, "bf16_pays", lambda wanted, device: wanted)
    state, found = torch.load(imagenet_checkpoint, weights_only=True), {}
    state["config"]["truncation"] = 0.5
    torch.save(state, tmp_path / "checkpoint.pt")
    for option, truncation in (("", 0.5), ("--bf16", 0.5), ("--truncation=1", 1.0)):
        out = tmp_path / f"set{option}"
        cgn_works("--checkpoint", tmp_path / "checkpoint.pt", "--counterfactuals", 4, "--parts", "mask",
                  "--out", out, *option.split())
        assert json.loads((out / "settings.json").read_text())["truncation"] == truncation
        made = torch.stack([picture(path).float() for path in sorted(out.glob("0000000?.png"))])
        found[option] = made, (out / "labels.csv").read_bytes()
    (whole, labels), (half, labels_half) = found[""], found["--bf16"]
    assert len(whole) == 4 and 0 < (whole - half).abs().mean() < 5 and labels == labels_half


@pytest.mark.parametrize("what", ["shape", "texture", "background", "all"])
def test_interpolations_move_only_what_they_name(loaded, what):
    images = cgn.interpolate(loaded, what, seed=1, rows=2, columns=5, ends=(1, 9))
    assert images.shape == (2, 5, 3, 32, 32) and images.dtype == torch.uint8
    assert (images[:, 0] != images[:, -1]).any()
    u, y, arrangement = cgn.draw(loaded, 1, range(4))
    moving = [what in (name, "all") for name in cgn.MECHANISMS]
    for column, (end, label) in ((0, (0, 1)), (4, (1, 9))):  # its ends, and what stays
        y_row = [torch.tensor([label if moving[k] else int(y[k, 0])]) for k in range(3)]
        u_row = [u[k, end if moving[k] else 0][None] for k in range(3)]
        expected = cgn.render(loaded, u_row, y_row, arrangement[:1])["x_gen"][0]
        assert nearly(expected, images[0, column])
    with pytest.raises(ValueError, match="cannot interpolate 'color'"):
        cgn.interpolate(loaded, "color")


def test_the_triples_of_figure_24():
    names = list(biggan.class_numbers(",".join(map(str, range(1000))), 1000).values())
    rows = [[names[label] for label in cgn.parse_classes(text, names, 3)] for text in cgn.FIGURE_24]
    assert len(rows) == 25 and rows[0] == ["school bus", "giant panda", "geyser"]
    assert rows[13] == ["drilling platform", "ambulance", "breakwater"]
    assert rows[24] == ["teapot", "military uniform", "baseball"]


@pytest.mark.parametrize("options, size", [
    ("--outputs 3", {"digits": (7, 6), "imagenet": (8, 6)}), ("--triples 1,2,3 4,4,4", (4, 2)),
    ("", (12, 10)), ("--interpolate all", (10, 10)), ("--interpolate shape --classes 1 9", (10, 10))])
def test_sheets_of_either_scale(trained, imagenet_checkpoint, tmp_path, options, size):
    for name, checkpoint in (("digits", trained / "checkpoint.pt"), ("imagenet", imagenet_checkpoint)):
        cgn_works("--checkpoint", checkpoint, *options.split(), "--out", tmp_path / "sheet.png")
        width, height = Image.open(tmp_path / "sheet.png").size
        columns, rows = size[name] if isinstance(size, dict) else size
        assert height == 18 + rows * 66 and width >= columns * 66  # small pictures are enlarged


def test_a_sheet_shows_the_models_own_pictures(trained, tmp_path):
    model = cgn.load(trained / "checkpoint.pt")
    cgn.class_sheet(model, [4], model.config["names"], tmp_path / "sheet.png", 5, plain=1, mixed=2)
    u, y, arrangement = cgn.draw(model, 5, range(2))
    y[0] = 4
    made = cgn.render(model, u, y, arrangement)["x_gen"]
    last = picture(tmp_path / "sheet.png")[:, 18 + 1:18 + 65:2, -66:-2:2]  # every other pixel of the last
    assert nearly(last, made[1])


# Options | words of the one line that refuses them. TRAINED is a checkpoint.
MISTAKES = """\
--checkpoint TRAINED --triples 1,2 | '1,2' names 2 classes: 3 are needed
--checkpoint TRAINED --triples 1,2,10 | '10' | 0..9
--checkpoint TRAINED --outputs 'clas 3' | did you mean class 3
--checkpoint TRAINED --counterfactuals 0 | at least 1
--checkpoint TRAINED --counterfactuals 5 --per-shape -1 | at least 1
--checkpoint TRAINED --outputs 1 --steps 5 | --steps | means nothing
--checkpoint nowhere.pt --counterfactuals 5 | nowhere.pt | train first
--checkpoint README.md --counterfactuals 5 | README.md | no checkpoint
--counterfactuals 3 | --checkpoint
--dataset nope | 'nope' | colored | folder
--steps 0 | --steps 0 | at least 1
--batch -3 | --batch -3
--set lr=-1.0 | more than 0
--margin 16 | --margin 16 | 0..15
--interval 0.9 0.1 | 0.9 0.1 | lower one first
--variance -1 | variance -1
--seed -1 | --seed -1
--seed 18446744073709551616 | 18446744073709551616 | 2^63
--threads -1 | --threads -1
--device nowhere | --device nowhere | cpu
--device cuda:99 | --device cuda:99
--mini | --mini | means nothing | colored
--out README.md | README.md is a file
--dataset imagenet --model gan | --model | means nothing
--dataset imagenet --mini --set accumulate=0 | accumulate 0
--dataset imagenet --mini --without shape text bg rec | no loss"""


@pytest.mark.parametrize("mistake", MISTAKES.splitlines())
def test_mistakes_are_one_line(mistake, imagenet_checkpoint, tmp_path, few_images):
    options, *words = mistake.replace("TRAINED", str(imagenet_checkpoint)).split(" | ")
    cgn_refuses(("--out", tmp_path / "x.png", *shlex.split(options)), *words)


def test_torchrun_is_refused_where_processes_would_do_the_same_work(tmp_path, monkeypatch, trained):
    monkeypatch.setenv("WORLD_SIZE", "2")
    cgn_refuses(("--dataset", "colored", "--out", tmp_path / "run"), "one process", "torchrun")
    cgn_refuses(("--checkpoint", trained / "checkpoint.pt", "--out", tmp_path / "a.png"), "one process")
    assert not (tmp_path / "run").exists()


# --------------------------------------------------------------------------------------------------- classify

def classify_run(*options):
    result = script("classify.py", *options)
    assert result.returncode == 0, result
    return result.stdout


def classify_refused(options, *words):
    one_line(script("classify.py", *options), *words)


def test_the_classifier_is_the_papers():
    sizes, h = [], torch.zeros(2, 3, 32, 32)
    for layer in classify.Classifier():
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
    assert all(torch.allclose(a.grad, b.grad, atol=1e-12)
               for a, b in zip(fast.parameters(), plain.parameters()))
    for name in ("running_mean", "running_var"):
        assert torch.allclose(getattr(fast[0], name), getattr(plain[0], name))


def test_a_classifier_trained_on_biased_images_reads_their_colors_not_their_digits():
    """The first row of Table 2 in small: 150 steps."""
    real, val = (mnist_variants.load("double-colored", split) for split in ("train", "val"))
    model = classify.train(classify.METHODS["original"], [(real.images, real.shape, classify.BATCH)], 150)
    predictions = classify.predict(model, val.images[:2000])
    by_color = (predictions == val.foreground[:2000]) | (predictions == val.background[:2000])
    assert by_color.double().mean() > 0.5 and evaluate.accuracy(predictions, val.shape[:2000]) < 0.2


def test_a_batch_mixes_its_sources_in_the_stated_numbers_by_seed_and_step_alone():
    images, labels = tiny_data()
    (x, y), (_, other) = classify.mixed([(images, labels, 4), (images, labels + 10, 60)], 1, "cpu")(7)
    assert x.shape == (4, 3, 32, 32) and y.max() < 10 <= other.min() and len(other) == 60
    assert torch.equal(x, cgn.to_float(images[cgn.rng(1, 7).integers(64, size=4)]))
    method = classify.METHODS["original+cgn"]
    first, again = (classify.train(method, [(images, labels, 8)], 4, seed=1) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters()))


def test_fit_takes_a_step_of_every_optimizer_and_schedule_and_says_how_far_it_is(capsys, monkeypatch):
    def objective(model, batch, progress):
        assert batch == pytest.approx(300 * progress) and model.training
        return (model.weight - 2).square().sum() + (model.bias + 1).square().sum()

    def optimizers(model, steps):
        first, second = (torch.optim.SGD([p], 0.5) for p in (model.weight, model.bias))
        return [(first, None), (second, torch.optim.lr_scheduler.LambdaLR(second,
                                                                          lambda step: 1 - step / steps))]

    clock = itertools.count(0, 4)
    monkeypatch.setattr(time, "time", lambda: next(clock))
    model = classify.fit(torch.nn.Linear(1, 1), lambda step: 10 * step, objective, 30, optimizers,
                         report="name")
    assert (model.weight.item(), model.bias.item()) == pytest.approx((2, -1)) and not model.training
    lines = capsys.readouterr().out.splitlines()            # within ten seconds, then every thirty, of 120
    assert 4 <= len(lines) <= 5 and all(line.startswith("name: ") and "of 30" in line for line in lines)


def test_the_irm_penalty_is_the_squared_derivative_by_a_dummy_scale():
    generator, same = torch.Generator().manual_seed(0), torch.nn.Identity()
    half, y = torch.randn(6, 10, dtype=torch.float64, generator=generator), torch.arange(6)
    z = half.repeat_interleave(2, dim=0)                    # both halves of the batch are the same
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    derivative, = torch.autograd.grad(F.cross_entropy(scale * half, y), scale)
    assert abs(classify.irm_penalty(z, y.repeat_interleave(2)) - derivative ** 2) < 1e-12
    with pytest.raises(ValueError, match="not 1"):
        classify.irm_penalty(z[:1], y[:1])
    half = half.float()
    worlds = [(half, y), (-half, y)]
    risk = classify.erm(same, worlds, 0.5)
    assert abs(classify.irm(same, worlds, 0.0, weight=3.0) - risk) < 1e-6           # at first the plain risk
    penalty = (classify.irm_penalty(half, y) + classify.irm_penalty(-half, y)) / 2
    assert abs(classify.irm(same, worlds, 0.5, weight=3.0) - (risk + 1.5 * penalty)) < 1e-5


def test_brighter_channels_by_hand():
    x = torch.full((3, 3, 4, 4), -0.5)
    x[0, :, 1, 1:3] = torch.tensor([-1.0, 0.0, 1.0])[:, None]       # the digit: darker, brighter, brighter
    x[0, :, 2, 1:3] = torch.tensor([-0.4, -0.6, -0.6])[:, None]     # nearer to the background
    x[1, 0, 2, 2] = 0.0
    assert classify.brighter_channels(x).tolist() == [0b011, 0b100, 0b000]


def test_lntl_unlearns_along_the_reversed_gradient_and_knows_no_brightness_or_contrast():
    h = torch.tensor([1.0, -2.0], requires_grad=True)
    seen = classify.reverse_gradient(h, 30.0)
    (h ** 3 + seen ** 2).sum().backward()
    assert torch.equal(seen, h) and torch.allclose(h.grad, 3 * h.detach() ** 2 - 30 * 2 * h.detach())
    model, plain = (classify.train(classify.METHODS[name], [(*tiny_data(), 64)], 1, 1)
                    for name in ("lntl", "normalised"))
    changed = [not torch.equal(a, b) for a, b in zip(model.classifier.parameters(),
                                                     plain.classifier.parameters())]
    # batch norm and two convolutions, but not what is behind them
    assert changed == [True] * 6 + [False] * 6
    x, means = cgn.to_float(tiny_data()[0]), []
    gain, shift = torch.tensor([[0.5, 0.8, 2.0], [0.2, 0.0, -0.1]])[:, :, None, None]
    assert not model.training and torch.allclose(model(x), model(gain * x + shift), atol=0.01)
    # of what the features' two convolutions give, in each image
    for place in (3, 5):
        norm = model.classifier[place][0]
        norm.register_forward_hook(lambda norm, given, out: means.append(out.mean(dim=(2, 3)).abs().max()))
    model(x)
    assert len(means) == 2 and max(means) < 1e-4


def test_settings_of_classifiers_are_the_papers():
    assert [*classify.METHODS["irm-2"].batch] == ["0.9", "1.0"]                     # C.4
    assert [*classify.METHODS["irm-5"].batch] == ["0.9", "0.925", "0.95", "0.975", "1.0"]
    wanted = {"network": "resnet50", "heads": 3, "batch": 256, "ratio": 1, "epochs": 70, "lr": 0.1,
              "momentum": 0.9,
              "weight_decay": 1e-4, "milestones": [30, 60], "decay": 0.001, "side": 224}
    assert {name: classify.ENSEMBLE[name] for name in wanted} == wanted and classify.TABLES["seeds"] == [0,
                                                                                                         1, 2]
    options = [action for action in classify.build_parser()._actions if action.dest != "help"]
    assert len(options) <= 28 and all(action.default in (None, False) for action in options)


def test_the_table_runs_end_to_end_and_is_not_computed_twice(tmp_path, few_images, monkeypatch):
    command = ("--dataset", "colored", "--seeds", 0, "--count", 100, "--steps", 3, "--runs", tmp_path,
               "--set",
               "generator_steps=2", "--method")
    methods, results = ("irm-2", "lntl", "original+gan", "original+cgn"), tmp_path / "results.jsonl"
    said = classify_run(*command, *methods)
    assert re.search(r"\| original\+cgn \| \d+\.\d \| \d+\.\d \|", said)            # of one seed no deviation
    rows = run.read_lines(results)
    assert [row["steps"] for row in rows] == [9, 2, 3, 3] and all(0 <= row["test"] <= 1 for row in rows)
    assert all(row.keys() >= {"threads", "processor", "torch", "device", "seconds"} for row in rows)
    paths = re.findall(r"\S+classifier\.pth", classify_run(*command, *methods))
    assert run.read_lines(results) == rows and len(paths) == 4                      # each is kept, and said
    assert all(torch.load(path, weights_only=True) for path in paths)
    classify.read_classifier(paths[-1])

    def added(*options):
        before = len(run.read_lines(results))
        classify_run(*command, "lntl", *options)
        return len(run.read_lines(results)) - before

    other = classify.METHODS["lntl"]._replace(objective=partial(classify.lntl, reversal=3.0))
    monkeypatch.setitem(classify.METHODS, "lntl", other)
    # all numbers are in the key
    assert added() == 1 and added() == 0
    monkeypatch.setattr(classify, "bf16_pays", lambda wanted, device: wanted)
    assert [added("--bf16"), added("--variance", 0.1), added("--threads", 1), added()] == [1, 1, 0, 0]
    monkeypatch.setattr(classify, "METHODS",
                        {**classify.METHODS, "original+gan": classify.Method({"gan": 4})})
    changed = [word.replace("steps=2", "steps=3") if isinstance(word, str) else word for word in command]
    classify_refused((*changed, "original+gan"), "colored-gan-0", "another")


def test_a_given_cgn_or_set_of_counterfactuals_trains_a_classifier(trained, tmp_path, few_images):
    checkpoint, file, runs = trained / "checkpoint.pt", tmp_path / "set.pt", tmp_path / "runs"
    command = ("--steps", 2, "--seeds", 0, "--runs", runs)
    # its own data set, both methods
    said = classify_run(*command, "--cgn", checkpoint, "--count", 100)
    assert "| cgn |" in said and "| original+cgn |" in said and not (runs / "colored-cgn-0").exists()
    data = cgn.counterfactuals(cgn.load(checkpoint), 100, 0)
    run.save_state(file, {**data._asdict(), "names": []})
    given = (*command, "--counterfactuals", file, "--dataset", "colored")
    classify_run(*given, "--method", "cgn")
    a, b = (row for row in run.read_lines(runs / "results.jsonl") if row["method"] == "cgn")
    assert a["test"] == b["test"] and a["generator"] != b["generator"]              # the same images
    torch.save({**data._asdict(), "shape": data.shape + 10}, file)
    classify_refused(given, "set.pt", "no set of digits")
    classify_refused((*command, "--cgn", checkpoint, "--method", "original"), "--method cgn")


def test_the_cause_is_looked_for_in_environments(tmp_path, monkeypatch, few_images):
    """A classifier that reads the foreground is right where it agrees with the class: as often as it does."""
    monkeypatch.setitem(mnist_variants.SPLITS, "test", slice(5000))
    worlds, load = {}, mnist_variants.load

    def world(*given, **options):
        found = load(*given, **options)
        return worlds.setdefault(id(found.images), found)

    monkeypatch.setattr(mnist_variants, "load", world)
    monkeypatch.setattr(classify, "load_source",
                        lambda *given: mnist_variants.Variant("images", *classify.LABELS))
    monkeypatch.setattr(classify, "train", lambda method, sources, *more,
                        **how: torch.nn.ParameterDict({sources[0][1]: 1}))
    monkeypatch.setattr(classify, "predict", lambda model, images: getattr(worlds[id(images)], *model))
    said = classify_run("--make", "table5", "--dataset", "double-colored", "--seeds", 0, "--runs", tmp_path)
    rows = [line.strip("| ").split(" | ")[1:] for line in said.splitlines() if line.startswith("| double")]
    for row, agreement in zip(rows, (90, 95, 100), strict=True):
        assert list(map(float, row)) == pytest.approx([100, agreement, agreement], abs=1)


def test_the_vae_loss_by_hand_and_its_picture(tmp_path, few_images):
    x, made = torch.ones(1, 3, 1, 1), torch.tensor([0.0, 1.0, -1.0]).view(1, 3, 1, 1)
    mean, log_variance = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, np.log(2.0)]])
    expected = (1 + 0 + 4) / 2 + 3 * (1 + (2 - 1 - np.log(2))) / 2
    assert classify.vae_loss(x, made, mean, log_variance, 3.0).item() == pytest.approx(expected)
    model, noise, x = classify.VAE(), torch.tensor([[1.0, -1.0]]), torch.zeros(1, 3, 32, 32)
    made, mean, log_variance = model(x, noise)
    assert torch.allclose(made,
                          model.decoder(mean + noise * (log_variance / 2).exp())) and made.shape == x.shape
    classify_run("--make", "figure6", "--dataset", "colored", "--steps", 100, "--runs", tmp_path)
    picture = np.array(Image.open(tmp_path / "figure6-colored.png"))
    made = picture[18:, -10 * 66:].reshape(10, 66, 10, 66, 3)[:, :64, :, :64]       # without the white lines
    assert picture.shape[0] == 18 + 10 * 66 and made.max(axis=(1, 3, 4)).min() > 40     # none is black


def test_figure_7_shows_its_curves(tmp_path, few_images):
    said = classify_run("--make", "figure7", "--dataset", "colored", "--dry-run")
    assert "figure7-colored.png" in said and said.count("classifier.pth: test") == 5
    classify.save_curves(tmp_path / "c.png", {"a": [(10, 50.0), (1000, 90.0)], "b": [(10, 60.0)]}, "title")
    pixels = np.array(Image.open(tmp_path / "c.png")).reshape(-1, 3)
    assert (pixels == (0, 0x72, 0xB2)).all(1).sum() > 300 and (pixels == (0xD5, 0x5E, 0)).all(1).sum() > 20


# ------------------------------------------------------------------------------------- classify: the ensemble

@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two classes of five small pictures in subfolders, six counterfactuals as cgn.py writes them."""
    root, generator = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for name, count in (("real/ant", 5), ("real/bee", 5), ("made", 6)):
        (root / name).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            pixels = generator.integers(256, size=(40, 36, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{index:08d}.png")
    rows = [f"{index:08d}.png,{index % 2},{index // 2 % 2},{index // 4 % 2}" for index in range(6)]
    (root / "made" / "labels.csv").write_text("\n".join(["file,shape,texture,background", *rows]) + "\n")
    torch.manual_seed(0)
    network = torchvision.models.get_model("shufflenet_v2_x0_5", num_classes=1000)
    torch.save(network.state_dict(), root / "weights.pth")
    return root


def ensemble_options(pictures, out, *more, made=None, **settings):
    values = {"network": "shufflenet_v2_x0_5", "weights": pictures / "weights.pth", "side": 32, "batch": 4,
              "epochs": 2,
              "lr": 0.01, "save_every": 1, **settings}
    return list(map(str, ("--dataset", "imagenet", "--real", pictures / "real", "--workers", 1,
                          "--threads", 1,
                          *(made or ("--counterfactuals", pictures / "made")), "--out", out, *more, "--set",
                          *(f"{key}={value}" for key, value in values.items()))))


def ensemble_losses(out):
    return [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()[1:]]


def test_ensemble_loss_by_hand():
    # one image: mean scores 1, 0
    real = torch.tensor([[[2.0, 0.0], [0.0, 0.0], [1.0, 0.0]]])
    made = torch.tensor([[[3.0, 0.0], [0.0, 3.0], [0.0, 0.0]]] * 2)                 # two counterfactuals
    y, labels = torch.tensor([0]), torch.tensor([[0, 1, 1], [0, 1, 1]])
    # each a mean over its images
    expected = np.log(1 + np.exp(-1)) + (2 * np.log(1 + np.exp(-3)) + np.log(2))
    assert classify.ensemble_loss(real, y, made, labels).item() == pytest.approx(expected)
    alone = classify.ensemble_loss(real, y, made[:0], labels[:0])
    assert alone.item() == pytest.approx(np.log(1 + np.exp(-1)))
    smooth = classify.ensemble_loss(real, y, made, labels, 0.2)
    # a tenth of each margin more
    assert smooth.item() == pytest.approx(expected + 0.1 * (1 + 2 * 3))


def test_an_ensembles_heads_are_new_and_its_batch_norms_stay():
    torch.manual_seed(0)
    network = torchvision.models.get_model("shufflenet_v2_x0_5", num_classes=6)
    model, x = classify.Ensemble(copy.deepcopy(network)).train(), torch.randn(2, 3, 32, 32)
    weights = [network.fc.weight, *(head.weight for head in model.heads)]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(weights, 2))
    scores = model(x)
    assert scores.shape == (2, 3, 6) and torch.equal(scores[:, 1], model.heads[1](model.backbone(x)))
    scores[:, 1].sum().backward()
    assert not model.heads[0].weight.grad.any() and model.heads[1].weight.grad.any()
    norm = model.backbone.conv1[1]
    assert not norm.running_mean.any()
    # from random weights they learn
    model.frozen = False
    model.train()(x)
    assert norm.running_mean.any()


def test_dropout_is_the_same_in_a_run_that_was_stopped(tmp_path):
    config = {"seed": 3, "steps": 4, "lr": 0.1, "momentum": 0.9, "weight_decay": 0.0, "decay": 0.1,
              "milestones": [],
              "bf16": False, "smoothing": 0.0, "log_every": 1, "saves": (1,)}

    def learn(out, stop):
        def batches(first):
            for step in range(first, stop):
                yield torch.full((4, 3, 8, 8), step / 4), torch.arange(4)
        torch.manual_seed(0)
        network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(), torch.nn.Linear(192, 5))
        classify.train_ensemble(config, classify.Ensemble(network), batches, None, out)

    learn(tmp_path / "whole", 4)
    with pytest.raises(StopIteration):
        learn(tmp_path / "parts", 2)
    torch.rand(7)
    learn(tmp_path / "parts", 4)
    assert ensemble_losses(tmp_path / "parts") == ensemble_losses(tmp_path / "whole")


def test_each_epoch_holds_every_picture_once(pictures):
    files = [(path, (k,)) for k, (path, _) in enumerate(mnist_variants.labelled_files(pictures / "made"))]
    items, share = (classify.Items(classify.random_pictures, files, 3, 32, 1, part, False)
                    for part in (slice(None), slice(1, None, 2)))
    (x, y), (_, other) = items[0], items[1]
    assert sorted(torch.cat([y,
                             other]).flatten().tolist()) == list(range(6)) and not torch.equal(items[2][1], y)
    # what goes through the workers' shared memory
    assert x.shape == (3, 3, 32, 32) and x.dtype == torch.uint8
    assert torch.equal(items[0][0], x) and torch.equal(share[0][0], x[1::2])


@beside
def test_the_ensemble_trains_the_same_stopped_or_not_alone_or_in_two_processes(pictures, tmp_path):
    said = classify_run(*ensemble_options(pictures, tmp_path / "whole"))
    assert "10 real images, 2 classes, 6 counterfactuals; 6 steps of 4 + 4" in said
    (tmp_path / "stop.py").write_text(f"""
import multiprocessing, os, signal, sys, time
sys.path.insert(0, {str(HERE)!r})
import classify, u2net
open_photo, normalise, calls = u2net.open_photo, u2net.normalise, []
def slow(*arguments, **options):                                # the signal meets workers at their work
    time.sleep(0.1)
    return open_photo(*arguments, **options)
def stop(x):
    calls.append(1)
    if len(calls) == 2:
        os.killpg(0, getattr(signal, sys.argv[1]))
    return normalise(x)
u2net.open_photo, u2net.normalise = slow, stop
if __name__ == "__main__":
    os.setpgrp()
    multiprocessing.set_start_method(sys.argv[2])
    classify.main({ensemble_options(pictures, tmp_path / 'parts')})
""")
    for number, how in enumerate((("SIGINT", "forkserver"), ("SIGTERM", "fork")), 1):
        stopped = process(tmp_path / "stop.py", *how)
        assert stopped.returncode == 130 and "the same command continues" in stopped.stderr, stopped
        assert "Traceback" not in stopped.stderr
        assert run.read_checkpoint(tmp_path / "parts" / "checkpoint.pt")["step"] == 2 * number, how
    classify_run(*ensemble_options(pictures, tmp_path / "parts"))
    a, b = (run.read_checkpoint(tmp_path / name / "checkpoint.pt")["ensemble"] for name in ("whole", "parts"))
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert ensemble_losses(tmp_path / "parts") == ensemble_losses(tmp_path / "whole")
    result = process("-m", "torch.distributed.run", "--nproc-per-node", 2, "--master-port", 29534,
                     "classify.py",
                     *ensemble_options(pictures, tmp_path / "two"))
    assert result.returncode == 0, result.stderr
    assert ensemble_losses(tmp_path / "two") == pytest.approx(ensemble_losses(tmp_path / "whole"), abs=1e-5)
    said = classify_run("--checkpoint", tmp_path / "whole" / "checkpoint.pt", "--say",
                        pictures / "real/ant/00000000.png")
    assert re.fullmatch(r"(an ant|a bee) shape with (ant|bee) texture on (an ant|a bee) background "
                        r"\(shape \d+ %, texture \d+ %, background \d+ %\)\n", said), said


def test_a_run_continues_whatever_changes_no_result(pictures, tmp_path, monkeypatch):
    out, weights = tmp_path / "run", tmp_path / "weights.pth"
    classify_run(*ensemble_options(pictures, out, epochs=1))
    shutil.copy(pictures / "weights.pth", weights)
    monkeypatch.chdir(pictures)
    other = ensemble_options(pictures, out, "--real", "real/../real", "--workers", 0, "--heads", 3,
                             weights=weights,
                             save_every=2, made=("--counterfactuals", "made/"))
    # more epochs, paths elsewhere
    assert "at step 3" in classify_run(*other)
    for change in ({"batch": 2}, {"milestones": "[1]"}, {"smoothing": 0.1}):
        classify_refused(ensemble_options(pictures, out, **change), *change)


def test_workers_that_are_left_behind_do_not_keep_the_process():
    code = "import classify; kept = classify.Items(float).ahead(range(99), 1); next(kept); print('end')"
    result = process("-c", code)
    assert result.returncode == 0 and result.stdout == "end\n" and not result.stderr, result


def test_a_worker_that_fails_or_dies_is_one_line(pictures, tmp_path, monkeypatch):
    import multiprocessing
    normalise, calls = u2net.normalise, []

    def kill(x):
        calls.append(1)
        if len(calls) == 2:
            multiprocessing.active_children()[0].kill()
            time.sleep(20)                          # the signal of the child's end comes now
        return normalise(x)

    def full(*arguments):
        raise RuntimeError("unable to write to file </torch_123_456_7>: No space left on device (28)")

    monkeypatch.setattr(u2net, "normalise", kill)
    classify_refused(ensemble_options(pictures, tmp_path / "run"), "DataLoader worker", "killed", "--workers")
    assert run.read_checkpoint(tmp_path / "run" / "checkpoint.pt")["step"] == 1
    monkeypatch.setattr(sys.modules[classify.score.__module__], "crop_and_flip", full)
    classify_refused(ensemble_options(pictures, tmp_path / "run2"), "No space left", "shared", "--workers")


def test_an_ensemble_draws_its_counterfactuals_from_a_cgn(imagenet_checkpoint, monkeypatch):
    """They are those of the CGN's data set, cropped and flipped like pictures of files."""
    model = cgn.load(imagenet_checkpoint)
    steps = classify.drawn_pictures(model, 3, 4, 24, seed=1, per_shape=2, share=slice(1, 3))
    x, labels = next(steps)
    assert x.shape == (2, 3, 24, 24) and 0 <= x.min() and x.max() <= 1
    assert torch.equal(labels, cgn.draw(model, 1, range(13, 15), 2)[1].T)
    # what is seen of it tells the place and the mirror
    ramp = torch.arange(32.0).expand(2, 3, 32, 32) / 16 - 1
    made = cgn.Sample(None, None, None, ramp), torch.zeros(3, 2).long()
    monkeypatch.setattr(cgn, "counterfactual_batch", lambda *arguments: made)
    drawn = classify.drawn_pictures(model, 0, 2, 24, 1, 1, slice(None))
    seen = torch.cat([next(drawn)[0][:, 0, 0] for _ in range(20)])
    assert len(set(seen[:, 0].tolist())) > 30                   # each another part ..
    assert 8 < (seen[:, 0] > seen[:, -1]).sum() < 32            # .. about half of them mirrored


@pytest.fixture(scope="module")
def imagenet_ensemble(tmp_path_factory):
    """A checkpoint of an ensemble of 1,000 classes whose heads always answer airplane, bear and dog."""
    path = tmp_path_factory.mktemp("ensemble") / "checkpoint.pt"
    model = classify.Ensemble(torchvision.models.get_model("shufflenet_v2_x0_5", num_classes=1000))
    for head, label in zip(model.heads, (404, 294, 152)):
        torch.nn.init.zeros_(head.weight)
        torch.nn.init.zeros_(head.bias)
        head.bias.data[label] = 5.0 + (label == 404)
    names = [f"n{number:08d}" for number in range(1000)]
    config = {"network": "shufflenet_v2_x0_5", "heads": 3, "names": names, "side": 32}
    torch.save({"config": config, "step": 1, "ensemble": model.state_dict()}, path)
    return path


def red_pictures(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), "red").save(folder / name)


def test_each_head_is_judged_on_cue_conflict_and_its_table_says_why(imagenet_ensemble, tmp_path):
    cue, table = tmp_path / "cue", tmp_path / "table.csv"
    red_pictures(cue / "any", *(f"{name}.png" for name in ("airplane1-bear2", "bear1-airplane3", "dog1-dog2",
                                                           "dog1-airplane1")))
    command = ("--checkpoint", imagenet_ensemble, "--workers", 0, "--cue-conflict", cue, "--out")
    said = classify_run(*command, table)
    assert "| shape bias | by shape | by texture | images |" in said
    assert "| shape | 33.33 % | 1 | 2 | 4 |" in said
    assert "| background | 100.00 % |" in said and "| average | 33.33 % |" in said  # the first is the surest
    assert [row["shape"] for row in evaluate.read_table(table)] == ["airplane"] * 4
    (cue / "dog1-bear1.png").write_text("no picture")
    classify_refused((*command, table, "--workers", 1), "dog1-bear1.png", "--skip-broken")
    assert "| shape | 33.33 % | 1 | 2 | 4 |" in classify_run(*command, table, "--skip-broken")
    classify_refused((*command, imagenet_ensemble), "what is read")
    red_pictures(cue, "cat.png")
    classify_refused((*command, table), "cat.png", "airplane1-bicycle2.png")


def test_each_head_is_judged_on_imagenet_and_imagenet9(imagenet_ensemble, tmp_path):
    in9, val, made, table = (tmp_path / name for name in ("in9", "val", "made", "table.csv"))
    command = ("--checkpoint", imagenet_ensemble, "--workers", 0, "--out", table)
    words = ("dog", "bird", "wheeled vehicle", "reptile", "carnivore", "insect", "musical instrument",
             "primate", "fish")
    for variation, more in (("original", ()), ("mixed_same", (0, 0, 4)), ("mixed_rand", (4, 4, 4))):
        red_pictures(in9 / variation / "val", *(f"{label:02d}_{words[label]}/{number}.JPEG"
                                                for number, label in enumerate((*range(9), *more))))
    # in the published archive: no pictures
    (in9 / "fg_mask" / "val" / "00_dog").mkdir(parents=True)
    (in9 / "fg_mask" / "val" / "00_dog" / "0.npy").write_bytes(b"mask")
    said = classify_run(*command, "--imagenet9", in9)
    assert "| texture | 33.33 % | 16.67 % | 11.11 % | -16.67 % |" in said           # bears are carnivores
    (in9 / "original" / "val" / "00_dog").rename(in9 / "original" / "val" / "dog")
    classify_refused((*command, "--imagenet9", in9), "original", "00_dog")

    # by name
    red_pictures(val, *(f"n{name:08d}/{number}.png" for number, name in enumerate((404, 404, 294, 0))))
    assert "| shape | 4 | 50.00 % |" in classify_run(*command, "--imagenet", val)
    assert [len(row["average"].split()) for row in evaluate.read_table(table)] == [5] * 4
    red_pictures(val, "cat/0.png")
    classify_refused((*command, "--imagenet", val), "'cat'")

    # counterfactuals: each head has its own
    red_pictures(made, "0.png", "1.png")
    (made / "labels.csv").write_text("file,shape,texture,background\n0.png,404,294,152\n1.png,404,0,0\n")
    said = classify_run(*command, "--imagenet", made)
    assert all(f"| {row}.00 % |" in said
               for row in ("shape | 2 | 100", "texture | 2 | 50", "background | 2 | 50"))


def test_pictures_of_the_networks_size_are_seen_whole_and_as_they_are_meant_to_be(tmp_path):
    framed = np.full((224, 224, 3), 255, dtype=np.uint8)
    framed[14:-14, 14:-14] = 0

    def white(name, side=224, crop=True):
        return (classify.score(lambda x: x, [str(tmp_path / name)], side,
                               crop)[0][0] == 1).float().mean().item()

    Image.fromarray(framed).save(tmp_path / "framed.png")
    assert white("framed.png") == white("framed.png", crop=False) == pytest.approx(1 - (196 / 224) ** 2)
    Image.fromarray(framed).resize((448, 448), Image.NEAREST).save(tmp_path / "large.png")
    assert white("large.png") < 0.02 < 0.2 < white("large.png", crop=False)         # 256 pixels, of these 224
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.fromarray(np.full((8, 8), 0x4000, dtype=np.uint16)).save(tmp_path / "grey.png")
    turned, exif = Image.new("RGB", (8, 4), "white"), Image.Exif()
    exif[0x0112] = 6                                                                # turned by a quarter
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert white("clear.png",
                 8) == 1 and classify.read_picture(tmp_path / "grey.png").unique().tolist() == [63]
    assert classify.read_picture(tmp_path / "turned.jpg").shape == (3, 8, 4)


@pytest.mark.parametrize("change, settings, words", [
    (("--real", "docs"), {}, ("docs",)), ((), {"batch": 0}, ("batch 0",)),
                                                     ((), {"network": "lenet"}, ("lenet",)),
    ((), {"network": "vit_b_16", "weights": "random"}, ("vit_b_16", "32")),
    ((), {"network": "raft_small", "weights": "random"}, ("raft_small",)),
    (("--counterfactuals", "docs"), {}, ("docs",)),
    (("--out", "requirements.txt"), {}, ("requirements.txt",)), (("--ratio", "0.3"), {}, ("ratio 0.3",)),
    ((), {"weights": "requirements.txt"}, ("requirements.txt",)), (("--ratio", "0"), {}, ("ratio 0",)),
    ((), {"rate": 1}, ("'rate'",)), (("--cgn", "a.pt"), {}, ("--counterfactuals",)),
                                                     (("--steps", "3"), {}, ("--steps",))])
def test_mistakes_with_the_ensemble_are_one_line(pictures, tmp_path, change, settings, words):
    classify_refused(ensemble_options(pictures, tmp_path, *change, **settings), *words)


def test_counterfactuals_of_other_classes_than_the_real_images_are_refused(pictures, imagenet_checkpoint,
                                                                           tmp_path):
    shutil.copytree(pictures, tmp_path / "p")
    made, options = tmp_path / "p" / "made", ensemble_options(tmp_path / "p", tmp_path / "run")
    drawn = ensemble_options(pictures, tmp_path / "run", made=("--cgn", imagenet_checkpoint))
    classify_refused(drawn, "10 classes", "2")
    (made / "settings.json").write_text('{"names": ["bee", "ant"]}')
    classify_refused(options, "bee, ant", "ant, bee")
    (made / "settings.json").write_text('{"names": ["ant", "bee"]}')
    assert "dry run finished" in classify_run(*options, "--dry-run")
    for row, words in (("../../x.png,1,1,1", "not in its folder"), ("0.png,one,1,1", "number"),
                       ("0.png,1,1,2", "0..1")):
        (made / "labels.csv").write_text(f"file,shape,texture,background\n{row}\n")
        classify_refused(options, words)


def test_broken_pictures_and_checkpoints_are_named(pictures, imagenet_ensemble, tmp_path):
    shutil.copytree(pictures, tmp_path / "p")
    (tmp_path / "p" / "real" / "ant" / "00000001.png").write_text("no picture")
    options = ensemble_options(tmp_path / "p", tmp_path / "out")
    classify_refused(options, "00000001.png does not open", "--skip-broken")
    said = classify_run(*options, "--skip-broken", "--workers", 0)
    assert re.search(r"00000001\.png does not open as a picture.*: skipped", said)
    state, other = torch.load(imagenet_ensemble, weights_only=True), tmp_path / "other.pt"
    for change, word in (({"heads": 1}, "heads.1.weight"), ({"heads": "3"}, "str"),
                         ({"network": "resnet18"}, "")):
        torch.save({**state, "config": {**state["config"], **change}}, other)
        classify_refused(("--checkpoint", other, "--say", "a.jpg"),
                         "other.pt is no checkpoint of an ensemble", word)


# ---------------------------------------------------------- classify: Inception Score and mechanisms of a CGN

def test_the_inception_score_of_a_folder_counts_pictures_and_no_parts(tmp_path):
    images = np.random.default_rng(0).integers(256, size=(12, 32, 32, 3), dtype=np.uint8)
    for index, pixels in enumerate(images):
        Image.fromarray(pixels).save(tmp_path / f"{index:08d}.png")
        Image.new("L", (32, 32)).save(tmp_path / f"{index:08d}-mask.png")
    network = classify.read_classifier(cgn.WEIGHTS / "mini-classifier.pth")
    scores = network(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1)
    mean, std = evaluate.inception_score(scores.softmax(dim=1), 2)
    said = classify_run("--inception-score", tmp_path, "--workers", 0, "--set", "splits=2",
                        "inception=mini-classifier.pth")
    assert f"| 12 | {mean:.2f} ± {std:.2f} |" in said


def test_torchvisions_inception_reads_images_in_minus_one_to_one(tmp_path):
    model = torchvision.models.inception_v3(init_weights=False)
    torch.save(model.state_dict(), tmp_path / "inception.pth")
    x, network = torch.rand(1, 3, 299, 299) * 2 - 1, classify.read_classifier(tmp_path / "inception.pth")
    with torch.no_grad():
        assert torch.allclose(network(x), model.eval()(x), atol=1e-5) and network.side == 299
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="other.pth is no state dict of inception_v3"):
        classify.read_classifier(tmp_path / "other.pth")


def test_disentanglement_of_perfect_and_hidden_mechanisms():
    """Labels are grey levels: the mask's in row 0, the foreground's in row 1, the background's in row 2."""
    labels = torch.arange(10).repeat(20)
    other = (labels + torch.randint(1, 10, labels.shape, generator=torch.Generator().manual_seed(0))) % 10

    def parts(y):
        level = (y.float() / 9)[:, None, None, None]
        m = torch.zeros(len(y), 1, 4, 4)
        m[:, :, 0], m[:, :, 1] = level[:, 0], 1.0
        f, b = (level.expand(-1, 3, 4, 4).clone() for _ in range(2))
        f[:, :, 0], b[:, :, 0] = 1.0, 0.0
        return cgn.Sample(m, f, b, None)

    def reader(row):
        return lambda x: -(x[:, 0, row, 0, None] * 9 - torch.arange(10)).abs()

    made, real, readers = parts(labels), parts(other)[:3], [reader(0), reader(1), reader(2)]
    assert torch.equal(classify.disentanglement(made, labels, real, readers), torch.eye(3))
    made.foreground[labels == 4, :, 1] = 0.0
    table = classify.disentanglement(made, labels, real, [*readers[:2], None])
    assert table[1, 1] == pytest.approx(0.9) and table[2].isnan().all()


def test_mechanisms_are_measured_on_draws_that_were_not_trained_on(trained, imagenet_checkpoint, tmp_path,
                                                                   few_images,
                                                                  monkeypatch):
    ask = ("--make", "mechanisms", "--steps", 3, "--count", 12, "--cgn")
    said = classify_run(*ask, trained / "checkpoint.pt")
    number = r"\d+\.\d"
    assert re.search(rf"\| foreground (\| {number} ){{3}}\|\n\| background (\| nan ){{3}}\|\n", said)
    assert "12 draws of seed 4; the training's was 3" in said and "reader of foregrounds: " in said
    # so that the other draws no digits
    monkeypatch.setattr(mnist_variants, "SIZE", 28)
    settings = ("--set", "splits=2", f"inception={cgn.WEIGHTS / 'mini-classifier.pth'}")
    said, model = classify_run(*ask, imagenet_checkpoint, *settings), cgn.load(imagenet_checkpoint)
    m = model(*cgn.draw_training(model, 4, range(12))[:2]).mask
    mean, std = evaluate.mean_std(m.mean(dim=(1, 2, 3)).tolist())                   # Table 1's row
    assert f"| {100 * mean:.1f} ± {100 * std:.1f} % | {cgn.binary_entropy(m):.3f} bit |" in said
    state = run.read_checkpoint(trained / "checkpoint.pt")
    config = {**state["config"], "model": "gan"}
    torch.save({**state, "config": config, "average": cgn.build(config).state_dict()}, tmp_path / "gan.pt")
    classify_refused((*ask, tmp_path / "gan.pt"), "gan.pt", "no mechanisms")


@pytest.mark.parametrize("options, words", [
    ("--device cuda:99", "--device cuda:99"), ("--dataset mnist", "colored"), ("--count 0", "count 0"),
    ("--set label=background --dataset colored", "no background label"),
    ("--make table5 --dataset colored", "no background label"), ("--checkpoint a.pt", "--checkpoint"),
    ("--say a.jpg", "say needs --checkpoint"), ("--dataset imagenet", "ensemble needs --real"),
    ("--dataset imagenet colored --real docs", "imagenet goes alone"),
                                            ("--dataset colored --heads 1", "--heads"),
    ("--ratio 1", "--ratio"), ("--dataset colored --out x", "--out"), ("--workers 1", "--workers"),
    ("--dataset colored --textures x", "--textures"), ("--dataset wildlife --variance 0.1", "--variance"),
    ("--make figure6 --method cgn", "--method"), ("--runs README.md", "README.md"),
    ("--make mechanisms", "mechanisms needs --cgn"), ("--cgn nowhere.pt", "nowhere.pt")])
def test_a_mistake_with_classifiers_is_one_line(options, words):
    classify_refused(options.split(), words)


def test_tables_run_in_one_process(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    classify_refused(("--dataset", "colored"), "torchrun")


# ---------- miniature

class SmallJudge(torch.nn.Sequential):
    """A score for each class of two images at once; ends a training after `left` calls."""
    def forward(self, x, y):
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt
        return super().forward(x).gather(1, y[:, None])[:, 0]


def small_teacher():
    torch.manual_seed(0)
    return biggan.BigGAN([(32, 32), (32, 16)], None, 3, 8, 8)


def test_a_small_teacher_learns_by_packs_of_a_class_and_continues_exactly(tmp_path):
    colors, labels = torch.tensor([[220, 30, 30], [0, 0, 0], [30, 30, 220]]).byte(), torch.arange(60) % 2 * 2
    images = colors[labels][:, :, None, None].expand(-1, 3, 8, 8)
    x, y, *_ = next(miniature.draw_batches(images, labels, 8, 16, 2, 0))
    assert torch.allclose(miniature.packed(x, 2)[..., 0, 0], colors[y[::2]].repeat(1, 2) / 127.5 - 1)

    def train(name, steps, left=0, pack=2):
        config = {**miniature.TEACHER, "batch": 16, "pack": pack, "lr": 1e-3, "noise": 0.0, "average": 0.9,
                  "saves": (2,), "steps": steps, "seed": 0}
        model, last = small_teacher(), (torch.nn.Flatten(), torch.nn.Linear(256, 3))
        judge = SmallJudge(torch.nn.Conv2d(6, 16, 4, 2, 1), torch.nn.ReLU(), *last)
        judge.left = left
        return miniature.train_teacher(config, model, judge, images, labels, tmp_path / name)

    model = train("learns", 120)
    miniature.measure_statistics(model, batches=2, batch=50)
    with torch.no_grad():
        x = biggan.load(model.state_dict())(biggan.truncated_noise(20, 8, seed=0), torch.arange(20) % 2 * 2)
    red, blue = x.mean((2, 3)).view(10, 2, 3).mean(0)
    assert red[0] > red[2] + 0.5 and blue[2] > blue[0] + 0.5
    with pytest.raises(KeyboardInterrupt):
        train("parts", 5, left=7)
    whole, parts = (train(name, 5).state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(value, whole[key]) for key, value in parts.items())
    with pytest.raises(ValueError, match="16 images .* packs of 5"):
        train("none", 1, pack=5)


def test_measured_statistics_are_those_of_all_draws_at_their_truncation():
    model, generator, seen = small_teacher(), torch.Generator().manual_seed(5), []
    miniature.measure_statistics(model, batches=3, batch=30, seed=5)
    norm = model.generator["layers"][0].bn_0
    norm.register_forward_pre_hook(lambda module, given: seen.append(given[0].detach()))
    for row in range(biggan.ROWS):
        for _ in range(3):
            y = torch.randint(3, (30,), generator=generator)
            model(biggan.truncated_noise(30, 8, row / 50, generator=generator), y, None)
        found = torch.var_mean(torch.cat(seen[-3:]), (0, 2, 3), correction=0)
        for stored, wanted in zip((norm.running_vars, norm.running_means), found):
            assert torch.allclose(stored[row], wanted, atol=1e-5), row


def test_a_small_u2net_learns_bright_squares():
    target, logits = torch.tensor([[[[0.0, 1.0]]]]), [torch.tensor([[[[0.0, 2.0]]]])] * 7
    assert abs(miniature.saliency_loss(logits, target) - 7 * (np.log(2) + np.log1p(np.exp(-2))) / 2) < 1e-5
    torch.manual_seed(0)
    rows, columns = ((torch.arange(32) - place) // 9 == 0 for place in torch.randint(2, 20, (2, 64, 1)))
    masks = 255 * (rows[:, None, :, None] & columns[:, None, None]).byte()
    images = (masks // 2 + torch.randint(100, masks.shape)).expand(-1, 3, -1, -1)
    model = u2net.U2Net(((3, 4, 8),) + ((8, 4, 8),) * 5 + ((16, 4, 8),) * 5)
    miniature.train_saliency(model, images[:48], masks[:48], 80)
    with torch.no_grad():
        found = model(u2net.normalise(images[48:].float() / 255))
    assert evaluate.mask_iou(found, masks[48:] / 255) > 0.7


def test_the_miniature_is_made_trained_and_tabulated(tmp_path, monkeypatch, few_images):
    seen, train, judge, change = [], miniature.train_saliency, classify.table1_row, monkeypatch.setattr
    change(miniature, "GENERATOR", ((8, 8),) * 6)
    change(miniature, "DRAWS", dict.fromkeys(miniature.DRAWS, 20))
    change(miniature, "measure_statistics", partial(miniature.measure_statistics, batches=1))
    change(miniature, "train_saliency", lambda *a, **how: seen.append(a[2]) or train(*a, **how))
    change(classify, "table1_row", lambda *a: seen.append(a[3]) or judge(*a))
    change(cgn, "PRESETS", {"mini": {**cgn.PRESETS["mini"], "accumulate": 4, "batch": 4}})
    change(cgn, "WEIGHTS", tmp_path / "weights")
    change(biggan, "find_weights", Path)
    (tmp_path / "weights.txt").touch()

    def mini(*what):
        runs = () if "patches" in what else ("--runs", tmp_path / "runs")
        result = script("miniature.py", *what, "--steps", 2, *runs)
        rows = [row.split(" | ") for row in result.stdout.splitlines() if row.startswith("| ")]
        return result, {row[0][2:]: row[1:] for row in rows[1:]}

    one_line(mini("tables34")[0], "python miniature.py table1 makes it")
    one_line(mini("table1", "--out", tmp_path)[0], "--out means nothing for table1")
    mini("teacher", "saliency", "style", "classifier", "--bf16", "--out", tmp_path / "weights")
    bare = seen.pop().flatten(1).amax(dim=1) == 0
    assert bare.nonzero().flatten().tolist() == list(range(0, 200, 5))
    assert list(mini("table1")[1]) == ["all", *(f"without {name}" for name in cgn.WITHOUT)]
    assert seen == [1] * 5                                  # other draws than the training
    assert list(mini("tables34")[1])[::5] == ["real", "real+CGN/shape + texture"]
    shares = [float(row[0].split()[0]) for row in mini("patches")[1].values()]
    assert shares[3] > shares[2] + 10 and min(shares[0], shares[1], shares[3]) > 95


def test_the_miniatures_ensemble_learns_recombined_parts(monkeypatch, tmp_path):
    y = torch.arange(40) % 10
    m = 255 * (torch.arange(32) < 3 * y[:, None, None, None] + 1).byte().expand(-1, 1, 32, -1)
    f, b = ((20 * y + start).byte()[:, None, None, None].expand(-1, 3, 32, 32) for start in (0, 10))
    seen, made = [], ([m, f, b], torch.stack([y] * 3))
    monkeypatch.setattr(classify, "train_ensemble", lambda *given: seen.extend(next(given[3](5))))
    miniature.train_ensemble({"seed": 0}, mnist_variants.Variant(f, y, y, y), made, tmp_path)
    x, labels = (255 * seen[0][:, 0, 0]).round().long(), seen[1]
    assert len(x) == 60 and len(labels.unique(dim=0)) > 50
    read = torch.stack([((x == x[:, :1]).sum(dim=1) - 1) // 3, x[:, 0] // 20, x[:, -1] // 20], dim=1)
    assert torch.equal(read, labels)


def test_digits_of_the_shipped_teacher_are_read_and_found(few_images):
    teacher, saliency, classifier = (load(cgn.find_network(f"mini-{name}.pth")) for load, name in (
        (biggan.load, "teacher"), (u2net.load, "saliency"), (classify.read_classifier, "classifier")))
    y, (parts, _) = torch.arange(200) % 10, mnist_variants.load_parts("wildlife", "val")
    x = teacher(biggan.truncated_noise(200, teacher.noise, seed=0), y)
    m, bare = (saliency(u2net.normalise(part)) for part in ((x + 1) / 2, parts.background / 255))
    assert evaluate.accuracy(classifier(x).argmax(dim=1), y) >= 0.85 and bare.mean() < 1e-3
    assert cgn.binary_entropy(m) < 0.25 and 0.1 < m.mean() < 0.4


# ------------------------------------------------------------------------------------------------ the project

@beside
def test_runs_killed_at_twenty_random_moments_end_as_if_they_had_not_been(tmp_path):
    """All processes of a run are killed at random moments; it is continued and compared with one left alone.
    This process has one thread, so that it may be forked."""
    generator, meetings = np.random.default_rng(0), itertools.count()
    saliency, path = random_u2net(TINY).state_dict(), tmp_path / "saliency.pt"
    torch.save(saliency, path)
    states = raw_biggan([(16, 16)] * 6, 2, classes=10), saliency, cgn.random_networks()[2]
    imagenet_run(states, tmp_path / "made", steps=1, accumulate=1, saliency=str(path))
    made = cgn.load(tmp_path / "made" / "checkpoint.pt")

    def data_set(out):
        cgn.write_counterfactuals(made, out, 40, 1, per_shape=2, at_once=2)

    runs = {"mnist": (4, 1, lambda out: cgn.train(tiny_config(steps=4, saves=(1,)), *tiny_data(), out)),
            "imagenet": (4, 1, lambda out: imagenet_run(states, out, accumulate=1)),
            "imagenet, two ranks": (3, 2, lambda out: imagenet_run(states, out, accumulate=2)),
            "data set": (3, 1, data_set), "data set, two ranks": (3, 2, data_set),
            "classifier": (3, 1, tiny_ensemble)}

    def start(kind, out):
        _, ranks, work = runs[kind]
        meeting, children = f"file://{tmp_path}/meeting{next(meetings)}", []
        for rank in range(ranks):
            children.append(os.fork())
            if children[-1] == 0:
                code = 1
                try:
                    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks))
                    if "imagenet, two" in kind:
                        torch.distributed.init_process_group("gloo", meeting, rank=rank, world_size=ranks)
                    work(out)
                    code = 0
                finally:
                    os._exit(code)
        return children

    def codes(children):
        return {os.waitpid(child, 0)[1] for child in children}

    for kind, (kills, *_) in runs.items():
        began = time.time()
        assert codes(start(kind, tmp_path / kind)) == {0}
        seconds = time.time() - began
        for number in range(kills):
            out = tmp_path / f"{kind} {number}"
            children = start(kind, out)
            time.sleep(generator.uniform(0, seconds))
            for child in children:
                os.kill(child, signal.SIGKILL)
            codes(children)
            for path in out.glob("*.partial"):              # what a killed process was writing
                path.unlink()
            assert codes(start(kind, out)) == {0}
            assert run_result(out) == run_result(tmp_path / kind), (kind, number)
        print(f"{kind}: {kills} kills in runs of {seconds:.1f} s")


def tiny_ensemble(out):
    """20 steps of the ensemble's training on random pictures."""
    def batches(seed):
        def draws(first):
            for step in itertools.count(first):
                generator = torch.Generator().manual_seed(1000 * seed + step)
                labels = torch.randint(10, (4, 3)[:seed], generator=generator)
                yield torch.rand(4, 3, 32, 32, generator=generator), labels
        return draws

    torch.manual_seed(0)
    config = {"seed": 0, "steps": 20, "lr": 0.01, "momentum": 0.9, "weight_decay": 0.0, "decay": 0.1,
              "milestones": [9], "bf16": False, "smoothing": 0.0, "log_every": 1, "saves": [1]}
    classify.train_ensemble(config, classify.Ensemble(classify.Classifier()), batches(1), batches(2), out)


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


def files_and_readers(folder, generator):
    """Writes a file of each kind; (name, reader, share of the damaged files) of each."""
    def continued(path):
        shutil.copy(folder / "checkpoint.pt", path.parent)
        with run.Run(path.parent, config, {}):
            pass

    picture = Image.fromarray(generator.integers(256, size=(40, 48, 3), dtype=np.uint8))
    state, config = raw_biggan([(8, 8), (8, 8)], None, 2, 4, 4), tiny_config()
    small = random_u2net(((3, 2, 2),) + ((2, 2, 2),) * 5 + ((4, 2, 2),) * 5)
    tensors = {
        "new.pt": (state, biggan.load, 8), "old.pt": (state, biggan.load, 8),
        "u2net.pt": (small.state_dict(), u2net.load, 1),
        "checkpoint.pt": ({"config": config, "step": 3, "average": {"a": torch.ones(5)}}, cgn.load, 12),
        "classifier.pt": (classify.Classifier().state_dict(), classify.read_classifier, 4),
        "style.pt": (cgn.random_networks()[2],
                     lambda path: cgn.StyleFeatures(run.read_checkpoint(path, other=True)), 4)}
    for name, (state, *_) in tensors.items():
        torch.save(state, folder / name, _use_new_zipfile_serialization=name != "old.pt")
    texts = {
        "predictions.csv": ("label,prediction\n1,2\n3,3\n",
                            lambda path: evaluate.judge_imagenet(evaluate.read_table(path))),
        "labels.csv": ("file,seed,u,shape,texture,background\n"
                       "00000000.png,1,0,3,4,5\n00000001.png,1,1,0,9,2\n",
                       lambda path: mnist_variants.labelled_files(path.parent)),
        "log.jsonl": (f"{json.dumps(config)}\n"
                      '{"step": 1, "binary": 0.5}\n{"step": 2, "binary": 0.25}\n', continued),
        "results.jsonl": ('{"dataset": "colored", "test": 0.9684}\n{"dataset": "wildlife"}\n',
                          run.read_lines)}
    for name, (text, _) in texts.items():
        (folder / name).write_text(text)
    pictures = [f"photo.{suffix}" for suffix in ("png", "jpg", "gif", "tif", "bmp", "webp")]
    for name in pictures:
        picture.save(folder / name)
    labels = "t10k-labels-idx1-ubyte.gz"
    shutil.copy(HERE / "data" / "mnist" / labels, folder)
    return [*((name, reader, share) for name, (_, reader, share) in tensors.items()),
            ("checkpoint.pt", classify.load_ensemble, 6),
            (labels, lambda path: mnist_variants._read_idx(path.parent, path.stem), 4),
            *((name, u2net.open_photo, 8) for name in pictures),
            *((name, reader, 8) for name, (_, reader) in texts.items())]


@beside
def test_ten_thousand_damaged_files_are_read_or_refused(tmp_path):
    """For all readers: each is read, or refused with ValueError, in ten seconds and 2 GiB."""
    def late(*_):
        raise TimeoutError("ten seconds")

    count, outcomes, generator = 10_000, {"read": 0, "refused": 0}, np.random.default_rng(0)
    readers = files_and_readers(tmp_path, generator)
    total = sum(share for *_, share in readers)
    signal.signal(signal.SIGALRM, late)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name, reader, share in readers:
        whole, place = (tmp_path / name).read_bytes(), tmp_path / "damaged" / name
        for number in range(-(-count * share // total)):
            shutil.rmtree(place.parent, ignore_errors=True)
            place.parent.mkdir()
            place.write_bytes(mutate(whole, generator))
            signal.alarm(10)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    reader(place)
                outcomes["read"] += 1
            except ValueError:
                outcomes["refused"] += 1
            except BaseException as error:
                shutil.copy(place, tmp_path / "culprit")
                raise AssertionError(f"{name} number {number}: {type(error).__name__}: {error}") from error
            finally:
                signal.alarm(0)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2 ** 20
    print(outcomes)
    assert grown < 2, f"{grown} GiB"
    assert sum(outcomes.values()) >= count and min(outcomes.values()) > 1000


GROUND = {
    "mnist_variants.py": "import mnist_variants as m; print(m.draw_textures().shape)",
    "evaluate.py": "import evaluate, torch; print(evaluate.accuracy(torch.tensor([1]), torch.tensor([1])))",
    "biggan.py": "import biggan; biggan.main(['--dry-run', '--classes', '0,ostrich'])",
    "u2net.py": "import u2net, torch; u2net.load(u2net.U2Net().state_dict())(torch.zeros(1, 3, 32, 32))",
    "run.py": "import run; print(run.find_device())"}


@pytest.mark.parametrize("module", GROUND)
def test_a_ground_floor_file_works_when_copied_alone(tmp_path, module):
    shutil.copy(HERE / module, tmp_path)
    result = process("-W", "error", "-c", GROUND[module], cwd=tmp_path)
    assert result.returncode == 0, result.stderr


def test_imports_run_one_way():
    """At any depth: no circle, evaluate knows nothing of ours, cgn nothing of classify."""
    ground = {"run", "biggan", "u2net", "mnist_variants"}
    below = {*ground, "evaluate", "cgn"}
    allowed = {**dict.fromkeys(below, set()), "mnist_variants": {"u2net"}, "cgn": ground, "classify": below,
               "miniature": {*below, "classify"}}
    for room, rooms in allowed.items():
        text = (HERE / f"{room}.py").read_text()
        found = {*re.findall(r"^\s*(?:import|from) (\w+)", text, re.M)} & {*allowed}
        assert found <= rooms and (found == rooms or room in ("classify", "miniature")), (room, found)


@pytest.mark.parametrize("options", ["colored", "wildlife --set shuffle=puzzle", "imagenet",
                                     "double-colored --model gan"])
def test_dry_runs_pass_anywhere_and_keep_nothing(options, tmp_path, monkeypatch, few_images):
    monkeypatch.chdir(tmp_path)
    result = script("cgn.py", "--dataset", *options.split(), "--dry-run")
    assert result.returncode == 0 and "dry run finished" in result.stdout, result.stderr
    assert list(tmp_path.iterdir()) == []


@beside
def test_a_dry_run_works_in_three_processes():
    result = process(*torchrun(3, 29541), "cgn.py", "--dataset", "imagenet", "--dry-run", "--device", "cpu")
    assert result.returncode == 0 and "dry run finished" in result.stdout, result.stderr


@beside
def test_the_measurements_of_a_gpu_pass_as_a_dry_run(tmp_path):
    environment = {**os.environ, "OUT": str(tmp_path)}
    result = process("test_cgn.py", "gpu", "--dry-run", env=environment, timeout=800)
    table = result.stdout.partition("| measured |\n|---|---|\n")[2]
    assert result.returncode == 0 and table and "failed" not in table, result


def test_every_documented_command_is_understood():
    """Each `python X.py ..` and `torchrun .. X.py ..` has options and choices that its parser knows."""
    pattern = re.compile(r"^(?:\w+=\S+ )*(?:python|torchrun [^\n]*?) ?(\w+)\.py ?([^\n#]*)", re.M)
    text = "\n".join(path.read_text() for path in (HERE / "README.md", *(HERE / "docs").glob("*.md")))
    commands = [found for block in re.findall(r"```sh\n(.*?)```", text, re.S)
                for found in pattern.findall(block) if found[0] != "test_cgn"]
    assert len(commands) >= 20
    for module, arguments in commands:
        sys.modules[module].build_parser().parse_args(shlex.split(arguments))


def test_the_documented_python_saves_a_picture(tmp_path, monkeypatch):
    (tmp_path / "weights").symlink_to(HERE / "weights")
    monkeypatch.chdir(tmp_path)
    for block in re.findall(r"```py\n(.*?)```", (HERE / "README.md").read_text(), re.S):
        exec(block, {})
    assert list(tmp_path.glob("*.png"))


@pytest.mark.parametrize("name, resolution", [("cgn-colored.pth", 32), ("cgn-mini.pth", 32)])
def test_the_shipped_generators_are_the_listed_ones_and_draw(name, resolution, tmp_path):
    rows = [line.split(" | ") for line in (HERE / "weights.txt").read_text().splitlines()]
    listed = {row[0]: row[2] for row in rows if len(row) == 6}
    model = cgn.load(HERE / "weights" / name)
    assert listed[name] == model.sha256 and model.resolution == resolution
    assert (HERE / "weights" / name).stat().st_size < {"cgn-colored.pth": 2e6, "cgn-mini.pth": 10e6}[name]
    sample, _ = cgn.counterfactual_batch(model, 1, range(200), per_shape=1)
    means = sample.mask.mean(dim=(1, 2, 3))
    assert 0.05 < means.mean() < 0.4 and means.std() > 0.005
    assert cgn.binary_entropy(sample.mask) < 0.2                            # nearly binary


def test_lines_are_short_and_nothing_is_named_that_is_not_there():
    """What is named: tests at the head of this file, tests and parts of modules in docs/differences.md."""
    long = [f"{path.name}:{number}" for path in HERE.glob("*.py")
            for number, line in enumerate(path.read_text().splitlines(), 1) if len(line) > 110]
    assert not long, long
    index, tests = (HERE / "docs" / "differences.md").read_text(), (HERE / "test_cgn.py").read_text()
    indexed, promised = re.findall(r"`(test_\w+)`", index), re.findall(r"test_\w+", tests.split('"""')[1])
    missing = {*indexed, *promised} - {"test_cgn", *re.findall(r"^def (test_\w+)", tests, re.M)}
    assert indexed and promised and not missing, missing
    for module, name in re.findall(r"`(cgn|classify|evaluate|biggan|u2net|mnist_variants|run)\.(\w+)", index):
        assert name == "py" or hasattr(sys.modules[module], name), (module, name)


# ------------------------------------------------------------------- measurements at full size: no tests

def full_size(folder, tiny=False):
    """Random weights of the released sizes in `folder`, under their released names; tiny ones for a trial."""
    names = [cgn.PRESETS["imagenet"][name] for name in ("teacher", "saliency", "style")]
    paths = [Path(folder) / name for name in (*names, "shape.pth", "text.pth", "bg.pth")]
    if not paths[-1].exists():
        blocks, attention = ([(16, 16)] * 6, 2) if tiny else (RELEASED, 8)
        for seed, path in enumerate((paths[0], *paths[3:])):
            torch.save(raw_biggan(blocks, attention, 1000, 128, 128, seed), path)
        torch.save(random_u2net(TINY if tiny else u2net.FULL).state_dict(), paths[1])
        vgg, widths = torch.nn.Module(), (4,) * 4 if tiny else (64, 128, 256, 512)
        layout = [layer for count, width in zip((2, 2, 3, 3), widths) for layer in [width] * count + ["M"]]
        vgg.features = cgn.make_layers(layout, batch_norm=True)
        torch.save(vgg.state_dict(), paths[2])
    return paths


def peak_memory():
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20:.2f} GiB"


class FullSize:
    """The ImageNet CGN at full size with random weights, and what its micro-step takes."""

    def __init__(self, paths, device="cpu", frozen=False, tiny=False):
        self.paths, self.device, self.frozen, saliency = paths, device, frozen, u2net.load(paths[1])
        mechanisms = (biggan.load(path, frozen=frozen) for path in paths[3:])
        self.model = cgn.ImagenetCGN(*mechanisms, saliency).to(device)
        self.teacher = biggan.load(paths[0]).to(device)
        self.style = cgn.StyleFeatures(torch.load(paths[2])).to(device)
        self.config = {**cgn.PRESETS["imagenet"], "patch": 5 if tiny else 15}

    def step(self, count=1, bf16=False):
        """A function that runs one micro-step of `count` images."""
        drawn = [tensor.to(self.device) for tensor in cgn.draw_training(self.model, 0, range(count))]
        config = {**self.config, "bf16": bf16}
        return lambda: cgn.micro_step(self.model, self.teacher, self.style, *drawn, config)

    def clock(self, work, times=3, warm=1):
        """Seconds of work(), the best of some, with the spectral norms held."""
        seconds = []
        with contextlib.nullcontext() if self.frozen else cgn.norms_held(self.model):
            for _ in range(warm + times):
                started = time.time()
                work()
                if self.device != "cpu":
                    torch.cuda.synchronize()
                seconds.append(time.time() - started)
        self.model.zero_grad()
        return min(seconds[warm:])

    def measure_image(self):
        cgn.counterfactual_batch(self.model, 0, range(1))
        print(f"peak memory of one counterfactual image: {peak_memory()}")

    def measure_memory(self):
        optimizer = torch.optim.Adam(self.model.parameters(), 1e-5)
        for _ in range(2):
            with cgn.norms_held(self.model):
                self.step()()
            optimizer.step()
            optimizer.zero_grad()
        print(f"peak memory of two micro-steps around an optimiser step: {peak_memory()}")

    def measure_draw(self):
        raw = [*map(torch.load, self.paths[3:])]
        saliency = u2net.load(self.paths[1], frozen=False).eval()

        @torch.no_grad()
        def plain(count):
            for index in range(count):
                z, y, _ = cgn.draw(self.model, 0, range(index, index + 1))
                x = [plain_biggan(raw[k], z[k], y[k], 50) for k in range(3)]
                cgn.compose(saliency(u2net.normalise((x[0] + 1) / 2)), x[1], x[2])

        def ours(count, kind):
            with torch.autocast("cpu", torch.bfloat16, enabled=kind == "bfloat16"):
                cgn.counterfactual_batch(self.model, 0, range(count), per_shape=count)

        for count in (1, 10):
            line = self.clock(lambda: plain(count), 2, 0)
            text = f"{count} counterfactuals of a shape: straight line {line:.2f} s"
            for kind in self.kinds:
                best = self.clock(lambda: ours(count, kind), 2, 0)
                text += f", {kind} {best:.2f} s: {best / line:.2f}"
            print(text)

    def measure_parts(self):
        model, (u, y, draws) = self.model, cgn.draw_training(self.model, 0, range(1))
        with torch.no_grad():
            x_gt = self.teacher(u, y)
        leaves = [part.detach().requires_grad_() for part in model(u, y)[:3]]
        mechanisms = model.f_shape, model.f_text, model.f_bg

        def term(name):
            losses = cgn.imagenet_losses(model, *leaves, x_gt, self.style, draws, terms=(name,))
            return lambda: next(losses)[1].backward()

        work = {"teacher, forward": torch.no_grad()(lambda: self.teacher(u, y)),
                "three mechanisms": lambda: sum(part(u, y).sum() for part in mechanisms).backward(),
                "U-2-Net of the mask": lambda: model.saliency(leaves[1]).sum().backward()}
        for name in (*work, *cgn.TERMS):
            with FlopCounterMode(display=False) as flops:
                self.clock(work.get(name) or term(name), 1, 0)
            seconds = min(self.clock(work.get(name) or term(name), 1, 0) for _ in range(2))
            billions = flops.get_total_flops() / 1e9
            print(f"{name}: {seconds:.2f} s, {billions:.0f} GFLOP, {billions / seconds:.0f} GFLOP/s")

    def measure_step(self):
        model, (u, y, draws) = self.model, cgn.draw_training(self.model, 0, range(1))
        states = [*map(torch.load, self.paths)]
        for mechanism, state in zip((model.f_shape, model.f_text, model.f_bg), states[3:]):
            for name, _ in mechanism.named_parameters():
                state[name].requires_grad_()

        def straight():
            terms = straight_line_terms(states[:3], states[3:], u, y, draws, 15)
            sum(self.config[name] * term for name, term in terms.items()).backward()

        line = self.clock(straight, 3, 0)
        print(f"micro-step, straight line: {line:.2f} s")
        for kind in self.kinds:
            best = self.clock(self.step(bf16=kind == "bfloat16"), 3, 0)
            rate = cgn.matrix_rate("cpu", getattr(torch, kind), 2048) / 1e9
            print(f"micro-step, {kind}: {best:.2f} s: {best / line:.2f}; matrix product {rate:.0f} GFLOP/s")


def measure(what, folder):
    """`python test_cgn.py step | parts | memory | draw | image [FOLDER]`: on a CPU; the random weights stay
    in FOLDER. 5 minutes and 12 GB at most."""
    full = FullSize(full_size(folder), frozen=what in ("draw", "image"))
    full.kinds = ("float32", "bfloat16") if run.bf16_pays(True, "cpu") else ("float32",)
    getattr(full, f"measure_{what}")()


class Gpu:
    """`python test_cgn.py gpu [--dry-run]`: what a GPU does, as one Markdown table and gpu.json; 6 minutes at
    most on a large one, with nothing but this folder and no network. --dry-run: tiny, on the CPU."""

    def __init__(self, tiny, folder):
        self.tiny, self.folder, self.rows, self.started = tiny, Path(folder), [], time.time()
        self.out = Path(os.environ.get("OUT", folder))
        self.device = "cpu" if tiny else "cuda"
        self.name = "cpu" if tiny else torch.cuda.get_device_name(0)

    def seconds(self):
        return time.time() - self.started

    def row(self, what, value):
        self.rows.append({"what": what, "value": value, "at": round(self.seconds())})
        print(f"[{self.rows[-1]['at']} s] {what}: {value}", flush=True)
        (self.out / "gpu.json").write_text(json.dumps(self.rows))

    def all(self):
        for part in (self.micro_steps, self.counterfactuals, self.ensemble, self.digits_begin, self.agreement,
                     self.stopped, self.bare, self.digits_end):
            try:
                part()
            except Exception as error:                          # one that fails leaves the others
                self.row(part.__name__, f"failed: {type(error).__name__}: {error}"[:300])
        print(f"\n| what, on {self.name}, torch {torch.__version__} | measured |\n|---|---|")
        for row in self.rows:
            print(f"| {row['what']} | {row['value']} |")

    def tf32(self, on):
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = on

    def micro_steps(self):
        rate = cgn.matrix_rate(self.device, side=256 if self.tiny else 8192)
        self.row("matrix product of 8192 x 8192, bfloat16", f"{rate / 1e12:.1f} TFLOP/s")
        self.paths = full_size(self.folder, self.tiny)
        self.row("random weights of the released sizes are made", f"{self.seconds():.0f} s")
        full = self.full = FullSize(self.paths, self.device, tiny=self.tiny)
        with FlopCounterMode(display=False) as flops:
            full.clock(full.step(), 1, 0)
        chosen, counts = 2, {1, 2}
        if not self.tiny:
            training = types.SimpleNamespace()
            chosen = cgn.images_at_once(lambda part: full.step(len(part), True)(), full.model, 4000, training)
            counts = {1, 8, 32, chosen}
        for count, kind in itertools.product(sorted(counts), ("float32", "TF32", "bfloat16")):
            if count > 8 and kind != "bfloat16":
                continue
            self.tf32(kind != "float32")
            if not self.tiny:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            seconds = full.clock(full.step(count, kind == "bfloat16"), 2 if count < 32 else 4)
            memory = 0 if self.tiny else torch.cuda.max_memory_allocated() / 2 ** 30
            share = 100 * flops.get_total_flops() * count / seconds / rate
            self.row(f"micro-step, {count} at once{' (chosen)' if count == chosen else ''}, {kind}",
                     f"{count / seconds:.1f} images/s, {share:.1f} % of the matrix rate, {memory:.1f} GiB")

    def counterfactuals(self):
        frozen = FullSize(self.paths, self.device, frozen=True, tiny=self.tiny)
        for count in (1, 10):
            with torch.autocast(self.device, torch.bfloat16):
                seconds = frozen.clock(lambda: cgn.counterfactual_batch(frozen.model, 0, range(count), count))
            self.row(f"{count} counterfactual{'s' * (count > 1)} of a shape, bfloat16",
                     f"{1000 * seconds:.0f} ms")

    def ensemble(self):
        network = torchvision.models.get_model("resnet18" if self.tiny else "resnet50")
        (count, side), layout = (2, 32) if self.tiny else (256, 224), torch.channels_last
        model = classify.Ensemble(network).to(self.device, memory_format=layout).train()
        optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9)
        x = torch.rand(2 * count, 3, side, side, device=self.device).contiguous(memory_format=layout)
        y, labels = (torch.randint(1000, shape, device=self.device) for shape in ((count,), (count, 3)))

        def step(bf16):
            with torch.autocast(self.device, torch.bfloat16, enabled=bf16):
                scores = model(u2net.normalise(x)).float()
            optimizer.zero_grad()
            classify.ensemble_loss(scores[:count], y, scores[count:], labels).backward()
            optimizer.step()

        for bf16, kind in ((False, "TF32"), (True, "bfloat16")):
            seconds = self.full.clock(lambda: step(bf16), 3, 2)
            self.row(f"the ensemble's step, {count} + {count} images, {kind}",
                     f"{seconds:.3f} s, {2 * count / seconds:.0f} images/s")

    def agreement(self):
        """With the CPU in float32: networks at full size, a step of each training; then other precisions."""
        self.tf32(False)
        z, y = torch.randn(1, 128, generator=torch.Generator().manual_seed(0)), torch.tensor([3])
        with torch.no_grad():
            x = biggan.load(self.paths[0])(z, y)
            m = u2net.load(self.paths[1])(u2net.normalise((x + 1) / 2))
            there = self.full.teacher(z.to(self.device), y.to(self.device))
            found = self.full.model.saliency(x.to(self.device))
        self.row("BigGAN, U-2-Net at full size against the CPU, largest difference (must be < 0.002)",
                 " ".join(f"{(a.cpu() - b).abs().max():.1e}" for a, b in ((there, x), (found, m))))
        logs = []
        for device in ("cpu", self.device):
            out = self.folder / f"digits-{device}"
            cgn.train(tiny_config(steps=2, batch=32), *tiny_data(), out, device)
            logs.append(run.read_lines(out / "log.jsonl")[1])
        worst = max(abs(logs[0][name] - logs[1][name]) / (abs(logs[0][name]) + 1e-2)
                    for name in ("discriminator", "adversarial", "mask_mean", "color"))
        self.row("a step of digits against the CPU, relative (must be < 0.01)", f"{worst:.1e}")
        terms, gradient = self.miniature_step("cpu", "float32")
        for kind in ("float32", "TF32", "bfloat16"):
            there, slope = self.miniature_step(self.device, kind)
            worst = {name: abs(there[name] / value - 1) for name, value in terms.items() if value > 1e-6}
            name, angle = max(worst, key=worst.get), F.cosine_similarity(slope, gradient, dim=0)
            self.row(f"the miniature's micro-step in {kind} against the CPU: largest relative difference of "
                     "a term; cosine of the gradients", f"{100 * worst[name]:.2f} % ({name}); {angle:.4f}")
        self.tf32(True)

    def miniature_step(self, device, kind):
        """Terms and gradient of a CGN that has learned something: the shipped one, or a disturbed teacher."""
        self.tf32(kind != "float32")
        teacher, saliency, style = (run.read_checkpoint(HERE / "weights" / f"mini-{name}.pth", other=True)
                                    for name in ("teacher", "saliency", "style"))
        model = cgn.ImagenetCGN(*(biggan.load(teacher, frozen=False) for _ in range(3)), u2net.load(saliency))
        shipped, generator = HERE / "weights" / "cgn-mini.pth", torch.Generator().manual_seed(0)
        held = run.read_checkpoint(shipped) if shipped.exists() else None
        for name in ("f_shape", "f_text", "f_bg"):
            if held:
                getattr(model, name).load_state_dict(held[name])
                continue
            for parameter in getattr(model, name).parameters():
                parameter.data.mul_(1 + 0.02 * torch.randn(parameter.shape, generator=generator))
        model.to(device).truncation = 0.7
        drawn = [tensor.to(device) for tensor in cgn.draw_training(model, 0, range(10))]
        with cgn.norms_held(model):
            networks = biggan.load(teacher).to(device), cgn.StyleFeatures(style).to(device)
            config = {**cgn.PRESETS["mini"], "bf16": kind == "bfloat16"}
            terms = cgn.micro_step(model, *networks, *drawn, config)
        gradients = [p.grad.flatten().cpu() for p in model.parameters() if p.grad is not None]
        return {name: value.item() for name, value in terms.items()}, torch.cat(gradients)

    def stopped(self):
        """Two updates of the miniature, in one go and stopped in between; a GPU's sums differ at times."""
        check = run.Run.check

        def train(name):
            return script("cgn.py", "--dataset", "imagenet", "--mini", "--steps", 2, "--device", self.device,
                          "--out", self.folder / name)

        def press(training, *arguments):
            if training.step == 0:
                signal.raise_signal(signal.SIGTERM)
            return check(training, *arguments)

        ended = [train("whole")]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run.Run, "check", press)
            ended.append(train("parts"))
        ended.append(train("parts"))
        assert [each.returncode for each in ended] == [0, 130, 0], ended
        a, b = (run.read_lines(self.folder / name / "log.jsonl")[-1] for name in ("whole", "parts"))
        worst = max(abs(a[key] - b[key]) / abs(a[key]) for key in cgn.TERMS if a[key])
        self.row("a run stopped by SIGTERM and continued, against one in one go: largest relative difference "
                 "of a term of the last update", f"{100 * worst:.2f} %")

    def bare(self):
        """The command of the README in a copied folder, for two minutes."""
        place, listed, lines = self.folder / "copy", "", []
        (place / "weights").mkdir(parents=True)
        for path in HERE.glob("*.py"):
            shutil.copy(path, place)
        for path in self.paths[:3]:
            size, digest = path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()
            listed += f"{path.name} | {size} | {digest} | - | - | cgn.py\n"
            shutil.move(path, place / "weights")
        (place / "weights.txt").write_text(listed)
        self.full = None
        torch.cuda.empty_cache()
        command = [sys.executable, "-u", "cgn.py", "--dataset", "imagenet", "--short"]
        command += ["--steps", "2", "--set", "accumulate=2", "patch=5"] if self.tiny else []
        started = time.time()
        training = subprocess.Popen(command, cwd=place, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                    text=True)
        timer = threading.Timer(85, training.terminate)
        timer.start()
        for line in training.stdout:
            lines.append(line.strip())
            print("   ", line.rstrip(), flush=True)
            if line.startswith("step 0:"):
                self.row("`python cgn.py --dataset imagenet --short`: first sheet after",
                         f"{time.time() - started:.0f} s")
        timer.cancel()
        code, out = training.wait(), place / "runs" / "imagenet-short"
        rate = [line for line in lines if "images/s" in line][-1]
        self.row("the same, its last progress line", re.sub(r"  (l1|0\.\d+ h|\d+\.\d min).*", "", rate))
        sheets, size = sorted(out.glob("sheet-*.png")), (out / "checkpoint.pt").stat().st_size
        self.row("the same, ended by SIGTERM after two minutes: exit code, sheets, checkpoint",
                 f"{code}, {len(sheets)}, {size / 1e9:.2f} GB")
        shutil.copy(sheets[-1], self.out / "gpu-sheet.png")

    def digits_begin(self):
        """CGNs of colored and double-colored MNIST, in processes of their own beside all that follows."""
        self.digits = {}
        for name in ("colored", "double-colored"):
            command = [sys.executable, "cgn.py", "--dataset", name, "--bf16", "--device", self.device,
                       "--out", str(self.folder / name), *(["--steps", "2"] if self.tiny else [])]
            self.digits[name] = subprocess.Popen(command, cwd=HERE, stdout=subprocess.DEVNULL)

    def digits_end(self):
        for name, training in self.digits.items():
            try:
                training.wait(timeout=max(5, 350 - self.seconds()))
            except subprocess.TimeoutExpired:
                training.terminate()
                training.wait()
            folder = self.folder / name
            row = run.read_lines(folder / "log.jsonl")[-1]
            cgn.save_generator(folder / "checkpoint.pt", self.out / f"cgn-{name}.pth")
            shutil.copy(sorted(folder.glob("sheet-*.png"))[-1], self.out / f"gpu-{name}.png")
            self.row(f"the CGN of {name} MNIST, beside the rows above",
                     f"{row['steps_per_second']} steps/s, {row['step']} steps")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        what, *more = sys.argv[1:] or [""]
        if what == "gpu":
            Gpu("--dry-run" in more, temporary).all()
        elif hasattr(FullSize, f"measure_{what}"):
            measure(what, more[0] if more else temporary)
        else:
            print(measure.__doc__, Gpu.__doc__, sep="\n")
