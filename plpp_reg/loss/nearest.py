"""The K words nearest to each context vector, exactly, without meeting all V words at every step."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from plpp_reg.loss import functional as PF

KEPT = 4  # words kept for each one asked for
SLACK = 1e-5  # of float32 cosines, which rounding moves by about 1e-7


class Memory(NamedTuple):
    """Where each of R rows was looked up last, and what was found there."""

    direction: Tensor  # (R, D) u0, float16
    kept: Tensor  # (R, KEPT * K) ids, ascending, so that equal cosines come in one order
    places: Tensor  # (R, V) sparse: where the kept words are
    left_out: Tensor  # (R,) b, what float16 took from u0, and the slack


class NearestWords:
    """Finds cosines and ids (R, K) as :func:`plpp_reg.loss.functional.search_all` does, and remembers where it looked.

    A row that is looked up over all V words keeps the ``KEPT * K`` nearest ones and the cosine b of the best word left out, at
    its direction u0 = v / |v|. Cosines of unit vectors move by at most |u - u0| (Cauchy-Schwarz), so as long as::

        K-th best cosine of the kept words at u  >  b + |u - u0| + slack

    no word left out can be among the K nearest: they are found among the kept ones. A row that fails this is looked up again.
    u0 is remembered in float16; what that takes from it, |u0 - float16(u0)|, is added to b, so that the bound still holds.
    Training moves a context vector by little a step, so most steps look at 4 K words a row instead of at V. Whatever is
    remembered, the answer is the same: it is always taken from the same products with the kept words (where more than 4 K words
    lie within rounding of one another, which of them are kept is rounding's choice).

    This is a CPU's way. Whether a row fails must be known before it is spared the V words; an accelerator would be waited for
    at every step, and meets all V words in less time: there, and in a compiled graph, every row is looked up each time.
    """

    def __init__(self, remembers: bool = True) -> None:
        self.remembers = remembers  # False: look every row up on a CPU too, as an accelerator does
        self.forget()

    def forget(self) -> None:
        """The vocabulary has changed."""
        self.memory: Memory | None = None
        self.looked_up = 0  # rows that met all V words, since the last forget()

    @torch.no_grad()
    def __call__(self, v: Tensor, E: Tensor, E_inverse_norm: Tensor, k: int, max_bytes: int) -> tuple[Tensor, Tensor]:
        """v (R, D), E (V, D), E_inverse_norm (V,) -> cosines (R, k), ids (R, k), nearest first."""
        count = KEPT * k
        if not (self.remembers and v.is_cpu) or torch.compiler.is_compiling() or count >= len(E):
            return PF.search_all(v, E, E_inverse_norm, k, max_bytes)
        with torch.inference_mode(False):  # what is kept serves training too
            return self._remembered(v.clone() if v.is_inference() else v, E, E_inverse_norm, k, max_bytes)

    @torch.no_grad()
    def _remembered(self, v: Tensor, E: Tensor, E_inverse_norm: Tensor, k: int, max_bytes: int) -> tuple[Tensor, Tensor]:
        shape = (len(v), KEPT * k)
        u = v / v.norm(dim=-1, keepdim=True).clamp_min(PF.NORMALIZE_EPS)
        memory = self.memory
        if memory is None or memory.kept.shape != shape or memory.left_out.dtype != v.dtype:
            kept = torch.zeros(shape, dtype=torch.long)
            direction = torch.full_like(v, torch.nan, dtype=torch.float16)  # no row is sure of anything
            memory = Memory(direction, kept, kept, v.new_zeros(len(v)))
            unsure = torch.ones(len(v), dtype=torch.bool)
        else:
            cosines, ids = _among_kept(memory, u, E, E_inverse_norm, k)
            drift = (u - memory.direction).norm(dim=-1)
            sure = cosines[:, -1] > memory.left_out + drift  # nan is not
            if False not in sure.tolist():
                return cosines, ids
            unsure = ~sure
        self.memory = self._look_up(memory, unsure.nonzero()[:, 0], u, E, E_inverse_norm, max_bytes)
        return _among_kept(self.memory, u, E, E_inverse_norm, k)

    def _look_up(self, memory: Memory, rows: Tensor, u: Tensor, E: Tensor, E_inverse_norm: Tensor, max_bytes: int) -> Memory:
        """Remember the words nearest to ``rows`` (r,) of u, which meet all V words."""
        self.looked_up += len(rows)
        direction, kept, _, left_out = memory
        found, nearest = PF.search_all(u[rows], E, E_inverse_norm, kept.shape[1] + 1, max_bytes)
        rounded = u[rows].to(direction.dtype)
        direction[rows], left_out[rows] = rounded, found[:, -1] + (u[rows] - rounded).norm(dim=-1) + SLACK
        kept[rows] = nearest[:, :-1].sort(dim=1).values
        starts = torch.arange(0, kept.numel() + 1, kept.shape[1])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
            values, size = u.new_zeros(kept.numel()), (len(u), len(E))
            places = torch.sparse_csr_tensor(starts, kept.flatten(), values, size, check_invariants=False)
        return memory._replace(places=places)


def _among_kept(memory: Memory, u: Tensor, E: Tensor, E_inverse_norm: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k nearest of each row's kept words, whose vectors (R, KEPT * K, D) are not made: it takes four times as long."""
    products = torch.sparse.sampled_addmm(memory.places, u, E.T, beta=0.0).values().view(memory.kept.shape)
    best, place = (products * E_inverse_norm[memory.kept]).sort(dim=1, descending=True, stable=True)
    return best[:, :k], memory.kept.gather(1, place[:, :k])
