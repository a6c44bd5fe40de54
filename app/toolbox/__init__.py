"""The Toolbox tab."""
