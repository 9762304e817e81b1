"""A sweep skips what matches, goes on past failures, resumes what was killed."""

from __future__ import annotations

import contextlib
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from plpp_reg.commands.cli import main
from plpp_reg.data import DATASETS, DatasetEntry
from plpp_reg.engine.run import RunArguments
from plpp_reg.engine.run import run as run_once
from plpp_reg.engine.trainer import Trainer
from plpp_reg.errors import InputError
from plpp_reg.experiments import sweep
from plpp_reg.experiments.jobs import Choice, Job, plan
from plpp_reg.results import tables
from plpp_reg.results.record import read_result
from plpp_reg.trainers.coop import CoOp

from helpers import engine as helpers
from helpers import processes
from helpers.bench import Bench


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setitem(DATASETS, "tiny", DatasetEntry("helpers.engine:read_tiny"))
    return Bench(tmp_path)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """A bench whose sweep has run; tests work on copies."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(DATASETS, "tiny", DatasetEntry("helpers.engine:read_tiny"))
        made = Bench(tmp_path_factory.mktemp("bench"))
        assert sweep.sweep(made.plan(), say=quiet) == []
        yield made


@pytest.fixture
def copy(done: Bench, bench: Bench) -> Bench:
    """The finished sweep, to be spoilt. Its data and model are those of ``done``: their paths are part of a run's settings."""
    shutil.copytree(done.output, bench.output)
    bench.images, bench.backbone, bench.recipe = done.images, done.backbone, done.recipe
    bench.write()
    return bench


def quiet(line: str) -> None:
    pass


def executed(jobs: Sequence[Job]) -> list[str]:
    """Run what is left; which jobs that was."""
    seen: list[str] = []

    def runner(left: Sequence[Job]) -> Iterator[sweep.Outcome]:
        seen.extend(job.label for job in left)
        return sweep.one_after_another(left)

    assert sweep.sweep(jobs, say=quiet, runner=runner) == []
    return seen


def test_a_further_test_is_what_evaluating_the_model_gives(done: Bench) -> None:
    job = next(j for j in done.plan() if j.note["method"] == "CoOp_PLPP")
    result = read_result(job.folder)
    opts = (*job.arguments.opts, *job.tests["new"])
    again = job.arguments._replace(eval_only=True, model_dir=str(job.folder), output_dir=str(done.place / "again"), opts=opts)
    alone, trainer = run_once(again)
    assert result["tests"]["new"]["metrics"] == alone["metrics"]
    assert result["tests"]["new"]["files_sha256"] == alone["files_sha256"] != result["files_sha256"]
    assert trainer.data.classnames == helpers.CLASSNAMES[3:]


def test_a_run_does_not_depend_on_those_before_it(done: Bench, bench: Bench) -> None:
    bench.images, bench.backbone, bench.recipe = done.images, done.backbone, done.recipe
    bench.write()
    job = next(j for j in bench.plan() if j.note["method"] == "CoOp_PLPP" and j.note["seed"] == 2)
    alone = sweep.execute(job).result
    among = read_result(done.output / job.folder.relative_to(bench.output))
    different = {"seconds", "phases", "config"}
    assert {k: v for k, v in alone.items() if k not in different} == {k: v for k, v in among.items() if k not in different}


def test_a_runs_few_shot_list_is_kept_and_its_hash_recorded(done: Bench) -> None:
    import hashlib

    for job in done.plan():
        kept = (job.folder / "few_shot.json").read_bytes()
        assert hashlib.sha256(kept).hexdigest() == read_result(job.folder)["few_shot_sha256"]
        assert len(json.loads(kept)["train"]) == 2 * 3


def test_a_finished_sweep_runs_nothing(copy: Bench) -> None:
    before = {p: p.stat().st_mtime_ns for p in copy.output.rglob("*") if p.is_file()}
    assert executed(copy.plan()) == []
    assert {p: p.stat().st_mtime_ns for p in copy.output.rglob("*") if p.is_file()} == before


def test_only_what_does_not_match_is_run_again(copy: Bench) -> None:
    jobs = copy.plan()
    (jobs[1].folder / "result.json").write_text("{")  # cut short
    note = json.loads((jobs[2].folder / "result.json").read_text())
    note["files_sha256"] = "0" * 64  # other images
    (jobs[2].folder / "result.json").write_text(json.dumps(note))
    assert executed(jobs) == [jobs[1].label, jobs[2].label]
    assert executed(jobs) == []


def test_other_settings_are_run_anew_and_the_old_result_set_aside(copy: Bench) -> None:
    before = read_result(copy.plan()[1].folder)
    jobs = copy.plan(opts=["OPTIM.LR", "0.01"], methods=["CoOp"], seeds=[1])
    text = tables.tables_text(copy.output, "markdown")
    sweep.sweep(jobs, say=quiet, runner=lambda left: iter(()))  # planned, and killed before it began
    assert tables.tables_text(copy.output, "markdown") != text
    assert "CoOp, seed 1: not run yet with these settings" in tables.tables_text(copy.output, "markdown")
    assert executed(jobs) == [jobs[0].label]
    assert read_result(jobs[0].folder)["config"]["OPTIM.LR"] == 0.01
    (old,) = (copy.output / "superseded").rglob("result.json")
    assert json.loads(old.read_text()) == before
    assert "Missing" not in tables.tables_text(copy.output, "markdown")


def test_a_sweep_says_once_what_it_sets_aside_and_reads_data_once_for_all(copy: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = copy.plan(methods=["CoOp"])
    for job in jobs:
        changed = json.loads((job.folder / "result.json").read_text()) | {"files_sha256": "0" * 64}  # of other images
        (job.folder / "result.json").write_text(json.dumps(changed))
    reads: list[int] = []
    load = sweep.load_data
    monkeypatch.setattr(sweep, "load_data", lambda cfg, *more: reads.append(cfg.SEED) or load(cfg, *more))
    said: list[str] = []
    seen: list[list[int]] = []

    def runner(left: Sequence[Job]) -> Iterator[sweep.Outcome]:
        seen.append(list(reads))
        return sweep.one_after_another(left)

    assert sweep.sweep(jobs, say=said.append, runner=runner) == []
    assert seen == [[1, 2]] and reads == [1, 2, 1, 2]  # each once to see what is left, each once where it runs
    aside = [line for line in said if "it is now" in line]
    assert [line.partition(": the run that was there had")[0] for line in aside] == [job.label for job in jobs]
    assert all((Path(line.partition("it is now ")[2]) / "result.json").is_file() for line in aside)


def test_another_image_list_is_run_anew(copy: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DATASETS, "tiny", DatasetEntry("test_sweep:read_other"))
    jobs = copy.plan(methods=["CoOp"], seeds=[1])
    assert executed(jobs) == [jobs[0].label]
    unfinished = jobs[0].folder / "result.json"
    unfinished.unlink()
    monkeypatch.setitem(DATASETS, "tiny", DatasetEntry("helpers.engine:read_tiny"))
    assert executed(jobs) == [jobs[0].label]  # a checkpoint of other images is not gone on from
    assert executed(jobs) == []


def read_gone(root: str | Path):
    raise InputError("tiny: expected its folder, it is gone")


def read_other(root: str | Path):
    data = helpers.read_tiny(root)
    return type(data)(data.train[::-1], data.val, data.test, data.classnames)


def test_a_failed_run_is_passed_named_and_mended(bench: Bench, capsys: pytest.CaptureFixture, monkeypatch) -> None:
    losses = Trainer.losses

    def broken(self, batch, with_perplexity):
        if self.cfg.SEED == 1 and self.state.epoch == 1:
            raise RuntimeError("out of memory, say")
        return losses(self, batch, with_perplexity)

    monkeypatch.setattr(Trainer, "losses", broken)
    assert main(bench.argv("--methods", "CoOp")) == 1
    out = capsys.readouterr().out
    assert "[2/2] small: tiny, 2 shots, CoOp, seed 2: base " in out  # it went on
    end = out[out.index("FAILED small: tiny, 2 shots, CoOp, seed 1: RuntimeError: out of memory, say") :]
    assert "| epoch [1/2]" in end and "in broken" in end  # the last log lines, and where it was
    assert "- small: tiny, 2 shots, CoOp, seed 1: failed: RuntimeError: out of memory, say" in bench.tables()["markdown"]
    monkeypatch.setattr(Trainer, "losses", losses)
    assert main(bench.argv("--methods", "CoOp")) == 0
    out = capsys.readouterr().out
    assert "1 of 2 runs are there already" in out and "[1/1]" in out
    assert "Missing" not in bench.tables()["markdown"] and not list(bench.output.rglob("failed.json"))


HOLDER = """
import sys
from plpp_reg.io.files import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def held_elsewhere(folder: Path) -> Iterator[processes.Process | subprocess.Popen]:
    """Another process works in a folder."""
    with processes.started(HOLDER, str(folder), stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == "held\n"
        yield holder


def test_a_folder_that_another_process_works_in_is_left_alone(copy: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "DYING", 0.1)
    job = copy.plan(opts=["OPTIM.LR", "0.01"])[1]
    before = helpers.files_below(job.folder)
    with held_elsewhere(job.folder):
        outcome = sweep.execute(job)
        sweep.failure(job, RuntimeError("its worker died"), 1.0)  # which this process hears of later than the other one
    assert outcome.result is None and outcome.busy and "another process is working in it" in outcome.error
    assert {*helpers.files_below(job.folder), ".lock"} == {*before, ".lock"}  # no failed.json: a running run has not failed
    assert not (copy.output / "superseded").exists()


@pytest.mark.parametrize("finishes", [True, False])
def test_what_another_process_is_running_is_waited_for(copy: Bench, monkeypatch: pytest.MonkeyPatch, finishes: bool) -> None:
    monkeypatch.setattr(sweep, "POLL", 0.02)
    jobs = copy.plan(methods=["CoOp"])
    result = (jobs[0].folder / "result.json").read_bytes()
    for job in jobs:
        (job.folder / "result.json").unlink()
    said: list[str] = []
    with held_elsewhere(jobs[0].folder) as holder:

        def say(line: str) -> None:
            said.append(line)
            if line.startswith("Waiting"):
                if finishes:
                    (jobs[0].folder / "result.json").write_bytes(result)
                holder.kill()

        assert sweep.sweep(jobs, say=say) == []
    assert jobs[1].label in said[0] and said[1].startswith("Waiting for another process, which has 1 of the runs: small: tiny")
    assert jobs[0].label in said[2] and ("(run by another process" in said[2]) == finishes and len(said) == 3
    assert all(sweep.finished(job) for job in jobs)


def sweep_of_two(jobs: list[Job], barrier, out) -> None:
    said: list[str] = []
    barrier.wait(60)
    failed = sweep.sweep(jobs, say=said.append)
    out.put((len(failed), said))


@pytest.mark.skipif(sys.platform != "linux", reason="forks, so that the sweeps begin at once")
def test_sweeps_that_share_a_folder_do_nothing_twice(done: Bench, bench: Bench) -> None:
    bench.images, bench.backbone, bench.recipe = done.images, done.backbone, done.recipe
    bench.write()
    jobs, fork = bench.plan(), multiprocessing.get_context("fork")
    barrier, out = fork.Barrier(3), fork.Queue()
    sweeps = [fork.Process(target=sweep_of_two, args=(jobs, barrier, out)) for _ in range(3)]
    for process in sweeps:
        process.start()
    ended = [out.get(timeout=120) for _ in sweeps]
    for process in sweeps:
        process.join(60)
    assert [failed for failed, _ in ended] == [0, 0, 0]
    for job in jobs:
        assert (job.folder / "log.txt").read_text().count("Result: ") == 1
    ran = [line for _, said in ended for line in said if line.startswith("[") and "by another process" not in line]
    assert len(ran) == len(jobs)
    assert bench.tables() == done.tables() and not (bench.output / "superseded").exists()


def test_setting_aside_can_be_killed_anywhere(copy: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = copy.plan(opts=["OPTIM.LR", "0.01"], methods=["CoOp"], seeds=[1])
    replace, moved = os.replace, []

    def killed(source, target):
        if sweep.SUPERSEDED in str(target):
            moved.append(Path(source).name)
            if len(moved) % 2 == 0:
                raise KeyboardInterrupt
        return replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    for _ in range(20):
        try:
            assert sweep.sweep(jobs, say=quiet) == []
            break
        except KeyboardInterrupt:
            continue
    assert len(moved) > 5
    (aside,) = (copy.output / sweep.SUPERSEDED).rglob("config.yaml")
    assert {"config.yaml", "result.json", "log.txt", "prompt_learner"} <= {p.name for p in aside.parent.iterdir()}  # together
    monkeypatch.setattr(os, "replace", replace)
    mended = read_result(jobs[0].folder)
    fresh = jobs[0]._replace(
        folder=copy.place / "fresh", arguments=jobs[0].arguments._replace(output_dir=str(copy.place / "fresh"))
    )
    assert mended["metrics"] == sweep.execute(fresh).result["metrics"]
    assert mended["losses"] == read_result(fresh.folder)["losses"]


def sweep_killed_at(jobs: list[Job], event: int) -> None:
    """A sweep that dies, nothing tidied up, before or after the ``event``-th file of it gets its name, or at a step."""
    replace, compute_losses, seen = os.replace, CoOp.losses, itertools.count(1)

    def count() -> None:
        if next(seen) == event:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted_replace(*args):
        count()
        replace(*args)
        count()

    def counted_losses(*args):
        count()
        return compute_losses(*args)

    os.replace, CoOp.losses = counted_replace, counted_losses
    sweep.sweep(jobs, say=quiet)


@pytest.mark.skipif(sys.platform != "linux", reason="forks, so that a killed sweep starts again without importing torch")
def test_killed_at_random_moments_the_tables_are_the_same_to_the_byte(done: Bench, bench: Bench) -> None:
    bench.images, bench.backbone, bench.recipe = done.images, done.backbone, done.recipe
    bench.write()
    jobs, rng, kills = bench.plan(), random.Random(5), 0
    fork = multiprocessing.get_context("fork")
    while True:
        event = rng.randint(1, 25) if kills < 12 else 0
        child = fork.Process(target=sweep_killed_at, args=(jobs, event))
        child.start()
        child.join(60)
        if child.exitcode != -signal.SIGKILL:
            break
        kills += 1
    assert child.exitcode == 0 and kills >= 5
    assert bench.tables() == done.tables()
    assert "Missing" not in bench.tables()["markdown"]


def test_jobs_can_be_handed_to_another_process(done: Bench) -> None:
    import pickle

    jobs = done.plan()
    assert pickle.loads(pickle.dumps(jobs)) == jobs
    assert all(sweep.finished(job) for job in pickle.loads(pickle.dumps(jobs)))


def test_the_installed_protocols_are_data(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected YAML"):
        (tmp_path / "p.yaml").write_text("a: [")
        plan(str(tmp_path / "p.yaml"), Choice(root="x"), tmp_path)
    assert RunArguments().opts == ()


def test_dry_run_says_what_is_there_and_needs_no_data(
    copy: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (copy.output / "small/tiny/shots2/CoOp/seed2/result.json").unlink()

    def states(*more: str) -> list[str]:
        assert main(copy.argv("--dry-run", "--methods", "CoOp", "CoOp_PLPP", "--seeds", "1", "2", "4", *more)) == 0
        return [line.split(": ", 2)[2].partition(", in ")[0] for line in capsys.readouterr().out.splitlines()[:-1]]

    assert states() == ["there already", "to go on with", "to run"] + ["there already"] * 2 + ["to run"]
    anew = "to run anew (other settings or files there go below superseded/)"
    assert states("--set", "OPTIM.LR", "0.01") == [anew, anew, "to run"] * 2
    before = {path: path.stat().st_mtime_ns for path in copy.output.rglob("*")}
    monkeypatch.setitem(DATASETS, "tiny", DatasetEntry("test_sweep:read_gone"))
    said = states()
    assert [line.partition(" (")[0] for line in said] == [
        "there already if its files are the same; data not there to compare", "to go on with", "to run",
        *["there already if its files are the same; data not there to compare"] * 2, "to run",
    ]  # fmt: skip
    assert "tiny: expected its folder" in said[0]
    assert {path: path.stat().st_mtime_ns for path in copy.output.rglob("*")} == before
