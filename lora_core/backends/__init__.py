"""Implementations of the frozen layers that depend on torch internals."""
