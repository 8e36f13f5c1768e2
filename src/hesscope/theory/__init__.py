"""Random-matrix predictions; knows no networks."""

from hesscope.theory.block_laws import BlockLaws, block_laws
from hesscope.theory.kolmogorov import kolmogorov_distance
from hesscope.theory.population_spectrum import PopulationSpectrum, population_spectrum
from hesscope.theory.softmax_moments import pair_moment, softmax_moment, variance_moment
from hesscope.theory.spectral_law import SpectralLaw, moments_from_weight_moments
from hesscope.theory.static_force import StaticForce, static_force

__all__ = [
    "BlockLaws",
    "PopulationSpectrum",
    "SpectralLaw",
    "StaticForce",
    "block_laws",
    "kolmogorov_distance",
    "moments_from_weight_moments",
    "pair_moment",
    "population_spectrum",
    "softmax_moment",
    "static_force",
    "variance_moment",
]
