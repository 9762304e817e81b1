"""``plpp cache``: the kept image features."""

from __future__ import annotations

import argparse


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--clear", action="store_true", help="remove them")


def main(args: argparse.Namespace) -> None:
    from plpp_reg.engine.features import show_store

    show_store(args.clear)
