"""``plpp inspect``: learned prompts in words."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from plpp_reg.commands import flags


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.allow_abbrev = False
    parser.add_argument(
        "source", type=flags.path, metavar="RUN_OR_CHECKPOINT", help="a run's folder or a model.pth.tar-<n>, ours or upstream's"
    )
    parser.add_argument("--backbone", type=flags.path, default="", help="the CLIP it was trained on (a run of ours knows it)")
    parser.add_argument("--load-epoch", type=int, default=None, help="epoch to read (default: the newest)")
    parser.add_argument("--position", default="end", help="where the class name stands: end, middle, front (upstream's only)")
    parser.add_argument("--init", default="", help="words that the context began with (upstream's only)")
    parser.add_argument("--words", type=int, default=5, help="how many words to show (default: 5)")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument("--out", type=flags.path, default="", metavar="PNG", help="draw the perplexity over the epochs")
    flags.own_trainer(parser)


def main(args: argparse.Namespace) -> None:
    from plpp_reg.prompts import inspect

    found = inspect.inspect_prompts(
        args.source, args.backbone, args.load_epoch, args.position, args.init, args.words, args.trainer
    )
    print(inspect.as_json(found) if args.json else inspect.as_text(found))
    if args.out:
        inspect.draw(found, Path(args.out))
        print(f"Picture: {args.out}", file=sys.stderr)
