"""The libraries that are compared with, each imported only when it is asked for."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from torch import nn

from robustkit.errors import ArgumentError, MissingExtraError

__all__ = ["gradients_kept", "load_art", "load_autoattack", "load_foolbox", "load_torchattacks"]

# The modules come back as Any: the libraries are optional, so a type checker may not find them.


def load_foolbox() -> Any:
    """The module `foolbox`.

    Raises:
        MissingExtraError: It is not installed, or its import fails.
    """
    before = os.environ.get("GIT_PYTHON_REFRESH")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")  # foolbox imports GitPython, which fails where there is no git
    try:
        return _load("foolbox", "foolbox", "foolbox")[0]
    finally:
        if before is None:
            del os.environ["GIT_PYTHON_REFRESH"]


def load_art() -> tuple[Any, Any]:
    """The modules `art.attacks.evasion` and `art.estimators.classification`.

    Raises:
        MissingExtraError: It is not installed, or its import fails.
    """
    evasion, classification = _load(
        "adversarial-robustness-toolbox", "art", "art.attacks.evasion", "art.estimators.classification"
    )
    return evasion, classification


def load_torchattacks() -> Any:
    """The module `torchattacks`. It is in no extra, since it forces old versions of other packages on everybody.

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
    """The module `pyautoattack`.

    Raises:
        MissingExtraError: It is not installed, or its import fails.
    """
    return _load("pyautoattack", "peers", "pyautoattack")[0]


@contextmanager
def gradients_kept(model: nn.Module) -> Iterator[None]:
    """The gradients of the parameters as they were: some libraries clear them, some add to them."""
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
            warnings.simplefilter("ignore")  # of deprecated names that the libraries themselves import
            return [import_module(name) for name in modules]
    except Exception as error:
        raise MissingExtraError(package, extra, error) from error
