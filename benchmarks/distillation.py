"""Distillation from a teacher that is kept, beside upstream's way, in one run.

    python benchmarks/distillation.py --json FILE            # ViT-B/16 from ViT-L/14, 100 classes, fp32, random weights
    python benchmarks/distillation.py --quick --json FILE    # small towers: shows that it runs, not how fast

``step-…``: a training step whose teacher is kept over the step that it is made of: KDPL's over CoOp's, FDBPL's over CoOp's,
PromptKD's over that of IVLP's image tower (VPT: the same prompts, class features given). They take turns, so that both see
the same machine; a whole run's first views cost the teacher's passes beside.
``upstream-…``: losses and gradients of a step against a literal computation of what upstream's code does. PromptKD: the
teacher's text tower over 77 positions of all classes, and its image tower, in every step. KDPL: the teacher's image tower and
the student's in every step, the student's text over 77 positions. FDBPL: the teacher's logits stored, the student's image tower
and two text passes over 77 positions in every step, and its loop over pairs of classes. ``tflop`` is counted by torch.
The teacher has prompts in both towers, PromptSRC's form.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from plpp_reg.clip.architectures import OPENAI, Architecture
from plpp_reg.clip.text import TextTower
from plpp_reg.clip.vision import ImageTower
from plpp_reg.engine.frozen import normalize
from plpp_reg.engine.log import RunLog
from plpp_reg.engine.method import Backbone
from plpp_reg.engine.run import resolve
from plpp_reg.engine.teacher import Spoken, Teacher
from plpp_reg.engine.trainer import Trainer
from plpp_reg.loss import distillation
from plpp_reg.trainers.ivlp import IVLP

import common
from common import SMALL, LiteralText, arguments, random_clip, seconds, write_rows
from counting import FUSED
from methods import FULL, QUICK, Size, class_names, give_image_features, literal_images, make_batch, run_arguments

TEACHERS = {FULL: OPENAI["ViT-L/14"], QUICK: SMALL._replace(embed_dim=192, vision_width=128, width=192, heads=3)}
IMAGES = {"CoOp_KDPL": 32, "FDBPL": 32, "PromptKD": 8}
STEPS = {  # the step that each is made of, and by how much it may cost more
    "step-kdpl": ("CoOp_KDPL", "CoOp", 1.05),
    "step-fdbpl": ("FDBPL", "CoOp", 2.1),
    "step-promptkd": ("PromptKD", "VPT", 1.05),
}
UPSTREAM = {"upstream-kdpl": "CoOp_KDPL", "upstream-fdbpl": "FDBPL", "upstream-promptkd": "PromptKD"}
Losses = dict[str, Tensor]


class TeacherModel(NamedTuple):
    """A teacher with prompts in both towers, of random weights, and its literal computation."""

    method: IVLP
    text: LiteralText
    spoken: Spoken

    def literal_classes(self) -> Tensor:
        prompts = self.method.prompts
        return normalize(self.text(prompts.prompt_learner.ctx, prompts.deep_text))

    def literal_images(self, images: Tensor) -> Tensor:
        return normalize(literal_images(self.method.clip.model, images, self.method.prompts.layers))


@torch.no_grad()
def make_teacher(sizes: Architecture, size: Size) -> TeacherModel:
    model = random_clip(sizes)
    config = IVLP.Config(
        n_ctx_vision=4, n_ctx_text=4, prec="fp32", prompt_depth_vision=size.depth, prompt_depth_text=size.depth
    )
    method = IVLP(config, Backbone(model, TextTower(model), ImageTower(model)), class_names(size).classnames)
    features = method.encode_classes().features
    return TeacherModel(
        method.requires_grad_(False),
        LiteralText(model, method.prompts.prompt_learner),
        Spoken(features, model.logit_scale.exp(), {}, {}),
    )


def make_trainer(name: str, size: Size, student: nn.Module, spoken: Spoken) -> Trainer:
    depth = ("TRAINER.PROMPTKD.PROMPT_DEPTH_VISION", str(size.depth), "TRAINER.VPT.PROMPT_DEPTH_VISION", str(size.depth))
    same = ("TRAINER.VPT.N_CTX_VISION", "4", "TRAINER.COOP.CTX_INIT", "a photo of a", "DATALOADER.TRAIN_X.BATCH_SIZE", "8")
    cfg, cls = resolve(run_arguments(name, size, (*depth, *same)))
    teacher = Teacher(cfg, class_names(size).classnames)
    teacher.spoken = spoken
    trainer = Trainer(cls, cfg, data=class_names(size), clip_model=student, log=RunLog(quiet=True), teacher=teacher)
    trainer.optimizer.param_groups[0]["lr"] = cfg.OPTIM.LR  # not the warm-up epoch's
    return trainer


def kept_batch(trainer: Trainer, size: Size, images: int, seed: int = 1) -> dict[str, Tensor]:
    """A batch as the store gives it: with features of the frozen towers, and pixels where the student needs them."""
    batch = make_batch(size, images, seed)
    give_image_features(trainer, size, batch, seed)
    if trainer.teacher is not None:
        g = torch.Generator().manual_seed(2000 + seed)
        batch["teacher_features"] = normalize(torch.randn(images, trainer.teacher.encoder.width, generator=g))
    return batch


def measure_step(case: str, size: Size, student: nn.Module, teacher: TeacherModel) -> dict[str, Any]:
    name, plain_name, bound = STEPS[case]
    distilling, plain = (make_trainer(n, size, student, teacher.spoken) for n in (name, plain_name))
    repeats = 2 * size.repeats + 1
    batches = [[kept_batch(t, size, IMAGES[name], seed) for t in (distilling, plain)] for seed in range(repeats)]
    times = []
    for i, (kept, theirs) in enumerate(batches):
        pair = {}
        for trainer, batch in ((distilling, kept), (plain, theirs)) if i % 2 else ((plain, theirs), (distilling, kept)):
            pair[trainer] = seconds(lambda t=trainer, b=batch: t.step(b))
        times.append((pair[distilling], pair[plain]))
    times = times[1:]  # the first made trees
    return {
        "case": case,
        "classes": size.classes,
        "seconds": statistics.median(t for t, _ in times),
        "reference_seconds": statistics.median(p for _, p in times),
        "over": statistics.median(t / p for t, p in times),
        "bound": bound,
    }


def second_order(differences: Tensor, named: list[int]) -> Tensor:
    """FDBPL's term as its code loops over it; identically 0."""
    total = differences.new_zeros(())
    for i in named:
        for j in named:
            if i != j:
                total = total + (differences[i] - differences[j]).mean()
    return total


class Literal:
    """A step's losses as upstream's code computes them, with the trainer's own parameters."""

    def __init__(self, name: str, trainer: Trainer, teacher: TeacherModel, batch: dict[str, Tensor]) -> None:
        self.trainer, self.teacher, self.batch, self.method = trainer, teacher, batch, trainer.method
        self.losses: Callable[[], Losses] = getattr(self, name.lower())
        if name != "PromptKD":
            self.text = LiteralText(trainer.clip_model, self.method.prompt_learner)

    @torch.no_grad()
    def frozen_images(self) -> Tensor:
        return normalize(self.trainer.clip_model.encode_image(self.batch["img"]))

    def promptkd(self) -> Losses:
        with torch.no_grad():
            w, seen = self.teacher.literal_classes(), self.teacher.literal_images(self.batch["img"])
        student, c = self.method.student, self.method.config
        features = literal_images(self.trainer.clip_model, self.batch["img"], student.layers)
        features = normalize(student.VPT_image_trans(features, training=True))
        loss = distillation.kd(self.method.cosines(features, w), self.teacher.spoken.scale * seen @ w.T, c.temperature)
        return {"kd": c.kd_weight * loss}

    def coop_kdpl(self) -> Losses:
        with torch.no_grad():
            seen = self.teacher.literal_images(self.batch["img"])
        teacher = self.method.cosines(seen, self.teacher.spoken.class_features)
        w = normalize(self.text(self.method.prompt_learner.ctx))
        return {"kd": distillation.symmetric_kl(self.method.cosines(self.frozen_images(), w), teacher).mean()}

    def fdbpl(self) -> Losses:
        c, f = self.method.config, self.frozen_images()
        teacher = self.method.cosines(self.batch["teacher_features"], self.teacher.spoken.class_features)  # stored
        learner = self.method.prompt_learner
        positive, negative = (normalize(self.text(context)) for context in (learner.ctx, learner.negative.ctx))
        z, z_negative = self.method.cosines(f, positive), self.method.cosines(f, negative)
        u = distillation.confidence(teacher)
        return {
            "kd": (u * distillation.symmetric_kl(z, teacher)).mean(),
            "entropy": ((1 - u) * distillation.negative_entropy(z_negative)).mean(),
            "cosine": c.cosine_weight * (u * distillation.first_order_cosine(z, z_negative)).mean(),
            "second_order": 0.1 * second_order(positive - negative, sorted(set(teacher.argmax(1).tolist()))),
        }


class Measured(NamedTuple):
    loss: float
    gradient: Tensor  # of everything that is trained
    seconds: float
    tflop: float


def gradient(trainer: Trainer, losses: Callable[[], Losses], counted: bool = True) -> Measured:
    """A step without the update."""
    for parameter in trainer.parameters:
        parameter.grad = None
    start = common.CLOCK()
    with FlopCounterMode(display=False, custom_mapping=FUSED) if counted else contextlib.nullcontext() as counter:
        loss = sum(losses().values())
        loss.backward()
    seconds = common.CLOCK() - start
    tflop = counter.get_total_flops() / 1e12 if counted else 0.0
    return Measured(loss.item(), torch.cat([p.grad.flatten() for p in trainer.parameters]), seconds, tflop)


def measure_upstream(case: str, size: Size, student: nn.Module, teacher: TeacherModel) -> dict[str, Any]:
    name = UPSTREAM[case]
    trainer = make_trainer(name, size, student, teacher.spoken)
    batch = make_batch(size, IMAGES[name])
    with torch.no_grad():  # what the store has of these images
        batch["features"] = normalize(trainer.clip_model.encode_image(batch["img"]))
        batch["teacher_features"] = teacher.literal_images(batch["img"])
    literal = Literal(name, trainer, teacher, batch)

    steps: dict[str, Callable[[], Losses]] = {"ours": lambda: trainer.losses(batch)[0], "theirs": literal.losses}
    found = {which: gradient(trainer, step) for which, step in steps.items()}
    ours, theirs = found["ours"], found["theirs"]
    # a literal step is long, and counting it a small part
    seconds_of = {"ours": [], "theirs": [theirs.seconds]}
    for i in range(size.repeats):
        seconds_of["ours"].append(gradient(trainer, steps["ours"], counted=False).seconds)
        if 0 < i < 2:
            seconds_of["theirs"].append(gradient(trainer, steps["theirs"], counted=False).seconds)
    ours_s, theirs_s = (statistics.median(each) for each in seconds_of.values())
    return {
        "case": case,
        "classes": size.classes,
        "seconds": ours_s,
        "reference_seconds": theirs_s,
        "speedup": theirs_s / ours_s,
        "tflop": ours.tflop,
        "reference_tflop": theirs.tflop,
        "loss_rel_diff": abs(ours.loss - theirs.loss) / abs(theirs.loss),
        "grad_rel_diff": ((ours.gradient - theirs.gradient).norm() / theirs.gradient.norm()).item(),
    }


def describe(row: dict[str, Any]) -> str:
    parts = [f"{row['case']:20s}{row['classes']:5d} classes  {row['reference_seconds']:8.3f} s -> {row['seconds']:7.3f} s"]
    if "over" in row:
        parts.append(f"{row['over']:.3f} of it, at most {row['bound']}")
    else:
        parts.append(f"{row['speedup']:5.1f}x, {row['reference_tflop']:.2f} -> {row['tflop']:.3f} TFLOP")
        parts.append(f"loss {row['loss_rel_diff']:.0e}, gradient {row['grad_rel_diff']:.0e}")
    return "  ".join(parts)


def main() -> None:
    args = arguments(__doc__, [*STEPS, *UPSTREAM])
    size = QUICK if args.quick else FULL
    sizes, size = TEACHERS[size], size._replace(repeats=args.repeats or size.repeats)
    student, teacher = random_clip(size.model), make_teacher(sizes, size)
    rows = []
    for case in args.cases:
        rows.append((measure_step if case in STEPS else measure_upstream)(case, size, student, teacher))
        print(describe(rows[-1]), flush=True)
    write_rows(args.json, rows)


if __name__ == "__main__":
    main()
