"""Attacks: one file each, named after its paper."""

from robustkit.attacks.fgsm import FGSM
from robustkit.attacks.mifgsm import MIFGSM
from robustkit.attacks.pgd import PGD

__all__ = ["FGSM", "MIFGSM", "PGD"]
