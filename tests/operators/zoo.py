"""Small networks of the kinds that people measure, with their Hessian and Gauss-Newton matrix by PyTorch alone."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.helpers import F64, flat_parameters, randint, randn, randomized, sequential_mlp


class Residual(nn.Module):
    """Two convolutions with batch norms and a shortcut; the second ReLU works in place, as in torchvision."""

    def __init__(self, fan_in, fan_out, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(fan_in, fan_out, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(fan_out)
        self.conv2 = nn.Conv2d(fan_out, fan_out, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(fan_out)
        self.shortcut = nn.Sequential(nn.Conv2d(fan_in, fan_out, 1, stride, bias=False), nn.BatchNorm2d(fan_out))
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        h = functional.relu(self.norm1(self.conv1(x)))
        return self.relu(self.norm2(self.conv2(h)) + self.shortcut(x))


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(3)
        self.block1, self.block2 = Residual(3, 3, 1), Residual(3, 4, 2)
        self.dropout = nn.Dropout(0.5)
        self.fc = nn.Linear(4, 3)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.copy_(torch.linspace(-0.3, 0.3, module.num_features))
                module.running_var.copy_(torch.linspace(0.5, 2.0, module.num_features))

    def forward(self, x):
        h = self.block2(self.block1(functional.relu(self.norm(self.conv(x)))))
        return self.fc(self.dropout(functional.adaptive_avg_pool2d(h, 1).flatten(1)))


class ViT(nn.Module):
    """Patches by convolution, a class token, positions, PyTorch's own encoder layer, head."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(2, 6, 3, 3)
        self.token = nn.Parameter(torch.zeros(1, 1, 6))
        self.positions = nn.Parameter(torch.zeros(1, 5, 6))
        self.encoder = nn.TransformerEncoderLayer(6, 2, 12, dropout=0.1, activation="gelu", batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(x), -1, -1), tokens], dim=1) + self.positions
        return self.head(self.encoder(tokens)[:, 0])


VOCABULARY, CONTEXT = 11, 6


def language_model(kind):
    """Hugging Face GPT-2 or Llama of one layer, with the attention they come with."""
    import transformers as hf

    if kind == "gpt2":
        config = hf.GPT2Config(
            vocab_size=VOCABULARY, n_embd=8, n_layer=1, n_head=2, n_positions=CONTEXT, bos_token_id=0, eos_token_id=0
        )
        return hf.GPT2LMHeadModel(config)
    config = hf.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=CONTEXT,
        bos_token_id=0,
        eos_token_id=0,
    )
    return hf.LlamaForCausalLM(config)


@dataclass(frozen=True)
class Specimen:
    """A network, its data (one batch), and its loss and outputs as functions of the flat parameters."""

    model: nn.Module
    batch: Any
    outputs: Any
    targets: torch.Tensor

    def hessian(self):
        theta = flat_parameters(self.model)
        return torch.autograd.functional.hessian(self._loss, theta, vectorize=True)

    def gauss_newton(self):
        jacobian, A, _ = self._linear()
        return jacobian.T @ A @ jacobian

    def fisher(self):
        """(1/N) sum of g g^T over samples or tokens, g by one backward pass each."""
        jacobian, _, outputs = self._linear()
        leaf = outputs.reshape(-1, outputs.shape[-1]).requires_grad_()
        loss = functional.cross_entropy(leaf, self.targets, reduction="sum")
        e = torch.autograd.grad(loss, leaf)[0]
        gradients = torch.einsum("nc,ncp->np", e, jacobian.reshape(*leaf.shape, -1))
        return gradients.T @ gradients / len(leaf)

    def _loss(self, theta):
        return functional.cross_entropy(self.outputs(theta), self.targets)

    def _linear(self):
        theta = flat_parameters(self.model)
        outputs = self.outputs(theta).detach()
        jacobian = torch.autograd.functional.jacobian(lambda t: self.outputs(t).reshape(-1), theta, vectorize=True)
        A = torch.autograd.functional.hessian(
            lambda o: functional.cross_entropy(o.view_as(outputs), self.targets), outputs.reshape(-1)
        )
        return jacobian, A, outputs


IMAGES = ("resnet", "vit")
NAMES = ("mlp", *IMAGES, "gpt2", "llama")


def specimen(name):
    """The named network, random in float64."""
    if name in ("gpt2", "llama"):
        torch.manual_seed(0)
        model = randomized(language_model(name), seed=1, scale=0.4).eval()
        ids = randint(VOCABULARY, 4, CONTEXT, seed=2)
        labels = ids.clone()
        labels[1, 3:] = -100  # ignored: no tokens there
        batch = {"input_ids": ids, "labels": labels}
        wanted = labels[:, 1:].flatten()
        valid = wanted != -100

        def outputs(theta):
            return call(model, theta, input_ids=ids).logits[:, :-1].flatten(0, 1)[valid]

        return Specimen(model, batch, outputs, wanted[valid])
    make, shape = {
        "mlp": (lambda: sequential_mlp((5, 7, 3), nn.Tanh, bias=True), (5,)),
        "resnet": (ResNet, (2, 6, 6)),
        "vit": (ViT, (2, 6, 6)),
    }[name]
    model, x, y = randomized(make(), seed=1, scale=0.4).eval(), randn(6, *shape, seed=2), randint(3, 6, seed=3)
    return Specimen(model, (x, y), lambda theta: call(model, theta, x), y)


@cache
def truth(name, matrix):
    """The dense matrix "hessian", "gauss_newton" or "fisher" of the named network, once a session."""
    with sdpa_kernel(SDPBackend.MATH):
        fast_path = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            return getattr(specimen(name), matrix)()
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_path)


def call(model, theta, *args, **kwargs):
    """The model's result at the flat parameters theta."""
    swapped, start = {}, 0
    for name, parameter in model.named_parameters():
        swapped[name] = theta[start : start + parameter.numel()].view(parameter.shape)
        start += parameter.numel()
    with in_double():
        return torch.func.functional_call(model, swapped, args, kwargs)


@contextmanager
def in_double():
    """Llama's norms round to float32, whatever comes in: seven digits are no reference."""
    from transformers.models.llama import modeling_llama

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    norm = modeling_llama.LlamaRMSNorm
    rounding, norm.forward = norm.forward, forward
    try:
        yield
    finally:
        norm.forward = rounding


def probes(size, count):
    return randn(size, count, seed=5).to(F64)
