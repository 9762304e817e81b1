"""A checkout's own package ``clip``, as forks have it: its build_model wants more than OpenAI's."""

from . import model

__all__ = ["model"]
