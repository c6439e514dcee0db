"""Internals: running a model, counting its queries, and restoring all state. Not part of the public interface."""
