"""attach: the term joins whatever backward passes a host makes, once, and nothing else changes."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

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
    assert not handle._entrance.caught  # nor is anything kept
    copy.deepcopy(host)


def test_a_gradient_scaler_scales_the_term_as_it_does_the_loss(clip_model, batch):
    regularizer = make_regularizer(clip_model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    host = make_host(clip_model)
    attach(host, regularizer, scaler=scaler)
    scaler.scale(host_loss(host, batch)).backward()
    assert_close(gradients(host), expected(clip_model, regularizer, batch, factor=1024.0))


@pytest.mark.parametrize("autocast", [True, False])
def test_a_scaler_that_nobody_named_stops_its_step(clip_model, batch, autocast):
    """Nothing in the forward pass shows it: autocast to bfloat16, or none."""
    host = make_host(clip_model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    handle = attach(host, make_regularizer(clip_model))
    optimizer = torch.optim.SGD([host.prompt_learner.ctx], 0.1)
    before = host.prompt_learner.ctx.detach().clone()

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = host_loss(host, batch)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()

    for wrong, got in ((None, "None"), (False, "False"), (torch.amp.GradScaler("cpu"), "another one")):
        handle.scaler = wrong
        with pytest.raises(InputError, match=f"^scaler: expected the GradScaler that scales the loss .* got {got}: "):
            step()
        scaler.update(1024.0)
        optimizer.zero_grad()
    assert torch.equal(host.prompt_learner.ctx, before)
    handle.scaler = scaler
    step()
    handle.scaler = None
    host_loss(host, batch).backward()
    torch.amp.GradScaler("cpu", enabled=False).step(optimizer)


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


def test_a_second_backward_pass_that_nobody_named_is_told_once(clip_model, batch):
    """The norm of a gradient for a log, and then the training's backward pass: the term rode on the first."""
    host, plain = make_host(clip_model), make_host(clip_model)
    attach(host, make_regularizer(clip_model))
    with pytest.warns(UserWarning, match="a second backward pass came through one forward pass, the term rode on the first"):
        loss = host_loss(host, batch)
        torch.autograd.grad(loss, host.prompt_learner.ctx, retain_graph=True)
        loss.backward()
    host_loss(plain, batch).backward()
    assert_close(gradients(host), gradients(plain))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss = host_loss(host, batch)
        loss.backward(retain_graph=True)
        loss.backward()


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


class Twice(LossInTrainer):
    """A second text pass, with a graph, that no loss comes from."""

    def forward(self, images):
        logits = super().forward(images)
        self.second = self.text_encoder(self.prompt_learner(), self.tokenized_prompts)
        if not self.keeps:
            self.second = self.second.detach()
        return logits


def test_a_text_pass_that_no_loss_can_come_from_does_not_count(clip_model, batch):
    regularizer = make_regularizer(clip_model)
    host = frozen(Twice(clip_model)).train()
    host.keeps = False
    attach(host, regularizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        host_loss(host, batch).backward()
    assert_close(gradients(host), expected(clip_model, regularizer, batch))


def test_a_text_pass_that_no_loss_comes_from_is_told(clip_model, batch):
    host = frozen(Twice(clip_model)).train()
    host.keeps = True
    attach(host, make_regularizer(clip_model))
    with pytest.warns(UserWarning, match="has met 1 of the 2 text passes of Twice's forward pass, the others' share"):
        host_loss(host, batch).backward()


def test_a_pass_that_was_broken_off_does_not_count(clip_model, batch):
    """Outside the model's forward pass, where all since the last backward pass share a loss."""
    regularizer = make_regularizer(clip_model)
    host = make_host(clip_model)
    attach(host, regularizer)
    host.text_encoder(host.prompt_learner(), host.tokenized_prompts)
    F.cross_entropy(LossInTrainer.forward(host, batch[0]), batch[1]).backward()
    assert_close(gradients(host), expected(clip_model, regularizer, batch))


def test_a_gradient_of_the_images_alone_is_no_loss_of_the_context(clip_model, batch):
    """CoCoOp's prompts depend on the images: an attack's backward pass comes through the text tower."""
    regularizer = make_regularizer(clip_model)
    host = make_host(clip_model, "forward")
    attach(host, regularizer)
    images = batch[0].clone().requires_grad_()
    torch.autograd.grad(host(images, batch[1]), images)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        host_loss(host, batch).backward()
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
