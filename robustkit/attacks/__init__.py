"""Attacks: one file each, named after its paper."""

from robustkit.attacks.apgd import APGD
from robustkit.attacks.deepfool import DeepFool
from robustkit.attacks.fab import FAB
from robustkit.attacks.fgsm import FGSM
from robustkit.attacks.fmn import FMN
from robustkit.attacks.l1_apgd import L1APGD
from robustkit.attacks.mifgsm import MIFGSM
from robustkit.attacks.pgd import PGD
from robustkit.attacks.pixels.one_pixel import OnePixel
from robustkit.attacks.pixels.pixel_search import PixelSearch
from robustkit.attacks.pixels.sparse_rs import SparseRS
from robustkit.attacks.rays import RayS
from robustkit.attacks.square import Square
from robustkit.attacks.standard.standard import Standard
from robustkit.attacks.universal import Perturbation, UniversalDeepFool, UniversalPGD, UniversalSingular

__all__ = [
    "APGD",
    "FAB",
    "FGSM",
    "FMN",
    "L1APGD",
    "MIFGSM",
    "PGD",
    "DeepFool",
    "OnePixel",
    "Perturbation",
    "PixelSearch",
    "RayS",
    "SparseRS",
    "Square",
    "Standard",
    "UniversalDeepFool",
    "UniversalPGD",
    "UniversalSingular",
]
