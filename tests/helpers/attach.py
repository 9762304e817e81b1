"""Miniature hosts and the sum of their loss and the term by explicit addition, for the tests of attach.

``expected`` shares no code with plpp_reg/attachment/: it walks the miniature host by hand, places counted in the text.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from plpp_reg import PerplexityRegularizer
from plpp_reg.clip.load import openai_clip

sys.path.insert(0, str(Path(__file__).parent.parent / "hosts"))
from mini_hosts import NAMES, LossInForward, LossInTrainer, SevenReturned, frozen

HOSTS = {"trainer": LossInTrainer, "forward": LossInForward, "seven": SevenReturned}
LAYOUTS = [
    {"position": "end"},
    {"position": "middle", "n_ctx": 5},
    {"position": "front"},
    {"class_specific": True},
    {"class_specific": True, "position": "middle"},
    {"class_specific": True, "words": "a photo of a"},  # all contexts begin equal, and are five all the same
]


def make_regularizer(clip_model, **settings):
    return PerplexityRegularizer(clip_model.token_embedding.weight, **{"weight": 0.7, "inverse_weight": 0.4, **settings})


def make_host(clip_model, kind="trainer", **learner):
    return frozen(HOSTS[kind](clip_model, **learner)).train()


def host_loss(host, batch):
    """What a trainer makes of a host's output."""
    images, labels = batch
    if isinstance(host, LossInTrainer):
        return F.cross_entropy(host(images), labels)
    if isinstance(host, LossInForward):
        return host(images, labels)
    loss, texts, fixed, _, _, zero_shot, logits = host(images, labels)
    kl = F.kl_div(logits.log_softmax(1), zero_shot.log_softmax(1), reduction="sum", log_target=True) / logits.numel()
    return loss + 25 * F.l1_loss(texts, fixed) + kl


def places(n_ctx: int, position: str) -> list[list[int]]:
    """Positions of each class's context vectors, counted from a prompt as it reads."""
    encode = openai_clip().clip._tokenizer.encode
    half = {"end": n_ctx, "middle": n_ctx // 2, "front": 0}[position]
    found = []
    for name in NAMES:
        words = ["sos"] + ["v"] * half + encode(name) + ["v"] * (n_ctx - half)
        found.append([t for t, word in enumerate(words) if word == "v"])
    return found


def states(host, prompts: Tensor, deep=()) -> Tensor:
    seen = []
    hook = host.text_encoder.ln_final.register_forward_hook(lambda m, a, out: seen.append(out))
    host.text_encoder(prompts, host.tokenized_prompts, list(deep))
    hook.remove()
    return seen[0]


def term(host, regularizer, batch, own: bool = False) -> Tensor:
    """The regularizer's value by a second text pass, one class and one image at a time."""
    learner = host.prompt_learner
    at = places(learner.ctx.shape[-2], learner.class_token_position)
    biases = [None]
    if isinstance(host, LossInForward):
        biases = [learner.meta_net(image) for image in host.encode_image(batch[0])]
    totals = []
    for bias in biases:
        prompts = learner(bias)
        hidden = states(host, prompts, getattr(learner, "deep", ()))
        classes = range(1) if learner.ctx.dim() == 2 and learner.class_token_position == "end" else range(len(NAMES))
        v = torch.stack([torch.stack([prompts[c, t] for t in at[c]]) for c in classes])
        h = torch.stack([torch.stack([hidden[c, t - (not own)] for t in at[c]]) for c in classes])
        totals.append(regularizer(v, h))
    return sum(totals) / len(totals)


def gradients(host) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in host.named_parameters() if p.grad is not None}


def expected(clip_model, regularizer, batch, factor=1.0, own=False, **make) -> dict[str, Tensor]:
    """The gradient of (loss + term) * factor on a host that nobody has touched."""
    host = make_host(clip_model, **make)
    ((host_loss(host, batch) + term(host, regularizer, batch, own)) * factor).backward()
    return gradients(host)


def assert_close(got: dict[str, Tensor], wanted: dict[str, Tensor], tolerance=1e-12):
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert (got[name] - gradient).norm() <= tolerance * gradient.norm(), name
