"""``plpp demo``: CoOp with and without PLPP on the embedded default, base to new, paired over seeds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from plpp_reg.clip.load import load_clip
from plpp_reg.engine.files import write_atomically, write_text
from plpp_reg.engine.log import RunLog
from plpp_reg.engine.run import RunArguments, run
from plpp_reg.engine.trainer import PromptTrainer
from plpp_reg.errors import InputError
from plpp_reg.results import harmonic_mean, paired, summary
from plpp_reg.words import candidate_ids, nearest_words

PLAIN, TREATED = "CoOp", "CoOp_PLPP"


class DemoRun(NamedTuple):
    """One training on the base classes, evaluated on both halves (accuracies in percent)."""

    base: float
    new: float
    perplexity: list[float]  # before training, then after each epoch
    words: list[str]  # the word nearest to each context vector, with its cosine

    @property
    def h(self) -> float:
        return harmonic_mean(self.base, self.new)


ACCURACIES: dict[str, Callable[[DemoRun], float]] = {
    "base": lambda r: r.base,
    "new": lambda r: r.new,
    "H": lambda r: r.h,
}


def demo(seeds: Sequence[int] = (1, 2, 3), output_dir: str | Path = "output/demo", opts: Sequence[str] = ()) -> str:
    """Train, print one table, write it and one picture into ``output_dir``. What is done already is not done again.

    ``opts`` are KEY VALUE pairs for every run.
    """
    if len(set(seeds)) != len(seeds) or any(seed < 0 for seed in seeds):
        raise InputError(f"--seeds: expected different integers >= 0, got {' '.join(map(str, seeds))}")
    start = time.perf_counter()
    bench = Bench(Path(output_dir), load_clip(), tuple(opts))
    folder = bench.folder
    zero_shot = [bench.evaluate("ZeroshotCLIP", half, seeds[0], folder / "ZeroshotCLIP" / half) for half in ("base", "new")]
    runs: dict[str, list[DemoRun]] = {PLAIN: [], TREATED: []}
    for seed in seeds:
        for name, done in runs.items():
            done.append(bench.train_base_to_new(name, seed))
            last = done[-1]
            print(f"{name:10s} seed {seed}: base {last.base:.1f}, new {last.new:.1f}, H {last.h:.1f}", flush=True)
    text = report(zero_shot, runs, seeds)
    write_text(folder / "demo.txt", text + "\n")
    picture = folder / "demo.png"
    write_atomically(picture, lambda path: draw(runs, seeds, path))
    print(f"\n{text}\n\nPicture: {picture}\nElapsed: {time.perf_counter() - start:.0f} s")
    return text


class Bench(NamedTuple):
    """Runs that share a folder, a model and settings."""

    folder: Path
    clip_model: nn.Module
    opts: tuple[str, ...]

    def run(
        self, name: str, half: str, seed: int, output_dir: Path, after_epoch: Callable | None = None, **changed: Any
    ) -> tuple[dict[str, Any], PromptTrainer]:
        args = RunArguments(
            trainer=name, seed=seed, output_dir=str(output_dir), opts=(*self.opts, "DATASET.SUBSAMPLE_CLASSES", half)
        )
        return run(args._replace(**changed), RunLog(quiet=True), self.clip_model, after_epoch)

    def evaluate(self, name: str, half: str, seed: int, output_dir: Path, model_dir: str = "") -> float:
        """Test accuracy on one half of the classes, in percent."""
        return self.run(name, half, seed, output_dir, eval_only=True, model_dir=model_dir)[0]["metrics"]["accuracy"]

    def train_base_to_new(self, name: str, seed: int) -> DemoRun:
        """Train on the base classes, test on base and on new."""

        def measure(trainer: PromptTrainer) -> None:
            trainer.history[-1]["perplexity_now"] = trainer.measure_prompts().perplexity.item()

        place = self.folder / name / f"seed{seed}"
        untrained = self.run(name, "base", seed, place / "untrained", eval_only=True)[1]
        result, trainer = self.run(name, "base", seed, place / "base", measure)
        nearest = nearest_words(
            trainer.context(), self.clip_model.token_embedding.weight, k=1, candidates=candidate_ids(self.clip_model)
        )
        return DemoRun(
            base=result["metrics"]["accuracy"],
            new=self.evaluate(name, "new", seed, place / "new", str(place / "base")),
            perplexity=[untrained.measure_prompts().perplexity.item()] + [e["perplexity_now"] for e in trainer.history],
            words=[f"{word[0].word} {word[0].cosine:.2f}" for word in nearest],
        )


def report(zero_shot: Sequence[float], runs: dict[str, list[DemoRun]], seeds: Sequence[int]) -> str:
    """The table: mean ± sample standard deviation over seeds, and the paired difference with its 95% interval."""
    columns = {**ACCURACIES, "perplexity before": lambda r: r.perplexity[0], "after": lambda r: r.perplexity[-1]}
    rows = [["", *columns]]
    base, new = zero_shot
    rows.append(["zero-shot", f"{base:.1f}", f"{new:.1f}", f"{harmonic_mean(base, new):.1f}", "", ""])
    for name, done in runs.items():
        rows.append([name, *(_cell([value(r) for r in done]) for value in columns.values())])
    differences = [paired([f(r) for r in runs[TREATED]], [f(r) for r in runs[PLAIN]]) for f in ACCURACIES.values()]
    rows.append(["difference", *map(str, differences), "", ""])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]).rstrip()
        for row in rows
    ]
    n = len(seeds)
    lines.insert(0, f"Embedded CLIP, emoji, 16 shots, accuracy in percent, {n} seed{'s' if n > 1 else ''} (mean ± std):")
    if n > 1:
        lines.append(f"difference: {TREATED} - {PLAIN}, paired over seeds, ± half the 95% interval (Student's t)")
    lines.append(f"\nNearest words of the learned context, seed {seeds[-1]} (cosine):")
    lines += [f"  {name}: {', '.join(done[-1].words)}" for name, done in runs.items()]
    return "\n".join(lines)


def _cell(values: list[float]) -> str:
    if max(values) >= 1000:
        return f"{statistics.fmean(values):,.0f}"
    return str(summary(values))


def draw(runs: dict[str, list[DemoRun]], seeds: Sequence[int], path: Path) -> None:
    """Left: accuracies, one line a seed from plain to PLPP. Right: the prompts' perplexity over the epochs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    colours = {PLAIN: "#777777", TREATED: "#d1495b"}
    for i, value in enumerate(ACCURACIES.values()):
        for plain, treated in zip(runs[PLAIN], runs[TREATED], strict=True):
            left.plot([i - 0.15, i + 0.15], [value(plain), value(treated)], color="#bbbbbb", linewidth=1, zorder=1)
        for side, name in ((-0.15, PLAIN), (0.15, TREATED)):
            values = [value(r) for r in runs[name]]
            left.scatter([i + side] * len(values), values, color=colours[name], zorder=2, label=name if i == 0 else None)
    left.set_xticks(range(len(ACCURACIES)), list(ACCURACIES))
    left.set_ylabel("test accuracy (%)")
    left.set_title(f"16 shots, {len(seeds)} seeds, one line a seed")
    left.legend(frameon=False)
    for name, done in runs.items():
        for i, r in enumerate(done):
            right.plot(r.perplexity, color=colours[name], linewidth=1.2, label=name if i == 0 else None)
    right.set_yscale("log")
    right.set_xlabel("epoch")
    right.set_ylabel("perplexity of the context vectors")
    right.set_title("lower: CLIP's text tower expects these words")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120, format="png")
    plt.close(figure)
