"""``plpp table``: the tables of a folder of runs."""

from __future__ import annotations

import argparse

from plpp_reg.commands import flags


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dir", type=flags.path, metavar="DIR", help="a folder of runs: what plpp run or plpp train wrote")
    parser.add_argument("--format", choices=("markdown", "csv", "latex"), default="markdown")
    parser.add_argument("--output", type=flags.path, default="", metavar="FILE", help="write it there (default: print it)")
    parser.add_argument("--mean-h", action="store_true", help="beside H of the averages, the mean of H")
    parser.add_argument("--no-published", action="store_true", help="without rows of published figures")


def main(args: argparse.Namespace) -> None:
    from plpp_reg.io.files import write_text
    from plpp_reg.results.tables import tables_text

    text = tables_text(args.dir, args.format, mean_h=args.mean_h, published=not args.no_published)
    if args.output:
        write_text(args.output, text)
    else:
        print(text, end="")
