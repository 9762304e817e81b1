"""The K words nearest to each context vector, exactly, without meeting all V words at every step."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from plpp_reg.loss import functional as PF

KEPT = 4  # words kept for each one asked for
SLACK = 1e-5  # of float32 cosines, which rounding moves by about 1e-7


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
        self.direction: Tensor | None = None  # (R, D) u0, float16
        self.kept: Tensor | None = None  # (R, KEPT * K) ids, ascending, so that equal cosines come in one order
        self.places: Tensor | None = None  # (R, V) sparse: where the kept words are
        self.left_out: Tensor | None = None  # (R,) b, what float16 took from u0, and the slack
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
        count = KEPT * k
        u = v / v.norm(dim=-1, keepdim=True).clamp_min(PF.NORMALIZE_EPS)
        if self.kept is None or self.kept.shape != (len(v), count) or self.left_out.dtype != v.dtype:
            self.direction = torch.full_like(v, torch.nan, dtype=torch.float16)  # no row is sure of anything
            self.kept = torch.zeros(len(v), count, dtype=torch.long)
            self.left_out = v.new_zeros(len(v))
            unsure = torch.ones(len(v), dtype=torch.bool)
        else:
            cosines, ids = self._among_kept(u, E, E_inverse_norm, k)
            drift = (u - self.direction).norm(dim=-1)
            sure = cosines[:, -1] > self.left_out + drift  # nan is not
            if False not in sure.tolist():
                return cosines, ids
            unsure = ~sure
        self._look_up(unsure.nonzero()[:, 0], u, E, E_inverse_norm, max_bytes)
        return self._among_kept(u, E, E_inverse_norm, k)

    def _look_up(self, rows: Tensor, u: Tensor, E: Tensor, E_inverse_norm: Tensor, max_bytes: int) -> None:
        """Remember the words nearest to ``rows`` (r,) of u, which meet all V words."""
        self.looked_up += len(rows)
        found, nearest = PF.search_all(u[rows], E, E_inverse_norm, self.kept.shape[1] + 1, max_bytes)
        rounded = u[rows].to(self.direction.dtype)
        self.direction[rows], self.left_out[rows] = rounded, found[:, -1] + (u[rows] - rounded).norm(dim=-1) + SLACK
        self.kept[rows] = nearest[:, :-1].sort(dim=1).values
        starts = torch.arange(0, self.kept.numel() + 1, self.kept.shape[1])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
            values, size = u.new_zeros(self.kept.numel()), (len(u), len(E))
            self.places = torch.sparse_csr_tensor(starts, self.kept.flatten(), values, size, check_invariants=False)

    def _among_kept(self, u: Tensor, E: Tensor, E_inverse_norm: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k nearest of each row's kept words, whose vectors (R, KEPT * K, D) are not made: it takes four times as long."""
        products = torch.sparse.sampled_addmm(self.places, u, E.T, beta=0.0).values().view(self.kept.shape)
        best, place = (products * E_inverse_norm[self.kept]).sort(dim=1, descending=True, stable=True)
        return best[:, :k], self.kept.gather(1, place[:, :k])
