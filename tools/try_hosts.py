"""Run foreign Dassl checkouts, unedited, with and without PLPP, on random weights and a small image folder (docs/hosts.md).

    python tools/try_hosts.py --hosts FOLDER --work FOLDER [--only CoOp MaPLe …]

FOLDER of --hosts holds the checkouts by their repositories' names: Dassl.pytorch, CoOp, multimodal-prompt-learning, PromptSRC,
KgCoOp, and whatever else of CASES is to be run. Nothing is written there. In --work: weights, images in Caltech101's layout,
the runs, and ``report.json``.

Each run is ``python -m plpp_reg.dassl train.py …`` in the checkout, behind a few lines (``inside``) that stand for what a
user's machine has: they name the checksum of the random weights as that of ViT-B/16, and make no-operations of ``.cuda()`` and
``.half()`` where a host calls them whatever its configuration says. Each such host is also run once without that.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

CLASSES = ["accordion", "cougar_body", "face", "grand_piano", "leopard", "wild_cat"]
WEIGHTS = {"ViT-B/16": "ViT-B-16.pt", "RN50": "RN50.pt"}


class Case(NamedTuple):
    """One trainer of one checkout."""

    checkout: str
    config: str  # below configs/trainers
    model: str  # the folder of its checkpoints
    opts: tuple[str, ...]
    idle: str = ""  # methods of tensors and modules that are written into it, and that the wrapper makes no-operations
    dassl: str = "Dassl.pytorch"
    trainer: str = ""  # where it is not the case's own name


BATCH = ("DATALOADER.TRAIN_X.BATCH_SIZE", "4")
MULTIMODAL = "multimodal-prompt-learning"
KDPL = ("TRAINER.KDPL.PREC", "fp32", "MODEL.BACKBONE.NAME", "ViT-B/16")
CLIPS = ("clip.clip", "clip_maple.clip", "trainers.clip_text.clip")  # a checkout's own copies
KGCOOP = {"checkout": "KgCoOp/KgCoOp", "model": "prompt_learner", "idle": "cuda", "dassl": "KgCoOp/Dassl.ProGrad.pytorch"}
CASES = {
    "CoOp": Case("CoOp", "CoOp/vit_b16_ep50", "prompt_learner", (*BATCH, "TRAINER.COOP.PREC", "fp32")),
    "CoCoOp": Case(
        "CoOp",
        "CoCoOp/vit_b16_c4_ep10_batch1",
        "prompt_learner",
        ("DATALOADER.TRAIN_X.BATCH_SIZE", "2", "TRAINER.COCOOP.PREC", "fp32"),
    ),
    "MaPLe": Case(
        MULTIMODAL, "MaPLe/vit_b16_c2_ep5_batch4_2ctx", "MultiModalPromptLearner", ("TRAINER.MAPLE.PREC", "fp32"), "half"
    ),
    "IVLP": Case(MULTIMODAL, "IVLP/vit_b16_c2_ep5_batch4_2+2ctx", "VLPromptLearner", ("TRAINER.IVLP.PREC", "fp32")),
    "PromptSRC": Case(
        "PromptSRC",
        "PromptSRC/vit_b16_c2_ep20_batch4_4+4ctx",
        "VLPromptLearner",
        ("TRAINER.PROMPTSRC.PREC", "fp32"),
        idle="cuda half",
    ),
    "KgCoOp": Case(config="KgCoOp/vit_b16_ep100_ctxv1", opts=(*BATCH, "TRAINER.COOP.PREC", "fp32"), **KGCOOP),
    "ProGrad": Case(
        config="ProGrad/rn50_ep100",
        opts=(*BATCH, "TRAINER.COOP.PREC", "fp32", "MODEL.BACKBONE.NAME", "ViT-B/16", "LOSS.NAME", "prograd"),
        **KGCOOP,
    ),
    "CoOp_KDPL": Case("KDPL/src", "CoOp_KDPL/vit_b32", "prompt_learner", (*BATCH, "TRAINER.COOP.PREC", "fp32", *KDPL), "cuda"),
    "CoCoOp_KDPL": Case(
        "KDPL/src",
        "CoCoOp_KDPL/vit_b32",
        "prompt_learner",
        ("DATALOADER.TRAIN_X.BATCH_SIZE", "2", "TRAINER.COCOOP.PREC", "fp32", "TRAINER.COOP.PREC", "fp32", *KDPL),
        "cuda",
    ),
    "MaPLe_KDPL": Case(
        "KDPL/src", "MaPLe_KDPL/vit_b32", "MultiModalPromptLearner", ("TRAINER.MAPLE.PREC", "fp32", *KDPL), "cuda half"
    ),
    "PromptSRC_KDPL": Case(
        "KDPL/src",
        "PromptSRC_KDPL/vit_b32_c2_ep20_batch4_4+4ctx",
        "VLPromptLearner",
        ("TRAINER.PROMPTSRC.PREC", "fp32", *KDPL),
        "cuda half",
    ),
    "PromptSRC of PromptKD": Case(
        "PromptKD",
        "PromptSRC/vit_b16_c2_ep20_batch4_4+4ctx",
        "VLPromptLearner",
        ("TRAINER.PROMPTSRC.PREC", "fp32"),
        "cuda half",
        "PromptKD/Dassl.pytorch",
        "PromptSRC",
    ),
    "TCP": Case(
        "Textual-based_Class-aware_prompt_tuning",
        "TCP/vit_b16_ep100_ctxv1",
        "prompt_learner",
        (*BATCH, "TRAINER.COOP.PREC", "fp32", "TRAINER.COOP.CTX_INIT", "True"),
        "cuda half",
    ),
    "PLOT": Case(
        "PLOT/plot-coop", "PLOT/rn50", "prompt_learner", (*BATCH, "TRAINER.PLOT.PREC", "fp32", "MODEL.BACKBONE.NAME", "RN50")
    ),
    "ExtrasLinearProbeCoOp": Case(
        "DePT", "ExtrasLinearProbeCoOp/", "PromptLearner", ("TRAINER.COOP.PREC", "fp32", "DATASET.SUBSAMPLE_CLASSES", "base")
    ),
    "ExtrasLinearProbeMaPLe": Case(
        "DePT",
        "ExtrasLinearProbeMaPLe/",
        "MultiModalPromptLearner",
        ("TRAINER.MAPLE.PREC", "fp32", "DATASET.SUBSAMPLE_CLASSES", "base"),
        "half",
    ),
    "CoPrompt": Case("CoPrompt", "coprompt", "MultiModalPromptLearner", ("TRAINER.CoPrompt.PREC", "fp32"), "half"),
    "VPT": Case(
        "Bayesian-Prompt-Learning",
        "VPT/vit_b16_c4_ep10_batch1_ctxv1",
        "prompt_learner",
        ("DATALOADER.TRAIN_X.BATCH_SIZE", "1", "TRAINER.VPT.PREC", "fp32", "TRAINER.VPT.L", "3"),
    ),
}


def make_weights(folder: Path) -> None:
    """Random CLIPs with the widths of ViT-B/16 and RN50 (hosts have 512 and 768 written in), as state_dicts in float16.

    The text tower has nine layers, for hosts that do something in the eighth; the image towers have few.
    """
    import torch

    from plpp_reg.clip.load import openai_clip

    folder.mkdir(parents=True, exist_ok=True)
    for backbone, vision in (("ViT-B/16", (32, 3, 768, 16)), ("RN50", (32, (1, 1, 1, 1), 64, None))):
        torch.manual_seed(0)
        model = openai_clip().model.CLIP(512 if backbone == "ViT-B/16" else 1024, *vision, 77, 49408, 512, 8, 9)
        torch.save({name: t.half() for name, t in model.state_dict().items()}, folder / WEIGHTS[backbone])


def make_images(root: Path) -> None:
    """caltech-101/101_ObjectCategories/<class>/image_<n>.jpg, and the split file."""
    from PIL import Image

    rng = random.Random(0)
    folder = root / "caltech-101"
    split: dict[str, list] = {"train": [], "val": [], "test": []}
    for label, name in enumerate(CLASSES):
        colour = [rng.randrange(40, 215) for _ in range(3)]
        (folder / "101_ObjectCategories" / name).mkdir(parents=True, exist_ok=True)
        for n in range(8):
            noise = bytes(min(255, max(0, int(c + rng.gauss(0, 40)))) for _ in range(40 * 36) for c in colour)
            file = f"{name}/image_{n:04d}.jpg"
            Image.frombytes("RGB", (40, 36), noise).save(folder / "101_ObjectCategories" / file)
            split["train" if n < 4 else "val" if n < 5 else "test"].append([file, label, name])
    (folder / "split_zhou_Caltech101.json").write_text(json.dumps(split))


def inside(folder: str, mode: str, idle: str, arguments: list[str]) -> int:
    """In the checkout: the launcher, with the random weights' checksums as the expected ones."""
    sys.path.insert(0, os.getcwd())
    import torch

    for name in CLIPS:
        try:
            clip = importlib.import_module(name)
        except ImportError:
            continue
        for backbone, file in WEIGHTS.items():
            clip._MODELS[backbone] = f"random/{hashlib.sha256((Path(folder) / file).read_bytes()).hexdigest()}/{file}"
    if "KDPL" in os.getcwd():
        import open_clip

        open_clip.create_model_and_transforms = small_teacher
    for name in idle.split():
        for kind in (torch.Tensor, torch.nn.Module):
            setattr(kind, name, lambda self, *args, **kwargs: self)
    if mode == "gradient":
        from dassl.engine import SimpleTrainer

        SimpleTrainer.train = compare_gradients
    from plpp_reg.dassl.__main__ import main

    return main(arguments)


def small_teacher(*args: Any, **kwargs: Any) -> tuple[Any, None, None]:
    """In place of open_clip's ViT-H/14, which KDPL downloads."""
    import open_clip
    import torch

    torch.manual_seed(0)
    vision = {"image_size": 32, "patch_size": 16, "width": 64, "layers": 1, "head_width": 32}
    return open_clip.CLIP(64, vision, {"vocab_size": 49408, "width": 64, "heads": 2, "layers": 1}), None, None


def compare_gradients(trainer: Any) -> None:
    """In place of training: one batch's gradient with PLPP attached, and the sum of the host's own and the term's by hand.

    By hand: every text pass's prompts and states, its distinct contexts once, at the graph of the host's own step.
    """
    import torch

    handle = trainer.plpp
    trainer.set_model_mode("train")
    trainer.epoch, trainer.batch_idx, trainer.num_batches = 0, 0, 99
    batch = next(iter(trainer.train_loader_x))
    parameters = {n: p for n, p in handle.model.named_parameters() if p.requires_grad}
    for optimizer in trainer._optims.values():
        if optimizer is not None:
            optimizer.step = lambda *args, **kwargs: None
    backward = torch.Tensor.backward
    torch.Tensor.backward = lambda loss, *args, **kwargs: backward(loss, *args, **{**kwargs, "retain_graph": True})

    def step() -> dict[str, torch.Tensor]:
        torch.manual_seed(0)  # of hosts that sample
        random.seed(0)
        trainer.forward_backward(batch)
        return {n: p.grad.double() if p.grad is not None else torch.zeros_like(p).double() for n, p in parameters.items()}

    attached = step()
    regularizer, encoder, context = handle.regularizer, handle.text_encoder, handle.context
    handle.remove()
    trainer._plpp_figures = dict  # nothing is attached any more
    passes: list[tuple[torch.Tensor, torch.Tensor]] = []
    prompts: list[torch.Tensor] = []

    def note(norm: torch.nn.Module, args: Any, states: torch.Tensor) -> None:
        if prompts[-1].requires_grad:  # not a teacher's
            passes.append((prompts[-1], states if len(states) == len(prompts[-1]) else states.transpose(0, 1)))

    encoder.register_forward_pre_hook(lambda m, args: prompts.append(args[0]))
    encoder.ln_final.register_forward_hook(note)
    plain = step()
    m, terms = context.shape[-2], []
    for p, h in passes:
        rows: list[int] = []  # one of each: its vectors and the states before them are not those of another
        for i in range(len(p)):
            if not any(
                torch.equal(p[i, : 1 + m], p[j, : 1 + m]) and torch.allclose(h[i, :m], h[j, :m], 1e-5, 1e-5) for j in rows
            ):
                rows.append(i)
        terms.append(regularizer(p[rows, 1 : 1 + m], h[rows, 0:m]))
    names = list(parameters)
    by_hand = torch.autograd.grad(sum(terms) / len(terms), [parameters[n] for n in names], allow_unused=True)
    worst, moved = 0.0, 0.0
    for n, g in zip(names, by_hand, strict=True):
        wanted = plain[n] + (0 if g is None else g.double())
        if wanted.norm() > 0:
            worst = max(worst, ((attached[n] - wanted).norm() / wanted.norm()).item())
            moved = max(moved, ((attached[n] - plain[n]).norm() / wanted.norm()).item())
    print(f"gradients: {len(names)} tensors, {len(terms)} text pass(es), relative difference {worst:.1e}, share {moved:.1e}")


class Bench:
    """Where things are, and how a host is run."""

    def __init__(self, hosts: Path, work: Path, gradient_alone: bool = False) -> None:
        self.hosts, self.work, self.gradient_alone = hosts.resolve(), work.resolve(), gradient_alone
        self.weights = self.work / "home" / ".cache" / "clip"
        if not all((self.weights / file).is_file() for file in WEIGHTS.values()):
            make_weights(self.weights)
            make_images(self.work / "data")

    def run(
        self,
        name: str,
        trainer: str,
        folder: str,
        *flags: str,
        opts: tuple[str, ...] = (),
        mode: str = "train",
        idle: bool = True,
    ) -> dict[str, Any]:
        """One command in the checkout; what it printed, in figures. ``idle`` False: no method is made a no-operation."""
        case = CASES[name]
        checkout, out = self.hosts / case.checkout, self.work / "runs" / name / folder
        config = next((checkout / "configs" / "trainers").glob(f"{case.config}*.yaml"))
        command = ["train.py", "--root", str(self.work / "data"), "--seed", "1", "--trainer", trainer, *flags]
        command += ["--dataset-config-file", "configs/datasets/caltech101.yaml"]
        command += ["--config-file", str(config.relative_to(checkout)), "--output-dir", str(out)]
        command += ["DATASET.NUM_SHOTS", "4", "OPTIM.MAX_EPOCH", "3", "TRAIN.CHECKPOINT_FREQ", "1", "TRAIN.PRINT_FREQ", "1"]
        command += ["DATALOADER.NUM_WORKERS", "0", "INPUT.SIZE", "(32, 32)", *case.opts, *opts]
        dassl = os.pathsep.join([str(self.hosts / case.dassl), os.environ.get("PYTHONPATH", "")])
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, __file__, "--inside", str(self.weights), mode, case.idle if idle else "", *command],
            cwd=checkout,
            env={**os.environ, "HOME": str(self.work / "home"), "PYTHONPATH": dassl},
            input="c\n",  # one stops in a debugger
            capture_output=True,
            text=True,
        )
        out.mkdir(parents=True, exist_ok=True)
        (out / "terminal.txt").write_text(done.stdout + done.stderr)
        said = done.stdout
        if "batch [" not in said and "gradients:" not in said:  # one writes to its log alone
            said += "".join(path.read_text() for path in sorted(out.glob("log.txt*"), key=os.path.getmtime)[-1:])
        numbers = {key: re.findall(rf" {key} (\S+) \(", said) for key in ("loss_ppl", "loss_inverse_ppl", "perplexity")}
        return {
            "command": " ".join(command).replace(str(self.work), "WORK"),
            "status": done.returncode,
            "seconds": round(time.perf_counter() - start, 1),
            "error": done.stderr.strip().splitlines()[-1:] if done.returncode else [],
            "mended": re.findall(r"^plpp: mended in memory: (.*)", said, re.M),
            "accuracy": re.findall(r"accuracy: ([\d.]+)%", said),
            "lr": sorted({float(lr) for lr in re.findall(r"epoch \[3/3\].* lr (\S+)", said)}),
            "first_and_last": {key: [values[0], values[-1]] for key, values in numbers.items() if values},
            "gradients": re.findall(r"gradients: (\d.*)", said),
            "epochs": sorted(set(re.findall(r"epoch \[(\d)/3\]", said))),
        }

    def weights_of(self, name: str, folder: str, epoch: int = 3) -> dict[str, Any]:
        from plpp_reg.engine import checkpoint

        return checkpoint.load(self.work / "runs" / name / folder / CASES[name].model / f"model.pth.tar-{epoch}")["state_dict"]

    def same(self, name: str, a: str, b: str) -> bool:
        """Whether two runs' last checkpoints hold the same bits."""
        import torch

        first, second = self.weights_of(name, a), self.weights_of(name, b)
        return first.keys() == second.keys() and all(torch.equal(t, second[n]) for n, t in first.items())

    def try_host(self, name: str) -> dict[str, Any]:
        """Train, test, save, resume, evaluate; with PLPP, without, and with weights of 0."""
        runs = self.work / "runs" / name
        trainer = CASES[name].trainer or name
        shutil.rmtree(runs, ignore_errors=True)
        found: dict[str, Any] = {"gradient": self.run(name, trainer + "_PLPP", "gradient", mode="gradient")}
        if self.gradient_alone:
            return found
        plain = found["plain"] = self.run(name, trainer, "plain")
        if CASES[name].idle:
            found["as it is"] = self.run(name, trainer, "as_it_is", idle=False)["error"]
        if plain["status"]:
            return found
        zero = ("TRAINER.PLPP.WEIGHT", "0.0", "TRAINER.PLPP.INVERSE_WEIGHT", "0.0")
        found["weights 0"] = self.run(name, trainer + "_PLPP", "zero", opts=zero)
        found["PLPP"] = self.run(name, trainer + "_PLPP", "plpp")
        found["flag"] = self.run(name, trainer, "flag", opts=("TRAINER.PLPP.ENABLED", "True"))
        shutil.copytree(runs / "plpp", runs / "resumed")
        inside = runs / "resumed" / CASES[name].model
        (inside / "model.pth.tar-3").unlink()
        (inside / "checkpoint").write_text("model.pth.tar-2\n")
        found["resumed"] = self.run(name, trainer + "_PLPP", "resumed", "--resume", str(runs / "resumed"))
        flags = ("--eval-only", "--model-dir", str(runs / "plpp"), "--load-epoch", "3")
        found["evaluated"] = self.run(name, trainer, "evaluated", *flags)
        found["checks"] = {
            "weights 0: same bits as plain": self.same(name, "plain", "zero"),
            "PLPP: other bits than plain": not self.same(name, "plain", "plpp"),
            "ENABLED True on X: same bits as X_PLPP": self.same(name, "plpp", "flag"),
            "resumed: third epoch only, at the same learning rate": found["resumed"]["epochs"] == ["3"]
            and found["resumed"]["lr"] == found["PLPP"]["lr"],
            "the plain host evaluates the PLPP checkpoint alike": found["evaluated"]["accuracy"][-1:]
            == found["PLPP"]["accuracy"][-1:]
            != [],
        }
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument(
        "--gradient-alone", action="store_true", help="one step with PLPP, its gradient compared; no whole runs"
    )
    args = parser.parse_args()
    bench = Bench(args.hosts, args.work, args.gradient_alone)
    report = bench.work / "report.json"
    results = json.loads(report.read_text()) if report.is_file() else {}
    for name in args.only:
        results[name] = bench.try_host(name)
        report.write_text(json.dumps(results, indent=1) + "\n")
        print(f"{name}: {json.dumps({k: results[name].get(k) for k in ('checks', 'as it is')})}", flush=True)
        for key in ("plain", "PLPP", "gradient", "resumed"):
            print(f"  {key}: {json.dumps(results[name].get(key))}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inside"]:
        sys.exit(inside(sys.argv[2], sys.argv[3], sys.argv[4], sys.argv[5:]))
    main()
