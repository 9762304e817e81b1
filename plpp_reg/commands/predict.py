"""``plpp predict``: a trained prompt on one's own images."""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from plpp_reg.commands import flags
from plpp_reg.errors import InputError

if TYPE_CHECKING:
    from plpp_reg.prompts.predict import Prediction


def arguments(parser: argparse.ArgumentParser) -> None:
    flags.learned(parser)
    parser.add_argument("images", type=flags.path, nargs="+", metavar="IMAGE", help="pictures, or folders of them")
    parser.add_argument("--top", type=int, default=3, help="classes shown for each image (default: 3)")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="all probabilities, as JSON")
    form.add_argument("--csv", action="store_true", help="all probabilities, as a table: a row an image, a column a class")
    parser.add_argument(
        "--calibrated",
        action="store_true",
        help="probabilities as sure as they are right: by a temperature that is fitted on the run's validation pictures",
    )
    parser.add_argument("--device", default="", help="cpu, cuda, cuda:1 (default: the GPU where there is one)")
    parser.add_argument("--workers", type=int, default=None, help="threads that read pictures (default: as the run's loader)")


def main(args: argparse.Namespace) -> int:
    from tqdm import tqdm

    from plpp_reg.data.loaders import MOST_WORKERS
    from plpp_reg.prompts.loading import load_run
    from plpp_reg.prompts.predict import class_titles, find_images, predict

    if args.top < 1:
        raise InputError(f"--top: expected a number >= 1, got {args.top}")
    if args.workers is not None and not 0 <= args.workers <= MOST_WORKERS:
        raise InputError(f"--workers: expected a number, 0 to {MOST_WORKERS}, got {args.workers}")
    images, remarks = find_images(args.images)
    trainer = load_run(**flags.learned_from(args), device=args.device)
    for remark in remarks:
        print(f"plpp: {remark}", file=sys.stderr)
    temperature = 1.0
    if args.calibrated:
        from plpp_reg.prompts.calibration import calibrate

        own = {**flags.learned_from(args), "classes": (), "clip_model": trainer.clip_model}
        on_its_own_data = load_run(**own, device=args.device) if args.classes and trainer.cfg.DATASET.NAME else trainer
        found = calibrate(on_its_own_data, args.run)
        print(f"plpp: {found}", file=sys.stderr)
        temperature = found.temperature
    workers = trainer.cfg.DATALOADER.NUM_WORKERS if args.workers is None else args.workers
    watched = sys.stderr is not None and sys.stderr.isatty()
    predictions = predict(trainer, images, max(1, workers), temperature)
    bar = tqdm(predictions, total=len(images), unit=" images", leave=False, disable=not watched)
    unread = 0

    def counted() -> Iterator[Prediction]:
        nonlocal unread
        for prediction in bar:
            unread += bool(prediction.error)
            yield prediction

    if args.json:
        lines = as_json(counted())
    elif args.csv:
        lines = as_csv(counted(), class_titles(trainer.data.classnames))
    else:
        lines = (as_text(prediction, args.top) for prediction in counted())
    for line in lines:
        bar.write(line)  # above the bar, where there is one
    if unread:
        print(f"plpp: {unread:,} of {len(images):,} images could not be read", file=sys.stderr)
    return int(bool(unread))


def as_text(prediction: Prediction, top: int) -> str:
    if prediction.error:
        return f"{prediction.image}  not read: {prediction.error}"
    best = list(prediction.probabilities.items())[:top]
    return f"{prediction.image}  " + "  ".join(f"{name} {100 * share:.1f}%" for name, share in best)


def as_json(predictions: Iterable[Prediction]) -> Iterator[str]:
    """A list with an object an image, as it comes; one that cannot be read has its error in place of probabilities."""
    yield "["
    before = ""  # is printed once it is known whether a comma follows
    for p in predictions:
        row = {"image": p.image, "error": p.error} if p.error else {"image": p.image, "probabilities": p.probabilities}
        if before:
            yield f"{before},"
        before = f" {json.dumps(row)}"
    if before:
        yield before
    yield "]"


def as_csv(predictions: Iterable[Prediction], classes: Sequence[str]) -> Iterator[str]:
    """A row an image: its file, why it cannot be read, the likeliest class, then the probability of each class."""
    yield _row(["image", "error", "class", *classes])
    for p in predictions:
        likeliest = next(iter(p.probabilities), "")
        yield _row([p.image, p.error, likeliest, *(p.probabilities.get(name, "") for name in classes)])


def _row(cells: Sequence[object]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow(cells)
    return line.getvalue()
