"""The networks of the papers."""

from hesscope.models.mlp import MLP, linear, mlp, one_hidden

__all__ = ["MLP", "linear", "mlp", "one_hidden"]
