"""What is known of a reference model: how it was made, what it scores, and under which terms it may be used."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import FunctionType

import torch
from torch import nn

from robustkit.attacks import PGD
from robustkit.data import load
from robustkit.errors import ArgumentError
from robustkit.zoo.recipes import Recipe, one_thread

__all__ = ["Card", "Scores", "read", "score", "sha256", "table"]

_JUDGE = PGD(steps=40)

Plain = str | int | float | None


@dataclass(frozen=True)
class Scores:
    """What a model gets right of its held-out data.

    Attributes:
        data: Spec of the held-out data.
        data_hash: `Data.hash` of it.
        n: Number of images.
        clean_accuracy: Share classified right.
        robust_accuracy: Share classified right both before and after the attack.
        attack: That attack, with seed 0.
        threat: What it may change.
    """

    data: str
    data_hash: str
    n: int
    clean_accuracy: float
    robust_accuracy: float
    attack: str
    threat: str


@dataclass(frozen=True)
class Card:
    """The facts about a reference model, as measured when it was made.

    Attributes:
        name: What `zoo.load` calls it.
        recipe: All fields of its recipe, functions by their names.
        seed: The seed of the recipe.
        sha256: Of the weights file.
        parameters: Number of trained numbers.
        scores: On held-out data.
        training_s: Processor seconds that the training took, on one thread.
        torch: Version of torch that trained it.
        processor: Instruction set that torch used; another one may round differently.
        data_licence: What the source of the data says about it.
        weights_licence: Of the weights.
    """

    name: str
    recipe: dict[str, Plain]
    seed: int
    sha256: str
    parameters: int
    scores: Scores
    training_s: float
    torch: str
    processor: str
    data_licence: str
    weights_licence: str = "Apache-2.0"

    def write(self, path: Path) -> None:
        """Write the card as JSON."""
        path.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


def read(path: Path) -> Card:
    """The card in a file.

    Raises:
        ArgumentError: The file is missing or is no card.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return Card(**{**found, "scores": Scores(**found["scores"])})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ArgumentError(f"path={str(path)!r} is no card of a reference model ({error}); `zoo.train` writes one") from error


def score(model: nn.Module, recipe: Recipe) -> Scores:
    """The model measured on the held-out data of its recipe, on one thread; takes seconds."""
    data = load(recipe.data)
    with one_thread():
        with torch.no_grad():
            right = model(data.x).argmax(1) == data.y
        broken = _JUDGE(model, data.x, data.y, threat=recipe.threat).success
    clean, robust = (int(hits.sum()) / len(data) for hits in (right, ~broken))
    return Scores(recipe.data, data.hash, len(data), clean, robust, repr(_JUDGE), repr(recipe.threat))


def sha256(path: Path) -> str:
    """Of a file, in hexadecimal.

    Raises:
        ArgumentError: The file cannot be read.
    """
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise ArgumentError(f"path={str(path)!r} cannot be read ({error}); reinstall robustkit, or train it anew") from error


def table(recipe: Recipe) -> dict[str, Plain]:
    """The fields of a recipe as JSON knows them: functions by their names, attacks and threats as they print."""
    return {field.name: _plain(getattr(recipe, field.name)) for field in fields(recipe)}


def _plain(value: object) -> Plain:
    if value is None or isinstance(value, str | int | float):
        return value
    return value.__name__ if isinstance(value, FunctionType) else repr(value)
