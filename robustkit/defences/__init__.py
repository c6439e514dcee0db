"""Defences, one per file, each with the views by which it can be differentiated."""

from robustkit.defences.gaussian_noise import GaussianNoise
from robustkit.defences.jpeg_like import JPEGLike
from robustkit.defences.median_filter import MedianFilter
from robustkit.defences.quantise import Quantise
from robustkit.defences.random_resize import RandomResize

__all__ = ["GaussianNoise", "JPEGLike", "MedianFilter", "Quantise", "RandomResize"]
