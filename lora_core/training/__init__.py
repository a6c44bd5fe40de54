"""Training: a generator that does the maths, and one conductor that decides everything else."""
