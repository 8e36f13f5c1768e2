"""Where attention keeps its heads: known types of attention, and those that a user describes.

A type is known by its full name, looked up among the bases of a module's class, so that transformers need not be
there. Each entry was verified by permuting heads in the parameters, which must leave the function unchanged
(tests/partition/test_heads.py); types that merely look alike are not taken in. (Qwen3.5's q_proj, for one, holds a gate
beside each query.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

import numpy as np
from torch import nn

from hesscope.core.checks import nearest, require_positive_int
from hesscope.core.errors import InputError, PartitionError
from hesscope.core.vectors import ParameterSpace
from hesscope.partition.layouts import output_axis, qualified_names
from hesscope.partition.split import SplitTensor, along_axis


@dataclass(frozen=True)
class Heads:
    """How one tensor holds the heads of an attention: equal slices along an axis.

    Attributes:
        count: heads of each role, one number or one for each role (grouped queries: fewer keys than queries).
        roles: what the slices are, in their order along the axis, such as ("query", "key", "value"); or one of them.
        axis: of the weight. A module's bias is cut along with it where this is the axis of its outputs; otherwise it
            is shared by all heads.
        interleaved: False for all heads of the first role, then all of the second; True for all roles of the first
            head, then all of the second.
    """

    count: int | tuple[int, ...]
    roles: str | tuple[str, ...]
    axis: int = 0
    interleaved: bool = False

    def __post_init__(self) -> None:
        roles = (self.roles,) if isinstance(self.roles, str) else tuple(self.roles)
        if not roles or len(set(roles)) != len(roles) or not all(isinstance(role, str) and role for role in roles):
            raise InputError(f"roles must be different names such as ('query', 'key', 'value'), got {self.roles!r}")
        counts = tuple(self.count) if isinstance(self.count, (tuple, list)) else (self.count,) * len(roles)
        for count in counts:
            require_positive_int("count", count)
        if len(counts) != len(roles):
            raise InputError(f"count must be one number or one for each of {len(roles)} roles, got {self.count!r}")
        if self.interleaved and len(set(counts)) > 1:
            raise InputError(f"interleaved heads need one count for all roles, got {self.count!r}")
        if isinstance(self.axis, bool) or not isinstance(self.axis, int) or self.axis < 0:
            raise InputError(f"axis must be 0, 1, ..., got {self.axis!r}")
        object.__setattr__(self, "roles", roles)
        object.__setattr__(self, "count", counts)

    @property
    def slices(self) -> tuple[tuple[str, int], ...]:
        """(role, head) of every slice, in their order along the axis."""
        assert isinstance(self.count, tuple)
        if self.interleaved:
            return tuple((role, head) for head in range(self.count[0]) for role in self.roles)
        return tuple((role, head) for role, count in zip(self.roles, self.count, strict=True) for head in range(count))


Parts = Mapping[str, Heads]
# What a user may say of a module, or of all modules of a class; names are relative to the module.
Description = Heads | Parts | Callable[[nn.Module], Parts]
Descriptions = Mapping[str | type[nn.Module], Description]


@dataclass(frozen=True)
class FoundHeads:
    """The tensors that hold heads, and those of the same attention that all heads share."""

    cuts: dict[str, Heads]
    shared: frozenset[str]


def find_heads(model: nn.Module, space: ParameterSpace, described: Descriptions | None = None) -> FoundHeads:
    """Heads of every attention that is described or known; what is described comes first.

    Raises:
        InputError: a description names what is not there.
        PartitionError: heads do not divide the width of a known attention.
    """
    own = set(space.names)
    names = {id(parameter): name for name, parameter in model.named_parameters() if name in own}
    cuts: dict[str, Heads] = {}
    inside: set[str] = set()
    told = list(_described(model, {} if described is None else described))
    for module, path, heads in [*told, *_known(model, {id(module) for module, _, _ in told})]:
        for parameter, cut in _targets(module, path, heads):
            if id(parameter) in names:  # a frozen one has no place in the vector
                cuts.setdefault(names[id(parameter)], cut)
        inside |= {names[id(parameter)] for parameter in module.parameters() if id(parameter) in names}
    return FoundHeads(cuts, frozenset(inside - set(cuts)))


def split_by_head(name: str, shape: tuple[int, ...], heads: Heads) -> SplitTensor:
    """The tensor cut into its heads, labelled `attn.in_proj_weight[key, head 3]`.

    Raises:
        PartitionError: the tensor has no such axis, or the heads do not divide it.
    """
    if heads.axis >= len(shape):
        raise PartitionError(f"heads of {name}: axis {heads.axis} is not there in shape {shape}")
    width, count = shape[heads.axis], len(heads.slices)
    if width % count:
        assert isinstance(heads.count, tuple)
        counts = " and ".join(f"{n} x {role}" for n, role in zip(heads.count, heads.roles, strict=True))
        raise PartitionError(
            f"heads do not divide the width: {name} has {width} entries along axis {heads.axis} for {counts}"
        )
    labels = tuple(f"{name}[{role}, head {head}]" for role, head in heads.slices)
    runs = np.repeat(np.arange(count, dtype=np.int32), width // count)
    return along_axis(name, shape, heads.axis, labels, runs, f"heads along axis {heads.axis}")


def _described(model: nn.Module, described: Descriptions) -> Iterator[tuple[nn.Module, str, Heads]]:
    """What the user says: names first, for they say more than a class does."""
    if not isinstance(described, Mapping):
        raise InputError(f"heads must be a dict of module or parameter name, or class -> Heads, got {described!r}")
    for key, description in described.items():
        if isinstance(key, str):
            yield from _described_by_name(model, key, description)
        elif not (isinstance(key, type) and issubclass(key, nn.Module)):
            raise InputError(f"heads: a key must be a name or a class of modules, got {key!r}")
    for key, description in described.items():
        if isinstance(key, str):
            continue
        of_class = [(name, module) for name, module in model.named_modules() if isinstance(module, key)]
        if not of_class:
            raise InputError(f"heads: the model has no module of class {key.__name__}")
        for name, module in of_class:
            yield from _relative(module, description, f"{key.__name__} {name!r}")


def _described_by_name(model: nn.Module, key: str, description: Description) -> Iterator[tuple[nn.Module, str, Heads]]:
    target = _attribute(model, key)
    if isinstance(target, nn.Module):
        yield from _relative(target, description, repr(key))
    elif isinstance(target, nn.Parameter):
        owner, _, leaf = key.rpartition(".")
        yield from _relative(model.get_submodule(owner), {leaf: _require_heads(description, repr(key))}, repr(key))
    else:
        names = [*(name for name, _ in model.named_modules() if name), *dict(model.named_parameters())]
        raise InputError(f"heads: no module or parameter is named {key!r}{nearest(key, names)}")


def _relative(module: nn.Module, description: Description, where: str) -> Iterator[tuple[nn.Module, str, Heads]]:
    parts: Any = {"": description} if isinstance(description, Heads) else description
    if callable(parts):
        parts = parts(module)
    if not isinstance(parts, Mapping):
        _require_heads(parts, where)
    for path, heads in parts.items():
        target = _attribute(module, path) if isinstance(path, str) else None
        if target is None or (isinstance(target, nn.Module) and target._parameters.get("weight") is None):
            missing = (
                f"it has no module or parameter {path!r}"
                if target is None
                else f"{path or 'it'} has no weight of its own"
            )
            raise InputError(f"heads of {where}: {missing}")
        yield module, path, _require_heads(heads, where)


def _require_heads(heads: Any, where: str) -> Heads:
    if not isinstance(heads, Heads):
        raise InputError(f"heads of {where} must be Heads(count, roles, axis) or a dict of them, got {heads!r}")
    return heads


def _known(model: nn.Module, told: set[int]) -> Iterator[tuple[nn.Module, str, Heads]]:
    """What is known by type. `told`: ids of modules that the user described; one that is odd in there is theirs."""
    for name, module in model.named_modules():
        known = next((KNOWN[base] for base in qualified_names(module) if base in KNOWN), None)
        if known is None:
            continue
        try:
            parts = known(module, name)
        except PartitionError:
            if any(id(part) in told for part in module.modules()):
                continue
            raise
        for path, heads in parts.items():
            yield module, path, heads


def _attribute(module: nn.Module, path: str) -> nn.Module | nn.Parameter | None:
    """The submodule or parameter of this name; the module itself for ''; None if there is none."""
    if not path:
        return module
    owner, _, leaf = path.rpartition(".")
    parent = _attribute(module, owner)
    if not isinstance(parent, nn.Module):
        return None
    child = parent._modules.get(leaf)
    return parent._parameters.get(leaf) if child is None else child


def _targets(module: nn.Module, path: str, heads: Heads) -> Iterator[tuple[nn.Parameter, Heads]]:
    """The parameters that `heads` of a module's part is about: of a layer, its weight and sometimes its bias."""
    part = _attribute(module, path)
    if isinstance(part, nn.Parameter):
        yield part, heads
    elif part is not None:
        weight, bias = part._parameters.get("weight"), part._parameters.get("bias")
        if weight is not None:
            yield weight, heads
        if bias is not None and heads.axis == output_axis(part):
            yield bias, replace(heads, axis=0)


# --- known types ------------------------------------------------------------------------------------------------------

QUERY, KEY, VALUE, OUTPUT, FUSED = ("query",), ("key",), ("value",), ("output",), ("query", "key", "value")


@dataclass(frozen=True)
class Layout:
    """A known attention: the attribute that holds the width of a head, and each part's roles and axis."""

    width: str
    parts: Mapping[str, tuple[tuple[str, ...], int]]
    interleaved: bool = False

    def __call__(self, module: nn.Module, name: str) -> Parts:
        """Heads of the parts that this module has (a library's older or newer version may have others)."""
        found = {}
        width = int(attrgetter(self.width)(module))
        for path, (roles, axis) in self.parts.items():
            part = _attribute(module, path)
            weight = part._parameters.get("weight") if isinstance(part, nn.Module) else part
            if weight is None:
                continue
            count, rest = divmod(weight.shape[axis], width * len(roles))
            if rest or not count:
                raise PartitionError(
                    f"heads of {name}: a width of {width} ({self.width}) does not divide the {weight.shape[axis]} "
                    f"entries of {path} along axis {axis} into {', '.join(roles)}"
                )
            found[path] = Heads(count, roles, axis, interleaved=self.interleaved and len(roles) > 1)
        return found


def separate(query: str, key: str, value: str, output: str, width: str = "head_dim") -> Layout:
    """One linear layer for each role; grouped queries have fewer keys and values than queries."""
    return Layout(width, {query: (QUERY, 0), key: (KEY, 0), value: (VALUE, 0), output: (OUTPUT, 1)})


def gpt2_layout(module: Any, name: str) -> Parts:
    """GPT-2's layers have weights [in, out]; queries of cross-attention are apart."""
    fused = (
        {"c_attn": (("key", "value"), 1), "q_attn": (QUERY, 1)} if module.is_cross_attention else {"c_attn": (FUSED, 1)}
    )
    return Layout("head_dim", {**fused, "c_proj": (OUTPUT, 0)})(module, name)


def fused_grouped_layout(module: Any, name: str) -> Parts:
    """All queries, then all keys, then all values in one layer, with fewer keys than queries."""
    width, keys = int(module.head_dim), int(module.num_key_value_heads)
    queries, rest = divmod(module.qkv_proj.weight.shape[0] - 2 * keys * width, width)
    if rest or queries < 1:
        raise PartitionError(
            f"heads of {name}: a width of {width} (head_dim) does not divide the {module.qkv_proj.weight.shape[0]} "
            "entries of qkv_proj along axis 0 into query, key, value"
        )
    return {"qkv_proj": Heads((queries, keys, keys), FUSED), "o_proj": Heads(queries, OUTPUT, axis=1)}


def with_sinks(module: Any, name: str) -> Parts:
    """Llama's layers, and one number for each head that takes attention away."""
    return {**LLAMA(module, name), "sinks": Heads(module.sinks.shape[0], ("sink",))}


LLAMA = separate("q_proj", "k_proj", "v_proj", "o_proj")
OPT = separate("q_proj", "k_proj", "v_proj", "out_proj")
BERT = separate("self.query", "self.key", "self.value", "output.dense", width="self.attention_head_size")
INTERLEAVED = {"query_key_value": (FUSED, 0), "dense": (OUTPUT, 1)}
TORCH = {
    "in_proj_weight": (FUSED, 0),
    "in_proj_bias": (FUSED, 0),
    "q_proj_weight": (QUERY, 0),
    "k_proj_weight": (KEY, 0),
    "v_proj_weight": (VALUE, 0),
    "out_proj": (OUTPUT, 1),
}


def _transformers(package: str, name: str) -> str:
    return f"transformers.models.{package}.modeling_{package}.{name}"


KNOWN: dict[str, Callable[[nn.Module, str], Parts]] = {
    "torch.nn.modules.activation.MultiheadAttention": Layout("head_dim", TORCH),
    _transformers("gpt2", "GPT2Attention"): gpt2_layout,
    _transformers("llama", "LlamaAttention"): LLAMA,
    _transformers("mistral", "MistralAttention"): LLAMA,
    _transformers("mixtral", "MixtralAttention"): LLAMA,
    _transformers("qwen2", "Qwen2Attention"): LLAMA,
    _transformers("qwen2_moe", "Qwen2MoeAttention"): LLAMA,
    _transformers("qwen3", "Qwen3Attention"): LLAMA,
    _transformers("qwen3_moe", "Qwen3MoeAttention"): LLAMA,
    _transformers("gemma", "GemmaAttention"): LLAMA,
    _transformers("gemma2", "Gemma2Attention"): LLAMA,
    _transformers("gemma3", "Gemma3Attention"): LLAMA,
    _transformers("granite", "GraniteAttention"): LLAMA,
    _transformers("olmo", "OlmoAttention"): LLAMA,
    _transformers("smollm3", "SmolLM3Attention"): LLAMA,
    _transformers("starcoder2", "Starcoder2Attention"): LLAMA,
    _transformers("gpt_oss", "GptOssAttention"): with_sinks,
    _transformers("vit", "ViTAttention"): LLAMA,
    _transformers("deit", "DeiTAttention"): LLAMA,
    _transformers("dinov2", "Dinov2Attention"): LLAMA,
    _transformers("phi", "PhiAttention"): separate("q_proj", "k_proj", "v_proj", "dense"),
    _transformers("phi3", "Phi3Attention"): fused_grouped_layout,
    _transformers("opt", "OPTAttention"): OPT,
    _transformers("bart", "BartAttention"): OPT,
    _transformers("clip", "CLIPAttention"): OPT,
    _transformers("gpt_neox", "GPTNeoXAttention"): Layout("head_size", INTERLEAVED, interleaved=True),
    _transformers("bloom", "BloomAttention"): Layout("head_dim", INTERLEAVED, interleaved=True),
    _transformers("bert", "BertAttention"): BERT,
    _transformers("roberta", "RobertaAttention"): BERT,
    _transformers("distilbert", "DistilBertSelfAttention"): separate(
        "q_lin", "k_lin", "v_lin", "out_lin", width="attention_head_size"
    ),
}
