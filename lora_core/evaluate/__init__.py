"""Measuring an adapter, images and captions on fixed (image, noise, timestep) draws."""
