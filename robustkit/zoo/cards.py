"""Cards of reference models: recipe, accuracy and licences."""

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

__all__ = ["Card", "Scores", "measure_scores", "read_card", "recipe_to_dict", "sha256"]

_EVALUATION_ATTACK = PGD(steps=40)

JsonValue = str | int | float | None


@dataclass(frozen=True)
class Scores:
    """The accuracy of a model on its held-out data.

    Attributes:
        data: Spec of the held-out data.
        data_hash: `Data.hash` of the held-out data.
        n: Number of images.
        clean_accuracy: Share classified correctly.
        robust_accuracy: Share classified correctly both before and after the attack.
        attack: The attack, run with seed 0.
        threat: The threat model.
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
    """Facts about a reference model, measured when it was trained.

    Attributes:
        name: The name for `zoo.load`.
        recipe: All fields of its recipe, functions by name.
        seed: The seed of the recipe.
        sha256: SHA-256 of the weights file, in hexadecimal.
        parameters: Number of parameters.
        scores: Accuracies on the held-out data.
        training_s: Processor seconds of the training, on one thread.
        torch: Version of torch.
        processor: Instruction set that torch used; another one may round differently.
        data_licence: Licence of the data, as its source states it.
        weights_licence: Licence of the weights.
    """

    name: str
    recipe: dict[str, JsonValue]
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


def read_card(path: Path) -> Card:
    """Read a card from a file.

    Raises:
        ArgumentError: The file is missing or is not a card.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return Card(**{**content, "scores": Scores(**content["scores"])})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ArgumentError(
            f"path={str(path)!r} is not a card of a reference model ({error}); write one with zoo.train"
        ) from error


def measure_scores(model: nn.Module, recipe: Recipe) -> Scores:
    """Measure the clean and robust accuracy on the held-out data of the recipe, on one thread."""
    data = load(recipe.data)
    with one_thread():
        with torch.no_grad():
            correct = model(data.x).argmax(1) == data.y
        attacked = _EVALUATION_ATTACK(model, data.x, data.y, threat=recipe.threat).success
    clean, robust = (int(mask.sum()) / len(data) for mask in (correct, ~attacked))
    return Scores(recipe.data, data.hash, len(data), clean, robust, repr(_EVALUATION_ATTACK), repr(recipe.threat))


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal.

    Raises:
        ArgumentError: The file cannot be read.
    """
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise ArgumentError(
            f"path={str(path)!r} cannot be read ({error}); reinstall robustkit, or train the model again"
        ) from error


def recipe_to_dict(recipe: Recipe) -> dict[str, JsonValue]:
    """Convert a recipe to JSON values: functions by name, attacks and threats by repr."""
    return {field.name: _to_json_value(getattr(recipe, field.name)) for field in fields(recipe)}


def _to_json_value(value: object) -> JsonValue:
    if value is None or isinstance(value, str | int | float):
        return value
    return value.__name__ if isinstance(value, FunctionType) else repr(value)
