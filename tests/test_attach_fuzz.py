"""attach on random hosts, beside explicit addition: the gradient is that of the sum, or it says why not.

The suite draws few cases; ``PLPP_FUZZ=500 pytest tests/test_attach_fuzz.py`` draws more.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from plpp_reg import PerplexityRegularizer, attach

WIDTH, VOCABULARY, LONGEST = 16, 60, 24
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


class Tower(nn.Module):
    """A causal text tower with CLIP's names: one layer of attention."""

    def __init__(self) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.positional_embedding = nn.Parameter(torch.randn(LONGEST, WIDTH) * 0.1)
        self.transformer = nn.Module()
        layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, 0.0, batch_first=True)
        self.transformer.resblocks = nn.ModuleList([layer])
        self.ln_final = nn.LayerNorm(WIDTH)
        self.register_buffer("attn_mask", torch.full((LONGEST, LONGEST), float("-inf")).triu_(1))

    def states(self, prompts):
        t = prompts.shape[1]
        x = prompts + self.positional_embedding[:t]
        for block in self.transformer.resblocks:
            x = block(x, src_mask=self.attn_mask[:t, :t])
        return self.ln_final(x)


class Encoder(nn.Module):
    def __init__(self, tower, takes_tokens):
        super().__init__()
        self.transformer, self.ln_final = tower.transformer, tower.ln_final
        self.positional_embedding = tower.positional_embedding
        self.register_buffer("attn_mask", tower.attn_mask)
        self.takes_tokens = takes_tokens

    def forward(self, prompts, tokens=None):
        return Tower.states(self, prompts)[:, -1]


class Case(NamedTuple):
    """Of one forward pass: which classes, and where each one's context stands."""

    classes: list[int]
    starts: list[int]  # the place of a class's first context vector
    gaps: list[int]  # how many words stand in the middle of its context
    length: int


class Host(nn.Module):
    def __init__(self, tower, m, kind, specific, shift, takes_tokens):
        super().__init__()
        self.clip, self.kind = tower.requires_grad_(False), kind
        self.encoder = Encoder(tower, takes_tokens) if kind == "encoder" else None
        shape = (8, m, WIDTH) if specific else (m, WIDTH)
        self.ctx = nn.Parameter(torch.randn(shape) * 0.5)
        self.shift = nn.Linear(WIDTH, WIDTH) if shift else None

    def prompts(self, case, image):
        rows, m = [], self.ctx.shape[-2]
        for c, start, gap in zip(case.classes, case.starts, case.gaps, strict=True):
            v = self.ctx[c] if self.ctx.dim() == 3 else self.ctx
            v = v if self.shift is None else v + self.shift(image)
            ids = (torch.arange(case.length) * (c + 3)) % (VOCABULARY - 1)
            ids[0] = VOCABULARY - 1
            words = self.clip.token_embedding(ids)
            half = m // 2
            parts = [words[:start], v[:half], words[start : start + gap], v[half:], words[start + gap :]]
            rows.append(torch.cat(parts)[: case.length])
        return torch.stack(rows)

    def forward(self, case, images):
        total = 0.0
        for image in images if self.shift is not None else images[:1]:
            prompts = self.prompts(case, image)
            if self.encoder is not None and self.encoder.takes_tokens:
                texts = self.encoder(prompts, torch.zeros(prompts.shape[:2], dtype=torch.long))
            else:
                texts = self.encoder(prompts) if self.encoder is not None else self.clip.states(prompts)[:, -1]
            total = total + (texts @ image).sin().sum()
        return total

    def term(self, case, images, regularizer, own):
        """Prompt by prompt, those that are alike up to their last vector once."""
        totals, m = [], self.ctx.shape[-2]
        for image in images if self.shift is not None else images[:1]:
            prompts = self.prompts(case, image)
            hidden, seen, v, h = self.clip.states(prompts), {}, [], []
            for n, (c, start, gap) in enumerate(zip(case.classes, case.starts, case.gaps, strict=True)):
                at = [start + i + (gap if i >= m // 2 else 0) for i in range(m)]
                key = (c if self.ctx.dim() == 3 else 0, tuple(at), prompts[n, : at[-1] + 1].detach().numpy().tobytes())
                if seen.setdefault(key, n) == n:
                    v.append(prompts[n, at])
                    h.append(hidden[n, [t - (not own) for t in at]])
            totals.append(regularizer(torch.stack(v), torch.stack(h)))
        return sum(totals) / len(totals)


@st.composite
def cases(draw, m, specific):
    n, length = draw(st.integers(1, 6)), draw(st.integers(m + 4, LONGEST))
    numbers = st.integers(0, 7)
    classes = draw(st.lists(numbers, min_size=n, max_size=n, unique=specific))
    starts, gaps = [], []
    alike = draw(st.booleans())
    for _ in classes:
        gap = draw(st.integers(0, length - m - 1)) if not (alike and gaps) else gaps[0]
        gaps.append(gap if m > 1 else 0)
        starts.append(draw(st.integers(1, length - m - gaps[-1])) if not (alike and starts) else starts[0])
    return Case(classes, starts, gaps, length)


@settings(max_examples=int(os.environ.get("PLPP_FUZZ", "40")))
@given(st.data())
def test_the_gradient_is_that_of_the_sum(data):
    m, specific, shift = data.draw(st.integers(1, 4)), data.draw(st.booleans()), data.draw(st.booleans())
    kind, takes_tokens = data.draw(st.sampled_from(["encoder", "inline"])), data.draw(st.booleans())
    dtype, own = data.draw(st.sampled_from([torch.float64, torch.float32])), data.draw(st.booleans())
    views = data.draw(st.integers(1, 2))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(data.draw(st.integers(0, 99)))
        host = Host(Tower(), m, kind, specific, shift, takes_tokens).to(dtype).train()
        images = torch.randn(data.draw(st.integers(1, 3)), WIDTH, dtype=dtype)
    regularizer = PerplexityRegularizer(host.clip.token_embedding.weight, top_k=5, weight=0.7, inverse_weight=0.4)
    drawn = data.draw(st.lists(cases(m, specific), min_size=1, max_size=3))
    parameters = [p for p in host.parameters() if p.requires_grad]
    wanted = []
    for case in drawn:
        loss = sum(host(case, images) for _ in range(views)) + host.term(case, images, regularizer, own)
        wanted.append(torch.autograd.grad(loss, parameters))
    attach(host, regularizer, forward_passes=views, states="own" if own else "preceding", context="ctx")
    for case, gradients in zip(drawn, wanted, strict=True):
        host.zero_grad()
        sum(host(case, images) for _ in range(views)).backward()
        for p, gradient in zip(parameters, gradients, strict=True):
            assert (p.grad - gradient).norm() <= TOLERANCE[dtype] * gradient.norm() + 1e-12


@pytest.mark.parametrize("weight", [0.0, 0.7])
def test_the_term_is_seen_by_these_cases(weight):
    """That the comparison above can fail: the term is no small part of the gradient."""
    torch.manual_seed(0)
    host = Host(Tower(), 3, "inline", False, False, False).double()
    case, images = Case([1, 2], [1, 1], [0, 0], 9), torch.randn(1, WIDTH, dtype=torch.float64)
    regularizer = PerplexityRegularizer(host.clip.token_embedding.weight, weight=weight, inverse_weight=0.0, top_k=5)
    plain, both = (
        torch.autograd.grad(loss, host.ctx)[0]
        for loss in (host(case, images), host(case, images) + host.term(case, images, regularizer, False))
    )
    assert bool((both - plain).norm() > 1e-3 * plain.norm()) == (weight > 0)
