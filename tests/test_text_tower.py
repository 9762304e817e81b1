"""The fast text tower equals CoOp's literal 77-position tower: features, context states, gradients."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from plpp_reg.clip.load import set_precision
from plpp_reg.clip.prompts import POSITIONS, PromptLearner, encode_texts
from plpp_reg.clip.text import TextTower
from plpp_reg.errors import InputError
from plpp_reg.loss.functional import STATES

from helpers import literal
from helpers.clips import make_clip

# lengths differ, some begin alike, one is the beginning of another, one has many tokens
NAMES = ["tiger cat", "airplane", "tiger", "2012 BMW M3", "2012 Audi S4 sedan", "eurasian eagle-owl's xylograph"]

# largest error allowed, relative to the norm of what is compared; both towers round in bf16, after different sums
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


FULL, SHORT = 77, 32  # positions: OpenAI has 77; the literal tower runs every one, so that most models here have fewer


@functools.cache
def model_of(width: int, dtype: torch.dtype, layers: int = 3, positions: int = SHORT):
    model = make_clip(width=width, layers=layers, vision_layers=1, context_length=positions)
    return literal.double(model) if dtype == torch.float64 else set_precision(model, dtype)


def assert_near(got: torch.Tensor, want: torch.Tensor, tolerance: float) -> None:
    assert got.shape == want.shape and got.isfinite().all()
    assert want.norm() > 0
    assert (got.double() - want.double()).norm() / want.double().norm() < tolerance


def gradients(loss: torch.Tensor, leaves: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    if not loss.requires_grad:  # nothing learnable precedes what was read
        return tuple(map(torch.zeros_like, leaves))
    return torch.autograd.grad(loss, leaves, retain_graph=True, materialize_grads=True)


def assert_parity(
    model,
    names,
    n_ctx=4,
    position="end",
    class_specific=False,
    deep_layers=0,
    memory_mib=1024.0,
    groups=1,
    states="preceding",
):
    """Features, states and gradients, each context of ``groups`` with its own rows, against one literal pass for each."""
    g = torch.Generator().manual_seed(1)
    tower = TextTower(model, memory_mib)
    tolerance = TOLERANCE[tower.dtype]
    leaf_dtype = torch.float64 if tower.dtype == torch.float64 else torch.float32
    learner = PromptLearner(model, names, n_ctx=n_ctx, position=position, class_specific=class_specific, states=states)
    width, C = learner.ctx.shape[-1], len(names)
    slots = learner.ctx[..., 0].numel()

    def leaf():
        return (torch.randn(groups, slots, width, generator=g) * 0.05).to(leaf_dtype).requires_grad_()

    context, deep = leaf(), [leaf() for _ in range(deep_layers)]
    tree = learner.tree(tower.max_rows(groups))
    out = tower(tree, context, deep)
    assert out.features.dtype == out.hidden.dtype == tower.dtype
    assert out.hidden.shape[0] in (groups, groups * C) and out.features.shape[:2] == (groups, C)
    hidden = out.hidden.unflatten(0, (groups, -1)).expand(groups, C, -1, -1)

    def rows(t, i):  # as CoOp holds them: (M, D) or (C, M, D)
        return t[i].unflatten(0, (C, n_ctx)) if class_specific else t[i]

    passes = [
        literal.text_tower(
            model, literal.coop_prompts(model, names, rows(context, i), position), [rows(d, i) for d in deep], states
        )
        for i in range(groups)
    ]
    features_want, hidden_want = (torch.stack(column) for column in zip(*passes, strict=True))
    assert_near(out.features, features_want, tolerance)
    assert_near(hidden, hidden_want, tolerance)

    # one random number for each output, so that no two of them can be exchanged unseen; no leaf may lose its gradient
    weights = [torch.randn(t.shape, generator=g).to(t.dtype) for t in (features_want, hidden_want)]
    outputs = {"features": (out.features, features_want), "hidden": (hidden, hidden_want)}
    for (kind, pair), w in zip(outputs.items(), weights, strict=True):
        got, want = (gradients((t * w).double().sum(), [context, *deep]) for t in pair)
        for a, b in zip(got, want, strict=True):
            if kind == "hidden" and not b.any():  # one vector, say: nothing learnable precedes it
                assert not a.any()
            else:
                assert_near(a, b, tolerance * 3)

    bare = tower(tree, context, deep, need_hidden=False)  # features alone are the same features
    assert bare.hidden is None
    assert_near(bare.features, out.features, tolerance)
    return learner, tower, tree


@pytest.mark.parametrize(
    ("width", "dtype"),
    [(64, torch.float64), (128, torch.float32), (192, torch.float32), (64, torch.bfloat16)],
    ids=str,
)
@pytest.mark.parametrize("class_specific", [False, True], ids=["shared", "class-specific"])
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("states", STATES)
def test_equals_the_literal_tower(states, position, class_specific, dtype, width):
    assert_parity(model_of(width, dtype), NAMES, position=position, class_specific=class_specific, states=states)


@pytest.mark.parametrize("class_specific", [False, True], ids=["shared", "class-specific"])
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize(
    ("names", "n_ctx"),
    [
        (NAMES, 1),
        (NAMES[:3], 5),  # odd: middle has 2 before the name and 3 after
        (NAMES[:3], 16),
        (["tiger cat"], 4),
        (["tiger cat"], 1),
        (["tiger", "tiger", "airplane", "tiger"], 3),
        (["tiger"] * 3, 2),
        (["tiger cat", "tiger cat shark", "tiger cat shark bay"], 3),
        (["a_tiger_cat", "U.S.A.", "what?!", "ok..."], 3),  # ends that merge with the full stop
        (["cat", "dog", "owl"], 2),  # one length
        (["x" * 40, "long " * 30 + "name"], 3),
    ],
    ids=lambda x: None if isinstance(x, int) else "+".join(x)[:40],
)
def test_special_class_tables(names, n_ctx, position, class_specific):
    positions = SHORT if max(map(len, names)) < 40 else FULL
    assert_parity(model_of(64, torch.float64, positions=positions), names, n_ctx, position, class_specific)


@pytest.mark.parametrize("class_specific", [False, True], ids=["shared", "class-specific"])
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_parts_change_nothing(dtype, position, class_specific):
    _, _, tree = assert_parity(
        model_of(128, dtype), NAMES, position=position, class_specific=class_specific, memory_mib=0.05, groups=2, deep_layers=1
    )
    assert len(tree.parts) >= 4  # some names are no longer together than the longest one alone


@pytest.mark.parametrize("states", STATES)
def test_a_middling_bound_makes_some_parts(states):
    _, _, tree = assert_parity(model_of(128, torch.float64), NAMES, position="front", memory_mib=1.0, states=states)
    assert 1 < len(tree.parts) < len(NAMES)


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("class_specific", [False, True], ids=["shared", "class-specific"])
def test_several_contexts_at_once(class_specific, position):
    assert_parity(model_of(64, torch.float64), NAMES[:4], n_ctx=3, position=position, class_specific=class_specific, groups=3)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("deep_layers", [1, 2])
@pytest.mark.parametrize("class_specific", [False, True], ids=["shared", "class-specific"])
@pytest.mark.parametrize("position", POSITIONS)
def test_deep_prompts(position, class_specific, deep_layers, groups):
    model = model_of(64, torch.float64)
    assert_parity(model, NAMES[:4], 3, position, class_specific, deep_layers=deep_layers, groups=groups)


@pytest.mark.parametrize("layers", [1, 2])
def test_few_layers(layers):  # the last layer is also the first one
    for position, class_specific in itertools.product(POSITIONS, (False, True)):
        assert_parity(model_of(64, torch.float64, layers), NAMES[:3], 2, position, class_specific, deep_layers=layers - 1)


words = st.sampled_from("tiger cat owl x antidisestablishmentarianism 2012 BMW, o'clock U.S. é ✈ fire-bellied".split())
name = st.lists(words, min_size=1, max_size=6).map(" ".join)


@settings(max_examples=40, suppress_health_check=list(HealthCheck))
@given(
    names=st.lists(name, min_size=1, max_size=6),
    n_ctx=st.integers(1, 6),
    position=st.sampled_from(POSITIONS),
    class_specific=st.booleans(),
    memory_mib=st.sampled_from([1024.0, 0.3, 0.05]),
    states=st.sampled_from(STATES),
)
def test_any_class_names(names, n_ctx, position, class_specific, memory_mib, states):
    model = model_of(64, torch.float64, 2, FULL)
    assert_parity(model, names, n_ctx, position, class_specific, memory_mib=memory_mib, states=states)


def test_shared_context_is_computed_once():
    model = model_of(128, torch.float32)
    learner = PromptLearner(model, NAMES, n_ctx=16)
    words = sum(int(t) - 16 for t in learner.eot_positions())
    assert learner.tree().positions <= 17 + words < len(NAMES) * 77 / 8  # SOS and 16 vectors


# ------------------------------------------------------------------ gradients of CLIP, precision, plain texts


@pytest.mark.parametrize("memory_mib", [1024, 0.05], ids=["whole", "chunked"])
def test_no_gradient_reaches_clip(make_clip, memory_mib):
    model = make_clip(width=64, layers=2)
    learner, tower = PromptLearner(model, NAMES), TextTower(model, memory_mib)
    out = learner(tower)
    (out.features.square().sum() + out.hidden.square().sum()).backward()
    assert learner.ctx.grad.abs().amax(-1).all()
    assert all(p.grad is None for p in model.parameters())
    assert {id(p) for p in tower.parameters()} <= {id(p) for p in model.parameters()}  # it holds nothing of its own


@pytest.mark.parametrize("position", POSITIONS)
def test_without_gradients_the_result_is_the_same(position):
    model = model_of(64, torch.float32)
    learner = PromptLearner(model, NAMES, position=position)
    for memory_mib in (1024, 0.05):
        tower = TextTower(model, memory_mib)
        with torch.no_grad():
            quiet = learner(tower)
        out = learner(tower)
        assert quiet.features.equal(out.features.detach()) and quiet.hidden.equal(out.hidden.detach())
        assert not quiet.features.requires_grad


@pytest.mark.parametrize("position", POSITIONS)
def test_need_hidden_false_leaves_the_features(position):
    model = model_of(64, torch.float32)
    learner, tower = PromptLearner(model, NAMES, position=position), TextTower(model)
    out, bare = learner(tower), learner(tower, need_hidden=False)
    assert bare.hidden is None
    torch.testing.assert_close(bare.features, out.features, rtol=0, atol=1e-6)


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("memory_mib", [1024, 0.05], ids=["whole", "chunked"])
def test_autocast_is_near_float32(position, memory_mib):
    model = model_of(128, torch.float32)
    learner, tower = PromptLearner(model, NAMES, position=position, class_specific=True), TextTower(model, memory_mib)
    grads = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            out = learner(tower)
            loss = out.features.float().square().sum() + out.hidden.float()[..., 0].sum()
        grads.append((out.features, out.hidden, *torch.autograd.grad(loss, learner.ctx)))
    for exact, cast in zip(*grads, strict=True):
        assert_near(cast, exact, 3e-2)
    assert grads[1][0].dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_as_near_to_the_truth_as_the_literal_tower(dtype):
    truth_model, model = model_of(128, torch.float64), model_of(128, dtype)
    learner = PromptLearner(model, NAMES)
    exact = literal.text_tower(truth_model, literal.coop_prompts(truth_model, NAMES, learner.ctx.detach()))
    slow = literal.text_tower(model, literal.coop_prompts(model, NAMES, learner.ctx.detach()))
    fast = learner(TextTower(model))
    for want, a, b in zip(exact, slow, (fast.features, fast.hidden.expand(len(NAMES), -1, -1)), strict=True):
        error = [(t.double() - want).norm().item() for t in (a, b)]
        assert error[1] < 1.5 * error[0]


def test_float64_weights_leave_autocast_aside():
    learner, tower = PromptLearner(model_of(64, torch.float64), NAMES), TextTower(model_of(64, torch.float64))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert learner(tower).features.dtype == torch.float64


def test_more_deep_prompts_than_layers_are_refused():
    model = model_of(64, torch.float32)
    learner, tower = PromptLearner(model, NAMES), TextTower(model)
    with pytest.raises(InputError, match="^deep: expected prompts for at most 2 layers after the first, got 3$"):
        learner(tower, deep=[learner.ctx] * 3)


def test_what_was_first_used_in_inference_mode_trains_afterwards():
    model = model_of(64, torch.float32)
    learner, tower = PromptLearner(model, NAMES), TextTower(model)
    with torch.inference_mode():
        learner(tower)
    learner(tower).features.sum().backward()
    assert learner.ctx.grad.any()


@pytest.mark.parametrize("change", ["hook", "adapter"])
def test_an_mlp_that_somebody_has_changed_is_called_as_it_is(make_clip, change):
    class Adapter(torch.nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base

        weight = property(lambda self: self.base.weight)
        bias = property(lambda self: self.base.bias)

        def forward(self, x):
            return self.base(x) + 1

    model = make_clip(width=64, layers=2)
    learner, tower = PromptLearner(model, NAMES), TextTower(model)
    before = learner(tower).features
    for block in model.transformer.resblocks:
        if change == "hook":
            block.mlp.c_fc.register_forward_hook(lambda module, args, output: output + 1)
        else:
            block.mlp.c_fc = Adapter(block.mlp.c_fc)
    after = learner(tower).features
    features, _ = literal.text_tower(model, literal.coop_prompts(model, NAMES, learner.ctx))
    assert not torch.allclose(after, before, atol=1e-2)
    torch.testing.assert_close(after, features, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("memory_mib", [1024, 0.05], ids=["whole", "chunked"])
@pytest.mark.parametrize("width", [64, 128])
def test_encode_texts_is_encode_text_of_tokenize(make_clip, width, memory_mib):
    import clip

    model = make_clip(width=width, layers=2)
    texts = ["a photo of a cat.", "a photo of a dog.", "", "a photo of a cat.", "itap of a tiger cat, " * 8, "Zürich ✈ 100%"]
    for some in (texts, texts[:1], texts[2:3]):
        with torch.no_grad():
            got, want = encode_texts(TextTower(model, memory_mib), some), model.encode_text(clip.tokenize(some))
        assert_near(got, want, 1e-5)


def test_it_is_one_graph():
    """torch.compile finds nothing that it must leave to Python: with fullgraph it would raise."""
    model = model_of(64, torch.float32, layers=2)
    prompts, tower = PromptLearner(model, NAMES, n_ctx=2), TextTower(model)
    tree, leaves = prompts.tree(tower.max_rows()), [torch.randn(1, 2, 64, requires_grad=True) for _ in range(2)]
    passes = []
    for forward in (torch.compile(tower.forward, backend="aot_eager", fullgraph=True, dynamic=False), tower.forward):
        out = forward(tree, leaves[0], leaves[1:])
        passes.append([out.features, out.hidden, *gradients(out.features.sum() + out.hidden.square().sum(), leaves)])
    for got, want in zip(*passes, strict=True):
        assert_near(got, want, 1e-6)
