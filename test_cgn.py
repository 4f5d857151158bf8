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
import http.server
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


@pytest.mark.parametrize("split, agreement, expected", [
    ("train", None, (1, 1)), ("val", None, (0.1, 0.1)), ("test", None, (0.1, 0.1)), ("val", 0.9, (0.9, 0.9)),
    ("val", mv.CUE_CONFLICT, (0, 0.1)), ("val", mv.MIXED_SAME, (1, 1)), ("test", mv.MIXED_RAND, (1, 0.1))])
def test_labels_agree_as_often_as_asked_and_the_rest_is_uniform(split, agreement, expected):
    _, (shape, *labels) = mv.load_parts("double-colored", split, agreement)
    digits = mv.read_mnist(split != "test")[1]
    assert torch.equal(shape, {"train": digits[:50_000], "val": digits[50_000:], "test": digits}[split])
    fore, back = (label == shape for label in labels)
    found = [agrees.double().mean().item() for agrees in (fore, back, fore & back)]     # drawn separately
    assert found == pytest.approx((*expected, expected[0] * expected[1]), abs=0.01)
    for label in labels:
        other = (label - shape)[label != shape] % 10
        deviations = other.bincount(minlength=10)[1:] - len(other) / 9
        assert (deviations.abs() <= 4 * (len(other) * 8 / 81) ** 0.5).all()


@pytest.mark.parametrize("name, more", [("colored", {}), ("double-colored", {"variance": 0.0001})])
def test_images_are_a_function_of_the_seed_a_digit_in_its_class_color(name, more):
    (mask, fore, back), (_, label, behind) = mv.load_parts(name, "val", seed=1, **more)
    grey = F.interpolate(mv.read_mnist(True)[0][50_000:, None], size=32)
    assert torch.equal(mask, grey if name == "colored" else (grey > 25).byte() * 255)
    assert torch.equal(mv.load(name, "val", seed=1, **more).images, mv.compose(mask, fore, back))
    assert label[:10].tolist() == [8, 2, 1, 2, 0, 0, 4, 8, 5, 5]            # stored
    fore, back = fore.double().flatten(1), back.double().flatten(1)
    if name == "colored":
        assert (back == 0).all() and (behind == -1).all()
        assert fore.min() == 0 and fore[label == 7, 0].min() > 60           # red 250, clipped at 255
    else:
        assert (back - mv.DOUBLE_BACKGROUND[behind]).abs().max() < 15
    for digit, mean in enumerate(mv.COLORED if name == "colored" else mv.DOUBLE_BACKGROUND.roll(4, 0)):
        for channel in torch.nonzero((mean > 100) & (mean < 155)):      # clipping leaves them alone
            found = fore[label == digit, channel] / 255
            assert abs(found.mean() - mean[channel] / 255) < 0.02
            assert found.var() == pytest.approx(more.get("variance", 0.02), rel=0.2)


def test_parts_are_composed_by_hand():
    mask, fore, back = torch.arange(256).byte(), torch.tensor(200).byte(), torch.tensor(30).byte()
    assert mv.compose(mask, fore, back).tolist() == [round(30 + 170 * m / 255) for m in range(256)]
    assert mv.compose(mask[[0, 255]], fore, back).tolist() == [30, 200]


def test_wildlife_shows_random_patches_of_its_labels_textures(monkeypatch):
    place = torch.arange(156).expand(20, 156, 156)
    textures = torch.stack([place.mT, place, torch.arange(20)[:, None, None].expand(place.shape)], dim=1)
    monkeypatch.setattr(mv, "draw_textures", lambda: textures.byte().unflatten(0, (2, 10)))
    (_, *patches), (_, fore, back) = mv.load_parts("wildlife", "val")
    for patch, label in zip(patches, (fore, back + 10)):
        rows, columns, texture = patch.long().unbind(1)
        assert (texture == label[:, None, None]).all()
        top, left = rows[:, 0, 0], columns[:, 0, 0]
        assert (rows == top[:, None, None] + torch.arange(32)[:, None]).all()
        assert (columns == left[:, None, None] + torch.arange(32)).all()
        corners = torch.stack([top, left]).double()
        assert (corners.amin(1) == 0).all() and (corners.amax(1) == 156 - 32).all()
        assert abs(corners.corrcoef()[0, 1]) < 0.05


def test_drawn_textures_are_the_stored_ones():
    stored = torch.tensor([[363, 368, 230, 390, 208, 387, 194, 233, 382, 248],
                           [222, 275, 349, 212, 239, 320, 211, 254, 286, 171]])
    textures = mv.draw_textures().double()
    assert (textures[..., 78, 78].sum(2) - stored).abs().max() <= 3


@needs_dtd
def test_the_papers_textures_are_scaled_padded_and_ordered_by_class():
    textures = mv.read_textures(DTD)
    assert textures.shape == (2, 10, 3, 156, 156)
    with Image.open(DTD / "images" / "veined" / "veined_0073.jpg") as picture:
        expected = np.array(picture.convert("RGB").resize((150, 150), Image.NEAREST))
    assert np.array_equal(textures[1, 2, :, 3:153, 3:153].permute(1, 2, 0).numpy(), expected)
    assert torch.equal(textures[..., 0], textures[..., 6])  # reflected about column 3


def test_a_download_that_fails_is_one_line_leaves_nothing_and_is_tried_again(tmp_path, monkeypatch):
    def fetch(folder, download):
        raw = Path(folder, "MNIST", "raw")
        raw.mkdir(parents=True)         # torchvision leaves it behind
        if fails.pop():
            raise RuntimeError("Error downloading train-images-idx3-ubyte.gz:\n<no network>")
        for path in mv.ROOT.glob("*.gz"):
            shutil.copy(path, raw)

    fails, root = [False, True], tmp_path / "MNIST" / "raw"
    monkeypatch.setattr("torchvision.datasets.MNIST", fetch)
    one_line(mv_main("--mnist", root, "--out", tmp_path), str(root), "no network", "--mnist")
    assert not root.exists()
    assert len(mv.read_mnist(False, root)[1]) == 10_000 and len(list(root.iterdir())) == 4
    assert len(mv.read_mnist(False, tmp_path)[1]) == 10_000     # torchvision's folder


def test_a_damaged_idx_file_is_named_in_one_line(tmp_path):
    images, labels = (f"t10k-{name}-ubyte.gz" for name in ("images-idx3", "labels-idx1"))
    packed = (mv.ROOT / labels).read_bytes()
    altered = gzip.compress(gzip.decompress(packed)[:-1] + b"x")
    shutil.copy(mv.ROOT / images, tmp_path)
    for words, damaged in (("No such file", None), ("gzipped", b"none"), ("ended", packed[:-1000]),
                           ("SHA-256", altered)):
        if damaged:
            (tmp_path / labels).write_bytes(damaged)
        one_line(mv_main("--split", "test", "--mnist", tmp_path, "--out", tmp_path), labels, words)


def test_a_sheet_shows_pictures_unstretched_under_names_without_boxes(tmp_path):
    images = torch.full((2, 3, 3, 4, 4), 100, dtype=torch.uint8)
    mv.save_sheet(tmp_path / "s.png", images, ["café", "日"], ["x", "x", "1 → 9"], scale=2)
    sheet = np.array(Image.open(tmp_path / "s.png"))
    assert (sheet == 100).all(2).sum() >= 6 * 8 * 8 and (sheet < 50).all(2).any()
    mv.save_sheet(tmp_path / "t.png", images, ["cafe", "?"], ["x", "x", "1 -> 9"], scale=2)
    assert (tmp_path / "s.png").read_bytes() == (tmp_path / "t.png").read_bytes()
    for name, rows, words in (("s.png", "a", "1 row and 3 column names"), ("s.jpg", "ab", "s.jpg .* .png")):
        with pytest.raises(ValueError, match=words):
            mv.save_sheet(tmp_path / name, images, rows, "xxy")


def test_a_file_is_written_whole_or_not_at_all_and_by_two_at_once(tmp_path):
    path = tmp_path / "new" / "a.bin"

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
    Image.fromarray(np.full((8, 12), 0x4000, np.uint16)).save(quarter)      # of 16 bits
    Image.new("RGB", (12, 8), "red").save(gas)
    for name in ("._0.png", "Thumbs.db", "00000000-mask.png", "more/00000001-background.png"):
        (tmp_path / "10" / name).write_bytes(b"no picture of the class")
    images, labels, names = mv.load_folder(tmp_path)
    assert names == ["9", "10"] and labels.tolist() == [0, 1]               # as numbers
    assert images.shape == (2, 3, 32, 32) and images[:, :, 0, 0].tolist() == [[63] * 3, [255, 0, 0]]
    assert mv.class_names(tmp_path) == names
    assert mv.labelled_files(tmp_path) == [(str(quarter), (0,)), (str(gas), (1,))]
    (tmp_path / "a").mkdir()
    assert mv.class_folders(tmp_path) == ["10", "9", "a"]
    for folder, words in ((tmp_path, "a holds no picture"), (tmp_path / "a", "no subfolders")):
        with pytest.raises(ValueError, match=words):
            mv.load_folder(folder)


def test_labels_and_class_names_travel_with_counterfactuals(tmp_path):
    table, settings = tmp_path / "labels.csv", tmp_path / "settings.json"
    table.write_bytes(b"\xef\xbb\xbffile,seed,u,shape,texture,background\n00000000.png,0,0,1,2,3\n")
    assert mv.labelled_files(tmp_path) == [(str(tmp_path / "00000000.png"), (1, 2, 3))]
    assert mv.class_names(tmp_path) is None
    settings.write_text('{"names": ["ü", "b"]}', encoding="utf-8")
    assert mv.class_names(tmp_path) == ["ü", "b"]
    settings.write_text("[]")
    with pytest.raises(ValueError, match="settings.json"):
        mv.class_names(tmp_path)
    for row, words in (("../x.png,1,1,1", "not in its"), ("..,1,1,1", "not in its"), ("", "no row"),
                       ("0.png,1,one,1", "'one'"), ("0.png,1", "''"), ("\xff", "utf-8")):
        table.write_bytes(f"file,shape,texture,background\n{row}\n".encode("latin-1"))
        with pytest.raises(ValueError, match=f"labels.csv .*{words}"):
            mv.labelled_files(tmp_path)


def test_mistakes_and_ctrl_c_are_one_line(tmp_path, monkeypatch, few_images):
    mv.write_file(tmp_path / "images" / "striped" / "striped_0001.jpg", b"no picture")
    for words, name, *more in (
            ("double_colored.* double-colored", "double_colored"),
            ("striped_0001.jpg does not open", "wildlife", 1, 0, tmp_path),
            ("variance inf", "colored", 1, 0, None, float("inf")),
            *(("agreement", "colored", pair) for pair in ((-0.1, 1), (1.1, 1), (1, -0.1), (1, 1.1)))):
        with pytest.raises(ValueError, match=words):
            mv.load_parts(name, "val", *more)
    one_line(mv_main("--out", mv.__file__), mv.__file__)
    one_line(mv_main("--seed", -1, "--out", tmp_path), "seed -1")
    monkeypatch.chdir(tmp_path)                                             # MNIST is found beside the file
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="cp1252"))
    mv.main(["--out", "日"])
    assert sorted(path.stem for path in Path("日").iterdir()) == sorted(mv.NAMES)
    data, sheet = mv.load("colored", "train"), np.array(Image.open("日/colored.png"))
    left, top = sheet.shape[1] - 12 * 66, 18 + 9 * 66                       # 32 pixels twice and a gap of two
    first = data.images[data.shape == 9][0].permute(1, 2, 0)                # row 9, column 0
    assert np.array_equal(sheet[top:top + 64:2, left:left + 64:2], first)
    monkeypatch.setattr(mv, "load", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    result = mv_main("--out", tmp_path)
    assert (result.returncode, result.stderr) == (130, "stopped\n")


def test_colors_are_the_published_ones():
    """A colour's place counts: sums of red, green and blue, weighted by 1 .. 10."""
    places = torch.arange(1, 11)
    assert (places @ mnist_variants.COLORED).tolist() == [8694, 7937, 6101]
    assert (places @ mnist_variants.DOUBLE_BACKGROUND).tolist() == [7450, 8214, 8081]


# ---------- evaluate

judge_main = partial(script, "evaluate.py")


def test_metrics_by_hand():
    labels, predictions = torch.tensor([0, 0, 1, 2, 2]), torch.tensor([0, 1, 1, 2, 0])
    assert evaluate.accuracy(predictions, labels) == pytest.approx(0.6)
    assert evaluate.confusion(predictions, labels, 3).tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 1]]
    scores = torch.arange(6.0).expand(5, 6)
    found = [evaluate.top_k_accuracy(scores, labels, *k) for k in ((), (1,), (4,))]
    assert found == pytest.approx([0.6, 0, 0.4])
    assert evaluate.mean_std([1.0, 3.0]) == pytest.approx((2, 2 ** 0.5))
    assert evaluate.mean_std([2.0]) == (2.0, 0.0)
    a = torch.tensor([[1.0, 0.6, 0.0, 0.5], [0, 0, 0, 0], [1, 0, 0, 0]])[:, None, None]
    b = torch.tensor([[1.0, 0.5, 0.8, 0.6], [0, 0, 0, 0], [0, 0, 0, 0]])[:, None, None]
    assert evaluate.mask_iou(a, b) == pytest.approx((1 / 4 + 1 + 0) / 3)


def test_inception_score_by_hand():
    sure, p = torch.eye(5).repeat(21, 1), torch.tensor([[0.5, 0.5], [1.0, 0.0]])
    assert evaluate.inception_score(sure, 1) == pytest.approx((5, 0))       # the class count
    expected = np.exp((0.5 * np.log(0.5 / 0.75) + 0.5 * np.log(0.5 / 0.25) + np.log(1 / 0.75)) / 2)
    assert evaluate.inception_score(p, 1)[0] == pytest.approx(expected)
    assert evaluate.inception_score(p, 2) == pytest.approx((1, 0))
    stored = 3.832251, 0.397233         # of parts of 11 rows and of 10, shuffled: no part is even
    assert evaluate.inception_score(sure) == pytest.approx(stored)


def test_a_decision_is_the_category_of_the_highest_mean():
    probabilities = torch.zeros(1, 1000)
    probabilities[0, 152:200], probabilities[0, 499] = 0.01, 0.006      # 47 of 109 dogs, a knife
    assert evaluate.cue_conflict_decisions(probabilities) == ["knife"]


def test_a_metric_of_nothing_or_of_what_does_not_fit_is_refused():
    two, p = torch.tensor([0, 1]), torch.full((2, 2), 0.5)
    for words, name, *given in (
            (r"\(0,\)", "accuracy", two[:0], two[:0]), (r"labels \(2,\)", "accuracy", two[:1], two),
            (r"\(2, 2\)", "accuracy", p, p), ("1 is not in 0..0", "confusion", two, two, 1),
            ("-1 or", "confusion", two - 1, two, 2), ("the 3 highest of 2", "top_k_accuracy", p, two, 3),
            ("the 0 highest", "top_k_accuracy", p, two, 0), ("no values", "mean_std", []),
            ("3 splits", "inception_score", p, 3), ("0 splits", "inception_score", p, 0),
            (r"\(2,\)", "inception_score", p[0], 1), ("sum to 1", "inception_score", 2 * p, 1),
            ("negative", "inception_score", torch.tensor([[1.5, -0.5]]), 1),
            ("mixed_rand", "bg_gap", {"mixed_same": 1}), ("no row", "judge_imagenet9", []),
            ("undefined", "shape_bias", ["oven"], ["cat"], ["dog"]),
            ("1 decisions for 1 shapes and 0", "shape_bias", ["cat"], ["cat"], [])):
        with pytest.raises(ValueError, match=words):
            getattr(evaluate, name)(*given)


def test_categories_and_imagenet9_have_the_published_sizes():
    sizes = [len(set(indices)) for indices in evaluate.cue_conflict_categories().values()]
    assert sizes == [1, 4, 2, 49, 5, 7, 3, 6, 4, 3, 109, 2, 2, 1, 1, 8]
    classes = evaluate.imagenet9_map()
    held = [[index for index in range(1000) if classes[index] == number] for number in range(9)]
    assert classes.count(-1) == 630
    assert [len(indices) for indices in held] == [116, 52, 42, 36, 35, 27, 26, 20, 16]
    assert [sum(indices) for indices in held] == [24378, 4318, 27917, 1818, 10677, 8451, 15981, 7490, 3558]


@needs_oracles
def test_published_decisions_give_the_published_shape_bias():
    folder = ORACLES / "cue_conflict"
    for files, row in (("*experiment_squeezenet1_1_session-1.csv", "18.22 % | 133 | 597 | 1280"),
                       ("*_train_60_epochs_lr0.001_session-1.csv", "79.02 % | 467 | 124 | 1280"),
                       ("*experiment_alexnet_session_1.csv", "42.94 % | 283 | 376 | 1280"),
                       ("humans/*.csv", "95.87 % | 9236 | 398 | 12800")):  # pooled, with missed answers: na
        result = judge_main("--cue-conflict", *sorted(folder.glob(files)))
        assert f"| object_response | {row} |" in result.stdout, result
    lines = (folder / "categories.txt").read_text().splitlines()
    table = dict(line.split("\t") for line in lines if not line.startswith("#"))
    table = {name: evaluate._indices(text) for name, text in table.items()}
    assert evaluate.cue_conflict_categories() == table


def test_columns_of_a_table_are_judged_one_by_one_and_rows_pooled():
    rows = [{"file": "cat1-dog2.png", "shape": "cat", "texture": "dog"},
            {"file": "cat2-dog1.png", "shape": "na", "texture": "cat"},
            {"imagename": "x/cat3-dog1.png", "shape": "cat"}, {"file": "cat3-dog1.png", "shape": "dog"},
            {"file": "cat1-cat2.png", "shape": "cat"}]                      # agrees: no conflict
    assert evaluate.judge_cue_conflict(rows) == {
        "shape": {"shape bias": 2 / 3, "by shape": 2, "by texture": 1, "images": 5},
        "texture": {"shape bias": 0.5, "by shape": 1, "by texture": 1, "images": 2}}
    rows = [{"shape label": 3, "texture label": "4", "shape": "3 1", "texture": "3 4", "average": "3 4"},
            {"shape label": "5", "texture label": "6", "shape": "4 5", "texture": "5 4", "average": "3 4"}]
    assert evaluate.judge_imagenet(rows) == {"shape": {"samples": 2, "top-1": 0.5, "top-2": 1.0},
                                             "texture": {"samples": 2, "top-1": 0.0, "top-2": 0.5}}
    rows = [{"variation": name, "label": "0", "average": best, "shape": "151 0"} for name, best in
            (("mixed_same", "151 0"), ("mixed_rand", "151 0"), ("mixed_rand", "1 0"))]
    assert evaluate.judge_imagenet9(rows) == {
        "shape": {"mixed_same": 1.0, "mixed_rand": 1.0, "BG-Gap": 0.0},
        "average": {"mixed_same": 1.0, "mixed_rand": 0.5, "BG-Gap": 0.5}}


def test_a_table_is_written_whole_and_read_with_or_without_a_byte_order_mark(tmp_path):
    table, rows = tmp_path / "t.csv", [{"file": 'a "quoted", ü.png', "label": "1", "shape + texture": "1 2"},
                                       {"file": "日.png", "label": "0", "shape + texture": "0 2"}]
    evaluate.write_table(table, rows)
    assert evaluate.read_table(table) == rows
    before = b"\xef\xbb\xbf" + table.read_bytes()
    table.write_bytes(before)
    assert evaluate.read_table(table) == rows
    with pytest.raises(KeyboardInterrupt), evaluate._written(table) as file:
        file.write("half")
        raise KeyboardInterrupt
    assert table.read_bytes() == before and os.listdir(tmp_path) == ["t.csv"]


def test_predictions_of_any_system_are_judged(tmp_path, monkeypatch):
    table, out = tmp_path / "p.csv", tmp_path / "new" / "er" / "r.json"
    console = io.TextIOWrapper(io.BytesIO(), encoding="cp1252", write_through=True)
    table.write_text("label,prediction,file\n0,0,a\n1,0,b\n1,1,c\n1,2,d\n")
    result = judge_main("--predictions", table, "--out", out)               # the folder is made
    assert "| prediction | 4 | 50.00 % |" in result.stdout and "| 1 | 1 | 1 | 1 |" in result.stdout
    assert json.loads(out.read_text())["prediction"]["confusion"] == [[1, 0, 0], [1, 1, 1], [0, 0, 0]]
    table.write_text("label,prediction\n" + "".join(f"{label},0 1 2 3 4 5\n" for label in (0, 5, 4, 50)))
    result = judge_main("--predictions", table)
    assert result.returncode == 0 and result.stdout == (                    # no table of 51 classes
        "| accuracy | samples | top-1 | top-5 |\n|---|---|---|---|\n| prediction | 4 | 25.00 % | 50.00 % |\n")
    table.write_text("variation,label,prediction\n日本,0,151\nmixed_same,0,1\n", encoding="utf-8")
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", console)
        evaluate.main(["--imagenet9", str(table)])
    assert console.buffer.getvalue().replace(b"\r", b"") == (
        b"| accuracy | ?? | mixed_same |\n|---|---|---|\n| prediction | 100.00 % | 0.00 % |\n")
    p = torch.rand(7, 10, generator=torch.Generator().manual_seed(0)).double().softmax(dim=1)
    mean, std = evaluate.inception_score(p, 2, seed=1)
    table.write_text("\n".join(",".join(map(str, row)) for row in (range(10), *p.tolist())))
    result = judge_main("--inception-score", table, "--splits", 2, "--seed", 1, "--out", out)
    assert f"| 7 | {mean:.2f} ± {std:.2f} |" in result.stdout, result
    assert json.loads(out.read_text()) == {"images": 7, "splits": 2, "inception_score": mean, "std": std}


@pytest.mark.parametrize("what, content, words", [
    *(("--predictions", f"label,prediction\n{rows}\n", words) for rows, words in (
        ("", "no row"), ("0", "fewer cells"), ("0,cat", "'cat'"), ("0,1 2\n0,1", "whole numbers"),
        ("-1,0\n1,0", "label holds -1"), ("0,", "nothing"), ("1 2,3", "(1, 2)"), (f"{2 ** 70},1", "label"))),
    ("--predictions", "", "no row"), ("--predictions", "label,guess\n0,0\n", "shape + texture"),
    ("--predictions", "file,prediction\na,1\n", "no column label"), ("--predictions", "\xff", "no CSV"),
    ("--cue-conflict", "file,decision\ncat1-dog2.png,cow\n", "'cow' is none of"),
    ("--cue-conflict", "file,decision\ncat1-cow2.png,cat\n", "'cat1-cow2.png'"),
    ("--imagenet9", "label,prediction\n0,1\n", "variation"),
    ("--imagenet9", "variation,label,prediction\nmixed_same,9,1\n", "0..8"),
    ("--imagenet9", "variation,label,prediction\nmixed_same,1,1000\nmixed_same,1,1\n", "0..999"),
    ("--inception-score", "a,b\n0.5,cat\n", "'cat'"), ("--seed=1 --predictions", "label\n", "--seed")])
def test_a_table_with_a_mistake_is_one_line(tmp_path, what, content, words):
    (tmp_path / "t.csv").write_bytes(content.encode("latin-1"))
    one_line(judge_main(*what.split(), tmp_path / "t.csv"), words)


def test_an_output_is_tried_before_the_work_and_destroys_nothing(tmp_path, monkeypatch):
    table, link = tmp_path / "t.csv", tmp_path / "link.csv"
    table.write_text("label,prediction\n0,0\n")
    link.symlink_to(table)
    monkeypatch.setattr(evaluate, "read_table", lambda path: 1 / 0)  # is not reached
    for out in (table, link, tmp_path, "/dev/null", table / "r.json"):
        one_line(judge_main("--predictions", table, "--out", out), str(out).removesuffix("/r.json"))
    with pytest.raises(OSError, match="no regular file"):
        evaluate.write_table(tmp_path, [])
    monkeypatch.setattr(evaluate, "read_table", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
    result = judge_main("--predictions", table, "--out", tmp_path / "r.json")
    assert (result.returncode, result.stderr) == (130, "stopped\n")
    assert table.read_text() == "label,prediction\n0,0\n" and len(list(tmp_path.iterdir())) == 2


# ---------- biggan

def raw_biggan(blocks, attention, classes=20, noise=8, embedding=8, seed=0):
    """A raw state dict with random numbers, 51 distinct rows of statistics included."""
    with torch.device("meta"):
        shapes = biggan.BigGAN(blocks, attention, classes, noise, embedding).state_dict()
    generator = torch.Generator().manual_seed(seed)
    state = {key: torch.randn(value.shape, generator=generator) for key, value in shapes.items()}
    for key, numbers in state.items():
        if key.endswith("running_vars"):
            state[key] = 0.5 + numbers.square()
        elif key.endswith("running_means"):
            state[key] = 0.1 * numbers
        elif key.endswith("weight_orig"):  # u, v nearly as they are trained
            u, v = key.replace("weight_orig", "weight_u"), key.replace("weight_orig", "weight_v")
            for _ in range(3):
                state[v] = F.normalize(numbers.flatten(1).T @ state[u], dim=0)
                state[u] = F.normalize(numbers.flatten(1) @ state[v], dim=0)
    return state


RELEASED = [(2048, 2048), (2048, 2048), (2048, 2048), (2048, 1024), (1024, 1024), (1024, 1024), (1024, 1024),
            (1024, 512), (512, 512), (512, 256), (256, 256), (256, 128)]  # 256 x 256 pixels
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
        if f"{name}.weight" in state:
            scale, offset = state[f"{name}.weight"][None], state[f"{name}.bias"][None]
        else:
            scale, offset = 1 + condition @ weight(f"{name}.scale").T, condition @ weight(f"{name}.offset").T
        mean, var = state[f"{name}.running_means"][row], state[f"{name}.running_vars"][row]
        x = (x - mean[:, None, None]) / (var[:, None, None] + 1e-4).sqrt()
        return F.relu(x * scale[:, :, None, None] + offset[:, :, None, None])

    condition = torch.cat([z, state["embeddings.weight"][:, y].T], 1)
    x = condition @ weight("generator.gen_z").T + state["generator.gen_z.bias"]
    x = x.view(len(z), 4, 4, -1).permute(0, 3, 1, 2).contiguous()
    numbers, block = {int(key.split(".")[2]) for key in state if key.startswith("generator.layers.")}, 0
    for name in (f"generator.layers.{number}" for number in sorted(numbers)):
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
    return torch.tanh(conv("generator.conv_to_rgb", norm("generator.bn", x)))[:, :3]


@needs_oracles
@pytest.mark.parametrize("resolution, frozen", [(128, False), (256, True)])
def test_biggan_equals_stored_outputs_of_another_implementation(resolution, frozen):
    stored = torch.load(ORACLES / f"biggan-deep-{resolution}-narrow.pt")
    model = biggan.load(stored["state_dict"], frozen=frozen)
    for truncation, expected in stored["outputs"].items():
        with torch.set_grad_enabled(not frozen):
            found = model(stored["z"], stored["y"], float(truncation))
        assert (found - expected).abs().max() <= 1e-5, truncation


def test_frozen_biggan_equals_the_plain_forward_in_less_than_two_thirds_of_its_time():
    """At half the released widths; the best of four runs each, in turns, in the processor's time."""
    state = raw_biggan([(i // 2, o // 2) for i, o in RELEASED], 8, 1000, 128, 128)
    z, y, model = biggan.truncated_noise(1, seed=3), torch.tensor([207]), biggan.load(state)
    forwards, images, seconds = (lambda: plain_biggan(state, z, y, 50), lambda: model(z, y)), [], []
    with torch.no_grad():
        for forward in 4 * forwards:
            started = time.process_time()
            images.append(forward())
            seconds.append(time.process_time() - started)
    assert min(seconds[1::2]) <= 0.65 * min(seconds[::2]), seconds
    assert (images[1] - images[0]).norm() <= 1e-5 * images[0].norm() and images[0].std() > 0.1


def test_every_row_of_statistics_is_met_and_what_lies_between_is_interpolated():
    rows = torch.randn(51, 3)
    assert all(torch.equal(biggan._row(rows, row / 50), rows[row]) for row in range(51))
    assert torch.allclose(biggan._row(rows, 0.275), 0.25 * rows[13] + 0.75 * rows[14], atol=1e-5)


def test_gradients_are_the_plain_forwards_with_norms_held_for_two_batches_too():
    state = {key: value.double() for key, value in raw_biggan(SMALL, 2).items()}
    model = biggan.load(state, frozen=False).double()
    model.load_state_dict(state)
    z, y = torch.randn(4, 8, dtype=torch.float64), torch.tensor([3, 19, 0, 7])
    leaves = {name: state[name].clone().requires_grad_() for name, _ in model.named_parameters()}
    plain = plain_biggan({**state, **leaves}, z, y, 20)
    plain.square().sum().backward()
    for context in (contextlib.nullcontext, model.held):
        model.zero_grad()
        with context():
            for part in (slice(0, 1), slice(1, 4)):
                found = model(z[part], y[part], 0.4)
                assert torch.allclose(found, plain[part], atol=1e-12)
                found.square().sum().backward()
        for name, parameter in model.named_parameters():
            difference = (parameter.grad - leaves[name].grad).norm()
            assert difference <= 1e-9 * (1e-6 + leaves[name].grad.norm()), name
    with model.held(), pytest.raises(ValueError, match="held"), model.held():
        pass
    with pytest.raises(ValueError, match="frozen"), model.freeze().held():
        pass


def test_class_weights_and_labels_agree_and_what_does_not_fit_is_refused():
    model = biggan.load(raw_biggan(SMALL, None))
    z, y = torch.randn(2, 8), torch.tensor([0, 19])
    assert torch.allclose(model(z, y, 0.02), model(z, F.one_hot(y, 20).float(), 0.02), atol=1e-6)
    for arguments, words in (((z, y, 0.0), "truncation 0.0"), ((z, y, 1.1), "truncation 1.1"),
                             ((z[:, :5], y), "noise .*8"), ((z.numpy(), y), "noise .*tensor"),
                             ((z, [1, 19]), r"classes \[1, 19\].*tensor"), ((z, y > 1), "classes .*bool"),
                             ((z, y + 1), "class 20 is not in 0..19"), ((z, y - 1), "class -1"),
                             ((z, torch.zeros(2, 19)), "19"), ((z, y[:1]), "one for each noise"),
                             ((z, y[:, None]), "classes .*2, 1"), ((z, y / 2), "float32")):
        with pytest.raises(ValueError, match=words):
            model(*arguments)


def test_labels_on_a_device_or_in_a_compiled_graph_are_never_read(monkeypatch):
    """Reading makes a GPU wait and cuts a graph in two; of a fake GPU's tensor nothing can be read."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    with FakeTensorMode(), torch.device("cuda"):
        y = torch.zeros(2).long()
        assert biggan.BigGAN(SMALL, 2, 20, 8, 8)(torch.randn(2, 8), y, None).device == y.device
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with pytest.raises(IndexError):
        biggan.BigGAN(SMALL, 2, 20, 8, 8).embed(torch.tensor([20]))


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
    generator = torch.Generator().manual_seed(1)
    assert torch.equal(z, biggan.truncated_noise(2000, truncation=0.5, generator=generator))


def test_power_iteration_finds_the_largest_singular_value():
    layer = biggan.Conv(4, 6, 3)
    torch.nn.init.normal_(layer.weight_orig)
    for _ in range(200):
        layer.power_iteration()
    assert abs(torch.linalg.svdvals(layer.weight().detach().flatten(1))[0] - 1) < 1e-4


# ---------- biggan, u2net: their weights

def raw_weights(module):
    return raw_biggan(SMALL, 2) if module is biggan else random_u2net(TINY).state_dict()


@needs_oracles
@pytest.mark.parametrize("name", "biggan-deep-128 biggan-deep-256 biggan-deep-512 u2net u2netp".split())
def test_networks_have_the_keys_and_shapes_of_the_released_files(name):
    table = (SHARED / "state_dicts" / f"{name}.txt").read_text().splitlines()
    shapes = dict(line.replace("scalar", "").split("\t") for line in table if line[0] != "#")
    with torch.device("meta"):
        state = {key: torch.empty([*map(int, filter(None, row.split("x")))]) for key, row in shapes.items()}
        if name.startswith("biggan"):
            model = biggan._build(state, name)
            assert model.resolution == int(name[-3:])
        else:
            model = u2net.U2Net(u2net.FULL if name == "u2net" else u2net.LITE)
    model.load_state_dict(state, assign=True)


@pytest.mark.parametrize("module, key, variances, needed", [
    (biggan, "generator.gen_z.bias", "generator.bn.running_vars", "generator.layers.0.conv_0.weight_orig"),
    (u2net, "side1.bias", "stage1.rebnconvin.bn_s1.running_var", "stage3.rebnconv1.conv_s1.weight")])
def test_a_raw_dict_that_does_not_fit_is_refused_with_every_difference(module, key, variances, needed):
    state = raw_weights(module)
    good, wide = state[key], state[variances]
    for name, value, words in (
            ("extra", good, "Unexpected"), (key, torch.zeros(9), "size mismatch"), (needed, good, "it lacks"),
            (key, good * torch.nan, "not finite"), (key, good.abs() / 0, "not finite"),
            (key, -good.abs() / 0, "not finite"), (variances, wide - wide.max(), "negative variances"),
            (key, None, "no dense"), (key, good.long(), "floating"), (key, good.to_sparse(), "no dense"),
            (key, good.to("meta"), "no dense"), (key, torch.zeros(1).expand(512), "all stored")):
        with pytest.raises(ValueError, match=words) as error:
            module.load({**state, name: value})
        assert name in str(error.value) and "\n" not in str(error.value)
    module.load({**state, variances: 0 * wide})
    missing = [name for name in state if name.endswith("bias")]
    with pytest.raises(ValueError, match=".*".join(map(re.escape, missing))):
        module.load({name: value for name, value in state.items() if name not in missing})
    if module is biggan:
        with pytest.raises(ValueError, match="blocks do not follow.*30"):
            module.load({**state, needed: torch.zeros(8, 30, 1, 1)})


def test_files_that_run_code_are_cut_off_or_of_another_network_are_one_line(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    linear = torch.nn.Linear(2, 2)
    for name, held in (("evil", {"embeddings.weight": Evil()}), ("other", linear.state_dict()),
                       ("numbered", {1: torch.zeros(1)}), ("list", [torch.zeros(1)])):
        torch.save(held, tmp_path / name)
    (tmp_path / "short").write_bytes((tmp_path / "other").read_bytes()[:500])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(linear).save(tmp_path / "script")
        warnings.simplefilter("error")
        for name in "evil other numbered list short script nowhere".split():
            for module in (biggan, u2net):
                with pytest.raises(ValueError, match=f"{tmp_path / name}(:| is no)") as error:
                    module.load(tmp_path / name)
                assert "\n" not in str(error.value) and "weights_only" not in str(error.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("module", [biggan, u2net])
def test_weights_are_read_from_all_formats_and_wrappers_and_a_dict_is_left_alone(module, tmp_path):
    state = raw_weights(module)
    before = {key: value.clone() for key, value in state.items()}
    wrapped = {"state_dict": {f"module.{key}": value for key, value in state.items()}, "epoch": 3}
    torch.save(state, tmp_path / "old", _use_new_zipfile_serialization=False)
    torch.save(wrapped, tmp_path / "new")

    def same(found):
        assert all(torch.equal(found[key], value) for key, value in before.items())

    for source in (state, wrapped, tmp_path / "old", tmp_path / "new"):
        model = module.load(source, frozen=False)
        same(model.state_dict())
        assert all(parameter.requires_grad for parameter in model.parameters())
    frozen = module.load(state)
    same(state)
    assert not frozen.training and not any(parameter.requires_grad for parameter in frozen.parameters())
    if module is biggan:  # a file that is not mapped may be replaced
        kept = biggan.read_state(tmp_path / "new", mmap=False)
        (tmp_path / "new").write_bytes(b"")
        same(kept)


CONTENT = bytes(range(250)) * 40
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(params=[biggan, u2net])
def shelf(request, tmp_path, monkeypatch):
    """A function that lists weights beside a module in a folder of its own, and gives the module's reader."""
    monkeypatch.setattr(request.param, "__file__", str(tmp_path / "module.py"))
    (tmp_path / "elsewhere").write_bytes(CONTENT)

    def listed(sha256, address=(tmp_path / "elsewhere").as_uri()):
        (tmp_path / "weights.txt").write_text(f"# so\nw.pth | 10000 | {sha256} | - | {address} | here\n")
        return request.param.find_weights
    return listed


@pytest.mark.parametrize("sha256", [DIGEST, DIGEST[:8], ""])
def test_absent_weights_are_fetched_into_weights_beside_the_module(shelf, tmp_path, capsys, sha256):
    find = shelf(sha256)
    for _ in range(2):  # the second time it is there
        assert find("w.pth") == tmp_path / "weights" / "w.pth"
    assert [path.read_bytes() for path in (tmp_path / "weights").iterdir()] == [CONTENT]
    assert find(tmp_path / "new" / "w.pth").read_bytes() == CONTENT
    out, error = capsys.readouterr()
    assert out.count("fetching") == 2 and out.count(f"SHA-256 {DIGEST}") == (0 if sha256 else 3) and not error


@contextlib.contextmanager
def served(sent):
    """The address of a server that promises CONTENT and breaks off after some bytes."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", str(len(CONTENT)))
            self.end_headers()
            self.wfile.write(CONTENT[:sent])

        log_message = print

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}/w.pth"
        server.shutdown()


def test_a_fetch_that_fails_leaves_nothing_and_names_size_address_and_place(shelf, tmp_path, monkeypatch):
    def refused(find):
        words = f"{tmp_path}/weights/w.pth is missing.*: put the 10000 bytes of [a-z]+://[^ ]+ there$"
        with pytest.raises(ValueError, match=words) as error:
            find("w.pth")
        assert "\n" not in str(error.value) and not list((tmp_path / "weights").iterdir())

    refused(shelf("", "http://127.0.0.1:9/w.pth"))  # no server
    refused(shelf("00ff"))
    with served(5000) as broken:
        refused(shelf("", broken))
    with served(len(CONTENT)) as address:
        with monkeypatch.context() as full_disk:
            full_disk.setattr("shutil.move", lambda *_: os.write(os.open("/dev/full", os.O_WRONLY), b"x"))
            refused(shelf(DIGEST, address))
        assert shelf(DIGEST, address)("w.pth").read_bytes() == CONTENT


def test_weights_of_another_hash_are_not_kept_nor_read_and_an_unlisted_is_printed(shelf, tmp_path, capsys):
    for name in ("w.pth", "mine.pth"):
        (tmp_path / name).write_bytes(b"abc")
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    with pytest.raises(ValueError, match=f"w.pth has SHA-256 {digest}, weights.txt lists 00ff"):
        shelf("00ff")(tmp_path / "w.pth")
    assert shelf("00ff")(tmp_path / "mine.pth") == tmp_path / "mine.pth"
    assert digest in capsys.readouterr().out


def test_weights_txt_lists_what_is_shipped_and_where_the_rest_is():
    lines = (HERE / "weights.txt").read_text().splitlines()
    rows = {row[0]: row for row in (line.split(" | ") for line in lines if line[0] != "#")}
    assert {biggan.WEIGHTS, "u2net.pth", "u2netp.pth"} <= set(rows)
    for name, size, sha256, _, address, _ in rows.values():
        assert address.startswith(("https://", "shipped", "torchvision.datasets"))
        if address.startswith("shipped in weights"):
            content = (HERE / "weights" / name).read_bytes()
            assert len(content) == int(size) and hashlib.sha256(content).hexdigest() == sha256


# ---------- biggan: the command

def test_imagenet_names_and_numbers_name_classes():
    assert biggan.class_numbers("207, ostrich,9", 1000) == {207: "golden retriever", 9: "ostrich"}
    assert biggan.class_numbers("3", 10) == {3: "class 3"}
    for word, words in (("Ostric", "did you mean ostrich"), ("1000", "'1000' is not in 0..999"), ("", "''")):
        with pytest.raises(ValueError, match=words):
            biggan.class_numbers(word, 1000)


def test_a_sheet_shows_the_models_own_pixels_beside_each_classs_name(tmp_path):
    model, path = biggan.load(raw_biggan(SMALL, 2)), tmp_path / "s.png"
    biggan.save_sheet(model, {3: "a", 7: "the longest name that a class has"}, 2, 0.5, 1, path)
    found = np.array(Image.open(path))
    left = found.shape[1] - 2 * 18  # two pictures of 16 + 2 pixels
    x = model(biggan.truncated_noise(2, 8, 0.5, 1), torch.tensor([7, 7]), 0.5)[1].permute(1, 2, 0).numpy()
    assert np.abs(found[20:36, left + 18:left + 34] - (x + 1) * 127.5).max() <= 0.51
    ink = found[:, :left].min(2) < 128
    short, long = (np.flatnonzero(rows.any(0)) for rows in (ink[:20], ink[20:]))
    assert 3 <= short[0] < short[-1] < 40 and 3 <= long[0] and 150 < long[-1] < left - 4
    assert not ink[[0, 19, 20, 39]].any()
    model.embeddings.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="class 3 gives no finite numbers"):
        biggan.save_sheet(model, {3: "a"}, 2, 0.5, 1, path)


def interrupt(*_):
    raise KeyboardInterrupt


def test_the_command_draws_a_sheet_into_a_new_folder_and_mistakes_are_one_line(tmp_path, monkeypatch):
    weights, folder, out = tmp_path / "w.png", tmp_path / "folder.png", tmp_path / "new" / "x.png"
    torch.save(raw_biggan(SMALL, 2), weights)
    folder.mkdir()
    command = "biggan.py", *"--device cpu --classes 3,7 --count 1 --weights".split(), weights, "--out", out
    for option, value in (("--truncation", 0), ("--classes", "20"), ("--count", 0), ("--count", 101),
                          ("--device", "nowhere"), ("--out", tmp_path / "x.jpg"), ("--out", weights),
                          ("--out", folder), ("--out", weights / "x.png")):
        one_line(script(*command, option, value), str(value))

    def full_disk(self, path, **_):
        Path(path).write_bytes(b"half")
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", full_disk)
        one_line(script(*command), "x.png", "no space left")
    assert not list(out.parent.iterdir())
    result = script(*command)
    assert result.returncode == 0 and "SHA-256" in result.stdout and "cpu" in result.stdout, result
    assert [path.name for path in out.parent.iterdir()] == ["x.png"] and Image.open(out).size[1] == 2 * 20
    monkeypatch.setattr(biggan, "load", interrupt)
    stopped = script(*command)
    assert (stopped.returncode, stopped.stderr) == (130, "stopped\n")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak memory from Linux's /proc")
def test_biggan_in_little_memory(tmp_path):
    """234 MB of weights and an image take 340 more than torch (380 where glibc's mmap threshold moves)."""
    code = f"""
import torch
def peak():
    return next(int(line.split()[1]) / 1000 for line in open("/proc/self/status") if line.startswith("VmHWM"))
before = peak()
import biggan, sys
with torch.no_grad():
    biggan.load({str(tmp_path / 'w.pt')!r})(biggan.truncated_noise(1, seed=0), torch.tensor([1]))
assert "torchvision" not in sys.modules
print(peak() - before)
"""
    with torch.device("meta"):
        state = biggan.BigGAN(RELEASED, 8).state_dict()
    state = {key: torch.full(value.shape, 0.01) for key, value in state.items()}
    torch.save(state, tmp_path / "w.pt", _use_new_zipfile_serialization=False)     # as they are released
    result = process("-c", code, env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"})
    assert result.returncode == 0 and float(result.stdout) <= 340, result


# ---------- u2net

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
@pytest.mark.parametrize("name", ["0002-01", "boat", "horse", "im_21", "long", "sailboat3"])
def test_the_lite_network_equals_another_runtime(name):
    """At a tenth of its brightness, too, a photo has this mask; in [-1, 1], as the CGN's authors feed it, it
    has another one of the same object."""
    photo = u2net.open_photo(ORACLES / "u2netp" / f"{name}.png")
    expected = F_image.to_tensor(Image.open(ORACLES / "u2netp" / f"{name}.mask.png"))
    model = u2net.load(HERE / "weights" / "u2netp.pth")
    with torch.no_grad():
        x = F_image.to_tensor(photo)[None]
        found, raw = model(u2net.normalise(x))[0], model(2 * x - 1)[0]
    assert 0.775 < evaluate.mask_iou(found[None], raw[None]) < 0.985           # docs: 0.78 to 0.98
    assert (found - expected).abs().max() <= 1 / 255 + 1e-3
    dark = F_image.to_tensor(u2net.saliency(model, photo.point(lambda value: round(value / 10))))
    assert ((dark > 0.5) & (expected > 0.5)).sum() / ((dark > 0.5) | (expected > 0.5)).sum() >= 0.98


def test_a_photo_is_seen_at_320_pixels_divided_by_its_maximum_and_a_black_one_stays_black():
    model = u2net.load(random_u2net(TINY).state_dict())
    for value in (0, 1):
        expected = 255 * model(u2net.normalise(torch.full((1, 3, 320, 320), float(value))))[0, 0]
        found = u2net.saliency(model, Image.new("RGB", (320, 320), (value,) * 3))
        assert np.abs(np.array(found) - expected.numpy()).max() <= 0.51


def test_folding_batch_norms_changes_nothing_and_seven_maps_come_with_one():
    model = random_u2net(TINY)
    x, state = torch.randn(2, 3, 45, 38), model.state_dict()
    with torch.no_grad():
        expected, found = model(x, maps=True), u2net.load(state)(x, maps=True)
        assert len(found) == 7 and torch.equal(u2net.load(state)(x), found[0])
        for a, b in zip(expected, found):
            assert a.shape == (2, 1, 45, 38) and 0 <= a.min() <= a.max() <= 1
            assert torch.allclose(a, b, atol=1e-5)
        assert not torch.allclose(u2net.load(state, align_corners=True)(x), found[0], atol=1e-5)
    assert model(torch.zeros(1, 3, 16, 16)).shape == (1, 1, 16, 16)
    for shape in ((1, 3, 15, 100), (1, 1, 32, 32), (3, 32, 32)):
        with pytest.raises(ValueError, match="input of shape"):
            model(torch.zeros(shape))


def test_pictures_are_read_as_they_are_meant_to_be_seen(tmp_path):
    grey = np.linspace(0, 255, 64, dtype=np.uint8).reshape(8, 8).repeat(4, 0).repeat(4, 1)
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "16.png")
    (tmp_path / "16.pgm").write_bytes(b"P5 32 32 65535\n" + (grey.astype(">u2") * 257).tobytes())
    for name in ("16.png", "16.pgm"):
        seen = np.array(u2net.open_photo(tmp_path / name, smallest=32))
        assert np.array_equal(seen, np.stack([grey] * 3, 2))
    hidden = np.dstack([grey, grey, grey, np.where(grey > 100, 255, 0)]).astype(np.uint8)
    Image.fromarray(hidden, "RGBA").save(tmp_path / "alpha.png")
    seen = np.array(u2net.open_photo(tmp_path / "alpha.png"))
    assert (seen[grey <= 100] == 255).all() and np.array_equal(seen[grey > 100][:, 0], grey[grey > 100])
    Image.fromarray(np.zeros((20, 20), np.float32)).save(tmp_path / "float.tiff")
    Image.new("RGB", (40, 15)).save(tmp_path / "flat.png")
    Image.new("1", (10_000, 10_000)).save(tmp_path / "huge.png")
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "cut.png").write_bytes((tmp_path / "16.png").read_bytes()[:-40])
    for name, words in (("float.tiff", "mode F"), ("flat.png", "40 x 15"), ("huge.png", "10000 x 10000"),
                        ("text.jpg", ""), ("cut.png", ""), ("nowhere.png", "No such")):
        with pytest.raises(ValueError, match=f"{tmp_path / name} does not open.*{words}") as error:
            u2net.open_photo(tmp_path / name)
        assert "\n" not in str(error.value)


def test_a_photo_becomes_a_mask_and_a_cutout_of_its_own_size_in_new_folders(tmp_path):
    """A dark disc on a bright ground, taken with the camera on its side."""
    y, x = np.mgrid[:200, :300]
    disc = (y - 100) ** 2 + (x - 150) ** 2 < 60 ** 2
    pixels = np.where(disc[..., None], (90, 30, 30), 220).astype(np.uint8)
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
    photo, new, folder = (tmp_path / name for name in ("mask.png", "new.png", "folder.png"))
    Image.new("RGB", (40, 40)).save(photo)
    folder.mkdir()
    before = photo.read_bytes()
    monkeypatch.setattr(u2net, "__file__", str(tmp_path / "u2net.py"))  # beside it is the default, mask.png
    for options, word in (((), "mask.png"), (("--out", photo), "mask"), (("--out", photo / "x.png"), "mask"),
                          (("--cutout", tmp_path / "a/../mask.png"), "mask"), (("--out", folder), "folder"),
                          (("--out", tmp_path / "x.jpg"), "x.jpg"), (("--cutout", tmp_path / "x"), "PNG"),
                          (("--out", new, "--cutout", new), "new.png"), (("--device", "tpu"), "tpu"),
                          (("--out", new, "--weights", new), "new.png"),
                          (("--out", new, "--weights", "none.pth"), "none")):
        one_line(script("u2net.py", photo, *options), word)
    assert photo.read_bytes() == before and not new.exists()
    monkeypatch.setattr(u2net, "open_photo", interrupt)
    stopped = script("u2net.py", photo, "--out", new)
    assert (stopped.returncode, stopped.stderr) == (130, "stopped\n")


# ------------------------------------------------------------------------------------------------------- run

def nothing(step):
    pass


def toy_run(folder, *, at=nothing, after=nothing, share=slice(None), steps=6, scale=1.0, hook=None, config={},
            **more):
    """A tiny training; returns its losses. at(step) happens before its backward pass, after(step) when the
    step is taken."""
    torch.manual_seed(0)
    model, losses = torch.nn.Linear(3, 1), []
    if hook:
        model.bias.register_hook(hook)
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    config = {"seed": 0, "steps": steps, "log_every": 1, "saves": (2,), **config}
    with run.Run(folder, config, {"model": model, "optimizer": optimizer}, **more) as training:
        for step in training:
            x = torch.from_numpy(np.random.default_rng(step).standard_normal((4, 3), dtype=np.float32))
            loss = scale * model(x[share]).square().mean()
            losses.append(loss.item())
            at(step)
            optimizer.zero_grad()
            loss.backward()
            training.check({"loss": loss}, model.parameters())
            optimizer.step()
            after(step)
    return losses


def toy_state(folder):
    state, rows = run.read_checkpoint(folder / "checkpoint.pt"), run.read_lines(folder / "log.jsonl")
    for row in rows:
        row.pop("steps_per_second", None)
    moment = state["optimizer"]["state"][0]["exp_avg"]
    return state["step"], state["model"]["weight"].tolist(), moment.tolist(), rows


@pytest.fixture
def clock(monkeypatch):
    """The seconds that `run` reads, in a list of one."""
    seconds = [100.0]
    monkeypatch.setattr(run, "time", types.SimpleNamespace(time=lambda: seconds[0]))
    return seconds


def test_long_work_says_how_far_it_is_after_five_seconds_then_every_thirty(clock, capsys):
    for _ in run.watched(range(10, 90, 10), "files"):
        clock[0] += 12
    assert capsys.readouterr().out.splitlines() == [
        "files: 20 of 90, 1.4 min left", "files: 50 of 90, 0.8 min left", "files: 80 of 90, 0.2 min left"]
    assert [*run.watched(range(3), "")] == [0, 1, 2]


def test_a_run_without_checks_takes_all_its_steps(tmp_path):
    with run.Run(tmp_path, {"steps": 3, "log_every": 1, "saves": (5,)}, {}) as training:
        assert [*training] == [0, 1, 2]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_saves_and_the_run_continues_bit_for_bit(tmp_path, capsys, number):
    def ask(step):
        if step == 2:
            signal.raise_signal(number)

    def ask_twice(step):
        if step == 3:
            ask(2)
            ask(2)

    losses = toy_run(tmp_path / "whole")
    whole = toy_state(tmp_path / "whole")
    assert [(row["step"], row["loss"]) for row in whole[-1][1:]] == [*enumerate(losses, 1)]
    before = signal.signal(number, signal.default_int_handler)
    try:
        for name, more, error, saved in (("before", {"at": ask}, run.Stopped, 3),
                                         ("after", {"after": ask}, run.Stopped, 3),
                                         ("at once", {"at": ask_twice}, KeyboardInterrupt, 2)):
            with pytest.raises(KeyboardInterrupt) as stopped:
                toy_run(tmp_path / name, **more)
            assert stopped.type is error and toy_state(tmp_path / name)[0] == saved
            assert error is KeyboardInterrupt or str(stopped.value).startswith("stopped after step 3")
            assert signal.getsignal(number) is signal.default_int_handler           # as it was
            assert "after this step" in capsys.readouterr().out
            toy_run(tmp_path / name)
            assert toy_state(tmp_path / name) == whole
            assert f"continuing {tmp_path / name} at step {saved}\n" in capsys.readouterr().out
        signal.signal(number, signal.SIG_IGN)                                       # in the background
        toy_run(tmp_path / "ignored", at=ask)
        assert toy_state(tmp_path / "ignored") == whole
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("names, more", [("loss, gradient", {"scale": float("nan")}),
                                         ("gradient", {"hook": lambda gradient: gradient * float("inf")})])
def test_nothing_that_is_not_finite_is_stepped_or_saved(tmp_path, names, more):
    """A loss, or one number of one gradient while all losses are finite."""
    toy_run(tmp_path, steps=2)
    kept = (tmp_path / "checkpoint.pt").read_bytes()
    with pytest.raises(ValueError, match=f"^step 3: {names} not finite; the last checkpoint is kept"):
        toy_run(tmp_path, free=("steps",), **more)
    assert (tmp_path / "checkpoint.pt").read_bytes() == kept


def test_a_folder_is_locked_and_keeps_the_run_of_another_configuration(tmp_path):
    folder = tmp_path / "new" / "folder"

    def second(step):
        with pytest.raises(ValueError, match="in use by another process"):
            toy_run(folder)

    def files():
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    with ThreadPoolExecutor(1) as pool:                     # which needs no signals
        pool.submit(toy_run, folder, steps=2, at=second).result()
    for _ in range(2):                                      # by its log, or without one by its checkpoint
        before = files()
        with pytest.raises(ValueError, match="another seed, more: choose another --out"):
            toy_run(folder, steps=2, config={"seed": 1, "more": 2})
        assert files() == before
        (folder / "log.jsonl").unlink(missing_ok=True)
    toy_run(folder, steps=4, free=("steps", "other"), config={"other": "elsewhere"})
    assert toy_state(folder)[0] == 4 and run.read_lines(folder / "log.jsonl")[0]["other"] == "elsewhere"
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        toy_run(tmp_path / "file")


def test_rows_checkpoints_and_sheets_come_at_their_steps(tmp_path, clock, capsys):
    """Drawing counts for nothing in the rate."""
    drawn = []

    def half_a_second(step):
        clock[0] += 0.5

    def sheet(step):
        clock[0] += 100
        drawn.append((step, (tmp_path / "checkpoint.pt").exists() and toy_state(tmp_path)[0]))
        return f"{step}.png"

    for steps in (7, 11):
        toy_run(tmp_path, steps=steps, config={"log_every": 4, "saves": (0, 2, 5)}, at=half_a_second,
                sheet=sheet, free=("steps",))
    assert drawn == [(0, False), (2, 2), (5, 5), (7, 7), (10, 10), (11, 11)]  # after the checkpoint
    said = capsys.readouterr().out
    assert "step 5: 5.png\n" in said and "images/s" not in said
    rows = run.read_lines(tmp_path / "log.jsonl")[1:]
    assert [row["step"] for row in rows] == [2, 4, 5, 7, 8, 10, 11]
    assert {row["steps_per_second"] for row in rows} == {2.0}


def test_progress_is_told_after_ten_seconds_then_each_minute_and_at_the_end(tmp_path, clock, capsys,
                                                                            monkeypatch):
    def told(done, second):
        clock[0] = 100 + second
        training.tell(done)
        return capsys.readouterr().out

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    with run.Run(tmp_path, {"steps": 10824, "saves": (1,), "log_every": 1}, {}, images=8) as training:
        training.first, training.row = 4, {"loss": 0.12345}                         # continued at step 4
        training.note = lambda images: f" ({images:g})"
        rate = "2 steps/s = 16 images/s (16)"
        assert told(23, 9.5) == ""
        assert told(24, 10) == f"step 24/10824  {rate}  90.0 min left  loss 0.123\n"
        assert told(142, 69) == ""
        assert told(144, 70) == f"step 144/10824  {rate}  89.0 min left  loss 0.123\n"
        assert told(10824, 71).startswith("step 1.082e+04/10824  152 steps/s")      # at once
        training.config["steps"], training.images, training.row = 14668, 0, {}
        assert told(267.5, 131.75) == "step 267.5/14668  2 steps/s  2.0 h left\n"
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)      # on a terminal
        assert told(268, 132) == ""
        assert told(270, 133) == "\rstep 270/14668  2 steps/s  2.0 h left"
        training.rank = 1
        assert told(14668, 999) == ""


def test_a_run_continues_from_memory_so_that_windows_can_replace_its_checkpoint(tmp_path):
    def mapped(state=None):
        found.append(str(path) in Path("/proc/self/maps").read_text())

    path, found = tmp_path / "checkpoint.pt", []
    part = types.SimpleNamespace(state_dict=dict, load_state_dict=mapped)
    run.save_state(path, {"config": {}, "step": 3, "part": {"a": torch.zeros(9)}})
    with run.Run(tmp_path, {}, {"part": part}) as training:
        assert training.first == 3
    assert training.lock.closed
    state = run.read_checkpoint(path)                       # where it stays
    mapped()
    assert found == [False, True] and state["step"] == 3
    torch.save({"a": 1}, path, _use_new_zipfile_serialization=False)
    assert run.read_checkpoint(path, other=True) == {"a": 1}


def test_a_row_is_appended_whole_or_not_at_all_and_a_damaged_one_is_named(tmp_path):
    log, limits = tmp_path / "new" / "log.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)
    state = log.with_name("a.pt")
    run.write_file(state, b"old")
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))                     # a full disk
    try:
        with pytest.raises(OSError, match="log.jsonl could not be written .*make room"):
            for step in range(9):
                run.append_row(log, {"step": step, "loss": 0.123456789012345})
        with pytest.raises(OSError, match="could not be written .*intact"):
            run.save_state(state, {"a": torch.zeros(1000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [row["step"] for row in run.read_lines(log)] == [0, 1] and state.read_bytes() == b"old"
    assert len(list(log.parent.iterdir())) == 2
    for damaged in ('{"step": "x"}', "[1]", '{"step"'):
        log.write_text('{"step": 1}\n' + damaged)
        with pytest.raises(ValueError, match="line 2, is damaged"):
            run.read_lines(log)
    with pytest.raises(OSError, match="no regular file"):
        run.write_file(log.parent, b"")


def two_ranks(folder):
    """Runs in a process of its own, which becomes two; each has half of the images. Rank 1 is told to stop
    once, after a step's `check`; later it finds another folder, and is lost."""
    rank = 1 if os.fork() == 0 else 0
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT="29533")

    def stop(step):
        if (rank, step) == (1, 1):
            signal.raise_signal(signal.SIGTERM)

    assert run.join_group("cpu") == "cpu"
    half = {"share": slice(2 * rank, 2 * rank + 2)}
    for name, more in (("two", {"after": stop, **half}), ("two", half), (("two", "none")[rank], {})):
        try:
            toy_run(folder / name, **more)
        except (run.Stopped, ValueError) as ended:
            print(ended, flush=True)
    if rank:
        os._exit(0)
    try:
        torch.distributed.all_reduce(torch.zeros(1))
    except RuntimeError as error:
        print(run.lost_process(error))


@pytest.fixture(scope="module")
def both_ranks(tmp_path_factory):
    """The folder of their runs, and what they printed."""
    folder = tmp_path_factory.mktemp("ranks")
    name = Path(__file__).stem
    result = process("-c", f"import {name}; {name}.two_ranks({name}.Path({str(folder)!r}))")
    assert result.returncode == 0, result.stderr
    return folder, result.stdout


def test_two_processes_give_what_one_gives_and_stop_together(both_ranks, tmp_path):
    folder, said = both_ranks
    assert said.count("stopped after step 3") == 2, said
    assert said.count("continuing") == 2 and "stopping after" not in said, said     # only rank 0 speaks
    toy_run(tmp_path)
    one, two = toy_state(tmp_path), toy_state(folder / "two")
    assert torch.allclose(torch.tensor(one[1]), torch.tensor(two[1]), atol=1e-6)
    losses = [[row["loss"] for row in state[-1][1:]] for state in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(losses[1]) == 6


def test_processes_that_find_other_folders_or_lose_one_another_say_so(both_ranks):
    """As on two machines without a common disk."""
    folder, said = both_ranks
    assert said.count("the processes find checkpoints of steps 6, 0 in") == 2, said
    assert said.count("another process of the run has ended") == 1, said


def test_a_checkpoint_that_would_run_code_or_is_none_is_one_line_without_torchs_advice(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'ran'}",)

    files = {"evil.pt": {"config": Evil(), "step": 1}, "config.pt": {"config": 3, "step": 1}, "list.pt": [1],
             "step.pt": {"config": {}, "step": "x"}}
    for name, content in files.items():
        torch.save(content, tmp_path / name)
    (tmp_path / "short.pt").write_bytes((tmp_path / "step.pt").read_bytes()[:300])
    for name in (*files, "short.pt", "absent.pt"):
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
    (tmp_path / "file").write_text("")
    for path in (folder, Path("/dev/null"), folder / ".." / "b.png", tmp_path / "file" / "a.png"):
        with pytest.raises(ValueError, match="choose another name"):
            run.check_output(path, None, tmp_path / "b.png")


def test_a_processor_is_told_of_a_gpu_and_does_not_emulate_bfloat16(monkeypatch, capsys):
    for here in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: here)
        assert run.find_device("cpu") == "cpu"
        assert capsys.readouterr().out.startswith("computing on the CPU; there is a GPU") == here
    assert run.find_device() == run.find_device("auto") == "cpu"
    for supported in (True, False):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported)
        for device in ("cpu", "cuda:1"):
            assert run.bf16_pays(True, device) == supported and not run.bf16_pays(False, device)
            assert ("float32 is faster here" in capsys.readouterr().out) != supported


def test_a_script_ends_in_one_line(capsys, monkeypatch):
    parser = cgn.build_parser()
    parser.prog = "x.py"

    def ended(error, *options):
        def main(args):
            if error:
                raise error

        with pytest.raises(SystemExit) as stop:
            run.command(parser, main, options)
        return stop.value.code, capsys.readouterr().err

    assert ended(ValueError("a\n b")) == (2, "x.py: a b\n") and ended(OSError("disk"))[0] == 2
    assert ended(KeyboardInterrupt()) == (130, "\nstopped\n")
    assert ended(run.Stopped("stopped after step 3")) == (130, "\nstopped after step 3\n")
    assert "memory is full" in ended(torch.OutOfMemoryError())[1]
    assert ended(None, "--threads", "0") == (2, "x.py: --threads 0: must be at least 1\n")
    run.command(parser, nothing, ["--seed", str(2 ** 63 - 1), "--threads", "1"])
    with pytest.raises(RuntimeError, match="gloo"):                         # there is no group
        run.command(parser, lambda args: run.lost_process(RuntimeError("gloo")), [])
    console = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")             # it has no arrow
    monkeypatch.setattr(sys, "stderr", console)
    with pytest.raises(SystemExit):
        cgn.main(["--dataset", "colored → x"])
    console.flush()
    assert re.search(b"colored . x.*did you mean colored", console.buffer.getvalue())


# ------------------------------ cgn: equations and mechanisms

def tiny_config(**changes):
    return {"model": "cgn", "dataset": "colored", "names": [f"digit {k}" for k in range(10)], "seed": 3,
            **cgn.PRESETS["colored"], "steps": 4, "batch": 8, "lr": 1e-3, "binary": 1.0, "binary_warmup": 2,
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


def philox(seed, index):
    return np.random.Generator(np.random.Philox(key=[seed, index]))


def test_four_steps_on_digits_give_what_plain_loops_give(trained):
    """Numbers of a straight line of the same steps with losses, rates and noise in plain loops."""
    expected = {
        1: {"discriminator": 1.9605, "real": 0.0323, "fake": -0.0072, "adversarial": -0.8620, "binary": 0,
            "mask": 0, "color": 0.1438, "border": 0.8501, "mask_mean": 0.3397},
        4: {"discriminator": 1.9695, "real": -0.1020, "fake": -0.1325, "adversarial": 0.1269, "binary": 0.739,
            "mask": 0, "color": -0.0029, "border": 0.3716, "mask_mean": 0.3530}}
    rows = {row.pop("step"): row for row in run.read_lines(trained / "log.jsonl")[1:]}
    assert [*rows] == [1, 2, 3, 4]
    for step, numbers in expected.items():
        assert rows[step].keys() == {*numbers, "steps_per_second"}
        assert {name: rows[step][name] for name in numbers} == pytest.approx(numbers, rel=0.002, abs=0.0005)


def test_training_leaves_sheets_that_do_not_change_the_model_and_a_generator_to_ship(trained, tmp_path):
    checkpoint = trained / "checkpoint.pt"
    assert run.read_lines(trained / "log.jsonl")[0]["seed"] == 3
    assert sorted(path.name for path in trained.glob("*.png")) == ["sheet-000002.png", "sheet-000004.png"]
    model = cgn.load(checkpoint)
    assert model.config["steps"] == model.step == 4 and not any(p.requires_grad for p in model.parameters())
    assert model.sha256 == hashlib.sha256(checkpoint.read_bytes()).hexdigest() and not model.training
    before = copy.deepcopy(model.state_dict())
    cgn.training_sheet(model, model.config, tmp_path, None, 4)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert (tmp_path / "sheet-000004.png").read_bytes() == (trained / "sheet-000004.png").read_bytes()
    cgn.save_generator(checkpoint, tmp_path / "small.pth")
    assert (tmp_path / "small.pth").stat().st_size < 2e6
    a, b = (cgn.counterfactuals(made, 4).images.float() for made in (model, cgn.load(tmp_path / "small.pth")))
    assert 0 < (a - b).abs().mean() < 1


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


def test_a_stopped_run_of_digits_continues_bit_for_bit(tmp_path, monkeypatch, trained):
    update, decays = cgn.update_average, []

    def interrupted(average, model, decay):
        decays.append(decay)
        if len(decays) == 3:
            raise KeyboardInterrupt
        update(average, model, decay)

    monkeypatch.setattr(cgn, "update_average", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cgn.train(tiny_config(), *tiny_data(), tmp_path)
    torch.manual_seed(99)
    cgn.train(tiny_config(), *tiny_data(), tmp_path)
    assert run_result(tmp_path) == run_result(trained)
    assert decays == pytest.approx([1 / 10, 2 / 11, 3 / 12, 3 / 12, 4 / 13])
    old, new = torch.nn.PReLU(init=1.0), torch.nn.PReLU(init=2.0)
    update(old, new, 0.9)
    assert old.weight.item() == pytest.approx(1.1) and new.weight.item() == 2.0


def test_a_folder_of_pictures_trains_like_a_variant_and_may_be_named_otherwise(tmp_path, monkeypatch):
    pictures = tmp_path / "pictures"
    for label, color in (("cat", "red"), ("dog", "green")):
        (pictures / label).mkdir(parents=True)
        for k in range(3):
            Image.new("RGB", (40 + 10 * k, 50), color).save(pictures / label / f"{k}.png")
    monkeypatch.chdir(tmp_path)
    options = ("--batch", 4, "--steps", 2, "--interval", 0.1, 0.9, "--margin", 0, "--out", tmp_path / "run")
    for name in ("pictures/", pictures):  # continued: the same pictures
        cgn_works(*options, "--dataset", name)
    config = cgn.load(tmp_path / "run" / "checkpoint.pt").config
    assert (config["names"], config["batch"], config["interval"]) == (["cat", "dog"], 4, (0.1, 0.9))
    assert config["relativistic"] and "border" not in run.read_lines(tmp_path / "run" / "log.jsonl")[1]
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
            **cgn.PRESETS["imagenet"], "steps": 2, "accumulate": 2, "lr": (1e-4, 2e-4, 3e-4), "patch": 5,
            "saves": (1,), **changes}


def imagenet_run(states, out, **changes):
    model = imagenet_model(states)
    style = cgn.StyleFeatures(states[2])
    cgn.train_imagenet(imagenet_config(**changes), model, biggan.load(states[0]), style, out)
    return model


@pytest.fixture
def no_sheets(monkeypatch):
    monkeypatch.setattr(cgn, "training_sheet", lambda *arguments: None)


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
    released = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    found, expected = cgn.StyleFeatures(released)(x), plain_vgg(state, x)
    assert len(found) == 4 and all(torch.allclose(a, b, atol=1e-4) for a, b in zip(found, expected))
    with pytest.raises(ValueError, match="no state dict of vgg16_bn.*features.14.weight"):
        cgn.StyleFeatures({key: value for key, value in state.items() if "features.14" not in key})


def straight_line_terms(networks, raw, u, y, draws, patch):
    """Equation 4's terms in the precision of u: plain networks, nothing folded; `raw`: three raw dicts."""
    saliency_net = u2net.load(networks[1], frozen=False).to(u).eval().requires_grad_(False)

    def saliency(x):
        return saliency_net(plain_normalise(x))

    def style(a, b):
        return cgn.perceptual(plain_vgg(networks[2], a), plain_vgg(networks[2], b.detach()))

    x_gt = plain_biggan({key: value.to(u) for key, value in networks[0].items()}, u, y, 50)
    pre_mask, f, b = (plain_biggan(state, u, y, 50) for state in raw)
    m = saliency(pre_mask)
    x, grid = m * f + (1 - m) * b, cgn.patch_grid(x_gt, m, draws, patch).to(u)
    return {"l1": (x - x_gt).abs().mean(), "perceptual": style(x, x_gt), "binary": cgn.binary_entropy(m),
            "mask": cgn.mask_interval(m), "texture": style(f, grid), "background": saliency(b).mean()}


def test_every_term_and_its_gradient_equal_the_straight_line(networks):
    """Into the stored weights of all three mechanisms; float64, relative error 1e-5."""
    small = {**networks[1], "outconv.bias": networks[1]["outconv.bias"] - 3}  # small masks: all terms act
    raw = [raw_biggan([(16, 16)] * 6, 2, classes=10, seed=k) for k in (1, 2, 3)]
    states = [{key: value.double() for key, value in state.items()} for state in raw]
    model = imagenet_model((networks[0], small)).double()
    parts = model.f_shape, model.f_text, model.f_bg
    teacher = biggan.load(networks[0], frozen=False).double()
    u, y, draws = cgn.draw_training(model, 0, range(2))
    u, style = u.double(), cgn.StyleFeatures(networks[2]).double()
    parameters, stored = [], []
    for part, state in zip(parts, states):
        part.load_state_dict(state)
        for name, parameter in part.named_parameters():
            parameters.append(parameter)
            stored.append(state[name].requires_grad_())
    with torch.no_grad():
        x_gt = teacher(u, y, 1.0)
    found = cgn.imagenet_losses(model, *model(u, y)[:3], x_gt, style, draws, patch=5)
    expected = straight_line_terms((networks[0], small, networks[2]), states, u, y, draws, 5)
    for (term, loss), (name, wanted) in zip(found, expected.items(), strict=True):
        assert term == name and wanted > 0 and abs(loss / wanted - 1) < 1e-5
        pairs = zip(*(torch.autograd.grad(value, weights, retain_graph=True, materialize_grads=True)
                      for value, weights in ((loss, parameters), (wanted, stored))))
        errors = [((a - b).norm() / b.norm()).item() for a, b in pairs if b.norm() > 0]
        assert len(errors) > 50 and max(errors) < 1e-5, term


def test_a_micro_step_weighs_each_term_and_leaves_out_what_it_is_told(networks):
    model, teacher, style = imagenet_model(networks), biggan.load(networks[0]), cgn.StyleFeatures(networks[2])
    u, y, draws = cgn.draw_training(model, 0, range(2))

    def gradient():
        found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        model.zero_grad()
        return found

    for left_out, relative in (((), False), (("shape", "bg"), True), (("text", "rec"), False)):
        config = imagenet_config(without=left_out, relative_patch=relative)
        found = cgn.micro_step(model, teacher, style, u, y, draws, config, 0.5)
        reached, made = gradient(), model(u, y)
        terms = [term for term in cgn.TERMS if not any(term in cgn.WITHOUT[part] for part in left_out)]
        losses = dict(cgn.imagenet_losses(model, *made[:3], teacher(u, y, 1.0), style, draws, patch=5,
                                          relative=relative, terms=terms))
        (0.5 * sum(config[term] * loss for term, loss in losses.items())).backward()
        wanted = gradient()
        assert (reached - wanted).norm() < 1e-4 * wanted.norm()
        losses["mask_mean"] = made.mask.mean()
        assert list(found) == list(losses)
        assert all(torch.allclose(found[name], 0.5 * loss, rtol=1e-4) for name, loss in losses.items())


def test_an_update_does_not_depend_on_how_its_images_are_cut(networks, tmp_path, monkeypatch, no_sheets):
    draw, drawn = cgn.draw_training, []
    monkeypatch.setattr(cgn, "draw_training", lambda *given: drawn.append(given[1:]) or draw(*given))
    one, two = (imagenet_run(networks, tmp_path / str(batch), batch=batch, accumulate=3) for batch in (1, 2))
    assert drawn[6:] == [(3, part) for part in (range(2), range(2, 3), range(3, 5), range(5, 6))]
    assert all(torch.allclose(a, b, atol=2e-5) for a, b in zip(one.parameters(), two.parameters()))
    before = networks[0]["generator.gen_z.weight_orig"]
    for part, lr in ((two.f_shape, 1e-4), (two.f_text, 2e-4), (two.f_bg, 3e-4)):    # Adam's first two steps
        moved = (part.generator["gen_z"].weight_orig - before).abs().max()
        assert 1.9 * lr < moved < 2.05 * lr
    rows = [run.read_lines(tmp_path / name / "log.jsonl")[1:] for name in ("1", "2")]
    for a, b in zip(*rows):
        assert all(abs(a[name] - b[name]) <= 1e-4 * abs(a[name]) for name in (*cgn.TERMS, "mask_mean"))


def test_a_stopped_imagenet_run_continues_bit_for_bit_without_frozen_networks_in_its_checkpoint(
        networks, tmp_path, monkeypatch, no_sheets, capsys):
    imagenet_run(networks, tmp_path / "whole")
    assert "collapse" not in capsys.readouterr().out
    continued = partial(imagenet_run, networks, tmp_path / "parts")
    with pytest.raises(ZeroDivisionError), monkeypatch.context() as patch:
        patch.setattr(cgn, "training_sheet", lambda *arguments: 1 / 0)              # after the checkpoint
        continued()
    assert run.read_checkpoint(tmp_path / "parts" / "checkpoint.pt")["step"] == 1
    continued(style="moved.pth")  # what changes no result may change
    (whole, _), (parts, _) = (run_result(tmp_path / name) for name in ("whole", "parts"))
    assert whole.keys() == {"config", "step", "f_shape", "f_text", "f_bg", "optimizer"}
    assert {**parts, "config": whole["config"]} == whole
    small = {**networks[1], "outconv.bias": networks[1]["outconv.bias"] - 3}
    imagenet_run((networks[0], small, networks[2]), tmp_path / "parts", steps=3, batch=2)  # more of them
    assert run.read_checkpoint(tmp_path / "parts" / "checkpoint.pt")["step"] == 3
    assert "masks collapse, their mean is 0.0" in capsys.readouterr().out


def test_a_term_that_is_not_finite_is_named_and_the_last_checkpoint_kept(networks, tmp_path, no_sheets):
    broken = {**networks[2], "features.0.bias": networks[2]["features.0.bias"] + 1e30}
    with pytest.raises(ValueError, match="step 1: perceptual, texture.* not finite; the last"):
        imagenet_run((*networks[:2], broken), tmp_path, accumulate=1)
    assert not (tmp_path / "checkpoint.pt").exists()


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
    path, config = tmp_path / "bad.pt", state["config"]
    moved = {**config, "saliency": "/nowhere/u2net-of-mine.pth", "truncation": 0.5}
    for held, words in (({**state, "f_text": "/dev/zero"}, "bad.pt"), (digits, "bad.pt"),
                        ({**state, "config": {"model": "imagenet"}}, "bad.pt"),
                        ({"weights": 3}, "bad.pt"), ({**state, "config": moved}, "u2net-of-mine")):
        torch.save(held, path)
        with pytest.raises(ValueError, match=words):
            cgn.load(path)
    model = cgn.load(path, saliency=config["saliency"])
    assert (model.truncation, model.step, model.config) == (0.5, 1, moved)


def test_missing_big_networks_are_named(tmp_path, monkeypatch):
    def offline(*arguments, **more):
        raise OSError("no network")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    monkeypatch.setattr(cgn, "WEIGHTS", tmp_path)
    options = ("--dataset", "imagenet", "--out", tmp_path / "run")
    cgn_refuses(options, biggan.WEIGHTS, "u2net.pth", "vgg16_bn-6c64b313.pth", "no network",
                "--mini runs now")
    cgn_refuses((*options, "--set", f"teacher={tmp_path / 'teacher.bin'}"), "teacher.bin")
    monkeypatch.setattr(cgn, "train_imagenet", lambda *arguments: None)
    assert "the run would miss" in cgn_works(*options, "--dry-run").stdout and not (tmp_path / "run").exists()


# ------------------------------ cgn: sampling

class HandCGN(cgn.CGN):
    """Pictures of one colour by plain sums: each shows the noise, label and cells that it was made of."""

    def __init__(self, resolution=4, classes=5):
        super().__init__()
        self.classes, self.noise, self.resolution, self.truncation = classes, 2, resolution, 0.7
        self.config = {"model": "hand", "names": [f"c{k}" for k in range(classes)]}
        self.weight, self.sha256, self.calls = torch.nn.Parameter(torch.zeros(1)), "hash", []

    def arrange(self, generator, count):
        return torch.from_numpy(generator.integers(8, size=(count, 2, 3)))

    def made(self, u, y, cells, color):
        self.calls.append(len(u))
        self.seen = self.truncation, torch.is_autocast_enabled("cpu")
        y = cgn.class_weights(y, self.classes) @ torch.arange(float(self.classes))
        level = (u[:, 0] - u[:, 1] / 2 + y) / 8 + cells @ torch.tensor([4, 2, 1]) / 128
        picture = torch.tensor(color)[:, None, None].expand(-1, self.resolution, self.resolution)
        return level[:, None, None, None] * picture

    def shape(self, u, y):
        pre_mask = self.made(u, y, torch.zeros(len(u), 3).long(), [1.0, -1.0, 0.5])
        return (pre_mask[:, :1] + 0.25).clamp(0, 1), pre_mask

    def texture(self, u, y, arrangement):
        return self.made(u, y, arrangement[:, 0], [0.5, 0.25, 1.0])

    def background(self, u, y, arrangement):
        return self.made(u, y, arrangement[:, 1], [-1.0, 0.5, 0.25])


def drawn_by_hand(seed, index, start=None):
    """u, y and cells of HandCGN's image `index`; its shape's u and y are those of image `start`."""
    generator = philox(seed, index)
    u, y = generator.standard_normal((3, 2), dtype=np.float32), generator.integers(5, size=3)
    u, y, cells = map(torch.from_numpy, (u, y, generator.integers(8, size=(2, 3))))
    if start is not None:
        u[0], y[0] = (drawn[0] for drawn in drawn_by_hand(seed, start)[:2])
    return u, y, cells


def made_by_hand(model, u, y, cells):
    """What one call makes, as bytes: m, f, b, x_gen and pre-mask."""
    m, *others = model(tuple(u[:, None]), tuple(y[:, None]), cells[None])
    return [cgn.to_uint8(part[0]) for part in (2 * m - 1, *others)]


def same(a, b):
    return all(torch.equal(*pair) for pair in zip(a, b, strict=True))


@pytest.fixture
def hand(monkeypatch):
    """What --checkpoint HAND loads."""
    model, load = HandCGN(), cgn.load
    monkeypatch.setattr(cgn, "load", lambda source: model if source == "HAND" else load(source))
    return model


@pytest.fixture
def sheets(monkeypatch):
    """What is written as sheets: path, images, names of rows and columns, scale."""
    written = []
    monkeypatch.setattr(mnist_variants, "save_sheet", lambda *what, scale: written.append((*what, scale)))
    return written


def test_floats_are_bytes_by_hand():
    floats, levels = torch.tensor([-1.5, -1, -0.5, 0, 0.5, 1, 1.5]), [0, 0, 64, 128, 191, 255, 255]
    assert cgn.to_uint8(floats).tolist() == levels
    levels = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 1, 1, 3)
    assert cgn.to_float(levels).flatten().tolist() == pytest.approx([-1, -0.6, 1])


def test_noise_labels_and_cells_are_drawn_in_this_order(any_cgn):
    generator, (u, y, cells) = philox(7, 2), any_cgn.draw(cgn.rng(7, 2))
    if isinstance(any_cgn, cgn.ImagenetCGN):
        noise = biggan.truncated_noise(3, 8, 1.0, seed=int(generator.integers(2 ** 63)))
        assert torch.equal(u, noise) and cells.shape == (2, 0)
        any_cgn.truncation = 0.5
        assert torch.equal(any_cgn.draw(cgn.rng(7, 2))[0], 0.5 * noise)
    else:
        assert np.array_equal(u, generator.standard_normal((3, 32), dtype=np.float32))
    assert np.array_equal(y, generator.integers(10, size=3))
    if isinstance(any_cgn, cgn.MnistCGN):
        assert np.array_equal(cells, cgn.draw_arrangement(generator, 1, "shift")[0])


def test_a_gan_draws_one_label_and_all_of_its_picture_is_foreground():
    gan, full = cgn.MnistGAN().eval(), cgn.MnistCGN()
    (u, y, _), (u_full, y_full, _) = gan.draw(cgn.rng(7, 2)), full.draw(cgn.rng(7, 2))
    assert torch.equal(u, u_full[:1].expand(3, 32)) and torch.equal(y, y_full[:1].expand(3))
    m, f, b, x, _ = gan(tuple(u_full[:, None]), tuple(y_full[:, None]))
    assert m.unique().tolist() == [1] and b.unique().tolist() == [0] and torch.equal(f, x)
    made, _ = cgn.counterfactual_batch(gan, 7, range(2, 4))                         # 10 a shape mean nothing
    assert torch.allclose(made.image[:1], x, atol=1e-5) and not nearly(*cgn.to_uint8(made.image))


def test_counterfactuals_of_one_shape_share_its_noise_and_label_and_nothing_else():
    hand = HandCGN()
    for part, per_shape in ((range(3, 11), 4), (range(2), 1)):
        drawn = u, y, cells = cgn.draw(hand, 7, part, per_shape)
        for place, index in enumerate(part):
            expected = drawn_by_hand(7, index, index // per_shape * per_shape)
            assert same((u[:, place], y[:, place], cells[place]), expected)
    assert same(drawn, cgn.draw(hand, 7, range(2)))


def test_counterfactuals_are_a_pure_function_of_seed_and_index(tmp_path):
    """In memory and as files."""
    hand, rows = HandCGN(), ["file,seed,u,shape,texture,background"]
    data = cgn.counterfactuals(hand, 11, 5, per_shape=3, at_once=4)
    assert hand.calls == [2, 4, 4, 2, 4, 4, 2, 3, 3]  # shapes, textures, backgrounds
    hand.calls.clear()
    cgn.write_counterfactuals(hand, tmp_path, 11, 5, 3, at_once=5, parts=("mask", "background"))
    assert hand.calls == [2, 5, 1, 5, 1, 2, 5, 5]                                   # whole shapes
    for index in range(11):
        u, y, cells = drawn_by_hand(5, index, index // 3 * 3)
        m, _, b, x, _ = made_by_hand(hand, u, y, cells)
        assert torch.equal(data.images[index], x) and torch.equal(torch.stack(data[1:])[:, index], y)
        files = (picture(tmp_path / f"{index:08d}{part}.png") for part in ("", "-mask", "-background"))
        assert same(files, (x, m, b))
        rows.append(f"{index:08d}.png,5,{index // 3 * 3},{y[0]},{y[1]},{y[2]}")
    assert (tmp_path / "labels.csv").read_text() == "\n".join(rows) + "\n"
    assert len(list(tmp_path.iterdir())) == 3 * 11 + 2


def test_by_default_ten_share_a_shape_of_seed_0(tmp_path):
    hand = HandCGN()
    data = cgn.counterfactuals(hand, 103)
    assert hand.calls == [10, 100, 100, 1, 3, 3]
    assert torch.equal(data.images[102], made_by_hand(hand, *drawn_by_hand(0, 102, 100))[3])
    hand.calls.clear()
    cgn.write_counterfactuals(hand, tmp_path, 11)
    cgn.counterfactual_batch(hand, 0, range(5, 25))
    hand.independent = False                                # as a GAN: none share
    cgn.counterfactual_batch(hand, 0, range(5, 25))
    assert hand.calls == [1, 10, 10, 1, 1, 1, 3, 20, 20, 20, 20, 20]
    assert json.loads((tmp_path / "settings.json").read_text()) == {
        "seed": 0, "per_shape": 10, "truncation": 0.7, "bf16": False, "weights": "hash",
        "names": ["c0", "c1", "c2", "c3", "c4"]}


def test_a_data_set_is_a_pure_function_of_its_index_and_is_continued(tmp_path, monkeypatch):
    hand, one, two = HandCGN(), tmp_path / "one", tmp_path / "two"
    write = partial(cgn.write_counterfactuals, hand, count=11, per_shape=3, at_once=2, parts=("mask",))
    write(one)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, there in (("1", {3, 4, 5, 9, 10}), ("0", {*range(11)})):
        monkeypatch.setenv("RANK", rank)
        write(two)
        assert {int(path.stem) for path in two.glob("*[0-9].png")} == there
        assert (two / "labels.csv").exists() == (rank == "0")                       # by the last one
    monkeypatch.delenv("WORLD_SIZE")
    (two / "00000004-mask.png").unlink()
    hand.calls.clear()
    write(two)
    assert hand.calls == [1, 2, 1, 2, 1] and run_result(two) == run_result(one)


def test_a_data_set_is_of_one_model_one_seed_and_one_precision(tmp_path):
    """What may change is which parts lie beside the pictures, and their number."""
    write = partial(cgn.write_counterfactuals, out=tmp_path, count=2)
    write(HandCGN())
    write(HandCGN(), parts=("foreground",), count=1)
    for name, value in (("seed", 4), ("per_shape", 1), ("bf16", True), ("sha256", "another"),
                        ("truncation", 0.5), ("config", {"names": list("abcde")})):
        model, is_models = HandCGN(), hasattr(HandCGN(), name)
        if is_models:
            setattr(model, name, value)
        with pytest.raises(ValueError, match="holds counterfactuals of other weights"):
            write(model, **({} if is_models else {name: value}))
    assert len(list(tmp_path.glob("*.png"))) == 3
    for count, per_shape in ((0, 1), (1, 0)):
        for make in (cgn.counterfactuals, partial(cgn.write_counterfactuals, out=tmp_path)):
            with pytest.raises(ValueError, match="at least 1"):
                make(HandCGN(), count=count, per_shape=per_shape)


def test_a_data_set_has_the_trainings_truncation_or_bfloat16(hand, tmp_path, monkeypatch):
    monkeypatch.setattr(cgn, "bf16_pays", lambda wanted, device: wanted)
    command = "--checkpoint", "HAND", "--counterfactuals", 1, "--parts", "mask", "--out"
    for option, truncation, bf16 in (("", 0.7, False), ("--bf16", 0.7, True), ("--truncation=1", 1.0, False)):
        out = tmp_path / f"set{option}"
        cgn_works(*command, out, *option.split())
        settings = json.loads((out / "settings.json").read_text())
        assert (settings["truncation"], settings["bf16"]) == hand.seen == (truncation, bf16)
        assert {path.name for path in out.glob("*.png")} == {"00000000.png", "00000000-mask.png"}


def test_written_tensors_are_what_counterfactuals_gives_beside_a_preview(hand, sheets, tmp_path):
    command, out = ("--checkpoint", "HAND", "--seed", 2, "--counterfactuals"), tmp_path / "new" / "set.pt"
    cgn_works(*command, 12, "--per-shape", 3, "--out", out)
    held, data = torch.load(out, weights_only=True), cgn.counterfactuals(hand, 12, 2, 3)
    assert same([held.pop(name) for name in data._fields], data)
    assert held == {"names": ["c0", "c1", "c2", "c3", "c4"], "seed": 2, "per_shape": 3, "weights": "hash"}
    (path, images, rows, columns, _), = sheets
    assert path == out.with_name("set-preview.png") and torch.equal(images[0], data.images[:10])
    assert (rows, columns) == (["0"], ["the first of 12 counterfactuals, 3 a shape"] * 10)
    for count in (7, 250):
        cgn_works(*command, count, "--out", out)
    assert [images.shape[:2] for _, images, *_ in sheets] == [(1, 10), (1, 7), (10, 10)]
    cgn_refuses((*command, 3, "--out", tmp_path / "checkpoint.pt"), "checkpoint.pt", "would be lost")


@pytest.mark.parametrize("kind, plain, mixed", [("hand", 2, 3), ("imagenet", 3, 1)])
def test_a_sheet_shows_the_parts_of_each_class_and_counterfactuals_of_its_shape(sheets, kind, plain, mixed):
    """ImageNet's parts have one u, as in training."""
    def teacher(u, y, truncation):
        return truncation * (u[:, :1] + y[:, None])[:, :, None, None].expand(-1, 3, 4, 4) / 8

    hand, labels, count = HandCGN(), torch.tensor([4, 1]), max(plain, mixed)
    hand.config["model"] = kind
    cgn.class_sheet(hand, [4, 1], hand.config["names"], "a.png", 5, plain, mixed, teacher)
    u, y, cells = cgn.draw(hand, 5, range(2 * count))
    y[0] = labels.repeat_interleave(count)
    counterfactuals = cgn.render(hand, u, y, cells)["x_gen"]
    parts = cgn.render(hand, u[:1].expand_as(u) if kind == "imagenet" else u, y[:1].expand_as(y), cells)
    parts["x_gt"] = cgn.to_uint8(teacher(u[0], y[0], 0.7))
    blocks = [block.unflatten(0, (2, count)) for block in (*parts.values(), counterfactuals)]
    (path, images, *names, scale), = sheets
    columns = [name for name in (*PARTS, "x_gt") for _ in range(plain)] + ["counterfactuals"] * mixed
    assert (path, names, scale) == ("a.png", [["c4", "c1"], columns], 16)
    expected = [block[:, :plain] for block in blocks[:-1]] + [blocks[-1][:, :mixed]]
    assert torch.equal(images, torch.cat(expected, dim=1))
    hand.independent = False
    cgn.class_sheet(hand, [1], hand.config["names"], "a.png", 5)
    assert sheets[1][3] == ["x_gen"] * 3


def test_a_call_is_rendered_a_few_at_a_time_and_small_pictures_are_enlarged(sheets):
    for resolution, calls, scale in ((256, [2, 2, 1], 1), (512, [1] * 5, 1), (64, [5], 1), (32, [5], 2)):
        hand = HandCGN(resolution)
        made = cgn.render(hand, *cgn.draw(hand, 1, range(5)))
        assert hand.calls == 3 * calls and list(made) == PARTS
        m, f, b, x, pre_mask = made_by_hand(hand, *drawn_by_hand(1, 3))
        assert same([part[3] for part in made.values()], (pre_mask, m.expand(3, -1, -1), f, b, x))
        assert cgn.save_sheet(hand, "a.png", None, [], []) == "a.png" and sheets[-1][-1] == scale


def test_a_training_sheet_has_up_to_ten_classes_at_a_lower_truncation(sheets, tmp_path):
    hand = HandCGN(classes=19)
    names = hand.config["names"]
    config, labels = {"model": "imagenet", "names": names, "seed": 5}, range(0, 19, 2)
    for teacher, more in ((hand.background, {"plain": 1, "mixed": 2}), (None, {})):
        made = teacher and (lambda u, y, truncation: teacher(u, y, torch.zeros(len(u), 2, 3).long()))
        assert cgn.training_sheet(hand, config, tmp_path, made, 12) == tmp_path / "sheet-000012.png"
        assert hand.truncation == 0.7 and hand.seen[0] == 0.5 and hand.config is config
        cgn.class_sheet(hand, labels, names, tmp_path, 5, teacher=made, **more)
        (_, images, *rows, _), (_, expected, *wanted, _) = sheets[-2:]
        assert torch.equal(images, expected) and rows == wanted
    assert sheets[-1][3] == [part for part in PARTS for _ in range(3)] + ["counterfactuals"] * 8


@pytest.mark.parametrize("what", ["shape", "texture", "background", "all"])
def test_interpolations_move_only_what_they_name(what):
    hand, moving = HandCGN(), torch.tensor([what in (name, "all") for name in cgn.MECHANISMS])
    for ends in (None, (1, 4)):
        images = cgn.interpolate(hand, what, 1, rows=2, columns=3, ends=ends)
        assert images.shape == (2, 3, 3, 4, 4)
        for row, column in itertools.product(range(2), range(3)):
            (u, y, cells), (u_end, y_end, _) = (drawn_by_hand(1, 2 * row + end) for end in (0, 1))
            if ends:
                y[moving], y_end[moving] = ends
            moved, y, y_end = (column / 2 * moving)[:, None], F.one_hot(y, 5), F.one_hot(y_end, 5)
            expected = made_by_hand(hand, u + moved * (u_end - u), y + moved * (y_end - y), cells)[3]
            assert nearly(images[row, column], expected), (row, column)
    images = cgn.interpolate(hand, what)
    assert images.shape[:2] == (10, 10)
    assert nearly(images[9, 0], made_by_hand(hand, *drawn_by_hand(0, 18))[3])
    with pytest.raises(ValueError, match="cannot interpolate 'color'"):
        cgn.interpolate(hand, "color")


def test_triples_have_the_given_labels_and_the_same_noise():
    hand, labels = HandCGN(), [[1, 2, 3], [4, 4, 0]]
    for images, seed, columns in ((cgn.triples(hand, labels, 6, 2), 6, 2), (cgn.triples(hand, labels), 0, 4)):
        assert images.shape == (2, columns, 3, 4, 4)
        for row, column in itertools.product(range(2), range(columns)):
            u, _, cells = drawn_by_hand(seed, column)
            expected = made_by_hand(hand, u, torch.tensor(labels[row]), cells)[3]
            assert torch.equal(images[row, column], expected)


def test_the_triples_of_figure_24():
    names = list(biggan.class_numbers(",".join(map(str, range(1000))), 1000).values())
    rows = [[names[label] for label in cgn.parse_classes(text, names, 3)] for text in cgn.FIGURE_24]
    assert len(rows) == 25 and rows[0] == ["school bus", "giant panda", "geyser"]
    assert rows[13] == ["drilling platform", "ambulance", "breakwater"]
    assert rows[24] == ["teapot", "military uniform", "baseball"]


PARTS, PAIRS = ["pre-mask", "m", "f", "b", "x_gen"], [f"pair {row}" for row in range(10)]


@pytest.mark.parametrize("options, rows, columns, truncation", [
    ("", ["c0", "c1", "c2", "c3", "c4"], PARTS + ["counterfactuals"] * 8, 0.5),
    ("--outputs c3", ["c3"] * 6, PARTS + ["counterfactuals"] * 3, 0.5),
    ("--triples 1,2,3 c4,4,4", ["c1 / c2 / c3", "c4 / c4 / c4"], ["shape / texture / background"] * 4, 0.5),
    ("--interpolate all", PAIRS, ["all"] * 10, 0.7),
    ("--interpolate shape --classes c1 4 --truncation 1", PAIRS, ["shape: c1 → c4"] * 10, 1.0)])
def test_sheets_of_either_scale(hand, sheets, tmp_path, options, rows, columns, truncation):
    command = "--checkpoint", "HAND", "--out", tmp_path / "a.png", *options.split(), "--seed", 2
    hand.resolution = 64
    cgn_works(*command)
    (path, images, *names, _), = sheets
    assert path == tmp_path / "a.png" and names == [rows, columns] and hand.seen == (truncation, False)
    if "triples" in options:
        assert torch.equal(images, cgn.triples(hand, [[1, 2, 3], [4, 4, 4]], 2))
    if "interpolate" in options:
        ends = (1, 4) if "classes" in options else None
        assert torch.equal(images, cgn.interpolate(hand, options.split()[1], 2, ends=ends))
        hand.resolution = 65
        cgn_works(*command)
        assert sheets[1][1].shape[:2] == (4, 8)


# Options | words of the one line that refuses them.
MISTAKES = """\
--checkpoint HAND --triples 1,2 | '1,2' names 2 classes: 3 are needed
--checkpoint HAND --triples 1,2,5 | '5' | 0..4
--checkpoint HAND --outputs 'c 3' | did you mean c3
--checkpoint HAND --outputs 1 --interpolate all | --interpolate and --outputs | one at a time
--checkpoint HAND --counterfactuals 0 | at least 1
--checkpoint HAND --counterfactuals 5 --per-shape -1 | at least 1
--checkpoint HAND --outputs 1 --steps 5 | --steps | means nothing
--checkpoint nowhere.pt --counterfactuals 5 | nowhere.pt | train first
--checkpoint README.md --counterfactuals 5 | README.md | no checkpoint
--counterfactuals 3 | --checkpoint
--dataset nope | 'nope' | colored | folder
--steps 0 | --steps 0 | at least 1
--set lr=-1.0 | more than 0
--margin 16 | --margin 16 | 0..15
--interval 0.9 0.1 | 0.9 0.1 | lower one first
--variance -1 | variance -1
--seed -1 | --seed -1
--seed 9223372036854775808 | 9223372036854775808 | 2^63
--device nowhere | --device nowhere | cpu
--device cuda:99 | --device cuda:99
--mini | --mini | means nothing | colored
--out README.md | README.md is a file
--dataset imagenet --model gan | --model | means nothing
--dataset imagenet --mini --set accumulate=0 | accumulate 0
--dataset imagenet --mini --without shape text bg rec | no loss"""


@pytest.mark.parametrize("mistake", MISTAKES.splitlines())
def test_mistakes_are_one_line(mistake, hand, tmp_path, few_images):
    options, *words = mistake.split(" | ")
    cgn_refuses(("--out", tmp_path / "x.png", *shlex.split(options)), *words)


def test_torchrun_is_refused_where_processes_would_do_the_same_work(tmp_path, monkeypatch, hand):
    run.one_process("--x")
    monkeypatch.setenv("WORLD_SIZE", "2")
    cgn_refuses(("--dataset", "colored", "--out", tmp_path / "run"), "one process", "torchrun")
    cgn_refuses(("--checkpoint", "HAND", "--out", tmp_path / "a.png"), "one process")
    assert not (tmp_path / "run").exists()


def test_a_photo_keeps_its_object_or_its_background_at_its_own_size(imagenet_checkpoint, monkeypatch):
    model = cgn.load(imagenet_checkpoint)
    photo = Image.fromarray(np.random.default_rng(0).integers(256, size=(24, 40, 3), dtype=np.uint8))
    mask, sides = Image.new("L", (40, 24)), []
    mask.paste(255, (0, 0, 10, 24))                                 # the object is the left quarter
    monkeypatch.setattr(u2net, "saliency", lambda network, photo, side: sides.append(side) or mask)
    u, own = model.draw(cgn.rng(0, 0))[0], F_image.pil_to_tensor(photo)

    def drawn(mechanism, u, label):
        made = mechanism(u[None], torch.tensor([label]))
        return cgn.to_uint8(F.interpolate(made, (24, 40), mode="bilinear", antialias=True))[0]

    f, b = drawn(model.texture, u[1], 3), drawn(model.background, u[2], 4)
    for labels, object_, behind in (((None, None), own, own), ((3, None), f, own), ((None, 4), own, b)):
        image = cgn.recompose(model, photo, u, *labels)
        assert torch.equal(image[..., :10], object_[..., :10])
        assert torch.equal(image[..., 10:], behind[..., 10:])
    assert sides == [32] * 3


def test_a_folder_of_photos_becomes_one_that_the_ensemble_trains_on(imagenet_checkpoint, tmp_path):
    for name in ("3", "1"):
        for file in ("a.png", "b.png"):
            mnist_variants.save_png(tmp_path / "in" / name / file, Image.new("RGB", (20, 30), (90, 40, 200)))
    options = ("--checkpoint", imagenet_checkpoint, "--photo", tmp_path / "in")
    cgn_works(*options, "--texture", "any", "--background", "2", "--seed", 5, "--out", tmp_path / "out")
    model, files = cgn.load(imagenet_checkpoint), mnist_variants.labelled_files(tmp_path / "out")
    drawn = [model.draw(cgn.rng(5, index)) for index in range(4)]
    expected = [(shape, int(y[1]), 2) for shape, (_, y, _) in zip((1, 1, 3, 3), drawn)]
    assert [labels for _, labels in files] == expected
    classify.check_labels(tmp_path / "out", cgn.class_names(model), files)
    photo, (u, y, _) = Image.new("RGB", (20, 30), (90, 40, 200)), drawn[3]
    assert torch.equal(picture(files[3][0]), cgn.recompose(model, photo, u, int(y[1]), 2))
    assert picture(tmp_path / "out-preview.png").shape[0] == 3


@pytest.mark.parametrize("options, words", [
    ((), ("--texture", "--background")), (("--texture", "10"), ("'10'", "0..9")),
    (("--texture", "1", "--out", "photo.png"), ("photo.png", "is what is read"))])
def test_a_mistake_with_a_photo_is_one_line(imagenet_checkpoint, trained, tmp_path, monkeypatch, options,
                                            words):
    monkeypatch.chdir(tmp_path)
    mnist_variants.save_png("photo.png", Image.new("RGB", (40, 40)))
    cgn_refuses(("--checkpoint", imagenet_checkpoint, "--photo", "photo.png", *options), *words)
    cgn_refuses(("--checkpoint", trained / "checkpoint.pt", "--photo", "photo.png", *options), "no U-2-Net")


# --------------------------------------------------------------------------------------------------- classify

def classify_run(*options):
    result = script("classify.py", *options)
    assert result.returncode == 0, result
    return result.stdout


def classify_refused(options, *words):
    one_line(script("classify.py", *options), *words)


@pytest.mark.parametrize("training", (True, False))
def test_the_classifier_is_the_papers(training):
    torch.manual_seed(0)
    model = classify.Classifier().double().train(training)
    for tensor in (*model[0].parameters(), *list(model[0].buffers())[:2]):
        torch.nn.init.uniform_(tensor, 0.5, 1.5)
    plain, x = copy.deepcopy(model), torch.rand(8, 3, 32, 32, dtype=torch.double)
    scores, h, sizes = model(x), x, []
    for layer in plain:                             # the model folds the first two into one
        h = layer(h)
        sizes.append(tuple(h.shape[1:]))
    assert sizes[1::3] == [(32, 28, 28), (32, 14, 14), (64, 7, 7), (64, 1, 1)] and sizes[-1] == (10,)
    assert torch.allclose(scores, h, rtol=1e-9)
    for name in ("running_mean", "running_var"):
        assert torch.allclose(getattr(model[0], name), getattr(plain[0], name))
    for found in (scores, h):
        F.cross_entropy(found, torch.arange(8)).backward()
    assert all(torch.allclose(a.grad, b.grad, atol=1e-12)
               for a, b in zip(model.parameters(), plain.parameters()))


def test_a_batch_mixes_its_sources_in_the_stated_numbers_by_seed_and_step_alone():
    images, labels = tiny_data()
    (x, y), (_, other) = classify.mixed([(images, labels, 4), (images, labels + 10, 60)], 1, "cpu")(7)
    assert x.shape == (4, 3, 32, 32) and y.max() < 10 <= other.min() and len(other) == 60
    assert torch.equal(x, cgn.to_float(images[cgn.rng(1, 7).integers(64, size=4)]))
    method = classify.METHODS["original+cgn"]
    first, again = (classify.train(method, [(images, labels, 8)], 4, seed=1) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters()))
    assert torch.equal(classify.predict(first, images), first(cgn.to_float(images)).argmax(dim=1))


def test_fit_takes_a_step_of_every_optimizer_and_schedule_and_says_how_far_it_is(capsys, monkeypatch):
    def objective(model, batch, progress):
        assert batch == pytest.approx(300 * progress) and model.training
        return (model.weight - 2).square().sum() + (model.bias + 1).square().sum()

    def optimizers(model, steps):
        schedule = types.SimpleNamespace(step=lambda: scheduled.append(steps))
        return [(torch.optim.SGD([model.weight], 0.5), None), (torch.optim.SGD([model.bias], 0.5), schedule)]

    clock, scheduled = itertools.count(0, 4), []
    monkeypatch.setattr(time, "time", lambda: next(clock))
    model = classify.fit(torch.nn.Linear(1, 1), lambda step: 10 * step, objective, 30, optimizers,
                         report="name")
    assert (model.weight.item(), model.bias.item()) == pytest.approx((2, -1)) and not model.training
    assert scheduled == [30] * 30
    lines = capsys.readouterr().out.splitlines()            # within ten seconds, then every thirty, of 120
    assert 4 <= len(lines) <= 5 and all(line.startswith("name: ") and "of 30" in line for line in lines)


def test_the_irm_penalty_is_the_squared_derivative_by_a_dummy_scale():
    generator = torch.Generator().manual_seed(0)
    half, y = torch.randn(6, 10, dtype=torch.float64, generator=generator), torch.arange(6)
    z = half.repeat_interleave(2, dim=0)                    # both halves of the batch are the same
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    derivative, = torch.autograd.grad(F.cross_entropy(scale * half, y), scale)
    assert abs(classify.irm_penalty(z, y.repeat_interleave(2)) - derivative ** 2) < 1e-12
    with pytest.raises(ValueError, match="not 1"):
        classify.irm_penalty(z[:1], y[:1])
    half, same = half.float(), torch.nn.Identity()
    worlds = [(half, y), (-half, y)]
    risk = classify.erm(same, worlds, 0.5)
    penalty = (classify.irm_penalty(half, y) + classify.irm_penalty(-half, y)) / 2
    for progress in (0.0, 0.5):                             # at first the plain risk
        wanted = risk + 3 * progress * penalty
        assert abs(classify.irm(same, worlds, progress, weight=3.0) - wanted) < 1e-5


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
    pairs = zip(model.classifier.parameters(), plain.classifier.parameters())
    changed = [not torch.equal(a, b) for a, b in pairs]
    assert changed == [True] * 6 + [False] * 6      # the features: a batch norm and two convolutions
    x, means = cgn.to_float(tiny_data()[0]), []
    gain, shift = torch.tensor([[0.5, 0.8, 2.0], [0.2, 0.0, -0.1]])[:, :, None, None]
    assert torch.allclose(model(x), model(gain * x + shift), atol=0.01)
    for place in (3, 5):                            # features too are normalised in each image
        model.classifier[place][0].register_forward_hook(
            lambda norm, given, found: means.append(found.mean(dim=(2, 3)).abs().max()))
    model(x)
    assert len(means) == 2 and max(means) < 1e-4


def test_settings_of_classifiers_are_the_papers():
    methods, tables = classify.METHODS, classify.TABLES
    assert [*methods["irm-2"].batch] == ["0.9", "1.0"]                              # C.4
    assert [*methods["irm-5"].batch] == ["0.9", "0.925", "0.95", "0.975", "1.0"]
    assert methods["original"].optimizers.keywords == {"lr": 1.0, "decay": 0.7, "epochs": 10}
    assert [tables[name] for name in ("seeds", "count", "per_shape")] == [[0, 1, 2], 100_000, 10]
    wanted = {"network": "resnet50", "heads": 3, "batch": 256, "ratio": 1, "epochs": 70, "lr": 0.1,
              "momentum": 0.9, "weight_decay": 1e-4, "milestones": [30, 60], "decay": 0.001, "side": 224}
    assert {name: classify.ENSEMBLE[name] for name in wanted} == wanted
    options = [action for action in classify.build_parser()._actions if action.dest != "help"]
    assert len(options) <= 28 and all(action.default in (None, False) for action in options)


def test_the_table_runs_end_to_end_and_is_not_computed_twice(tmp_path, few_images, monkeypatch):
    methods, results = ("irm-2", "lntl", "original+gan"), tmp_path / "results.jsonl"
    options = ("--dataset", "colored", "--seeds", 0, "--count", 100, "--steps", 3, "--runs", tmp_path)
    command = (*options, "--set", "generator_steps=1", "--method")
    said = classify_run(*command, *methods)
    assert re.search(r"\| original\+gan \| \d+\.\d \| \d+\.\d \|", said)            # of one seed no deviation
    rows = run.read_lines(results)
    assert [row["steps"] for row in rows] == [9, 2, 3] and all(0 <= row["test"] <= 1 for row in rows)
    assert all(row.keys() >= {"threads", "processor", "torch", "device", "seconds"} for row in rows)
    paths = re.findall(r"\S+classifier\.pth", classify_run(*command, *methods))
    assert run.read_lines(results) == rows and len(paths) == 3                      # each is kept, and said
    classify.read_classifier(paths[2])

    def added(*more):
        before = len(run.read_lines(results))
        classify_run(*command, "lntl", *more)
        return len(run.read_lines(results)) - before

    monkeypatch.setattr(classify, "bf16_pays", lambda wanted, device: wanted)
    assert [added("--bf16"), added("--variance", 0.1), added("--threads", 1)] == [1, 1, 0]
    other = classify.METHODS["lntl"]._replace(objective=partial(classify.lntl, reversal=3.0))
    monkeypatch.setitem(classify.METHODS, "lntl", other)            # whatever changes a number is in the key
    assert [added(), added()] == [1, 0]
    other = (*options, "--set", "generator_steps=2", "--method", "original+gan")
    classify_refused(other, "colored-gan-0", "another")


def test_a_given_cgn_or_set_of_counterfactuals_trains_a_classifier(trained, tmp_path, few_images):
    checkpoint, file, runs = trained / "checkpoint.pt", tmp_path / "set.pt", tmp_path / "runs"
    command = ("--steps", 2, "--seeds", 0, "--runs", runs)
    said = classify_run(*command, "--cgn", checkpoint, "--count", 100)
    assert "| cgn |" in said and "| original+cgn |" in said and not (runs / "colored-cgn-0").exists()
    data = cgn.counterfactuals(cgn.load(checkpoint), 100, 0)
    run.save_state(file, {**data._asdict(), "names": []})
    given = (*command, "--counterfactuals", file, "--dataset", "colored")
    classify_run(*given, "--method", "cgn")
    a, b = (row for row in run.read_lines(runs / "results.jsonl") if row["method"] == "cgn")
    assert a["test"] == b["test"] and a["generator"] != b["generator"]              # the same images
    assert (a["count"], a["per_shape"]) == (100, 10)
    run.save_state(file, {**data._asdict(), "shape": data.shape + 10})
    classify_refused(given, "set.pt", "no set of digits")
    classify_refused((*command, "--cgn", checkpoint, "--method", "original"), "--method cgn")


def test_the_cause_is_looked_for_in_environments(tmp_path, monkeypatch, few_images):
    """A classifier that reads the foreground is right where it agrees with the class: as often as it does."""
    monkeypatch.setitem(mnist_variants.SPLITS, "test", slice(5000))
    load, names = mnist_variants.load, classify.LABELS

    def world(*given, **options):
        found = load(*given, **options)
        return found._replace(images=torch.stack(found[1:], dim=1))                 # all that it shows

    def train(method, sources, *more, **how):
        return torch.nn.ParameterDict({sources[0][1]: 1})

    monkeypatch.setattr(mnist_variants, "load", world)
    monkeypatch.setattr(classify, "load_source", lambda *given: mnist_variants.Variant(None, *names))
    monkeypatch.setattr(classify, "train", train)
    monkeypatch.setattr(classify, "predict", lambda model, images: images[:, names.index(*model)])
    said = classify_run("--make", "table5", "--dataset", "double-colored", "--seeds", 0, "--runs", tmp_path)
    rows = [list(map(float, line.split(" | ")[1:])) for line in said.replace(" |\n", "\n").splitlines()
            if line.startswith("| double")]
    for row, agreement in zip(rows, (90, 95, 100), strict=True):
        assert row == pytest.approx([100, agreement, agreement], abs=1)


def test_the_vae_loss_by_hand_and_its_picture(tmp_path, few_images):
    x, made = torch.ones(1, 3, 1, 1), torch.tensor([0.0, 1.0, -1.0]).view(1, 3, 1, 1)
    mean, log_variance = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, np.log(2.0)]])
    expected = (1 + 0 + 4) / 2 + 3 * (1 + (2 - 1 - np.log(2))) / 2
    assert classify.vae_loss(x, made, mean, log_variance, 3.0).item() == pytest.approx(expected)
    model, noise, x = classify.VAE(), torch.tensor([[1.0, -1.0]]), torch.zeros(1, 3, 32, 32)
    made, mean, log_variance = model(x, noise)
    assert torch.allclose(made, model.decoder(mean + noise * (log_variance / 2).exp()))
    classify_run("--make", "figure6", "--dataset", "colored", "--steps", 30, "--runs", tmp_path)
    picture = np.array(Image.open(tmp_path / "figure6-colored.png"))
    made = picture[18:, -10 * 66:].reshape(10, 66, 10, 66, 3)[:, :64, :, :64]       # without the white lines
    assert picture.shape[0] == 18 + 10 * 66 and made.max(axis=(1, 3, 4)).min() > 40     # none is black


def test_figure_7_counts_counterfactuals_of_one_and_of_ten_a_shape(tmp_path, monkeypatch):
    def cell(args, *what):
        assert what == ("colored", "original+cgn", 2, "shape", ("test",))
        return {"test": args.count / 10_000 + args.per_shape / 1000}

    monkeypatch.setattr(classify, "cell", cell)
    options = ("--make", "figure7", "--dataset", "colored", "--seeds", 2, "--count", 1000, "--runs", tmp_path)
    head, _, *rows = classify_run(*options).splitlines()
    assert head == "| colored: counterfactuals drawn | 1 per shape | 10 per shape |"
    assert rows == ["| 100 | 1.1 | 2.0 |", "| 1000 | 10.1 | 11.0 |", "| 10000 | – | 101.0 |"]


@pytest.mark.parametrize("options, words", [
    ("--count 0", "count 0"), ("--dataset imagenet", "ensemble needs --real"), ("--runs LICENSE", "LICENSE"),
    ("--set label=background --dataset colored", "no background label"), ("--cgn nowhere.pt", "nowhere.pt"),
    ("--make table5 --dataset colored", "no background label"), ("--workers 1", "--workers"),
    ("--dataset imagenet colored --real docs", "imagenet goes alone"), ("--ratio 1", "--ratio"),
    ("--dataset colored --out x", "--out"), ("--dataset colored --textures x", "--textures"),
    ("--dataset wildlife --variance 0.1", "--variance"), ("--make figure6 --method cgn", "--method")])
def test_a_mistake_with_classifiers_is_one_line(options, words):
    classify_refused(options.split(), words)


def test_tables_run_in_one_process(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    classify_refused(("--dataset", "colored"), "torchrun")


# ------------------------------------------------------------------------------------- classify: the ensemble

def draw_pictures(folder, *names):
    """Pictures of 40 x 36 pixels that differ in a colour, and from left to right and top to bottom."""
    ramp = Image.linear_gradient("L").resize((40, 36))
    for place, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        color = Image.new("L", ramp.size, 20 * place)
        Image.merge("RGB", (ramp, ramp.rotate(90), color)).save(folder / name)


def shufflenet(classes=1000):
    torch.manual_seed(0)
    return torchvision.models.get_model("shufflenet_v2_x0_5", num_classes=classes)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Two classes of five pictures in subfolders, six counterfactuals as cgn.py writes them."""
    root = tmp_path_factory.mktemp("pictures")
    draw_pictures(root / "real", *(f"{name}/{place}.png" for name in ("ant", "bee") for place in range(5)))
    draw_pictures(root / "made", *(f"{place}.png" for place in range(6)))
    rows = [f"{place}.png,{place % 2},{place // 2 % 2},{place // 4}\n" for place in range(6)]
    (root / "made" / "labels.csv").write_text(f"file,shape,texture,background\n{''.join(rows)}")
    torch.save(shufflenet().state_dict(), root / "weights.pth")
    return root


def ensemble_options(pictures, out, *more, made=None, **settings):
    values = {"network": "shufflenet_v2_x0_5", "weights": pictures / "weights.pth", "side": 32, "batch": 4,
              "epochs": 2, "lr": 0.01, "save_every": 1, **settings}
    made = made or ("--counterfactuals", pictures / "made")
    return list(map(str, ("--dataset", "imagenet", "--real", pictures / "real", "--workers", 1, *made,
                          "--threads", 1, "--out", out, *more,
                          "--set", *(f"{key}={value}" for key, value in values.items()))))


def ensemble_losses(out):
    return [row["loss"] for row in run.read_lines(out / "log.jsonl")[1:]]


def test_ensemble_loss_by_hand():
    real = torch.tensor([[[2.0, 0.0], [0.0, 0.0], [1.0, 0.0]]])                     # mean scores 1, 0
    made = torch.tensor([[[3.0, 0.0], [0.0, 3.0], [0.0, 0.0]]] * 2)                 # two counterfactuals
    y, labels, alone = torch.tensor([0]), torch.tensor([[0, 1, 1], [0, 1, 1]]), np.log(1 + np.exp(-1))
    expected = alone + 2 * np.log(1 + np.exp(-3)) + np.log(2)                       # each a mean over images
    for count, smoothing, wanted in ((2, 0.0, expected), (0, 0.0, alone), (2, 0.2, expected + 0.1 * 7)):
        found = classify.ensemble_loss(real, y, made[:count], labels[:count], smoothing)
        assert found.item() == pytest.approx(wanted)                                # 7: the margins' sum


def test_an_ensembles_heads_are_new_and_its_batch_norms_stay():
    network = shufflenet(6)
    model, x = classify.Ensemble(copy.deepcopy(network)).train(), torch.randn(2, 3, 32, 32)
    weights = [network.fc.weight, *(head.weight for head in model.heads)]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(weights, 2))
    scores, norm = model(x), model.backbone.conv1[1]
    assert scores.shape == (2, 3, 6) and torch.equal(scores[:, 1], model.heads[1](model.backbone(x)))
    assert not norm.running_mean.any()
    model.frozen = False                                                            # as from random weights
    model.train()(x)
    assert norm.running_mean.any()


def test_what_a_network_draws_itself_depends_on_seed_and_step_alone(tmp_path):
    """So dropout is the same in a run that was stopped."""
    config = {**classify.ENSEMBLE, "seed": 3, "steps": 3, "milestones": [], "bf16": False, "log_every": 1,
              "saves": (3,)}
    for out in (tmp_path / "0", tmp_path / "1"):
        torch.manual_seed(0)
        network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(), torch.nn.Linear(192, 5))
        model, batch = classify.Ensemble(network), (torch.ones(4, 3, 8, 8), torch.arange(4))
        torch.manual_seed(int(out.name))
        classify.train_ensemble(config, model, lambda first: itertools.repeat(batch), None, out)
    assert ensemble_losses(tmp_path / "0") == ensemble_losses(tmp_path / "1")


def test_each_epoch_holds_every_picture_once(pictures):
    files = [(path, (k,)) for k, (path, _) in enumerate(mnist_variants.labelled_files(pictures / "made"))]
    items, share = (classify.Items(classify.random_pictures, files, 3, 32, 1, part)
                    for part in (slice(None), slice(1, None, 2)))
    (x, y), (_, other) = items[0], items[1]
    assert sorted(torch.cat([y, other]).flatten().tolist()) == list(range(6))
    assert x.shape == (3, 3, 32, 32) and x.dtype == torch.uint8     # as it goes through shared memory
    assert not torch.equal(items[2][1], y) and torch.equal(items[0][0], x)
    assert torch.equal(share[0][0], x[1::2])


@beside
def test_the_ensemble_trains_the_same_stopped_or_not_alone_or_in_two_processes(pictures, tmp_path):
    whole, parts, two = (tmp_path / name for name in ("whole", "parts", "two"))
    said = classify_run(*ensemble_options(pictures, whole))
    assert "10 real images, 2 classes, 6 counterfactuals; 6 steps of 4 + 4" in said
    (tmp_path / "stop.py").write_text(f"""
import multiprocessing, os, signal, sys, time
sys.path.insert(0, {str(HERE)!r})
import classify, u2net
open_photo, normalise, calls = u2net.open_photo, u2net.normalise, []
def slow(*arguments, **options):                                # the signals meet workers at their work
    time.sleep(0.1)
    return open_photo(*arguments, **options)
def stop(x):
    calls.append(1)
    if len(calls) == 2:
        for worker in multiprocessing.active_children():
            os.kill(worker.pid, signal.SIGINT)
        os.killpg(0, signal.SIGTERM)
    return normalise(x)
u2net.open_photo, u2net.normalise = slow, stop
if __name__ == "__main__":
    os.setpgrp()
    multiprocessing.set_start_method("forkserver")
    classify.main({ensemble_options(pictures, parts)})
""")
    stopped = process(tmp_path / "stop.py")
    assert stopped.returncode == 130 and "the same command continues" in stopped.stderr, stopped
    before, _, after = stopped.stderr.partition("the same command continues")
    assert "Traceback" not in before and "KeyboardInterrupt" not in after   # Python may find its server gone
    assert run.read_checkpoint(parts / "checkpoint.pt")["step"] == 2
    classify_run(*ensemble_options(pictures, parts))
    a, b = (run.read_checkpoint(out / "checkpoint.pt")["ensemble"] for out in (whole, parts))
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert ensemble_losses(parts) == ensemble_losses(whole)
    result = process(*torchrun(2, 29534), "classify.py", *ensemble_options(pictures, two))
    assert result.returncode == 0, result.stderr
    assert ensemble_losses(two) == pytest.approx(ensemble_losses(whole), abs=1e-5)
    said = classify_run("--checkpoint", whole / "checkpoint.pt", "--say", pictures / "real/ant/0.png")
    assert re.fullmatch(r"(an ant|a bee) shape with (ant|bee) texture on (an ant|a bee) background "
                        r"\(shape \d+ %, texture \d+ %, background \d+ %\)\n", said), said


def test_a_run_continues_whatever_changes_no_result(pictures, tmp_path, monkeypatch):
    out, weights = tmp_path / "run", tmp_path / "weights.pth"
    classify_run(*ensemble_options(pictures, out, epochs=1))
    shutil.copy(pictures / "weights.pth", weights)
    monkeypatch.chdir(pictures)
    other = ensemble_options(pictures, out, "--real", "real/../real", "--workers", 0, "--heads", 3,
                             weights=weights, save_every=2, made=("--counterfactuals", "made/"))
    assert "at step 3" in classify_run(*other)                      # more epochs, paths elsewhere
    for change in ({"batch": 2}, {"milestones": "[1]"}, {"smoothing": 0.1}):
        classify_refused(ensemble_options(pictures, out, **change), *change)


def test_workers_that_are_left_behind_do_not_keep_the_process():
    code = "import classify; kept = classify.Items(float).ahead(range(99), 1); next(kept); print('end')"
    result = process("-c", code)
    assert result.returncode == 0 and result.stdout == "end\n" and not result.stderr, result


def test_a_worker_that_fails_or_dies_is_one_line(pictures, tmp_path, monkeypatch):
    normalise, calls = u2net.normalise, []

    def kill(x):
        calls.append(1)
        if len(calls) == 2:
            torch.multiprocessing.active_children()[0].kill()
            time.sleep(20)                          # the signal of the child's end comes now
        return normalise(x)

    def full(*arguments):
        raise RuntimeError("unable to write to file </torch_123_456_7>: No space left on device (28)")

    monkeypatch.setattr(u2net, "normalise", kill)
    classify_refused(ensemble_options(pictures, tmp_path / "run"), "DataLoader worker", "killed", "--workers")
    assert run.read_checkpoint(tmp_path / "run" / "checkpoint.pt")["step"] == 1
    monkeypatch.setattr(classify, "crop_and_flip", full)
    classify_refused(ensemble_options(pictures, tmp_path / "run2"), "No space left", "shared", "--workers")
    run.end_workers()                          # else torch waits for them, ten seconds


def test_an_ensemble_draws_its_counterfactuals_from_a_cgn(imagenet_checkpoint, monkeypatch):
    """They are those of the CGN's data set, cropped and flipped like pictures of files."""
    model = cgn.load(imagenet_checkpoint)
    x, labels = next(classify.drawn_pictures(model, 4, 24, seed=1, per_shape=2, share=slice(1, 3), first=3))
    assert x.shape == (2, 3, 24, 24) and 0 <= x.min() and x.max() <= 1
    assert torch.equal(labels, cgn.draw(model, 1, range(13, 15), 2)[1].T)
    ramp = torch.arange(32.0).expand(2, 3, 32, 32) / 16 - 1     # what is seen tells the place and the mirror
    made = cgn.Sample(None, None, None, ramp), torch.zeros(3, 2).long()
    monkeypatch.setattr(cgn, "counterfactual_batch", lambda *arguments: made)
    drawn = classify.drawn_pictures(model, 2, 24, 1, 1, slice(None), 0)
    seen = torch.cat([next(drawn)[0][:, 0, 0] for _ in range(20)])
    assert len(set(seen[:, 0].tolist())) > 30                   # each another part ..
    assert 8 < (seen[:, 0] > seen[:, -1]).sum() < 32            # .. about half of them mirrored


@pytest.fixture(scope="module")
def imagenet_ensemble(tmp_path_factory):
    """A checkpoint of an ensemble of 1,000 classes whose heads always answer airplane, bear and dog."""
    path = tmp_path_factory.mktemp("ensemble") / "checkpoint.pt"
    model = classify.Ensemble(shufflenet())
    for head, label in zip(model.heads, (404, 294, 152)):
        torch.nn.init.zeros_(head.weight)
        torch.nn.init.zeros_(head.bias)
        head.bias.data[label] = 5.0 + (label == 404)
    names = [f"n{number:08d}" for number in range(1000)]
    config = {"network": "shufflenet_v2_x0_5", "heads": 3, "names": names, "side": 32}
    torch.save({"config": config, "step": 1, "ensemble": model.state_dict()}, path)
    return path


def test_each_head_is_judged_on_cue_conflict_and_its_table_says_why(imagenet_ensemble, tmp_path):
    cue, table = tmp_path / "cue", tmp_path / "table.csv"
    draw_pictures(cue / "any", "airplane1-bear2.png", "bear1-airplane3.png", "dog1-dog2.png",
                  "dog1-airplane1.png")
    command = ("--checkpoint", imagenet_ensemble, "--workers", 0, "--cue-conflict", cue, "--out")
    said = classify_run(*command, table)
    assert "| shape bias | by shape | by texture | images |" in said
    assert "| shape | 33.33 % | 1 | 2 | 4 |" in said
    assert "| background | 100.00 % |" in said and "| average | 33.33 % |" in said  # the first is the surest
    assert [row["shape"] for row in evaluate.read_table(table)] == ["airplane"] * 4
    classify_refused((*command, imagenet_ensemble), "what is read")
    (cue / "dog1-bear1.png").write_text("no picture")
    classify_refused((*command, table, "--workers", 1), "dog1-bear1.png does not open")
    run.end_workers()                          # else torch waits for it, ten seconds
    draw_pictures(cue, "cat.png")
    classify_refused((*command, table), "cat.png", "airplane1-bicycle2.png")
    classify_refused((*command[:5], cue / "none"), "no pictures")


def test_each_head_is_judged_on_imagenet_and_imagenet9(imagenet_ensemble, tmp_path):
    in9, val, made, table = (tmp_path / name for name in ("in9", "val", "made", "table.csv"))
    command = ("--checkpoint", imagenet_ensemble, "--workers", 0, "--out", table)
    for variation, more in (("original", ()), ("mixed_same", (0, 0, 4)), ("mixed_rand", (4, 4, 4))):
        names = [f"{label:02d}_name/{place}.JPEG" for place, label in enumerate((*range(9), *more))]
        draw_pictures(in9 / variation / "val", *names)
    (in9 / "fg_mask" / "val" / "00_name").mkdir(parents=True)       # as published: no pictures
    said = classify_run(*command, "--imagenet9", in9)
    assert "| texture | 33.33 % | 16.67 % | 11.11 % | -16.67 % |" in said           # bears are carnivores
    (in9 / "original" / "val" / "00_name").rename(in9 / "original" / "val" / "dog")
    classify_refused((*command, "--imagenet9", in9), "original", "00_dog")

    draw_pictures(val, *(f"n{name:08d}/{number}.png" for number, name in enumerate((404, 404, 294, 0))))
    assert "| shape | 4 | 50.00 % |" in classify_run(*command, "--imagenet", val)   # by name
    assert [len(row["average"].split()) for row in evaluate.read_table(table)] == [5] * 4
    draw_pictures(val, "cat/0.png")
    classify_refused((*command, "--imagenet", val), "'cat'")

    draw_pictures(made, "0.png", "1.png")           # counterfactuals: each head has its own label
    (made / "labels.csv").write_text("file,shape,texture,background\n0.png,404,294,152\n1.png,404,0,0\n")
    said = classify_run(*command, "--imagenet", made)
    for row in ("shape | 2 | 100", "texture | 2 | 50", "background | 2 | 50"):
        assert f"| {row}.00 % |" in said


def test_pictures_of_the_networks_size_are_seen_whole_and_as_they_are_meant_to_be(tmp_path):
    framed = np.full((224, 224, 3), 255, dtype=np.uint8)
    framed[14:-14, 14:-14] = 0

    def white(name, crop=True):
        seen = classify.score(lambda x: x, [str(tmp_path / name)], 224, crop)
        return (seen[0] == 1).float().mean().item()

    Image.fromarray(framed).save(tmp_path / "framed.png")
    assert white("framed.png") == white("framed.png", crop=False) == pytest.approx(1 - (196 / 224) ** 2)
    Image.fromarray(framed).resize((448, 448), Image.NEAREST).save(tmp_path / "large.png")
    assert white("large.png") < 0.02 < 0.2 < white("large.png", crop=False)         # 256 pixels, of these 224
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert white("clear.png") == 1


@pytest.mark.parametrize("change, settings, word", [
    (("--real", "docs"), {}, "docs"), (("--counterfactuals", "docs"), {}, "docs"),
    ((), {"network": "vit_b_16", "weights": "random"}, "pictures of 32"),
    ((), {"network": "raft_small", "weights": "random"}, "raft_small"),
    ((), {"weights": "requirements.txt"}, "requirements.txt"), ((), {"batch": 0}, "batch 0"),
    (("--ratio", "0.3"), {}, "ratio 0.3"), (("--ratio", "0"), {}, "ratio 0"),
    (("--steps", "3"), {}, "--steps")])
def test_mistakes_with_the_ensemble_are_one_line(pictures, tmp_path, change, settings, word):
    classify_refused(ensemble_options(pictures, tmp_path, *change, **settings), word)


def test_counterfactuals_of_other_classes_than_the_real_images_are_refused(pictures, imagenet_checkpoint,
                                                                           tmp_path):
    root = shutil.copytree(pictures, tmp_path / "p")
    options = ensemble_options(root, tmp_path / "run")
    drawn = ensemble_options(root, tmp_path / "run", made=("--cgn", imagenet_checkpoint))
    classify_refused(drawn, "10 classes", "2")
    (root / "made" / "settings.json").write_text('{"names": ["bee", "ant"]}')
    classify_refused(options, "bee, ant", "ant, bee")
    (root / "made" / "settings.json").write_text('{"names": ["ant", "bee"]}')
    assert "dry run finished" in classify_run(*options, "--dry-run")
    (root / "made" / "labels.csv").write_text("file,shape,texture,background\n0.png,1,1,2\n")
    classify_refused(options, "0..1")
    draw_pictures(root / "more", "ant/0.png")
    classify_refused((*options, "--real", root / "real", root / "more"), "other subfolders")


def test_a_checkpoint_of_another_network_is_named(imagenet_ensemble, tmp_path):
    state, other = run.read_checkpoint(imagenet_ensemble), tmp_path / "other.pt"
    for change, word in (({"heads": 1}, "heads.1.weight"), ({"heads": "3"}, "str")):
        torch.save({**state, "config": {**state["config"], **change}}, other)
        classify_refused(("--checkpoint", other, "--say", "a.jpg"),
                         "other.pt is no checkpoint of an ensemble", word)


def test_torchvisions_inception_reads_images_in_minus_one_to_one(tmp_path):
    model, path = torchvision.models.inception_v3(init_weights=False), tmp_path / "inception.pth"
    torch.save(model.state_dict(), path)
    x = torch.rand(1, 3, 299, 299) * 2 - 1
    assert torch.allclose(classify.read_classifier(path)(x), model.eval()(x), atol=1e-5)
    torch.save({"a": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="inception.pth is no state dict of inception_v3"):
        classify.read_classifier(path)


def test_disentanglement_of_perfect_and_hidden_mechanisms():
    """Labels are grey levels: the mask's in row 0, the foreground's in row 1, the background's in row 2."""
    labels = torch.arange(10).repeat(20)
    other = (labels + torch.randint(1, 10, labels.shape, generator=torch.Generator().manual_seed(0))) % 10

    def parts(y):
        level = (y / 9)[:, None, None, None].expand(-1, 3, 1, 4)
        one, nothing = torch.ones_like(level), torch.zeros_like(level)
        m, f, b = (torch.cat(rows, dim=2) for rows in
                   ((level, one, nothing), (one, level, level), (nothing, level, level)))
        return cgn.Sample(m[:, :1], f, b, None)

    readers = [lambda x, row=row: -(9 * x[:, 0, row, :1] - torch.arange(10)).abs() for row in range(3)]
    made, real = parts(labels), parts(other)[:3]
    assert torch.equal(classify.disentanglement(made, labels, real, readers), torch.eye(3))
    made.foreground[labels == 4, :, 1] = 0.0
    table = classify.disentanglement(made, labels, real, [*readers[:2], None])
    assert table[1, 1] == pytest.approx(0.9) and table[2].isnan().all()


def test_mechanisms_are_measured_on_draws_that_were_not_trained_on(trained, imagenet_checkpoint, tmp_path,
                                                                   few_images, monkeypatch):
    ask, reader = ("--make", "mechanisms", "--steps", 3, "--count", 12), cgn.WEIGHTS / "mini-classifier.pth"
    said = classify_run(*ask, "--cgn", trained / "checkpoint.pt")
    assert re.search(r"\| foreground (\| \d+\.\d ){3}\|\n\| background (\| nan ){3}\|\n", said)
    assert "12 draws of seed 4; the training's was 3" in said and "reader of foregrounds: " in said
    monkeypatch.setattr(mnist_variants, "SIZE", 28)                 # so that the other draws no digits
    said = classify_run(*ask, "--cgn", imagenet_checkpoint, "--set", "splits=2", f"inception={reader}")
    model = cgn.load(imagenet_checkpoint)
    sample = model(*cgn.draw_training(model, 4, range(12))[:2])
    mean, std = evaluate.mean_std(sample.mask.mean(dim=(1, 2, 3)).tolist())
    probabilities = classify.read_classifier(reader)(sample.image).softmax(dim=1)
    score, spread = evaluate.inception_score(probabilities, 2)
    assert (f"| {score:.2f} ± {spread:.2f} | {100 * mean:.1f} ± {100 * std:.1f} % | "
            f"{cgn.binary_entropy(sample.mask):.3f} bit |") in said                 # Table 1's row
    state, gan = run.read_checkpoint(trained / "checkpoint.pt"), tmp_path / "gan.pt"
    config = {**state["config"], "model": "gan"}
    torch.save({**state, "config": config, "average": cgn.build(config).state_dict()}, gan)
    classify_refused((*ask, "--cgn", gan), "gan.pt", "no mechanisms")


def test_masks_are_compared_in_pairs_and_read_by_class():
    masks = torch.zeros(4, 1, 32, 32)
    for mask, columns in zip(masks, (8, 16, 8, 16)):
        mask[..., :columns] = 0.9
    assert classify.pairwise_iou(masks[:3]) == pytest.approx((0.5 + 1 + 0.5) / 3)

    def reader(x):                                      # [-1, 1]: 8 columns are class 0, 16 class 1
        return F.one_hot((x[:, 2, 0] > 0.5).sum(dim=1) // 8 - 1, 2)

    table = classify.mask_table(masks, torch.tensor([0, 1, 0, 0]), reader, ["a"])
    entropy = -(0.9 * np.log2(0.9) + 0.1 * np.log2(0.1)) * (8 + 8 + 16) / 96
    assert table["all"]["read right"] == "75.0 %" and table["all"]["IoU of pairs"] == "0.667"
    assert table["a"]["read right"] == "66.7 %" and table["a"]["IoU of pairs"] == "0.667"
    assert float(table["a"]["entropy"].split()[0]) == pytest.approx(entropy, abs=2e-3)
    with pytest.raises(ValueError, match="1 masks of a class"):
        classify.pairwise_iou(masks[:1])


SHARES = dict(re.findall(r"\| `weights/cgn-(.*).pth` \| ([\d.]+) \|",
                         (HERE / "docs" / "results.md").read_text()))


@pytest.mark.parametrize("name", [name for name in SHARES if name in mnist_variants.NAMES])
def test_a_shipped_generator_draws_digits_that_are_read_in_every_class(name):
    """As many as the documents say, less one in a hundred."""
    path = HERE / "weights" / f"cgn-{name}.pth"
    drawn, _ = script("classify.py", "--make", "variety", "--cgn", path).stdout.split("masks of real digits")
    share, *classes = map(float, re.findall(r"\| ([\d.]+) %", drawn))
    assert share >= float(SHARES[name]) - 1 and len(classes) == 10 and min(classes) >= 80
    assert path.stat().st_size < 2e6


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
    change(cgn, "WITHOUT", {name: cgn.WITHOUT[name] for name in ("shape", "bg")})
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
    assert list(mini("table1")[1]) == ["all", "without shape", "without bg"]
    assert seen == [1, 1, 1]                                # other draws than the training
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

def forked(work, ranks=1):
    """Starts a process for each rank, and returns their numbers. They have one thread, as this one has."""
    port = str(29600 + os.getpid() % 3000)
    group = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "WORLD_SIZE": str(ranks)}
    children = []
    for rank in range(ranks):
        children.append(os.fork())
        if children[-1] == 0:
            code = 1
            try:
                os.environ.update(group, RANK=str(rank), LOCAL_RANK=str(rank))
                work()
                code = 0
            finally:
                os._exit(code)
    return children


def codes(children):
    return {os.waitpid(child, 0)[1] for child in children}


@beside
def test_runs_killed_at_twenty_random_moments_end_as_if_they_had_not_been(tmp_path, monkeypatch):
    """All processes of a run are killed; it is continued and compared with one left alone."""
    generator, path = np.random.default_rng(0), tmp_path / "saliency.pt"
    states = cgn.random_networks()
    torch.save(states[1], path)
    monkeypatch.setattr(cgn, "training_sheet", lambda *_: "no sheet")          # most of the time
    imagenet_run(states, tmp_path / "made", steps=1, accumulate=1, saliency=str(path))
    made, model = cgn.load(tmp_path / "made" / "checkpoint.pt"), imagenet_model(states)
    networks = biggan.load(states[0]), cgn.StyleFeatures(states[2])

    def imagenet(out):
        run.join_group("cpu")
        cgn.train_imagenet(imagenet_config(accumulate=2), model, *networks, out)

    runs = {"digits": (6, 1, lambda out: cgn.train(tiny_config(steps=4, saves=(1,)), *tiny_data(), out)),
            "imagenet, two ranks": (5, 2, imagenet), "classifier": (4, 1, tiny_ensemble),
            "data set, two ranks": (5, 2, lambda out: cgn.write_counterfactuals(made, out, 40, 1, 2, 2))}
    for kind, (kills, ranks, work) in runs.items():
        began, whole = time.time(), tmp_path / kind
        assert codes(forked(partial(work, whole), ranks)) == {0}
        seconds = time.time() - began
        for number in range(kills):
            out = tmp_path / f"{kind} {number}"
            children = forked(partial(work, out), ranks)
            time.sleep(generator.uniform(0, seconds))
            for child in children:
                os.kill(child, signal.SIGKILL)
            codes(children)
            for partly in out.glob("*.partial"):            # what a killed process was writing
                partly.unlink()
            assert codes(forked(partial(work, out), ranks)) == {0}
            assert run_result(out) == run_result(whole), (kind, number)
        print(f"{kind}: {kills} kills in runs of {seconds:.1f} s")


def tiny_ensemble(out):
    """20 steps of the ensemble's training on random pictures."""
    def batches(seed, *shape):
        def draws(first):
            for step in itertools.count(first):
                generator = torch.Generator().manual_seed(1000 * seed + step)
                labels = torch.randint(10, shape, generator=generator)
                yield torch.rand(4, 3, 32, 32, generator=generator), labels
        return draws

    torch.manual_seed(0)
    config = {**classify.ENSEMBLE, "seed": 0, "steps": 20, "lr": 0.01, "milestones": [9], "bf16": False,
              "log_every": 1, "saves": [1]}
    model = classify.Ensemble(classify.Classifier())
    classify.train_ensemble(config, model, batches(1, 4), batches(2, 4, 3), out)


def mutate(content, generator):
    """A damaged copy: a bit flipped, a piece overwritten, cut out or doubled, or the end missing."""
    a = int(generator.integers(1, len(content)))
    b = a + int(generator.integers(1, 64))
    flipped = bytes([content[a] ^ 1 << int(generator.integers(8))])
    return (content[:a] + flipped + content[a + 1:], content[:a] + generator.bytes(b - a) + content[b:],
            content[:a] + content[b:], content[:b] + content[a:], content[:a])[generator.integers(5)]


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
        "new.pt": (state, biggan.load, 3), "old.pt": (state, biggan.load, 3),
        "u2net.pt": (small.state_dict(), u2net.load, 1),
        "checkpoint.pt": ({"config": config, "step": 3, "average": {"a": torch.ones(5)}}, cgn.load, 10),
        "classifier.pt": (classify.Classifier().state_dict(), classify.read_classifier, 6),
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
            (labels, lambda path: mnist_variants._read_idx(path.parent, path.stem), 6),
            *((name, u2net.open_photo, 15) for name in pictures),
            *((name, reader, 15) for name, (_, reader) in texts.items())]


@beside
def test_ten_thousand_damaged_files_are_read_or_refused(tmp_path):
    """For all readers: each is read, or refused with ValueError, in ten seconds and 2 GiB."""
    def late(*_):
        raise TimeoutError("ten seconds")

    count, outcomes, generator = 10_000, {"read": 0, "refused": 0}, np.random.default_rng(0)
    readers = files_and_readers(tmp_path, generator)
    total = sum(share for *_, share in readers)
    signal.signal(signal.SIGALRM, late)
    warnings.simplefilter("ignore")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for place, (name, reader, share) in enumerate(readers):
        whole, path = (tmp_path / name).read_bytes(), tmp_path / str(place) / name
        path.parent.mkdir()
        for number in range(-(-count * share // total)):
            path.unlink(missing_ok=True)                    # what is mapped stays as it is
            path.write_bytes(mutate(whole, generator))
            signal.alarm(10)
            try:
                reader(path)
                outcomes["read"] += 1
            except ValueError:
                outcomes["refused"] += 1
            except BaseException as error:
                raise AssertionError(f"{path} number {number}: {type(error).__name__}: {error}") from error
            finally:
                signal.alarm(0)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2 ** 20
    assert grown < 2, f"{grown} GiB"
    assert sum(outcomes.values()) >= count and min(outcomes.values()) > 1000, outcomes


GROUND = {
    "mnist_variants": "import mnist_variants as m; print(m.draw_textures().shape)",
    "evaluate": "import evaluate, torch; print(evaluate.accuracy(torch.tensor([1]), torch.tensor([1])))",
    "biggan": "import biggan; biggan.main(['--dry-run', '--classes', '0,ostrich'])",
    "u2net": "import u2net, torch; u2net.load(u2net.U2Net().state_dict())(torch.zeros(1, 3, 32, 32))",
    "run": "import run; print(run.find_device())"}


@pytest.mark.parametrize("module", GROUND)
def test_a_ground_floor_file_works_when_copied_alone(tmp_path, monkeypatch, module):
    shutil.copy(HERE / f"{module}.py", tmp_path)
    monkeypatch.chdir(tmp_path)
    elsewhere = [path for path in sys.path if Path(path).resolve() not in (HERE, tmp_path)]
    monkeypatch.setattr(sys, "path", [str(tmp_path), *elsewhere])
    for name in (*GROUND, "cgn", "classify", "miniature"):
        monkeypatch.delitem(sys.modules, name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exec(GROUND[module], {})
    assert Path(sys.modules[module].__file__).parent == tmp_path


def test_imports_run_one_way():
    """At any depth; what stands on the ground floor is tested above."""
    order = ("run", "biggan", "u2net", "mnist_variants", "evaluate", "cgn", "classify", "miniature")
    for place, module in enumerate(order):
        text = (HERE / f"{module}.py").read_text()
        assert not {*re.findall(r"^\s*(?:import|from) (\w+)", text, re.M)} & {*order[place:]}, module


def documented_commands():
    """(module, arguments) of each `python X.py ..` and `torchrun .. X.py ..` of README and docs."""
    pattern = re.compile(r"^(?:python|torchrun [^\n]*?) ?(\w+)\.py ?([^\n]*)", re.M)
    text = "\n".join(path.read_text() for path in (HERE / "README.md", *(HERE / "docs").glob("*.md")))
    found = pattern.findall("\n".join(re.findall(r"```sh\n(.*?)```", text, re.S)))
    return [*dict.fromkeys((module, arguments) for module, arguments in found if module != "test_cgn")]


def test_every_documented_command_is_understood():
    commands = documented_commands()
    assert len(commands) >= 20
    for module, arguments in commands:
        sys.modules[module].build_parser().parse_args(shlex.split(arguments))


@pytest.mark.parametrize("arguments", [arguments for module, arguments in documented_commands()
                                       if module == "cgn" and "--dataset" in arguments])
def test_documented_trainings_run_dry_anywhere_and_keep_nothing(arguments, tmp_path, monkeypatch, few_images):
    for name in ("a/1.png", "b/2.png"):
        mnist_variants.save_png(tmp_path / "folder" / name, Image.new("RGB", (40, 40), "red"))
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    monkeypatch.setattr(cgn, "training_sheet", lambda *_: "no sheet")
    arguments = arguments.replace("--textures path/to/dtd", "").replace("path/to/folder", "../folder")
    result = script("cgn.py", *arguments.split(), "--dry-run")
    assert result.returncode == 0 and "dry run finished" in result.stdout, result.stderr
    assert not any(Path().iterdir())


def test_a_dry_run_works_in_three_processes():
    dry = partial(cgn.main, ["--dataset", "imagenet", "--dry-run", "--device", "cpu"])
    assert codes(forked(dry, 3)) == {0}


@beside
def test_the_measurements_pass_as_a_dry_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OUT", str(tmp_path))
    for what in ("step", "draw", "image", "memory", "parts", "gpu"):
        measure(what, "--dry-run")
    before, _, table = capsys.readouterr().out.partition("| measured |\n|---|---|\n")
    assert "micro-step, float32: " in before and "peak memory of one counterfactual image: " in before
    assert table and "failed" not in table and "NOT" not in table, table
    assert len(json.loads((tmp_path / "gpu.json").read_text())) == len(table.splitlines())


def test_the_documented_python_saves_a_picture(tmp_path, monkeypatch):
    (tmp_path / "weights").symlink_to(HERE / "weights")
    monkeypatch.chdir(tmp_path)
    for block in re.findall(r"```py\n(.*?)```", (HERE / "README.md").read_text(), re.S):
        exec(block, {})
    assert list(tmp_path.glob("*.png"))


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

class FullSize:
    """An ImageNet CGN of random weights of the released sizes, or of other files, and all that its training
    takes. A method that begins with `measure_` is a command."""

    def __init__(self, files, device="cpu", frozen=False, mechanisms=None, kind="imagenet", **changes):
        self.files, self.device = files, device
        teacher, saliency, style = files
        loaded = (biggan.load(mechanism, frozen=frozen) for mechanism in mechanisms or [teacher] * 3)
        self.model = cgn.ImagenetCGN(*loaded, u2net.load(saliency)).to(device)
        self.teacher = biggan.load(teacher).to(device)
        self.style = cgn.StyleFeatures(run.read_checkpoint(style, other=True)).to(device)
        self.config = {**cgn.PRESETS[kind], **changes}
        self.model.truncation = self.config["truncation"]
        self.norms = contextlib.nullcontext if frozen else partial(cgn.norms_held, self.model)

    def step(self, count=1, bf16=False):
        """A function that runs one micro-step of `count` images and returns its terms."""
        drawn = [tensor.to(self.device) for tensor in cgn.draw_training(self.model, 0, range(count))]
        config = {**self.config, "bf16": bf16}
        return lambda: cgn.micro_step(self.model, self.teacher, self.style, *drawn, config)

    def clock(self, work, times=2, warm=0):
        """Seconds of work(), the best of some, with the spectral norms held."""
        seconds = []
        with self.norms():
            for _ in range(warm + times):
                started = time.time()
                work()
                if self.device == "cuda":
                    torch.cuda.synchronize()
                seconds.append(time.time() - started)
        self.model.zero_grad()
        return min(seconds[warm:])

    def compare(self, what, plain, ours):
        line = self.clock(plain)
        print(f"{what}, line by line: {line:.2f} s")
        for bf16 in (False, True) if run.bf16_pays(True, "cpu") else (False,):
            seconds = self.clock(partial(ours, bf16))
            print(f"{what}, {'bfloat16' if bf16 else 'float32'}: {seconds:.2f} s: {seconds / line:.2f}")

    def measure_step(self):
        states, drawn = [*map(torch.load, self.files)], cgn.draw_training(self.model, 0, range(1))
        raw = [torch.load(self.files[0]) for _ in range(3)]
        for state, (name, _) in itertools.product(raw, self.model.f_shape.named_parameters()):
            state[name].requires_grad_()

        def plain():
            terms = straight_line_terms(states, raw, *drawn, self.config["patch"])
            sum(self.config[name] * term for name, term in terms.items()).backward()

        self.compare("micro-step", plain, lambda bf16: self.step(bf16=bf16)())
        print(f"matrix product: {cgn.matrix_rate('cpu', torch.float32, 2048) / 1e9:.0f} GFLOP/s")

    def measure_draw(self):
        raw, saliency = torch.load(self.files[0]), u2net.load(self.files[1], frozen=False).eval()

        @torch.no_grad()
        def plain(count):
            for index in range(count):
                z, y, _ = cgn.draw(self.model, 0, range(index, index + 1))
                x, f, b = (plain_biggan(raw, z[k], y[k], 50) for k in range(3))
                cgn.compose(saliency(u2net.normalise((x + 1) / 2)), f, b)

        def ours(count, bf16):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                cgn.counterfactual_batch(self.model, 0, range(count), per_shape=count)

        for count in (1, 10):
            self.compare(f"{count} counterfactuals of one shape", partial(plain, count), partial(ours, count))

    def measure_image(self):
        cgn.counterfactual_batch(self.model, 0, range(1))
        self.peak("one counterfactual image")

    def measure_memory(self):
        optimizer = torch.optim.Adam(self.model.parameters(), 1e-5)
        for _ in range(2):
            self.clock(self.step(), 1)
            optimizer.step()
        self.peak("two micro-steps around an optimiser step")

    def peak(self, what):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20
        print(f"peak memory of {what}: {peak:.2f} GiB")

    def measure_parts(self):
        model, (u, y, draws) = self.model, cgn.draw_training(self.model, 0, range(1))
        with torch.no_grad():
            x_gt = self.teacher(u, y)
        leaves = [part.detach().requires_grad_() for part in model(u, y)[:3]]

        def term(name):
            patch = self.config["patch"]
            losses = cgn.imagenet_losses(model, *leaves, x_gt, self.style, draws, patch=patch, terms=[name])
            next(losses)[1].backward()

        mechanisms = model.f_shape, model.f_text, model.f_bg
        work = {"teacher, forward": torch.no_grad()(lambda: self.teacher(u, y)),
                "three mechanisms": lambda: sum(part(u, y).sum() for part in mechanisms).backward(),
                "U-2-Net of the mask": lambda: model.saliency(leaves[1]).sum().backward(),
                **{name: partial(term, name) for name in cgn.TERMS}}
        for name, part in work.items():
            with FlopCounterMode(display=False) as flops:
                self.clock(part, 1)
            seconds, billions = self.clock(part), flops.get_total_flops() / 1e9
            print(f"{name}: {seconds:.2f} s, {billions:.0f} GFLOP, {billions / seconds:.0f} GFLOP/s")


class Gpu:
    """What a GPU does, in parts that each write rows of one table."""

    def __init__(self, files, tiny, **changes):
        self.files, self.folder, self.tiny, self.rows = files, files[0].parent, tiny, {}
        self.out, self.device = Path(os.environ.get("OUT", self.folder)), "cpu" if tiny else "cuda"
        self.kinds = ("float32",) if tiny else ("float32", "TF32", "bfloat16")
        self.load, self.started = partial(FullSize, files, self.device, **changes), time.time()
        for part in (self.micro_steps, self.counterfactuals, self.ensemble, self.digits, self.agreement,
                     self.continued, self.bare, self.digits_end):
            try:
                part()
            except Exception as error:                          # one that fails leaves the others
                self.row(part.__name__, f"failed: {type(error).__name__}: {error}"[:300])
        name = "CPU" if tiny else torch.cuda.get_device_name(0)
        print(f"\n| what, on one {name}, torch {torch.__version__} | measured |\n|---|---|")
        print("\n".join(f"| {what} | {value} |" for what, value in self.rows.items()))

    def row(self, what, value):
        self.rows[what] = value
        print(f"[{time.time() - self.started:.0f} s] {what}: {value}", flush=True)
        (self.out / "gpu.json").write_text(json.dumps(self.rows))

    def tf32(self, on):
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = on

    def micro_steps(self):
        full, chosen, counts = self.load(), 2, {2}
        watch = types.SimpleNamespace(note=lambda rate: "")
        if not self.tiny:
            chosen = cgn.images_at_once(lambda part: full.step(len(part), True)(), full.model, 4000, watch)
            counts = {1, 8, 32, chosen}
        for count, kind in itertools.product(sorted(counts), self.kinds):
            if count > 8 and kind != "bfloat16":
                continue
            self.tf32(kind != "float32")
            if not self.tiny:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            rate = count / full.clock(full.step(count, kind == "bfloat16"), warm=1)
            memory = 0 if self.tiny else torch.cuda.max_memory_allocated() / 2 ** 30
            self.row(f"micro-step, {count} at once{' (chosen)' * (count == chosen)}, {kind}",
                     f"{rate:.1f} images/s{watch.note(rate)}, {memory:.1f} GiB")

    def counterfactuals(self):
        full = self.load(frozen=True)
        for count in (1, 10):
            with torch.autocast(self.device, torch.bfloat16):
                draw = partial(cgn.counterfactual_batch, full.model, 0, range(count), count)
                seconds = full.clock(draw, warm=1)
            self.row(f"{count} counterfactuals of one shape, bfloat16", f"{1000 * seconds:.0f} ms")

    def ensemble(self):
        count, side, name = (2, 32, "resnet18") if self.tiny else (256, 224, "resnet50")
        layout, full = {"device": self.device, "memory_format": torch.channels_last}, self.load(frozen=True)
        model = classify.Ensemble(torchvision.models.get_model(name)).to(**layout).train()
        optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9)
        x = torch.rand(2 * count, 3, side, side).to(**layout)
        labels = torch.randint(1000, (4, count), device=self.device)

        def step(bf16):
            with torch.autocast(self.device, torch.bfloat16, enabled=bf16):
                scores = model(u2net.normalise(x)).float()
            optimizer.zero_grad()
            classify.ensemble_loss(scores[:count], labels[0], scores[count:], labels[1:].T).backward()
            optimizer.step()

        for kind in ("TF32", "bfloat16"):
            seconds = full.clock(partial(step, kind == "bfloat16"), warm=1)
            self.row(f"the ensemble's step, {count} + {count} images, {kind}",
                     f"{seconds:.3f} s, {2 * count / seconds:.0f} images/s")

    def digits(self):
        """A CGN of colored MNIST, then a classifier of what it draws, in a process beside what follows."""
        out, few, count = self.folder / "digits", *(("--steps 2", "--count 100") if self.tiny else ("", ""))
        work = f"""import cgn, classify, mnist_variants as variants
if {self.tiny}:
    variants.SPLITS = dict.fromkeys(variants.SPLITS, slice(200))
cgn.main("--dataset colored --out {out} {few}".split())
classify.main("--cgn {out}/checkpoint.pt --method cgn --seeds 0 --runs {out} {few} {count}".split())"""
        self.process = subprocess.Popen([sys.executable, "-c", work], cwd=HERE, stdout=subprocess.DEVNULL)

    def digits_end(self):
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(max(5, 345 - time.time() + self.started))
        self.process.terminate()
        *_, last = run.read_lines(self.folder / "digits" / "log.jsonl")
        self.row("the CGN of colored MNIST", f"{last['steps_per_second']} steps/s, {last['step']} steps")
        *_, last = run.read_lines(self.folder / "digits" / "results.jsonl")
        self.row("its classifier, CGN alone (docs/results.md: 95.7 %)", f"{100 * last['test']:.1f} %")

    def agreement(self):
        """With the CPU in float32: networks of the released sizes, and steps of both trainings."""
        expected = self.computed("cpu", "float32")
        for kind in self.kinds:
            found = self.computed(self.device, kind)
            errors = {name: (found[name] - value).norm() / value.norm() for name, value in expected.items()}
            text = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
            if kind == "float32":
                text += f": {'all' if max(errors.values()) < 0.01 else 'NOT all'} below 0.01"
            self.row(f"relative difference from the CPU's float32, {kind}", text)

    def computed(self, device, kind):
        self.tf32(kind != "float32")
        out, bf16 = self.folder / f"steps-{device}-{kind}", kind == "bfloat16"
        cgn.train(tiny_config(steps=2, bf16=bf16), *tiny_data(), out, device)
        *_, losses = run.read_lines(out / "log.jsonl")
        shipped = run.read_checkpoint(cgn.WEIGHTS / "cgn-mini.pth")
        mechanisms = [shipped[name] for name in ("f_shape", "f_text", "f_bg")]
        files = [cgn.WEIGHTS / cgn.PRESETS["mini"][name] for name in cgn.NETWORKS[:3]]
        mini = FullSize(files, device, mechanisms=mechanisms, kind="mini")
        with mini.norms():
            terms = mini.step(4, bf16)()
        gradients = [p.grad.flatten() for p in mini.model.parameters() if p.grad is not None]
        full, generator = FullSize(self.files, device, frozen=True), torch.Generator().manual_seed(0)
        x = torch.rand(1, 3, 256, 256, generator=generator).to(device)
        z = torch.randn(1, full.teacher.noise, generator=generator).to(device)
        with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=bf16):
            made = {"BigGAN": full.teacher(z, torch.tensor([3], device=device)),
                    "U-2-Net": full.model.u2net.logits(x)[0]}
        made["losses of digits"] = torch.tensor([losses[name] for name in ("discriminator", "fake", "color")])
        made.update({f"the miniature's {name}": term for name, term in terms.items() if term > 1e-6})
        made["its gradient"] = torch.cat(gradients)
        return {name: tensor.float().cpu() for name, tensor in made.items()}

    def continued(self):
        """Two updates of the miniature, twice in one go and once in two: a GPU's sums differ at times."""
        few = ("--set", "accumulate=2") if self.tiny else ()
        terms = {}
        for name, steps in (("one go", 2), ("another go", 2), ("two goes", 1), ("two goes", 2)):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(cgn, "training_sheet", lambda *_: "no sheet")
                ended = script("cgn.py", "--dataset", "imagenet", "--mini", "--steps", steps,
                               "--out", self.folder / name, *few)
            assert ended.returncode == 0, ended
            *_, last = run.read_lines(self.folder / name / "log.jsonl")
            terms[name] = torch.tensor([last[term] for term in cgn.TERMS])
        for name in ("another go", "two goes"):
            worst = ((terms[name] - terms["one go"]).abs() / (terms["one go"].abs() + 1e-9)).max()
            self.row(f"the miniature's second update, one go and {name}: difference", f"{worst:.1e}")

    def bare(self):
        """The command of docs/imagenet.md in a copied folder whose weights.txt lists the random weights."""
        place, what = self.folder / "copy", "`cgn.py --dataset imagenet --short` in a copied folder"
        place.mkdir()
        for path in HERE.glob("*.py"):
            shutil.copy(path, place)
        (place / "weights").symlink_to(self.folder)
        rows = [f"{path.name} | - | {cgn.file_hash(path)} | - | - | cgn.py\n" for path in self.files]
        (place / "weights.txt").write_text("".join(rows))
        command = [sys.executable, *what.split("`")[1].split()]
        command += "--steps 2 --set accumulate=2 patch=5".split() if self.tiny else []
        torch.cuda.empty_cache()
        started = time.time()
        training = subprocess.Popen(command, cwd=place, stdout=subprocess.PIPE, text=True)
        timer = threading.Timer(90, training.terminate)
        timer.start()
        shown, _ = training.communicate()
        timer.cancel()
        out = place / "runs" / "imagenet-short"
        sheets, size = sorted(out.glob("sheet-*.png")), (out / "checkpoint.pt").stat().st_size
        self.row(f"{what}: first sheet after", f"{sheets[0].stat().st_mtime - started:.0f} s")
        self.row(f"{what}: progress", re.findall("step .* images/s.*? left", shown)[-1])
        self.row(f"{what}: exit code, sheets, bytes", f"{training.returncode}, {len(sheets)}, {size}")
        shutil.copy(sheets[-1], self.out / "gpu-sheet.png")


def measure(what="", trial=""):
    """python test_cgn.py step | draw | image | memory | parts: seconds and bytes on a CPU; 5 minutes and
    12 GB at most. python test_cgn.py gpu: the same and more on a large GPU, without network; 6 minutes at
    most; also writes gpu.json into $OUT. --dry-run: tiny networks on a CPU."""
    with tempfile.TemporaryDirectory() as folder:
        files, tiny = [Path(folder) / cgn.PRESETS["imagenet"][name] for name in cgn.NETWORKS[:3]], bool(trial)
        if what != "gpu" and not hasattr(FullSize, f"measure_{what}"):
            return print(measure.__doc__)

        def make():
            networks = cgn.random_networks()
            if not tiny:
                style = torchvision.models.vgg16_bn(init_weights=False).state_dict()
                networks = raw_biggan(RELEASED, 8, 1000, 128, 128), random_u2net(u2net.FULL).state_dict(), {
                    name: value for name, value in style.items()           # up to the fourth pool
                    if name.startswith("features") and int(name.split(".")[1]) < 34}
            for path, state in zip(files, networks):
                torch.save(state, path)

        assert codes(forked(make)) == {0}                       # whose memory is not counted
        patch = 5 if tiny else 15
        if what == "gpu":
            return Gpu(files, tiny, patch=patch)
        full = FullSize(files, frozen=what in ("draw", "image"), patch=patch)
        getattr(full, f"measure_{what}")()


if __name__ == "__main__":
    measure(*sys.argv[1:])
