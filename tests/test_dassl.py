"""The Dassl adapter and its launcher, on a stand-in Dassl with the faults and a checkout that does not know plpp_reg."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from plpp_reg.errors import InputError

from helpers import engine as engine_helpers
from helpers import processes

HERE = Path(__file__).parent
HOSTS, CHECKOUT = HERE / "hosts", HERE / "hosts" / "checkout"
sys.path.insert(0, str(HOSTS))

NEW_NUMPY = not hasattr(numpy, "int")
NEW_TORCH = "verbose" not in torch.optim.lr_scheduler.LRScheduler.__init__.__code__.co_varnames


def launch(*arguments: str, cwd: Path = CHECKOUT, path: Sequence[Path] = (HOSTS,)) -> subprocess.CompletedProcess:
    """``python -m plpp_reg.dassl …`` in the checkout."""
    return processes.run(processes.DASSL, *arguments, path=path, cwd=cwd, package=False)


def command(*words: str) -> subprocess.CompletedProcess:
    """A command line as a user gives it."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HOSTS), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run([sys.executable, *words], cwd=CHECKOUT, env=env, capture_output=True, text=True)


def in_process(code: str) -> Any:
    """What a fresh interpreter prints as JSON on its last line."""
    done = processes.run(code, path=[HOSTS, CHECKOUT, HERE], package=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def weights(folder: Path, epoch: int = 3) -> dict[str, torch.Tensor]:
    from plpp_reg.engine import checkpoint

    return checkpoint.load(folder / "prompt_learner" / f"model.pth.tar-{epoch}")["state_dict"]


# ---- the launcher ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """An unedited script, three epochs of X and X_PLPP; and what stood in the checkout before and after."""
    folder = tmp_path_factory.mktemp("runs")
    before = {p: p.read_bytes() for p in HOSTS.rglob("*") if p.is_file()}
    zero = ["TRAINER.PLPP.WEIGHT", "0.0", "TRAINER.PLPP.INVERSE_WEIGHT", "0.0"]
    commands = {
        "plain": ["--trainer", "MiniCoOp"],
        "zero": ["--trainer", "MiniCoOp_PLPP", *zero],
        "plpp": ["--trainer", "MiniCoOp_PLPP"],
        "flag": ["--trainer", "MiniCoOp", "--clean", "TRAINER.PLPP.ENABLED", "True"],
    }
    done = {}
    for name, flags in commands.items():
        words = ["train.py", "--output-dir", str(folder / name), *flags]
        done[name] = command("-m", "plpp_reg.dassl", *words) if name == "plpp" else launch(*words)
        assert done[name].returncode == 0, done[name].stderr
    after = {p: p.read_bytes() for p in HOSTS.rglob("*") if p.is_file()}
    return folder, done, before, after


def test_an_unedited_script_trains_with_plpp(runs):
    _, done, *_ = runs
    assert "loss_ppl" in done["plpp"].stdout and "perplexity" in done["plpp"].stdout
    assert "loss_ppl" not in done["plain"].stdout and "loss_ppl" not in done["zero"].stdout


def test_weights_of_zero_give_the_plain_checkpoint_to_the_bit(runs):
    folder, *_ = runs
    plain, zero, plpp = (weights(folder / name) for name in ("plain", "zero", "plpp"))
    assert plain.keys() == zero.keys() == plpp.keys()
    assert all(torch.equal(t, zero[n]) for n, t in plain.items())
    assert not torch.equal(plain["ctx"], plpp["ctx"])


def test_the_flag_on_the_plain_name_is_the_same_run(runs):
    folder, *_ = runs
    flag = weights(folder / "flag")
    assert all(torch.equal(t, flag[n]) for n, t in weights(folder / "plpp").items())


def test_no_file_of_the_host_or_of_dassl_is_written(runs):
    _, _, before, after = runs
    assert before == after


@pytest.mark.skipif(not NEW_TORCH, reason="Dassl works as it is on this torch")
def test_what_is_broken_is_said_and_mended(runs):
    folder, done, *_ = runs
    lines = [line for line in done["plpp"].stdout.splitlines() if line.startswith("plpp: mended in memory: ")]
    assert [line.split(": ", 2)[2].split()[0] for line in lines] == [
        "torch.cuda.amp.GradScaler",
        "Dassl's",
        "after",
        "torch.load",
        *(["Dassl's"] if NEW_NUMPY else []),
    ]
    assert "FutureWarning" not in done["plpp"].stderr
    code = "import runpy, sys; runpy.run_path('train.py', run_name='__main__')"
    words = ["--trainer", "MiniCoOp", "--output-dir", str(folder / "unmended")]
    plain = processes.run(code, *words, path=[HOSTS], cwd=CHECKOUT, package=False)
    assert plain.returncode == 1 and "TypeError" in plain.stderr  # the stand-in has the fault


def test_a_resumed_run_has_the_learning_rates_of_one_that_was_not_interrupted(runs, tmp_path):
    folder, done, *_ = runs
    shutil.copytree(folder / "plpp", tmp_path / "cut")
    (tmp_path / "cut" / "prompt_learner" / "checkpoint").write_text("model.pth.tar-2\n")
    resumed = launch(
        "train.py", "--trainer", "MiniCoOp_PLPP", "--output-dir", str(tmp_path / "cut"), "--resume", str(tmp_path / "cut")
    )
    assert resumed.returncode == 0, resumed.stderr
    third = [line for line in done["plpp"].stdout.splitlines() if line.startswith("epoch 3 ")]
    assert [line for line in resumed.stdout.splitlines() if line.startswith("epoch")] == third
    assert all(torch.equal(t, weights(tmp_path / "cut")[n]) for n, t in weights(folder / "plpp").items())


def test_errors_are_one_line_and_status_2(tmp_path):
    for arguments, message in [
        (("trian.py",), "script: expected a file, got 'trian.py'"),
        (("train.py", "--trainer", "MiniZeroShot_PLPP"), "looked in CLIP for one parameter named ctx"),
    ]:
        done = launch(*arguments)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and message in done.stderr, done.stderr
    assert launch().returncode == 2
    empty = launch("train.py")  # the host's own error is the host's
    assert empty.returncode == 1 and "ValueError" in empty.stderr


def test_without_dassl(tmp_path):
    (tmp_path / "train.py").write_text("import plpp_reg.dassl\n")
    done = launch("train.py", cwd=tmp_path, path=[])
    assert done.returncode == 2 and "expected Dassl to be importable, got: No module named 'dassl'" in done.stderr


def test_a_checkpoint_that_would_run_code_is_refused_and_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    torch.save({"state_dict": {}, "epoch": 1, "optimizer": Evil()}, tmp_path / "evil.tar")
    answer = in_process(
        f"""
        import json
        from dassl.engine import load_checkpoint   # bound before it is mended
        from plpp_reg.dassl import patches
        from plpp_reg.errors import InputError
        patches.mend(patches.faults())
        import dassl.engine
        try:
            dassl.engine.load_checkpoint({str(tmp_path / "evil.tar")!r})
            said = "loaded"
        except InputError as e:
            said = str(e)
        print(json.dumps(said))
        """
    )
    assert "refused" in answer and "weights_only" not in answer
    assert not (tmp_path / "ran").exists()


# ---- the adapter -----------------------------------------------------------------------------------------------------

ORDERS = {
    "before": "import plpp_reg.dassl\nimport mini_trainers",
    "after": "import mini_trainers\nimport plpp_reg.dassl",
    "late": "from dassl.engine import TRAINER_REGISTRY, build_trainer\nimport plpp_reg.dassl\nimport mini_trainers",
}


@pytest.mark.parametrize("order", ORDERS)
def test_the_registry_whatever_the_order_of_imports(order):
    code = f"""{ORDERS[order]}
import json
from dassl.config import get_cfg_default
from dassl.engine import TRAINER_REGISTRY, TrainerX
from plpp_reg.dassl import patches, registry
patches.mend(patches.faults())
class Own(mini_trainers.MiniCoOp): pass
TRAINER_REGISTRY.register()(Own)                      # registered after everything
names = TRAINER_REGISTRY.registered_names()
registry.install()                                     # a second time: nothing changes
cfg = get_cfg_default()
plain = TRAINER_REGISTRY.get("MiniCoOp")(cfg)
treated = TRAINER_REGISTRY.get("MiniCoOp_PLPP")
cfg.TRAINER.PLPP.ENABLED = True
by_flag = TRAINER_REGISTRY.get("MiniCoOp")(cfg)
class Child(TRAINER_REGISTRY.get("MiniCoOp")): pass
def error(name):
    try:
        TRAINER_REGISTRY.get(name)
    except ValueError as e:
        return str(e)
print(json.dumps(dict(
    same_twice=names == TRAINER_REGISTRY.registered_names(), names=names, plain=type(plain) is mini_trainers.MiniCoOp,
    treated=treated.__name__, lazy=TRAINER_REGISTRY.get("Own_PLPP").__name__, flag=type(by_flag) is treated,
    child=type(Child(cfg)) is Child, unknown=error("MiniCoop_PLPP"), top_k=cfg.TRAINER.PLPP.TOP_K,
    prograd=registry.BACKWARD_PASS, host_trainer=issubclass(TrainerX, object))))
"""
    answer = in_process(code)
    names = answer["names"]
    assert {"MiniCoOp", "MiniCoOp_PLPP", "Own", "Own_PLPP"} <= set(names) and len(names) == len(set(names))
    assert {"CoOp", "CoOp_PLPP", "PromptSRC_PLPP", "ZeroshotCLIP"} <= set(names)  # ours
    assert answer["plain"] and answer["flag"] and answer["child"] and answer["same_twice"]
    assert (answer["treated"], answer["lazy"], answer["top_k"]) == ("MiniCoOp_PLPP", "Own_PLPP", 10)
    assert answer["unknown"].startswith("unknown trainer 'MiniCoop_PLPP': did you mean 'MiniCoOp_PLPP'?")


def test_our_trainer_on_the_hosts_data(tmp_path):
    """A host without CoOp, whose own package clip hides openai-clip: ours trains on its data, and its checkpoint loads."""
    engine_helpers.make_images(tmp_path / "data")
    backbone = engine_helpers.write_backbone(tmp_path / "clip.pt")
    code = f"""
import sys, json
sys.path.insert(0, {str(CHECKOUT)!r})
import clip                                            # the checkout's own
import mini_trainers
import plpp_reg.dassl
from dassl.config import clean_cfg, get_cfg_default
from dassl.engine import build_trainer
cfg = get_cfg_default()
cfg.merge_from_list(["TEACHER.TRAINER", "ZeroshotCLIP"])
cfg.merge_from_list(["TRAINER.COOP.N_CTX", 2, "TRAINER.COOP.PREC", "fp32", "TRAINER.NAME", sys.argv[1], "SEED", 3,
    "MODEL.BACKBONE.NAME", {str(backbone)!r}, "DATASET.NAME", "MiniData", "DATASET.ROOT", {str(tmp_path / "data")!r},
    "OUTPUT_DIR", {str(tmp_path)!r} + "/" + sys.argv[1], "OPTIM.MAX_EPOCH", 2])
clean_cfg(cfg, sys.argv[1])
cfg.freeze()
trainer = build_trainer(cfg)
trainer.train()
again = build_trainer(cfg)
again.load_model(cfg.OUTPUT_DIR, 2)
print(json.dumps([type(trainer).__name__, again.test(), trainer.trainer.plpp_acts, clip.__file__]))
"""
    results = {}
    for name in ("CoOp", "CoOp_PLPP", "CoOp_KDPL"):
        done = processes.run(code, name, path=[HOSTS, HERE], package=False)
        assert done.returncode == 0, done.stderr
        answer = json.loads(done.stdout.splitlines()[-1])
        result = json.loads((tmp_path / name / "result.json").read_text())
        assert answer == [
            name,
            pytest.approx(result["metrics"]["accuracy"]),
            name.endswith("_PLPP"),
            str(CHECKOUT / "clip/__init__.py"),
        ]
        results[name] = result
    assert results["CoOp"]["config"]["OPTIM.LR"] == 0.05 and results["CoOp"]["dataset"] == "MiniData"
    assert "ppl" in results["CoOp_PLPP"]["losses"]
    assert {result["config"]["TRAINER.COOP.N_CTX"] for result in results.values()} == {2}
    assert (
        set(results["CoOp_KDPL"]["losses"]) == {"loss", "kd"} and results["CoOp_KDPL"]["teacher"]["trainer"] == "ZeroshotCLIP"
    )
    # the same files as our own run of the same data set
    assert results["CoOp"]["files_sha256"] == engine_helpers.read_tiny(tmp_path / "data").sha256()


# ---- mending ---------------------------------------------------------------------------------------------------------


def test_nothing_that_works_is_mended():
    """A Dassl that somebody has put right, and torch without the deprecation: every fault tried out, none found."""
    code = """
import sys, types, json, torch
from torch.optim.lr_scheduler import LRScheduler
import dassl.optim.lr_scheduler as s, dassl.utils.torchtools as t, dassl.utils, dassl.engine
class Fixed(LRScheduler):
    def __init__(self, optimizer, successor, warmup_epoch, cons_lr, last_epoch=-1):
        self.successor, self.warmup_epoch, self.cons_lr = successor, warmup_epoch, cons_lr
        super().__init__(optimizer, last_epoch)
    def step(self, epoch=None):
        if self.last_epoch >= self.warmup_epoch:
            self.successor.step()
        else:
            super().step()
    get_lr = s.ConstantWarmupScheduler.get_lr
    def state_dict(self):
        return {**super().state_dict(), "successor": self.successor.state_dict()}
    def load_state_dict(self, state):
        self.successor.load_state_dict(state.pop("successor"))
        super().load_state_dict(state)
s.ConstantWarmupScheduler = Fixed
from dassl.data.transforms import randaugment
randaugment.SolarizeAdd = lambda image: image
from plpp_reg.dassl import patches
loader, bases = t.load_checkpoint, Fixed.__bases__
lines = patches.mend(patches.faults())
first = patches.mend(patches.before_import())
print(json.dumps([lines, t.load_checkpoint is loader, Fixed.__bases__ == bases, patches.mend(patches.before_import())]))
"""
    lines, same_loader, same_bases, second = in_process(code)
    assert lines == [] and same_loader and same_bases and second == []


def test_each_fault_is_found_and_gone_once_mended():
    code = """
import json
import plpp_reg.dassl
from plpp_reg.dassl import patches
found = []
for fault in [*patches.before_import(), *patches.faults()]:
    broken = fault.broken()
    if broken: fault.mend()
    found.append([fault.name, broken, fault.broken()])
print(json.dumps(found))
"""
    found = in_process(code)
    assert [name for name, *_ in found] == [
        "amp names", "scheduler signature", "frozen learning rate", "checkpoints under weights_only", "numpy's old names",
    ]  # fmt: skip
    assert not any(after for _, _, after in found)
    assert [broken for _, broken, _ in found][2:] == [True, True, NEW_NUMPY]
    if NEW_TORCH:
        assert all(broken for _, broken, _ in found)


def test_the_mended_amp_names_do_what_they_did():
    from plpp_reg.dassl import patches

    scaler = patches._GradScaler(init_scale=8.0, enabled=False)
    assert isinstance(scaler, torch.amp.GradScaler) and scaler._device == "cuda"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        context = patches._autocast(dtype=torch.bfloat16, enabled=False)
    assert (context.device, context.fast_dtype) == ("cuda", torch.bfloat16)


def test_objects_in_a_checkpoint_are_data():
    import io

    from plpp_reg.dassl import patches
    from plpp_reg.io.safe_reading import objects_as_data

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.3)
    buffer = io.BytesIO()
    torch.save({"schedule": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5.0)}, buffer)
    with pytest.raises(pickle.UnpicklingError):
        buffer.seek(0)
        torch.load(buffer, weights_only=True)
    with objects_as_data(patches.optimizers_and_schedulers()):
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=True)["schedule"]
    assert not isinstance(loaded, torch.optim.lr_scheduler.LRScheduler) and loaded.T_max == 5.0
    assert loaded.optimizer.param_groups[0]["lr"] == 0.3
    with pytest.raises(pickle.UnpicklingError):  # and afterwards torch's own list is as it was
        buffer.seek(0)
        torch.load(buffer, weights_only=True)


def test_the_launchers_import_waits_for_the_path(monkeypatch):
    from plpp_reg import dassl

    monkeypatch.setattr(sys, "argv", ["-m", "train.py"])
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "plpp_reg.dassl", "train.py"])
    assert dassl._being_launched()
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "pytest", "plpp_reg.dassl"])
    assert not dassl._being_launched()
    assert issubclass(InputError, ValueError)
