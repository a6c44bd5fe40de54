"""What can be computed from adapters as they are: what is in them, and better ones made of that."""
