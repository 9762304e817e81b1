"""Runs as a table finds them: what each leaves in its folder."""

from __future__ import annotations

import json
from pathlib import Path

FORMS = {"base_to_new": "halves", "few_shot": "shots", "cross_dataset": "targets", "domain_generalization": "targets"}


def record(
    place: Path, method: str, seed: int, accuracies: dict[str, float], dataset: str = "dtd", *, protocol: str = "base_to_new",
    shots: int = 16, backbone: str = "ViT-B/16", variant: str = "", finished: bool = True,
    config: dict[str, object] | None = None,
) -> Path:  # fmt: skip
    """What a run leaves behind, as far as a table reads it; the first accuracy is of the test on the run's own data."""
    first, *others = accuracies
    note = {
        "name": protocol, "table": FORMS[protocol], "dataset": dataset, "shots": shots, "method": method, "variant": variant,
        "backbone": backbone, "learns": not method.startswith("Zeroshot"), "test": first, "tests": {o: {} for o in others},
        "seed": seed, "key": "0",
    }  # fmt: skip
    folder = place / protocol / dataset / f"shots{shots}" / f"{method}{variant}" / f"seed{seed}"
    folder.mkdir(parents=True)
    (folder / "job.json").write_text(json.dumps(note))
    result = {
        "config": config or {}, "files_sha256": "", "metrics": {"accuracy": accuracies[first]}, "protocol": note,
        "tests": {o: {"metrics": {"accuracy": accuracies[o]}, "files_sha256": ""} for o in others},
    }  # fmt: skip
    if finished:
        (folder / "result.json").write_text(json.dumps(result))
    return folder
