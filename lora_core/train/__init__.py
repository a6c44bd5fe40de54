"""Training: a generator that does the maths, and one trainer that decides everything else."""
