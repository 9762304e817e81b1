"""A term that cannot join says so, and no text pass waits for the device more than once."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from plpp_reg import attach
from plpp_reg.errors import InputError
from plpp_reg.loss import functional as PF
from plpp_reg.loss.nearest import NearestWords

from counting import Waits
from helpers.attach import assert_close, gradients, host_loss, make_host, make_regularizer
from helpers.inline import WIDTH, OpenAI, OpenAILayers, words_of


class Functional(OpenAI):
    """The last norm's weights are used, the module is never called."""

    def tower(self, prompts):
        x = self.clip.transformer((prompts + self.clip.positional_embedding).permute(1, 0, 2)).permute(1, 0, 2)
        return F.layer_norm(x, (WIDTH,), self.clip.ln_final.weight, self.clip.ln_final.bias)


def test_a_term_that_never_joins_stops_the_first_backward_pass(clip_model):
    host = Functional(clip_model, words_of(clip_model.token_embedding.weight)).train()
    attach(host, make_regularizer(clip_model))
    loss = host()
    with pytest.raises(InputError, match="^model: a gradient reached ctx that the term did not join: .*got no such text pass"):
        loss.backward()


def test_a_loss_beside_the_text_features_stops_the_optimizer(clip_model):
    host = OpenAI(clip_model, words_of(clip_model.token_embedding.weight)).train()
    attach(host, make_regularizer(clip_model))
    optimizer = torch.optim.SGD([host.ctx], 0.1)
    host().backward()
    host.ctx.square().sum().backward()  # beside a loss that has the term it is no matter
    optimizer.step()
    before = host.ctx.detach().clone()
    host().detach()
    host.ctx.square().sum().backward()
    with pytest.raises(InputError, match="got such text passes that it did not come from"):
        optimizer.step()
    assert torch.equal(host.ctx, before)
    elsewhere = nn.Parameter(torch.ones(1, requires_grad=True))
    elsewhere.sum().backward()
    torch.optim.SGD([elsewhere], 0.1).step()


def test_training_in_evaluation_mode_stops_the_optimizer(clip_model):
    """Hugging Face's from_pretrained gives a model in evaluation mode."""
    host = OpenAI(clip_model, words_of(clip_model.token_embedding.weight)).eval()
    handle = attach(host, make_regularizer(clip_model))
    optimizer = torch.optim.SGD([host.ctx], 0.1)
    host().backward()
    with pytest.raises(InputError, match="^prompt_learner: expected OpenAI in training mode where ctx is trained, got eval"):
        optimizer.step()
    host.train()
    host().backward()
    optimizer.step()
    host.eval()
    handle.remove()
    host().backward()
    optimizer.step()


def test_a_second_call_of_the_last_norm_is_refused(clip_model):
    class Intermediates(OpenAILayers):
        def tower(self, prompts):
            x, states = (prompts + self.clip.positional_embedding).permute(1, 0, 2), []
            for block in self.clip.transformer.resblocks:
                x = block(x)
                states.append(self.clip.ln_final(x.permute(1, 0, 2)))
            return states[-1]

    host = Intermediates(clip_model, words_of(clip_model.token_embedding.weight)).train()
    attach(host, make_regularizer(clip_model))
    with pytest.raises(InputError, match="^final_norm: expected one call for each pass through the tower"):
        host()


def test_a_model_that_was_compiled_before(clip_model):
    """What was compiled knows of no hooks: it is made anew."""
    host, other = (OpenAI(clip_model, words_of(clip_model.token_embedding.weight)).train() for _ in range(2))
    regularizer = make_regularizer(clip_model)
    compiled = torch.compile(host, backend="aot_eager")
    compiled().backward()
    host.zero_grad()
    attach(compiled, regularizer)
    compiled().backward()
    other.with_term(regularizer).backward()
    assert_close(gradients(host), gradients(other), 1e-9)


# ---- a GPU is not waited for -----------------------------------------------------------------------------------------


class Anew(NearestWords):
    """An accelerator's way."""

    def __call__(self, *arguments):
        return PF.search_all(*arguments)


@pytest.mark.parametrize("position", ["end", "front"])
def test_a_text_pass_waits_for_the_device_once(clip_model, batch, position):
    host = make_host(clip_model, position=position)
    counts = []
    for plain in (True, False):
        if not plain:
            regularizer = make_regularizer(clip_model)
            regularizer.nearest = Anew()
            attach(host, regularizer)
        host_loss(host, batch).backward()
        with Waits() as waits:
            host_loss(host, batch).backward()
        counts.append(waits.by_name)
    assert counts[1] - counts[0] == {"tolist": 1}, counts
