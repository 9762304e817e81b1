"""Reading prompts: the words nearest to vectors, and which tokens are words."""

from __future__ import annotations

import pytest
import torch

from plpp_reg.clip.prompts import encode, tokenizer
from plpp_reg.clip.vocabulary import candidate_ids, nearest_words, whole_word_ids


def test_a_words_own_vector_reads_as_that_word(tiny_vit):
    table = tiny_vit.token_embedding.weight
    ids = [encode(word)[0] for word in ("photo", "cat", "tiger")]
    read = nearest_words(table[ids] * 5, table, k=2)
    assert [[near.word for near in row][0] for row in read] == ["photo", "cat", "tiger"]
    assert all(row[0].cosine == pytest.approx(1, abs=1e-5) and row[1].cosine < 0.9 for row in read)
    among = nearest_words(table[ids].view(1, 3, -1), table, k=2, candidates=torch.tensor(sorted([ids[0], ids[2]])))
    assert [row[0].word for row in among] == ["photo", among[1][0].word, "tiger"]
    assert {near.word for row in among for near in row} == {"photo", "tiger"}


def test_whole_words_are_words():
    ids = set(whole_word_ids().tolist())
    encoder = tokenizer().encoder
    assert {encoder[token] for token in ("photo</w>", "cat</w>", "a</w>")} <= ids
    assert encode("café")[0] in ids  # the encoder's keys are bytes in disguise: é is two signs there
    # a piece that only begins words, punctuation, a digit, the marks
    assert not ids & {encode("♪")[0], encode("–")[0]}
    assert not ids & {encoder[token] for token in ("cat", "!</w>", "7</w>", "<|startoftext|>", "<|endoftext|>")}


def test_candidates_are_the_trained_whole_words(make_clip):
    model = make_clip(width=64, layers=1)
    assert candidate_ids(model) is None
    cat, mark = encode("cat")[0], encode("!")[0]
    model.trained_token_ids = torch.tensor(sorted([mark, cat, 49407]))
    assert candidate_ids(model).tolist() == [cat]
