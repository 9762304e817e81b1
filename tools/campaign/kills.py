"""Kill each command before every file operation of a short run, and in the middle of every file that it writes; run it again.

    python tools/campaign/kills.py [--commands train run …] [--every 1] [--json FILE]

What the second run leaves is compared with what an uninterrupted one leaves: every file to the byte, checkpoints and results
but for the seconds they took, and that no other file is there. In between a result that was there before must be there, whole.
Exit status 0: all points of all commands are right.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1] / "tests")]

import torch  # noqa: E402
import yaml  # noqa: E402
from safetensors import safe_open  # noqa: E402

from plpp_reg.commands import cli  # noqa: E402
from plpp_reg.data import download  # noqa: E402
from plpp_reg.io.files import write_tensors  # noqa: E402

import shim  # noqa: E402
from helpers import engine as helpers  # noqa: E402

LOST = 99  # exit status of a process that ended with an exception
OF_THE_WAY = re.compile(r"(^|/)(\.lock|log\.txt|tensorboard)($|/)|\.lock$")  # differ from one run to the next, and tell of none
EPOCHS = 2


class World(NamedTuple):
    """What every command reads: pictures, a backbone, a recipe, a protocol; ``place`` is where the work is done."""

    source: Path
    place: Path

    def flags(self) -> list[str]:
        return ["--root", str(self.source / "images"), "--backbone", str(self.source / "tiny.pt")]

    def train(self, out: str, *more: str) -> list[str]:
        recipe = ["--config-file", str(self.source / "recipe.yaml"), "--output-dir", str(self.place / out)]
        return ["train", "--trainer", "CoOp_PLPP", *self.flags(), *recipe, *more]

    def run(self) -> list[str]:
        return ["run", str(self.source / "small.yaml"), *self.flags(), "--output", str(self.place / "out")]


class Command(NamedTuple):
    """``before`` are command lines that make what this one needs; ``halved``: the last of them is killed after an epoch."""

    argv: list[str]
    before: tuple[list[str], ...] = ()
    halved: bool = False
    make: Callable[[Path], None] = lambda place: None


def commands(world: World) -> dict[str, Command]:
    place, train = world.place, world.train("out")
    tsv = str(place / "prompt.safetensors")
    return {
        "train": Command(train),
        "retrain": Command(train, (train,)),
        "go on": Command(train, (train,), halved=True),
        "resume": Command(world.train("new", "--resume", str(place / "out")), (train,), halved=True),
        "evaluate": Command(world.train("eval", "--eval-only", "--model-dir", str(place / "out")), (train,)),
        "run": Command(world.run()),
        "run anew": Command([*world.run(), "--set", "OPTIM.LR", "0.01"], (world.run(),)),
        "predict": Command(["predict", str(place / "out"), str(world.source / "images" / "test" / "0"), "--json"], (train,)),
        "export": Command(["export", str(place / "out"), tsv], (train,)),
        "table": Command(["table", str(place / "out"), "--output", str(place / "table.md")], (world.run(),)),
        "report": Command(["report", str(place / "out")], (world.run(),)),
        "data": Command(["data", "get", "dtd", "--root", str(place / "data"), "--source", "torchvision"]),
        "cache": Command(["cache", "--clear"], make=fill_cache),
    }


def make_world(source: Path, place: Path) -> World:
    helpers.make_images(source / "images")
    helpers.write_backbone(source / "tiny.pt")
    helpers.write_recipe(source / "recipe.yaml", OPTIM__MAX_EPOCH=EPOCHS, FEATURES__MAX_GIB=1.0, TEST__FINAL_MODEL="best_val")
    protocol = {
        "table": "halves", "methods": ["CoOp", "CoOp_PLPP"], "datasets": ["tiny"], "seeds": [1], "shots": [2], "test": "base",
        "set": {"DATASET.SUBSAMPLE_CLASSES": "base"}, "tests": {"new": {"DATASET.SUBSAMPLE_CLASSES": "new"}},
        "recipe": [str(source / "recipe.yaml")],
    }  # fmt: skip
    (source / "small.yaml").write_text(yaml.safe_dump(protocol))
    return World(source, place)


def fill_cache(place: Path) -> None:
    folder = place / "cache" / "features"
    for i in range(3):
        write_tensors(folder / f"{i}.safetensors", {"x": torch.ones(8)}, {})
    for name in (".4.safetensors.tmp", ".5.safetensors.0a1b.tmp"):
        (folder / name).write_bytes(b"half")
    for name in ("contents/a", "openmoji/.1F600.png.tmp"):
        (place / "cache" / name).parent.mkdir()
        (place / "cache" / name).write_text("x")


@contextlib.contextmanager
def local_publisher(folder: Path) -> Iterator[None]:
    """DTD in miniature, served by this machine under the publisher's name."""
    import threading

    from helpers import miniature
    from helpers.server import Server, tarred

    made = miniature.make(folder / "made", "DescribableTextures")
    archive = tarred(dtd=made)
    server = Server()
    server.files["/dtd.tar.gz"] = archive
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    before = download.TORCHVISION["DescribableTextures"]
    download.TORCHVISION["DescribableTextures"] = ((f"{server.url}/dtd.tar.gz", hashlib.md5(archive).hexdigest()),)
    os.environ["NO_PROXY"] = "127.0.0.1"
    yield
    download.TORCHVISION["DescribableTextures"] = before
    server.shutdown()


# ---- one process ---------------------------------------------------------------------------------------------------------


def _nothing() -> None:
    pass


def _at_once(line: str) -> None:
    print(line, flush=True)


class Ended(NamedTuple):
    """``status``: as of ``subprocess``, negative where a signal ended it."""

    status: int
    out: str
    err: str


def forked(argv: list[str], output: Path, prepare: Callable[[], Callable[[], None] | None] = _nothing) -> Ended:
    """A command in a process of its own, with everything imported; ``prepare`` runs in it first, and what it gives last."""
    sys.stdout.flush(), sys.stderr.flush()
    child = os.fork()
    if not child:
        status = LOST
        try:
            for number, name in ((1, "out"), (2, "err")):
                os.dup2(os.open(output / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
            at_the_end = prepare()
            status = cli.main(argv)
            if at_the_end is not None:
                at_the_end()
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush(), sys.stderr.flush()
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return Ended(status, *((output / name).read_text(errors="replace") for name in ("out", "err")))


# ---- what is left --------------------------------------------------------------------------------------------------------


def content_of(path: Path) -> object:
    """A file as it is compared: without the seconds that something took, and the day."""
    if ".pth.tar" in path.name and not path.name.startswith("."):
        content = torch.load(path, weights_only=True)
        content["plpp_reg"].pop("seconds")
        return _plain(content)
    if path.name == "result.json":
        result = json.loads(path.read_text())
        result.pop("seconds"), result.pop("phases", None)
        return result
    if path.name == "report.html":
        text = re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", "", path.read_text())
        return re.sub(r"(?s)<[^<>]*>(training|seconds by phase)</[^<>]*>\s*<[^<>]*>[^<>]*<", "", text)  # how long it took
    if path.suffix == ".safetensors":  # its metadata come in any order
        with safe_open(path, "pt") as file:
            return file.metadata(), _plain({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _plain(value: object) -> object:
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), hashlib.sha256(value.contiguous().numpy().tobytes()).hexdigest()
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def left_in(place: Path) -> dict[str, object]:
    files = {str(p.relative_to(place)): p for p in sorted(place.rglob("*")) if not p.is_dir()}
    return {name: content_of(path) for name, path in files.items() if not OF_THE_WAY.search(name)}


def difference(left: dict[str, object], expected: dict[str, object]) -> str:
    """The first thing that is wrong, in words."""
    if gone := sorted(expected.keys() - left.keys()):
        return f"missing: {', '.join(gone[:3])}"
    if more := sorted(left.keys() - expected.keys()):
        return f"left behind: {', '.join(more[:3])}"
    if other := [name for name in expected if left[name] != expected[name]]:
        return f"different: {', '.join(other[:3])}"
    return ""


# ---- the campaign --------------------------------------------------------------------------------------------------------


class Point(NamedTuple):
    """Where a process is killed: before an operation, or within what it writes, ``size`` bytes into the file."""

    number: int
    operation: shim.Operation
    size: int | None = None

    def __str__(self) -> str:
        where = "before" if self.size is None else f"{self.size} bytes into"
        return f"{self.number}, {where} {self.operation.event} of {Path(self.operation.path).name}"


class Campaign:
    """Every point of some commands."""

    def __init__(self, folder: Path) -> None:
        self.world = make_world(folder / "source", folder / "work")
        self.prepared, self.output, self.notes = folder / "prepared", folder / "output", folder / "notes"
        self.output.mkdir()
        os.environ["PLPP_REG_CACHE"] = str(self.world.place / "cache")
        helpers.register()
        time.sleep(2.1)  # the pictures' content is remembered once they are older

    def start(self) -> None:
        """The work folder as it is before a command."""
        shutil.rmtree(self.world.place, ignore_errors=True)
        shutil.copytree(self.prepared, self.world.place)

    def forked(self, command: Command, prepare: Callable[[], Any] = _nothing) -> Ended:
        return forked(command.argv, self.output, prepare)

    def prepare(self, command: Command) -> None:
        place = self.world.place
        for folder in (place, self.prepared):
            shutil.rmtree(folder, ignore_errors=True)
        place.mkdir()
        command.make(place)
        for i, argv in enumerate(command.before):
            halved = command.halved and i == len(command.before) - 1
            ended = forked(argv, self.output, self._kill_after_an_epoch if halved else _nothing)
            assert ended.status == (-signal.SIGKILL if halved else 0), ended.err
        os.rename(place, self.prepared)

    def _kill_after_an_epoch(self) -> None:
        def act(number: int, operation: shim.Operation) -> None:
            if operation.event == "open" and operation.path.endswith(f"model.pth.tar-{EPOCHS}.tmp"):
                os.kill(os.getpid(), signal.SIGKILL)

        shim.operations(str(self.world.place), act)

    def record(self, command: Command) -> tuple[list[Point], dict[str, object], str]:
        """All points of a command, what it leaves when nobody interrupts it, and what it says."""
        self.start()

        def prepare() -> Callable[[], None]:
            found = shim.recorded(str(self.world.place))
            return lambda: self.notes.write_text(json.dumps(shim.with_sizes(found)))

        ended = self.forked(command, prepare)
        assert ended.status == 0, ended.err
        points = []
        for number, values in enumerate(json.loads(self.notes.read_text()), start=1):
            operation = shim.Operation(*values)
            points.append(Point(number, operation))
            if operation.size > operation.before:
                appended = operation.before > 0
                points.append(Point(number, operation, operation.before + 1 if appended else operation.size // 2))
        return points, left_in(self.world.place), ended.out

    def attempt(self, command: Command, point: Point, expected: dict[str, object], said: str) -> str:
        """Killed there and run again: what is wrong, or nothing."""
        self.start()
        below = str(self.world.place)
        results = {p: p.read_bytes() for p in self.world.place.rglob("result.json")}
        if point.size is None:
            killed = self.forked(command, lambda: shim.kill_before(below, point.number))
        else:
            killed = self.forked(command, lambda: shim.kill_within(below, point.number, point.size))
        if killed.status not in (-signal.SIGKILL, -signal.SIGXFSZ):
            return f"not killed: status {killed.status} {killed.err[-300:]}"
        for path in self.world.place.rglob("result.json"):
            try:
                json.loads(path.read_text())
            except ValueError:
                return f"half a result: {path}"
        for path, content in results.items():
            kept = path.is_file() or any(p.read_bytes() == content for p in self.world.place.rglob("result.json"))
            if not kept:
                return f"a finished result is gone: {path}"
        again = self.forked(command)
        if again.status:
            return f"run again: status {again.status} {again.err[-300:]}"
        if command.argv[0] in ("predict",) and again.out != said:
            return "it says something else"
        return difference(left_in(self.world.place), expected)

    def of(self, command: Command, every: int = 1, say: Callable[[str], None] = _at_once) -> tuple[int, list[str]]:
        """How many points there are, and what is wrong at some."""
        self.prepare(command)
        points, expected, said = self.record(command)
        again = self.undisturbed(command)
        wrong = [f"two uninterrupted runs differ: {w}"] if (w := difference(again, expected)) else []
        chosen = points[::every]
        for i, point in enumerate(chosen):
            if i and i % 50 == 0:
                say(f"  {i} of {len(chosen)}")
            if what := self.attempt(command, point, expected, said):
                wrong.append(f"{point}: {what}")
                say(f"  {wrong[-1]}")
        return len(chosen), wrong

    def undisturbed(self, command: Command) -> dict[str, object]:
        """What a command leaves when nobody interrupts it."""
        self.start()
        assert self.forked(command).status == 0
        return left_in(self.world.place)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--commands", nargs="+", default=[], help="these alone (default: all)")
    parser.add_argument("--every", type=int, default=1, help="every n-th point alone")
    parser.add_argument("--json", type=Path, default=None, help="write the figures here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    figures: dict[str, Any] = {}
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # no disk is waited for
    with tempfile.TemporaryDirectory(dir=memory) as temporary, local_publisher(Path(temporary)):
        campaign = Campaign(Path(temporary))
        made = commands(campaign.world)
        for name in args.commands or made:
            start = time.perf_counter()
            count, wrong = campaign.of(made[name], args.every)
            figures[name] = {"points": count, "wrong": wrong, "seconds": round(time.perf_counter() - start, 1)}
            print(f"{name}: {count - len(wrong)} of {count} right ({figures[name]['seconds']} s)", flush=True)
    points, wrong = (sum(n) for n in zip(*((f["points"], len(f["wrong"])) for f in figures.values()), strict=True))
    print(f"{len(figures)} commands, {points} kills: {points - wrong} right")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
