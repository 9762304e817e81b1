"""Each prompt learner's step beside a literal one, and with PLPP beside without, in one run.

    python benchmarks/methods.py --json methods.json            # ViT-B/16's sizes, 100 classes, fp32, random weights
    python benchmarks/methods.py --quick --json methods.json    # small towers: shows that it runs, not how fast

``literal-…``: CoCoOp's text part (image features given), MaPLe's and PromptSRC's whole step, against what their own code
does: all 77 positions of every class (in CoCoOp of every image), stock modules, all positions of the last layer. The peak
memory beside a batch of CoCoOp's is of two images, which is a lower bound: its code holds all of them until one backward.
``plpp-…``: a training step of X_PLPP over one of X, alternating, while SGD moves the context at the recipe's rate. Image
features are given where the image tower is frozen, so the share is of the text part alone: of a whole step it is smaller.
``memory-…``: what PLPP adds to the peak of a step with class-specific context, freed memory given back; and, beside it, as
glibc's allocator has it, which keeps several times as much.
Seconds are medians; the two take turns, so that both see the same machine.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from plpp_reg.clip.architectures import Architecture
from plpp_reg.clip.prompts import PromptLearner
from plpp_reg.data import DataSplit
from plpp_reg.engine.frozen import normalize
from plpp_reg.engine.log import RunLog
from plpp_reg.engine.run import RunArguments, resolve
from plpp_reg.engine.trainer import Trainer

from common import SMALL, VIT_B_16, LiteralText, arguments, random_clip, seconds, write_rows
from memory import peak_mib
from names import short_names


class Size(NamedTuple):
    model: Architecture
    classes: int
    repeats: int
    depth: int  # layers with prompts, where a method has that


FULL, QUICK = Size(VIT_B_16, 100, 7, 9), Size(SMALL, 20, 2, 2)
DEPTHS = {
    "MaPLe": ["MAPLE.PROMPT_DEPTH"],
    "IVLP": ["IVLP.PROMPT_DEPTH_TEXT", "IVLP.PROMPT_DEPTH_VISION"],
    "PromptSRC": ["PROMPTSRC.PROMPT_DEPTH_TEXT", "PROMPTSRC.PROMPT_DEPTH_VISION"],
}
LITERAL = {
    "cocoop-batch-1": ("CoCoOp", 1),
    "cocoop-batch-8": ("CoCoOp", 8),
    "maple": ("MaPLe", 4),
    "promptsrc": ("PromptSRC", 4),
}
WITH_PLPP: dict[str, tuple[str, int, tuple[str, ...]]] = {
    "coop": ("CoOp", 32, ()),
    "coop-class-specific": ("CoOp", 32, ("TRAINER.COOP.CSC", "True")),
    "cocoop-batch-1": ("CoCoOp", 1, ()),
    "cocoop-batch-8": ("CoCoOp", 8, ()),
    "kgcoop": ("KgCoOp", 128, ()),
    "prograd": ("ProGrad", 32, ()),
    "maple": ("MaPLe", 4, ()),
    "ivlp": ("IVLP", 4, ()),
    "promptsrc": ("PromptSRC", 4, ()),
}


def run_arguments(name: str, size: Size, opts: tuple[str, ...] = ()) -> RunArguments:
    resolution = size.model.resolution
    depths = [o for key in DEPTHS.get(name.removesuffix("_PLPP"), []) for o in (f"TRAINER.{key}", str(size.depth))]
    fixed = ("INPUT.SIZE", f"({resolution},{resolution})", "DATASET.NAME", "random")
    return RunArguments(trainer=name, backbone="ViT-B/16", opts=(*fixed, *depths, *opts))


def class_names(size: Size) -> DataSplit:
    return DataSplit([], [], [], short_names(size.classes))


def make_trainer(name: str, size: Size, opts: tuple[str, ...] = (), clip_model: nn.Module | None = None) -> Trainer:
    cfg, cls = resolve(run_arguments(name, size, opts))
    clip_model = clip_model or random_clip(size.model)
    return Trainer(cls, cfg, data=class_names(size), clip_model=clip_model, log=RunLog(quiet=True))


def make_batch(size: Size, images: int, seed: int = 1) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    side = size.model.resolution
    return {
        "img": torch.randn(images, 3, side, side, generator=g),
        "label": torch.randint(size.classes, (images,), generator=g),
    }


def give_image_features(trainer: Trainer, size: Size, batch: dict[str, Tensor], seed: int = 1) -> None:
    """What the frozen image tower says is known."""
    g = torch.Generator().manual_seed(1000 + seed)
    batch["features"] = normalize(torch.randn(len(batch["label"]), size.model.embed_dim, generator=g))


def learner_of(trainer: Trainer) -> PromptLearner:
    (learner,) = (module for module in trainer.method.modules() if isinstance(module, PromptLearner))
    return learner


def literal_images(clip_model: nn.Module, images: Tensor, prompts: Sequence[Tensor]) -> Tensor:
    """MaPLe's image tower over the stock modules: prompts (M, width) a layer, replaced at the end of the sequence.

    (B, 3, H, W) -> (B, embed_dim), not normalised.
    """
    v = clip_model.visual
    x = v.conv1(images.to(v.conv1.weight.dtype)).flatten(2).transpose(1, 2)
    x = torch.cat([v.class_embedding.to(x.dtype).expand(len(x), 1, -1), x], 1) + v.positional_embedding.to(x.dtype)
    prompts = [rows.to(x.dtype) for rows in prompts]
    x = v.ln_pre(torch.cat([x, prompts[0].expand(len(x), -1, -1)], 1)).permute(1, 0, 2)
    for layer, block in enumerate(v.transformer.resblocks):
        if 0 < layer < len(prompts):
            x = torch.cat([x[: -len(prompts[layer])], prompts[layer].unsqueeze(1).expand(-1, x.shape[1], -1)])
        x = block(x)
    return v.ln_post(x[0]) @ v.proj


def literal_losses(trainer: Trainer, tower: LiteralText, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same losses by the plain computation, with the trainer's own parameters."""
    method, name = trainer.method, type(trainer.method).__name__
    if name == "CoCoOp":
        rows, features = [], method.frozen_features(batch)
        for feature, context in zip(features, method.prompt_learner.context(features), strict=True):
            rows.append(method.cosines(feature, normalize(tower(context))))
        return {"ce": F.cross_entropy(torch.stack(rows), batch["label"])}
    visual: list[Tensor] = []
    if name == "CoOp":
        learner, deep = method.prompt_learner, []
    elif name == "MaPLe":
        learner = method.prompt_learner
        deep, visual = learner.compound_prompts_text, learner.image_prompts()
    else:
        learner, deep, visual = method.prompts.prompt_learner, method.prompts.deep_text, method.prompts.layers
    w = normalize(tower(learner.ctx, list(deep)))
    f = normalize(literal_images(trainer.clip_model, batch["img"], visual)) if visual else method.frozen_features(batch)
    logits = method.cosines(f, w)
    losses = {"ce": F.cross_entropy(logits, batch["label"])}
    if name == "PromptSRC":
        with torch.no_grad():
            f0 = normalize(trainer.clip_model.encode_image(batch["img"]))
        w0, config = method.frozen_class_features, method.config
        p, p0 = logits.log_softmax(1), method.cosines(f0, w0).log_softmax(1)
        losses["scl_text"] = config.text_loss_weight * F.l1_loss(w, w0)
        losses["scl_image"] = config.image_loss_weight * F.l1_loss(f, f0)
        losses["scl_logits"] = F.kl_div(p, p0, reduction="sum", log_target=True) / logits.numel()
    return losses


def prepare_literal(case: str, size: Size, which: str) -> Callable[[], tuple[dict[str, float], Tensor]]:
    """A step without the update: named losses and the gradient of everything trained, in one vector."""
    name, images = LITERAL[case]
    trainer, batch = make_trainer(name, size), make_batch(size, images)
    if name == "CoCoOp":
        give_image_features(trainer, size, batch)
    tower = LiteralText(trainer.clip_model, learner_of(trainer))

    def gradient(losses: dict[str, Tensor]) -> tuple[dict[str, float], Tensor]:
        gradients = torch.autograd.grad(sum(losses.values()), trainer.parameters)
        return {n: loss.item() for n, loss in losses.items()}, torch.cat([g.flatten() for g in gradients])

    def step() -> tuple[dict[str, float], Tensor]:
        if which == "fast":
            return gradient(trainer.losses(batch)[0])
        if name != "CoCoOp":
            return gradient(literal_losses(trainer, tower, batch))
        if which == "two images":
            return gradient(literal_losses(trainer, tower, {n: t[:2] for n, t in batch.items()}))
        # An image at a time, as its code's loop does, but with its backward at once: all graphs together are 4 GiB an image.
        each = [{n: t[i : i + 1] for n, t in batch.items()} for i in range(images)]
        values, gradients = zip(*(gradient(literal_losses(trainer, tower, one)) for one in each), strict=True)
        return {n: statistics.fmean(v[n] for v in values) for n in values[0]}, torch.stack(gradients).mean(0)

    return step


def measure_literal(case: str, size: Size) -> dict[str, Any]:
    fast, literal = prepare_literal(case, size, "fast"), prepare_literal(case, size, "literal")
    (fast_losses, fast_gradient), (losses, gradient) = fast(), literal()
    times: dict[str, list[float]] = {"fast": [], "literal": []}
    for i in range(size.repeats):
        times["fast"].append(seconds(fast))
        if i < min(3, size.repeats):
            times["literal"].append(seconds(literal))
    in_memory = "two images" if LITERAL[case] == ("CoCoOp", 8) else "literal"
    fast_s, literal_s = (statistics.median(times[n]) for n in ("fast", "literal"))
    return {
        "case": f"literal-{case}",
        "classes": size.classes,
        "seconds": fast_s,
        "reference_seconds": literal_s,
        "speedup": literal_s / fast_s,
        "loss_rel_diff": max(abs(fast_losses[n] - losses[n]) / abs(losses[n]) for n in losses),
        "grad_rel_diff": ((fast_gradient - gradient).norm() / gradient.norm()).item(),
        "peak_mib": peak_mib(prepare_literal, case, size, "fast"),
        "reference_peak_mib": peak_mib(prepare_literal, case, size, in_memory),
    }


def prepare_plpp(name: str, size: Size, images: int, opts: tuple[str, ...], count: int = 1) -> tuple[Trainer, list]:
    """A trainer and ``count`` different batches."""
    trainer = make_trainer(name, size, opts)
    batches = [make_batch(size, images, seed) for seed in range(count)]
    if not trainer.method.inputs.pixels:
        for seed, batch in enumerate(batches):
            give_image_features(trainer, size, batch, seed)
    trainer.optimizer.param_groups[0]["lr"] = trainer.cfg.OPTIM.LR  # not the warm-up epoch's
    return trainer, batches


def prepare_step(*args: Any) -> Callable[[], dict[str, float]]:
    trainer, (batch,) = prepare_plpp(*args)
    return lambda: trainer.step(batch)


def measure_plpp(case: str, size: Size) -> dict[str, Any]:
    name, images, opts = WITH_PLPP[case]
    count = 2 * size.repeats + 1
    (plain, batches), (treated, _) = (prepare_plpp(n, size, images, opts, count) for n in (name, f"{name}_PLPP"))
    plain.step(batches[0]), treated.step(batches[0])
    nearest, looked_up, rows = treated.regularizer.nearest, 0, 0
    times: list[tuple[float, float, float]] = []
    for i, batch in enumerate(batches[1:]):  # which of the two goes first alternates
        order = (plain, treated) if i % 2 else (treated, plain)
        before = nearest.looked_up
        pair = {t: seconds(lambda t=t, batch=batch: t.step(batch)) for t in order}
        looked_up, rows = looked_up + nearest.looked_up - before, rows + len(nearest.memory.left_out)
        nearest.forget()
        images = treated.method.image_features(batch) if treated.method.classes_depend_on_image else None
        classes = treated.method.encode_classes(images, with_states=True)  # the term alone is timed, with all rows looked up
        times.append((pair[plain], pair[treated], seconds(lambda c=classes: treated.plpp(c.contexts, False))))
        del classes
    return {
        "case": f"plpp-{case}",
        "classes": size.classes,
        "seconds": statistics.median(t for _, t, _ in times),
        "reference_seconds": statistics.median(p for p, _, _ in times),
        "plpp_overhead": statistics.median(t / p - 1 for p, t, _ in times),
        "plpp_looked_up": looked_up / rows,
        "seconds_of_a_term_with_all_rows_looked_up": statistics.median(w for _, _, w in times),
    }


def measure_memory(case: str, size: Size) -> dict[str, Any]:
    size = size._replace(classes=10 * size.classes)
    opts = WITH_PLPP["coop-class-specific"][2]
    peaks = {
        f"{prefix}{what}_mib": peak_mib(prepare_step, name, size, 32, opts, freed_returned=what == "peak")
        for what in ("peak", "held")
        for prefix, name in (("", "CoOp_PLPP"), ("reference_", "CoOp"))
    }
    return {"case": f"memory-{case}", "classes": size.classes, **peaks}


CASES: dict[str, Callable[[Size], dict[str, Any]]] = {
    **{f"literal-{case}": lambda size, case=case: measure_literal(case, size) for case in LITERAL},
    **{f"plpp-{case}": lambda size, case=case: measure_plpp(case, size) for case in WITH_PLPP},
    "memory-class-specific": lambda size: measure_memory("class-specific", size),
}


def describe(row: dict[str, Any]) -> str:
    parts = [f"{row['case']:28s}{row['classes']:5d} classes"]
    if "seconds" in row:
        parts.append(f"{row['reference_seconds']:8.3f} s -> {row['seconds']:7.3f} s")
    if "speedup" in row:
        parts.append(f"{row['speedup']:5.1f}x, loss {row['loss_rel_diff']:.0e}, gradient {row['grad_rel_diff']:.0e}")
    if "plpp_overhead" in row:
        parts.append(f"{100 * row['plpp_overhead']:+5.1f}%, {100 * row['plpp_looked_up']:.0f}% of rows looked up")
    if row.get("peak_mib") is not None:
        parts.append(f"{row['peak_mib']:.0f} / {row['reference_peak_mib']:.0f} MiB")
    if row.get("held_mib") is not None:
        parts.append(f"held by the allocator {row['held_mib']:.0f} / {row['reference_held_mib']:.0f} MiB")
    return "  ".join(parts)


def main() -> None:
    args = arguments(__doc__, CASES)
    size = QUICK if args.quick else FULL
    size = size._replace(repeats=args.repeats or size.repeats)
    rows = []
    for case in args.cases:
        rows.append(CASES[case](size))
        print(describe(rows[-1]), flush=True)
    write_rows(args.json, rows)


if __name__ == "__main__":
    main()
