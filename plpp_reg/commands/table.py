"""``plpp table``: the tables of a folder of runs."""

from __future__ import annotations

import argparse

from plpp_reg.commands import flags


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dir", type=flags.path, metavar="DIR", help="what plpp run wrote")
    parser.add_argument("--format", choices=("markdown", "csv", "latex"), default="markdown")
    parser.add_argument("--output", type=flags.path, default="", metavar="FILE", help="write it there (default: print it)")
    parser.add_argument("--mean-h", action="store_true", help="beside H of the averages, the mean of H")
    parser.add_argument("--no-published", action="store_true", help="without rows of published figures")


def main(args: argparse.Namespace) -> None:
    from plpp_reg.results.tables import write_tables

    write_tables(args.dir, args.format, args.output, mean_h=args.mean_h, published=not args.no_published)
