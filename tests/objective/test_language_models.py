"""Causal language models with Hugging Face's interface: the labels are the inputs, shifted by one inside."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional

import hesscope as hs
from tests.helpers import call_flat, flat_parameters, randint, randomized, relative_error

VOCABULARY, N, T = 7, 6, 5


@dataclass
class Config:
    is_encoder_decoder: bool = False


@dataclass
class Output:
    logits: torch.Tensor


class Causal(nn.Module):
    """Token logits from this and the previous token; generates or classifies as told."""

    def __init__(self, generates=True, encoder_decoder=False):
        super().__init__()
        self.config = Config(encoder_decoder)
        self.generates = generates
        self.embed = nn.Embedding(VOCABULARY, 3)
        self.head = nn.Linear(3, VOCABULARY, bias=False)

    def can_generate(self):
        return self.generates

    def forward(self, input_ids, attention_mask=None):
        h = self.embed(input_ids)
        h = h + functional.pad(h[:, :-1], (0, 0, 1, 0))
        return Output(self.head(torch.tanh(h)))


def tokens(seed, length=T):
    ids = randint(VOCABULARY, N, length, seed=seed)
    labels = ids.clone()
    labels[0, 2:] = -100  # padding
    labels[3, :2] = -100  # prompt
    return ids, labels


def batches(ids, labels):
    mask = torch.ones_like(ids)
    return [
        {"input_ids": ids[part], "attention_mask": mask[part], "labels": labels[part]}
        for part in (slice(0, 1), slice(1, 4), slice(4, N))
    ]


def by_hand(model, theta, ids, labels, shift):
    """Mean cross-entropy over the tokens that are not ignored."""
    swapped = hs.ParameterSpace.of(model).unflatten(theta)
    logits = torch.func.functional_call(model, swapped, (ids,)).logits
    if shift:
        logits, labels = logits[:, :-1], labels[:, 1:]
    return functional.cross_entropy(logits.reshape(-1, VOCABULARY), labels.reshape(-1))


# VOCABULARY + 1 tokens: after the shift there are as many tokens as classes, and the axes must not be confused.
@pytest.mark.parametrize("length", [T, VOCABULARY, VOCABULARY + 1])
def test_a_causal_model_predicts_the_next_token(length):
    model = randomized(Causal())
    ids, labels = tokens(seed=1, length=length)
    obj = hs.Objective(model, "cross_entropy", batches(ids, labels))
    theta = flat_parameters(model).requires_grad_()
    truth = by_hand(model, theta, ids, labels, shift=True)
    assert obj.num_terms == int((labels[:, 1:] != -100).sum())
    assert obj.value() == pytest.approx(truth.item(), rel=1e-13)
    assert relative_error(obj.gradient(), torch.autograd.grad(truth, theta)[0]) < 1e-12
    H = torch.autograd.functional.hessian(lambda t: by_hand(model, t, ids, labels, shift=True), theta.detach())
    assert relative_error(hs.Hessian(obj).dense(), H) < 1e-10


@pytest.mark.parametrize("model", [Causal(generates=False), Causal(encoder_decoder=True)], ids=["tagger", "translator"])
def test_other_models_have_labels_in_place(model):
    model = randomized(model)
    ids, labels = tokens(seed=2)
    obj = hs.Objective(model, "cross_entropy", batches(ids, labels))
    assert obj.num_terms == int((labels != -100).sum())
    assert obj.value() == pytest.approx(
        float(by_hand(model, flat_parameters(model), ids, labels, shift=False)), rel=1e-13
    )


class Classifier(nn.Module):
    """Sequence classification: one row of logits a sequence, in a dict."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 3)

    def forward(self, input_ids):
        return {"logits": self.embed(input_ids).mean(dim=1)}


def test_logits_in_a_dict():
    model = randomized(Classifier())
    ids, y = randint(VOCABULARY, N, T, seed=3), randint(3, N, seed=4)
    obj = hs.Objective(model, "cross_entropy", {"input_ids": ids, "label": y})
    truth = functional.cross_entropy(call_flat(model, flat_parameters(model), ids)["logits"], y)
    assert obj.value() == pytest.approx(truth.item(), rel=1e-13)
