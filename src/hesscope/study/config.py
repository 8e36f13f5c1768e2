"""STUDY.toml: what to analyze, checked before any work starts."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hesscope.core.checks import nearest
from hesscope.core.errors import InputError

EXAMPLE = """\
# A hesscope study. Run it with:  hesscope analyze STUDY.toml
# Relative paths are relative to this file; so are the modules named below.

# The network: a function that returns a torch.nn.Module, and what to call it with.
model = "hesscope.models:one_hidden"
model_arguments = { d = 64, m = 16, C = 10 }

# Its trained parameters (.pt or .safetensors). Leave out to measure the network as the function makes it.
# checkpoint = "weights.safetensors"

# The data: a function that returns (x, y) tensors, a list of batches or a DataLoader.
data = "hesscope.data:digits"
# data_arguments = {}

# "cross_entropy", "mse", or "pkg.module:name" of a torch loss module, or of a
# function(model, batch) -> (sum of the loss terms, number of terms).
loss = "cross_entropy"

# Blocks: "tensor", "layer", "row" (one per neuron), "column", "head",
# or "pkg.module:function" that takes the model and returns a hesscope.Partition.
partition = "row"

# "exact" (one product per parameter), "probes" (random, with standard errors), or "auto".
method = "auto"
# probes = 32
seed = 0

# Where the page, the figures and the results go.
output = "out/study"
"""


class StudyConfig(BaseModel):
    """The keys of STUDY.toml (see EXAMPLE); relative paths are relative to the file."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())

    model: str
    data: str
    output: str = Field(min_length=1)
    model_arguments: dict[str, Any] = Field(default_factory=dict)
    data_arguments: dict[str, Any] = Field(default_factory=dict)
    checkpoint: str | None = None
    loss: str = "cross_entropy"
    partition: str = "row"
    method: str = "auto"
    probes: int | None = None
    seed: int = 0


def read_config(path: Path) -> StudyConfig:
    """Read and check a STUDY.toml.

    Raises:
        InputError: no such file, not TOML, or a key that is missing, unknown (with the nearest valid name) or of the
            wrong type.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path} is not valid TOML: {error}") from error
    try:
        return StudyConfig.model_validate(values)
    except ValidationError as error:
        raise InputError(f"{path}: " + "; ".join(_in_words(problem) for problem in error.errors())) from error


def _in_words(problem: Any) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return f"unknown key {key!r}{nearest(key, StudyConfig.model_fields)}"
    if problem["type"] == "missing":
        return f"the key {key!r} is missing"
    return f"{key} = {problem['input']!r}: {problem['msg'][0].lower()}{problem['msg'][1:]}"
