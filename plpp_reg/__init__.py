"""plpp-reg: Prompt Learning with PerPlexity (PLPP, arXiv 2412.15277) for any CLIP prompt learner."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from plpp_reg.attachment import Handle, attach
    from plpp_reg.attachment.with_plpp import with_plpp
    from plpp_reg.loss.regularizer import Components, PerplexityRegularizer

__version__ = "0.2.0"
__all__ = ["Components", "Handle", "PerplexityRegularizer", "__version__", "attach", "with_plpp"]

_PLACES = {
    "Components": "loss.regularizer",
    "PerplexityRegularizer": "loss.regularizer",
    "Handle": "attachment",
    "attach": "attachment",
    "with_plpp": "attachment.with_plpp",
}


def __getattr__(name: str) -> Any:
    # Late, so that commands/cli.py can say how threads wait before torch is there, and answers --help at once
    if name in _PLACES:
        import importlib

        return getattr(importlib.import_module(f"plpp_reg.{_PLACES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
