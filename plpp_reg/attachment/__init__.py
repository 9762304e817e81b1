"""PLPP on a model that somebody else wrote: ``attach``, the handle that it gives, and how prompts are read."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from plpp_reg.attachment.attaching import attach, attached
    from plpp_reg.attachment.handle import Handle
    from plpp_reg.attachment.layout import Layout

__all__ = ["Handle", "Layout", "attach", "attached"]

_PLACES = {"Handle": "handle", "Layout": "layout", "attach": "attaching", "attached": "attaching"}


def __getattr__(name: str) -> Any:
    # Late: the hooks keep out of torch.compile's graphs, for which its compiler is loaded; who reads a prompt needs neither
    if name in _PLACES:
        import importlib

        return getattr(importlib.import_module(f"plpp_reg.attachment.{_PLACES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
