"""Heads are what the network computes with: permuting them in the parameters permutes blocks and nothing else."""

import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import hesscope as hs
from hesscope.core.errors import InputError, PartitionError
from hesscope.partition import Heads
from hesscope.partition.attention import KNOWN, qualified_names
from tests.helpers import randn, randomized
from tests.partition.models import CAUSAL, KEYS, OTHERS, QUERIES, VISION, WIDTH, Block, build

FUSED = ("query", "key", "value")
OWN = {Block: {"qkv": Heads(QUERIES, FUSED), "project": Heads(QUERIES, "output", axis=1)}}
OWN_INTERLEAVED = {Block: {**OWN[Block], "qkv": Heads(QUERIES, FUSED, interleaved=True)}}
DESCRIBED = {"own": OWN, "own, interleaved": OWN_INTERLEAVED}
WITH_HEADS = [*CAUSAL, *VISION, *(name for name in OTHERS if name != "resnet")]

LABEL = re.compile(r"(.*)\[(\w+), head (\d+)\]")


def cut(model, name):
    return hs.Partition.by_head(model, heads=DESCRIBED.get(name))


def roles_of(partition):
    return sorted({match[2] for match in map(LABEL.fullmatch, partition.labels) if match})


def permuted(theta, partition, roles):
    """Heads of these roles moved: groups of queries that share a key are rotated, and reversed within."""
    counts = {}
    found = [match.groups() for match in map(LABEL.fullmatch, partition.labels) if match]
    for tensor, role, head in found:
        counts[tensor, role] = max(counts.get((tensor, role), 0), int(head) + 1)
    keys = min(counts.values())
    moved = theta.clone()
    for tensor, role, head in found:
        if role in roles:
            each = counts[tensor, role] // keys
            group, place = divmod(int(head), each)
            there = (group + 1) % keys * each + (each - 1 - place)
            source, target = (partition.indices(f"{tensor}[{role}, head {h}]") for h in (int(head), there))
            moved[torch.from_numpy(target)] = theta[torch.from_numpy(source)]
    return moved


@torch.no_grad()
def output_at(model, theta):
    vector_to_parameters(theta, model.parameters())
    return model()


@pytest.mark.parametrize("name", WITH_HEADS)
def test_permuting_heads_permutes_blocks_and_nothing_else(name):
    model = build(name)
    partition = cut(model, name)
    theta = parameters_to_vector(model.parameters()).detach()
    roles = roles_of(partition)
    assert {"query", "key", "value", "output"} <= set(roles)
    before = output_at(model, theta)
    scale = float(before.abs().max())
    moved = permuted(theta, partition, roles)
    assert not torch.equal(moved, theta)
    assert float((output_at(model, moved) - before).abs().max()) < 1e-12 * scale
    for role in roles:  # each role's blocks are needed: the identity above says something about every one
        partly = permuted(theta, partition, [other for other in roles if other != role])
        assert float((output_at(model, partly) - before).abs().max()) > 1e-6 * scale, role


def gradient_without(model, partition, roles, theta):
    """Gradient at the parameters with these roles' blocks set to zero, and its norm role by role."""
    members = {role: [] for role in roles_of(partition)}
    for label in partition.labels:
        if match := LABEL.fullmatch(label):
            members[match[2]].append(torch.from_numpy(partition.indices(label)))
    places = {role: torch.cat(own) for role, own in members.items()}
    changed = theta.clone()
    for role in roles:
        changed[places[role]] = 0.0
    vector_to_parameters(changed, model.parameters())
    outputs = model()
    value = (outputs * torch.linspace(-1, 1, outputs.numel(), dtype=outputs.dtype).view_as(outputs)).sum()
    parts = torch.autograd.grad(value, list(model.parameters()), materialize_grads=True)
    gradient = torch.cat([part.reshape(-1) for part in parts])
    return {role: float(gradient[place].norm()) for role, place in places.items()}, gradient


# Without rotated positions, one vector added to all keys shifts all scores of a query alike: nothing changes.
UNROTATED = ("gpt2", "opt", "bert", "roberta", "distilbert", "vit", "deit", "dinov2", "clip", "encoder", "bart", "own")


@pytest.mark.parametrize("name", WITH_HEADS)
def test_roles_are_what_their_names_say(name):
    model = build(name)
    partition = cut(model, name)
    theta = parameters_to_vector(model.parameters()).detach()
    present, gradient = gradient_without(model, partition, [], theta)
    assert min(present.values()) > 0
    tiny = 1e-12 * float(gradient.norm())
    values, _ = gradient_without(model, partition, ["value"], theta)
    assert max(values["query"], values["key"]) <= tiny < values["value"]  # nothing to attend to
    queries, _ = gradient_without(model, partition, ["query"], theta)
    assert queries["key"] <= tiny < min(queries["query"], queries["value"])  # every key is as good
    outputs, _ = gradient_without(model, partition, ["output"], theta)
    assert max(outputs["query"], outputs["key"], outputs["value"]) <= tiny < outputs["output"]  # nothing is passed on
    if name in UNROTATED:
        biases = {
            role: torch.cat([gradient[torch.from_numpy(partition.indices(label))] for label in partition.labels
                             if f"bias[{role}, " in label])
            for role in ("query", "key")
        }  # fmt: skip
        assert float(biases["key"].norm()) <= 1e-9 * float(biases["query"].norm())


def test_every_known_type_is_permuted():
    """No entry of the table goes without the proof above."""
    bases = {base for name in WITH_HEADS for module in build(name).modules() for base in qualified_names(module)}
    assert set(KNOWN) <= bases


def test_grouped_queries_have_fewer_keys():
    partition = cut(build("llama"), "llama")
    attention = "network.model.layers.0.self_attn"
    heads = {role: [x for x in partition.labels if x.startswith(f"{attention}.{role}_proj")] for role in "qkvo"}
    assert {role: len(own) for role, own in heads.items()} == {"q": QUERIES, "k": KEYS, "v": KEYS, "o": QUERIES}
    assert heads["k"] == [f"{attention}.k_proj.weight[key, head {head}]" for head in range(KEYS)]
    assert f"{attention}.o_proj.weight[output, head 3]" in heads["o"]


def test_gpt2_heads_lie_along_the_other_axis():
    """Conv1D stores [in, out]: queries, keys and values are columns, and the output's heads are rows."""
    model = build("gpt2").network
    partition = hs.Partition.by_head(model)
    attention, name, start = model.transformer.h[0].attn, "transformer.h.0.attn", {}
    position = 0
    for parameter_name, parameter in model.named_parameters():
        start[parameter_name] = position
        position += parameter.numel()
    head = WIDTH // QUERIES
    grid = np.arange(attention.c_attn.weight.numel()).reshape(WIDTH, 3 * WIDTH) + start[f"{name}.c_attn.weight"]
    key = grid[:, WIDTH + head : WIDTH + 2 * head]
    assert np.array_equal(partition.indices(f"{name}.c_attn.weight[key, head 1]"), key.reshape(-1))
    bias = np.arange(2 * WIDTH, 2 * WIDTH + head) + start[f"{name}.c_attn.bias"]
    assert np.array_equal(partition.indices(f"{name}.c_attn.bias[value, head 0]"), bias)
    grid = np.arange(WIDTH * WIDTH).reshape(WIDTH, WIDTH) + start[f"{name}.c_proj.weight"]
    output = grid[2 * head : 3 * head]
    assert np.array_equal(partition.indices(f"{name}.c_proj.weight[output, head 2]"), output.reshape(-1))
    assert f"{name}.c_proj.bias" in partition.unmatched


def test_transformers_need_not_be_imported():
    """A type is known by its full name among the bases of the module's class."""
    base = type("LlamaAttention", (nn.Module,), {"__module__": "transformers.models.llama.modeling_llama"})
    attention = type("Mine", (base,), {"__module__": "mine"})()
    attention.head_dim = 2
    for name, rows in (("q_proj", 4), ("k_proj", 2), ("v_proj", 2)):
        setattr(attention, name, nn.Linear(3, rows, bias=False))
    labels = hs.Partition.by_head(attention).labels
    assert labels == (
        "q_proj.weight[query, head 0]",
        "q_proj.weight[query, head 1]",
        "k_proj.weight[key, head 0]",
        "v_proj.weight[value, head 0]",
    )


def test_block_energies_are_permuted_too():
    model = randomized(nn.MultiheadAttention(4, 2, batch_first=True), seed=3)
    x = randn(2, 3, 4, seed=0)

    def loss(model, batch):
        return (model(*batch, need_weights=False)[0] ** 3).sum(), 2

    partition = hs.Partition.by_head(model)
    before = hs.block_energies(hs.Hessian(hs.Objective(model, loss, [(x, x, x)])), partition, method="exact").values
    theta = parameters_to_vector(model.parameters()).detach()
    vector_to_parameters(permuted(theta, partition, roles_of(partition)), model.parameters())
    after = hs.block_energies(hs.Hessian(hs.Objective(model, loss, [(x, x, x)])), partition, method="exact").values
    swap = [
        partition.labels.index(re.sub(r"head (\d)", lambda m: f"head {1 - int(m[1])}", x)) for x in partition.labels
    ]
    assert np.allclose(after, before[np.ix_(swap, swap)], rtol=1e-9, atol=1e-9 * before.max())
    assert not np.allclose(after, before, rtol=1e-3)


# --- attention of one's own -------------------------------------------------------------------------------------------


def stack():
    return build("own").network


def test_a_class_a_name_and_a_function_say_the_same():
    model = stack()
    parts = OWN[Block]
    by_name = {f"blocks.{i}.{path}": heads for i in range(2) for path, heads in parts.items()}
    ways = [
        OWN,
        by_name,
        {"blocks.0": parts, "blocks.1": parts},
        {Block: lambda module: {"qkv": Heads(module.norm.weight.numel() // 4, FUSED), "project": parts["project"]}},
        {"blocks.0": parts, Block: {**parts, "qkv": Heads(QUERIES, ["query", "key", "value"])}},
    ]
    first, *others = (hs.Partition.by_head(model, heads=heads) for heads in ways)
    assert "blocks.1.qkv.bias[key, head 3]" in first.labels
    assert "blocks.1.project.bias" in first.unmatched
    for other in others:
        assert other.labels == first.labels
        assert np.array_equal(other.assignment, first.assignment)


def test_a_name_says_more_than_a_class():
    partition = hs.Partition.by_head(stack(), heads={**OWN, "blocks.0.project": Heads(2, "output", axis=1)})
    assert "blocks.0.project.weight[output, head 2]" not in partition.labels
    assert "blocks.1.project.weight[output, head 3]" in partition.labels


def test_a_parameter_can_be_described_alone():
    partition = hs.Partition.by_head(stack(), heads={"blocks.0.qkv.weight": Heads(QUERIES, FUSED)})
    assert "blocks.0.qkv.weight[value, head 3]" in partition.labels
    assert "blocks.0.qkv.bias" in partition.unmatched


def test_a_description_comes_before_what_is_known():
    model = nn.MultiheadAttention(WIDTH, QUERIES)
    partition = hs.Partition.by_head(model, heads={"in_proj_weight": Heads(2, FUSED)})
    assert partition.sizes[: 2 * 3] == (WIDTH * WIDTH // 2,) * 6
    assert "in_proj_bias[query, head 3]" in partition.labels


def test_different_counts_of_different_roles():
    partition = hs.Partition.by_head(stack(), heads={"blocks.0.qkv": Heads((8, 2, 2), FUSED)})
    assert [x for x in partition.labels if "qkv.weight[key" in x] == [
        f"blocks.0.qkv.weight[key, head {head}]" for head in range(2)
    ]


def test_frozen_heads_have_no_place():
    model = stack()
    model.blocks[0].qkv.weight.requires_grad_(False)
    labels = hs.Partition.by_head(model, heads=OWN).labels
    assert not any(label.startswith("blocks.0.qkv.weight") for label in labels)
    assert "blocks.0.qkv.bias[query, head 0]" in labels


WRONG = {
    "an unknown name": (
        {"blocks.0.qvk": Heads(4, FUSED)},
        InputError,
        "no module or parameter is named 'blocks.0.qvk', did you mean 'blocks.0.qkv'?",
    ),
    "an unknown class": ({nn.Conv2d: Heads(4, FUSED)}, InputError, "the model has no module of class Conv2d"),
    "an unknown part": (
        {Block: {"query": Heads(4, "query")}},
        InputError,
        "heads of Block 'blocks.0': it has no module or parameter 'query'",
    ),
    "a part that is no name": ({Block: {0: Heads(4, "query")}}, InputError, "it has no module or parameter 0"),
    "a module without weight": ({"blocks.0": Heads(4, FUSED)}, InputError, "it has no weight of its own"),
    "a number": ({"blocks.0.qkv": 4}, InputError, "heads of 'blocks.0.qkv' must be Heads(count, roles, axis)"),
    "a number inside": ({Block: {"qkv": 4}}, InputError, "must be Heads(count, roles, axis) or a dict of them, got 4"),
    "a key": ({3: Heads(4, FUSED)}, InputError, "a key must be a name or a class of modules, got 3"),
    "no dict": ([Heads(4, FUSED)], InputError, "heads must be a dict"),
    "heads that do not divide": (
        {Block: {"qkv": Heads(5, FUSED)}},
        PartitionError,
        "heads do not divide the width: blocks.0.qkv.weight has 48 entries along axis 0 for 5 x query and 5 x key",
    ),
    "an axis": ({"blocks.0.norm": Heads(4, "query", axis=1)}, PartitionError, "axis 1 is not there in shape (16,)"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_descriptions(name):
    heads, error, message = WRONG[name]
    with pytest.raises(error, match=re.escape(message)) as raised:
        hs.Partition.by_head(stack(), heads=heads)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"count": 0, "roles": "query"}, "count must be a positive integer, got 0"),
        ({"count": 2.0, "roles": "query"}, "count must be a positive integer, got 2.0"),
        ({"count": (2, 1), "roles": FUSED}, "count must be one number or one for each of 3 roles"),
        ({"count": 2, "roles": ()}, "roles must be different names"),
        ({"count": 2, "roles": ("query", "query")}, "roles must be different names"),
        ({"count": (2, 1, 1), "roles": FUSED, "interleaved": True}, "interleaved heads need one count"),
        ({"count": 2, "roles": "query", "axis": -1}, "axis must be 0, 1, ..., got -1"),
    ],
)
def test_wrong_heads(arguments, message):
    with pytest.raises(InputError, match=re.escape(message)):
        Heads(**arguments)


def test_a_known_attention_whose_heads_do_not_divide_its_width():
    model = nn.Sequential(nn.MultiheadAttention(6, 2))
    model[0].head_dim = 4
    with pytest.raises(PartitionError, match=r"heads of 0: a width of 4 \(head_dim\) does not divide the 18 entries"):
        hs.Partition.by_head(model)
    assert "part" not in hs.Partition.by_row(model).levels  # other schemes do not need its heads
    described = hs.Partition.by_head(model, heads={"0": {"in_proj_weight": Heads(1, FUSED)}})
    assert described.labels[:3] == tuple(f"0.in_proj_weight[{role}, head 0]" for role in FUSED)


def test_a_model_without_attention_is_refused_with_what_it_has():
    message = (
        "by head: this model has no attention heads that can be told, it has Linear (2 tensors, 6 parameters), "
        "LayerNorm (2 tensors, 4 parameters); describe an attention of your own with heads={...}"
    )
    with pytest.raises(PartitionError, match=re.escape(message)) as raised:
        hs.Partition.by_head(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)))
    assert "\n" not in str(raised.value)


def test_a_tied_embedding_is_one_block():
    model = stack()
    partition = hs.Partition.by_head(model, heads=OWN)
    assert [label for label in partition.labels if "embed" in label or "head." in label] == ["embed.weight"]
    assert partition.size == sum(p.numel() for p in model.parameters())
