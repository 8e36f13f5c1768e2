"""Matrix-free curvature: Hessian, Gauss-Newton, their sums and differences, bridges to other libraries."""

from hesscope.operators.bridges import as_operator
from hesscope.operators.curvature import EmpiricalFisher, GaussNewton, Hessian
from hesscope.operators.operator import Operator

__all__ = ["EmpiricalFisher", "GaussNewton", "Hessian", "Operator", "as_operator"]
