"""Figures of a report: each drawn once, written as an SVG that takes its colours from the page, and as a PNG.

matplotlib draws with the colours of :mod:`plpp_reg.results.style`. In the SVG each of them becomes a CSS variable (``--ink``,
``--grid``, ``--s0``, ...), so that a page may show it light or dark.
"""

from __future__ import annotations

import functools
import hashlib
import io
import math
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

from plpp_reg.results import style
from plpp_reg.results.style import LIGHT, MARKERS, SERIES, label, readable

WIDTH = 4.3  # inches: at a phone's width its letters are still read


class Style(NamedTuple):
    """A colour and marker by its number; a method without PLPP is dashed and hollow, otherwise like the one with it."""

    colour: int
    plain: bool = False


class Line(NamedTuple):
    """A curve: means at ``x``, and a band from ``low`` to ``high`` (the same numbers: no band)."""

    label: str
    style: Style
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


class Bar(NamedTuple):
    """A value and the half-width of its interval (nan: none); ``mark``: another value at its place, drawn as a short line."""

    value: float
    half_width: float
    mark: float = math.nan


class Level(NamedTuple):
    """A horizontal line over a whole figure: zero-shot's accuracy."""

    label: str
    value: float


class Picture(NamedTuple):
    """``svg`` is markup for a page, with every text escaped; ``alt`` says what is in it."""

    name: str
    title: str
    alt: str
    svg: str
    png: bytes


def styles(methods: Sequence[Hashable], plain_of: Mapping[Hashable, Hashable]) -> dict[Hashable, Style]:
    """A colour a method; the plain one has that of the first PLPP form of it. ``plain_of``: X_PLPP and its variants -> X."""
    found: dict[Hashable, Style] = {}
    colours = 0
    for method in [m for m in methods if m in plain_of] + [m for m in methods if m not in plain_of]:
        first = next((m for m, plain in plain_of.items() if plain == method and m in found), None)
        if first is not None:
            found[method] = Style(found[first].colour, plain=True)
        else:
            found[method] = Style(colours % len(SERIES), plain=method not in plain_of)
            colours += 1
    return {method: found[method] for method in methods}


def _with_our_settings(draw: Callable[..., Picture]) -> Callable[..., Picture]:
    @functools.wraps(draw)
    def drawn(*args: Any, **kwargs: Any) -> Picture:
        with style.settings():
            return draw(*args, **kwargs)

    return drawn


@_with_our_settings
def curves(
    name: str, title: str, alt: str, lines: Sequence[Line], x_label: str, y_label: str,
    ticks: Sequence[float] = (), log_x: bool = False, log_y: bool = False, level: Level | None = None,
) -> Picture:  # fmt: skip
    """Lines with bands, and a level."""
    rows = math.ceil((len(lines) + (level is not None)) / _legend_columns(lines))
    figure = style.figure(WIDTH, 2.7 + 0.17 * rows)
    axes = figure.subplots()
    for line in lines:
        colour = LIGHT[f"s{line.style.colour}"]
        dashes, inside = ("--", "none") if line.style.plain else ("-", colour)
        look = {"marker": MARKERS[line.style.colour], "markersize": 4, "markerfacecolor": inside} if len(line.x) <= 20 else {}
        axes.plot(line.x, line.y, dashes, color=colour, linewidth=1.5, label=label(line.label), **look)
        if list(line.low) != list(line.high):
            axes.fill_between(line.x, line.low, line.high, color=colour, alpha=0.15, linewidth=0)
    if level is not None:
        axes.axhline(level.value, color=LIGHT["ink"], linewidth=1, linestyle=":", label=label(level.label))
    if log_x:
        axes.set_xscale("log", base=2)
    if log_y:
        style.logarithmic(axes)
    if ticks:
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
    elif not log_x:
        axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(color=LIGHT["grid"], linewidth=0.6)
    figure.legend(loc="outside lower center", ncols=_legend_columns(lines), frameon=False, handlelength=3)
    return _picture(figure, name, title, alt)


@_with_our_settings
def bars(
    name: str, title: str, alt: str, rows: Sequence[str], values: Mapping[str, Sequence[Bar | None]], x_label: str,
    mark_label: str = "",
) -> Picture:  # fmt: skip
    """Horizontal bars from 0, a group a row and a colour a key of ``values``, each with its interval."""
    thick = 0.8 / max(1, len(values))
    figure = style.figure(WIDTH, 1.2 + max(0.26, 0.13 * len(values)) * len(rows))
    axes = figure.subplots()
    for i, (column, each) in enumerate(values.items()):
        places = [row + (i - (len(values) - 1) / 2) * thick for row, bar in enumerate(each) if bar is not None]
        there = [bar for bar in each if bar is not None]
        axes.barh(places, [b.value for b in there], thick * 0.9, color=LIGHT[f"s{i % len(SERIES)}"], label=label(column))
        known = [(p, b) for p, b in zip(places, there, strict=True) if math.isfinite(b.half_width)]
        axes.errorbar(
            [b.value for _, b in known], [p for p, _ in known], xerr=[b.half_width for _, b in known],
            fmt="none", ecolor=LIGHT["ink"], elinewidth=0.8, capsize=1.5,
        )  # fmt: skip
        marked = [(p, b.mark) for p, b in zip(places, there, strict=True) if math.isfinite(b.mark)]
        edges = [p + side * thick / 2 for p, _ in marked for side in (-1, 1)]
        name_once = label(mark_label) if i == 0 and marked else None
        axes.vlines([m for _, m in marked], edges[::2], edges[1::2], colors=LIGHT["ink"], linewidth=2, label=name_once)
    axes.axvline(0, color=LIGHT["ink"], linewidth=0.8)
    axes.set_yticks(range(len(rows)), [readable(row, 30) for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlabel(x_label)
    axes.grid(axis="x", color=LIGHT["grid"], linewidth=0.6)
    figure.legend(loc="outside lower center", ncols=min(4, len(values)), frameon=False)
    return _picture(figure, name, title, alt)


def _legend_columns(lines: Sequence[Line]) -> int:
    return 1 if any(len(line.label) > 20 for line in lines) else min(2, len(lines))


def _picture(figure: Any, name: str, title: str, alt: str) -> Picture:
    style.finish(figure)
    svg = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))  # no metadata: the same figure is the same bytes
    with style.settings(**{"svg.hashsalt": readable(name)}):
        figure.savefig(svg, format="svg", transparent=True, metadata=nothing)
        png = style.png(figure, title)
    return Picture(name, title, alt, _for_a_page(svg.getvalue(), name), png)


def _for_a_page(svg: str, name: str) -> str:
    """The <svg> element alone, its colours as CSS variables, its ids the figure's own: a page has many figures."""
    svg = svg[svg.index("<svg") :]
    variables = {colour: f"var(--{key})" for key, colour in LIGHT.items()}

    def restyle(style: re.Match) -> str:
        text = re.sub("#[0-9a-f]{6}", lambda colour: variables.get(colour[0], colour[0]), style[0])
        return re.sub(r" font-family: [^;]*;", "", text)  # the page's, which is not wider than the one measured with

    svg = re.sub(r"<style.*?</style>", "", svg, count=1, flags=re.DOTALL)  # it speaks of the whole page
    svg = re.sub(r'(?<=[ \n])style="[^"<>]*"', restyle, svg)
    used = set(re.findall(r'(?:xlink:href="|url\()#([\w-]+)', svg))
    own = hashlib.sha256(name.encode("utf-8", "replace")).hexdigest()[:8]
    svg = re.sub(r' id="([^"]*)"', lambda m: f' id="f{own}-{m[1]}"' if m[1] in used else "", svg)
    svg = re.sub(r'(xlink:href="|url\()#([\w-]+)', rf"\1#f{own}-\2", svg)
    return svg.replace("<svg ", '<svg aria-hidden="true" focusable="false" ', 1)  # the figure around it has the words


def file_name(text: str) -> str:
    """A name that any file system takes, different for different texts."""
    plain = re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-").lower()[:60]
    if plain == text.lower():
        return plain
    return f"{plain}-{hashlib.sha256(text.encode('utf-8', 'replace')).hexdigest()[:6]}".strip("-")
