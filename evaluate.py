"""Metrics of Counterfactual Generative Networks (ICLR 2021) as pure functions, and a command that judges
tables of predictions. Needs torch and no other file.

    python evaluate.py --predictions table.csv        # top-1, top-5 and confusion
    python evaluate.py --cue-conflict humans/*.csv    # shape bias (Table 3); several files are pooled
    python evaluate.py --imagenet9 table.csv          # accuracies and BG-Gap (Table 4)
    python evaluate.py --inception-score table.csv    # Inception Score (Table 1)

A table is a CSV file in UTF-8 with a row a picture, as classify.py writes it. Its columns:

    file         the picture (or imagename); cue conflict's names tell shape and texture
    label        in 0..999, of ImageNet-9 0..8; counterfactuals have "shape label", "texture label" and
                 "background label" instead, each for the prediction of its name
    variation    of ImageNet-9: mixed_same, mixed_rand, ..
    PREDICTIONS  any of these: the best classes (up to five), spaces between, or a category

Fractions are in [0, 1]; a metric of nothing is a ValueError.
"""
import argparse
import contextlib
import csv
import json
import os
import re
import sys
from pathlib import Path
from typing import Sequence

import torch
from torch import Tensor

PREDICTIONS = ("prediction", "decision", "object_response", "shape", "texture", "background",
               "shape + texture", "average")
Rows = list[dict[str, str]]


# ---------- accuracy, masks, Inception Score

def accuracy(predictions: Tensor, labels: Tensor) -> float:
    """Fraction of predictions (N,) that equal labels (N,). ValueError for no samples or unequal counts."""
    _check(predictions, labels)
    return (predictions == labels).sum().item() / len(labels)


def confusion(predictions: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Counts (C, C) long: row = label, column = prediction. ValueError for none, a class outside 0..C-1."""
    _check(predictions, labels)
    values = torch.cat([predictions, labels])
    if values.min() < 0 or values.max() >= classes:
        raise ValueError(f"class {int(values.min())} or {int(values.max())} is not in 0..{classes - 1}")
    return torch.bincount(labels.long() * classes + predictions, minlength=classes ** 2).view(classes, -1)


def mean_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (N - 1; 0 for one value). ValueError for none."""
    if not len(values):
        raise ValueError("mean of no values")
    values = torch.tensor(values, dtype=torch.float64)
    return values.mean().item(), values.std().item() if len(values) > 1 else 0.0


def _check(a: Tensor, b: Tensor, dims: int = 1) -> None:
    if a.shape != b.shape or a.ndim != dims or not len(a):
        raise ValueError(f"shapes {tuple(a.shape)}, {tuple(b.shape)}: unlike, empty or not of {dims} sizes")


def mask_iou(a: Tensor, b: Tensor) -> float:
    """Mean intersection / union of two masks (N, 1, H, W), each true above 0.5; 1 where both are empty."""
    _check(a, b, 4)
    a, b = a.flatten(1) > 0.5, b.flatten(1) > 0.5
    both, either = (a & b).sum(1), (a | b).sum(1)
    return torch.where(either > 0, both / either, 1.0).mean().item()


def pairwise_iou(masks: Tensor) -> float:
    """`mask_iou` of all pairs of masks (N, 1, H, W), their mean. Raises ValueError for N < 2."""
    if len(masks) < 2:
        raise ValueError(f"{len(masks)} masks make no pair: give a larger --count")
    flat = (masks > 0.5).flatten(1).float()
    both, area = flat @ flat.T, flat.sum(dim=1)
    either = area[:, None] + area - both
    iou = torch.where(either > 0, both / either, 1.0)
    return ((iou.sum() - iou.trace()) / (len(iou) * (len(iou) - 1))).item()


def max_f(predicted: Tensor, true: Tensor, beta2: float = 0.3) -> float:
    """The best F of saliency maps (N, 1, H, W) in [0, 1] against masks, each true above 0.5, over 255
    thresholds: of the mean precision and the mean recall, beta^2 = 0.3 (Achanta et al., 2009)."""
    _check(predicted, true, 4)
    p, t = predicted.flatten(1), true.flatten(1) > 0.5
    best = 0.0
    for threshold in range(255):
        found = p > threshold / 255
        both = (found & t).sum(dim=1)
        precision = (both / found.sum(dim=1).clamp(min=1)).mean().item()
        recall = (both / t.sum(dim=1).clamp(min=1)).mean().item()
        best = max(best, (1 + beta2) * precision * recall / max(beta2 * precision + recall, 1e-9))
    return best


def inception_score(probabilities: Tensor, splits: int = 10, seed: int = 0) -> tuple[float, float]:
    """Inception Score (Salimans et al., 2016): mean and deviation over splits of exp(E KL(p(y|x) | p(y))).

    probabilities (N, C), shuffled before they are split; torchvision's Inception gives other values than
    TensorFlow's. Raises ValueError for N < splits and for rows that do not sum to 1.
    """
    if probabilities.ndim != 2 or not 1 <= splits <= len(probabilities):
        raise ValueError(f"{splits} splits of probabilities {tuple(probabilities.shape)}: N >= splits >= 1")
    generator = torch.Generator().manual_seed(seed)
    p = probabilities.cpu().double()[torch.randperm(len(probabilities), generator=generator)]
    if (p < 0).any() or not torch.allclose(p.sum(dim=1), p.new_ones(len(p)), atol=1e-3):
        raise ValueError("no probabilities: a row is negative or does not sum to 1")
    scores = []
    for part in p.tensor_split(splits):
        marginal = part.mean(dim=0)
        divergence = torch.xlogy(part, part) - torch.xlogy(part, marginal)
        scores.append(divergence.sum(dim=1).mean().exp())
    scores = torch.stack(scores)
    return scores.mean().item(), scores.std(correction=0).item()


# ---------- shape or texture, object or background (Tables 3 and 4)

def _indices(text: str) -> list[int]:
    """'8 10-16' -> 8, 10, 11, .. 16."""
    spans = [list(map(int, span.split("-"))) for span in text.split()]
    return [index for span in spans for index in range(span[0], span[-1] + 1)]


CUE_CONFLICT = {  # Geirhos et al. (2019): the ImageNet classes of each of 16 categories, 207 in all
    "airplane": "404", "bear": "294-297", "bicycle": "444 671",
    "bird": "8 10-16 18-20 22-24 80-83 87-96 98-100 127-133 135-145", "boat": "472 554 625 814 914",
    "bottle": "440 720 737 898-899 901 907", "car": "436 511 817", "cat": "281-286",
    "chair": "423 559 765 857", "clock": "409 530 892",
    "dog": "152-191 193-203 205-226 228-241 243-250 252-257 259 261-263 265-268",
    "elephant": "385-386", "keyboard": "508 878", "knife": "499", "oven": "766",
    "truck": "555 569 656 675 717 734 864 867"}
IMAGENET9 = {  # Xiao et al. (2020): the ImageNet classes of each of 9 classes, 370 in all
    "dog": "151-170 173-268", "bird": "7-24 87-100 127-146",
    "vehicle": "407 408 428 436 444 468 511 547 555 561 565 569 573 586 603 609 612 627 656 661 665 670 671 "
               "675 690 705 717 734 751 757 791 802 803 817 820 829 847 864 866 867 870 880",
    "reptile": "33-68", "carnivore": "269-280 286-299 356-362 387-388", "insect": "300-326",
    "instrument": "401 402 420 432 486 494 513 541 546 558 566 577 579 593 594 641 642 683 684 687 699 776 "
                  "822 875 881 889",
    "primate": "365-384", "fish": "0-6 389-397"}


def cue_conflict_categories() -> dict[str, list[int]]:
    """The 16 categories of cue conflict (Geirhos et al., 2019) and their classes of ImageNet."""
    return {name: _indices(text) for name, text in CUE_CONFLICT.items()}


def imagenet9_map() -> list[int]:
    """The class 0..8 of ImageNet-9 (Xiao et al., 2020) of each of ImageNet's 1,000, -1 for none."""
    found = {index: number for number, text in enumerate(IMAGENET9.values()) for index in _indices(text)}
    return [found.get(index, -1) for index in range(1000)]


def bg_gap(accuracies: dict[str, float]) -> float:
    """Accuracy on mixed_same minus that on mixed_rand (Xiao et al., 2020). ValueError where one lacks."""
    try:
        return accuracies["mixed_same"] - accuracies["mixed_rand"]
    except KeyError as error:
        raise ValueError(f"BG-Gap needs {error}") from None


def cue_conflict_decisions(probabilities: Tensor) -> list[str]:
    """The category of the highest mean over its classes of each row of probabilities (N, 1000)."""
    categories = cue_conflict_categories()
    means = torch.stack([probabilities[:, indices].mean(dim=1) for indices in categories.values()], dim=1)
    return [list(categories)[index] for index in means.argmax(dim=1)]


def cue_conflict_labels(file: str) -> tuple[str, str]:
    """Shape and texture category in an image's name such as airplane1-bicycle2.png. Raises ValueError."""
    match = re.search(r"([a-z]+)\d+-([a-z]+)\d+\.png$", file)
    if not match or not set(match.groups()) <= CUE_CONFLICT.keys():
        raise ValueError(f"{file!r} is not named like airplane1-bicycle2.png")
    return match.groups()


def shape_bias(decisions: Sequence[str], shape: Sequence[str], texture: Sequence[str]) -> float:
    """Shape hits / all hits of category names (Geirhos et al., 2019), agreeing pairs dropped.

    Raises ValueError for sequences of different lengths, and where no decision hits either.
    """
    by_shape, by_texture = cue_conflict_hits(decisions, shape, texture)
    if not by_shape + by_texture:
        raise ValueError("no decision hits the shape or the texture: the shape bias is undefined")
    return by_shape / (by_shape + by_texture)


def cue_conflict_hits(decisions, shape, texture) -> tuple[int, int]:
    """How many decisions are the shape's category, how many the texture's, where the two differ."""
    conflicts = [row for row in zip(decisions, shape, texture, strict=True) if row[1] != row[2]]
    return sum(d == s for d, s, _ in conflicts), sum(d == t for d, _, t in conflicts)


# ---------- tables of predictions

def read_table(path: str | os.PathLike) -> Rows:
    """The rows of a CSV file. ValueError for what is none and for no row with a prediction."""
    names, *lines = _read_csv(path) or [[]]
    if any(len(line) != len({*names}) for line in lines):
        raise ValueError(f"{path} has a name twice, or rows with more or fewer cells")
    rows = [dict(zip(names, line)) for line in lines]
    _columns(rows, path)
    return rows


def read_probabilities(path: str | os.PathLike) -> Tensor:
    """(N, C) float64 of a CSV file: a line of names, then a row an image. Raises ValueError."""
    lines = _read_csv(path)[1:]
    try:
        return torch.tensor([list(map(float, line)) for line in lines], dtype=torch.float64)
    except ValueError as error:
        raise ValueError(f"{path} is no line of names and rows of numbers ({error})") from None


def _read_csv(path) -> list[list[str]]:
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:  # a byte order mark is no name
            return [line for line in csv.reader(file, skipinitialspace=True) if line]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is no CSV file ({error}); classify.py writes one") from None


def write_table(path: str | os.PathLike, rows: Rows) -> None:
    """Write rows as a CSV file, whole or not at all. Raises OSError."""
    with _written(path) as file:
        names = dict.fromkeys(name for row in rows for name in row)
        table = csv.DictWriter(file, names, lineterminator="\n")
        table.writeheader()
        table.writerows(rows)


@contextlib.contextmanager
def _written(path, inputs=()):
    """A file that takes the place of `path` when the block ends without an error."""
    path, partial = Path(path), Path(f"{path}.{os.urandom(4).hex()}.partial")
    if path.exists() and (not path.is_file() or any(map(path.samefile, filter(os.path.exists, inputs)))):
        raise OSError(f"{path} is an input or no regular file: choose another place")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(partial, "w", newline="", encoding="utf-8") as file:
            yield file
        partial.replace(path)
    except OSError as error:
        raise OSError(f"{path} cannot be written ({error.strerror}): choose another place") from None
    finally:
        partial.unlink(missing_ok=True)


def _columns(rows: Rows, path="the table") -> list[str]:
    names = [name for name in PREDICTIONS if any(name in row for row in rows)]
    if not names:
        raise ValueError(f"{path} has no row with any of {', '.join(PREDICTIONS)}")
    return names


def _numbers(rows: Rows, column: str, classes: int = 1000) -> Tensor:
    """A column's whole numbers in 0..classes - 1: (N, K) long. Raises ValueError."""
    try:
        numbers = torch.tensor([list(map(int, str(row.get(column, "")).split())) for row in rows])
    except (ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{column} needs whole numbers, equally many a row ({error})") from None
    if not numbers.numel() or numbers.min() < 0 or numbers.max() >= classes:
        held = f"{numbers.min()} to {numbers.max()}" if numbers.numel() else "nothing"
        raise ValueError(f"{column} holds {held}, but must be in 0..{classes - 1}")
    return numbers


def _labelled(rows: Rows) -> dict[str, tuple[Tensor, Tensor]]:
    """Labels (N,) and predictions (N, K) of each column with a label. Raises ValueError."""
    found = {}
    for column in _columns(rows):
        label = f"{column} label" if f"{column} label" in rows[0] else "label"
        if label in rows[0]:
            found[column] = _numbers(rows, label).squeeze(1), _numbers(rows, column)
    if not found:
        raise ValueError(f"no column label, and no {column} label")
    return found


def judge_imagenet(rows: Rows) -> dict[str, dict]:
    """Accuracies of each column of predictions with a label: {column: {"samples", "top-1", "top-5"}}.

    With K < 5 classes a cell it is "top-K". Raises ValueError for what is no class, and for no label.
    """
    result = {}
    for column, (labels, ranked) in _labelled(rows).items():
        best = ranked[:, :5]
        result[column] = {"samples": len(labels), "top-1": accuracy(best[:, 0], labels),
                          f"top-{best.shape[1]}": (best == labels[:, None]).any(dim=1).double().mean().item()}
    return result


def judge_cue_conflict(rows: Rows) -> dict[str, dict]:
    """Shape bias of each column of decisions: {column: {"shape bias", "by shape", "by texture", "images"}}.

    A column is judged on the rows that have it. `na`, a missed answer of a human, hits neither.
    Raises ValueError for other unknown names, and for an undefined bias.
    """
    result = {}
    for column in _columns(rows):
        held = [row for row in rows if column in row]
        decisions = [row[column] for row in held]
        unknown = sorted(set(decisions) - CUE_CONFLICT.keys() - {"na"})
        if unknown:
            raise ValueError(f"{unknown[0]!r} is none of {', '.join(CUE_CONFLICT)}")
        files = [row.get("file") or row.get("imagename", "") for row in held]
        shape, texture = zip(*map(cue_conflict_labels, files))
        by_shape, by_texture = cue_conflict_hits(decisions, shape, texture)
        result[column] = {"shape bias": shape_bias(decisions, shape, texture), "by shape": by_shape,
                          "by texture": by_texture, "images": len(held)}
    return result


def judge_imagenet9(rows: Rows) -> dict[str, dict[str, float]]:
    """Accuracies of each column of predictions: {column: {variation: accuracy, .., "BG-Gap"}}.

    The gap needs mixed_same and mixed_rand. Raises ValueError for no variation, class or label 0..8.
    """
    result, classes = {column: {} for column in _columns(rows)}, torch.tensor(imagenet9_map())
    for variation in dict.fromkeys(row.get("variation") for row in rows):
        if not variation:
            raise ValueError("a row has no variation, such as mixed_same")
        held = [row for row in rows if row.get("variation") == variation]
        labels = _numbers(held, "label", len(IMAGENET9)).squeeze(1)
        for column, accuracies in result.items():
            accuracies[variation] = accuracy(classes[_numbers(held, column)[:, 0]], labels)
    for accuracies in result.values():
        if {"mixed_same", "mixed_rand"} <= accuracies.keys():
            accuracies["BG-Gap"] = bg_gap(accuracies)
    return result


def print_table(first: str, rows: dict[str, dict]) -> None:
    """Print {name: {column: value}} as Markdown: fractions in percent, all else as it is."""
    columns = dict.fromkeys(column for row in rows.values() for column in row)
    print(f"| {first} | {' | '.join(map(str, columns))} |\n" + "|---" * (1 + len(columns)) + "|")
    for name, row in rows.items():
        cells = [row.get(column, "–") for column in columns]
        cells = [f"{100 * cell:.2f} %" if isinstance(cell, float) else str(cell) for cell in cells]
        print(f"| {name} | {' | '.join(cells)} |")


# ---------- command line

def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Judge tables of predictions.")
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")
    add = parser.add_mutually_exclusive_group(required=True).add_argument
    add("--predictions", nargs=1, help="of classes: top-1, top-5, confusion")
    add("--cue-conflict", nargs="+", help="of categories: shape bias")
    add("--imagenet9", nargs=1, help="of variations: accuracies, BG-Gap")
    add("--inception-score", nargs=1, help="of probabilities: a named column a class")
    parser.add_argument("--splits", type=int, default=10, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--out", help="JSON file to write as well")
    return parser


def main(argv: list[str] | None = None) -> None:
    if hasattr(sys.stdout, "reconfigure"):  # a console that lacks a sign
        sys.stdout.reconfigure(errors="replace")
    parser = build_parser()
    args = parser.parse_args(argv)
    paths = args.predictions or args.cue_conflict or args.imagenet9 or args.inception_score
    try:
        with _written(args.out, paths) if args.out else contextlib.nullcontext() as file:
            result = _score(args) if args.inception_score else _judge(args, paths)
            if file:
                file.write(json.dumps(result) + "\n")
    except (ValueError, OSError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        parser.exit(130, "stopped\n")


def _score(args) -> dict:
    probabilities = read_probabilities(args.inception_score[0])
    mean, std = inception_score(probabilities, args.splits, args.seed)
    count, column = len(probabilities), f"Inception Score, {args.splits} splits"
    print_table("images", {count: {column: f"{mean:.2f} ± {std:.2f}"}})
    return {"images": count, "splits": args.splits, "inception_score": mean, "std": std}


def _judge(args, paths) -> dict:
    if (args.splits, args.seed) != (10, 0):
        raise ValueError("--splits and --seed go with --inception-score")
    judge = judge_imagenet if args.predictions else judge_imagenet9 if args.imagenet9 else judge_cue_conflict
    rows = [row for path in paths for row in read_table(path)]
    try:
        result = judge(rows)
    except ValueError as error:
        raise ValueError(f"{', '.join(paths)}: {error}") from None
    print_table("cue conflict" if args.cue_conflict else "accuracy", result)
    for column, (labels, ranked) in _labelled(rows).items() if args.predictions else ():
        classes = int(max(labels.max(), ranked.max())) + 1
        counts = confusion(ranked[:, 0], labels, classes).tolist()
        result[column]["confusion"] = counts
        if classes <= 50:  # else in --out only
            print()
            print_table(f"label \\ {column}", {y: dict(enumerate(line)) for y, line in enumerate(counts)})
    return result


if __name__ == "__main__":
    main()
