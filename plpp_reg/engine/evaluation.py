"""What a classifier predicts for a part's images and how good that is; and the classifier that a method is."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from plpp_reg.engine.distributed import Ranks
from plpp_reg.engine.method import Batch, Method


def calibration_error(confidence: Tensor, correct: Tensor, bins: int = 15) -> float:
    """The expected calibration error (arXiv 1706.04599): over bins of equal width, the mean of |accuracy - mean confidence|,
    weighted by the images in each; confidence and correct (N,). As torchmetrics has it, which takes seconds to import.
    """
    of_bin = (confidence.double() * bins).long()
    gaps = torch.zeros(bins + 1, dtype=torch.double).index_add_(0, of_bin, correct.double() - confidence.double())
    return gaps.abs().sum().item() / max(1, len(confidence))


class Classification:
    """Collects predictions batch by batch; all figures are percentages."""

    def __init__(self, num_classes: int) -> None:
        self.num_classes = num_classes
        self._rows: list[Tensor] = []
        self._seen = 0

    def process(self, logits: Tensor, label: Tensor, index: Tensor | None = None) -> None:
        """logits (B, C), label (B,), index (B,): of the images in their part; without it they are counted from 0."""
        if index is None:
            index = torch.arange(self._seen, self._seen + len(label), device=logits.device)
        guess, shares = logits.argmax(1), logits.float().softmax(1)
        label = label.to(logits.device)
        rows = [index.to(logits.device), label, guess, *(shares.gather(1, c[:, None])[:, 0] for c in (guess, label))]
        self._rows.append(torch.stack([row.double() for row in rows]).cpu())  # (5, B), in one transfer
        self._seen += len(label)
        self.__dict__.pop("table", None)

    def gather(self, ranks: Ranks) -> None:
        """Take over what the other ranks have collected, of other images."""
        if ranks.size > 1:
            mine = self.table
            whole = mine.new_zeros(len(mine), int(ranks.total(torch.tensor(self._seen))))
            whole[:, mine[0].long()] = mine
            self._rows, self._seen = [ranks.total(whole)], whole.shape[1]
            del self.table

    @functools.cached_property
    def table(self) -> Tensor:
        """(5, N) float64, by image: its index, label, prediction, and the probabilities of both, prediction first."""
        rows = torch.cat(self._rows, 1) if self._rows else torch.zeros(5, 0, dtype=torch.double)
        return rows[:, rows[0].argsort()]

    @property
    def label(self) -> Tensor:
        return self.table[1].long()

    @property
    def prediction(self) -> Tensor:
        return self.table[2].long()

    @property
    def correct(self) -> Tensor:
        """(N,) bool"""
        return self.label == self.prediction

    @property
    def confusion(self) -> Tensor:
        """(C, C) counts: [truth, prediction]."""
        pairs = self.label * self.num_classes + self.prediction
        return torch.bincount(pairs, minlength=self.num_classes**2).view(self.num_classes, self.num_classes)

    def evaluate(self) -> dict[str, float]:
        """``accuracy``, ``error``, ``macro_f1``: the mean F1 over the classes that occur, as Dassl has it; and
        ``calibration_error``, the mean distance of confidence and accuracy over bins of the confidence (arXiv 1706.04599)."""
        f1, support = (torch.tensor(self.per_class()[name], dtype=torch.double) for name in ("f1", "support"))
        accuracy = 100 * self.correct.double().mean().item()
        return {
            "accuracy": accuracy,
            "error": 100 - accuracy,
            "macro_f1": f1[support > 0].mean().item(),
            "calibration_error": 100 * calibration_error(self.table[3], self.correct),
        }

    def per_class(self) -> dict[str, list[float]]:
        """``recall``, ``precision``, ``f1`` of each class, 0 where there is nothing to divide by; ``support``: its images."""
        counts = self.confusion.double()
        hits, truths, predictions = counts.diagonal(), counts.sum(1), counts.sum(0)
        figures = {"recall": hits / truths, "precision": hits / predictions, "f1": 2 * hits / (truths + predictions)}
        shares = {name: (100 * share.nan_to_num(0.0)).tolist() for name, share in figures.items()}
        return {**shares, "support": truths.long().tolist()}

    def confusions(self) -> list[list[int]]:
        """[truth, prediction, how many images] of every mistake that was made."""
        counts = self.confusion
        return [[*pair, int(counts[tuple(pair)])] for pair in counts.nonzero().tolist() if pair[0] != pair[1]]

    def mistakes(self, most: int) -> list[tuple[int, int, int, float, float]]:
        """Index, label, prediction, and the probabilities of both, prediction first: of wrong images, the surest first."""
        wrong = self.table[:, ~self.correct]
        surest = wrong[:, wrong[3].argsort(descending=True, stable=True)[:most]]
        return [(int(i), int(truth), int(guess), p, q) for i, truth, guess, p, q in surest.t().tolist()]

    def report(self) -> list[str]:
        """Dassl's lines."""
        result = self.evaluate()
        return [
            "=> result",
            f"* total: {self._seen:,}",
            f"* correct: {int(self.correct.sum()):,}",
            f"* accuracy: {result['accuracy']:.1f}%",
            f"* error: {result['error']:.1f}%",
            f"* macro_f1: {result['macro_f1']:.1f}%",
        ]

    def per_class_report(self, classnames: list[str]) -> list[str]:
        lines, accuracies, confusion = ["=> per-class result"], [], self.confusion
        for label, name in enumerate(classnames):
            total, correct = int(confusion[label].sum()), int(confusion[label, label])
            if total:
                accuracies.append(100 * correct / total)
                lines.append(f"* class: {label} ({name})\ttotal: {total:,}\tcorrect: {correct:,}\tacc: {accuracies[-1]:.1f}%")
        return [*lines, f"* average: {sum(accuracies) / len(accuracies):.1f}%"]


class Classifier:
    """Logits of a method as it is; what is the same for every batch is computed once. To be called without gradients."""

    def __init__(self, method: Method) -> None:
        self.method = method
        self.classes = None if method.classes_depend_on_image else method.encode_classes()

    def __call__(self, batch: Batch) -> Tensor:
        """(B, C) of a batch's images."""
        if self.classes is not None:
            return self.method.logits(batch, self.classes)
        # every image has C features: as many images at once as leave them in a part of the memory bound
        clip = self.method.clip
        an_image = 4 * len(self.method.classnames) * clip.model.text_projection.shape[1]
        at_once = max(1, int(clip.text.memory_mib * 2**20 / 8 / an_image))
        count = len(next(iter(batch.values())))
        parts = [{name: t[i : i + at_once] for name, t in batch.items()} for i in range(0, count, at_once)]
        return torch.cat([self._conditional(part) for part in parts])

    def _conditional(self, batch: Batch) -> Tensor:
        return self.method.logits(batch, self.method.encode_classes(self.method.image_features(batch)))


@torch.no_grad()
def evaluate(method: Method, batches: Iterable[Batch], ranks: Ranks, computing: Callable[[], Any]) -> Classification:
    """What ``method`` predicts for the images of all ranks' ``batches``; ``computing`` is the precision's context."""
    evaluator = Classification(len(method.classnames))
    with computing():
        classifier = Classifier(method)
        for batch in batches:
            evaluator.process(classifier(batch), batch["label"], batch.get("index"))
    evaluator.gather(ranks)
    return evaluator
