"""Attacks on single pixels of images; each file is one paper."""
