"""What runs did over their epochs, and the words near to what they learned."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from plpp_reg.errors import InputError
from plpp_reg.results import plots
from plpp_reg.results.job import shots_text
from plpp_reg.results.learned import Learned, Prompts
from plpp_reg.results.numbers import magnitude
from plpp_reg.results.plots import Level, Line, Picture, Style, file_name
from plpp_reg.results.record import is_number
from plpp_reg.results.report.grids import plain_forms
from plpp_reg.results.report.runs import Run, pairs_of, zero_shot_of
from plpp_reg.results.tables.rows import method_order, title_of
from plpp_reg.results.tables.settings import Name

ACCURACIES = {"val_accuracy": "validation accuracy", "acc": "accuracy on the training batches"}
NOT_A_LOSS = ("lr", "loss", "perplexity", "perplexity_now", *ACCURACIES)  # what a history holds beside the terms of the loss


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
        most = _most_shots(of_dataset)
        histories: dict[Name, list[list[dict[str, float]]]] = {}
        ends: dict[Name, list[tuple[int, float, float]]] = {}
        without = []
        for run in of_dataset:
            if run.shots != most or not _learns(run):
                continue
            try:
                epochs, why = learned.history(run.found), "no figures of its epochs"
            except InputError as e:
                epochs, why = [], str(e)
            if epochs:
                histories.setdefault(run.method, []).append(epochs)
                ends.setdefault(run.method, []).extend(_perplexities(run, len(epochs)))
            elif run.found.note or (run.found.place / "few_shot.json").is_file():
                without.append(f"{run.method}, seed {run.seed}: {why}")
        title = title_of(dataset) + (f", {shots_text(most)}" if most > 0 else "")
        drawing = Drawing(title, name, histories, ends, pairs, zero_shot_of(of_dataset))
        pictures = drawing.pictures() if histories else []
        if pictures or without:
            parts.append(Training(title, pictures, without))
    return parts


def _learns(run: Run) -> bool:
    """Whether it trained: no zero-shot run of a protocol, no test."""
    return run.found.note.get("learns") is not False and not run.found.result.get("tested")


def _most_shots(runs: Sequence[Run]) -> int:
    """Of those that trained; all images are more than any number."""
    return max((run.shots for run in runs if _learns(run)), key=lambda shots: (shots < 1, shots), default=-1)


def _perplexities(run: Run, epochs: int) -> list[tuple[int, float, float]]:
    """Epochs, and the perplexity before and after them, where the record says it."""
    learned = run.found.result.get("learned")
    each = [learned.get(when) for when in ("before", "after")] if isinstance(learned, dict) else []
    found = [told.get("perplexity") for told in each if isinstance(told, dict)]
    return [(epochs, *found)] if len(found) == 2 and all(is_number(value) and value > 0 for value in found) else []


class Drawing(NamedTuple):
    """The curves of one data set.

    ``histories``: of each method its runs' epochs; ``ends``: the perplexities before and after, of :func:`_perplexities`;
    ``zero_shot``: CLIP's own accuracy.
    """

    title: str
    name: str
    histories: Mapping[Name, list[list[dict[str, float]]]]
    ends: Mapping[Name, list[tuple[int, float, float]]]
    pairs: Collection[tuple[Name, Name]]
    zero_shot: float | None

    def pictures(self) -> list[Picture]:
        """Perplexity, accuracies, each term of the losses, and their sum for methods that have the same terms."""
        keys = dict.fromkeys(key for runs in self.histories.values() for epochs in runs for epoch in epochs for key in epoch)
        drawn = [self.curves("perplexity", "perplexity of the context", [*self.lines("perplexity"), *self.measured()])]
        level = None if self.zero_shot is None else Level("zero-shot, test", self.zero_shot)
        drawn += [self.curves(key, what, self.lines(key), level) for key, what in ACCURACIES.items() if key in keys]
        drawn += [self.curves(key, f"loss {key}", self.lines(key)) for key in keys if key not in NOT_A_LOSS]
        for terms, methods in self.by_terms().items():
            if len(terms) > 1:
                what = f"sum of {' + '.join(terms)}"
                drawn.append(self.curves("loss-" + "-".join(terms), what, self.lines("loss", methods)))
        return [picture for picture in drawn if picture is not None]

    @property
    def styles(self) -> dict[Name, Style]:
        methods = method_order(self.histories)
        return plots.styles(methods, plain_forms(methods, self.pairs))

    def by_terms(self) -> dict[tuple[str, ...], list[Name]]:
        """The methods whose losses have the same terms: their sums are of one kind."""
        found: dict[tuple[str, ...], list[Name]] = {}
        for method in method_order(self.histories):
            each = (key for epochs in self.histories[method] for epoch in epochs for key in epoch)
            found.setdefault(tuple(dict.fromkeys(key for key in each if key not in NOT_A_LOSS)), []).append(method)
        return found

    def lines(self, key: str, methods: Sequence[Name] = ()) -> list[Line]:
        """Of each method that has it, its mean over seeds and the span from the smallest to the largest."""
        lines = []
        for method in methods or method_order(self.histories):
            by_epoch: dict[int, list[float]] = {}
            for epochs in self.histories[method]:
                for number, epoch in enumerate(epochs, start=1):
                    if key in epoch and (key != "perplexity" or epoch[key] > 0):
                        by_epoch.setdefault(number, []).append(epoch[key])
            if by_epoch:
                lines.append(self.line(str(method), method, by_epoch))
        return lines

    def measured(self) -> list[Line]:
        """Of each method that does not log its perplexity, that before and after: two points."""
        logging = {line.label for line in self.lines("perplexity")}
        lines = []
        for method in method_order(self.histories):
            if self.ends.get(method) and str(method) not in logging:
                last = max(epochs for epochs, *_ in self.ends[method])
                each = {0: [before for _, before, _ in self.ends[method]], last: [after for *_, after in self.ends[method]]}
                lines.append(self.line(f"{method} (before, after)", method, each))
        return lines

    def line(self, label: str, method: Name, by_epoch: Mapping[int, list[float]]) -> Line:
        """A curve of a method."""
        each = list(by_epoch.values())
        return Line(label, self.styles[method], list(by_epoch), _means(each), list(map(min, each)), list(map(max, each)))

    def curves(self, key: str, what: str, lines: Sequence[Line], level: Level | None = None) -> Picture | None:
        """One picture; None of no lines."""
        if not lines:
            return None
        said = [f"{x.label}: from {magnitude(x.y[0])} to {magnitude(x.y[-1])} in {x.x[-1]} epochs" for x in lines]
        said += [] if level is None else [f"{level.label}: {magnitude(level.value)}"]
        alt = f"{self.title}: {what} over epochs. {'. '.join(said)}."
        name = f"{self.name}-{file_name(self.title)}-{file_name(key)}"
        axis = "perplexity" if key == "perplexity" else "percent" if key in ACCURACIES else "mean of the epoch"
        title = f"{self.title}: {what}"
        return plots.curves(name, title, alt, lines, "epoch", axis, log_y=key == "perplexity", level=level)


def _means(each: Iterable[Sequence[float]]) -> list[float]:
    return [statistics.fmean(values) for values in each]


def words(runs: Sequence[Run], learned: Learned) -> list[tuple[str, list[Words]]]:
    """By data set, of each method the run with the lowest seed, at the most shots."""
    parts = []
    for dataset, of_dataset in _grouped(runs, lambda run: run.dataset).items():
        most = _most_shots(of_dataset)
        shown = []
        trained = [run for run in of_dataset if run.shots == most and _learns(run)]
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
