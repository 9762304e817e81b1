"""``plpp demo``: methods with and without PLPP, with nothing to download."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from plpp_reg.commands import flags
from plpp_reg.io.terminal import say


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--methods", nargs="+", default=["CoOp"], help="prompt learners, or all (default: CoOp)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="seeds (default: 1 2 3)")
    parser.add_argument("--output-dir", type=flags.path, default="output/demo", help="where runs, table and picture go")
    flags.keys(parser, "configuration keys for every run")


def main(args: argparse.Namespace) -> None:
    from plpp_reg.experiments.demo import PICTURE, demo

    start = time.perf_counter()
    text = demo(args.seeds, args.output_dir, args.opts, args.methods, say)
    picture, took = Path(args.output_dir) / PICTURE, time.perf_counter() - start
    say(f"\n{text}\n\nPicture: {picture}\nElapsed: {took:.0f} s")
