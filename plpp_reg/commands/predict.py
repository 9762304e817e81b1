"""``plpp predict``: a trained prompt on one's own images."""

from __future__ import annotations

import argparse
import json

from plpp_reg.commands import flags
from plpp_reg.errors import InputError


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=flags.path, metavar="RUN", help="a run's folder")
    parser.add_argument("images", type=flags.path, nargs="+", metavar="IMAGE", help="pictures, or folders of them")
    flags.learned(parser)
    parser.add_argument("--top", type=int, default=3, help="classes shown for each image (default: 3)")
    parser.add_argument("--json", action="store_true", help="all probabilities, as JSON")
    flags.own_trainer(parser)


def main(args: argparse.Namespace) -> None:
    from plpp_reg.prompts.predict import find_images, load_run, predict

    if args.top < 1:
        raise InputError(f"--top: expected a number >= 1, got {args.top}")
    images = find_images(args.images)
    predictions = predict(load_run(args.run, args.classes, args.load_epoch, trainer=args.trainer), images)
    if args.json:
        print(json.dumps([p._asdict() for p in predictions], indent=1))
        return
    for p in predictions:
        best = list(p.probabilities.items())[: args.top]
        print(f"{p.image}  " + "  ".join(f"{name} {100 * share:.1f}%" for name, share in best), flush=True)
