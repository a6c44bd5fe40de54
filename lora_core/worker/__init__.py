"""What the warm worker can do, verb by verb; `serve.py` has its protocol."""
