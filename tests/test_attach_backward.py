"""attach: the term joins whatever backward passes a host makes, once, and nothing else changes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from plpp_reg import PerplexityRegularizer, attach
from plpp_reg.clip.load import openai_clip
from plpp_reg.errors import InputError

from helpers.attach import (
    HOSTS,
    assert_close,
    expected,
    gradients,
    host_loss,
    make_host,
    make_regularizer,
    term,
)
from mini_hosts import LossInForward, LossInTrainer, TextEncoder, frozen

# ---- the backward pass -----------------------------------------------------------------------------------------------


def test_the_forward_pass_is_the_same_to_the_bit(clip_model, batch):
    plain, host = make_host(clip_model), make_host(clip_model)
    before = torch.get_rng_state()
    attach(host, make_regularizer(clip_model))
    assert torch.equal(host(batch[0]), plain(batch[0]))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", HOSTS)
def test_weights_of_zero_change_no_bit(clip_model, batch, kind):
    plain, host = make_host(clip_model, kind), make_host(clip_model, kind)
    handle = attach(host, make_regularizer(clip_model, weight=0.0, inverse_weight=0.0))
    for model in (plain, host):
        host_loss(model, batch).backward()
    assert handle.last is None
    for (name, a), b in zip(gradients(plain).items(), gradients(host).values(), strict=True):
        assert torch.equal(a, b), name


def test_a_gradient_scaler_scales_the_term_as_it_does_the_loss(clip_model, batch):
    regularizer = make_regularizer(clip_model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    host = make_host(clip_model)
    attach(host, regularizer, scaler=scaler)
    scaler.scale(host_loss(host, batch)).backward()
    assert_close(gradients(host), expected(clip_model, regularizer, batch, factor=1024.0))


def test_autocast_to_float16_wants_to_know_the_scaler(clip_model, batch):
    host = make_host(clip_model)
    handle = attach(host, make_regularizer(clip_model))
    with torch.autocast("cpu", dtype=torch.float16):
        with pytest.raises(InputError, match="scaler: expected the GradScaler"):
            host(batch[0])
        handle.scaler = False
        host(batch[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        handle.scaler = None
        host(batch[0])


@pytest.mark.parametrize("divided", [True, False])
def test_gradient_accumulation(clip_model, batch, divided):
    regularizer, k = make_regularizer(clip_model), 4
    host, other = make_host(clip_model), make_host(clip_model)
    attach(host, regularizer, loss_scale=1 / k if divided else 1.0)
    factor = 1 / k if divided else 1.0
    for i in range(k):
        part = (batch[0] + i, batch[1])
        (host_loss(host, part) * factor).backward()
        ((host_loss(other, part) + term(other, regularizer, part)) * factor).backward()
    assert_close(gradients(host), gradients(other))


def test_two_losses_summed_before_one_backward_pass(clip_model, batch):
    """Two forward passes of the model: two terms, as each loss has its own."""
    regularizer = make_regularizer(clip_model)
    host, other = make_host(clip_model, "forward"), make_host(clip_model, "forward")
    attach(host, regularizer)
    small = (batch[0][:2], batch[1][:2])
    (host_loss(host, batch) + host_loss(host, small)).backward()
    parts = [host_loss(other, b) + term(other, regularizer, b) for b in (batch, small)]
    sum(parts).backward()
    assert_close(gradients(host), gradients(other))


@pytest.mark.parametrize("which", [1, 2])
def test_several_backward_passes_carry_the_term_once(clip_model, batch, which):
    """ProGrad's way: two losses of one forward pass, a backward pass for each."""
    regularizer = make_regularizer(clip_model)
    host, plain = make_host(clip_model), make_host(clip_model)
    handle = attach(host, regularizer, backward_pass=which)
    grads = {}
    for name, model in (("host", host), ("plain", plain)):
        logits = model(batch[0])
        for i, loss in enumerate([logits.square().mean(), F.cross_entropy(logits, batch[1])], 1):
            model.zero_grad()
            loss.backward(retain_graph=i == 1)
            grads[name, i] = model.prompt_learner.ctx.grad.clone()
    alone = make_host(clip_model)
    term(alone, regularizer, batch).backward()
    gained = alone.prompt_learner.ctx.grad
    for i in (1, 2):
        wanted = grads["plain", i] + (gained if i == which else 0)
        assert (grads["host", i] - wanted).norm() <= 1e-12 * wanted.norm()
    assert handle.ever_joined


def test_retain_graph_out_of_habit(clip_model, batch):
    regularizer = make_regularizer(clip_model)
    host = make_host(clip_model)
    attach(host, regularizer)
    for _ in range(2):
        host.zero_grad()
        host_loss(host, batch).backward(retain_graph=True)
    assert_close(gradients(host), expected(clip_model, regularizer, batch))


def test_a_backward_pass_that_never_comes_is_an_error(clip_model, batch):
    host = make_host(clip_model)
    attach(host, make_regularizer(clip_model), backward_pass=2)
    host_loss(host, batch).backward()
    with pytest.raises(InputError, match="expected 2 backward passes .* got 1"):
        host(batch[0])


def test_text_passes_of_a_trainer_outside_the_models_forward(clip_model, batch):
    """The trainer itself calls the text encoder, once an image: they share one loss until its backward pass."""
    regularizer = make_regularizer(clip_model)
    host = make_host(clip_model, "forward")
    attach(host, regularizer)
    for _ in range(2):
        host.zero_grad()
        LossInForward.forward(host, *batch).backward()
        assert_close(gradients(host), expected(clip_model, regularizer, batch, kind="forward"))


def test_no_grad_eval_and_a_frozen_context_are_left_alone(clip_model, batch):
    host = make_host(clip_model)
    handle = attach(host, make_regularizer(clip_model))
    with torch.no_grad():
        host(batch[0])
    assert handle.last is None
    host.prompt_learner.eval()  # what CoOp's trainer puts into evaluation mode; the rest stays in training mode
    logits = host(batch[0])
    plain = make_host(clip_model)
    logits.sum().backward()
    plain(batch[0]).sum().backward()
    assert handle.last is None and torch.equal(host.prompt_learner.ctx.grad, plain.prompt_learner.ctx.grad)
    host.prompt_learner.train()
    host.prompt_learner.ctx.requires_grad_(False)
    host(batch[0])
    assert handle.last is None


def test_a_validation_pass_between_forward_and_backward(clip_model, batch):
    regularizer = make_regularizer(clip_model)
    host = make_host(clip_model, "forward")
    handle = attach(host, regularizer)
    loss = host_loss(host, batch)
    last = handle.last
    with torch.no_grad():
        host_loss(host, (batch[0][:1], batch[1][:1]))
    assert handle.last is last
    loss.backward()
    assert_close(gradients(host), expected(clip_model, regularizer, batch, kind="forward"))


class Checkpointed(nn.Module):
    """A text encoder behind a checkpoint: run once forward, and once more in backward."""

    def __init__(self, inner: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.inner, self.reentrant = inner, reentrant

    def forward(self, *args):
        return checkpoint(self.inner, *args, use_reentrant=self.reentrant)


@pytest.mark.parametrize("kind", ["trainer", "forward"])
@pytest.mark.parametrize(("reentrant", "early_stop"), [(False, True), (False, False), (True, True)])
def test_a_checkpointed_text_encoder_counts_once(clip_model, batch, kind, reentrant, early_stop):
    regularizer = make_regularizer(clip_model)
    host = make_host(clip_model, kind)
    host.text_encoder = Checkpointed(host.text_encoder, reentrant)
    handle = attach(host, regularizer)
    with set_checkpoint_early_stop(early_stop):
        host_loss(host, batch).backward()
    assert_close(gradients(host), expected(clip_model, regularizer, batch, kind=kind))
    assert len(handle._group.measured) == (3 if kind == "forward" else 1)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpointed_model(clip_model, batch, reentrant):
    regularizer = make_regularizer(clip_model)
    host = make_host(clip_model, "forward")
    handle = attach(host, regularizer)
    images = batch[0].clone().requires_grad_()  # a reentrant checkpoint wants an input with a gradient
    with set_checkpoint_early_stop(False):
        checkpoint(host, images, batch[1], use_reentrant=reentrant).backward()
    assert len(handle._group.measured) == 3 and handle._group.passes == 3
    assert_close(gradients(host), expected(clip_model, regularizer, batch, kind="forward"))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers(clip_model, batch, reentrant):
    regularizer = make_regularizer(clip_model)
    model = copy.deepcopy(clip_model)
    host = make_host(model, "trainer")
    blocks = host.text_encoder.transformer.resblocks
    host.text_encoder.transformer.resblocks = nn.Sequential(*(Checkpointed(block, reentrant) for block in blocks))
    attach(host, regularizer)
    host_loss(host, batch).backward()
    assert_close(gradients(host), expected(clip_model, regularizer, batch))


def test_a_reentrant_checkpoint_that_hides_the_states_is_an_error(clip_model, batch):
    class HiddenStates(TextEncoder):
        def forward(self, prompts, tokenized_prompts):
            return checkpoint(super().forward, prompts, tokenized_prompts, use_reentrant=True)

    host = make_host(clip_model)
    host.text_encoder = HiddenStates(clip_model)
    attach(host, make_regularizer(clip_model))
    with pytest.raises(InputError, match="use_reentrant"):
        host(batch[0])


def test_a_host_that_normalises_in_place(clip_model, batch):
    class InPlace(LossInTrainer):
        def forward(self, images):
            texts = self.text_encoder(self.prompt_learner(), self.tokenized_prompts)
            texts /= texts.detach().norm(dim=-1, keepdim=True)
            return self.encode_image(images) @ texts.t()

    host = frozen(InPlace(clip_model)).train()
    handle = attach(host, make_regularizer(clip_model))
    host(batch[0]).sum().backward()
    assert handle.ever_joined


@pytest.mark.parametrize("wrap", [lambda t: (t, None), lambda t: [None, t], lambda t: {"text": t, "name": "x"}])
def test_features_in_a_tuple_a_list_or_a_dict(clip_model, batch, wrap):
    class Wrapped(TextEncoder):
        def forward(self, prompts, tokenized_prompts):
            return wrap(super().forward(prompts, tokenized_prompts))

    regularizer = make_regularizer(clip_model)
    host = make_host(clip_model)
    host.text_encoder = Wrapped(clip_model)
    attach(host, regularizer)
    out = host.text_encoder(prompts=host.prompt_learner(), tokenized_prompts=host.tokenized_prompts)
    features = next(t for t in (out.values() if isinstance(out, dict) else out) if isinstance(t, Tensor))
    assert type(out) is type(wrap(features))
    features.square().sum().backward()
    other = make_host(clip_model)
    square = other.text_encoder(other.prompt_learner(), other.tokenized_prompts).square().sum()
    (square + term(other, regularizer, batch)).backward()
    assert_close(gradients(host), gradients(other))


def test_a_half_precision_host(pristine, batch):
    half = copy.deepcopy(pristine)
    openai_clip().model.convert_weights(half)
    regularizer = PerplexityRegularizer(half.token_embedding.weight)
    host = make_host(half)
    host.prompt_learner.meta_net.half()
    assert host.prompt_learner.ctx.dtype == torch.float16
    handle = attach(host, regularizer)
    batch = (batch[0].half(), batch[1])
    host_loss(host, batch).backward()
    gradient = expected(half, regularizer, batch)["prompt_learner.ctx"]
    assert (host.prompt_learner.ctx.grad - gradient).norm() < 1e-2 * gradient.norm()
    assert handle.last.total.dtype == torch.float32
