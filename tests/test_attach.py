"""attach: what it adds equals explicit addition, and nothing else changes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from plpp_reg import PerplexityRegularizer, attach
from plpp_reg.attachment.layout import Layout, Layouts, _values

from helpers.attach import (
    LAYOUTS,
    assert_close,
    expected,
    gradients,
    host_loss,
    make_host,
    make_regularizer,
    places,
    states,
)
from mini_hosts import NAMES, LossInForward, LossInTrainer, frozen

# ---- equal to explicit addition --------------------------------------------------------------------------------------


@pytest.mark.parametrize("learner", LAYOUTS, ids=lambda d: "-".join(map(str, d.values())))
@pytest.mark.parametrize("kind", ["trainer", "forward"])
def test_the_gradient_is_that_of_explicit_addition(clip_model, batch, kind, learner):
    regularizer = make_regularizer(clip_model)
    host = make_host(clip_model, kind, **learner)
    attach(host, regularizer)
    host_loss(host, batch).backward()
    wanted = expected(clip_model, regularizer, batch, kind=kind, **learner)
    assert_close(gradients(host), wanted)
    plain = make_host(clip_model, kind, **learner)
    host_loss(plain, batch).backward()
    assert (wanted["prompt_learner.ctx"] - plain.prompt_learner.ctx.grad).norm() > 1e-2 * wanted["prompt_learner.ctx"].norm()


@pytest.mark.parametrize("learner", LAYOUTS, ids=lambda d: "-".join(map(str, d.values())))
def test_the_vectors_own_states(clip_model, batch, learner):
    regularizer = make_regularizer(clip_model)
    host = make_host(clip_model, "trainer", **learner)
    attach(host, regularizer, states="own")
    host_loss(host, batch).backward()
    wanted = expected(clip_model, regularizer, batch, own=True, kind="trainer", **learner)
    assert_close(gradients(host), wanted)
    preceding = expected(clip_model, regularizer, batch, kind="trainer", **learner)["prompt_learner.ctx"]
    assert (wanted["prompt_learner.ctx"] - preceding).norm() > 1e-3 * preceding.norm()


@pytest.mark.parametrize("settings", [{"normalize_over": "vocabulary"}, {"label": "hard", "normalize_over": "vocabulary"}])
def test_the_regularizers_settings_act(clip_model, batch, settings):
    regularizer = make_regularizer(clip_model, **settings)
    host = make_host(clip_model, "seven")
    attach(host, regularizer)
    host_loss(host, batch).backward()
    assert_close(gradients(host), expected(clip_model, regularizer, batch, kind="seven"))


def test_deep_prompts_get_their_share(clip_model, batch):
    regularizer = make_regularizer(clip_model)
    host, plain = make_host(clip_model, "seven"), make_host(clip_model, "seven")
    attach(host, regularizer)
    for model in (host, plain):
        host_loss(model, batch).backward()
    wanted = expected(clip_model, regularizer, batch, kind="seven")
    assert_close(gradients(host), wanted)
    assert not torch.allclose(plain.prompt_learner.deep[0].grad, wanted["prompt_learner.deep.0"])


def test_every_distinct_prompt_is_computed_once(clip_model, batch):
    class Counting(PerplexityRegularizer):
        shapes: list = []

        def components(self, context, hidden, with_perplexity=True):
            self.shapes.append((tuple(context.shape), tuple(hidden.shape)))
            return super().components(context, hidden, with_perplexity)

    regularizer = Counting(clip_model.token_embedding.weight)
    for kind, learner, wanted in [
        ("trainer", {"position": "end"}, [((1, 4, 64), (1, 4, 64))]),
        ("trainer", {"position": "front"}, [((1, 4, 64), (5, 4, 64))]),
        ("trainer", {"class_specific": True}, [((5, 4, 64), (5, 4, 64))]),
        ("forward", {"position": "end"}, [((1, 4, 64), (1, 4, 64))] * 3),
    ]:
        host = make_host(clip_model, kind, **learner)
        attach(host, regularizer)
        Counting.shapes.clear()
        host_loss(host, batch)
        assert Counting.shapes == wanted, (kind, learner)


def test_prompts_of_all_images_in_one_text_pass(clip_model, batch):
    """CoCoOp's prompts, B * C rows at once: B distinct ones."""

    class AtOnce(LossInForward):
        def forward(self, images, labels=None):
            images = self.encode_image(images)
            prompts = torch.cat([self.prompt_learner(self.prompt_learner.meta_net(image)) for image in images])
            texts = F.normalize(self.text_encoder(prompts, self.tokenized_prompts.repeat(len(images), 1)), dim=-1)
            logits = torch.einsum("be,bce->bc", images, texts.view(len(images), len(NAMES), -1))
            return F.cross_entropy(self.logit_scale.exp() * logits, labels)

    regularizer = make_regularizer(clip_model)
    host = frozen(AtOnce(clip_model)).train()
    handle = attach(host, regularizer)
    host_loss(host, batch).backward()
    assert handle.rows == 3 * 4
    assert_close(gradients(host), expected(clip_model, regularizer, batch, kind="forward"))


def test_class_names_may_change_from_call_to_call(clip_model, batch):
    """A host that draws a subset of the classes: the places follow the tokenised prompts."""

    class Subset(LossInTrainer):
        def forward(self, images, classes=(0, 1, 2, 3, 4)):
            classes = list(classes)
            prompts = self.prompt_learner()[classes]
            texts = F.normalize(self.text_encoder(prompts, self.tokenized_prompts[classes]), dim=-1)
            return self.encode_image(images) @ texts.t()

    regularizer = make_regularizer(clip_model)
    host = frozen(Subset(clip_model, position="front")).train()
    handle = attach(host, regularizer)
    for classes in ((0, 1), (3, 4), (1, 0)):
        host(batch[0], classes).sum().backward()
        last = handle.last
        prompts, at = host.prompt_learner(), places(4, "front")
        hidden = states(host, prompts)
        v = torch.stack([prompts[c, at[c]] for c in classes])
        h = torch.stack([hidden[c, [t - 1 for t in at[c]]] for c in classes])
        assert torch.isclose(last.total, regularizer(v, h), rtol=1e-12)


def test_prompts_that_differ_behind_their_last_vector_are_one():
    """Prompts of six places: 0 and 3 differ only behind their vectors, 1 has them elsewhere, 2 other words, 4 other vectors."""
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randn(1, 6, 8, generator=generator).repeat(5, 1, 1)
    slot = torch.tensor([[1, 2], [3, 4], [1, 2], [1, 2], [1, 2]])
    prompts[2, 0] += 1
    prompts[3, 3:] += 1
    prompts[4, 2] += 1
    yes = torch.ones(5, dtype=torch.bool)
    shared = Layout(slot, torch.zeros(5, dtype=torch.long), yes, yes)

    def alike(prompts, layout):
        rows = Layouts(nn.Module(), None, "own")._distinct(_values(prompts, layout, 6, None), prompts, 0, True)
        assert rows.distinct == len(set(rows.alike.tolist()))
        return rows.alike.tolist()

    assert alike(prompts, shared) == [0, 1, 2, 0, 3]
    assert alike(prompts, shared._replace(owner=torch.tensor([0, 0, 0, 1, 0]))) == [0, 1, 2, 3, 4]
    assert alike(prompts[[0, 3]], Layout(*(t[[0, 3]] for t in shared))) == [0, 0]


# ---- the handle ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize_over", ["topk", "vocabulary"])
def test_last_is_detached_and_is_the_mean_over_images(clip_model, batch, normalize_over):
    regularizer = make_regularizer(clip_model, normalize_over=normalize_over)
    host = make_host(clip_model, "forward")
    handle = attach(host, regularizer)
    assert handle.last is None
    host_loss(host, batch).backward()
    last, each = handle.last, []
    for image in host.encode_image(batch[0]):
        prompts = host.prompt_learner(host.prompt_learner.meta_net(image))
        each.append(regularizer.components(prompts[:1, 1:5], states(host, prompts)[:1, 0:4]))
    assert not any(t.requires_grad for t in last)
    for name in ("total", "perplexity_loss", "inverse_loss"):
        assert torch.isclose(getattr(last, name), torch.stack([getattr(p, name) for p in each]).mean(), rtol=1e-12)
    perplexity = torch.stack([p.perplexity for p in each]).log().mean().exp()
    assert torch.isclose(last.perplexity, perplexity, rtol=1e-12)


def test_remove_restores_the_model_to_the_bit(clip_model, batch):
    host = make_host(clip_model)
    with torch.no_grad():
        host(batch[0])  # OpenAI's blocks cast their mask when they first run
    before = {name: {k: repr(v) for k, v in vars(m).items()} for name, m in host.named_modules()}
    state = {k: v.clone() for k, v in host.state_dict().items()}
    handle = attach(host, make_regularizer(clip_model))
    assert host.state_dict().keys() == state.keys()
    host_loss(host, batch).backward()
    host.zero_grad()
    handle.remove()
    handle.remove()
    assert {name: {k: repr(v) for k, v in vars(m).items()} for name, m in host.named_modules()} == before
    assert all(torch.equal(v, state[k]) for k, v in host.state_dict().items())
    plain = make_host(clip_model)
    for model in (host, plain):
        host_loss(model, batch).backward()
    assert torch.equal(host.prompt_learner.ctx.grad, plain.prompt_learner.ctx.grad)
    assert type(attach(host, make_regularizer(clip_model))).__name__ == "Handle"  # and may be attached to again
