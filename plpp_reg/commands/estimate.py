"""``plpp estimate``: what a run will cost."""

from __future__ import annotations

import argparse

from plpp_reg.commands import flags


def arguments(parser: argparse.ArgumentParser) -> None:
    flags.arguments(parser)
    parser.add_argument("--classes", type=int, default=None, metavar="N", help="so many classes, in place of a data set's")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    flags.keys(parser)


def main(args: argparse.Namespace) -> None:
    from plpp_reg.estimate import estimate, text

    cost = estimate.estimate(flags.run_arguments(args), args.classes)
    print(text.as_json(cost) if args.json else text.as_text(cost))
