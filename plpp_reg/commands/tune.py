"""``plpp tune``: PLPP's weight and k for one's own data and backbone."""

from __future__ import annotations

import argparse

from plpp_reg.commands import flags


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Trains CoOp, KgCoOp or ProGrad (--trainer; other methods are refused) on the base half of the classes, with PLPP at "
        "several weights and numbers of words and, as control, without it for a part of the epochs; some seeds choose, others "
        "confirm, on the validation part. Writes recipe.yaml, which plpp train --config-file takes."
    )
    flags.arguments(parser)
    parser.set_defaults(trainer="CoOp")
    parser.add_argument("--weights", type=float, nargs="+", default=None, metavar="W", help="of the inverted perplexity loss")
    parser.add_argument("--top-k", type=int, nargs="+", default=None, metavar="K", help="numbers of words that make a label")
    parser.add_argument(
        "--seeds", type=int, nargs=2, default=None, metavar=("N", "M"), help="how many seeds choose, how many others confirm"
    )
    flags.keys(parser)


def main(args: argparse.Namespace) -> None:
    from plpp_reg.experiments.tune import CHOOSING, CONFIRMING, WEIGHTS, tune

    tune(flags.run_arguments(args), args.weights or WEIGHTS, args.top_k, tuple(args.seeds or (CHOOSING, CONFIRMING)))
