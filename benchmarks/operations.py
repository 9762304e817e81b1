"""How many operations a step asks of the device, and for how many values the host waits: exact, the same on every machine.

    python benchmarks/operations.py --json operations.json            # ViT-B/16's text tower; whole steps on the embedded model
    python benchmarks/operations.py --quick --json operations.json    # a narrow tower of as many layers

Each operation is a kernel's launch on an accelerator; views are not counted. ``text``: features and gradient of the text tower,
forward and backward, beside the literal tower of 77 positions (of a narrow model: its count does not depend on the width), and
what PLPP adds. ``step``: forward, backward and the optimizer's update of a whole training step of a method, the features of
a frozen image tower given. Waits are those of an accelerator: what is remembered of nearest words is for a CPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from plpp_reg import PerplexityRegularizer
from plpp_reg.clip.architectures import Architecture
from plpp_reg.clip.load import load_clip
from plpp_reg.clip.prompts import PromptLearner
from plpp_reg.clip.text import TextTower
from plpp_reg.data import DataSplit
from plpp_reg.engine.log import RunLog
from plpp_reg.engine.run import RunArguments, resolve
from plpp_reg.engine.trainer import Trainer

from common import VIT_B_16, LiteralText, arguments, random_clip, write_rows
from counting import Operations, Waits
from names import car_names, short_names

NARROW = VIT_B_16._replace(embed_dim=64, resolution=32, vision_layers=1, vision_width=64, patch=16, width=64, heads=1)
TEXT = {  # names, their number, position, class-specific
    "text-shared-short-names": (short_names, 100, "end", False),
    "text-shared-car-names": (car_names, 100, "end", False),
    "text-1000-short-names": (short_names, 1000, "end", False),
    "text-middle-short-names": (short_names, 100, "middle", False),
    "text-front-short-names": (short_names, 100, "front", False),
    "text-class-specific-short-names": (short_names, 100, "end", True),
}
STEPS = {  # method, images of a batch
    f"step-{name}-{images}": (name, images)
    for method, images in (
        ("CoOp", 32),
        ("KgCoOp", 32),
        ("ProGrad", 32),
        ("CoCoOp", 4),
        ("MaPLe", 4),
        ("IVLP", 4),
        ("PromptSRC", 4),
    )
    for name in (method, f"{method}_PLPP")
}

clip_of, embedded = functools.cache(random_clip), functools.cache(load_clip)


def text_steps(case: str, sizes: Architecture, literal_sizes: Architecture) -> dict[str, Callable[[], object]]:
    """Forward and backward of the literal tower, of this package's, and of that with PLPP."""
    names, count, position, class_specific = TEXT[case]

    def made(sizes: Architecture, count: int = count) -> tuple[nn.Module, PromptLearner]:
        clip_model = clip_of(sizes)
        return clip_model, PromptLearner(clip_model, names(count), 16, position=position, class_specific=class_specific)

    clip_model, prompts = made(sizes)
    tower, regularizer = TextTower(clip_model), PerplexityRegularizer(clip_model.token_embedding)
    regularizer.nearest.remembers = False
    narrow_model, narrow_prompts = made(literal_sizes, 10)  # no number of names changes its operations
    literal = LiteralText(narrow_model, narrow_prompts)

    def with_plpp() -> object:
        out = prompts(tower)
        return torch.autograd.grad(out.features.sum() + regularizer(out.context, out.hidden), prompts.ctx)

    return {
        "literal": lambda: torch.autograd.grad(literal(narrow_prompts.ctx).sum(), narrow_prompts.ctx),
        "here": lambda: torch.autograd.grad(prompts(tower, need_hidden=False).features.sum(), prompts.ctx),
        "with_plpp": with_plpp,
    }


def whole_step(name: str, images: int) -> Callable[[], object]:
    """A training step on the embedded model, by the method's own recipe."""
    cfg, cls = resolve(RunArguments(trainer=name))
    clip_model = embedded()
    trainer = Trainer(cls, cfg, data=DataSplit([], [], [], short_names(17)), clip_model=clip_model, log=RunLog(quiet=True))
    if trainer.regularizer is not None:
        trainer.regularizer.nearest.remembers = False
    side, g = clip_model.visual.input_resolution, torch.Generator().manual_seed(0)
    batch = {
        "img": torch.randn(images, 3, side, side, generator=g),
        "label": torch.randint(17, (images,), generator=g),
        "features": F.normalize(torch.randn(images, clip_model.text_projection.shape[1], generator=g), dim=1),
    }
    return lambda: trainer.step(dict(batch))


def operations(step: Callable[[], object]) -> int:
    """Of a second step: the first makes what is kept."""
    step()
    with Operations() as counted:
        step()
    return counted.total


def measure(case: str, sizes: Architecture) -> dict[str, object]:
    if case in STEPS:
        step = whole_step(*STEPS[case])
        row: dict[str, object] = {"case": case, "operations": operations(step)}
        with Waits() as waits:
            step()
        return {**row, "waits": sum(waits.by_name.values())}
    counts = {which: operations(step) for which, step in text_steps(case, sizes, NARROW).items()}
    return {
        "case": case,
        "operations": counts["here"],
        "literal": counts["literal"],
        "plpp": counts["with_plpp"] - counts["here"],
    }


def main() -> None:
    args = arguments(__doc__, [*TEXT, *STEPS])
    rows = []
    print(f"{'case':34s}{'operations':>11s}{'literal':>9s}{'PLPP adds':>11s}{'waits':>7s}")
    for case in args.cases:
        rows.append(row := measure(case, NARROW if args.quick else VIT_B_16))
        print(
            f"{case:34s}{row['operations']:11d}{row.get('literal', ''):>9}{row.get('plpp', ''):>11}{row.get('waits', ''):>7}",
            flush=True,
        )
    write_rows(args.json, rows)


if __name__ == "__main__":
    main()
