"""The training loops of Lightning and of Hugging Face, as quiet as they can be, for tests."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from tests.language_models import new_model


def lightning_warns(test):
    """Lets a test pass though Lightning warns of its own imports, or that loaders have no workers."""
    for message in (
        "ignore:The '.*_dataloader' does not have many workers",
        "ignore:Found 2 .*in eval mode at the start of training",  # as meant
        "ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning",
    ):
        test = pytest.mark.filterwarnings(message)(test)
    return test


def lightning_trainer(callbacks, updates, **options):
    """A trainer on the CPU that writes nothing, for so many updates."""
    from lightning.pytorch import Trainer

    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    options = {"enable_checkpointing": False, "max_epochs": -1, **options}
    return Trainer(accelerator="cpu", devices=1, max_steps=updates, callbacks=callbacks, **quiet, **options)


def wrapped_in_lightning(model, optimizer):
    """A LightningModule that holds the model as a part and trains it with this optimizer."""
    from lightning.pytorch import LightningModule

    class Wrapped(LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.losses = model, []

        def training_step(self, batch, batch_idx):
            loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self):
            return optimizer

    return Wrapped()


def batches_of(x, y, batch_size=8, shuffle=True):
    """A loader; shuffled by PyTorch's own generator."""
    return DataLoader(TensorDataset(x, y), batch_size=batch_size, shuffle=shuffle)


class Windows(Dataset):
    """Rows of tokens, as a causal language model takes them."""

    def __init__(self, tokens):
        self.tokens = tokens

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, index):
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


VOCABULARY = 12
TOKENS = torch.randint(0, VOCABULARY, (24, 6), generator=torch.Generator().manual_seed(0))


def tiny_gpt2():
    """A GPT-2 with dropout, of 2 layers."""
    return new_model("gpt2", VOCABULARY, width=8).train()


def hugging_face_trainer(model, callbacks, updates, folder, optimizer=None, **options):
    """A trainer on the CPU that writes nothing but what is asked for, for so many updates on TOKENS."""
    from transformers import Trainer, TrainingArguments

    quiet = {"report_to": [], "disable_tqdm": True, "logging_strategy": "no", "log_level": "error"}
    options = {"save_strategy": "no", "per_device_train_batch_size": 8, **options}
    arguments = TrainingArguments(str(folder), use_cpu=True, max_steps=updates, **quiet, **options)
    rows = Windows(TOKENS)
    optimizers = (optimizer, None)
    return Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, optimizers=optimizers, callbacks=callbacks)
