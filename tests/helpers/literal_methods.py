"""Each method as its authors' code computes it, slowly and sharing nothing with the package: what the fast code must equal.

All 77 positions of every class and every position of every image go through the stock modules of openai-clip; images and
templates one at a time; the prompt rows of deeper layers are put in by hand. Parameters come as a dictionary under the names
of upstream's checkpoints, without those that upstream uses nowhere. Give it a model in float64 (:func:`literal.double`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from plpp_reg.clip.load import openai_clip

from helpers import literal

Parameters = dict[str, Tensor]
Batch = dict[str, Tensor]


class Pass(NamedTuple):
    """One forward pass. ``context`` (P, M, D) and ``hidden`` (P, M, D) are what PLPP reads; both None where it cannot."""

    logits: Tensor
    losses: dict[str, Tensor]
    context: Tensor | None = None
    hidden: Tensor | None = None


def unit(features: Tensor) -> Tensor:
    return features / features.norm(dim=-1, keepdim=True)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the images of ``-log softmax(logits)[label]``, image by image."""
    return sum(row.exp().sum().log() - row[label] for row, label in zip(logits, labels, strict=True)) / len(labels)


def tokenize(texts: Sequence[str]) -> Tensor:
    return openai_clip().tokenize(list(texts))


def spoken(names: Sequence[str]) -> list[str]:
    return [name.replace("_", " ") for name in names]


# ---- towers --------------------------------------------------------------------------------------------------------------


def worded_prompts(model: nn.Module, names: Sequence[str], ctx: Tensor, words: str) -> literal.Prompts:
    """``words name.``, where the M rows after SOS are ctx (M, D) and all that follows stays: words that M leaves over too."""
    tokens = tokenize(f"{words} {name}." for name in spoken(names))
    table = model.token_embedding(tokens)
    rows = [torch.cat([sentence[:1], ctx.to(table.dtype), sentence[1 + len(ctx) :]]) for sentence in table]
    at = torch.arange(1, 1 + len(ctx)).expand(len(names), -1)
    return literal.Prompts(torch.stack(rows), tokens.argmax(-1), at)


def placeholders(count: int) -> str:
    return " ".join(["X"] * count)


def image_tower(model: nn.Module, images: Tensor, layers: Sequence[Tensor] = ()) -> Tensor:
    """The image encoder, an image at a time; ``layers[i]`` (M, width): the prompt rows at the entry of layer i.

    Those of layer 0 come after the patches, with no position, and go through ``ln_pre`` with everything; those of a deeper
    layer take the place of what the layer above made of the last rows.
    """
    visual = model.visual
    images = images.to(visual.conv1.weight.dtype)
    if not layers:
        return torch.cat([visual(image.unsqueeze(0)) for image in images])
    features = []
    for image in images:
        grid = visual.conv1(image.unsqueeze(0))[0]  # width, rows, columns
        patches = [grid[:, i, j] for i in range(grid.shape[1]) for j in range(grid.shape[2])]
        rows = [visual.class_embedding.to(grid.dtype), *patches]
        x = torch.stack([row + visual.positional_embedding[t].to(grid.dtype) for t, row in enumerate(rows)])
        x = visual.ln_pre(torch.cat([x, layers[0].to(x.dtype)]))
        for layer, block in enumerate(visual.transformer.resblocks):
            if 0 < layer < len(layers):
                x = torch.cat([x[: len(x) - len(layers[layer])], layers[layer].to(x.dtype)])
            x = block(x.unsqueeze(1)).squeeze(1)  # L, 1, width
        features.append(visual.ln_post(x[0]) @ visual.proj)
    return torch.stack(features)


@torch.no_grad()
def text_features(model: nn.Module, names: Sequence[str], template: str) -> Tensor:
    """``encode_text`` of one template, (C, embed_dim), not normalised."""
    return model.encode_text(tokenize(template.replace("{}", name) for name in spoken(names)))


def cosine_logits(model: nn.Module, image_features: Tensor, class_features: Tensor) -> Tensor:
    return model.logit_scale.exp() * unit(image_features) @ unit(class_features).t()


# ---- methods -------------------------------------------------------------------------------------------------------------


def zeroshot(model: nn.Module, names: Sequence[str], images: Tensor, templates: Sequence[str]) -> Tensor:
    """Logits of CLIP with the mean of several templates' normalised features."""
    mean = sum(unit(text_features(model, names, template)) for template in templates) / len(templates)
    return cosine_logits(model, image_tower(model, images), mean)


def coop(model, names, p: Parameters, batch: Batch, *, words: str = "", position: str = "end") -> Pass:
    ctx = p["ctx"]
    prompts = worded_prompts(model, names, ctx, words) if words else literal.coop_prompts(model, names, ctx, position)
    features, hidden = literal.text_tower(model, prompts)
    logits = cosine_logits(model, image_tower(model, batch["img"]), features)
    context = ctx if ctx.dim() == 3 else ctx.unsqueeze(0)
    return Pass(logits, {"ce": cross_entropy(logits, batch["label"])}, context, hidden)


def kgcoop(model, names, p: Parameters, batch: Batch, *, words: str, template: str, W: float) -> Pass:
    features, hidden = literal.text_tower(model, worded_prompts(model, names, p["ctx"], words))
    logits = cosine_logits(model, image_tower(model, batch["img"]), features)
    hand_crafted = text_features(model, names, template)
    cosines = [(a * b).sum() / (a.norm() * b.norm()) for a, b in zip(features, hand_crafted, strict=True)]
    losses = {"ce": cross_entropy(logits, batch["label"]), "kg": W * (1 - sum(cosines) / len(cosines))}
    return Pass(logits, losses, p["ctx"].unsqueeze(0), hidden)


def prograd(model, names, p: Parameters, batch: Batch, *, template: str, T: float, position: str = "end") -> Pass:
    plain = coop(model, names, p, batch, position=position)
    teacher = cosine_logits(model, image_tower(model, batch["img"]), text_features(model, names, template))
    kl = 0.0
    for student_row, teacher_row in zip(plain.logits, teacher, strict=True):
        kl = kl - ((teacher_row / T).softmax(-1) * (student_row / T).log_softmax(-1)).sum() * T * T
    return plain._replace(losses={**plain.losses, "kl": kl / len(teacher)})


def prograd_gradient(domain: Tensor, general: Tensor, strength: float) -> Tensor:
    """What ProGrad steps along: where the angle to the general gradient is obtuse, the part against it is taken out."""
    g, direction = domain.flatten(), general.flatten()
    direction = direction / math.sqrt(sum(float(x) ** 2 for x in direction))
    along = torch.dot(g, direction)
    return domain if along >= 0 else (g - strength * along * direction).view_as(domain)


def cocoop(model, names, p: Parameters, batch: Batch, *, words: str) -> Pass:
    rows, contexts, states = [], [], []
    for image in batch["img"]:
        feature = unit(image_tower(model, image.unsqueeze(0)))[0]
        inner = (p["meta_net.linear1.weight"] @ feature + p["meta_net.linear1.bias"]).clamp(min=0)
        shift = p["meta_net.linear2.weight"] @ inner + p["meta_net.linear2.bias"]
        ctx = p["ctx"] + shift  # the same shift on each vector
        prompts = worded_prompts(model, names, ctx, words or placeholders(len(ctx)))
        class_features, hidden = literal.text_tower(model, prompts)
        rows.append(model.logit_scale.exp() * unit(class_features) @ feature)
        contexts.append(ctx)
        states.append(hidden[0])  # the state before each vector is the same in all classes: the name comes after
    logits = torch.stack(rows)
    return Pass(logits, {"ce": cross_entropy(logits, batch["label"])}, torch.stack(contexts), torch.stack(states))


def prompted(model, names, batch: Batch, ctx: Tensor, words: str, deep: Sequence[Tensor], visual: Sequence[Tensor]):
    """Both towers with prompts: features of classes and images, and the states before the context."""
    prompts = worded_prompts(model, names, ctx, words or placeholders(len(ctx)))
    class_features, hidden = literal.text_tower(model, prompts, deep)
    return unit(class_features), unit(image_tower(model, batch["img"], visual)), hidden


def maple(model, names, p: Parameters, batch: Batch, *, words: str, depth: int) -> Pass:
    p = {name.removeprefix("prompt_learner."): value for name, value in p.items()}
    deep = [p[f"compound_prompts_text.{i}"] for i in range(depth - 1)]
    visual = [p["ctx"] @ p["proj.weight"].t() + p["proj.bias"]]
    for i, rows in enumerate(deep):
        name = f"compound_prompt_projections.{i}"
        visual.append(rows @ p[f"{name}.weight"].t() + p[f"{name}.bias"])
    w, f, hidden = prompted(model, names, batch, p["ctx"], words, deep, visual)
    logits = model.logit_scale.exp() * f @ w.t()
    return Pass(logits, {"ce": cross_entropy(logits, batch["label"])}, p["ctx"].unsqueeze(0), hidden)


def visual_prompts(p: Parameters, depth: int) -> list[Tensor]:
    if depth == 0:
        return []
    return [p["image_encoder.VPT"]] + [p[f"image_encoder.transformer.resblocks.{i}.VPT_shallow"] for i in range(1, depth)]


def vpt(model, names, p: Parameters, batch: Batch, *, words: str, depth: int) -> Pass:
    logits = cosine_logits(
        model, image_tower(model, batch["img"], visual_prompts(p, depth)), text_features(model, names, words + " {}.")
    )
    return Pass(logits, {"ce": cross_entropy(logits, batch["label"])})


def ivlp(model, names, p: Parameters, batch: Batch, *, words: str, depth_text: int, depth_vision: int) -> Pass:
    deep = [p[f"text_encoder.transformer.resblocks.{i}.VPT_shallow"] for i in range(1, depth_text)]
    ctx = p["prompt_learner.ctx"]
    w, f, hidden = prompted(model, names, batch, ctx, words, deep, visual_prompts(p, depth_vision))
    logits = model.logit_scale.exp() * f @ w.t()
    return Pass(logits, {"ce": cross_entropy(logits, batch["label"])}, ctx.unsqueeze(0), hidden)


def promptsrc(
    model,
    names,
    p: Parameters,
    batch: Batch,
    *,
    words: str,
    depth_text: int,
    depth_vision: int,
    text_weight: float,
    image_weight: float,
    mean_template_features: Tensor,
) -> Pass:
    """``mean_template_features`` (C, embed_dim): :func:`mean_over_templates`, which no parameter changes."""
    deep = [p[f"text_encoder.transformer.resblocks.{i}.VPT_shallow"] for i in range(1, depth_text)]
    ctx = p["prompt_learner.ctx"]
    w, f, hidden = prompted(model, names, batch, ctx, words, deep, visual_prompts(p, depth_vision))
    logits = model.logit_scale.exp() * f @ w.t()
    w0, f0 = unit(mean_template_features), unit(image_tower(model, batch["img"]))
    frozen = model.logit_scale.exp() * f0 @ w0.t()
    kl = 0.0
    for row, frozen_row in zip(logits, frozen, strict=True):
        log_p, log_p0 = row.log_softmax(0), frozen_row.log_softmax(0)
        kl = kl + sum(log_p0[c].exp() * (log_p0[c] - log_p[c]) for c in range(len(row)))
    losses = {
        "ce": cross_entropy(logits, batch["label"]),
        "scl_text": text_weight * (w - w0).abs().sum() / w.numel(),
        "scl_image": image_weight * (f - f0).abs().sum() / f.numel(),
        "scl_logits": kl / logits.numel(),
    }
    return Pass(logits, losses, ctx.unsqueeze(0), hidden)


def mean_over_templates(model, names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """PromptSRC's: the mean of the features as they are, normalised afterwards alone."""
    return sum(text_features(model, names, template) for template in templates) / len(templates)


def gaussian_average(after_epochs: Sequence[Parameters], mean: float, std: float) -> Parameters:
    """PromptSRC's average of the parameters after epochs 1, 2, ..., N."""
    heights = [
        1 / (std * math.sqrt(2 * math.pi)) * math.exp(-0.5 * ((epoch - mean) / std) ** 2)
        for epoch in range(1, len(after_epochs) + 1)
    ]
    shares = [height / sum(heights) for height in heights]
    return {
        name: sum(share * p[name].detach() for share, p in zip(shares, after_epochs, strict=True)) for name in after_epochs[0]
    }


# ---- a step --------------------------------------------------------------------------------------------------------------


def gradients(name: str, losses: dict[str, Tensor], p: Parameters, strength: float = 1.0) -> list[Tensor]:
    """What the optimizer is given: the gradient of the sum; in ProGrad that of all but ``kl``, aligned with kl's."""
    leaves = list(p.values())
    if name != "ProGrad":
        return list(torch.autograd.grad(sum(losses.values()), leaves))
    domain = torch.autograd.grad(sum(loss for key, loss in losses.items() if key != "kl"), leaves, retain_graph=True)
    general = torch.autograd.grad(losses["kl"], leaves)
    return [prograd_gradient(a, b, strength) for a, b in zip(domain, general, strict=True)]


class Training:
    """The reference's own copy of the parameters, in float64, moved by ``torch.optim.SGD``."""

    def __init__(self, start: Parameters, name: str, losses: Callable[[Parameters, Batch], dict[str, Tensor]], **sgd) -> None:
        self.p = {key: value.detach().double().clone().requires_grad_() for key, value in start.items()}
        self.name, self.losses = name, losses
        self.strength = sgd.pop("strength", 1.0)
        self.optimizer = torch.optim.SGD(list(self.p.values()), **sgd)

    def step(self, batch: Batch) -> dict[str, Tensor]:
        losses = self.losses(self.p, batch)
        for leaf, gradient in zip(self.p.values(), gradients(self.name, losses, self.p, self.strength), strict=True):
            leaf.grad = gradient
        self.optimizer.step()
        return losses

    def copy(self) -> Parameters:
        return {key: value.detach().clone() for key, value in self.p.items()}
