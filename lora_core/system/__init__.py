"""This computer: paths, processes, signals, hardware, other tools. No torch."""
