"""attach: what it adds equals explicit addition, and nothing else changes.

``expected`` shares no code with plpp_reg/attachment.py: it walks the miniature host by hand, places counted in the text.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from plpp_reg import PerplexityRegularizer, attach
from plpp_reg.attachment import Layout, distinct_prompts
from plpp_reg.clip.load import openai_clip
from plpp_reg.errors import InputError

sys.path.insert(0, str(Path(__file__).parent / "hosts"))
from mini_hosts import NAMES, LossInForward, LossInTrainer, SevenReturned, TextEncoder, frozen

HOSTS = {"trainer": LossInTrainer, "forward": LossInForward, "seven": SevenReturned}
LAYOUTS = [
    {"position": "end"},
    {"position": "middle", "n_ctx": 5},
    {"position": "front"},
    {"class_specific": True},
    {"class_specific": True, "position": "middle"},
    {"class_specific": True, "words": "a photo of a"},  # all contexts begin equal, and are five all the same
]


@pytest.fixture(scope="module")
def pristine(make_clip):
    return make_clip(width=64, layers=2)


@pytest.fixture
def clip_model(pristine):
    """In float64, so that equal means equal. A copy: hosts share its modules, and a hook left there is not the next test's."""
    model = copy.deepcopy(pristine).double()
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.__class__ = nn.LayerNorm  # OpenAI's own computes in float32
    return model


@pytest.fixture(scope="module")
def batch():
    generator = torch.Generator().manual_seed(5)
    return torch.randn(3, 3, 32, 32, generator=generator, dtype=torch.float64), torch.tensor([0, 3, 1])


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


def term(host, regularizer, batch) -> Tensor:
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
        h = torch.stack([torch.stack([hidden[c, t - 1] for t in at[c]]) for c in classes])
        totals.append(regularizer(v, h))
    return sum(totals) / len(totals)


def gradients(host) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in host.named_parameters() if p.grad is not None}


def expected(clip_model, regularizer, batch, factor=1.0, **make) -> dict[str, Tensor]:
    """The gradient of (loss + term) * factor on a host that nobody has touched."""
    host = make_host(clip_model, **make)
    ((host_loss(host, batch) + term(host, regularizer, batch)) * factor).backward()
    return gradients(host)


def assert_close(got: dict[str, Tensor], wanted: dict[str, Tensor], tolerance=1e-12):
    assert got.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert (got[name] - gradient).norm() <= tolerance * gradient.norm(), name


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
    shared = Layout(slot, torch.zeros(5, dtype=torch.long))
    assert distinct_prompts(prompts, shared).tolist() == [0, 1, 2, 4]
    assert distinct_prompts(prompts, shared._replace(owner=torch.tensor([0, 0, 0, 1, 0]))).tolist() == [0, 1, 2, 3, 4]
    assert distinct_prompts(prompts[[0, 3]], Layout(slot[[0, 3]], torch.zeros(2, dtype=torch.long))).tolist() == [0]


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


def test_parts_by_other_names(clip_model, batch):
    class Renamed(nn.Module):
        def __init__(self, host):
            super().__init__()
            self.words, self.tower, self.rest = host.prompt_learner, host.text_encoder, [host]
            self.words.vectors = nn.Parameter(host.prompt_learner.ctx.detach().clone())
            self.teacher = TextEncoder(clip_model)

        def forward(self, images):
            words = self.words
            texts = self.tower(words(words.vectors - words.ctx.detach()), words.tokenized_prompts)
            return self.rest[0].encode_image(images) @ texts.t()

    host = make_host(clip_model)
    host.prompt_learner.ctx.requires_grad_(False)
    model = Renamed(host).train()
    with pytest.raises(InputError, match="several|got tower, teacher: give it as text_encoder="):
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
        ({"backward_pass": 0}, "^backward_pass: expected an integer >= 1, got 0"),
    ],
)
def test_bad_arguments(clip_model, change, message):
    arguments = {"model": make_host(clip_model), "regularizer": make_regularizer(clip_model), **change}
    with pytest.raises(InputError, match=message):
        attach(arguments.pop("model"), arguments.pop("regularizer"), **arguments)


def test_positions_of_the_wrong_shape_and_before_the_first_token(clip_model, batch):
    for position, message in [
        (torch.zeros(3), r"expected integers \(4,\) or \(5, 4\), got \(3,\)"),
        (torch.tensor([0, 1, 2, 3]), "after the first token"),
    ]:
        host = make_host(clip_model)
        attach(host, make_regularizer(clip_model), position=position)
        with pytest.raises(InputError, match=message):
            host(batch[0])


def test_a_text_encoder_that_is_never_called_with_prompts(clip_model, batch):
    class Cached(LossInTrainer):
        def forward(self, images):
            return self.encode_image(images).sum() + self.prompt_learner.ctx.sum()

    host = frozen(Cached(clip_model)).train()
    attach(host, make_regularizer(clip_model))
    host(batch[0])
    with pytest.raises(InputError, match="TextEncoder was not called so: name the right one"):
        host(batch[0])
