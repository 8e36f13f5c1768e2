"""Which axis of a module's weight is its output, by the type of the module and never by a parameter's name."""

from __future__ import annotations

from collections.abc import Container, Iterator

from torch import nn

# Norms scale entry by entry, whatever the shape of their weight: it has no rows.
NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)
# Modules whose weight has the input axis first; everywhere else in PyTorch axis 0 is the output (or token) axis.
INPUT_AXIS_FIRST = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# The same of types known by name, so that their library need not be there: weight [in, out].
NAMED_INPUT_AXIS_FIRST = {"transformers.pytorch_utils.Conv1D"}
# Experts stacked in weights [experts, in, out] whose type does not say so itself (see `expert_output_axis`).
TRANSPOSED_EXPERTS = {
    "transformers.models.llama4.modeling_llama4.Llama4TextExperts",
    "transformers.models.gpt_oss.modeling_gpt_oss.GptOssExperts",
}
# What transformers' decorator of experts leaves on each of them.
EXPERT_MARKS = ("is_transposed", "is_concatenated", "has_bias", "has_gate")


def qualified_names(module: nn.Module) -> Iterator[str]:
    """Full names of the module's type and of all its bases, the nearest first."""
    for base in type(module).__mro__:
        yield f"{base.__module__}.{base.__qualname__}"


def is_named(module: nn.Module, names: Container[str]) -> bool:
    """Whether the module's type, or a base of it, is one of these."""
    return any(name in names for name in qualified_names(module))


def output_axis(module: nn.Module) -> int:
    """Axis of the outputs (neurons, channels, tokens) of a module's weight; inputs are the other one of 0 and 1."""
    return 1 if isinstance(module, INPUT_AXIS_FIRST) or is_named(module, NAMED_INPUT_AXIS_FIRST) else 0


def groups_of(module: nn.Module) -> int:
    """Groups of a convolution, 1 for anything else."""
    return module.groups if isinstance(module, nn.modules.conv._ConvNd) else 1


def expert_output_axis(module: nn.Module) -> int | None:
    """Axis of the outputs in weights of stacked experts [experts, ., .]; None if the module does not stack experts."""
    if is_named(module, TRANSPOSED_EXPERTS):
        return 2
    named = any(name.startswith("transformers.") for name in qualified_names(module))
    if not named or not all(hasattr(module, mark) for mark in EXPERT_MARKS):
        return None
    return 2 if module.is_transposed else 1
