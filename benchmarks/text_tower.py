"""The fast text tower beside the literal one, in one run: time, agreement and peak memory of forward and backward.

    python benchmarks/text_tower.py --json text_tower.json            # ViT-B/16's text tower, 100 classes, fp32
    python benchmarks/text_tower.py --quick --json text_tower.json    # a small tower: shows that it runs, not how fast

Weights are random; what is computed does not depend on them. "Literal" is what CoOp's code does: all 77 positions of every
class, the stock modules. Seconds are medians; the two towers take turns, so that both see the same machine. With PLPP the same
step is taken with the regularizer at its defaults over the whole vocabulary: with the nearest words remembered, and with all
rows looked up in it, the least and the most that it can cost. Where a training lies between the two depends on how far a step
turns a vector, which random weights do not tell; docs/method.md says how many rows trainings looked up.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from plpp_reg import PerplexityRegularizer
from plpp_reg.clip.architectures import Architecture
from plpp_reg.clip.prompts import PromptLearner
from plpp_reg.clip.text import TextTower

from common import SMALL, VIT_B_16, LiteralText, arguments, random_clip, seconds, write_rows
from memory import peak_mib
from names import car_names, short_names


class Size(NamedTuple):
    model: Architecture
    classes: int
    context: int
    repeats: int


FULL = Size(VIT_B_16, classes=100, context=16, repeats=11)
QUICK = Size(SMALL, classes=20, context=16, repeats=2)

CASES = {  # name: (names, position, class-specific)
    "shared-short-names": (short_names, "end", False),
    "shared-car-names": (car_names, "end", False),
    "middle-short-names": (short_names, "middle", False),
    "front-short-names": (short_names, "front", False),
    "class-specific-short-names": (short_names, "end", True),
}


def build(case: str, size: Size) -> tuple[nn.Module, PromptLearner]:
    names, position, class_specific = CASES[case]
    clip_model = random_clip(size.model)
    prompts = PromptLearner(clip_model, names(size.classes), size.context, position=position, class_specific=class_specific)
    return clip_model, prompts


class Step(NamedTuple):
    """What one case measures; each function does forward and backward of CoOp's loss and returns (features, gradient)."""

    literal: Callable[[], tuple[Tensor, Tensor]]
    fast: Callable[[], tuple[Tensor, Tensor]]
    fast_with_plpp: Callable[[], tuple[Tensor, Tensor]]
    prompts: PromptLearner
    regularizer: PerplexityRegularizer
    positions: int


def steps(case: str, size: Size) -> Step:
    clip_model, prompts = build(case, size)
    literal_tower, fast_tower = LiteralText(clip_model, prompts), TextTower(clip_model)
    regularizer = PerplexityRegularizer(clip_model.token_embedding.weight)
    g = torch.Generator().manual_seed(1)
    images = F.normalize(torch.randn(32, clip_model.text_projection.shape[1], generator=g), dim=1)
    label = torch.randint(size.classes, (32,), generator=g)

    def backward(features: Tensor, extra: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
        loss = F.cross_entropy(100 * images @ F.normalize(features, dim=1).T, label) + extra
        (gradient,) = torch.autograd.grad(loss, prompts.ctx)
        return features.detach(), gradient

    def literal():
        return backward(literal_tower(prompts.ctx))

    def fast():
        return backward(prompts(fast_tower, need_hidden=False).features)

    def fast_with_plpp():
        out = prompts(fast_tower)
        return backward(out.features, regularizer(prompts.ctx, out.hidden))

    return Step(literal, fast, fast_with_plpp, prompts, regularizer, prompts.tree(fast_tower.max_rows()).positions)


def one_of(case: str, size: Size, which: str) -> Callable[[], object]:
    return getattr(steps(case, size), which)


def measure(case: str, size: Size) -> dict[str, object]:
    step = steps(case, size)
    (f_literal, g_literal), (f_fast, g_fast) = step.literal(), step.fast()  # also the warm-up
    step.fast_with_plpp()
    nearest = step.regularizer.nearest
    times: dict[str, list[float]] = {"literal": [], "fast": [], "plpp": [], "plpp, all looked up": []}
    for i in range(size.repeats):
        turns = ["fast", "plpp", "plpp, all looked up"]
        for which in turns if i % 2 else turns[::-1]:  # who goes first finds other memory
            if which.endswith("looked up"):
                nearest.forget()
            times[which].append(seconds(step.fast if which == "fast" else step.fast_with_plpp))
        if i < 3:  # seconds each
            times["literal"].append(seconds(step.literal))
    fast_s, literal_s = statistics.median(times["fast"]), statistics.median(times["literal"])
    overhead = {
        name: statistics.median([p / f - 1 for p, f in zip(times[name], times["fast"], strict=True)])
        for name in ("plpp", "plpp, all looked up")
    }
    return {
        "case": case,
        "classes": size.classes,
        "context": size.context,
        "position": CASES[case][1],
        "seconds": fast_s,
        "reference_seconds": literal_s,
        "speedup": literal_s / fast_s,
        "max_abs_diff": (f_fast - f_literal).abs().max().item(),
        "grad_rel_diff": ((g_fast - g_literal).norm() / g_literal.norm()).item(),
        "peak_mib": peak_mib(one_of, case, size, "fast"),
        "reference_peak_mib": peak_mib(one_of, case, size, "literal"),
        "plpp_seconds": statistics.median(times["plpp"]),
        "plpp_overhead": overhead["plpp"],
        "plpp_overhead_all_looked_up": overhead["plpp, all looked up"],
        "positions": step.positions,
        "reference_positions": size.classes * 77,
    }


def main() -> None:
    args = arguments(__doc__, CASES)
    size = QUICK if args.quick else FULL
    size = size._replace(repeats=args.repeats or size.repeats)
    rows = []
    print(f"{'case':28s}{'literal s':>10s}{'fast s':>9s}{'speedup':>9s}{'PLPP (all rows looked up)':>27s}", end="")
    print(f"{'|diff|':>10s}{'grad rel':>10s}{'MiB':>14s}")
    for case in args.cases:
        row = measure(case, size)
        rows.append(row)
        plpp = f"{100 * row['plpp_overhead']:+.1f}% ({100 * row['plpp_overhead_all_looked_up']:+.1f}%)"
        memory = f"{row['peak_mib']:.0f} / {row['reference_peak_mib']:.0f}" if row["peak_mib"] is not None else ""
        print(
            f"{case:28s}{row['reference_seconds']:10.3f}{row['seconds']:9.3f}{row['speedup']:8.1f}x{plpp:>27s}"
            f"{row['max_abs_diff']:10.1e}{row['grad_rel_diff']:10.1e}{memory:>14s}",
            flush=True,
        )
    write_rows(args.json, rows)


if __name__ == "__main__":
    main()
