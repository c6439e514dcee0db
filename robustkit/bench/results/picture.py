"""An attacked image, to be looked at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import numpy as np
from numpy.typing import NDArray

from robustkit.errors import ArgumentError, ShapeError

__all__ = ["Picture"]


@final
@dataclass(frozen=True, eq=False)
class Picture:
    """One attacked image, before and after, C being 1 or 3.

    Attributes:
        model: The model's spec, as in the record that the picture belongs to, and the defence that it stands behind.
        attack: The attack's spec, likewise.
        goal: The goal's spec, likewise.
        threat: The threat's spec, likewise.
        index: Which image of the data it is.
        clean: The image, (C, H, W), float32 in [0, 1].
        adversarial: The attacked image, (C, H, W), float32 in [0, 1].
        label: Its true class.
        clean_as: What the model takes the clean image for.
        clean_confidence: The probability that the model gives that, in [0, 1].
        adversarial_as: What the model takes the attacked image for.
        adversarial_confidence: The probability that the model gives that, in [0, 1].
        size: How large the change is, in the units of the threat.
        success: Whether the attack reached its goal.
        perturbation: Of a universal attack the one change behind all pictures, (C, H, W), float32; the box may have cut it.
    """

    model: str
    attack: str
    goal: str
    threat: str
    index: int
    clean: NDArray[np.float32]
    adversarial: NDArray[np.float32]
    label: str
    clean_as: str
    clean_confidence: float
    adversarial_as: str
    adversarial_confidence: float
    size: float
    success: bool
    perturbation: NDArray[np.float32] | None = None

    def __post_init__(self) -> None:
        for name, image in (("clean", self.clean), ("adversarial", self.adversarial)):
            if image.ndim != 3 or image.shape[0] not in (1, 3) or image.size == 0:
                raise ShapeError(
                    f"{name} has shape {image.shape}; a picture is (C, H, W) with C = 1 or 3, so move channels first"
                )
            if not bool(((image >= 0) & (image <= 1)).all()):
                raise ArgumentError(
                    f"{name} of picture {self.index} leaves [0, 1]; divide byte images by 255, undo normalisation"
                )
        if self.clean.shape != self.adversarial.shape:
            raise ShapeError(f"clean has shape {self.clean.shape}, adversarial {self.adversarial.shape}; they must be equal")
