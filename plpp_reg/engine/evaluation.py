"""Accuracy, error and macro-F1 of a classifier, from its confusion matrix; and a trainer's test on a part of its data."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from plpp_reg.io.files import write_atomically

if TYPE_CHECKING:
    from plpp_reg.engine.trainer import PromptTrainer


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


@torch.no_grad()
def evaluate(trainer: PromptTrainer, split: str) -> dict[str, float]:
    """The figures of :meth:`Classification.evaluate` on a part of the trainer's data, over all ranks; logged, and with
    TEST.COMPUTE_CMAT written into its folder."""
    cfg, log, classnames = trainer.cfg, trainer.log, trainer.data.classnames
    log(f"Evaluate on the *{split}* set")
    evaluator = Classification(len(classnames))
    with trainer.computing():
        trainer.prepare_inference()
        for batch in log.progress(trainer.batches(split), split, total=len(trainer.loader(split))):
            evaluator.process(trainer.inference(batch), batch["label"])
    evaluator.confusion = trainer.ranks.total(evaluator.confusion)
    for line in evaluator.report():
        log(line)
    if cfg.TEST.PER_CLASS_RESULT:
        for line in evaluator.per_class_report(classnames):
            log(line)
    if cfg.TEST.COMPUTE_CMAT and trainer.output_dir:
        write_atomically(trainer.output_dir / "cmat.pt", lambda path: torch.save(evaluator.confusion_shares(), path))
    result = evaluator.evaluate()
    for name, value in result.items():
        log.scalar(f"{split}/{name}", value, trainer.epoch)
    return result
