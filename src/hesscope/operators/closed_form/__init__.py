"""Exact Hessians and energies from formulas: matrix products, no automatic differentiation (MATH.md, sections 2, 3)."""

from hesscope.operators.closed_form.layer_weights import LayerWeights, layer_weights
from hesscope.operators.closed_form.output_layer import (
    OutputLayerEnergies,
    output_layer_blocks,
    output_layer_energies,
)

__all__ = ["LayerWeights", "OutputLayerEnergies", "layer_weights", "output_layer_blocks", "output_layer_energies"]
