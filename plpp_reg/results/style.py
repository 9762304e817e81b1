"""The look of every figure: colours, sizes, how a PNG is written. Nothing global of matplotlib is changed.

Text is never read as mathematics: names of runs and classes are anybody's.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from typing import Any

LIGHT = {"ink": "#1b1f24", "grid": "#c9ced4"}
DARK = {"ink": "#e4e7eb", "grid": "#454b54"}
SERIES = ("#1f5fa8", "#c2410c", "#15803d", "#7e3aa8", "#7a5200", "#be185d", "#0f6f7a", "#566b00")  # 4.5 : 1 on white
SERIES_DARK = ("#6fb1ff", "#ff9257", "#4ecb7d", "#c79bff", "#d9b35c", "#ff8cc0", "#4fd0df", "#b3cf45")  # 7 : 1 on #14171a
LIGHT |= {f"s{i}": colour for i, colour in enumerate(SERIES)}
DARK |= {f"s{i}": colour for i, colour in enumerate(SERIES_DARK)}
MARKERS = "os^Dv<>P"
SETTINGS = {"font.size": 9, "legend.fontsize": 8.5, "svg.fonttype": "none", "text.parse_math": False}
LONGEST = 44  # characters of a name in a figure


def readable(text: str, longest: int = LONGEST) -> str:
    """A name without what XML or a font cannot have, cut short in the middle."""
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    return text if len(text) <= longest else f"{text[: longest // 2]}…{text[-(longest // 2 - 1) :]}"


def label(text: str) -> str:
    """A name as a legend has it: matplotlib hides what begins with an underscore."""
    text = readable(text)
    return f"\u200b{text}" if text.startswith("_") else text


@contextlib.contextmanager
def settings(**more: Any) -> Iterator[None]:
    """matplotlib's settings while a figure is made and written."""
    import matplotlib

    with matplotlib.rc_context({**SETTINGS, **more}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the browser has more fonts
        yield


def figure(width: float, height: float) -> Any:
    """Inches. Without pyplot: no window, nothing global."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def logarithmic(axes: Any) -> None:
    """Set the y axis to powers of ten, with its numbers written out: matplotlib's own labels are mathematics."""
    from matplotlib.ticker import LogFormatter

    class Numbers(LogFormatter):
        def __call__(self, x: float, pos: int | None = None) -> str:
            return (f"{x:,.0f}" if x >= 1 else f"{x:g}") if super().__call__(x, pos) else ""

    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(Numbers())
    axes.yaxis.set_minor_formatter(Numbers())


def finish(made: Any) -> None:
    """The axes' frames and letters."""
    for axes in made.axes:
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["bottom", "left"]].set_color(LIGHT["ink"])
        axes.tick_params(colors=LIGHT["ink"], which="both", labelcolor=LIGHT["ink"])
        for text in (axes.xaxis.label, axes.yaxis.label, axes.title):
            text.set_color(LIGHT["ink"])
    for legend in made.legends:
        for text in legend.get_texts():
            text.set_color(LIGHT["ink"])


def png(made: Any, title: str = "", dpi: int = 160) -> bytes:
    """A finished figure on white; the same figure is the same bytes."""
    buffer = io.BytesIO()
    if title:
        made.suptitle(readable(title, 60), fontsize=10, color=LIGHT["ink"])
    made.savefig(buffer, format="png", dpi=dpi, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()
