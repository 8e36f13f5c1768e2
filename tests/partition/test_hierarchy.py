"""Levels above the blocks: groups that can be aggregated, partitions made of them, and how tensors are cut."""

import re

import numpy as np
import pytest
import torch
from torch import nn

import hesscope as hs
from hesscope.core.errors import InputError, PartitionError
from hesscope.partition import Cut
from tests.partition.models import KEYS, NAMES, QUERIES, WIDTH, build

FINE = ("by_row", "by_column", "by_head")
COARSER = {"tensor": "by_tensor", "layer": "by_layer", "module": "by_module"}


def partitions(name, schemes):
    network = build(name).network
    headless = name in ("own", "own, interleaved", "resnet")
    return network, [getattr(hs.Partition, s)(network) for s in schemes if not (s == "by_head" and headless)]


def same(a, b):
    return a.labels == b.labels and np.array_equal(a.assignment, b.assignment)


@pytest.mark.parametrize("name", NAMES)
def test_groups_hold_every_block_once(name):
    _, found = partitions(name, FINE)
    for partition in found:
        size_of = dict(zip(partition.labels, partition.sizes, strict=True))
        for level in partition.levels:
            groups = partition.groups(level)
            together = [label for group in groups.values() for label in group]
            assert sorted(together) == sorted(partition.labels)
            coarse = partition.coarsened(level)
            assert coarse.labels == tuple(groups)
            assert coarse.sizes == tuple(sum(size_of[label] for label in group) for group in groups.values())


@pytest.mark.parametrize("name", NAMES)
def test_coarsened_rows_are_tensors_layers_and_modules(name):
    network, found = partitions(name, FINE)
    for level, scheme in COARSER.items():
        expected = getattr(hs.Partition, scheme)(network)
        for partition in found:
            coarse = partition.coarsened(level)
            assert same(coarse, expected), (level, partition.scheme)
            assert coarse.unmatched == ()


@pytest.mark.parametrize("name", ["llama", "gpt2", "encoder", "gpt_neox", "phi3"])
def test_parts_are_heads_where_rows_lie_in_one(name):
    """The heads of queries, keys and values are made of rows, those of the output of columns; and the reverse."""
    network = build(name).network
    heads = hs.Partition.by_head(network)
    rows, columns = hs.Partition.by_row(network).groups("part"), hs.Partition.by_column(network).groups("part")
    of = {label: re.search(r"\[(query|key|value|output), head", label) for label in heads.labels}
    inputs = {label for label, match in of.items() if match and match[1] != "output" and "bias" not in label}
    outputs = {label for label, match in of.items() if match and match[1] == "output"}
    assert inputs <= set(rows)
    assert outputs <= set(columns)
    assert not outputs & set(rows)
    assert not inputs & set(columns)
    coarse = hs.Partition.by_row(network).coarsened("part")
    for label in inputs:
        assert np.array_equal(coarse.indices(label), heads.indices(label))


def test_rows_of_a_head():
    groups = hs.Partition.by_row(build("llama").network).groups("part")
    key = "model.layers.1.self_attn.k_proj.weight"
    width = WIDTH // QUERIES
    assert groups[f"{key}[key, head 1]"] == tuple(f"{key}[{row}]" for row in range(width, 2 * width))
    assert sum(label.startswith(key) for label in groups) == KEYS


def test_parts_are_experts_and_groups_of_convolutions():
    groups = hs.Partition.by_row(build("mixtral").network).groups("part")
    experts = "model.layers.0.mlp.experts.down_proj"
    assert groups[f"{experts}[2]"] == tuple(f"{experts}[2, {row}]" for row in range(WIDTH))
    model = nn.Sequential(nn.Conv2d(4, 6, 1, groups=2, bias=False))
    for scheme, blocks in (
        (hs.Partition.by_row, ("0.weight[3]", "0.weight[4]", "0.weight[5]")),
        (hs.Partition.by_column, ("0.weight[group 1, :, 0]", "0.weight[group 1, :, 1]")),
    ):
        assert scheme(model).groups("part")["0.weight[group 1]"] == blocks


def test_levels_are_coarser_than_the_blocks():
    network = build("llama").network
    assert hs.Partition.by_row(network).levels == ("module", "layer", "tensor", "part", "block")
    assert hs.Partition.by_head(network).levels == ("module", "layer", "tensor", "block")
    assert hs.Partition.by_layer(build("own").network).levels == ("module", "block")
    assert hs.Partition.by_layer(nn.Sequential(nn.Linear(2, 2))).levels == ("block",)


def test_a_level_that_is_as_fine_as_the_blocks_can_still_be_named():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    tensors = hs.Partition.by_tensor(model)
    assert tensors.levels == ("block",)
    assert tensors.groups("layer") == {"0": ("0.weight",), "1": ("1.weight",)}
    assert tensors.coarsened("block") is tensors


def test_paths():
    partition = hs.Partition.by_row(build("gpt2").network)
    name = "transformer.h.1.attn.c_attn.weight"
    assert partition.path(f"{name}[:, 20]") == {
        "module": "transformer.h.1",
        "layer": "transformer.h.1.attn.c_attn",
        "tensor": name,
        "part": f"{name}[key, head 1]",
        "block": f"{name}[:, 20]",
    }


def test_groups_are_what_energies_aggregate():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    matrix = torch.randn(26, 26, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows = hs.Partition.by_row(model)
    energies = hs.block_energies(matrix + matrix.T, rows, method="exact")
    for level in rows.levels:
        coarse = rows.coarsened(level)
        found = energies.aggregate(rows.groups(level))
        direct = hs.block_energies(matrix + matrix.T, coarse, method="exact")
        assert (found.labels, found.sizes) == (direct.labels, direct.sizes)
        assert np.allclose(found.values, direct.values, rtol=1e-12)


# --- blocks chosen by hand --------------------------------------------------------------------------------------------


def mlp():
    return nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2, bias=False))


def test_hand_made_blocks_have_the_levels_that_make_sense():
    across = hs.Partition.from_blocks({"a": ["0.weight", ("1.weight", 0)], "b": ["0.bias", ("1.weight", 1)]}, mlp())
    assert across.levels == ("block",)
    within = hs.Partition.from_blocks({"a": ["0.weight", "0.bias"], "b": ("1.weight", 0), "c": ("1.weight", 1)}, mlp())
    assert within.levels == ("module", "layer", "block")
    assert within.groups("layer") == {"0": ("a",), "1": ("b", "c")}
    with pytest.raises(InputError, match=re.escape("level must be one that this partition has, 'module', 'layer', ")):
        within.groups("tensor")


def test_blocks_made_of_positions_alone():
    partition = hs.Partition.from_blocks({"a": range(4), "b": range(4, 15)})
    assert partition.levels == ("block",)
    with pytest.raises(InputError, match=r"pass model=\.\.\. to from_blocks"):
        partition.coarsened("layer")
    with pytest.raises(PartitionError, match=r"coverage\(\) needs the tensors' names: pass model"):
        partition.coverage()
    with pytest.raises(PartitionError, match=r"cuts\(\) needs the tensors' names: pass model"):
        partition.cuts()


def test_an_unknown_level():
    with pytest.raises(InputError, match=r"level must be one that this partition has, .*'block', got 'rows'"):
        hs.Partition.by_row(mlp()).groups("rows")


# --- cuts -------------------------------------------------------------------------------------------------------------


def rebuilt(shape, cut):
    """Numbers of the slices that a cut says, in the tensor's shape."""
    line = np.repeat(np.arange(cut.count), cut.block_size)
    return np.broadcast_to(line.reshape([-1 if axis == cut.axis else 1 for axis in range(len(shape))]), shape)


@pytest.mark.parametrize("name", NAMES)
def test_cuts_say_the_blocks(name):
    """Slices of the stated size along the stated axis are exactly the blocks; none only where no axis does."""
    network, found = partitions(name, (*FINE, *COARSER.values()))
    for partition in found:
        cuts = partition.cuts()
        start = 0
        assert list(cuts) == [name for name, _ in network.named_parameters()]
        for parameter_name, parameter in network.named_parameters():
            own = partition.assignment[start : start + parameter.numel()].reshape(parameter.shape)
            start += parameter.numel()
            cut = cuts[parameter_name]
            if cut is None:
                is_expert = parameter.ndim == 3 and "experts" in parameter_name
                assert is_expert or "conv2.weight" in parameter_name
                continue
            assert cut.count * cut.block_size == parameter.shape[cut.axis]
            pairs = np.unique(np.stack([rebuilt(parameter.shape, cut).reshape(-1), own.reshape(-1)]), axis=1)
            assert pairs.shape[1] == cut.count == np.unique(own).size


CUTS = {
    "rows": (hs.Partition.by_row, "model.layers.0.self_attn.q_proj.weight", Cut(0, 1, WIDTH)),
    "columns": (hs.Partition.by_column, "model.layers.0.self_attn.k_proj.weight", Cut(1, 1, WIDTH)),
    "heads": (hs.Partition.by_head, "model.layers.0.self_attn.k_proj.weight", Cut(0, WIDTH // QUERIES, KEYS)),
    "outputs of heads": (
        hs.Partition.by_head,
        "model.layers.0.self_attn.o_proj.weight",
        Cut(1, WIDTH // QUERIES, QUERIES),
    ),
    "a tensor": (hs.Partition.by_tensor, "model.layers.0.self_attn.k_proj.weight", Cut(0, WIDTH // 2, 1)),
    "with others": (hs.Partition.by_module, "model.norm.weight", Cut(0, WIDTH, 1)),
}


@pytest.mark.parametrize("name", CUTS)
def test_cuts(name):
    scheme, parameter, cut = CUTS[name]
    assert scheme(build("llama").network).cuts()[parameter] == cut


def test_what_is_no_equal_slices():
    def cut(index, others):
        return hs.Partition.from_blocks({"a": ("0.weight", index), "b": others}, mlp()).cuts()["0.weight"]

    rest = ["0.bias", "1.weight"]
    assert cut(slice(0, 1), [("0.weight", slice(1, 3)), *rest]) is None  # slices of 1 and 2
    assert cut([0, 2], [("0.weight", 1), *rest]) is None  # a block in two pieces
    assert cut(([0, 1, 2], [0, 0, 1]), [("0.weight", ([0, 1, 2], [1, 1, 0])), *rest]) is None  # along no axis
    assert cut((slice(None), 0), [("0.weight", (slice(None), 1)), *rest]) == Cut(1, 1, 2)


def test_a_number_is_one_slice():
    model = nn.Module()
    model.scale = nn.Parameter(torch.tensor(1.0))
    assert hs.Partition.by_tensor(model).cuts() == {"scale": Cut(0, 1, 1)}


# --- coverage ---------------------------------------------------------------------------------------------------------


def test_coverage_by_type_of_module():
    coverage = hs.Partition.by_head(nn.TransformerEncoderLayer(4, 2, 6)).coverage()
    found = {(row.module, row.matched): row for row in coverage.rows}
    attention = found["MultiheadAttention", True]
    assert (attention.tensors, attention.parameters, attention.blocks) == (2, 48 + 12, 12)
    output = found["NonDynamicallyQuantizableLinear", True]
    assert (output.tensors, output.parameters, output.blocks, output.outcome) == (1, 16, 2, "heads along axis 1")
    linear = found["Linear", False]
    assert (linear.tensors, linear.parameters, linear.blocks) == (4, 2 * 24 + 6 + 4, 4)
    assert linear.outcome == "in no attention that by_head knows"
    assert found["NonDynamicallyQuantizableLinear", False].outcome == "shared by all heads"
    assert (coverage.parameters, coverage.blocks) == (76 + 4 + 58 + 16, 12 + 2 + 1 + 4 + 4)
    assert coverage.matched == pytest.approx(76 / coverage.parameters)


@pytest.mark.parametrize("name", NAMES)
def test_coverage_counts_everything_once(name):
    network, found = partitions(name, (*FINE, *COARSER.values()))
    for partition in found:
        coverage = partition.coverage()
        assert sum(row.parameters for row in coverage.rows) == coverage.parameters == partition.size
        assert sum(row.tensors for row in coverage.rows) == sum(1 for _ in network.parameters())
        unmatched = sum(row.blocks for row in coverage.rows if not row.matched)
        assert unmatched == len(partition.unmatched)
        assert coverage.blocks == len(partition)


def test_the_printed_table():
    model = nn.Sequential(nn.Linear(100, 60), nn.LayerNorm(60))
    assert str(hs.Partition.by_row(model).coverage()) == (
        "by row: 6,180 parameters in 63 blocks, 97.1% of the parameters split as asked\n"
        "module     tensors  parameters  blocks  split  how, or why not\n"
        "Linear           1       6,000      60  yes    along axis 0\n"
        "Linear           1          60       1  no     a vector\n"
        "LayerNorm        2         120       2  no     a norm"
    )


def test_coverage_of_coarsened_and_hand_made_partitions():
    partition = hs.Partition.by_row(mlp())
    coarse = partition.coarsened("layer").coverage()
    assert coarse.scheme == "by row, coarsened to layer"
    assert coarse.matched == 1
    by_hand = hs.Partition.from_blocks({"a": "0.weight", "b": ["0.bias", "1.weight"]}, mlp()).coverage()
    assert [(row.module, row.blocks, row.outcome) for row in by_hand.rows] == [("Linear", 2, "by hand")]
