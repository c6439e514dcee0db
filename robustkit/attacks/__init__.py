"""Attacks: one file each, named after its paper."""

from robustkit.attacks.deepfool import DeepFool
from robustkit.attacks.fgsm import FGSM
from robustkit.attacks.mifgsm import MIFGSM
from robustkit.attacks.one_pixel import OnePixel
from robustkit.attacks.pgd import PGD
from robustkit.attacks.pixel_search import PixelSearch
from robustkit.attacks.sparse_rs import SparseRS
from robustkit.attacks.universal import Perturbation, UniversalDeepFool, UniversalPGD, UniversalSingular

__all__ = [
    "FGSM",
    "MIFGSM",
    "PGD",
    "DeepFool",
    "OnePixel",
    "Perturbation",
    "PixelSearch",
    "SparseRS",
    "UniversalDeepFool",
    "UniversalPGD",
    "UniversalSingular",
]
