"""attach in loops of other shapes: several forward passes, copies, second derivatives, compiled models."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.multiprocessing
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from plpp_reg import attach
from plpp_reg.attachment import attached
from plpp_reg.errors import InputError

from helpers.attach import assert_close, expected, gradients, host_loss, make_host, make_regularizer, places, states, term
from mini_hosts import NAMES, LossInTrainer, PromptLearner, frozen

# ---- several forward passes ------------------------------------------------------------------------------------------


def two_views(host, batch):
    """R-Drop's and FixMatch's way: one loss of two forward passes."""
    a, b = host(batch[0]), host(batch[0].flip(-1))
    return F.cross_entropy(a, batch[1]) + F.mse_loss(a, b)


def test_two_forward_passes_that_share_a_loss(clip_model, batch):
    regularizer = make_regularizer(clip_model)
    host, other = make_host(clip_model), make_host(clip_model)
    handle = attach(host, regularizer, forward_passes=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        two_views(host, batch).backward()
    (two_views(other, batch) + term(other, regularizer, batch)).backward()
    assert_close(gradients(host), gradients(other))
    with pytest.warns(UserWarning, match="1 forward passes of LossInTrainer met .* forward_passes is 2: .* counts 0.5 times"):
        host_loss(host, batch).backward()
    assert handle.last is not None


def test_a_count_that_nobody_named_is_told_once(clip_model, batch):
    host = make_host(clip_model)
    attach(host, make_regularizer(clip_model))
    with pytest.warns(UserWarning, match="2 forward passes of LossInTrainer met in one backward pass.* counts 2 times"):
        two_views(host, batch).backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        two_views(host, batch).backward()
        host_loss(host, batch).backward()
    with pytest.raises(InputError, match="^forward_passes: expected an integer >= 1, got 0"):
        attach(make_host(clip_model), make_regularizer(clip_model), forward_passes=0)


def test_a_teachers_pass_without_gradients_is_no_pass_of_the_loss(clip_model, batch):
    class Teaching(LossInTrainer):
        def forward(self, images):
            logits = super().forward(images)
            with torch.no_grad():
                self.text_encoder(self.prompt_learner(), self.tokenized_prompts)
            prompts = self.prompt_learner()
            with torch.no_grad():
                LossInTrainer.forward(self, images)
            assert prompts.requires_grad
            return logits

    regularizer = make_regularizer(clip_model)
    host = frozen(Teaching(clip_model)).train()
    attach(host, regularizer)
    host_loss(host, batch).backward()
    assert_close(gradients(host), expected(clip_model, regularizer, batch))


def test_evaluation_inside_training(clip_model, batch):
    regularizer = make_regularizer(clip_model)
    host = make_host(clip_model)
    attach(host, regularizer)
    loss = host_loss(host, batch)
    host.eval()
    with torch.no_grad():
        host_loss(host, batch)
    host_loss(host, batch)  # and one that makes a graph, for nothing
    host.train()
    loss.backward()
    assert_close(gradients(host), expected(clip_model, regularizer, batch))


# ---- what changes between the calls ----------------------------------------------------------------------------------


class Named(LossInTrainer):
    """Classes of one number, names before the context, a text encoder that is called without token ids."""

    def forward(self, images, classes):
        prompts = self.prompt_learner()[classes]
        encoder = self.text_encoder
        at = self.tokenized_prompts[classes].argmax(-1)
        hidden = states_of(encoder, prompts)
        texts = hidden[torch.arange(len(hidden)), at] @ encoder.text_projection
        return self.encode_image(images) @ F.normalize(texts, dim=-1).t()


def states_of(encoder, prompts):
    x = (prompts + encoder.positional_embedding).permute(1, 0, 2)
    for block in encoder.transformer.resblocks:
        x = block(x)
    return encoder.ln_final(x.permute(1, 0, 2))


def test_other_names_of_the_same_number_in_the_next_call(clip_model, batch):
    host = frozen(Named(clip_model, position="front")).train()
    other = frozen(LossInTrainer(clip_model, position="front")).train()
    regularizer = make_regularizer(clip_model)
    attach(host, regularizer)
    at = places(4, "front")
    for classes in ([0, 2], [1, 3], [3, 1], [0, 4]):
        host.zero_grad()
        other.zero_grad()
        host(batch[0], classes).sum().backward()
        prompts = other.prompt_learner()
        hidden = states(other, prompts)
        tokens = other.tokenized_prompts[classes]
        texts = F.normalize(other.text_encoder(prompts[classes], tokens), dim=-1)
        v = torch.stack([prompts[c, at[c]] for c in classes])
        h = torch.stack([hidden[c, [t - 1 for t in at[c]]] for c in classes])
        ((other.encode_image(batch[0]) @ texts.t()).sum() + regularizer(v, h)).backward()
        assert_close(gradients(host), gradients(other), 1e-9)


def test_a_context_that_is_frozen_and_trained_again(clip_model, batch):
    regularizer = make_regularizer(clip_model)
    host = make_host(clip_model)
    attach(host, regularizer)
    wanted = expected(clip_model, regularizer, batch)
    for trained in (True, False, True):
        host.zero_grad(set_to_none=True)
        host.prompt_learner.ctx.requires_grad_(trained)
        if trained:
            host_loss(host, batch).backward()
            assert_close(gradients(host), wanted)
        else:
            assert not host_loss(host, batch).requires_grad
    # and one that is put in its place
    host.prompt_learner.ctx = nn.Parameter(host.prompt_learner.ctx.detach().clone())
    host_loss(host, batch).backward()
    assert_close(gradients(host), wanted)


# ---- copies and company ----------------------------------------------------------------------------------------------


def test_a_copied_model_keeps_the_term_and_has_a_handle(clip_model, batch):
    regularizer = make_regularizer(clip_model)
    host = make_host(clip_model)
    handle = attach(host, regularizer)
    host_loss(host, batch).backward()
    host.zero_grad()
    twin = copy.deepcopy(host)
    (own,) = attached(twin)
    assert own is not handle and own.context is twin.prompt_learner.ctx and attached(host) == [handle]
    host_loss(twin, batch).backward()
    wanted = expected(clip_model, regularizer, batch)
    assert_close(gradients(twin), wanted)
    assert not gradients(host)
    own.remove()
    assert not attached(twin)
    host_loss(host, batch).backward()
    assert_close(gradients(host), wanted)
    model, its = copy.deepcopy((host, handle))
    assert attached(model) == [its]


def test_a_model_is_copied_after_a_step_with_checkpointed_layers(clip_model, batch):
    class Checkpointed(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return checkpoint(self.inner, x, use_reentrant=False)

    host = make_host(clip_model)
    host.text_encoder.transformer.resblocks = nn.Sequential(*map(Checkpointed, host.text_encoder.transformer.resblocks))
    regularizer = make_regularizer(clip_model)
    attach(host, regularizer)
    host_loss(host, batch).backward()
    wanted = gradients(host)
    twin = copy.deepcopy(host)
    host_loss(twin, batch).backward()
    assert_close(gradients(twin), wanted)


def test_models_that_share_a_regularizer(clip_model, batch):
    regularizer = make_regularizer(clip_model)
    layouts = [{"position": "end"}, {"position": "front"}, {"class_specific": True}]
    hosts = [make_host(clip_model, **layout) for layout in layouts]
    for host in hosts:
        attach(host, regularizer)
    losses = [host_loss(host, batch) for host in hosts]
    sum(losses).backward()
    for host, layout in zip(hosts, layouts, strict=True):
        assert_close(gradients(host), expected(clip_model, regularizer, batch, **layout))


class Shifted(LossInTrainer):
    """One context, and a shift of each class."""

    def __init__(self, clip_model, size, position):
        super().__init__(clip_model, position=position)
        shift = torch.randn(len(NAMES), 4, 64, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
        self.prompt_learner.shift = nn.Parameter(size * shift)

    def forward(self, images):
        prompts = self.prompt_learner(self.prompt_learner.shift)
        texts = F.normalize(self.text_encoder(prompts, self.tokenized_prompts), dim=-1)
        return self.encode_image(images) @ texts.t()


@pytest.mark.parametrize("position", ["end", "front"])
@pytest.mark.parametrize("size", [0.0, 0.1])
def test_prompts_of_equal_numbers_share_the_gradient(clip_model, batch, size, position):
    """What each class adds may begin at zero: their prompts are alike then, but not made of the same."""
    regularizer = make_regularizer(clip_model)
    host, other = (frozen(Shifted(clip_model, size, position)).train() for _ in range(2))
    attach(host, regularizer)
    host_loss(host, batch).backward()
    prompts = other.prompt_learner(other.prompt_learner.shift)
    hidden = states(other, prompts)
    at, row = torch.tensor(places(4, position)), torch.arange(len(NAMES)).unsqueeze(1)
    (host_loss(other, batch) + regularizer(prompts[row, at], hidden[row, at - 1])).backward()
    assert_close(gradients(host), gradients(other))


class InChunks(LossInTrainer):
    """Two classes at a time, as one does where memory is short."""

    def forward(self, images):
        parts = zip(self.prompt_learner().split(2), self.tokenized_prompts.split(2), strict=True)
        texts = torch.cat([self.text_encoder(*part) for part in parts])
        return self.logit_scale.exp() * self.encode_image(images) @ F.normalize(texts, dim=-1).t()


@pytest.mark.parametrize("learner", [{"position": "front"}, {"class_specific": True}])
def test_classes_in_chunks_are_as_in_one_pass(clip_model, batch, learner):
    regularizer = make_regularizer(clip_model)
    host, whole = frozen(InChunks(clip_model, **learner)).train(), make_host(clip_model, **learner)
    handle = attach(host, regularizer)
    host_loss(host, batch).backward()
    assert_close(gradients(host), expected(clip_model, regularizer, batch, **learner))
    last = handle.last
    handle.remove()
    reference = attach(whole, regularizer)
    host_loss(whole, batch)
    for name, figure in last._asdict().items():
        assert torch.isclose(figure, getattr(reference.last, name), rtol=1e-12), name


def test_hooks_of_the_hosts_see_gradients_alone(clip_model, batch):
    regularizer = make_regularizer(clip_model)
    host, seen = make_host(clip_model), []
    host.prompt_learner.ctx.register_hook(lambda gradient: seen.append(gradient) or gradient / 2)
    attach(host, regularizer)
    host_loss(host, batch).backward()
    wanted = expected(clip_model, regularizer, batch, factor=0.5)["prompt_learner.ctx"]
    assert len(seen) == 1 and (host.prompt_learner.ctx.grad - wanted).norm() <= 1e-12 * wanted.norm()


class TwoLearners(LossInTrainer):
    """Two contexts, the prompts of both in one text pass, or in one each."""

    def __init__(self, clip_model, at_once):
        super().__init__(clip_model)
        self.prompt_learner.second = PromptLearner(clip_model, 3, "end")
        self.at_once = at_once

    def forward(self, images):
        prompts = [self.prompt_learner(), self.prompt_learner.second()]
        tokens = [self.tokenized_prompts, self.prompt_learner.second.tokenized_prompts]
        if self.at_once:
            texts = self.text_encoder(torch.cat(prompts), torch.cat(tokens))
        else:
            texts = torch.cat([self.text_encoder(p, t) for p, t in zip(prompts, tokens, strict=True)])
        return self.encode_image(images) @ F.normalize(texts, dim=-1).t()


@pytest.mark.parametrize("at_once", [True, False])
def test_two_prompt_learners(clip_model, batch, at_once):
    regularizer = make_regularizer(clip_model)
    host, other = (frozen(TwoLearners(clip_model, at_once)).train() for _ in range(2))
    with pytest.raises(InputError, match="got prompt_learner.ctx, prompt_learner.second.ctx: give it as context="):
        attach(host, regularizer)
    for context in ("prompt_learner.ctx", "prompt_learner.second.ctx"):
        attach(host, regularizer, context=context)
    assert len(attached(host)) == 2
    host_loss(host, batch).backward()
    total = host_loss(other, batch)
    for learner, m in ((other.prompt_learner, 4), (other.prompt_learner.second, 3)):
        prompts = learner()
        hidden = states_of(other.text_encoder, prompts)
        total = total + regularizer(prompts[0, 1 : 1 + m], hidden[0, :m])
    total.backward()
    assert_close(gradients(host), gradients(other))
    with pytest.raises(InputError, match="^model: expected prompt_learner.ctx without PLPP, this one has it"):
        attach(host, regularizer, context="prompt_learner.ctx")


# ---- second derivatives ----------------------------------------------------------------------------------------------


@pytest.fixture
def twice_differentiable():
    """torch's fused attention has no second derivative on a CPU."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def second_order_host(clip_model):
    return make_host(clip_model), make_regularizer(clip_model, detach_label=False)


def test_a_penalty_on_the_gradient(clip_model, batch, twice_differentiable):
    (host, regularizer), (other, _) = second_order_host(clip_model), second_order_host(clip_model)
    attach(host, regularizer, backward_pass=(1, 2))
    for model in (host, other):
        loss = host_loss(model, batch)
        if model is other:
            loss = loss + term(model, regularizer, batch)
        (g,) = torch.autograd.grad(loss, model.prompt_learner.ctx, create_graph=True)
        (loss + g.square().sum()).backward()
    assert_close(gradients(host), gradients(other), 1e-9)


def test_transforms_of_functions_are_refused(clip_model, batch):
    host = make_host(clip_model)
    attach(host, make_regularizer(clip_model))

    def loss(ctx):
        return F.cross_entropy(torch.func.functional_call(host, {"prompt_learner.ctx": ctx}, (batch[0],)), batch[1])

    with pytest.raises(InputError, match="^model: expected a forward pass that autograd follows, got one within torch.func"):
        torch.func.grad(loss)(host.prompt_learner.ctx.detach())


def test_learning_to_learn(clip_model, batch, twice_differentiable):
    """MAML's way: one step by hand, a second loss at where it led, through functional_call."""
    (host, regularizer), (other, _) = second_order_host(clip_model), second_order_host(clip_model)
    handle = attach(host, regularizer)

    def total(model, ctx):
        logits = torch.func.functional_call(model, {"prompt_learner.ctx": ctx}, (batch[0],))
        loss = F.cross_entropy(logits, batch[1])
        if model is other:
            m = len(ctx)
            prompts = torch.func.functional_call(model.prompt_learner, {"ctx": ctx}, ())
            hidden = states_of(model.text_encoder, prompts)
            loss = loss + regularizer(prompts[0, 1 : 1 + m], hidden[0, :m])
        return loss

    with pytest.raises(InputError, match="^backward_pass: expected to be told what carries the term where .*create_graph=True"):
        (g,) = torch.autograd.grad(total(host, host.prompt_learner.ctx), host.prompt_learner.ctx, create_graph=True)
        g.square().sum().backward()
    host.zero_grad()
    handle.backward_pass = 1
    for model in (host, other):
        ctx = model.prompt_learner.ctx
        (g,) = torch.autograd.grad(total(model, ctx), ctx, create_graph=True)
        total(model, ctx - 0.5 * g).backward()
    assert_close(gradients(host), gradients(other), 1e-9)


def test_a_model_that_is_compiled_after(clip_model, batch):
    regularizer = make_regularizer(clip_model)
    host = make_host(clip_model, "forward")
    attach(host, regularizer)
    torch.compile(host, backend="aot_eager")(*batch).backward()
    assert_close(gradients(host), expected(clip_model, regularizer, batch, kind="forward"), 1e-9)
