"""Metrics of Counterfactual Generative Networks (Sauer & Geiger, ICLR 2021) as pure functions, and a command over them.

    python evaluate.py --predictions predictions.csv                     # columns label,prediction: accuracy and confusion
    python evaluate.py --cgn runs/wildlife-cgn-0/checkpoint.pt --textures path/to/dtd    # are the mechanisms independent?

Fractions are in [0, 1]; a metric of nothing is a ValueError. The functions need torch alone; the command for a CGN imports
this project's other files.
"""
import argparse
import csv
import json
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


def mean_std(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (N - 1; 0 for one value). Raises ValueError for none."""
    if not len(values):
        raise ValueError("mean of no values")
    values = torch.tensor(values, dtype=torch.float64)
    return values.mean().item(), values.std().item() if len(values) > 1 else 0.0


def _check(predictions: torch.Tensor, labels: torch.Tensor) -> None:
    if predictions.shape != labels.shape or labels.ndim != 1 or not len(labels):
        raise ValueError(f"{tuple(predictions.shape)} predictions for {tuple(labels.shape)} labels: both must be (N,), N >= 1")


# ------------------------------------------------------------------------------------------- are the mechanisms independent?

class Disentanglement(NamedTuple):
    """`table` (3, 3): row = label read (shape, foreground, background), column = part that the CGN made (m, f, b), the
    other two being real with labels of their own; nan where there is no such label. `hidden`: the label given to f, and
    that given to b, read from the bare texture by the shape reader (chance 1/C). `swapped`: classes whose b looks more like
    their foreground than their f does."""
    table: torch.Tensor
    hidden: tuple[float, float]
    swapped: list[int]


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
    hidden = tuple(accuracy(readers[0](texture).argmax(dim=1), labels) for texture in made[1:])
    as_foreground = [read(readers[1], real[0], texture, real[2]) for texture in made[1:]]
    swapped = [label for label in labels.unique().tolist()
               if as_foreground[1][labels == label].mean() > as_foreground[0][labels == label].mean()]
    return Disentanglement(table, hidden, swapped)


# ------------------------------------------------------------------------------------------------------------ command line

def read_predictions(path: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels (N,) and predictions (N,) from a CSV file with whole-number columns `label` and `prediction`. ValueError."""
    try:
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
        pairs = [(int(row["label"]), int(row["prediction"])) for row in rows]
    except KeyError as error:
        raise ValueError(f"{path} has no column {error}: it needs label and prediction") from None
    except (TypeError, ValueError, csv.Error) as error:
        raise ValueError(f"{path} is no table of whole numbers ({error}): it needs the columns label and prediction") from None
    if not pairs:
        raise ValueError(f"{path} has no row: accuracy of nothing is undefined")
    return tuple(torch.tensor(pairs).T)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Measure predictions, or how independent a CGN's mechanisms are.")
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--predictions", help="CSV file with the columns label and prediction: accuracy and confusion")
    what.add_argument("--cgn", help="checkpoint.pt of a CGN: the 3x3 table of its mechanisms, hidden digits, swapped classes")
    parser.add_argument("--samples", type=int, default=5000, help="draws of the CGN (default: %(default)s)")
    parser.add_argument("--reader-steps", type=int, default=12_000, help="training steps of a reader (default: %(default)s)")
    parser.add_argument("--textures", help="wildlife: folder of DTD with the paper's textures (default: as it was trained)")
    parser.add_argument("--mnist", default="data/mnist", help="folder of MNIST's four .gz files (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="JSON file to write as well")
    return parser


def main(argv: Optional[list[str]] = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        result = _predictions_main(args) if args.predictions else _cgn_main(args)
        if args.out:
            Path(args.out).write_text(json.dumps(result) + "\n")
    except (ValueError, OSError) as error:
        parser.error(str(error))


def _predictions_main(args: argparse.Namespace) -> dict:
    labels, predictions = read_predictions(args.predictions)
    counts = confusion(predictions, labels, int(max(labels.max(), predictions.max())) + 1)
    print(f"accuracy {100 * accuracy(predictions, labels):.2f} % of {len(labels)}\n\n| label \\ prediction | "
          + " | ".join(str(column) for column in range(len(counts))) + " |\n" + "|---" * (len(counts) + 1) + "|")
    for row, line in enumerate(counts.tolist()):
        print(f"| {row} | " + " | ".join(str(count) for count in line) + " |")
    return {"accuracy": accuracy(predictions, labels), "samples": len(labels), "confusion": counts.tolist()}


def _cgn_main(args: argparse.Namespace) -> dict:
    import cgn
    import classify
    import mnist_variants
    if args.samples < 1 or args.reader_steps < 1:
        raise ValueError(f"--samples {args.samples}, --reader-steps {args.reader_steps}: both must be at least 1")
    model = cgn.load(args.cgn)
    name = model.config["dataset"]
    data = {"textures": args.textures or model.config["textures"], "variance": model.config["variance"], "root": args.mnist,
            "seed": args.seed}
    train = mnist_variants.load(name, "train", agreement=0.1, **data)
    val = mnist_variants.load(name, "val", **data)
    readers = []
    for label in ("shape", "foreground", "background"):
        if getattr(train, label)[0] < 0:
            readers.append(None)
            continue
        readers.append(classify.fit([(train.images, getattr(train, label), classify.BATCH)], args.reader_steps, args.seed))
        found = classify.predict(readers[-1], val.images)
        print(f"{label} reader: {100 * accuracy(found, getattr(val, label)):.1f} % of the validation split")

    generator = torch.Generator().manual_seed(args.seed)
    parts, _ = mnist_variants.load_parts(name, "val", **data)
    order = torch.randint(len(val.shape), (args.samples,), generator=generator)
    mask, fore, back = (part[order] for part in parts)
    size = (-1, -1, mnist_variants.SIZE, mnist_variants.SIZE)
    real = (mask.float() / 255, cgn.to_float(fore).expand(size), cgn.to_float(back).expand(size))
    u, y, arrangement = cgn.draw(model, args.seed, range(args.samples))
    with torch.no_grad():
        sample = model(tuple(u), y[0], arrangement)
    result = disentanglement(sample, y[0], real, readers)
    print("\n| label read | m | f | b |\n|---|---|---|---|")
    for label, row in zip(("shape", "foreground", "background"), result.table.tolist()):
        print(f"| {label} | " + " | ".join("–" if value != value else f"{100 * value:.1f}" for value in row) + " |")
    print(f"\na digit hidden in f: {100 * result.hidden[0]:.1f} %, in b: {100 * result.hidden[1]:.1f} % (chance 10)\n"
          f"swapped classes: {len(result.swapped)} {result.swapped or ''}\nmean mask {sample.mask.mean():.3f}, mean binary "
          f"entropy {cgn.binary_entropy(sample.mask):.3f} bit")
    return {"table": result.table.tolist(), "hidden": result.hidden, "swapped": result.swapped}


if __name__ == "__main__":
    main()
