"""The K words nearest to each context vector, exactly, without meeting all V words at every step."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from plpp_reg.loss import functional as PF

KEPT = 4  # words kept for each one asked for
SLACK = 1e-5  # of float32 cosines, which rounding moves by about 1e-7


class NearestWords:
    """Finds ids I (R, K) as :func:`plpp_reg.loss.functional.nearest_words` does, and remembers where it looked.

    A row that is looked up over all V words keeps the ``KEPT * K`` nearest ones and the cosine b of the best word left out, at
    its direction u0 = v / |v|. Cosines of unit vectors move by at most |u - u0| (Cauchy-Schwarz), so as long as::

        K-th best cosine of the kept words at u  >  b + |u - u0| + slack

    no word left out can be among the K nearest: they are found among the kept ones. A row that fails this is looked up again.
    u0 is remembered in float16; what that takes from it, |u0 - float16(u0)|, is added to b, so that the bound still holds.
    Training moves a context vector by little a step, so most steps look at 4 K words a row instead of at V. Whatever is
    remembered, the answer is the same: it is always taken from the same products with the kept words.

    On a GPU, whether any row fails must be known on the host before it may be spared the V words: one small copy, hence one
    synchronisation a step. It is not avoided: without it every step would meet all V words.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """The vocabulary has changed."""
        self.direction: Tensor | None = None  # (R, D) u0, float16
        self.kept: Tensor | None = None  # (R, KEPT * K) ids, int32
        self.left_out: Tensor | None = None  # (R,) b, and what float16 took from u0
        self.looked_up = 0  # rows that met all V words, since the last forget()

    @torch.no_grad()
    def __call__(self, v: Tensor, E: Tensor, E_inverse_norm: Tensor, k: int, chunk_size: int) -> Tensor:
        """v (R, D), E (V, D), E_inverse_norm (V,) -> ids (R, k), nearest first. ``chunk_size`` rows at a time."""
        count = KEPT * k
        if count >= len(E):
            return PF.search_all(v, E, E_inverse_norm, k, chunk_size)
        known = self.kept is not None and self.kept.shape == (len(v), count)
        if not (known and self.left_out.device == v.device and self.left_out.dtype == v.dtype):
            self.direction = torch.full_like(v, torch.nan, dtype=torch.float16)  # no row is sure of anything
            self.kept = torch.zeros(len(v), count, dtype=torch.int32, device=v.device)
            self.left_out = v.new_zeros(len(v))
        places = [slice(i, i + chunk_size) for i in range(0, len(v), chunk_size)]
        ids, sure = zip(*(self._remembered(place, v[place], E, E_inverse_norm, k) for place in places), strict=True)
        known = torch.cat(sure).cpu()  # the one place where a GPU is waited for, once however many chunks there are
        return torch.cat(
            [
                found if known[place].all() else self._searched(place, ~known[place], v[place], E, E_inverse_norm, k)
                for place, found in zip(places, ids, strict=True)
            ]
        )

    def _remembered(self, place: slice, v: Tensor, E: Tensor, E_inverse_norm: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The ids (r, k) of the rows at ``place`` among their kept words, and of which rows (r,) these are sure."""
        u = F.normalize(v, dim=-1)
        cosines, ids = _among(self.kept[place], u, E, E_inverse_norm, k)
        drift = (u - self.direction[place]).norm(dim=-1)
        return ids, cosines[:, -1] > self.left_out[place] + drift + SLACK  # nan is not sure

    def _searched(self, place: slice, unsure: Tensor, v: Tensor, E: Tensor, E_inverse_norm: Tensor, k: int) -> Tensor:
        """The ids (r, k) of the rows at ``place``, after those that are ``unsure`` (r,), on the CPU, met all words."""
        u = F.normalize(v, dim=-1)
        direction, kept, left_out = self.direction[place], self.kept[place], self.left_out[place]  # views
        rows = unsure.nonzero()[:, 0].to(v.device)
        self.looked_up += len(rows)
        found, nearest = PF.nearest_words(u[rows], E, kept.shape[1] + 1, E_inverse_norm)
        rounded = u[rows].to(direction.dtype)
        direction[rows], left_out[rows] = rounded, found[:, -1] + (u[rows] - rounded).norm(dim=-1)
        kept[rows] = nearest[:, :-1].sort(dim=1).values.int()  # of equal cosines the smaller id comes first, always
        return _among(kept, u, E, E_inverse_norm, k)[1]


def _among(kept: Tensor, u: Tensor, E: Tensor, E_inverse_norm: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k nearest of each row's kept words: cosines (R, k), ids (R, k)."""
    cosines = PF.word_products(u, E, kept) * E_inverse_norm[kept]
    best, place = cosines.sort(dim=1, descending=True, stable=True)
    return best[:, :k], kept.gather(1, place[:, :k]).long()
