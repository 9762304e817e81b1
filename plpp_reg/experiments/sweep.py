"""Running many runs: what is done is skipped, what failed is listed, what was killed goes on.

A run is :func:`execute`: a pure function of its job, in the job's own folder. :func:`sweep` gives the jobs that are left to a
``runner``, which may hand them to other processes or machines; :func:`one_after_another` runs them here.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import time
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn
from yacs.config import CfgNode

from plpp_reg.data.loaders import image_seed_of, load_data
from plpp_reg.engine import config
from plpp_reg.engine.log import RunLog
from plpp_reg.engine.method import Method
from plpp_reg.engine.run import UnusableCheckpoint, further_config, parts_read, pictures_sha256, resolve, run
from plpp_reg.engine.teacher import Teacher
from plpp_reg.errors import InputError, InUse, line_of
from plpp_reg.experiments.jobs import Job
from plpp_reg.experiments.remaining import Remaining
from plpp_reg.io.files import locked, write_text
from plpp_reg.results.job import FAILED, JOB, SUPERSEDED
from plpp_reg.results.numbers import duration
from plpp_reg.results.record import read_if_whole

DYING = 5.0  # seconds: a worker that died may not have left its folder yet when that is known
POLL = 0.5  # seconds between looks at what other processes have
TAIL = 8  # lines of a failed run's log that are shown


class Outcome(NamedTuple):
    """How a run ended: its result, or what went wrong and the last lines of its log.

    ``aside``: where an older run went; ``elsewhere``: another process has made the result; ``busy``: one is in the folder.
    """

    job: Job
    result: dict[str, Any] | None
    seconds: float
    error: str = ""
    log: tuple[str, ...] = ()
    aside: Path | None = None
    elsewhere: bool = False
    busy: bool = False


Say = Callable[[str], None]
Runner = Callable[[Sequence[Job]], Iterator[Outcome]]


# ---- one run -----------------------------------------------------------------------------------------------------------


class Hashes(dict):
    """The hashes of each data set as it is sampled, and of each teacher, read once: many runs of a sweep share them."""

    def teacher_of(self, cfg: CfgNode, cls: type[Method]) -> dict[str, Any] | None:
        """Who teaches a run, as its record says it; None where nobody does, or nobody who is there."""
        if not cls.distils:
            return None
        key = ("teacher", json.dumps(cfg.TEACHER, sort_keys=True), cfg.MODEL.BACKBONE.NAME, cfg.DATASET.NAME)
        if key not in self:
            try:
                self[key] = json.loads(json.dumps(Teacher(cfg, []).identity))
            except InputError:
                self[key] = None
        return self[key]

    def of(self, cfg: CfgNode, parts: Sequence[str]) -> tuple[str, dict[str, str]]:
        """Of the lists, and of the pictures in these parts."""
        node = cfg.DATASET
        key = (node.NAME, node.ROOT, node.NUM_SHOTS, image_seed_of(cfg) if node.NUM_SHOTS > 0 else None, node.SUBSAMPLE_CLASSES)
        if (key := (*key, *parts)) not in self:
            data = load_data(cfg, "train" in parts)
            self[key] = data.sha256(), pictures_sha256(data, parts)
        return self[key]

    def agree(self, recorded: Mapping[str, Any], cfg: CfgNode, parts: Sequence[str]) -> bool:
        """Whether a run saw the images that are there. One made before their content was recorded is known by their names."""
        files, pictures = self.of(cfg, parts)
        return recorded["files_sha256"] == files and recorded.get("pictures_sha256", pictures) == pictures


def finished(job: Job, hashes: Hashes | None = None) -> dict[str, Any] | None:
    """The job's result, if the folder holds one of the same resolved configuration and the same files, in every test."""
    read = hashes if hashes is not None else Hashes()
    result = read_if_whole(job.folder)
    if result is None or result.get("protocol") != job.note:
        return None
    cfg, cls = resolve(job.arguments)
    tests = result.get("tests", {})
    if cls.distils and result.get("teacher") != (read.teacher_of(cfg, cls) or {}):
        return None
    if config.differences(result["config"], config.flat(cfg)) or tests.keys() != job.tests.keys():
        return None
    configs = {name: further_config(cfg, opts) for name, opts in job.tests.items()}
    same = read.agree(result, cfg, _parts(job, cfg))
    same = same and all(read.agree(tests[name], test, [test.TEST.SPLIT]) for name, test in configs.items())
    return result if same else None


def _parts(job: Job, cfg: CfgNode) -> list[str]:
    return parts_read(cfg, trains=job.note["learns"])


def execute(job: Job, models: Models | None = None) -> Outcome:
    """Run one job to its result.json, going on from its last checkpoint; an exception becomes an outcome with an error.

    The folder is held from the first look at it to the result: what another process has finished meanwhile is not done again.
    """
    start = time.perf_counter()
    models = models if models is not None else Models()
    aside = None
    try:
        with locked(job.folder):
            hashes = Hashes()
            if (result := finished(job, hashes)) is not None:
                return Outcome(job, result, 0.0, elsewhere=True)
            (job.folder / FAILED).unlink(missing_ok=True)
            _write_if_new(job.folder / JOB, _note_text(job))
            if _other_settings(job, hashes):
                aside = set_aside(job)
            try:
                result = _run(job, models)
            except UnusableCheckpoint:
                aside = set_aside(job)
                result = _run(job, models)
        return Outcome(job, result, time.perf_counter() - start, aside=aside)
    except Exception as e:
        return failure(job, e, time.perf_counter() - start)._replace(aside=aside)


class Models(dict):
    """The CLIP of the run before, kept for the next one that wants the same."""

    @staticmethod
    def key(job: Job) -> tuple:
        cfg, cls = resolve(job.arguments)
        return cfg.MODEL.BACKBONE.NAME, cls.Config.read(cfg).prec, cfg.USE_CUDA

    def keep(self, key: tuple, model: nn.Module) -> None:
        self.clear()
        self[key] = model


def _run(job: Job, models: Models) -> dict[str, Any]:
    key = models.key(job)
    result, trainer = run(job.arguments, RunLog(quiet=True), models.get(key), tests=job.tests, note=job.note)
    models.keep(key, trainer.clip_model)
    return result


def failure(job: Job, error: Exception, seconds: float) -> Outcome:
    """The outcome of a run that ended with ``error``, noted in the run's folder too."""
    line = line_of(error)
    message = line or " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, InUse):  # the folder, its log and what becomes of the run are another process's
        return Outcome(job, None, seconds, message, busy=True)
    log = job.folder / "log.txt"
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL:] if log.is_file() else []
    if line is None:  # a fault of a program: where it was
        message = f"{type(error).__name__}: {message}"
        lines += "".join(traceback.format_exception(error)).splitlines()[-TAIL:]
    outcome = Outcome(job, None, seconds, message, tuple(lines))
    try:
        with locked(job.folder, wait=DYING):
            write_text(job.folder / FAILED, json.dumps({"error": message, "log": lines}, indent=1) + "\n")
    except (InputError, OSError):
        pass  # a full or read-only disk, or another process has taken the run up meanwhile: the outcome says what failed here
    return outcome


def _other_settings(job: Job, hashes: Hashes | None = None) -> bool:
    """Whether the folder holds a run, finished or not, of another configuration, or a finished one of other files."""
    there = job.folder / "config.yaml"
    if not there.is_file():
        return False
    cfg, _ = resolve(job.arguments)
    if config.differences(config.from_yaml(there), config.flat(cfg)):
        return True
    result = read_if_whole(job.folder)
    read = hashes if hashes is not None else Hashes()
    return result is not None and not read.agree(result, cfg, _parts(job, cfg))


def set_aside(job: Job) -> Path:
    """Move what a folder holds out of the way. config.yaml goes last: it says whose the rest is, should this be killed."""
    place = job.output / SUPERSEDED / job.folder.relative_to(job.output)
    names = sorted(set(os.listdir(job.folder)) - {".lock", JOB}, key=lambda name: name == "config.yaml")

    def takes_them(target: Path) -> bool:
        """Whether it is not there, or half filled by a process that was killed in the middle of this."""
        return not target.exists() or not any((target / name).exists() for name in (*names, "config.yaml"))

    target = next(t for i in itertools.count(1) if takes_them(t := place.with_name(f"{place.name}-{i}")))
    target.mkdir(parents=True, exist_ok=True)
    for name in names:
        os.replace(job.folder / name, target / name)
    return target


def _note_text(job: Job) -> str:
    return json.dumps(job.note, indent=1) + "\n"


def _write_if_new(path: Path, text: str) -> None:
    if not path.is_file() or path.read_bytes() != text.encode():
        write_text(path, text)


# ---- many runs ---------------------------------------------------------------------------------------------------------


def one_after_another(jobs: Sequence[Job]) -> Iterator[Outcome]:
    """Here, in this process, in order."""
    models = Models()
    for job in jobs:
        yield execute(job, models)


def sweep(jobs: Sequence[Job], say: Say = print, runner: Runner = one_after_another, at_once: int = 0) -> list[Outcome]:
    """Run what is not finished; the outcomes of what failed.

    Each job's folder is told what is planned in it first, so that a table names what is missing however this ends. What another
    process is running is waited for, and run here where that one leaves it unfinished. Teachers come before their students,
    and the students of one that failed fail with it. ``at_once``: how many the runner runs at a time, for the time left; 0: it
    is seen.
    """
    hashes = Hashes()
    left, anew, by_names = [], set(), 0
    for job in jobs:
        if job.teacher in anew or (result := finished(job, hashes)) is None:
            left.append(job)
            anew.add(job.folder)
        else:
            by_names += "pictures_sha256" not in result
    if len(left) < len(jobs):
        say(f"{len(jobs) - len(left)} of {len(jobs)} runs are there already")
    if by_names:
        say(f"{by_names} of them were made before the content of images was recorded: the images' names alone were compared")
    for job in left:
        with contextlib.suppress(InputError, OSError), locked(job.folder):  # who is in it has told it
            _write_if_new(job.folder / JOB, _note_text(job))
    progress = _Progress(left, say, at_once)
    _run_to_the_end([job for job in left if job.teacher is None], runner, progress)
    failed = {outcome.job.folder: outcome for outcome in progress.failed}
    taught = []
    for job in left:
        if job.teacher in failed:
            teacher = failed[job.teacher]
            progress.add(failure(job, InputError(f"its teacher failed ({teacher.job.label}: {teacher.error})"), 0.0))
        elif job.teacher is not None:
            taught.append(job)
    _run_to_the_end(taught, runner, progress)
    return progress.failed


def _run_to_the_end(jobs: Sequence[Job], runner: Runner, progress: _Progress) -> None:
    """Run these, and wait for those that other processes are in."""
    busy = _run_all(jobs, runner, progress) if jobs else []
    say = progress.say
    while busy:
        say(f"Waiting for another process, which has {len(busy)} of the runs: {busy[0].label}{', …' if busy[1:] else ''}")
        free = _wait_for_one(busy)
        busy = [job for job in busy if job not in free]
        hashes, unfinished = Hashes(), []
        for job in free:
            if (result := finished(job, hashes)) is not None:
                progress.add(Outcome(job, result, 0.0, elsewhere=True))
            else:
                unfinished.append(job)
        busy += _run_all(unfinished, runner, progress) if unfinished else []


class _Progress:
    """What a sweep says of each outcome, and what failed."""

    def __init__(self, jobs: Sequence[Job], say: Say, at_once: int) -> None:
        self.jobs, self.say, self.failed = jobs, say, []
        self.number, self.remaining = 0, Remaining(jobs, at_once)
        self.start = time.perf_counter()

    def add(self, outcome: Outcome) -> None:
        self.number += 1
        whole = outcome.result is not None and not outcome.elsewhere  # what failed says nothing of those that will not
        self.remaining.add(outcome.job, outcome.seconds if whole else None)
        if outcome.aside is not None:
            self.say(f"{outcome.job.label}: the run that was there had other settings or files; it is now {outcome.aside}")
        left = self.remaining.words(time.perf_counter() - self.start)
        what = f"FAILED: {outcome.error}" if outcome.result is None else figures(outcome.result)
        took = "run by another process" if outcome.elsewhere else duration(outcome.seconds)
        self.say(f"[{self.number}/{len(self.jobs)}] {outcome.job.label}: {what} ({', '.join(filter(None, (took, left)))})")
        if outcome.result is None:
            self.failed.append(outcome)


def _run_all(jobs: Sequence[Job], runner: Runner, progress: _Progress) -> list[Job]:
    """Run these; those that other processes are in."""
    busy = []
    outcomes = runner(jobs)
    try:
        for outcome in outcomes:
            if outcome.busy:
                busy.append(outcome.job)
            else:
                progress.add(outcome)
    finally:
        if isinstance(outcomes, Generator):
            outcomes.close()  # Ctrl-C may come here: a runner ends its workers before anything else goes on
    return busy


def _wait_for_one(jobs: Sequence[Job]) -> list[Job]:
    """Those of the jobs whose folders other processes have left, once there is one."""
    while True:
        if free := [job for job in jobs if not _in_use(job.folder)]:
            return free
        time.sleep(POLL)


def _in_use(folder: Path) -> bool:
    try:
        with locked(folder):
            return False
    except InUse:
        return True
    except InputError:  # it cannot be written to: the run will say so
        return False


def figures(result: dict[str, Any]) -> str:
    """``base 71.2, new 55.3``."""
    metrics = {result["protocol"]["test"]: result["metrics"]}
    metrics.update({name: test["metrics"] for name, test in result.get("tests", {}).items()})
    return ", ".join(f"{name} {values['accuracy']:.1f}" for name, values in metrics.items())


def report(failed: Iterable[Outcome]) -> list[str]:
    """What failed, each with the last lines of its log."""
    lines: list[str] = []
    for outcome in failed:
        lines += [f"FAILED {outcome.job.label}: {outcome.error}", f"  in {outcome.job.folder}"]
        lines += [f"  | {line}" for line in outcome.log]
    return lines


def planned(jobs: Sequence[Job]) -> list[str]:
    """What ``--dry-run`` prints: each run, and whether it is there. Data are read where a finished run's files are compared."""
    hashes = Hashes()
    lines = [f"{job.label}: {_state(job, hashes)}, in {job.folder}" for job in jobs]
    return [*lines, f"{len(jobs)} run{'' if len(jobs) == 1 else 's'}"]


def _state(job: Job, hashes: Hashes) -> str:
    try:
        if finished(job, hashes) is not None:
            return "there already"
        if _other_settings(job, hashes):
            return f"to run anew (other settings or files there go below {SUPERSEDED}/)"
    except InputError as e:
        return f"there already if its files are the same; data not there to compare ({e})"
    return "to go on with" if (job.folder / "config.yaml").is_file() else "to run"
