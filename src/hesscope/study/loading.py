"""Loading the user's own: functions by import path, language models and text, checkpoints, partitions."""

from __future__ import annotations

import importlib
import re
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hesscope.core.checks import nearest, require_choice
from hesscope.core.errors import HesscopeError, InputError
from hesscope.data import LabelledData
from hesscope.models.language_model import CausalModel, load_network, load_tokenizer, require_model_folder
from hesscope.models.language_model import transformers_version as require_transformers
from hesscope.partition import Partition
from hesscope.study.language_model import read_text

SCHEMES: dict[str, Callable[[nn.Module], Partition]] = {
    "tensor": Partition.by_tensor,
    "layer": Partition.by_layer,
    "row": Partition.by_row,
    "column": Partition.by_column,
    "head": Partition.by_head,
    "module": Partition.by_module,
}
# Under which key training scripts keep the parameters in a checkpoint with more in it.
NESTED_KEYS = ("state_dict", "model_state_dict", "model")
# Under which they keep the state of the optimizer.
OPTIMIZER_KEYS = ("optimizer", "optimizer_state_dict")
NAMES_SHOWN = 5

# What begins a path to a language model's folder, and to a text.
FOLDER, TEXT = "hf:", "text:"
DTYPES = {"float32": torch.float32, "float64": torch.float64}


@contextmanager
def importable_from(folder: Path) -> Iterator[None]:
    """Let `import` find modules in `folder` and in the current directory while the body runs."""
    added = [str(folder.resolve()), str(Path.cwd())]
    sys.path[:0] = added
    try:
        yield
    finally:
        for entry in added:
            sys.path.remove(entry)


def resolve(key: str, path: str) -> Any:
    """The object that an import path `pkg.module:name` names; `key` is the configuration key, for messages.

    Raises:
        InputError: malformed, no such module, the module fails to import, or no such name in it.
    """
    module_name, colon, name = path.partition(":")
    if not colon or not module_name or not name:
        raise InputError(f"{key} = {path!r} must have the form 'pkg.module:function'")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or module_name
        if module_name == missing or module_name.startswith(missing + "."):
            raise InputError(f"{key} = {path!r}: there is no module {missing!r} to import") from error
        raise InputError(f"{key} = {path!r}: importing {module_name} failed: {error}") from error
    except Exception as error:
        raise InputError(f"{key} = {path!r}: importing {module_name} failed: {_one_line(error)}") from error
    if not hasattr(module, name):
        raise InputError(f"{key} = {path!r}: module {module_name} has no {name!r}{nearest(name, dir(module))}")
    return getattr(module, name)


def call_factory(key: str, path: str, arguments: dict[str, Any]) -> Any:
    """Call the function at `path`; its failure is told in one line."""
    factory = resolve(key, path)
    if not callable(factory):
        raise InputError(f"{key} = {path!r} is not a function")
    try:
        return factory(**arguments)
    except HesscopeError:
        raise
    except (Exception, SystemExit) as error:
        raise InputError(f"{key} = {path!r} failed: {_one_line(error)}") from error


def load_model(path: str, arguments: dict[str, Any], checkpoint: Path | None, base: Path = Path()) -> nn.Module:
    """The network, with the checkpoint's parameters if one is given; `base`: what "hf:DIR" is relative to."""
    model = load_folder(path, arguments, base) if path.startswith(FOLDER) else call_factory("model", path, arguments)
    if not isinstance(model, nn.Module):
        raise InputError(f"model = {path!r} must return a torch.nn.Module, got {type(model).__name__}")
    if checkpoint is not None:
        load_checkpoint(model, checkpoint)
    return model


def load_folder(path: str, arguments: dict[str, Any], base: Path) -> nn.Module:
    """The causal language model of "hf:DIR"; its one argument is dtype, "float32" unless told, or "float64".

    Raises:
        InputError: transformers is missing, another argument, or no such model.
    """
    require_arguments("model", path, arguments, {"dtype": str})
    dtype = arguments.get("dtype", "float32")
    require_choice("dtype of model_arguments", dtype, DTYPES)
    require_transformers(f"model = {path!r}")
    folder = base / path.removeprefix(FOLDER)
    require_model_folder(folder, "model")
    return load_network(folder, DTYPES[dtype])


def load_text(
    path: str, arguments: dict[str, Any], base: Path, model_path: str, model: nn.Module
) -> list[dict[str, Tensor]]:
    """The batches of "text:FILE" in tokens of the model's own tokenizer; arguments as of CausalModel.batches.

    Raises:
        InputError: the model is no "hf:DIR", an argument does not fit, the file is no text or too short, or tokenizer
            and model do not belong together.
    """
    if not model_path.startswith(FOLDER):
        raise InputError(
            f"data = {path!r} needs the tokenizer of a language model: model = 'hf:DIR', got {model_path!r}"
        )
    require_arguments("data", path, arguments, {"contexts": int, "length": int, "batch_size": int})
    text = read_text(base / path.removeprefix(TEXT), "data")
    tokenizer = load_tokenizer(base / model_path.removeprefix(FOLDER))
    return CausalModel(model, tokenizer).batches(text, **arguments)


def require_arguments(key: str, path: str, arguments: dict[str, Any], accepted: dict[str, type]) -> None:
    """Raise InputError for an argument that is not accepted, or of another type; `key` is the configuration key."""
    for name, value in arguments.items():
        if name not in accepted:
            raise InputError(
                f"{key}_arguments has the unknown key {name!r}; {key} = {path!r} takes {', '.join(accepted)}"
                f"{nearest(name, accepted)}"
            )
        if type(value) is not accepted[name]:
            kind = "a whole number" if accepted[name] is int else "a text"
            raise InputError(f"{name} of {key}_arguments must be {kind}, got {value!r}")


def load_checkpoint(model: nn.Module, path: Path) -> None:
    """Put a checkpoint's tensors into the model.

    Raises:
        InputError: it cannot be read, or its names or shapes do not fit the model's (which ones).
    """
    tensors = _read_tensors(path)
    require_fits(model, path, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    model.load_state_dict(tensors, strict=False)


def require_fits(model: nn.Module, path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise InputError unless a checkpoint with tensors of these shapes has all that the model has, and nothing else.

    Tensors that the model shares between several names may be there under one of them.
    """
    own = model.state_dict()
    storage = {name: tensor.data_ptr() for name, tensor in own.items()}
    given = {storage[name] for name in shapes if name in storage}
    missing = [name for name in own if name not in shapes and storage[name] not in given]
    unknown = [name for name in shapes if name not in own]
    misfits = [
        f"{name} has shape {list(shape)} there and {list(own[name].shape)} in the model"
        for name, shape in shapes.items()
        if name in own and shape != tuple(own[name].shape)
    ]
    problems = [
        *([f"missing {_shown(missing)}"] if missing else []),
        *([f"not in the model: {_shown(unknown)}"] if unknown else []),
        *([_shown(misfits)] if misfits else []),
    ]
    if problems:
        hint = "; its names begin with 'module.', strip that" if all(n.startswith("module.") for n in shapes) else ""
        raise InputError(f"checkpoint {path} does not fit the model: {'; '.join(problems)}{hint}")


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a checkpoint's tensors, without reading what is in them.

    Raises:
        InputError: it cannot be read.
    """
    if path.suffix == ".safetensors":
        with _readable(path):
            from safetensors import safe_open

            with safe_open(path, framework="pt") as file:
                return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return {name: tuple(tensor.shape) for name, tensor in _read_tensors(path).items()}


def optimizer_groups(path: Path) -> list[dict[str, Any]]:
    """Parameter groups of the optimizer whose state a `.pt` file holds, or is; empty if there is none."""
    content = _read_content(path)
    for key in OPTIMIZER_KEYS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    groups = content.get("param_groups") if isinstance(content, dict) else None
    known = isinstance(groups, list) and all(isinstance(group, dict) and "lr" in group for group in groups)
    return list(groups) if groups and known else []


def load_data(
    path: str, arguments: dict[str, Any], loss: str, base: Path = Path(), model: tuple[str, nn.Module] | None = None
) -> Any:
    """What the data function returns; hesscope's own data sets with targets as the loss wants them.

    base, model: what "text:FILE" is relative to, and for which model (as configured, and loaded) it is cut into tokens.
    """
    if path.startswith(TEXT) and model is not None:
        return load_text(path, arguments, base, *model)
    data = call_factory("data", path, arguments)
    if isinstance(data, LabelledData) and model is not None and model[0].startswith(FOLDER):
        raise InputError(f"data = {path!r} is no text, which model = {model[0]!r} needs: data = 'text:FILE'")
    return data.batch(loss) if isinstance(data, LabelledData) else data


def load_loss(loss: str) -> Any:
    """A loss's name, or the object at its import path (a class of torch losses is instantiated)."""
    if ":" not in loss:
        return loss
    found = resolve("loss", loss)
    return found() if isinstance(found, type) and issubclass(found, nn.Module) else found


def load_partition(partition: str, model: nn.Module, key: str = "partition") -> Partition:
    """One of the schemes by name, or what the function at an import path makes of the model; `key`: for messages."""
    if partition in SCHEMES:
        return SCHEMES[partition](model)
    if ":" not in partition:
        accepted = ", ".join(repr(name) for name in SCHEMES)
        raise InputError(
            f"{key} = {partition!r} must be one of {accepted} or 'pkg.module:function'{nearest(partition, SCHEMES)}"
        )
    made = call_factory(key, partition, {"model": model})
    if not isinstance(made, Partition):
        raise InputError(f"{key} = {partition!r} must return a hesscope.Partition, got {type(made).__name__}")
    return made


def _read_tensors(path: Path) -> dict[str, Tensor]:
    content = _read_content(path)
    for key in NESTED_KEYS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        accepted = ", ".join(repr(key) for key in NESTED_KEYS)
        raise InputError(f"checkpoint {path} is not a dict of tensors (a state_dict), nor has it one under {accepted}")
    return dict(content)


def _read_content(path: Path) -> Any:
    """What a file holds; tensors of a `.pt` file stay on the disk until they are used, where the format allows it."""
    with _readable(path):
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turns whatever reading a file raises into one line."""
    if not path.is_file():
        raise InputError(f"checkpoint {path} does not exist")
    try:
        yield
    except Exception as error:
        first = _one_line(error).split(". ")[0]
        told = f": {first}" if len(str(error).split()) > 1 else ""  # a key or a byte, without its place, says nothing
        raise InputError(
            f"checkpoint {path} cannot be read: it must be a file of torch.save or safetensors that holds tensors "
            f"only, a state_dict{told}"
        ) from error


def _shown(names: list[str]) -> str:
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more


def _one_line(error: BaseException) -> str:
    text = re.sub(r"\x1b\[[0-9;]*m", "", " ".join(str(error).split()))
    return f"{type(error).__name__}: {text}"
