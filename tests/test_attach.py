"""attach: what it adds equals explicit addition, and nothing else changes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from plpp_reg import PerplexityRegularizer, attach
from plpp_reg.attachment.layout import Layout, Layouts, _values, find_context
from plpp_reg.errors import InputError

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
from mini_hosts import NAMES, LossInForward, LossInTrainer, TextEncoder, frozen

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


# ---- finding places --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", ["end", "middle", "front", "tensor"])
def test_places_that_are_given(clip_model, batch, position):
    """A learner whose vectors go through a layer: where they stand cannot be read off the gradient."""

    class Layered(LossInTrainer):
        def forward(self, images):
            learner = self.prompt_learner
            rows = learner.ctx @ learner.mix
            texts = self.text_encoder(learner(rows - learner.ctx), self.tokenized_prompts)
            return self.encode_image(images) @ F.normalize(texts, dim=-1).t()

    where = "front" if position == "tensor" else position
    host = frozen(Layered(clip_model, position=where)).train()
    host.prompt_learner.mix = nn.Parameter(torch.eye(64, dtype=torch.float64) + 0.1)
    regularizer = make_regularizer(clip_model)
    handle = attach(host, regularizer)
    with pytest.raises(InputError, match="position: expected each context vector once in each prompt"):
        host(batch[0])
    handle.remove()
    given = torch.tensor(places(4, where)) if position == "tensor" else position
    handle = attach(host, regularizer, position=given)
    host(batch[0])
    last, learner = handle.last, host.prompt_learner
    prompts = learner(learner.ctx @ learner.mix - learner.ctx)
    at = torch.tensor(places(4, where))
    row = torch.arange(len(NAMES)).unsqueeze(1)
    wanted = regularizer(prompts[row, at], states(host, prompts)[row, at - 1])
    assert torch.isclose(last.total, wanted, rtol=1e-12)


def test_places_that_are_given_and_are_others(clip_model, batch):
    host = make_host(clip_model, position="front")
    handle = attach(host, make_regularizer(clip_model), position="end")
    with pytest.raises(InputError, match=r"^position: expected \[2, 3, 4, 5\], where prompt 0 has .* got \[1, 2, 3, 4\]"):
        host(batch[0])
    handle.remove()
    attach(host, make_regularizer(clip_model), position="front")
    host(batch[0]).sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_vector_in_two_places_is_no_place(dtype):
    """Whatever the two are: what arrives is the sum of two numbers, and may be the number of a third place."""
    words = torch.randn(1, 77, 64, dtype=dtype)
    for a in range(1, 38):
        for b in range(a + 1, 76 - a):
            context = torch.randn(1, 64, dtype=dtype, requires_grad=True)
            prompts = torch.cat([words[:, :a], context[None], words[:, a + 1 : b], context[None], words[:, b + 1 :]], 1)
            assert not find_context(prompts, context).found.any(), (a, b)


def test_a_context_that_is_made_anew_each_time(clip_model, batch):
    class Same(nn.Module):
        def forward(self, x):
            return x + 0

    host, regularizer = make_host(clip_model), make_regularizer(clip_model)
    parametrize.register_parametrization(host.prompt_learner, "ctx", Same())
    with pytest.raises(InputError, match="^context: expected the name of a parameter, got 'prompt_learner.ctx', which is made"):
        attach(host, regularizer, context="prompt_learner.ctx")
    attach(host, regularizer, context="prompt_learner.parametrizations.ctx.original", position="end")
    host_loss(host, batch).backward()
    wanted = expected(clip_model, regularizer, batch)["prompt_learner.ctx"]
    assert_close(gradients(host), {"prompt_learner.parametrizations.ctx.original": wanted})


def test_a_frozen_context_is_told(clip_model):
    """The vectors that are trained may be others: a residual beside a context that stands still."""
    host = make_host(clip_model)
    host.prompt_learner.ctx.requires_grad_(False)
    with pytest.warns(UserWarning, match="^PLPP: prompt_learner.ctx is frozen: the term is off as long as it is"):
        attach(host, make_regularizer(clip_model))


def test_parts_by_other_names(clip_model, batch):
    class Renamed(nn.Module):
        def __init__(self, host):
            super().__init__()
            self.words, self.tower, self.rest = host.prompt_learner, host.text_encoder, [host]
            self.words.vectors = nn.Parameter(host.prompt_learner.ctx.detach().clone())
            self.teacher = TextEncoder(copy.deepcopy(clip_model))

        def forward(self, images):
            words = self.words
            texts = self.tower(words(words.vectors - words.ctx.detach()), words.tokenized_prompts)
            return self.rest[0].encode_image(images) @ texts.t()

    host = make_host(clip_model)
    host.prompt_learner.ctx.requires_grad_(False)
    model = Renamed(host).train()
    with pytest.raises(InputError, match="got tower, teacher: give it as text_encoder="):
        attach(model, make_regularizer(clip_model))
    for given in (
        {"text_encoder": "tower", "context": "words.vectors"},
        {"text_encoder": model.tower, "context": model.words.vectors, "prompt_learner": "words"},
    ):
        handle = attach(model, make_regularizer(clip_model), **given)
        assert handle.prompt_learner is model.words
        model(batch[0]).sum().backward()
        assert handle.ever_joined
        handle.remove()


# ---- bad input -------------------------------------------------------------------------------------------------------


def test_a_model_with_no_context(clip_model):
    with pytest.raises(InputError, match=r"^context: looked in CLIP for one parameter named ctx, .* found none: give it"):
        attach(clip_model, make_regularizer(clip_model))


def test_a_vocabulary_of_another_width(clip_model, make_clip):
    regularizer = PerplexityRegularizer(torch.zeros(100, 128))
    with pytest.raises(InputError, match=r"^context: expected width 128, the vocabulary's, got prompt_learner.ctx \(4, 64\)"):
        attach(make_host(clip_model), regularizer)


def test_a_text_encoder_of_another_width(clip_model, make_clip):
    host = make_host(clip_model)
    host.text_encoder = TextEncoder(make_clip(width=128, layers=1))
    with pytest.raises(InputError, match="expected width 64, the vocabulary's, got ln_final of width 128"):
        attach(host, make_regularizer(clip_model))


def test_data_parallel(clip_model):
    host = make_host(clip_model)
    with pytest.raises(InputError, match="one device, got nn.DataParallel"):
        attach(nn.DataParallel(host), make_regularizer(clip_model))
    attach(host, make_regularizer(clip_model))
    replica = host.text_encoder._replicate_for_data_parallel()
    with pytest.raises(InputError, match="one device, got nn.DataParallel"):
        replica(host.prompt_learner(), host.tokenized_prompts)


def test_a_second_attach(clip_model):
    host = make_host(clip_model)
    attach(host, make_regularizer(clip_model))
    for model in (host, copy.deepcopy(host)):
        with pytest.raises(InputError, match="this one has it"):
            attach(model, make_regularizer(clip_model))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "host"}, "^model: expected a torch.nn.Module, got str"),
        ({"regularizer": nn.Identity()}, "^regularizer: expected a PerplexityRegularizer, got Identity"),
        ({"text_encoder": "txt"}, "^text_encoder: expected the name of a submodule, got 'txt'"),
        ({"text_encoder": "image_encoder"}, "holds ln_final, got VisionTransformer without it"),
        ({"context": "prompt_learner.words"}, "^context: expected the name of a parameter, got 'prompt_learner.words'"),
        ({"context": torch.zeros(3)}, r"^context: expected \(M, 64\) or \(C, M, 64\), got \(3,\)"),
        ({"position": "back"}, "^position: expected one of 'end', 'middle', 'front' or a tensor, got 'back'"),
        ({"states": "before"}, "^states: expected one of 'preceding', 'own', got 'before'"),
        ({"backward_pass": 0}, "^backward_pass: expected an integer >= 1, or a tuple of them, got 0"),
        ({"backward_pass": True}, "^backward_pass: expected an integer >= 1, or a tuple of them, got True"),
        ({"forward_passes": True}, "^forward_passes: expected an integer >= 1, got True"),
        ({"loss_scale": "half"}, "^loss_scale: expected a finite number > 0, got 'half'"),
        ({"loss_scale": 0}, "^loss_scale: expected a finite number > 0, got 0"),
        ({"loss_scale": float("nan")}, "^loss_scale: expected a finite number > 0, got nan"),
        ({"position": torch.ones(4)}, "^position: expected integers, got a tensor of torch.float32"),
        ({"scaler": 1024.0}, "^scaler: expected a GradScaler, None or False, got 1024.0"),
    ],
)
def test_bad_arguments(clip_model, change, message):
    arguments = {"model": make_host(clip_model), "regularizer": make_regularizer(clip_model), **change}
    with pytest.raises(InputError, match=message):
        attach(arguments.pop("model"), arguments.pop("regularizer"), **arguments)


def test_positions_of_the_wrong_shape_and_before_the_first_token(clip_model, batch):
    for position, message in [
        (torch.zeros(3, dtype=torch.long), r"expected integers \(4,\) or \(5, 4\), got \(3,\)"),
        (torch.tensor([0, 1, 2, 3]), r"expected \[1, 2, 3, 4\], where prompt 0 has"),
    ]:
        host = make_host(clip_model)
        attach(host, make_regularizer(clip_model), position=position)
        with pytest.raises(InputError, match=message):
            host(batch[0])
    context = torch.randn(2, 8, requires_grad=True)
    prompts = torch.cat([2 * context, torch.randn(3, 8)])[None]  # the graph does not show where they stand
    with pytest.raises(InputError, match="after the first token"):
        Layouts(nn.Module(), torch.tensor([0, 1]), "preceding").of(prompts, context)
    assert Layouts(nn.Module(), torch.tensor([0, 1]), "own").of(prompts, context).slot.tolist() == [[0, 1]]


def test_a_text_encoder_that_is_never_called_with_prompts(clip_model, batch):
    class Cached(LossInTrainer):
        def forward(self, images):
            return self.encode_image(images).sum() + self.prompt_learner.ctx.sum()

    host = frozen(Cached(clip_model)).train()
    attach(host, make_regularizer(clip_model))
    loss = host(batch[0])
    with pytest.raises(InputError, match="a gradient reached prompt_learner.ctx .* got no such text pass: name final_norm="):
        loss.backward()
