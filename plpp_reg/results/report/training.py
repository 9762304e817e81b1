"""What runs did over their epochs, and the words near to what they learned."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from plpp_reg.errors import InputError
from plpp_reg.results import plots
from plpp_reg.results.job import shots_text
from plpp_reg.results.learned import Learned, Prompts
from plpp_reg.results.plots import Line, Picture, file_name
from plpp_reg.results.report.grids import plain_forms
from plpp_reg.results.report.runs import Run, pairs_of
from plpp_reg.results.tables.rows import method_order, title_of

NOT_A_LOSS = ("lr", "acc", "perplexity")  # what a history holds beside losses


class Training(NamedTuple):
    """What the runs of one data set did over their epochs, and what is not known of it."""

    title: str
    pictures: list[Picture]
    without: list[str]


class Words(NamedTuple):
    """The nearest words of one run's prompts: a row a context vector, or why they cannot be read."""

    label: str
    prompts: Prompts | None
    why: str = ""


def training(runs: Sequence[Run], name: str, learned: Learned) -> list[Training]:
    """Perplexity and every loss over epochs, a part a data set, at the most shots that it was run with."""
    parts = []
    pairs = pairs_of(runs)
    for dataset, of_dataset in _grouped(runs, lambda run: run.dataset).items():
        most = max(run.shots for run in of_dataset)
        histories: dict[str, list[list[dict[str, float]]]] = {}
        without = []
        for run in of_dataset:
            if run.shots != most or run.found.note.get("learns") is False:
                continue
            try:
                epochs, why = learned.history(run.found), "no figures of its epochs"
            except InputError as e:
                epochs, why = [], str(e)
            if epochs:
                histories.setdefault(run.method, []).append(epochs)
            elif run.found.note or (run.found.place / "few_shot.json").is_file():
                without.append(f"{run.method}, seed {run.seed}: {why}")
        title = title_of(dataset) + (f", {shots_text(most)}" if most > 0 else "")
        pictures = _history_curves(histories, title, name, pairs) if histories else []
        if pictures or without:
            parts.append(Training(title, pictures, without))
    return parts


def _history_curves(
    histories: Mapping[str, list[list[dict[str, float]]]], title: str, name: str, pairs: Collection[tuple[str, str]]
) -> list[Picture]:
    methods = method_order(histories)
    style = plots.styles(methods, plain_forms(methods, pairs))
    names = dict.fromkeys(key for method in methods for epochs in histories[method] for epoch in epochs for key in epoch)
    wanted = [*(key for key in ("perplexity", "loss") if key in names), *(k for k in names if k not in (*NOT_A_LOSS, "loss"))]
    pictures = []
    for key in wanted:
        lines = []
        for method in methods:
            by_epoch: dict[int, list[float]] = {}
            for epochs in histories[method]:
                for number, epoch in enumerate(epochs, start=1):
                    if key in epoch and (key != "perplexity" or epoch[key] > 0):
                        by_epoch.setdefault(number, []).append(epoch[key])
            if by_epoch:
                x, each = list(by_epoch), list(by_epoch.values())
                lines.append(Line(str(method), style[method], x, _means(each), list(map(min, each)), list(map(max, each))))
        if lines:
            what = (
                "perplexity of the context" if key == "perplexity" else "sum of the losses" if key == "loss" else f"loss {key}"
            )
            said = [f"{line.label}: from {line.y[0]:.4g} to {line.y[-1]:.4g} in {line.x[-1]} epochs" for line in lines]
            alt = f"{title}: {what} over epochs. {'. '.join(said)}."
            picture_name = f"{name}-{file_name(title)}-{file_name(key)}"
            axis = "perplexity" if key == "perplexity" else "mean of the epoch"
            log_y = key == "perplexity"
            pictures.append(plots.curves(picture_name, f"{title}: {what}", alt, lines, "epoch", axis, log_y=log_y))
    return pictures


def _means(each: Iterable[Sequence[float]]) -> list[float]:
    return [statistics.fmean(values) for values in each]


def words(runs: Sequence[Run], learned: Learned) -> list[tuple[str, list[Words]]]:
    """By data set, of each method the run with the lowest seed, at the most shots."""
    parts = []
    for dataset, of_dataset in _grouped(runs, lambda run: run.dataset).items():
        most = max(run.shots for run in of_dataset)
        shown = []
        trained = [run for run in of_dataset if run.shots == most and run.found.note.get("learns") is not False]
        for method, of_method in _grouped(trained, lambda run: run.method).items():
            run = min(of_method, key=lambda run: run.seed)
            label = f"{method}, seed {run.seed}"
            try:
                shown.append(Words(label, learned.prompts(run.found)))
            except InputError as e:
                shown.append(Words(label, None, str(e)))
            except Exception as e:  # a file that nobody foresaw loses its words, not the page
                shown.append(Words(label, None, f"{type(e).__name__}: {e}"))
        if shown:
            parts.append((title_of(dataset) + (f", {shots_text(most)}" if most > 0 else ""), shown))
    return parts


def _grouped(runs: Iterable[Run], key: Callable[[Run], str]) -> dict[str, list[Run]]:
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(key(run), []).append(run)
    return groups
