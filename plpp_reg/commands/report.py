"""``plpp report``: one page of a folder of runs."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from plpp_reg.commands import flags

if TYPE_CHECKING:
    from plpp_reg.results.learned import Reader


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dir", type=flags.path, metavar="DIR", help="a folder of runs: what plpp run or plpp train wrote")
    parser.add_argument("--output", type=flags.path, default="", metavar="FILE", help="the page (default: DIR/report.html)")
    parser.add_argument("--no-published", action="store_true", help="without rows of published figures")


def main(args: argparse.Namespace) -> None:
    from plpp_reg.results.report import write_report

    write_report(args.dir, args.output, published=not args.no_published, reader=_reader)


def _reader() -> Reader:
    """Loads torch, for runs of version 0.1 alone."""
    from plpp_reg.prompts.recorded import PromptReader

    return PromptReader()
