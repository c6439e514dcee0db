"""Defences, one file each; each says how it can be differentiated."""

from robustkit.defences.quantise import Quantise

__all__ = ["Quantise"]
