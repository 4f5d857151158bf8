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
test_what_is_not_finite_is_named_and_not_saved.
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
from torchvision.transforms import functional as F_image

import biggan
import cgn
import classify
import drawing
import evaluate
import miniature
import mnist_variants as mv
import run
import u2net

HERE = Path(__file__).parent
SHARED = HERE.parent / "shared"
DTD = SHARED / "data" / "dtd"
ORACLES = SHARED / "oracles"
needs_dtd = pytest.mark.skipif(not DTD.is_dir(), reason=f"no {DTD}")
needs_oracles = pytest.mark.skipif(not ORACLES.is_dir(), reason=f"no {ORACLES}")

LONG = []


def beside(test):
    """Marks a long test: a process on the second core runs it, and its end is waited for here."""
    if "CGN_TEST_BESIDE" in os.environ:
        return test
    LONG.append(test.__name__)

    def wait(processes):
        processes[test.__name__].result()

    return wait


@pytest.fixture(scope="session", autouse=True)
def processes(request):
    """The selected long tests: name -> future of the finished process."""
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    pool, alone = ThreadPoolExecutor(1), {**os.environ, "CGN_TEST_BESIDE": "1"}

    def start(name):
        return process("-m", "pytest", "-q", f"{__file__}::{name}", env=alone, timeout=900)

    yield {item.name: pool.submit(start, item.name) for item in request.session.items if item.name in LONG}
    pool.shutdown(cancel_futures=True)


@pytest.fixture(autouse=True)
def in_project(monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.chdir(HERE)


@pytest.fixture
def few_images(monkeypatch):
    monkeypatch.setattr(mv, "SPLITS", dict.fromkeys(mv.SPLITS, slice(200)))


def script(module, *arguments):
    """A script's main, as a process."""
    out, error, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try:
            module.main([*map(str, arguments)])
        except SystemExit as stopped:
            code = stopped.code
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), error.getvalue())


def process(*arguments, cwd=HERE, timeout=300, **more):
    """Runs Python, which must end well."""
    command = [sys.executable, *map(str, arguments)]
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout, **more)
    assert result.returncode == 0, result.stdout + result.stderr


def works(module, *arguments):
    """What a script prints that ends well."""
    result = script(module, *arguments)
    assert result.returncode == 0, result
    return result.stdout


def one_line(result, *words):
    assert result.returncode == 2 and len(result.stderr.strip().splitlines()) == 1, result
    for word in words:
        assert word in result.stderr, result.stderr


# ---------- mnist_variants

mv_main = partial(script, mv)


@pytest.mark.parametrize("split, agreement, expected", [
    ("train", None, (1, 1)), ("val", None, (0.1, 0.1)), ("val", mv.CUE_CONFLICT, (0, 0.1)),
    ("val", mv.MIXED_SAME, (1, 1)), ("test", mv.MIXED_RAND, (1, 0.1))])
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


@pytest.mark.parametrize("name, variance", [("colored", 0.02), ("double-colored", 0.0001)])
def test_images_are_a_function_of_the_seed_a_digit_in_its_class_color(name, variance):
    (mask, fore, back), (_, label, behind) = mv.load_parts(name, "val", None, 1, None, variance)
    grey = F.interpolate(mv.read_mnist(True)[0][50_000:, None], size=32)
    assert torch.equal(mask, grey if name == "colored" else (grey > 25).byte() * 255)
    assert torch.equal(mv.load(name, "val", seed=1, variance=variance).images, mv.compose(mask, fore, back))
    assert label[:10].tolist() == [8, 2, 1, 2, 0, 0, 4, 8, 5, 5]
    fore, back = fore.double().flatten(1), back.double().flatten(1)
    mean = (mv.COLORED if name == "colored" else mv.DOUBLE_BACKGROUND.roll(4, 0))[label]
    found = (fore - mean)[(mean > 100) & (mean < 155)] / 255            # clipping leaves them alone
    assert abs(found.mean()) < 0.02 and found.var() == pytest.approx(variance, rel=0.1)
    if name == "colored":
        assert (back == 0).all() and (behind == -1).all()
        assert fore.min() == 0 and fore[label == 7, 0].min() > 60           # red 250, clipped at 255
    else:
        assert (fore - mean).abs().max() < 15 and (back - mv.DOUBLE_BACKGROUND[behind]).abs().max() < 15


def test_colors_are_the_published_ones():
    places = torch.arange(1, 11)    # by which red, green and blue are weighted
    assert (places @ mv.COLORED).tolist() == [8694, 7937, 6101]
    assert (places @ mv.DOUBLE_BACKGROUND).tolist() == [7450, 8214, 8081]


def test_parts_are_composed_by_hand():
    mask, fore, back = torch.arange(256).byte(), torch.tensor(200).byte(), torch.tensor(30).byte()
    assert mv.compose(mask, fore, back).tolist() == [round(30 + 170 * m / 255) for m in range(256)]
    assert mv.compose(mask[::255], fore, back).tolist() == [30, 200]
    assert mv._plain("é → 猫") == "e -> ?"


def test_wildlife_shows_random_patches_of_its_labels_textures(monkeypatch):
    place = torch.arange(156).expand(2, 10, 156, 156)
    textures = torch.stack([place.mT, place, torch.randint(256, place.shape)], dim=2).byte()
    monkeypatch.setattr(mv, "draw_textures", lambda: textures)
    (_, *patches), (_, *labels) = mv.load_parts("wildlife", "val")
    for patch, label, texture in zip(patches, labels, textures):
        corners = patch[:, :2, 0, 0].long()
        for k, (top, left) in enumerate(corners[:100]):
            assert torch.equal(patch[k], texture[label[k], :, top:top + 32, left:left + 32])
        assert (corners.amin(0) == 0).all() and (corners.amax(0) == 156 - 32).all()
        assert abs(corners.T.double().corrcoef()[0, 1]) < 0.05


def test_drawn_textures_are_the_stored_ones():
    stored = torch.tensor([[612, 714, 359, 703, 452, 938, 303, 502, 825, 495],      # R + 2 G + 3 B
                           [448, 493, 702, 488, 442, 547, 510, 463, 500, 371]])
    found = mv.draw_textures()[..., 78, 78].long() @ torch.tensor([1, 2, 3])
    assert (found - stored).abs().max() <= 6


@needs_dtd
def test_the_papers_textures_are_scaled_padded_and_ordered_by_class():
    textures = mv.read_textures(DTD)
    with Image.open(DTD / "images" / "veined" / "veined_0073.jpg") as picture:
        expected = np.array(picture.convert("RGB").resize((150, 150), Image.NEAREST))
    assert np.array_equal(textures[1, 2, :, 3:153, 3:153].permute(1, 2, 0).numpy(), expected)
    assert torch.equal(textures[..., 0], textures[..., 6])


def test_mnist_is_downloaded_once_or_one_line_says_why_not(tmp_path, monkeypatch):
    def fetch(folder, download):
        shutil.copytree(mv.ROOT, Path(folder, "MNIST", "raw"))

    monkeypatch.setattr("torchvision.datasets.MNIST", fetch)
    one_line(mv_main("--mnist", mv.__file__, "--out", tmp_path), mv.__file__, "downloaded")
    raw = tmp_path / "MNIST" / "raw"
    for folder in (raw, tmp_path, tmp_path):    # torchvision's, too, and unpacked
        assert len(mv.read_mnist(False, folder)[1]) == 10_000
        mv.read_mnist.cache_clear()
        for path in raw.glob("*.gz") if folder == tmp_path else ():
            path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
            path.unlink()


def test_a_damaged_idx_file_is_named_in_one_line(tmp_path):
    path = tmp_path / "t10k-images-idx3-ubyte.gz"
    for word, content in (("ended", gzip.compress(b"x")[:-9]), ("SHA-256", gzip.compress(b"x"))):
        path.write_bytes(content)
        one_line(mv_main("--split", "test", "--mnist", tmp_path, "--out", tmp_path), str(path), word)


def test_a_file_is_written_whole_or_not_at_all_and_by_two_at_once(tmp_path):
    path = tmp_path / "new" / "a.bin"

    def content(file):
        mv.write_file(path, b"of another")  # meanwhile
        file.write(b"new")
        if error:
            raise error("x")

    for error in (None, KeyboardInterrupt, OSError, RuntimeError):
        with pytest.raises((KeyboardInterrupt, OSError)) if error else contextlib.nullcontext():
            mv.write_file(path, content)
        assert path.read_bytes() == (b"of another" if error else b"new")
    assert os.listdir(path.parent) == ["a.bin"]


def test_pictures_of_class_folders_are_read_in_the_order_of_numbers(tmp_path):
    for name, color in (("9/0.png", "red"), ("10/gas-mask.PNG", "blue")):
        mv.save_png(tmp_path / name, Image.new("RGB", (12, 8), color))
    for name in (".a/0.png", "10/.a/0.png", "10/._0.png", "10/00000000-mask.png"):
        mv.write_file(tmp_path / name, b"no picture of the class")
    assert mv.labelled_files(tmp_path)[1] == (str(tmp_path / "10" / "gas-mask.PNG"), (1,))
    images, labels, names = mv.load_folder(tmp_path)
    assert names == mv.class_names(tmp_path) == ["9", "10"] and labels.tolist() == [0, 1]
    assert images.shape == (2, 3, 32, 32) and images[:, :, 0, 0].tolist() == [[255, 0, 0], [0, 0, 255]]
    (tmp_path / "a").mkdir()
    assert mv.class_folders(tmp_path) == ["10", "9", "a"]
    with pytest.raises(ValueError, match="a holds no picture"):
        mv.load_folder(tmp_path)


def test_labels_and_class_names_travel_with_counterfactuals(tmp_path):
    table = tmp_path / "labels.csv"
    table.write_bytes(b"\xef\xbb\xbffile,seed,shape,texture,background\n0.png,0,1,2,3\n")
    assert mv.labelled_files(tmp_path) == [(str(tmp_path / "0.png"), (1, 2, 3))]
    assert mv.class_names(tmp_path) is None
    (tmp_path / "settings.json").write_text('{"names": ["a", "b"]}')
    assert mv.class_names(tmp_path) == ["a", "b"]
    for row, word in (("../x.png,1,1,1", "not in"), ("..,1,1,1", "not in"), (",1,1,1", "not in"), ("", "row"),
                      ("0,1", "lacks")):
        table.write_text(f"file,shape,texture,background\n{row}\n")
        with pytest.raises(ValueError, match=f"labels.csv .*{word}"):
            mv.labelled_files(tmp_path)


def test_sheets_are_written_and_mistakes_are_one_line(tmp_path, few_images):
    assert mv_main("--out", tmp_path).returncode == 0 and len(os.listdir(tmp_path)) == 3
    data, sheet = mv.load("colored", "train"), np.array(Image.open(tmp_path / "colored.png"))
    left, top = sheet.shape[1] - 12 * 66, 18 + 9 * 66                       # 32 pixels twice and a gap of two
    first = data.images[data.shape == 9][0].permute(1, 2, 0)
    assert np.array_equal(sheet[top:top + 64:2, left:left + 64:2], first)
    wrong = [("agreement", "colored", "val", pair) for pair in ((-0.1, 1), (1.1, 1), (1, -0.1), (1, 1.1))]
    for word, *given in (*wrong, ("data set 'x'", "x", "val"), ("seed -1", "colored", "val", 1, -1)):
        with pytest.raises(ValueError, match=word):
            mv.load_parts(*given)
    one_line(mv_main("--textures", tmp_path, "--out", tmp_path), "striped_0001.jpg")


# ---------- evaluate

judge_main = partial(script, evaluate)


def test_metrics_by_hand():
    assert evaluate.mean_std([2.0]) == (2.0, 0.0)
    a = torch.tensor([[1.0, 0.6, 0.0, 0.5], [0, 0, 0, 0], [1, 0, 0, 0]])[:, None, None]
    b = torch.tensor([[1.0, 0.5, 0.8, 0.6], [0, 0, 0, 0], [0, 0, 0, 0]])[:, None, None]
    assert evaluate.mask_iou(a, b) == pytest.approx((1 / 4 + 1 + 0) / 3)
    found, true = torch.tensor([[1.0, 0.6, 0.1, 0.8], [1, 0, 0, 1]]).view(2, 1, 1, 1, 4)
    assert evaluate.max_f(found, true) == pytest.approx(1)
    assert evaluate.max_f(found.flip(3), 1 - true) == pytest.approx(1.3 * 0.5 / (0.3 * 0.5 + 1))
    probabilities = torch.zeros(1, 1000)
    probabilities[0, 152:200], probabilities[0, 499] = 0.01, 0.006      # 47 of 109 dogs, a knife
    assert evaluate.cue_conflict_decisions(probabilities) == ["knife"]


def test_inception_score_by_hand():
    sure, p = torch.eye(5).repeat(21, 1), torch.tensor([[0.5, 0.5], [1.0, 0.0]])
    expected = np.exp((0.5 * np.log(0.5 / 0.75) + 0.5 * np.log(0.5 / 0.25) + np.log(1 / 0.75)) / 2)
    assert evaluate.inception_score(p, 1)[0] == pytest.approx(expected)
    stored = 3.832251, 0.397233         # of parts of 11 rows and of 10, shuffled: no part is even
    assert evaluate.inception_score(sure) == pytest.approx(stored)


def test_a_metric_of_nothing_or_of_what_does_not_fit_is_refused():
    two, p = torch.tensor([0, 1]), torch.full((2, 2), 0.5)
    for word, name, *given in (
            (r"\(0,\)", "accuracy", two[:0], two[:0]), ("1 is not", "confusion", two, two, 1),
            ("-1 or", "confusion", two - 1, two, 2), ("no values", "mean_std", []),
            ("3 splits", "inception_score", p, 3), ("0 splits", "inception_score", p, 0),
            ("sum", "inception_score", 2 * p, 1), ("mixed_rand", "bg_gap", {"mixed_same": 1}),
            ("undefined", "shape_bias", ["oven"], ["cat"], ["dog"])):
        with pytest.raises(ValueError, match=word):
            getattr(evaluate, name)(*given)


def test_categories_and_imagenet9_have_the_published_sizes():
    classes, categories = evaluate.imagenet9_map(), evaluate.cue_conflict_categories().values()
    held = [[index for index in range(1000) if classes[index] == number] for number in range(-1, 9)]
    assert [*map(len, categories)] == [1, 4, 2, 49, 5, 7, 3, 6, 4, 3, 109, 2, 2, 1, 1, 8]
    assert sum(place * sum(numbers) for place, numbers in enumerate(categories, 1)) == 525904
    assert [*map(len, held)] == [630, 116, 52, 42, 36, 35, 27, 26, 20, 16]
    assert [*map(sum, held[1:])] == [24378, 4318, 27917, 1818, 10677, 8451, 15981, 7490, 3558]


@needs_oracles
def test_published_decisions_give_the_published_shape_bias():
    """Of ten people, pooled, with missed answers: na."""
    result = judge_main("--cue-conflict", *sorted((ORACLES / "cue_conflict/humans").glob("*.csv")))
    assert "| object_response | 95.87 % | 9236 | 398 | 12800 |" in result.stdout, result


def test_columns_of_a_table_are_judged_one_by_one_and_rows_pooled():
    rows = [{"file": "cat1-dog2.png", "shape": "cat", "texture": "dog"},
            {"file": "cat2-dog1.png", "shape": "na", "texture": "cat"},
            {"imagename": "x/cat3-dog1.png", "shape": "cat"}, {"file": "cat3-dog1.png", "shape": "dog"},
            {"file": "cat1-cat2.png", "shape": "cat"}]                      # agrees: no conflict
    assert evaluate.judge_cue_conflict(rows) == {
        "shape": {"shape bias": 2 / 3, "by shape": 2, "by texture": 1, "images": 5},
        "texture": {"shape bias": 0.5, "by shape": 1, "by texture": 1, "images": 2}}
    best = "0 1 2 3 4 5"
    rows = [{"shape label": label, "texture label": 0, "shape": best, "texture": "1 0", "average": best}
            for label in "045"]
    assert evaluate.judge_imagenet(rows) == {"shape": {"samples": 3, "top-1": 1 / 3, "top-5": 2 / 3},
                                             "texture": {"samples": 3, "top-1": 0, "top-2": 1}}
    rows = [{"variation": name, "label": "0", "average": best} for name, best in
            (("mixed_same", "151 0"), ("mixed_rand", "151 0"), ("mixed_rand", "1 0"))]
    assert evaluate.judge_imagenet9(rows) == {"average": {"mixed_same": 1, "mixed_rand": 0.5, "BG-Gap": 0.5}}


def test_predictions_of_any_system_are_judged(tmp_path):
    table, out = tmp_path / "p.csv", tmp_path / "new" / "r.json"            # the folder is made
    evaluate.write_table(table, [{"label": y, "prediction": best} for y, best in zip("0111", "0012")])
    table.write_bytes(b"\xef\xbb\xbf" + table.read_bytes())                  # a byte order mark
    result = judge_main("--predictions", table, "--out", out)
    assert "| prediction | 4 | 50.00 % |" in result.stdout and "| 1 | 1 | 1 | 1 |" in result.stdout
    assert json.loads(out.read_text())["prediction"]["confusion"] == [[1, 0, 0], [1, 1, 1], [0, 0, 0]]
    table.write_text("cat,dog\n0.5,0.5\n1,0\n")
    result = judge_main("--inception-score", table, "--splits", 2, "--out", out)
    assert "| 2 | 1.00 ± 0.00 |" in result.stdout
    assert json.loads(out.read_text()) == {"images": 2, "splits": 2, "inception_score": 1, "std": 0}


def test_a_table_with_a_mistake_is_one_line(tmp_path):
    tables = {
        "predictions": {"label,prediction\n0": "fewer", "label,guess\n0,0": "shape +", "\xff": "no CSV",
                        "label,shape,shape\n0,1,1": "twice",
                        "label,prediction\n0,1 2\n0,1": "whole", "label,prediction\n-1,0": "holds -1",
                        "prediction\n1": "column", "label,prediction\n0,": "nothing"},
        "cue-conflict": {"file,decision\ncat1-dog2.png,cow": "cow", "file,decision\nx,cat": "'x'"},
        "imagenet9": {"label,shape\n0,1": "variation", "variation,label,shape\nx,9,1": "0..8",
                      "variation,label,shape\nx,1,1000": "0..999"},
        "inception-score": {"a,b\n0.5,cat": "cat"}, "seed=1 --predictions": {"label,shape\n0,1": "--seed"}}
    for what, content, word in ((what, *row) for what in tables for row in tables[what].items()):
        (tmp_path / "t.csv").write_bytes(content.encode("latin-1"))
        one_line(judge_main(*f"--{what}".split(), tmp_path / "t.csv"), word)


def test_an_output_is_tried_before_the_work_and_destroys_nothing(tmp_path, monkeypatch):
    table = tmp_path / "t.csv"
    table.write_text("label,prediction\n0,0\n")
    monkeypatch.setattr(evaluate, "read_table", lambda path: 1 / 0)  # is not reached
    for out in (table, tmp_path, table / "r.json"):
        one_line(judge_main("--predictions", table, "--out", out), str(tmp_path))
    monkeypatch.setattr(evaluate, "read_table", interrupt)
    result = judge_main("--predictions", table, "--out", tmp_path / "r.json")
    assert (result.returncode, result.stderr) == (130, "stopped\n")
    assert table.read_text() == "label,prediction\n0,0\n" and len(list(tmp_path.iterdir())) == 1


# ---------- biggan

def raw_biggan(blocks, attention, classes=20, noise=8, embedding=8, seed=0):
    """A raw state dict with random numbers, 51 distinct rows of statistics included."""
    with torch.device("meta"):
        model = biggan.BigGAN(blocks, attention, classes, noise, embedding)
    state, generator = model.to_empty(device="cpu").state_dict(), torch.Generator().manual_seed(seed)
    for key, numbers in state.items():
        numbers.normal_(generator=generator)
        if key.endswith("running_vars"):
            numbers.square_().add_(0.5)
        elif key.endswith("running_means"):
            numbers.mul_(0.1)
    for _ in range(3):  # u, v as if trained
        model.power_iteration()
    return state


RELEASED = [(2048, 2048), (2048, 2048), (2048, 2048), (2048, 1024), (1024, 1024), (1024, 1024), (1024, 1024),
            (1024, 512), (512, 512), (512, 256), (256, 256), (256, 128)]  # 256 x 256 pixels
SMALL = [(32, 32), (32, 32), (32, 32), (32, 24)]  # 16 x 16 pixels; the last is made in two parts


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


def test_a_new_biggan_of_full_depth_draws_finite_images_the_plain_forwards():
    torch.manual_seed(0)
    model = biggan.BigGAN([(i // 16, o // 16) for i, o in RELEASED], 8, 20, 8, 8)
    assert all(abs(norm.norm() - 1) < 1e-4 for norm in model.norms())  # weights are orthogonal
    z, y = biggan.truncated_noise(2, 8, seed=0), torch.tensor([1, 7])
    for truncation in (1.0, 0.02, None):
        x = model(z, y, truncation)
        assert torch.isfinite(x).all() and 0.1 < x.std() < 0.95, truncation
    state = model.state_dict()
    with torch.no_grad():
        plain, found = plain_biggan(state, z, y, 50), biggan.load(state)(z, y)
    assert (found - plain).norm() <= 1e-5 * plain.norm()


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
    with torch.no_grad():                                           # a part of the channels at a time
        assert (biggan.load(state)(z.float(), y, 0.4) - plain).abs().max() < 1e-4


def test_input_that_does_not_fit_is_refused():
    model = biggan.load(raw_biggan(SMALL, None))
    z, y = torch.randn(2, 8), torch.tensor([0, 19])
    for word, *given in (
            ("truncation", z, y, 0.0), ("truncation", z, y, 1.1), ("noise", z[:, :5], y), ("tensor", z, [1]),
            ("bool", z, y > 1), ("20 is not", z, y + 1), ("-1", z, y - 1), ("one for", z, y[:1]),
            ("2, 1", z, y[:, None]), ("float32", z, y / 2)):
        with pytest.raises(ValueError, match=word):
            model(*given)


def test_truncated_noise_is_cut():
    z = biggan.truncated_noise(2000, truncation=0.5, seed=1)
    assert z.shape == (2000, 128) and z.abs().max() <= 1
    assert abs(z.std() / 0.5 - 0.8796) < 0.01  # cut at 2


def test_power_iteration_finds_the_largest_singular_value():
    layer = biggan.Conv(4, 6, 3)
    torch.nn.init.normal_(layer.weight_orig)
    for _ in range(200):
        layer.power_iteration()
    assert abs(torch.linalg.svdvals(layer.weight().detach().flatten(1))[0] - 1) < 1e-4


# ---------- biggan, u2net: their weights

class Evil:
    """Pickled, it runs a command that leaves the file `ran`."""

    def __init__(self, folder):
        self.command = f"touch {folder / 'ran'}"

    def __reduce__(self):
        return os.system, (self.command,)


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
def test_a_raw_dict_that_does_not_fit_is_refused(module, key, variances, needed):
    state = raw_weights(module)
    good, wide = state[key], state[variances]
    for name, value, word in (
            ("extra", good, "Unexpected"), (key, torch.zeros(9), "mismatch"), (needed, good, "lacks"),
            *((key, good + number, "finite") for number in (torch.nan, torch.inf, -torch.inf)),
            (variances, wide - wide.max(), "negative"), (key, good.long(), "floating"),
            (key, torch.zeros(1).expand(512), "stored")):
        with pytest.raises(ValueError, match=word) as error:
            module.load({**state, name: value})
        assert name in str(error.value)
    module.load({**state, variances: 0 * wide})
    if module is biggan:
        with pytest.raises(ValueError, match="follow.*30"):
            module.load({**state, needed: torch.zeros(8, 30, 1, 1)})


def test_files_that_run_code_are_cut_off_or_of_another_network_are_one_line(tmp_path):
    torch.save({"config": Evil(tmp_path), "step": 1}, tmp_path / "evil")
    torch.save({"config": {}, "step": "x"}, tmp_path / "other")
    torch.save([1], tmp_path / "list")
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "linear")
    (tmp_path / "short").write_bytes((tmp_path / "other").read_bytes()[:500])
    for name, load in itertools.product("evil other list linear short nowhere".split(),
                                        (biggan.load, u2net.load, run.read_checkpoint)):
        with pytest.raises(ValueError, match=f"{tmp_path / name}(:| is no| does not)") as error:
            load(tmp_path / name)
        assert "\n" not in str(error.value) and "weights_only" not in str(error.value)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("module", [biggan, u2net])
def test_weights_are_read_from_all_formats_and_wrappers_and_a_dict_is_left_alone(module, tmp_path):
    state = raw_weights(module)
    before = copy.deepcopy(state)
    wrapped = {"state_dict": {f"module.{key}": value for key, value in state.items()}, "epoch": 3}
    torch.save(state, tmp_path / "old", _use_new_zipfile_serialization=False)
    torch.save(wrapped, tmp_path / "new")
    for source in (state, wrapped, tmp_path / "old", tmp_path / "new"):
        found = module.load(source, frozen=False).state_dict()
        assert all(torch.equal(found[key], before[key]) for key in before)
    frozen = module.load(state)
    assert all(torch.equal(state[key], before[key]) for key in state)
    assert not frozen.training and not any(parameter.requires_grad for parameter in frozen.parameters())


CONTENT = bytes(10_000)
DIGEST = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture(params=[biggan, u2net])
def shelf(request, tmp_path, monkeypatch):
    """A function that lists weights beside a module, and gives its reader."""
    monkeypatch.setattr(request.param, "__file__", str(tmp_path / "module.py"))
    (tmp_path / "elsewhere").write_bytes(CONTENT)

    def listed(sha256, address=(tmp_path / "elsewhere").as_uri()):
        (tmp_path / "weights.txt").write_text(f"# so\nw.pth | 10000 | {sha256} | - | {address} | here\n")
        return request.param.find_weights
    return listed


@pytest.mark.parametrize("sha256", [DIGEST[:8], ""])
def test_absent_weights_are_fetched_into_weights_beside_the_module(shelf, tmp_path, capsys, sha256):
    find = shelf(sha256)
    for _ in range(2):
        assert find("w.pth") == tmp_path / "weights" / "w.pth"
    assert [path.read_bytes() for path in (tmp_path / "weights").iterdir()] == [CONTENT]
    out, error = capsys.readouterr()
    assert out.count("fetching") == 1 and out.count(f"SHA-256 {DIGEST}") == (0 if sha256 else 2) and not error


def test_a_fetch_that_fails_leaves_nothing_and_names_size_address_and_place(shelf, tmp_path, monkeypatch):
    def refused(find):
        words = f"{tmp_path}/weights/w.pth is missing.*: put the 10000 bytes of [a-z]+://[^ ]+ there$"
        with pytest.raises(ValueError, match=words) as error:
            find("w.pth")
        assert "\n" not in str(error.value) and not list((tmp_path / "weights").iterdir())

    refused(shelf("00ff"))
    monkeypatch.setattr(torch.hub, "download_url_to_file",      # the connection breaks off
                        lambda address, path, *_, **__: Path(path).write_bytes(CONTENT[:-1]))
    refused(shelf(""))


def test_weights_of_another_hash_are_not_kept_nor_read_and_an_unlisted_is_printed(shelf, tmp_path, capsys):
    (tmp_path / "w.pth").write_bytes(CONTENT)
    with pytest.raises(ValueError, match=f"w.pth has SHA-256 {DIGEST}, weights.txt lists 00ff"):
        shelf("00ff")(tmp_path / "w.pth")
    assert shelf("00ff")(tmp_path / "elsewhere") == tmp_path / "elsewhere"
    assert DIGEST in capsys.readouterr().out


def test_weights_txt_lists_what_is_shipped():
    rows = [line.split(" | ") for line in (HERE / "weights.txt").read_text().splitlines() if line[0] != "#"]
    assert {biggan.WEIGHTS, "u2net.pth", "u2netp.pth"} <= {row[0] for row in rows}
    for name, size, sha256, _, address, _ in rows:
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
    biggan.save_sheet(model, {3: "a", 7: "b"}, 2, 0.5, 1, path)
    found = np.array(Image.open(path))
    left = found.shape[1] - 2 * 18  # two pictures of 16 + 2 pixels
    x = model(biggan.truncated_noise(2, 8, 0.5, 1), torch.tensor([7, 7]), 0.5)[1].permute(1, 2, 0).numpy()
    assert np.abs(found[20:36, left + 18:left + 34] - (x + 1) * 127.5).max() <= 0.51
    assert (found[22:38, 4:left] < 128).any() and found[:, left - 4:left].min() == 255
    model.embeddings.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="class 3 gives no finite numbers"):
        biggan.save_sheet(model, {3: "a"}, 2, 0.5, 1, path)


def interrupt(*_):
    raise KeyboardInterrupt


def test_the_command_draws_a_sheet_into_a_new_folder_and_mistakes_are_one_line(tmp_path, monkeypatch):
    weights, out = tmp_path / "w.png", tmp_path / "new" / "x.png"
    torch.save(raw_biggan(SMALL, 2), weights)
    command = biggan, *"--device cpu --classes 3,7 --count 1 --weights".split(), weights, "--out", out
    for option, value in (("--truncation", 0), ("--classes", "20"), ("--count", 0), ("--count", 101),
                          ("--device", "nowhere"), ("--out", tmp_path / "x.jpg"), ("--out", weights),
                          ("--out", tmp_path), ("--out", weights / "x.png")):
        one_line(script(*command, option, value), str(value))

    def full_disk(self, path, **_):
        Path(path).write_bytes(b"half")
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", full_disk)
        one_line(script(*command), "x.png", "no space left")
    assert not list(out.parent.iterdir())
    works(*command)
    assert [path.name for path in out.parent.iterdir()] == ["x.png"] and Image.open(out).size[1] == 2 * 20
    monkeypatch.setattr(biggan, "load", interrupt)
    stopped = script(*command)
    assert (stopped.returncode, stopped.stderr) == (130, "stopped\n")


# ---------- u2net

TINY = ((3, 4, 8),) + ((8, 4, 8),) * 5 + ((16, 4, 8),) * 5


def random_u2net(stages):
    """A U-2-Net in eval mode whose batch norms do something."""
    torch.manual_seed(0)
    model = u2net.U2Net(stages)
    for name, numbers in model.state_dict().items():
        if ".bn_s1." in name and numbers.ndim:
            torch.nn.init.uniform_(numbers, 0.5, 1.5)
    return model.eval()


@needs_oracles
@pytest.mark.parametrize("name", ["0002-01", "boat", "horse", "im_21", "long", "sailboat3"])
def test_the_lite_network_equals_another_runtime(name):
    """A tenth as bright, too."""
    photo = u2net.open_photo(ORACLES / "u2netp" / f"{name}.png")
    expected = F_image.to_tensor(Image.open(ORACLES / "u2netp" / f"{name}.mask.png"))
    model = u2net.load(HERE / "weights" / "u2netp.pth")
    found = model(u2net.normalise(F_image.to_tensor(photo)[None]))[0]
    assert (found - expected).abs().max() <= 1 / 255 + 1e-3
    dark = F_image.to_tensor(u2net.saliency(model, photo.point(lambda value: round(value / 10))))
    assert evaluate.mask_iou(dark[None], expected[None]) >= 0.98


def test_a_photo_is_divided_by_its_maximum_and_a_black_one_stays_black():
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
            assert a.shape == (2, 1, 45, 38) and torch.allclose(a, b, atol=1e-5)
    assert model(torch.zeros(1, 3, 16, 16)).shape == (1, 1, 16, 16)
    for shape in ((1, 3, 15, 100), (1, 1, 32, 32), (3, 32, 32)):
        with pytest.raises(ValueError, match="input of shape"):
            model(torch.zeros(shape))


def test_pictures_are_read_as_they_are_meant_to_be_seen(tmp_path):
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    for name, clear in (("16.png", 256), ("16.pgm", 256), ("clear.png", 9)):
        more = {"transparency": 257 * clear} if clear < 256 else {}
        Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / name, **more)
        seen = np.where(grey == clear, 255, grey)
        assert np.array_equal(u2net.open_photo(tmp_path / name), np.stack([seen] * 3, 2))
    Image.fromarray(np.full((16, 16), 0x4000, np.uint16)).save(tmp_path / "16.png")
    assert u2net.open_photo(tmp_path / "16.png").getpixel((0, 0)) == (63, 63, 63)
    hidden = np.dstack([grey] * 3 + [255 * (grey > 100)]).astype(np.uint8)
    Image.fromarray(hidden, "RGBA").save(tmp_path / "alpha.png")
    expected = np.where(grey > 100, grey, 255)
    assert np.array_equal(u2net.open_photo(tmp_path / "alpha.png"), np.stack([expected] * 3, 2))
    Image.new("RGB", (20, 20)).save(tmp_path / "exif.png", exif=b"Exif\0\0broken")
    assert u2net.open_photo(tmp_path / "exif.png").size == (20, 20)
    Image.new("RGB", (40, 15)).save(tmp_path / "flat.png")
    Image.new("1", (10_000, 10_000)).save(tmp_path / "huge.png")
    for name, word in (("flat.png", "40 x 15"), ("huge.png", "10000 x 10000")):
        with pytest.raises(ValueError, match=f"{name} does not open.*{word}"):
            u2net.open_photo(tmp_path / name)


def test_a_photo_becomes_a_mask_and_a_cutout_of_its_own_size_in_new_folders(tmp_path):
    photo, out, cut = tmp_path / "p.jpg", tmp_path / "a" / "mask.png", tmp_path / "b" / "cutout.png"
    exif = Image.Exif()
    exif[0x0112] = 6        # lies on its side
    Image.linear_gradient("L").resize((30, 20)).save(photo, exif=exif)
    works(u2net, photo, "--out", out, "--cutout", cut, "--device", "cpu")
    seen = u2net.open_photo(photo)
    mask = u2net.saliency(u2net.load(HERE / "weights" / "u2netp.pth"), seen)
    seen.putalpha(mask)
    assert seen.size == (20, 30)
    for path, expected in ((out, mask), (cut, seen)):
        assert np.array_equal(Image.open(path), expected) and len(list(path.parent.iterdir())) == 1


def test_no_output_destroys_an_input_and_mistakes_are_one_line(tmp_path, monkeypatch):
    photo, new = tmp_path / "mask.png", tmp_path / "new.png"
    Image.new("RGB", (40, 40)).save(photo)
    before = photo.read_bytes()
    monkeypatch.setattr(u2net, "__file__", str(tmp_path / "u2net.py"))  # beside it is the default, mask.png
    for word, *options in (
            ("mask.png",), ("mask.png", "--out", photo / "x.png"), ("x.jpg", "--out", tmp_path / "x.jpg"),
            ("new.png", "--out", new, "--cutout", new), ("tpu", "--device", "tpu"),
            ("new.png", "--out", new, "--weights", new), ("none", "--out", new, "--weights", "none")):
        one_line(script(u2net, photo, *options), word)
    assert photo.read_bytes() == before and not new.exists()


# ---------- run

def toy_run(folder, at=lambda step: None, share=slice(None), more={}, **config):
    """A tiny training; returns its losses. at(step) comes before a step's backward pass, at(step + 0.5) after
    the optimizer's."""
    torch.manual_seed(0)
    model, losses = torch.nn.Linear(3, 1), []
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    config = {"seed": 0, "steps": 6, "log_every": 1, "saves": (2,), **config}
    with run.Run(folder, config, {"model": model, "optimizer": optimizer}, **more) as training:
        for step in training:
            x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
            loss = model(x[share]).square().mean()
            losses.append(loss.item())
            at(step)
            optimizer.zero_grad()
            loss.backward()
            training.check({"loss": loss}, model.parameters())
            optimizer.step()
            at(step + 0.5)
    return losses


def saved_step(folder):
    return run.read_checkpoint(folder / "checkpoint.pt")["step"]


def logged(folder):
    """A run's rows, but for the configuration."""
    return run.read_lines(folder / "log.jsonl")[1:]


def test_a_signal_ends_the_step_saves_and_the_run_continues_bit_for_bit(tmp_path):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    toy_run(tmp_path / "whole")
    for asked, times, error, saved in ((2, 1, run.Stopped, 3), (2.5, 1, run.Stopped, 3),
                                       (2, 2, KeyboardInterrupt, 2)):
        def ask(step):
            for _ in range(times if step == asked else 0):
                signal.raise_signal(signal.SIGINT)

        out = tmp_path / f"{asked} {times}"
        with pytest.raises(KeyboardInterrupt) as stopped:
            toy_run(out, ask)
        assert (stopped.type, saved_step(out)) == (error, saved)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        toy_run(out)
        assert run_result(out) == run_result(tmp_path / "whole")


def test_what_is_not_finite_is_named_and_not_saved(tmp_path):
    parameter = torch.zeros(2, requires_grad=True)
    parameter.grad = torch.tensor([1.0, float("inf")])
    with run.Run(tmp_path, {"steps": 4, "saves": (1,)}, {}) as training:
        next(iter(training))
        with pytest.raises(ValueError, match="^step 1: b, gradient not finite"):
            training.check({"a": torch.tensor(1.0), "b": torch.tensor(torch.nan)}, [parameter])
    assert not (tmp_path / "checkpoint.pt").exists()


def test_a_folder_is_locked_and_keeps_the_run_of_another_configuration(tmp_path):
    folder = tmp_path / "new"
    with run.Run(folder, {}, {}), pytest.raises(ValueError, match="in use by another process"):
        toy_run(folder)
    toy_run(folder, steps=2)        # what did no step binds nothing
    for _ in range(2):                                      # by its log, or without one by its checkpoint
        before = run_result(folder)
        with pytest.raises(ValueError, match="another seed, other: choose another --out"):
            toy_run(folder, steps=2, seed=1, other=2)
        assert run_result(folder) == before
        (folder / "log.jsonl").unlink(missing_ok=True)
    toy_run(folder, steps=4, other="elsewhere", more={"free": ("steps", "other")})
    assert saved_step(folder) == 4 and run.read_lines(folder / "log.jsonl")[0]["other"] == "elsewhere"


def test_rows_checkpoints_and_sheets_come_at_their_steps(tmp_path, capsys):
    def sheet(step):
        drawn.append((step, step and saved_step(tmp_path)))
        return f"{step}.png"

    drawn, more = [], {"sheet": sheet, "free": ("steps",)}
    for steps in (7, 11):
        toy_run(tmp_path, steps=steps, log_every=4, saves=(0, 2, 5), more=more)
    assert drawn == [(step, step) for step in (0, 2, 5, 7, 10, 11)]                 # after the checkpoint
    assert "step 5: 5.png\n" in capsys.readouterr().out
    assert [row["step"] for row in logged(tmp_path)] == [2, 4, 5, 7, 8, 10, 11]


def test_progress_is_told_after_ten_seconds_then_each_minute_and_at_the_end(tmp_path, capsys, monkeypatch):
    """A step takes five seconds, an index of `watched` one."""
    def pass_time(step):
        clock[0] += 2.5

    clock = [100.0]
    monkeypatch.setattr(run, "time", types.SimpleNamespace(time=lambda: clock[0]))
    toy_run(tmp_path, pass_time, steps=1300, log_every=999, saves=(999,), more={"images": 8})
    said = re.findall(r"step (\d*).*  0.2 steps/s = 1.6 images/s  (.*) left  loss", capsys.readouterr().out)
    assert said[0] == ("2", "1.8 h") and said[-1] == ("1300", "0.0 min")
    assert said[18:20] == [("218", "1.5 h"), ("230", "89.2 min")]
    for _ in run.watched(range(0, 2000, 10), "files"):
        clock[0] += 1
    said = capsys.readouterr().out.splitlines()
    assert said[:2] == ["files: 60 of 2000, 3.2 min left", "files: 370 of 2000, 2.7 min left"]


def test_a_run_continues_from_memory_so_that_windows_can_replace_its_checkpoint(tmp_path, monkeypatch):
    mapped, load = [], torch.load
    toy_run(tmp_path)
    monkeypatch.setattr(torch, "load", lambda *file, **how: mapped.append(how["mmap"]) or load(*file, **how))
    toy_run(tmp_path)
    assert saved_step(tmp_path) == 6 and mapped == [False, True]


def test_a_row_is_appended_whole_or_not_at_all_and_a_damaged_one_is_named(tmp_path):
    log, state, limits = tmp_path / "log.jsonl", tmp_path / "a.pt", resource.getrlimit(resource.RLIMIT_FSIZE)
    run.write_file(state, b"old")
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))     # a full disk
    try:
        with pytest.raises(OSError, match="log.jsonl could not be written"):
            for step in range(9):
                run.append_row(log, {"step": step, "loss": 0.123456789012345})
        with pytest.raises(OSError, match="a.pt could not be written"):
            run.save_state(state, {"a": torch.zeros(1000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [row["step"] for row in run.read_lines(log)] == [0, 1] and state.read_bytes() == b"old"
    assert len(os.listdir(tmp_path)) == 2
    for damaged in ('{"step": "x"}', '{"step"'):
        log.write_text("{}\n" + damaged)
        with pytest.raises(ValueError, match="line 2, is damaged"):
            run.read_lines(log)
    with pytest.raises(OSError, match="no regular file"):
        run.write_file(tmp_path, b"")


def two_ranks(work):
    def join():
        run.join_group("cpu")
        work(run.rank_and_world()[0])

    assert codes(forked(join, 2)) == {0}


def test_two_processes_give_what_one_gives_and_stop_together(tmp_path, capfd):
    """Each has half of the images. The second is told to stop after a `check`."""
    def work(rank):
        def stop(step):
            if (rank, step) == (1, 1.5):
                signal.raise_signal(signal.SIGTERM)

        half = slice(2 * rank, 2 * rank + 2)
        with pytest.raises(run.Stopped, match="stopped after step 3"):
            toy_run(tmp_path / "two", stop, half)
        toy_run(tmp_path / "two", share=half)

    two_ranks(work)
    said = capfd.readouterr().out                           # only rank 0 speaks
    assert said.count("step 6/6") == said.count("continuing") == 1
    losses = [row["loss"] for row in logged(tmp_path / "two")]
    assert losses == pytest.approx(toy_run(tmp_path / "one"), rel=1e-5)


def test_processes_that_find_other_folders_or_lose_one_another_say_so(tmp_path):
    def work(rank):
        with pytest.raises(ValueError, match="the processes find checkpoints of steps 6, 0 in"):
            toy_run(tmp_path / str(rank))
        if rank == 0:
            with pytest.raises(RuntimeError) as lost:
                torch.distributed.all_reduce(torch.zeros(1))
            assert run.lost_process(lost.value).startswith("another process of the run has ended")

    toy_run(tmp_path / "0")
    two_ranks(work)


def test_a_name_with_a_value_overrides_with_the_type_that_is_there():
    config = {"lr": (1e-3, 1.0), "steps": 4, "noise": 0.4, "shuffle": "shift"}
    run.override(config, ["lr=1e-5,2.0", "steps=7", "noise=1", "shuffle=puzzle"])
    assert config == {"lr": (1e-5, 2.0), "steps": 7, "noise": 1.0, "shuffle": "puzzle"}
    for text, word in (("nois=3", "mean noise"), ("steps=2.5", "like 7"), ("steps=1e999", "like 7"),
                       ("lr=('a',1)", "like")):
        with pytest.raises(ValueError, match=word):
            run.override(config, [text])


def test_an_output_is_no_input_no_folder_and_its_place_is_made_first(tmp_path):
    path = tmp_path / "new" / "a.png"
    assert run.check_output(path) == path and path.parent.is_dir()
    path.write_text("")
    for wrong in (tmp_path, tmp_path / "new" / ".." / "b.png", path / "a.png"):
        with pytest.raises(ValueError, match="choose another name"):
            run.check_output(wrong, None, tmp_path / "b.png")


def test_a_busy_core_is_spared_unless_threads_are_given(monkeypatch, capsys):
    slow = []
    monkeypatch.setattr(torch, "conv2d",
                        lambda *_: time.sleep(0.02 if torch.get_num_threads() in slow else 0.01))
    for given, slow[:], threads in ((False, [4, 3], 2), (False, [2, 3], 4), (True, [4, 3], 4)):
        torch.set_num_threads(4)
        with monkeypatch.context() as context:
            context.setenv("OMP_NUM_THREADS", "4") if given else context.delenv("OMP_NUM_THREADS")
            run.find_device("cpu")
        assert torch.get_num_threads() == threads
        assert ("computing with 2 of 4 threads" in capsys.readouterr().out) == (threads < 4)


def test_each_of_torchruns_processes_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", {"cuda:1", "cuda:3"}.remove)
    monkeypatch.setattr(torch, "zeros", lambda *_, device: torch.ones(1))
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert (run.find_device(), run.find_device("cuda:3")) == ("cuda:1", "cuda:3")


def test_a_processor_is_told_of_a_gpu_and_does_not_emulate_bfloat16(monkeypatch, capsys):
    for here in (True, False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: here)
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: here)
        assert run.find_device("cpu") == "cpu"
        assert run.bf16_pays(True, "cpu") == here and not run.bf16_pays(False, "cpu")
        said = capsys.readouterr().out
        assert ("there is a GPU" in said) == here and ("float32 is faster here" in said) != here


def test_a_script_ends_in_one_line(capsys):
    def ended(error, *options):
        def main(args):
            raise error

        parser = cgn.build_parser()
        parser.prog = "x.py"
        with pytest.raises(SystemExit) as stop:
            run.command(parser, main, options)
        return stop.value.code, capsys.readouterr().err

    assert ended(ValueError("a\n b")) == ended(OSError("a b")) == (2, "x.py: a b\n")
    assert ended(run.Stopped("stopped after step 3")) == (130, "\nstopped after step 3\n")
    assert "memory is full" in ended(torch.OutOfMemoryError())[1]
    assert ended(None, "--threads", "0") == (2, "x.py: --threads 0: must be at least 1\n")
    with pytest.raises(RuntimeError, match="gloo"):         # without a group
        ended(RuntimeError("gloo"))


# ---------- cgn: equations and mechanisms

def tiny_config(**changes):
    return {"model": "cgn", "dataset": "colored", "names": [f"digit {k}" for k in range(10)], "seed": 3,
            "size": 32, **cgn.PRESETS["digits"], "steps": 4, "batch": 8, "lr": 1e-3, "binary": 1.0,
            "center": 0.0, "warmup": 2, "noise": 0.3, "log_every": 1, "saves": (2,), **changes}


def tiny_data():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (64, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return images, torch.arange(64) % 10


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a finished tiny run."""
    out = tmp_path_factory.mktemp("run")
    cgn.train(tiny_config(), *tiny_data(), out)
    return out


cgn_works = partial(works, cgn)


def cgn_refuses(options, *words):
    one_line(script(cgn, *options), *words)


def picture(path):
    return F_image.pil_to_tensor(Image.open(path))


def nearly(a, b):
    return (a.int() - b.int()).abs().max() <= 1


def test_compose_is_equation_2():
    m = torch.tensor([[[[0.0, 0.25, 1.0]]]])
    f, b = torch.full((1, 3, 1, 3), 0.8), torch.full((1, 3, 1, 3), -0.4)
    assert torch.allclose(cgn.compose(m, f, b)[0, 0, 0], torch.tensor([-0.4, -0.1, 0.8]), atol=1e-6)


def test_mask_losses_by_hand():
    assert cgn.binary_entropy(torch.tensor([[[[0.0, 1.0]]]])) < 2e-3
    assert abs(cgn.binary_entropy(torch.tensor([[[[0.25]]]])) - 0.8112781) < 1e-6
    masks = torch.stack([torch.full((1, 2, 2), value) for value in (0.02, 0.5, 0.95)])
    assert abs(cgn.mask_interval(masks) - (0.08 + 0 + 0.05) / 3) < 1e-6
    m = torch.zeros(2, 1, 32, 32)
    m[0, :, 5:7, 6], m[1, :, 25:27, 25] = 0.5, 1.0                  # the middle is 6 .. 25
    assert cgn.off_center(m) == (0.5 + 1) / 2048
    sample, labels = cgn.Sample(m, *[torch.zeros(2, 3, 32, 32)] * 3), torch.zeros(2).long()
    config = tiny_config(center=2048.0, warmup=4)
    for step, expected in (0, 1.5), (3, 1.5 / 4), (9, 0):
        terms = cgn.part_losses(config, sample, labels, step, *[torch.zeros(10, 3)] * 2)
        assert terms["center"] == expected


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
    assert abs(miniature.relativistic_hinge(real, fake) - (0 + 0.5 + 2) / 3) < 1e-6


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
    drawn = cgn.draw_arrangement(run.rng(0, 0), 20, shuffle)
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
    assert cgn.Discriminator()(sample.image, y).shape == cgn.Discriminator(size=64)(
        cgn.MnistGAN(size=64)(torch.randn(4, 32), y).image, y).shape == (4,)


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


# ---------- cgn: training on digits

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


def test_four_steps_on_digits_give_what_plain_loops_give(trained):
    """Numbers of a straight line of the same steps, in plain loops."""
    expected = {"discriminator": 1.9695, "real": -0.1020, "fake": -0.1325, "adversarial": 0.1269,
                "binary": 0.739, "mask": 0, "color": -0.0029, "border": 0.3716, "mask_mean": 0.3530}
    *_, row = logged(trained)
    assert {name: row[name] for name in expected} == pytest.approx(expected, rel=0.002, abs=0.0005)


def test_training_leaves_sheets_that_do_not_change_the_model_and_a_generator_to_ship(trained, tmp_path):
    checkpoint = trained / "checkpoint.pt"
    model = cgn.load(checkpoint)
    assert model.step == 4 and not model.training and not any(p.requires_grad for p in model.parameters())
    assert model.sha256 == hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    before = copy.deepcopy(model.state_dict())
    sheet = cgn.training_sheet(model, model.config, tmp_path, None, 4)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert sheet.read_bytes() == (trained / "sheet-000004.png").read_bytes()
    u = torch.from_numpy(run.rng(3, 0).standard_normal((500, 32), dtype=np.float32))
    masks = model.f_shape(u, torch.arange(500) // 50)
    ious = [evaluate.pairwise_iou(of_class) for of_class in masks.split(50)]
    first, *_, last = logged(trained)
    assert last["pairwise_iou"] == pytest.approx(np.mean(ious)) and "entropy" not in first
    assert last["entropy"] == pytest.approx(cgn.binary_entropy(masks).item())
    cgn.save_generator(checkpoint, tmp_path / "small.pth")
    small = cgn.load(tmp_path / "small.pth")
    a, b = (drawing.counterfactuals(made, 4).images.float() for made in (model, small))
    assert 0 < (a - b).abs().mean() < 1


def run_result(out):
    """All that a run leaves, but its speed."""
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


def test_the_average_weighs_later_steps_more(tmp_path, monkeypatch):
    update, decays = cgn.update_average, []
    monkeypatch.setattr(cgn, "update_average", lambda average, model, decay: decays.append(decay))
    cgn.train(tiny_config(), *tiny_data(), tmp_path)
    assert decays == pytest.approx([1 / 5, 2 / 6, 3 / 7, 4 / 8])
    old, new = torch.nn.PReLU(init=1.0), torch.nn.PReLU(init=2.0)
    update(old, new, 0.9)
    assert old.weight.item() == pytest.approx(1.1) and new.weight.item() == 2.0


def silhouettes(folder, count=2, side=70):
    """Pictures that are no digits: discs, bars and crosses in drawn textures."""
    textures, (row, column) = mv.draw_textures().numpy(), np.mgrid[:side, :side]
    for label, name in enumerate(("disc", "bar", "cross")):
        for index in range(count):
            generator = run.rng(label, index)
            size, x, y = generator.uniform((0.18, 0.4, 0.4), (0.3, 0.6, 0.6)) * side
            x, y = abs(column - x) / size, abs(row - y) / size
            bar = (x < 1) & (y < 1 / 3)
            mask = (x ** 2 + y ** 2 < 1, bar, bar | (y < 1) & (x < 1 / 3))[label]
            corners = generator.integers(textures.shape[3] - side, size=(2, 2))
            parts = (texture[label, :, top:top + side, left:left + side]
                     for texture, (top, left) in zip(textures, corners))
            picture = Image.fromarray(np.where(mask, *parts).transpose(1, 2, 0))
            mv.save_png(Path(folder, name, f"{index}.png"), picture)


def test_a_folder_of_pictures_trains_like_a_variant_and_may_be_named_otherwise(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    silhouettes("pictures")
    options = ("--batch 4 --steps 2 --interval 0.1 0.9 --margin 0 --size 64 --set noise=5 --out run --dataset"
               .split())
    seen, judge = [], cgn.Discriminator.forward
    with monkeypatch.context() as patch:
        patch.setattr(cgn.Discriminator, "forward",
                      lambda self, x, y: seen.append(x.std()) or judge(self, x, y))
        assert "64 x 64 pixels" in cgn_works(*options, "pictures/")
    assert seen[0].item() == pytest.approx(2 * 5, rel=0.05)
    cgn_works(*options, tmp_path / "pictures")
    model = cgn.load("run/checkpoint.pt")
    assert (model.config["names"], model.config["interval"]) == (["bar", "cross", "disc"], (0.1, 0.9))
    assert drawing.counterfactuals(model, 4).images.shape == (4, 3, 64, 64)
    assert "border" not in logged(Path("run"))[0]
    shutil.copy("pictures/bar/0.png", "pictures/bar/2.png")
    cgn_refuses([*options, "pictures"], "another data")
    cgn_refuses([*options, "pictures", "--out", "pictures/run"], "which is read")


# ---------- cgn: training on ImageNet

@pytest.fixture(scope="module")
def networks():
    """State dicts of a tiny teacher, U-2-Net and VGG16."""
    torch.manual_seed(0)
    _, _, style = cgn.random_networks()
    style = {key: value + 0.1 * torch.randn(value.shape) for key, value in style.items() if value.numel() > 1}
    saliency = random_u2net(TINY).state_dict()
    saliency["outconv.bias"] *= 0       # about as many salient pixels as not
    return raw_biggan([(16, 16)] * 6, 2, classes=10), saliency, style


def imagenet_model(networks, frozen=False):
    mechanisms = (biggan.load(networks[0], frozen=frozen) for _ in range(3))
    return cgn.ImagenetCGN(*mechanisms, u2net.load(networks[1]))


def imagenet_config(**changes):
    return {"model": "imagenet", "names": list("abcdefghij"), "seed": 3, **cgn.PRESETS["imagenet"],
            "steps": 2, "accumulate": 2, "lr": (1e-4, 2e-4, 3e-4), "patch": 5, "saves": (1,), **changes}


def imagenet_run(states, out, **changes):
    model, style = imagenet_model(states), cgn.StyleFeatures(states[2])
    cgn.train_imagenet(imagenet_config(**changes), model, biggan.load(states[0]), style, out)
    return model


def plain_vgg(state, x):
    """What torchvision's VGG16, nothing folded, has after each of its four pools, in the precision of x."""
    h, number, found = F_image.normalize((x + 1) / 2, u2net.MEAN, u2net.STD), 0, []
    for count in (2, 2, 3, 3):
        for _ in range(count):
            conv = (state[f"features.{number}.{name}"].to(x) for name in ("weight", "bias"))
            norm = (state[f"features.{number + 1}.{name}"].to(x)
                    for name in ("running_mean", "running_var", "weight", "bias"))
            h, number = F.relu(F.batch_norm(F.conv2d(h, *conv, padding=1), *norm)), number + 3
        h, number = F.max_pool2d(h, 2), number + 1
        found.append(h)
    return found


def straight_line_terms(networks, raw, u, y, draws, patch):
    """Equation 4's terms in the precision of u: plain networks, nothing folded; `raw`: three raw dicts."""
    saliency_net = u2net.load(networks[1], frozen=False).to(u).eval().requires_grad_(False)

    def saliency(x):
        return saliency_net(F_image.normalize((x + 1) / 2, u2net.MEAN, u2net.STD))

    def style(a, b):
        return cgn.perceptual(plain_vgg(networks[2], a), plain_vgg(networks[2], b))

    x_gt = plain_biggan({key: value.to(u) for key, value in networks[0].items()}, u, y, 50)
    pre_mask, f, b = (plain_biggan(state, u, y, 50) for state in raw)
    m = saliency(pre_mask)
    x, grid = m * f + (1 - m) * b, cgn.patch_grid(x_gt, m, draws, patch).to(u)
    return {"l1": (x - x_gt).abs().mean(), "perceptual": style(x, x_gt), "binary": cgn.binary_entropy(m),
            "mask": cgn.mask_interval(m), "texture": style(f, grid), "background": saliency(b).mean()}


def test_every_term_and_its_gradient_equal_the_straight_line(networks):
    """Into the stored weights of all three mechanisms."""
    small = {**networks[1], "outconv.bias": networks[1]["outconv.bias"] - 3}        # masks: all terms act
    networks, states = (networks[0], small, networks[2]), []
    model, parameters, stored = imagenet_model(networks).double(), [], []
    for seed, part in enumerate((model.f_shape, model.f_text, model.f_bg), 1):
        raw = raw_biggan([(16, 16)] * 6, 2, classes=10, seed=seed)
        states.append({key: value.double() for key, value in raw.items()})
        part.load_state_dict(states[-1])
        for name, parameter in part.named_parameters():
            parameters.append(parameter)
            stored.append(states[-1][name].requires_grad_())
    teacher, style = biggan.load(networks[0], frozen=False).double(), cgn.StyleFeatures(networks[2]).double()
    u, y, draws = cgn.draw_training(model, 0, range(2))
    u = u.double()
    wanted = straight_line_terms(networks, states, u, y, draws, 5)
    for part, terms in cgn.WITHOUT.items():
        config = imagenet_config(without=cgn.WITHOUT.keys() - {part})
        model.zero_grad()
        found = cgn.micro_step(model, teacher, style, u, y, draws, config, 0.5)
        assert [*found] == [*terms, "mask_mean"]
        assert all(wanted[name] > 0 and abs(2 * found[name] / wanted[name] - 1) < 1e-5 for name in terms)
        total = 0.5 * sum(config[name] * wanted[name] for name in terms)
        gradients = torch.autograd.grad(total, stored, retain_graph=True, materialize_grads=True)
        pairs = zip((parameter.grad for parameter in parameters), gradients)
        errors = [((a - b).norm() / b.norm()).item() for a, b in pairs if b.norm() > 0]
        assert len(errors) > 50 and max(errors) < 1e-5, part


def test_an_update_does_not_depend_on_how_its_images_are_cut(networks, tmp_path, monkeypatch):
    draw, drawn = cgn.draw_training, []
    monkeypatch.setattr(cgn, "draw_training", lambda *given: drawn.append(given[1:]) or draw(*given))
    one, two = (imagenet_run(networks, tmp_path / str(batch), batch=batch, accumulate=3) for batch in (1, 2))
    assert drawn[-2:] == [(3, range(3, 5)), (3, range(5, 6))]
    assert all(torch.allclose(a, b, atol=2e-5) for a, b in zip(one.parameters(), two.parameters()))
    for part, lr in ((two.f_shape, 1e-4), (two.f_text, 2e-4), (two.f_bg, 3e-4)):    # Adam's first two steps
        moved = part.generator["gen_z"].weight_orig - networks[0]["generator.gen_z.weight_orig"]
        assert 1.9 * lr < moved.abs().max() < 2.05 * lr
    a, b = (logged(tmp_path / name)[1] for name in ("1", "2"))
    assert all(abs(a[name] - b[name]) <= 1e-4 * abs(a[name]) for name in (*cgn.TERMS, "mask_mean"))


def test_an_imagenet_run_continues_bit_for_bit_without_frozen_networks_in_its_checkpoint(networks, tmp_path):
    free = {"steps": 3, "batch": 2, "style": "moved.pth"}           # an update has one image
    imagenet_run(networks, tmp_path / "whole", accumulate=1, **free)
    for more in ({}, free):
        imagenet_run(networks, tmp_path / "parts", accumulate=1, **more)
    whole, parts = (run_result(tmp_path / name) for name in ("whole", "parts"))
    assert parts == whole and whole[0].keys() == {
        "config", "step", "threads", "f_shape", "f_text", "f_bg", "optimizer"}


def test_as_many_images_at_once_as_fit_a_gpus_memory(networks, monkeypatch):
    """One takes 3 GB, a further one 2: eight fit into 18.4, six divide twelve."""
    model, peaks = imagenet_model(networks), iter([3e9, 5e9])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: next(peaks))
    card = types.SimpleNamespace(total_memory=20e9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    monkeypatch.setattr(cgn, "matrix_rate", lambda _: 1e12)
    watch, a = types.SimpleNamespace(), torch.ones(10, 50)          # of 10,000 operations an image
    assert cgn.images_at_once(lambda part: [a @ a.T for _ in part], model, 12, watch) == 6
    assert watch.note(1e6) == ", 1.0 % of 1 TFLOP/s"


@pytest.fixture(scope="module")
def imagenet_checkpoint(networks, tmp_path_factory):
    out = tmp_path_factory.mktemp("imagenet")
    torch.save(networks[1], out / "saliency.pt")
    imagenet_run(networks, out, steps=1, accumulate=1, saliency=str(out / "saliency.pt"))
    return out / "checkpoint.pt"


def test_the_authors_checkpoint_is_run_as_it_was_trained(networks, imagenet_checkpoint, tmp_path):
    """U-2-Net gets [-1, 1] and align_corners=True."""
    state = {**run.read_checkpoint(imagenet_checkpoint), "biggan_GT": networks[0], "u2net": networks[1]}
    torch.save({f"module.{part}.{key}": value for part in "biggan_GT u2net f_shape f_text f_bg".split()
                for key, value in state[part].items()}, tmp_path / "cgn.pth")
    u, y = torch.randn(2, 8), torch.tensor([0, 9])
    a, b = (cgn.load(path)(u, y) for path in (imagenet_checkpoint, tmp_path / "cgn.pth"))
    assert torch.equal(a.foreground, b.foreground) and torch.equal(a.pre_mask, b.pre_mask)
    assert torch.allclose(b.mask, u2net.load(networks[1], align_corners=True)(b.pre_mask), atol=1e-6)
    assert not torch.allclose(a.mask, b.mask, atol=1e-3)


def test_a_checkpoint_names_its_saliency_network_or_is_refused(imagenet_checkpoint, tmp_path):
    state, path = run.read_checkpoint(imagenet_checkpoint), tmp_path / "bad.pt"
    moved = {**state["config"], "saliency": "/nowhere/u2net-of-mine.pth", "truncation": 0.5}
    for held, word in (({**state, "f_text": "/dev/zero"}, "bad.pt"), ({"weights": 3}, "bad.pt"),
                       ({**state, "config": moved}, "u2net-of-mine")):
        torch.save(held, path)
        with pytest.raises(ValueError, match=word):
            cgn.load(path)
    model = cgn.load(path, saliency=state["config"]["saliency"])
    assert (model.truncation, model.step, model.config) == (0.5, 1, moved)


def test_missing_big_networks_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **more: open(tmp_path / "no network"))
    monkeypatch.setattr(cgn, "WEIGHTS", tmp_path)
    cgn_refuses(("--dataset", "imagenet", "--out", tmp_path / "run", "--set", "teacher=t.bin"),
                "t.bin", "u2net.pth", "vgg16_bn-6c64b313.pth", "no network", "--mini")
    with pytest.raises(ValueError, match="features.0"):
        cgn.StyleFeatures({})


# ---------- cgn: sampling

class HandCGN(cgn.CGN):
    """Pictures of one level, a plain sum of the noise, label and cells that they are made of."""

    noise, sha256, truncation = 2, "hash", 0.7

    def __init__(self, resolution=4, classes=5):
        super().__init__()
        self.resolution, self.classes, self.calls = resolution, classes, []
        self.config = {"model": "hand", "names": [f"c{k}" for k in range(classes)]}
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def arrange(self, generator, count):
        return torch.from_numpy(generator.integers(8, size=(count, 2)))

    def made(self, scale, u, y, cells):
        self.calls.append(len(u))
        self.seen = self.truncation, torch.is_autocast_enabled("cpu")
        y = cgn.class_weights(y, self.classes) @ torch.arange(float(self.classes))
        level = scale * (u[:, 0] - u[:, 1] / 2 + y + cells / 16) / 8
        return level[:, None, None, None].expand(-1, 3, self.resolution, self.resolution)

    def shape(self, u, y):
        pre_mask = self.made(1, u, y, 0)
        return (pre_mask[:, :1] + 0.25).clamp(0, 1), pre_mask

    def texture(self, u, y, arrangement):
        return self.made(0.5, u, y, arrangement[:, 0])

    def background(self, u, y, arrangement):
        return self.made(-1, u, y, arrangement[:, 1])


PARTS = ["pre-mask", "m", "f", "b", "x_gen"]


def shown(model, u, y, cells):
    """The PARTS that one plain call makes, as bytes, (5, N, 3, R, R)."""
    m, f, b, x, pre_mask = model(tuple(u), tuple(y), cells)
    return torch.stack([drawing.to_uint8(part.expand_as(x)) for part in (pre_mask, 2 * m - 1, f, b, x)])


def same(a, b):
    return all(torch.equal(*pair) for pair in zip(a, b, strict=True))


@pytest.fixture
def hand(monkeypatch):
    """What --checkpoint HAND loads."""
    model = HandCGN()
    monkeypatch.setattr(cgn, "load", lambda source: model)
    return model


@pytest.fixture
def sheets(monkeypatch):
    """What is written as sheets: path, images, names of rows and columns, scale."""
    written = []
    monkeypatch.setattr(mv, "save_sheet", lambda *what, scale: written.append((*what, scale)))
    return written


def test_floats_are_bytes_by_hand():
    floats = torch.tensor([-1.5, -1, -0.5, 0, 0.5, 1, 1.5])
    assert drawing.to_uint8(floats).tolist() == [0, 0, 64, 128, 191, 255, 255]


def test_noise_labels_and_cells_are_drawn_in_this_order(any_cgn):
    generator, any_cgn.truncation = np.random.Generator(np.random.Philox(key=[7, 2])), 0.5
    u, y, cells = any_cgn.draw(run.rng(7, 2))
    if isinstance(any_cgn, cgn.ImagenetCGN):
        assert torch.equal(u, biggan.truncated_noise(3, 8, 0.5, seed=int(generator.integers(2 ** 63))))
    else:
        assert np.array_equal(u, generator.standard_normal((3, 32), dtype=np.float32))
    assert np.array_equal(y, generator.integers(10, size=3))
    assert torch.equal(cells, any_cgn.arrange(generator, 1)[0])


def test_a_gan_draws_one_label_and_all_of_its_picture_is_foreground():
    gan, (u, y, _) = cgn.MnistGAN().eval(), cgn.MnistCGN().draw(run.rng(7, 2))
    assert same(gan.draw(run.rng(7, 2))[:2], (u[:1].expand(3, 32), y[:1].expand(3)))
    (m, f, b, x, _), _ = drawing.counterfactual_batch(gan, 7, range(2, 4), 10)  # of one shape: means nothing
    assert torch.equal(f, x) and m.min() == 1 and not b.any() and not nearly(*drawing.to_uint8(x))


def test_counterfactuals_of_one_shape_share_its_noise_and_label_and_nothing_else():
    hand = HandCGN()
    for part, per_shape in ((range(3, 11), 4), (range(2), 1)):
        u, y, cells = drawn = drawing.draw(hand, 7, part, per_shape)
        for place, index in enumerate(part):
            alone, first = (hand.draw(run.rng(7, k)) for k in (index, index // per_shape * per_shape))
            alone[0][0], alone[1][0] = first[0][0], first[1][0]
            assert same((u[:, place], y[:, place], cells[place]), alone)
    assert same(drawn, drawing.draw(hand, 7, range(2)))


def test_counterfactuals_are_a_pure_function_of_seed_and_index(tmp_path):
    hand, rows = HandCGN(), ["file,seed,u,shape,texture,background"]
    data = drawing.counterfactuals(hand, 11, 5, per_shape=3, at_once=4)
    drawing.write_counterfactuals(hand, tmp_path, 11, 5, 3, at_once=5, parts=("mask", "background"))
    assert hand.calls == [2, 4, 4, 2, 4, 4, 2, 3, 3] + [2, 5, 1, 5, 1, 2, 5, 5]     # in files, whole shapes
    u, y, cells = drawing.draw(hand, 5, range(11), 3)
    _, m, _, b, x = shown(hand, u, y, cells)
    assert same(data, (x, *y))
    for index, (shape, texture, background) in enumerate(y.T):
        files = (picture(tmp_path / f"{index:08d}{part}.png") for part in ("", "-mask", "-background"))
        assert same(files, (x[index], m[index, :1], b[index]))
        rows.append(f"{index:08d}.png,5,{index // 3 * 3},{shape},{texture},{background}")
    assert (tmp_path / "labels.csv").read_text() == "\n".join(rows) + "\n"
    assert same(drawing.counterfactuals(hand, 11), drawing.counterfactuals(hand, 11, 0, 1))


def test_a_data_set_is_a_pure_function_of_its_index_and_is_continued(tmp_path, monkeypatch):
    hand, one, two = HandCGN(), tmp_path / "one", tmp_path / "two"
    write = partial(drawing.write_counterfactuals, hand, count=11, per_shape=3, at_once=2, parts=("mask",))
    write(one)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, there in (("1", {3, 4, 5, 9, 10}), ("0", {*range(11)})):
        monkeypatch.setenv("RANK", rank)
        write(two)
        assert {int(path.stem) for path in two.glob("*[0-9].png")} == there
        assert (two / "labels.csv").exists() == (rank == "0")
    monkeypatch.delenv("WORLD_SIZE")
    (two / "00000004-mask.png").unlink()
    hand.calls.clear()
    write(two)
    assert hand.calls == [1, 2, 1, 2, 1] and run_result(two) == run_result(one)


def test_a_data_set_is_of_one_model_one_seed_and_one_precision(tmp_path):
    write = partial(drawing.write_counterfactuals, out=tmp_path, count=2)
    write(HandCGN())
    write(HandCGN(), parts=("foreground",), count=1)        # these may change
    for name, value in (("seed", 4), ("per_shape", 2), ("bf16", True), ("sha256", "a"), ("truncation", 1)):
        model = HandCGN()
        more = {} if hasattr(model, name) else {name: value}
        setattr(model, name, value)
        with pytest.raises(ValueError, match="of other weights"):
            write(model, **more)


def test_written_tensors_are_what_counterfactuals_gives_beside_a_preview(hand, sheets, tmp_path, monkeypatch):
    monkeypatch.setattr(cgn, "bf16_pays", lambda wanted, device: wanted)
    command, out = "--checkpoint HAND --seed 2 --per-shape 3 --counterfactuals", tmp_path / "set.pt"
    for count in (7, 250, 12):
        cgn_works(*command.split(), count, "--out", out)
    assert hand.seen == (0.7, False)
    assert [images.shape[:2] for _, images, *_ in sheets] == [(1, 7), (10, 10), (1, 10)]
    held, data = torch.load(out, weights_only=True), drawing.counterfactuals(hand, 12, 2, 3)
    assert same([held.pop(name) for name in data._fields], data)
    assert held == {"names": hand.config["names"], "seed": 2, "per_shape": 3, "weights": "hash"}
    assert sheets[2][0] == tmp_path / "set-preview.png" and torch.equal(sheets[2][1][0], data.images[:10])
    monkeypatch.setitem(hand.config, "model", "imagenet")
    cgn_works(*command.split(), 1, *"--parts mask --bf16 --truncation 1 --out".split(), tmp_path / "set")
    assert json.loads((tmp_path / "set" / "settings.json").read_text())["bf16"] and hand.seen == (1, True)


def test_a_sheet_shows_the_parts_of_each_class_and_counterfactuals_of_its_shape(sheets, tmp_path):
    """In training at a lower truncation, of up to ten classes; ImageNet's plain draws have one u."""
    def teacher(u, y, truncation):
        return truncation * (u[:, :1] + y[:, None])[:, :, None, None].expand(-1, 3, 4, 4) / 8

    hand = HandCGN(classes=19)
    config = {"model": "imagenet", "names": hand.config["names"], "seed": 5}
    drawing.class_sheet(hand, range(0, 19, 2), config["names"], "a.png", 5, 3, 2)
    cgn.training_sheet(hand, config, tmp_path, teacher, 12)
    assert hand.truncation == 0.7 and hand.config is config
    for (_, images, *_, scale), plain, count in zip(sheets, (3, 1), (3, 2), strict=True):
        u, y, cells = drawing.draw(hand, 5, range(10 * count))
        y[0] = torch.arange(0, 19, 2).repeat_interleave(count)
        mixed, y = shown(hand, u, y, cells)[4], y[:1].expand_as(y)
        parts = shown(hand, u if plain == 3 else u[:1].expand_as(u), y, cells)
        if plain == 1:
            parts = torch.cat([parts, drawing.to_uint8(teacher(u[0], y[0], 0.5))[None]])
        blocks = [*parts.unflatten(1, (10, count))[:, :, :plain], mixed.unflatten(0, (10, count))[:, :2]]
        assert torch.equal(images, torch.cat(blocks, dim=1)) and scale == 16


def test_a_call_is_rendered_a_few_at_a_time():
    for resolution, calls in ((256, [2, 2, 1]), (512, [1] * 5)):
        hand = HandCGN(resolution)
        drawn = drawing.draw(hand, 1, range(5))
        made = drawing.render(hand, *drawn)
        assert hand.calls == 3 * calls and list(made) == PARTS and same(made.values(), shown(hand, *drawn))


def test_interpolations_move_only_what_they_name():
    hand = HandCGN()
    for what, ends in itertools.product((*cgn.MECHANISMS, "all"), (None, (1, 4))):
        moving = torch.tensor([what in (name, "all") for name in cgn.MECHANISMS])
        images = drawing.interpolate(hand, what, 1, rows=2, columns=3, ends=ends)
        u, y, cells = drawing.draw(hand, 1, range(4))
        if ends:
            y[moving] = torch.tensor([1, 4, 1, 4])
        for column in range(3):
            move = column / 2 * moving[:, None, None]
            between = [x[:, ::2] + move * (x[:, 1::2] - x[:, ::2]) for x in (u, F.one_hot(y, 5).float())]
            assert nearly(images[:, column], shown(hand, *between, cells[::2])[4])


def test_the_triples_of_figure_24():
    names = list(biggan.class_numbers(",".join(map(str, range(1000))), 1000).values())
    rows = [[names[label] for label in drawing.parse_classes(text, names, 3)] for text in drawing.FIGURE_24]
    assert len(rows) == 25 and rows[0] == ["school bus", "giant panda", "geyser"]


@pytest.mark.parametrize("options, rows, columns, truncation", [
    ("", ["c0", "c1", "c2", "c3", "c4"], PARTS + ["counterfactuals"] * 8, 0.5),
    ("--outputs c3", ["c3"] * 6, PARTS + ["counterfactuals"] * 3, 0.5),
    ("--triples 1,2,3 c4,4,0", ["c1 / c2 / c3", "c4 / c4 / c0"], ["shape / texture / background"] * 4, 0.5),
    ("--interpolate all --classes c1 4", [f"pair {row}" for row in range(10)], ["all: c1 → c4"] * 10, 0.7)])
def test_sheets_of_either_scale(hand, sheets, tmp_path, options, rows, columns, truncation):
    hand.resolution = 64
    cgn_works("--checkpoint", "HAND", "--out", tmp_path / "a.png", *options.split(), "--seed", 2)
    (path, images, *names, _), = sheets
    assert path == tmp_path / "a.png" and names == [rows, columns] and hand.seen == (truncation, False)
    if "triples" in options:
        u, _, cells = drawing.draw(hand, 2, range(4))
        for row, y in zip(images, torch.tensor([[1, 2, 3], [4, 4, 0]])):
            assert torch.equal(row, shown(hand, u, y[:, None].expand(3, 4), cells)[4])
    if "classes" in options:
        assert torch.equal(images, drawing.interpolate(hand, "all", 2, ends=(1, 4)))


# Options | a word of the one line that refuses them.
MISTAKES = """\
--checkpoint HAND --triples 1,2 | 3 are needed
--checkpoint HAND --triples 1,2,5 | 0..4
--checkpoint HAND --outputs 'c 3' | did you mean c3
--checkpoint HAND --outputs 1 --interpolate all | one at a time
--checkpoint HAND --counterfactuals 5 --per-shape 0 | at least 1
--checkpoint HAND --counterfactuals 5 --out {}/checkpoint.pt | would be lost
--checkpoint HAND --photo p.png --texture 1 | no U-2-Net
--checkpoint HAND --counterfactuals 5 --out {}/a.pt --parts mask | are pictures
--checkpoint HAND --outputs 1 --out {}/a.jpg | .png
--checkpoint HAND --outputs 1 --per-shape 2 | --outputs
--counterfactuals 3 | --checkpoint
--size 64 | means nothing
--set shuffle=none | puzzle
--set saves=(0,) | at least 1
--dataset colord | did you mean colored
--set lr=-1.0 | more than 0
--margin 16 | 0..15
--interval 0.9 0.1 | lower one first
--seed 9223372036854775808 | 2^63
--dataset imagenet --mini --without shape text bg rec | not all
--dataset imagenet --mini --set "without=('foo',)" | some of
--dataset imagenet --mini --short | not allowed
--dataset wildlife --variance 0 | means nothing
--model gan --margin 5 | means nothing
--set recency=-1 | at least 1
--checkpoint HAND --truncation 0.5 | means nothing"""


def test_mistakes_are_one_line(hand, tmp_path, monkeypatch, few_images):
    for mistake in MISTAKES.splitlines():
        options, word = mistake.format(tmp_path).split(" | ")
        cgn_refuses(("--out", tmp_path / "x.png", *shlex.split(options)), word)
    hand.independent = False
    cgn_refuses("--checkpoint HAND --interpolate shape".split(), "GAN")
    monkeypatch.setenv("WORLD_SIZE", "2")
    cgn_refuses(("--dataset", "colored"), "one process")


def test_a_photo_keeps_its_object_or_its_background_at_its_own_size(imagenet_checkpoint, monkeypatch):
    model, mask = cgn.load(imagenet_checkpoint), Image.new("L", (40, 24))
    photo = Image.fromarray(np.random.default_rng(0).integers(256, size=(24, 40, 3), dtype=np.uint8))
    mask.paste(255, (0, 0, 10, 24))                         # the object is the left quarter
    monkeypatch.setattr(u2net, "saliency", lambda network, photo, side: {32: mask}[side])
    u, own = model.draw(run.rng(0, 0))[0], F_image.pil_to_tensor(photo)
    made = model.texture(u[1:2], torch.tensor([3])), model.background(u[2:], torch.tensor([4]))
    f, b = drawing.to_uint8(F.interpolate(torch.cat(made), (24, 40), mode="bilinear", antialias=True))
    for labels, object_, behind in (((3, None), f, own), ((None, 4), own, b)):
        image = drawing.recompose(model, photo, u, *labels)
        assert torch.equal(image, torch.cat([object_[..., :10], behind[..., 10:]], dim=2))


def test_a_folder_of_photos_becomes_one_that_the_ensemble_trains_on(imagenet_checkpoint, tmp_path):
    model, photo, out = cgn.load(imagenet_checkpoint), Image.new("RGB", (20, 30), "blue"), tmp_path / "out"
    for name in ("d/0.png", "b/0.png", "b/1.png"):
        mv.save_png(tmp_path / "in" / name, photo)
    command = f"--checkpoint {imagenet_checkpoint} --seed 5 --texture any --background c --photo".split()
    cgn_works(*command, tmp_path / "in", "--out", out)
    files = mv.labelled_files(out)
    mv.check_labels(out, drawing.class_names(model), files)
    for index, ((path, labels), shape) in enumerate(zip(files, (1, 1, 3), strict=True)):
        u, y, _ = model.draw(run.rng(5, index))
        assert labels == (shape, y[1], 2)
        assert torch.equal(picture(path), drawing.recompose(model, photo, u, int(y[1]), 2))
    cgn_works(*command, tmp_path / "in" / "d" / "0.png", "--out", out / "one.png")
    assert torch.equal(picture(out / "one.png"), picture(files[0][0]))
    cgn_refuses((*command, tmp_path / "in", "--out", tmp_path / "in" / "b"), "which is read")
    cgn_refuses((*command, tmp_path / "in", "--out", out), "holds a data set")
    for name in range(model.classes - 2):                       # as many as the CGN's, but others
        mv.save_png(tmp_path / "in" / f"x{name}" / "0.png", photo)
    cgn_refuses((*command, tmp_path / "in", "--out", tmp_path / "new"), "'x0' is neither")


# ---------- classify

classify_run = partial(works, classify)


def classify_refused(options, *words):
    one_line(script(classify, *options), *words)


@pytest.mark.parametrize("training", (True, False))
def test_the_classifier_is_the_papers(training):
    torch.manual_seed(0)
    model = classify.Classifier().double().train(training)
    for tensor in (*model[0].parameters(), model[0].running_mean, model[0].running_var):
        torch.nn.init.uniform_(tensor, 0.5, 1.5)
    plain, x = copy.deepcopy(model), torch.rand(8, 3, 32, 32, dtype=torch.double)
    h, wanted = model.features(x), torch.nn.Sequential.forward(plain, x)
    scores = model.rest(h)                          # which folds the first two layers
    assert h.shape == (8, 32, 14, 14) and torch.allclose(scores, wanted, rtol=1e-9)
    assert torch.allclose(model[0].running_mean, plain[0].running_mean)
    for found in (scores, wanted):
        F.cross_entropy(found, torch.arange(8)).backward()
    assert all(torch.allclose(a.grad, b.grad, atol=1e-12)
               for a, b in zip(model.parameters(), plain.parameters()))


def test_a_batch_mixes_its_sources_by_seed_and_step():
    images, labels = tiny_data()
    (x, y), (_, other) = classify.mixed([(images, labels, 4), (images, labels + 10, 60)], 1, "cpu", 7)
    rows = run.rng(1, 7).integers(64, size=4)
    assert torch.equal(x, drawing.to_float(images[rows])) and torch.equal(y, labels[rows])
    assert len(other) == 60 and other.min() >= 10
    model = classify.Classifier().eval()
    assert torch.equal(classify.predict(model, images), model(drawing.to_float(images)).argmax(dim=1))


def test_a_fit_takes_its_steps_at_falling_rates():
    def objective(model, batch, progress):
        seen.append((batch, progress, *schedule.get_last_lr()))
        return model.weight.sum()

    for optimizers, rates in ((partial(classify.adam, lr=1.0), [1, 0.75, 0.5, 0.25]),
                              (partial(classify.adadelta, lr=1.0, decay=0.7, epochs=2), [1, 1, 0.7, 0.7])):
        model, seen = torch.nn.Linear(1, 1), []
        _, schedule = pair = optimizers(model, 4)
        assert not classify.fit(model, float, objective, 4, lambda *_: pair).training
        assert seen == [(step, step / 4, pytest.approx(rate)) for step, rate in enumerate(rates)]


def test_the_irm_penalty_is_the_squared_derivative_by_a_dummy_scale():
    torch.manual_seed(0)
    half, y = torch.randn(6, 10, dtype=torch.float64), torch.arange(6)
    z = half.repeat_interleave(2, dim=0)                    # both halves of the batch are the same
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    derivative, = torch.autograd.grad(F.cross_entropy(scale * half, y), scale)
    assert abs(classify.irm_penalty(z, y.repeat_interleave(2)) - derivative ** 2) < 1e-12
    with pytest.raises(ValueError, match="not 1"):
        classify.irm_penalty(z[:1], y[:1])
    same, worlds = torch.nn.Identity(), [(half, y), (-half, y)]
    risk = classify.erm(same, worlds, 0.5)
    penalty = (classify.irm_penalty(half, y) + classify.irm_penalty(-half, y)) / 2
    assert abs(classify.irm(same, worlds, 0.5, weight=3.0) - risk - 1.5 * penalty) < 1e-5


def test_a_reversed_gradient_and_a_normalised_classifier():
    h = torch.tensor([1.0, -2.0], requires_grad=True)
    seen = classify.reverse_gradient(h, 30.0)
    (seen ** 2).sum().backward()
    assert torch.equal(seen, h) and torch.equal(h.grad, -30 * 2 * h)
    model, x = classify.normalised(), torch.rand(4, 3, 32, 32)
    gain, shift = torch.tensor([[0.5, 0.8, 2.0], [0.2, 0.0, -0.1]])[:, :, None, None]
    assert torch.allclose(model(x), model(gain * x + shift), atol=0.01)


def test_lntl_as_published_by_hand():
    """Kim et al.: eight bins of a pixel, black ignored; the entropy term does not teach the head."""
    torch.manual_seed(0)
    model, x = classify.Unlearner(), torch.full((2, 3, 28, 28), -1.0)
    x[:, 0, :14], x[:, 1] = 0.999, -0.51
    bins = classify.color_bins(x)
    assert bins[0, :, 3, 3].tolist() == [7, 1, -100] and bins.shape == (2, 3, 14, 14)
    assert (classify.color_bins(torch.full((1, 3, 32, 32), -1.0)) == -100).all()
    x, y = torch.rand(4, 3, 32, 32) * 2 - 1, torch.arange(4)
    with torch.no_grad():
        h, target = model.classifier.features(x), classify.color_bins(x)
        found = model.colors(h)
        colors = sum(F.cross_entropy(found[:, k], target[:, k]) for k in range(3))
        spread = -(found.softmax(2) * found.log_softmax(2)).sum(2).mean()
        expected = F.cross_entropy(model.classifier.rest(h), y) + colors - 0.5 * spread

    def gradients(entropy, reversal):
        model.zero_grad()
        loss = classify.lntl(model, [(x, y)], 0.0, reversal=reversal, entropy=entropy)
        loss.backward()
        return loss, model.colors[0].weight.grad.clone(), model.classifier[4].weight.grad.clone()

    first, plain, other = gradients(0.5, 0.1), gradients(0.0, 0.1), gradients(0.5, 5.0)
    assert first[0].item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.allclose(first[1], plain[1]) and not torch.allclose(first[2], plain[2])
    assert torch.allclose(first[1], other[1]) and not torch.allclose(first[2], other[2])


def test_settings_of_classifiers_are_the_papers():
    methods, tables = classify.METHODS, classify.TABLES
    assert [*methods["irm-2"].batch] == ["0.9", "1.0"]                              # C.4
    assert [*methods["irm-5"].batch] == ["0.9", "0.925", "0.95", "0.975", "1.0"]
    assert [*methods["original+gan"].batch.values()] == [32, 32] and classify.BATCH == 64
    assert methods["original"].optimizers.keywords == {"lr": 1.0, "decay": 0.7, "epochs": 10}
    assert [tables[name] for name in ("seeds", "count", "per_shape")] == [[0, 1, 2], 400_000, 1]
    wanted = {"network": "resnet50", "heads": 3, "batch": 256, "ratio": 1, "epochs": 70, "lr": 0.1,
              "momentum": 0.9, "weight_decay": 1e-4, "milestones": [30, 60], "decay": 0.001, "side": 224}
    assert {name: classify.ENSEMBLE[name] for name in wanted} == wanted


def test_the_table_runs_end_to_end_and_is_not_computed_twice(tmp_path, few_images, monkeypatch):
    def rows(*more):
        classify_run("--dataset", "colored", "--seeds", 0, "--count", 100, "--steps", 3, "--runs", tmp_path,
                     "--set", "generator_steps=1", "--method", *more)
        return run.read_lines(tmp_path / "results.jsonl")

    methods = ("irm-2", "lntl", "original+gan")
    first = rows(*methods)
    assert [row["steps"] for row in first] == [9, 3, 3] and rows(*methods, "--threads", 1) == first
    monkeypatch.setattr(classify, "bf16_pays", lambda wanted, device: wanted)
    other = classify.METHODS["lntl"]._replace(objective=partial(classify.lntl, reversal=3.0, entropy=0))
    monkeypatch.setitem(classify.METHODS, "lntl", other)            # what changes a number is in the key
    for number, more in enumerate(((), ("--bf16",), ("--variance", 0.1)), 4):
        assert len(rows("lntl", *more)) == number
    assert len(list(tmp_path.glob("colored-*/classifier.pth"))) == 6                # each is kept


def test_a_cgn_is_judged_on_the_data_that_it_was_trained_on(tmp_path):
    path = tmp_path / "checkpoint.pt"
    torch.save({"config": {"dataset": "colored", "variance": 0.1, "textures": None}, "step": 1}, path)
    for dataset, given, wanted in ((None, None, 0.1), (["colored"], None, 0.1), (["colored"], 0, 0),
                                   (["double-colored"], None, None)):
        args = types.SimpleNamespace(cgn=path, dataset=dataset, variance=given, textures=None)
        classify.take_over(args)
        assert args.variance == wanted


def test_the_ceiling_recombines_ten_sets_of_a_seed(few_images):
    args = types.SimpleNamespace(mnist=mv.ROOT, textures=None, variance=0.02)
    made, second = (classify.load_source(args, "colored", "recombined", 0, 2),
                    mv.load("colored", "train", agreement=0.1, seed=21))
    assert len(made.images) == 2000 and torch.equal(made.images[200:400], second.images)


def test_a_given_cgn_or_set_of_counterfactuals_trains_a_classifier(trained, tmp_path, few_images,
                                                                   monkeypatch):
    checkpoint, file = trained / "checkpoint.pt", tmp_path / "set.pt"
    command = ("--steps", 2, "--seeds", 0, "--runs", tmp_path)
    said = classify_run(*command, "--cgn", checkpoint, "--count", 100)
    data = drawing.counterfactuals(cgn.load(checkpoint), 100, 0)
    run.save_state(file, data._asdict())
    given = (*command, "--counterfactuals", file, "--dataset", "colored")
    assert classify_run(*given).splitlines()[-2:] == said.splitlines()[-2:]         # the same images
    a, *_, b = run.read_lines(tmp_path / "results.jsonl")
    assert (a["method"], b["method"]) == ("cgn", "original+cgn") and a["generator"] != b["generator"]
    run.save_state(file, {**data._asdict(), "shape": data.shape + 10})
    classify_refused(given, "no set of digits")
    seen, draw = [], drawing.counterfactuals
    monkeypatch.setattr(classify, "bf16_pays", lambda wanted, device: wanted)
    monkeypatch.setattr(drawing, "counterfactuals",
                        lambda *given: seen.append(torch.is_autocast_enabled("cpu")) or draw(*given))
    for more in ([], ["--bf16"]):
        classify_run(*command, "--cgn", checkpoint, "--count", 99, "--method", "cgn", *more)
    assert seen == [False, True]


def test_the_cause_is_looked_for_in_environments(tmp_path, monkeypatch):
    """What reads the foreground is right as often as that agrees."""
    def load_labels(*given):
        found = load(*given)
        return found._replace(images=torch.stack(found[1:], dim=1))                 # all that it shows

    def train(method, sources, *more, **how):
        return torch.nn.ParameterDict({sources[0][1]: 1})

    load, change = classify.load, partial(monkeypatch.setattr, classify)
    change("load", load_labels)
    change("load_source", lambda *given: mv.Variant(None, "0", "1", "2"))
    change("train", train)
    change("predict", lambda model, images: images[:, int(*model)])
    said = classify_run("--make", "table5", "--dataset", "double-colored", "--seeds", 0, "--runs", tmp_path)
    rows = re.findall(r"\| double.* \| (.*) \| (.*) \| (.*) \|", said)
    for row, agreement in zip(rows, (90, 95, 100), strict=True):
        assert [*map(float, row)] == pytest.approx([100, agreement, agreement], abs=1)


def test_the_vae_loss_by_hand_and_its_picture(tmp_path, few_images):
    x, made = torch.ones(1, 3), torch.tensor([[0.0, 1.0, -1.0]])
    mean, log_variance = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, np.log(2.0)]])
    expected = (1 + 0 + 4) / 2 + 3 * (1 + (2 - 1 - np.log(2))) / 2
    assert classify.vae_loss(x, made, mean, log_variance, 3.0).item() == pytest.approx(expected)
    model, noise = classify.VAE(), torch.randn(1, 2)
    made, mean, log_variance = model(torch.zeros(1, 3, 32, 32), noise)
    assert torch.allclose(made, model.decoder(mean + noise * (log_variance / 2).exp()))
    classify_run("--make", "figure6", "--dataset", "colored", "--steps", 2, "--runs", tmp_path)
    assert picture(tmp_path / "figure6-colored.png").shape[:2] == (3, 18 + 10 * 66)


def test_figure_7_counts_counterfactuals_of_one_and_of_ten_a_shape(tmp_path, monkeypatch):
    def cell(args, dataset, method, seed, *what):
        assert (dataset, method, *what) == ("colored", "original+cgn", "shape", ("test",))
        return {"test": args.count / 10_000 + args.per_shape / 1000 + seed / 10}

    monkeypatch.setattr(classify, "cell", cell)
    options = "--make figure7 --dataset colored --seeds 0 2 --count 1000 --runs".split()
    rows = classify_run(*options, tmp_path).splitlines()[2:]
    assert rows == ["| 100 | 11.1 ± 14.1 | 12.0 ± 14.1 |", "| 1000 | 20.1 ± 14.1 | 21.0 ± 14.1 |"]


def test_mistakes_with_classifiers_are_one_line(monkeypatch):
    for options, word in (
            ("--count 0", "count 0"), ("--dataset imagenet", "--real"), ("--workers 1", "--workers"),
            ("--dataset colored --textures x", "textures"), ("--dataset wildlife --variance 1", "variance"),
            ("--dataset colored --cgn x --method lntl", "x"), ("--make table5 --dataset colored", "label"),
            ("--dataset imagenet colored --real docs", "alone"), ("--make figure6 --seeds 0 1", "takes one"),
            ("--dataset colored --set label=texture", "label texture"),
            ("--make table5 --method lntl", "--method"), ("--make figure6 --count 7", "--count"),
            ("--seeds -1", "seeds [-1]"), ("--make figure6 --set seeds=[]", "takes one"),
            ("--dataset imagenet --real docs --ratio 3", "--ratio"),
            ("--dataset colored --counterfactuals a --count 7", "--count"),
            ("--dataset colored --counterfactuals a b", "one file")):
        classify_refused(options.split(), word)
    monkeypatch.setenv("WORLD_SIZE", "2")
    classify_refused(("--dataset", "colored"), "torchrun")


# ---------- classify: the ensemble

def draw_pictures(folder, *names):
    for name in names:
        mv.save_png(folder / name, Image.linear_gradient("L").resize((40, 36)))


def shufflenet(classes=1000):
    torch.manual_seed(0)
    return torchvision.models.get_model("shufflenet_v2_x0_5", num_classes=classes)


@pytest.fixture
def pictures(tmp_path):
    """Two classes of five pictures, six counterfactuals as cgn.py writes them."""
    draw_pictures(tmp_path / "real", *(f"{name}/{place}.png" for name in ("ant", "bee") for place in "01234"))
    draw_pictures(tmp_path / "made", *(f"{place}.png" for place in range(6)))
    rows = "".join(f"{place}.png,{place % 2},{place // 3},0\n" for place in range(6))
    (tmp_path / "made" / "labels.csv").write_text("file,shape,texture,background\n" + rows)
    torch.save(shufflenet().state_dict(), tmp_path / "weights.pth")
    return tmp_path


def ensemble_options(folder, out, *more, **settings):
    settings = {"network": "shufflenet_v2_x0_5", "weights": folder / "weights.pth", "side": 32, "batch": 4,
                "epochs": 2, "lr": 0.01, "save_every": 1, **settings}
    made = () if "--cgn" in more else ("--counterfactuals", folder / "made")
    return ["--dataset", "imagenet", "--real", folder / "real", *made, "--workers", 1, "--out", folder / out,
            *more, "--set", *(f"{key}={value}" for key, value in settings.items())]


def ensemble_losses(out):
    return [row["loss"] for row in logged(out)]


def test_ensemble_loss_by_hand():
    real = torch.tensor([[[2.0, 0.0], [0.0, 0.0], [1.0, 0.0]]])                     # mean scores 1, 0
    made = torch.tensor([[[3.0, 0.0], [0.0, 3.0], [0.0, 0.0]]] * 2)                 # two counterfactuals
    labels, alone = torch.tensor([[0, 1, 1], [0, 1, 1]]), np.log(1 + np.exp(-1))
    expected = alone + 2 * np.log(1 + np.exp(-3)) + np.log(2)                       # means over images
    for count, smoothing, wanted in ((2, 0.0, expected), (0, 0.0, alone), (2, 0.2, expected + 0.1 * 7)):
        found = classify.ensemble_loss(real, labels[0, :1], made[:count], labels[:count], smoothing)
        assert found.item() == pytest.approx(wanted)                                # 7: the margins' sum


def test_an_ensembles_heads_are_new_and_its_batch_norms_stay():
    x = torch.randn(2, 3, 32, 32)
    for frozen in (True, False):                            # False: as from random weights
        network = shufflenet(6)
        weights, model = [network.fc.weight], classify.Ensemble(network, frozen=frozen).train()
        weights += [head.weight for head in model.heads]
        assert not any(torch.equal(a, b) for a, b in itertools.combinations(weights, 2))
        assert model(x).shape == (2, 3, 6) and model.backbone.conv1[1].running_mean.any() != frozen


def test_each_epoch_holds_every_picture_once(pictures):
    files = [(path, (k,)) for k, (path, _) in enumerate(mv.labelled_files(pictures / "made"))]
    batches = partial(classify.random_pictures, files, 3, 32, 1, slice(None), 0)
    (x, y), (_, other) = batches(0), batches(1)
    assert torch.equal(torch.cat([y, other]).sort(dim=0).values[:, 0], torch.arange(6))
    assert not torch.equal(batches(2)[1], y) and torch.equal(batches(0)[0], x)


@beside
def test_the_ensemble_trains_the_same_stopped_or_not_alone_or_in_two_processes(pictures, monkeypatch):
    def stop(x):
        calls.append(1)
        if len(calls) == 2:
            worker = torch.multiprocessing.active_children()[0]
            os.kill(worker.pid, signal.SIGINT)
            worker.join(1)
            assert worker.is_alive()
            signal.raise_signal(signal.SIGTERM)
        return normalise(x)

    calls, normalise, options = [], u2net.normalise, partial(ensemble_options, pictures)
    whole, parts, two = (pictures / name for name in ("whole", "parts", "two"))
    classify_run(*options(whole))
    with monkeypatch.context() as patch:
        patch.setattr(u2net, "normalise", stop)
        assert script(classify, *options(parts, epochs=1)).returncode == 130
    assert (len(ensemble_losses(whole)), len(ensemble_losses(parts))) == (6, 2)
    classify_run(*options(parts, "--real", pictures / "real/../real", "--workers", 0))
    a, b = (run.read_checkpoint(out / "checkpoint.pt")["ensemble"] for out in (whole, parts))
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert ensemble_losses(parts) == ensemble_losses(whole)
    torchrun = "-m torch.distributed.run --nproc-per-node 2 --master-port 29534".split()
    process(*torchrun, "classify.py", *options(two))
    assert ensemble_losses(two) == pytest.approx(ensemble_losses(whole), abs=1e-5)


def test_a_worker_that_fails_or_dies_is_one_line(pictures, monkeypatch):
    def kill(x):
        torch.multiprocessing.active_children()[0].kill()
        time.sleep(20)                              # until the signal of its end

    monkeypatch.setattr(u2net, "normalise", kill)
    classify_refused(ensemble_options(pictures, "killed"), "killed", "--workers")
    (pictures / "made" / "0.png").write_text("no picture")
    classify_refused(ensemble_options(pictures, "failed", batch=6), "0.png does not open")
    run.end_workers()                               # else torch waits for them, ten seconds


def test_an_ensemble_draws_its_counterfactuals_from_a_cgn(imagenet_checkpoint):
    model, crop = cgn.load(imagenet_checkpoint), classify.crop_and_flip
    x, labels = next(classify.drawn_pictures(model, 4, 24, seed=1, per_shape=2, share=slice(1, 3), first=3))
    sample, wanted = drawing.counterfactual_batch(model, 1, range(13, 15), 2)
    assert torch.equal(labels, wanted.T)
    assert torch.equal(x[1], crop((sample.image[1] + 1) / 2, 24, 1, 2 ** 36 + 14))
    ramp = torch.arange(32.0).expand(3, 32, 32)
    seen = torch.stack([crop(ramp, 24, 1, index)[0, 0, [0, -1]] for index in range(40)])
    assert len(seen.unique(dim=0)) > 30 and 8 < (seen[:, 0] > seen[:, 1]).sum() < 32    # half are mirrored


@pytest.fixture(scope="module")
def imagenet_ensemble(tmp_path_factory):
    """A checkpoint whose heads always answer airplane, bear and dog."""
    path = tmp_path_factory.mktemp("ensemble") / "checkpoint.pt"
    model = classify.Ensemble(shufflenet())
    for head, label in zip(model.heads, (404, 294, 152)):
        head.weight.data.zero_()
        head.bias.data = (5.0 + (label == 404)) * F.one_hot(torch.tensor(label), 1000)
    config = {"network": "shufflenet_v2_x0_5", "heads": 3, "side": 32,
              "names": [f"n{number:08d}" for number in range(1000)]}
    torch.save({"config": config, "step": 1, "ensemble": model.state_dict()}, path)
    return path


def test_each_head_is_judged_on_cue_conflict_and_its_table_says_why(imagenet_ensemble, tmp_path):
    cue, table = tmp_path / "cue", tmp_path / "table.csv"
    draw_pictures(cue, "airplane1-bear2.png", "bear1-airplane3.png", "dog1-dog2.png", "dog1-airplane1.png")
    command = ("--checkpoint", imagenet_ensemble, "--workers", 0, "--cue-conflict", cue, "--out")
    said = classify_run(*command, table)
    assert "| shape | 33.33 % | 1 | 2 | 4 |" in said
    assert "| background | 100.00 % |" in said and "| average | 33.33 % |" in said  # the first is the surest
    assert [row["shape"] for row in evaluate.read_table(table)] == ["airplane"] * 4
    classify_refused((*command, imagenet_ensemble), "what is read")
    classify_refused((*command[:5], tmp_path / "none"), "no pictures")
    assert classify_run(*command[:2], "--say", cue / "dog1-dog2.png") == (
        "an airliner shape with brown bear texture on a Japanese spaniel background "
        "(shape 29 %, texture 13 %, background 13 %)\n")


def test_each_head_is_judged_on_imagenet_and_imagenet9(imagenet_ensemble, tmp_path):
    in9, val, made = (tmp_path / name for name in ("in9", "val", "made"))
    command = ("--checkpoint", imagenet_ensemble, "--workers", 0)
    for variation in ("mixed_rand/val", "mixed_same/val"):
        draw_pictures(in9 / variation, *(f"{label:02d}_name/0.png" for label in range(9)))
    draw_pictures(in9 / "mixed_same/val/04_name", "1.png")
    (in9 / "fg_mask/val/00_name").mkdir(parents=True)       # as published
    said = classify_run(*command, "--imagenet9", in9)
    assert "| texture | 11.11 % | 20.00 % | 8.89 % |" in said       # bears are carnivores
    draw_pictures(in9 / "other/val/dog", "0.png")
    classify_refused((*command, "--imagenet9", in9), "00_dog")

    draw_pictures(val, "n00000404/0.png", "n00000294/0.png")
    assert "| shape | 2 | 50.00 % |" in classify_run(*command, "--imagenet", val)   # by name
    draw_pictures(made, "0.png")                    # counterfactuals: each head has its own label
    (made / "labels.csv").write_text("file,shape,texture,background\n0.png,404,294,0\n")
    said = classify_run(*command, "--imagenet", made)
    assert "| texture | 1 | 100.00 % |" in said and "| background | 1 | 0.00 % |" in said


def test_pictures_of_the_networks_size_are_seen_whole(tmp_path):
    def white(side, crop):
        path = tmp_path / f"{side}.png"
        Image.fromarray(framed).resize((side, side), Image.NEAREST).save(path)
        picture = classify.judged_picture([path], 224, crop, 0)
        return (picture == 255).float().mean().item()

    framed = np.full((224, 224, 3), 255, dtype=np.uint8)
    framed[14:-14, 14:-14] = 0
    assert white(224, True) == white(224, False) == pytest.approx(1 - (196 / 224) ** 2)
    assert white(448, True) < 0.02 < 0.2 < white(448, False)        # 256 pixels, of these 224


def test_mistakes_with_the_ensemble_are_one_line(pictures, imagenet_checkpoint):
    def refused(word, *more, **settings):
        classify_refused(ensemble_options(pictures, "run", *more, **settings), word)

    refused("vit_b_16", network="vit_b_16", weights="random")
    refused("ratio 0.3", "--ratio", 0.3)
    refused("was drawn of", "--cgn", imagenet_checkpoint)
    refused("heads 4", heads=4)
    refused("smoothing 2.0", smoothing=2)
    classify_refused(ensemble_options(pictures, "real/run"), "which is read")
    draw_pictures(pictures / "other", "ant/0.png")
    refused("other subfolders", "--real", pictures / "real", pictures / "other")
    names = pictures / "made" / "settings.json"
    names.write_text('{"names": ["bee", "ant"]}')
    refused("bee, ant")
    names.write_text('{"names": ["ant", "bee"]}')
    assert "dry run finished" in classify_run(*ensemble_options(pictures, "run", "--dry-run"))
    names.with_name("labels.csv").write_text("file,shape,texture,background\n0.png,1,1,2\n")
    refused("0..1")
    classify_refused(("--checkpoint", imagenet_checkpoint, "--say", "a.jpg"), "no checkpoint of an ensemble")


def test_torchvisions_inception_reads_images_in_minus_one_to_one(tmp_path):
    model, path = torchvision.models.inception_v3(init_weights=False), tmp_path / "inception.pth"
    torch.save(model.state_dict(), path)
    x = torch.rand(1, 3, 299, 299) * 2 - 1
    assert torch.allclose(classify.read_classifier(path)(x), model.eval()(x), atol=1e-5)


def test_disentanglement_of_perfect_and_hidden_mechanisms():
    """Labels are grey levels: the mask's in column 0, the foreground's in 1, the background's in 2."""
    labels = torch.arange(10).repeat(20)

    def parts(y):
        level, one, nothing = y / 9, torch.ones(200), torch.zeros(200)
        columns = (level, one, nothing), (one, level, one), (nothing, nothing, level)
        return cgn.Sample(*(torch.stack(column, dim=1)[:, None, None] for column in columns), None)

    readers = [lambda x, k=k: -(9 * x[:, 0, :, k] - torch.arange(10)).abs() for k in range(3)]
    made, real = parts(labels), parts((labels + 1) % 10)[:3]
    assert torch.equal(classify.disentanglement(made, labels, real, readers), torch.eye(3))
    made.foreground[labels == 4] = 0.0
    table = classify.disentanglement(made, labels, real, [*readers[:2], None])
    assert table[1, 1] == pytest.approx(0.9) and table[2].isnan().all()


def test_mechanisms_are_measured_on_draws_that_were_not_trained_on(imagenet_checkpoint, few_images):
    said = classify_run("--make", "mechanisms", "--steps", 3, "--count", 12, "--cgn", imagenet_checkpoint,
                        "--set", "splits=2")
    assert "12 draws of seed 4; the training's was 3" in said
    assert re.search(r"\| background (\| \d+\.\d ){3}\|\n", said)
    model = cgn.load(imagenet_checkpoint)
    sample = model(*cgn.draw_training(model, 4, range(12))[:2])
    mean, std = evaluate.mean_std(sample.mask.mean(dim=(1, 2, 3)).tolist())
    scores = classify.read_classifier(cgn.WEIGHTS / "mini-classifier.pth")(sample.image)
    score, spread = evaluate.inception_score(scores.softmax(dim=1), 2)
    assert (f"| {score:.2f} ± {spread:.2f} | {100 * mean:.1f} ± {100 * std:.1f} % | "
            f"{cgn.binary_entropy(sample.mask):.3f} bit |") in said                 # Table 1's row


def test_masks_are_compared_in_pairs_and_read_by_class():
    masks = torch.zeros(4, 1, 32, 32)
    for mask, columns in zip(masks, (8, 16, 8, 16)):
        mask[..., :columns] = 0.9

    def reader(x):                                      # [-1, 1]: 8 columns are class 0, 16 class 1
        return F.one_hot((x[:, 2, 0] > 0.5).sum(dim=1) // 8 - 1, 2)

    table = classify.mask_table(masks, torch.tensor([0, 1, 0, 0]), reader, ["a"])
    assert table["all"]["read right"] == "75.0 %"
    entropy = f"{cgn.binary_entropy(masks[[0, 2, 3]]):.3f} bit"
    assert table["a"] == {"read right": "66.7 %", "IoU of pairs": "0.667", "entropy": entropy}
    with pytest.raises(ValueError, match="1 masks"):
        evaluate.pairwise_iou(masks[:1])


def test_the_shipped_generators_draw_digits_that_are_read_in_every_class():
    """As many as the documents say, less a hundredth."""
    said = (HERE / "docs" / "results.md").read_text()
    for name in mv.NAMES:
        path = f"weights/cgn-{name}.pth"
        wanted, = re.findall(rf"\| `{path}` \| ([\d.]+) \|", said)
        drawn, real = classify_run("--make", "variety", "--cgn", path).split("masks of real digits")
        assert ("| 0.307 | 0.086 bit |" in real) == (name == "colored")
        share, *classes = map(float, re.findall(r"\| ([\d.]+) %", drawn))
        assert share >= float(wanted) - 1 and len(classes) == 10 and min(classes) >= 80


# ---------- miniature

class SmallJudge(torch.nn.Sequential):
    """Scores two images at once; ends after `left` calls."""
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

    def train(name, steps, left=0):
        config = {**miniature.TEACHER, "batch": 16, "lr": 1e-3, "noise": 0.0, "average": 0.9, "saves": (2,),
                  "steps": steps, "seed": 0}
        judge = SmallJudge(torch.nn.Conv2d(6, 16, 4, 2, 1), torch.nn.ReLU(), torch.nn.Flatten(),
                           torch.nn.Linear(256, 3))
        judge.left = left
        return miniature.train_teacher(config, small_teacher(), judge, images, labels, tmp_path / name)

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


def test_statistics_are_those_of_all_draws_at_their_truncation():
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
            assert torch.allclose(stored[row], wanted, atol=1e-5)


def test_the_miniature_is_made_and_tabulated(tmp_path, monkeypatch, few_images):
    def mini(*what):
        result = script(miniature, *what, "--steps", 2)
        return result, dict(re.findall(r"\n\| ([^|]+) \| ([\d.]+)", result.stdout))

    seen, train, judge, change = [], miniature.train_saliency, classify.table1_row, monkeypatch.setattr
    asked, load = [], mv.load_parts
    change(mv, "load_parts", lambda *a, **how: asked.append(a[2:3]) or load(*a, **how))
    change(miniature, "GENERATOR", ((8, 8),) * 6)
    change(miniature, "DRAWS", dict.fromkeys(miniature.DRAWS, 20))
    change(miniature, "measure_statistics", partial(miniature.measure_statistics, batches=1))
    change(miniature, "train_saliency", lambda *a, **how: seen.append(a[1]) or train(*a, **how))
    change(classify, "table1_row", lambda *a: seen.append(a[3]) or judge(*a))
    change(cgn, "PRESETS", {"mini": {**cgn.PRESETS["mini"], "accumulate": 4, "batch": 4}})
    change(cgn, "WITHOUT", {name: cgn.WITHOUT[name] for name in ("shape", "bg")})
    change(cgn, "WEIGHTS", tmp_path / "weights")
    change(cgn, "RUNS", tmp_path / "runs")
    change(biggan, "find_weights", Path)
    (tmp_path / "weights.txt").touch()

    one_line(mini("tables34")[0], "train first")
    mini("teacher", "saliency", "style", "classifier")
    assert asked == [(1.0,), (0.1,), (0.1,), (1.0,)]            # how often labels agree
    assert torch.equal(seen.pop().flatten(1).any(dim=1), torch.arange(200) % 5 > 0)
    assert list(mini("table1")[1]) == ["all", "without shape", "without bg"]
    assert seen == [1, 1, 1]                    # other draws
    result, biases = mini("tables34")
    assert list(biases)[::5] == ["real", "real+CGN/shape + texture"]
    found = re.findall(r"([-\d.]+) % \| ([-\d.]+) % \| ([-\d.]+) % \|\n", result.stdout)
    same, rand, gap = torch.tensor([[*map(float, row)] for row in found]).T
    assert ((same - rand - gap).abs() < 0.02).all() and gap.any()
    shares = [*map(float, mini("patches")[1].values())]
    assert shares[3] > shares[2] + 10 and min(shares[0], shares[1], shares[3]) > 95
    shipped = Path(cgn.__file__).parent / "weights"
    ious = mini("masks", "--cgn", shipped / "cgn-colored.pth")[1]
    assert [*map(str.split, ious)][0][:2] == ["distance", "from"] and len(ious) == 4
    assert float(ious.popitem()[1]) < 50 and float([*ious.values()][0]) > 90     # before black, no network
    one_line(mini("masks")[0], "needs --cgn")
    one_line(mini("masks", "--cgn", shipped / "cgn-mini.pth")[0], "draws no variant")


def test_the_borders_distance_is_1_where_the_colour_differs_most():
    x = torch.full((1, 3, 8, 8), 10, dtype=torch.uint8)
    x[0, :, 3, 4], x[0, 0, 4, 4] = 40, 40
    distance = miniature.border_distance(x)
    assert distance.shape == (1, 1, 8, 8) and distance[0, 0, 3, 4] == 1
    assert distance[0, 0, 4, 4].item() == pytest.approx(3 ** -0.5) and (distance > 0).sum() == 2


def test_the_miniatures_ensemble_learns_recombined_parts(monkeypatch, tmp_path):
    y = torch.arange(40) % 10
    m = 255 * (torch.arange(32) < 3 * y[:, None, None, None] + 1).byte().expand(-1, 1, 32, -1)
    f, b = ((20 * y + start).byte()[:, None, None, None].expand(-1, 3, 32, 32) for start in (0, 10))
    seen, made = [], ([m, f, b], torch.stack([y] * 3))
    monkeypatch.setattr(classify, "train_ensemble", lambda *given: seen.extend(next(given[3](5))))
    miniature.train_ensemble({"seed": 0}, mv.Variant(f, y, y, y), made, tmp_path)
    x, labels = (255 * seen[0][:, 0, 0]).round().long(), seen[1]
    assert len(x) == 60 and len(labels.unique(dim=0)) > 50
    read = torch.stack([((x == x[:, :1]).sum(dim=1) - 1) // 3, x[:, 0] // 20, x[:, -1] // 20], dim=1)
    assert torch.equal(read, labels)


# ---------- the project

def forked(work, ranks=1):
    """Starts a process for each rank; returns their numbers."""
    group = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(29600 + os.getpid() % 3000)}
    children = []
    for rank in range(ranks):
        children.append(os.fork())
        if children[-1] == 0:
            try:
                os.environ.update(group, WORLD_SIZE=str(ranks), RANK=str(rank), LOCAL_RANK=str(rank))
                work()
                os._exit(0)
            finally:
                os._exit(1)
    return children


def codes(children):
    return {os.waitpid(child, 0)[1] for child in children}


@pytest.fixture
def no_sheets(monkeypatch):
    monkeypatch.setattr(cgn, "training_sheet", lambda *_: "no sheet")


@beside
def test_runs_killed_at_twenty_random_moments_end_as_if_they_had_not_been(networks, tmp_path, no_sheets):
    def imagenet(out):
        run.join_group("cpu")
        imagenet_run(networks, out)

    def digits(out):
        cgn.train(tiny_config(saves=(1,)), *tiny_data(), out)

    generator = np.random.default_rng(0)
    for ranks, work in ((1, digits), (2, imagenet)):
        began, whole = time.time(), tmp_path / work.__name__
        assert codes(forked(partial(work, whole), ranks)) == {0}
        seconds = time.time() - began
        for number in range(10):
            out = tmp_path / f"{work.__name__} {number}"
            children = forked(partial(work, out), ranks)
            time.sleep(generator.uniform(0, seconds))
            for child in children:
                os.kill(child, signal.SIGKILL)
            codes(children)
            assert codes(forked(partial(work, out), ranks)) == {0}
            assert run_result(out) == run_result(whole), out


def mutate(content, generator):
    """A damaged copy: a bit flipped, a piece cut out or doubled, or the end missing."""
    a = int(generator.integers(1, len(content)))
    b = a + int(generator.integers(1, 64))
    flipped = bytes([content[a] ^ 1 << int(generator.integers(8))])
    return (content[:a] + flipped + content[a + 1:], content[:a] + content[b:], content[:b] + content[a:],
            content[:a])[generator.integers(4)]


def kinds_of_files(generator):
    """Of each kind (name, content, reader, share of the damaged files)."""
    def saved(save, *more):
        file = io.BytesIO()
        save(file, *more)
        return file.getvalue()

    def tensors(state):
        return saved(partial(torch.save, state))

    def continued(path):
        with run.Run(path.parent, config, {}):
            pass

    config, labels = tiny_config(), "t10k-labels-idx1-ubyte.gz"
    checkpoint = {"config": config, "step": 3, "average": {"a": torch.ones(5)}}
    picture = Image.fromarray(generator.integers(256, size=(40, 48, 3), dtype=np.uint8))
    return [
        ("biggan.pt", tensors(raw_biggan([(8, 8), (8, 8)], None, 2, 4, 4)), biggan.load, 6),
        ("u2net.pt", tensors(raw_weights(u2net)), u2net.load, 1),
        ("checkpoint.pt", tensors(checkpoint), cgn.load, 10),
        ("classifier.pt", tensors(classify.Classifier().state_dict()), classify.read_classifier, 10),
        (labels, (HERE / "data" / "mnist" / labels).read_bytes(),
         lambda path: mv._read_idx(path.parent, path.stem), 6),
        *((f"photo.{kind}", saved(picture.save, kind), u2net.open_photo, 15)
          for kind in ("png", "jpeg", "gif", "tiff", "bmp", "webp")),
        ("predictions.csv", b"label,prediction\n1,2\n3,3\n",
         lambda path: evaluate.judge_imagenet(evaluate.read_table(path)), 20),
        ("labels.csv", b"file,shape,texture,background\n0.png,3,4,5\n1.png,0,9,2\n",
         lambda path: mv.labelled_files(path.parent), 20),
        ("log.jsonl", json.dumps(config).encode() + b'\n{"step": 1, "binary": 0.5}\n', continued, 20)]


@beside
def test_ten_thousand_damaged_files_are_read_or_refused(tmp_path):
    outcomes, generator = {"read": 0, "refused": 0}, np.random.default_rng(0)
    kinds = kinds_of_files(generator)
    count = 10_000 // sum(share for *_, share in kinds) + 1
    warnings.simplefilter("ignore")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name, content, reader, share in kinds:
        for _ in range(count * share):
            (tmp_path / name).write_bytes(mutate(content, generator))
            try:
                reader(tmp_path / name)
                outcomes["read"] += 1
            except ValueError:
                outcomes["refused"] += 1
            (tmp_path / name).unlink()                      # what is mapped stays as it is
    assert sum(outcomes.values()) >= 10_000 and min(outcomes.values()) > 1000, outcomes
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2 ** 21


GROUND = {
    "mnist_variants": "import mnist_variants as m; print(m.draw_textures().shape)",
    "evaluate": "import evaluate, torch; print(evaluate.accuracy(torch.tensor([1]), torch.tensor([1])))",
    "biggan": "import biggan; biggan.main(['--dry-run', '--classes', '0,ostrich'])",
    "u2net": "import u2net, torch; u2net.load(u2net.U2Net().state_dict())(torch.zeros(1, 3, 32, 32))",
    "run": "import run; print(run.find_device())"}


@pytest.mark.parametrize("module", GROUND)
def test_a_ground_floor_file_works_when_copied_alone(tmp_path, module):
    shutil.copy(HERE / f"{module}.py", tmp_path)
    process("-c", GROUND[module], cwd=tmp_path)


def test_imports_run_one_way():
    order = "run biggan u2net mnist_variants evaluate drawing cgn classify miniature".split()
    for place, module in enumerate(order):
        found = re.findall(r"^\s*(?:import|from) (\w+)", (HERE / f"{module}.py").read_text(), re.M)
        assert not {*found} & {*order[place:]}, module


def documented_commands():
    """(module, arguments) of each `python X.py ..` and `torchrun .. X.py ..` of README and docs."""
    text = "\n".join(path.read_text() for path in (HERE / "README.md", *(HERE / "docs").glob("*.md")))
    shell = "\n".join(re.findall(r"```sh\n(.*?)```", text, re.S))
    return [*dict.fromkeys(re.findall(r"^(?:python|torchrun .*?) ?((?!test_)\w+)\.py ?(.*)", shell, re.M))]


def test_every_documented_command_is_understood():
    commands = documented_commands()
    assert len(commands) >= 20
    for module, arguments in commands:
        sys.modules[module].build_parser().parse_args(shlex.split(arguments))


@pytest.mark.parametrize("arguments", [arguments for module, arguments in documented_commands()
                                       if module == "cgn" and "--dataset" in arguments])
def test_documented_trainings_run_dry_anywhere_and_keep_nothing(arguments, tmp_path, monkeypatch, few_images,
                                                                no_sheets):
    monkeypatch.chdir(tmp_path)
    silhouettes("path/to/folder")
    Path("imagenet").symlink_to("path")
    arguments = arguments.replace("--textures path/to/dtd", "")
    assert "dry run finished" in cgn_works(*arguments.split(), "--dry-run")
    assert {*os.listdir()} == {"path", "imagenet"}


def test_a_dry_run_works_in_three_processes():
    dry = partial(cgn.main, ["--dataset", "imagenet", "--dry-run", "--device", "cpu"])
    assert codes(forked(dry, 3)) == {0}


@beside
def test_the_measurements_pass_as_a_dry_run(capsys):
    for what in ("step", "draw", "memory", "gpu"):
        measure(what, "--dry-run")
    said = capsys.readouterr().out
    for part in ("micro-step, float32: ", "10 of one shape, float32: ", "peak memory: ",
                 "| micro-step, 2 at once, float32 |", "| 0.0e+00, 0.0e+00 |", "| 0.00%, 1.00 |"):
        assert part in said, part


def test_the_documented_python_saves_a_picture(tmp_path, monkeypatch):
    (tmp_path / "weights").symlink_to(HERE / "weights")
    monkeypatch.chdir(tmp_path)
    exec(*re.findall(r"```py\n(.*?)```", (HERE / "README.md").read_text(), re.S), {})
    assert list(tmp_path.glob("*.png"))


def test_lines_are_short_and_nothing_is_named_that_is_not_there():
    for path in HERE.glob("*.py"):
        assert max(map(len, path.read_text().splitlines())) <= 110, path
    index, tests = (HERE / "docs" / "differences.md").read_text(), (HERE / "test_cgn.py").read_text()
    indexed, promised = (re.findall(r"\btest_\w+", text) for text in (index, tests.split('"""')[1]))
    missing = {*indexed, *promised} - {"test_cgn", *re.findall(r"^def (test_\w+)", tests, re.M)}
    assert indexed and promised and not missing, missing
    for module, name in re.findall(r"`(\w+)\.(\w+)", index):
        assert name in ("py", "md", "txt") or hasattr(sys.modules[module], name), (module, name)


# ---------- measurements at full size: no tests

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
        """One micro-step of `count` images."""
        drawn = [tensor.to(self.device) for tensor in cgn.draw_training(self.model, 0, range(count))]
        return cgn.micro_step(self.model, self.teacher, self.style, *drawn, {**self.config, "bf16": bf16})

    def draw(self, count, bf16=False):
        """Makes counterfactuals of one shape."""
        with torch.autocast(self.device, torch.bfloat16, enabled=bf16):
            drawing.counterfactual_batch(self.model, 0, range(count), per_shape=count)

    def clock(self, work):
        """Seconds of work(), the best of two after a first, with the spectral norms held."""
        seconds = []
        with self.norms():
            for _ in range(3):
                started = time.time()
                work()
                if self.device == "cuda":
                    torch.cuda.synchronize()
                seconds.append(time.time() - started)
        self.model.zero_grad()
        return min(seconds[1:])

    def tell(self, what, work):
        for bf16 in (False, True) if run.bf16_pays(True, "cpu") else (False,):
            seconds = self.clock(partial(work, bf16=bf16))
            print(f"{what}, {'bfloat16' if bf16 else 'float32'}: {seconds:.2f} s")

    def measure_step(self):
        self.tell("micro-step", self.step)
        print(f"matrix product: {cgn.matrix_rate('cpu', torch.float32, 2048) / 1e9:.0f} GFLOP/s")

    def measure_draw(self):
        for count in (1, 10):
            self.tell(f"{count} of one shape", partial(self.draw, count))

    def measure_memory(self):
        optimizer = torch.optim.Adam(self.model.parameters(), 1e-5)
        for _ in range(2):
            with self.norms():
                self.step()
            optimizer.step()
            optimizer.zero_grad()


def measure_gpu(files, tiny, **changes):
    device, kinds = ("cpu", ["float32"]) if tiny else ("cuda", ["float32", "TF32", "bfloat16"])
    full, frozen = (FullSize(files, device, frozen, **changes) for frozen in (False, True))
    watch, expected = types.SimpleNamespace(note=lambda rate: ""), computed(files, "cpu")
    if not tiny:
        cgn.images_at_once(lambda part: full.step(len(part), True), full.model, 1, watch)
    for kind in kinds:
        bf16 = kind == "bfloat16"
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = kind != "float32"
        for count in (2,) if tiny else (1, 8, 32) if bf16 else (1, 8):
            if not tiny:
                torch.cuda.reset_peak_memory_stats()
            rate = count / full.clock(partial(full.step, count, bf16))
            memory = torch.cuda.max_memory_allocated() / 2 ** 30
            print(f"| micro-step, {count} at once, {kind} | {rate:.1f} images/s{watch.note(rate)}, "
                  f"{memory:.1f} GiB |", flush=True)
        f, m, terms, gradients = zip(computed(files, device, bf16), expected)
        wrong = (terms[0] / terms[1] - 1)[terms[1] > 1e-6].abs().max()
        print(f"| BigGAN and U-2-Net against the CPU's float32, {kind}, largest difference | "
              f"{(f[0] - f[1]).abs().max():.1e}, {(m[0] - m[1]).abs().max():.1e} |\n"
              f"| the miniature's terms, largest relative difference, and cosine of the gradients, {kind} | "
              f"{wrong:.2%}, {F.cosine_similarity(*gradients, 0):.2f} |", flush=True)
    for count in (1, 10):
        print(f"| {count} of one shape, bfloat16 | {frozen.clock(partial(frozen.draw, count, True)):.3f} s |")


def computed(files, device, bf16=False):
    """A foreground and mask, random weights; the miniature's terms, gradient."""
    full, shipped = FullSize(files, device, frozen=True), run.read_checkpoint(cgn.WEIGHTS / "cgn-mini.pth")
    networks = [cgn.WEIGHTS / cgn.PRESETS["mini"][name] for name in cgn.NETWORKS[:3]]
    mechanisms = [shipped[name] for name in ("f_shape", "f_text", "f_bg")]
    mini = FullSize(networks, device, mechanisms=mechanisms, kind="mini")
    terms = mini.step(4, bf16)
    u, y, _ = (tensor.to(device) for tensor in cgn.draw_training(full.model, 0, range(1)))
    with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=bf16):
        m, f, *_ = full.model(u, y)
    gradients = [p.grad.flatten() for p in mini.model.parameters() if p.grad is not None]
    return [part.float().cpu() for part in (f, m, torch.stack([*terms.values()]), torch.cat(gradients))]


def measure(what="", trial=""):
    """python test_cgn.py step | draw | memory: seconds and bytes on a CPU; 5 minutes and
    12 GB at most. python test_cgn.py gpu: on a large GPU. --dry-run: tiny networks on a CPU."""
    with tempfile.TemporaryDirectory() as folder:
        files, tiny = [Path(folder) / cgn.PRESETS["imagenet"][name] for name in cgn.NETWORKS[:3]], bool(trial)
        if what != "gpu" and not hasattr(FullSize, f"measure_{what}"):
            return print(measure.__doc__)

        def make():
            networks = cgn.random_networks()
            if not tiny:
                style = torch.nn.Module()
                style.features = torchvision.models.vgg16_bn(init_weights=False).features[:34]
                saliency = random_u2net(u2net.FULL).state_dict()
                networks = raw_biggan(RELEASED, 8, 1000, 128, 128), saliency, style.state_dict()
            for path, state in zip(files, networks):
                torch.save(state, path)

        assert codes(forked(make)) == {0}                       # whose memory is not counted
        patch = 5 if tiny else 15
        if what == "gpu":
            return measure_gpu(files, tiny, patch=patch)
        full = FullSize(files, frozen=what == "draw", patch=patch)
        getattr(full, f"measure_{what}")()
        print(f"peak memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20:.2f} GiB")


if __name__ == "__main__":
    measure(*sys.argv[1:])
