"""The risk of one network: what counts as an error, and what has no risk in [0, 1]."""

import math
import re

import pytest
import torch
from torch import nn
from torch.nn import functional

import hesscope as hs
from hesscope.core.errors import DataError, InputError
from hesscope.layerwise import network_risk, risk
from hesscope.layerwise.risk import Risk, require_risk, risks_of_network
from tests.helpers import F64, call_flat, cut, flat_parameters, randint, randn, randomized
from tests.layerwise import networks, posteriors

N, C = 12, 3
X, LABELS = randn(N, 5, seed=1), randint(C, N, seed=2)


def classifier(y=LABELS, loss="cross_entropy"):
    return posteriors.objective(posteriors.mlp(), X, y, loss)


def of(objective, outputs, targets, loss_bound=None):
    """Risks of these outputs, as a list."""
    return Risk(loss_bound).of(objective, torch.tensor(outputs, dtype=F64), torch.as_tensor(targets)).tolist()


def test_network_risk_is_the_share_of_wrong_labels():
    model = posteriors.mlp()
    share = float((model(X).argmax(1) != LABELS).double().mean())
    assert 0 < share < 1
    for data in ((X, LABELS), cut(X, LABELS), (X, LABELS.int()), (X, LABELS.to(torch.uint8))):
        assert network_risk(hs.Objective(model, "cross_entropy", data)) == pytest.approx(share, rel=1e-15)
    nll = hs.Objective(nn.Sequential(model, nn.LogSoftmax(1)), nn.NLLLoss(), cut(X, LABELS))
    assert network_risk(nll) == pytest.approx(share, rel=1e-15)
    weighted = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0, 2.0], dtype=F64))
    assert network_risk(hs.Objective(model, weighted, (X, LABELS))) == pytest.approx(share, rel=1e-15)


def test_risk_at_another_vector_counts_every_sample_once(monkeypatch):
    model = posteriors.mlp()
    other = flat_parameters(model) + randn(len(flat_parameters(model)), seed=6)
    share = float((call_flat(model, other, X).argmax(1) != LABELS).double().mean())
    assert share != network_risk(posteriors.objective(model, X, LABELS))
    monkeypatch.setattr(risk, "CHUNK", 5)  # batches are cut, too
    objective = hs.Objective(model, "cross_entropy", [(X[:7], LABELS[:7]), (X[7:], LABELS[7:])])
    assert risks_of_network(objective, Risk(), other) == (pytest.approx(share, rel=1e-15), N)


def test_ties_go_to_the_first_class():
    """As `argmax` has it: the classifier must be one, and the same each time."""
    objective = classifier()
    assert of(objective, [[1.0, 1.0, 0.0]] * 3, [0, 1, 2]) == [0, 1, 1]
    assert of(objective, [[0.0, 0.0, 0.0]] * 3, [0, 1, 2]) == [0, 1, 1]


@pytest.mark.parametrize("loss_bound", [None, 2.0])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_outputs_that_are_not_finite_count_as_the_worst(value, loss_bound):
    """Also where the label's own output is the largest."""
    risks = of(classifier(), [[9.0, value, 0.0], [value, 9.0, 0.0], [9.0, 0.0, 0.0]], [0, 0, 0], loss_bound)
    assert risks[:2] == [1, 1] and risks[2] < 0.01
    mse = posteriors.objective(posteriors.mlp(), X, randn(N, C, seed=3), "mse")
    assert of(mse, [[value, 0.0, 0.0], [0.0, 0.0, 0.0]], torch.zeros(2, 3), 2.0) == [1, 0]


def test_losses_are_cut_off_at_their_bound():
    y = randn(N, C, seed=3)
    model = posteriors.mlp()
    objective = posteriors.objective(model, X, y, "mse")
    losses = (model(X).detach() - y).square().mean(1)
    B = float(losses.median())
    assert Risk(B).of(objective, model(X).detach(), y).tolist() == pytest.approx((losses.clamp(max=B) / B).tolist())
    assert network_risk(objective, B) == pytest.approx(float((losses.clamp(max=B) / B).mean()), rel=1e-14)
    assert network_risk(objective, 1e6) == pytest.approx(float(losses.mean()) / 1e6, rel=1e-14)
    assert Risk(B).words == f"mean of min(loss, {B:g}) / {B:g}"


@pytest.mark.parametrize(
    "y", [LABELS, LABELS.int(), randn(N, C, seed=4).softmax(1), randn(N, C, seed=4).softmax(1).float()]
)
def test_bounded_cross_entropy_takes_what_its_objective_takes(y):
    model = posteriors.mlp()
    objective = posteriors.objective(model, X, y)
    wanted = y.to(F64) if y.is_floating_point() else y.long()
    losses = functional.cross_entropy(model(X).detach(), wanted, reduction="none")
    assert network_risk(objective, 1.5) == pytest.approx(float((losses / 1.5).clamp(max=1).mean()), rel=1e-14)


class OneOutput(nn.Module):
    """Outputs [N], as for a loss of one number."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 1)

    def forward(self, x):
        return self.layer(x).squeeze(1)


def test_one_output_without_an_axis_of_its_own():
    model, y = randomized(OneOutput()), (LABELS > 0).double()
    objective = posteriors.objective(model, X, y, nn.BCEWithLogitsLoss())
    losses = functional.binary_cross_entropy_with_logits(model(X).detach(), y, reduction="none")
    assert network_risk(objective, 1.5) == pytest.approx(float((losses / 1.5).clamp(max=1).mean()), rel=1e-14)
    assert of(objective, [math.nan, 9.0], [1.0, 1.0], 1.5) == [1, pytest.approx(0.0, abs=1e-3)]


def test_losses_below_zero_count_as_zero():
    """Poisson's loss without its constant is negative for large counts; no sample may make up for another's risk."""
    objective = posteriors.objective(randomized(OneOutput()), X, LABELS.double() + 3, nn.PoissonNLLLoss())
    assert of(objective, [2.0, 0.5], [9.0, 0.0], 1.0) == [0, 1]


def test_surrogates_are_never_below_their_risks():
    model = posteriors.mlp()
    outputs = 3 * model(X).detach()
    objective = posteriors.objective(model, X, LABELS)
    assert float(Risk().surrogate(objective, outputs, LABELS)) == pytest.approx(
        float(functional.cross_entropy(outputs, LABELS)) / math.log(2), rel=1e-14
    )
    for n in range(N):
        one = outputs[n : n + 1], LABELS[n : n + 1].int()
        for chosen in (Risk(), Risk(1.3)):
            assert float(chosen.surrogate(objective, *one)) >= float(chosen.of(objective, *one).mean())


# --- what has no such risk --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_bound", [None, 2.0])
def test_ignored_labels_are_refused(loss_bound):
    y = LABELS.clone()
    y[4] = -100
    with pytest.raises(DataError, match=r"some labels are ignored \(-100\): leave those samples out"):
        network_risk(classifier(y), loss_bound)
    y[4] = 1
    with pytest.raises(DataError, match=r"some labels are ignored \(1\)"):
        network_risk(classifier(y, nn.CrossEntropyLoss(ignore_index=1)), loss_bound)


def test_soft_targets_have_no_classification_error():
    with pytest.raises(DataError, match=r"one integer label for each .* targets of shape \[12, 3\] \(float64\)"):
        network_risk(classifier(randn(N, C, seed=4).softmax(1)))


class PerToken(nn.Module):
    """Sequences [N, T, 5] -> logits of every token, flattened or not."""

    def __init__(self, flat):
        super().__init__()
        self.layer, self.flat = nn.Linear(5, C), flat

    def forward(self, x):
        return self.layer(x).flatten(0, 1) if self.flat else self.layer(x)


@pytest.mark.parametrize("loss_bound", [None, 2.0])
def test_tokens_are_no_samples(loss_bound):
    x, y = randn(N, 4, 5, seed=1), randint(C, N, 4, seed=2)
    flat = posteriors.objective(randomized(PerToken(True)), x, y.flatten())
    with pytest.raises(DataError, match="has 48 outputs of 12 samples; tokens of a text are not independent samples"):
        network_risk(flat, loss_bound)
    if loss_bound is None:
        with pytest.raises(DataError, match=re.escape("outputs of shape [12, 4, 3] and targets of shape [12, 4]")):
            network_risk(posteriors.objective(randomized(PerToken(False)), x, y))


def test_language_models_have_no_samples():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=1, n_embd=8, n_head=2, vocab_size=11, n_positions=8, bos_token_id=0, eos_token_id=0
    )
    tokens = randint(11, N, 6, seed=1)
    model = transformers.GPT2LMHeadModel(config).eval()
    objective = hs.Objective(model, "cross_entropy", {"input_ids": tokens, "labels": tokens})
    with pytest.raises(DataError, match="has 60 outputs of 12 samples; tokens"):
        network_risk(objective)


def test_pixels_of_a_sample_are_one_loss():
    """Logits [N, C, H, W]: a sample's loss is the mean over its pixels."""
    model = randomized(nn.Conv2d(2, C, 1))
    x, y = randn(N, 2, 3, 3, seed=1), randint(C, N, 3, 3, seed=2)
    objective = posteriors.objective(model, x, y)
    losses = functional.cross_entropy(model(x).detach(), y, reduction="none").mean((1, 2))
    B = float(losses.median())
    assert network_risk(objective, B) == pytest.approx(float((losses / B).clamp(max=1).mean()), rel=1e-14)


def a_loss(model, batch):
    return functional.cross_entropy(model(batch[0]), batch[1], reduction="sum"), len(batch[1])


BAD = {
    "mse without a bound": (nn.MSELoss(), None, r"the loss 'MSELoss' is not in \[0, 1\]: pass loss_bound=B"),
    "class weights": (
        nn.CrossEntropyLoss(weight=torch.ones(C, dtype=F64)),
        2.0,
        "loss_bound does not go with class weights",
    ),
    "zero": ("cross_entropy", 0.0, r"loss_bound must be a positive, finite number, got 0\.0"),
    "negative": ("cross_entropy", -1.0, r"loss_bound must be a positive, finite number, got -1\.0"),
    "infinite": ("cross_entropy", math.inf, "loss_bound must be a positive, finite number, got inf"),
    "nan": ("cross_entropy", math.nan, "loss_bound must be a positive, finite number, got nan"),
    "callable": (a_loss, None, "the risk of a network needs the loss as a function of the model's outputs"),
}


@pytest.mark.parametrize("name", BAD)
def test_losses_without_a_risk_are_refused(name):
    loss, loss_bound, line = BAD[name]
    targets = randn(N, C, seed=3) if isinstance(loss, nn.MSELoss) else LABELS
    with pytest.raises(InputError, match=line):
        require_risk(classifier(targets, loss), loss_bound)


def test_classification_error_is_the_risk_unless_told():
    assert require_risk(classifier(), None) == Risk()
    assert Risk().words == "classification error"
    assert network_risk(posteriors.objective(randomized(networks.Twice()), randn(N, 4, seed=1), LABELS)) <= 1


def test_a_loss_that_is_not_finite_is_the_worst():
    """Poisson's of a negative rate is nan, though the output is finite."""
    outputs, targets = torch.tensor([[-1.0], [1.0]], dtype=F64), torch.ones(2, 1, dtype=F64)
    model = nn.Linear(1, 1).double()
    with torch.no_grad():
        model.weight.fill_(0.0), model.bias.fill_(1.0)
    loss = nn.PoissonNLLLoss(log_input=False)
    objective = hs.Objective(model, loss, (torch.ones(2, 1, dtype=F64), targets))
    risks = Risk(2.0).of(objective, outputs, targets)
    assert risks[0] == 1.0
    assert 0 < float(risks[1]) < 1
