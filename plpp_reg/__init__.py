"""plpp-reg: Prompt Learning with PerPlexity (PLPP, arXiv 2412.15277) for any CLIP prompt learner."""

from plpp_reg.regularizer import Components, PerplexityRegularizer

__version__ = "0.1.0"
__all__ = ["Components", "PerplexityRegularizer", "__version__"]
