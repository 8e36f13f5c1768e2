"""The function of the parameters that is studied: model + loss + data."""

from hesscope.objective.objective import Objective

__all__ = ["Objective"]
