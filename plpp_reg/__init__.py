"""plpp-reg: Prompt Learning with PerPlexity (PLPP, arXiv 2412.15277) for any CLIP prompt learner."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from plpp_reg.regularizer import Components, PerplexityRegularizer

__version__ = "0.1.0"
__all__ = ["Components", "PerplexityRegularizer", "__version__"]


def __getattr__(name: str) -> Any:
    # Late, so that the command line can say how threads wait before torch is there (see cli.py), and answers --help at once.
    if name in ("Components", "PerplexityRegularizer"):
        from plpp_reg import regularizer

        return getattr(regularizer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
