"""Measuring an adapter on fixed (picture, noise, timestep) triples."""
