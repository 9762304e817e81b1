"""``plpp data``: what is there of the data sets, and downloads."""

from __future__ import annotations

import argparse

from plpp_reg.commands import flags


def arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True, parser_class=type(parser))
    look = actions.add_parser("check", help="what is there, what is missing, where to get it")
    look.add_argument("root", type=flags.path, metavar="ROOT", help="folder of the data sets")
    look.add_argument("--datasets", nargs="+", default=[], help="these alone (also folder:PATH, csv:PATH)")
    look.add_argument(
        "--every-image",
        action="store_true",
        help="decode every image (default: one of each of the papers' data sets, all of folder: and csv:)",
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
