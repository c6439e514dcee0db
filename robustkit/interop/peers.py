"""Import other libraries, each only when it is needed."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from torch import nn

from robustkit.errors import ArgumentError, MissingExtraError

__all__ = ["load_art", "load_autoattack", "load_foolbox", "load_torchattacks", "restore_gradients"]

# Modules are typed as Any: the libraries are optional, so a type checker may not find them.


def load_foolbox() -> Any:
    """Import the module `foolbox`.

    Raises:
        MissingExtraError: It is not installed, or its import fails.
    """
    before = os.environ.get("GIT_PYTHON_REFRESH")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")  # foolbox imports GitPython, which fails where git is not installed
    try:
        return _load("foolbox", "foolbox", "foolbox")[0]
    finally:
        if before is None:
            del os.environ["GIT_PYTHON_REFRESH"]


def load_art() -> tuple[Any, Any]:
    """Import the modules `art.attacks.evasion` and `art.estimators.classification`.

    Raises:
        MissingExtraError: It is not installed, or its import fails.
    """
    evasion, classification = _load(
        "adversarial-robustness-toolbox", "art", "art.attacks.evasion", "art.estimators.classification"
    )
    return evasion, classification


def load_torchattacks() -> Any:
    """Import the module `torchattacks`. It is in no extra, because it requires old versions of other packages.

    Raises:
        ArgumentError: It is not installed, or its import fails.
    """
    try:
        return _load("torchattacks", "", "torchattacks")[0]
    except MissingExtraError as error:
        raise ArgumentError(
            f"torchattacks cannot be imported ({error.__cause__}); install it with: pip install --no-deps torchattacks"
        ) from error


def load_autoattack() -> Any:
    """Import the module `pyautoattack`.

    Raises:
        MissingExtraError: It is not installed, or its import fails.
    """
    return _load("pyautoattack", "peers", "pyautoattack")[0]


@contextmanager
def restore_gradients(model: nn.Module) -> Iterator[None]:
    """Restore the parameters' `.grad` afterwards: some libraries clear it, some add to it."""
    before = [(parameter, parameter.grad) for parameter in model.parameters()]
    try:
        for parameter, _ in before:
            parameter.grad = None
        yield
    finally:
        for parameter, grad in before:
            parameter.grad = grad


def _load(package: str, extra: str, *modules: str) -> list[Any]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about deprecated names that the libraries import
            return [import_module(name) for name in modules]
    except Exception as error:
        raise MissingExtraError(package, extra, error) from error
