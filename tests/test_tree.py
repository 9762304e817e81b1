"""The tree of prompts, by itself: what its rows see, its chunks."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from plpp_reg.clip.tree import build_tree, context_symbol
from plpp_reg.loss.functional import STATES

symbols = st.lists(st.integers(0, 2), max_size=6)


def spelled(part, row: int) -> list[int]:
    """The symbols that a row of a part sees, in the order of their positions: the prompt up to it."""
    length = part.token.shape[1]
    symbol = part.token.flatten().clone()
    symbol[part.context_row] = -1 - part.context_slot
    seen = (part.mask[row // length, 0, row % length] == 0).nonzero()[:, 0] + row // length * length
    seen = seen[part.position.flatten()[seen].argsort()]
    assert part.position.flatten()[seen].tolist() == list(range(len(seen)))  # one row for each position
    return symbol[seen].tolist()


@settings(max_examples=150, suppress_health_check=list(HealthCheck))
@given(
    bodies=st.lists(symbols, min_size=1, max_size=7),
    max_rows=st.sampled_from([None, 1, 9, 30]),
    width=st.sampled_from([1, 8, 64]),
    states=st.sampled_from(STATES),
)
def test_a_tree_spells_every_prompt_and_its_rows_see_their_ancestors_alone(bodies, max_rows, width, states):
    sos, eot, slot = 8, 9, context_symbol(0)
    prompts = [[sos, *body[:2], slot, *body[2:], eot] for body in bodies]
    tree = build_tree(prompts, 1, width, max_rows, states)
    ends = [spelled(part, row) for part in tree.parts for row in part.end.tolist()]
    assert [ends[c] for c in (range(len(prompts)) if tree.order is None else tree.order.tolist())] == prompts
    read = [spelled(part, row) for part in tree.parts for (row,) in part.beside[part.state].tolist()]
    if len(read) > 1 and tree.order is not None:
        read = [read[c] for c in tree.order.tolist()]
    so_far = [prompt[: prompt.index(slot) + (states == "own")] for prompt in prompts]
    assert read == (so_far if len(read) > 1 or len(prompts) == 1 else so_far[:1])
    assert len(read) == len(prompts) or all(beginning == so_far[0] for beginning in so_far)
    (length,) = {part.token.shape[1] for part in tree.parts}
    longest = max(map(len, prompts))
    distinct = {tuple(prompt[: t + 1]) for prompt in prompts for t in range(len(prompt))}
    assert longest <= length <= max(longest, max_rows or len(distinct))  # no chunk is longer than its one prompt must be
    if max_rows is not None:
        assert all(part.token.numel() <= max(max_rows, longest) for part in tree.parts)
    elif length == len(distinct):
        assert tree.positions == len(distinct)


def test_one_long_chunk_or_many_short_ones_by_what_attention_costs():
    prompts = [[8, 0, name, 9] for name in range(40)]
    wide, narrow = build_tree(prompts, 0, 512), build_tree(prompts, 0, 1)
    assert wide.positions <= 2 + 2 * 40 + 4  # SOS and the word stand once or twice
    assert narrow.positions > 1.4 * wide.positions and narrow.parts[0].token.shape[1] < 10


def test_an_accelerators_chunks_are_longer_and_suit_its_kernels(monkeypatch):
    prompts = [[8, *range(name, name + 12), 9] for name in range(60)]
    here = build_tree(prompts, 0, 64)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    there = build_tree(prompts, 0, 64, device="meta")
    assert there.parts[0].token.shape[1] > here.parts[0].token.shape[1] and there.parts[0].token.shape[1] % 8 == 0
    assert here.positions < 1.1 * there.positions


def test_chunks_are_balanced():
    prompts = [[8, name, 7, 9] for name in range(100)]
    tree = build_tree(prompts, 0, 16)
    (k, length), nodes = tree.parts[0].token.shape, 3 * 100
    assert k > 1 and k * length <= nodes + k * 4  # SOS in each, and less than a prompt's rows are empty
