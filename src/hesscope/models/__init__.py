"""The networks of the papers, and language models: the user's own in a folder, and a small one to try things on."""

from hesscope.models.convolutional import ConvNet, ResNet, lenet5, resnet, vgg
from hesscope.models.gpt import TrainedGPT, train_small_gpt
from hesscope.models.language_model import CausalModel, load_language_model
from hesscope.models.mlp import MLP, NormalizedMLP, linear, mlp, one_hidden

__all__ = [
    "MLP",
    "CausalModel",
    "ConvNet",
    "NormalizedMLP",
    "ResNet",
    "TrainedGPT",
    "lenet5",
    "linear",
    "load_language_model",
    "mlp",
    "one_hidden",
    "resnet",
    "train_small_gpt",
    "vgg",
]
