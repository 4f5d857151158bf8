"""Metrics of Counterfactual Generative Networks (Sauer & Geiger, ICLR 2021) as pure functions, and a command over them.

    python evaluate.py --predictions predictions.csv                     # columns label,prediction: accuracy and confusion
    python evaluate.py --cue-conflict decisions.csv                      # columns file,decision: shape bias (Table 3)
    python evaluate.py --ensemble runs/ensemble/checkpoint.pt --imagenet9 path/to/bg_challenge       # BG-Gap (Table 4)
    python evaluate.py --inception-score counterfactuals                 # a folder of pictures, or probabilities.csv (Table 1)
    python evaluate.py --cgn runs/wildlife-cgn-0/checkpoint.pt --textures path/to/dtd    # are the mechanisms independent?

Fractions are in [0, 1]; a metric of nothing is a ValueError. The functions need torch alone; the command for a CGN imports
this project's other files.
"""
import argparse
import csv
import json
import re
from pathlib import Path
from typing import Callable, NamedTuple, Optional, Sequence

import torch

Reader = Callable[[torch.Tensor], torch.Tensor]     # float images (N, 3, 32, 32) in [-1, 1] -> scores (N, C)


def accuracy(predictions: torch.Tensor, labels: torch.Tensor) -> float:
    """Fraction in [0, 1] of predictions (N,) that equal labels (N,). Raises ValueError for no samples or unequal counts."""
    _check(predictions, labels)
    return (predictions == labels).double().mean().item()


def confusion(predictions: torch.Tensor, labels: torch.Tensor, classes: int) -> torch.Tensor:
    """Counts (C, C) long: row = label, column = prediction. Raises ValueError for no samples or a class outside 0..C-1."""
    _check(predictions, labels)
    for values in (predictions, labels):
        if int(values.min()) < 0 or int(values.max()) >= classes:
            raise ValueError(f"class {int(values.min())} or {int(values.max())} is not in 0..{classes - 1}")
    return torch.bincount(labels * classes + predictions, minlength=classes * classes).reshape(classes, classes)


def top_k_accuracy(scores: torch.Tensor, labels: torch.Tensor, k: int = 5) -> float:
    """Fraction in [0, 1] of labels (N,) among the k highest of scores (N, C). Raises ValueError for no samples, k not in 1..C."""
    _check(scores[:, 0], labels)
    if not 1 <= k <= scores.shape[1]:
        raise ValueError(f"the {k} highest of {scores.shape[1]} scores")
    return (scores.topk(k).indices == labels[:, None]).any(dim=1).double().mean().item()


def mean_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (N - 1; 0 for one value). Raises ValueError for none."""
    if not len(values):
        raise ValueError("mean of no values")
    values = torch.tensor(values, dtype=torch.float64)
    return values.mean().item(), values.std().item() if len(values) > 1 else 0.0


def _check(predictions: torch.Tensor, labels: torch.Tensor) -> None:
    if predictions.shape != labels.shape or labels.ndim != 1 or not len(labels):
        raise ValueError(f"{tuple(predictions.shape)} predictions for {tuple(labels.shape)} labels: both must be (N,), N >= 1")


def inception_score(probabilities: torch.Tensor, splits: int = 10, seed: int = 0) -> tuple[float, float]:
    """Inception Score (Salimans et al., 2016): mean and standard deviation over splits of exp(E KL(p(y|x) | p(y))), 1 .. C.

    probabilities (N, C), rows that sum to 1, shuffled by the seed before they are split. The network that gave them is the
    caller's choice: torchvision's Inception gives other values than the one in TensorFlow. Raises ValueError for fewer
    rows than splits and for rows that are no probabilities.
    """
    if probabilities.ndim != 2 or not 1 <= splits <= len(probabilities):
        raise ValueError(f"{splits} splits of probabilities of shape {tuple(probabilities.shape)}: (N, C) with N >= splits >= 1")
    p = probabilities.double()[torch.randperm(len(probabilities), generator=torch.Generator().manual_seed(seed))]
    if (p < 0).any() or not torch.allclose(p.sum(dim=1), torch.ones(len(p), dtype=p.dtype), atol=1e-3):
        raise ValueError("these are no probabilities: each row must be positive and sum to 1")
    scores = []
    for part in p.tensor_split(splits):
        marginal = part.mean(dim=0, keepdim=True)
        scores.append((torch.special.xlogy(part, part) - torch.special.xlogy(part, marginal)).sum(dim=1).mean().exp())
    scores = torch.stack(scores)
    return scores.mean().item(), scores.std(correction=0).item()


# ----------------------------------------------------------------------- shape or texture, object or background (Tables 3, 4)

def _indices(text: str) -> list[int]:
    """'8 10-16' -> 8, 10, 11, .. 16."""
    spans = [list(map(int, span.split("-"))) for span in text.split()]
    return [index for span in spans for index in range(span[0], span[-1] + 1)]


CUE_CONFLICT = {  # Geirhos et al. (2019): the ImageNet classes of each of 16 categories, 207 in all
    "airplane": "404", "bear": "294-297", "bicycle": "444 671",
    "bird": "8 10-16 18-20 22-24 80-83 87-96 98-100 127-133 135-145", "boat": "472 554 625 814 914",
    "bottle": "440 720 737 898-899 901 907", "car": "436 511 817", "cat": "281-286", "chair": "423 559 765 857",
    "clock": "409 530 892",
    "dog": "152-191 193-203 205-226 228-241 243-250 252-257 259 261-263 265-268",
    "elephant": "385-386", "keyboard": "508 878", "knife": "499", "oven": "766", "truck": "555 569 656 675 717 734 864 867"}
IMAGENET9 = {  # Xiao et al. (2020): the ImageNet classes of each of 9 classes, 370 in all
    "dog": "151-170 173-268", "bird": "7-24 87-100 127-146",
    "vehicle": "407 408 428 436 444 468 511 547 555 561 565 569 573 586 603 609 612 627 656 661 665 670 671 675 690 705 717 734 "
               "751 757 791 802 803 817 820 829 847 864 866 867 870 880",
    "reptile": "33-68", "carnivore": "269-280 286-299 356-362 387-388", "insect": "300-326",
    "instrument": "401 402 420 432 486 494 513 541 546 558 566 577 579 593 594 641 642 683 684 687 699 776 822 875 881 889",
    "primate": "365-384", "fish": "0-6 389-397"}


def cue_conflict_categories() -> dict[str, list[int]]:
    """The 16 categories of the cue-conflict images (Geirhos et al., 2019) and their indices among ImageNet's 1,000 classes."""
    return {name: _indices(text) for name, text in CUE_CONFLICT.items()}


def imagenet9_map() -> list[int]:
    """For each of ImageNet's 1,000 classes the class 0..8 of ImageNet-9 (Xiao et al., 2020), -1 for none."""
    classes = [-1] * 1000
    for number, text in enumerate(IMAGENET9.values()):
        for index in _indices(text):
            classes[index] = number
    return classes


def imagenet9_accuracy(predictions: torch.Tensor, labels: torch.Tensor) -> float:
    """Fraction in [0, 1] of ImageNet predictions (N,) in 0..999 that fall into their class (N,) of ImageNet-9, 0..8."""
    return accuracy(torch.tensor(imagenet9_map())[predictions], labels)


def bg_gap(accuracies: dict[str, float]) -> float:
    """Accuracy on mixed_same minus that on mixed_rand (Xiao et al., 2020). ValueError where one is missing."""
    missing = [name for name in ("mixed_same", "mixed_rand") if name not in accuracies]
    if missing:
        raise ValueError(f"BG-Gap needs {missing[0]}: there are {', '.join(accuracies) or 'no variations'}")
    return accuracies["mixed_same"] - accuracies["mixed_rand"]


def cue_conflict_decisions(probabilities: torch.Tensor) -> list[str]:
    """The category of each row of ImageNet probabilities (N, 1000): the one whose classes have the highest mean probability."""
    categories = cue_conflict_categories()
    means = torch.stack([probabilities[:, indices].mean(dim=1) for indices in categories.values()], dim=1)
    return [list(categories)[index] for index in means.argmax(dim=1)]


def cue_conflict_labels(file: str) -> tuple[str, str]:
    """Shape and texture category of a cue-conflict image by its name, as in airplane1-bicycle2.png. Raises ValueError."""
    match = re.search(r"([a-z]+)\d+-([a-z]+)\d+\.png$", file)
    if not match or not set(match.groups()) <= CUE_CONFLICT.keys():
        raise ValueError(f"{file!r} is no name of a cue-conflict image, such as airplane1-bicycle2.png")
    return match.groups()


def shape_bias(decisions: Sequence[str], shape: Sequence[str], texture: Sequence[str]) -> float:
    """Shape hits / (shape hits + texture hits), in [0, 1], of category names (Geirhos et al., 2019); agreeing pairs are dropped.

    Raises ValueError for sequences of different lengths, and where no decision hits either (the bias is undefined).
    """
    if not len(decisions) == len(shape) == len(texture):
        raise ValueError(f"{len(decisions)} decisions for {len(shape)} shapes and {len(texture)} textures")
    shape_hits, texture_hits = cue_conflict_hits(decisions, shape, texture)
    if not shape_hits + texture_hits:
        raise ValueError("no decision is the shape's or the texture's category: the shape bias is undefined")
    return shape_hits / (shape_hits + texture_hits)


def cue_conflict_hits(decisions: Sequence[str], shape: Sequence[str], texture: Sequence[str]) -> tuple[int, int]:
    """How many decisions are the shape's category, and how many the texture's, where the two differ."""
    conflicts = [row for row in zip(decisions, shape, texture) if row[1] != row[2]]
    return sum(d == s for d, s, _ in conflicts), sum(d == t for d, _, t in conflicts)


# ------------------------------------------------------------------------------------------- are the mechanisms independent?

class Disentanglement(NamedTuple):
    """`table` (3, 3): row = label read (shape, foreground, background), column = part that the CGN made (m, f, b), the
    other two being real with labels of their own; nan where there is no such label. `swapped`: classes whose b is read as
    their foreground in most images, while their f is not."""
    table: torch.Tensor
    swapped: list[int]


def mask_iou(a: torch.Tensor, b: torch.Tensor) -> float:
    """Mean over images of intersection / union of two masks (N, 1, H, W), each true above 0.5; 1 where both are empty."""
    a, b = a.flatten(1) > 0.5, b.flatten(1) > 0.5
    both, either = (a & b).sum(1), (a | b).sum(1)
    return torch.where(either > 0, both / either, 1.0).mean().item()


@torch.no_grad()
def disentanglement(sample, labels: torch.Tensor, real: Sequence[torch.Tensor], readers: Sequence[Optional[Reader]]
                    ) -> Disentanglement:
    """What each mechanism's output says, read by classifiers that were trained on factor-randomised real images.

    sample   mask (N, 1, H, W) in [0, 1], foreground and background (N, 3, H, W) in [-1, 1], all made for `labels` (N,)
    real     three parts of real images in the same shapes and ranges, whose labels were drawn independently
    readers  of the shape's, the foreground's and the background's label; None where the data have no such label
    """
    made = (sample.mask, sample.foreground, sample.background)

    def read(reader: Reader, m, f, b) -> torch.Tensor:
        return (reader(m * f + (1 - m) * b).argmax(dim=1) == labels).double()

    table = torch.full((3, 3), float("nan"), dtype=torch.float64)
    for column in range(3):
        parts = [made[k] if k == column else real[k] for k in range(3)]
        for row, reader in enumerate(readers):
            if reader is not None:
                table[row, column] = read(reader, *parts).mean()
    as_foreground = [read(readers[1], real[0], texture, real[2]) for texture in made[1:]]
    swapped = [label for label in labels.unique().tolist()
               if as_foreground[0][labels == label].mean() < 0.5 < as_foreground[1][labels == label].mean()]
    return Disentanglement(table, swapped)


@torch.no_grad()
def hidden_digits(textures: torch.Tensor, labels: torch.Tensor, reader: Reader) -> float:
    """Share of bare textures (N, 3, H, W) in [-1, 1] in which a shape reader sees the label (N,) that the texture was given.

    One that must name a digit sees mostly the same one in all textures of a class, by chance its own or not, so that 1/C is
    expected and not reached. One that has learned bare textures as one more class sees none where there is none.
    """
    return accuracy(reader(textures).argmax(dim=1), labels)


# ------------------------------------------------------------------------------------------------------------ command line

def read_rows(path: str, *columns: Sequence[str]) -> list[tuple[str, ...]]:
    """The rows of a CSV file in the asked columns, each given by the names it may have. ValueError for a missing one, no rows."""
    try:
        with open(path, newline="") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is no CSV file ({error})") from None
    found = []
    for names in columns:
        held = [name for name in names if name in (reader.fieldnames or ())]
        if not held:
            raise ValueError(f"{path} has no column {' or '.join(names)}: it needs {', '.join(names[0] for names in columns)}")
        found.append(held[0])
    if not rows:
        raise ValueError(f"{path} has no row: a metric of nothing is undefined")
    return [tuple(row[name] or "" for name in found) for row in rows]


def read_predictions(path: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels (N,) and predictions (N, K), the best first, from a CSV file with the columns `label`, a whole number, and
    `prediction`, one or, with spaces between, more of them. ValueError."""
    rows = read_rows(path, ("label",), ("prediction",))
    try:
        labels, ranked = torch.tensor([int(row[0]) for row in rows]), torch.tensor([list(map(int, row[1].split())) for row in rows])
    except (ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{path} is no table of whole numbers ({error}): it needs the columns label and prediction") from None
    if not ranked.shape[1]:
        raise ValueError(f"{path} has no prediction: its column holds whole numbers, the best first")
    return labels, ranked


def read_probabilities(path: str) -> torch.Tensor:
    """(N, C) from a CSV file: a line of names, then a row an image with each class's probability. ValueError."""
    try:
        with open(path, newline="") as file:
            rows = list(csv.reader(file))[1:]
        return torch.tensor([list(map(float, row)) for row in rows], dtype=torch.float64)
    except (UnicodeDecodeError, csv.Error, ValueError) as error:
        raise ValueError(f"{path} is no table of probabilities ({error}): a line of names, then a row an image, a column a class"
                         ) from None


def imagenet9_files(folder: Path) -> list[tuple[str, int]]:
    """Pictures of a variation of ImageNet-9 and their classes 0..8, by subfolders 00_dog .. 08_fish; none where it holds other
    files, as the published fg_mask does. Raises ValueError for other subfolders."""
    from torchvision.datasets.folder import IMG_EXTENSIONS
    files = [path for path in sorted(folder.glob("*/*")) if path.suffix.lower() in IMG_EXTENSIONS]
    names = sorted({path.parent.name for path in files})
    fits = [name.startswith(f"{number:02d}_") and word in name for number, (name, word) in enumerate(zip(names, IMAGENET9))]
    if files and not (len(fits) == len(names) == 9 and all(fits)):
        raise ValueError(f"{folder} has pictures in the subfolders {', '.join(names)}: 00_dog .. 08_fish are needed, "
                         f"the classes {', '.join(IMAGENET9)}")
    return [(str(path), int(path.parent.name[:2])) for path in files]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Measure predictions and pictures, or how independent a CGN's mechanisms are.")
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")
    what = parser.add_argument_group("what to measure").add_mutually_exclusive_group(required=True)
    what.add_argument("--predictions", help="CSV file with the columns label and prediction (a class, or the best ones with "
                      "spaces between): top-1, top-5 and confusion")
    what.add_argument("--cue-conflict", help="CSV file with the columns file and decision (or imagename and object_response, as "
                      "published by Geirhos et al.), or with --ensemble the folder of images: shape bias")
    what.add_argument("--imagenet9", help="CSV file with the columns variation (mixed_same, ..), label (0..8) and prediction "
                      "(0..999), or with --ensemble the folder of variations: accuracies and BG-Gap")
    what.add_argument("--imagenet", help="with --ensemble: folder with one subfolder a class: top-1 and top-5 accuracy; or one "
                      "that cgn.py --counterfactuals wrote: each head by its own label")
    what.add_argument("--inception-score", metavar="PATH", help="folder of pictures, or CSV file of probabilities: a line of "
                      "names, then a row an image, a column a class")
    what.add_argument("--masks", metavar="FOLDER", help="of pictures *-mask.png, as cgn.py --parts mask writes them: mean and binary "
                      "entropy")
    what.add_argument("--cgn", help="checkpoint.pt of a CGN. Of ImageNet's: Inception Score, mean mask and binary entropy. Of "
                      "digits: the 3x3 table of its mechanisms, hidden digits, swapped classes")
    parser.add_argument("--ensemble", help="checkpoint.pt of classify.py --dataset imagenet: judge each head and their average")
    how = parser.add_argument_group("how")
    how.add_argument("--skip-broken", action="store_true", help="leave pictures out that do not open; they are named")
    how.add_argument("--splits", type=int, default=10, help="of the Inception Score (default: %(default)s)")
    how.add_argument("--inception", metavar="FILE", help="network of the Inception Score (default: torchvision's inception_v3, in "
                     "weights/, fetched where it is absent; the miniature's: its own)")
    how.add_argument("--samples", type=int, default=5000, help="draws of the CGN (default: %(default)s)")
    how.add_argument("--reader-steps", type=int, default=12_000, help="training steps of a reader of digits (default: %(default)s)")
    how.add_argument("--bf16", action="store_true", help="train the readers in bfloat16")
    how.add_argument("--textures", help="wildlife: folder of DTD with the paper's textures (default: as it was trained)")
    how.add_argument("--mnist", default="data/mnist", help="folder of MNIST's four .gz files (default: %(default)s)")
    how.add_argument("--seed", type=int, default=0)
    how.add_argument("--device", default="cpu", help="of networks (default: %(default)s)")
    parser.add_argument("--out", help="JSON file to write as well")
    return parser


def main(argv: Optional[list[str]] = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        for name in ("samples", "reader_steps", "splits"):
            if getattr(args, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
        main_of, source = next((main_of, source) for main_of, source in (
            (_predictions_main, args.predictions), (_cue_conflict_main, args.cue_conflict), (_imagenet9_main, args.imagenet9),
            (_imagenet_main, args.imagenet), (_inception_main, args.inception_score), (_masks_main, args.masks),
            (_cgn_main, args.cgn)) if source)
        if args.ensemble and not Path(source).is_dir():
            raise ValueError(f"--ensemble {args.ensemble} judges the pictures of a folder: {source} is none")
        result = main_of(args)
        if args.out:
            partial = Path(f"{args.out}.partial")
            partial.write_text(json.dumps(result) + "\n")
            partial.replace(args.out)
    except (ValueError, OSError) as error:
        parser.error(str(error))


def _print_table(first: str, rows: dict[str, dict]) -> None:
    """Fractions in percent, all else as it is."""
    columns = list(next(iter(rows.values())))
    print(f"| {first} | {' | '.join(columns)} |\n" + "|---" * (1 + len(columns)) + "|")
    for name, row in rows.items():
        print(f"| {name} | " + " | ".join(f"{100 * row[column]:.2f} %" if isinstance(row[column], float) else str(row[column])
                                          for column in columns) + " |")


def _predictions_main(args: argparse.Namespace) -> dict:
    labels, ranked = read_predictions(args.predictions)
    classes, best = int(max(labels.max(), ranked.max())) + 1, min(5, ranked.shape[1])
    if classes > 1000:
        raise ValueError(f"{args.predictions} names class {classes - 1}: a table is made of 0..999 at most")
    counts = confusion(ranked[:, 0], labels, classes)
    row = {"samples": len(labels), "top-1": accuracy(ranked[:, 0], labels)}
    if best > 1:
        row[f"top-{best}"] = (ranked[:, :best] == labels[:, None]).any(dim=1).double().mean().item()
    _print_table("accuracy", {"predictions": row})
    if classes <= 50:                                       # else it is in --out only
        print()
        _print_table("label \\ prediction", {str(label): dict(zip(map(str, range(classes)), line))
                                             for label, line in enumerate(counts.tolist())})
    return {**row, "confusion": counts.tolist()}


def _judge(args: argparse.Namespace, paths: Sequence[str], least: int, subfolders: Sequence[str] = ()
           ) -> tuple[torch.Tensor, dict[str, torch.Tensor], list[str]]:
    """What --ensemble, which must know `least` classes and those that `subfolders` are named by, says of pictures: which of them
    opened (N,), the probabilities (M, C) of these by head, by the average without the background's (the authors' code on
    ImageNet-9) and by that of all, and the classes' names."""
    import cgn
    import classify
    import u2net
    cgn.check_device(args.device)
    if not args.ensemble:
        raise ValueError("a folder of images needs --ensemble, the checkpoint that judges them")
    model = classify.load_ensemble(args.ensemble).to(args.device)
    names = model.config["names"]
    if len(names) < least:
        raise ValueError(f"{args.ensemble} knows {len(names)} classes: {least} are needed")
    unknown = [name for name in subfolders if name not in names]
    if unknown:
        raise ValueError(f"{args.imagenet} has a subfolder {unknown[0]!r}, a class that {args.ensemble} was not trained on")
    scores = classify.score(lambda x: model(u2net.normalise(x)), paths, model.config["side"], skip=args.skip_broken,
                            device=args.device)                                     # (N, heads, C)
    kept = ~scores.isnan().any(dim=2).any(dim=1)
    if not kept.any():
        raise ValueError(f"none of the {len(paths)} pictures opens, as {paths[0]}")
    found = {"average": scores[kept].mean(dim=1)}
    if scores.shape[1] == 3:
        found = {**dict(zip(cgn.MECHANISMS, scores[kept].unbind(1))), "shape + texture": scores[kept, :2].mean(dim=1), **found}
    return kept, {name: part.softmax(dim=1) for name, part in found.items()}, names


def _cue_conflict_main(args: argparse.Namespace) -> dict:
    if Path(args.cue_conflict).is_dir():
        files = sorted(map(str, Path(args.cue_conflict).rglob("*.png")))
        truth = list(map(cue_conflict_labels, files))
        kept, judged, _ = _judge(args, files, 1000)
        truth = [row for row, keep in zip(truth, kept) if keep]
        judged = {name: cue_conflict_decisions(probabilities) for name, probabilities in judged.items()}
    else:
        files, decisions = zip(*read_rows(args.cue_conflict, ("file", "imagename"), ("decision", "object_response")))
        unknown = sorted(set(decisions) - CUE_CONFLICT.keys())
        if unknown:
            raise ValueError(f"{args.cue_conflict}: {unknown[0]!r} is none of the 16 categories ({', '.join(CUE_CONFLICT)})")
        truth, judged = list(map(cue_conflict_labels, files)), {"decisions": decisions}
    shape, texture = zip(*truth)
    result = {}
    for name, decisions in judged.items():
        hits = cue_conflict_hits(decisions, shape, texture)
        result[name] = {"shape bias": shape_bias(decisions, shape, texture), "by shape": hits[0], "by texture": hits[1],
                        "images": len(truth)}
    _print_table("cue conflict", result)
    return result


def _imagenet9_main(args: argparse.Namespace) -> dict:
    found = {}                                              # variation: labels, {head: predictions}
    if Path(args.imagenet9).is_dir():
        for folder in sorted(Path(args.imagenet9).glob("*/val")):
            files = imagenet9_files(folder)
            if files:
                paths, labels = zip(*files)
                kept, judged, _ = _judge(args, paths, 1000)
                found[folder.parent.name] = torch.tensor(labels)[kept], {name: p.argmax(dim=1) for name, p in judged.items()}
        if not found:
            raise ValueError(f"{args.imagenet9} has no folder VARIATION/val/00_dog .. 08_fish with pictures")
    else:
        rows = read_rows(args.imagenet9, ("variation",), ("label",), ("prediction",))
        for variation in dict.fromkeys(row[0] for row in rows):
            try:
                labels, predictions = torch.tensor([(int(a), int(b)) for name, a, b in rows if name == variation]).T
            except (ValueError, RuntimeError, OverflowError) as error:
                raise ValueError(f"{args.imagenet9} holds a label or prediction that is no whole number ({error})") from None
            for name, values, classes in (("label", labels, 9), ("prediction", predictions, 1000)):
                if int(values.min()) < 0 or int(values.max()) >= classes:
                    raise ValueError(f"{args.imagenet9}: a {name} of {variation} is not in 0..{classes - 1}")
            found[variation] = labels, {"predictions": predictions}
    result = {}
    for variation, (labels, judged) in found.items():
        for name, predictions in judged.items():
            result.setdefault(name, {})[variation] = imagenet9_accuracy(predictions, labels)
    if {"mixed_same", "mixed_rand"} <= found.keys():
        for row in result.values():
            row["BG-Gap"] = bg_gap(row)
    _print_table("accuracy", result)
    if "BG-Gap" not in next(iter(result.values())):
        print("\nno BG-Gap: it needs mixed_same and mixed_rand")
    return result


def _imagenet_main(args: argparse.Namespace) -> dict:
    import cgn
    import classify
    files, labels = zip(*classify.labelled_files(args.imagenet))
    labels = torch.tensor(labels)                                                   # (N, 1), of counterfactuals (N, 3)
    plain = labels.shape[1] == 1                            # subfolders, which need not be all those of the training
    held = sorted({Path(file).relative_to(args.imagenet).parts[0] for file in files}) if plain else ()
    kept, judged, names = _judge(args, files, int(labels.max()) + 1, held)
    if plain:
        labels = {name: torch.tensor([names.index(name) for name in held])[labels[kept, 0]] for name in judged}
    elif len(judged) < 3:
        raise ValueError(f"{args.ensemble} has one head: {args.imagenet} has a label for each of three")
    else:
        labels = dict(zip(cgn.MECHANISMS, labels[kept].T))
    result = {name: {"top-1": accuracy(judged[name].argmax(dim=1), y), "top-5": top_k_accuracy(judged[name], y, min(5, len(names)))}
              for name, y in labels.items()}
    _print_table("accuracy", result)
    return result


def _read_inception(args: argparse.Namespace, default: str) -> tuple[Callable, int]:
    """Images (N, 3, side, side) in [-1, 1] -> probabilities (N, C), by --inception or weights/`default`; and their side."""
    import biggan
    import cgn
    import classify
    cgn.check_device(args.device)
    network = cgn.read_classifier(biggan.find_weights(args.inception or cgn.WEIGHTS / default)).to(args.device)
    return lambda x: network(x).softmax(dim=1), 32 if isinstance(network, classify.Classifier) else 299


def _print_score(args: argparse.Namespace, probabilities: torch.Tensor, more: dict[str, float] = {}) -> dict:
    mean, std = inception_score(probabilities, args.splits, args.seed)
    _print_table("images", {str(len(probabilities)): {f"Inception Score, {args.splits} splits": f"{mean:.2f} ± {std:.2f}",
                                                      **{name: f"{value:.3f}" for name, value in more.items()}}})
    return {"images": len(probabilities), "splits": args.splits, "inception_score": mean, "std": std, **more}


def _inception_main(args: argparse.Namespace) -> dict:
    if not Path(args.inception_score).is_dir():
        return _print_score(args, read_probabilities(args.inception_score))
    import cgn
    import classify
    from torchvision.datasets.folder import IMG_EXTENSIONS
    if (Path(args.inception_score) / "labels.csv").exists():                        # masks may lie beside the pictures
        files = [file for file, _ in classify.labelled_files(args.inception_score)]
    else:
        files = sorted(str(path) for path in Path(args.inception_score).rglob("*") if path.suffix.lower() in IMG_EXTENSIONS)
    network, side = _read_inception(args, cgn.PAPER["inception"])
    probabilities = classify.score(lambda x: network(2 * x - 1), files, side, classify.whole, args.skip_broken, args.device)
    return _print_score(args, probabilities[~probabilities.isnan().any(dim=1)])


def _masks_main(args: argparse.Namespace) -> dict:
    import cgn
    import classify
    found = []
    for path in sorted(Path(args.masks).glob("*-mask.png")):
        picture = classify.read_picture(str(path), args.skip_broken)
        if picture is not None:
            m = picture[:1] / 255
            found.append((m.mean().item(), cgn.binary_entropy(m).item()))
    if not found:
        raise ValueError(f"{args.masks} holds no *-mask.png that opens: cgn.py --counterfactuals N --parts mask writes them")
    means, entropies = zip(*found)
    (mean, std), (entropy, _) = mean_std(means), mean_std(entropies)
    _print_table("masks", {str(len(found)): {"mean": f"{mean:.3f} ± {std:.3f}", "binary entropy [bit]": f"{entropy:.3f}"}})
    return {"masks": len(found), "mask_mean": mean, "mask_std": std, "binary_entropy": entropy}


@torch.no_grad()
def _imagenet_cgn(args: argparse.Namespace, model, default: str) -> dict:
    """Inception Score, mean mask and binary entropy of what an ImageNet CGN draws, one label for all three mechanisms."""
    import cgn
    network, _ = _read_inception(args, default)
    probabilities, masks = [], []
    for start in range(0, args.samples, 10):
        u, y, _ = cgn.draw_training(model, args.seed, range(start, min(start + 10, args.samples)), model.truncation)
        sample = model(u.to(args.device), y.to(args.device), model.truncation)
        probabilities.append(network(sample.image).cpu())
        masks += [(m.mean().item(), cgn.binary_entropy(m).item()) for m in sample.mask]
    mean, entropy = torch.tensor(masks).mean(dim=0).tolist()
    return _print_score(args, torch.cat(probabilities), {"mask_mean": mean, "binary_entropy": entropy})


def _cgn_main(args: argparse.Namespace) -> dict:
    import biggan
    import cgn
    import classify
    import mnist_variants
    cgn.check_device(args.device)
    model = cgn.load(args.cgn).to(args.device)
    if isinstance(model, cgn.MnistGAN):
        raise ValueError(f"{args.cgn} is a GAN's checkpoint: it has no mechanisms to measure")
    mini, scores = isinstance(model, cgn.ImagenetCGN), {}
    if mini and (model.classes, model.resolution) != (10, mnist_variants.SIZE):
        return _imagenet_cgn(args, model, cgn.PAPER["inception"])
    if mini and "networks" not in model.config:
        raise ValueError(f"{args.cgn} does not name its teacher, to which masks are compared: give the training's checkpoint.pt")
    if mini:
        scores = _imagenet_cgn(args, model, cgn.MINI["inception"])
        print()
    name = "wildlife" if mini else model.config["dataset"]
    data = {"textures": args.textures or model.config.get("textures"), "root": args.mnist, "seed": args.seed,
            "variance": model.config.get("variance", mnist_variants.COLOR_VARIANCE)}
    parts, labels = mnist_variants.load_parts(name, "train", agreement=0.1, **data)
    train = mnist_variants.Variant(mnist_variants.compose(*parts), *labels)
    val = mnist_variants.load(name, "val", **data)
    bf16 = cgn.bf16_pays(args.bf16, args.device)

    def learn(what: str, *sources: classify.Source, classes: int = 10) -> torch.nn.Module:
        reader = classify.fit(sources, args.reader_steps, args.seed, bf16=bf16, device=args.device, classes=classes)
        right = accuracy(classify.predict(reader, val.images), getattr(val, what))
        print(f"reader of {what}s{' or none' if classes > 10 else ''}: {100 * right:.1f} % of the validation split", flush=True)
        return reader

    readers = [None if getattr(train, what)[0] < 0 else learn(what, (train.images, getattr(train, what), classify.BATCH))
               for what in classify.LABELS]
    size = (-1, -1, mnist_variants.SIZE, mnist_variants.SIZE)
    bare = torch.cat([texture[:10_000].expand(size) for texture in parts[1:]])      # an eleventh class, 8 in a batch
    finder = learn("shape", (train.images, train.shape, classify.BATCH - 8), (bare, torch.full((len(bare),), 10), 8), classes=11)

    generator = torch.Generator().manual_seed(args.seed)
    parts, labels = mnist_variants.load_parts(name, "val", **data)
    order = torch.randint(len(val.shape), (args.samples,), generator=generator)
    mask, fore, back = (part[order] for part in parts)
    labels = [label[order].to(args.device) for label in labels]
    real = [part.to(args.device) for part in (mask.float() / 255, cgn.to_float(fore).expand(size), cgn.to_float(back).expand(size))]
    u, y, arrangement = (drawn.to(args.device) for drawn in cgn.draw(model, args.seed, range(args.samples), truncation=model.truncation))
    with torch.no_grad():
        sample = model(tuple(u), y[0], model.truncation if mini else arrangement)
        if mini:
            teacher = biggan.load(biggan.find_weights(cgn.WEIGHTS / model.config["networks"]["teacher"])).to(args.device)
            iou = mask_iou(sample.mask, model.saliency(teacher(u[0], y[0], model.truncation)))
    result = disentanglement(sample, y[0], real, readers)
    m, f, b = real
    faint = hidden_digits(b + 0.5 * m * (f - b), labels[0], finder)

    def seen(texture: torch.Tensor, given: torch.Tensor) -> list[Optional[float]]:
        """How often its label's digit must be named, is found where there may be none, and how often any is found there."""
        if given[0] < 0:
            return [None] * 3
        return [hidden_digits(texture, given, readers[0]), hidden_digits(texture, given, finder),
                1 - hidden_digits(texture, torch.full_like(given, 10), finder)]

    hidden = [[*zip(seen(sample[part], y[0]), seen(real[part], labels[part]))] for part in (1, 2)]
    print("\n| label read | m | f | b |\n|---|---|---|---|")
    for label, row in zip(classify.LABELS, result.table.tolist()):
        print(f"| {label} | " + " | ".join("–" if value != value else f"{100 * value:.1f}" for value in row) + " |")
    print("\n| its digit in | must be named: generated | real | may be none: generated | real | any digit: generated | real |")
    print("|---" * 7 + "|")
    for part, row in zip("fb", hidden):
        print(f"| {part} | " + " | ".join("–" if value is None else f"{100 * value:.1f}" for pair in row for value in pair) + " |")
    print(f"half transparent real digits: {100 * faint:.1f} % are found where there may be none")
    print(f"\nswapped classes: {len(result.swapped)} {result.swapped or ''}\nmean mask {sample.mask.mean():.3f}, mean binary "
          f"entropy {cgn.binary_entropy(sample.mask):.3f} bit"
          + (f", IoU with what is salient in the teacher's images {iou:.3f}" if mini else ""))
    table = [[None if value != value else value for value in row] for row in result.table.tolist()]
    columns = {name: [dict(zip(("generated", "real"), row[k])) for row in hidden]           # of f and of b
               for k, name in enumerate(("must_be_named", "may_be_none", "any_digit"))}
    return {**scores, "table": table, **columns, "half_transparent": faint, "swapped": result.swapped,
            "mask_mean": sample.mask.mean().item(), "binary_entropy": cgn.binary_entropy(sample.mask).item(), "iou": iou if mini else None}


if __name__ == "__main__":
    main()
