"""Implementations of the frozen layers; the only place for private operators of torch."""
