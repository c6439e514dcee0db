"""One change for all images: what a universal attack comes to."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, final

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from robustkit._engine.ledger import Message
from robustkit.attack import FLAT_GRADIENTS, Attack
from robustkit.errors import ArgumentError, ShapeError
from robustkit.problem import Problem

__all__ = ["Perturbation"]


@final
@dataclass(frozen=True, eq=False, repr=False)
class Perturbation(Attack):
    """A finished universal perturbation; as an attack it adds itself to every input, of any model.

    What the box of the inputs or a smaller budget does not allow is cut off for each input when it is used.

    Attributes:
        delta: The change, (1, *S).
        recipe: What it was made by.
        forwards: How many images went through the model while it was learned.
        backwards: How many gradients were taken.
        flat: How many of them carried no signal; most of them, and the change may be worth nothing.
    """

    universal: ClassVar[bool] = True

    delta: Tensor
    recipe: str
    forwards: int = 0
    backwards: int = 0
    flat: int = 0

    def __post_init__(self) -> None:
        if self.delta.dim() < 2 or len(self.delta) != 1 or not self.delta.is_floating_point():
            raise ShapeError(f"delta is {self.delta.dtype} of shape {tuple(self.delta.shape)}; it must be floating, (1, *S)")
        if not bool(self.delta.isfinite().all()):
            raise ArgumentError("delta holds values that are not finite; a change is made of numbers")

    def __repr__(self) -> str:
        return f"Perturbation({'x'.join(map(str, self.delta.shape[1:]))} by {self.recipe})"

    @property
    def own_flags(self) -> tuple[Message, ...]:
        """That most gradients carried no signal while it was learned, if so."""
        if self.flat <= self.backwards / 2:
            return ()
        why = f"{self.flat} of {self.backwards} gradients were zero, not finite or missing while the change was learned: "
        return (Message(FLAT_GRADIENTS, why + "it may be worth nothing, and what it leaves is no robustness"),)

    def run(self, problem: Problem) -> Tensor:
        """Every input with the change added, inside its own threat set."""
        x = problem.x
        if x.shape[1:] != self.delta.shape[1:]:
            raise ShapeError(f"x has shape {tuple(x.shape)}, the perturbation {tuple(self.delta.shape)}; they must fit")
        return problem.threat.project(x + self.delta.to(x), x)

    def picture(self) -> NDArray[np.uint8]:
        """The change as an image, (H, W) or (H, W, 3): grey is no change, white and black the largest in either direction.

        Raises:
            ShapeError: It is none of an image (1, H, W) or (3, H, W).
        """
        if self.delta.dim() != 4 or self.delta.shape[1] not in (1, 3):
            raise ShapeError(f"a change of shape {tuple(self.delta.shape)} cannot be drawn; images are (1 or 3, H, W)")
        scaled = self.delta[0].double().cpu() / self.delta.double().abs().max().clamp(min=1e-12).cpu()
        drawn = ((scaled + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
        return drawn[..., 0] if drawn.shape[2] == 1 else drawn

    def save(self, path: str | Path) -> None:
        """Write it to one safetensors file."""
        told = {"recipe": self.recipe, "forwards": self.forwards, "backwards": self.backwards, "flat": self.flat}
        Path(path).write_bytes(save({"delta": self.delta.contiguous()}, {"robustkit": json.dumps(told)}))

    @classmethod
    def load(cls, path: str | Path) -> Perturbation:
        """Read what `save` wrote; no code is executed.

        Raises:
            ArgumentError: The file is missing or is no perturbation.
        """
        try:
            with safe_open(str(path), framework="pt") as file:
                told = json.loads((file.metadata() or {})["robustkit"])
                return cls(file.get_tensor("delta"), told["recipe"], told["forwards"], told["backwards"], told["flat"])
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
            raise ArgumentError(f"path={str(path)!r} is no perturbation written by Perturbation.save ({error})") from error
