"""The figure of docs/study.md."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from plpp_reg.results.frontier import Point, difference

from study.rows import Rows
from study.rule import chosen, curve_of
from study.settings import FAMILIES, PLAIN, A, B, Case
from study.tables import curves, fresh

RED = "#d1495b"  # PLPP
COLOURS = ("#999999", "#444444", "#1f77b4", "#ff7f0e", "#2ca02c", "#9467bd", "#8c564b")


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

        seeds = {len(plain.base)}
        for family, (over, curve) in curves(rows, case).items():
            seeds.add(len(over))
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
        a.set_title(f"{case}, {min(seeds)} to {max(seeds)} seeds a point")
        a.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, fontsize=9, loc="lower left")
    figure.savefig(path, dpi=130)
    plt.close(figure)
