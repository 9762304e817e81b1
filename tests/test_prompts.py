"""PromptLearner: what it starts from, where everything stands, what does not fit."""

from __future__ import annotations

import pytest
import torch

from plpp_reg.clip.load import set_precision
from plpp_reg.clip.prompts import POSITIONS, PromptLearner, encode, encode_texts, eot_token, sos_token
from plpp_reg.clip.text import TextTower
from plpp_reg.errors import InputError

from helpers import literal

NAMES = ["golden_retriever", "cat", "xylographer's owl"]


@pytest.mark.parametrize(
    ("init", "n_ctx"),
    [
        ("a photo of a", 4),
        ("a_photo_of_a", 4),  # as in CoOp's configs
        ("  a photo of a ", 4),
        ("a xylographic photo", None),  # several tokens a word: M is the number of tokens
        ("X", 1),
    ],
)
@pytest.mark.parametrize("class_specific", [False, True])
def test_init_words(tiny_vit, init, n_ctx, class_specific):
    import clip

    ids = [t for t in clip.tokenize(init.replace("_", " "))[0].tolist() if t not in (0, 49406, 49407)]
    learner = PromptLearner(tiny_vit, NAMES, n_ctx=9, ctx_init=init, class_specific=class_specific)
    assert learner.n_ctx == len(ids) and (n_ctx is None) == (len(ids) > len(init.split()) > 1)
    if n_ctx is not None:
        assert learner.n_ctx == n_ctx
    want = tiny_vit.token_embedding.weight[ids]
    assert learner.ctx.shape == ((len(NAMES), len(ids), 128) if class_specific else (len(ids), 128))
    assert all(rows.equal(want) for rows in learner.ctx.detach().view(-1, len(ids), 128))


def test_init_words_give_the_features_of_the_sentence(tiny_vit):
    learner, tower = PromptLearner(tiny_vit, NAMES, ctx_init="a photo of a"), TextTower(tiny_vit)
    sentences = [f"a photo of a {name.replace('_', ' ')}." for name in NAMES]
    with torch.no_grad():
        torch.testing.assert_close(learner(tower).features, encode_texts(tower, sentences), rtol=1e-4, atol=1e-5)


def test_class_specific_rows_are_their_own_memory(tiny_vit):
    learner = PromptLearner(tiny_vit, NAMES, ctx_init="a photo", class_specific=True)
    before = tiny_vit.token_embedding.weight[encode("a photo")].clone()
    with torch.no_grad():
        learner.ctx[1].add_(1)
    assert learner.ctx[0].equal(before) and learner.ctx[2].equal(before) and not learner.ctx[1].equal(before)
    assert tiny_vit.token_embedding.weight[encode("a photo")].equal(before)


@pytest.mark.parametrize(("class_specific", "shape"), [(False, (16, 128)), (True, (3, 16, 128))])
@pytest.mark.parametrize("blank", ["", " ", "_"])
def test_random_start(tiny_vit, class_specific, shape, blank):
    def make():
        torch.manual_seed(0)
        return PromptLearner(tiny_vit, NAMES, n_ctx=16, ctx_init=blank, class_specific=class_specific).ctx

    ctx = make()
    assert ctx.shape == shape and ctx.equal(make())
    assert ctx.std().item() == pytest.approx(0.02, rel=0.1) and abs(ctx.mean().item()) < 0.002
    assert not class_specific or not ctx[0].equal(ctx[1])


@pytest.mark.parametrize("init", ["", "a photo of a"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("whole", [True, False], ids=["whole model cast", "as load_clip casts"])
def test_context_is_a_float32_leaf_in_any_precision(make_clip, dtype, init, whole):
    model = make_clip(width=64, layers=1)
    model = model.to(dtype) if whole else set_precision(model, dtype)
    learner = PromptLearner(model, NAMES, ctx_init=init)
    assert learner.ctx.dtype == torch.float32 and learner.ctx.is_leaf and learner.ctx.requires_grad
    assert list(learner.state_dict()) == ["ctx"]  # CoOp's key, and nothing but what is learned
    assert [n for n, _ in learner.named_parameters()] == ["ctx"]


@pytest.mark.parametrize("class_specific", [False, True])
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("n_ctx", [1, 4, 5])
def test_where_everything_stands(tiny_vit, position, n_ctx, class_specific):
    learner = PromptLearner(tiny_vit, NAMES, n_ctx=n_ctx, position=position, class_specific=class_specific)
    rule = literal.coop_prompts(tiny_vit, NAMES, learner.ctx.detach(), position)
    assert learner.context_positions().equal(rule.context_at)
    assert learner.eot_positions().equal(rule.eot)
    for c, (name, prompt) in enumerate(zip(NAMES, learner.prompts, strict=True)):
        words = encode(name.replace("_", " ")) + encode(".")
        assert [prompt[t] for t in learner.name_positions()[c]] == words
        assert [prompt[0], prompt[-1]] == [sos_token(), eot_token()]
        first = c * n_ctx if class_specific else 0
        assert [prompt[t] for t in learner.context_positions()[c]] == [-1 - first - m for m in range(n_ctx)]
        everything = [0, *learner.context_positions()[c].tolist(), *learner.name_positions()[c], len(prompt) - 1]
        assert sorted(everything) == list(range(len(prompt)))


def test_positions_by_hand(tiny_vit):
    # "cat" is one token: [SOS] v v v cat . [EOT]
    where = {p: PromptLearner(tiny_vit, ["cat"], n_ctx=3, position=p) for p in POSITIONS}
    context = {p: learner.context_positions().tolist() for p, learner in where.items()}
    assert context == {"end": [[1, 2, 3]], "middle": [[1, 3, 4]], "front": [[2, 3, 4]]}
    names = {p: learner.name_positions() for p, learner in where.items()}
    assert names == {"end": [[4, 5]], "middle": [[2, 5]], "front": [[1, 5]]}


def test_underscores_are_spaces(tiny_vit):
    a, b = (PromptLearner(tiny_vit, [name]) for name in ("golden_retriever", "golden retriever"))
    assert a.prompts == b.prompts and a.classnames == ["golden retriever"]
    assert PromptLearner(tiny_vit, ["golden-retriever"]).prompts != b.prompts


@pytest.mark.parametrize("position", POSITIONS)
def test_77_tokens_fit_and_78_name_the_class(tiny_vit, position):
    room = 77 - 2 - 1 - 16  # SOS, EOT, full stop, context
    names = ["cat", "_".join(["owl"] * room)]
    assert PromptLearner(tiny_vit, names, n_ctx=16, position=position).eot_positions().tolist() == [19, 76]
    with pytest.raises(InputError, match=r"^class name 'owl owl.*expected at most 77 tokens, got 78 \(16 context vectors"):
        PromptLearner(tiny_vit, [names[0], names[1] + "_owl"], n_ctx=16, position=position)
    with pytest.raises(InputError, match=r"^class name 'cat'.*at most 77 tokens, got 78"):
        PromptLearner(tiny_vit, ["cat"], n_ctx=74, position=position)


def test_a_text_that_does_not_fit_is_named(tiny_vit):
    tower = TextTower(tiny_vit)
    assert encode_texts(tower, [" ".join(["owl"] * 75)]).shape == (1, 32)
    with pytest.raises(InputError, match=r"'owl owl.*at most 77 tokens, got 78"):
        encode_texts(tower, ["cat", " ".join(["owl"] * 76)])


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("position", dict(position="left")),
        ("position", dict(position=None)),
        ("classnames", dict(classnames=[])),
        *[("n_ctx", dict(n_ctx=bad)) for bad in (0, -1, 2.5, "4")],
    ],
)
def test_a_bad_argument_is_named(tiny_vit, name, settings):
    with pytest.raises(InputError, match=rf"^{name}: expected .*, got "):
        PromptLearner(tiny_vit, **({"classnames": NAMES} | settings))


def test_the_context_is_read_anew_at_each_call(tiny_vit):
    # the tree is cached; the vectors must not be
    learner, tower = PromptLearner(tiny_vit, NAMES), TextTower(tiny_vit)
    with torch.no_grad():
        first = learner(tower).features
        learner.ctx.add_(0.1)
        assert not learner(tower).features.isclose(first).all()
        learner.load_state_dict({"ctx": learner.ctx - 0.1})
        torch.testing.assert_close(learner(tower).features, first, rtol=1e-3, atol=1e-4)
