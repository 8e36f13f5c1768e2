"""Each scheme on real modules, against blocks written down by hand.

The parameters of the models here hold their own positions in the flat vector, so that the entries a block should
have can be read off the module itself: `layer.weight[3]` is the list of positions of row 3.
"""

import re
from importlib import import_module
from time import process_time

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import hesscope as hs
from hesscope.core.errors import PartitionError
from hesscope.partition import Cut
from tests.helpers import randn, randomized
from tests.partition.models import NAMES, build


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
    model = numbered(nn.Sequential(nn.LayerNorm((2, 3)), nn.Linear(3, 2, bias=False)))
    blocks = {"0.weight": model[0].weight, "0.bias": model[0].bias, **rows("1.weight", model[1].weight)}
    check(hs.Partition.by_row(model), blocks, unmatched=["0.weight", "0.bias"])


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
    with pytest.raises(PartitionError, match=re.escape("it has Module (1 tensor, 108 parameters)")):
        hs.Partition.by_head(numbered(model))


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


@pytest.mark.parametrize(("scheme", "what"), [("by_row", "rows"), ("by_column", "columns")])
def test_a_model_of_vectors_is_not_cut(scheme, what):
    model = nn.Sequential(nn.LayerNorm((2, 3)), nn.PReLU())
    message = f"{scheme.replace('_', ' ')}: this model has no {what} that can be told, it has LayerNorm (2 tensors, 12 "
    with pytest.raises(PartitionError, match=re.escape(message)) as raised:
        getattr(hs.Partition, scheme)(model)
    assert "\n" not in str(raised.value)


# --- layers of a network ----------------------------------------------------------------------------------------------


def two():
    return nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))


# name -> (model, labels of its layers)
UNITS = {
    "a list of blocks": (lambda: nn.ModuleDict({"embed": nn.Embedding(3, 2), "h": nn.ModuleList([two(), two()])}),
                         ("embed", "h.0", "h.1")),
    "a list of layers": (lambda: nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)), ("0", "2")),
    "a stage among layers": (lambda: nn.Sequential(nn.Linear(2, 2), two(), nn.Linear(2, 2)), ("0", "1.0", "1.1", "2")),
    "stages among layers": (lambda: nn.Sequential(nn.Linear(2, 2), two(), two()), ("0", "1", "2")),
    "lists in a list": (lambda: nn.ModuleList([nn.ModuleList([nn.Linear(2, 2), two()]) for _ in range(2)]), ("0", "1")),
    "no list": (lambda: nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.ModuleDict({"c": nn.Linear(2, 2)})}),
                ("a", "b.c")),
}  # fmt: skip


@pytest.mark.parametrize("name", UNITS)
def test_by_module_names_what_a_reader_would(name):
    make, labels = UNITS[name]
    assert hs.Partition.by_module(make()).labels == labels


def test_by_module_joins_what_is_below():
    model = mixed()
    check(
        hs.Partition.by_module(model),
        {
            "scale": model.scale,
            "conv": torch.cat([model.conv.weight.flatten(), model.conv.bias]),
            "norm": torch.cat([model.norm.weight, model.norm.bias]),
            "head.0": torch.cat([model.head[0].weight.flatten(), model.head[0].bias]),
            "head.2": model.head[2].weight,
        },
        unmatched=["scale"],
    )


REAL_UNITS = {
    "gpt2": ("transformer.wte", "transformer.wpe", "transformer.h.0", "transformer.h.1", "transformer.ln_f"),
    "llama": ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "lm_head"),
    "mixtral": ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "lm_head"),
    "encoder": ("layers.0", "layers.1"),
    "resnet": ("stem", "layer1.0", "layer1.1", "fc"),
    "own": ("embed", "blocks.0", "blocks.1"),
}


@pytest.mark.parametrize("name", REAL_UNITS)
def test_by_module_of_real_networks(name):
    assert hs.Partition.by_module(build(name).network).labels == REAL_UNITS[name]


# --- every architecture -----------------------------------------------------------------------------------------------

SCHEMES = ("by_tensor", "by_layer", "by_module", "by_row", "by_column", "by_head")


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_is_in_one_block(name):
    model = build(name).network
    space = hs.ParameterSpace.of(model)
    for scheme in SCHEMES:
        if scheme == "by_head" and name in ("own", "own, interleaved", "resnet"):
            continue
        partition = getattr(hs.Partition, scheme)(model)
        assert partition.size == space.size == sum(partition.sizes)
        assert min(partition.sizes) > 0
        assert len(set(partition.labels)) == len(partition)
        assert set(partition.unmatched) <= set(partition.labels)
        members = np.concatenate(partition.members())
        assert np.array_equal(np.sort(members), np.arange(space.size))


# --- layouts other than PyTorch's -------------------------------------------------------------------------------------


def conv1d():
    from transformers.pytorch_utils import Conv1D

    return numbered(nn.Sequential(Conv1D(3, 2)))


def test_rows_of_a_transposed_layout_are_outputs():
    """transformers' Conv1D has its weight as [in, out]."""
    model = conv1d()
    weight, bias = model[0].weight, model[0].bias
    assert weight.shape == (2, 3)
    check(hs.Partition.by_row(model), {**columns("0.weight", weight), "0.bias": bias}, unmatched=["0.bias"])
    check(hs.Partition.by_column(model), {**rows("0.weight", weight), "0.bias": bias}, unmatched=["0.bias"])


def expert_rows(name, weight):
    """Rows of every expert, for weights [experts, out, in]."""
    return {f"{name}[{e}, {i}]": weight[e, i] for e in range(weight.shape[0]) for i in range(weight.shape[1])}


def expert_columns(name, weight):
    return {f"{name}[{e}, :, {i}]": weight[e, :, i] for e in range(weight.shape[0]) for i in range(weight.shape[2])}


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_a_row_of_experts_is_an_output_of_one(name):
    model = nn.ModuleList([build(name).network.model.layers[0].mlp.experts])
    experts = numbered(model)[0]
    vectors = {name: p for name, p in model.named_parameters() if p.ndim < 3}
    weights = {"0.gate_up_proj": experts.gate_up_proj, "0.down_proj": experts.down_proj}
    outputs = expert_columns if name == "gpt_oss" else expert_rows
    inputs = expert_rows if name == "gpt_oss" else expert_columns
    for scheme, expected in ((hs.Partition.by_row, outputs), (hs.Partition.by_column, inputs)):
        partition = scheme(model)
        blocks = {**vectors}
        for weight_name, weight in weights.items():
            blocks |= expected(weight_name, weight)
        check(partition, {label: blocks[label] for label in partition.labels}, unmatched=list(vectors))


SIZES = {"hidden_size": 6, "intermediate_size": 4, "moe_intermediate_size": 4, "num_attention_heads": 1}
COUNTS = {"num_local_experts": 3, "num_experts": 3, "moe_num_experts": 3}

# package -> (type of the experts, its configuration, whether weights are [experts, in, out], gate and up of unit 0)
EXPERTS = {
    "mixtral": ("MixtralExperts", "MixtralConfig", False, (0, 4)),
    "qwen3_moe": ("Qwen3MoeExperts", "Qwen3MoeConfig", False, (0, 4)),
    "aria": ("AriaExperts", "AriaTextConfig", True, (0, 4)),
    "gpt_oss": ("GptOssExperts", "GptOssConfig", True, (0, 1)),
    "llama4": ("Llama4TextExperts", "Llama4TextConfig", True, (0, 4)),
}


def experts_of(package):
    """Stacked experts alone, and a function of them in which every expert takes part."""
    kind, config, _, _ = EXPERTS[package]
    modeling = import_module(f"transformers.models.{package}.modeling_{package}")
    configuration = getattr(import_module("transformers"), config)(**SIZES, **COUNTS)
    configuration._experts_implementation = "eager"
    experts = randomized(getattr(modeling, kind)(configuration))
    x = randn(6, 6, seed=1)
    if package == "llama4":  # its inputs come sorted by expert
        return experts, lambda: experts(x)
    return experts, lambda: experts(x, torch.arange(6)[:, None] % 3, torch.ones(6, 1, dtype=x.dtype))


@torch.no_grad()
@pytest.mark.parametrize("package", EXPERTS)
def test_hidden_units_of_experts_are_what_rows_and_columns_say(package):
    """Two hidden units of one expert swapped by its blocks, rows of what makes them and columns of what reads them."""
    experts, call = experts_of(package)
    before = call()
    _, _, transposed, gates = EXPERTS[package]
    unit = 2 if gates == (0, 1) else 1  # gate and up of unit 1 lie this far behind those of unit 0
    row, column = ("[1, :, {}]", "[1, {}]") if transposed else ("[1, {}]", "[1, :, {}]")
    swaps = [(hs.Partition.by_row(experts), f"gate_up_proj{row}", (gate, gate + unit)) for gate in gates]
    swaps += [(hs.Partition.by_column(experts), f"down_proj{column}", (0, 1))]
    theta = parameters_to_vector(experts.parameters())
    for partition, label, units in swaps:
        one, other = (torch.from_numpy(partition.indices(label.format(unit))) for unit in units)
        theta[one], theta[other] = theta[other].clone(), theta[one].clone()
    vector_to_parameters(theta, experts.parameters())
    if package == "gpt_oss":
        experts.gate_up_proj_bias[1, :4] = experts.gate_up_proj_bias[1, [2, 3, 0, 1]]
    scale = float(before.abs().max())
    assert float((call() - before).abs().max()) < 1e-12 * scale
    experts.down_proj[1, 0] *= 1.01  # this expert counts
    assert float((call() - before).abs().max()) > 1e-6 * scale


@pytest.mark.parametrize("name", ["GptOssExperts", "Llama4TextExperts"])
def test_experts_that_do_not_say_their_layout_are_known_by_name(name):
    """Older transformers leave no marks on them."""
    package = "gpt_oss" if name == "GptOssExperts" else "llama4"
    kind = type(name, (nn.Module,), {"__module__": f"transformers.models.{package}.modeling_{package}"})
    model = nn.ModuleList([kind()])
    model[0].down_proj = nn.Parameter(torch.zeros(2, 3, 4))
    numbered(model)
    check(hs.Partition.by_row(model), expert_columns("0.down_proj", model[0].down_proj))


# --- size -------------------------------------------------------------------------------------------------------------


def test_ten_million_parameters_by_row_in_a_second():
    model = nn.Sequential(nn.Embedding(20_000, 400), nn.Linear(400, 2500), nn.Linear(2500, 400))
    start = process_time()
    partition = hs.Partition.by_row(model)
    assert process_time() - start < 1
    assert partition.size > 10**7
    assert len(partition) > 20_000
    start = process_time()
    assert partition.levels == ("module", "layer", "tensor", "block")
    assert partition.coarsened("layer").labels == ("0", "1", "2")
    assert partition.cuts()["0.weight"] == Cut(0, 1, 20_000)
    assert process_time() - start < 1
