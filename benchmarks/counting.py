"""What torch itself counts: operations, and values that the host waits for."""

from __future__ import annotations

from collections import Counter

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from plpp_reg.estimate.operation import ATTENTION, ATTENTION_BACKWARD

NAMES = ["cat", "red panda", "traffic light", "fire truck red", "dog", "red cat dog", "red cat"]
# a CPU's fused attention, for which torch has no formula
FUSED = {
    ATTENTION: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    ATTENTION_BACKWARD: lambda gradient, q, k, v, *_, **__: sdpa_backward_flop_count(gradient, q, k, v),
}


def counted(run) -> tuple[int, int]:
    with FlopCounterMode(display=False, custom_mapping=FUSED) as count:
        out = run()
        forward = count.get_total_flops()
        if out.requires_grad:
            out.backward()
    return forward, count.get_total_flops() - forward


class Operations(TorchDispatchMode):
    """The operations that are not views, forward and backward, by name.

    >>> with Operations() as operations:
    ...     torch.ones(3).view(3, 1).sum().item()
    3.0
    >>> operations.by_name
    Counter({'ones': 1, 'sum': 1, '_local_scalar_dense': 1})
    """

    VIEWS = {"detach", "_unsafe_view", "lift_fresh"}  # beside those that torch calls so
    NOTES = {"_record_function_enter_new", "_record_function_exit"}  # an optimizer's, for a profiler

    def __init__(self) -> None:
        super().__init__()
        self.by_name: Counter[str] = Counter()

    @property
    def total(self) -> int:
        return sum(self.by_name.values())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if not func.is_view and name not in self.VIEWS | self.NOTES:
            self.by_name[name] += 1
        return func(*args, **(kwargs or {}))


class _Calls(TorchFunctionMode):
    """What the dispatcher does not see on a CPU: copies to the host, where there is nothing to copy; numbers among tensors."""

    COPIES = {"tolist", "cpu", "numpy", "__array__"}

    def __init__(self, by_name: Counter[str]) -> None:
        super().__init__()
        self.by_name = by_name
        self.number_put = False  # x[mask] = 0.0: the mask is filled where it stands

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func.__name__
        # "cpu" by name alone: torch.device("cpu") may be another tensor's device, which is an accelerator's there
        to_host = name == "to" and "cpu" in (*(a for a in args[1:] if isinstance(a, str)), kwargs.get("device"))
        if name in self.COPIES or to_host:
            self.by_name[name] += 1
        self.number_put = name == "__setitem__" and isinstance(args[2], (int, float))
        try:
            return func(*args, **kwargs)
        finally:
            self.number_put = False


class Waits(TorchDispatchMode):
    """Where the host would wait for an accelerator: for a value, for a size that depends on values, for a copy.

    >>> with Waits() as waits:
    ...     torch.ones(2).tolist(), bool(torch.ones(()) > 0), len(torch.ones(3).nonzero())
    ([1.0, 1.0], True, 3)
    >>> waits.by_name
    Counter({'tolist': 1, '_local_scalar_dense': 1, 'nonzero': 1})
    >>> x, large = torch.arange(4.0), torch.tensor([False, False, True, True])
    >>> with Waits() as waits:
    ...     x[large] = -x[:2]  # the mask becomes places, whose number the host must know; that of a number does not
    ...     x[large] = 0.0
    ...     moved = x.to("cpu")
    >>> waits.by_name
    Counter({'index_put_': 1, 'to': 1})
    """

    TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
    BY_MASK = {"index", "index_put", "index_put_", "_index_put_impl_"}  # they wait where an index is a mask

    def __init__(self) -> None:
        super().__init__()
        self.by_name: Counter[str] = Counter()
        self._calls = _Calls(self.by_name)

    def __enter__(self):
        self._calls.__enter__()
        return super().__enter__()

    def __exit__(self, *raised):
        super().__exit__(*raised)
        self._calls.__exit__(*raised)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in self.BY_MASK:
            masked = any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
            waits = masked and not self._calls.number_put
        else:
            waits = bool(self.TAGS & set(func.tags))
        if waits:
            self.by_name[name] += 1
        return func(*args, **(kwargs or {}))
