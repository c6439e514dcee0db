"""Universal attacks: one perturbation for all examples."""

from robustkit.attacks.universal._universal import UniversalAttack
from robustkit.attacks.universal.deepfool import UniversalDeepFool
from robustkit.attacks.universal.perturbation import Perturbation
from robustkit.attacks.universal.pgd import UniversalPGD
from robustkit.attacks.universal.singular import UniversalSingular

__all__ = ["Perturbation", "UniversalAttack", "UniversalDeepFool", "UniversalPGD", "UniversalSingular"]
