"""attach under gradient checkpointing: the term joins once, or an error says why it cannot."""

from __future__ import annotations

import copy

import pytest
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from plpp_reg import attach
from plpp_reg.errors import InputError

from helpers.attach import (
    assert_close,
    expected,
    gradients,
    host_loss,
    make_host,
    make_regularizer,
    term,
)
from mini_hosts import LossInTrainer, TextEncoder, frozen


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
    host_loss(host, batch).backward()  # and a step before that has none
    host.zero_grad()
    with set_checkpoint_early_stop(False):
        checkpoint(host, images, batch[1], use_reentrant=reentrant).backward()
    assert len(handle._group.measured) == 3 and len(handle._group.passes) == 3
    assert_close(gradients(host), expected(clip_model, regularizer, batch, kind="forward"))


@pytest.mark.parametrize("reentrant", [False, True])
def test_two_backward_passes_through_a_checkpointed_text_encoder(clip_model, batch, reentrant):
    regularizer = make_regularizer(clip_model)
    host, other = make_host(clip_model), make_host(clip_model)
    host.text_encoder = Checkpointed(host.text_encoder, reentrant)
    attach(host, regularizer, backward_pass=2)
    for model in (host, other):
        logits = model(batch[0])
        logits.square().mean().backward(retain_graph=True)
        loss = F.cross_entropy(logits, batch[1])
        (loss if model is host else loss + term(model, regularizer, batch)).backward()
    assert_close(gradients(host), gradients(other))


@pytest.mark.parametrize("reentrant", [False, True])
def test_two_losses_of_a_checkpointed_text_encoder(clip_model, batch, reentrant):
    """Each text pass is run again for the forward pass that it belongs to, whatever came after that."""
    regularizer = make_regularizer(clip_model)
    host, other = make_host(clip_model, "forward"), make_host(clip_model, "forward")
    host.text_encoder = Checkpointed(host.text_encoder, reentrant)
    attach(host, regularizer)
    parts = [batch, (batch[0][:2], batch[1][:2])]
    sum(host_loss(host, part) for part in parts).backward()
    sum(host_loss(other, part) + term(other, regularizer, part) for part in parts).backward()
    assert_close(gradients(host), gradients(other))


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


def test_a_reentrant_checkpoint_that_hides_the_prompts_is_an_error(clip_model, batch):
    class HiddenPrompts(LossInTrainer):
        def forward(self, images):
            def texts(anchor):
                return self.text_encoder(self.prompt_learner(), self.tokenized_prompts) + anchor

            anchor = images.new_zeros((), requires_grad=True)
            return self.encode_image(images) @ checkpoint(texts, anchor, use_reentrant=True).t()

    host = frozen(HiddenPrompts(clip_model)).train()
    attach(host, make_regularizer(clip_model))
    with pytest.raises(InputError, match="^text_encoder: expected a text pass that is seen in the forward pass.*use_reentrant"):
        host_loss(host, batch).backward()
