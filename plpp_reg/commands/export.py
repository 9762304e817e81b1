"""``plpp export``: a trained prompt as one file."""

from __future__ import annotations

import argparse

from plpp_reg.commands import flags


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=flags.path, metavar="RUN", help="a run's folder")
    parser.add_argument("file", type=flags.path, metavar="FILE", help="where it goes: prompt.safetensors")
    flags.learned(parser)
    flags.own_trainer(parser)


def main(args: argparse.Namespace) -> None:
    from plpp_reg.prompts.predict import export, load_run

    trainer = load_run(args.run, args.classes, args.load_epoch, trainer=args.trainer)
    left_out = export(trainer, args.file)
    print(f"Exported: {args.file} ({len(trainer.data.classnames)} classes, {trainer.cfg.MODEL.BACKBONE.NAME})")
    if left_out:
        print(f"Left out with {trainer.cfg.TRAINER.NAME}: {left_out}; plpp predict classifies with it")
