"""An attacked image, for the report."""

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
    """An image before and after an attack; C is 1 or 3.

    Attributes:
        model: The model spec, and the defence in front of it, as in `Case.model_under_test`.
        attack: The attack spec.
        goal: The goal spec.
        threat: The threat spec.
        index: The index of the image in the data.
        clean: The image, (C, H, W), float32 in [0, 1].
        adversarial: The attacked image, (C, H, W), float32 in [0, 1].
        label: Its true class.
        clean_as: The predicted class of the clean image.
        clean_confidence: Its probability according to the model, in [0, 1].
        adversarial_as: The predicted class of the attacked image.
        adversarial_confidence: Its probability according to the model, in [0, 1].
        size: The size of the perturbation, in the units of the threat.
        success: Whether the attack reached its goal.
        perturbation: The perturbation of a universal attack, (C, H, W), float32, before clipping to [0, 1]; else None.
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
                raise ShapeError(f"{name} has shape {image.shape}; a picture is (C, H, W) with C = 1 or 3; move channels first")
            if not bool(((image >= 0) & (image <= 1)).all()):
                raise ArgumentError(
                    f"{name} of picture {self.index} has values outside [0, 1]; divide byte images by 255, undo normalisation"
                )
        if self.clean.shape != self.adversarial.shape:
            raise ShapeError(f"clean has shape {self.clean.shape}, adversarial {self.adversarial.shape}; they must be equal")
