"""A learned universal perturbation: an attack that adds it to every input."""

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
    """A learned universal perturbation; as an attack it is added to every input, of any model.

    The perturbed inputs are projected onto the threat set, which may have a smaller budget than the perturbation.

    Attributes:
        delta: The perturbation, (1, *S).
        recipe: The repr of the attack that learned it.
        forwards: Number of examples that went through the model while it was learned.
        backwards: Number of gradients that were computed.
        flat: Number of gradients without a signal; if this is most of them, a flag says so.
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
            raise ArgumentError("delta holds values that are not finite; a perturbation must be finite")

    def __repr__(self) -> str:
        return f"Perturbation({'x'.join(map(str, self.delta.shape[1:]))} by {self.recipe})"

    @property
    def own_flags(self) -> tuple[Message, ...]:
        """A flag where most gradients had no signal while the perturbation was learned."""
        if self.flat <= self.backwards / 2:
            return ()
        why = f"{self.flat} of {self.backwards} gradients were zero, not finite or missing while it was learned: "
        return (Message(FLAT_GRADIENTS, why + "surviving it is no evidence of robustness"),)

    def run(self, problem: Problem) -> Tensor:
        """Every input plus the perturbation, projected onto its own threat set."""
        x = problem.x
        if x.shape[1:] != self.delta.shape[1:]:
            expected = f"(N, {', '.join(map(str, self.delta.shape[1:]))})"
            raise ShapeError(f"x has shape {tuple(x.shape)}; it must be {expected} to fit the perturbation")
        return problem.threat.project(x + self.delta.to(x), x)

    def picture(self) -> NDArray[np.uint8]:
        """The perturbation as an image, (H, W) or (H, W, 3): grey is zero, white and black the largest magnitude.

        Raises:
            ShapeError: The examples are not images (1, H, W) or (3, H, W).
        """
        if self.delta.dim() != 4 or self.delta.shape[1] not in (1, 3):
            raise ShapeError(f"a perturbation of shape {tuple(self.delta.shape)} cannot be drawn; it must be (1, 1 or 3, H, W)")
        scaled = self.delta[0].double().cpu() / self.delta.double().abs().max().clamp(min=1e-12).cpu()
        image = ((scaled + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
        return image[..., 0] if image.shape[2] == 1 else image

    def save(self, path: str | Path) -> None:
        """Write the perturbation to one safetensors file."""
        metadata = {"recipe": self.recipe, "forwards": self.forwards, "backwards": self.backwards, "flat": self.flat}
        Path(path).write_bytes(save({"delta": self.delta.contiguous()}, {"robustkit": json.dumps(metadata)}))

    @classmethod
    def load(cls, path: str | Path) -> Perturbation:
        """Read a file written by `save`; no code is executed.

        Raises:
            ArgumentError: The file is missing or was not written by `save`.
        """
        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = json.loads((file.metadata() or {})["robustkit"])
                counts = [metadata[name] for name in ("forwards", "backwards", "flat")]
                return cls(file.get_tensor("delta"), metadata["recipe"], *counts)
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
            raise ArgumentError(
                f"path={str(path)!r} is no file written by Perturbation.save ({error}); pass one that is"
            ) from error
