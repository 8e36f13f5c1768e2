"""The data sets of the papers, synthetic and embedded."""

from hesscope.data.digits import digits
from hesscope.data.labelled import LabelledData
from hesscope.data.synthetic import clusters, gaussian

__all__ = ["LabelledData", "clusters", "digits", "gaussian"]
