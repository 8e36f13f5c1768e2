"""Layer-wise structure ([W], arXiv:2010.04261; MATH.md, section 5): decoupling, low rank, shared eigenspaces."""

from hesscope.layerwise.bound_record import PacBayesBound, Spread
from hesscope.layerwise.decoupling import Decoupling
from hesscope.layerwise.eigenstructure import Eigenstructure, layer_eigenstructure
from hesscope.layerwise.factors import (
    KroneckerFactors,
    all_kronecker_factors,
    kronecker_factors,
    layer_gauss_newton,
    layer_hessian,
)
from hesscope.layerwise.full_hessian import FullHessianOverlap, full_hessian_overlap
from hesscope.layerwise.gaussians import Axes, Group, GroupPosterior, Posterior
from hesscope.layerwise.gibbs import stochastic_risk
from hesscope.layerwise.layer_map import LayerMap, layer_map
from hesscope.layerwise.layers import Layer, layers_of
from hesscope.layerwise.overlap import overlap, overlap_curve
from hesscope.layerwise.pac_bayes import POSTERIORS, pac_bayes_bound
from hesscope.layerwise.rank_one import LayerLowRank, layer_low_rank, rank_one_energy
from hesscope.layerwise.risk import network_risk
from hesscope.layerwise.shared_eigenspaces import SharedEigenspaces, shared_eigenspaces
from hesscope.layerwise.two_layer import TwoLayerTheorem, two_layer_theorem

__all__ = [
    "POSTERIORS",
    "Axes",
    "Decoupling",
    "Eigenstructure",
    "FullHessianOverlap",
    "Group",
    "GroupPosterior",
    "KroneckerFactors",
    "Layer",
    "LayerLowRank",
    "LayerMap",
    "PacBayesBound",
    "Posterior",
    "SharedEigenspaces",
    "Spread",
    "TwoLayerTheorem",
    "all_kronecker_factors",
    "full_hessian_overlap",
    "kronecker_factors",
    "layer_eigenstructure",
    "layer_gauss_newton",
    "layer_hessian",
    "layer_low_rank",
    "layer_map",
    "layers_of",
    "network_risk",
    "overlap",
    "overlap_curve",
    "pac_bayes_bound",
    "rank_one_energy",
    "shared_eigenspaces",
    "stochastic_risk",
    "two_layer_theorem",
]
