"""Measures models against attacks and shows what came out."""
