"""Execution of a plan: models on their data, blocks, and the processes that compute them."""
