"""The data sets of the papers, synthetic and embedded, and image sets that the user has on disk."""

from hesscope.data.digits import digits
from hesscope.data.image_sets import image_set
from hesscope.data.labelled import LabelledData
from hesscope.data.photographs import photographs
from hesscope.data.synthetic import clusters, gaussian

__all__ = ["LabelledData", "clusters", "digits", "gaussian", "image_set", "photographs"]
