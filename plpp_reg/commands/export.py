"""``plpp export``: a trained prompt as one file."""

from __future__ import annotations

import argparse

from plpp_reg.commands import flags


def arguments(parser: argparse.ArgumentParser) -> None:
    flags.learned(parser)
    parser.add_argument("file", type=flags.path, metavar="FILE", help="where it goes: prompt.safetensors, or prompt.onnx")
    parser.add_argument("--format", default="", help="safetensors or onnx (default: as the file's name ends)")


def main(args: argparse.Namespace) -> None:
    from plpp_reg.prompts.export import export, format_of
    from plpp_reg.prompts.loading import load_run

    on_cpu = {"device": "cpu", "precision": "fp32"} if format_of(args.file, args.format) == "onnx" else {}
    trainer = load_run(**flags.learned_from(args), **on_cpu)
    left_out = export(trainer, args.file)
    print(f"Exported: {args.file} ({len(trainer.data.classnames)} classes, {trainer.cfg.MODEL.BACKBONE.NAME})")
    if left_out:
        whole = "plpp predict" if trainer.method.classes_depend_on_image else "plpp predict, or an .onnx file,"
        print(f"Left out with {trainer.cfg.TRAINER.NAME}: {left_out}; {whole} classifies with it")
