"""Adapter files: each format translates to and from `AdapterWeights`, and to nothing else."""
