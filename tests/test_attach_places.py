"""Where attach looks for the context, its positions and the tower, and what it refuses."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from plpp_reg import PerplexityRegularizer, attach
from plpp_reg.attachment.layout import Layouts, find_context
from plpp_reg.errors import InputError

from helpers.attach import (
    assert_close,
    expected,
    gradients,
    host_loss,
    make_host,
    make_regularizer,
    places,
    states,
)
from mini_hosts import NAMES, LossInTrainer, TextEncoder, frozen


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
