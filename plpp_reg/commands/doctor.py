"""``plpp doctor``: what is installed, and what will fail."""

from __future__ import annotations

import argparse

from plpp_reg.commands import flags


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--folder", type=flags.path, default=".", help="where the script stands that you run (default: here)")


def main(args: argparse.Namespace) -> int:
    from plpp_reg.io.installation import doctor, report

    findings = doctor(args.folder)
    print(report(findings))
    return 1 if any(f.fails for f in findings) else 0
