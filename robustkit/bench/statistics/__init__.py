"""Intervals, tests and the number of images that they need."""
