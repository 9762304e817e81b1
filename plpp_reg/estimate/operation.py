"""Operations as data: one call of torch with the shapes that it meets, which can be made again on a device, and timed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

MOST_CALLS = 64  # with weights of their own
INDICES = (torch.long, torch.int)
ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Shape(NamedTuple):
    """A tensor without its numbers. ``given``: it was there before the run, a weight or a picture."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    given: bool

    @property
    def extent(self) -> int:
        return 0 if 0 in self.size else 1 + sum((n - 1) * step for n, step in zip(self.size, self.stride, strict=True))

    @property
    def nbytes(self) -> int:
        return self.extent * self.dtype.itemsize

    @property
    def cold(self) -> bool:
        """Whether it comes from memory: the whole model was read since it was read last. What was just made is in a cache."""
        return self.given and self.dtype.is_floating_point

    def made(self, device: torch.device) -> Tensor:
        """One of this shape, full of ones, or of zeros where they are indices."""
        flat = torch.full((self.extent,), self.dtype not in INDICES, dtype=self.dtype, device=device)
        return flat.as_strided(self.size, self.stride)


class Operation(NamedTuple):
    """One call of torch: what is called, and with what; :class:`Shape` in place of tensors. ``flops`` as torch counts them."""

    function: Callable
    args: tuple
    kwargs: tuple[tuple[str, Any], ...]
    flops: int

    @property
    def size(self) -> int:
        """What its time grows with: its floating-point operations, or where torch counts none, its input's numbers."""
        return self.flops or 1 + sum(math.prod(shape.size) for shape in _shapes((self.args, self.kwargs)))

    def on(self, device: torch.device, pool: Tensor) -> Callable[[], object]:
        """The same call on that device; each time with other weights, which lie in ``pool`` one after the other."""
        made = {shape: shape.made(device) for shape in _shapes((self.args, self.kwargs)) if not shape.cold}
        a_call = sum(shape.nbytes for shape in _shapes((self.args, self.kwargs)) if shape.cold)
        offsets = range(0, pool.nbytes - a_call + 1, a_call)[:MOST_CALLS] if 0 < a_call <= pool.nbytes else [0]
        calls = itertools.cycle([self._call(device, made, pool[offset:]) for offset in offsets])
        return lambda: next(calls)()

    def _call(self, device: torch.device, made: dict[Shape, Tensor], pool: Tensor) -> Callable[[], object]:
        def real(value: Any) -> Any:
            nonlocal pool
            if isinstance(value, Shape):
                if value in made:
                    return made[value]
                if value.nbytes > len(pool):
                    return value.made(device)
                flat, pool = pool[: value.nbytes], pool[value.nbytes :]
                return flat.view(value.dtype).as_strided(value.size, value.stride)
            if isinstance(value, tuple):
                return [real(v) for v in value]
            return device if isinstance(value, torch.device) else value

        args, kwargs = real(self.args), {name: real(value) for name, value in self.kwargs}
        if device.type != "cpu" and self.function.overloadpacket in (ATTENTION, ATTENTION_BACKWARD):
            return _attention(self, args, kwargs)
        return lambda: self.function(*args, **kwargs)


def _shapes(value: Any) -> list[Shape]:
    if isinstance(value, Shape):
        return [value]
    return [shape for v in value for shape in _shapes(v)] if isinstance(value, tuple) else []


def _attention(operation: Operation, args: list, kwargs: dict[str, Any]) -> Callable[[], object]:
    """An accelerator has kernels of its own: torch chooses one."""
    mask = kwargs.get("attn_mask")
    if operation.function.overloadpacket is ATTENTION:
        return lambda: F.scaled_dot_product_attention(*args[:3], attn_mask=mask, is_causal=args[4])
    q, k, v = (t.requires_grad_() for t in args[1:4])
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=args[7])
    return lambda: torch.autograd.grad(out, (q, k, v), args[0], retain_graph=True)
