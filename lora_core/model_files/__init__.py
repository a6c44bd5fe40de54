"""Checkpoints on disk, read without trust and without torch: families, headers, names, sizes."""
