"""``plpp train``: one run."""

from __future__ import annotations

import argparse

from plpp_reg.commands import flags


def arguments(parser: argparse.ArgumentParser) -> None:
    flags.arguments(parser)
    parser.add_argument("--resume", type=flags.path, default="", metavar="DIR", help="run folder to go on from")
    parser.add_argument("--eval-only", action="store_true", help="evaluate, never train")
    parser.add_argument(
        "--model-dir", type=flags.path, default="", metavar="DIR", help="run folder whose prompts --eval-only loads"
    )
    parser.add_argument("--load-epoch", type=int, default=None, help="epoch to load (default: best on validation, else last)")
    parser.add_argument("--no-train", action="store_true", help="build everything, train nothing")
    flags.keys(parser)


def main(args: argparse.Namespace) -> None:
    from plpp_reg.engine.run import run

    run(flags.run_arguments(args))
