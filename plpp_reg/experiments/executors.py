"""Who runs the jobs of a sweep: this process, processes of this machine, or a Ray cluster.

A result depends on none of these. In its last bits it depends on the number of threads that torch shares a sum among, so that
number is given here, the same to every run (``--threads``).
"""

from __future__ import annotations

import importlib.util
import itertools
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from types import ModuleType
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from plpp_reg.errors import InputError, install, unknown
from plpp_reg.experiments.jobs import Job
from plpp_reg.experiments.sweep import Models, Outcome, Runner, execute, failure, one_after_another
from plpp_reg.io.signals import kept

EXECUTORS = ("processes", "ray")
MOST = 1024  # processes or threads: more is a slip of the hand, which a machine would not survive
TRIES = 2  # of a job whose worker dies
IMPORTED = ["torch", "torchvision.transforms", "ftfy"]  # once for all workers; the last is for openai-clip


class WorkerDied(RuntimeError):
    """The process that a run was in is gone: killed, or out of memory."""


def choose(executor: str = "processes", workers: int = 0, threads: int = 0, address: str = "") -> Runner:
    """The runner of a command line.

    Args:
        executor: "processes" or "ray".
        workers: how many runs at once; 0: one, in this process (processes), or what the cluster has room for (ray).
        threads: of each run; 0: torch's own number, divided among the workers (processes), or 1 (ray).
        address: of a Ray cluster; "": a Ray of this machine alone.

    Raises:
        InputError: a number below 0, or what one executor has and the other has not.
    """
    for flag, value in (("--workers", workers), ("--threads", threads)):
        if not 0 <= value <= MOST:
            raise InputError(f"{flag}: expected an integer, 0 to {MOST}, got {value}")
    if executor not in EXECUTORS:
        raise unknown("executor", executor, EXECUTORS)
    if executor == "ray":
        return on_ray(address, threads or 1, workers)
    if address:
        raise InputError(f"--address {address!r}: expected --executor ray with it")
    return processes(workers, threads) if workers else here(threads)


def here(threads: int = 0) -> Runner:
    """One run after another, in this process."""

    def runner(jobs: Sequence[Job]) -> Iterator[Outcome]:
        if threads:
            torch.set_num_threads(threads)
        return one_after_another(jobs)

    return runner


_models = Models()  # of a worker: its next run probably wants the same CLIP


def _execute(job: Job, threads: int, folder: str) -> Outcome:
    """A run in a worker; ``folder`` is what relative paths are relative to."""
    try:
        os.chdir(folder)
    except OSError as e:
        return Outcome(job, None, 0.0, f"{folder!r}: expected this folder on the worker's machine too (a shared disk), got {e}")
    torch.set_num_threads(threads)
    return execute(job, _models)


# ---- processes of this machine -----------------------------------------------------------------------------------------


def processes(workers: int, threads: int = 0) -> Runner:
    """``workers`` processes, each with a GPU where there are some (shared where there are fewer), else on the CPU.

    A job whose worker dies is tried once more, from its last checkpoint, and then reported; the others go on. When the sweep
    ends, however it ends (Ctrl-C, or this process is killed), its workers end too.
    """
    if workers < 1:
        raise InputError(f"workers: expected an integer >= 1, got {workers}")
    each = threads or max(1, torch.get_num_threads() // workers)

    def runner(jobs: Sequence[Job]) -> Iterator[Outcome]:
        watched, held = multiprocessing.Pipe(duplex=False)
        slots = [_Slot(gpu, watched) for gpu in _gpus(min(workers, len(jobs)))]
        try:
            yield from _run(jobs, slots, each)
        finally:
            held.close()
            for slot in slots:
                slot.pool.shutdown(cancel_futures=True)
            watched.close()

    return runner


class _Slot:
    """A pool of one process: when that dies it is known which job it had, and nobody else's is lost with it."""

    def __init__(self, gpu: str | None, watched: Connection) -> None:
        self.gpu, self.watched = gpu, watched
        self.start()

    def start(self) -> None:
        self.pool = ProcessPoolExecutor(1, _context(), initializer=_begin, initargs=(dict(os.environ), self.gpu, self.watched))

    def submit(self, job: Job, threads: int) -> Future[Outcome]:
        try:
            return self.pool.submit(_execute, job, threads, os.getcwd())
        except BrokenProcessPool:  # it died with nothing to do
            self.start()
            return self.pool.submit(_execute, job, threads, os.getcwd())


def _context() -> BaseContext:
    """CUDA and OpenMP do not survive a fork of a process that has used them: workers are forks of one that only imports."""
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    return context


def _begin(environment: dict[str, str], gpu: str | None, watched: Connection) -> None:
    """A worker's first words. ``watched`` ends when the sweep does."""
    os.environ.clear()  # the server that it is a fork of has that of its own start
    os.environ.update(environment)
    # Ctrl-C reaches every process of a terminal: the sweep alone answers it, by ending its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    tqdm.set_lock(threading.RLock())  # its own is a semaphore of the system, which a worker that dies would leave behind
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu  # read when CUDA is first used, which is later

    def watch() -> None:
        watched.poll(None)
        os._exit(1)  # in the middle of a run, as if killed: result.json is whole or not there

    threading.Thread(target=watch, daemon=True).start()


def _gpus(n: int) -> list[str | None]:
    """Which GPU each of ``n`` workers sees, by the name that CUDA_VISIBLE_DEVICES takes; None: as this process."""
    count = torch.cuda.device_count()
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    names = named[:count] or [str(i) for i in range(count)]
    return list(itertools.islice(itertools.cycle(names or [None]), n))


def _run(jobs: Sequence[Job], slots: Sequence[_Slot], threads: int) -> Iterator[Outcome]:
    left, free = deque(_Attempt(job) for job in jobs), deque(slots)
    running: dict[Future[Outcome], tuple[_Slot, _Attempt]] = {}
    while left or running:
        while left and free:
            slot, attempt = free.popleft(), left.popleft()
            running[slot.submit(attempt.job, threads)] = slot, attempt.begun()
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            slot, attempt = running.pop(future)
            free.append(slot)
            try:
                yield future.result()
            except BrokenProcessPool:
                slot.start()
                if attempt.number < TRIES:
                    left.appendleft(attempt)
                else:
                    error = WorkerDied(f"its worker died {TRIES} times (killed, or out of memory)")
                    yield failure(attempt.job, error, time.perf_counter() - attempt.start)


class _Attempt(NamedTuple):
    """At a job; ``start`` is the first one's."""

    job: Job
    number: int = 0
    start: float = 0.0

    def begun(self) -> _Attempt:
        return self._replace(number=self.number + 1, start=self.start or time.perf_counter())


# ---- Ray ---------------------------------------------------------------------------------------------------------------


def on_ray(address: str = "", threads: int = 1, workers: int = 0) -> Runner:
    """Ray's own scheduling, placement and retries: a run is a task of ``threads`` CPUs, and of a GPU where there are some.

    Args:
        address: of a running cluster ("auto", "host:6379"); "": RAY_ADDRESS, and without it a Ray that starts here.
        threads: of each run.
        workers: how many runs at once, of a Ray that starts here; 0: as many as there is room for.

    Raises:
        InputError: Ray is not installed, or no cluster answers, or ``workers`` of a cluster that is there, or more threads than
            any of its nodes has CPUs.
    """
    if importlib.util.find_spec("ray") is None:
        raise InputError(f"--executor ray: expected Ray, which is not installed: {install('ray')}")
    address = address or os.environ.get("RAY_ADDRESS", "")
    if address and workers:
        raise InputError(f"--workers {workers}: expected none with --address, a cluster has its own")

    def runner(jobs: Sequence[Job]) -> Iterator[Outcome]:
        ray = _connected(address, workers * threads or None)
        try:
            # Ray would wait without a word for a node that large.
            most = max(int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"])
            if threads > most:
                raise InputError(f"--threads {threads}: expected at most {most}, the CPUs of Ray's largest node, got {threads}")
            # Whatever a run raises is an outcome: what is left to retry is a worker or a machine that dies.
            gpus = min(1, ray.cluster_resources().get("GPU", 0))
            task = ray.remote(max_retries=TRIES - 1, num_cpus=threads, num_gpus=gpus)(_execute)
            start = time.perf_counter()
            running = {task.remote(job, threads, os.getcwd()): job for job in jobs}
            while running:
                (done, *_), _ = ray.wait(list(running), num_returns=1)
                job = running.pop(done)
                try:
                    yield ray.get(done)
                except ray.exceptions.RayError as e:
                    yield failure(job, WorkerDied(str(e)), time.perf_counter() - start)
        finally:
            ray.shutdown()  # ends this sweep's tasks too

    return runner


def _connected(address: str, cpus: int | None) -> ModuleType:
    # A task that Ray's memory monitor kills has a counter of its own, read with Ray: without end unless it is set.
    os.environ.setdefault("RAY_task_oom_retries", str(TRIES - 1))
    import ray

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}  # a run's log is in its folder
    with kept(signal.SIGTERM):  # Ray answers it with an end of its own, without a word
        if not address:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would report to its makers
            ray.init("local", num_cpus=cpus, include_dashboard=False, **quiet)
            return ray
        try:
            ray.init(address, **quiet)
        except (ConnectionError, ValueError, RuntimeError, ray.exceptions.RayError) as e:
            raise InputError(f"--address {address!r}: expected a running Ray cluster, got {e}") from e
    return ray
