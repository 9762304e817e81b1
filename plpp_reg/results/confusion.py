"""The confusion matrix: how many images of each class were called what, as a table and as a picture."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from plpp_reg.results import style

NAMED = 60  # classes: of more, the picture has no names
COUNTED = 25  # classes: of more, the picture has no numbers


def to_csv(counts: Sequence[Sequence[int]], names: Sequence[str]) -> str:
    """A row a class, a column a prediction, both by name."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["class \\ predicted", *names])
    writer.writerows([name, *row] for name, row in zip(names, counts, strict=True))
    return buffer.getvalue()


def picture(counts: Sequence[Sequence[int]], names: Sequence[str], title: str) -> bytes:
    """A PNG: the darker, the larger the share of the row's class."""
    classes = len(names)
    named = classes <= NAMED
    side = 2.2 + (0.28 * classes if classes <= COUNTED else 0.16 * classes if named else 6)
    totals = [max(1, sum(row)) for row in counts]
    shares = [[count / total for count in row] for row, total in zip(counts, totals, strict=True)]
    with style.settings():
        figure = style.figure(side, side)
        axes = figure.subplots()
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
        if named:
            labels = [style.readable(name, 30) for name in names]
            axes.set_xticks(range(classes), labels, rotation=90)
            axes.set_yticks(range(classes), labels)
        if classes <= COUNTED:
            for i, row in enumerate(counts):
                for j, count in enumerate(row):
                    if count:
                        colour = "white" if shares[i][j] > 0.6 else style.LIGHT["ink"]
                        axes.text(j, i, str(count), ha="center", va="center", fontsize=7, color=colour)
        axes.set_xlabel("predicted")
        axes.set_ylabel("class")
        style.finish(figure)
        return style.png(figure, title)
