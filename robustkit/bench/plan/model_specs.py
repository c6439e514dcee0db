"""The specs of models: `zoo:mnist-cnn`, `net.py:factory`, `torchvision:resnet50`, each optionally with a weights file."""

from __future__ import annotations

import hashlib
import importlib
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from robustkit import zoo
from robustkit._engine.factory import load_factory
from robustkit._engine.state_guard import fork_rng
from robustkit.bench.plan.specs import number
from robustkit.errors import ArgumentError, MissingExtraError
from robustkit.normalize import Normalize

__all__ = ["FORMS", "load_model", "model_hash", "normalizer"]

FORMS = ("zoo:NAME", "path/to/file.py:factory", "package.module:factory", "torchvision:NAME", "timm:NAME")


def load_model(spec: str, device: str = "cpu", normalize: str | None = None) -> nn.Module:
    """The model that `spec` names, in evaluation mode on `device`.

    Args:
        spec: zoo:NAME, path/to/file.py:factory, package.module:factory, torchvision:NAME or timm:NAME, each optionally
            followed by @weights=FILE (.safetensors, or .pt and .pth read without executing code).
        device: "cpu", "cuda" or "cuda:N".
        normalize: MEAN,STD of a normalisation in front of the model of a factory, as `normalizer` parses it.

    A factory runs with seeded generators, so that random weights are the same each time.

    Raises:
        ArgumentError: There is no such model, a factory fails or returns something else than a module, the weights do not fit,
            or the model has a normalisation of its own.
        MissingExtraError: torchvision or timm is not installed.
    """
    _check_device(device)
    name, at, weights = spec.partition("@weights=")
    normalization = normalizer(normalize, name) if normalize is not None else None
    with fork_rng(0):
        model = _make(name)
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model {name!r} returned {type(model).__name__}; a factory must return a torch nn.Module")
    if at:
        _load_weights(model, Path(weights), spec)
    whole = model if normalization is None else nn.Sequential(normalization, model)
    return whole.to(device).eval()


def normalizer(spec: str, name: str = "") -> Normalize:
    """MEAN,STD as a layer: `0.5,0.25`, or with a number per channel: `0.485:0.456:0.406,0.229:0.224:0.225`.

    Raises:
        ArgumentError: The spec is invalid, or the model `name` has a normalisation of its own.
    """
    if name.startswith(("zoo:", "torchvision:", "timm:")):
        raise ArgumentError(f"normalize={spec!r}: model {name!r} normalises its inputs itself; leave out --normalize")
    means, comma, stds = spec.partition(",")
    if not comma:
        raise ArgumentError(f"normalize={spec!r} must be MEAN,STD, for example 0.1307,0.3081 or 0.5:0.5:0.5,0.2:0.2:0.2")
    mean, std = ([number(part, "normalize") for part in side.split(":")] for side in (means, stds))
    if len(mean) != len(std):
        raise ArgumentError(
            f"normalize={spec!r} has {len(mean)} means and {len(std)} standard deviations; give one of each per channel"
        )
    return Normalize(mean, std)


def model_hash(model: nn.Module) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of the names, dtypes, shapes and bytes of all weights and buffers."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if not isinstance(tensor, Tensor):  # get_extra_state may add any object
            continue
        digest.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _check_device(device: str) -> None:
    kind, _, index = device.partition(":")
    known = kind in ("cpu", "cuda") and (index.isdecimal() or device == kind)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not known or (kind == "cuda" and int(index or 0) >= count):
        valid = (
            f"cpu or cuda (this machine has {count}: cuda:N with N below {count})" if count else "cpu: there is no cuda here"
        )
        raise ArgumentError(f"device={device!r} cannot be used; write {valid}")


def _make(name: str) -> Any:  # Any: a factory may return anything
    kind, _, rest = name.partition(":")
    if kind in ("torchvision", "timm"):
        return _pretrained(kind, rest)
    if ":" not in name:
        raise ArgumentError(f"model {name!r} does not exist; write {', '.join(FORMS)}")
    try:
        return zoo.load(rest) if kind == "zoo" else load_factory(name)()
    except ArgumentError as error:
        raise ArgumentError(f"model {name!r}: {error}" if kind == "zoo" else f"model {error}") from error


def _pretrained(library: str, name: str) -> nn.Module:
    """A model of another library with its default weights and its own normalisation inside."""
    try:
        package = importlib.import_module(library)
        models = importlib.import_module("torchvision.models") if library == "torchvision" else package
    except (ImportError, RuntimeError) as error:  # a torchvision built for another torch raises RuntimeError
        raise MissingExtraError(library, "vision", error) from error
    try:
        if library == "torchvision":
            weights = models.get_model_weights(name).DEFAULT
            return nn.Sequential(weights.transforms(), models.get_model(name, weights=weights))
        model: nn.Module = models.create_model(name, pretrained=True)
        config = models.data.resolve_model_data_config(model)
    except Exception as error:
        raise ArgumentError(
            f"model '{library}:{name}' cannot be loaded: {_one_line(error)}; downloading its weights needs the network"
        ) from error
    return nn.Sequential(Normalize(config["mean"], config["std"]), model)


def _load_weights(model: nn.Module, path: Path, spec: str) -> None:
    weights = _read_weights(path, spec)
    try:
        model.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ArgumentError(f"model {spec!r}: {path} does not fit the model: {_one_line(error)}") from error


def _read_weights(path: Path, spec: str) -> dict[str, Tensor]:
    if not path.is_file():
        raise ArgumentError(f"model {spec!r}: there is no weights file {path}; paths are relative to {Path.cwd()}")
    if path.suffix not in (".safetensors", ".pt", ".pth"):
        raise ArgumentError(
            f"model {spec!r}: {path.name} must end in .safetensors, .pt or .pth; other formats may execute code"
        )
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about the pickle protocol before it refuses the file
            weights: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch, pickle, zip and safetensors raise many types of errors for broken files
        if isinstance(error, SafetensorError) or path.suffix == ".safetensors":
            raise ArgumentError(f"model {spec!r}: {path} is not a readable safetensors file ({_one_line(error)})") from error
        raise ArgumentError(
            f"model {spec!r}: {path} is broken or contains other objects than tensors, which could execute code; "
            "save the state_dict() alone, best as .safetensors"
        ) from error
    return weights


def _one_line(error: BaseException) -> str:
    """An exception in one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__
