"""A trained run of each of several methods, for what one does with it: predict and export."""

from __future__ import annotations

from pathlib import Path

from plpp_reg.commands import cli

from helpers import engine as helpers

TAUGHT = ["TEACHER.TRAINER", "ZeroshotCLIP2", "TEACHER.OPTS", "['TRAINER.ZEROSHOT.TEMPLATES', 'sixty']"]


def make_runs(folder: Path) -> Path:
    """A folder with pictures, a backbone and a trained run of several methods each."""
    helpers.make_images(folder / "images")
    backbone = helpers.write_backbone(folder / "clip.pt")
    recipe = helpers.write_recipe(
        folder / "recipe.yaml",
        OPTIM__MAX_EPOCH=1,
        INPUT__PIXEL_MEAN=[0.48145466, 0.4578275, 0.40821073],  # clip.load's, for the README's lines
        INPUT__PIXEL_STD=[0.26862954, 0.26130258, 0.27577711],
        TRAINER__MAPLE={"PROMPT_DEPTH": 1, "PREC": "fp32"},
        TRAINER__COCOOP={"N_CTX": 2, "PREC": "fp32"},
        TRAINER__VPT={"PREC": "fp32"},
        TRAINER__IVLP={"PROMPT_DEPTH_TEXT": 1, "PROMPT_DEPTH_VISION": 1, "PREC": "fp32"},
        TRAINER__PROMPTSRC={"PROMPT_DEPTH_TEXT": 1, "PROMPT_DEPTH_VISION": 1, "PREC": "fp32"},
        TRAINER__PROMPTKD={"PROMPT_DEPTH_VISION": 1, "PREC": "fp32"},
        TRAINER__FDBPL={"PREC": "fp32"},
    )
    dataset = folder / "dataset.yaml"
    dataset.write_text("DATASET:\n  NAME: tiny\n")
    fixed = ["--root", str(folder / "images"), "--config-file", str(recipe), "--dataset-config-file", str(dataset)]
    for name, trainer, opts in (
        ("CoOp", "CoOp_PLPP", []),
        ("MaPLe", "MaPLe", []),
        ("CoCoOp", "CoCoOp", []),
        ("CSC", "CoOp", ["TRAINER.COOP.CSC", "True"]),
        ("IVLP", "IVLP_PLPP", []),
        ("VPT", "VPT", []),
        ("PromptSRC", "PromptSRC", []),
        ("CoOp_KDPL", "CoOp_KDPL_PLPP", TAUGHT),
        ("FDBPL", "FDBPL", TAUGHT),
        ("PromptKD", "PromptKD", TAUGHT),
    ):
        out = ["--backbone", str(backbone), "--trainer", trainer, "--output-dir", str(folder / name)]
        assert cli.main(["train", *fixed, *out, *opts]) == 0
    return folder


def pictures(world: Path) -> list[str]:
    return [str(p) for p in sorted((world / "images" / "test").rglob("*.png"))]
