"""Generating images with the base and any adapters. `request` imports no torch."""
