"""The fast text tower beside the literal one, in one run: time, agreement and peak memory of forward and backward.

    python benchmarks/text_tower.py --json text_tower.json            # ViT-B/16's text tower, 100 classes, fp32
    python benchmarks/text_tower.py --quick --json text_tower.json    # a small tower: shows that it runs, not how fast

Weights are random; what is computed does not depend on them. "Literal" is what CoOp's code does: all 77 positions of every
class, the stock modules. Seconds are medians; the two towers take turns, so that both see the same machine. With PLPP the same
step is taken with the regularizer at its defaults over the whole vocabulary.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from plpp_reg import PerplexityRegularizer
from plpp_reg.clip.load import freeze, openai_clip
from plpp_reg.clip.prompts import PromptLearner
from plpp_reg.clip.text import TextTower

from names import car_names, short_names


class Size(NamedTuple):
    width: int
    layers: int
    classes: int
    context: int
    repeats: int


FULL = Size(width=512, layers=12, classes=100, context=16, repeats=21)
QUICK = Size(width=128, layers=3, classes=20, context=16, repeats=2)

CASES = {  # name: (names, position, class-specific)
    "shared-short-names": (short_names, "end", False),
    "shared-car-names": (car_names, "end", False),
    "middle-short-names": (short_names, "middle", False),
    "front-short-names": (short_names, "front", False),
    "class-specific-short-names": (short_names, "end", True),
}


def build(case: str, size: Size) -> tuple[nn.Module, PromptLearner]:
    names, position, class_specific = CASES[case]
    torch.manual_seed(0)
    clip_model = openai_clip().model.CLIP(size.width, 32, 1, 64, 32, 77, 49408, size.width, size.width // 64, size.layers)
    freeze(clip_model.float())
    prompts = PromptLearner(clip_model, names(size.classes), size.context, position=position, class_specific=class_specific)
    return clip_model, prompts


class LiteralTower:
    """All 77 positions of all classes through the stock transformer, as upstream computes it."""

    def __init__(self, clip_model: nn.Module, prompts: PromptLearner) -> None:
        self.clip_model, self.prompts = clip_model, prompts
        tokens = torch.zeros(len(prompts.prompts), clip_model.positional_embedding.shape[0], dtype=torch.long)
        for c, symbols in enumerate(prompts.prompts):
            tokens[c, : len(symbols)] = torch.tensor([max(s, 0) for s in symbols])
        self.embedded = clip_model.token_embedding(tokens)
        self.rows = torch.arange(len(tokens)).unsqueeze(1)
        self.at, self.eot = prompts.context_positions(), prompts.eot_positions()

    def __call__(self) -> Tensor:
        model, context = self.clip_model, self.prompts.ctx
        context = context if context.dim() == 3 else context.expand(len(self.rows), -1, -1)
        x = self.embedded.index_put((self.rows, self.at), context) + model.positional_embedding
        x = model.ln_final(model.transformer(x.permute(1, 0, 2)).permute(1, 0, 2))
        return x[self.rows[:, 0], self.eot] @ model.text_projection


def steps(case: str, size: Size):
    """Three functions that do forward and backward and return (features, gradient): literal, fast, fast with PLPP."""
    clip_model, prompts = build(case, size)
    literal_tower, fast_tower = LiteralTower(clip_model, prompts), TextTower(clip_model)
    regularizer = PerplexityRegularizer(clip_model.token_embedding.weight)
    cotangent = torch.randn(size.classes, clip_model.text_projection.shape[1], generator=torch.Generator().manual_seed(1))

    def backward(features: Tensor, extra: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
        (gradient,) = torch.autograd.grad((features * cotangent).sum() + extra, prompts.ctx)
        return features.detach(), gradient

    def literal():
        return backward(literal_tower())

    def fast():
        return backward(prompts(fast_tower, need_hidden=False).features)

    def fast_with_plpp():
        out = prompts(fast_tower)
        return backward(out.features, regularizer(prompts.ctx, out.hidden))

    return literal, fast, fast_with_plpp, prompts.tree(fast_tower.max_nodes()).positions


def seconds(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def peak_mib(case: str, size: Size, which: int, threads: int) -> float:
    """Peak resident memory of one step over what was resident before it, in a fresh process (Linux)."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_peak_in_this_process, (case, size, which, threads))


def _peak_in_this_process(case: str, size: Size, which: int, threads: int) -> float:
    torch.set_num_threads(threads)
    step = steps(case, size)[which]
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts from here
    before = _status("VmRSS")
    step()
    return (_status("VmHWM") - before) / 1024


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1])  # KiB
    raise RuntimeError(f"/proc/self/status has no {field}")


def measure(case: str, size: Size, with_memory: bool) -> dict[str, object]:
    literal, fast, fast_with_plpp, positions = steps(case, size)
    (f_literal, g_literal), (f_fast, g_fast) = literal(), fast()  # also the warm-up
    with_plpp = not CASES[case][2]
    if with_plpp:
        fast_with_plpp()
    times: dict[str, list[float]] = {"literal": [], "fast": [], "plpp": []}
    for i in range(size.repeats):
        times["fast"].append(seconds(fast))
        if with_plpp:
            times["plpp"].append(seconds(fast_with_plpp))
        if i < 3:  # seconds each
            times["literal"].append(seconds(literal))
    fast_s, literal_s = statistics.median(times["fast"]), statistics.median(times["literal"])
    threads = torch.get_num_threads()
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
        "peak_mib": peak_mib(case, size, 1, threads) if with_memory else None,
        "reference_peak_mib": peak_mib(case, size, 0, threads) if with_memory else None,
        "plpp_seconds": statistics.median(times["plpp"]) if with_plpp else None,
        "plpp_overhead": statistics.median([p / f - 1 for p, f in zip(times["plpp"], times["fast"], strict=True)])
        if with_plpp
        else None,
        "positions": positions,
        "reference_positions": size.classes * 77,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small tower, few repeats")
    parser.add_argument("--json", required=True, metavar="FILE", help="where the rows go")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    size = QUICK if args.quick else FULL
    rows = []
    print(
        f"{'case':28s}{'literal s':>10s}{'fast s':>9s}{'speedup':>9s}{'PLPP':>8s}{'|diff|':>10s}{'grad rel':>10s}{'MiB':>14s}"
    )
    for case in args.cases:
        row = measure(case, size, with_memory=Path("/proc/self/clear_refs").exists())
        rows.append(row)
        plpp = f"{100 * row['plpp_overhead']:+.1f}%" if row["plpp_overhead"] is not None else ""
        memory = f"{row['peak_mib']:.0f} / {row['reference_peak_mib']:.0f}" if row["peak_mib"] is not None else ""
        print(
            f"{case:28s}{row['reference_seconds']:10.3f}{row['seconds']:9.3f}{row['speedup']:8.1f}x{plpp:>8s}"
            f"{row['max_abs_diff']:10.1e}{row['grad_rel_diff']:10.1e}{memory:>14s}",
            flush=True,
        )
    machine = {"torch": torch.__version__, "python": platform.python_version(), "threads": torch.get_num_threads()}
    Path(args.json).write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
