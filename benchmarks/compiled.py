"""The towers and PLPP under torch.compile, one graph each, beside the same code as it is, in one run.

    python benchmarks/compiled.py --threads 1 --cpu-time --json compiled.json    # a small tower's sizes, and ViT-B/16's
    python benchmarks/compiled.py --quick --json compiled.json                   # the small one's, few repeats

``text``: the text tower, 100 short names (small: 20), forward and backward. ``image``: the image tower with MaPLe's prompts,
batch 4. ``plpp``: the regularizer on 16 vectors, whose nearest words are remembered outside a compiled graph alone. ``step``: a
training step of CoOp_PLPP with a compiled text tower, PLPP as it is. The two take turns; the ratio is the median of the
pairs'. ``compiling``: the first pass, forward and backward, nothing kept from earlier runs.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._inductor import config

from plpp_reg import PerplexityRegularizer
from plpp_reg.clip.prompts import PromptLearner
from plpp_reg.clip.text import TextTower
from plpp_reg.clip.vision import ImageTower

from common import arguments, random_clip, seconds, write_rows
from methods import FULL, QUICK, Size, give_image_features, make_batch, make_trainer
from names import short_names

Pass = Callable[[], tuple[Tensor, ...]]  # what it computes, and its gradients


def compiled(function: Callable[..., Any], mode: str = "default") -> Callable[..., Any]:
    """One graph, of the shapes that it meets."""
    return torch.compile(function, mode=mode, fullgraph=True, dynamic=False)


def text(size: Size) -> tuple[Pass, Pass]:
    clip_model = random_clip(size.model)
    prompts, tower = PromptLearner(clip_model, short_names(size.classes), 16), TextTower(clip_model)
    tree, rows = prompts.tree(tower.max_rows()), prompts.ctx.unsqueeze(0)

    def run(forward: Callable[..., Any]) -> tuple[Tensor, ...]:
        out = forward(tree, rows)
        (gradient,) = torch.autograd.grad(out.features.square().sum() + out.hidden.square().sum(), prompts.ctx)
        return out.features.detach(), out.hidden.detach(), gradient

    fast = compiled(tower.forward)
    return lambda: run(tower.forward), lambda: run(fast)


def image(size: Size) -> tuple[Pass, Pass]:
    tower = ImageTower(random_clip(size.model))
    first, *deep = prompts = [(torch.randn(2, tower.width) * 0.02).requires_grad_() for _ in range(size.depth)]
    images = make_batch(size, 4)["img"]

    def run(forward: Callable[..., Any]) -> tuple[Tensor, ...]:
        features = forward(images, first, deep)
        return features.detach(), *torch.autograd.grad(features.square().sum(), prompts)

    fast = compiled(tower.forward)
    return lambda: run(tower.forward), lambda: run(fast)


def plpp(size: Size) -> tuple[Pass, Pass]:
    regularizer = PerplexityRegularizer(random_clip(size.model).token_embedding)
    context = (torch.randn(16, size.model.width) * 0.02).requires_grad_()
    hidden = torch.randn(16, size.model.width, requires_grad=True)

    def run(forward: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        loss = forward(context, hidden)
        return loss.detach(), *torch.autograd.grad(loss, (context, hidden))

    run(regularizer)  # a graph takes the vocabulary as it finds it
    fast = compiled(regularizer)
    return lambda: run(regularizer), lambda: run(fast)


def step(size: Size) -> tuple[Pass, Pass]:
    """Both start from the same seed and see the same batches: what they learn is compared."""

    def prepare(fast: bool) -> Pass:
        trainer, batch = make_trainer("CoOp_PLPP", size), make_batch(size, 32)
        give_image_features(trainer, size, batch)
        if fast:
            tower = trainer.method.clip.text
            tower.forward = compiled(tower.forward)

        def run() -> tuple[Tensor, ...]:
            values = trainer.step(batch)
            return torch.tensor(values["loss"]), *(p.detach().clone() for p in trainer.parameters)

        return run

    return prepare(False), prepare(True)


WHAT = {"text": text, "image": image, "plpp": plpp, "step": step}
CASES = {f"{name}-{what}": (size, what) for name, size in (("small", QUICK), ("vit-b-16", FULL)) for what in WHAT}


def measure(case: str, repeats: int) -> dict[str, Any]:
    size, what = CASES[case]
    torch.manual_seed(0)
    torch.compiler.reset()
    eager, fast = WHAT[what](size)
    results: list[tuple[Tensor, ...]] = []
    with config.patch(force_disable_caches=True):
        compiling = seconds(lambda: results.append(fast()))
    results.append(eager())
    difference = max(((a - b).norm() / b.norm()).item() for a, b in zip(*results, strict=True))
    pairs = []
    for i in range(repeats):
        taken = {run: seconds(run) for run in ((eager, fast) if i % 2 else (fast, eager))}
        pairs.append((taken[eager], taken[fast]))
    return {
        "case": case,
        "seconds": statistics.median(f for _, f in pairs),
        "reference_seconds": statistics.median(e for e, _ in pairs),
        "speedup": statistics.median(e / f for e, f in pairs),
        "largest_rel_diff": difference,
        "compiling_seconds": compiling,
    }


def main() -> None:
    args = arguments(__doc__, CASES)
    rows = []
    print(f"{'case':18s}{'as it is, s':>12s}{'compiled, s':>13s}{'speedup':>9s}{'rel diff':>10s}{'compiling, s':>14s}")
    for case in args.cases:
        if args.quick and CASES[case][0] is not QUICK:
            continue
        rows.append(row := measure(case, args.repeats or (3 if args.quick else 15)))
        print(
            f"{case:18s}{row['reference_seconds']:12.4f}{row['seconds']:13.4f}{row['speedup']:8.2f}x"
            f"{row['largest_rel_diff']:10.1e}{row['compiling_seconds']:14.1f}",
            flush=True,
        )
    write_rows(args.json, rows)


if __name__ == "__main__":
    main()
