"""``plpp demo``: prompt learners with and without PLPP on the embedded default, base to new, paired over seeds."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from plpp_reg.clip.load import load_clip
from plpp_reg.clip.vocabulary import candidate_ids, nearest_words
from plpp_reg.engine import registry
from plpp_reg.engine.log import RunLog
from plpp_reg.engine.run import RunArguments, run
from plpp_reg.engine.trainer import Trainer
from plpp_reg.errors import InputError, unknown
from plpp_reg.experiments.jobs import refuse_decided
from plpp_reg.io.files import write_atomically, write_text
from plpp_reg.loss import SUFFIX
from plpp_reg.results import numbers, style
from plpp_reg.results.job import shots_text
from plpp_reg.results.record import Paired, harmonic_mean, paired, summary
from plpp_reg.trainers import TRAINERS

PICTURE = "demo.png"
SHOTS = 16
DECIDED = {
    "SEED": "--seeds",
    "OUTPUT_DIR": "--output-dir",
    "RESUME": "what is in its folder",
    "TRAINER.NAME": "--methods",
    "DATASET.SUBSAMPLE_CLASSES": "base to new",
}


class DemoRun(NamedTuple):
    """One training on the base classes, evaluated on both halves (accuracies in percent)."""

    base: float
    new: float
    perplexity: list[float]  # before training, then after each epoch; empty where there is no text context
    words: list[str]  # the word nearest to each context vector, with its cosine

    @property
    def h(self) -> float:
        return harmonic_mean(self.base, self.new)


ACCURACIES: dict[str, Callable[[DemoRun], float]] = {
    "base": lambda r: r.base,
    "new": lambda r: r.new,
    "H": lambda r: r.h,
}


def demo(
    seeds: Sequence[int] = (1, 2, 3),
    output_dir: str | Path = "output/demo",
    opts: Sequence[str] = (),
    methods: Sequence[str] = ("CoOp",),
    say: Callable[[str], object] = print,
) -> str:
    """Train, write one table and one picture into ``output_dir``, and return the table. What is done is not done again.

    ``opts`` are KEY VALUE pairs for every run; ``methods`` names of prompt learners without PLPP, or "all"; ``say`` is told of
    each run.
    """
    if len(set(seeds)) != len(seeds) or any(seed < 0 for seed in seeds):
        raise InputError(f"--seeds: expected different integers >= 0, got {' '.join(map(str, seeds))}")
    names = _with_and_without(methods)
    refuse_decided(opts[::2], DECIDED, "plpp demo")
    bench = Bench(Path(output_dir), load_clip(), tuple(opts))
    folder = bench.folder
    zero_shot = [bench.evaluate("ZeroshotCLIP", half, seeds[0], folder / "ZeroshotCLIP" / half) for half in ("base", "new")]
    runs: dict[str, list[DemoRun]] = {name: [] for name in names}
    for seed in seeds:
        for name, done in runs.items():
            done.append(bench.train_base_to_new(name, seed))
            last = done[-1]
            say(f"{name:14s} seed {seed}: base {last.base:.1f}, new {last.new:.1f}, H {last.h:.1f}")
    shots = int(dict(zip(opts[::2], opts[1::2], strict=False)).get("DATASET.NUM_SHOTS", SHOTS))
    text = report(zero_shot, runs, seeds, shots)
    write_text(folder / "demo.txt", text + "\n")
    png = draw(runs, seeds, shots)
    write_atomically(folder / PICTURE, lambda path: path.write_bytes(png))
    return text


def _with_and_without(methods: Sequence[str]) -> list[str]:
    """["CoOp", "VPT"] -> ["CoOp", "CoOp_PLPP", "VPT"]"""
    learners = [name for name in TRAINERS if not name.startswith("Zeroshot")]
    if list(methods) == ["all"]:
        methods = learners
    for name in methods:
        if name not in learners:
            raise unknown("method", name, [*learners, "all"])
    known = set(registry.trainer_names())
    return [n for name in dict.fromkeys(methods) for n in (name, name + SUFFIX) if n in known]


class Bench(NamedTuple):
    """Runs that share a folder, a model and settings."""

    folder: Path
    clip_model: nn.Module
    opts: tuple[str, ...]

    def run(
        self, name: str, half: str, seed: int, output_dir: Path, after_epoch: Callable | None = None, **changed: Any
    ) -> tuple[dict[str, Any], Trainer]:
        args = RunArguments(
            trainer=name,
            seed=seed,
            output_dir=str(output_dir),
            opts=("DATASET.NUM_SHOTS", str(SHOTS), *self.opts, "DATASET.SUBSAMPLE_CLASSES", half),
        )
        return run(args._replace(**changed), RunLog(quiet=True), self.clip_model, after_epoch)

    def evaluate(self, name: str, half: str, seed: int, output_dir: Path, model_dir: str = "") -> float:
        """Test accuracy on one half of the classes, in percent."""
        return self.run(name, half, seed, output_dir, eval_only=True, model_dir=model_dir)[0]["metrics"]["accuracy"]

    def train_base_to_new(self, name: str, seed: int) -> DemoRun:
        """Train on the base classes, test on base and on new."""

        def measure(trainer: Trainer) -> None:
            if (parts := trainer.measure_prompts()) is not None:
                trainer.state.history[-1]["perplexity_now"] = parts.perplexity.item()

        place = self.folder / name / f"seed{seed}"
        untrained = self.run(name, "base", seed, place / "untrained", eval_only=True)[1]
        result, trainer = self.run(name, "base", seed, place / "base", measure)
        base = result["metrics"]["accuracy"]
        new = self.evaluate(name, "new", seed, place / "new", str(place / "base"))
        if not trainer.method.learns_text_context:
            return DemoRun(base, new, [], [])
        context, table = trainer.method.contexts()[0].context, self.clip_model.token_embedding.weight
        nearest = nearest_words(context, table, k=1, candidates=candidate_ids(self.clip_model))
        before = untrained.measure_prompts().perplexity.item()
        return DemoRun(
            base,
            new,
            perplexity=[before, *(epoch["perplexity_now"] for epoch in trainer.state.history)],
            words=[f"{word[0].word} {word[0].cosine:.2f}" for word in nearest],
        )


def report(zero_shot: Sequence[float], runs: dict[str, list[DemoRun]], seeds: Sequence[int], shots: int = SHOTS) -> str:
    """The table: mean ± sample standard deviation over seeds, and the paired difference with its 95% interval."""
    columns = {**ACCURACIES, "perplexity before": lambda r: r.perplexity[0], "after": lambda r: r.perplexity[-1]}
    rows = [["", *columns]]
    base, new = zero_shot
    rows.append(["zero-shot", *(numbers.figure(value, 1) for value in (base, new, harmonic_mean(base, new))), "", ""])
    for name, done in runs.items():
        shown = columns if done[0].perplexity else ACCURACIES
        cells = [_cell([value(r) for r in done]) for value in shown.values()]
        rows.append([name, *cells, *[""] * (len(columns) - len(cells))])
        if name.endswith(SUFFIX):
            plain = runs[name.removesuffix(SUFFIX)]
            rows.append(["difference", *(str(_difference(done, plain, f)) for f in ACCURACIES.values()), "", ""])
    lines = numbers.columns(rows)
    n = len(seeds)
    lines.insert(
        0, f"Embedded CLIP, emoji, {_images(shots)}, accuracy in percent, {n} seed{'s' if n > 1 else ''} (mean ± std):"
    )
    if n > 1:
        lines.append("difference: X_PLPP - X, paired over seeds, ± half the 95% interval (Student's t)")
    if unlabelled := [name for name in runs if registry.find_trainer(name)[0].distils]:
        lines.append(f"Without labels, from the teacher of the recipe: {', '.join(unlabelled)}")
    words = [f"  {name}: {', '.join(done[-1].words)}" for name, done in runs.items() if done[-1].words]
    lines += [f"\nNearest words of the learned context, seed {seeds[-1]} (cosine):", *words] if words else []
    return "\n".join(lines)


def _images(shots: int) -> str:
    return shots_text(shots) if shots > 0 else "all training images"


def _difference(treated: Sequence[DemoRun], plain: Sequence[DemoRun], value: Callable[[DemoRun], float]) -> Paired:
    return paired([value(r) for r in treated], [value(r) for r in plain])


def _cell(values: list[float]) -> str:
    return numbers.magnitude(statistics.fmean(values)) if max(values) >= 1000 else str(summary(values))


def draw(runs: dict[str, list[DemoRun]], seeds: Sequence[int], shots: int = SHOTS) -> bytes:
    """A PNG. Of one method: accuracies, a line a seed, and perplexity over the epochs. Of several: what PLPP changes."""
    pairs = {name.removesuffix(SUFFIX): name for name in runs if name.endswith(SUFFIX)}
    several = len(pairs) > 1
    with style.settings():
        figure = style.figure(10, 1.5 + 0.5 * len(pairs) if several else 4)
        axes = figure.subplots(1, 3 if several else 2, sharey=several)
        if several:
            _draw_differences(axes, runs, pairs)
        else:
            _draw_accuracies(axes[0], runs, seeds, shots)
            _draw_perplexity(axes[1], runs)
        style.finish(figure)
        title = f"{_images(shots)}, {len(seeds)} seeds (grey), mean and 95% interval" if several else ""
        return style.png(figure, title, dpi=120)


def _colours(runs: dict[str, list[DemoRun]]) -> dict[str, str]:
    """A method with PLPP stands out from its plain one; those that have none differ from both."""
    of_pair = {name: style.SERIES[0] if name.endswith(SUFFIX) else style.LIGHT["grid"] for name in runs}
    alone = [name for name in runs if not name.endswith(SUFFIX) and name + SUFFIX not in runs and len(runs) > 1]
    return of_pair | dict(zip(alone, itertools.cycle(style.SERIES[1:]), strict=False))


def _draw_accuracies(axes: Any, runs: dict[str, list[DemoRun]], seeds: Sequence[int], shots: int) -> None:
    between = 0.3 / max(1, len(runs) - 1)
    sides = {name: (k - (len(runs) - 1) / 2) * between for k, name in enumerate(runs)}
    colours = _colours(runs)
    for i, value in enumerate(ACCURACIES.values()):
        places = [i + side for side in sides.values()]
        for each in zip(*runs.values(), strict=True):
            axes.plot(places, [value(r) for r in each], color=style.LIGHT["grid"], linewidth=1, zorder=1)
        for name, done in runs.items():
            places, label = [i + sides[name]] * len(done), name if i == 0 else None
            axes.scatter(places, [value(r) for r in done], color=colours[name], zorder=2, label=label)
    axes.set_xticks(range(len(ACCURACIES)), list(ACCURACIES))
    axes.set_ylabel("test accuracy (%)")
    axes.set_title(f"{_images(shots)}, {len(seeds)} seeds, one line a seed")
    axes.legend(frameon=False)


def _draw_perplexity(axes: Any, runs: dict[str, list[DemoRun]]) -> None:
    colours = _colours(runs)
    for name, done in runs.items():
        for i, r in enumerate(done):
            axes.plot(r.perplexity, color=colours[name], linewidth=1.2, label=name if i == 0 else None)
    style.logarithmic(axes)
    axes.set_xlabel("epoch")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylabel("perplexity of the context vectors")
    axes.set_title("lower: CLIP's text tower expects these words")


def _draw_differences(axes: Any, runs: dict[str, list[DemoRun]], pairs: dict[str, str]) -> None:
    for a, (title, value) in zip(axes, ACCURACIES.items(), strict=True):
        a.axvline(0, color=style.LIGHT["grid"], linewidth=1)
        for y, (plain, treated) in enumerate(pairs.items()):
            found = _difference(runs[treated], runs[plain], value)
            each = [value(t) - value(p) for t, p in zip(runs[treated], runs[plain], strict=True)]
            a.errorbar(found.mean, y, xerr=found.half_width, color=style.SERIES[0], fmt="o", capsize=3, zorder=1)
            a.scatter(each, [y] * len(each), color=style.LIGHT["ink"], s=14, zorder=2)
        a.set_title(title)
        a.set_xlabel("accuracy with PLPP - without, points")
    axes[0].set_yticks(range(len(pairs)), list(pairs))
    axes[0].invert_yaxis()
