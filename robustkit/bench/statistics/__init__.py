"""Confidence intervals, paired tests, their power and the sample size that they need."""
