"""What torch itself counts: operations, bytes that autograd keeps, bytes that live at once."""

from __future__ import annotations

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

NAMES = ["cat", "red panda", "traffic light", "fire truck red", "dog", "red cat dog", "red cat"]


def counted(run) -> tuple[int, int]:
    """torch's own operations of forward and backward; the plain attention, because it counts no other on a CPU."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as count:
        out = run()
        forward = count.get_total_flops()
        if out.requires_grad:
            out.backward()
    return forward, count.get_total_flops() - forward


def kept_bytes(run, model) -> int:
    """What autograd keeps, each storage once, the frozen weights and buffers aside."""
    frozen = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in frozen:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # the tensor too: no other comes to its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(size for size, _ in kept.values())


class Living(TorchDispatchMode):
    """The most bytes that tensors made here have at once."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in given:
                storage = tensor.untyped_storage()
                self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.alive = {at: (ref, size) for at, (ref, size) in self.alive.items() if not ref.expired()}
        self.most = max(self.most, sum(size for _, size in self.alive.values()))
        return out
