"""Adversarial training: losses for any training loop, and a training loop for any model."""

from robustkit.training.fit import Epoch, Loss, fit
from robustkit.training.losses import madry, standard

__all__ = ["Epoch", "Loss", "fit", "madry", "standard"]
