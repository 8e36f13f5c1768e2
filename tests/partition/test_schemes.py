"""Each scheme on real modules, against blocks written down by hand.

The parameters of the models here hold their own positions in the flat vector, so that the entries a block should
have can be read off the module itself: `layer.weight[3]` is the list of positions of row 3.
"""

import numpy as np
import pytest
import torch
from torch import nn

import hesscope as hs


def numbered(model):
    """The model with every trainable parameter filled with its entries' positions in the flat vector."""
    start = 0
    with torch.no_grad():
        for parameter in model.double().parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.arange(start, start + parameter.numel()).view(parameter.shape))
                start += parameter.numel()
    return model


def check(partition, blocks, unmatched=()):
    """The partition has exactly these blocks (label -> tensor of positions), in this order."""
    blocks = {label: np.sort(entries.detach().numpy().reshape(-1).astype(int)) for label, entries in blocks.items()}
    assert partition.labels == tuple(blocks)
    assert partition.unmatched == tuple(unmatched)
    assert partition.sizes == tuple(len(entries) for entries in blocks.values())
    assert len(partition) == len(blocks)
    for label, entries in blocks.items():
        assert np.array_equal(partition.indices(label), entries), label
    every = np.concatenate([partition.indices(label) for label in partition.labels])
    assert np.array_equal(np.sort(every), np.arange(partition.size))


def rows(name, weight):
    return {f"{name}[{i}]": weight[i] for i in range(weight.shape[0])}


def columns(name, weight):
    return {f"{name}[:, {j}]": weight[:, j] for j in range(weight.shape[1])}


def mixed():
    """Conv2d, norm, nested linear layers, and a parameter that no submodule owns."""
    model = nn.Sequential()
    model.conv = nn.Conv2d(2, 3, 2)
    model.norm = nn.LayerNorm(3)
    model.head = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2, bias=False))
    model.register_parameter("scale", nn.Parameter(torch.ones(2)))
    return numbered(model)


def test_by_tensor():
    model = mixed()
    check(hs.Partition.by_tensor(model), dict(model.named_parameters()))


def test_by_layer_joins_the_tensors_of_a_module():
    model = mixed()
    check(
        hs.Partition.by_layer(model),
        {
            "scale": model.scale,
            "conv": torch.cat([model.conv.weight.flatten(), model.conv.bias]),
            "norm": torch.cat([model.norm.weight, model.norm.bias]),
            "head.0": torch.cat([model.head[0].weight.flatten(), model.head[0].bias]),
            "head.2": model.head[2].weight,
        },
        unmatched=["scale"],
    )


def test_by_row_cuts_output_channels_and_neurons():
    model = mixed()
    check(
        hs.Partition.by_row(model),
        {
            "scale": model.scale,
            **rows("conv.weight", model.conv.weight),
            "conv.bias": model.conv.bias,
            "norm.weight": model.norm.weight,
            "norm.bias": model.norm.bias,
            **rows("head.0.weight", model.head[0].weight),
            "head.0.bias": model.head[0].bias,
            **rows("head.2.weight", model.head[2].weight),
        },
        unmatched=["scale", "conv.bias", "norm.weight", "norm.bias", "head.0.bias"],
    )


def test_by_column_cuts_input_channels_and_neurons():
    model = mixed()
    check(
        hs.Partition.by_column(model),
        {
            "scale": model.scale,
            **columns("conv.weight", model.conv.weight),
            "conv.bias": model.conv.bias,
            "norm.weight": model.norm.weight,
            "norm.bias": model.norm.bias,
            **columns("head.0.weight", model.head[0].weight),
            "head.0.bias": model.head[0].bias,
            **columns("head.2.weight", model.head[2].weight),
        },
        unmatched=["scale", "conv.bias", "norm.weight", "norm.bias", "head.0.bias"],
    )


def test_a_model_that_is_one_module_has_single_blocks():
    model = numbered(nn.Linear(3, 2))
    check(hs.Partition.by_layer(model), dict(model.named_parameters()), unmatched=["weight", "bias"])
    check(hs.Partition.by_row(model), {**rows("weight", model.weight), "bias": model.bias}, unmatched=["bias"])


def test_rows_of_an_embedding_are_tokens():
    model = numbered(nn.Sequential(nn.Embedding(5, 3)))
    check(hs.Partition.by_row(model), rows("0.weight", model[0].weight))
    check(hs.Partition.by_column(model), columns("0.weight", model[0].weight))


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [(nn.ConvTranspose1d, (2, 3, 2)), (nn.ConvTranspose2d, (2, 3, 2)), (nn.ConvTranspose3d, (2, 3, 1))],
)
def test_transposed_convolutions_have_their_input_axis_first(kind, sizes):
    model = numbered(nn.Sequential(kind(*sizes)))
    weight, bias = model[0].weight, model[0].bias
    by_output = {**columns("0.weight", weight), "0.bias": bias}
    by_input = {**rows("0.weight", weight), "0.bias": bias}
    check(hs.Partition.by_row(model), by_output, unmatched=["0.bias"])
    check(hs.Partition.by_column(model), by_input, unmatched=["0.bias"])


def test_grouped_convolutions_have_one_column_per_input_channel():
    """Group g of the outputs reads group g of the inputs: the weight's second axis alone does not name an input."""
    model = numbered(nn.Sequential(nn.Conv2d(4, 6, 1, groups=2, bias=False)))
    partition = hs.Partition.by_column(model)
    by_group = model[0].weight.view(2, 3, 2)  # group, output in the group, input in the group
    inputs = [by_group[channel // 2, :, channel % 2] for channel in range(4)]
    assert partition.sizes == (3, 3, 3, 3)
    for label, entries in zip(partition.labels, inputs, strict=True):
        assert np.array_equal(partition.indices(label), entries.detach().numpy().astype(int))


def test_norms_have_no_rows_whatever_their_shape():
    model = numbered(nn.Sequential(nn.LayerNorm((2, 3))))
    check(hs.Partition.by_row(model), dict(model.named_parameters()), unmatched=["0.weight", "0.bias"])


def test_frozen_parameters_are_no_part_of_the_vector():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    model[0].weight.requires_grad_(False)
    numbered(model)
    check(
        hs.Partition.by_row(model),
        {"0.bias": model[0].bias, **rows("1.weight", model[1].weight), "1.bias": model[1].bias},
        unmatched=["0.bias", "1.bias"],
    )


def test_tied_parameters_are_one_block():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    check(hs.Partition.by_tensor(numbered(model)), {"0.weight": model[0].weight})


# --- attention heads --------------------------------------------------------------------------------------------------

WIDTH, HEADS = 6, 2
HEAD = WIDTH // HEADS


def heads(name, tensor, roles):
    """Blocks of a stacked projection: roles one after the other, each head by head."""
    keys = [f"{name}[{role}, head {head}]" for role in roles for head in range(HEADS)]
    return dict(zip(keys, torch.split(tensor, HEAD), strict=True))


def output_heads(name, weight):
    return {f"{name}[output, head {head}]": weight[:, head * HEAD : (head + 1) * HEAD] for head in range(HEADS)}


QKV = ("query", "key", "value")


def test_by_head_of_a_stacked_projection():
    model = numbered(nn.ModuleDict({"norm": nn.LayerNorm(WIDTH), "attn": nn.MultiheadAttention(WIDTH, HEADS)}))
    attn = model["attn"]
    check(
        hs.Partition.by_head(model),
        {
            "norm.weight": model["norm"].weight,
            "norm.bias": model["norm"].bias,
            **heads("attn.in_proj_weight", attn.in_proj_weight, QKV),
            **heads("attn.in_proj_bias", attn.in_proj_bias, QKV),
            **output_heads("attn.out_proj.weight", attn.out_proj.weight),
            "attn.out_proj.bias": attn.out_proj.bias,
        },
        unmatched=["norm.weight", "norm.bias", "attn.out_proj.bias"],
    )


def test_by_head_of_separate_projections():
    """Keys and values of other widths than the queries; extra key and value rows belong to no head."""
    attn = numbered(nn.MultiheadAttention(WIDTH, HEADS, kdim=4, vdim=5, add_bias_kv=True))
    check(
        hs.Partition.by_head(attn),
        {
            **heads("q_proj_weight", attn.q_proj_weight, ["query"]),
            **heads("k_proj_weight", attn.k_proj_weight, ["key"]),
            **heads("v_proj_weight", attn.v_proj_weight, ["value"]),
            **heads("in_proj_bias", attn.in_proj_bias, QKV),
            "bias_k": attn.bias_k,
            "bias_v": attn.bias_v,
            **output_heads("out_proj.weight", attn.out_proj.weight),
            "out_proj.bias": attn.out_proj.bias,
        },
        unmatched=["bias_k", "bias_v", "out_proj.bias"],
    )


def test_a_name_alone_makes_no_attention():
    """'in_proj_weight' of another module is no projection of heads."""
    model = nn.Module()
    model.register_parameter("in_proj_weight", nn.Parameter(torch.zeros(18, WIDTH)))
    check(hs.Partition.by_head(numbered(model)), dict(model.named_parameters()), unmatched=["in_proj_weight"])


def test_heads_are_what_the_module_computes_with():
    """Zeroing the query, key, value and output blocks of head 1 leaves exactly what head 0 alone contributes."""
    torch.manual_seed(0)
    attn = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, bias=False).double().eval()
    x = torch.randn(2, 4, WIDTH, dtype=torch.float64)
    p = hs.Partition.by_head(attn)
    space = hs.ParameterSpace.of(attn)
    theta = space.flatten({name: tensor.detach() for name, tensor in attn.named_parameters()})
    for label in p.labels:
        if "head 1" in label:
            theta[p.indices(label)] = 0.0
    alone, _ = torch.func.functional_call(attn, space.unflatten(theta), (x, x, x))
    q, k, v = (x @ weight[:HEAD].T for weight in attn.in_proj_weight.chunk(3))
    head_0 = (q @ k.transpose(1, 2) / HEAD**0.5).softmax(dim=-1) @ v
    assert torch.allclose(alone, head_0 @ attn.out_proj.weight[:, :HEAD].T, rtol=1e-12)


def test_no_trainable_parameter():
    with pytest.raises(hs.HesscopeError, match="no trainable parameter"):
        hs.Partition.by_row(nn.ReLU())
