"""Checkpoints on disk, read as untrusted and without torch: families, headers, names, sizes."""
