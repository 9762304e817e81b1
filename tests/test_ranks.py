"""One run over two processes gives what one process gives: gloo on the CPU, in some tests by torchrun's agent."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
from pathlib import Path
from subprocess import DEVNULL

import pytest
import torch

from plpp_reg.engine import checkpoint

from helpers import engine as helpers
from helpers import processes

RUN = """
import json, os, sys
from helpers import engine as engine_helpers
engine_helpers.register()
from plpp_reg.commands.cli import main
from plpp_reg.clip.text import TextTower
from plpp_reg.clip.vision import ImageTower
from plpp_reg.engine.trainer import Trainer

def watch(cls, name, note):
    original = getattr(cls, name)
    def watched(self, *args, **kwargs):
        result = original(self, *args, **kwargs)
        note(result, *args)
        return result
    setattr(cls, name, watched)

watch(TextTower, "forward", lambda out, *more: seen["prompts"].append(out.features.shape[:-1].numel()))
watch(ImageTower, "forward", lambda _, images, *more: seen["images"].append(len(images)))
watch(Trainer, "step", lambda values, *more: seen["steps"].append(values))
for line in json.load(open(sys.argv[1])):
    seen = {"prompts": [], "images": [], "steps": []}
    if (status := main(line)) != 0:
        sys.exit(status)
    with open(line[line.index("--output-dir") + 1] + f".rank{os.environ.get('RANK', 0)}.json", "w") as file:
        json.dump(seen, file)
"""
# two processes of torchrun's agent, each of which runs the code
AGENT = """
import os, sys
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
# what torchrun --standalone makes of its flags, but for the fork and the names
two = LaunchConfig(
    min_nodes=1,
    max_nodes=1,
    nproc_per_node=2,
    run_id="test",
    rdzv_backend="c10d",
    rdzv_endpoint="localhost:0",
    max_restarts=0,
    start_method="fork" if hasattr(os, "fork") else "spawn",
)
elastic_launch(two, exec)(sys.argv[1], {})
"""
CASES = {
    "shared": ("CoOp_PLPP", ()),
    "class-specific": ("CoOp_PLPP", ("TRAINER.COOP.CSC", "True")),
    "middle": ("CoOp_PLPP", ("TRAINER.COOP.CLASS_TOKEN_POSITION", "middle")),
    "cocoop": ("CoCoOp_PLPP", ()),
    "kgcoop": ("KgCoOp_PLPP", ()),
    "prograd": ("ProGrad_PLPP", ()),
    "maple": ("MaPLe_PLPP", ()),
    "promptsrc": ("PromptSRC_PLPP", ("FEATURES.MAX_GIB", "1.0")),
    "fdbpl": ("FDBPL_PLPP", ("TRAINER.FDBPL.PLPP_ON", "both", "TEACHER.TRAINER", "ZeroshotCLIP2")),
    "kdpl": ("CoOp_KDPL_PLPP", ("TEACHER.TRAINER", "ZeroshotCLIP2")),
    "promptsrc_kdpl": ("PromptSRC_KDPL", ("TEACHER.TRAINER", "ZeroshotCLIP2", "FEATURES.MAX_GIB", "1.0")),
}
TAUGHT = ("fdbpl", "kdpl", "promptsrc_kdpl")
HALF = ("TRAIN.CHECKPOINT_FREQ", "1")
BEST = ("TEST.FINAL_MODEL", "best_val")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    helpers.make_images(folder / "images")
    helpers.write_backbone(folder / "clip.pt")
    node = {"PREC": "fp32"}
    deep = {"PROMPT_DEPTH_TEXT": 2, "PROMPT_DEPTH_VISION": 1, **node}
    helpers.write_recipe(
        folder / "recipe.yaml",
        TRAINER__COCOOP={"N_CTX": 2, **node},
        TRAINER__MAPLE={"PROMPT_DEPTH": 1, **node},
        TRAINER__PROMPTSRC={**deep, "GPA_MEAN": 1.0},
        TRAINER__FDBPL=node,
        TRAINER__PLPP={"NORMALIZE_OVER": "vocabulary"},
    )
    (folder / "dataset.yaml").write_text("DATASET:\n  NAME: tiny\n")
    return folder


def line(world: Path, name: str, trainer: str, *opts: str) -> list[str]:
    out = ["train", "--trainer", trainer, "--root", str(world / "images"), "--backbone", str(world / "clip.pt")]
    out += ["--config-file", str(world / "recipe.yaml"), "--dataset-config-file", str(world / "dataset.yaml")]
    return [*out, "--output-dir", str(world / name), "USE_CUDA", "False", *opts]


def start(world: Path, n: int, lines: list[list[str]]) -> None:
    """Run command lines one after another in a process of their own, or in several with the variables that torchrun sets."""
    (world / f"lines-{n}.json").write_text(json.dumps(lines))
    for _ in range(5):
        went_well = try_to_start(world, n)
        said = (world / f"errors-{n}.txt").read_text()
        if went_well or "EADDRINUSE" not in said:
            break  # else somebody took the port before the first process did, and no command line has begun
    assert went_well, said[-3000:]


def try_to_start(world: Path, n: int) -> bool:
    """Whether every process ended well; what they say stands in ``errors-{n}.txt``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(n), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common |= {"TORCHELASTIC_RUN_ID": "test"} if n > 1 else {}
    with (world / f"errors-{n}.txt").open("w") as errors, contextlib.ExitStack() as together:
        ranks = []
        for rank in map(str, range(n)):
            env = {**common, "RANK": rank, "LOCAL_RANK": rank, "PLPP_REG_CACHE": str(world / f"cache-{n}")}
            process = processes.started(RUN, str(world / f"lines-{n}.json"), env=env, stdout=DEVNULL, stderr=errors)
            ranks.append(together.enter_context(process))
        processes.until(lambda: any(rank.poll() for rank in ranks) or all(rank.poll() == 0 for rank in ranks))
        return not any(rank.poll() for rank in ranks)


def by_agent(world: Path, lines: list[list[str]]) -> subprocess.CompletedProcess:
    """Run command lines one after another in each of two processes that torchrun's agent starts."""
    (world / "lines.json").write_text(json.dumps(lines))
    code = f"import sys; sys.argv[1:] = {[str(world / 'lines.json')]}\n{RUN}"
    return processes.run(AGENT, code, env={"PLPP_REG_CACHE": str(world / "cache-2")})


@pytest.fixture(scope="module")
def runs(world: Path) -> Path:
    """Every case by one process and by two."""
    for n in (1, 2):
        lines = [line(world, f"{case}-{n}", trainer, *opts) for case, (trainer, opts) in CASES.items()]
        lines.append(line(world, "half", "CoOp_PLPP", *HALF) if n == 1 else line(world, "best", "CoOp_PLPP", *BEST))
        start(world, n, lines)
    return world


def trained(folder: Path) -> dict[str, torch.Tensor]:
    (place,) = (p.parent for p in folder.rglob("model.pth.tar-2"))
    return checkpoint.load(place / "model.pth.tar-2")["state_dict"]


def seen(folder: Path, rank: int = 0) -> dict[str, list]:
    """Of a run in one process: prompts of each text pass, images of each image pass, what each step logged."""
    return json.loads(folder.with_name(f"{folder.name}.rank{rank}.json").read_text())


@pytest.mark.parametrize("case", CASES)
def test_each_process_encodes_its_share(runs: Path, case: str) -> None:
    """Of the classes, in CoCoOp of the images with all classes; what a teacher's templates say is each one's to know."""
    alone, *shares = seen(runs / f"{case}-1"), *(seen(runs / f"{case}-2", rank) for rank in (0, 1))
    taught = [1] if case in ("kgcoop", "prograd", "promptsrc", "promptsrc_kdpl") else []
    an_item = {"cocoop": len(helpers.CLASSNAMES), "fdbpl": 2}.get(case, 1)  # of FDBPL, by both contexts
    in_words = len(helpers.CLASSNAMES) if case in ("class-specific", "middle") else 1  # the context, before and after
    in_words *= 2 if case == "fdbpl" else 1
    for one in (alone, *shares):
        if case in TAUGHT:  # the teacher's eight templates, before anything
            encoded = one["prompts"][0] == 8 * len(helpers.CLASSNAMES)
            # where features are kept, a process that is late finds what the other one has encoded
            assert encoded or case == "promptsrc_kdpl" and one is not alone
            del one["prompts"][: int(encoded)]
        assert [one["prompts"].pop(0), one["prompts"].pop()] == [in_words, in_words]  # the same for every process
    assert len(alone["prompts"]) - len(taught) >= 9  # the steps', and the test's
    for number, (whole, *parts) in enumerate(zip(alone["prompts"], *(share["prompts"] for share in shares), strict=True)):
        if number in taught:
            assert parts == [whole, whole]
        else:
            assert sum(parts) == whole and abs(parts[0] - parts[1]) <= an_item
    # in all, as the few images of a canonical batch are the first one's
    assert sum(sum(share["images"]) for share in shares) == sum(alone["images"]) > 0


@pytest.mark.parametrize("case", CASES)
def test_two_processes_give_what_one_gives(runs: Path, case: str) -> None:
    alone, together = runs / f"{case}-1", runs / f"{case}-2"
    steps_alone, steps = (seen(folder)["steps"] for folder in (alone, together))
    assert len(steps) == len(steps_alone) == 8  # two epochs
    for number, (values, wanted) in enumerate(zip(steps, steps_alone, strict=True)):
        assert values == pytest.approx(wanted, rel=1e-5, abs=1e-9), f"step {number + 1}"
    one, two = trained(alone), trained(together)
    assert one.keys() == two.keys()
    for name in one:
        assert (two[name] - one[name]).abs().max() <= 1e-5 * one[name].abs().max(), name
    a, b = (json.loads((folder / "result.json").read_text()) for folder in (alone, together))
    assert b["metrics"] == pytest.approx(a["metrics"], rel=1e-5)
    assert b["losses"] == pytest.approx(a["losses"], rel=1e-5)
    names = {p.relative_to(alone).as_posix() for p in alone.rglob("*") if "tensorboard" not in p.parts}
    assert names == {p.relative_to(together).as_posix() for p in together.rglob("*") if "tensorboard" not in p.parts}


def test_the_cases_learn_something_of_their_own(runs: Path) -> None:
    contexts = [next(t for n, t in trained(runs / f"{case}-1").items() if n.endswith("ctx")) for case in CASES]
    shared = [c for c in contexts if c.shape == contexts[0].shape]
    assert len(shared) >= 4
    assert all(not torch.allclose(a, b, atol=1e-4) for i, a in enumerate(shared) for b in shared[:i])


@pytest.fixture(scope="module")
def again(runs: Path) -> subprocess.CompletedProcess:
    """Two processes that go on with two runs, and are given one that they cannot share."""
    half = runs / "half"  # as though it had been killed after its first epoch
    (half / "result.json").unlink()
    (half / "prompt_learner" / "checkpoint").write_text("model.pth.tar-1\n")
    (half / "prompt_learner" / "model.pth.tar-2").unlink()
    (runs / "best" / "result.json").rename(runs / "best.json")
    odd = line(runs, "odd", "CoOp", "DATALOADER.TRAIN_X.BATCH_SIZE", "5")
    return by_agent(runs, [line(runs, "half", "CoOp_PLPP", *HALF), line(runs, "best", "CoOp_PLPP", *BEST), odd])


def test_a_run_goes_on_with_another_number_of_processes(runs: Path, again: subprocess.CompletedProcess) -> None:
    assert "Resumed from" in again.stdout and (runs / "half" / "result.json").is_file(), again.stderr[-3000:]
    torch.testing.assert_close(trained(runs / "half")["ctx"], trained(runs / "shared-1")["ctx"], rtol=1e-5, atol=1e-5)


def test_a_run_killed_before_its_test_goes_on_from_its_best(runs: Path, again: subprocess.CompletedProcess) -> None:
    first, then = (json.loads(path.read_text()) for path in (runs / "best.json", runs / "best" / "result.json"))
    assert then["metrics"] == pytest.approx(first["metrics"], rel=1e-5)


def test_a_batch_that_cannot_be_shared_is_refused(runs: Path, again: subprocess.CompletedProcess) -> None:
    assert again.returncode != 0 and not (runs / "odd").exists()
    assert "expected a batch that 2 processes can share equally, got 5 images" in again.stderr


def test_four_processes_for_five_classes(world: Path) -> None:
    """One process has two classes, the others one: a mean over classes is not the mean of the processes' means."""
    cases = {"class-specific": CASES["class-specific"][1], "front": ("TRAINER.COOP.CLASS_TOKEN_POSITION", "front")}
    even = ("DATALOADER.TRAIN_X.BATCH_SIZE", "4")
    for n in (1, 4):
        start(world, n, [line(world, f"four-{case}-{n}", "CoOp_PLPP", *opts, *even) for case, opts in cases.items()])
    for case in cases:
        one, four = (trained(world / f"four-{case}-{n}")["ctx"] for n in (1, 4))
        torch.testing.assert_close(four, one, rtol=1e-5, atol=1e-5)
