"""Random-matrix predictions; knows no networks."""

from hesscope.theory.static_force import StaticForce, static_force

__all__ = ["StaticForce", "static_force"]
