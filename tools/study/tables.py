"""The tables of docs/study.md."""

from __future__ import annotations

from plpp_reg.results.frontier import Point, difference, gap_at_equal_base
from plpp_reg.results.record import summary

from study.rows import Rows
from study.rule import best_control, chosen, score
from study.settings import CONTROLS, EPOCHS, FAMILIES, FINE, FRESH, PLAIN, A, B, C, Case, Setting

START, END = "<!-- tables -->", "<!-- end of tables -->"


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
