"""Gauss-Newton products with logits in tiles: those with whole logits, for less memory, and never where they differ."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional

import hesscope as hs
from hesscope.operators import curvature, logit_tiles
from hesscope.operators.engines import ENGINES
from tests.helpers import F64, randint, randn, randomized
from tests.helpers import relative_error as error
from tests.language_models import new_model
from tests.operators import zoo

CLASSES, WIDTH, N = 23, 6, 21


@pytest.fixture
def always(monkeypatch):
    """Logits of every size in tiles of five rows; N is no multiple of it."""
    monkeypatch.setattr(curvature, "TILED_BYTES", 0)
    monkeypatch.setattr(logit_tiles, "TILE_BYTES", 0)
    monkeypatch.setattr(logit_tiles, "LEAST_ROWS", 5)
    monkeypatch.setattr(logit_tiles, "PARTS", 1)


def products(objective, V, **options):
    """G @ V with logits in tiles, which is checked."""
    G = hs.GaussNewton(objective, **options)
    found = G @ V
    assert G.engine.endswith(", logits in tiles"), G.explain()
    return found


def whole(objective, V, **options):
    """G @ V with logits held whole."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(curvature, "TILED_BYTES", 2**60)
        G = hs.GaussNewton(objective, **options)
        found = G @ V
    assert "tiles" not in G.engine
    return found


@pytest.mark.parametrize("memory", [None, 0])
@pytest.mark.parametrize("engine", ["auto", *ENGINES])
@pytest.mark.parametrize("name", ["gpt2", "llama", "mlp"])
def test_products_are_those_of_autograd(name, engine, memory, always):
    """GPT-2's embedding is tied to its last layer, Llama's is not; both have ignored tokens; the MLP has a bias."""
    found = zoo.specimen(name)
    truth = zoo.truth(name, "gauss_newton")
    V = zoo.probes(len(truth), 3)
    objective = hs.Objective(found.model, "cross_entropy", found.batch)
    assert error(products(objective, V, engine=engine, memory=memory), truth @ V) < 1e-11


class Network(nn.Module):
    """Tokens or inputs -> hidden -> last layer; the logits may be changed, or the layer's weight used twice."""

    def __init__(self, bias=True, change=None):
        super().__init__()
        self.hidden = nn.Linear(4, WIDTH)
        self.last = nn.Linear(WIDTH, CLASSES, bias=bias)
        self.change = change

    def forward(self, x):
        h = torch.tanh(self.hidden(x))
        return self.last(h) if self.change is None else self.change(self, h)


def targets(*shape):
    return randint(CLASSES, *shape, seed=4)


def some_ignored():
    y = targets(N)
    y[[0, 4, 5, 20]] = 7
    return y


WEIGHTS = randn(CLASSES, seed=6).abs()

LOSSES = {
    "plain": nn.CrossEntropyLoss(),
    "sum": nn.CrossEntropyLoss(reduction="sum"),
    "ignored": nn.CrossEntropyLoss(ignore_index=7),
    "class weights": nn.CrossEntropyLoss(weight=WEIGHTS),
    "smoothed": nn.CrossEntropyLoss(label_smoothing=0.3),
    "everything": nn.CrossEntropyLoss(weight=WEIGHTS, ignore_index=7, label_smoothing=0.3),
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_every_form_of_cross_entropy(loss, bias, always):
    model = randomized(Network(bias))
    batches = [(randn(N, 4, seed=1), some_ignored()), (randn(3, 4, seed=2), targets(3))]
    objective = hs.Objective(model, LOSSES[loss], batches)
    V = randn(objective.parameters.size, 3, seed=3)
    assert error(products(objective, V), whole(objective, V)) < 1e-11


def test_a_batch_of_ignored_tokens_alone(always):
    y = torch.full((N,), -100)
    batches = [(randn(N, 4, seed=1), targets(N)), (randn(N, 4, seed=2), y)]
    objective = hs.Objective(randomized(Network()), "cross_entropy", batches)
    V = randn(objective.parameters.size, 2, seed=3)
    for engine in ENGINES:
        assert error(products(objective, V, engine=engine), whole(objective, V)) < 1e-11


def test_sequences_with_labels_in_place(always):
    objective = hs.Objective(randomized(Network()), "cross_entropy", (randn(3, 7, 4, seed=1), targets(3, 7)))
    V = randn(objective.parameters.size, 2, seed=3)
    assert error(products(objective, V), whole(objective, V)) < 1e-11


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("names", [["last"], ["last.bias"], ["last.weight"], ["hidden"], ["hidden", "last.bias"]])
def test_blocks_of_some_parameters(names, engine, always):
    """Features, weight and bias may each be constants."""
    model = randomized(Network())
    objective = hs.Objective(model, "cross_entropy", (randn(N, 4, seed=1), targets(N)))
    full = [name for name in objective.parameters.names if any(name.startswith(part) for part in names)]
    part = objective.restricted(full)
    V = randn(part.parameters.size, 2, seed=3)
    assert error(products(part, V, engine=engine), whole(part, V)) < 1e-11
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in full)
    frozen = hs.Objective(model, "cross_entropy", (randn(N, 4, seed=1), targets(N)))
    assert error(products(frozen, V, engine=engine), whole(part, V)) < 1e-11


def test_a_weight_that_is_used_elsewhere_too(always):
    """Tied to what comes before, transposed: what comes back to the weight adds up."""
    model = randomized(Network(change=lambda self, h: self.last(torch.tanh(self.last(h) @ self.last.weight))))
    objective = hs.Objective(model, "cross_entropy", (randn(N, 4, seed=1), targets(N)))
    G = hs.GaussNewton(objective)
    V = randn(objective.parameters.size, 2, seed=3)
    assert error(G @ V, whole(objective, V)) < 1e-11
    assert "tiles" not in G.engine  # called twice: refused
    model.change = lambda self, h: self.last(torch.tanh(functional.linear(h, self.last.weight) @ self.last.weight))
    objective = hs.Objective(model, "cross_entropy", (randn(N, 4, seed=1), targets(N)))
    assert error(products(objective, V), whole(objective, V)) < 1e-11


@pytest.mark.parametrize("scale", [1e-14, 1.0, 1e14])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_in_every_precision_and_at_every_scale(dtype, scale, always):
    """Of the vector, and with it of the product. Logits of up to 50 have as many roundings in their exponentials."""
    tolerance = 100 * torch.finfo(dtype).eps
    model = randomized(Network()).to(dtype)
    with torch.no_grad():
        model.last.weight.mul_(20)
    objective = hs.Objective(model, "cross_entropy", (randn(N, 4, seed=1).to(dtype), targets(N)))
    V = scale * randn(objective.parameters.size, 2, seed=3)
    exact = hs.Objective(randomized(Network()), "cross_entropy", (randn(N, 4, seed=1), targets(N)))
    with torch.no_grad():
        exact.model.last.weight.mul_(20)
    found = products(objective, V.to(dtype))
    assert found.dtype == dtype
    assert error(found, whole(exact, V)) < tolerance


def test_half_precision_is_measured_in_float32(always):
    model = Network().to(torch.bfloat16)
    objective = hs.Objective(model, "cross_entropy", (randn(N, 4, seed=1).bfloat16(), targets(N)))
    V = randn(objective.parameters.size, 2, seed=3).float()
    assert error(products(objective, V), whole(objective, V)) < 1e-5


def test_not_finite_is_told(always):
    model = randomized(Network())
    with torch.no_grad():
        model.last.weight.mul_(1e200)
    objective = hs.Objective(model, "cross_entropy", (randn(N, 4, seed=1), targets(N)))
    with pytest.raises(hs.HesscopeError, match="not finite"):
        products(objective, 1e200 * randn(objective.parameters.size, seed=3))


# --- never where the product would be another -------------------------------------------------------------------------


def capped(self, h):
    return 3 * torch.tanh(self.last(h) / 3)


def capped_in_place(self, h):
    return self.last(h).div_(2).tanh_()


def masked_in_place(self, h):
    logits = self.last(h)
    logits[..., 0] = -2.0
    return logits


def needs_logits_afterwards(self, h):
    logits = self.last(h)
    _ = logits[..., CLASSES - 1]
    return logits


OTHERS = "its logits are not what one nn.Linear gives"
CHANGES = {
    "capped": (capped, OTHERS),
    "capped in place": (capped_in_place, OTHERS),
    "masked in place": (masked_in_place, OTHERS),
    "another function": (lambda self, h: functional.linear(h, self.last.weight), OTHERS),
    "needed afterwards": (needs_logits_afterwards, "it does not run without its last layer"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_logits_are_held_whole(change, always):
    function, why = CHANGES[change]
    objective = hs.Objective(randomized(Network(change=function)), "cross_entropy", (randn(N, 4, seed=1), targets(N)))
    G = hs.GaussNewton(objective)
    V = randn(objective.parameters.size, 2, seed=3)
    assert error(G @ V, whole(objective, V)) < 1e-12
    assert f"logits are held whole: {why}" in G.explain()


@pytest.mark.parametrize("kind", ["gemma2", "cohere"])
def test_language_models_that_cap_or_scale(kind, always):
    ids = randint(40, 2, 8, seed=1)
    objective = hs.Objective(new_model(kind, 40), "cross_entropy", {"input_ids": ids, "labels": ids.clone()})
    G = hs.GaussNewton(objective)
    v = randn(objective.parameters.size, seed=3).float()
    assert error(G @ v, whole(objective, v)) < 1e-5
    assert "logits are held whole: its logits are not what one nn.Linear gives" in G.explain()


def test_logits_that_are_changed_on_some_batches_only(always):
    """Where the inputs are large: on the second batch."""
    change = lambda self, h: capped(self, h) if float(h.detach().abs().mean()) > 0.9 else self.last(h)  # noqa: E731
    model = randomized(Network(change=change))
    batches = [(0.1 * randn(N, 4, seed=1), targets(N)), (100 * randn(N, 4, seed=1), targets(N))]
    objective = hs.Objective(model, "cross_entropy", batches)
    G = hs.GaussNewton(objective)
    V = randn(objective.parameters.size, 2, seed=3)
    assert error(G @ V, whole(objective, V)) < 1e-11
    assert "logits, which last (23 classes) makes, are made a few positions at a time" in G.explain()
    assert f"logits are held whole: {OTHERS}" in G.explain()


def hook(model):
    return model.last.register_forward_hook(lambda module, given, result: 2 * result)


def own_forward(model):
    forward = model.last.forward
    model.last.forward = lambda x: 2 * forward(x)


def normed(model):
    with torch.no_grad():
        nn.utils.parametrizations.weight_norm(model.last)


def of_another_class(model):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model.last.__class__ = Doubled


@pytest.mark.parametrize("tamper", [hook, own_forward, normed, of_another_class], ids=lambda each: each.__name__)
def test_layers_that_do_something_else(tamper, always):
    model = randomized(Network())
    tamper(model)
    objective = hs.Objective(model, "cross_entropy", (randn(N, 4, seed=1), targets(N)))
    G = hs.GaussNewton(objective, engine="double_backward")
    V = randn(objective.parameters.size, 2, seed=3)
    expected = whole(objective, V, engine="double_backward")
    assert error(G @ V, expected) < 1e-12
    assert "tiles" not in G.engine


def test_other_losses_and_targets(always):
    x, model = randn(N, 4, seed=1), randomized(Network())
    log_softmax = randomized(Network(change=lambda self, h: functional.log_softmax(self.last(h), dim=1)))
    probabilities = torch.softmax(randn(N, CLASSES, seed=5), dim=1)
    for network, loss, y in (
        (model, "mse", probabilities),
        (model, "cross_entropy", probabilities),
        (model, nn.NLLLoss(), targets(N)),
        (log_softmax, nn.NLLLoss(), targets(N)),
    ):
        objective = hs.Objective(network, loss, (x, y))
        G = hs.GaussNewton(objective)
        V = randn(objective.parameters.size, 2, seed=3)
        expected = whole(objective, V)
        assert float((G @ V - expected).abs().max()) <= 1e-12 * float(expected.abs().max())
        assert "tiles" not in G.engine


class Mixing(Network):
    """Every sample sees the mean of all."""

    def forward(self, x):
        return super().forward(x + x.mean(dim=0))


class MixingDerivatives(Network):
    """The mean of all is added and taken away again, but as a constant."""

    def forward(self, x):
        h = torch.tanh(self.hidden(x))
        return self.last(h + h.mean(dim=0) - h.mean(dim=0).detach())


@pytest.mark.parametrize("network", [Network, Mixing, MixingDerivatives])
def test_samples_are_streamed_in_pieces_only_if_they_are_independent(network, always):
    model = randomized(network())
    objective = hs.Objective(model, "cross_entropy", (randn(N, 4, seed=1), targets(N)))
    G, V = hs.GaussNewton(objective, memory=0), randn(objective.parameters.size, 2, seed=3)
    sizes = []
    model.hidden.register_forward_hook(lambda module, given, result: sizes.append(len(result)))
    expected = whole(objective, V)
    assert error(G @ V, expected) < 1e-11
    sizes.clear()
    assert error(G @ V, expected) < 1e-11
    assert (max(sizes) < N) == (network is Network)


def test_the_model_is_left_as_it_was(always):
    """Also if it fails in the middle."""
    model = randomized(Network())
    objective = hs.Objective(model, "cross_entropy", (randn(N, 4, seed=1), targets(N)))
    v = randn(objective.parameters.size, seed=3)
    for engine in ENGINES:
        _ = products(objective, v, engine=engine)
    for failing in (False, True):
        if failing:
            model.change = lambda self, h: self.nowhere
            with pytest.raises(hs.HesscopeError, match="nowhere"):
                _ = hs.GaussNewton(objective) @ v
        for module in model.modules():
            assert "forward" not in vars(module)
            assert not module._forward_hooks and not module._forward_pre_hooks


def test_products_follow_the_model(always):
    model = randomized(Network())
    objective = hs.Objective(model, "cross_entropy", (randn(N, 4, seed=1), targets(N)))
    G, V = hs.GaussNewton(objective), randn(objective.parameters.size, 2, seed=3)
    before = G @ V
    with torch.no_grad():
        model.last.weight.mul_(1.5)
    assert error(G @ V, before) > 1e-2
    assert error(G @ V, whole(objective, V)) < 1e-11


def test_small_logits_are_held_whole():
    """The threshold is one of bytes: this network's logits have some hundred."""
    objective = hs.Objective(randomized(Network()), "cross_entropy", (randn(N, 4, seed=1), targets(N)))
    G = hs.GaussNewton(objective)
    _ = G @ randn(objective.parameters.size, seed=3)
    assert "tiles" not in G.engine and "logits" not in G.explain()


# --- memory -----------------------------------------------------------------------------------------------------------

LOGITS = 36  # MiB, of 288 tokens and 32768 classes; the weight takes 4

# The same model and tokens with one label that counts need no logits to speak of: what is left is the trunk's.
PEAK = """
import re, torch, hesscope as hs
from hesscope.operators import curvature
from transformers import GPT2Config, GPT2LMHeadModel
def status(key): return int(re.search(key + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
def reset(): open("/proc/self/clear_refs", "w").write("5")
def objective(classes, tokens, counted):
    torch.manual_seed(0)
    sizes = dict(vocab_size=classes, n_embd=32, n_layer=1, n_head=2, n_positions=128, bos_token_id=0, eos_token_id=0)
    ids = torch.randint(classes, (4, tokens))
    labels = ids if counted is None else torch.full_like(ids, -100).index_fill_(1, torch.tensor([counted]), 3)
    return hs.Objective(GPT2LMHeadModel(GPT2Config(**sizes)), "cross_entropy", {"input_ids": ids, "labels": labels})
full, trunk, small = objective(32768, 72, None), objective(32768, 72, 5), objective(64, 9, None)
v = torch.randn(full.parameters.size)
for tiled, engine, memory in ((True, "double_backward", 0), (True, "auto", None), (False, "double_backward", 0)):
    _ = hs.GaussNewton(small, engine=engine, memory=memory) @ v[:small.parameters.size]  # PyTorch loads what it needs
    curvature.TILED_BYTES = 2**25 if tiled else 2**60
    for case in (full, trunk) if tiled else (full,):
        G = hs.GaussNewton(case, engine=engine, memory=memory)
        before = status("VmRSS")
        for _ in range(2):  # the first product sets up, the second one does not
            reset()
            product = G @ v
            print(status("VmHWM") - before)
        assert ("tiles" in G.engine) == tiled, G.engine
        del G, product
"""


def test_a_product_holds_less_than_one_more_buffer_of_logits():
    """Beyond what the trunk takes: with an engine that keeps nothing, and with one that keeps the trunk."""
    if not os.path.exists("/proc/self/clear_refs"):
        pytest.skip("peak memory is read from /proc, which this system has not")
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # freed memory goes back at once
    run = subprocess.run([sys.executable, "-c", PEAK], env=environment, capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr
    tiled, whole = torch.tensor([float(word) for word in run.stdout.split()]).split([8, 2])
    full, trunk = tiled.view(2, 2, 2).unbind(dim=1)  # engine, product
    assert bool((full - trunk < LOGITS).all()), (tiled, whole)
    assert float(whole[1] - trunk[0, 1]) > 2 * LOGITS, (tiled, whole)  # the instrument sees logits
