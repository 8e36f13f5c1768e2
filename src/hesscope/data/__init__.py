"""The data sets of the papers, synthetic and embedded, and image sets that the user has on disk."""

from hesscope.data.digits import digits
from hesscope.data.image_sets import image_set
from hesscope.data.labelled import LabelledData
from hesscope.data.patch_population import PatchPopulation, patch_population
from hesscope.data.photographs import photographs
from hesscope.data.relabelled import binary, randomly_labelled
from hesscope.data.synthetic import clusters, gaussian

__all__ = [
    "LabelledData",
    "PatchPopulation",
    "binary",
    "clusters",
    "digits",
    "gaussian",
    "image_set",
    "patch_population",
    "photographs",
    "randomly_labelled",
]
