"""NearestWords: the same answer as looking at every word, whatever it remembers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from plpp_reg import PerplexityRegularizer
from plpp_reg.loss import functional as PF
from plpp_reg.loss.nearest import KEPT, NearestWords

V, D, K = 400, 24, 5


def ids_of(search, v, E, inverse, k=K, at_once=64) -> torch.Tensor:
    """The ids that a search finds, whose cosines are those of the words."""
    cosines, ids = search(v, E, inverse, k, at_once * len(E) * E.element_size())
    if v.isfinite().all():
        exact = torch.nn.functional.cosine_similarity(v.unsqueeze(1), E[ids], dim=-1)
        torch.testing.assert_close(cosines, exact, rtol=1e-5, atol=1e-6)
    return ids


def vocabulary(seed: int = 0, words: int = V) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    E = torch.randn(words, D, generator=g) * torch.rand(words, 1, generator=g).add(0.1)
    return E, PF.inverse_norm(E)


def walk(rows: int, steps: int, size: float, seed: int) -> list[torch.Tensor]:
    """A random walk of context vectors, as training makes one; relative steps of ``size``."""
    g = torch.Generator().manual_seed(seed)
    v = torch.randn(rows, D, generator=g)
    path = [v]
    for _ in range(steps):
        path.append(path[-1] + size * torch.randn(rows, D, generator=g))
    return path


@given(seed=st.integers(0, 10_000), size=st.sampled_from([0.0, 1e-4, 1e-3, 1e-2, 0.1, 1.0]), chunk=st.sampled_from([1, 3, 64]))
def test_every_step_of_a_walk_gives_the_words_that_a_full_search_gives(seed, size, chunk):
    E, inverse = vocabulary(seed)
    search = NearestWords()
    for v in walk(4, 8, size, seed):
        assert torch.equal(ids_of(search, v, E, inverse, K, chunk), PF.nearest_words(v, E, K, inverse)[1])


def test_small_steps_meet_few_words_and_large_ones_all():
    E, inverse = vocabulary()
    counts = {}
    for size in (1e-4, 1.0):
        search = NearestWords()
        for v in walk(4, 20, size, 1):
            ids_of(search, v, E, inverse)
        counts[size] = search.looked_up
    assert counts[1e-4] == 4  # once a row
    assert counts[1.0] > 60  # of 84


def test_only_rows_that_moved_are_looked_up_again():
    E, inverse = vocabulary()
    v = walk(6, 0, 0, 2)[0]
    search = NearestWords()
    ids_of(search, v, E, inverse)
    moved = v.clone()
    moved[2] = -moved[2]
    assert torch.equal(ids_of(search, moved, E, inverse), PF.nearest_words(moved, E, K, inverse)[1])
    assert search.looked_up == 6 + 1


def test_the_answer_does_not_depend_on_what_is_remembered_by_a_bit():
    """A resumed run remembers nothing; its losses must be those of the run that was never interrupted."""
    E, _ = vocabulary()
    old = PerplexityRegularizer(E, top_k=K)
    for v in walk(4, 30, 1e-3, 3):
        h = v.flip(0)
        fresh = PerplexityRegularizer(E, top_k=K)
        assert torch.equal(old(v, h), fresh(v, h))
    assert old.nearest.looked_up < 20


def test_an_adversarial_word_just_outside_the_kept_ones_is_found():
    """Words on a circle: the kept ones are those nearest to u0, and a turn by half their spread brings in the next."""
    angles = torch.linspace(0, 3.14, V)
    E = torch.stack([angles.cos(), angles.sin()], 1)
    inverse = PF.inverse_norm(E)
    search = NearestWords()
    for turn in torch.linspace(0.5, 0.5 + 3 * KEPT * K * (3.14 / V), 200):
        v = torch.stack([turn.cos(), turn.sin()]).unsqueeze(0)
        assert set(ids_of(search, v, E, inverse)[0].tolist()) == set(PF.nearest_words(v, E, K, inverse)[1][0].tolist())
    assert 1 < search.looked_up < 200


def test_an_accelerator_is_never_waited_for():
    """Numbers cannot be read on "meta": whatever asked for one would fail."""
    E, inverse = (t.to("meta") for t in vocabulary())
    search = NearestWords()
    cosines, ids = search(torch.empty(3, D, device="meta"), E, inverse, K, 2 * V * 4)
    assert cosines.shape == ids.shape == (3, K) and search.memory is None


@pytest.mark.parametrize("words", [K, KEPT * K - 1, KEPT * K, KEPT * K + 1])
def test_a_small_vocabulary(words):
    E, inverse = vocabulary(words=words)
    search = NearestWords()
    for v in walk(3, 3, 0.1, 0):
        assert torch.equal(ids_of(search, v, E, inverse), PF.nearest_words(v, E, K, inverse)[1])


def test_another_number_of_rows_or_words_starts_anew():
    E, inverse = vocabulary()
    search = NearestWords()
    for rows, k in ((4, 5), (3, 5), (3, 2), (4, 5)):
        v = walk(rows, 0, 0, rows)[0]
        assert torch.equal(ids_of(search, v, E, inverse, k, 64), PF.nearest_words(v, E, k, inverse)[1])


def test_a_vector_that_is_not_finite_is_not_taken_from_memory():
    E, inverse = vocabulary()
    search = NearestWords()
    v = walk(2, 0, 0, 0)[0]
    ids_of(search, v, E, inverse)
    ids_of(search, v * torch.nan, E, inverse)
    assert torch.equal(ids_of(search, v, E, inverse), PF.nearest_words(v, E, K, inverse)[1])


def test_new_weights_in_the_embedding_are_seen():
    E, _ = vocabulary()
    E = torch.nn.Parameter(E, requires_grad=False)
    regularizer = PerplexityRegularizer(E, top_k=K)
    v, h = walk(4, 1, 1.0, 5)
    regularizer(v, h)
    E.copy_(vocabulary(9)[0])
    assert torch.equal(regularizer(v, h), PerplexityRegularizer(E.clone(), top_k=K)(v, h))


def test_words_of_equal_cosine_come_in_one_order_whatever_is_remembered():
    g = torch.Generator().manual_seed(0)
    E = torch.randint(-1, 2, (V, 6), generator=g).float() + 0.0
    E[E.abs().sum(1) == 0] = 1.0
    inverse = PF.inverse_norm(E)
    old = NearestWords()
    for v in walk_of_six(60):
        assert torch.equal(ids_of(old, v, E, inverse), ids_of(NearestWords(), v, E, inverse))
    assert old.looked_up < 60 * 3


def walk_of_six(steps: int) -> list[torch.Tensor]:
    """Whole-number vectors, to which many words have exactly the same cosine, each fourth turned a little."""
    g = torch.Generator().manual_seed(1)
    start = torch.randint(1, 3, (3, 6), generator=g).float()
    turns = [0.01 * torch.randn(3, 6, generator=g) if i % 4 == 3 else torch.zeros(3, 6) for i in range(steps)]
    return [start * (1 + 0.25 * (i % 4)) + turn for i, turn in enumerate(turns)]
