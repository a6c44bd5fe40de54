"""What other tools read from an adapter file."""
