"""One run, from arguments to result.json."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn
from yacs.config import CfgNode

from plpp_reg.data import DataSplit, short_name
from plpp_reg.data.contents import contents_sha256
from plpp_reg.data.loaders import load_data, part_of
from plpp_reg.engine import checkpoint, config, distributed
from plpp_reg.engine.arguments import RunArguments, further_config, resolve
from plpp_reg.engine.assessment import NOTHING, assess
from plpp_reg.engine.learned import in_words, learned
from plpp_reg.engine.log import RunLog
from plpp_reg.engine.taught import known_of
from plpp_reg.engine.trainer import Trainer
from plpp_reg.errors import InputError
from plpp_reg.io.files import clear_left_behind, locked, write_text
from plpp_reg.results import evaluation
from plpp_reg.results.record import FEW_SHOT, RESULT, versions, write_result

__all__ = [
    "FurtherTest",
    "RunArguments",
    "UnusableCheckpoint",
    "further_config",
    "output_dir",
    "parts_read",
    "pictures_sha256",
    "record",
    "resolve",
    "run",
    "test",
    "train_and_test",
]


def output_dir(cfg: CfgNode, eval_only: bool) -> Path:
    """Where a run writes: OUTPUT_DIR, else a folder that says what it is."""
    if cfg.OUTPUT_DIR:
        return Path(cfg.OUTPUT_DIR)
    parts = [short_name(cfg.DATASET.NAME)]
    if cfg.DATASET.SUBSAMPLE_CLASSES != "all":
        parts.append(cfg.DATASET.SUBSAMPLE_CLASSES)
    parts += [cfg.TRAINER.NAME.replace(":", "."), f"seed{cfg.SEED}"]
    return Path("output", *parts, *(["eval"] if eval_only else []))


class UnusableCheckpoint(InputError):
    """What lies in a run's own folder cannot be gone on from: cut short, or of other images or another device."""


class FurtherTest(NamedTuple):
    """The trained prompts on another data set, or on other classes of it."""

    name: str
    cfg: CfgNode
    data: DataSplit
    pictures_sha256: dict[str, str]


def run(
    args: RunArguments,
    log: RunLog | None = None,
    clip_model: nn.Module | None = None,
    after_epoch: Callable[[Trainer], None] | None = None,
    tests: Mapping[str, Sequence[str]] | None = None,
    note: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], Trainer]:
    """Train and test, or what the flags say. Everything that can be wrong is found before a folder is made.

    Args:
        args: what to do.
        log: where lines go.
        clip_model: a CLIP that is loaded already; it must be the one that ``args`` name.
        after_epoch: called with the trainer after each epoch.
        tests: what the trained prompts are tested on beside the run's own data: KEY VALUE pairs on top of the run's
            configuration, by name; ``result["tests"]`` holds the figures.
        note: recorded with the result as ``result["protocol"]``.

    Returns:
        What ``result.json`` holds (its ``metrics`` are empty where nothing was tested), and the trainer as it ended.
    """
    log = log or RunLog()
    if args.load_epoch is not None and not args.model_dir:
        raise InputError("--load-epoch: expected --model-dir with it")
    if args.model_dir and not args.eval_only:
        raise InputError("--model-dir: expected --eval-only with it (to go on: --resume; to start from it: MODEL.INIT_WEIGHTS)")
    cfg, cls = resolve(args)
    processes = distributed.start(cfg.USE_CUDA)
    cfg.SEED = processes.of_the_first(cfg.SEED)
    if not processes.first:
        log = RunLog(quiet=True)
    folder = output_dir(cfg, args.eval_only)
    if args.eval_only and (folder / cls.model_name).is_dir():
        raise InputError(f"{str(folder)!r} holds a training run, whose result would be lost: name another --output-dir")
    _check_folders(cfg, folder, cls.model_name)
    _check_places(folder, cls.model_name)
    log(f"Setting fixed seed: {cfg.SEED}")
    known = None
    if args.eval_only and args.model_dir and cls.predicts_by_teacher:
        known = known_of(checkpoint.load(checkpoint.find(args.model_dir, cls.model_name, args.load_epoch)))
    parts = parts_read(cfg, trains=not args.eval_only and cls.learns)
    trainer = Trainer(cls, cfg, data=load_data(cfg, "train" in parts), clip_model=clip_model, log=log, known=known)
    if not args.no_train:
        with trainer.state.phase("hashes of pictures"):
            trainer.pictures_sha256 = pictures_sha256(trainer.data, parts)
    if trainer.teacher is not None and not (args.eval_only or args.no_train):
        _check_teacher(trainer, tests or {})
    before = None if args.eval_only or args.no_train else in_words(trainer.method)
    loaded = None
    if args.eval_only:
        if args.model_dir:
            loaded = trainer.saving.load_model(args.model_dir, args.load_epoch)
        elif cls.learns:
            log("No --model-dir: evaluating the prompts as they are before training")
    elif cfg.RESUME and not checkpoint.newest(folder / cls.model_name) and not trainer.saving.resume(cfg.RESUME):
        raise InputError(f"--resume {cfg.RESUME!r}: expected a run's folder with a checkpoint of {cls.model_name}")
    for split in parts:
        trainer.loader(split)
    further = _further_tests(trainer, tests or {})
    with contextlib.ExitStack() as stack:
        # of several processes the first alone writes where it was told to
        place = folder if processes.first else Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stack.enter_context(locked(place))
        _check_folders(cfg, folder, cls.model_name)  # once more: another run may have come and gone while this one was loading
        _go_on(place, folder, trainer, args)
        _clear(place, trainer)
        log.open(place)
        stack.callback(log.close)
        return _run_in(place, folder, trainer, args, after_epoch, further, note, before, loaded), trainer


def parts_read(cfg: CfgNode, trains: bool) -> list[str]:
    """The parts of the data that a run reads: "train", "val", "test"."""
    parts = set() if cfg.TEST.NO_TEST else {cfg.TEST.SPLIT}
    if trains:
        parts |= {"train", "val"} if cfg.TEST.FINAL_MODEL == "best_val" else {"train"}
    return sorted(parts)


def pictures_sha256(data: DataSplit, parts: Iterable[str]) -> dict[str, str]:
    """:func:`plpp_reg.data.contents.contents_sha256` of these parts."""
    return {part: contents_sha256(getattr(data, part)) for part in parts}


def _further_tests(trainer: Trainer, tests: Mapping[str, Sequence[str]]) -> list[FurtherTest]:
    found = []
    for name, opts in tests.items():
        changed = further_config(trainer.cfg, opts)
        data = load_data(changed, trains=False)
        if list(data.classnames) != list(trainer.data.classnames):
            trainer.saving.check_classes(list(data.classnames))
        if trainer.method.splits_classes and trainer.ranks.size > len(data.classnames):
            raise InputError(
                f"data set {changed.DATASET.NAME!r}: expected at most a process a class ({len(data.classnames)}), "
                f"got {trainer.ranks.size} processes"
            )
        part_of(changed, data, changed.TEST.SPLIT)
        found.append(FurtherTest(name, changed, data, pictures_sha256(data, [changed.TEST.SPLIT])))
    return found


def _check_teacher(trainer: Trainer, tests: Mapping[str, Sequence[str]]) -> None:
    """Whether the teacher is there, speaks of these classes, and has not seen those that the protocol calls new."""
    subsamples = {further_config(trainer.cfg, opts).DATASET.SUBSAMPLE_CLASSES for opts in tests.values()}
    if trainer.cfg.DATASET.SUBSAMPLE_CLASSES == "base" or "new" in subsamples:
        every, new = (
            load_data(further_config(trainer.cfg, ("DATASET.SUBSAMPLE_CLASSES", classes)), trains=False).classnames
            for classes in ("all", "new")
        )
        trainer.teacher.check_unseen(new, every)
    label, shape = trainer.teacher.label, tuple(trainer.teacher.class_features.shape)
    trainer.log(f"Learning from {label}, whose class features are {shape}")
    cfg, encoders = trainer.cfg, trainer.method.inputs.of("train").values()
    size = tuple(trainer.teacher.encoder.input["SIZE"])
    if size != tuple(cfg.INPUT.SIZE) and "random_crop" in cfg.INPUT.TRANSFORMS:
        raise InputError(
            f"INPUT.TRANSFORMS: expected no random_crop, whose place depends on the size, with a teacher that sees {size}, got "
            f"{list(cfg.INPUT.TRANSFORMS)}"
        )
    widths = {json.dumps(encoder.described(), sort_keys=True): encoder.width for encoder in encoders}
    views = min(cfg.OPTIM.MAX_EPOCH, cfg.INPUT.VIEWS or cfg.OPTIM.MAX_EPOCH)
    gib = 4 * views * len(trainer.data.train) * sum(widths.values()) / 2**30
    if gib > cfg.FEATURES.MAX_GIB > 0:
        trainer.log(
            f"Features of {views} views are {gib:.1f} GiB, over FEATURES.MAX_GIB {cfg.FEATURES.MAX_GIB:g}: the image towers, "
            "the teacher's too, run on every image in every epoch; a smaller INPUT.VIEWS or a larger bound keeps them"
        )


def _test_further(folder: Path, trainer: Trainer, test: FurtherTest) -> dict[str, Any]:
    """The prompts that ``trainer`` has written, over another test's class names and images."""
    trainer.log(f"Test {test.name}:")
    same = {"clip_model": trainer.clip_model, "log": trainer.log}
    if trainer.method.predicts_by_teacher:
        same["known"] = trainer.teacher.heard()
    other = Trainer(type(trainer.method), test.cfg, data=test.data, **same)
    if other.method.learns:
        other.saving.load_model(folder)
    tested = assess(other, test.cfg.TEST.SPLIT)
    trainer.state.add(other.state.phases)
    return {
        "dataset": test.cfg.DATASET.NAME,
        "subsample": test.cfg.DATASET.SUBSAMPLE_CLASSES,
        "files_sha256": test.data.sha256(),
        "pictures_sha256": test.pictures_sha256,
        **tested,
    }


def _go_on(folder: Path, resumed: Path, trainer: Trainer, args: RunArguments) -> None:
    """Take up what lies in the run's folder. Nothing is written before that is found to be good.

    Raises:
        UnusableCheckpoint: it cannot be gone on from, and stays as it is; a result beside it too.
    """
    trainer.saving.output_dir = folder
    if args.eval_only or args.no_train:
        return
    if not (trainer.cfg.RESUME and trainer.state.epoch):  # that one is loaded
        try:
            trainer.saving.resume(resumed)
        except InputError as e:
            raise UnusableCheckpoint(str(e)) from e
    if not trainer.ranks.all_agree(trainer.ranks.of_the_first(trainer.state.epoch) == trainer.state.epoch):
        raise InputError("expected the same checkpoint on every process: is --output-dir on a disk that all of them share?")


def _clear(folder: Path, trainer: Trainer) -> None:
    """Remove what a killed process left in the run's folder: half-written files, and the checkpoint before the newest."""
    for left in (folder, trainer.saving.folder):
        clear_left_behind(left)
    if (there := folder / "config.yaml").is_file():
        frequency = config.from_yaml(there).get("TRAIN.CHECKPOINT_FREQ")  # as that process had it
        checkpoint.remove_previous(trainer.saving.folder, frequency if isinstance(frequency, int) else 0)


def _run_in(
    folder: Path,
    resumed: Path,
    trainer: Trainer,
    args: RunArguments,
    after_epoch: Callable[[Trainer], None] | None,
    further: Sequence[FurtherTest] = (),
    note: Mapping[str, Any] | None = None,
    before: dict[str, Any] | None = None,
    loaded: Path | None = None,
) -> dict[str, Any]:
    cfg, log = trainer.cfg, trainer.log
    if not args.eval_only:
        write_text(folder / "config.yaml", config.to_yaml(cfg))
        if args.no_train:
            return record(trainer)
        if cfg.DATASET.NUM_SHOTS > 0:
            write_text(folder / FEW_SHOT, trainer.data.sampled_json())
        model_name = trainer.method.model_name
        if cfg.RESUME and trainer.state.epoch and not checkpoint.newest(resumed / model_name):
            checkpoint.copy_best(Path(cfg.RESUME) / model_name, trainer.saving.folder)
        elif folder != resumed and (resumed / model_name).is_dir():
            shutil.copytree(resumed / model_name, trainer.saving.folder, dirs_exist_ok=True)
        tested = train_and_test(trainer, folder, after_epoch)
    else:
        tested = test(trainer)
    result = record(trainer, tested, learned(before, trainer.method))
    if further:
        result["tests"] = {test.name: _test_further(folder, trainer, test) for test in further}
    if note is not None:
        result["protocol"] = dict(note)
    if args.eval_only or not trainer.method.learns:  # what plpp predict goes by, where no checkpoint lies in the folder
        of = None if loaded is None else str(loaded.resolve())
        result["tested"] = {"checkpoint": of, "classnames": list(trainer.data.classnames)}
    if args.eval_only:
        write_text(folder / "config.yaml", config.to_yaml(cfg))
    path = write_result(folder, result)
    log(f"Result: {path}")
    if (found := evaluation.read(result)) is not None:
        for line in evaluation.summary_lines(cfg.TRAINER.NAME, cfg.TEST.SPLIT, found):
            log(line)
    return result


def train_and_test(trainer: Trainer, folder: Path, after_epoch: Callable[[Trainer], None] | None = None) -> dict[str, Any]:
    """What is left of the training, then the test of the model that TEST.FINAL_MODEL names."""
    trainer.train(folder, after_epoch)
    if trainer.cfg.TEST.FINAL_MODEL == "best_val" and trainer.state.best_val is not None:
        trainer.log("Deploy the model with the best val performance")
        trainer.saving.load_model(folder)
    else:
        trainer.log("Deploy the last-epoch model")
    return test(trainer)


def test(trainer: Trainer) -> dict[str, Any]:
    """The metrics and the evaluation on the part that TEST.SPLIT names; none where TEST.NO_TEST."""
    return NOTHING if trainer.cfg.TEST.NO_TEST else assess(trainer, trainer.cfg.TEST.SPLIT)


def record(trainer: Trainer, tested: Mapping[str, Any] = NOTHING, learned: dict[str, Any] | None = None) -> dict[str, Any]:
    """A run's figures in full precision, with everything that they depend on, and what its prompts became.

    In their last bits figures depend on threads and the processor too, which are not recorded. ``tested``: of :func:`test`.
    """
    cfg, state = trainer.cfg, trainer.state
    return {
        "trainer": cfg.TRAINER.NAME,
        "dataset": cfg.DATASET.NAME,
        "backbone": cfg.MODEL.BACKBONE.NAME,
        "seed": cfg.SEED,
        "metrics": tested["metrics"],
        "losses": {name: state.history[-1][name] for name in state.loss_names} if state.history else {},
        "history": state.history,
        "learned": learned,
        "seconds": state.seconds,
        "phases": state.phases,
        "config": config.flat(cfg),
        "versions": {**versions(), "device": trainer.device.type, "precision": trainer.precision},
        "files_sha256": trainer.data.sha256(),
        "pictures_sha256": trainer.pictures_sha256,
        "teacher": _taught_by(trainer),
        "few_shot_sha256": trainer.data.sampled_sha256() if cfg.DATASET.NUM_SHOTS > 0 else None,
        "evaluation": tested["evaluation"],
    }


def _taught_by(trainer: Trainer) -> dict[str, Any] | None:
    """Who taught what the figures are of: in this run, or by the checkpoint that was tested; of one that does not say, who is
    asked for its predictions."""
    teacher = trainer.teacher
    if teacher is None:
        return None
    if not trainer.state.history and trainer.saving.taught_by is not None:
        return trainer.saving.taught_by
    asked = trainer.method.predicts_by_teacher and teacher.known is None
    return teacher.identity if trainer.state.history or asked else None


def _check_places(folder: Path, model_name: str) -> None:
    """What would be in the way of a run's files: said before it trains, not after."""
    for name in ("config.yaml", "log.txt", FEW_SHOT, RESULT):
        if (folder / name).is_dir():
            raise InputError(f"{str(folder / name)!r}: expected a file or nothing, got a folder")
    for name in (model_name, "tensorboard"):
        if (folder / name).exists() and not (folder / name).is_dir():
            raise InputError(f"{str(folder / name)!r}: expected a folder or nothing, got a file")


def _check_folders(cfg: CfgNode, folder: Path, model_name: str) -> None:
    """A folder that holds another run is neither written over nor gone on from."""
    for flag, there in (("--resume", Path(cfg.RESUME)), ("--output-dir", folder)):
        if (flag == "--resume" and not cfg.RESUME) or not (there / "config.yaml").is_file():
            continue
        recorded = config.from_yaml(there / "config.yaml")
        changed = config.differences(recorded, config.flat(cfg))
        if changed:
            # what explains the rest comes first
            changed.sort(key=lambda line: not line.startswith(("MODEL.BACKBONE.NAME", "DATASET.NAME")))
            way_on = _way_on(recorded, cfg, there / model_name)
            more = f" and {len(changed) - 2} more" if len(changed) > 2 else ""
            raise InputError(f"{str(there)!r} holds another run ({'; '.join(changed[:2])}{more}): name another {flag}{way_on}")


def _way_on(recorded: Mapping[str, object], cfg: CfgNode, checkpoints: Path) -> str:
    """How a run is trained for more epochs than it was begun with: the schedule depends on their number, weights do not."""
    before, path = recorded.get("OPTIM.MAX_EPOCH"), checkpoint.newest(checkpoints)
    if not isinstance(before, int) or before >= cfg.OPTIM.MAX_EPOCH or path is None:
        return ""
    return (
        f"; its schedule ends after epoch {before}: MODEL.INIT_WEIGHTS {path} goes on from its prompts in another --output-dir"
    )
