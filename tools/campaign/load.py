"""Many processes at once, some of them killed: one store, one folder of runs, one sweep's workers.

    python tools/campaign/load.py [--only store sweeps workers] [--seed 0]

Exit status 0: what is left is what one undisturbed process leaves.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import yaml

from plpp_reg.io.store import TensorStore

import kills

helpers = kills.helpers
PROCESSES, ENTRIES = 8, 40
PHASES = ("config.yaml", "prompt_learner/model.pth.tar-1", f"prompt_learner/model.pth.tar-{kills.EPOCHS}")


def forked(act: Callable[[], object]) -> int:
    pid = os.fork()
    if not pid:
        status = 1
        try:
            sys.stdout = open(os.devnull, "w")
            status = act() or 0
        finally:
            os._exit(status)
    return pid


def until_all_are_done(acts: list[Callable[[], object]], rng: random.Random, most: int, pause: float) -> int:
    """Run these at once, kill one at random every now and then and start it again; how many were killed."""
    running = {forked(act): act for act in acts}
    killed = 0
    while running:
        time.sleep(rng.uniform(0, pause))
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            act = running.pop(pid)
            if os.WIFSIGNALED(status):
                running[forked(act)] = act
            elif os.waitstatus_to_exitcode(status):
                raise AssertionError(f"a process ended with status {os.waitstatus_to_exitcode(status)}")
        elif killed < most:
            os.kill(rng.choice(list(running)), signal.SIGKILL)
            killed += 1
    return killed


def store(folder: Path, rng: random.Random) -> str:
    """Eight processes fill one store with the same tensors, in orders of their own."""

    def fill(seed: int) -> None:
        order = random.Random(seed).sample(range(ENTRIES), ENTRIES)
        kept = TensorStore(folder, 1)
        for i in order:
            tensors = kept.get({"i": i}, lambda i=i: {"x": torch.full((2**16,), float(i))})
            assert (tensors["x"] == i).all()

    killed = until_all_are_done([lambda s=s: fill(s) for s in range(PROCESSES)], rng, 60, 0.02)
    kept = TensorStore(folder, 1)
    assert len(kept.entries()) == ENTRIES
    kept.trim()
    assert not kept.halves(), kept.halves()
    for i in range(ENTRIES):
        assert (kept.find({"i": i})["x"] == i).all()
    return f"{PROCESSES} processes, {killed} killed, {ENTRIES} entries, each right, nothing half-written"


def sweeps(folder: Path, rng: random.Random) -> str:
    """Three sweeps share a folder, and are killed and started again."""
    campaign = kills.Campaign(folder)
    command = kills.commands(campaign.world)["run"]
    campaign.prepare(command)
    expected = campaign.undisturbed(command)
    campaign.start()
    argv = command.argv
    killed = until_all_are_done([lambda: kills.cli.main(argv)] * 3, rng, 6, 1.5)
    what = kills.difference(kills.left_in(campaign.world.place), expected)
    assert not what, what
    logs = [path.read_text() for path in campaign.world.place.rglob("log.txt")]
    assert all(log.count("Result: ") == 1 for log in logs), "a run was done twice"
    return f"3 sweeps, {killed} killed, {len(logs)} runs, each done once, every file as of an undisturbed sweep"


def workers(folder: Path, rng: random.Random) -> str:
    """``--workers 2``; the worker that is in a run is killed alone, once in each phase of it."""
    images = helpers.make_images(folder / "images")
    recipe = helpers.write_recipe(folder / "recipe.yaml", OPTIM__MAX_EPOCH=kills.EPOCHS)
    content = {
        "table": "halves", "methods": ["CoOp", "CoOp_PLPP"], "datasets": [f"folder:{images}"], "seeds": [1], "shots": [2],
        "recipe": [str(recipe)], "set": {"DATASET.SUBSAMPLE_CLASSES": "base"}, "test": "base",
        "tests": {"new": {"DATASET.SUBSAMPLE_CLASSES": "new"}},
    }  # fmt: skip
    (folder / "small.yaml").write_text(yaml.safe_dump(content))
    flags = ["--root", str(images), "--backbone", str(helpers.write_backbone(folder / "tiny.pt")), "--workers", "2"]

    def swept(name: str, phase: str = "") -> list[dict]:
        argv = ["run", str(folder / "small.yaml"), *flags, "--output", str(folder / name)]
        said = (folder / "said").open("w")
        sweep = subprocess.Popen([sys.executable, "-m", "plpp_reg", *argv], stdout=said, stderr=said)
        run = folder / name / "small" / "images" / "shots2" / "CoOp" / "seed1"
        while phase and sweep.poll() is None:
            if (run / phase).exists() and (holder := _holder(run / ".lock")) is not None:
                os.kill(holder, signal.SIGKILL)
                break
            time.sleep(0.002)
        said.close()
        assert sweep.wait() == 0, (folder / "said").read_text()
        results = [json.loads(path.read_text()) for path in sorted((folder / name).rglob("result.json"))]
        for result in results:
            result.pop("seconds"), result.pop("phases"), result["config"].pop("OUTPUT_DIR")
        assert not list((folder / name).rglob("*.tmp")) and not list((folder / name).rglob("failed.json"))
        return results

    expected = swept("undisturbed")
    for i, phase in enumerate(PHASES):
        assert swept(f"killed-{i}", phase) == expected, f"other results after a kill at {phase}"
    return f"a worker killed alone in {len(PHASES)} phases, {len(expected)} runs each time, the same results"


def _holder(lock: Path) -> int | None:
    """The process that has a file open, and is not this one."""
    for place in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.readlink(place) == str(lock):
                return int(place.parts[2])
        except OSError:
            continue
    return None


def main() -> int:
    made = {"store": store, "sweeps": sweeps, "workers": workers}
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=list(made), default=list(made))
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in args.only:
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            said = made[name](Path(folder), random.Random(args.seed))
            print(f"{name}: {said} ({time.perf_counter() - start:.0f} s)", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
