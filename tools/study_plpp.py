"""Where PLPP helps, against the right controls, and which defaults follow: one command, which goes on where it was stopped.

    python tools/study_plpp.py --rows benchmarks/results/study.jsonl            # validation, then the confirmation
    python tools/study_plpp.py --rows benchmarks/results/study.jsonl --docs docs    # the tables of docs/study.md, the figure

CoOp on the base half of the embedded default, evaluated on both halves, every setting over the same seeds, which are trained
together (plpp_reg/experiments/parallel_seeds.py). A row is one setting of one case over some seeds: how many images were named
rightly, after each quarter of the training.

THE RULE, written before the confirmation was run:

1. Cases A (16 vectors, 16 shots) and B (16 vectors, 4 shots) choose, on the validation part. The control is CoOp trained for
   5, 10, 20, 30 or 40 epochs; its best point is the one with the largest mean H over the same seeds, in each case.
2. The score of a PLPP setting is the mean over A and B of its mean paired difference in H to the control's best point. All
   settings run on seeds 1 to 6; the best three of them on seeds 1 to 20, which give the final score.
3. The largest score is the choice; among settings within 0.2 of it, the one that loses least on base (mean of A and B).
4. The choice is run once on seeds 201 to 240 and the test part. It is confirmed if in A and in B two intervals (95%, paired)
   lie above 0: the gap in new accuracy to the epochs' curve at equal base accuracy, and the difference in H to the number of
   epochs that was best on validation.
5. If it is confirmed, it becomes CoOp's recipe with 16 vectors. It becomes the regularizer's own default only if with 4 vectors
   and 16 shots (case C) its H is not below plain CoOp's by more than the interval. If not, defaults stay.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torch.nn import functional as F

from plpp_reg.clip.load import load_clip
from plpp_reg.engine.arguments import shipped_config
from plpp_reg.engine.method import setting as method_setting
from plpp_reg.engine.run import RunArguments, resolve
from plpp_reg.experiments.parallel_seeds import HALVES, Images, ParallelSeeds, read_images
from plpp_reg.results.frontier import Point, difference, gap_at_equal_base
from plpp_reg.results.record import summary
from plpp_reg.trainers.coop import CoOp

AT_ONCE = 20  # seeds
COARSE, FINE, FRESH = range(1, 7), range(1, 21), range(201, 241)
FINALISTS = 3
CLOSE = 0.2  # in the score
RED = "#d1495b"  # PLPP
COLOURS = ("#999999", "#444444", "#1f77b4", "#ff7f0e", "#2ca02c", "#9467bd", "#8c564b")
START, END = "<!-- tables -->", "<!-- end of tables -->"
RECIPE = str(shipped_config("trainers", "CoOp", "embedded.yaml"))
SCHEDULES: dict[str, Callable[[float], float]] = {  # the factor of PLPP's weights after a share of the training; its mean is 1
    "constant": lambda share: 1.0,
    "rising": lambda share: 2 * share,
    "falling": lambda share: 2 * (1 - share),
}


class SmoothedCoOp(CoOp):
    """CoOp with label smoothing, a control."""

    @dataclass(frozen=True)
    class Config(CoOp.Config):
        smoothing: float = method_setting(0.0, least=0, most=1, key="TRAINER.COOP.LABEL_SMOOTHING")

    def losses(self, batch, classes):
        logits = self.logits(batch, classes).float()
        return {"ce": F.cross_entropy(logits, batch["label"], label_smoothing=self.config.smoothing)}


@dataclass(frozen=True)
class Setting:
    """One point: a family's knob at one strength."""

    family: str
    strength: float
    opts: dict[str, object] = field(default_factory=dict)
    trainer: str = "CoOp"
    schedule: str = "constant"

    @property
    def name(self) -> str:
        return f"{self.family} {self.strength:g}"


class Case(NamedTuple):
    n_ctx: int
    shots: int

    def __str__(self) -> str:
        return f"{self.n_ctx} vectors, {self.shots} shot{'s' * (self.shots > 1)}"


A, B, C = Case(16, 16), Case(16, 4), Case(4, 16)
OTHERS = (Case(16, 1), Case(16, 2), Case(16, 8))


def plpp(family: str, inverse: float, k: int, direct: float = 0.0, schedule: str = "constant", **more: object) -> Setting:
    values = {"weight": direct, "inverse_weight": inverse, "top_k": k, **more}
    opts = {"TRAINER.PLPP.ENABLED": True, **{f"TRAINER.PLPP.{name.upper()}": value for name, value in values.items()}}
    return Setting(family, inverse, opts, schedule=schedule)


PLAIN = Setting("epochs", 40)
EPOCHS = [Setting("epochs", e, {"OPTIM.MAX_EPOCH": e}) for e in (5, 10, 20, 30)] + [PLAIN]
PLPP = [
    *(plpp(f"inverse, k {k}:", w, k) for k, w in ((50, 0.3), (50, 0.5), (50, 1), (200, 0.5), (200, 1), (1000, 0.3))),
    plpp("direct 0.1, inverse, k 10:", 0.1, 10, direct=0.1),
    plpp("direct 0.1, inverse, k 50:", 0.5, 50, direct=0.1),
    plpp("inverse, k 50, own states:", 0.5, 50, states="own"),
    plpp("inverse, k 200, own states:", 1, 200, states="own"),
    plpp("inverse, k 50, over the vocabulary:", 3, 50, normalize_over="vocabulary"),
    plpp("inverse, k 50, temperature 0.05:", 0.5, 50, temperature=0.05),
    plpp("inverse, k 50, temperature 0.2:", 0.5, 50, temperature=0.2),
    plpp("inverse, k 50, rising:", 0.5, 50, schedule="rising"),
    plpp("inverse, k 50, falling:", 0.5, 50, schedule="falling"),
]
CONTROLS = [
    *(Setting("learning rate", lr, {"OPTIM.LR": lr}) for lr in (0.0005, 0.001)),
    *(Setting("weight decay", wd, {"OPTIM.WEIGHT_DECAY": wd}) for wd in (0.1, 0.4)),
    *(Setting("label smoothing", s, {"TRAINER.COOP.LABEL_SMOOTHING": s}, f"{__name__}:SmoothedCoOp") for s in (0.2, 0.5)),
    *(Setting("KgCoOp", w, {"TRAINER.COOP.W": w}, "KgCoOp") for w in (1.0, 8.0)),
    Setting("ProGrad", 1, {"LOSS.LAMBDA": 1.0}, "ProGrad"),
]
# Each control's curve ends in plain CoOp, its knob turned off; ProGrad's is a point.
FAMILIES = {"learning rate": 0.002, "weight decay": 5e-4, "label smoothing": 0.0, "KgCoOp": 0.0, "ProGrad": 0.0}


class Rows:
    """The file of rows, and what it says of a setting."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, separators=(",", ":")) + "\n")

    def of(self, name: str, case: Case, split: str) -> list[dict[str, Any]]:
        return [r for r in self.rows if (r["name"], r["n_ctx"], r["shots"], r["split"]) == (name, *case, split)]

    def seeds(self, name: str, case: Case, split: str) -> list[int]:
        return sorted(seed for r in self.of(name, case, split) for seed in r["seeds"])

    def figures(self, name: str, case: Case, split: str, figure: str, seeds: Sequence[int], quarter: int = 4) -> list[float]:
        """Accuracies in percent, or perplexities, by seed."""
        found = {}
        for r in self.of(name, case, split):
            scale = 100 / r["images"][figure] if figure in HALVES else 1
            values = r["quarters"][quarter - 1][figure]
            found |= {seed: scale * value for seed, value in zip(r["seeds"], values, strict=True)}
        return [found[seed] for seed in seeds]

    def point(self, setting: Setting, case: Case, split: str, seeds: Sequence[int], quarter: int = 4) -> Point:
        base, new = (self.figures(setting.name, case, split, half, seeds, quarter) for half in HALVES)
        return Point(setting.strength, base, new)


class Bench:
    """Runs what is not in the rows yet."""

    def __init__(self, rows: Rows) -> None:
        self.rows, self.clip_model = rows, load_clip()
        self._images: dict[str, Images] = {}

    def images(self, split: str) -> Images:
        if split not in self._images:
            cfg, _ = resolve(RunArguments(trainer="CoOp", opts=("DATASET.NUM_SHOTS", "-1")))  # every training image
            self._images[split] = read_images(cfg, self.clip_model, [cfg.SEED], split)
        return self._images[split]

    def measure(self, settings: Iterable[Setting], cases: Sequence[Case], split: str, seeds: Sequence[int]) -> None:
        for setting in settings:
            for case in cases:
                done = self.rows.seeds(setting.name, case, split)
                missing = [seed for seed in seeds if seed not in done]
                for first in range(0, len(missing), AT_ONCE):
                    self.rows.add(self.run(setting, case, split, missing[first : first + AT_ONCE]))

    def run(self, setting: Setting, case: Case, split: str, seeds: Sequence[int]) -> dict[str, Any]:
        opts = {"TRAINER.COOP.N_CTX": case.n_ctx, "DATASET.NUM_SHOTS": case.shots, **setting.opts}
        words = tuple(str(word) for pair in opts.items() for word in pair)
        cfg, method = resolve(RunArguments(trainer=setting.trainer, config_file=RECIPE, opts=words))
        start, wall, images = time.process_time(), time.perf_counter(), self.images(split)
        epochs = cfg.OPTIM.MAX_EPOCH
        factor = SCHEDULES[setting.schedule]
        runs = ParallelSeeds(method, cfg, self.clip_model, images, seeds, lambda epoch: factor((epoch + 0.5) / epochs))
        quarters, ends = [], [round(epochs * share / 4) for share in (1, 2, 3, 4)]

        def measure(epoch: int) -> None:
            if epoch in ends:
                found = runs.measure()
                quarters.append({"base": found.base, "new": found.new, "perplexity": [round(p, 1) for p in found.perplexity]})

        runs.train(measure)
        print(
            f"{split}, {case}, {setting.name}, {len(seeds)} seeds: {time.process_time() - start:.1f} CPU s, "
            f"{time.perf_counter() - wall:.0f} s",
            flush=True,
        )
        return {
            "name": setting.name,
            "family": setting.family,
            "strength": setting.strength,
            "trainer": setting.trainer.rpartition(":")[2],
            "opts": setting.opts,
            "schedule": setting.schedule,
            **case._asdict(),
            "split": split,
            "seeds": list(seeds),
            "images": {half: len(runs.measured_on(half)[0]) for half in HALVES},
            "quarters": quarters,
        }


# ---- the rule -------------------------------------------------------------------------------------------------------


def best_control(rows: Rows, case: Case, split: str, seeds: Sequence[int]) -> Setting:
    """The number of epochs with the largest mean H."""
    return max(EPOCHS, key=lambda s: summary(rows.point(s, case, split, seeds).h).mean)


def score(rows: Rows, setting: Setting, seeds: Sequence[int]) -> float:
    """Mean over A and B of the mean difference in H to the control's best point, on the validation part."""
    gains = []
    for case in (A, B):
        control = rows.point(best_control(rows, case, "val", seeds), case, "val", seeds)
        gains.append(difference(rows.point(setting, case, "val", seeds), control).mean)
    return statistics.fmean(gains)


def finalists(rows: Rows) -> list[Setting]:
    return sorted(PLPP, key=lambda s: -score(rows, s, COARSE))[:FINALISTS]


def chosen(rows: Rows) -> Setting:
    """By the rule, of the finalists."""
    scores = {s.name: score(rows, s, FINE) for s in finalists(rows)}
    close = [s for s in finalists(rows) if scores[s.name] >= max(scores.values()) - CLOSE]
    return max(close, key=lambda s: sum(rows.point(s, case, "val", FINE).mean_base for case in (A, B)))


def curve_of(choice: Setting) -> list[Setting]:
    """The choice with its weight at other strengths."""
    weights = [choice.strength * factor for factor in (0.2, 0.5, 1, 2)]
    key = "TRAINER.PLPP.INVERSE_WEIGHT"
    return [Setting(choice.family, w, {**choice.opts, key: w}, choice.trainer, choice.schedule) for w in weights]


def validate(bench: Bench) -> None:
    bench.measure(EPOCHS, (A, B), "val", FINE)
    bench.measure(PLPP, (A, B), "val", COARSE)
    bench.measure(finalists(bench.rows), (A, B), "val", FINE)


def confirm(bench: Bench) -> None:
    """What the rule asks for first, so that a study that is stopped has it; curves and other controls on half of the seeds."""
    choice, half = chosen(bench.rows), FRESH[:20]
    weaker, weak, _, strong = curve_of(choice)
    for case in (A, B):
        bench.measure([PLAIN, choice, *EPOCHS[1:-1]], (case,), "test", FRESH)
    bench.measure([PLAIN, choice], (C,), "test", FRESH)
    for case in (A, B):
        bench.measure([strong, weak], (case,), "test", half)
    strongest = [max((s for s in CONTROLS if s.family == family), key=_strength) for family in FAMILIES]
    for settings in (strongest, CONTROLS, [weaker], EPOCHS[:1]):
        bench.measure(settings, (B, A), "test", half)
    bench.measure([PLAIN, choice, EPOCHS[2]], OTHERS, "test", half)


def _strength(setting: Setting) -> float:
    """How far a control's knob is turned; a small learning rate is a strong one."""
    return -setting.strength if setting.family == "learning rate" else setting.strength


# ---- tables and figure ----------------------------------------------------------------------------------------------


def settings_of(rows: Rows, case: Case, split: str) -> list[Setting]:
    """In the order in which they were first run, CoOp's own recipe first."""
    found = {r["name"]: r for r in rows.rows if (r["n_ctx"], r["shots"], r["split"]) == (*case, split)}
    settings = [Setting(r["family"], r["strength"], r["opts"], r["trainer"], r["schedule"]) for r in found.values()]
    return sorted(settings, key=lambda s: s.name != PLAIN.name)


def table(rows: Rows, case: Case, split: str) -> str:
    """Markdown: CoOp as it is, every other setting as paired differences to it with 95% intervals; stopping as measured."""
    lines = []
    for setting in settings_of(rows, case, split):
        seeds = [s for s in rows.seeds(setting.name, case, split) if s in rows.seeds(PLAIN.name, case, split)]
        point, plain = rows.point(setting, case, split, seeds), rows.point(PLAIN, case, split, seeds)
        perplexity = f"{summary(rows.figures(setting.name, case, split, 'perplexity', seeds)).mean:,.0f}"
        if setting.name == PLAIN.name:
            base, new, h = (summary(values) for values in (plain.base, plain.new, plain.h))
            lines += [
                f"{case}, {split}, CoOp as it is, {len(seeds)} seeds: base {base}, new {new}, H {h}, perplexity {perplexity}\n",
                "| setting | seeds | base | new | H | perplexity |",
                "|---|---|---|---|---|---|",
            ]
            for quarter in (1, 2, 3):
                stopped = rows.point(PLAIN, case, split, seeds, quarter)
                at = f"{summary(rows.figures(PLAIN.name, case, split, 'perplexity', seeds, quarter)).mean:,.0f}"
                cells = [str(difference(stopped, plain, figure)) for figure in ("base", "new", "h")]
                lines.append(f"| the same after epoch {10 * quarter} | {len(seeds)} | {' | '.join(cells)} | {at} |")
            continue
        cells = [str(difference(point, plain, figure)) for figure in ("base", "new", "h")]
        lines.append(f"| {setting.name} | {len(seeds)} | {' | '.join(cells)} | {perplexity} |")
    return "\n".join(lines)


def fresh(rows: Rows, setting: Setting, case: Case) -> list[int]:
    """The fresh seeds that a setting has."""
    return [seed for seed in FRESH if seed in rows.seeds(setting.name, case, "test")]


def curves(rows: Rows, case: Case) -> dict[str, tuple[list[int], list[Point]]]:
    """Each control's fresh seeds, and its curve over them, its knob from strong to off: the points that have the most seeds."""
    families = {"epochs": EPOCHS[:-1], **{family: [s for s in CONTROLS if s.family == family] for family in FAMILIES}}
    plain = fresh(rows, PLAIN, case)
    stops = [rows.point(PLAIN, case, "test", plain, quarter)._replace(strength=quarter) for quarter in (1, 2, 3, 4)]
    found = {"stopped early": (plain, stops)}
    for family, settings in families.items():
        most = max((fresh(rows, s, case) for s in settings), key=len)
        mine = [s for s in settings if len(most) and set(most) <= set(fresh(rows, s, case))]
        if mine:
            off = rows.point(PLAIN, case, "test", most)._replace(strength=FAMILIES.get(family, PLAIN.strength))
            found[family] = (most, [*(rows.point(s, case, "test", most) for s in mine), off])
    return found


def gaps(rows: Rows, case: Case) -> str:
    """Markdown: the choice against every control, at equal base accuracy."""
    choice = chosen(rows)
    lines = [
        f"{case}: {choice.name}, new accuracy at equal base accuracy\n",
        "| control | seeds | gap | base of the choice | the control's curve (base, new) |",
        "|---|---|---|---|---|",
    ]
    for family, (seeds, curve) in curves(rows, case).items():
        point = rows.point(choice, case, "test", seeds)
        shown = ", ".join(f"({p.mean_base:.1f}, {p.mean_new:.1f})" for p in sorted(curve, key=lambda p: p.strength))
        gap = gap_at_equal_base(point, curve) or "not reached"
        lines.append(f"| {family} | {len(seeds)} | {gap} | {point.mean_base:.1f} | {shown} |")
    return "\n".join(lines)


def verdict(rows: Rows) -> str:
    """What the rule says."""
    choice, above = chosen(rows), []
    lines = [f"Chosen on validation: {choice.name}, score {score(rows, choice, FINE):+.2f}"]
    for case in (A, B):
        control, (seeds, curve) = best_control(rows, case, "val", FINE), curves(rows, case)["epochs"]
        point = rows.point(choice, case, "test", seeds)
        gap, h = gap_at_equal_base(point, curve), difference(point, rows.point(control, case, "test", seeds))
        above += [gap is not None and gap.mean > gap.half_width, h.mean > h.half_width]
        lines.append(f"{case}, {len(seeds)} seeds: gap at equal base {gap or 'not reached'}; H against {control.name} {h}")
    lines.append("confirmed" if all(above) else "not confirmed")
    if not (seeds := fresh(rows, choice, C)):
        return "\n".join(f"- {line}" for line in lines)
    plain = difference(rows.point(choice, C, "test", seeds), rows.point(PLAIN, C, "test", seeds))
    side = "below it" if plain.mean < -plain.half_width else "not below it by more than the interval"
    lines.append(f"{C}, {len(seeds)} seeds: H against plain CoOp {plain}: {side}")
    return "\n".join(f"- {line}" for line in lines)


def tables(rows: Rows) -> str:
    """All that is there: the verdict, the gaps, every point."""
    cases = dict.fromkeys((r["split"], Case(r["n_ctx"], r["shots"])) for r in rows.rows)
    points = [table(rows, case, split) for split, case in cases]
    return "\n\n".join(["### What the rule says", verdict(rows), *(gaps(rows, c) for c in (A, B)), "### Every point", *points])


def draw(rows: Rows, path: Path) -> None:
    """Base against new, one curve for PLPP's weight and one for each control over its own strength."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    choice = chosen(rows)
    figure, axes = plt.subplots(1, 2, figsize=(11, 5), layout="constrained")
    colours = dict(zip(["stopped early", "epochs", *FAMILIES], COLOURS, strict=True))
    for a, case in zip(axes, (A, B), strict=True):
        plain = rows.point(PLAIN, case, "test", fresh(rows, PLAIN, case))

        def place(point: Point, over: Sequence[int], case: Case = case, plain: Point = plain) -> tuple[float, float]:
            """Paired: the difference to CoOp over its own seeds, from CoOp's mean over all of them."""
            control = rows.point(PLAIN, case, "test", over)
            return (
                plain.mean_base + difference(point, control, "base").mean,
                plain.mean_new + difference(point, control, "new").mean,
            )

        for family, (over, curve) in curves(rows, case).items():
            xy = [place(p, over) for p in sorted(curve, key=lambda p: p.strength)]
            a.plot(*zip(*xy, strict=True), "o-", color=colours[family], markersize=4, linewidth=1.2, label=family)
        mine = [s for s in curve_of(choice) if fresh(rows, s, case)]
        overs = [fresh(rows, s, case) for s in mine]
        points = [rows.point(s, case, "test", over) for s, over in zip(mine, overs, strict=True)]
        xy = [place(p, over) for p, over in zip(points, overs, strict=True)]
        a.plot(
            *zip((plain.mean_base, plain.mean_new), *xy, strict=True),
            "s-",
            color=RED,
            linewidth=2.2,
            label="PLPP's weight",
        )
        for s, over, point, (x, y) in zip(mine, overs, points, xy, strict=True):
            control = rows.point(PLAIN, case, "test", over)
            b, n = difference(point, control, "base"), difference(point, control, "new")
            a.errorbar(x, y, xerr=b.half_width, yerr=n.half_width, color=RED, alpha=0.35, linewidth=1)
            a.annotate(f"{s.strength:g}", (x, y), textcoords="offset points", xytext=(6, 6), color=RED)
        a.plot(plain.mean_base, plain.mean_new, "k*", markersize=13, label="CoOp as it is", zorder=5)
        a.set_xlabel("base accuracy (%)")
        a.set_ylabel("new accuracy (%)")
        a.set_title(f"{case}, {len(plain.base)} seeds")
        a.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, fontsize=9, loc="lower left")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=Path, required=True, help="JSON lines; what is there is not run again")
    parser.add_argument("--stage", choices=("val", "test", "all"), default="all", help="choose, confirm, or both")
    parser.add_argument("--tables", action="store_true", help="print the tables of what is there, run nothing")
    parser.add_argument("--docs", type=Path, metavar="DIR", help="write them into DIR/study.md, and the figure; run nothing")
    args = parser.parse_args()
    rows = Rows(args.rows)
    if args.docs:
        page = args.docs / "study.md"
        before, _, rest = page.read_text(encoding="utf-8").partition(START)
        page.write_text(f"{before}{START}\n\n{tables(rows)}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8")
        draw(rows, args.docs / "images" / "frontier.png")
    if args.tables:
        print(tables(rows))
    if args.docs or args.tables:
        return
    bench = Bench(rows)
    if args.stage in ("val", "all"):
        validate(bench)
    if args.stage in ("test", "all"):
        confirm(bench)


if __name__ == "__main__":
    main()
