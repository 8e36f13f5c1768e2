"""The networks of the papers, and language models: the user's own in a folder, and a small one to try things on."""

from hesscope.models.gpt import TrainedGPT, train_small_gpt
from hesscope.models.language_model import CausalModel, load_language_model
from hesscope.models.mlp import MLP, linear, mlp, one_hidden

__all__ = ["MLP", "CausalModel", "TrainedGPT", "linear", "load_language_model", "mlp", "one_hidden", "train_small_gpt"]
