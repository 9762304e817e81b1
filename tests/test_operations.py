"""Operations and bytes of the towers and of PLPP are those that torch counts and keeps; the probes that time them run."""

from __future__ import annotations

import pytest
import torch

from plpp_reg.clip.prompts import PromptLearner
from plpp_reg.clip.text import TextTower
from plpp_reg.clip.vision import ImageTower
from plpp_reg.estimate import throughput
from plpp_reg.estimate.operations import Cost, image_cost, most_kept, text_cost
from plpp_reg.estimate.plpp_cost import Rows, plpp_cost, plpp_seconds
from plpp_reg.estimate.throughput import Machine, Throughput
from plpp_reg.loss.regularizer import PerplexityRegularizer

from counting import NAMES, Living, counted, kept_bytes

KINDS = {  # G, class-specific, position, memory bound in MiB, whether PLPP reads
    "shared": (1, False, "end", 1024, True),
    "shared, without PLPP": (1, False, "end", 1024, False),
    "class-specific": (1, True, "end", 1024, True),
    "class-specific, without PLPP": (1, True, "end", 1024, False),
    "middle": (1, False, "middle", 1024, True),
    "front": (1, False, "front", 1024, True),
    "an image each (CoCoOp)": (3, False, "end", 1024, True),
    "in chunks": (1, False, "end", 0.2, True),
}


def text_pass(model, kind: str):
    """The tower, the tree, and a function that runs it; of KINDS."""
    groups, class_specific, position, mib, need_hidden = KINDS[kind]
    tower = TextTower(model, mib)
    prompts = PromptLearner(model, NAMES, 4, class_specific=class_specific, position=position)
    tree, context = prompts.tree(tower.max_nodes(groups)), prompts.ctx.flatten(0, -2).expand(groups, -1, -1)

    def run() -> torch.Tensor:
        out = tower(tree, context, need_hidden=need_hidden)
        return out.features.sum() + (out.hidden.sum() if need_hidden else 0)

    return text_cost(tower, tree, groups, need_hidden), run


@pytest.mark.parametrize("kind", KINDS)
def test_operations_of_the_text_tower_are_those_that_torch_counts(kind, make_clip):
    cost, run = text_pass(make_clip(layers=4), kind)
    forward, backward = counted(run)
    assert cost.forward == forward
    assert cost.backward == pytest.approx(backward, rel=0.03)


@pytest.mark.parametrize(("images", "prompts"), [(2, 0), (3, 2), (1, 5)])
def test_operations_of_the_image_tower_are_those_that_torch_counts(images, prompts, make_clip):
    model = make_clip(vision_layers=3)
    rows = torch.randn(prompts, 64, requires_grad=True) if prompts else None
    cost = image_cost(ImageTower(model), images, prompts, learns=prompts > 0)
    forward, backward = counted(lambda: ImageTower(model)(torch.randn(images, 3, 32, 32), rows).sum())
    assert cost.forward == forward
    assert cost.backward == pytest.approx(backward, rel=0.03)


def test_operations_of_a_resnet_are_those_that_torch_counts(tiny_resnet):
    forward, _ = counted(lambda: ImageTower(tiny_resnet)(torch.randn(2, 3, 32, 32)).sum())
    assert image_cost(ImageTower(tiny_resnet), 2).forward == pytest.approx(forward, rel=0.01)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "in chunks"])  # autograd keeps little there until backward
def test_bytes_are_those_that_autograd_keeps(kind, make_clip):
    model = make_clip(layers=4)
    cost, run = text_pass(model, kind)
    assert 0.9 * cost.kept < kept_bytes(run, model) < 1.01 * cost.kept


@pytest.mark.parametrize(("n_ctx", "heads"), [(4, 32), (40, 2), (40, 32)])
def test_bytes_of_a_long_prefix_and_of_many_heads_are_those_that_autograd_keeps(n_ctx, heads, make_clip):
    model = make_clip(layers=4, seed=1)
    for block in model.transformer.resblocks:
        block.attn.num_heads = heads
    tower, prompts = TextTower(model), PromptLearner(model, NAMES, n_ctx)
    tree = prompts.tree(tower.max_nodes())
    kept = kept_bytes(lambda: tower(tree, prompts.ctx.flatten(0, -2).unsqueeze(0)), model)
    assert 0.9 * text_cost(tower, tree).kept < kept < 1.01 * text_cost(tower, tree).kept


def test_bytes_of_images_are_those_that_autograd_keeps(make_clip):
    model, rows = make_clip(vision_layers=4), torch.randn(2, 64, requires_grad=True)
    kept = kept_bytes(lambda: ImageTower(model)(torch.randn(3, 3, 32, 32), rows), model)
    assert kept == pytest.approx(image_cost(ImageTower(model), 3, 2, learns=True).kept, rel=0.05)


def test_a_memory_bound_lowers_the_bytes_and_runs_chunks_twice(make_clip):
    whole, in_chunks = text_pass(make_clip(layers=4), "shared")[0], text_pass(make_clip(layers=4), "in chunks")[0]
    assert in_chunks.kept + in_chunks.again < 0.6 * whole.kept and whole.again == 0
    assert in_chunks.backward > 1.5 * whole.backward


def test_what_is_not_learned_keeps_nothing(make_clip):
    model = make_clip()
    tree = PromptLearner(model, NAMES, 4).tree()
    cost = text_cost(TextTower(model), tree, learns=False)
    assert cost.forward > 0 and cost.backward == cost.kept == 0


def test_what_lives_while_a_layer_runs_is_counted(make_clip):
    model, images = make_clip(vision_layers=3, image_resolution=64, patch_size=8), torch.randn(4, 3, 64, 64)
    with torch.no_grad(), Living() as living:
        ImageTower(model)(images)
    assert living.most == pytest.approx(image_cost(ImageTower(model), 4).working, rel=0.05)
    tower = TextTower(model)
    tree = PromptLearner(model, [f"{a} {b}" for a in NAMES for b in NAMES], 4).tree()
    with torch.no_grad(), Living() as living:
        tower(tree, torch.zeros(1, 4, 128), need_hidden=False)
    assert living.most == pytest.approx(text_cost(tower, tree, learns=False).working, rel=0.1)
    rows = torch.randn(2, 64, requires_grad=True)
    with Living() as living:
        ImageTower(model)(images, rows).sum().backward()
    cost = image_cost(ImageTower(model), 4, 2, learns=True)
    assert 0.85 * (cost.kept + cost.working) < living.most < cost.kept + cost.working


def test_operations_and_bytes_of_plpp_are_those_counted_by_hand():
    K, D, V, R, P = 3, 8, 100, 4, 2  # R labelled, P R predicted, 5 rows at once
    few, many = (PerplexityRegularizer(torch.randn(V, D), top_k=K, chunk_size=size) for size in (100, 5))
    term, search = 4 * K * D * P * R, 8 * K * D * R
    new, known = Rows(R, P * R, new_each_step=True), Rows(R, P * R, new_each_step=False)
    assert plpp_cost(few, new).forward == term + search + 2 * V * D * R
    assert plpp_cost(few, known).forward == pytest.approx(term + search + 2 * V * D * R * 0.1)
    assert plpp_cost(few, new).backward == plpp_cost(many, new).backward == term
    assert plpp_cost(few, new).working == plpp_cost(many, new).working == 4 * R * (V + 4 * K * D)
    over_all, in_parts = (
        PerplexityRegularizer(torch.randn(V, D), top_k=K, normalize_over="vocabulary", chunk_size=size) for size in (100, 5)
    )
    assert (plpp_cost(over_all, new).backward, plpp_cost(in_parts, new).backward) == (term + 128 * V, 2 * (term + 128 * V))


@pytest.mark.parametrize("normalize_over", ["topk", "vocabulary"])
@pytest.mark.parametrize("chunk_size", [128, 16])
def test_bytes_of_plpp_are_those_that_autograd_keeps(normalize_over, chunk_size):
    regularizer = PerplexityRegularizer(torch.randn(5000, 128), normalize_over=normalize_over, chunk_size=chunk_size)
    context, hidden = (torch.randn(64, 128, requires_grad=True) for _ in range(2))
    frozen = torch.nn.Module()
    for name in ("vocabulary", "inverse_norm"):
        frozen.register_buffer(name, getattr(regularizer, name))
    regularizer(context, hidden)  # what is remembered from step to step is not kept for backward
    kept = kept_bytes(lambda: regularizer.components(context, hidden, with_perplexity=False).total, frozen)
    in_backward = 4 * 16 * (8 * 10 + 5000) if normalize_over == "vocabulary" and chunk_size == 16 else 0  # a chunk again
    assert 0.9 < plpp_cost(regularizer, Rows(64, 64, False)).kept / (kept + in_backward) < 1.1


def test_what_was_not_timed_has_no_seconds():
    assert Throughput(2.0).seconds(Cost(forward=6.0), 0) == 3
    with pytest.raises(ValueError, match="inference alone"):
        Throughput(2.0).seconds(Cost(forward=6.0, backward=6.0), 1)


def test_every_probe_runs_and_takes_time(make_clip, tiny_resnet, monkeypatch):
    monkeypatch.setitem(throughput.PROBE, "cpu", 1e7)
    monkeypatch.setattr(throughput, "REPEATS", 1)
    machine, model = Machine(torch.device("cpu")), make_clip()
    prompts = PromptLearner(model, NAMES, 4).prompts
    for learns in (False, True):
        text = throughput.text_throughput(TextTower(model), prompts, 4, machine, 2, learns)
        image = throughput.image_throughput(ImageTower(model), machine, 3, 2 * learns, learns)
        for rate in (text, image):
            assert all(0 < r < float("inf") for r in (rate if learns else rate[:1]))
            assert 0 < rate.seconds(Cost(1e9, 1e9), int(learns)) < float("inf")
    assert 0 < throughput.image_throughput(ImageTower(tiny_resnet), machine, 2).inference < float("inf")
    regularizer = PerplexityRegularizer(torch.randn(200, 16), top_k=3)
    assert 0 < plpp_seconds(regularizer, Rows(4, 4, False), machine) < float("inf")


def test_what_passes_hold_at_most():
    whole, in_chunks = Cost(kept=5.0), Cost(kept=1.0, again=7.0)
    assert most_kept([whole, whole]) == 10
    assert most_kept([in_chunks, whole]) == 8  # the chunk comes again when the pass after it is freed
    assert most_kept([whole, in_chunks]) == 13
    assert most_kept([]) == 0
