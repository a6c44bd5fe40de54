"""Making pictures with the base and any adapters."""
