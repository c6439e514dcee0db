"""Measurements beside the peers, in one run each; the results are committed as files."""
