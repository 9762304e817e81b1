"""``plpp inspect``: what the context vectors of a run or a checkpoint, ours or upstream's, say in words."""

from __future__ import annotations

import json
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from plpp_reg.clip.reading import Reading, Typical, Vector, Vocabulary
from plpp_reg.engine import checkpoint
from plpp_reg.errors import InputError, unknown
from plpp_reg.io.files import write_atomically
from plpp_reg.prompts import contexts
from plpp_reg.prompts.contexts import OurRun, Upstream
from plpp_reg.results import style

NARROWEST = 80  # columns of a terminal
READ_WITH = {
    "preceding": "Perplexity and what the LM head expects are of the state before each vector.",
    "own": "Perplexity and what the LM head expects are of the state at each vector itself.",
}
NO_BREAK = "\N{NO-BREAK SPACE}"  # between a word and its figure, which stay on one line


class Inspection(NamedTuple):
    """What :func:`inspect_prompts` found.

    ``states``: which of the text tower's states the vectors were read with, the "preceding" ones or their "own", as in
    training. ``epochs`` has the perplexity of each checkpoint that is there, 0: before training; ``logged`` the training's own
    mean of each epoch.
    """

    source: str
    trainer: str
    backbone: str
    epoch: int
    states: str
    typical: Typical
    before: Reading | None
    after: Reading
    epochs: dict[int, float]
    logged: dict[int, float]


def inspect_prompts(
    source: str | Path,
    backbone: str = "",
    epoch: int | None = None,
    position: str = "end",
    init: str = "",
    k: int = 5,
    trainer: str = "",
) -> Inspection:
    """Read a run's folder or a checkpoint file. Nothing in it is run: ``weights_only``.

    Args:
        source: a run's folder, the model folder in it, or a ``model.pth.tar-<n>``.
        backbone: the CLIP that the prompts were trained on; a run of ours knows it.
        epoch: of several checkpoints; None: the newest.
        position: where the class name stands, for a checkpoint of upstream's, which does not say.
        init: the words that the context began with, for the same reason; empty: unknown.
        k: how many words.
        trainer: of a run whose trainer is not one of ours, package.module:Class, which is imported.

    Raises:
        InputError: no such file, no context in it, a backbone that does not fit.
    """
    if k < 1:
        raise InputError(f"--words: expected an integer >= 1, got {k}")
    path = find_checkpoint(Path(source), epoch)
    content = checkpoint.load(path)
    run = path.parent.parent
    prompts: OurRun | Upstream
    if isinstance(content.get("plpp_reg"), dict) and (run / "config.yaml").is_file():
        cfg, cls = contexts.of_run(run, trainer)
        cfg.MODEL.BACKBONE.NAME = backbone or cfg.MODEL.BACKBONE.NAME
        prompts = OurRun(cfg, cls, content, path)
    else:
        prompts = Upstream(content, path, backbone, position, init)
    words = Vocabulary(prompts.clip_model, k)
    before = prompts.before()
    first = None if before is None else words.read(before)
    after = words.read(prompts.at(content, path))
    epochs = {} if first is None else {0: first.perplexity}
    for other in _siblings(path):
        number = int(other.name.rsplit("-", 1)[1])
        epochs[number] = after.perplexity if other == path else words.perplexity(prompts.at(checkpoint.load(other), other))
    epochs.setdefault(content["epoch"], after.perplexity)
    return Inspection(
        str(source),
        prompts.trainer,
        prompts.backbone,
        content["epoch"],
        prompts.states,
        words.typical,
        first,
        after,
        epochs,
        prompts.logged(content, path),
    )


def find_checkpoint(source: Path, epoch: int | None = None) -> Path:
    """The file that is meant."""
    if source.is_file():
        return source
    if not source.is_dir():
        raise InputError(f"{str(source)!r}: expected a run's folder or a checkpoint, there is nothing")
    folders = [source] if _numbered(source) else [f for f in sorted(source.iterdir()) if f.is_dir() and _numbered(f)]
    if len(folders) != 1:
        found = f"found {', '.join(f.name for f in folders)}: name one" if folders else "found none"
        raise InputError(f"{str(source)!r}: looked for model.pth.tar-<epoch> in it and in its folders, {found}")
    files = _numbered(folders[0])
    if epoch is None:
        return checkpoint.newest(folders[0]) or files[max(files)]
    if epoch not in files:
        raise unknown("epoch", str(epoch), map(str, files))
    return files[epoch]


def _numbered(folder: Path) -> dict[int, Path]:
    found = {p: checkpoint.NUMBERED.fullmatch(p.name) for p in folder.iterdir()}
    return dict(sorted((int(match.group(1)), p) for p, match in found.items() if match))


def _siblings(path: Path) -> Iterator[Path]:
    yield from _numbered(path.parent).values() if checkpoint.NUMBERED.fullmatch(path.name) else ()


# ---- telling it ------------------------------------------------------------------------------------------------------


def as_json(found: Inspection) -> str:
    """Everything, every prompt; NaN and infinity never occur."""

    def reading(r: Reading | None) -> dict[str, Any] | None:
        if r is None:
            return None
        vectors = [
            {
                **v._asdict(),
                "nearest": [w._asdict() for w in v.nearest],
                "expected": [{"word": word, "probability": p} for word, p in v.expected],
            }
            for v in r.vectors
        ]
        return {"perplexity": r.perplexity, "vectors": vectors}

    low, median, high = found.typical.cosines
    typical = {"cosine_to_nearest_other_word": {"5%": low, "50%": median, "95%": high}, "norm": found.typical.norm}
    plain = {**found._asdict(), "typical": typical, "before": reading(found.before), "after": reading(found.after)}
    return json.dumps(plain, indent=2, ensure_ascii=False)


def as_text(found: Inspection, width: int | None = None) -> str:
    """A table a time, at most ``width`` columns wide (None: the terminal's, 80 at least); of several prompts the first."""
    width = max(NARROWEST, width or shutil.get_terminal_size().columns)
    low, median, high = found.typical.cosines
    lines = [
        f"{found.source}: {found.trainer} on {found.backbone}, epoch {found.epoch}",
        *_wrapped(
            f"Words lie {median:.2f} (cosine; 5% to 95%: {low:.2f} to {high:.2f}) from their nearest other word; their norm is "
            f"{found.typical.norm:.2f}. {READ_WITH[found.states]}",
            width,
        ),
    ]
    for title, reading in (("Before training", found.before), ("After training", found.after)):
        if reading is None:
            lines.append(f"\n{title}: not in the file; name the words that it began with (--init).")
            continue
        lines.append(f"\n{title}: perplexity {reading.perplexity:,.1f}")
        lines += _table([v for v in reading.vectors if v.prompt == 0], width)
        if more := reading.vectors[-1].prompt:
            lines.append(f"(the first prompt; {more} more in --json)")
    lines += ["", *_wrapped('"nearer than": the share of words that lie less near to their nearest other word.', width)]
    if len(found.epochs) > 1:
        epochs = ", ".join(f"{e}:{NO_BREAK}{p:,.1f}" for e, p in sorted(found.epochs.items()))
        lines += _wrapped(f"Perplexity by epoch: {epochs}", width)
    return "\n".join(lines)


def _table(vectors: Sequence[Vector], width: int) -> list[str]:
    """A row a vector; where the rows are too long, a line for the nearest words, and one for the rest."""
    rows = [["", "nearest words (cosine)", "nearer than", "norm", "perplexity", "the LM head expects (probability)"]]
    for v in vectors:
        near = ", ".join(f"{w.word}{NO_BREAK}{w.cosine:.2f}" for w in v.nearest)
        words = ", ".join(f"{word}{NO_BREAK}{p:.2f}" for word, p in v.expected)
        rows.append([f"v_{v.position + 1}", near, f"{v.nearer_than:.0%}", f"{v.norm:.2f}", f"{v.perplexity:,.0f}", words])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    fits = sum(widths) + 2 * (len(widths) - 1) <= width
    lines = []
    for label, near, *figures, words in rows:
        start = label.ljust(widths[0]) + "  "
        aligned = "".join(figure.rjust(w) + "  " for figure, w in zip(figures, widths[2:5], strict=True))
        if fits:
            lines += _wrapped(words, width, start + near.ljust(widths[1]) + "  " + aligned)
        else:
            lines += [*_wrapped(near, width, start), *_wrapped(words, width, " " * len(start) + aligned)]
    return lines


def _wrapped(text: str, width: int, start: str = "") -> list[str]:
    """``text`` behind ``start``, its further lines below its first."""
    lines = textwrap.wrap(text, width, initial_indent=start, subsequent_indent=" " * len(start), break_on_hyphens=False)
    return [line.replace(NO_BREAK, " ") for line in lines]


def draw(found: Inspection, path: Path) -> None:
    """The perplexity over the epochs, as a PNG."""
    logged, measured = sorted(found.logged.items()), sorted(found.epochs.items())
    with style.settings():
        figure = style.figure(6, 4)
        axes = figure.subplots()
        if logged:
            axes.plot(*zip(*logged, strict=True), color=style.SERIES[0], linewidth=1.2, label="in training, epoch mean")
        axes.plot(*zip(*measured, strict=True), "o", color=style.SERIES[1], label="of the checkpoints (0: before)")
        style.logarithmic(axes)
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_ylabel("perplexity of the context vectors")
        axes.set_title(style.readable(f"{found.trainer} on {found.backbone}"))
        axes.legend(frameon=False)
        style.finish(figure)
        png = style.png(figure)
    write_atomically(path, lambda p: p.write_bytes(png))
