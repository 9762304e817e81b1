"""``plpp predict``: a trained prompt on one's own images."""

from __future__ import annotations

import argparse
import json
import sys

from plpp_reg.commands import flags
from plpp_reg.errors import InputError, line_of


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=flags.path, metavar="RUN", help="a run's folder")
    parser.add_argument("images", type=flags.path, nargs="+", metavar="IMAGE", help="pictures, or folders of them")
    flags.learned(parser)
    parser.add_argument("--top", type=int, default=3, help="classes shown for each image (default: 3)")
    parser.add_argument("--json", action="store_true", help="all probabilities, as JSON")
    flags.own_trainer(parser)


def main(args: argparse.Namespace) -> int:
    from plpp_reg.prompts.predict import find_images, load_run, predict

    if args.top < 1:
        raise InputError(f"--top: expected a number >= 1, got {args.top}")
    images, unreadable = find_images(args.images), []
    trainer = load_run(args.run, args.classes, args.load_epoch, trainer=args.trainer)
    predictions = predict(trainer, images, unreadable if len(images) > 1 else None)
    if args.json:
        print(json.dumps([p._asdict() for p in predictions], indent=1))
    else:
        for p in predictions:
            best = list(p.probabilities.items())[: args.top]
            print(f"{p.image}  " + "  ".join(f"{name} {100 * share:.1f}%" for name, share in best), flush=True)
    for error in unreadable:
        print(f"plpp: {line_of(error)}", file=sys.stderr)
    return int(bool(unreadable))
