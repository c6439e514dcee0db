"""Training against attacks: losses for any loop, and one loop for any model."""

from robustkit.training.fit import Epoch, Loss, fit
from robustkit.training.losses import madry, standard

__all__ = ["Epoch", "Loss", "fit", "madry", "standard"]
