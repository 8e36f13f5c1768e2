"""hesscope: measures, predicts and explains the structure of neural-network Hessians.

Names are loaded on first use, so that `import hesscope` and `hesscope --help` do not wait for PyTorch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hesscope._version import __version__

if TYPE_CHECKING:
    from hesscope.core.errors import HesscopeError
    from hesscope.core.vectors import ParameterSpace
    from hesscope.estimate.advice import choose_by_tensor, choose_partition
    from hesscope.estimate.block_energies import block_energies
    from hesscope.estimate.block_spectra import BlockSpectra, block_spectra
    from hesscope.estimate.block_traces import block_traces
    from hesscope.estimate.density import SpectralDensity
    from hesscope.estimate.diagonal import diagonal
    from hesscope.estimate.diagonality import PartitionComparison, compare_partitions
    from hesscope.estimate.eigenpairs import Eigenpairs, top_eigenpairs
    from hesscope.estimate.energies import BlockEnergies, SplitEnergies
    from hesscope.estimate.estimate import Estimate
    from hesscope.estimate.exponent import ExponentFit, fit_exponent
    from hesscope.estimate.frobenius import frobenius_norm_squared
    from hesscope.estimate.outliers import Outliers
    from hesscope.estimate.semi_empirical import SemiEmpiricalLaw, semi_empirical_law
    from hesscope.estimate.spectral_density import spectral_density
    from hesscope.estimate.spectrum_distance import jensen_shannon_distance
    from hesscope.estimate.split import split_energies
    from hesscope.estimate.symlog import from_symlog, to_symlog
    from hesscope.estimate.trace import trace
    from hesscope.layerwise.bound_record import PacBayesBound
    from hesscope.layerwise.pac_bayes import pac_bayes_bound
    from hesscope.objective import Objective
    from hesscope.operators import EmpiricalFisher, GaussNewton, Hessian, as_operator
    from hesscope.operators.closed_form import LayerWeights, OutputLayerEnergies, layer_weights, output_layer_energies
    from hesscope.partition import Coverage, Cut, Heads, Partition

# Where each public name lives; submodules that are themselves public names map to None.
_HOME: dict[str, str | None] = {
    "HesscopeError": "hesscope.core.errors",
    "ParameterSpace": "hesscope.core.vectors",
    "Objective": "hesscope.objective",
    "Partition": "hesscope.partition",
    "Heads": "hesscope.partition",
    "Cut": "hesscope.partition",
    "Coverage": "hesscope.partition",
    "Hessian": "hesscope.operators",
    "GaussNewton": "hesscope.operators",
    "EmpiricalFisher": "hesscope.operators",
    "as_operator": "hesscope.operators",
    "block_energies": "hesscope.estimate.block_energies",
    "BlockEnergies": "hesscope.estimate.energies",
    "OutputLayerEnergies": "hesscope.operators.closed_form",
    "output_layer_energies": "hesscope.operators.closed_form",
    "SplitEnergies": "hesscope.estimate.energies",
    "split_energies": "hesscope.estimate.split",
    "ExponentFit": "hesscope.estimate.exponent",
    "fit_exponent": "hesscope.estimate.exponent",
    "LayerWeights": "hesscope.operators.closed_form",
    "layer_weights": "hesscope.operators.closed_form",
    "SemiEmpiricalLaw": "hesscope.estimate.semi_empirical",
    "semi_empirical_law": "hesscope.estimate.semi_empirical",
    "Estimate": "hesscope.estimate.estimate",
    "trace": "hesscope.estimate.trace",
    "frobenius_norm_squared": "hesscope.estimate.frobenius",
    "diagonal": "hesscope.estimate.diagonal",
    "block_traces": "hesscope.estimate.block_traces",
    "block_spectra": "hesscope.estimate.block_spectra",
    "BlockSpectra": "hesscope.estimate.block_spectra",
    "compare_partitions": "hesscope.estimate.diagonality",
    "PartitionComparison": "hesscope.estimate.diagonality",
    "choose_partition": "hesscope.estimate.advice",
    "choose_by_tensor": "hesscope.estimate.advice",
    "Eigenpairs": "hesscope.estimate.eigenpairs",
    "top_eigenpairs": "hesscope.estimate.eigenpairs",
    "SpectralDensity": "hesscope.estimate.density",
    "spectral_density": "hesscope.estimate.spectral_density",
    "Outliers": "hesscope.estimate.outliers",
    "jensen_shannon_distance": "hesscope.estimate.spectrum_distance",
    "to_symlog": "hesscope.estimate.symlog",
    "from_symlog": "hesscope.estimate.symlog",
    "pac_bayes_bound": "hesscope.layerwise.pac_bayes",
    "PacBayesBound": "hesscope.layerwise.bound_record",
    "bounds": None,
    "data": None,
    "dynamics": None,
    "layerwise": None,
    "models": None,
    "theory": None,
}

__all__ = [
    "BlockEnergies",
    "BlockSpectra",
    "Coverage",
    "Cut",
    "Eigenpairs",
    "EmpiricalFisher",
    "Estimate",
    "ExponentFit",
    "GaussNewton",
    "Heads",
    "HesscopeError",
    "Hessian",
    "LayerWeights",
    "Objective",
    "Outliers",
    "OutputLayerEnergies",
    "PacBayesBound",
    "ParameterSpace",
    "Partition",
    "PartitionComparison",
    "SemiEmpiricalLaw",
    "SpectralDensity",
    "SplitEnergies",
    "__version__",
    "as_operator",
    "block_energies",
    "block_spectra",
    "block_traces",
    "choose_by_tensor",
    "choose_partition",
    "compare_partitions",
    "diagonal",
    "fit_exponent",
    "frobenius_norm_squared",
    "from_symlog",
    "jensen_shannon_distance",
    "layer_weights",
    "output_layer_energies",
    "pac_bayes_bound",
    "semi_empirical_law",
    "spectral_density",
    "split_energies",
    "to_symlog",
    "top_eigenpairs",
    "trace",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'hesscope' has no attribute {name!r}")
    home = _HOME[name]
    value = import_module(f"hesscope.{name}") if home is None else getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, *_HOME})
