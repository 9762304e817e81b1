"""``plpp data``: what is there of the data sets, and downloads."""

from __future__ import annotations

import argparse

from plpp_reg.commands import flags


def arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True, parser_class=type(parser))
    look = actions.add_parser(
        "check", help="your own pictures, before a run; the papers' data sets: what is missing, where to get it"
    )
    look.add_argument(
        "root", type=flags.path, metavar="ROOT", help="folder of the papers' data sets (with folder: and csv: alone: .)"
    )
    look.add_argument(
        "--datasets",
        nargs="+",
        default=[],
        help="these alone: folder:PATH and csv:PATH are your own, caltech101 and the like the papers'",
    )
    look.add_argument(
        "--every-image",
        action="store_true",
        help="decode every image (default: all of folder: and csv:, one image of each of the papers' data sets)",
    )
    get = actions.add_parser("get", help="download data sets, check them, unpack them where they belong")
    get.add_argument("names", nargs="+", metavar="NAME", help="caltech101 dtd … (not imagenet)")
    get.add_argument("--root", type=flags.path, default="data", metavar="DATA", help="folder of the data sets (default: data)")
    get.add_argument("--source", default="hub", help="hub (default: with the papers' splits), or torchvision")


def main(args: argparse.Namespace) -> int:
    if args.action == "get":
        from plpp_reg.data.download import get

        return get(args.names, args.root, args.source)
    from plpp_reg.data.check import check

    return check(args.root, args.datasets, args.every_image)
