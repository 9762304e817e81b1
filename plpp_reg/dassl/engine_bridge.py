"""This package's trainers in a Dassl checkout that has none of that name: our engine on the host's data and configuration."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

from plpp_reg.errors import InputError
from plpp_reg.loss import SUFFIX


@functools.cache
def our_names() -> tuple[str, ...]:
    """Every name of ours; none where what our engine needs is not installed."""
    try:
        from plpp_reg.engine.registry import trainer_names

        return tuple(trainer_names())
    except ImportError:
        return ()


def our_nodes() -> dict[str, dict[str, object]]:
    """The defaults of our methods below TRAINER, so that their configuration files merge."""
    try:
        from plpp_reg.engine.registry import config_nodes

        return config_nodes()
    except ImportError:
        return {}


def teacher_node() -> dict[str, object]:
    """The defaults of the node that names a teacher."""
    try:
        from plpp_reg.engine.config import DEFAULTS

        return dict(DEFAULTS["TEACHER"])
    except ImportError:
        return {}


def our_trainer(name: str) -> type:
    """A class that a Dassl script can use: ``cls(cfg)``, ``train()``, ``test()``, ``load_model(directory, epoch)``."""
    return type(name, (OurTrainer,), {"__doc__": f"plpp-reg's {name} on the host's data."})


def split_of(cfg: Any) -> Any:
    """What Dassl's registry gives for ``cfg.DATASET``, sampled by its own code, as our engine takes it."""
    from plpp_reg.data import DataSplit, Datum

    from dassl.data.datasets import build_dataset

    dataset, root = build_dataset(cfg), os.path.abspath(os.path.expanduser(cfg.DATASET.ROOT))

    def items(part: Any) -> list[Any]:
        return [
            Datum(d.impath, d.label, d.classname, Path(os.path.relpath(os.path.abspath(d.impath), root)).as_posix())
            for d in part or []
        ]

    classnames = {d.label: d.classname for d in dataset.train_x}
    ordered = [classnames[label] for label in sorted(classnames)]
    if sorted(classnames) != list(range(len(ordered))):
        raise InputError(
            f"data set {cfg.DATASET.NAME!r}: expected training images of every label from 0, got {sorted(classnames)}"
        )
    return DataSplit(items(dataset.train_x), items(dataset.val), items(dataset.test), ordered)


class OurTrainer:
    """One run of our engine behind the face of a Dassl trainer."""

    def __init__(self, cfg: Any) -> None:
        from plpp_reg.engine import config, registry
        from plpp_reg.engine.log import RunLog
        from plpp_reg.engine.trainer import Trainer

        enabled = "PLPP" in cfg.TRAINER and cfg.TRAINER.PLPP.ENABLED
        plain = type(self).__name__.removesuffix(SUFFIX)
        cls, plain, with_plpp = registry.find_trainer(plain + SUFFIX if enabled else type(self).__name__)
        self.cfg = config.get_cfg_default(cls)
        known = config.flat(self.cfg)
        for key, value in config.flat(cfg).items():
            if key in known:
                config.set_value(self.cfg, key, value)
        self.cfg.TRAINER.PLPP.ENABLED = with_plpp
        self.cfg.TRAINER.NAME = plain + (SUFFIX if with_plpp else "")
        self.trainer = Trainer(cls, self.cfg, data=split_of(cfg), log=RunLog())

    def train(self) -> None:
        """Train, test and write the record into OUTPUT_DIR; what a run there or in RESUME has done is not done again."""
        from plpp_reg.engine import config
        from plpp_reg.engine.learned import in_words, learned
        from plpp_reg.engine.run import output_dir, record, train_and_test
        from plpp_reg.io.files import locked, write_text
        from plpp_reg.results.record import write_result

        trainer, folder = self.trainer, output_dir(self.cfg, eval_only=False)
        with locked(folder):
            trainer.saving.output_dir = folder
            write_text(folder / "config.yaml", config.to_yaml(self.cfg))
            before = in_words(trainer.method)
            trainer.saving.resume(self.cfg.RESUME or folder)
            tested = train_and_test(trainer, folder)
            trainer.log(f"Result: {write_result(folder, record(trainer, tested, learned(before, trainer.method)))}")

    def test(self) -> float:
        return self.trainer.test(self.cfg.TEST.SPLIT)["accuracy"]

    def load_model(self, directory: str, epoch: int | None = None) -> None:
        if directory:
            self.trainer.saving.load_model(directory, epoch)
