"""STUDY.toml: what to analyze, checked before any work starts."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hesscope.core.checks import nearest
from hesscope.core.errors import InputError

HEAD = """\
# A hesscope study. Run it with:  hesscope analyze STUDY.toml   (how block-diagonal the Hessian is)
#                            or:  hesscope spectrum STUDY.toml  (its eigenvalues, trace and norm, block by block)
#                            or:  hesscope advise STUDY.toml    (which partition it is block-diagonal in)
#                            or:  hesscope layers STUDY.toml    (how near each layer's is to a Kronecker product)
#                            or:  hesscope track STUDY.toml     (how it changes along checkpoints of its training)
#                            or:  hesscope bound STUDY.toml     (how large its risk on new data can be at most)
# The last five have a section each, which their --example prints: hesscope track --example, and so on.
# Relative paths are relative to this file; so are the modules named below.

# The network: a function that returns a torch.nn.Module, and what to call it with.
model = "hesscope.models:one_hidden"
model_arguments = { d = 64, m = 16, C = 10 }
# Or a causal language model in a folder, as Hugging Face's save_pretrained writes it with its tokenizer:
# model = "hf:DIR"    (model_arguments = { dtype = "float64" }, if float32 is not enough)

# Its trained parameters (.pt or .safetensors). Leave out to measure the network as the function makes it.
# checkpoint = "weights.safetensors"

# The data: a function that returns (x, y) tensors, a list of batches or a DataLoader.
data = "hesscope.data:digits"
# data_arguments = {}
# For a language model, text in UTF-8, the beginning of which is cut into windows of so many tokens:
# data = "text:FILE"  and  data_arguments = { contexts = 8, length = 64 }    (and batch_size, if memory is short)

# "cross_entropy", "mse", or "pkg.module:name" of a torch loss module, or of a
# function(model, batch) -> (sum of the loss terms, number of terms).
loss = "cross_entropy"

# Blocks: "tensor", "layer", "module" (one per unit of the network), "row" (one per neuron), "column", "head",
# or "pkg.module:function" that takes the model and returns a hesscope.Partition.
# (spectrum takes layers where these are more than 64 blocks, or where this line is left out.)
partition = "row"

# For analyze and track: "exact" (one product per parameter), "probes" (random, with standard errors), or "auto".
method = "auto"
# probes = 32
seed = 0

# Where the page, the figures and the results go.
output = "out/study"
"""

# What the commands with settings of their own read beside the head.
SECTIONS = {
    "spectrum": """
# For spectrum; every line of it may be left out, and so may all of it.
[spectrum]
# "hessian", or "gauss_newton" (not for a loss of your own).
matrix = "hessian"
# Eigenpairs at either end of the spectrum, and their residual relative to the eigenvalue.
eigenpairs = 10
residual = 1e-3
# Spectral density of the whole matrix: random vectors, and products for each.
probes = 8
steps = 60
# The same for every block.
block_probes = 4
block_steps = 30
# Relative standard error of trace, norm and traces of blocks.
rtol = 0.02
# Each of these, and either end of the spectrum, stops at this many products, done or not.
# max_products = 1000
""",
    "advise": """
# For advise; every line of it may be left out, and so may all of it.
[advise]
# "hessian", or "gauss_newton" (not for a loss of your own).
matrix = "hessian"
# What is compared, beside "tensor"; all schemes that fit the model unless told, whatever `partition` says.
# partitions = ["layer", "tensor", "row"]
# Random vectors for each partition, a multiple of 8.
probes = 32
# Relative standard error of the energies of all pairs of tensors, and the products at which they stop, done or not.
rtol = 0.05
# max_products = 1000
""",
    "layers": """
# For layers; every line of it may be left out, and so may all of it.
[layers]
# Whose eigenvectors: "hessian", or "gauss_newton".
matrix = "hessian"
# Names of modules. All unless told, but no embeddings and none with more than 4096 inputs or outputs.
# layers = ["fc1", "fc2"]
# Where a sample has several positions (patches, tokens): "expand" takes these for samples, and "reduce" takes sums over
# them. Unless told "expand", and layers that a forward pass uses more than once are left out.
# sharing = "expand"
# Eigenpairs of every layer; unless told twice its outputs or three times the classes, but at most 256, and 32 if there
# are more than 256 classes.
# eigenpairs = 32
# Eigenpairs of the whole matrix, to be compared with those of its layers; 0 to leave them out.
full = 10
# Whether to measure how far the layers are from Kronecker products: several more passes over the data.
errors = true
# Random combinations of each sample's classes in place of all; all up to 1024 of them, else 64, unless told.
# probes = 64
""",
    "track": """
# For track, which needs its first line. `checkpoint` above is not read.
[track]
# Folder of checkpoints, whose names end with their steps: step-100.pt, model.000200.safetensors, or sub-folders with
# one such file, such as checkpoint-500/model.safetensors.
checkpoints = "checkpoints"
# Of "energies" (by `partition`, `method` and `probes` above), "eigenvalues", "trace", "density", "heterogeneity" and
# "heatmap".
measures = ["energies", "eigenvalues"]
# Largest eigenvalues.
eigenpairs = 5
# Of plain gradient descent, for the line 2 / learning_rate; unless told that of the optimizer's state, if it is stored.
# learning_rate = 0.1
# Whether steps may be missing where the others are evenly spaced.
gaps = false
# Checkpoints measured at the same time, each in a process of its own with its own copy of model and data. More than 1
# pays only where a checkpoint takes more than a few seconds: each process loads PyTorch and the study first.
processes = 1
# Diagonality (the energy's share in diagonal blocks) from which on the Hessian counts as block-diagonal.
threshold = 0.9
# The smallest value that the loss can have; the loss of no checkpoint may be below it.
optimum = 0.0
""",
    "bound": """
# For bound; every line of it may be left out, and so may all of it. `checkpoint` above is needed then: the trained
# parameters. `data` must be the samples that they were trained on, independent of each other, with one label each; and
# `model` must make the network as it was before training, the same each time it is called.
[bound]
# Of "isotropic", "diagonal", "diagonal_optimized", "kronecker", "kronecker_optimized" and "kronecker_refreshed"; all
# unless told.
# posteriors = ["diagonal", "kronecker"]
# Probability with which each bound may fail.
delta = 0.05
# Steps of each optimization, and minutes after which it ends in any case.
steps = 4000
# minutes = 10
# The bound is of the classification error, or with this line of min(loss, B) / B, for any loss.
# loss_bound = 4.0
# Samples that were not trained on, to be set beside the bound: a function as that of `data`.
# held_out = "my_code:test_data"
# held_out_arguments = { samples = 1000 }
# The parameters before training (.pt or .safetensors), if they are not those that `model` makes.
# prior = "initial.safetensors"
""",
}

# All that a STUDY.toml may say.
EXAMPLE = HEAD + "".join(SECTIONS.values())


def example_study(command: str) -> str:
    """A commented STUDY.toml to start from, with the sections that this command reads."""
    return HEAD + SECTIONS.get(command, "")


class SpectrumConfig(BaseModel):
    """The keys of STUDY.toml's section [spectrum] (see EXAMPLE)."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    matrix: str = "hessian"
    eigenpairs: int = Field(default=10, ge=1)
    residual: float = Field(default=1e-3, gt=0, lt=1)
    probes: int = Field(default=8, ge=2)
    steps: int = Field(default=60, ge=2)
    block_probes: int = Field(default=4, ge=2)
    block_steps: int = Field(default=30, ge=2)
    rtol: float = Field(default=0.02, gt=0, lt=1)
    max_products: int | None = Field(default=None, ge=6)


class AdviseConfig(BaseModel):
    """The keys of STUDY.toml's section [advise] (see EXAMPLE)."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    matrix: str = "hessian"
    partitions: list[str] | None = None
    probes: int = Field(default=32, ge=16, multiple_of=8)
    rtol: float = Field(default=0.05, gt=0, lt=1)
    max_products: int | None = Field(default=None, ge=20)


class LayersConfig(BaseModel):
    """The keys of STUDY.toml's section [layers] (see EXAMPLE)."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    matrix: str = "hessian"
    layers: list[str] | None = Field(default=None, min_length=1)
    sharing: str | None = None
    eigenpairs: int | None = Field(default=None, ge=1)
    full: int = Field(default=10, ge=0)
    errors: bool = True
    probes: int | None = Field(default=None, ge=2)


class TrackConfig(BaseModel):
    """The keys of STUDY.toml's section [track] (see EXAMPLE)."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    checkpoints: str | None = Field(default=None, min_length=1)
    measures: list[str] = Field(default=["energies", "eigenvalues"], min_length=1)
    eigenpairs: int = Field(default=5, ge=1)
    learning_rate: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    gaps: bool = False
    processes: int = Field(default=1, ge=1)
    threshold: float = Field(default=0.9, gt=0, le=1)
    optimum: float = Field(default=0.0, allow_inf_nan=False)


class BoundConfig(BaseModel):
    """The keys of STUDY.toml's section [bound] (see EXAMPLE)."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    posteriors: list[str] | None = Field(default=None, min_length=1)
    delta: float = Field(default=0.05, gt=0, lt=1)
    steps: int = Field(default=4000, ge=1)
    minutes: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    loss_bound: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    held_out: str | None = None
    held_out_arguments: dict[str, Any] = Field(default_factory=dict)
    prior: str | None = Field(default=None, min_length=1)


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
    spectrum: SpectrumConfig = Field(default_factory=SpectrumConfig)
    advise: AdviseConfig = Field(default_factory=AdviseConfig)
    layers: LayersConfig = Field(default_factory=LayersConfig)
    track: TrackConfig = Field(default_factory=TrackConfig)
    bound: BoundConfig = Field(default_factory=BoundConfig)


def stored_config(config: StudyConfig, command: str) -> str:
    """JSON of the head and of the command's own section, as results keep it."""
    return json.dumps(config.model_dump(exclude_none=True, exclude=set(SECTIONS) - {command}))


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
        sections: dict[str, type[BaseModel]] = {
            "spectrum": SpectrumConfig,
            "advise": AdviseConfig,
            "layers": LayersConfig,
            "track": TrackConfig,
            "bound": BoundConfig,
        }
        section = sections.get(str(problem["loc"][0]), StudyConfig)
        return f"unknown key {key!r}{nearest(str(problem['loc'][-1]), section.model_fields)}"
    if problem["type"] == "missing":
        return f"the key {key!r} is missing"
    return f"{key} = {problem['input']!r}: {problem['msg'][0].lower()}{problem['msg'][1:]}"
