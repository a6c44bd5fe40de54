"""What a run is asked to do: schema, choices, checks. No torch."""
