"""Accuracy, error and macro-F1 of a classifier, from its confusion matrix; and the classifier that a method is."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from plpp_reg.engine.distributed import Ranks
from plpp_reg.engine.method import Batch, Method


class Classification:
    """Collects predictions batch by batch; all figures are percentages."""

    def __init__(self, num_classes: int) -> None:
        self.confusion = torch.zeros(num_classes, num_classes, dtype=torch.long)  # [truth, prediction]

    def process(self, logits: Tensor, label: Tensor) -> None:
        """logits (B, C), label (B,)."""
        pairs = label.cpu() * len(self.confusion) + logits.argmax(1).cpu()
        self.confusion += torch.bincount(pairs, minlength=self.confusion.numel()).view_as(self.confusion)

    def evaluate(self) -> dict[str, float]:
        """``accuracy``, ``error``, ``macro_f1``: the mean F1 over the classes that occur, as Dassl has it."""
        counts = self.confusion.double()
        hits, truths, predictions = counts.diagonal(), counts.sum(1), counts.sum(0)
        accuracy = 100 * (hits.sum() / counts.sum()).item()
        f1 = 2 * hits / (truths + predictions).clamp_min(1)
        return {"accuracy": accuracy, "error": 100 - accuracy, "macro_f1": 100 * f1[truths > 0].mean().item()}

    def confusion_shares(self) -> Tensor:
        """(C, C): of each class's images the share that each prediction got, as Dassl saves it."""
        return self.confusion / self.confusion.sum(1, keepdim=True).clamp_min(1)

    def report(self) -> list[str]:
        """Dassl's lines."""
        result = self.evaluate()
        return [
            "=> result",
            f"* total: {int(self.confusion.sum()):,}",
            f"* correct: {int(self.confusion.diagonal().sum()):,}",
            f"* accuracy: {result['accuracy']:.1f}%",
            f"* error: {result['error']:.1f}%",
            f"* macro_f1: {result['macro_f1']:.1f}%",
        ]

    def per_class_report(self, classnames: list[str]) -> list[str]:
        lines, accuracies = ["=> per-class result"], []
        for label, name in enumerate(classnames):
            total, correct = int(self.confusion[label].sum()), int(self.confusion[label, label])
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
            evaluator.process(classifier(batch), batch["label"])
    evaluator.confusion = ranks.total(evaluator.confusion)
    return evaluator
